"""Loss strings: ``"giou + 0.5*l1 + focal(gamma=1.5)"`` makes a :class:`LossSum`."""

from __future__ import annotations

import functools
import inspect
import math
import operator
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from detseg_losses._core.checks import check_choice, check_known, nearest, shown
from detseg_losses._core.module import LOSSES, Kind, Loss
from detseg_losses._core.options import Ramp, parameters, show, unpacked, with_defaults
from detseg_losses.losses.regions import DiceLoss, FocalTverskyLoss, RegionOptions
from detseg_losses.losses.sigmoid import BCELoss, ClassificationOptions
from detseg_losses.losses.softmax import CrossEntropyLoss, PixelOptions, SoftmaxFocalLoss
from detseg_losses.losses.together import together

Weight = float | Ramp | Literal["learned"]

PATIENCE = 50
"""After so many training calls without a step a ramp is warned of."""

_LEARNED = "log_variance_"
"""What the parameter of a learned weight is called, before the name of its term."""


class SpecError(ValueError):
    """A loss string that cannot be read; the message points at the column.

    Examples:
        >>> build_loss("dise")
        Traceback (most recent call last):
        detseg_losses.spec.SpecError: loss 'dise', column 1: no loss 'dise'; did you mean 'dice'?
    """


def build_loss(spec: str, kind: Kind | None = None, **defaults: Any) -> LossSum:
    """Make the loss that a string describes.

    A string is ``term + term + ...``, a term ``[weight *] name [(option=value, ...)]``, the name
    one of :data:`LOSSES`. A weight is a number, ``ramp(...)`` or ``learned``, see
    :class:`LossSum`; an option that is a number may be a ``ramp(...)``, too. The string is parsed,
    never evaluated.

    Args:
        spec: the loss string.
        kind: what the losses will be given: ``"segmentation"``, ``"classification"``, ``"boxes"``,
            ``"deltas"`` or ``"distribution"``. None where the terms tell; ``bce`` and ``focal``
            alone are then losses of a detection head. Terms of several kinds, ``"giou+focal"``,
            are for an adapter.
        **defaults: options for every term that has them and does not set them itself.

    Raises:
        SpecError: naming the column, and the nearest name.
        TypeError: where ``spec`` is not a str.

    Examples:
        >>> criterion = build_loss("0.5*ce + dice(smooth=1)", ignore_index=255)
        >>> logits = torch.zeros(2, 3, 8, 8, requires_grad=True)
        >>> target = torch.zeros(2, 8, 8, dtype=torch.long)
        >>> criterion(logits, target).backward()
        >>> criterion.values
        {'ce': tensor(0.5493), 'dice': tensor(0.4971)}
    """
    check_text(spec)
    spec = spec.strip()
    terms = [made for term in _Parser(spec).terms() for made in _make(term, spec, kind, defaults)]
    unused = [key for key in defaults if not any(key in term.options for _, term in terms)]
    if unused:
        raise SpecError(f"no term of {_short(spec)} has the option {unused[0]!r}")
    return LossSum(terms, kind)


def read_stages(
    spec: str, stages: Sequence[str], owner: str, unnamed: Sequence[str]
) -> dict[str, str]:
    """The loss string of each stage that a string addresses: ``"rpn: giou+bce; roi: giou+ce"``.

    Args:
        spec: parts ``stage: losses``, with ``;`` between them. The first part may go without a
            name.
        stages: the names that there are.
        owner: what has these stages, for messages.
        unnamed: the stages that a first part without a name is for.

    Returns:
        By stage, in the order of the string.

    Raises:
        SpecError: naming the column, on a later part without a stage, a stage that does not exist,
            or one that is given twice.
        TypeError: where ``spec`` is not a str.
    """
    check_text(spec)
    found: dict[str, str] = {}
    column = 1
    for number, part in enumerate(spec.split(";")):
        stage, colon, losses = part.partition(":")
        start = column + len(part) - len(part.lstrip())
        column += len(part) + 1
        names: Sequence[str] = [stage.strip()]
        if not part.strip() and number:
            continue  # after the last ";"
        if not colon:
            if number:
                free = next((stage for stage in stages if stage not in found), stages[0])
                example = f"{free}: {part.strip()}"
                raise _error(spec, start, f"expected a stage, as in {_short(example)}")
            names, losses = unnamed, part
        for name in names:
            if name not in stages:
                hint = nearest(name, stages)
                raise _error(spec, start, f"{owner} has no stage {_short(name)}{hint}")
            if name in found:
                raise _error(spec, start, f"stage {name!r} is given twice")
            found[name] = losses.strip()
    return found


def check_text(spec: object) -> None:
    """Raise a TypeError unless a loss string is a str."""
    if not isinstance(spec, str):
        raise TypeError(
            f"a loss string is a str such as 'giou + focal', not {type(spec).__name__}: "
            f"{shown(spec)}"
        )


