"""Independent float64 references: the papers' formulas in loops over images, classes and boxes.

They take what the losses take, in float64, and share nothing with them: targets are made one-hot,
autograd does the derivatives.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def value_and_grad(function: Callable[..., Tensor], x: Tensor, *args: Any, **options: Any) -> Any:
    """The (summed) loss of ``x`` and its gradient."""
    x = x.detach().requires_grad_()
    value = function(x, *args, **options)
    (grad,) = torch.autograd.grad(value.sum(), x)
    return value.detach(), grad


def one_hot(x: Tensor, target: Tensor, ignore_index: int | None = None) -> tuple[Tensor, Tensor]:
    """Labels ``(B, *)`` as 0s and 1s ``(B, C, *)``, and which pixels count, ``(B, 1, *)``."""
    target = target.reshape(x.shape[0], *x.shape[2:]).long()
    keep = torch.ones_like(target) if ignore_index is None else (target != ignore_index).long()
    y = torch.stack([target == c for c in range(x.shape[1])], dim=1)
    return y.to(x.dtype), keep.unsqueeze(1).to(x.dtype)


def targets_of(
    x: Tensor, target: Tensor, mode: str, ignore_index: int | None
) -> tuple[Tensor, Tensor]:
    """The target and which entries count, both of the shape of ``x``."""
    if mode == "multiclass" and target.shape != x.shape:
        y, keep = one_hot(x, target, ignore_index)
        return y, keep.expand_as(y)
    y = target.reshape(x.shape).to(x.dtype)
    keep = torch.ones_like(y) if ignore_index is None else (y != ignore_index).to(x.dtype)
    return torch.where(keep > 0, y, 0), keep


def bce(x: Tensor, y: Tensor, pos_weight: Tensor | float = 1.0) -> Tensor:
    """Of each entry; ``pos_weight`` broadcasts."""
    return -pos_weight * y * F.logsigmoid(x) - (1 - y) * F.logsigmoid(-x)


def focal(x: Tensor, y: Tensor, alpha: Tensor | float | None = 0.25, gamma: float = 2) -> Tensor:
    """Of each entry; ``alpha`` broadcasts."""
    one_minus_pt = y * torch.sigmoid(-x) + (1 - y) * torch.sigmoid(x)
    loss = one_minus_pt**gamma * bce(x, y)
    return loss if alpha is None else loss * (alpha * y + (1 - alpha) * (1 - y))


def quality_focal(x: Tensor, y: Tensor, beta: float = 2) -> Tensor:
    return (y - x.sigmoid()).abs() ** beta * bce(x, y)


def varifocal(x: Tensor, y: Tensor, alpha: float = 0.75, gamma: float = 2) -> Tensor:
    positive = (y > 0).to(x.dtype)
    return bce(x, y) * (positive * y + (1 - positive) * alpha * x.sigmoid() ** gamma)


def asymmetric(
    x: Tensor, y: Tensor, gamma_neg: float = 4, gamma_pos: float = 0, margin: float = 0.05
) -> Tensor:
    p = x.sigmoid()
    shifted = torch.where(p > margin, p - margin, 0)
    positive = (1 - p) ** gamma_pos * F.logsigmoid(x)
    negative = shifted**gamma_neg * torch.log1p(-shifted)
    return -(y * positive + (1 - y) * negative)


def poly_focal(
    x: Tensor, y: Tensor, epsilon: float = 1, alpha: Tensor | float | None = 0.25, gamma: float = 2
) -> Tensor:
    one_minus_pt = y * torch.sigmoid(-x) + (1 - y) * torch.sigmoid(x)
    rest = epsilon * one_minus_pt ** (gamma + 1)
    if alpha is not None:
        rest = rest * (alpha * y + (1 - alpha) * (1 - y))
    return focal(x, y, alpha, gamma) + rest


def ghm(x: Tensor, y: Tensor, weight: Tensor, bins: int = 30) -> Tensor:
    """Of each entry, times its weight; entry after entry."""
    sizes = (x.detach().sigmoid() - y).abs().flatten().tolist()
    where = [min(int(size * bins), bins - 1) for size in sizes]
    held = [0.0] * bins
    for place, w in zip(where, weight.flatten().tolist(), strict=True):
        held[place] += w
    filled = sum(count > 0 for count in held)
    each = [sum(held) / (filled * held[place]) if held[place] else 0.0 for place in where]
    return torch.tensor(each, dtype=x.dtype).reshape(x.shape) * bce(x, y) * weight


def likelihood(
    formula: Callable[[Any], Any],
    x: Tensor,
    target: Tensor,
    *,
    alpha: list[float] | None = None,
    fraction: float = 1.0,
    thresh: float | None = None,
    ignore_index: int | None = None,
    class_weights: list[float] | None = None,
    pixel_weight: Tensor | None = None,
    per_image: bool = False,
) -> Tensor:
    """The mean of ``formula(p_t)`` over the pixels; of the hardest ``fraction`` where below 1."""
    target = target.reshape(x.shape[0], *x.shape[2:])
    images: list[list[tuple[Any, Any, Any]]] = []
    for b in range(x.shape[0]):
        found = []
        for i, label in enumerate(target[b].flatten().tolist()):
            w = 1.0 if pixel_weight is None else float(pixel_weight[b].flatten()[i])
            if label == ignore_index or w == 0:
                continue
            p = x[b].reshape(x.shape[1], -1)[:, i].softmax(0)[label]
            w = w if class_weights is None else w * class_weights[label]
            found.append((p, w, w if alpha is None else w * alpha[label]))
        images.append(found)
    groups = images if per_image else [[pixel for found in images for pixel in found]]
    means = []
    for group in groups:
        number = math.ceil(fraction * target.numel() / len(groups))
        hardest = sorted(group, key=lambda pixel: float(pixel[0].detach()))
        kept = [
            pixel
            for rank, pixel in enumerate(hardest)
            if rank < number or (thresh is not None and pixel[0] < thresh)
        ]
        total = sum(factor * formula(p) for p, _, factor in kept)
        means.append(total / sum(w for _, w, _ in kept) if kept else x.sum() * 0)
    return torch.stack(means).mean()


def cross_entropy(
    x: Tensor,
    target: Tensor,
    *,
    label_smoothing: float = 0.0,
    gamma: float = 0.0,
    ignore_index: int | None = None,
    class_weights: list[float] | None = None,
    pixel_weight: Tensor | None = None,
    per_image: bool = False,
    reduction: str = "mean",
) -> Tensor:
    """Softmax cross entropy, or with ``gamma`` softmax focal loss; pixel after pixel."""
    classes = x.shape[1]
    dense = target.shape == x.shape
    y, keep = targets_of(x, target, "multiclass", ignore_index)
    factors = [1.0] * classes if class_weights is None else class_weights
    scores = x.reshape(x.shape[0], classes, -1)
    y, keep = y.reshape(scores.shape), keep.reshape(scores.shape)
    weight = torch.ones(scores.shape[0], scores.shape[2]) if pixel_weight is None else pixel_weight
    weight = weight.reshape(scores.shape[0], -1)
    losses, counts = [], []
    for b in range(scores.shape[0]):
        for i in range(scores.shape[2]):
            w = weight[b, i] * keep[b, 0, i]
            if w == 0:
                losses.append(torch.zeros((), dtype=x.dtype))
                counts.append(torch.zeros(()))
                continue
            logp = scores[b, :, i] - scores[b, :, i].logsumexp(0)
            loss: Any = 0.0
            for c in range(classes):
                share = (1 - label_smoothing) * y[b, c, i] + label_smoothing / classes
                power = (1 - logp[c].exp()) ** gamma if gamma else 1
                loss = loss - factors[c] * share * power * logp[c]
            losses.append(w * loss)
            mass = 1.0 if dense else sum(factors[c] * y[b, c, i] for c in range(classes))
            counts.append(torch.as_tensor(w * mass))
    loss = torch.stack(losses).reshape(scores.shape[0], -1)
    count = torch.stack(counts).reshape(loss.shape).to(x.dtype)
    if reduction == "none":
        return loss.reshape(x.shape[0], *x.shape[2:])
    if reduction == "sum":
        return loss.sum()
    if per_image:
        means = [loss[b].sum() / count[b].sum() if count[b].sum() else 0 for b in range(len(loss))]
        return torch.as_tensor(sum(means)) / len(means)
    return loss.sum() / count.sum()


def region(
    formula: Callable[..., Any],
    x: Tensor,
    target: Tensor,
    *,
    mode: str = "multiclass",
    ignore_index: int | None = None,
    class_weights: list[float] | None = None,
    pixel_weight: Tensor | None = None,
    per_image: bool = False,
    absent: str = "skip",
    reduction: str = "mean",
) -> Tensor:
    """``formula(tp, fp, fn, tn, squares)`` of each class, and their mean (over images, too)."""
    p = x.softmax(1) if mode == "multiclass" else x.sigmoid()
    y, w = targets_of(x, target, mode, ignore_index)
    if pixel_weight is not None:
        w = w * pixel_weight.reshape(x.shape[0], 1, *x.shape[2:])
    groups = [[b] for b in range(len(x))] if per_image else [list(range(len(x)))]
    rows, means = [], []
    for images in groups:
        losses, weights = [], []
        for c in range(x.shape[1]):
            tp = fp = fn = tn = true = total = squares = torch.zeros((), dtype=x.dtype)
            for b in images:
                tp = tp + (w[b, c] * p[b, c] * y[b, c]).sum()
                fp = fp + (w[b, c] * p[b, c] * (1 - y[b, c])).sum()
                fn = fn + (w[b, c] * (1 - p[b, c]) * y[b, c]).sum()
                tn = tn + (w[b, c] * (1 - p[b, c]) * (1 - y[b, c])).sum()
                squares = squares + (w[b, c] * (p[b, c] ** 2 + y[b, c] ** 2)).sum()
                true = true + (w[b, c] * y[b, c]).sum()
                total = total + w[b, c].sum()
            weight = 1.0 if class_weights is None else class_weights[c]
            if true > 0:
                losses.append(formula(tp, fp, fn, tn, squares))
            elif absent == "penalise":
                losses.append(fp / total)
            else:
                losses.append(torch.zeros((), dtype=x.dtype))
                weight = 0.0
            weights.append(weight)
        weighted = torch.stack([w * loss for w, loss in zip(weights, losses, strict=True)])
        rows.append(weighted)
        means.append(weighted.sum() / sum(weights) if sum(weights) else weighted.sum())
    if reduction == "none":
        return torch.stack(rows) if per_image else rows[0]
    if reduction == "sum":
        return torch.stack(rows).sum()
    return torch.stack(means).mean()


def dice(smooth: float = 0.0) -> Callable[..., Any]:
    return lambda tp, fp, fn, *_: 1 - (2 * tp + smooth) / (2 * tp + fp + fn + smooth)


def jaccard(smooth: float = 0.0) -> Callable[..., Any]:
    return lambda tp, fp, fn, *_: 1 - (tp + smooth) / (tp + fp + fn + smooth)


def tversky(
    alpha: float = 0.5, beta: float = 0.5, gamma: float = 1.0, smooth: float = 0.0
) -> Callable[..., Any]:
    return lambda tp, fp, fn, *_: (
        (1 - (tp + smooth) / (tp + alpha * fp + beta * fn + smooth)) ** gamma
    )


def squared_dice(smooth: float = 0.0) -> Callable[..., Any]:
    return lambda tp, fp, fn, tn, squares: 1 - (2 * tp + smooth) / (squares + smooth)


def log_cosh_dice(smooth: float = 0.0) -> Callable[..., Any]:
    return lambda *counts: dice(smooth)(*counts).cosh().log()


def f1(beta: float = 1.0) -> Callable[..., Any]:
    """From precision and recall."""

    def formula(tp: Any, fp: Any, fn: Any, *_: Any) -> Any:
        precision, recall = tp / (tp + fp), tp / (tp + fn)
        return 1 - (1 + beta**2) * precision * recall / (beta**2 * precision + recall)

    return formula


def mcc(smooth: float = 1e-5) -> Callable[..., Any]:
    """By way of the correlation's other form, of informedness and markedness."""

    def formula(tp: Any, fp: Any, fn: Any, tn: Any, _: Any) -> Any:
        tp, fp, fn, tn = (count + smooth for count in (tp, fp, fn, tn))
        informedness = tp / (tp + fn) + tn / (tn + fp) - 1
        markedness = tp / (tp + fp) + tn / (tn + fn) - 1
        return 1 - informedness.sign() * (informedness * markedness).sqrt()

    return formula


