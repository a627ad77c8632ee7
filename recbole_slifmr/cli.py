"""The commands: parsing and printing, nothing else."""

from __future__ import annotations

import ast
import os
import re
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click
import yaml
from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from recbole_slifmr import __version__
from recbole_slifmr.errors import DataError, ProcessError, SettingError, UnknownSettingWarning
from recbole_slifmr.evaluation import MASKS
from recbole_slifmr.experiment import Result, read_settings, run, run_distributed
from recbole_slifmr.report import metric_title
from recbole_slifmr.search import SCHEDULERS, SEARCHES, Search, make_search
from recbole_slifmr.study import Task, read_progress

if TYPE_CHECKING:
    from recbole_slifmr.tune import Outcome, Progress

FAILED, BAD_INPUT = 1, 2
_FREE_SETTINGS = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": ["-h", "--help"]}


def parse_settings(arguments: Sequence[str]) -> dict[str, Any]:
    """Read ``--name=value`` and ``--name value`` pairs.

    A value is read as Python (``1e-3``, ``['a', 'b']``, ``None``), else as YAML (``{text: text.npy}``, ``true``), else
    as a string.

    Raises:
        SettingError: for anything else on the command line, or a setting given twice.
    """
    settings: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--"):
            raise SettingError(f"unexpected argument '{argument}': settings read --name=value")
        name, equals, value = argument[2:].partition("=")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise SettingError(f"'{argument}' has no value: settings read --name=value")
            value = rest.pop(0)
        if name in settings:
            raise SettingError(f"'--{name}' is given twice")
        settings[name] = _parse_value(value)
    return settings


def _parse_value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        pass
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    return value if isinstance(value, (bool, dict, list)) else text


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


_OPTIONS = [
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


def _with_options(*options: Any) -> Any:
    def decorate(function: Any) -> Any:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="slifmr")
def slifmr() -> None:
    """Recommend from interactions, a knowledge graph and item features together."""


@slifmr.command(context_settings=_FREE_SETTINGS)
@_with_options(*_OPTIONS)
@click.pass_context
def train(context: click.Context, **options: Any) -> None:
    """Train a model and score it: slifmr train --model=SLIFMR --dataset=toy --epochs=5.

    Any setting of RecBole or of the model is given as --name=value.
    """
    _train(arguments=context.args, **options)


@slifmr.command(name="benchmark", context_settings=_FREE_SETTINGS)
@_with_options(
    click.option("--dataset", "-d", required=True, help="Folder under data_path."),
    click.option("--models", "-m", required=True, help="Names with commas between them: SLIFMR,LightGCN,KGAT,LATTICE."),
    click.option("--seeds", default=5, show_default=True, help="Training seeds per model."),
    click.option("--out", default="benchmark", show_default=True, help="Folder of the outputs; finished runs stay."),
    click.option("--config_files", "--config-files", default="", help="YAML files of settings for all models."),
    click.option("--params", default=None, help="Folder with MODEL.yaml or MODEL/best.yaml: tuned settings."),
    click.option("--test_mask", "--test-mask", default=MASKS[0], show_default=True, type=click.Choice(MASKS),
                 help="Items never ranked at test time."),
    click.option("--threads", default=1, show_default=True, help="CPU threads per run."),
    click.option("--jobs", default=1, show_default=True, help="Runs at a time, as Ray tasks if more than one."),
    click.option("--address", default=None, help="Running Ray cluster that sees the same files."),
)  # fmt: skip
@click.pass_context
def benchmark_command(context: click.Context, dataset: str, models: str, config_files: str, **options: Any) -> None:
    """Compare models: slifmr benchmark --dataset=ml-100k --models=SLIFMR,LightGCN --seeds=2 --epochs=5.

    Any setting for all models is given as --name=value.
    """
    from recbole_slifmr.benchmark import make_plan, run_plan

    warnings.simplefilter("error", UnknownSettingWarning)
    names = [name.strip() for name in models.split(",") if name.strip()]
    running = {name: options.pop(name) for name in ("jobs", "address")}
    plan = make_plan(
        dataset, names, config_files=config_files.split(), settings=parse_settings(context.args), **options
    )
    with _LiveTable(plan.tasks) as live:
        run_plan(plan, on_tick=live.update, **running)
    failed = [name for name, state in live.states.items() if state != "done"]
    table = plan.out / "table.md"
    if table.is_file():
        click.echo(table.read_text(encoding="utf-8"))
        click.echo(f"outputs: {os.path.relpath(plan.out)}")
    if len(failed) == len(live.states):
        raise click.ClickException(f"every run failed; the first: {live.states[failed[0]]}")


