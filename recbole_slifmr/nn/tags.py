"""A knowledge graph as tags of the items, free of RecBole: what an item is linked with; rare links count more."""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import numpy as np
import scipy.sparse
import torch
from torch import Tensor

from recbole_slifmr.nn.spectral import largest_singular

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


def tag_vectors(triples: np.ndarray, n_items: int, size: int) -> Tensor:
    """Return the items' tags as vectors, ``[n_items, size]`` float32, zeros for items without tags.

    The rows of :func:`tag_factor`, each of unit length, on their ``size`` largest singular directions; with no more
    than ``size`` tags the rows themselves.

    Args:
        triples: head, relation, tail, ``[T, 3]``; entity i is item i for ``0 < i < n_items``.
        n_items: number of items, the padding item 0 included.
        size: most numbers per item.
    """
    rows = _unit_rows(tag_factor(triples, n_items))
    if rows.shape[1] <= size or n_items <= size:
        return torch.from_numpy(rows.toarray().astype(np.float32))
    left, values, _ = largest_singular(rows, size)
    vectors = np.where(np.diff(rows.indptr)[:, None] > 0, left * values, 0.0)
    return torch.from_numpy(np.ascontiguousarray(vectors.astype(np.float32)))


def new_tag_vectors(triples: np.ndarray, n_items: int, size: int, links: np.ndarray, n_new: int) -> Tensor:
    """Return the tags of new items in the coordinates of :func:`tag_vectors`, ``[n_new, size]``.

    Args:
        triples: see there.
        n_items: see there.
        size: see there.
        links: of the new items, ``[L, 3]``, see :func:`tag_factors`.
        n_new: number of new items.
    """
    tags = tag_factors(triples, n_items, 1, links, n_new)
    rows, new = _unit_rows(tags.items), _unit_rows(tags.new)
    if rows.shape[1] <= size or n_items <= size:
        return torch.from_numpy(new.toarray().astype(np.float32))
    directions = largest_singular(rows, size)[2]
    return torch.from_numpy((new @ directions.T).astype(np.float32))


def _unit_rows(matrix: scipy.sparse.csr_array) -> scipy.sparse.csr_array:
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
