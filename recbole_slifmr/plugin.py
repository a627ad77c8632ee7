"""How RecBole learns of this package's models, data set, trainer and settings. Nothing is written into RecBole."""

from __future__ import annotations

import difflib
import functools
import importlib
import importlib.util
import inspect
import os
import re
import sys
import warnings
from collections.abc import Iterable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import recbole.data.dataset
import recbole.data.utils
import recbole.model.general_recommender
import recbole.model.knowledge_aware_recommender
import recbole.trainer
import yaml
from recbole.config import Config
from recbole.model.abstract_recommender import AbstractRecommender
from recbole.utils.argument_list import dataset_arguments

from recbole_slifmr import callback, compat, trainer
from recbole_slifmr.data.cold import is_cold, sample_warm_only
from recbole_slifmr.data.dataset import SLIFMRDataset
from recbole_slifmr.data.noise import read_noise
from recbole_slifmr.errors import SettingError, UnknownSettingWarning
from recbole_slifmr.paths import PROPERTIES, find_data_path

MODELS = ("SLIFMR", "LATTICE", "FREEDOM", "BM3", "VBPR", "XSimGCL")
# What a saved data set depends on beside RecBole's own list.
DATASET_SETTINGS = ("modalities", "exclude_modalities", "feature_path", "feature_missing", "use_kg", "use_features",
                    "MODEL_TYPE", "data_path", "noise", "cold_items")  # fmt: skip
NUMBERS = ("epochs", "train_batch_size", "eval_batch_size", "learning_rate", "eval_step", "stopping_step", "seed",
           "weight_decay", "loss_decimal_place", "metric_decimal_place", "cold_items")  # fmt: skip
FREE_TYPES = ("modalities", "refresh_interval")  # each of more than one type, checked where it is read
PAIRS_PER_BATCH = 65_536  # of a model that scores (user, item) pairs one by one
# Settings that RecBole reads by other means than config["..."], or that only its own command line knows.
_COMMAND_SETTINGS = ("model", "dataset", "config_files", "nproc", "ip", "port", "world_size", "group_offset")


def register() -> None:
    """Make the package's models usable by name in RecBole; safe to call again."""
    compat.apply()
    for name in MODELS:
        module = importlib.import_module(f"recbole_slifmr.model.{name.lower()}")
        sys.modules[f"recbole.model.general_recommender.{name.lower()}"] = module
        compat.allow_in_checkpoints(getattr(module, name))
    for name in model_names():
        if not hasattr(recbole.data.dataset, f"{name}Dataset"):
            setattr(recbole.data.dataset, f"{name}Dataset", SLIFMRDataset)
    for name in MODELS:
        setattr(recbole.trainer, f"{name}Trainer", trainer.SLIFMRTrainer)
    dataset_arguments.extend(name for name in DATASET_SETTINGS if name not in dataset_arguments)
    _wrap_config()
    _wrap_samplers()
    _wrap_quick_start()


def model_names() -> list[str]:
    """Return the names of this package's models and of RecBole's general and knowledge-aware ones."""
    return [
        *MODELS,
        *(
            name
            for package in (recbole.model.general_recommender, recbole.model.knowledge_aware_recommender)
            for name, value in vars(package).items()
            if inspect.isclass(value) and issubclass(value, AbstractRecommender)
        ),
    ]


# -- settings -----------------------------------------------------------------------------------------------------


