"""The losses of ``torchvision.ops`` with their names, arguments and values, on our engines.

To change a pipeline, change one import:
``from detseg_losses.integrations.torchvision_ops import generalized_box_iou_loss`` in place of
``from torchvision.ops import generalized_box_iou_loss``. Value and gradient are those of
torchvision wherever these are right, the default ``eps`` included; ``docs/drop_ins.md`` lists the
rest. The functions of :mod:`detseg_losses` have the same names and arguments, and no ``eps``: they
serve boxes of any size. This file needs torch only.

Losses come back in float32 (float64 for float64), also where the inputs are half precision.
"""

from __future__ import annotations

from torch import Tensor

from detseg_losses.losses import boxes
from detseg_losses.losses import sigmoid as classification

__all__ = [
    "complete_box_iou_loss",
    "distance_box_iou_loss",
    "generalized_box_iou_loss",
    "sigmoid_focal_loss",
]


def sigmoid_focal_loss(
    inputs: Tensor,
    targets: Tensor,
    alpha: float = 0.25,
    gamma: float = 2,
    reduction: str = "none",
) -> Tensor:
    """Focal loss of independent sigmoids, as ``torchvision.ops.sigmoid_focal_loss``.

    Args:
        inputs: logits of any shape.
        targets: values in [0, 1] of the same shape; or, for inputs ``(*, K)``, class indices
            ``(*)``, where -1 is background and -2 is left out.
        alpha: weight of positives, negatives have 1 - alpha; -1: no weighting.
        gamma: how fast the loss of what is well classified falls.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.

    Raises:
        ValueError: on an alpha outside of [0, 1], a negative gamma, shapes that do not fit, a label
            out of range, a target that requires grad, or a reduction that does not exist.

    Examples:
        >>> logits, targets = torch.tensor([[2.0, -3.0]]), torch.tensor([[1.0, 0.0]])
        >>> sigmoid_focal_loss(logits, targets, reduction="sum")
        tensor(0.0005)
    """
    return classification.sigmoid_focal_loss(inputs, targets, alpha, gamma, reduction)


def generalized_box_iou_loss(
    boxes1: Tensor, boxes2: Tensor, reduction: str = "none", eps: float = 1e-7
) -> Tensor:
    """Generalised IoU, as ``torchvision.ops.generalized_box_iou_loss``.

    Args:
        boxes1: XYXY, ``(N, 4)`` or ``(4,)``, in any unit.
        boxes2: boxes of the same shape, or one for all.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.
        eps: added to denominators, which are areas in the unit of the boxes: for boxes in [0, 1]
            give 0.

    Raises:
        ValueError: on shapes that do not fit, or a reduction that does not exist.

    Examples:
        >>> boxes = torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30]])
        >>> generalized_box_iou_loss(boxes, torch.tensor([0.0, 0, 10, 5]))
        tensor([0.5000, 1.8333])
    """
    return boxes.generalized_box_iou_loss(boxes1, _for_all(boxes1, boxes2), reduction, eps)


def distance_box_iou_loss(
    boxes1: Tensor, boxes2: Tensor, reduction: str = "none", eps: float = 1e-7
) -> Tensor:
    """Distance IoU, as ``torchvision.ops.distance_box_iou_loss``.

    Arguments and errors are those of :func:`generalized_box_iou_loss`.

    Examples:
        >>> boxes = torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30]])
        >>> distance_box_iou_loss(boxes, torch.tensor([0.0, 0, 10, 5]))
        tensor([0.5312, 1.5035])
    """
    return boxes.distance_box_iou_loss(boxes1, _for_all(boxes1, boxes2), reduction, eps)


def complete_box_iou_loss(
    boxes1: Tensor, boxes2: Tensor, reduction: str = "none", eps: float = 1e-7
) -> Tensor:
    """Complete IoU, as ``torchvision.ops.complete_box_iou_loss``.

    Arguments and errors are those of :func:`generalized_box_iou_loss`. ``eps`` is added to every
    denominator; torchvision's reaches one of three.

    Examples:
        >>> boxes = torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30]])
        >>> complete_box_iou_loss(boxes, torch.tensor([0.0, 0, 10, 5]))
        tensor([0.5345, 1.5052])
    """
    return boxes.complete_box_iou_loss(boxes1, _for_all(boxes1, boxes2), reduction, eps)


def _for_all(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    return boxes2.expand_as(boxes1) if boxes2.shape == (4,) else boxes2
