"""Losses of independent sigmoids: detection heads, binary and multilabel masks.

Without a ``mode`` the classes come last, as in detection heads: targets have the shape of the
inputs, or hold the class index of each row, where -1 stands for background (no class is positive)
and ``ignore_index``, -2, for a row that is left out. (In Detectron2 it is -1 that is left out.)
With a ``mode`` the inputs are the logits ``(B, C, *)`` of a segmentation model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor
from typing_extensions import Unpack

from .base import Loss, Reduction, as_weights, check_choice, mean_of_sums, register
from .layout import Mode, detection_batch, segmentation_batch
from .pointwise import Formula, Label, Sigmoid, column, mix, pointwise, power
from .statistics import Need, Statistics


class ClassificationOptions(TypedDict, total=False):
    """Options of every sigmoid loss.

    Attributes:
        mode: None for inputs ``(*, K)``; else how the logits ``(B, C, *)`` are read.
        ignore_index: label that is left out of sums and means; -2 by default among class indices.
        class_weights: weight of each class, ``(K,)``; a mean is the weighted one.
        per_image: average each image, then the images.
        sync: the mean over all processes.
        validate: check the labels also where that makes the device wait.
        weight: weight of each row or entry, broadcast to ``(*)`` or ``(*, K)``, or of each pixel,
            ``(B, *)``; a mean is the weighted one, and a weight of 0 leaves out.
        pixel_weight: the same, by the name that it has in the other segmentation losses.
    """

    mode: Mode | None
    ignore_index: int | None
    class_weights: Tensor | Sequence[float] | None
    per_image: bool
    sync: bool
    validate: bool
    weight: Tensor | None
    pixel_weight: Tensor | None


def sigmoid_focal_loss(
    inputs: Tensor | Statistics,
    targets: Tensor | None = None,
    alpha: Tensor | Sequence[float] | float | None = 0.25,
    gamma: float = 2.0,
    reduction: str = "none",
    **options: Unpack[ClassificationOptions],
) -> Tensor:
    r"""Focal loss of independent sigmoids (Lin et al., arXiv:1708.02002).

    .. math:: -\alpha_t (1 - p_t)^\gamma \log p_t

    where :math:`p_t` is p for a positive and 1 - p for a negative, :math:`\alpha_t` likewise, and
    both are mixtures for a target in between. RetinaNet takes the sum over the number of positive
    anchors; the mean over all anchors would shrink as their number grows.

    Args:
        inputs: logits ``(*, K)``, or ``(B, C, *)`` with a ``mode``.
        targets: values in [0, 1] of the same shape, or class indices ``(*)``: -1 is background,
            -2 is left out.
        alpha: weight of positives, negatives have 1 - alpha: a number, or one for each class.
            None or -1: no weighting.
        gamma: how fast the loss of what is well classified falls; 0 is cross entropy.
        reduction: ``"none"``, ``"mean"`` (over what is not left out) or ``"sum"``.
        **options: see :class:`ClassificationOptions`.

    Raises:
        ValueError: on an alpha outside of [0, 1], a negative gamma, shapes that do not fit, or a
            label out of range.
    """
    return _sigmoid_loss(Focal(as_weights(alpha), gamma), inputs, targets, reduction, **options)


def binary_cross_entropy_loss(
    inputs: Tensor | Statistics,
    targets: Tensor | None = None,
    *,
    pos_weight: Tensor | Sequence[float] | float = 1.0,
    reduction: str = "mean",
    **options: Unpack[ClassificationOptions],
) -> Tensor:
    r"""Cross entropy of independent sigmoids.

    .. math:: -w\, y \log p - (1 - y) \log (1 - p)

    Args:
        inputs: logits ``(*, K)``, or ``(B, C, *)`` with a ``mode``.
        targets: values in [0, 1] of the same shape, or class indices ``(*)``: -1 is background,
            -2 is left out.
        pos_weight: the weight w of positives: a number, or one for each class.
        reduction: ``"none"``, ``"mean"`` (over what is not left out) or ``"sum"``.
        **options: see :class:`ClassificationOptions`.

    Raises:
        ValueError: on shapes that do not fit or a label out of range.
    """
    return _sigmoid_loss(
        CrossEntropy(as_weights(pos_weight)), inputs, targets, reduction, **options
    )


@dataclass(frozen=True)
class CrossEntropy(Formula):
    pos_weight: Tensor | float

    def value(self, s: Sigmoid, y: Label) -> Tensor:
        if isinstance(y, Tensor):
            return s.neg * (1 - y) + s.pos * y * column(self.pos_weight)
        return s.pos * column(self.pos_weight) if y else s.neg

    def slope(self, s: Sigmoid, y: Label) -> Tensor:
        if isinstance(y, Tensor):
            return s.p * (1 - y) - s.q * y * column(self.pos_weight)
        return -s.q * column(self.pos_weight) if y else s.p


@dataclass(frozen=True)
class Focal(Formula):
    alpha: Tensor | float | None
    gamma: float

    def __post_init__(self) -> None:
        if isinstance(self.alpha, (int, float)) and not (self.alpha == -1 or 0 <= self.alpha <= 1):
            raise ValueError(f"alpha must be in [0, 1], or -1 or None for no weight: {self.alpha}")
        if not 0 <= self.gamma < math.inf:
            raise ValueError(f"gamma must not be negative or infinite: {self.gamma}")

    def value(self, s: Sigmoid, y: Label) -> Tensor:
        return self.weighted(s.cross_entropy(y) * power(s.missed(y), self.gamma), y)

    def slope(self, s: Sigmoid, y: Label) -> Tensor:
        ce, missed = s.cross_entropy(y), s.missed(y)
        if isinstance(y, Tensor):
            if self.gamma < 1:  # whatever underflows in missed does so in p q, too
                missed = missed.clamp(min=torch.finfo(missed.dtype).tiny)
            factor = power(missed, self.gamma - 1)
            tilt = s.p * s.q * mix(1, -1, y)  # the slope of missed
            rise = mix(s.p, -s.q, y)  # that of the cross entropy
            return self.weighted(
                factor * torch.addcmul(missed * rise, tilt, ce, value=self.gamma), y
            )
        slope = torch.addcmul(missed, s.p if y else s.q, ce, value=self.gamma)
        slope = power(missed, self.gamma) * slope
        return self.weighted(-slope if y else slope, y)

    def weighted(self, values: Tensor, y: Label) -> Tensor:
        if self.alpha is None or (not isinstance(self.alpha, Tensor) and self.alpha == -1):
            return values
        alpha = column(self.alpha)
        return values * mix(1 - alpha, alpha, y)


def _sigmoid_loss(
    formula: Formula,
    inputs: Tensor | Statistics,
    targets: Tensor | None,
    reduction: str,
    *,
    mode: Mode | None = None,
    ignore_index: int | None = None,
    class_weights: Tensor | Sequence[float] | None = None,
    per_image: bool = False,
    sync: bool = False,
    validate: bool = False,
    weight: Tensor | None = None,
    pixel_weight: Tensor | None = None,
) -> Tensor:
    check_choice("reduction", reduction, Reduction)
    weight = pixel_weight if weight is None else weight
    if isinstance(inputs, Statistics):
        batch = inputs.batch
    elif targets is None:
        raise TypeError("targets are missing")
    elif mode is None:
        batch = detection_batch(
            inputs, targets, ignore_index=ignore_index, weight=weight, validate=validate
        )
    else:
        batch = segmentation_batch(
            inputs,
            targets,
            mode=mode,
            ignore_index=ignore_index,
            pixel_weight=weight,
            validate=validate,
        )
    each = 1.0 if class_weights is None else batch.per_class(class_weights)
    if reduction == "none":
        (values,) = pointwise(batch, [formula], summed=False)
        return batch.entries(values * column(each))
    known = inputs.sums if isinstance(inputs, Statistics) else {}
    sums = known[formula] if formula in known else pointwise(batch, [formula])[0]
    sums = (sums * each).sum(-1)
    if reduction == "sum":
        return sums.sum()
    return mean_of_sums(sums, (batch.valid() * each).sum(-1), per_image=per_image, sync=sync)


class SigmoidLoss(Loss):
    """A loss that is a formula on independent sigmoids."""

    common = staticmethod(_sigmoid_loss)
    shared = ("mode", "ignore_index", "validate")

    def formula(self) -> Formula:
        raise NotImplementedError

    def needs(self) -> list[Need]:
        return [] if self.options["reduction"] == "none" else [self.formula()]


@register("focal", "classification", "segmentation")
class SigmoidFocalLoss(SigmoidLoss):
    """Module form of :func:`sigmoid_focal_loss`."""

    function = staticmethod(sigmoid_focal_loss)

    def formula(self) -> Formula:
        return Focal(self.options["alpha"], self.options["gamma"])


@register("bce", "classification", "segmentation")
class BCELoss(SigmoidLoss):
    """Module form of :func:`binary_cross_entropy_loss`."""

    function = staticmethod(binary_cross_entropy_loss)

    def formula(self) -> Formula:
        return CrossEntropy(self.options["pos_weight"])
