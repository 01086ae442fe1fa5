"""Pixel losses: formulas on the negative log likelihood of each pixel under a softmax."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypedDict

import torch
from torch import Tensor
from typing_extensions import Unpack

from detseg_losses._core.batch import Batch, segmentation_batch
from detseg_losses._core.blocks import followed
from detseg_losses._core.checks import FACTORS, Mode, checked
from detseg_losses._core.distribution import gather, processes
from detseg_losses._core.module import FormulaLoss, options_of, register
from detseg_losses._core.reduction import as_weights, mean_of_sums
from detseg_losses._engine.statistics import Need, Statistics, measure


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


@checked()
def cross_entropy_loss(
    logits: Tensor,
    target: Tensor,
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

    Examples:
        >>> logits = torch.tensor([[[2.0, 0.0, 1.0], [0.0, 1.0, 3.0]]])  # two classes, three pixels
        >>> target = torch.tensor([[0, 1, 255]])
        >>> cross_entropy_loss(logits, target, ignore_index=255)
        tensor(0.2201)
        >>> cross_entropy_loss(logits, target, ignore_index=255, class_weights=[1.0, 3.0])
        tensor(0.2667)
    """
    return _pixel_loss(CrossEntropy(label_smoothing), logits, target, **options)


@checked(alpha=FACTORS)
def softmax_focal_loss(
    logits: Tensor,
    target: Tensor,
    *,
    alpha: Tensor | Sequence[float] | float = 1.0,
    gamma: float = 2.0,
    **options: Unpack[PixelOptions],
) -> Tensor:
    r"""Focal loss of a softmax over classes (Lin et al., arXiv:1708.02002, on one softmax).

    .. math:: -\alpha_t (1 - p_t)^\gamma \log p_t

    For one class a pixel where most pixels are easy. Not the sum of sigmoid focal losses that is
    elsewhere called multiclass focal loss: with ``gamma=0`` it is the cross entropy.

    Args:
        logits: raw scores, ``(B, C, *)`` or ``(N, C)``.
        target: class indices ``(B, *)``.
        alpha: factor of the loss: a number, or one for each class. Unlike ``class_weights``, which
            a mean divides by, it leaves the mean that over the pixels.
        gamma: how fast the loss of what is well classified falls.
        **options: see :class:`PixelOptions`.

    Raises:
        ValueError: on a single channel (use ``focal``), a target that is not class indices, a
            negative alpha or gamma, shapes that do not fit, or a label out of range.

    Examples:
        >>> logits = torch.tensor([[[2.0, 0.0, 1.0], [0.0, 1.0, 3.0]]])  # two classes, three pixels
        >>> target = torch.tensor([[0, 1, 0]])
        >>> softmax_focal_loss(logits, target, reduction="none")  # the last pixel is wrong
        tensor([[0.0018, 0.0227, 1.6501]])
    """
    return _pixel_loss(Focal(as_weights(alpha), gamma), logits, target, **options)


@checked()
def poly_cross_entropy_loss(
    logits: Tensor,
    target: Tensor,
    *,
    epsilon: float = 1.0,
    **options: Unpack[PixelOptions],
) -> Tensor:
    r"""Poly-1 cross entropy (Leng et al., PolyLoss, arXiv:2204.12511).

    Cross entropy with another weight of its leading term, one number to tune to a data set: above
    0 it insists on confident predictions, below 0 it asks for less confidence.

    .. math:: -\log p_t + \epsilon (1 - p_t)

    Args:
        logits: raw scores, ``(B, C, *)`` or ``(N, C)``.
        target: class indices ``(B, *)``.
        epsilon: what is added to the leading coefficient, which is 1 in the cross entropy.
        **options: see :class:`PixelOptions`.

    Raises:
        ValueError: on an epsilon below -1 (the loss would reward mistakes), a single channel, a
            target that is not class indices, shapes that do not fit, or a label out of range.

    Examples:
        >>> logits = torch.tensor([[2.0, 0.0], [0.0, 1.0]])  # two rows, two classes
        >>> target = torch.tensor([0, 1])
        >>> poly_cross_entropy_loss(logits, target, epsilon=1.0)
        tensor(0.4142)
    """
    return _pixel_loss(Poly(epsilon), logits, target, **options)


