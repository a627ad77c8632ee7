"""One ranker for all models: scores in blocks of users, seen items masked, the first k items of each list kept.

RecBole's ``Trainer.evaluate`` stays in charge, so that any model and any of its trainers will do. Two of its parts are
replaced. Its loader puts each batch together user by user; :class:`BlockLoader` cuts it out of arrays. Its collector
makes several matrices of users times items per batch; :class:`TopkCollector` keeps the items of each list and which of
them are hits, ``[n_users, K]`` each, and of a block nothing but its scores and a mask of one byte per score.

A block has ``eval_batch_size`` scores. Equal scores stay in the order in which ``torch.topk`` leaves them, as in
RecBole: on the CPU that depends on a user's scores alone, not on the block.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import numpy as np
import torch
from recbole.data.dataloader import FullSortEvalDataLoader
from recbole.evaluator.collector import Collector, DataStruct
from recbole.trainer import Trainer
from recbole.utils import EvaluatorType, early_stopping
from torch import Tensor

from recbole_slifmr.data.history import History
from recbole_slifmr.training.memory import keep_freed_memory
from recbole_slifmr.training.metrics import replace_loops

LISTS = ("rec.items", "rec.topk")
AMONG = "rec.among"  # the lists of the candidates alone
FIRST_ROWS = 4096


class BlockLoader(FullSortEvalDataLoader):
    """The batches of a full-ranking loader, cut out of arrays.

    Args:
        loader: RecBole's full-ranking loader of a model that is not sequential; left as it is.

    Attributes:
        seen: what is never recommended to the user in row r of ``uid_list``.
        held_out: what should be recommended to that user.
    """

    def __init__(self, loader: FullSortEvalDataLoader) -> None:
        self.__dict__.update(loader.__dict__)
        self.source = loader.uid2history_item
        users = loader.uid_list.numpy()
        self.seen = History.of_rows(loader.uid2history_item[users])
        self.held_out = History.of_rows(loader.uid2positive_item[users])

    @classmethod
    def of(cls, loader: Any) -> Any:
        """Return the block loader of a full-ranking loader, made once; any other loader as it is."""
        if isinstance(loader, cls) or not isinstance(loader, FullSortEvalDataLoader) or loader.is_sequential:
            return loader
        blocks = vars(loader).get("_blocks")
        if blocks is None or blocks.source is not loader.uid2history_item:
            blocks = vars(loader)["_blocks"] = cls(loader)
        return blocks

    def __len__(self) -> int:
        """Return the number of blocks that this process ranks."""
        return math.ceil(len(self.sampler) / self.step)

    def __iter__(self) -> Iterator[Any]:
        """Yield users, (row, column) of seen items, rows and columns of held-out items; rows are those of the block."""
        rows = np.fromiter(self.sampler, dtype=np.int64)
        for start in range(0, len(rows), self.step):
            block = rows[start : start + self.step]
            seen, held_out = (tuple(map(torch.from_numpy, table.cells(block))) for table in (self.seen, self.held_out))
            yield self.user_df[block], seen, *held_out


class Rows:
    """A matrix that grows by rows, in a few large pieces of memory.

    Many small tensors, kept from block to block, would leave holes between the scores of the blocks: on 100,000 users x
    50,000 items these took more than a gigabyte.
    """

    def __init__(self) -> None:
        self._values: Tensor | None = None
        self._n_rows = 0

    def append(self, rows: Tensor) -> None:
        """Add ``rows [B, k]``; their number, type and device are those of the first."""
        n_rows = self._n_rows + len(rows)
        if self._values is None:
            self._values = rows.new_empty(max(n_rows, FIRST_ROWS), rows.shape[1])
        elif n_rows > len(self._values):
            self._values = torch.cat([self._values, self._values.new_empty(n_rows, rows.shape[1])])
        self._values[self._n_rows : n_rows] = rows
        self._n_rows = n_rows

    def all(self) -> Tensor:
        """Return all rows."""
        assert self._values is not None
        return self._values[: self._n_rows].clone()


class TopkCollector(Collector):
    """RecBole's collector without matrices of users times items.

    Metrics that need all scores (AUC, GAUC, losses) are collected by RecBole's own code.

    Args:
        config: RecBole's configuration.

    Attributes:
        candidates: item ids ``[C]``; their own ranking is collected as well, None for none.
        latest: what the last evaluation collected.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.candidates: Tensor | None = None
        self.latest: Any = None
        self.ranks = config["eval_type"] == EvaluatorType.RANKING
        self.lists_suffice = self.ranks and not self.register.need("rec.meanrank")
        if self.ranks:
            for key in LISTS:
                setattr(self.register, key, True)
        self.clear()

    @classmethod
    def of(cls, trainer: Any) -> TopkCollector:
        """Return the trainer's collector; if it is RecBole's, put one of this class in its place first."""
        if not isinstance(trainer.eval_collector, cls):
            collector = cls(trainer.config)
            collector.data_struct = trainer.eval_collector.data_struct
            trainer.eval_collector = collector
        return trainer.eval_collector

    def clear(self) -> None:
        """Forget what an evaluation that was not finished has left."""
        self._parts: defaultdict[str, Rows] = defaultdict(Rows)
        self._mask: Tensor | None = None

    def eval_batch_collect(
        self, scores_tensor: Tensor, interaction: Any, positive_u: Tensor, positive_i: Tensor
    ) -> None:
        """Collect the lists of a block.

        Args:
            scores_tensor: of all items, minus infinity where an item may not be recommended, ``[B, n_items]``.
            interaction: RecBole's batch.
            positive_u: row of each held-out item, ``[P]``.
            positive_i: id of each held-out item, ``[P]``; one that occurs twice in a row counts once.
        """
        if self.ranks and (self.lists_suffice or self.candidates is not None):
            device, n_items = scores_tensor.device, scores_tensor.shape[1]
            pairs = torch.unique(positive_u.to(device) * n_items + positive_i.to(device))
            held_out = (pairs // n_items, pairs % n_items)
            if self.candidates is not None:
                self._keep(AMONG, *self._lists(scores_tensor, held_out, self.candidates.to(device))[1:])
            if self.lists_suffice:
                items, hits, n_held_out = self._lists(scores_tensor, held_out)
                self._parts["rec.items"].append(items)
                self._keep("rec.topk", hits, n_held_out)
        if not self.lists_suffice:
            super().eval_batch_collect(scores_tensor, interaction, positive_u, positive_i)

    def _keep(self, key: str, hits: Tensor, n_held_out: Tensor) -> None:
        """Keep hits and, in a last column, the number of held-out items, as RecBole's metrics read them."""
        self._parts[key].append(torch.cat([hits.int(), n_held_out.int().unsqueeze(1)], dim=1))

    def _lists(
        self, scores: Tensor, held_out: tuple[Tensor, Tensor], candidates: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rank all items, or the candidates alone.

        Returns:
            item ids ``[B, k]``, which of them are held out ``[B, k]``, how many are held out at all ``[B]``.
        """
        k = max(self.topk)
        rows, columns = held_out
        if candidates is None:
            items = scores.topk(k, dim=1).indices
        else:
            items = candidates[scores[:, candidates].topk(min(k, len(candidates)), dim=1).indices]
            among = torch.isin(columns, candidates)
            rows, columns = rows[among], columns[among]
        if self._mask is None or self._mask.shape[0] < len(scores):
            self._mask = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
        self._mask[rows, columns] = True
        hits = self._mask[: len(scores)].gather(1, items)
        self._mask[rows, columns] = False
        return items, hits, torch.bincount(rows, minlength=len(scores))

    def get_data_struct(self) -> DataStruct:
        """Return what was collected, in several processes that of all, and begin anew."""
        for key, rows in self._parts.items():
            self.data_struct.set(key, rows.all())
        self.clear()
        self.latest = super().get_data_struct()
        if AMONG in self.data_struct:  # RecBole removes its own
            del self.data_struct[AMONG]
        return self.latest


class RankingTrainer(Trainer):
    """RecBole's trainer with the ranker of this module; goes before any of its trainers as a base class.

    A validation computes ``valid_metric`` at every cut-off and nothing else. The other metrics are computed once for
    the best epoch, from the lists that were kept of it, and are in what ``fit`` returns.

    Args:
        config: RecBole's configuration.
        model: the model.

    Attributes:
        validation_seconds: that the validations of the last ``fit`` took.
    """

    eval_collector: TopkCollector
    best_valid_result: dict[str, float] | None

    def __init__(self, config: Any, model: Any) -> None:
        super().__init__(config, model)
        self.eval_collector = TopkCollector(config)
        replace_loops(self.evaluator)
        self._best_lists: DataStruct | None = None
        self._best_result: dict[str, float] | None = None
        self.validation_seconds = 0.0

    def fit(
        self, train_data: Any, valid_data: Any = None, *, saved: bool = True, **kwargs: Any
    ) -> tuple[float, dict[str, float] | None]:
        """Train as RecBole's ``fit`` does; the result of the best epoch has all metrics."""
        self._best_lists, self._best_result, self.validation_seconds = None, None, 0.0
        if self.device.type == "cpu":
            keep_freed_memory()
        score, result = super().fit(train_data, valid_data, saved=saved, **kwargs)
        if result:
            result = self.best_valid_result = self.best_result()
        return score, result

    def best_result(self) -> dict[str, float] | None:
        """Return all metrics of the best epoch so far, in a resumed run perhaps that of the checkpoint; None before."""
        if self._best_lists is not None:
            return self.evaluator.evaluate(self._best_lists)
        return self.best_valid_result if self._best_result is None else self._best_result

    def evaluate(self, eval_data: Any, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate as RecBole's ``evaluate`` does."""
        self.eval_collector.clear()
        return super().evaluate(BlockLoader.of(eval_data), *args, **kwargs)

    def _valid_epoch(self, valid_data: Any, *args: Any, **kwargs: Any) -> tuple[float, dict[str, float]]:
        start = perf_counter()
        with self._only(self.valid_metric.partition("@")[0]):
            score, result = super()._valid_epoch(valid_data, *args, **kwargs)
        self.validation_seconds += perf_counter() - start
        *_, is_better = early_stopping(score, self.best_valid_score, 0, 0, self.valid_metric_bigger)
        if is_better:
            self._best_lists = self.eval_collector.latest if self.eval_collector.lists_suffice else None
            self._best_result = result
        return score, result

    @contextmanager
    def _only(self, metric: str) -> Iterator[None]:
        """Compute no other metric, unless some need more than lists."""
        every = self.evaluator.metrics
        if self.eval_collector.lists_suffice:
            self.evaluator.metrics = [metric]
        try:
            yield
        finally:
            self.evaluator.metrics = every


def with_ranking(trainer_class: type) -> type:
    """Return a trainer of RecBole with the ranker of this module; one that is not based on its ``Trainer`` as it is."""
    if not issubclass(trainer_class, Trainer) or issubclass(trainer_class, RankingTrainer):
        return trainer_class
    return type(trainer_class.__name__, (RankingTrainer, trainer_class), {})
