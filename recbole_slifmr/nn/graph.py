r"""Sparse graphs: edges in, normalised edges out.

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

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse
import torch
from torch import Tensor


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


def max_edges(graphs: Sequence[Edges], n_cols: int) -> Edges:
    """Return the elementwise maximum of graphs of non-negative weights, sorted by (row, column)."""
    index = torch.cat([edges.edge_index for edges in graphs], dim=1)
    weight = torch.cat([edges.edge_weight for edges in graphs])
    keys, inverse = torch.unique(index[0] * n_cols + index[1], return_inverse=True)
    largest = weight.new_zeros(len(keys)).scatter_reduce(0, inverse, weight, "amax")
    return Edges(torch.stack([torch.div(keys, n_cols, rounding_mode="floor"), keys % n_cols]), largest)


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


TIED = 64  # rows at a time, in which ties are looked for


def _top_k(similarity: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Select the k largest entries of each row; among equals above 0 the lowest column wins, among others any.

    Returns:
        rows and columns of the chosen entries, ``[n * k]`` each.
    """
    n_rows, n_cols = similarity.shape
    k = min(k, n_cols)
    values, index = torch.topk(similarity, min(k + 1, n_cols), dim=1)
    index, last = index[:, :k].contiguous(), values[:, k - 1 : k]
    tied = ((values[:, k:] == last) & (last > 0)).any(1).nonzero().squeeze(1)
    place, order = (torch.arange(n, dtype=torch.int32, device=similarity.device) for n in (k, n_cols))
    for rows in tied.split(TIED):
        equals = (similarity[rows] == last[rows]) * (n_cols - order)  # the lowest column is the largest
        n_larger = (values[rows, :k] > last[rows]).sum(1, keepdim=True)
        lowest = torch.topk(equals, k, dim=1).indices.gather(1, (place - n_larger).clamp(min=0))
        index[rows] = torch.where(place < n_larger, index[rows], lowest)
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
    if search == "approximate":
        row, col = _search_approximately(unit, k)
    else:
        block = unit.new_empty(min(block_size, len(unit)), len(unit))  # one for all: the largest piece of memory by far
        starts = range(0, len(unit), block_size)
        parts = (unit[start : start + block_size] for start in starts)
        row, col = _nearest((torch.mm(part, unit.T, out=block[: len(part)]) for part in parts), k)
    row, col = ids[row], ids[col]
    return unique_edges(torch.stack([torch.cat([row, col]), torch.cat([col, row])]), n)


def sparse_knn_graph(rows: scipy.sparse.csr_array, k: int, block_size: int = 1024) -> Tensor:
    """Link each item with its k nearest neighbours by the inner products of sparse rows, both ways.

    As :func:`knn_graph` does for dense ones: exactly, ``block_size`` rows at a time, without neighbours of no
    similarity. Ties go to the lowest index.

    Args:
        rows: non-negative, of unit length or zero, ``[n, d]``.
        k: neighbours per item; fewer where fewer exist.
        block_size: rows per block.

    Returns:
        ``edge_index [2, E]`` of the undirected graph: sorted, unique, both directions, no i->i edge.
    """
    n = rows.shape[0]
    rows = rows.astype(np.float32)
    columns = rows.T.tocsr()
    parts = (rows[start : start + block_size] @ columns for start in range(0, n, block_size))
    row, col = _nearest((torch.from_numpy(part.toarray()) for part in parts), k)
    return unique_edges(torch.stack([torch.cat([row, col]), torch.cat([col, row])]), n)


def _nearest(blocks: Iterable[Tensor], k: int) -> tuple[Tensor, Tensor]:
    """Return each row of a similarity matrix, given in blocks of rows, and its k largest columns, the positive ones.

    Args:
        blocks: ``[<= block_size, n]`` each; overwritten. The diagonal does not count.
        k: neighbours per row.

    Returns:
        rows and columns, ``[<= n * k]`` both.
    """
    rows, cols = [], []
    start = 0
    for similarity in blocks:
        local = torch.arange(similarity.shape[0], device=similarity.device)
        similarity[local, local + start] = -torch.inf
        row, col = _top_k(similarity, k)
        keep = similarity[row, col] > 0
        rows.append(row[keep] + start)
        cols.append(col[keep])
        start += len(local)
    return torch.cat(rows), torch.cat(cols)


