"""What the benchmark gives to losses, and the losses of peers that it gives it to."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from common import plain

import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor

import detseg_losses


def logits_of(device: torch.device, *shape: int) -> Tensor:
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(shape, device=device, generator=generator)
    return x.mul_(2).requires_grad_()


def labels_of(device: torch.device, classes: int, *shape: int) -> Tensor:
    generator = torch.Generator(device).manual_seed(1)
    return torch.randint(0, classes, shape, device=device, generator=generator)


def boxes_of(device: torch.device, count: int) -> tuple[Tensor, Tensor]:
    """Predicted boxes, and true ones that most of them overlap."""
    generator = torch.Generator(device).manual_seed(0)
    low, sides, moves = torch.rand(3, count, 4, device=device, generator=generator)
    corner = low[:, :2] * 100
    boxes = torch.cat((corner, corner + 1 + sides[:, :2] * 50), 1)
    return boxes.requires_grad_(), boxes.detach() + torch.cat((moves[:, :2], 1 + moves[:, 2:]), 1)


def anchor_labels(device: torch.device, anchors: int, classes: int, positives: int) -> Tensor:
    """Class indices, -1 for background."""
    labels = torch.full((anchors,), -1, device=device)
    step = anchors // positives
    labels[: step * positives : step] = labels_of(device, classes, positives)
    return labels


def masks(device: torch.device, *shape: int) -> tuple[Tensor, Tensor]:
    """Logits, and class indices, or of one channel 0 and 1."""
    x = logits_of(device, *shape)
    if shape[1] == 1:
        return x, labels_of(device, 2, *shape).float()
    return x, labels_of(device, shape[1], shape[0], *shape[2:])


def torchvision_focal(x: Tensor, labels: Tensor) -> Tensor:
    """The loss with the one-hot target that torchvision's RetinaNet makes."""
    target = torch.zeros_like(x)
    foreground = labels >= 0
    target[foreground, labels[foreground]] = 1.0
    return torchvision.ops.sigmoid_focal_loss(x, target, reduction="sum")


def sum_of(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return partial(loss, reduction="sum")


def mean_of(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return partial(loss, reduction="mean")


OUR_FOCAL = sum_of(detseg_losses.sigmoid_focal_loss)
OUR_BOXES = {
    "giou": sum_of(detseg_losses.generalized_box_iou_loss),
    "ciou": sum_of(detseg_losses.complete_box_iou_loss),
}
THEIR_BOXES = {
    "giou": sum_of(torchvision.ops.generalized_box_iou_loss),
    "ciou": sum_of(torchvision.ops.complete_box_iou_loss),
}
PLAIN_BOXES = {"giou": plain.giou, "ciou": plain.ciou}


def smp_ce_dice() -> Callable[[Tensor, Tensor], Tensor]:
    dice = smp.losses.DiceLoss("multiclass")
    return lambda x, y: F.cross_entropy(x, y) + dice(x, y)


def smp_bce_dice() -> Callable[[Tensor, Tensor], Tensor]:
    bce, dice = smp.losses.SoftBCEWithLogitsLoss(), smp.losses.DiceLoss("binary")
    return lambda x, y: bce(x, y) + dice(x, y)
