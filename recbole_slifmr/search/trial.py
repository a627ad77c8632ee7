"""One trial of a search: a training that reports every validation and goes on exactly from any of its checkpoints.

Any of RecBole's models and trainers will do: its trainer is given the callbacks and checkpoints of ``SLIFMRTrainer``.
The test split is neither held nor scored.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import torch
from recbole.config import Config
from recbole.data.dataloader import KnowledgeBasedDataLoader

from recbole_slifmr.data.dataset import choose_batch_size
from recbole_slifmr.training.callback import Callback
from recbole_slifmr.training.checkpoint import read_checkpoint
from recbole_slifmr.training.experiment import load_data, make_trainer, set_threads
from recbole_slifmr.training.log import start_log
from recbole_slifmr.training.memory import peak_memory_mb
from recbole_slifmr.training.trainer import SLIFMRTrainer

CHECKPOINT = "checkpoint.pth"
Report = Callable[[dict[str, Any], Callable[[Path], None]], None]


class TrialData(NamedTuple):
    """The loaders that a trial may see."""

    train: Any
    valid: Any


def load_trial_data(config: Config, split_seed: int) -> TrialData:
    """Read and split the data; leave out the test split and what else RecBole's samplers keep of it.

    Raises:
        DataError, SettingError: for data or settings that cannot be used.
    """
    train, valid, _ = load_data(config, split_seed)
    for loader in (*_parts(train), valid):
        for name in ("dataset", "datasets"):
            if hasattr(loader._sampler, name):
                setattr(loader._sampler, name, None)
    return TrialData(train, valid)


def _parts(loader: Any) -> list[Any]:
    """Return the loaders that a loader consists of: of interactions and, for a knowledge-aware model, triples."""
    is_double = isinstance(loader, KnowledgeBasedDataLoader)
    return [loader.general_dataloader, loader.kg_dataloader] if is_double else [loader]


def train_loader(config: Config, shared: Any) -> Any:
    """Return a training loader for the settings of one trial, on the data and sampler of a shared one."""
    data = shared._dataset
    data.config = config
    choose_batch_size(config, len(data))
    samplers = [part._sampler for part in _parts(shared)]
    loader = type(shared)(config, data, *samplers, shuffle=len(samplers) > 1 or shared.shuffle)
    if len(samplers) > 1:
        loader.generator = _Generators([part.generator for part in _parts(loader)])
    return loader


class _Generators:
    """Generators that are saved and restored as one."""

    def __init__(self, generators: list[torch.Generator]) -> None:
        self.generators = generators

    def get_state(self) -> torch.Tensor:
        return torch.stack([generator.get_state() for generator in self.generators])

    def set_state(self, states: torch.Tensor) -> None:
        for generator, state in zip(self.generators, states, strict=True):
            generator.set_state(state.clone())  # of a view, torch crashes


def with_callbacks(trainer_class: type) -> type:
    """Return a trainer of RecBole with the callbacks and checkpoints of ``SLIFMRTrainer``."""
    if issubclass(trainer_class, SLIFMRTrainer):
        return trainer_class
    return type(trainer_class.__name__, (SLIFMRTrainer, trainer_class), {})


class ReportCallback(Callback):
    """Report each validation, after RecBole's early stopping has seen it, with a checkpoint to go on from.

    Args:
        report: takes the metrics and a function that saves a checkpoint into a folder.
        start: when the trial began, by ``perf_counter``.
    """

    def __init__(self, report: Report, start: float) -> None:
        self.report, self.start = report, start
        self.seconds = 0.0  # of the epochs before a checkpoint

    def on_train_start(self, trainer: SLIFMRTrainer) -> None:
        """Note how long it took to get here."""
        self.setup_seconds = perf_counter() - self.start
        self.train_start = perf_counter()
        self.first_epoch_seconds: float | None = None

    def on_epoch_end(self, trainer: SLIFMRTrainer, epoch: int, losses: dict[str, float]) -> None:
        """Note when the first epoch was over."""
        if self.first_epoch_seconds is None:
            self.first_epoch_seconds = perf_counter() - self.start

    def on_valid_end(self, trainer: SLIFMRTrainer, epoch: int, score: float, result: dict[str, float]) -> None:
        """Keep the metrics for the report."""
        self.result = dict(result)

    def after_early_stopping(self, trainer: SLIFMRTrainer, epoch: int, score: float) -> None:
        """Report; called as RecBole's ``callback_fn``."""
        last = epoch + 1 + trainer.eval_step > trainer.epochs or trainer.cur_step > trainer.stopping_step
        metrics = {
            "epoch": epoch + 1,
            "score": float(score),
            "best_score": float(trainer.best_valid_score),
            "finished": last,
            **self.state_dict(),
            "setup_seconds": self.setup_seconds,
            "first_epoch_seconds": self.first_epoch_seconds,
            "memory_mb": peak_memory_mb(),
            "valid": self.result,
        }

        def save(folder: Path) -> None:
            trainer._save_checkpoint(epoch, verbose=False, saved_model_file=folder / CHECKPOINT)

        self.report(metrics, save)

    def state_dict(self) -> dict[str, Any]:
        """Return the seconds of training."""
        return {"seconds": self.seconds + perf_counter() - self.train_start}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self.seconds = state["seconds"]


def run_trial(config: Config, split_seed: int, data: TrialData | None, folder: Path | None, report: Report) -> None:
    """Train with the settings of a trial; log, TensorBoard and scratch files go into the working directory.

    Args:
        config: RecBole's configuration.
        split_seed: seed of a random split.
        data: what :func:`load_trial_data` gave; read here if None.
        folder: of a checkpoint to go on from, of this trial or of one whose settings differ.
        report: see :class:`ReportCallback`; a trial that has its epochs already reports nothing.
    """
    start = perf_counter()
    set_threads(config)
    start_log(config)
    if data is None:
        data = load_trial_data(config, split_seed)
    train = train_loader(config, data.train)
    with tempfile.TemporaryDirectory() as scratch:
        config["checkpoint_dir"] = scratch
        trainer = make_trainer(config, train, with_callbacks)
        callback = ReportCallback(report, start)
        trainer.callbacks.append(callback)
        if folder is not None and (folder / CHECKPOINT).is_file():
            file = folder / CHECKPOINT
            state = read_checkpoint(file)
            if state["epoch"] + 1 >= trainer.epochs or state["cur_step"] > trainer.stopping_step:
                return
            trainer.resume_checkpoint(file)
            for group in trainer.optimizer.param_groups:  # the checkpoint may be that of other settings
                group.update(lr=trainer.learning_rate, weight_decay=trainer.weight_decay)
        trainer.fit(
            train,
            data.valid,
            saved=False,
            show_progress=False,
            callback_fn=lambda epoch, score: callback.after_early_stopping(trainer, epoch, score),
        )
