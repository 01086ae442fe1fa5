"""The engine of the segmentation losses: what they need to know of the logits, in one pass.

Every region loss is a formula on the soft counts of each image and class, every pixel loss one on
the negative log likelihood of each pixel. :func:`statistics` computes these small tensors, and
ordinary autograd flows through them; the gradient of the logits is one more pass in backward.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from operator import add
from typing import Any, Literal

import torch
from torch import Tensor

from .base import WHOLE, Block, blocks, compute_dtype, exp_, has_graph, in_blocks, lazy
from .layout import Batch, Mode, Part, segmentation_batch
from .memory import empty_like
from .pointwise import (
    FalseNegative,
    FalsePositive,
    Formula,
    Label,
    Mirrored,
    Sigmoid,
    Squared,
    TruePositive,
    pointwise,
    spend,
)

Need = Literal["regions", "squares", "negatives", "nll", "smooth"] | Formula
"""What a loss asks of the engine: region counts, one of the maps, or the sums of a formula."""


@dataclass
class Statistics:
    """What the losses of one batch share; a loss takes it in place of logits and target.

    Only what was asked for is there.

    Attributes:
        batch: the batch that they are of.
        tp: soft true positives ``sum p * y``, ``(B, C)``.
        fp: soft false positives ``sum p * (1 - y)``, ``(B, C)``. No differences of sums, which
            would lose the digits of a class that covers nearly everything.
        fn: soft false negatives ``sum (1 - p) * y``, ``(B, C)``.
        pred: soft count of what is predicted, ``sum p``, ``(B, C)``.
        true: count of what is there, ``sum y``, ``(B, C)``.
        pred_sq: ``sum p^2``, ``(B, C)``.
        true_sq: ``sum y^2``, ``(B, C)``; of class indices the same as ``true``.
        nll: negative log likelihood of each pixel, ``(B, P)``; 0 where it is left out.
        smooth: ``-sum_c w_c log p_c`` of each pixel, with ``w`` the class weights or 1,
            ``(B, P)``; 0 where it is left out.
        sums: for each formula of a sigmoid loss its sums, ``(B, C)``.
    """

    batch: Batch
    tp: Tensor = field(init=False)
    fp: Tensor = field(init=False)
    fn: Tensor = field(init=False)
    pred: Tensor = field(init=False)
    true: Tensor = field(init=False)
    pred_sq: Tensor = field(init=False)
    true_sq: Tensor = field(init=False)
    nll: Tensor = field(init=False)
    smooth: Tensor = field(init=False)
    sums: dict[Formula, Tensor] = field(default_factory=dict)

    def count(self, tp: Tensor, fp: Tensor, fn: Tensor) -> None:
        """Hold the region counts, and those that are sums of them."""
        self.tp, self.fp, self.fn = tp, fp, fn
        self.pred, self.true = tp + fp, (tp + fn).detach()

    def negatives(self) -> Tensor:
        """The count of what is not there, ``sum (1 - y)``, ``(B, C)``; it does not subtract."""
        batch = self.batch
        if batch.dense:
            rest = 1 - batch.target.to(batch.dtype)
            return _count(rest, batch.weight, batch.logits.shape[1], batch.dtype)
        others = 1 - torch.eye(self.true.shape[1]).to(self.true)
        return (self.true.unsqueeze(1) * others).sum(-1)  # autocast would round a matrix product


OVERLAPS = [TruePositive(), FalsePositive(), FalseNegative()]

LARGER = 2
"""How many times as large a block is here: much is done once a pixel, and threads share that only
if a block has many pixels."""

FEW_CLASSES = 4
"""Of so few classes each label is compared with all, which is faster than to look its own up."""


def statistics(
    logits: Tensor | Statistics,
    target: Tensor | None,
    needs: Iterable[Need],
    *,
    mode: Mode | None = None,
    ignore_index: int | None = None,
    pixel_weight: Tensor | None = None,
    class_weights: Tensor | Sequence[float] | None = None,
    validate: bool = False,
) -> Statistics:
    """Compute what losses need to know of the logits, once for all of them.

    Args:
        logits: raw scores, ``(B, C, *)``; statistics are returned as they are.
        target: class indices ``(B, *)`` or ``(B, 1, *)``, or values in [0, 1] of the logits' shape.
        needs: what to compute.
        mode: ``"multiclass"``, ``"binary"`` or ``"multilabel"``; None: one channel is binary, else
            multiclass.
        ignore_index: label of the pixels that are left out of every sum.
        pixel_weight: weight of each pixel, ``(B, *)``; a weight of 0 leaves the pixel out.
        class_weights: ``(C,)``; enters ``smooth`` and the ``nll`` of a dense target.
        validate: check the labels also where that makes the device wait.

    Raises:
        ValueError: on shapes that do not fit, a mode that cannot be told, a label out of range,
            a target that requires grad, or a need that has no meaning in the mode.
    """
    if isinstance(logits, Statistics):
        return logits
    batch = segmentation_batch(
        logits,
        target,
        mode=mode,
        ignore_index=ignore_index,
        pixel_weight=pixel_weight,
        validate=validate,
    )
    return measure(batch, needs, class_weights)


def measure(
    batch: Batch,
    needs: Iterable[Need],
    class_weights: Tensor | Sequence[float] | None = None,
    *,
    keep: bool = True,
) -> Statistics:
    """The statistics of a batch, see :func:`statistics`; ``keep`` what saves time in backward."""
    needs = list(dict.fromkeys(needs))  # in their order, on which the last digits depend
    formulas = [need for need in needs if isinstance(need, Formula)]
    result = Statistics(batch)
    softmax = batch.mode == "multiclass"
    if softmax:
        weights = batch.per_class(class_weights)
        if _one_sigmoid(batch):
            _measure_two(result, needs, weights)
        else:
            _measure_classes(result, needs, weights, keep)
    elif {"nll", "smooth"} & set(needs):
        raise ValueError(
            f"a softmax over classes has no meaning in mode {batch.mode!r}; use 'bce' or 'focal', "
            "or a model with a channel for each class"
        )
    else:
        formulas += OVERLAPS if "regions" in needs else []
        formulas += [Squared()] if "squares" in needs else []
    if formulas:
        result.sums = dict(zip(formulas, pointwise(batch, formulas), strict=True))
    if "regions" in needs and not softmax:
        result.count(*(result.sums[formula] for formula in OVERLAPS))
    if "squares" in needs:
        result.true_sq = _true(batch, power=2)
        if not softmax:
            result.pred_sq = result.sums[Squared()]
    return result


def _one_sigmoid(batch: Batch) -> bool:
    """Whether a softmax is that of two classes and nothing stands against computing it as one
    sigmoid, of the difference of the logits, which half precision would round.
    """
    logits, weight = batch.logits, batch.weight
    return (
        logits.shape[1] == 2
        and not batch.dense
        and logits.dtype == batch.dtype
        and (weight is None or weight.dtype == torch.bool)  # maps are not weighted
    )


def _measure_two(result: Statistics, needs: Sequence[Need], weights: Tensor | None) -> None:
    """The statistics of two classes; everything is that of one and its mirror image."""
    batch = result.batch
    labels = batch.target
    if not in_blocks(labels):  # where they have not been checked, a look-up stops at others
        labels = torch.arange(2, device=labels.device).expand(len(labels), 2)
        labels = labels.gather(1, batch.labels())
    difference = _Difference.apply(batch.logits)
    one = replace(batch, logits=difference, target=labels.unsqueeze(1))
    formulas: list[Formula] = []
    if "regions" in needs:
        # The true positives of one are the true negatives of the other, and so on.
        formulas += [Mirrored(TruePositive()), *OVERLAPS]
    if "squares" in needs:
        formulas += [Mirrored(Squared()), Squared()]
    maps: dict[str, Formula] = {}
    if "nll" in needs:
        maps["nll"] = OfLabel()
    if "smooth" in needs:
        maps["smooth"] = OfBoth(*(1, 1) if weights is None else weights.unbind())
    found = iter(pointwise(one, formulas, list(maps.values())))
    if "regions" in needs:
        tn, tp, fp, fn = (next(found) for _ in range(4))
        result.count(torch.cat((tn, tp), 1), torch.cat((fn, fp), 1), torch.cat((fp, fn), 1))
    if "squares" in needs:
        result.pred_sq = torch.cat((next(found), next(found)), 1)
    for name in maps:
        setattr(result, name, next(found).squeeze(1))


class _Difference(torch.autograd.Function):
    """The second of two logits less the first, ``(B, 1, P)``, and finite: a class may be ruled out
    by a logit of minus infinity.
    """

    @staticmethod
    def forward(logits: Tensor) -> Tensor:
        limit = torch.finfo(logits.dtype).max
        return (logits[:, 1:] - logits[:, :1]).clamp_(-limit, limit)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return torch.cat((-grad, grad), 1)


@dataclass(frozen=True)
class OfLabel(Formula):
    """The negative log likelihood of the label, one of two."""

    def value(self, s: Sigmoid, y: Label) -> Tensor:
        return s.cross_entropy(y).mul_(2).div_(2)  # infinite again where the difference was

    def slope(self, s: Sigmoid, y: Label) -> Tensor:
        return s.error(y)


@dataclass(frozen=True)
class OfBoth(Formula):
    """The negative log likelihoods of two classes, with their weights."""

    first: Tensor | float
    second: Tensor | float

    def value(self, s: Sigmoid, y: Label) -> Tensor:
        return self.first * s.neg + self.second * s.pos

    def slope(self, s: Sigmoid, y: Label) -> Tensor:
        return self.first * s.p - self.second * s.q


def _measure_classes(
    result: Statistics, needs: Sequence[Need], weights: Tensor | None, keep: bool
) -> None:
    """The statistics of a softmax."""
    batch = result.batch
    wants = ("nll" in needs, "smooth" in needs, "regions" in needs, "squares" in needs)
    if any(wants):
        # Maps alone are kept by the formulas on them: not the exponentials as well.
        keep = keep and wants[2] and has_graph(batch.logits)
        tensors = batch.logits, batch.target, batch.weight, weights
        found = _Softmax.apply(*tensors, wants, keep)
        result.nll, result.smooth, tp, fp, fn, result.pred_sq, _ = found
        if wants[2]:
            result.count(tp, fp, fn)


def weighted_counts(batch: Batch, factor: Tensor) -> Statistics:
    """Region counts with ``tp = sum p * factor`` for any constant factor ``(B, C, P)``.

    So a loss that is linear in the probabilities keeps none of them for backward.
    """
    result = measure(replace(batch, target=factor), ["regions"], keep=False)
    result.batch, result.true = batch, _true(batch)
    return result


def _true(batch: Batch, power: int = 1) -> Tensor:
    """The count of what is there, ``(B, C)``."""
    y = batch.target.to(batch.dtype) if batch.dense else batch.labels()
    if batch.dense and power > 1:
        y = y**power
    return _count(y, batch.weight, batch.logits.shape[1], batch.dtype)


def _count(y: Tensor, w: Tensor | None, classes: int, dtype: torch.dtype) -> Tensor:
    """The weighted count of each class, ``(B, C)``, in a dense target ``(B, C, P)`` of the dtype,
    or in class indices ``(B, P)``.
    """
    if y.dim() == 3:
        return (y if w is None else y.masked_fill(w == 0, 0) * w).sum(-1, dtype=dtype)
    if w is None and classes == 2:
        second = y.sum(-1)
        return torch.stack((y.shape[-1] - second, second), 1).to(dtype)
    counts = y.new_ones((), dtype=dtype).expand(y.shape) if w is None else w.squeeze(1).to(dtype)
    return _class_sums(counts.unsqueeze(1), y, classes).squeeze(1)


def _class_sums(values: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Sum values ``(B, N, P)`` by label ``(B, P)``: ``(B, N, C)``.

    By way of bins of 1024 values: one long chain of float32 additions would lose digits.
    """
    labels = labels.unsqueeze(1)
    if classes == 2:  # without a look-up, which takes longer than all else
        second = values * labels.to(values.dtype)
        return torch.stack(((values - second).sum(-1), second.sum(-1)), -1)
    images, count, places = values.shape
    bins = places // 1024 + 1
    starts = torch.arange(0, bins * classes, classes, device=labels.device)
    index = (labels + starts.repeat_interleave(1024)[:places]).expand(values.shape)
    sums = values.new_zeros(images, count, bins * classes).scatter_add(2, index, values)
    return sums.view(images, count, bins, classes).sum(2)