@checked()
def symmetric_cross_entropy_loss(
    logits: Tensor,
    target: Tensor,
    *,
    alpha: float = 0.1,
    beta: float = 1.0,
    **options: Unpack[PixelOptions],
) -> Tensor:
    r"""Symmetric cross entropy (Wang et al., arXiv:1908.06112).

    For noisy labels: the cross entropy learns fast, and wrong labels too; the reverse cross
    entropy, of the target under the prediction, is bounded and tolerates them.

    .. math:: -\alpha \log p_t - \beta \sum_c p_c \log y_c = -\alpha \log p_t + 4 \beta (1 - p_t)

    with -4 for the logarithm of 0, as in the paper; another value is another ``beta``.

    Args:
        logits: raw scores, ``(B, C, *)`` or ``(N, C)``.
        target: class indices ``(B, *)``.
        alpha: weight of the cross entropy.
        beta: weight of the reverse cross entropy.
        **options: see :class:`PixelOptions`.

    Raises:
        ValueError: on a negative weight, a single channel, a target that is not class indices,
            shapes that do not fit, or a label out of range.

    Examples:
        >>> logits = torch.tensor([[8.0, 0.0]])  # sure of class 0
        >>> symmetric_cross_entropy_loss(logits, torch.tensor([0]))
        tensor(0.0014)
        >>> symmetric_cross_entropy_loss(logits, torch.tensor([1]))  # is the label wrong?
        tensor(4.7987)
    """
    return _pixel_loss(Symmetric(alpha, beta), logits, target, **options)


@checked()
def ohem_cross_entropy_loss(
    logits: Tensor,
    target: Tensor,
    *,
    fraction: float = 0.1,
    thresh: float | None = 0.7,
    **options: Unpack[PixelOptions],
) -> Tensor:
    r"""Cross entropy of the hardest pixels (Wu et al., online bootstrapping, arXiv:1605.06885).

    For scenes where most pixels are soon well classified and their mean hides thin or rare
    things.

    .. math:: \operatorname{mean}\{-\log p_t : p_t \le \max(\tau, p_{(k)})\}

    where :math:`p_{(k)}` is the k-th smallest :math:`p_t` of the batch (with ``per_image`` of the
    image), k being the ``fraction`` of all its pixels. Those left out come last and never count.
    With ``sync`` the batch is that of all processes. Pixels are chosen by likelihood (with
    probabilities for a target by cross entropy, class weights included); class and pixel weights
    act on those that are kept. A mean is over those, a map is 0 elsewhere.

    Args:
        logits: raw scores, ``(B, C, *)`` or ``(N, C)``.
        target: class indices ``(B, *)``, or probabilities of the logits' shape.
        fraction: the share of the pixels that is kept at least.
        thresh: the likelihood up to which a pixel is kept, too, however many there are. None: the
            hardest ``fraction`` alone, the top-k cross entropy.
        **options: see :class:`PixelOptions`.

    Raises:
        ValueError: on a fraction or threshold outside of (0, 1], a single channel (use ``bce``),
            shapes that do not fit, a mode that cannot be told, or a label out of range.

    Examples:
        >>> logits = torch.tensor([[[4.0, 3.0, 1.0, 0.0], [0.0, 0.0, 0.0, 2.0]]])  # wrong at last
        >>> target = torch.tensor([[0, 0, 0, 0]])
        >>> ohem_cross_entropy_loss(logits, target, fraction=0.5, thresh=None, reduction="none")
        tensor([[0.0000, 0.0000, 0.3133, 2.1269]])
    """
    return _pixel_loss(OHEM(fraction, thresh), logits, target, **options)


class PixelFormula:
    """A loss of each pixel, from its negative log likelihood."""

    def needs(self) -> list[Need]:
        return ["nll"]

    def loss(self, s: Pixels) -> Tensor:
        """The loss of the batch."""
        raise NotImplementedError


@dataclass(frozen=True)
class CrossEntropy(PixelFormula):
    label_smoothing: float

    def needs(self) -> list[Need]:
        return ["nll", "smooth"] if self.label_smoothing else ["nll"]

    def loss(self, s: Pixels) -> Tensor:
        loss = s.weighted(s.nll)
        if self.label_smoothing:
            share = self.label_smoothing / s.batch.logits.shape[1]
            loss = loss * (1 - self.label_smoothing) + s.smooth * share
        return s.reduce(loss)


