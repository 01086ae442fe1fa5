"""Runs that end before their end, and files that are not what they were: nothing is lost."""

from __future__ import annotations

import contextlib
import csv
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import eval_seg
import train_det
import train_seg
from common import checkpoint as checkpoints
from common import launch, report
from common.checkpoint import load_checkpoint, save_checkpoint
from common.data import TrainingImages
from common.errors import Interrupted, UsageError, usage_errors
from common.metrics_log import MetricsLog, read_metrics
from common.shapes import make_shapes
from common.signals import Signals
from detseg_losses.integrations.samples import DataError, Fault

TOOLS = Path(train_det.__file__).parent
MAINS = {"train_det": train_det, "train_seg": train_seg}
STARTED = {**MAINS, "eval_seg": eval_seg}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options of a run of 8 steps in a second."""
    data = make_shapes(tmp_path_factory.mktemp("data"), number=16, validation=4, size=64)
    return [
        *("--data.format=coco", f"--data.root={data}", "--data.size=64", "--data.crop=32"),
        *("--train.epochs=2", "--train.eval_every=1", "--train.batch_size=4"),
        "--train.log_every=1",
    ]


@pytest.fixture(scope="module")
def whole(small: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was not interrupted."""
    output = tmp_path_factory.mktemp("runs") / "whole"
    run("train_seg", *small, f"--output={output}")
    return output


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    """A copy of that run."""
    output = tmp_path / "copy"
    output.mkdir()
    for name in ("last.ckpt", "best.ckpt", "metrics.csv"):
        (output / name).write_bytes((whole / name).read_bytes())
    return output


