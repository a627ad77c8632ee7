"""Writing RecBole's atomic files: a folder that is there whole or not at all, and what it holds."""

from __future__ import annotations

import glob
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from recbole_slifmr.data.vectors import IDS_FILE, check_matrix, write_tokens
from recbole_slifmr.errors import DataError, SettingError
from recbole_slifmr.files import replace_folder

USER, ITEM, RATING, TIME = "user_id:token", "item_id:token", "rating:float", "timestamp:float"
HEAD, RELATION, TAIL, ENTITY = "head_id:token", "relation_id:token", "tail_id:token", "entity_id:token"
SPLITS = ("train", "valid", "test")
ROWS = 1 << 17  # of features at a time


class Summary(NamedTuple):
    """What a converted data set holds.

    Attributes:
        folder: where it is.
        n_interactions: by split, or one entry with the name ``""``.
        n_users: with an interaction; ``n_items`` likewise.
        n_entities: heads and tails; ``n_relations``, ``n_triples`` likewise of the knowledge graph.
        n_linked: items with an interaction and an entity.
        covered: by modality, its dimension and the items with an interaction that have it.
        notes: what a person should know about how it came about.
    """

    folder: Path
    n_interactions: dict[str, int]
    n_users: int
    n_items: int
    n_entities: int
    n_relations: int
    n_triples: int
    n_linked: int
    covered: dict[str, tuple[int, int]]
    notes: list[str]

    @property
    def density(self) -> float:
        """Interactions per pair of a user and an item."""
        return sum(self.n_interactions.values()) / (self.n_users * self.n_items)

    @property
    def command(self) -> str:
        """The command that trains on it."""
        split = "" if "" in self.n_interactions else f' --benchmark_filename="[{", ".join(self.n_interactions)}]"'
        path = str(self.folder.parent)
        path = f"'{path}'" if " " in path else path
        return f"slifmr train --model=SLIFMR --data_path={path} --dataset={self.folder.name}{split}"


class AtomicFolder:
    """An atomic folder in the making.

    Args:
        folder: where the files go for now.
        name: of the data set.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self.n_interactions: dict[str, int] = {}
        self.n_triples = 0
        self.users: set[str] = set()
        self.items: set[str] = set()
        self.entities: set[str] = set()
        self.relations: set[str] = set()
        self.linked: set[str] = set()
        self.covered: dict[str, tuple[int, int]] = {}
        self.notes: list[str] = []

    def _write(self, suffix: str, frame: pd.DataFrame) -> None:
        path = self.folder / f"{self.name}.{suffix}"
        with path.open("a", encoding="utf-8", newline="") as file:
            frame.to_csv(file, sep="\t", index=False, header=file.tell() == 0, lineterminator="\n")

    def add_interactions(self, frame: pd.DataFrame, split: str = "") -> None:
        """Append interactions to a split, or to the only file of them."""
        self._write(f"{split}.inter" if split else "inter", frame)
        self.n_interactions[split] = self.n_interactions.get(split, 0) + len(frame)
        self.users.update(pd.unique(frame[USER]))
        self.items.update(pd.unique(frame[ITEM]))

    def add_items(self, frame: pd.DataFrame) -> None:
        """Write what is known about the items."""
        self._write("item", frame)

    def add_triples(self, frame: pd.DataFrame) -> None:
        """Append triples to the knowledge graph."""
        self._write("kg", frame)
        self.n_triples += len(frame)
        self.entities.update(pd.unique(frame[HEAD]), pd.unique(frame[TAIL]))
        self.relations.update(pd.unique(frame[RELATION]))

    def add_links(self, frame: pd.DataFrame) -> None:
        """Write the links that lead from an item with an interaction to an entity of a triple; the rest is left out.

        Call it after all interactions and triples.
        """
        frame = frame[frame[ITEM].isin(self.items) & frame[ENTITY].isin(self.entities)]
        self._write("link", frame)
        self.linked.update(frame[ITEM])

    def add_features(self, features: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
        """Write the features of all modalities, with one list of item tokens; an item that lacks one has zeros in it.

        Call it after all interactions.

        Args:
            features: per modality the item tokens ``[n]`` and the rows ``[n, d]``, which may be mapped into memory.
        """
        tokens = pd.unique(np.concatenate([tokens for tokens, _ in features.values()]))
        write_tokens(self.folder / IDS_FILE, tokens)
        used = pd.Series(tokens).isin(self.items).to_numpy()
        for name, (own, values) in features.items():
            path = self.folder / f"{name}.npy"
            rows = pd.Index(tokens).get_indexer(own)
            shape = (len(tokens), values.shape[1])
            target = np.lib.format.open_memmap(path, "w+", dtype=values.dtype, shape=shape)
            present = np.zeros(len(tokens), dtype=bool)
            for start in range(0, len(own), ROWS):
                part = np.asarray(values[start : start + ROWS])
                target[rows[start : start + ROWS]] = part
                present[rows[start : start + ROWS]] = part.any(axis=1)
            target.flush()
            self.covered[name] = (shape[1], int((present & used).sum()))


@contextmanager
def atomic_folder(out: Path, name: str, force: bool = False) -> Iterator[AtomicFolder]:
    """Give an atomic folder to write into; it appears as ``out/name`` at the end, unless an exception leaves the block.

    Args:
        out: the folder of data sets, made if need be.
        name: of the data set and its folder.
        force: put it in the place of an existing data set of that name, all of whose files go.

    Raises:
        DataError: if there is a folder of that name already, or with ``force`` one that is no data set.
        SettingError: if the name cannot be one.
    """
    if not name or name.startswith(".") or any(sign in name for sign in "/\\ \t\n'\""):
        raise SettingError(f"'{name}' cannot be the name of a data set: use letters, digits, - and _, with --name")
    target = out / name
    _check_target(target, force)
    with replace_folder(target) as folder:
        yield AtomicFolder(folder, name)
        _check_target(target, force)


def _check_target(target: Path, force: bool) -> None:
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not force:
        raise DataError(f"{target} is there already: choose another --name or --out, or --force to replace it")
    if not any(target.glob(f"{glob.escape(target.name)}*.inter")) or any(path.is_dir() for path in target.iterdir()):
        raise DataError(f"{target} is not just a data set: --force does not replace it; choose another --name or --out")


def summarise(atomic: AtomicFolder, folder: Path) -> Summary:
    """Return what a finished folder holds."""
    return Summary(
        folder,
        atomic.n_interactions,
        len(atomic.users),
        len(atomic.items),
        len(atomic.entities),
        len(atomic.relations),
        atomic.n_triples,
        len(atomic.linked),
        atomic.covered,
        atomic.notes,
    )


def check_finite(path: Path, values: np.ndarray) -> np.ndarray:
    """Return a matrix of features ``[n, d]``, checked.

    Raises:
        DataError: if it is no matrix of numbers, or naming the first row with a NaN or infinity.
    """
    check_matrix(path, values)
    for start in range(0, len(values), ROWS):
        finite = np.isfinite(values[start : start + ROWS]).all(axis=1)
        if not finite.all():
            raise DataError(f"{path}, row {start + int(finite.argmin())}: NaN or infinite; mend it or set it to zeros")
    return values