class _LiveTable:
    """One line per run: a progress bar, epochs so far, best validation score, state."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        self.tasks = tasks
        self.states: dict[str, str] = {}
        self.live = Live(self._table(), console=Console(stderr=True), refresh_per_second=4)

    def __enter__(self) -> _LiveTable:
        self.live.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.live.__exit__(*error)

    def update(self, states: Mapping[str, str]) -> None:
        """Show the states of the runs."""
        self.states = dict(states)
        self.live.update(self._table())

    def _table(self) -> Table:
        table = Table("run", "progress", "epochs", "best validation", "state", box=None)
        for task in self.tasks:
            points = read_progress(task)
            state = self.states.get(task.name, "waiting")
            n_epochs = int(task.settings.get("epochs", 300))
            done = n_epochs if state == "done" else len(points)
            best = f"{max(point[2] for point in points):.4f}" if points else ""
            bar = ProgressBar(total=n_epochs, completed=done, width=24)
            table.add_row(task.name, bar, str(len(points) or ""), best, state)
        return table


@slifmr.command(name="tune", context_settings=_FREE_SETTINGS)
@_with_options(
    click.option("--model", "-m", default="SLIFMR", show_default=True, help="A model of this package or of RecBole."),
    click.option("--dataset", "-d", required=True, help="Folder under data_path."),
    click.option("--space", default=None, help="YAML or RecBole's .hyper file.  [properties/tune/MODEL.yaml]"),
    click.option("--trials", default=50, show_default=True, help="Points of the space to try."),
    click.option("--scheduler", default="asha", show_default=True, type=click.Choice(SCHEDULERS),
                 help="Stop bad trials early, let them be, or population-based training."),
    click.option("--search", default="random", show_default=True, type=click.Choice(SEARCHES), help="How points come."),
    click.option("--seeds", default=1, show_default=True, help="Seeds to score the winner on test with; 0: no test."),
    click.option("--resources", default=None, help="Of a trial: cpu=1,gpu=0.5.  [a CPU, or a GPU if there are any]"),
    click.option("--address", default=None, help="Running Ray cluster that sees the same files; auto finds it."),
    click.option("--dashboard", is_flag=True, help="Open Ray's dashboard, on this machine only."),
    click.option("--time_budget", "--time-budget", default=None, help="90s, 30m, 2h: no trial goes on for longer."),
    click.option("--resume", is_flag=True, help="Go on with the interrupted search in --out."),
    click.option("--out", default="tune", show_default=True, help="Folder of the outputs."),
    click.option("--config_files", "--config-files", default="", help="YAML files of settings for all trials."),
    click.option("--test_mask", "--test-mask", default=MASKS[0], show_default=True, type=click.Choice(MASKS),
                 help="Items never ranked at test time."),
)  # fmt: skip
@click.pass_context
def tune_command(
    context: click.Context,
    model: str,
    dataset: str,
    config_files: str,
    resume: bool,
    resources: str | None,
    address: str | None,
    dashboard: bool,
    time_budget: str | None,
    **options: Any,
) -> None:
    """Search for hyper-parameters: slifmr tune --model=SLIFMR --dataset=ml-100k --trials=8 --epochs=10.

    Trials see training and validation only; the winner alone is scored on test. Any setting for all trials is given as
    --name=value.
    """
    from recbole_slifmr.tune import run_search

    warnings.simplefilter("error", UnknownSettingWarning)
    search = make_search(
        model, dataset, config_files=config_files.split(), settings=parse_settings(context.args), **options
    )
    with _LiveSearch() as live:
        outcome = run_search(
            search, resume, parse_resources(resources), address, dashboard, parse_seconds(time_budget), live.update
        )
    if outcome.best_file is None:
        raise click.ClickException(f"every trial failed; the first: {outcome.first_error or 'none was run'}")
    print_outcome(outcome, search)
    if outcome.failures:
        run_name, reason = next(iter(outcome.failures.items()))
        raise click.ClickException(f"the winner could not be scored with {run_name}: {reason}; --resume tries again")


def parse_resources(text: str | None) -> dict[str, float] | None:
    """Read ``cpu=1,gpu=0.5``."""
    try:
        return {name.strip(): float(value) for name, value in (p.split("=") for p in text.split(","))} if text else None
    except ValueError:
        raise SettingError(f"--resources reads cpu=1,gpu=0, not '{text}'") from None


def parse_seconds(text: str | None) -> float | None:
    """Read ``90s``, ``30m``, ``2h`` or a number of seconds."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text.strip())
    if not match or not float(match[1]):
        raise SettingError(f"--time_budget reads 90s, 30m or 2h, not '{text}'")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]


