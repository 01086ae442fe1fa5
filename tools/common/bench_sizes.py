"""The same losses on 1e2 to 1e8 elements."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from common import plain
from common.bench_inputs import (
    OUR_BOXES,
    OUR_FOCAL,
    THEIR_BOXES,
    anchor_labels,
    boxes_of,
    logits_of,
    masks,
    smp_bce_dice,
    smp_ce_dice,
    torchvision_focal,
)
from common.benchmark import Step, Work, can_compile, compare, free_bytes

import torch
from torch import Tensor

from detseg_losses import build_loss

CLASSES = 20
SIZES = [10**power for power in range(2, 9)]
NEEDED = 24
"""Bytes that the hungriest contestant may take at once, for a byte of the prediction."""

Loss = Callable[..., Tensor]


@dataclass
class Contest:
    """One loss and what it is compared with.

    Attributes:
        loss: what is computed.
        peer: who else does.
        inputs: makes those of some elements.
        losses: ours, the peer's, and the plain formula.
    """

    loss: str
    peer: str
    inputs: Callable[[torch.device, int], tuple[Any, ...]]
    losses: tuple[Loss, Loss, Loss]


def _contests() -> Iterator[Contest]:
    def heads(device: torch.device, elements: int) -> tuple[Any, ...]:
        anchors = elements // CLASSES
        labels = anchor_labels(device, anchors, CLASSES, max(1, anchors // 500))
        return logits_of(device, anchors, CLASSES), labels

    losses = OUR_FOCAL, torchvision_focal, plain.focal
    yield Contest(f"focal by index, {CLASSES} classes", "torchvision", heads, losses)
    yield Contest(
        f"ce+dice, {CLASSES} classes",
        "torch and SMP",
        lambda device, elements: masks(device, 1, CLASSES, elements // CLASSES),
        (build_loss("ce + dice"), smp_ce_dice(), plain.ce_dice),
    )
    yield Contest(
        "bce+dice, one channel",
        "SMP",
        lambda device, elements: masks(device, 1, 1, elements),
        (build_loss("bce + dice", mode="binary"), smp_bce_dice(), plain.bce_dice),
    )
    yield Contest(
        "giou",
        "torchvision",
        lambda device, elements: boxes_of(device, elements // 4),
        (OUR_BOXES["giou"], THEIR_BOXES["giou"], plain.giou),
    )


def measure_sizes(rounds: int, device: torch.device) -> list[dict[str, Any]]:
    """Measure all of them and say how far it is.

    Returns:
        Of each loss ``loss``, ``peer``, ``elements``, ``left_off`` (numbers of elements for which
        the memory is not enough) and, of ours, the peer's, the plain and the compiled one, the
        ``nanoseconds`` for each element.
    """
    results = []
    for contest in _contests():
        elements: list[int] = []
        nanoseconds: dict[str, list[float]] = {}
        left_off: list[int] = []
        for size in SIZES:
            free = free_bytes(device)
            if free is not None and free < size * 4 * NEEDED:
                print(f"{contest.loss}: {size:.0e} elements are left off, for want of memory")
                left_off.append(size)
                continue
            inputs = contest.inputs(device, size)
            ours, peer, formula = contest.losses
            works: dict[str, Work] = {
                "ours": Step(ours, inputs),
                "peer": Step(peer, inputs),
                "plain": Step(formula, inputs),
            }
            torch.compiler.reset()
            if can_compile(device):
                compiled = torch.compile(formula, fullgraph=True)
                works["compiled"] = Step(compiled, inputs)
            times, _ = compare(works, rounds, device)
            elements.append(size)
            for name, time in times.items():
                nanoseconds.setdefault(name, []).append(time * 1e6 / size)
            told = ", ".join(f"{name} {values[-1]:.3g}" for name, values in nanoseconds.items())
            print(f"{contest.loss}, {size:.0e} elements, ns an element: {told}", flush=True)
        results.append(
            {
                "loss": contest.loss,
                "peer": contest.peer,
                "elements": elements,
                "left_off": left_off,
                "nanoseconds": nanoseconds,
            }
        )
    return results
