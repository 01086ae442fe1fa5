"""The benchmark: what it measures, and the tool."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision.models.detection.retinanet import RetinaNetHead

import bench_losses
from common import bench_sizes, benchmark, plain
from common.bench_inputs import (
    OUR_BOXES,
    OUR_FOCAL,
    anchor_labels,
    boxes_of,
    logits_of,
    masks,
    torchvision_focal,
)
from common.bench_rows import CLASSES, ROWS, head_inputs, loss_of_head
from common.bench_tables import BEGIN, END, markdown
from common.benchmark import Load, Memory, Step, compare, counted, kept_bytes, peak_bytes
from detseg_losses import build_loss

TOOL = Path(__file__).parent.parent / "tools" / "bench_losses.py"
CPU = torch.device("cpu")


def test_memory_is_counted() -> None:
    x = torch.zeros(1000, requires_grad=True)
    with Memory([x]) as memory:
        a = x.detach() + 1
        b = a * 2
        del a
        c = b.view(10, 100) + 1
        assert (memory.live, memory.peak) == (8000, 8000)
        del b, c
    assert memory.live == 0
    given = [x]
    assert kept_bytes(lambda: x.exp().sum(), given) == 4000 + 4  # exp keeps its result
    assert kept_bytes(lambda: x.square().sum(), given) == 4  # a square its input
    assert peak_bytes(lambda: x.exp().sum().backward(), given, CPU) == pytest.approx(8000, abs=100)


def test_ratio_is_that_of_the_times() -> None:
    works = {"ours": lambda: time.sleep(0.004), "peer": lambda: time.sleep(0.02)}
    times, ratios = compare(works, 5, CPU)
    ratio = ratios["peer"]
    assert ratio.low <= ratio.mid <= ratio.high
    assert ratio.mid < 0.8
    assert times["ours"] < times["peer"]


def test_compiling_is_not_timed() -> None:
    runs = []

    def slow_at_first() -> None:
        time.sleep(0.001 if len(runs) > 1 else 0.3)
        runs.append(None)

    times, _ = compare({"ours": slow_at_first, "peer": lambda: time.sleep(0.001)}, 3, CPU)
    assert times["ours"] < 100


@pytest.mark.skipif(not Path("/proc/stat").is_file(), reason="the system does not say")
def test_the_load_of_others_is_told_from_ones_own() -> None:
    def busy(seconds: float) -> None:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            pass

    load = Load()
    busy(0.5)
    alone = load.of_others()
    load = Load()
    code = "import time; t = time.perf_counter() + 3\nwhile time.perf_counter() < t: pass"
    other = subprocess.Popen([sys.executable, "-c", code])
    time.sleep(1)
    beside = load.of_others()
    other.kill()
    other.wait()
    assert alone is not None
    assert beside is not None
    assert 0 <= alone <= 1
    assert 0.3 / os.cpu_count() < beside <= 1


PLAIN = {
    "focal": (OUR_FOCAL, plain.focal, lambda: (logits_of(CPU, 60, 7), labels(60, 7))),
    "dense focal": (OUR_FOCAL, plain.focal, lambda: (logits_of(CPU, 60, 7), torch.rand(60, 7))),
    "ce+dice": (build_loss("ce + dice"), plain.ce_dice, lambda: masks(CPU, 2, 3, 8, 8)),
    "dice": (build_loss("dice"), plain.dice, lambda: masks(CPU, 2, 3, 8, 8)),
    "bce+dice": (
        build_loss("bce + dice", mode="binary"),
        plain.bce_dice,
        lambda: masks(CPU, 2, 1, 8, 8),
    ),
    "binary dice": (
        build_loss("dice", mode="binary"),
        plain.binary_dice,
        lambda: masks(CPU, 2, 1, 8, 8),
    ),
    "giou": (OUR_BOXES["giou"], plain.giou, lambda: boxes_of(CPU, 50)),
    "ciou": (OUR_BOXES["ciou"], plain.ciou, lambda: boxes_of(CPU, 50)),
}


def labels(anchors: int, classes: int) -> torch.Tensor:
    return anchor_labels(CPU, anchors, classes, 6)


@pytest.mark.parametrize("name", PLAIN)
def test_plain_formulas_are_the_same_loss(name: str) -> None:
    ours, formula, inputs = PLAIN[name]
    same_loss(ours, formula, inputs())


def test_the_plain_retinanet_is_that_of_torchvision() -> None:
    stock = RetinaNetHead(in_channels=8, num_anchors=1, num_classes=CLASSES)
    theirs = partial(loss_of_head, stock)
    same_loss(theirs, plain.retinanet, head_inputs(CPU, 2, 200, 10))


def same_loss(first: Any, second: Any, inputs: tuple[Any, ...]) -> None:
    results = []
    for loss in (first, second):
        step = Step(loss, inputs)
        step()
        results.append((loss(*inputs), [tensor.grad.clone() for tensor in step.prediction]))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_masks_are_counted_where_the_meta_device_cannot_follow() -> None:
    inputs = logits_of(CPU, 60, 7), labels(60, 7)
    ours, theirs = Step(OUR_FOCAL, inputs), Step(torchvision_focal, inputs)
    assert counted(ours, anywhere=False) == counted(ours.on("meta"), anywhere=False)
    assert counted(theirs, anywhere=False) is None
    found = counted(theirs, anywhere=True)
    assert found is not None
    assert found["kernels"] > 20
    assert found["traffic"] == pytest.approx(found["bytes"] / inputs[0].nbytes)


def run(*options: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["bench_losses.py", *options])
        bench_losses.main()


def test_tool_measures_any_loss(tmp_path: Path) -> None:
    options = ["--shape=[1,5,32,32]", "--rounds=3", "--device=cpu", f"--output={tmp_path}"]
    subprocess.run([sys.executable, TOOL, "--loss=ce", *options], check=True)
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    assert [r["against"] for r in results[:2]] == ["a copy of the prediction", "torch"]
    for result in results[:2]:
        ratio = result["ratios"]["peer"]
        assert ratio["low"] <= ratio["mid"] <= ratio["high"]
    assert 0 < results[2]["value"] <= 1.01  # there are a few sums as well
    assert (tmp_path / "ratios.png").stat().st_size > 1000


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is compiled, and few rows are measured."""
    for module in (bench_losses, bench_sizes):
        monkeypatch.setattr(module, "can_compile", lambda device: False)
    monkeypatch.setattr(bench_losses, "ROWS", {name: ROWS[name] for name in ("dice", "import")})
    monkeypatch.setattr(benchmark, "SHORT", 0.0)