@dataclass(frozen=True)
class OHEM(PixelFormula):
    fraction: float
    thresh: float | None

    def loss(self, s: Pixels) -> Tensor:
        return s.reduce(s.weighted(s.nll), s.hardest(self.fraction, self.thresh))


class LikelihoodFormula(PixelFormula):
    """A loss as a function of the negative log likelihood n of a class index."""

    name: ClassVar[str]

    def value(self, n: Tensor) -> Tensor:
        raise NotImplementedError

    def slope(self, n: Tensor) -> Tensor:
        raise NotImplementedError

    def loss(self, s: Pixels) -> Tensor:
        return s.reduce(s.weighted(self.values(s)))

    def values(self, s: Pixels) -> Tensor:
        if s.batch.dense:
            raise ValueError(f"{self.name!r} needs class indices; use 'ce'")
        return self.value(s.nll) if followed() else _Evaluate.apply(s.nll, self)


@dataclass(frozen=True)
class Focal(LikelihoodFormula):
    alpha: Tensor | float
    gamma: float
    name = "softmax_focal"

    def value(self, n: Tensor) -> Tensor:
        return missed(n).pow(self.gamma) * n

    def slope(self, n: Tensor) -> Tensor:
        m = missed(n)
        base = m.clamp(min=torch.finfo(m.dtype).tiny)  # a power below 0 follows
        return base.pow(self.gamma - 1) * torch.addcmul(m, 1 - m, n, value=self.gamma)

    def loss(self, s: Pixels) -> Tensor:
        loss = self.values(s)
        if isinstance(self.alpha, Tensor):
            return s.reduce(s.weighted(loss, self.alpha))
        return s.reduce(s.weighted(loss * self.alpha))


class Mixture(LikelihoodFormula):
    """The cross entropy and the probability of a wrong answer, each with a factor."""

    def factors(self) -> tuple[float, float]:
        raise NotImplementedError

    def value(self, n: Tensor) -> Tensor:
        cross_entropy, wrong = self.factors()
        return cross_entropy * n + wrong * missed(n)

    def slope(self, n: Tensor) -> Tensor:
        cross_entropy, wrong = self.factors()
        return cross_entropy + wrong * torch.exp(-n)


@dataclass(frozen=True)
class Poly(Mixture):
    epsilon: float
    name = "poly"

    def factors(self) -> tuple[float, float]:
        return 1.0, self.epsilon


@dataclass(frozen=True)
class Symmetric(Mixture):
    alpha: float
    beta: float
    name = "symmetric_ce"

    def factors(self) -> tuple[float, float]:
        return self.alpha, 4 * self.beta


def missed(n: Tensor) -> Tensor:
    """``1 - p_t`` without cancellation."""
    return -torch.expm1(-n)


