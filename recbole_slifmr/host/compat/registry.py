"""The list of repairs, and what they share."""

from __future__ import annotations

import builtins
import functools
import importlib
import types
from collections.abc import Callable, Collection
from typing import Any

REPAIRS: dict[str, Callable[[], bool]] = {}
applied: set[str] = set()  # the repairs that were needed so far in this process


def apply(skip: Collection[str] = ()) -> list[str]:
    """Repair what is broken, except the repairs named in `skip`; return the names of those that were needed.

    A second call finds nothing left to do and returns an empty list.
    """
    if unknown := set(skip) - set(REPAIRS):
        raise ValueError(f"no such repair: {', '.join(sorted(unknown))}; there are {', '.join(REPAIRS)}")
    needed = [name for name, repair in REPAIRS.items() if name not in skip and repair()]
    applied.update(needed)
    return needed


def repair(function: Callable[[], bool]) -> Callable[[], bool]:
    """List a function among the repairs."""
    REPAIRS[function.__name__] = function
    return function


def refers_to(function: Any, name: str) -> bool:
    """Return whether the code of a function uses a name: a global, an attribute or an import."""
    return name in function.__code__.co_names


def importable(name: str) -> bool:
    """Return whether a module imports; one built for another torch raises more than ImportError."""
    try:
        importlib.import_module(name)
    except Exception:
        return False
    return True


def with_module(function: Any, name: str, module: Any) -> Callable[..., Any]:
    """Copy a function so that `import name` inside it yields `module`."""

    def find(wanted: str, *args: Any, **kwargs: Any) -> Any:
        return module if wanted == name else builtins.__import__(wanted, *args, **kwargs)

    scope = {**function.__globals__, "__builtins__": {**vars(builtins), "__import__": find}}
    code, defaults, closure = function.__code__, function.__defaults__, function.__closure__
    return functools.wraps(function)(types.FunctionType(code, scope, function.__name__, defaults, closure))


class Module(types.ModuleType):
    """Stands for a module where one of RecBole's names it, with some of its functions replaced."""

    def __init__(self, module: types.ModuleType, **replaced: Any) -> None:
        super().__init__(module.__name__)
        self._module = module
        vars(self).update(replaced)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def replace_in(name: str, attribute: str, module: types.ModuleType, stand_in: Module) -> bool:
    """Replace a module where a module of RecBole names it; return whether it did."""
    user = vars(importlib.import_module(name))
    if user.get(attribute) is not module:
        return False
    user[attribute] = stand_in
    return True
