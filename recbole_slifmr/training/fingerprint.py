"""Hashes of what a run has read, to tell whether two runs have seen the same data whatever their internal ids are.

Tokens are hashed to 64 bits each; rows are sorted by these hashes, so that neither ids nor the order of the rows count.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

BLOCK = 2**22  # numbers hashed at a time


def fingerprint(loader: Any) -> str:
    """Return a hash of the (user token, item token) pairs of a split: equal for equal data, whatever the ids."""
    data = loader._dataset
    columns = [_token_hashes(data, field)[data.inter_feat[field].numpy()] for field in (data.uid_field, data.iid_field)]
    return _hash_rows(columns)


def input_fingerprints(dataset: Any) -> dict[str, str]:
    """Return a hash of the knowledge graph and of the features of each modality, as far as the run reads them.

    Args:
        dataset: the training split.

    Returns:
        hash by name, such as ``knowledge graph`` and ``features 'text'``.
    """
    found = {}
    triples = getattr(dataset, "triples", None)
    if triples is not None and len(triples):
        entities, relations = (
            _token_hashes(dataset, field) for field in (dataset.entity_field, dataset.relation_field)
        )
        head, relation, tail = triples.numpy().T
        found["knowledge graph"] = _hash_rows([entities[head], relations[relation], entities[tail]])
    for name, features in getattr(dataset, "item_features", {}).items():
        found[f"features '{name}'"] = _hash_features(_token_hashes(dataset, dataset.iid_field), features)
    return found


def _token_hashes(dataset: Any, field: str) -> np.ndarray:
    """Return a 64-bit hash of each token by its id, ``[n]`` uint64."""
    return pd.util.hash_array(np.asarray(dataset.field2id_token[field], dtype=object), categorize=False)


def _hash_rows(columns: list[np.ndarray]) -> str:
    order = np.lexsort(columns)
    return _digest(column[order] for column in columns)


def _hash_features(tokens: np.ndarray, features: Any) -> str:
    order = np.argsort(tokens)
    values, mask = features.values.numpy(), features.mask.numpy()
    step = max(1, BLOCK // values.shape[1])
    blocks = (values[order[start : start + step]] for start in range(0, len(order), step))
    return _digest(part for parts in ((tokens[order], mask[order]), blocks) for part in parts)


def _digest(arrays: Iterator[np.ndarray]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for array in arrays:
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
