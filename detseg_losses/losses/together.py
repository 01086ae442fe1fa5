"""Losses of one batch that share one pass over its logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from detseg_losses._core.batch import segmentation_batch
from detseg_losses._core.module import FormulaLoss
from detseg_losses._engine.statistics import measure
from detseg_losses.losses.regions import RegionLoss


def together(
    losses: Sequence[FormulaLoss], logits: Tensor, target: Tensor, **weights: Any
) -> list[Tensor]:
    """The value of each of some losses whose options of the pass agree."""
    shared: Any = {key: loss.options[key] for loss in losses for key in loss.shared}
    class_weights = shared.pop("class_weights", None)
    if "weight" in weights:
        weights = {"pixel_weight": weights["weight"]}
    batch = segmentation_batch(logits, target, **shared, **weights)
    statistics = measure(batch, [need for loss in losses for need in loss.needs()], class_weights)
    values = {
        loss: loss.evaluate(statistics) for loss in losses if not isinstance(loss, RegionLoss)
    }
    alike: dict[Any, list[RegionLoss]] = {}
    for loss in losses:
        if isinstance(loss, RegionLoss):
            alike.setdefault(loss.pooled(), []).append(loss)
    for members in alike.values():
        regions = members[0].regions(statistics)
        values |= zip(members, regions.losses([loss.made() for loss in members]), strict=True)
    return [values[loss] for loss in losses]
