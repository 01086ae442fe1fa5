"""How many kernels a compiled loss runs on a GPU, and what they read and write."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

PROGRAM = Path(__file__).with_name("inductor.py")
RELEASE = "2.14."

BUDGETS = {
    "focal": (5, 3.3),
    # 5 kernels are wanted. A sum of few rows takes two, of which the second joins parts. Only those
    # of TP and FN are one, for their sum is wanted too.
    "bce + dice": (7, 5.5),
    "ce + dice": (12, 7.0),
}
"""Kernels and traffic, at most; one test of all, for to compile takes a while in each process."""


@pytest.mark.skipif(
    not torch.__version__.startswith(RELEASE),
    reason=f"inductor.py is written for the internals of torch {RELEASE}*",
)
@pytest.mark.skipif(find_spec("triton") is None, reason="there is no Triton")
def test_kernels_and_traffic() -> None:
    result = subprocess.run([sys.executable, PROGRAM], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found.keys() == BUDGETS.keys()
    for name, (kernels, traffic) in BUDGETS.items():
        assert found[name][0] <= kernels, name
        assert found[name][1] <= traffic, name
