"""What the adapters of detectors share: which terms serve which entry, and how boxes are lost."""

from __future__ import annotations

import functools
import operator
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from detseg_losses.base import (
    LOSSES,
    Kind,
    Loss,
    check_choice,
    compute_dtype,
    in_blocks,
    processes,
    rows_where,
    world_sum,
)
from detseg_losses.pixels import PixelLoss
from detseg_losses.spec import LossSum, SpecError, Weight, build_loss, names_of_kind

Normalizer = Literal["image", "batch"]

Roles = Mapping[str, tuple[Kind, ...]]
"""Which kinds of loss serve each entry of a model's loss dictionary."""

FIXED = ("mode", "ignore_index", "per_image", "sync", "reduction")
"""Options that a head itself decides."""

COUNTERPARTS = {"focal": "softmax_focal", "bce": "ce"}
"""What a loss of independent sigmoids is called where the classes exclude each other."""


def read_losses(
    spec: str, owner: str, roles: Roles, normalizer: Normalizer | None, *, softmax: bool = False
) -> LossSum:
    """Make the losses of a head, and say at once what it has no use for.

    A role without a term is warned of: there the model keeps its own loss.

    Args:
        spec: a loss string.
        owner: what the head or model is called in messages.
        roles: what the head computes.
        normalizer: what the sums over anchors are divided by; None where the losses of classes are
            means over what was sampled.
        softmax: whether the classes exclude each other, see :func:`softmax_terms`.

    Raises:
        SpecError: on a string that cannot be read, a term that has no role, that is a mean by
            nature (sums are needed), or that sets what the head itself decides.
        ValueError: on a normalizer that does not exist.
    """
    if normalizer is not None:
        check_choice("normalizer", normalizer, Normalizer)
    loss = build_loss(spec)
    if softmax:
        loss = softmax_terms(loss, owner)
    eaten = [kind for kinds in roles.values() for kind in kinds]
    for name, _, term in loss.items():
        if not set(term.kinds) & set(eaten):
            names = [other for kind in eaten for other in _names(kind, softmax)]
            choices = ", ".join(n for n in names if not (normalizer and LOSSES[n].of_batch))
            raise SpecError(f"{owner} has no use for {name!r}, it has for {choices}")
        if term.of_batch and normalizer is not None:
            raise SpecError(
                f"{owner} divides sums by the positive anchors, and {name!r} is a mean by nature"
            )
        fixed = [option for option in FIXED if option in term.given]
        if fixed:
            raise SpecError(f"{name!r}: {owner} itself decides {fixed[0]!r}")
    for role, kinds in roles.items():
        if not terms_of(loss, kinds):
            warnings.warn(
                f"{spec!r} has no loss of {' or '.join(kinds)}: {role!r} stays as it is",
                stacklevel=4,
            )
    return loss


def _names(kind: Kind, softmax: bool) -> list[str]:
    names = names_of_kind(kind)
    if softmax and kind == "segmentation":
        return [name for name in names if issubclass(LOSSES[name], PixelLoss)]
    return names


def softmax_terms(loss: LossSum, owner: str) -> LossSum:
    """The terms for a head whose classes exclude each other: one softmax, background included.

    So that ``"giou+focal"`` trains every detector, ``focal`` is taken as ``softmax_focal`` there
    and ``bce`` as ``ce``, with the same weight and options, and with a warning. Other losses of
    sigmoids, and those that have no value for a single box, are refused.

    Args:
        loss: what :func:`build_loss` makes of the string of such a head.
        owner: what the head or model is called in messages.

    Raises:
        SpecError: on a term that is refused, and on an option that the counterpart does not have
            or (``alpha``) that means something else there.
    """
    terms: list[tuple[Weight, Loss]] = []
    for name, weight, term in loss.items():
        if term.name in COUNTERPARTS:
            term = _counterpart(term, owner)
        elif {"classification", "segmentation"} & set(term.kinds) and not isinstance(
            term, PixelLoss
        ):
            choices = ", ".join(_names("segmentation", softmax=True))
            raise SpecError(
                f"the classes of {owner} exclude each other: it has no use for {name!r}, it has "
                f"for {choices}"
            )
        terms.append((weight, term))
    return LossSum(terms)


def _counterpart(term: Loss, owner: str) -> Loss:
    name = COUNTERPARTS[term.name]
    options = term.given | dict(term.named_buffers(recurse=False))
    known = LOSSES[name].defaults().keys() - {"alpha"}  # of a sigmoid it weighs positives alone
    if unknown := options.keys() - known:
        raise SpecError(
            f"the classes of {owner} exclude each other: {term.name!r} would be {name!r}, for "
            f"which {min(unknown)!r} has no meaning or another; write {name!r} itself"
        )
    warnings.warn(
        f"the classes of {owner} exclude each other: {term.name!r} is taken as {name!r}",
        stacklevel=6,
    )
    return LOSSES[name](**options)


def terms_of(loss: LossSum, kinds: tuple[Kind, ...]) -> list[tuple[str, Loss]]:
    """The terms that can be given one of these kinds of input, with their names."""
    return [(name, term) for name, _, term in loss.items() if set(term.kinds) & set(kinds)]


def check_own(name: str, found: object, own: type, ours: type) -> None:
    """Refuse what is not torchvision's own class, for it may compute its loss in another way.

    Raises:
        TypeError: naming both.
    """
    if type(found) not in (own, ours):
        raise TypeError(f"{name} is a {type(found).__name__}, not torchvision's {own.__name__}")


def check_own_loss(model: Any, own: Any) -> None:
    """Refuse a model of a derived class that computes its loss by itself.

    Raises:
        TypeError: naming the class.
    """
    if type(model).compute_loss is not own.compute_loss:
        name = type(model).__name__
        raise TypeError(f"{name} has a compute_loss of its own, which would not call these losses")


