"""Reading COCO annotation files, and COCO's average precision by pycocotools."""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeGuard, TypeVar

from detseg_losses.integrations.extras import needs
from detseg_losses.integrations.samples import (
    VOID,
    DataError,
    DetectionData,
    DetectionRecord,
    DetectionSample,
    Extra,
    Fault,
    Faulty,
    ImageData,
    ImageFile,
    Objects,
    SegmentationSample,
    category_names,
    check_box,
    check_image,
    choose_classes,
    read_image,
    to_results,
    usable_results,
)

with needs("tools"):
    import numpy as np
    from numpy.typing import NDArray
    from pycocotools import mask as rle
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

__all__ = [
    "CocoDetection",
    "CocoSegmentation",
    "coco_metrics",
    "coco_splits",
    "find_coco",
    "load_annotations",
    "load_results",
    "to_results",
]

ItemT = TypeVar("ItemT")
Report = Callable[[str, object], None]


class CocoDetection(DetectionData):
    """The boxes of a COCO annotation file.

    Labels follow the ids of the categories, upwards; ``category_ids`` leads back to them. Images
    without objects are kept, unless ``classes`` are chosen. Faulty entries (a box without area or
    outside the image, an unknown category or image, a missing or broken image, an image whose
    size is not what the file says) are listed in ``faults``; a box partly outside is clipped.

    Args:
        annotations: the JSON file.
        images: the directory that its ``file_name`` entries are relative to.
        classes: keep only these classes, labelled in this order, and the images that hold any.
        faulty: ``"skip"`` what is faulty, or ``"refuse"`` to read data with any fault.
        extra: ``"masks"`` or ``"keypoints"``: give those, too; an object without is faulty.

    Raises:
        DataError: the file is no COCO annotation file, a class is unknown, nothing usable is left,
            no object has what ``extra`` asks for, or a fault was found and ``faulty="refuse"``.
    """

    def __init__(
        self,
        annotations: Path,
        images: Path,
        *,
        classes: Sequence[str] | None = None,
        faulty: Faulty = "skip",
        extra: Extra | None = None,
    ) -> None:
        faults: list[Fault] = []
        parse = {None: _parse_box, "masks": _parse_outlined, "keypoints": _parse_pointed}[extra]
        categories, items = _read(annotations, images, classes, faults, parse)
        boxes = [box for _, found in items for box in found]
        if extra is not None and not boxes:
            raise DataError(f"{annotations}: there is no object with {extra}")
        if extra == "keypoints":
            self.mirrored = _mirrored(annotations, categories, boxes)
        self.category_ids = [category["id"] for category in categories]
        super().__init__(
            [
                DetectionRecord(image, _objects(found, extra, len(self.mirrored)))
                for image, found in items
            ],
            [category["name"] for category in categories],
            faults,
            faulty,
        )

    def __getitem__(self, index: int) -> DetectionSample:
        sample = super().__getitem__(index)
        outlines = self._records[index].objects.segmentations
        if outlines is not None:
            height, width = sample.image.shape[:2]
            masks = np.zeros((len(outlines), height, width), np.uint8)
            for mask, outline in zip(masks, outlines, strict=True):
                mask[:] = rle.decode(_encode(outline, height, width))
            sample.masks = masks
        return sample


@dataclass(frozen=True)
class _Box:
    bbox: tuple[float, float, float, float]
    label: int
    area: float
    crowd: bool
    segmentation: Any = None
    keypoints: Sequence[float] = ()


@dataclass(frozen=True)
class _Region:
    segmentation: Any
    label: int
    crowd: bool


@dataclass(frozen=True)
class _RegionRecord:
    image: ImageFile
    regions: list[_Region]