LONGEST = 100_000
"""Of so many characters a string may be: enough for the weights of 10,000 classes."""

MOST_TERMS = 100

_TOKEN = re.compile(
    r"""
    (?P<space>\s+)
    | (?P<number>([0-9]+(_[0-9]+)*\.?([0-9]+)?|\.[0-9]+)([eE][+-]?[0-9]+)?)
    | (?P<name>[^\W\d]\w*)
    | (?P<text>'[^'\\\n]*'|"[^"\\\n]*")
    | (?P<mark>.)
    """,
    re.VERBOSE | re.DOTALL,
)
_CONSTANTS = {"True": True, "False": False, "None": None}


class _Token(NamedTuple):
    kind: str
    """``"number"``, ``"name"``, ``"text"``, ``"mark"``, or ``"end"`` after the last one."""
    text: str
    column: int


class _Term(NamedTuple):
    """A term as it is written."""

    weight: Weight
    name: str
    options: dict[str, Any]
    columns: dict[str, int]
    """Where each option stands; and by the empty name where the loss stands."""


class _Parser:
    """Reads a loss string from left to right.

    Args:
        spec: the string.

    Raises:
        SpecError: where it is too long.
    """

    def __init__(self, spec: str) -> None:
        self.spec = spec
        if len(spec) > LONGEST:
            raise self.error(1, f"has {len(spec)} characters; at most {LONGEST} are read")
        self.tokens = [
            _Token(str(found.lastgroup), found.group(), found.start() + 1)
            for found in _TOKEN.finditer(spec)
            if found.lastgroup != "space"
        ]
        self.tokens.append(_Token("end", "", len(spec) + 1))
        self.place = 0

    def terms(self) -> list[_Term]:
        """All terms.

        Raises:
            SpecError: on what cannot be read.
        """
        if self.next.kind == "end":
            raise self.error(1, "is empty; write for example 'giou + focal' or 'ce + dice'")
        terms = []
        opened: list[int] = []
        while True:
            while (column := self.next.column) and self.take("("):
                opened.append(column)
            terms.append(self.term())
            if len(terms) > MOST_TERMS:
                raise self.error(terms[-1].columns[""], f"there are more than {MOST_TERMS} terms")
            while opened and self.take(")"):
                opened.pop()
            if not self.take("+"):
                break
        if self.next.kind != "end":
            raise self.after_a_term(terms[-1].name)
        if opened:
            raise self.error(opened[-1], "this '(' is not closed")
        return terms

    def term(self) -> _Term:
        """The next term."""
        weight: Weight = 1.0
        token = self.next
        if token.kind == "number" or token.text in ("ramp", "learned"):
            weight = self.weight()
            if not self.take("*"):
                loss = self.next.text if self.next.kind == "name" else "ce"
                example = f"{token.text if token.kind == 'number' else weight}*{loss}"
                message = f"after a weight there must be '*' and a loss: {_short(example)}"
                raise self.error(token.column, message)
            if self.next.text == "(":
                message = "a weight is that of one loss: '2*ce + 2*dice'"
                raise self.error(self.next.column, message)
        name = self.take_name()
        columns = {"": name.column}
        options: dict[str, Any] = {}
        for option, value in self.arguments():
            if option is None:
                raise self.error(value.column, "options are given as name=value")
            if option.text in options:
                raise self.error(option.column, f"{_short(option.text)} is given twice")
            columns[option.text] = option.column
            options[option.text] = self.value(option.text)
        return _Term(weight, name.text, options, columns)

    def take_name(self) -> _Token:
        """The name of a loss."""
        token = self.next
        before = self.tokens[self.place - 1].text if self.place else ""
        if before == "*" and (token.kind == "number" or token.text in ("learned", "ramp")):
            raise self.error(token.column, "a loss has one weight")
        if token.kind != "end" and self.tokens[self.place + 1].text == "*":
            raise self.before_a_factor(token, self.tokens[self.place + 2])
        if token.kind == "name":
            self.place += 1
            return token
        if token.kind == "end":
            raise self.error(len(self.spec), f"after the last {before!r} there is no loss")
        if token.text == "+":
            where = "between '+' and '+'" if before == "+" else "before the '+'"
            raise self.error(token.column, f"{where} there is no loss")
        if token.text == "-":
            raise self.error(token.column, "losses are added, and have no minus")
        if token.text in (";", ":"):
            raise self.error(token.column, _STAGES)
        raise self.error(token.column, f"expected the name of a loss, not {_short(token.text)}")

    def before_a_factor(self, name: _Token, factor: _Token) -> SpecError:
        """What is wrong with ``name*factor``."""
        if factor.kind == "number":
            example = f"{factor.text}*{name.text}"
            return self.error(factor.column, f"the weight stands first: {_short(example)}")
        if name.text in LOSSES | SUMS and factor.kind == "name":
            example = f"{name.text} + {factor.text}"
            return self.error(name.column, f"losses are added: {_short(example)}")
        message = "a weight is a number, as in '0.5*l1', or ramp(...), or learned"
        return self.error(name.column, message)

    def after_a_term(self, name: str) -> SpecError:
        """What is wrong with the next token, which does not go on with a sum."""
        token = self.next
        if token.text in (";", ":"):
            return self.error(token.column, _STAGES)
        if token.text == "*":
            return self.error(token.column, f"the weight stands first: {_short(f'2*{name}')}")
        if token.text == ")":
            return self.error(token.column, "there is no '(' for this ')'")
        if token.kind in ("name", "number"):
            return self.error(token.column, "between two losses there must be '+': 'ce + dice'")
        if token.text == "=":
            return self.error(token.column, "options stand in parentheses: 'focal(gamma=1.5)'")
        return self.error(
            token.column, f"losses are joined by '+', as in 'ce + dice', and not by {token.text!r}"
        )

    def weight(self) -> Weight:
        """A weight, of which the first token is one."""
        if self.take("learned"):
            return "learned"
        return self.ramp() if self.next.text == "ramp" else float(self.number())

    def arguments(self) -> Iterator[tuple[_Token | None, _Token]]:
        """What stands in parentheses, if there are any: before each value its name, or None.

        The first token of a value is given, and the value is to be read before the next is asked
        for.
        """
        opened = self.next
        if not self.take("("):
            return
        while not self.take(")"):
            name = None
            if self.next.kind == "name" and self.tokens[self.place + 1].text == "=":
                name = self.next
                self.place += 2
            yield name, self.next
            if self.next.text != ")" and not self.take(","):
                if self.next.kind == "end":
                    raise self.error(opened.column, "this '(' is not closed")
                where = f" of {_short(name.text)}" if name else ""
                raise self.error(
                    self.next.column,
                    f"after a value{where} there must be ',' or ')', not {_short(self.next.text)}",
                )

    def value(self, option: str) -> Any:
        """The value of an option."""
        token = self.next
        if token.text == "ramp":
            return self.ramp()
        if token.kind == "text":
            self.place += 1
            return token.text[1:-1]
        if token.text in _CONSTANTS:
            self.place += 1
            return _CONSTANTS[token.text]
        if token.text == "[":
            return self.numbers()
        if token.kind == "number" or token.text in ("+", "-"):
            return self.number()
        if token.kind == "end":
            raise self.error(len(self.spec), f"there is no value of {_short(option)}")
        raise self.error(
            token.column,
            f"the value of {_short(option)} is not a number, string, True, False, None, list or "
            "ramp",
        )

    def numbers(self) -> list[float]:
        """A list of numbers."""
        opened = self.next.column
        self.take("[")
        found = []
        while not self.take("]"):
            found.append(self.number("a list holds numbers, with ',' between them: [0.5, 2]"))
            if self.next.text != "]" and not self.take(","):
                raise self.error(opened, "a list is written '[0.5, 2]'")
        if not found:
            raise self.error(opened, "this list is empty; it holds a number for each class")
        return found

    def number(self, form: str = "expected a number") -> float:
        """A number with or without a sign, an int where it is written as one."""
        token = self.next
        negative = self.take("-")
        if not negative:
            self.take("+")
        digits = self.next
        if digits.kind != "number":
            raise self.error(token.column, form)
        self.place += 1
        value: float = float(digits.text)
        whole = not set(".eE") & set(digits.text)
        if value >= (2**63 if whole else math.inf):
            raise self.error(token.column, f"the number {_short(digits.text)} is too large")
        value = int(digits.text) if whole else value
        return -value if negative else value

    def ramp(self) -> Ramp:
        """A number on a ramp."""
        form = "a ramp is written 'ramp(1, 0.01, steps=1000)', also with after=0, curve='cosine'"
        start = self.next.column
        self.take("ramp")
        numbers: list[Any] = []
        options: dict[str, Any] = {}
        for name, value in self.arguments():
            known = value.kind in ("number", "text") or value.text in ("+", "-")
            if not known or (name and name.text in options):
                raise self.error(start, form)
            if name is None:
                numbers.append(self.value("ramp"))
            else:
                options[name.text] = self.value(name.text)
        try:
            inspect.signature(Ramp).bind(*numbers, **options)
        except TypeError:
            raise self.error(start, form) from None
        try:
            return Ramp(*numbers, **options)
        except ValueError as error:
            raise self.error(start, f"ramp: {error}") from None

    @property
    def next(self) -> _Token:
        return self.tokens[self.place]

    def take(self, text: str) -> bool:
        """Go on if this is the next token."""
        found = self.next.text == text and self.next.kind != "text"
        self.place += found
        return found

    def error(self, column: int, message: str) -> SpecError:
        return _error(self.spec, column, message)


