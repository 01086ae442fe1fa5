"""Typed configuration of the tools: dataclasses, YAML files and dotted command-line overrides."""

from __future__ import annotations

import argparse
import difflib
import math
import os
import re
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NoReturn, TypeVar

from common.checkpoint import load_checkpoint
from common.errors import UsageError, fail

import torch
import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, Namespace, set_loader
from jsonargparse.typing import restricted_number_type

from detseg_losses import build_loss
from detseg_losses.integrations.samples import VOID, check_regular
from detseg_losses.spec import SpecError, nearest

Task = Literal["detection", "segmentation"]

if not TYPE_CHECKING:  # what the parser sees; to a type checker they are numbers like any other
    PositiveFloat = restricted_number_type("FinitePositive", float, [(">", 0), ("<", math.inf)])
    NonNegativeFloat = restricted_number_type("FiniteFromZero", float, [(">=", 0), ("<", math.inf)])
    PositiveInt = restricted_number_type("Count", int, [(">", 0), ("<", 2**31)])
    NonNegativeInt = restricted_number_type("CountFromZero", int, [(">=", 0), ("<", 2**31)])
    Channels = restricted_number_type("Channels", int, [(">", 0), ("<=", 4096)])
    Workers = restricted_number_type("Workers", int, [(">=", 0), ("<=", 256)])
    Seed = restricted_number_type("Seed", int, [(">=", 0), ("<", 2**63)])
else:
    from builtins import float as NonNegativeFloat
    from builtins import float as PositiveFloat
    from builtins import int as Channels
    from builtins import int as NonNegativeInt
    from builtins import int as PositiveInt
    from builtins import int as Seed
    from builtins import int as Workers

ROOT = Path(__file__).resolve().parents[2]
"""The folder that holds ``tools`` and ``configs``: a checkout, or the installed package."""

SMALLEST = 8
"""The smallest side of an image in pixels: less is a mistake, and has no pixel left when scaled."""


@dataclass
class DataConfig:
    """Data.

    Args:
        format: coco and voc are the usual folder layouts; shapes are synthetic, and drawn on first
            use. By default the layout is recognised in root, and shapes stand in where no root is
            given.
        root: Folder of the data set; for shapes a folder for them alone, by default ./data.
        train_split: Name of the training split.
        val_split: Name of the validation split; where the training split is the only one, a part
            of it is set aside by seed.
        train_list: File with the names of the training images to use, one a line.
        val_list: The same for the validation images.
        subset: Use only so many images of each split, chosen by seed.
        classes: Use only these classes, in this order; cat, or cat,dog, or [cat, dog].
        size: Height and width (or one number for both) into which every image is fitted, keeping
            its proportions.
        crop: Height and width of random crops for training; by default the same as size.
        augment: Random flips, scales, crops and colours in training.
        mean: Mean of the RGB channels, for images between 0 and 1.
        std: Standard deviation of the RGB channels, for images between 0 and 1.
        faults: Skip faulty annotations (they are listed at the start), or refuse to run.
        workers: Processes that load images, for each training process.
    """

    format: Literal["auto", "shapes", "coco", "voc"] = "auto"
    root: str | None = None
    train_split: str = "train"
    val_split: str = "val"
    train_list: str | None = None
    val_list: str | None = None
    subset: PositiveInt | None = None
    classes: list[str] | str | None = None
    size: int | list[int] = 128
    crop: int | list[int] | None = None
    augment: bool = True
    mean: list[float] = field(default_factory=lambda: [0.485, 0.456, 0.406])
    std: list[float] = field(default_factory=lambda: [0.229, 0.224, 0.225])
    faults: Literal["skip", "refuse"] = "skip"
    workers: Workers = 0

    def __post_init__(self) -> None:
        if isinstance(self.classes, str):
            self.classes = [name.strip() for name in self.classes.split(",")]


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
    devices: PositiveInt | Literal["auto"] = "auto"
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
    fpn_channels: Channels = 64
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
    seed: Seed = 0
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
    seed: Seed = 0
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


