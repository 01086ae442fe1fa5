"""Region losses: formulas on the soft counts of each class.

A formula sees ``tp``, ``pred`` and ``true`` (and ``fp``, ``fn``) of each class, pooled over the
batch or of each image, and nothing of softmax, masks or ignored pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypedDict

import torch
from torch import Tensor
from typing_extensions import Unpack

from detseg_losses._core.batch import Batch, segmentation_batch
from detseg_losses._core.blocks import followed, lazy
from detseg_losses._core.checks import POSITIVE, Absent, Mode, checked
from detseg_losses._core.distribution import processes, world_sum
from detseg_losses._core.module import FormulaLoss, options_of, register
from detseg_losses._core.reduction import divide
from detseg_losses._engine.regions import Numbers, tversky_losses
from detseg_losses._engine.statistics import Need, Statistics, ground_truth, measure


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
    logits: Tensor,
    target: Tensor,
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

    Examples:
        >>> logits = torch.tensor([[[4.0, 4, 0, 0, 0], [0, 0, 4, 4, 0], [0, 0, 0, 0, 4]]])  # logits
        >>> target = torch.tensor([[0, 0, 1, 2, 255]])  # the fourth pixel is predicted wrong
        >>> dice_loss(logits, target, ignore_index=255)
        tensor(0.4477)
        >>> dice_loss(logits, target, ignore_index=255, reduction="none")  # of each class
        tensor([0.0267, 0.3492, 0.9670])
    """
    return _region_loss(dice(smooth), logits, target, **options)


