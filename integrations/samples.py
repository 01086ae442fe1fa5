"""What the readers of data formats share: samples, faults of the data, and choosing images.

Coordinates are continuous pixels everywhere: a box covers ``[x1, x2) x [y1, y2)``, and the whole
image is ``[0, width) x [0, height)``.
"""

from __future__ import annotations

import copy
import difflib
import math
import os
import re
import reprlib
import stat
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Generic, Literal, Protocol, TypeGuard, TypeVar

import torch

from detseg_losses.integrations.extras import needs

with needs("tools"):
    import numpy as np
    from numpy.typing import NDArray
    from PIL import ExifTags, Image, ImageOps

VOID = 255
"""The mask value of pixels that belong to no class: left out of training and of the metric."""

Faulty = Literal["skip", "refuse"]

Extra = Literal["masks", "keypoints"]
"""What a detector can want to know of its objects beside boxes and labels."""

Id = int | str
"""What a data set calls an image or a category by; the text "1" is not the integer 1."""


class DataError(ValueError):
    """A fault of the user's data or of what was asked of it, with the remedy in the message."""


@dataclass(frozen=True)
class Fault:
    """One fault that a reader found.

    Attributes:
        file: the annotation file, image or mask that is at fault.
        index: position of the object (or of the image entry) in that file, from 0; None where
            the whole file is meant.
        reason: the kind of fault, the same words for the same kind, so that faults can be counted.
        value: what was found; what a file holds is made fit to be printed by :func:`shown`.
    """

    file: Path
    index: int | None
    reason: str
    value: object = None

    def __str__(self) -> str:
        place = f"{self.file}" if self.index is None else f"{self.file}, entry {self.index}"
        return f"{place}: {self.reason}" + ("" if self.value is None else f" ({self.value})")


def report_faults(faults: Sequence[Fault], shown: int = 5) -> str:
    """The faults counted by reason, followed by the first ``shown`` of them; one a line."""
    counts = Counter(fault.reason for fault in faults)
    lines = [f"{len(faults)} faults: " + ", ".join(f"{n} x {why}" for why, n in counts.items())]
    lines += [f"  {fault}" for fault in faults[:shown]]
    if len(faults) > shown:
        lines.append(f"  and {len(faults) - shown} more")
    return "\n".join(lines)


def summarize_faults(faults: Sequence[Fault]) -> str:
    """The faults counted by reason and the first of them, in one line that fits into an error."""
    counted = report_faults(faults, 0).partition("\n")[0]
    return f"{counted}; the first: {faults[0]}" if faults else counted


@dataclass
class DetectionSample:
    """One image with its objects.

    Attributes:
        image: ``(H, W, 3)`` uint8, RGB.
        boxes: ``(N, 4)`` float32, XYXY in pixels.
        labels: ``(N,)`` int64 in ``[0, K)``.
        ignored: ``(N,)`` bool: crowds, objects that COCO says to ignore and VOC's difficult ones.
            Training leaves them out; the metric counts them neither as found nor as missed.
        image_id: the id of the image in :meth:`DetectionData.ground_truth`.
        masks: ``(N, H, W)`` uint8, 1 on the object and 0 elsewhere; None where they were not asked
            for.
        keypoints: ``(N, K, 3)`` float32, x, y in pixels and 0 (not labelled), 1 (hidden) or 2;
            None where they were not asked for.
    """

    image: NDArray[np.uint8]
    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]
    ignored: NDArray[np.bool_]
    image_id: Id
    masks: NDArray[np.uint8] | None = None
    keypoints: NDArray[np.float32] | None = None


@dataclass
class SegmentationSample:
    """One image with its mask.

    Attributes:
        image: ``(H, W, 3)`` uint8, RGB.
        mask: ``(H, W)`` uint8, class indices in ``[0, K)`` or 255 for void.
        image_id: the id of the image in its data set.
        name: the name of the image in its data set.
    """

    image: NDArray[np.uint8]
    mask: NDArray[np.uint8]
    image_id: Id
    name: str