def generalised_dice(
    x: Tensor,
    target: Tensor,
    *,
    mode: str = "multiclass",
    ignore_index: int | None = None,
    class_weights: list[float] | None = None,
    pixel_weight: Tensor | None = None,
) -> Tensor:
    p = x.softmax(1) if mode == "multiclass" else x.sigmoid()
    y, w = targets_of(x, target, mode, ignore_index)
    if pixel_weight is not None:
        w = w * pixel_weight.reshape(x.shape[0], 1, *x.shape[2:])
    hits: Any = 0.0
    area: Any = 0.0
    for c in range(x.shape[1]):
        true = (w[:, c] * y[:, c]).sum()
        if true > 0:
            weight = (1.0 if class_weights is None else class_weights[c]) / true**2
            hits = hits + weight * (w[:, c] * p[:, c] * y[:, c]).sum()
            area = area + weight * (w[:, c] * (p[:, c] + y[:, c])).sum()
    return 1 - 2 * hits / area


def lovasz(errors: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """Of one class, ``(P,)``: the area under the Jaccard loss of the pixels with errors above t.

    The Lovász extension as an integral over thresholds, in place of the sum over sorted errors.
    """

    def jaccard_loss(wrong: Tensor) -> Tensor:
        inter = (weight * y * ~wrong).sum()
        union = (weight * y).sum() + (weight * (1 - y) * wrong).sum()
        return 1 - inter / union

    total: Any = 0.0
    below: Any = 0.0
    for threshold in errors[errors > 0]:
        higher = errors >= threshold.detach()
        lower = errors[(errors > 0) & (errors < threshold.detach())]
        below = lower.max() if len(lower) else 0.0
        total = total + (threshold - below) * jaccard_loss(higher)
    return torch.as_tensor(total)


def signed_distance(inside: Tensor, outside: Tensor) -> Tensor:
    """Of one mask ``(*)``, from every pixel to every other."""
    result = torch.zeros(inside.shape, dtype=torch.float64)
    if inside.any() and outside.any():
        for place in torch.cartesian_prod(*(torch.arange(n) for n in inside.shape)).reshape(
            -1, inside.dim()
        ):
            within = inside[tuple(place)]
            others = (outside if within else inside).nonzero()
            distance = (others - place).double().norm(dim=1).min()
            result[tuple(place)] = 1 - distance if within else distance
    return result


def skeleton(mask: Tensor, iterations: int) -> Tensor:
    """Of masks ``(B, C, H, W)`` or ``(B, C, D, H, W)``, by pooling as in the paper."""
    rank = mask.dim() - 2
    pooling: Any = F.max_pool2d if rank == 2 else F.max_pool3d

    def erode(mask: Tensor) -> Tensor:
        least = mask
        for dim in range(rank):
            kernel = [3 if d == dim else 1 for d in range(rank)]
            padding = [k // 2 for k in kernel]
            least = torch.minimum(least, -pooling(-mask, kernel, stride=1, padding=padding))
        return least

    def lost(mask: Tensor) -> Tensor:
        return (mask - pooling(erode(mask), 3, stride=1, padding=1)).relu()

    result = lost(mask)
    for _ in range(iterations):
        mask = erode(mask)
        result = result + (lost(mask) - result * lost(mask)).relu()
    return result


def boxes(kind: str, a: Tensor, b: Tensor, **options: float) -> Tensor:
    """A loss of the IoU family for proper boxes ``(N, 4)``, pair after pair."""
    losses = []
    for p, t in zip(a, b, strict=True):
        width = torch.minimum(p[2], t[2]) - torch.maximum(p[0], t[0])
        height = torch.minimum(p[3], t[3]) - torch.maximum(p[1], t[1])
        inter = width * height if width > 0 and height > 0 else 0 * width
        w, h, true_w, true_h = p[2] - p[0], p[3] - p[1], t[2] - t[0], t[3] - t[1]
        union = w * h + true_w * true_h - inter
        iou = inter / union
        hull_w = torch.maximum(p[2], t[2]) - torch.minimum(p[0], t[0])
        hull_h = torch.maximum(p[3], t[3]) - torch.minimum(p[1], t[1])
        dx, dy = (p[0] + p[2] - t[0] - t[2]) / 2, (p[1] + p[3] - t[1] - t[3]) / 2
        diagonal = hull_w**2 + hull_h**2
        loss = 1 - iou
        if kind == "giou":
            loss = loss + 1 - union / (hull_w * hull_h)
        if kind in ("diou", "ciou", "eiou", "focal_eiou"):
            loss = loss + (dx**2 + dy**2) / diagonal
        if kind == "ciou":
            angle = (true_w / true_h).atan() - (w / h).atan()
            v = 4 / math.pi**2 * angle**2
            if v > 0:
                loss = loss + (v / (1 - iou + v)).detach() * v
        if kind in ("eiou", "focal_eiou"):
            loss = loss + (w - true_w) ** 2 / hull_w**2 + (h - true_h) ** 2 / hull_h**2
        if kind == "focal_eiou":
            loss = iou.item() ** options.get("gamma", 0.5) * loss
        if kind == "siou":
            alpha = torch.asin(dy.abs() / (dx**2 + dy**2) ** 0.5)
            gamma = 2 - (1 - 2 * torch.sin(alpha - math.pi / 4) ** 2)
            distance = 2 - (-gamma * (dx / hull_w) ** 2).exp() - (-gamma * (dy / hull_h) ** 2).exp()
            omega_w = (w - true_w).abs() / torch.maximum(w, true_w)
            omega_h = (h - true_h).abs() / torch.maximum(h, true_h)
            theta = options.get("theta", 4)
            shape = (1 - (-omega_w).exp()) ** theta + (1 - (-omega_h).exp()) ** theta
            loss = loss + (distance + shape) / 2
        if kind == "mpdiou":
            first = (p[0] - t[0]) ** 2 + (p[1] - t[1]) ** 2
            second = (p[2] - t[2]) ** 2 + (p[3] - t[3]) ** 2
            square = options["diagonal"] ** 2 if "diagonal" in options else diagonal
            loss = loss + first / square + second / square
        if kind == "wiou":
            if "mean" in options:
                beta = loss.item() / options["mean"]
                alpha, delta = options.get("alpha", 1.9), options.get("delta", 3)
                loss = loss * beta / (delta * alpha ** (beta - delta))
            loss = loss * ((dx**2 + dy**2) / diagonal.item()).exp()
        if kind == "alpha_iou":
            loss = 1 - iou ** options.get("alpha", 3)
        if kind == "nwd":
            square = dx**2 + dy**2 + ((w - true_w) / 2) ** 2 + ((h - true_h) / 2) ** 2
            loss = 1 - (-(square**0.5) / options.get("constant", 12.8)).exp()
        losses.append(loss)
    return torch.stack(losses)


def balanced_l1(x: Tensor, y: Tensor, alpha: float = 0.5, gamma: float = 1.5) -> Tensor:
    """The integral of its slope, ``alpha log(b d + 1)`` and from 1 on gamma, by Simpson's rule."""
    b = math.exp(gamma / alpha) - 1
    losses = []
    for d in (x - y).abs().flatten():
        end, steps = min(d.item(), 1.0), 2000
        slopes = [alpha * math.log(b * end * k / steps + 1) for k in range(steps + 1)]
        inner = slopes[0] + slopes[-1] + 4 * sum(slopes[1::2]) + 2 * sum(slopes[2:-1:2])
        losses.append(inner * end / steps / 3 + gamma * (d.item() - end))
    return torch.tensor(losses, dtype=x.dtype).reshape(x.shape)


def distribution_focal(x: Tensor, y: Tensor) -> Tensor:
    """Bins ``(N, bins)`` and targets ``(N,)`` in ``[0, bins - 1]``, number after number."""
    losses = []
    for scores, target in zip(x, y, strict=True):
        p = scores.exp() / scores.exp().sum()
        low = min(math.floor(target.item()), len(p) - 2)
        loss = (low + 1 - target) * p[low].log() + (target - low) * p[low + 1].log()
        losses.append(-loss)
    return torch.stack(losses)
