"""Item features: one matrix per modality, joined with the items by their token."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from logging import getLogger
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from recbole_slifmr.data.vectors import ItemFile, Vectors, read_vectors
from recbole_slifmr.errors import DataError, SettingError

KG_TAGS = "kg_tags"  # the view of the knowledge graph as features
RESERVED = ("interaction", "kg", KG_TAGS, "fused", "modality")  # names of other views
MISSING = {"mask": "lack it", "mean": "get the mean", "zero": "get zeros"}  # what happens to items without a row
SOURCE_KEYS = ("file", "ids", "field", "missing")
BLOCK = 2**22  # numbers read at a time


class ItemFeatures(NamedTuple):
    """A modality of the items, in RecBole's internal item ids.

    Attributes:
        values: ``[n_items, d_m]`` float32; zeros for items outside the mask, the padding item 0 among them.
        mask: ``[n_items]`` bool, True for the items that have the modality.
    """

    values: Tensor
    mask: Tensor


def find_modalities(folder: Path) -> dict[str, str]:
    """Return ``{name: file name}`` for every ``.npy`` file of a folder, by name.

    Other formats are named in ``modalities``: a ``.pt`` may be a checkpoint, a ``.csv`` or ``.parquet`` anything.
    """
    return {path.stem: path.name for path in sorted(folder.glob("*.npy"))}


def is_modality_name(name: Any) -> bool:
    """Return whether a modality can have the name: an identifier that no other view and nothing of torch's has."""
    return str(name).isidentifier() and name not in RESERVED and not hasattr(nn.ModuleDict(), name)


def load_features(
    modalities: Mapping[str, Any],
    folder: Path,
    item_file: ItemFile,
    token2id: Mapping[str, int],
    missing: str = "mask",
) -> dict[str, ItemFeatures]:
    """Load the modalities of a data set and log what was found.

    Args:
        modalities: per name either a file (relative to ``folder``), ``{file: x.npy, ids: x.txt}``, ``{file: x.parquet,
            ids: column, field: column}``, or ``{field: name}`` for a ``float_seq`` column of the ``.item`` file; see
            :func:`~recbole_slifmr.data.vectors.read_vectors`. ``missing`` may be among the keys.
        folder: where the files are.
        item_file: the data set's ``.item`` file.
        token2id: internal id of every item token, the padding item included.
        missing: what becomes of items without a row, or with a row of zeros: they lack the modality (``mask``), or have
            the mean of the others (``mean``) or a row of zeros (``zero``).

    Returns:
        features by modality, in the order given.

    Raises:
        DataError: for a missing file or column, lengths that differ, an item with rows that differ, only unknown
            tokens, NaN or infinite values.
        SettingError: if ``missing`` is none of the three.
    """
    for name in modalities:
        if not is_modality_name(name):
            raise DataError(f"modalities: '{name}' cannot be a modality's name: use another, such as text or image")
    return {name: _load(name, source, folder, item_file, token2id, missing) for name, source in modalities.items()}


def _load(
    name: str, source: Any, folder: Path, item_file: ItemFile, token2id: Mapping[str, int], missing: str
) -> ItemFeatures:
    settings = {"file": source} if isinstance(source, str) else source
    if (
        not isinstance(settings, Mapping)
        or not {"file", "field"} & set(settings)
        or not all(isinstance(settings.get(key) or "", str) for key in settings)
        or ("file" in settings and not settings["file"])
    ):  # fmt: skip
        raise DataError(f"modalities: '{name}' must be a file, {{file, ids, field}} or {{field}}, not {source!r}")
    if unknown := set(settings) - set(SOURCE_KEYS):
        raise DataError(f"modalities: '{name}' has '{min(unknown)}', which is none of {', '.join(SOURCE_KEYS)}")
    missing = settings.get("missing") or missing
    if missing not in MISSING:
        raise SettingError(f"feature_missing must be one of {', '.join(MISSING)}, not {missing!r}")
    path = folder / settings["file"] if "file" in settings else item_file.path
    if "file" in settings and not path.is_file():
        raise DataError(f"{path} not found: put the '{name}' features there or take '{name}' out of 'modalities'")
    return _join(name, read_vectors(path, item_file, settings.get("ids"), settings.get("field")), token2id, missing)


def _join(name: str, vectors: Vectors, token2id: Mapping[str, int], missing: str) -> ItemFeatures:
    """Bring the rows into the order of the items; only rows that an item needs are read, a block at a time."""
    tokens, path = vectors.tokens, vectors.path
    ids = pd.Series(tokens, dtype=object).map(token2id).fillna(0).to_numpy(np.int64)
    known = ids > 0
    if not known.any():
        raise DataError(
            f"{path}: none of its {len(tokens)} items (such as '{tokens[0]}') is in the data set: check the tokens"
        )
    first = np.zeros(len(ids), dtype=bool)
    first[np.unique(ids, return_index=True)[1]] = True
    aligned = np.zeros((len(token2id), vectors.values.shape[1]), dtype=np.float32)
    bad: list[str] = []
    for rows, values in _blocks(vectors.values, np.flatnonzero(known & first)):
        bad += tokens[rows[~np.isfinite(values).all(axis=1)]].tolist()
        aligned[ids[rows]] = values
    if bad:
        raise DataError(
            f"{path}: NaN or infinite '{name}' features in {len(bad)} rows, first item '{bad[0]}': mend or drop them"
        )
    repeats = np.flatnonzero(known & ~first)
    for rows, values in _blocks(vectors.values, repeats):
        differ = (values != aligned[ids[rows]]).any(axis=1)
        if differ.any():
            token = tokens[rows[differ]][0]
            raise DataError(f"{path}: item '{token}' has more than one row in the '{name}' features, and they differ")
    mask = np.asarray(aligned.any(axis=1))
    if not mask.any():
        raise DataError(f"{path}: the '{name}' features of every item are zero")
    counts = {
        "rows of other items": (~known).sum(),
        "repeated rows": len(repeats),
        "rows of zeros": (known & first).sum() - mask.sum(),
    }
    notes = [f"{path.name} by {vectors.ids}", *(f"{count} {what}" for what, count in counts.items() if count)]
    return _fill(name, aligned, mask, missing, notes)


def _fill(name: str, values: np.ndarray, mask: np.ndarray, missing: str, notes: list[str]) -> ItemFeatures:
    """Give items outside the mask what ``missing`` says; log the modality."""
    absent = ~mask
    absent[0] = False  # the padding item
    n_items, n_present, n_absent = len(mask) - 1, mask.sum(), absent.sum()
    if n_absent:
        notes.append(f"{n_absent} items {MISSING[missing]}")
    share = f"{n_present} of {n_items} items ({n_present / n_items:.1%})"
    getLogger().info(f"modality {name}: dimension {values.shape[1]}, {share}; {'; '.join(notes)}")
    if missing == "mean":
        values[absent] = values.sum(axis=0, dtype=np.float64) / n_present
    if missing != "mask":
        mask |= absent
    return ItemFeatures(torch.from_numpy(values), torch.from_numpy(mask))


def _blocks(values: np.ndarray, rows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield ``rows`` in parts, each with its values in float32."""
    step = max(1, BLOCK // values.shape[1])
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        with np.errstate(over="ignore"):  # beyond float32: infinite, and named so
            yield part, values[part].astype(np.float32, copy=False)
