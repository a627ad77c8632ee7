"""Repairs of what RecBole reads and writes: checkpoints, pickles, settings as text, names of files and folders."""

from __future__ import annotations

import ast
import contextlib
import copy
import functools
import importlib
import inspect
import os
import pickle
import secrets
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from logging import getLogger
from pathlib import Path
from typing import Any

import numpy as np
import torch
from recbole.trainer import PretrainTrainer, Trainer
from recbole.utils import set_color

from recbole_slifmr.data.dataset import feature_folder_of
from recbole_slifmr.errors import StorageError
from recbole_slifmr.files import file_hash
from recbole_slifmr.host.compat.registry import Module, refers_to, repair, replace_in, with_module
from recbole_slifmr.host.seal import seal, unseal
from recbole_slifmr.host.stored import read_stored

# Modules that call `torch.load` (`quick_start` too; if it is loaded later, see `plugin.py`), unpickle or evaluate.
READERS = (
    "recbole.trainer.trainer",
    *(f"recbole.model.general_recommender.{name}" for name in ("convncf", "nais", "neumf", "ract")),
    "recbole.model.context_aware_recommender.kd_dagfm",
    "recbole.model.sequential_recommender.s3rec",
)
PICKLES = (
    ("recbole.data.utils", "pickle"),
    ("recbole.data.dataset.dataset", "pickle"),
    ("recbole.model.general_recommender.ldiffrec", "np"),
)
EVALUATE = (
    "recbole.config.configurator",
    "recbole.trainer.hyper_tuning",
    "recbole.model.context_aware_recommender.kd_dagfm",
)


@repair
def checkpoint_loading() -> bool:
    """Let RecBole read its checkpoints, and pretrained models, as data.

    `Trainer.evaluate` and `resume_checkpoint` (`trainer.py`) read settings, numpy numbers and matrices with the
    weights, which torch refuses by default since 2.6 (#2215); so do the models that start from another. To list these
    classes for `torch.load` would let any file call them, in the whole process. So these modules get a reader of their
    own (`stored.py`). Not needed once they do not call `torch.load`.
    """
    reading_data = Module(torch, load=read_stored)
    done = any([replace_in(name, "torch", torch, reading_data) for name in READERS])
    for name in ("recbole.quick_start.quick_start", "recbole.quick_start"):  # if loaded: it imports Ray
        if done and name in sys.modules:
            module = vars(sys.modules[name])
            module["load_data_and_model"] = with_module(module["load_data_and_model"], "torch", reading_data)
    return done


@repair
def pickled_files() -> bool:
    """Unpickle no file that came from elsewhere or is out of date: saved data sets, loaders, item vectors.

    `create_dataset` and `load_split_dataloaders` (`data/utils.py`) unpickle what lies in the folder of the checkpoints,
    asked for or not; LDiffRec (`ldiffrec.py`) lets numpy unpickle the `item_emb.npy` of a data set. A pickle may run
    anything. What this user saved carries a seal (`seal.py`), and a hash of each file that it was read from: RecBole
    compares the settings alone. Not needed once RecBole reads these without `pickle` and looks at the files.
    """
    modules = {
        "pickle": (pickle, Module(pickle, dump=_dump, load=_load)),
        "np": (np, Module(np, load=lambda file, **kwargs: np.load(file))),
    }
    return any([replace_in(name, attribute, *modules[attribute]) for name, attribute in PICKLES])


def _dump(content: Any, file: Any) -> None:
    hashes = _hashes(_first(content).config)
    try:
        file.write(seal(pickle.dumps((hashes, content))))
        file.flush()
    except OSError as error:
        raise StorageError(f"{file.name} cannot be saved: {error.strerror or error}") from error


def _load(file: Any) -> Any:
    saved = pickle.loads(unseal(file.read(), file.name))
    hashes, content = saved if isinstance(saved, tuple) else ({}, saved)  # else of an earlier version
    if hashes != _hashes(_first(content).config):
        getLogger().warning(f"{file.name} is not used: the data have changed since it was saved, and are read anew")
        _first(content).config = defaultdict(object)  # equal to no settings: RecBole takes it for that of other data
    return content


