r"""Losses and soft counts of independent sigmoids, in one pass over the logits.

:func:`plain` computes them as they are defined, see :mod:`.softmax`; :class:`_Block` computes the
same by few large operations, over the whole tensor or, on the CPU, block by block.

A hard answer has a wrong alternative, whose logit u is x of a negative and -x of a positive. Most
losses are one function of u. That of class indices is evaluated for every entry as for a negative,
and once more for the positive of each place. Where u is minus infinity, the wrong answer is
impossible and costs nothing: so entries that are ignored, or are something else, drop out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from detseg_losses._core.batch import Batch
from detseg_losses._core.blocks import (
    WHOLE,
    Block,
    blocks,
    compute_dtype,
    followed,
    has_graph,
    lazy,
)
from detseg_losses._core.checks import in_blocks
from detseg_losses.memory import empty_like

from .softmax import sums_by_label

Label: TypeAlias = "Tensor | int"
"""A target: 0, 1, a tensor of bools, or a floating point tensor of values in [0, 1]."""

FEW = 16
"""Below one target in so many that is not 0, the others are computed as negatives."""

SMALL = 2
"""Class indices of so few classes are taken for dense targets."""

# What formulas are made of. Each is accurate relative to its own size and differentiable.


def wrong(x: Tensor, y: Label) -> Tensor:
    """The logit of the wrong answer; of a value in between, of the one that it is farther from."""
    if not isinstance(y, Tensor):
        return -x if y else x
    if y.dtype == torch.bool:
        return torch.where(y, -x, x)
    return x * torch.rsub(y.round(), 1, alpha=2)


def between(y: Label) -> Tensor | None:
    """How far values in between are from the nearer of 0 and 1, with the sign of the way there."""
    if isinstance(y, Tensor) and y.is_floating_point():
        return y - y.round()
    return None


def softplus(x: Tensor) -> Tensor:
    """``log(1 + exp(x))``; torch's own default is x beyond 20, too early for float64."""
    return F.softplus(x, threshold=40)


def log_1p_exp(x: Tensor) -> Tensor:
    """:func:`softplus` where no gradient is wanted. Composing it takes two thirds of the time on
    the CPU.
    """
    if not in_blocks(x):
        return softplus(x)
    return x.clamp(max=80).exp_().log1p_().clamp_(min=x)


def cross_entropy(x: Tensor, y: Label) -> Tensor:
    """``-y log p - (1 - y) log (1 - p)``."""
    ce, rest = softplus(wrong(x, y)), between(y)
    return ce if rest is None else ce - x * rest


def error(x: Tensor, y: Label) -> Tensor:
    """``p - y``."""
    p, rest = wrong(x, y).sigmoid(), between(y)
    if not isinstance(y, Tensor):
        return -p if y else p
    if rest is None:
        return torch.where(y, -p, p)
    return torch.rsub(y.round(), 1, alpha=2) * p - rest


def missed(x: Tensor, y: Label) -> Tensor:
    """``(1 - y) p + y (1 - p)``, the probability of the wrong answer."""
    p, rest = wrong(x, y).sigmoid(), between(y)
    return p if rest is None else torch.lerp(p, 1 - p, rest.abs())


def mix(negative: Any, positive: Any, y: Label, like: Tensor) -> Any:
    """``(1 - y) * negative + y * positive``, of the dtype of another tensor."""
    if not isinstance(y, Tensor):
        return positive if y else negative
    if isinstance(negative, Tensor):
        if y.dtype == torch.bool:
            return torch.where(y, positive, negative)
        return lerp(negative, positive, y)
    return torch.add(like.new_full((), negative), y, alpha=positive - negative)


def power(base: Tensor, exponent: float) -> Tensor:
    """``base ** exponent`` of a base that is not negative, whose slope is finite where it is 0."""
    if exponent in (1, 2):
        return base if exponent == 1 else base * base
    return base.clamp(min=torch.finfo(base.dtype).tiny).pow(exponent)


def lerp(start: Tensor, end: Tensor, weight: Tensor) -> Tensor:
    """``torch.lerp``; with small ends, composing it takes half the time on the CPU."""
    if not in_blocks(weight) or start.numel() * FEW > weight.numel():
        return torch.lerp(start, end, weight)
    return torch.rsub(weight, 1).mul_(start).add_(weight * end)


