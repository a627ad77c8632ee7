"""Metrics of a trained model on held-out interactions that were not part of its data set's splits."""

from __future__ import annotations

import numpy as np
import torch
from recbole.evaluator import Evaluator
from recbole.evaluator.collector import DataStruct

from recbole_slifmr.data.history import History
from recbole_slifmr.errors import DataError, SettingError
from recbole_slifmr.serve.recommend import rank_items
from recbole_slifmr.serve.trained import Trained
from recbole_slifmr.training.metrics import replace_loops

OF_HITS = ("recall", "ndcg", "mrr", "map", "hit", "precision")  # metrics that need nothing but hits


def evaluate(trained: Trained, users: np.ndarray, items: np.ndarray) -> dict[str, float]:
    """Rank all items for every user of the held-out interactions, apart from the user's other interactions.

    Pairs of the training split are left out.

    Args:
        trained: the model.
        users: user id of each held-out interaction, ``[P]``.
        items: item id of each held-out interaction, ``[P]``.

    Returns:
        the metrics of the setting ``metrics`` at ``topk``, as RecBole computes them.

    Raises:
        DataError: if nothing is held out.
        SettingError: for metrics that need more than hits.
    """
    others = [name for name in trained.config["metrics"] if name.lower() not in OF_HITS]
    if others:
        raise SettingError(f"metrics: {others[0]} is not computed on a frame, only {', '.join(OF_HITS)}")
    n_items, data = trained.n_items, trained.dataset
    learned = data.inter_feat[data.uid_field].numpy() * n_items + data.inter_feat[data.iid_field].numpy()
    held_out = np.setdiff1d(users * n_items + items, learned)
    if len(held_out) == 0:
        raise DataError("test has nothing but pairs of the training split: give held-out interactions")
    seen = np.repeat(np.arange(trained.n_users), np.diff(trained.seen.bounds)) * n_items + trained.seen.items
    seen = np.setdiff1d(seen, held_out)
    known = History.of(seen // n_items, seen % n_items, trained.n_users, n_items)
    scored, counts = np.unique(held_out // n_items, return_counts=True)
    rankings = rank_items(trained.scores, scored, max(trained.config["topk"]), n_items, known)
    hits = np.concatenate([np.isin(best.users[:, None] * n_items + best.items, held_out) for best in rankings])
    lists, evaluator = DataStruct(), Evaluator(trained.config)
    replace_loops(evaluator)
    lists.set("rec.topk", torch.from_numpy(np.column_stack([hits, counts]).astype(np.int32)))
    return {name: float(value) for name, value in evaluator.evaluate(lists).items()}
