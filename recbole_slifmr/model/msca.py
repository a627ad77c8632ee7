r"""MSCA: interactions, an item graph of shared users and gated features as views, aligned by contrast.

Li, Wang, "Multi-view Semantic Contrastive Alignment for Multimodal Recommendation", Proceedings of the ACM Web
Conference 2026, pages 5941-5952.

With :math:`z` the mean of the layers 1 to L of LightGCN (arXiv 2002.02126), :math:`e` the ID embeddings, :math:`\hat C`
the graph of the items that share most users, :math:`\hat S^m` that of the nearest neighbours by the features
:math:`x^m`, and users of every view by :math:`\hat R`, the normalised interactions:

.. math::
    v^{\mathrm{struct}} = \hat C e, \quad
    v^m = \hat S^m \left(e \odot \sigma(G_m (W_m x^m + b_m) + c_m)\right), \quad
    a = \mathrm{softmax}_v(q^\top \tanh(W v + b)), \\
    z' = z + \alpha \sum_v (1 - a_v) v, \quad
    L = \mathrm{BPR}(z') + w \sum_v \sum_{\mathrm{users, items}} \mathrm{InfoNCE}(z, v) + \lambda \|e\|^2 .

The contrast runs over the distinct users and the distinct positive items of a batch, each kind among its own. Layer 0
is left out of :math:`z`.

Deviations: item graphs are undirected, unweighted and without i->i edge; features are in rows of unit length and stay
fixed. A view that a node lacks is zero, and takes part in the attention as such: without it, a node of one view would
lose it, since :math:`a = 1`. The ID embedding of a cold item counts as zero: its neighbours alone say what it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from recbole_slifmr.model.settings import Count, Weight
from recbole_slifmr.model.views import ViewRecommender, ViewSettings
from recbole_slifmr.nn.graph import cooccurrence_graph, unweighted
from recbole_slifmr.nn.layers import Fusion
from recbole_slifmr.nn.sparse import SparseMatrix, later_layers


@dataclass(frozen=True)
class MSCASettings(ViewSettings):
    """The settings of MSCA."""

    n_layers: Count
    view_weight: Weight


class MSCA(ViewRecommender):
    """LightGCN without layer 0 plus attentively fused views of structure and modalities.

    Args:
        config: RecBole's configuration; the settings are listed in ``properties/model/MSCA.yaml``.
        dataset: a :class:`~recbole_slifmr.data.dataset.SLIFMRDataset`, the training split.
    """

    settings_class = MSCASettings
    settings: MSCASettings

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        index = cooccurrence_graph(self.interaction_encoder.edge_index, self.n_users, self.n_items, self.settings.knn_k)
        shape = (self.n_items, self.n_items)
        self.structure = SparseMatrix(unweighted(index, self.n_items), shape, symmetric=True)
        self.fusion = Fusion("attention", 1 + len(self.views), self.settings.embedding_size)
        self.reset_parameters()

    def propagate(self, items: Tensor) -> Tensor:
        """Return the mean of the layers from 1 on of all nodes, from the ID embeddings of the items."""
        matrix = self.interaction_encoder.graph.matrix
        return torch.cat(later_layers(matrix, self.user_embedding.weight, items, self.settings.n_layers))

    def encode(self) -> tuple[Tensor, list[Tensor]]:
        """Return the interaction view and those of structure and modalities, of all nodes ``[n, d]`` each."""
        item_embedding = self.known(self.item_embedding.weight)
        views = [self.structure.multiply(item_embedding)]
        views += [view(item_embedding, self.projections[name]()) for name, view in self.views.items()]
        return self.propagate(item_embedding), [self.with_users(view) for view in views]

    def fuse(self, interactions: Tensor, views: list[Tensor]) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Return the final embeddings of some nodes, and the interaction view to be contrasted with each other one."""
        stacked = torch.stack(views, dim=1)
        everyone = torch.ones(stacked.shape[:2], dtype=torch.bool, device=stacked.device)
        share = 1 - self.fusion.weights(stacked, everyone)
        final = interactions + self.settings.view_weight * (share.unsqueeze(2) * stacked).sum(1)
        return final, [(interactions, view) for view in views]
