"""The pages of the documentation run, are linked, and leave no adapter out."""

import ast
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from detseg_losses.integrations import ADAPTERS

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
INDEX = DOCS / "README.md"
PAGES = sorted(page.name for page in DOCS.glob("*.md"))
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "NO_ALBUMENTATIONS_UPDATE": "1",
    "YOLO_AUTOINSTALL": "false",
    "YOLO_OFFLINE": "true",
}


def python_of(page: str) -> str:
    """The Python of a page, each line at the number that it has in the page."""
    lines, inside = [], False
    for line in (DOCS / page).read_text().splitlines():
        if line.startswith("```"):
            inside = not inside and line.strip() == "```python"
            lines.append("")
        else:
            lines.append(line if inside else "")
    return "\n".join(lines)


def imports(source: str) -> set[str]:
    """The packages that a script imports."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
    return {name.split(".")[0] for name in found}


@pytest.mark.parametrize("page", PAGES)
def test_page_runs(page, tmp_path):
    """In a process of its own, for libraries keep settings, and pickles name modules."""
    source = python_of(page)
    if not source.strip():
        pytest.skip("no Python on this page")
    missing = [name for name in sorted(imports(source)) if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    script = tmp_path / "page.py"
    script.write_text(source)
    settings = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "YOLO_CONFIG_DIR": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, script],
        cwd=tmp_path,
        env=os.environ | OFFLINE | settings,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, f"docs/{page}, by the numbers of its lines:\n{result.stderr}"


@pytest.mark.parametrize("page", PAGES)
def test_links(page):
    """To files of the project that exist; each page is linked from the index."""
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", (DOCS / page).read_text())
    assert all((DOCS / link).exists() for link in links), links
    assert page == INDEX.name or f"]({page})" in INDEX.read_text()


def test_every_adapter_has_a_page():
    """The index names the file of each adapter in the row of its page."""
    rows = [line for line in INDEX.read_text().splitlines() if line.startswith("|")]
    for adapter in sorted({*ADAPTERS.values()}):
        assert any(f"`{adapter}.py`" in row and ".md)" in row for row in rows), adapter
