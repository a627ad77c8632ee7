"""From the runs of a study to tables, tests of significance and plots."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

SHOWN = {"ndcg": "NDCG", "mrr": "MRR", "map": "MAP"}
SMALLER_IS_BETTER = ("averagepopularity", "giniindex")


class Comparison(NamedTuple):
    """A model against the reference on one metric, over the users.

    Attributes:
        model: the other model.
        difference: mean over users of reference minus model.
        p_wilcoxon: two-sided Wilcoxon signed-rank test, Holm-corrected over the models.
        p_t: two-sided paired t test, Holm-corrected over the models.
    """

    model: str
    difference: float
    p_wilcoxon: float
    p_t: float


def metric_title(name: str) -> str:
    """Return ``Recall@20`` for ``recall@20``."""
    metric, at, k = name.partition("@")
    return SHOWN.get(metric, metric.capitalize()) + at + k


def summarise(runs: pd.DataFrame) -> pd.DataFrame:
    """Return mean and standard deviation over the seeds: one row per model, columns ``(name, "mean" | "std")``."""
    grouped = runs.drop(columns="seed").groupby("model", sort=False)
    return grouped.agg(["mean", "std"])


def holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm's step-down correction (Scandinavian Journal of Statistics, 1979), in the order given."""
    order = np.argsort(p_values)
    n = len(p_values)
    raised = np.maximum.accumulate([min(1.0, (n - i) * p_values[j]) for i, j in enumerate(order)])
    corrected = np.empty(n)
    corrected[order] = raised
    return corrected.tolist()


def user_means(users: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Return the mean over the seeds: one row per user, one column per model."""
    return users.pivot_table(index="user", columns="model", values=metric, aggfunc="mean")


def compare(users: pd.DataFrame, metric: str, reference: str) -> list[Comparison]:
    """Test the reference against every other model, user by user (each user's mean over the seeds).

    Returns:
        one comparison per other model; p = 1 where no user differs.
    """
    table = user_means(users, metric)
    others = [model for model in users["model"].unique() if model != reference]
    differences = [table[reference] - table[model] for model in others]
    differ = [bool((difference != 0).any()) for difference in differences]
    wilcoxon = [float(stats.wilcoxon(d).pvalue) if some else 1.0 for d, some in zip(differences, differ, strict=True)]
    t_test = [
        float(stats.ttest_rel(table[reference], table[model]).pvalue) if some else 1.0
        for model, some in zip(others, differ, strict=True)
    ]
    corrected = zip(others, differences, holm(wilcoxon), holm(t_test), strict=True)
    return [Comparison(model, float(d.mean()), w, t) for model, d, w, t in corrected]


class Improvement(NamedTuple):
    """Relative improvement of the reference over the best other model, with a 95% bootstrap interval over users."""

    best: str
    relative: float
    low: float
    high: float


def improvement(users: pd.DataFrame, metric: str, reference: str, n_resamples: int = 2000) -> Improvement:
    """Return the relative improvement in the mean of ``metric`` over the best of the other models."""
    table = user_means(users, metric)
    best = table.drop(columns=reference).mean().idxmax()
    one, other = table[reference].to_numpy(), table[best].to_numpy()

    def relative(a: np.ndarray, b: np.ndarray, axis: int = -1) -> Any:
        return a.mean(axis=axis) / b.mean(axis=axis) - 1

    interval = stats.bootstrap(
        (one, other), relative, paired=True, n_resamples=n_resamples, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    return Improvement(str(best), float(relative(one, other)), float(interval.low), float(interval.high))


class Cell(NamedTuple):
    """A score in the table and how it stands out."""

    mean: float
    std: float
    best: bool
    second: bool
    mark: str


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
                "**" if p < 0.01 else "*" if p < 0.05 else "",
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
        lines.append(f"| {model} | " + " | ".join(row) + " |")
    return "\n".join([*lines, "", caption, ""])


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


def _escape(text: str) -> str:
    for character in "&%$#_":
        text = text.replace(character, "\\" + character)
    return text


def plot_curves(path: Path, curves: dict[str, list[tuple[int, float, float]]], metric: str) -> None:
    """Draw the validation score by epoch and by time, a line per run, a colour per model.

    Args:
        path: of the picture.
        curves: ``{model-seed: [(epoch, seconds, score)]}``.
        metric: what the score is.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    models = list(dict.fromkeys(name.rpartition("-")[0] for name in curves))
    for name, points in curves.items():
        model, _, _ = name.rpartition("-")
        colour, first = f"C{models.index(model)}", next(n for n in curves if n.rpartition("-")[0] == model) == name
        epochs, seconds, scores = np.array(points, dtype=float).reshape(-1, 3).T
        for axis, x in zip(axes, (epochs, seconds), strict=True):
            axis.plot(x, scores, color=colour, label=model if first else None, alpha=0.8, linewidth=1.2)
    axes[0].xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0].set(xlabel="epoch", ylabel=f"validation {metric_title(metric)}")
    axes[1].set(xlabel="seconds")
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=150, format="png")


