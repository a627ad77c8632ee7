"""Time to quality: how long each model trains until it has the best validation score of the first one."""

from __future__ import annotations

import json
import math
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from benchmarks.run import OUTPUT, in_new_process, machine, parse_names, parse_settings, write_json


@dataclass(frozen=True)
class Training:
    """A model to train: its data set, seed, settings and the threads of torch."""

    model: str
    dataset: str
    seed: int
    threads: int
    settings: Mapping[str, Any] = field(default_factory=dict)


def train(training: Training) -> dict[str, Any]:
    """Train a model with early stopping, validating each epoch; the test split is not looked at.

    Returns:
        ``prepared``: seconds until data were read and the model was built. ``curve``: per epoch its number, the seconds
        since the start (``prepared``, validation and refresh included) and the validation score.

    Raises:
        DataError, SettingError: for data or settings that cannot be used.
    """
    from benchmarks.measure import scratch
    from recbole_slifmr.host.settings import make_config
    from recbole_slifmr.training.experiment import prepare

    settings = {"seed": training.seed, "eval_step": 1, "show_progress": False, "state": "ERROR", **training.settings}
    curve: list[tuple[int, float, float]] = []
    with scratch(training.threads):
        config = make_config(training.model, training.dataset, settings=settings)
        start = perf_counter()
        prepared = prepare(config)
        ready = perf_counter() - start
        prepared.trainer.fit(
            prepared.train_data,
            prepared.valid_data,
            saved=False,
            callback_fn=lambda epoch, score: curve.append((epoch, perf_counter() - start, float(score))),
        )
    return {
        "model": training.model,
        "seed": training.seed,
        "learning_rate": config["learning_rate"],
        "valid_metric": config["valid_metric"],
        "prepared": ready,
        "curve": curve,
    }


def reached(curve: Sequence[Sequence[float]], target: float) -> tuple[int, float] | None:
    """Return epoch and seconds of the first validation with at least the target score; None if there is none."""
    return next(((int(epoch), seconds) for epoch, seconds, score in curve if score >= target), None)


def summarise(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return, per run, its best score and when it had the best score of the first model with the same seed."""
    reference = runs[0]["model"]
    targets = {run["seed"]: max(score for *_, score in run["curve"]) for run in runs if run["model"] == reference}
    rows = []
    for run in runs:
        target = targets[run["seed"]]
        there = reached(run["curve"], target)
        rows.append(
            {
                **{name: run[name] for name in ("model", "seed", "learning_rate")},
                "target": target,
                "best": max(score for *_, score in run["curve"]),
                "epochs": len(run["curve"]),
                "seconds": run["curve"][-1][1],
                "seconds_per_epoch": run["curve"][-1][1] / len(run["curve"]),
                "target_epoch": None if there is None else there[0],
                "target_seconds": None if there is None else there[1],
            }
        )
    return rows


@click.command()
@click.option("--dataset", default="lastfm-mm", show_default=True)
@click.option("--data_path", default=None, help="The folder that holds the data set's folder.")
@click.option("--models", default="LightGCN,SLIFMR", show_default=True, callback=parse_names,
              help="The first one sets the target.")  # fmt: skip
@click.option("--learning_rates", multiple=True, default=("LightGCN=0.005",), show_default=True,
              callback=parse_settings, help="MODEL=value; the model's default for the others.")  # fmt: skip
@click.option("--seeds", default="2020", show_default=True, callback=parse_names)
@click.option("--epochs", default=100, show_default=True, help="At most.")
@click.option(
    "--stopping_step", default=10, show_default=True, help="Validations without a better score before the end."
)
@click.option("--threads", default=os.cpu_count() or 1, show_default=True)
@click.option("--set", "settings", multiple=True, callback=parse_settings, help="A setting of every model, name=value.")
@click.option("--out", default=str(OUTPUT / "quality.json"), show_default=True, help="The file of results.")
def main(
    dataset: str, data_path: str | None, models: list[str], learning_rates: dict[str, float], seeds: list[str],
    epochs: int, stopping_step: int, threads: int, settings: dict[str, Any], out: str,
) -> None:  # fmt: skip
    """Train the models one after the other, each in a process of its own, and print when each met the target."""
    common = {"epochs": epochs, "stopping_step": stopping_step, **settings}
    if data_path is not None:
        common["data_path"] = str(Path(data_path).resolve())
    runs = []
    for seed in map(int, seeds):
        for model in models:
            rate = {"learning_rate": learning_rates[model]} if model in learning_rates else {}
            run = in_new_process(train, Training(model, dataset, seed, threads, {**common, **rate}))
            if "error" in run:
                print(f"{model} on {dataset}: {run['error']}", file=sys.stderr)
                sys.exit(2)
            if not run["curve"]:
                print(f"{model} on {dataset}: nothing was validated: is epochs 0?", file=sys.stderr)
                sys.exit(2)
            runs.append(run)
            print(json.dumps(run), flush=True)
    rows = summarise(runs)
    arguments = {"dataset": dataset, "epochs": epochs, "stopping_step": stopping_step, **settings}
    write_json(Path(out), {"machine": machine(threads), "arguments": arguments, "summary": rows, "runs": runs})
    show(rows, runs[0]["valid_metric"], dataset, Console(width=None if sys.stdout.isatty() else 140))
    print(f"written: {os.path.relpath(out)}")


def show(rows: Sequence[Mapping[str, Any]], metric: str, dataset: str, console: Console) -> None:
    """Print the table, and the medians over the seeds where there are several."""
    table = Table(title=f"{dataset}: seconds to {rows[0]['model']}'s best validation {metric}", title_justify="left")
    for title in ("model", "seed", "learning rate", "target", "seconds", "epoch", "best", "epochs", "s per epoch"):
        table.add_column(title, justify="left" if title == "model" else "right")
    for row in rows:
        met = row["target_seconds"] is not None
        table.add_row(
            row["model"], str(row["seed"]), f"{row['learning_rate']:g}", f"{row['target']:.4f}",
            f"{row['target_seconds']:.1f}" if met else "never", str(row["target_epoch"]) if met else "-",
            f"{row['best']:.4f}", str(row["epochs"]), f"{row['seconds_per_epoch']:.2f}",
        )  # fmt: skip
    console.print(table)
    if len({row["seed"] for row in rows}) > 1:
        for model in dict.fromkeys(row["model"] for row in rows):
            times = [
                math.inf if r["target_seconds"] is None else r["target_seconds"] for r in rows if r["model"] == model
            ]
            console.print(f"{model}: median {statistics.median(times):.1f} s")


if __name__ == "__main__":
    main()
