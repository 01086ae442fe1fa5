"""Reading COCO annotation files, and COCO's average precision by pycocotools."""

from __future__ import annotations

import contextlib
import io
import json
import math
import operator
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

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
    Id,
    ImageData,
    ImageFile,
    Objects,
    SegmentationSample,
    category_names,
    check_box,
    check_content,
    check_ground_truth,
    check_image,
    check_results,
    choose_classes,
    id_order,
    inside,
    read_image,
    read_text,
    shown,
    summarize_faults,
    to_area,
    to_flag,
    to_id,
    to_number,
    to_numbers,
    to_results,
    usable_objects,
    usable_results,
)

with needs("tools"):
    import numpy as np
    from numpy.typing import NDArray
    from pycocotools import mask as rle
    from pycocotools.cocoeval import COCOeval

__all__ = [
    "CocoDetection",
    "CocoMatches",
    "CocoSegmentation",
    "coco_evaluation",
    "coco_metrics",
    "coco_splits",
    "find_coco",
    "load_annotations",
    "load_results",
    "to_results",
]

ItemT = TypeVar("ItemT")
Report = Callable[[str, object], None]
Bbox = tuple[float, float, float, float]


class CocoDetection(DetectionData):
    """The boxes of a COCO annotation file.

    Labels follow the ids of the categories, upwards; ``category_ids`` leads back to them. Ids may
    be integers or text. Images without objects are kept, unless ``classes`` are chosen. Faulty
    entries (a box without area or outside the image, an unknown category or image, a flag that is
    neither 0 nor 1, a missing or broken image, one outside of the folder, one whose size is not
    what the file says) are listed in ``faults``; a box partly outside is clipped, and an area that
    is no number becomes that of the box. Numbers written as text are read as numbers. Crowds and
    objects with ``ignore: 1`` or ``difficult: 1`` are ignored.

    Args:
        annotations: the JSON file.
        images: the directory that its ``file_name`` entries are relative to; they may begin with
            the last folders of it.
        classes: keep only these classes, labelled in this order, and the images that hold any.
        faulty: ``"skip"`` what is faulty, or ``"refuse"`` to read data with any fault.
        extra: ``"masks"`` or ``"keypoints"``: give those, too; an object without is faulty.

    Raises:
        DataError: the file is no COCO annotation file, a class is unknown, nothing usable is left,
            no object has what ``extra`` asks for, or a fault was found and ``faulty="refuse"``.
    """

    def __init__(
        self,
        annotations: Path | str,
        images: Path | str,
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
            found = f": {summarize_faults(faults)}" if faults else ""
            raise DataError(f"{annotations}: there is no object with {extra}{found}")
        if extra == "keypoints":
            self.mirrored = _mirrored(Path(annotations), categories, boxes)
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
    bbox: Bbox
    label: int
    area: float
    crowd: bool
    ignored: bool
    segmentation: Any = None
    keypoints: Sequence[float] = ()


@dataclass(frozen=True)
class _Region:
    """An object's outline; without one its box, which is void."""

    segmentation: Any
    label: int
    void: bool
    bbox: Bbox = (0, 0, 0, 0)


@dataclass(frozen=True)
class _RegionRecord:
    image: ImageFile
    regions: list[_Region]


class CocoSegmentation(ImageData[_RegionRecord, SegmentationSample]):
    """Semantic masks drawn from the instances of a COCO annotation file (polygons or RLE).

    ``classes[0]`` is the background; the others follow as in :class:`CocoDetection`. Where
    instances overlap, the smaller one is drawn over the larger one, whatever their order in the
    file, so that none is hidden; crowds are void (255) and lie under everything else.

    The box of an object that cannot be drawn (without one, that of its finite points) is void, too,
    and so are objects to be ignored and
    objects whose category is faulty or unknown, whatever ``classes`` are chosen. Parts of a polygon
    that are faulty (not three points of finite numbers, far beyond the image, or drawing nothing)
    are dropped and listed in ``faults``. RLE must cover the image; only a last run of background
    may be missing, where the object's area and box, or the one that is stated, show that nothing
    else is.

    Arguments and errors are those of :class:`CocoDetection`; instead of the box, the segmentation
    of each object is checked.
    """

    def __init__(
        self,
        annotations: Path | str,
        images: Path | str,
        *,
        classes: Sequence[str] | None = None,
        faulty: Faulty = "skip",
    ) -> None:
        faults: list[Fault] = []
        categories, items = _read(annotations, images, classes, faults, _parse_region, unknown=True)
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
        if region.segmentation is None:
            x, y, w, h = region.bbox
            mask[int(y) : math.ceil(y + h), int(x) : math.ceil(x + w)] = VOID
        else:
            part = _encode(region.segmentation, height, width)
            encoded.append((not region.void, -int(rle.area(part)), region, part))
    for _, _, region, part in sorted(encoded, key=lambda entry: entry[:2]):
        mask[rle.decode(part).astype(bool)] = VOID if region.void else region.label + 1
    return mask


def _encode(segmentation: Any, height: int, width: int) -> Any:
    """Polygons or compressed RLE as compressed RLE."""
    if isinstance(segmentation, list):
        return rle.merge(rle.frPyObjects(segmentation, height, width))
    return segmentation


def _parse_box(
    annotation: dict[str, Any], label: int, image: ImageFile, report: Report
) -> _Box | None:
    bbox, fault = _clipped(annotation.get("bbox"), image)
    if fault:
        found = shown(annotation.get("bbox"))
        report(fault, f"bbox {found} in an image of {image.width}x{image.height}")
    flags = _flags(annotation, report)
    if bbox is None or flags is None:
        return None
    area, fault = to_area(annotation, bbox[2] * bbox[3])
    if fault:
        report(fault, shown(annotation["area"]))
    return _Box(bbox, label, area, *flags)


def _clipped(bbox: Any, image: ImageFile) -> tuple[Bbox | None, str | None]:
    """The XYWH box of an object within its image, and the fault, as in :func:`check_box`."""
    numbers = to_numbers(bbox, 4)
    if numbers is None:
        return None, "bbox is not four finite numbers"
    x, y, w, h = numbers
    clipped, fault = check_box((x, y, x + w, y + h), image.width, image.height)
    if clipped is not None and clipped != (x, y, x + w, y + h):
        x, y = clipped[:2]
        w, h = clipped[2] - x, clipped[3] - y
    return None if clipped is None else (x, y, w, h), fault


def _flags(annotation: dict[str, Any], report: Report) -> tuple[bool, bool] | None:
    """Whether an object is a crowd, and whether it is to be ignored."""
    flags = [to_flag(annotation.get(key)) for key in ("iscrowd", "ignore", "difficult")]
    for key, flag in zip(("iscrowd", "ignore", "difficult"), flags, strict=True):
        if flag is None:
            report(f"{key} is neither 0 nor 1", shown(annotation[key]))
    crowd, ignored, difficult = flags
    if crowd is None or ignored is None or difficult is None:
        return None
    return crowd, ignored or difficult


def _parse_region(
    annotation: dict[str, Any], label: int, image: ImageFile, report: Report
) -> _Region | None:
    flags = _flags(annotation, report)
    void = flags is None or any(flags) or label == _UNKNOWN
    segmentation = _parse_segmentation(annotation, image, report)
    if segmentation is not None:
        return _Region(segmentation, label, void)
    for stated in (annotation.get("bbox"), _around(annotation.get("segmentation"))):
        bbox, _ = _clipped(stated, image)
        if bbox is not None:
            return _Region(None, label, True, bbox)
    report("object has neither outline nor box in the image; none of its pixels are void", None)
    return None


def _around(segmentation: Any) -> Bbox | None:
    """The XYWH box around the finite points of polygons, whatever else is wrong with them."""
    if not isinstance(segmentation, list):
        return None
    parts = [segmentation, *segmentation]  # the whole may be a flat polygon
    pairs = [
        (x, y)
        for part in parts
        if isinstance(part, list)
        for x, y in zip(map(to_number, part[0::2]), map(to_number, part[1::2]), strict=False)
        if x is not None and y is not None
    ]
    if not pairs:
        return None
    xs, ys = zip(*pairs, strict=True)
    return min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)