_STAGES = (
    "';' and ':' are for models that have stages, as in 'rpn: giou+bce; roi: giou+ce'; this is a "
    "single sum of losses"
)


def _make(
    term: _Term, spec: str, kind: Kind | None, defaults: dict[str, Any]
) -> list[tuple[Weight, Loss]]:
    """The loss of one term, or the losses of a sum that has a name."""
    name, column = term.name, term.columns[""]
    if name not in LOSSES | SUMS:
        raise _error(spec, column, f"no loss {_short(name)}; {_meant(name, kind)}")
    cls = (LOSSES | SUMS)[name]
    if kind is not None:
        _check_kind(cls, name, kind)
    known = cls.defaults
    for option, value in term.options.items():
        if option not in known:
            message = f"{name} has no option {_short(option)}{nearest(option, known)}"
            raise _error(spec, term.columns[option], message)
        if option == "class_weights" and not isinstance(value, list | None):
            message = "class_weights is a list with a number for each class, as in [0.5, 2]"
            raise _error(spec, term.columns[option], message)
    try:
        made = cls(**{k: v for k, v in defaults.items() if k in known} | term.options)
        terms = [(term.weight, made)] if isinstance(made, Loss) else made.scaled(term.weight)
        # A value that the function refuses shows here and not in some step.
        for _, loss in terms:
            for step in (*(ramp.after + ramp.steps for ramp in loss.ramps.values()), 0):
                loss.step = step
                sync = {"sync": False} if "sync" in loss.defaults else {}
                loss(*_smallest_input(loss), **sync)
    except Exception as error:  # the input is sound, so whatever goes wrong is due to an option
        reason = str(error).partition("\n")[0]
        raise _error(spec, column, f"{name}: {reason}") from None
    return terms