def _first(content: Any) -> Any:
    """Return what was saved: a data set, or the first of the loaders, each of which has its generator beside it."""
    return content[0][0] if isinstance(content, list) else content


def _hashes(config: Any) -> dict[str, str]:
    """Return the hash of each file in the folders of a data set and its features, and of those that it names."""
    folders = [Path(config["data_path"]), feature_folder_of(config)]
    files = {path for folder in folders if folder.is_dir() for path in folder.iterdir()}
    for source in config["modalities"].values() if isinstance(config["modalities"], Mapping) else []:
        names = source.values() if isinstance(source, Mapping) else [source]
        files |= {folders[1] / name for name in names if isinstance(name, str)}
    return {str(path): file_hash(path) for path in files if path.is_file()}


@repair
def evaluated_strings() -> bool:
    """Read the strings among the settings as values, and evaluate none (`configurator.py`, `kd_dagfm.py`).

    `Config` evaluates those of a dictionary and of the command line as Python, KD_DAGFM the name of its teacher,
    `HyperTuning` the choices in a file; a setting may come from a file that somebody else wrote. Not needed once
    nothing of RecBole calls `eval`.
    """
    missing = [name for name in EVALUATE if "eval" not in vars(importlib.import_module(name))]
    for name in missing:
        vars(sys.modules[name])["eval"] = _teacher if name.endswith("kd_dagfm") else _literal
    return bool(missing)


def _literal(text: str) -> Any:
    """Return the value that a string spells: a number, a truth value, a string, None, or a collection of these."""
    try:
        return ast.literal_eval(text)
    except (ValueError, MemoryError, RecursionError) as error:
        raise SyntaxError(f"no value: {text}") from error  # which `Config` takes for a string


def _teacher(name: str) -> type:
    """Return a network of `kd_dagfm.py` by its name."""
    module = importlib.import_module("recbole.model.context_aware_recommender.kd_dagfm")
    kind = vars(module).get(name)
    if not (inspect.isclass(kind) and issubclass(kind, torch.nn.Module) and kind.__module__ == module.__name__):
        raise ValueError(f"teacher: KD_DAGFM has no network {name!r}")
    return kind


@repair
def checkpoint_saving() -> bool:
    """Save checkpoints whole or not at all, and in a form that `torch.load` reads without running code.

    `Trainer._save_checkpoint` (`trainer.py`) writes pickle protocol 4, which torch refuses by default since
    2.6 (#2215), and writes in place: a run that is stopped meanwhile loses its best model. What is saved is
    what `Trainer._checkpoint_state(epoch)` returns, which a trainer may extend. Not needed once RecBole moves
    the finished file into place by `os.replace`.
    """
    if Trainer._save_checkpoint is _save_checkpoint or refers_to(Trainer._save_checkpoint, "replace"):
        return False
    Trainer._checkpoint_state, Trainer._save_checkpoint = _checkpoint_state, _save_checkpoint
    PretrainTrainer.save_pretrained_model = _save_pretrained_model
    return True


def _checkpoint_state(self: Any, epoch: int) -> dict[str, Any]:
    """Return what the checkpoint of an epoch holds; ``data_record`` is what says which data it was trained on."""
    return {
        "config": _as_stored(self.config),
        "epoch": epoch,
        "cur_step": self.cur_step,
        "best_valid_score": self.best_valid_score,
        "state_dict": self.model.state_dict(),
        "other_parameter": self.model.other_parameter(),
        "optimizer": self.optimizer.state_dict(),
        **({"data": self.data_record} if hasattr(self, "data_record") else {}),
    }


def _as_stored(config: Any) -> Any:
    """Return settings with which a single process can go on from what several have saved.

    The class of a model of the user's own is left out: a file that names it could be read by its writer alone.
    """
    stored = copy.copy(config)
    if config["own_model"]:
        del stored.model_class
    if not config["single_spec"]:
        single = {"single_spec": True, "local_rank": 0, "device": torch.device(config["device"].type)}
        stored.final_config_dict = {**config.final_config_dict, **single}
    return stored