def _parse_segmentation(annotation: dict[str, Any], image: ImageFile, report: Report) -> Any:
    """Polygons that draw something, or compressed RLE of the image's size; None without."""
    segmentation = annotation.get("segmentation")
    if isinstance(segmentation, dict):
        encoded, fault = _parse_rle(segmentation, annotation, image)
        if fault:
            report(fault, shown(segmentation))
        return encoded
    if not segmentation or not isinstance(segmentation, list):
        report("object has no segmentation", shown(segmentation) if segmentation else None)
        return None
    if all(isinstance(each, float) or to_number(each) is not None for each in segmentation):
        report("polygon is a flat list of numbers; put it into a list", shown(segmentation))
        return None
    polygons = []
    for part in segmentation:
        numbers = to_numbers(part)
        if fault := _polygon_fault(numbers, image):
            report(f"part of a polygon {fault}, dropped", shown(part))
        else:
            polygons.append(numbers)
    return polygons or None


_REACH = 10
"""How many times the longer side of the image a polygon may reach beyond it."""


def _polygon_fault(numbers: list[float] | None, image: ImageFile) -> str | None:
    """What is wrong with one part of a polygon.

    pycocotools takes memory for each pixel that an outline passes, inside of the image or not.
    """
    if numbers is None or len(numbers) < 6 or len(numbers) % 2:
        return "is not three or more points x, y of finite numbers"
    xs, ys = numbers[0::2], numbers[1::2]
    left, right, top, bottom = min(xs), max(xs), min(ys), max(ys)
    reach = _REACH * max(image.width, image.height)
    if min(left, top) < -reach or max(right - image.width, bottom - image.height) > reach:
        return "reaches far beyond the image"
    if len(xs) * max(right - left, bottom - top) > _longest(image):
        steps = zip(xs, ys, xs[1:] + xs[:1], ys[1:] + ys[:1], strict=True)
        if sum(max(abs(c - a), abs(d - b)) for a, b, c, d in steps) > _longest(image):
            return "is longer than any outline in the image"
    doubled = sum(map(operator.mul, xs, ys[1:] + ys[:1])) - sum(
        map(operator.mul, ys, xs[1:] + xs[:1])
    )
    # only what is thin or reaches beyond the image can draw nothing; to try all would take long
    thin = abs(doubled) < 4 * max(right - left, bottom - top) + 8
    beyond = min(left, top) < -1 or right > image.width + 1 or bottom > image.height + 1
    if (thin or beyond) and not rle.area(
        rle.frPyObjects([numbers], image.height, image.width)
    ).any():
        return "draws nothing"
    return None


