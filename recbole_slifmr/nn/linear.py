r"""Linear item-item models in closed form: a user's scores are the sum of the weight rows of the user's items.

Every source of item knowledge is a matrix with a row per item, its *factor*: the users of the item (:math:`X^T`), its
feature vector, the tags that its neighbours in the knowledge graph give it. With :math:`G = \sum_s w_s F_s F_s^T` the
weighted sum of their Gram matrices, the weights B minimise

.. math::
    \sum_s w_s \|F_s^T - F_s^T B\|^2 + \sum_{ij} \lambda_i B_{ij}^2 + \lambda_C \|B - C\|^2
    \quad \text{with diag}(B) = 0 .

The closed forms have one :math:`\lambda` for all items. With :math:`\Lambda = \mathrm{diag}(\lambda_i)`,
:math:`P = (G + \Lambda + \lambda_C I)^{-1}` and :math:`Q = \lambda_C P C` the solution is, off the diagonal,

.. math:: B = Q - P \, \mathrm{diag}\left(\frac{1 + \mathrm{diag}(Q)}{\mathrm{diag}(P)}\right) .

Without C this is EASE (Steck, WWW 2019, arXiv 1905.03375), with content among the sources CEASE (Jeunen, Van Balen,
Goethals, RecSys 2020), with C from content alone L3AE (Moon, Park, Lee, CIKM 2025, arXiv 2508.13500).

:class:`DenseSolver` computes it by Cholesky. An eigendecomposition of G would not make a search over :math:`\lambda`
faster: forming P from it takes as many operations as factorising and inverting anew.
:class:`NeighbourSolver` is for more items than a dense matrix can have.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol, TypeAlias, TypeVar

import numpy as np
import scipy.linalg.lapack
import scipy.sparse
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor
from torch.nn import functional as F

from recbole_slifmr.errors import SettingError
from recbole_slifmr.nn.tags import indicator

Matrix: TypeAlias = "Tensor | scipy.sparse.csr_array"
W = TypeVar("W", Tensor, scipy.sparse.csr_array)
BLOCK = 1024  # rows of a dense matrix at a time
TOLERANCE = 1e-8  # of conjugate gradients, relative
MOST_STEPS = 2000
SINGULAR = "the item-item matrix is not positive definite: set reg_weight higher, for SLIFMR linear_reg_weight"
COLUMNS = 256  # that conjugate gradients solve for at a time
GATHERED = 2**21  # numbers of dense factors gathered at a time
SAME = 1e-6  # of its length: a row of features that is nearer to the mean is the mean, rounded


class Source(NamedTuple):
    """What says which items are alike, and how much that counts.

    Attributes:
        factor: ``[n_items, c]``, a dense tensor or a sparse matrix; the inner products of its rows are the likeness.
        weight: of its Gram matrix in the sum.
    """

    factor: Matrix
    weight: float = 1.0


# -- factors ---------------------------------------------------------------------------------------------------------


def interaction_factor(users: np.ndarray, items: np.ndarray, n_users: int, n_items: int) -> scipy.sparse.csr_array:
    """Return which users have which item, ``[n_items, n_users]``; an interaction that is there twice counts once."""
    return indicator(items, users, (n_items, n_users))


def feature_factor(values: Tensor, mask: Tensor, mean: Tensor | None = None) -> Tensor:
    """Return features less their mean, with rows of unit length, ``[n_items, d]`` float64.

    A row that is the mean, as ``feature_missing: mean`` fills it in, becomes zeros.

    Args:
        values: ``[n_items, d]``.
        mask: ``[n_items]`` bool; the rows of other items are zeros, and do not count in the mean.
        mean: ``[d]``; that of these features if None.
    """
    factor = values.to(torch.float64, copy=True)
    least = SAME * factor.norm(dim=1)
    factor -= feature_mean(factor, mask) if mean is None else mean
    length = factor.norm(dim=1)
    return factor.div_(torch.where(mask & (length > least), length, torch.inf).unsqueeze(1))


def feature_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of the features ``[n_items, d]`` over the items of the mask ``[n_items]``, ``[d]`` float64."""
    return mask.double() @ values.double() / mask.sum()  # without a copy of the rows


# -- Gram matrices ---------------------------------------------------------------------------------------------------


