"""The processes of a run, and the folder that is theirs alone."""

from __future__ import annotations

import errno
import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path
from typing import TextIO, TypeVar, cast

from common.config import TrainingConfig
from common.errors import Interrupted, ReportedError, UsageError, writing
from common.signals import Signals

import torch.distributed
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
)
from lightning_fabric.utilities.exceptions import MisconfigurationException

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

T = TypeVar("T")
MAX_SEED = 2**63
RESULTS = ("last.ckpt", "best.ckpt", "metrics.csv")
"""Files that a run would overwrite."""


@contextmanager
def start(config: TrainingConfig) -> Iterator[tuple[Fabric, Path, Signals]]:
    """Launch the processes and claim the output folder, both until the end of the block.

    A folder that was made for the run and is still empty at the end is removed.

    Raises:
        UsageError: if the folder holds a run that is not to be resumed, belongs to a run that
            goes on or cannot be written, or the devices do not exist.
    """
    if config.seed >= MAX_SEED:
        raise UsageError(f"seed {config.seed} is too large: take one below 2**63")
    with Signals() as signals, ExitStack() as stack:
        fabric = _launch(config)
        output = agreed(fabric, lambda: stack.enter_context(_claimed(config)))
        try:
            yield fabric, output, signals
        except Interrupted as error:
            if not fabric.is_global_zero:
                sys.exit(128 + error.number)  # the first process has said it
            kept = "nothing was trained yet"
            if (output / "last.ckpt").exists():
                kept = f"go on with: {Path(sys.argv[0]).name} --output={output} --resume"
            raise Interrupted(error.number, f"{error}; {kept}") from None
        finally:
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()  # left to the interpreter it can hang


def agreed(fabric: Fabric, action: Callable[[], T]) -> T:
    """Let the first process act; return what it returns, or raise its UsageError, in each."""
    result: T | None = None
    error: UsageError | None = None
    if fabric.is_global_zero:
        try:
            result = action()
        except UsageError as caught:
            error = caught
    if fabric.world_size > 1:
        result, message = fabric.broadcast((result, error and str(error)))
        if message and not fabric.is_global_zero:
            raise ReportedError(message)
    if error is not None:
        raise error
    return cast(T, result)


def _launch(config: TrainingConfig) -> Fabric:
    devices, nodes, environment = _processes(config.train.devices)
    try:
        fabric = Fabric(
            devices=devices,
            num_nodes=nodes,
            precision=config.train.precision,
            plugins=environment,
        )
    except (MisconfigurationException, ValueError, RuntimeError) as error:
        raise UsageError(f"train.devices={devices} cannot be had here: {error}") from error
    fabric.launch()
    return fabric


def _processes(
    wanted: int | str,
) -> tuple[int | str, int, ClusterEnvironment | None]:
    """Devices of this node, number of nodes, and what tells the processes apart.

    Under ``torchrun`` and ``srun`` the number of processes is theirs: Fabric's own choice on a CPU
    would be one device for each, and runs that know nothing of each other.
    """
    if "WORLD_SIZE" in os.environ:
        world_size = _number("WORLD_SIZE")
        devices = _number("LOCAL_WORLD_SIZE", world_size)
        environment = (
            None if torch.distributed.is_torchelastic_launched() else LightningEnvironment()
        )
        return devices, world_size // devices, environment
    if _number("SLURM_NTASKS") > 1 and SLURMEnvironment.detect():
        return _slurm()
    # In an allocation of SLURM of a single task the processes are our own.
    return wanted, 1, LightningEnvironment() if "SLURM_NTASKS" in os.environ else None


def _number(variable: str, default: int = 1) -> int:
    """A number of processes or nodes in the environment.

    Raises:
        UsageError: if it is none.
    """
    text = os.environ.get(variable, str(default))
    if not (text.isascii() and text.isdigit()) or int(text) < 1:
        raise UsageError(f"{variable} in the environment is {text!r}, not a number of 1 or more")
    return int(text)


def _slurm() -> tuple[int, int, ClusterEnvironment]:
    tasks = _number("SLURM_NTASKS")
    if not {"SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID"} <= os.environ.keys():
        raise UsageError(
            f"SLURM has allocated {tasks} tasks, but this process is none of them: start it with "
            "srun or torchrun, or with SLURM_NTASKS=1 for a single process"
        )
    nodes = _number("SLURM_NNODES")
    each, rest = divmod(tasks, nodes)
    if rest:
        raise UsageError(f"SLURM has {tasks} tasks on {nodes} nodes: use --ntasks-per-node")
    os.environ.setdefault("SLURM_NTASKS_PER_NODE", str(each))  # Fabric asks for it
    return each, nodes, SLURMEnvironment()


@contextmanager
def _claimed(config: TrainingConfig) -> Iterator[Path]:
    """Choose the output folder, make it and lock it; remove it again where nothing was written."""
    made: list[Path] = []
    try:
        with writing(Path(config.output or "runs")):
            output = _make_folder(config, made)
        with _locked(output):
            if not config.resume and any((output / name).exists() for name in RESULTS):
                raise UsageError(
                    f"{output} holds a run: add --resume to go on, or name another folder"
                )
            yield output
    finally:
        for folder in reversed(made):
            if not any(folder.iterdir()):
                folder.rmdir()


def _make_folder(config: TrainingConfig, made: list[Path]) -> Path:
    """Make the output folder; append it and the parents that were made for it to ``made``."""
    if config.output is None:
        kind = "det" if config.task == "detection" else "seg"
        for number in count(1):
            output = Path(f"runs/{kind}-{number}")
            if _made(output, made):
                break
    else:
        output = Path(config.output)
        if output.exists() and not output.is_dir():
            raise UsageError(f"output {output} is a file, not a folder")
        _made(output, made)
    return output


def _made(folder: Path, made: list[Path]) -> bool:
    """Make a folder with its parents; say whether it is new, whoever else tries to make it."""
    if folder != folder.parent and not folder.parent.exists():
        _made(folder.parent, made)
    try:
        folder.mkdir()
    except FileExistsError:
        return False
    except ValueError as error:  # a NUL in the name
        raise UsageError(f"output {str(folder)!r}: {error}") from error
    made.append(folder)
    return True


@contextmanager
def _locked(output: Path) -> Iterator[None]:
    """Hold a lock that ends with this process, however that ends, and not with its children."""
    file = output / ".lock"
    with writing(file):
        stream = file.open("a+", encoding="utf-8")
    with stream:
        if not (
            _lock(stream)
            and file.exists()
            and os.path.samestat(os.fstat(stream.fileno()), file.stat())
        ):
            stream.seek(0)
            raise UsageError(
                f"{output} is in use by another run{stream.read()}: wait for its end, or name "
                "another folder"
            )
        with writing(file):
            stream.truncate(0)
            stream.write(f" (process {os.getpid()} on {socket.gethostname()})")
            stream.flush()
        try:
            yield
        finally:
            if sys.platform != "win32":  # where an open file cannot be removed
                file.unlink(missing_ok=True)


def in_use(output: Path) -> bool:
    """Whether a run goes on in this folder."""
    try:
        with (output / ".lock").open("r+", encoding="utf-8") as stream:
            return not _lock(stream)
    except FileNotFoundError:
        return False


def _lock(stream: TextIO) -> bool:
    """Lock an open file, or say that another process has; on a file system without locks go on."""
    try:
        if sys.platform == "win32":
            msvcrt.locking(stream.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EACCES, errno.EAGAIN, errno.EDEADLK)
    return True
