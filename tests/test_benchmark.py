"""The benchmark: what it measures, and the tool."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import bench_losses
from common.bench_rows import ROWS
from common.benchmark import Memory, compare, kept_bytes, peak_bytes

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
    ratio = compare(lambda: time.sleep(0.004), lambda: time.sleep(0.02), 5, CPU)
    assert ratio.low <= ratio.mid <= ratio.high
    assert ratio.mid < 0.8
    assert ratio.ours < ratio.peer


def run(*options: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["bench_losses.py", *options])
        bench_losses.main()


def test_tool_measures_any_loss(tmp_path: Path) -> None:
    options = ["--shape=[1,5,32,32]", "--pairs=3", "--device=cpu", f"--output={tmp_path}"]
    subprocess.run([sys.executable, TOOL, "--loss=ce", *options], check=True)
    report = json.loads((tmp_path / "results.json").read_text())
    assert [r["against"] for r in report["results"][:2]] == ["a copy of the prediction", "torch"]
    assert all(r["low"] <= r["mid"] <= r["high"] for r in report["results"][:2])
    assert 0 < report["results"][2]["value"] <= 1.01  # there are a few sums as well
    assert (tmp_path / "ratios.png").stat().st_size > 1000
    table = (tmp_path / "results.md").read_text().splitlines()
    assert len(table) == 2 + len(report["results"])


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--rows=[fokal]", "fokal"),
        ("--loss=dize", "dice"),
        ("--loss=giou+focal", "mixes kinds"),
        ("--device=tpu", "tpu"),
        ("--pairs=1", "at least 3"),
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
