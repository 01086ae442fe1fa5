"""Building detectors."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from http.client import HTTPException
from pathlib import Path
from pickle import UnpicklingError

from common.config import DataConfig, DetectionConfig, DetectorConfig
from common.errors import UsageError
from common.weights import load_file, load_matching

import torch
from torch import Tensor, nn
from torch.nn.functional import max_pool2d
from torchvision import models as tv
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.models.resnet import BasicBlock, conv1x1
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock

from detseg_losses import build_loss
from detseg_losses.integrations import use_losses
from detseg_losses.integrations.samples import DetectionData, Extra

_BACKBONES = {
    "resnet18": (tv.resnet18, tv.ResNet18_Weights.DEFAULT, ("layer2", "layer3", "layer4")),
    "resnet34": (tv.resnet34, tv.ResNet34_Weights.DEFAULT, ("layer2", "layer3", "layer4")),
    "resnet50": (tv.resnet50, tv.ResNet50_Weights.DEFAULT, ("layer2", "layer3", "layer4")),
    "mobilenet_v3": (
        tv.mobilenet_v3_large,
        tv.MobileNet_V3_Large_Weights.DEFAULT,
        ("6", "12", "16"),  # the last layers at strides 8, 16 and 32
    ),
    "shufflenet_v2_x0_5": (
        tv.shufflenet_v2_x0_5,
        tv.ShuffleNet_V2_X0_5_Weights.DEFAULT,
        ("stage2", "stage3", "stage4"),
    ),
    "shufflenet_v2_x1_0": (
        tv.shufflenet_v2_x1_0,
        tv.ShuffleNet_V2_X1_0_Weights.DEFAULT,
        ("stage2", "stage3", "stage4"),
    ),
}
_group_norm = partial(nn.GroupNorm, 8)


class NormalizeOnly(GeneralizedRCNNTransform):
    """torchvision's transform without its resizing: the data pipeline has chosen the size."""

    def resize(
        self, image: Tensor, target: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        """Return both as they are."""
        return image, target


class MaxPoolLevels(ExtraFPNBlock):
    """Adds coarser levels to a feature pyramid by subsampling its last one.

    Args:
        levels: how many to add.
    """

    def __init__(self, levels: int) -> None:
        super().__init__()
        self.levels = levels

    def forward(
        self, results: list[Tensor], x: list[Tensor], names: list[str]
    ) -> tuple[list[Tensor], list[str]]:
        """Return the pyramid and its names with the added levels."""
        for level in range(self.levels):
            results.append(max_pool2d(results[-1], kernel_size=1, stride=2))
            names.append(f"pool{level}")
        return results, names


def extra_of(model: DetectorConfig) -> Extra | None:
    """What a detector learns beside boxes and labels."""
    extras: dict[str, Extra] = {"maskrcnn": "masks", "keypointrcnn": "keypoints"}
    return extras.get(model.name.partition("_")[0])


def check_keypoints(model: DetectorConfig, data: DetectionData) -> None:
    """Refuse training data whose objects have another number of keypoints than the detector.

    Raises:
        UsageError: naming both.
    """
    if extra_of(model) == "keypoints" and model.keypoints != len(data.mirrored):
        raise UsageError(
            f"model.keypoints is {model.keypoints}, and the objects have {len(data.mirrored)}"
        )


def check_losses(config: DetectionConfig) -> None:
    """Refuse losses that the detector has no use for, before the data is read.

    A string with lists, such as class weights, is only parsed: the data tells how many classes
    there are.

    Raises:
        UsageError, ValueError: as :func:`build_detector` and ``use_losses`` do.
    """
    with torch.device("meta"):  # which spares the time to draw random weights
        detector = build_detector(config.model, config.data, ["any"], config.seed)
    detector.to_empty(device="cpu")
    if "[" in config.loss:
        for part in filter(str.strip, config.loss.split(";")):
            build_loss(part.rpartition(":")[2])
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they come again with the data
            use_losses(detector, config.loss)


def build_detector(
    model: DetectorConfig, data: DataConfig, classes: Sequence[str], seed: int
) -> nn.Module:
    """Return a detector for ``len(classes)`` classes, with labels from 1 as torchvision counts.

    Its inputs are images between 0 and 1 of any size, which it normalises but does not resize,
    except for SSD300, whose layers fit one size only. The weights are random, by ``seed``: see
    :func:`load_detector_weights`.

    Raises:
        UsageError: if options of ``model`` do not fit together.
    """
    torch.manual_seed(seed)
    num_classes = len(classes) + 1  # torchvision leaves label 0 to the background
    if model.name != "retinanet":
        if model.anchors is not None:
            raise UsageError(f"model.anchors does not apply to {model.name}, which has its own")
        options = {"num_keypoints": model.keypoints} if extra_of(model) == "keypoints" else {}
        detector = tv.get_model(
            model.name, weights=None, weights_backbone=None, num_classes=num_classes, **options
        )
    else:
        anchors = model.anchors or [16, 32, 64, 128]
        if model.fpn_channels % 8 or model.fpn_channels < 16:  # a group of one pixel has no norm
            raise UsageError(
                f"model.fpn_channels {model.fpn_channels} is not a multiple of 8, at least 16"
            )
        if len(anchors) < 3:
            raise UsageError(f"model.anchors needs at least 3 sizes, got {anchors}")
        sizes = tuple((a, int(a * 2 ** (1 / 3)), int(a * 2 ** (2 / 3))) for a in anchors)
        generator = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes))
        detector = RetinaNet(
            _pyramid(model, len(anchors)),
            num_classes,
            anchor_generator=generator,
            head=RetinaNetHead(
                model.fpn_channels,
                generator.num_anchors_per_location()[0],
                num_classes,
                norm_layer=_group_norm,
            ),
            detections_per_img=100,  # as many as COCO's AP looks at
        )
    if model.name == "ssd300_vgg16":
        detector.transform.image_mean, detector.transform.image_std = data.mean, data.std
    else:
        detector.transform = NormalizeOnly(0, 0, data.mean, data.std)
    return detector


