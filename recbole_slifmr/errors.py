"""Errors that a person can act on: one line that says what, where and what to do."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence


class DataError(ValueError):
    """The data set cannot be used as it is."""


class SettingError(ValueError):
    """A setting is unknown or has a value that cannot be used."""


class UnknownSettingWarning(UserWarning):
    """A setting that neither RecBole nor the model reads."""


class StorageError(OSError):
    """A file cannot be written; what was there before is whole."""


class ProcessError(RuntimeError):
    """A process of a distributed run failed; its traceback is the error's note."""


class ReportError(RuntimeError):
    """The runs are done and kept, but their tables or plots could not be written."""


def not_written(path: str | os.PathLike[str], error: OSError) -> SettingError | StorageError:
    """Return what to raise where a file or folder cannot be written.

    Args:
        path: the file or folder.
        error: what was raised.

    Returns:
        a ``SettingError`` where another place will do, a ``StorageError`` where the disk is full or fails.
    """
    places = (FileExistsError, FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)
    kind = SettingError if isinstance(error, places) else StorageError
    return kind(f"{path} cannot be written: {error.strerror or error}")


def name_some(tokens: Sequence[str], most: int = 5) -> str:
    """Return the first tokens in quotes, and how many more there are."""
    named = ", ".join(f"'{token}'" for token in tokens[:most])
    return named + (f" and {len(tokens) - most} more" if len(tokens) > most else "")


def one_line(error: BaseException, limit: int = 300) -> str:
    """Return an error as one line of text: the first line of its message, without a terminal's codes for colours."""
    text = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", str(error))
    first = next((" ".join(line.split()) for line in text.splitlines() if line.strip()), "")
    if not isinstance(error, (DataError, SettingError)):
        first = f"{type(error).__name__}: {first}" if first else type(error).__name__
    return first if len(first) <= limit else first[: limit - 3] + "..."
