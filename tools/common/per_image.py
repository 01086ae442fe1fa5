"""per_image.npz: what a model did in each image, enough to judge it on any choice of the images.

Beside the names of the images and of the classes the file has, of a detector, the arrays of
:class:`CocoMatches` (the flags packed into bits); of a segmenter those of :class:`PixelCounts`.
It has no predictions and no pictures: some 20 bytes for a detection, before compression.
"""

from __future__ import annotations

import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common.errors import UsageError
from common.files import replacing

import numpy as np
from numpy.typing import NDArray
from pycocotools.cocoeval import Params
from scipy.sparse import csr_array

from detseg_losses.integrations.coco import CocoMatches

Array = NDArray[np.float64]
NAME = "per_image.npz"
MOST_NUMBERS = 4_000_000
"""Of the precisions that are held at once, 32 MB."""


@dataclass(frozen=True)
class PixelCounts:
    """The confusion matrices of the images, without their zeros.

    Attributes:
        images: names of the images.
        classes: names of the classes.
        image: ``(entries,)``, position in ``images``.
        true: ``(entries,)``, position in ``classes``.
        predicted: ``(entries,)``, position in ``classes``.
        pixels: ``(entries,)``, how many there are.
    """

    images: list[str]
    classes: list[str]
    image: NDArray[np.int32]
    true: NDArray[np.int32]
    predicted: NDArray[np.int32]
    pixels: NDArray[np.int64]


PerImage = CocoMatches | PixelCounts


def pixel_counts(
    images: list[str], classes: list[str], matrices: list[NDArray[np.int64]]
) -> PixelCounts:
    """Take the confusion matrices of the images, rows the true classes."""
    stacked = np.stack(matrices)
    places = np.nonzero(stacked)
    image, true, predicted = (place.astype(np.int32) for place in places)
    return PixelCounts(images, classes, image, true, predicted, stacked[places])


def write_per_image(folder: Path, found: PerImage) -> None:
    """Write per_image.npz, whole or not at all."""
    arrays: dict[str, Any] = {name: np.asarray(v) for name, v in asdict(found).items()}
    if isinstance(found, CocoMatches):
        for name in ("true", "ignored"):
            flags = arrays[name]
            rows = flags.reshape(len(flags), flags.shape[1] * flags.shape[2])
            arrays[name] = np.packbits(rows, axis=1)
    with replacing(folder / NAME) as stream:
        np.savez_compressed(stream, **arrays)


