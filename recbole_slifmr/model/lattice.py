r"""LATTICE: item-item graphs learned from the features, under LightGCN.

Zhang, Zhu, Liu, Wu, Wang, Wang, "Mining Latent Structures for Multimedia Recommendation", ACM MM 2021,
arXiv 2104.09036.

Per modality m, with :math:`\tilde x = W_m x + b_m` and :math:`S(x)` the cosines of each item with its k nearest
neighbours, normalised symmetrically:

.. math::
    A = \sum_m \alpha_m \left(\lambda S(x^m) + (1 - \lambda) S(\tilde x^m)\right), \quad \alpha = \mathrm{softmax}(w),
    \qquad z_i = e_i^{\mathrm{LightGCN}} + (A^L E)_i / \|(A^L E)_i\| .

The graph is built once an epoch: in the first batch after :meth:`LATTICE.start_epoch` gradients reach the projections
and the modality weights, in the others it is a constant, as in the authors' code. Evaluation builds it from the
parameters as they are: they determine the scores, and a checkpoint needs nothing more.

Here it is sparse: the neighbours are found in blocks without gradient, then the cosines of just these edges are taken
with it. Deviations: neighbourhoods are undirected, without i->i edge and without negative cosines; items lacking a
modality have no edge in it. As in the paper, each modality's learned graph is normalised by itself (the authors' code
normalises their sum). Features stay fixed (the code fine-tunes them).
The ID embedding of a cold item counts as zero: its neighbours alone say what it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from recbole.model.init import xavier_uniform_initialization
from torch import Tensor, nn
from torch.nn import functional as F

from recbole_slifmr.data.features import ItemFeatures
from recbole_slifmr.errors import SettingError
from recbole_slifmr.model.base import FeatureProjection, MultimodalRecommender
from recbole_slifmr.nn.encoder import InteractionEncoder
from recbole_slifmr.nn.graph import Edges, blend, knn_graph, normalize_symmetric, sum_edges
from recbole_slifmr.nn.loss import bpr_loss, l2_loss
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


class LATTICE(MultimodalRecommender):
    """LightGCN plus the item embeddings propagated over a learned item graph.

    Args:
        config: RecBole's configuration; the settings are listed in ``properties/model/LATTICE.yaml``.
        dataset: a :class:`~recbole_slifmr.data.dataset.SLIFMRDataset`, the training split.

    Raises:
        SettingError: if ``lambda_coeff`` is outside [0, 1].
    """

    loss_names = ("bpr", "reg")

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        self.reg_weight: float = config["reg_weight"]
        self.item_n_layers: int = config["item_n_layers"]
        size, lambda_coeff = config["embedding_size"], config["lambda_coeff"]
        if not 0 <= lambda_coeff <= 1:
            raise SettingError(f"lambda_coeff must be in [0, 1], not {lambda_coeff}")
        self.user_embedding = nn.Embedding(self.n_users, size)
        self.item_embedding = nn.Embedding(self.n_items, size)
        self.interaction_encoder = InteractionEncoder(
            self.training_interactions(dataset), self.n_users, self.n_items, config["n_layers"]
        )
        self.modality_graphs: Mapping[str, ModalityGraph] = nn.ModuleDict(  # type: ignore[assignment]
            {
                name: ModalityGraph(features, config["feature_embedding_size"], config["knn_k"], lambda_coeff)
                for name, features in self.item_features(dataset).items()
            }
        )
        self.modality_weight = nn.Parameter(torch.zeros(len(self.modality_graphs)))
        self.item_graph: SparseMatrix | None = None
        self.apply(xavier_uniform_initialization)

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

    def forward(self) -> tuple[Tensor, Tensor]:
        """Return the final embeddings of all users and items ``[n, d]``, in training over the epoch's item graph."""
        weight = None
        graph = self.item_graph if self.training else None
        if graph is None:
            index, weight = self.build_item_graph()
            graph = SparseMatrix(Edges(index, weight.detach()), (self.n_items, self.n_items))
            if self.training:
                self.item_graph = graph
        hidden = item_embedding = self.known(self.item_embedding.weight)
        for _ in range(self.item_n_layers):
            hidden = graph.multiply(hidden, weight)
        users, items = self.interaction_encoder(self.user_embedding.weight, item_embedding)
        return users, items + F.normalize(hidden, dim=1)

    @torch.autocast("cpu", enabled=False)  # sparse products have no half precision
    @torch.autocast("cuda", enabled=False)
    def calculate_loss(self, interaction: Any) -> tuple[Tensor, ...]:
        """Return BPR and the regularisation of a batch of (user, positive item, negative item)."""
        self.clear_cache()
        user, pos, neg = self.batch_ids(interaction)
        users, items = self()
        z_user = users.index_select(0, user)
        bpr = bpr_loss((z_user * items.index_select(0, pos)).sum(1), (z_user * items.index_select(0, neg)).sum(1))
        reg = l2_loss(self.user_embedding(user), self.item_embedding(pos), self.item_embedding(neg))
        return bpr, self.reg_weight * reg
