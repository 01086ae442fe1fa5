"""The judges of what strangers' files hold, and of images."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"

import albumentations as A
import numpy as np
import pytest
from PIL import Image

from detseg_losses.integrations.samples import (
    DataError,
    Fault,
    check_box,
    check_image,
    inside,
    read_bytes,
    read_image,
    read_text,
    shown,
    summarize_faults,
    to_flag,
    to_id,
    to_number,
    to_numbers,
)


@pytest.mark.parametrize(
    "name",
    [
        "/a",
        "../a",
        "a/../../b",
        "a/..",
        "..\\a",
        "\\a",
        "c:a",
        "C:\\a",
        "",
        ".",
        "./",
        "a\0",
        "\udfff",
    ],
)
def test_names_that_lead_outside(name: str) -> None:
    assert inside(Path("data"), name) is None


@pytest.mark.parametrize(
    ("name", "path"),
    [("a", "a"), ("a\\b", "a/b"), ("./a//b", "a/b"), ("..a", "..a"), ("a..b/c", "a..b/c")],
)
def test_names_inside(name: str, path: str) -> None:
    assert inside(Path("data"), name) == Path("data", path)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "latin-1"])
def test_text_in_usual_encodings(tmp_path: Path, encoding: str) -> None:
    file = tmp_path / "list.txt"
    file.write_text("caf\u00e9\n", encoding=encoding)
    assert read_text(file) == "caf\u00e9\n"


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in ("absent", "pipe", ".", "a\0b", "x" * 300):
        with pytest.raises(DataError, match="cannot be read"):
            read_bytes(tmp_path / name)


@pytest.mark.parametrize(
    ("value", "number"),
    [
        (1, 1), (1.5, 1.5), (" 2.5 ", 2.5), ("1e3", 1000), (np.float32(0.5), 0.5), (np.int64(3), 3),
        (True, None), (None, None), ("", None), ("1_0", None), ("1,5", None), ("nan", None),
        (float("inf"), None), (10**400, None), ("1e999", None), ([1], None), (1j, None),
    ],
)  # fmt: skip
def test_numbers(value: Any, number: float | None) -> None:
    assert to_number(value) == number
    assert to_numbers([value, 7]) == (None if number is None else [number, 7])
    assert to_numbers((value,), 2) is None


@pytest.mark.parametrize(
    ("value", "flag"),
    [
        (None, False), (0, False), (1, True), (True, True), (0.0, False), ("1", True), ("0", False),
        ("1.0", True), ("Yes", True), (" no ", False), ("TRUE", True), ("", False),
        (2, None), (-1, None), (float("nan"), None), ("maybe", None), ([], None), ({}, None),
    ],
)  # fmt: skip
def test_flags(value: Any, flag: bool | None) -> None:
    assert to_flag(value) is flag


@pytest.mark.parametrize(
    ("value", "key"),
    [
        (1, 1), (1.0, 1), (-3, -3), ("1", "1"), ("", ""), (10**400, 10**400), (np.int64(5), 5),
        (True, None), (1.5, None), (float("nan"), None), (float("inf"), None), (None, None),
        ([1], None), ({}, None),
    ],
)  # fmt: skip
def test_ids(value: Any, key: Any) -> None:
    found = to_id(value)
    assert (found, type(found)) == (key, type(key))


@pytest.mark.parametrize("value", ["\ud800", "x" * 10**6, list(range(10**5)), [[[]] * 9], "a\nb"])
def test_anything_can_be_shown(value: Any) -> None:
    text = shown(value)
    text.encode()
    assert len(text) < 200
    assert "\n" not in text


def test_a_number_of_more_digits_than_python_prints_can_be_shown() -> None:
    assert "int" in shown(10**5000)


def picture(mode: str = "RGB") -> Image.Image:
    content = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    return Image.fromarray(content).convert(mode)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["jpg", "png"])
def test_orientation_is_applied_where_the_displayed_size_is_stated(
    tmp_path: Path, kind: str, orientation: int
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = tmp_path / f"image.{kind}"
    picture().save(file, exif=exif)
    faults: list[Fault] = []
    assert check_image(file, (40, 30), faults) == (40, 30, False)
    assert check_image(file, None, faults) == (40, 30, False)
    assert faults == []
    judged = check_image(file, (30, 40), faults)
    if orientation >= 5:
        assert judged == (30, 40, True)
        assert read_image(file, upright=True).shape == (40, 30, 3)
    else:
        assert judged is None
    assert read_image(file).shape == (30, 40, 3)
    assert check_image(file, (31, 40), faults) is None
    assert ("EXIF" in str(faults[-1])) == (orientation != 1)


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_more_than_eight_bits_are_found_at_the_start(tmp_path: Path, mode: str) -> None:
    file = tmp_path / ("image.png" if mode == "I;16" else "image.tif")
    picture("L").convert("F" if mode == "F" else "I").convert(mode).save(file)
    faults: list[Fault] = []
    assert check_image(file, None, faults) is None
    assert [fault.reason for fault in faults] == ["image has more than 8 bits a channel"]
    with pytest.raises(DataError, match="convert it to 8 bits"):
        read_image(file)


def test_pipes_and_folders_are_no_images(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    for name in ("pipe.png", "folder.png", "absent.png", "folder.png/a.png", "x" * 300):
        faults: list[Fault] = []
        assert check_image(tmp_path / name, None, faults) is None
        assert len(faults) == 1
        with pytest.raises(DataError, match="cannot be decoded"):
            read_image(tmp_path / name)


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "bmp", "gif", "tiff"])
@pytest.mark.filterwarnings("ignore")
def test_damaged_images_are_faults_or_are_read(tmp_path: Path, kind: str) -> None:
    random = np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    picture().save(tmp_path / "whole", kind, exif=exif)
    whole = (tmp_path / "whole").read_bytes()
    file = tmp_path / "damaged"
    for _ in range(100):
        content = np.frombuffer(whole, np.uint8).copy()
        places = random.integers(0, min(len(content), random.choice([100, 10**6])), 3)
        content[places] = random.integers(0, 256, 3)
        file.write_bytes(content[: random.integers(1, 3 * len(content))].tobytes())
        faults: list[Fault] = []
        judged = check_image(file, (30, 40), faults)
        assert (judged is None) == (len(faults) == 1)
        with contextlib.suppress(DataError):
            image = read_image(file, upright=bool(judged and judged[2]))
            assert judged is None or image.shape == (judged[1], judged[0], 3)


def test_boxes_that_are_kept_pass_the_augmentation() -> None:
    random = np.random.default_rng(0)
    size, count = (1333, 800), 3000
    augmentation = A.Compose(
        [A.NoOp()], bbox_params=A.BboxParams("pascal_voc", label_fields=["rows"], clip=True)
    )
    image = np.zeros((size[1], size[0], 3), np.uint8)
    kept = 0
    for width in 10 ** random.uniform(-6, -2, count):
        x = random.choice([random.uniform(0, 1333), 0, 1333 - width, -width / 2, 1333 - width / 2])
        beyond = random.choice([0.0, 1.0])  # of the border, where it is rounding
        box, _ = check_box((x, -beyond, x + width, 800 + beyond), *size)
        if box is None:
            continue
        kept += 1
        # as the readers keep it, XYWH in float64
        x1, y1, x2, y2 = box
        xyxy = np.array([[x1, y1, x1 + (x2 - x1), y1 + (y2 - y1)]]).astype(np.float32)
        augmentation(image=image, bboxes=xyxy, rows=[0])
    assert 0.3 * count < kept < 0.9 * count


def test_an_error_has_the_counts_and_one_fault() -> None:
    faults = [Fault(Path(f"{i}.png"), None, "a" if i % 2 else "b", 7) for i in range(5)]
    assert summarize_faults(faults) == "5 faults: 3 x b, 2 x a; the first: 0.png: b (7)"
