"""The runs of a benchmark or a study as they go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from recbole_slifmr.runs import Task, read_progress


class LiveTable:
    """One line per run: a progress bar, epochs so far, best validation score, state."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        self.tasks = tasks
        self.states: dict[str, str] = {}
        self.live = Live(self._table(), console=Console(stderr=True), refresh_per_second=4)

    def __enter__(self) -> LiveTable:
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
