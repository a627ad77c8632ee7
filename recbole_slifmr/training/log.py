"""The log of a run: a file, and what of it is printed."""

from __future__ import annotations

import logging
import sys
import warnings
from logging import getLogger
from pathlib import Path

from recbole.config import Config
from recbole.utils import init_logger

_handlers: list[logging.Handler] = []  # of the run that logs


def start_log(config: Config, quiet: bool = False) -> Path | None:
    """Start RecBole's log of this run, ending that of an earlier run in the same process.

    Of the processes of a distributed run, the first on each machine logs.

    Args:
        config: RecBole's configuration.
        quiet: whether only warnings and errors are printed; the file has everything either way.

    Returns:
        the file; None in a process that does not log.
    """
    root = getLogger()
    if config["local_rank"] != 0:
        root.addHandler(logging.NullHandler())  # without one, warnings would go to stderr
        return None
    end_log()
    others, root.handlers[:] = root.handlers[:], []  # with handlers, init_logger does nothing
    init_logger(config)
    _handlers[:] = root.handlers
    root.handlers[:0] = others
    files = [handler for handler in _handlers if isinstance(handler, logging.FileHandler)]
    for handler in _handlers:
        if quiet and handler not in files:
            handler.setLevel(max(handler.level, logging.WARNING))
    return Path(files[0].baseFilename) if files else None


def end_log() -> None:
    """End the log of an earlier run in the same process."""
    for handler in _handlers:
        getLogger().removeHandler(handler)
        handler.close()
    _handlers.clear()


def ignore_deprecations() -> None:
    """Print no warnings of libraries about each other's future, unless Python was asked for warnings (``-W``)."""
    if not sys.warnoptions:
        for category in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
            warnings.simplefilter("ignore", category)
        warnings.filterwarnings("ignore", ".* is deprecated", UserWarning)  # torch's