def _smallest_input(loss: Loss) -> tuple[Tensor, Tensor]:
    """A prediction and a target of one place that fit the options of a loss."""
    if loss.kinds[0] == "distribution":
        return torch.zeros(1, 2), torch.zeros(1)
    if loss.kinds[0] in ("boxes", "deltas"):
        return torch.zeros(1, 4), torch.zeros(1, 4)
    mode = loss.options["mode"]
    classes = max((weights.numel() for weights in loss.buffers()), default=2)
    logits = torch.zeros(1, 1 if mode == "binary" else classes)
    return logits, torch.zeros_like(logits) if mode == "multilabel" else torch.zeros(1).long()


def _meant(name: str, kind: Kind | None) -> str:
    """What to write for a name that is none: also for those of classes, functions and pairs."""
    import difflib

    known = LOSSES | SUMS
    called = {_bare(alias): each for each, cls in known.items() for alias in _aliases(cls)}
    called |= {_bare(each): each for each in known}
    bare = _bare(name[:60])
    found = [called[bare]] if bare in called else _pair(bare, called)
    advice = f"write {'+'.join(found)!r}"
    if not found:
        found = [called[each] for each in difflib.get_close_matches(bare, called, n=1)]
        advice = f"did you mean {''.join(found)!r}?"
    if not found:
        return f"there are {', '.join(names_of_kind(kind) if kind else sorted(known))}"
    for each in found:
        if kind is not None and kind not in known[each].kinds:
            return _other_kind(each, kind)
    return advice


def _aliases(cls: type[Loss | NamedSum]) -> list[str]:
    """What else a loss is called."""
    return [cls.__name__, *([cls.function.__name__] if issubclass(cls, Loss) else [])]


def _bare(name: str) -> str:
    return re.sub("_|loss", "", name.lower())


def _pair(bare: str, called: dict[str, str]) -> list[str]:
    """The losses of a name such as ``bcedice``; none where it is not two."""
    for end in range(1, len(bare)):
        if bare[:end] in called and bare[end:] in called:
            return [called[bare[:end]], called[bare[end:]]]
    return []


def warn(message: str) -> None:
    """Warn of the line that led here from outside of this package and those that it is put into."""
    inner = ("detseg_losses", "torch", "torchvision", "transformers", "ultralytics")
    frame, level = sys._getframe(1), 2
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in inner:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def _short(text: str) -> str:
    """A part of a string for a message: the beginning, quoted."""
    return repr(text if len(text) <= 60 else f"{text[:57]}...")


def _error(spec: str, column: int, message: str) -> SpecError:
    part = spec
    if len(spec) > 120:
        first = max(0, min(column - 60, len(spec) - 120))
        part = "..." * (first > 0) + spec[first : first + 120] + "..." * (first + 120 < len(spec))
    return SpecError(f"loss {part!r}, column {column}: {message}")


