"""Checkpoints: read without running code, and matched with the data that the model was trained on."""

from __future__ import annotations

import hashlib
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from recbole.config import Config

from recbole_slifmr.errors import DataError, SettingError


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU; a file that asks for more than data is refused before anything of it runs.

    Raises:
        SettingError: if the file is missing, damaged or no checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise SettingError(f"checkpoint {path} not found")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch says of a file it then refuses
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged or hostile file makes torch raise
        raise SettingError(f"{path} cannot be read as a checkpoint: {_reason(path, error)}") from error
    config = state.get("config") if isinstance(state, dict) else None
    settings = vars(config).get("final_config_dict") if isinstance(config, Config) else None
    if not isinstance(settings, dict) or not isinstance(state.get("state_dict"), Mapping):
        raise SettingError(f"{path} is no checkpoint of a model: it lacks settings or parameters")
    if not all(isinstance(settings.get(name), str) for name in ("model", "dataset", "data_path")):
        raise SettingError(f"{path} is no checkpoint of a model: its settings name no model or data set")
    record = state.get("data") or {"hashes": {}, "split_seed": 0}
    known = isinstance(record, dict) and isinstance(record.get("hashes"), dict)
    if not known or not isinstance(record.get("split_seed"), int):
        raise SettingError(f"{path} is no checkpoint of a model: what it says of its data cannot be read")
    return state


def _reason(path: Path, error: Exception) -> str:
    """Say in one line why torch refused a file."""
    if isinstance(error, PermissionError):
        return str(error.strerror)
    if refused := re.search(r"GLOBAL (\S+)", str(error)):
        return f"it asks for {refused[1]}, which no checkpoint needs; nothing of it was run"
    if zipfile.is_zipfile(path) and "Unsupported operand" in str(error):
        return "it is pickled in a way that torch does not read safely, as RecBole without this package does"
    return "it is damaged, cut short or no file of torch's"


def data_record(dataset: Any, split_seed: int) -> dict[str, Any]:
    """Return what a checkpoint keeps of the data: the seed of a random split, and hashes of all that ids depend on.

    Args:
        dataset: the training split.
        split_seed: seed of a random split.

    Returns:
        ``split_seed`` and ``hashes``, a hash by name: tokens in the order of their ids, training interactions, triples,
        the features of each modality.
    """
    uid_field, iid_field = dataset.uid_field, dataset.iid_field
    pairs = dataset.inter_feat[uid_field].numpy().astype(np.int64) * dataset.item_num
    pairs += dataset.inter_feat[iid_field].numpy()
    hashes = {
        "user tokens": _hash(dataset.field2id_token[uid_field]),
        "item tokens": _hash(dataset.field2id_token[iid_field]),
        "training interactions": _hash(np.sort(pairs)),
    }
    if len(getattr(dataset, "triples", ())):
        hashes["entity tokens"] = _hash(dataset.field2id_token[dataset.entity_field])
        hashes["relation tokens"] = _hash(dataset.field2id_token[dataset.relation_field])
        hashes["triples"] = _hash(dataset.triples.numpy())
    for name, features in getattr(dataset, "item_features", {}).items():
        hashes[f"features '{name}'"] = _hash(features.values.numpy(), features.mask.numpy())
    return {"split_seed": int(split_seed), "hashes": hashes}


def _hash(*arrays: np.ndarray) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for array in arrays:
        is_text = array.dtype.kind in "OU"
        digest.update("\n".join(map(str, array)).encode() if is_text else np.ascontiguousarray(array).data)
    return digest.hexdigest()


def check_data(path: str | Path, state: Mapping[str, Any], dataset: Any) -> None:
    """Refuse data that differ from what a checkpoint was trained on, if it says what that was.

    Args:
        path: of the checkpoint.
        state: what :func:`read_checkpoint` gave.
        dataset: the training split.

    Raises:
        DataError: naming what differs.
    """
    record = state.get("data")
    if record is None:
        return
    now = data_record(dataset, record["split_seed"])["hashes"]
    differing = [name for name in {**record["hashes"], **now} if record["hashes"].get(name) != now.get(name)]
    if differing:
        raise DataError(
            f"{path} was trained on other data than {dataset.dataset_path} gives: {', '.join(differing)} "
            f"{'differ' if len(differing) > 1 or differing[0][-1] == 's' else 'differs'}; "
            "name the data it was trained on with --data_path and --dataset"
        )
