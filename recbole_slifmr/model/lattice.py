r"""LATTICE: item-item graphs learned from the features, under LightGCN.

Zhang, Zhu, Liu, Wu, Wang, Wang, "Mining Latent Structures for Multimedia Recommendation", ACM MM 2021,
arXiv 2104.09036.

Per modality m, with :math:`\tilde x = W_m x + b_m` and :math:`S(x)` the cosines of each item with its k nearest
neighbours, normalised symmetrically:

.. math::
    A = \sum_m \alpha_m \left(\lambda S(x^m) + (1 - \lambda) S(\tilde x^m)\right), \quad \alpha = \mathrm{softmax}(w),
    \qquad z_i = e_i^{\mathrm{LightGCN}} + (A^L E)_i / \|(A^L E)_i\| .

The graph is built once an epoch: in the first batch after :meth:`LATTICE.start_epoch` gradients reach the projections
and the modality weights, in the others it is a constant, as in the authors' code. Evaluation takes that of the
parameters as they are: they determine the scores, and a checkpoint needs nothing more. It is built anew only when they
have changed, so that a sampler of negatives that asks for scores before every batch finds it ready.

Here it is sparse: the neighbours are found in blocks without gradient, then the cosines of just these edges are taken
with it. Deviations: neighbourhoods are undirected, without i->i edge and without negative cosines; items lacking a
modality have no edge in it. As in the paper, each modality's learned graph is normalised by itself (the authors' code
normalises their sum). Features stay fixed (the code fine-tunes them).
The ID embedding of a cold item counts as zero: its neighbours alone say what it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recbole_slifmr.data.features import ItemFeatures
from recbole_slifmr.model.base import FeatureProjection, GraphRecommender, full_precision
from recbole_slifmr.model.settings import Count, FeatureSettings, GraphSettings, Share, Weight, Whole
from recbole_slifmr.nn.graph import Edges, blend, knn_graph, normalize_symmetric, sum_edges
from recbole_slifmr.nn.sparse import SparseMatrix


def similarity_graph(features: Tensor, k: int, mask: Tensor) -> Edges:
    """Link each item with its k nearest neighbours, weighted by cosine and normalised; differentiable in the weights.

    Args:
        features: ``[n, d]``.
        k: neighbours per item.
        mask: ``[n]`` bool, the items that take part.
    """
    index = knn_graph(features.detach(), k, mask)
    unit = F.normalize(features, dim=1)
    cosine = torch.cat(  # in parts: the rows of all edges at once are many times the features
        [(unit.index_select(0, row) * unit.index_select(0, col)).sum(1) for row, col in _parts(index)]
    )
    n = features.shape[0]
    return Edges(index, normalize_symmetric(index, cosine.clamp(min=0), (n, n)))


def _parts(edge_index: Tensor, size: int = 65536) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(edge_index[0].split(size), edge_index[1].split(size), strict=True)


class ModalityGraph(FeatureProjection):
    """The item graph of a modality: that of the raw features, blended with that of the projected ones.

    Args:
        features: values ``[n_items, d_m]`` and mask ``[n_items]``.
        size: dimension of the projection.
        knn_k: neighbours per item, in either graph.
        lambda_coeff: share of the graph of the raw features.
    """

    initial_index: Tensor
    initial_weight: Tensor

    def __init__(self, features: ItemFeatures, size: int, knn_k: int, lambda_coeff: float) -> None:
        super().__init__(features, size)
        self.knn_k, self.lambda_coeff = knn_k, lambda_coeff
        initial = similarity_graph(self.values, knn_k, self.mask)
        self.register_buffer("initial_index", initial.edge_index, persistent=False)
        self.register_buffer("initial_weight", initial.edge_weight, persistent=False)

    def edges(self) -> Edges:
        """Return the blended graph; gradients of its weights reach the projection."""
        learned = similarity_graph(self(), self.knn_k, self.mask)
        initial = Edges(self.initial_index, self.initial_weight)
        return blend(initial, learned, 1 - self.lambda_coeff, len(self.mask))


@dataclass(frozen=True)
class LATTICESettings(FeatureSettings, GraphSettings):
    """The settings of LATTICE."""

    item_n_layers: Whole
    feature_embedding_size: Count
    knn_k: Count
    lambda_coeff: Share
    reg_weight: Weight


class LATTICE(GraphRecommender):
    """LightGCN plus the item embeddings propagated over a learned item graph.

    Args:
        config: RecBole's configuration; the settings are listed in ``properties/model/LATTICE.yaml``.
        dataset: a :class:`~recbole_slifmr.data.dataset.SLIFMRDataset`, the training split.
    """

    settings_class = LATTICESettings
    settings: LATTICESettings
    needs_features = True
    loss_names = ("bpr", "reg")

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        settings = self.settings
        self.modality_graphs: Mapping[str, ModalityGraph] = nn.ModuleDict(  # type: ignore[assignment]
            {
                name: ModalityGraph(features, settings.feature_embedding_size, settings.knn_k, settings.lambda_coeff)
                for name, features in self.item_features(dataset).items()
            }
        )
        self.modality_weight = nn.Parameter(torch.zeros(len(self.modality_graphs)))
        self.item_graph: SparseMatrix | None = None
        self._evaluated: tuple[Tensor, SparseMatrix] | None = None
        self.reset_parameters()

    @classmethod
    def memory_parts(cls, settings: Any, dataset: Any, batch_size: int) -> dict[str, int]:
        """Return the bytes of the base and of the item graphs, which keep two projected rows of each learned edge."""
        parts = super().memory_parts(settings, dataset, batch_size)
        n_edges = 2 * settings.knn_k * dataset.item_num * len(dataset.item_features)
        parts["item graphs"] = 12 * 1024 * dataset.item_num + (200 + 8 * settings.feature_embedding_size) * n_edges
        return parts

    def start_epoch(self) -> None:
        """Have the next training batch build the item graph anew."""
        self.item_graph = None

    def build_item_graph(self) -> Edges:
        """Return the item graph of all modalities; gradients of its weights reach every parameter it depends on."""
        share = torch.softmax(self.modality_weight, 0)
        graphs = [graph.edges() for graph in self.modality_graphs.values()]
        return sum_edges(
            torch.cat([edges.edge_index for edges in graphs], dim=1),
            torch.cat([share[m] * edges.edge_weight for m, edges in enumerate(graphs)]),
            self.n_items,
        )

    @torch.no_grad()
    def _graph_of_parameters(self) -> SparseMatrix:
        """Return the item graph of the parameters as they are, built when they are others than the last time."""
        parameters = torch.cat(
            [
                self.modality_weight,
                *(p.flatten() for graph in self.modality_graphs.values() for p in graph.parameters()),
            ]
        )
        if self._evaluated is None or not _same(self._evaluated[0], parameters):
            shape = (self.n_items, self.n_items)
            self._evaluated = parameters, SparseMatrix(self.build_item_graph(), shape)
        return self._evaluated[1]

    def forward(self) -> tuple[Tensor, Tensor]:
        """Return the final embeddings of all users and items ``[n, d]``, in training over the epoch's item graph."""
        weight = None
        if not self.training:
            graph = self._graph_of_parameters()
        elif self.item_graph is not None:
            graph = self.item_graph
        else:
            index, weight = self.build_item_graph()
            graph = self.item_graph = SparseMatrix(Edges(index, weight.detach()), (self.n_items, self.n_items))
        hidden = item_embedding = self.known(self.item_embedding.weight)
        for _ in range(self.settings.item_n_layers):
            hidden = graph.multiply(hidden, weight)
        users, items = self.interaction_encoder(self.user_embedding.weight, item_embedding)
        return users, items + F.normalize(hidden, dim=1)

    @full_precision
    def calculate_loss(self, interaction: Any) -> tuple[Tensor, ...]:
        """Return BPR and the regularisation of a batch of (user, positive item, negative item)."""
        self.clear_cache()
        user, pos, neg = self.batch_ids(interaction)
        users, items = self()
        bpr = self.bpr(users.index_select(0, user), items, pos, neg)
        return bpr, self.settings.reg_weight * self.ego_norm(user, pos, neg)


def _same(a: Tensor, b: Tensor) -> bool:
    return a.device == b.device and a.dtype == b.dtype and torch.equal(a, b)
