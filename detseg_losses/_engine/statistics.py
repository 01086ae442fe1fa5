"""What the segmentation losses of one batch share: soft counts of the classes, and maps.

Every region loss is a formula on the soft counts of each image and class, every pixel loss one on
the negative log likelihood of each pixel. :func:`measure` computes these small tensors in one pass
over the logits, and ordinary autograd flows through them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from detseg_losses._core.batch import Batch
from detseg_losses._engine.sigmoid import Formula, SigmoidWants, sigmoid_statistics
from detseg_losses._engine.softmax import SoftmaxWants, softmax_statistics, sums_by_label

Need = Literal["regions", "squares", "nll", "smooth"] | Formula
"""What a loss asks of a batch: region counts, one of the maps, or the sums of a formula."""


@dataclass
class Statistics:
    """What the losses of one batch share. Only what was asked for is there.

    Attributes:
        batch: the batch that they are of.
        counts: soft false positives ``sum p (1 - y)``, true positives ``sum p y``, false negatives
            ``sum (1 - p) y`` and the ground truth ``sum y``; with squares ``sum p^2 + y^2``:
            ``(4 or 5, B, C)``.
        nll: negative log likelihood of each pixel, ``(B, P)``; 0 where it is ignored.
        smooth: ``-sum_c w_c log p_c`` of each pixel, with ``w`` the class weights or 1,
            ``(B, P)``; 0 where it is ignored.
        sums: for each formula of a sigmoid loss its sums, ``(B, C)``.
    """

    batch: Batch
    counts: Tensor = field(init=False)
    nll: Tensor = field(init=False)
    smooth: Tensor = field(init=False)
    sums: dict[Formula, Tensor] = field(default_factory=dict)


def measure(
    batch: Batch,
    needs: Iterable[Need],
    class_weights: Tensor | Sequence[float] | None = None,
) -> Statistics:
    """Compute what losses need to know of the logits, once for all of them.

    Args:
        batch: logits, target and weights.
        needs: what to compute.
        class_weights: ``(C,)``; enters ``smooth`` and the ``nll`` of a dense target.

    Raises:
        ValueError: on a need that has no meaning in the mode of the batch.
    """
    needs = list(dict.fromkeys(needs))  # in their order, on which the last digits depend
    formulas = tuple(need for need in needs if isinstance(need, Formula))
    counts, squares = "regions" in needs, "squares" in needs
    result = Statistics(batch)
    if batch.mode == "multiclass":
        _measure_softmax(result, needs, batch.per_class(class_weights))
    elif {"nll", "smooth"} & set(needs):
        raise ValueError(
            f"a softmax over classes has no meaning in mode {batch.mode!r}; use 'bce' or 'focal', "
            "or a model with a channel for each class"
        )
    counts &= batch.mode != "multiclass"
    if formulas or counts:
        found = sigmoid_statistics(batch, SigmoidWants(formulas, (), counts, squares))
        result.sums = dict(zip(formulas, found, strict=False))
        if counts:
            result.counts = found[-1]
    if "squares" in needs:
        result.counts = torch.cat((result.counts[:4], result.counts[4:] + ground_truth(batch, 2)))
    return result


def _measure_softmax(result: Statistics, needs: Sequence[Need], weights: Tensor | None) -> None:
    batch = result.batch
    wants = SoftmaxWants("nll" in needs, "smooth" in needs, "regions" in needs, "squares" in needs)
    if not any(wants):
        return
    found = softmax_statistics(batch.logits, batch.target, batch.weight, weights, wants)
    for name, value in found._asdict().items():
        if value is not None:
            setattr(result, name, value)


def weighted_counts(batch: Batch, factor: Tensor) -> Statistics:
    """Counts with ``sum p * factor`` in place of the true positives, for any constant factor
    ``(B, C, P)``: so a loss that is linear in the probabilities needs no other pass.
    """
    result = measure(replace(batch, target=factor), ["regions"])
    result.batch = batch
    fp, tp, fn, _ = result.counts
    result.counts = torch.stack((fp, tp, fn, ground_truth(batch)))
    return result


def ground_truth(batch: Batch, power: int = 1) -> Tensor:
    """The weighted sum of the target, or of a power of it, ``(B, C)``."""
    w = batch.weight
    if not batch.dense:
        images, classes, _ = batch.logits.shape
        counts = torch.empty(1, images, classes, dtype=batch.dtype, device=batch.logits.device)
        labels = batch.labels()
        each = (
            torch.ones_like(labels, dtype=batch.dtype)
            if w is None
            else w.squeeze(1).to(batch.dtype)
        )
        sums_by_label(each.unsqueeze(0), labels, counts)
        return counts[0]
    y = batch.target.to(batch.dtype) ** power
    return (y if w is None else y.masked_fill(w == 0, 0) * w).sum(-1)
