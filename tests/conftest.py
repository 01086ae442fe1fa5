"""Fixtures that several test files share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The directory of real data (coco128, VOCdevkit, bccd, camvid) named by DETSEG_DATA."""
    root = os.environ.get("DETSEG_DATA")
    if not root:
        pytest.skip("DETSEG_DATA does not name a directory of real data")
    return Path(root)


@pytest.fixture(params=["cpu", *["cuda"][: torch.cuda.device_count()]])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each device that there is."""
    return torch.device(request.param)
