"""A loaded data set, with its splits and its noise, written as RecBole atomic files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from recbole.utils import FeatureType

from recbole_slifmr.data.vectors import IDS_FILE, write_tokens
from recbole_slifmr.errors import DataError
from recbole_slifmr.files import replace_folder

SPLITS = ("train", "valid", "test")


def write_atomic(parts: Sequence[Any], folder: Path, name: str) -> Path:
    """Write the splits of a data set with the knowledge graph and the item features that were read with them.

    To be read with ``benchmark_filename: [train, valid, test]`` and ``modalities: auto``. What the model did not read
    is not written, nor are ``.user`` and ``.item``. The folder appears whole or not at all.

    Args:
        parts: training, validation and test split, as ``SLIFMRDataset.build`` gives them.
        folder: where the data set's folder is made, the later ``data_path``.
        name: of the data set.

    Returns:
        the data set's folder.

    Raises:
        DataError: if it is there already.
    """
    target = folder / name
    if target.exists():
        raise DataError(f"{target} is there already: remove it or choose another name")
    with replace_folder(target) as part:
        for split, data in zip(SPLITS, parts, strict=True):
            _write_table(part / f"{name}.{split}.inter", _interactions(data), data)
        data = parts[0]
        if data.has_kg:
            _write_table(part / f"{name}.kg", _triples(data), data)
            links = pd.DataFrame(list(data.item2entity.items()), columns=[data.iid_field, data.entity_field])
            _write_table(part / f"{name}.link", links, data)
        for modality, features in data.item_features.items():
            np.save(part / f"{modality}.npy", features.values[1:].numpy())  # a row of zeros is none
        if data.item_features:
            write_tokens(part / IDS_FILE, data.field2id_token[data.iid_field][1:])
    return target


def _write_table(path: Path, frame: pd.DataFrame, data: Any) -> None:
    header = {field: f"{field}:{data.field2type[field].value}" for field in frame}
    frame.rename(columns=header).to_csv(path, sep=data.config["field_separator"], index=False, encoding="utf-8")


def _interactions(data: Any) -> pd.DataFrame:
    columns = {}
    for field in data.inter_feat:
        values, kind = data.inter_feat[field].numpy(), data.field2type[field]
        if kind in (FeatureType.TOKEN_SEQ, FeatureType.FLOAT_SEQ):
            raise DataError(f"column '{field}' holds sequences, which are not written: leave it out of load_col")
        columns[field] = data.field2id_token[field][values] if kind == FeatureType.TOKEN else values
    return pd.DataFrame(columns)


def _triples(data: Any) -> pd.DataFrame:
    """Return head, relation and tail by token, without the reverse triples that ``kg_reverse_r`` adds."""
    triples = data.triples.numpy()
    if data.kg_reverse_r:
        triples = triples[: len(triples) // 2]
    fields = (data.head_entity_field, data.relation_field, data.tail_entity_field)
    return pd.DataFrame({f: data.field2id_token[f][ids] for f, ids in zip(fields, triples.T, strict=True)})
