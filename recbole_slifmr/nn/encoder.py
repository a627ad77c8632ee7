r"""The three encoders of SLIF-MR (arXiv 2507.09998), one per kind of graph, and AdaKG's of triples; free of RecBole.

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
    inverse_sqrt,
    normalize_symmetric,
    normalized_knn,
    sample_interactions,
    unique_edges,
)
from recbole_slifmr.nn.layers import light_propagation, unit
from recbole_slifmr.nn.sparse import RelationalMatrix, SparseMatrix

RELATION_WEIGHTS = ("learned", "uniform")
MOST_AHEAD = 2**28  # numbers of users' mean features, 1 GiB


class InteractionGraph(nn.Module):
    r"""The normalised interactions :math:`\hat R`, ``[n_users, n_items]``.

    Args:
        edge_index: user and item of each interaction, ``[2, E]``, unique.
        n_users: number of users.
        n_items: number of items.
    """

    item_scale: Tensor

    def __init__(self, edge_index: Tensor, n_users: int, n_items: int) -> None:
        super().__init__()
        shape = (n_users, n_items)
        ones = torch.ones(edge_index.shape[1], device=edge_index.device)
        self.matrix = SparseMatrix(Edges(edge_index, normalize_symmetric(edge_index, ones, shape)), shape)
        degree = torch.bincount(edge_index[1], minlength=n_items)
        self.register_buffer("item_scale", degree.to(ones.dtype).sqrt().unsqueeze(1), persistent=False)

    def user_means(self, items: Tensor, mask: Tensor) -> Tensor:
        r"""Average the items that a user interacted with, over those that have the view; zeros for users without any.

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

    In training mode the pruned graph is used, in evaluation mode the whole one.

    Args:
        edge_index: user and item of each training interaction, ``[2, E]``; duplicates count once.
        n_users: number of users.
        n_items: number of items.
        n_layers: number of layers.
    """

    edge_index: Tensor
    edge_keys: Tensor
    kept: Tensor | None

    def __init__(self, edge_index: Tensor, n_users: int, n_items: int, n_layers: int) -> None:
        super().__init__()
        self.n_users, self.n_items, self.n_layers = n_users, n_items, n_layers
        self.register_buffer("edge_index", unique_edges(edge_index, n_items), persistent=False)
        keys = self.edge_index[0] * n_items + self.edge_index[1]  # sorted, as the edges are
        self.register_buffer("edge_keys", keys, persistent=False)
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
        place = torch.searchsorted(self.edge_keys, pairs).clamp_(max=len(self.edge_keys) - 1)
        return self.edge_keys[place] == pairs

    def set_item_block(self, edges: Edges) -> None:
        """Set the item-item block, a symmetric matrix."""
        shape = (self.n_items, self.n_items)
        self.item_block = SparseMatrix(edges, shape, symmetric=True) if len(edges.edge_weight) else None

    def prune(self, ratio: float, seed: int) -> None:
        """Leave a share of the interactions out of training propagation; see ``graph.sample_interactions``."""
        self.kept = sample_interactions(self.edge_index, self.n_users, self.n_items, ratio, seed) if ratio else None
        self.pruned = self.whole
        if self.kept is not None:
            self.pruned = InteractionGraph(self.edge_index[:, self.kept], self.n_users, self.n_items)

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
    ) -> None:
        super().__init__()
        self.n_items, self.n_layers, self.knn_k = features.shape[0], n_layers, knn_k
        self.register_buffer("mask", mask, persistent=False)
        self.register_buffer("features", F.normalize(features, dim=1) * mask.unsqueeze(1), persistent=False)
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
        self.eta, self.feedback = eta, _feedback_matrix(feedback, eta, self.n_items)
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

    def new_rows(self, features: Tensor, item_embedding: Tensor) -> tuple[Tensor, Tensor]:
        """Return the view of new items, and their neighbours among the items, the nearest by cosine.

        A new item takes from its neighbours what it would if it had been there from the start and was nobody's
        neighbour; the correlation graph has no part in it.

        Args:
            features: ``[n, d_m]``; a row of zeros has no neighbours.
            item_embedding: of the items, ``[n_items, size]``; that of a new one counts as zero.

        Returns:
            ``[n, size]``, and the weights of the neighbours, ``[n, n_items]``.
        """
        rows = F.normalize(features, dim=1)
        degree = torch.bincount(self.graph.edges().edge_index[0], minlength=self.n_items).clamp(min=1)
        cosine, near = (rows @ self.features.T).topk(min(self.knn_k, self.n_items), dim=1)
        kept = (cosine > 0).to(rows.dtype)
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


class KnowledgeEncoder(nn.Module):
    r"""Light propagation over the knowledge graph, with one positive weight per relation and direction.

    An edge of relation r weighs :math:`w_r = e^{\theta_r}`; edges are normalised symmetrically by the weighted degrees.
    Items share their ID embedding; the other entities have one of their own. The correlation graph of a refresh is one
    more relation, ``feedback``, whose weight starts at ``eta``.

    Without ``ego`` the layers 1 to L are averaged: an item is what the graph says of it. Its own embedding, layer 0, is
    the interaction view's already; with it the two views come out nearly the same.

    Only items are asked for, so layer L - k needs the rows within k hops of an item and no others:
    :math:`\sum_{l=1}^{L} A^l E = A_0 (E + A_1 (E + \dots A_{L-1} E))` with :math:`A_k` these rows of A. Entities more
    than L hops away have no part in it and get no embedding.

    Args:
        triples: head, relation and tail, ``[T, 3]``; entity i is item i for ``i < n_items``. Duplicates count once.
        n_entities: number of entities, items included.
        n_items: number of items.
        size: embedding dimension.
        n_layers: number of layers.
        relation_weight: ``learned`` or ``uniform``.
        degree_range: entities that are no items take part if their number of triples lies within; a maximum of 0 means
            no limit.
        ego: whether layer 0 counts; an item without a neighbour has this view only then.

    Raises:
        ValueError: for an unknown ``relation_weight``.
    """

    mask: Tensor
    linked: Tensor
    feedback_degree: Tensor

    def __init__(
        self,
        triples: Tensor,
        n_entities: int,
        n_items: int,
        size: int,
        n_layers: int,
        relation_weight: str = "learned",
        degree_range: tuple[int, int] = (1, 0),
        ego: bool = False,
    ) -> None:
        super().__init__()
        if relation_weight not in RELATION_WEIGHTS:
            raise ValueError(
                f"kg_relation_weight must be one of {', '.join(RELATION_WEIGHTS)}, not '{relation_weight}'"
            )
        self.n_items, self.n_layers, self.ego = n_items, n_layers, ego or n_layers == 0
        triples = filter_by_degree(unique_triples(triples), n_entities, n_items, degree_range)
        self.n_triples = len(triples)
        relation = torch.unique(triples[:, 1], return_inverse=True)[1]
        if relation_weight == "uniform":
            relation = torch.zeros_like(relation)
        n_relations = int(relation.max()) + 1 if len(relation) else 0
        row = torch.cat([triples[:, 0], triples[:, 2]])
        col = torch.cat([triples[:, 2], triples[:, 0]])
        relation = torch.cat([relation, relation + n_relations])
        node, n_within = _order_by_hops(row, col, n_entities, n_items, n_layers)
        self.n_nodes = n_within[-1]
        known = node[row] < self.n_nodes
        row, col, relation = node[row[known]], node[col[known]], relation[known]
        self.relation_counts = _relation_counts(row, relation, (self.n_nodes, 2 * n_relations))
        self.layers = nn.ModuleList()  # from the items outwards
        for k in range(n_layers):
            inside = row < n_within[k]
            edge_index, shape = torch.stack([row[inside], col[inside]]), (n_within[k], n_within[k + 1])
            self.layers.append(RelationalMatrix(edge_index, relation[inside], 2 * n_relations, shape))
        self.register_buffer("linked", torch.bincount(row, minlength=n_items)[:n_items] > 0, persistent=False)
        self.entity_embedding = nn.Embedding(self.n_nodes - n_items, size)
        self.relation_log_weight = nn.Parameter(
            torch.zeros(2 * n_relations + 1), requires_grad=relation_weight == "learned"
        )
        self.set_feedback(empty_edges(triples.device), 0.0)

    def set_feedback(self, feedback: Edges, eta: float) -> None:
        """Add the edges of the correlation graph as a relation of weight ``eta`` (0: without)."""
        ones = torch.ones_like(feedback.edge_weight)
        self.eta, self.feedback = eta, _feedback_matrix(Edges(feedback.edge_index, ones), eta, self.n_items)
        degree = torch.bincount(feedback.edge_index[0], minlength=self.n_items) * (self.feedback is not None)
        self.register_buffer("feedback_degree", degree.to(ones.dtype), persistent=False)
        self.register_buffer("mask", self.linked | (degree > 0) | self.ego, persistent=False)

    def forward(self, item_embedding: Tensor) -> Tensor:
        """Return the KG's view of every item, ``[n_items, size]``; zeros outside ``mask``."""
        weight = self.relation_log_weight.exp()
        relations, feedback = weight[:-1], self.eta * weight[-1]
        forth, back = relations.chunk(2)  # an edge of a row is that of a column the other way round
        degree = self.relation_counts.multiply(torch.stack([relations, torch.cat([back, forth])], dim=1))
        degree = degree + F.pad(feedback * self.feedback_degree, (0, self.n_nodes - self.n_items)).unsqueeze(1)
        row_scale, col_scale = inverse_sqrt(degree).split(1, dim=1)
        nodes = torch.cat([item_embedding, self.entity_embedding.weight])
        hidden, gathered = nodes, torch.zeros_like(item_embedding)
        for k in reversed(range(self.n_layers)):
            scaled = hidden * col_scale[: len(hidden)]
            gathered = self.layers[k].multiply(scaled, relations)  # type: ignore[operator]
            if self.feedback is not None:
                items = self.feedback.multiply(scaled[: self.n_items])
                gathered = gathered + F.pad(feedback * items, (0, 0, 0, len(gathered) - self.n_items))
            gathered = gathered * row_scale[: len(gathered)]
            hidden = nodes[: len(gathered)] + gathered if k else gathered
        if self.ego:
            return (item_embedding + gathered) / (self.n_layers + 1)
        return gathered / self.n_layers


