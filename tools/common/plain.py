"""The losses as a user would write them, in a few lines of PyTorch: what ours must beat.

They are right for ordinary inputs. Nothing is ignored, no class is absent, no box is inverted.
"""

from __future__ import annotations

from math import pi

import torch
import torch.nn.functional as F
from torch import Tensor


def focal(x: Tensor, target: Tensor) -> Tensor:
    """The sum of the sigmoid focal loss; the target is a class index, -1 for background, or values
    of the shape of the logits.
    """
    return focal_values(x, target).sum()


def focal_values(x: Tensor, target: Tensor) -> Tensor:
    y = target if target.is_floating_point() else one_hot(target + 1, x.shape[-1] + 1)[..., 1:]
    p = x.sigmoid()
    p_t = p * y + (1 - p) * (1 - y)
    alpha_t = 0.25 * y + 0.75 * (1 - y)
    ce = F.binary_cross_entropy_with_logits(x, y, reduction="none")
    return alpha_t * (1 - p_t) ** 2 * ce


def one_hot(labels: Tensor, classes: int) -> Tensor:
    return F.one_hot(labels, classes).float()


def ce_dice(x: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(x, target) + dice(x, target)


def dice(x: Tensor, target: Tensor) -> Tensor:
    p, y = x.softmax(1), one_hot(target, x.shape[1]).movedim(-1, 1)
    places = (0, *range(2, x.dim()))
    return (1 - 2 * (p * y).sum(places) / (p + y).sum(places)).mean()


def bce_dice(x: Tensor, y: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(x, y) + binary_dice(x, y)


def binary_dice(x: Tensor, y: Tensor) -> Tensor:
    p = x.sigmoid()
    return 1 - 2 * (p * y).sum() / (p + y).sum()


def giou(a: Tensor, b: Tensor) -> Tensor:
    """The sum of the losses of boxes ``(N, 4)``."""
    inner, union = _overlap(a, b)
    hull = _sides(a, b).prod(-1)
    return (1 - inner / union + (hull - union) / hull).sum()


def ciou(a: Tensor, b: Tensor) -> Tensor:
    """The sum of the losses of boxes ``(N, 4)``."""
    inner, union = _overlap(a, b)
    iou = inner / union
    apart = ((a[:, :2] + a[:, 2:] - b[:, :2] - b[:, 2:]) / 2).square().sum(-1)
    diagonal = _sides(a, b).square().sum(-1)
    (aw, ah), (bw, bh) = ((c[:, 2:] - c[:, :2]).unbind(-1) for c in (a, b))
    v = 4 / pi**2 * (torch.atan(bw / bh) - torch.atan(aw / ah)).square()
    with torch.no_grad():
        alpha = v / (1 - iou + v)
    return (1 - iou + apart / diagonal + alpha * v).sum()


def _overlap(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The areas of the intersections and the unions."""
    low, high = torch.maximum(a[:, :2], b[:, :2]), torch.minimum(a[:, 2:], b[:, 2:])
    inner = (high - low).clamp(min=0).prod(-1)
    areas = [(c[:, 2:] - c[:, :2]).prod(-1) for c in (a, b)]
    return inner, areas[0] + areas[1] - inner


def _sides(a: Tensor, b: Tensor) -> Tensor:
    """Width and height of the smallest boxes that hold both."""
    return torch.maximum(a[:, 2:], b[:, 2:]) - torch.minimum(a[:, :2], b[:, :2])


def retinanet(
    logits: Tensor,
    offsets: Tensor,
    targets: list[dict[str, Tensor]],
    anchors: list[Tensor],
    matched: list[Tensor],
) -> Tensor:
    """The focal loss and the absolute error of the offsets, as torchvision's RetinaNet has them."""
    losses = []
    for index, which in enumerate(matched):
        found, boxes = (which >= 0).unsqueeze(1), targets[index]["boxes"][which.clamp(min=0)]
        labels = targets[index]["labels"][which.clamp(min=0)].where(found.squeeze(1), -1)
        values = focal_values(logits[index], labels) * (which != -2).unsqueeze(1)
        (x, size), (anchor_x, anchor_size) = (
            ((c[:, :2] + c[:, 2:]) / 2, c[:, 2:] - c[:, :2]) for c in (boxes, anchors[index])
        )
        wanted = torch.cat(((x - anchor_x) / anchor_size, (size / anchor_size).log()), 1)
        errors = (offsets[index] - wanted).abs().where(found, 0)
        losses.append((values.sum() + errors.sum()) / found.sum().clamp(min=1))
    return torch.stack(losses).mean()
