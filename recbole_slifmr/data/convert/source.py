"""Reading what others laid out: delimited tables, lines of whole numbers, names of numbered things.

Everything is read in blocks by compiled code. Only when something is wrong is a file gone through line by line, to say
where.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute
import pyarrow.csv

from recbole_slifmr.errors import DataError

Open = Callable[[Path], BinaryIO]
BLOCK = 1 << 24  # bytes
LONGEST_LINE = 1 << 26  # bytes
SEPARATORS = {"\t": "\\t", ",": ",", ";": ";", "|": "|"}


def open_binary(path: Path) -> BinaryIO:
    """Open a file for reading bytes."""
    return path.open("rb")


def find_file(path: Path, what: str) -> Path:
    """Return the path if there is a file with something in it.

    Raises:
        DataError: if there is none.
    """
    if not path.is_file():
        raise DataError(f"{path} not found: it should hold {what}")
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty: it should hold {what}")
    return path


def check_utf8(path: Path) -> None:
    """Go through a file for a line that is not UTF-8.

    Raises:
        DataError: naming the first one.
    """
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                raise DataError(
                    f"{path}, line {number}: not UTF-8; convert it, e.g. iconv -f latin1 -t utf-8 {path.name} > new"
                ) from None


class DelimitedFile:
    """A file of values between separators, with the columns' names in the first line.

    Args:
        path: the file.
        what: its content in words, for messages.
        separator: one character; None takes the one that splits the first line into the most columns.
        open_file: opens it.

    Raises:
        DataError: if it is missing, empty or not UTF-8, or names a column twice.
    """

    def __init__(self, path: Path, what: str, separator: str | None = None, open_file: Open = open_binary) -> None:
        self.path, self.what, self.open_file = find_file(path, what), what, open_file
        with path.open(encoding="utf-8-sig") as lines:  # a lone carriage return ends a line too, as for pyarrow
            try:
                header = lines.readline().rstrip("\n")
            except UnicodeDecodeError:
                check_utf8(path)
                raise
        self.separator = separator or max(SEPARATORS, key=header.count)
        try:
            self.columns = next(csv.reader([header], delimiter=self.separator), [])
        except csv.Error as error:
            raise DataError(f"{path}, line 1 cannot be read: {error}: it should name the columns") from None
        twice = [name for name in self.columns if name and self.columns.count(name) > 1]
        if twice:
            raise DataError(f"{path}, line 1: the column '{twice[0]}' is there twice: rename one")

    def require(self, column: str, fix: str) -> str:
        """Return the column's name if the file has it.

        Raises:
            DataError: naming the columns that there are, and what to do.
        """
        if column in self.columns:
            return column
        present = ", ".join(self.columns)
        raise DataError(
            f"{self.path}, line 1: no column '{column}', only {present}: {fix}, or check the separator "
            f"(it was split at '{SEPARATORS.get(self.separator, self.separator)}')"
        )

    def chunks(self, columns: Sequence[str]) -> Iterator[tuple[int, pd.DataFrame]]:
        """Yield the columns as strings, a chunk of rows at a time, with the number of rows before it.

        Raises:
            DataError: if there are no rows, or one has too few or too many values or is not UTF-8.
        """
        before = 0
        options: dict[str, Any] = {
            "read_options": pa.csv.ReadOptions(block_size=BLOCK),
            "parse_options": pa.csv.ParseOptions(delimiter=self.separator, newlines_in_values=True),
            "convert_options": pa.csv.ConvertOptions(
                include_columns=list(columns), column_types=dict.fromkeys(columns, pa.string())
            ),
        }
        try:
            with self.open_file(self.path) as file, pa.csv.open_csv(file, **options) as reader:
                for batch in reader:
                    yield before, batch.to_pandas()
                    before += batch.num_rows
        except pa.ArrowInvalid as error:
            check_utf8(self.path)
            self._check_lengths()
            raise DataError(f"{self.path} cannot be read: {' '.join(str(error).split())}") from error
        if before == 0:
            raise DataError(f"{self.path} holds nothing but its first line: it should hold {self.what}")

    def read(self, columns: Sequence[str]) -> pd.DataFrame:
        """Return the columns of all rows; see :meth:`chunks`."""
        return pd.concat([chunk for _, chunk in self.chunks(columns)], ignore_index=True)

    def _rows(self) -> Iterator[tuple[int, list[str]]]:
        """Yield the rows one by one, blank lines left out, each with the number of its last line."""
        with self.path.open(encoding="utf-8-sig", errors="replace", newline="") as lines:
            reader = csv.reader(lines, delimiter=self.separator)
            try:
                for row in reader:
                    if row:
                        yield reader.line_num, row
            except csv.Error as error:
                raise DataError(f"{self.path}, line {reader.line_num} cannot be read: {error}: mend the line") from None

    def _check_lengths(self) -> None:
        for line, row in self._rows():
            if len(row) != len(self.columns):
                raise DataError(
                    f"{self.path}, line {line}: {len(row)} values, but the first line names {len(self.columns)} columns"
                )

    def line(self, row: int) -> int:
        """Return the number of the line of a row; the first row after the columns' names is row 0."""
        return next((line for i, (line, _) in enumerate(self._rows(), -1) if i == row), row + 2)

    def check_tokens(self, column: pd.Series, rows_before: int = 0, unique: bool = False) -> None:
        """Check that every value of a column can be a token of an atomic file.

        Raises:
            DataError: naming the line of one that is empty, holds a tab or a line break or, if they should be unique,
                is there twice.
        """
        values = pd.unique(column)
        bad = [value for value in values if not value or "\t" in value or "\n" in value or "\r" in value]
        if bad:
            row = int((column == bad[0]).to_numpy().argmax())
            why = "holds a tab or a line break" if bad[0] else "is empty"
            raise DataError(
                f"{self.path}, line {self.line(rows_before + row)}: '{column.name}' {why} ({bad[0]!r}): mend the line "
                "or take it out"
            )
        if unique and len(values) < len(column):
            row = int(column.duplicated().to_numpy().argmax())
            raise DataError(
                f"{self.path}, line {self.line(rows_before + row)}: '{column.name}' {column.iloc[row]!r} is there "
                "twice: keep one of the lines"
            )

    def numbers(self, column: pd.Series, rows_before: int = 0) -> pd.Series:
        """Return a column of finite numbers, checked; an empty value becomes NaN.

        Raises:
            DataError: naming the first line that holds something else.
        """
        values = pd.to_numeric(column.where(column != "", None), errors="coerce")
        bad = ((values.isna() | np.isinf(values.astype(float))) & (column != "")).to_numpy()
        if bad.any():
            row = int(bad.argmax())
            raise DataError(
                f"{self.path}, line {self.line(rows_before + row)}: '{column.name}' must be a number, not "
                f"{column.iloc[row]!r}"
            )
        return values


