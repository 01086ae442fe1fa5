"""Losses of encoded box offsets, or of any numbers that should be equal to their targets."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Loss, compute_dtype, reduce, register


def l1_loss(inputs: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    r"""Absolute error.

    .. math:: |x - y|

    Args:
        inputs: predicted offsets, ``(*)``.
        targets: offsets, of the same shape.
        reduction: ``"none"``, ``"mean"`` (over all numbers) or ``"sum"``.

    Raises:
        ValueError: on shapes that differ.
    """
    return reduce(_difference(inputs, targets).abs(), reduction)


def smooth_l1_loss(
    inputs: Tensor, targets: Tensor, reduction: str = "mean", beta: float = 1.0
) -> Tensor:
    r"""Absolute error, smoothed to a square below beta (Girshick, arXiv:1504.08083).

    .. math:: d^2 / (2 \beta) \text{ where } d = |x - y| < \beta, \text{ else } d - \beta / 2

    It is the Huber loss over beta.

    Args:
        inputs: predicted offsets, ``(*)``.
        targets: offsets, of the same shape.
        reduction: ``"none"``, ``"mean"`` (over all numbers) or ``"sum"``.
        beta: where the square ends; 0 is :func:`l1_loss`.

    Raises:
        ValueError: on shapes that differ or a negative beta.
    """
    if beta < 0:
        raise ValueError(f"beta must not be negative: {beta}")
    difference = _difference(inputs, targets).abs()
    if beta == 0:
        return reduce(difference, reduction)
    square = difference.square() / (2 * beta)
    return reduce(torch.where(difference < beta, square, difference - beta / 2), reduction)


def _difference(inputs: Tensor, targets: Tensor) -> Tensor:
    if inputs.shape != targets.shape:
        raise ValueError(f"shapes differ: {tuple(inputs.shape)} and {tuple(targets.shape)}")
    dtype = compute_dtype(inputs.dtype)
    return inputs.to(dtype) - targets.to(dtype)


@register("l1", "deltas")
class L1Loss(Loss):
    """Module form of :func:`l1_loss`."""

    function = staticmethod(l1_loss)


@register("smooth_l1", "deltas")
class SmoothL1Loss(Loss):
    """Module form of :func:`smooth_l1_loss`."""

    function = staticmethod(smooth_l1_loss)
