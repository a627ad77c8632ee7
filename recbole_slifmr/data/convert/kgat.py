"""KGAT's layout: a line of item numbers per user, triples of numbers, and lists of the numbers' names.

``train.txt`` and ``test.txt`` hold ``user item item ...``, ``kg_final.txt`` (or a ``.zip`` of it) ``head relation
tail``; item i is entity i. ``item_list.txt``, ``entity_list.txt``, ``relation_list.txt`` and ``user_list.txt`` give the
original names; a list that is not there leaves the numbers as tokens.

In yelp2018's ``item_list.txt`` the last space is missing: ``name 12name`` is read as item 12. Last.FM's test lines
repeat items: repeated interactions and triples are left out, as KGAT does. There is no validation split: a tenth of
each user's training interactions, drawn at random, becomes one.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from recbole_slifmr.data.convert.source import Names, Open, extract, find_file, open_binary, read_lines, read_numbers
from recbole_slifmr.data.convert.target import (
    ENTITY,
    HEAD,
    ITEM,
    RELATION,
    TAIL,
    USER,
    AtomicFolder,
    Summary,
    atomic_folder,
    summarise,
)
from recbole_slifmr.errors import DataError

Track = Callable[[Iterable[int], str], Iterable[int]]
ROWS = 1 << 18  # written at a time
MOST_PACKED = 100  # times smaller than its content that an archive may be; of triples it is about 4
NAME = r"^(?P<name>.+?)\s+(?P<number>\d{1,17})\s*$"
ITEM_NAME = r"^(?P<name>.+?)\s+(?P<number>\d{1,17})\s+\S+\s*$"


class _Pairs(NamedTuple):
    """Users and items by number, and where they stand."""

    path: Path
    users: np.ndarray
    items: np.ndarray
    lines: np.ndarray


def convert_kgat(
    source: Path, out: Path, name: str | None = None, seed: int = 2020, force: bool = False,
    open_file: Open = open_binary, track: Track = lambda blocks, label: blocks,
) -> Summary:  # fmt: skip
    """Turn a folder of KGAT into an atomic folder with KGAT's test split and a validation split out of training.

    Args:
        source: KGAT's folder.
        out: folder of data sets to write into.
        name: of the data set; None takes that of the folder.
        seed: of the validation split.
        force: replace a data set of that name.
        open_file: opens the files to read.
        track: passes on the blocks of rows that are written, with a label.

    Raises:
        DataError: naming file, line and fix.
    """
    if not source.is_dir():
        raise DataError(f"{source} is not a folder: name the one that holds KGAT's files")
    with atomic_folder(out, name or source.resolve().name, force) as atomic:
        users, items, entities, relations = (
            _read_list(source / f"{kind}_list.txt", open_file) for kind in ("user", "item", "entity", "relation")
        )
        train, test = (_read_pairs(source / f"{split}.txt", open_file, atomic) for split in ("train", "test"))
        _note_overlap(train, test, atomic)
        held_out = _draw(train.users, seed)
        n_few = int((np.bincount(pd.factorize(train.users)[0]) < 5).sum())
        atomic.notes.append(
            f"validation: {held_out.sum():,} of {len(held_out):,} training interactions, a tenth of each user's, "
            f"rounded, drawn with seed {seed}" + (f"; {n_few:,} users with fewer than five have none" if n_few else "")
        )
        for split, pairs, kept in (("train", train, ~held_out), ("valid", train, held_out), ("test", test, None)):
            _write_pairs(atomic, split, pairs, kept, users, items, track)
        path, triples = _read_triples(source, open_file, atomic)
        _write_triples(atomic, path, triples, entities, relations, track)
        _link(atomic, train, test, triples, items, entities)
    return summarise(atomic, out / atomic.name)


def _read_list(path: Path, open_file: Open) -> Names:
    if not path.is_file():
        return Names.none()
    lines = read_lines(path, "names and numbers", open_file)
    header = lines.iloc[0].split()
    if header[:1] == ["org_id"]:
        lines = lines[1:]
    three = header[2:] == ["freebase_id"]
    lines = lines[lines.str.strip() != ""]
    if lines.empty:
        raise DataError(f"{path} names nothing: fill it, or move it away to keep the numbers as tokens")
    pairs = extract(lines, ITEM_NAME if three else NAME)
    missing = pairs["number"].isna()
    if three and missing.any():
        words = lines[missing].str.split(n=1, expand=True).reindex(columns=[0, 1]).fillna("")
        numbers = pd.Series([rest.strip().removesuffix(name) for name, rest in zip(words[0], words[1], strict=True)])
        pairs.loc[missing, "name"] = words[0].to_numpy()
        pairs.loc[missing, "number"] = numbers.where(numbers.str.fullmatch(r"\d{1,17}")).to_numpy()
        missing = pairs["number"].isna()
    if missing.any():
        row = int(missing.to_numpy().argmax())
        raise DataError(
            f"{path}, line {lines.index[row] + 1}: must read 'name number', not {lines.iloc[row].strip()[:60]!r}; mend "
            "it, or move the file away to keep the numbers as tokens"
        )
    return Names(path, pairs["number"].to_numpy(np.int64), pairs["name"], lines.index.to_numpy() + 1)


def _read_pairs(path: Path, open_file: Open, atomic: AtomicFolder) -> _Pairs:
    users, items, lines = [], [], []
    with open_file(find_file(path, "lines 'user item item ...'")) as file:
        for values, line in read_numbers(path, file):
            first = np.append(True, line[1:] != line[:-1])
            users.append(values[first][np.cumsum(first) - 1][~first])
            items.append(values[~first])
            lines.append(line[~first])
    pairs = [np.concatenate(part) if part else np.empty(0, np.int64) for part in (users, items, lines)]
    twice = pd.DataFrame({"user": pairs[0], "item": pairs[1]}).duplicated().to_numpy()
    if twice.any():
        atomic.notes.append(f"{path.name}: {twice.sum():,} repeated interactions left out")
    if len(pairs[0]) == 0:
        raise DataError(f"{path} holds no interactions: it should hold lines 'user item item ...'")
    return _Pairs(path, *(part[~twice] for part in pairs))


def _note_overlap(train: _Pairs, test: _Pairs, atomic: AtomicFolder) -> None:
    both = pd.MultiIndex.from_arrays([test.users, test.items]).isin(
        pd.MultiIndex.from_arrays([train.users, train.items])
    )
    if both.any():
        atomic.notes.append(f"{both.sum():,} test interactions are training interactions too; they are kept")


def _draw(users: np.ndarray, seed: int) -> np.ndarray:
    """Return a mask over the interactions that has a tenth of each user's, rounded, at random."""
    order = np.lexsort((np.random.default_rng(seed).random(len(users)), users))
    in_order = users[order]
    first = np.flatnonzero(np.append(True, in_order[1:] != in_order[:-1]))
    counts = np.diff(np.append(first, len(users)))
    rank = np.arange(len(users)) - np.repeat(first, counts)
    drawn = np.zeros(len(users), dtype=bool)
    drawn[order] = rank < np.repeat((counts + 5) // 10, counts)
    return drawn


def _write_pairs(
    atomic: AtomicFolder, split: str, pairs: _Pairs, kept: np.ndarray | None, users: Names, items: Names, track: Track
) -> None:
    rows = np.arange(len(pairs.users)) if kept is None else np.flatnonzero(kept)
    if len(rows) == 0:
        raise DataError(f"{pairs.path} leaves no interactions for validation: no user has five")
    for start in track(range(0, len(rows), ROWS), f"write {split}.inter"):
        part = rows[start : start + ROWS]
        where = partial(_where, pairs.path, pairs.lines[part])
        columns = {
            USER: users.take(pairs.users[part], where, "user"),
            ITEM: items.take(pairs.items[part], where, "item"),
        }
        atomic.add_interactions(pd.DataFrame(columns), split)


def _open_triples(source: Path, open_file: Open) -> Iterator[tuple[Path, np.ndarray, np.ndarray]]:
    text, archive = source / "kg_final.txt", source / "kg_final.zip"
    if text.is_file() or not archive.is_file():
        with open_file(find_file(text, "triples 'head relation tail' (kg_final.zip will do too)")) as file:
            yield from ((text, *block) for block in read_numbers(text, file))
        return
    try:
        with open_file(archive) as file, zipfile.ZipFile(file) as members:
            member = _find_member(archive, members)
            path = archive / member.filename
            with members.open(member) as lines:
                yield from ((path, *block) for block in read_numbers(path, lines))  # type: ignore[arg-type]
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:  # the last if it is encrypted
        raise DataError(f"{archive} cannot be unpacked: {error}") from None


def _find_member(archive: Path, members: zipfile.ZipFile) -> zipfile.ZipInfo:
    """Return the one kg_final.txt of an archive.

    Raises:
        DataError: if there is not just one, a name leads out of the archive, or it unpacks to far more than triples do.
    """
    infos = members.infolist()
    outside = [info.filename for info in infos if info.filename[:1] in "/\\" or ".." in Path(info.filename).parts]
    if outside:
        raise DataError(f"{archive} names a file outside itself, {outside[0]!r}: unpack kg_final.txt beside it by hand")
    found = [info for info in infos if Path(info.filename).name == "kg_final.txt"]
    if len(found) != 1:
        count = f"{len(found)} files kg_final.txt" if found else "no kg_final.txt"
        raise DataError(f"{archive} holds {count}: put just one there or beside it")
    if found[0].file_size > MOST_PACKED * max(found[0].compress_size, 1):
        raise DataError(
            f"{archive} would unpack to {found[0].file_size:,} bytes, more than {MOST_PACKED} times its own size, as "
            "no list of triples does: unpack kg_final.txt beside it by hand"
        )
    return found[0]


def _read_triples(source: Path, open_file: Open, atomic: AtomicFolder) -> tuple[Path, pd.DataFrame]:
    """Return the triples by number, with their lines."""
    parts, path = [], source / "kg_final.txt"
    for path, values, line in _open_triples(source, open_file):
        counts = np.bincount(line - line[0]) if len(line) else np.empty(0, np.int64)
        bad = np.flatnonzero((counts != 3) & (counts != 0))
        if len(bad):
            raise DataError(
                f"{path}, line {line[0] + bad[0]}: {counts[bad[0]]} numbers, but a triple is 'head relation tail'"
            )
        head, relation, tail = values.reshape(-1, 3).T
        parts.append(pd.DataFrame({"head": head, "relation": relation, "tail": tail, "line": line[::3]}))
    triples = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()
    if triples.empty:
        raise DataError(f"{path} holds no triples")
    twice = triples.duplicated(["head", "relation", "tail"])
    if twice.any():
        atomic.notes.append(f"{path.name}: {twice.sum():,} repeated triples left out")
    return path, triples[~twice]


def _write_triples(
    atomic: AtomicFolder, path: Path, triples: pd.DataFrame, entities: Names, relations: Names, track: Track
) -> None:
    for start in track(range(0, len(triples), ROWS), "write kg"):
        part = triples.iloc[start : start + ROWS]
        where = partial(_where, path, part["line"].to_numpy())
        columns = {
            HEAD: entities.take(part["head"].to_numpy(), where, "entity"),
            RELATION: relations.take(part["relation"].to_numpy(), where, "relation"),
            TAIL: entities.take(part["tail"].to_numpy(), where, "entity"),
        }
        atomic.add_triples(pd.DataFrame(columns))


def _where(path: Path, lines: np.ndarray, row: int) -> str:
    return f"{path}, line {lines[row]}"


def _link(
    atomic: AtomicFolder, train: _Pairs, test: _Pairs, triples: pd.DataFrame, items: Names, entities: Names
) -> None:
    """Link item i to entity i where a triple has it."""
    numbers = np.unique(np.concatenate([train.items, test.items]))
    numbers = numbers[np.isin(numbers, np.concatenate([triples["head"].unique(), triples["tail"].unique()]))]
    if len(numbers) == 0:
        raise DataError(f"no item of {train.path} is an entity of the triples: item i must be entity i")
    columns = {
        ITEM: items.take(numbers, str, "item"),
        ENTITY: entities.take(numbers, str, "entity"),
    }  # all known by now
    atomic.add_links(pd.DataFrame(columns))
