r"""LightKG: light propagation over users, items and entities in one graph, with one number per relation and direction.

Li, Wang, Sun, Zhang, Guo, "LightKG: Efficient Knowledge-Aware Recommendations with Simplified GNN Architecture", KDD
2025, arXiv 2506.10347.

An interaction is one more relation; :math:`d` counts the distinct neighbours of a node:

.. math::
    e_h^{(l+1)} = \sum_{(h, r, t)} \frac{w_r}{\sqrt{d_h d_t}} e_t^{(l)}, \quad
    z = \frac{1}{L + 1} \sum_{l=0}^{L} e^{(l)}, \quad
    L = \mathrm{BPR}(z) + \lambda_U C(U) + \lambda_I C(I) + \lambda \|e^{(0)}\|^2 .

The contrast pushes the ID embeddings of the users of a batch apart, and of its positive and negative items, the less
the more neighbours two of them share. With the adjacency :math:`A`:

.. math::
    C(N) = \sum_{i \neq j \in N} \left(1 - \frac{1}{\sqrt{d_i d_j}}\right) e^{\cos(e_i, e_j) (1 + s_{ij}) / \tau},
    \quad s_{ij} = - \frac{(A^2 + A)_{ij}}{\sqrt{d_i d_j}} .

Several negatives per positive are RecBole's ``train_neg_sample_args: {sample_num: K, ...}``.

Written from the paper's equations, choices where they leave one: :math:`w_r = 1` at the start, so that training starts
from LightGCN over the whole graph; several relations between two nodes add up; the pairs of :math:`C` are those of
the distinct nodes of a batch. The ID embedding of a cold item counts as zero: its entities alone say what it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recbole_slifmr.model.base import EmbeddingRecommender, full_precision
from recbole_slifmr.model.settings import GraphSettings, PartOf, Positive, Weight
from recbole_slifmr.nn.graph import inverse_sqrt, unique_edges
from recbole_slifmr.nn.knowledge import unique_triples
from recbole_slifmr.nn.layers import light_propagation, unit
from recbole_slifmr.nn.loss import bpr_loss, l2_loss
from recbole_slifmr.nn.sparse import RelationalMatrix


@dataclass(frozen=True)
class LightKGSettings(GraphSettings):
    """The settings of LightKG."""

    mess_dropout: PartOf
    user_cl_weight: Weight
    item_cl_weight: Weight
    temperature: Positive
    reg_weight: Weight


class LightKG(EmbeddingRecommender):
    """Light propagation over the interactions and the knowledge graph together.

    Args:
        config: RecBole's configuration; the settings are listed in ``properties/model/LightKG.yaml``.
        dataset: a :class:`~recbole_slifmr.data.dataset.SLIFMRDataset`, the training split.
    """

    settings_class = LightKGSettings
    settings: LightKGSettings
    loss_names = ("bpr", "contrast", "reg")
    needs_kg = True
    neighbours: Tensor
    scale: Tensor

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        size, n_entities = self.settings.embedding_size, dataset.entity_num
        n_nodes = n_entities + self.n_users
        self.user_embedding = nn.Embedding(self.n_users, size)
        self.item_embedding = nn.Embedding(self.n_items, size)
        self.entity_embedding = nn.Embedding(n_entities - self.n_items, size)
        user, item = unique_edges(self.training_interactions(dataset), self.n_items)
        head, relation, tail = unique_triples(dataset.triples).to(self.device).T
        forth = torch.stack([torch.cat([user + n_entities, head]), torch.cat([item, tail])])
        edge_index = torch.cat([forth, forth.flip(0)], dim=1)
        relation = torch.cat([torch.zeros_like(user), 1 + torch.unique(relation, return_inverse=True)[1]])
        n_relations = int(relation.max()) + 1
        relation = torch.cat([relation, relation + n_relations])
        self.graph = RelationalMatrix(edge_index, relation, 2 * n_relations, (n_nodes, n_nodes))
        self.relation_weight = nn.Parameter(torch.ones(2 * n_relations))
        self.register_buffer("neighbours", unique_edges(edge_index, n_nodes), persistent=False)
        degree = torch.bincount(self.neighbours[0], minlength=n_nodes).to(torch.get_default_dtype())
        self.register_buffer("scale", inverse_sqrt(degree).unsqueeze(1), persistent=False)
        self.reset_parameters()

    @classmethod
    def memory_parts(cls, settings: Any, dataset: Any, batch_size: int) -> dict[str, int]:
        """Return the bytes of embeddings with Adam's moments, of the graph, of the layers and of a batch's pairs."""
        n_nodes, n_edges = dataset.user_num + dataset.entity_num, len(dataset.inter_feat) + len(dataset.triples)
        table = 4 * settings.embedding_size * n_nodes
        n_users, n_items = min(batch_size, dataset.user_num), min(2 * batch_size, dataset.item_num)
        return {
            "parameters and Adam": 4 * table,
            "graph": 2 * n_edges * 32,
            "training step": (settings.n_layers + 4) * table + 44 * (n_users**2 + n_items**2),
        }

    def forward(self) -> tuple[Tensor, Tensor]:
        """Return the final embeddings of all users and items, ``[n, d]``."""
        items = self.known(self.item_embedding.weight)
        nodes = torch.cat([items, self.entity_embedding.weight, self.user_embedding.weight])
        final = light_propagation(self._propagate, nodes, self.settings.n_layers)
        return final[len(final) - self.n_users :], final[: self.n_items]

    def _propagate(self, nodes: Tensor) -> Tensor:
        nodes = self.scale * self.graph.multiply(self.scale * nodes, self.relation_weight)
        return F.dropout(nodes, self.settings.mess_dropout, self.training)

    def contrast(self, embeddings: Tensor, nodes: Tensor) -> Tensor:
        """Return :math:`C` of the distinct ``nodes [B]`` of the graph, whose ID embeddings are given, ``[B, d]``."""
        rows = unit(embeddings)
        scale = self.scale[nodes] * self.scale[nodes].T
        unlike = self.shared_neighbours(nodes).mul_(scale).neg_().add_(1)
        apart = (1 - scale).fill_diagonal_(0)
        return (apart * torch.exp(rows @ rows.T * unlike.div_(self.settings.temperature))).sum()

    def shared_neighbours(self, nodes: Tensor) -> Tensor:
        """Return :math:`A^2 + A` among the distinct ``nodes [B]``: common neighbours, one more for being neighbours."""
        n_nodes, ones = len(self.scale), self.scale.new_ones(self.neighbours.shape[1])
        adjacency = torch.sparse_coo_tensor(
            self.neighbours, ones, (n_nodes, n_nodes), is_coalesced=True, check_invariants=False
        )
        rows = adjacency.index_select(0, nodes)
        return torch.sparse.mm(rows, rows.T).to_dense() + rows.index_select(1, nodes).to_dense()

    @full_precision
    def calculate_loss(self, interaction: Any) -> tuple[Tensor, ...]:
        """Return the weighted terms of the loss for a batch of (user, positive item, negative item)."""
        self.clear_cache()
        user, pos, neg = self.batch_ids(interaction)
        users, items = self()
        z_user = users.index_select(0, user)
        bpr = bpr_loss((z_user * items.index_select(0, pos)).sum(1), (z_user * items.index_select(0, neg)).sum(1))
        contrast = torch.zeros_like(bpr)
        some_users, some_items = user.unique(), torch.cat([pos, neg]).unique()
        for weight, table, ids, first in (
            (self.settings.user_cl_weight, self.user_embedding, some_users, len(self.scale) - self.n_users),
            (self.settings.item_cl_weight, self.item_embedding, some_items, 0),
        ):
            if weight:
                contrast = contrast + weight * self.contrast(table(ids), ids + first)
        reg = l2_loss(self.user_embedding(user), self.item_embedding(pos), self.item_embedding(neg))
        return bpr, contrast, self.settings.reg_weight * reg
