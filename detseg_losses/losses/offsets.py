"""Losses of encoded box offsets, and of distributions over them.

They serve any numbers that should be equal to their targets.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from detseg_losses._core.blocks import compute_dtype
from detseg_losses._core.checks import POSITIVE, check_tensors, checked
from detseg_losses._core.module import Loss, options_of, register
from detseg_losses._core.reduction import reduce


@checked()
def l1_loss(inputs: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    r"""Absolute error.

    .. math:: |x - y|

    Args:
        inputs: predicted offsets, ``(*)``.
        targets: offsets, of the same shape.
        reduction: ``"none"``, ``"mean"`` (over all numbers) or ``"sum"``.

    Raises:
        ValueError: on shapes that differ.

    Examples:
        >>> offsets = torch.tensor([[0.1, -0.2, 0.5, 3.0]])
        >>> targets = torch.zeros(1, 4)
        >>> l1_loss(offsets, targets)
        tensor(0.9500)
    """
    return reduce(_difference(inputs, targets).abs(), reduction)


@checked()
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

    Examples:
        >>> offsets = torch.tensor([[0.1, -0.2, 0.5, 3.0]])
        >>> targets = torch.zeros(1, 4)
        >>> smooth_l1_loss(offsets, targets, reduction="none", beta=0.5)
        tensor([[0.0100, 0.0400, 0.2500, 2.7500]])
    """
    if beta == 0:
        return l1_loss(inputs, targets, reduction)
    size = _size(inputs, targets)
    return reduce(torch.where(size < beta, size.square() / (2 * beta), size - beta / 2), reduction)


