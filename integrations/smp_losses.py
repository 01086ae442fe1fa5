r"""Losses with the names, arguments and values of segmentation-models-pytorch, on our engines.

To change a pipeline, change one import: ``from detseg_losses.integrations.smp import DiceLoss`` in
place of ``from segmentation_models_pytorch.losses import DiceLoss``. Value and gradient are those
of SMP wherever these are defined and finite, its peculiarities included. For backward they keep
the logits and the target, and no further map of that size (but SoftBCE the factors that it is
given, and LovaszLoss and MCCLoss what they need). This file needs torch only.

================================  ========================  =====================  ================
\                                 SMP 0.6                   these classes          our own losses
================================  ========================  =====================  ================
classes that the target lacks     cost 0, and count in the  as SMP                 left out, or
                                  mean                                             penalised
ignored pixels in SoftCE, SoftBCE cost 0, and count in the  as SMP                 left out
                                  mean
Focal, multiclass                 sum of sigmoids           as SMP                 ``softmax_focal``
Tversky's gamma                   after the mean            as SMP                 of each class
soft targets in region losses     TP = sum of min(p, y)     as SMP                 TP = sum of p y
soft targets in Focal             1 - p_t = 1 - exp(-bce)   as SMP                 mixture of both
half precision                    NaN or coarse sums        float32                float32
uint8, int32 masks                often a TypeError         accepted               accepted
label out of range                an unnamed index error,   ValueError naming it   ValueError
                                  or a silent wrong value
masks (B, H, W) or (B, 1, H, W)   SoftBCE: same shape only  both                   both
``SoftCrossEntropyLoss()``        TypeError                 no smoothing           ``ce``
Focal, multiclass, probabilities  log p as a sigmoid's      log(p / (1 - p)), as   logits only
                                  logit                     in the other modes
Focal, multilabel, ignore_index   IndexError                left out               left out
Focal, class_weights, not reduced RuntimeError              weighted mean          ``class_weights``
everything ignored, Focal         NaN                       0                      0
gradient of Focal, gamma < 1      NaN where saturated       finite                 finite
gradient of Tversky, gamma < 1    NaN at a loss of 0        0                      0
SoftCE of a single channel        always 0                  ValueError: use bce    ValueError
Lovasz, multilabel                all classes are one       as SMP                 each class
Lovasz, binary, an empty mask     the worst pixel's hinge   as SMP                 left out, or
                                                                                   penalised
Lovasz, ``from_logits=False``     has no effect             as SMP                 logits only
Lovasz, everything ignored        no number, or an error    0                      0
MCC                               of probabilities, of the  as SMP                 of logits, of
                                  whole batch                                      each class
================================  ========================  =====================  ================

Losses come back in float32 (float64 for float64), also where the logits are half precision.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.loss import _Loss

from detseg_losses._core.batch import Batch, Mode, segmentation_batch
from detseg_losses._core.blocks import compute_dtype
from detseg_losses._core.checks import Reduction, check_choice
from detseg_losses._core.reduction import divide, reduce
from detseg_losses._engine.sigmoid import (
    Formula,
    Label,
    SigmoidWants,
    cross_entropy,
    missed,
    mix,
    power,
    sigmoid_statistics,
)
from detseg_losses._engine.statistics import ground_truth, measure
from detseg_losses.losses.lovasz import lovasz_loss
from detseg_losses.losses.sigmoid import CrossEntropy
from detseg_losses.losses.softmax import cross_entropy_loss

BINARY_MODE: Mode = "binary"
MULTICLASS_MODE: Mode = "multiclass"
MULTILABEL_MODE: Mode = "multilabel"

FocalReduction = Literal["mean", "sum", "batchwise_mean", "none", None]


class _RegionLoss(_Loss):
    """One minus a Tversky index of the batch, or its negative logarithm."""

    alpha = 0.5
    beta = 0.5
    gamma = 1.0

    def __init__(
        self,
        mode: Mode,
        classes: Sequence[int] | None = None,
        log_loss: bool = False,
        from_logits: bool = True,
        smooth: float = 0.0,
        ignore_index: int | None = None,
        eps: float = 1e-7,
        class_weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if mode == BINARY_MODE and classes is not None:
            raise ValueError("mode='binary' has one class; leave classes out")
        self.mode = mode
        self.classes = None if classes is None else torch.as_tensor(classes)
        self.log_loss = log_loss
        self.from_logits = from_logits
        self.smooth = smooth
        self.ignore_index = ignore_index
        self.eps = eps
        self.class_weights = _class_weights(mode, class_weights)

    def forward(self, y_pred: Tensor, y_true: Tensor) -> Tensor:
        """The loss.

        Args:
            y_pred: logits, or probabilities where ``from_logits=False``, ``(B, C, *)``.
            y_true: class indices ``(B, *)`` or ``(B, 1, *)``; in mode ``"multilabel"`` values in
                [0, 1] ``(B, C, *)``.

        Raises:
            ValueError: on shapes that do not fit, or a label out of range.
        """
        tp, pred, true = (count.sum(0) for count in self._counts(y_pred, y_true))
        index = tp + self.alpha * (pred - tp) + self.beta * (true - tp) + self.smooth
        score = (tp + self.smooth) / index.clamp_min(self.eps)
        loss = -score.clamp_min(self.eps).log() if self.log_loss else 1 - score
        mean = _mean_of_classes(loss * (true > 0), self.class_weights, self.classes)
        mean = mean.clamp(min=0)  # rounding
        none = mean == 0  # where the slope of the power may be infinite
        return mean.masked_fill(none, 1).pow(self.gamma).masked_fill(none, 0)

    def _counts(self, y_pred: Tensor, y_true: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """True positives, what is predicted and what is there, ``(B, C)`` each."""
        logits, target = _flatten(y_pred, y_true, self.mode)
        if not self.from_logits:
            return self._counts_of_probabilities(logits, target)
        batch = segmentation_batch(logits, target, mode=self.mode, ignore_index=self.ignore_index)
        if self.mode == MULTICLASS_MODE:
            fp, tp, _, true = measure(batch, ["regions"]).counts
            return tp, tp + fp, true
        sums = measure(batch, [Overlap(), Predicted()]).sums
        return sums[Overlap()], sums[Predicted()], ground_truth(batch)

    def _counts_of_probabilities(self, p: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        batch = segmentation_batch(p, target, mode=self.mode, ignore_index=self.ignore_index)
        y = batch.target
        if not batch.dense:
            classes = torch.arange(p.shape[1], device=p.device).unsqueeze(1)
            y = batch.labels().unsqueeze(1) == classes
        y = y.to(batch.dtype)
        if batch.weight is not None:
            p, y = p.masked_fill(~batch.weight, 0), y.masked_fill(~batch.weight, 0)
        return torch.minimum(p, y).sum(-1), p.sum(-1, dtype=batch.dtype), y.sum(-1)


class DiceLoss(_RegionLoss):
    """Dice loss of the batch, as ``segmentation_models_pytorch.losses.DiceLoss``.

    Args:
        mode: ``"binary"``, ``"multiclass"`` or ``"multilabel"``.
        classes: the classes in the mean; all by default.
        log_loss: the negative logarithm of the score, instead of one minus it.
        from_logits: whether logits are given, and not probabilities.
        smooth: added to numerator and denominator.
        ignore_index: label of the pixels that are left out of every sum.
        eps: the least denominator, and the least score under the logarithm.
        class_weights: weights in the mean over classes; not in mode ``"binary"``.

    Raises:
        ValueError: on a mode that does not exist, or options that have no meaning in it.
    """


class JaccardLoss(_RegionLoss):
    """Jaccard (IoU) loss of the batch, as ``segmentation_models_pytorch.losses.JaccardLoss``.

    Arguments and errors are those of :class:`DiceLoss`.
    """

    alpha = 1.0
    beta = 1.0


class TverskyLoss(DiceLoss):
    """Tversky loss of the batch, as ``segmentation_models_pytorch.losses.TverskyLoss``.

    Args:
        mode: this and the arguments not named here are those of :class:`DiceLoss`.
        alpha: weight of false positives.
        beta: weight of false negatives.
        gamma: exponent of the mean over classes.
    """

    def __init__(
        self,
        mode: Mode,
        classes: Sequence[int] | None = None,
        log_loss: bool = False,
        from_logits: bool = True,
        smooth: float = 0.0,
        ignore_index: int | None = None,
        eps: float = 1e-7,
        alpha: float = 0.5,
        beta: float = 0.5,
        gamma: float = 1.0,
        class_weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__(
            mode, classes, log_loss, from_logits, smooth, ignore_index, eps, class_weights
        )
        self.alpha = alpha
        self.beta = beta
        self.gamma = gamma


class FocalLoss(_Loss):
    """Focal loss of independent sigmoids, as ``segmentation_models_pytorch.losses.FocalLoss``.

    In mode ``"multiclass"`` too each class is a sigmoid of its own; for the focal loss of a
    softmax there is :func:`detseg_losses.softmax_focal_loss`.

    Args:
        mode: ``"binary"``, ``"multiclass"`` or ``"multilabel"``.
        alpha: weight of positives, negatives have 1 - alpha; None: no weighting.
        gamma: how fast the loss of what is well classified falls.
        ignore_index: label of the pixels (multilabel: entries) that are left out.
        from_logits: whether logits are given, and not the probability of each class.
        eps: probabilities are clamped to [eps, 1 - eps].
        reduction: ``"mean"`` or ``"sum"`` of each class, then the mean over classes;
            ``"batchwise_mean"``: the sum over the images and the mean over the places, in mode
            ``"binary"`` and where an ignore_index is set the sum over both; ``"none"`` or None:
            ``(N,)``, the valid pixels, in mode ``"binary"``, else ``"mean"``.
        normalized: divide the loss of each class by the sum of its focal factors
            (arXiv:1909.07829).
        reduced_threshold: the focal factor is 1 where the probability of the truth is below, and
            ``((1 - p) / threshold)^gamma`` elsewhere (arXiv:1903.01347).
        class_weights: weights in the mean over classes; not in mode ``"binary"``.

    Raises:
        ValueError: on a mode or reduction that does not exist, or options that have no meaning
            in the mode.
    """

    def __init__(
        self,
        mode: Mode,
        alpha: float | None = None,
        gamma: float = 2.0,
        ignore_index: int | None = None,
        from_logits: bool = True,
        eps: float = 1e-7,
        reduction: FocalReduction = "mean",
        normalized: bool = False,
        reduced_threshold: float | None = None,
        class_weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        check_choice("reduction", reduction, FocalReduction)
        self.mode = mode
        self.alpha = alpha
        self.gamma = gamma
        self.ignore_index = ignore_index
        self.from_logits = from_logits
        self.eps = eps
        self.reduction = reduction or "none"
        self.normalized = normalized
        self.reduced_threshold = reduced_threshold
        self.class_weights = _class_weights(mode, class_weights)

    def forward(self, y_pred: Tensor, y_true: Tensor) -> Tensor:
        """The loss; shapes are those of :meth:`DiceLoss.forward`."""
        if not self.from_logits:
            y_pred = y_pred.to(compute_dtype(y_pred.dtype)).logit(self.eps)
        batch = segmentation_batch(
            *_flatten(y_pred, y_true, self.mode), mode=self.mode, ignore_index=self.ignore_index
        )
        factor = FocalFactor(self.gamma, self.reduced_threshold)
        focal = WeightedFocal(self.gamma, self.reduced_threshold, self.alpha)
        norm: Tensor | float = 1.0
        if self.normalized:
            norm = _sums(batch, factor).sum(0).clamp_min(1e-6)
        if self.mode == BINARY_MODE and self.reduction == "none":
            values = _map(batch, focal)
            return (values if batch.weight is None else values[batch.weight]).flatten() / norm
        sums = _sums(batch, focal).sum(0) / norm
        return _mean_of_classes(divide(sums, self._counts(batch)), self.class_weights)

    def _counts(self, batch: Batch) -> Tensor:
        """What the sum of each class is divided by, ``(C,)``."""
        valid = batch.valid().sum(0)
        if self.reduction == "sum":
            return torch.ones_like(valid)
        if self.reduction == "batchwise_mean":
            apart = self.mode != BINARY_MODE and self.ignore_index is None
            return torch.full_like(valid, batch.logits.shape[2] if apart else 1)
        return valid


class LovaszLoss(_Loss):
    """Lovász loss, as ``segmentation_models_pytorch.losses.LovaszLoss``.

    In mode ``"multiclass"`` the Lovász-Softmax of the classes that the target holds; else the
    Lovász hinge, in mode ``"multilabel"`` of all classes as one.

    Args:
        mode: ``"binary"``, ``"multiclass"`` or ``"multilabel"``.
        per_image: the mean of each image's loss.
        ignore_index: label of the pixels (multilabel: entries) that are left out.
        from_logits: without effect, logits are expected.

    Raises:
        ValueError: on a mode that does not exist.
    """

    def __init__(
        self,
        mode: Mode,
        per_image: bool = False,
        ignore_index: int | None = None,
        from_logits: bool = True,
    ) -> None:
        super().__init__()
        check_choice("mode", mode, Mode)
        self.mode = mode
        self.ignore_index = ignore_index
        self.per_image = per_image

    def forward(self, y_pred: Tensor, y_true: Tensor) -> Tensor:
        """The loss; shapes are those of :meth:`DiceLoss.forward`."""
        logits, target = _flatten(y_pred, y_true, self.mode)
        if self.mode == MULTICLASS_MODE:
            return lovasz_loss(
                logits,
                target,
                mode=self.mode,
                ignore_index=self.ignore_index,
                per_image=self.per_image,
            )
        batch = segmentation_batch(logits, target, mode=self.mode, ignore_index=self.ignore_index)
        x, y = batch.logits.to(batch.dtype), batch.target.to(batch.dtype)
        kept = torch.ones_like(y) if batch.weight is None else batch.weight.to(y.dtype)
        shape = (x.shape[0] if self.per_image else 1, -1)
        return reduce(_lovasz_hinge(*(part.reshape(shape) for part in (x, y, kept))), "mean")


class MCCLoss(_Loss):
    """One minus Matthews' correlation coefficient of the batch, as
    ``segmentation_models_pytorch.losses.MCCLoss``.

    Args:
        eps: added to each of the four counts.
    """

    def __init__(self, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, y_pred: Tensor, y_true: Tensor) -> Tensor:
        """The loss.

        Args:
            y_pred: probabilities, ``(B, *)`` or ``(B, 1, *)``.
            y_true: values in [0, 1], ``(B, *)`` or ``(B, 1, *)``.

        Raises:
            ValueError: on shapes that do not fit, or a label out of range.
        """
        batch = segmentation_batch(*_flatten(y_pred, y_true, BINARY_MODE), mode=BINARY_MODE)
        p, y = batch.logits.to(batch.dtype), batch.target.to(batch.dtype)
        pairs = ((p, y), (p, 1 - y), (1 - p, y), (1 - p, 1 - y))
        tp, fp, fn, tn = ((one * other).sum() + self.eps for one, other in pairs)
        scale = ((tp + fp) * (tp + fn)).sqrt() * ((tn + fp) * (tn + fn)).sqrt()
        return 1 - (tp * tn - fp * fn) / scale


class SoftBCEWithLogitsLoss(nn.Module):
    """Binary cross entropy, as ``segmentation_models_pytorch.losses.SoftBCEWithLogitsLoss``.

    Args:
        weight: factor of each entry, broadcast to the logits.
        ignore_index: label of the entries that cost nothing; the mean counts them.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        smooth_factor: the share of the target that goes to the other side.
        pos_weight: factor of positives, broadcast to the logits.

    Raises:
        ValueError: on a reduction that does not exist.
    """

    weight: Tensor | None
    pos_weight: Tensor | None

    def __init__(
        self,
        weight: Tensor | None = None,
        ignore_index: int | None = -100,
        reduction: str = "mean",
        smooth_factor: float | None = None,
        pos_weight: Tensor | None = None,
    ) -> None:
        super().__init__()
        check_choice("reduction", reduction, Reduction)
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.smooth_factor = smooth_factor
        self.register_buffer("weight", weight)
        self.register_buffer("pos_weight", pos_weight)

    def forward(self, y_pred: Tensor, y_true: Tensor) -> Tensor:
        """The loss.

        Args:
            y_pred: logits of any shape.
            y_true: values in [0, 1] of the same shape; ``(B, *)`` for logits ``(B, 1, *)``.

        Raises:
            ValueError: on shapes that do not fit, or a label out of range.
        """
        logits = y_pred if y_pred.dim() > 1 else y_pred.reshape(1, -1)
        target = y_true.reshape(logits.shape) if y_true.shape == y_pred.shape else y_true
        batch = segmentation_batch(
            logits, target, mode=MULTILABEL_MODE, ignore_index=self.ignore_index
        )

        def entries(factor: Tensor) -> Tensor:
            return factor.expand(y_pred.shape).reshape(batch.logits.shape)

        def weigh(factor: Tensor) -> None:
            batch.weight = factor if batch.weight is None else batch.weight * factor

        if self.smooth_factor:
            batch.target = batch.target * (1 - 2 * self.smooth_factor) + self.smooth_factor
        if self.weight is not None:
            weigh(entries(self.weight))
        if self.pos_weight is not None:
            # (1 - y) n + w y p is a weight times the same formula for another target.
            y = batch.target.to(batch.dtype)
            positive = y * entries(self.pos_weight)
            weigh(1 - y + positive)
            batch.target = divide(positive, 1 - y + positive)
        formula = CrossEntropy(1.0)
        if self.reduction == "none":
            return _map(batch, formula).reshape(y_pred.shape)
        total = _sums(batch, formula).sum()
        return total / y_pred.numel() if self.reduction == "mean" else total


class SoftCrossEntropyLoss(nn.Module):
    """Cross entropy, as ``segmentation_models_pytorch.losses.SoftCrossEntropyLoss``.

    Args:
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        smooth_factor: the share of the target that is spread over all classes.
        ignore_index: label of the pixels that cost nothing; the mean counts them.
        dim: the dimension of the classes.

    Raises:
        ValueError: on a reduction that does not exist.
    """

    def __init__(
        self,
        reduction: str = "mean",
        smooth_factor: float | None = None,
        ignore_index: int | None = -100,
        dim: int = 1,
    ) -> None:
        super().__init__()
        check_choice("reduction", reduction, Reduction)
        self.smooth_factor = smooth_factor
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.dim = dim

    def forward(self, y_pred: Tensor, y_true: Tensor) -> Tensor:
        """The loss.

        Args:
            y_pred: logits with the classes in ``dim``.
            y_true: class indices; without ``dim``, or with 1 there.

        Returns:
            A number; with ``reduction="none"`` a map that, unless ignore_index is None, keeps
            ``dim`` with a size of 1.

        Raises:
            ValueError: on shapes that do not fit, or a label out of range.
        """
        if y_true.dim() == y_pred.dim():
            y_true = y_true.squeeze(self.dim)
        loss = cross_entropy_loss(
            y_pred.movedim(self.dim, 1),
            y_true,
            mode=MULTICLASS_MODE,
            label_smoothing=self.smooth_factor or 0.0,
            ignore_index=self.ignore_index,
            reduction="none" if self.reduction == "none" else "sum",
        )
        if self.reduction == "none":
            return loss if self.ignore_index is None else loss.unsqueeze(self.dim)
        return loss / y_true.numel() if self.reduction == "mean" else loss


@dataclass(frozen=True)
class Overlap(Formula):
    """What the prediction and the target have in common: its sum is SMP's true positives."""

    def value(self, x: Tensor, y: Label) -> Tensor:
        p = x.sigmoid()
        return torch.minimum(p, y.to(p.dtype)) if isinstance(y, Tensor) else p * y


