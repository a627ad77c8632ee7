r"""Loss functions, free of RecBole.

Equations and sources:

* BPR: :math:`-\log \sigma(s_{ui} - s_{uj})` (Rendle et al., UAI 2009);
* sampled softmax: :math:`-\log \frac{e^{s_{ui}}}{e^{s_{ui}} + \sum_j e^{s_{uj}}}` (Wu et al., arXiv 2201.02327), which
  is BPR with one j;
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
CACHED = 262_144  # logits at a time on the CPU: 1 MB, which stays in its cache


class Losses(NamedTuple):
    """The weighted terms of a batch; their sum is minimised. Scalars."""

    ranking: Tensor
    inter: Tensor
    intra: Tensor
    reg: Tensor


def bpr_loss(pos_score: Tensor, neg_score: Tensor, weight: Tensor | None = None) -> Tensor:
    """Return the mean BPR loss of ``pos_score [B]`` over ``neg_score [B]``, weighted by row or over a mask if given."""
    return masked_mean(F.softplus(neg_score - pos_score), weight)


def masked_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Return the mean of ``values [B]`` over a mask or with weights ``[B]``; 0 if all are 0. No waiting for a GPU."""
    if mask is None:
        return values.mean() if len(values) else values.sum()
    return (values * mask).sum() / mask.to(values.dtype).sum().clamp(min=torch.finfo(values.dtype).tiny)


def softmax_loss(pos_score: Tensor, neg_scores: Tensor, known: Tensor, weight: Tensor | None = None) -> Tensor:
    r"""Return the mean cross entropy of each positive item among itself and sampled ones; with one of these it is BPR.

    .. math:: -\log \frac{e^{s_i}}{e^{s_i} + \sum_j e^{s_j}}

    Args:
        pos_score: :math:`s_i`, ``[B]``.
        neg_scores: :math:`s_j`, ``[B, K]``.
        known: what the user interacted with and so is no negative, ``[B, K]`` bool.
        weight: of the rows, ``[B]``; all alike if None.
    """
    negative = neg_scores.masked_fill(known, torch.finfo(neg_scores.dtype).min)
    scores = torch.cat([pos_score.unsqueeze(1), negative], dim=1)
    return masked_mean(scores.logsumexp(1) - pos_score, weight)


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
    query: Tensor,
    key: Tensor,
    negative: Tensor,
    mask: Tensor,
    temperature: float,
    weight: Tensor | None = None,
    absent: Tensor | None = None,
) -> Tensor:
    """:func:`info_nce` of rows of unit length; ``absent [n]`` is added to the logits of the negatives."""
    if len(query) == 0 or len(negative) == 0:
        return 0 * query.sum()
    query = query / temperature
    positive = (query * key).sum(1)
    terms = F.softplus(_ProductLogSumExp.apply(query, negative, mask, absent) - positive)
    return (terms if weight is None else weight * terms).mean()


class _ProductLogSumExp(torch.autograd.Function):
    """``logsumexp(query @ key.T + mask + absent)`` over the keys, ``[B]``.

    Works in place on the one ``[B, n]`` matrix that it makes, some rows at a time, and its backward is two matrix
    products: the contrastive terms are most of a training step, and autograd's own version passes over such matrices
    about three times as often.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, mask: Tensor, absent: Tensor | None) -> Tensor:
        exponential = query.new_empty(len(query), len(key))
        top, total = query.new_empty(len(query), 1), query.new_empty(len(query), 1)
        step = len(query) if query.is_cuda else max(CACHED // len(key), 1)
        for start in range(0, len(query), step):
            rows = slice(start, start + step)
            logits = torch.addmm(mask[rows].to(query.dtype), query[rows], key.T, out=exponential[rows])
            if absent is not None:
                logits.add_(absent)
            top[rows] = logits.amax(1, keepdim=True)
            total[rows] = logits.sub_(top[rows]).exp_().sum(1, keepdim=True)
        ctx.save_for_backward(query, key, exponential, total)
        return (top + total.log()).squeeze(1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        query, key, exponential, total = ctx.saved_tensors
        scale = grads[0].unsqueeze(1) / total
        return scale * (exponential @ key), exponential.T @ (scale * query), None, None


def cosine_distance(query: Tensor, key: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the mean of 1 - cosine over the rows of ``query`` and ``key [B, d]``, of the mask if any; 0 if empty."""
    return masked_mean(1 - F.cosine_similarity(query, key, dim=1), mask)


def alignment_uniformity(query: Tensor, key: Tensor, n_negatives: int, mask: Tensor | None = None) -> Tensor:
    """Return alignment of query and key plus the mean uniformity of both.

    Args:
        query: ``[B, d]``.
        key: ``[B, d]``.
        n_negatives: uniformity is measured over the pairs of the first so many rows.
        mask: ``[B]`` bool, the rows that take part; all if None.

    Returns:
        a scalar; 0 for an empty batch.
    """
    query, key = unit(query), unit(key)
    alignment = masked_mean((query - key).pow(2).sum(1), mask)
    some = None if mask is None else mask[:n_negatives]
    spread = [_uniformity(rows[:n_negatives], some) for rows in (query, key)]
    return alignment + (spread[0] + spread[1]) / 2


def _uniformity(rows: Tensor, mask: Tensor | None) -> Tensor:
    if len(rows) < 2:
        return rows.sum() * 0
    if mask is None:
        return torch.pdist(rows).pow(2).mul(-2).exp().mean().log()
    left, right = torch.triu_indices(len(rows), len(rows), 1, device=rows.device)
    both = mask[left] & mask[right]
    mean = masked_mean(torch.pdist(rows).pow(2).mul(-2).exp(), both)
    return torch.where(both.any(), mean, 1.0).log()


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
    if kind == "infonce":
        keys = benchmark.unsqueeze(1).expand_as(views)
        return _mean_info_nce(views, keys, mask, ids, (keys, mask, ids), temperature, n_negatives)
    return torch.stack([cosine_distance(views[:, v], benchmark, mask[:, v]) for v in range(views.shape[1])]).mean()


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
        n_negatives: of either; InfoNCE takes those of the first so many that have the view.

    Returns:
        the mean over the views, a scalar.
    """
    if kind == "infonce":
        others = unit(negatives[0][:n_negatives]), negatives[1], negatives[2]
        return _mean_info_nce(unit(users), unit(items), mask, ids, others, temperature, n_negatives)
    return torch.stack(
        [alignment_uniformity(users[:, v], items[:, v], n_negatives, mask[:, v]) for v in range(users.shape[1])]
    ).mean()


def _mean_info_nce(
    queries: Tensor,
    keys: Tensor,
    mask: Tensor,
    ids: Tensor,
    negatives: tuple[Tensor, Tensor, Tensor],
    temperature: float,
    n_negatives: int,
) -> Tensor:
    """Return the mean over the views of InfoNCE, of rows of unit length ``[B, V, d]``.

    Rows without a view count nothing in it: nothing is chosen by values, which a GPU would have to be waited for.
    """
    others, other_mask, other_ids = (part[:n_negatives] for part in negatives)
    collisions = collision_mask(ids, other_ids)
    absent = torch.zeros(other_mask.shape, device=ids.device).masked_fill_(~other_mask, -1e4)
    weight = mask / mask.to(queries.dtype).mean(0).clamp(min=torch.finfo(queries.dtype).tiny)
    parts = (part.unbind(1) for part in (queries, keys, others, weight, absent))
    return torch.stack(
        [
            _info_nce(query, key, other, collisions, temperature, shares, gaps)
            for query, key, other, shares, gaps in zip(*parts, strict=True)
        ]
    ).mean()


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
