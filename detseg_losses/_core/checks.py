"""Checks of what losses are given, in one place: their options by name, and tensors by content.

A check of a tensor's values makes a GPU wait, so that these run only where :func:`in_blocks` says
so, or where the caller asks with ``validate``. None of them is a pass over the logits.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor

Reduction = Literal["none", "mean", "sum"]
Mode = Literal["multiclass", "binary", "multilabel"]
Absent = Literal["skip", "penalise"]

ROUNDING = 1e-4
"""By how much a target in [0, 1] may miss it: resizing in float32 gives 1.0000001."""


def in_blocks(tensor: Tensor) -> bool:
    """Whether to compute block by block and to look at values: the one place where the library
    asks for the device. Anywhere but on the CPU kernels should be few and large, and a look at a
    value would make the device wait.
    """
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def shown(value: Any) -> str:
    """A value for a message: its ``repr``, of which 60 characters are enough."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


# Options


Rule = Callable[[str, Any], None]
"""Raises a ValueError that names the option unless its value is right."""


@dataclass(frozen=True)
class Number:
    """A finite number of at least ``low``, or above it, and at most ``high``.

    Attributes:
        words: what the message says of the number.
        other: values that are right as well.
    """

    words: str
    low: float
    high: float = math.inf
    above: bool = False
    whole: bool = False
    other: tuple[Any, ...] = ()

    def holds(self, value: Any) -> bool:
        kind = Integral if self.whole else Real
        if isinstance(value, bool) or not isinstance(value, kind):
            return False
        if isinstance(value, int) and abs(value) >= 1 << 1023:  # more than any float
            return False
        number: Any = value
        return (self.low < number if self.above else self.low <= number) and (
            number <= self.high and number < math.inf
        )

    def __call__(self, option: str, value: Any) -> None:
        if not self.holds(value) and not any(value is each for each in self.other):
            raise ValueError(f"{option} must {self.words}: {shown(value)}")


@dataclass(frozen=True)
class PerClass:
    """Numbers of the classes, ``(C,)``, each as ``each`` says; or what ``single`` lets pass.

    Attributes:
        hint: what to do where one of them is not.
    """

    each: Number
    single: Rule | None = None
    hint: str = ""

    def __call__(self, option: str, value: Any) -> None:
        scalar = isinstance(value, Tensor) and not value.dim()
        if self.single is not None and not _is_many(value) and not scalar:
            self.single(option, value)
            return
        if not _is_many(value) and self.single is None:
            raise ValueError(
                f"{option} must be finite numbers from 0 up, one for each class, (C,): "
                f"{shown(value)}"
            )
        numbers = _numbers(value)
        for index, number in enumerate(numbers):
            if not self.each.holds(number):
                which = f" for class {index}{self.hint}" if len(numbers) > 1 else ""
                raise ValueError(f"{option} must {self.each.words}: {shown(number)}{which}")


def _is_many(value: Any) -> bool:
    """Whether it is some numbers in one dimension: a list, a tuple, a tensor, an array."""
    if isinstance(value, (list, tuple)):
        return len(value) > 0
    shape: tuple[int, ...] = getattr(value, "shape", ())
    return len(shape) == 1


def _numbers(values: Any) -> list[Any]:
    """Some numbers, or one in a tensor, as far as they may be looked at."""
    if isinstance(values, Tensor):
        return values.reshape(-1).tolist() if in_blocks(values) else []
    return values.tolist() if hasattr(values, "tolist") else list(values)


@dataclass(frozen=True)
class Choice:
    """One of a Literal's choices, or None if that is ``optional``."""

    choices: Any
    optional: bool = False

    def __call__(self, option: str, value: Any) -> None:
        if value is not None or not self.optional:
            check_choice(option, value, self.choices)


def check_choice(option: str, value: object, choices: Any) -> None:
    """Raise a ValueError that names ``option`` unless ``value`` is one of a Literal's choices."""
    if value not in get_args(choices):
        raise ValueError(f"{option} must be one of {get_args(choices)}, not {shown(value)}")


def flag(option: str, value: Any) -> None:
    if type(value) is not bool:
        raise TypeError(f"{option!r} is True or False, not {shown(value)}")


