"""Checkpoints: read without running code, and matched with the data that the model was trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from recbole.config import Config

from recbole_slifmr.errors import DataError, SettingError
from recbole_slifmr.host.stored import read_stored


def read_checkpoint(path: str | Path, map_location: Any = "cpu") -> dict[str, Any]:
    """Read a checkpoint; a file that asks for more than data is refused before anything of it runs.

    Args:
        path: the file.
        map_location: where its tensors go, as in ``torch.load``.

    Raises:
        SettingError: if the file is missing, damaged or no checkpoint.
    """
    state = read_stored(path, map_location)
    config = state.get("config") if isinstance(state, dict) else None
    settings = vars(config).get("final_config_dict") if isinstance(config, Config) else None
    if not isinstance(settings, dict) or not isinstance(state.get("state_dict"), Mapping):
        raise SettingError(f"{path} is no checkpoint of a model: it lacks settings or parameters")
    named = all(isinstance(settings.get(name), str) for name in ("model", "dataset", "data_path"))
    if not named or not settings["model"].isidentifier():
        raise SettingError(f"{path} is no checkpoint of a model: its settings name no model or data set")
    record = state.get("data") or {"hashes": {}, "split_seed": 0}
    known = isinstance(record, dict) and isinstance(record.get("hashes"), dict)
    if not known or not isinstance(record.get("split_seed"), int):
        raise SettingError(f"{path} is no checkpoint of a model: what it says of its data cannot be read")
    return state


def check_optimizer(path: str | Path, optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimiser whose state, from a checkpoint, is not in the shapes of the parameters.

    The fused optimisers write into it without looking.

    Raises:
        SettingError: naming the checkpoint.
    """
    for parameter, state in optimizer.state.items():
        tensors = (value for value in state.values() if isinstance(value, torch.Tensor))
        if any(value.numel() != 1 and value.shape != parameter.shape for value in tensors):
            raise SettingError(f"{path} holds the state of an optimiser for parameters of other shapes")


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
