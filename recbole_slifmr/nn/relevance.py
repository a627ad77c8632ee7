"""How much each source of item knowledge says of which items have the same users; free of RecBole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import scipy.optimize
import scipy.sparse
from torch import Tensor

from recbole_slifmr.nn.linear import Matrix
from recbole_slifmr.nn.tags import Tags, indicator

COLUMNS = 16384  # of a sparse factor at a time
DENSE = 256  # columns of a dense one
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
    sources = [by_chance, *(_columns(factor) for factor in factors)]
    lengths = np.stack([_squares(source) for source in sources], axis=1)
    users = _Stack(interactions.tocsc(), np.zeros(1, dtype=np.int64), np.zeros(interactions.shape[1], dtype=np.int64))
    products, wanted = -lengths.T @ lengths, -lengths.T @ by_chance
    stacks = _stacks(sources)
    for place, first in enumerate(stacks):
        wanted[first.sources] += _inner_products(first, users)
        for second in stacks[place:]:
            found = _inner_products(first, second)
            products[np.ix_(first.sources, second.sources)] += found
            if second is not first:
                products[np.ix_(second.sources, first.sources)] += found.T
    says = np.diag(products) > LEAST * np.square(lengths).sum(axis=0)
    beta = np.zeros(len(sources))
    if says.any():
        scale = np.sqrt(np.diag(products)[says])
        normal = products[np.ix_(says, says)] / np.outer(scale, scale) + JITTER * np.eye(len(scale))
        lower = np.linalg.cholesky(normal)
        beta[says] = scipy.optimize.nnls(lower.T, np.linalg.solve(lower, wanted[says, 0] / scale))[0] / scale
    return beta[1:]


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
        such tag. If one of the two says something and the other nothing, zeros for the other.
    """
    kinds = np.unique(tags.kinds)
    of_kinds = [tags.items[:, tags.kinds == kind] for kind in kinds]
    beta = relevance(interactions, [*features, *of_kinds])
    groups = (beta[: len(features)], features), (beta[len(features) :], of_kinds)
    says = [some.any() or not beta.any() for some, _ in groups]
    found, of_kind = (shares(*group) * counts for group, counts in zip(groups, says, strict=True))
    by_kind = np.ones(kinds.max(initial=-1) + 1)
    by_kind[kinds] = of_kind
    return found, by_kind


def _columns(factor: Matrix) -> np.ndarray | scipy.sparse.csc_array:
    return factor.cpu().numpy() if isinstance(factor, Tensor) else factor.tocsc()


def _squares(factor: np.ndarray | scipy.sparse.csc_array) -> np.ndarray:
    """Return the squared length of each row."""
    if isinstance(factor, np.ndarray):
        return np.einsum("ij,ij->i", factor, factor)  # without the squares of all
    return factor.power(2).sum(axis=1)


class _Stack(NamedTuple):
    """Sources side by side: a dense one alone, or all sparse ones.

    Attributes:
        columns: ``[n_items, c]``.
        sources: which they are, ``[n]``.
        places: of the source of each column among them, ``[c]``.
    """

    columns: np.ndarray | scipy.sparse.csc_array
    sources: np.ndarray
    places: np.ndarray


def _stacks(sources: Sequence[np.ndarray | scipy.sparse.csc_array]) -> list[_Stack]:
    """Return each dense source, which is not copied, and the sparse ones side by side."""
    dense = [place for place, source in enumerate(sources) if isinstance(source, np.ndarray)]
    sparse = [place for place, source in enumerate(sources) if not isinstance(source, np.ndarray)]
    stacks = [_Stack(sources[place], np.array([place]), np.zeros(sources[place].shape[1], int)) for place in dense]
    if sparse:
        some = [sources[place] for place in sparse]
        places = np.repeat(np.arange(len(some)), [source.shape[1] for source in some])
        stacks.append(_Stack(scipy.sparse.hstack(some, format="csc"), np.array(sparse), places))
    return stacks


def _inner_products(first: _Stack, second: _Stack) -> np.ndarray:
    """Return those of the Gram matrices of the sources of the first and of the second, ``[n, m]``."""
    total = np.zeros((len(first.sources), len(second.sources)))
    for some in _blocks(first.columns):
        rows, of_first = first.columns[:, some].T, _membership(first.places[some], len(first.sources)).T
        for others in _blocks(second.columns):
            product = rows @ second.columns[:, others]
            numbers = product if isinstance(product, np.ndarray) else product.data
            np.square(numbers, out=numbers)
            part = of_first @ product @ _membership(second.places[others], len(second.sources))
            total += part.toarray() if scipy.sparse.issparse(part) else part
    return total


def _blocks(columns: np.ndarray | scipy.sparse.csc_array) -> Iterator[slice]:
    """Return which columns are taken at a time."""
    step = DENSE if isinstance(columns, np.ndarray) else COLUMNS
    return (slice(start, start + step) for start in range(0, columns.shape[1], step))


def _membership(places: np.ndarray, n: int) -> scipy.sparse.csr_array:
    """Return a one in each row, at the place that is given for it, ``[c, n]``."""
    return indicator(np.arange(len(places)), places, (len(places), n))
