"""The documentation as a site: ``make docs``.

The pages of ``docs/`` are read as they are. Pages of the losses, with their curves, are made here
from the table of the README and the docstrings.
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from latex2mathml.converter import convert

DOCS = Path(__file__).parent
ROOT = DOCS.parent
MADE = DOCS / "_made"
sys.path[:0] = [str(ROOT), str(DOCS)]

import figures  # noqa: E402

import detseg_losses  # noqa: E402

project = "detseg_losses"
author = "The detseg_losses authors"
version = release = detseg_losses.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["README.md"]
html_theme = "furo"
html_title = f"detseg_losses {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_copyright = False
html_math_renderer = "mathml"
html_theme_options: dict[str, Any] = {"top_of_page_buttons": []}

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 72
napoleon_use_rtype = False
myst_heading_anchors = 3
nitpicky = True
nitpick_ignore_regex = [
    (r"py:.*", r"(torch|typing|typing_extensions|collections)\..*"),
    (r"py:class", r"detseg_losses\.integrations\.Model"),  # a type variable
]

FAMILIES = {
    "classification": "Detection heads and binary masks",
    "segmentation": "Segmentation",
    "boxes": "Boxes",
    "deltas": "Box offsets",
    "distribution": "Box offsets",
}
CATALOGUE = """\
Each loss has a name in loss strings, a function and a module. The curves are drawn from the losses
themselves, at their default options unless the label says otherwise.
"""
ROW = re.compile(r"^\| `(\w+)` \| `(\w+)` \| `(\w+)` \| (.*) \|$", re.MULTILINE)


def write_pages(*_: Any) -> None:
    """The catalogue, a page of each loss, and the pages that lie outside of ``docs/``."""
    shutil.rmtree(MADE, ignore_errors=True)
    MADE.mkdir()
    families: dict[str, list[str]] = {title: [] for title in FAMILIES.values()}
    for name, function, module, purpose in ROW.findall((ROOT / "README.md").read_text()):
        figures.draw_loss(name, MADE / f"{name}.svg")
        purpose = purpose[0].upper() + purpose[1:]
        purpose = purpose.replace("`", "``")
        (MADE / f"{name}.rst").write_text(
            f"{name}\n{'=' * len(name)}\n\n{purpose}.\n\n"
            f".. image:: {name}.svg\n   :alt: Curve of the loss {name}\n   :class: curve\n\n"
            f".. currentmodule:: detseg_losses\n\n"
            f".. autofunction:: {function}\n\n.. autoclass:: {module}\n"
        )
        families[FAMILIES[detseg_losses.LOSSES[name].kinds[0]]].append(
            f"   .. container:: loss\n\n"
            f"      :doc:`{name}`\n\n"
            f"      .. image:: {name}.svg\n         :alt: \n         :target: {name}.html\n\n"
            f"      {purpose}.\n"
        )
    parts = ["Catalogue\n=========\n", CATALOGUE]
    for title, cards in families.items():
        names = re.findall(r":doc:`(\w+)`", "".join(cards))
        toctree = "".join(f"   {name}\n" for name in names)
        parts += [
            f"{title}\n{'-' * len(title)}\n",
            ".. container:: losses\n\n" + "\n".join(cards),
            f".. toctree::\n   :hidden:\n\n{toctree}",
        ]
    (MADE / "catalogue.rst").write_text("\n".join(parts))
    for page in ("BENCHMARKS", "CHANGELOG", "CONTRIBUTING"):
        (MADE / f"{page.lower()}.md").write_text(
            f"```{{include}} ../../{page}.md\n:relative-images:\n:relative-docs: docs\n```\n"
        )


def link_made_pages(app: Any, name: str, source: list[str]) -> None:
    """A page links to files beside ``docs/``, which the site has among the pages made here."""
    source[0] = re.sub(r"\]\(\.\./([A-Z]+)\.md", lambda m: f"](_made/{m[1].lower()}.md", source[0])


def finish_docstring(
    app: Any, what: str, name: str, found: Any, options: Any, lines: list[str]
) -> None:
    """The module form of a loss refers to its function, whose documentation is beside it. What a
    docstring names without its module may be in another one.
    """
    function = vars(found).get("function") if what == "class" else None
    if function:
        text = f"The module form of :func:`~detseg_losses.{found.function.__name__}`, with its"
        lines[:] = [f'{text} options; ``reduction`` is ``"mean"`` by default.']
    lines[:] = [re.sub(r":(\w+):`(\w+Options|LossSum\.\w+)`", r":\1:`.\2`", x) for x in lines]


def mathml(formula: str, display: str) -> str:
    """A formula in the browser's own language, spaced as it would be in print."""
    bar, tight = (f"<mo{space} stretchy" for space in ("", ' lspace="0" rspace="0"'))
    text = str(convert(formula, display=display))
    text = text.replace(f'{bar}="false">&#x0007C;', f'{tight}="false">&#x0007C;')
    return re.sub(
        r"(<mi>(?:arctan|cos|cosh|log|sin)</mi>)(?=<m[in])", r'\1<mspace width="0.2em"/>', text
    )


def visit_math(self: Any, node: nodes.math) -> None:
    self.body.append(mathml(node.astext(), "inline"))
    raise nodes.SkipNode


def visit_display(self: Any, node: nodes.math_block) -> None:
    self.body.append(f'<div class="math">{mathml(node.astext(), "block")}</div>')
    raise nodes.SkipNode


def setup(app: Any) -> None:
    app.connect("builder-inited", write_pages)
    app.connect("source-read", link_made_pages)
    app.connect("autodoc-process-docstring", finish_docstring, priority=900)
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_display, None))
