r"""Loss functions, free of RecBole.

Equations and sources:

* BPR: :math:`-\log \sigma(s_{ui} - s_{uj})` (Rendle et al., UAI 2009);
* dynamic negatives: j is the candidate of highest score (Zhang et al., SIGIR 2013);
* InfoNCE: :math:`-\log \frac{e^{\cos(q, k^+)/\tau}}{e^{\cos(q, k^+)/\tau} + \sum_j e^{\cos(q, k_j)/\tau}}`
  (van den Oord et al., arXiv 1807.03748);
* alignment :math:`\|\bar q - \bar k\|^2` and uniformity :math:`\log E\, e^{-2 \|\bar x - \bar y\|^2}`
  (Wang & Isola, ICML 2020).

SLIF-MR (arXiv 2507.09998) uses them as the inter-modal loss (a view of an item against the fused benchmark
representation, which gets no gradient) and the intra-modal loss (a user against an item they interacted with, and
uniformly sampled items as negatives).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from recbole_slifmr.nn.layers import unit

INTER_LOSSES = ("infonce", "cosine")
INTRA_LOSSES = ("infonce", "alignment_uniformity")


class Losses(NamedTuple):
    """The weighted terms of a batch; their sum is minimised. Scalars."""

    bpr: Tensor
    inter: Tensor
    intra: Tensor
    reg: Tensor


def bpr_loss(pos_score: Tensor, neg_score: Tensor) -> Tensor:
    """Return the mean BPR loss of ``pos_score [B]`` over ``neg_score [B]``."""
    return F.softplus(neg_score - pos_score).mean()


def hardest_negatives(
    users: Tensor, negatives: Tensor, candidates: Tensor, known: Tensor, added: Tensor | float = 0.0
) -> Tensor:
    """Return which candidate each user scores highest; no gradients.

    Args:
        users: ``[B, d]``.
        negatives: ``[N, d]``.
        candidates: rows of ``negatives``, ``[B, K]``.
        known: ``[B, K]`` bool, what the user interacted with and so is no negative; not all of a row's candidates.
        added: to the inner products, ``[B, K]``.

    Returns:
        one column of ``candidates`` for each user, ``[B, 1]``.
    """
    with torch.no_grad():
        scores = torch.einsum("bd,bkd->bk", users, negatives[candidates]) + added
        return scores.masked_fill_(known, torch.finfo(scores.dtype).min).argmax(1, keepdim=True)


def collision_mask(ids: Tensor, negative_ids: Tensor) -> Tensor:
    """Return ``[B, n]``: -10,000 where a negative ``[n]`` has the id of the own key ``[B]``, else 0."""
    same = ids[:, None] == negative_ids[None]
    return torch.zeros(same.shape, device=ids.device).masked_fill_(same, -1e4)  # -inf: NaN where nothing is left


def info_nce(
    query: Tensor, key: Tensor, negative: Tensor, mask: Tensor, temperature: float, weight: Tensor | None = None
) -> Tensor:
    """Return InfoNCE of each query against its own key, with the same negatives for every query.

    Args:
        query: ``[B, d]``.
        key: ``[B, d]``, the positive of each query.
        negative: ``[n, d]``.
        mask: ``[B, n]`` of :func:`collision_mask`: a negative with the id of the positive is none.
        temperature: divides the cosine similarities; positive.
        weight: of each query, ``[B]``; 1 if None.

    Returns:
        the mean over the batch of the weighted terms, a scalar; 0 for an empty batch and without negatives.
    """
    return _info_nce(unit(query), unit(key), unit(negative), mask, temperature, weight)


def contrast_nodes(pairs: Sequence[tuple[Tensor, Tensor]], ids: Tensor, temperature: float, n_negatives: int) -> Tensor:
    """Return InfoNCE between two views of nodes, among the distinct nodes of a batch, added up over pairs of views.

    With more of them than ``n_negatives``, so many drawn uniformly are the negatives: time and memory would grow with
    the square of the batch.

    Args:
        pairs: query and key, of all nodes ``[n, d]`` each.
        ids: the nodes of the batch, ``[B]``; repeated ones count once.
        temperature: divides the cosine similarities; positive.
        n_negatives: at most so many negatives.

    Returns:
        the sum over the pairs of the mean over the distinct nodes, a scalar.
    """
    ids = ids.unique()
    others = torch.arange(len(ids), device=ids.device)
    if len(ids) > n_negatives:
        others = torch.randperm(len(ids), device=ids.device)[:n_negatives]
    mask = collision_mask(ids, ids[others])
    terms = []
    for query, key in pairs:
        keys = key.index_select(0, ids)
        terms.append(info_nce(query.index_select(0, ids), keys, keys.index_select(0, others), mask, temperature))
    return torch.stack(terms).sum()


def _info_nce(
    query: Tensor, key: Tensor, negative: Tensor, mask: Tensor, temperature: float, weight: Tensor | None = None
) -> Tensor:
    """:func:`info_nce` of rows of unit length."""
    if len(query) == 0 or len(negative) == 0:
        return 0 * query.sum()
    query = query / temperature
    positive = (query * key).sum(1)
    terms = F.softplus(_ProductLogSumExp.apply(query, negative, mask) - positive)
    return (terms if weight is None else weight * terms).mean()


class _ProductLogSumExp(torch.autograd.Function):
    """``logsumexp(query @ key.T + mask)`` over the keys, ``[B]``.

    Works in place on the one ``[B, n]`` matrix that it makes, and its backward is two matrix products: the contrastive
    terms are most of a training step, and autograd's own version passes over such matrices about three times as often.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, mask: Tensor) -> Tensor:
        logits = torch.addmm(mask.to(query.dtype), query, key.T)
        top = logits.amax(1, keepdim=True)
        exponential = logits.sub_(top).exp_()
        total = exponential.sum(1, keepdim=True)
        ctx.save_for_backward(query, key, exponential, total)
        return (top + total.log()).squeeze(1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        query, key, exponential, total = ctx.saved_tensors
        scale = grads[0].unsqueeze(1) / total
        return scale * (exponential @ key), exponential.T @ (scale * query), None


def cosine_distance(query: Tensor, key: Tensor) -> Tensor:
    """Return the mean of 1 - cosine over the rows of ``query`` and ``key [B, d]``; 0 for an empty batch."""
    return (1 - F.cosine_similarity(query, key, dim=1)).mean() if len(query) else query.sum()


def alignment_uniformity(query: Tensor, key: Tensor, n_negatives: int) -> Tensor:
    """Return alignment of query and key plus the mean uniformity of both.

    Args:
        query: ``[B, d]``.
        key: ``[B, d]``.
        n_negatives: uniformity is measured over the pairs of the first so many rows.

    Returns:
        a scalar; 0 for an empty batch.
    """
    if len(query) == 0:
        return query.sum()
    query, key = unit(query), unit(key)
    alignment = (query - key).pow(2).sum(1).mean()
    spread = [_uniformity(rows[:n_negatives]) for rows in (query, key)]
    return alignment + (spread[0] + spread[1]) / 2


def _uniformity(rows: Tensor) -> Tensor:
    if len(rows) < 2:
        return rows.sum() * 0
    return torch.pdist(rows).pow(2).mul(-2).exp().mean().log()


def inter_modal_loss(
    views: Tensor, mask: Tensor, benchmark: Tensor, ids: Tensor, kind: str, temperature: float, n_negatives: int
) -> Tensor:
    """Pull every view of an item towards its benchmark representation, never the other way.

    Args:
        views: ``[B, V, d]``.
        mask: ``[B, V]`` bool, whether the item has the view.
        benchmark: ``[B, d]``; no gradient reaches it.
        ids: ``[B]``, the items.
        kind: one of ``INTER_LOSSES``.
        temperature: of InfoNCE.
        n_negatives: of InfoNCE.

    Returns:
        the mean over the views, a scalar.
    """
    views, benchmark = unit(views), unit(benchmark.detach())
    pairs = _pairs_by_view(views, [benchmark] * views.shape[1], mask, ids)
    if kind == "infonce":
        return _mean_info_nce(pairs, [(target, ids) for _, target, ids in pairs], temperature, n_negatives)
    return torch.stack([cosine_distance(view, target) for view, target, _ in pairs]).mean()


def intra_modal_loss(
    users: Tensor,
    items: Tensor,
    mask: Tensor,
    ids: Tensor,
    negatives: tuple[Tensor, Tensor, Tensor],
    kind: str,
    temperature: float,
    n_negatives: int,
) -> Tensor:
    """Align user and interacted item within each view, and keep the batch spread out.

    Args:
        users: ``[B, V, d]``.
        items: ``[B, V, d]``.
        mask: ``[B, V]`` bool, whether both have the view.
        ids: ``[B]``, the items.
        negatives: other items' views ``[N, V, d]``, mask ``[N, V]`` and ids ``[N]``, for InfoNCE.
        kind: one of ``INTRA_LOSSES``.
        temperature: of InfoNCE.
        n_negatives: of either; InfoNCE takes the first that have the view.

    Returns:
        the mean over the views, a scalar.
    """
    pairs = _pairs_by_view(unit(users), unit(items).unbind(1), mask, ids)
    if kind == "infonce":
        rows = unit(negatives[0])
        others = [(view, ids) for view, _, ids in _pairs_by_view(rows, rows.unbind(1), *negatives[1:])]
        return _mean_info_nce(pairs, others, temperature, n_negatives)
    return torch.stack([alignment_uniformity(user, item, n_negatives) for user, item, _ in pairs]).mean()


def _pairs_by_view(
    queries: Tensor, keys: Sequence[Tensor], mask: Tensor, ids: Tensor
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return query, key and id of the rows that have each view; where all have it, nothing is copied."""
    complete = mask.all(0).tolist()
    pairs = []
    for v, (query, key) in enumerate(zip(queries.unbind(1), keys, strict=True)):
        if complete[v]:
            pairs.append((query, key, ids))
        else:
            rows = mask[:, v].nonzero().squeeze(1)
            pairs.append((query.index_select(0, rows), key.index_select(0, rows), ids[rows]))
    return pairs


def _mean_info_nce(
    pairs: Sequence[tuple[Tensor, Tensor, Tensor]],
    negatives: Sequence[tuple[Tensor, Tensor]],
    temperature: float,
    n_negatives: int,
) -> Tensor:
    masks: dict[tuple[int, int], Tensor] = {}  # the views that everyone has share one
    terms = []
    for (query, key, ids), (negative, negative_ids) in zip(pairs, negatives, strict=True):
        which = id(ids), id(negative_ids)
        if which not in masks:
            masks[which] = collision_mask(ids, negative_ids[:n_negatives])
        terms.append(_info_nce(query, key, negative[:n_negatives], masks[which], temperature))
    return torch.stack(terms).mean()


def l2_loss(*embeddings: Tensor) -> Tensor:
    """Return half the squared norm of the rows of a batch, divided by the batch size; ``[B, d]`` each."""
    return sum((rows.pow(2).sum() / (2 * max(len(rows), 1)) for rows in embeddings), torch.zeros(()).to(embeddings[0]))


def bpr_gradient(users: Tensor, items: Tensor, triplets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradient of BPR, summed over the triplets, for all users and items.

    Args:
        users: ``[n_users, d]``.
        items: ``[n_items, d]``.
        triplets: user, positive and negative item of each, ``[3, E]``; taken some at a time.

    Returns:
        ``[n_users, d]`` and ``[n_items, d]``.
    """
    grad_users, grad_items = torch.zeros_like(users), torch.zeros_like(items)
    for user, pos, neg in triplets.split(65536, dim=1):
        rows, difference = users[user], items[neg] - items[pos]
        push = torch.sigmoid((rows * difference).sum(1, keepdim=True))
        grad_users.index_add_(0, user, push * difference)
        grad_items.index_add_(0, neg, push * rows).index_add_(0, pos, -push * rows)
    return grad_users, grad_items
