"""What the benchmark measures: our losses beside those of the peers that are installed."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from common import plain
from common.bench_inputs import (
    OUR_BOXES,
    OUR_FOCAL,
    PLAIN_BOXES,
    THEIR_BOXES,
    anchor_labels,
    boxes_of,
    labels_of,
    logits_of,
    masks,
    mean_of,
    smp_bce_dice,
    smp_ce_dice,
    sum_of,
    torchvision_focal,
)
from common.benchmark import Step, Work, can_compile, kept_bytes, peak_bytes
from common.errors import UsageError

import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torchvision.models.detection.retinanet import RetinaNetHead

from detseg_losses import LOSSES, SpecError, build_loss
from detseg_losses.integrations.torchvision_retinanet import RetinaNetLossHead

ANCHORS, CLASSES, POSITIVES = 190_000, 91, 300

Limits = dict[str, float]


@dataclass
class Race:
    """Pieces of work to be timed in turns.

    Attributes:
        work: what is done.
        against: by whom it is done otherwise.
        plain: the loss as a user would write it, of the same inputs; None where that is no matter.
        limits: the largest wanted ratios of our time to that of "peer", "plain", or "compiled",
            which is the plain loss compiled.
    """

    work: str
    against: str
    ours: Work
    peer: Work
    limits: Limits = field(default_factory=dict)
    plain: Callable[..., Tensor] | None = None


@dataclass
class Size:
    """A number that needs no second opinion: bytes for a byte of the logits, or milliseconds."""

    work: str
    against: str
    value: float
    limit: float | None = None


Rows = Iterator[Race | Size]
ROWS: dict[str, Callable[[torch.device], Rows]] = {}


def row(name: str) -> Callable[[Callable[[torch.device], Rows]], Callable[[torch.device], Rows]]:
    """Enter some rows under the name that the command line knows."""

    def enter(function: Callable[[torch.device], Rows]) -> Callable[[torch.device], Rows]:
        ROWS[name] = function
        return function

    return enter


@row("boxes")
def boxes(device: torch.device) -> Rows:
    """Overlaps of boxes."""
    for name in OUR_BOXES:
        for count in (16, 100, 1_000, 10_000, 100_000):
            pair = boxes_of(device, count)
            ours, peer = Step(OUR_BOXES[name], pair), Step(THEIR_BOXES[name], pair)
            work = f"{name}, {count:,} boxes"
            yield Race(work, "torchvision", ours, peer, {"peer": 1}, PLAIN_BOXES[name])


@row("focal")
def focal(device: torch.device) -> Rows:
    """Sigmoid focal loss of a detection head."""
    large = {"compiled": 0.8}
    for anchors, classes, positives, limits in (
        (100, 80, 5, {"peer": 1.0}),
        (2_000, 80, 100, {"peer": 1.0}),
        (ANCHORS, CLASSES, POSITIVES, {"peer": 0.1} | large),
    ):
        x = logits_of(device, anchors, classes)
        inputs = x, anchor_labels(device, anchors, classes, positives)
        ours, peer = Step(OUR_FOCAL, inputs), Step(torchvision_focal, inputs)
        work = f"focal, class indices, {anchors:,} anchors x {classes} classes"
        yield Race(work, "torchvision", ours, peer, limits, plain.focal)
    yield Race(work, "logits.clone()", ours, x.detach().clone, {"peer": 5})
    inputs = x, torch.zeros_like(x).masked_fill_(x.detach() > 4, 0.7)
    ours = Step(OUR_FOCAL, inputs)
    peer = Step(sum_of(torchvision.ops.sigmoid_focal_loss), inputs)
    work = f"focal, dense targets, {ANCHORS:,} anchors x {CLASSES} classes"
    yield Race(work, "torchvision", ours, peer, {"peer": 0.17} | large, plain.focal)


@row("ce+dice")
def ce_dice(device: torch.device) -> Rows:
    """Cross entropy and Dice of many and of few classes."""
    ours = build_loss("ce + dice")
    large = {"compiled": 0.8}
    for shape, limits, alone in (
        ((2, 3, 32, 32), {"peer": 0.9}, None),
        ((4, 4, 96, 96), {"peer": 0.9}, None),
        ((16, 3, 128, 128), {"peer": 0.67}, None),
        ((8, 2, 256, 256), {"peer": 0.67}, None),
        ((4, 21, 384, 384), {"peer": 0.18} | large, 1.0),
        ((2, 150, 256, 256), {"peer": 0.13} | large, 1.2),
    ):
        x, y = masks(device, *shape)
        step, peer = Step(ours, (x, y)), Step(smp_ce_dice(), (x, y))
        work = f"ce+dice, {shape}"
        yield Race(work, "torch ce + SMP dice", step, peer, limits, plain.ce_dice)
        if alone is None:
            continue
        yield Race(work, "torch ce alone", step, Step(F.cross_entropy, (x, y)), {"peer": alone})
        if find_spec("monai"):
            from monai.losses import DiceCELoss

            monai = DiceCELoss(to_onehot_y=True, softmax=True, batch=True)
            yield Race(work, "MONAI", step, Step(monai, (x, y.unsqueeze(1))), {"peer": 1 / 2.5})


@row("bce+dice")
def bce_dice(device: torch.device) -> Rows:
    """Binary cross entropy and Dice of one channel."""
    ours = build_loss("bce + dice", mode="binary")
    for shape, limits in (
        ((4, 1, 64, 64), {"peer": 0.9}),
        ((8, 1, 512, 512), {"peer": 0.25, "plain": 0.8}),
    ):
        inputs = masks(device, *shape)
        step, peer = Step(ours, inputs), Step(smp_bce_dice(), inputs)
        yield Race(f"bce+dice, {shape}", "SMP", step, peer, limits, plain.bce_dice)


@row("dice")
def dice(device: torch.device) -> Rows:
    """Dice alone, of small masks."""
    for shape in ((2, 3, 32, 32), (4, 4, 96, 96), (4, 1, 64, 64)):
        inputs = masks(device, *shape)
        mode, formula = (
            ("binary", plain.binary_dice) if shape[1] == 1 else ("multiclass", plain.dice)
        )
        ours, peer = build_loss("dice", mode=mode), smp.losses.DiceLoss(mode)
        steps = Step(ours, inputs), Step(peer, inputs)
        yield Race(f"dice, {shape}", "SMP", *steps, {"peer": 0.9}, formula)


@row("terms")
def terms(device: torch.device) -> Rows:
    """What further terms of one pass cost."""
    shape = (4, 21, 384, 384)
    inputs = masks(device, *shape)
    more, two = build_loss("ce + dice + tversky + jaccard"), build_loss("ce + dice")
    ours, peer = Step(more, inputs), Step(two, inputs)
    yield Race(f"ce+dice+tversky+jaccard, {shape}", "ce+dice", ours, peer, {"peer": 1.15})


@row("retinanet")
def retinanet(device: torch.device) -> Rows:
    """The whole loss of torchvision's RetinaNet, through the adapter and as it comes."""
    stock = RetinaNetHead(in_channels=8, num_anchors=1, num_classes=CLASSES).to(device)
    head = copy.deepcopy(stock)
    RetinaNetLossHead.swap(head, build_loss("l1 + focal"), "image")
    for images, anchors, positives, limits in (
        (1, 19_206, 30, {"peer": 1.0}),  # those of 320 x 320 pixels
        (2, ANCHORS, POSITIVES, {"peer": 0.1, "compiled": 0.8}),
    ):
        inputs = head_inputs(device, images, anchors, positives)
        ours, peer = (Step(partial(loss_of_head, one), inputs) for one in (head, stock))
        work = f"RetinaNet's losses, {images} x {anchors:,} anchors x {CLASSES} classes"
        yield Race(work, "torchvision", ours, peer, limits, plain.retinanet)
    given = tree_leaves(inputs)
    for name, step, limit in (("detseg_losses", ours, 1.25), ("torchvision", peer, None)):
        for tensor in step.prediction:
            tensor.grad = None
        peak = peak_bytes(step, given, device) / inputs[0].nbytes
        yield Size(f"peak memory / logits, {work}", name, peak, limit)


