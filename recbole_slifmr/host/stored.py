"""Checkpoints are read as data: nothing that a file names is called.

torch's reader of weights calls, creates and fills in whatever is in its list of globals, with what the file says. The
settings, numbers and matrices that RecBole stores need more names than torch lists, and every one of them can do harm:
``KD_DAGFM(config, data)`` evaluates a string, a forged ``numpy.dtype`` takes bytes for the addresses of objects, a
sparse matrix with positions outside itself reads foreign memory. So each name has a stand-in here that only takes
notes. The stand-ins are in torch's list while one of these files is read, and what they noted is checked and turned
into settings, arrays and matrices afterwards.
"""

from __future__ import annotations

import contextlib
import enum
import inspect
import re
import threading
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import scipy.sparse as sp
import torch
import yaml
from recbole.config import Config
from recbole.model import context_aware_recommender as context_aware
from recbole.model import general_recommender as general
from recbole.model import knowledge_aware_recommender as knowledge_aware
from recbole.model import sequential_recommender as sequential
from recbole.model.abstract_recommender import AbstractRecommender
from recbole.utils import enum_type

from recbole_slifmr.errors import SettingError

Finish = Callable[[Any], Any]
TYPE = re.compile(r"[?biufcO]\d{0,2}")  # truth values, numbers, and lists of them


def read_stored(path: str | Path, map_location: Any = None) -> Any:
    """Read a file that RecBole or torch saved; one that asks for more than data is refused before any of it runs.

    Args:
        path: the file.
        map_location: where tensors go, as in ``torch.load``; where they were if None.

    Raises:
        SettingError: if the file is missing, damaged or holds more than data.
    """
    path = Path(path)
    if not path.is_file():
        raise SettingError(f"checkpoint {path} not found")
    try:
        with _only(allowed_globals()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch says of a file it then refuses
            content = torch.load(path, map_location=map_location, weights_only=True)
        return _finish_all(content)
    except Exception as error:  # whatever a damaged or hostile file makes torch or a stand-in raise
        raise SettingError(f"{path} cannot be read as a checkpoint: {_reason(path, error)}") from error


def _reason(path: Path, error: Exception) -> str:
    """Say in one line why a file was refused."""
    if isinstance(error, PermissionError):
        return str(error.strerror)
    if refused := re.search(r"GLOBAL (\S+)", str(error)):
        return f"it asks for {refused[1]}, which no checkpoint needs; nothing of it was run"
    if zipfile.is_zipfile(path) and "Unsupported operand" in str(error):
        return "it is pickled in a way that torch does not read safely, as RecBole without this package does"
    return "it is damaged, cut short or no file of torch's"


# -- what a file may name ---------------------------------------------------------------------------------------------

_models: set[type] = {
    kind
    for package in (general, context_aware, sequential, knowledge_aware)
    for kind in vars(package).values()
    if inspect.isclass(kind) and issubclass(kind, AbstractRecommender)
}
_reading = threading.Lock()


def allow_in_checkpoints(*classes: type[AbstractRecommender]) -> None:
    """Let checkpoints name these models, as the settings do that RecBole saves; a file cannot call them."""
    _models.update(classes)


def allowed_globals() -> list[Any]:
    """Return the stand-ins with the names that they have in a file."""
    enums = [kind for kind in vars(enum_type).values() if inspect.isclass(kind) and issubclass(kind, enum.Enum)]
    cores = ("numpy._core", "numpy.core")  # of numpy 2 and 1: a file may come from either
    return [
        *((_Name(kind), _full_name(kind)) for kind in (*_models, yaml.FullLoader, np.ndarray, np.matrix, list)),
        *((_Member(kind), _full_name(kind)) for kind in enums if kind is not enum.Enum),
        *((_Array, f"{core}.multiarray._reconstruct") for core in cores),
        *((_Scalar, f"{core}.multiarray.scalar") for core in cores),
        *((stand_in, _full_name(stand_in.kind)) for stand_in in (_Coo, _Csr, _Csc, _Lil)),
        *((_Settings, _full_name(Config)), (_Type, "numpy.dtype")),
        *((_Empty(dict), "collections.defaultdict"), (_Empty(bytes), "builtins.bytes")),
    ]


def _full_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


@contextlib.contextmanager
def _only(allowed: list[Any]) -> Iterator[None]:
    """Have torch allow these globals beside its own, and none that the user listed for other files, meanwhile."""
    with _reading:
        before = torch.serialization.get_safe_globals()
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(allowed)
        try:
            yield
        finally:
            torch.serialization.clear_safe_globals()
            torch.serialization.add_safe_globals(before)


# -- stand-ins --------------------------------------------------------------------------------------------------------


class _Name:
    """Stands for a class that a file names: it can be kept, but neither called nor filled in."""

    __slots__ = ("kind",)

    def __init__(self, kind: type) -> None:
        self.kind = kind


class _Member:
    """Stands for an enumeration: a call with a value gives its member."""

    __slots__ = ("kind",)

    def __init__(self, kind: type[enum.Enum]) -> None:
        self.kind = kind

    def __call__(self, value: int) -> enum.Enum:
        return self.kind(value)


class _Empty:
    """Stands for a collection that a call makes: an empty one, whatever it is called with."""

    __slots__ = ("kind",)

    def __init__(self, kind: type) -> None:
        self.kind = kind

    def __call__(self, *args: Any) -> Any:
        return self.kind()


class _Note:
    """Stands for a class whose objects are in a file: takes down what the file says of one."""

    __slots__ = ("args", "state")
    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any) -> Any:
        note = super().__new__(cls)
        note.args, note.state = args, None
        return note

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def finish(self, finish: Finish) -> Any:
        """Return what was noted, checked; `finish` does so for the parts."""
        raise NotImplementedError


