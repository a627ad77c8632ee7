"""Where runs are followed beside the log and TensorBoard: MLflow and Weights & Biases; see ``docs/recbole.md``.

Weights & Biases is RecBole's own: ``--log_wandb=True``. MLflow is a callback, for the models that run callbacks. Both
have settings, scores by epoch and, when the run ends, its test scores and what is needed to repeat it.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
from logging import getLogger
from typing import Any, ClassVar

from recbole.trainer import Trainer

from recbole_slifmr.errors import SettingError, one_line
from recbole_slifmr.training.callback import Callback
from recbole_slifmr.training.distributed import rank_and_count

PACKAGES = ("recbole-slifmr", "recbole", "torch", "numpy", "scipy", "pandas", "ray")


def versions() -> dict[str, str | None]:
    """Return the version of Python and of each library that a result depends on, None for one that is not there."""
    found: dict[str, str | None] = {"python": platform.python_version(), **dict.fromkeys(PACKAGES)}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def manifest_of(config: Any, result: Any) -> dict[str, Any]:
    """Return what is needed to repeat a run: settings, versions, hashes of the splits and of what else it read."""
    return {
        "settings": _settings(config),
        "versions": versions(),
        "fingerprints": result.fingerprints,
        "inputs": result.inputs,
        "best_epoch": result.best_epoch,
        "n_parameters": result.n_parameters,
    }


def _settings(config: Any) -> dict[str, str]:
    return {name: str(value) for name, value in sorted(config.final_config_dict.items())}


def tell_end(trainer: Any, result: Any) -> None:
    """Tell the callbacks, and Weights & Biases where it is used, that a run has its result."""
    for callback in getattr(trainer, "callbacks", ()):
        if hasattr(callback, "on_run_end"):  # it may come from before there was this hook
            callback.on_run_end(trainer, result)
    if trainer.config["log_wandb"] and rank_and_count()[0] == 0:
        run = importlib.import_module("wandb").run
        run.summary.update({f"test/{name}": value for name, value in result.test.items()})
        run.config.update({"manifest": manifest_of(trainer.config, result)}, allow_val_change=True)
        run.finish()  # or RecBole would go on with it in the next training of this process


class MLflow(Callback):
    """Follow a run in MLflow: settings as parameters, losses and scores by epoch, test scores and a manifest.

    It is a run of its own, within the active one if there is one; of several processes the first has it. The ``@`` of
    a metric, which MLflow does not take, becomes ``_at_``.

    Raises:
        SettingError: if MLflow is not installed.
    """

    _started: ClassVar[str | None] = None  # the run of this process that a callback has started

    def __init__(self) -> None:
        try:
            self.mlflow = importlib.import_module("mlflow")
        except ImportError as error:
            raise SettingError("MLflow is not installed: pip install mlflow-skinny (extra 'mlflow')") from error

    def on_train_start(self, trainer: Trainer) -> None:
        """Start a run and note the settings; raise a SettingError where MLflow cannot."""
        self.is_first = rank_and_count()[0] == 0
        if not self.is_first:
            return
        name = f"{trainer.config['model']}-{trainer.config['dataset']}-{trainer.config['seed']}"
        try:
            active = self.mlflow.active_run()
            if active is not None and active.info.run_id == MLflow._started:  # of a training here that was stopped
                self.mlflow.end_run()
            MLflow._started = self.mlflow.start_run(run_name=name, nested=True).info.run_id
            self.mlflow.log_params(_settings(trainer.config))
        except Exception as error:  # its own, or those of the network below it
            raise SettingError(f"MLflow cannot follow the run: {one_line(error)}") from error

    def on_epoch_end(self, trainer: Trainer, epoch: int, losses: dict[str, float]) -> None:
        """Note the losses."""
        self._log("train", losses, epoch)

    def on_valid_end(self, trainer: Trainer, epoch: int, score: float, result: dict[str, float]) -> None:
        """Note the scores of the validation."""
        self._log("valid", result, epoch)

    def on_run_end(self, trainer: Trainer, result: Any) -> None:
        """Note the scores of the best epoch and what is needed to repeat the run."""
        self._log("best_valid", result.valid)
        self._log("test", result.test)
        self._tell("log_dict", manifest_of(trainer.config, result), "manifest.json")
        self._tell("end_run")

    def _log(self, head: str, values: dict[str, float], step: int | None = None) -> None:
        self._tell("log_metrics", {f"{head}/{name.replace('@', '_at_')}": float(v) for name, v in values.items()}, step)

    def _tell(self, function: str, *arguments: Any) -> None:
        """Call a function of MLflow's in the first process; what it raises costs no run that has begun."""
        if self.is_first:
            try:
                getattr(self.mlflow, function)(*arguments)
            except Exception as error:
                getLogger().warning(f"MLflow was not told ({function}): {one_line(error)}")
