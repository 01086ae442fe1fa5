"""Checkpoints: plain dicts of tensors and plain values, written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from common.errors import UsageError


def save_checkpoint(file: Path, content: dict[str, Any]) -> None:
    """Write ``content`` so that a process killed at any moment leaves the old or the new file."""
    unfinished = file.with_name(f"{file.name}.unfinished")
    torch.save(content, unfinished)
    os.replace(unfinished, file)


def load_tensors(file: Path) -> Any:
    """Return the content of a file of tensors and plain values, on the CPU.

    Raises:
        UsageError: if it cannot be read, or holds anything else (which is never executed).
    """
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, UnpicklingError, EOFError) as error:
        raise UsageError(f"{file} cannot be loaded: {str(error).splitlines()[0]}") from error


def load_checkpoint(file: Path, task: str) -> dict[str, Any]:
    """Return a checkpoint of these tools.

    Raises:
        UsageError: if there is none for this task.
    """
    if not file.is_file():
        raise UsageError(f"there is no checkpoint {file}")
    content = load_tensors(file)
    if not isinstance(content, dict) or not {"task", "config", "classes", "model"} <= {*content}:
        raise UsageError(f"{file} is no checkpoint of these tools; for weights use model.weights")
    if content["task"] != task:
        raise UsageError(f"{file} is a checkpoint for {content['task']}, not for {task}")
    return content