NOT_NEGATIVE = Number("be a finite number from 0 up", 0)
POSITIVE = Number("be positive and finite", 0, above=True)
SHARE = Number("be in [0, 1]", 0, 1)
ABOVE_0_TO_1 = Number("be in (0, 1]", 0, 1, above=True)
EPSILON = Number("not be below -1 or infinite", -1)
WEIGHTS = PerClass(
    NOT_NEGATIVE, hint="; class_balanced_weights gives 0 to a class that has no samples"
)
FACTORS = PerClass(NOT_NEGATIVE, NOT_NEGATIVE)
BALANCE = PerClass(SHARE, Number("be in [0, 1], or -1 or None for no weight", 0, 1, other=(None,)))


def optional(rule: Number) -> Number:
    """A number as the rule says, or None."""
    return Number(rule.words, rule.low, rule.high, rule.above, rule.whole, (None,))


def balance(option: str, value: Any) -> None:
    """The alpha of a focal loss."""
    if not (isinstance(value, Real) and value == -1):
        BALANCE(option, value)


def spacing(option: str, value: Any) -> None:
    """Lengths: one for each dimension, or one for all."""
    if not (_is_many(value) or isinstance(value, Tensor)):
        value = [value]
    for length in _numbers(value):
        POSITIVE(option, length)


def running_mean(option: str, value: Any) -> None:
    """A number, None, or a tensor that is updated where it is."""
    if not isinstance(value, Tensor):
        optional(POSITIVE)(option, value)


RULES: dict[str, Rule] = {
    "absent": Choice(Absent),
    "alpha": NOT_NEGATIVE,
    "beta": NOT_NEGATIVE,
    "bins": Number("be 1 or more, and no more than 65536", 1, 1 << 16, whole=True),
    "class_weights": lambda option, value: None if value is None else WEIGHTS(option, value),
    "constant": POSITIVE,
    "delta": POSITIVE,
    "diagonal": optional(POSITIVE),
    "eps": NOT_NEGATIVE,
    "epsilon": EPSILON,
    "fraction": ABOVE_0_TO_1,
    "gamma": NOT_NEGATIVE,
    "gamma_neg": NOT_NEGATIVE,
    "gamma_pos": NOT_NEGATIVE,
    "ignore_index": optional(Number("be a whole number or None", -(2**63), 2**63 - 1, whole=True)),
    "iterations": Number("not be negative, and be a whole number", 0, whole=True),
    "label_smoothing": SHARE,
    "margin": SHARE,
    "mean": running_mean,
    "mode": Choice(Mode, optional=True),
    "per_image": flag,
    "pos_weight": FACTORS,
    "reduction": Choice(Reduction),
    "smooth": NOT_NEGATIVE,
    "spacing": spacing,
    "sync": flag,
    "theta": POSITIVE,
    "thresh": optional(ABOVE_0_TO_1),
    "validate": flag,
}
"""What the options of losses may be. A loss states only where its own differ."""

Function = TypeVar("Function", bound=Callable[..., Any])


def checked(**own: Rule) -> Callable[[Function], Function]:
    """Let a loss check its options by :data:`RULES`, and by the rules of its own, when it is
    called; :class:`~detseg_losses.Loss` does the same when it is made.
    """
    rules = RULES | own

    def decorate(function: Function) -> Function:
        names = list(inspect.signature(function).parameters)[2:]

        @functools.wraps(function)
        def loss(*inputs: Any, **options: Any) -> Any:
            check_options(dict(zip(names, inputs[2:], strict=False)) | options, rules)
            return function(*inputs, **options)

        loss.rules = rules  # type: ignore[attr-defined]
        return loss  # type: ignore[return-value]

    return decorate


def check_options(options: Mapping[str, Any], rules: Mapping[str, Rule]) -> None:
    """Raise on the first option that breaks its rule."""
    for option, value in options.items():
        if option in rules:
            rules[option](option, value)


OF_A_CALL = ("weight", "pixel_weight")
"""What comes with a batch, and so is no option of a module."""


