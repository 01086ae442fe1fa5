"""Any losses in torchvision's FCOS."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from detseg_losses._core.reduction import divide
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
    entries,
    factor_of_images,
    read_losses,
    with_objects,
)
from detseg_losses.integrations.extras import needs
from detseg_losses.spec import LossSum

with needs("torchvision"):
    from torchvision.models.detection._utils import BoxLinearCoder
    from torchvision.models.detection.fcos import FCOS, FCOSHead

ROLES: Roles = {
    "classification": ("classification",),
    "bbox_regression": ("boxes", "deltas"),
}
CENTERNESS: Roles = {"bbox_ctrness": ("classification",)}


def use_losses(
    model: FCOS, spec: str, *, centerness: str = "bce", normalizer: Normalizer = "batch"
) -> FCOS:
    """Let an FCOS train with other losses, in place.

    Terms go by their kind: classification terms replace the focal loss, box terms (on decoded
    boxes) and delta terms (on the distances to the four sides) the GIoU loss. A role without a
    term keeps the model's own loss, with a warning. The centerness has a string of its own, for
    classification terms would serve it, too. The dictionary that the model returns in training
    keeps its keys, so does its ``state_dict``; ``model.head.loss.values`` and
    ``model.head.centerness.values`` hold the value of each term.

    Args:
        model: any FCOS, before it is wrapped for several processes.
        spec: a loss string, for example ``"giou + focal(gamma=1.5)"``.
        centerness: a loss string of the centerness of positive anchors, a single logit that is to
            predict a number between 0 and 1; by default torchvision's own cross entropy.
        normalizer: the sums over anchors are divided by the number of positive anchors (at least
            1): of the whole ``"batch"``, as torchvision does, but over all processes; or of each
            ``"image"``, then averaged over the images, which under equal batch sizes is the same
            for any number of processes or accumulated batches.

    Returns:
        The model.

    Raises:
        SpecError: on a string that cannot be read, a term that has no role here, or weights that
            are not one for each class that the head counts.
        TypeError: where the head is not torchvision's own, or the model computes its loss itself.
    """
    check_own_loss(model, FCOS)
    check_own("the head of FCOS", model.head, FCOSHead, FCOSLossHead)
    loss, of_centerness = read(type(model), spec, centerness=centerness, normalizer=normalizer)
    loss.check_classes(model.head.classification_head.num_classes)
    of_centerness.check_classes(1)
    loss.adapt(model)
    of_centerness.adapt(model)
    restore_losses(model)
    model.head.__class__ = FCOSLossHead
    model.head.loss, model.head.normalizer = loss, normalizer
    model.head.centerness = of_centerness
    return model


def read(
    cls: type, spec: str, *, centerness: str = "bce", normalizer: Normalizer = "batch"
) -> tuple[LossSum, LossSum]:
    """The losses of both strings, as far as these can be judged without a model."""
    return (
        read_losses(spec, "FCOS", ROLES, normalizer),
        read_losses(centerness, "the centerness of FCOS", CENTERNESS, normalizer),
    )


def restore_losses(model: FCOS) -> FCOS:
    """Give an FCOS back the losses that it came with, in place."""
    if isinstance(model.head, FCOSLossHead):
        del model.head.loss, model.head.normalizer, model.head.centerness
        model.head.__class__ = FCOSHead
    return model


class FCOSLossHead(FCOSHead):
    """A head with other losses.

    A model's own becomes one by its ``__class__``, so that whatever it holds, now or later, stays
    in its place.
    """

    loss: LossSum
    centerness: LossSum
    normalizer: Normalizer

    def compute_loss(
        self,
        targets: list[dict[str, Tensor]],
        head_outputs: dict[str, Tensor],
        anchors: list[Tensor],
        matched_idxs: list[Tensor],
    ) -> dict[str, Tensor]:
        """The losses of a batch, ``{"classification", "bbox_regression", "bbox_ctrness"}``.

        Args:
            targets: of each image ``boxes`` ``(G, 4)`` and ``labels`` ``(G,)``.
            head_outputs: ``cls_logits`` ``(B, A, K)``, ``bbox_regression`` ``(B, A, 4)`` and
                ``bbox_ctrness`` ``(B, A, 1)``.
            anchors: of each image ``(A, 4)``.
            matched_idxs: of each image ``(A,)``: which object, -1 none.

        Raises:
            ValueError: on a label out of range, on the CPU.
        """
        num_classes = self.classification_head.num_classes
        check_labels([t["labels"] for t in targets], num_classes, background=False)
        factor = factor_of_images(torch.stack(matched_idxs) >= 0, self.normalizer)
        logits = head_outputs["cls_logits"]
        classification = class_losses(self.loss, logits, targets, matched_idxs, factor)
        found = Positives.of_batch(targets, anchors, matched_idxs, factor)
        coder: BoxLinearCoder = self.box_coder
        deltas = head_outputs["bbox_regression"].flatten(0, 1)
        regression = box_losses(
            self.loss,
            found,
            deltas,
            lambda boxes, points: coder.encode(points, boxes),
            coder.decode,
        )

        logits = found.of(head_outputs["bbox_ctrness"].flatten(0, 1))
        aim = centerness_of(coder.encode(found.anchors, found.boxes)).unsqueeze(-1)
        centerness = {}
        for name, _, term in self.centerness.items():
            value = term(logits, aim, weight=found.factors, reduction="sum")
            centerness[name] = self.centerness.weighted(name, value)

        self.loss.record(detached(classification, regression))
        self.centerness.record(detached(centerness))
        losses = {
            "classification": classification,
            "bbox_regression": regression,
            "bbox_ctrness": centerness,
        }
        stock = partial(super().compute_loss, targets, head_outputs, anchors, matched_idxs)
        if with_objects(targets):
            compare_all(self.loss, {e: losses[e] for e in ROLES}, stock)
            compare_all(self.centerness, {e: losses[e] for e in CENTERNESS}, stock)
        return entries(losses, stock)


def centerness_of(distances: Tensor) -> Tensor:
    r"""How near the middle of its box a point lies (Tian et al., FCOS, arXiv:1904.01355).

    .. math:: \sqrt{\frac{\min(l, r)}{\max(l, r)} \cdot \frac{\min(t, b)}{\max(t, b)}}

    Args:
        distances: from the point to the sides of the box, left, top, right, bottom, ``(N, 4)``.

    Returns:
        ``(N,)``: 1 in the middle, 0 on the border and outside.
    """
    near, far = torch.stack(distances.split(2, -1)).aminmax(dim=0)
    return divide(near.clamp(min=0), far).prod(-1).sqrt()
