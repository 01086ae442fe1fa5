"""The package is found wherever it lies, under one name, by Python and by type checkers."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from detseg_losses import _scripts
from typed import check_types

ROOT = Path(__file__).parent.parent
STUBS = ROOT / "detseg_losses" / "integrations"

USES = """\
from detseg_losses.integrations import ModelLosses, use_losses
from detseg_losses.integrations.coco import CocoDetection
import detseg_losses.integrations.voc as voc

metrics: voc.ConfusionMatrix = voc.ConfusionMatrix(3)
CocoDetection(3)  # wrong
ModelLosses(spec="ce")  # wrong
number: int = voc.ConfusionMatrix(3)  # wrong
"""


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone as Git makes it on Windows: where a symbolic link is committed, a text file."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("no Git here, or not a checkout")
    folder = tmp_path_factory.mktemp("clone") / "project"
    git = ["git", "-c", "core.symlinks=false", "clone", "--quiet", str(ROOT), str(folder)]
    subprocess.run(git, check=True)
    return folder


def python(code: str, checkout: Path, cwd: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process that finds a checkout by PYTHONPATH alone."""
    return subprocess.run(
        [sys.executable, "-c", code, *options],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(checkout)},
        capture_output=True,
        text=True,
    )


def test_python_finds_the_integrations_of_a_clone(clone: Path, tmp_path: Path) -> None:
    code = (
        "import pickle, detseg_losses.integrations as i, detseg_losses.integrations.samples as s\n"
        "assert pickle.loads(pickle.dumps(i.ModelLosses)) is i.ModelLosses\n"
        "print(i.__file__, s.__file__, s.Fault.__module__, sep='\\n')"
    )
    result = python(code, clone, tmp_path)
    assert result.stdout.splitlines() == [
        str(clone / "integrations" / "__init__.py"),
        str(clone / "integrations" / "samples.py"),
        "detseg_losses.integrations.samples",
    ], result.stderr


def test_mypy_finds_the_integrations_of_a_clone(clone: Path, tmp_path: Path) -> None:
    """With their types: it reports the lines that are wrong, and no others."""
    check_types(USES, tmp_path, clone, "ignore_missing_imports = true")


def test_each_module_has_its_stub() -> None:
    """With WRITE_STUBS=1 in the environment the stubs are written."""
    wanted = {}
    for file in sorted((ROOT / "integrations").rglob("*.py")):
        name = file.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
        stub = file.relative_to(ROOT / "integrations").with_suffix(".pyi")
        wanted[stub] = f"from {name.removesuffix('.__init__')} import *\n"
    if os.environ.get("WRITE_STUBS"):
        for file in STUBS.rglob("*.pyi"):
            file.unlink()
        for stub, text in wanted.items():
            (STUBS / stub).parent.mkdir(parents=True, exist_ok=True)
            (STUBS / stub).write_text(text)
    stubs = {file.relative_to(STUBS): file.read_text() for file in STUBS.rglob("*.pyi")}
    assert stubs == wanted, "WRITE_STUBS=1 pytest tests/test_packaging.py writes the stubs"


def test_the_folder_has_no_second_name(tmp_path: Path) -> None:
    result = python("import integrations.coco", ROOT, tmp_path)
    assert result.stderr.splitlines()[-1] == (
        "ImportError: import detseg_losses.integrations: two names make two of each class"
    )


def test_each_command_is_a_tool() -> None:
    scripts = re.findall(
        r'^detseg-(\S+) = "detseg_losses\._scripts:(\w+)"$',
        (ROOT / "pyproject.toml").read_text(),
        re.MULTILINE,
    )
    assert len(scripts) == 5
    for command, function in scripts:
        assert command.replace("-", "_") == function
        assert callable(getattr(_scripts, function))
        assert (ROOT / "tools" / f"{function}.py").exists()


def test_a_command_finds_the_configurations_from_any_folder(tmp_path: Path) -> None:
    code = "import sys; sys.argv[0] = 'detseg'; from detseg_losses._scripts import train_seg as t"
    options = ["--config=configs/seg/shapes.yaml", "--print_config"]
    result = python(f"{code}; t()", ROOT, tmp_path, *options)
    assert result.returncode == 0, result.stderr
    assert "format: shapes" in result.stdout
