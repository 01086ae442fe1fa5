"""What the adapters of detectors share: which terms serve which entry, and how to compute them."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from detseg_losses._core.blocks import compute_dtype, rows_where
from detseg_losses._core.checks import check_choice, in_blocks
from detseg_losses._core.distribution import processes, world_sum
from detseg_losses._core.module import LOSSES, Kind, Loss
from detseg_losses._core.reduction import divide
from detseg_losses.integrations._adapter import Swapped
from detseg_losses.losses.softmax import PixelLoss
from detseg_losses.spec import (
    EXAMPLES,
    LossSum,
    SpecError,
    Weight,
    build_loss,
    names_of_kind,
    warn,
)

Normalizer = Literal["image", "batch"]

Coding = Callable[[Tensor, Tensor], Tensor]

Roles = Mapping[str, tuple[Kind, ...]]
"""Which kinds of loss serve each entry of a model's loss dictionary."""

FIXED = ("mode", "ignore_index", "per_image", "sync", "reduction")
"""Options that a head itself decides."""

SOFTMAX = {"focal": "softmax_focal", "bce": "ce"}
"""What a loss of independent sigmoids is called where the classes exclude each other."""

SIGMOID = {softmax: sigmoid for sigmoid, softmax in SOFTMAX.items()}
"""The other way round."""

UNLIKE = 4.0
"""A role that changes by more than this factor has another share of the whole loss."""

ROUNDING = 1e-3
"""By how much resampled masks may exceed 1."""

LARGEST = 20.0
"""No larger weight, and none below its inverse, is recommended: one batch says no more than that a
weight is wanted."""


def read_losses(
    spec: str,
    owner: str,
    roles: Roles,
    normalizer: Normalizer | None,
    *,
    softmax: bool = False,
    masks: bool = False,
) -> LossSum:
    """Make the losses of a head, and say at once what it has no use for.

    A role without a term is warned of: there the model keeps its own loss.

    Args:
        spec: a loss string.
        owner: what the head or model is called in messages.
        roles: what the head computes.
        normalizer: what the sums over anchors are divided by; None where the losses of classes are
            means over what was sampled.
        softmax: whether the classes exclude each other, see :func:`softmax_terms`; if they do not,
            see :func:`sigmoid_terms`.
        masks: whether the model has masks, whose losses stand after ``; mask:``.

    Raises:
        SpecError: on a string that cannot be read, a term that has no role, that is a mean by
            nature (sums are needed), or that sets what the head itself decides.
        ValueError: on a normalizer that does not exist.
    """
    if normalizer is not None:
        check_choice("normalizer", normalizer, Normalizer)
    loss = build_loss(spec)
    if masks:
        _check_masks_apart(loss)
    loss = softmax_terms(loss, owner) if softmax else sigmoid_terms(loss, owner)
    eaten = [kind for kinds in roles.values() for kind in kinds]
    for name, _, term in loss.items():
        if not set(term.kinds) & set(eaten):
            raise SpecError(f"{owner} has no use for {name!r}{_instead(term, eaten, softmax)}")
        if term.of_batch and normalizer is not None:
            raise SpecError(
                f"{owner} divides sums by the positive anchors, and {name!r} is a mean by nature"
            )
        fixed = [option for option in FIXED if option in term.given]
        if fixed:
            raise SpecError(f"{name!r}: {owner} itself decides {fixed[0]!r}")
    for role, kinds in roles.items():
        if not terms_of(loss, kinds):
            warn(f"{spec!r} has no loss of {' or '.join(kinds)}: {role!r} stays as it is")
    return loss


def _instead(term: Loss, eaten: Sequence[Kind], softmax: bool) -> str:
    """The end of a message about a term without a role: what to write."""
    names = [name for kind in eaten for name in EXAMPLES[kind]]
    if softmax:
        names = [name if name != "dice" else "softmax_focal" for name in names]
    return f", it has for losses such as {', '.join(names)}"


def is_of_masks(term: Loss) -> bool:
    """Whether a term is a loss of masks alone, and not of the classes of boxes."""
    return set(term.kinds) == {"segmentation"} and not isinstance(term, PixelLoss)