def _longest(image: ImageFile) -> float:
    """More pixels than an outline around every other pixel passes."""
    return 4 * image.width * image.height + 4 * _REACH * (image.width + image.height)


def _parse_rle(
    segmentation: dict[str, Any], annotation: dict[str, Any], image: ImageFile
) -> tuple[dict[str, Any] | None, str | None]:
    """Compressed RLE whose run lengths, which pycocotools does not check, are right; the fault."""
    size = [image.height, image.width]
    if to_numbers(segmentation.get("size"), 2) != size:
        return None, "RLE is not of the image's size"
    counts = segmentation.get("counts")
    compressed = isinstance(counts, (str, bytes))
    runs = _decompress(counts) if isinstance(counts, (str, bytes)) else counts
    if not isinstance(runs, list) or set(map(type, runs)) != {int} or min(runs) < 0:
        return None, "RLE has no valid counts"
    missing = image.width * image.height - sum(runs)
    if missing < 0:
        return None, "RLE is longer than the image"
    if not any(runs[1::2]):
        return None, "RLE draws nothing"
    if compressed and not missing:
        return {"size": size, "counts": counts}, None
    encoded = rle.frPyObjects(
        {"size": size, "counts": [*runs, missing] if missing else runs}, *size
    )
    if missing and (len(runs) % 2 or not _fits(encoded, annotation)):
        return None, "RLE ends before the image does"
    return encoded, None