def _interleaved(logits: Tensor) -> bool:
    """Whether logits of few classes have these last in memory (``torch.channels_last``), where
    every operation with one number for each pixel would work through tiny rows.
    """
    return logits.shape[1] <= FEW_CLASSES and logits.stride(1) < logits.stride(2)


class _Softmax(torch.autograd.Function):
    """nll and smooth ``(B, P)``, tp, fp, fn and pred_sq ``(B, C)`` of logits ``(B, C, P)``, where
    wanted; tp, fp and fn go together.
    """

    @staticmethod
    def forward(
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        class_weights: Tensor | None,
        wants: tuple[bool, bool, bool, bool],
        keep: bool,
    ) -> tuple[Tensor | None, ...]:
        images, classes, _ = logits.shape
        dtype = compute_dtype(logits.dtype)
        tiles = blocks(logits, LARGER)
        # Time is dear on the CPU, elsewhere it is memory.
        keep = keep and tiles[0] is not WHOLE and logits.dtype == dtype and not _interleaved(logits)
        kept = empty_like(logits, dtype) if keep else None
        nll = smooth = None
        of_pixels = logits[:, 0]
        counts = logits.new_zeros((4, tiles[-1].part + 1, images, classes), dtype=dtype)
        for tile in tiles:
            into = None if kept is None else tile.of(kept)
            block = _SoftmaxBlock(tile, logits, target, weight, class_weights, into=into)
            if wants[0]:
                nll = tile.store(block.nll(), nll, of_pixels, dtype)
            if wants[1]:
                smooth = tile.store(block.smooth(), smooth, of_pixels, dtype)
            if wants[3]:
                counts[3, tile.part, tile.rows] = block.pred_sq()
            if wants[2]:  # the last, for it spends p
                counts[:3, tile.part, tile.rows] = block.overlaps()
            del block  # its temporaries are free when the next one asks for memory
        *overlaps, pred_sq = counts.sum(1).unbind()
        squares = pred_sq if wants[3] else None
        return nll, smooth, *(overlaps if wants[2] else [None] * 3), squares, kept

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        *tensors, _, _ = inputs
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        ctx.kept = output[-1]
        if ctx.kept is not None:
            ctx.mark_non_differentiable(ctx.kept)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        nothing = (None,) * 5
        maps, counts = grads[:2], grads[2:-1]
        if all(grad is None for grad in (*maps, *counts)):
            return None, *nothing
        logits, target, weight, class_weights = ctx.saved_tensors

        def gradient(tile: Block, e: Tensor | None = None) -> Tensor:
            block = _SoftmaxBlock(tile, logits, target, weight, class_weights, e=e)
            of_block = [None if g is None else tile.of(g) for g in maps]
            of_images = [None if g is None else g[tile.rows] for g in counts]
            return block.gradient(*of_block, *of_images)

        if torch.is_grad_enabled():  # create_graph: plain operations that autograd can follow
            return gradient(WHOLE).to(logits.dtype), *nothing
        # The gradient is written over what was kept; another backward computes that anew.
        kept, ctx.kept = ctx.kept, None
        if kept is not None:
            for tile in blocks(logits, LARGER):
                gradient(tile, tile.of(kept))
            return kept, *nothing
        result = None
        for tile in blocks(logits, LARGER):
            result = tile.store(gradient(tile), result, logits, logits.dtype)
        return result, *nothing


