"""Old import paths: they work until version 0.3, with a ``DeprecationWarning`` that names the new one."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_ROOMS = {
    "nn": ("graph", "sparse", "layers", "loss", "encoder", "diagnostics"),
    "host": ("compat",),
    "training": ("callback", "checkpoint", "distributed", "evaluation", "experiment", "memory", "trainer"),
    "study": ("benchmark", "page", "plots", "runs"),
    "search": ("outcome", "space", "trial", "tune"),
    "serve": ("explain", "export", "recommend", "trained"),
}
MOVED = {
    f"recbole_slifmr.{module}": f"recbole_slifmr.{room}.{module}" for room, names in _ROOMS.items() for module in names
}


class MovedFinder(MetaPathFinder, Loader):
    """Import a module by its old path: the very module of the new path."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: Any = None) -> ModuleSpec | None:
        """Answer for the old paths alone."""
        return ModuleSpec(name, self) if name in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        """Put the module of the new path in the place of the empty one."""
        new = MOVED[module.__name__]
        warnings.warn(f"{module.__name__} has moved to {new}", DeprecationWarning, stacklevel=2)
        sys.modules[module.__name__] = importlib.import_module(new)


def redirect() -> None:
    """Make the old paths importable; safe to call again."""
    if not any(isinstance(finder, MovedFinder) for finder in sys.meta_path):
        sys.meta_path.append(MovedFinder())