class LossSum(nn.Module):
    r"""A weighted sum of losses; those of one kind of input are computed in one pass.

    After a call ``values`` holds the weighted value of each term, detached; they sum to the
    result.

    A weight is one of

    - a number;
    - a :class:`Ramp` over the optimizer steps. :meth:`advance` counts them, a call does not, so
      that neither evaluation nor an accumulated part of a batch is a step;
    - ``"learned"``: with the other learned terms by their homoscedastic uncertainty (Kendall, Gal
      and Cipolla, arXiv:1705.07115). The term is

      .. math:: e^{-s} L + s, \quad s = \log \sigma^2

      with s a parameter of this module, at first 0. That is twice what the paper has for a
      Gaussian likelihood, :math:`\tfrac{1}{2} (e^{-s} L + s)`; for a softmax it has
      :math:`e^{-s} L + \tfrac{1}{2} s`, which is the same but for the scale of L. Where s follows
      a constant L the weight is 1 / L. The term can be negative.

    or what :class:`GradNorm` makes of it. An optimizer finds the learned parameters among
    ``parameters()``, of an adapted model, too, if it is made after the losses were put in; they
    want no weight decay. ``state_dict()`` holds what a run needs to go on: the parameters, the step
    where there is a ramp, the state of GradNorm. As part of an adapted model a sum adds nothing to
    the model's ``state_dict``, so that it keeps its keys: save ``loss.state_dict()`` beside it.

    DistributedDataParallel averages the gradients of learned weights inside of the model that it
    wraps, an adapted one. A criterion of its own that has any is to be wrapped, too.

    Args:
        terms: the weights and losses.
        kind: what the losses will be given, see :func:`build_loss`.

    Raises:
        SpecError: where a term cannot be given ``kind``, or has ``reduction="none"`` beside others.
        ValueError: on a weight of another type.

    Examples:
        >>> criterion = LossSum([(0.5, CrossEntropyLoss(ignore_index=255)), (1.0, DiceLoss())])
        >>> criterion
        0.5*ce(ignore_index=255) + dice
        >>> logits, target = torch.zeros(2, 3, 8, 8), torch.zeros(2, 8, 8, dtype=torch.long)
        >>> criterion(logits, target)
        tensor(1.0493)
        >>> criterion.values
        {'ce': tensor(0.5493), 'dice': tensor(0.5000)}
    """

    ramped: Tensor
    """The weights that are on a ramp in this step, ``(T,)``; None where there are none."""
    scales: Tensor | None
    """What :class:`GradNorm` multiplies the weights by, ``(T,)``."""

    def __init__(self, terms: Sequence[tuple[Weight, Loss]], kind: Kind | None = None) -> None:
        super().__init__()
        self.weights = [weight for weight, _ in terms]
        self.terms: Any = nn.ModuleList(loss for _, loss in terms)
        self.names = _unique([loss.name for _, loss in terms])
        self.values: dict[str, Tensor] = {}
        self.step = 0
        self.adapted = False
        self.kept = False  # whether there is something that saves the state of an adapted sum
        self.compared: set[str] = set()  # entries that an adapter has compared with the stock loss
        for name, weight in zip(self.names, self.weights, strict=True):
            if weight == "learned":
                # On this module and not a child's, which would enter it in every state_dict.
                self.register_parameter(_LEARNED + name, nn.Parameter(torch.zeros(())))
            elif not isinstance(weight, (int, float, Ramp)):
                raise ValueError(f"a weight is a number, a Ramp or 'learned', not {weight!r}")
        on_ramp = any(isinstance(weight, Ramp) for weight in self.weights)
        # Tensors, for a number that changes would compile a compiled loss anew.
        self.register_buffer("ramped", self._ramped() if on_ramp else None, persistent=False)
        self.register_buffer("scales", None)
        if len(terms) > 1 and any(loss.options["reduction"] == "none" for _, loss in terms):
            raise SpecError(f"{self!r}: reduction='none' has no meaning in a sum")
        shared = set.intersection(*(set(loss.kinds) for _, loss in terms))
        if kind is not None:
            for _, loss in terms:
                _check_kind(type(loss), loss.name, kind)
        # Training calls until a ramp has gone on; None where there is nothing to warn of.
        self._calls = 0 if self._counts or self._learned else None
        self.kind = kind or next((each for each in get_args(Kind) if each in shared), None)
        self.groups = self._groups() if self.kind == "segmentation" else []

    def forward(self, prediction: Any, target: Tensor, **call: Any) -> Tensor:
        """The sum of the weighted terms.

        ``call`` holds ``pixel_weight`` or ``weight``, as for the losses themselves, and what single
        terms take, such as ``distance``. For segmentation the two are one: the weight of each
        pixel, ``(B, *)``.

        Raises:
            ValueError: where both are given.
        """
        return functools.reduce(operator.add, self.compute(prediction, target, **call).values())

    def compute(self, prediction: Any, target: Tensor, **call: Any) -> dict[str, Tensor]:
        """The weighted value of each term, attached to the graph."""
        if self.kind is None:
            raise TypeError(f"{self!r} mixes kinds of input; use_losses(model, spec) routes them")
        if self.kind == "segmentation" and (weight := call.pop("weight", None)) is not None:
            if call.get("pixel_weight") is not None:
                raise ValueError("weight and pixel_weight mean the same here; give one of them")
            call["pixel_weight"] = weight
        extra = {key for loss in self.terms for key in loss.extra}
        weights = {key: value for key, value in call.items() if key not in extra}
        results: dict[int, Tensor] = {}
        for members in self.groups:
            losses = [self.terms[index] for index in members]
            results |= zip(members, together(losses, prediction, target, **weights), strict=True)
        for index, loss in enumerate(self.terms):
            if index not in results:
                own = {key: call[key] for key in loss.extra if key in call}
                results[index] = loss(prediction, target, **weights, **own)
        values = {
            name: self.weighted(name, results[index]) for index, name in enumerate(self.names)
        }
        self.record({name: value.detach() for name, value in values.items()})
        return values

    def record(self, values: dict[str, Tensor]) -> None:
        """Hold the detached values of a call.

        In training it is where one warning is given of a ramp that does not go on, and of learned
        weights that no checkpoint will have.
        """
        self.values = values
        if torch.compiler.is_compiling() or self._calls is None:
            return
        if not (self.training and torch.is_grad_enabled()):
            return
        self._calls += 1
        if self._calls == 1 and self._learned and self.adapted and not self.kept:
            warn(
                f"the learned weights of {' and '.join(self._learned)} are not in "
                "model.state_dict(), and so not in a checkpoint of the model: save "
                "losses.state_dict() beside it and load it when training goes on, with losses = "
                "detseg_losses.integrations.model_losses(model)"
            )
        if self._calls == PATIENCE and self._counts:
            warn(
                f"after {PATIENCE} training calls the ramp in {self!r} is still in step "
                f"{self.step}: call advance() of the loss after each optimizer step, for an "
                "adapted model detseg_losses.integrations.model_losses(model).advance()"
            )
        if self._calls == PATIENCE or not self._counts:
            self._calls = None

    def weighted(self, name: str, value: Tensor) -> Tensor:
        """A term's part of the sum, from the value of its loss."""
        factor = self.factor(name)
        if isinstance(factor, Tensor) or factor != 1:
            value = value * factor
        log_variance = self._parameters.get(_LEARNED + name)
        return value if log_variance is None else value + log_variance

    def factor(self, name: str) -> Tensor | float:
        """What the loss of a term is multiplied by in this step; every weight is looked up here."""
        index = self.names.index(name)
        weight = self.weights[index]
        if isinstance(weight, str):
            return torch.exp(-getattr(self, _LEARNED + name))
        if isinstance(weight, Ramp):
            return self.ramped[index]
        return weight if self.scales is None else self.scales[index] * weight

    def advance(self) -> None:
        """Count an optimizer step: ramps go on. To be called once after each of them."""
        self._set_step(self.step + 1)

    def _set_step(self, step: int) -> None:
        if step != self.step:
            self._calls = None
        self.step = step
        for loss in self.terms:
            loss.step = step
        if self.ramped is not None:
            # A new tensor, for a backward pass may need the old one.
            self.ramped = self._ramped().to(self.ramped.device, non_blocking=True)

    def _ramped(self) -> Tensor:
        return torch.tensor([w.at(self.step) if isinstance(w, Ramp) else 0.0 for w in self.weights])

    @property
    def _counts(self) -> bool:
        """Whether the value depends on the step."""
        return self.ramped is not None or any(loss.ramps for loss in self.terms)

    @property
    def _learned(self) -> list[str]:
        return [name for name, w in zip(self.names, self.weights, strict=True) if w == "learned"]

    def adapt(self, model: nn.Module) -> LossSum:
        """Get ready to be a part of a model: go to its device, leave its ``state_dict`` alone.

        Raises:
            TypeError: where the model is on the meta device.
        """
        device = next(model.parameters()).device
        if device.type == "meta":
            raise TypeError(
                f"{type(model).__name__} is on the meta device: use_losses needs a model that has "
                "its weights"
            )
        self.adapted = True
        return self.to(device)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if self.adapted and prefix:
            return
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._counts:
            destination[f"{prefix}step"] = torch.tensor(self.step)

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        *args: Any,
    ) -> None:
        if self.adapted and prefix:
            return
        if self._counts:
            # Taken out, for as a number it is not among the tensors that torch expects.
            step = state_dict.pop(f"{prefix}step", None)
            if step is not None:
                self._set_step(int(step))
            elif strict:
                missing_keys.append(f"{prefix}step")
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, *args
        )

    def check_classes(self, classes: int) -> None:
        """Raise a SpecError on a term whose weights are not one number or one for each class."""
        for name, _, loss in self.items():
            for option, weights in loss.named_buffers():
                if weights.dim() and weights.numel() != classes:
                    raise SpecError(
                        f"{name!r} has {weights.numel()} {option}, and the model {classes} classes"
                    )

    def items(self) -> Iterator[tuple[str, Weight, Loss]]:
        """Name, weight as it was stated, and loss of each term; see :meth:`weighted`."""
        return zip(self.names, self.weights, self.terms, strict=True)

    def _groups(self) -> list[list[int]]:
        """The terms that can share one pass: their options of the pass do not contradict."""
        groups: list[tuple[dict[str, Any], list[int]]] = []
        for index, loss in enumerate(self.terms):
            options = {key: loss.options[key] for key in loss.shared}
            if not options:
                continue
            for known, members in groups:
                if all(_equal(known.get(key, value), value) for key, value in options.items()):
                    known.update(options)
                    members.append(index)
                    break
            else:
                groups.append((options, [index]))
        return [members for _, members in groups]

    def __repr__(self) -> str:
        return " + ".join(
            repr(loss) if weight == 1 else f"{weight}*{loss!r}" for _, weight, loss in self.items()
        )