@checked()
def jaccard_loss(
    logits: Tensor,
    target: Tensor,
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

    Examples:
        >>> target = torch.tensor([[[0, 0, 1, 1]]])  # one image of one row
        >>> logits = torch.tensor([[[[-3.0, -3.0, 3.0, -3.0]]]])  # half of the object is missing
        >>> jaccard_loss(logits, target)
        tensor(0.5226)
    """
    return _region_loss(jaccard(smooth), logits, target, **options)


@checked()
def tversky_loss(
    logits: Tensor,
    target: Tensor,
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

    Examples:
        >>> target = torch.tensor([[[0, 0, 1, 1]]])  # one image of one row
        >>> logits = torch.tensor([[[[-3.0, -3.0, 3.0, -3.0]]]])  # half of the object is missing
        >>> tversky_loss(logits, target, alpha=0.3, beta=0.7)  # what is missing costs more
        tensor(0.4214)
        >>> tversky_loss(logits, target, alpha=0.7, beta=0.3)
        tensor(0.2681)
    """
    return _region_loss(Tversky(alpha, beta, smooth), logits, target, **options)


@checked(gamma=POSITIVE)
def focal_tversky_loss(
    logits: Tensor,
    target: Tensor,
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

    Examples:
        >>> target = torch.tensor([[[0, 0, 1, 1]]])  # one image of one row
        >>> logits = torch.tensor([[[[-3.0, -3.0, 3.0, -3.0]]]])  # half of the object is missing
        >>> focal_tversky_loss(logits, target, gamma=0.75)
        tensor(0.5231)
    """
    return _region_loss(FocalTversky(alpha, beta, smooth, gamma), logits, target, **options)


@checked()
def squared_dice_loss(
    logits: Tensor,
    target: Tensor,
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

    Examples:
        >>> logits = torch.zeros(1, 1, 8, 8)  # a probability of 0.5 everywhere
        >>> target = torch.full((1, 1, 8, 8), 0.5)  # and annotators who disagree
        >>> squared_dice_loss(logits, target, mode="binary")
        tensor(0.)
        >>> dice_loss(logits, target, mode="binary")
        tensor(0.5000)
    """
    return _region_loss(SquaredDice(smooth), logits, target, **options)


@checked()
def generalised_dice_loss(
    logits: Tensor,
    target: Tensor,
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

    Examples:
        >>> target = torch.tensor([[0, 0, 0, 0, 0, 0, 0, 1]])  # a class of one pixel
        >>> logits = torch.zeros(1, 2, 8)
        >>> generalised_dice_loss(logits, target)
        tensor(0.7812)
    """
    return _region_loss(GeneralisedDice(), logits, target, **options)


@checked()
def log_cosh_dice_loss(
    logits: Tensor,
    target: Tensor,
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

    Examples:
        >>> target = torch.tensor([[[0, 0, 1, 1]]])  # one image of one row
        >>> logits = torch.tensor([[[[-3.0, -3.0, 3.0, -3.0]]]])  # half of the object is missing
        >>> log_cosh_dice_loss(logits, target)
        tensor(0.0613)
    """
    return _region_loss(LogCoshDice(smooth), logits, target, **options)


@checked(beta=POSITIVE)
def f1_loss(
    logits: Tensor,
    target: Tensor,
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

    Examples:
        >>> target = torch.tensor([[[0, 0, 1, 1]]])  # one image of one row
        >>> logits = torch.tensor([[[[-3.0, -3.0, 3.0, -3.0]]]])  # half of the object is missing
        >>> f1_loss(logits, target, beta=2)  # recall matters twice as much as precision
        tensor(0.4502)
    """
    return _region_loss(f_measure(beta, smooth), logits, target, **options)


@checked(smooth=POSITIVE)
def mcc_loss(
    logits: Tensor,
    target: Tensor,
    *,
    smooth: float = 1e-5,
    **options: Unpack[RegionOptions],
) -> Tensor:
    r"""One minus the Matthews correlation of each class (Abhishek and Hamarneh, arXiv:2010.13454).

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

    Examples:
        >>> target = torch.tensor([[[0, 0, 1, 1]]])  # one image of one row
        >>> logits = torch.tensor([[[[-3.0, -3.0, 3.0, -3.0]]]])  # half of the object is missing
        >>> mcc_loss(logits, target)
        tensor(0.4925)
        >>> mcc_loss(torch.zeros(1, 1, 1, 4), target)  # a guess
        tensor(1.)
    """
    return _region_loss(MCC(smooth), logits, target, **options)


class RegionFormula:
    """A loss of each class as a formula on its counts. Two with the same numbers are equal."""

    squares: ClassVar[bool] = False
    """Whether it asks for sums of squares."""

    def of_classes(self, r: Regions) -> Tensor:
        """The losses ``(b, C)``."""
        raise NotImplementedError

    def weights(self, r: Regions) -> Tensor:
        """What each class counts in the mean, ``(b, C)``."""
        return r.weights

    def needs(self) -> list[Need]:
        return ["regions", "squares"] if self.squares else ["regions"]


@dataclass(frozen=True)
class Tversky(RegionFormula):
    alpha: float
    beta: float
    smooth: float

    def of_classes(self, r: Regions) -> Tensor:
        return _share(self.alpha * r.fp + self.beta * r.fn, r.tp + self.smooth)


def dice(smooth: float) -> Tversky:
    """``2 TP + s`` over ``2 TP + FP + FN + s``."""
    return Tversky(0.5, 0.5, smooth / 2)


def jaccard(smooth: float) -> Tversky:
    """``TP + s`` over ``TP + FP + FN + s``."""
    return Tversky(1, 1, smooth)


def f_measure(beta: float, smooth: float) -> Tversky:
    """The F-measure as a Tversky index."""
    miss = beta**2 / (1 + beta**2)
    return Tversky(1 - miss, miss, smooth / (1 + beta**2))


@dataclass(frozen=True)
class FocalTversky(Tversky):
    gamma: float

    def of_classes(self, r: Regions) -> Tensor:
        loss = super().of_classes(r)
        # The slope at 0 is infinite for gamma < 1: a perfect class costs 0 and has no gradient.
        tiny = torch.finfo(loss.dtype).eps
        return torch.where(loss > tiny, loss.clamp(min=tiny).pow(self.gamma), 0)


@dataclass(frozen=True)
class LogCoshDice(RegionFormula):
    smooth: float

    def of_classes(self, r: Regions) -> Tensor:
        # cosh d = 1 + 2 sinh(d / 2)^2, without rounding to 1 where d is small
        return torch.log1p(2 * (dice(self.smooth).of_classes(r) / 2).sinh().square())


@dataclass(frozen=True)
class SquaredDice(RegionFormula):
    smooth: float
    squares = True

    def of_classes(self, r: Regions) -> Tensor:
        return 1 - divide(2 * r.tp + self.smooth, r.squares + self.smooth)


@dataclass(frozen=True)
class GeneralisedDice(RegionFormula):
    def of_classes(self, r: Regions) -> Tensor:
        # Relative to the smallest class that is present, so that no square is out of range.
        least = r.true.where(r.present, torch.inf).amin(-1, keepdim=True)
        weights = torch.where(r.present, least / r.true, 0).square()
        if r.class_weights is not None:
            weights = weights * r.class_weights
        wrong = (weights * (r.fp + r.fn)).sum(-1, keepdim=True)
        right = (weights * 2 * r.tp).sum(-1, keepdim=True)
        return _share(wrong, right).expand_as(r.tp)

    def weights(self, r: Regions) -> Tensor:
        # The class weights of what is present are in the ratio already.
        return torch.where(r.present, 1, r.weights)


@dataclass(frozen=True)
class MCC(RegionFormula):
    smooth: float

    def of_classes(self, r: Regions) -> Tensor:
        counts = (r.tp, r.fp, r.fn, r.negatives - r.fp)
        tp, fp, fn, tn = (count.clamp(min=0) + self.smooth for count in counts)  # rounding
        scale = ((tp + fp) * (tp + fn)).sqrt() * ((tn + fp) * (tn + fn)).sqrt()
        return 1 - (tp * tn - fp * fn) / scale


def _share(part: Tensor, rest: Tensor) -> Tensor:
    """``part / (part + rest)``, 0 of nothing."""
    return divide(part, part + rest) if followed() else _Share.apply(part, rest)


class _Share(torch.autograd.Function):
    """The same with slopes that do not cancel where it is near 1."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, rest: Tensor) -> Tensor:
        ctx.save_for_backward(part, rest)
        return divide(part, part + rest)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        part, rest = ctx.saved_tensors
        slope = divide(grad, part + rest)
        return slope * divide(rest, part + rest), -slope * divide(part, part + rest)


class Regions:
    """Soft counts of each class, and what becomes of the losses of the classes.

    They are of each image, or pooled to one, ``(b, C)``.

    Attributes:
        counts: FP, TP, FN, the ground truth and perhaps sums of squares, ``(4 or 5, b, C)``.
    """

    def __init__(
        self,
        statistics: Statistics,
        *,
        class_weights: Tensor | Sequence[float] | None = None,
        per_image: bool = False,
        absent: str = "skip",
        reduction: str = "mean",
        sync: bool = False,
        **_: Any,  # the options of the batch
    ) -> None:
        self.batch = statistics.batch
        self.class_weights = self.batch.per_class(class_weights)
        self.per_image, self.sync = per_image, sync
        self.absent, self.reduction = absent, reduction
        self.counts = self.pool(statistics.counts)

    def pool(self, counts: Tensor) -> Tensor:
        """Counts ``(*, B, C)`` of each image, or of the batch of all processes, ``(*, 1, C)``."""
        return counts if self.per_image else world_sum(counts.sum(-2, keepdim=True), self.sync)

    @property
    def fp(self) -> Tensor:
        return self.counts[0]

    @property
    def tp(self) -> Tensor:
        return self.counts[1]

    @property
    def fn(self) -> Tensor:
        return self.counts[2]

    @property
    def true(self) -> Tensor:
        return self.counts[3]

    @property
    def squares(self) -> Tensor:
        """``sum p^2 + sum y^2``."""
        return self.counts[4]

    @lazy
    def valid(self) -> Tensor:
        return self.pool(self.batch.valid())

    @lazy
    def negatives(self) -> Tensor:
        """The count of what is not of each class, ``sum (1 - y)``, without subtracting counts."""
        if self.batch.dense:
            rest = replace(self.batch, target=1 - self.batch.target.to(self.batch.dtype))
            return self.pool(ground_truth(rest))
        classes = self.true.shape[-1]
        others = 1 - torch.eye(classes, dtype=self.true.dtype, device=self.true.device)
        return (self.true.unsqueeze(-2) * others).sum(-1)  # autocast would round a matrix product

    @lazy
    def present(self) -> Tensor:
        return ~(self.true <= 0)  # also where it is NaN, which must show

    @lazy
    def weights(self) -> Tensor:
        """What each class counts in the mean."""
        weights = torch.ones_like(self.true) if self.absent == "penalise" else self.true.sign()
        return weights if self.class_weights is None else weights * self.class_weights

    def share(self, weights: Tensor) -> Tensor:
        """What the losses of the classes are multiplied by in the result, which is their sum."""
        if self.reduction == "none":
            return weights
        if self.reduction == "sum":
            return weights * processes(self.sync) if self.per_image else weights
        total = weights.sum(-1, keepdim=True)
        # Without class weights it is a number of classes, and only none must not divide.
        counted = self.class_weights is None
        share = weights / total.clamp(min=1) if counted else divide(weights, total)
        if not self.per_image:
            return share
        images = weights.new_full((), len(weights))
        return share * (processes(self.sync) / world_sum(images, self.sync))

    def reduce(self, loss: Tensor, weights: Tensor | None = None) -> Tensor:
        """The losses of the classes ``(b, C)`` as the options ask."""
        instead = divide(self.tp + self.fp, self.valid) if self.absent == "penalise" else 0
        loss = torch.where(self.present, loss, instead)
        loss = loss * self.share(self.weights if weights is None else weights)
        if self.reduction == "none":
            return loss if self.per_image else loss.squeeze(0)
        return loss.sum()

    def losses(self, formulas: Sequence[RegionFormula]) -> list[Tensor]:
        """The loss of each formula, those of the Tversky family in closed form."""
        closed = self.reduction != "none" and self.absent == "skip"
        family = [f for f in formulas if closed and type(f) is Tversky]
        values: list[Tensor] = []
        if family:
            share = self.share(self.weights)
            values = list(tversky_losses(self.counts, _numbers(family, share), share).split(1))
        return [
            values.pop(0).squeeze(0)
            if f in family
            else self.reduce(f.of_classes(self), f.weights(self))
            for f in formulas
        ]


def _numbers(family: Sequence[Tversky], like: Tensor) -> Numbers:
    rows = [(formula.alpha, formula.beta, formula.smooth) for formula in family]
    if len(rows) == 1:
        return rows[0]
    columns = torch.tensor(rows, dtype=like.dtype).t()[..., None, None]
    return columns.to(like.device, non_blocking=True)


def region_batch(logits: Tensor, target: Tensor, options: RegionOptions) -> Batch:
    """The batch of a loss that counts for itself and leaves the rest to :class:`Regions`."""
    if unknown := options.keys() - RegionOptions.__annotations__:
        raise TypeError(
            f"there is no option {min(unknown)!r}; there are "
            + ", ".join(sorted(RegionOptions.__annotations__))
        )
    known = ("mode", "ignore_index", "pixel_weight", "validate")
    given: Any = {key: value for key, value in options.items() if key in known}
    return segmentation_batch(logits, target, **given)


def _region_loss(
    formula: RegionFormula,
    logits: Tensor,
    target: Tensor,
    *,
    mode: Mode | None = None,
    ignore_index: int | None = None,
    class_weights: Tensor | Sequence[float] | None = None,
    per_image: bool = False,
    absent: Absent = "skip",
    reduction: str = "mean",
    sync: bool = False,
    validate: bool = False,
    pixel_weight: Tensor | None = None,
) -> Tensor:
    batch = segmentation_batch(
        logits,
        target,
        mode=mode,
        ignore_index=ignore_index,
        pixel_weight=pixel_weight,
        validate=validate,
    )
    regions = Regions(
        measure(batch, formula.needs()),
        class_weights=class_weights,
        per_image=per_image,
        absent=absent,
        reduction=reduction,
        sync=sync,
    )
    return regions.losses([formula])[0]


class RegionLoss(FormulaLoss):
    """A loss that is a formula on the counts of each class."""

    common = staticmethod(_region_loss)
    shared = ("mode", "ignore_index", "validate")

    def pooled(self) -> tuple[Any, ...]:
        """What two losses agree on that count in the same way."""
        options = self.options
        names = ("per_image", "absent", "reduction", "sync")
        return *(options[name] for name in names), options["class_weights"]

    def regions(self, statistics: Statistics) -> Regions:
        return Regions(statistics, **self.options)

    def evaluate(self, statistics: Statistics) -> Tensor:
        return self.regions(statistics).losses([self.made()])[0]


@register("dice", "segmentation")
class DiceLoss(RegionLoss):
    formula = staticmethod(dice)

    @options_of(dice_loss)
    def __init__(self) -> None:
        """Module form of :func:`dice_loss`."""


@register("jaccard", "segmentation")
class JaccardLoss(RegionLoss):
    formula = staticmethod(jaccard)

    @options_of(jaccard_loss)
    def __init__(self) -> None:
        """Module form of :func:`jaccard_loss`."""


@register("tversky", "segmentation")
class TverskyLoss(RegionLoss):
    formula = Tversky

    @options_of(tversky_loss)
    def __init__(self) -> None:
        """Module form of :func:`tversky_loss`."""


@register("focal_tversky", "segmentation")
class FocalTverskyLoss(RegionLoss):
    formula = FocalTversky

    @options_of(focal_tversky_loss)
    def __init__(self) -> None:
        """Module form of :func:`focal_tversky_loss`."""


@register("squared_dice", "segmentation")
class SquaredDiceLoss(RegionLoss):
    formula = SquaredDice

    @options_of(squared_dice_loss)
    def __init__(self) -> None:
        """Module form of :func:`squared_dice_loss`."""


@register("generalised_dice", "segmentation")
class GeneralisedDiceLoss(RegionLoss):
    formula = GeneralisedDice

    @options_of(generalised_dice_loss)
    def __init__(self) -> None:
        """Module form of :func:`generalised_dice_loss`."""


@register("log_cosh_dice", "segmentation")
class LogCoshDiceLoss(RegionLoss):
    formula = LogCoshDice

    @options_of(log_cosh_dice_loss)
    def __init__(self) -> None:
        """Module form of :func:`log_cosh_dice_loss`."""


@register("f1", "segmentation")
class F1Loss(RegionLoss):
    formula = staticmethod(f_measure)

    @options_of(f1_loss)
    def __init__(self) -> None:
        """Module form of :func:`f1_loss`."""


@register("mcc", "segmentation")
class MCCLoss(RegionLoss):
    formula = MCC

    @options_of(mcc_loss)
    def __init__(self) -> None:
        """Module form of :func:`mcc_loss`."""