@dataclass
class CompareConfig:
    """Comparison.

    Args:
        task: det for detectors, seg for segmentation.
        output: Folder of the comparison; the runs are in its folder cells.
        losses: The candidates, two loss strings or more. The first is the one that the others are
            compared with.
        seeds: With how many seeds, from 0, each candidate is trained.
        lrs: Learning rates of which each candidate takes the one that serves it best on the
            validation split; by default train.lr for all.
        scales: The same for factors of the first weight in each loss string.
        threshold: The smallest difference that would matter to you, in points (hundredths).
        test_split: The split for the final numbers; by default test, where the data has such a
            split and it is not the validation split.
        cell: Train this one run alone, counted from 0, and print no result: for job arrays.
        report_only: Train nothing; make the result of the runs that there are.
    """

    task: Literal["det", "seg"] = "det"
    output: str = ""
    losses: list[str] = field(default_factory=list)
    seeds: PositiveInt = 3
    lrs: list[PositiveFloat] | None = None
    scales: list[PositiveFloat] | None = None
    threshold: NonNegativeFloat = 0.5
    test_split: str | None = None
    cell: NonNegativeInt | None = None
    report_only: bool = False


TrainingConfig = DetectionConfig | SegmentationConfig
T = TypeVar("T")
TrainingT = TypeVar("TrainingT", DetectionConfig, SegmentationConfig)
EvaluationT = TypeVar("EvaluationT", EvalDetectionConfig, EvalSegmentationConfig)


def height_width(size: int | Sequence[int]) -> tuple[int, int]:
    """Return ``size`` as ``(height, width)`` in pixels.

    Raises:
        UsageError: if it is neither one number nor two, or too small for an image.
    """
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or min(pair) < SMALLEST:
        raise UsageError(
            f"data.size and data.crop take one or two numbers of at least {SMALLEST}, got {size}"
        )
    return pair[0], pair[1]


class _Loader(yaml.SafeLoader):
    """YAML whose only truth values are true and false, so that [no, yes] stays a list of names.

    A key that a mapping has twice is an error, and not the last one of them.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Return the mapping of a node."""
        keys = [key.value for key, _ in node.value if key.value != "<<"]
        for key, _ in node.value:
            if keys.count(key.value) > 1:
                message = f"{key.value} is given twice"
                raise yaml.constructor.ConstructorError(None, None, message, key.start_mark)
        return super().construct_mapping(node, deep)


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
set_loader(
    "yaml",
    lambda text: yaml.load(text, Loader=_Loader),
    (yaml.YAMLError, ValueError, RecursionError),
)


class _ConfigFile(ActionConfigFile):
    """Reads ``--config``; says which file is at fault, and what is wrong with it.

    The files in ``configs`` are found from every folder.
    """

    def __call__(self, parser: Any, namespace: Any, values: Any, option: str | None = None) -> None:
        """Take over the options of the file named ``values``."""
        shipped = ROOT / values
        if (
            Path(values).parts[:1] == ("configs",)
            and not Path(values).exists()
            and shipped.exists()
        ):
            values = str(shipped)
        try:
            check_regular(Path(values))
            content = yaml.load(Path(values).read_text(encoding="utf-8"), Loader=_Loader)
        except OSError as error:
            fail(f"--config {values}: cannot be read ({error.strerror or error})")
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            fail(f"--config {values}: is not valid YAML ({error})")
        if not isinstance(content, dict):
            fail(f"--config {values}: holds no options 'name: value'; see the files in configs")
        for name, value in content.items():
            if name in ("data", "model", "train") and not isinstance(value, dict):
                fail(f"--config {values}: {name} is {value}; it takes options 'name: value'")
        super().__call__(parser, namespace, values, option)


class _Parser(ArgumentParser):
    def __init__(
        self, config_class: type, description: str | None, check: Callable[[Any], None] | None
    ) -> None:
        super().__init__(description=description, allow_abbrev=False)
        self.config_class, self.check = config_class, check

    def checked(self, arguments: Namespace) -> Any:
        """The configuration that was given, if a run would accept it."""
        config: Any = _instantiate(self, arguments, self.config_class)
        if self.check is not None:
            try:
                self.check(config)
            except ValueError as error:
                raise UsageError(error) from error
        return config

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """End with exit code 2 and the whole message in one line, with the nearest known name."""
        message = " ".join(message.split())
        if match := re.search(r"Expected a typing\.Literal\[([^]]*)]\. Got value: (.*)", message):
            known, value = re.findall(r"'([^']*)'", match[1]), match[2]
            message = f"{message[: match.start()]}there is no {value!r}{nearest(value, known)}"
        elif match := re.search(r'Parser key "([^"]+)": (.*)', message):
            message = f"{message[: match.start()]}{match[1]} {_wanted(match[2])}"
        elif match := re.match(r"unrecognized arguments: (--[^= ]*)", message):
            known = [option for action in self._actions for option in action.option_strings]
            if near := difflib.get_close_matches(match[1], known, n=1):
                message += f"; did you mean {near[0]}?"
        fail(message)

    def dump(self, cfg: Namespace, **options: Any) -> str:
        """The text of a configuration for ``--print_config``, of one that a run would accept."""
        self.checked(cfg.clone())
        return super().dump(cfg, **options)