def loss_of_head(head: RetinaNetHead, logits: Tensor, offsets: Tensor, *others: Any) -> Tensor:
    targets, anchors, matched = others
    outputs = {"cls_logits": logits, "bbox_regression": offsets}
    losses: dict[str, Tensor] = head.compute_loss(targets, outputs, anchors, matched)
    return torch.stack([*losses.values()]).sum()


def head_inputs(device: torch.device, images: int, anchors: int, positives: int) -> tuple[Any, ...]:
    """Logits, offsets, targets, anchors and matches; one anchor is between the thresholds for each
    that is positive.
    """
    boxes = torch.rand(anchors, 4, device=device) * 500
    boxes[:, 2:] += boxes[:, :2] + 16
    matched = torch.where(anchor_labels(device, anchors, CLASSES, positives) >= 0, 0, -1)
    matched[1 :: anchors // positives] = -2
    target = {"boxes": boxes[:1].clone(), "labels": torch.ones(1, dtype=torch.long, device=device)}
    return (
        logits_of(device, images, anchors, CLASSES),
        logits_of(device, images, anchors, 4),
        [target] * images,
        [boxes] * images,
        [matched] * images,
    )


@row("half")
def half(device: torch.device) -> Rows:
    """Logits in bfloat16."""
    heads = logits_of(device, ANCHORS, CLASSES), anchor_labels(device, ANCHORS, CLASSES, POSITIVES)
    for spec, (x, y) in (
        ("ce + dice", masks(device, 4, 21, 384, 384)),
        ("focal(reduction='sum')", heads),
    ):
        loss = build_loss(spec)
        low = x.detach().bfloat16().requires_grad_()
        steps = Step(loss, (low, y)), Step(loss, (x, y))
        yield Race(f"{spec}, bfloat16 {tuple(x.shape)}", "float32", *steps, {"peer": 1.1})


@row("compiled")
def compiled(device: torch.device) -> Rows:
    """The losses under ``torch.compile``, where there is a compiler."""
    if not can_compile(device):
        return
    heads = logits_of(device, ANCHORS, CLASSES), anchor_labels(device, ANCHORS, CLASSES, POSITIVES)
    for spec, formula, inputs, limit in (
        ("focal(reduction='sum')", plain.focal, heads, None),
        ("ce + dice", plain.ce_dice, masks(device, 4, 21, 384, 384), None),
        ("bce(mode='binary') + dice", plain.bce_dice, masks(device, 8, 1, 512, 512), 1.05),
    ):
        loss = build_loss(spec)
        step = Step(torch.compile(loss, fullgraph=True), inputs)
        work = f"{spec}, compiled, {tuple(inputs[0].shape)}"
        yield Race(work, "not compiled", step, Step(loss, inputs), {"peer": 1.1})
        peer = Step(torch.compile(formula, fullgraph=True), inputs)
        limits = {} if limit is None else {"peer": limit}
        yield Race(work, "plain PyTorch, compiled", step, peer, limits)


@row("growth")
def growth(device: torch.device) -> Rows:
    """A hundred times the elements."""
    for spec, classes in (("ce + dice", 20), ("focal(mode='multilabel')", 20)):
        loss = build_loss(spec, "segmentation")

        def step(pixels: int, classes: int = classes, loss: Any = loss, spec: str = spec) -> Work:
            x, y = logits_of(device, 1, classes, pixels), labels_of(device, classes, 1, pixels)
            if "multilabel" in spec:
                y = (x.detach() > 0).byte()
            return Step(loss, (x, y))

        large, small = step(10**8 // classes), step(10**6 // classes)
        yield Race(f"{spec}, 1e8 elements", "1e6 elements", large, small, {"peer": 130})


@row("kept")
def kept(device: torch.device) -> Rows:
    """What every loss that reads logits keeps for its backward pass."""
    for name, cls in LOSSES.items():
        if "segmentation" not in cls.kinds:
            continue
        options = {"mode": "multiclass"} if "classification" in cls.kinds else {}
        limit = 1.0 if hasattr(cls, "needs") else None  # which losses on the engines have
        for classes in (21, 2):
            x, y = logits_of(device, 2, classes, 128, 128), labels_of(device, classes, 2, 128, 128)
            loss = cls(**options)
            # Rounded, for there are a few sums as well.
            ratio = round(kept_bytes(partial(loss, x, y), [x, y]) / x.nbytes, 2)
            yield Size(f"kept for backward / logits, {name}", f"{classes} classes", ratio, limit)


@row("import")
def importing(device: torch.device) -> Rows:
    """The milliseconds that the import takes beside torch's own."""
    code = (
        "import time, torch; start = time.perf_counter(); import detseg_losses; "
        "print(time.perf_counter() - start)"
    )
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    with TemporaryDirectory() as cache:  # compiled code, as every import but the first finds it
        environment["PYTHONPYCACHEPREFIX"] = cache
        run = partial(subprocess.check_output, [sys.executable, "-c", code], env=environment)
        milliseconds = median([float(run()) * 1e3 for _ in range(8)][1:])
    yield Size("import detseg_losses, milliseconds", "after import torch", milliseconds, 50)


PEERS: dict[str, tuple[str, Callable[[], Callable[[Tensor, Tensor], Tensor]]]] = {
    "bce": ("torch", lambda: F.binary_cross_entropy_with_logits),
    "ce": ("torch", lambda: F.cross_entropy),
    "dice": ("SMP", lambda: smp.losses.DiceLoss("multiclass")),
    "jaccard": ("SMP", lambda: smp.losses.JaccardLoss("multiclass")),
    "tversky": ("SMP", lambda: smp.losses.TverskyLoss("multiclass")),
    "lovasz": ("SMP", lambda: smp.losses.LovaszLoss("multiclass")),
    "focal": ("torchvision", lambda: mean_of(torchvision.ops.sigmoid_focal_loss)),
    "giou": ("torchvision", lambda: mean_of(torchvision.ops.generalized_box_iou_loss)),
    "diou": ("torchvision", lambda: mean_of(torchvision.ops.distance_box_iou_loss)),
    "ciou": ("torchvision", lambda: mean_of(torchvision.ops.complete_box_iou_loss)),
    "l1": ("torch", lambda: F.l1_loss),
    "smooth_l1": ("torch", lambda: F.smooth_l1_loss),
    "mse": ("torch", lambda: F.mse_loss),
    "huber": ("torch", lambda: F.huber_loss),
}
"""By whom a single loss is compared, and the same loss there."""


def loss_rows(spec: str, shape: list[int] | None) -> Callable[[torch.device], Rows]:
    """The rows of any loss string.

    Raises:
        SpecError: it cannot be read, or mixes kinds of input.
    """
    loss = build_loss(spec)
    if loss.kind is None:
        raise SpecError(f"{spec!r} mixes kinds of input, which only an adapter can give it")

    def rows(device: torch.device) -> Rows:
        if loss.kind == "distribution":
            x = logits_of(device, *(shape or [100_000, 17]))
            y = torch.rand(x.shape[:-1], device=device) * (x.shape[-1] - 1)
        elif loss.kind in ("boxes", "deltas"):
            sizes = [shape[0] if shape else 100_000, 4]
            x, y = logits_of(device, *sizes), logits_of(device, *sizes).detach().flip(0)
            if loss.kind == "boxes":
                x, y = (
                    torch.cat((b[:, :2], b[:, :2] + b[:, 2:].abs() + 1), 1).detach() for b in (x, y)
                )
                x.requires_grad_()
        elif loss.kind == "classification":
            x = logits_of(device, *(shape or [50_000, 80]))
            y = (x.detach() > 4).float()
        else:
            x = logits_of(device, *(shape or [4, 21, 256, 256]))
            y = labels_of(device, x.shape[1], x.shape[0], *x.shape[2:])
        ours = Step(loss, (x, y))
        try:
            ours()
        except ValueError as error:
            raise UsageError(f"--loss {spec} --shape {list(x.shape)}: {error}") from error
        work = f"{loss!r}, {tuple(x.shape)}"
        yield Race(work, "a copy of the prediction", ours, x.detach().clone)
        if repr(loss) in PEERS:
            library, make = PEERS[repr(loss)]
            yield Race(work, library, ours, Step(make(), (x, y)))
        yield Size(
            f"kept for backward / prediction, {work}",
            "",
            kept_bytes(partial(loss, x, y), [x, y]) / x.nbytes,
        )

    return rows
