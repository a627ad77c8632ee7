"""What a careful person checks of a data set before training on it: sizes, gaps, duplicates, leaks, signal, memory.

Everything is computed from the splits as a model gets them; duplicates and stray links, which loading settles, from the
files. Whether features or the knowledge graph say anything about taste is asked of the training split alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from torch.nn import functional as F

from recbole_slifmr.data.dataset import SLIFMRDataset, choose_batch_size
from recbole_slifmr.data.features import ItemFeatures
from recbole_slifmr.data.table import examine
from recbole_slifmr.nn.linear import feature_factor, interaction_factor
from recbole_slifmr.nn.linear_branch import user_weights, weighted_interactions
from recbole_slifmr.nn.relevance import share_out
from recbole_slifmr.nn.tags import tag_factors

Similarity = Callable[[np.ndarray, np.ndarray], np.ndarray]
N_PAIRS = 100_000
_BLOCK = 8_192  # pairs whose similarities are computed at a time


def survey(config: Any, splits: Mapping[str, SLIFMRDataset], n_pairs: int = N_PAIRS, seed: int = 0) -> dict[str, Any]:
    """Look at a data set.

    Args:
        config: RecBole's configuration for a model of this package.
        splits: the data set of ``train``, ``valid`` and ``test``.
        n_pairs: pairs of items to compare.
        seed: of their choice.

    Returns:
        what was found, fit for JSON; ``survey_report.py`` puts it into tables and words.
    """
    train = splits["train"]
    choose_batch_size(config, len(train.inter_feat))
    memory = config.model_class.estimate_memory(config, train)  # first: it starts from what the process takes now
    pairs = {name: _pairs(data) for name, data in splits.items()}
    modalities = {}
    covered = _linked(train)
    for name, (values, mask) in train.item_features.items():
        modalities[name] = {"dimension": values.shape[1], "items": int(mask.sum())}
        covered |= mask.numpy()
    return {
        "dataset": train.dataset_name,
        "counts": _count(train, pairs),
        "unseen": {name: _compare(pairs["train"], pairs[name]) for name in pairs if name != "train"},
        "degrees": {name: _describe(values) for name, values in degrees(train).items()},
        "duplicates": _duplicates(train, config),
        "knowledge_graph": _describe_kg(train, config) if train.has_kg else None,
        "modalities": modalities,
        "repeated_features": {name: _count_repeats(features) for name, features in train.item_features.items()},
        "items_without_either": int((~covered[1:]).sum()),
        "similarity": _similarity(train, pairs["train"], n_pairs, seed),
        "relations": _weigh_relations(train, pairs["train"], config["linear_user_power"] or 0.0),
        "memory_mb": memory,
    }


def _pairs(data: SLIFMRDataset) -> np.ndarray:
    """Return user and item of each interaction, ``[2, n]``."""
    return np.stack([data.inter_feat[data.uid_field].numpy(), data.inter_feat[data.iid_field].numpy()])


def _linked(data: SLIFMRDataset) -> np.ndarray:
    """Return whether an item has an entity in the knowledge graph, ``[n_items]`` bool."""
    linked = np.zeros(data.item_num, dtype=bool)
    linked[[data.field2token_id[data.iid_field][item] for item in data.item2entity]] = True
    return linked


# -- sizes ------------------------------------------------------------------------------------------------------------


def _count(data: SLIFMRDataset, pairs: Mapping[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    counts = {}
    for name, (users, items) in {"all": np.concatenate(list(pairs.values()), axis=1), **pairs}.items():
        n_users, n_items = len(_distinct(users)), len(_distinct(items))
        counts[name] = {
            "users": n_users,
            "items": n_items,
            "interactions": len(users),
            "density": len(users) / max(n_users * n_items, 1),
        }
    return counts


def _distinct(ids: np.ndarray) -> np.ndarray:
    """Return what NumPy's ``unique`` does, in a fraction of the time that its hashing takes since NumPy 2.3."""
    return torch.unique(torch.from_numpy(ids)).numpy()


