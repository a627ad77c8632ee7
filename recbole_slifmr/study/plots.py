"""Plots of benchmarks, studies and searches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from recbole_slifmr.study.statistics import as_numbers
from recbole_slifmr.study.tables import metric_title


def _save(figure: Any, path: Path, description: str) -> None:
    """Write a plot with a description in its metadata, for those who cannot see it."""
    figure.savefig(path, dpi=150, format="png", metadata={"Description": description})


def plot_curves(path: Path, curves: dict[str, list[tuple[int, float, float]]], metric: str) -> None:
    """Draw the validation score by epoch and by time, a line per run, a colour per model.

    Args:
        path: of the picture.
        curves: ``{model-seed: [(epoch, seconds, score)]}``.
        metric: what the score is.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    models = list(dict.fromkeys(name.rpartition("-")[0] for name in curves))
    colours = colormaps["tab10" if len(models) <= 10 else "tab20"]
    for name, points in curves.items():
        model, _, _ = name.rpartition("-")
        colour = colours(models.index(model) % colours.N)
        first = next(n for n in curves if n.rpartition("-")[0] == model) == name
        epochs, seconds, scores = np.array(points, dtype=float).reshape(-1, 3).T
        for axis, x in zip(axes, (epochs, seconds), strict=True):
            axis.plot(x, scores, color=colour, label=model if first else None, alpha=0.8, linewidth=1.2)
    axes[0].xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0].set(xlabel="epoch", ylabel=f"validation {metric_title(metric)}")
    axes[1].set(xlabel="seconds")
    if len(models) <= 6:
        axes[0].legend(frameon=False)
    else:
        figure.legend(loc="outside right upper", frameon=False, fontsize=7)
    _save(figure, path, f"Validation {metric_title(metric)} by epoch and by time, a line per run")


def plot_bars(path: Path, summary: pd.DataFrame, metrics: Sequence[str], titles: Sequence[str] | None = None) -> None:
    """Draw the test score of every model, a panel per metric, the standard deviation over seeds as error bar.

    With more than six rows that differ little, the axis does not start at 0.
    """
    from matplotlib.figure import Figure

    n = len(summary)
    figure = Figure(figsize=(2.0 + 2.8 * len(metrics), 1.0 + 0.32 * n), layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, len(metrics), sharey=True))
    for axis, metric, name in zip(axes, metrics, titles or map(metric_title, metrics), strict=True):
        mean, std = summary[f"test_{metric}", "mean"], summary[f"test_{metric}", "std"].fillna(0)
        axis.barh(range(n), mean, xerr=std, capsize=3, color=[f"C{i % 10}" for i in range(n)])
        low, high = (mean - std).min(), (mean + std).max()
        if n > 6 and high > low > 0.5 * high:  # many variants that differ little
            axis.set_xlim(low - 0.35 * (high - low), high + 0.1 * (high - low))
        axis.set_title(name, fontsize=10)
        axis.tick_params(axis="x", labelsize=8)
    axes[0].set_yticks(range(n), list(summary.index))
    axes[0].invert_yaxis()
    _save(figure, path, "Test scores; error bars: standard deviation over seeds")


def _band(axis: Any, x: Sequence[float], groups: Sequence[pd.Series], **style: Any) -> None:
    """Draw the means as a line in a band of one standard deviation."""
    mean = np.array([group.mean() for group in groups])
    std = np.nan_to_num([group.std() for group in groups])
    (line,) = axis.plot(x, mean, marker="o", markersize=4, **style)
    axis.fill_between(x, mean - std, mean + std, color=line.get_color(), alpha=0.2, linewidth=0)


def plot_robustness(path: Path, runs: pd.DataFrame, losses: Mapping[str, pd.Series], metric: str) -> None:
    """Draw score and relative loss by noise level: a column per kind, a line with a band per model."""
    from matplotlib.figure import Figure

    kinds, models = (list(dict.fromkeys(runs[name])) for name in ("noise", "model"))
    figure = Figure(figsize=(2.6 + 3.2 * len(kinds), 5.6), layout="constrained")
    axes = figure.subplots(2, len(kinds), squeeze=False, sharex=True)
    values = (runs[f"test_{metric}"], 100 * losses[metric])
    for column, kind in enumerate(kinds):
        for row, what in enumerate(values):
            axis = axes[row, column]
            for i, model in enumerate(models):
                chosen = runs[(runs["model"] == model) & (runs["noise"] == kind)]
                levels = sorted(set(chosen["level"]))
                groups = [what[chosen.index[chosen["level"] == level]] for level in levels]
                _band(axis, [100 * level for level in levels], groups, color=f"C{i}", label=model)
        axes[0, column].set_title(kind)
        axes[1, column].set_xlabel("noise, %")
    axes[0, 0].set_ylabel(f"test {metric_title(metric)}")
    axes[1, 0].set_ylabel(f"loss of {metric_title(metric)}, %")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
    _save(figure, path, f"Test {metric_title(metric)} and its loss by noise level; bands: deviation over seeds")


