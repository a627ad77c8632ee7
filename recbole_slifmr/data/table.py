"""RecBole's atomic files, looked at before they are read: what is wrong is named with its line.

A parser that does not expect the fault drops values, joins lines or fails somewhere else. The bytes are counted in
blocks of whole lines, so that a good file costs a fraction of the time it takes to read it.
"""

from __future__ import annotations

import codecs
import csv
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import recbole.data.dataset.dataset

from recbole_slifmr.errors import DataError

TYPES = ("token", "token_seq", "float", "float_seq")
MISSING_NUMBER = ("", "NA", "N/A", "n/a", "#N/A", "<NA>", "nan", "NaN", "-nan", "-NaN", "null", "NULL", "None")
_BLOCK = 1 << 24  # bytes
_UTF8 = ("utf-8", "utf-8-sig")


class AtomicFile(NamedTuple):
    """A file whose lines all have as many values as its first line names columns.

    Attributes:
        path: the file.
        types: type by column.
        separator: between values.
        encoding: with which it reads; ``utf-8-sig`` if it begins with a byte order mark.
        n_rows: lines with values.
    """

    path: Path
    types: dict[str, str]
    separator: str
    encoding: str
    n_rows: int

    def line_of(self, row: int) -> int:
        """Return the number of the line, from 1, that holds a row, from 0."""
        numbers = (n for n, line in _lines(self) if not _is_blank(line, self.separator))
        return next(n for i, n in enumerate(numbers) if i == row + 1)  # the first is the header

    def read(self, columns: Sequence[str]) -> pd.DataFrame:
        """Return columns as strings, missing values as ``""``."""
        frame = pd.read_csv(
            self.path,
            sep=self.separator,
            usecols=[f"{name}:{self.types[name]}" for name in columns],
            dtype=str,
            keep_default_na=False,
            encoding=self.encoding,
            engine="c" if len(self.separator.encode()) == 1 else "python",
        )
        return frame.rename(columns=lambda name: name.split(":")[0])[list(columns)]

    def find_bad_number(self, columns: Sequence[str], seq_separator: str) -> str | None:
        """Say where the first value is that is no number, among the ``float`` and ``float_seq`` of these columns."""
        for name in columns:
            if not self.types[name].startswith("float"):
                continue
            values = self.read([name])[name]
            if self.types[name] == "float_seq":
                values = values.str.split(seq_separator).explode()
            bad = pd.to_numeric(values.where(~values.isin(MISSING_NUMBER)), errors="coerce").isna()
            bad &= ~values.isin(MISSING_NUMBER) & values.notna()
            if bad.any():
                row = int(values.index[bad.to_numpy()][0])
                text = values[bad].iloc[0]
                return f"{self.path}, line {self.line_of(row)}: '{text}' in column '{name}' is no number"
        return None

    def check_ids(self, frame: pd.DataFrame, ids: Sequence[str]) -> None:
        """Refuse missing ids, whose rows RecBole drops.

        Raises:
            DataError: naming the line of the first, in a frame of all rows of the file.
        """
        for field in ids:
            missing = frame[field].isna().to_numpy()
            if missing.any():
                line = self.line_of(int(missing.argmax()))
                raise DataError(f"{self.path}, line {line}: '{field}' is empty: fill it in or drop the line")

    def check_numbers(self, frame: pd.DataFrame, may_be_missing: bool) -> None:
        """Refuse infinite numbers and, unless they may be, missing ones, which RecBole replaces by the column's mean.

        Raises:
            DataError: naming the line of the first, in a frame of all rows of the file.
        """
        for field in frame.select_dtypes("float64"):
            values = frame[field].to_numpy()
            bad = np.isinf(values) if may_be_missing else ~np.isfinite(values)
            if bad.any():
                line, value = self.line_of(int(bad.argmax())), values[bad.argmax()]
                what = "is missing" if np.isnan(value) else f"is {value}"
                raise DataError(
                    f"{self.path}, line {line}: '{field}' {what}: put a number there, drop the line or leave the "
                    "column out of load_col"
                )

    def check_unique(self, frame: pd.DataFrame, key: str) -> None:
        """Refuse rows that contradict each other: RecBole takes one of them. The same row twice does no harm.

        Raises:
            DataError: naming the lines, in a frame of all rows of the file.
        """
        again = frame[key].duplicated(keep=False)
        rows = frame[again].astype(str).drop_duplicates()
        differing = rows[rows[key].duplicated(keep=False)]
        if len(differing):
            token = differing[key].iloc[0]
            first, second = (self.line_of(int(row)) for row in differing.index[differing[key] == token][:2])
            raise DataError(
                f"{self.path}: lines {first} and {second} say different things of {key} '{token}': drop one"
            )


