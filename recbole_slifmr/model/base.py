"""What the models of the package share: settings, cached final embeddings, scores by inner product, LightGCN."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import psutil
import torch
from recbole.model.abstract_recommender import GeneralRecommender
from recbole.model.init import xavier_uniform_initialization
from recbole.utils import InputType, ModelType
from torch import Tensor, nn
from torch.nn import functional as F

from recbole_slifmr.data.cold import ColdScoring, is_cold
from recbole_slifmr.data.features import ItemFeatures
from recbole_slifmr.errors import DataError, SettingError
from recbole_slifmr.model.settings import DataSettings, GraphSettings, ModelSettings
from recbole_slifmr.nn.encoder import InteractionEncoder
from recbole_slifmr.nn.loss import bpr_loss, l2_loss

KEPT_BLOCK = 2**27  # bytes; see ``training/memory.py``


class DeclaredRecommender(GeneralRecommender):
    """A model that declares its settings and says how much memory it takes.

    Args:
        config: RecBole's configuration.
        dataset: a :class:`~recbole_slifmr.data.dataset.SLIFMRDataset`, the training split.

    Attributes:
        settings_class: declares the settings of the model.

    Raises:
        SettingError: for a setting outside its limits.
    """

    settings_class: type[DataSettings]
    settings: DataSettings

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        self.settings = self.settings_class.read(config)
        self.check(config, dataset)

    @classmethod
    def check(cls, config: Any, dataset: Any) -> None:
        """Refuse what the model cannot do with, without building anything; also called when the model is built.

        Args:
            config: RecBole's configuration.
            dataset: the training split.

        Raises:
            SettingError: for settings that cannot be used.
            DataError: for data that the model needs and that are not there.
        """

    @classmethod
    def estimate_memory(cls, config: Any, dataset: Any) -> dict[str, float]:
        """Estimate the memory in MB that training takes, part by part, from the sizes of its tensors.

        ``process`` is what this process takes now, with libraries and data; the rest is added by training: what else of
        the libraries it loads (65 MB, as measured), :meth:`memory_parts`, and an evaluation, see
        :func:`evaluation_memory`.

        Args:
            config: RecBole's configuration.
            dataset: the training split.
        """
        process = psutil.Process().memory_info().rss
        parts = {
            "process": process,
            "libraries of training": 65_000_000,
            **cls.memory_parts(cls.settings_class.read(config), dataset, config["train_batch_size"]),
            "evaluation": evaluation_memory(config, dataset),
        }
        return {name: round(value / 1e6, 1) for name, value in parts.items()}

    @classmethod
    def memory_parts(cls, settings: Any, dataset: Any, batch_size: int) -> dict[str, int]:
        """Return the bytes of what the model adds: parameters, features, graphs, the largest tensors of a step."""
        raise NotImplementedError


def evaluation_memory(config: Any, dataset: Any) -> int:
    """Return the bytes that ranking all items takes on the CPU.

    A block of scores is there with the one before it, in float32, and with a mask of one byte per score: 9 bytes per
    score. Blocks of up to 128 MiB stay with the process when they are freed, and leave holes of as much again (18 and
    17 bytes measured with 8 and 34 million scores, 9 with 67 million). The lists have an item, 8 bytes, and a hit, 4
    bytes, per place.
    """
    rows = min(max(config["eval_batch_size"] // dataset.item_num, 1), dataset.user_num)
    n_scores = rows * dataset.item_num
    return (18 if 4 * n_scores <= KEPT_BLOCK else 9) * n_scores + 12 * dataset.user_num * max(config["topk"])


class EmbeddingRecommender(DeclaredRecommender):
    """A model that scores by the inner product of final embeddings, computed once between training steps.

    ``forward`` of a model returns the final users ``[n_users, d]`` and items ``[n_items, d]``; its ``calculate_loss``
    calls :meth:`clear_cache` first; its constructor ends with :meth:`reset_parameters`.

    Args:
        config: RecBole's configuration.
        dataset: a :class:`~recbole_slifmr.data.dataset.SLIFMRDataset`, the training split.

    Attributes:
        loss_names: of the terms that ``calculate_loss`` returns.
        needs_features: whether the model cannot do without item features.
        needs_kg: whether the model cannot do without a knowledge graph.
        needs_negatives: whether the model cannot do without sampled negative items.

    Raises:
        SettingError: for a setting outside its limits, or of the trainer that needs what the model cannot do.
        DataError: if the model needs item features or a knowledge graph and there are none.
    """

    input_type = InputType.PAIRWISE
    settings: ModelSettings
    loss_names: tuple[str, ...]
    needs_features = False
    needs_kg = False
    needs_negatives = True
    warm: Tensor | None
    forward: Callable[[], tuple[Tensor, Tensor]]

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        self._final: tuple[Tensor, Tensor] | None = None
        warm = (~is_cold(dataset)).unsqueeze(1).to(self.device) if config["cold_items"] else None
        self.register_buffer("warm", warm, persistent=False)

    @classmethod
    def check(cls, config: Any, dataset: Any) -> None:
        """Refuse what the trainer is asked for and the model cannot do, and a data set without what it needs."""
        super().check(config, dataset)
        settings = cls.settings_class.read(config)
        for setting, method in (("prune_ratio", "prune_interactions"), ("self_loop", "refresh_graphs")):
            if getattr(settings, setting) and not hasattr(cls, method):
                raise SettingError(f"{config['model']} cannot do what {setting} asks for: leave it off")
        if cls.needs_negatives and config["train_neg_sample_args"]["distribution"] == "none":
            raise SettingError(
                "train_neg_sample_args: the model learns from sampled negative items: name a distribution"
            )
        if cls.needs_features and not dataset.item_features:
            folder = config["feature_path"] or dataset.dataset_path
            fix = f"put .npy files such as text.npy into {folder} or name them in 'modalities'"
            if not settings.use_features:
                fix = "set use_features to True"
            raise DataError(f"{config['model']} needs item features and '{dataset.dataset_name}' has none: {fix}")
        if cls.needs_kg and not len(dataset.triples):
            name = dataset.dataset_name
            fix = f"put {name}.kg and {name}.link into {dataset.dataset_path}"
            if not settings.use_kg:
                fix = "set use_kg to True"
            raise DataError(f"{config['model']} needs a knowledge graph and '{name}' has none: {fix}")

    def reset_parameters(self) -> None:
        """Initialise the parameters, as RecBole's models do: Xavier's uniform distribution, biases 0."""
        self.apply(xavier_uniform_initialization)

    @classmethod
    def scores_cold(cls, config: Any) -> ColdScoring:
        """Say whether the model can score items without training interactions."""
        known_by = "the entities around them" if cls.needs_kg else "their features"
        return ColdScoring(True, f"{config['model']} scores cold items by {known_by}")

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


class SolvedRecommender(DeclaredRecommender):
    """A model that is solved for in its first training step, without gradients.

    Args:
        config: RecBole's configuration.
        dataset: a :class:`~recbole_slifmr.data.dataset.SLIFMRDataset`, the training split.
    """

    type = ModelType.TRADITIONAL
    input_type = InputType.POINTWISE
    loss_names: tuple[str, ...] = ("none",)

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        self.anchor = nn.Parameter(torch.zeros(1))  # RecBole's trainer wants something to train

    def no_loss(self) -> Tensor:
        """Return a loss of zero that can be stepped on."""
        return self.anchor.sum() * 0.0


def full_precision(method: Callable[..., Any]) -> Callable[..., Any]:
    """Have a method run without autocast: sparse products have no half precision."""
    return torch.autocast("cpu", enabled=False)(torch.autocast("cuda", enabled=False)(method))


class GraphRecommender(EmbeddingRecommender):
    """A model with LightGCN's part: ID embeddings of users and items, propagated over the interactions.

    Args:
        config: RecBole's configuration.
        dataset: a :class:`~recbole_slifmr.data.dataset.SLIFMRDataset`, the training split.
    """

    settings: GraphSettings

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        self.user_embedding = nn.Embedding(self.n_users, self.settings.embedding_size)
        self.item_embedding = nn.Embedding(self.n_items, self.settings.embedding_size)
        self.interaction_encoder = InteractionEncoder(
            self.training_interactions(dataset), self.n_users, self.n_items, self.settings.n_layers
        )

    @classmethod
    def memory_parts(cls, settings: Any, dataset: Any, batch_size: int) -> dict[str, int]:
        """Return the bytes of embeddings and projections with Adam's moments, features, the graph and its products."""
        table, n_features = 4 * settings.embedding_size * (dataset.user_num + dataset.item_num), feature_size(dataset)
        return {
            "parameters and Adam": 4 * table + 16 * settings.embedding_size * n_features,
            "features": 4 * n_features * dataset.item_num,
            "interaction graph": 40 * len(dataset.inter_feat),
            "training step": 5 * table + 16 * batch_size * n_features,
        }

    def bpr(self, users: Tensor, items: Tensor, pos: Tensor, neg: Tensor) -> Tensor:
        """Return the BPR loss of ``users [B, d]`` and of the ids ``pos`` and ``neg [B]`` of ``items [n_items, d]``."""
        return bpr_loss((users * items.index_select(0, pos)).sum(1), (users * items.index_select(0, neg)).sum(1))

    def ego_norm(self, user: Tensor, pos: Tensor, neg: Tensor) -> Tensor:
        """Return ``l2_loss`` of the ID embeddings of a batch, ids ``[B]`` each."""
        return l2_loss(self.user_embedding(user), self.item_embedding(pos), self.item_embedding(neg))


def feature_size(dataset: Any) -> int:
    """Return the dimension of the features of all modalities side by side."""
    return sum(features.values.shape[1] for features in dataset.item_features.values())


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
