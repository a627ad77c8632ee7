"""Files of item vectors: each format read as item tokens and rows.

A file is data: pickled objects in it are refused, never run.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch

from recbole_slifmr.data.table import examine
from recbole_slifmr.errors import DataError
from recbole_slifmr.files import replace_file

IDS_FILE = "items.txt"
OWN_IDS = ".ids.txt"  # text.npy has text.ids.txt
IDS = "ids"  # in an archive, beside the matrix
VALUES = ("values", "embeddings")
EMPTY_CELLS = ["", "nan", "NaN", "NA"]
_IDS_HOLD = "it should name the item of each feature row, one token a line"
_NAME_IDS = "name the tokens' with 'ids'"


class ItemFile(NamedTuple):
    """An atomic file of items, such as ``.item``, and how to read it.

    Attributes:
        path: the file, which may be absent.
        id_field: the column of the item token.
        separator: between columns.
        seq_separator: between the numbers of a ``float_seq``.
    """

    path: Path
    id_field: str
    separator: str = "\t"
    seq_separator: str = " "

    def columns(self, *fields: str) -> pd.DataFrame:
        """Return columns as strings, indexed by item token.

        Raises:
            DataError: if the file or a column is missing.
        """
        if not self.path.is_file():
            raise DataError(f"{self.path} not found: it should hold the column '{fields[0]}'")
        file = examine(self.path, self.separator)
        names = dict.fromkeys((self.id_field, *fields))
        for name in names:
            if name not in file.types:
                raise DataError(f"{self.path} has no column '{name}', only {', '.join(file.types)}")
        return file.read(list(names)).set_index(self.id_field, drop=False)[list(fields)]


class Vectors(NamedTuple):
    """The vectors in a file.

    Attributes:
        tokens: item token of each row, ``[n]`` strings; a token may occur more than once.
        values: ``[n, d]`` numbers; left in the file if its format allows it, to be read row by row.
        path: the file.
        ids: where the tokens are from, for the log.
    """

    tokens: np.ndarray
    values: np.ndarray
    path: Path
    ids: str


def read_vectors(path: Path, item_file: ItemFile, ids: str | None = None, field: str | None = None) -> Vectors:
    """Read a file of vectors.

    * ``.npy``: a matrix.
    * ``.npz``, ``.pt``, ``.pth``: a matrix, alone or as ``values`` or ``embeddings`` in an archive or dict that may
      have the tokens as ``ids``.
    * ``.csv``, ``.tsv``, ``.parquet``: a column of tokens, the rest numbers or one column of lists.
    * any other: a RecBole atomic file with a ``float_seq`` column ``field``.

    Args:
        path: the file.
        item_file: the data set's ``.item`` file; its ``id_field`` is the default name of the column of tokens.
        ids: for a table the column of tokens; for others a file beside ``path`` with one token a line. Without it the
            rows belong to the tokens in the file itself, in ``STEM.ids.txt`` or ``items.txt`` beside it, else to the
            rows of the ``.item`` file.
        field: the one column of a table to read; all but the tokens if None.

    Raises:
        DataError: naming the file and what is wrong with it.
    """
    suffix = path.suffix.lower()
    if suffix in TABLES:
        column = ids or item_file.id_field
        tokens, values = TABLES[suffix](path, column, field)
        where = f"column {column}"
    elif suffix in ARRAYS:
        if field is not None:
            raise DataError(f"{path} has no columns: 'field' is for tables and atomic files")
        inner, values = ARRAYS[suffix](path)
        tokens, where = _find_tokens(path, ids, inner, item_file)
    elif field is not None:
        atomic = item_file._replace(path=path, id_field=ids or item_file.id_field)
        tokens, values = _parse_float_seq(atomic, field)
        where = f"column {atomic.id_field}"
    else:
        known = ", ".join([*ARRAYS, *TABLES])
        raise DataError(f"{path}: the formats are {known}, and atomic files whose column is named by 'field'")
    check_matrix(path, values)
    if len(tokens) != len(values):
        raise DataError(f"{path} has {len(values)} rows but {where} names {len(tokens)} items: they must correspond")
    return Vectors(tokens, values, path, where)


def check_matrix(path: Path, values: np.ndarray) -> None:
    """Check the shape and type of what a file holds.

    Raises:
        DataError: if it is no matrix of numbers, or has no rows.
    """
    if values.ndim != 2 or values.shape[1] == 0 or values.dtype.kind not in "fiu":
        raise DataError(f"{path} must be a matrix of numbers [items, dimension], not {values.dtype} {values.shape}")
    if len(values) == 0:
        raise DataError(f"{path} holds no vectors")


@contextmanager
def _reading(path: Path, kind: str, hint: str = "") -> Iterator[None]:
    """Name the file in whatever its reader raises: a broken file can raise anything."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise DataError(f"{path} cannot be read as {kind}: {hint or reason}") from error