def _check_masks_apart(loss: LossSum) -> None:
    """Raise a SpecError that says how losses of masks are written beside others."""
    masks = [(weight, term) for _, weight, term in loss.items() if is_of_masks(term)]
    if masks:
        others = [(weight, term) for _, weight, term in loss.items() if not is_of_masks(term)]
        before = f"{LossSum(others)!r}; " if others else ""
        raise SpecError(
            f"{masks[0][1].name!r} is a loss of masks, which have a part of their own in the "
            f"string: write {f'{before}mask: {LossSum(masks)!r}'!r}"
        )


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
        if term.name in SOFTMAX:
            term = _counterpart(
                term, SOFTMAX[term.name], f"the classes of {owner} exclude each other"
            )
        elif {"classification", "segmentation"} & set(term.kinds) and not isinstance(
            term, PixelLoss
        ):
            names = names_of_kind("segmentation")
            choices = ", ".join(n for n in names if issubclass(LOSSES[n], PixelLoss))
            raise SpecError(
                f"the classes of {owner} exclude each other: it has no use for {name!r}, it has "
                f"for {choices}"
            )
        terms.append((weight, term))
    return LossSum(terms)


def sigmoid_terms(loss: LossSum, owner: str) -> LossSum:
    """The terms for a head of independent sigmoids, the other way round: ``softmax_focal`` is taken
    as ``focal`` and ``ce`` as ``bce``, so that one string serves every stage and detector.

    Args:
        loss: what :func:`build_loss` makes of the string of such a head.
        owner: what the head or model is called in messages.

    Raises:
        SpecError: on an option that the counterpart does not have or (``alpha``) that means
            something else there.
    """
    reason = f"the classes of {owner} are independent sigmoids"
    return LossSum(
        [
            (
                weight,
                _counterpart(term, SIGMOID[term.name], reason) if term.name in SIGMOID else term,
            )
            for _, weight, term in loss.items()
        ]
    )


def _counterpart(term: Loss, name: str, reason: str) -> Loss:
    """The loss that a term is taken as."""
    options = term.given | dict(term.named_buffers(recurse=False))
    known = LOSSES[name].defaults.keys() - {"alpha"}  # of a sigmoid it weighs positives alone
    if unknown := options.keys() - known:
        raise SpecError(
            f"{reason}: {term.name!r} would be {name!r}, for which {min(unknown)!r} has no meaning "
            f"or another; write {name!r} itself"
        )
    warn(f"{reason}: {term.name!r} is taken as {name!r}")
    return LOSSES[name](**options)


def terms_of(loss: LossSum, kinds: tuple[Kind, ...]) -> list[tuple[str, Loss]]:
    """The terms that can be given one of these kinds of input, with their names."""
    return [(name, term) for name, _, term in loss.items() if set(term.kinds) & set(kinds)]


def check_own_loss(model: Any, own: Any) -> None:
    """Refuse a model of a derived class that computes its loss by itself.

    Raises:
        TypeError: naming the class.
    """
    if type(model).compute_loss is not own.compute_loss:
        name = type(model).__name__
        raise TypeError(f"{name} has a compute_loss of its own, which would not call these losses")


def check_labels(labels: Sequence[Tensor], classes: int | None, *, background: bool = True) -> None:
    """Refuse the labels of objects that are out of range, on the CPU, where a look costs nothing.

    Args:
        labels: of each image ``(G,)``.
        classes: ``num_classes`` of the model, the background included; None where that is unknown.
        background: whether the label 0 means background to the model; to a RetinaNet or FCOS it is
            a class as any other.

    Raises:
        ValueError: naming the image and the label.
    """
    first = 1 if background else 0
    for number, found in enumerate(labels):
        if not in_blocks(found) or not found.numel():
            continue
        low, high = (int(value) for value in found.aminmax())
        if low < first or (classes is not None and high >= classes):
            wrong = low if low < first else high
            allowed = f"{min(1, classes - 1)}..{classes - 1}" if classes else "labels from 1"
            known = f"num_classes={classes}" if classes else "the model"
            zero = "; 0 is the background" if background and wrong == 0 else ""
            raise ValueError(f"image {number}: label {wrong}, but {known} allows {allowed}{zero}")


def check_class_labels(labels: Sequence[Tensor], classes: int) -> None:
    """Refuse labels from 0 that are out of range, as :func:`check_labels` does.

    Args:
        labels: of each image ``(G,)``.
        classes: ``num_labels`` of the model.

    Raises:
        ValueError: naming the image and the label.
    """
    for number, found in enumerate(labels):
        if in_blocks(found) and found.numel():
            low, high = (int(value) for value in found.aminmax())
            if low < 0 or high >= classes:
                raise ValueError(
                    f"image {number}: label {low if low < 0 else high}, but num_labels={classes} "
                    f"allows 0..{classes - 1}"
                )


