"""Files that are written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
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


def write_json(path: Path, content: Any) -> None:
    """Write JSON whole or not at all."""
    replace_file(path, lambda part: part.write_text(json.dumps(content, indent=1, default=str)))


def write_csv(path: Path, frame: pd.DataFrame) -> None:
    """Write a table whole or not at all."""
    replace_file(path, lambda part: frame.to_csv(part, index=False))