def _fits(drawn: dict[str, Any], annotation: dict[str, Any]) -> bool:
    """Whether RLE, to which a last run of background was added, shows the object as it is stated.

    Some converters do not write that run; but runs may be lost as well, and then so is the object.
    """
    bbox, area = to_numbers(annotation.get("bbox"), 4), to_number(annotation.get("area"))
    if area is not None and abs(area - float(rle.area(drawn))) > 0.05 * area:
        return False
    if bbox is not None:
        x, y, w, h = (np.array(bbox) - rle.toBbox(drawn)).tolist()
        return max(map(abs, (x, y, x + w, y + h))) <= 1
    return area is not None


def _decompress(counts: str | bytes) -> list[int] | None:
    """The run lengths in COCO's compressed string; None where it is broken.

    Each number is written in groups of 5 bits from the lowest, each group as a character from "0"
    on, with 32 more where another group follows; the highest bit of the last group is the sign.
    From the fourth number on they are differences to the last but one.
    """
    if not counts.isascii():
        return None
    data = counts.encode() if isinstance(counts, str) else counts
    codes = np.frombuffer(data, np.uint8).astype(np.int64) - 48
    if not codes.size or codes.min() < 0 or codes.max() > 63 or codes[-1] & 32:
        return None
    ends = (codes < 32).nonzero()[0]
    starts = np.zeros_like(ends)
    starts[1:] = ends[:-1] + 1
    lengths = ends - starts + 1
    if lengths.max() > 7:  # 35 bits; an image has fewer pixels
        return None
    groups = np.arange(codes.size) - starts.repeat(lengths)
    values = np.add.reduceat((codes & 31) << 5 * groups, starts)
    values -= (codes[ends] >> 4) << 5 * lengths
    values[1::2] = values[1::2].cumsum()
    values[2::2] = values[2::2].cumsum()
    return values.tolist()


def _parse_outlined(
    annotation: dict[str, Any], label: int, image: ImageFile, report: Report
) -> _Box | None:
    box = _parse_box(annotation, label, image, report)
    segmentation = _parse_segmentation(annotation, image, report)
    return replace(box, segmentation=segmentation) if box and segmentation else None


def _parse_pointed(
    annotation: dict[str, Any], label: int, image: ImageFile, report: Report
) -> _Box | None:
    box = _parse_box(annotation, label, image, report)
    points = annotation.get("keypoints")
    if not points:
        report("object has no keypoints", None)
        return None
    numbers = to_numbers(points)
    if numbers is None or len(numbers) % 3 or max(map(abs, numbers)) > _FARTHEST:
        report("keypoints are not finite numbers x, y, v of each", shown(points))
        return None
    if not set(numbers[2::3]) <= {0, 1, 2}:
        report("visibility of a keypoint is not 0, 1 or 2", shown(numbers[2::3]))
        return None
    return replace(box, keypoints=numbers) if box else None


_FARTHEST = 1e9
"""Coordinates of keypoints beyond it are no pixels; float32 must hold them."""


def _mirrored(file: Path | str, categories: list[dict[str, Any]], boxes: list[_Box]) -> list[int]:
    """Which keypoint becomes which in a mirror, by the names that a category gives to them."""
    lengths = {len(box.keypoints) // 3 for box in boxes}
    if len(lengths) > 1:
        raise DataError(
            f"{file}: objects have {' or '.join(map(str, sorted(lengths)))} keypoints; choose "
            "classes that have the same"
        )
    (number,) = lengths
    names = categories[0].get("keypoints")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        names = []
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
        difficult=np.array([box.ignored for box in boxes], np.bool_),
        segmentations=[box.segmentation for box in boxes] if extra == "masks" else None,
        keypoints=keypoints,
    )


_UNKNOWN = -1
"""The label of an object whose category is faulty or unknown."""


