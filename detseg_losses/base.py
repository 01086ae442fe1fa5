"""What every loss shares: the module form of a function, the registry, the last reduction."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Concatenate, Literal, NamedTuple, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .checks import OF_A_CALL, check_known, check_options
from .checks import Reduction as Reduction
from .checks import check_choice as check_choice
from .checks import in_blocks as in_blocks
from .memory import empty_like
from .options import Ramp, documentation, parameters, show, with_defaults

Kind = Literal["classification", "boxes", "deltas", "distribution", "segmentation"]

# Elements of one block on the CPU. A block and the handful of temporaries made from it stay in
# the caches, so that a long chain of operations reads the logits from memory once.
BLOCK = 1 << 19

Function = TypeVar("Function", bound=Callable[..., Any])

FEW = 16
"""Of so many entries one is looked up faster than all are computed."""


class Loss(nn.Module):
    """A loss function together with its options, as a module.

    The options are those of the function, with the same defaults except ``reduction``, which is
    ``"mean"``; :func:`options_of` makes a constructor that says so. ``repr(loss)`` is a loss string
    that :func:`detseg_losses.build_loss` reads back.

    A number among the options may be a :class:`Ramp`; ``step`` then says how far training is. A
    compiled loss is compiled anew for each value of such an option.

    Raises:
        TypeError: on an option that the function does not have, a value that is not True or False
            where one is wanted, or a ramp for what is not a number.
        ValueError: on a value that the option cannot have, see :data:`detseg_losses.checks.RULES`.
    """

    name: ClassVar[str]
    kinds: ClassVar[tuple[Kind, ...]]
    function: ClassVar[Callable[..., Tensor]]
    common: ClassVar[Callable[..., Any] | None] = None
    """What the function passes its ``**options`` to."""
    shared: ClassVar[tuple[str, ...]] = ()
    """Options that the losses of one pass over the logits must agree on."""
    of_batch: ClassVar[bool] = False
    """Whether an entry is weighed by what the others are, so that only the mean has a scale."""
    extra: ClassVar[tuple[str, ...]] = ()
    """What a call may hold for this loss alone, beside the weights that are for all of a sum."""
    signature: ClassVar[inspect.Signature]
    """The options, without the weights of a batch, which come with the call."""
    defaults: ClassVar[dict[str, Any]]
    """Every option and its default."""
    own: ClassVar[list[str]]
    """The options that are of the function alone; but not ``reduction``."""

    def __init_subclass__(cls) -> None:
        function = getattr(vars(cls).get("__init__"), "function", None)  # of options_of
        if function:
            cls.function = staticmethod(function)
        if not hasattr(cls, "function"):
            return
        own = parameters(cls.function)[2:]
        options = with_defaults(own + (parameters(cls.common) if cls.common else []))
        for name in (*OF_A_CALL, *cls.extra):
            options.pop(name, None)
        options["reduction"] = options["reduction"].replace(default="mean")
        cls.signature = inspect.Signature([*options.values()])
        cls.defaults = {name: each.default for name, each in options.items()}
        cls.own = [each.name for each in own if each.name in options.keys() - {"reduction"}]
        if function:
            show(cls.__init__, options.values())
            cls.__doc__ = documentation(function, options)

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__()
        check_known(type(self).__name__, options, self.defaults, *self.extra)
        options = self.signature.bind(*args, **options).arguments
        for option, value in options.items():
            if isinstance(value, Ramp) and type(self.defaults[option]) is not float:
                raise TypeError(f"{option!r} of {self.name} cannot be on a ramp, only a number can")
            for each in (value.start, value.end) if isinstance(value, Ramp) else (value,):
                check_options({option: each}, getattr(type(self).function, "rules", {}))
            if isinstance(value, (list, tuple, Tensor)) or len(getattr(value, "shape", ())) > 0:
                # A buffer follows the module to its device; not persistent, so that an adapted
                # model keeps the keys of its state_dict.
                value = torch.as_tensor(value, dtype=torch.float32)
                self.register_buffer(option, value, persistent=False)
        self.given = {k: v for k, v in options.items() if k not in self._buffers}
        self.ramps = {k: v for k, v in options.items() if isinstance(v, Ramp)}
        self.step = 0
        # To put them together takes longer than a kernel on a small input.
        self.settled = None if self.ramps or self._buffers else self._options()

    @property
    def options(self) -> dict[str, Any]:
        """Every option with its value in this module, and in this step."""
        return self._options() if self.settled is None else self.settled

    def _options(self) -> dict[str, Any]:
        now = {option: ramp.at(self.step) for option, ramp in self.ramps.items()}
        return self.defaults | self.given | now | dict(self.named_buffers(recurse=False))

    def forward(self, prediction: Any, target: Tensor | None = None, **call: Any) -> Tensor:
        """The loss; ``call`` holds weights of this batch and may override the options."""
        return type(self).function(prediction, target, **(self.options | call))

    def __repr__(self) -> str:
        arguments = []
        for option, value in (self.options | self.ramps).items():
            if isinstance(value, Tensor):
                arguments.append(f"{option}={value.tolist()}")
            elif value != self.defaults[option]:
                arguments.append(f"{option}={value!r}")
        return f"{self.name}({', '.join(arguments)})" if arguments else self.name


class FormulaLoss(Loss):
    """A loss that is a formula on statistics, which the losses of a sum share."""

    formula: ClassVar[Callable[..., Any]]
    """Makes the formula from the options that are of the function alone."""

    def made(self) -> Any:
        """The formula with the options of this module, and in this step."""
        options = self.options
        return type(self).formula(**{name: options[name] for name in self.own})

    def needs(self) -> list[Any]:
        """What the statistics have to hold."""
        return self.made().needs()

    def evaluate(self, statistics: Any) -> Tensor:
        """The loss of the batch that the statistics are of."""
        raise NotImplementedError


Options = ParamSpec("Options")


def options_of(
    function: Callable[Concatenate[Tensor, Tensor, Options], Tensor],
) -> Callable[[Callable[[Any], None]], Callable[Concatenate[Any, Options], None]]:
    """Make a class the module form of a function: its constructor takes the function's options,
    for a type checker, for ``help`` and when it is called.
    """

    def make(stub: Any) -> Any:
        @functools.wraps(stub)
        def __init__(self: Any, *args: Any, **options: Any) -> None:
            Loss.__init__(self, *args, **options)

        __init__.function = function  # type: ignore[attr-defined]
        return __init__

    return make


LOSSES: dict[str, type[Loss]] = {}
"""Every loss by the name that it has in a loss string."""

LossType = TypeVar("LossType", bound=type[Loss])


def register(name: str, *kinds: Kind) -> Callable[[LossType], LossType]:
    """Enter a loss under the name that loss strings use, with the kinds of input it can eat."""

    def enter(cls: LossType) -> LossType:
        cls.name, cls.kinds = name, kinds
        LOSSES[name] = cls
        return cls

    return enter


def reduce(values: Tensor, reduction: str) -> Tensor:
    """``values`` as they are, their sum, or their mean; the mean of nothing is 0."""
    check_choice("reduction", reduction, Reduction)
    if reduction == "none":
        return values
    total = values.sum()
    return total if reduction == "sum" else total / max(values.numel(), 1)


def as_weights(value: Any) -> Any:
    """Numbers of classes as a tensor; a tensor, a number or None as it is."""
    many = isinstance(value, Sequence) or len(getattr(value, "shape", ())) > 0
    return torch.as_tensor(value, dtype=torch.float32) if many else value


def class_balanced_weights(counts: Tensor | Sequence[float], beta: float = 0.999) -> Tensor:
    r"""Weights of classes by the effective number of their samples (Cui et al., arXiv:1901.05555).

    For ``class_weights`` where some classes are rare. The more samples a class has, the less a
    further one adds; weights by plain inverse frequency would let the rarest classes rule.

    .. math:: w_c \propto \frac{1 - \beta}{1 - \beta^{n_c}}, \quad \sum_c w_c = C

    Args:
        counts: how many samples (boxes, pixels, images) each class has, ``(C,)``.
        beta: 0 weighs all classes alike, towards 1 it becomes the inverse frequency. Samples
            beyond some ``1 / (1 - beta)`` hardly count: take that near the counts themselves.

    Returns:
        ``(C,)``, float32; 0 for a class without samples.

    Raises:
        ValueError: on a beta outside of [0, 1), or counts that are negative or not ``(C,)``.
    """
    if not 0 <= beta < 1:
        raise ValueError(f"beta must be in [0, 1): {beta}")
    counts = torch.as_tensor(counts, dtype=torch.float64)
    if counts.dim() != 1 or not bool((counts >= 0).all()):
        raise ValueError(f"counts must be (C,) and not negative: {counts.tolist()}")
    log_beta = math.log(beta) if beta else -math.inf
    weights = torch.where(counts > 0, -1 / torch.expm1(counts * log_beta), 0)
    return divide(weights * len(weights), weights.sum()).float()


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Losses are computed in float32, or in float64 where the logits are float64."""
    return torch.promote_types(dtype, torch.float32)