@dataclass(frozen=True)
class Predicted(Formula):
    """The probability itself."""

    def value(self, x: Tensor, y: Label) -> Tensor:
        return x.sigmoid()


@dataclass(frozen=True)
class FocalFactor(Formula):
    """The factor by which the focal loss differs from the cross entropy."""

    gamma: float
    reduced_threshold: float | None

    def value(self, x: Tensor, y: Label) -> Tensor:
        # One minus the likelihood; that of a target in between is the geometric mixture.
        wrong = -torch.expm1(-cross_entropy(x, y)) if isinstance(y, Tensor) else missed(x, y)
        if self.reduced_threshold is None:
            return power(wrong, self.gamma)
        factor = power(wrong / self.reduced_threshold, self.gamma)
        return factor.where(1 - wrong >= self.reduced_threshold, 1)


@dataclass(frozen=True)
class WeightedFocal(FocalFactor):
    """SMP's focal loss."""

    alpha: float | None

    def value(self, x: Tensor, y: Label) -> Tensor:
        value = super().value(x, y) * cross_entropy(x, y)
        return value if self.alpha is None else value * mix(1 - self.alpha, self.alpha, y, x)


def _sums(batch: Batch, formula: Formula) -> Tensor:
    """The sums of a formula, ``(B, C)``."""
    return sigmoid_statistics(batch, SigmoidWants(sums=(formula,)))[0]


