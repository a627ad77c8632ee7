"""Files and folders that are written whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd


def replace_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file whole or not at all."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        write(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def replace_folder(path: Path) -> Iterator[Path]:
    """Give a folder to write into; it takes the place of ``path`` at the end, unless an exception leaves the block."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as scratch:
        part = Path(scratch) / "new"
        part.mkdir()
        yield part
        if path.exists():
            path.rename(Path(scratch) / "old")
        part.rename(path)


def write_json(path: Path, content: Any) -> None:
    """Write JSON whole or not at all."""
    replace_file(path, lambda part: part.write_text(json.dumps(content, indent=1, default=str)))


def write_csv(path: Path, frame: pd.DataFrame) -> None:
    """Write a table whole or not at all."""
    replace_file(path, lambda part: frame.to_csv(part, index=False))