def factor_of_images(foreground: Tensor, normalizer: Normalizer) -> Tensor:
    """What the sums over the anchors of each image are multiplied by, ``(B, 1)``.

    Args:
        foreground: which anchors have an object, ``(B, A)``.
        normalizer: the count of those (at least 1) of each ``"image"``, then the mean over images;
            or of the whole ``"batch"``, over all processes.
    """
    count = foreground.sum(1, keepdim=True, dtype=torch.float32)
    if normalizer == "image":
        return 1 / (count.clamp(min=1) * len(count))
    total = world_sum(count.sum(), sync=True).clamp(min=1)
    return (processes(sync=True) / total).expand_as(count)


def of_matches(key: str, targets: list[dict[str, Tensor]], matched_idxs: list[Tensor]) -> Tensor:
    """The label or box of the object that each anchor matches, ``(B, A, ...)``; else zeros."""
    found = []
    for target, matched in zip(targets, matched_idxs, strict=True):
        values = target[key]
        nothing = values.new_zeros(1, *values.shape[1:])
        found.append(torch.cat((values, nothing))[matched.clamp(min=-1)])
    return torch.stack(found)


def class_losses(
    loss: LossSum,
    logits: Tensor,
    targets: list[dict[str, Tensor]],
    matched_idxs: list[Tensor],
    factor: Tensor,
) -> dict[str, Tensor]:
    """The weighted values of the terms on sigmoids of classes, by name: sums over all anchors.

    Args:
        loss: what to compute.
        logits: ``(B, A, K)``.
        targets: of each image ``labels`` ``(G,)``.
        matched_idxs: of each image ``(A,)``: which object, -1 none, -2 left out.
        factor: what the anchors of each image count, ``(B, 1)``.

    Raises:
        ValueError: on a negative label, where that can be seen.
    """
    for number, target in enumerate(targets):
        if in_blocks(logits) and (target["labels"] < 0).any():  # they would count as background
            raise ValueError(f"labels of image {number} are negative: {target['labels'].tolist()}")
    matched = torch.stack(matched_idxs)
    labels = torch.where(matched >= 0, of_matches("labels", targets, matched_idxs), matched)
    return {
        name: loss.weighted(name, term(logits, labels, weight=factor, reduction="sum"))
        for name, term in terms_of(loss, ("classification",))
    }


class Positives:
    """The rows that have an object; off the CPU all of them, the others with a factor of 0.

    Args:
        positive: which rows those are, ``(N,)``.
        anchors: ``(N, 4)``.
        boxes: the objects', ``(N, 4)``; where none, anything.
        factors: what each row counts, ``(N,)``.

    Attributes:
        anchors: of the rows, ``(M, 4)``.
        boxes: ``(M, 4)``; without an object the anchor itself.
        factors: ``(M,)``.
    """

    def __init__(self, positive: Tensor, anchors: Tensor, boxes: Tensor, factors: Tensor) -> None:
        self._rows = rows_where(positive)
        self.anchors = self.of(anchors)  # mixed precision makes them half precision
        has_object = positive[self._rows].unsqueeze(-1)
        self.boxes = torch.where(has_object, self.of(boxes), self.anchors)
        self.factors = self.of(positive * factors)

    @classmethod
    def of_batch(
        cls,
        targets: list[dict[str, Tensor]],
        anchors: list[Tensor],
        matched_idxs: list[Tensor],
        factor: Tensor,
    ) -> Positives:
        """Those among the anchors ``(A, 4)`` of each image, which count ``factor``, ``(B, 1)``."""
        foreground = torch.stack(matched_idxs) >= 0
        boxes = of_matches("boxes", targets, matched_idxs)
        factors = factor.expand(foreground.shape)
        rows = (foreground, torch.stack(anchors), boxes, factors)
        return cls(*(values.flatten(0, 1) for values in rows))

    def of(self, values: Tensor) -> Tensor:
        """Values ``(N, ...)`` of the rows, ``(M, ...)``, in the dtype of the computation."""
        values = values[self._rows]
        return values.to(compute_dtype(values.dtype))


def box_losses(
    loss: LossSum,
    found: Positives,
    deltas: Tensor,
    encode: Callable[[Tensor, Tensor], Tensor],
    decode: Callable[[Tensor, Tensor], Tensor],
) -> dict[str, Tensor]:
    """The weighted values of the terms on decoded boxes and of those on encoded offsets, by name.

    Args:
        loss: what to compute.
        found: the rows that count, and what is true there.
        deltas: what the head predicts for all rows, ``(N, 4)``.
        encode: boxes and anchors to offsets.
        decode: offsets and anchors to boxes.
    """
    deltas = found.of(deltas)
    values = {}
    for name, term in terms_of(loss, ("boxes", "deltas")):
        if "boxes" in term.kinds:
            each = term(decode(deltas, found.anchors), found.boxes, reduction="none")
        else:
            each = term(deltas, encode(found.boxes, found.anchors), reduction="none").sum(-1)
        values[name] = loss.weighted(name, (each * found.factors).sum())
    return values


def entries(
    losses: Mapping[str, Mapping[str, Tensor]], stock: Callable[[], Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """A model's loss dictionary: the sums of the terms, and what it computes itself without any."""
    own = {} if all(losses.values()) else stock()
    return {key: total(values) if values else own[key] for key, values in losses.items()}


def total(values: Mapping[str, Tensor]) -> Tensor:
    """The sum of the terms of one role, of which there is at least one."""
    return functools.reduce(operator.add, values.values())


def detached(*roles: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The values of all roles, as :attr:`LossSum.values` holds them."""
    return {name: value.detach() for values in roles for name, value in values.items()}
