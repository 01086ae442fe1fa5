"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


@contextmanager
def replacing(file: Path, mode: str = "wb", **options: Any) -> Iterator[IO[Any]]:
    """A stream for a new file, which takes the place of the old one when it is whole.

    Args:
        file: where it will be.
        mode: ``"w"`` or ``"wb"``.
        **options: of ``open``.
    """
    unfinished = file.with_name(f"{file.name}.unfinished")
    try:
        with unfinished.open(mode, **options) as stream:
            yield stream
        os.replace(unfinished, file)
    finally:
        unfinished.unlink(missing_ok=True)
