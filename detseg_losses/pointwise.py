"""The engine of the sigmoid losses: sums of point-by-point formulas in one pass over the logits.

A formula gives the value l(x, y) and its slope dl/dx. The engine works through the logits block
by block. The slopes of a single sum are computed beside its values, for they have most in common,
and kept; else nothing is kept but the logits themselves, and the slopes are evaluated in backward.
With class indices for targets no one-hot target exists: every entry is treated as a negative, and
the one positive of a row is then set from its own formula. So are, on the CPU, the few entries of
a dense target that are not 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import FEW, WHOLE, Block, blocks, compute_dtype, has_graph, in_blocks, lazy
from .layout import Batch, Part

Label: TypeAlias = "Tensor | int"
"""A target between 0 and 1: a tensor, or one of the constants 0 and 1, which cost nothing."""

Method = Literal["value", "slope", "both"]


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
        self.differentiable = has_graph(x)

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
        if self.differentiable:
            return F.softplus(self.x)
        e = self.x.clamp(max=math.log(torch.finfo(self.x.dtype).max) - 8).exp_()
        if "p" not in vars(self):  # the exponential serves p and q as well
            self.q = (e + 1).reciprocal_()
            self.p = e * self.q
        return e.log1p_().clamp_(min=self.x)  # beyond the clamp they are equal

    @lazy
    def pos(self) -> Tensor:
        return F.softplus(-self.x) if self.differentiable else Sigmoid(-self.x).neg

    def missed(self, y: Label) -> Tensor:
        """The probability of the wrong answer."""
        if isinstance(y, Tensor):
            return mix(self.p, self.q, y)
        return self.q if y else self.p

    def missed_slope(self, y: Label) -> Tensor:
        return self.spread * mix(1, -1, y)

    def cross_entropy(self, y: Label) -> Tensor:
        if not isinstance(y, Tensor):
            return self.pos if y else self.neg
        if self.differentiable:
            return F.softplus(self.x) - self.x * y
        rest = self.x.abs().neg_().exp_().log1p_()  # by which softplus(x) exceeds relu(x)
        return self.x.relu().addcmul_(self.x, y, value=-1).add_(rest)

    def error(self, y: Label) -> Tensor:
        """``p - y`` without the cancellation: the slope of the cross entropy."""
        if isinstance(y, Tensor):
            return torch.lerp(self.p, -self.q, y)
        return -self.q if y else self.p


def mix(negative: Any, positive: Any, y: Label) -> Any:
    """``(1 - y) * negative + y * positive``."""
    if isinstance(y, Tensor):
        if isinstance(negative, Tensor):
            return torch.lerp(negative, positive, y)
        return torch.rsub(y, negative, alpha=negative - positive)
    return positive if y else negative


def power(base: Tensor, exponent: float, scale: Tensor | float = 1) -> Tensor:
    """``scale * base ** exponent``, a new tensor, in few operations, for some of which
    ``torch.pow`` takes many times as long.
    """
    scaled = isinstance(scale, Tensor) or scale != 1
    if exponent == 2 and scaled and not isinstance(scale, Tensor):
        return torch.addcmul(base.new_zeros(()), base, base, value=scale)
    if exponent == 1:
        result = base if scaled else base.clone()
    elif exponent == 1.5 and not has_graph(base):
        result = base.sqrt() * base  # whose slope would be infinite at 0
    else:
        result = base.pow(exponent)
    return result * scale if scaled else result


def spend(values: Tensor, factor: Tensor) -> Tensor:
    """Their product, written over values that nothing else needs, unless a graph does."""
    return values * factor if has_graph(values) else values.mul_(factor)


@dataclass(frozen=True)
class Formula:
    """A point-by-point loss; its fields are numbers, or tensors ``(C,)`` with one for each class.

    Two formulas with the same fields are equal, so that losses can share what was computed.
    """

    def value(self, s: Sigmoid, y: Label) -> Tensor:
        raise NotImplementedError

    def slope(self, s: Sigmoid, y: Label) -> Tensor:
        raise NotImplementedError

    def both(self, s: Sigmoid, y: Label) -> tuple[Tensor, Tensor]:
        """Value and slope, where they have a part in common that is worth sharing."""
        return self.value(s, y), self.slope(s, y)

    def fitted(self, batch: Batch) -> Formula:
        """This formula with its tensors checked and beside the logits."""
        return self._map(lambda option, values: batch.per_class(values, option))

    def of_classes(self, index: Tensor) -> Formula:
        """This formula for entries of the classes ``index``, whatever its shape."""
        return self._map(lambda _, values: values[index] if values.dim() else values)

    def _map(self, change: Callable[[str, Tensor], Tensor]) -> Formula:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(
            self, **{k: change(k, v) for k, v in values.items() if isinstance(v, Tensor)}
        )


def column(weights: Any) -> Any:
    """Numbers of classes ``(C,)`` as ``(C, 1)``, to go with ``(B, C, P)``; anything else as is."""
    return weights.unsqueeze(-1) if isinstance(weights, Tensor) and weights.dim() == 1 else weights


def pointwise(
    batch: Batch,
    sums: Sequence[Formula] = (),
    maps: Sequence[Formula] = (),
    *,
    per_class: bool = True,
) -> tuple[Tensor, ...]:
    """Evaluate formulas on the logits, all of them in one pass.

    Args:
        batch: the logits, targets and weights.
        sums: formulas of which the sums over the places are wanted.
        maps: formulas of which all values are wanted.
        per_class: whether the sums are those of each class, or of all.

    Returns:
        The weighted sums, ``(B, C)`` or ``(B, 1)``, then the weighted values, ``(B, C, P)``;
        float32, or float64 where the logits are.
    """
    fitted = [tuple(formula.fitted(batch) for formula in formulas) for formulas in (sums, maps)]
    keep = (
        len(sums) == 1
        and not maps
        and has_graph(batch.logits)
        and not torch.compiler.is_compiling()
        and batch.logits.dtype != torch.float16  # the slopes underflow before a loss scaler acts
    )
    tensors = batch.logits, batch.target, batch.weight
    *results, _ = _Pointwise.apply(*tensors, *fitted, keep, per_class)
    if batch.scale is not None:
        results[: len(sums)] = (result * batch.scale for result in results[: len(sums)])
        results[len(sums) :] = (result * batch.scale[..., None] for result in results[len(sums) :])
    return tuple(results)


class _Pointwise(torch.autograd.Function):
    """The results, and the slopes of a single sum where they are to be kept."""

    @staticmethod
    def forward(
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        summed: tuple[Formula, ...],
        mapped: tuple[Formula, ...],
        keep: bool,
        per_class: bool,
    ) -> tuple[Tensor | None, ...]:
        tiles = blocks(logits)
        dtype = compute_dtype(logits.dtype)
        images, classes, _ = logits.shape
        shape = (tiles[-1].part + 1, images, classes if per_class else 1)
        over = -1 if per_class else (-2, -1)
        sums = [logits.new_zeros(shape, dtype=dtype) for _ in summed]
        stored: list[Tensor | None] = [None] * (len(mapped) + 1)  # the maps, and what is kept

        def compute(tile: Block) -> None:
            block = _SigmoidBlock(tile, logits, target, weight)
            for index, formula in enumerate(mapped):
                (values,) = block.evaluate(formula, "value")
                stored[index] = tile.store(block.finished(values), stored[index], logits, dtype)
            for formula, result in zip(summed, sums, strict=True):
                values, *slopes = block.evaluate(formula, "both" if keep else "value")
                for slope in slopes:
                    slope = block.finished(slope)
                    stored[-1] = tile.store(slope, stored[-1], logits, logits.dtype)
                total = block.finished(values).sum(over)
                result[tile.part, tile.rows] = total if per_class else total.unsqueeze(-1)

        for tile in tiles:
            compute(tile)  # whose temporaries are free when the next one asks for memory
        return *(result.sum(0) for result in sums), *stored

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        *tensors, ctx.summed, ctx.mapped, ctx.keep, _ = inputs
        ctx.alone = len(ctx.summed) == 1 and not ctx.mapped
        ctx.classes_last = inputs[0].stride(1) < inputs[0].stride(2)
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        ctx.kept = output[-1]
        if ctx.kept is not None:
            ctx.mark_non_differentiable(ctx.kept)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        nothing = (None,) * 6
        count = len(ctx.summed)
        factors = (*(g if g is None else g.unsqueeze(-1) for g in grads[:count]), *grads[count:-1])
        pairs = zip((*ctx.summed, *ctx.mapped), factors, strict=True)
        found = [(formula, factor) for formula, factor in pairs if factor is not None]
        if not found:
            return None, *nothing
        logits, target, weight = ctx.saved_tensors

        def gradient(tile: Block) -> Tensor:
            block = _SigmoidBlock(tile, logits, target, weight)
            if not ctx.alone:
                return block.gradient([(each, tile.of(factor)) for each, factor in found])
            # In the same way as what is kept, so that another backward gives the same digits,
            # but for logits of half precision, in which what is kept is rounded.
            ((formula, factor),) = found
            slope = block.finished(block.evaluate(formula, "both" if ctx.keep else "slope")[-1])
            factor = tile.of(factor)
            if not ctx.classes_last:
                return slope * factor
            # In this order a compiler writes it once; else it would write it and transpose it.
            return (slope.movedim(1, -1) * factor.movedim(1, -1)).movedim(-1, 1)

        if torch.is_grad_enabled():  # create_graph: plain operations that autograd can follow
            return gradient(WHOLE).to(logits.dtype), *nothing
        if ctx.kept is not None:
            # Handed over, to be anyone's; another backward evaluates the slopes anew.
            result, ctx.kept = ctx.kept, None
            ((_, factor),) = found
            if not in_blocks(result) or (factor != 1).any():
                result.mul_(factor)
            return result, *nothing
        result = None
        for tile in blocks(logits):
            result = tile.store(gradient(tile), result, logits, logits.dtype)
        return result, *nothing


class _SigmoidBlock(Part):
    """One block of a batch, on which formulas are evaluated."""

    no_label = -1

    def __init__(self, tile: Block, logits: Tensor, target: Tensor, weight: Tensor | None) -> None:
        super().__init__(tile, logits, target, weight)
        self.gaps: tuple[Any, ...] | None = None
        """Where it is left out, if that is little that can be looked up."""
        out = self.left_out
        if out is not None and tile is not WHOLE and out.count_nonzero() * FEW < out.numel():
            images, classes, places = out.nonzero(as_tuple=True)
            self.gaps = images, slice(None) if out.shape[1] == 1 else classes, places
            if weight is not None and weight.dtype == torch.bool:
                self.w = None  # everything but the gaps counts alike
        # Gaps that are filled in the results are of no matter in the logits.
        x = self.x if self.gaps is None else self.raw
        self.s = Sigmoid(x)
        self.label: Label = 0 if self.y is None else self.y
        self.entries: tuple[Tensor, ...] | None = None
        """Where the label is something else, among the few that only the CPU can look up."""
        if tile is not WHOLE:
            self._look_up()
        elif self.y is None:
            # Compared, not scattered: a compiler can then compute all in one loop.
            classes = torch.arange(x.shape[1], dtype=self.dtype, device=x.device)
            self.hot = (self.labels.to(self.dtype).unsqueeze(-1) == classes).movedim(-1, 1)
            self.index = self.labels.clamp(min=0).unsqueeze(1)
            self.at_index = Sigmoid(x.gather(1, self.index))

    def _look_up(self) -> None:
        if self.y is None:
            images, places = (self.labels >= 0).nonzero(as_tuple=True)
            entries: tuple[Tensor, ...] = images, self.labels[images, places], places
            self.label_there: Label = 1
        else:
            # As integers of the same bits, and in the order of memory, they are found much faster.
            bits = self.y.view(torch.int64 if self.dtype == torch.float64 else torch.int32)
            # The sum takes less time than to count, which is in vain where they are not few.
            if any(count() * FEW >= bits.numel() for count in (self.y.sum, bits.count_nonzero)):
                return
            order = (0, 2, 1) if bits.stride(1) < bits.stride(2) else (0, 1, 2)
            found = bits.permute(order).nonzero(as_tuple=True)
            entries = tuple(found[index] for index in order)
            self.label, self.label_there = 0, self.y[entries].unsqueeze(0)
        self.entries = tuple(index.unsqueeze(0) for index in entries)

    @lazy
    def at_entries(self) -> Sigmoid:
        return Sigmoid(self.s.x[self.entries])

    def evaluate(self, formula: Formula, method: Method) -> tuple[Tensor, ...]:
        """Its values, slopes, or both, ``(b, C, n)``."""

        def results(formula: Formula, s: Sigmoid, y: Label) -> tuple[Tensor, ...]:
            found = getattr(formula, method)(s, y)
            return found if method == "both" else (found,)

        found = results(formula, self.s, self.label)
        if self.entries is not None:
            chosen = results(formula.of_classes(self.entries[1]), self.at_entries, self.label_there)
            found = tuple(map(self._put, found, chosen))
        elif self.y is None:
            chosen = results(formula.of_classes(self.index), self.at_index, 1)
            found = tuple(torch.where(self.hot, *pair) for pair in zip(chosen, found, strict=True))
        return found

    def _put(self, values: Tensor, chosen: Tensor) -> Tensor:
        # Even where these are p itself: every other formula replaces the same entries.
        values[self.entries] = chosen
        return values

    def gradient(self, pairs: Sequence[tuple[Formula, Tensor]]) -> Tensor:
        """The weighted sum of the slopes of formulas, each times a factor."""
        slopes = [(self.evaluate(formula, "slope")[0], factor) for formula, factor in pairs]
        (slope, factor), *others = slopes
        total = slope * factor
        for slope, factor in others:
            total.addcmul_(slope, factor)
        return self.finished(total)

    def finished(self, values: Tensor) -> Tensor:
        """Values with their weights.

        Gaps are filled even where the values are p itself: every other result has the same.
        """
        values = self.weighted(values)
        if self.gaps is not None:
            values[self.gaps] = 0
        return values
