"""Any other layout: delimited files of interactions, items, triples and links; features from ``.npy`` or Parquet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from recbole_slifmr.data.convert.source import DelimitedFile, Open, find_file, open_binary
from recbole_slifmr.data.convert.target import (
    ENTITY,
    HEAD,
    ITEM,
    RATING,
    RELATION,
    TAIL,
    TIME,
    USER,
    AtomicFolder,
    Summary,
    atomic_folder,
    check_finite,
    summarise,
)
from recbole_slifmr.data.features import is_modality_name
from recbole_slifmr.data.vectors import IDS_FILE, read_npy, read_parquet, read_tokens
from recbole_slifmr.errors import DataError, SettingError


@dataclass(frozen=True)
class Columns:
    """What the columns are called; ``rating`` and ``time`` may be absent unless they are named otherwise."""

    user: str = "user_id"
    item: str = "item_id"
    rating: str = "rating"
    time: str = "timestamp"
    head: str = "head_id"
    relation: str = "relation_id"
    tail: str = "tail_id"
    entity: str = "entity_id"


def convert_tables(
    interactions: Path, out: Path, name: str | None = None, items: Path | None = None, triples: Path | None = None,
    links: Path | None = None, features: Mapping[str, Path] | None = None, columns: Columns | None = None,
    separator: str | None = None, force: bool = False, open_file: Open = open_binary,
) -> Summary:  # fmt: skip
    """Turn delimited files into an atomic folder.

    Args:
        interactions: a row per interaction of a user with an item, perhaps with rating and time.
        out: folder of data sets to write into.
        name: of the data set; None takes that of the file of interactions.
        items: a row per item and anything about it.
        triples: head, relation and tail.
        links: item and entity; without it an item is the entity of the same token.
        features: per modality a ``.npy`` matrix, its rows named by ``items.txt`` beside it or else those of ``items``,
            or a ``.parquet`` file with a column of item tokens and columns of numbers or one column of lists.
        columns: what the columns are called.
        separator: between the values; None takes the one that fits the first line of each file.
        force: replace a data set of that name.
        open_file: opens the files to read.

    Raises:
        DataError: naming file, line and fix.
        SettingError: for a modality's name or a combination of files that cannot be used.
    """
    columns = columns or Columns()
    if links is not None and triples is None:
        raise SettingError("--links leads from items to entities: give --triples too")
    for modality in features or {}:
        if not is_modality_name(modality):
            raise SettingError(f"--features: '{modality}' cannot be a modality's name: use another, such as text")

    def table(path: Path, what: str) -> DelimitedFile:
        return DelimitedFile(path, what, separator, open_file)

    with atomic_folder(out, name or interactions.name.split(".")[0], force) as atomic:
        _add_interactions(atomic, table(interactions, "interactions"), columns)
        tokens = _add_items(atomic, table(items, "items"), columns) if items is not None else pd.Series(dtype=str)
        if triples is not None:
            _add_triples(atomic, table(triples, "triples"), columns)
            _add_links(atomic, triples, table(links, "links") if links is not None else None, columns)
        if features:
            _add_features(atomic, features, columns, items, tokens)
    return summarise(atomic, out / atomic.name)


def _add_interactions(atomic: AtomicFolder, table: DelimitedFile, columns: Columns) -> None:
    fields = {
        table.require(columns.user, "name it with --user-column"): USER,
        table.require(columns.item, "name it with --item-column"): ITEM,
    }
    for column, field, option in ((columns.rating, RATING, "rating"), (columns.time, TIME, "time")):
        if column in table.columns or column != getattr(Columns, option):
            fields[table.require(column, f"name it with --{option}-column")] = field
    if len(fields) < 2:
        raise SettingError(f"users and items cannot both be in the column '{columns.user}'")
    for before, chunk in table.chunks(list(fields)):
        for column in (columns.user, columns.item):
            table.check_tokens(chunk[column], before)
        for column, field in fields.items():
            if field in (RATING, TIME):
                table.numbers(chunk[column], before)
        atomic.add_interactions(chunk.rename(columns=fields))


def _add_items(atomic: AtomicFolder, table: DelimitedFile, columns: Columns) -> pd.Series:
    """Write the items; return their tokens in the order of the rows."""
    key = table.require(columns.item, "name it with --item-column")
    names = [name for name in table.columns if name]
    for name in names:
        if ":" in name or "\t" in name or name == ITEM.split(":")[0] != key:
            raise DataError(
                f"{table.path}, line 1: the column '{name}' cannot keep its name beside '{ITEM}': rename it"
            )
    frame = table.read(names)
    table.check_tokens(frame[key], unique=True)
    unknown = atomic.items - set(frame[key])
    if len(unknown) == len(atomic.items):
        raise DataError(
            f"{table.path}: none of its {len(frame)} items (such as {frame[key].iloc[0]!r}) has an interaction: check "
            "the tokens, or --item-column"
        )
    if unknown:
        atomic.notes.append(f"{len(unknown):,} items with an interaction are not in {table.path.name}")
    atomic.add_items(pd.DataFrame({ITEM: frame[key], **dict(_typed(frame[n], n) for n in names if n != key)}))
    return frame[key]


def _typed(values: pd.Series, name: str) -> tuple[str, pd.Series]:
    """Return a column under its name and RecBole's type."""
    filled = values[values.str.strip() != ""]
    if len(filled) and np.isfinite(pd.to_numeric(filled, errors="coerce").astype(float)).all():
        return f"{name}:float", values.str.strip()
    values = values.str.replace(r"\s+", " ", regex=True).str.strip()
    return f"{name}:{'token_seq' if values.str.contains(' ', regex=False).any() else 'token'}", values


