"""From the values of a loss to its result."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .checks import Reduction, check_choice
from .distribution import processes, world_sum


def reduce(values: Tensor, reduction: str) -> Tensor:
    """``values`` as they are, their sum, or their mean; the mean of nothing is 0."""
    check_choice("reduction", reduction, Reduction)
    if reduction == "none":
        return values
    total = values.sum()
    return total if reduction == "sum" else total / max(values.numel(), 1)


def as_weights(value: Any) -> Any:
    """Numbers of classes as a tensor; a tensor, a number or None as it is."""
    many = isinstance(value, Sequence) or len(getattr(value, "shape", ())) > 0
    return torch.as_tensor(value, dtype=torch.float32) if many else value


def class_balanced_weights(counts: Tensor | Sequence[float], beta: float = 0.999) -> Tensor:
    r"""Weights of classes by the effective number of their samples (Cui et al., arXiv:1901.05555).

    For ``class_weights`` where some classes are rare. The more samples a class has, the less a
    further one adds; weights by plain inverse frequency would let the rarest classes rule.

    .. math:: w_c \propto \frac{1 - \beta}{1 - \beta^{n_c}}, \quad \sum_c w_c = C

    Args:
        counts: how many samples (boxes, pixels, images) each class has, ``(C,)``.
        beta: 0 weighs all classes alike, towards 1 it becomes the inverse frequency. Samples
            beyond some ``1 / (1 - beta)`` hardly count: take that near the counts themselves.

    Returns:
        ``(C,)``, float32; 0 for a class without samples.

    Raises:
        ValueError: on a beta outside of [0, 1), or counts that are negative or not ``(C,)``.

    Examples:
        >>> weights = class_balanced_weights([9000, 900, 90])
        >>> weights
        tensor([0.2098, 0.3535, 2.4367])
        >>> criterion = build_loss("ce", class_weights=weights)
    """
    if not 0 <= beta < 1:
        raise ValueError(f"beta must be in [0, 1): {beta}")
    counts = torch.as_tensor(counts, dtype=torch.float64)
    if counts.dim() != 1 or not bool((counts >= 0).all()):
        raise ValueError(f"counts must be (C,) and not negative: {counts.tolist()}")
    log_beta = math.log(beta) if beta else -math.inf
    weights = torch.where(counts > 0, -1 / torch.expm1(counts * log_beta), 0)
    return divide(weights * len(weights), weights.sum()).float()


def divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    """The ratio, with 0 / 0 = 0 and finite gradients there."""
    return numerator / (denominator + (denominator == 0))


def mean_of_sums(sums: Tensor, counts: Tensor | int, *, per_image: bool, sync: bool) -> Tensor:
    """Sums ``(B,)`` over counts ``(B,)``: of the batch as one, or the mean of each image's.

    A number stands for the count of every image. With ``sync`` the batch is that of all processes,
    and the result of each process is scaled so that the average which DistributedDataParallel
    takes of the gradients is that of one process.
    """
    world = processes(sync)
    if isinstance(counts, int):
        if world == 1:
            return _total(sums) / max(counts * len(sums), 1)
        counts = sums.new_full((len(sums),), counts)
    if per_image:
        sums, counts = divide(sums, counts), torch.ones_like(counts)
    total, count = _total(sums), world_sum(_total(counts), sync)
    total = total if world == 1 else total * world
    return divide(total, count) if count.is_floating_point() else total / count.clamp(min=1)


def _total(values: Tensor) -> Tensor:
    return values.squeeze(0) if len(values) == 1 else values.sum()
