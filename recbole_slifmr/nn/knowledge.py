"""The encoder of the knowledge graph of SLIF-MR (arXiv 2507.09998) and AdaKG's of its triples; free of RecBole."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recbole_slifmr.nn.encoder import InteractionGraph, feedback_matrix
from recbole_slifmr.nn.graph import Edges, empty_edges, inverse_sqrt
from recbole_slifmr.nn.layers import unit
from recbole_slifmr.nn.sparse import RelationalMatrix, SparseMatrix

RELATION_WEIGHTS = ("learned", "uniform")


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
        self.eta, self.feedback = eta, feedback_matrix(Edges(feedback.edge_index, ones), eta, self.n_items)
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
