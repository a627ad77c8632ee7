"""How the site is built: ``make docs`` writes ``build/site``, and nothing in it loads from a network.

The source folder is the whole checkout, so that links between README, ``docs/`` and ``results/`` are the same on the
site as in the repository. Pages of the API and of the commands are generated from the package.
"""

from __future__ import annotations

from pathlib import Path

import latex2mathml.converter
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator

import recbole_slifmr
from recbole_slifmr.cli import slifmr

DOCS = Path(__file__).parent

project = "recbole-slifmr"
version = release = recbole_slifmr.__version__
root_doc = "docs/index"
include_patterns = ["README.md", "CHANGELOG.md", "docs/**", "benchmarks/*.md", "results/README.md", "results/*/*/*.md"]
suppress_warnings = ["toc.not_included", "myst.header"]  # of the tables of results, which results/README.md links
extensions = ["myst_parser", "sphinx.ext.apidoc", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_click"]

smartquotes = False  # they would turn -- of an option into a dash

html_theme = "furo"
html_title = project
html_extra_path = ["index.html"]
html_math_renderer = "mathml"
html_copy_source = html_show_sourcelink = False

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

apidoc_modules = [
    {"path": "../recbole_slifmr", "destination": "docs/api", "automodule_options": {"members", "show-inheritance"}}
]
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
napoleon_use_ivar = True


def write_command_pages(app: Sphinx) -> None:
    """Write a page for every command; sphinx-click fills it from the command's options."""
    folder = DOCS / "commands"
    folder.mkdir(exist_ok=True)
    for name, command in slifmr.commands.items():
        function = command.callback
        page = f".. click:: {function.__module__}:{function.__name__}\n   :prog: slifmr {name}\n   :nested: full\n"
        (folder / f"{name}.rst").write_text(page, encoding="utf-8")


def visit_math(self: HTML5Translator, node: nodes.math | nodes.math_block) -> None:
    """Write an equation as MathML, which browsers draw themselves."""
    display = "block" if isinstance(node, nodes.math_block) else "inline"
    self.body.append(latex2mathml.converter.convert(node.astext(), display=display))
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    """Register what this file adds to Sphinx."""
    app.connect("builder-inited", write_command_pages)
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math, None))