class lazy:
    """An attribute that is computed when it is first asked for."""

    def __init__(self, compute: Callable[[Any], Any]) -> None:
        self.compute = compute
        self.name = compute.__name__

    def __get__(self, instance: Any, owner: type) -> Any:
        value = self.compute(instance)
        setattr(instance, self.name, value)
        return value


def with_signature(forward: Function) -> Function:
    """State the signature of an ``autograd.Function``'s forward, which torch asks for in each call:
    to find it out takes as long as ten kernels on a small input.
    """
    forward.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    return forward


def has_graph(tensor: Tensor) -> bool:
    """Whether autograd records what is done with a tensor."""
    return tensor.requires_grad and torch.is_grad_enabled()


class Block(NamedTuple):
    """Some images and places of logits ``(B, C, P)``; ``part`` numbers the ranges of places."""

    part: int
    rows: slice
    places: slice

    def of(self, tensor: Tensor) -> Tensor:
        """This block of a tensor ``(B, ..., P)``; a last dimension of 1 stands for all places."""
        if self is WHOLE:
            return tensor
        return tensor[self.rows, ..., self.places if tensor.shape[-1] > 1 else slice(None)]

    def store(
        self, values: Tensor, result: Tensor | None, like: Tensor, dtype: torch.dtype
    ) -> Tensor:
        """The result so far, made like ``like`` by the first block, with the values of this one;
        of a whole the values themselves.
        """
        if self is WHOLE:
            return values.to(dtype)
        if result is None:
            result = empty_like(like, dtype)
        self.of(result).copy_(values)
        return result