class _Evaluate(torch.autograd.Function):
    """A formula on a map of which nothing but the map itself is kept for backward."""

    @staticmethod
    def forward(ctx: Any, nll: Tensor, formula: LikelihoodFormula) -> Tensor:
        ctx.formula = formula
        ctx.save_for_backward(nll)
        return formula.value(nll)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (nll,) = ctx.saved_tensors
        return ctx.formula.slope(nll) * grad, None


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

    def weighted(self, values: Tensor, alpha: Tensor | None = None) -> Tensor:
        """Values times the weight of each pixel's class, and times that class's alpha."""
        factor = self.class_weight
        if alpha is not None:
            alpha = self.batch.per_class(alpha, "alpha").expand(self.batch.logits.shape[1])
            alpha = alpha[self.batch.labels()]
            factor = alpha if factor is None else alpha * factor  # autograd keeps this alone
        return values if factor is None else values * factor

    def hardest(self, fraction: float, thresh: float | None) -> Tensor:
        """Which pixels are the hardest ``fraction``, or less likely than ``thresh``."""
        weight = self.batch.weight
        nll = self.nll.detach()
        if weight is not None:
            nll = nll.masked_fill(weight.squeeze(1) == 0, -1)
        parts = [nll] if self.per_image else gather(nll.reshape(1, -1), self.sync)[0]
        rows = torch.cat(parts, 1)
        if not rows.shape[1]:
            return torch.ones_like(nll, dtype=torch.bool)
        # A number known without a look at the pixels, for which a device would have to wait.
        count = math.ceil(fraction * rows.shape[1])
        least = rows.topk(count, sorted=False).values.amin(1, keepdim=True)
        if thresh is not None:
            least = least.clamp(max=-math.log(thresh))
        return nll >= least

    def reduce(self, loss: Tensor, kept: Tensor | None = None) -> Tensor:
        """The losses of the pixels as the options ask: pixel weights and reduction.

        ``kept`` tells which pixels count.
        """
        weight = None if self.batch.weight is None else self.batch.weight.squeeze(1)
        if kept is not None:
            loss = loss * kept
        if weight is not None and weight.dtype != torch.bool:  # what is ignored is 0 already
            loss = loss * weight
        if self.reduction == "none":
            return self.batch.pixels(loss)
        if self.reduction == "sum":
            return loss.sum() * processes(self.sync)
        counts: Any = loss.shape[1] if self.per_image else loss.numel()
        weights = [each for each in (self.class_weight, weight, kept) if each is not None]
        if weights:
            product = self._rows(functools.reduce(operator.mul, weights))
            counts = product.sum(-1, dtype=loss.dtype if product.is_floating_point() else None)
        sums = self._rows(loss).sum(-1)
        return mean_of_sums(sums, counts, per_image=self.per_image, sync=self.sync)

    def _rows(self, values: Tensor) -> Tensor:
        """A row for each image, or for all together."""
        return values if self.per_image else values.reshape(1, -1)


def _pixel_loss(
    formula: PixelFormula,
    logits: Tensor,
    target: Tensor,
    *,
    mode: Mode | None = None,
    ignore_index: int | None = None,
    class_weights: Tensor | Sequence[float] | None = None,
    per_image: bool = False,
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
    statistics = measure(batch, formula.needs(), class_weights)
    return formula.loss(
        pixels(
            statistics,
            class_weights=class_weights,
            per_image=per_image,
            reduction=reduction,
            sync=sync,
        )
    )


def pixels(
    statistics: Statistics,
    *,
    class_weights: Tensor | Sequence[float] | None,
    per_image: bool,
    reduction: str,
    sync: bool,
    **_: Any,
) -> Pixels:
    """The maps of a batch with the options of a loss on them."""
    batch = statistics.batch
    class_weight = None
    if class_weights is not None and not batch.dense:
        class_weight = batch.per_class(class_weights)[batch.labels()]
    return Pixels(statistics, class_weight, per_image, reduction, sync)


class PixelLoss(FormulaLoss):
    """A loss that is a formula on the likelihood of each pixel."""

    common = staticmethod(_pixel_loss)
    shared = ("mode", "ignore_index", "validate", "class_weights")

    def evaluate(self, statistics: Statistics) -> Tensor:
        return self.made().loss(pixels(statistics, **self.options))


@register("ce", "segmentation")
class CrossEntropyLoss(PixelLoss):
    formula = CrossEntropy

    @options_of(cross_entropy_loss)
    def __init__(self) -> None:
        """Module form of :func:`cross_entropy_loss`."""


@register("softmax_focal", "segmentation")
class SoftmaxFocalLoss(PixelLoss):
    formula = Focal

    @options_of(softmax_focal_loss)
    def __init__(self) -> None:
        """Module form of :func:`softmax_focal_loss`."""


@register("poly", "segmentation")
class PolyCrossEntropyLoss(PixelLoss):
    formula = Poly

    @options_of(poly_cross_entropy_loss)
    def __init__(self) -> None:
        """Module form of :func:`poly_cross_entropy_loss`."""


@register("symmetric_ce", "segmentation")
class SymmetricCrossEntropyLoss(PixelLoss):
    formula = Symmetric

    @options_of(symmetric_cross_entropy_loss)
    def __init__(self) -> None:
        """Module form of :func:`symmetric_cross_entropy_loss`."""


@register("ohem", "segmentation")
class OHEMCrossEntropyLoss(PixelLoss):
    formula = OHEM

    @options_of(ohem_cross_entropy_loss)
    def __init__(self) -> None:
        """Module form of :func:`ohem_cross_entropy_loss`."""
