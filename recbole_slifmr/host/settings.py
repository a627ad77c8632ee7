"""Settings: how they are read, completed and checked on top of RecBole's ``Config``."""

from __future__ import annotations

import ast
import difflib
import functools
import inspect
import os
import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from logging import getLogger
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import recbole.data.dataset
import recbole.model.general_recommender
import recbole.model.knowledge_aware_recommender
import torch
import yaml
from recbole.config import Config
from recbole.model.abstract_recommender import AbstractRecommender
from recbole.utils import get_model

from recbole_slifmr.data.dataset import AUTO, SETTINGS, SLIFMRDataset
from recbole_slifmr.data.noise import read_noise
from recbole_slifmr.errors import DataError, SettingError, StorageError, UnknownSettingWarning
from recbole_slifmr.host import own
from recbole_slifmr.model import MODELS
from recbole_slifmr.model.settings import Count, ModelSettings, Whole, check
from recbole_slifmr.paths import PROPERTIES, find_data_path

NUMBERS: dict[str, Any] = {  # of RecBole's own settings, for any model
    **dict.fromkeys(("epochs", "train_batch_size", "eval_batch_size"), Count),
    **dict.fromkeys(("loss_decimal_place", "metric_decimal_place"), Whole),
    **dict.fromkeys(("eval_step", "stopping_step", "seed"), int),
    **dict.fromkeys(("learning_rate", "weight_decay", "cold_items"), float),
}
FRACTIONS = ("dropout_prob", "global_ratio", "hidden_dropout_prob", "negative_weight", "q", "reg_weight", "resolution",
             "spatial_ratio", "w_max")  # fmt: skip # of RecBole's models: numbers that are whole by default
PAIRS_PER_BATCH = 65_536  # of a model that scores (user, item) pairs one by one
SCORES_ON_GPU = 2**26
# Settings that RecBole reads by other means than config["..."], or that only its own command line knows.
_COMMAND_SETTINGS = ("model", "dataset", "config_files", "nproc", "ip", "port", "world_size", "group_offset")


def model_names() -> list[str]:
    """Return the names of this package's models, of RecBole's general and knowledge-aware ones, and of the user's own.

    The user's own are those that this process has been told of and that read the same data.
    """
    return [
        *MODELS,
        *(name for name in own.used() if own.reads_same_data(name)),
        *(
            name
            for package in (recbole.model.general_recommender, recbole.model.knowledge_aware_recommender)
            for name, value in vars(package).items()
            if inspect.isclass(value) and issubclass(value, AbstractRecommender)
        ),
    ]


def make_config(
    model: str,
    dataset: str,
    config_files: Sequence[str | Path] = (),
    settings: Mapping[str, Any] | None = None,
) -> Config:
    """Build RecBole's configuration from the arguments alone: ``sys.argv`` is not looked at.

    Args:
        model: name of a model of this package or of RecBole, or ``package.module:Class`` of one of the user's own,
            which ``own_model`` of the configuration keeps; its ``model`` is the name of the class.
        dataset: name of the data set's folder under ``data_path``.
        config_files: YAML files of settings, the later ones win.
        settings: settings that win over the files.

    Raises:
        SettingError: for an unknown model, a missing file or a setting that RecBole refuses.
    """
    for file in config_files:
        read_settings(file)
    if not isinstance(dataset, str) or Path(dataset).name != dataset or dataset in ("", ".."):
        raise SettingError(f"dataset: '{dataset}' is no name of a data set: name its folder, and data_path above it")
    model = own.used().get(model, model)
    named = {"own_model": model} if ":" in model else {}
    if named:
        model = own.use(model)
    try:
        get_model(model)
    except (ValueError, AttributeError, ImportError) as error:
        names = {name.lower(): name for name in model_names()}
        near = [names[name] for name in difflib.get_close_matches(model.lower(), names, n=1)]
        hint = f"; did you mean '{near[0]}'?" if near else f" ({error})"
        raise SettingError(f"unknown model '{model}': neither RecBole nor this package has it{hint}") from None
    argv, sys.argv = sys.argv, sys.argv[:1]
    try:
        with bad_input(SettingError):
            config = Config(model, dataset, [str(file) for file in config_files] or None, dict(settings or {}))
    finally:
        sys.argv = argv
    config.final_config_dict.update(named)
    return config


