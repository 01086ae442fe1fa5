"""The boundary loss, and the distance maps that it weighs the probabilities with."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import Unpack

from .base import BLOCK, Loss, divide, in_blocks, register
from .layout import check_constant
from .regions import RegionOptions, Regions, _region_loss, region_batch
from .statistics import weighted_counts


def boundary_loss(
    logits: Tensor,
    target: Tensor,
    *,
    distance: Tensor | None = None,
    **options: Unpack[RegionOptions],
) -> Tensor:
    r"""The mean over the pixels of the probability times the signed distance to the boundary of
    each class (Kervadec et al., arXiv:1812.07032).

    .. math:: \frac{1}{P} \sum_i p_i\, \phi_i

    with :math:`\phi` negative inside the class. What is predicted far from where it should be
    costs most. For classes that are small beside the background, to be added to a region loss with
    a small weight that may grow, ``dice + 0.01*boundary``: alone it may settle on nothing at all.
    The least value is negative.

    Args:
        logits: raw scores, ``(B, C, *)``.
        target: class indices ``(B, *)``, or values of the logits' shape, which are rounded.
        distance: the signed distances in pixels, of the logits' shape, where a data loader has
            computed them with :func:`signed_distance`; else they are computed here, in a time that
            grows as the number of pixels times the sides of the image.
        **options: see :class:`~detseg_losses.regions.RegionOptions`.

    Raises:
        ValueError: on a distance that does not fit the logits or requires grad, shapes that do not
            fit, a mode that cannot be told, or a label out of range.
    """
    batch = region_batch(logits, target, options)
    if distance is None:
        masks = batch.masks()
        others = ~masks if batch.weight is None else ~masks & (batch.weight != 0)
        distance = _signed(batch.spatial(masks), batch.spatial(others), batch.dtype)
    elif distance.shape != logits.shape:
        raise ValueError(
            f"distance {tuple(distance.shape)} does not fit logits {tuple(logits.shape)}"
        )
    check_constant("distance", distance)
    r = Regions(weighted_counts(batch, distance.reshape(batch.logits.shape)), **options)
    return r.reduce(divide(r.tp, r.valid))


def signed_distance(
    target: Tensor, classes: int | None = None, *, ignore_index: int | None = None
) -> Tensor:
    """The exact Euclidean distance of each pixel to the boundary of each class, in pixels.

    A pixel outside is as far as the nearest pixel inside; a pixel inside as far below 1 as the
    nearest outside, so that the outermost pixels of a class have about 0. It is 0 everywhere where
    an image has no pixel of the class, or no other. A pixel that is ignored is neither inside nor
    outside of any class.

    Args:
        target: class indices, ``(B, *)``; or with ``classes=None`` masks, ``(B, C, *)``.
        classes: the number of classes.
        ignore_index: label of the pixels that are ignored.

    Returns:
        ``(B, C, *)``, float32.
    """
    target = target.long() if target.dtype != torch.bool else target
    kept = None if ignore_index is None else target != ignore_index
    if classes is None:
        inside = target > 0 if kept is None else (target > 0) & kept
    else:
        inside = torch.stack([target == c for c in range(classes)], 1)
        if kept is not None:
            kept = kept.unsqueeze(1)
            inside = inside & kept
    return _signed(inside, ~inside if kept is None else ~inside & kept, torch.float32)


def _signed(inside: Tensor, outside: Tensor, dtype: torch.dtype) -> Tensor:
    """The signed distance from masks ``(B, C, *)``."""
    to_inside, to_outside = (_distance(mask, dtype) for mask in (inside, outside))
    signed = torch.where(inside, 1 - to_outside, to_inside)
    return signed.masked_fill((to_inside + to_outside).isinf(), 0)


def _distance(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance of each place of ``(B, C, *)`` to the nearest that the mask holds, or inf.

    The square of it is a minimum along one dimension after the other.
    """
    square = torch.where(mask, 0, torch.inf).to(dtype)
    if not mask.numel():
        return square
    # As many places at a time as caches hold; elsewhere, and in a graph, few large steps.
    step = max(1, (4 if in_blocks(mask) else 256) * BLOCK // mask.numel())
    for dim in range(2, mask.dim()):
        lines = square.movedim(dim, 0).contiguous()
        place = torch.arange(len(lines), dtype=dtype, device=mask.device)
        gaps = (place.unsqueeze(1) - place).square()
        gaps = gaps.view(*gaps.shape, *[1] * (mask.dim() - 1))
        nearest = [(lines.unsqueeze(1) + gap).amin(0) for gap in gaps.split(step, 1)]
        square = torch.cat(nearest).movedim(0, dim)
    return square.sqrt()


@register("boundary", "segmentation")
class BoundaryLoss(Loss):
    """Module form of :func:`boundary_loss`."""

    function = staticmethod(boundary_loss)
    common = staticmethod(_region_loss)
    extra = ("distance",)