def _compare(train: np.ndarray, other: np.ndarray) -> dict[str, int]:
    """Count what another split has that training lacks, and the pairs that it has in common with training."""
    n_items = int(max(train[1].max(initial=0), other[1].max(initial=0))) + 1
    known, asked = (
        [_distinct(ids) for ids in (pairs[0], pairs[1], pairs[0] * n_items + pairs[1])] for pairs in (train, other)
    )
    shared = [len(np.intersect1d(a, b, assume_unique=True)) for a, b in zip(known, asked, strict=True)]
    return {
        "users": len(asked[0]) - shared[0],
        "items": len(asked[1]) - shared[1],
        "pairs_of_training": shared[2],
    }


def degrees(data: SLIFMRDataset) -> dict[str, np.ndarray]:
    """Return the interactions of each user and item in a split, and the triples of each entity that has any."""
    users, items = _pairs(data)
    found = {
        "users": np.bincount(users, minlength=data.user_num)[1:],
        "items": np.bincount(items, minlength=data.item_num)[1:],
    }
    if data.has_kg:
        entities = np.bincount(data.triples[:, [0, 2]].numpy().ravel())
        found["entities"] = entities[entities > 0]
    return found


def _describe(values: np.ndarray) -> dict[str, float]:
    top = np.sort(values)[::-1][: max(len(values) // 5, 1)]
    return {
        "min": int(values.min()),
        "median": float(np.median(values)),
        "mean": float(values.mean()),
        "max": int(values.max()),
        "share_of_top_fifth": float(top.sum() / max(values.sum(), 1)),
    }


# -- files ------------------------------------------------------------------------------------------------------------


def _read(data: SLIFMRDataset, suffix: str, columns: tuple[str, ...], config: Any) -> Any:
    path = Path(data.dataset_path) / f"{data.dataset_name}.{suffix}"
    return examine(path, config["field_separator"], config["encoding"]).read(columns)


def _duplicates(data: SLIFMRDataset, config: Any) -> dict[str, int]:
    """Count the rows that say again what one before them said, by file; of interactions, user and item count."""
    files: dict[str, tuple[str, ...]] = {}
    for part in data.benchmark_filename_list or [""]:
        files[f"{part}.inter".lstrip(".")] = (data.uid_field, data.iid_field)
    if data.has_kg:
        files["kg"] = (data.head_entity_field, data.relation_field, data.tail_entity_field)
        files["link"] = (data.iid_field, data.entity_field)
    return {suffix: int(_read(data, suffix, ids, config).duplicated().sum()) for suffix, ids in files.items()}


def _describe_kg(data: SLIFMRDataset, config: Any) -> dict[str, int]:
    links = _read(data, "link", (data.iid_field, data.entity_field), config).drop_duplicates()
    item, entity = links[data.iid_field], links[data.entity_field]
    known_item = item.isin(data.field2token_id[data.iid_field].keys())
    triples = _read(data, "kg", (data.head_entity_field, data.tail_entity_field), config)
    known_entity = entity.isin(set(triples.to_numpy().ravel()))
    used = entity[known_item & known_entity]
    return {
        "triples": len(data.triples),
        "relations": int(data.triples[:, 1].unique().numel()),
        "entities": int(data.triples[:, [0, 2]].unique().numel()),
        "items_linked": len(data.item2entity),
        "links": len(links),
        "links_to_unknown_items": int((~known_item).sum()),
        "links_to_unknown_entities": int((~known_entity).sum()),
        "entities_of_several_items": int((used.value_counts() > 1).sum()),
    }


def _count_repeats(features: ItemFeatures) -> int:
    """Count the items whose row an item before them has too, as with a placeholder for a missing image."""
    rows = features.values[features.mask].numpy()
    return len(rows) - len({row.tobytes() for row in rows})


# -- similarity and taste ---------------------------------------------------------------------------------------------


def _similarity(
    data: SLIFMRDataset, pairs: np.ndarray, n_pairs: int, seed: int
) -> dict[str, dict[str, float | int | None]]:
    sources: dict[str, tuple[np.ndarray, Similarity]] = {}
    for name, (values, mask) in data.item_features.items():
        sources[name] = (mask.numpy(), _cosine(F.normalize(values, dim=1).numpy()))
    if data.has_kg:
        neighbours = _neighbourhoods(data)
        has_any: np.ndarray = np.diff(neighbours.indptr) > 0
        sources["knowledge graph"] = (has_any, _cosine(neighbours))
    found = {}
    for name, (has_it, similarity) in sources.items():
        auc, n_compared = co_consumption_auc(pairs[:, has_it[pairs[1]]], similarity, n_pairs, seed)
        found[name] = {"auc": auc, "pairs": n_compared}
    return found


def _weigh_relations(data: SLIFMRDataset, pairs: np.ndarray, user_power: float) -> list[dict[str, Any]]:
    """Return how many tags each relation gives to how many items, and what it counts in SLIFMR's linear branch."""
    tags = tag_factors(data.triples.numpy(), data.item_num)
    if not len(tags.kinds):
        return []
    history = interaction_factor(pairs[0], pairs[1], data.user_num, data.item_num).T.tocsr()
    users = weighted_interactions(history, user_weights(history, user_power))
    by_kind = share_out(users, [feature_factor(*features) for features in data.item_features.values()], tags)[1]
    names, found = data.field2id_token[data.relation_field], []
    for kind in np.unique(tags.kinds):
        of_kind = tags.items[:, tags.kinds == kind]
        found.append(
            {
                "relation": str(names[kind // 2]),
                "item_is": "tail" if kind % 2 else "head",
                "tags": of_kind.shape[1],
                "items": int((np.diff(of_kind.indptr) > 0).sum()),
                "weight": float(by_kind[kind]),
            }
        )
    return sorted(found, key=lambda row: -row["weight"])


def _cosine(rows: Any) -> Similarity:
    """Return the similarity by the cosine of rows of length 1, of an array or a sparse matrix."""

    def similarity(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        if sp.issparse(rows):
            return np.asarray(rows[a].multiply(rows[b]).sum(axis=1)).ravel()
        return np.einsum("nd,nd->n", rows[a], rows[b])

    return similarity


def _neighbourhoods(data: SLIFMRDataset) -> sp.csr_matrix:
    """Return which entities share a triple with an item, ``[n_items, n_entities]``, each row of length 1."""
    heads, _, tails = data.triples.numpy().T
    items, others = np.concatenate([heads, tails]), np.concatenate([tails, heads])
    kept = items < data.item_num
    entries = np.ones(int(kept.sum()), dtype=np.float32)
    shape = (data.item_num, data.entity_num)
    matrix = sp.csr_matrix((entries, (items[kept], others[kept])), shape)
    matrix.data[:] = 1  # repeated triples have been added up
    length = np.sqrt(np.diff(matrix.indptr))
    matrix.data /= np.repeat(length, np.diff(matrix.indptr)).astype(np.float32)
    return matrix


def co_consumption_auc(pairs: np.ndarray, similarity: Similarity, n_pairs: int, seed: int) -> tuple[float | None, int]:
    """Return how well a similarity tells items of the same user from items of random interactions.

    Both kinds of pairs have the same items equally often: a random pair joins the first item of one pair with the
    second of another. Popularity alone gives 0.5, therefore.

    Args:
        pairs: user and item of interactions, ``[2, n]``.
        similarity: from two arrays of items to one of numbers.
        n_pairs: pairs of each kind to draw; those of an item with itself are dropped.
        seed: of the draw.

    Returns:
        the area under the ROC curve, None without pairs, and the number of co-consumed pairs compared.
    """
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(seed)
    users, items = pairs[:, np.argsort(pairs[0], kind="stable")]
    _, starts, inverse, counts = np.unique(users, return_index=True, return_inverse=True, return_counts=True)
    several = np.flatnonzero(counts[inverse] > 1)
    if len(several) == 0:
        return None, 0
    first = rng.choice(several, n_pairs)
    user = inverse[first]
    step = rng.integers(1, counts[user])
    second = starts[user] + (first - starts[user] + step) % counts[user]
    a, b = items[first], items[second]
    a, b = a[a != b], b[a != b]
    c = rng.permutation(b)
    other = a != c
    if len(a) == 0 or not other.any():
        return None, 0
    scores = np.concatenate([_in_blocks(similarity, a, b), _in_blocks(similarity, a[other], c[other])])
    labels = np.repeat([1, 0], [len(a), int(other.sum())])
    return float(roc_auc_score(labels, scores)), len(a)


def _in_blocks(similarity: Similarity, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    starts = range(0, len(a), _BLOCK)
    return np.concatenate([similarity(a[i : i + _BLOCK], b[i : i + _BLOCK]) for i in starts])
