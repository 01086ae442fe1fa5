"""How much of a tensor is computed at a time, and in which dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from detseg_losses.memory import empty_like

from .checks import in_blocks

# Elements of one block on the CPU. A block and the handful of temporaries made from it stay in
# the caches, so that a long chain of operations reads the logits from memory once.
BLOCK = 1 << 19


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Losses are computed in float32, or in float64 where the logits are float64."""
    return torch.promote_types(dtype, torch.float32)


class lazy:
    """An attribute that is computed when it is first asked for."""

    def __init__(self, compute: Callable[[Any], Any]) -> None:
        self.compute = compute
        self.name = compute.__name__

    def __get__(self, instance: Any, owner: type) -> Any:
        value = self.compute(instance)
        setattr(instance, self.name, value)
        return value


def followed() -> bool:
    """Whether a compiler, ``torch.func`` or forward-mode differentiation follows each operation: it
    then gets plain formulas.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return True
    return forward_ad._current_level >= 0


def has_graph(tensor: Tensor) -> bool:
    """Whether autograd records what is done with a tensor."""
    return tensor.requires_grad and torch.is_grad_enabled()


class Block(NamedTuple):
    """Some images and places of logits ``(B, C, P)``; ``part`` numbers the ranges of places."""

    part: int
    rows: slice
    places: slice

    def of(self, tensor: Tensor) -> Tensor:
        """This block of a tensor ``(B, ..., P)``; a last dimension of 1 stands for all places."""
        if self is WHOLE:
            return tensor
        return tensor[self.rows, ..., self.places if tensor.shape[-1] > 1 else slice(None)]

    def store(
        self, values: Tensor, result: Tensor | None, like: Tensor, dtype: torch.dtype
    ) -> Tensor:
        """The result so far, made like ``like`` by the first block, with the values of this one;
        of a whole the values themselves.
        """
        if self is WHOLE:
            return values.to(dtype)
        if result is None:
            result = empty_like(like, dtype)
        self.of(result).copy_(values)
        return result


WHOLE = Block(0, slice(None), slice(None))


def blocks(logits: Tensor, times: float = 1, uncut: int = 1) -> list[Block]:
    """Cut logits ``(B, C, P)`` into blocks of some ``times * BLOCK`` elements: several whole
    images, or a part of one that is more than ``uncut`` times as large. One block holds everything
    that is no larger, and wherever :func:`in_blocks` says so.
    """
    batch, classes, length = logits.shape
    size = max(1, int(times * BLOCK))
    if not in_blocks(logits) or logits.numel() <= size:
        return [WHOLE]
    places = length if classes * length <= uncut * size else max(1, min(length, size // classes))
    rows = max(1, size // (classes * length))
    return [
        Block(part, slice(row, row + rows), slice(part * places, (part + 1) * places))
        for row in range(0, batch, rows)
        for part in range(-(-length // places))
    ]


def rows_where(mask: Tensor) -> Tensor | slice:
    """Indices of the rows ``(N,)`` that a mask holds, or all rows.

    On the CPU it pays to work on the few rows alone; elsewhere the device would have to wait to
    learn how many there are. So give the other rows a weight of 0.
    """
    return mask.nonzero().squeeze(1) if in_blocks(mask) else slice(None)
