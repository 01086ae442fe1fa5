"""Typed configuration of the tools: dataclasses, YAML files and dotted command-line overrides."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, NoReturn, TypeVar

import yaml
from jsonargparse import ArgumentParser, Namespace, set_loader
from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from common.checkpoint import load_checkpoint
from common.errors import UsageError, fail

Task = Literal["detection", "segmentation"]


@dataclass
class DataConfig:
    """Data.

    Args:
        format: shapes is made on first use; coco and voc are the usual folder layouts.
        root: Folder of the data set; shapes are made there, by default in ./data.
        train_split: Name of the training split.
        val_split: Name of the validation split; where the training split is the only one, a part
            of it is set aside by seed.
        train_list: File with the names of the training images to use, one a line.
        val_list: The same for the validation images.
        subset: Use only so many images of each split, chosen by seed.
        classes: Use only these classes, in this order.
        size: Height and width (or one number for both) into which every image is fitted, keeping
            its proportions.
        crop: Height and width of random crops for training; by default the same as size.
        augment: Random flips, scales, crops and colours in training.
        mean: Mean of the RGB channels, for images between 0 and 1.
        std: Standard deviation of the RGB channels, for images between 0 and 1.
        faults: Skip faulty annotations (they are listed at the start), or refuse to run.
        workers: Processes that load images, for each training process.
    """

    format: Literal["shapes", "coco", "voc"] = "shapes"
    root: str | None = None
    train_split: str = "train"
    val_split: str = "val"
    train_list: str | None = None
    val_list: str | None = None
    subset: PositiveInt | None = None
    classes: list[str] | None = None
    size: int | list[int] = 128
    crop: int | list[int] | None = None
    augment: bool = True
    mean: list[float] = field(default_factory=lambda: [0.485, 0.456, 0.406])
    std: list[float] = field(default_factory=lambda: [0.229, 0.224, 0.225])
    faults: Literal["skip", "refuse"] = "skip"
    workers: NonNegativeInt = 0


@dataclass
class TrainConfig:
    """Training.

    Args:
        epochs: Passes over the training images; 0 only evaluates.
        batch_size: Images per optimizer step, counted over all processes and accumulated parts.
        accumulate: Parts in which each process handles its share of a batch, to save memory.
        optimizer: AdamW, or SGD with momentum 0.9.
        lr: Highest learning rate.
        weight_decay: Weight decay of convolution and linear weights (never of norms and biases).
        schedule: Course of the learning rate; onecycle rises for a fifth, cosine only falls.
        clip: Largest gradient norm; 0 switches clipping off.
        precision: Numbers used in the forward pass.
        devices: Number of GPUs (or CPU processes); under torchrun its number of processes is used.
        eval_every: Epochs between evaluations; there is always one at the end.
        log_every: Steps between rows of metrics.csv.
        checkpoint_every: Steps between writes of last.ckpt within an epoch.
    """

    epochs: NonNegativeInt = 9
    batch_size: PositiveInt = 8
    accumulate: PositiveInt = 1
    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: PositiveFloat = 2e-3
    weight_decay: NonNegativeFloat = 0.01
    schedule: Literal["onecycle", "cosine", "constant"] = "onecycle"
    clip: NonNegativeFloat = 10.0
    precision: Literal["32-true", "16-mixed", "bf16-mixed"] = "32-true"
    devices: int | Literal["auto"] = "auto"
    eval_every: PositiveInt = 3
    log_every: PositiveInt = 10
    checkpoint_every: PositiveInt = 200


@dataclass
class DetectorConfig:
    """Model.

    Args:
        name: RetinaNet with a backbone of your choice, or torchvision's own complete models. SSD300
            sees every image at 300 x 300 pixels, so that data.size=300 suits it. Mask R-CNN learns
            masks and Keypoint R-CNN keypoints, too, from COCO's annotations; judged are the boxes.
        backbone: Backbone of retinanet; small is trained from scratch in a minute or two.
        weights: none, DEFAULT (the usual pretrained weights, downloaded), or a file with the state
            dict of a backbone or of a whole model, or a checkpoint of these tools. All layers are
            trained, batch norms too, of which torchvision freezes some beside such weights.
        anchors: Sides in pixels of the square anchors, one for each pyramid level (3 to 5 levels,
            the first at stride 8); each comes in 3 scales and 3 proportions. By default
            16, 32, ... for retinanet, and torchvision's own for its complete models.
        fpn_channels: Width of the feature pyramid and of the heads of retinanet.
        keypoints: How many keypoints an object has, for Keypoint R-CNN.
    """

    name: Literal[
        "retinanet",
        "retinanet_resnet50_fpn",
        "retinanet_resnet50_fpn_v2",
        "fcos_resnet50_fpn",
        "ssd300_vgg16",
        "ssdlite320_mobilenet_v3_large",
        "fasterrcnn_resnet50_fpn",
        "fasterrcnn_resnet50_fpn_v2",
        "fasterrcnn_mobilenet_v3_large_fpn",
        "fasterrcnn_mobilenet_v3_large_320_fpn",
        "maskrcnn_resnet50_fpn",
        "maskrcnn_resnet50_fpn_v2",
        "keypointrcnn_resnet50_fpn",
    ] = "retinanet"
    backbone: Literal[
        "small",
        "resnet18",
        "resnet34",
        "resnet50",
        "mobilenet_v3",
        "shufflenet_v2_x0_5",
        "shufflenet_v2_x1_0",
    ] = "small"
    weights: str = "none"
    anchors: list[int] | None = None
    fpn_channels: PositiveInt = 64
    keypoints: PositiveInt = 17


@dataclass
class SegmenterConfig:
    """Model.

    Args:
        name: Architecture of segmentation_models_pytorch: unet, fpn, deeplabv3plus, segformer, ...;
            or a complete model: fcn_resnet50, deeplabv3_resnet50, deeplabv3_mobilenet_v3_large,
            lraspp_mobilenet_v3_large, ... of torchvision, segformer_b0 to segformer_b5 of
            transformers.
        encoder: Encoder of an architecture: resnet18, mobilenet_v2, efficientnet-b0, mit_b0, ...;
            a complete model has its own.
        weights: none, DEFAULT (the encoder's ImageNet weights, downloaded), or a file with the
            state dict of an encoder or of a whole model, or a checkpoint of these tools.
        mode: multiclass has a channel for each class; binary has a single channel, for data with a
            background and one class.
        options: More arguments of the architecture, such as {encoder_depth: 4}; {aux_loss: true}
            gives fcn and deeplabv3 of torchvision their auxiliary classifier; segformer_b0 to
            segformer_b5 take those of SegformerConfig. By default a light three-level decoder for
            unet, and the libraries' own defaults for the others.
    """

    name: str = "unet"
    encoder: str = "resnet18"
    weights: str = "none"
    mode: Literal["multiclass", "binary"] = "multiclass"
    options: dict[str, Any] | None = None


@dataclass
class DetectionConfig:
    """Detector.

    Args:
        loss: Sum of losses, such as "giou+focal" or "2*ciou + focal(gamma=1.5)"; weights can be
            learned, "learned*giou + learned*focal", or change over the steps, as in
            "l1 + ramp(0, 1, steps=1000)*giou + focal". The stages of an R-CNN can have their own,
            "rpn: giou+bce; roi: giou+ce".
        seed: Seed of the weights, the shuffling, the augmentation and the splits.
        output: Folder of the results, which must not hold an earlier run; by default the first free
            one of runs/det-1, runs/det-2, ...
    """

    task: ClassVar[Task] = "detection"
    loss: str = "giou+focal"
    data: DataConfig = field(default_factory=DataConfig)
    model: DetectorConfig = field(default_factory=DetectorConfig)
    train: TrainConfig = field(default_factory=lambda: TrainConfig(epochs=13))
    seed: NonNegativeInt = 0
    output: str | None = None
    resume: bool = False


@dataclass
class SegmentationConfig:
    """Segmenter.

    Args:
        loss: Sum of losses, such as "ce+dice" or "0.5*focal + tversky(alpha=0.3, beta=0.7)";
            weights can be learned, "learned*ce + learned*dice", or change over the steps, as in
            "ce + ramp(0, 1, steps=1000)*dice".
        seed: Seed of the weights, the shuffling, the augmentation and the splits.
        output: Folder of the results, which must not hold an earlier run; by default the first free
            one of runs/seg-1, runs/seg-2, ...
    """

    task: ClassVar[Task] = "segmentation"
    loss: str = "ce+dice"
    data: DataConfig = field(default_factory=lambda: DataConfig(size=96))
    model: SegmenterConfig = field(default_factory=SegmenterConfig)
    train: TrainConfig = field(default_factory=lambda: TrainConfig(epochs=7, batch_size=4, lr=3e-3))
    seed: NonNegativeInt = 0
    output: str | None = None
    resume: bool = False


@dataclass
class EvalDetectionConfig:
    """Evaluation.

    Args:
        checkpoint: last.ckpt or best.ckpt of a training run.
        predictions: COCO results file, to be evaluated without a model.
        annotations: COCO annotation file that belongs to predictions.
        voc: Compute VOC's AP as well: 2007 has 11 points, 2010 the whole area.
        max_dets: How many detections of one class in one image count, at least 10.
        batch_size: Images in one forward pass.
        output: Folder for metrics.json and, with a checkpoint, results.json and predictions.png.
    """

    task: ClassVar[Task] = "detection"
    checkpoint: str | None = None
    predictions: str | None = None
    annotations: str | None = None
    voc: Literal[2007, 2010] | None = None
    max_dets: PositiveInt = 100
    data: DataConfig = field(default_factory=DataConfig)
    batch_size: PositiveInt = 8
    output: str | None = None


@dataclass
class EvalSegmentationConfig:
    """Evaluation.

    Args:
        checkpoint: last.ckpt or best.ckpt of a training run.
        save_masks: Folder for the predicted masks: PNG files of class indices in the images' sizes.
        batch_size: Images in one forward pass.
        output: Folder for metrics.json and predictions.png.
    """

    task: ClassVar[Task] = "segmentation"
    checkpoint: str
    save_masks: str | None = None
    data: DataConfig = field(default_factory=DataConfig)
    batch_size: PositiveInt = 8
    output: str | None = None


TrainingConfig = DetectionConfig | SegmentationConfig
T = TypeVar("T")
TrainingT = TypeVar("TrainingT", DetectionConfig, SegmentationConfig)
EvaluationT = TypeVar("EvaluationT", EvalDetectionConfig, EvalSegmentationConfig)


def height_width(size: int | Sequence[int]) -> tuple[int, int]:
    """Return ``size`` as ``(height, width)`` in pixels.

    Raises:
        UsageError: if it is neither one positive number nor two.
    """
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or min(pair) < 1:
        raise UsageError(f"data.size and data.crop take one or two positive numbers, got {size}")
    return pair[0], pair[1]


class _Loader(yaml.SafeLoader):
    """YAML whose only truth values are true and false, so that [no, yes] stays a list of names."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in pairs if not tag.endswith((":bool", ":timestamp"))]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|false|False)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    # PyYAML alone reads 1e-3 as a string.
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9]+(?:\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)
set_loader("yaml", lambda text: yaml.load(text, Loader=_Loader), (yaml.YAMLError,))


