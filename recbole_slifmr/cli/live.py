"""The runs of a benchmark or a study as they go."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import click
from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from recbole_slifmr.study.benchmark import Benchmark
from recbole_slifmr.study.runs import STARTING
from recbole_slifmr.study.task import Task, read_progress

MOST_LINES = 12


class LiveTable:
    """One line per run: a progress bar, epochs so far, best validation score, state.

    Of more than ``MOST_LINES`` runs, those that run or failed, and how many are in which state.
    """

    def __init__(self, tasks: Sequence[Task]) -> None:
        self.tasks = tasks
        self.states: dict[str, str] = {}
        self.doing = "reading the settings"
        self.live = Live(self._table(), console=Console(stderr=True), refresh_per_second=4)

    def __enter__(self) -> LiveTable:
        self.live.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.live.__exit__(*error)
        if not self.live.console.is_terminal:  # where rich leaves the last line open
            self.live.console.line()

    def update(self, states: Mapping[str, str]) -> None:
        """Show the states of the runs."""
        self.states = dict(states)
        self.live.update(self._table())

    def tell(self, words: str) -> None:
        """Show what is being done beside the runs, in a few words; nothing for none."""
        self.doing = words
        self.live.update(self._table(), refresh=True)

    def _table(self) -> Table:
        table = Table("run", "progress", "epochs", "best validation", "state", box=None)
        table.title, table.title_justify = self.doing or None, "left"
        counts = Counter(self._word(task) for task in self.tasks)
        shown = list(self.tasks)
        if len(shown) > MOST_LINES:
            table.caption = ", ".join(f"{number} {word}" for word, number in counts.items())
            shown = [task for task in shown if self._word(task) in ("running", STARTING, "failed")][:MOST_LINES]
        for task in shown:
            points = read_progress(task)
            state = self.states.get(task.name, "waiting")
            n_epochs = task.settings.get("epochs")
            n_epochs = n_epochs if isinstance(n_epochs, int) else 300  # what is wrong with it is said by its check
            done = n_epochs if state == "done" else len(points)
            best = next((f"{point.score:.4f}" for point in reversed(points) if point.best), "")
            bar = ProgressBar(total=n_epochs, completed=done, width=24)
            table.add_row(task.name, bar, str(len(points) or ""), best, state)
        return table

    def _word(self, task: Task) -> str:
        state = self.states.get(task.name, "waiting")
        return state if state in ("done", "running", STARTING, "waiting") else "failed"


def run_live(plan: Benchmark, run: Callable[..., Any]) -> None:
    """Show the runs of a plan as they go, then print its table, which says which failed, and where the outputs are.

    Args:
        plan: what is run.
        run: runs it; called with ``on_tick``, which is to be told the states of the runs, and ``tell``, which is to be
            told what else is done.

    Raises:
        click.ClickException: if a run failed.
    """
    with LiveTable(plan.tasks) as live:
        run(on_tick=live.update, tell=live.tell)
        live.tell("")
    failed = [name for name, state in live.states.items() if state != "done"]
    table = plan.out / "table.md"
    if len(failed) == len(live.states):
        raise click.ClickException(f"every run failed; the first: {live.states[failed[0]]}")
    click.echo(table.read_text(encoding="utf-8"))
    click.echo(f"outputs: {os.path.relpath(plan.out)}")
    if failed:
        raise click.ClickException(
            f"{len(failed)} of {len(live.states)} runs failed; the first, {failed[0]}: {live.states[failed[0]]}"
        )
