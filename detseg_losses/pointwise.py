"""The engine of the sigmoid losses: sums of point-by-point formulas in one pass over the logits.

A formula gives the value l(x, y) and its slope dl/dx. The engine works through the logits block
by block. The slopes of a single sum are computed beside its values, for they have most in common,
and kept; else nothing is kept but the logits themselves, and the slopes are evaluated in backward.
With class indices for targets no one-hot target exists: every entry is treated as a negative, and
the one positive of a row is then set from its own formula.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import WHOLE, Block, blocks, compute_dtype
from .layout import Batch, Part

Label: TypeAlias = "Tensor | int"
"""A target between 0 and 1: a tensor, or one of the constants 0 and 1, which cost nothing."""


class lazy:
    """An attribute that is computed when it is first asked for."""

    def __init__(self, compute: Callable[[Any], Tensor]) -> None:
        self.compute = compute
        self.name = compute.__name__

    def __get__(self, instance: Any, owner: type) -> Tensor:
        value = self.compute(instance)
        setattr(instance, self.name, value)
        return value


class Sigmoid:
    """Logits ``x`` and what formulas ask of them, accurate relative to its own size everywhere.

    What a formula does not ask for is not computed.

    Attributes:
        p: sigmoid(x).
        q: sigmoid(-x), which is 1 - p without the cancellation.
        spread: p q, the slope of p.
        neg: softplus(x) = -log q, the cross entropy of a negative.
        pos: softplus(-x) = -log p, the cross entropy of a positive.
    """

    def __init__(self, x: Tensor) -> None:
        self.x = x
        # A gradient of the gradient is wanted: the formulas below have kinks at 0 that cancel in
        # value but not under autograd.
        self.differentiable = x.requires_grad and torch.is_grad_enabled()

    @lazy
    def p(self) -> Tensor:
        return self.x.sigmoid()

    @lazy
    def q(self) -> Tensor:
        return (-self.x).sigmoid()

    @lazy
    def spread(self) -> Tensor:
        """The slope of p."""
        return self.p * self.q

    @lazy
    def neg(self) -> Tensor:
        return F.softplus(self.x) if self.differentiable else softplus(self.x)

    @lazy
    def pos(self) -> Tensor:
        return F.softplus(-self.x) if self.differentiable else softplus(-self.x)

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
        rest = log1p(self.x.abs().neg_().exp_())  # what either softplus is more than its relu
        return self.x.relu().addcmul_(self.x, y, value=-1).add_(rest)


def softplus(x: Tensor) -> Tensor:
    """``log(1 + exp(x))``, without a graph."""
    limit = math.log(torch.finfo(x.dtype).max) - 8  # beyond it, softplus(x) = x
    result = log1p(x.clamp(max=limit).exp_())
    return torch.maximum(result, x, out=result)


def log1p(e: Tensor) -> Tensor:
    """``log(1 + e)`` of what is not negative, without a graph: right to 2e-7 relative.

    The logarithm of the rounded sum and the effect of rounding, for ``torch.log1p`` takes as long
    as ten exponentials on some CPUs.
    """
    more = e + 1
    rounding = (more - 1).sub_(e)
    return more.log().addcdiv_(rounding, more, value=-1)


def mix(negative: Any, positive: Any, y: Label) -> Any:
    """``(1 - y) * negative + y * positive``."""
    if isinstance(y, Tensor):
        if isinstance(negative, Tensor):
            return torch.lerp(negative, positive, y)
        return torch.rsub(y, negative, alpha=negative - positive)
    return positive if y else negative


def power(base: Tensor, exponent: float) -> Tensor:
    """``base ** exponent``, some of which ``torch.pow`` takes many times as long for."""
    if exponent == 1:
        return base
    if exponent == 1.5 and not (base.requires_grad and torch.is_grad_enabled()):
        return base.sqrt() * base  # whose slope would be infinite at 0
    return base.pow(exponent)


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
        return s.spread


@dataclass(frozen=True)
class TruePositive(Formula):
    """The probability where the target says yes: its sum is the soft count of true positives."""

    def value(self, s: Sigmoid, y: Label) -> Tensor:
        return s.p * y

    def slope(self, s: Sigmoid, y: Label) -> Tensor:
        return s.spread * y


@dataclass(frozen=True)
class Squared(Formula):
    """The square of the probability."""

    def value(self, s: Sigmoid, y: Label) -> Tensor:
        return s.p * s.p

    def slope(self, s: Sigmoid, y: Label) -> Tensor:
        return 2 * s.p * s.spread


def pointwise(
    batch: Batch, formulas: Sequence[Formula], *, summed: bool = True
) -> tuple[Tensor, ...]:
    """Evaluate formulas on the logits, all of them in one pass.

    Returns:
        For each formula its weighted sums over the places, ``(B, C)``, or all its weighted values,
        ``(B, C, P)``; float32, or float64 where the logits are.
    """
    fitted = tuple(formula.fitted(batch) for formula in formulas)
    keep = (
        summed
        and len(fitted) == 1
        and batch.logits.requires_grad
        and torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and batch.logits.dtype != torch.float16  # the slopes underflow before a loss scaler acts
    )
    *results, _ = _Pointwise.apply(batch.logits, batch.target, batch.weight, fitted, summed, keep)
    return tuple(results)


class _Pointwise(torch.autograd.Function):
    """The results, and the slopes of a single sum where they are to be kept."""

    @staticmethod
    def forward(
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        formulas: tuple[Formula, ...],
        summed: bool,
        keep: bool,
    ) -> tuple[Tensor | None, ...]:
        tiles = blocks(logits)
        dtype = compute_dtype(logits.dtype)
        if summed:
            shape = (tiles[-1].part + 1, *logits.shape[:2])
            results = [logits.new_zeros(shape, dtype=dtype) for _ in formulas]
        else:
            results = [torch.empty_like(logits, dtype=dtype) for _ in formulas]
        kept = torch.empty_like(logits) if keep else None
        for tile in tiles:
            block = _SigmoidBlock(tile, logits, target, weight)
            for formula, result in zip(formulas, results, strict=True):
                if summed:
                    result[tile.part, tile.rows] = block.evaluate(formula, "value").sum(-1)
                else:
                    tile.of(result).copy_(block.evaluate(formula, "value"))
                if kept is not None:
                    tile.of(kept).copy_(block.evaluate(formula, "slope"))
        if summed:
            results = [result.sum(0) for result in results]
        return *results, kept

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        *tensors, ctx.formulas, ctx.summed, _ = inputs
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        ctx.kept = output[-1]
        if ctx.kept is not None:
            ctx.mark_non_differentiable(ctx.kept)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        nothing = (None,) * 5
        found = [(f, g) for f, g in zip(ctx.formulas, grads, strict=False) if g is not None]
        if not found:
            return None, *nothing
        scales = [grad.unsqueeze(-1) if ctx.summed else grad for _, grad in found]
        logits, target, weight = ctx.saved_tensors

        def gradient(tile: Block) -> Tensor:
            block = _SigmoidBlock(tile, logits, target, weight)
            slopes = [block.evaluate(formula, "slope") for formula, _ in found]
            total = slopes[0] * tile.of(scales[0])
            for slope, scale in zip(slopes[1:], scales[1:], strict=True):
                total = total.addcmul(slope, tile.of(scale))
            return total

        if torch.is_grad_enabled():  # create_graph: plain operations that autograd can follow
            return gradient(WHOLE).to(logits.dtype), *nothing
        if ctx.kept is not None:
            # Handed over, to be anyone's; another backward evaluates the slopes anew.
            result, ctx.kept = ctx.kept, None
            if blocks(logits)[0] is WHOLE or (scales[0] != 1).any():
                result.mul_(scales[0])
            return result, *nothing
        result = torch.empty_like(logits)
        for tile in blocks(logits):
            tile.of(result).copy_(gradient(tile))
        return result, *nothing


class _SigmoidBlock(Part):
    """One block of a batch, on which formulas are evaluated."""

    def __init__(self, tile: Block, logits: Tensor, target: Tensor, weight: Tensor | None) -> None:
        super().__init__(tile, logits, target, weight)
        self.s = Sigmoid(self.x)
        self.whole = tile is WHOLE
        if self.y is not None:
            return
        # The one positive of a row. Where only the CPU need know how many there are, those alone.
        self.positive = self.labels >= 0
        if self.whole:
            self.index = self.labels.clamp(min=0).unsqueeze(1)
            self.at_index = Sigmoid(self.x.gather(1, self.index))
        else:
            images, places = (i.unsqueeze(0) for i in self.positive.nonzero(as_tuple=True))
            self.entries = images, self.labels[images, places], places
            self.at_index = Sigmoid(self.x[self.entries])

    def evaluate(self, formula: Formula, method: Literal["value", "slope"]) -> Tensor:
        """Its weighted values or slopes, ``(b, C, n)``."""
        result = getattr(formula, method)(self.s, 0 if self.y is None else self.y)
        if self.y is None and self.whole:
            ones = getattr(formula.of_classes(self.index), method)(self.at_index, 1)
            chosen = torch.where(self.positive.unsqueeze(1), ones, result.gather(1, self.index))
            result = result.scatter(1, self.index, chosen)
        elif self.y is None:
            if any(result is shared for shared in vars(self.s).values()):
                result = result.clone()
            classes = self.entries[1]
            result[self.entries] = getattr(formula.of_classes(classes), method)(self.at_index, 1)
        return self.weighted(result)