class _SoftmaxBlock(Part):
    r"""The softmax of one block, and the formulas on it.

    The probabilities are :math:`p_c = e_c / z`, with a largest e of 1.
    """

    def __init__(
        self,
        tile: Block,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        class_weights: Tensor | None,
        *,
        e: Tensor | None = None,
        into: Tensor | None = None,
    ) -> None:
        super().__init__(tile, logits, target, weight)
        if tile is not WHOLE and _interleaved(logits):
            self.raw = self.raw.contiguous()
        looked_at = e is None and tile is not WHOLE and self.left_out is not None
        if looked_at and self.raw.sum().isfinite():
            # All are finite: those that are left out need no 0, their weight of 0 removes them.
            self.x = self.raw
        self.e = exp_(torch.sub(self.x, self.top, out=into)) if e is None else e
        self.z = self.e.sum(1, keepdim=True)
        self.share = self.weighted(self.z.reciprocal())  # w / z: what each e counts
        self.class_weights = None if class_weights is None else class_weights[:, None]
        self.dense = self.y is not None
        if self.y is not None:
            self.target_weights = self.weights_of_classes(self.y)
            self.target_total: Any = self.target_weights.sum(1, keepdim=True)
        else:
            self.index = self.labels.unsqueeze(1)
            if torch.compiler.is_compiling() or (
                tile is not WHOLE and self.e.shape[1] <= FEW_CLASSES
            ):
                self.y = self.target_weights = self.hot()
                self.target_total = None  # 1, which a gradient need not be multiplied with

    def hot(self) -> Tensor:
        """The labels as a dense target: to compare few classes is faster than to look one up, and
        to compare any number for a compiler.
        """
        classes = torch.arange(self.e.shape[1], dtype=self.dtype, device=self.e.device).unsqueeze(1)
        labels = self.index.to(self.dtype)  # as the results, which is faster
        if self.tile is WHOLE:
            return (labels == classes).to(self.dtype)
        return torch.eq(labels, classes, out=torch.empty_like(self.e))

    def weights_of_classes(self, y: Tensor) -> Tensor:
        """A target with the weights of the classes."""
        return y if self.class_weights is None else y * self.class_weights

    @lazy
    def p(self) -> Tensor:
        """The weighted probabilities."""
        return self.e * self.share

    @lazy
    def top(self) -> Tensor:
        return self.x.amax(1, keepdim=True)

    @lazy
    def below(self) -> Tensor:
        """By how much the logit of the label is below the largest, as a negative number."""
        if self.y is None or self.tile is WHOLE:  # whose labels are checked by the look-up alone
            return self.x.gather(1, self.index) - self.top
        found = (self.y * self.x).sum(1, keepdim=True)
        if not found.sum().isfinite():  # 0 * -inf is NaN
            lowest = torch.finfo(self.dtype).min
            found = (self.y * self.x.clamp(min=lowest)).sum(1, keepdim=True)
            found.mul_(2).div_(2)  # infinite again where it was
        return found - self.top

    def nll(self) -> Tensor:
        if self.dense:
            return self.log_likelihood(self.target_weights, self.target_total)
        return self.counted((self.z.log() - self.below).squeeze(1))

    def smooth(self) -> Tensor:
        weights = self.smooth_weights()
        return self.log_likelihood(weights, weights.sum())

    def log_likelihood(self, weights: Tensor, total: Tensor) -> Tensor:
        """``-sum_c w_c log p_c`` with weights ``(b, C, n)`` or ``(C, 1)``, and their sum."""
        below = (weights * (self.x - self.top)).sum(1)
        return self.counted((total * self.z.log()).squeeze(1) - below)

    def smooth_weights(self) -> Tensor:
        """The weight of each class in ``smooth``, ``(C, 1)``."""
        return self.weights_of_classes(self.e.new_ones((self.e.shape[1], 1)))

    def pred_sq(self) -> Tensor:
        return (self.p * self.e / self.z).sum(-1)

    def overlaps(self) -> Tensor:
        """True positives, false positives and false negatives, ``(3, b, C)``."""
        p = self.p
        if self.y is not None:
            hit = p * self.y
            tp, fp = hit.sum(-1), p.sub_(hit).sum(-1)
            return torch.stack((tp, fp, hit.neg_().add_(self.weighted(self.y)).sum(-1)))
        of_label = self.e.gather(1, self.index)
        each = torch.cat((of_label, self.z - of_label), 1) * self.share
        sums = _class_sums(each, self.labels, self.e.shape[1])
        others = p.scatter_(1, self.index, torch.zeros_like(of_label))
        return torch.stack((sums[:, 0], others.sum(-1), sums[:, 1]))

    def gradient(
        self,
        nll: Tensor | None,
        smooth: Tensor | None,
        tp: Tensor | None,
        fp: Tensor | None,
        fn: Tensor | None,
        pred_sq: Tensor | None,
    ) -> Tensor:
        r"""The gradient of the logits from those of the statistics.

        It is :math:`p_c (w G_c + r) - s_c`, where G is the gradient of the weighted probabilities
        in the counts, and r and s collect :math:`-\sum_c p_c w G_c` and the gradients of the maps,
        which are linear in p.
        """
        e = self.e
        each: Tensor | None = None  # G
        rows = []  # r, one number a pixel
        at_label = []  # -s where c is the label
        weighted = []  # the gradients of maps, the weights of their classes, and the sum of those
        of_label = its = None
        given = [grad for grad in (tp, fp, fn) if grad is not None]
        if given:
            none = torch.zeros_like(given[0])
            tp, fp, fn = (none if grad is None else grad for grad in (tp, fp, fn))
            # Apart, for the gradient of false positives may be a million times that of the others.
            each, right = fp.unsqueeze(-1), (tp - fn).unsqueeze(-1)
            if self.y is not None:
                each = torch.lerp(each, right, self.y)
            else:
                of_label = e.gather(1, self.index)
                its = right.squeeze(-1).gather(1, self.labels).unsqueeze(1)
                e = (e.clone() if has_graph(e) else e).scatter_(
                    1, self.index, torch.zeros_like(of_label)
                )
        if pred_sq is not None:
            more = 2 * pred_sq.unsqueeze(-1) * self.e / self.z
            each = more if each is None else each + more
        if each is not None:
            rows.append(-(e * each).sum(1, keepdim=True) * self.share)
        if of_label is not None and its is not None:
            if pred_sq is not None:
                its = its + 2 * pred_sq.gather(1, self.labels).unsqueeze(1) * of_label / self.z
            rows.append(-of_label * its * self.share)
        if nll is not None and self.y is not None:
            weighted.append((nll, self.target_weights, self.target_total))
        elif nll is not None:
            nll = self.counted(nll).unsqueeze(1)
            rows.append(nll)
            at_label.append(-nll)
        if smooth is not None:
            weights = self.smooth_weights()
            weighted.append((smooth, weights, weights.sum()))
        weighted = [(self.counted(g).unsqueeze(1), w, t) for g, w, t in weighted]
        rows += [grad if total is None else grad * total for grad, _, total in weighted]
        row = reduce(add, rows) / self.z
        gradient = spend(e, row if each is None else torch.addcmul(row, each, self.share))
        if of_label is not None and its is not None:
            at_label.append(of_label * (row + its * self.share))
        for grad, weights, _ in weighted:
            gradient.addcmul_(grad, weights, value=-1)
        if at_label:
            gradient.scatter_add_(1, self.index, reduce(add, at_label))
        return gradient
