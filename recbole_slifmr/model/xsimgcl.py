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

from typing import Any

import torch
from recbole.model.init import xavier_uniform_initialization
from torch import Tensor, nn

from recbole_slifmr.data.cold import ColdScoring
from recbole_slifmr.errors import SettingError
from recbole_slifmr.model.base import EmbeddingRecommender
from recbole_slifmr.nn.encoder import InteractionGraph
from recbole_slifmr.nn.graph import unique_edges
from recbole_slifmr.nn.layers import unit
from recbole_slifmr.nn.loss import bpr_loss, collision_mask, info_nce, l2_loss


class XSimGCL(EmbeddingRecommender):
    """LightGCN without layer 0, trained with noise and a contrast across layers.

    Args:
        config: RecBole's configuration; the settings are listed in ``properties/model/XSimGCL.yaml``.
        dataset: a :class:`~recbole_slifmr.data.dataset.SLIFMRDataset`, the training split.

    Raises:
        SettingError: if ``eps`` is negative, ``temperature`` not positive or ``contrast_layer`` none of the layers.
    """

    loss_names = ("bpr", "contrast", "reg")

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        self.n_layers: int = config["n_layers"]
        self.eps: float = config["eps"]
        self.contrast_layer: int = config["contrast_layer"]
        self.cl_weight: float = config["cl_weight"]
        self.temperature: float = config["temperature"]
        self.reg_weight: float = config["reg_weight"]
        if self.eps < 0:
            raise SettingError(f"eps must be 0 or more, not {self.eps}")
        if self.temperature <= 0:
            raise SettingError(f"temperature must be above 0, not {self.temperature}")
        if not 1 <= self.contrast_layer <= self.n_layers:
            raise SettingError(
                f"contrast_layer must be from 1 to n_layers, here {self.n_layers}, not {self.contrast_layer}"
            )
        self.user_embedding = nn.Embedding(self.n_users, config["embedding_size"])
        self.item_embedding = nn.Embedding(self.n_items, config["embedding_size"])
        edge_index = unique_edges(self.training_interactions(dataset), self.n_items)
        self.graph = InteractionGraph(edge_index, self.n_users, self.n_items)
        self.apply(xavier_uniform_initialization)

    @classmethod
    def scores_cold(cls, config: Any) -> ColdScoring:
        """Say that items are known by their interactions."""
        return ColdScoring(False, "XSimGCL knows items by their interactions only")

    def perturb(self, rows: Tensor) -> Tensor:
        """Move each row by ``eps`` away from zero, in training only; what is zero stays it."""
        if not self.training:
            return rows
        return rows + self.eps * rows.detach().sign() * unit(torch.rand_like(rows))

    def encode(self) -> list[tuple[Tensor, Tensor]]:
        """Return all users and items of each layer from 1 on, ``[n, d]``."""
        users, items = self.user_embedding.weight, self.item_embedding.weight
        layers = []
        for _ in range(self.n_layers):
            next_users, next_items = self.graph.matrix.multiply(items), self.graph.matrix.multiply_transposed(users)
            users, items = self.perturb(next_users), self.perturb(next_items)
            layers.append((users, items))
        return layers

    def forward(self) -> tuple[Tensor, Tensor]:
        """Return the final embeddings of all users and items, ``[n, d]``."""
        return _mean(self.encode())

    def contrast(self, final: Tensor, layer: Tensor, ids: Tensor) -> Tensor:
        """Return InfoNCE of ``final`` against ``layer``, ``[n, d]`` each, among the distinct ``ids [B]``."""
        ids = ids.unique()
        key = layer.index_select(0, ids)
        return info_nce(final.index_select(0, ids), key, key, collision_mask(ids, ids), self.temperature)

    @torch.autocast("cpu", enabled=False)  # sparse products have no half precision
    @torch.autocast("cuda", enabled=False)
    def calculate_loss(self, interaction: Any) -> tuple[Tensor, ...]:
        """Return the weighted terms of the loss for a batch of (user, positive item, negative item)."""
        self.clear_cache()
        user, pos, neg = self.batch_ids(interaction)
        layers = self.encode()
        users, items = _mean(layers)
        layer_users, layer_items = layers[self.contrast_layer - 1]
        z_user = users.index_select(0, user)
        bpr = bpr_loss((z_user * items.index_select(0, pos)).sum(1), (z_user * items.index_select(0, neg)).sum(1))
        contrast = self.contrast(users, layer_users, user) + self.contrast(items, layer_items, pos)
        reg = l2_loss(self.user_embedding(user), self.item_embedding(pos), self.item_embedding(neg))
        return bpr, self.cl_weight * contrast, self.reg_weight * reg


def _mean(layers: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    users, items = (torch.stack(rows).mean(0) for rows in zip(*layers, strict=True))
    return users, items
