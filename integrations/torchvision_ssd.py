"""Any losses in torchvision's SSD and SSDlite."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from detseg_losses.integrations._adapter import Adapter, Losses
from detseg_losses.integrations.detection import (
    AnchorLosses,
    Coding,
    Normalizer,
    Roles,
    of_matches,
    read_losses,
    terms_of,
)
from detseg_losses.integrations.extras import needs

with needs("torchvision"):
    from torchvision.models.detection._utils import BoxCoder
    from torchvision.models.detection.ssd import SSD

ROLES: Roles = {
    "classification": ("segmentation",),  # a softmax over classes, as of pixels
    "bbox_regression": ("boxes", "deltas"),
}


class SSDWithLosses(AnchorLosses, SSD):
    """An SSD with other losses."""

    own = SSD
    entries = ("bbox_regression", "classification")
    background = True

    neg_to_pos_ratio: float

    def coder(self) -> tuple[Coding, Coding]:
        coder: BoxCoder = self.box_coder
        return coder.encode_single, coder.decode_single

    def class_losses(
        self,
        logits: Tensor,
        targets: list[dict[str, Tensor]],
        matched_idxs: list[Tensor],
        factor: Tensor,
    ) -> dict[str, Tensor]:
        foreground = torch.stack(matched_idxs) >= 0
        labels = of_matches("labels", targets, matched_idxs)  # 0, the background, without a match
        values = {}
        for name, term in terms_of(self.loss, ROLES["classification"]):
            each = term(logits.flatten(0, 1), labels.flatten(), reduction="none")
            sums = sum_with_hardest(each.view_as(labels), foreground, self.neg_to_pos_ratio)
            values[name] = self.loss.weighted(name, (sums * factor).sum())
        return values


class SSDAdapter(Adapter):
    """Lets an SSD or SSDlite train with other losses: it becomes an :class:`SSDWithLosses`.

    Terms go by their kind: those of a softmax (``ce``, ``softmax_focal``, ``poly``, ...) replace
    the cross entropy, box terms (on decoded boxes) and terms on encoded offsets the smooth L1
    loss. ``focal`` is taken as ``softmax_focal`` and ``bce`` as ``ce``, with a warning. A role
    without a term keeps the model's own loss, with a warning. The dictionary that the model
    returns in training keeps its keys, so does its ``state_dict``.

    As in torchvision only the hardest negatives of an image count in the classification,
    ``model.neg_to_pos_ratio`` for each positive anchor. Each term chooses those that it itself
    finds the hardest.

    The model may be any SSD before it is wrapped for several processes, but not of a subclass,
    which would lose its own methods. Weights of classes are one for each class that the head
    counts.

    Args:
        normalizer: the sums over anchors are divided by the number of positive anchors (at least
            1): of the whole ``"batch"``, as torchvision does, but over all processes; or of each
            ``"image"``, then averaged over the images, which under equal batch sizes is the same
            for any number of processes or accumulated batches.
    """

    mechanism = "class"

    def read(self, cls: type, spec: str, *, normalizer: Normalizer = "batch") -> Losses:
        return {"": read_losses(spec, "SSD", ROLES, normalizer, softmax=True)}

    def fitting(self, model: Any, spec: str, **options: Any) -> Losses:
        if type(model) not in (SSD, SSDWithLosses):
            raise TypeError(
                f"no adapter for {type(model).__name__}: it is the class of an SSD that is "
                "replaced, and a subclass would lose its own methods"
            )
        losses = self.read(type(model), spec, **options)
        losses[""].check_classes(model.head.classification_head.num_columns)
        return losses

    def inject(self, model: Any, losses: Losses, *, normalizer: Normalizer = "batch") -> None:
        SSDWithLosses.swap(model, losses[""], normalizer)

    def restore(self, model: Any) -> None:
        SSDWithLosses.swap_back(model)

    def losses(self, model: Any) -> Losses:
        return {"": model.loss} if isinstance(model, SSDWithLosses) else {}


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


ADAPTER = SSDAdapter()