_WORDS = {
    "FinitePositive": "a finite number above 0",
    "FiniteFromZero": "a finite number from 0",
    "Count": "a whole number from 1",
    "CountFromZero": "a whole number from 0",
    "Channels": "a whole number from 1 to 4096",
    "Workers": "a whole number from 0 to 256",
    "Seed": "a whole number from 0 to 2^63 - 1",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "list": "a list",
    "dict": "options 'name: value'",
    "NoneType": "null",
}


def _wanted(message: str) -> str:
    """What the option parser says of a value, in our words; as it is where we have none."""
    stated = message.partition("Subtypes: ")[2].partition(" Errors:")[0] or message
    names = re.findall(
        r"typing\.Literal\[[^]]*]|list(?=\[)|(?<=[.'])\w+(?='>)|(?<=Not of type )\w+", stated
    )
    kinds = [name.partition("[")[2].strip("]'") or _WORDS.get(name, "") for name in names]
    if not kinds or not all(kinds):
        return message
    found = re.search(
        r".*(?:Given|Got) value: (.*)|type \w+: (.*) does not conform|: '(.*)'$", message
    )
    got = f"; got {next(filter(None, found.groups()), '')}" if found else ""
    return f"takes {' or '.join(dict.fromkeys(reversed(kinds)))}{got}"


def parse(config_class: type[T], description: str | None) -> T:
    """Return the configuration of a tool that has no checkpoint."""
    parser = _parser(config_class, description)
    return _instantiate(parser, parser.parse_args(), config_class)


def parse_training(
    config_class: type[TrainingT],
    description: str | None,
    check: Callable[[TrainingT], None] | None = None,
) -> TrainingT:
    """Return the configuration of a training run; with ``--resume`` it starts from the stored one.

    ``check`` raises a ValueError where the model cannot be trained so; it judges what
    ``--print_config`` prints, too.

    Raises:
        UsageError: if there is nothing to resume, or options make no sense together.
    """
    parser = _parser(config_class, description, skip={"resume"}, check=check)
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on from last.ckpt in output, with the options of that run unless given anew",
    )
    arguments = parser.parse_args()
    if arguments.resume:
        if arguments.output is None:
            raise UsageError("--resume needs --output, the folder of the run")
        file = Path(arguments.output) / "last.ckpt"
        checkpoint = load_checkpoint(file, config_class.task)
        _take_over(parser, checkpoint, file)
        arguments = parser.parse_args()
    config = parser.checked(arguments)
    _check_devices(config.train.devices)
    return config


_EACH = {"loss", "seed", "output", "resume"}
"""Options of a training run that a comparison sets for each of its runs."""


def parse_comparison(
    description: str | None, check_detection: Callable[[DetectionConfig], None]
) -> tuple[CompareConfig, TrainingConfig]:
    """Return what is compared, and the options that all runs share.

    With ``--report-only`` they are those of the comparison in the output folder, unless given anew.

    Raises:
        UsageError: if options make no sense together, or a run would not accept a candidate.
    """
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--task", default="det")
    early.add_argument("--output", default="")
    early.add_argument("--report-only", action="store_true")
    known = early.parse_known_args()[0]
    stored: dict[str, Any] = {}
    if known.report_only and known.output:
        stored = read_comparison(Path(known.output))
        if not stored:
            raise UsageError(f"--report-only: {known.output} holds no comparison")
        known.task = stored["task"]
    config_class = SegmentationConfig if known.task == "seg" else DetectionConfig
    parser = _ComparisonParser(config_class, description, check_detection)
    parser.add_argument("--config", action=_ConfigFile)
    lists: dict[str, type] = {"losses": str, "lrs": PositiveFloat, "scales": PositiveFloat}
    parser.add_class_arguments(CompareConfig, skip={*lists, "report_only"})
    for name, kind in lists.items():
        parser.add_argument(f"--{name}", type=kind, nargs="+", help=_help(CompareConfig, name))
    told = _help(CompareConfig, "report_only")
    parser.add_argument("--report-only", action="store_true", help=told)
    parser.add_class_arguments(config_class, skip={*_EACH})
    if stored:
        parser.set_defaults(stored)
    return parser.checked(parser.parse_args())