# -- tokens -----------------------------------------------------------------------------------------------------------


def _find_tokens(path: Path, ids: str | None, inner: Any, item_file: ItemFile) -> tuple[np.ndarray, str]:
    """Return the tokens of the rows of an array and where they are from."""
    if ids is not None:
        return read_tokens(path.parent / ids), ids
    if inner is not None:
        return _as_tokens(inner, path), f"its '{IDS}'"
    for beside in (path.with_name(path.stem + OWN_IDS), path.with_name(IDS_FILE)):
        if beside.is_file():
            return read_tokens(beside), beside.name
    if not item_file.path.is_file():
        raise DataError(f"{path.with_name(IDS_FILE)} not found: {_IDS_HOLD}")
    return item_file.columns(item_file.id_field).index.to_numpy(str), item_file.path.name


def read_tokens(path: Path) -> np.ndarray:
    """Read a list of item tokens, one a line.

    Raises:
        DataError: if the file is missing or not UTF-8.
    """
    if not path.is_file():
        raise DataError(f"{path} not found: {_IDS_HOLD}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: {error}") from error
    return np.array(text.replace("\r\n", "\n").removesuffix("\n").split("\n"))


def write_tokens(path: Path, tokens: Iterable[str]) -> None:
    """Write a list of item tokens, one a line, whole or not at all."""
    replace_file(path, lambda part: part.write_text("".join(f"{token}\n" for token in tokens), encoding="utf-8"))


def _as_tokens(ids: Any, path: Path) -> np.ndarray:
    if isinstance(ids, torch.Tensor):
        ids = ids.numpy()
    elif isinstance(ids, Sequence) and all(type(entry) in (str, int) for entry in ids):
        ids = np.array([str(entry) for entry in ids])
    if not isinstance(ids, np.ndarray) or ids.dtype.kind not in "USiu" or ids.ndim != 1:
        raise DataError(f"{path}: '{IDS}' must be a list of item tokens, strings or whole numbers")
    return np.char.decode(ids, "utf-8") if ids.dtype.kind == "S" else ids.astype(str)


# -- arrays -----------------------------------------------------------------------------------------------------------


def read_npy(path: Path) -> np.ndarray:
    """Return the array in a ``.npy`` file, mapped into memory.

    Raises:
        DataError: if it holds anything else.
    """
    with _reading(path, "a .npy array of numbers"):
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(array, np.ndarray):
            raise DataError(f"{path} is an archive: name it .npz")
        return array


def _read_npz(path: Path) -> tuple[Any, np.ndarray]:
    with _reading(path, "an .npz archive of arrays"):
        archive = np.load(path, allow_pickle=False)
        if isinstance(archive, np.ndarray):
            raise DataError(f"{path} is a single array: name it .npy")
        with archive:
            return archive[IDS] if IDS in archive.files else None, archive[_pick(path, archive.files)]