@dataclass(frozen=True)
class ImageFile:
    """An image of a data set.

    Attributes:
        id: its id in the data set.
        name: its name in the data set, a relative path that never leads upwards.
        path: where it lies.
        width: in pixels, as the data set sees the image.
        height: in pixels, as the data set sees the image.
        upright: whether the data set sees it turned by its EXIF orientation.
    """

    id: Id
    name: str
    path: Path
    width: int
    height: int
    upright: bool = False


@dataclass(frozen=True)
class Objects:
    """The objects of one image.

    Attributes:
        boxes: ``(N, 4)`` float64, XYWH as in the file, so that the metric sees the same numbers.
        labels: ``(N,)`` int64 in ``[0, K)``.
        areas: ``(N,)`` float64, px^2.
        crowd: ``(N,)`` bool.
        difficult: ``(N,)`` bool: VOC's difficult objects, and those that COCO says to ignore.
        segmentations: of each its polygons, or compressed RLE of the image's size; None where they
            were not asked for.
        keypoints: ``(N, K, 3)`` float32; None where they were not asked for.
    """

    boxes: NDArray[np.float64]
    labels: NDArray[np.int64]
    areas: NDArray[np.float64]
    crowd: NDArray[np.bool_]
    difficult: NDArray[np.bool_]
    segmentations: Sequence[Any] | None = None
    keypoints: NDArray[np.float32] | None = None


class _Record(Protocol):
    @property
    def image(self) -> ImageFile: ...


RecordT = TypeVar("RecordT", bound=_Record)
SampleT = TypeVar("SampleT")


class ImageData(Generic[RecordT, SampleT]):
    """Images with annotations, read from disk one by one: ``len(data)``, ``data[i]``.

    Attributes:
        classes: names of the classes; the label or mask value ``i`` means ``classes[i]``.
        faults: what was found to be wrong in the files that were read.
    """

    def __init__(
        self, records: list[RecordT], classes: list[str], faults: list[Fault], faulty: Faulty
    ) -> None:
        if faulty not in ("skip", "refuse"):
            raise DataError(f"faulty={faulty!r} is neither 'skip' nor 'refuse'")
        if faults and faulty == "refuse":
            raise DataError(
                f"{summarize_faults(faults)}; correct these files, or read them with faulty='skip'"
            )
        if not records:
            raise DataError(
                "no usable image is left" + (f": {summarize_faults(faults)}" if faults else "")
            )
        self._records = records
        self.classes = classes
        self.faults = faults

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> SampleT:
        raise NotImplementedError

    def __iter__(self) -> Iterator[SampleT]:
        return (self[index] for index in range(len(self)))

    @property
    def images(self) -> list[ImageFile]:
        """The image files, in order."""
        return [record.image for record in self._records]

    @property
    def names(self) -> list[str]:
        """The names of the images, in order."""
        return [record.image.name for record in self._records]

    def select(self: DataT, indices: Iterable[int]) -> DataT:
        """The same data restricted to the images at ``indices``, in that order.

        ``faults`` stay those of all that was read.
        """
        selected = copy.copy(self)
        selected._records = [self._records[index] for index in indices]
        return selected


DataT = TypeVar("DataT", bound=ImageData[Any, Any])


@dataclass(frozen=True)
class DetectionRecord:
    image: ImageFile
    objects: Objects