def _map(batch: Batch, formula: Formula) -> Tensor:
    """The values of a formula, ``(B, C, P)``."""
    return sigmoid_statistics(batch, SigmoidWants(maps=(formula,)))[0]


def _flatten(y_pred: Tensor, y_true: Tensor, mode: Mode) -> tuple[Tensor, Tensor]:
    """Predictions ``(B, C, P)`` and a target ``(B, P)`` or, of no one class, ``(B, C, P)``."""
    images, classes = y_pred.shape[0], 1 if mode == BINARY_MODE else y_pred.shape[1]
    prediction = y_pred.reshape(images, classes, -1)
    shape = prediction[:, 0].shape if mode == MULTICLASS_MODE else prediction.shape
    if y_true.shape[0] != images or y_true.numel() != shape.numel():
        raise ValueError(
            f"y_pred {tuple(y_pred.shape)} and y_true {tuple(y_true.shape)} do not fit together "
            f"in mode {mode!r}"
        )
    return prediction, y_true.reshape(shape)


def _lovasz_hinge(x: Tensor, y: Tensor, kept: Tensor) -> Tensor:
    """The Lovász hinge of logits and values in [0, 1], ``(N, P)``, of what is kept, ``(N,)``.

    Unlike :func:`detseg_losses.lovasz_loss` it has a value for soft targets, and one for a class
    that is nowhere: there the first wrong pixel costs everything.
    """
    errors = (1 - x * (2 * y - 1)).masked_fill(kept == 0, -torch.inf)
    with torch.no_grad():
        order = errors.argsort(-1, descending=True)
        hits, misses = ((part * kept).gather(-1, order) for part in (y, 1 - y))
        true = hits.sum(-1, keepdim=True)
        left = (true - hits.cumsum(-1)).clamp(min=0)  # rounding
        union = true + misses.cumsum(-1)
        before = union - misses
        # What the Jaccard loss grows by as each pixel turns wrong.
        slopes = divide(hits + misses * divide(left, union), before)
        slopes = torch.where(before > 0, slopes, misses)
        slopes = torch.empty_like(slopes).scatter_(-1, order, slopes)
    return (errors.relu() * slopes).sum(-1)


def _class_weights(mode: Mode, class_weights: Sequence[float] | None) -> Tensor | None:
    check_choice("mode", mode, Mode)
    if class_weights is None:
        return None
    if mode == BINARY_MODE:
        raise ValueError("class_weights have no meaning in mode 'binary'")
    return torch.as_tensor(class_weights, dtype=torch.float32)


def _mean_of_classes(
    loss: Tensor, class_weights: Tensor | None, classes: Tensor | None = None
) -> Tensor:
    """The weighted mean of the losses ``(C,)`` of all classes, or of those that are chosen."""
    weights = torch.ones_like(loss) if class_weights is None else class_weights.to(loss.device)
    if classes is not None:
        loss, weights = loss[classes], weights[classes]
    return (loss * weights).sum() / weights.sum()
