"""RecBole's ranking metrics without its loops over users and items.

The formulas are RecBole's (``evaluator/metrics.py``), and so are the values. Its NDCG, MRR and MAP go over the users in
Python, its AveragePopularity and TailPercentage over every place of every list, the latter searching a Python list each
time; here each is a few operations on whole arrays. Recall, Hit and Precision have no loops and stay RecBole's.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from recbole.evaluator import metrics

Counts = dict[int, int]  # training interactions by item id; items without any are not in it


class MRR(metrics.MRR):
    """Mean reciprocal rank."""

    def metric_info(self, pos_index: np.ndarray) -> np.ndarray:
        """Return the reciprocal rank at every cut-off, ``[n_users, K]``, from hits of that shape."""
        first = pos_index.argmax(axis=1)
        found = np.cumsum(pos_index, axis=1) > 0
        return np.where(found, (1 / (first + 1))[:, None], 0.0)


class MAP(metrics.MAP):
    """Mean average precision."""

    def metric_info(self, pos_index: np.ndarray, pos_len: np.ndarray) -> np.ndarray:
        """Return average precision at every cut-off, ``[n_users, K]``, from hits and held-out items ``[n_users]``."""
        places = np.arange(1, pos_index.shape[1] + 1)
        precision = pos_index.cumsum(axis=1) / places
        return np.cumsum(precision * pos_index, axis=1) / np.minimum(places, np.maximum(pos_len, 1)[:, None])


class NDCG(metrics.NDCG):
    """Normalised discounted cumulative gain."""

    def metric_info(self, pos_index: np.ndarray, pos_len: np.ndarray) -> np.ndarray:
        """Return NDCG at every cut-off, ``[n_users, K]``, from hits and held-out items ``[n_users]``."""
        places = np.arange(pos_index.shape[1])
        discount = 1 / np.log2(places + 2.0)
        ideal = np.cumsum(discount)[np.minimum(places, np.maximum(pos_len, 1)[:, None] - 1)]
        return np.cumsum(pos_index * discount, axis=1) / ideal


class ItemCoverage(metrics.ItemCoverage):
    """Share of the items that are in at least one list."""

    def get_coverage(self, item_matrix: np.ndarray, num_items: int) -> float:
        """Return the share from the lists ``[n_users, k]``."""
        return np.count_nonzero(np.bincount(item_matrix.ravel())) / num_items


class AveragePopularity(metrics.AveragePopularity):
    """Mean number of training interactions of the items in the lists."""

    def get_pop(self, item_matrix: np.ndarray, item_count: Counts) -> np.ndarray:
        """Return the interactions of each item in the lists, ``[n_users, K]``."""
        return by_item(item_count, item_matrix)[item_matrix]


class ShannonEntropy(metrics.ShannonEntropy):
    """Entropy of the items in the lists, over their number."""

    def get_entropy(self, item_matrix: np.ndarray) -> float:
        """Return the entropy of the lists ``[n_users, k]``."""
        share = occurrences(item_matrix) / item_matrix.size
        return float(-(share * np.log(share)).sum() / len(share))


class GiniIndex(metrics.GiniIndex):
    """Inequality of how often items are in the lists."""

    def get_gini(self, item_matrix: np.ndarray, num_items: int) -> float:
        """Return the index of the lists ``[n_users, k]``."""
        count = np.sort(occurrences(item_matrix))
        place = np.arange(num_items - len(count) + 1, num_items + 1)
        return float(np.sum((2 * place - num_items - 1) * count) / item_matrix.size / num_items)


class TailPercentage(metrics.TailPercentage):
    """Share of the places in the lists that go to items with few training interactions."""

    def get_tail(self, item_matrix: np.ndarray, count_items: Counts) -> np.ndarray:
        """Return 1 for each place of a tail item, else 0, ``[n_users, K]``.

        The tail is of the items with training interactions: those with at most ``tail_ratio`` of them if it is above 1,
        else that share of the items, the ones with the fewest; of equals the smaller id comes first.
        """
        items, count = arrays(count_items)
        if self.tail > 1:
            tail = items[count <= self.tail]
        else:
            tail = items[np.lexsort((items, count))][: max(int(len(items) * self.tail), 1)]
        is_tail = np.zeros(int(max(items.max(initial=0), item_matrix.max(initial=0))) + 1, dtype=np.int64)
        is_tail[tail] = 1
        return is_tail[item_matrix]


def arrays(count_items: Counts) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids and the counts of a dictionary of counts."""
    n = len(count_items)
    return (
        np.fromiter(count_items.keys(), dtype=np.int64, count=n),
        np.fromiter(count_items.values(), dtype=np.int64, count=n),
    )


def by_item(count_items: Counts, item_matrix: np.ndarray) -> np.ndarray:
    """Return the count of every item id up to the largest of both arguments; 0 for those without."""
    items, count = arrays(count_items)
    found = np.zeros(int(max(items.max(initial=0), item_matrix.max(initial=0))) + 1, dtype=np.int64)
    found[items] = count
    return found


def occurrences(item_matrix: np.ndarray) -> np.ndarray:
    """Return how often each item that occurs in the lists does, ``[n_items_that_occur]``."""
    count = np.bincount(item_matrix.ravel())
    return count[count > 0]


WITHOUT_LOOPS = (MRR, MAP, NDCG, ItemCoverage, AveragePopularity, ShannonEntropy, GiniIndex, TailPercentage)


def replace_loops(evaluator: Any) -> None:
    """Have RecBole's evaluator compute its metrics by the classes of this module; metrics of others stay theirs."""
    ours = {kind.__bases__[0]: kind for kind in WITHOUT_LOOPS}
    for name, metric in evaluator.metric_class.items():
        if type(metric) in ours:
            evaluator.metric_class[name] = ours[type(metric)](evaluator.config)
