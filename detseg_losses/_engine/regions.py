r"""The Tversky family in closed form: values and slopes of several losses in a dozen operations.

Dice, Jaccard, Tversky and the F-measure are

.. math:: 1 - \frac{TP + s}{TP + \alpha FP + \beta FN + s}
    = \frac{\alpha FP + \beta FN}{TP + \alpha FP + \beta FN + s},

the second form without the cancellation of the first. Counts are small tensors: what takes time is
how many operations there are on them, forward and backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from detseg_losses._core.blocks import followed

Numbers = tuple[float, float, float] | Tensor
"""alpha, beta and s of one loss; of T losses as a tensor ``(3, T, 1, 1)``."""


def tversky_losses(counts: Tensor, numbers: Numbers, share: Tensor) -> Tensor:
    """The losses of members of the family, each a weighted sum over the classes, ``(T,)``.

    Args:
        counts: FP, TP and FN of each class, and what else may follow, ``(3 or more, b, C)``.
        numbers: alpha, beta and s.
        share: what each class counts in the sum, ``(b, C)``.
    """
    if followed():
        return plain(counts, numbers, share)
    return _Tversky.apply(counts, numbers, share)


def plain(counts: Tensor, numbers: Numbers, share: Tensor) -> Tensor:
    """The same as it is defined: for compilers, and for gradients of gradients."""
    wrong, right = _wrong_and_right(counts, numbers)
    whole = (wrong + right).clamp(min=LEAST)
    return (wrong / whole * share).sum((1, 2))


LEAST = 1e-18
"""The least denominator, so that 0 / 0 is 0: a class without a pixel and without a probability."""


def _wrong_and_right(counts: Tensor, numbers: Numbers) -> tuple[Tensor, Tensor]:
    """The two parts of the denominator, ``(T, b, C)``."""
    fp, tp, fn = counts[:3].unsqueeze(1)
    if isinstance(numbers, Tensor):
        alphas, betas, smooths = numbers
        return torch.addcmul(alphas * fp, betas, fn), tp + smooths
    alpha, beta, smooth = numbers
    return torch.add(alpha * fp, fn, alpha=beta), tp + smooth if smooth else tp


class _Tversky(torch.autograd.Function):
    """The losses, and their slopes in the counts."""

    @staticmethod
    def forward(ctx: Any, counts: Tensor, numbers: Numbers, share: Tensor) -> Tensor:
        wrong, right = _wrong_and_right(counts, numbers)
        whole = (wrong + right).clamp_(min=LEAST)
        each = share / whole
        slopes = counts.new_zeros(len(counts), *wrong.shape)
        losses = (wrong * each).sum((1, 2))
        each /= whole
        slopes[1].addcmul_(wrong, each, value=-1)
        each *= right
        torch.mul(each, numbers[0], out=slopes[0])
        torch.mul(each, numbers[1], out=slopes[2])
        ctx.numbers = numbers
        ctx.save_for_backward(counts, share, slopes)
        return losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        counts, share, slopes = ctx.saved_tensors
        if torch.is_grad_enabled():  # a graph of the gradient is wanted
            losses = plain(counts, ctx.numbers, share)
            return *torch.autograd.grad(losses, counts, grad, create_graph=True), None, None
        # Not as a matrix product, which autocast and TF32 would round.
        slopes = slopes * grad[:, None, None]
        return slopes.sum(1) if len(grad) > 1 else slopes.squeeze(1), None, None
