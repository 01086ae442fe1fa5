"""Measuring: ratios of interleaved runs, and the memory that operations take."""

from __future__ import annotations

import os
import shutil
import sysconfig
import time
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Work = Callable[[], object]


def can_compile(device: torch.device) -> bool:
    """Whether there is what torch.compile needs: on the CPU a C++ compiler and Python's headers."""
    headers = Path(sysconfig.get_path("include"), "Python.h")
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    return device.type != "cpu" or (compiler is not None and headers.exists())


@dataclass
class Ratio:
    """Times of ``ours`` over those of ``peer``, in pairs of runs side by side.

    Attributes:
        ours, peer: median milliseconds.
        low, mid, high: the quartiles of ours / peer.
    """

    ours: float
    peer: float
    low: float
    mid: float
    high: float


def compare(ours: Work, peer: Work, pairs: int, device: torch.device) -> Ratio:
    """Time two pieces of work in turns, so that whatever else the machine does meets both."""
    for work in (ours, peer):  # memory is found, kernels are chosen
        work()
        work()
    times = []
    for index in range(pairs):
        if index % 2:
            second, first = _milliseconds(peer, device), _milliseconds(ours, device)
        else:
            first, second = _milliseconds(ours, device), _milliseconds(peer, device)
        times.append((first, second))
    low, mid, high = quantiles([first / second for first, second in times], n=4)
    return Ratio(median(t for t, _ in times), median(t for _, t in times), low, mid, high)


def _milliseconds(work: Work, device: torch.device) -> float:
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)
    begin = time.perf_counter()
    work()
    return (time.perf_counter() - begin) * 1e3


class Memory(TorchDispatchMode):
    """Counts the bytes of new tensors while it is entered.

    Attributes:
        live: of those that still exist.
        peak: the most that existed at once.

    Args:
        given: tensors that do not count, nor do their views.
    """

    def __init__(self, given: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known = weakref.WeakSet([tensor.untyped_storage() for tensor in given])

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._watch(tensor.untyped_storage())
        return result

    def _watch(self, storage: torch.UntypedStorage) -> None:
        if storage not in self._known:
            self._known.add(storage)
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._forget, storage.nbytes())

    def _forget(self, size: int) -> None:
        self.live -= size


def peak_bytes(work: Work, given: Iterable[Tensor], device: torch.device) -> int:
    """The most memory that some work takes at once beside what is there."""
    if device.type == "cuda":  # autograd works in threads that a mode does not see
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    with Memory(given) as memory:
        work()
    return memory.peak


def kept_bytes(loss: Callable[[], Tensor], given: Iterable[Tensor]) -> int:
    """What a loss keeps for its backward pass: the new tensors that live as long as its value."""
    with Memory(given) as memory:
        value = loss()
    kept = memory.live
    del value
    return kept
