"""What a run leaves for people to look at: tables, metrics.json, curves.png, predictions.png."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from common.data import Data
from common.metrics_log import read_metrics

import matplotlib
import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from numpy.typing import NDArray
from torchvision.ops import box_convert, nms

from detseg_losses.integrations.samples import DataT, DetectionData

matplotlib.use("Agg")
Image = NDArray[np.uint8]
LEAST_SCORE = 0.3
"""Detections below it are not drawn."""


def print_table(title: str, values: dict[str, Any]) -> None:
    """Print numbers under each other; None is a dash."""
    width = max(map(len, values), default=0)
    print(title)
    for name, value in values.items():
        print(f"  {name:<{width}}  {'    -' if value is None else f'{value:.3f}'}")


def print_metrics(metrics: dict[str, Any]) -> None:
    """Print the numbers, those of each class, and the notes."""
    print_table("metrics", {k: v for k, v in metrics.items() if v is None or isinstance(v, float)})
    for key, title in (("per_class", "AP per class"), ("per_class_iou", "IoU per class")):
        if key in metrics:
            print_table(title, metrics[key])
    for note in metrics.get("notes", []):
        print(f"note: {note}")


def write_metrics(output: Path, metrics: dict[str, Any]) -> None:
    """Write metrics.json into a folder, which is made if need be."""
    output.mkdir(parents=True, exist_ok=True)
    text = json.dumps(metrics, indent=2) + "\n"
    (output / "metrics.json").write_text(text, encoding="utf-8")


def handful(data: DataT, number: int = 6) -> DataT:
    """Return some of the images, evenly spaced, to be drawn."""
    positions = np.linspace(0, len(data) - 1, min(number, len(data)))
    return data.select(positions.round().astype(int).tolist())


def plot_curves(output: Path, metric: str) -> None:
    """Draw the loss, each of its terms and the metric of metrics.csv as curves.png.

    Args:
        output: folder of the run.
        metric: the column that judged the epochs.
    """
    file = output / "metrics.csv"
    rows = read_metrics(file)[0] if file.exists() else []
    training = [row for row in rows if "loss" in row]
    judged = [row for row in rows if metric in row and "epoch" in row]
    terms = list(dict.fromkeys(name for row in training for name in row))
    terms = [name for name in terms if name not in ("step", "epoch", "lr", "loss")]
    names = ["loss", *terms] if len(terms) > 1 else terms
    steps = [row["step"] for row in training]
    changes = [
        (before["step"] + after["step"]) / 2
        for before, after in pairwise(training)
        if before.keys() != after.keys()  # resumed with another loss
    ]
    figure, axes = plt.subplots(1, len(names) + 1, figsize=(4 * len(names) + 4, 3.2), squeeze=False)
    for axis, name in zip(axes[0], names, strict=False):
        values = np.array([row.get(name, math.nan) for row in training])
        axis.plot(steps, values, color="tab:blue", alpha=0.3, linewidth=0.8)
        axis.plot(steps, _smooth(values), color="tab:blue")
        for change in changes:
            axis.axvline(change, color="grey", linestyle=":")
        axis.set_title("loss (sum of the terms)" if name == "loss" else name)
        lowest = min(values[np.isfinite(values)], default=0)
        axis.set_ylim(bottom=min(0, lowest))  # a term with a learned weight can be negative
    last = axes[0][-1]
    epochs, scores = [row["epoch"] for row in judged], [row[metric] for row in judged]
    last.plot(epochs, scores, color="tab:green", marker="o", markersize=4)
    if scores:
        best = int(np.argmax(scores))
        last.annotate(
            f"best {scores[best]:.3f}",
            (epochs[best], scores[best]),
            xytext=(0, -12),
            textcoords="offset points",
            ha="right",
            va="top",
        )
    last.set_title(f"validation {metric}")
    last.set_ylim(0, 1)
    for axis in axes[0]:
        axis.set_xlabel("epoch" if axis is last else "step")
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(output / "curves.png", dpi=120)
    plt.close(figure)


def plot_ratios(results: Sequence[dict[str, Any]], file: Path) -> None:
    """Draw the ratios of a benchmark to the peers as bars, with their quartiles and limits.

    Args:
        results: of each comparison work, against, and in ratios the peer's low, mid, high, limit
            (or None) and met.
        file: the picture.
    """
    figure, axis = plt.subplots(figsize=(11, 0.34 * len(results) + 1.2))
    for place, ratio in enumerate(result["ratios"]["peer"] for result in results):
        colour = "tab:red" if ratio["met"] is False else "tab:blue"
        spread = [[ratio["mid"] - ratio["low"]], [ratio["high"] - ratio["mid"]]]
        axis.barh(place, ratio["mid"], xerr=spread, color=colour, alpha=0.8, capsize=2)
        if ratio["limit"] is not None:
            axis.plot(
                [ratio["limit"]] * 2, [place - 0.45, place + 0.45], color="black", linewidth=2
            )
    axis.axvline(1, color="grey", linewidth=0.8)
    axis.set_xscale("log")
    axis.set_yticks(range(len(results)), [f"{r['work']}\nagainst {r['against']}" for r in results])
    axis.tick_params(axis="y", labelsize=7)
    axis.invert_yaxis()
    axis.set_xlabel("our time over the other's; less is better; black: the largest wanted")
    axis.grid(axis="x", alpha=0.3)
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    plt.close(figure)


def plot_sizes(results: Sequence[dict[str, Any]], machine: str, file: Path) -> None:
    """Draw times for an element against the number of elements.

    Args:
        results: of each loss ``loss``, ``peer``, ``elements``, ``left_off`` and, of each
            contestant, the ``nanoseconds`` for an element.
        machine: where they were measured.
        file: the picture.
    """
    styles: dict[str, dict[str, Any]] = {
        "ours": {"color": "tab:blue", "marker": "o", "linewidth": 2.2, "zorder": 4},
        "peer": {"color": "tab:red", "marker": "s"},
        "plain": {"color": "tab:orange", "marker": "^"},
        "compiled": {"color": "tab:green", "marker": "v", "linestyle": "--"},
    }
    names = {"ours": "detseg_losses", "plain": "plain PyTorch", "compiled": "plain, compiled"}
    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": "sizes", "font.size": 9}):
        figure, axes = plt.subplots(
            2, 2, figsize=(9, 6.6), sharex=True, sharey=True, layout="constrained"
        )
        for axis, result in zip(axes.flat, results, strict=True):
            for name, values in result["nanoseconds"].items():
                label = names.get(name, result["peer"])
                axis.loglog(result["elements"], values, label=label, markersize=4, **styles[name])
            if result["left_off"]:
                note = f"from {min(result['left_off']):.0e} left off, for want of memory"
                axis.text(0.03, 0.04, note, transform=axis.transAxes, fontsize=8, color="grey")
            axis.set_title(result["loss"], fontsize=10)
            axis.minorticks_off()
            axis.grid(alpha=0.3)
            axis.legend(fontsize=8, frameon=False)
        figure.supxlabel("elements of the prediction", fontsize=9)
        figure.supylabel("nanoseconds for an element, both passes: less is better", fontsize=9)
        figure.suptitle(machine, fontsize=8, color="grey")
        figure.savefig(file, dpi=110, metadata={"Date": None} if file.suffix == ".svg" else None)
        plt.close(figure)


def _smooth(values: NDArray[np.float64], weight: float = 0.6) -> NDArray[np.float64]:
    """An exponential moving mean, which begins anew after a gap."""
    smoothed = values.copy()
    for index, (before, value) in enumerate(pairwise(values), start=1):
        if np.isfinite(before):
            smoothed[index] = weight * smoothed[index - 1] + (1 - weight) * value
    return smoothed


def draw_detections(data: DetectionData, results: Sequence[dict[str, Any]], file: Path) -> None:
    """Draw the objects of each image beside the detections.

    Only detections that are fairly certain are drawn, and of those that overlap, whatever their
    class, the most certain one.

    Args:
        data: a handful of images.
        results: entries of a COCO results file.
        file: the picture.
    """
    figure, pairs = _pairs(len(data), f"predictions (score >= {LEAST_SCORE})")
    objects = data.ground_truth()["annotations"]
    names = dict(zip(data.category_ids, data.classes, strict=True))
    colours = dict(zip(data.category_ids, _colours(len(names)), strict=True))
    for index, (left, right) in enumerate(pairs):
        sample = data[index]
        found = [
            result
            for result in results
            if result["image_id"] == sample.image_id and result["score"] >= LEAST_SCORE
        ]
        there = [box for box in objects if box["image_id"] == sample.image_id]
        for axis, boxes in ((left, there), (right, _without_overlaps(found))):
            axis.imshow(sample.image)
            for box in boxes:
                x, y, width, height = box["bbox"]
                colour = colours[box["category_id"]]
                label = names[box["category_id"]]
                label += f" {box['score']:.2f}" if "score" in box else ""
                axis.add_patch(Rectangle((x, y), width, height, fill=False, ec=colour, lw=1.5))
                axis.text(
                    x,
                    y,
                    label,
                    fontsize=5.5,
                    color="black" if sum(colour) > 1.5 else "white",
                    va="bottom",
                    clip_on=True,
                    bbox={"facecolor": colour, "edgecolor": "none", "pad": 0.6},
                )
    _save(figure, file)


def _without_overlaps(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    boxes = torch.tensor([result["bbox"] for result in found]).reshape(-1, 4)
    scores = torch.tensor([result["score"] for result in found])
    kept = nms(box_convert(boxes, "xywh", "xyxy"), scores, iou_threshold=0.5)
    return [found[index] for index in kept.tolist()]


def draw_masks(data: Data, predictions: Sequence[Image], file: Path) -> None:
    """Draw the mask of each image beside the predicted one; void is black.

    Args:
        data: a handful of images.
        predictions: their predicted masks.
        file: the picture.
    """
    figure, pairs = _pairs(len(data), "predictions")
    colours = _colours(len(data.classes))
    palette = np.zeros((256, 3))
    palette[: len(colours)] = colours
    if data.classes[0] == "background":
        palette[0] = colours[0] = (0.6, 0.6, 0.6)
    present: set[int] = set()
    for index, (left, right) in enumerate(pairs):
        sample = data[index]
        for axis, mask in ((left, sample.mask), (right, predictions[index])):
            present |= {int(value) for value in np.unique(mask)} - {255}
            grey = sample.image.mean(axis=2, keepdims=True) / 255
            axis.imshow(0.4 * grey + 0.6 * palette[mask])
    figure.legend(
        handles=[Patch(color=colours[i], label=data.classes[i]) for i in sorted(present)],
        loc="outside lower center",
        ncols=6,
        fontsize=7,
        frameon=False,
    )
    _save(figure, file)


def _pairs(number: int, right_title: str) -> tuple[Figure, list[tuple[Axes, Axes]]]:
    """A figure with two places side by side for each of ``number`` images, two pairs in a row."""
    rows = -(-number // 2)
    figure, axes = plt.subplots(
        rows, 4, figsize=(11, 2.8 * rows + 0.5), squeeze=False, layout="constrained"
    )
    for axis in axes.flat:
        axis.axis("off")
    pairs = [(axes[i // 2][2 * (i % 2)], axes[i // 2][2 * (i % 2) + 1]) for i in range(number)]
    for left, right in pairs[:2]:
        left.set_title("ground truth", fontsize=9)
        right.set_title(right_title, fontsize=9)
    return figure, pairs


def _save(figure: Figure, file: Path) -> None:
    figure.savefig(file, dpi=110)
    plt.close(figure)


def _colours(number: int) -> list[tuple[float, float, float]]:
    if number <= 10:
        return [to_rgb(f"C{i}") for i in range(number)]
    colours = plt.get_cmap("gist_ncar")(np.linspace(0.03, 0.97, number))
    return [(r, g, b) for r, g, b, _ in colours.tolist()]
