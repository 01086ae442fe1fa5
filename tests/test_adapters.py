"""What all adapters have in common: bad strings, bad targets, and what they say once."""

from __future__ import annotations

import re
import warnings
from collections import OrderedDict
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection import (
    FCOS,
    FasterRCNN,
    KeypointRCNN,
    MaskRCNN,
    RetinaNet,
)
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNHeads, KeypointRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.ssd import SSD
from torchvision.models.segmentation import FCN

from detseg_losses import SpecError, build_loss
from detseg_losses.integrations import (
    ADAPTERS,
    check_losses,
    model_losses,
    restore_losses,
    use_losses,
)

CLASSES = 4  # the background is one
POINTS = 17
DETECTORS = [RetinaNet, FCOS, SSD, FasterRCNN, MaskRCNN, KeypointRCNN]
OF_EVERYTHING = {
    MaskRCNN: "giou+focal; mask: bce+dice",
    KeypointRCNN: "giou+focal; keypoint: ce",
}
"""A string for each role, where "giou+focal" is not all."""

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*exclude each other"),
    pytest.mark.filterwarnings("ignore:.*stays as it is"),
    pytest.mark.filterwarnings("ignore:.*times the stock loss"),
]


class Backbone(nn.Module):
    """Maps of 8 and 4 pixels of a 64-pixel image."""

    def __init__(self, channels: Any) -> None:
        super().__init__()
        self.fine = nn.Conv2d(3, 32, 3, 8, 1)
        self.coarse = nn.Conv2d(32, 32, 3, 2, 1)
        self.out_channels = channels

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        fine = self.fine(x).relu()
        return OrderedDict([("0", fine), ("1", self.coarse(fine).relu())])


def small(cls: type[nn.Module]) -> nn.Module:
    """A model that takes 64-pixel images."""
    torch.manual_seed(0)
    sizes: Any = {"min_size": 64, "max_size": 64}
    if cls is SSD:
        boxes = DefaultBoxGenerator([[2], [2]], scales=[0.2, 0.5, 0.9])
        return SSD(Backbone([32, 32]), boxes, (64, 64), CLASSES).train()
    anchors = AnchorGenerator(((16,), (32,)), ((1.0,),) * 2)
    if not issubclass(cls, FasterRCNN):
        return cls(Backbone(32), CLASSES, anchor_generator=anchors, **sizes).train()  # type: ignore[arg-type]
    if cls is MaskRCNN:
        sizes["mask_head"] = MaskRCNNHeads(32, (8,), 1)
        sizes["mask_predictor"] = MaskRCNNPredictor(8, 8, CLASSES)
    if cls is KeypointRCNN:
        sizes["keypoint_head"] = KeypointRCNNHeads(32, (8,))
        sizes["keypoint_predictor"] = KeypointRCNNPredictor(8, POINTS)
    return cls(
        Backbone(32),  # type: ignore[arg-type]
        rpn_anchor_generator=anchors,
        box_head=TwoMLPHead(32 * 7 * 7, 16),
        box_predictor=FastRCNNPredictor(16, CLASSES),
        box_batch_size_per_image=16,
        **sizes,
    ).train()


IMAGES = [torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(n)) for n in range(2)]


def targets() -> list[dict[str, Tensor]]:
    """Two objects, and none."""
    boxes = torch.tensor([[4.0, 4, 30, 36], [20, 16, 60, 50]])
    masks = torch.zeros(2, 64, 64, dtype=torch.uint8)
    masks[0, 4:20, 4:30] = masks[1, 16:40, 20:60] = 1
    points = torch.full((2, POINTS, 3), 25.0)
    objects = {"boxes": boxes, "labels": torch.tensor([1, 3]), "masks": masks, "keypoints": points}
    return [objects, {name: values[:0] for name, values in objects.items()}]