@pytest.mark.usefixtures("quick")
def test_tables_go_between_two_markers(tmp_path: Path) -> None:
    file = tmp_path / "BENCHMARKS.md"
    for before in ("", "old"):
        file.write_text(f"# Title\n{BEGIN}\n{before}\n{END}\nWords\n")
        run("--rounds=3", "--device=cpu", f"--write={file}")
    text = file.read_text()
    assert text.startswith(f"# Title\n{BEGIN}\ntorch ")
    assert text.endswith(f"{END}\nWords\n")
    assert "old" not in text
    for title in ("## Times", "## Counted for a GPU", "## Memory and import"):
        assert title in text
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert sum("dice, (4, 1, 64, 64) | " in line for line in tables) == 2
    for line, after in pairwise(text.splitlines()):
        if line.startswith("|") and after.startswith("|"):
            assert line.count("|") == after.count("|")


def test_what_is_lost_is_said() -> None:
    ratio = {"low": 1.1, "mid": 1.2, "high": 1.3, "limit": 1.0, "met": False}
    other = ratio | {"limit": None, "met": None}
    race = {
        "work": "dice",
        "against": "SMP",
        "times": {"ours": 1.2, "peer": 1.0, "plain": 1.0},
        "ratios": {"peer": ratio, "plain": other},
        "kernels": {},
    }
    size = {"work": "kept", "against": "21 classes", "value": 2.0, "limit": 1.0, "met": False}
    text = markdown([race, size])
    assert "Slower than plain PyTorch in 1 of 1 rows" in text
    assert "Limits missed: 2" in text
    assert "**1.2 (<= 1)**" in text
    assert "**1.2**" in text
    assert "21 classes **2 (<= 1)**" in text


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_sizes_are_drawn(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_sizes, "SIZES", [100, 1000, 10**6])
    monkeypatch.setattr(bench_sizes, "free_bytes", lambda device: 10**6)
    picture = tmp_path / f"sizes.{suffix}"
    run("--rounds=3", "--device=cpu", f"--sizes={picture}", f"--output={tmp_path}")
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    assert [r["elements"] for r in results] == [[100, 1000]] * 4
    assert all(len(v) == 2 for r in results for v in r["nanoseconds"].values())
    assert picture.stat().st_size > 5000
    assert "1e+06 elements are left off" in capsys.readouterr().out


@pytest.mark.parametrize("options", [("--sizes=a.svg", "--loss=ce"), ("--write=a", "--loss=ce")])
def test_options_that_exclude_each_other(
    options: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run(*options)
    assert "loss" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--rows=[fokal]", "fokal"),
        ("--loss=dize", "dice"),
        ("--loss=giou+focal", "mixes kinds"),
        ("--device=tpu", "tpu"),
        ("--rounds=1", "at least 3"),
        ("--sizes=sizes.jpg", "svg"),
        ("--write=nowhere/BENCHMARKS.md", "nowhere"),
    ],
)
def test_mistakes_are_one_line(option: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        run(option)
    assert end.value.code == 2
    message = capsys.readouterr().err
    assert said in message
    assert len(message.splitlines()) == 1


def test_every_loss_on_the_engines_keeps_no_more_than_the_size_of_the_logits() -> None:
    for size in ROWS["kept"](CPU):
        assert size.limit is None or size.value <= size.limit, size