class CocoSegmentation(ImageData[_RegionRecord, SegmentationSample]):
    """Semantic masks drawn from the instances of a COCO annotation file (polygons or RLE).

    ``classes[0]`` is the background; the others follow as in :class:`CocoDetection`. Where
    instances overlap, the smaller one is drawn over the larger one, whatever their order in the
    file, so that none is hidden; crowds are void (255) and lie under everything else.

    Arguments and errors are those of :class:`CocoDetection`; instead of the box, the segmentation
    of each object is checked.
    """

    def __init__(
        self,
        annotations: Path,
        images: Path,
        *,
        classes: Sequence[str] | None = None,
        faulty: Faulty = "skip",
    ) -> None:
        faults: list[Fault] = []
        categories, items = _read(annotations, images, classes, faults, _parse_region)
        names = [category["name"] for category in categories]
        records = [_RegionRecord(image, regions) for image, regions in items]
        if len(names) >= VOID:
            raise DataError(f"{annotations}: {len(names)} classes do not fit into a mask of bytes")
        super().__init__(records, ["background", *names], faults, faulty)

    def __getitem__(self, index: int) -> SegmentationSample:
        record = self._records[index]
        image = record.image
        return SegmentationSample(
            image=read_image(image.path, image.upright),
            mask=_draw(record.regions, image.height, image.width),
            image_id=image.id,
            name=image.name,
        )


def _draw(regions: list[_Region], height: int, width: int) -> NDArray[np.uint8]:
    mask = np.zeros((height, width), np.uint8)
    encoded = []
    for region in regions:
        part = _encode(region.segmentation, height, width)
        encoded.append((not region.crowd, -int(rle.area(part)), region, part))
    for _, _, region, part in sorted(encoded, key=lambda entry: entry[:2]):
        mask[rle.decode(part).astype(bool)] = VOID if region.crowd else region.label + 1
    return mask


def _encode(segmentation: Any, height: int, width: int) -> Any:
    """Polygons or any RLE as compressed RLE."""
    if isinstance(segmentation, list):
        return rle.merge(rle.frPyObjects(segmentation, height, width))
    if isinstance(segmentation["counts"], list):
        return rle.frPyObjects(segmentation, height, width)
    return segmentation


def _parse_box(
    annotation: dict[str, Any], label: int, image: dict[str, Any], report: Report
) -> _Box | None:
    bbox = annotation.get("bbox")
    if not _are_numbers(bbox, 4):
        report("bbox is not four numbers", bbox)
        return None
    x, y, w, h = map(float, bbox)
    clipped, fault = check_box((x, y, x + w, y + h), image["width"], image["height"])
    if fault:
        report(fault, f"bbox {bbox} in an image of {image['width']}x{image['height']}")
    if clipped is None:
        return None
    if clipped != (x, y, x + w, y + h):
        x, y = clipped[:2]
        w, h = clipped[2] - x, clipped[3] - y
    area = annotation.get("area")
    crowd = bool(annotation.get("iscrowd", 0))
    return _Box((x, y, w, h), label, w * h if area is None else float(area), crowd)


def _parse_region(
    annotation: dict[str, Any], label: int, image: dict[str, Any], report: Report
) -> _Region | None:
    segmentation = annotation.get("segmentation")
    size = [image["height"], image["width"]]
    if not segmentation:
        report("object has no segmentation", None)
        return None
    if isinstance(segmentation, dict):
        if segmentation.get("size") != size or "counts" not in segmentation:
            report("RLE is not of the image's size", f"{segmentation.get('size')} for {size}")
            return None
    elif not all(_are_numbers(p) and len(p) >= 6 and len(p) % 2 == 0 for p in segmentation):
        report("polygon is not a list of three or more points x, y", None)
        return None
    return _Region(segmentation, label, bool(annotation.get("iscrowd", 0)))


def _parse_outlined(
    annotation: dict[str, Any], label: int, image: dict[str, Any], report: Report
) -> _Box | None:
    box = _parse_box(annotation, label, image, report)
    region = _parse_region(annotation, label, image, report)
    return replace(box, segmentation=region.segmentation) if box and region else None


def _parse_pointed(
    annotation: dict[str, Any], label: int, image: dict[str, Any], report: Report
) -> _Box | None:
    box = _parse_box(annotation, label, image, report)
    points = annotation.get("keypoints")
    if not points:
        report("object has no keypoints", None)
        return None
    if not _are_numbers(points) or len(points) % 3:
        report("keypoints are not numbers x, y, v of each", points)
        return None
    return replace(box, keypoints=points) if box else None


