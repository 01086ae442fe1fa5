"""Loss strings: ``"giou + 0.5*l1 + focal(gamma=1.5)"`` makes a :class:`LossSum`."""

from __future__ import annotations

import ast
import functools
import inspect
import math
import operator
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal, TypeGuard, get_args

import torch
from torch import Tensor, nn

from .base import LOSSES, Kind, Loss, Ramp, check_choice
from .shared import together

Weight = float | Ramp | Literal["learned"]

_LEARNED = "log_variance_"
"""What the parameter of a learned weight is called, before the name of its term."""


class SpecError(ValueError):
    """A loss string that cannot be read; the message points at the column."""


def build_loss(spec: str, kind: Kind | None = None, **defaults: Any) -> LossSum:
    """Make the loss that a string describes.

    A string is ``term + term + ...``, a term ``[weight *] name [(option=literal, ...)]``, the name
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

    Example:
        >>> criterion = build_loss("0.5*ce + dice(smooth=1)", ignore_index=255)
        >>> loss = criterion(logits, masks)
        >>> criterion.values
        {'ce': tensor(0.3466), 'dice': tensor(0.5049)}
    """
    try:
        tree = ast.parse(spec.strip(), mode="eval").body
    except (SyntaxError, ValueError) as error:
        column = getattr(error, "offset", None) or 1
        raise _error(spec.strip(), column, "is not a loss string like 'giou + 0.5*l1'") from None
    terms = [
        term for node in _summands(tree) for term in _terms(node, spec.strip(), kind, defaults)
    ]
    unused = [key for key in defaults if not any(key in term.options for _, term in terms)]
    if unused:
        raise SpecError(f"no term of {spec!r} has the option {unused[0]!r}")
    return LossSum(terms, kind)


def read_stages(spec: str, stages: Sequence[str], owner: str) -> dict[str, str]:
    """The loss string of each stage that a string addresses: ``"rpn: giou+bce; roi: giou+ce"``.

    Args:
        spec: parts ``stage: losses``, with ``;`` between them; or a loss string.
        stages: the names that there are.
        owner: what has these stages, for messages.

    Returns:
        By stage, in the order of the string; empty for a string that addresses none.

    Raises:
        SpecError: naming the column, on a part without a stage, a stage that does not exist, or
            one that is given twice.
    """
    found: dict[str, str] = {}
    if not set(":;") & set(spec):
        return found
    column = 1
    for part in spec.split(";"):
        stage, colon, losses = part.partition(":")
        start = column + len(part) - len(part.lstrip())
        column += len(part) + 1
        stage = stage.strip()
        if not part.strip():
            continue  # after the last ";"
        if not colon:
            raise _error(spec, start, f"expected a stage, as in '{stages[0]}: {part.strip()}'")
        if stage not in stages:
            raise _error(spec, start, f"{owner} has no stage {stage!r}{nearest(stage, stages)}")
        if stage in found:
            raise _error(spec, start, f"stage {stage!r} is given twice")
        found[stage] = losses.strip()
    return found


def _summands(node: ast.expr) -> Iterator[ast.expr]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        yield from _summands(node.left)
        yield from _summands(node.right)
    else:
        yield node