def gram_rows(sources: Sequence[Source], rows: slice) -> Tensor:
    """Return some rows of the weighted sum of the Gram matrices, ``[len(rows), n_items]`` float64."""
    total: Tensor | None = None
    for factor, weight in sources:
        if isinstance(factor, Tensor):
            part = factor[rows] @ factor.T
        else:
            part = torch.from_numpy((factor[rows] @ factor.T).toarray())
        total = weight * part if total is None else total.add_(part, alpha=weight)
    if total is None:
        raise ValueError("no sources")
    return total


def gram(sources: Sequence[Source], dtype: torch.dtype = torch.float64) -> Tensor:
    """Return the weighted sum of the Gram matrices, ``[n_items, n_items]``; needs little more memory than that."""
    n_items = sources[0].factor.shape[0]
    total = torch.empty(n_items, n_items, dtype=dtype)
    for rows in _blocks(n_items):
        total[rows] = gram_rows(sources, rows).to(dtype)
    return total


def _blocks(n_items: int, step: int = BLOCK) -> Iterator[slice]:
    return (slice(start, min(start + step, n_items)) for start in range(0, n_items, step))


def invert(matrix: Tensor) -> Tensor:
    """Invert a symmetric positive definite matrix by Cholesky; on the CPU in place, without further memory.

    Args:
        matrix: ``[n, n]`` float32 or float64, contiguous; overwritten.

    Raises:
        SettingError: if it is not positive definite.
    """
    if matrix.is_cuda:
        lower, info = torch.linalg.cholesky_ex(matrix)
        failed = int(info)
        inverse = matrix if failed else torch.cholesky_inverse(lower, out=matrix)
    else:
        kind = "d" if matrix.dtype == torch.float64 else "s"
        factorise, complete = (getattr(scipy.linalg.lapack, f"{kind}{name}") for name in ("potrf", "potri"))
        columns = matrix.numpy().T  # in the order of Fortran: its upper triangle is the lower one of the matrix
        with threadpool_limits(torch.get_num_threads()):
            columns, failed = factorise(columns, lower=0, clean=0, overwrite_a=1)
            if not failed:
                columns, failed = complete(columns, lower=0, overwrite_c=1)
        inverse = torch.from_numpy(columns.T)
        _mirror(inverse)
    if failed:
        raise SettingError(SINGULAR)
    return inverse


def _mirror(matrix: Tensor) -> None:
    """Copy the lower triangle over the upper one."""
    for rows in _blocks(len(matrix)):
        matrix[rows, rows.stop :] = matrix[rows.stop :, rows].T
        square = matrix[rows, rows]
        square.copy_(square.tril() + square.tril(-1).T)


# -- new items -------------------------------------------------------------------------------------------------------


def cross_gram(sources: Sequence[Source], new: Sequence[Source]) -> np.ndarray:
    """Return the weighted sum of the inner products of items and new items, ``[n_items, n_new]`` float64.

    Args:
        sources: of the items.
        new: the same sources of the new items, ``[n_new, c]`` each.
    """
    parts = []
    for (factor, weight), (rows, _) in zip(sources, new, strict=True):
        part = factor @ rows.T
        parts.append(weight * (part.double().cpu().numpy() if isinstance(part, Tensor) else part.toarray()))
    return np.sum(parts, axis=0)


def solve_columns(sources: Sequence[Source], reg: float | Tensor, wanted: np.ndarray) -> np.ndarray:
    r"""Return :math:`(G + \Lambda)^{-1} Y`, ``[n_items, n]`` float64, without forming G.

    With the cross-Gram matrix of new items for Y these are the weights that the items have in a ridge regression of the
    new items' rows: what the closed form would give to new items if they had been among the others. By conjugate
    gradients (Hestenes, Stiefel, 1952), divided by the diagonal, ``COLUMNS`` at a time.

    Args:
        sources: of the Gram matrices G.
        reg: :math:`\lambda`, above 0, or that of each item, ``[n_items]``.
        wanted: Y, ``[n_items, n]``.
    """
    factors = [(f.double().cpu().numpy() if isinstance(f, Tensor) else f, weight) for f, weight in sources]
    diagonal = (_diagonal(sources) + reg).cpu().numpy()[:, None]
    penalty = reg.numpy()[:, None] if isinstance(reg, Tensor) else reg

    def multiply(columns: np.ndarray) -> np.ndarray:
        return penalty * columns + sum(weight * (factor @ (factor.T @ columns)) for factor, weight in factors)

    solution = np.empty_like(wanted)
    for columns in _blocks(wanted.shape[1], COLUMNS):
        solution[:, columns] = _conjugate_gradients(multiply, diagonal, wanted[:, columns])
    return solution