def _add_triples(atomic: AtomicFolder, table: DelimitedFile, columns: Columns) -> None:
    fields = {
        table.require(columns.head, "name it with --head-column"): HEAD,
        table.require(columns.relation, "name it with --relation-column"): RELATION,
        table.require(columns.tail, "name it with --tail-column"): TAIL,
    }
    for before, chunk in table.chunks(list(fields)):
        for column in fields:
            table.check_tokens(chunk[column], before)
        atomic.add_triples(chunk.rename(columns=fields))


def _add_links(atomic: AtomicFolder, triples: Path, table: DelimitedFile | None, columns: Columns) -> None:
    if table is None:
        both = sorted(atomic.items & atomic.entities)
        if not both:
            raise DataError(f"no item is a head or tail of {triples}: give --links, a file of items and entities")
        atomic.add_links(pd.DataFrame({ITEM: both, ENTITY: both}))
        return
    fields = {
        table.require(columns.item, "name it with --item-column"): ITEM,
        table.require(columns.entity, "name it with --entity-column"): ENTITY,
    }
    links = table.read(list(fields))
    table.check_tokens(links[columns.item], unique=True)
    table.check_tokens(links[columns.entity])
    atomic.add_links(links.rename(columns=fields))
    if not atomic.linked:
        raise DataError(
            f"{table.path}: none of its {len(links)} links joins an item of the interactions with an entity"
        )
    if len(atomic.linked) < len(links):
        atomic.notes.append(f"{len(links) - len(atomic.linked):,} links to an unknown item or entity left out")


def _add_features(
    atomic: AtomicFolder, files: Mapping[str, Path], columns: Columns, items: Path | None, tokens: pd.Series
) -> None:
    features = {}
    for name, path in files.items():
        ids_file, ids, values = read_feature_file(path, name, columns.item, items, tokens)
        check_finite(path, values)
        twice = pd.Series(ids).duplicated().to_numpy()
        if twice.any():
            row = int(twice.argmax())
            where = f"row {row}" if ids_file == path else f"line {row + 1}"
            raise DataError(f"{ids_file}, {where}: item '{ids[row]}' is there twice: keep one of them")
        if not atomic.items.intersection(ids):
            raise DataError(
                f"{ids_file}: none of its {len(ids)} items (such as '{ids[0]}') has an interaction: check the tokens"
            )
        features[name] = (ids, values)
    atomic.add_features(features)


def read_feature_file(
    path: Path, name: str, item_column: str, items: Path | None, tokens: pd.Series
) -> tuple[Path, np.ndarray, np.ndarray]:
    """Read the features of a modality; see :func:`convert_tables`.

    Args:
        path: the file.
        name: of the modality, for messages.
        item_column: of a ``.parquet`` file.
        items: the file of items.
        tokens: in it.

    Returns:
        the file that names the item of each row, the items ``[n]`` and the matrix ``[n, d]``.
    """
    find_file(path, f"the '{name}' features")
    if path.suffix == ".parquet":
        return path, *read_parquet(path, item_column, None, "name the items' column with --item-column")
    if path.suffix != ".npy":
        raise DataError(f"{path}: features come from .npy or .parquet files")
    ids_file, ids = _row_tokens(path, items, tokens)
    values = read_npy(path)
    if len(ids) != len(values):
        raise DataError(f"{path} has {len(values)} rows but {ids_file} names {len(ids)} items: one row each")
    return ids_file, ids, values


def _row_tokens(path: Path, items: Path | None, tokens: pd.Series) -> tuple[Path, np.ndarray]:
    """Return where the rows of a matrix are named, and the names."""
    ids_file = path.parent / IDS_FILE
    if ids_file.is_file():
        return ids_file, read_tokens(ids_file).astype(object)
    if items is None:
        raise DataError(f"{ids_file} not found: it should name the item of each row of {path.name}, or give --items")
    return items, tokens.to_numpy(object)
