"""What an epoch of SLIFMR cannot take less than: the sparse products of the plain formula, and the optimiser's step.

Per training step, forward and backward: the interaction graph (``n_layers`` products of width d, its blocks apart), the
users' means (one of width d per view but the first), the graph of each modality and of the tags (``feature_n_layers``),
the knowledge graph if it has an encoder (``kg_n_layers``, over all its edges), all with the correlation graph of the
last refresh; then Adam over all parameters. Losses, fusion, projections and the gradient of the relation weights are
left out.

The strict floor leaves out what linearity lets one do ahead (the modalities' products and means) and the rows of the
knowledge graph's last layer that are no items.

The bound by memory bandwidth counts, per product, ``nnz * (4 d + 8)`` bytes read (a row of the dense matrix, an index
and a value for every entry) and ``4 d * rows`` bytes written, and 28 bytes per parameter for Adam, over the measured
bandwidth of a copy. Rows that are still in the cache come cheaper, so that a small graph can beat it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from recbole_slifmr.nn.graph import Edges, unique_edges
from recbole_slifmr.nn.sparse import SparseMatrix

REPEATS = 5
COPIED = 256 * 2**20  # bytes
Timer = Callable[[Callable[[], Any]], tuple[float, Any]]


class Product(NamedTuple):
    """A sparse product, forward and backward, that a step needs.

    Attributes:
        part: which part of the model asks for it.
        matrix: the matrix.
        width: columns of the dense matrix.
        times: how often a step needs it by the plain formula.
        strictly: how often it needs it in any case.
    """

    part: str
    matrix: SparseMatrix
    width: int
    times: int
    strictly: int

    def n_bytes(self) -> int:
        """Return the bytes that forward and backward move."""
        nnz, (rows, columns) = self.matrix.nnz, self.matrix.shape
        return self.times * (2 * nnz * (4 * self.width + 8) + 4 * self.width * (rows + columns))


def measure(model: Any, dataset: Any, config: Any, n_batches: int, timer: Timer) -> dict[str, Any]:
    """Return the floor of a step by part, of an epoch, and the bound by memory bandwidth; seconds.

    Args:
        model: a SLIFMR whose graphs were refreshed.
        dataset: its training split.
        config: its settings.
        n_batches: batches of an epoch.
        timer: returns the seconds that a function takes and its result.
    """
    device = model.device
    needed = products(model, dataset, config, model.other_parameter()["feedback_index"].to(device), device)
    parts: dict[str, float] = {}
    nnz: dict[str, int] = {}
    strict = optimiser = _optimiser_seconds(model, timer)
    for product in needed:
        seconds = _seconds(product, device, timer)
        strict += product.strictly * seconds
        if product.times:
            parts[product.part] = parts.get(product.part, 0.0) + product.times * seconds
            nnz[product.part] = nnz.get(product.part, 0) + product.matrix.nnz
    step = sum(parts.values()) + optimiser
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    bandwidth = copy_bandwidth(device, timer)
    bound = (sum(product.n_bytes() for product in needed) + 28 * parameters) / bandwidth
    return {
        "parts": {**parts, "optimiser": optimiser},
        "nnz": nnz,
        "step": step,
        "epoch": step * n_batches,
        "strict_step": strict,
        "strict_epoch": strict * n_batches,
        "bandwidth_gb_s": bandwidth / 1e9,
        "bound_step": bound,
        "bound_epoch": bound * n_batches,
    }


def products(model: Any, dataset: Any, config: Any, feedback: Tensor, device: torch.device) -> list[Product]:
    """Return the products of a training step; ``feedback`` is the correlation graph, ``[2, E]``."""
    n_users, n_items, size = dataset.user_num, dataset.item_num, config["embedding_size"]
    pairs = torch.stack([dataset.inter_feat[dataset.uid_field], dataset.inter_feat[dataset.iid_field]]).to(device)
    pairs = unique_edges(pairs, n_items)
    interactions = SparseMatrix(Edges(pairs, torch.ones(pairs.shape[1], device=device)), (n_users, n_items))
    has_kg, n_layers = model.kg_encoder is not None, config["n_layers"]
    nearest = {name: encoder.graph.edges().edge_index for name, encoder in model.feature_encoders.items()}
    between_items = [feedback, *(nearest.values() if config["item_graph_weight"] else ())]
    between_items += [model.structure.edge_index] if model.structure_weight else []
    block = _matrix([unique_edges(torch.cat(between_items, dim=1), n_items)], n_items)
    needed = [
        Product("interaction", interactions, size, 2 * n_layers, 2 * n_layers),  # to the users and to the items
        Product("interaction", block, size, n_layers, n_layers),
        Product("user_means", interactions, size, len(nearest) + has_kg, int(has_kg)),
    ]
    for name, neighbours in nearest.items():
        graph = _matrix([unique_edges(torch.cat([neighbours, feedback], dim=1), n_items)], n_items)
        needed.append(Product(name, graph, size, config["feature_n_layers"], 0))
    if has_kg and config["kg_n_layers"]:
        links, n_nodes = _kg_links(dataset, config["kg_min_degree"])
        links = links.to(device)
        edges = torch.cat([links, links.flip(0), feedback], dim=1)
        of_items = edges[:, edges[0] < n_items]
        last = SparseMatrix(Edges(of_items, torch.ones(of_items.shape[1], device=device)), (n_items, n_nodes))
        needed.append(Product("kg", _matrix([edges], n_nodes), size, config["kg_n_layers"], config["kg_n_layers"] - 1))
        needed.append(Product("kg", last, size, 0, 1))
    return [product for product in needed if product.times or product.strictly]


def _matrix(index: list[Tensor], n: int) -> SparseMatrix:
    edges = torch.cat(index, dim=1)
    return SparseMatrix(Edges(edges, torch.ones(edges.shape[1], device=edges.device)), (n, n))


def _kg_links(dataset: Any, min_degree: int) -> tuple[Tensor, int]:
    """Return head and tail of the triples that the settings leave, ``[2, T]``, and the number of nodes."""
    triples = torch.unique(dataset.triples, dim=0)
    ends = triples[:, [0, 2]]
    degree = torch.bincount(ends.flatten(), minlength=dataset.entity_num)
    allowed = degree >= min_degree
    allowed[: dataset.item_num] = True
    ends = ends[allowed[ends].all(1)]
    node = torch.cat([torch.arange(dataset.item_num), ends.flatten()])  # every item has a node
    nodes, place = torch.unique(node, return_inverse=True)
    return place[dataset.item_num :].view(-1, 2).T.contiguous(), len(nodes)


def _seconds(product: Product, device: torch.device, timer: Timer) -> float:
    """Return the seconds of one forward and one backward product."""
    rows, columns = product.matrix.shape
    dense = torch.randn(columns, product.width, device=device, requires_grad=True)
    grad = torch.randn(rows, product.width, device=device)

    def run() -> None:
        torch.autograd.grad(product.matrix.multiply(dense), dense, grad)

    return _least(run, timer)


def _optimiser_seconds(model: Any, timer: Timer) -> float:
    copies = [torch.zeros_like(p, requires_grad=True) for p in model.parameters() if p.requires_grad]
    for copy in copies:
        copy.grad = torch.ones_like(copy)
    return _least(torch.optim.Adam(copies, fused=True).step, timer)


def copy_bandwidth(device: torch.device, timer: Timer) -> float:
    """Return the bytes per second, read and written, of a large copy."""
    source = torch.ones(COPIED // 4, device=device)
    target = torch.empty_like(source)
    return 2 * COPIED / _least(lambda: target.copy_(source), timer)


def _least(function: Callable[[], Any], timer: Timer) -> float:
    function()
    return min(timer(function)[0] for _ in range(REPEATS))
