"""Which items belong to which user, as two arrays: what a user has seen, or what is held out of training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class History(NamedTuple):
    """The items of each user.

    Attributes:
        bounds: user u has ``items[bounds[u]:bounds[u + 1]]``, ``[n_users + 1]``.
        items: item ids, each once per user.
    """

    bounds: np.ndarray
    items: np.ndarray

    @classmethod
    def of(cls, users: np.ndarray, items: np.ndarray, n_users: int, n_items: int) -> History:
        """Build from the user and the item of each interaction, ``[E]`` each; items ascend for each user."""
        pairs = np.unique(users.astype(np.int64) * n_items + items)
        return cls(np.searchsorted(pairs, np.arange(n_users + 1) * n_items), pairs % n_items)

    @classmethod
    def of_rows(cls, rows: Sequence[Tensor]) -> History:
        """Build from the item ids of each user, a tensor per user."""
        bounds = np.zeros(len(rows) + 1, dtype=np.int64)
        np.cumsum(np.fromiter(map(len, rows), dtype=np.int64, count=len(rows)), out=bounds[1:])
        return cls(bounds, torch.cat(list(rows)).numpy() if len(rows) else np.empty(0, dtype=np.int64))

    def of_user(self, user: int) -> np.ndarray:
        """Return the items of a user."""
        return self.items[self.bounds[user] : self.bounds[user + 1]]

    def rows(self) -> tuple[Tensor, ...]:
        """Return the items of each user, a tensor per user."""
        return torch.from_numpy(self.items).split(np.diff(self.bounds).tolist())

    def cells(self, users: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return row and column of each item in the matrix whose rows are ``users [n]``."""
        start, count = self.bounds[users], self.bounds[users + 1] - self.bounds[users]
        rows = np.repeat(np.arange(len(users)), count)
        offset = np.arange(len(rows)) - np.repeat(np.cumsum(count) - count, count)
        return rows, self.items[np.repeat(start, count) + offset]
