"""Run a function in several processes that can talk to each other."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_in_processes(function: Callable[..., Any], *args: Any, world: int = 2) -> list[Any]:
    """What ``function(rank, *args)`` returns in each of ``world`` processes (gloo, CPU)."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_work, (world, folder, function, args), nprocs=world)
        return [torch.load(Path(folder, f"{rank}.pt")) for rank in range(world)]


def _work(rank: int, world: int, folder: str, function: Callable[..., Any], args: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=world)
    torch.save(function(rank, *args), Path(folder, f"{rank}.pt"))
    dist.destroy_process_group()
