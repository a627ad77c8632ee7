r"""Scores of a trained model user by user, and by the popularity of items and the activity of users.

RecBole ranks and computes its metrics; this module keeps what it computes before the mean. The scores of a group of
items g count only that group's items, at their ranks in the whole list:
:math:`\mathrm{Recall}_g@k = |T_u \cap g \cap L_k| / |T_u \cap g|`, NDCG likewise, mean over the users with
:math:`T_u \cap g \neq \emptyset` (``T_u`` the user's held-out items, ``L_k`` the first k of the list).

With ``cold_items`` the items with and without training interactions are two more groups, ``warm`` and ``cold``; for
``among_cold`` the list holds cold items only.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from logging import getLogger
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from recbole.evaluator.base_metric import TopkMetric
from torch import Tensor

from recbole_slifmr.data.cold import can_score_cold, is_cold
from recbole_slifmr.data.history import History
from recbole_slifmr.training.metrics import replace_loops
from recbole_slifmr.training.ranking import AMONG, BlockLoader, TopkCollector

ITEM_GROUPS = {"head": 0.2, "middle": 0.5, "tail": 1.0}  # up to this share of the items, by falling popularity
USER_GROUPS = {"active": 1 / 3, "average": 2 / 3, "quiet": 1.0}  # likewise of the users, by falling activity
MASKS = ("train_valid", "train")


class Evaluation(NamedTuple):
    """What an evaluation gave.

    Attributes:
        metrics: RecBole's metrics by name, and ``recall@k`` and ``ndcg@k`` by group, as in ``recall@20/tail``.
        per_user: one row per user token, a column per top-k metric and cut-off.
    """

    metrics: dict[str, float]
    per_user: pd.DataFrame

    @property
    def n_users(self) -> int:
        """How many users were scored: those with held-out items."""
        return len(self.per_user)


def mask_training_items_only(test_data: Any, train_data: Any) -> None:
    """Let validation items be recommended at test time, as MMRec does; RecBole leaves them out.

    Args:
        test_data: RecBole's full-ranking loader of the test split, changed in place.
        train_data: the loader of the training split.
    """
    train, n_items = train_data._dataset, train_data._dataset.item_num
    users, items = (train.inter_feat[field].numpy() for field in (test_data.uid_field, test_data.iid_field))
    scored = test_data.uid_list.numpy()
    rows, held_out = BlockLoader.of(test_data).held_out.cells(np.arange(len(scored)))
    seen = np.setdiff1d(users.astype(np.int64) * n_items + items, scored[rows] * n_items + held_out)
    history = History.of(seen // n_items, seen % n_items, train.user_num, n_items)
    test_data.uid2history_item = test_data.uid2history_item.copy()
    test_data.uid2history_item[scored] = _as_objects(history.rows())[scored]


def _as_objects(rows: Sequence[Tensor]) -> np.ndarray:
    objects = np.empty(len(rows), dtype=object)
    objects[:] = rows
    return objects


def evaluate(trainer: Any, data: Any, train_data: Any, checkpoint: str | None = None) -> Evaluation:
    """Rank all items for every user of a split; see the module for the groups.

    Args:
        trainer: RecBole's trainer with a trained model.
        data: full-ranking loader of the split to score.
        train_data: the loader of the training split, which defines popularity and activity.
        checkpoint: the file to score; the trainer's own best epoch if None.

    Returns:
        metrics and the table of users.
    """
    dataset, topk = train_data._dataset, trainer.config["topk"]
    cold = is_cold(dataset) if trainer.config["cold_items"] else None
    collector = TopkCollector.of(trainer)
    replace_loops(trainer.evaluator)
    collector.candidates = None if cold is None else cold.nonzero().squeeze(1)
    loader = BlockLoader.of(data)
    try:
        metrics = trainer.evaluate(loader, load_best_model=True, model_file=checkpoint, show_progress=False)
    finally:
        collector.candidates = None
    struct = collector.latest
    users = loader.uid_list.numpy()
    per_user = _per_user(trainer, struct)
    per_user.insert(0, "user", dataset.field2id_token[dataset.uid_field][users])
    items, hits = struct.get("rec.items").numpy(), struct.get("rec.topk").numpy()[:, :-1].astype(bool)
    held_out = loader.held_out.cells(np.arange(len(users)))
    groups = {
        **_by_item_group(items, hits, held_out, item_groups(dataset), ITEM_GROUPS, topk),
        **_by_user_group(per_user, users, dataset),
    }
    if cold is not None:
        groups |= _by_item_group(items, hits, held_out, cold.numpy(), ("warm", "cold"), topk)
        among = struct.get(AMONG).numpy()
        groups |= _scores(among[:, :-1].astype(bool), among[:, -1], topk, "among_cold")
        possible, reason = can_score_cold(trainer.config)
        if not possible:
            getLogger().warning(f"{reason}: no scores of cold items")
            groups |= {name: float("nan") for name in groups if name.endswith(("/cold", "/among_cold"))}
    return Evaluation({**metrics, **groups}, per_user.set_index("user"))


def _per_user(trainer: Any, struct: Any) -> pd.DataFrame:
    columns = {}
    for name, metric in trainer.evaluator.metric_class.items():
        if isinstance(metric, TopkMetric):
            info = metric.used_info(struct)
            wanted = len(inspect.signature(metric.metric_info).parameters)
            values = metric.metric_info(*info[:wanted])
            columns.update({f"{name}@{k}": values[:, k - 1] for k in metric.topk})
    return pd.DataFrame(columns)


def _ranks(counts: np.ndarray, groups: dict[str, float]) -> np.ndarray:
    """Return the number of the group of each entry, by falling count; ties by position."""
    order = np.argsort(-counts, kind="stable")
    place = np.empty(len(counts), dtype=np.int64)
    place[order] = np.arange(len(counts))
    return np.searchsorted(np.array(list(groups.values())), (place + 1) / len(counts) - 1e-9)


def item_groups(dataset: Any) -> np.ndarray:
    """Return the number of the popularity group of every item, ``[n_items]``; -1 for the padding item."""
    counts = np.bincount(dataset.inter_feat[dataset.iid_field].numpy(), minlength=dataset.item_num)
    return np.concatenate([[-1], _ranks(counts[1:], ITEM_GROUPS)])


def _by_item_group(
    items: np.ndarray,
    hits: np.ndarray,
    held_out: tuple[np.ndarray, np.ndarray],
    group: np.ndarray,
    names: Iterable[str],
    topk: list[int],
) -> dict[str, float]:
    """Return the scores of each group of items.

    Args:
        items: of each list, ``[B, K]``.
        hits: which of them are held out, ``[B, K]``.
        held_out: row and id of each held-out item, ``[P]`` each.
        group: number of the group of every item, ``[n_items]``.
        names: of the groups, in the order of their numbers.
        topk: cut-offs.
    """
    rows, wanted = held_out
    scores = {}
    for number, name in enumerate(names):
        n_held_out = np.bincount(rows[group[wanted] == number], minlength=len(items))
        scores.update(_scores(hits & (group[items] == number), n_held_out, topk, name))
    return scores


def _scores(hits: np.ndarray, n_positive: np.ndarray, topk: list[int], name: str) -> dict[str, float]:
    """Return recall and NDCG of a group at each cut-off from its hits ``[B, K]`` and held-out items ``[B]``."""
    some = n_positive > 0
    if not some.any():
        return {f"{metric}@{k}/{name}": float("nan") for k in topk for metric in ("recall", "ndcg")}
    discount = 1 / np.log2(np.arange(2, max(topk) + 2))
    ideal = np.concatenate([[0.0], np.cumsum(discount)])
    scores = {}
    for k in topk:
        found, n = hits[some, :k], n_positive[some]
        scores[f"recall@{k}/{name}"] = float((found.sum(1) / n).mean())
        gain = (found * discount[: found.shape[1]]).sum(1) / ideal[np.minimum(n, k)]
        scores[f"ndcg@{k}/{name}"] = float(gain.mean())
    return scores


def _by_user_group(per_user: pd.DataFrame, users: np.ndarray, dataset: Any) -> dict[str, float]:
    counts = np.bincount(dataset.inter_feat[dataset.uid_field].numpy(), minlength=dataset.user_num)
    group = _ranks(counts[users], USER_GROUPS)
    columns = [column for column in per_user if column.startswith(("recall@", "ndcg@"))]
    return {
        f"{column}/{name}": float(per_user.loc[group == number, column].mean())
        for number, name in enumerate(USER_GROUPS)
        for column in columns
    }
