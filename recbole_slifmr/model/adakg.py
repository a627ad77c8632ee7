r"""AdaKG: the knowledge graph's view of a node counts the more, the less stable the interactions' view of it is.

Park, Jeon, Gwak, Kim, Lee, Jung, "Do All Nodes Benefit Equally from Knowledge Graphs? Adaptive Node-Aware KG Fusion
for Recommendation", CIKM 2026, arXiv 2609.05909.

With :math:`\hat A` the normalised interactions, :math:`k` a view of users and items by the triples
(:class:`~recbole_slifmr.nn.encoder.TripleEncoder`) and :math:`\bar q` the mean over all users or all items:

.. math::
    z = \frac{1}{L} \sum_{l=1}^{L} \hat A^l e, \quad
    e' = e + \epsilon \|e\| \, \frac{\nabla_e \mathrm{BPR}(z)}{\|\nabla_e \mathrm{BPR}(z)\|}, \quad
    q = 1 - \cos(z, z'), \quad \alpha = \sigma(\mathrm{softplus}(\gamma) (q - \bar q)), \\
    L = \mathrm{BPR}(z + \alpha k) + w \, \alpha \, \mathrm{InfoNCE}(z, k) + \lambda \|e\|^2 .

Written from the abstract, the published settings and a summary of the equations; choices where these leave one. Both
views start from the same ID embeddings. :math:`\bar q` is not of the batch, so that scores do not depend on who is
scored beside. The step :math:`e'` takes the gradient of the batch in training; in evaluation that of all training
interactions with negatives that are drawn once, so that scores depend on the parameters alone. No gradient passes
through q, nor through the weight of InfoNCE, which would fall by itself. An item without interactions has q = 1, and
its ID embedding counts as zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recbole_slifmr.errors import SettingError
from recbole_slifmr.model.base import GraphRecommender, full_precision
from recbole_slifmr.model.settings import GraphSettings, Positive, Weight
from recbole_slifmr.nn.knowledge import TripleEncoder
from recbole_slifmr.nn.layers import unit
from recbole_slifmr.nn.loss import bpr_gradient, collision_mask, info_nce
from recbole_slifmr.nn.sparse import later_layers


@dataclass(frozen=True)
class AdaKGSettings(GraphSettings):
    """The settings of AdaKG."""

    eps: Weight
    cl_weight: Weight
    temperature: Positive
    reg_weight: Weight

    def __post_init__(self) -> None:
        if self.n_layers < 1:
            raise SettingError(f"n_layers must be 1 or more, not {self.n_layers}: AdaKG leaves layer 0 out")


class AdaKG(GraphRecommender):
    """LightGCN without layer 0, plus as much of a view of the knowledge graph as each node needs.

    Args:
        config: RecBole's configuration; the settings are listed in ``properties/model/AdaKG.yaml``.
        dataset: a :class:`~recbole_slifmr.data.dataset.SLIFMRDataset`, the training split.

    Raises:
        SettingError: for a setting outside its limits.
    """

    settings_class = AdaKGSettings
    settings: AdaKGSettings
    loss_names = ("bpr", "contrast", "reg")
    needs_kg = True
    drawn: Tensor

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        size, n_layers, triples = self.settings.embedding_size, self.settings.n_layers, dataset.triples.to(self.device)
        self.triple_encoder = TripleEncoder(triples, dataset.entity_num, self.n_items, size, n_layers)
        n_drawn, generator = self.interaction_encoder.edge_index.shape[1], torch.Generator().manual_seed(0)
        drawn = torch.randint(1, self.n_items, (n_drawn,), generator=generator)
        self.register_buffer("drawn", drawn.to(self.device), persistent=False)
        self.gamma = nn.Parameter(torch.zeros(()))
        self.reset_parameters()

    @classmethod
    def memory_parts(cls, settings: Any, dataset: Any, batch_size: int) -> dict[str, int]:
        """Return the bytes of the base, of entities and triples, of both views' layers and of the contrast."""
        parts = super().memory_parts(settings, dataset, batch_size)
        row, n_triples, n_nodes = (
            4 * settings.embedding_size,
            len(dataset.triples),
            dataset.user_num + dataset.entity_num,
        )
        parts["parameters and Adam"] += 4 * row * (dataset.entity_num - dataset.item_num)
        parts["knowledge graph"] = 80 * n_triples
        parts["training step"] += settings.n_layers * row * (4 * n_triples + 2 * n_nodes) + 24 * batch_size**2
        return parts

    def interaction_view(self, users: Tensor, items: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean of layers 1 to L over ``[n_users, d]`` and ``[n_items, d]``, same shapes; it is symmetric."""
        return later_layers(self.interaction_encoder.graph.matrix, users, items, self.settings.n_layers)

    @torch.no_grad()
    def instability(self, ego: tuple[Tensor, Tensor], z: tuple[Tensor, Tensor], triplets: Tensor) -> tuple[Tensor, ...]:
        r"""Return :math:`q - \bar q` of all users and items, ``[n, 1]`` each.

        Args:
            ego: ID embeddings of users and items, ``[n, d]`` each.
            z: their interaction view.
            triplets: users, positive and negative items of the BPR that the step goes against, ``[3, E]``.
        """
        gradient = self.interaction_view(*bpr_gradient(*z, triplets))  # the view is linear and symmetric
        eps = self.settings.eps
        moved = (e + eps * e.norm(dim=1, keepdim=True) * unit(g) for e, g in zip(ego, gradient, strict=True))
        found = []
        for before, after in zip(z, self.interaction_view(*moved), strict=True):
            q = 1 - (unit(before) * unit(after)).sum(1, keepdim=True)
            found.append(q - q[before.any(1)].mean())
        return tuple(found)

    def encode(self, triplets: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Return interaction view ``[n, d]``, knowledge view ``[n, d]`` and share ``[n, 1]``, of users and of items."""
        ego = self.user_embedding.weight, self.known(self.item_embedding.weight)
        z, k = self.interaction_view(*ego), self.triple_encoder(*ego, self.interaction_encoder.graph)
        share = (torch.sigmoid(F.softplus(self.gamma) * q) for q in self.instability(ego, z, triplets))
        return list(zip(z, k, share, strict=True))

    def forward(self) -> tuple[Tensor, Tensor]:
        """Return the final embeddings of all users and items, ``[n, d]``."""
        user, item = self.interaction_encoder.edge_index
        users, items = (z + share * k for z, k, share in self.encode(torch.stack([user, item, self.drawn])))
        return users, items

    @full_precision
    def calculate_loss(self, interaction: Any) -> tuple[Tensor, ...]:
        """Return the weighted terms of the loss for a batch of (user, positive item, negative item)."""
        self.clear_cache()
        user, pos, neg = self.batch_ids(interaction)
        views = self.encode(torch.stack([user, pos, neg]))
        users, items = (z + share * k for z, k, share in views)
        contrast = torch.stack([self.contrast(*view, ids) for view, ids in zip(views, (user, pos), strict=True)]).sum()
        reg = self.settings.reg_weight * self.ego_norm(user, pos, neg)
        return self.bpr(users.index_select(0, user), items, pos, neg), self.settings.cl_weight * contrast, reg

    def contrast(self, z: Tensor, k: Tensor, share: Tensor, ids: Tensor) -> Tensor:
        """Return InfoNCE of ``z`` against ``k [n, d]`` among the distinct ``ids [B]``, each weighted by its share."""
        ids = ids.unique()
        query, key, weight = (rows.index_select(0, ids) for rows in (z, k, share.detach()))
        return info_nce(query, key, key, collision_mask(ids, ids), self.settings.temperature, weight.squeeze(1))
