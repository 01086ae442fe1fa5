"""Any losses in torchvision's Faster, Mask and Keypoint R-CNN."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from detseg_losses._core.blocks import rows_where
from detseg_losses.integrations._adapter import Adapter, Losses, Swapped
from detseg_losses.integrations.detection import (
    Positives,
    Roles,
    box_losses,
    check_labels,
    detached,
    of_matches,
    read_losses,
    settle,
    terms_of,
    with_objects,
    within_0_and_1,
)
from detseg_losses.integrations.extras import needs
from detseg_losses.spec import LossSum, build_loss, read_stages

with needs("torchvision"):
    from torchvision.models.detection._utils import BoxCoder
    from torchvision.models.detection.keypoint_rcnn import KeypointRCNN
    from torchvision.models.detection.mask_rcnn import MaskRCNN
    from torchvision.models.detection.roi_heads import (
        RoIHeads,
        keypoints_to_heatmap,
        project_masks_on_boxes,
    )
    from torchvision.models.detection.rpn import RegionProposalNetwork

ROLES: dict[str, Roles] = {
    "rpn": {"loss_objectness": ("classification",), "loss_rpn_box_reg": ("boxes", "deltas")},
    "roi": {"loss_classifier": ("segmentation",), "loss_box_reg": ("boxes", "deltas")},
    "mask": {"loss_mask": ("segmentation",)},
    "keypoint": {"loss_keypoint": ("segmentation",)},
}
"""What each stage computes. Classes that exclude each other are a segmentation of single pixels."""

Targets = list[dict[str, Tensor]]


class LossRPN(Swapped, RegionProposalNetwork):
    """A region proposal network with other losses."""

    own = RegionProposalNetwork

    loss: LossSum
    fg_bg_sampler: Any

    def assign_targets_to_anchors(
        self, anchors: list[Tensor], targets: Targets
    ) -> tuple[list[Tensor], list[Tensor]]:
        labels, boxes = super().assign_targets_to_anchors(anchors, targets)
        self._matched = torch.cat(anchors), torch.cat(boxes), with_objects(targets)
        return labels, boxes

    def compute_loss(
        self,
        objectness: Tensor,
        pred_bbox_deltas: Tensor,
        labels: list[Tensor],
        regression_targets: list[Tensor],
    ) -> tuple[Tensor, Tensor]:
        """The losses of objectness and of boxes.

        Args:
            objectness: logits of all anchors of the batch, ``(A, 1)``.
            pred_bbox_deltas: their predicted offsets, ``(A, 4)``.
            labels: of the anchors of each image: 1 object, 0 background, -1 neither.
            regression_targets: their true offsets.
        """
        anchors, truths, has_objects = self.__dict__.pop("_matched")
        sample = self.fg_bg_sampler(labels)
        positive, negative = (torch.cat(masks) > 0 for masks in sample)
        sampled = positive | negative

        rows = rows_where(sampled)
        classes = torch.where(positive, 0, torch.where(negative, -1, -2))[rows]
        logits = objectness.reshape(-1, 1)[rows]
        classification = {}
        for name, term in terms_of(self.loss, ROLES["rpn"]["loss_objectness"]):
            classification[name] = self.loss.weighted(name, term(logits, classes))

        count = sampled.sum().clamp(min=1)
        found = Positives(positive, anchors, truths, positive / count)
        coder: BoxCoder = self.box_coder
        boxes = box_losses(
            self.loss, found, pred_bbox_deltas, coder.encode_single, coder.decode_single
        )
        self.loss.record(detached(classification, boxes))
        stock = super().compute_loss

        def own() -> dict[str, Tensor]:
            sampler = self.fg_bg_sampler
            self.fg_bg_sampler = lambda labels: sample  # so that it has the same anchors
            try:
                values = stock(objectness, pred_bbox_deltas, labels, regression_targets)
            finally:
                self.fg_bg_sampler = sampler
            return dict(zip(ROLES["rpn"], values, strict=True))

        losses = dict(zip(ROLES["rpn"], (classification, boxes), strict=True))
        of_class, of_boxes = settle(self.loss, losses, own, has_objects, "rpn: ").values()
        return of_class, of_boxes


class LossRoIHeads(Swapped, RoIHeads):
    """The heads of a Faster, Mask or Keypoint R-CNN with other losses."""

    own = RoIHeads
    added = ("losses",)

    losses: Any  # a ModuleDict of a LossSum for each of the stages "roi", "mask", "keypoint"

    def select_training_samples(self, proposals: list[Tensor], targets: Targets | None) -> Any:
        self._sample = super().select_training_samples(proposals, targets)
        return self._sample

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: Targets | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Detections, or in training losses: torchvision's own, and in their place those of the
        terms, of the same proposals and predictions.

        Raises:
            ValueError: on a label out of range, or masks that are not within 0 and 1; on the CPU.
        """
        if not self.training:
            return super().forward(features, proposals, image_shapes, targets)
        assert targets is not None  # or there are no samples
        check_labels([target["labels"] for target in targets], _classes(self, "roi"))
        predictors: dict[str, Any] = {
            "roi": self.box_predictor,
            "mask": self.mask_predictor,
            "keypoint": self.keypoint_predictor,
        }
        predicted: dict[str, Any] = {}
        with ExitStack() as hooks:
            for stage in self.losses:
                keep = partial(_keep, predicted, stage)
                hooks.enter_context(predictors[stage].register_forward_hook(keep))
            detections, stock = super().forward(features, proposals, image_shapes, targets)
        losses: dict[str, dict[str, Tensor]] = {}
        proposals, matched, labels, _ = self.__dict__.pop("_sample")
        if "roi" in predicted:
            pairs = zip(targets, matched, strict=True)  # the images may differ in their samples
            truths = [of_matches("boxes", [target], [rows])[0] for target, rows in pairs]
            logits, deltas = predicted["roi"]
            losses |= self._roi_losses(logits, deltas, proposals, labels, truths)
        positive = [each > 0 for each in labels]
        proposals = [each[where] for each, where in zip(proposals, positive, strict=True)]
        matched = [each[where] for each, where in zip(matched, positive, strict=True)]
        if "mask" in predicted:
            classes = torch.cat([each[where] for each, where in zip(labels, positive, strict=True)])
            masks = [target["masks"] for target in targets]
            losses |= self._mask_losses(predicted["mask"], classes, proposals, matched, masks)
        if "keypoint" in predicted:
            points = [t["keypoints"][m] for t, m in zip(targets, matched, strict=True)]
            losses |= self._keypoint_losses(predicted["keypoint"], proposals, points)
        has_objects, entries = with_objects(targets), dict(stock)
        for stage in self.losses:
            of_stage = {entry: losses[entry] for entry in ROLES[stage]}
            entries |= settle(
                self.losses[stage], of_stage, lambda: stock, has_objects, f"{stage}: "
            )
        return detections, entries

    def _roi_losses(
        self,
        logits: Tensor,
        deltas: Tensor,
        proposals: list[Tensor],
        labels: list[Tensor],
        truths: list[Tensor],
    ) -> dict[str, dict[str, Tensor]]:
        """Of logits ``(N, C)`` and of offsets for each class ``(N, 4 * C)``."""
        loss, classes = self.losses["roi"], torch.cat(labels)
        classification = {}
        for name, term in terms_of(loss, ROLES["roi"]["loss_classifier"]):
            value = term(logits, classes, mode="multiclass")
            classification[name] = loss.weighted(name, value)
        each = torch.arange(len(classes), device=classes.device)
        positive, count = classes > 0, max(len(classes), 1)
        found = Positives(positive, torch.cat(proposals), torch.cat(truths), positive / count)
        own = deltas.unflatten(1, (-1, 4))[each, classes]
        coder: BoxCoder = self.box_coder
        boxes = box_losses(loss, found, own, coder.encode_single, coder.decode_single)
        loss.record(detached(classification, boxes))
        return {"loss_classifier": classification, "loss_box_reg": boxes}

    def _mask_losses(
        self,
        logits: Tensor,
        classes: Tensor,
        proposals: list[Tensor],
        matched: list[Tensor],
        masks: list[Tensor],
    ) -> dict[str, dict[str, Tensor]]:
        """Of logits ``(P, C, M, M)``, where that of the class of each positive proposal counts."""
        size = logits.shape[-1]
        cropped = [
            project_masks_on_boxes(*image, size)
            for image in zip(masks, proposals, matched, strict=True)
        ]
        target = within_0_and_1(torch.cat(cropped))
        each = torch.arange(len(classes), device=classes.device)
        return {
            "loss_mask": self.losses["mask"].compute(logits[each, classes, None], target[:, None])
        }

    def _keypoint_losses(
        self, logits: Tensor, proposals: list[Tensor], points: list[Tensor]
    ) -> dict[str, dict[str, Tensor]]:
        """Of heatmaps ``(P, K, M, M)``, and of each image proposals ``(P, 4)`` and points
        ``(P, K, 3)``, where the visible ones count. Without proposals K may be any number.
        """
        size = logits.shape[-1]
        found = [
            keypoints_to_heatmap(*image, size) for image in zip(points, proposals, strict=True)
        ]
        places = torch.cat([each.flatten() for each, _ in found])
        visible = torch.cat([each.flatten() for _, each in found])
        return {
            "loss_keypoint": self.losses["keypoint"].compute(
                logits.flatten(2).flatten(0, 1), places, pixel_weight=visible > 0
            )
        }


