"""Models of the user's own, named ``package.module:Class`` where a model of RecBole has a plain name.

The module is imported when the user names it, in every process that is given the name, and never because a file does:
a checkpoint keeps the name as text. Inside RecBole, and in tables, the model is called by the name of its class.
"""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import inspect
import os
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import recbole
import recbole.data.dataset
import recbole.trainer
from recbole.model.abstract_recommender import AbstractRecommender
from recbole.utils import ModelType

from recbole_slifmr.data.dataset import SLIFMRDataset
from recbole_slifmr.errors import SettingError, one_line
from recbole_slifmr.paths import PROPERTIES

RECBOLE_SETTINGS = Path(inspect.getfile(recbole)).parent / "properties" / "model"
NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")
KINDS = ("general", "context_aware", "sequential", "knowledge_aware")  # where RecBole looks for a model
SAME_DATA = (ModelType.GENERAL, ModelType.TRADITIONAL, ModelType.KNOWLEDGE)

_used: dict[str, tuple[str, Any]] = {}  # by the name of the class: what the user wrote, and the class


def name_of(model: str) -> str:
    """Return what tables and RecBole call a model: its name, or the class of ``package.module:Class``."""
    return model.rpartition(":")[2]


def used() -> dict[str, str]:
    """Return the user's own models of this process: ``{class: package.module:Class}``."""
    return {name: path for name, (path, _) in _used.items()}


def reads_same_data(name: str) -> bool:
    """Say whether an own model reads its data as the models of this package do."""
    kind = getattr(recbole.data.dataset, f"{name}Dataset", None)
    return inspect.isclass(kind) and issubclass(kind, SLIFMRDataset)


def import_here(name: str) -> ModuleType:
    """Import a module, from the working directory if it is nowhere else, which the ``slifmr`` script does not search.

    Processes that this one starts search where it does.
    """
    if (folder := os.getcwd()) not in sys.path:
        sys.path.append(folder)
    return importlib.import_module(name)


def use(model: str) -> str:
    """Make ``package.module:Class`` known to RecBole under the name of its class, which is returned; safe to repeat.

    A class that derives from a model with a trainer or data set class of its own has these; any other general or
    knowledge-aware model reads its data by the data set class of this package, as RecBole's models do.

    Raises:
        SettingError: if there is no such module or class, it is no model, or there is another model of that name.
    """
    if not NAME.fullmatch(model) or model.startswith("__main__:"):  # which is another module in every process
        raise SettingError(
            f"model '{model}': a model of your own is named module:Class, such as mypackage.models:Mine, and lies in a "
            "module that can be imported"
        )
    path, _, name = model.partition(":")
    module = _import(path, model)
    kind: Any = getattr(module, name, None)
    if not inspect.isclass(kind):
        models = [other for other, value in vars(module).items() if _is_model(value) and value.__module__ == path]
        has = f"; its models: {', '.join(models)}" if models else ""
        raise SettingError(f"model '{model}': module {path} has no class '{name}'{has}")
    if not _is_model(kind):
        raise SettingError(
            f"model '{model}': {name} is no model of RecBole's: derive it from GeneralRecommender of "
            "recbole.model.abstract_recommender, or from any other model"
        )
    other = {known.lower(): written for known, written in used().items()}.get(name.lower())
    if other is None and _is_taken(name):
        other = name
    if other not in (None, model):
        raise SettingError(f"model '{model}': there is another model called {other}: give the class another name")
    sys.modules[f"recbole.model.general_recommender.{name.lower()}"] = module
    _used[name] = (model, kind)
    _give_classes(name, kind)
    return name


def _give_classes(name: str, kind: Any) -> None:
    """Put data set class and trainer where RecBole looks for those of a model, unless its own choice is right."""
    dataset = _inherited(kind, recbole.data.dataset, "Dataset") or (SLIFMRDataset if kind.type in SAME_DATA else None)
    trainer = _inherited(kind, recbole.trainer, "Trainer")
    if dataset is not None:
        setattr(recbole.data.dataset, f"{name}Dataset", dataset)
    if trainer is not None:
        setattr(recbole.trainer, f"{name}Trainer", trainer)


