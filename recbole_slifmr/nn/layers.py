r"""Layers of the model, free of RecBole.

* light propagation: :math:`\frac{1}{L+1} \sum_{l=0}^{L} A^l E` (LightGCN, He et al., SIGIR 2020);
* attentive fusion (AILF, SLIF-MR, arXiv 2507.09998): :math:`a_{v} = \mathrm{softmax}_v(q^\top \tanh(W h_v + b))`,
  :math:`z = \sum_v a_v h_v`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

FUSIONS = ("attention", "sum", "concat")


def light_propagation(multiply: Callable[[Tensor], Tensor], embeddings: Tensor, n_layers: int) -> Tensor:
    """Return the mean of the embeddings and their first ``n_layers`` propagations.

    Args:
        multiply: multiplies the graph's normalised adjacency with ``[n, d]``.
        embeddings: ``[n, d]``.
        n_layers: number of layers, 0 or more.

    Returns:
        ``[n, d]``.
    """
    total = current = embeddings
    for _ in range(n_layers):
        current = multiply(current)
        total = total + current
    return total / (n_layers + 1)


def unit(rows: Tensor) -> Tensor:
    """Scale every vector of the last dimension to length 1; a vector of zeros stays one.

    What ``torch.nn.functional.normalize`` gives, forward and backward, in less than half the time.
    """
    return _Unit.apply(rows)


class _Unit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(rows, dim=-1, keepdim=True).clamp_(min=1e-12)
        result = rows / norm
        ctx.save_for_backward(result, norm)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        result, norm = ctx.saved_tensors
        along = torch.einsum("...d,...d->...", result, grads[0]).unsqueeze(-1)
        return torch.addcmul(grads[0], result, along, value=-1).div_(norm)


class Fusion(nn.Module):
    """Fuse the views of a node into one representation.

    Args:
        kind: ``attention`` (AILF), ``sum`` (mean of the views a node has) or ``concat`` (all views side by side, mapped
            back to ``size``).
        n_views: number of views.
        size: dimension of every view.

    Shapes:
        views ``[n, n_views, size]`` and mask ``[n, n_views]`` (True: the node has the view) -> ``[n, size]``. A node
        without any view gets zeros.

    Raises:
        ValueError: for an unknown kind.
    """

    def __init__(self, kind: str, n_views: int, size: int) -> None:
        super().__init__()
        if kind not in FUSIONS:
            raise ValueError(f"fusion must be one of {', '.join(FUSIONS)}, not '{kind}'")
        self.kind, self.n_views, self.size = kind, n_views, size
        if kind == "attention":
            self.transform = nn.Linear(size, size)
            self.query = nn.Parameter(torch.empty(size))
        elif kind == "concat":
            self.merge = nn.Linear(n_views * size, size, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start as the plain mean of the views: attention uniform, the merging map an average."""
        if self.kind == "attention":
            nn.init.xavier_uniform_(self.transform.weight)
            nn.init.zeros_(self.transform.bias)
            nn.init.zeros_(self.query)
        elif self.kind == "concat":
            with torch.no_grad():
                self.merge.weight.copy_(torch.eye(self.size).repeat(1, self.n_views) / self.n_views)

    def weights(self, views: Tensor, mask: Tensor) -> Tensor:
        """Return the weight of each view, ``[n, n_views]``: they add up to 1 over the views a node has."""
        if self.kind == "attention":
            score = torch.tanh(self.transform(views)) @ self.query
        else:
            score = views.new_zeros(views.shape[:2])
        score = score.masked_fill(~mask, torch.finfo(score.dtype).min)  # -inf: NaN gradients without a view
        return torch.softmax(score, dim=1).masked_fill(~mask, 0.0)

    def forward(self, views: Tensor, mask: Tensor) -> Tensor:
        """Fuse ``views [n, n_views, size]`` into ``[n, size]``."""
        if self.kind == "concat":
            return self.merge((views * mask.unsqueeze(2)).flatten(1))
        return (self.weights(views, mask).unsqueeze(2) * views).sum(1)