def column(weights: Any) -> Any:
    """Numbers of classes ``(C,)`` as ``(C, 1)``, to go with ``(B, C, P)``; anything else as is."""
    return weights.unsqueeze(-1) if isinstance(weights, Tensor) and weights.dim() == 1 else weights


@dataclass(frozen=True)
class Formula:
    """A point-by-point loss; its fields are numbers, or tensors ``(C,)`` with one for each class.

    Two formulas with the same fields are equal, so that losses can share what was computed.
    """

    def value(self, x: Tensor, y: Label) -> Tensor:
        """The loss as it is defined, by differentiable operations."""
        raise NotImplementedError

    def both(self, x: Tensor, y: Label) -> tuple[Tensor, Tensor]:
        """The loss and its slope in x."""
        with torch.enable_grad(), _own_memory():
            x = x.detach().requires_grad_()
            value = self.value(x, y)
            if not value.requires_grad:
                return value, torch.zeros_like(x)
            (slope,) = torch.autograd.grad(value.sum(), x)
        return value.detach(), slope

    def quick(self, x: Tensor, y: Label) -> Tensor:
        """The loss where no gradient is wanted."""
        return self.value(x, y)

    def slope(self, x: Tensor, y: Label) -> Tensor:
        """The slope alone."""
        return self.both(x, y)[1]

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


def _own_memory() -> AbstractContextManager[Any]:
    """Without a caller's hooks on saved tensors, which are for what is kept for the caller."""
    autograd: Any = torch._C._autograd
    if not autograd._saved_tensors_hooks_is_enabled():  # in torch.func, where there are none
        return nullcontext()
    return saved_tensors_hooks(_as_it_is, _as_it_is)


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


