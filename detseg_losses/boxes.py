"""Losses of boxes: the IoU family, scale-free and finite for every box.

Boxes are XYXY, in any unit. Areas and lengths are clamped at zero, so that an inverted box is an
empty one; ratios of zeros are defined, so that no ``eps`` is needed and
``L(s * a, s * b) == L(a, b)`` for boxes of any size.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from .base import Loss, check_choice, compute_dtype, divide, reduce, register

IoUMode = Literal["linear", "log", "square"]


def iou_loss(
    boxes1: Tensor,
    boxes2: Tensor,
    reduction: str = "none",
    eps: float = 0.0,
    *,
    mode: IoUMode = "linear",
    validate: bool = False,
) -> Tensor:
    r"""Loss of the intersection over union (Yu et al., arXiv:1608.01471).

    .. math:: 1 - IoU, \quad -\log IoU \quad \text{or} \quad 1 - IoU^2

    Disjoint boxes have no gradient: prefer GIoU, DIoU or CIoU where they are common. The
    logarithm is bounded: it is taken of an IoU of at least 1e-6.

    Args:
        boxes1: predicted boxes, XYXY, ``(*, 4)``.
        boxes2: target boxes, XYXY, ``(*, 4)``.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.
        eps: added to denominators, as torchvision does; 0 keeps the loss free of scale.
        mode: ``"linear"``, ``"log"`` or ``"square"``.
        validate: raise on inverted or non-finite boxes, which makes the device wait.

    Returns:
        Losses ``(*)`` or their reduction, float32 or wider; at least the loss of disjoint boxes
        where ``boxes1`` is inverted.

    Raises:
        ValueError: on shapes that differ or do not end in 4.
    """
    check_choice("mode", mode, IoUMode)
    pair = _Pair(boxes1, boxes2, eps, validate)
    if mode == "log":
        return reduce(-pair.iou.clamp(min=1e-6).log(), reduction)
    return reduce(1 - (pair.iou if mode == "linear" else pair.iou.square()), reduction)


def generalized_box_iou_loss(
    boxes1: Tensor,
    boxes2: Tensor,
    reduction: str = "none",
    eps: float = 0.0,
    *,
    validate: bool = False,
) -> Tensor:
    r"""Generalised IoU (Rezatofighi et al., arXiv:1902.09630), between 0 and 2.

    .. math:: 1 - IoU + \frac{|C| - |A \cup B|}{|C|}

    with C the smallest box around both.

    Args:
        boxes1: predicted boxes, XYXY, ``(*, 4)``.
        boxes2: target boxes, XYXY, ``(*, 4)``.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.
        eps: added to denominators, as torchvision does; 0 keeps the loss free of scale.
        validate: raise on inverted or non-finite boxes, which makes the device wait.

    Returns:
        Losses ``(*)`` or their reduction, float32 or wider; at least 1 where ``boxes1`` is
        inverted.

    Raises:
        ValueError: on shapes that differ or do not end in 4.
    """
    pair = _Pair(boxes1, boxes2, eps, validate)
    width, height = pair.enclosing
    area = width * height
    return reduce(1 - pair.iou + divide(area - pair.union, area + pair.eps), reduction)


def distance_box_iou_loss(
    boxes1: Tensor,
    boxes2: Tensor,
    reduction: str = "none",
    eps: float = 0.0,
    *,
    validate: bool = False,
) -> Tensor:
    r"""Distance IoU (Zheng et al., arXiv:1911.08287), between 0 and 2.

    .. math:: 1 - IoU + \rho^2 / c^2

    with :math:`\rho` the distance of the centres and c the diagonal of the smallest box around
    both.

    Args:
        boxes1: predicted boxes, XYXY, ``(*, 4)``.
        boxes2: target boxes, XYXY, ``(*, 4)``.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.
        eps: added to denominators, as torchvision does; 0 keeps the loss free of scale.
        validate: raise on inverted or non-finite boxes, which makes the device wait.

    Returns:
        Losses ``(*)`` or their reduction, float32 or wider; at least 1 where ``boxes1`` is
        inverted.

    Raises:
        ValueError: on shapes that differ or do not end in 4.
    """
    pair = _Pair(boxes1, boxes2, eps, validate)
    return reduce(1 - pair.iou + pair.distance(), reduction)


def complete_box_iou_loss(
    boxes1: Tensor,
    boxes2: Tensor,
    reduction: str = "none",
    eps: float = 0.0,
    *,
    validate: bool = False,
) -> Tensor:
    r"""Complete IoU (Zheng et al., arXiv:1911.08287).

    .. math:: 1 - IoU + \rho^2 / c^2 + \alpha v, \quad
        v = \tfrac{4}{\pi^2} (\arctan \tfrac{w'}{h'} - \arctan \tfrac{w}{h})^2, \quad
        \alpha = \tfrac{v}{1 - IoU + v}

    with :math:`\rho` the distance of the centres, c the diagonal of the smallest box around both,
    and :math:`\alpha` a constant for the gradient.

    Args:
        boxes1: predicted boxes, XYXY, ``(*, 4)``.
        boxes2: target boxes, XYXY, ``(*, 4)``.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.
        eps: added to denominators, as torchvision does; 0 keeps the loss free of scale.
        validate: raise on inverted or non-finite boxes, which makes the device wait.

    Returns:
        Losses ``(*)`` or their reduction, float32 or wider; at least 1 where ``boxes1`` is
        inverted.

    Raises:
        ValueError: on shapes that differ or do not end in 4.
    """
    pair = _Pair(boxes1, boxes2, eps, validate)
    v = (4 / math.pi**2) * (_angle(pair.size2) - _angle(pair.size1)).square()
    alpha = divide(v, 1 - pair.iou + v + eps).detach()
    return reduce(1 - pair.iou + pair.distance() + alpha * v, reduction)


class _Pair:
    """What the family knows of two boxes, each ``(*)``.

    Lengths are in units of the box around both, so that no square of them over- or underflows.
    """

    def __init__(self, boxes1: Tensor, boxes2: Tensor, eps: float, validate: bool) -> None:
        if boxes1.shape != boxes2.shape or boxes1.shape[-1:] != (4,):
            raise ValueError(
                f"boxes must have one shape (*, 4): {tuple(boxes1.shape)}, {tuple(boxes2.shape)}"
            )
        self.boxes1 = boxes1.to(compute_dtype(boxes1.dtype))
        self.boxes2 = boxes2.to(self.boxes1.dtype)
        if validate:
            _check_boxes("boxes1", self.boxes1)
            _check_boxes("boxes2", self.boxes2)
        (ax1, ay1), (ax2, ay2) = self.boxes1[..., :2].unbind(-1), self.boxes1[..., 2:].unbind(-1)
        (bx1, by1), (bx2, by2) = self.boxes2[..., :2].unbind(-1), self.boxes2[..., 2:].unbind(-1)
        width = torch.max(ax2, bx2) - torch.min(ax1, bx1)
        height = torch.max(ay2, by2) - torch.min(ay1, by1)
        unit = torch.max(width, height).detach()
        unit = torch.where(unit > 0, unit, 1)

        def length(difference: Tensor) -> Tensor:
            return difference.clamp(min=0) / unit

        self.eps = eps / unit / unit
        self.size1 = length(ax2 - ax1), length(ay2 - ay1)
        self.size2 = length(bx2 - bx1), length(by2 - by1)
        self.enclosing = length(width), length(height)
        self.offset = (ax1 + ax2 - bx1 - bx2) / unit / 2, (ay1 + ay2 - by1 - by2) / unit / 2
        overlap = length(torch.min(ax2, bx2) - torch.max(ax1, bx1))
        intersection = overlap * length(torch.min(ay2, by2) - torch.max(ay1, by1))
        area1, area2 = self.size1[0] * self.size1[1], self.size2[0] * self.size2[1]
        self.union = area1 + area2 - intersection
        # Two boxes without an area are one box or none, and the ratio cannot tell.
        same = (self.boxes1 == self.boxes2).all(-1) & (ax2 >= ax1) & (ay2 >= ay1)
        iou = divide(intersection, self.union + self.eps)
        self.iou = torch.where((self.union == 0) & same, 1, iou)

    def distance(self) -> Tensor:
        """Squared distance of the centres over the squared diagonal around both boxes."""
        (dx, dy), (width, height) = self.offset, self.enclosing
        return divide(dx.square() + dy.square(), width.square() + height.square() + self.eps)


def _angle(size: tuple[Tensor, Tensor]) -> Tensor:
    """``arctan(w / h)``, with a finite gradient also where both are 0."""
    width, height = size
    point = (width == 0) & (height == 0)
    return torch.where(point, math.pi / 4, torch.atan2(width, torch.where(point, 1, height)))


def _check_boxes(name: str, boxes: Tensor) -> None:
    bad = ~(boxes[..., 2:] >= boxes[..., :2]).all(-1) | ~boxes.isfinite().all(-1)
    if bad.any():
        index = tuple(bad.nonzero()[0].tolist())
        raise ValueError(
            f"{name}[{', '.join(map(str, index))}] = {boxes[index].tolist()} is inverted or not "
            "finite; boxes are (x1, y1, x2, y2): convert from xywh with torchvision.ops.box_convert"
        )


@register("iou", "boxes")
class IoULoss(Loss):
    """Module form of :func:`iou_loss`."""

    function = staticmethod(iou_loss)


@register("giou", "boxes")
class GIoULoss(Loss):
    """Module form of :func:`generalized_box_iou_loss`."""

    function = staticmethod(generalized_box_iou_loss)


@register("diou", "boxes")
class DIoULoss(Loss):
    """Module form of :func:`distance_box_iou_loss`."""

    function = staticmethod(distance_box_iou_loss)


@register("ciou", "boxes")
class CIoULoss(Loss):
    """Module form of :func:`complete_box_iou_loss`."""

    function = staticmethod(complete_box_iou_loss)