def _conjugate_gradients(
    multiply: Callable[[np.ndarray], np.ndarray], diagonal: np.ndarray, wanted: np.ndarray
) -> np.ndarray:
    """Solve for all columns ``[n_items, n]`` at a time; warn where ``MOST_STEPS`` are not enough."""
    solution, residual = np.zeros_like(wanted), wanted.copy()
    goal = TOLERANCE * np.linalg.norm(wanted, axis=0)
    step = near = residual / diagonal
    product = (residual * near).sum(axis=0)
    for _ in range(MOST_STEPS):
        if (np.linalg.norm(residual, axis=0) <= goal).all():
            return solution
        change = multiply(step)
        length = product / np.maximum((step * change).sum(axis=0), np.finfo(float).tiny)
        solution += length * step
        residual -= length * change
        near = residual / diagonal
        last, product = product, (residual * near).sum(axis=0)
        step = near + product / np.maximum(last, np.finfo(float).tiny) * step
    warnings.warn(f"the weights of new items are not exact: {MOST_STEPS} steps were not enough", stacklevel=3)
    return solution


# -- solvers ---------------------------------------------------------------------------------------------------------


class Solver(Protocol[W]):
    """Solves for the weights of a linear model, see the module's formula."""

    def solve(
        self, sources: Sequence[Source], reg: float | Tensor, prior: W | None = None, prior_weight: float = 0.0
    ) -> W:
        """Return the weights B, ``[n_items, n_items]``: column j holds what item j's score takes of each item.

        Args:
            sources: what to reconstruct.
            reg: of the squared weights, above 0; one number, or one for the weights on each item, ``[n_items]``.
            prior: weights C, to which B is drawn; may be overwritten.
            prior_weight: how strongly.

        Raises:
            SettingError: if the solution is not determined.
        """

    def solve_with_diagonal(self, sources: Sequence[Source], reg: float | Tensor) -> tuple[W, Tensor]:
        r"""Return the weights without a prior, and with them the diagonal of P, ``[n_items]``.

        :math:`1 / P_{jj}` is what the other items leave of item j's row. Where a column has a fixed number of weights,
        P is that of these items and the column's own.
        """

    def add(self, first: W, second: W, share: float) -> W:
        """Return ``(1 - share) * first + share * second``; ``first`` may be overwritten."""

    def estimate_memory(self, n_items: int, n_matrices: int) -> int:
        """Return the bytes that solving takes at its peak, the weights included.

        Args:
            n_items: number of items.
            n_matrices: of weights, that exist at a time: 1 for a single solution, 3 with a prior.
        """


