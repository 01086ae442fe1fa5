r"""Statistics of a softmax over classes, in one pass over the logits.

Every loss of exclusive classes is a formula on the negative log likelihood of each pixel and on
soft counts of each class:

.. math:: TP_c = \sum_i w_i y_{ic} p_{ic}, \quad FP_c = \sum_i w_i (1 - y_{ic}) p_{ic}, \quad
    FN_c = \sum_i w_i y_{ic} (1 - p_{ic})

:func:`plain` computes them as they are written. :class:`_Softmax` computes the same by few large
operations, over the whole tensor or, on the CPU, image by image; its gradient is that of a softmax,

.. math:: \frac{\partial L}{\partial x_c} = p_c \Bigl(G_c - \sum_k p_k G_k\Bigr), \quad
    G_c = \frac{\partial L}{\partial p_c}
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from detseg_losses._core.blocks import Block, blocks, compute_dtype, followed, has_graph
from detseg_losses._core.checks import in_blocks
from detseg_losses.memory import empty_like

BLOCKS = (4, 16)
"""Some images with up to 4 * BLOCK elements at a time, or one with up to 16 times as many: to cut
an image costs a copy of it.
"""

LEAST = -60.0
"""The floor of log likelihoods, where a gradient is divided by the likelihood."""


class SoftmaxWants(NamedTuple):
    """What to compute: the maps, the counts, and among these the sums of squares."""

    nll: bool = False
    smooth: bool = False
    counts: bool = False
    squares: bool = False


class SoftmaxStatistics(NamedTuple):
    """What was asked for; None elsewhere.

    Attributes:
        nll: negative log likelihood of each pixel, ``(B, P)``; of a target of values its
            expectation, with the class weights. 0 where the pixel is ignored.
        smooth: ``-sum_c w_c log p_c`` with the class weights or 1, ``(B, P)``; 0 where ignored.
        counts: FP, TP, FN and the ground truth, ``(4, B, C)``; with squares a fifth, sum p^2.
    """

    nll: Tensor | None
    smooth: Tensor | None
    counts: Tensor | None


def softmax_statistics(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    class_weights: Tensor | None,
    wants: SoftmaxWants,
) -> SoftmaxStatistics:
    """Compute statistics that autograd can differentiate.

    Args:
        logits: ``(B, C, P)``.
        target: class indices ``(B, P)``, of any value where ignored; or values ``(B, C, P)``.
        weight: of each pixel, ``(B, 1, P)``, 0 where it is ignored; None where all count alike.
        class_weights: ``(C,)``, for ``smooth`` and the ``nll`` of values.
        wants: what to compute.
    """
    if followed():
        return plain(logits, target, weight, class_weights, wants)
    # Formulas on the maps keep those; and beside half precision p would be twice as large.
    keep = wants.counts and has_graph(logits) and logits.dtype == compute_dtype(logits.dtype)
    found = _Softmax.apply(logits, target, weight, class_weights, wants, keep)
    return SoftmaxStatistics(*found)


def plain(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    class_weights: Tensor | None,
    wants: SoftmaxWants,
) -> SoftmaxStatistics:
    """The statistics as they are defined: for compilers, and for gradients of gradients."""
    x = logits.to(compute_dtype(logits.dtype))
    ignored = None if weight is None else weight == 0
    if ignored is not None:
        x = torch.where(ignored, 0, x)  # where it may even be NaN
    # Not torch's own softmax: compiled, its gradient writes and reads as much as the logits again.
    x = x - x.detach().amax(1, keepdim=True)
    total = x.exp().sum(1, keepdim=True)
    log_p, p = x - total.log(), x.exp() / total
    index = _index(target, ignored)
    if index is None:
        y = target.to(x.dtype)
    else:  # compared, which a compiler fuses with all else
        classes = torch.arange(x.shape[1], device=x.device)
        y = (index == classes.unsqueeze(1)).to(x.dtype)
    nll = smooth = counts = None
    if wants.nll:
        weights = class_weights if index is None else None
        nll = _expected(log_p, _weighted(y, weights), ignored)
        if index is not None:  # 0, but a look-up stops at labels that do not exist
            nll = nll + (classes.gather(0, index.flatten()).view_as(index) - index).squeeze(1)
    if wants.smooth:
        smooth = _expected(log_p, _weighted(torch.ones_like(y), class_weights), ignored)
    if wants.counts:
        terms = [(1 - y) * p, y * p, y * (1 - p)] + ([p * p] if wants.squares else [])
        w = 1 if weight is None else weight
        fp, tp, fn, *squares = ((term * w).sum(-1) for term in terms)
        counts = torch.stack([fp, tp, fn, (tp + fn).detach(), *squares])
    return SoftmaxStatistics(nll, smooth, counts)


def _index(target: Tensor, ignored: Tensor | None) -> Tensor | None:
    """Class indices ``(B, 1, P)``, valid ones also where they are ignored; None of values."""
    if target.dim() == 3:
        return None
    index = target.long().unsqueeze(1)
    return index if ignored is None else index.masked_fill(ignored, 0)


def _weighted(y: Tensor, class_weights: Tensor | None) -> Tensor:
    return y if class_weights is None else y * class_weights.unsqueeze(1)


def _expected(log_p: Tensor, y: Tensor, ignored: Tensor | None) -> Tensor:
    """``-sum_c y_c log p_c``, ``(B, P)``; 0 where ignored."""
    # A logit of minus infinity rules a class out, and 0 * -inf is NaN.
    return _counted(torch.where(y == 0, 0, y * log_p).sum(1).neg(), ignored)


def _counted(values: Tensor, ignored: Tensor | None) -> Tensor:
    return values if ignored is None else values.masked_fill(ignored.squeeze(1), 0)


class _Softmax(torch.autograd.Function):
    """The statistics, and the probabilities where they are kept for backward."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        class_weights: Tensor | None,
        wants: SoftmaxWants,
        keep: bool,
    ) -> tuple[Tensor | None, ...]:
        images, classes, places = logits.shape
        dtype = compute_dtype(logits.dtype)
        p = _new(logits) if keep else None
        tiles = blocks(logits, *BLOCKS)
        nll, smooth = (
            logits.new_empty(images, places, dtype=dtype) if wanted else None
            for wanted in wants[:2]
        )
        rows = (5 if wants.squares else 4) if wants.counts else 0
        counts = logits.new_empty(rows, tiles[-1].part + 1, images, classes, dtype=dtype)
        for tile in tiles:
            _Block(tile, logits, target, weight, class_weights, p).forward(
                _part(tile, nll),
                _part(tile, smooth),
                counts[:, tile.part, tile.rows] if rows else None,
            )
        ctx.save_for_backward(logits, target, weight, class_weights)
        ctx.set_materialize_grads(False)
        ctx.wants, ctx.p, ctx.tiles = wants, p, tiles
        return nll, smooth, _of_parts(counts) if rows else None

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        nothing = (None,) * 5
        logits, target, weight, class_weights = ctx.saved_tensors
        if all(grad is None for grad in grads):
            return None, *nothing
        # The gradient is written over p, so that another backward computes p again.
        p, ctx.p = ctx.p, None
        if torch.is_grad_enabled():  # a graph of the gradient is wanted
            statistics = plain(logits, target, weight, class_weights, ctx.wants)
            pairs = [(s, g) for s, g in zip(statistics, grads, strict=True) if g is not None]
            outputs, factors = zip(*pairs, strict=True)
            return *torch.autograd.grad(outputs, logits, factors, create_graph=True), *nothing
        known = p is not None
        in_place = logits.is_contiguous() and logits.dtype == compute_dtype(logits.dtype)
        if in_place and p is None:
            p = _new(logits)
        result = p if in_place and p is not None else torch.empty_like(logits)
        for tile in ctx.tiles:
            block = _Block(tile, logits, target, weight, class_weights, p)
            if not known:
                block.forward(None, None, None, floor=ctx.wants.nll and ctx.wants.counts)
            nll, smooth, counts = grads
            block.backward(
                _part(tile, nll),
                _part(tile, smooth),
                None if counts is None else counts[:, tile.rows],
            )
            if not in_place:
                tile.of(result).copy_(block.p)
        return result, *nothing


