r"""BM3: bootstrapped representations of users, items and modalities, without negative items.

Zhou, Zhou, Liu, Zeng, Miao, Wang, You, Jiang, "Bootstrap Latent Representations for Multi-modal Recommendation",
WWW 2023, arXiv 2207.05969.

LightGCN gives users :math:`h_u` and, with the ID embedding added, items :math:`h_i`; a linear map of the features gives
:math:`h_m`. For each, :math:`\tilde h = P h + b` is the online view, with one predictor for all, and
:math:`\dot h = \mathrm{dropout}(h)` the target, which gets no gradient. With :math:`C(x, y) = 1 - \cos(x, y)`:

.. math::
    L = C(\tilde h_u, \dot h_i) + C(\tilde h_i, \dot h_u)
      + w \sum_m \left(C(\tilde h_m, \dot h_i) + C(\tilde h_m, \dot h_m)\right) + \lambda \|h\|^2,
    \qquad s_{ui} = \tilde h_u^\top \tilde h_i .

The weight :math:`w` comes from the authors' code. Unlike there, features stay fixed and the norm is that of the batch's
rows, squared: the code fine-tunes features and takes the plain norm over all nodes, so that its ``reg_weight`` means
something else. Items lacking a modality stay out of its terms. Features shape the loss
and are not scored: of cold items the model knows nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recbole_slifmr.data.cold import ColdScoring
from recbole_slifmr.model.base import FeatureProjection, GraphRecommender, full_precision
from recbole_slifmr.model.settings import FeatureSettings, GraphSettings, PartOf, Weight
from recbole_slifmr.nn.loss import cosine_distance, l2_loss


@dataclass(frozen=True)
class BM3Settings(FeatureSettings, GraphSettings):
    """The settings of BM3."""

    dropout: PartOf
    feature_weight: Weight
    reg_weight: Weight


class BM3(GraphRecommender):
    """LightGCN trained by predicting dropped-out targets of items, users and features.

    Args:
        config: RecBole's configuration; the settings are listed in ``properties/model/BM3.yaml``.
        dataset: a :class:`~recbole_slifmr.data.dataset.SLIFMRDataset`, the training split.
    """

    settings_class = BM3Settings
    settings: BM3Settings
    needs_features = True
    needs_negatives = False
    loss_names = ("rec", "align", "mask", "reg")

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        size = self.settings.embedding_size
        self.projections: Mapping[str, FeatureProjection] = nn.ModuleDict(  # type: ignore[assignment]
            {name: FeatureProjection(features, size) for name, features in self.item_features(dataset).items()}
        )
        self.predictor = nn.Linear(size, size)
        self.reset_parameters()

    @classmethod
    def scores_cold(cls, config: Any) -> ColdScoring:
        """Say that features enter the loss only."""
        return ColdScoring(False, "BM3 scores items by their interactions; features shape its loss only")

    def encode(self) -> tuple[Tensor, Tensor]:
        """Return all users and items before the predictor, ``[n, d]``."""
        users, items = self.interaction_encoder(self.user_embedding.weight, self.item_embedding.weight)
        return users, items + self.item_embedding.weight

    def forward(self) -> tuple[Tensor, Tensor]:
        """Return the online views of all users and items, ``[n, d]``."""
        users, items = self.encode()
        return self.predictor(users), self.predictor(items)

    def target(self, representations: Tensor) -> Tensor:
        """Return what an online view should predict; no gradient passes."""
        return F.dropout(representations.detach(), self.settings.dropout, self.training)

    @full_precision
    def calculate_loss(self, interaction: Any) -> tuple[Tensor, ...]:
        """Return the terms of the loss for a batch of (user, item); negative items are not looked at."""
        self.clear_cache()
        user, item = interaction[self.USER_ID], interaction[self.ITEM_ID]
        users, items = self.encode()
        h_user, h_item = users.index_select(0, user), items.index_select(0, item)
        user_target, item_target = self.target(h_user), self.target(h_item)
        rec = cosine_distance(self.predictor(h_user), item_target)
        rec = rec + cosine_distance(self.predictor(h_item), user_target)
        align = mask = torch.zeros_like(rec)
        for projection in self.projections.values():
            known, h_feature = projection.mask[item], projection(item)
            online = self.predictor(h_feature)
            align = align + cosine_distance(online, item_target, known)
            mask = mask + cosine_distance(online, self.target(h_feature), known)
        reg = l2_loss(h_user, h_item)
        return (
            rec,
            self.settings.feature_weight * align,
            self.settings.feature_weight * mask,
            self.settings.reg_weight * reg,
        )