def check_known(owner: str, options: Iterable[str], known: Iterable[str], *extra: str) -> None:
    """Raise a TypeError on the first option that a constructor does not have."""
    for option in options:
        if option not in known:
            hint = nearest(option, known)
            if option in (*OF_A_CALL, *extra):
                hint = f"; it belongs to a batch: loss(..., {option}=...)"
            raise TypeError(f"{owner}() has no option {option!r}{hint}")


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the nearest one, or all that there are."""
    import difflib  # takes longer than the rest of this file, and is for mistakes only

    by_lower = {choice.lower(): choice for choice in known}
    close = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {by_lower[close[0]]!r}?"
    return f"; there are {', '.join(sorted(by_lower.values()))}"


# Tensors


NUMBERS = (
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.bool),
    *(torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
)
"""The dtypes that losses can be computed from."""


def check_tensors(**tensors: Any) -> None:
    """Raise a TypeError that says what to do with what is not a tensor, or not of real numbers."""
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise TypeError(_not_a_tensor(name, value))
        if value.dtype not in NUMBERS:
            real = f"{name}.real or {name}.abs()" if value.is_complex() else None
            real = real or f"{name}.{'dequantize' if value.is_quantized else 'float'}()"
            kind = str(value.dtype).removeprefix("torch.")
            raise TypeError(f"{name} must hold real numbers, and its dtype is {kind}; pass {real}")


def _not_a_tensor(name: str, value: Any) -> str:
    if value is None:
        return f"the {name} {'are' if name.endswith('s') else 'is'} missing"
    start = f"{name} must be a tensor, not a {type(value).__name__}"
    if isinstance(value, Mapping):
        keys = [key for key in ("logits", "out") if key in value] or list(value)
        example = f", such as output[{keys[0]!r}]" if keys else ""
        return f"{start} with the keys {list(value)}; pass one of its values{example}"
    if isinstance(value, (list, tuple)):
        if any(isinstance(each, Tensor) for each in value):
            return f"{start} of {len(value)}; pass one of them, such as output[0], or stack them"
        return f"{start}; convert it with torch.tensor({name})"
    if hasattr(value, "__array__"):
        return f"{start}; convert it with torch.from_numpy({name})"
    return start


def check_constant(name: str, tensor: Tensor) -> None:
    """Raise on a tensor that would silently get no gradient."""
    if tensor.requires_grad:
        raise ValueError(f"{name} requires grad; detach it: losses differentiate the logits alone")


def check_weight(name: str, weight: Any, validate: bool = False) -> None:
    """Raise on weights of pixels or rows that are not tensors, finite and not negative."""
    check_tensors(**{name: weight})
    check_constant(name, weight)
    if weight.dtype == torch.bool or not _looked_at(weight, validate):
        return
    smallest, largest = _extremes(weight)
    if not (smallest >= 0 and largest < math.inf):
        place, value = _first(weight, ~((weight >= 0) & (weight < math.inf)))
        raise ValueError(f"{name}[{place}] is {value}; it must be finite and not negative")


def read_target(
    target: Tensor, classes: range | None, ignore_index: int | None, validate: bool = False
) -> tuple[Tensor, Tensor | None]:
    """A target that losses can compute with: class indices as integers, or values in [0, 1].

    Args:
        target: what the caller gave; of class indices also floating point numbers that are whole.
        classes: the indices that there are; None: the target holds values in [0, 1], and what
            misses that by rounding is clamped.
        ignore_index: the label that is ignored.
        validate: look also where that makes the device wait.

    Returns:
        The target, and where it is not ignored; None where nothing can be.

    Raises:
        ValueError: naming the first value that is neither, and what to do.
    """
    check_constant("the target", target)
    if target.dtype in (torch.uint16, torch.uint32, torch.uint64):  # torch knows little of these
        target = target.long()
    kept = _kept(target, ignore_index)
    if classes is not None and target.is_floating_point():
        target = _whole(target, kept, validate)
    if target.dtype == torch.bool or not _looked_at(target, validate):
        return target, kept
    # As numbers: torch would compare a uint8 label with -1 or 299 modulo 256.
    smallest, largest = _extremes(target)
    low, high = (0, 1) if classes is None else (classes[0], classes[-1])
    if low <= smallest and largest <= high:
        return target, kept
    slack = 0.0
    if target.is_floating_point():
        slack = max(ROUNDING, torch.finfo(target.dtype).eps)
    values = target.float()
    wrong = ~((values >= low - slack) & (values <= high + slack))
    if kept is not None:
        wrong &= kept
    if wrong.any():
        raise ValueError(_bad_target(target, wrong, kept, classes, ignore_index))
    return (target.clamp(0, 1) if classes is None else target), kept


def _kept(y: Tensor, ignore_index: int | None) -> Tensor | None:
    """Where ``y`` is not ``ignore_index``; None where nothing can be.

    Torch would compare a uint8 label with -100 modulo 256.
    """
    if ignore_index is None:
        return None
    if not (y.is_floating_point() or y.dtype == torch.bool):
        limits = torch.iinfo(y.dtype)
        if not limits.min <= ignore_index <= limits.max:
            return None
    return y != ignore_index


def _whole(target: Tensor, kept: Tensor | None, validate: bool) -> Tensor:
    """Floating point class indices as integers."""
    labels = target.long()
    if _looked_at(target, validate):
        fractions = labels != target if kept is None else (labels != target) & kept
        if fractions.any():
            place, value = _first(target, fractions)
            raise ValueError(
                f"target[{place}] is {value}: class indices are whole numbers; probabilities have "
                "the shape of the logits"
            )
    return labels


def _bad_target(
    target: Tensor,
    wrong: Tensor,
    kept: Tensor | None,
    classes: range | None,
    ignore_index: int | None,
) -> str:
    """What to say of a target with values that are wrong."""
    place, value = _first(target, wrong)
    found = target if kept is None else target[kept]
    if classes is None:
        text = f"is {value}, but without class indices a target holds values from 0 to 1"
        remedy = _remedy_of_value(value, found)
    else:
        count = classes[-1] + 1
        there = (
            "there is 1 class, 0" if count == 1 else f"there are {count} classes, 0 to {count - 1}"
        )
        text = f"is label {value}, but {there}" + (", or -1 for background" if classes[0] else "")
        remedy = _remedy_of_label(value, found, count)
    ignored = "" if ignore_index is None else f" (and {ignore_index}, which is ignored)"
    return f"target[{place}] {text}{ignored}; {remedy}"


DIVIDE = "a mask of 0 and 255 must be divided by 255"


def _remedy_of_label(value: Any, found: Tensor, count: int) -> str:
    void = _void(value)
    if value == 255 and bool(((found == 0) | (found == 255)).all()):
        # It may be the foreground, which an ignore_index would drop without a word.
        return DIVIDE if count <= 2 else f"{DIVIDE}; {void}"
    if value == 255 or value < 0:
        return void
    if value == count:
        return f"labels count from 0: relabel it, or make a model of {count + 1} classes"
    return "relabel it, or make a model of more classes"


def _void(value: float) -> str:
    return f"if {value:.0f} marks pixels that are to be ignored, pass ignore_index={value:.0f}"


def _remedy_of_value(value: Any, found: Tensor) -> str:
    if math.isnan(value):
        return "the target holds NaN: mend the data, or what computes it"
    if value < 0 and value % 1 == 0:
        return f"{_void(value)}; else relabel it"
    outside = found[~((found >= 0) & (found <= 1))]
    if value == 255 and bool((found == 1).any()) and bool((outside == 255).all()):
        return _void(value)
    if bool((outside > 2).any()) and found.max() <= 255:
        return DIVIDE
    if value > 1 and value % 1 == 0:
        return "if it is one of several classes, each needs a channel"
    return "clamp it to that, if resizing made it"


def _looked_at(tensor: Tensor, validate: bool) -> bool:
    if not tensor.numel() or torch.compiler.is_compiling():
        return False
    return validate or in_blocks(tensor)


def _extremes(tensor: Tensor) -> Sequence[float]:
    """The smallest and the largest value; NaN where there is one."""
    # In one pass where it can be: aminmax copies what is not contiguous.
    both = tensor.aminmax() if tensor.is_contiguous() else (tensor.amin(), tensor.amax())
    return [value.item() for value in both]


def _first(tensor: Tensor, wrong: Tensor) -> tuple[str, Any]:
    """The index of the first value that is wrong, and the value."""
    index = wrong.nonzero()[0].tolist()
    value = tensor[tuple(index)].item()
    value = float(f"{value:.6g}") if isinstance(value, float) else value
    return ", ".join(map(str, index)), value
