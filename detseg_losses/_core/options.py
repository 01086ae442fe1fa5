"""The options of losses: numbers on a ramp, and constructors that take what functions do."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from typing_extensions import Self

from detseg_losses._core.checks import check_choice

Curve = Literal["linear", "cosine"]

if TYPE_CHECKING:

    class _Number(float):
        """To a type checker a ramp is a number, so that it fits where an option is one."""

        def __new__(cls, *args: Any, **options: Any) -> Self: ...
else:
    _Number = object


@dataclass(frozen=True)
class Ramp(_Number):
    r"""A number that changes in training: the weight of a term, or an option of a loss.

    .. math:: a + (b - a) f\left(\frac{t - t_0}{T}\right), \quad
        f(x) = x \ \text{or}\ \tfrac{1}{2} (1 - \cos \pi x)

    with x kept between 0 and 1. In a loss string it is written ``ramp(1, 0.01, steps=1000)``. As a
    weight it lets one loss take over from another, as the boundary loss does from Dice (Kervadec
    et al., arXiv:1812.07032); as an option it makes a curriculum: with
    ``focal(gamma=ramp(0, 2, steps=1000))`` every example counts at first, and the hard ones later.

    Args:
        start: the number a at the beginning.
        end: the number b at the end, and from then on.
        steps: how many steps T lie between; :meth:`LossSum.advance` counts them.
        after: how many steps t0 come before.
        curve: ``"linear"``, or ``"cosine"``, which sets out and arrives gently.

    Raises:
        ValueError: on numbers that are not finite, or steps that are not whole numbers.

    Examples:
        >>> weight = Ramp(1.0, 0.0, steps=4)
        >>> [weight.at(step) for step in range(6)]
        [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
        >>> build_loss("dice + ramp(0, 0.1, steps=1000)*boundary")
        dice + ramp(0, 0.1, steps=1000)*boundary
    """

    start: float
    end: float
    steps: int
    after: int = 0
    curve: Curve = "linear"

    def __post_init__(self) -> None:
        for name in ("start", "end"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not math.isfinite(value):
                raise ValueError(f"{name} must be a finite number, not {value!r}")
        for name, least in (("steps", 1), ("after", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ValueError(f"{name} must be a whole number from {least}, not {value!r}")
        check_choice("curve", self.curve, Curve)

    def at(self, step: int) -> float:
        """The number in a step, the first of which is 0."""
        x = min(max(step - self.after, 0) / self.steps, 1.0)
        if self.curve == "cosine":
            x = (1 - math.cos(math.pi * x)) / 2
        return self.start * (1 - x) + self.end * x  # exact at both ends

    def __repr__(self) -> str:
        after = f", after={self.after}" if self.after else ""
        curve = f", curve={self.curve!r}" if self.curve != "linear" else ""
        return f"ramp({self.start!r}, {self.end!r}, steps={self.steps}{after}{curve})"


_ARGUMENTS = re.compile(r"^(?:Args|Attributes):\n((?: {4}.*\n)+)", re.MULTILINE)


def parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    return [*inspect.signature(function, eval_str=True).parameters.values()]


def unpacked(found: Iterable[inspect.Parameter]) -> Any:
    """The TypedDict that ``**options`` are of; None where there are none."""
    types = [get_args(each.annotation) for each in found if each.kind is each.VAR_KEYWORD]
    return types[0][0] if types else None


def with_defaults(found: Iterable[inspect.Parameter]) -> dict[str, inspect.Parameter]:
    """The parameters that are options, each as it is found first."""
    options: dict[str, inspect.Parameter] = {}
    for each in found:
        if each.default is not each.empty:
            options.setdefault(each.name, each)
    return options


def show(constructor: Any, options: Iterable[inspect.Parameter]) -> None:
    """Let ``inspect.signature`` and ``help`` know what a constructor takes."""
    instance = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    constructor.__signature__ = inspect.Signature([instance, *options])


def documentation(function: Callable[..., Any], options: Iterable[str]) -> str:
    """What a function says of itself, with these options for arguments; what it does not say of
    one the TypedDict of its ``**options`` does.
    """
    own = _text(function)
    said = _arguments(_text(unpacked(parameters(function)))) | _arguments(own)
    lines = "".join(said.get(name, "") for name in options)
    return _ARGUMENTS.sub(lambda _: f"Args:\n{lines}", own)


def _text(documented: Any) -> str:
    return f"{inspect.getdoc(documented) or ''}\n"


def _arguments(text: str) -> dict[str, str]:
    """What a documentation says of each argument, with its name before it."""
    found = _ARGUMENTS.search(text)
    entries = re.split(r"^(?= {4}\S)", found[1] if found else "", flags=re.MULTILINE)
    return {entry.partition(":")[0].strip(): entry for entry in entries}
