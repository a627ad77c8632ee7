r"""SMORE: modalities denoised and fused in the frequency domain, each a view over its item graph.

Ong, Khong, "Spectrum-based Modality Representation Fusion Graph Convolutional Network for Multimodal Recommendation",
WSDM 2025, arXiv 2412.14978.

With :math:`z` LightGCN's mean of layers, :math:`e` the ID embeddings, :math:`F` the real Fourier transform along the
dimensions of the projected features, :math:`k` complex weights of the frequencies, :math:`\hat S^m` the nearest
neighbours by the features :math:`x^m`, :math:`\hat S^f` the elementwise maximum of these graphs, and users of every
view by the normalised interactions:

.. math::
    t^m = F(W_m x^m + b_m), \quad x'^m = F^{-1}(k_m \odot t^m), \quad
    x'^f = F^{-1}\Big(k_f \odot \prod_m t^m\Big), \\
    v^r = \hat S^r \left(e \odot \sigma(G_r x'^r + c_r)\right), \quad
    a^m = \mathrm{softmax}(Q_m \tanh(A_m v^f + b'_m)), \quad
    h = \frac{1}{M + 1} \Big(v^f \odot \sigma(P_f z + p_f) + \sum_m a^m \odot v^m \odot \sigma(P_m z + p_m)\Big), \\
    L = \mathrm{BPR}(z + h) + w \sum_{\mathrm{users, items}} \mathrm{InfoNCE}(h, z) + \lambda \|e\|^2 .

The softmax is over the dimensions: the fused view says how much of a modality each of them takes. The contrast runs
over the distinct users and the distinct positive items of a batch, each kind among its own.

Choices and deviations: that the softmax is over the dimensions, and not over the modalities, was chosen on validation;
item graphs are undirected, unweighted and without i->i edge; features are in rows of unit length and stay fixed; there
is one layer over an item graph. A modality that an item lacks is no factor of the product. The ID embedding of a cold
item counts as zero: its neighbours alone say what it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from recbole_slifmr.data.features import ItemFeatures
from recbole_slifmr.model.views import ViewRecommender, ViewSettings
from recbole_slifmr.nn.graph import Edges, max_edges

FUSED = "fused"  # no modality can have this name


class SpectralFilter(nn.Module):
    """Weigh the frequencies of a spectrum and transform it back.

    Args:
        size: of the signal.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.weight = nn.Parameter(torch.tensor([[1.0, 0.0]]).repeat(size // 2 + 1, 1))  # real, imaginary

    def forward(self, spectrum: Tensor) -> Tensor:
        """Return the signals ``[n, size]`` of the spectra ``[n, size // 2 + 1]``, which are complex."""
        return torch.fft.irfft(spectrum * torch.view_as_complex(self.weight), n=self.size, norm="ortho")


class SMORE(ViewRecommender):
    """LightGCN plus views of the denoised modalities and of their fusion, gated by behaviour.

    Args:
        config: RecBole's configuration; the settings are listed in ``properties/model/SMORE.yaml``.
        dataset: a :class:`~recbole_slifmr.data.dataset.SLIFMRDataset`, the training split.
    """

    settings_class = ViewSettings

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        size = self.settings.embedding_size
        self.filters: Mapping[str, SpectralFilter] = nn.ModuleDict(  # type: ignore[assignment]
            {name: SpectralFilter(size) for name in self.views}
        )
        self.preferences: Mapping[str, nn.Linear] = nn.ModuleDict(  # type: ignore[assignment]
            {name: nn.Linear(size, size) for name in self.views}
        )
        self.attentions: Mapping[str, nn.Sequential] = nn.ModuleDict(  # type: ignore[assignment]
            {
                name: nn.Sequential(nn.Linear(size, size), nn.Tanh(), nn.Linear(size, size, bias=False))
                for name in self.projections
            }
        )
        self.reset_parameters()

    def view_graphs(self, features: Mapping[str, ItemFeatures]) -> dict[str, Edges]:
        """Return the item graph of each modality and their elementwise maximum."""
        graphs = super().view_graphs(features)
        return {**graphs, FUSED: max_edges(list(graphs.values()), self.n_items)}

    def spectra(self) -> dict[str, Tensor]:
        """Return the spectrum of each modality and their product, ``[n_items, d // 2 + 1]``; 1 where one is missing."""
        spectra = {}
        for name, projection in self.projections.items():
            spectrum = torch.fft.rfft(projection(), norm="ortho")
            spectra[name] = spectrum.masked_fill(~projection.mask.unsqueeze(1), 1.0)
        return {**spectra, FUSED: torch.stack(list(spectra.values())).prod(0)}

    def encode(self) -> tuple[Tensor, list[Tensor]]:
        """Return the interaction view and those of the modalities and their fusion, of all nodes ``[n, d]`` each."""
        item_embedding = self.known(self.item_embedding.weight)
        interactions = torch.cat(self.interaction_encoder(self.user_embedding.weight, item_embedding))
        spectra = self.spectra()
        views = [view(item_embedding, self.filters[name](spectra[name])) for name, view in self.views.items()]
        return interactions, [self.with_users(view) for view in views]

    def fuse(self, interactions: Tensor, views: list[Tensor]) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Return the final embeddings of some nodes, and their content to be contrasted with the interaction view."""
        named = dict(zip(self.views, views, strict=True))
        attended = {name: torch.softmax(attention(named[FUSED]), dim=1) for name, attention in self.attentions.items()}
        wanted = {name: torch.sigmoid(prefer(interactions)) for name, prefer in self.preferences.items()}
        parts = [view * wanted[name] * attended.get(name, 1.0) for name, view in named.items()]
        content = torch.stack(parts).mean(0)
        return interactions + content, [(content, interactions)]
