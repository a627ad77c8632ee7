"""Two signs that a fused model fails, free of RecBole; both tend to 1 when the signal is lost."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def homogenisation(views: Tensor, mask: Tensor) -> float:
    """Return the mean cosine between the views of a node, over all nodes and pairs of views; NaN with a single view.

    Args:
        views: ``[n, V, d]``.
        mask: ``[n, V]`` bool, whether the node has the view.
    """
    unit = F.normalize(views, dim=2) * mask.unsqueeze(2)
    count = mask.sum(1).to(views.dtype)
    cosine = unit.sum(1).pow(2).sum(1) - unit.pow(2).sum((1, 2))  # over ordered pairs
    return (cosine.sum() / (count * (count - 1)).sum()).item()


def smoothing(nodes: Tensor, n_pairs: int = 1000) -> float:
    """Return the mean cosine between random pairs of different nodes, the same pairs on every call.

    Args:
        nodes: ``[n, d]``, n > 1.
        n_pairs: how many pairs are drawn.
    """
    left = torch.randint(len(nodes), (n_pairs,), generator=torch.Generator().manual_seed(0)).to(nodes.device)
    step = torch.randint(1, len(nodes), (n_pairs,), generator=torch.Generator().manual_seed(1)).to(nodes.device)
    right = (left + step) % len(nodes)
    return F.cosine_similarity(nodes[left], nodes[right], dim=1).mean().item()