class DetectionData(ImageData[DetectionRecord, DetectionSample]):
    """Images with boxes.

    Attributes:
        category_ids: the data set's own id of each label, for predictions that go back to it.
        mirrored: which keypoint each keypoint becomes in a mirror, such as the left eye the right
            one; empty where there are no keypoints.
    """

    category_ids: list[Id]
    mirrored: Sequence[int] = ()

    def __getitem__(self, index: int) -> DetectionSample:
        record = self._records[index]
        objects = record.objects
        boxes = objects.boxes.copy()
        boxes[:, 2:] += boxes[:, :2]
        return DetectionSample(
            image=read_image(record.image.path, record.image.upright),
            boxes=boxes.astype(np.float32),
            labels=objects.labels.copy(),
            ignored=objects.crowd | objects.difficult,
            image_id=record.image.id,
            keypoints=objects.keypoints,
        )

    @property
    def objects(self) -> list[Objects]:
        """The usable objects of each image, in order; boxes partly outside are clipped."""
        return [record.objects for record in self._records]

    def ground_truth(self) -> dict[str, Any]:
        """The selected images and their usable objects as the content of a COCO annotation file.

        Boxes are XYWH. Objects that were skipped as faulty are absent, and clipped boxes are
        clipped. ``difficult: 1``, where an object is difficult, is no key of COCO: the metrics of
        this package honour it, others count the object like any other.
        """
        annotations: list[dict[str, Any]] = []
        for record in self._records:
            objects = record.objects
            for box, label, area, crowd, difficult in zip(
                objects.boxes.tolist(),
                objects.labels.tolist(),
                objects.areas.tolist(),
                objects.crowd.tolist(),
                objects.difficult.tolist(),
                strict=True,
            ):
                annotation = {
                    "id": len(annotations) + 1,  # pycocotools takes the id 0 for "unmatched"
                    "image_id": record.image.id,
                    "category_id": self.category_ids[label],
                    "bbox": box,
                    "area": area,
                    "iscrowd": int(crowd),
                }
                if difficult:
                    annotation["difficult"] = 1
                annotations.append(annotation)
        return {
            "images": [
                {"id": i.id, "file_name": i.name, "width": i.width, "height": i.height}
                for i in self.images
            ],
            "annotations": annotations,
            "categories": [
                {"id": category, "name": name}
                for category, name in zip(self.category_ids, self.classes, strict=True)
            ],
        }


def subset(data: DataT, number: int, seed: int) -> DataT:
    """At most ``number`` images chosen by ``seed``, in the order they had.

    A smaller subset of the same seed is a part of a larger one.
    """
    if number < 1:
        raise DataError(f"a subset of {number} images was asked for; take at least 1")
    return data.select(sorted(_shuffled(len(data), seed)[:number]))


def split(data: DataT, fraction: float, seed: int) -> tuple[DataT, DataT]:
    """A training and a validation part; ``fraction`` of the images (at least one) validate.

    Both parts keep the order of the images; equal seeds give equal parts.
    """
    if not 0 < fraction < 1:
        raise DataError(f"the validation fraction {fraction} is not between 0 and 1")
    if len(data) < 2:
        raise DataError("a single image cannot be split into training and validation")
    number = min(max(1, round(fraction * len(data))), len(data) - 1)
    order = _shuffled(len(data), seed)
    return data.select(sorted(order[number:])), data.select(sorted(order[:number]))


def select_listed(data: DataT, file: str | Path) -> DataT:
    """The images named in a text file, one name a line, with or without extension.

    The data keeps its own order. Empty lines are skipped.

    Raises:
        DataError: the file cannot be read, or names an image that the data does not have.
    """
    file = Path(file)
    lines = read_text(file).splitlines()
    positions: dict[str, int] = {}
    for index, name in enumerate(data.names):
        positions[name] = index
        positions.setdefault(str(Path(name).with_suffix("")), index)
    chosen = set()
    for number, line in enumerate(lines, start=1):
        if not (name := line.strip()):
            continue
        if name not in positions:
            raise DataError(
                f"{file}, line {number}: no usable image is called {name!r}"
                + did_you_mean(name, positions)
            )
        chosen.add(positions[name])
    return data.select(sorted(chosen))


