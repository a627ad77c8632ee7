"""Why a closed form recommends an item: what each of the user's items adds to its score, and from which source.

A linear score is a sum over the user's items, so that what each adds is exact. Of each weight, ``interactions`` is what
it would be without content, under the same settings, and ``content`` is the rest: what features and knowledge graph
change. A finer split by source would not be exact, because all sources are inverted together; ``alike`` gives what each
says of the two items by itself.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from recbole_slifmr.model.linear import LinearRecommender
from recbole_slifmr.nn.linear import Matrix, weights_on
from recbole_slifmr.serve.recommend import Ranking
from recbole_slifmr.serve.trained import Trained

SHOWN = 5  # items of the user


class LinearExplainer:
    """Explains recommendations of a closed form; it is solved a second time, without content.

    Args:
        trained: the model, a :class:`~recbole_slifmr.model.linear.LinearRecommender`.
    """

    def __init__(self, trained: Trained) -> None:
        self.trained = trained
        self.model: LinearRecommender = trained.model
        self.from_interactions = self.model.solve(with_content=False)

    def explain(self, ranking: Ranking) -> list[list[dict[str, Any]]]:
        """Return an explanation of each item of each user.

        Returns:
            per user and place: ``interactions`` and ``content``, whose sum is the score; ``items``, the user's items
            that add most, at most five, each with ``score``, ``interactions`` and ``content`` and with ``alike``: per
            source the number of users of both, the cosine of the features, or the weight of the tags in common.
        """
        return [
            [
                self._explain(int(user), item)
                for item, score in zip(ranking.items[row].tolist(), ranking.scores[row], strict=True)
                if score > -np.inf
            ]
            for row, user in enumerate(ranking.users)
        ]

    links = explain  # there are no views to leave out, see Explainer

    def _explain(self, user: int, item: int) -> dict[str, Any]:
        known = self.model.history[[user]].indices
        scores, plain = (weights_on(matrix, known, item) for matrix in (self.model.weights, self.from_interactions))
        tokens = self.trained.item_tokens
        return {
            **_split(scores.sum(), plain.sum()),
            "items": [
                {
                    "item": str(tokens[known[place]]),
                    "score": _short(scores[place]),
                    **_split(scores[place], plain[place]),
                    "alike": self._alike(int(known[place]), item),
                }
                for place in np.argsort(-scores, kind="stable")[:SHOWN]
            ],
        }

    def _alike(self, first: int, second: int) -> dict[str, float]:
        return {name: _short(_inner(source.factor, first, second)) for name, source in self.model.sources.items()}


def _inner(factor: Matrix, first: int, second: int) -> float:
    if isinstance(factor, Tensor):
        return float(factor[first] @ factor[second])
    return float((factor[[first]] @ factor[[second]].T).sum())


def _split(score: float, plain: float) -> dict[str, float]:
    return {"interactions": _short(plain), "content": _short(score - plain)}


def _short(value: float) -> float:
    return round(float(value), 4)