class _CheckedPandas:
    """pandas, but ``read_csv`` takes the C parser where it can, and only an empty value for a missing token.

    The C parser is about eight times as fast as the Python parser that RecBole asks for; numbers are the same. By
    default pandas takes tokens such as NA, None and null for missing, and RecBole then drops their interactions.
    """

    def __getattr__(self, name: str) -> Any:
        return getattr(pd, name)

    @staticmethod
    def read_csv(*args: Any, delimiter: str, dtype: dict[str, Any], **kwargs: Any) -> pd.DataFrame:
        missing = {name: [""] if kind is str else list(MISSING_NUMBER) for name, kind in dtype.items()}
        kwargs |= {"dtype": dtype, "na_values": missing, "keep_default_na": False}
        if len(delimiter.encode()) == 1:
            kwargs |= {"engine": "c", "float_precision": "round_trip"}
        return pd.read_csv(*args, delimiter=delimiter if len(delimiter) == 1 else re.escape(delimiter), **kwargs)


@contextmanager
def reading_with(config: Any, encoding: str) -> Iterator[None]:
    """Have RecBole read files with :class:`_CheckedPandas` and an encoding."""
    original, before = recbole.data.dataset.dataset.pd, config["encoding"]
    try:
        recbole.data.dataset.dataset.pd = _CheckedPandas()
        config["encoding"] = encoding
        yield
    finally:
        recbole.data.dataset.dataset.pd = original
        config["encoding"] = before


def examine(path: Path, separator: str, encoding: str | None = None) -> AtomicFile:
    """Look at a file without reading its values.

    Args:
        path: the file.
        separator: between values; one or more characters.
        encoding: UTF-8 if None.

    Raises:
        DataError: for a file that is empty or no text, a first line that does not name columns as ``name:type``, a line
            with more or fewer values than that, a quotation mark that is not closed on its line.
    """
    encoding = encoding or "utf-8"
    try:
        known = codecs.lookup(encoding).name
    except LookupError:
        raise DataError(f"encoding: Python knows no '{encoding}'") from None
    if known in _UTF8:
        with path.open("rb") as file:
            encoding = "utf-8-sig" if file.read(3) == codecs.BOM_UTF8 else "utf-8"
    types: dict[str, str] = {}
    n_before = n_rows = 0
    try:
        for block in _blocks(path, encoding):
            if n_before == 0:
                types = _parse_header(path, block.partition(b"\n")[0].decode(), separator)
            n_lines, n_blank = _check_block(path, block, separator, len(types), n_before)
            n_before, n_rows = n_before + n_lines, n_rows + n_lines - n_blank
    except UnicodeError as error:
        raise DataError(
            f"{path}, line {_line_of_bad_byte(path, encoding)}, is not {encoding.upper().removesuffix('-SIG')} "
            f"({getattr(error, 'reason', error)}): convert the file or set 'encoding'"
        ) from None
    if not types:
        raise DataError(f"{path} is empty: its first line must name the columns, e.g. item_id:token")
    return AtomicFile(path, types, separator, encoding, n_rows - 1)


def _blocks(path: Path, encoding: str) -> Iterator[bytes]:
    """Yield blocks of whole lines in UTF-8, ended by line feeds; UnicodeError if the file is not so encoded."""
    if encoding in _UTF8:
        with path.open("rb") as file:
            file.seek(3 if encoding == "utf-8-sig" else 0)
            while block := file.read(_BLOCK):
                block += file.readline()
                if not block.isascii():
                    block.decode()
                yield _with_line_feeds(block)
    else:
        with path.open(encoding=encoding, newline="") as text:
            while part := text.read(_BLOCK):
                yield _with_line_feeds((part + text.readline()).encode())