def _wrap_config() -> None:
    """Have ``Config`` read this package's YAML where it reads RecBole's, find its data and name unknown settings."""
    if hasattr(Config, "_slifmr"):
        return
    Config._slifmr = True
    read_yaml, set_defaults = Config._update_internal_config_dict, Config._set_default_parameters
    read_dict = Config._load_variable_config_dict

    @functools.wraps(read_yaml)
    def update_internal_config_dict(self: Config, file: str) -> Any:
        result = read_yaml(self, file)
        for path in _own_yaml(Path(file).name, self.model, self.dataset):
            read_yaml(self, str(path))
        return result

    @functools.wraps(read_dict)
    def load_variable_config_dict(self: Config, config_dict: dict[str, Any] | None) -> dict[str, Any]:
        return read_dict(self, _plain(config_dict))

    @functools.wraps(set_defaults)
    def set_default_parameters(self: Config) -> None:
        _check_types(self)
        _complete(self)
        set_defaults(self)
        _check_valid_metric(self)
        _check_noise(self)
        for message in unknown_settings(self):
            warnings.warn(message, UnknownSettingWarning, stacklevel=4)

    Config._load_variable_config_dict = load_variable_config_dict
    Config._update_internal_config_dict = update_internal_config_dict
    Config._set_default_parameters = set_default_parameters


def _own_yaml(just_read: str, model: str, dataset: str) -> Iterable[Path]:
    """Return this package's YAML files that belong after the one of RecBole's just read."""
    if just_read == "overall.yaml":
        paths = [PROPERTIES / "overall.yaml", PROPERTIES / "model" / f"{model}.yaml"]
    elif just_read == "sample.yaml":
        paths = [PROPERTIES / "dataset" / f"{dataset}.yaml"]
    else:
        return []
    return [path for path in paths if path.is_file()]


