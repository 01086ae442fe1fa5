"""The engine of the sigmoid losses: sums of point-by-point formulas in one pass over the logits.

A formula gives the value l(x, y) and its slope dl/dx. The engine works through the logits block
by block, keeps nothing but the logits themselves, and evaluates the slopes in backward. With
class indices for targets no one-hot target exists: every entry is treated as a negative, and the
one positive of a row is then set from its own formula.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import WHOLE, Block, blocks, compute_dtype
from .layout import Batch, labels_of

Label: TypeAlias = "Tensor | int"
"""A target between 0 and 1: a tensor, or one of the constants 0 and 1, which cost nothing."""


class Sigmoid:
    """Logits ``x`` and what formulas ask of them, accurate relative to its own size everywhere.

    What a formula does not ask for is not computed.

    Attributes:
        p: sigmoid(x).
        q: sigmoid(-x), which is 1 - p without the cancellation.
        neg: softplus(x) = -log q, the cross entropy of a negative.
        pos: softplus(-x) = -log p, the cross entropy of a positive.
    """

    def __init__(self, x: Tensor) -> None:
        self.x = x
        self.p = x.sigmoid()
        self._q: Tensor | None = None
        self._log1p: Tensor | None = None
        # A gradient of the gradient is wanted: the formulas below have kinks at 0 that cancel in
        # value but not under autograd.
        self.differentiable = x.requires_grad and torch.is_grad_enabled()

    @property
    def q(self) -> Tensor:
        if self._q is None:
            self._q = (-self.x).sigmoid()
        return self._q

    @property
    def neg(self) -> Tensor:
        return F.softplus(self.x) if self.differentiable else self.x.relu().add_(self.log1p)

    @property
    def pos(self) -> Tensor:
        return F.softplus(-self.x) if self.differentiable else (-self.x).relu_().add_(self.log1p)

    @property
    def log1p(self) -> Tensor:
        """``log(1 + exp(-|x|))``: the logarithm of the rounded sum, plus the effect of rounding.

        Several times faster than ``torch.log1p`` on some CPUs, and right to 2e-7 relative.
        """
        if self._log1p is None:
            e = self.x.abs().neg_().exp_()
            u = e + 1
            self._log1p = e.sub_(u - 1).div_(u).add_(u.log())
        return self._log1p

    def missed(self, y: Label) -> Tensor:
        """The probability of the wrong answer."""
        if isinstance(y, Tensor):
            return mix(self.p, self.q, y)
        return self.q if y else self.p

    def cross_entropy(self, y: Label) -> Tensor:
        if not isinstance(y, Tensor):
            return self.pos if y else self.neg
        if self.differentiable:
            return F.softplus(self.x) - self.x * y
        return (self.x.relu() - self.x * y).add_(self.log1p)


def mix(negative: Any, positive: Any, y: Label) -> Any:
    """``(1 - y) * negative + y * positive``."""
    if isinstance(y, Tensor):
        return negative * (1 - y) + positive * y
    return positive if y else negative


@dataclass(frozen=True)
class Formula:
    """A point-by-point loss; its fields are numbers, or tensors ``(C,)`` with one for each class.

    Two formulas with the same fields are equal, so that losses can share what was computed.
    """

    def value(self, s: Sigmoid, y: Label) -> Tensor:
        raise NotImplementedError

    def slope(self, s: Sigmoid, y: Label) -> Tensor:
        raise NotImplementedError

    def fitted(self, batch: Batch) -> Formula:
        """This formula with its tensors checked and beside the logits."""
        return self._map(batch.per_class)

    def of_classes(self, index: Tensor) -> Formula:
        """This formula for entries of the classes ``index``, whatever its shape."""
        return self._map(lambda values: values[index] if values.dim() else values)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Formula:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{k: change(v) for k, v in values.items() if isinstance(v, Tensor)})


def column(weights: Any) -> Any:
    """Numbers of classes ``(C,)`` as ``(C, 1)``, to go with ``(B, C, P)``; anything else as is."""
    return weights.unsqueeze(-1) if isinstance(weights, Tensor) and weights.dim() == 1 else weights


@dataclass(frozen=True)
class Predicted(Formula):
    """The probability itself: its sum is the soft count of what is predicted."""

    def value(self, s: Sigmoid, y: Label) -> Tensor:
        return s.p

    def slope(self, s: Sigmoid, y: Label) -> Tensor:
        return s.p * s.q


@dataclass(frozen=True)
class TruePositive(Formula):
    """The probability where the target says yes: its sum is the soft count of true positives."""

    def value(self, s: Sigmoid, y: Label) -> Tensor:
        return s.p * y

    def slope(self, s: Sigmoid, y: Label) -> Tensor:
        return s.p * s.q * y


def pointwise(
    batch: Batch, formulas: Sequence[Formula], *, summed: bool = True
) -> tuple[Tensor, ...]:
    """Evaluate formulas on the logits, all of them in one pass.

    Returns:
        For each formula its weighted sums over the places, ``(B, C)``, or all its weighted values,
        ``(B, C, P)``; float32, or float64 where the logits are.
    """
    fitted = tuple(formula.fitted(batch) for formula in formulas)
    return _Pointwise.apply(batch.logits, batch.target, batch.weight, fitted, summed)


class _Pointwise(torch.autograd.Function):
    @staticmethod
    def forward(
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        formulas: tuple[Formula, ...],
        summed: bool,
    ) -> tuple[Tensor, ...]:
        tiles = blocks(logits)
        dtype = compute_dtype(logits.dtype)
        if summed:
            shape = (tiles[-1].part + 1, *logits.shape[:2])
            results = [logits.new_zeros(shape, dtype=dtype) for _ in formulas]
        else:
            results = [torch.empty_like(logits, dtype=dtype) for _ in formulas]
        for tile in tiles:
            values = _evaluate("value", logits, target, weight, formulas, tile)
            for result, value in zip(results, values, strict=True):
                if summed:
                    result[tile.part, tile.rows] = value.sum(-1)
                else:
                    tile.of(result).copy_(value)
        return tuple(result.sum(0) for result in results) if summed else tuple(results)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.formulas, ctx.summed = inputs
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if all(grad is None for grad in grads):
            return None, None, None, None, None
        logits, target, weight = ctx.saved_tensors
        formulas = tuple(f for f, g in zip(ctx.formulas, grads, strict=True) if g is not None)
        scales = [g.unsqueeze(-1) if ctx.summed else g for g in grads if g is not None]

        def gradient(tile: Block) -> Tensor:
            slopes = _evaluate("slope", logits, target, weight, formulas, tile)
            total = slopes[0] * tile.of(scales[0])
            for slope, scale in zip(slopes[1:], scales[1:], strict=True):
                total = total + slope * tile.of(scale)
            return total

        if torch.is_grad_enabled():  # create_graph: plain operations that autograd can follow
            return gradient(WHOLE).to(logits.dtype), None, None, None, None
        result = torch.empty_like(logits)
        for tile in blocks(logits):
            tile.of(result).copy_(gradient(tile))
        return result, None, None, None, None


def _evaluate(
    method: str,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    formulas: tuple[Formula, ...],
    tile: Block,
) -> list[Tensor]:
    """The values or slopes of the formulas in one block."""
    x, y = tile.of(logits).to(compute_dtype(logits.dtype)), tile.of(target)
    w = None if weight is None else tile.of(weight)
    if w is not None and tile.holds(left_out := w == 0):
        x = x.masked_fill(left_out, 0)  # it may even be infinite
    results = []
    if target.dim() == logits.dim():
        s, y = Sigmoid(x), y.to(x.dtype)
        results = [getattr(formula, method)(s, y) for formula in formulas]
    else:
        index = labels_of(y, w).unsqueeze(1)
        positive = index >= 0
        index = index.clamp(min=0)
        s, at_index = Sigmoid(x), Sigmoid(x.gather(1, index))
        for formula in formulas:
            negatives = getattr(formula, method)(s, 0)
            positives = getattr(formula.of_classes(index), method)(at_index, 1)
            chosen = torch.where(positive, positives, negatives.gather(1, index))
            results.append(negatives.scatter(1, index, chosen))
    return results if w is None else [result * w for result in results]
