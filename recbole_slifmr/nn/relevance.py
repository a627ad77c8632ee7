"""How much each source of item knowledge says of which items have the same users; free of RecBole."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy.optimize
import scipy.sparse
from torch import Tensor

from recbole_slifmr.nn.linear import Matrix
from recbole_slifmr.nn.tags import Tags

COLUMNS = 16384  # of a factor at a time
JITTER = 1e-9  # relative: two sources may say the same
LEAST = 1e-6  # of its diagonal, for what a Gram matrix has beside it to be more than rounding


def relevance(interactions: scipy.sparse.csr_array, factors: Sequence[Matrix]) -> np.ndarray:
    r"""Regress how many users two items share on how alike each source says they are.

    .. math::
        (X^T V X)_{ij} \approx a\, q_i q_j + \sum_s \beta_s (F_s F_s^T)_{ij} \quad (i \ne j), \qquad a, \beta_s \ge 0 ,

    by least squares over all pairs of different items; q is the number of users of each item, weighted by V, so that
    popular items may share users by chance. Regressing the products off the diagonal on likenesses is due to Haseman
    and Elston (Behavior Genetics 1972). Nothing of the size items x items is computed.

    Args:
        interactions: :math:`X^T V^{1/2}`, ``[n_items, n_users]``.
        factors: :math:`F_s`, ``[n_items, c_s]`` each.

    Returns:
        :math:`\beta`, one number per factor; zeros where the data say nothing.
    """
    by_chance = interactions.power(2).sum(axis=1)[:, None]
    users = interactions.tocsc()
    parts = [by_chance, *(_columns(factor) for factor in factors)]
    products = np.zeros((len(parts), len(parts)))
    for s, first in enumerate(parts):
        for t, second in enumerate(parts[: s + 1]):
            products[s, t] = products[t, s] = _off_diagonal(first, second)
    wanted = np.array([_off_diagonal(part, users) for part in parts])
    says = np.diag(products) > LEAST * np.array([np.square(_squares(part)).sum() for part in parts])
    found = np.zeros(len(parts))
    if says.any():
        scale = np.sqrt(np.diag(products)[says])
        normal = products[np.ix_(says, says)] / np.outer(scale, scale) + JITTER * np.eye(len(scale))
        lower = np.linalg.cholesky(normal)
        found[says] = scipy.optimize.nnls(lower.T, np.linalg.solve(lower, wanted[says] / scale))[0] / scale
    return found[1:]


def shares(beta: np.ndarray, factors: Sequence[Matrix]) -> np.ndarray:
    r"""Return what each of some sources counts beside the others, :math:`\propto \sqrt{\beta_s}`, ``[n]``.

    The mean is 1, where each source weighs as much as it says at all, the trace of its Gram matrix. All are 1 if no
    :math:`\beta_s` is above 0.

    Args:
        beta: see :func:`relevance`, ``[n]``.
        factors: the n sources, ``[n_items, c_s]`` each.
    """
    root = np.sqrt(beta)
    mass = np.array([_squares(_columns(factor)).sum() for factor in factors])
    total = float(root @ mass)
    return root * mass.sum() / total if total > 0 else np.ones(len(factors))


def share_out(
    interactions: scipy.sparse.csr_array, features: Sequence[Matrix], tags: Tags
) -> tuple[np.ndarray, np.ndarray]:
    """Return what each modality counts beside the others, and what each kind of tag does.

    Args:
        interactions: see :func:`relevance`.
        features: of the modalities, ``[n_items, d]`` each.
        tags: of the knowledge graph.

    Returns:
        :func:`shares` of the modalities, ``[n]``, and of the kinds of tags, ``[highest kind + 1]``, 1 where there is no
        such tag.
    """
    kinds = np.unique(tags.kinds)
    of_kinds = [tags.items[:, tags.kinds == kind] for kind in kinds]
    beta = relevance(interactions, [*features, *of_kinds])
    by_kind = np.ones(kinds.max(initial=-1) + 1)
    by_kind[kinds] = shares(beta[len(features) :], of_kinds)
    return shares(beta[: len(features)], features), by_kind


def _columns(factor: Matrix) -> np.ndarray | scipy.sparse.csc_array:
    return factor.cpu().numpy() if isinstance(factor, Tensor) else factor.tocsc()


def _squares(factor: np.ndarray | scipy.sparse.csc_array) -> np.ndarray:
    """Return the squared length of each row."""
    return np.square(factor).sum(axis=1) if isinstance(factor, np.ndarray) else factor.power(2).sum(axis=1)


def _off_diagonal(first: np.ndarray | scipy.sparse.csc_array, second: np.ndarray | scipy.sparse.csc_array) -> float:
    """Return the inner product of two Gram matrices without their diagonals."""
    total = 0.0
    for start in range(0, second.shape[1], COLUMNS):
        product = first.T @ second[:, start : start + COLUMNS]
        total += float((product.power(2) if scipy.sparse.issparse(product) else np.square(product)).sum())
    return total - float(_squares(first) @ _squares(second))
