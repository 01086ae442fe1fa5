"""The VOC readers on hand-made and real files, VOC's AP and the confusion matrix."""

from __future__ import annotations

import os
import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageOps

from detseg_losses.integrations.coco import (
    CocoDetection,
    CocoSegmentation,
    coco_metrics,
    coco_splits,
    find_coco,
    load_annotations,
    load_results,
)
from detseg_losses.integrations.samples import (
    DataError,
    SegmentationSample,
    select_listed,
    split,
    subset,
)
from detseg_losses.integrations.voc import (
    VOC_CLASSES,
    ConfusionMatrix,
    VocDetection,
    VocSegmentation,
    voc_metrics,
    voc_splits,
)

Json = dict[str, Any]


def xml_object(name: str, box: tuple[Any, ...], extra: str = "") -> str:
    keys = ("xmin", "ymin", "xmax", "ymax")
    corners = "".join(f"<{k}>{v}</{k}>" for k, v in zip(keys, box, strict=True))
    return f"<object><name>{name}</name>{extra}<bndbox>{corners}</bndbox></object>"


def xml(*objects: str, size: tuple[int, int] = (40, 30)) -> str:
    width, height = size
    return (
        f"<annotation><size><width>{width}</width><height>{height}</height></size>"
        f"{''.join(objects)}</annotation>"
    )


DIFFICULT = "<difficult>1</difficult>"
HEAD = "<part><name>head</name><bndbox><xmin>3</xmin></bndbox></part>"


def write_detection(root: Path, split_name: str = "train") -> Path:
    """Three images of 40 x 30 pixels in VOC's layout."""
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    (root / "ImageSets/Main" / f"{split_name}.txt").write_text("b\na 1\nc\n")
    for name in ("a 1", "b", "c"):
        Image.new("RGB", (40, 30), "red").save(root / "JPEGImages" / f"{name}.jpg")
    objects = xml_object("person", (1, 1, 10, 20), HEAD), xml_object("dog", (5, 5, 8, 8), DIFFICULT)
    (root / "Annotations/a 1.xml").write_text(xml(*objects))
    (root / "Annotations/b.xml").write_text(xml(xml_object("dog", (30.0, 20.0, 40.0, 30.0))))
    (root / "Annotations/c.xml").write_text(xml())
    return root


def test_detection_sample(tmp_path: Path) -> None:
    data = VocDetection(write_detection(tmp_path), "train")
    assert data.names == ["b.jpg", "a 1.jpg", "c.jpg"]
    assert data.classes == VOC_CLASSES
    assert data.category_ids == list(range(1, 21))
    assert data.faults == []
    sample = data[1]
    assert sample.image.shape == (30, 40, 3)
    # pixels 1 to 10 across and 1 to 20 down
    np.testing.assert_array_equal(sample.boxes, [[0, 0, 10, 20], [4, 4, 8, 8]])
    assert [VOC_CLASSES[label] for label in sample.labels] == ["person", "dog"]
    np.testing.assert_array_equal(sample.ignored, [False, True])
    np.testing.assert_array_equal(data[0].boxes, [[29, 19, 40, 30]])
    assert data[2].boxes.shape == (0, 4)
    person, dog = data.select([1]).ground_truth()["annotations"]
    assert (person["bbox"], person["area"]) == ([0, 0, 10, 20], 200)
    assert (person["category_id"], person["iscrowd"]) == (15, 0)
    assert "difficult" not in person
    assert (dog["difficult"], dog["iscrowd"]) == (1, 0)


def test_classes(tmp_path: Path) -> None:
    root = write_detection(tmp_path)
    people = VocDetection(root, "train", classes=["person"])
    assert people.names == ["a 1.jpg"]
    assert (people.classes, people.category_ids) == (["person"], [15])
    np.testing.assert_array_equal(people[0].labels, [0])
    with pytest.raises(DataError, match="no class 'persons'; did you mean 'person'"):
        VocDetection(root, "train", classes=["persons"])
    # a name that is none of VOC's anywhere below makes it another data set, for every split
    (root / "Annotations/other.xml").write_text(xml(xml_object("zebra", (1, 1, 5, 5))))
    assert VocDetection(root, "train").classes == ["dog", "person", "zebra"]
    (root / "classes.txt").write_text("person\ndog\n")
    listed = VocDetection(root, "train")
    assert listed.classes == ["person", "dog"]
    np.testing.assert_array_equal(listed[1].labels, [0, 1])
    (root / "classes.txt").write_text("dog\n")
    (fault,) = VocDetection(root, "train").faults
    assert (fault.file.name, fault.index) == ("a 1.xml", 0)
    assert (fault.reason, fault.value) == ("unknown class", "person")


@pytest.mark.parametrize(
    ("box", "reason", "kept"),
    [
        ((12, 9, 12, 9), "box has no area", None),
        ((12, 9, 11, 20), "box has no area", None),
        ((50, 1, 60, 10), "box is outside the image", None),
        ((31, 21, 50, 30), "box is partly outside the image, clipped", [30, 20, 40, 30]),
        (("nan", 1, 5, 5), "box is not finite", None),
        (("left", 1, 5, 5), "box is not four numbers", None),
    ],
)
def test_faulty_box(
    tmp_path: Path, box: tuple[Any, ...], reason: str, kept: list[float] | None
) -> None:
    root = write_detection(tmp_path)
    file = root / "Annotations/b.xml"
    file.write_text(xml(xml_object("dog", (1, 1, 4, 4)), xml_object("cat", box)))
    data = VocDetection(root, "train")
    assert [(f.file, f.index, f.reason) for f in data.faults] == [(file, 1, reason)]
    np.testing.assert_array_equal(data[0].boxes, [[0, 0, 4, 4]] + ([kept] if kept else []))
    with pytest.raises(DataError, match=r"b\.xml, entry 1: box"):
        VocDetection(root, "train", faulty="refuse")


@pytest.mark.parametrize(
    ("file", "damage", "reason"),
    [
        ("JPEGImages/b.jpg", Path.unlink, "image is missing"),
        ("JPEGImages/b.jpg", lambda f: f.write_bytes(f.read_bytes()[:400]), "image is broken"),
        ("Annotations/b.xml", Path.unlink, "annotation is missing"),
        ("Annotations/b.xml", lambda f: f.write_text("<a>"), "annotation is not valid XML"),
    ],
)
def test_faulty_file(
    tmp_path: Path, file: str, damage: Callable[[Path], object], reason: str
) -> None:
    root = write_detection(tmp_path)
    damage(root / file)
    data = VocDetection(root, "train")
    assert [(f.file, f.index, f.reason) for f in data.faults] == [(root / file, None, reason)]
    assert data.names == ["a 1.jpg", "c.jpg"]


def test_other_image_formats_and_a_size_left_at_zero(tmp_path: Path) -> None:
    root = write_detection(tmp_path)
    (root / "JPEGImages/b.jpg").unlink()
    Image.new("L", (40, 30)).save(root / "JPEGImages/b.png")
    (root / "Annotations/b.xml").write_text(xml(size=(0, 0)))
    data = VocDetection(root, "train", faulty="refuse")
    assert data.names[0] == "b.png"
    assert data[0].image.shape == (30, 40, 3)


