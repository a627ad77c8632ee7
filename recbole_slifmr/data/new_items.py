"""Items that were not in training, by what is known of them: features and triples."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch

from recbole_slifmr.data.convert.frames import feature_rows, find_column, tokens_of
from recbole_slifmr.data.convert.source import DelimitedFile
from recbole_slifmr.data.convert.table import read_feature_file
from recbole_slifmr.data.features import ItemFeatures
from recbole_slifmr.errors import DataError, name_some

UNKNOWN = "they have neither features nor a triple with an entity and a relation of the training"


class NewItems(NamedTuple):
    """New items in the terms of a training split.

    Attributes:
        tokens: ``[n]``; without those of which nothing is known.
        features: by modality, ``[n, d_m]`` and which of them have it ``[n]``; some or all of the training's modalities.
        links: to entities of the training, ``[L, 3]``: which of the items, ``2 * relation`` or, where the item is the
            tail, ``2 * relation + 1``, and the entity.
    """

    tokens: np.ndarray
    features: dict[str, ItemFeatures]
    links: np.ndarray


def read_new_items(
    dataset: Any,
    items: pd.DataFrame,
    triples: pd.DataFrame | None = None,
    features: Mapping[str, Any] | None = None,
    columns: Mapping[str, str] | None = None,
) -> NewItems:
    """Read new items from frames, which are those of ``Recommender.fit``.

    Args:
        dataset: the training split.
        items: a row per item.
        triples: head, relation and tail; the new item is either end, the other one an entity or item of the training.
            Triples of other entities or relations say nothing and are left out.
        features: by modality, an array with a row per row of ``items`` or a frame that names the item of each row.
        columns: names of columns that are not called as usual, by what they hold.

    Raises:
        DataError: for a frame that cannot be used, an item that was in training, a modality that was not or has
            another dimension, and if nothing is known of any item.
    """
    columns = columns or {}
    tokens = tokens_of(items, "items", "item", columns, unique=True)
    known = tokens[tokens.isin(dataset.field2token_id[dataset.iid_field])]
    if len(known):
        named = name_some(known.tolist())
        raise DataError(f"new items {named} were in training: recommend them as the others, or leave them out")
    place = {token: row for row, token in enumerate(tokens)}
    found = {
        name: _features(dataset, name, *feature_rows(values, f"features['{name}']", tokens, columns), place)
        for name, values in (features or {}).items()
    }
    links = np.zeros((0, 3), dtype=np.int64) if triples is None else _links(dataset, triples, columns, place)
    described = np.zeros(len(tokens), dtype=bool)
    for part in found.values():
        described |= part.mask.numpy()
    described[links[:, 0]] = True
    if not described.any():
        raise DataError(f"new items {name_some(tokens.tolist())}: {UNKNOWN}: give triples or features")
    if not described.all():
        warnings.warn(f"new items {name_some(tokens[~described].tolist())} are left out: {UNKNOWN}", stacklevel=2)
    row = torch.from_numpy(np.flatnonzero(described))
    found = {name: ItemFeatures(part.values[row], part.mask[row]) for name, part in found.items()}
    links[:, 0] = (np.cumsum(described) - 1)[links[:, 0]]
    return NewItems(tokens[described].to_numpy(object), found, links)


def read_new_item_files(
    dataset: Any, items: Path, triples: Path | None = None, features: Mapping[str, Path] | None = None
) -> NewItems:
    """Read new items from files, which are those of ``slifmr convert csv``; see :func:`read_new_items`.

    Args:
        dataset: the training split.
        items: delimited, with a row per item.
        triples: delimited, with head, relation and tail.
        features: by modality, ``.npy`` or ``.parquet``.
    """
    table, columns = _frame(items, "items"), dict[str, str]()
    column = find_column(table, str(items), "item", columns)
    if column is None:
        raise DataError(f"{items} has no column of items, only {', '.join(table.columns)}: call it item_id")
    tokens = tokens_of(table, str(items), "item", columns)
    frames = {}
    for name, path in (features or {}).items():
        _, ids, values = read_feature_file(path, name, column, items, tokens)
        frames[name] = pd.DataFrame(values, index=pd.Index(ids, dtype=object))
    return read_new_items(dataset, table, None if triples is None else _frame(triples, "triples"), frames)


def _frame(path: Path, what: str) -> pd.DataFrame:
    file = DelimitedFile(path, what)
    return pd.concat([chunk for _, chunk in file.chunks(file.columns)], ignore_index=True)


def _features(dataset: Any, name: str, tokens: pd.Series, values: np.ndarray, place: dict[str, int]) -> ItemFeatures:
    if name not in dataset.item_features:
        known = ", ".join(dataset.item_features) or "none"
        raise DataError(f"features: there was no modality '{name}' in training, only {known}")
    size = dataset.item_features[name].values.shape[1]
    if values.shape[1] != size:
        raise DataError(f"features['{name}'] has {values.shape[1]} numbers per item, in training there were {size}")
    matrix, rows = torch.zeros(len(place), size), tokens.map(place)
    of_items = rows.notna().to_numpy()
    matrix[rows[of_items].to_numpy(np.int64)] = torch.from_numpy(values[of_items].astype(np.float32))
    return ItemFeatures(matrix, matrix.any(dim=1))


def _links(dataset: Any, triples: pd.DataFrame, columns: Mapping[str, str], place: dict[str, int]) -> np.ndarray:
    head, relation, tail = (tokens_of(triples, "triples", role, columns) for role in ("head", "relation", "tail"))
    if not len(dataset.triples):
        raise DataError("triples: there was no knowledge graph in training: leave them out")
    entities, items = dataset.field2token_id[dataset.entity_field], dataset.field2token_id[dataset.iid_field]
    relations = relation.map(dataset.field2token_id[dataset.relation_field])
    links = []
    for direction, (own, other) in enumerate(((head, tail), (tail, head))):
        entity = other.map(entities).fillna(other.map(items))
        used = own.isin(place) & (relations > 0) & (entity > 0)
        links.append(np.stack([own[used].map(place), 2 * relations[used] + direction, entity[used]], axis=1))
    return np.concatenate(links).astype(np.int64)
