"""Any losses in torchvision's FCOS."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from detseg_losses._core.reduction import divide
from detseg_losses.integrations._adapter import Adapter, Losses
from detseg_losses.integrations.detection import (
    AnchorLosses,
    Coding,
    Normalizer,
    Positives,
    Roles,
    check_own_loss,
    detached,
    read_losses,
    settle,
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


class FCOSLossHead(AnchorLosses, FCOSHead):
    """A head with other losses, that of the centerness included."""

    own = FCOSHead
    added = ("loss", "normalizer", "centerness")

    centerness: LossSum
    """Of ``head_outputs["bbox_ctrness"]``, ``(B, A, 1)``, the entry ``bbox_ctrness``."""

    def coder(self) -> tuple[Coding, Coding]:
        coder: BoxLinearCoder = self.box_coder
        return lambda boxes, points: coder.encode(points, boxes), coder.decode

    def further_losses(
        self,
        found: Positives,
        head_outputs: dict[str, Tensor],
        stock: Callable[[], Mapping[str, Tensor]],
        has_objects: bool,
    ) -> dict[str, Tensor]:
        logits = found.of(head_outputs["bbox_ctrness"].flatten(0, 1))
        encode, _ = self.coder()
        aim = centerness_of(encode(found.boxes, found.anchors)).unsqueeze(-1)
        values = {}
        for name, _, term in self.centerness.items():
            value = term(logits, aim, weight=found.factors, reduction="sum")
            values[name] = self.centerness.weighted(name, value)
        self.centerness.record(detached(values))
        return settle(self.centerness, {"bbox_ctrness": values}, stock, has_objects)


class FCOSAdapter(Adapter):
    """Lets an FCOS train with other losses: its head becomes an :class:`FCOSLossHead`.

    Terms go by their kind: classification terms replace the focal loss, box terms (on decoded
    boxes) and terms on the distances to the four sides the GIoU loss. A role without a term keeps
    the model's own loss, with a warning. The centerness has a string of its own, for
    classification terms would serve it, too. The dictionary that the model returns in training
    keeps its keys, so does its ``state_dict``.

    The model may be any FCOS with torchvision's own head and ``compute_loss``, before it is wrapped
    for several processes. Weights of classes are one for each class that the head counts.

    Args:
        centerness: a loss string of the centerness of positive anchors, a single logit that is to
            predict a number between 0 and 1; by default torchvision's own cross entropy.
        normalizer: the sums over anchors are divided by the number of positive anchors (at least
            1): of the whole ``"batch"``, as torchvision does, but over all processes; or of each
            ``"image"``, then averaged over the images, which under equal batch sizes is the same
            for any number of processes or accumulated batches.
    """

    mechanism = "class"

    def read(
        self, cls: type, spec: str, *, centerness: str = "bce", normalizer: Normalizer = "batch"
    ) -> Losses:
        owner = "the centerness of FCOS"
        return {
            "": read_losses(spec, "FCOS", ROLES, normalizer),
            "centerness": read_losses(centerness, owner, CENTERNESS, normalizer),
        }

    def fitting(self, model: Any, spec: str, **options: Any) -> Losses:
        check_own_loss(model, FCOS)
        FCOSLossHead.check_own("the head of FCOS", model.head)
        losses = self.read(type(model), spec, **options)
        losses[""].check_classes(model.head.classification_head.num_classes)
        losses["centerness"].check_classes(1)
        return losses

    def inject(
        self, model: Any, losses: Losses, *, normalizer: Normalizer = "batch", **_: Any
    ) -> None:
        FCOSLossHead.swap(model.head, losses[""], normalizer, losses["centerness"])

    def restore(self, model: Any) -> None:
        FCOSLossHead.swap_back(model.head)

    def losses(self, model: Any) -> Losses:
        if not isinstance(model.head, FCOSLossHead):
            return {}
        return {"": model.head.loss, "centerness": model.head.centerness}


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


ADAPTER = FCOSAdapter()
