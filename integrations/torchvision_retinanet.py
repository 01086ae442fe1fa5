"""Any losses in torchvision's RetinaNet."""

from __future__ import annotations

from typing import Any

from detseg_losses.integrations._adapter import Adapter, Losses
from detseg_losses.integrations.detection import (
    AnchorLosses,
    Coding,
    Normalizer,
    Roles,
    check_own_loss,
    read_losses,
)
from detseg_losses.integrations.extras import needs

with needs("torchvision"):
    from torchvision.models.detection._utils import BoxCoder
    from torchvision.models.detection.retinanet import RetinaNet, RetinaNetHead

ROLES: Roles = {
    "classification": ("classification",),
    "bbox_regression": ("boxes", "deltas"),
}


class RetinaNetLossHead(AnchorLosses, RetinaNetHead):
    """A head with other losses."""

    own = RetinaNetHead

    regression_head: Any

    def coder(self) -> tuple[Coding, Coding]:
        coder: BoxCoder = self.regression_head.box_coder
        return coder.encode_single, coder.decode_single


class RetinaNetAdapter(Adapter):
    """Lets a RetinaNet train with other losses: its head becomes a :class:`RetinaNetLossHead`.

    Terms go by their kind: classification terms replace the focal loss, box terms (on decoded
    boxes) and terms on encoded offsets the regression loss. A role without a term keeps the
    model's own loss, with a warning. The dictionary that the model returns in training keeps its
    keys, so does its ``state_dict``.

    The model may be any RetinaNet with torchvision's own head and ``compute_loss``, before it is
    wrapped for several processes. Weights of classes are one for each class that the head counts.

    Args:
        normalizer: the sums over anchors are divided by the number of positive anchors (at least
            1): of each ``"image"``, then averaged over the images, as torchvision does, which
            under equal batch sizes is the same for any number of processes or accumulated
            batches; or of the whole ``"batch"``, over all processes.
    """

    mechanism = "class"

    def read(self, cls: type, spec: str, *, normalizer: Normalizer = "image") -> Losses:
        return {"": read_losses(spec, "RetinaNet", ROLES, normalizer)}

    def fitting(self, model: Any, spec: str, **options: Any) -> Losses:
        check_own_loss(model, RetinaNet)
        RetinaNetLossHead.check_own("the head of RetinaNet", model.head)
        losses = self.read(type(model), spec, **options)
        losses[""].check_classes(model.head.classification_head.num_classes)
        return losses

    def inject(self, model: Any, losses: Losses, *, normalizer: Normalizer = "image") -> None:
        RetinaNetLossHead.swap(model.head, losses[""], normalizer)

    def restore(self, model: Any) -> None:
        RetinaNetLossHead.swap_back(model.head)

    def losses(self, model: Any) -> Losses:
        return {"": model.head.loss} if isinstance(model.head, RetinaNetLossHead) else {}


ADAPTER = RetinaNetAdapter()
