"""The curves of the losses, drawn from the losses themselves.

``python docs/figures.py`` draws the picture of the README; the site draws one of each loss.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import torch
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from detseg_losses import LOSSES, Loss
from detseg_losses.losses.softmax import PixelLoss

matplotlib.rcParams |= {
    "axes.edgecolor": "#8886",
    "axes.labelcolor": "#888",  # which can be read on white and on black
    "axes.prop_cycle": cycler(color=["#2f7de1", "#e8743b", "#19a979", "#c74ea0", "#8d6cc9"]),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": "#888",
    "font.family": "sans-serif",
    "grid.color": "#8883",
    "axes.grid": True,
    "legend.frameon": False,
    "legend.labelcolor": "#888",
    "savefig.transparent": True,
    "svg.fonttype": "none",
    "svg.hashsalt": "detseg_losses",
    "xtick.color": "#888",
    "ytick.color": "#888",
}

Curve = tuple[Tensor, Tensor]
SHOWN: dict[str, dict[str, Any]] = {"tversky": {"alpha": 0.3, "beta": 0.7}, "f1": {"beta": 2}}
"""Options of the losses that are another one by default."""

OBJECT, PIXELS = 200, 1000
"""How large the object of the region losses is, and its image."""


def made(name: str, **options: Any) -> Loss:
    return LOSSES[name](reduction="none", **SHOWN.get(name, {}), **options)


def of_probability(name: str, target: float) -> Curve:
    """The loss of an entry by its probability; of a pixel by that of the right class."""
    p = torch.linspace(0.005, 0.995, 199)
    if "classification" in LOSSES[name].kinds:
        return p, made(name)(p.logit(), torch.full_like(p, target))
    logits = torch.stack((p.logit(), torch.zeros_like(p)))[None]
    return p, made(name)(logits, torch.zeros(1, len(p), dtype=torch.long))[0]


def of_size(name: str) -> Curve:
    """The loss of an object of which a part is predicted, or all and more, by their ratio."""
    sizes = torch.arange(0, 2 * OBJECT + 1, 4)
    place = torch.arange(PIXELS)
    predicted = torch.where(place < sizes.unsqueeze(1), 20.0, -20.0)
    logits = torch.stack((-predicted, predicted), 1) / 2
    target = (place < OBJECT).long().expand(len(sizes), -1)
    return sizes / OBJECT, made(name, per_image=True)(logits, target)[:, 1]


def of_distance(name: str) -> Curve:
    """The loss of one wrong pixel by its distance to the object."""
    row = torch.arange(64)
    distances = torch.arange(1, 48)
    wrong = row == 15 + distances.unsqueeze(1)
    logits = torch.where((row < 16) | wrong, 20.0, -20.0).unsqueeze(1)
    target = (row < 16).long().expand(len(distances), -1)
    return distances, made(name, per_image=True, mode="binary")(logits, target).squeeze(1)


def of_line(name: str, cut: bool) -> Curve:
    """The loss of a line, three pixels wide, by how many pixels of it are missing: all in one
    place, or along its border.
    """
    line = torch.zeros(9, 64)
    line[3:6] = 1
    row, column = torch.arange(9).view(-1, 1), torch.arange(64)
    missing = torch.arange(0, 46, 3)
    count = missing.view(-1, 1, 1)
    lost = (column < 8 + count // 3) & (column >= 8) if cut else (row == 3) & (column < count)
    logits = (40 * line * ~lost - 20).unsqueeze(1)
    target = line.long().expand(len(missing), -1, -1)
    return missing, made(name, per_image=True, mode="binary")(logits, target).squeeze(1)


def of_shift(name: str) -> Curve:
    """The loss of a square box by how many of its widths it is off."""
    shift = torch.linspace(0, 2, 201)
    target = torch.tensor([0.0, 0, 16, 16]).expand(201, 4)
    return shift, _box_loss(name, target + 16 * shift.outer(torch.tensor([1.0, 0, 1, 0])), target)


def of_width(name: str) -> Curve:
    """The loss of a box around the right centre by its width."""
    width = torch.linspace(0.02, 2, 199)
    target = torch.tensor([-8.0, -8, 8, 8]).expand(199, 4)
    factor = torch.ones(199, 4)
    factor[:, ::2] = width.unsqueeze(1)
    return width, _box_loss(name, target * factor, target)


def _box_loss(name: str, boxes: Tensor, targets: Tensor) -> Tensor:
    return made(name)(boxes, targets)


def of_error(name: str) -> Curve:
    error = torch.linspace(-3, 3, 241)
    return error, made(name)(error, torch.zeros(241))


def of_mean(name: str) -> Curve:
    """The loss of a distribution with a peak, by where that is; the target is 3.4."""
    peak = torch.linspace(0, 7, 141)
    logits = -2 * (peak.unsqueeze(1) - torch.arange(8)).abs()
    return peak, made(name)(logits, torch.full((141,), 3.4))


def curves(name: str) -> tuple[str, dict[str, Curve]]:
    """What the axis of a loss shows, and its curves by their labels."""
    kinds = LOSSES[name].kinds
    if "boxes" in kinds:
        return (
            "shift, or width, in widths of the target",
            {"shifted": of_shift(name), "of another width": of_width(name)},
        )
    if "deltas" in kinds:
        return "error", {"": of_error(name)}
    if "distribution" in kinds:
        return "peak of the distribution", {"target 3.4": of_mean(name)}
    if "classification" in kinds:
        found = {"target 1": of_probability(name, 1), "target 0": of_probability(name, 0)}
        if name in ("quality_focal", "varifocal"):
            found["target 0.7"] = of_probability(name, 0.7)
        return "predicted probability", found
    if name == "boundary":
        return "distance of a wrong pixel", {"": of_distance(name)}
    if name == "cldice":
        return (
            "missing pixels of a line",
            {"in a gap": of_line(name, cut=True), "at the border": of_line(name, cut=False)},
        )
    if issubclass(LOSSES[name], PixelLoss):
        return "probability of the right class", {"": of_probability(name, 1)}
    options = ", ".join(f"{key}={value}" for key, value in SHOWN.get(name, {}).items())
    lines = {f"{name}({options})" if options else name: of_size(name)}
    return "predicted size / true size", lines | {"dice": of_size("dice")}  # to compare with


def draw(axes: Axes, label: str, lines: dict[str, Curve]) -> None:
    for name, (x, y) in lines.items():
        axes.plot(x, y, label=name or None, linewidth=1.6)
    axes.set_xlabel(label)
    axes.margins(x=0)
    top = max(float(y[y.isfinite()].max()) for _, y in lines.values())
    axes.set_ylim(min(0.0, *(float(y.min()) for _, y in lines.values())), min(top, 5) * 1.05)
    axes.tick_params(length=0)
    if any(lines):
        axes.legend(fontsize="small", handlelength=1.2)


def save(figure: Figure, path: Path) -> None:
    figure.savefig(path, metadata={"Date": None})


def draw_loss(name: str, path: Path) -> None:
    figure = Figure(figsize=(3.6, 2.5), layout="constrained")
    draw(figure.subplots(), *curves(name))
    save(figure, path)


def draw_overview(path: Path) -> None:
    """Three families side by side."""
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    panels: list[tuple[str, str, Callable[[str], Curve], str]] = [
        (
            "a negative anchor",
            "predicted probability",
            partial(of_probability, target=0),
            "bce quality_focal focal asymmetric",
        ),
        ("a box", "shift in widths of the box", of_shift, "iou giou diou nwd"),
        ("a mask", "predicted size / true size", of_size, "dice jaccard focal_tversky mcc"),
    ]
    for axes, (title, label, curve, names) in zip(figure.subplots(1, 3), panels, strict=True):
        draw(axes, label, {name: curve(name) for name in names.split()})
        axes.set_title(title, fontsize="medium")
    save(figure, path)


if __name__ == "__main__":
    draw_overview(Path(__file__).with_name("losses.svg"))
