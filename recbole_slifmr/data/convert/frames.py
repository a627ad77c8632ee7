"""Frames of pandas in memory as an atomic folder: written as the files that ``convert csv`` reads, and read by it."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from recbole_slifmr.data.convert.table import Columns, convert_tables
from recbole_slifmr.data.vectors import IDS_FILE, write_tokens
from recbole_slifmr.errors import DataError, SettingError

NAME = "frames"  # of the data set
# What columns are usually called, in lower case and without signs; the first one that is there is taken.
USUAL = {
    "user": ("userid", "user", "uid", "customerid", "reviewerid"),
    "item": ("itemid", "item", "iid", "movieid", "productid", "asin", "trackid", "artistid", "bookid"),
    "rating": ("rating", "stars", "score"),
    "time": ("timestamp", "time", "datetime", "date"),
    "head": ("headid", "head", "subject"),
    "relation": ("relationid", "relation", "predicate"),
    "tail": ("tailid", "tail", "object"),
    "entity": ("entityid", "entity"),
}
NAMES = vars(Columns())  # of the columns in the files


def convert_frames(
    out: Path,
    interactions: pd.DataFrame,
    items: pd.DataFrame | None = None,
    triples: pd.DataFrame | None = None,
    links: pd.DataFrame | None = None,
    features: Mapping[str, Any] | None = None,
    columns: Mapping[str, str] | None = None,
) -> None:
    """Turn frames into the atomic folder ``out/frames``.

    Args:
        out: folder of data sets to write into.
        interactions: a row per interaction: user, item, perhaps rating and time.
        items: a row per item and anything about it.
        triples: head, relation and tail.
        links: item and entity; without it an item is the entity of the same token.
        features: per modality an array with a row per row of ``items``, or a frame whose column of items or whose index
            names the item of each row, with columns of numbers or one column of lists.
        columns: names of columns that are none of the usual ones, by what they hold (the keys of ``USUAL``).

    Raises:
        DataError: naming frame, column and fix.
        SettingError: for what is no frame, an unknown key of ``columns`` or the name of a modality.
    """
    columns = dict(columns or {})
    unknown = set(columns) - set(USUAL)
    if unknown:
        raise SettingError(f"columns: '{sorted(unknown)[0]}' is none of {', '.join(USUAL)}")
    frames = [frame for frame in (interactions, items, triples, links) if frame is not None]
    frames += [values for values in (features or {}).values() if isinstance(values, pd.DataFrame)]
    for role, name in columns.items():
        if not any(name in getattr(frame, "columns", ()) for frame in frames):
            raise DataError(f"no frame has the column '{name}' that columns['{role}'] names: mend it")
    with tempfile.TemporaryDirectory(prefix="slifmr-") as scratch:
        folder = Path(scratch)
        tables = {"interactions": _interactions(interactions, columns)}
        if items is not None:
            tables["items"] = _items(items, columns)
        if triples is not None:
            tables["triples"] = _tokens_of(triples, "triples", ("head", "relation", "tail"), columns)
        if links is not None:
            tables["links"] = _tokens_of(links, "links", ("item", "entity"), columns, unique="item")
        paths = {what: folder / f"{what}.csv" for what in tables}
        for what, table in tables.items():
            table.to_csv(paths[what], index=False)
        tokens = tables["items"][NAMES["item"]] if items is not None else None
        files = {}
        for name, values in (features or {}).items():
            rows, matrix = feature_rows(values, f"features['{name}']", tokens, columns)
            files[name] = folder / "features" / str(name) / "matrix.npy"
            files[name].parent.mkdir(parents=True)
            np.save(files[name], matrix)
            write_tokens(files[name].parent / IDS_FILE, rows)
        try:
            convert_tables(
                paths["interactions"], out, NAME, paths.get("items"), paths.get("triples"), paths.get("links"), files,
                separator=",",
            )  # fmt: skip
        except (DataError, SettingError) as error:
            raise type(error)(_without_files(str(error), folder)) from error


def find_column(frame: Any, what: str, role: str, columns: Mapping[str, str]) -> str | None:
    """Return the column of a frame that plays a role: the one named in ``columns``, else a usual one, else None.

    Raises:
        SettingError: if it is no frame.
    """
    if not isinstance(frame, pd.DataFrame):
        raise SettingError(f"{what} must be a pandas DataFrame, not {type(frame).__name__}")
    if role in columns and columns[role] in frame.columns:
        return columns[role]
    plain = {re.sub(r"\W|_", "", str(name)).lower(): name for name in reversed(frame.columns)}
    return next((plain[name] for name in USUAL[role] if name in plain), None)


def tokens_of(frame: pd.DataFrame, what: str, role: str, columns: Mapping[str, str], unique: bool = False) -> pd.Series:
    """Return the tokens of users, items and so on in a frame, as strings.

    Args:
        frame: the frame.
        what: its name in messages.
        role: a key of ``USUAL``.
        columns: see :func:`convert_frames`.
        unique: whether a token may occur only once.

    Raises:
        DataError: if there is no such column, or naming the first row that has no token.
    """
    name = find_column(frame, what, role, columns)
    if name is None:
        raise DataError(
            f"{what} has no column of {role}s, only {_names(frame)}: call it {NAMES[role]}, or name it by "
            f"columns={{'{role}': ...}}"
        )
    return as_tokens(frame[name], f"{what}, column '{name}'", unique)


def as_tokens(values: pd.Series, where: str, unique: bool = False) -> pd.Series:
    """Return values as tokens: whole numbers without a point, all else as Python writes it; see :func:`tokens_of`."""
    _refuse(values.isna(), values, where, "there is no value: fill it in or drop the row")
    if is_whole(values):
        values = values.astype("int64")
    values = values.astype(str).reset_index(drop=True)
    _refuse(values == "", values, where, "there is no value: fill it in or drop the row")
    _refuse(values.str.contains(r"[\t\r\n]"), values, where, "has a tab or a line break: take it out")
    if unique:
        _refuse(values.duplicated(), values, where, "is there twice: drop one of the rows")
    return values


def is_whole(values: pd.Series) -> bool:
    """Return whether tokens are whole numbers, if only by value."""
    kinds = pd.api.types
    return bool(kinds.is_integer_dtype(values) or (kinds.is_float_dtype(values) and (values % 1 == 0).all()))


def _names(frame: pd.DataFrame) -> str:
    return ", ".join(map(str, frame.columns)) or "none at all"


def _refuse(bad: pd.Series, values: pd.Series, where: str, why: str) -> None:
    """Name the first bad value, if there is one, by its position among the rows."""
    if bad.any():
        row = int(bad.to_numpy().argmax())
        raise DataError(f"{where}, row {row} ({values.iloc[row]!r}): {why}")


def _tokens_of(
    frame: pd.DataFrame, what: str, roles: tuple[str, ...], columns: Mapping[str, str], unique: str = ""
) -> pd.DataFrame:
    return pd.DataFrame({NAMES[role]: tokens_of(frame, what, role, columns, role == unique) for role in roles})


def _interactions(frame: pd.DataFrame, columns: Mapping[str, str]) -> pd.DataFrame:
    table = _tokens_of(frame, "interactions", ("user", "item"), columns)
    for role in ("rating", "time"):
        name = find_column(frame, "interactions", role, columns)
        if name is not None:
            table[NAMES[role]] = _numbers(frame[name].reset_index(drop=True), f"interactions, column '{name}'")
    return table


def _numbers(values: pd.Series, where: str) -> pd.Series:
    """Return numbers as they are, times as seconds since 1970."""
    if pd.api.types.is_datetime64_any_dtype(values):
        numbers = (values - pd.Timestamp(0, tz=values.dt.tz)) / pd.Timedelta(seconds=1)
    else:
        numbers = pd.to_numeric(values, errors="coerce")
    _refuse(~np.isfinite(numbers.astype(float)), values, where, "must be a number or a time of pandas")
    return numbers


def _items(frame: pd.DataFrame, columns: Mapping[str, str]) -> pd.DataFrame:
    table = _tokens_of(frame, "items", ("item",), columns, unique="item")
    key = find_column(frame, "items", "item", columns)
    for name in frame.columns:
        if name not in (key, NAMES["item"]):
            values = frame[name].reset_index(drop=True)
            table[str(name)] = values.astype(str).str.replace(r"\s+", " ", regex=True).where(values.notna(), "")
    return table


def feature_rows(
    values: Any, what: str, items: pd.Series | None, columns: Mapping[str, str]
) -> tuple[pd.Series, np.ndarray]:
    """Return item tokens ``[n]`` and rows ``[n, d]``."""
    if not isinstance(values, pd.DataFrame):
        matrix = np.asarray(values)
        if items is None:
            raise DataError(
                f"{what} is an array: give items, whose rows it has, or a frame that names the item of each"
            )
        if matrix.ndim != 2 or len(matrix) != len(items):
            raise DataError(
                f"{what} has the shape {matrix.shape}: it must have a row for each of the {len(items)} items"
            )
        return items, _checked(matrix, what)
    key = find_column(values, what, "item", columns)
    if key is not None:
        tokens = tokens_of(values, what, "item", columns, unique=True)
        values = values.drop(columns=key)
    elif isinstance(values.index, pd.RangeIndex):
        raise DataError(
            f"{what} has no column of items, only {_names(values)}: call it {NAMES['item']}, or set the index"
        )
    else:
        tokens = as_tokens(values.index.to_series(), f"{what}, index", unique=True)
    if values.shape[1] == 1 and pd.api.types.is_object_dtype(values.dtypes.iloc[0]):
        try:
            return tokens, _checked(np.stack([np.asarray(row) for row in values.iloc[:, 0]]), what)
        except ValueError as error:
            raise DataError(f"{what}, column '{values.columns[0]}': its lists must be of one length") from error
    for name in values.columns:
        if not pd.api.types.is_numeric_dtype(values[name]):
            raise DataError(f"{what}, column '{name}': must hold numbers, not {values[name].dtype}: leave it out")
    return tokens, _checked(values.to_numpy(), what)


def _checked(matrix: np.ndarray, what: str) -> np.ndarray:
    if matrix.ndim != 2 or matrix.dtype.kind not in "fiu" or 0 in matrix.shape:
        raise DataError(f"{what} must be a matrix of numbers [items, dimension], not {matrix.dtype} {matrix.shape}")
    finite = np.isfinite(matrix).all(axis=1)
    if not finite.all():
        raise DataError(f"{what}, row {int(finite.argmin())}: NaN or infinite: mend it or set it to zeros")
    return matrix


def _without_files(message: str, folder: Path) -> str:
    """Say a message of ``convert csv`` in the words of the frames."""
    message = re.sub(rf"{re.escape(str(folder))}/features/([^/]+)/[\w.]+", r"features['\1']", message)
    message = re.sub(rf"{re.escape(str(folder))}/(\w+)\.csv(, line \d+)?", r"\1", message)
    message = re.sub(r"--(\w+)-column", r"columns['\1']", message)
    return re.sub(r"--(items|links|triples|features)", r"\1", message)
