"""Dense-prediction losses for detection and segmentation, and the strings that name them."""

from .balance import GradNorm
from .base import LOSSES, Loss, Ramp
from .boxes import (
    CIoULoss,
    DIoULoss,
    GIoULoss,
    IoULoss,
    complete_box_iou_loss,
    distance_box_iou_loss,
    generalized_box_iou_loss,
    iou_loss,
)
from .classification import (
    BCELoss,
    SigmoidFocalLoss,
    binary_cross_entropy_loss,
    sigmoid_focal_loss,
)
from .deltas import L1Loss, SmoothL1Loss, l1_loss, smooth_l1_loss
from .pixels import CrossEntropyLoss, SoftmaxFocalLoss, cross_entropy_loss, softmax_focal_loss
from .regions import (
    DiceLoss,
    FocalTverskyLoss,
    JaccardLoss,
    TverskyLoss,
    dice_loss,
    focal_tversky_loss,
    jaccard_loss,
    tversky_loss,
)
from .spec import CEDiceLoss, LossSum, SpecError, build_loss
from .statistics import Statistics, statistics

__version__ = "0.1.0"
__all__ = [
    "LOSSES",
    "BCELoss",
    "CEDiceLoss",
    "CIoULoss",
    "CrossEntropyLoss",
    "DIoULoss",
    "DiceLoss",
    "FocalTverskyLoss",
    "GIoULoss",
    "GradNorm",
    "IoULoss",
    "JaccardLoss",
    "L1Loss",
    "Loss",
    "LossSum",
    "Ramp",
    "SigmoidFocalLoss",
    "SmoothL1Loss",
    "SoftmaxFocalLoss",
    "SpecError",
    "Statistics",
    "TverskyLoss",
    "binary_cross_entropy_loss",
    "build_loss",
    "complete_box_iou_loss",
    "cross_entropy_loss",
    "dice_loss",
    "distance_box_iou_loss",
    "focal_tversky_loss",
    "generalized_box_iou_loss",
    "iou_loss",
    "jaccard_loss",
    "l1_loss",
    "sigmoid_focal_loss",
    "smooth_l1_loss",
    "softmax_focal_loss",
    "statistics",
    "tversky_loss",
]
