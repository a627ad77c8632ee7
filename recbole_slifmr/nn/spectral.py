r"""The largest singular vectors of sparse matrices, and the embeddings that training starts from."""

from __future__ import annotations

import numpy as np
import scipy.sparse
import torch
from sklearn.utils.extmath import randomized_svd
from torch import Tensor

N_ITERATIONS = 8
DENSE = 2**22  # entries of a matrix that is small enough for an exact decomposition


def largest_singular(matrix: scipy.sparse.csr_array, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    r"""Return U, the diagonal of :math:`\Sigma` and :math:`V^T` of the k largest singular values of ``[n, m]``.

    Exact for small matrices, else by randomised subspace iteration (Halko, Martinsson, Tropp, SIAM Review 2011) with a
    seed of its own. The same matrix gives the same vectors also where singular values are equal, as those of a graph of
    several components are; ARPACK would then go on from random numbers that cannot be seeded.

    Args:
        matrix: ``[n, m]``.
        k: not more than the smaller side.

    Returns:
        ``[n, k]``, ``[k]`` and ``[k, m]``.
    """
    if matrix.shape[0] * matrix.shape[1] <= DENSE:
        left, values, right = np.linalg.svd(matrix.toarray(), full_matrices=False)
        return left[:, :k], values[:k], right[:k]
    return randomized_svd(scipy.sparse.csr_matrix(matrix), k, n_iter=N_ITERATIONS, random_state=0)


def spectral_embeddings(edge_index: Tensor, n_users: int, n_items: int, size: int) -> tuple[Tensor, Tensor]:
    r"""Factorise the normalised interactions :math:`\hat R \approx U \Sigma V^T`.

    Linear propagation over the interactions keeps the directions of the largest singular values and damps the others,
    so that a model of it ends near them (Shen et al., CIKM 2021, arXiv 2108.07567).

    Args:
        edge_index: user and item of each interaction, ``[2, E]``, unique.
        n_users: number of users.
        n_items: number of items.
        size: number of singular vectors; fewer if the matrix has no more.

    Returns:
        :math:`U \Sigma^{1/2}`, ``[n_users, k]``, and :math:`V \Sigma^{1/2}`, ``[n_items, k]``, both float32 and times
        the number that makes the geometric mean of their root mean squares 1; rows without interactions are zeros.
    """
    k = min(size, n_users, n_items)
    if not edge_index.shape[1] or k < 1:
        return torch.zeros(n_users, 0), torch.zeros(n_items, 0)
    users, items = edge_index.cpu().numpy()
    degrees = np.bincount(users, minlength=n_users), np.bincount(items, minlength=n_items)
    weights = 1 / np.sqrt(degrees[0][users] * degrees[1][items])
    matrix = scipy.sparse.csr_array((weights, (users, items)), shape=(n_users, n_items))
    left, values, right = largest_singular(matrix, k)
    parts = left * np.sqrt(values), right.T * np.sqrt(values)
    found = [
        torch.from_numpy(np.where(degree[:, None] > 0, part, 0).astype(np.float32))
        for degree, part in zip(degrees, parts, strict=True)
    ]
    scale = torch.stack([part.square().mean().sqrt() for part in found]).prod().sqrt()
    return found[0] / scale, found[1] / scale