class _Parser(ArgumentParser):
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """End with exit code 2 and the whole message in one line."""
        fail(message)


def parse(config_class: type[T], description: str | None) -> T:
    """Return the configuration of a tool that has no checkpoint."""
    parser = _parser(config_class, description)
    return _instantiate(parser, parser.parse_args(), config_class)


def parse_training(config_class: type[TrainingT], description: str | None) -> TrainingT:
    """Return the configuration of a training run; with ``--resume`` it starts from the stored one.

    Raises:
        UsageError: if there is nothing to resume.
    """
    parser = _parser(config_class, description, skip={"resume"})
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on from last.ckpt in output, with the options of that run unless given anew",
    )
    arguments = parser.parse_args()
    if arguments.resume:
        if arguments.output is None:
            raise UsageError("--resume needs --output, the folder of the run")
        checkpoint = load_checkpoint(Path(arguments.output) / "last.ckpt", config_class.task)
        parser.set_defaults(checkpoint["config"])
        arguments = parser.parse_args()
    return _instantiate(parser, arguments, config_class)


def parse_evaluation(
    config_class: type[EvaluationT], description: str | None
) -> tuple[EvaluationT, dict[str, Any]]:
    """Return the configuration of an evaluation, and the checkpoint (empty where none is named).

    The data is that of the checkpoint's run, as far as the options do not say otherwise.
    """
    parser = _parser(config_class, description)
    arguments = parser.parse_args()
    checkpoint: dict[str, Any] = {}
    if arguments.checkpoint is not None:
        checkpoint = load_checkpoint(Path(arguments.checkpoint), config_class.task)
        parser.set_defaults({"data": checkpoint["config"]["data"]})
        arguments = parser.parse_args()
    return _instantiate(parser, arguments, config_class), checkpoint


def _parser(
    config_class: type, description: str | None, skip: set[str | int] | None = None
) -> ArgumentParser:
    parser = _Parser(description=description)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(config_class, skip=skip)
    return parser


def _instantiate(parser: ArgumentParser, arguments: Namespace, config_class: type[T]) -> T:
    values = vars(parser.instantiate(arguments))
    del values["config"]
    return _plain(config_class(**values))


def _plain(value: Any) -> Any:
    """Numbers without the type that checked them, which neither YAML nor a checkpoint can hold."""
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: _plain(getattr(value, f.name)) for f in fields(value)})
    for kind in (int, float):
        if isinstance(value, kind) and not isinstance(value, bool):
            return kind(value)
    return value


def from_dict(config_class: type[T], values: dict[str, Any]) -> T:
    """Return the configuration that :func:`to_dict` made ``values`` of."""
    parser = _parser(config_class, None, skip={"resume"})
    return _instantiate(parser, parser.parse_object(values), config_class)


def to_dict(config: TrainingConfig) -> dict[str, Any]:
    """Return plain values that say how to do the run again, wherever its results go."""
    values = asdict(config)
    del values["output"], values["resume"]
    return values
