"""MMRec's layout: numbered users and items in one ``.inter`` file with a split label, and a matrix per modality.

``NAME.inter`` has the columns userID, itemID, x_label (0 training, 1 validation, 2 test) and perhaps rating and
timestamp; row k of ``image_feat.npy`` and ``text_feat.npy`` belongs to item k; ``i_id_mapping.csv`` and
``u_id_mapping.csv`` give the numbers' original names.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from recbole_slifmr.data.convert.source import DelimitedFile, Names, Open, extract, open_binary, read_lines
from recbole_slifmr.data.convert.target import (
    ITEM,
    RATING,
    SPLITS,
    TIME,
    USER,
    AtomicFolder,
    Summary,
    atomic_folder,
    check_finite,
    summarise,
)
from recbole_slifmr.data.vectors import read_npy
from recbole_slifmr.errors import DataError

FEATURES = "_feat.npy"


def convert_mmrec(
    source: Path, out: Path, name: str | None = None, force: bool = False, open_file: Open = open_binary
) -> Summary:
    """Turn a folder of MMRec into an atomic folder with the same split.

    Args:
        source: MMRec's folder.
        out: folder of data sets to write into.
        name: of the data set; None takes that of the ``.inter`` file.
        force: replace a data set of that name.
        open_file: opens the files to read.

    Raises:
        DataError: naming file, line and fix.
    """
    path = _find_interactions(source)
    table = DelimitedFile(path, "interactions", "\t", open_file)
    columns = [table.require(column, "name it as MMRec does") for column in ("userID", "itemID", "x_label")]
    columns += [column for column in ("rating", "timestamp") if column in table.columns]
    users, items = (_read_mapping(source / f"{side}_id_mapping.csv", open_file) for side in "ui")
    files = sorted(source.glob(f"*{FEATURES}"))
    features = {file.name.removesuffix(FEATURES): check_finite(file, read_npy(file)) for file in files}
    with atomic_folder(out, name or path.stem, force) as atomic:
        last_item = _split(table, columns, users, items, atomic)
        if features:
            atomic.add_features(_join(source, features, items, last_item))
    return summarise(atomic, out / atomic.name)


def _find_interactions(source: Path) -> Path:
    if not source.is_dir():
        raise DataError(f"{source} is not a folder: name the one that holds MMRec's files")
    files = sorted(source.glob("*.inter"))
    if len(files) != 1:
        found = ", ".join(file.name for file in files) or "none"
        raise DataError(f"{source} must hold one .inter file, not {found}")
    return files[0]


def _read_mapping(path: Path, open_file: Open) -> Names:
    """Read original names and numbers: one pair a line after the first, tab or comma between."""
    if not path.is_file():
        return Names.none()
    lines = read_lines(path, "original names and numbers", open_file)[1:]
    lines = lines[lines.str.strip() != ""]
    if lines.empty:
        raise DataError(f"{path} holds nothing but its first line: fill it, or move it away")
    pairs = extract(lines, r'^(?:"(?P<quoted>.*)"|(?P<name>.*))[\t,](?P<number>\d{1,17})\s*$')
    bad = pairs["number"].isna().to_numpy()
    if bad.any():
        row = int(bad.argmax())
        raise DataError(
            f"{path}, line {lines.index[row] + 1}: must read 'name, tab, number', not {lines.iloc[row].strip()[:60]!r}"
        )
    tokens = pairs["name"].where(pairs["quoted"] == "", pairs["quoted"].str.replace('""', '"'))
    return Names(path, pairs["number"].to_numpy(np.int64), tokens, lines.index.to_numpy() + 1)


def _split(table: DelimitedFile, columns: list[str], users: Names, items: Names, atomic: AtomicFolder) -> int:
    """Write the interactions by label; return the greatest item number."""
    last_item = -1
    for before, chunk in table.chunks(columns):
        numbers = {column: table.numbers(chunk[column], before) for column in columns}
        for column, maximum in (("userID", 2**53), ("itemID", 2**53), ("x_label", 2)):
            values = numbers[column]
            bad = ~(values.between(0, maximum) & (values % 1 == 0)).to_numpy()
            if bad.any():
                row = int(bad.argmax())
                wanted = "0, 1 or 2" if column == "x_label" else "a whole number from 0"
                raise DataError(
                    f"{_where(table, before, row)}: '{column}' must be {wanted}, not {chunk[column].iloc[row]!r}"
                )
        frame = pd.DataFrame(index=chunk.index)
        for column, field, names in (("userID", USER, users), ("itemID", ITEM, items)):
            ids = numbers[column].to_numpy(np.int64)
            frame[field] = names.take(ids, partial(_where, table, before), column)
            last_item = max(last_item, int(ids.max())) if field == ITEM else last_item
        for column, field in (("rating", RATING), ("timestamp", TIME)):
            if column in columns:
                frame[field] = chunk[column]
        for label, split in enumerate(SPLITS):
            part = frame[numbers["x_label"].to_numpy() == label]
            if len(part):
                atomic.add_interactions(part, split)
    for label, split in enumerate(SPLITS):
        if split not in atomic.n_interactions:
            raise DataError(f"{table.path}: no line has x_label {label} ({split}): all three splits are needed")
    atomic.n_interactions = {split: atomic.n_interactions[split] for split in SPLITS}
    return last_item


def _where(table: DelimitedFile, before: int, row: int) -> str:
    return f"{table.path}, line {table.line(before + row)}"


def _join(
    source: Path, features: dict[str, np.ndarray], items: Names, last_item: int
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Name the item of each row."""
    joined = {}
    for name, values in features.items():
        path = source / f"{name}{FEATURES}"
        ids = np.arange(len(values))
        if len(values) <= last_item:
            raise DataError(
                f"{path} has {len(values)} rows, but there is an item {last_item}: row k must belong to item k"
            )
        joined[name] = (items.take(ids, f"{path}, row {{}}".format, "itemID"), values)
    return joined
