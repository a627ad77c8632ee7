"""Callbacks: what happens between epochs.

A callback is any object with the hooks of :class:`Callback`. ``SLIFMRTrainer`` calls them in the order of the list:
the trainer's own first, then those that the setting ``callbacks`` names as ``package.module:ClassName``.
"""

from __future__ import annotations

import math
from logging import getLogger
from time import perf_counter
from typing import Any

from recbole.trainer import Trainer

from recbole_slifmr.errors import SettingError
from recbole_slifmr.host.own import import_here
from recbole_slifmr.training.distributed import from_first, rank_and_count


class Callback:
    """Hooks that do nothing; override those you need.

    Attributes:
        trace: name under which a run's result shows ``history``; None shows nothing.
        history: what the callback noted, one entry of numbers per event, from the first epoch on.
    """

    trace: str | None = None
    history: list[dict[str, float]] = []

    def on_train_start(self, trainer: Trainer) -> None:
        """Run once before the first epoch, also of a resumed run."""

    def on_epoch_start(self, trainer: Trainer, epoch: int) -> None:
        """Run before each training epoch."""

    def on_epoch_end(self, trainer: Trainer, epoch: int, losses: dict[str, float]) -> None:
        """Run after each training epoch, before validation and saving; ``losses`` are summed over the batches."""

    def on_valid_end(self, trainer: Trainer, epoch: int, score: float, result: dict[str, float]) -> None:
        """Run after each validation, before saving."""

    def on_fit_end(self, trainer: Trainer) -> None:
        """Run once after the last epoch."""

    def on_run_end(self, trainer: Trainer, result: Any) -> None:
        """Run once when the best epoch is scored on test; ``result`` is that of the run, not of a search's trial."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to go on as if it had not stopped; numbers and strings."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` gave."""


