"""Reading PASCAL VOC's formats, and its metrics: average precision and mean IoU."""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
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
    check_ground_truth,
    check_image,
    check_regular,
    choose_classes,
    inside,
    read_header,
    read_image,
    read_text,
    to_flag,
    to_number,
    usable_objects,
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
_LARGEST = 32 * 2**20  # bytes of XML; an image with 100,000 objects needs fewer


class VocDetection(DetectionData):
    """The boxes of a data set in VOC's layout: ``Annotations``, ``JPEGImages``, ``ImageSets/Main``.

    The split is a text file with one name a line: ``0001`` or, in a sub-folder, ``sub/0001``. It
    stands for ``Annotations/0001.xml`` and an image ``JPEGImages/0001``, whose extension can be any
    that Pillow opens. Of several such images the one is read that the annotation's ``<filename>``
    names, else the first of jpg, jpeg, png and then the other extensions in alphabetical order.
    VOC's lists for single classes (``0001 -1``) are splits like any other: every image in them is
    read, and the flag is not.

    VOC's coordinates count pixels from 1 and include the last one, so the box that covers the same
    pixels is ``(xmin - 1, ymin - 1, xmax, ymax)``; its IoU is that of VOC's development kit.
    An object whose ``xmax`` is not above ``xmin`` (or ``ymax``, ``ymin``) is faulty: a point that
    was clicked, not an object one pixel wide. So is an object whose ``difficult`` is neither 0 nor
    1 (nor true, false, yes, no or blank).

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
        root: str | Path,
        split: str,
        *,
        classes: Sequence[str] | None = None,
        faulty: Faulty = "skip",
    ) -> None:
        faults: list[Fault] = []
        directory, images, names = _read_list(Path(root), split, "detection", faults)
        known = _known_classes(directory)
        chosen = choose_classes(known, classes, directory / "Annotations")
        label_of: dict[str, int | None] = dict.fromkeys(known)
        label_of |= {known[position]: label for label, position in enumerate(chosen)}

        records = []
        for name, image_id in names.items():
            annotation = directory / "Annotations" / f"{name}.xml"
            if (tree := _read_xml(annotation, faults)) is None:
                continue
            path = images.find(name, tree.findtext("filename", ""))
            if (judged := check_image(path, _stated_size(tree), faults)) is None:
                continue
            image = ImageFile(image_id, images.name_of(path), path, *judged)
            objects = _read_objects(annotation, tree, (image.width, image.height), label_of, faults)
            if classes is None or len(objects.labels):
                records.append(DetectionRecord(image, objects))
        self.category_ids = [position + 1 for position in chosen]
        super().__init__(records, [known[position] for position in chosen], faults, faulty)


def _read_xml(file: Path, faults: list[Fault]) -> ElementTree.Element | None:
    """The root of an annotation; None, and a fault more, where the file cannot be used."""
    try:
        check_regular(file)
        if file.stat().st_size <= _LARGEST:
            return ElementTree.fromstring(_decode(file.read_bytes()))
        faults.append(Fault(file, None, f"annotation is larger than {_LARGEST} bytes"))
    except FileNotFoundError:
        faults.append(Fault(file, None, "annotation is missing"))
    except OSError as error:
        faults.append(Fault(file, None, "annotation cannot be read", error))
    except (ElementTree.ParseError, LookupError, ValueError) as error:
        faults.append(Fault(file, None, "annotation is not valid XML", error))
    return None


def _decode(xml: bytes) -> str | bytes:
    """The text of an XML file in the encoding that it declares; expat knows few encodings."""
    if xml.startswith((b"\xff\xfe", b"\xfe\xff")):
        return xml.decode("utf-16")
    declared = _ENCODING.match(xml)
    return xml.decode(declared[1].decode()) if declared else xml


_ENCODING = re.compile(rb"""(?:\xef\xbb\xbf)?<\?xml[^>]*?\sencoding\s*=\s*["']([A-Za-z][\w.-]*)""")


def _stated_size(tree: ElementTree.Element) -> tuple[float, float] | None:
    """Width and height that an annotation states; many tools leave them at 0 or blank."""
    width, height = (to_number(tree.findtext(f"size/{side}")) for side in ("width", "height"))
    return (width, height) if width and height and min(width, height) > 0 else None