def compare(
    loss: LossSum,
    entry: str,
    values: Mapping[str, Tensor],
    stock: Callable[[], Tensor],
    say: Callable[[str], None] = warn,
    stage: str = "",
) -> None:
    """Say once where the terms of an entry are of another scale than the loss that they replace.

    To be called in steps with objects alone, for others tell nothing. After the first of these it
    costs nothing.

    Args:
        loss: the losses of the model.
        entry: what the model calls its loss.
        values: the weighted values of the terms that replace it, by name; may be empty.
        stock: computes the model's own loss.
        say: what to call with the message.
        stage: what stands before these terms in the loss string, ``"rpn: "`` for example.
    """
    if not values or entry in loss.compared or torch.compiler.is_compiling():
        return
    loss.compared.add(entry)
    ours = total(values).detach().double()
    if ours.is_meta:
        return
    with torch.no_grad():
        ratio = float(divide(ours, stock().double()))
    terms = [(weight, term) for name, weight, term in loss.items() if name in values]
    if better := better_weights([weight for weight, _ in terms], ratio):
        pairs = zip(better, terms, strict=True)
        written = " + ".join(f"{weight:g}*{_as_written(term)}" for weight, (_, term) in pairs)
        say(
            f"{entry} is {ratio:.2g} times the stock loss in the first batch with objects: think "
            f"of a {'larger' if ratio < 1 else 'smaller'} weight in the loss string: write "
            f"{stage + written!r}"
        )


def _as_written(term: Loss) -> str:
    """A term as a user writes it, without what the head itself decides."""
    options = term.given | dict(term.named_buffers(recurse=False))
    return repr(type(term)(**{name: v for name, v in options.items() if name not in FIXED}))


def better_weights(weights: Sequence[Weight], ratio: float) -> list[float] | None:
    """Weights for terms whose sum is ``ratio`` times what it should be: 1, 2 or 5 times a power of
    10, up to :data:`LARGEST`.

    Returns:
        None where the ratio is within :data:`UNLIKE`, where the weights are that far from 1
        already, and where one is on a ramp or learned, and so does not stay what it is.
    """
    numbers = [float(w) for w in weights if isinstance(w, (int, float)) and w > 0]
    if len(numbers) < len(weights) or not 0 < ratio < math.inf or 1 / UNLIKE < ratio < UNLIKE:
        return None
    if ratio < 1:
        factor = min(1 / ratio, LARGEST / max(numbers))
    else:
        factor = max(1 / ratio, 1 / (LARGEST * min(numbers)))
    if 1 / UNLIKE < factor < UNLIKE or (factor > 1) != (ratio < 1):
        return None
    return [_rounded(weight * factor) for weight in numbers]


def _rounded(weight: float) -> float:
    """The nearest of 1, 2 and 5, times a power of 10."""
    power = 10.0 ** math.floor(math.log10(weight))
    choices = [digit * power for digit in (1, 2, 5, 10)]
    return min(choices, key=lambda choice: abs(math.log(choice / weight)))


def within_0_and_1(masks: Tensor) -> Tensor:
    """Masks that were resampled, without what rounding adds to 1.

    Raises:
        ValueError: on values that are not within 0 and 1, on the CPU.
    """
    if in_blocks(masks) and masks.numel():
        low, high = (float(value) for value in masks.aminmax())
        if not -ROUNDING <= low <= high <= 1 + ROUNDING:
            remedy = "; divide by 255" if low >= 0 and 1 < high < 256 else ""
            raise ValueError(
                f"masks must be within 0 and 1, these are in {low:g}..{high:g}{remedy}"
            )
    return masks.clamp(0, 1)


def with_objects(targets: Sequence[Mapping[str, Tensor]]) -> bool:
    """Whether any image has one."""
    return any(len(target["boxes"]) for target in targets)


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
        # Without an object the shape may be another one.
        nothing = values.new_zeros((1, 4) if key == "boxes" else (1,))
        values = torch.cat((values, nothing)) if len(values) else nothing
        found.append(values[matched.clamp(min=-1)])
    return torch.stack(found)


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
    encode: Coding,
    decode: Coding,
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


