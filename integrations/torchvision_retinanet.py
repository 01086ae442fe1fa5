"""Any losses in torchvision's RetinaNet."""

from __future__ import annotations

import warnings
from typing import Literal

import torch
from torch import Tensor, nn
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.retinanet import RetinaNet, RetinaNetHead

from detseg_losses.base import (
    Kind,
    Loss,
    check_choice,
    compute_dtype,
    processes,
    rows_where,
    world_sum,
)
from detseg_losses.spec import LossSum, SpecError, build_loss, names_of_kind

Normalizer = Literal["image", "batch"]

ROLES: dict[str, tuple[Kind, ...]] = {
    "classification": ("classification",),
    "bbox_regression": ("boxes", "deltas"),
}
"""Which kinds of loss serve each entry of the model's loss dictionary."""

FIXED = ("mode", "ignore_index", "per_image", "sync", "reduction")
"""Options that the head itself decides."""


def use_losses(model: RetinaNet, spec: str, *, normalizer: Normalizer = "image") -> RetinaNet:
    """Let a RetinaNet train with other losses, in place.

    Terms go by their kind: classification terms replace the focal loss, box terms (on decoded
    boxes) and delta terms (on encoded offsets) the regression loss. A role without a term keeps
    the model's own loss, with a warning. The dictionary that the model returns in training keeps
    its keys, so does its ``state_dict``; ``model.head.loss.values`` holds the value of each term.

    Args:
        model: any RetinaNet, before it is wrapped for several processes.
        spec: a loss string, for example ``"giou + 0.5*l1 + focal(gamma=1.5)"``.
        normalizer: the sums over anchors are divided by the number of positive anchors (at least
            1): of each ``"image"``, then averaged over the images, as torchvision does, which
            under equal batch sizes is the same for any number of processes or accumulated
            batches; or of the whole ``"batch"``, over all processes.

    Returns:
        The model.

    Raises:
        SpecError: on a string that cannot be read, a term that has no role here, or weights that
            are not one for each class that the head counts.
    """
    check_choice("normalizer", normalizer, Normalizer)
    loss = build_loss(spec)
    eaten = [kind for kinds in ROLES.values() for kind in kinds]
    for name, _, term in loss.items():
        if not set(term.kinds) & set(eaten):
            choices = ", ".join(other for kind in eaten for other in names_of_kind(kind))
            raise SpecError(f"RetinaNet has no use for {name!r}, it has for {choices}")
        if term.of_batch:
            raise SpecError(
                f"RetinaNet divides sums by the positive anchors, and {name!r} is a mean by nature"
            )
        fixed = [option for option in FIXED if option in term.given]
        if fixed:
            raise SpecError(f"{name!r}: RetinaNet's head itself decides {fixed[0]!r}")
    for role, kinds in ROLES.items():
        if not any(set(term.kinds) & set(kinds) for _, _, term in loss.items()):
            warnings.warn(
                f"{spec!r} has no loss of {' or '.join(kinds)}: {role!r} stays as it is",
                stacklevel=3,
            )
    loss.check_classes(model.head.classification_head.num_classes)
    restore_losses(model)
    model.head = RetinaNetLossHead(model.head, loss.adapt(model), normalizer)
    return model


def restore_losses(model: RetinaNet) -> RetinaNet:
    """Give a RetinaNet back the head, and so the losses, that it came with; in place."""
    if isinstance(model.head, RetinaNetLossHead):
        model.head = model.head.stock
    return model


class RetinaNetLossHead(RetinaNetHead):
    """Stands in for a head: its sub-heads, its outputs, other losses.

    Args:
        head: the head, whose submodules are shared.
        loss: what to compute.
        normalizer: see :func:`use_losses`.
    """

    def __init__(self, head: RetinaNetHead, loss: LossSum, normalizer: Normalizer) -> None:
        nn.Module.__init__(self)
        for name, child in head.named_children():
            self.add_module(name, child)
        self.loss = loss
        self.normalizer = normalizer
        self._stock = (head,)  # in a tuple, so that its parameters are not registered twice
        self.train(head.training)

    @property
    def stock(self) -> RetinaNetHead:
        """The head that this one stands in for."""
        return self._stock[0]

    def train(self, mode: bool = True) -> RetinaNetLossHead:
        self.stock.train(mode)
        return super().train(mode)

    def forward(self, x: list[Tensor]) -> dict[str, Tensor]:
        return self.stock(x)

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
        """
        matched = torch.stack(matched_idxs)
        foreground = matched >= 0
        factor = self._factor(foreground)
        totals: dict[str, Tensor] = {}
        values: dict[str, Tensor] = {}

        def add(role: str, name: str, value: Tensor) -> None:
            totals[role] = totals[role] + value if role in totals else value
            values[name] = value.detach()

        labels = torch.where(foreground, _of_matches("labels", targets, matched_idxs), matched)
        for name, term in self._terms("classification"):
            logits = head_outputs["cls_logits"]
            value = term(logits, labels, weight=factor, reduction="sum")
            add("classification", name, self.loss.weighted(name, value))
        if "classification" not in totals:
            totals["classification"] = self.stock.classification_head.compute_loss(
                targets, head_outputs, matched_idxs
            )

        rows = rows_where(foreground.flatten())
        factors = (foreground * factor).flatten()[rows]
        deltas = head_outputs["bbox_regression"].flatten(0, 1)[rows]
        deltas = deltas.to(compute_dtype(deltas.dtype))
        anchor = torch.stack(anchors).flatten(0, 1)[rows]
        boxes = _of_matches("boxes", targets, matched_idxs).flatten(0, 1)[rows]
        boxes = torch.where(foreground.flatten()[rows].unsqueeze(-1), boxes, anchor)
        coder: BoxCoder = self.stock.regression_head.box_coder
        for name, term in self._terms("bbox_regression"):
            if "boxes" in term.kinds:
                value = term(coder.decode_single(deltas, anchor), boxes, reduction="none")
            else:
                value = term(deltas, coder.encode_single(boxes, anchor), reduction="none").sum(-1)
            add("bbox_regression", name, self.loss.weighted(name, (value * factors).sum()))
        if "bbox_regression" not in totals:
            totals["bbox_regression"] = self.stock.regression_head.compute_loss(
                targets, head_outputs, anchors, matched_idxs
            )
        self.loss.values = values
        return totals

    def _terms(self, role: str) -> list[tuple[str, Loss]]:
        return [(n, term) for n, _, term in self.loss.items() if set(term.kinds) & set(ROLES[role])]

    def _factor(self, foreground: Tensor) -> Tensor:
        """What the sums over the anchors of each image are multiplied by, ``(B, 1)``."""
        count = foreground.sum(1, keepdim=True, dtype=torch.float32)
        if self.normalizer == "image":
            return 1 / (count.clamp(min=1) * len(count))
        total = world_sum(count.sum(), sync=True).clamp(min=1)
        return (processes(sync=True) / total).expand_as(count)


def _of_matches(key: str, targets: list[dict[str, Tensor]], matched_idxs: list[Tensor]) -> Tensor:
    """The label or box of the object that each anchor matches, ``(B, A, ...)``; else zeros."""
    found = []
    for target, matched in zip(targets, matched_idxs, strict=True):
        values = target[key]
        nothing = values.new_zeros(1, *values.shape[1:])
        found.append(torch.cat((values, nothing))[matched.clamp(min=-1)])
    return torch.stack(found)