def test_root_is_found_below_and_ambiguity_is_named(tmp_path: Path) -> None:
    write_detection(tmp_path / "VOCdevkit/VOC2007", "train")
    write_detection(tmp_path / "VOCdevkit/VOC2012", "val")
    (tmp_path / "VOCdevkit/VOC2012/ImageSets/Main/dog_val.txt").touch()
    for root in (tmp_path, tmp_path / "VOCdevkit"):
        assert voc_splits(root, "detection") == ["train", "val"]
        assert voc_splits(root, "segmentation") == []
        assert "VOC2012" in str(VocDetection(root, "val").images[0].path)
    with pytest.raises(DataError, match=r"Main/test\.txt .* splits found: train, val"):
        VocDetection(tmp_path, "test")
    write_detection(tmp_path / "VOCdevkit/VOC2012", "train")
    with pytest.raises(DataError, match=r"name one as root: \S*VOC2007, \S*VOC2012"):
        VocDetection(tmp_path, "train")


def write_segmentation(root: Path) -> Path:
    for folder in ("SegmentationClass", "JPEGImages", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    (root / "ImageSets/Segmentation/val.txt").write_text("a\nb\n")
    for name in ("a", "b"):
        Image.new("RGB", (40, 30), "red").save(root / f"JPEGImages/{name}.jpg")
        save_mask(root / f"SegmentationClass/{name}.png", np.full((30, 40), 255, np.uint8))
    return root


def save_mask(file: Path, mask: NDArray[np.uint8]) -> None:
    image = Image.fromarray(mask, "P")
    image.putpalette(np.random.default_rng(0).integers(0, 256, 768, dtype=np.uint8).tobytes())
    image.save(file)


def test_segmentation_sample(tmp_path: Path) -> None:
    root = write_segmentation(tmp_path)
    mask = np.random.default_rng(0).integers(0, 21, (30, 40), dtype=np.uint8)
    mask[:3] = 255
    save_mask(root / "SegmentationClass/b.png", mask)
    data = VocSegmentation(root, "val")
    assert data.classes == ["background", *VOC_CLASSES]
    sample = data[1]
    np.testing.assert_array_equal(sample.mask, mask)
    assert sample.mask.dtype == np.uint8
    assert (sample.name, sample.image.shape) == ("b.jpg", (30, 40, 3))

    (root / "classes.txt").write_text("sky\nroad\n")
    data = VocSegmentation(root, "val")
    assert data.classes == ["sky", "road"]
    assert (data[0].mask == 255).all()
    message = r"b\.png: holds the value 2, but there are 2 classes"
    with pytest.raises(DataError, match=message):
        data[1]


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (Path.unlink, "image is missing"),
        (lambda f: f.write_bytes(f.read_bytes()[:-40]), "image is broken"),
        (lambda f: Image.new("RGB", (40, 30)).save(f), "mask is not an image of class indices"),
    ],
    ids=["missing", "truncated", "colours"],
)
def test_faulty_mask(tmp_path: Path, damage: Callable[[Path], object], reason: str) -> None:
    root = write_segmentation(tmp_path)
    damage(root / "SegmentationClass/a.png")
    data = VocSegmentation(root, "val")
    (fault,) = data.faults
    assert fault.reason.startswith(reason)
    assert fault.file == root / "SegmentationClass/a.png"
    assert data.names == ["b.jpg"]
    with pytest.raises(DataError, match=r"a\.png"):
        VocSegmentation(root, "val", faulty="refuse")


def test_segmentation_data_can_be_divided(tmp_path: Path) -> None:
    data = VocSegmentation(write_segmentation(tmp_path), "val")
    assert len(subset(data, 1, seed=0)) == 1
    train, val = split(data, 0.5, seed=0)
    assert sorted(train.names + val.names) == ["a.jpg", "b.jpg"]
    (tmp_path / "list.txt").write_text("b\n")
    chosen = select_listed(data, tmp_path / "list.txt")
    assert isinstance(chosen, VocSegmentation)
    assert chosen[0].name == "b.jpg"


def replace_text(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def reasons(data: VocDetection | VocSegmentation) -> list[tuple[str, int | None, str]]:
    return [(fault.file.name, fault.index, fault.reason) for fault in data.faults]


@pytest.mark.parametrize(
    ("encoding", "declared", "name"),
    [
        ("gbk", "GBK", "狗"),
        ("gb2312", "gb2312", "狗"),
        ("big5", "Big5", "狗"),
        ("shift_jis", "Shift_JIS", "犬"),
        ("koi8-r", "KOI8-R", "собака"),
        ("latin-1", "ISO-8859-1", "café"),
        ("utf-8", "utf-8", "狗"),
        ("utf-8-sig", "UTF-8", "狗"),
        ("utf-8-sig", None, "狗"),
        ("utf-16", "UTF-16", "狗"),
        ("utf-16", None, "狗"),
        ("utf-16", "utf-8", "狗"),
        ("utf-16-le", "UTF-16LE", "狗"),
    ],
)
def test_annotations_are_read_in_the_encoding_that_they_declare(
    tmp_path: Path, encoding: str, declared: str | None, name: str
) -> None:
    root = write_detection(tmp_path)
    head = f'<?xml version="1.0" encoding="{declared}"?>\n' if declared else ""
    text = head + xml(xml_object(name, (2, 2, 5, 5)))
    (root / "Annotations/b.xml").write_bytes(text.encode(encoding))
    data = VocDetection(root, "train", faulty="refuse")
    assert data.classes == sorted(["dog", "person", name])
    assert data.classes[data[0].labels[0]] == name


def deep(levels: int) -> str:
    return "<annotation>" + "<a>" * levels + "</a>" * levels + "</annotation>"


BOMB = "<!DOCTYPE z [<!ENTITY a0 'ha'>{}]><annotation>&a30;</annotation>".format(
    "".join(f"<!ENTITY a{i + 1} '&a{i};&a{i};'>" for i in range(30))
)
STRANGE_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "unknown encoding": (
        lambda f: f.write_text('<?xml version="1.0" encoding="klingon"?>' + xml()),
        "annotation is not valid XML",
    ),
    "no encoding of text": (
        lambda f: f.write_text('<?xml version="1.0" encoding="zlib"?>' + xml()),
        "annotation is not valid XML",
    ),
    "another encoding than declared": (
        lambda f: f.write_bytes('<?xml version="1.0" encoding="utf-8"?><狗/>'.encode("gbk")),
        "annotation is not valid XML",
    ),
    "GBK, undeclared": (
        lambda f: f.write_bytes("<狗/>".encode("gbk")),
        "annotation is not valid XML",
    ),
    "half of UTF-16": (
        lambda f: f.write_bytes(xml().encode("utf-16")[:-1]),
        "annotation is not valid XML",
    ),
    "UTF-32": (lambda f: f.write_bytes(xml().encode("utf-32")), "annotation is not valid XML"),
    "empty": (lambda f: f.write_bytes(b""), "annotation is not valid XML"),
    "NUL": (lambda f: f.write_bytes(bytes(100)), "annotation is not valid XML"),
    "entity bomb": (lambda f: f.write_text(BOMB), "annotation is not valid XML"),
    "external entity": (
        lambda f: f.write_text(
            '<!DOCTYPE z [<!ENTITY e SYSTEM "file:///etc/passwd">]><annotation>&e;</annotation>'
        ),
        "annotation is not valid XML",
    ),
    "deep, unfinished": (
        lambda f: f.write_text(deep(100_000)[:-20]),
        "annotation is not valid XML",
    ),
    "huge": (
        lambda f: (f.touch(), os.truncate(f, 2**40)),
        "annotation is larger than 33554432 bytes",
    ),
    "folder": (Path.mkdir, "annotation cannot be read"),
    "pipe": (os.mkfifo, "annotation cannot be read"),
    "loop": (lambda f: f.symlink_to(f), "annotation cannot be read"),
}


