"""The module form of a loss function, and the registry of all."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, ClassVar, Concatenate, Literal, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from .checks import OF_A_CALL, check_known, check_options
from .options import Ramp, documentation, parameters, show, with_defaults

Kind = Literal["classification", "boxes", "deltas", "distribution", "segmentation"]


class Loss(nn.Module):
    """A loss function together with its options, as a module.

    The options are those of the function, with the same defaults except ``reduction``, which is
    ``"mean"``; ``options_of`` makes a constructor that says so. ``repr(loss)`` is a loss string
    that :func:`detseg_losses.build_loss` reads back.

    A number among the options may be a :class:`Ramp`; ``step`` then says how far training is. A
    compiled loss is compiled anew for each value of such an option.

    Raises:
        TypeError: on an option that the function does not have, a value that is not True or False
            where one is wanted, or a ramp for what is not a number.
        ValueError: on a value that the option cannot have, see ``RULES`` in ``_core/checks.py``.

    Examples:
        >>> criterion = DiceLoss(smooth=1.0, ignore_index=255)
        >>> criterion
        dice(smooth=1.0, ignore_index=255)
        >>> logits, target = torch.zeros(2, 3, 8, 8), torch.zeros(2, 8, 8, dtype=torch.long)
        >>> criterion(logits, target)
        tensor(0.4971)
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
