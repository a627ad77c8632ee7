r"""Synthetic data sets of any size, with power-law degrees: atomic files and ``.npy`` features, no loop over edges.

The node of rank r among n is drawn with probability proportional to :math:`((r + 1/2) / n)^{-s}`, that is with a
degree distribution :math:`p(d) \propto d^{-(1 + 1/s)}`. Ranks are dealt out at random, so tokens say nothing.

* Interactions: unique pairs, user and item drawn independently; every user has a floor of about five (as in a 5-core
  set), every item at least one.
* Knowledge graph: entity i is item i, all are linked. ``ITEM_SHARE`` of the triples run from an item to another
  entity, the rest from another entity to any entity. This split is a choice, not a count of the real sets: it leaves
  nearly all entities within one hop of an item. The tail decides the relation (a genre is the tail of ``genre``), and
  relations get tails by a power law. Triples are unique, without loops; every item, entity and relation occurs.
* Features: clusters in a space of rank 32, blown up to the full dimension, plus noise.

There is no locality: neighbours lie anywhere in memory, which is the worst case for a cache.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow import csv

FORMAT = 1  # raise it when the generator gives other data
SLOPES = {"user": 0.5, "item": 0.6, "head": 0.5, "tail": 0.7, "relation": 1.0}
ITEM_SHARE = 0.5
USER_FLOOR = 5
N_CLUSTERS, RANK, NOISE = 64, 32, 0.5


@dataclass(frozen=True)
class Counts:
    """The size of a data set.

    Attributes:
        users: number of users.
        items: number of items.
        interactions: unique pairs of user and item.
        entities: entities, the items among them; 0 for no knowledge graph.
        triples: unique triples.
        relations: relations.
        modalities: dimension by name.
    """

    users: int
    items: int
    interactions: int
    entities: int = 0
    triples: int = 0
    relations: int = 0
    modalities: tuple[tuple[str, int], ...] = (("text", 768), ("image", 768))

    def scaled(self, share: float) -> Counts:
        """Return the same set with a share of everything but relations and dimensions."""
        names = ("users", "items", "interactions", "entities", "triples")
        return replace(self, **{name: round(share * getattr(self, name)) for name in names})


AMAZON_BOOK = Counts(70_679, 24_915, 847_733, 88_572, 2_557_746, 39)
PRESETS = {
    "tiny": Counts(300, 200, 3_000, 500, 2_000, 5, (("text", 16), ("image", 16))),
    "amazon-book": AMAZON_BOOK,
    "yelp2018": Counts(45_919, 45_538, 1_185_068, 90_961, 1_853_704, 42),
    # Amazon Electronics; its image features have 4,096 numbers, here both modalities have 768. No knowledge graph.
    "electronics": Counts(192_403, 63_001, 1_689_188),
    **{f"{k}x": AMAZON_BOOK.scaled(k / 8) for k in (1, 2, 4, 8)},  # the series ends at Amazon-Book
}


def _sampler(n: int, slope: float, rng: np.random.Generator) -> Callable[[int], np.ndarray]:
    """Return a function that draws so many of n nodes by a power law."""
    weight = ((np.arange(n) + 0.5) / n) ** -slope
    rng.shuffle(weight)
    cumulative = np.cumsum(weight)
    cumulative /= cumulative[-1]
    return lambda size: np.minimum(np.searchsorted(cumulative, rng.random(size), side="right"), n - 1)


def _unique(n: int, first: np.ndarray, draw: Callable[[int], np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """Return n different keys in random order: those of ``first``, then drawn ones.

    Raises:
        ValueError: if there are more in ``first``, or draws find too few new ones.
    """
    keys = np.unique(first)
    if len(keys) > n:
        raise ValueError(f"{n} edges are too few: {len(keys)} are needed to reach every node")
    for _ in range(100):
        missing = n - len(keys)
        if missing == 0:
            return rng.permutation(keys)
        new = np.setdiff1d(draw(missing + missing // 8 + 16), keys)
        keys = np.concatenate([keys, rng.permutation(new)[:missing]])
    raise ValueError(f"{n} different edges are too many for so few nodes")


def interactions(counts: Counts, rng: np.random.Generator) -> np.ndarray:
    """Return unique pairs of user and item in random order, ``[interactions, 2]``."""
    n_users, n_items = counts.users, counts.items
    user, item = _sampler(n_users, SLOPES["user"], rng), _sampler(n_items, SLOPES["item"], rng)
    floor = max(1, min(USER_FLOOR, counts.interactions // (2 * n_users)))
    users = np.concatenate([np.repeat(np.arange(n_users), floor), user(n_items)])
    items = np.concatenate([item(floor * n_users), np.arange(n_items)])
    keys = _unique(counts.interactions, users * n_items + items, lambda size: user(size) * n_items + item(size), rng)
    return np.stack([keys // n_items, keys % n_items], axis=1)


def triples(counts: Counts, rng: np.random.Generator) -> np.ndarray:
    """Return unique triples of head, relation and tail in random order, ``[triples, 3]``; entity i is item i."""
    n_items, n_entities = counts.items, counts.entities
    n_others = n_entities - n_items
    item_head, any_tail = _sampler(n_items, SLOPES["head"], rng), _sampler(n_entities, SLOPES["tail"], rng)
    other_head, other_tail = _sampler(n_others, SLOPES["head"], rng), _sampler(n_others, SLOPES["tail"], rng)

    def draw(size: int) -> np.ndarray:
        n_from_items = round(ITEM_SHARE * size)
        heads = np.concatenate([item_head(n_from_items), other_head(size - n_from_items) + n_items])
        tails = np.concatenate([other_tail(n_from_items) + n_items, any_tail(size - n_from_items)])
        return (heads * n_entities + tails)[heads != tails]

    items, others = np.arange(n_items), np.arange(n_items, n_entities)
    heads = np.concatenate([items, item_head(n_others)])
    tails = np.concatenate([other_tail(n_items) + n_items, others])
    keys = _unique(counts.triples, heads * n_entities + tails, draw, rng)
    relation = _sampler(counts.relations, SLOPES["relation"], rng)(n_entities)
    relation[rng.choice(others, counts.relations, replace=False)] = np.arange(counts.relations)  # all of them occur
    return np.stack([keys // n_entities, relation[keys % n_entities], keys % n_entities], axis=1)


def features(n_items: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """Return clustered item features of low rank with noise, ``[n_items, size]`` float32."""
    rank = min(RANK, size)
    centres = rng.normal(size=(N_CLUSTERS, rank))
    place = centres[rng.integers(N_CLUSTERS, size=n_items)] + rng.normal(size=(n_items, rank))
    values = place.astype(np.float32) @ (rng.normal(size=(rank, size)) / np.sqrt(rank)).astype(np.float32)
    return values + NOISE * rng.standard_normal((n_items, size), dtype=np.float32)


def ensure(name: str, counts: Counts, folder: str | os.PathLike[str], seed: int = 0) -> Path:
    """Write the data set into ``folder/name`` unless it is there already; return that folder.

    Raises:
        ValueError: if such a data set cannot be, e.g. more interactions than pairs.
    """
    path = Path(folder) / name
    stamp = json.dumps({"format": FORMAT, "seed": seed, **asdict(counts)}, indent=1) + "\n"
    if (path / "synthetic.json").is_file() and (path / "synthetic.json").read_text(encoding="utf-8") == stamp:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.parent / f".{name}.{secrets.token_hex(4)}.part"
    part.mkdir()
    try:
        _write(part, name, counts, seed)
        (part / "synthetic.json").write_text(stamp, encoding="utf-8")
        if path.is_dir():
            if not (path / "synthetic.json").is_file():
                raise ValueError(f"{path} is there and was not made here: name another folder")
            shutil.rmtree(path)
        part.rename(path)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return path


def _write(folder: Path, name: str, counts: Counts, seed: int) -> None:
    rng = {part: np.random.default_rng([seed, i]) for i, part in enumerate(("inter", "kg", "features"))}
    _write_table(folder / f"{name}.inter", ["user_id", "item_id"], interactions(counts, rng["inter"]))
    if counts.triples:
        _write_table(folder / f"{name}.kg", ["head_id", "relation_id", "tail_id"], triples(counts, rng["kg"]))
        linked = np.arange(counts.items)
        _write_table(folder / f"{name}.link", ["item_id", "entity_id"], np.stack([linked, linked], axis=1))
    for modality, size in counts.modalities:
        np.save(folder / f"{modality}.npy", features(counts.items, size, rng["features"]))
    (folder / "items.txt").write_text("\n".join(map(str, range(counts.items))) + "\n", encoding="utf-8")


def _write_table(path: Path, fields: list[str], rows: np.ndarray) -> None:
    table = pa.table(dict(zip(fields, rows.T, strict=True)))
    with path.open("wb") as file:
        file.write(("\t".join(f"{field}:token" for field in fields) + "\n").encode())  # pyarrow would quote the names
        csv.write_csv(table, file, csv.WriteOptions(include_header=False, delimiter="\t"))
