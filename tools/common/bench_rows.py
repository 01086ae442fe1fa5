"""What the benchmark measures: our losses beside those of the peers that are installed."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from common.benchmark import Work, can_compile, kept_bytes, peak_bytes
from common.errors import UsageError

import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor
from torchvision.models.detection.retinanet import RetinaNetHead

from detseg_losses import LOSSES, SpecError, build_loss
from detseg_losses.integrations.torchvision_retinanet import RetinaNetLossHead

ANCHORS, CLASSES, POSITIVES = 190_000, 91, 300


@dataclass
class Race:
    """Two pieces of work to be timed in turns.

    Attributes:
        work: what is done.
        against: by whom it is done otherwise.
        limit: the largest wanted ratio of our time to the other's; None where none is stated.
    """

    work: str
    against: str
    ours: Work
    peer: Work
    limit: float | None = None


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


def forward_backward(loss: Callable[..., Tensor], x: Tensor, *others: Any) -> Work:
    """A step of training, from the logits to their gradient."""

    def work() -> None:
        x.grad = None
        loss(x, *others).backward()

    return work


def _logits(device: torch.device, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(shape, device=device, generator=generator)
    return x.mul_(2).to(dtype).requires_grad_()


def _labels(device: torch.device, classes: int, *shape: int) -> Tensor:
    generator = torch.Generator(device).manual_seed(1)
    return torch.randint(0, classes, shape, device=device, generator=generator)


def _anchor_labels(device: torch.device) -> Tensor:
    """Class indices, -1 for background."""
    labels = torch.full((ANCHORS,), -1, device=device)
    step = ANCHORS // POSITIVES
    labels[: step * POSITIVES : step] = _labels(device, CLASSES, POSITIVES)
    return labels


def _torchvision_focal(x: Tensor, labels: Tensor) -> Tensor:
    """The loss with the one-hot target that torchvision's RetinaNet makes."""
    target = torch.zeros_like(x)
    foreground = labels >= 0
    target[foreground, labels[foreground]] = 1.0
    return torchvision.ops.sigmoid_focal_loss(x, target, reduction="sum")


@row("focal")
def focal(device: torch.device) -> Rows:
    """Sigmoid focal loss of a detection head."""
    x, labels = _logits(device, ANCHORS, CLASSES), _anchor_labels(device)
    loss = LOSSES["focal"](reduction="sum")
    shape = f"{ANCHORS:,} anchors x {CLASSES} classes"
    ours = forward_backward(loss, x, labels)
    peer = forward_backward(_torchvision_focal, x, labels)
    yield Race(f"focal, class indices, {shape}", "torchvision", ours, peer, 1 / 10)
    yield Race(f"focal, class indices, {shape}", "logits.clone()", ours, x.detach().clone, 5)
    dense = torch.zeros_like(x).masked_fill_(x.detach() > 4, 0.7)
    stock = partial(torchvision.ops.sigmoid_focal_loss, reduction="sum")
    ours, peer = forward_backward(loss, x, dense), forward_backward(stock, x, dense)
    yield Race(f"focal, dense targets, {shape}", "torchvision", ours, peer, 1 / 6)