def read_numbers(path: Path, lines: BinaryIO) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the whole numbers of a text file with the number of the line that each is on, a block at a time.

    Lines may hold any number of them, with white space between; a line never spans two blocks.

    Args:
        path: for messages.
        lines: the open file.

    Raises:
        DataError: naming the first line that holds something else.
    """
    n_lines, rest = 0, b""
    while True:
        block = lines.read(BLOCK)
        text, newline, after = (rest + block).rpartition(b"\n") if block else (rest, b"", b"")
        rest = after
        if len(rest) > LONGEST_LINE:
            raise DataError(
                f"{path}, line {n_lines + 1}: longer than {LONGEST_LINE:,} bytes, which no line of items is"
            )
        if text:
            characters = np.frombuffer(text, np.uint8)
            digit = (characters >= ord("0")) & (characters <= ord("9"))
            space = (characters == ord(" ")) | ((characters >= 9) & (characters <= 13))
            start = digit.copy()
            start[1:] &= ~digit[:-1]
            starts = np.flatnonzero(start)
            ends = np.flatnonzero(digit & np.append(~digit[1:], True))
            breaks = np.flatnonzero(characters == ord("\n"))
            bad = np.append(np.flatnonzero(~(digit | space)), starts[ends - starts > 17])
            if len(bad):
                where = int(bad.min())
                line = text[text.rfind(b"\n", 0, where) + 1 :].split(b"\n", 1)[0].strip()[:40]
                raise DataError(
                    f"{path}, line {n_lines + 1 + int(np.searchsorted(breaks, where))}: must hold whole numbers with "
                    f"spaces between them, not {line.decode('utf-8', 'replace')!r}"
                )
            values = np.fromstring(text.decode("ascii"), dtype=np.int64, sep=" ")
            yield values, np.searchsorted(breaks, starts) + n_lines + 1
            n_lines += len(breaks)
        n_lines += len(newline)
        if not block:
            return


class Names:
    """Tokens of things that a layout knows by number.

    Args:
        path: the list that names them; None keeps the numbers as tokens.
        numbers: as in the list.
        tokens: one per number.
        lines: the line of each in the list.

    Raises:
        DataError: if a number or a token is there twice, or cannot be a token.
    """

    def __init__(self, path: Path | None, numbers: np.ndarray, tokens: pd.Series, lines: np.ndarray) -> None:
        self.path, self.tokens = path, tokens.to_numpy(object)
        self.numbers = pd.Index(numbers)
        for values, what in ((pd.Series(numbers), "number"), (tokens, "name")):
            twice = values.duplicated().to_numpy()
            if twice.any():
                row = int(twice.argmax())
                raise DataError(
                    f"{path}, line {lines[row]}: the {what} '{values.iloc[row]}' is there twice; mend it, or move the "
                    "file away to keep the numbers as tokens"
                )
        bad = ((tokens == "") | tokens.str.contains(r"[\t\r]")).to_numpy(bool)
        if bad.any():
            row = int(bad.argmax())
            raise DataError(f"{path}, line {lines[row]}: the name {tokens.iloc[row]!r} is empty or holds a tab")

    @classmethod
    def none(cls) -> Names:
        """Return names that keep the numbers as tokens."""
        return cls(None, np.empty(0, np.int64), pd.Series(dtype=str), np.empty(0, np.int64))

    def take(self, numbers: np.ndarray, where: Callable[[int], str], what: str) -> np.ndarray:
        """Return the tokens of numbers.

        Args:
            numbers: to look up.
            where: says for a position among them where it stands, for the message.
            what: they are numbers of.

        Raises:
            DataError: if the list does not name one of them.
        """
        if self.path is None:
            codes, unique = pd.factorize(numbers)
            return unique.astype(str).astype(object)[codes]
        rows = self.numbers.get_indexer(numbers)
        if (rows < 0).any():
            at = int((rows < 0).argmax())
            raise DataError(
                f"{where(at)}: {what} {numbers[at]} is not among the {len(self.numbers)} of {self.path}: "
                "mend one of them, or move the list away to keep the numbers as tokens"
            )
        return self.tokens[rows]


def read_lines(path: Path, what: str, open_file: Open = open_binary) -> pd.Series:
    """Return the lines of a text file, blank ones too.

    Raises:
        DataError: if it is missing, empty or not UTF-8.
    """
    options: dict[str, Any] = {
        "read_options": pa.csv.ReadOptions(column_names=["line"], block_size=BLOCK),
        "parse_options": pa.csv.ParseOptions(delimiter="\x01", quote_char=False, ignore_empty_lines=False),
        "convert_options": pa.csv.ConvertOptions(column_types={"line": pa.string()}),
    }
    with open_file(find_file(path, what)) as file:
        try:
            return pa.csv.read_csv(file, **options)["line"].to_pandas()
        except pa.ArrowInvalid as error:
            check_utf8(path)
            raise DataError(f"{path} cannot be read: {' '.join(str(error).split())}") from error


def extract(lines: pd.Series, pattern: str) -> pd.DataFrame:
    """Return the named groups of a regular expression in each line, as columns.

    A group that takes no part is empty; all are None where the expression does not match.
    """
    groups = pa.compute.extract_regex(pa.array(lines, pa.string()), pattern)
    columns = {field.name: pa.compute.struct_field(groups, field.name).to_pandas() for field in groups.type}
    return pd.DataFrame(columns).set_axis(lines.index)
