"""Sums over the processes of a distributed training."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def processes(sync: bool) -> int:
    """How many processes share the batch where ``sync`` asks for it."""
    return dist.get_world_size() if sync and dist.is_available() and dist.is_initialized() else 1


def world_sum(values: Tensor, sync: bool) -> Tensor:
    """The sum over all processes where ``sync`` asks for it; autograd flows through it."""
    return values if processes(sync) == 1 else _AllReduce.apply(values)


def gather(values: Tensor, sync: bool) -> tuple[list[Tensor], int]:
    """Values ``(*, N)`` of all processes where ``sync`` asks for it, and which are those of this
    one. N may differ; nothing else may. They are constants, for no gradient flows through them.
    """
    count = processes(sync)
    if count == 1:
        return [values], 0
    lengths = [torch.tensor(0, device=values.device) for _ in range(count)]
    dist.all_gather(lengths, torch.tensor(values.shape[-1], device=values.device))
    ends = [int(length) for length in lengths]
    padded = values.new_zeros(*values.shape[:-1], max(ends))  # which is what backends can gather
    padded[..., : values.shape[-1]] = values
    found = [torch.empty_like(padded) for _ in range(count)]
    dist.all_gather(found, padded)
    return [each[..., :end] for each, end in zip(found, ends, strict=True)], dist.get_rank()


class _AllReduce(torch.autograd.Function):
    """A sum over the processes, of which each one's result depends on every one's input."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total = grad.clone()
        dist.all_reduce(total)
        return total