@row("ce+dice")
def ce_dice(device: torch.device) -> Rows:
    """Cross entropy and Dice of many and of few classes."""
    ours = build_loss("ce + dice")
    dice = smp.losses.DiceLoss("multiclass")

    def theirs(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(x, y) + dice(x, y)

    for shape, limit, alone in (
        ((4, 21, 384, 384), 1 / 5, 1.0),
        ((2, 150, 256, 256), 1 / 4, 1.2),
        ((8, 2, 256, 256), 1 / 1.5, None),
        ((16, 3, 128, 128), 1 / 1.5, None),
    ):
        x, y = _logits(device, *shape), _labels(device, shape[1], shape[0], *shape[2:])
        step = forward_backward(ours, x, y)
        work = f"ce+dice, {shape}"
        yield Race(
            work, "F.cross_entropy + SMP DiceLoss", step, forward_backward(theirs, x, y), limit
        )
        if alone is None:
            continue
        only = forward_backward(F.cross_entropy, x, y)
        yield Race(work, "F.cross_entropy alone", step, only, alone)
        if find_spec("monai"):
            from monai.losses import DiceCELoss

            monai = DiceCELoss(to_onehot_y=True, softmax=True, batch=True)
            peer = forward_backward(monai, x, y.unsqueeze(1))
            yield Race(work, "MONAI DiceCELoss", step, peer, 1 / 2.5)


@row("bce+dice")
def bce_dice(device: torch.device) -> Rows:
    """Binary cross entropy and Dice of one channel."""
    shape = (8, 1, 512, 512)
    x, y = _logits(device, *shape), _labels(device, 2, *shape).float()
    bce, dice = smp.losses.SoftBCEWithLogitsLoss(), smp.losses.DiceLoss("binary")
    ours = forward_backward(build_loss("bce + dice", mode="binary"), x, y)
    peer = forward_backward(lambda x, y: bce(x, y) + dice(x, y), x, y)
    yield Race(f"bce+dice, {shape}", "SMP SoftBCE + DiceLoss", ours, peer, 1 / 4)


@row("terms")
def terms(device: torch.device) -> Rows:
    """What further terms of one pass cost."""
    shape = (4, 21, 384, 384)
    x, y = _logits(device, *shape), _labels(device, shape[1], shape[0], *shape[2:])
    more, two = build_loss("ce + dice + tversky + jaccard"), build_loss("ce + dice")
    ours, peer = forward_backward(more, x, y), forward_backward(two, x, y)
    yield Race(f"ce+dice+tversky+jaccard, {shape}", "ce+dice", ours, peer, 1.15)


@row("retinanet")
def retinanet(device: torch.device) -> Rows:
    """The whole loss of torchvision's RetinaNet, through the adapter and as it comes."""
    stock = RetinaNetHead(in_channels=8, num_anchors=1, num_classes=CLASSES).to(device)
    head = copy.deepcopy(stock)
    head.__class__ = RetinaNetLossHead
    head.loss, head.normalizer = build_loss("l1 + focal"), "image"
    logits = _logits(device, 2, ANCHORS, CLASSES)
    outputs = {"cls_logits": logits, "bbox_regression": _logits(device, 2, ANCHORS, 4)}
    boxes = torch.rand(ANCHORS, 4, device=device) * 500
    boxes[:, 2:] += boxes[:, :2] + 16
    matched = torch.where(_anchor_labels(device) >= 0, 0, -1)
    matched[1 :: ANCHORS // POSITIVES] = -2
    target = {"boxes": boxes[:1].clone(), "labels": torch.ones(1, dtype=torch.long, device=device)}
    arguments = [target, target], outputs, [boxes, boxes], [matched, matched]

    def step(head: Any) -> None:
        for tensor in outputs.values():
            tensor.grad = None
        sum(head.compute_loss(*arguments).values()).backward()

    work = f"RetinaNet's losses, 2 images of {ANCHORS:,} anchors x {CLASSES} classes"
    yield Race(work, "torchvision", partial(step, head), partial(step, stock), 1 / 10)
    given = [*outputs.values(), *target.values(), boxes, matched]
    for name, one, limit in (("detseg_losses", head, 1.25), ("torchvision", stock, None)):
        for tensor in outputs.values():
            tensor.grad = None
        peak = peak_bytes(partial(step, one), given, device)
        yield Size(f"peak memory / logits, {work}", name, peak / logits.nbytes, limit)


@row("half")
def half(device: torch.device) -> Rows:
    """Logits in bfloat16."""
    shape = (4, 21, 384, 384)
    y = _labels(device, shape[1], shape[0], *shape[2:])
    for spec, target, sizes in (
        ("ce + dice", y, shape),
        ("focal(reduction='sum')", _anchor_labels(device), (ANCHORS, CLASSES)),
    ):
        loss = build_loss(spec)
        low, full = (
            forward_backward(loss, _logits(device, *sizes, dtype=dtype), target)
            for dtype in (torch.bfloat16, torch.float32)
        )
        yield Race(f"{spec}, bfloat16 {sizes}", "float32", low, full, 1.1)


@row("compiled")
def compiled(device: torch.device) -> Rows:
    """The losses under ``torch.compile``, where there is a compiler."""
    if not can_compile(device):
        return
    masks = _labels(device, 2, 8, 1, 512, 512).float()
    for spec, x, y in (
        ("focal(reduction='sum')", _logits(device, ANCHORS, CLASSES), _anchor_labels(device)),
        ("ce + dice", _logits(device, 4, 21, 384, 384), _labels(device, 21, 4, 384, 384)),
        ("bce(mode='binary') + dice", _logits(device, 8, 1, 512, 512), masks),
    ):
        loss = build_loss(spec)
        fast = torch.compile(loss, fullgraph=True)
        step, eager = forward_backward(fast, x, y), forward_backward(loss, x, y)
        yield Race(f"{spec}, compiled, {tuple(x.shape)}", "not compiled", step, eager, 1.1)


@row("growth")
def growth(device: torch.device) -> Rows:
    """A hundred times the elements."""
    for spec, classes in (("ce + dice", 20), ("focal(mode='multilabel')", 20)):
        loss = build_loss(spec, "segmentation")

        def step(pixels: int, classes: int = classes, loss: Any = loss, spec: str = spec) -> Work:
            x, y = _logits(device, 1, classes, pixels), _labels(device, classes, 1, pixels)
            if "multilabel" in spec:
                y = (x.detach() > 0).byte()
            return forward_backward(loss, x, y)

        large, small = step(10**8 // classes), step(10**6 // classes)
        yield Race(f"{spec}, 1e8 elements", "1e6 elements", large, small, 130)


@row("kept")
def kept(device: torch.device) -> Rows:
    """What every loss that reads logits keeps for its backward pass."""
    for name, cls in LOSSES.items():
        if "segmentation" not in cls.kinds:
            continue
        options = {"mode": "multiclass"} if "classification" in cls.kinds else {}
        limit = 1.0 if hasattr(cls, "needs") else None  # which losses on the engines have
        for classes in (21, 2):
            x, y = _logits(device, 2, classes, 128, 128), _labels(device, classes, 2, 128, 128)
            loss = cls(**options)
            # Rounded, for there are a few sums as well.
            ratio = round(kept_bytes(partial(loss, x, y), [x, y]) / x.nbytes, 2)
            yield Size(f"kept for backward / logits, {name}, {classes} classes", "", ratio, limit)


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
    "focal": ("torchvision", lambda: _mean_of(torchvision.ops.sigmoid_focal_loss)),
    "giou": ("torchvision", lambda: _mean_of(torchvision.ops.generalized_box_iou_loss)),
    "diou": ("torchvision", lambda: _mean_of(torchvision.ops.distance_box_iou_loss)),
    "ciou": ("torchvision", lambda: _mean_of(torchvision.ops.complete_box_iou_loss)),
    "l1": ("torch", lambda: F.l1_loss),
    "smooth_l1": ("torch", lambda: F.smooth_l1_loss),
    "mse": ("torch", lambda: F.mse_loss),
    "huber": ("torch", lambda: F.huber_loss),
}
"""By whom a single loss is compared, and the same loss there."""


def _mean_of(loss: Callable[..., Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return partial(loss, reduction="mean")


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
            x = _logits(device, *(shape or [100_000, 17]))
            y = torch.rand(x.shape[:-1], device=device) * (x.shape[-1] - 1)
        elif loss.kind in ("boxes", "deltas"):
            sizes = [shape[0] if shape else 100_000, 4]
            x, y = _logits(device, *sizes), _logits(device, *sizes).detach().flip(0)
            if loss.kind == "boxes":
                x, y = (
                    torch.cat((b[:, :2], b[:, :2] + b[:, 2:].abs() + 1), 1).detach() for b in (x, y)
                )
                x.requires_grad_()
        elif loss.kind == "classification":
            x = _logits(device, *(shape or [50_000, 80]))
            y = (x.detach() > 4).float()
        else:
            x = _logits(device, *(shape or [4, 21, 256, 256]))
            y = _labels(device, x.shape[1], x.shape[0], *x.shape[2:])
        ours = forward_backward(loss, x, y)
        try:
            ours()
        except ValueError as error:
            raise UsageError(f"--loss {spec} --shape {list(x.shape)}: {error}") from error
        work = f"{loss!r}, {tuple(x.shape)}"
        yield Race(work, "a copy of the prediction", ours, x.detach().clone)
        if repr(loss) in PEERS:
            library, make = PEERS[repr(loss)]
            yield Race(work, library, ours, forward_backward(make(), x, y))
        yield Size(
            f"kept for backward / prediction, {work}",
            "",
            kept_bytes(partial(loss, x, y), [x, y]) / x.nbytes,
        )

    return rows