class NamedSum(LossSum):
    """A sum that a loss string may hold as if it were one loss.

    The options of its losses that its own do not decide are options of it.
    """

    kinds: ClassVar[tuple[Kind, ...]] = ("segmentation",)
    parts: ClassVar[tuple[type[Loss], ...]]
    defaults: ClassVar[dict[str, Any]]
    """Every option and its default."""

    def __init_subclass__(cls) -> None:
        own = parameters(cls.__init__)[1:]
        typed = unpacked(own)
        if typed is None:
            return  # a class that makes one of these in its own way
        found = [each for part in cls.parts for each in part.signature.parameters.values()]
        known = [each for each in found if each.name in typed.__annotations__]
        options = with_defaults(own + [each.replace(kind=each.KEYWORD_ONLY) for each in known])
        cls.defaults = {name: each.default for name, each in options.items()}
        show(cls.__init__, options.values())

    def __init__(self, terms: Sequence[tuple[Weight, dict[str, Any]]], options: Any) -> None:
        check_known(type(self).__name__, options, self.defaults)
        losses: list[tuple[Weight, Loss]] = [
            (weight, part(**{k: v for k, v in options.items() if k in part.defaults} | own))
            for part, (weight, own) in zip(self.parts, terms, strict=True)
        ]
        super().__init__(losses, "segmentation")

    def scaled(self, weight: Weight) -> list[tuple[Weight, Loss]]:
        """Its terms with their part of a weight."""
        numbers = [own for own in (weight, *self.weights) if isinstance(own, (int, float))]
        if len(numbers) <= len(self.weights):
            raise ValueError("a sum has a number for a weight")
        return [(numbers[0] * n, loss) for n, loss in zip(numbers[1:], self.terms, strict=True)]


