"""``sync=True``: two processes with a part of a batch each are one process with the whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from detseg_losses import LOSSES, build_loss
from processes import run_in_processes

OPTIONS = [
    "dice(absent='penalise', class_weights=[1, 2, 3, 4])",
    "dice(per_image=True, reduction='sum')",
    "mcc(reduction='sum')",
    "lovasz(absent='penalise', class_weights=[1, 2, 3, 4])",
    "ohem(fraction=0.3, thresh=None)",
    "ce(label_smoothing=0.1, class_weights=[1, 2, 3, 4])",
    "ce(reduction='sum')",
    "bce(mode='multiclass', reduction='sum')",
    "ghm(mode='multiclass', bins=8)",
    "ce + 0.5*dice",
    "bce(mode='multiclass') + dice(mode='multiclass')",
]


def of_every_loss() -> list[str]:
    """Every loss that has the option, of the batch and of each image."""
    found = []
    for name, cls in LOSSES.items():
        mode = "mode='multiclass', " if "classification" in cls.kinds else ""
        if "sync" in cls.defaults:
            found += [f"{name}({mode}per_image={per_image})" for per_image in (False, True)]
    return found


SPECS = [*OPTIONS, *of_every_loss()]


def batch() -> tuple[Tensor, Tensor]:
    """Parts that differ: other classes present, other shares ignored, an image all ignored, and
    one more image.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 2, 5, 6, dtype=torch.float64, generator=generator)
    y = torch.randint(0, 4, (5, 5, 6), generator=generator)
    y[:2] %= 2
    y[2, :3] = 255
    y[3] = 255
    return x, y


def run(x: Tensor, y: Tensor, spec: str, sync: bool) -> tuple[Tensor, Tensor]:
    """Loss and gradient of the weight of a model that is as it is in every process."""
    torch.manual_seed(1)
    model = nn.Conv2d(2, 4, 1).double()
    loss = build_loss(spec, kind="segmentation", ignore_index=255, sync=sync)
    value = loss(model(x), y)
    value.backward()
    assert model.weight.grad is not None
    return value.detach(), model.weight.grad


def half(rank: int) -> list[tuple[Tensor, Tensor]]:
    """What a process of two finds, gradients averaged as DistributedDataParallel does."""
    x, y = (tensor[3 * rank : 3 * rank + 3] for tensor in batch())
    found = []
    for spec in SPECS:
        value, grad = run(x, y, spec, sync=True)
        dist.all_reduce(grad)
        found.append((value, grad / dist.get_world_size()))
    return found


@pytest.fixture(scope="module")
def halves() -> list[list[tuple[Tensor, Tensor]]]:
    return run_in_processes(half)


@pytest.mark.parametrize("spec", SPECS)
def test_two_processes_are_one(spec: str, halves: Any) -> None:
    value, grad = run(*batch(), spec, sync=False)
    found = [process[SPECS.index(spec)] for process in halves]
    # a region loss is the loss of the whole batch in each process, one of pixels in their mean
    torch.testing.assert_close((found[0][0] + found[1][0]) / 2, value)
    for _, averaged in found:
        torch.testing.assert_close(averaged, grad)


def test_sync_alone_changes_nothing() -> None:
    for spec in SPECS:
        assert torch.equal(run(*batch(), spec, sync=True)[1], run(*batch(), spec, sync=False)[1])
