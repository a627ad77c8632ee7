"""What a search leaves behind: tables of trials and reports, the winner's settings as a file, plots."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import yaml

from recbole_slifmr.files import read_lines, replace_file, to_json, write_csv
from recbole_slifmr.search.plan import Search
from recbole_slifmr.search.space import Point
from recbole_slifmr.study import plots, statistics, tables


class Outcome(NamedTuple):
    """What a search gave.

    Attributes:
        metric: what trials are compared by.
        trials: one row per trial, best first.
        best_file: ``best.yaml``; None if every trial failed.
        point: the winner's settings.
        importance: of each setting, see :func:`~recbole_slifmr.study.tables.importance`.
        runs: one row per seed of the winner, with its test scores.
        failures: why a seed of the winner has none, by run.
    """

    metric: str
    trials: pd.DataFrame
    best_file: Path | None
    point: Point
    importance: pd.Series | None
    runs: pd.DataFrame
    failures: dict[str, str]

    @property
    def first_error(self) -> str | None:
        """Why the first of the failed trials failed."""
        errors = self.trials.sort_values("trial")["error"].dropna()
        return None if errors.empty else str(errors.iloc[0])


class Ended(NamedTuple):
    """A trial that does not run any more, with its settings and why it failed, if it did."""

    trial: str
    point: Point
    error: str | None


def write_report(search: Search, trial: str, entry: Mapping[str, Any]) -> None:
    """Write down what a trial reported, on a line of its own whatever was cut off before."""
    with (search.reports / f"{trial}.jsonl").open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read() != b"\n":
                file.write(b"\n")
        file.write((to_json(entry) + "\n").encode())


def read_reports(search: Search, trial: str) -> list[dict[str, Any]]:
    """Return what a trial reported, once for an epoch that was repeated; a line that was cut off is left out."""
    entries = read_lines(search.reports / f"{trial}.jsonl")
    return list({entry["epoch"]: entry for entry in entries if isinstance(entry, dict)}.values())


def last_reports(search: Search) -> dict[str, dict[str, Any]]:
    """Return the last report of each trial that is done: it finished, or ``write_done`` was called."""
    trials = {file.stem: read_reports(search, file.stem) for file in search.reports.glob("*.jsonl")}
    return {
        name: reports[-1]
        for name, reports in trials.items()
        if reports and (reports[-1]["finished"] or (search.reports / f"{name}.done").exists())
    }


def write_done(search: Search, trial: str) -> None:
    """Note that a trial is done, whether it finished or was stopped."""
    (search.reports / f"{trial}.done").touch()


def write_tables(search: Search, ended: Sequence[Ended]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Write ``trials.csv``, one row per trial, best first, and ``history.parquet``, one per trial and report."""
    sign = 1 if search.bigger else -1

    def rank(entry: Mapping[str, Any]) -> tuple[float, int]:
        """Order reports as the trainer does: of equal scores the later; one without a number comes last."""
        return -math.inf if entry["score"] is None else sign * entry["score"], entry["epoch"]

    rows, lines = [], []
    for name, point, error in ended:
        reports = read_reports(search, name)
        last = reports[-1] if reports else {}
        best = max(reports, key=rank, default={})
        rows.append(
            {
                "trial": name,
                "status": _status(error, last),
                "score": best.get("score"),
                "best_epoch": best.get("epoch"),
                "epochs": last.get("epoch", 0),
                **{
                    key: last.get(key)
                    for key in ("seconds", "setup_seconds", "first_epoch_seconds", "memory_mb", "node")
                },
                "error": error,
                **best.get("used", point),
                **{f"valid_{metric}": value for metric, value in best.get("valid", {}).items()},
            }
        )
        lines += [
            {
                "trial": name,
                **{key: entry[key] for key in ("epoch", "score", "best_score", "seconds")},
                **{f"valid_{metric}": value for metric, value in entry["valid"].items()},
                **entry["used"],
            }
            for entry in reports
        ]
    trials, history = pd.DataFrame(rows), pd.DataFrame(lines)
    trials = trials.sort_values(["score", "trial"], ascending=[sign < 0, True], ignore_index=True)
    for name in search.space:
        if name in history and history[name].dtype == object:  # parquet takes one type per column
            history[name] = history[name].map(str, na_action="ignore")
    write_csv(search.out / "trials.csv", trials)
    replace_file(search.out / "history.parquet", lambda part: history.to_parquet(part, index=False))
    return trials, history


def _status(error: str | None, last: Mapping[str, Any]) -> str:
    if error is not None:
        return "failed"
    return "not run" if not last else "finished" if last["finished"] else "stopped"


def write_best(search: Search, ranked: pd.DataFrame, device: Mapping[str, Any]) -> tuple[Path, Point]:
    """Write the winner's settings as a file for ``--config_files`` and the benchmark's ``--params``; return both.

    Args:
        search: what was tried.
        ranked: the rows of the trials that have a score, best first.
        device: settings that say where it ran, which its last digits depend on.
    """
    winner = ranked.iloc[0]
    point = next(
        entry["used"] for entry in read_reports(search, winner["trial"]) if entry["epoch"] == winner["best_epoch"]
    )
    config = search.config(point)
    given = {
        name: value for name, value in config.external_config_dict.items() if name not in ("show_progress", "state")
    }
    settings = {
        "model": search.model,
        "dataset": search.dataset,
        **given,
        **{name: config[name] for name in ("seed", "epochs", "stopping_step", "eval_step", "valid_metric")},
        **device,
    }
    metric = tables.metric_title(config["valid_metric"].lower())
    lines = [
        f"# slifmr tune: {search.model} on {search.dataset}, search {search.search}, scheduler {search.scheduler}",
        f"# trials: {len(ranked)}",
        f"# validation {metric}: {winner['score']} at epoch {winner['best_epoch']}, trial {winner['trial']}",
    ]
    if winner["status"] == "stopped":
        lines.append(f"# the trial was stopped after {winner['epochs']} epochs: a run goes on and may score higher")
    if search.scheduler == "pbt":
        lines.append(
            "# population-based training changed settings on the way (history.parquet): these are its best epoch's"
        )
    path = search.out / "best.yaml"
    text = "\n".join(lines) + "\n" + yaml.safe_dump(settings, sort_keys=False)
    replace_file(path, lambda part: part.write_text(text, encoding="utf-8"))
    return path, point


def plot(search: Search, trials: pd.DataFrame, history: pd.DataFrame) -> pd.Series | None:
    """Draw the trials, of which the first is the winner; return the importance of the settings."""
    metric = search.metric
    names = list(search.space)
    plots.plot_search(search.out / "history.png", history, trials["trial"].iloc[0], metric)
    plots.plot_parallel(search.out / "parallel.html", trials, names, metric)
    scores = statistics.importance(trials, names)
    if scores is not None:
        plots.plot_importance(search.out / "importance.png", scores, metric, int(trials["score"].notna().sum()))
    return scores
