r"""Representations of users who were not in training, from the items they have: folding in.

A graph model gives a user, layer by layer, the sum of the items :math:`e_i` with the weights of the normalised graph.
With the items as they are after training, a new user u with the items :math:`N_u` gets

.. math::
    e_u = c \sum_{i \in N_u} \frac{e_i}{\sqrt{|N_u| \, d_i}}, \qquad
    c = \frac{\sum_v \langle e_v, f_v \rangle}{\sum_v \|f_v\|^2} ,

where :math:`d_i` is the number of training interactions of an item, and c the number by which the sums :math:`f_v` of
the users v of the training come nearest to their own :math:`e_v`. What is missing is the user's own embedding and what
the items would have taken from it. Where interactions are weighted, numbers of them are sums of their weights, and each
term counts as its interaction does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from recbole_slifmr.nn.graph import Edges, inverse_sqrt
from recbole_slifmr.nn.sparse import SparseMatrix


def item_shares(users: Tensor, items: Tensor, known: Tensor, weight: Tensor | None = None) -> Tensor:
    r"""Return :math:`c \, e_i / \sqrt{d_i}`, ``[n_items, d]``: what each item adds to a new user, for :func:`fold_in`.

    Args:
        users: of the training, ``[n_users, d]``.
        items: ``[n_items, d]``.
        known: user and item of each training interaction, ``[2, E]``, unique.
        weight: of each of them, ``[E]``; 1 if None.
    """
    weight = items.new_ones(known.shape[1]) if weight is None else weight
    degree = items.new_zeros(len(items)).index_add(0, known[1], weight)
    shares = items * degree.where(degree > 0, 1.0).rsqrt().unsqueeze(1)
    sums = fold_in(shares, known, len(users), weight)
    return shares * (users * sums).sum() / sums.square().sum().clamp(min=torch.finfo(items.dtype).tiny)


def fold_in(shares: Tensor, edge_index: Tensor, n_users: int, weight: Tensor | None = None) -> Tensor:
    """Return the representations of users by their items, ``[n_users, d]``.

    Args:
        shares: of the items, ``[n_items, d]``, see :func:`item_shares`.
        edge_index: user and item of each of their interactions, ``[2, E]``, unique.
        n_users: number of users.
        weight: of each interaction, ``[E]``; 1 if None.
    """
    weight = shares.new_ones(edge_index.shape[1]) if weight is None else weight
    counts = shares.new_zeros(n_users).index_add(0, edge_index[0], weight)
    weight = weight * inverse_sqrt(counts)[edge_index[0]]
    return SparseMatrix(Edges(edge_index, weight), (n_users, len(shares))).multiply(shares)
