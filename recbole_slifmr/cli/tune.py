"""``slifmr tune``: a search for hyper-parameters."""

from __future__ import annotations

import os
import re
import warnings
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from recbole_slifmr.cli.options import FREE_SETTINGS, with_options
from recbole_slifmr.errors import SettingError, UnknownSettingWarning
from recbole_slifmr.host.settings import parse_settings
from recbole_slifmr.search.plan import SCHEDULERS, SEARCHES, Search, make_search
from recbole_slifmr.study.tables import metric_title
from recbole_slifmr.training.evaluation import MASKS

if TYPE_CHECKING:
    from recbole_slifmr.search.tune import Outcome, Progress


@click.command(name="tune", context_settings=FREE_SETTINGS)
@with_options(
    click.option("--model", "-m", default="SLIFMR", show_default=True,
                 help="Of this package or of RecBole, or module:Class of your own."),
    click.option("--dataset", "-d", required=True, help="Folder under data_path."),
    click.option("--space", default=None, help="YAML or RecBole's .hyper file.  [properties/tune/MODEL.yaml]"),
    click.option("--trials", default=50, show_default=True, help="Points of the space to try."),
    click.option("--scheduler", default="asha", show_default=True, type=click.Choice(SCHEDULERS),
                 help="Stop bad trials early, let them be, or population-based training."),
    click.option("--search", default="random", show_default=True, type=click.Choice(SEARCHES), help="How points come."),
    click.option("--seeds", default=1, show_default=True, help="Seeds to score the winner on test with; 0: no test."),
    click.option("--jobs", default=None, type=int,
                 help="Trials at a time, which share CPUs and GPUs.  [one per GPU, or per CPU if there are none]"),
    click.option("--resources", default=None, help="Of a trial, instead of --jobs: cpu=1,gpu=0.5."),
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
    jobs: int | None,
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
    from recbole_slifmr.search.tune import run_search

    warnings.simplefilter("error", UnknownSettingWarning)
    search = make_search(
        model, dataset, config_files=config_files.split(), settings=parse_settings(context.args), **options
    )
    with _LiveSearch() as live:
        outcome = run_search(
            search,
            resume,
            jobs,
            parse_resources(resources),
            address,
            dashboard,
            parse_seconds(time_budget),
            live.update,
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
        if not self.live.console.is_terminal:  # where rich leaves the last line open
            self.live.console.line()

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
