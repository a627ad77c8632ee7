r"""VBPR: matrix factorisation beside a projection of the item features.

He, McAuley, "VBPR: Visual Bayesian Personalized Ranking from Implicit Feedback", AAAI 2016, arXiv 1510.01784.

.. math::
    s_{ui} = \beta_i + \gamma_u^\top \gamma_i + \theta_u^\top E f_i \; [+ \, \beta'^\top f_i],
    \qquad L = -\log \sigma(s_{ui} - s_{uj}) + \lambda \|\Theta\|^2 .

:math:`f_i` holds the features of all modalities side by side, each scaled to unit length so that none outweighs the
others by its units. The paper's offset and user bias are left out: they cancel in BPR and move no ranking. Neither
:math:`E` nor the visual bias :math:`\beta'` is regularised. Of a cold item :math:`\gamma_i` counts as zero
and :math:`\beta_i` stays zero: its features alone are scored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from recbole_slifmr.model.base import EmbeddingRecommender, feature_size, unit_rows
from recbole_slifmr.model.settings import Count, FeatureSettings, ModelSettings, Weight
from recbole_slifmr.nn.loss import bpr_loss, l2_loss


@dataclass(frozen=True)
class VBPRSettings(FeatureSettings, ModelSettings):
    """The settings of VBPR."""

    feature_embedding_size: Count
    feature_bias: bool
    reg_weight: Weight


class VBPR(EmbeddingRecommender):
    """Preferences for items as such and for their features, added up.

    Args:
        config: RecBole's configuration; the settings are listed in ``properties/model/VBPR.yaml``.
        dataset: a :class:`~recbole_slifmr.data.dataset.SLIFMRDataset`, the training split.
    """

    settings_class = VBPRSettings
    settings: VBPRSettings
    needs_features = True
    loss_names = ("bpr", "reg")
    features: Tensor

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        size, feature_size = self.settings.embedding_size, self.settings.feature_embedding_size
        values = torch.cat([unit_rows(features) for features in self.item_features(dataset).values()], dim=1)
        self.register_buffer("features", values, persistent=False)
        self.user_embedding = nn.Embedding(self.n_users, size)
        self.item_embedding = nn.Embedding(self.n_items, size)
        self.item_bias = nn.Embedding(self.n_items, 1)
        self.user_taste = nn.Embedding(self.n_users, feature_size)
        self.projection = nn.Linear(values.shape[1], feature_size, bias=False)
        self.feature_bias = nn.Linear(values.shape[1], 1, bias=False) if self.settings.feature_bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start without item biases."""
        super().reset_parameters()
        nn.init.zeros_(self.item_bias.weight)

    @classmethod
    def memory_parts(cls, settings: Any, dataset: Any, batch_size: int) -> dict[str, int]:
        """Return the bytes of the parameters, of the features and of those of a batch."""
        n_features, n_users, n_items = feature_size(dataset), dataset.user_num, dataset.item_num
        n_parameters = (n_users + n_items) * settings.embedding_size
        n_parameters += (n_users + n_features) * settings.feature_embedding_size
        return {
            "parameters and Adam": 16 * n_parameters,
            "features": 8 * n_features * n_items,
            "training step": 16 * batch_size * n_features,
        }

    def item_representations(self, items: Tensor) -> Tensor:
        """Return what the score multiplies ``[user_embedding, user_taste, 1]`` with, ``[B, d + d_f + 1]``."""
        features, bias = self.features[items], self.item_bias(items)
        if self.feature_bias is not None:
            bias = bias + self.feature_bias(features)
        embedding = self.known(self.item_embedding(items), items)
        return torch.cat([embedding, self.projection(features), bias], dim=1)

    def user_representations(self, users: Tensor) -> Tensor:
        """Return ``[user_embedding, user_taste, 1]`` of each user, ``[B, d + d_f + 1]``."""
        user, taste = self.user_embedding(users), self.user_taste(users)
        return torch.cat([user, taste, torch.ones_like(user[:, :1])], dim=1)

    def forward(self) -> tuple[Tensor, Tensor]:
        """Return the representations of all users and items."""
        users, items = (torch.arange(n, device=self.features.device) for n in (self.n_users, self.n_items))
        return self.user_representations(users), self.item_representations(items)

    def calculate_loss(self, interaction: Any) -> tuple[Tensor, ...]:
        """Return BPR and the regularisation of a batch of (user, positive item, negative item)."""
        self.clear_cache()
        user, pos, neg = self.batch_ids(interaction)
        users = self.user_representations(user)
        scores = [(users * self.item_representations(items)).sum(1) for items in (pos, neg)]
        reg = l2_loss(
            self.user_embedding(user), self.user_taste(user),
            self.item_embedding(pos), self.item_embedding(neg), self.item_bias(pos), self.item_bias(neg),
        )  # fmt: skip
        return bpr_loss(*scores), self.settings.reg_weight * reg
