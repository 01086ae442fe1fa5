"""Any losses in torchvision's SSD and SSDlite."""

from __future__ import annotations

from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from detseg_losses.integrations.detection import (
    Normalizer,
    Positives,
    Roles,
    box_losses,
    check_labels,
    compare_all,
    detached,
    entries,
    factor_of_images,
    of_matches,
    read_losses,
    terms_of,
    with_objects,
)
from detseg_losses.integrations.extras import needs
from detseg_losses.spec import LossSum

with needs("torchvision"):
    from torchvision.models.detection._utils import BoxCoder
    from torchvision.models.detection.ssd import SSD

ROLES: Roles = {
    "classification": ("segmentation",),  # a softmax over classes, as of pixels
    "bbox_regression": ("boxes", "deltas"),
}

Model = TypeVar("Model", bound=SSD)


def use_losses(model: Model, spec: str, *, normalizer: Normalizer = "batch") -> Model:
    """Let an SSD or SSDlite train with other losses, in place.

    Terms go by their kind: those of a softmax (``ce``, ``softmax_focal``, ``poly``, ...) replace
    the cross entropy, box terms (on decoded boxes) and delta terms (on encoded offsets) the smooth
    L1 loss. ``focal`` is taken as ``softmax_focal`` and ``bce`` as ``ce``, with a warning. A role
    without a term keeps the model's own loss, with a warning. The dictionary that the model
    returns in training keeps its keys, so does its ``state_dict``; ``model.loss.values`` holds
    the value of each term.

    As in torchvision only the hardest negatives of an image count in the classification,
    ``model.neg_to_pos_ratio`` for each positive anchor. Each term chooses those that it itself
    finds the hardest.

    Args:
        model: any SSD, before it is wrapped for several processes.
        spec: a loss string, for example ``"giou + softmax_focal(gamma=1.5)"``.
        normalizer: the sums over anchors are divided by the number of positive anchors (at least
            1): of the whole ``"batch"``, as torchvision does, but over all processes; or of each
            ``"image"``, then averaged over the images, which under equal batch sizes is the same
            for any number of processes or accumulated batches.

    Returns:
        The model, now of a subclass of its class.

    Raises:
        TypeError: on a subclass of SSD, which would lose its own methods.
        SpecError: on a string that cannot be read, a term that has no role here, or weights that
            are not one for each class that the head counts.
    """
    if type(model) not in (SSD, SSDWithLosses):
        raise TypeError(
            f"no adapter for {type(model).__name__}: it is the class of an SSD that is replaced, "
            "and a subclass would lose its own methods"
        )
    loss = read(type(model), spec, normalizer=normalizer)
    loss.check_classes(model.head.classification_head.num_columns)
    loss.adapt(model)
    restore_losses(model)
    model.__class__ = SSDWithLosses
    model.loss = loss
    model.normalizer = normalizer
    return model


def read(cls: type, spec: str, *, normalizer: Normalizer = "batch") -> LossSum:
    """The losses of a string, as far as it can be judged without a model."""
    return read_losses(spec, "SSD", ROLES, normalizer, softmax=True)


def restore_losses(model: Model) -> Model:
    """Give an SSD back the class, and so the losses, that it came with; in place."""
    if isinstance(model, SSDWithLosses):
        del model.loss, model.normalizer
        model.__class__ = SSD
    return model


class SSDWithLosses(SSD):
    """An SSD whose losses are replaced, see :func:`use_losses`."""

    loss: LossSum
    normalizer: Normalizer

    def compute_loss(
        self,
        targets: list[dict[str, Tensor]],
        head_outputs: dict[str, Tensor],
        anchors: list[Tensor],
        matched_idxs: list[Tensor],
    ) -> dict[str, Tensor]:
        """The losses of a batch, ``{"bbox_regression": ..., "classification": ...}``.

        Args:
            targets: of each image ``boxes`` ``(G, 4)`` and ``labels`` ``(G,)``.
            head_outputs: ``cls_logits`` ``(B, A, K)`` and ``bbox_regression`` ``(B, A, 4)``.
            anchors: of each image ``(A, 4)``.
            matched_idxs: of each image ``(A,)``: which object, -1 none.

        Raises:
            ValueError: on a label out of range, on the CPU.
        """
        check_labels([t["labels"] for t in targets], head_outputs["cls_logits"].shape[-1])
        foreground = torch.stack(matched_idxs) >= 0
        factor = factor_of_images(foreground, self.normalizer)
        labels = of_matches("labels", targets, matched_idxs)  # 0, the background, without a match
        logits = head_outputs["cls_logits"]
        classification = {}
        for name, term in terms_of(self.loss, ROLES["classification"]):
            each = term(logits.flatten(0, 1), labels.flatten(), reduction="none")
            sums = sum_with_hardest(each.view_as(labels), foreground, self.neg_to_pos_ratio)
            classification[name] = self.loss.weighted(name, (sums * factor).sum())

        coder: BoxCoder = self.box_coder
        regression = box_losses(
            self.loss,
            Positives.of_batch(targets, anchors, matched_idxs, factor),
            head_outputs["bbox_regression"].flatten(0, 1),
            coder.encode_single,
            coder.decode_single,
        )

        self.loss.record(detached(classification, regression))
        losses = {"bbox_regression": regression, "classification": classification}
        stock = partial(super().compute_loss, targets, head_outputs, anchors, matched_idxs)
        if with_objects(targets):
            compare_all(self.loss, losses, stock)
        return entries(losses, stock)


def sum_with_hardest(losses: Tensor, foreground: Tensor, ratio: float) -> Tensor:
    """The losses of the positive anchors and the largest ones of the negative, summed.

    Args:
        losses: of each anchor, ``(B, A)``.
        foreground: which anchors have an object, ``(B, A)``.
        ratio: how many negatives count for each positive of their image.

    Returns:
        ``(B, 1)``.
    """
    positives = torch.where(foreground, losses, 0)
    hardest = torch.where(foreground, -torch.inf, losses).sort(1, descending=True).values
    count = foreground.sum(1, keepdim=True)
    count = (ratio * count).clamp(max=foreground.shape[1] - count)  # no more than there are
    chosen = torch.arange(foreground.shape[1], device=losses.device) < count
    return (positives + torch.where(chosen, hardest, 0)).sum(1, keepdim=True)