def _read_objects(
    file: Path,
    tree: ElementTree.Element,
    size: tuple[int, int],
    label_of: dict[str, int | None],
    faults: list[Fault],
) -> Objects:
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
        flag = to_flag(element.findtext("difficult"))
        if flag is None:
            value = element.findtext("difficult")
            faults.append(Fault(file, index, "difficult is neither true nor false", value))
            continue
        box, fault = _to_box(corners, size)
        if fault:
            faults.append(Fault(file, index, fault, f"xmin, ymin, xmax, ymax {corners} in {size}"))
        if box is not None:
            boxes.append(box)
            labels.append(label)
            difficult.append(flag)
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

    Names and images are those of :class:`VocDetection`. Masks are palette or grey images of 1 to 16
    bits, whose indices are the classes; 255 is void, and a second channel (transparency) is not
    read. Of several masks of a name the first of png, tif, tiff, bmp, gif is read, then other
    extensions in alphabetical order. A mask that was compressed with loss is faulty.

    The classes are all those of ``classes.txt`` (one a line, the first is index 0) in the directory
    of the layout; without that file the background and VOC's twenty. An image is turned by its EXIF
    orientation where only then it has the size of its mask.

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

    def __init__(self, root: str | Path, split: str, *, faulty: Faulty = "skip") -> None:
        faults: list[Fault] = []
        directory, images, names = _read_list(Path(root), split, "segmentation", faults)
        masks = _Images(directory / "SegmentationClass", (".png", ".tif", ".tiff", ".bmp", ".gif"))
        records = []
        for name, image_id in names.items():
            path, mask = images.find(name), masks.find(name)
            header = read_header(mask, faults)
            size = (header.width, header.height) if header else None
            judged = check_image(path, size, faults, "mask has")
            if header is None or judged is None:
                continue
            if header.format in _LOSSY:
                reason = "mask is compressed with loss, which changes class indices; save it as PNG"
                faults.append(Fault(mask, None, reason, header.format))
            elif header.mode not in _MASK_MODES:
                reason = "mask is not an image of class indices (palette or grey)"
                faults.append(Fault(mask, None, reason, f"mode {header.mode}"))
            else:
                image = ImageFile(image_id, images.name_of(path), path, *judged)
                records.append(_MaskRecord(image, mask))
        classes = _listed_classes(directory) or ["background", *VOC_CLASSES]
        if len(classes) > VOID:
            raise DataError(
                f"{directory / 'classes.txt'}: {len(classes)} classes are too many for masks, in "
                f"which {VOID} is void"
            )
        super().__init__(records, classes, faults, faulty)

    def __getitem__(self, index: int) -> SegmentationSample:
        record = self._records[index]
        mask = _read_mask(record.mask)
        beyond = mask[((mask < 0) | (mask >= len(self.classes))) & (mask != VOID)]
        if beyond.size:
            raise DataError(
                f"{record.mask}: holds the value {beyond.min()}, but there are {len(self.classes)} "
                f"classes, 0 to {len(self.classes) - 1}, and {VOID} is void; correct the mask, or "
                "name every class in classes.txt"
            )
        return SegmentationSample(
            image=read_image(record.image.path, record.image.upright),
            mask=mask.astype(np.uint8),
            image_id=record.image.id,
            name=record.image.name,
        )


_LOSSY = ("JPEG", "MPO", "JPEG2000")
_MASK_MODES = ("1", "L", "LA", "P", "I", "I;16", "I;16B")
_SPREAD = {"L;2": 85, "L;4": 17}  # Pillow spreads greys of 2 and 4 bits over 0 to 255


def _read_mask(file: Path) -> NDArray[Any]:
    """The class indices ``(H, W)`` of a mask, integers or bool."""
    try:
        check_regular(file)
        with Image.open(file) as image:
            stored = image.tile[0][3] if image.tile else None
            mask = np.array(image)
    except UNREADABLE as error:
        raise DataError(f"{file}: cannot be decoded ({error}); replace it") from error
    if mask.ndim == 3:
        mask = mask[..., 0]  # the rest is transparency
    stored = stored[0] if isinstance(stored, tuple) else stored
    return mask // _SPREAD[stored] if stored in _SPREAD else mask


def voc_splits(root: str | Path, task: Task) -> list[str]:
    """The splits of a data set in VOC's layout, sorted; VOC's lists of single classes left out."""
    names = {
        file.stem
        for directory in _layouts(Path(root))
        for file in (directory / "ImageSets" / _LISTS[task]).glob("*.txt")
    }
    return sorted(name for name in names if name.rpartition("_")[0] not in VOC_CLASSES)


def _layouts(root: Path) -> list[Path]:
    candidates = [root, *root.glob("*"), *root.glob("VOCdevkit/*")]
    return sorted(directory for directory in candidates if (directory / "ImageSets").is_dir())