def choose_classes(known: Sequence[str], wanted: Sequence[str] | None, file: Path) -> list[int]:
    """Positions in ``known`` of the ``wanted`` classes, in the order wanted; None wants all."""
    if wanted is None:
        return list(range(len(known)))
    if not wanted:
        raise DataError("the list of classes is empty; name some, or leave it out to have all")
    if repeated := [name for name, n in Counter(wanted).items() if n > 1]:
        raise DataError(f"the class {repeated[0]!r} is listed twice")
    for name in wanted:
        if name not in known:
            raise DataError(f"{file}: there is no class {name!r}{did_you_mean(name, known)}")
    return [known.index(name) for name in wanted]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of an error message: the nearest known names, or what there is."""
    names = [str(candidate) for candidate in known]
    lower = {candidate.lower(): candidate for candidate in names}
    near = [lower[match] for match in difflib.get_close_matches(name.lower(), lower, n=3)]
    if near:
        return f"; did you mean {', '.join(map(repr, near))}?"
    return f"; there are {', '.join(names[:20])}{', ...' if len(names) > 20 else ''}"


def check_box(
    box: tuple[float, float, float, float], width: int, height: int
) -> tuple[tuple[float, float, float, float] | None, str | None]:
    """Judge one XYXY box against its image.

    Returns:
        The box clipped to the image, or None where nothing usable is left; and the reason of the
        fault, or None. Up to one pixel beyond the border is rounding of the annotation tool:
        clipped, and no fault.
    """
    x1, y1, x2, y2 = box
    if not np.isfinite(box).all():
        return None, "box is not finite"
    if not _has_area(box, width, height):
        return None, "box has no area"
    clipped = (max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height)))
    if not _has_area(clipped, width, height):
        return None, "box is outside the image"
    excess = max(abs(a - b) for a, b in zip(box, clipped, strict=True))
    return clipped, "box is partly outside the image, clipped" if excess > 1 else None


def _has_area(box: tuple[float, float, float, float], width: int, height: int) -> bool:
    """Judged in float32 as a fraction of the image, as augmentation will see the box."""
    with np.errstate(over="ignore"):
        x1, y1, x2, y2 = np.array(box, np.float32) / np.array([width, height] * 2, np.float32)
    return bool(x1 < x2 and y1 < y2)


def inside(directory: Path, name: str) -> Path | None:
    """The file below ``directory`` that a name in a data file means; None for any other name.

    Names come from strangers' files: an absolute one, one with ``..``, or one that no file system
    takes, must not be read or written. A backslash separates folders, as on Windows.
    """
    path = PurePosixPath(name.replace("\\", "/"))
    strange = path.is_absolute() or ".." in path.parts or re.match("[A-Za-z]:", name)
    if strange or not path.parts or "\0" in name or not is_text(name):
        return None
    return directory / path


def is_text(value: object) -> TypeGuard[str]:
    """Whether it is text that can be printed and encoded: JSON may hold halves of characters."""
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


def shown(value: object) -> str:
    """A value of a data file as a message can show it: short and printable, whatever it is."""
    try:
        return _short.repr(value)
    except ValueError:  # an integer of more digits than Python is willing to print
        return f"{type(value).__name__} with a number of very many digits"


_short = reprlib.Repr()
_short.maxlist = _short.maxdict = 8
_short.maxstring = _short.maxother = 80


def read_text(file: Path) -> str:
    """The text of a file in UTF-8, in UTF-16 with a byte order mark, or else in Latin-1.

    Raises:
        DataError: it cannot be read.
    """
    content = read_bytes(file)
    encoding = "utf-16" if content.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    try:
        return content.decode(encoding)
    except UnicodeDecodeError:
        return content.decode("latin-1")


def read_bytes(file: Path) -> bytes:
    """The content of a file.

    Raises:
        DataError: it cannot be read.
    """
    try:
        check_regular(file)
        return file.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise DataError(f"{file}: cannot be read ({reason})") from error


def check_regular(file: Path) -> None:
    """Raise an OSError unless ``file`` is a regular one: to open a pipe would wait for ever."""
    mode = os.stat(file).st_mode
    if not stat.S_ISREG(mode):
        raise OSError(f"is {'a folder' if stat.S_ISDIR(mode) else 'a device or pipe'}, not a file")


def to_number(value: object) -> float | None:
    """A finite number that was written as one or, as some converters do, as text; else None."""
    if type(value) is float:
        return value if math.isfinite(value) else None
    if isinstance(value, bool) or not isinstance(value, (float, int, str, np.number)):
        return None
    if isinstance(value, str) and "_" in value:
        return None  # Python takes 1_000 for a number, other programs do not
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def to_numbers(values: object, length: int | None = None) -> list[float] | None:
    """A list of finite numbers, see :func:`to_number`; None for anything else."""
    if not isinstance(values, (list, tuple, np.ndarray)):
        return None
    if length is not None and len(values) != length:
        return None
    found = [number for value in values if (number := to_number(value)) is not None]
    return found if len(found) == len(values) else None


def to_id(value: object) -> Id | None:
    """An id: an integer, also one written as 1.0, or text; None for anything else."""
    if isinstance(value, str):
        return value
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        return int(value)
    if isinstance(value, (float, np.floating)) and float(value).is_integer():
        return int(value)
    return None


_FLAGS = {"true": 1, "yes": 1, "false": 0, "no": 0, "": 0}


def to_flag(value: object) -> bool | None:
    """A truth value that was written as such, as 0 or 1, as text, or not at all (None is False).

    None stands for what is neither true nor false.
    """
    if value is None or isinstance(value, bool):
        return bool(value)
    if isinstance(value, str):
        value = _FLAGS.get(value.strip().lower(), value)
    number = to_number(value)
    return bool(number) if number in (0, 1) else None


UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    RuntimeError,
    struct.error,
    Image.DecompressionBombError,
    ImportError,
)
"""What Pillow raises for images that it cannot decode; the last one where Ultralytics, which makes
it ask for a plug-in, has been imported.
"""

_END_MARKS = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}


@dataclass(frozen=True)
class Header:
    """What the beginning of an image file tells.

    Attributes:
        width: in pixels, as stored.
        height: in pixels, as stored.
        mode: Pillow's name of the kind of pixels: ``"RGB"``, ``"P"``, ``"L"``, ...
        format: Pillow's name of the format: ``"JPEG"``, ``"PNG"``, ...
        orientation: EXIF's number, 1 where the image is upright or does not say; from 5 on width
            and height change places when it is shown.
    """

    width: int
    height: int
    mode: str
    format: str
    orientation: int = 1


def read_header(file: Path, faults: list[Fault]) -> Header | None:
    """The header of a usable image; None, and a fault more, for any other.

    Decoding every image at the start of each run would take minutes on a large data set. Read are
    the header and the end of the file; only where there is no end mark of JPEG or PNG the image is
    decoded, to tell a truncated file. Damage in the middle shows in :func:`read_image`.
    """
    try:
        check_regular(file)
        with file.open("rb") as stream:
            with Image.open(stream) as image:
                header = Header(*image.size, image.mode, image.format or "", _orientation(image))
            stream.seek(0, os.SEEK_END)
            stream.seek(max(0, stream.tell() - 4096))
            mark = _END_MARKS.get(header.format)
            complete = mark is not None and mark in stream.read()
        if not complete:
            _decode(file)
    except FileNotFoundError:
        faults.append(Fault(file, None, "image is missing"))
    except UNREADABLE as error:
        faults.append(Fault(file, None, "image is broken", error))
    else:
        return header
    return None


def check_image(
    file: Path,
    stated: tuple[float, float] | None,
    faults: list[Fault],
    stated_by: str = "annotation states",
) -> tuple[int, int, bool] | None:
    """Judge an image against the size that its annotation states.

    The EXIF orientation is applied where only then the image has that size: the annotation was
    made on the image as it is shown. Otherwise it is not, as in the official tools of COCO and
    VOC.

    Returns:
        Width, height and whether the orientation is to be applied; None, and a fault more, for an
        image that cannot be used.
    """
    header = read_header(file, faults)
    if header is None:
        return None
    if header.mode[0] in "IF":
        faults.append(Fault(file, None, "image has more than 8 bits a channel", header.mode))
        return None
    size = header.width, header.height
    shown = size[::-1] if header.orientation >= 5 else size
    if stated in (None, size):
        return *size, False
    if stated == shown:
        return *shown, True
    found = f"{size[0]}x{size[1]}"
    if header.orientation != 1:
        found += f" with EXIF orientation {header.orientation}"
    reason = f"image is not of the size that its {stated_by}"
    faults.append(Fault(file, None, reason, f"{found} for {stated[0]:g}x{stated[1]:g}"))
    return None


def _orientation(image: Image.Image) -> int:
    if image.format == "PNG" and "exif" not in image.info:
        return 1  # to look for a later block would decode the image
    if image.format == "TIFF":
        return 1  # Pillow has turned it
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except UNREADABLE:
        return 1  # a damaged tag is no damaged image
    return orientation if orientation in range(1, 9) else 1


def _decode(file: Path, upright: bool = False) -> Image.Image:
    with Image.open(file) as image:
        return ImageOps.exif_transpose(image) if upright else image.copy()


def read_image(file: Path, upright: bool = False) -> NDArray[np.uint8]:
    """An image as ``(H, W, 3)`` uint8 RGB; grey, palette and transparent ones are converted.

    Args:
        file: the image.
        upright: apply the orientation of EXIF, see :func:`check_image`.

    Raises:
        DataError: the image cannot be decoded, or has more than 8 bits a channel.
    """
    try:
        check_regular(file)
        image = _decode(file, upright)
        if image.mode[0] not in "IF":
            return np.array(image.convert("RGB"))
    except UNREADABLE as error:
        raise DataError(f"{file}: cannot be decoded ({error}); replace or remove it") from error
    raise DataError(f"{file}: has more than 8 bits a channel; convert it to 8 bits")


def to_results(
    image_id: Id,
    boxes: torch.Tensor,
    scores: torch.Tensor,
    labels: torch.Tensor,
    category_ids: Sequence[Id],
) -> list[dict[str, Any]]:
    """The predictions for one image as entries of a COCO results file.

    Args:
        image_id: the image's id.
        boxes: ``(N, 4)``, XYXY in pixels of the original image.
        scores: ``(N,)``.
        labels: ``(N,)``, in ``[0, K)``.
        category_ids: the original id of each of the K labels.
    """
    results = []
    for (x1, y1, x2, y2), score, label in zip(
        boxes.tolist(), scores.tolist(), labels.tolist(), strict=True
    ):
        if not 0 <= label < len(category_ids):
            raise ValueError(f"label {label} is outside [0, {len(category_ids)})")
        results.append(
            {
                "image_id": image_id,
                "category_id": category_ids[label],
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "score": score,
            }
        )
    return results


def category_names(categories: Sequence[dict[str, Any]]) -> dict[Id, str]:
    """Names by id, integers before text, each upwards.

    A name that several ids bear (Roboflow writes such files) gets its id added.
    """
    counts = Counter(category["name"] for category in categories)
    return {
        c["id"]: c["name"] if counts[c["name"]] == 1 else f"{c['name']}#{c['id']}"
        for c in sorted(categories, key=lambda category: id_order(category["id"]))
    }


def id_order(value: Id) -> tuple[bool, Id]:
    """What to sort ids by: integers before text, each upwards."""
    return isinstance(value, str), value


def check_content(content: object, origin: object) -> dict[str, Any]:
    """The content of a COCO annotation file, with ids as :func:`to_id` reads them.

    Only what every use of such a file needs is judged: lists of images, annotations and
    categories, whose entries are objects; ids, each once; and the names of the categories.

    Args:
        content: what the file holds.
        origin: what a message calls it.

    Raises:
        DataError: naming the entry.
    """
    if not isinstance(content, dict):
        found = "a list, as results files are" if isinstance(content, list) else shown(content)
        raise DataError(
            f"{origin}: is {found}; an annotation file has images, annotations and categories"
        )
    checked = dict(content)
    for section in ("images", "categories", "annotations"):
        entries = content.get(section)
        if not isinstance(entries, list):
            raise DataError(f"{origin}: has no list of {section}; a COCO annotation file needs one")
        for index, entry in enumerate(entries):
            if not isinstance(entry, dict):
                raise DataError(f"{origin}: {section}[{index}] is {shown(entry)} and not an object")
            if section == "categories" and not is_text(entry.get("name")):
                raise DataError(
                    f"{origin}: categories[{index}] has name = {shown(entry.get('name'))}; make "
                    "it a string"
                )
        if section != "annotations":
            checked[section] = _identified(entries, f"{origin}: {section}")
    return checked


def check_ground_truth(content: object) -> dict[str, Any]:
    """The content of a COCO annotation file, as :func:`check_content`, by which one can judge.

    Raises:
        DataError: naming the entry, or there are no images or no categories.
    """
    checked = check_content(content, "ground truth")
    for section in ("images", "categories"):
        if not checked[section]:
            raise DataError(f"ground truth: there are no {section}, so nothing can be judged")
    return checked


def _identified(entries: list[dict[str, Any]], place: str) -> list[dict[str, Any]]:
    by_id: dict[Id, dict[str, Any]] = {}
    for index, entry in enumerate(entries):
        key = to_id(entry.get("id"))
        if key is None:
            raise DataError(
                f"{place}[{index}] has id = {shown(entry.get('id'))}; make it an integer or a "
                "string"
            )
        if key in by_id:
            raise DataError(f"{place}[{index}] repeats the id {shown(key)}")
        by_id[key] = {**entry, "id": key}
    return list(by_id.values())


def check_results(results: object, origin: object) -> list[dict[str, Any]]:
    """The entries of a COCO results file, with ids and numbers as the readers read them.

    Args:
        results: what the file holds.
        origin: what a message calls it.

    Raises:
        DataError: naming the entry.
    """
    if not isinstance(results, (list, tuple)):
        raise DataError(
            f"{origin}: is no list; a results file is a list of entries with image_id, "
            "category_id, bbox and score"
        )
    checked = []
    for index, entry in enumerate(results):
        for key in ("image_id", "category_id", "bbox", "score"):
            if not isinstance(entry, dict) or key not in entry:
                raise DataError(f"{origin}: entry {index} has no {key!r}")
        box, score = to_numbers(entry["bbox"], 4), to_number(entry["score"])
        if box is None or score is None:
            raise DataError(
                f"{origin}: entry {index} has the bbox {shown(entry['bbox'])} and the score "
                f"{shown(entry['score'])}; needed are x, y, width, height and a score, finite "
                "numbers"
            )
        ids = _ids(entry, f"{origin}: entry {index}")
        checked.append({**entry, **ids, "bbox": box, "score": score})
    return checked


def _ids(entry: dict[str, Any], place: str) -> dict[str, Id]:
    ids = {}
    for key in ("image_id", "category_id"):
        value = to_id(entry.get(key))
        if value is None:
            raise DataError(
                f"{place} has {key} = {shown(entry.get(key))}; make it an integer or a string"
            )
        ids[key] = value
    return ids


def to_area(annotation: dict[str, Any], box_area: float) -> tuple[float, str | None]:
    """The area that an object states, or that of its box; and the fault, or None.

    An area that is absent or null is no fault, one that is negative or no number is.
    """
    stated = annotation.get("area")
    area = to_number(stated)
    if area is not None and area >= 0:
        return area, None
    fault = "area is not a number from 0 up, that of the box is taken"
    return box_area, None if stated is None else fault


def usable_objects(ground_truth: dict[str, Any], notes: list[str]) -> list[dict[str, Any]]:
    """The objects that a metric can judge by; what was left out or mended is said in ``notes``.

    Args:
        ground_truth: what :func:`check_content` returned.
        notes: sentences are added here.

    Returns:
        Of each object ``image_id``, ``category_id``, ``bbox`` (four floats, XYWH), ``area``,
        ``iscrowd`` and ``difficult`` (also where COCO says ``ignore``), the last two bool.

    Raises:
        DataError: naming the object that has no box or ids, or a flag that is neither 0 nor 1.
    """
    objects = []
    unsized = []
    for index, annotation in enumerate(ground_truth["annotations"]):
        place = f"ground truth: annotations[{index}]"
        ids = _ids(annotation, place)
        box = to_numbers(annotation.get("bbox"), 4)
        if box is None:
            raise DataError(
                f"{place} has the bbox {shown(annotation.get('bbox'))}; boxes can only be judged "
                "where each object has four finite numbers x, y, width, height"
            )
        flags = {}
        for key in ("iscrowd", "ignore", "difficult"):
            flag = to_flag(annotation.get(key))
            if flag is None:
                raise DataError(f"{place} has {key} = {shown(annotation[key])}; make it 0 or 1")
            flags[key] = flag
        area, fault = to_area(annotation, box[2] * box[3])
        if fault:
            unsized.append(index)
        difficult = flags["ignore"] or flags["difficult"]
        objects.append(
            {**ids, "bbox": box, "area": area, "iscrowd": flags["iscrowd"], "difficult": difficult}
        )
    if unsized:
        some = ", ".join(f"annotations[{index}]" for index in unsized[:5])
        notes.append(
            f"{len(unsized)} objects of the ground truth have an area that is not a number from 0 "
            f"up ({some}): that of the box was taken."
        )
    return _known(objects, ground_truth, "objects of the ground truth", notes)


def usable_results(
    ground_truth: dict[str, Any], results: Sequence[dict[str, Any]], notes: list[str]
) -> list[dict[str, Any]]:
    """The predictions that a metric can judge; what is left out is said in ``notes``.

    Raises:
        DataError: naming the prediction without ids, a box or a score; or the ground truth is no
            content of an annotation file.
    """
    content = check_content(ground_truth, "ground truth")
    usable = _known(check_results(results, "results"), content, "predictions", notes)
    if not usable:
        notes.append("There is no prediction to judge.")
    return usable


_OTHER_KIND = {
    (frozenset([str]), frozenset([int])): ", whose ids are integers, not text",
    (frozenset([int]), frozenset([str])): ", whose ids are text, not integers",
}


def _known(
    entries: list[dict[str, Any]], ground_truth: dict[str, Any], what: str, notes: list[str]
) -> list[dict[str, Any]]:
    """The entries whose image and category the ground truth has."""
    for key, section in (("image_id", "images"), ("category_id", "categories")):
        known = {entry["id"] for entry in ground_truth[section]}
        unknown = [entry[key] for entry in entries if entry[key] not in known]
        if not unknown:
            continue
        some = ", ".join(map(shown, list(dict.fromkeys(unknown))[:5]))
        hint = _OTHER_KIND.get((frozenset(map(type, unknown)), frozenset(map(type, known))), "")
        notes.append(
            f"{len(unknown)} {what} were left out: their {key} ({some}) is not in the ground "
            f"truth's list of {section}{hint}."
        )
        entries = [entry for entry in entries if entry[key] in known]
    return entries


def _shuffled(number: int, seed: int) -> list[int]:
    order: list[int] = np.random.default_rng(seed).permutation(number).tolist()
    return order
