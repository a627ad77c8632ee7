"""Sparse matrices to multiply dense ones with: the products that a training step is made of, and their gradients.

Pure, like ``nn/graph.py``. On a CPU the products are those of MKL; ``docs/performance.md`` says what they cost.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from recbole_slifmr.nn.graph import Edges


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


def later_layers(matrix: SparseMatrix, users: Tensor, items: Tensor, n_layers: int) -> tuple[Tensor, Tensor]:
    """Return the mean of the layers of light propagation from 1 on: LightGCN's (arXiv 2002.02126) without layer 0.

    A node without interactions has zeros.

    Args:
        matrix: the normalised interactions, ``[n_users, n_items]``.
        users: layer 0 of the users, ``[n_users, d]``.
        items: that of the items, ``[n_items, d]``.
        n_layers: number of layers, 1 or more.

    Returns:
        ``[n_users, d]`` and ``[n_items, d]``.
    """
    layers = []
    for _ in range(n_layers):
        users, items = matrix.multiply(items), matrix.multiply_transposed(users)
        layers.append((users, items))
    of_users, of_items = (torch.stack(side).mean(0) for side in zip(*layers, strict=True))
    return of_users, of_items


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
