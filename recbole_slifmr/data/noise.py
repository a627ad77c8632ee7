"""Noise in the training inputs: interactions, item features, knowledge graph. Validation and test stay as they are.

The setting ``noise`` gives a level from 0 to 1 per kind, such as ``{interaction_add: 0.2, kg_tail: 0.1, seed: 3}``.
A kind changes ``round(level * n)`` of the ``n`` clean things it is about. Each draws from a generator of its own, so
that kinds do not disturb each other or anything else that is random, and what a level chooses a higher one chooses too.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from recbole.utils import ModelType

from recbole_slifmr.data.features import ItemFeatures
from recbole_slifmr.errors import SettingError

# The number of a kind is part of its seed: never change one.
KINDS = {
    "interaction_drop": 1,
    "interaction_add": 2,
    "feature_gaussian": 3,
    "feature_swap": 4,
    "feature_random": 5,
    "feature_missing": 6,
    "kg_tail": 7,
    "kg_link": 8,
    "kg_drop": 9,
}
INPUTS = ("interaction", "feature", "kg")
FIRST_DRAWS = 4096  # candidates of the first round of interaction_add; the rounds double


@dataclass(frozen=True)
class Noise:
    """What noise there is.

    Attributes:
        levels: share from 0 to 1 by kind; kinds at 0 are left out.
        seed: of all kinds together.
    """

    levels: dict[str, float]
    seed: int

    def of(self, what: str) -> list[str]:
        """Return the kinds that change an input: interaction, feature or kg."""
        return [kind for kind in self.levels if kind.startswith(f"{what}_")]

    def generator(self, kind: str, *parts: int) -> np.random.Generator:
        """Return the generator of a kind, or of one part of what it does."""
        return np.random.default_rng([self.seed, KINDS[kind], *parts])

    def count(self, kind: str, n: int) -> int:
        """Return how many of ``n`` things a kind changes."""
        return round(self.levels.get(kind, 0.0) * n)

    def __str__(self) -> str:
        """Return levels and seed in a few words."""
        return ", ".join(f"{kind} {level:g}" for kind, level in self.levels.items()) + f" (seed {self.seed})"


def read_noise(config: Any) -> Noise:
    """Return the setting ``noise``, with the run's seed if it names none.

    Raises:
        SettingError: for an unknown kind, a level outside 0 to 1 or a seed that is none.
    """
    setting = config["noise"] or {}
    if not isinstance(setting, Mapping):
        raise SettingError(f"noise must map kinds to levels, such as {{interaction_add: 0.2}}, not {setting!r}")
    levels = {}
    for kind, level in setting.items():
        if kind == "seed":
            continue
        if kind not in KINDS:
            raise SettingError(f"noise: '{kind}' is none of {', '.join(KINDS)} and seed")
        if type(level) not in (int, float) or not 0 <= level <= 1:
            raise SettingError(f"noise: the level of {kind} must be a number from 0 to 1, not {level!r}")
        if level > 0:
            levels[kind] = float(level)
    seed = setting.get("seed", config["seed"])
    if type(seed) is not int or seed < 0:
        raise SettingError(f"noise: the seed must be a whole number from 0, not {seed!r}")
    return Noise({kind: levels[kind] for kind in KINDS if kind in levels}, seed)


def reads(config: Any) -> set[str]:
    """Return what a run reads of the data, of ``INPUTS``: noise in anything else cannot change it."""
    read = {"interaction"}
    if config["use_features"]:
        read.add("feature")
    if config["use_kg"] or config["MODEL_TYPE"] == ModelType.KNOWLEDGE:
        read.add("kg")
    return read


# -- interactions -------------------------------------------------------------------------------------------------


def drop_interactions(noise: Noise, users: np.ndarray, items: np.ndarray) -> np.ndarray:
    """Return which training interactions ``interaction_drop`` leaves, ``[n]`` bool: one at least per user and item.

    They go in random order, except one that is the last of its user or item by then.

    Args:
        noise: the noise.
        users: of the training interactions, ``[n]``.
        items: likewise.

    Raises:
        SettingError: if so many cannot go.
    """
    n = len(users)
    count = noise.count("interaction_drop", n)
    order = noise.generator("interaction_drop").permutation(n)
    # Only the last in order of a user or an item can be refused: before it, a later one is still there.
    last_of_user, last_of_item = _last(users[order]), _last(items[order])
    at = np.union1d(last_of_user[last_of_user >= 0], last_of_item[last_of_item >= 0])
    u, i = users[order[at]], items[order[at]]
    user_has, item_has = np.zeros(len(last_of_user), dtype=bool), np.zeros(len(last_of_item), dtype=bool)
    refused = np.zeros(n, dtype=bool)
    for place, user, item, of_user, of_item in zip(
        at.tolist(),
        u.tolist(),
        i.tolist(),
        (last_of_user[u] == at).tolist(),
        (last_of_item[i] == at).tolist(),
        strict=True,
    ):
        if (of_user and not user_has[user]) or (of_item and not item_has[item]):
            refused[place] = user_has[user] = item_has[item] = True
    free = order[~refused]
    if count > len(free):
        raise SettingError(
            f"noise: interaction_drop {noise.levels['interaction_drop']:g} is {count} of {n} training interactions, "
            f"but only {len(free)} can go with one left for every user and item: lower it"
        )
    kept = np.ones(n, dtype=bool)
    kept[free[:count]] = False
    return kept


def _last(ids: np.ndarray) -> np.ndarray:
    """Return the last place of each id, -1 for an id that is nowhere."""
    last = np.full(ids.max() + 1, -1)
    np.maximum.at(last, ids, np.arange(len(ids)))
    return last


def draw_interactions(
    noise: Noise, n_train: int, users: np.ndarray, items: np.ndarray, n_users: int, n_items: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the pairs that ``interaction_add`` adds: uniform among those that occur in no split, none twice.

    Args:
        noise: the noise.
        n_train: number of clean training interactions, which the level is a share of.
        users: of the interactions of all splits.
        items: likewise.
        n_users: number of users, the padding user 0 included.
        n_items: number of items, the padding item 0 included.

    Returns:
        users, items and, of each pair, the training interaction whose other columns it takes.

    Raises:
        SettingError: if there are too few such pairs, or a user would have every item.
    """
    count = noise.count("interaction_add", n_train)
    known = torch.unique(torch.from_numpy(users.astype(np.int64) * n_items + items)).numpy()
    n_free = (n_users - 1) * (n_items - 1) - len(known)
    too_much = f"noise: interaction_add {noise.levels['interaction_add']:g} adds {count} interactions"
    if count > n_free:
        raise SettingError(f"{too_much}, but only {n_free} pairs of user and item are in no split: lower it")
    generator = noise.generator("interaction_add")
    drawn, n_draws = np.zeros(0, dtype=np.int64), FIRST_DRAWS
    while len(drawn) < count:  # in the same rounds for every level, so that a lower one takes the first pairs
        places = generator.integers(0, (n_users - 1) * (n_items - 1), n_draws)
        keys = (places // (n_items - 1) + 1) * n_items + places % (n_items - 1) + 1
        keys = keys[known[np.searchsorted(known, keys).clip(max=len(known) - 1)] != keys]
        drawn = np.concatenate([drawn, keys])
        drawn = drawn[np.sort(np.unique(drawn, return_index=True)[1])]
        n_draws *= 2
    drawn = drawn[:count]
    n_of_user = np.bincount(np.concatenate([known, drawn]) // n_items, minlength=n_users)
    if (n_of_user[drawn // n_items] == n_items - 1).any():
        raise SettingError(f"{too_much}, and a user would have every item, with no negative left to sample: lower it")
    donors = noise.generator("interaction_add", 1).integers(0, n_train, count)
    return drawn // n_items, drawn % n_items, donors


# -- features -----------------------------------------------------------------------------------------------------


def disturb_features(noise: Noise, features: Mapping[str, ItemFeatures]) -> dict[str, ItemFeatures]:
    """Return the features of every modality with noise; what was given stays as it is.

    Raises:
        SettingError: for a level that leaves nothing, or that makes a single row change places.
    """
    return {name: _disturb_modality(noise, name, *modality) for name, modality in features.items()}


def _disturb_modality(noise: Noise, name: str, clean: torch.Tensor, clean_mask: torch.Tensor) -> ItemFeatures:
    values, mask = clean.numpy().copy(), clean_mask.numpy().copy()
    present = mask.nonzero()[0]
    rows = values[present]
    n, size = rows.shape
    mean, scale = rows.mean(axis=0), rows.std(axis=0)
    part = zlib.crc32(name.encode())
    for kind in noise.of("feature"):
        generator, count = noise.generator(kind, part), noise.count(kind, n)
        if kind == "feature_gaussian":
            rows += noise.levels[kind] * scale * generator.standard_normal((n, size), dtype=np.float32)
            continue
        chosen = generator.permutation(n)[:count]
        if kind == "feature_swap":
            rows[chosen] = rows[_exchange(noise, kind, chosen, f"rows of '{name}'")]
        elif kind == "feature_random":
            rows[chosen] = mean + scale * generator.standard_normal((count, size), dtype=np.float32)
        else:  # feature_missing
            if count == n:
                raise SettingError(
                    f"noise: {kind} {noise.levels[kind]:g} leaves no row of '{name}': lower it, or take it out of "
                    "'modalities'"
                )
            rows[chosen] = 0
            mask[present[chosen]] = False
    values[present] = rows
    return ItemFeatures(torch.from_numpy(values), torch.from_numpy(mask))


def _exchange(noise: Noise, kind: str, chosen: np.ndarray, things: str) -> np.ndarray:
    """Return for each of the chosen another one, whose place it takes; they are in random order."""
    if len(chosen) == 1:
        raise SettingError(
            f"noise: {kind} {noise.levels[kind]:g} is one of the {things}, with none to exchange: raise it"
        )
    return np.roll(chosen, 1)


# -- knowledge graph ----------------------------------------------------------------------------------------------


def disturb_kg(noise: Noise, triples: np.ndarray, linked: np.ndarray, n_entities: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the triples with noise and the new id of every entity.

    Args:
        noise: the noise.
        triples: head, relation and tail, ``[T, 3]``.
        linked: ids of the items that have an entity; the entity has the same id.
        n_entities: number of ids of items and entities.

    Returns:
        triples ``[T', 3]`` in the new ids, and those ids ``[n_entities]``: ``kg_link`` moves entities to other items.

    Raises:
        SettingError: for a level that leaves no triple, or that makes a single entity change places.
    """
    triples, ids = triples.copy(), np.arange(n_entities)
    n = len(triples)
    if "kg_tail" in noise.levels:
        generator, count = noise.generator("kg_tail"), noise.count("kg_tail", n)
        entities = np.unique(triples[:, [0, 2]])
        if len(entities) < 2:
            raise SettingError("noise: kg_tail needs two entities at least")
        chosen = generator.permutation(n)[:count]
        old = np.searchsorted(entities, triples[chosen, 2])
        triples[chosen, 2] = entities[(old + generator.integers(1, len(entities), count)) % len(entities)]
    if "kg_drop" in noise.levels:
        count = noise.count("kg_drop", n)
        if count == n:
            raise SettingError(f"noise: kg_drop {noise.levels['kg_drop']:g} leaves no triple: lower it")
        kept = np.ones(n, dtype=bool)
        kept[noise.generator("kg_drop").permutation(n)[:count]] = False
        triples = triples[kept]
    if "kg_link" in noise.levels:
        generator, count = noise.generator("kg_link"), noise.count("kg_link", len(linked))
        chosen = np.sort(linked)[generator.permutation(len(linked))[:count]]
        ids[chosen] = _exchange(noise, "kg_link", chosen, f"{len(linked)} linked items")
        triples[:, [0, 2]] = ids[triples[:, [0, 2]]]
    return triples, ids