def losses_of(model: nn.Module, batch: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return model(IMAGES, batch)


@pytest.mark.parametrize(
    ("cls", "spec", "options"),
    [
        (RetinaNet, "giou + focal(class_weights=[1, 2, 3])", {"normalizer": "batch"}),
        (FCOS, "giou+focal", {"centerness": "focal"}),
        (SSD, "giou+focal", {}),
        (FasterRCNN, "giou+focal", {}),
        (MaskRCNN, "giou+focal; mask: dice", {}),
        (MaskRCNN, "mask: dice; rpn: giou", {}),
        (KeypointRCNN, "keypoint: ce", {}),
        (FCN, "ce(class_weights=[1, 2]) + dice", {"ignore_index": 255, "aux_weight": 0.2}),
        (FCN, "bce + dice", {"mode": "multilabel"}),
    ],
)
def test_a_string_is_judged_by_the_class_alone(cls: Any, spec: str, options: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_losses(cls, spec, **options)


@pytest.mark.parametrize(
    ("cls", "spec", "options", "message"),
    [
        (RetinaNet, "giou+poly", {}, "RetinaNet has no use for 'poly', it has for .* bce, focal"),
        (
            RetinaNet,
            "ce(label_smoothing=1.0)",
            {},
            "'bce', for which 'label_smoothing' has no meaning",
        ),
        (RetinaNet, "rpn: giou", {}, "';' and ':' are for models that have stages"),
        (FCOS, "giou+focal", {"centerness": "giou"}, "the centerness of FCOS has no use"),
        (SSD, "giou+dfl", {}, "no use for 'dfl', it has for losses such as ce, softmax_focal, g"),
        (FasterRCNN, "giou+focal; mask: bce", {}, "FasterRCNN has no stage 'mask'"),
        (MaskRCNN, "giou+focal+dice", {}, "write 'giou . focal; mask: dice'"),
        (MaskRCNN, "0.5*dice", {}, "write 'mask: 0.5.dice'"),
        (MaskRCNN, "roi: giou+ce+2*dice+tversky", {}, "'giou . ce; mask: 2.0.dice . tversky'"),
        (MaskRCNN, "giou+focal; giou", {}, "column 13: expected a stage, as in 'mask: giou'"),
        (MaskRCNN, "giou+focal; rpn: giou", {}, "stage 'rpn' is given twice"),
        (MaskRCNN, "giou+focal; mask", {}, "expected a stage, as in 'mask: mask'"),
        (MaskRCNN, "giou+focal; mask:", {}, "is empty; write for example"),
        (FCN, "giou", {}, "'giou' is a loss of boxes, not of segmentation; write .*'ce' or 'dice'"),
        (FCN, "ce", {"mode": "binary"}, "use 'bce' or 'focal'"),
        (FCN, "ce + dice(ignore_index=0)", {"ignore_index": 255}, "'dice': ignore_index=0 .* 255"),
        (FCN, "", {"ignore_index": 255}, "is empty"),
    ],
)
def test_a_bad_string_needs_no_model(cls: Any, spec: str, options: Any, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        check_losses(cls, spec, **options)


@pytest.mark.parametrize("cls", DETECTORS)
def test_wrong_types_are_named(cls: type[nn.Module]) -> None:
    model: Any = small(cls)
    for spec in (None, ["giou", "focal"], b"giou", build_loss("giou")):
        for call in (lambda s: use_losses(model, s), lambda s: check_losses(cls, s)):
            with pytest.raises(TypeError, match="a loss string is a str such as 'giou"):
                call(spec)
    with pytest.raises(TypeError, match=f"takes a model, and {cls.__name__} is a class"):
        use_losses(cls, "giou+focal")  # type: ignore[type-var]
    with pytest.raises(TypeError, match=f"{cls.__name__} is on the meta device"):
        use_losses(small(cls).to("meta"), "giou+focal")
    for other in ("retinanet", None):
        with pytest.raises(TypeError, match=f"no adapter for {type(other).__name__}"):
            use_losses(other, "giou+focal")  # type: ignore[type-var]


@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("Linear", "SMP, transformers, and Ultralytics"),
        ("MyRetinaNet", "Ultralytics; the nearest class that has one is RetinaNet"),
        ("A" * 9000, "Ultralytics"),
    ],
)
def test_a_class_without_an_adapter(name: str, end: str) -> None:
    with pytest.raises(TypeError, match=f"^no adapter for {name[:60]};.*{end}$") as caught:
        use_losses(type(name, (torch.nn.Module,), {})(), "ce")
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize("cls", DETECTORS)
@pytest.mark.parametrize("label", [CLASSES, 1000, -1, 0])
def test_labels_out_of_range_are_named(cls: Any, label: int) -> None:
    model = use_losses(small(cls), OF_EVERYTHING.get(cls, "giou+focal"))
    batch = targets()
    batch[0]["labels"][1] = label
    if cls in (RetinaNet, FCOS) and label == 0:  # to these a class as any other
        losses_of(model, batch)
        return
    message = f"image 0: label {label}, but num_classes=4 allows 1..3"
    with pytest.raises(ValueError, match=message + "; 0 is the back" * (label == 0)):
        losses_of(model, batch)


NOTHING = {
    "boxes": [torch.zeros(0, 4), torch.zeros(0, 4, dtype=torch.float64), torch.zeros(0)],
    "labels": [
        *(torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int32), torch.zeros(0)),
        torch.zeros(0, 1, dtype=torch.int64),
    ],
    "masks": [
        *(torch.zeros(0, 64, 64), torch.zeros(0, 64, 64, dtype=torch.bool), torch.zeros(0, 0, 0)),
        *(torch.zeros(0, 1, 1), torch.zeros(64, 0, 64), torch.zeros(0)),
    ],
    "keypoints": [
        *(torch.zeros(0, POINTS, 3), torch.zeros(POINTS, 0, 3), torch.zeros(0, 0, 3)),
        *(torch.zeros(0, 1, 3), torch.zeros(0, POINTS, 3, dtype=torch.float64), torch.zeros(0)),
    ],
}
"""What an image without objects may hold; the first is what the documentation asks for."""