class _Settings(_Note):
    """RecBole's ``Config``, which evaluates strings when it is built."""

    __slots__ = ()

    def finish(self, finish: Finish) -> Config:
        attributes = finish(self.state)
        model = attributes.get("model_class")
        if isinstance(model, _Name) and issubclass(model.kind, AbstractRecommender):
            attributes["model_class"] = model.kind
        config = Config.__new__(Config)
        vars(config).update(attributes, yaml_loader=yaml.FullLoader)
        return config


class _Type(_Note):
    """``numpy.dtype``: a letter, a size and an order of bytes; fields and flags are not looked at."""

    __slots__ = ()

    def finish(self, finish: Finish) -> np.dtype:
        code = str(self.args[0])
        order: Any = self.state[1] if self.state else "="
        if not TYPE.fullmatch(code):
            raise ValueError(f"no type of numbers: {code}")
        return np.dtype(code) if order == "|" else np.dtype(code).newbyteorder(order)


class _Scalar(_Note):
    """A number of numpy's."""

    __slots__ = ()

    def finish(self, finish: Finish) -> Any:
        dtype, raw = map(finish, self.args)
        return np.frombuffer(raw, dtype, count=1)[0]  # which refuses objects


class _Array(_Note):
    """An array or a matrix of numbers, or of lists of numbers."""

    __slots__ = ()

    def finish(self, finish: Finish) -> np.ndarray:
        kind = self.args[0].kind
        _, shape, dtype, fortran, raw = map(finish, self.state)
        order: Any = "F" if fortran else "C"
        if not dtype.hasobject:
            return np.ndarray(shape, dtype, raw, order=order).copy(order="K").view(kind)
        array = np.empty(len(raw), dtype)
        for i, entry in enumerate(raw):
            array[i] = entry
        return array.reshape(shape, order=order).view(kind)


class _Coo(_Note):
    """A sparse matrix in coordinates; scipy looks whether they are in it."""

    __slots__ = ()
    kind: ClassVar[Any] = sp.coo_matrix

    def finish(self, finish: Finish) -> Any:
        state = finish(self.state)
        coords = state["coords"] if "coords" in state else (state["row"], state["col"])  # before scipy 1.13
        return self.kind((state["data"], coords), state["_shape"])


class _Csr(_Note):
    """A sparse matrix in compressed rows."""

    __slots__ = ()
    kind: ClassVar[Any] = sp.csr_matrix

    def finish(self, finish: Finish) -> Any:
        state = finish(self.state)
        matrix = self.kind((state["data"], state["indices"], state["indptr"]), state["_shape"])
        matrix.check_format(full_check=True)
        return matrix


class _Csc(_Csr):
    """A sparse matrix in compressed columns."""

    __slots__ = ()
    kind = sp.csc_matrix


class _Lil(_Note):
    """A sparse matrix in lists, one per row."""

    __slots__ = ()
    kind: ClassVar[Any] = sp.lil_matrix

    def finish(self, finish: Finish) -> Any:
        state = finish(self.state)
        rows = np.repeat(np.arange(len(state["rows"])), [len(row) for row in state["rows"]])
        cols, data = ([entry for row in state[name] for entry in row] for name in ("rows", "data"))
        return sp.coo_matrix((np.array(data, state["dtype"]), (rows, cols)), state["_shape"]).tolil()


def _finish_all(content: Any) -> Any:
    """Put in place of each note what it stands for: in dictionaries, lists and tuples, however deep."""
    done: dict[int, Any] = {}  # a note may be in several places

    def finish(value: Any) -> Any:
        if isinstance(value, _Note):
            if id(value) not in done:
                done[id(value)] = value.finish(finish)
            return done[id(value)]
        if type(value) is tuple:
            return tuple(map(finish, value))
        if isinstance(value, (dict, list)) and id(value) not in done:
            done[id(value)] = value
            for key, entry in list(value.items() if isinstance(value, dict) else enumerate(value)):
                value[key] = finish(entry)
        return value

    return finish(content)
