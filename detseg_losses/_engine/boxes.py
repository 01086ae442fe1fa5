"""Value and gradient of the IoU, GIoU, DIoU and CIoU losses from few operations.

The formulas are those of :mod:`detseg_losses.losses.boxes`, differentiated by hand. One operation
serves as many numbers as it can: tensors are ``(interval, axis, N)``, where the intervals of an
axis are, in this order, the overlap, box 1, box 2 and the hull.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from detseg_losses._core.blocks import has_graph

Kind = Literal["iou", "giou", "diou", "ciou"]
Formula = Callable[[Tensor, Tensor], Tensor]

BLOCK = 1 << 15
"""Boxes that the CPU computes at once, at least: of fewer numbers PyTorch gives none to a second
thread, while the temporaries of many more leave the caches. Of 100,000 boxes a tenth to a fifth of
the time is saved against one block.
"""


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


def box_losses(
    kind: Kind,
    boxes1: Tensor,
    boxes2: Tensor,
    eps: float,
    formula: Formula,
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
        ctx: Any, boxes1: Tensor, boxes2: Tensor, kind: Kind, eps: float, formula: Formula
    ) -> Tensor:
        ctx.wanted, ctx.formula = ctx.needs_input_grad[:2], formula
        losses, *slopes = _in_blocks(kind, boxes1, boxes2, eps, ctx.wanted)
        ctx.save_for_backward(boxes1, boxes2, *slopes)
        return losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        boxes1, boxes2, *slopes = ctx.saved_tensors
        if torch.is_grad_enabled():
            # Someone wants the gradient's own graph. Views keep apart boxes that depend on others.
            boxes = boxes1.view_as(boxes1), boxes2.view_as(boxes2)
            wanted = [box for box, want in zip(boxes, ctx.wanted, strict=True) if want]
            found = iter(torch.autograd.grad(ctx.formula(*boxes), wanted, grad, create_graph=True))
        else:
            found = iter([grad.unsqueeze(-1) * slope for slope in slopes])
        return *(next(found) if want else None for want in ctx.wanted), None, None, None


def _in_blocks(
    kind: Kind, boxes1: Tensor, boxes2: Tensor, eps: float, wanted: tuple[bool, bool]
) -> list[Tensor]:
    """The losses ``(*)``, and the slopes ``(*, 4)`` by the boxes of which they are wanted."""
    one, other = boxes1.reshape(-1, 4), boxes2.reshape(-1, 4)
    count = len(one) // BLOCK if one.device.type == "cpu" else 1
    if count <= 1:
        found = _evaluate(kind, one, other, eps, wanted)
    else:
        parts = zip(one.chunk(count), other.chunk(count), strict=True)
        blocks = [_evaluate(kind, *part, eps, wanted) for part in parts]
        found = [torch.cat(values) for values in zip(*blocks, strict=True)]
    losses, *slopes = found
    return [losses.view(boxes1.shape[:-1]), *(slope.view(boxes1.shape) for slope in slopes)]


def _evaluate(
    kind: Kind, boxes1: Tensor, boxes2: Tensor, eps: float, wanted: tuple[bool, bool]
) -> list[Tensor]:
    """The same of boxes ``(N, 4)``, all at once."""
    intervals = _Intervals(boxes1, boxes2)
    sides = intervals.lengths.clamp(min=0)
    width, height = sides.unbind(1)
    areas = width * height
    overlap, area1, area2, hull = areas.unbind()

    # All denominators: the union; for CIoU the squared diagonals of the boxes; that of the hull.
    union = area2.add_(area1).sub_(overlap)
    below = areas[2:] if kind == "giou" else areas[2:3]
    if kind == "giou":
        above = hull - union
    elif kind != "iou":
        offset = intervals.offset()
        above = offset.square().sum(0).mul_(0.25)
        squares = sides[1 if kind == "ciou" else 3 :].square().sum(1)
        below = torch.cat((below, squares))
    none = below < least(below.dtype)
    if eps:
        below[:: max(len(below) - 1, 1)].add_(eps)
    inverse = below.reciprocal_().masked_fill_(none, 0)
    of_union, of_hull = inverse[0], inverse[-1]

    ratio = overlap * of_union
    loss = 1 - torch.where(none[0], (sides[0] == sides[3]).all(0), ratio)
    if kind == "ciou":
        angle1, angle2 = torch.atan2(width[1:3], height[1:3]).masked_fill_(none[1:3], math.pi / 4)
        turn = angle1 - angle2
        v = turn.square().mul_(4 / math.pi**2)
        alpha = v / (loss + v).add_(eps or torch.finfo(v.dtype).tiny)
        loss.addcmul_(alpha, v)
    if kind != "iou":
        penalty = above.mul_(of_hull)
        loss += penalty
    losses = loss.to(boxes1.dtype)
    if not any(wanted):
        return [losses]

    # Slopes by the areas, and by the sides that they are made of.
    of_area = ratio.mul_(of_union)
    of_measure = torch.zeros_like(of_area) if kind == "iou" else of_hull * penalty
    if kind == "giou":
        of_area.sub_(of_hull)
        of_measure = of_hull - of_measure
    of_areas = torch.stack(((of_area + of_union).neg_(), of_area, of_area, of_measure))
    slopes = torch.empty_like(sides)
    torch.mul(of_areas, height, out=slopes[:, 0])
    torch.mul(of_areas, width, out=slopes[:, 1])
    if kind in ("diou", "ciou"):
        torch.mul(sides[3], of_measure.mul_(-2), out=slopes[3])
    if kind == "ciou":
        torque = alpha.mul_(turn).mul_(8 / math.pi**2)
        for box, sign in ((1, 1), (2, -1)):
            if wanted[box - 1]:
                pull = torque * inverse[box]
                slopes[box, 0].addcmul_(pull, height[box], value=sign)
                slopes[box, 1].addcmul_(pull, width[box], value=-sign)
    pull = offset.mul_(of_hull) if kind in ("diou", "ciou") else None
    return [losses, *intervals.by_corners(slopes, pull, wanted)]


class _Intervals:
    """The intervals of pairs of boxes, and the way from their slopes back to the corners.

    ``bounds`` holds their lower and upper bounds; where a box is inverted its ``ends`` are in
    order. A length is negative where there is no overlap, or a box is inverted.
    """

    def __init__(self, boxes1: Tensor, boxes2: Tensor) -> None:
        self.dtype, count = boxes1.dtype, len(boxes1)
        self.bounds = boxes1.new_empty((2, 4, 2, count), dtype=wide(boxes1))
        boxes = torch.stack((boxes1, boxes2)).view(2, count, 2, 2)  # (box, N, bound, axis)
        self.boxes = self.bounds[:, 1:3].copy_(boxes.permute(2, 0, 3, 1))
        low, high = self.boxes.unbind()
        self.ends = torch.empty_like(self.boxes)
        first, last = self.ends.unbind()
        torch.minimum(low, high, out=first)
        torch.maximum(low, high, out=last)
        torch.amax(low, 0, out=self.bounds[0, 0])
        torch.amin(high, 0, out=self.bounds[1, 0])
        torch.amin(first, 0, out=self.bounds[0, 3])
        torch.amax(last, 0, out=self.bounds[1, 3])
        self.lengths = self.bounds[1] - self.bounds[0]

    def offset(self) -> Tensor:
        """From centre 2 to centre 1, twice."""
        return (self.boxes[:, 0] - self.boxes[:, 1]).sum(0)

    def by_corners(
        self, slopes: Tensor, pull: Tensor | None, wanted: tuple[bool, bool]
    ) -> list[Tensor]:
        """Slopes of boxes ``(N, 4)`` from those by the lengths and, twice, by the offset.

        A corner rules the overlap where it is the inner one of two and the hull where it is the
        outer one; where both are equal each rules half.
        """
        slopes.masked_fill_(self.lengths < 0, 0)
        overlap, *of_boxes, hull = slopes.unbind()
        below, above = self.ends[:, 1].sub_(self.ends[:, 0]).sign_()  # of box 2, from box 1
        move = (overlap - hull).mul_(below + above).mul_(0.25)
        if pull is not None:
            move.add_(pull, alpha=0.5)
        inside = below - above
        limit = steepest(self.dtype)
        found = []
        for box, of_box in enumerate(of_boxes):
            if wanted[box]:
                if box == 1:  # which sees the other one on the other side
                    move, inside = -move, -inside
                outward = self.lengths[1 + box].sign().mul_(hull)
                grow = torch.add(of_box, overlap + outward, alpha=0.5)
                grow.addcmul_(inside, overlap - outward, value=-0.25)
                corners = self.bounds.new_empty((2, *grow.shape))
                torch.sub(move, grow, out=corners[0])
                torch.add(move, grow, out=corners[1])
                planes = corners.clamp_(-limit, limit).view(4, -1)
                found.append(planes.T.to(self.dtype, memory_format=torch.contiguous_format))
        return found