CASES = [
    (cls, key, number)
    for cls, keys in {
        **{each: ["boxes", "labels"] for each in DETECTORS},
        MaskRCNN: ["boxes", "masks"],
        KeypointRCNN: ["boxes", "keypoints"],
    }.items()
    for key in keys
    for number in range(len(NOTHING[key]))
]


@pytest.mark.parametrize(("cls", "key", "number"), CASES)
def test_an_image_without_objects_may_look_as_torchvision_lets_it(
    cls: Any, key: str, number: int
) -> None:
    """Beside an image with objects: where torchvision can train, so can the losses of a string."""
    model, batch = small(cls), targets()
    batch[1][key] = NOTHING[key][number]
    try:
        stock = losses_of(model, batch)
    except (RuntimeError, IndexError, AssertionError, ValueError, TypeError):
        pytest.skip("torchvision refuses this")
    ours = losses_of(use_losses(model, OF_EVERYTHING.get(cls, "giou+focal")), batch)
    assert ours.keys() == stock.keys()
    assert all(value.isfinite() for value in ours.values())


def test_masks_of_255_are_refused_and_rounding_is_not() -> None:
    model = use_losses(small(MaskRCNN), "mask: bce+dice")
    batch = targets()
    before = losses_of(model, batch)["loss_mask"]
    batch[0]["masks"] = batch[0]["masks"] * 1.0000001
    torch.testing.assert_close(losses_of(model, batch)["loss_mask"], before)
    batch[0]["masks"] = targets()[0]["masks"] * 255
    with pytest.raises(ValueError, match=r"masks must be .*255.*divide by 255"):
        losses_of(model, batch)


