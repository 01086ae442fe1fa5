"""Value and gradient of the IoU, GIoU, DIoU and CIoU losses from few operations.

The formulas are those of :mod:`detseg_losses.boxes`, differentiated by hand. One operation serves
as many numbers as it can: tensors are ``(interval, axis, N)``, where the intervals of an axis are,
in this order, the overlap, box 1, box 2 and the hull.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .base import has_graph

Kind = Literal["iou", "giou", "diou", "ciou"]
Slopes = tuple[Tensor | None, Tensor | None]

BLOCK = 1 << 13
"""Boxes that the CPU computes at once, so that their temporaries stay in the caches."""


def wide(boxes: Tensor) -> torch.dtype:
    """The dtype to compute in: float64, in which no product of float32 lengths over- or
    underflows, or that of the boxes where the device has no float64.
    """
    return boxes.dtype if boxes.device.type in ("mps", "xpu") else torch.float64


def least(dtype: torch.dtype) -> float:
    """The least denominator: what is below counts as 0, for its reciprocal may overflow."""
    return torch.finfo(dtype).tiny / torch.finfo(dtype).eps


def steepest(dtype: torch.dtype) -> float:
    """The bound of a coordinate's slope. It is reached by boxes of some 1e-31, and leaves room for
    the scale of a loss.
    """
    return torch.finfo(dtype).max * torch.finfo(dtype).eps


def traced() -> bool:
    """Whether something else than autograd's backward differentiates, maps or compiles what is
    computed: ``torch.compile``, ``torch.func``, forward-mode differentiation. It needs a formula.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


