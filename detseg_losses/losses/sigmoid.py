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

from detseg_losses._core.batch import Batch, check_one_weight, detection_batch, segmentation_batch
from detseg_losses._core.blocks import blocks
from detseg_losses._core.checks import Mode, balance, checked
from detseg_losses._core.distribution import processes, world_sum
from detseg_losses._core.module import FormulaLoss, options_of, register
from detseg_losses._core.reduction import as_weights, divide, mean_of_sums
from detseg_losses._engine.sigmoid import (
    Formula,
    Label,
    SigmoidWants,
    Symmetric,
    column,
    cross_entropy,
    error,
    log_1p_exp,
    missed,
    mix,
    power,
    sigmoid_statistics,
)
from detseg_losses._engine.statistics import Need, Statistics


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

    Examples:
        >>> logits = torch.tensor([[2.0, -3.0], [-4.0, 0.5], [1.0, 1.0]])  # three anchors
        >>> labels = torch.tensor([0, -1, -2])  # class 0, background, ignored
        >>> positives = (labels >= 0).sum().clamp(min=1)
        >>> sigmoid_focal_loss(logits, labels, reduction="sum") / positives
        tensor(0.2836)
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

    Examples:
        >>> logits = torch.tensor([[2.0, -3.0], [-1.0, 0.5]])
        >>> targets = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> binary_cross_entropy_loss(logits, targets)
        tensor(0.2407)
        >>> binary_cross_entropy_loss(logits, targets, pos_weight=2.0)
        tensor(0.3910)
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

    Examples:
        >>> logits = torch.tensor([[1.0, -3.0], [-2.0, -4.0]])  # of two anchors
        >>> quality = torch.tensor([[0.8, 0.0], [0.0, 0.0]])  # the IoU of their boxes
        >>> quality_focal_loss(logits, quality, reduction="sum")
        tensor(0.0044)
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

    Examples:
        >>> logits = torch.tensor([[1.0, -3.0], [-2.0, -4.0]])  # of two anchors
        >>> quality = torch.tensor([[0.8, 0.0], [0.0, 0.0]])  # the IoU of their boxes
        >>> varifocal_loss(logits, quality, reduction="sum")
        tensor(0.4120)
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

    Examples:
        >>> logits = torch.tensor([[3.0, -4.0, 1.0]])  # one image, three labels
        >>> targets = torch.tensor([[1.0, 0.0, 0.0]])
        >>> asymmetric_loss(logits, targets, reduction="none")  # the second is below the margin
        tensor([[0.0486, 0.0000, 0.2459]])
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

    Examples:
        >>> logits = torch.tensor([[2.0, -3.0], [-1.0, 0.5]])
        >>> targets = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> poly_focal_loss(logits, targets, epsilon=1.0, reduction="sum")
        tensor(0.0630)
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

    Examples:
        >>> logits = torch.tensor([-5.0, -5.0, -5.0, 0.0])  # three easy negatives and a hard one
        >>> ghm_loss(logits, torch.zeros(4), reduction="none")
        tensor([0.0045, 0.0045, 0.0045, 1.3863])
    """
    formula = Harmonised(bins, options.get("sync", False))
    return _sigmoid_loss(formula, inputs, targets, reduction, **options)


@dataclass(frozen=True)
class CrossEntropy(Symmetric):
    pos_weight: Tensor | float

    slope_is_p = True

    def value(self, x: Tensor, y: Label) -> Tensor:
        if not self.weighted:
            return cross_entropy(x, y)
        return mix(cross_entropy(x, 0), column(self.pos_weight) * cross_entropy(x, 1), y, x)

    def weights(self) -> tuple[Any, Any]:
        weight = self.pos_weight
        return (torch.ones_like(weight) if isinstance(weight, Tensor) else 1), weight

    def forward(self, u: Tensor) -> tuple[Tensor, Tensor]:
        return log_1p_exp(u), u

    def kept(self, u: Tensor) -> Tensor:
        return u

    def backward(self, kept: Tensor, factor: Tensor) -> Tensor:
        return torch.ops.aten.softplus_backward(factor, kept, 1, 40)

    def quick(self, x: Tensor, y: Label) -> Tensor:
        if not isinstance(y, Tensor):
            return super().quick(x, y)
        if self.weighted:
            return self.value(x, y)
        return log_1p_exp(x).addcmul_(x, y, value=-1)

    def slope(self, x: Tensor, y: Label) -> Tensor:
        if self.weighted or not isinstance(y, Tensor):
            return super().slope(x, y)
        return x.sigmoid().sub_(y)

    def between(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return super().between(x, y) if self.weighted else (self.quick(x, y), self.slope(x, y))

    @property
    def weighted(self) -> bool:
        return isinstance(self.pos_weight, Tensor) or self.pos_weight != 1


@dataclass(frozen=True)
class Focal(Symmetric):
    alpha: Tensor | float | None
    gamma: float

    def value(self, x: Tensor, y: Label) -> Tensor:
        return self.weighed(power(missed(x, y), self.gamma) * cross_entropy(x, y), y)

    def weights(self) -> tuple[Any, Any]:
        if self.alpha is None or (not isinstance(self.alpha, Tensor) and self.alpha == -1):
            return 1.0, 1.0
        return 1 - self.alpha, self.alpha

    def weighed(self, values: Tensor, y: Label) -> Tensor:
        negative, positive = self.weights()
        return values * mix(column(negative), column(positive), y, like=values)

    def forward(self, u: Tensor) -> tuple[Tensor, Tensor]:
        # f = p^g softplus(u), f' = g (1 - p) f + p p^g: from g f to p^g on the way p.
        p = u.sigmoid()
        factor = p.square() if self.gamma == 2 else power(p, self.gamma)
        value = factor * log_1p_exp(u)
        return value, torch.lerp(value * self.gamma, factor, p)

    def between(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        p = x.sigmoid()
        sign = torch.rsub(y, 1, alpha=2)  # of an answer's slope, fading where it is neither
        wrong = torch.addcmul(y, sign, p)
        ce = log_1p_exp(x).addcmul_(x, y, value=-1)
        root = self.weighed(power(wrong, self.gamma - 1), y)
        tilt = torch.ops.aten.sigmoid_backward(ce.mul_(root), p).mul_(sign)
        value = ce * wrong
        slope = root.mul_(wrong).mul_(p.sub_(y)).add_(tilt, alpha=self.gamma)
        return value, slope


@dataclass(frozen=True)
class QualityFocal(Formula):
    beta: float

    def value(self, x: Tensor, y: Label) -> Tensor:
        return power(error(x, y).abs(), self.beta) * cross_entropy(x, y)

    def both(self, x: Tensor, y: Label) -> tuple[Tensor, Tensor]:
        return super().both(x, y) if isinstance(y, Tensor) else Focal(None, self.beta).both(x, y)


@dataclass(frozen=True)
class Varifocal(Formula):
    alpha: float
    gamma: float

    def value(self, x: Tensor, y: Label) -> Tensor:
        if not isinstance(y, Tensor):
            return cross_entropy(x, 1) if y else self.alpha * Focal(None, self.gamma).value(x, 0)
        return torch.where(y > 0, y * cross_entropy(x, y), self.value(x, 0))

    def both(self, x: Tensor, y: Label) -> tuple[Tensor, Tensor]:
        if isinstance(y, Tensor):
            return super().both(x, y)
        if y:
            return CrossEntropy(1.0).both(x, 1)
        value, slope = Focal(None, self.gamma).both(x, 0)
        return value.mul_(self.alpha), slope.mul_(self.alpha)


@dataclass(frozen=True)
class Asymmetric(Formula):
    gamma_neg: float
    gamma_pos: float
    margin: float

    def value(self, x: Tensor, y: Label) -> Tensor:
        if isinstance(y, Tensor):
            return mix(self.value(x, 0), self.value(x, 1), y, x)
        if y or not self.margin:
            return Focal(None, self.gamma_pos if y else self.gamma_neg).value(x, y)
        right = ((-x).sigmoid() + self.margin).clamp(max=1)  # 1 - p_m
        return -power(1 - right, self.gamma_neg) * right.log()


@dataclass(frozen=True)
class PolyFocal(Formula):
    alpha: Tensor | float | None
    gamma: float
    epsilon: float

    def value(self, x: Tensor, y: Label) -> Tensor:
        focal = Focal(self.alpha, self.gamma)
        steeper = focal.weighed(power(missed(x, y), self.gamma + 1), y)
        return focal.value(x, y) + self.epsilon * steeper


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
            (found,) = sigmoid_statistics(part, SigmoidWants(maps=(Bin(self.bins),)))
            each = counts.new_zeros(*x.shape[:2], self.bins)
            each = each.scatter_add(2, index_of(found, self.bins), w.to(counts).expand_as(x))
            counts = counts + each.sum((0, 1))
        return counts


@dataclass(frozen=True)
class Bin(Formula):
    """The bin of the size of the gradient, as a floating point number."""

    bins: int

    def value(self, x: Tensor, y: Label) -> Tensor:
        return (error(x.detach(), y).abs() * self.bins).floor_()


@dataclass(frozen=True)
class Binned(Formula):
    """Cross entropy with a weight for each bin, ``(M,)``."""

    weights: Tensor

    def value(self, x: Tensor, y: Label) -> Tensor:
        bins = len(self.weights)
        index = index_of(Bin(bins).value(x, y), bins)
        return self.weights.expand(*index.shape[:-1], bins).gather(-1, index) * cross_entropy(x, y)

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
    wants = SigmoidWants(sums=(formula,), per_class=class_weights is not None)
    (sums,) = sigmoid_statistics(batch, wants)
    return _reduce(sums, batch, class_weights, reduction, per_image, sync)


def _map(formula: Formula, batch: Batch, class_weights: Any) -> Tensor:
    (values,) = sigmoid_statistics(batch, SigmoidWants(maps=(formula,)))
    weights = batch.per_class(class_weights)
    return batch.entries(values if weights is None else values * column(weights))


def _reduce(
    sums: Tensor, batch: Batch, class_weights: Any, reduction: str, per_image: bool, sync: bool
) -> Tensor:
    weights = batch.per_class(class_weights)
    if weights is not None:
        sums = sums * weights
    if reduction == "sum":
        total, count = sums.sum(), processes(sync)
        return total if count == 1 else total * count
    counts = batch.valid() if weights is None else batch.valid() * weights
    counts = counts.sum(-1)
    return mean_of_sums(sums.sum(-1), counts, per_image=per_image, sync=sync)


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