class _Images:
    """The files of a directory that are images by their extension, found by name without it."""

    def __init__(self, directory: Path, preferred: tuple[str, ...]) -> None:
        self.directory = directory
        known = [
            ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN
        ]
        self._order = [*preferred, *sorted(set(known) - set(preferred))]
        self._folders: dict[Path, dict[str, list[Path]]] = {}

    def find(self, name: str, stated: str = "") -> Path:
        """The image; of several the one of the file name ``stated``, else by extension."""
        path = self.directory / name
        files = self._folder(path.parent).get(path.name, [])
        stated = PurePosixPath(stated.strip().replace("\\", "/")).name
        first = files[0] if files else path.with_name(path.name + self._order[0])
        return next((file for file in files if file.name == stated), first)

    def __contains__(self, name: str) -> bool:
        path = inside(self.directory, name)
        return path is not None and path.name in self._folder(path.parent)

    def name_of(self, path: Path) -> str:
        """The name of an image in its data set: with its sub-folder and extension."""
        return path.relative_to(self.directory).as_posix()

    def _folder(self, folder: Path) -> dict[str, list[Path]]:
        if folder not in self._folders:
            rank = {ending: number for number, ending in enumerate(self._order)}
            try:
                files = [folder / name for name in os.listdir(folder)]
            except OSError:
                files = []  # each image in it is then reported as missing
            images = [file for file in files if file.suffix.lower() in rank]
            images.sort(key=lambda file: (rank[file.suffix.lower()], file.name))
            by_stem = self._folders[folder] = {}
            for file in images:
                by_stem.setdefault(file.stem, []).append(file)
        return self._folders[folder]


def _read_list(
    root: Path, split: str, task: Task, faults: list[Fault]
) -> tuple[Path, _Images, dict[str, int]]:
    """The directory of the layout that has the split, its images, and the names with their ids."""
    listed = inside(Path("ImageSets", _LISTS[task]), f"{split}.txt")
    if listed is None:
        raise DataError(
            f"{root}: the split {split!r} leads outside of the data; name a list in "
            f"ImageSets/{_LISTS[task]}"
        )
    found = [directory for directory in _layouts(root) if os.path.isfile(directory / listed)]
    if not found:
        splits = ", ".join(voc_splits(root, task)) or "none"
        raise DataError(
            f"{root}: {listed} is neither there nor in VOC20xx or VOCdevkit/VOC20xx below; "
            f"{task} splits found: {splits}"
        )
    if len(found) > 1:
        years = ", ".join(map(str, found))
        raise DataError(f"{root}: several directories have {listed}; name one as root: {years}")
    (directory,) = found
    file = directory / listed
    images = _Images(directory / "JPEGImages", (".jpg", ".jpeg", ".png"))
    lines = _without_flags(_read_lines(file), images)
    if not lines:
        raise DataError(f"{file}: names no image")
    names: dict[str, int] = {}
    for position, (number, line) in enumerate(lines, start=1):
        path = inside(images.directory, line)
        if path is None:
            reason = "name is not a path inside the data folder"
            faults.append(Fault(file, None, reason, f"line {number}: {line!r}"))
        elif (name := images.name_of(path)) in names:
            faults.append(Fault(file, None, "image is listed twice", f"line {number}: {name!r}"))
        else:
            names[name] = position
    return directory, images, names


def _read_lines(file: Path) -> list[tuple[int, str]]:
    """The lines of a text file that are not blank, with their numbers."""
    text = read_text(file)
    if "\0" in text:
        raise DataError(f"{file}: is not text, or in an unknown encoding; save it as UTF-8")
    lines = enumerate(text.splitlines(), start=1)
    return [(number, line.strip()) for number, line in lines if line.strip()]


_FLAGGED = re.compile(r"(.*\S)\s+(?:-1|0|1)")


def _without_flags(lines: list[tuple[int, str]], images: _Images) -> list[tuple[int, str]]:
    """The names in a list of VOC's for a single class, where a flag follows every name."""
    names = [(number, match[1]) for number, line in lines if (match := _FLAGGED.fullmatch(line))]
    is_flagged = len(names) == len(lines) and not any(line in images for _, line in lines)
    return names if is_flagged else lines


def _listed_classes(directory: Path) -> list[str]:
    file = directory / "classes.txt"
    names = [line for _, line in _read_lines(file)] if file.exists() else []
    if repeated := [name for name, n in Counter(names).items() if n > 1]:
        raise DataError(f"{file}: the class {repeated[0]!r} is listed twice")
    return names


