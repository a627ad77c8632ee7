r"""FREEDOM: a frozen item graph from the features, and a denoised user-item graph.

Zhou, Shen, "A Tale of Two Graphs: Freezing and Denoising Graph Structures for Multimodal Recommendation", ACM MM 2023,
arXiv 2211.06924.

.. math::
    S = \sum_m \alpha_m \hat S^m, \quad z_i = e_i^{\mathrm{LightGCN}} + (S^L E)_i, \quad
    L = \mathrm{BPR}(z_u, z_i) + \lambda \sum_m \mathrm{BPR}(z_u, W_m x_i^m) .

:math:`\hat S^m`, the unweighted nearest neighbours by raw features, is built once. Training propagates over what
:meth:`FREEDOM.prune_interactions` leaves of the interactions, kept with probability proportional to
:math:`1 / \sqrt{d_u d_i}` and drawn anew every epoch; evaluation over all of them.

Deviations: neighbourhoods are undirected and without i->i edge; pruning cuts no node off; a feature term counts the
pairs where both items have the modality, and its map has no bias, which would cancel. Features stay fixed (the authors'
code fine-tunes them). The ID embedding of a cold item counts as zero: its neighbours alone say what it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from recbole_slifmr.data.features import ItemFeatures
from recbole_slifmr.errors import SettingError
from recbole_slifmr.model.base import FeatureProjection, GraphRecommender, full_precision
from recbole_slifmr.model.settings import Count, FeatureSettings, GraphSettings, Weight, Whole
from recbole_slifmr.nn.graph import Edges, normalized_knn, sum_edges
from recbole_slifmr.nn.loss import bpr_loss
from recbole_slifmr.nn.sparse import SparseMatrix


def read_weights(features: Mapping[str, ItemFeatures], weights: Mapping[str, float] | None) -> Mapping[str, float]:
    """Return the weight of each modality, equal ones if there are none.

    Raises:
        SettingError: if ``weights`` does not name just the modalities, or a weight is negative or all are 0.
    """
    weights = weights or dict.fromkeys(features, 1.0)
    named = isinstance(weights, Mapping) and set(weights) == set(features)
    if not named or min(weights.values()) < 0 or not any(weights.values()):
        raise SettingError(f"modality_weights must give each of {', '.join(features)} a weight, not {weights}")
    return weights


def frozen_graph(features: Mapping[str, ItemFeatures], k: int, weights: Mapping[str, float] | None = None) -> Edges:
    """Return the weighted sum of the normalised nearest-neighbour graphs of all modalities.

    Args:
        features: by modality.
        k: neighbours per item in each of them.
        weights: of each modality, scaled to add up to 1; equal if empty.

    Raises:
        SettingError: if ``weights`` does not name just the modalities, or a weight is negative or all are 0.
    """
    weights = read_weights(features, weights)
    total = sum(weights.values())
    graphs = {name: normalized_knn(values, k, mask) for name, (values, mask) in features.items()}
    return sum_edges(
        torch.cat([edges.edge_index for edges in graphs.values()], dim=1),
        torch.cat([weights[name] / total * edges.edge_weight for name, edges in graphs.items()]),
        len(next(iter(features.values())).mask),
    )


@dataclass(frozen=True)
class FREEDOMSettings(FeatureSettings, GraphSettings):
    """The settings of FREEDOM."""

    item_n_layers: Whole
    knn_k: Count
    modality_weights: dict | None
    feature_weight: Weight


class FREEDOM(GraphRecommender):
    """LightGCN on pruned interactions plus the item embeddings propagated over a frozen item graph.

    Args:
        config: RecBole's configuration; the settings are listed in ``properties/model/FREEDOM.yaml``.
        dataset: a :class:`~recbole_slifmr.data.dataset.SLIFMRDataset`, the training split.
    """

    settings_class = FREEDOMSettings
    settings: FREEDOMSettings
    needs_features = True
    loss_names = ("bpr", "feature")

    @classmethod
    def check(cls, config: Any, dataset: Any) -> None:
        """Refuse weights that are none of the modalities', beside what every model refuses."""
        super().check(config, dataset)
        read_weights(dataset.item_features, cls.settings_class.read(config).modality_weights)

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        features = self.item_features(dataset)
        item_graph = frozen_graph(features, self.settings.knn_k, self.settings.modality_weights)
        self.item_graph = SparseMatrix(item_graph, (self.n_items, self.n_items))
        self.projections: Mapping[str, FeatureProjection] = nn.ModuleDict(  # type: ignore[assignment]
            {name: FeatureProjection(features[name], self.settings.embedding_size, bias=False) for name in features}
        )
        self.reset_parameters()

    @classmethod
    def memory_parts(cls, settings: Any, dataset: Any, batch_size: int) -> dict[str, int]:
        """Return the bytes of the base, of the item graph and of a pruned copy of the interactions."""
        parts = super().memory_parts(settings, dataset, batch_size)
        n_edges = 2 * settings.knn_k * dataset.item_num * len(dataset.item_features)
        parts["item graphs"] = 12 * 1024 * dataset.item_num + 60 * n_edges
        parts["interaction graph"] *= 1 + (settings.prune_ratio > 0)
        return parts

    def prune_interactions(self, seed: int) -> None:
        """Draw anew which interactions are left out of training propagation."""
        self.interaction_encoder.prune(self.settings.prune_ratio, seed)

    def forward(self) -> tuple[Tensor, Tensor]:
        """Return the final embeddings of all users and items ``[n, d]``."""
        hidden = item_embedding = self.known(self.item_embedding.weight)
        for _ in range(self.settings.item_n_layers):
            hidden = self.item_graph.multiply(hidden)
        users, items = self.interaction_encoder(self.user_embedding.weight, item_embedding)
        return users, items + hidden

    @full_precision
    def calculate_loss(self, interaction: Any) -> tuple[Tensor, ...]:
        """Return BPR of the final items and of their features, for a batch of (user, positive item, negative item)."""
        self.clear_cache()
        user, pos, neg = self.batch_ids(interaction)
        users, items = self()
        z_user = users.index_select(0, user)
        bpr = self.bpr(z_user, items, pos, neg)
        feature = torch.zeros_like(bpr)
        for projection in self.projections.values():
            pos_score, neg_score = ((z_user * projection(ids)).sum(1) for ids in (pos, neg))
            feature = feature + bpr_loss(pos_score, neg_score, projection.mask[pos] & projection.mask[neg])
        return bpr, self.settings.feature_weight * feature
