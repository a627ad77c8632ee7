r"""Sparse graphs: edges in, normalised sparse matrices out.

Everything here is pure: torch in, torch out, nothing of RecBole. Edges are an ``edge_index`` of shape ``[2, E]``
(row, column) with an ``edge_weight`` of shape ``[E]``. A dense ``n x n`` matrix is never held.

Equations:

* symmetric normalisation :math:`\hat A = D_r^{-1/2} A D_c^{-1/2}` with row and column sums of :math:`A`
  (He et al., LightGCN, SIGIR 2020);
* k nearest neighbours by cosine, symmetrised, no i->i edge (Zhang et al., LATTICE, MM 2021);
* degree-sensitive edge sampling :math:`p(u, i) \propto 1 / \sqrt{d_u d_i}` (Zhou & Shen, FREEDOM, MM 2023; used by
  SLIF-MR, arXiv 2507.09998).
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn


class Edges(NamedTuple):
    """Weighted edges of a sparse matrix.

    Attributes:
        edge_index: rows and columns, ``[2, E]``, int64.
        edge_weight: values, ``[E]``, float32.
    """

    edge_index: Tensor
    edge_weight: Tensor


def empty_edges(device: torch.device | None = None) -> Edges:
    """Return a graph without edges."""
    return Edges(torch.zeros(2, 0, dtype=torch.long, device=device), torch.zeros(0, device=device))


def unique_edges(edge_index: Tensor, n_cols: int) -> Tensor:
    """Drop duplicate edges and sort by (row, column).

    Args:
        edge_index: ``[2, E]``.
        n_cols: number of columns of the matrix.

    Returns:
        ``[2, E']``, each edge once.
    """
    keys = torch.unique(edge_index[0] * n_cols + edge_index[1])
    return torch.stack([torch.div(keys, n_cols, rounding_mode="floor"), keys % n_cols])


def sum_edges(edge_index: Tensor, edge_weight: Tensor, n_cols: int) -> Edges:
    """Merge duplicate edges by adding their weights, sorted by (row, column)."""
    keys, inverse = torch.unique(edge_index[0] * n_cols + edge_index[1], return_inverse=True)
    weight = torch.zeros(len(keys), dtype=edge_weight.dtype, device=edge_weight.device)
    weight.index_add_(0, inverse, edge_weight)
    return Edges(torch.stack([torch.div(keys, n_cols, rounding_mode="floor"), keys % n_cols]), weight)


def inverse_sqrt(degree: Tensor) -> Tensor:
    """Return :math:`d^{-1/2}`, and 0 where d is 0."""
    return torch.where(degree > 0, degree.clamp(min=1e-12).rsqrt(), torch.zeros_like(degree))


def normalize_symmetric(edge_index: Tensor, edge_weight: Tensor, shape: tuple[int, int]) -> Tensor:
    r"""Divide every weight by :math:`\sqrt{d_{row} d_{col}}`; differentiable in ``edge_weight``.

    Args:
        edge_index: ``[2, E]``.
        edge_weight: ``[E]``, non-negative.
        shape: ``(n_rows, n_cols)``; degrees are the row and the column sums. Nodes without an edge stay without one.

    Returns:
        ``[E]``.
    """
    row, col = edge_index
    row_degree = edge_weight.new_zeros(shape[0]).index_add(0, row, edge_weight)
    col_degree = edge_weight.new_zeros(shape[1]).index_add(0, col, edge_weight)
    row_scale, col_scale = inverse_sqrt(row_degree), inverse_sqrt(col_degree)
    return edge_weight * row_scale.index_select(0, row) * col_scale.index_select(0, col)


def _top_k(similarity: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Select the k largest entries of each row; among equals the lowest column wins.

    Returns:
        rows and columns of the chosen entries, ``[n * k]`` each.
    """
    n_rows, n_cols = similarity.shape
    k = min(k, n_cols)
    values, index = torch.topk(similarity, min(k + 1, n_cols), dim=1)
    if values.shape[1] > k:
        tied = (values[:, k - 1] == values[:, k]) & torch.isfinite(values[:, k])
        index = index[:, :k].contiguous()
        if tied.any():
            index[tied] = torch.sort(similarity[tied], dim=1, descending=True, stable=True).indices[:, :k]
    rows = torch.arange(n_rows, device=similarity.device).repeat_interleave(k)
    return rows, index.reshape(-1)


KNN_SEARCHES = ("exact", "approximate")


def knn_graph(
    features: Tensor, k: int, mask: Tensor | None = None, block_size: int = 1024, search: str = "exact"
) -> Tensor:
    """Link each item with its k nearest neighbours by cosine similarity, both ways.

    Similarities are computed for ``block_size`` rows at a time, so memory is ``block_size * n`` and never ``n * n``.
    A row of zeros has no direction: such items, like those outside ``mask``, get no edge and are nobody's neighbour.
    Neighbours of non-positive similarity are left out. Ties go to the lowest index.

    The exact search takes time with the square of n. The approximate one is FAISS's inverted file
    (``IndexIVFFlat``, Johnson et al., arXiv 1702.08734), whose time grows with :math:`n^{1.5}`; on the CPU.

    Args:
        features: ``[n, d]``.
        k: neighbours per item; fewer where fewer exist.
        mask: ``[n]`` bool, the items that take part; all if ``None``.
        block_size: rows per block of the exact search.
        search: one of ``KNN_SEARCHES``.

    Returns:
        ``edge_index [2, E]`` of the undirected graph: sorted, unique, both directions, no i->i edge.

    Raises:
        ValueError: if ``k`` is below 1 or the search is unknown.
        ImportError: if the approximate search finds no FAISS.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, not {k}")
    if search not in KNN_SEARCHES:
        raise ValueError(f"search must be one of {', '.join(KNN_SEARCHES)}, not '{search}'")
    features = features.detach()
    n = features.shape[0]
    norm = features.norm(dim=1, keepdim=True)
    present = norm.squeeze(1) > 0
    if mask is not None:
        present = present & mask
    ids = present.nonzero().squeeze(1)
    if len(ids) < 2:
        return torch.zeros(2, 0, dtype=torch.long, device=features.device)
    unit = (features / norm.clamp(min=1e-12))[ids]
    row, col = _search_exactly(unit, k, block_size) if search == "exact" else _search_approximately(unit, k)
    row, col = ids[row], ids[col]
    return unique_edges(torch.stack([torch.cat([row, col]), torch.cat([col, row])]), n)


def _search_exactly(unit: Tensor, k: int, block_size: int) -> tuple[Tensor, Tensor]:
    """Return each row of ``unit [n, d]`` and its k nearest others of positive similarity, ``[<= n * k]`` both."""
    rows, cols = [], []
    block = unit.new_empty(min(block_size, len(unit)), len(unit))  # one for all: the largest piece of memory by far
    for start in range(0, len(unit), block_size):
        part = unit[start : start + block_size]
        similarity = torch.mm(part, unit.T, out=block[: len(part)])
        local = torch.arange(similarity.shape[0], device=similarity.device)
        similarity[local, local + start] = -torch.inf
        row, col = _top_k(similarity, k)
        keep = similarity[row, col] > 0
        rows.append(row[keep] + start)
        cols.append(col[keep])
    return torch.cat(rows), torch.cat(cols)


def _search_approximately(unit: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return what :func:`_search_exactly` returns, most of it, from an inverted file of FAISS."""
    import faiss

    vectors = np.ascontiguousarray(unit.detach().cpu().numpy(), dtype=np.float32)
    n_lists = max(1, min(int(4 * len(vectors) ** 0.5), len(vectors) // 39))  # FAISS asks for 39 points per list
    index: Any = faiss.index_factory(vectors.shape[1], f"IVF{n_lists},Flat", faiss.METRIC_INNER_PRODUCT)
    index.cp.max_points_per_centroid = 64
    index.train(vectors)
    index.add(vectors)
    index.nprobe = max(8, n_lists // 32)
    similarity, neighbour = (torch.from_numpy(found) for found in index.search(vectors, min(k + 1, len(vectors))))
    row = torch.arange(len(vectors)).unsqueeze(1).expand_as(neighbour)
    other = (neighbour != row) & (neighbour >= 0) & (similarity > 0)
    keep = other & (other.cumsum(1) <= k)
    return row[keep].to(unit.device), neighbour[keep].to(unit.device)


def knn_recall(features: Tensor, edge_index: Tensor, k: int, mask: Tensor | None = None, n_sample: int = 256) -> float:
    """Return the share of the exact k nearest neighbours that a graph has, over a sample of the items.

    Args:
        features: ``[n, d]``.
        edge_index: ``[2, E]``, of :func:`knn_graph`.
        k: neighbours per item.
        mask: ``[n]`` bool, the items that take part; all if ``None``.
        n_sample: items in the sample, evenly spaced, the same on every call.
    """
    n = features.shape[0]
    unit = features / features.norm(dim=1, keepdim=True).clamp(min=1e-12)
    ids = (torch.ones_like(unit[:, 0], dtype=torch.bool) if mask is None else mask).nonzero().squeeze(1)
    sample = ids[torch.linspace(0, len(ids) - 1, min(n_sample, len(ids)), device=ids.device).long()]
    similarity = unit[sample] @ unit[ids].T
    similarity[sample[:, None] == ids[None]] = -torch.inf
    row, col = _top_k(similarity, k)
    positive = similarity[row, col] > 0
    row, col = sample[row[positive]], ids[col[positive]]
    return torch.isin(row * n + col, edge_index[0] * n + edge_index[1]).float().mean().item()


def normalized_knn(features: Tensor, k: int, mask: Tensor | None = None, search: str = "exact") -> Edges:
    """Return :func:`knn_graph` with its symmetric normalisation."""
    edge_index = knn_graph(features, k, mask, search=search)
    n = features.shape[0]
    return Edges(edge_index, normalize_symmetric(edge_index, features.new_ones(edge_index.shape[1]), (n, n)))


def blend(initial: Edges, feedback: Edges, eta: float, n: int) -> Edges:
    r"""Return :math:`(1 - \eta) A^{(0)} + \eta S`, both already normalised, over ``n`` nodes."""
    if eta == 0 or feedback.edge_index.shape[1] == 0:
        return initial
    return sum_edges(
        torch.cat([initial.edge_index, feedback.edge_index], dim=1),
        torch.cat([(1 - eta) * initial.edge_weight, eta * feedback.edge_weight]),
        n,
    )


def edge_turnover(old: Tensor, new: Tensor, n: int) -> float:
    """Return the share of the edges of ``new`` that ``old`` did not have, in [0, 1]; 1 if ``old`` has none."""
    if new.shape[1] == 0:
        return 0.0
    known = torch.isin(new[0] * n + new[1], old[0] * n + old[1])
    return 1.0 - known.float().mean().item()


def sample_interactions(edge_index: Tensor, n_users: int, n_items: int, ratio: float, seed: int) -> Tensor:
    r"""Leave out a share of the interactions, those between popular ends first; no node is cut off.

    An edge is kept with probability proportional to :math:`1 / \sqrt{d_u d_i}`, sampled without replacement
    (Efraimidis & Spirakis' exponential keys). Edges that would cut off a user or an item are put back: for each such
    node its best-keyed edge.

    Args:
        edge_index: user and item of each interaction, ``[2, E]``, unique.
        n_users: number of users.
        n_items: number of items.
        ratio: share to leave out, in [0, 1).
        seed: seeds a generator of its own: the global random state is neither read nor moved.

    Returns:
        ``[E]`` bool, True for the kept interactions.

    Raises:
        ValueError: if ``ratio`` is outside [0, 1).
    """
    if not 0 <= ratio < 1:
        raise ValueError(f"prune_ratio must be in [0, 1), not {ratio}")
    n_edges = edge_index.shape[1]
    user, item = edge_index
    if ratio == 0 or n_edges == 0:
        return torch.ones(n_edges, dtype=torch.bool, device=edge_index.device)
    user_degree = torch.bincount(user, minlength=n_users).float()
    item_degree = torch.bincount(item, minlength=n_items).float()
    generator = torch.Generator().manual_seed(seed)
    exponential = torch.empty(n_edges).exponential_(generator=generator).to(edge_index.device)
    key = exponential * (user_degree[user] * item_degree[item]).sqrt()  # the smaller, the sooner it is kept
    keep = torch.zeros(n_edges, dtype=torch.bool, device=edge_index.device)
    keep[torch.topk(key, n_edges - int(ratio * n_edges), largest=False).indices] = True
    for node, n_nodes in ((user, n_users), (item, n_items)):
        kept_degree = torch.bincount(node[keep], minlength=n_nodes)
        best = torch.full((n_nodes,), torch.inf, device=key.device).scatter_reduce(0, node, key, "amin")
        keep |= (kept_degree[node] == 0) & (key == best[node])
    return keep


class SparseMatrix(nn.Module):
    """A sparse matrix to multiply dense ones with, kept in CSR form beside its transpose.

    The index and value tensors are dense, non-persistent buffers: they follow ``.to(device)``, are not written into
    a ``state_dict`` and are accepted by DistributedDataParallel, which refuses sparse buffers.

    Args:
        edges: the entries; duplicates add up.
        shape: ``(n_rows, n_cols)``.
        symmetric: the matrix is its own transpose, which then takes no room; it cannot be given other values.
    """

    crow: Tensor
    col: Tensor
    values: Tensor
    order: Tensor
    t_crow: Tensor
    t_col: Tensor
    t_order: Tensor
    t_values: Tensor

    def __init__(self, edges: Edges, shape: tuple[int, int], symmetric: bool = False) -> None:
        super().__init__()
        self.shape, self.symmetric = shape, symmetric
        row, col = edges.edge_index
        order = torch.argsort(row * shape[1] + col, stable=True)
        row, col = row[order], col[order]
        index = torch.int32 if max(*shape, len(row)) < 2**31 else torch.int64
        buffers = {
            "crow": _row_pointer(row, shape[0]).to(index),
            "col": col.to(index),
            "values": edges.edge_weight[order],
        }
        if not symmetric:
            t_order = torch.argsort(col * shape[0] + row, stable=True)
            buffers |= {
                "order": order.to(index),  # position of each entry in the edges given
                "t_crow": _row_pointer(col[t_order], shape[1]).to(index),
                "t_col": row[t_order].to(index),
                "t_order": t_order.to(index),  # position of each entry of the transpose in this matrix
                "t_values": buffers["values"][t_order],
            }
        for name, tensor in buffers.items():
            self.register_buffer(name, tensor, persistent=False)

    @property
    def nnz(self) -> int:
        """Number of stored entries."""
        return self.values.shape[0]

    def edges(self) -> Edges:
        """Return the entries, sorted by (row, column)."""
        counts = (self.crow[1:] - self.crow[:-1]).long()
        row = torch.arange(self.shape[0], device=self.crow.device).repeat_interleave(counts)
        return Edges(torch.stack([row, self.col.long()]), self.values)

    def multiply(self, dense: Tensor, edge_weight: Tensor | None = None) -> Tensor:
        """Return this matrix times ``dense``.

        Args:
            dense: ``[n_cols, d]``.
            edge_weight: other values for the entries, in the order of the edges given to the constructor, ``[E]``;
                gradients reach them as they reach ``dense``.

        Returns:
            ``[n_rows, d]``.
        """
        if edge_weight is None:
            return _Product.apply(self, dense, False)
        return _WeightedProduct.apply(self, edge_weight.index_select(0, self.order), dense)

    def multiply_transposed(self, dense: Tensor) -> Tensor:
        """Return the transpose of this matrix times ``dense [n_rows, d]``, ``[n_cols, d]``."""
        return _Product.apply(self, dense, True)

    def product(self, dense: Tensor, transposed: bool) -> Tensor:
        """Return this matrix or its transpose times ``dense``, outside autograd."""
        if transposed and not self.symmetric:
            return _spmm(self.t_crow, self.t_col, self.t_values, self.shape[::-1], dense)
        return _spmm(self.crow, self.col, self.values, self.shape, dense)

    def extra_repr(self) -> str:
        """Show the sizes when the model is printed."""
        return f"{self.shape[0]} x {self.shape[1]}, {self.nnz} entries"


class RelationalMatrix(nn.Module):
    r"""A sparse matrix whose entries have the weight of their relation: :math:`A = \sum_r w_r A_r`.

    The weights are few and the entries many, so no entry keeps a value of its own.

    Args:
        edge_index: the entries, ``[2, E]``; duplicates add up.
        relation: of each entry, ``[E]``.
        n_relations: number of relations.
        shape: ``(n_rows, n_cols)``.
    """

    crow: Tensor
    col: Tensor
    relation: Tensor
    t_crow: Tensor
    t_col: Tensor
    t_relation: Tensor

    def __init__(self, edge_index: Tensor, relation: Tensor, n_relations: int, shape: tuple[int, int]) -> None:
        super().__init__()
        self.shape, self.n_relations = shape, n_relations
        index = torch.int32 if max(*shape, len(relation)) < 2**31 else torch.int64
        for prefix, (row, col), n_rows in (("", edge_index, shape[0]), ("t_", edge_index.flip(0), shape[1])):
            order = torch.argsort(row * max(shape) + col, stable=True)
            self.register_buffer(f"{prefix}crow", _row_pointer(row[order], n_rows).to(index), persistent=False)
            self.register_buffer(f"{prefix}col", col[order].to(index), persistent=False)
            self.register_buffer(f"{prefix}relation", relation[order].to(index), persistent=False)

    def multiply(self, dense: Tensor, weight: Tensor) -> Tensor:
        """Return this matrix times ``dense``; gradients reach both arguments.

        Args:
            dense: ``[n_cols, d]``.
            weight: of each relation, ``[n_relations]``.

        Returns:
            ``[n_rows, d]``.
        """
        return _RelationalProduct.apply(self, dense, weight)

    def extra_repr(self) -> str:
        """Show the sizes when the model is printed."""
        return f"{self.shape[0]} x {self.shape[1]}, {len(self.col)} entries, {self.n_relations} relations"


def _row_pointer(sorted_rows: Tensor, n_rows: int) -> Tensor:
    counts = torch.bincount(sorted_rows, minlength=n_rows)
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def _csr(crow: Tensor, col: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")
        return torch.sparse_csr_tensor(crow, col, values, size=shape, check_invariants=False)


MKL_WIDTH = 64  # columns per product: MKL takes several times as long for 128 as for two times 64


def _spmm(crow: Tensor, col: Tensor, values: Tensor, shape: tuple[int, int], dense: Tensor) -> Tensor:
    if len(values) == 0:
        return dense.new_zeros(shape[0], dense.shape[1])
    matrix = _csr(crow, col, values.to(dense.dtype), shape)
    on_cpu = dense.device.type == "cpu"
    if on_cpu and not torch.backends.mkl.is_available():  # PyTorch multiplies CSR on a CPU through MKL only
        return matrix.to_sparse_coo() @ dense
    out = dense.new_empty(shape[0], dense.shape[1])
    width = MKL_WIDTH if on_cpu else max(dense.shape[1], 1)
    for result, block in zip(out.split(width, dim=1), dense.split(width, dim=1), strict=True):
        torch.addmm(result, matrix, block, beta=0, out=result)  # matrix @ block fills and copies another result
    return out


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, matrix: SparseMatrix, dense: Tensor, transposed: bool) -> Tensor:
        ctx.matrix, ctx.transposed = matrix, transposed
        return matrix.product(dense, transposed)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, None]:
        matrix, transposed = ctx.matrix, ctx.transposed
        return None, matrix.product(grads[0].contiguous(), not transposed), None


class _RelationalProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, matrix: RelationalMatrix, dense: Tensor, weight: Tensor) -> Tensor:
        ctx.matrix = matrix
        ctx.save_for_backward(dense, weight)
        return _spmm(matrix.crow, matrix.col, weight.index_select(0, matrix.relation), matrix.shape, dense)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor | None, Tensor | None]:
        matrix: RelationalMatrix = ctx.matrix
        dense, weight = ctx.saved_tensors
        grad = grads[0].contiguous()
        grad_dense = grad_weight = None
        if ctx.needs_input_grad[1]:
            values = weight.index_select(0, matrix.t_relation)
            grad_dense = _spmm(matrix.t_crow, matrix.t_col, values, matrix.shape[::-1], grad)
        if ctx.needs_input_grad[2]:
            by_entry = _sampled_product(matrix.crow, matrix.col, matrix.shape, grad, dense)
            by_relation = torch.bincount(matrix.relation, by_entry, minlength=matrix.n_relations)
            grad_weight = by_relation.to(weight.dtype)
        return None, grad_dense, grad_weight


class _WeightedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, matrix: SparseMatrix, values: Tensor, dense: Tensor) -> Tensor:
        ctx.matrix = matrix
        ctx.save_for_backward(values, dense)
        return _spmm(matrix.crow, matrix.col, values, matrix.shape, dense)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor | None, Tensor | None]:
        matrix: SparseMatrix = ctx.matrix
        values, dense = ctx.saved_tensors
        grad = grads[0].contiguous()
        grad_values = grad_dense = None
        if ctx.needs_input_grad[1]:
            grad_values = _sampled_product(matrix.crow, matrix.col, matrix.shape, grad, dense)
        if ctx.needs_input_grad[2]:
            t_values = values.index_select(0, matrix.t_order)
            grad_dense = _spmm(matrix.t_crow, matrix.t_col, t_values, matrix.shape[::-1], grad)
        return None, grad_values, grad_dense


def _sampled_product(crow: Tensor, col: Tensor, shape: tuple[int, int], left: Tensor, right: Tensor) -> Tensor:
    """Return ``(left @ right.T)`` at the entries of a CSR pattern, ``[E]``."""
    if len(col) == 0:
        return left.new_zeros(0)
    if left.device.type == "cpu" and not torch.backends.mkl.is_available():
        row = torch.arange(shape[0], device=col.device).repeat_interleave((crow[1:] - crow[:-1]).long())
        return torch.cat([(left[r] * right[c]).sum(1) for r, c in zip(row.split(65536), col.split(65536), strict=True)])
    pattern = _csr(crow, col, left.new_zeros(len(col)), shape)
    return torch.sparse.sampled_addmm(pattern, left, right.T, beta=0.0).values()
