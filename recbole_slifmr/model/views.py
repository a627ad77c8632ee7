"""What MSCA, MGCN and SMORE share: views of the items over graphs of their features, contrasted with the interactions.

A node is a user or an item: users first, items behind them, ``[n_users + n_items, d]``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from recbole_slifmr.data.features import ItemFeatures
from recbole_slifmr.model.base import FeatureProjection, GraphRecommender, full_precision
from recbole_slifmr.model.settings import Count, FeatureSettings, GraphSettings, Positive, Weight
from recbole_slifmr.nn.graph import Edges, normalized_knn
from recbole_slifmr.nn.loss import contrast_nodes
from recbole_slifmr.nn.sparse import SparseMatrix


@dataclass(frozen=True)
class ViewSettings(FeatureSettings, GraphSettings):
    """The settings of a model that contrasts views."""

    knn_k: Count
    cl_weight: Weight
    temperature: Positive
    n_negatives: Count
    reg_weight: Weight


class GatedView(nn.Module):
    r"""A view of the items: :math:`\hat S (e \odot \sigma(G h + c))`, the gated ID embeddings of the neighbours.

    Args:
        graph: the normalised item graph :math:`\hat S`, symmetric. An item without an edge has zeros as its view.
        n_items: number of items.
        size: dimension of ID embeddings and features.
    """

    def __init__(self, graph: Edges, n_items: int, size: int) -> None:
        super().__init__()
        self.graph = SparseMatrix(graph, (n_items, n_items), symmetric=True)
        self.gate = nn.Linear(size, size)

    def forward(self, item_embedding: Tensor, features: Tensor) -> Tensor:
        """Return the view of all items, from ID embeddings e and features h; ``[n_items, d]`` each."""
        return self.graph.multiply(item_embedding * torch.sigmoid(self.gate(features)))


class ViewRecommender(GraphRecommender):
    """A model of several views of each node, trained with BPR and InfoNCE between views.

    A model of this kind says in ``encode`` what its views are, and in ``fuse`` what becomes of them, node by node.

    Args:
        config: RecBole's configuration.
        dataset: a :class:`~recbole_slifmr.data.dataset.SLIFMRDataset`, the training split.
    """

    settings: ViewSettings
    needs_features = True
    loss_names = ("bpr", "contrast", "reg")

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        size, features = self.settings.embedding_size, self.item_features(dataset)
        self.projections: Mapping[str, FeatureProjection] = nn.ModuleDict(  # type: ignore[assignment]
            {name: FeatureProjection(values, size) for name, values in features.items()}
        )
        self.views: Mapping[str, GatedView] = nn.ModuleDict(  # type: ignore[assignment]
            {name: GatedView(edges, self.n_items, size) for name, edges in self.view_graphs(features).items()}
        )

    @classmethod
    def memory_parts(cls, settings: Any, dataset: Any, batch_size: int) -> dict[str, int]:
        """Return the bytes of the base, of the item graphs, of every view and of the similarities of the contrast."""
        parts = super().memory_parts(settings, dataset, batch_size)
        n_views, n_items = 1 + len(dataset.item_features), dataset.item_num
        nodes = 4 * settings.embedding_size * (dataset.user_num + n_items)
        parts["item graphs"] = 12 * 1024 * n_items + 60 * 2 * settings.knn_k * n_items * n_views
        parts["training step"] += 8 * n_views * nodes
        parts["training step"] += 24 * n_views * batch_size * min(batch_size, settings.n_negatives)
        return parts

    def view_graphs(self, features: Mapping[str, ItemFeatures]) -> dict[str, Edges]:
        """Return the item graph of each gated view: here one of the nearest neighbours in each modality."""
        return {name: normalized_knn(values, self.settings.knn_k, mask) for name, (values, mask) in features.items()}

    def with_users(self, items: Tensor) -> Tensor:
        """Return a view of all nodes from that of the items ``[n_items, d]``: users by their interactions."""
        return torch.cat([self.interaction_encoder.graph.matrix.multiply(items), items])

    def encode(self) -> tuple[Tensor, list[Tensor]]:
        """Return the interaction view and the other views of all nodes, each ``[n_users + n_items, d]``."""
        raise NotImplementedError

    def fuse(self, interactions: Tensor, views: list[Tensor]) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Return the final embeddings of some nodes, and which of their views InfoNCE contrasts: query and key.

        Args:
            interactions: their interaction view, ``[n, d]``.
            views: the others, ``[n, d]`` each.
        """
        raise NotImplementedError

    def forward(self) -> tuple[Tensor, Tensor]:
        """Return the final embeddings of all users and items ``[n, d]``."""
        users, items = self.fuse(*self.encode())[0].split([self.n_users, self.n_items])
        return users, items

    @full_precision
    def calculate_loss(self, interaction: Any) -> tuple[Tensor, ...]:
        """Return the weighted terms of the loss for a batch of (user, positive item, negative item)."""
        self.clear_cache()
        user, pos, neg = self.batch_ids(interaction)
        reg = self.ego_norm(user, pos, neg)
        nodes = torch.cat([user, pos + self.n_users, neg + self.n_users])
        nodes, place = nodes.unique(return_inverse=True)  # views are fused of the batch's nodes only
        interactions, views = self.encode()
        final, pairs = self.fuse(interactions.index_select(0, nodes), [view.index_select(0, nodes) for view in views])
        user, pos, neg = place.chunk(3)
        bpr = self.bpr(final.index_select(0, user), final, pos, neg)
        limits = self.settings.temperature, self.settings.n_negatives
        contrast = contrast_nodes(pairs, user, *limits) + contrast_nodes(pairs, pos, *limits)
        return bpr, self.settings.cl_weight * contrast, self.settings.reg_weight * reg