def said(call: Any) -> list[str]:
    """The warnings of a call."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(each.message) for each in caught]


@pytest.mark.parametrize(
    ("cls", "spec", "messages"),
    [
        (RetinaNet, "giou+focal", []),
        (RetinaNet, "l1+focal", []),
        (RetinaNet, "100*l1+focal(gamma=1.5)", [r"bbox_regression is 1e\+02 times .* '1\*l1'"]),
        (RetinaNet, "learned*giou+0.001*focal", [r"classification is 0.001 times .* '1\*focal'"]),
        (FCOS, "giou+focal", []),
        (FCOS, "giou+bce", [r"classification is .* smaller weight .* '0.\d+\*bce'"]),
        (SSD, "smooth_l1+ce", []),
        (SSD, "0.01*smooth_l1+ce", [r"bbox_regression is 0.01 times .* '1\*smooth_l1'"]),
        (SSD, "smooth_l1+0.02*poly(epsilon=0)", [r"class.* is 0.02 .* '1\*poly\(epsilon=0\)'"]),
        (FasterRCNN, "rpn: giou+focal", [r"_objectness is 0.\d+ times .* 'rpn: \d0?\*focal'"]),
        (FasterRCNN, "roi: giou+ce", [r"loss_box_reg is 0.\d+ times .* 'roi: \d+\*giou'"]),
        (FasterRCNN, "rpn: bce; roi: ce", []),
        (MaskRCNN, "mask: 0.05*bce", [r"loss_mask is 0.05 times .* 'mask: 1\*bce'"]),
        (KeypointRCNN, "keypoint: 0.1*ce", [r"loss_keypoint is 0.1 times .* 'keypoint: 1\*ce'"]),
        (FasterRCNN, "rpn: ramp(0, 1, steps=9)*bce", []),
    ],
)
def test_another_scale_is_said_once(cls: Any, spec: str, messages: list[str]) -> None:
    model = use_losses(small(cls), spec)
    model_losses(model)
    empty = [targets()[1]] * 2
    assert not said(lambda: losses_of(model, empty))
    found = said(lambda: losses_of(model, targets()))
    assert len(found) == len(messages)
    for message, pattern in zip(found, messages, strict=True):
        assert re.search(pattern, message), message
    assert not said(lambda: losses_of(model, targets()))


@pytest.mark.parametrize("cls", DETECTORS)
def test_comparing_changes_neither_values_nor_random_numbers(cls: Any) -> None:
    spec = OF_EVERYTHING.get(cls, "giou+focal")
    model = use_losses(small(cls), spec)
    first, state = losses_of(model, targets()), torch.get_rng_state()
    second = losses_of(model, targets())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, second[entry]) for entry, value in first.items())
    assert all(value.requires_grad for value in first.values())


@pytest.mark.parametrize(
    ("spec", "better"),
    [("0.01*giou+focal", "20*giou"), ("20*giou+focal", None), ("7*giou+focal", None)],
)
def test_no_weight_beyond_20_is_recommended(
    spec: str, better: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = use_losses(small(RetinaNet), spec)
    own = model.head.regression_head.compute_loss
    monkeypatch.setattr(
        model.head.regression_head, "compute_loss", lambda *inputs: 1000 * own(*inputs)
    )
    found = said(lambda: losses_of(model, targets()))
    assert len(found) == (better is not None)
    assert better is None or f"'{better}'" in found[0]


@pytest.mark.parametrize("cls", DETECTORS)
def test_learned_weights_that_no_checkpoint_has_are_said(cls: Any) -> None:
    spec = "rpn: learned*giou" if issubclass(cls, FasterRCNN) else "learned*giou"

    def made() -> nn.Module:
        return use_losses(small(cls), spec)

    model = made()
    assert not said(lambda: losses_of(model.eval(), targets()))
    (found,) = said(lambda: losses_of(model.train(), targets()))
    assert "learned weights of giou are not in model.state_dict()" in found
    assert "model_losses(model)" in found
    assert not said(lambda: losses_of(model, targets()))
    model = made()
    model_losses(model)  # the tools' way: its state goes into their checkpoints
    assert not said(lambda: losses_of(model, targets()))
    restored = restore_losses(made())
    assert not said(lambda: losses_of(restored, targets()))


@pytest.mark.parametrize(
    ("cls", "spec", "names"),
    [
        (RetinaNet, "giou+focal", ["giou", "focal"]),
        (FCOS, "giou+focal", ["giou", "focal", "centerness.bce"]),
        (SSD, "giou+ce", ["giou", "ce"]),
        (MaskRCNN, "rpn: bce; mask: dice", ["rpn.bce", "mask.dice"]),
    ],
)
def test_the_values_of_all_terms_are_in_one_place(cls: Any, spec: str, names: list[str]) -> None:
    model = small(cls)
    with pytest.raises(ValueError, match=f"this {cls.__name__} has no losses of use_losses"):
        model_losses(model)
    use_losses(model, spec)
    losses = model_losses(nn.DataParallel(model))  # as any wrapper
    returned = losses_of(model, targets())
    assert set(losses.values) == set(names)
    assert not any(value.requires_grad for value in losses.values.values())
    entries = {"rpn": "loss_objectness", "mask": "loss_mask"}
    stages = [entries[n.partition(".")[0]] for n in names] if cls is MaskRCNN else list(returned)
    total = sum(value.detach() for entry, value in returned.items() if entry in stages)
    torch.testing.assert_close(sum(losses.values.values()), total)


def test_the_values_of_a_model_without_an_adapter() -> None:
    with pytest.raises(TypeError, match="no adapter for Linear"):
        model_losses(nn.Linear(1, 1))


def test_a_detector_alone_computes_its_losses() -> None:
    losses = model_losses(use_losses(small(SSD), "giou+ce"))
    with pytest.raises(TypeError, match="SSDWithLosses computes its losses itself"):
        losses([], targets())


@pytest.mark.parametrize(
    ("cls", "spec", "same", "taken"),
    [
        (RetinaNet, "giou+ce", "giou+bce", ["'ce' is taken as 'bce'"]),
        (
            FCOS,
            "giou+2*softmax_focal(gamma=1.5)",
            "giou+2*focal(gamma=1.5)",
            ["'softmax_focal' is taken as 'focal'"],
        ),
        (
            FasterRCNN,
            "giou+ce",
            "rpn: giou+bce; roi: giou+ce",
            ["stage 'rpn' of FasterRCNN are independent sigmoids: 'ce' is taken as 'bce'"],
        ),
        (
            FasterRCNN,
            "giou+focal",
            "rpn: giou+focal; roi: giou+softmax_focal",
            ["stage 'roi' of FasterRCNN exclude each other: 'focal' is taken as 'softmax_focal'"],
        ),
        (
            MaskRCNN,
            "giou+ce; mask: ramp(0, 1, steps=9)*ce + dice(smooth=1)",
            "rpn: giou+bce; roi: giou+ce; mask: ramp(0, 1, steps=9)*bce + dice(smooth=1)",
            ["stage 'rpn' of MaskRCNN", "stage 'mask' of MaskRCNN"],
        ),
    ],
)
@pytest.mark.filterwarnings("default:.*is taken as")
def test_one_string_serves_every_stage(cls: Any, spec: str, same: str, taken: list[str]) -> None:
    model = small(cls)
    messages = [m for m in said(lambda: use_losses(model, spec)) if "is taken as" in m]
    assert len(messages) == len(taken)
    for message, part in zip(messages, taken, strict=True):
        assert part in message
    ours = losses_of(model, targets())
    other = losses_of(use_losses(model, same), targets())
    assert all(torch.equal(value, other[entry]) for entry, value in ours.items())


def test_every_adapter_says_how_it_injects() -> None:
    mechanisms = {}
    for name in sorted({*ADAPTERS.values()}):
        pytest.importorskip(
            {"smp": "segmentation_models_pytorch", "yolo": "ultralytics"}.get(
                name, name.partition("_")[0]
            )
        )
        mechanisms[name] = import_module(f"detseg_losses.integrations.{name}").ADAPTER.mechanism
    index = (Path(__file__).parent.parent / "docs" / "README.md").read_text()
    for name, mechanism in mechanisms.items():
        (row,) = (line for line in index.splitlines() if f"`{name}.py`" in line)
        assert f"| {mechanism} |" in row