@pytest.mark.parametrize("kind", STRANGE_FILES)
def test_a_strange_annotation_is_its_own_fault(tmp_path: Path, kind: str) -> None:
    root = write_detection(tmp_path)
    make, reason = STRANGE_FILES[kind]
    make(root / "Annotations/outside the split.xml")
    assert VocDetection(root, "train", faulty="refuse").classes == VOC_CLASSES
    (root / "Annotations/b.xml").unlink()
    make(root / "Annotations/b.xml")
    data = VocDetection(root, "train")
    assert reasons(data) == [("b.xml", None, reason)]
    assert data.names == ["a 1.jpg", "c.jpg"]


def test_a_deep_annotation_is_read(tmp_path: Path) -> None:
    root = write_detection(tmp_path)
    (root / "Annotations/b.xml").write_text(deep(100_000))
    assert len(VocDetection(root, "train", faulty="refuse")) == 3


@pytest.mark.parametrize(
    ("width", "height", "fits"),
    [
        ("40.0", " 30 ", True),
        ("4e1", "+30", True),
        ("", "", True),
        (None, None, True),
        ("40", None, True),
        (None, "30", True),
        ("0", "30", True),
        ("40", "", True),
        ("41", "", True),
        ("wide", "nan", True),
        ("-40", "30", True),
        ("inf", "1e400", True),
        ("30", "40", False),
        ("40", "30.5", False),
        ("41.0", "30", False),
    ],
)
def test_the_stated_size_is_compared_as_numbers(
    tmp_path: Path, width: str | None, height: str | None, fits: bool
) -> None:
    root = write_detection(tmp_path)
    sides = "".join(
        f"<{key}>{value}</{key}>"
        for key, value in (("width", width), ("height", height))
        if value is not None
    )
    old = "<width>40</width><height>30</height>"
    replace_text(root / "Annotations/b.xml", old, sides)
    data = VocDetection(root, "train")
    reason = "image is not of the size that its annotation states"
    assert reasons(data) == ([] if fits else [("b.jpg", None, reason)])


@pytest.mark.parametrize(
    ("beside", "stated", "chosen"),
    [
        (["b.json", "b.txt", "b.xml", "b", "b.zip", "b.npy"], "", "b.jpg"),
        (["b.png"], "", "b.jpg"),
        (["b.png"], "b.png", "b.png"),
        (["b.png"], r"C:\photos\b.png", "b.png"),
        (["b.png"], "/somewhere/else/b.png", "b.png"),
        (["b.png"], "../../b.png", "b.png"),
        (["b.png"], "other.png", "b.jpg"),
        (["b.JPG"], "", "b.JPG"),
        (["b.bmp", "b.webp"], "", "b.jpg"),
    ],
)
def test_which_file_is_the_image(
    tmp_path: Path, beside: list[str], stated: str, chosen: str
) -> None:
    root = write_detection(tmp_path)
    for name in beside:
        (root / "JPEGImages" / name).write_text("{}")
    if chosen != "b.jpg":
        (root / "JPEGImages/b.jpg").replace(root / "JPEGImages" / chosen)
        (root / "JPEGImages/b.jpg").write_text("{}")
    replace_text(
        root / "Annotations/b.xml", "<annotation>", f"<annotation><filename>{stated}</filename>"
    )
    data = VocDetection(root, "train", faulty="refuse")
    assert data.names[0] == chosen


@pytest.mark.parametrize(
    ("present", "chosen"),
    [
        (["tif", "png", "jpeg"], "jpeg"),
        (["tif", "PNG", "bmp"], "PNG"),
        (["webp", "tif", "bmp"], "bmp"),
        (["gif", "csv"], "gif"),
    ],
)
def test_the_order_of_extensions(tmp_path: Path, present: list[str], chosen: str) -> None:
    root = write_detection(tmp_path)
    (root / "JPEGImages/b.jpg").unlink()
    for ending in present:
        (root / "JPEGImages" / f"b.{ending}").touch()
    Image.new("L", (40, 30)).save(root / "JPEGImages" / f"b.{chosen}")
    assert VocDetection(root, "train", faulty="refuse").names[0] == f"b.{chosen}"


OUTSIDE = [
    "../../secret",
    "sub/../../b",
    "..\\b",
    "/etc/passwd",
    "\\\\server\\b",
    "C:\\b",
    "c:b",
    "..",
    ".",
    "/",
]


@pytest.mark.parametrize("task", ["detection", "segmentation"])
@pytest.mark.parametrize("flag", ["", " -1"])
@pytest.mark.parametrize("name", OUTSIDE)
def test_a_name_in_a_list_leads_nowhere_else(
    tmp_path: Path, name: str, flag: str, task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_detection(tmp_path / "root")
    write_segmentation(root)
    lists = {"detection": ("Main", VocDetection), "segmentation": ("Segmentation", VocSegmentation)}
    folder, reader = lists[task]
    (root / f"ImageSets/{folder}/x.txt").write_text(f"b{flag}\n\n{name}{flag}\n")
    touched: list[str] = []
    for function in ("stat", "listdir"):
        known = getattr(os, function)

        def spy(path: Any, *args: Any, known: Any = known, **more: Any) -> Any:
            touched.append(os.path.realpath(path))
            return known(path, *args, **more)

        monkeypatch.setattr(os, function, spy)
    data = reader(root, "x")
    assert touched
    assert all(path.startswith(os.path.realpath(root)) for path in touched)
    (fault,) = data.faults
    assert (fault.file.name, fault.reason) == (
        "x.txt",
        "name is not a path inside the data folder",
    )
    assert fault.value == f"line 3: {name!r}"
    assert data.names == ["b.jpg"]


@pytest.mark.parametrize("split_name", ["../../x", "/x", "..\\x", "x\0", "C:x", "a/../../x"])
@pytest.mark.parametrize("reader", [VocDetection, VocSegmentation])
def test_a_split_leads_nowhere_else(tmp_path: Path, reader: Any, split_name: str) -> None:
    root = write_detection(tmp_path)
    (tmp_path / "x.txt").write_text("b\n")
    with pytest.raises(DataError, match="leads outside of the data; name a list in ImageSets"):
        reader(root, split_name)


@pytest.mark.parametrize("ending", ["jpg", "JPG", "jpeg", "png", "bmp", "tif"])
@pytest.mark.parametrize("name", ["sub/1", "sub\\1", "./sub/1", "sub/deeper/1"])
def test_images_in_sub_folders(tmp_path: Path, name: str, ending: str) -> None:
    root = write_detection(tmp_path)
    write_segmentation(root)
    (root / "ImageSets/Main/x.txt").write_text(f"b\n{name}\n")
    (root / "ImageSets/Segmentation/x.txt").write_text(f"b\n{name}\n")
    plain = name.replace("\\", "/").removeprefix("./")
    for folder in ("JPEGImages", "SegmentationClass", "Annotations"):
        (root / folder / plain).parent.mkdir(parents=True)
    Image.new("RGB", (40, 30)).save(root / "JPEGImages" / f"{plain}.{ending}")
    Image.new("L", (40, 30)).save(root / "SegmentationClass" / f"{plain}.png")
    text = xml(xml_object("zebra", (1, 1, 5, 5)))
    (root / "Annotations" / f"{plain}.xml").write_text(text)
    data = VocDetection(root, "x", faulty="refuse")
    assert data.names == ["b.jpg", f"{plain}.{ending}"]
    assert data.classes == ["dog", "person", "zebra"]
    assert len(data[1].boxes) == 1
    masks = VocSegmentation(root, "x", faulty="refuse")
    assert masks.names == ["b.jpg", f"{plain}.{ending}"]
    assert not masks[1].mask.any()


@pytest.mark.parametrize(
    "content",
    [
        "b\né 1\n".encode("utf-8-sig"),
        "b\né 1\n".encode("utf-16"),
        "b\né 1\n".encode("latin-1"),
        "b\r\né 1\r\n".encode(),
        "\n  b \n\n\té 1".encode(),
        # VOC's lists for a single class
        "b -1\né 1  1\n".encode(),
        "b  0\né 1 -1\n".encode("utf-8-sig"),
    ],
)
def test_lists_are_read_as_they_were_saved(tmp_path: Path, content: bytes) -> None:
    root = write_detection(tmp_path)
    for folder, ending in (("JPEGImages", "jpg"), ("Annotations", "xml")):
        (root / folder / f"a 1.{ending}").rename(root / folder / f"é 1.{ending}")
    (root / "ImageSets/Main/train.txt").write_bytes(content)
    data = VocDetection(root, "train", faulty="refuse")
    assert data.names == ["b.jpg", "é 1.jpg"]
    assert [image.id for image in data.images] == [1, 2]


def test_names_that_look_like_flagged_ones(tmp_path: Path) -> None:
    root = write_detection(tmp_path)
    (root / "ImageSets/Main/train.txt").write_text("a 1\n")
    assert VocDetection(root, "train", faulty="refuse").names == ["a 1.jpg"]


def test_an_image_that_is_listed_twice_is_used_once(tmp_path: Path) -> None:
    root = write_detection(tmp_path)
    (root / "ImageSets/Main/train.txt").write_text("b\nc\n./b\nb\na 1\n")
    data = VocDetection(root, "train")
    assert reasons(data) == [("train.txt", None, "image is listed twice")] * 2
    assert [fault.value for fault in data.faults] == ["line 3: 'b'", "line 4: 'b'"]
    assert data.names == ["b.jpg", "c.jpg", "a 1.jpg"]
    assert [image.id for image in data.images] == [1, 2, 5]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"train\.txt: names no image"),
        (b" \n\n", r"train\.txt: names no image"),
        ("b\n".encode("utf-16-le"), r"train\.txt: is not text.*UTF-8"),
        (bytes(99), r"train\.txt: is not text.*UTF-8"),
        (b"x" * 5000, "annotation cannot be read"),
        (b"x" * 5000 + b"/y", "annotation cannot be read"),
    ],
)
def test_lists_without_a_usable_name(tmp_path: Path, content: bytes, message: str) -> None:
    root = write_detection(tmp_path)
    (root / "ImageSets/Main/train.txt").write_bytes(content)
    with pytest.raises(DataError, match=message):
        VocDetection(root, "train")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "latin-1"])