def read_per_image(folder: Path) -> PerImage:
    """Read per_image.npz.

    Raises:
        UsageError: if it is missing or damaged.
    """
    file = folder / NAME
    try:
        with np.load(file, allow_pickle=False) as stored:
            arrays: dict[str, Any] = dict(stored)
        names = {"images": arrays["images"].tolist(), "classes": arrays["classes"].tolist()}
        if "pixels" in arrays:
            return PixelCounts(**(arrays | names))
        shape = len(arrays["scores"]), len(Params("bbox").areaRng), len(Params("bbox").iouThrs)
        for name in ("true", "ignored"):
            bits = np.unpackbits(arrays[name], axis=1, count=shape[1] * shape[2])
            arrays[name] = bits.reshape(shape).astype(np.bool_)
        return CocoMatches(**(arrays | names))
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error.strerror or error}") from error
    except (KeyError, TypeError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UsageError(f"{file} is damaged: {error}") from error


def judge(found: PerImage, weights: NDArray[Any]) -> dict[str, Array]:
    """The metrics, each image counted as often as ``weights`` say.

    Args:
        found: of each image.
        weights: whole numbers, ``(choices, images)``.

    Returns:
        By name the metric of each choice, as in metrics.json; those of the classes are called
        ``AP of cat``, ``IoU of cat``. NaN where nothing can be computed. Weights of 1 give what is
        in metrics.json.
    """
    return (_judge_boxes if isinstance(found, CocoMatches) else _judge_pixels)(found, weights)


def _judge_boxes(found: Any, weights: NDArray[Any]) -> dict[str, Array]:
    matches = _Matches(found)
    numbers = len(matches.curves) * len(matches.recalls)
    step = max(1, MOST_NUMBERS // numbers)
    parts = [matches.judge(weights[i : i + step]) for i in range(0, len(weights), step)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


class _Curve:
    """True positives of one class, area and threshold, and who was judged up to each."""

    def __init__(self, image: NDArray[np.int32], true: Any, judged: Any, images: int) -> None:
        places = np.flatnonzero(true)
        self.image = image[places]
        each = np.flatnonzero(judged)
        part = np.searchsorted(places, each)
        each, part = each[part < len(places)], part[part < len(places)]
        self.judged = csr_array(
            (np.ones(len(each)), (part, image[each])), shape=(len(places), images)
        )

    def precision(self, weights: Array, objects: Array, recalls: Array) -> Array:
        """The highest precision at each recall or beyond, ``(choices, recalls)``.

        Multiplicities are as good as copies of the images: copies of a true positive only raise
        the precision, and those of a false one only lower it.
        """
        true = weights[self.image].cumsum(0)
        judged = (self.judged @ weights).cumsum(0)
        precision = true / (judged + np.spacing(1))
        best = np.maximum.accumulate(precision[::-1])[::-1]
        with np.errstate(invalid="ignore", divide="ignore"):
            reached = np.searchsorted(recalls, true / objects, side="right")
        # Each recall takes the precision of the first true positive that reaches it, or 0.
        reached = np.vstack([np.zeros_like(reached[:1]), reached]) if len(reached) else reached
        counts = np.zeros((len(self.image) + 1, weights.shape[1]), np.int64)
        if len(reached):
            counts[:-1] = np.diff(reached, axis=0)
        counts[-1] = len(recalls) - counts[:-1].sum(0)
        values = np.vstack([best, np.zeros(weights.shape[1])])
        return np.repeat(values.T.ravel(), counts.T.ravel()).reshape(-1, len(recalls))


class _Matches:
    """Sorts the detections once, for all choices of images."""

    def __init__(self, found: CocoMatches) -> None:
        params = Params("bbox")
        self.classes, self.recalls = found.classes, params.recThrs
        self.objects = found.objects
        self.shape = len(found.classes), len(params.areaRng), len(params.iouThrs)
        self.curves: list[_Curve] = []
        for label in range(self.shape[0]):
            own = np.flatnonzero(found.label == label)
            own = own[np.argsort(-found.scores[own], kind="mergesort")]
            for area in range(self.shape[1]):
                for threshold in range(self.shape[2]):
                    true, ignored = (
                        flags[own, area, threshold] for flags in (found.true, found.ignored)
                    )
                    self.curves.append(_Curve(found.image[own], true, ~ignored, len(found.images)))

    def judge(self, weights: NDArray[Any]) -> dict[str, Array]:
        """The metrics of each choice."""
        transposed = np.ascontiguousarray(weights.T, np.float64)
        classes, areas, thresholds = self.shape
        precision = np.full((areas, len(weights), thresholds, len(self.recalls), classes), -1.0)
        curves = iter(self.curves)
        for label in range(classes):
            for area in range(areas):
                objects = weights @ self.objects[label, :, area].astype(np.float64)
                for threshold in range(thresholds):
                    found = next(curves).precision(transposed, objects, self.recalls)
                    found[objects == 0] = -1
                    precision[area, :, threshold, :, label] = found
        metrics = {"AP": _means(precision[0])}
        metrics["AP50"] = _means(precision[0][:, 0])
        metrics["AP75"] = _means(precision[0][:, 5])
        for letter, values in zip("sml", precision[1:], strict=True):
            metrics[f"AP{letter}"] = _means(values)
        for label, name in enumerate(self.classes):
            metrics[f"AP of {name}"] = _means(precision[0][..., label])
        return metrics


def _means(values: Array) -> Array:
    """The mean of what could be computed, in pycocotools' order, of each choice."""
    rows = values.reshape(len(values), -1)
    there = rows > -1
    if there.all():
        return rows.mean(1)
    return np.array(
        [row[ok].mean() if ok.any() else np.nan for row, ok in zip(rows, there, strict=True)]
    )


def _judge_pixels(found: Any, weights: NDArray[Any]) -> dict[str, Array]:
    shape = len(found.images), len(found.classes)
    hits, true, predicted = np.zeros((3, *shape))
    same = found.true == found.predicted
    np.add.at(hits, (found.image[same], found.true[same]), found.pixels[same])
    np.add.at(true, (found.image, found.true), found.pixels)
    np.add.at(predicted, (found.image, found.predicted), found.pixels)
    hits, true, predicted = (weights @ each for each in (hits, true, predicted))
    both = true + predicted
    occurs = both > 0
    number = occurs.sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        iou, dice = hits / (both - hits), 2 * hits / both
        metrics = {
            "mIoU": np.where(occurs, iou, 0).sum(1) / number,
            "mean_dice": np.where(occurs, dice, 0).sum(1) / number,
            "pixel_accuracy": hits.sum(1) / true.sum(1),
        }
    return metrics | {f"IoU of {name}": iou[:, k] for k, name in enumerate(found.classes)}