class TripleEncoder(nn.Module):
    r"""Entities by the triples around them, users by their items; of unit length in every layer but 0.

    .. math::
        k_h^{(l+1)} = \overline{\mathrm{mean}_{(r, t) \in N_h} \; e_r \odot k_t^{(l)}}, \quad
        k_u^{(l+1)} = \overline{\mathrm{mean}_{i \in u} \; k_i^{(l)}}, \quad
        k = \frac{1}{L + 1} \sum_{l=0}^{L} k^{(l)}, \quad \overline{x} = x / \|x\|

    :math:`N_h` has the triples of :math:`h` as head, and those as tail under a relation of their own.

    Args:
        triples: head, relation and tail, ``[T, 3]``; entity i is item i for ``i < n_items``. Duplicates count once.
        n_entities: number of entities, items included.
        n_items: number of items.
        size: embedding dimension.
        n_layers: number of layers.
    """

    relation: Tensor
    entity: Tensor

    def __init__(self, triples: Tensor, n_entities: int, n_items: int, size: int, n_layers: int) -> None:
        super().__init__()
        self.n_items, self.n_layers = n_items, n_layers
        head, relation, tail = unique_triples(triples).T
        relation = torch.unique(relation, return_inverse=True)[1]
        n_relations = int(relation.max()) + 1
        self.entity_embedding = nn.Embedding(n_entities - n_items, size)
        self.relation_embedding = nn.Embedding(2 * n_relations, size)
        row, entity = torch.cat([head, tail]), torch.cat([tail, head])
        key = torch.cat([relation, relation + n_relations]) * n_entities + entity
        pairs, col = torch.unique(key, return_inverse=True)  # a product once, however many entities have it
        self.register_buffer("relation", pairs // n_entities, persistent=False)
        self.register_buffer("entity", pairs % n_entities, persistent=False)
        weight = 1 / torch.bincount(row)[row].to(torch.get_default_dtype())
        self.mean = SparseMatrix(Edges(torch.stack([row, col]), weight), (n_entities, len(pairs)))

    def forward(self, user_embedding: Tensor, item_embedding: Tensor, graph: InteractionGraph) -> tuple[Tensor, Tensor]:
        """Encode ``[n_users, d]`` and ``[n_items, d]`` with the interactions; same shapes out."""
        everyone = torch.ones(self.n_items, dtype=torch.bool, device=item_embedding.device)
        entities = torch.cat([item_embedding, self.entity_embedding.weight])
        all_users, all_items = user_embedding, item_embedding
        for _ in range(self.n_layers):
            all_users = all_users + unit(graph.user_means(entities[: self.n_items], everyone))
            products = entities.index_select(0, self.entity) * self.relation_embedding(self.relation)
            entities = unit(self.mean.multiply(products))
            all_items = all_items + entities[: self.n_items]
        return all_users / (self.n_layers + 1), all_items / (self.n_layers + 1)


def _feedback_matrix(feedback: Edges, eta: float, n_items: int) -> SparseMatrix | None:
    if eta == 0 or feedback.edge_index.shape[1] == 0:
        return None
    return SparseMatrix(feedback, (n_items, n_items), symmetric=True)


def _order_by_hops(row: Tensor, col: Tensor, n_entities: int, n_items: int, n_hops: int) -> tuple[Tensor, list[int]]:
    """Give the nodes new numbers by their distance from the items, which keep theirs.

    Args:
        row: one end of each edge, both directions, ``[E]``.
        col: the other end, ``[E]``.
        n_entities: number of nodes.
        n_items: the first nodes are the items.
        n_hops: how far to go.

    Returns:
        the new number of each node, ``[n_entities]``, with those further away last, and how many nodes lie within
        0, 1 ... ``n_hops`` hops.
    """
    hops = torch.full((n_entities,), n_hops + 1, device=row.device)
    hops[:n_items] = 0
    for hop in range(1, n_hops + 1):
        reached = col[hops[row] == hop - 1]
        hops[reached] = hops[reached].clamp(max=hop)
    node = torch.empty_like(hops)
    node[torch.argsort(hops, stable=True)] = torch.arange(n_entities, device=row.device)
    return node, [int((hops <= hop).sum()) for hop in range(n_hops + 1)]


def _relation_counts(row: Tensor, relation: Tensor, shape: tuple[int, int]) -> SparseMatrix:
    """Return how many edges of each relation a node has, ``[n_nodes, n_relations]``."""
    keys, counts = torch.unique(row * max(shape[1], 1) + relation, return_counts=True)
    index = torch.stack([torch.div(keys, max(shape[1], 1), rounding_mode="floor"), keys % max(shape[1], 1)])
    return SparseMatrix(Edges(index, counts.to(torch.get_default_dtype())), shape)


def unique_triples(triples: Tensor) -> Tensor:
    """Return each triple once, in order; by one key each, for ``torch.unique`` by rows takes twenty times as long."""
    n_heads, n_relations, n_tails = (triples.amax(0) + 1).tolist() if len(triples) else (1, 1, 1)
    if n_heads * n_relations * n_tails >= 2**63:
        return torch.unique(triples, dim=0)
    keys = torch.unique((triples[:, 0] * n_relations + triples[:, 1]) * n_tails + triples[:, 2])
    pairs, tail = torch.div(keys, n_tails, rounding_mode="floor"), keys % n_tails
    return torch.stack([torch.div(pairs, n_relations, rounding_mode="floor"), pairs % n_relations, tail], dim=1)


def filter_by_degree(triples: Tensor, n_entities: int, n_items: int, degree_range: tuple[int, int]) -> Tensor:
    """Keep the triples whose non-item ends have a number of triples within the range."""
    low, high = degree_range
    degree = torch.bincount(triples[:, [0, 2]].flatten(), minlength=n_entities)
    allowed = (degree >= low) & (degree <= high) if high else degree >= low
    allowed[:n_items] = True
    return triples[allowed[triples[:, 0]] & allowed[triples[:, 2]]]