def settle(
    loss: LossSum,
    losses: Mapping[str, Mapping[str, Tensor]],
    stock: Callable[[], Mapping[str, Tensor]],
    has_objects: bool,
    stage: str = "",
) -> dict[str, Tensor]:
    """A model's loss dictionary: the sums of the terms, and what it computes itself without any.

    In the first batch with objects the terms are compared with what they replace, see
    :func:`compare`.

    Args:
        loss: the losses of the terms.
        losses: the weighted values of the terms of each entry, by name.
        stock: computes the model's own entries.
        has_objects: whether any image of the batch has one.
        stage: what stands before these terms in the loss string, ``"rpn: "`` for example.
    """
    compared = functools.cache(stock)  # for the comparison alone, which needs no gradients
    for entry, values in losses.items() if has_objects else ():
        compare(loss, entry, values, lambda: compared()[entry], stage=stage)  # noqa: B023
    own = {} if all(losses.values()) else stock()
    return {entry: total(values) if values else own[entry] for entry, values in losses.items()}


def detached(*roles: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The values of all roles, as :attr:`LossSum.values` holds them."""
    return {name: value.detach() for values in roles for name, value in values.items()}


class AnchorLosses(Swapped):
    """The ``compute_loss`` of torchvision's detectors with anchors, with other losses.

    To be mixed into a class of theirs. Three methods say what differs between them: :meth:`coder`,
    and where they are not those of sigmoids :meth:`class_losses` and :meth:`further_losses`.
    """

    added: ClassVar[tuple[str, ...]] = ("loss", "normalizer")

    loss: LossSum
    normalizer: Normalizer
    entries: ClassVar[Sequence[str]] = ("classification", "bbox_regression")
    """In the model's order."""
    background: ClassVar[bool] = False
    """Whether the label 0 means background to the model."""

    def coder(self) -> tuple[Coding, Coding]:
        """What encodes boxes and anchors to offsets, and what decodes offsets and anchors."""
        raise NotImplementedError

    def class_losses(
        self,
        logits: Tensor,
        targets: list[dict[str, Tensor]],
        matched_idxs: list[Tensor],
        factor: Tensor,
    ) -> dict[str, Tensor]:
        """The weighted values of the terms on classes, by name: sums over all anchors.

        Args:
            logits: ``(B, A, K)``.
            targets: of each image ``labels`` ``(G,)``.
            matched_idxs: of each image ``(A,)``: which object, -1 none, -2 ignored.
            factor: what the anchors of each image count, ``(B, 1)``.
        """
        matched = torch.stack(matched_idxs)
        labels = torch.where(matched >= 0, of_matches("labels", targets, matched_idxs), matched)
        return {
            name: self.loss.weighted(name, term(logits, labels, weight=factor, reduction="sum"))
            for name, term in terms_of(self.loss, ("classification",))
        }

    def further_losses(
        self,
        found: Positives,
        head_outputs: dict[str, Tensor],
        stock: Callable[[], Mapping[str, Tensor]],
        has_objects: bool,
    ) -> dict[str, Tensor]:
        """Entries that have a string of their own, see :func:`settle`."""
        return {}

    def compute_loss(
        self,
        targets: list[dict[str, Tensor]],
        head_outputs: dict[str, Tensor],
        anchors: list[Tensor],
        matched_idxs: list[Tensor],
    ) -> dict[str, Tensor]:
        """The losses of a batch, ``{"classification": ..., "bbox_regression": ...}``.

        Args:
            targets: of each image ``boxes`` ``(G, 4)`` and ``labels`` ``(G,)``.
            head_outputs: ``cls_logits`` ``(B, A, K)`` and ``bbox_regression`` ``(B, A, 4)``.
            anchors: of each image ``(A, 4)``.
            matched_idxs: of each image ``(A,)``: which object, -1 none, -2 between thresholds.

        Raises:
            ValueError: on a label out of range, on the CPU.
        """
        logits, offsets = head_outputs["cls_logits"], head_outputs["bbox_regression"]
        labels = [target["labels"] for target in targets]
        check_labels(labels, logits.shape[-1], background=self.background)
        factor = factor_of_images(torch.stack(matched_idxs) >= 0, self.normalizer)
        found = Positives.of_batch(targets, anchors, matched_idxs, factor)
        losses = {
            "classification": self.class_losses(logits, targets, matched_idxs, factor),
            "bbox_regression": box_losses(self.loss, found, offsets.flatten(0, 1), *self.coder()),
        }
        library: Any = super()
        stock = partial(library.compute_loss, targets, head_outputs, anchors, matched_idxs)
        self.loss.record(detached(*losses.values()))
        losses = {entry: losses[entry] for entry in self.entries}
        has_objects = with_objects(targets)
        return settle(self.loss, losses, stock, has_objects) | self.further_losses(
            found, head_outputs, stock, has_objects
        )


def total(values: Mapping[str, Tensor]) -> Tensor:
    """The sum of the terms of one role, of which there is at least one."""
    return functools.reduce(operator.add, values.values())