def test_classes_txt_is_read_as_it_was_saved(tmp_path: Path, encoding: str) -> None:
    root = write_detection(tmp_path)
    write_segmentation(root)
    (root / "classes.txt").write_bytes("dog\r\npérson\r\n\r\nperson".encode(encoding))
    data = VocDetection(root, "train", faulty="refuse")
    assert data.classes == ["dog", "pérson", "person"]
    np.testing.assert_array_equal(data[1].labels, [2, 0])
    assert VocSegmentation(root, "val").classes == data.classes


@pytest.mark.parametrize("reader", [VocDetection, VocSegmentation])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: f.write_text("dog\ncat\ndog\n"), "the class 'dog' is listed twice"),
        (lambda f: f.write_bytes("dog".encode("utf-16-be")), "is not text"),
        (Path.mkdir, "cannot be read"),
        (os.mkfifo, "cannot be read"),
    ],
)
def test_a_strange_classes_txt(
    tmp_path: Path, reader: Any, make: Callable[[Path], object], message: str
) -> None:
    root = write_detection(tmp_path, "val")
    write_segmentation(root)
    make(root / "classes.txt")
    with pytest.raises(DataError, match=rf"classes\.txt: {message}"):
        reader(root, "val")


def test_an_object_without_a_name_is_no_class(tmp_path: Path) -> None:
    root = write_detection(tmp_path)
    replace_text(root / "Annotations/b.xml", "<name>dog</name>", "<name> </name>")
    data = VocDetection(root, "train")
    assert data.classes == VOC_CLASSES
    assert reasons(data) == [("b.xml", 0, "unknown class")]


@pytest.mark.parametrize(
    ("text", "difficult"),
    [
        *((text, True) for text in ("1", " 1 ", "1.0", "true", "True", "YES", "1e0")),
        *((text, False) for text in ("0", "0.0", "false", "No", "", " \n ")),
        *((text, None) for text in ("2", "-1", "0.5", "nan", "inf", "maybe", "Unspecified")),
    ],
)
def test_difficult(tmp_path: Path, text: str, difficult: bool | None) -> None:
    root = write_detection(tmp_path)
    file = root / "Annotations/a 1.xml"
    replace_text(file, DIFFICULT, f"<difficult>{text}</difficult>")
    data = VocDetection(root, "train")
    if difficult is None:
        reason = "difficult is neither true nor false"
        assert reasons(data) == [("a 1.xml", 1, reason)]
        assert data.faults[0].value == text
        assert len(data[1].labels) == 1
    else:
        assert data.faults == []
        np.testing.assert_array_equal(data[1].ignored, [False, difficult])


