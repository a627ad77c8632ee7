"""Tables of results, as Markdown and LaTeX."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from recbole_slifmr.files import replace_file
from recbole_slifmr.study.statistics import Comparison

SHOWN = {"ndcg": "NDCG", "mrr": "MRR", "map": "MAP"}
SMALLER_IS_BETTER = ("averagepopularity", "giniindex")


def metric_title(name: str) -> str:
    """Return ``Recall@20`` for ``recall@20``."""
    metric, at, k = name.partition("@")
    return SHOWN.get(metric, metric.capitalize()) + at + k


class Cell(NamedTuple):
    """A score in the table and how it stands out."""

    mean: float
    std: float
    best: bool
    second: bool
    mark: str


def stars(p: float) -> str:
    """Return the mark of a p-value: ``*`` below 0.05, ``**`` below 0.01."""
    return "**" if p < 0.01 else "*" if p < 0.05 else ""


def cells(
    summary: pd.DataFrame, metrics: Sequence[str], comparisons: dict[str, list[Comparison]]
) -> dict[tuple[str, str], Cell]:
    """Return the cells of the table by model and metric.

    A mark stands behind a model that the reference differs from: ``*`` for p < 0.05, ``**`` for p < 0.01 (Wilcoxon,
    Holm-corrected).
    """
    table = {}
    for metric in metrics:
        name = f"test_{metric}"
        rank = summary[name, "mean"].rank(ascending=metric.partition("@")[0] in SMALLER_IS_BETTER, method="min")
        p_values = {c.model: c.p_wilcoxon for c in comparisons.get(metric, [])}
        for model in summary.index:
            p = p_values.get(model, 1.0)
            table[model, metric] = Cell(
                summary.loc[model, (name, "mean")],
                summary.loc[model, (name, "std")],
                rank[model] == 1,
                rank[model] == 2,
                stars(p),
            )
    return table


def markdown(models: Sequence[str], metrics: Sequence[str], table: dict[tuple[str, str], Cell], caption: str) -> str:
    """Return the table in Markdown: best bold, second underlined."""
    lines = [
        "| model | " + " | ".join(metric_title(metric) for metric in metrics) + " |",
        "|---|" + "---:|" * len(metrics),
    ]
    for model in models:
        row = []
        for metric in metrics:
            cell = table[model, metric]
            text = f"{cell.mean:.4f}"
            text = f"**{text}**" if cell.best else f"<u>{text}</u>" if cell.second else text
            spread = f" ± {cell.std:.4f}" if np.isfinite(cell.std) else ""
            row.append(text + spread + cell.mark.replace("*", r"\*"))
        lines.append(f"| {_cell_text(model)} | " + " | ".join(row) + " |")
    return "\n".join([*lines, "", _wrap(caption), ""])


def _wrap(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def latex(models: Sequence[str], metrics: Sequence[str], table: dict[tuple[str, str], Cell], caption: str) -> str:
    """Return the table in LaTeX (booktabs): best bold, second underlined."""
    lines = [
        r"\begin{table}",
        rf"\caption{{{_escape(caption)}}}",
        rf"\begin{{tabular}}{{l{'r' * len(metrics)}}}",
        r"\toprule",
        " & ".join(["Model", *(metric_title(metric) for metric in metrics)]) + r" \\",
        r"\midrule",
    ]
    for model in models:
        row = []
        for metric in metrics:
            cell = table[model, metric]
            text = f"{cell.mean:.4f}"
            text = rf"\textbf{{{text}}}" if cell.best else rf"\underline{{{text}}}" if cell.second else text
            row.append(text + (f"$^{{{cell.mark}}}$" if cell.mark else ""))
        lines.append(" & ".join([_escape(model), *row]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}", ""])


LATEX = str.maketrans(
    {character: "\\" + character for character in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
)


def _escape(text: str) -> str:
    """Return text that LaTeX prints as it is."""
    return text.translate(LATEX)


def _cell_text(text: str) -> str:
    """Return text that does not end its cell in a Markdown table."""
    return text.replace("|", r"\|")


# -- studies ------------------------------------------------------------------------------------------------------


def write_tables(
    folder: Path, sections: Sequence[tuple[str, Sequence[str], Sequence[Sequence[str]]]], text: str
) -> None:
    """Write ``table.md`` and ``table.tex``.

    Args:
        folder: where to.
        sections: heading (empty for none), column titles and rows of each table.
        text: how the numbers came about.
    """
    lines, tex = [], [r"% " + text]
    for heading, header, rows in sections:
        lines += [f"### {heading}", ""] * bool(heading)
        lines += ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
        lines += ["| " + " | ".join(_cell_text(cell).replace("*", r"\*") for cell in row) + " |" for row in rows] + [""]
        tex += [rf"\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}", rf"% {heading}", r"\toprule"]
        tex += [" & ".join(map(_escape, header)) + r" \\", r"\midrule"]
        tex += [" & ".join(map(_escape, row)) + r" \\" for row in rows] + [r"\bottomrule", r"\end{tabular}", ""]
    replace_file(
        folder / "table.md", lambda part: part.write_text("\n".join([*lines, _wrap(text), ""]), encoding="utf-8")
    )
    replace_file(folder / "table.tex", lambda part: part.write_text("\n".join(tex), encoding="utf-8"))