def _plain(value: Any) -> Any:
    """Turn paths into strings and numpy scalars into numbers: a checkpoint with others in it cannot be read."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_plain(entry) for entry in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value.item() if isinstance(value, np.generic) else value


def _complete(config: Config) -> None:
    """Choose what depends on other settings, unless the user did."""
    given, settings = config.external_config_dict, config.final_config_dict
    if "data_path" not in given:
        settings["data_path"] = find_data_path(config.dataset, settings["data_path"])
    if "topk" in given and "valid_metric" not in given:
        name, at, k = settings["valid_metric"].partition("@")
        cutoffs = given["topk"] if isinstance(given["topk"], list) else [given["topk"]]
        if k not in map(str, cutoffs):
            settings["valid_metric"] = f"{name}{at}{max(cutoffs)}"
    mode = settings["eval_args"].get("mode", "full") if isinstance(settings["eval_args"], dict) else "full"
    scores_all_items = config.model_class.full_sort_predict is not AbstractRecommender.full_sort_predict
    if "eval_batch_size" not in given and not (scores_all_items and set(_values(mode)) == {"full"}):
        settings["eval_batch_size"] = PAIRS_PER_BATCH


def _values(mode: Any) -> list[Any]:
    return list(mode.values()) if isinstance(mode, dict) else [mode]


def _check_valid_metric(config: Config) -> None:
    name, at, k = config["valid_metric"].partition("@")
    known = name.lower() in {metric.lower() for metric in config["metrics"]}
    if not known or (at and k not in {str(cutoff) for cutoff in config["topk"]}):
        raise SettingError(
            f"valid_metric: '{config['valid_metric']}' is not among {config['metrics']} at topk {config['topk']}"
        )


def _check_noise(config: Config) -> None:
    """Refuse noise that is none, or that would not reach the model because it reads another data set class."""
    kind = getattr(recbole.data.dataset, f"{config.model}Dataset", None)
    if read_noise(config).levels and not (inspect.isclass(kind) and issubclass(kind, SLIFMRDataset)):
        raise SettingError(
            f"noise: {config.model} reads its data by a class of RecBole's, which adds none: leave it out"
        )


def _check_types(config: Config) -> None:
    """Refuse a setting whose type is not that of its default, for this package's settings and RecBole's numbers."""
    path = PROPERTIES / "model" / f"{config.model}.yaml"
    own = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for name, value in config.external_config_dict.items():
        default = config.internal_config_dict.get(name)
        if default is None or name in FREE_TYPES or not (name in own or name in NUMBERS):
            continue
        wanted = (int, float) if isinstance(default, float) else type(default)
        if not isinstance(value, wanted) or isinstance(value, bool) != isinstance(default, bool):
            kind = {bool: "True or False", int: "a whole number", float: "a number", str: "a word", list: "a list"}
            raise SettingError(f"{name} must be {kind.get(type(default), type(default).__name__)}, not {value!r}")


def unknown_settings(config: Config) -> list[str]:
    """Return a message for each setting from outside that neither RecBole nor the model reads.

    RecBole's settings are those in its YAML files and argument lists and those that its source (models apart) looks up;
    the model's are those in its YAML and in the source of its class.
    """
    given = set(config.external_config_dict) - set(config.internal_config_dict) - set(_COMMAND_SETTINGS)
    given -= {name for names in config.parameters.values() for name in names}
    if not given:
        return []
    read = _settings_read_by_recbole() | _settings_read_by_model(config.model_class)
    if config.model in MODELS:
        read |= _look_ups("".join(inspect.getsource(module) for module in (trainer, callback)))
    known = read | set(config.internal_config_dict) | set(_COMMAND_SETTINGS)
    messages = []
    for name in sorted(given - read):
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        messages.append(f"unknown setting '{name}': neither RecBole nor {config.model} reads it{hint}")
    return messages


_LOOK_UP = re.compile(r"""config\[f?["'](\w+)["']\]|config\.get\(["'](\w+)["']|config_dict\[["'](\w+)["']\]""")


def _look_ups(source: str) -> set[str]:
    return {name for match in _LOOK_UP.findall(source) for name in match if name}


@functools.cache
def _settings_read_by_recbole() -> frozenset[str]:
    root = Path(inspect.getfile(recbole)).parent
    files = (path for path in root.rglob("*.py") if path.relative_to(root).parts[0] != "model")
    own = Path(__file__).parent.rglob("*.py")
    of_models = ("trainer.py", "callback.py", "survey.py")  # they read settings of this package's models
    shared = (path for path in own if path.parent.name != "model" and path.name not in of_models)
    return frozenset().union(*(_look_ups(path.read_text(encoding="utf-8")) for path in (*files, *shared)))


def _settings_read_by_model(model_class: type) -> set[str]:
    modules = {inspect.getmodule(base) for base in model_class.__mro__ if issubclass(base, AbstractRecommender)}
    return set().union(*(_look_ups(inspect.getsource(module)) for module in modules if module))


def _wrap_samplers() -> None:
    """Have RecBole draw no cold items as training negatives."""
    create = recbole.data.utils.create_samplers
    if hasattr(create, "__wrapped__"):
        return

    @functools.wraps(create)
    def create_samplers(config: Config, dataset: Any, built_datasets: list[Any]) -> tuple[Any, Any, Any]:
        samplers = create(config, dataset, built_datasets)
        if config["cold_items"] and samplers[0] is not None:
            sample_warm_only(samplers[0], is_cold(built_datasets[0]))
        return samplers

    recbole.data.utils.create_samplers = create_samplers


# -- other processes ----------------------------------------------------------------------------------------------


def run_recbole(*args: Any, **kwargs: Any) -> Any:
    """Run RecBole's ``run_recbole``; pickled by reference to this package, so that a new process registers it."""
    return _original("run_recbole")(*args, **kwargs)


def run_recboles(*args: Any, **kwargs: Any) -> Any:
    """Run RecBole's ``run_recboles``, the entry point of its spawned processes, with this package registered."""
    return _original("run_recboles")(*args, **kwargs)


_originals: dict[str, Any] = {}


def _original(name: str) -> Any:
    if name not in _originals:
        importlib.import_module(QUICK_START)
    return _originals[name]


QUICK_START = "recbole.quick_start.quick_start"


def _wrap_quick_start() -> None:
    """Replace the functions of ``recbole.quick_start`` that other processes are started with.

    That module imports Ray, which takes seconds: it is wrapped when somebody imports it, not before.
    """
    if QUICK_START in sys.modules:
        _replace_entry_points(sys.modules[QUICK_START], sys.modules["recbole.quick_start"])
    elif not any(isinstance(finder, _QuickStartFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _QuickStartFinder())


def _replace_entry_points(*modules: ModuleType) -> None:
    for function in (run_recbole, run_recboles):
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