def _keep(predicted: dict[str, Any], stage: str, module: nn.Module, args: Any, output: Any) -> None:
    """A forward hook that notes what a predictor gives."""
    predicted[stage] = output


class RCNNAdapter(Adapter):
    r"""Lets a Faster, Mask or Keypoint R-CNN train with other losses: its RPN becomes a
    :class:`LossRPN`, its RoI heads :class:`LossRoIHeads`.

    A string addresses the stages of the model, ``"rpn: giou+bce; roi: giou+ce; mask: bce+dice"``;
    a stage that it does not name stays as it is. Losses without a stage, which come first, are for
    both ``rpn`` and ``roi``: ``"giou+focal; mask: dice"``.

    ========  =================  =========================================  =================
    stage     entry              losses                                     torchvision's own
    ========  =================  =========================================  =================
    rpn       loss_objectness    of one sigmoid: ``bce``, ``focal``, ...    ``bce``
    \         loss_rpn_box_reg   of boxes or offsets: ``giou``, ``l1``, ... ``smooth_l1``
    roi       loss_classifier    of a softmax: ``ce``, ``softmax_focal``    ``ce``
    \         loss_box_reg       of boxes or offsets                        ``smooth_l1``
    mask      loss_mask          of binary masks: ``bce``, ``dice``, ...    ``bce``
    keypoint  loss_keypoint      of a softmax over the places of a heatmap  ``ce``
    ========  =================  =========================================  =================

    The ``beta`` of torchvision's ``smooth_l1`` is 1/9.

    Sampling and normalisation stay torchvision's: the losses of classes are means over the sampled
    anchors or proposals of the batch, those of boxes sums over the positive ones among them,
    divided by the number of all. Masks and keypoints are means over the positive proposals; a
    region loss such as ``dice`` is that of each proposal.

    Where a softmax is trained, ``focal`` is taken as ``softmax_focal`` and ``bce`` as ``ce``, and
    the other way round where sigmoids are, with a warning. A role without a term keeps the model's
    own loss, with a warning. The dictionary that the model returns in training keeps its keys, so
    does its ``state_dict``.

    The RPN and the RoI heads must be torchvision's own, in a model that is not yet wrapped for
    several processes.
    """

    mechanism = "class"

    def read(self, cls: type, spec: str) -> Losses:
        stages = ["rpn", "roi"] + ["mask"] * issubclass(cls, MaskRCNN)
        return _read(spec, stages + ["keypoint"] * issubclass(cls, KeypointRCNN), cls.__name__)

    def fitting(self, model: Any, spec: str) -> Losses:
        owner, heads = type(model).__name__, model.roi_heads
        stages = ["rpn", "roi"]
        stages += ["mask"] * heads.has_mask() + ["keypoint"] * heads.has_keypoint()
        losses = _read(spec, stages, owner)
        for stage, loss in losses.items():
            if (classes := _classes(heads, stage)) is not None:
                loss.check_classes(classes)
            name = f"stage {stage!r} of {owner}"
            if stage == "rpn":
                LossRPN.check_own(name, model.rpn)
            else:
                LossRoIHeads.check_own(name, heads)
        return losses

    def inject(self, model: Any, losses: Losses) -> None:
        if "rpn" in losses:
            LossRPN.swap(model.rpn, losses["rpn"])
        if of_heads := {stage: loss for stage, loss in losses.items() if stage != "rpn"}:
            LossRoIHeads.swap(model.roi_heads, nn.ModuleDict(of_heads))

    def restore(self, model: Any) -> None:
        LossRPN.swap_back(model.rpn)
        LossRoIHeads.swap_back(model.roi_heads)

    def losses(self, model: Any) -> Losses:
        losses = {"rpn": model.rpn.loss} if isinstance(model.rpn, LossRPN) else {}
        heads = model.roi_heads
        return losses | (dict(heads.losses.items()) if isinstance(heads, LossRoIHeads) else {})


def _read(spec: str, stages: list[str], owner: str) -> Losses:
    losses: Losses = {}
    for stage, part in read_stages(spec, stages, owner, unnamed=("rpn", "roi")).items():
        losses[stage] = read_losses(
            part,
            f"stage {stage!r} of {owner}",
            ROLES[stage],
            None,
            softmax=stage in ("roi", "keypoint"),
            masks=stage != "mask" and "mask" in stages,
        )
        if stage == "mask":  # where each object is what an image is elsewhere
            options: dict[str, Any] = {"mode": "binary", "per_image": True}
            losses[stage] = build_loss(repr(losses[stage]), "segmentation", **options)
    return losses


def _classes(heads: RoIHeads, stage: str) -> int | None:
    """How many classes a stage tells apart; None where that shows in training."""
    if stage == "roi":
        return getattr(getattr(heads.box_predictor, "cls_score", None), "out_features", None)
    return None if stage == "keypoint" else 1


ADAPTER = RCNNAdapter()
