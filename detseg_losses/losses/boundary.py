"""The boundary loss, and the distance maps that it weighs the probabilities with."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from typing_extensions import Unpack

from detseg_losses._core.blocks import BLOCK
from detseg_losses._core.checks import (
    RULES,
    check_constant,
    check_options,
    check_tensors,
    checked,
    in_blocks,
    read_target,
)
from detseg_losses._core.module import Loss, options_of, register
from detseg_losses._core.reduction import divide
from detseg_losses._engine.statistics import weighted_counts
from detseg_losses.losses.regions import RegionOptions, Regions, _region_loss, region_batch


@checked()
def boundary_loss(
    logits: Tensor,
    target: Tensor,
    *,
    distance: Tensor | None = None,
    spacing: Tensor | Sequence[float] | float = 1.0,
    **options: Unpack[RegionOptions],
) -> Tensor:
    r"""The mean of the probability times the signed distance to the boundary of each class.

    From Kervadec et al., arXiv:1812.07032, over the pixels:

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
        spacing: how far apart two pixels are, one length for each dimension or one for all;
            disregarded where the ``distance`` is given.
        **options: see :class:`~detseg_losses.losses.regions.RegionOptions`.

    Raises:
        ValueError: on a distance that does not fit the logits or requires grad, shapes that do not
            fit, a mode that cannot be told, or a label out of range.

    Examples:
        >>> target = torch.zeros(1, 1, 8, dtype=torch.long)
        >>> target[..., :3] = 1  # an object at the left
        >>> near, far = torch.full((2, 1, 1, 1, 8), -9.0)
        >>> near[..., 3], far[..., 7] = 9.0, 9.0  # one pixel is predicted
        >>> boundary_loss(near, target)
        tensor(0.1252)
        >>> boundary_loss(far, target)
        tensor(0.6250)
    """
    batch = region_batch(logits, target, options)
    if distance is None:
        masks = batch.masks()
        others = ~masks if batch.weight is None else ~masks & (batch.weight != 0)
        distance = _signed(batch.spatial(masks), batch.spatial(others), spacing, batch.dtype)
    else:
        check_tensors(distance=distance)
        if distance.shape != logits.shape:
            raise ValueError(
                f"distance {tuple(distance.shape)} does not fit logits {tuple(logits.shape)}"
            )
    check_constant("distance", distance)
    r = Regions(weighted_counts(batch, distance.reshape(batch.logits.shape)), **options)
    return r.reduce(divide(r.tp, r.valid))


def signed_distance(
    target: Tensor,
    classes: int | None = None,
    *,
    ignore_index: int | None = None,
    spacing: Tensor | Sequence[float] | float = 1.0,
) -> Tensor:
    """The exact Euclidean distance of each pixel to the boundary of each class.

    A pixel outside is as far as the nearest pixel inside; a pixel inside as far below the least
    spacing as the nearest outside, so that the outermost pixels of a class have about 0. It is 0
    everywhere where an image has no pixel of the class, or no other. A pixel that is ignored is
    neither inside nor outside of any class.

    Args:
        target: class indices, ``(B, *)``; or with ``classes=None`` masks, ``(B, C, *)``, whose
            values from 0 to 1 are rounded.
        classes: the number of classes.
        ignore_index: label of the pixels that are ignored.
        spacing: how far apart two pixels are, one length for each dimension of the image or one
            for all; such as ``(5, 1, 1)`` in mm where the slices of a scan are 5 mm apart.

    Returns:
        ``(B, C, *)``, float32, in the unit of the spacing; pixels without one.

    Raises:
        TypeError: on a target that is not a tensor.
        ValueError: on a label out of range, a mask with other values, a spacing that is not
            positive or has another number of dimensions.

    Examples:
        >>> signed_distance(torch.tensor([[0, 0, 1, 1, 1, 0]]), classes=2)
        tensor([[[-1.,  0.,  1.,  2.,  1.,  0.],
                 [ 2.,  1.,  0., -1.,  0.,  1.]]])
    """
    check_tensors(target=target)
    check_options({"ignore_index": ignore_index, "spacing": spacing}, RULES)
    labels = None if classes is None else range(classes)
    target, kept = read_target(target, labels, ignore_index)
    if classes is None:
        inside = target if target.dtype == torch.bool else target > 0.5
    else:
        each = torch.arange(classes, device=target.device).view(-1, *[1] * (target.dim() - 1))
        inside = target.unsqueeze(1) == each
        kept = None if kept is None else kept.unsqueeze(1)
    if kept is None:
        return _signed(inside, ~inside, spacing, torch.float32)
    return _signed(inside & kept, ~inside & kept, spacing, torch.float32)


def _signed(
    inside: Tensor, outside: Tensor, spacing: Tensor | Sequence[float] | float, dtype: torch.dtype
) -> Tensor:
    """The signed distance from masks ``(B, C, *)``."""
    lengths = torch.as_tensor(spacing, dtype=dtype, device=inside.device)
    dims = inside.dim() - 2
    if dims and lengths.dim() and len(lengths) != dims:
        raise ValueError(f"spacing {lengths.tolist()} does not fit an image of {dims} dimensions")
    if not dims:  # one place has no boundary
        return torch.zeros(inside.shape, dtype=dtype, device=inside.device)
    lengths = lengths.expand(dims)
    if in_blocks(inside) and inside.numel():
        result = torch.zeros(inside.shape, dtype=dtype)
        there = inside.flatten(2).any(-1) & outside.flatten(2).any(-1)
        for image, c in there.nonzero().tolist():  # the classes that have a boundary
            one = image, slice(c, c + 1)
            result[one] = _signed_by(_distance, inside[one], outside[one], lengths)
        return result
    return _signed_by(_distance_in_few_steps, inside, outside, lengths)


def _signed_by(
    measure: Callable[[Tensor, Tensor], Tensor], inside: Tensor, outside: Tensor, lengths: Tensor
) -> Tensor:
    to_inside, to_outside = measure(inside, lengths), measure(outside, lengths)
    signed = torch.where(inside, lengths.amin() - to_outside, to_inside)
    return signed.masked_fill((to_inside + to_outside).isinf(), 0)


def _distance(mask: Tensor, lengths: Tensor) -> Tensor:
    """The distance of each place of ``(N, *)`` to the nearest that the mask holds, or inf.

    The square of it is a minimum along one dimension after the other, over places that are ever
    farther away, as long as one could be nearer than what was found.
    """
    square = torch.where(mask, 0, torch.inf).to(lengths.dtype)
    for dim, length in enumerate(lengths.tolist(), 1):
        lines = square.movedim(dim, 0).reshape(mask.shape[dim], -1)
        width = max(1, BLOCK // 8 // len(lines))  # of lines that caches hold with their minimum
        found = [_nearest(part.contiguous(), length) for part in lines.split(width, 1)]
        shape = square.movedim(dim, 0).shape
        square = torch.cat(found, 1).view(shape).movedim(0, dim)
    return square.sqrt()


def _nearest(lines: Tensor, length: float) -> Tensor:
    """The least ``lines[j] + ((i - j) * length) ** 2`` for each i, of lines ``(L, N)``."""
    nearest = lines.clone()
    scratch = torch.empty_like(lines)
    for step in range(1, len(lines)):
        far = (step * length) ** 2
        if far >= nearest.max():
            break
        for from_, to in ((lines[:-step], nearest[step:]), (lines[step:], nearest[:-step])):
            torch.minimum(to, torch.add(from_, far, out=scratch[step:]), out=to)
    return nearest


def _distance_in_few_steps(mask: Tensor, lengths: Tensor) -> Tensor:
    """The same of ``(B, C, *)`` in few large steps, without a look at a value."""
    square = torch.where(mask, 0, torch.inf).to(lengths.dtype)
    if not mask.numel():
        return square
    step = max(1, 64 * BLOCK // mask.numel())
    for dim in range(2, mask.dim()):
        lines = square.movedim(dim, 0).contiguous()
        place = torch.arange(len(lines), dtype=lines.dtype, device=mask.device)
        gaps = ((place.unsqueeze(1) - place) * lengths[dim - 2]).square()
        gaps = gaps.view(*gaps.shape, *[1] * (mask.dim() - 1))
        nearest = [(lines.unsqueeze(1) + gap).amin(0) for gap in gaps.split(step, 1)]
        square = torch.cat(nearest).movedim(0, dim)
    return square.sqrt()


@register("boundary", "segmentation")
class BoundaryLoss(Loss):
    common = staticmethod(_region_loss)
    extra = ("distance",)

    @options_of(boundary_loss)
    def __init__(self) -> None:
        """Module form of :func:`boundary_loss`."""
