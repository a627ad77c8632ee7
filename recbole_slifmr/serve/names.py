"""What a person calls an item: columns of the ``.item`` file, such as its title, beside its id."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from recbole_slifmr.data.dataset import item_file_of
from recbole_slifmr.data.table import AtomicFile, examine
from recbole_slifmr.errors import DataError

TITLES = ("title", "movie_title", "name")  # columns that are plainly one, the first there is


class ItemColumns:
    """Columns of the ``.item`` file.

    Args:
        values: text as in the file by item token, a column each; ``""`` where there is none.
    """

    def __init__(self, values: pd.DataFrame) -> None:
        self.values = values

    def beside(self, frame: pd.DataFrame, tokens: str) -> pd.DataFrame:
        """Put the columns right of a column of item tokens; ``item_`` goes before a name that the frame has already."""
        shown = self.values.reindex(frame[tokens]).fillna("").set_index(frame.index)
        place = frame.columns.get_loc(tokens)
        for i, name in enumerate(shown, start=1):
            frame.insert(place + i, name if name not in frame else f"item_{name}", shown[name].astype(object))
        return frame

    def of(self, token: str) -> list[str]:
        """Return what there is of an item, in the order of the columns; nothing for an item without a row."""
        if token not in self.values.index:
            return []
        return [value for value in self.values.loc[token] if value]

    def name(self, token: str) -> str:
        """Return the first of its values, or its token if it has none."""
        return next(iter(self.of(token)), token)


def read_item_columns(config: Any, names: Sequence[str]) -> ItemColumns:
    """Read columns of the ``.item`` file.

    Args:
        config: the settings; they say where the file is.
        names: of the columns; none reads no file.

    Raises:
        DataError: if the file or a column is missing, or the file cannot be read.
    """
    if not names:
        return ItemColumns(pd.DataFrame())
    file, key = _examine(config, f"it should hold the column '{names[0]}'"), config["ITEM_ID_FIELD"]
    wanted = list(dict.fromkeys(names))
    for name in (key, *wanted):
        if name not in file.types:
            raise DataError(f"{file.path} has no column '{name}', only {', '.join(file.types)}")
    frame = file.read(list(dict.fromkeys((key, *wanted))))
    file.check_unique(frame, key)
    return ItemColumns(frame.drop_duplicates(key).set_index(key, drop=False)[wanted])


def find_title(config: Any) -> list[str]:
    """Return the column of the ``.item`` file that is plainly a title, nothing if there is none to be read."""
    try:
        types = _examine(config, "").types
    except DataError:
        return []
    return [name for name in TITLES if name in types][:1]


def _examine(config: Any, why: str) -> AtomicFile:
    item_file = item_file_of(config)
    if not item_file.path.is_file():
        raise DataError(f"{item_file.path} not found: {why}")
    return examine(item_file.path, config["field_separator"], config["encoding"])