def box_losses(
    kind: Kind,
    boxes1: Tensor,
    boxes2: Tensor,
    eps: float,
    formula: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """The losses ``(*)`` of boxes ``(*, 4)`` of one floating dtype, which is theirs too.

    Args:
        kind: which loss.
        boxes1: predicted boxes, XYXY.
        boxes2: target boxes, XYXY.
        eps: added to the denominators.
        formula: the same loss in differentiable operations, for gradients of gradients.
    """
    if has_graph(boxes1) or has_graph(boxes2):
        return _BoxLosses.apply(boxes1, boxes2, kind, eps, formula)
    return _in_blocks(kind, boxes1, boxes2, eps, (False, False))[0]


class _BoxLosses(torch.autograd.Function):
    """Losses whose gradient is computed along with them."""

    @staticmethod
    def forward(
        ctx: Any, boxes1: Tensor, boxes2: Tensor, kind: Kind, eps: float, formula: Any
    ) -> Tensor:
        losses, slopes = _in_blocks(kind, boxes1, boxes2, eps, ctx.needs_input_grad[:2])
        ctx.save_for_backward(boxes1, boxes2, *slopes)
        ctx.formula = formula
        return losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        boxes1, boxes2, *slopes = ctx.saved_tensors
        if not torch.is_grad_enabled():
            grad = grad.unsqueeze(-1)
            return *(None if slope is None else grad * slope for slope in slopes), None, None, None
        # Someone wants the graph of the gradient. As views the boxes do not depend on each other.
        boxes = boxes1.view_as(boxes1), boxes2.view_as(boxes2)
        wanted = [box for box, slope in zip(boxes, slopes, strict=True) if slope is not None]
        found = iter(torch.autograd.grad(ctx.formula(*boxes), wanted, grad, create_graph=True))
        return *(None if slope is None else next(found) for slope in slopes), None, None, None


def _in_blocks(
    kind: Kind, boxes1: Tensor, boxes2: Tensor, eps: float, wanted: tuple[bool, bool]
) -> tuple[Tensor, Slopes]:
    """The losses ``(*)`` and, where wanted, their slopes ``(*, 4)`` with respect to either box."""
    one, other = boxes1.reshape(-1, 4), boxes2.reshape(-1, 4)
    size = BLOCK if one.device.type == "cpu" else max(len(one), 1)
    parts = zip(one.split(size), other.split(size), strict=True)
    found = [_evaluate(kind, *part, eps, wanted) for part in parts]
    losses, *slopes = (
        None if blocks[0] is None else blocks[0] if len(blocks) == 1 else torch.cat(blocks)
        for blocks in zip(*found, strict=True)
    )
    slope1, slope2 = (slope if slope is None else slope.view(boxes1.shape) for slope in slopes)
    return losses.view(boxes1.shape[:-1]), (slope1, slope2)


def _evaluate(
    kind: Kind, boxes1: Tensor, boxes2: Tensor, eps: float, wanted: tuple[bool, bool]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The losses ``(N,)`` and slopes ``(N, 4)`` of boxes ``(N, 4)``."""
    pairs = _Pairs(boxes1, boxes2)
    sides = pairs.lengths.clamp(min=0)
    width, height = sides.unbind(1)

    # All denominators: the union; for CIoU the squared diagonals of the boxes; that of the hull.
    overlap, area1, area2 = width[:3] * height[:3]
    below = pairs.empty({"iou": 1, "giou": 2, "diou": 2, "ciou": 4}[kind])
    torch.add(area1, area2, out=below[0]).sub_(overlap)
    if kind == "giou":
        torch.mul(width[3], height[3], out=below[1])
        above = below[1] - below[0]
    elif kind != "iou":
        torch.sum(sides[1 - len(below) :].square(), 1, out=below[1:])
        offset = pairs.offset()
        above = offset.square().sum(0).mul_(0.25)
    none = below < least(below.dtype)
    if eps:
        below[:: max(len(below) - 1, 1)].add_(eps)
    inverse = below.reciprocal_().masked_fill_(none, 0)

    iou = overlap * inverse[0]
    same = (sides[0] == sides[3]).all(0).logical_and_(none[0])
    loss = 1 - (iou + same)
    if kind == "ciou":
        angle1, angle2 = torch.atan2(width[1:3], height[1:3]).masked_fill_(none[1:3], math.pi / 4)
        turn = angle1 - angle2
        v = turn.square().mul_(4 / math.pi**2)
        alpha = v / (loss + v).add_(eps or torch.finfo(v.dtype).tiny)
        loss.addcmul_(alpha, v)
    if kind != "iou":
        ratio = above.mul_(inverse[-1])
        loss += ratio
    losses = loss.to(boxes1.dtype)
    if not any(wanted):
        return losses, None, None

    # Slopes by the areas, and by the sides that they are made of.
    areas = pairs.empty(4 if kind == "giou" else 3)
    torch.mul(iou, inverse[0], out=areas[1])
    if kind == "giou":
        areas[1].sub_(inverse[1])
        torch.addcmul(inverse[1], inverse[1], ratio, value=-1, out=areas[3])
    torch.add(areas[1], inverse[0], out=areas[0]).neg_()
    areas[2].copy_(areas[1])
    slopes = pairs.empty(4, 2)
    torch.mul(areas, height[: len(areas)], out=slopes[: len(areas), 0])
    torch.mul(areas, width[: len(areas)], out=slopes[: len(areas), 1])
    centre = None
    if kind in ("diou", "ciou"):
        torch.mul(sides[3], (ratio * inverse[-1]).mul_(-2), out=slopes[3])
        centre = offset * inverse[-1]
    elif kind == "iou":
        slopes[3].zero_()
    if kind == "ciou":
        torque = alpha.mul_(turn).mul_(8 / math.pi**2)
        for box, sign in ((1, 1), (2, -1)):
            if wanted[box - 1]:
                pull = torque * inverse[box]
                slopes[box, 0].addcmul_(pull, height[box], value=sign)
                slopes[box, 1].addcmul_(pull, width[box], value=-sign)
    return losses, *pairs.by_corners(slopes, centre, wanted)


class _Pairs:
    """The intervals of pairs of boxes, and the way from their slopes back to the corners."""

    def __init__(self, boxes1: Tensor, boxes2: Tensor) -> None:
        self.dtype, count = boxes1.dtype, len(boxes1)
        self.boxes = boxes1.new_empty((2, 4, count), dtype=wide(boxes1))
        self.boxes[0].copy_(boxes1.T)
        self.boxes[1].copy_(boxes2.T)
        low, high = self.boxes.view(2, 2, 2, count).unbind(1)
        self.ends = self.empty(2, 2, 2)  # of the boxes put in order, around which the hull is
        torch.minimum(low, high, out=self.ends[0])
        torch.maximum(low, high, out=self.ends[1])
        self.lengths = self.empty(4, 2)  # negative where there is no overlap, or a box is inverted
        torch.sub(high.amin(0), low.amax(0), out=self.lengths[0])
        torch.sub(high, low, out=self.lengths[1:3])
        torch.sub(self.ends[1].amax(0), self.ends[0].amin(0), out=self.lengths[3])

    def empty(self, *shape: int) -> Tensor:
        return self.boxes.new_empty((*shape, self.boxes.shape[-1]))

    def offset(self) -> Tensor:
        """From centre 2 to centre 1, twice."""
        return (self.boxes[0] - self.boxes[1]).view(2, 2, -1).sum(0)

    def by_corners(
        self, slopes: Tensor, centre: Tensor | None, wanted: tuple[bool, bool]
    ) -> list[Tensor | None]:
        """Slopes of boxes ``(N, 4)`` from those of the sides and of the offset.

        A corner rules the overlap where it is the inner one, the hull where it is the outer one,
        and half of each where two are equal.
        """
        slopes = torch.ops.aten.threshold_backward(
            slopes, self.lengths, -torch.finfo(slopes.dtype).tiny
        )
        overlap, hull = slopes[0], slopes[3]
        beyond = torch.sub(self.ends[:, 1], self.ends[:, 0]).sign_()  # of box 2
        aside, inside = beyond[0] + beyond[1], beyond[0] - beyond[1]
        move = (overlap - hull).mul_(aside).mul_(0.25)
        if centre is not None:
            move.add_(centre, alpha=0.5)
        limit = steepest(self.dtype)
        found: list[Tensor | None] = [None, None]
        for box, sign in ((0, 1), (1, -1)):
            if not wanted[box]:
                continue
            outward = self.lengths[1 + box].sign().mul_(hull)
            grow = torch.add(slopes[1 + box], overlap + outward, alpha=0.5)
            grow.addcmul_(inside, overlap - outward, value=-0.25 * sign)
            corners = self.empty(2, 2)
            torch.add(grow, move, alpha=-sign, out=corners[0]).neg_()
            torch.add(grow, move, alpha=sign, out=corners[1])
            corners.clamp_(-limit, limit)
            found[box] = corners.new_empty((corners.shape[-1], 4), dtype=self.dtype)
            found[box].T.copy_(corners.view(4, -1))
        return found
