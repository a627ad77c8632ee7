"""``slifmr train`` and ``run_recbole``: one run."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from recbole_slifmr.cli.options import FREE_SETTINGS, with_options
from recbole_slifmr.errors import SettingError, UnknownSettingWarning
from recbole_slifmr.host.settings import parse_settings, read_settings
from recbole_slifmr.study.tables import metric_title
from recbole_slifmr.training.experiment import Result, run, run_distributed


def print_result(result: Result, console: Console | None = None) -> None:
    """Print the validation and test scores of a run, and where its checkpoint lies."""
    console = console or Console()
    table = Table("metric", title=f"{result.model} on {result.dataset}")
    splits = {"validation": result.valid, "test": result.test}
    splits = {split: scores for split, scores in splits.items() if scores}
    for split in splits:
        table.add_column(split, justify="right")
    for metric in sorted(result.valid or result.test, key=lambda name: int(name.partition("@")[2] or 0)):
        table.add_row(metric_title(metric), *(f"{scores[metric]:.4f}" for scores in splits.values()))
    console.print(table)
    console.print(f"{result.n_epochs} epochs in {result.seconds:.0f} s", highlight=False)
    for label, path in (("checkpoint", result.checkpoint), ("log", result.log_file)):
        if path is not None:
            console.print(f"{label}: {os.path.relpath(path)}", highlight=False, soft_wrap=True)


def _train(
    model: str, dataset: str, config_files: str | None, resume: str | None, arguments: Sequence[str], **distributed: Any
) -> None:
    settings = parse_settings(arguments)
    files = (config_files or "").split()
    chosen: dict[str, Any] = {}
    for file in files:
        chosen.update(read_settings(file))
    model = model or chosen.get("model") or "SLIFMR"
    dataset = dataset or chosen.get("dataset") or "ml-100k"
    warnings.simplefilter("error", UnknownSettingWarning)
    if distributed["nproc"] == 1 and distributed["world_size"] <= 0:
        result = run(model, dataset, files, settings, resume)
    elif resume is not None:
        raise SettingError("--resume works in a single process: leave out --nproc and --world_size")
    else:
        result = run_distributed(model, dataset, files, settings, **distributed)
    print_result(result)


OPTIONS = [
    click.option("--model", "-m", default=None, help="A model of this package or of RecBole.  [SLIFMR]"),
    click.option("--dataset", "-d", default=None, help="Folder under data_path: toy, ml-100k or your own.  [ml-100k]"),
    click.option("--config_files", "--config-files", default=None, help="YAML files of settings, separated by spaces."),
    click.option("--resume", default=None, help="Checkpoint to go on from."),
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
