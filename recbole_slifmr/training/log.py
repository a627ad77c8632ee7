"""The log of a run: a file, and what of it is printed."""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
import warnings
from logging import getLogger
from pathlib import Path

from recbole.config import Config
from recbole.utils import init_logger

from recbole_slifmr.errors import StorageError

_handlers: list[logging.Handler] = []  # of the run that logs


def start_log(config: Config, quiet: bool = False) -> Path | None:
    """Start RecBole's log of this run, ending that of an earlier run in the same process.

    Of the processes of a distributed run, the first on each machine logs.

    Args:
        config: RecBole's configuration.
        quiet: whether only warnings and errors are printed; the file has everything either way.

    Returns:
        the file; None in a process that does not log.

    Raises:
        StorageError: later, by whatever logs, if the file cannot be written.
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
    for file in files:
        file.handleError = functools.partial(_refuse, file)  # type: ignore[method-assign]
    for handler in _handlers:
        if quiet and handler not in files:
            handler.setLevel(max(handler.level, logging.WARNING))
    return Path(files[0].baseFilename) if files else None


def _refuse(file: logging.FileHandler, record: logging.LogRecord) -> None:
    """End the run where its log cannot be written; Python would print a traceback for every line."""
    error = sys.exc_info()[1]
    if not isinstance(error, OSError):
        return logging.Handler.handleError(file, record)
    file.handleError = lambda record: None  # type: ignore[method-assign] # it is said once
    raise StorageError(f"the log {file.baseFilename} cannot be written: {error.strerror or error}") from error


def end_log() -> None:
    """End the log of an earlier run in the same process."""
    for handler in _handlers:
        getLogger().removeHandler(handler)
        with contextlib.suppress(OSError):  # of a disk that is full
            handler.close()
    _handlers.clear()


def ignore_deprecations() -> None:
    """Print no warnings of libraries about each other's future, unless Python was asked for warnings (``-W``)."""
    if not sys.warnoptions:
        for category in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
            warnings.simplefilter("ignore", category)
        warnings.filterwarnings("ignore", ".* is deprecated", UserWarning)  # torch's
