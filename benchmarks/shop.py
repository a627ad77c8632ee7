r"""A synthetic shop on which scores mean something: few interactions per user, brands and categories, short texts.

    python -m benchmarks.shop --out=shops [--name=shop] [--users=12000] [--items=7000] [--seed=1]

Items have a vector, the sum of their category's, their brand's and one of their own, and a log-normal popularity;
brands keep mostly to one department. A user has one to three interests, each near an item drawn by popularity, and
takes the items of highest :math:`\mathrm{logsumexp}_p(14 \cos(q_i, p)) + b_i + \mathrm{Gumbel}`, b the logarithm of
popularity; a fifth of what they take is drawn by popularity alone. What users and items of fewer than five
interactions took is left out until none is left (5-core). Of each user's items a tenth, one at least, is for test and
as many for validation.

The texts are a noisy linear map of the vectors; the graph holds brand and category of every item and the department
of every category. With the defaults, rankings by popularity, by co-occurrence (cosine) and by the ten nearest texts
reach a validation Recall@20 of .037, .076 and .076.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import click
import numpy as np
import pandas as pd

from recbole_slifmr.data.convert.target import (
    ENTITY,
    HEAD,
    ITEM,
    RELATION,
    SPLITS,
    TAIL,
    USER,
    AtomicFolder,
    atomic_folder,
)
from recbole_slifmr.errors import DataError, SettingError

DEPARTMENTS, CATEGORIES_EACH, SIZE, TEXT_SIZE = 20, 12, 24, 384
BRAND, OWN, FOCUS, INTEREST_SPREAD, BY_POPULARITY, TEXT_NOISE = 0.7, 0.7, 14.0, 0.12, 0.2, 2.0
CORE = 5


def _power_law(n: int, slope: float, rng: np.random.Generator) -> np.ndarray:
    weight = (rng.permutation(n) + 1.0) ** -slope
    return weight / weight.sum()


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def _core(pairs: np.ndarray) -> np.ndarray:
    """Drop the pairs of rare users and items until none is left."""
    while True:
        counts = [np.bincount(column)[column] for column in pairs.T]
        kept = np.minimum(*counts) >= CORE
        if kept.all():
            return pairs
        pairs = pairs[kept]


def write(target: AtomicFolder, n_users: int, n_items: int, seed: int) -> None:
    """Write the data set.

    Raises:
        SettingError: if too few users leave nothing.
    """
    rng = np.random.default_rng(seed)
    # items
    n_categories, n_brands = DEPARTMENTS * CATEGORIES_EACH, max(n_items // 6, 1)
    category = rng.choice(n_categories, n_items, p=_power_law(n_categories, 0.7, rng))
    brand = rng.choice(n_brands, n_items, p=_power_law(n_brands, 0.8, rng))
    home = rng.integers(DEPARTMENTS, size=n_brands) * CATEGORIES_EACH
    at_home = rng.random(n_items) < 0.6
    category[at_home] = home[brand[at_home]] + rng.integers(CATEGORIES_EACH, size=at_home.sum())
    department = rng.normal(size=(DEPARTMENTS, SIZE))
    kind = department.repeat(CATEGORIES_EACH, axis=0) + 0.8 * rng.normal(size=(n_categories, SIZE))
    vectors = kind[category] + BRAND * rng.normal(size=(n_brands, SIZE))[brand] + OWN * rng.normal(size=(n_items, SIZE))
    unit, log_popularity = _unit(vectors), rng.normal(size=n_items)
    popularity = np.exp(log_popularity) / np.exp(log_popularity).sum()
    text = vectors @ rng.normal(size=(SIZE, TEXT_SIZE)) / SIZE**0.5 + TEXT_NOISE * rng.normal(size=(n_items, TEXT_SIZE))

    # interactions
    pairs = []
    for user in range(n_users):
        n_taken = CORE - 1 + rng.geometric(0.23)
        n_popular = rng.binomial(n_taken, BY_POPULARITY)
        near = rng.choice(n_items, rng.integers(1, 4), p=popularity)
        interests = _unit(unit[near] + INTEREST_SPREAD * rng.normal(size=(len(near), SIZE)))
        appeal = np.logaddexp.reduce(FOCUS * (unit @ interests.T), axis=1) + log_popularity + rng.gumbel(size=n_items)
        taken = np.argsort(-appeal)[: n_taken - n_popular]
        taken = np.unique(np.concatenate([taken, rng.choice(n_items, n_popular, p=popularity)]))
        pairs += [(user, item) for item in rng.permutation(taken)]
    kept = _core(np.array(pairs))
    if not len(kept):
        raise SettingError(f"{n_users} users and {n_items} items leave nothing of a {CORE}-core: take more users")
    by_user = defaultdict(list)
    for user, item in kept.tolist():
        by_user[user].append(item)
    splits: dict[str, list[tuple[str, str]]] = {split: [] for split in SPLITS}
    for user, taken_by in by_user.items():
        share = max(1, round(len(taken_by) / 10))
        for place, item in enumerate(taken_by):
            split = "test" if place < share else "valid" if place < 2 * share else "train"
            splits[split].append((f"u{user}", f"i{item}"))

    # files
    items = np.unique(kept[:, 1])
    for split, rows in splits.items():
        target.add_interactions(pd.DataFrame(rows, columns=[USER, ITEM]), split)
    triples = [
        (f"e{i}", relation, f"{relation}{of[i]}")
        for i in items
        for relation, of in (("brand", brand), ("category", category))
    ]
    triples += [(f"category{c}", "department", f"department{c // CATEGORIES_EACH}") for c in range(n_categories)]
    target.add_triples(pd.DataFrame(triples, columns=[HEAD, RELATION, TAIL]))
    target.add_links(pd.DataFrame({ITEM: [f"i{i}" for i in items], ENTITY: [f"e{i}" for i in items]}))
    target.add_features({"text": (np.array([f"i{i}" for i in items], dtype=object), text[items].astype(np.float32))})


@click.command()
@click.option("--out", type=Path, required=True, help="The folder of data sets.")
@click.option("--name", default="shop", show_default=True, help="Name of the data set.")
@click.option("--users", default=12_000, show_default=True, help="Users before the 5-core.")
@click.option("--items", default=7_000, show_default=True, help="Items before the 5-core.")
@click.option("--seed", default=1, show_default=True)
@click.option("--force", is_flag=True, help="Replace a data set of that name.")
def main(out: Path, name: str, users: int, items: int, seed: int, force: bool) -> None:
    """Write a synthetic shop, whole or not at all."""
    try:
        with atomic_folder(out, name, force) as target:
            write(target, users, items, seed)
    except (DataError, SettingError) as error:
        raise click.UsageError(str(error)) from error
    interactions = sum(target.n_interactions.values())
    counts = {"users": len(target.users), "items": len(target.items), "interactions": interactions}
    print(", ".join(f"{count:,} {what}" for what, count in {**counts, "triples": target.n_triples}.items()))


if __name__ == "__main__":
    main()
