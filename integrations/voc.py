"""Reading PASCAL VOC's formats, and its metrics: average precision and mean IoU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from xml.etree import ElementTree

import torch

from detseg_losses.integrations.extras import needs
from detseg_losses.integrations.samples import (
    UNREADABLE,
    VOID,
    DataError,
    DetectionData,
    DetectionRecord,
    Fault,
    Faulty,
    ImageData,
    ImageFile,
    Objects,
    SegmentationSample,
    category_names,
    check_box,
    choose_classes,
    read_header,
    read_image,
    usable_results,
)

with needs("tools"):
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

# fmt: off
VOC_CLASSES = [
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
    "tvmonitor",
]
# fmt: on

Task = Literal["detection", "segmentation"]
_LISTS = {"detection": "Main", "segmentation": "Segmentation"}


class VocDetection(DetectionData):
    """The boxes of a data set in VOC's layout: ``Annotations``, ``JPEGImages``, ``ImageSets/Main``.

    VOC's coordinates count pixels from 1 and include the last one, so the box that covers the same
    pixels is ``(xmin - 1, ymin - 1, xmax, ymax)``; its IoU is that of VOC's development kit.
    An object whose ``xmax`` is not above ``xmin`` (or ``ymax``, ``ymin``) is faulty: a point that
    was clicked, not an object one pixel wide.

    The classes are those of ``classes.txt`` (one a line) in the directory of the layout; without
    that file VOC's twenty, where every object in ``Annotations`` is one of them, else the names
    found there, sorted. So they are the same for every split. ``category_ids`` count from 1.

    Args:
        root: the directory of the layout, or one above it (``VOCdevkit/VOC20xx``, ``VOC20xx``).
        split: the name of a list in ``ImageSets/Main``.
        classes: keep only these classes, labelled in this order, and the images that hold any.
        faulty: ``"skip"`` what is faulty, or ``"refuse"`` to read data with any fault.

    Raises:
        DataError: the split is not there or is there for several years, a class is unknown,
            nothing usable is left, or a fault was found and ``faulty="refuse"``.
    """

    def __init__(
        self,
        root: Path,
        split: str,
        *,
        classes: Sequence[str] | None = None,
        faulty: Faulty = "skip",
    ) -> None:
        directory, names = _read_list(root, split, "detection")
        known = _known_classes(directory)
        chosen = choose_classes(known, classes, directory / "Annotations")
        label_of: dict[str, int | None] = dict.fromkeys(known)
        label_of |= {known[position]: label for label, position in enumerate(chosen)}

        faults: list[Fault] = []
        files = _by_stem(directory / "JPEGImages")
        records = []
        for image_id, name in enumerate(names, start=1):
            path = files.get(name, directory / "JPEGImages" / f"{name}.jpg")
            if (header := read_header(path, faults)) is None:
                continue
            size = header.width, header.height
            annotation = directory / "Annotations" / f"{name}.xml"
            objects = _read_objects(annotation, size, label_of, faults)
            if objects is None or (classes is not None and not len(objects.labels)):
                continue
            records.append(DetectionRecord(ImageFile(image_id, path.name, path, *size), objects))
        self.category_ids = [position + 1 for position in chosen]
        super().__init__(records, [known[position] for position in chosen], faults, faulty)


def _read_objects(
    file: Path, size: tuple[int, int], label_of: dict[str, int | None], faults: list[Fault]
) -> Objects | None:
    """The objects of one XML file; None, and a fault more, where the file cannot be used."""
    try:
        tree = ElementTree.parse(file)
    except FileNotFoundError:
        faults.append(Fault(file, None, "annotation is missing"))
        return None
    except ElementTree.ParseError as error:
        faults.append(Fault(file, None, "annotation is not valid XML", error))
        return None
    stated = (tree.findtext("size/width", "0"), tree.findtext("size/height", "0"))
    if stated != ("0", "0") and stated != (str(size[0]), str(size[1])):
        reason = "image is not of the size that the annotation states"
        faults.append(Fault(file, None, reason, f"{size[0]}x{size[1]} for {'x'.join(stated)}"))
        return None

    boxes, labels, difficult = [], [], []
    for index, element in enumerate(tree.iter("object")):
        name = element.findtext("name", "").strip()
        if name not in label_of:
            faults.append(Fault(file, index, "unknown class", name))
            continue
        label = label_of[name]
        if label is None:
            continue
        corners = [
            element.findtext(f"bndbox/{key}", "") for key in ("xmin", "ymin", "xmax", "ymax")
        ]
        box, fault = _to_box(corners, size)
        if fault:
            faults.append(Fault(file, index, fault, f"xmin, ymin, xmax, ymax {corners} in {size}"))
        if box is not None:
            boxes.append(box)
            labels.append(label)
            difficult.append(element.findtext("difficult", "0").strip() == "1")
    corners_array = np.array(boxes, np.float64).reshape(-1, 4)
    sides = corners_array[:, 2:] - corners_array[:, :2]
    return Objects(
        boxes=np.concatenate([corners_array[:, :2], sides], axis=1),
        labels=np.array(labels, np.int64),
        areas=sides.prod(axis=1),
        crowd=np.zeros(len(labels), np.bool_),
        difficult=np.array(difficult, np.bool_),
    )


def _to_box(
    corners: list[str], size: tuple[int, int]
) -> tuple[tuple[float, float, float, float] | None, str | None]:
    try:
        xmin, ymin, xmax, ymax = map(float, corners)
    except ValueError:
        return None, "box is not four numbers"
    if xmax <= xmin or ymax <= ymin:
        return None, "box has no area"
    return check_box((xmin - 1, ymin - 1, xmax, ymax), *size)


@dataclass(frozen=True)
class _MaskRecord:
    image: ImageFile
    mask: Path


class VocSegmentation(ImageData[_MaskRecord, SegmentationSample]):
    """The masks of a data set in VOC's layout: ``SegmentationClass``, ``ImageSets/Segmentation``.

    Masks are palette (or grey) images, whose indices are the classes; 255 is void. The classes are
    all those of ``classes.txt`` (one a line, the first is index 0) in the directory of the layout;
    without that file the background and VOC's twenty.

    Args:
        root: the directory of the layout, or one above it (``VOCdevkit/VOC20xx``, ``VOC20xx``).
        split: the name of a list in ``ImageSets/Segmentation``.
        faulty: ``"skip"`` what is faulty (a missing or broken image or mask, a mask in colours or
            not of the image's size), or ``"refuse"`` to read data with any fault.

    Raises:
        DataError: the split is not there or is there for several years, nothing usable is left, or
            a fault was found and ``faulty="refuse"``. And when a sample is read: its mask holds a
            value that is neither a class nor 255.
    """

    def __init__(self, root: Path, split: str, *, faulty: Faulty = "skip") -> None:
        directory, names = _read_list(root, split, "segmentation")
        faults: list[Fault] = []
        files = _by_stem(directory / "JPEGImages")
        records = []
        for image_id, name in enumerate(names, start=1):
            path = files.get(name, directory / "JPEGImages" / f"{name}.jpg")
            mask = directory / "SegmentationClass" / f"{name}.png"
            header, mask_header = read_header(path, faults), read_header(mask, faults)
            if header is None or mask_header is None:
                continue
            size, mask_size = (
                (header.width, header.height),
                (mask_header.width, mask_header.height),
            )
            if size != mask_size:
                reason = "mask is not of the image's size"
                faults.append(Fault(mask, None, reason, f"{mask_size} for {size}"))
                continue
            mode = mask_header.mode
            if mode not in ("P", "L"):
                reason = "mask is not an image of class indices (palette or grey, 8 bits)"
                faults.append(Fault(mask, None, reason, f"mode {mode}"))
                continue
            records.append(_MaskRecord(ImageFile(image_id, path.name, path, *size), mask))
        classes = _listed_classes(directory) or ["background", *VOC_CLASSES]
        super().__init__(records, classes, faults, faulty)

    def __getitem__(self, index: int) -> SegmentationSample:
        record = self._records[index]
        try:
            with Image.open(record.mask) as image:
                mask = np.array(image)
        except UNREADABLE as error:
            raise DataError(f"{record.mask}: cannot be decoded ({error}); replace it") from error
        present = np.flatnonzero(np.bincount(mask.ravel(), minlength=VOID + 1))
        beyond = present[(present >= len(self.classes)) & (present != VOID)]
        if beyond.size:
            raise DataError(
                f"{record.mask}: holds the value {beyond[0]}, but there are {len(self.classes)} "
                f"classes, 0 to {len(self.classes) - 1}, and {VOID} for void; correct the mask, or "
                "name every class in classes.txt"
            )
        return SegmentationSample(
            image=read_image(record.image.path, record.image.upright),
            mask=mask,
            image_id=record.image.id,
            name=record.image.name,
        )


def voc_splits(root: Path, task: Task) -> list[str]:
    """The splits of a data set in VOC's layout, sorted; VOC's lists of single classes left out."""
    names = {
        file.stem
        for directory in _layouts(root)
        for file in (directory / "ImageSets" / _LISTS[task]).glob("*.txt")
    }
    return sorted(name for name in names if name.rpartition("_")[0] not in VOC_CLASSES)


def _layouts(root: Path) -> list[Path]:
    candidates = [root, *root.glob("*"), *root.glob("VOCdevkit/*")]
    return sorted(directory for directory in candidates if (directory / "ImageSets").is_dir())


def _read_list(root: Path, split: str, task: Task) -> tuple[Path, list[str]]:
    """The directory of the layout that has the split, and the names in its list."""
    listed = Path("ImageSets") / _LISTS[task] / f"{split}.txt"
    found = [directory for directory in _layouts(root) if (directory / listed).is_file()]
    if not found:
        splits = ", ".join(voc_splits(root, task)) or "none"
        raise DataError(
            f"{root}: {listed} is neither there nor in VOC20xx or VOCdevkit/VOC20xx below; "
            f"{task} splits found: {splits}"
        )
    if len(found) > 1:
        years = ", ".join(map(str, found))
        raise DataError(f"{root}: several directories have {listed}; name one as root: {years}")
    lines = (found[0] / listed).read_text().splitlines()
    return found[0], [line.strip() for line in lines if line.strip()]


def _by_stem(directory: Path) -> dict[str, Path]:
    return {file.stem: file for file in sorted(directory.glob("*"))}


def _listed_classes(directory: Path) -> list[str]:
    file = directory / "classes.txt"
    lines = file.read_text().splitlines() if file.is_file() else []
    return [line.strip() for line in lines if line.strip()]


def _known_classes(directory: Path) -> list[str]:
    if listed := _listed_classes(directory):
        return listed
    found: set[str] = set()
    for file in (directory / "Annotations").glob("*.xml"):
        try:
            tree = ElementTree.parse(file)
        except ElementTree.ParseError:
            continue  # becomes a fault when the image that it belongs to is read
        found.update(element.findtext("name", "").strip() for element in tree.iter("object"))
    return VOC_CLASSES if found <= set(VOC_CLASSES) else sorted(found)


def voc_metrics(
    ground_truth: dict[str, Any],
    results: Sequence[dict[str, Any]],
    *,
    eleven_point: bool = False,
    iou_threshold: float = 0.5,
) -> dict[str, Any]:
    """PASCAL VOC's average precision.

    As in VOC's development kit, each prediction, the most confident first, is compared with the
    object of its class that it overlaps most: the first one to reach the threshold on an object is
    a true positive and every later one a false positive. A prediction on a difficult object (or a
    COCO crowd) is neither, and such objects are not counted as missed.

    Args:
        ground_truth: the content of a COCO annotation file, boxes XYWH, with ``difficult: 1`` at
            the difficult objects (:meth:`DetectionData.ground_truth`).
        results: the content of a COCO results file.
        eleven_point: VOC 2007's mean of the precision at eleven recalls; otherwise the area under
            the interpolated curve (VOC 2010 and later).
        iou_threshold: the least IoU of a true positive.

    Returns:
        ``mAP``, the mean over the classes that have an object; ``per_class``, AP by class name,
        None without an object; ``notes``, sentences on what is None or was left out.
    """
    notes: list[str] = []
    usable = usable_results(ground_truth, results, notes)
    per_class: dict[str, float | None] = {}
    for category, name in category_names(ground_truth["categories"]).items():
        objects = [a for a in ground_truth["annotations"] if a["category_id"] == category]
        found = [r for r in usable if r["category_id"] == category]
        per_class[name] = _average_precision(objects, found, eleven_point, iou_threshold)
    values = [value for value in per_class.values() if value is not None]
    if not values:
        notes.append("There is no ground truth object that counts, so no AP can be computed.")
    elif len(values) < len(per_class):
        empty = [name for name, value in per_class.items() if value is None]
        notes.append(
            f"The ground truth has no object of {len(empty)} classes, which have no AP and are "
            f"left out of the mean: {', '.join(empty)}."
        )
    return {
        "mAP": float(np.mean(values)) if values else None,
        "per_class": per_class,
        "notes": notes,
    }


def _average_precision(
    objects: list[dict[str, Any]],
    found: list[dict[str, Any]],
    eleven_point: bool,
    iou_threshold: float,
) -> float | None:
    ignored = np.array([bool(a.get("difficult") or a.get("iscrowd")) for a in objects], np.bool_)
    positives = int((~ignored).sum())
    if positives == 0:
        return None
    found = sorted(found, key=lambda result: -result["score"])
    nearest, overlap = _nearest_objects(objects, found)
    matched = overlap >= iou_threshold
    judged = ~(matched & ignored[nearest])
    hits = np.flatnonzero(matched & judged)
    true = np.zeros(len(found), np.bool_)
    true[hits[np.unique(nearest[hits], return_index=True)[1]]] = True  # the first hit on each
    true = true[judged]

    found_so_far = true.cumsum()
    precision = found_so_far / np.arange(1, len(true) + 1)
    best_from_here = np.maximum.accumulate(precision[::-1])[::-1]
    if not eleven_point:
        return float(best_from_here[true].sum() / positives)
    # recall >= k / 10 in whole numbers: as floats 3 of 10 objects would miss the recall 0.3
    reached = [best_from_here[10 * found_so_far >= k * positives] for k in range(11)]
    return float(np.mean([curve.max(initial=0.0) for curve in reached]))


def _nearest_objects(
    objects: list[dict[str, Any]], found: list[dict[str, Any]]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """For each prediction the object in its image that it overlaps most, and their IoU."""
    in_image: dict[int, list[int]] = {}
    for index, annotation in enumerate(objects):
        in_image.setdefault(annotation["image_id"], []).append(index)
    boxes = np.array([annotation["bbox"] for annotation in objects], np.float64)
    nearest = np.zeros(len(found), np.int64)
    overlap = np.zeros(len(found))
    for position, result in enumerate(found):
        if candidates := in_image.get(result["image_id"]):
            iou = _iou(np.array(result["bbox"], np.float64), boxes[candidates])
            nearest[position] = candidates[iou.argmax()]
            overlap[position] = iou.max()
    return nearest, overlap


def _iou(box: NDArray[np.float64], others: NDArray[np.float64]) -> NDArray[np.float64]:
    """IoU of one XYWH box with ``(N, 4)`` others."""
    low = np.maximum(box[:2], others[:, :2])
    high = np.minimum(box[:2] + box[2:], others[:, :2] + others[:, 2:])
    shared = (high - low).clip(min=0).prod(axis=1)
    union = box[2:].prod() + others[:, 2:].prod(axis=1) - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)


class ConfusionMatrix:
    """Counts of (true class, predicted class) over the pixels of a whole data set.

    Attributes:
        matrix: ``(K, K)`` int64, rows are the true classes. Matrices of several processes add up.

    Args:
        num_classes: K.
        ignore_index: the target value of pixels that do not count.
        device: where ``matrix`` lies.
    """

    def __init__(
        self, num_classes: int, ignore_index: int = VOID, device: torch.device | str = "cpu"
    ) -> None:
        self.ignore_index = ignore_index
        self.matrix = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)

    def update(self, prediction: torch.Tensor, target: torch.Tensor) -> None:
        """Count the pixels of class indices ``prediction`` and ``target``, of one shape.

        Raises:
            ValueError: the shapes differ, or a value is neither a class nor ``ignore_index``.
        """
        if prediction.shape != target.shape:
            raise ValueError(
                f"the prediction is {tuple(prediction.shape)}, the target {tuple(target.shape)}"
            )
        classes = len(self.matrix)
        valid = target != self.ignore_index
        true, predicted = target[valid].long(), prediction[valid].long()
        for name, values in (("target", true), ("prediction", predicted)):
            beyond = values[(values < 0) | (values >= classes)]
            if beyond.numel():
                raise ValueError(f"the {name} holds {beyond[0].item()}, outside [0, {classes})")
        counts = torch.bincount(true * classes + predicted, minlength=classes * classes)
        self.matrix += counts.view(classes, classes).to(self.matrix.device)

    def metrics(self, classes: Sequence[str]) -> dict[str, Any]:
        """``mIoU``, ``per_class_iou`` by class name, ``mean_dice`` and ``pixel_accuracy``.

        A class that neither the targets nor the predictions hold is None and left out of the
        means; so are all numbers when no pixel was counted.
        """
        if len(classes) != len(self.matrix):
            raise ValueError(f"{len(classes)} names for {len(self.matrix)} classes")
        matrix = self.matrix.cpu().double()
        hits, both = matrix.diag(), matrix.sum(0) + matrix.sum(1)
        occurs = both > 0
        iou, dice = hits / (both - hits), 2 * hits / both
        if not occurs.any():
            return {
                "mIoU": None,
                "per_class_iou": dict.fromkeys(classes),
                "mean_dice": None,
                "pixel_accuracy": None,
            }
        return {
            "mIoU": iou[occurs].mean().item(),
            "per_class_iou": {
                name: value if there else None
                for name, value, there in zip(classes, iou.tolist(), occurs.tolist(), strict=True)
            },
            "mean_dice": dice[occurs].mean().item(),
            "pixel_accuracy": (hits.sum() / matrix.sum()).item(),
        }