class Symmetric(Formula):
    """A loss whose hard answers have, but for their weights, the same loss f(u)."""

    slope_is_p: ClassVar[bool] = False
    """Whether the slope of f is the probability of the wrong answer."""

    def weights(self) -> tuple[Any, Any]:
        """Those of negatives and of positives: two numbers, or two tensors."""
        raise NotImplementedError

    def forward(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """``f(u)``, and what backward needs, a new tensor or u; 0 where u is minus infinity."""
        raise NotImplementedError

    def kept(self, u: Tensor) -> Tensor:
        """The second of these alone."""
        return self.forward(u)[1]

    def backward(self, kept: Tensor, factor: Tensor) -> Tensor:
        """The slope of f times a factor, in the place of what was kept or in a new tensor."""
        return kept.mul_(factor)

    def between(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The loss and its slope in x where the target is not known to be 0 or 1. A formula by hand
        may lose digits that only positives of high probability have.
        """
        return super().both(x, y)

    def quick(self, x: Tensor, y: Label) -> Tensor:
        return self.between(x, y)[0] if isinstance(y, Tensor) else self.both(x, y)[0]

    def both(self, x: Tensor, y: Label) -> tuple[Tensor, Tensor]:
        if isinstance(y, Tensor):
            return self.between(x, y)
        weight = column(self.weights()[y])
        value, kept = self.forward(wrong(x, y))
        factor = torch.as_tensor(-weight if y else weight, dtype=x.dtype)  # the CPU alone gets here
        return value * weight, self.backward(kept, factor)


class SigmoidWants(NamedTuple):
    """What to compute.

    Attributes:
        sums: formulas whose sums over the places are wanted.
        maps: formulas of which all values are wanted.
        counts: whether FP, TP, FN and the ground truth are.
        squares: whether sum p^2 is, too.
        per_class: whether the sums are those of each class, or of all.
    """

    sums: tuple[Formula, ...] = ()
    maps: tuple[Formula, ...] = ()
    counts: bool = False
    squares: bool = False
    per_class: bool = True

    @property
    def rows(self) -> int:
        """How many counts there are."""
        return (4 + self.squares) * self.counts

    @property
    def keeps(self) -> bool:
        """Whether something is worth keeping for backward."""
        return self.counts or (len(self.sums) == 1 and not self.maps)


def sigmoid_statistics(batch: Batch, wants: SigmoidWants) -> tuple[Tensor, ...]:
    """Compute statistics that autograd can differentiate.

    Returns:
        The weighted sums, ``(B, C)`` or ``(B, 1)``, the weighted values, ``(B, C, P)``, and the
        counts, ``(4 or 5, B, C)``; float32, or float64 where the logits are.
    """
    sums, maps = (tuple(each.fitted(batch) for each in formulas) for formulas in wants[:2])
    wants = wants._replace(sums=sums, maps=maps)
    target = batch.target
    if batch.dense and not target.is_floating_point() and not in_blocks(target):
        target = target.bool()
    tensors = batch.logits, target, batch.weight
    if followed():
        results = [*plain(*tensors, wants)]
    else:
        # Beside half precision what is kept would be twice as large.
        full = batch.logits.dtype == batch.dtype
        keep = full and has_graph(batch.logits) and wants.keeps
        results = [*_Sigmoid.apply(*tensors, wants, keep)]
    if batch.scale is not None:
        count = len(sums)
        results[:count] = (result * batch.scale for result in results[:count])
        results[count:] = (result * batch.scale[..., None] for result in results[count:])
    return tuple(results)


def plain(
    logits: Tensor, target: Tensor, weight: Tensor | None, wants: SigmoidWants
) -> tuple[Tensor, ...]:
    """The statistics as they are defined: for compilers, and for gradients of gradients."""
    x = logits.to(compute_dtype(logits.dtype))
    if target.dim() == 2:  # compared, which a compiler fuses with all else
        y = target.unsqueeze(1) == torch.arange(x.shape[1], device=x.device).unsqueeze(1)
    else:
        y = target.to(x.dtype) if target.is_floating_point() else target.bool()
    w: Any = None
    if weight is not None:
        ignored = weight == 0
        x, y = torch.where(ignored, 0, x), y.masked_fill(ignored, 0)
        w = weight.to(x.dtype)

    def weighted(values: Tensor) -> Tensor:
        return values if w is None else values * w

    over = -1 if wants.per_class else (-2, -1)
    sums = [weighted(formula.value(x, y)).sum(over) for formula in wants.sums]
    if not wants.per_class:
        sums = [each.unsqueeze(-1) for each in sums]
    maps = [weighted(formula.value(x, y)) for formula in wants.maps]
    if not wants.counts:
        return *sums, *maps
    p, y = x.sigmoid(), y.to(x.dtype)
    terms = [p * (1 - y), p * y, (1 - p) * y] + ([p * p] if wants.squares else [])
    fp, tp, fn, *squares = (weighted(term).sum(-1) for term in terms)
    return *sums, *maps, torch.stack([fp, tp, fn, (tp + fn).detach(), *squares])


def _blocks(logits: Tensor) -> list[Block]:
    """Blocks of which each thread's share stays in its cache."""
    return blocks(logits, torch.get_num_threads() / 4)


class _Sigmoid(torch.autograd.Function):
    """The statistics, and what is kept for backward.

    That is the probabilities where counts are wanted. Of the sum of a single formula it is what
    the formula asks for, or, of many blocks, its slopes.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        wants: SigmoidWants,
        keep: bool,
    ) -> tuple[Tensor | None, ...]:
        images, classes, _ = logits.shape
        dtype = compute_dtype(logits.dtype)
        tiles = _blocks(logits)
        cut = len(tiles) > 1
        parts = tiles[-1].part + 1
        columns = classes if wants.per_class else 1
        sums = logits.new_empty(len(wants.sums), parts, images, columns, dtype=dtype)
        counts = logits.new_empty(wants.rows, parts, images, classes, dtype=dtype)
        maps: list[Tensor | None] = [None] * len(wants.maps)
        by_wrong: list[bool] = []
        kept: tuple[Tensor, ...] = ()
        if keep and (wants.counts or cut):
            kept = (_new(logits),)

        def compute(tile: Block) -> tuple[Tensor, ...]:
            """Write the results of a block; return what is kept."""
            block = _Block(tile, logits, target, weight)
            for index, formula in enumerate(wants.maps):
                evaluation = block.evaluation(formula)
                whole_map = evaluation.map(evaluation.values())
                maps[index] = tile.store(whole_map, maps[index], logits, dtype)
            outs = sums[:, tile.part, tile.rows]
            if keep and not wants.counts:  # of a single formula
                evaluation = block.evaluation(wants.sums[0])
                values, own = evaluation.forward()
                evaluation.add_up(values, outs[0])
                if not cut:
                    return own
                slopes = evaluation.gradient(own, logits.new_ones(1, 1, 1))
                tile.of(kept[0]).copy_(slopes)
                return kept
            for formula, out in zip(wants.sums, outs, strict=True):
                evaluation = block.evaluation(formula)
                evaluation.add_up(evaluation.values(), out)
            if wants.counts:
                place = tile.of(kept[0]) if keep else torch.empty_like(block.raw)
                block.count(place, counts[:, tile.part, tile.rows], wants)
                by_wrong.append(block.by_wrong(wants))
            return kept

        for tile in tiles:
            kept = compute(tile)  # whose temporaries are free when the next one asks for memory
        results = [each.sum(0) if parts > 1 else each.squeeze(0) for each in sums]
        if wants.counts:
            maps.append(counts.sum(1) if parts > 1 else counts.squeeze(1))
        ctx.save_for_backward(logits, target, weight)
        ctx.set_materialize_grads(False)
        # The blocks depend on the number of threads, which may change.
        ctx.tiles, ctx.wants, ctx.kept, ctx.by_wrong = tiles, wants, kept, by_wrong
        return *results, *maps

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        nothing = (None,) * 4
        if all(grad is None for grad in grads):
            return None, *nothing
        logits, target, weight = ctx.saved_tensors
        wants: SigmoidWants = ctx.wants
        # What was kept is written over, so that another backward computes it again.
        kept, ctx.kept = ctx.kept, ()
        if torch.is_grad_enabled():  # a graph of the gradient is wanted
            pairs = zip(plain(logits, target, weight, wants), grads, strict=True)
            outputs, factors = zip(*((s, g) for s, g in pairs if g is not None), strict=True)
            return *torch.autograd.grad(outputs, logits, factors, create_graph=True), *nothing
        cut = len(ctx.tiles) > 1
        count = len(wants.sums)
        if kept and cut and not wants.counts:
            (result,), (factor,) = kept, grads
            assert factor is not None
            if (factor != 1).any():
                result.mul_(factor.unsqueeze(-1))
            return result, *nothing
        factors = *(g if g is None else g.unsqueeze(-1) for g in grads[:count]), *grads[count:]
        p = kept[0] if wants.counts and kept else None
        result = p
        for index, tile in enumerate(ctx.tiles):
            block = _Block(tile, logits, target, weight)
            place = None
            if wants.counts:
                place = None if p is None else tile.of(p)
                if ctx.by_wrong[index]:
                    block.hard, block.known = True, place
            gradient = None
            for formula, factor in zip((*wants.sums, *wants.maps), factors, strict=False):
                if factor is not None:
                    evaluation = block.evaluation(formula)
                    own = evaluation.kept() if wants.counts or not kept else kept
                    more = evaluation.gradient(own, tile.of(factor))
                    gradient = more if gradient is None else gradient.add_(more)
            if wants.counts and factors[-1] is not None:
                # Last, for it is written over the probabilities that formulas read.
                more = block.gradient_of_counts(place, factors[-1][:, tile.rows])
                gradient = more if gradient is None else more.add_(gradient)
            assert gradient is not None
            if gradient is not place:
                result = tile.store(gradient, result, logits, logits.dtype)
        return result, *nothing


def _new(logits: Tensor) -> Tensor:
    return empty_like(logits, logits.dtype) if in_blocks(logits) else torch.empty_like(logits)


class _Block:
    """Some images and places, and the kernels of their counts.

    Attributes:
        raw: logits ``(b, C, n)`` in the dtype of the computation.
        ignored: mask of ignored entries, ``(b, 1 or C, n)``; None if there are none.
        w: weight, of the same shape; None where all that is not ignored counts alike.
        y: dense targets ``(b, C, n)``, bools or numbers, 0 where they are ignored; else None.
        index: class indices ``(b, 1, n)``, valid ones everywhere; else None.
        known: the probabilities of wrong answers, if they have been kept.
    """

    known: Tensor | None = None

    def __init__(
        self,
        tile: Block,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
    ) -> None:
        self.cut = tile is not WHOLE
        self.raw = tile.of(logits)
        self.raw = self.raw.to(compute_dtype(self.raw.dtype))
        self.ignored: Tensor | None = None
        self.w = self.y = self.index = None
        if weight is not None:
            weight = tile.of(weight)
            ignored = torch.eq(weight, 0)
            if not self.cut or bool(ignored.any()):
                self.ignored = ignored
            if weight.dtype != torch.bool:
                self.w = weight.to(self.raw.dtype)
        target = tile.of(target)
        if target.dim() == 2 and self.raw.shape[1] <= SMALL:
            classes = torch.arange(self.raw.shape[1], device=target.device)
            target = target.unsqueeze(1) == classes.unsqueeze(1)
        if target.dim() == 3:
            if target.is_floating_point() or in_blocks(target):  # where selecting is slow
                target = target.to(self.raw.dtype)
            self.y = target if self.ignored is None else target.masked_fill(self.ignored, 0)
        else:
            self.labels = target.long().unsqueeze(1)
            if self.ignored is not None:
                rows = self.ignored
                rows = rows if rows.shape[1] == 1 else rows.all(1, keepdim=True)
                self.labels = self.labels.masked_fill(rows, -1)
            self.index = self.labels.clamp(min=0)

    def guarded(self, value: Tensor | float) -> Tensor:
        """Logits, and a value where they are ignored: there they may even be infinite."""
        if self.ignored is None:
            return self.raw
        if self.cut and self.ignored.count_nonzero() * FEW < self.ignored.numel():
            # To look few up takes half the time, or less.
            images, classes, places = self.ignored.nonzero(as_tuple=True)
            x = self.raw.clone()
            x[images, slice(None) if self.ignored.shape[1] == 1 else classes, places] = value
            return x
        return torch.where(self.ignored, value, self.raw)

    def at_index(self, values: Any) -> Any:
        """The entries of a tensor that goes with ``(b, C, n)``; a number as it is."""
        if not isinstance(values, Tensor) or values.dim() < 2 or values.shape[-2] == 1:
            return values
        assert self.index is not None
        return values.expand(self.raw.shape).gather(1, self.index)

    def choose(self, negative: Any, positive: Any) -> Any:
        """:func:`mix` by the dense targets; one number where the two are equal."""
        assert self.y is not None
        if not isinstance(negative, Tensor) and negative == positive:
            return negative
        return mix(negative, positive, self.y, self.raw)

    @lazy
    def hard(self) -> bool:
        """Whether all targets are 0 or 1, as far as it is known without waiting for a device."""
        if self.y is None or not self.y.is_floating_point():
            return True
        if not in_blocks(self.y):
            return False
        rest = self.y.round().sub_(self.y)
        return not bool(rest.mul_(rest).sum())  # which takes half the time of torch.equal

    @lazy
    def entries(self) -> tuple[Tensor, ...] | None:
        """Where the targets of a part of a tensor are not 0, if they are few enough to look up."""
        if not self.cut:
            return None
        if self.y is None:
            images, _, places = (self.labels >= 0).nonzero(as_tuple=True)
            return images, self.labels[images, 0, places], places
        # As integers of the same bits, and in the order of memory, they are found much faster.
        bits = self.y.view(torch.int64 if self.y.dtype == torch.float64 else torch.int32)
        # The sum is cheaper than the count, so it rules out dense targets first.
        if any(count() * FEW >= bits.numel() for count in (self.y.sum, bits.count_nonzero)):
            return None
        order = (0, 2, 1) if bits.stride(1) < bits.stride(2) else (0, 1, 2)
        found = bits.permute(order).nonzero(as_tuple=True)
        return tuple(found[index] for index in order)

    def evaluation(self, formula: Formula) -> _Evaluation:
        """The leanest way to evaluate a formula."""
        if isinstance(formula, Symmetric):
            if self.y is None:
                return _OfIndices(self, formula)
            if self.hard:
                return _OfDense(self, formula)
        return _Evaluation(self, formula)

    @lazy
    def wrong(self) -> Tensor:
        """The logits of wrong answers of hard dense targets, minus infinity where ignored."""
        assert self.y is not None
        u = wrong(self.raw, self.y)
        return u if self.ignored is None else u.masked_fill_(self.ignored, -math.inf)

    def by_wrong(self, wants: SigmoidWants) -> bool:
        """Whether counts are taken of the probabilities of wrong answers, as formulas are."""
        formulas = any(isinstance(formula, Symmetric) for formula in wants.sums)
        return formulas and not wants.squares and self.hard

    def count(self, p: Tensor, counts: Tensor, wants: SigmoidWants) -> None:
        """Write the counts ``(4 or 5, b, C)``, and probabilities, of the positive or, where
        :meth:`by_wrong` says so, of the wrong answers, 0 where they are ignored.
        """
        y = self.y
        assert y is not None

        def add_up(values: Tensor, out: Tensor) -> None:
            if self.w is not None:
                values = values * self.w
            torch.sum(values, -1, dtype=p.dtype, out=out)

        by_wrong = self.by_wrong(wants)
        x = self.wrong if by_wrong else self.raw
        torch.sigmoid(x, out=p)
        q = x.neg().sigmoid_()  # for 1 - p would cancel
        if self.ignored is not None:
            p.masked_fill_(self.ignored, 0)
            q.masked_fill_(self.ignored, 0)
        if wants.squares:
            add_up(p * p, counts[4])
        of_positives = p * y
        add_up(of_positives, counts[2 if by_wrong else 1])
        add_up(torch.sub(p, of_positives, out=of_positives), counts[0])
        add_up(q.mul_(y), counts[1 if by_wrong else 2])
        add_up(y, counts[3])

    def gradient_of_counts(self, p: Tensor | None, counts: Tensor) -> Tensor:
        """The gradient of the logits, written over probabilities, of whichever answer."""
        if p is None:
            p = self.raw.sigmoid()
            if self.ignored is not None:
                p.masked_fill_(self.ignored, 0)
        assert self.y is not None
        fp, tp, fn, _, *squares = counts.unsqueeze(-1)
        # Not fp + y (tp - fn - fp), for one may be a million times the other.
        of_p = self.choose(fp, tp - fn)
        for each in squares:
            of_p.addcmul_(p, each, value=2)
        if self.w is not None:
            of_p *= self.w
        return torch.ops.aten.sigmoid_backward.grad_input(of_p, p, grad_input=p)


class _Evaluation:
    """A formula on a block: any formula, and any targets."""

    def __init__(self, block: _Block, formula: Any) -> None:
        self.block, self.formula = block, formula

    def forward(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Values, and what backward needs."""
        value, slope = self.results("both")
        return (value,), (slope,)

    def values(self) -> tuple[Tensor, ...]:
        """The first of these alone."""
        return self.results("quick")

    def kept(self) -> tuple[Tensor, ...]:
        """The second of these alone."""
        return self.results("slope")

    def results(self, method: Literal["quick", "slope", "both"]) -> tuple[Tensor, ...]:
        block = self.block
        x = block.guarded(0.0)

        def evaluated(formula: Formula, x: Tensor, y: Label) -> tuple[Tensor, ...]:
            found = getattr(formula, method)(x, y)
            return found if method == "both" else (found,)

        if block.entries is None:
            y = block.y
            if y is None:
                assert block.index is not None
                y = torch.zeros_like(x).scatter_(1, block.index, (block.labels >= 0).to(x.dtype))
            found = evaluated(self.formula, x, y.to(x.dtype))
        else:
            found = evaluated(self.formula, x, 0)
            images, classes, places = (index.unsqueeze(0) for index in block.entries)
            where = images, classes, places
            label = 1 if block.y is None else block.y[where]
            others = evaluated(self.formula.of_classes(classes), x[where], label)
            for values, of_entries in zip(found, others, strict=True):
                values[where] = of_entries
        if block.ignored is not None and block.w is None:
            found = tuple(each.masked_fill_(block.ignored, 0) for each in found)
        return found

    def add_up(self, values: tuple[Tensor, ...], out: Tensor) -> None:
        """Write the weighted sums of all, ``(b, 1)``, or of each class, ``(b, C)``."""
        torch.sum(self.map(values), -1 if out.shape[1] > 1 else (-2, -1), out=_reduced(out))

    def map(self, values: tuple[Tensor, ...]) -> Tensor:
        """All weighted values, ``(b, C, n)``."""
        return self.weighted(values[0])

    def gradient(self, kept: tuple[Tensor, ...], factor: Tensor) -> Tensor:
        """That of the values times a factor, which goes with ``(b, C, n)``."""
        return kept[0].mul_(self.weighted(factor))

    def weighted(self, values: Tensor) -> Tensor:
        return values if self.block.w is None else values * self.block.w


def _reduced(out: Tensor) -> Tensor:
    """Sums ``(b, C)``, or ``(b, 1)`` without the dimension that is summed over, too."""
    return out if out.shape[1] > 1 else out.squeeze(1)


class _OfWrong(_Evaluation):
    """A symmetric formula on hard targets, by the logits of wrong answers."""

    def wrong(self) -> tuple[Tensor, ...]:
        """These logits, minus infinity where they are ignored."""
        raise NotImplementedError

    def forward(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        values, kept = zip(*map(self.formula.forward, self.wrong()), strict=True)
        return values, kept

    def values(self) -> tuple[Tensor, ...]:
        return self.forward()[0]

    def kept(self) -> tuple[Tensor, ...]:
        return tuple(map(self.formula.kept, self.wrong()))

    def weights(self) -> tuple[Any, Any]:
        negative, positive = self.formula.weights()
        return column(negative), column(positive)


class _OfDense(_OfWrong):
    """The same on dense targets."""

    def wrong(self) -> tuple[Tensor, ...]:
        return (self.block.wrong,)

    def kept(self) -> tuple[Tensor, ...]:
        if self.formula.slope_is_p and self.block.known is not None:
            return ()
        return super().kept()

    def map(self, values: tuple[Tensor, ...]) -> Tensor:
        weight = self.block.choose(*self.weights())
        alike = not isinstance(weight, Tensor) and weight == 1
        return self.weighted(values[0] if alike else values[0] * weight)

    def gradient(self, kept: tuple[Tensor, ...], factor: Tensor) -> Tensor:
        factor = self.weighted(factor)
        negative, positive = self.weights()
        factor = self.block.choose(factor * negative, factor * -positive)
        if not kept:
            assert self.block.known is not None
            return factor.mul_(self.block.known)
        return self.formula.backward(kept[0], factor)


class _OfIndices(_OfWrong):
    """The same on class indices: of all entries as negatives, and of the positives."""

    def wrong(self) -> tuple[Tensor, ...]:
        """The logits u of all, ``(b, C, n)``, and of the positives, ``(b, 1, n)``."""
        block = self.block
        assert block.index is not None
        impossible = block.raw.new_full((), -math.inf)
        x = block.guarded(impossible)
        positive = block.labels >= 0
        if block.ignored is not None and block.ignored.shape[1] > 1:
            positive &= ~block.at_index(block.ignored)
        at_index = block.at_index(x)
        of_positives = torch.where(positive, -at_index, impossible)
        others = block.index, torch.where(positive, impossible, at_index)
        of_all = x.scatter(1, *others) if x is block.raw else x.scatter_(1, *others)
        return of_all, of_positives

    def add_up(self, values: tuple[Tensor, ...], out: Tensor) -> None:
        block = self.block
        negative, _ = self.weights()
        of_all, of_positives = self.weighted(values[0]), self.of_positives(values[1])
        if isinstance(negative, Tensor):
            of_all, negative = of_all * negative, 1
        if out.shape[1] == 1:
            total, more = of_all.sum((1, 2)).unsqueeze(1), of_positives.sum(-1)
        else:
            assert block.index is not None
            total, more = of_all.sum(-1), torch.empty_like(out)
            sums_by_label(of_positives.squeeze(1)[None], block.index.squeeze(1), more[None])
        torch.add(more, total, alpha=negative, out=out)

    def map(self, values: tuple[Tensor, ...]) -> Tensor:
        of_all = self.weighted(values[0] * self.weights()[0])
        assert self.block.index is not None
        return of_all.scatter_add_(1, self.block.index, self.of_positives(values[1]))

    def of_positives(self, values: Tensor) -> Tensor:
        """Those of positives with their weights."""
        _, positive = self.weights()
        if isinstance(positive, Tensor) or positive != 1:
            values = values * self.block.at_index(positive)
        return values if self.block.w is None else values * self.block.at_index(self.block.w)

    def gradient(self, kept: tuple[Tensor, ...], factor: Tensor) -> Tensor:
        block = self.block
        negative, positive = self.weights()
        factor = self.weighted(factor)
        assert block.index is not None
        of_positives = self.formula.backward(kept[1], block.at_index(factor * -positive))
        if isinstance(negative, Tensor) or negative != 1:
            factor = factor * negative
        of_all = self.formula.backward(kept[0], factor)
        return of_all.scatter_add_(1, block.index, of_positives)
