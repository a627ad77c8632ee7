"""``slifmr train`` and ``run_recbole``: one run."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from recbole_slifmr.cli.options import FREE_SETTINGS, with_options
from recbole_slifmr.errors import SettingError, UnknownSettingWarning
from recbole_slifmr.host.settings import parse_settings, read_settings
from recbole_slifmr.study.tables import metric_title
from recbole_slifmr.training.experiment import Prepared, Result, run
from recbole_slifmr.training.log import ignore_deprecations
from recbole_slifmr.training.parallel import run_distributed


def print_start(prepared: Prepared) -> None:
    """Print what is about to be trained on what."""
    config, data = prepared.config, prepared.train_data._dataset
    counts = (
        f"{len(loader._dataset)} {name}"
        for name, loader in zip(("training", "validation", "test"), prepared[1:4], strict=True)
    )
    n_items = data.item_num - 1
    click.echo(f"{config['model']} on {config['dataset']}: {data.user_num - 1} users, {n_items} items")
    click.echo(f"{', '.join(counts)} interactions")
    inputs = []
    if getattr(data, "has_kg", False):
        linked = f"{len(data.item2entity)} of {n_items} items linked"
        inputs.append(f"knowledge graph: {len(data.triples)} triples, {linked}")
    inputs += [
        f"{name}: {int(of.mask.sum())} of {n_items} items" for name, of in getattr(data, "item_features", {}).items()
    ]
    if inputs:
        click.echo("; ".join(inputs))


class EpochBar:
    """A progress bar of epochs with the best validation score so far; on a terminal only, on stderr.

    Args:
        shown: whether to show it where there is a terminal.
    """

    def __init__(self, shown: bool) -> None:
        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), TextColumn("{task.fields[best]}"))
        self.progress = Progress(
            *columns, TimeElapsedColumn(), console=console, transient=True, disable=not (shown and console.is_terminal)
        )
        self.task = self.progress.add_task("reading the data", total=None, best="")
        self.n_epochs, self.metric = 0, ""

    def start(self, prepared: Prepared) -> None:
        """Print what is trained, then show the epochs."""
        print_start(prepared)
        self.n_epochs, self.metric = prepared.trainer.epochs, prepared.config["valid_metric"]
        if not prepared.config["show_progress"]:
            self.progress.stop()
        self.progress.update(self.task, description="training")

    def advance(self, epoch: int, seconds: float, score: float, is_best: bool) -> None:
        """Show that an epoch was validated."""
        self.progress.update(
            self.task, description=f"epoch {epoch + 1} of {self.n_epochs}", total=self.n_epochs, completed=epoch + 1
        )
        if is_best:
            self.progress.update(self.task, best=f"best {self.metric} {score:.4f}")


def print_result(result: Result, console: Console | None = None) -> None:
    """Print the best epoch of a run, its scores, one or two cutoffs in a row, and where its checkpoint and log lie."""
    console = console or Console()
    best = "" if result.best_epoch is None else f"; best: epoch {result.best_epoch}, counted from 0"
    title = f"{result.model} on {result.dataset}: {result.n_epochs} epochs in {result.seconds:.0f} s{best}"
    console.print(title, highlight=False, soft_wrap=True)
    table = Table("metric", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    splits = {"validation": result.valid, "test": result.test}
    splits = {split: scores for split, scores in splits.items() if scores}
    for split in splits:
        table.add_column(split, justify="right")
    for names in _rows(list(result.valid or result.test)):
        cells = (" / ".join(f"{scores[name]:.4f}" for name in names) for scores in splits.values())
        cutoffs = [f"@{name.partition('@')[2]}" for name in names[1:]]
        table.add_row(" / ".join([metric_title(names[0]), *cutoffs]), *cells)
    console.print(table)
    for label, path in (("checkpoint", result.checkpoint), ("log", result.log_file)):
        if path is not None:
            console.print(f"{label}: {os.path.relpath(path)}", highlight=False, soft_wrap=True)


def _rows(names: Sequence[str]) -> list[list[str]]:
    """Return which metrics share a row: two cutoffs of one metric; more would be too wide."""
    names = sorted(names, key=lambda name: int(name.partition("@")[2] or 0))
    by_metric: dict[str, list[str]] = {}
    for name in names:
        by_metric.setdefault(name.partition("@")[0], []).append(name)
    few = all(len(group) <= 2 for group in by_metric.values())
    return list(by_metric.values()) if few else [[name] for name in names]


def _train(
    model: str | None,
    dataset: str | None,
    config_files: str | None,
    resume: str | None,
    verbose: bool,
    arguments: Sequence[str],
    **distributed: Any,
) -> None:
    settings = parse_settings(arguments)
    files = (config_files or "").split()
    chosen: dict[str, Any] = {}
    for file in files:
        chosen.update(read_settings(file))
    model = chosen.get("model", "SLIFMR") if model is None else model
    dataset = chosen.get("dataset", "ml-100k") if dataset is None else dataset
    warnings.simplefilter("error", UnknownSettingWarning)
    with _no_deprecations(not verbose):
        if distributed["nproc"] == 1 and distributed["world_size"] <= 0:
            bar = EpochBar(shown=not verbose)
            with bar.progress:
                result = run(
                    model, dataset, files, settings, resume,
                    on_valid=bar.advance, quiet=not verbose, on_start=bar.start,
                )  # fmt: skip
        elif resume is not None:
            raise SettingError("--resume works in a single process: leave out --nproc and --world_size")
        else:
            result = run_distributed(
                model, dataset, files, settings, **distributed, quiet=not verbose, on_start=print_start
            )
    print_result(result)


@contextlib.contextmanager
def _no_deprecations(wished: bool) -> Iterator[None]:
    """Leave the filters of warnings as they were."""
    with warnings.catch_warnings():
        if wished:
            ignore_deprecations()
        yield


OPTIONS = [
    click.option(
        "--model", "-m", default=None, help="Of this package or of RecBole, or module:Class of your own.  [SLIFMR]"
    ),
    click.option("--dataset", "-d", default=None, help="Folder under data_path: toy, ml-100k or your own.  [ml-100k]"),
    click.option("--config_files", "--config-files", default=None, help="YAML files of settings, separated by spaces."),
    click.option("--resume", default=None, help="Checkpoint to go on from."),
    click.option(
        "--verbose", is_flag=True, help="Print the whole log with all settings and epochs, not only its file."
    ),
    click.option("--nproc", default=1, help="Processes on this machine: one GPU each, or all on the CPU.  [1]"),
    click.option("--ip", default=None, help="Address of the first of several machines."),
    click.option("--port", default=None, type=int, help="Port of the first of several machines."),
    click.option("--world_size", "--world-size", default=-1, help="Processes on all machines.  [nproc]"),
    click.option("--group_offset", "--group-offset", default=0, help="Rank of this machine's first process.  [0]"),
]


@click.command(context_settings=FREE_SETTINGS)
@with_options(*OPTIONS)
@click.pass_context
def train(context: click.Context, **options: Any) -> None:
    """Train a model and score it: slifmr train --model=SLIFMR --dataset=toy --epochs=5.

    Any setting of RecBole or of the model is given as --name=value.
    """
    _train(arguments=context.args, **options)


@click.command(context_settings=FREE_SETTINGS)
@with_options(*OPTIONS)
@click.pass_context
def run_recbole(context: click.Context, **options: Any) -> None:
    """Run a model as RecBole's run_recbole.py does: run_recbole --model=SLIFMR --dataset=ml-100k.

    Any setting of RecBole or of the model is given as --name=value.
    """
    _train(arguments=context.args, **options)
