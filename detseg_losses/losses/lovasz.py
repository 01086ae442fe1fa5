"""The Lovász losses: convex surrogates of the Jaccard index, of errors in the order of their size.

The losses are linear in the errors once these are sorted, so the factors of the errors are found
without a graph, and one pass over the logits does the rest.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from detseg_losses._core.batch import Batch
from detseg_losses._core.checks import checked
from detseg_losses._core.distribution import gather
from detseg_losses._core.module import Loss, options_of, register
from detseg_losses._core.reduction import divide
from detseg_losses._engine.sigmoid import Formula, Label, SigmoidWants, sigmoid_statistics
from detseg_losses._engine.statistics import measure, weighted_counts
from detseg_losses.losses.regions import RegionOptions, Regions, _region_loss, region_batch


@checked()
def lovasz_loss(
    logits: Tensor,
    target: Tensor,
    **options: Unpack[RegionOptions],
) -> Tensor:
    r"""The Lovász extension of the Jaccard loss of each class (Berman et al., arXiv:1705.08790).

    .. math:: \sum_i m_{\pi_i} \left(J(\{\pi_1 \dots \pi_i\}) - J(\{\pi_1 \dots \pi_{i-1}\})\right)

    where :math:`\pi` sorts the errors m from large to small, and J is the Jaccard loss when the
    pixels of a set, and no others, are wrong. The errors are :math:`|y - p|` of a softmax over
    classes (Lovász-Softmax), and :math:`\max(0, 1 - x (2 y - 1))` of binary and multilabel logits
    (Lovász hinge). For the last points of mean IoU, after or beside a pixel loss. The Jaccard index
    of ``pixel_weight`` counts each pixel as often as its weight says. With ``sync``, and without
    ``per_image``, each process sorts the errors of all.

    Args:
        logits: raw scores, ``(B, C, *)``.
        target: class indices ``(B, *)``, or values of the logits' shape, which are rounded.
        **options: see :class:`~detseg_losses.losses.regions.RegionOptions`.

    Raises:
        ValueError: on shapes that do not fit, a mode that cannot be told, or a label out of range.

    Examples:
        >>> target = torch.tensor([[[0, 0, 1, 1]]])  # one image of one row
        >>> logits = torch.tensor([[[[-3.0, -3.0, 3.0, -3.0]]]])  # half of the object is missing
        >>> lovasz_loss(logits, target)
        tensor(2.)
    """
    batch = region_batch(logits, target, options)
    y = batch.masks()
    batch = replace(batch, target=y)
    factor = _factors(batch, options.get("per_image", False), options.get("sync", False))
    sign = 1 - 2 * y.to(batch.dtype)
    if batch.mode == "multiclass":
        s = weighted_counts(batch, factor * sign)
        hits = factor * y
        loss = s.counts[1] + (hits if batch.weight is None else hits * batch.weight).sum(-1)
    else:
        s = measure(batch, ["regions"])
        weighted = replace(batch, target=-factor * sign)
        (loss,) = sigmoid_statistics(weighted, SigmoidWants(sums=(Hinge(),)))
    r = Regions(s, **options)
    return r.reduce(r.pool(loss))


@dataclass(frozen=True)
class Hinge(Formula):
    """The hinge loss of the sign of y, times the size of y."""

    def value(self, x: Tensor, y: Label) -> Tensor:
        size: Any = abs(y)
        return (size - x * y).relu()


@torch.no_grad()
def _factors(batch: Batch, per_image: bool, sync: bool) -> Tensor:
    """What a weighted pixel's error is multiplied with, ``(B, C, P)``."""
    x, y = batch.guarded(), batch.target.to(batch.dtype)
    errors = (y - x.softmax(1)).abs() if batch.mode == "multiclass" else 1 - x * (2 * y - 1)
    hits, misses = batch.weighted(y), batch.weighted(1 - y)
    if per_image:
        return jaccard_slopes(errors, hits, misses)
    images, _, places = errors.shape
    whole = torch.stack([values.transpose(0, 1).flatten(1) for values in (errors, hits, misses)])
    parts, own = gather(whole, sync)
    slopes = jaccard_slopes(*torch.cat(parts, -1)).split([part.shape[-1] for part in parts], -1)
    return slopes[own].unflatten(1, (images, places)).transpose(0, 1)


def jaccard_slopes(errors: Tensor, hits: Tensor, misses: Tensor) -> Tensor:
    """How fast the Jaccard loss grows with each pixel that turns wrong, of large errors first.

    It is the slope by the weight of the pixel.

    Args:
        errors: ``(*, N)``.
        hits: the weights of the pixels of the class, 0 of others, ``(*, N)``.
        misses: the weights of the other pixels, 0 of those of the class, ``(*, N)``.
    """
    order = errors.argsort(-1, descending=True)
    hits, misses = hits.gather(-1, order), misses.gather(-1, order)
    true = hits.sum(-1, keepdim=True)
    found = (true - hits.cumsum(-1)).clamp(min=0)  # rounding
    union = true + misses.cumsum(-1)
    # The difference of two ratios without the cancellation: a hit leaves the union as it is, and
    # a miss the intersection.
    slopes = divide(torch.where(hits > 0, 1, divide(found, union - misses)), union)
    return torch.empty_like(errors).scatter_(-1, order, slopes)


@register("lovasz", "segmentation")
class LovaszLoss(Loss):
    common = staticmethod(_region_loss)

    @options_of(lovasz_loss)
    def __init__(self) -> None:
        """Module form of :func:`lovasz_loss`."""
