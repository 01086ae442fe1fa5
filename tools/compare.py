"""Which loss is best for your data? Train each candidate with several seeds; say how sure it is.

Each run is one of train_det.py or train_seg.py in a folder of its own below output/cells; equal
seeds mean equal splits, order, augmentation and initial weights. The same command goes on after an
interruption, and trains only what is new with more seeds or candidates. All options of training
can be given, for all runs alike.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

from common.comparison import Cell, cells_of, compare, print_comparison, write_results
from common.config import CompareConfig, TrainingConfig, parse_comparison, write_comparison
from common.data import has_split
from common.detectors import check_losses
from common.errors import Interrupted, UsageError, usage_errors, writing
from common.evaluate import check_folder, make_folder
from common.launch import in_use
from common.signals import Signals

import torch


@usage_errors()
def main() -> None:
    """Run the tool."""
    compared, training = parse_comparison(__doc__, check_losses)
    check_folder("--output", compared.output)
    folder = Path(compared.output)
    if not compared.report_only:
        compared.test_split = _test_split(compared, training)
        if training.train.devices == "auto":
            training.train.devices = 1
        make_folder(compared.output)
        with writing(folder):
            write_comparison(folder, compared, training)
    cells = cells_of(compared)
    failed: list[str] = []
    if not compared.report_only:
        chosen = cells
        if compared.cell is not None:
            if compared.cell >= len(cells):
                raise UsageError(f"--cell {compared.cell}: there are {len(cells)}, counted from 0")
            chosen = [cells[compared.cell]]
        with Signals(), writing(folder):
            failed = _Runs(compared, training, len(cells)).run(chosen)
    if compared.cell is None:
        result = compare(compared, training, cells)
        result["notes"] += failed
        with writing(folder):
            write_results(folder, result)
        print_comparison(result)
        print(f"results: {folder}")
    if failed:
        sys.exit(1)


def _test_split(compared: CompareConfig, training: TrainingConfig) -> str | None:
    """The split for the final numbers, None where there is none beside the validation split."""
    name = compared.test_split or "test"
    if name in (training.data.val_split, training.data.train_split):
        if compared.test_split is not None:
            raise UsageError(f"--test_split {name} is the training or the validation split")
        return None
    if has_split(training.data, training.task, name):
        return name
    if compared.test_split is not None:
        raise UsageError(f"--test_split {name}: the data has no such split")
    return None


class _Runs:
    """Runs the cells, as many at once as there are devices.

    Args:
        compared: what is compared.
        training: the options that all runs share.
        total: how many cells the comparison has.
    """

    def __init__(self, compared: CompareConfig, training: TrainingConfig, total: int) -> None:
        self.compared, self.training, self.total = compared, training, total
        self.free = _devices(int(training.train.devices))
        self.running: list[tuple[Cell, str | None, subprocess.Popen[bytes], IO[bytes]]] = []
        self.failed: list[str] = []

    def run(self, cells: list[Cell]) -> list[str]:
        """Run what is not done; return a sentence for each cell that failed."""
        waiting = [cell for cell in cells if self._command(cell) is not None]
        print(f"{len(cells)} runs, of which {len(cells) - len(waiting)} are done", flush=True)
        told: set[Cell] = set()
        try:
            while waiting or self.running:
                for cell in waiting if self.free else []:
                    if not in_use(cell.folder):
                        waiting.remove(cell)
                        self._start(cell, self.free.pop(0))
                        break
                    if cell not in told:  # left by a comparison that was killed, or by another
                        print(f"{cell.folder} is in use: waiting for that run", flush=True)
                        told.add(cell)
                time.sleep(0.1)
                for place in [each for each in self.running if each[2].poll() is not None]:
                    self.running.remove(place)
                    waiting += self._end(*place)
        except Interrupted as error:
            raise Interrupted(error.number, f"{error}; the same command goes on") from None
        finally:
            for _, _, process, _ in self.running:
                process.terminate()
            for _, _, process, log in self.running:
                process.wait()
                log.close()
        return self.failed

    def _start(self, cell: Cell, device: str | None) -> None:
        command = self._command(cell)
        if command is None:  # done meanwhile, by whoever used the folder
            self.free.append(device)
            return
        cell.folder.mkdir(parents=True, exist_ok=True)
        environment = dict(os.environ)
        if device is not None:
            environment["CUDA_VISIBLE_DEVICES"] = device
        log = (cell.folder / "log.txt").open("ab")
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        self.running.append((cell, device, process, log))

    def _end(
        self, cell: Cell, device: str | None, process: subprocess.Popen[bytes], log: IO[bytes]
    ) -> list[Cell]:
        """Say how a process ended; return the cell where it has to go on."""
        log.close()
        self.free.append(device)
        what = f"run {cell.number + 1} of {self.total}, {cell.name} with seed {cell.seed}"
        if process.returncode == 0:
            if self._command(cell) is not None:  # trained, and still to be tested
                return [cell]
            print(f"{what}: done", flush=True)
        elif in_use(cell.folder):
            return [cell]
        else:
            reason = _last_line(cell.folder / "log.txt") or f"exit code {process.returncode}"
            self.failed.append(f"{what} failed: {reason}")
            print(self.failed[-1], flush=True)
        return []

    def _command(self, cell: Cell) -> list[str] | None:
        """What is to be run next for a cell, None if it is done."""
        kind, split = self.compared.task, self.compared.test_split
        tools = Path(__file__).parent
        if not cell.is_trained:
            return [
                *(sys.executable, str(tools / f"train_{kind}.py")),
                f"--config={Path(self.compared.output) / 'training.yaml'}",
                *(f"--loss={cell.spec}", f"--seed={cell.seed}", f"--output={cell.folder}"),
                *([] if cell.lr is None else [f"--train.lr={cell.lr!r}"]),
                *(["--resume"] if (cell.folder / "last.ckpt").exists() else []),
            ]
        if split is not None and not cell.is_tested:
            return [
                *(sys.executable, str(tools / f"eval_{kind}.py")),
                f"--checkpoint={cell.folder / 'best.ckpt'}",
                *(f"--data.val_split={split}", "--data.val_list=null"),
                f"--output={cell.folder / 'test'}",
            ]
        return None


def _devices(each: int) -> list[str | None]:
    """The GPUs for one run after the other, as CUDA_VISIBLE_DEVICES names them; else one CPU."""
    count = torch.cuda.device_count()
    if not count:
        return [None]
    names = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    names = names if len(names) == count and all(names) else [str(i) for i in range(count)]
    return [",".join(names[i : i + each]) for i in range(0, count - each + 1, each)]


def _last_line(file: Path) -> str:
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines() or [""]
    said = [line for line in lines if "error: " in line.lower()]
    return (said or lines)[-1].strip()


if __name__ == "__main__":
    main()
