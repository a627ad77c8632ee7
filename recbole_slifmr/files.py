"""Files and folders that are written whole or not at all."""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from filelock import FileLock, Timeout

from recbole_slifmr.errors import SettingError


def replace_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file whole or not at all; an ``OSError`` names it."""
    try:
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
    except ValueError:  # "." and the like
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path)) from None
    try:
        write(part)
        part.replace(path)
    except OSError as error:
        if error.filename in (None, os.fspath(part)):
            error.filename = os.fspath(path)
        raise
    finally:
        with suppress(OSError):
            part.unlink()


@contextmanager
def replace_folder(path: Path) -> Iterator[Path]:
    """Give a folder to write into; it takes the place of ``path`` at the end, unless an exception leaves the block.

    An ``OSError`` names it.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as scratch:
            part = Path(scratch) / "new"
            part.mkdir()
            yield part
            if path.exists():
                path.rename(Path(scratch) / "old")
            part.rename(path)
    except OSError as error:
        if error.filename is None:
            error.filename = os.fspath(path)
        raise


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Keep a folder for the search, benchmark or study that runs in it; the lock of a killed process is gone with it.

    Raises:
        SettingError: if another one runs there.
    """
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise SettingError(f"{folder} holds a search, benchmark or study that is running: name another --out") from None
    try:
        yield
    finally:
        lock.release()


def write_json(path: Path, content: Any) -> None:
    """Write JSON whole or not at all, see :func:`to_json`."""
    text = to_json(content, indent=1)
    replace_file(path, lambda part: part.write_text(text, encoding="utf-8"))


def to_json(content: Any, **options: Any) -> str:
    """Return content as JSON: null for a number that JSON does not have (NaN, infinity), other objects as text."""
    return json.dumps(_plain(content), allow_nan=False, default=str, **options)


def read_lines(path: Path) -> list[Any]:
    """Return the values in a file of JSON lines, none if it is missing; a line that was cut off is left out."""
    values = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        with suppress(ValueError):
            values.append(json.loads(line))
    return values


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def write_csv(path: Path, frame: pd.DataFrame) -> None:
    """Write a table whole or not at all."""
    replace_file(path, lambda part: frame.to_csv(part, index=False))


def file_hash(path: Path) -> str:
    """Return a hash of a file's content, computed once per process as long as its size and times stay as they are."""
    status = path.stat()
    return _hash_content(str(path.resolve()), status.st_size, status.st_mtime_ns, status.st_ctime_ns)


@functools.cache
def _hash_content(path: str, size: int, modified: int, changed: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, functools.partial(hashlib.blake2b, digest_size=16)).hexdigest()
