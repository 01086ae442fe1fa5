"""Region losses: formulas on the soft counts of each class.

A formula sees ``tp``, ``pred`` and ``true`` (and ``fp``, ``fn``) of each class, pooled over the
batch or of each image, and nothing of softmax, masks or ignored pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypedDict

import torch
from torch import Tensor
from typing_extensions import Unpack

from .base import Loss, divide, mean_of_sums, processes, register, world_sum
from .checks import POSITIVE, Absent, Mode, checked
from .layout import Batch, segmentation_batch
from .statistics import Need, Statistics, statistics


class RegionOptions(TypedDict, total=False):
    """Options of every region loss.

    Attributes:
        mode: ``"multiclass"``, ``"binary"`` or ``"multilabel"``; None: one channel is binary, else
            multiclass.
        ignore_index: label of the pixels that are left out of every sum.
        class_weights: weight of each class in the mean over classes, ``(C,)``.
        per_image: one loss for each image and their mean, instead of counts of the whole batch.
        absent: what a class costs of which the target has nothing: it is left out of the mean
            (``"skip"``), or costs its mean predicted probability (``"penalise"``).
        reduction: ``"mean"`` over the classes, ``"sum"``, or ``"none"``: ``(C,)``, with
            ``per_image`` ``(B, C)``.
        sync: pool the counts of all processes.
        validate: check the labels also where that makes the device wait.
        pixel_weight: weight of each pixel, ``(B, *)``; a weight of 0 leaves the pixel out.
    """

    mode: Mode | None
    ignore_index: int | None
    class_weights: Tensor | Sequence[float] | None
    per_image: bool
    absent: Absent
    reduction: str
    sync: bool
    validate: bool
    pixel_weight: Tensor | None


@checked()
def dice_loss(
    logits: Tensor | Statistics,
    target: Tensor | None = None,
    *,
    smooth: float = 0.0,
    **options: Unpack[RegionOptions],
) -> Tensor:
    r"""One minus the Dice coefficient of each class (Milletari et al., arXiv:1606.04797).

    .. math:: 1 - \frac{2 TP + s}{\sum p + \sum y + s}

    The sums in the denominator are plain; for V-Net's own squares there is
    :func:`squared_dice_loss`.

    Args:
        logits: raw scores, ``(B, C, *)``.
        target: class indices ``(B, *)``, or values in [0, 1] of the logits' shape.
        smooth: the s added to both; it makes small classes cost less.
        **options: see :class:`RegionOptions`.

    Raises:
        ValueError: on shapes that do not fit, a mode that cannot be told, or a label out of range.
    """
    r = regions(logits, target, **options)
    return r.reduce(r.dice(smooth))


@checked()
def jaccard_loss(
    logits: Tensor | Statistics,
    target: Tensor | None = None,
    *,
    smooth: float = 0.0,
    **options: Unpack[RegionOptions],
) -> Tensor:
    r"""One minus the soft Jaccard index (IoU) of each class (Rahman and Wang, ISVC 2016).

    .. math:: 1 - \frac{TP + s}{\sum p + \sum y - TP + s}

    Args:
        logits: raw scores, ``(B, C, *)``.
        target: class indices ``(B, *)``, or values in [0, 1] of the logits' shape.
        smooth: the s added to both; it makes small classes cost less.
        **options: see :class:`RegionOptions`.

    Raises:
        ValueError: on shapes that do not fit, a mode that cannot be told, or a label out of range.
    """
    r = regions(logits, target, **options)
    return r.reduce(r.tversky(1, 1, smooth))


@checked()
def tversky_loss(
    logits: Tensor | Statistics,
    target: Tensor | None = None,
    *,
    alpha: float = 0.5,
    beta: float = 0.5,
    smooth: float = 0.0,
    **options: Unpack[RegionOptions],
) -> Tensor:
    r"""One minus the Tversky index of each class (Salehi et al., arXiv:1706.05721).

    .. math:: 1 - \frac{TP + s}{TP + \alpha FP + \beta FN + s}

    Args:
        logits: raw scores, ``(B, C, *)``.
        target: class indices ``(B, *)``, or values in [0, 1] of the logits' shape.
        alpha: weight of false positives; ``alpha = beta = 0.5`` is Dice, ``1`` is Jaccard.
        beta: weight of false negatives; a larger one favours recall.
        smooth: the s added to both; it makes small classes cost less.
        **options: see :class:`RegionOptions`.

    Raises:
        ValueError: on shapes that do not fit, a mode that cannot be told, or a label out of range.
    """
    r = regions(logits, target, **options)
    return r.reduce(r.tversky(alpha, beta, smooth))


@checked(gamma=POSITIVE)
def focal_tversky_loss(
    logits: Tensor | Statistics,
    target: Tensor | None = None,
    *,
    alpha: float = 0.3,
    beta: float = 0.7,
    gamma: float = 0.75,
    smooth: float = 0.0,
    **options: Unpack[RegionOptions],
) -> Tensor:
    r"""A power of the Tversky loss of each class (Abraham and Khan, arXiv:1810.07842).

    .. math:: \left(1 - \frac{TP + s}{TP + \alpha FP + \beta FN + s}\right)^\gamma

    Args:
        logits: raw scores, ``(B, C, *)``.
        target: class indices ``(B, *)``, or values in [0, 1] of the logits' shape.
        alpha: weight of false positives.
        beta: weight of false negatives.
        gamma: the exponent. The paper writes 1 / gamma with gamma = 4 / 3, which is the default
            here; below 1 the gradient grows for classes that are nearly right, above 1 for
            those that are not.
        smooth: the s added to both; it makes small classes cost less.
        **options: see :class:`RegionOptions`.

    Raises:
        ValueError: on shapes that do not fit, a mode that cannot be told, or a label out of range.
    """
    r = regions(logits, target, **options)
    loss = r.tversky(alpha, beta, smooth)
    # The slope at 0 is infinite for gamma < 1: a perfect class costs 0 and has no gradient.
    tiny = torch.finfo(loss.dtype).eps
    return r.reduce(torch.where(loss > tiny, loss.clamp(min=tiny).pow(gamma), 0))


@checked()
def squared_dice_loss(
    logits: Tensor | Statistics,
    target: Tensor | None = None,
    *,
    smooth: float = 0.0,
    **options: Unpack[RegionOptions],
) -> Tensor:
    r"""The Dice loss with squares in the denominator, V-Net's (Milletari et al., arXiv:1606.04797).

    .. math:: 1 - \frac{2 TP + s}{\sum p^2 + \sum y^2 + s}

    A pixel that the model is unsure of costs more than under :func:`dice_loss`, and a soft target
    is best met by itself: the loss is 0 where p = y. For results that are to be comparable with
    V-Net's, and for soft targets.

    Args:
        logits: raw scores, ``(B, C, *)``.
        target: class indices ``(B, *)``, or values in [0, 1] of the logits' shape.
        smooth: the s added to both; it makes small classes cost less.
        **options: see :class:`RegionOptions`.

    Raises:
        ValueError: on shapes that do not fit, a mode that cannot be told, or a label out of range.
    """
    r = regions(logits, target, "squares", **options)
    return r.reduce(1 - divide(2 * r.tp + smooth, r.squares + smooth))


@checked()
def generalised_dice_loss(
    logits: Tensor | Statistics,
    target: Tensor | None = None,
    **options: Unpack[RegionOptions],
) -> Tensor:
    r"""One Dice loss over all classes, each by its inverse area (Sudre et al., arXiv:1707.03237).

    .. math:: 1 - 2 \frac{\sum_c w_c TP_c}{\sum_c w_c (\sum p_c + \sum y_c)},
        \quad w_c = \frac{1}{(\sum y_c)^2}

    For classes of very different size: the small ones count as much as the large ones, in one
    ratio that no single small class can make as noisy as its own Dice is. Classes that the target
    lacks have no weight in it. Every class that is there costs this number, and
    ``class_weights`` are factors of :math:`w_c`.

    Args:
        logits: raw scores, ``(B, C, *)``.
        target: class indices ``(B, *)``, or values in [0, 1] of the logits' shape.
        **options: see :class:`RegionOptions`.

    Raises:
        ValueError: on shapes that do not fit, a mode that cannot be told, or a label out of range.
    """
    r = regions(logits, target, **options)
    # Relative to the smallest class that is there, so that no square is out of range.
    least = r.true.where(r.true > 0, torch.inf).amin(-1, keepdim=True)
    weights = torch.where(r.true > 0, least / r.true, 0).square()
    if r.class_weights is not None:
        weights = weights * r.class_weights
    hits = (weights * r.tp).sum(-1, keepdim=True)
    misses = (weights * (r.fp + r.fn)).sum(-1, keepdim=True)
    loss = _Share.apply(misses, 2 * hits).expand_as(r.tp)
    if r.class_weights is not None:  # of the classes that are there they are in it already
        r = replace(r, class_weights=torch.where(r.true > 0, 1, r.class_weights))
    return r.reduce(loss)


@checked()
def log_cosh_dice_loss(
    logits: Tensor | Statistics,
    target: Tensor | None = None,
    *,
    smooth: float = 0.0,
    **options: Unpack[RegionOptions],
) -> Tensor:
    r"""The logarithm of the hyperbolic cosine of the Dice loss (Jadon, arXiv:2006.14822).

    .. math:: \log \cosh \left(1 - \frac{2 TP + s}{\sum p + \sum y + s}\right)

    Half the square of the Dice loss where that is small: its gradient fades as a class becomes
    right. For steps that calm down late in training.

    Args:
        logits: raw scores, ``(B, C, *)``.
        target: class indices ``(B, *)``, or values in [0, 1] of the logits' shape.
        smooth: the s added to both; it makes small classes cost less.
        **options: see :class:`RegionOptions`.

    Raises:
        ValueError: on shapes that do not fit, a mode that cannot be told, or a label out of range.
    """
    r = regions(logits, target, **options)
    # cosh d = 1 + 2 sinh(d / 2)^2, without rounding to 1 where d is small
    return r.reduce(torch.log1p(2 * (r.dice(smooth) / 2).sinh().square()))


@checked(beta=POSITIVE)
def f1_loss(
    logits: Tensor | Statistics,
    target: Tensor | None = None,
    *,
    beta: float = 1.0,
    smooth: float = 0.0,
    **options: Unpack[RegionOptions],
) -> Tensor:
    r"""One minus the soft F-measure of each class (Pastor-Pellicer et al., IWANN 2013).

    .. math:: 1 - \frac{(1 + \beta^2) TP + s}{(1 + \beta^2) TP + \beta^2 FN + FP + s}

    For a recall that matters beta times as much as the precision. With ``beta=1`` it is
    :func:`dice_loss`; with any, :func:`tversky_loss` with an alpha of
    :math:`1 / (1 + \beta^2)` and a beta of :math:`\beta^2 / (1 + \beta^2)`.

    Args:
        logits: raw scores, ``(B, C, *)``.
        target: class indices ``(B, *)``, or values in [0, 1] of the logits' shape.
        beta: how many times as important recall is as precision; below 1 it is less so.
        smooth: the s added to both; it makes small classes cost less.
        **options: see :class:`RegionOptions`.

    Raises:
        ValueError: on a beta that is not positive, shapes that do not fit, a mode that cannot be
            told, or a label out of range.
    """
    r = regions(logits, target, **options)
    miss = beta**2 / (1 + beta**2)
    return r.reduce(r.tversky(1 - miss, miss, smooth / (1 + beta**2)))


@checked(smooth=POSITIVE)
def mcc_loss(
    logits: Tensor | Statistics,
    target: Tensor | None = None,
    *,
    smooth: float = 1e-5,
    **options: Unpack[RegionOptions],
) -> Tensor:
    r"""One minus the Matthews correlation coefficient of each class (Abhishek and Hamarneh,
    arXiv:2010.13454).

    .. math:: 1 - \frac{TP\, TN - FP\, FN}
        {\sqrt{(TP + FP)(TP + FN)(TN + FP)(TN + FN)}}

    Between 0 and 2; 1 is what a guess costs. Unlike Dice it counts the true negatives, and so
    treats a class and its complement alike: for masks that may be larger than what they leave out.

    Args:
        logits: raw scores, ``(B, C, *)``.
        target: class indices ``(B, *)``, or values in [0, 1] of the logits' shape.
        smooth: added to each of the four counts, in pixels. A class that is in every pixel has no
            correlation; it costs 1/2 where it is found.
        **options: see :class:`RegionOptions`.

    Raises:
        ValueError: on a smooth that is not positive, shapes that do not fit, a mode that cannot be
            told, or a label out of range.
    """
    r = regions(logits, target, "negatives", **options)
    counts = (r.tp, r.fp, r.fn, r.negatives - r.fp)
    tp, fp, fn, tn = (count.clamp(min=0) + smooth for count in counts)  # rounding
    scale = ((tp + fp) * (tp + fn)).sqrt() * ((tn + fp) * (tn + fn)).sqrt()
    return r.reduce(1 - (tp * tn - fp * fn) / scale)


@dataclass
class Regions:
    """Soft counts of each class, ``(C,)`` of the batch or ``(B, C)`` of each image."""

    tp: Tensor
    fp: Tensor
    fn: Tensor
    pred: Tensor
    true: Tensor
    valid: Tensor
    class_weights: Tensor | None
    per_image: bool
    absent: str
    reduction: str
    sync: bool
    squares: Tensor
    """``sum p^2 + sum y^2``, where asked for."""
    negatives: Tensor
    """``sum (1 - y)``, where asked for."""

    def dice(self, smooth: float) -> Tensor:
        """One minus the Dice coefficient, without the subtraction."""
        return self.tversky(0.5, 0.5, smooth / 2)

    def tversky(self, alpha: float, beta: float, smooth: float) -> Tensor:
        """One minus the Tversky index, without the subtraction."""
        misses = alpha * self.fp + beta * self.fn
        return _Share.apply(misses, self.tp + smooth)

    def reduce(self, loss: Tensor) -> Tensor:
        """The losses of the classes as the options ask: absent classes, weights, reduction."""
        present = ~(self.true <= 0)  # also where it is NaN, which must show
        weights = present.to(loss.dtype)
        loss = torch.where(present, loss, 0)
        if self.absent == "penalise":
            loss = torch.where(present, loss, divide(self.pred, self.valid))
            weights = torch.ones_like(loss)
        if self.class_weights is not None:
            weights = weights * self.class_weights
        if self.reduction == "none":
            return loss * weights
        total = (loss * weights).sum(-1)
        if self.reduction == "sum":
            return total.sum() * (processes(self.sync) if self.per_image else 1)
        if self.per_image:
            return mean_of_sums(total, weights.sum(-1), per_image=True, sync=self.sync)
        return divide(total, weights.sum(-1))


class _Share(torch.autograd.Function):
    """``part / (part + rest)``, 0 of nothing, with slopes that do not cancel where it is near 1."""

    @staticmethod
    def forward(part: Tensor, rest: Tensor) -> Tensor:
        return divide(part, part + rest)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        part, rest = ctx.saved_tensors
        slope = divide(grad, part + rest)
        return slope * divide(rest, part + rest), -slope * divide(part, part + rest)


def regions(
    logits: Tensor | Statistics,
    target: Tensor | None,
    *more: Need,
    mode: Mode | None = None,
    ignore_index: int | None = None,
    class_weights: Tensor | Sequence[float] | None = None,
    per_image: bool = False,
    absent: str = "skip",
    reduction: str = "mean",
    sync: bool = False,
    validate: bool = False,
    pixel_weight: Tensor | None = None,
) -> Regions:
    """Count, or take the counts that are there, and pool them as asked."""
    s = statistics(
        logits,
        target,
        ["regions", *more],
        mode=mode,
        ignore_index=ignore_index,
        pixel_weight=pixel_weight,
        validate=validate,
    )
    counts = [s.tp, s.fp, s.fn, s.pred, s.true, s.batch.valid()]
    counts.append(s.pred_sq + s.true_sq if "squares" in more else torch.zeros_like(s.true))
    counts.append(s.negatives() if "negatives" in more else torch.zeros_like(s.true))
    pooled = pool(torch.stack(counts), per_image=per_image, sync=sync).unbind()
    tp, fp, fn, pred, true, valid, squares, negatives = pooled
    return Regions(
        tp,
        fp,
        fn,
        pred,
        true,
        valid,
        s.batch.per_class(class_weights),
        per_image,
        absent,
        reduction,
        sync,
        squares,
        negatives,
    )


def pool(counts: Tensor, *, per_image: bool = False, sync: bool = False, **_: Any) -> Tensor:
    """Counts ``(N, B, C)`` as the options ask: ``(N, C)`` of the batch, or of each image."""
    return counts if per_image else world_sum(counts.sum(1), sync)


def region_batch(logits: Tensor, target: Tensor | None, options: RegionOptions) -> Batch:
    """The batch of a loss that counts for itself and leaves the rest to :func:`regions`."""
    known = ("mode", "ignore_index", "pixel_weight", "validate")
    given: Any = {key: value for key, value in options.items() if key in known}
    return segmentation_batch(logits, target, **given)


class RegionLoss(Loss):
    """A loss that is a formula on the counts of each class."""

    common = staticmethod(regions)
    shared = ("mode", "ignore_index", "validate")

    def needs(self) -> list[Need]:
        return ["regions"]


@register("dice", "segmentation")
class DiceLoss(RegionLoss):
    """Module form of :func:`dice_loss`."""

    function = staticmethod(dice_loss)


@register("jaccard", "segmentation")
class JaccardLoss(RegionLoss):
    """Module form of :func:`jaccard_loss`."""

    function = staticmethod(jaccard_loss)


@register("tversky", "segmentation")
class TverskyLoss(RegionLoss):
    """Module form of :func:`tversky_loss`."""

    function = staticmethod(tversky_loss)


@register("focal_tversky", "segmentation")
class FocalTverskyLoss(RegionLoss):
    """Module form of :func:`focal_tversky_loss`."""

    function = staticmethod(focal_tversky_loss)


@register("squared_dice", "segmentation")
class SquaredDiceLoss(RegionLoss):
    """Module form of :func:`squared_dice_loss`."""

    function = staticmethod(squared_dice_loss)

    def needs(self) -> list[Need]:
        return ["regions", "squares"]


@register("generalised_dice", "segmentation")
class GeneralisedDiceLoss(RegionLoss):
    """Module form of :func:`generalised_dice_loss`."""

    function = staticmethod(generalised_dice_loss)


@register("log_cosh_dice", "segmentation")
class LogCoshDiceLoss(RegionLoss):
    """Module form of :func:`log_cosh_dice_loss`."""

    function = staticmethod(log_cosh_dice_loss)


@register("f1", "segmentation")
class F1Loss(RegionLoss):
    """Module form of :func:`f1_loss`."""

    function = staticmethod(f1_loss)


@register("mcc", "segmentation")
class MCCLoss(RegionLoss):
    """Module form of :func:`mcc_loss`."""

    function = staticmethod(mcc_loss)