def _read(
    file: Path | str,
    directory: Path | str,
    classes: Sequence[str] | None,
    faults: list[Fault],
    parse: Callable[[dict[str, Any], int, ImageFile, Report], ItemT | None],
    *,
    unknown: bool = False,
) -> tuple[list[dict[str, Any]], list[tuple[ImageFile, list[ItemT]]]]:
    """The categories, and the usable images with what ``parse`` made of the objects.

    With ``unknown`` it is given those of unknown categories, too.
    """
    file, directory = Path(file), Path(directory)
    content = load_annotations(file)
    by_id = category_names(content["categories"])
    known_ids = list(by_id)
    chosen = choose_classes(list(by_id.values()), classes, file)
    category_ids = [known_ids[i] for i in chosen]
    label_of = {category: label for label, category in enumerate(category_ids)}

    objects: dict[Id | None, list[tuple[int, dict[str, Any], int]]]
    objects = {image["id"]: [] for image in content["images"]}
    for index, annotation in enumerate(content["annotations"]):
        image_id, category = map(to_id, map(annotation.get, ("image_id", "category_id")))
        if image_id not in objects:
            reason, value = "image id is not among the file's images", annotation.get("image_id")
            faults.append(Fault(file, index, reason, shown(value)))
        elif category is None or category not in by_id:
            reason = "category id is not among the file's categories"
            faults.append(Fault(file, index, reason, shown(annotation.get("category_id"))))
            if unknown:
                objects[image_id].append((index, annotation, _UNKNOWN))
        elif category in label_of:
            objects[image_id].append((index, annotation, label_of[category]))

    usable = []
    for position, entry in enumerate(content["images"]):
        labels = {label for _, _, label in objects[entry["id"]]}
        if classes is not None and labels <= {_UNKNOWN}:
            continue
        image = find_image(entry, position, file, directory, faults)
        if image is None:
            continue
        items = []
        for index, annotation, label in objects[entry["id"]]:

            def report(reason: str, value: object, index: int = index) -> None:
                faults.append(Fault(file, index, reason, value))

            item = parse(annotation, label, image, report)
            if item is not None:
                items.append(item)
        if items or classes is None:
            usable.append((image, items))
    by_category = {category["id"]: category for category in content["categories"]}
    return [by_category[i] | {"name": by_id[i]} for i in category_ids], usable


def find_image(
    entry: dict[str, Any], index: int, file: Path, directory: Path, faults: list[Fault]
) -> ImageFile | None:
    """The image that an entry of an annotation file means; None, and a fault more, where unusable.

    Its name is relative to ``directory``, or begins with the last folders of that.

    Args:
        entry: from :func:`load_annotations`.
        index: its position.
        file: the annotation file.
        directory: the folder of the images.
        faults: faults are added here.
    """
    name = entry.get("file_name")
    path = inside(directory, name) if isinstance(name, str) else None
    if path is None:
        reason = "file_name is not a path inside of the folder of the images"
        faults.append(Fault(file, index, reason, shown(name)))
        return None
    stated = [entry.get("width"), entry.get("height")]
    size = to_numbers(stated)
    if stated != [None, None] and (size is None or min(size) <= 0):
        reason = "width and height of the image are not positive numbers"
        faults.append(Fault(file, index, reason, shown(stated)))
        return None
    parts = path.relative_to(directory).parts
    for number in range(1, len(parts)):
        if parts[:number] == directory.parts[-number:] and not path.exists():
            path = directory.joinpath(*parts[number:])
    judged = check_image(path, (size[0], size[1]) if size else None, faults)
    return judged and ImageFile(entry["id"], "/".join(parts), path, *judged)


def coco_splits(root: str | Path, extra: Extra | None = None) -> list[str]:
    """The splits of a data set in one of the layouts that :func:`find_coco` knows, sorted."""
    return sorted(_annotation_files(Path(root), extra))


