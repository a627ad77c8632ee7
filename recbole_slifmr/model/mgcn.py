r"""MGCN: features purified by the ID embeddings, and views of what the modalities share and of what each adds.

Yu, Tan, Lu, Bao, "Multi-View Graph Convolutional Network for Multimedia Recommendation", ACM MM 2023, arXiv 2308.03588.

With :math:`z` LightGCN's mean of layers, :math:`e` the ID embeddings, :math:`\hat S^m` the nearest neighbours by the
features :math:`x^m`, and users of every view by the normalised interactions:

.. math::
    v^m = \hat S^m \left(e \odot \sigma(G_m (W_m x^m + b_m) + c_m)\right), \quad
    s = \sum_m a_m v^m, \quad a = \mathrm{softmax}_m(q^\top \tanh(W v^m + b)), \\
    h = \frac{1}{M + 1} \Big(s + \sum_m (v^m - s) \odot \sigma(P_m z + p_m)\Big), \\
    L = \mathrm{BPR}(z + h) + w \sum_{\mathrm{users, items}} \mathrm{InfoNCE}(h, z) + \lambda \|e\|^2 .

The contrast runs over the distinct users and the distinct positive items of a batch, each kind among its own. The
division by M + 1 is that of the authors' code.

Deviations: item graphs are undirected, unweighted and without i->i edge; features are in rows of unit length and stay
fixed (the authors' code fine-tunes them); there is one layer over an item graph. A modality that a node lacks takes no
part in its attention and adds nothing. The ID embedding of a cold item counts as zero: its neighbours alone say what
it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from recbole_slifmr.model.views import ViewRecommender, ViewSettings
from recbole_slifmr.nn.layers import Fusion


class MGCN(ViewRecommender):
    """LightGCN plus views of the modalities: what they share, and of the rest what a node's behaviour asks for.

    Args:
        config: RecBole's configuration; the settings are listed in ``properties/model/MGCN.yaml``.
        dataset: a :class:`~recbole_slifmr.data.dataset.SLIFMRDataset`, the training split.
    """

    settings_class = ViewSettings

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        size = self.settings.embedding_size
        self.fusion = Fusion("attention", len(self.views), size)
        self.preferences = nn.ModuleList([nn.Linear(size, size) for _ in self.views])
        self.reset_parameters()

    def encode(self) -> tuple[Tensor, list[Tensor]]:
        """Return the interaction view and that of each modality, of all nodes ``[n, d]`` each."""
        item_embedding = self.known(self.item_embedding.weight)
        views = [view(item_embedding, self.projections[name]()) for name, view in self.views.items()]
        interactions = torch.cat(self.interaction_encoder(self.user_embedding.weight, item_embedding))
        return interactions, [self.with_users(view) for view in views]

    def fuse(self, interactions: Tensor, views: list[Tensor]) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Return the final embeddings of some nodes, and their content to be contrasted with the interaction view."""
        stacked = torch.stack(views, dim=1)
        mask = stacked.any(2)  # of a modality that a node lacks, all is zero
        shared = self.fusion(stacked, mask)
        wanted = torch.stack([torch.sigmoid(prefer(interactions)) for prefer in self.preferences], dim=1)
        specific = (stacked - shared.unsqueeze(1)) * mask.unsqueeze(2) * wanted
        content = (shared + specific.sum(1)) / (len(views) + 1)
        return interactions + content, [(content, interactions)]