@checked()
def mse_loss(inputs: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    r"""Squared error.

    .. math:: (x - y)^2

    For targets without outliers: the gradient grows with the error, and fades near 0.

    Args:
        inputs: predicted offsets, ``(*)``.
        targets: offsets, of the same shape.
        reduction: ``"none"``, ``"mean"`` (over all numbers) or ``"sum"``.

    Raises:
        ValueError: on shapes that differ.

    Examples:
        >>> offsets = torch.tensor([[0.1, -0.2, 0.5, 3.0]])
        >>> targets = torch.zeros(1, 4)
        >>> mse_loss(offsets, targets, reduction="none")
        tensor([[0.0100, 0.0400, 0.2500, 9.0000]])
    """
    return reduce(_difference(inputs, targets).square(), reduction)


@checked(delta=POSITIVE)
def huber_loss(
    inputs: Tensor, targets: Tensor, reduction: str = "mean", delta: float = 1.0
) -> Tensor:
    r"""Half the squared error, linear above delta (Huber, 1964).

    .. math:: d^2 / 2 \text{ where } d = |x - y| < \delta, \text{ else } \delta (d - \delta / 2)

    For targets with outliers, whose gradient is at most delta. It is delta times
    :func:`smooth_l1_loss` with ``beta=delta``: near 0 it does not change with delta, which changes
    what large errors count. The paper is Robust Estimation of a Location Parameter, Annals of
    Mathematical Statistics 35.

    Args:
        inputs: predicted offsets, ``(*)``.
        targets: offsets, of the same shape.
        reduction: ``"none"``, ``"mean"`` (over all numbers) or ``"sum"``.
        delta: where the square ends.

    Raises:
        ValueError: on shapes that differ or a delta that is not positive.

    Examples:
        >>> offsets = torch.tensor([[0.1, -0.2, 0.5, 3.0]])
        >>> targets = torch.zeros(1, 4)
        >>> huber_loss(offsets, targets, reduction="none", delta=0.5)
        tensor([[0.0050, 0.0200, 0.1250, 1.3750]])
    """
    size = _size(inputs, targets)
    return reduce(
        torch.where(size < delta, size.square() / 2, delta * (size - delta / 2)), reduction
    )


@checked(alpha=POSITIVE, gamma=POSITIVE)
def balanced_l1_loss(
    inputs: Tensor,
    targets: Tensor,
    reduction: str = "mean",
    *,
    alpha: float = 0.5,
    gamma: float = 1.5,
) -> Tensor:
    r"""Smooth L1 with more weight on small errors (Pang et al., Libra R-CNN, arXiv:1904.02701).

    .. math:: \tfrac{\alpha}{b} (b d + 1) \log (b d + 1) - \alpha d
        \text{ where } d = |x - y| < 1, \text{ else } \gamma d + C, \quad
        b = e^{\gamma / \alpha} - 1

    with the C that joins both. The slope is :math:`\alpha \log (b d + 1)` and at most
    :math:`\gamma`. For offsets that are mostly nearly right, whose gradients those of a few
    outliers would drown.

    Args:
        inputs: predicted offsets, ``(*)``.
        targets: offsets, of the same shape.
        reduction: ``"none"``, ``"mean"`` (over all numbers) or ``"sum"``.
        alpha: how flat the slope is near 0; a smaller one lifts small errors more.
        gamma: the slope from 1 on.

    Raises:
        ValueError: on shapes that differ, an alpha or gamma that is not positive, or more than 80
            times alpha as gamma.

    Examples:
        >>> offsets = torch.tensor([[0.1, -0.2, 0.5, 3.0]])
        >>> targets = torch.zeros(1, 4)
        >>> balanced_l1_loss(offsets, targets, reduction="none")
        tensor([[0.0314, 0.0984, 0.4006, 4.0786]])
    """
    if gamma > 80 * alpha:
        raise ValueError(f"gamma must be at most 80 alpha, or b overflows: {alpha}, {gamma}")
    b = math.expm1(gamma / alpha)
    size = _size(inputs, targets)
    small = size.clamp(max=1)
    curve = alpha / b * (b * small + 1) * torch.log1p(b * small) - alpha * small
    return reduce(curve + gamma * (size - small), reduction)


@checked()
def log_cosh_loss(inputs: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    r"""Logarithm of the hyperbolic cosine of the error.

    .. math:: \log \cosh (x - y)

    Half the square of small errors and :math:`|x - y| - \log 2` of large ones, as the Huber loss,
    but smooth everywhere: for methods that use second derivatives.

    Args:
        inputs: predicted offsets, ``(*)``.
        targets: offsets, of the same shape.
        reduction: ``"none"``, ``"mean"`` (over all numbers) or ``"sum"``.

    Raises:
        ValueError: on shapes that differ.

    Examples:
        >>> offsets = torch.tensor([[0.1, -0.2, 0.5, 3.0]])
        >>> targets = torch.zeros(1, 4)
        >>> log_cosh_loss(offsets, targets, reduction="none")
        tensor([[0.0050, 0.0199, 0.1201, 2.3093]])
    """
    size = _size(inputs, targets)
    # Each keeps its digits where the other one loses them.
    near = -torch.log1p(-size.clamp(max=1).tanh().square()) / 2
    far = size + torch.log1p(torch.exp(-2 * size)) - math.log(2)
    return reduce(torch.where(size < 1, near, far), reduction)


@checked()
def distribution_focal_loss(inputs: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    r"""Cross entropy of a number's two nearest bins (Li et al., arXiv:2006.04388).

    .. math:: -(i + 1 - y) \log p_i - (y - i) \log p_{i + 1}, \quad i \le y \le i + 1

    with p the softmax of the logits. For heads that predict each side of a box as a distribution,
    whose mean :math:`\sum_i i\, p_i` is then the side: blurred borders show as wide ones.

    Args:
        inputs: logits of the bins 0, 1, ..., ``(*, bins)``.
        targets: numbers in units of a bin, ``(*)``. What lies outside of ``[0, bins - 1]`` is taken
            for the nearest bin: no distribution could come closer.
        reduction: ``"none"``, ``"mean"`` (over all numbers) or ``"sum"``.

    Raises:
        ValueError: on shapes that do not fit.

    Examples:
        >>> logits = torch.tensor([[0.0, 0.0, 4.0, 4.0, 0.0]])  # between bins 2 and 3
        >>> distribution_focal_loss(logits, torch.tensor([2.5]))
        tensor(0.7202)
        >>> distribution_focal_loss(logits, torch.tensor([0.0]))
        tensor(4.7203)
    """
    check_tensors(inputs=inputs, targets=targets)
    if inputs.dim() == 0 or inputs.shape[:-1] != targets.shape or inputs.shape[-1] == 0:
        raise ValueError(
            f"logits must be (*, bins) and targets (*): {tuple(inputs.shape)}, "
            f"{tuple(targets.shape)}"
        )
    logits = inputs.to(compute_dtype(inputs.dtype))
    bins = torch.arange(logits.shape[-1], dtype=logits.dtype, device=logits.device)
    y = targets.to(logits.dtype).clamp(0, logits.shape[-1] - 1)
    shares = (1 - (y.unsqueeze(-1) - bins).abs()).clamp(min=0)
    return reduce(-(shares * logits.log_softmax(-1)).sum(-1), reduction)


def _size(inputs: Tensor, targets: Tensor) -> Tensor:
    """The absolute difference, with a slope at 0 unlike ``abs``, for right second derivatives."""
    difference = _difference(inputs, targets)
    return torch.where(difference < 0, -difference, difference)


def _difference(inputs: Tensor, targets: Tensor) -> Tensor:
    check_tensors(inputs=inputs, targets=targets)
    if inputs.shape != targets.shape:
        raise ValueError(f"shapes differ: {tuple(inputs.shape)} and {tuple(targets.shape)}")
    dtype = compute_dtype(inputs.dtype)
    return inputs.to(dtype) - targets.to(dtype)


@register("l1", "deltas")
class L1Loss(Loss):
    @options_of(l1_loss)
    def __init__(self) -> None:
        """Module form of :func:`l1_loss`."""


@register("smooth_l1", "deltas")
class SmoothL1Loss(Loss):
    @options_of(smooth_l1_loss)
    def __init__(self) -> None:
        """Module form of :func:`smooth_l1_loss`."""


@register("mse", "deltas")
class MSELoss(Loss):
    @options_of(mse_loss)
    def __init__(self) -> None:
        """Module form of :func:`mse_loss`."""


@register("huber", "deltas")
class HuberLoss(Loss):
    @options_of(huber_loss)
    def __init__(self) -> None:
        """Module form of :func:`huber_loss`."""


@register("balanced_l1", "deltas")
class BalancedL1Loss(Loss):
    @options_of(balanced_l1_loss)
    def __init__(self) -> None:
        """Module form of :func:`balanced_l1_loss`."""


@register("log_cosh", "deltas")
class LogCoshLoss(Loss):
    @options_of(log_cosh_loss)
    def __init__(self) -> None:
        """Module form of :func:`log_cosh_loss`."""


@register("dfl", "distribution")
class DistributionFocalLoss(Loss):
    @options_of(distribution_focal_loss)
    def __init__(self) -> None:
        """Module form of :func:`distribution_focal_loss`."""
