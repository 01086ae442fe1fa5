"""Pixel losses: formulas on the negative log likelihood of each pixel under a softmax."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor
from typing_extensions import Unpack

from .base import Loss, Reduction, check_choice, mean_of_sums, register
from .layout import Batch, Mode
from .statistics import Need, Statistics, statistics


class PixelOptions(TypedDict, total=False):
    """Options of every pixel loss.

    Attributes:
        mode: None or ``"multiclass"``; a single channel has no softmax.
        ignore_index: label of the pixels that are left out.
        class_weights: weight of each class, ``(C,)``; a mean over class indices is the weighted
            one, as in ``torch.nn.functional.cross_entropy``.
        per_image: average each image, then the images.
        reduction: ``"mean"``, ``"sum"``, or ``"none"``: ``(B, *)``.
        sync: the mean over all processes.
        validate: check the labels also where that makes the device wait.
        pixel_weight: weight of each pixel, ``(B, *)``; a mean is the weighted one, and a weight of
            0 leaves the pixel out.
    """

    mode: Mode | None
    ignore_index: int | None
    class_weights: Tensor | Sequence[float] | None
    per_image: bool
    reduction: str
    sync: bool
    validate: bool
    pixel_weight: Tensor | None


def cross_entropy_loss(
    logits: Tensor | Statistics,
    target: Tensor | None = None,
    *,
    label_smoothing: float = 0.0,
    **options: Unpack[PixelOptions],
) -> Tensor:
    r"""Cross entropy of a softmax, with label smoothing (Szegedy et al., arXiv:1512.00567).

    .. math:: -(1 - \epsilon) \log p_t - \frac{\epsilon}{C} \sum_c \log p_c

    Args:
        logits: raw scores, ``(B, C, *)`` or ``(N, C)``.
        target: class indices ``(B, *)``, or probabilities of the logits' shape.
        label_smoothing: the share of the target that is spread over all classes.
        **options: see :class:`PixelOptions`.

    Raises:
        ValueError: on a single channel (use ``bce``), shapes that do not fit, a mode that cannot
            be told, or a label out of range.
    """
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be in [0, 1]: {label_smoothing}")
    s = pixels(logits, target, ["nll", "smooth"] if label_smoothing else ["nll"], **options)
    loss = s.weighted(s.nll)
    if label_smoothing:
        loss = loss * (1 - label_smoothing) + s.smooth * (label_smoothing / s.batch.logits.shape[1])
    return s.reduce(loss)


def softmax_focal_loss(
    logits: Tensor | Statistics,
    target: Tensor | None = None,
    *,
    gamma: float = 2.0,
    **options: Unpack[PixelOptions],
) -> Tensor:
    r"""Focal loss of a softmax over classes (Lin et al., arXiv:1708.02002, on one softmax).

    .. math:: -(1 - p_t)^\gamma \log p_t

    Not the sum of sigmoid focal losses that is elsewhere called multiclass focal loss: with
    ``gamma=0`` it is the cross entropy. ``class_weights`` take the place of alpha.

    Args:
        logits: raw scores, ``(B, C, *)`` or ``(N, C)``.
        target: class indices ``(B, *)``.
        gamma: how fast the loss of what is well classified falls.
        **options: see :class:`PixelOptions`.

    Raises:
        ValueError: on a single channel (use ``focal``), a target that is not class indices, a
            negative gamma, shapes that do not fit, or a label out of range.
    """
    if gamma < 0:
        raise ValueError(f"gamma must not be negative: {gamma}")
    s = pixels(logits, target, ["nll"], **options)
    if s.batch.dense:
        raise ValueError("softmax_focal_loss needs class indices; use cross_entropy_loss")
    # 1 - p without cancellation, and with a finite slope of the power where it is 0.
    missed = -torch.expm1(-s.nll)
    factor = torch.where(missed > 0, missed, 1).pow(gamma)
    return s.reduce(s.weighted(factor * s.nll))


@dataclass
class Pixels:
    """Maps over the pixels, ``(B, P)``, and their mean.

    ``class_weight`` is the weight of each pixel's class; None where there is none to apply.
    """

    statistics: Statistics
    class_weight: Tensor | None
    per_image: bool
    reduction: str
    sync: bool

    @property
    def batch(self) -> Batch:
        return self.statistics.batch

    @property
    def nll(self) -> Tensor:
        """Negative log likelihood; with a dense target already weighted by class."""
        return self.statistics.nll

    @property
    def smooth(self) -> Tensor:
        return self.statistics.smooth

    def weighted(self, values: Tensor) -> Tensor:
        """Values times the weight of each pixel's class."""
        return values if self.class_weight is None else values * self.class_weight

    def reduce(self, loss: Tensor) -> Tensor:
        """The losses of the pixels as the options ask: pixel weights and reduction."""
        weight = self.batch.weight
        if weight is not None:
            weight = weight.squeeze(1)
            loss = loss * weight
        if self.reduction == "none":
            return self.batch.pixels(loss)
        if self.reduction == "sum":
            return loss.sum()
        counts = torch.ones_like(loss) if self.class_weight is None else self.class_weight
        counts = counts if weight is None else counts * weight
        return mean_of_sums(loss.sum(-1), counts.sum(-1), per_image=self.per_image, sync=self.sync)


def pixels(
    logits: Tensor | Statistics,
    target: Tensor | None,
    needs: list[Need],
    *,
    mode: Mode | None = None,
    ignore_index: int | None = None,
    class_weights: Tensor | Sequence[float] | None = None,
    per_image: bool = False,
    reduction: str = "mean",
    sync: bool = False,
    validate: bool = False,
    pixel_weight: Tensor | None = None,
) -> Pixels:
    """Compute the maps, or take those that are there."""
    check_choice("reduction", reduction, Reduction)
    s = statistics(
        logits,
        target,
        needs,
        mode=mode,
        ignore_index=ignore_index,
        pixel_weight=pixel_weight,
        class_weights=class_weights,
        validate=validate,
    )
    class_weight = None
    if class_weights is not None and not s.batch.dense:
        class_weight = s.batch.per_class(class_weights)[s.batch.labels()]
    return Pixels(s, class_weight, per_image, reduction, sync)


class PixelLoss(Loss):
    """A loss that is a formula on the likelihood of each pixel."""

    common = staticmethod(pixels)
    shared = ("mode", "ignore_index", "validate", "class_weights")

    def needs(self) -> list[Need]:
        return ["nll"]


@register("ce", "segmentation")
class CrossEntropyLoss(PixelLoss):
    """Module form of :func:`cross_entropy_loss`."""

    function = staticmethod(cross_entropy_loss)

    def needs(self) -> list[Need]:
        return ["nll", "smooth"] if self.options["label_smoothing"] else ["nll"]


@register("softmax_focal", "segmentation")
class SoftmaxFocalLoss(PixelLoss):
    """Module form of :func:`softmax_focal_loss`."""

    function = staticmethod(softmax_focal_loss)