class CEDiceOptions(PixelOptions, RegionOptions, total=False):
    """What :class:`CEDiceLoss` passes on."""

    label_smoothing: float
    smooth: float


class CEDiceLoss(NamedSum):
    """Cross entropy plus Dice in one pass: ``build_loss("ce + dice")`` by its usual name.

    Args:
        ce_weight: weight of the cross entropy, see :class:`LossSum`.
        dice_weight: weight of the Dice loss.
        **options: options of :func:`cross_entropy_loss`, :func:`dice_loss`, or both.

    Raises:
        TypeError: on an option that neither loss has.

    Examples:
        >>> criterion = CEDiceLoss(dice_weight=0.5, ignore_index=255, smooth=1.0)
        >>> criterion
        ce(ignore_index=255) + 0.5*dice(smooth=1.0, ignore_index=255)
        >>> logits, target = torch.zeros(2, 3, 8, 8), torch.zeros(2, 8, 8, dtype=torch.long)
        >>> criterion(logits, target)
        tensor(1.3472)
    """

    parts = (CrossEntropyLoss, DiceLoss)

    def __init__(
        self,
        ce_weight: Weight = 1.0,
        dice_weight: Weight = 1.0,
        **options: Unpack[CEDiceOptions],
    ) -> None:
        super().__init__([(ce_weight, {}), (dice_weight, {})], options)


class ComboOptions(ClassificationOptions, RegionOptions, total=False):
    """What :class:`ComboLoss` passes on."""

    smooth: float