def print_outcome(outcome: Outcome, search: Search, console: Console | None = None) -> None:
    """Print the best trials of a search, the winner's test scores and where the outputs lie."""
    console = console or Console()
    trials = Table("trial", "status", "epochs", "best epoch", "validation", title=f"{search.model} on {search.dataset}")
    scored = outcome.trials[outcome.trials["score"].notna()]
    for row in scored.head(10).itertuples():
        trials.add_row(row.trial, row.status, f"{row.epochs:.0f}", f"{row.best_epoch:.0f}", f"{row.score:.4f}")
    console.print(trials)
    counts = outcome.trials["status"].value_counts()
    console.print(", ".join(f"{number} {status}" for status, number in counts.items()), highlight=False)
    settings = Table("setting", "the winner's", "importance")
    for name in [name for name in search.space if name in outcome.point]:
        weight = "" if outcome.importance is None else f"{outcome.importance.get(name, 0):.2f}"
        settings.add_row(
            name,
            f"{outcome.point[name]:.4g}" if isinstance(outcome.point[name], float) else str(outcome.point[name]),
            weight,
        )
    console.print(settings)
    if len(outcome.runs):
        columns = [name for name in outcome.runs if name.startswith("test_") and "/" not in name]
        scores = Table("metric", "test", title=f"the winner, {len(outcome.runs)} seed{'s'[: len(outcome.runs) - 1]}")
        for name in columns:
            values_of = outcome.runs[name]
            spread = f" ± {values_of.std():.4f}" if len(values_of) > 1 else ""
            scores.add_row(metric_title(name.removeprefix("test_")), f"{values_of.mean():.4f}{spread}")
        console.print(scores)
        again, before = outcome.runs["valid_" + outcome.metric].iloc[0], scored["score"].iloc[0]
        console.print(f"validation {metric_title(outcome.metric)}: {again}, in the search {before}", highlight=False)
    console.print(f"outputs: {os.path.relpath(search.out)}", highlight=False, soft_wrap=True)
    console.print(f"run it: slifmr train --config_files {os.path.relpath(search.out / 'best.yaml')}", highlight=False)


class _LiveSearch:
    """A line with the trials done, running, stopped and failed, and the best validation score so far."""

    def __init__(self) -> None:
        self.live = Live(console=Console(stderr=True), refresh_per_second=4)

    def __enter__(self) -> _LiveSearch:
        self.live.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.live.__exit__(*error)

    def update(self, progress: Progress) -> None:
        """Show how far the search is."""
        ended = progress.finished + progress.stopped + progress.failed
        table = Table.grid(padding=(0, 2))
        best = f"best {progress.best:.4f}" if progress.best is not None else ""
        table.add_row(
            ProgressBar(total=progress.total, completed=ended, width=24),
            f"{ended}/{progress.total} trials",
            f"{progress.running} running",
            f"{progress.stopped} stopped early",
            f"{progress.failed} failed",
            best,
        )
        self.live.update(table)


@click.command(context_settings=_FREE_SETTINGS)
@_with_options(*_OPTIONS)
@click.pass_context
def _run_recbole(context: click.Context, **options: Any) -> None:
    """Run a model as RecBole's run_recbole.py does: run_recbole --model=SLIFMR --dataset=ml-100k.

    Any setting of RecBole or of the model is given as --name=value.
    """
    _train(arguments=context.args, **options)


def _invoke(command: click.Command, name: str, arguments: Sequence[str] | None) -> int:
    """Run a command; return its exit status, 2 with one line on stderr for bad input."""
    try:
        command.main(list(sys.argv[1:] if arguments is None else arguments), prog_name=name, standalone_mode=False)
    except (DataError, SettingError, UnknownSettingWarning) as error:
        click.echo(f"error: {error}", err=True)
        return BAD_INPUT
    except ProcessError as error:
        click.echo("\n".join(getattr(error, "__notes__", ())), err=True, nl=False)
        click.echo(f"error: {error}", err=True)
        return FAILED
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("stopped", err=True)
        return 130
    return 0


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``slifmr``."""
    sys.exit(_invoke(slifmr, "slifmr", arguments))


def run_recbole(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``run_recbole``."""
    sys.exit(_invoke(_run_recbole, "run_recbole", arguments))


def door(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``run_recbole_slifmr.py``: a command of ``slifmr`` if one is named, else ``run_recbole``."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments and not arguments[0].startswith("-"):
        main(arguments)
    run_recbole(arguments)