def plot_bars(path: Path, summary: pd.DataFrame, metrics: Sequence[str]) -> None:
    """Draw the test score of every model, a panel per metric, the standard deviation over seeds as error bar."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(metrics), 3.4), layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, len(metrics)))
    for axis, metric in zip(axes, metrics, strict=True):
        mean, std = summary[f"test_{metric}", "mean"], summary[f"test_{metric}", "std"].fillna(0)
        axis.bar(range(len(mean)), mean, yerr=std, capsize=3, color=[f"C{i}" for i in range(len(mean))])
        axis.set_xticks(range(len(mean)), list(mean.index), rotation=45, ha="right")
        axis.set_title(metric_title(metric))
    figure.savefig(path, dpi=150, format="png")


# -- searches -----------------------------------------------------------------------------------------------------


def importance(trials: pd.DataFrame, names: Sequence[str]) -> pd.Series | None:
    """Return how much each setting tells about the score: permutation importance in a random forest over the trials.

    The importances add up to 1. Settings that a trial left at their default count as a value of their own.

    Args:
        trials: one row per trial with ``score`` and the settings.
        names: of the settings.

    Returns:
        importance by name, falling; None with fewer than four scored trials or scores that do not differ.
    """
    from sklearn.ensemble import RandomForestRegressor
    from sklearn.inspection import permutation_importance

    scored = trials[trials["score"].notna()]
    names = [name for name in names if name in scored]
    if len(scored) < 4 or scored["score"].nunique() < 2 or not names:
        return None
    features = pd.concat([as_numbers(scored[name])[0] for name in names], axis=1).fillna(-1e9)
    forest = RandomForestRegressor(n_estimators=200, min_samples_leaf=2, random_state=0).fit(features, scored["score"])
    found = permutation_importance(forest, features, scored["score"], n_repeats=20, random_state=0)
    positive = np.clip(found.importances_mean, 0, None)
    share = positive / positive.sum() if positive.sum() > 0 else positive
    return pd.Series(share, index=names).sort_values(ascending=False)


def as_numbers(column: pd.Series) -> tuple[pd.Series, list[str] | None]:
    """Return a column as numbers, NaN where empty, and what the numbers stand for if they are positions in a list."""
    if all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in column.dropna()):
        return column.astype(float), None
    values = sorted({str(value) for value in column.dropna()})
    return column.map(lambda value: values.index(str(value)), na_action="ignore").astype(float), values


def plot_search(path: Path, history: pd.DataFrame, winner: str, metric: str) -> None:
    """Draw the validation score of every trial by epoch; the winner stands out."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    for name, points in history.groupby("trial", sort=False):
        first = name == winner
        axis.plot(points["epoch"], points["score"], color="C1" if first else "C0", alpha=1.0 if first else 0.4,
                  linewidth=2.0 if first else 1.0, zorder=3 if first else 2, marker=".", markersize=3,
                  label=f"{name}: {points['best_score'].iloc[-1]:.4f}" if first else None)  # fmt: skip
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set(xlabel="epoch", ylabel=f"validation {metric_title(metric)}")
    axis.legend(frameon=False, title="best trial")
    figure.savefig(path, dpi=150, format="png")


def plot_importance(path: Path, scores: pd.Series, metric: str, n_trials: int) -> None:
    """Draw the importance of each setting, see :func:`importance`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 0.9 + 0.28 * len(scores)), layout="constrained")
    axis = figure.subplots()
    axis.barh(range(len(scores)), scores.to_numpy()[::-1], color="C0")
    axis.set_yticks(range(len(scores)), list(scores.index[::-1]))
    axis.set(xlabel=f"importance for validation {metric_title(metric)} ({n_trials} trials)", xlim=(0, 1))
    figure.savefig(path, dpi=150, format="png")


def plot_parallel(path: Path, trials: pd.DataFrame, names: Sequence[str], metric: str) -> None:
    """Write a page with a line per scored trial through its settings to its score; it needs no network to open."""
    import plotly.graph_objects as graphs

    scored = trials[trials["score"].notna()]
    axes = []
    for name in [name for name in names if name in scored]:
        values, labels = as_numbers(scored[name])
        axis: dict[str, Any] = {"label": name, "values": values}
        if labels is not None:
            axis |= {"tickvals": list(range(len(labels))), "ticktext": labels}
        elif values.min() > 0 and values.max() / values.min() >= 50:
            ticks = np.unique(np.round(np.log10(values.dropna()), 1))
            axis |= {"values": np.log10(values), "tickvals": ticks, "ticktext": [f"{10**tick:.1e}" for tick in ticks]}
        axes.append(axis)
    axes.append({"label": metric_title(metric), "values": scored["score"]})
    line = {"color": scored["score"], "colorscale": "Viridis", "showscale": True}
    figure = graphs.Figure(graphs.Parcoords(line=line, dimensions=axes))
    figure.update_layout(title=f"{len(scored)} trials, validation {metric_title(metric)}", font={"size": 14})
    path.write_text(figure.to_html(include_plotlyjs=True), encoding="utf-8")