def _import(path: str, model: str) -> ModuleType:
    try:
        return import_here(path)
    except Exception as error:  # whatever the user's code raises
        missing = getattr(error, "name", None) if isinstance(error, ModuleNotFoundError) else None
        if missing is not None and f"{path}.".startswith(f"{missing}."):
            raise SettingError(
                f"model '{model}': there is no module {missing}, neither in {os.getcwd()} nor installed"
            ) from error
        raise SettingError(f"model '{model}': {path} cannot be imported: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """Return one line that says what the user's code raised."""
    text = one_line(error)
    return text if text.startswith(type(error).__name__) else f"{type(error).__name__}: {text}"


def _is_model(value: Any) -> bool:
    """Say whether a value is a class that RecBole can train; torch gives every module a method ``type``."""
    is_model = inspect.isclass(value) and issubclass(value, AbstractRecommender)
    return is_model and isinstance(getattr(value, "type", None), ModelType)


def _is_taken(name: str) -> bool:
    """Say whether RecBole or this package would take the name for something else."""
    modules = (f"recbole.model.{kind}_recommender.{name.lower()}" for kind in KINDS)
    others = (hasattr(recbole.data.dataset, f"{name}Dataset"), hasattr(recbole.trainer, f"{name}Trainer"))
    return any(others) or any(importlib.util.find_spec(module) is not None for module in modules)


def _inherited(kind: type, package: ModuleType, ending: str) -> Any:
    """Return the trainer or data set class of the nearest model that a class derives from, None without one."""
    return next((vars(package)[base] for c in kind.__mro__[1:] if (base := c.__name__ + ending) in vars(package)), None)


# -- files --------------------------------------------------------------------------------------------------------


def settings_of(name: str) -> list[Path]:
    """Return the YAML files of an own model's settings, the last winning; none for other models.

    Those of the models that it derives from, RecBole's or this package's, and ``Class.yaml`` beside its module.
    """
    if name not in _used:
        return []
    kind = _used[name][1]
    bases = [base.__name__ for base in reversed(kind.__mro__[1:])]
    files = [folder / f"{base}.yaml" for base in bases for folder in (RECBOLE_SETTINGS, PROPERTIES / "model")]
    return [file for file in (*files, _file_of(kind).with_name(f"{name}.yaml")) if file.is_file()]


def sources_of(name: str) -> list[Path]:
    """Return the files that an own model's result depends on: its settings and its code; none for other models.

    Its code is every Python file of the package that it is in; of a module in no package, the module and what it
    imports from beside it. The code of other packages that it imports is not looked at.
    """
    if name not in _used:
        return []
    settings, path = settings_of(name), _used[name][0].partition(":")[0]
    folders = getattr(sys.modules[path.partition(".")[0]], "__path__", None)
    if folders is None:
        code = list(_beside(_file_of(_used[name][1])))
    else:
        code = sorted(file for folder in folders for file in Path(folder).rglob("*.py"))
    return [*settings, *code]


def _file_of(kind: type) -> Path:
    return Path(inspect.getfile(kind)).resolve()


@functools.cache
def _beside(file: Path) -> tuple[Path, ...]:
    """Return a file and the files beside it that it imports, directly or through each other."""
    found, waiting = {file}, [file]
    while waiting:
        for name in _imports(waiting.pop()):
            folder = file.parent / name
            for path in (folder.with_suffix(".py"), *(folder.rglob("*.py") if folder.is_dir() else ())):
                if path.is_file() and path not in found:
                    found.add(path)
                    waiting.append(path)
    return tuple(sorted(found))


def _imports(file: Path) -> set[str]:
    """Return the first part of the name of every module that a file imports."""
    try:
        nodes = list(ast.walk(ast.parse(file.read_bytes())))
    except SyntaxError:  # another file of a folder beside, which nothing needs to import
        return set()
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
    return {name.partition(".")[0] for name in names}
