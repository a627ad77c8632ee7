"""What a study leaves behind, beside what every benchmark does: its own table and plots."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from recbole_slifmr.data.atomic import write_atomic
from recbole_slifmr.data.noise import reads
from recbole_slifmr.errors import SettingError
from recbole_slifmr.files import hold, replace_folder, write_csv
from recbole_slifmr.host.settings import make_config
from recbole_slifmr.study import plots, statistics, tables
from recbole_slifmr.study.benchmark import caption, run_plan, shown_metrics, write_outputs, write_runs
from recbole_slifmr.study.plan import Study
from recbole_slifmr.study.task import Task, read_result
from recbole_slifmr.training.experiment import load_data


def run_study(study: Study, **running: Any) -> pd.DataFrame:
    """Run what is left of a study and write its outputs.

    Args:
        study: what to run.
        running: the other arguments of :func:`~recbole_slifmr.study.benchmark.run_plan`.

    Returns:
        one row per finished run: ``variant``, ``seed``, what sets the variant apart, and what was measured.

    Raises:
        SettingError, DataError: for anything that cannot be used, before anything is trained.
    """
    runs = run_plan(study, write=_write, **running)
    return with_factors(study, runs) if len(runs) else runs


def _write(study: Study, runs: pd.DataFrame, users: pd.DataFrame, states: Mapping[str, str]) -> None:
    write_csv(study.out / "results.csv", with_factors(study, runs))
    if study.kind == "variants":
        write_outputs(study, runs, users, states)
    else:
        write_runs(study, runs, users, states)
        TABLES[study.kind](study, with_factors(study, runs), users, states)


def with_factors(study: Study, runs: pd.DataFrame) -> pd.DataFrame:
    """Return the runs with a column ``variant`` (their title) and one for everything that sets the variants apart."""
    factors = pd.DataFrame([study.factors[title] for title in runs["model"]], index=runs.index)
    return pd.concat(
        [runs["model"].rename("variant"), factors, runs.drop(columns=["model", *factors.columns], errors="ignore")],
        axis=1,
    )


def _heading(study: Study, runs: pd.DataFrame, states: Mapping[str, str]) -> str:
    renamed = runs.drop(columns="model", errors="ignore").rename(columns={"variant": "model"})
    return f"{study.heading}. {caption(study, renamed, states)}"


def _two(metrics: list[str]) -> list[str]:
    """Return the first Recall and the first NDCG of the tables, or the first two of whatever there is."""
    chosen = [metric for metric in metrics if metric.startswith(("recall", "ndcg"))]
    return (chosen or metrics)[:2]


def _spread(values: pd.Series, digits: int = 4, scale: float = 1.0) -> str:
    """Return mean ± standard deviation."""
    values = values.dropna() * scale
    if values.empty:
        return ""
    spread = f" ± {values.std():.{digits}f}" if len(values) > 1 else ""
    return f"{values.mean():.{digits}f}{spread}"


# -- robustness ---------------------------------------------------------------------------------------------------


def relative_losses(runs: pd.DataFrame, metric: str) -> pd.Series:
    """Return, for every run, the share of its score without noise that it has lost.

    Its score without noise is that of the same model and seed, or of the model's only run without noise: a model that
    draws nothing has one for all seeds.
    """
    column = f"test_{metric}"
    clean = runs[runs["level"] == 0].drop_duplicates(["model", "seed"])
    by_seed = clean.set_index(["model", "seed"])[column]
    only = clean.drop_duplicates("model", keep=False).set_index("model")[column]
    before = pd.Series(pd.MultiIndex.from_frame(runs[["model", "seed"]]).map(by_seed), index=runs.index, dtype=float)
    return 1 - runs[column] / before.fillna(runs["model"].map(only))


def _robustness(study: Study, runs: pd.DataFrame, users: pd.DataFrame, states: Mapping[str, str]) -> None:
    metrics = _two(shown_metrics(runs))
    models = list(dict.fromkeys(runs["model"]))
    kinds = list(dict.fromkeys(runs["noise"]))
    levels = sorted(set(runs["level"]))
    main = "SLIFMR" if "SLIFMR" in models else models[0]
    top = levels[-1]
    losses = {metric: relative_losses(runs, metric) for metric in metrics}
    sections = []
    for kind in kinds:
        for metric in metrics:
            rows = []
            for model in models:
                of_model = (runs["model"] == model) & (runs["noise"] == kind)
                at = {level: of_model & (runs["level"] == level) for level in levels}
                row = [model, *(_spread(runs.loc[at[level], f"test_{metric}"]) for level in levels)]
                row += [_spread(losses[metric][at[level]], 1, 100) for level in levels[1:]]
                known = model != main and metric in users
                row.append(_more_lost(users, metric, model, main, kind, top) if known else "")
                rows.append(row)
            title = tables.metric_title(metric)
            header = ["model", *(f"{title}, {level:.0%}" for level in levels)]
            header += [*(f"loss at {level:.0%}, %" for level in levels[1:]), f"more than {main} at {top:.0%}, points"]
            sections.append((f"{kind}, {title}", header, rows))
    text = _heading(study, runs, states) + (
        " Noise is in the training inputs only, the same for every model; its draw changes with the seed. Loss: share "
        "of the same seed's score without noise; a model that draws nothing has one run without noise for all seeds. "
        "Last column: with a 95% bootstrap interval over users."
    )
    tables.write_tables(study.out, sections, text)
    plots.plot_robustness(study.out / "robustness.png", runs, losses, metrics[0])


def _more_lost(users: pd.DataFrame, metric: str, model: str, main: str, kind: str, level: float) -> str:
    one, other = ((f"{name} {kind}=0", f"{name} {kind}={level:g}") for name in (model, main))
    found = statistics.loss_difference(users, metric, one, other)
    if found is None:
        return ""
    difference, low, high = (100 * value for value in found)
    return f"{difference:+.1f}" + ("" if math.isnan(low) else f" [{low:.1f}, {high:.1f}]")


def write_data(study: Study) -> list[Path]:
    """Write the noisy data of a study of robustness as atomic files, once per kind, level and seed.

    They hold what the model reads that reads most of the study's. What is there already stays if it was written from
    the same data with the same settings.

    Returns:
        the folders, each a data set with a fixed split.

    Raises:
        SettingError: for a study of another kind, or a folder where another one is running.
        DataError: for data that cannot be read.
    """
    if study.kind != "robustness":
        raise SettingError(f"write_data writes the noisy data of a study of robustness: '{study.name}' is none")
    n_inputs = {title: len(reads(make_config(**task.arguments))) for title, task in study.first_tasks.items()}
    folders: dict[str, Path] = {}
    study.out.mkdir(parents=True, exist_ok=True)
    with hold(study.out):
        for task in sorted(study.tasks, key=lambda task: -n_inputs[task.title]):
            if task.settings.get("noise") and task.data not in folders:
                factors = study.factors[task.title]
                name = f"{factors['noise']}={factors['level']:g}-{task.seed}"
                folders[task.data] = _write_noisy(task, study.out / "data" / name)
    return sorted(folders.values())


def _write_noisy(task: Task, folder: Path) -> Path:
    """Write the data of a task below a folder, unless they are there; ``key`` says what they were written from."""
    key = folder / "key"
    if not key.is_file() or key.read_text(encoding="utf-8") != task.key():
        parts = [loader._dataset for loader in load_data(make_config(**task.arguments), task.split_seed)]
        with replace_folder(folder) as part:
            write_atomic(parts, part, task.dataset)
            (part / "key").write_text(task.key(), encoding="utf-8")
    return folder / task.dataset


# -- refresh interval ---------------------------------------------------------------------------------------------


def _interval(study: Study, runs: pd.DataFrame, users: pd.DataFrame, states: Mapping[str, str]) -> None:
    metrics = _two(shown_metrics(runs))
    comparisons: dict[str, dict[str, float]] = {}
    if study.reference in set(runs["variant"]):
        comparisons = {
            metric: {c.model: c.p_wilcoxon for c in statistics.compare(users, metric, study.reference)}
            for metric in metrics
            if metric in users
        }
    refreshing = {"refreshes": 0.0, "refresh_seconds": 0.0}  # with self_loop off everywhere there are no such columns
    runs = runs.assign(**{name: runs[name].fillna(0) if name in runs else value for name, value in refreshing.items()})
    rows = []
    for title, group in runs.groupby("variant", sort=False):
        share = group["refresh_seconds"] / group["seconds"]
        scores = [
            _spread(group[f"test_{metric}"]) + tables.stars(comparisons.get(metric, {}).get(title, 1.0))
            for metric in metrics
        ]
        rows.append(
            [title, *scores, _spread(group["refreshes"], 1), _spread(group["epochs"], 1),
             _spread(group["seconds_per_epoch"], 2), f"{100 * share.mean():.1f}", _spread(group["seconds"], 0)]
        )  # fmt: skip
    header = ["refresh", *map(tables.metric_title, metrics), "refreshes", "epochs", "seconds per epoch",
              "share of time in refreshes, %", "seconds in all"]  # fmt: skip
    text = _heading(study, runs, states) + " Seconds are of training with validation. " + _within_spread(runs, metrics)
    tables.write_tables(study.out, [("", header, rows)], text)
    turnover = {
        task.name: [(entry["epoch"], entry["turnover"]) for entry in (read_result(task) or {})["traces"]["refreshes"]]
        for task in study.tasks
        if states[task.name] == "done" and "refreshes" in (read_result(task) or {}).get("traces", {})
    }
    plots.plot_turnover(study.out / "turnover.png", turnover)
    plots.plot_cost(study.out / "cost.png", runs, metrics[0])


def _within_spread(runs: pd.DataFrame, metrics: list[str]) -> str:
    """Say whether the adaptive interval reaches the score of refreshing every epoch within the seeds' spread."""
    every, adaptive = (runs[runs["interval"].astype(str) == name] for name in ("1", "adaptive"))
    if every.empty or adaptive.empty or len(every) < 2:
        return ""
    parts = []
    for metric in metrics:
        one, other = every[f"test_{metric}"], adaptive[f"test_{metric}"]
        difference = other.mean() - one.mean()
        verdict = (
            "within" if abs(difference) <= one.std() else f"{'higher' if difference > 0 else 'lower'} by more than"
        )
        title = tables.metric_title(metric)
        parts.append(f"{title} {difference:+.4f} ({verdict} the seeds' spread of {one.std():.4f})")
    refreshes = f"{adaptive['refreshes'].mean():.1f} refreshes instead of {every['refreshes'].mean():.1f}"
    return f"Adaptive against every epoch: {', '.join(parts)}, with {refreshes}."


