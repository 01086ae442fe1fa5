"""Kernels and bytes that an eager GPU would run, counted on any device, the meta device included.

An operator counts as one kernel that reads its inputs and writes its outputs, except for those
below. One that runs others underneath, where a dispatch mode does not see them, must have a rule
here: else counting fails, so that no kernel is overlooked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ALLOCATIONS = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"}
NOTHING = ALLOCATIONS | {"promote_types", "_unsafe_view", "lift_fresh", "is_same_size"}
FILLS = {"zeros", "ones", "full", "zeros_like", "ones_like", "full_like", "new_zeros", "new_ones"}
FILLS |= {"new_full", "arange", "fill_", "zero_", "scalar_tensor", "eye"}
# Composites of one kernel: they only prepare its arguments.
SINGLE = FILLS | {"_to_copy", "clone", "copy", "stack", "cat", "rsub", "add", "sub", "mul", "div"}
SINGLE |= {"abs", "sum", "mean", "all", "any", "where", "masked_fill", "index", "clamp", "softmax"}
SINGLE |= {"log_softmax", "_local_scalar_dense", "isfinite", "isinf", "logical_and_", "copy_"}
SINGLE |= {"div_", "index_put", "index_put_"}


@dataclass
class Kernel:
    name: str
    bytes: int


class Kernels(TorchDispatchMode):
    """Records the kernels of what runs within."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Kernel] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        if name in EXPANSIONS:
            with self:
                return EXPANSIONS[name](*args, **kwargs)
        result = function(*args, **kwargs)
        if name in NOTHING or is_view(function):
            return result
        if name not in SINGLE and is_composite(function):
            raise NotImplementedError(f"{function} may run several kernels: write a rule for it")
        written = tensors(result)
        given = tensors((args, {k: v for k, v in kwargs.items() if not is_out(function, k)}))
        self.found += rule(name, given, written)
        return result

    @property
    def bytes(self) -> int:
        return sum(kernel.bytes for kernel in self.found)

    def __len__(self) -> int:
        return len(self.found)


def kernels_of(loss: Callable[[], Tensor]) -> Kernels:
    """Those of a loss and its backward pass."""
    with Kernels() as found:
        loss().backward()
    return found


def rule(name: str, given: list[Tensor], written: list[Tensor]) -> list[Kernel]:
    """The kernels of an operator that reads and writes tensors."""
    after = sum(map(size, written))
    if name in FILLS:
        return [Kernel(name, after)]
    if name == "copy_":
        return [Kernel(name, size(given[1]) + after)]
    if name in ("gather", "index", "index_select"):  # reads the entries that it returns
        return [*searches(given), Kernel(name, sum(map(size, given[1:])) + 2 * after)]
    if name.rstrip("_") in ("scatter", "scatter_add", "index_put", "index_add"):
        index = next(tensor for tensor in given[1:] if not tensor.is_floating_point())
        entries = chosen(index) * given[0].element_size()
        touched = size(index) + sum(size(t) for t in given[1:] if t is not index)
        touched += entries * (2 if "add" in name else 1)
        whole = [] if name.endswith("_") else [Kernel("clone", size(given[0]) + after)]
        return [*searches(given), *whole, Kernel(name, touched)]
    if name.startswith("nll_loss"):  # touches one entry of each pixel
        if "backward" in name:
            entries = given[2].numel() * given[1].element_size()
            return [Kernel("zero_", after), Kernel(name, size(given[0]) + size(given[2]) + entries)]
        return [Kernel(name, size(given[1]) + given[1].numel() * given[0].element_size() + after)]
    if name == "log_sigmoid_forward":  # its second result is of the CPU alone
        written = written[:1]
    return [Kernel(name, sum(map(size, given)) + sum(map(size, written)))]


def searches(given: list[Tensor]) -> list[Kernel]:
    """Masks among the indices are first turned into indices, at least one kernel each."""
    masks = [tensor for tensor in given[1:] if tensor.dtype == torch.bool]
    return [Kernel("nonzero", size(mask) + 8 * chosen(mask)) for mask in masks]


def chosen(index: Tensor) -> int:
    """How many entries an index or a mask chooses."""
    return int(index.count_nonzero()) if index.dtype == torch.bool else index.numel()


def tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def size(tensor: Tensor) -> int:
    """Bytes; what is expanded is read once."""
    count = tensor.element_size()
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= length if stride else min(length, 1)
    return count


def is_view(function: Any) -> bool:
    """Whether the result shares memory with an argument that is not written."""
    aliases = [argument.alias_info for argument in function._schema.arguments]
    return any(alias is not None and not alias.is_write for alias in aliases)


def is_out(function: Any, name: str) -> bool:
    return any(argument.name == name and argument.is_out for argument in function._schema.arguments)


def is_composite(function: Any) -> bool:
    """Whether it has no kernel of its own, and runs other operators in one that fits any device."""
    own, any_device = (
        torch._C._dispatch_has_kernel_for_dispatch_key(function.name(), key)
        for key in ("CPU", "CompositeExplicitAutograd")
    )
    return any_device and not own


def bce_with_logits(
    x: Tensor,
    y: Tensor,
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    reduction: int = 1,
) -> Tensor:
    """As ATen/native/Loss.cpp has it."""
    log_sigmoid = torch.ops.aten.log_sigmoid_forward(x)[0]
    if pos_weight is not None:
        log_sigmoid.mul_((pos_weight - 1).mul(y).add_(1))
    loss = torch.ones_like(y).sub_(y).mul_(x).sub_(log_sigmoid)
    if weight is not None:
        loss.mul_(weight)
    return loss if reduction == 0 else loss.mean() if reduction == 1 else loss.sum()


def slice_backward(grad: Tensor, shape: list[int], *where: int) -> Tensor:
    result = grad.new_zeros(shape)
    dim, start, end, step = where
    torch.ops.aten.slice(result, dim, start, end, step).copy_(grad)
    return result


def select_backward(grad: Tensor, shape: list[int], dim: int, index: int) -> Tensor:
    result = grad.new_zeros(shape)
    result.select(dim, index).copy_(grad)
    return result


EXPANSIONS: dict[str, Callable[..., Any]] = {
    "binary_cross_entropy_with_logits": bce_with_logits,
    "slice_backward": slice_backward,
    "select_backward": select_backward,
}
