"""metrics.csv and TensorBoard files: a row for each step that is logged."""

from __future__ import annotations

import csv
import os
from itertools import count
from pathlib import Path
from typing import Any

from common.files import replacing

from torch.utils.tensorboard import SummaryWriter


class MetricsLog:
    """The log of a run.

    Args:
        output: folder of the run.
        step: the step from which it goes on; later rows of an interrupted run are dropped.

    Attributes:
        note: what is to be said of the file that was there, or None.
    """

    def __init__(self, output: Path, step: int) -> None:
        self.file = output / "metrics.csv"
        self.board = SummaryWriter(str(output / "tensorboard"), purge_step=step + 1)
        self.columns: list[str] = []
        self.rows: list[dict[str, float]] = []
        self.note = self._take_over(step) if step else None

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Add the numbers among ``values``."""
        numbers = {k: v for k, v in values.items() if isinstance(v, (int, float))}
        row = {"step": step, **numbers}
        self.rows.append(row)
        if row.keys() <= {*self.columns} and self.file.exists():
            with self.file.open("a", newline="", encoding="utf-8") as stream:
                csv.DictWriter(stream, self.columns).writerow(row)
        else:
            self._write_all()
        for name, value in numbers.items():
            self.board.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what TensorBoard still holds in memory."""
        self.board.close()

    def _take_over(self, step: int) -> str | None:
        """Go on from the rows up to ``step``; a file that is not as it was written is kept."""
        if not self.file.is_file():
            return f"{self.file} is missing: it begins again at step {step + 1}"
        rows, whole = read_metrics(self.file)
        self.rows = [row for row in rows if row["step"] <= step]
        note = None
        if not whole:
            names = (self.file.with_name(f"metrics-damaged-{n}.csv") for n in count(1))
            kept = next(name for name in names if not name.exists())
            os.replace(self.file, kept)
            note = (
                f"{self.file} was damaged: {len(self.rows)} rows are kept, and the file as {kept}"
            )
        if self.rows:
            self._write_all()
        else:
            self.file.unlink(missing_ok=True)
        return note

    def _write_all(self) -> None:
        """Write a new file, put in place when it is whole."""
        self.columns = list(dict.fromkeys(name for row in self.rows for name in row))
        with replacing(self.file, "w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, self.columns)
            writer.writeheader()
            writer.writerows(self.rows)


def read_metrics(file: Path) -> tuple[list[dict[str, float]], bool]:
    """Return the rows of metrics.csv without their empty cells, and whether all can be read.

    Cells that are not numbers are dropped, and rows without a step.
    """
    cells: list[list[str]] = []
    rows: list[dict[str, float]] = []
    whole = True
    with file.open(newline="", encoding="utf-8", errors="replace") as stream:
        try:
            cells.extend(csv.reader(stream))
        except csv.Error:
            whole = False
    header, *body = cells or [[]]
    whole &= "step" in header
    for line in body:
        numbers = {name: _number(cell) for name, cell in zip(header, line, strict=False) if cell}
        row = {name: number for name, number in numbers.items() if number is not None}
        whole &= len(line) == len(header) and len(row) == len(numbers) and "step" in row
        if isinstance(row.get("step"), int):
            rows.append(row)
    return rows, whole


def _number(cell: str) -> float | None:
    try:
        return int(cell) if cell.isdecimal() else float(cell)
    except ValueError:
        return None