def _read_pt(path: Path) -> tuple[Any, np.ndarray]:
    hint = "it must hold a tensor, or a dict of 'ids' (a list of strings) and 'values' (a tensor), and nothing else"
    with _reading(path, "a file of tensors", hint):
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # the format before torch 1.6 cannot be mapped
            content = torch.load(path, map_location="cpu", weights_only=True)
        ids = None
        if isinstance(content, dict):
            ids, content = content.get(IDS), content[_pick(path, [str(name) for name in content])]
        if not isinstance(content, torch.Tensor):
            raise DataError(f"{path}: {hint}")
        content = content.detach()
        return ids, (content.float() if content.dtype == torch.bfloat16 else content).numpy()


def _pick(path: Path, names: Sequence[str]) -> str:
    """Return the name of the matrix."""
    names = [name for name in names if name != IDS]
    for name in VALUES:
        if name in names:
            return name
    if len(names) == 1:
        return names[0]
    raise DataError(f"{path} must hold one matrix, named 'values' if other things are there, not {names}")


# -- tables -----------------------------------------------------------------------------------------------------------


def _choose(path: Path, columns: Sequence[str], id_column: str, field: str | None, fix: str = _NAME_IDS) -> list[str]:
    """Return the columns of the vector."""
    for name in (id_column, field):
        if name is not None and name not in columns:
            raise DataError(f"{path} has no column '{name}', only {', '.join(columns)}: {fix}")
    chosen = [name for name in columns if name != id_column] if field is None else [field]
    if not chosen:
        raise DataError(f"{path} has no column beside '{id_column}'")
    return chosen


def _read_delimited(separator: str) -> Callable[[Path, str, str | None], tuple[np.ndarray, np.ndarray]]:
    def read(path: Path, id_column: str, field: str | None) -> tuple[np.ndarray, np.ndarray]:
        options: dict[str, Any] = {"sep": separator, "encoding": "utf-8-sig", "keep_default_na": False}
        with _reading(path, "a table"), warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)  # more values than columns
            header = pd.read_csv(path, nrows=1, header=None, dtype=str, **options).iloc[0].tolist()
            for i, column in enumerate(header):
                if not column or column in header[:i]:
                    fault = f"is a second '{column}'" if column else "has no name"
                    raise DataError(f"{path}: column {i + 1} {fault}: name it or leave it out")
            columns = _choose(path, header, id_column, field)
            options["index_col"] = False
            try:
                frame = pd.read_csv(
                    path,
                    dtype={name: np.float32 if name in columns else str for name in header},
                    na_values=dict.fromkeys(columns, EMPTY_CELLS),
                    **options,
                )
            except ValueError:
                _name_the_cell(path, pd.read_csv(path, dtype=str, **options), id_column, columns)
                raise
        return frame[id_column].to_numpy(str), frame[columns].to_numpy(np.float32)

    return read


def _name_the_cell(path: Path, frame: pd.DataFrame, id_column: str, columns: Sequence[str]) -> None:
    """Say which cell is no number, if one is not."""
    for name in columns:
        bad = pd.to_numeric(frame[name], errors="coerce").isna() & ~frame[name].isin(EMPTY_CELLS)
        if bad.any():
            row = frame[bad].iloc[0]
            raise DataError(
                f"{path}: '{name}' of item '{row[id_column]}' is '{row[name]}' and no number: if it is not part of the "
                "vector, leave the column out"
            )


_PANDAS_INDEX = re.compile(r"__index_level_\d+__")


