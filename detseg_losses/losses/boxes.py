"""Losses of boxes: the IoU family, scale-free and finite for every box.

Boxes are XYXY, in any unit. Areas and lengths are clamped at zero, so that an inverted box is an
empty one; ratios of zeros are defined, so that no ``eps`` is needed and
``L(s * a, s * b) == L(a, b)`` for boxes of any size. A perfect prediction costs 0, an inverted one
at least 1. Losses for which any of this cannot hold say so.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor
from typing_extensions import Unpack

from detseg_losses._core.blocks import compute_dtype, followed
from detseg_losses._core.checks import POSITIVE, Choice, check_tensors, checked
from detseg_losses._core.module import Loss, options_of, register
from detseg_losses._core.reduction import reduce
from detseg_losses._engine.boxes import Kind, box_losses, least, steepest, wide

IoUMode = Literal["linear", "log", "square"]


class BoxOptions(TypedDict, total=False):
    """Options of every box loss.

    Attributes:
        reduction: ``"none"`` for losses ``(*)``, ``"mean"`` or ``"sum"``; float32 or wider.
        validate: raise on inverted or non-finite boxes, which makes the device wait.
    """

    reduction: str
    validate: bool


@checked(mode=Choice(IoUMode))
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
        reduction: ``"none"`` for losses ``(*)``, ``"mean"`` or ``"sum"``; float32 or wider.
        eps: added to denominators, as torchvision does; 0 keeps the loss free of scale.
        mode: ``"linear"``, ``"log"`` or ``"square"``.
        validate: raise on inverted or non-finite boxes, which makes the device wait.

    Raises:
        ValueError: on shapes that differ or do not end in 4.

    Examples:
        >>> boxes = torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30]])  # predicted
        >>> targets = torch.tensor([[0.0, 0, 10, 5], [0, 0, 10, 10]])  # half a box, and none near
        >>> iou_loss(boxes, targets)
        tensor([0.5000, 1.0000])
        >>> iou_loss(boxes, targets, mode="log", reduction="mean")
        tensor(7.2543)
    """
    if mode == "linear":
        return _kernel_loss("iou", boxes1, boxes2, eps, reduction, validate)
    pair = _Pair(boxes1, boxes2, eps, reduction=reduction, validate=validate)
    return pair.reduce(-pair.iou.clamp(min=1e-6).log() if mode == "log" else 1 - pair.iou.square())


@checked()
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
        reduction: ``"none"`` for losses ``(*)``, ``"mean"`` or ``"sum"``; float32 or wider.
        eps: added to denominators, as torchvision does; 0 keeps the loss free of scale.
        validate: raise on inverted or non-finite boxes, which makes the device wait.

    Raises:
        ValueError: on shapes that differ or do not end in 4.

    Examples:
        >>> boxes = torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30]])  # predicted
        >>> targets = torch.tensor([[0.0, 0, 10, 5], [0, 0, 10, 10]])  # half a box, and none near
        >>> generalized_box_iou_loss(boxes, targets)
        tensor([0.5000, 1.7778])
        >>> generalized_box_iou_loss(boxes, targets, reduction="mean")
        tensor(1.1389)
    """
    return _kernel_loss("giou", boxes1, boxes2, eps, reduction, validate)


@checked()
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
        reduction: ``"none"`` for losses ``(*)``, ``"mean"`` or ``"sum"``; float32 or wider.
        eps: added to denominators, as torchvision does; 0 keeps the loss free of scale.
        validate: raise on inverted or non-finite boxes, which makes the device wait.

    Raises:
        ValueError: on shapes that differ or do not end in 4.

    Examples:
        >>> boxes = torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30]])  # predicted
        >>> targets = torch.tensor([[0.0, 0, 10, 5], [0, 0, 10, 10]])  # half a box, and none near
        >>> distance_box_iou_loss(boxes, targets)
        tensor([0.5312, 1.4444])
    """
    return _kernel_loss("diou", boxes1, boxes2, eps, reduction, validate)


