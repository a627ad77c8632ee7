"""Data that several runs read: read and split once, then handed to their processes as bytes.

What is handed on is the data set and its splits before RecBole's loaders are made: those depend on the settings of each
run, such as its seed and batch sizes. The bytes go through a pipe or Ray's object store to processes of the same
program, never into a file.
"""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Mapping
from typing import Any, NamedTuple

import recbole.data.dataset
import torch
from recbole.utils.argument_list import dataset_arguments

from recbole_slifmr.data.dataset import SLIFMRDataset
from recbole_slifmr.data.noise import read_noise

# Settings that RecBole's data sets read beside its own list ``dataset_arguments``, to which the plugin adds.
READ = ("dataset", "encoding", "discretization", "numerical_features", "entity_kg_num_interval",
        "relation_kg_num_interval", "kg_reverse_r", "local_rank", "reproducibility")  # fmt: skip
STORED = ("save_dataset", "dataset_save_path", "save_dataloaders", "dataloaders_save_path")


class Splits(NamedTuple):
    """A data set and its parts for training, validation and test."""

    dataset: Any
    parts: list[Any]

    def adopt(self, config: Any) -> Splits:
        """Have all of them look up their settings in ``config``, and the data set give these parts when split."""
        for data in (self.dataset, *self.parts):
            data.config = config
        self.dataset.build = lambda: self.parts
        return self


class SharedData(NamedTuple):
    """Splits as bytes, and the hash of every file that they were read from.

    Attributes:
        content: the splits, pickled.
        hashes: by file, see :func:`~recbole_slifmr.study.identity.input_hashes`.
    """

    content: bytes
    hashes: Mapping[str, str]

    def read(self, hashes: Mapping[str, str]) -> Splits | None:
        """Return the splits; None if a file is no longer what it was when they were read.

        Args:
            hashes: of all that the run reads, as it is now. Another model has another file of defaults, which does not
                count; the files of the data set have names without a folder.
        """
        for name, value in self.hashes.items():
            if hashes.get(name, value if "/" in name else None) != value:
                return None
        return pickle.loads(self.content)


def data_key(config: Any, split_seed: int) -> str | None:
    """Return what the splits depend on, as text: runs with the same read the same data.

    Args:
        config: RecBole's configuration.
        split_seed: seed of a random split.

    Returns:
        the text, or None if the data cannot be shared: they are of another data set class, or RecBole is to store them.
    """
    kind = getattr(recbole.data.dataset, f"{config['model']}Dataset", None)
    if kind is not SLIFMRDataset or any(config[name] for name in STORED):
        return None
    settings = {name: config[name] for name in sorted({*dataset_arguments, *READ})}
    noise = read_noise(config)
    return json.dumps([settings, split_seed, noise.levels, noise.seed if noise.levels else None], default=str)


def pack_splits(splits: Splits) -> bytes:
    """Pickle the splits without the settings, which each run has of its own."""
    kept = [data.config for data in (splits.dataset, *splits.parts)]
    try:
        splits.adopt(None)
        del splits.dataset.build  # a function of this process
        return pack(splits)
    finally:
        for data, config in zip((splits.dataset, *splits.parts), kept, strict=True):
            data.config = config


def pack(data: Any) -> bytes:
    """Pickle data sets or loaders for other processes; read back with ``pickle.loads``."""
    file = io.BytesIO()
    _Pickler(file, protocol=5).dump(data)
    return file.getvalue()


class _Pickler(pickle.Pickler):
    """Pickles tensors as arrays, several times as fast as torch does: a loader holds two tensors per user."""

    def reducer_override(self, value: Any) -> Any:
        if type(value) is torch.Tensor and value.layout is torch.strided:
            return torch.from_numpy, (value.numpy(),)
        return NotImplemented
