"""The centreline Dice loss, and the soft skeletons that it compares."""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor
from typing_extensions import Unpack

from detseg_losses._core.checks import checked
from detseg_losses._core.module import Loss, options_of, register
from detseg_losses._core.reduction import divide
from detseg_losses._engine.statistics import measure
from detseg_losses.losses.regions import RegionOptions, Regions, _region_loss, region_batch


@checked()
def cldice_loss(
    logits: Tensor,
    target: Tensor,
    *,
    iterations: int = 3,
    smooth: float = 0.0,
    **options: Unpack[RegionOptions],
) -> Tensor:
    r"""One minus the centreline Dice of each class (Shit et al., arXiv:2003.07311).

    .. math:: 1 - \frac{2\, T_p T_s}{T_p + T_s}, \quad
        T_p = \frac{\sum S(p)\, y + s}{\sum S(p) + s}, \quad
        T_s = \frac{\sum S(y)\, p + s}{\sum S(y) + s}

    where S is a soft skeleton: what is left of the mask after each of some erosions and would be
    lost in the next opening. For vessels, roads and cracks, where a gap costs more than a width:
    ``0.5*dice + 0.5*cldice`` is the paper's loss. What is ignored is of no class in both skeletons.

    Args:
        logits: raw scores, ``(B, C, *)``, in one, two or three dimensions.
        target: class indices ``(B, *)``, or values of the logits' shape, which are rounded.
        iterations: how many erosions; no less than the largest radius of what is to be found, in
            pixels.
        smooth: the s added to both.
        **options: see :class:`~detseg_losses.losses.regions.RegionOptions`.

    Raises:
        ValueError: on iterations below 0, shapes that do not fit, a mode that cannot be told, or a
            label out of range.

    Examples:
        >>> road = torch.zeros(1, 1, 5, 9, dtype=torch.long)
        >>> road[..., 1:4, :] = 1
        >>> gap, thin = (16.0 * road - 8 for _ in range(2))
        >>> gap[..., 4], thin[..., 1, :5] = -8.0, -8.0
        >>> cldice_loss(gap, road)  # three pixels are missing, and the road is cut
        tensor(0.0590)
        >>> cldice_loss(thin, road)  # five are, and it is thinner
        tensor(0.0002)
    """
    batch = region_batch(logits, target, options)
    batch.target = batch.masks()
    x, y = batch.guarded(), batch.target.to(batch.dtype)
    p = x.softmax(1) if batch.mode == "multiclass" else x.sigmoid()
    p = p if batch.weight is None else p.masked_fill(batch.weight == 0, 0)
    ours, theirs = (skeleton(batch.spatial(mask), iterations).reshape(p.shape) for mask in (p, y))
    sums = (ours * y, ours, theirs * p, theirs)
    r = Regions(measure(batch, ["regions"]), **options)
    counts = torch.stack([batch.weighted(values).sum(-1) for values in sums])
    both, found, hit, true = r.pool(counts) + smooth
    precision, recall = divide(both, found), divide(hit, true)
    return r.reduce(1 - divide(2 * precision * recall, precision + recall))


def skeleton(mask: Tensor, iterations: int) -> Tensor:
    """The soft skeleton of masks ``(B, C, *)`` with values in [0, 1]."""
    result = _lost(mask)
    # After as many steps as the image has, from corner to corner, nothing is left to erode.
    for _ in range(min(iterations, sum(mask.shape[2:]))):
        mask = _eroded(mask)
        lost = _lost(mask)
        result = result + lost - result * lost
    return result


def _lost(mask: Tensor) -> Tensor:
    """What an opening takes away."""
    return (mask - _dilated(_eroded(mask))).relu()


def _eroded(mask: Tensor) -> Tensor:
    """The least of each place and its neighbours along the dimensions."""
    along = [-_widened(-mask, dim) for dim in range(2, mask.dim())]
    return reduce(torch.minimum, along, mask)


def _dilated(mask: Tensor) -> Tensor:
    """The largest of each place and all its neighbours."""
    return reduce(_widened, range(2, mask.dim()), mask)


def _widened(mask: Tensor, dim: int) -> Tensor:
    """The largest of each place and its two neighbours along a dimension."""
    length = mask.shape[dim]
    if length < 2:
        return mask
    pairs = torch.maximum(mask.narrow(dim, 0, length - 1), mask.narrow(dim, 1, length - 1))
    first, last = pairs.narrow(dim, 0, 1), pairs.narrow(dim, length - 2, 1)
    pairs = torch.cat((first, pairs, last), dim)
    return torch.maximum(pairs.narrow(dim, 0, length), pairs.narrow(dim, 1, length))


@register("cldice", "segmentation")
class CLDiceLoss(Loss):
    common = staticmethod(_region_loss)

    @options_of(cldice_loss)
    def __init__(self) -> None:
        """Module form of :func:`cldice_loss`."""