WHOLE = Block(0, slice(None), slice(None))


def blocks(logits: Tensor, times: float = 1, uncut: int = 1) -> list[Block]:
    """Cut logits ``(B, C, P)`` into blocks of some ``times * BLOCK`` elements: several whole
    images, or a part of one that is more than ``uncut`` times as large. One block holds everything
    that is no larger, and wherever :func:`in_blocks` says so.
    """
    batch, classes, length = logits.shape
    size = max(1, int(times * BLOCK))
    if not in_blocks(logits) or logits.numel() <= size:
        return [WHOLE]
    places = length if classes * length <= uncut * size else max(1, min(length, size // classes))
    rows = max(1, size // (classes * length))
    return [
        Block(part, slice(row, row + rows), slice(part * places, (part + 1) * places))
        for row in range(0, batch, rows)
        for part in range(-(-length // places))
    ]


def rows_where(mask: Tensor) -> Tensor | slice:
    """Indices of the rows ``(N,)`` that a mask holds, or all rows.

    On the CPU it pays to work on the few rows alone; elsewhere the device would have to wait to
    learn how many there are. So give the other rows a weight of 0.
    """
    return mask.nonzero().squeeze(1) if in_blocks(mask) else slice(None)


def divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    """The ratio, with 0 / 0 = 0 and finite gradients there."""
    return numerator / (denominator + (denominator == 0))


def processes(sync: bool) -> int:
    """How many processes share the batch where ``sync`` asks for it."""
    return dist.get_world_size() if sync and dist.is_available() and dist.is_initialized() else 1


def world_sum(values: Tensor, sync: bool) -> Tensor:
    """The sum over all processes where ``sync`` asks for it; autograd flows through it."""
    return values if processes(sync) == 1 else _AllReduce.apply(values)


def gather(values: Tensor, sync: bool) -> tuple[list[Tensor], int]:
    """Values ``(*, N)`` of all processes where ``sync`` asks for it, and which are those of this
    one. N may differ; nothing else may. They are constants, for no gradient flows through them.
    """
    count = processes(sync)
    if count == 1:
        return [values], 0
    lengths = [torch.tensor(0, device=values.device) for _ in range(count)]
    dist.all_gather(lengths, torch.tensor(values.shape[-1], device=values.device))
    ends = [int(length) for length in lengths]
    padded = values.new_zeros(*values.shape[:-1], max(ends))  # which is what backends can gather
    padded[..., : values.shape[-1]] = values
    found = [torch.empty_like(padded) for _ in range(count)]
    dist.all_gather(found, padded)
    return [each[..., :end] for each, end in zip(found, ends, strict=True)], dist.get_rank()


class _AllReduce(torch.autograd.Function):
    """A sum over the processes, of which each one's result depends on every one's input."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total = grad.clone()
        dist.all_reduce(total)
        return total


def mean_of_sums(sums: Tensor, counts: Tensor | int, *, per_image: bool, sync: bool) -> Tensor:
    """Sums ``(B,)`` over counts ``(B,)``: of the batch as one, or the mean of each image's.

    A number stands for the count of every image. With ``sync`` the batch is that of all processes,
    and the result of each process is scaled so that the average which DistributedDataParallel
    takes of the gradients is that of one process.
    """
    world = processes(sync)
    if isinstance(counts, int):
        if world == 1:
            return _total(sums) / max(counts * len(sums), 1)
        counts = sums.new_full((len(sums),), counts)
    if per_image:
        sums, counts = divide(sums, counts), torch.ones_like(counts)
    total, count = _total(sums), world_sum(_total(counts), sync)
    total = total if world == 1 else total * world
    return divide(total, count) if count.is_floating_point() else total / count.clamp(min=1)


def _total(values: Tensor) -> Tensor:
    return values.squeeze(0) if len(values) == 1 else values.sum()
