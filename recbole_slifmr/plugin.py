"""How RecBole learns of this package's models, data set, trainer and settings. Nothing is written into RecBole.

The one module that knows all rooms below the studies, and so on the ground beside them.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import recbole.data.dataset
import recbole.data.utils
import recbole.model.general_recommender
import recbole.model.knowledge_aware_recommender
import recbole.trainer
import torch
from recbole.config import Config
from recbole.data.dataloader.abstract_dataloader import AbstractDataLoader
from recbole.utils import get_model
from recbole.utils.argument_list import dataset_arguments

from recbole_slifmr.data.cold import is_cold, sample_warm_only
from recbole_slifmr.data.dataset import SETTINGS, SLIFMRDataset, choose_batch_size
from recbole_slifmr.host import compat
from recbole_slifmr.host.compat.registry import Module, with_module
from recbole_slifmr.host.settings import model_names, wrap_config
from recbole_slifmr.host.stored import allow_in_checkpoints
from recbole_slifmr.model import MODELS
from recbole_slifmr.model.base import DeclaredRecommender
from recbole_slifmr.training import trainer
from recbole_slifmr.training.checkpoint import read_checkpoint

# What a saved data set depends on beside RecBole's own list.
DATASET_SETTINGS = (*SETTINGS, "MODEL_TYPE", "data_path", "noise", "cold_items", "eval_args")


def register() -> None:
    """Make the package's models usable by name in RecBole; safe to call again."""
    compat.apply()
    for name in MODELS:
        module = importlib.import_module(f"recbole_slifmr.model.{name.lower()}")
        sys.modules[f"recbole.model.general_recommender.{name.lower()}"] = module
        allow_in_checkpoints(getattr(module, name))
    for name in model_names():
        if not hasattr(recbole.data.dataset, f"{name}Dataset"):
            setattr(recbole.data.dataset, f"{name}Dataset", SLIFMRDataset)
    for kind in {base for name in MODELS for base in get_model(name).__mro__ if issubclass(base, DeclaredRecommender)}:
        setattr(recbole.trainer, f"{kind.__name__}Trainer", trainer.trainer_of(kind))
    dataset_arguments.extend(name for name in DATASET_SETTINGS if name not in dataset_arguments)
    wrap_config()
    _wrap_samplers()
    _wrap_quick_start()


def _wrap_samplers() -> None:
    """Have RecBole draw no cold items as training negatives, and choose the batch size before it makes loaders."""
    create = recbole.data.utils.create_samplers
    if hasattr(create, "__wrapped__"):
        return

    @functools.wraps(create)
    def create_samplers(config: Config, dataset: Any, built_datasets: list[Any]) -> tuple[Any, Any, Any]:
        choose_batch_size(config, len(built_datasets[0]))
        samplers = create(config, dataset, built_datasets)
        if config["cold_items"] and samplers[0] is not None:
            sample_warm_only(samplers[0], is_cold(built_datasets[0]))
        return samplers

    recbole.data.utils.create_samplers = create_samplers
    update = AbstractDataLoader.update_config

    @functools.wraps(update)
    def update_config(self: AbstractDataLoader, config: Config) -> None:
        choose_batch_size(config, len(self._dataset))  # loaders that were saved: the one of training comes first
        update(self, config)

    AbstractDataLoader.update_config = update_config


# -- other processes ----------------------------------------------------------------------------------------------


def run_recbole(*args: Any, **kwargs: Any) -> Any:
    """Run RecBole's ``run_recbole``; pickled by reference to this package, so that a new process registers it."""
    return _original("run_recbole")(*args, **kwargs)


def run_recboles(*args: Any, **kwargs: Any) -> Any:
    """Run RecBole's ``run_recboles``, the entry point of its spawned processes, with this package registered."""
    return _original("run_recboles")(*args, **kwargs)


def load_data_and_model(model_file: Any) -> Any:
    """Call RecBole's ``load_data_and_model``; of the checkpoint it gets the data, and nothing of it is run."""
    torch_reading_data = Module(torch, load=functools.partial(read_checkpoint, map_location=None))
    return with_module(_original("load_data_and_model"), "torch", torch_reading_data)(model_file)


_originals: dict[str, Any] = {}


def _original(name: str) -> Any:
    if name not in _originals:
        importlib.import_module(QUICK_START)
    return _originals[name]


QUICK_START = "recbole.quick_start.quick_start"


def _wrap_quick_start() -> None:
    """Replace the functions of ``recbole.quick_start`` that start other processes or read a checkpoint.

    That module imports Ray, which takes seconds: it is wrapped when somebody imports it, not before.
    """
    if QUICK_START in sys.modules:
        _replace_entry_points(sys.modules[QUICK_START], sys.modules["recbole.quick_start"])
    elif not any(isinstance(finder, _QuickStartFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _QuickStartFinder())


def _replace_entry_points(*modules: ModuleType) -> None:
    for function in (run_recbole, run_recboles, load_data_and_model):
        name = function.__name__
        for module in modules:
            if getattr(module, name, function) is not function:
                _originals[name] = getattr(module, name)
                setattr(module, name, function)


class _QuickStartFinder(MetaPathFinder):
    """Let RecBole's quick_start be imported as ever, then replace its entry points."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if name != QUICK_START:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            _replace_entry_points(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
