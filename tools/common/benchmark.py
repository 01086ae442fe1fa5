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

from common.kernels import Kernels

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

Work = Callable[[], object]
SHORT, LONG = 0.5, 15.0
"""Seconds: rounds go on until the first, and are cut short after the second."""
FEWEST, MOST = 3, 20
"""Rounds, however long they are; times as many as asked for, however short they are."""


def can_compile(device: torch.device) -> bool:
    """Whether there is what torch.compile needs: on the CPU a C++ compiler and Python's headers."""
    headers = Path(sysconfig.get_path("include"), "Python.h")
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    return device.type != "cpu" or (compiler is not None and headers.exists())


@dataclass
class Step:
    """A step of training, from a prediction to its gradient.

    Args:
        loss: the loss.
        inputs: what it takes: tensors, or lists and dictionaries of them.
    """

    loss: Callable[..., Tensor]
    inputs: tuple[Any, ...]

    def __post_init__(self) -> None:
        self.prediction = [leaf for leaf in tree_leaves(self.inputs) if leaf.requires_grad]

    def __call__(self) -> None:
        for tensor in self.prediction:
            tensor.grad = None
        self.loss(*self.inputs).backward()

    def on(self, device: str) -> Step:
        """The same step on another device."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.detach().to(device).requires_grad_(tensor.requires_grad)

        return Step(self.loss, tree_map(move, self.inputs))


@dataclass
class Ratio:
    """The quartiles of times of our work over those of another, each pair side by side."""

    low: float
    mid: float
    high: float


def compare(
    works: dict[str, Work], rounds: int, device: torch.device
) -> tuple[dict[str, float], dict[str, Ratio]]:
    """Time pieces of work in turns, so that whatever else the machine does meets all of them.

    Args:
        works: the first is ours. Each runs twice before, which finds memory and compiles.
        rounds: how often each is timed: more often where it is short, less where it is long.
        device: where.

    Returns:
        The median milliseconds of each, and the ratios of the first to each other.
    """
    for work in works.values():
        work()
        work()
    names = list(works)
    times: dict[str, list[float]] = {name: [] for name in names}
    begin, done = time.perf_counter(), 0
    while _goes_on(done, rounds, time.perf_counter() - begin):
        first = done % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(_milliseconds(works[name], device))
        done += 1
    ours = times[names[0]]
    ratios = {}
    for name in names[1:]:
        pairs = zip(ours, times[name], strict=True)
        ratios[name] = Ratio(*quantiles([mine / other for mine, other in pairs], n=4))
    return {name: median(values) for name, values in times.items()}, ratios


def _goes_on(done: int, rounds: int, seconds: float) -> bool:
    if done < rounds:
        return done < FEWEST or seconds < LONG
    return done < MOST * rounds and seconds < SHORT


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


def counted(step: Step, *, anywhere: bool) -> dict[str, float] | None:
    """What an eager GPU would run.

    Args:
        step: what is counted.
        anywhere: whether to count on the CPU what the meta device cannot run, such as a choice of
            entries by a mask; not for a loss that works otherwise there.

    Returns:
        ``kernels``, the ``bytes`` that they move, and these for a byte of the prediction,
        ``traffic``; None where it cannot be counted.
    """
    for device in ("meta", "cpu") if anywhere else ("meta",):
        there = step.on(device)
        try:
            with Kernels() as found:
                there()
        except (NotImplementedError, RuntimeError):
            continue
        size = sum(tensor.nbytes for tensor in there.prediction)
        return {"kernels": len(found), "bytes": found.bytes, "traffic": found.bytes / size}
    return None


class Load:
    """How busy other processes keep the processors, which makes times worthless."""

    def __init__(self) -> None:
        self._start = self._ticks()

    def of_others(self) -> float | None:
        """Their share of all processors since this was made; None where the system does not say."""
        now = self._ticks()
        if now is None or self._start is None:
            return None
        others, everything = (now[index] - self._start[index] for index in range(2))
        return max(0.0, others / everything) if everything else 0.0

    @staticmethod
    def _ticks() -> tuple[float, float] | None:
        """Of other processes, and with those of this one and of rest."""
        info = Path("/proc/stat")
        if not info.is_file():
            return None
        ticks = [int(word) for word in info.read_text().split(maxsplit=9)[1:9]]
        rest = ticks[3] + ticks[4]  # idle, and waiting for a disk
        own = sum(os.times()[:4]) * os.sysconf("SC_CLK_TCK")
        return sum(ticks) - rest - own, sum(ticks)


def free_bytes(device: torch.device) -> int | None:
    """The memory that is free; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    info = Path("/proc/meminfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    free = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(free[0]) * 1024 if free else None


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
