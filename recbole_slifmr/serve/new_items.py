"""Which of some items that were not in training suit whom, by what is known of them; nothing is trained.

Of the closed forms exact: a new item's weights are those of a ridge regression on the items of the training, as if it
had been one of them and nobody had it. So is SLIFMR's linear branch; the new item's views are computed as in training,
its interaction view is its neighbours'.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence

import numpy as np
import scipy.sparse
import torch
from torch import Tensor

from recbole_slifmr.data.new_items import NewItems
from recbole_slifmr.errors import DataError, SettingError, name_some
from recbole_slifmr.model.fused import FusedRecommender
from recbole_slifmr.model.linear import LinearRecommender
from recbole_slifmr.nn.linear import history_scores
from recbole_slifmr.serve.recommend import Ranking, rank_items
from recbole_slifmr.serve.trained import Trained


def check_model(trained: Trained) -> None:
    """Refuse a model that cannot score items that were not in training.

    Raises:
        SettingError: naming those that can.
    """
    if not isinstance(trained.model, (LinearRecommender, FusedRecommender)):
        raise SettingError(
            f"{trained.config['model']} cannot score items that were not in training: CEASE, AddEASE, L3AE and SLIFMR "
            "can; for other models they must be in the data set, as cold items"
        )


class NewItemScorer:
    """Scores new items, for users of the training and by histories.

    Args:
        trained: see :func:`check_model`.
        new: the items.

    Raises:
        SettingError: if the model gives no weight to what is known of the items.
    """

    @torch.no_grad()
    def __init__(self, trained: Trained, new: NewItems) -> None:
        model, self.trained, device = trained.model, trained, trained.config["device"]
        self.weights: Tensor | None = None
        self.items: Tensor | None = None
        if isinstance(model, LinearRecommender):
            self.weights = model.new_item_weights(trained.dataset, new).to(device)
        elif isinstance(model, FusedRecommender):
            self.items = model.new_item_representations(trained.dataset, new)
            if model.linear is not None:
                self.weights = model.linear.new_item_weights(model.new_content(trained.dataset, new))
        self.tokens = np.array(["", *self._drop_unknown(new.tokens)], dtype=object)  # column 0 of scores is padding

    def _drop_unknown(self, tokens: np.ndarray) -> np.ndarray:
        """Drop the items of which the model sees nothing, which would all score zero; return the tokens of the rest."""
        known = torch.zeros(len(tokens), dtype=torch.bool, device=self.trained.config["device"])
        if self.items is not None:
            known |= self.items.any(dim=1)
        if self.weights is not None:
            known |= self.weights.any(dim=0)
        if known.all():
            return tokens
        left_out, name = tokens[~known.cpu().numpy()].tolist(), self.trained.config["model"]
        if not known.any():
            raise SettingError(f"{name} gives no weight to what is known of the new items {name_some(left_out)}")
        warnings.warn(f"new items {name_some(left_out)} are left out: {name} sees nothing of them", stacklevel=3)
        self.items = None if self.items is None else self.items[known]
        self.weights = None if self.weights is None else self.weights[:, known]
        return tokens[known.cpu().numpy()]

    def recommend(self, users: np.ndarray, k: int) -> Iterator[Ranking]:
        """Rank the new items for users of the training, ids ``[n]``; ids of items are places in ``tokens``."""
        history, of_users = self._training_history(), None if self.items is None else self.trained.embeddings()[0]

        def scores(chunk: np.ndarray) -> Tensor:
            known = None if of_users is None else of_users[torch.from_numpy(chunk).to(of_users.device)]
            return self._scores(known, history[chunk])

        return rank_items(scores, users, k, len(self.tokens))

    def recommend_for(self, histories: Sequence[np.ndarray], k: int) -> Iterator[Ranking]:
        """Rank the new items for users who were not in training, by the ids of their items.

        Raises:
            DataError: if there is no user, or one has no items.
        """
        if not len(histories) or any(len(items) == 0 for items in histories):
            raise DataError("a new user is known by items: name at least one of each")
        represent = None if self.items is None else self.trained.model.new_user_representations()
        rows = np.repeat(np.arange(len(histories)), [len(items) for items in histories])
        shape = len(histories), self.trained.n_items
        every = scipy.sparse.csr_array((np.ones(len(rows), np.float32), (rows, np.concatenate(histories))), shape=shape)

        def scores(chunk: np.ndarray) -> Tensor:
            history = every[chunk]
            return self._scores(None if represent is None else represent(history), history)

        return rank_items(torch.no_grad()(scores), np.arange(len(histories)), k, len(self.tokens))

    def _training_history(self) -> scipy.sparse.csr_array:
        model = self.trained.model
        if isinstance(model, LinearRecommender):
            return model.history
        if model.linear is not None:
            return model.linear.history
        return scipy.sparse.csr_array((self.trained.n_users, self.trained.n_items), dtype=np.float32)

    def _scores(self, users: Tensor | None, history: scipy.sparse.csr_array) -> Tensor:
        """Return the scores of padding and new items, ``[n, 1 + n_new]``."""
        device = self.trained.config["device"]
        scores = torch.zeros(history.shape[0], len(self.tokens), device=device)
        if users is not None and self.items is not None:
            scores[:, 1:] += users @ self.items.T
        if self.weights is not None:
            scores[:, 1:] += history_scores(history, self.weights, device)
        return scores