class PruningCallback(Callback):
    """Draw anew, for every epoch, which interactions are left out of training propagation.

    The draw depends on ``seed`` and the epoch alone, so that a resumed run draws as the uninterrupted one.

    Args:
        seed: RecBole's ``seed``.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_epoch_start(self, trainer: Trainer, epoch: int) -> None:
        """Draw for the epoch."""
        trainer.model.prune_interactions(self.seed * 1_000_003 + epoch)


class _StatefulCallback(Callback):
    """A callback whose state is reset when training starts, unless ``load_state_dict`` has just restored it."""

    _restored = False

    def _reset(self) -> None:
        raise NotImplementedError

    def on_train_start(self, trainer: Trainer) -> None:
        """Reset the state, unless a checkpoint was resumed."""
        if not self._restored:
            self._reset()
        self._restored = False


class DiagnosticsCallback(_StatefulCallback):
    """Write the model's signs of failure to TensorBoard and warn, once each, when one shows.

    Runs first after an epoch, on the graphs that the epoch was trained with.
    """

    LIMITS = {"homogenisation": 0.95, "smoothing": 0.9}
    trace = "diagnostics"

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self.warned: set[str] = set()
        self.history = []

    def on_epoch_end(self, trainer: Trainer, epoch: int, losses: dict[str, float]) -> None:
        """Measure, write, warn."""
        found = trainer.model.diagnostics()
        self.history.append({"epoch": epoch, **found})
        for name, value in found.items():
            trainer.tensorboard.add_scalar(f"Diagnostics/{name}", value, epoch)
            limit = self.LIMITS[name]
            if value > limit and name not in self.warned:
                self.warned.add(name)
                getLogger().warning(f"epoch {epoch}: {name} is {value:.3f} (above {limit}): representations collapse")

    def state_dict(self) -> dict[str, Any]:
        """Return what was measured."""
        return {"history": self.history}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        self.history = list(state.get("history", []))
        self.warned = {
            name for name, limit in self.LIMITS.items() if any(found[name] > limit for found in self.history)
        }
        self._restored = True


def refresh_graphs(model: Any) -> Any:
    """Refresh the graphs of a model; of several processes the first does, and the others take over its graphs.

    Returns:
        what ``model.refresh_graphs()`` returned.
    """
    rank, count = rank_and_count()
    if count == 1:
        return model.refresh_graphs()
    stats, graphs = None, {}
    if rank == 0:
        stats = model.refresh_graphs()
        graphs = {name: value.cpu() for name, value in model.other_parameter().items()}
    stats, graphs = from_first((stats, graphs))
    if rank != 0:
        model.load_other_parameter(graphs)
    return stats


class SelfLoopCallback(_StatefulCallback):
    """The self-loop of SLIF-MR: after an epoch, feed what the model learned back into its graphs.

    Calls ``model.refresh_graphs()``, in the first of several processes, and logs edges, turnover and seconds. With
    ``interval: adaptive`` the gap between refreshes doubles, up to ``max_gap`` epochs, while the correlation graph
    hardly changes (turnover below ``low``), and halves while it changes much (above ``high``). A validation score that
    does not improve for ``patience`` evaluations brings the next refresh forward.

    Args:
        first_epoch: index of the first epoch (from 0) that ends with a refresh.
        interval: epochs from one refresh to the next, or ``adaptive``.
        low: turnover below which the adaptive gap doubles.
        high: turnover above which the adaptive gap halves.
        max_gap: longest adaptive gap in epochs.
        patience: evaluations without a better score that bring an adaptive refresh forward.

    Raises:
        SettingError: for an interval that is neither a positive number nor ``adaptive``.
    """

    trace = "refreshes"

    def __init__(
        self,
        first_epoch: int = 0,
        interval: int | str = 1,
        low: float = 0.1,
        high: float = 0.3,
        max_gap: int = 16,
        patience: int = 3,
    ) -> None:
        if interval != "adaptive" and not (type(interval) is int and interval >= 1):
            raise SettingError(f"refresh_interval must be a positive whole number or 'adaptive', not {interval!r}")
        if type(first_epoch) is not int or first_epoch < 0:
            raise SettingError(f"refresh_first_epoch must be a whole number from 0, not {first_epoch!r}")
        self.first_epoch, self.interval = first_epoch, interval
        self.adaptive = interval == "adaptive"
        self.low, self.high, self.max_gap, self.patience = low, high, max_gap, patience
        self._reset()

    def _reset(self) -> None:
        self.gap = 1 if self.adaptive else int(self.interval)
        self.next_epoch = self.first_epoch
        self.n_refreshes = 0
        self.history = []
        self.best_score, self.n_stalled = -math.inf, 0

    def on_epoch_end(self, trainer: Trainer, epoch: int, losses: dict[str, float]) -> None:
        """Refresh the graphs if it is time."""
        if epoch < self.next_epoch:
            return
        start = perf_counter()
        stats = refresh_graphs(trainer.model)
        seconds = perf_counter() - start
        if self.adaptive and self.n_refreshes:
            if stats.turnover < self.low:
                self.gap = min(self.gap * 2, self.max_gap)
            elif stats.turnover > self.high:
                self.gap = max(self.gap // 2, 1)
        self.n_refreshes += 1
        self.next_epoch = epoch + self.gap
        getLogger().info(
            f"epoch {epoch} refresh: {stats.edges} edges, turnover {stats.turnover:.3f}, {seconds:.2f}s"
            + (f", recall of neighbours {stats.recall:.3f}" if stats.recall < 1 else "")
            + (f", next after epoch {self.next_epoch}" if self.adaptive else "")
        )
        entry = {"edges": stats.edges, "turnover": stats.turnover, "seconds": seconds}
        self.history.append({"epoch": epoch, **entry})
        for name, value in entry.items():
            trainer.tensorboard.add_scalar(f"Refresh/{name}", value, epoch)

    def on_valid_end(self, trainer: Trainer, epoch: int, score: float, result: dict[str, float]) -> None:
        """Count the evaluations without a better score; bring an adaptive refresh forward when they are too many."""
        value = score if trainer.valid_metric_bigger else -score
        if value > self.best_score:
            self.best_score, self.n_stalled = value, 0
            return
        self.n_stalled += 1
        if self.adaptive and self.n_stalled == self.patience and self.n_refreshes:
            self.next_epoch = min(self.next_epoch, epoch + 1)

    def state_dict(self) -> dict[str, Any]:
        """Return when the next refresh is due and why."""
        names = ["next_epoch", "n_refreshes", "best_score", "n_stalled", "history", *(["gap"] if self.adaptive else [])]
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state; ``next_epoch`` may lie in the past."""
        for name in self.state_dict():
            setattr(self, name, state.get(name, getattr(self, name)))
        self._restored = True


def load_callback(path: str) -> Callback:
    """Make a callback from ``package.module:ClassName``; it is called without arguments.

    Raises:
        SettingError: if it cannot be imported or lacks the hooks.
    """
    module_name, _, class_name = path.partition(":")
    try:
        callback = getattr(import_here(module_name), class_name)()
    except (ImportError, AttributeError, ValueError) as error:
        raise SettingError(f"callbacks: '{path}' cannot be loaded as package.module:ClassName: {error}") from error
    hooks = [name for name, hook in vars(Callback).items() if callable(hook) and not name.startswith("_")]
    hooks.remove("on_run_end")  # a class may do without the one that is younger than the others
    missing = [hook for hook in hooks if not hasattr(callback, hook)]
    if missing:
        raise SettingError(
            f"callbacks: '{path}' has no {missing[0]}: derive it from recbole_slifmr.training.callback.Callback"
        )
    return callback
