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
from collections.abc import Iterable
from logging import getLogger
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from recbole.evaluator.base_metric import TopkMetric
from torch import Tensor

from recbole_slifmr.data.cold import can_score_cold, is_cold

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


def mask_training_items_only(test_data: Any, train_data: Any) -> None:
    """Let validation items be recommended at test time, as MMRec does; RecBole leaves them out.

    Args:
        test_data: RecBole's full-ranking loader of the test split, changed in place.
        train_data: the loader of the training split.
    """
    users = train_data._dataset.inter_feat[test_data.uid_field].numpy()
    items = train_data._dataset.inter_feat[test_data.iid_field].numpy()
    order = np.argsort(users, kind="stable")
    bounds = np.searchsorted(users[order], np.arange(len(test_data.uid2history_item) + 1))
    items = items[order]
    for user in test_data.uid_list.tolist():
        seen = np.setdiff1d(items[bounds[user] : bounds[user + 1]], test_data.uid2positive_item[user].numpy())
        test_data.uid2history_item[user] = torch.from_numpy(seen)


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
    captured: dict[str, Any] = {}
    dataset = train_data._dataset
    cold = is_cold(dataset) if trainer.config["cold_items"] else None
    among: list[tuple[Tensor, Tensor]] = []
    collector = trainer.eval_collector
    original, need = collector.get_data_struct, collector.register.need
    collect = collector.eval_batch_collect

    def get_data_struct() -> Any:
        captured["struct"] = original()
        return captured["struct"]

    def eval_batch_collect(scores: Tensor, batch: Any, users: Tensor, items: Tensor) -> None:
        collect(scores, batch, users, items)
        if cold is not None:
            among.append(_hits_among(cold.nonzero().squeeze(1), scores, users, items, max(trainer.config["topk"])))

    collector.get_data_struct, collector.eval_batch_collect = get_data_struct, eval_batch_collect
    collector.register.need = lambda key: key in ("rec.items", "rec.topk") or need(key)
    try:
        metrics = trainer.evaluate(data, load_best_model=True, model_file=checkpoint, show_progress=False)
    finally:
        collector.get_data_struct, collector.register.need = original, need
        collector.eval_batch_collect = collect
    struct = captured["struct"]
    users = data.uid_list.numpy()
    per_user = _per_user(trainer, struct)
    per_user.insert(0, "user", dataset.field2id_token[dataset.uid_field][users])
    ranked, hits = struct.get("rec.items").numpy(), struct.get("rec.topk").numpy()[:, :-1].astype(bool)
    topk = trainer.config["topk"]
    groups = {
        **_by_item_group(ranked, hits, data, item_groups(dataset), ITEM_GROUPS, topk),
        **_by_user_group(per_user, users, dataset),
    }
    if cold is not None:
        groups |= _by_item_group(ranked, hits, data, cold.numpy(), ("warm", "cold"), topk)
        found, wanted = (torch.cat(batches).numpy() for batches in zip(*among, strict=True))
        groups |= _scores(found, wanted, topk, "among_cold")
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
    ranked: np.ndarray, hits: np.ndarray, data: Any, group: np.ndarray, names: Iterable[str], topk: list[int]
) -> dict[str, float]:
    positives = [group[data.uid2positive_item[user].numpy()] for user in data.uid_list.tolist()]
    scores = {}
    for number, name in enumerate(names):
        n_positive = np.array([(row == number).sum() for row in positives])
        scores.update(_scores(hits & (group[ranked] == number), n_positive, topk, name))
    return scores


def _hits_among(candidates: Tensor, scores: Tensor, users: Tensor, items: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Rank the candidates alone.

    Args:
        candidates: item ids, ``[C]``.
        scores: of all items, ``[B, n_items]``.
        users: row of each held-out item, ``[P]``.
        items: id of each held-out item, ``[P]``.
        k: length of the list.

    Returns:
        which places of the list are hits, ``[B, min(k, C)]`` bool, and how many candidates are held out, ``[B]``.
    """
    held_out = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    held_out[users, items] = True
    candidates = candidates.to(scores.device)
    held_out = held_out[:, candidates]
    first = scores[:, candidates].topk(min(k, len(candidates)), dim=1).indices
    return held_out.gather(1, first).cpu(), held_out.sum(1).cpu()


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
