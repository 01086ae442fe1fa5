"""The commands that the package installs: each is the ``main`` of a script in ``tools``."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path


def _run(script: str) -> None:
    package = Path(__file__).resolve().parent
    inside, beside = package / "tools", package.parent / "tools"  # in a wheel, in a checkout
    sys.path[0] = str(inside if inside.is_dir() else beside)  # as when Python runs the script
    import_module(script).main()


def train_det() -> None:
    """Run ``tools/train_det.py``."""
    _run("train_det")


def eval_det() -> None:
    """Run ``tools/eval_det.py``."""
    _run("eval_det")


def train_seg() -> None:
    """Run ``tools/train_seg.py``."""
    _run("train_seg")


def eval_seg() -> None:
    """Run ``tools/eval_seg.py``."""
    _run("eval_seg")


def compare() -> None:
    """Run ``tools/compare.py``."""
    _run("compare")