def _with_line_feeds(block: bytes) -> bytes:
    return block.replace(b"\r\n", b"\n").replace(b"\r", b"\n") if b"\r" in block else block


def _lines(file: AtomicFile) -> Iterator[tuple[int, str]]:
    blocks = _blocks(file.path, file.encoding)
    lines = (line for block in blocks for line in block.removesuffix(b"\n").split(b"\n"))
    return enumerate((line.decode() for line in lines), 1)


def _is_blank(line: str, separator: str) -> bool:
    """Return whether parsers skip a line."""
    return not line.strip(" \t") and separator not in line


def _line_of_bad_byte(path: Path, encoding: str) -> int:
    content = path.read_bytes()
    try:
        content.decode(encoding)
    except UnicodeDecodeError as error:
        return content[: error.start].count(b"\n") + 1
    except UnicodeError:
        pass  # such as UTF-16 without its mark
    return 1


def _parse_header(path: Path, line: str, separator: str) -> dict[str, str]:
    if "\0" in line:
        raise DataError(f"{path} is no text, or its encoding is another: convert it to UTF-8 or set 'encoding'")
    if not line.strip():
        raise DataError(f"{path}: the first line is empty: it must name the columns, e.g. item_id:token")
    types: dict[str, str] = {}
    for column in line.split(separator):
        name, colon, kind = column.partition(":")
        if not name or not colon or ":" in kind:
            raise DataError(
                f"{path}: column '{column}' of the first line must read name:type, e.g. item_id:token, with "
                f"{separator!r} (field_separator) between columns"
            )
        if kind not in TYPES:
            raise DataError(
                f"{path}: column '{column}' of the first line must have one of the types {', '.join(TYPES)}"
            )
        if name in types:
            raise DataError(f"{path}: the first line names column '{name}' twice")
        types[name] = kind
    return types


def _check_block(path: Path, block: bytes, separator: str, n_columns: int, n_before: int) -> tuple[int, int]:
    """Check lines that follow ``n_before`` others; return their number and how many of them are blank."""
    if (at := block.find(b"\0")) >= 0:
        number = n_before + block.count(b"\n", 0, at) + 1
        raise DataError(f"{path}, line {number}, holds a zero byte: it is no text, or not UTF-8: see 'encoding'")
    content = np.frombuffer(block, np.uint8)
    ends = np.flatnonzero(content == ord("\n"))
    if not block.endswith(b"\n"):
        ends = np.append(ends, len(content))
    starts = np.concatenate([[0], ends[:-1] + 1])
    sign = separator.encode()
    if len(sign) == 1:
        found = np.searchsorted(np.flatnonzero(content == sign[0]), ends)
        counts = np.diff(found, prepend=0)
    else:
        counts = np.array([block.count(sign, start, end) for start, end in zip(starts, ends, strict=True)])
    empty = starts == ends
    unsure = counts != n_columns - 1
    if b'"' in block:
        unsure[np.searchsorted(ends, np.flatnonzero(content == ord('"')))] = True
    n_blank = int(empty.sum())
    for i in np.flatnonzero(unsure & ~empty):
        line = block[starts[i] : ends[i]].decode()
        if _is_blank(line, separator):
            n_blank += 1
            continue
        n_values = _count_values(path, line, separator, n_before + int(i) + 1)
        if n_values != n_columns:
            raise DataError(
                f"{path}, line {n_before + i + 1}: {n_values} values, but the first line names {n_columns} columns, "
                f"with {separator!r} (field_separator) between them: mend or drop the line"
            )
    return len(ends), n_blank


def _count_values(path: Path, line: str, separator: str, number: int) -> int:
    """Return the number of values of a line; those in quotation marks may hold the separator."""
    if '"' not in line or len(separator) > 1:
        return line.count(separator) + 1
    try:
        values = next(csv.reader([line + "\n"], delimiter=separator))
    except csv.Error as error:
        raise DataError(f"{path}, line {number}: {error}") from None
    if values[-1].endswith("\n"):
        raise DataError(f"{path}, line {number}: a quotation mark opens a value that does not end: remove it")
    return len(values)