@checked()
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
        reduction: ``"none"`` for losses ``(*)``, ``"mean"`` or ``"sum"``; float32 or wider.
        eps: added to denominators, as torchvision does; 0 keeps the loss free of scale.
        validate: raise on inverted or non-finite boxes, which makes the device wait.

    Raises:
        ValueError: on shapes that differ or do not end in 4.

    Examples:
        >>> boxes = torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30]])  # predicted
        >>> targets = torch.tensor([[0.0, 0, 10, 5], [0, 0, 10, 10]])  # half a box, and none near
        >>> complete_box_iou_loss(boxes, targets)
        tensor([0.5345, 1.4444])
    """
    return _kernel_loss("ciou", boxes1, boxes2, eps, reduction, validate)


@checked()
def eiou_loss(boxes1: Tensor, boxes2: Tensor, **options: Unpack[BoxOptions]) -> Tensor:
    r"""Efficient IoU (Zhang et al., arXiv:2101.08158), between 0 and 4.

    .. math:: 1 - IoU + \frac{\rho^2}{c^2} + \frac{(w - w')^2}{C_w^2} + \frac{(h - h')^2}{C_h^2}

    with :math:`\rho` the distance of the centres, and c, :math:`C_w` and :math:`C_h` diagonal,
    width and height of the smallest box around both. Where CIoU compares aspect ratios, it
    compares the sides themselves, so that also a box of the right shape and the wrong size is
    pulled straight to its target.

    Args:
        boxes1: predicted boxes, XYXY, ``(*, 4)``.
        boxes2: target boxes, XYXY, ``(*, 4)``.
        **options: see :class:`BoxOptions`.

    Raises:
        ValueError: on shapes that differ or do not end in 4.

    Examples:
        >>> boxes = torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30]])  # predicted
        >>> targets = torch.tensor([[0.0, 0, 10, 5], [0, 0, 10, 10]])  # half a box, and none near
        >>> eiou_loss(boxes, targets)
        tensor([0.7812, 1.4444])
    """
    pair = _Pair(boxes1, boxes2, 0, **options)
    return pair.reduce(pair.efficient())


@checked()
def focal_eiou_loss(
    boxes1: Tensor, boxes2: Tensor, *, gamma: float = 0.5, **options: Unpack[BoxOptions]
) -> Tensor:
    r"""EIoU that counts boxes by their overlap (Zhang et al., arXiv:2101.08158).

    .. math:: IoU^\gamma L_{EIoU}

    For noisy targets or many poor matches, which EIoU alone lets rule the gradient. The weight is
    a constant for the gradient: else it would push poor boxes away from their targets. By this
    formula disjoint and inverted boxes cost 0 and have no gradient: let it refine anchors that
    overlap their targets, or add another loss.

    Args:
        boxes1: predicted boxes, XYXY, ``(*, 4)``.
        boxes2: target boxes, XYXY, ``(*, 4)``.
        gamma: how little a small overlap counts; 0 is :func:`eiou_loss`.
        **options: see :class:`BoxOptions`.

    Raises:
        ValueError: on a negative or infinite gamma, or shapes that differ or do not end in 4.

    Examples:
        >>> boxes = torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30]])  # predicted
        >>> targets = torch.tensor([[0.0, 0, 10, 5], [0, 0, 10, 10]])  # half a box, and none near
        >>> focal_eiou_loss(boxes, targets)
        tensor([0.5524, 0.0000])
    """
    pair = _Pair(boxes1, boxes2, 0, **options)
    return pair.reduce(pair.iou.detach().pow(gamma) * pair.efficient())


@checked()
def siou_loss(
    boxes1: Tensor, boxes2: Tensor, *, theta: float = 4.0, **options: Unpack[BoxOptions]
) -> Tensor:
    r"""IoU with costs of angle, distance and shape (Gevorgyan, arXiv:2205.12740).

    .. math:: 1 - IoU + \tfrac12 (\Delta + \Omega), \quad
        \Delta = \sum_{t = x, y} 1 - e^{-(2 - \Lambda) (d_t / C_t)^2}, \quad
        \Omega = \sum_{s = w, h} (1 - e^{-|s - s'| / \max(s, s')})^\theta

    with :math:`d_x` and :math:`d_y` the offsets of the centres, :math:`C_x` and :math:`C_y` the
    sides of the smallest box around both, and
    :math:`\Lambda = \sin 2 \alpha = 2 |d_x d_y| / (d_x^2 + d_y^2)` of the angle
    :math:`\alpha` of the line between the centres. The distance weighs up to twice as much where
    the centres lie on one axis, so that the last, straight part of the way is quick. For boxes
    that start off their targets, as in detectors without anchors.

    Args:
        boxes1: predicted boxes, XYXY, ``(*, 4)``.
        boxes2: target boxes, XYXY, ``(*, 4)``.
        theta: exponent of the shape cost, in the paper between 2 and 6; a larger one cares less
            about shapes that are nearly right.
        **options: see :class:`BoxOptions`.

    Raises:
        ValueError: on a theta that is not positive and finite, or shapes that differ or do not end
            in 4.

    Examples:
        >>> boxes = torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30]])  # predicted
        >>> targets = torch.tensor([[0.0, 0, 10, 5], [0, 0, 10, 10]])  # half a box, and none near
        >>> siou_loss(boxes, targets)
        tensor([0.5707, 1.3588])
    """
    pair = _Pair(boxes1, boxes2, 0, **options)
    dx, dy = pair.offset
    # The smallest number bounds the slope of concentric boxes, whose angle is none.
    norm = dx.square() + dy.square() + torch.finfo(dx.dtype).tiny
    sharpness = 2 - 2 * (dx * dy).abs() / norm
    loss = 1 - pair.iou
    for offset, side, one, other in zip(
        pair.offset, pair.enclosing, pair.size1, pair.size2, strict=True
    ):
        distance = -torch.expm1(-sharpness * _ratio(offset, side).square())
        shape = -torch.expm1(-_ratio((one - other).abs(), torch.max(one, other)))
        loss = loss + (distance + _power(shape, theta)) / 2
    return pair.reduce(loss)


@checked()
def mpdiou_loss(
    boxes1: Tensor,
    boxes2: Tensor,
    *,
    diagonal: float | None = None,
    **options: Unpack[BoxOptions],
) -> Tensor:
    r"""IoU with the distances of two corners (Ma and Xu, arXiv:2307.07662).

    .. math:: 1 - IoU + \frac{d_1^2 + d_2^2}{c^2}

    with :math:`d_1` and :math:`d_2` the distances of the upper left and of the lower right
    corners. One term for place, size and shape together: it also tells concentric boxes of one
    shape apart.

    Args:
        boxes1: predicted boxes, XYXY, ``(*, 4)``.
        boxes2: target boxes, XYXY, ``(*, 4)``.
        diagonal: the length c. The paper takes the diagonal of the image, in the unit of the
            boxes, under which the distances of small objects hardly count. None: the diagonal of
            the smallest box around both, which keeps the loss free of scale, between 0 and 3.
        **options: see :class:`BoxOptions`.

    Raises:
        ValueError: on a diagonal that is not positive and finite, or shapes that differ or do not
            end in 4.

    Examples:
        >>> boxes = torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30]])  # predicted
        >>> targets = torch.tensor([[0.0, 0, 10, 5], [0, 0, 10, 10]])  # half a box, and none near
        >>> mpdiou_loss(boxes, targets)
        tensor([0.6250, 1.8889])
    """
    pair = _Pair(boxes1, boxes2, 0, **options)
    if diagonal is None:
        return pair.reduce(1 - pair.iou + _ratio(pair.corners(), pair.diagonal()))
    return pair.reduce(1 - pair.iou + pair.corners() / diagonal**2)


@checked(alpha=POSITIVE)
def wiou_loss(
    boxes1: Tensor,
    boxes2: Tensor,
    *,
    mean: Tensor | float | None = None,
    alpha: float = 1.9,
    delta: float = 3.0,
    **options: Unpack[BoxOptions],
) -> Tensor:
    r"""Wise IoU, version 1, and with a ``mean`` version 3 (Tong et al., arXiv:2301.10051).

    .. math:: L_1 = e^{\rho^2 / c^2} (1 - IoU), \quad
        L_3 = \frac{\beta}{\delta \alpha^{\beta - \delta}} L_1, \quad
        \beta = \frac{1 - IoU}{\overline{1 - IoU}}

    with :math:`\rho` the distance of the centres and c the diagonal of the smallest box around
    both. For data whose boxes are of mixed quality: nothing but overlap and distance is punished,
    and version 3 looks most at boxes of ordinary quality, less at those that are right already and
    at those that are far worse than the mean, whose labels may be wrong. By definition c and the
    whole factor of version 3 are constants for the gradient. Version 1 is between 0 and e; version
    3 costs an inverted box less than 1 where it holds it for an outlier.

    Args:
        boxes1: predicted boxes, XYXY, ``(*, 4)``.
        boxes2: target boxes, XYXY, ``(*, 4)``.
        mean: the running mean of ``1 - IoU`` over the training so far. It is the caller's, who
            knows which boxes count: it starts at 1, and each step does
            ``mean.lerp_(iou_loss(a, b, "mean").detach(), momentum)``. None: version 1.
        alpha: how fast the factor falls for outliers, at least 1; only with a mean.
        delta: the :math:`\beta` of which the factor is 1; only with a mean.
        **options: see :class:`BoxOptions`.

    Raises:
        ValueError: on an alpha, delta or mean that is not positive and finite, or shapes that
            differ or do not end in 4.

    Examples:
        >>> boxes = torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30]])  # predicted
        >>> targets = torch.tensor([[0.0, 0, 10, 5], [0, 0, 10, 10]])  # half a box, and none near
        >>> wiou_loss(boxes, targets)
        tensor([0.5159, 1.5596])
        >>> wiou_loss(boxes, targets, mean=0.2)  # the second is taken for an outlier
        tensor([0.5926, 0.7200])
    """
    pair = _Pair(boxes1, boxes2, 0, **options)
    dx, dy = pair.offset
    square = dx.square() + dy.square()
    loss = _ratio(square, pair.diagonal().detach()).exp() * (1 - pair.iou)
    if mean is not None:
        beta = (1 - pair.iou.detach()) / mean
        loss = beta / delta * alpha ** (delta - beta) * loss
    return pair.reduce(loss)


@checked(alpha=POSITIVE)
def alpha_iou_loss(
    boxes1: Tensor, boxes2: Tensor, *, alpha: float = 3.0, **options: Unpack[BoxOptions]
) -> Tensor:
    r"""A power of the IoU (He et al., arXiv:2110.13675), between 0 and 1.

    .. math:: 1 - IoU^\alpha

    For tight boxes: above 1 the gradient grows with the overlap, so that good boxes become better.
    Disjoint boxes have no gradient, as in :func:`iou_loss`.

    Args:
        boxes1: predicted boxes, XYXY, ``(*, 4)``.
        boxes2: target boxes, XYXY, ``(*, 4)``.
        alpha: the exponent; 1 and 2 are the linear and the square :func:`iou_loss`.
        **options: see :class:`BoxOptions`.

    Raises:
        ValueError: on an alpha that is not positive and finite, or shapes that differ or do not
            end in 4.

    Examples:
        >>> boxes = torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30]])  # predicted
        >>> targets = torch.tensor([[0.0, 0, 10, 5], [0, 0, 10, 10]])  # half a box, and none near
        >>> alpha_iou_loss(boxes, targets, alpha=3.0)
        tensor([0.8750, 1.0000])
    """
    pair = _Pair(boxes1, boxes2, 0, **options)
    return pair.reduce(1 - _power(pair.iou, alpha))


@checked()
def nwd_loss(
    boxes1: Tensor, boxes2: Tensor, *, constant: float = 12.8, **options: Unpack[BoxOptions]
) -> Tensor:
    r"""Normalised Wasserstein distance of boxes as Gaussians (Wang et al., arXiv:2110.13389).

    .. math:: 1 - e^{-W / C}, \quad W^2 = \left\| \left(x, y, \tfrac{w}{2}, \tfrac{h}{2}\right)
        - \left(x', y', \tfrac{w'}{2}, \tfrac{h'}{2}\right) \right\|^2

    with the centres (x, y) of the boxes. For objects of a few pixels, for which a shift by one
    pixel ends all overlap. Below 1, also for inverted boxes, whose negative sides count as they
    are. It is not free of scale: C and the boxes have one unit, and boxes that are many times C
    apart have no gradient.

    Args:
        boxes1: predicted boxes, XYXY, ``(*, 4)``.
        boxes2: target boxes, XYXY, ``(*, 4)``.
        constant: the length C, about the mean size of the objects; the default is that of the
            paper's aerial images, in pixels.
        **options: see :class:`BoxOptions`.

    Raises:
        ValueError: on a constant that is not positive and finite, or shapes that differ or do not
            end in 4.

    Examples:
        >>> boxes = torch.tensor([[0.0, 0, 4, 4], [4, 0, 8, 4]])  # objects of four pixels
        >>> targets = torch.tensor([[1.0, 0, 5, 4], [0, 0, 4, 4]])  # the second two do not overlap
        >>> nwd_loss(boxes, targets)
        tensor([0.0752, 0.2684])
    """
    pair = _Pair(boxes1, boxes2, 0, **options)
    square = pair.corners() / 2  # which is W^2, in other coordinates
    length = torch.where(square > 0, square, 1).sqrt() / constant
    return pair.reduce(torch.where(square > 0, -torch.expm1(-length), 0))


class _Pair:
    """What the family knows of two boxes, each ``(*)``, in the dtype of :func:`wide`."""

    def __init__(
        self,
        boxes1: Tensor,
        boxes2: Tensor,
        eps: float,
        *,
        reduction: str = "none",
        validate: bool = False,
    ) -> None:
        boxes1, boxes2 = _checked(boxes1, boxes2, validate)
        self.reduction = reduction
        self.dtype = boxes1.dtype
        self.eps = eps
        boxes1, boxes2 = _widened(boxes1), _widened(boxes2)
        low1, high1 = boxes1[..., :2], boxes1[..., 2:]
        low2, high2 = boxes2[..., :2], boxes2[..., 2:]
        # Around all corners, for those of an inverted box are in another order.
        end = torch.max(torch.max(low1, high1), torch.max(low2, high2))
        start = torch.min(torch.min(low1, high1), torch.min(low2, high2))
        hull, overlap = end - start, _lengths(torch.min(high1, high2) - torch.max(low1, low2))
        self.size1 = _lengths(high1 - low1).unbind(-1)
        self.size2 = _lengths(high2 - low2).unbind(-1)
        self.enclosing = hull.unbind(-1)
        self.shift = boxes1 - boxes2
        self.offset = ((self.shift[..., :2] + self.shift[..., 2:]) / 2).unbind(-1)
        intersection = _area(overlap.unbind(-1))
        self.union = _area(self.size1) + _area(self.size2) - intersection
        # Two boxes without an area are one box or none, and the ratio cannot tell.
        same = (overlap == hull).all(-1) & (self.union < least(self.union.dtype))
        self.iou = _ratio(intersection, self.union, eps) + same

    def diagonal(self) -> Tensor:
        """Squared diagonal of the smallest box around both."""
        width, height = self.enclosing
        return width.square() + height.square()

    def corners(self) -> Tensor:
        """Sum of the squared distances of the first corners and of the second corners."""
        return self.shift.square().sum(-1)

    def distance(self) -> Tensor:
        """Squared distance of the centres over the squared diagonal around both boxes."""
        dx, dy = self.offset
        return _ratio(dx.square() + dy.square(), self.diagonal(), self.eps)

    def generalised(self) -> Tensor:
        """The GIoU loss."""
        area = _area(self.enclosing)
        return 1 - self.iou + _ratio(area - self.union, area, self.eps)

    def complete(self) -> Tensor:
        """The CIoU loss."""
        v = (4 / math.pi**2) * (_angle(self.size1) - _angle(self.size2)).square()
        alpha = _ratio(v, 1 - self.iou + v, self.eps).detach()
        return 1 - self.iou + self.distance() + alpha * v

    def efficient(self) -> Tensor:
        """The EIoU loss."""
        loss = 1 - self.iou + self.distance()
        for one, other, side in zip(self.size1, self.size2, self.enclosing, strict=True):
            loss = loss + _ratio(one - other, side).square()
        return loss

    def reduce(self, loss: Tensor) -> Tensor:
        return reduce(loss.to(self.dtype), self.reduction)


_FORMULAS: dict[Kind, Callable[[_Pair], Tensor]] = {
    "iou": lambda pair: 1 - pair.iou,
    "giou": _Pair.generalised,
    "diou": lambda pair: 1 - pair.iou + pair.distance(),
    "ciou": _Pair.complete,
}


def _kernel_loss(
    kind: Kind, boxes1: Tensor, boxes2: Tensor, eps: float, reduction: str, validate: bool
) -> Tensor:
    """A loss by its kernel, or by its formula where that must be seen."""

    def formula(boxes1: Tensor, boxes2: Tensor) -> Tensor:
        pair = _Pair(boxes1, boxes2, eps)
        return pair.reduce(_FORMULAS[kind](pair))

    boxes1, boxes2 = _checked(boxes1, boxes2, validate)
    if followed():
        return reduce(formula(boxes1, boxes2), reduction)
    return reduce(box_losses(kind, boxes1, boxes2, eps, formula), reduction)


def _checked(boxes1: Tensor, boxes2: Tensor, validate: bool) -> tuple[Tensor, Tensor]:
    """The boxes in the dtype of their losses."""
    check_tensors(boxes1=boxes1, boxes2=boxes2)
    if boxes1.shape != boxes2.shape or boxes1.shape[-1:] != (4,):
        raise ValueError(
            f"boxes must have one shape (*, 4): {tuple(boxes1.shape)}, {tuple(boxes2.shape)}"
        )
    boxes1 = boxes1.to(compute_dtype(boxes1.dtype))
    boxes2 = boxes2.to(boxes1.dtype)
    if validate:
        _check_boxes("boxes1", boxes1)
        _check_boxes("boxes2", boxes2)
    return boxes1, boxes2


class _Widen(torch.autograd.Function):
    """Boxes in the dtype to compute in; their gradient in their own, bounded to be finite there."""

    @staticmethod
    def forward(ctx: Any, boxes: Tensor) -> Tensor:
        ctx.dtype = boxes.dtype
        return boxes.to(wide(boxes), copy=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        limit = steepest(ctx.dtype)
        return grad.clamp(-limit, limit).to(ctx.dtype)


def _widened(boxes: Tensor) -> Tensor:
    # torch.func and forward mode have no rule for a class with a backward of its own; there the
    # gradient of boxes below 1e-31 may overflow.
    if not torch.compiler.is_compiling() and followed():
        return boxes.to(wide(boxes))
    return _Widen.apply(boxes)


def _lengths(differences: Tensor) -> Tensor:
    """0 where negative, with the slope of a length at 0, so that a line can grow into a box."""
    return torch.where(differences < 0, 0, differences)


def _area(sides: tuple[Tensor, ...]) -> Tensor:
    width, height = sides
    return width * height


def _ratio(numerator: Tensor, denominator: Tensor, eps: float = 0) -> Tensor:
    """The ratio; 0, and without a gradient, where both are 0."""
    none = denominator < least(denominator.dtype)
    return (numerator / (denominator + eps).masked_fill(none, 1)).masked_fill(none, 0)


def _power(base: Tensor, exponent: float) -> Tensor:
    """A power of a number in [0, 1]; a slope at 0 that is infinite is taken for 0."""
    tiny = torch.finfo(base.dtype).eps
    return torch.where(base > tiny, base.clamp(min=tiny).pow(exponent), 0)


def _angle(size: tuple[Tensor, ...]) -> Tensor:
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


class BoxLoss(Loss):
    """A loss of boxes."""

    common = _Pair


@register("iou", "boxes")
class IoULoss(BoxLoss):
    @options_of(iou_loss)
    def __init__(self) -> None:
        """Module form of :func:`iou_loss`."""


@register("giou", "boxes")
class GIoULoss(BoxLoss):
    @options_of(generalized_box_iou_loss)
    def __init__(self) -> None:
        """Module form of :func:`generalized_box_iou_loss`."""


@register("diou", "boxes")
class DIoULoss(BoxLoss):
    @options_of(distance_box_iou_loss)
    def __init__(self) -> None:
        """Module form of :func:`distance_box_iou_loss`."""


@register("ciou", "boxes")
class CIoULoss(BoxLoss):
    @options_of(complete_box_iou_loss)
    def __init__(self) -> None:
        """Module form of :func:`complete_box_iou_loss`."""


@register("eiou", "boxes")
class EIoULoss(BoxLoss):
    @options_of(eiou_loss)
    def __init__(self) -> None:
        """Module form of :func:`eiou_loss`."""


@register("focal_eiou", "boxes")
class FocalEIoULoss(BoxLoss):
    @options_of(focal_eiou_loss)
    def __init__(self) -> None:
        """Module form of :func:`focal_eiou_loss`."""


@register("siou", "boxes")
class SIoULoss(BoxLoss):
    @options_of(siou_loss)
    def __init__(self) -> None:
        """Module form of :func:`siou_loss`."""


@register("mpdiou", "boxes")
class MPDIoULoss(BoxLoss):
    @options_of(mpdiou_loss)
    def __init__(self) -> None:
        """Module form of :func:`mpdiou_loss`."""


@register("wiou", "boxes")
class WIoULoss(BoxLoss):
    @options_of(wiou_loss)
    def __init__(self) -> None:
        """Module form of :func:`wiou_loss`."""


@register("alpha_iou", "boxes")
class AlphaIoULoss(BoxLoss):
    @options_of(alpha_iou_loss)
    def __init__(self) -> None:
        """Module form of :func:`alpha_iou_loss`."""


@register("nwd", "boxes")
class NWDLoss(BoxLoss):
    @options_of(nwd_loss)
    def __init__(self) -> None:
        """Module form of :func:`nwd_loss`."""