def _pyramid(model: DetectorConfig, levels: int) -> BackboneWithFPN:
    if model.backbone == "small":
        body, stages = _small_backbone(), ("layer2", "layer3", "layer4")
    else:
        build, _, stages = _BACKBONES[model.backbone]
        body = build(weights=None)
        body = getattr(body, "features", body)
    return BackboneWithFPN(
        body,
        {stage: str(level) for level, stage in enumerate(stages)},
        _stage_channels(body, stages),
        model.fpn_channels,
        extra_blocks=MaxPoolLevels(levels - len(stages)),
    )


def _small_backbone() -> nn.Sequential:
    """A ResNet of one block a stage and half the usual width.

    Group norm, for it is trained from scratch in small batches, and so that a batch spread over
    several processes gives the same gradient as on one.
    """
    widths = (32, 32, 64, 128, 256)
    stem = nn.Sequential(
        nn.Conv2d(3, widths[0], 7, stride=2, padding=3, bias=False),
        _group_norm(widths[0]),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, stride=2, padding=1),
    )
    layers: OrderedDict[str, nn.Module] = OrderedDict(stem=stem)
    for number in range(1, 5):
        inputs, outputs, stride = widths[number - 1], widths[number], 1 if number == 1 else 2
        shortcut = None
        if stride > 1:
            shortcut = nn.Sequential(conv1x1(inputs, outputs, stride), _group_norm(outputs))
        layers[f"layer{number}"] = BasicBlock(
            inputs, outputs, stride, shortcut, norm_layer=_group_norm
        )
    backbone = nn.Sequential(layers)
    for module in backbone.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return backbone


@torch.no_grad()
def _stage_channels(body: nn.Module, stages: Sequence[str]) -> list[int]:
    body.eval()  # batch norm must not learn from this image
    channels, x = [], torch.zeros(1, 3, 64, 64)
    for name, layer in body.named_children():
        x = layer(x)
        if name in stages:
            channels.append(x.shape[1])
        if name == stages[-1]:
            break
    body.train()
    return channels


def load_detector_weights(detector: nn.Module, model: DetectorConfig, classes: list[str]) -> str:
    """Load what ``model.weights`` names, and return a line that says what was loaded.

    Raises:
        UsageError: if there is nothing to load or it does not fit.
    """
    if model.weights == "none":
        return "weights: random"
    if model.weights != "DEFAULT":
        return load_file(detector, Path(model.weights), classes)
    if model.name != "retinanet":
        weights = tv.get_model_weights(model.name).DEFAULT
    elif model.backbone in _BACKBONES:
        weights = _BACKBONES[model.backbone][1]
    else:
        raise UsageError(f"there are no pretrained weights for the backbone {model.backbone}")
    try:
        state = weights.get_state_dict(check_hash=True)
    except (OSError, HTTPException, RuntimeError, EOFError, UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(
            f"{weights} cannot be downloaded ({reason}); name a file, or remove what is damaged in "
            f"{torch.hub.get_dir()}"
        ) from error
    return load_matching(detector, state, str(weights), classes)
