r"""Soft counts of independent sigmoids, for the region losses of binary and multilabel masks.

:func:`plain` computes them as they are defined, see :mod:`.softmax`; :class:`_Counts` computes the
same by few large operations, over the whole tensor or, on the CPU, block by block.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from detseg_losses.base import Block, blocks, compute_dtype, has_graph, in_blocks
from detseg_losses.memory import empty_like


def sigmoid_counts(
    logits: Tensor, target: Tensor, weight: Tensor | None, squares: bool = False
) -> Tensor:
    """FP, TP, FN and the ground truth, ``(4, B, C)``; with squares a fifth, sum p^2.

    Args:
        logits: ``(B, C, P)``.
        target: values ``(B, C, P)``, of any size where they are ignored.
        weight: of each pixel or entry, ``(B, 1 or C, P)``, 0 where it is ignored; None where all
            count alike.
        squares: whether to count p^2.
    """
    if torch.compiler.is_compiling():
        return plain(logits, target, weight, squares)
    # Beside half precision p would be twice as large.
    keep = has_graph(logits) and logits.dtype == compute_dtype(logits.dtype)
    return _Counts.apply(logits, target, weight, squares, keep)[0]


def plain(logits: Tensor, target: Tensor, weight: Tensor | None, squares: bool) -> Tensor:
    """The counts as they are defined: for compilers, and for gradients of gradients."""
    x, y = logits.to(compute_dtype(logits.dtype)), target.to(compute_dtype(logits.dtype))
    if weight is not None:
        ignored = weight == 0
        x, y = torch.where(ignored, 0, x), torch.where(ignored, 0, y)
    p, q = x.sigmoid(), (-x).sigmoid()
    terms = [p * (1 - y), p * y, q * y, y] + ([p * p] if squares else [])
    w = 1 if weight is None else weight
    return torch.stack([(term * w).sum(-1) for term in terms])


class _Counts(torch.autograd.Function):
    """The counts, and the probabilities, which are kept for backward."""

    @staticmethod
    def forward(
        logits: Tensor, target: Tensor, weight: Tensor | None, squares: bool, keep: bool
    ) -> tuple[Tensor, Tensor | None]:
        images, classes, _ = logits.shape
        p = _new(logits) if keep else None
        tiles = blocks(logits)
        shape = 4 + squares, tiles[-1].part + 1, images, classes
        counts = logits.new_empty(shape, dtype=compute_dtype(logits.dtype))
        for tile in tiles:
            block = _Block(tile, logits, target, weight, p)
            block.forward()
            block.count(counts[:, tile.part, tile.rows])
        return counts.sum(1) if len(tiles) > 1 else counts.squeeze(1), p

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        *tensors, ctx.squares, _ = inputs
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        ctx.p = output[1]
        if ctx.p is not None:
            ctx.mark_non_differentiable(ctx.p)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        nothing = (None,) * 4
        if grad is None:
            return None, *nothing
        logits, target, weight = ctx.saved_tensors
        if torch.is_grad_enabled():  # a graph of the gradient is wanted
            counts = plain(logits, target, weight, ctx.squares)
            return *torch.autograd.grad(counts, logits, grad, create_graph=True), *nothing
        # The gradient is written over p, so that another backward computes p again.
        p, ctx.p = ctx.p, None
        known = p is not None
        in_place = logits.dtype == compute_dtype(logits.dtype)
        if in_place and p is None:
            p = _new(logits)
        result = p if in_place and p is not None else torch.empty_like(logits)
        for tile in blocks(logits):
            block = _Block(tile, logits, target, weight, p)
            if not known:
                block.forward()
            block.backward(*grad[:, tile.rows].unsqueeze(-1))
            if not in_place:
                tile.of(result).copy_(block.p)
        return result, *nothing


def _new(logits: Tensor) -> Tensor:
    return empty_like(logits, logits.dtype) if in_blocks(logits) else torch.empty_like(logits)


class _Block:
    """The kernel, on some images and places; it works in its part of ``p``, if there is one."""

    def __init__(
        self, tile: Block, logits: Tensor, target: Tensor, weight: Tensor | None, p: Tensor | None
    ) -> None:
        self.x = tile.of(logits)
        if p is None:
            self.p = torch.empty_like(self.x, dtype=compute_dtype(self.x.dtype))
        else:
            self.p = tile.of(p)
        self.y = tile.of(target).to(self.p.dtype)
        self.weight = self.ignored = None
        if weight is not None:
            weight = tile.of(weight)
            self.ignored = weight == 0
            self.y = self.y.masked_fill(self.ignored, 0)
            if weight.dtype != torch.bool:
                self.weight = weight.to(self.p.dtype)

    def forward(self) -> None:
        """Write the probabilities."""
        torch.sigmoid(self.x.to(self.p.dtype), out=self.p)
        if self.ignored is not None:
            self.p.masked_fill_(self.ignored, 0)

    def count(self, counts: Tensor) -> None:
        p, y = self.p, self.y

        def add_up(values: Tensor, out: Tensor) -> None:
            torch.sum(values if self.weight is None else values * self.weight, -1, out=out)

        if len(counts) == 5:
            add_up(p * p, counts[4])
        hit = p * y
        add_up(hit, counts[1])
        add_up(torch.sub(p, hit, out=hit), counts[0])
        miss = self.q()
        if self.ignored is not None:
            miss.masked_fill_(self.ignored, 0)
        add_up(miss.mul_(y), counts[2])
        add_up(y, counts[3])

    def q(self) -> Tensor:
        """``1 - p`` without cancellation."""
        return self.x.to(self.p.dtype).neg().sigmoid_()

    def backward(
        self,
        fp: Tensor,
        tp: Tensor,
        fn: Tensor,
        true: Tensor,
        squares: Tensor | None = None,
    ) -> None:
        """Write the gradient of the logits over the probabilities."""
        p = self.p
        # Not fp + y (tp - fn - fp), for one may be a million times the other.
        of_p = torch.lerp(fp, tp - fn, self.y)
        if squares is not None:
            of_p.addcmul_(p, squares, value=2)
        if self.weight is not None:
            of_p *= self.weight
        slope = self.q()
        if self.ignored is not None:
            slope.masked_fill_(self.ignored, 0)
        p.mul_(slope).mul_(of_p)