def _mirrored(file: Path, categories: list[dict[str, Any]], boxes: list[_Box]) -> list[int]:
    """Which keypoint becomes which in a mirror, by the names that a category gives to them."""
    lengths = {len(box.keypoints) // 3 for box in boxes}
    if len(lengths) > 1:
        raise DataError(
            f"{file}: objects have {' or '.join(map(str, sorted(lengths)))} keypoints; choose "
            "classes that have the same"
        )
    (number,) = lengths
    names: list[str] = categories[0].get("keypoints") or []
    if len(names) != number:
        return list(range(number))
    swapped = [_OTHER_SIDE.sub(lambda side: _SIDES[side[0]], name) for name in names]
    return [names.index(o) if o in names else i for i, o in enumerate(swapped)]


_SIDES = {"left": "right", "right": "left"}
_OTHER_SIDE = re.compile("left|right")


def _objects(boxes: list[_Box], extra: Extra | None, points: int) -> Objects:
    keypoints = None
    if extra == "keypoints":
        keypoints = np.array([box.keypoints for box in boxes], np.float32).reshape(-1, points, 3)
    return Objects(
        boxes=np.array([box.bbox for box in boxes], np.float64).reshape(-1, 4),
        labels=np.array([box.label for box in boxes], np.int64),
        areas=np.array([box.area for box in boxes], np.float64),
        crowd=np.array([box.crowd for box in boxes], np.bool_),
        difficult=np.zeros(len(boxes), np.bool_),
        segmentations=[box.segmentation for box in boxes] if extra == "masks" else None,
        keypoints=keypoints,
    )


def _read(
    file: Path,
    directory: Path,
    classes: Sequence[str] | None,
    faults: list[Fault],
    parse: Callable[[dict[str, Any], int, dict[str, Any], Report], ItemT | None],
) -> tuple[list[dict[str, Any]], list[tuple[ImageFile, list[ItemT]]]]:
    """The categories, and the usable images with what ``parse`` made of the objects."""
    content = load_annotations(file)
    by_id = category_names(content["categories"])
    known_ids = sorted(by_id)
    known_names = [by_id[i] for i in known_ids]
    chosen = choose_classes(known_names, classes, file)
    category_ids = [known_ids[i] for i in chosen]
    label_of = {category: label for label, category in enumerate(category_ids)}

    entries = {image["id"]: image for image in content["images"]}
    items: dict[int, list[ItemT]] = {image_id: [] for image_id in entries}
    for index, annotation in enumerate(content["annotations"]):

        def report(reason: str, value: object, index: int = index) -> None:
            faults.append(Fault(file, index, reason, value))

        image_id, category = annotation.get("image_id"), annotation.get("category_id")
        if image_id not in entries:
            report("image id is not among the file's images", image_id)
        elif category not in by_id:
            report("category id is not among the file's categories", category)
        elif category in label_of:
            item = parse(annotation, label_of[category], entries[image_id], report)
            if item is not None:
                items[image_id].append(item)

    usable = []
    for entry in content["images"]:
        found = items[entry["id"]]
        if classes is not None and not found:
            continue
        path = directory / entry["file_name"]
        judged = check_image(path, (entry["width"], entry["height"]), faults)
        if judged is not None:
            usable.append((ImageFile(entry["id"], entry["file_name"], path, *judged), found))
    by_category = {category["id"]: category for category in content["categories"]}
    return [by_category[i] | {"name": by_id[i]} for i in category_ids], usable


def _are_numbers(values: object, length: int | None = None) -> TypeGuard[list[float]]:
    return (
        isinstance(values, list)
        and (length is None or len(values) == length)
        and all(isinstance(value, (int, float)) for value in values)
    )


def coco_splits(root: Path, extra: Extra | None = None) -> list[str]:
    """The splits of a data set in one of the layouts that :func:`find_coco` knows, sorted."""
    return sorted(_annotation_files(root, extra))


def find_coco(root: Path, split: str, extra: Extra | None = None) -> tuple[Path, Path]:
    """The annotation file and the image directory of a split.

    Known layouts: ``annotations/instances_<split>.json`` with the images in ``<split>/``,
    ``images/<split>/`` or ``images/``; and ``<split>/_annotations.coco.json`` beside its images.
    ``train`` also finds ``train2017``, where that is the only split of the form ``train<year>``.
    For ``"keypoints"`` the file ``annotations/person_keypoints_<split>.json``, where there is one,
    stands for that of the instances.

    Raises:
        DataError: there is no such split (those that exist are named), or no image directory.
    """
    files = _annotation_files(root, extra)
    if split not in files:
        dated = [name for name in files if re.fullmatch(re.escape(split) + r"\d+", name)]
        if len(dated) != 1:
            raise DataError(
                f"{root}: neither annotations/instances_{split}.json nor "
                f"{split}/_annotations.coco.json is there; "
                f"splits found: {', '.join(sorted(files)) or 'none'}"
            )
        split = dated[0]
    if files[split].name == "_annotations.coco.json":
        return files[split], files[split].parent
    candidates = [root / split, root / "images" / split, root / "images"]
    for directory in candidates:
        if directory.is_dir():
            return files[split], directory
    raise DataError(
        f"{files[split]}: its images were looked for in {', '.join(map(str, candidates))}, "
        "and none of these directories exists"
    )


def _annotation_files(root: Path, extra: Extra | None = None) -> dict[str, Path]:
    files = {f.parent.name: f for f in root.glob("*/_annotations.coco.json")}
    for prefix in ("instances_", "person_keypoints_") if extra == "keypoints" else ("instances_",):
        for file in (root / "annotations").glob(f"{prefix}*.json"):
            files[file.stem.removeprefix(prefix)] = file
    return files


_REQUIRED: dict[str, dict[str, type]] = {
    "images": {"id": int, "file_name": str, "width": int, "height": int},
    "categories": {"id": int, "name": str},
    "annotations": {},
}


def load_annotations(file: Path) -> dict[str, Any]:
    """The content of a COCO annotation file.

    Raises:
        DataError: the file is missing, is not JSON, or lacks what makes it an annotation file.
    """
    content = _load_json(file)
    if not isinstance(content, dict):
        raise DataError(
            f"{file}: is a list, as results files are; an annotation file has images, annotations "
            "and categories"
        )
    for section, required in _REQUIRED.items():
        if not isinstance(content.get(section), list):
            raise DataError(f"{file}: has no list of {section}; a COCO annotation file needs one")
        ids = set()
        for index, entry in enumerate(content[section]):
            if not isinstance(entry, dict):
                raise DataError(f"{file}: {section}[{index}] is {entry!r} and not an object")
            for key, kind in required.items():
                if not isinstance(entry.get(key), kind):
                    raise DataError(
                        f"{file}: {section}[{index}] has {key} = {entry.get(key)!r}; "
                        f"make it {'an integer' if kind is int else 'a string'}"
                    )
            if required and entry["id"] in ids:
                raise DataError(f"{file}: {section}[{index}] repeats the id {entry['id']}")
            ids.add(entry.get("id"))
    return content


def load_results(file: Path) -> list[dict[str, Any]]:
    """The predictions in a COCO results file.

    Raises:
        DataError: the file is missing, is not JSON, or an entry (named by its index) is not a box
            with an image id, a category id and a score.
    """
    content = _load_json(file)
    if not isinstance(content, list):
        raise DataError(
            f"{file}: is no list; a results file is a list of entries with image_id, category_id, "
            "bbox and score"
        )
    for index, entry in enumerate(content):
        for key in ("image_id", "category_id", "bbox", "score"):
            if not isinstance(entry, dict) or key not in entry:
                raise DataError(f"{file}: entry {index} has no {key!r}")
        numbers = [*entry["bbox"], entry["score"]] if _are_numbers(entry["bbox"], 4) else None
        if not _are_numbers(numbers) or not np.isfinite(np.array(numbers)).all():
            raise DataError(
                f"{file}: entry {index} has the bbox {entry['bbox']} and the score "
                f"{entry['score']!r}; needed are x, y, width, height and a score, finite numbers"
            )
    return content


def _load_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise DataError(f"{file}: is not valid JSON ({error})") from error


_NUMBERS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


class _Evaluation(COCOeval):
    """Ignores difficult objects as COCOeval ignores crowds, but matches them by plain IoU."""

    def _prepare(self) -> None:
        super()._prepare()
        for objects in self._gts.values():
            for annotation in objects:
                annotation["ignore"] = annotation["ignore"] or annotation.get("difficult", 0)


def coco_metrics(ground_truth: dict[str, Any], results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """COCO's twelve numbers for boxes, computed by pycocotools, and the AP of each class.

    The values are those of pycocotools, with three differences where it has no value to give:
    a number that cannot be computed is None and not -1, predictions for images outside the ground
    truth are left out instead of stopping the program, and objects marked ``difficult: 1`` (VOC)
    count neither as found nor as missed.

    Args:
        ground_truth: the content of an annotation file; ``area`` and ``iscrowd`` may be absent.
        results: the content of a results file, boxes XYWH.

    Returns:
        ``AP``, ``AP50``, ``AP75``, ``APs``, ``APm``, ``APl``, ``AR1``, ``AR10``, ``AR100``,
        ``ARs``, ``ARm``, ``ARl``; ``per_class``, AP by class name; and ``notes``, one sentence for
        each reason why a number is None or predictions were left out.

    Raises:
        DataError: the ground truth has no images, or an object of it no box, image or category.
    """
    notes: list[str] = []
    usable = usable_results(ground_truth, results, notes)
    evaluation = _evaluate(ground_truth, usable)
    metrics: dict[str, Any] = {
        name: _defined(value) for name, value in zip(_NUMBERS, evaluation.stats, strict=True)
    }
    # precision: (thresholds, recalls, classes, areas, detections); -1 where there is no object
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    names = category_names(ground_truth["categories"])
    metrics["per_class"] = {
        names[category]: _defined(precision[:, :, k].mean())
        for k, category in enumerate(evaluation.params.catIds)
    }
    metrics["notes"] = notes + list(_reasons(metrics))
    return metrics


def _evaluate(ground_truth: dict[str, Any], results: list[dict[str, Any]]) -> COCOeval:
    if not ground_truth["images"]:
        raise DataError("ground truth: there are no images, so nothing can be judged")
    objects = []
    for number, annotation in enumerate(ground_truth["annotations"], start=1):
        for key in ("image_id", "category_id"):
            if key not in annotation:
                raise DataError(f"ground truth: annotations[{number - 1}] has no {key}")
        bbox = annotation.get("bbox")
        if not _are_numbers(bbox, 4):
            raise DataError(
                f"ground truth: annotations[{number - 1}] has the bbox {bbox}; boxes can only be "
                "judged where each object has four numbers x, y, width, height"
            )
        objects.append(
            {
                "area": bbox[2] * bbox[3],
                "iscrowd": 0,
                # pycocotools takes an object with the id 0 for one that was never found
                **{key: annotation[key] for key in annotation if key != "segmentation"},
                "id": number,
            }
        )
    with contextlib.redirect_stdout(io.StringIO()):
        truth, predictions = COCO(), COCO()
        truth.dataset = {**ground_truth, "annotations": objects}
        truth.createIndex()
        if results:
            predictions = truth.loadRes([dict(result) for result in results])
        evaluation = _Evaluation(truth, predictions, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def _defined(value: float) -> float | None:
    return None if value == -1 else float(value)


def _reasons(metrics: dict[str, Any]) -> Iterator[str]:
    if metrics["AP"] is None:
        yield "There is no ground truth object that counts, so no number can be computed."
        return
    for size, letter, range_ in (
        ("small", "s", "below 32^2"),
        ("medium", "m", "32^2 to 96^2"),
        ("large", "l", "above 96^2"),
    ):
        if metrics[f"AP{letter}"] is None:
            yield (
                f"The ground truth has no {size} object (area {range_} pixels), so AP{letter} "
                f"and AR{letter} cannot be computed."
            )
    empty = [name for name, value in metrics["per_class"].items() if value is None]
    if empty:
        yield (
            f"The ground truth has no object of {len(empty)} classes, which have no AP and are "
            f"left out of the means: {', '.join(empty)}."
        )
