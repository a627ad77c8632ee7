r"""What a model does less of, or more, where users have few interactions; free of RecBole."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Density:
    r"""How dense interactions are, and what follows from it.

    With E training interactions of U users and a number t of interactions per user that counts as dense,

    .. math:: \delta = \min(1, E / (U t)), \qquad \delta = 1 \text{ for } t = 0 .

    * the fused views f of unit length count :math:`\delta` times beside the interaction view c:
      :math:`z = \delta f + c`;
    * BPR takes its negative from :math:`1 + \lfloor (K - 1) \delta \rceil` candidates instead of K;
    * for :math:`\delta < 1` a score has one more term, :math:`w (1 - \delta) \log(1 + n_i)`, with the
      interactions :math:`n_i` of the item and a learned w.

    Attributes:
        share: :math:`\delta`.
    """

    share: float

    @classmethod
    def of(cls, users: Tensor, dense_at: float) -> Density:
        """Return the density of interactions of ``users [E]``, where ``dense_at`` per user are dense."""
        return cls(min(1.0, len(users) / (len(users.unique()) * dense_at)) if dense_at else 1.0)

    def n_candidates(self, most: int) -> int:
        """Return the candidates for a negative, where there are ``most`` on dense data."""
        return 1 + round((most - 1) * self.share)

    def popularity(self, items: Tensor, n_items: int, warm: Tensor | None = None) -> Tensor:
        r"""Return :math:`(1 - \delta) \log(1 + n_i)` of every item, ``[n_items]``.

        Args:
            items: item of each training interaction, ``[E]``.
            n_items: number of items, the padding item 0 among them.
            warm: ``[n_items]`` bool, the items that are not held out of training; the others get the mean of these.
        """
        popularity = torch.bincount(items, minlength=n_items).to(torch.get_default_dtype()).log1p()
        if warm is not None:
            popularity = torch.where(warm, popularity, popularity[1:][warm[1:]].mean())
        return (1 - self.share) * popularity