class _ComparisonParser(_Parser):
    def checked(self, arguments: Namespace) -> tuple[CompareConfig, TrainingConfig]:
        """The comparison that was given, if a run would accept each candidate."""
        values = vars(self.instantiate(arguments))
        del values["config"]
        shared = {name: values.pop(name) for name in ("data", "model", "train")}
        compared = _plain(CompareConfig(**values))
        compared.losses = ["".join(loss.split()) for loss in compared.losses or []]
        for name in ("lrs", "scales"):
            numbers = getattr(compared, name)
            setattr(compared, name, numbers and [float(number) for number in numbers])
        _check_comparison(compared)
        for loss in compared.losses:
            config = _plain(self.config_class(loss=loss, **shared))
            _check_training(config)
            if isinstance(config, DetectionConfig) and self.check is not None:
                try:
                    self.check(config)
                except ValueError as error:
                    raise UsageError(error) from error
        _check_devices(config.train.devices)
        return compared, config


def _help(config_class: type, option: str) -> str:
    """What the docstring of a configuration says of an option."""
    text = (config_class.__doc__ or "").partition(f" {option}: ")[2]
    return " ".join(re.split(r"\n {8}\w+: |\n\n|\n {4}$", text)[0].split())


def _check_comparison(compared: CompareConfig) -> None:
    if not compared.output:
        raise UsageError("--output is missing, the folder of the comparison")
    if len(compared.losses) < 2:
        raise UsageError("--losses takes two loss strings or more: --losses l1+focal giou+focal")
    for name in ("losses", "lrs", "scales"):
        values = getattr(compared, name) or []
        if twice := [value for number, value in enumerate(values) if value in values[:number]]:
            raise UsageError(f"--{name}: {twice[0]} is given twice")
    if compared.cell is not None and compared.report_only:
        raise UsageError("--cell trains and --report-only does not: give one of them")


def write_comparison(folder: Path, compared: CompareConfig, training: TrainingConfig) -> None:
    """Write what is compared into its folder: comparison.yaml, and training.yaml for the runs.

    Raises:
        UsageError: if the folder holds the runs of other options.
    """
    shared = {name: value for name, value in to_dict(training).items() if name not in _EACH}
    lasting = {"task": compared.task, "test_split": compared.test_split, **shared}
    if stored := read_comparison(folder):
        there, now = _flat(stored), _flat(lasting)
        for name, value in now.items():
            if name != "data.workers" and there.get(name) != value:
                raise UsageError(
                    f"{folder} holds a comparison with {name}={there.get(name)}, not {value}; "
                    "name another folder"
                )
    keep = {name: v for name, v in asdict(compared).items() if name not in ("cell", "report_only")}
    for name, content in (("comparison.yaml", {**keep, **shared}), ("training.yaml", shared)):
        unfinished = folder / f"{name}.{os.getpid()}"  # other jobs of an array read and write it
        unfinished.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
        os.replace(unfinished, folder / name)


def read_comparison(folder: Path) -> dict[str, Any]:
    """The options of the comparison in a folder; empty if there is none."""
    file = folder / "comparison.yaml"
    if not file.is_file():
        return {}
    try:
        return dict(yaml.load(file.read_text(encoding="utf-8"), Loader=_Loader))
    except (OSError, yaml.YAMLError, TypeError, ValueError) as error:
        raise UsageError(f"{file} cannot be read: {error}") from error


