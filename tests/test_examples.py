"""The notebooks: their code runs in a fresh process from an empty folder, without Jupyter, and shows what they say."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))
SHOWN = {
    "quickstart": ["recall@20", "movie_title", "reason", "Star Wars"],
    "your_data": ["title", "reason", "director", "rating", "recall@20", "rank"],
}


def cells_of(path, kind):
    return [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == kind]


def as_script(path):
    """Return the code of all cells; where a cell ends with an expression, it is printed, as a notebook shows it."""
    lines = []
    for cell in cells_of(path, "code"):
        tree = ast.parse("".join(cell["source"]))
        if isinstance(tree.body[-1], ast.Expr):
            last = tree.body[-1]
            last.value = ast.Call(ast.Name("print", ast.Load()), [last.value], [])
        lines.append(ast.unparse(ast.fix_missing_locations(tree)))
    return "\n".join(["import pandas", "pandas.set_option('display.width', 1000)", *lines])


def test_every_notebook_has_what_it_shows():
    assert [path.stem for path in NOTEBOOKS] == sorted(SHOWN)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_code_of_a_notebook_runs(path):
    """Three epochs and ten become one and four."""
    code = as_script(path).replace("epochs=3)", "epochs=1)").replace("epochs=10)", "epochs=4)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert [words for words in SHOWN[path.stem] if words not in done.stdout] == []
    assert any(reason in done.stdout for reason in ("because of", "shares", "near")), done.stdout


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_without_outputs(path):
    """What is shown depends on the machine in the last digits: nothing is kept that could be out of date."""
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells_of(path, "code"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_links_in_a_notebook_resolve(path):
    text = "".join("".join(cell["source"]) for cell in cells_of(path, "markdown"))
    targets = [part.partition(")")[0].partition("#")[0] for part in text.split("](")[1:]]
    assert all((EXAMPLES / target).resolve().is_file() for target in targets)