def find_coco(root: str | Path, split: str, extra: Extra | None = None) -> tuple[Path, Path]:
    """The annotation file and the image directory of a split.

    Known layouts: ``annotations/instances_<split>.json`` with the images in ``<split>/``,
    ``images/<split>/`` or ``images/``; and ``<split>/_annotations.coco.json`` beside its images.
    ``train`` also finds ``train2017``, where that is the only split of the form ``train<year>``.
    For ``"keypoints"`` the file ``annotations/person_keypoints_<split>.json``, where there is one,
    stands for that of the instances.

    Raises:
        DataError: there is no such split (those that exist are named), or no image directory.
    """
    root = Path(root)
    files = _annotation_files(root, extra)
    if split not in files:
        dated = [name for name in files if re.fullmatch(re.escape(split) + r"\d+", name)]
        if len(dated) != 1:
            raise DataError(
                f"{root}: there is no split {shown(split)}, neither "
                "annotations/instances_<split>.json nor <split>/_annotations.coco.json; "
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
    return {name: file for name, file in files.items() if inside(root, name)}


def load_annotations(file: Path | str) -> dict[str, Any]:
    """The content of a COCO annotation file, see :func:`check_content`.

    Raises:
        DataError: the file cannot be read, is not JSON, or lacks what makes it an annotation file.
    """
    return check_content(_load_json(file), file)


def load_results(file: Path | str) -> list[dict[str, Any]]:
    """The predictions in a COCO results file, see :func:`check_results`.

    Raises:
        DataError: the file cannot be read, is not JSON, or an entry (named by its index) is not a
            box with an image id, a category id and a score.
    """
    return check_results(_load_json(file), file)


def _load_json(file: Path | str) -> Any:
    text = read_text(Path(file))
    try:
        return json.loads(text)
    except ValueError as error:
        raise DataError(f"{file}: is not valid JSON ({error})") from error
    except RecursionError as error:
        raise DataError(f"{file}: is not valid JSON (nested too deeply)") from error


def coco_metrics(
    ground_truth: dict[str, Any], results: Sequence[dict[str, Any]], *, max_dets: int = 100
) -> dict[str, Any]:
    """COCO's twelve numbers for boxes, and the AP of each class.

    The values are those of pycocotools, with these differences: a number that cannot be computed
    is None and not -1, predictions for images outside the ground truth are left out instead of
    stopping the program, and objects marked ``difficult: 1`` (VOC) or ``ignore: 1`` count neither
    as found nor as missed.

    Args:
        ground_truth: the content of an annotation file. ``area`` may be absent, null or faulty:
            that of the box is taken. Ids may be integers or text.
        results: the content of a results file, boxes XYWH.
        max_dets: how many predictions of one class in one image count, the most confident ones; at
            least 10. The sizes' AP and AR, and all but ``AR1`` and ``AR10``, are taken at it.

    Returns:
        ``AP``, ``AP50``, ``AP75``, ``APs``, ``APm``, ``APl``, ``AR1``, ``AR10``, ``AR100`` (or
        what ``max_dets`` is), ``ARs``, ``ARm``, ``ARl``; ``per_class``, AP by class name; and
        ``notes``, one sentence for each reason why a number is None or something was left out.

    Raises:
        DataError: the ground truth or the results are not such content (the entry is named), there
            are no images or no categories, or ``max_dets`` is below 10.
    """
    return coco_evaluation(ground_truth, results, max_dets=max_dets)[0]


@dataclass(frozen=True)
class CocoMatches:
    """What became of each prediction: enough to compute AP again for any choice of the images.

    ``areas`` are all, small, medium and large, and ``thresholds`` the ten of the IoU.

    Attributes:
        images: names of the images, or their ids where they have none.
        classes: names of the classes.
        scores: ``(predictions,)``, of the most confident ones of each class in each image; by
            class, by image, and downwards.
        image: ``(predictions,)``, position in ``images``.
        label: ``(predictions,)``, position in ``classes``.
        true: ``(predictions, areas, thresholds)``, whether it is a true positive.
        ignored: the same shape, whether it counts neither as true nor as false.
        objects: ``(classes, images, areas)``, how many objects count.
    """

    images: list[str]
    classes: list[str]
    scores: NDArray[np.float64]
    image: NDArray[np.int32]
    label: NDArray[np.int32]
    true: NDArray[np.bool_]
    ignored: NDArray[np.bool_]
    objects: NDArray[np.int32]


def coco_evaluation(
    ground_truth: dict[str, Any], results: Sequence[dict[str, Any]], *, max_dets: int = 100
) -> tuple[dict[str, Any], CocoMatches]:
    """What :func:`coco_metrics` returns, and the matches that it was computed from."""
    if not isinstance(max_dets, int) or max_dets < 10:
        raise DataError(f"max_dets is {max_dets}; take an integer from 10 up")
    notes: list[str] = []
    content = check_ground_truth(ground_truth)
    objects = _by_place(usable_objects(content, notes))
    found = _by_place(usable_results(content, results, notes))
    if cut := sum(max(0, len(group) - max_dets) for group in found.values()):
        notes.append(
            f"{cut} predictions were left out: of one class in one image the {max_dets} most "
            "confident ones count (max_dets)."
        )
    images = sorted((image["id"] for image in content["images"]), key=id_order)
    names = category_names(content["categories"])
    precision, recall, kept = _accumulate(objects, found, images, list(names), max_dets)
    metrics: dict[str, Any] = {
        "AP": _mean(precision[..., 0, 2]),
        "AP50": _mean(precision[0, ..., 0, 2]),
        "AP75": _mean(precision[5, ..., 0, 2]),
        "APs": _mean(precision[..., 1, 2]),
        "APm": _mean(precision[..., 2, 2]),
        "APl": _mean(precision[..., 3, 2]),
        "AR1": _mean(recall[..., 0, 0]),
        "AR10": _mean(recall[..., 0, 1]),
        f"AR{max_dets}": _mean(recall[..., 0, 2]),
        "ARs": _mean(recall[..., 1, 2]),
        "ARm": _mean(recall[..., 2, 2]),
        "ARl": _mean(recall[..., 3, 2]),
        "per_class": {
            name: _mean(precision[:, :, k, 0, 2]) for k, name in enumerate(names.values())
        },
    }
    metrics["notes"] = notes + list(_reasons(metrics))
    called = {each["id"]: str(each.get("file_name") or each["id"]) for each in content["images"]}
    joined = (np.concatenate(arrays) for arrays in zip(*kept, strict=True))
    return metrics, CocoMatches([called[i] for i in images], list(names.values()), *joined)


Group = list[dict[str, Any]]


def _by_place(entries: Group) -> dict[tuple[Id, Id], Group]:
    """Objects or predictions by category and image."""
    groups: dict[tuple[Id, Id], Group] = defaultdict(list)
    for entry in entries:
        groups[entry["category_id"], entry["image_id"]].append(entry)
    return groups


def _accumulate(
    objects: dict[tuple[Id, Id], Group],
    found: dict[tuple[Id, Id], Group],
    images: list[Id],
    categories: list[Id],
    max_dets: int,
) -> tuple[NDArray[np.float64], NDArray[np.float64], list[tuple[NDArray[Any], ...]]]:
    """Precision and recall as pycocotools accumulates them; -1 where there is no object.

    Its matching goes through every pair of class and image, and in each through every pair of
    prediction and object, in Python. Here only what is there and overlaps is gone through, and
    one class after the other, which bounds the memory.

    Returns:
        Precision ``(thresholds, recalls, classes, areas, detections)``, recall ``(thresholds,
        classes, areas, detections)``, and of each class the arrays of :class:`CocoMatches`.
    """
    evaluation = COCOeval(iouType="bbox")
    params = evaluation._paramsEval = evaluation.params
    params.maxDets = [1, 10, max_dets]
    present: dict[Id, set[Id]] = defaultdict(set)
    for category, image in (*objects, *found):
        present[category].add(image)
    position = {image: number for number, image in enumerate(images)}
    precision, recall, kept = [], [], []
    for label, category in enumerate(categories):
        params.catIds = [category]
        params.imgIds = [image for image in images if image in present[category]]
        compared = [
            _compare(objects.get((category, image), []), found.get((category, image), []), params)
            for image in params.imgIds
        ]
        # in the order area, image; a class that is nowhere still needs one entry
        evaluation.evalImgs = [each for area in zip(*compared, strict=True) for each in area]
        places = [position[image] for image in params.imgIds]
        kept.append(_keep(compared, places, label, len(images), params))
        if not compared:
            params.imgIds, evaluation.evalImgs = [None], [None] * len(params.areaRng)
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation.accumulate()
        precision.append(evaluation.eval["precision"])
        recall.append(evaluation.eval["recall"])
    return np.concatenate(precision, axis=2), np.concatenate(recall, axis=1), kept


def _keep(
    compared: list[list[dict[str, Any]]], places: list[int], label: int, images: int, params: Any
) -> tuple[NDArray[Any], ...]:
    """The arrays of :class:`CocoMatches` for one class, of the images at ``places``."""
    scores: list[float] = []
    image: list[int] = []
    true = [np.zeros((0, len(params.areaRng), len(params.iouThrs)), np.bool_)]
    ignored = list(true)
    objects = np.zeros((1, images, len(params.areaRng)), np.int32)
    for place, areas in zip(places, compared, strict=True):
        scores += areas[0]["dtScores"]
        image += [place] * len(areas[0]["dtScores"])
        matched = np.stack([each["dtMatches"] for each in areas]).transpose(2, 0, 1)
        ignored.append(np.stack([each["dtIgnore"] for each in areas]).transpose(2, 0, 1))
        true.append(matched & ~ignored[-1])
        objects[0, place] = [np.count_nonzero(~each["gtIgnore"]) for each in areas]
    return (
        np.array(scores, np.float64),
        np.array(image, np.int32),
        np.full(len(scores), label, np.int32),
        np.concatenate(true),
        np.concatenate(ignored),
        objects,
    )


def _compare(objects: Group, found: Group, params: Any) -> list[dict[str, Any]]:
    """What ``COCOeval.evaluateImg`` returns for each range of areas, of one class in one image."""
    found = sorted(found, key=lambda result: -result["score"])[: params.maxDets[-1]]
    boxes = np.array([result["bbox"] for result in found]).reshape(-1, 4)
    truth = np.array([each["bbox"] for each in objects]).reshape(-1, 4)
    crowd = [each["iscrowd"] for each in objects]
    overlap = np.zeros((len(found), len(objects)))
    if found and objects:
        overlap = rle.iou(boxes, truth, crowd)
    areas = np.array([each["area"] for each in objects])
    never = np.array([each["iscrowd"] or each["difficult"] for each in objects], np.bool_)
    found_areas = boxes[:, 2] * boxes[:, 3]
    compared = []
    for low, high in params.areaRng:
        ignored = never | (areas < low) | (areas > high)
        matched, skipped = _match(overlap, ignored, crowd, params.iouThrs)
        outside = (found_areas < low) | (found_areas > high)
        compared.append(
            {
                "dtScores": [result["score"] for result in found],
                "dtMatches": matched,
                "dtIgnore": skipped | (~matched & outside),
                "gtIgnore": ignored,
            }
        )
    return compared


def _match(
    overlap: NDArray[np.float64],
    ignored: NDArray[np.bool_],
    crowd: list[bool],
    thresholds: NDArray[np.float64],
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Give each prediction, from the most confident, the free object that it overlaps most.

    An ignored object is only given where there is no other; a crowd is given to any number.

    Returns:
        Whether a prediction got an object, and whether an ignored one; ``(thresholds, D)``.
    """
    matched = np.zeros((len(thresholds), len(overlap)), np.bool_)
    skipped = matched.copy()
    order = np.argsort(ignored, kind="stable")  # of objects that overlap alike the last one wins
    near = overlap[:, order]
    pairs: dict[int, list[tuple[int, float]]] = defaultdict(list)
    for row, column in np.argwhere(near >= thresholds[0]).tolist():
        pairs[row].append((int(order[column]), float(near[row, column])))
    for index, threshold in enumerate(thresholds.tolist()):
        taken = set()
        for row, candidates in pairs.items():
            best, chosen = threshold, None
            for candidate, value in candidates:
                if value < best or candidate in taken:
                    continue
                if chosen is not None and ignored[candidate] and not ignored[chosen]:
                    break
                best, chosen = value, candidate
            if chosen is not None:
                matched[index, row], skipped[index, row] = True, ignored[chosen]
                if not crowd[chosen]:
                    taken.add(chosen)
    return matched, skipped


def _mean(values: NDArray[np.float64]) -> float | None:
    """The mean of what could be computed."""
    valid = values[values > -1]
    return float(np.mean(valid)) if valid.size else None


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