def _flat(options: dict[str, Any], above: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in options.items():
        place = f"{above}{name}"
        flat |= _flat(value, f"{place}.") if isinstance(value, dict) else {place: value}
    return flat


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
        file = Path(arguments.checkpoint)
        checkpoint = load_checkpoint(file, config_class.task, "name best.ckpt instead")
        _take_over(parser, checkpoint, file, "data")
        arguments = parser.parse_args()
    return _instantiate(parser, arguments, config_class), checkpoint


def _take_over(
    parser: ArgumentParser, checkpoint: dict[str, Any], file: Path, *sections: str
) -> None:
    """Make the options of a checkpoint, or these sections of them, the defaults."""
    try:
        stored = checkpoint["config"]
        parser.set_defaults({name: dict(stored[name]) for name in sections} or dict(stored))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UsageError(
            f"{file}: the options in it are not those of this tool: {error}"
        ) from error


def _parser(
    config_class: type,
    description: str | None,
    skip: set[str | int] | None = None,
    check: Callable[[Any], None] | None = None,
) -> _Parser:
    parser = _Parser(config_class, description, check)
    parser.add_argument("--config", action=_ConfigFile)
    parser.add_class_arguments(config_class, skip=skip)
    return parser


def _instantiate(parser: ArgumentParser, arguments: Namespace, config_class: type[T]) -> T:
    values = vars(parser.instantiate(arguments))
    del values["config"]
    config = _plain(config_class(**values))
    _check_training(config)
    return config


def _check_training(config: Any) -> None:
    if isinstance(getattr(config, "data", None), DataConfig):
        _check_data(config.data)
    if isinstance(config, DetectionConfig):
        _check_anchors(config.model.anchors)
    elif isinstance(config, SegmentationConfig):
        _check_segmentation_loss(config)


def _check_data(data: DataConfig) -> None:
    size = height_width(data.size)
    crop = size if data.crop is None else height_width(data.crop)
    if crop[0] > size[0] or crop[1] > size[1]:
        raise UsageError(
            f"data.crop {data.crop} is larger than data.size {data.size}, into which the images "
            "are fitted: the rest would be padding"
        )
    check_memory(data, 1)
    hint = "for images between 0 and 1; divide numbers for 0 to 255 by 255"
    if len(data.mean) != 3 or not all(0 <= value <= 1 for value in data.mean):
        raise UsageError(f"data.mean takes three numbers from 0 to 1, {hint}; got {data.mean}")
    if len(data.std) != 3 or not all(0.001 <= value <= 1 for value in data.std):
        raise UsageError(f"data.std takes three numbers from 0.001 to 1, {hint}; got {data.std}")


def check_memory(data: DataConfig, batch_size: int) -> None:
    """Refuse batches whose images alone are more than the memory of this machine.

    Raises:
        UsageError: naming both.
    """
    height, width = height_width(data.size)
    gigabytes = batch_size * height * width * 3 * 4 / 1e9
    if not hasattr(os, "sysconf"):  # Windows
        return
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    if gigabytes > there:
        raise UsageError(
            f"{batch_size} images of data.size {data.size} in one batch take {gigabytes:.0f} GB, "
            f"and this machine has {there:.0f} GB; lower data.size or the batch size"
        )


def _check_anchors(anchors: list[int] | None) -> None:
    if anchors is not None and not (3 <= len(anchors) <= 5 and min(anchors) > 0):
        raise UsageError(f"model.anchors takes 3 to 5 positive numbers, got {anchors}")


def _check_segmentation_loss(config: SegmentationConfig) -> None:
    decided = {"mode": config.model.mode, "ignore_index": VOID}
    try:
        loss = build_loss(config.loss, "segmentation", mode=config.model.mode, ignore_index=VOID)
    except SpecError as error:
        raise UsageError(error) from error
    for name, _, term in loss.items():
        if term.options["reduction"] == "none":
            raise UsageError(f"loss {config.loss!r}: {name!r} cannot have reduction='none' here")
        for option, value in decided.items():
            if term.given.get(option, value) != value:
                raise UsageError(
                    f"loss {config.loss!r}: {name!r} cannot have {option}={term.given[option]!r} "
                    f"here, where it is always {value!r}; leave it out"
                )


def _check_devices(devices: int | str) -> None:
    there = torch.cuda.device_count() or os.cpu_count() or 1
    if isinstance(devices, int) and devices > there:
        kind = "GPUs" if torch.cuda.is_available() else "CPU cores"
        raise UsageError(f"train.devices {devices} is more than the {kind} here, {there}")


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
