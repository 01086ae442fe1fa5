"""Loss strings: ``"giou + 0.5*l1 + focal(gamma=1.5)"`` makes a :class:`LossSum`."""

from __future__ import annotations

import ast
import difflib
import functools
import math
import operator
from collections.abc import Iterator, Sequence
from typing import Any, get_args

import torch
from torch import Tensor, nn

from .base import LOSSES, Kind, Loss, check_choice
from .statistics import statistics


class SpecError(ValueError):
    """A loss string that cannot be read; the message points at the column."""


def build_loss(spec: str, kind: Kind | None = None, **defaults: Any) -> LossSum:
    """Make the loss that a string describes.

    A string is ``term + term + ...``, a term ``[weight *] name [(option=literal, ...)]``, the name
    one of :data:`LOSSES`. It is parsed, never evaluated.

    Args:
        spec: the loss string.
        kind: what the losses will be given: ``"segmentation"``, ``"classification"``, ``"boxes"``
            or ``"deltas"``. None where the terms tell; ``bce`` and ``focal`` alone are then losses
            of a detection head. Terms of several kinds, ``"giou+focal"``, are for an adapter.
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
    terms = [_term(node, spec.strip(), defaults) for node in _summands(tree)]
    unused = [key for key in defaults if not any(key in term.options for _, term in terms)]
    if unused:
        raise SpecError(f"no term of {spec!r} has the option {unused[0]!r}")
    return LossSum(terms, kind)


def _summands(node: ast.expr) -> Iterator[ast.expr]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        yield from _summands(node.left)
        yield from _summands(node.right)
    else:
        yield node


def _term(node: ast.expr, spec: str, defaults: dict[str, Any]) -> tuple[float, Loss]:
    weight = 1.0
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        if not (isinstance(node.left, ast.Constant) and type(node.left.value) in (int, float)):
            raise _error(spec, node.left.col_offset + 1, "a weight is a number, as in '0.5*l1'")
        weight = float(ast.literal_eval(node.left))
        if not math.isfinite(weight):
            raise _error(spec, node.col_offset + 1, "a weight is a finite number")
        node = node.right
    call = node
    keywords = []
    if isinstance(node, ast.Call):
        if node.args:
            raise _error(spec, node.args[0].col_offset + 1, "options are given as name=value")
        call, keywords = node.func, node.keywords
    if not isinstance(call, ast.Name):
        raise _error(spec, call.col_offset + 1, "expected the name of a loss")
    if call.id not in LOSSES:
        raise _error(spec, call.col_offset + 1, f"no loss {call.id!r}{_nearest(call.id, LOSSES)}")
    cls = LOSSES[call.id]
    known = cls.defaults()
    options: dict[str, Any] = {}
    for keyword in keywords:
        column = keyword.col_offset + 1
        if keyword.arg not in known:
            hint = _nearest(str(keyword.arg), known)
            raise _error(spec, column, f"{call.id} has no option {keyword.arg!r}{hint}")
        if keyword.arg in options:
            raise _error(spec, column, f"{keyword.arg!r} is given twice")
        options[keyword.arg] = _literal(keyword, spec)
    try:
        loss = cls(**{k: v for k, v in defaults.items() if k in known} | options)
        # A value that the function refuses shows here and not in the first step.
        loss(*_smallest_input(loss), **({"sync": False} if "sync" in known else {}))
    except (ValueError, TypeError) as error:
        raise _error(spec, call.col_offset + 1, f"{call.id}: {error}") from None
    return weight, loss


def _smallest_input(loss: Loss) -> tuple[Tensor, Tensor]:
    """A prediction and a target of one place that fit the options of a loss."""
    if loss.kinds[0] in ("boxes", "deltas"):
        return torch.zeros(1, 4), torch.zeros(1, 4)
    mode = loss.options["mode"]
    classes = max((weights.numel() for weights in loss.buffers()), default=2)
    logits = torch.zeros(1, 1 if mode == "binary" else classes)
    return logits, torch.zeros_like(logits) if mode == "multilabel" else torch.zeros(1).long()


def _literal(keyword: ast.keyword, spec: str) -> Any:
    try:
        value = ast.literal_eval(keyword.value)
    except (ValueError, TypeError):
        value = ...
    if value is None or isinstance(value, (int, float, str, list)):
        return value
    message = f"the value of {keyword.arg!r} is not a number, string, True, False, None or list"
    raise _error(spec, keyword.value.col_offset + 1, message)


def _nearest(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    choices = ", ".join(sorted(known))
    return f"; did you mean {close[0]!r}?" if close else f"; there are {choices}"


def _error(spec: str, column: int, message: str) -> SpecError:
    return SpecError(f"loss {spec!r}, column {column}: {message}")


class LossSum(nn.Module):
    """A weighted sum of losses; those of one kind of input are computed in one pass.

    After a call ``values`` holds the weighted value of each term, detached; they sum to the
    result.

    Args:
        terms: the weights and losses.
        kind: what the losses will be given, see :func:`build_loss`.

    Raises:
        SpecError: where a term cannot be given ``kind``, or has ``reduction="none"`` beside others.
    """

    def __init__(self, terms: Sequence[tuple[float, Loss]], kind: Kind | None = None) -> None:
        super().__init__()
        self.weights = [weight for weight, _ in terms]
        self.terms: Any = nn.ModuleList(loss for _, loss in terms)
        self.names = _unique([loss.name for _, loss in terms])
        self.values: dict[str, Tensor] = {}
        if len(terms) > 1 and any(loss.options["reduction"] == "none" for _, loss in terms):
            raise SpecError(f"{self!r}: reduction='none' has no meaning in a sum")
        shared = set.intersection(*(set(loss.kinds) for _, loss in terms))
        if kind is not None:
            check_choice("kind", kind, Kind)
            for _, loss in terms:
                if kind not in loss.kinds:
                    raise SpecError(
                        f"{loss.name!r} is a loss of {' or '.join(loss.kinds)}, not of {kind}; "
                        f"of {kind} there are {', '.join(names_of_kind(kind))}"
                    )
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
            shared: Any = {key: loss.options[key] for loss in losses for key in loss.shared}
            needs = [need for loss in losses for need in loss.needs()]
            found = statistics(prediction, target, needs, **shared, **weights)
            results |= {index: loss(found) for index, loss in zip(members, losses, strict=True)}
        for index, loss in enumerate(self.terms):
            if index not in results:
                own = {key: call[key] for key in loss.extra if key in call}
                results[index] = loss(prediction, target, **weights, **own)
        values = {
            name: results[index] * weight for index, (name, weight, _) in enumerate(self.items())
        }
        self.values = {name: value.detach() for name, value in values.items()}
        return values

    def check_classes(self, classes: int) -> None:
        """Raise a SpecError on a term whose weights are not one number or one for each class."""
        for name, _, loss in self.items():
            for option, weights in loss.named_buffers():
                if weights.numel() not in (1, classes):
                    raise SpecError(
                        f"{name!r} has {weights.numel()} {option}, and the model {classes} classes"
                    )

    def items(self) -> Iterator[tuple[str, float, Loss]]:
        """Name, weight and loss of each term."""
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
            repr(loss) if weight == 1 else f"{weight!r}*{loss!r}"
            for _, weight, loss in self.items()
        )


class CEDiceLoss(LossSum):
    """Cross entropy plus Dice in one pass: ``build_loss("ce + dice")`` by its usual name.

    Args:
        ce_weight: weight of the cross entropy.
        dice_weight: weight of the Dice loss.
        **options: options of :func:`cross_entropy_loss`, :func:`dice_loss`, or both.

    Raises:
        TypeError: on an option that neither loss has.
    """

    def __init__(self, ce_weight: float = 1.0, dice_weight: float = 1.0, **options: Any) -> None:
        super().__init__(
            _terms([(ce_weight, "ce", {}), (dice_weight, "dice", {})], options), "segmentation"
        )


class ComboLoss(LossSum):
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

    def __init__(self, alpha: float = 0.5, beta: float = 0.5, **options: Any) -> None:
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha must be in [0, 1]: {alpha}")
        if not 0 < beta < 1:
            raise ValueError(f"beta must be between 0 and 1: {beta}")
        bce = {"pos_weight": beta / (1 - beta)}
        terms = [(alpha * (1 - beta), "bce", bce), (1 - alpha, "dice", {})]
        super().__init__(_terms(terms, options), "segmentation")


class UnifiedFocalLoss(LossSum):
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

    def __init__(
        self, weight: float = 0.5, delta: float = 0.6, gamma: float = 0.5, **options: Any
    ) -> None:
        for name, value in (("weight", weight), ("delta", delta)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must be in [0, 1]: {value}")
        if not 0 < gamma <= 1:
            raise ValueError(f"gamma must be positive and at most 1: {gamma}")
        tversky = {"alpha": 1 - delta, "beta": delta, "gamma": gamma}
        terms = [
            (weight * delta, "softmax_focal", {"gamma": 1 - gamma}),
            (1 - weight, "focal_tversky", tversky),
        ]
        super().__init__(_terms(terms, options), "segmentation")


def _terms(
    terms: Sequence[tuple[float, str, dict[str, Any]]], options: dict[str, Any]
) -> list[tuple[float, Loss]]:
    """Losses by name, each with its own options and those of the others that it knows."""
    known: list[set[str]] = [LOSSES[name].defaults().keys() - own.keys() for _, name, own in terms]
    known[-1] |= options.keys() - set.union(*known)  # which raises
    return [
        (weight, LOSSES[name](**own, **{k: v for k, v in options.items() if k in has}))
        for (weight, name, own), has in zip(terms, known, strict=True)
    ]


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
