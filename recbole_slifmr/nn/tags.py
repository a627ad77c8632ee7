"""A knowledge graph as tags of the items, free of RecBole: what an item is linked with; rare links count more."""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import numpy as np
import scipy.sparse
import torch
from sklearn.utils.extmath import svd_flip
from torch import Tensor

from recbole_slifmr.nn.spectral import largest_singular

TIE_BREAK = 1e-3
W = TypeVar("W", scipy.sparse.csr_array, scipy.sparse.csc_array)


class Tags(NamedTuple):
    """The tags of items.

    Attributes:
        items: ``[n_items, n_tags]``.
        new: of new items, ``[n_new, n_tags]``.
        kinds: of the tags, ``[n_tags]``: ``2 * relation``, or ``2 * relation + 1`` where the item is the tail; of a tag
            of the second hop, the way that leads to the neighbour.
    """

    items: scipy.sparse.csr_array
    new: scipy.sparse.csr_array
    kinds: np.ndarray


def tag_factor(triples: np.ndarray, n_items: int, n_hops: int = 1) -> scipy.sparse.csr_array:
    r"""Return the tags that the knowledge graph gives the items, ``[n_items, n_tags]``.

    A tag is a relation, its direction and the entity at its other end. If that entity is an item, it has the tag, too:
    so the two ends of a link between items, such as a citation, have tags in common. Of n items, df have the tag; its
    column is :math:`\sqrt{\log(1 + n / df)}` in their rows. Tags of one item alone are left out. With two hops, an item
    also has the tags that its neighbours have, with the relation and direction that lead to the neighbour; entities
    that are items of their own are left out of the second hop.

    Args:
        triples: head, relation, tail, ``[T, 3]``; entity i is item i for ``0 < i < n_items``.
        n_items: number of items, the padding item 0 included.
        n_hops: 1 or 2.
    """
    return tag_factors(triples, n_items, n_hops).items


def tag_factors(
    triples: np.ndarray, n_items: int, n_hops: int = 1, links: np.ndarray | None = None, n_new: int = 0
) -> Tags:
    """Return :func:`tag_factor`, the tags that new items have of these, and what kind of tag each is.

    New items change neither which tags there are nor what each counts.

    Args:
        triples: see :func:`tag_factor`.
        n_items: see there.
        n_hops: see there.
        links: of the new items, ``[L, 3]``: which of them, ``2 * relation`` or, where the new item is the tail,
            ``2 * relation + 1``, and the entity at the other end; none if None.
        n_new: number of new items.
    """
    head, relation, tail = triples.T
    start, end = np.concatenate([head, tail]), np.concatenate([tail, head])
    kind = np.concatenate([2 * relation, 2 * relation + 1])
    n_entities = max(n_items, int(triples[:, [0, 2]].max(initial=0)) + 1)
    known, tag = start < n_items, kind * n_entities + end
    near = np.unique(tag[known])
    linked = near[near % n_entities < n_items]  # tags whose entity is an item
    onward, steps = None, np.zeros(0, dtype=np.int64)
    if n_hops == 2:
        onward = _among(start, tag, np.unique(tag[end >= n_items]), n_entities)
        steps = np.unique(kind[known & (end >= n_items)])

    def rows(row: np.ndarray, kind: np.ndarray, end: np.ndarray, n_rows: int) -> scipy.sparse.csc_array:
        found = [_among(row, kind * n_entities + end, near, n_rows)]
        for step in steps:
            chosen = (kind == step) & (end >= n_items)
            found.append(indicator(row[chosen], end[chosen], (n_rows, n_entities)) @ onward)
        return scipy.sparse.hstack(found, format="csc")

    kinds = np.concatenate([near // n_entities, np.repeat(steps, 0 if onward is None else onward.shape[1])])
    having = np.concatenate([start[known], linked % n_entities])
    every = rows(having, *np.divmod(np.concatenate([tag[known], linked]), n_entities), n_items)
    frequency = np.diff(every.indptr)
    shared = frequency > 1
    scale = scipy.sparse.diags_array(np.sqrt(np.log1p((n_items - 1) / frequency[shared])))
    of, way, other = np.zeros((3, 0), dtype=np.int64) if links is None else links.T
    new = rows(of, way, other, n_new)
    of_items, of_new = ((_ones(part[:, shared]) @ scale).tocsr() for part in (every, new))
    return Tags(of_items, of_new, kinds[shared])


def tag_vectors(rows: scipy.sparse.csr_array, size: int, new: scipy.sparse.csr_array | None = None) -> Tensor:
    r"""Return tags as vectors, ``[n_items, size]`` float32, zeros for items without tags.

    The rows projected on their ``size`` largest singular directions; with no more than ``size`` tags the rows
    themselves. Singular values that are equal, as those of brands with as many items each, would leave the directions
    to rounding: for the decomposition alone the columns are made to differ by up to a thousandth.

    Args:
        rows: see :func:`unit_rows`, ``[n_items, n_tags]``.
        size: most numbers per item.
        new: the same of new items, ``[n_new, n_tags]``; if given, their vectors are returned, ``[n_new, size]``.
    """
    wanted = rows if new is None else new
    n_items, n_tags = rows.shape
    if n_tags <= size or n_items <= size:
        return torch.from_numpy(wanted.toarray().astype(np.float32))
    distinct = scipy.sparse.diags_array(1 + TIE_BREAK * np.arange(n_tags) / n_tags)
    left, _, right = largest_singular((rows @ distinct).tocsr(), size)
    directions = svd_flip(left, right)[1]
    return torch.from_numpy((wanted @ directions.T).astype(np.float32))


def unit_rows(matrix: scipy.sparse.csr_array) -> scipy.sparse.csr_array:
    """Return a matrix with each row scaled to unit length; rows of zeros stay as they are."""
    length = np.sqrt(matrix.power(2).sum(axis=1))
    return scipy.sparse.csr_array(scipy.sparse.diags_array(1 / np.where(length > 0, length, 1)) @ matrix)


def _among(rows: np.ndarray, keys: np.ndarray, wanted: np.ndarray, n_rows: int) -> scipy.sparse.csr_array:
    """Return ones in the rows at the places that their keys have among the ``wanted`` ones, sorted and unique."""
    place = np.searchsorted(wanted, keys)
    there = np.append(wanted, -1)[place] == keys
    return indicator(rows[there], place[there], (n_rows, len(wanted)))


def indicator(rows: np.ndarray, columns: np.ndarray, shape: tuple[int, int]) -> scipy.sparse.csr_array:
    """Return a matrix with ones at ``rows [N]`` and ``columns [N]``, once where a pair is there twice."""
    return _ones(scipy.sparse.csr_array((np.ones(len(rows)), (rows, columns)), shape=shape))


def _ones(matrix: W) -> W:
    """Set the entries of a sparse matrix to 1, in place."""
    matrix.data[:] = 1.0
    return matrix