def _search_approximately(unit: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return most of what the exact search returns, from an inverted file of FAISS."""
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


def cooccurrence_graph(
    interactions: Tensor, n_users: int, n_items: int, k: int, min_count: int = 2, block_size: int = 1024
) -> Tensor:
    """Link each item with the k others that it shares most users with, both ways.

    Common users are counted for ``block_size`` items at a time. Ties go to the lowest index.

    Args:
        interactions: user and item of each interaction, ``[2, E]``, unique.
        n_users: number of users.
        n_items: number of items.
        k: neighbours per item; fewer where fewer exist.
        min_count: so many users two items must share.
        block_size: rows per block.

    Returns:
        ``edge_index [2, E']`` of the undirected graph: sorted, unique, both directions, no i->i edge.
    """
    user, item = interactions.cpu().numpy()
    users_of = scipy.sparse.csr_array((np.ones(len(user), dtype=np.int32), (item, user)), shape=(n_items, n_users))
    found = [np.zeros((2, 0), dtype=np.int64)]
    for start in range(0, n_items, block_size):
        common = (users_of[start : start + block_size] @ users_of.T).tocoo()
        row, col, count = common.row.astype(np.int64) + start, common.col.astype(np.int64), common.data
        keep = (count >= min_count) & (row != col)
        row, col, count = row[keep], col[keep], count[keep]
        order = np.lexsort((col, -count, row))
        row, col = row[order], col[order]
        place = np.arange(len(row)) - np.searchsorted(row, row)  # within its row
        found.append(np.stack([row, col])[:, place < k])
    index = torch.from_numpy(np.concatenate(found, axis=1)).to(interactions.device)
    return unique_edges(torch.cat([index, index.flip(0)], dim=1), n_items)


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
    return unweighted(knn_graph(features, k, mask, search=search), len(features), features.dtype)


def unweighted(edge_index: Tensor, n: int, dtype: torch.dtype | None = None) -> Edges:
    """Return the edges ``[2, E]`` over ``n`` nodes with the normalised weights that they have if all weigh the same."""
    ones = torch.ones(edge_index.shape[1], dtype=dtype, device=edge_index.device)
    return Edges(edge_index, normalize_symmetric(edge_index, ones, (n, n)))


def blend(initial: Edges, feedback: Edges, eta: float, n: int) -> Edges:
    r"""Return :math:`(1 - \eta) A^{(0)} + \eta S`, both already normalised, over ``n`` nodes."""
    if eta == 0 or feedback.edge_index.shape[1] == 0:
        return initial
    return sum_edges(
        torch.cat([initial.edge_index, feedback.edge_index], dim=1),
        torch.cat([(1 - eta) * initial.edge_weight, eta * feedback.edge_weight]),
        n,
    )


class RefreshStats(NamedTuple):
    """What a refresh did.

    Attributes:
        edges: edges of the correlation graph.
        turnover: the share of them that the last one did not have.
        recall: the share of the exact nearest neighbours that it has, of a sample of the items; 1 for an exact search.
    """

    edges: int
    turnover: float
    recall: float = 1.0


def correlation_graph(items: Tensor, k: int, search: str, last: Tensor) -> tuple[Tensor, RefreshStats]:
    """Link each item, the padding item 0 apart, with its k nearest neighbours; see :func:`knn_graph`.

    Args:
        items: ``[n_items, d]``.
        k: neighbours per item.
        search: one of ``KNN_SEARCHES``.
        last: the graph that this one follows, ``[2, E]``.

    Returns:
        ``edge_index [2, E']``, and how it differs from the last one and from the exact graph.
    """
    mask = torch.ones(len(items), dtype=torch.bool, device=items.device)
    mask[0] = False
    index = knn_graph(items, k, mask, search=search)
    recall = 1.0 if search == "exact" else knn_recall(items, index, k, mask)
    return index, RefreshStats(index.shape[1], edge_turnover(last.to(index.device), index, len(items)), recall)


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
