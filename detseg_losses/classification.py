"""Losses of independent sigmoids: detection heads, binary and multilabel masks.

Without a ``mode`` the classes come last, as in detection heads: targets have the shape of the
inputs, or hold the class index of each row, where -1 stands for background (no class is positive)
and ``ignore_index``, -2, for a row that is left out. (In Detectron2 it is -1 that is left out.)
With a ``mode`` the inputs are the logits ``(B, C, *)`` of a segmentation model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypedDict

import torch
from torch import Tensor
from typing_extensions import Unpack

from .base import (
    FormulaLoss,
    as_weights,
    blocks,
    divide,
    mean_of_sums,
    options_of,
    processes,
    register,
    world_sum,
)
from .checks import Mode, balance, checked
from .layout import Batch, check_one_weight, detection_batch, segmentation_batch
from .pointwise import Formula, Label, Sigmoid, column, mix, pointwise, power, spend
from .statistics import Need, Statistics


class ClassificationOptions(TypedDict, total=False):
    """Options of every sigmoid loss.

    Attributes:
        mode: None for inputs ``(*, K)``; else how the logits ``(B, C, *)`` are read.
        ignore_index: label that is left out of sums and means; -2 by default among class indices.
        class_weights: weight of each class, ``(K,)``; a mean is the weighted one.
        per_image: average each image, then the images.
        sync: the batch is that of all processes: scaled so that the average of their gradients is
            that of one process.
        validate: check the labels also where that makes the device wait.
        weight: weight of each row or entry, broadcast to ``(*)`` or ``(*, K)``; with a ``mode`` of
            each pixel, ``(B, *)``, or entry, ``(B, C, *)``. A mean is the weighted one, and a
            weight of 0 leaves out.
        pixel_weight: weight of each pixel, by the name that it has in the other segmentation
            losses; in place of ``weight``.
    """

    mode: Mode | None
    ignore_index: int | None
    class_weights: Tensor | Sequence[float] | None
    per_image: bool
    sync: bool
    validate: bool
    weight: Tensor | None
    pixel_weight: Tensor | None


@checked(alpha=balance)
def sigmoid_focal_loss(
    inputs: Tensor,
    targets: Tensor,
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


@checked()
def binary_cross_entropy_loss(
    inputs: Tensor,
    targets: Tensor,
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


@checked()
def quality_focal_loss(
    inputs: Tensor,
    targets: Tensor,
    *,
    beta: float = 2.0,
    reduction: str = "mean",
    **options: Unpack[ClassificationOptions],
) -> Tensor:
    r"""Quality focal loss (Li et al., Generalized Focal Loss, arXiv:2006.04388).

    For detectors whose score is also to tell how well the box fits: the target of a positive is
    the IoU of its box, not 1.

    .. math:: -|y - p|^\beta \bigl(y \log p + (1 - y) \log (1 - p)\bigr)

    The paper takes the sum over the number of positives.

    Args:
        inputs: logits ``(*, K)``, or ``(B, C, *)`` with a ``mode``.
        targets: the quality in [0, 1] of each entry, of the same shape, 0 for negatives. Class
            indices ``(*)`` stand for a quality of 1: focal loss without alpha.
        beta: how fast the loss falls near the target; 0 is cross entropy. Below 1 the slope has no
            limit where p meets a target between 0 and 1.
        reduction: ``"none"``, ``"mean"`` (over what is not left out) or ``"sum"``.
        **options: see :class:`ClassificationOptions`.

    Raises:
        ValueError: on a negative beta, shapes that do not fit, or a label out of range.
    """
    return _sigmoid_loss(QualityFocal(beta), inputs, targets, reduction, **options)


@checked()
def varifocal_loss(
    inputs: Tensor,
    targets: Tensor,
    *,
    alpha: float = 0.75,
    gamma: float = 2.0,
    reduction: str = "mean",
    **options: Unpack[ClassificationOptions],
) -> Tensor:
    r"""Varifocal loss (Zhang et al., VarifocalNet, arXiv:2008.13367).

    For detectors whose score is also to tell how well the box fits. Positives are few, so they are
    not weighed down where they are easy, as negatives are, but weighed by their quality.

    .. math::
        \begin{cases}
            -y \bigl(y \log p + (1 - y) \log (1 - p)\bigr) & y > 0 \\
            -\alpha p^\gamma \log (1 - p) & y = 0
        \end{cases}

    The paper takes the sum over the number of positives.

    Args:
        inputs: logits ``(*, K)``, or ``(B, C, *)`` with a ``mode``.
        targets: the quality (IoU of the box) in [0, 1] of each entry, of the same shape, 0 for
            negatives. Class indices ``(*)`` stand for a quality of 1.
        alpha: weight of negatives.
        gamma: how fast the loss of easy negatives falls.
        reduction: ``"none"``, ``"mean"`` (over what is not left out) or ``"sum"``.
        **options: see :class:`ClassificationOptions`.

    Raises:
        ValueError: on a negative alpha or gamma, shapes that do not fit, or a label out of range.
    """
    return _sigmoid_loss(Varifocal(alpha, gamma), inputs, targets, reduction, **options)


@checked()
def asymmetric_loss(
    inputs: Tensor,
    targets: Tensor,
    *,
    gamma_neg: float = 4.0,
    gamma_pos: float = 0.0,
    margin: float = 0.05,
    reduction: str = "mean",
    **options: Unpack[ClassificationOptions],
) -> Tensor:
    r"""Asymmetric loss (Ridnik et al., arXiv:2009.14119).

    For many labels of which few apply, some of them missing: easy negatives lose weight faster
    than easy positives, and those below the margin cost nothing.

    .. math::
        -y (1 - p)^{\gamma_+} \log p - (1 - y)\, p_m^{\gamma_-} \log (1 - p_m),
        \quad p_m = \max(p - m, 0)

    Args:
        inputs: logits ``(*, K)``, or ``(B, C, *)`` with a ``mode``.
        targets: values in [0, 1] of the same shape, or class indices ``(*)``: -1 is background,
            -2 is left out.
        gamma_neg: how fast the loss of easy negatives falls.
        gamma_pos: how fast the loss of easy positives falls.
        margin: the probability m up to which a negative costs nothing. It also bounds the cost of
            a negative, and takes the gradient from those that are likely to be missing labels.
        reduction: ``"none"``, ``"mean"`` (over what is not left out) or ``"sum"``.
        **options: see :class:`ClassificationOptions`.

    Raises:
        ValueError: on a negative gamma, a margin outside of [0, 1], shapes that do not fit, or a
            label out of range.
    """
    formula = Asymmetric(gamma_neg, gamma_pos, margin)
    return _sigmoid_loss(formula, inputs, targets, reduction, **options)


@checked(alpha=balance)
def poly_focal_loss(
    inputs: Tensor,
    targets: Tensor,
    *,
    epsilon: float = 1.0,
    alpha: Tensor | Sequence[float] | float | None = 0.25,
    gamma: float = 2.0,
    reduction: str = "mean",
    **options: Unpack[ClassificationOptions],
) -> Tensor:
    r"""Poly-1 focal loss (Leng et al., PolyLoss, arXiv:2204.12511).

    Focal loss with another weight of its leading term, one number to tune to a data set.

    .. math:: \alpha_t \bigl(-(1 - p_t)^\gamma \log p_t + \epsilon (1 - p_t)^{\gamma + 1}\bigr)

    Args:
        inputs: logits ``(*, K)``, or ``(B, C, *)`` with a ``mode``.
        targets: values in [0, 1] of the same shape, or class indices ``(*)``: -1 is background,
            -2 is left out.
        epsilon: what is added to the leading coefficient, which is 1 in the focal loss.
        alpha: weight of positives, negatives have 1 - alpha: a number, or one for each class.
            None or -1: no weighting.
        gamma: how fast the loss of what is well classified falls.
        reduction: ``"none"``, ``"mean"`` (over what is not left out) or ``"sum"``.
        **options: see :class:`ClassificationOptions`.

    Raises:
        ValueError: on an epsilon below -1 (the loss would reward mistakes), an alpha outside of
            [0, 1], a negative gamma, shapes that do not fit, or a label out of range.
    """
    formula = PolyFocal(as_weights(alpha), gamma, epsilon)
    return _sigmoid_loss(formula, inputs, targets, reduction, **options)


@checked()
def ghm_loss(
    inputs: Tensor,
    targets: Tensor,
    *,
    bins: int = 30,
    reduction: str = "mean",
    **options: Unpack[ClassificationOptions],
) -> Tensor:
    r"""Gradient harmonised cross entropy, GHM-C (Li et al., arXiv:1811.05181).

    For detection heads with both very many easy negatives and outliers that no training fits:
    each entry is weighed by how rare the size of its gradient is.

    .. math::
        \frac{N}{M R(g)} \bigl(-y \log p - (1 - y) \log (1 - p)\bigr), \quad g = |p - y|

    of N entries, R(g) of which are in the bin that g is in. M counts the bins that hold any, as
    the authors have it, so that the mean weight is 1. Entries are counted over the whole batch,
    with their weights, and with ``sync`` over all processes; there is no moving average of the
    counts. The weights are taken for constants.

    Args:
        inputs: logits ``(*, K)``, or ``(B, C, *)`` with a ``mode``.
        targets: values in [0, 1] of the same shape, or class indices ``(*)``: -1 is background,
            -2 is left out.
        bins: into how many bins of equal width the sizes of gradients from 0 to 1 are sorted.
        reduction: ``"none"``, ``"mean"`` (over what is not left out) or ``"sum"``.
        **options: see :class:`ClassificationOptions`.

    Raises:
        ValueError: on less than one bin, shapes that do not fit, or a label out of range.
    """
    formula = Harmonised(bins, options.get("sync", False))
    return _sigmoid_loss(formula, inputs, targets, reduction, **options)


@dataclass(frozen=True)
class CrossEntropy(Formula):
    pos_weight: Tensor | float

    def value(self, s: Sigmoid, y: Label) -> Tensor:
        if self.unweighted:
            return s.cross_entropy(y)
        if isinstance(y, Tensor):
            return mix(s.neg, s.pos * column(self.pos_weight), y)
        return s.pos * column(self.pos_weight) if y else s.neg

    def slope(self, s: Sigmoid, y: Label) -> Tensor:
        if self.unweighted:
            return s.error(y)
        if isinstance(y, Tensor):
            return mix(s.p, s.q * -column(self.pos_weight), y)
        return s.q * -column(self.pos_weight) if y else s.p

    @property
    def unweighted(self) -> bool:
        return not isinstance(self.pos_weight, Tensor) and self.pos_weight == 1


@dataclass(frozen=True)
class Focal(Formula):
    alpha: Tensor | float | None
    gamma: float

    def value(self, s: Sigmoid, y: Label) -> Tensor:
        ce = s.cross_entropy(y)
        return power(s.missed(y), self.gamma, self.weight(y)) * ce

    def slope(self, s: Sigmoid, y: Label) -> Tensor:
        return self.both(s, y)[1]

    def both(self, s: Sigmoid, y: Label) -> tuple[Tensor, Tensor]:
        ce, missed = s.cross_entropy(y), s.missed(y)
        if not isinstance(y, Tensor):
            factor = power(missed, self.gamma, self.weight(y))
            value = factor * ce
            slope = spend(factor, missed).addcmul_(value, s.missed(1 - y), value=self.gamma)
            return value, -slope if y else slope
        if self.gamma < 1:  # whatever underflows in missed does so in its slope, too
            missed = missed.clamp(min=torch.finfo(missed.dtype).tiny)
        root = power(missed, self.gamma - 1, self.weight(y))
        factor = root * missed
        tilt = root * s.missed_slope(y)
        value = factor * ce
        return value, spend(factor, s.error(y)).addcmul_(tilt, ce, value=self.gamma)

    def weight(self, y: Label) -> Any:
        if self.alpha is None or (not isinstance(self.alpha, Tensor) and self.alpha == -1):
            return 1
        alpha = column(self.alpha)
        return mix(1 - alpha, alpha, y)


@dataclass(frozen=True)
class QualityFocal(Formula):
    beta: float

    def value(self, s: Sigmoid, y: Label) -> Tensor:
        return power(s.error(y).abs(), self.beta) * s.cross_entropy(y)

    def slope(self, s: Sigmoid, y: Label) -> Tensor:
        if not isinstance(y, Tensor):
            return Focal(None, self.beta).slope(s, y)
        rise, ce = s.error(y), s.cross_entropy(y)
        missed = rise.abs()
        factor = power(missed.clamp(min=torch.finfo(missed.dtype).tiny), self.beta - 1)
        tilt = s.spread * rise.sign()  # the slope of missed
        return factor * torch.addcmul(missed * rise, tilt, ce, value=self.beta)


@dataclass(frozen=True)
class Varifocal(Formula):
    alpha: float
    gamma: float

    def value(self, s: Sigmoid, y: Label) -> Tensor:
        if isinstance(y, Tensor):
            return torch.where(y > 0, y * s.cross_entropy(y), self.value(s, 0))
        return s.pos if y else self.alpha * Focal(None, self.gamma).value(s, 0)

    def slope(self, s: Sigmoid, y: Label) -> Tensor:
        if isinstance(y, Tensor):
            return torch.where(y > 0, y * s.error(y), self.slope(s, 0))
        return -s.q if y else self.alpha * Focal(None, self.gamma).slope(s, 0)


@dataclass(frozen=True)
class Asymmetric(Formula):
    gamma_neg: float
    gamma_pos: float
    margin: float

    def value(self, s: Sigmoid, y: Label) -> Tensor:
        if isinstance(y, Tensor):
            return torch.lerp(self.value(s, 0), self.value(s, 1), y)
        if y or not self.margin:
            return self.unshifted(y).value(s, y)
        right = self.right(s)
        return -power(1 - right, self.gamma_neg) * right.log()

    def slope(self, s: Sigmoid, y: Label) -> Tensor:
        if isinstance(y, Tensor):
            return torch.lerp(self.slope(s, 0), self.slope(s, 1), y)
        if y or not self.margin:
            return self.unshifted(y).slope(s, y)
        right = self.right(s)
        missed = (1 - right).clamp(min=torch.finfo(right.dtype).tiny)
        factor = power(missed, self.gamma_neg - 1) * s.spread
        slope = factor * torch.sub(missed / right, right.log(), alpha=self.gamma_neg)
        return torch.where(right < 1, slope, 0)

    def unshifted(self, y: Label) -> Focal:
        return Focal(None, self.gamma_pos if y else self.gamma_neg)

    def right(self, s: Sigmoid) -> Tensor:
        """``1 - p_m``."""
        return (s.q + self.margin).clamp(max=1)


@dataclass(frozen=True)
class PolyFocal(Focal):
    epsilon: float

    def value(self, s: Sigmoid, y: Label) -> Tensor:
        return self.both(s, y)[0]

    def both(self, s: Sigmoid, y: Label) -> tuple[Tensor, Tensor]:
        value, slope = super().both(s, y)
        missed = s.missed(y)
        power_of_missed = power(missed, self.gamma, self.weight(y)) * self.epsilon
        steeper = power_of_missed * s.missed_slope(y) * (self.gamma + 1)
        return torch.addcmul(value, power_of_missed, missed), slope + steeper


@dataclass(frozen=True)
class Harmonised(Formula):
    """Cross entropy that is weighed by the batch that it is fitted to."""

    bins: int
    sync: bool

    def fitted(self, batch: Batch) -> Formula:
        counts = world_sum(self.counts(batch), self.sync)
        filled = (counts > 0).sum()
        return Binned(torch.where(counts > 0, divide(counts.sum(), counts * filled), 0))

    def counts(self, batch: Batch) -> Tensor:
        """The weights of the entries in each bin, added up."""
        logits = batch.logits.detach()
        weight = logits.new_ones(len(logits), 1, 1) if batch.weight is None else batch.weight
        if batch.scale is not None:
            weight = weight * batch.scale.unsqueeze(-1)
        counts = logits.new_zeros(self.bins, dtype=batch.dtype)
        for tile in blocks(logits):
            x, w = tile.of(logits), tile.of(weight)
            kept = None if batch.weight is None else w != 0
            target = tile.of(batch.target)
            part = replace(batch, logits=x, target=target, weight=kept, scale=None)
            (found,) = pointwise(part, maps=[Bin(self.bins)])
            each = counts.new_zeros(*x.shape[:2], self.bins)
            each = each.scatter_add(2, index_of(found, self.bins), w.to(counts).expand_as(x))
            counts = counts + each.sum((0, 1))
        return counts


@dataclass(frozen=True)
class Bin(Formula):
    """The bin of the size of the gradient, as a floating point number."""

    bins: int

    def value(self, s: Sigmoid, y: Label) -> Tensor:
        return (s.error(y).detach().abs() * self.bins).floor_()


@dataclass(frozen=True)
class Binned(Formula):
    """Cross entropy with a weight for each bin, ``(M,)``."""

    weights: Tensor

    def value(self, s: Sigmoid, y: Label) -> Tensor:
        return self.each(s, y) * s.cross_entropy(y)

    def slope(self, s: Sigmoid, y: Label) -> Tensor:
        return self.each(s, y) * s.error(y)

    def both(self, s: Sigmoid, y: Label) -> tuple[Tensor, Tensor]:
        each = self.each(s, y)
        return each * s.cross_entropy(y), each * s.error(y)

    def each(self, s: Sigmoid, y: Label) -> Tensor:
        bins = len(self.weights)
        index = index_of(Bin(bins).value(s, y), bins)
        return self.weights.expand(*index.shape[:-1], bins).gather(-1, index)

    def of_classes(self, index: Tensor) -> Formula:
        return self  # the weights are not those of classes


def index_of(found: Tensor, bins: int) -> Tensor:
    """Bins as indices; a gradient of 1 belongs to the last, and NaN to any."""
    return found.long().clamp_(0, bins - 1)


@checked()
def _sigmoid_loss(
    formula: Formula,
    inputs: Tensor,
    targets: Tensor,
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
    if mode is None:
        check_one_weight(weight, pixel_weight)
        weight = pixel_weight if weight is None else weight
        batch = detection_batch(
            inputs, targets, ignore_index=ignore_index, weight=weight, validate=validate
        )
    else:
        batch = segmentation_batch(
            inputs,
            targets,
            mode=mode,
            ignore_index=ignore_index,
            pixel_weight=pixel_weight,
            weight=weight,
            validate=validate,
        )
    if reduction == "none":
        return _map(formula, batch, class_weights)
    (sums,) = pointwise(batch, [formula], per_class=class_weights is not None)
    return _reduce(sums, batch, class_weights, reduction, per_image, sync)


def _map(formula: Formula, batch: Batch, class_weights: Any) -> Tensor:
    (values,) = pointwise(batch, maps=[formula])
    return batch.entries(values * column(_each(batch, class_weights)))


def _reduce(
    sums: Tensor, batch: Batch, class_weights: Any, reduction: str, per_image: bool, sync: bool
) -> Tensor:
    each = _each(batch, class_weights)
    sums = (sums * each).sum(-1)
    if reduction == "sum":
        return sums.sum() * processes(sync)
    return mean_of_sums(sums, (batch.valid() * each).sum(-1), per_image=per_image, sync=sync)


def _each(batch: Batch, class_weights: Any) -> Any:
    return 1.0 if class_weights is None else batch.per_class(class_weights)


class SigmoidLoss(FormulaLoss):
    """A loss that is a formula on independent sigmoids."""

    common = staticmethod(_sigmoid_loss)
    shared = ("mode", "ignore_index", "validate")

    def needs(self) -> list[Need]:
        return [] if self.options["reduction"] == "none" else [self.made()]

    def evaluate(self, statistics: Statistics) -> Tensor:
        options, formula, batch = self.options, self.made(), statistics.batch
        if options["reduction"] == "none":
            return _map(formula, batch, options["class_weights"])
        names = ("class_weights", "reduction", "per_image", "sync")
        return _reduce(statistics.sums[formula], batch, *(options[name] for name in names))


@register("focal", "classification", "segmentation")
class SigmoidFocalLoss(SigmoidLoss):
    formula = Focal

    @options_of(sigmoid_focal_loss)
    def __init__(self) -> None:
        """Module form of :func:`sigmoid_focal_loss`."""


@register("bce", "classification", "segmentation")
class BCELoss(SigmoidLoss):
    formula = CrossEntropy

    @options_of(binary_cross_entropy_loss)
    def __init__(self) -> None:
        """Module form of :func:`binary_cross_entropy_loss`."""


@register("quality_focal", "classification", "segmentation")
class QualityFocalLoss(SigmoidLoss):
    formula = QualityFocal

    @options_of(quality_focal_loss)
    def __init__(self) -> None:
        """Module form of :func:`quality_focal_loss`."""


@register("varifocal", "classification", "segmentation")
class VarifocalLoss(SigmoidLoss):
    formula = Varifocal

    @options_of(varifocal_loss)
    def __init__(self) -> None:
        """Module form of :func:`varifocal_loss`."""


@register("asymmetric", "classification", "segmentation")
class AsymmetricLoss(SigmoidLoss):
    formula = Asymmetric

    @options_of(asymmetric_loss)
    def __init__(self) -> None:
        """Module form of :func:`asymmetric_loss`."""


@register("poly_focal", "classification", "segmentation")
class PolyFocalLoss(SigmoidLoss):
    formula = PolyFocal

    @options_of(poly_focal_loss)
    def __init__(self) -> None:
        """Module form of :func:`poly_focal_loss`."""


@register("ghm", "classification", "segmentation")
class GHMLoss(SigmoidLoss):
    of_batch = True

    @options_of(ghm_loss)
    def __init__(self) -> None:
        """Module form of :func:`ghm_loss`."""

    def made(self) -> Formula:
        return Harmonised(self.options["bins"], self.options["sync"])