def _terms(
    node: ast.expr, spec: str, kind: Kind | None, defaults: dict[str, Any]
) -> list[tuple[Weight, Loss]]:
    """The loss of one summand, or the losses of a sum that has a name."""
    weight: Weight = 1.0
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        weight = _weight(node.left, spec)
        node = node.right
    call = node
    keywords = []
    if isinstance(node, ast.Call):
        if node.args:
            raise _error(spec, node.args[0].col_offset + 1, "options are given as name=value")
        call, keywords = node.func, node.keywords
    if not isinstance(call, ast.Name):
        raise _error(spec, call.col_offset + 1, "expected the name of a loss")
    if call.id not in LOSSES | SUMS:
        hint = nearest(call.id, LOSSES | SUMS)
        raise _error(spec, call.col_offset + 1, f"no loss {call.id!r}{hint}")
    cls = (LOSSES | SUMS)[call.id]
    if kind is not None:
        _check_kind(cls, call.id, kind)
    known = cls.defaults()
    options: dict[str, Any] = {}
    for keyword in keywords:
        column = keyword.col_offset + 1
        if keyword.arg not in known:
            hint = nearest(str(keyword.arg), known)
            raise _error(spec, column, f"{call.id} has no option {keyword.arg!r}{hint}")
        if keyword.arg in options:
            raise _error(spec, column, f"{keyword.arg!r} is given twice")
        options[keyword.arg] = _literal(keyword, spec)
    try:
        made = cls(**{k: v for k, v in defaults.items() if k in known} | options)
        terms = [(weight, made)] if isinstance(made, Loss) else made.scaled(weight)
        # A value that the function refuses shows here and not in some step.
        for _, loss in terms:
            for step in (*(ramp.after + ramp.steps for ramp in loss.ramps.values()), 0):
                loss.step = step
                sync = {"sync": False} if "sync" in loss.known else {}
                loss(*_smallest_input(loss), **sync)
    except (ValueError, TypeError, RuntimeError) as error:
        raise _error(spec, call.col_offset + 1, f"{call.id}: {error}") from None
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


def _weight(node: ast.expr, spec: str) -> Weight:
    if isinstance(node, ast.Name) and node.id == "learned":
        return "learned"
    if _is_ramp(node):
        return _ramp(node, spec)
    if not (isinstance(node, ast.Constant) and type(node.value) in (int, float)):
        message = "a weight is a number, as in '0.5*l1', or ramp(...), or learned"
        raise _error(spec, node.col_offset + 1, message)
    weight = float(ast.literal_eval(node))
    if not math.isfinite(weight):
        raise _error(spec, node.col_offset + 1, "a weight is a finite number")
    return weight


def _is_ramp(node: ast.expr) -> TypeGuard[ast.Call]:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "ramp"


def _ramp(node: ast.Call, spec: str) -> Ramp:
    form = "a ramp is written 'ramp(1, 0.01, steps=1000)', also with after=0, curve='cosine'"
    try:
        numbers = [ast.literal_eval(argument) for argument in node.args]
        options = {str(k.arg): ast.literal_eval(k.value) for k in node.keywords}
        inspect.signature(Ramp).bind(*numbers, **options)
    except (ValueError, TypeError):
        raise _error(spec, node.col_offset + 1, form) from None
    try:
        return Ramp(*numbers, **options)
    except ValueError as error:
        raise _error(spec, node.col_offset + 1, f"ramp: {error}") from None


def _literal(keyword: ast.keyword, spec: str) -> Any:
    if _is_ramp(keyword.value):
        return _ramp(keyword.value, spec)
    try:
        value = ast.literal_eval(keyword.value)
    except (ValueError, TypeError):
        value = ...
    if value is None or isinstance(value, (int, float, str, list)):
        return value
    message = (
        f"the value of {keyword.arg!r} is not a number, string, True, False, None, list or ramp"
    )
    raise _error(spec, keyword.value.col_offset + 1, message)


def nearest(name: str, known: Any) -> str:
    """The end of a message about an unknown name: the nearest one, or all that there are."""
    import difflib  # takes longer than the rest of this file, and is for mistakes only

    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    choices = ", ".join(sorted(known))
    return f"; did you mean {close[0]!r}?" if close else f"; there are {choices}"


