r"""The linear branch: scores of a linear item-item model, to be added to those of a model that is trained beside it.

B is the ridge regression of ``nn/linear.py`` over interactions and content. A user with the interactions x scores item
j with :math:`s_j = (x B)_j`. Users and items do not all count the same in it: the row of a user with n interactions, of
:math:`\bar n` on average, weighs :math:`v = (n / \bar n)^{-a}`, and the weights on an item that c users have are
penalised by :math:`\lambda_i = \lambda + b c`. The second is what dropping out interactions at random, a share of
:math:`b / (1 + b)`, comes to (Steck, NeurIPS 2020). In the following :math:`P = (G + \Lambda)^{-1}`.

While the other model is trained, B must not have seen the user's own row, or every positive item would look explained.
Refitting without it changes P by a rank of one, so that the leave-one-user-out score follows from B,
:math:`p_j = P_{jj}` and :math:`h = x P x^T` exactly:

.. math::
    \ell_j = \frac{s_j}{(1 - v h) + v p_j s_j^2} \;\; (j \notin x), \qquad
    \ell_j = 1 - \frac{1 - s_j}{(1 - v h) + v p_j (1 - s_j)^2} \;\; (j \in x) .

Both follow from :math:`q = x P` with :math:`q_j = -p_j s_j` outside x and :math:`q_j = p_j (1 - s_j)` within, and from
the Sherman-Morrison formula. Where each column of B was solved for with some of the items only, :math:`h = \sum_i x_i
p_i (1 - s_i)` is over those of them that the user has and the column's own. Both are approximations then, since each
:math:`p_i` and :math:`s_i` is of a column with other items.

That score also says how far an interaction may be trusted: what neither the user's other interactions nor other users
speak for may be noise. Half of the trust is lost where the score is half a standard deviation of those of the items
that users do not have.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse
import torch
from torch import Tensor
from torch.nn import functional as F

from recbole_slifmr.nn.linear import Matrix, Solver, Source, history_scores, solve_columns

LOOKED_UP = 2**22  # numbers at a time, for each item of a history some and one more for each item that is scored
BLOCK = 128  # users whose scores of all items are held at a time
SAMPLE = 1024  # users of whom the noise is measured
MOST_LEVERAGE = 0.99  # of a user's row; with weights cut off, h may come out as 1 or more
DOUBT = 0.5  # standard deviations: half of the trust is lost there, and most of the change is as far around it
LEAST_TRUST = 1e-3  # an interaction stays one


class Solution(NamedTuple):
    """What scores take of the regression.

    Attributes:
        weights: B, ``[n_items, n_items]``.
        variance: the diagonal of P, ``[n_items]``.
        parts: what each training interaction adds to v h of its user, ``[E]``, in the order of the history.
        leverage: v h of each user, ``[n_users]``.
        scale: what ``x B`` is multiplied by.
    """

    weights: Matrix
    variance: Tensor
    parts: Tensor
    leverage: Tensor
    scale: float = 1.0


class LinearBranch:
    r"""A linear item-item model whose scores have the same noise on every data set.

    The scores are multiplied by a number that makes the standard deviation of leave-one-user-out scores over the items
    that a user does not have equal to ``size``: where the model tells apart little, what it says of the items that a
    user has counts little, too. B is solved for when it is first asked for.

    Args:
        history: which users have which item, ``[n_users, n_items]``.
        content: returns what is known of the items beside the interactions; it is not kept.
        reg: :math:`\lambda`.
        size: standard deviation of the scores of the items that a user does not have.
        solver: of B.
        device: of the scores.
        user_power: a, how much less a user with many interactions counts.
        popularity_reg: b, the penalty on an item per user who has it.
    """

    def __init__(
        self,
        history: scipy.sparse.csr_array,
        content: Callable[[], Sequence[Source]],
        reg: float,
        size: float,
        solver: Solver[Any],
        device: torch.device | str,
        user_power: float = 0.0,
        popularity_reg: float = 0.0,
    ) -> None:
        self.history, self.content, self.size, self.solver, self.device = history, content, size, solver, device
        self._shares = user_weights(history, user_power)
        self._user_weights = torch.from_numpy(self._shares.astype(np.float32)).to(device)
        self.reg = reg + popularity_reg * torch.from_numpy(history.sum(axis=0).astype(np.float64))
        self._items = torch.from_numpy(history.indices.astype(np.int64)).to(device)
        self._bounds = torch.from_numpy(history.indptr.astype(np.int64)).to(device)
        self._solved: Solution | None = None

    @property
    def weights(self) -> Matrix:
        """B, ``[n_items, n_items]``: column j holds what item j's score takes of each item of a user."""
        return self._solution().weights

    @property
    def scale(self) -> float:
        """What ``x B`` is multiplied by."""
        return self._solution().scale

    def scores(self, users: Tensor) -> Tensor:
        """Return the scores of all items for ``users [B]``, ``[B, n_items]``."""
        if not isinstance(self.weights, Tensor):
            return self.history_scores(self.history[users.cpu().numpy()])
        places, starts, _ = self._histories(users)
        return F.embedding_bag(self._items[places], self.weights, starts, mode="sum").mul_(self.scale)

    def history_scores(self, history: scipy.sparse.csr_array) -> Tensor:
        """Return the scores of all items for users with other items than in training, ``[n, n_items]``.

        Args:
            history: ones where a user has an item, ``[n, n_items]``.
        """
        return history_scores(history, self.weights, self.device).mul_(self.scale)

    def new_item_weights(self, wanted: np.ndarray) -> Tensor:
        """Return the weights that the items have for new ones, ``[n_items, n_new]`` float32, times the scale.

        Args:
            wanted: the content's inner products of items and new items, ``[n_items, n_new]``.
        """
        weights = torch.from_numpy(solve_columns(self._sources(), self.reg, wanted))
        return weights.float().to(self.device).mul_(self.scale)

    def pair_scores(self, users: Tensor, items: Tensor) -> Tensor:
        """Return the scores of ``items [B, K]`` for ``users [B]``, ``[B, K]``."""
        return self._sums(self.weights, users, items) * self.scale

    def leave_one_out(self, users: Tensor, items: Tensor, known: Tensor) -> Tensor:
        """Return the scores that items would have if B had been solved for without the user, ``[B, K]``.

        Args:
            users: ``[B]``.
            items: ``[B, K]``.
            known: which of the items are among the user's interactions, ``[B, K]`` or what broadcasts to it, bool.
        """
        cuts, known = self._cuts(users, items.shape[1]), known.expand(items.shape)
        parts = zip(*(part.tensor_split(cuts) for part in (users, items, known)), strict=True)
        return torch.cat([self._leave_one_out(*part) for part in parts])

    def _leave_one_out(self, users: Tensor, items: Tensor, known: Tensor) -> Tensor:
        solution = self._solution()
        places, starts, rows = self._histories(users)
        known_items, wanted = self._items[places].unsqueeze(1), items[rows]
        weights = _look_up(solution.weights, known_items, wanted)
        if isinstance(solution.weights, Tensor):
            leverage = solution.leverage[users].unsqueeze(1)
        else:
            parts = solution.parts[places].unsqueeze(1) * ((weights != 0) | (known_items == wanted))
            leverage = _sums_of_rows(parts, starts)
        variance = solution.variance[items] * self._user_weights[users].unsqueeze(1)
        return solution.scale * _without_user(_sums_of_rows(weights, starts), variance, leverage, known)

    def trust(self, users: Tensor, items: Tensor, strength: float = 1.0) -> Tensor:
        """Return how far each training interaction is trusted, see :func:`trust`, ``[E]``.

        Args:
            users: of the interactions, ``[E]``.
            items: of the interactions, ``[E]``.
            strength: from 0, all alike, to 1.
        """
        known = torch.ones(1, 1, dtype=torch.bool, device=items.device)
        return trust(self.leave_one_out(users, items.unsqueeze(1), known).squeeze(1) / self.size, strength)

    def _sources(self) -> list[Source]:
        return [Source(weighted_interactions(self.history, self._shares)), *self.content()]

    def _solution(self) -> Solution:
        if self._solved is None:
            weights, diagonal = self.solver.solve_with_diagonal(self._sources(), self.reg)
            variance = diagonal.float().to(self.device)
            weights = weights.float().to(self.device) if isinstance(weights, Tensor) else weights
            users = torch.repeat_interleave(torch.arange(len(self._bounds) - 1, device=self.device), self._counts())
            sums = self._sums(weights, users, self._items.unsqueeze(1)).squeeze(1)
            parts = self._user_weights[users] * variance[self._items] * (1 - sums)
            leverage = _sums_of_rows(parts.unsqueeze(1), self._bounds[:-1]).squeeze(1)
            solution = Solution(weights, variance, parts, leverage)
            noise = self._noise(solution)
            self._solved = solution._replace(scale=self.size / noise if noise > 0 else 0.0)
        return self._solved

    def _noise(self, solution: Solution) -> float:
        """Return the standard deviation of the leave-one-user-out scores over the items that users do not have.

        Of ``SAMPLE`` of the users who have any, evenly spaced. Item 0 is RecBole's padding.
        """
        users = np.flatnonzero(np.diff(self.history.indptr))
        users = users[np.unique(np.linspace(0, len(users) - 1, min(SAMPLE, len(users)), dtype=np.int64))]
        near: scipy.sparse.csr_array | None = None
        parts = self.history.astype(np.float64)
        if not isinstance(solution.weights, Tensor):
            near = (solution.weights != 0).astype(np.float64) + scipy.sparse.eye_array(len(self.reg))
            parts.data[:] = solution.parts.cpu().numpy()
        sums = [torch.zeros(3, dtype=torch.float64, device=self.device)]
        for some in np.array_split(users, -(-len(users) // BLOCK)) if len(users) else []:
            history = self.history[some]
            lacking = torch.from_numpy(history.toarray() == 0).to(self.device)
            lacking[:, 0] = False
            scores = history_scores(history, solution.weights, self.device)
            leverage = solution.leverage[some].unsqueeze(1)
            if near is not None:
                leverage = history_scores(parts[some], near, self.device)
            variances = solution.variance * self._user_weights[some].unsqueeze(1)
            scores = _without_user(scores, variances, leverage, ~lacking).double() * lacking
            sums.append(torch.stack([lacking.sum(), scores.sum(), scores.square().sum()]))
        count, total, squares = torch.stack(sums).sum(0).tolist()
        return max(squares / count - (total / count) ** 2, 0.0) ** 0.5 if count else 0.0

    def _counts(self) -> Tensor:
        return self._bounds[1:] - self._bounds[:-1]

    def _cuts(self, users: Tensor, n_columns: int) -> list[int]:
        """Return where to cut ``users [B]``, so that about ``LOOKED_UP`` numbers are looked up at a time.

        A part is larger by one user's at most.
        """
        total = self._counts()[users].cumsum(0) * (n_columns + 4)  # beside the columns: where and whose the items are
        return (torch.diff(total // LOOKED_UP).nonzero().squeeze(1) + 1).tolist()

    def _histories(self, users: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return where the users' items are, one user after another ``[N]``, each one's first ``[B]``, and whose."""
        counts = self._counts()[users]
        rows = torch.repeat_interleave(torch.arange(len(users), device=users.device), counts)
        starts = counts.cumsum(0) - counts
        places = (self._bounds[users] - starts)[rows] + torch.arange(len(rows), device=users.device)
        return places, starts, rows

    def _sums(self, weights: Matrix, users: Tensor, items: Tensor) -> Tensor:
        """Return the sum of the weights of ``items [B, K]`` on the items of ``users [B]``, ``[B, K]``."""
        cuts, sums = self._cuts(users, items.shape[1]), []
        for some, wanted in zip(users.tensor_split(cuts), items.tensor_split(cuts), strict=True):
            places, starts, rows = self._histories(some)
            sums.append(_sums_of_rows(_look_up(weights, self._items[places].unsqueeze(1), wanted[rows]), starts))
        return torch.cat(sums)


def user_weights(history: scipy.sparse.csr_array, power: float) -> np.ndarray:
    r"""Return what each user counts, :math:`v_u = (n_u / \bar n)^{-a}`, ``[n_users]``.

    The mean :math:`\bar n` is over the users who have any items; the others count as if they had one.

    Args:
        history: which users have which item, ``[n_users, n_items]``.
        power: a.
    """
    counts = np.diff(history.indptr)
    mean = counts.sum() / max(np.count_nonzero(counts), 1)
    return (np.maximum(counts, 1) / max(mean, 1)) ** -power


def weighted_interactions(history: scipy.sparse.csr_array, weights: np.ndarray) -> scipy.sparse.csr_array:
    """Return :math:`X^T V^{1/2}` for a history X ``[n_users, n_items]``, ``[n_items, n_users]``."""
    return (history.T @ scipy.sparse.diags_array(np.sqrt(weights))).tocsr()


def trust(evidence: Tensor, strength: float = 1.0) -> Tensor:
    r"""Return :math:`1 - \theta \, \sigma((t_0 - t) / t_0)` with :math:`t_0` = ``DOUBT``, of the shape of ``evidence``.

    At least ``LEAST_TRUST``.

    Args:
        evidence: t, scores by a regression that has not seen the interaction, in standard deviations of those of the
            items that users do not have.
        strength: :math:`\theta`, from 0, all alike, to 1.
    """
    return (1 - strength * torch.sigmoid((DOUBT - evidence) / DOUBT)).clamp(min=LEAST_TRUST)


def _sums_of_rows(rows: Tensor, starts: Tensor) -> Tensor:
    """Return the sum of the rows from each start to the next, ``[N, K]`` and ``[B]`` -> ``[B, K]``."""
    return F.embedding_bag(torch.arange(len(rows), device=rows.device), rows, starts, mode="sum")


def _look_up(weights: Matrix, rows: Tensor, columns: Tensor) -> Tensor:
    """Return the weights at rows ``[N, 1]`` and columns ``[N, K]``, ``[N, K]``."""
    if isinstance(weights, Tensor):
        return weights[rows, columns]
    if not columns.numel():
        return torch.zeros(columns.shape, device=columns.device)  # SciPy's is no array
    places = (index.cpu().numpy().ravel() for index in torch.broadcast_tensors(rows, columns))
    found = weights[tuple(places)].astype(np.float32)
    return torch.from_numpy(found).view(columns.shape).to(columns.device)


def _without_user(sums: Tensor, variance: Tensor, leverage: Tensor, known: Tensor) -> Tensor:
    rest, leverage = torch.where(known, 1 - sums, sums), leverage.clamp(max=MOST_LEVERAGE)
    score = rest / ((1 - leverage) + variance * rest.square())
    return torch.where(known, 1 - score, score)
