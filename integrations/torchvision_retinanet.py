"""Any losses in torchvision's RetinaNet."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from detseg_losses.integrations.detection import (
    Normalizer,
    Positives,
    Roles,
    box_losses,
    check_labels,
    check_own,
    check_own_loss,
    class_losses,
    compare_all,
    detached,
    factor_of_images,
    read_losses,
    total,
    with_objects,
)
from detseg_losses.integrations.extras import needs
from detseg_losses.spec import LossSum

with needs("torchvision"):
    from torchvision.models.detection._utils import BoxCoder
    from torchvision.models.detection.retinanet import RetinaNet, RetinaNetHead

ROLES: Roles = {
    "classification": ("classification",),
    "bbox_regression": ("boxes", "deltas"),
}


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
        TypeError: where the head is not torchvision's own, or the model computes its loss itself.
    """
    check_own_loss(model, RetinaNet)
    check_own("the head of RetinaNet", model.head, RetinaNetHead, RetinaNetLossHead)
    loss = read(type(model), spec, normalizer=normalizer)
    loss.check_classes(model.head.classification_head.num_classes)
    loss.adapt(model)
    restore_losses(model)
    model.head.__class__ = RetinaNetLossHead
    model.head.loss, model.head.normalizer = loss, normalizer
    return model


def read(cls: type, spec: str, *, normalizer: Normalizer = "image") -> LossSum:
    """The losses of a string, as far as it can be judged without a model."""
    return read_losses(spec, "RetinaNet", ROLES, normalizer)


def restore_losses(model: RetinaNet) -> RetinaNet:
    """Give a RetinaNet back the losses that it came with, in place."""
    if isinstance(model.head, RetinaNetLossHead):
        del model.head.loss, model.head.normalizer
        model.head.__class__ = RetinaNetHead
    return model


class RetinaNetLossHead(RetinaNetHead):
    """A head with other losses.

    A model's own becomes one by its ``__class__``, so that whatever it holds, now or later, stays
    in its place.
    """

    loss: LossSum
    normalizer: Normalizer

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
        num_classes = self.classification_head.num_classes
        check_labels([t["labels"] for t in targets], num_classes, background=False)
        factor = factor_of_images(torch.stack(matched_idxs) >= 0, self.normalizer)
        logits = head_outputs["cls_logits"]
        classification = class_losses(self.loss, logits, targets, matched_idxs, factor)
        coder: BoxCoder = self.regression_head.box_coder
        regression = box_losses(
            self.loss,
            Positives.of_batch(targets, anchors, matched_idxs, factor),
            head_outputs["bbox_regression"].flatten(0, 1),
            coder.encode_single,
            coder.decode_single,
        )
        self.loss.record(detached(classification, regression))
        if with_objects(targets):
            losses = {"classification": classification, "bbox_regression": regression}
            stock = partial(super().compute_loss, targets, head_outputs, anchors, matched_idxs)
            compare_all(self.loss, losses, stock)
        return {
            "classification": total(classification)
            if classification
            else self.classification_head.compute_loss(targets, head_outputs, matched_idxs),
            "bbox_regression": total(regression)
            if regression
            else self.regression_head.compute_loss(targets, head_outputs, anchors, matched_idxs),
        }