# -- sensitivity --------------------------------------------------------------------------------------------------


def _sensitivity(study: Study, runs: pd.DataFrame, users: pd.DataFrame, states: Mapping[str, str]) -> None:
    metrics = _two(shown_metrics(runs))
    signs = [name for name in ("homogenisation", "smoothing") if name in runs and runs[name].notna().any()]
    rows = [
        [title, *(_spread(group[f"test_{metric}"]) for metric in metrics), *(_spread(group[s], 3) for s in signs)]
        for title, group in runs.groupby("variant", sort=False)
    ]
    header = ["setting", *map(tables.metric_title, metrics), *signs]
    text = _heading(study, runs, states) + (
        " Homogenisation: mean cosine between the views of an item; smoothing: mean cosine between random items; both "
        "at the best epoch." if signs else ""
    )  # fmt: skip
    tables.write_tables(study.out, [("", header, rows)], text)
    plots.plot_sensitivity(study.out / "sensitivity.png", runs, metrics[0], signs)


# -- cold items ---------------------------------------------------------------------------------------------------


def _coldstart(study: Study, runs: pd.DataFrame, users: pd.DataFrame, states: Mapping[str, str]) -> None:
    columns = {
        f"{metric}/{group}": f"{tables.metric_title(metric)}, {words}"
        for metric in _two(shown_metrics(runs))
        for group, words in (("cold", "cold items among all"), ("among_cold", "among cold"), ("warm", "warm items"))
        if f"test_{metric}/{group}" in runs
    }
    columns = columns or {metric: tables.metric_title(metric) for metric in _two(shown_metrics(runs))}
    rows = []
    for title, group in runs.groupby("variant", sort=False):
        rows.append([title, *(_spread(group[f"test_{name}"]) or "cannot score them" for name in columns)])
    share = make_config(**study.tasks[0].arguments)["cold_items"]
    text = _heading(study, runs, states) + (
        f" {share:.0%} of the items are cold: all their interactions are in validation and test. Among all: only cold "
        "held-out items count, ranked among all items; among cold: ranked among cold items."
    )
    tables.write_tables(study.out, [("", ["model", *columns.values()], rows)], text)
    _plot_cold(study.out / "cold.png", runs, columns)


def _plot_cold(path: Path, runs: pd.DataFrame, columns: Mapping[str, str]) -> None:
    shown = [name for name in columns if name.startswith(next(iter(columns)).partition("/")[0])]
    summary = statistics.summarise(
        runs[["variant", "seed", *(f"test_{name}" for name in shown)]].rename(columns={"variant": "model"})
    )
    plots.plot_bars(path, summary.fillna(0), shown, [columns[name] for name in shown])


TABLES: dict[str, Callable[[Study, pd.DataFrame, pd.DataFrame, Mapping[str, str]], None]] = {
    "robustness": _robustness,
    "interval": _interval,
    "sensitivity": _sensitivity,
    "coldstart": _coldstart,
}