@pytest.mark.parametrize(
    ("corner", "reason"),
    [
        (" 2.0 ", None),
        ("\n2\n", None),
        ("+2", None),
        ("", "box is not four numbers"),
        ("2,0", "box is not four numbers"),
        ("0x2", "box is not four numbers"),
        ("nan", "box is not finite"),
        ("-inf", "box is not finite"),
        ("-1e400", "box is not finite"),
        ("-1e308", "box is partly outside the image, clipped"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_coordinates_as_text(tmp_path: Path, corner: str, reason: str | None) -> None:
    root = write_detection(tmp_path)
    file = root / "Annotations/b.xml"
    file.write_text(xml(xml_object("dog", (corner, 1, 4, 4)), xml_object("dog", (1, 1, 9, 9))))
    data = VocDetection(root, "train")
    assert reasons(data) == ([] if reason is None else [("b.xml", 0, reason)])
    assert np.isfinite(data[0].boxes).all()


def save_grey(file: Path, bits: int, values: NDArray[np.uint8]) -> None:
    """A grey PNG of 2 or 4 bits, which Pillow reads but does not write."""
    height, width = values.shape
    shifts = np.arange(8 - bits, -1, -bits)
    packed = (values.reshape(height, -1, 8 // bits) << shifts).sum(-1).astype(np.uint8)
    rows = np.pad(packed, ((0, 0), (1, 0))).tobytes()
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    ]
    content = b"\x89PNG\r\n\x1a\n"
    for name, data in chunks:
        content += struct.pack(">I", len(data)) + name + data
        content += struct.pack(">I", zlib.crc32(name + data))
    file.write_bytes(content)


def indices(top: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, top + 1, (30, 40), dtype=np.uint8)


def save_transparent(file: Path, mask: NDArray[np.uint8]) -> None:
    alpha = np.full_like(mask, 128)
    Image.fromarray(np.stack([mask, alpha], -1), "LA").save(file)


MASKS: dict[str, tuple[str, int, Callable[[Path, NDArray[np.uint8]], object]]] = {
    "palette": ("png", 20, save_mask),
    "grey": ("png", 20, lambda f, m: Image.fromarray(m).save(f)),
    "1 bit": ("png", 1, lambda f, m: Image.fromarray(m.astype(bool)).save(f)),
    "grey of 2 bits": ("png", 3, lambda f, m: save_grey(f, 2, m)),
    "grey of 4 bits": ("png", 15, lambda f, m: save_grey(f, 4, m)),
    "transparent": ("png", 20, save_transparent),
    "16 bits": ("png", 20, lambda f, m: Image.fromarray(m.astype(np.uint16)).save(f)),
    "tif": ("tif", 20, lambda f, m: Image.fromarray(m).save(f)),
    "tiff": ("tiff", 20, lambda f, m: Image.fromarray(m).save(f, compression="tiff_lzw")),
    "tif of 1 bit": ("tif", 1, lambda f, m: Image.fromarray(m.astype(bool)).save(f)),
    "tif of 32 bits": ("tif", 20, lambda f, m: Image.fromarray(m.astype(np.int32)).save(f)),
    "bmp": ("bmp", 20, lambda f, m: Image.fromarray(m).save(f)),
    "palette in bmp": ("bmp", 20, save_mask),
    "gif": ("gif", 20, lambda f, m: Image.fromarray(m).save(f)),
    "capitals": ("PNG", 20, save_mask),
}


@pytest.mark.parametrize("kind", MASKS)
def test_kinds_of_masks(tmp_path: Path, kind: str) -> None:
    root = write_segmentation(tmp_path)
    (root / "SegmentationClass/a.png").unlink()
    ending, top, save = MASKS[kind]
    mask = indices(top)
    save(root / f"SegmentationClass/a.{ending}", mask)
    (root / "SegmentationClass/a.json").write_text("{}")
    sample = VocSegmentation(root, "val", faulty="refuse")[0]
    np.testing.assert_array_equal(sample.mask, mask)
    assert sample.mask.dtype == np.uint8


def save_as_jpeg(file: Path) -> None:
    Image.fromarray(indices(20)).save(file, "JPEG")


@pytest.mark.parametrize(
    ("ending", "save", "reason"),
    [
        ("jpg", save_as_jpeg, "mask is compressed with loss"),
        ("JPEG", save_as_jpeg, "mask is compressed with loss"),
        ("png", save_as_jpeg, "mask is compressed with loss"),
        ("tif", lambda f: Image.new("F", (40, 30)).save(f), "mask is not an image of class indic"),
        ("webp", lambda f: Image.new("L", (40, 30)).save(f), "mask is not an image of class indic"),
        ("png", lambda f: Image.new("RGBA", (40, 30)).save(f), "mask is not an image of class ind"),
        ("png", Path.mkdir, "image is broken"),
        ("png", os.mkfifo, "image is broken"),
        ("csv", Path.touch, "image is missing"),
    ],
)
def test_masks_that_are_refused(
    tmp_path: Path, ending: str, save: Callable[[Path], object], reason: str
) -> None:
    root = write_segmentation(tmp_path)
    (root / "SegmentationClass/a.png").unlink()
    save(root / f"SegmentationClass/a.{ending}")
    data = VocSegmentation(root, "val")
    (fault,) = data.faults
    assert fault.file.stem == "a"
    assert fault.file.parent.name == "SegmentationClass"
    assert fault.reason.startswith(reason)
    assert data.names == ["b.jpg"]


@pytest.mark.parametrize(
    ("dtype", "value"),
    [(np.uint8, 21), (np.uint8, 254), (np.uint16, 256), (np.uint16, 65535), (np.int32, -1)],
)
def test_a_value_that_is_no_class(tmp_path: Path, dtype: type, value: int) -> None:
    root = write_segmentation(tmp_path)
    (root / "SegmentationClass/a.png").unlink()
    Image.fromarray(np.full((30, 40), value, dtype)).save(root / "SegmentationClass/a.tif")
    message = (
        rf"a\.tif: holds the value {value}, but there are 21 classes, 0 to 20, and 255 is void"
    )
    with pytest.raises(DataError, match=message):
        VocSegmentation(root, "val", faulty="refuse")[0]


def test_too_many_classes_for_masks(tmp_path: Path) -> None:
    root = write_segmentation(tmp_path)
    (root / "classes.txt").write_text("\n".join(map(str, range(256))))
    with pytest.raises(DataError, match=r"classes\.txt: 256 classes are too many.* 255 is void"):
        VocSegmentation(root, "val")
    (root / "classes.txt").write_text("\n".join(map(str, range(255))))
    assert (VocSegmentation(root, "val")[0].mask == 255).all()


def save_turned(file: Path, orientation: int) -> NDArray[np.uint8]:
    """A photo of 40 x 30 as stored; returns it as it is shown."""
    stored = Image.fromarray(np.random.default_rng(0).integers(0, 256, (3, 4, 3), dtype=np.uint8))
    stored = stored.resize((40, 30), Image.Resampling.NEAREST)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(file, exif=exif, quality=100, subsampling=0)
    with Image.open(file) as image:
        return np.array(ImageOps.exif_transpose(image))


@pytest.mark.parametrize("ending", ["jpg", "png", "tif"])
@pytest.mark.parametrize("orientation", [6, 8])
def test_exif_orientation(tmp_path: Path, orientation: int, ending: str) -> None:
    root = write_detection(tmp_path)
    write_segmentation(root)
    (root / "JPEGImages/b.jpg").unlink()
    shown = save_turned(root / f"JPEGImages/b.{ending}", orientation)
    text = xml(xml_object("dog", (11, 31, 20, 40)), size=(30, 40))
    (root / "Annotations/b.xml").write_text(text)
    Image.new("L", (30, 40)).save(root / "SegmentationClass/b.png")
    boxes = VocDetection(root, "train", faulty="refuse")
    assert boxes.images[0].width == 30
    np.testing.assert_array_equal(boxes[0].image, shown)
    np.testing.assert_array_equal(boxes[0].boxes, [[10, 30, 20, 40]])
    masks = VocSegmentation(root, "val", faulty="refuse")
    np.testing.assert_array_equal(masks[1].image, shown)
    assert masks[1].mask.shape == (40, 30)


def test_a_size_that_no_orientation_explains_is_refused(tmp_path: Path) -> None:
    root = write_segmentation(tmp_path)
    save_turned(root / "JPEGImages/b.jpg", 6)
    Image.new("L", (31, 40)).save(root / "SegmentationClass/b.png")
    (fault,) = VocSegmentation(root, "val").faults
    assert (fault.file.name, fault.reason) == (
        "b.jpg",
        "image is not of the size that its mask has",
    )
    assert fault.value == "40x30 with EXIF orientation 6 for 31x40"


def test_paths_may_be_text(tmp_path: Path) -> None:
    root = write_detection(tmp_path)
    write_segmentation(root)
    data = VocDetection(str(root), "train")
    assert len(data) == 3
    assert len(VocSegmentation(str(root), "val")) == 2
    assert voc_splits(str(root), "detection") == ["train"]
    assert select_listed(data, str(root / "ImageSets/Main/train.txt")).names == data.names
    with pytest.raises(DataError, match="detection splits found: train"):
        VocDetection(str(root), "x" * 5000)


def test_paths_of_coco_files_may_be_text(data_root: Path, tmp_path: Path) -> None:
    root = str(data_root / "coco128")
    assert "train2017" in coco_splits(root)
    files = [str(file) for file in find_coco(root, "train2017")]
    assert len(CocoDetection(*files)) == len(CocoSegmentation(*files)) > 100
    assert load_annotations(files[0])["images"]
    (tmp_path / "results.json").write_text("[]")
    assert load_results(str(tmp_path / "results.json")) == []


PIECES = [b"", b"\0", b"\xff", b"<", b">", b"&", b"-", b"nan", b"1e400", b"../", b"9" * 30]
PIECES += [b"object", b"<object>", b"</annotation>", b'<?xml version="1.0" encoding="gbk"?>', b"\n"]


@st.composite
def mutations(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """What replaces a few parts of a file by strange ones."""
    edits = draw(
        st.lists(
            st.tuples(
                st.floats(0, 1, exclude_max=True),
                st.integers(0, 12),
                st.sampled_from(PIECES) | st.binary(max_size=3),
            ),
            min_size=1,
            max_size=4,
        )
    )

    def mutate(content: bytes) -> bytes:
        for place, length, piece in edits:
            start = int(place * len(content))
            content = content[:start] + piece + content[start + length :]
        return content

    return mutate


TEXTS = st.sampled_from(
    [
        "",
        " ",
        "nan",
        "inf",
        "-1",
        "0",
        "1",
        "2.5",
        "1e400",
        "1e308",
        "yes",
        "dog",
        "b.png",
        "狗",
        "../x",
    ]
) | st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=5)


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("fuzz")
    write_detection(root, "val")
    write_segmentation(root)
    (root / "classes.txt").write_text("dog\nperson\n")
    for name in ("a", "b"):
        save_mask(root / f"SegmentationClass/{name}.png", indices(1))
    return root


def check_every_sample(read: Callable[[], VocDetection | VocSegmentation]) -> None:
    """Only a DataError may come out, or samples of which each is whole or a DataError."""
    try:
        data = read()
    except DataError:
        return
    assert len(data) == len(set(data.names))
    for index, image in enumerate(data.images):
        message = ""
        try:
            sample = data[index]
        except DataError as error:
            message = str(error)
        if message:
            assert f"{image.path.stem}." in message
            continue
        height, width = sample.image.shape[:2]
        assert (width, height) == (image.width, image.height)
        if isinstance(sample, SegmentationSample):
            assert sample.mask.shape == (height, width)
            assert ((sample.mask < len(data.classes)) | (sample.mask == 255)).all()
        else:
            assert ((sample.labels >= 0) & (sample.labels < len(data.classes))).all()
            assert (sample.boxes >= 0).all()
            assert (sample.boxes <= [width, height, width, height]).all()
            assert (sample.boxes[:, :2] < sample.boxes[:, 2:]).all()


FILES = ["Annotations/b.xml", "Annotations/a 1.xml", "ImageSets/Main/val.txt", "classes.txt"]
FILES += ["ImageSets/Segmentation/val.txt", "SegmentationClass/a.png", "JPEGImages/b.jpg"]


@settings(max_examples=300, derandomize=True, deadline=None, database=None)
@given(file=st.sampled_from(FILES), mutate=mutations())
def test_any_bytes_are_read_or_refused(
    valid: Path, file: str, mutate: Callable[[bytes], bytes]
) -> None:
    content = (valid / file).read_bytes()
    (valid / file).write_bytes(mutate(content))
    try:
        check_every_sample(lambda: VocDetection(valid, "val"))
        check_every_sample(lambda: VocSegmentation(valid, "val"))
    finally:
        (valid / file).write_bytes(content)


@settings(max_examples=300, derandomize=True, deadline=None, database=None)
@given(
    tag=st.sampled_from(["xmin", "ymin", "xmax", "ymax", "name", "difficult", "width", "filename"]),
    text=TEXTS,
    listed=st.booleans(),
)
def test_any_text_in_an_element_is_read_or_refused(
    valid: Path, tag: str, text: str, listed: bool
) -> None:
    file, classes = valid / "Annotations/a 1.xml", valid / "classes.txt"
    content, names = file.read_text(), classes.read_text()
    tree = ElementTree.fromstring(content.replace("<size>", "<filename>a 1.jpg</filename><size>"))
    for element in tree.iter(tag):
        element.text = text
    file.write_bytes(ElementTree.tostring(tree))
    if not listed:
        classes.unlink()
    try:
        check_every_sample(lambda: VocDetection(valid, "val"))
    finally:
        file.write_text(content)
        classes.write_text(names)


@pytest.mark.parametrize(("name", "images"), [("train", 200), ("val", 80), ("test", 133)])
def test_real_voc2007(data_root: Path, name: str, images: int) -> None:
    data = VocDetection(data_root / "VOCdevkit", name, faulty="refuse")
    assert len(data) == images
    assert data.classes == VOC_CLASSES
    truth = data.ground_truth()
    found = as_results(truth)
    for eleven_point in (False, True):
        metrics = voc_metrics(truth, found, eleven_point=eleven_point)
        assert metrics["mAP"] == 1
        present = {a["category_id"] for a in truth["annotations"] if "difficult" not in a}
        for category, value in zip(data.category_ids, metrics["per_class"].values(), strict=True):
            assert value == (1 if category in present else None)
    # what is difficult may as well not have been found
    easy = [r for r, a in zip(found, truth["annotations"], strict=True) if "difficult" not in a]
    assert len(easy) < len(found)
    assert voc_metrics(truth, easy)["mAP"] == 1
    assert coco_metrics(truth, easy)["AP"] == pytest.approx(1)
    assert coco_metrics(truth, found)["AP"] == pytest.approx(1)


def test_real_bccd(data_root: Path) -> None:
    faults = []
    objects: dict[int, int] = {}
    for name, images in (("train", 205), ("val", 87), ("test", 72)):
        data = VocDetection(data_root / "bccd", name)
        assert len(data) == images
        assert data.classes == ["Platelets", "RBC", "WBC"]
        faults += data.faults
        for annotation in data.ground_truth()["annotations"]:
            category = annotation["category_id"]
            objects[category] = objects.get(category, 0) + 1
    assert [(f.file.name, f.index, f.reason) for f in faults] == [
        ("BloodImage_00343.xml", 3, "box has no area"),
        ("BloodImage_00338.xml", 12, "box has no area"),
    ]
    assert sum(objects.values()) == 4155 + 372 + 361 - 2
    assert objects[3] == 372


def test_real_masks(data_root: Path) -> None:
    data = VocSegmentation(data_root / "VOCdevkit", "val", faulty="refuse")
    assert len(data) == 4
    found = {sample.name: set(np.unique(sample.mask).tolist()) for sample in data}
    assert found["2008_002536.jpg"] == {0, 12, 17, 255}
    camvid = {name: VocSegmentation(data_root / "camvid", name) for name in ("train", "val")}
    assert [len(part) for part in camvid.values()] == [60, 16]
    for part in camvid.values():
        assert part.faults == []
        assert part.classes[0] == "sky"
        assert len(part.classes) == 11
        void = np.mean([(sample.mask == 255).mean() for sample in part])
        assert 0.015 < void < 0.045


def as_results(truth: Json) -> list[Json]:
    keys = ("image_id", "category_id", "bbox")
    return [{key: a[key] for key in keys} | {"score": 0.5} for a in truth["annotations"]]


def annotation(image: int, box: list[float], **more: int) -> Json:
    return {"image_id": image, "category_id": 1, "bbox": box, **more}


def one_class(*annotations: Json) -> Json:
    return {
        "images": [{"id": 1}, {"id": 2}],
        "categories": [{"id": 1, "name": "a"}],
        "annotations": list(annotations),
    }


def test_average_precision_by_hand() -> None:
    truth = one_class(
        annotation(1, [0, 0, 10, 10]),
        annotation(1, [50, 0, 10, 10]),
        annotation(2, [0, 0, 10, 10]),
        annotation(2, [50, 0, 10, 10], difficult=1),
    )
    found = [
        {**annotation(1, [0, 0, 10, 10]), "score": 0.9},  # true: precision 1, recall 1/3
        {**annotation(1, [1, 0, 10, 10]), "score": 0.8},  # a duplicate: false
        {**annotation(2, [50, 0, 10, 10]), "score": 0.75},  # difficult: neither
        {**annotation(2, [50, 0, 10, 10]), "score": 0.74},  # difficult again: neither
        {**annotation(2, [0, 0, 10, 5]), "score": 0.7},  # IoU 1/2: true: 2/3 at recall 2/3
        {**annotation(1, [50, 0, 10, 4.9]), "score": 0.6},  # IoU below 1/2: false
    ]
    assert voc_metrics(truth, found)["mAP"] == pytest.approx((1 + 2 / 3) / 3)
    # recalls 0 to .3 have precision 1, .4 to .6 have 2/3, .7 to 1 have none
    eleven = voc_metrics(truth, found, eleven_point=True)
    assert eleven["mAP"] == pytest.approx((4 * 1 + 3 * 2 / 3) / 11)
    assert eleven["per_class"] == {"a": eleven["mAP"]}
    assert eleven["notes"] == []
    assert voc_metrics(truth, found, iou_threshold=0.51)["mAP"] == pytest.approx(1 / 3)


def test_eleven_points_count_a_recall_that_is_met_exactly() -> None:
    truth = one_class(*(annotation(1, [20.0 * i, 0, 10, 10]) for i in range(10)))
    found = as_results(truth)[:3]
    assert voc_metrics(truth, found, eleven_point=True)["mAP"] == pytest.approx(4 / 11)


def test_what_cannot_be_computed_says_why() -> None:
    hidden = annotation(1, [0, 0, 10, 10], difficult=1)
    metrics = voc_metrics(one_class(hidden), as_results(one_class(hidden)))
    assert (metrics["mAP"], metrics["per_class"]) == (None, {"a": None})
    assert "no ground truth object" in metrics["notes"][0]

    truth = one_class(annotation(1, [0, 0, 10, 10]))
    truth["categories"].append({"id": 2, "name": "b"})
    metrics = voc_metrics(truth, [])
    assert (metrics["mAP"], metrics["per_class"]) == (0, {"a": 0, "b": None})
    assert any("no prediction" in note for note in metrics["notes"])
    assert any(note.endswith("left out of the mean: b.") for note in metrics["notes"])
    stray = [{**annotation(9, [0, 0, 1, 1]), "score": 1.0}]
    assert "image_id (9)" in voc_metrics(truth, stray)["notes"][0]


def reference_average_precision(
    truth: Json, results: list[Json], category: int, eleven_point: bool
) -> float:
    """One prediction after the other, with the development kit's inclusive pixels."""

    def corners(box: list[float]) -> tuple[float, float, float, float]:
        x, y, w, h = box
        return x + 1, y + 1, x + w, y + h

    objects = [a for a in truth["annotations"] if a["category_id"] == category]
    positives = sum(not a.get("difficult") for a in objects)
    taken: set[int] = set()
    recalls, precisions = [0.0], [0.0]
    true = false = 0
    for result in sorted(
        (r for r in results if r["category_id"] == category), key=lambda r: r["score"], reverse=True
    ):
        best, best_index = -1.0, -1
        a = corners(result["bbox"])
        for index, candidate in enumerate(objects):
            if candidate["image_id"] != result["image_id"]:
                continue
            b = corners(candidate["bbox"])
            width = min(a[2], b[2]) - max(a[0], b[0]) + 1
            height = min(a[3], b[3]) - max(a[1], b[1]) + 1
            if width <= 0 or height <= 0:
                continue
            shared = width * height
            area_a = (a[2] - a[0] + 1) * (a[3] - a[1] + 1)
            area_b = (b[2] - b[0] + 1) * (b[3] - b[1] + 1)
            if (iou := shared / (area_a + area_b - shared)) > best:
                best, best_index = iou, index
        if best >= 0.5:
            if objects[best_index].get("difficult"):
                continue
            if best_index in taken:
                false += 1
            else:
                taken.add(best_index)
                true += 1
        else:
            false += 1
        recalls.append(true / positives)
        precisions.append(true / (true + false))
    if eleven_point:
        heights = []
        for k in range(11):
            reached = [p for r, p in zip(recalls, precisions, strict=True) if r >= k / 10 - 1e-9]
            heights.append(max(reached, default=0.0))
        return sum(heights) / 11
    area = 0.0
    for i in range(1, len(recalls)):
        area += (recalls[i] - recalls[i - 1]) * max(precisions[i:])
    return area


@pytest.mark.parametrize("eleven_point", [False, True])
def test_average_precision_equals_the_reference(data_root: Path, eleven_point: bool) -> None:
    data = VocDetection(data_root / "VOCdevkit", "train")
    truth = data.ground_truth()
    random = np.random.default_rng(0)
    results = []
    for a in truth["annotations"]:
        for _ in range(random.integers(0, 4)):
            box = np.array(a["bbox"])
            box[:2] += (random.normal(0, 0.12, 2) * box[2:]).round()
            box[2:] = (box[2:] * np.exp(random.normal(0, 0.2, 2))).round().clip(1)
            wrong = random.random() < 0.1
            category = int(random.integers(1, 21)) if wrong else a["category_id"]
            results.append(
                {
                    "image_id": a["image_id"],
                    "category_id": category,
                    "bbox": box.tolist(),
                    "score": random.random(),
                }
            )
    metrics = voc_metrics(truth, results, eleven_point=eleven_point)
    values = []
    for category, name in zip(data.category_ids, data.classes, strict=True):
        if metrics["per_class"][name] is not None:
            expected = reference_average_precision(truth, results, category, eleven_point)
            assert metrics["per_class"][name] == pytest.approx(expected, abs=1e-12)
            values.append(expected)
    assert metrics["mAP"] == pytest.approx(np.mean(values))
    assert 0.2 < metrics["mAP"] < 0.9


def by_sets(prediction: NDArray[Any], target: NDArray[Any], classes: int) -> Json:
    """Per class the sets of pixels, all images joined."""
    valid = target != 255
    iou: list[float | None] = []
    dice: list[float] = []
    for k in range(classes):
        predicted = set(np.flatnonzero((prediction == k) & valid).tolist())
        true = set(np.flatnonzero((target == k) & valid).tolist())
        if predicted | true:
            iou.append(len(predicted & true) / len(predicted | true))
            dice.append(2 * len(predicted & true) / (len(predicted) + len(true)))
        else:
            iou.append(None)
    known = [value for value in iou if value is not None]
    return {
        "mIoU": pytest.approx(sum(known) / len(known)),
        "per_class_iou": {f"c{k}": value and pytest.approx(value) for k, value in enumerate(iou)},
        "mean_dice": pytest.approx(sum(dice) / len(dice)),
        "pixel_accuracy": pytest.approx((prediction == target)[valid].mean()),
    }


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_confusion_matrix(dtype: torch.dtype) -> None:
    random = np.random.default_rng(0)
    target = random.choice([0, 1, 2, 3, 255], (4, 9, 11))
    prediction = np.where(random.random(target.shape) < 0.6, target % 255, 0)
    names = [f"c{k}" for k in range(6)]  # 4 and 5 occur nowhere
    parts = [ConfusionMatrix(6), ConfusionMatrix(6)]
    for index in range(4):
        parts[index % 2].update(
            torch.from_numpy(prediction[index]).to(dtype), torch.from_numpy(target[index]).to(dtype)
        )
    whole = ConfusionMatrix(6)
    whole.matrix = parts[0].matrix + parts[1].matrix
    assert whole.matrix.dtype == torch.int64
    assert whole.matrix.sum() == (target != 255).sum()
    metrics = whole.metrics(names)
    assert metrics == by_sets(prediction.ravel(), target.ravel(), 6)
    assert metrics["per_class_iou"]["c5"] is None


def test_confusion_matrix_has_the_true_classes_in_its_rows() -> None:
    counts = ConfusionMatrix(3, ignore_index=0)
    counts.update(torch.tensor([[0, 2, 2], [1, 1, 1]]), torch.tensor([[1, 1, 2], [2, 0, 1]]))
    assert counts.matrix.tolist() == [[0, 0, 0], [1, 1, 1], [0, 1, 1]]


def test_confusion_matrix_refuses_what_it_cannot_count() -> None:
    counts = ConfusionMatrix(3)
    assert counts.metrics(["a", "b", "c"])["mIoU"] is None
    with pytest.raises(ValueError, match=r"the target holds 3, which is no class in \[0, 3\)"):
        counts.update(torch.tensor([0, 1]), torch.tensor([3, 255]))
    with pytest.raises(ValueError, match="the prediction holds -1"):
        counts.update(torch.tensor([0, -1]), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"prediction is \(2,\), the target \(3,\)"):
        counts.update(torch.zeros(2), torch.zeros(3))
    with pytest.raises(ValueError, match="2 names for 3 classes"):
        counts.metrics(["a", "b"])
    assert counts.matrix.sum() == 0
    counts.update(torch.tensor([9, 1]), torch.tensor([255, 1]))
    assert counts.metrics(["a", "b", "c"])["pixel_accuracy"] == 1


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.uint16, torch.int8, torch.float16, torch.float64]
)
def test_confusion_matrix_counts_whole_numbers_of_any_dtype(dtype: torch.dtype) -> None:
    counts = ConfusionMatrix(2)
    values = torch.tensor([0, 1, 1]).to(dtype)
    counts.update(values, values)
    assert counts.matrix.tolist() == [[1, 0], [0, 2]]


@pytest.mark.parametrize("name", ["target", "prediction"])
@pytest.mark.parametrize("value", [0.5, -0.5, float("nan"), float("inf"), -float("inf"), 1e30, 3])
def test_confusion_matrix_names_a_value_that_is_no_class(name: str, value: float) -> None:
    counts = ConfusionMatrix(3)
    given = {"prediction": torch.zeros(2), "target": torch.zeros(2)}
    given[name][1] = value
    shown = given[name][1].item()
    with pytest.raises(ValueError, match=re.escape(f"the {name} holds {shown}, which is no class")):
        counts.update(**given)
    assert counts.matrix.sum() == 0


def test_confusion_matrix_refuses_wrong_arguments() -> None:
    for number in (0, -1, 2.0, True, "3", None):
        with pytest.raises(ValueError, match=r"num_classes=.* is not an integer from 1 up"):
            ConfusionMatrix(number)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"ignore_index=1\.5 is not an integer"):
        ConfusionMatrix(3, ignore_index=1.5)  # type: ignore[arg-type]
    counts = ConfusionMatrix(3)
    with pytest.raises(TypeError, match="the target is a ndarray and not a tensor"):
        counts.update(torch.zeros(2), np.zeros(2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="which logits become by argmax"):
        counts.update(torch.zeros(1, 3, 4, 4), torch.zeros(1, 4, 4))
    with pytest.raises(ValueError, match="two classes have the same name: a, b, a"):
        counts.metrics(["a", "b", "a"])


def prediction(**changed: Any) -> Json:
    return {**annotation(1, [0, 0, 10, 10]), "score": 0.5, **changed}


@pytest.mark.parametrize("key", ["image_id", "category_id", "bbox", "score"])
def test_voc_metrics_names_a_prediction_without_a_key(key: str) -> None:
    truth = one_class(annotation(1, [0, 0, 10, 10]))
    bad = {name: value for name, value in prediction().items() if name != key}
    with pytest.raises(DataError, match=rf"entry 1 has .*{key}"):
        voc_metrics(truth, [prediction(), bad])
    if key != "score":
        del truth["annotations"][0][key]
        with pytest.raises(DataError, match=rf"annotations\[0\] has .*{key}"):
            voc_metrics(truth, [])


NO_BOXES = [None, 3, "0 0 9 9", [], [0, 0, 9], [0, 0, 9, 9, 9], [0, 0, 9, None], {"x": 0}]
NO_BOXES += [[0, 0, 9, float("nan")], [0, 0, float("inf"), 9], [0, 0, 9, "wide"]]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("bbox", box) for box in NO_BOXES),
        *(("score", score) for score in (None, "high", [0.5], float("nan"), float("inf"), True)),
        *((key, value) for key in ("image_id", "category_id") for value in (None, [1], {}, True)),
    ],
)
def test_voc_metrics_names_a_wrong_value(key: str, value: object) -> None:
    truth = one_class(annotation(1, [0, 0, 10, 10]))
    with pytest.raises(DataError, match=rf"entry 1 has .*{key}"):
        voc_metrics(truth, [prediction(), prediction(**{key: value})])
    if key != "score":
        truth["annotations"][0][key] = value
        with pytest.raises(DataError, match=rf"annotations\[0\] has .*{key}"):
            voc_metrics(truth, [])


