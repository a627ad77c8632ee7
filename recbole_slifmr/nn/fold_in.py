r"""Representations of users who were not in training, from the items they have: folding in.

A graph model gives a user, layer by layer, the sum of the items :math:`e_i` with the weights of the normalised graph.
With the items as they are after training, a new user u with the items :math:`N_u` gets

.. math::
    e_u = c \sum_{i \in N_u} \frac{e_i}{\sqrt{|N_u| \, d_i}}, \qquad
    c = \frac{\sum_v \langle e_v, f_v \rangle}{\sum_v \|f_v\|^2} ,

where :math:`d_i` is the number of training interactions of an item, and c the number by which the sums :math:`f_v` of
the users v of the training come nearest to their own :math:`e_v`. What is missing is the user's own embedding and what
the items would have taken from it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from recbole_slifmr.nn.graph import Edges
from recbole_slifmr.nn.sparse import SparseMatrix


def fold_in(users: Tensor, items: Tensor, known: Tensor, new: Tensor, n_new: int) -> Tensor:
    """Return the representations of new users, as the module says.

    Args:
        users: of the training, ``[n_users, d]``.
        items: ``[n_items, d]``.
        known: user and item of each training interaction, ``[2, E]``, unique.
        new: new user and item of each of their interactions, ``[2, N]``, unique.
        n_new: number of new users.

    Returns:
        ``[n_new, d]``.
    """
    degree = torch.bincount(known[1], minlength=len(items)).clamp(min=1).to(items.dtype)

    def sums(edges: Tensor, n: int) -> Tensor:
        counts = torch.bincount(edges[0], minlength=n).to(items.dtype)
        weight = (counts[edges[0]] * degree[edges[1]]).rsqrt()
        return SparseMatrix(Edges(edges, weight), (n, len(items))).multiply(items)

    of_known = sums(known, len(users))
    scale = (users * of_known).sum() / of_known.square().sum().clamp(min=torch.finfo(items.dtype).tiny)
    return scale * sums(new, n_new)
