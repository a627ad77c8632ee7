"""The data of the runs of a study: read and checked once, kept for the processes that train on them."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

from recbole.data.dataloader import FullSortEvalDataLoader
from recbole.data.utils import get_dataloader

from recbole_slifmr.host.settings import make_config
from recbole_slifmr.study.task import Task
from recbole_slifmr.training.experiment import load_data, read_splits
from recbole_slifmr.training.fingerprint import fingerprint, input_fingerprints
from recbole_slifmr.training.shared import SharedData, Splits, data_key, pack_splits

LARGEST = 2**30  # bytes kept; a run whose data are not among them reads its own
LOADERS = ("train_neg_sample_args", "valid_neg_sample_args", "test_neg_sample_args", "eval_args", "repeatable", "topk")


class Seen(NamedTuple):
    """What was found out about the data of a run.

    Attributes:
        train: the training split.
        fingerprints: hash of each split.
        inputs: hash of the knowledge graph and of the features of each modality.
        ranks_all: whether all items are ranked at test time.
    """

    train: Any
    fingerprints: dict[str, str]
    inputs: dict[str, str]
    ranks_all: bool


class DataStore:
    """Data sets by what they depend on; without any, each run reads its own."""

    def __init__(self) -> None:
        self._shared: dict[str, SharedData] = {}
        self._hashes: dict[str, tuple[dict[str, str], dict[str, str]]] = {}
        self._loaders: dict[tuple[str, str], bool] = {}
        self._latest: tuple[str, Splits] | None = None

    def see(self, task: Task, config: Any, tell: Callable[[str], None] = lambda words: None) -> Seen:
        """Read the data of a run unless one before it has, make loaders if it asks for others, return what they are.

        Args:
            task: the run.
            config: its configuration.
            tell: called with what is being done.

        Raises:
            DataError, SettingError: for data or settings that cannot be used.
        """
        key = data_key(config, task.split_seed)
        if key is None:
            tell(f"reading the data of {task.title}")
            loaders = load_data(config, task.split_seed)
            hashes = _fingerprints(loaders), input_fingerprints(loaders[0]._dataset)
            return Seen(loaders[0]._dataset, *hashes, isinstance(loaders[2], FullSortEvalDataLoader))
        splits = self._splits(key, task, config, tell)
        asked = _loader_kinds(config)
        if (key, asked) not in self._loaders:
            loaders = load_data(config, task.split_seed, splits)
            self._hashes[key] = _fingerprints(loaders), input_fingerprints(splits.parts[0])
            self._loaders[key, asked] = isinstance(loaders[2], FullSortEvalDataLoader)
        return Seen(splits.parts[0], *self._hashes[key], self._loaders[key, asked])

    def of(self, task: Task) -> SharedData | None:
        """Return the data of a run, None if they were not read or not kept."""
        if not self._shared:
            return None
        return self._shared.get(data_key(make_config(**task.arguments), task.split_seed) or "")

    def forget(self) -> None:
        """Keep the data as bytes only."""
        self._latest = None

    def _splits(self, key: str, task: Task, config: Any, tell: Callable[[str], None]) -> Splits:
        """Return the splits, from the run before, from the bytes kept or from the files."""
        if self._latest is not None and self._latest[0] == key:
            return self._latest[1].adopt(config)
        self._latest = None
        if key in self._shared:
            splits = pickle.loads(self._shared[key].content)
        else:
            tell(f"reading the data of {task.title}")
            hashes = task.input_hashes()
            splits = read_splits(config, task.split_seed)
            content = pack_splits(splits)
            if sum(len(shared.content) for shared in self._shared.values()) + len(content) <= LARGEST:
                self._shared[key] = SharedData(content, hashes)
        self._latest = (key, splits)
        return splits.adopt(config)


def _loader_kinds(config: Any) -> str:
    """Return what the loaders depend on beside the splits, as far as it can be wrong."""
    kinds = [get_dataloader(config, phase).__name__ for phase in ("train", "valid", "test")]
    return str([kinds, *(config[name] for name in LOADERS)])


def _fingerprints(loaders: tuple[Any, Any, Any]) -> dict[str, str]:
    return {name: fingerprint(loader) for name, loader in zip(("train", "valid", "test"), loaders, strict=True)}
