"""Recommendations for users who were not in training, from the items they have; nothing is trained.

Exact for the closed forms, whose scores are sums over a user's items, and for iALS, which solves for the user. Of
SLIFMR, the linear branch and the views of features and knowledge-graph tags are exact; its interaction view is folded
in, and so are the users of LightGCN and of the other models with embeddings: see ``nn/fold_in.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import scipy.sparse
import torch
from recbole.model.general_recommender import EASE, LightGCN
from torch import Tensor

from recbole_slifmr.data.history import History
from recbole_slifmr.errors import DataError, SettingError
from recbole_slifmr.model.base import EmbeddingRecommender
from recbole_slifmr.model.fused import FusedRecommender
from recbole_slifmr.model.ials import IALS
from recbole_slifmr.model.linear import LinearRecommender
from recbole_slifmr.nn.fold_in import fold_in, item_shares
from recbole_slifmr.serve.recommend import Ranking, rank_items
from recbole_slifmr.serve.trained import Trained

Score = Callable[[scipy.sparse.csr_array], Tensor]


def recommend_for(
    score: Score, histories: Sequence[np.ndarray], k: int, n_items: int, candidates: np.ndarray | None = None
) -> Iterator[Ranking]:
    """Recommend items to users who were not in training; never those that they have.

    Args:
        score: what :func:`scorer` gives.
        histories: item ids of each user.
        k: items per user.
        n_items: number of items, the padding item 0 included.
        candidates: ids of the items that may be recommended, ``[C]``; all if None.

    Returns:
        rankings whose ``users`` are the places of the users in ``histories``.

    Raises:
        DataError: if there is no user, or one has no items.
    """
    if not len(histories) or any(len(items) == 0 for items in histories):
        raise DataError("a new user is known by items: name at least one of each")
    seen = History.of_rows([torch.from_numpy(np.unique(items)) for items in histories])

    @torch.no_grad()
    def scores(users: np.ndarray) -> Tensor:
        rows, items = seen.cells(users)
        ones = np.ones(len(rows), dtype=np.float32)
        return score(scipy.sparse.csr_array((ones, (rows, items)), shape=(len(users), n_items)))

    return rank_items(scores, np.arange(len(histories)), k, n_items, seen, candidates)


@torch.no_grad()
def scorer(trained: Trained) -> Score:
    """Return a function from which items users have, ``[n, n_items]``, to the scores of all items, ``[n, n_items]``.

    Raises:
        SettingError: for a model that cannot score them.
    """
    model = trained.model
    if isinstance(model, LinearRecommender):
        return model.history_scores
    if isinstance(model, EASE):
        return lambda history: torch.from_numpy(np.asarray(history @ model.item_similarity))
    if isinstance(model, (FusedRecommender, IALS)):
        return model.score_new_users()
    if isinstance(model, (EmbeddingRecommender, LightGCN)):
        return _folding_in(trained)
    raise SettingError(
        f"{trained.config['model']} cannot recommend to users who were not in training: EASE, CEASE, AddEASE, L3AE, "
        "LightGCN, SLIFMR and the other models of this package can"
    )


def _folding_in(trained: Trained) -> Score:
    users, items = trained.embeddings()
    data, n_items = trained.dataset, trained.n_items
    pairs = data.inter_feat[data.uid_field].long() * n_items + data.inter_feat[data.iid_field]
    pairs = torch.unique(pairs).to(items.device)
    shares = item_shares(users, items, torch.stack([pairs // n_items, pairs % n_items]))

    def score(history: scipy.sparse.csr_array) -> Tensor:
        new = torch.from_numpy(np.stack(history.nonzero()).astype(np.int64)).to(items.device)
        return fold_in(shares, new, history.shape[0]) @ items.T

    return score