@pytest.mark.parametrize(
    "truth",
    [
        {},
        {**one_class(), "images": None},
        {**one_class(), "images": [3]},
        {**one_class(), "images": [{}]},
        {**one_class(), "images": [{"id": [1]}]},
        {**one_class(), "categories": [{"id": 1}]},
        {**one_class(), "annotations": ["a"]},
        one_class({**annotation(1, [0, 0, 9, 9]), "difficult": "perhaps"}),
        one_class({**annotation(1, [0, 0, 9, 9]), "iscrowd": 2}),
    ],
)
def test_voc_metrics_names_what_is_wrong_in_the_ground_truth(truth: Json) -> None:
    with pytest.raises(DataError, match="ground truth: "):
        voc_metrics(truth, [prediction()])


@pytest.mark.parametrize("flag", ["difficult", "ignore", "iscrowd"])
@pytest.mark.parametrize(
    ("value", "counts"), [("0", True), ("false", True), (0, True), ("1", False)]
)
def test_voc_metrics_reads_flags_and_numbers_as_the_readers_do(
    flag: str, value: Any, counts: bool
) -> None:
    truth = one_class({**annotation(1, [0, 0, 10, 10]), flag: value})
    found = [prediction(score="0.5", bbox=["0", "0", "10", "10.0"])]
    assert voc_metrics(truth, found)["mAP"] == (1 if counts else None)


@pytest.mark.parametrize("threshold", [0, -1, 1.5, float("nan")])
def test_voc_metrics_refuses_a_threshold_that_is_none(threshold: float) -> None:
    with pytest.raises(ValueError, match=r"iou_threshold=.* is not in \(0, 1\]"):
        voc_metrics(one_class(), [], iou_threshold=threshold)