@contextlib.contextmanager
def _replacing(path: str) -> Iterator[str]:
    """Give a name to write to, and move what is there to `path` once it is whole."""
    part = f"{path}.{secrets.token_hex(4)}.part"
    try:
        yield part
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.remove(part)
        raise


def _save(state: dict[str, Any], path: str) -> None:
    """Save whole or not at all; raise a `StorageError` where there is no room."""
    try:
        with _replacing(path) as part:
            torch.save(state, part, pickle_protocol=2)
    except (OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "inline_container" not in str(error):  # the writer of torch
            raise
        reason = str(error) if isinstance(error, OSError) else "the disk is full, or the folder cannot be written"
        raise StorageError(f"checkpoint {path} cannot be saved: {reason}") from error


def _save_pretrained_model(self: Any, epoch: int, saved_model_file: Any) -> None:
    """Save the state after an epoch of pretraining, as RecBole does."""
    path = os.fspath(saved_model_file)
    state = {
        "config": _as_stored(self.config),
        "epoch": epoch,
        "state_dict": self.model.state_dict(),
        "optimizer": self.optimizer.state_dict(),
        "other_parameter": self.model.other_parameter(),
    }
    _save(state, path)
    self.saved_model_file = saved_model_file


def _save_checkpoint(self: Any, epoch: int, verbose: bool = True, **kwargs: Any) -> None:
    """Save the state of the training; in a distributed run, the first process of each machine does, and all wait."""
    if self.config["single_spec"] or self.config["local_rank"] == 0:
        path = os.fspath(kwargs.pop("saved_model_file", self.saved_model_file))
        _save(self._checkpoint_state(epoch), path)
        if verbose:
            self.logger.info(set_color("Saving current", "blue") + f": {path}")
    if not self.config["single_spec"]:
        torch.distributed.barrier()


@repair
def run_names() -> bool:
    """Give each run files of its own, and all processes of a distributed run the same checkpoint.

    Checkpoints (`trainer.py`), logs (`logger.py`) and TensorBoard folders (`utils.py`) bear the second.
    Runs that start together overwrite each other; the processes of one run may each look for another file.
    The token does not come from the seeded generators. Not needed once `get_local_time` differs from call to
    call and `Trainer` shares its name.
    """
    done, init = False, Trainer.__init__
    for name in ("recbole.trainer.trainer", "recbole.utils.logger", "recbole.utils.utils"):
        module: Any = importlib.import_module(name)
        if len({module.get_local_time() for _ in range(3)}) < 3:
            module.get_local_time = _unique(module.get_local_time)
            done = True
    if refers_to(init, "broadcast_object_list"):
        return done

    @functools.wraps(init)
    def __init__(self: Any, config: Any, model: Any) -> None:
        init(self, config, model)
        if not config["single_spec"]:
            names = [os.path.basename(self.saved_model_file)]
            torch.distributed.broadcast_object_list(names, src=0)
            self.saved_model_file = os.path.join(self.checkpoint_dir, names[0])

    Trainer.__init__ = __init__
    return True


def _unique(get_local_time: Callable[[], str]) -> Callable[[], str]:
    return functools.wraps(get_local_time)(lambda: f"{get_local_time()}-{secrets.token_hex(4)}")


@repair
def shared_folders() -> bool:
    """Let several processes make the same folder at once (`utils.py`, and where `ensure_dir` is imported).

    `ensure_dir` looks whether a folder is there and then makes it; of two processes of a run that start in an empty
    folder one could end with a FileExistsError. Not needed once it passes `exist_ok`.
    """
    names = ("utils.utils", "utils", "utils.logger", "trainer.trainer", "data.dataset.dataset", "data.utils")
    modules: list[Any] = [importlib.import_module(f"recbole.{name}") for name in names]
    if "exist_ok" in inspect.getsource(modules[0].ensure_dir):
        return False
    for module in modules:
        module.ensure_dir = _make_folder
    return True


def _make_folder(dir_path: str) -> None:
    os.makedirs(dir_path, exist_ok=True)
