"""Checkpoints: plain dicts of tensors and plain values, written whole or not at all."""

from __future__ import annotations

import errno
import os
import re
import sys
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from common.errors import UsageError, writing
from common.files import replacing

import torch
from torch import Tensor, nn

_KINDS: dict[str, type | tuple[type, ...]] = {
    "task": str,
    "config": dict,
    "classes": list,
    "step": int,
    "best": (float, int),
    "model": dict,
    "optimizer": dict,
    "precision": dict,
    "metrics": (dict, type(None)),
}
"""What every checkpoint of these tools has."""


def save_checkpoint(file: Path, content: dict[str, Any]) -> None:
    """Write ``content`` so that whatever happens at any moment leaves the old or the new file.

    Raises:
        UsageError: if it cannot be written, as on a full disk; the old file is kept.
    """
    with writing(file):
        with replacing(file) as stream:
            _serialize(content, stream)
            stream.flush()
            os.fsync(stream.fileno())  # or a power cut could leave an empty file by this name
        _sync_folder(file.parent)


def _serialize(content: dict[str, Any], stream: Any) -> None:
    try:
        torch.save(content, stream)
    except RuntimeError as error:  # torch's writer can hide the error of the file
        cause = error.__context__
        raise cause if isinstance(cause, OSError) else OSError(str(error)) from error


def _sync_folder(folder: Path) -> None:
    if sys.platform != "win32":  # where a folder cannot be opened
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def load_tensors(file: Path) -> Any:
    """Return the content of a file of tensors and plain values, on the CPU.

    Raises:
        UsageError: if it cannot be read, or holds anything else (which is never executed).
    """
    if not file.is_file():
        raise UsageError(f"{file} is {'not a file' if file.exists() else 'missing'}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an error says it better
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # on a foreign file the unpickler can raise any
        raise UsageError(f"{file} cannot be loaded: {_why_not_loaded(file, error)}") from error


def _why_not_loaded(file: Path, error: Exception) -> str:
    """The reason in our words: torch's advise to load the file unsafely."""
    if isinstance(error, OSError) and error.errno != errno.EINVAL:  # that is a seek beyond the end
        return error.strerror or str(error)
    if file.stat().st_size == 0:
        return "it is empty"
    foreign = re.search(r"GLOBAL (\S+)", str(error))
    if isinstance(error, UnpicklingError) and foreign:
        return (
            f"it holds a {foreign[1]}, and only tensors and plain values are loaded, for anything "
            "else could run code; save the state_dict of the model alone"
        )
    if "TorchScript" in str(error):
        return "it is a TorchScript program; save the state_dict of the model"
    if zipfile.is_zipfile(file):
        return "it is a zip archive, but not one that torch.save wrote, or it is damaged"
    with file.open("rb") as stream:
        if stream.read(4) == b"PK\x03\x04":
            return "it is damaged or cut off"
    return "it is not a file that torch.save wrote, or it is damaged"


def load_checkpoint(file: Path, task: str, remedy: str | None = None) -> dict[str, Any]:
    """Return a checkpoint of these tools.

    Raises:
        UsageError: if there is none for this task. Where ``file`` is damaged and best.ckpt beside
            it is not, the message offers that: by ``remedy``, or as a copy to resume from.
    """
    try:
        return _read(file, task)
    except UsageError as error:
        best = file.with_name("best.ckpt")
        try:
            step = _read(best, task)["step"]
        except UsageError:
            raise error from None
        if best == file:
            raise
        remedy = remedy or f"copy it to {file.name} to go on from there"
        raise UsageError(f"{error}; {best}, of step {step}, is whole: {remedy}") from error


def _read(file: Path, task: str) -> dict[str, Any]:
    if not file.exists():
        raise UsageError(f"there is no checkpoint {file}")
    content = load_tensors(file)
    if not isinstance(content, dict) or not {"task", "config", "classes", "model"} <= {*content}:
        raise UsageError(f"{file} is no checkpoint of these tools; for weights use model.weights")
    for fault in _faults(content):
        raise UsageError(f"{file} is a damaged checkpoint: {fault}")
    if content["task"] != task:
        raise UsageError(f"{file} is a checkpoint for {content['task']}, not for {task}")
    return content


def _faults(content: dict[str, Any]) -> Iterator[str]:
    for key, kind in _KINDS.items():
        if key not in content:
            yield f"it has no {key!r}"
        elif not isinstance(content[key], kind) or isinstance(content[key], bool):
            yield f"{key!r} is of the type {type(content[key]).__name__}"
    for key, kind in {"loss": str, "data": dict, "model": dict, "train": dict}.items():
        if not isinstance(content["config"].get(key), kind):
            yield f"'config' has no {key!r}"
    if not isinstance(content.get("loss", {}), dict):
        yield "'loss' is not a dict"
    if content["step"] < 0:
        yield f"'step' is {content['step']}"
    if content["best"] != content["best"]:
        yield "'best' is NaN"
    if not all(isinstance(name, str) for name in content["classes"]):
        yield "'classes' are not names"
    for name, value in content["model"].items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            yield f"{name!r} of 'model' is of the type {type(value).__name__}"
    if (name := first_not_finite(content["model"])) is not None:
        yield f"NaN or infinity in {name} of 'model'"


def load_state(module: nn.Module | Any, state: Mapping[str, Any], origin: str) -> None:
    """Let ``module``, or an optimizer, take over a ``state_dict``.

    Raises:
        UsageError: if it does not fit, which begins with ``origin``.
    """
    try:
        module.load_state_dict(state)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise UsageError(f"{origin} does not fit: {_short(error)}") from error


def _short(error: Exception) -> str:
    """An error that lists every tensor of a model, cut to its beginning."""
    words = " ".join(str(error).split())
    return words if len(words) <= 300 else f"{words[:300]} ..."


def first_not_finite(state: Any, name: str = "") -> str | None:
    """The name of the first tensor in nested dicts and lists that holds NaN or infinity.

    The device is waited for once.
    """
    found = dict(_floats(state, name))
    if not found:
        return None
    device = next(iter(found.values())).device
    finite = torch.stack([tensor.isfinite().all().to(device) for tensor in found.values()])
    return next(
        (name for name, whole in zip(found, finite.tolist(), strict=True) if not whole), None
    )


def _floats(state: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(state, Tensor):
        if state.is_floating_point():
            yield name, state
    elif isinstance(state, Mapping):
        for key, value in state.items():
            yield from _floats(value, f"{name}.{key}" if name else str(key))
    elif isinstance(state, (list, tuple)):
        for key, value in enumerate(state):
            yield from _floats(value, f"{name}.{key}")
