"""Predictions of a model for a whole data set, shared out over the processes, and their metrics."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypeVar

from common.config import DataConfig
from common.data import Batch, Data, EvaluationImages, collate, read_sample
from common.errors import UsageError, writing
from common.per_image import CocoMatches, PixelCounts, pixel_counts
from common.signals import outlive_signals

import numpy as np
import torch
import torch.distributed
from lightning_fabric import Fabric
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader

from detseg_losses.integrations.coco import coco_evaluation
from detseg_losses.integrations.samples import (
    DataError,
    DataT,
    DetectionData,
    Fault,
    inside,
    report_faults,
    summarize_faults,
    to_results,
)
from detseg_losses.integrations.voc import ConfusionMatrix

T = TypeVar("T")


def normalize(images: Tensor, config: DataConfig) -> Tensor:
    """Turn uint8 images ``(B, 3, H, W)`` into float images of about zero mean and unit variance."""
    mean = torch.tensor(config.mean, device=images.device).view(3, 1, 1)
    std = torch.tensor(config.std, device=images.device).view(3, 1, 1)
    return (images / 255 - mean) / std


def _batches(
    fabric: Fabric, data: Data, config: DataConfig, batch_size: int, faults: list[Fault]
) -> Iterator[Batch]:
    loader = DataLoader(
        EvaluationImages(data, config),
        batch_size,
        num_workers=config.workers,
        collate_fn=collate,
        worker_init_fn=outlive_signals,
    )
    for batch in loader:
        faults += batch.pop("faults", [])
        if batch:
            yield fabric.to_device(batch)


def _share(fabric: Fabric, data: DataT) -> DataT:
    """The part of the images that this process looks at."""
    return data.select(range(fabric.global_rank, len(data), fabric.world_size))


def _gather(fabric: Fabric, items: list[T]) -> list[T]:
    """The items of all processes, the same on each of them."""
    if fabric.world_size == 1:
        return items
    parts: list[list[T]] = [[] for _ in range(fabric.world_size)]
    torch.distributed.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def without_faulty(data: DataT, faults: list[Fault]) -> DataT:
    """The images of ``data`` that have no fault.

    Raises:
        DataError: if none is left.
    """
    faulty = {fault.file for fault in faults}
    kept = [index for index, image in enumerate(data.images) if image.path not in faulty]
    if not kept:
        raise DataError(f"no usable image is left to judge: {summarize_faults(faults)}")
    return data.select(kept)


def add_note(metrics: dict[str, Any], faults: list[Fault]) -> None:
    """Say in the notes of ``metrics`` which images were skipped."""
    if faults:
        names = ", ".join(fault.file.name for fault in faults[:5])
        more = ", ..." if len(faults) > 5 else ""
        metrics.setdefault("notes", []).append(
            f"{len(faults)} images were skipped, for they or their masks cannot be used, and do "
            f"not count: {names}{more}."
        )


def drawable(data: DataT) -> DataT:
    """The images of a handful that can be decoded."""
    faults: list[Fault] = []
    readable = [i for i in range(len(data)) if read_sample(data, i, "skip", faults) is not None]
    return data.select(readable)


@torch.no_grad()
def detect(
    fabric: Fabric,
    detector: nn.Module,
    data: DetectionData,
    config: DataConfig,
    batch_size: int,
    faults: list[Fault],
) -> list[dict[str, Any]]:
    """Return the detections in all images of ``data``, as entries of a COCO results file.

    ``faults`` receives the images that cannot be decoded; they have no detections.
    """
    detector.eval()
    ids = [image.id for image in data.images]
    results: list[dict[str, Any]] = []
    for batch in _batches(fabric, data, config, batch_size, faults):
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
) -> tuple[dict[str, Any], CocoMatches | None]:
    """Return COCO's numbers, the same on every process, and on the first what is behind them.

    Raises:
        DataError: if no image can be decoded.
    """
    faults: list[Fault] = []
    results = detect(fabric, detector, _share(fabric, data), config, batch_size, faults)
    results, faults = _gather(fabric, results), _gather(fabric, faults)
    judged = without_faulty(data, faults)
    if faults:
        fabric.print(report_faults(faults))
    metrics: dict[str, Any] = {}
    matches = None
    if fabric.is_global_zero:
        metrics, matches = coco_evaluation(judged.ground_truth(), results)
    add_note(metrics, faults)
    return fabric.broadcast(metrics), matches


@torch.no_grad()
def segment(
    fabric: Fabric,
    segmenter: nn.Module,
    data: Data,
    config: DataConfig,
    batch_size: int,
    faults: list[Fault],
) -> Iterator[tuple[int, Tensor, NDArray[Any]]]:
    """Yield index, predicted mask and true mask of each image.

    ``faults`` receives the images that cannot be used, of which nothing is yielded.

    Masks have the size of the original image: the logits are enlarged before the class is chosen.
    A single channel of logits means class 1 where it is positive, else class 0.
    """
    segmenter.eval()
    for batch in _batches(fabric, data, config, batch_size, faults):
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
) -> tuple[dict[str, Any], PixelCounts]:
    """Return mIoU and its companions over all pixels, and what is behind them, on every process.

    Raises:
        DataError: if no image can be used.
    """
    faults: list[Fault] = []
    mine = _share(fabric, data)
    found: list[tuple[str, NDArray[np.int64]]] = []
    for index, mask, truth in segment(fabric, segmenter, mine, config, batch_size, faults):
        found.append((mine.names[index], confusion_of(mask, truth, len(data.classes))))
    found, faults = _gather(fabric, found), _gather(fabric, faults)
    without_faulty(data, faults)
    if faults:
        fabric.print(report_faults(faults))
    metrics, counts = judge_masks(found, data.classes)
    add_note(metrics, faults)
    return metrics, counts


def confusion_of(mask: Tensor, truth: NDArray[Any], classes: int) -> NDArray[np.int64]:
    """The confusion matrix of one image."""
    confusion = ConfusionMatrix(classes)
    confusion.update(mask, torch.from_numpy(truth))
    return confusion.matrix.numpy()


def judge_masks(
    found: list[tuple[str, NDArray[np.int64]]], classes: list[str]
) -> tuple[dict[str, Any], PixelCounts]:
    """The metrics of the names and confusion matrices of all images, and what is behind them."""
    found.sort(key=lambda each: each[0])  # whichever process had them
    total = ConfusionMatrix(len(classes))
    for _, matrix in found:
        total.matrix += torch.from_numpy(matrix)
    counts = pixel_counts([name for name, _ in found], classes, [matrix for _, matrix in found])
    return total.metrics(classes), counts


def check_folder(option: str, folder: str | None) -> None:
    """Refuse a folder for results that is a file, or that cannot be made or written.

    Raises:
        UsageError: naming the option.
    """
    if folder is None:
        return
    try:
        os.lstat(folder)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise UsageError(f"{option} {folder}: cannot be made ({error.strerror})") from error
    there = next(p for p in (Path(folder), *Path(folder).absolute().parents) if os.path.lexists(p))
    if not there.is_dir():
        raise UsageError(f"{option} {folder}: {there} is no folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UsageError(f"{option} {folder}: {there} cannot be written")


def make_folder(folder: str | None) -> None:
    """Make a folder for results, before the work that they take.

    Raises:
        UsageError: if that cannot be done.
    """
    if folder is not None:
        with writing(Path(folder)):
            Path(folder).mkdir(parents=True, exist_ok=True)


def mask_files(folder: Path, data: Data, root: Path) -> list[Path]:
    """Where the predicted mask of each image goes: below ``folder``, as its name with ``.png``.

    Names that would meet in one file keep their own ending, ``1.jpg.png``, and where that is not
    enough get the id of the image, ``1.jpg.7.png``.

    Args:
        folder: the folder for the masks.
        data: the images.
        root: the folder of the data set, in which no mask joins the images.

    Raises:
        DataError: if a name leads out of the folder.
        UsageError: if a link in the folder leads out of it, or masks would come into a folder of
            the data set that holds images.
    """
    spellings = []
    for image in data.images:
        file = inside(folder, image.name)
        if file is None:
            raise DataError(f"the mask of image {image.name!r} would be outside of {folder}")
        names = (f"{file.stem}.png", f"{file.name}.png", f"{file.name}.{image.id}.png")
        spellings.append([file.with_name(name) for name in names])
    chosen = [0] * len(spellings)
    while True:
        files = [each[n] for each, n in zip(spellings, chosen, strict=True)]
        used = Counter(str(file).casefold() for file in files)
        used.update({str(above).casefold() for file in files for above in file.parents})
        met = [i for i, file in enumerate(files) if used[str(file).casefold()] > 1]
        if not (longer := [i for i in met if chosen[i] < 2]):
            break
        for index in longer:
            chosen[index] += 1
    if met:
        raise DataError(f"two masks would be {files[met[0]]}; give the images names that differ")
    places = {folder.resolve()}
    for file in files:
        try:
            target = file.resolve()
        except OSError as error:
            raise UsageError(f"{file} cannot be written ({error.strerror})") from error
        if not target.is_relative_to(folder.resolve()):
            raise UsageError(f"{file} is a link to {target}; name another folder as save_masks")
        places.add(target.parent)
    for place in sorted(places):
        if place.is_relative_to(root.resolve()) and any(map(_is_image, place.rglob("*"))):
            raise UsageError(
                f"{place} is a folder of the data set {root} and holds images, beside which no "
                "mask is written; name a new folder as save_masks"
            )
    return files


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in Image.registered_extensions()


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
