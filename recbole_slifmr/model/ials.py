r"""iALS: matrix factorisation of implicit feedback by alternating least squares.

Hu, Koren, Volinsky, "Collaborative Filtering for Implicit Feedback Datasets", ICDM 2008, DOI 10.1109/ICDM.2008.22, in
the form of Rendle, Krichene, Zhang, Koren, "Revisiting the Performance of iALS on Item Recommendation Benchmarks",
RecSys 2022, arXiv 2110.14037, which brings it near the best models of its kind:

.. math::
    L = \sum_{(u,i) \in S} (w_u^T h_i - 1)^2 + \alpha_0 \sum_{u,i} (w_u^T h_i)^2
        + \lambda \sum_u (|I_u| + \alpha_0 |I|)^\nu \|w_u\|^2 + \lambda \sum_i (|U_i| + \alpha_0 |U|)^\nu \|h_i\|^2 .

With the items held fixed, each user is a ridge regression, and the other way round; a sweep solves both sides once.

Deviations: none. It reads neither features nor a knowledge graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse
import torch
from torch import Tensor

from recbole_slifmr.data.cold import ColdScoring
from recbole_slifmr.model.base import EmbeddingRecommender, SolvedRecommender
from recbole_slifmr.model.settings import Count, DataSettings, Positive, Share
from recbole_slifmr.nn.linear import interaction_factor

MOST = 2**24  # numbers of a batch of regressions
START = 0.1  # standard deviation of the length of an embedding at the start


@dataclass(frozen=True)
class IALSSettings(DataSettings):
    """The settings of iALS."""

    embedding_size: Count
    n_sweeps: Count
    unobserved_weight: Positive
    reg_weight: Positive
    reg_exponent: Share


class _Batch(NamedTuple):
    """Rows with about as many interactions: ``rows [B]``, their ``columns [B, L]`` and which of these are there."""

    rows: Tensor
    columns: Tensor
    there: Tensor


class IALS(SolvedRecommender, EmbeddingRecommender):
    """Users and items whose inner products are near 1 where there is an interaction and near 0 elsewhere.

    Args:
        config: RecBole's configuration; the settings are listed in ``properties/model/IALS.yaml``.
        dataset: a :class:`~recbole_slifmr.data.dataset.SLIFMRDataset`, the training split.

    Attributes:
        users: ``[n_users, d]``; zeros for those without interactions, and everywhere before the first training step.
        items: ``[n_items, d]``, likewise.
    """

    settings_class = IALSSettings
    settings: IALSSettings  # type: ignore[assignment]
    users: Tensor
    items: Tensor

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        users, items = (dataset.inter_feat[field].numpy() for field in (self.USER_ID, self.ITEM_ID))
        self.history = interaction_factor(users, items, self.n_users, self.n_items).T.tocsr()
        for name, n_rows in (("users", self.n_users), ("items", self.n_items)):
            self.register_buffer(name, torch.zeros(n_rows, self.settings.embedding_size))

    @classmethod
    def check(cls, config: Any, dataset: Any) -> None:
        """Refuse nothing: what the trainer of other models may be asked for does not exist here."""

    @classmethod
    def memory_parts(cls, settings: Any, dataset: Any, batch_size: int) -> dict[str, int]:
        """Return the bytes of users, items and interactions, and of a batch of regressions."""
        size = settings.embedding_size
        return {
            "parameters": 8 * size * (dataset.user_num + dataset.item_num),
            "interactions": 60 * len(dataset.inter_feat),
            "solving": 16 * MOST,
        }

    @classmethod
    def scores_cold(cls, config: Any) -> ColdScoring:
        """Say that the model knows items by their interactions only."""
        return ColdScoring(False, "IALS knows items by their interactions only")

    def forward(self) -> tuple[Tensor, Tensor]:
        """Return users ``[n_users, d]`` and items ``[n_items, d]``."""
        return self.users, self.items

    def calculate_loss(self, interaction: Any) -> Tensor:
        """Do all sweeps, in the first step of training; return a loss of zero."""
        if not self.items.any():
            self._sweep()
        return self.no_loss()

    @torch.no_grad()
    def _sweep(self) -> None:
        self.clear_cache()
        size = self.items.shape[1]
        self.items.normal_(std=START / math.sqrt(size))
        self.items[torch.from_numpy(self.history.sum(axis=0) == 0).to(self.device)] = 0  # as the solution is
        sides = [list(batches(history, self.device, size)) for history in (self.history, self.history.T.tocsr())]
        for _ in range(self.settings.n_sweeps):
            self._solve(self.users, sides[0], self.items)
            self._solve(self.items, sides[1], self.users)

    def _solve(self, found: Tensor, regressions: list[_Batch], other: Tensor) -> None:
        """Solve the regression of each row of ``found [n, d]`` on the rows of ``other [m, d]`` that it has."""
        settings = self.settings
        everything = settings.unobserved_weight * other.T @ other
        unit = torch.eye(other.shape[1], device=other.device)
        n_others = len(other) - 1  # without the padding
        for rows, columns, there in regressions:
            known = other[columns] * there.unsqueeze(2)
            count = there.sum(1) + settings.unobserved_weight * n_others
            reg = settings.reg_weight * count**settings.reg_exponent
            left = known.transpose(1, 2) @ known + everything + reg[:, None, None] * unit
            found[rows] = torch.cholesky_solve(known.sum(1).unsqueeze(2), torch.linalg.cholesky(left)).squeeze(2)

    def score_new_users(self) -> Callable[[scipy.sparse.csr_array], Tensor]:
        """Return a function from the items of users who were not in training to the scores of all items, exact.

        It takes ones where a user has an item, ``[n, n_items]``, and returns ``[n, n_items]``.
        """

        def score(history: scipy.sparse.csr_array) -> Tensor:
            users = self.items.new_zeros(history.shape[0], self.items.shape[1])
            self._solve(users, list(batches(history, self.items.device, self.items.shape[1])), self.items)
            return users @ self.items.T

        return score


def batches(history: scipy.sparse.csr_array, device: Any, size: int) -> Iterator[_Batch]:
    """Yield the rows of ``[n, m]`` that have any columns, those with about as many of them together.

    Args:
        history: nonzero where a row has a column.
        device: of what is yielded.
        size: of the embeddings, by which the batches are cut.
    """
    counts = np.diff(history.indptr)
    order = np.argsort(counts, kind="stable")[::-1]
    order = order[: np.count_nonzero(counts)]
    while len(order):
        length = counts[order[0]]
        rows, order = np.split(order, [max(MOST // (size * max(size, length)), 1)])
        there = np.arange(length) < counts[rows, None]
        columns = np.zeros(there.shape, dtype=np.int64)
        columns[there] = history[rows].indices
        yield _Batch(*(torch.from_numpy(part).to(device) for part in (rows.copy(), columns, there)))
