"""What the models of the package share: final embeddings that are cached, scores by inner product, item features."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from recbole.model.abstract_recommender import GeneralRecommender
from recbole.utils import InputType
from torch import Tensor, nn
from torch.nn import functional as F

from recbole_slifmr.data.cold import ColdScoring, is_cold
from recbole_slifmr.data.features import ItemFeatures
from recbole_slifmr.errors import DataError, SettingError


class EmbeddingRecommender(GeneralRecommender):
    """A model that scores by the inner product of final embeddings, computed once between training steps.

    ``forward`` of a model returns the final users ``[n_users, d]`` and items ``[n_items, d]``; its ``calculate_loss``
    calls :meth:`clear_cache` first.

    Args:
        config: RecBole's configuration.
        dataset: a :class:`~recbole_slifmr.data.dataset.SLIFMRDataset`, the training split.

    Raises:
        SettingError: for a setting of the trainer that needs what the model cannot do.
    """

    input_type = InputType.PAIRWISE
    loss_names: tuple[str, ...]
    warm: Tensor | None
    forward: Callable[[], tuple[Tensor, Tensor]]

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        for setting, method in (("prune_ratio", "prune_interactions"), ("self_loop", "refresh_graphs")):
            if config[setting] and not hasattr(self, method):
                raise SettingError(f"{config['model']} cannot do what {setting} asks for: leave it off")
        self._final: tuple[Tensor, Tensor] | None = None
        warm = (~is_cold(dataset)).unsqueeze(1).to(self.device) if config["cold_items"] else None
        self.register_buffer("warm", warm, persistent=False)

    @classmethod
    def scores_cold(cls, config: Any) -> ColdScoring:
        """Say whether the model can score items without training interactions."""
        return ColdScoring(True, f"{config['model']} scores cold items by their features")

    def known(self, embedding: Tensor, items: Tensor | None = None) -> Tensor:
        """Return the ID embeddings of all items, or of ``items [B]``, zeros for cold ones, whose own are untrained."""
        if self.warm is None:
            return embedding
        return embedding * (self.warm if items is None else self.warm[items])

    def item_features(self, dataset: Any) -> dict[str, ItemFeatures]:
        """Return the features by modality, on the model's device."""
        return {
            name: ItemFeatures(features.values.to(self.device), features.mask.to(self.device))
            for name, features in dataset.item_features.items()
        }

    def training_interactions(self, dataset: Any) -> Tensor:
        """Return user and item of each training interaction, ``[2, E]``, on the model's device."""
        return torch.stack([dataset.inter_feat[self.USER_ID], dataset.inter_feat[self.ITEM_ID]]).to(self.device)

    def batch_ids(self, interaction: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Return the ids of users, positive and negative items of a training batch, ``[B]`` each."""
        return interaction[self.USER_ID], interaction[self.ITEM_ID], interaction[self.NEG_ITEM_ID]

    def clear_cache(self) -> None:
        """Forget the final embeddings; called by training, changing graphs, moving and loading."""
        self._final = None

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        """Move or cast the model, as nn.Module does, and forget the final embeddings."""
        self.clear_cache()
        return super()._apply(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load parameters and forget the final embeddings."""
        self.clear_cache()
        return super().load_state_dict(*args, **kwargs)

    @torch.no_grad()
    def _final_embeddings(self) -> tuple[Tensor, Tensor]:
        """Return the final embeddings in evaluation mode, computed once between training steps."""
        if self._final is None:
            training = self.training
            self.eval()
            self._final = self()
            self.train(training)
        return self._final

    def predict(self, interaction: Any) -> Tensor:
        """Return the score of each (user, item) pair, ``[B]``."""
        users, items = self._final_embeddings()
        return (users[interaction[self.USER_ID]] * items[interaction[self.ITEM_ID]]).sum(1)

    def full_sort_predict(self, interaction: Any) -> Tensor:
        """Return the scores of all items for each user, ``[B * n_items]``."""
        users, items = self._final_embeddings()
        return (users[interaction[self.USER_ID]] @ items.T).flatten()


class MultimodalRecommender(EmbeddingRecommender):
    """A model that needs item features.

    Args:
        config: RecBole's configuration.
        dataset: a :class:`~recbole_slifmr.data.dataset.SLIFMRDataset`, the training split.

    Raises:
        DataError: if the data set has no item features.
    """

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        if not dataset.item_features:
            folder = config["feature_path"] or dataset.dataset_path
            fix = f"put .npy files such as text.npy into {folder} or name them in 'modalities'"
            if not config["use_features"]:
                fix = "set use_features to True"
            raise DataError(f"{config['model']} needs item features and '{dataset.dataset_name}' has none: {fix}")


def unit_rows(features: ItemFeatures) -> Tensor:
    """Return the features with every row scaled to unit length, ``[n_items, d_m]``; zeros where they are missing."""
    return F.normalize(features.values, dim=1) * features.mask.unsqueeze(1)


class FeatureProjection(nn.Module):
    """The features of a modality, in rows of unit length, and a linear map of them.

    Args:
        features: values ``[n_items, d_m]`` and mask ``[n_items]``.
        size: dimension of the output.
        bias: whether the map has a bias.
    """

    values: Tensor
    mask: Tensor

    def __init__(self, features: ItemFeatures, size: int, bias: bool = True) -> None:
        super().__init__()
        self.register_buffer("values", unit_rows(features), persistent=False)
        self.register_buffer("mask", features.mask, persistent=False)
        self.linear = nn.Linear(features.values.shape[1], size, bias=bias)

    def forward(self, items: Tensor | None = None) -> Tensor:
        """Project the features of ``items [B]``, or of all items, to ``[B, size]``."""
        return self.linear(self.values if items is None else self.values[items])