def run(tool: str, *options: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{tool}.py", *options])
        STARTED[tool].main()


def refused(capfd: pytest.CaptureFixture[str], tool: str, *options: str, code: int = 2) -> str:
    """The one line that a tool ends with."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as end:
        run(tool, *options)
    error = capfd.readouterr().err
    assert end.value.code == code, error
    assert "Traceback" not in error
    said = [line for line in error.splitlines() if line.startswith(f"{tool}.py: ")]
    assert len(said) == 1, error
    assert error.endswith(said[0] + "\n")
    return said[0]


def steps(output: Path) -> list[dict[str, str]]:
    with (output / "metrics.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def load(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(file, weights_only=True)
    return content


def assert_same_run(one: Path, other: Path) -> None:
    first, second = load(one / "last.ckpt"), load(other / "last.ckpt")
    assert first["step"] == second["step"]
    assert first["best"] == second["best"]
    for name, tensor in first["model"].items():
        assert torch.equal(tensor, second["model"][name]), name
    assert steps(one) == steps(other)


def names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


# Signals


def send_when(
    patch: pytest.MonkeyPatch, number: int, step: int, column: str, *, workers: bool
) -> None:
    """Send a signal when a row with this column is written after this step."""
    write = MetricsLog.write

    def and_send(self: MetricsLog, at: int, values: dict[str, Any]) -> None:
        write(self, at, values)
        if at == step and column in values:
            for worker in multiprocessing.active_children() if workers else []:
                os.kill(worker.pid or 0, number)
            os.kill(os.getpid(), number)

    patch.setattr(MetricsLog, "write", and_send)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["int", "term"]
)
@pytest.mark.parametrize("workers", [0, 1])
def test_a_signal_ends_a_run_after_its_step(
    number: int,
    code: int,
    workers: int,
    small: list[str],
    whole: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        send_when(patch, number, 3, "loss", workers=True)
        options = [*small, f"--output={output}", f"--data.workers={workers}"]
        said = refused(capfd, "train_seg", *options, code=code)
    assert "step 3 of 8" in said
    assert f"train_seg.py --output={output} --resume" in said
    assert load(output / "last.ckpt")["step"] == 3
    assert not [name for name in names(output) if name in (".lock", "last.ckpt.unfinished")]
    run("train_seg", f"--output={output}", "--resume")
    assert_same_run(whole, output)


def test_a_signal_ends_an_evaluation_which_is_made_when_the_run_goes_on(
    small: list[str], whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        evaluate = train_seg.evaluate_segmenter

        def and_send(*args: Any) -> Any:
            os.kill(os.getpid(), signal.SIGINT)
            return evaluate(*args)

        patch.setattr(train_seg, "evaluate_segmenter", and_send)
        said = refused(capfd, "train_seg", *small, f"--output={output}", code=130)
    assert "--resume" in said
    assert load(output / "last.ckpt")["step"] == 4
    assert "best.ckpt" not in names(output)
    run("train_seg", f"--output={output}", "--resume")
    assert_same_run(whole, output)


def test_a_signal_before_training_leaves_nothing(
    small: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_seg, "load_data", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        said = refused(capfd, "train_seg", *small, f"--output={tmp_path / 'a/b'}", code=143)
    assert "nothing was trained" in said
    assert not names(tmp_path)


def test_only_a_second_ctrl_c_cuts_a_step_short(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    done = []
    with Signals() as signals:
        with pytest.raises(Interrupted), signals.deferred():  # noqa: PT012
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)  # what the launcher passes on
            clock[0] = 5
            signal.raise_signal(signal.SIGTERM)
            done.append("first")
        with pytest.raises(Interrupted), signals.deferred():  # noqa: PT012
            signal.raise_signal(signal.SIGINT)
            clock[0] = 10
            signal.raise_signal(signal.SIGINT)
            done.append("second")
    assert done == ["first"]


def test_a_group_of_processes_is_interrupted_as_one(small: list[str], tmp_path: Path) -> None:
    """As a terminal does it: each worker gets the signal as well, in training and evaluation."""
    output = tmp_path / "run"
    options = [*small, "--train.epochs=400", "--data.workers=2", f"--output={output}"]
    process = start_apart("train_seg", *options)
    wait_for(lambda: (output / "best.ckpt").exists(), process)
    os.killpg(process.pid, signal.SIGINT)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 130, error
    assert "Traceback" not in error
    assert error.splitlines()[-1].startswith("train_seg.py: interrupted")
    assert load(output / "last.ckpt")["step"] >= 4
    assert ".lock" not in names(output)


def start_apart(tool: str, *options: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(TOOLS / f"{tool}.py"), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_two_processes_stop_after_the_same_step(small: list[str], tmp_path: Path) -> None:
    output = tmp_path / "run"
    options = [*small, "--train.epochs=400", "--train.devices=2", f"--output={output}"]
    process = start_apart("train_seg", *options)
    wait_for(lambda: (output / "best.ckpt").exists(), process)
    process.send_signal(signal.SIGTERM)  # to the first process alone
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 143, error
    assert "Traceback" not in error
    assert [line for line in error.splitlines() if "interrupted" in line] == [
        error.splitlines()[-1]
    ]
    assert load(output / "last.ckpt")["step"] == len([row for row in steps(output) if row["loss"]])


# Workers


def test_a_killed_worker_is_one_line_and_costs_nothing(
    small: list[str], whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        send_when_killed = MetricsLog.write

        def and_kill(self: MetricsLog, at: int, values: dict[str, Any]) -> None:
            send_when_killed(self, at, values)
            if at == 3:
                for worker in multiprocessing.active_children():
                    worker.kill()
                    worker.join()

        patch.setattr(MetricsLog, "write", and_kill)
        options = [*small, "--data.workers=1", f"--output={output}"]
        said = refused(capfd, "train_seg", *options)
    assert "data.workers" in said
    assert "--resume" in said
    run("train_seg", f"--output={output}", "--resume")
    assert_same_run(whole, output)


def test_an_error_in_a_worker_is_its_message_alone(
    small: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def broken(self: TrainingImages, key: tuple[int, int]) -> None:
        try:
            raise OSError("inner")
        except OSError as error:
            raise DataError("x.png: image file is truncated\nsecond line") from error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingImages, "__getitem__", broken)
        options = [*small, "--data.workers=1", f"--output={tmp_path / 'run'}"]
        said = refused(capfd, "train_seg", *options)
    assert said == "train_seg.py: error: x.png: image file is truncated second line"


@pytest.mark.parametrize("workers", [0, 1])
def test_each_skipped_image_is_said_once(
    workers: int, small: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from common import engine

    def and_faults(items: list[Any]) -> dict[str, Any]:
        fault = Fault(Path("x.png"), None, "cannot be decoded")
        return {**collate(items), "faults": [fault, fault]}

    collate = engine.collate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "collate", and_faults)
        run("train_seg", *small, f"--data.workers={workers}", f"--output={tmp_path / 'run'}")
    said = capfd.readouterr().out
    assert said.count("x.png: cannot be decoded") == 1
    assert "1 faulty image" in said


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError(), "batch size"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "batch size"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: tried 8 bytes"), "batch size"),
        (RuntimeError("DataLoader worker (pid(s) 7, 8) exited unexpectedly"), "data.workers"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. "), "/dev/shm"),
        (KeyboardInterrupt(), "interrupted"),
    ],
)
def test_what_a_machine_lacks_is_one_line(
    error: BaseException, words: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit), usage_errors():
        raise error
    said = capfd.readouterr().err
    assert said.count("\n") == 1
    assert words in said


@pytest.mark.parametrize(
    "options",
    [["--train.batch_size=1"], ["--train.batch_size=2", "--train.accumulate=2"]],
    ids=["one image", "one image at a time"],
)
def test_batch_norm_on_one_pixel_is_one_line(
    options: list[str], small: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = ["--model.name=DeepLabV3Plus", "--model.encoder=resnet18"]
    said = refused(capfd, "train_seg", *small, *model, *options, f"--output={tmp_path / 'run'}")
    assert options[0].lstrip("-") in said
    assert "raise train.batch_size" in said


def test_an_error_of_the_tools_stays_a_traceback() -> None:
    with pytest.raises(RuntimeError, match="shapes"), usage_errors():
        raise RuntimeError("shapes cannot be multiplied")


# What is not finite


def finite(file: Path) -> bool:
    return checkpoints.first_not_finite(load(file)) is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--train.lr=1e30"], ["the loss of step 2 is not finite", "train.lr (1e+30)", "images "]),
        (["--train.lr=1e38", "--train.epochs=1", "--train.batch_size=16"], ["after step 1", "lr"]),
        (["--train.lr=1e30", "--train.log_every=100"], ["step 2", "images "]),
        (["--train.lr=1e30", "--train.optimizer=sgd", "--train.clip=0"], ["not finite", "lr"]),
    ],
    ids=["loss", "weights", "unlogged", "sgd"],
)
def test_what_is_not_finite_is_never_saved(
    options: list[str],
    words: list[str],
    small: list[str],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    schedule = ["--train.schedule=constant", "--train.checkpoint_every=1"]
    said = refused(capfd, "train_seg", *small, *schedule, *options, f"--output={tmp_path}")
    for word in words:
        assert word in said
    assert "last.ckpt of step" in said
    assert finite(tmp_path / "last.ckpt")
    assert "best.ckpt" not in names(tmp_path)


def test_the_first_step_is_not_blamed_on_the_learning_rate(
    small: list[str], whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    state = {name: 1e38 * value for name, value in load(whole / "last.ckpt")["model"].items()}
    torch.save({n: v.nan_to_num() for n, v in state.items()}, tmp_path / "huge.pth")
    weights = f"--model.weights={tmp_path / 'huge.pth'}"
    said = refused(capfd, "train_seg", *small, weights, f"--output={tmp_path / 'run'}")
    assert "of step 1 is not finite" in said
    assert "data.std" in said
    assert "lower train.lr" not in said


def test_weights_that_are_not_finite_are_refused(
    small: list[str], whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    state = load(whole / "last.ckpt")["model"]
    name = next(iter(state))
    state[name].view(-1)[3] = float("nan")
    torch.save(state, tmp_path / "nan.pth")
    weights = f"--model.weights={tmp_path / 'nan.pth'}"
    said = refused(capfd, "train_seg", *small, weights, f"--output={tmp_path / 'run'}")
    assert "nan.pth" in said
    assert name in said


# Files of a run


def edit(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def write(file: Path) -> None:
        content = load(file)
        replaced = change(content)
        torch.save(content if replaced is None else replaced, file)

    return write


def drop(key: str) -> Callable[[Path], None]:
    return edit(lambda content: {k: v for k, v in content.items() if k != key})


def put(key: str, value: Any) -> Callable[[Path], None]:
    return edit(lambda content: content.update({key: value}))


def make_zip(file: Path) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.txt", "x")


def make_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def make_fifo(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[60:80] = b"x" * 20
    file.write_bytes(content)


class Stranger:
    """An object that a checkpoint must not hold."""


FOREIGN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "empty": (lambda file: file.write_bytes(b""), "is empty"),
    "text": (lambda file: file.write_text("hello"), "not a file that torch.save wrote"),
    "bytes": (lambda file: file.write_bytes(bytes(range(256))), "not a file that torch.save wrote"),
    "cut": (cut, "damaged or cut off"),
    "flipped": (flip, "damaged"),
    "short": (lambda file: os.truncate(file, 40), "damaged or cut off"),
    "zip": (make_zip, "zip archive"),
    "folder": (make_folder, "not a file"),
    "fifo": (make_fifo, "not a file"),
    "object": (lambda file: torch.save({"model": Stranger()}, file), "Stranger"),
    "code": (lambda file: torch.save({"model": os.system}, file), "only tensors and plain values"),
    "missing": (lambda file: file.unlink(), "last.ckpt"),
}
LISTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "pickle": (lambda file: file.write_bytes(pickle.dumps([1, 2], 2)), ""),
    "list": (lambda file: torch.save([1, 2], file), ""),
    "number": (lambda file: torch.save(7, file), ""),
    "keys": (lambda file: torch.save({1: torch.ones(2)}, file), ""),
    "tensor": (lambda file: torch.save(torch.ones(2), file), ""),
    "no dict": (lambda file: torch.save({"model": [1], "state_dict": None}, file), ""),
    "only batches": (
        lambda file: torch.save({"x.num_batches_tracked": torch.tensor(1)}, file),
        "",
    ),
}
DAMAGED: dict[str, tuple[Callable[[Path], Any], str]] = {
    **{f"no {key}": (drop(key), key) for key in ("step", "best", "optimizer", "precision")},
    "no model": (drop("model"), "no checkpoint of these tools"),
    "step text": (put("step", "3"), "'step'"),
    "step negative": (put("step", -1), "'step'"),
    "step true": (put("step", True), "'step'"),
    "classes": (put("classes", [1, 2]), "'classes'"),
    "other classes": (put("classes", ["cat"]), "other classes"),
    "config": (put("config", []), "'config'"),
    "config empty": (put("config", {}), "'config'"),
    "model list": (put("model", []), "'model'"),
    "model empty": (put("model", {}), "does not fit"),
    "model text": (put("model", {"a": "b"}), "'model'"),
    "model keys": (put("model", {1: torch.ones(1)}), "'model'"),
    "model shapes": (
        edit(
            lambda c: c["model"].update(
                {k: v[:1, :1] for k, v in c["model"].items() if v.dim() > 1}
            )
        ),
        "does not fit",
    ),
    "model nan": (
        edit(lambda c: [v.fill_(float("nan")) for v in c["model"].values() if v.dim()] and None),
        "NaN",
    ),
    "optimizer empty": (put("optimizer", {}), "does not fit"),
    "optimizer text": (put("optimizer", "adam"), "'optimizer'"),
    "optimizer shapes": (
        edit(lambda c: c["optimizer"]["state"][0].update(exp_avg=torch.ones(2))),
        "exp_avg",
    ),
    "optimizer moments": (
        edit(lambda c: c["optimizer"]["state"].update({0: {"step": torch.tensor(1.0)}})),
        "keeps",
    ),
    "optimizer moment": (
        edit(lambda c: c["optimizer"]["state"][0].update(exp_avg=torch.ones(()))),
        "exp_avg",
    ),
    "optimizer step": (edit(lambda c: c["optimizer"]["state"][0].update(step="3")), "does not fit"),
    "best nan": (put("best", float("nan")), "'best'"),
    "optimizer list": (put("optimizer", {"state": [], "param_groups": 3}), "does not fit"),
    "loss": (put("loss", {"weight": torch.ones(1)}), "does not fit"),
    "loss list": (put("loss", []), "'loss'"),
    "precision": (put("precision", []), "'precision'"),
    "metrics": (put("metrics", [1]), "'metrics'"),
    "task": (put("task", "detection"), "detection"),
    "task list": (put("task", []), "'task'"),
}


@pytest.mark.parametrize("case", [*FOREIGN, *LISTS, *DAMAGED])
def test_a_damaged_checkpoint_is_one_line_that_offers_the_best(
    case: str, copy: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    damage, words = (FOREIGN | LISTS | DAMAGED)[case]
    damage(copy / "last.ckpt")
    before = {
        name: (copy / name).read_bytes()
        for name in ("last.ckpt", "best.ckpt", "metrics.csv")
        if (copy / name).is_file()
    }
    said = refused(capfd, "train_seg", "--resume", f"--output={copy}")
    assert "last.ckpt" in said or "copy" in said
    assert words in said
    assert "weights_only" not in said
    if case in FOREIGN or case in LISTS:
        assert "best.ckpt, of step " in said
    for name, content in before.items():
        assert (copy / name).read_bytes() == content


@pytest.mark.parametrize("case", ["missing", "short"])
def test_an_evaluation_is_told_to_name_the_best(
    case: str, copy: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    FOREIGN[case][0](copy / "last.ckpt")
    said = refused(capfd, "eval_seg", f"--checkpoint={copy / 'last.ckpt'}")
    assert "best.ckpt, of step " in said
    assert "is whole: name best.ckpt instead" in said
    assert "go on from there" not in said


@pytest.mark.parametrize("case", ["model empty", "model shapes"])
def test_weights_that_do_not_fit_are_one_line(
    case: str, copy: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    damage, words = DAMAGED[case]
    damage(copy / "best.ckpt")
    fault = f"the model of {copy / 'best.ckpt'} {words}"
    assert fault in refused(capfd, "eval_seg", f"--checkpoint={copy / 'best.ckpt'}")
    # a finished run, in which no epoch is better, shows what is in it
    assert fault in refused(capfd, "train_seg", "--resume", f"--output={copy}")


def test_the_offered_checkpoint_goes_on_to_the_same_end(
    copy: Path, whole: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (copy / "last.ckpt").write_bytes((copy / "best.ckpt").read_bytes())
    run("train_seg", "--resume", f"--output={copy}")
    assert_same_run(whole, copy)


@pytest.mark.parametrize("case", [*FOREIGN, *LISTS])
def test_foreign_weights_are_one_line(
    case: str, small: list[str], copy: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    damage, words = (FOREIGN | LISTS)[case]
    file = copy / "last.ckpt"
    damage(file)
    output = copy / "run"
    options = [*small, f"--model.weights={file}", f"--output={output}"]
    for tool in MAINS:
        said = refused(capfd, tool, *options)
        assert str(file) in said
        assert words in said
        assert "weights_only" not in said
        assert not output.exists()


def test_a_checkpoint_is_on_the_disk_before_it_takes_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: done.append("fsync") or fsync(file))
    monkeypatch.setattr(os, "replace", lambda a, b: done.append("replace") or replace(a, b))
    save_checkpoint(tmp_path / "last.ckpt", {"a": torch.ones(2)})
    assert done == ["fsync", "replace", "fsync"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("name", ["last.ckpt", "best.ckpt", "metrics.csv"])
def test_a_full_disk_is_one_line_and_keeps_the_checkpoint(
    name: str, small: list[str], copy: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = (copy / "last.ckpt").read_bytes()
    (copy / f"{name}.unfinished").symlink_to("/dev/full")
    options = ["--resume", f"--output={copy}", "--train.epochs=3"]
    said = refused(capfd, "train_seg", *options)
    assert "No space left on device" in said
    if name != "best.ckpt":
        assert (copy / "last.ckpt").read_bytes() == before
    assert load(copy / "last.ckpt")["step"] >= 8
    assert not list(copy.glob("*.unfinished"))


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("file", "is a file"),
        ("file/run", "file"),
        ("/proc/run", "/proc/run"),
        ("x" * 300, "cannot be written"),
        ("/dev/full", "is a file"),
    ],
)
def test_an_output_that_cannot_be_written_is_one_line(
    output: str,
    words: str,
    small: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    assert words in refused(capfd, "train_seg", *small, f"--output={output}")
    assert names(tmp_path) == {"file"}
    assert (tmp_path / "file").read_text() == "mine"


def test_a_read_only_folder_is_one_line(
    small: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.MonkeyPatch.context() as patch:  # root may write everywhere

        def refuse(self: Path, *_: Any, **__: Any) -> Any:
            raise PermissionError(13, "Permission denied", str(self))

        patch.setattr(Path, "mkdir", refuse)
        said = refused(capfd, "train_seg", *small, f"--output={tmp_path / 'run'}")
    assert f"{tmp_path / 'run'} cannot be written: Permission denied" in said


DAMAGED_METRICS: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda content: content[:-20],
    "text": lambda content: b"hello\n",
    "bytes": lambda content: bytes(range(256)),
    "empty": lambda content: b"",
    "header": lambda content: content.partition(b"\n")[2],
    "note": lambda content: content.replace(b"\n", b",note\n", 1),
    "column": lambda content: content.replace(b"step,", b"", 1),
    "cell": lambda content: content.replace(b"\r\n1,", b"\r\none,", 1),
    "long": lambda content: content + b'"' + b"9" * 200_000,
}


@pytest.mark.parametrize("case", DAMAGED_METRICS)
def test_damaged_metrics_are_kept_and_the_run_goes_on(
    case: str, copy: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    damaged = DAMAGED_METRICS[case]((copy / "metrics.csv").read_bytes())
    (copy / "metrics.csv").write_bytes(damaged)
    run("train_seg", "--resume", f"--output={copy}", "--train.epochs=3")
    assert "metrics.csv was damaged" in capfd.readouterr().out
    assert (copy / "metrics-damaged-1.csv").read_bytes() == damaged
    assert read_metrics(copy / "metrics.csv")[1]
    assert [row["step"] for row in steps(copy) if row["loss"]][-4:] == ["9", "10", "11", "12"]
    assert (copy / "curves.png").exists()


def test_missing_metrics_begin_again(copy: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (copy / "metrics.csv").unlink()
    run("train_seg", "--resume", f"--output={copy}", "--train.epochs=3")
    assert "metrics.csv is missing" in capfd.readouterr().out
    assert [row["step"] for row in steps(copy) if row["loss"]] == ["9", "10", "11", "12"]


@pytest.mark.parametrize("name", ["last.ckpt", "best.ckpt", "metrics.csv"])
def test_no_result_of_an_earlier_run_is_overwritten(
    name: str, small: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_text("mine")
    said = refused(capfd, "train_seg", *small, f"--output={tmp_path}")
    assert "holds a run" in said
    assert names(tmp_path) == {name}


def test_a_run_goes_on_with_another_loss(
    copy: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[float] = []
    drawn: dict[str, Any] = {}
    axvline = report.Axes.axvline
    set_title = report.Axes.set_title
    monkeypatch.setattr(
        report.Axes, "axvline", lambda self, x, **o: lines.append(x) or axvline(self, x, **o)
    )

    def and_keep(self: Any, title: str, **options: Any) -> Any:
        drawn[title] = [line.get_ydata() for line in self.lines]
        return set_title(self, title, **options)

    monkeypatch.setattr(report.Axes, "set_title", and_keep)
    run("train_seg", "--resume", "--loss=ce+focal", "--train.epochs=3", f"--output={copy}")
    assert "after step 8 the loss is 'ce+focal', no longer 'ce+dice'" in capfd.readouterr().out
    logged = [row for row in steps(copy) if row["loss"]]
    assert [bool(row["dice"]) for row in logged] == [True] * 8 + [False] * 4
    assert [bool(row["focal"]) for row in logged] == [False] * 8 + [True] * 4
    assert set(lines) == {8.5}
    assert [drawn["dice"][0][i] == drawn["dice"][0][i] for i in (7, 8)] == [True, False]
    assert [drawn["focal"][1][i] == drawn["focal"][1][i] for i in (7, 8)] == [False, True]


# Processes and folders


@contextlib.contextmanager
def holder(output: str | None, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that has claimed a folder."""
    code = (
        "import sys; from common.config import SegmentationConfig; from common import launch\n"
        f"with launch._claimed(SegmentationConfig(output={output!r}, resume=True)) as chosen:\n"
        "    print(chosen, flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": f"{TOOLS}{os.pathsep}{TOOLS.parent}"},
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_folder_belongs_to_one_run_until_its_process_is_dead(
    copy: Path, whole: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with holder(str(copy), copy) as process:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == str(copy)
        said = refused(capfd, "train_seg", "--resume", f"--output={copy}")
        assert f"{copy} is in use by another run (process {process.pid} on " in said
        process.kill()
        process.wait()
        assert (copy / ".lock").exists()
        run("train_seg", "--resume", f"--output={copy}")
    assert not (copy / ".lock").exists()
    assert_same_run(whole, copy)


def test_two_runs_that_start_at_once_take_two_folders(tmp_path: Path) -> None:
    with holder(None, tmp_path) as one, holder(None, tmp_path) as other:
        chosen = {p.stdout.readline().strip() for p in (one, other) if p.stdout is not None}
    assert chosen == {"runs/seg-1", "runs/seg-2"}


def test_a_new_folder_is_made_by_one_alone(tmp_path: Path) -> None:
    barrier = threading.Barrier(8)
    made: list[bool] = []

    def make() -> None:
        barrier.wait()
        made.append(launch._made(tmp_path / "run", []))

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(made) == [False] * 7 + [True]


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--train.devices=0", "train.devices"),
        ("--train.devices=-1", "train.devices"),
        ("--train.devices=100000", "train.devices 100000 is more than"),
        (f"--seed={2**70}", "seed"),
    ],
)
def test_devices_and_seeds_that_do_not_exist_are_one_line(
    option: str,
    words: str,
    small: list[str],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert words in refused(capfd, "train_det", *small, option, f"--output={tmp_path / 'run'}")
    assert not names(tmp_path)


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"SLURM_NTASKS": "2"}, "srun"),
        ({"SLURM_NTASKS": "x"}, "SLURM_NTASKS in the environment is 'x'"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE in the environment is ''"),
        ({"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE in the environment"),
        ({"SLURM_NTASKS": "3", "SLURM_NNODES": "2"}, "ntasks-per-node"),
    ],
)
def test_slurm_without_srun_is_one_line(
    variables: dict[str, str],
    words: str,
    small: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if "SLURM_NNODES" in variables:
        for name in ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID"):
            monkeypatch.setenv(name, "0")
    assert words in refused(capfd, "train_seg", *small, f"--output={tmp_path / 'run'}")
    assert not names(tmp_path)


def test_an_allocation_of_one_task_is_a_run_of_one_process(
    small: list[str], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "1")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    run("train_seg", *small, f"--output={tmp_path / 'run'}")
    assert_same_run(whole, tmp_path / "run")


def test_the_tasks_of_srun_are_one_run(small: list[str], tmp_path: Path) -> None:
    def start(rank: int) -> subprocess.Popen[str]:
        variables = {"NTASKS": "2", "NNODES": "1", "NODEID": "0", "JOB_ID": f"{os.getpid()}"}
        variables |= {"PROCID": str(rank), "LOCALID": str(rank), "NODELIST": "127.0.0.1"}
        environment = {f"SLURM_{name}": value for name, value in variables.items()}
        return start_apart("train_seg", *small, f"--output={tmp_path / 'run'}", **environment)

    processes = [start(rank) for rank in range(2)]
    said = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert [len(out) > 0 for out, _ in said] == [True, False]
    assert len([row for row in steps(tmp_path / "run") if row["loss"]]) == 8


def test_load_checkpoint_names_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no checkpoint"):
        load_checkpoint(tmp_path / "last.ckpt", "segmentation")