def plot_turnover(path: Path, turnover: Mapping[str, Sequence[tuple[float, float]]]) -> None:
    """Draw the turnover of the correlation graph by epoch, a line per run, a colour per variant."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    titles = list(dict.fromkeys(name.rpartition("-")[0] for name in turnover))
    for name, points in turnover.items():
        title = name.rpartition("-")[0]
        first = name == next(n for n in turnover if n.rpartition("-")[0] == title)
        x, y = np.array(points, dtype=float).reshape(-1, 2).T
        axis.plot(x, y, color=f"C{titles.index(title)}", label=title if first else None, alpha=0.8, marker=".")
    axis.set(xlabel="epoch", ylabel="turnover of the correlation graph", ylim=(0, 1.02))
    if titles:
        axis.legend(frameon=False)
    _save(figure, path, "Turnover of the correlation graph by epoch, a line per run")


def plot_cost(path: Path, runs: pd.DataFrame, metric: str) -> None:
    """Draw the test score against the seconds of a run: a point per run, a large one per variant's mean."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    for i, (title, group) in enumerate(runs.groupby("variant", sort=False)):
        x, y = group["seconds"], group[f"test_{metric}"]
        axis.scatter(x, y, s=12, color=f"C{i}", alpha=0.5)
        axis.errorbar(x.mean(), y.mean(), xerr=x.std() if len(x) > 1 else 0, yerr=y.std() if len(y) > 1 else 0,
                      fmt="o", color=f"C{i}", label=title, capsize=2)  # fmt: skip
    axis.set(xlabel="seconds of training", ylabel=f"test {metric_title(metric)}")
    axis.legend(frameon=False, fontsize=8)
    _save(figure, path, f"Test {metric_title(metric)} by seconds of training; bars: standard deviation over seeds")


def plot_sensitivity(path: Path, runs: pd.DataFrame, metric: str, signs: Sequence[str]) -> None:
    """Draw the score, and below it the signs of failure, by the value of each setting, with bands."""
    from matplotlib.figure import Figure

    settings, models = (list(dict.fromkeys(runs[name])) for name in ("setting", "model"))
    n_rows = 1 + bool(signs)
    figure = Figure(figsize=(1.6 + 3.2 * len(settings), 1 + 2.6 * n_rows), layout="constrained")
    axes = figure.subplots(n_rows, len(settings), squeeze=False)
    for column, setting in enumerate(settings):
        of_setting = runs[runs["setting"] == setting]
        values = list(dict.fromkeys(of_setting["value"]))
        for i, model in enumerate(models):
            chosen = of_setting[of_setting["model"] == model]
            groups = [chosen[chosen["value"] == value] for value in values]
            x = list(range(len(values)))
            _band(axes[0, column], x, [group[f"test_{metric}"] for group in groups], color=f"C{i}", label=model)
            for style, sign in zip(("-", "--"), signs, strict=False):
                _band(axes[1, column], x, [group[sign] for group in groups], color=f"C{i}", linestyle=style,
                      label=f"{model} {sign}" if len(models) > 1 else sign)  # fmt: skip
        axes[-1, column].set_xlabel(setting)
        for axis in axes[:, column]:
            axis.set_xticks(range(len(values)), [str(value) for value in values])
    axes[0, 0].set_ylabel(f"test {metric_title(metric)}")
    for axis in axes[:, 0]:
        axis.legend(frameon=False, fontsize=8)
    _save(figure, path, f"Test {metric_title(metric)} by the value of each setting; bands: deviation over seeds")


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
    _save(figure, path, f"Validation {metric_title(metric)} of every trial by epoch")


def plot_importance(path: Path, scores: pd.Series, metric: str, n_trials: int) -> None:
    """Draw the importance of each setting, see :func:`importance`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 0.9 + 0.28 * len(scores)), layout="constrained")
    axis = figure.subplots()
    axis.barh(range(len(scores)), scores.to_numpy()[::-1], color="C0")
    axis.set_yticks(range(len(scores)), list(scores.index[::-1]))
    axis.set(xlabel=f"importance for validation {metric_title(metric)} ({n_trials} trials)", xlim=(0, 1))
    _save(figure, path, f"Importance of each setting for validation {metric_title(metric)}")


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
