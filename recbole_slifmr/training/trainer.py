"""The trainer: RecBole's, with callbacks between epochs and checkpoints that a run can go on from exactly."""

from __future__ import annotations

import functools
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from recbole.trainer import TraditionalTrainer
from recbole.utils import ModelType, set_color

from recbole_slifmr.errors import SettingError
from recbole_slifmr.files import replace_file
from recbole_slifmr.training.callback import (
    Callback,
    DiagnosticsCallback,
    PruningCallback,
    SelfLoopCallback,
    load_callback,
)
from recbole_slifmr.training.checkpoint import check_optimizer, read_checkpoint
from recbole_slifmr.training.ranking import RankingTrainer


def make_callbacks(config: Any, model: Any) -> list[Callback]:
    """Return diagnostics if the model has them, pruning and self-loop if the settings ask for them, the user's.

    A model without gradients has none: it has no epochs for them to run between.
    """
    if model.type == ModelType.TRADITIONAL:
        return []
    callbacks: list[Callback] = [DiagnosticsCallback()] if hasattr(model, "diagnostics") else []
    if config["prune_ratio"]:
        callbacks.append(PruningCallback(config["seed"]))
    if config["self_loop"]:
        callbacks.append(SelfLoopCallback(config["refresh_first_epoch"], config["refresh_interval"]))
    return callbacks + [load_callback(path) for path in config["callbacks"] or []]


