"""The comparison of losses: as people run it, and its words on runs whose numbers are given."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import compare
from common.comparison import Cell, cells_of, scaled
from common.comparison import compare as result_of
from common.config import CompareConfig, SegmentationConfig
from common.errors import UsageError
from common.per_image import pixel_counts, write_per_image
from common.shapes import make_shapes

Json = dict[str, Any]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options of a comparison whose runs take little longer than their imports."""
    root = make_shapes(tmp_path_factory.mktemp("data"), number=8, validation=4, size=48)
    return [
        *("--data.format=coco", f"--data.root={root}", "--data.size=32", "--train.epochs=1"),
        "--train.batch_size=4",
    ]


def command(output: Path, *options: str) -> list[str]:
    return [sys.executable, compare.__file__, "--output", str(output), *options]


def run(output: Path, *options: str, code: int | None = None) -> str:
    """Run the tool in this process, which saves the imports; return what it says."""
    ended: int | str | None = None
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as said:
        patch.setattr(sys, "argv", command(output, *options)[1:])
        patch.setenv("OMP_NUM_THREADS", "1")
        try:
            compare.main()
        except SystemExit as error:
            ended = error.code
    assert ended == code, said.getvalue()
    return said.getvalue()


def refused(capfd: pytest.CaptureFixture[str], *options: str) -> str:
    """What the tool says, in one line, when it does not accept its options."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["compare.py", *options])
        with pytest.raises(SystemExit) as ended:
            compare.main()
    assert ended.value.code == 2
    (line,) = capfd.readouterr().err.splitlines()
    return line


def result(output: Path) -> Json:
    """comparison.json without what the clock measured."""
    content: Json = json.loads((output / "comparison.json").read_text())
    for candidate in content["candidates"]:
        assert candidate.pop("seconds_per_step") > 0
    return content


@pytest.fixture(scope="module")
def masks(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("comparison") / "masks"
    said = run(output, "--task=seg", "--losses", "ce", "ce + dice", "--seeds=2", *options)
    assert "4 runs, of which 0 are done" in said
    assert "over 2 seeds)" in said
    return output


def test_a_comparison_leaves_its_result(masks: Path) -> None:
    content = result(masks)
    assert [each["loss"] for each in content["candidates"]] == ["ce", "ce+dice"]
    (sentence,) = content["sentences"]
    assert sentence.startswith("ce+dice ")
    assert "95 % interval" in sentence
    row = content["candidates"][1]["metrics"]["mIoU"]
    scores = {
        (loss, seed): json.loads((masks / f"cells/{loss}/seed-{seed}/metrics.json").read_text())
        for loss in ("ce", "ce+dice")
        for seed in (0, 1)
    }
    differences = [
        100 * (scores["ce+dice", seed]["mIoU"] - scores["ce", seed]["mIoU"]) for seed in (0, 1)
    ]
    assert row["difference"] == pytest.approx(np.mean(differences))
    assert row["over_images"][0] <= row["over_images"][1]
    with (masks / "comparison.csv").open(newline="") as stream:
        lines = {(each["loss"], each["metric"]): each for each in csv.DictReader(stream)}
    assert float(lines["ce+dice", "mIoU"]["mean"]) == pytest.approx(row["mean"])
    assert lines["ce", "IoU of circle"]["difference"] == ""


def test_the_report_alone_has_the_same_numbers(masks: Path) -> None:
    before = (masks / "comparison.json").read_bytes(), (masks / "comparison.csv").read_bytes()
    for name in ("comparison.json", "comparison.csv"):
        (masks / name).unlink()
    said = run(masks, "--report-only")
    after = (masks / "comparison.json").read_bytes(), (masks / "comparison.csv").read_bytes()
    assert before == after
    assert result(masks)["sentences"][0] in said


def test_a_comparison_goes_on_after_a_kill(masks: Path, options: list[str], tmp_path: Path) -> None:
    output = tmp_path / "masks"
    shutil.copytree(masks, output)
    cell = output / "cells/ce/seed-1"
    shutil.rmtree(cell)
    again = ["--task=seg", "--losses", "ce", "ce+dice", "--seeds=2", *options]
    with subprocess.Popen(
        command(output, *again), stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    ) as process:
        while not (cell / "last.ckpt").exists() and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM
    assert "the same command goes on" in said
    assert not (cell / "metrics.json").exists()
    assert "4 runs, of which 3 are done" in run(output, *again)
    assert result(output) == result(masks)


def test_a_run_that_fails_stops_no_other(masks: Path, options: list[str], tmp_path: Path) -> None:
    output = tmp_path / "masks"
    shutil.copytree(masks, output)
    shutil.rmtree(output / "cells/ce+dice/seed-0")
    losses = ["--losses", "ce", "1e38*ce+1e38*dice", "ce+dice"]
    said = run(output, "--task=seg", *losses, "--seeds=1", *options, code=1)
    assert "run 2 of 3, 1e38*ce+1e38*dice with seed 0 failed: train_seg.py: error:" in said
    assert "run 3 of 3, ce+dice with seed 0: done" in said
    content = json.loads((output / "comparison.json").read_text())
    assert any("failed" in note for note in content["notes"])
    assert any("1 of 3 runs are missing" in note for note in content["notes"])
    assert any("cannot be compared" in sentence for sentence in content["sentences"])


def test_detectors_are_judged_on_the_test_split(options: list[str], tmp_path: Path) -> None:
    """And a run can be a job of its own."""
    root = tmp_path / "data"
    shutil.copytree(options[1].partition("=")[2], root)
    shutil.copy(root / "annotations/instances_val.json", root / "annotations/instances_test.json")
    shutil.copytree(root / "val", root / "test")
    own = [*options[:1], f"--data.root={root}", *options[2:], "--losses", "l1+focal", "giou+focal"]
    output = tmp_path / "boxes"
    for cell in (0, 1):
        said = run(output, f"--cell={cell}", "--seeds=1", *own)
        assert f"run {cell + 1} of 2" in said
        assert not (output / "comparison.json").exists()
    said = run(output, "--report-only")
    content = result(output)
    assert content["split"] == "test"
    assert content["images"] == 4
    assert "says nothing of what another seed would give" in content["sentences"][0]
    assert (output / "cells/giou+focal/seed-0/test/per_image.npz").exists()
    assert "APs" in content["candidates"][1]["metrics"]


# Results of runs that are made up


def made_up(
    output: Path, values: dict[str, list[float]], images: int = 60, **more: Any
) -> tuple[Json, list[Cell]]:
    """The result of runs with these IoUs, by candidate and seed; images differ a little."""
    compared = CompareConfig("seg", str(output), [*values], len(values["ce"]), **more)
    cells = cells_of(compared)
    hardness = np.random.default_rng(0).normal(0, 200, images)
    for cell in cells:
        factor = cell.lr or 1.0
        own = np.clip(10_000 * values[cell.loss][cell.seed] * factor + hardness, 0, 10_000)
        noise = np.random.default_rng(cell.number).normal(0, 20, images)
        hits = np.round(np.clip(own + noise, 0, 10_000)).astype(np.int64)
        matrices = [np.array([[hit, 10_000 - hit], [0, 0]]) for hit in hits]
        cell.folder.mkdir(parents=True)
        names = [f"{number}.png" for number in range(images)]
        write_per_image(cell.folder, pixel_counts(names, ["a", "b"], matrices))
        metrics = {"epoch": 1, "mIoU": float(hits.sum()) / 20_000 / images, "per_class_iou": {}}
        (cell.folder / "metrics.json").write_text(json.dumps(metrics))
    return result_of(compared, SegmentationConfig(), cells), cells


def test_a_large_difference_is_told_apart(tmp_path: Path) -> None:
    found, _ = made_up(tmp_path, {"ce": [0.5, 0.52, 0.48], "dice": [0.6, 0.621, 0.58]})
    (sentence,) = found["sentences"]
    assert sentence.startswith("dice leads ce by 5.0 mIoU (95 % interval 4.")
    assert sentence.endswith("over 3 seeds): told apart, and by more than 0.5.")


def test_a_difference_that_seeds_make_is_not_told_apart(tmp_path: Path) -> None:
    found, _ = made_up(tmp_path, {"ce": [0.5, 0.55, 0.45], "dice": [0.54, 0.50, 0.50]})
    assert ": not told apart; about " in found["sentences"][0]


def test_one_of_many_comparisons_needs_more(tmp_path: Path) -> None:
    """Which alone would have been told apart."""
    noise = [[0.011, -0.012, 0.002], [-0.012, 0.013, 0.004], [0.014, 0.001, -0.016]]
    values = {"ce": [0.5, 0.52, 0.48], "dice": [0.52, 0.535, 0.489]}
    for name, extra in zip(("focal", "lovasz", "bce"), noise, strict=True):
        values[name] = [a + b for a, b in zip(values["ce"], extra, strict=True)]
    found, _ = made_up(tmp_path, values)
    (sentence,) = [each for each in found["sentences"] if each.startswith("dice")]
    row = found["candidates"][1]["metrics"]["mIoU"]
    assert row["p"] < 0.05 < row["holm_p"]
    assert "not enough for one of 4 comparisons: not told apart" in sentence


def test_no_difference_that_matters(tmp_path: Path) -> None:
    values = {"ce": [0.5, 0.52, 0.48, 0.5], "dice": [0.5, 0.52, 0.481, 0.5]}
    found, _ = made_up(tmp_path, values, threshold=3.0)
    assert "what is left is less than 3 either way" in found["sentences"][0]


def test_each_candidate_takes_its_own_learning_rate(tmp_path: Path) -> None:
    values = {"ce": [0.5, 0.52, 0.48], "dice": [0.4, 0.42, 0.381]}
    found, cells = made_up(tmp_path, values, lrs=[1.0, 1.5])
    assert len(cells) == 12
    assert [each["lr"] for each in found["candidates"]] == [1.5, 1.5]
    assert "at 2 settings with 3 seeds" in found["notes"][0]
    assert "dice trails ce by 7." in found["sentences"][0]


def test_more_seeds_and_candidates_leave_the_folders_as_they_are() -> None:
    few = cells_of(CompareConfig("det", "x", ["l1+focal", "ciou+focal(gamma=1.5)"], 2))
    more = cells_of(CompareConfig("det", "x", ["giou+bce", "ciou+focal(gamma=1.5)", "l1+focal"], 3))
    assert {cell.folder for cell in few} < {cell.folder for cell in more}
    assert len({cell.folder for cell in more}) == 9


def test_scales_multiply_the_first_weight() -> None:
    assert scaled("l1+focal", 10) == "10*l1+focal"
    assert scaled("2*l1+focal", 10) == "20*l1+focal"
    assert scaled("rpn:giou+bce;roi:0.5*giou+ce", 4) == "rpn:4*giou+bce;roi:2*giou+ce"
    with pytest.raises(UsageError, match="no number"):
        scaled("learned*l1+focal", 2)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--losses", "l1+focal", "--output=x"], "two loss strings"),
        (["--losses", "l1+focal", "l1 + focal", "--output=x"], "l1+focal is given twice"),
        (["--losses", "l1+focal", "giou+focel", "--output=x"], "did you mean 'focal'"),
        (["--losses", "l1+focal", "giou+dice", "--output=x"], "no use for 'dice'"),
        (["--losses", "l1+focal", "giou+focal"], "--output is missing"),
        (["--report-only", "--output=nowhere"], "holds no comparison"),
    ],
)
def test_what_cannot_be_compared_is_one_line(
    options: list[str], words: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert words in refused(capfd, *options)


def test_another_configuration_needs_another_folder(
    masks: Path, options: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    again = [f"--output={masks}", "--task=seg", "--losses", "ce", "ce+dice", *options]
    assert "train.epochs=1, not 2" in refused(capfd, *again, "--train.epochs=2")