def _part(tile: Block, values: Tensor | None) -> Tensor | None:
    return None if values is None else tile.of(values)


def _of_parts(counts: Tensor) -> Tensor:
    """Counts ``(*, parts, B, C)`` of whole images."""
    return counts.sum(1) if counts.shape[1] > 1 else counts.squeeze(1)


def _new(logits: Tensor) -> Tensor:
    """New memory in the order in which torch computes a softmax over the second dimension."""
    if in_blocks(logits) and logits.is_contiguous():
        return empty_like(logits, logits.dtype)
    return logits.new_empty(logits.shape)


class _Block:
    """The kernel, on some images and places; it works in its part of ``p``, if there is one."""

    def __init__(
        self,
        tile: Block,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        class_weights: Tensor | None,
        p: Tensor | None,
    ) -> None:
        self.x, y = tile.of(logits), tile.of(target)
        if p is None:
            self.p = self.x.new_empty(self.x.shape, dtype=compute_dtype(self.x.dtype))
        else:
            self.p = tile.of(p)
        self.class_weights = class_weights
        self.weight = self.ignored = None
        if weight is not None:
            weight = tile.of(weight)
            self.ignored = weight == 0
            if weight.dtype != torch.bool:
                self.weight = weight.to(self.p.dtype)
        self.index = _index(y, self.ignored)
        self.y = y.to(self.p.dtype) if self.index is None else None
        if self.y is not None and self.ignored is not None:
            self.y = self.y.masked_fill(self.ignored, 0)

    def likely(self, nll: bool) -> Any:
        """What the log likelihoods are multiplied by, ``(b, C, n)`` or ``(C, 1)``."""
        y: Any = self.y if nll else self.p.new_ones(self.p.shape[1], 1)
        return y if self.class_weights is None else y * self.class_weights.unsqueeze(1)

    def forward(
        self,
        nll: Tensor | None,
        smooth: Tensor | None,
        counts: Tensor | None,
        floor: bool = False,
    ) -> None:
        """Write the maps ``(b, n)``, the counts ``(4 or 5, b, C)``, and the probabilities; those of
        the labels not below a floor where counts are wanted, or where it is asked for.
        """
        p = self.p
        log_p = torch.log_softmax(self.x, 1, dtype=p.dtype, out=p if p.is_contiguous() else None)
        at_label = None if self.index is None else log_p.gather(1, self.index)
        if nll is not None and at_label is not None:
            torch.neg(_counted(at_label.squeeze(1), self.ignored), out=nll)
        elif nll is not None:
            nll.copy_(_expected(log_p, self.likely(True), self.ignored))
        if smooth is not None:
            smooth.copy_(_expected(log_p, self.likely(False), self.ignored))
        torch.exp(log_p, out=p)
        if floor and at_label is not None:
            assert self.index is not None
            p.scatter_(1, self.index, at_label.clamp(min=LEAST).exp_())
        if self.ignored is not None:
            p.masked_fill_(self.ignored, 0)
        if counts is not None:
            self.count(at_label, counts)

    def count(self, at_label: Tensor | None, counts: Tensor) -> None:
        p = self.p

        def add_up(values: Tensor, out: Tensor) -> None:
            torch.sum(values if self.weight is None else values * self.weight, -1, out=out)

        if len(counts) == 5:
            add_up(p * p, counts[4])
        if self.y is not None:
            hit = p * self.y
            for out, values in zip(counts, (p - hit, hit, self.y - hit, self.y), strict=False):
                add_up(values, out)
            return
        assert self.index is not None
        assert at_label is not None
        rows = p.new_empty(2, *at_label.shape)
        torch.exp(at_label.clamp(min=LEAST), out=rows[0])
        torch.expm1(at_label, out=rows[1])  # -(1 - p) without cancellation
        if self.ignored is not None:
            rows.masked_fill_(self.ignored, 0)
        p.scatter_(1, self.index, 0.0)
        add_up(p, counts[0])
        p.scatter_(1, self.index, rows[0])
        if self.weight is not None:
            rows *= self.weight
        sums_by_label(rows.squeeze(2), self.index.squeeze(1), counts[1:3])
        counts[2].neg_()
        torch.add(counts[1], counts[2], out=counts[3])

    def backward(self, nll: Tensor | None, smooth: Tensor | None, counts: Tensor | None) -> None:
        """Write the gradient of the logits over the probabilities."""
        p = self.p
        maps = []
        for each, likely in ((nll if self.index is None else None, True), (smooth, False)):
            if each is not None:
                factor = _counted(each, self.ignored).unsqueeze(1)
                weights = self.likely(likely)
                maps.append(factor * (p * weights.sum(-2, keepdim=True) - weights))
        if counts is not None:
            self.backward_of_counts(nll, *counts.unsqueeze(-1))
        elif nll is not None and self.index is not None:
            factor = _counted(nll, self.ignored).unsqueeze(1)
            p.mul_(factor).scatter_add_(1, self.index, -factor)
        else:
            p.zero_()
        for gradient in maps:
            p.add_(gradient)

    def backward_of_counts(
        self,
        nll: Tensor | None,
        fp: Tensor,
        tp: Tensor,
        fn: Tensor,
        true: Tensor,
        squares: Tensor | None = None,
    ) -> None:
        """The same of the counts, and of the negative log likelihoods of class indices."""
        p = self.p
        # Not fp + y (tp - fn - fp), for one may be a million times the other.
        of_p = fp if self.y is None else torch.lerp(fp, tp - fn, self.y)
        if squares is not None:
            of_p = torch.addcmul(of_p, p, squares, value=2)
        if self.weight is not None:
            of_p = of_p * self.weight
        elif of_p is fp:  # a new tensor also where there is one place: it is written to
            of_p = of_p.expand_as(p).clone(memory_format=torch.contiguous_format)
        if self.index is not None:
            labels = self.index.squeeze(1)
            likelihood = p.gather(1, self.index)
            at_label = (tp - fn).squeeze(-1).gather(1, labels).unsqueeze(1)
            if squares is not None:
                square = squares.squeeze(-1).gather(1, labels).unsqueeze(1)
                at_label = torch.addcmul(at_label, likelihood, square, value=2)
            if self.weight is not None:
                at_label = at_label * self.weight
            if nll is not None:
                if self.ignored is not None:
                    likelihood.masked_fill_(self.ignored, 1)
                at_label = torch.addcdiv(at_label, nll.unsqueeze(1), likelihood, value=-1)
            of_p.scatter_(1, self.index, at_label)
        if p.is_contiguous():
            torch.ops.aten._softmax_backward_data.out(of_p, p, 1, p.dtype, grad_input=p)
        else:
            p.copy_(torch.ops.aten._softmax_backward_data(of_p, p, 1, p.dtype))


BIN = 512
"""One long chain of float32 additions would lose digits; and on a GPU atomics would meet."""


def sums_by_label(values: Tensor, labels: Tensor, out: Tensor) -> None:
    """Write the sums of values ``(V, b, n)`` by label ``(b, n)``, ``(V, b, C)``, bin by bin."""
    rows, images, places = values.shape
    full = places // BIN
    bins = values.new_zeros(rows, images, full + (places % BIN > 0), out.shape[-1])
    parts = [
        (bins[:, :, :full], slice(0, full * BIN), (full, BIN)),
        (bins[:, :, full:], slice(full * BIN, places), (1, places % BIN)),
    ]
    for part, where, shape in parts:
        if part.numel():
            index = labels[:, where].unflatten(1, shape).expand(rows, -1, -1, -1)
            part.scatter_add_(3, index, values[..., where].unflatten(2, shape))
    torch.sum(bins, 2, out=out)