def _error(spec: str, column: int, message: str) -> SpecError:
    return SpecError(f"loss {spec!r}, column {column}: {message}")


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
        self.kind = kind or next((each for each in get_args(Kind) if each in shared), None)
        self.groups = self._groups() if self.kind == "segmentation" else []

    def forward(self, prediction: Any, target: Tensor, **call: Any) -> Tensor:
        """The sum; ``call`` holds ``pixel_weight`` or ``weight``, as for the losses themselves, and
        what single terms take, such as ``distance``.
        """
        return functools.reduce(operator.add, self.compute(prediction, target, **call).values())

    def compute(self, prediction: Any, target: Tensor, **call: Any) -> dict[str, Tensor]:
        """The weighted value of each term, attached to the graph."""
        if self.kind is None:
            raise TypeError(f"{self!r} mixes kinds of input; use_losses(model, spec) routes them")
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
        self.values = {name: value.detach() for name, value in values.items()}
        return values

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

    def adapt(self, model: nn.Module) -> LossSum:
        """Get ready to be a part of a model: go to its device, leave its ``state_dict`` alone."""
        self.adapted = True
        return self.to(next(model.parameters()).device)

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
    parts: ClassVar[tuple[str, ...]]

    def __init__(
        self, terms: Sequence[tuple[Weight, dict[str, Any]]], options: dict[str, Any]
    ) -> None:
        known: list[set[str]] = [
            LOSSES[name].defaults().keys() - own.keys()
            for name, (_, own) in zip(self.parts, terms, strict=True)
        ]
        known[-1] |= options.keys() - set.union(*known)  # which raises
        losses: list[tuple[Weight, Loss]] = [
            (weight, LOSSES[name](**own, **{k: v for k, v in options.items() if k in has}))
            for name, (weight, own), has in zip(self.parts, terms, known, strict=True)
        ]
        super().__init__(losses, "segmentation")

    @classmethod
    @functools.cache
    def defaults(cls) -> dict[str, Any]:
        """Every option and its default."""
        own = list(inspect.signature(cls).parameters.values())[:-1]
        parts = [LOSSES[name].defaults() for name in cls.parts]
        return {k: v for part in parts for k, v in part.items()} | {p.name: p.default for p in own}

    def scaled(self, weight: Weight) -> list[tuple[Weight, Loss]]:
        """Its terms with their part of a weight."""
        numbers = [own for own in (weight, *self.weights) if isinstance(own, (int, float))]
        if len(numbers) <= len(self.weights):
            raise ValueError("a sum has a number for a weight")
        return [(numbers[0] * n, loss) for n, loss in zip(numbers[1:], self.terms, strict=True)]


class CEDiceLoss(NamedSum):
    """Cross entropy plus Dice in one pass: ``build_loss("ce + dice")`` by its usual name.

    Args:
        ce_weight: weight of the cross entropy, see :class:`LossSum`.
        dice_weight: weight of the Dice loss.
        **options: options of :func:`cross_entropy_loss`, :func:`dice_loss`, or both.

    Raises:
        TypeError: on an option that neither loss has.
    """

    parts = ("ce", "dice")

    def __init__(self, ce_weight: Weight = 1.0, dice_weight: Weight = 1.0, **options: Any) -> None:
        super().__init__([(ce_weight, {}), (dice_weight, {})], options)


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
    """

    parts = ("bce", "dice")

    def __init__(self, alpha: float = 0.5, beta: float = 0.5, **options: Any) -> None:
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha must be in [0, 1]: {alpha}")
        if not 0 < beta < 1:
            raise ValueError(f"beta must be between 0 and 1: {beta}")
        bce = {"pos_weight": beta / (1 - beta)}
        super().__init__([(alpha * (1 - beta), bce), (1 - alpha, {})], options)


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
    """

    parts = ("softmax_focal", "focal_tversky")

    def __init__(
        self, weight: float = 0.5, delta: float = 0.6, gamma: float = 0.5, **options: Any
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


def _check_kind(cls: type[Loss | NamedSum], name: str, kind: Kind) -> None:
    check_choice("kind", kind, Kind)
    if kind not in cls.kinds:
        raise SpecError(
            f"{name!r} is a loss of {' or '.join(cls.kinds)}, not of {kind}; "
            f"of {kind} there are {', '.join(names_of_kind(kind))}"
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