def read_parquet(path: Path, id_column: str, field: str | None, fix: str = _NAME_IDS) -> tuple[np.ndarray, np.ndarray]:
    """Return item tokens ``[n]`` and vectors ``[n, d]`` of a Parquet table.

    Args:
        path: the file.
        id_column: the column of tokens.
        field: the column of numbers or lists of numbers; all but the tokens if None.
        fix: what to do if there is no such column, in words.

    Raises:
        DataError: naming what is wrong.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    with _reading(path, "a parquet table"):
        file = pq.ParquetFile(path, memory_map=True)
        names = file.schema_arrow.names
        present = [name for name in names if name == id_column or not _PANDAS_INDEX.fullmatch(name)]
        chosen = _choose(path, present, id_column, field, fix)
        kinds = [file.schema_arrow.field(name).type for name in chosen]
        lists = [pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
                 for kind in kinds]  # fmt: skip
        for name, kind, is_list in zip(chosen, kinds, lists, strict=True):
            number = pa.types.is_integer(kind) or pa.types.is_floating(kind)
            if not number and not (is_list and len(chosen) == 1):
                raise DataError(
                    f"{path}: column '{name}' is {kind}; beside '{id_column}' there must be either columns of numbers "
                    "or one column of lists of numbers: leave the others out, or name the vector's with 'field'"
                )
        table = file.read(columns=[id_column, *chosen])
        if lists[0]:
            table = table.filter(table[chosen[0]].is_valid())  # an item without a list has no vector
        tokens = table[id_column].cast(pa.string()).to_pylist()
        if None in tokens:
            raise DataError(f"{path}: row {tokens.index(None) + 1} has no '{id_column}'")
        if lists[0]:
            return np.array(tokens, dtype=str), _stack_lists(path, tokens, table[chosen[0]])
        values = np.empty((len(table), len(chosen)), dtype=np.float32)
        for j, name in enumerate(chosen):
            values[:, j] = table[name].to_numpy()
        return np.array(tokens, dtype=str), values


def _stack_lists(path: Path, tokens: Sequence[str], column: Any) -> np.ndarray:
    import pyarrow.compute as pc

    lengths = pc.list_value_length(column).to_numpy()
    if len(lengths) == 0:
        raise DataError(f"{path} holds no vectors")
    if (lengths != lengths[0]).any():
        odd = int((lengths != lengths[0]).argmax())
        raise DataError(f"{path}: item '{tokens[odd]}' has {lengths[odd]} numbers, others have {lengths[0]}")
    flat = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in column.chunks]
    values = np.concatenate(flat).reshape(len(lengths), -1)
    with np.errstate(over="ignore"):  # beyond float32: infinite, and named so
        return values.astype(np.float32, copy=False) if values.dtype.kind in "fiu" else values


def _parse_float_seq(file: ItemFile, field: str) -> tuple[np.ndarray, np.ndarray]:
    """Turn a ``float_seq`` column into tokens and a matrix; items with an empty cell have no vector."""
    column = file.columns(field)[field]
    column = column[column.str.strip() != ""]
    rows = column.str.split(file.seq_separator)
    lengths = rows.str.len()
    if len(rows) == 0:
        raise DataError(f"{file.path}: the column '{field}' is empty")
    if lengths.nunique() > 1:
        odd = int((lengths != lengths.iloc[0]).to_numpy().argmax())
        raise DataError(
            f"{file.path}: '{field}' of item '{column.index[odd]}' has {lengths.iloc[odd]} numbers, others have "
            f"{lengths.iloc[0]}"
        )
    try:
        values = np.array(rows.tolist(), dtype=np.float32)
    except ValueError as error:
        raise DataError(f"{file.path}: '{field}' must hold numbers: {error}") from None
    return column.index.to_numpy(str), values


ARRAYS: dict[str, Callable[[Path], tuple[Any, np.ndarray]]] = {
    ".npy": lambda path: (None, read_npy(path)), ".npz": _read_npz, ".pt": _read_pt, ".pth": _read_pt,
}  # fmt: skip
TABLES: dict[str, Callable[[Path, str, str | None], tuple[np.ndarray, np.ndarray]]] = {
    ".csv": _read_delimited(","), ".tsv": _read_delimited("\t"), ".parquet": read_parquet,
}  # fmt: skip
