"""A synthetic data set of simple shapes, written in COCO's format and drawn when first asked for.

It stands in for real data where none is at hand: a small detector learns it in minutes, yet the
shapes tilt, differ in colour and size, overlap a little, and lie on a noisy background among
lines that are no objects.
"""

from __future__ import annotations

import colorsys
import json
import math
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common.errors import UsageError

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

CLASSES = ("circle", "square", "triangle", "star")

_VERSION = 2  # to be raised with any change to what is drawn: old directories are then left alone
_SMALLEST = 8.5  # radius in pixels
_FINER = 4  # shapes are drawn this much larger and averaged down, for smooth borders

Points = NDArray[np.float64]


def make_shapes(
    root: Path, *, number: int = 800, validation: int = 160, size: int = 128, seed: int = 0
) -> Path:
    """Draw the data set below ``root``, unless one with the same parameters is there.

    Args:
        root: where the directories of such data sets lie; each has its parameters in its name.
        number: images in ``train``.
        validation: images in ``val``.
        size: width and height of the images in pixels, at least 48.
        seed: another seed draws other images. The first images of a larger set are those of a
            smaller one.

    Returns:
        The directory, with ``annotations/instances_{train,val}.json`` (boxes, polygons, areas)
        and ``{train,val}/*.png``.

    Raises:
        UsageError: if ``root`` is a file, or holds anything else than such data sets.
    """
    if size < 48:
        raise ValueError(f"shapes of {size} pixels were asked for; the smallest size is 48")
    if number < 1 or validation < 1:
        raise ValueError(f"{number} + {validation} images were asked for; each part needs one")
    directory = root / f"shapes-v{_VERSION}-{size}px-{number}+{validation}-seed{seed}"
    if directory.is_dir():
        return directory
    if root.exists() and not root.is_dir():
        raise UsageError(f"data.root {root} is a file, and shapes are drawn into a folder")
    others = [f.name for f in root.glob("*") if not f.name.startswith((".", "shapes-v"))]
    if others:
        raise UsageError(
            f"{root} holds {min(others)!r}, and shapes are drawn into a folder of their own alone: "
            "name another one as data.root, or data.format if this is a data set"
        )
    root.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=".shapes-", dir=root))
    try:
        for part, (name, images) in enumerate((("train", number), ("val", validation))):
            _write_split(unfinished, name, images, size, (seed, part))
        unfinished.chmod(0o755)  # mkdtemp's directories are their owner's alone
        unfinished.rename(directory)
    except OSError:
        if not directory.is_dir():
            raise
        # another process finished the same data set first
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return directory


def _write_split(directory: Path, name: str, number: int, size: int, seed: tuple[int, int]) -> None:
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    (directory / name).mkdir()
    (directory / "annotations").mkdir(exist_ok=True)
    for image_id in range(1, number + 1):
        picture, shapes = _draw(np.random.default_rng((*seed, image_id)), size)
        file_name = f"{image_id:06d}.png"
        picture.save(directory / name / file_name, compress_level=1)
        images.append({"id": image_id, "file_name": file_name, "width": size, "height": size})
        for label, points in shapes:
            low, high = points.min(axis=0), points.max(axis=0)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": label + 1,
                    "bbox": [*low.tolist(), *(high - low).round(2).tolist()],
                    "area": round(_area(points), 2),
                    "segmentation": [points.ravel().tolist()],
                    "iscrowd": 0,
                }
            )
    content = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": i, "name": name} for i, name in enumerate(CLASSES, start=1)],
    }
    file = directory / "annotations" / f"instances_{name}.json"
    file.write_text(json.dumps(content), encoding="utf-8")


def _draw(random: np.random.Generator, size: int) -> tuple[Image.Image, list[tuple[int, Points]]]:
    """One picture and its shapes, label and outline, the largest first (smaller ones on top)."""
    hue = random.random()
    picture = _background(random, size, hue)
    placed = _place(random, size, number=int(random.integers(1, 6)))
    shapes = []
    for x, y, radius in sorted(placed, key=lambda circle: -circle[2]):
        label = int(random.integers(len(CLASSES)))
        tilt = random.uniform(-0.3, 0.3)
        points = (_OUTLINES[label](tilt) * radius + (x, y)).clip(0, size).round(2)
        other_hue = hue + random.uniform(0.2, 0.8)
        colour = _colour(other_hue, random.uniform(0.55, 1), random.uniform(0.45, 1))
        picture.paste(colour, mask=_coverage(points, size))
        shapes.append((label, points))
    noisy = np.asarray(picture) + random.normal(0, random.uniform(3, 10), (size, size, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8)), shapes


def _background(random: np.random.Generator, size: int, hue: float) -> Image.Image:
    """Soft patches of pale colours around one hue, crossed by thin lines."""
    patches = np.array(
        [
            _colour(hue + random.normal(0, 0.05), random.uniform(0, 0.4), random.uniform(0.2, 0.9))
            for _ in range(25)
        ],
        np.uint8,
    ).reshape(5, 5, 3)
    picture = Image.fromarray(patches).resize((size, size), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(picture)
    for _ in range(int(random.integers(0, 5))):
        ends = random.uniform(0, size, 4).tolist()
        colour = _colour(random.random(), random.uniform(0, 1), random.uniform(0.2, 1))
        draw.line(ends, fill=colour, width=int(random.integers(1, 3)))
    return picture


def _place(random: np.random.Generator, size: int, number: int) -> list[tuple[float, float, float]]:
    """At most ``number`` circles (x, y, radius) inside the picture that overlap only a little."""
    placed: list[tuple[float, float, float]] = []
    for _ in range(10 * number):
        radius = random.uniform(_SMALLEST, 0.25 * size)
        x, y = random.uniform(radius, size - radius, 2).tolist()
        if all(math.dist((x, y), (u, v)) > 0.85 * (radius + r) for u, v, r in placed):
            placed.append((x, y, radius))
        if len(placed) == number:
            break
    return placed


def _coverage(points: Points, size: int) -> Image.Image:
    """How much of each pixel a polygon covers, 0 to 255."""
    mask = Image.new("L", (size * _FINER, size * _FINER))
    # a pixel's number is its middle, its coordinates are half a pixel further
    corners = [(x, y) for x, y in (points * _FINER - 0.5).tolist()]
    ImageDraw.Draw(mask).polygon(corners, fill=255)
    return mask.reduce(_FINER)


def _colour(hue: float, saturation: float, value: float) -> tuple[int, int, int]:
    red, green, blue = colorsys.hsv_to_rgb(hue % 1, saturation, value)
    return round(255 * red), round(255 * green), round(255 * blue)


def _regular(corners: int, *radii: float, first: float = -math.pi / 2) -> Callable[[float], Points]:
    """A polygon around the origin as a function of its tilt; the first corner is on top."""

    def outline(tilt: float) -> Points:
        angles = first + tilt + 2 * math.pi * np.arange(corners) / corners
        radius = np.resize(radii, corners)
        return np.stack([radius * np.cos(angles), radius * np.sin(angles)], axis=1)

    return outline


_OUTLINES = (
    _regular(32, 1.0),
    _regular(4, 1.0, first=-math.pi / 4),
    _regular(3, 1.0),
    _regular(10, 1.0, 0.45),
)


def _area(points: Points) -> float:
    x, y = points.T
    return abs(float(x @ np.roll(y, -1) - y @ np.roll(x, -1))) / 2
