"""Dense-prediction losses for detection and segmentation, and the strings that name them."""

from .base import LOSSES, Loss
from .boundary import BoundaryLoss, boundary_loss, signed_distance
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
from .cldice import CLDiceLoss, cldice_loss
from .deltas import L1Loss, SmoothL1Loss, l1_loss, smooth_l1_loss
from .lovasz import LovaszLoss, lovasz_loss
from .pixels import CrossEntropyLoss, SoftmaxFocalLoss, cross_entropy_loss, softmax_focal_loss
from .regions import (
    DiceLoss,
    F1Loss,
    FocalTverskyLoss,
    GeneralisedDiceLoss,
    JaccardLoss,
    LogCoshDiceLoss,
    MCCLoss,
    SquaredDiceLoss,
    TverskyLoss,
    dice_loss,
    f1_loss,
    focal_tversky_loss,
    generalised_dice_loss,
    jaccard_loss,
    log_cosh_dice_loss,
    mcc_loss,
    squared_dice_loss,
    tversky_loss,
)
from .spec import CEDiceLoss, LossSum, SpecError, build_loss
from .statistics import Statistics, statistics

__version__ = "0.1.0"
__all__ = [
    "LOSSES",
    "BCELoss",
    "BoundaryLoss",
    "CEDiceLoss",
    "CIoULoss",
    "CLDiceLoss",
    "CrossEntropyLoss",
    "DIoULoss",
    "DiceLoss",
    "F1Loss",
    "FocalTverskyLoss",
    "GIoULoss",
    "GeneralisedDiceLoss",
    "IoULoss",
    "JaccardLoss",
    "L1Loss",
    "LogCoshDiceLoss",
    "Loss",
    "LossSum",
    "LovaszLoss",
    "MCCLoss",
    "SigmoidFocalLoss",
    "SmoothL1Loss",
    "SoftmaxFocalLoss",
    "SpecError",
    "SquaredDiceLoss",
    "Statistics",
    "TverskyLoss",
    "binary_cross_entropy_loss",
    "boundary_loss",
    "build_loss",
    "cldice_loss",
    "complete_box_iou_loss",
    "cross_entropy_loss",
    "dice_loss",
    "distance_box_iou_loss",
    "f1_loss",
    "focal_tversky_loss",
    "generalised_dice_loss",
    "generalized_box_iou_loss",
    "iou_loss",
    "jaccard_loss",
    "l1_loss",
    "log_cosh_dice_loss",
    "lovasz_loss",
    "mcc_loss",
    "sigmoid_focal_loss",
    "signed_distance",
    "smooth_l1_loss",
    "softmax_focal_loss",
    "squared_dice_loss",
    "statistics",
    "tversky_loss",
]
