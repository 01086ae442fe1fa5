"""Building the models of segmentation_models_pytorch, torchvision and transformers."""

from __future__ import annotations

from collections.abc import Container, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

from common.config import DataConfig, SegmenterConfig, height_width
from common.errors import UsageError
from common.weights import load_file

import segmentation_models_pytorch as smp
import torch
from torch import nn
from torchvision.models import get_model, get_model_builder, list_models, segmentation

from detseg_losses.integrations.extras import needs
from detseg_losses.integrations.samples import did_you_mean
from detseg_losses.spec import nearest

WIDE = {"hidden_sizes": [64, 128, 320, 512]}
DEEP = {**WIDE, "decoder_hidden_size": 768}
SEGFORMERS: dict[str, dict[str, Any]] = {
    "segformer_b0": {},
    "segformer_b1": WIDE,
    "segformer_b2": {**DEEP, "depths": [3, 4, 6, 3]},
    "segformer_b3": {**DEEP, "depths": [3, 4, 18, 3]},
    "segformer_b4": {**DEEP, "depths": [3, 8, 27, 3]},
    "segformer_b5": {**DEEP, "depths": [3, 6, 40, 3]},
}
"""The sizes of SegFormer (Xie et al., arXiv:2105.15203), as options of SegformerConfig."""


def build_segmenter(
    model: SegmenterConfig, data: DataConfig, classes: Sequence[str], seed: int
) -> nn.Module:
    """Return a model with a channel for each class.

    Its inputs are normalised images. The weights are random, by ``seed``, unless ``model.weights``
    is ``DEFAULT``: see :func:`load_segmenter_weights`.

    Raises:
        UsageError: for an unknown architecture, encoder or option, crops that it cannot take, or
            where transformers is needed and missing.
    """
    torch.manual_seed(seed)
    if model.mode == "binary" and len(classes) != 2:
        raise UsageError(
            f"model.mode binary needs a background and one class, the data has {len(classes)}: "
            f"{', '.join(classes[:10])}"
        )
    channels = 1 if model.mode == "binary" else len(classes)
    known = [*smp.MODEL_ARCHITECTURES_MAPPING, *list_models(module=segmentation), *SEGFORMERS]
    if model.name.lower() not in known:
        raise UsageError(f"there is no model {model.name}{nearest(model.name, known)}")
    name = f"model {model.name}"
    try:
        if model.name in SEGFORMERS:
            segmenter = _segformer(model, channels)
        elif model.name in list_models(module=segmentation):
            segmenter = _torchvision(model, channels)
        else:
            name += f" with encoder {model.encoder}"
            segmenter = _smp(model, channels)
        _freeze_unused(segmenter, height_width(data.size if data.crop is None else data.crop))
    except (KeyError, TypeError, ValueError, RuntimeError, OSError, NotImplementedError) as error:
        reason = error.args[0] if error.args else error
        raise UsageError(f"{name}: {reason}") from error
    except ModuleNotFoundError as error:
        raise UsageError(f"{name}: {error}") from error
    return segmenter


def _smp(model: SegmenterConfig, channels: int) -> nn.Module:
    options = model.options
    if options is None:
        light = {"encoder_depth": 3, "decoder_channels": (64, 32, 16)}
        options = light if model.name.lower() == "unet" else {}
    encoders = smp.encoders.get_encoder_names()
    if model.encoder not in encoders and not model.encoder.startswith("tu-"):
        raise ValueError(f"there is no such encoder{did_you_mean(model.encoder, encoders)}")
    weights = None
    if model.weights == "DEFAULT":
        weights = True if model.encoder.startswith("tu-") else "imagenet"
    return smp.create_model(
        model.name, model.encoder, encoder_weights=weights, classes=channels, **options
    )


def _torchvision(model: SegmenterConfig, channels: int) -> nn.Module:
    options = model.options or {}
    # torchvision takes no notice of an option that it does not know.
    _check_options(options, signature(get_model_builder(model.name)).parameters)
    return get_model(
        model.name,
        weights=None,
        weights_backbone="DEFAULT" if model.weights == "DEFAULT" else None,
        num_classes=channels,
        **options,
    )


def _segformer(model: SegmenterConfig, channels: int) -> nn.Module:
    with needs("transformers"):
        from transformers import SegformerConfig, SegformerForSemanticSegmentation

    options = SEGFORMERS[model.name] | (model.options or {})
    _check_options(options, SegformerConfig().to_dict())
    config = SegformerConfig(**options, num_labels=channels)
    if model.weights == "DEFAULT":
        encoder = model.name.replace("segformer_", "nvidia/mit-")
        return SegformerForSemanticSegmentation.from_pretrained(encoder, config=config)
    return SegformerForSemanticSegmentation(config)


def _check_options(options: dict[str, Any], known: Container[str]) -> None:
    for option in options:
        if option not in known:
            raise ValueError(f"there is no option {option!r}")


def _freeze_unused(segmenter: nn.Module, size: tuple[int, int]) -> None:
    """Freeze what has no part in the output, such as stages of an encoder below its depth.

    Processes that train together wait for every gradient, and would wait for these for ever.
    """
    segmenter.eval()
    output = segmenter(torch.zeros(1, 3, *size))
    tensors = output.values() if isinstance(output, dict) else [output]
    torch.stack([tensor.sum() for tensor in tensors]).sum().backward()
    for parameter in segmenter.parameters():
        parameter.requires_grad_(parameter.grad is not None)
        parameter.grad = None
    segmenter.train()


def load_segmenter_weights(segmenter: nn.Module, model: SegmenterConfig, classes: list[str]) -> str:
    """Load the file that ``model.weights`` names, and return a line that says what was loaded.

    Raises:
        UsageError: if the file cannot be read or does not fit.
    """
    if model.weights == "none":
        return "weights: random"
    if model.weights == "DEFAULT":
        return f"weights: encoder of {model.name}, pretrained"
    return load_file(segmenter, Path(model.weights), classes)
