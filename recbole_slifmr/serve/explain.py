"""Why SLIFMR recommends an item: what its views weigh, and what links the item with the user's items.

The links are those that the model computes with: the correlation graph of the last refresh, the knowledge graph and
the user's training interactions. They say what the model had at hand, not that the score would fall without them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from recbole_slifmr.data.history import History
from recbole_slifmr.errors import SettingError
from recbole_slifmr.model.linear import LinearRecommender
from recbole_slifmr.model.slifmr import SLIFMR
from recbole_slifmr.nn.knowledge import filter_by_degree
from recbole_slifmr.nn.layers import unit
from recbole_slifmr.nn.linear import weights_on
from recbole_slifmr.serve.explain_linear import LinearExplainer
from recbole_slifmr.serve.recommend import Ranking
from recbole_slifmr.serve.trained import Trained

SHOWN = 5  # neighbours, entities, and items per entity


class Explainer:
    """Explains recommendations of a SLIFMR.

    Args:
        trained: the model.

    Raises:
        SettingError: if it is another model.
    """

    def __init__(self, trained: Trained) -> None:
        model = trained.model
        if not isinstance(model, SLIFMR):
            raise SettingError(
                f"--explain is for SLIFMR: {trained.config['model']} has no feedback graph, and no "
                "item-item weights as CEASE has"
            )
        self.trained, self.model = trained, model
        dataset = trained.dataset
        users, items = (dataset.inter_feat[field].numpy() for field in (dataset.uid_field, dataset.iid_field))
        self.learned = History.of(users, items, trained.n_users, trained.n_items)
        row, col = model.feedback_index.cpu().numpy()
        self.neighbours = History.of(row, col, trained.n_items, trained.n_items)
        self.items = F.normalize(trained.item_vectors(), dim=1)
        self.facts = self._facts()
        self.n_linked = {entity: len(linked) for entity, linked in self._linked_items().items()}

    def _facts(self) -> dict[int, dict[int, int]]:
        """Return the relation with each entity around each item; one of them if there are several."""
        facts, settings, dataset = defaultdict[int, dict[int, int]](dict), self.model.settings, self.trained.dataset
        if settings.kg_view == "none":
            return facts
        n_items, degrees = self.trained.n_items, (settings.kg_min_degree, settings.kg_max_degree)
        for head, relation, tail in filter_by_degree(dataset.triples, dataset.entity_num, n_items, degrees).tolist():
            for item, entity in ((head, tail), (tail, head)):
                if item < n_items:
                    facts[item].setdefault(entity, relation)
        return facts

    def _linked_items(self) -> dict[int, list[int]]:
        linked = defaultdict(list)
        for item, around in self.facts.items():
            for entity in around:
                linked[entity].append(item)
        return linked

    @torch.no_grad()
    def explain(self, ranking: Ranking) -> list[list[dict[str, Any]]]:
        """Return an explanation of each item of each user.

        Returns:
            per user and place: ``graphs`` and ``linear``, whose sum is the score, and of the latter ``items``, the
            user's items that add most, each with its exact share (both only where there is a linear branch);
            ``user_views`` and ``item_views``, the weight of each view, or None if the views are
            concatenated; ``neighbours``, the user's items next to it in the correlation graph, the nearest first, with
            their cosine; ``shared_entities``, those that it has in common with items of the user, the rarest first,
            with its relation and these items. At most five of each.
        """
        model, items = self.model, np.unique(ranking.items)
        device = model.item_embedding.weight.device
        ids = (torch.from_numpy(part).to(device) for part in (ranking.users, items))
        views = model.views_of(model.propagate(by_rows=True), *ids)
        of_users = self._weights(model.user_fusion, views.users, views.user_mask)
        of_items = self._weights(model.item_fusion, views.items, views.item_mask)
        place = {int(item): row for row, item in enumerate(items)}

        def weights_of(row: int, item: int) -> dict[str, Any]:
            return {"user_views": of_users and of_users[row], "item_views": of_items and of_items[place[item]]}

        return self._describe(ranking, weights_of)

    def links(self, ranking: Ranking) -> list[list[dict[str, Any]]]:
        """Return what :meth:`explain` does without the views, for which it propagates over all graphs."""
        return self._describe(ranking, lambda row, item: {})

    def _describe(self, ranking: Ranking, views_of: Callable[[int, int], dict[str, Any]]) -> list[list[dict[str, Any]]]:
        return [
            [
                {
                    **self._linear(int(user), item, float(score)),
                    **views_of(row, item),
                    "neighbours": self._neighbours(int(user), item),
                    "shared_entities": self._shared_entities(int(user), item),
                }
                for item, score in zip(ranking.items[row].tolist(), ranking.scores[row], strict=True)
                if score > -np.inf
            ]
            for row, user in enumerate(ranking.users)
        ]

    def _weights(self, fusion: Any, views: Tensor, mask: Tensor) -> list[dict[str, float]] | None:
        if fusion.kind == "concat":
            return None
        weights = fusion.weights(unit(views) if self.model.settings.normalize_views else views, mask)
        return [dict(zip(self.model.view_names, _short(row), strict=True)) for row in weights]

    def _linear(self, user: int, item: int, score: float) -> dict[str, Any]:
        """Return what the linear branch adds to a score, and which of the user's items add most of it."""
        branch = self.model.linear
        if branch is None:
            return {}
        known = branch.history[[user]].indices
        shares = branch.scale * weights_on(branch.weights, known, item)
        largest = [place for place in np.argsort(-shares, kind="stable")[:SHOWN] if shares[place] > 0]
        tokens = self.trained.item_tokens
        return {
            "graphs": round(score - float(shares.sum()), 4),
            "linear": round(float(shares.sum()), 4),
            "items": [
                {"item": str(tokens[known[place]]), "score": round(float(shares[place]), 4)} for place in largest
            ],
        }

    def _neighbours(self, user: int, item: int) -> list[dict[str, Any]]:
        near = np.intersect1d(self.neighbours.of_user(item), self.learned.of_user(user))
        cosine = self.items[torch.from_numpy(near).to(self.items.device)] @ self.items[item]
        order = torch.argsort(cosine, descending=True, stable=True)[:SHOWN].cpu()
        tokens = self.trained.item_tokens[near[order.numpy()]].tolist()
        return [
            {"item": token, "cosine": value} for token, value in zip(tokens, _short(cosine.cpu()[order]), strict=True)
        ]

    def _shared_entities(self, user: int, item: int) -> list[dict[str, Any]]:
        around, shared = self.facts.get(item, {}), defaultdict(list)
        for other in self.learned.of_user(user).tolist():
            if other != item:
                for entity in around.keys() & self.facts.get(other, {}).keys():
                    shared[entity].append(other)
        dataset, tokens = self.trained.dataset, self.trained.item_tokens
        entities = dataset.field2id_token[dataset.entity_field]
        relations = dataset.field2id_token[dataset.relation_field]
        rarest = sorted(shared, key=lambda entity: (self.n_linked[entity], entity))[:SHOWN]
        return [
            {
                "entity": str(entities[entity]),
                "relation": str(relations[around[entity]]),
                "items": tokens[shared[entity][:SHOWN]].tolist(),
            }
            for entity in rarest
        ]


def _short(values: Tensor) -> list[float]:
    return [round(value, 4) for value in values.tolist()]


def make_explainer(trained: Trained) -> Explainer | LinearExplainer:
    """Return the explainer of a SLIFMR or of a closed form.

    Raises:
        SettingError: if it is another model.
    """
    return LinearExplainer(trained) if isinstance(trained.model, LinearRecommender) else Explainer(trained)