class ComboLoss(NamedSum):
    r"""Combo loss: weighted binary cross entropy and Dice (Taghanaki et al., arXiv:1805.02798).

    .. math:: -\frac{\alpha}{N} \sum
        \left(\beta\, y \log p + (1 - \beta) (1 - y) \log (1 - p)\right)
        + (1 - \alpha) (1 - \mathrm{Dice})

    It differs from the paper's, which subtracts Dice, by the constant :math:`1 - \alpha`. For
    masks where false positives or false negatives are to become the rarer ones.

    Args:
        alpha: the share of the cross entropy.
        beta: weight of the positives in the cross entropy, negatives have 1 - beta; a larger one
            favours recall.
        **options: options of :func:`binary_cross_entropy_loss`, :func:`dice_loss`, or both.

    Raises:
        ValueError: on an alpha outside of [0, 1], or a beta that is not between 0 and 1.
        TypeError: on an option that neither loss has.

    Examples:
        >>> criterion = ComboLoss(alpha=0.5, beta=0.7)
        >>> logits, target = torch.zeros(2, 1, 8, 8), torch.zeros(2, 8, 8, dtype=torch.long)
        >>> criterion(logits, target)
        tensor(0.1040)
        >>> list(criterion.values)
        ['bce', 'dice']
    """

    parts = (BCELoss, DiceLoss)

    def __init__(
        self, alpha: float = 0.5, beta: float = 0.5, **options: Unpack[ComboOptions]
    ) -> None:
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha must be in [0, 1]: {alpha}")
        if not 0 < beta < 1:
            raise ValueError(f"beta must be between 0 and 1: {beta}")
        bce = {"pos_weight": beta / (1 - beta)}
        super().__init__([(alpha * (1 - beta), bce), (1 - alpha, {})], options)


class UnifiedFocalOptions(PixelOptions, RegionOptions, total=False):
    """What :class:`UnifiedFocalLoss` passes on."""

    alpha: Tensor | Sequence[float] | float
    smooth: float


class UnifiedFocalLoss(NamedSum):
    r"""The symmetric unified focal loss (Yeung et al., arXiv:2102.04525), of a softmax.

    .. math:: -\frac{\lambda \delta}{N} \sum (1 - p_t)^{1 - \gamma} \log p_t
        + \frac{1 - \lambda}{C} \sum_c
        \left(1 - \frac{TP}{TP + \delta FN + (1 - \delta) FP}\right)^\gamma

    Focal and focal Tversky loss with three numbers in place of six. For classes of very different
    frequency, where the two are to be tuned together.

    Args:
        weight: the share :math:`\lambda` of the focal loss.
        delta: weight of false negatives, false positives have 1 - delta.
        gamma: a smaller one puts more weight on what is hard in the focal loss, and on rare
            classes that are nearly right in the other.
        **options: options of :func:`softmax_focal_loss`, :func:`focal_tversky_loss`, or both.

    Raises:
        ValueError: on a weight or delta outside of [0, 1], or a gamma outside of (0, 1].
        TypeError: on an option that neither loss has.

    Examples:
        >>> criterion = UnifiedFocalLoss(weight=0.5, delta=0.6, gamma=0.5)
        >>> logits, target = torch.zeros(2, 3, 8, 8), torch.zeros(2, 8, 8, dtype=torch.long)
        >>> criterion(logits, target)
        tensor(0.6384)
    """

    parts = (SoftmaxFocalLoss, FocalTverskyLoss)

    def __init__(
        self,
        weight: float = 0.5,
        delta: float = 0.6,
        gamma: float = 0.5,
        **options: Unpack[UnifiedFocalOptions],
    ) -> None:
        for name, value in (("weight", weight), ("delta", delta)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must be in [0, 1]: {value}")
        if not 0 < gamma <= 1:
            raise ValueError(f"gamma must be positive and at most 1: {gamma}")
        tversky = {"alpha": 1 - delta, "beta": delta, "gamma": gamma}
        super().__init__([(weight * delta, {"gamma": 1 - gamma}), (1 - weight, tversky)], options)


SUMS: dict[str, type[NamedSum]] = {"combo": ComboLoss, "unified_focal": UnifiedFocalLoss}
"""The sums that have a name in a loss string."""


EXAMPLES: dict[Kind, tuple[str, ...]] = {
    "segmentation": ("ce", "dice"),
    "classification": ("bce", "focal"),
    "boxes": ("giou", "ciou"),
    "deltas": ("l1", "smooth_l1"),
    "distribution": ("dfl",),
}
"""Losses of each kind to name in a message, where all would be too many."""


def _check_kind(cls: type[Loss | NamedSum], name: str, kind: Kind) -> None:
    check_choice("kind", kind, Kind)
    if kind not in cls.kinds:
        raise SpecError(_other_kind(name, kind))


def _other_kind(name: str, kind: Kind) -> str:
    kinds = (LOSSES | SUMS)[name].kinds
    return (
        f"{name!r} is a loss of {' or '.join(kinds)}, not of {kind}; "
        f"write for example {' or '.join(map(repr, EXAMPLES[kind]))}"
    )


def names_of_kind(kind: Kind) -> list[str]:
    """The names of all losses that can eat this kind of input."""
    return sorted(name for name, loss in LOSSES.items() if kind in loss.kinds)


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b)
    return a is b or (not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b)


def _unique(names: Sequence[str]) -> list[str]:
    """Number the second and later of equal names: ``l1``, ``l1_2``."""
    return [
        name if name not in names[:index] else f"{name}_{names[:index].count(name) + 1}"
        for index, name in enumerate(names)
    ]
