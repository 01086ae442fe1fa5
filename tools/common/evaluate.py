"""Predictions of a model for a whole data set, shared out over the processes, and their metrics."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest
from typing import Any, cast

import torch
import torch.distributed
from lightning_fabric import Fabric
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader

from common.config import DataConfig
from common.data import Batch, Data, EvaluationImages, collate
from common.errors import UsageError
from common.signals import outlive_signals
from detseg_losses.integrations.coco import coco_metrics
from detseg_losses.integrations.samples import DataT, DetectionData, to_results
from detseg_losses.integrations.voc import ConfusionMatrix


def normalize(images: Tensor, config: DataConfig) -> Tensor:
    """Turn uint8 images ``(B, 3, H, W)`` into float images of about zero mean and unit variance."""
    mean = torch.tensor(config.mean, device=images.device).view(3, 1, 1)
    std = torch.tensor(config.std, device=images.device).view(3, 1, 1)
    return (images / 255 - mean) / std


def _batches(fabric: Fabric, data: Data, config: DataConfig, batch_size: int) -> Iterator[Batch]:
    loader = DataLoader(
        EvaluationImages(data, config),
        batch_size,
        num_workers=config.workers,
        collate_fn=collate,
        worker_init_fn=outlive_signals,
    )
    for batch in loader:
        yield fabric.to_device(batch)


def _share(fabric: Fabric, data: DataT) -> DataT:
    """The part of the images that this process looks at."""
    return data.select(range(fabric.global_rank, len(data), fabric.world_size))


@torch.no_grad()
def detect(
    fabric: Fabric, detector: nn.Module, data: DetectionData, config: DataConfig, batch_size: int
) -> list[dict[str, Any]]:
    """Return the detections in all images of ``data``, as entries of a COCO results file."""
    detector.eval()
    ids = [image.id for image in data.images]
    results: list[dict[str, Any]] = []
    for batch in _batches(fabric, data, config, batch_size):
        with fabric.autocast():
            outputs = detector(list(batch["image"] / 255))
        for output, index, fitted, original in zip(
            outputs, batch["index"], batch["fitted"], batch["original"], strict=True
        ):
            named = output["labels"] > 0  # label 0 means nothing, yet has an output
            boxes = output["boxes"][named].float().cpu()
            (height, width), (fitted_height, fitted_width) = original, fitted
            boxes *= torch.tensor([width / fitted_width, height / fitted_height] * 2)
            boxes[:, 0::2] = boxes[:, 0::2].clamp(0, width)
            boxes[:, 1::2] = boxes[:, 1::2].clamp(0, height)
            results += to_results(
                ids[index],
                boxes,
                output["scores"][named].float().cpu(),
                output["labels"][named].cpu() - 1,
                data.category_ids,
            )
    return results


def evaluate_detector(
    fabric: Fabric, detector: nn.Module, data: DetectionData, config: DataConfig, batch_size: int
) -> dict[str, Any]:
    """Return COCO's numbers, the same on every process."""
    results = detect(fabric, detector, _share(fabric, data), config, batch_size)
    if fabric.world_size > 1:
        parts: list[list[dict[str, Any]]] = [[] for _ in range(fabric.world_size)]
        torch.distributed.all_gather_object(parts, results)
        results = [result for part in parts for result in part]
    metrics = coco_metrics(data.ground_truth(), results) if fabric.is_global_zero else {}
    return fabric.broadcast(metrics)


@torch.no_grad()
def segment(
    fabric: Fabric, segmenter: nn.Module, data: Data, config: DataConfig, batch_size: int
) -> Iterator[tuple[int, Tensor, NDArray[Any]]]:
    """Yield index, predicted mask and true mask of each image.

    Masks have the size of the original image: the logits are enlarged before the class is chosen.
    A single channel of logits means class 1 where it is positive, else class 0.
    """
    segmenter.eval()
    for batch in _batches(fabric, data, config, batch_size):
        images = normalize(batch["image"], config)
        with fabric.autocast():
            logits = _logits(segmenter(images))
        if logits.shape[-2:] != images.shape[-2:]:
            logits = interpolate(logits, images.shape[-2:], mode="bilinear", align_corners=False)
        for logit, index, fitted, original, truth in zip(
            logits,
            batch["index"],
            batch["fitted"],
            batch["original"],
            batch["truth"],
            strict=True,
        ):
            logit = logit[None, :, : fitted[0], : fitted[1]].float()
            logit = interpolate(logit, original, mode="bilinear", align_corners=False)[0]
            mask = logit.argmax(0) if len(logit) > 1 else logit[0] > 0
            yield index, mask.to(torch.uint8).cpu(), truth


def _logits(output: Any) -> Tensor:
    """The logits in what a model returns: torchvision and transformers wrap them in a dict."""
    if isinstance(output, dict):
        return output["out"] if "out" in output else output["logits"]
    return output


def evaluate_segmenter(
    fabric: Fabric, segmenter: nn.Module, data: Data, config: DataConfig, batch_size: int
) -> dict[str, Any]:
    """Return mIoU and its companions over all pixels of ``data``, the same on every process."""
    confusion = ConfusionMatrix(len(data.classes))
    for _, mask, truth in segment(fabric, segmenter, _share(fabric, data), config, batch_size):
        confusion.update(mask, torch.from_numpy(truth))
    matrix = confusion.matrix.to(fabric.device)
    confusion.matrix = cast(Tensor, fabric.all_reduce(matrix, reduce_op="sum")).cpu()
    return confusion.metrics(data.classes)


def check_classes(data: Data, trained: list[str]) -> None:
    """Refuse data whose classes are not those that a model was trained for.

    Raises:
        UsageError: naming the first difference.
    """
    if data.classes == trained:
        return
    for number, (here, there) in enumerate(zip_longest(data.classes, trained)):
        if here != there:
            raise UsageError(
                f"class {number} is {here!r} in the validation data and {there!r} in training; "
                "data.classes chooses classes and their order"
            )
