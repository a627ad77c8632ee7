r"""The encoders of SLIF-MR (arXiv 2507.09998) for interactions and features; free of RecBole.

Every encoder of SLIF-MR owns its *initial* graph, which stays as it is: what a refresh brings, ``set_feedback`` and
``set_item_block`` put beside it, and errors cannot pile up over the refreshes.

The encoders are linear, and what can be done ahead is done ahead: ``docs/performance.md`` says what it saves.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recbole_slifmr.nn.graph import (
    Edges,
    blend,
    empty_edges,
    normalize_symmetric,
    normalized_knn,
    sample_interactions,
    unique_edges,
)
from recbole_slifmr.nn.layers import light_propagation
from recbole_slifmr.nn.sparse import SparseMatrix

MOST_AHEAD = 2**28  # numbers of users' mean features, 1 GiB


class InteractionGraph(nn.Module):
    r"""The normalised interactions :math:`\hat R`, ``[n_users, n_items]``.

    Args:
        edge_index: user and item of each interaction, ``[2, E]``, unique.
        n_users: number of users.
        n_items: number of items.
        edge_weight: of each interaction, ``[E]``, positive; 1 if None.
    """

    item_scale: Tensor

    def __init__(self, edge_index: Tensor, n_users: int, n_items: int, edge_weight: Tensor | None = None) -> None:
        super().__init__()
        shape = (n_users, n_items)
        weight = torch.ones(edge_index.shape[1], device=edge_index.device) if edge_weight is None else edge_weight
        self.matrix = SparseMatrix(Edges(edge_index, normalize_symmetric(edge_index, weight, shape)), shape)
        degree = weight.new_zeros(n_items).index_add(0, edge_index[1], weight)
        self.register_buffer("item_scale", degree.sqrt().unsqueeze(1), persistent=False)

    def user_means(self, items: Tensor, mask: Tensor) -> Tensor:
        r"""Average the items that a user interacted with, over those that have the view; zeros for users without any.

        Each item counts as the interaction does.

        With the item degrees d, :math:`R x = D_u^{1/2} \hat R D_i^{1/2} x`, and the users' factor cancels in the mean.

        Args:
            items: ``[n_items, d]``, zeros outside ``mask``.
            mask: ``[n_items]`` bool.

        Returns:
            ``[n_users, d]``.
        """
        total = self.matrix.multiply(items * self.item_scale)
        weight = self.matrix.multiply(mask.unsqueeze(1) * self.item_scale)
        return total / torch.where(weight > 0, weight, 1.0)

    def user_mask(self, mask: Tensor) -> Tensor:
        """Return whether a user interacted with any item of ``mask [n_items, V]``, ``[n_users, V]`` bool."""
        return self.matrix.multiply(mask.to(self.item_scale.dtype)) > 0


class InteractionEncoder(nn.Module):
    r"""Light propagation over users and items: :math:`[[0, \hat R], [\hat R^\top, B]]`.

    The item-item block ``B`` is empty until :meth:`set_item_block`.

    In training mode the pruned graph is used, in evaluation mode the whole one. All interactions weigh the same until
    :meth:`set_edge_weight`.

    Args:
        edge_index: user and item of each training interaction, ``[2, E]``; duplicates count once.
        n_users: number of users.
        n_items: number of items.
        n_layers: number of layers.
    """

    edge_index: Tensor
    edge_keys: Tensor
    edge_weight: Tensor | None
    kept: Tensor | None

    def __init__(self, edge_index: Tensor, n_users: int, n_items: int, n_layers: int) -> None:
        super().__init__()
        self.n_users, self.n_items, self.n_layers = n_users, n_items, n_layers
        self.register_buffer("edge_index", unique_edges(edge_index, n_items), persistent=False)
        keys = self.edge_index[0] * n_items + self.edge_index[1]  # sorted, as the edges are
        self.register_buffer("edge_keys", keys, persistent=False)
        self.register_buffer("edge_weight", None, persistent=False)
        self.register_buffer("kept", None, persistent=False)
        self.whole = self.pruned = InteractionGraph(self.edge_index, n_users, n_items)
        self.item_block: SparseMatrix | None = None

    @property
    def graph(self) -> InteractionGraph:
        """The graph in use: pruned in training mode, whole in evaluation mode."""
        return self.pruned if self.training else self.whole

    def contains(self, users: Tensor, items: Tensor) -> Tensor:
        """Return whether each pair of ``users`` and ``items``, of the same shape, is a training interaction, bool."""
        pairs = users * self.n_items + items
        if len(self.edge_keys) == 0:
            return torch.zeros_like(pairs, dtype=torch.bool)
        return self.edge_keys[self._places(pairs)] == pairs

    def weights(self, users: Tensor, items: Tensor) -> Tensor | None:
        """Return the weights of some training interactions, ``[B]`` like ``users`` and ``items``; None if all are 1."""
        if self.edge_weight is None:
            return None
        return self.edge_weight[self._places(users * self.n_items + items)]

    def _places(self, pairs: Tensor) -> Tensor:
        return torch.searchsorted(self.edge_keys, pairs).clamp_(max=len(self.edge_keys) - 1)

    def set_edge_weight(self, weight: Tensor) -> None:
        """Weigh the interactions of ``edge_index``, ``[E]``, positive."""
        self.edge_weight = weight
        self.whole = self.pruned = InteractionGraph(self.edge_index, self.n_users, self.n_items, weight)

    def set_item_block(self, edges: Edges) -> None:
        """Set the item-item block, a symmetric matrix."""
        shape = (self.n_items, self.n_items)
        self.item_block = SparseMatrix(edges, shape, symmetric=True) if len(edges.edge_weight) else None

    def prune(self, ratio: float, seed: int) -> None:
        """Leave a share of the interactions out of training propagation; see ``graph.sample_interactions``."""
        self.kept = sample_interactions(self.edge_index, self.n_users, self.n_items, ratio, seed) if ratio else None
        self.pruned = self.whole
        if self.kept is not None:
            weight = None if self.edge_weight is None else self.edge_weight[self.kept]
            self.pruned = InteractionGraph(self.edge_index[:, self.kept], self.n_users, self.n_items, weight)

    def forward(self, user_embedding: Tensor, item_embedding: Tensor) -> tuple[Tensor, Tensor]:
        """Propagate ``[n_users, d]`` and ``[n_items, d]``; same shapes out."""
        matrix = self.graph.matrix
        users, items = all_users, all_items = user_embedding, item_embedding
        for _ in range(self.n_layers):  # the blocks apart: half the time of one square matrix
            next_users, next_items = matrix.multiply(items), matrix.multiply_transposed(users)
            if self.item_block is not None:
                next_items = next_items + self.item_block.multiply(items)
            users, items = next_users, next_items
            all_users, all_items = all_users + users, all_items + items
        return all_users / (self.n_layers + 1), all_items / (self.n_layers + 1)


class FeatureEncoder(nn.Module):
    r"""Project a modality, optionally gate it by the ID embedding, propagate it over its item graph.

    :math:`h_i = W x_i \; [\odot\, \sigma(G e_i)]`, then light propagation over
    :math:`(1 - \eta_m) A_m^{(0)} + \eta_m S`.

    Without a gate :math:`P (X W) = (P X) W`: the features are propagated once per refresh, in ``set_feedback``, and
    averaged over the items of each user once per graph, so that a batch projects only its own rows. Where these means
    would be more than ``MOST_AHEAD`` numbers, items are projected first and then averaged, in every step.

    Args:
        features: ``[n_items, d_m]``; each row is scaled to unit length. A row of zeros has no neighbours but those of
            the correlation graph.
        mask: ``[n_items]`` bool, the items that have the modality.
        size: dimension of the output.
        knn_k: neighbours in the initial item graph.
        n_layers: number of layers.
        gate: whether to gate by the ID embedding.
        search: how the neighbours are found, see ``graph.knn_graph``.
        initial: the normalised initial item graph; if None, that of the nearest neighbours by ``features``.
    """

    features: Tensor
    mask: Tensor
    propagated: Tensor
    user_features: Tensor | None

    def __init__(
        self,
        features: Tensor,
        mask: Tensor,
        size: int,
        knn_k: int,
        n_layers: int,
        gate: bool = False,
        search: str = "exact",
        initial: Edges | None = None,
    ) -> None:
        super().__init__()
        self.n_items, self.n_layers, self.knn_k = features.shape[0], n_layers, knn_k
        self.register_buffer("mask", mask, persistent=False)
        self.register_buffer("features", F.normalize(features, dim=1) * mask.unsqueeze(1), persistent=False)
        if initial is None:
            initial = normalized_knn(features, knn_k, self.mask, search)
        self.graph = SparseMatrix(initial, (self.n_items, self.n_items), symmetric=True)
        self.projection = nn.Linear(features.shape[1], size, bias=False)
        self.gate = nn.Linear(size, size) if gate else None
        self.set_feedback(empty_edges(features.device), 0.0)

    def set_feedback(self, feedback: Edges, eta: float) -> None:
        """Blend the initial graph with the correlation graph; items without the modality stay out of it."""
        row, col = feedback.edge_index
        both = self.mask[row] & self.mask[col]
        feedback = Edges(feedback.edge_index[:, both], feedback.edge_weight[both])
        self.eta, self.feedback = eta, feedback_matrix(feedback, eta, self.n_items)
        self.register_buffer("propagated", None, persistent=False)
        self.register_buffer("user_features", None, persistent=False)
        self._averaged_over: tuple[InteractionGraph, ...] = ()  # in a tuple: no submodule
        if self.gate is None:
            self.propagated = light_propagation(self._multiply, self.features, self.n_layers)

    def edges(self) -> Edges:
        """Return the item graph, blended with the correlation graph."""
        feedback = empty_edges() if self.feedback is None else self.feedback.edges()
        return blend(self.graph.edges(), feedback, self.eta, self.n_items)

    def _multiply(self, items: Tensor) -> Tensor:
        if self.feedback is None:
            return self.graph.multiply(items)
        return (1 - self.eta) * self.graph.multiply(items) + self.eta * self.feedback.multiply(items)

    def forward(self, item_embedding: Tensor) -> Tensor:
        """Return the modality's view of every item, ``[n_items, size]``; zeros where the modality is missing."""
        if self.gate is None:
            return self.projection(self.propagated)
        hidden = self.projection(self.features) * torch.sigmoid(self.gate(item_embedding))
        return light_propagation(self._multiply, hidden, self.n_layers)

    def is_ahead(self, n_users: int) -> bool:
        """Return whether the features are averaged ahead, so that :meth:`rows` may be asked for."""
        return self.gate is None and n_users * self.features.shape[1] <= MOST_AHEAD

    def rows(self, graph: InteractionGraph, users: Tensor, items: Tensor) -> tuple[Tensor, Tensor]:
        """Return the view of some users and items without computing that of all; see :meth:`is_ahead`.

        Args:
            graph: the interactions that a user's mean is over.
            users: ``[B]``.
            items: ``[C]``.

        Returns:
            ``[B, size]`` and ``[C, size]``.
        """
        if self.user_features is None or self._averaged_over != (graph,):
            with torch.no_grad():
                self.user_features = graph.user_means(self.propagated, self.mask)
            self._averaged_over = (graph,)
        return self._project(self.user_features, users), self._project(self.propagated, items)

    def new_rows(
        self, features: Tensor, item_embedding: Tensor, likeness: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the view of new items, and their neighbours among the items, the nearest by likeness.

        A new item takes from its neighbours what it would if it had been there from the start and was nobody's
        neighbour; the correlation graph has no part in it.

        Args:
            features: ``[n, d_m]``; a row of zeros has no neighbours.
            item_embedding: of the items, ``[n_items, size]``; that of a new one counts as zero.
            likeness: of each new item to each item, ``[n, n_items]``; the cosine of their features if None.

        Returns:
            ``[n, size]``, and the weights of the neighbours, ``[n, n_items]``.
        """
        rows = F.normalize(features, dim=1)
        degree = torch.bincount(self.graph.edges().edge_index[0], minlength=self.n_items).clamp(min=1)
        likeness = rows @ self.features.T if likeness is None else likeness.to(rows.dtype)
        largest, near = likeness.topk(min(self.knn_k, self.n_items), dim=1)
        kept = (largest > 0).to(rows.dtype)
        weight = kept * (kept.sum(1, keepdim=True).clamp(min=1) * degree[near]).rsqrt()
        neighbours = torch.zeros(len(rows), self.n_items, dtype=rows.dtype, device=rows.device)
        neighbours.scatter_(1, near, weight)
        known = self.features
        if self.gate is not None:
            known = self.projection(known) * torch.sigmoid(self.gate(item_embedding))
            rows = self.projection(rows) * torch.sigmoid(self.gate.bias)
        if self.n_layers:  # layer l of a new item is layer l - 1 of its neighbours
            inner = light_propagation(self._multiply, known, self.n_layers - 1)
            rows = (rows + self.n_layers * (neighbours @ inner)) / (self.n_layers + 1)
        return (rows if self.gate is not None else self.projection(rows)), neighbours

    def _project(self, table: Tensor, rows: Tensor) -> Tensor:
        if len(rows) < len(table):
            return self.projection(table.index_select(0, rows))
        return self.projection(table).index_select(0, rows)


def feedback_matrix(feedback: Edges, eta: float, n_items: int) -> SparseMatrix | None:
    """Return the correlation graph that a refresh brings as a matrix; None where it counts nothing."""
    if eta == 0 or feedback.edge_index.shape[1] == 0:
        return None
    return SparseMatrix(feedback, (n_items, n_items), symmetric=True)