def _known_classes(directory: Path) -> list[str]:
    if listed := _listed_classes(directory):
        return listed
    found: set[str] = set()
    for file in (directory / "Annotations").rglob("*.xml"):
        # What is faulty becomes a fault when the image that it belongs to is read.
        if (tree := _read_xml(file, faults=[])) is not None:
            found.update(element.findtext("name", "").strip() for element in tree.iter("object"))
    found.discard("")
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
            the difficult objects (:meth:`DetectionData.ground_truth`) or COCO's ``ignore: 1``.
        results: the content of a COCO results file.
        eleven_point: VOC 2007's mean of the precision at eleven recalls; otherwise the area under
            the interpolated curve (VOC 2010 and later).
        iou_threshold: the least IoU of a true positive.

    Returns:
        ``mAP``, the mean over the classes that have an object; ``per_class``, AP by class name,
        None without an object; ``notes``, sentences on what is None or was left out.

    Raises:
        DataError: the ground truth or the results are no such content (the entry is named), or
            there are no images or no categories.
        ValueError: ``iou_threshold`` is not in (0, 1].
    """
    if not 0 < iou_threshold <= 1:
        raise ValueError(f"iou_threshold={iou_threshold!r} is not in (0, 1]")
    notes: list[str] = []
    content = check_ground_truth(ground_truth)
    objects = _by_category(usable_objects(content, notes))
    found = _by_category(usable_results(content, results, notes))
    per_class = {
        name: _average_precision(objects[category], found[category], eleven_point, iou_threshold)
        for category, name in category_names(content["categories"]).items()
    }
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


def _by_category(entries: Sequence[dict[str, Any]]) -> dict[Any, list[dict[str, Any]]]:
    groups = defaultdict(list)
    for entry in entries:
        groups[entry["category_id"]].append(entry)
    return groups


def _average_precision(
    objects: list[dict[str, Any]],
    found: list[dict[str, Any]],
    eleven_point: bool,
    iou_threshold: float,
) -> float | None:
    flags = ("difficult", "iscrowd")
    ignored = np.array([any(a[key] for key in flags) for a in objects], np.bool_)
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

    Raises:
        ValueError: ``num_classes`` or ``ignore_index`` is not an integer, or there is no class.
    """

    def __init__(
        self, num_classes: int, ignore_index: int = VOID, device: torch.device | str = "cpu"
    ) -> None:
        if type(num_classes) is not int or num_classes < 1:
            raise ValueError(f"num_classes={num_classes!r} is not an integer from 1 up")
        if type(ignore_index) is not int:
            raise ValueError(f"ignore_index={ignore_index!r} is not an integer")
        self.ignore_index = ignore_index
        self.matrix = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)

    def update(self, prediction: torch.Tensor, target: torch.Tensor) -> None:
        """Count the pixels of class indices ``prediction`` and ``target``, of one shape.

        Any dtype will do, as long as the values are whole.

        Raises:
            TypeError: one of them is no tensor.
            ValueError: the shapes differ, or a value is neither a class nor ``ignore_index``.
        """
        for name, given in (("prediction", prediction), ("target", target)):
            if not isinstance(given, torch.Tensor):
                raise TypeError(f"the {name} is a {type(given).__name__} and not a tensor")
        if prediction.shape != target.shape:
            raise ValueError(
                f"the prediction is {tuple(prediction.shape)}, the target {tuple(target.shape)}; "
                "both are class indices, which logits become by argmax over the classes"
            )
        classes = len(self.matrix)
        valid = target != self.ignore_index
        true = _to_indices(target[valid], classes, "target")
        predicted = _to_indices(prediction[valid], classes, "prediction")
        counts = torch.bincount(true * classes + predicted, minlength=classes * classes)
        self.matrix += counts.view(classes, classes).to(self.matrix.device)

    def metrics(self, classes: Sequence[str]) -> dict[str, Any]:
        """``mIoU``, ``per_class_iou`` by class name, ``mean_dice`` and ``pixel_accuracy``.

        A class that neither the targets nor the predictions hold is None and left out of the
        means; so are all numbers when no pixel was counted.
        """
        if len(classes) != len(self.matrix):
            raise ValueError(f"{len(classes)} names for {len(self.matrix)} classes")
        if len(set(classes)) < len(classes):
            raise ValueError(f"two classes have the same name: {', '.join(classes)}")
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


def _to_indices(values: torch.Tensor, classes: int, name: str) -> torch.Tensor:
    indices = values.long()
    wrong = values[(indices.to(values.dtype) != values) | (indices < 0) | (indices >= classes)]
    if wrong.numel():
        raise ValueError(f"the {name} holds {wrong[0].item()}, which is no class in [0, {classes})")
    return indices