def read_settings(file: str | Path) -> dict[str, Any]:
    """Return the settings in a YAML file.

    Raises:
        SettingError: if it is missing or holds no settings.
    """
    if not Path(file).is_file():
        raise SettingError(f"config file {file} not found")
    try:
        content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingError(f"config file {file} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise SettingError(f"config file {file} holds no settings, each name: value")
    return content


RECBOLE_RAISES = (ValueError, KeyError, TypeError, NotImplementedError, AssertionError, SyntaxError, OSError)


@contextmanager
def bad_input(
    kind: type[ValueError] = DataError, raised: tuple[type[Exception], ...] = RECBOLE_RAISES
) -> Iterator[None]:
    """Turn what RecBole raises over unusable settings or data into one of this package's errors."""
    try:
        yield
    except (DataError, SettingError, StorageError, UnknownSettingWarning):
        raise
    except raised as error:
        getLogger().debug("what RecBole raised", exc_info=True)
        raise kind(f"{type(error).__name__}: {error}".replace("\n", " ")) from error
    except yaml.YAMLError as error:
        raise kind(" ".join(str(error).split())) from error


def parse_settings(arguments: Sequence[str]) -> dict[str, Any]:
    """Read ``--name=value`` and ``--name value`` pairs.

    A value is read as Python (``1e-3``, ``['a', 'b']``, ``None``), else as YAML (``{text: text.npy}``, ``true``), else
    as a string.

    Raises:
        SettingError: for anything else on the command line, or a setting given twice.
    """
    settings: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--"):
            raise SettingError(f"unexpected argument '{argument}': settings read --name=value")
        name, equals, value = argument[2:].partition("=")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise SettingError(f"'{argument}' has no value: settings read --name=value")
            value = rest.pop(0)
        if name in settings:
            raise SettingError(f"'--{name}' is given twice")
        settings[name] = _parse_value(value)
    return settings


def _parse_value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        pass
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    return value if isinstance(value, (bool, dict, list)) else text


# -- what is wrapped around RecBole's Config ------------------------------------------------------------------------


def wrap_config() -> None:
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
        of_model = own.settings_of(model) or [PROPERTIES / "model" / f"{model}.yaml"]
        paths = [PROPERTIES / "overall.yaml", *of_model]
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
    if "eval_batch_size" not in given:
        whole = scores_all_items and set(_values(mode)) == {"full"}
        settings["eval_batch_size"] = _scores_per_block(settings) if whole else PAIRS_PER_BATCH


def _scores_per_block(settings: Mapping[str, Any]) -> int:
    """Return how many scores a block of users has: less where memory is short, more on a GPU, which works in parallel.

    Ranking takes up to 16 bytes per score, of which a thirty-second part of the memory at hand may be used.
    """
    if settings["use_gpu"] and torch.cuda.is_available():
        return SCORES_ON_GPU
    return min(settings["eval_batch_size"], max(psutil.virtual_memory().available // (32 * 16), PAIRS_PER_BATCH))


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
    """Refuse a number of RecBole's that is none, and what the model's settings refuse."""
    given, defaults = config.external_config_dict, config.internal_config_dict
    expected = {name: kind for name, kind in NUMBERS.items() if defaults.get(name) is not None}
    if config.model_class.__module__.startswith("recbole."):
        for name, default in defaults.items():
            if type(default) in (int, float) and name not in NUMBERS:
                expected[name] = float if name in FRACTIONS else type(default)
    for name, kind in expected.items():
        if name in given and (name, given[name]) != ("train_batch_size", AUTO):
            check(name, given[name], kind)
    settings = config.final_config_dict
    for name in ("valid_metric", "learner", "state"):
        check(name, settings[name], str)
    check("clip_grad_norm", settings["clip_grad_norm"], dict | None)
    try:
        inspect.signature(torch.nn.utils.clip_grad_norm_).bind([], **(settings["clip_grad_norm"] or {"max_norm": 1}))
    except TypeError as error:
        raise SettingError(f"clip_grad_norm: {error}: write it as {{max_norm: 5}}") from None
    if hasattr(config.model_class, "settings_class"):
        config.model_class.settings_class.read(config)


def unknown_settings(config: Config) -> list[str]:
    """Return a message for each setting from outside that neither RecBole nor the model reads.

    RecBole's settings are those in its YAML files and argument lists and those that its source (models apart) looks up;
    the data set class of this package reads ``SETTINGS``; the model's are those in its YAML and in the
    source of its class. Settings of training by gradients mean nothing to a closed form of this package.
    """
    given, foreign = set(config.external_config_dict), _settings_of_gradients_only(config.model_class)
    listed = {name for names in config.parameters.values() for name in names}
    given -= {*config.internal_config_dict, *_COMMAND_SETTINGS, *listed} - foreign
    if not given:
        return []
    read = (_settings_read_by_recbole() | set(SETTINGS) | _settings_read_by_model(config.model_class)) - foreign
    known = (read | set(config.internal_config_dict) | set(_COMMAND_SETTINGS)) - foreign
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
    return frozenset().union(*(_look_ups(path.read_text(encoding="utf-8")) for path in files))


def _settings_of_gradients_only(model_class: type) -> set[str]:
    """Return what is asked of models trained by gradients and not of a model of this package, ``learning_rate`` say."""
    declared = getattr(model_class, "settings_class", ModelSettings)
    return {field.name for field in fields(ModelSettings)} - {field.name for field in fields(declared)}


def _settings_read_by_model(model_class: type) -> set[str]:
    modules = {inspect.getmodule(base) for base in model_class.__mro__ if issubclass(base, AbstractRecommender)}
    return set().union(*(_look_ups(inspect.getsource(module)) for module in modules if module))