class SLIFMRTrainer(RankingTrainer):
    """RecBole's trainer with callbacks (``callback.py``) and the ranker of this package (``ranking.py``).

    They run after each training epoch, before validation and saving, so that a graph they refresh is the one that is
    validated and saved. A checkpoint also holds the callbacks' state and the random states, so that a resumed run gives
    what the uninterrupted one gives.

    Args:
        config: RecBole's configuration.
        model: the model.
    """

    def __init__(self, config: Any, model: Any) -> None:
        super().__init__(config, model)
        self.callbacks = make_callbacks(config, model)
        self._train_data: Any = None
        self._epoch = 0
        self._resumed: dict[str, Any] | None = None

    def fit(
        self, train_data: Any, valid_data: Any = None, *, saved: bool = True, **kwargs: Any
    ) -> tuple[float, dict[str, float] | None]:
        """Train as RecBole's ``Trainer.fit`` does, with the callbacks."""
        self._train_data = train_data
        if self._resumed is not None:
            self._restore_random_states(self._resumed)
        for callback in self.callbacks:
            callback.on_train_start(self)
        result = super().fit(train_data, valid_data, saved=saved, **kwargs)
        for callback in self.callbacks:
            callback.on_fit_end(self)
        return result

    def _build_optimizer(self, **kwargs: Any) -> Any:
        """Build RecBole's optimiser; Adam in its fused form, which passes over the parameters once."""
        optimizer = super()._build_optimizer(**kwargs)
        if isinstance(optimizer, torch.optim.Adam):
            for group in optimizer.param_groups:
                group["fused"] = True
        return optimizer

    def _train_epoch(self, train_data: Any, epoch_idx: int, *args: Any, **kwargs: Any) -> Any:
        if hasattr(self.model, "start_epoch"):
            self.model.start_epoch()
        for callback in self.callbacks:
            callback.on_epoch_start(self, epoch_idx)
        losses = super()._train_epoch(train_data, epoch_idx, *args, **kwargs)
        named = dict(zip(self._names(losses), losses if isinstance(losses, tuple) else (losses,), strict=True))
        for callback in self.callbacks:
            callback.on_epoch_end(self, epoch_idx, named)
        self._epoch = epoch_idx
        return losses

    def _valid_epoch(self, valid_data: Any, *args: Any, **kwargs: Any) -> tuple[float, dict[str, float]]:
        score, result = super()._valid_epoch(valid_data, *args, **kwargs)
        for callback in self.callbacks:
            callback.on_valid_end(self, self._epoch, score, result)
        return score, result

    # -- reporting ------------------------------------------------------------------------------------------------

    def _names(self, losses: Any) -> tuple[str, ...]:
        count = len(losses) if isinstance(losses, tuple) else 1
        names = getattr(self.model, "loss_names", ())
        return names if len(names) == count else tuple(f"loss{i + 1}" if count > 1 else "loss" for i in range(count))

    def _generate_train_loss_output(self, epoch_idx: int, s_time: float, e_time: float, losses: Any) -> str:
        places = self.config["loss_decimal_place"] or 4
        values = losses if isinstance(losses, tuple) else (losses,)
        named = ", ".join(
            f"{name}: {value:.{places}f}" for name, value in zip(self._names(losses), values, strict=True)
        )
        return f"{set_color(f'epoch {epoch_idx} training', 'green')} [time: {e_time - s_time:.2f}s, {named}]"

    def _add_train_loss_to_tensorboard(self, epoch_idx: int, losses: Any, tag: str = "Loss/Train") -> None:
        values = losses if isinstance(losses, tuple) else (losses,)
        for name, value in zip(self._names(losses), values, strict=True):
            self.tensorboard.add_scalar(f"{tag}/{name}", value, epoch_idx)

    # -- checkpoints ----------------------------------------------------------------------------------------------

    def _checkpoint_state(self, epoch: int) -> dict[str, Any]:
        return {
            **super()._checkpoint_state(epoch),
            "best_valid_result": dict(self.best_result() or {}),
            "callbacks": [[type(callback).__qualname__, callback.state_dict()] for callback in self.callbacks],
            "random_states": self._random_states(),
        }

    def resume_checkpoint(self, resume_file: Any) -> None:
        """Load a checkpoint to go on from: parameters, refreshed graphs, optimiser, callbacks and random states.

        Args:
            resume_file: path of a checkpoint that this trainer saved; it is only read.

        Raises:
            SettingError: if it has all the epochs already, or its optimiser is of another model.
        """
        own_file: str = self.saved_model_file  # type: ignore[has-type]
        super().resume_checkpoint(resume_file)
        check_optimizer(resume_file, self.optimizer)
        self.saved_model_file = own_file  # the file resumed from stays as it is
        if self.start_epoch >= self.epochs:
            raise SettingError(f"{resume_file} has its {self.start_epoch} epochs: set epochs to more to go on")
        replace_file(Path(own_file), functools.partial(shutil.copyfile, resume_file))
        state = read_checkpoint(resume_file)
        self.best_valid_result = state.get("best_valid_result")
        saved = [tuple(entry) for entry in state.get("callbacks", ())]
        for callback in self.callbacks:
            mine = next((entry for entry in saved if entry[0] == type(callback).__qualname__), None)
            if mine is not None:
                saved.remove(mine)
                callback.load_state_dict(mine[1])
        self._resumed = state.get("random_states")

    def _random_states(self) -> dict[str, Any]:
        name, keys, *position = np.random.get_state(legacy=True)
        generator = self._train_data.generator  # None once RecBole has saved the loaders
        return {
            "python": random.getstate(),
            "numpy": [name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *position],
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            "loader": None if generator is None else generator.get_state(),
        }

    def _restore_random_states(self, states: dict[str, Any]) -> None:
        version, keys, gauss = states["python"]
        random.setstate((version, tuple(keys), gauss))
        name, numpy_keys, *position = states["numpy"]
        np.random.set_state((name, numpy_keys.numpy().astype(np.uint32), *position))
        torch.set_rng_state(states["torch"])
        if states["cuda"] and len(states["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(states["cuda"])
        if states["loader"] is not None and self._train_data.generator is not None:
            self._train_data.generator.set_state(states["loader"])


class ClosedFormTrainer(SLIFMRTrainer, TraditionalTrainer):
    """The trainer of models without gradients: one epoch, whatever ``epochs`` says."""


def trainer_of(model_class: Any) -> type[SLIFMRTrainer]:
    """Return the trainer of a model of this package."""
    return ClosedFormTrainer if model_class.type == ModelType.TRADITIONAL else SLIFMRTrainer
