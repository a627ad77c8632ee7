r"""XSimGCL: LightGCN with noise in every layer, and a contrast between its output and one of the layers.

Yu, Xia, Chen, Cui, Hung, Yin, "XSimGCL: Towards Extremely Simple Graph Contrastive Learning for Recommendation", TKDE
2023, arXiv 2209.02544.

With :math:`\hat A` the normalised interactions and :math:`u` uniform on :math:`[0, 1]^d`, drawn anew for every row:

.. math::
    e^{(l)} = \hat A e^{(l-1)} + \epsilon \, \mathrm{sign}(\hat A e^{(l-1)}) \odot \frac{u}{\|u\|}, \quad
    z = \frac{1}{L} \sum_{l=1}^{L} e^{(l)}, \quad
    L = \mathrm{BPR}(z) + w \sum_{\mathrm{users, items}} \mathrm{InfoNCE}(z, e^{(l^*)}) + \lambda \|e^{(0)}\|^2 .

One pass serves both losses. The mean leaves layer 0 out, and evaluation adds no noise. The contrast runs over the
distinct users and the distinct positive items of a batch, each kind among its own. The norm is LightGCN's, of layer 0
with the negative items; the authors' code takes that of the noisy :math:`z` without them. Neither features nor a
knowledge graph are read: of cold items, which no layer but 0 reaches, the model knows nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from recbole_slifmr.data.cold import ColdScoring
from recbole_slifmr.errors import SettingError
from recbole_slifmr.model.base import GraphRecommender, full_precision
from recbole_slifmr.model.settings import Count, GraphSettings, Positive, Weight
from recbole_slifmr.nn.layers import unit
from recbole_slifmr.nn.loss import contrast_nodes


@dataclass(frozen=True)
class XSimGCLSettings(GraphSettings):
    """The settings of XSimGCL."""

    eps: Weight
    contrast_layer: int
    cl_weight: Weight
    temperature: Positive
    reg_weight: Weight
    n_negatives: Count = 4096  # checkpoints from before it was a setting lack it

    def __post_init__(self) -> None:
        if not 1 <= self.contrast_layer <= self.n_layers:
            raise SettingError(
                f"contrast_layer must be from 1 to n_layers, here {self.n_layers}, not {self.contrast_layer}"
            )


class XSimGCL(GraphRecommender):
    """LightGCN without layer 0, trained with noise and a contrast across layers.

    Args:
        config: RecBole's configuration; the settings are listed in ``properties/model/XSimGCL.yaml``.
        dataset: a :class:`~recbole_slifmr.data.dataset.SLIFMRDataset`, the training split.

    Raises:
        SettingError: for a setting outside its limits; if ``contrast_layer`` is none of the layers.
    """

    settings_class = XSimGCLSettings
    settings: XSimGCLSettings
    loss_names = ("bpr", "contrast", "reg")

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        self.reset_parameters()

    @classmethod
    def memory_parts(cls, settings: Any, dataset: Any, batch_size: int) -> dict[str, int]:
        """Return the bytes of the base, of noise and signs in every layer and of the similarities of the contrast."""
        parts = super().memory_parts(settings, dataset, batch_size)
        parts["training step"] *= 1 + settings.n_layers
        parts["training step"] += 24 * batch_size * min(batch_size, settings.n_negatives)
        return parts

    @classmethod
    def scores_cold(cls, config: Any) -> ColdScoring:
        """Say that items are known by their interactions."""
        return ColdScoring(False, "XSimGCL knows items by their interactions only")

    def perturb(self, rows: Tensor) -> Tensor:
        """Move each row by ``eps`` away from zero, in training only; what is zero stays it."""
        if not self.training:
            return rows
        return rows + self.settings.eps * rows.detach().sign() * unit(torch.rand_like(rows))

    def encode(self) -> list[tuple[Tensor, Tensor]]:
        """Return all users and items of each layer from 1 on, ``[n, d]``."""
        users, items = self.user_embedding.weight, self.item_embedding.weight
        matrix, layers = self.interaction_encoder.graph.matrix, []
        for _ in range(self.settings.n_layers):
            next_users, next_items = matrix.multiply(items), matrix.multiply_transposed(users)
            users, items = self.perturb(next_users), self.perturb(next_items)
            layers.append((users, items))
        return layers

    def forward(self) -> tuple[Tensor, Tensor]:
        """Return the final embeddings of all users and items, ``[n, d]``."""
        return _mean(self.encode())

    def contrast(self, final: Tensor, layer: Tensor, ids: Tensor) -> Tensor:
        """Return InfoNCE of ``final`` against ``layer``, ``[n, d]`` each, among the distinct ``ids [B]``."""
        return contrast_nodes([(final, layer)], ids, self.settings.temperature, self.settings.n_negatives)

    @full_precision
    def calculate_loss(self, interaction: Any) -> tuple[Tensor, ...]:
        """Return the weighted terms of the loss for a batch of (user, positive item, negative item)."""
        self.clear_cache()
        user, pos, neg = self.batch_ids(interaction)
        layers = self.encode()
        users, items = _mean(layers)
        layer_users, layer_items = layers[self.settings.contrast_layer - 1]
        bpr = self.bpr(users.index_select(0, user), items, pos, neg)
        contrast = self.contrast(users, layer_users, user) + self.contrast(items, layer_items, pos)
        return bpr, self.settings.cl_weight * contrast, self.settings.reg_weight * self.ego_norm(user, pos, neg)


def _mean(layers: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    users, items = (torch.stack(rows).mean(0) for rows in zip(*layers, strict=True))
    return users, items
