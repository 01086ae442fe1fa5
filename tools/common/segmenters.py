"""Building the models of segmentation_models_pytorch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import segmentation_models_pytorch as smp
import torch
from torch import nn

from common.config import DataConfig, SegmenterConfig, height_width
from common.errors import UsageError
from common.weights import load_file


def build_segmenter(
    model: SegmenterConfig, data: DataConfig, classes: Sequence[str], seed: int
) -> nn.Module:
    """Return a model of segmentation_models_pytorch with a channel for each class.

    Its inputs are normalised images. The weights are random, by ``seed``, unless ``model.weights``
    is ``DEFAULT``: see :func:`load_segmenter_weights`.

    Raises:
        UsageError: for an unknown architecture, encoder or option, or crops that it cannot take.
    """
    torch.manual_seed(seed)
    if model.mode == "binary" and len(classes) != 2:
        raise UsageError(
            f"model.mode binary needs a background and one class, the data has {len(classes)}: "
            f"{', '.join(classes[:10])}"
        )
    options = model.options
    if options is None:
        light = {"encoder_depth": 3, "decoder_channels": (64, 32, 16)}
        options = light if model.name.lower() == "unet" else {}
    weights = None
    if model.weights == "DEFAULT":
        weights = True if model.encoder.startswith("tu-") else "imagenet"
    try:
        segmenter = smp.create_model(
            model.name,
            model.encoder,
            encoder_weights=weights,
            classes=1 if model.mode == "binary" else len(classes),
            **options,
        )
        _freeze_unused(segmenter, height_width(data.size if data.crop is None else data.crop))
    except (KeyError, TypeError, ValueError, RuntimeError, OSError) as error:
        reason = error.args[0] if error.args else error
        raise UsageError(f"model {model.name} with encoder {model.encoder}: {reason}") from error
    return segmenter


def _freeze_unused(segmenter: nn.Module, size: tuple[int, int]) -> None:
    """Freeze what has no part in the output, such as stages of an encoder below its depth.

    Processes that train together wait for every gradient, and would wait for these for ever.
    """
    segmenter.eval()
    segmenter(torch.zeros(1, 3, *size)).sum().backward()
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
        return f"weights: encoder {model.encoder}, pretrained"
    return load_file(segmenter, Path(model.weights), classes)