class DenseSolver:
    """Solves by the Cholesky decomposition of the whole matrix.

    Without a prior it takes the memory of one matrix of n_items x n_items, with one of three, the prior included;
    see :meth:`estimate_memory`. On two cores 12,000 items take 20 s in double and 12 s in single precision.

    Args:
        dtype: float64 or float32; double precision takes twice the time and memory.
        device: of the decomposition and the weights.
    """

    def __init__(self, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu") -> None:
        self.dtype, self.device = dtype, device

    def solve(
        self, sources: Sequence[Source], reg: float | Tensor, prior: Tensor | None = None, prior_weight: float = 0.0
    ) -> Tensor:
        """Return the weights, see :class:`Solver`: dense, in the solver's precision."""
        if prior is None:
            return self.solve_with_diagonal(sources, reg + prior_weight)[0]
        inverse = self._invert(sources, reg + prior_weight)
        weights = torch.mm(inverse, prior).mul_(prior_weight)
        scale = (1 + weights.diagonal()) / inverse.diagonal()
        return weights.sub_(inverse.mul_(scale)).fill_diagonal_(0)

    def solve_with_diagonal(self, sources: Sequence[Source], reg: float | Tensor) -> tuple[Tensor, Tensor]:
        """Return the weights and the diagonal of P, see :class:`Solver`."""
        inverse = self._invert(sources, reg)
        diagonal = inverse.diagonal().clone()
        return inverse.div_(-diagonal).fill_diagonal_(0), diagonal

    def _invert(self, sources: Sequence[Source], reg: float | Tensor) -> Tensor:
        matrix = self.gram(sources)
        matrix.diagonal().add_(reg.to(matrix) if isinstance(reg, Tensor) else reg)
        return invert(matrix)

    def gram(self, sources: Sequence[Source]) -> Tensor:
        """Return the weighted sum of the Gram matrices, on the device; it is overwritten by solving."""
        return gram(sources, self.dtype).to(self.device)

    def add(self, first: Tensor, second: Tensor, share: float) -> Tensor:
        """Return ``(1 - share) * first + share * second``, in place of the first."""
        return first.mul_(1 - share).add_(second, alpha=share)

    def estimate_memory(self, n_items: int, n_matrices: int) -> int:
        """Return the bytes that solving takes, see :class:`Solver`, with the weights' copy in single precision.

        A block of a Gram matrix is there three times; on a GPU the inversion takes three matrices more.
        """
        copies = n_matrices + 3 * (torch.device(self.device).type != "cpu")
        matrices = n_items**2 * (copies * self.dtype.itemsize + 4 * (self.dtype != torch.float32))
        return matrices + 3 * 8 * min(BLOCK, n_items) * n_items


class NeighbourSolver:
    r"""Solves each column for a fixed number of weights; its memory grows with the items, not with their square.

    Column j minimises the same objective over the ``n_neighbours`` items with the largest
    :math:`|G_{ij}| / \sqrt{G_{ii} + \lambda}`, all other weights being zero.

    Args:
        n_neighbours: weights per column.
        step: columns at a time.
    """

    def __init__(self, n_neighbours: int, step: int = 64) -> None:
        self.n_neighbours, self.step = n_neighbours, step

    def solve(
        self,
        sources: Sequence[Source],
        reg: float | Tensor,
        prior: scipy.sparse.csr_array | None = None,
        prior_weight: float = 0.0,
    ) -> scipy.sparse.csr_array:
        """Return the weights, see :class:`Solver`: sparse."""
        return self._solve(sources, reg + prior_weight, prior, prior_weight)[0]

    def solve_with_diagonal(
        self, sources: Sequence[Source], reg: float | Tensor
    ) -> tuple[scipy.sparse.csr_array, Tensor]:
        """Return the weights and the diagonal of P, see :class:`Solver`."""
        return self._solve(sources, reg)

    def _solve(
        self,
        sources: Sequence[Source],
        reg: float | Tensor,
        prior: scipy.sparse.csr_array | None = None,
        prior_weight: float = 0.0,
    ) -> tuple[scipy.sparse.csr_array, Tensor]:
        n_items = sources[0].factor.shape[0]
        penalty = torch.as_tensor(reg, dtype=torch.float64).expand(n_items)
        left = _diagonal(sources) + penalty
        scale = left.rsqrt()
        columns = None if prior is None else prior.tocsc()
        k = min(self.n_neighbours, n_items - 1)
        near, values = torch.empty(n_items, k, dtype=torch.int64), torch.empty(n_items, k, dtype=torch.float64)
        for block in _blocks(n_items, self.step):  # nothing that stays is made in here: it would lie in freed blocks
            wanted = gram_rows(sources, block)
            if columns is not None:
                wanted += prior_weight * torch.from_numpy(columns[:, block].T.toarray())
            rank = wanted.abs() * scale
            rank[torch.arange(len(rank)), torch.arange(block.start, block.stop)] = -1  # no weight on itself
            neighbours = rank.topk(k, dim=1).indices
            system = _gram_among(sources, neighbours)
            system.diagonal(dim1=1, dim2=2).add_(penalty[neighbours])
            lower, info = torch.linalg.cholesky_ex(system)
            if info.any():
                raise SettingError(SINGULAR)
            wanted = wanted.gather(1, neighbours)
            values[block] = torch.cholesky_solve(wanted.unsqueeze(2), lower).squeeze(2)
            left[block] -= (wanted * values[block]).sum(1)
            near[block] = neighbours
        entries = values.flatten().numpy(), near.flatten().numpy()
        weights = scipy.sparse.csc_array((*entries, np.arange(n_items + 1) * k), shape=(n_items, n_items))
        weights.eliminate_zeros()
        return weights.tocsr(), 1 / left

    def add(
        self, first: scipy.sparse.csr_array, second: scipy.sparse.csr_array, share: float
    ) -> scipy.sparse.csr_array:
        """Return ``(1 - share) * first + share * second``."""
        return (1 - share) * first + share * second

    def estimate_memory(self, n_items: int, n_matrices: int) -> int:
        """Return the bytes that solving takes, see :class:`Solver`: the weights, and the systems of some columns.

        Of a dense factor, the rows of some columns' neighbours are there, ``GATHERED`` numbers, and the next ones.
        """
        k = min(self.n_neighbours, n_items - 1)
        return 32 * n_matrices * k * n_items + 3 * 8 * self.step * (n_items + k**2) + 2 * 8 * GATHERED


def top_weights(weights: Matrix, k: int) -> scipy.sparse.csc_array:
    """Return the k weights of each column that are largest in absolute value, ``[n_items, n_items]``.

    Args:
        weights: ``[n_items, n_items]``, dense or sparse.
        k: weights per column.
    """
    n_items = weights.shape[0]
    k = min(k, n_items)
    columns = weights if isinstance(weights, Tensor) else weights.tocsc()
    values, rows = [], []
    for block in _blocks(n_items):
        part = columns[:, block]
        part = part.cpu() if isinstance(part, Tensor) else torch.from_numpy(part.toarray())
        near = part.abs().topk(k, dim=0).indices.sort(dim=0).values
        values.append(part.gather(0, near).T.flatten())
        rows.append(near.T.flatten())
    entries = torch.cat(values).numpy(), torch.cat(rows).numpy()
    kept = scipy.sparse.csc_array((*entries, np.arange(n_items + 1) * k), shape=(n_items, n_items))
    kept.eliminate_zeros()
    return kept


def history_scores(history: scipy.sparse.csr_array, weights: Matrix, device: torch.device | str) -> Tensor:
    """Return x B for each row x of ``history [n, n_items]``, ones where a user has an item; ``[n, n_items]``."""
    if not isinstance(weights, Tensor):
        return torch.from_numpy((history @ weights).toarray().astype(np.float32)).to(device)
    items, bounds = (torch.from_numpy(ids.astype(np.int64)) for ids in (history.indices, history.indptr[:-1]))
    return F.embedding_bag(items.to(weights.device), weights, bounds.to(weights.device), mode="sum")


def weights_on(weights: Matrix, items: np.ndarray, item: int) -> np.ndarray:
    """Return the weights that ``item`` has on ``items [n]``, ``[n]`` float64."""
    if isinstance(weights, Tensor):
        return weights[torch.from_numpy(items.astype(np.int64)), item].cpu().numpy().astype(np.float64)
    return weights[items][:, [item]].toarray().ravel()


def _diagonal(sources: Sequence[Source]) -> Tensor:
    squares = [
        weight * (torch.einsum("ij,ij->i", f, f) if isinstance(f, Tensor) else torch.from_numpy(f.power(2).sum(axis=1)))
        for f, weight in sources
    ]
    return torch.stack(squares).sum(0)


def _gram_among(sources: Sequence[Source], items: Tensor) -> Tensor:
    """Return the sum of the Gram matrices among the items of each row, ``[b, k]`` -> ``[b, k, k]``."""
    total = torch.zeros(*items.shape, items.shape[1], dtype=torch.float64)
    for factor, weight in sources:
        if isinstance(factor, Tensor):
            step = max(GATHERED // max(items.shape[1] * factor.shape[1], 1), 1)
            for some in _blocks(len(items), step):
                rows = factor[items[some]]
                total[some].baddbmm_(rows, rows.transpose(1, 2), alpha=weight)
        else:
            for place, chosen in enumerate(items.numpy()):
                some = factor[chosen]
                total[place] += weight * torch.from_numpy((some @ some.T).toarray())
    return total
