"""What a type checker says of a few lines of code."""

from __future__ import annotations

from pathlib import Path

import pytest


def check_types(code: str, folder: Path, found_in: Path, settings: str) -> None:
    """Assert that mypy reports the lines that end in ``# wrong``, and no others. Of torch it takes
    no notice.

    Args:
        code: the lines.
        folder: an empty folder.
        found_in: where the package is.
        settings: a line for mypy's configuration.
    """
    api = pytest.importorskip("mypy.api")
    file, config = folder / "code.py", folder / "mypy.ini"
    file.write_text(code)
    config.write_text(
        f"[mypy]\nmypy_path = {found_in}\nfollow_imports = silent\n{settings}\n"
        f"cache_dir = {folder / 'cache'}\n[mypy-torch.*]\nfollow_imports = skip\n"
    )
    found, problem, _ = api.run(["--config-file", str(config), str(file)])
    assert not problem
    errors = {int(line.split("code.py:")[1].split(":")[0]) for line in found.splitlines()[:-1]}
    lines = code.splitlines()
    assert errors == {n for n, line in enumerate(lines, 1) if line.endswith("# wrong")}, found
