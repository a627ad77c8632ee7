"""What the closed forms share: their sources, when and how they are solved, and scores from a user's items.

The weights are solved for in the first training step or, after a checkpoint is loaded, for the first score. A
checkpoint holds the settings that determine them and not the weights, of which there are as many as items squared.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import asdict, dataclass
from typing import Annotated, Any, ClassVar, NamedTuple

import numpy as np
import scipy.sparse
import torch
from torch import Tensor

from recbole_slifmr.data.cold import ColdScoring
from recbole_slifmr.data.new_items import NewItems
from recbole_slifmr.errors import SettingError
from recbole_slifmr.model.base import SolvedRecommender, feature_size
from recbole_slifmr.model.settings import Count, FeatureSettings, Positive, Range, Weight, check
from recbole_slifmr.nn.linear import (
    DenseSolver,
    Matrix,
    NeighbourSolver,
    Solver,
    Source,
    cross_gram,
    feature_factor,
    feature_mean,
    history_scores,
    interaction_factor,
)
from recbole_slifmr.nn.relevance import share_out
from recbole_slifmr.nn.tags import tag_factors

PRECISIONS = {"double": torch.float64, "single": torch.float32}
PLACES = ("modalities", "feature_path")  # where the features lie, which may change behind a checkpoint


@dataclass(frozen=True)
class LinearSettings(FeatureSettings):
    """What every closed form is asked for."""

    reg_weight: Positive
    feature_weight: Weight
    modality_weights: dict
    kg_weight: Weight
    kg_hops: Annotated[int, Range(1, 2)]
    precision: Annotated[str, tuple(PRECISIONS)]
    max_items: Count
    n_neighbours: Count


class LinearRecommender(SolvedRecommender):
    """A model that scores an item by the sum of its weights on the user's items, which it finds in closed form.

    Args:
        config: RecBole's configuration.
        dataset: a :class:`~recbole_slifmr.data.dataset.SLIFMRDataset`, the training split.

    Attributes:
        deterministic: it draws nothing, so that a comparison runs it with one seed.
        n_matrices: of weights, that exist at a time while the model is solved.
        sources: ``interaction``, the modalities by name, and ``kg``; without those that are absent or have no weight.

    Raises:
        SettingError: for a setting outside its limits or the weight of a modality that is not there.
    """

    settings: LinearSettings
    deterministic = True
    n_matrices: ClassVar[int]

    @classmethod
    def check(cls, config: Any, dataset: Any) -> None:
        """Refuse the weight of a modality that is not there, beside what every model refuses."""
        super().check(config, dataset)
        settings: Any = cls.settings_class.read(config)
        for name, weight in settings.modality_weights.items():
            if name not in dataset.item_features:
                known = ", ".join(dataset.item_features) or "none"
                raise SettingError(f"modality_weights: there is no modality '{name}'; the data set has {known}")
            check(f"modality_weights: {name}", weight, Weight)

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        settings = self.settings
        self.solver = make_solver(settings, self.n_items, self.device)
        users, items = (dataset.inter_feat[field].numpy() for field in (self.USER_ID, self.ITEM_ID))
        interactions = interaction_factor(users, items, self.n_users, self.n_items)
        self.history: scipy.sparse.csr_array = interactions.T.tocsr()
        self.sources = {"interaction": Source(interactions), **content_sources(dataset, self._content_weights())}
        if len(self.sources) == 1:
            self.logger.warning(f"{config['model']} has neither features nor a knowledge graph here: it is EASE then")
        self._weights: Matrix | None = None

    @classmethod
    def memory_parts(cls, settings: Any, dataset: Any, batch_size: int) -> dict[str, int]:
        """Return the bytes of the factors and of what solving takes at its peak, on the CPU."""
        solver = make_solver(settings, dataset.item_num, "cpu")
        return {
            "interactions": 40 * len(dataset.inter_feat),
            "features": 8 * feature_size(dataset) * dataset.item_num,
            "knowledge graph": 100 * len(dataset.triples),
            "solving": solver.estimate_memory(dataset.item_num, cls.n_matrices),
        }

    @classmethod
    def scores_cold(cls, config: Any) -> ColdScoring:
        """Say whether the model can score items without training interactions."""
        return ColdScoring(True, f"{config['model']} scores cold items by the features and tags they share with others")

    @abstractmethod
    def combine(self, solver: Solver[Any], interactions: list[Source], content: list[Source]) -> Any:
        """Return the weights B ``[n_items, n_items]``, as the solver solves for them."""

    @abstractmethod
    def combine_new(self, interactions: list[Source], content: list[Source], wanted: np.ndarray) -> np.ndarray:
        """Return the weights of the items for new ones that nobody has, ``[n_items, n]``.

        Args:
            interactions: of the items.
            content: of the items.
            wanted: the content's inner products of items and new items, ``[n_items, n]``.
        """

    def new_item_weights(self, dataset: Any, new: NewItems) -> Tensor:
        """Return the weights B of the items for new ones, ``[n_items, n_new]``, as if these had been in training.

        Nobody has them: their interactions are zeros, and content alone says what they are like.

        Raises:
            SettingError: if the sources that new items have weigh nothing.
        """
        of_new = new_content_sources(dataset, new, self._content_weights())
        content = {name: source for name, source in self.sources.items() if name != "interaction"}
        if not of_new:
            raise SettingError("the model gives no weight to what is known of the new items")
        wanted = cross_gram([content[name] for name in of_new], list(of_new.values()))
        return torch.from_numpy(self.combine_new([self.sources["interaction"]], list(content.values()), wanted)).float()

    def _content_weights(self) -> ContentWeights:
        settings = self.settings
        return ContentWeights(settings.modality_weights, settings.feature_weight, settings.kg_weight, settings.kg_hops)

    def solve(self, with_content: bool = True) -> Matrix:
        """Return the weights B, ``[n_items, n_items]``: column j holds what item j's score takes of each item.

        Args:
            with_content: whether the modalities and the knowledge graph count; without them the same settings give
                what the interactions alone say.

        Returns:
            a dense float32 tensor; with more than ``max_items`` items a sparse matrix.
        """
        content = [source for name, source in self.sources.items() if name != "interaction" and with_content]
        weights = self.combine(self.solver, [self.sources["interaction"]], content)
        return weights.float() if isinstance(weights, Tensor) else weights

    @property
    def weights(self) -> Matrix:
        """The weights B, solved for when they are first asked for."""
        if self._weights is None:
            size = self.solver.estimate_memory(self.n_items, self.n_matrices)
            self.logger.info(f"{self.n_items} items: solving takes {size / 1e9:.2f} GB of memory")
            if isinstance(self.solver, NeighbourSolver):
                self.logger.info(
                    f"{self.n_items} items are more than max_items: each item's score takes weights of its "
                    f"{self.solver.n_neighbours} nearest items only"
                )
            self._weights = self.solve()
        return self._weights

    def get_extra_state(self) -> dict[str, Any]:
        """Return the settings, which stand for the weights in a checkpoint."""
        return {name: value for name, value in asdict(self.settings).items() if name not in PLACES}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Refuse the settings of a checkpoint if they are not the model's own."""
        differing = {name: value for name, value in self.get_extra_state().items() if state.get(name) != value}
        if differing:
            here = ", ".join(f"{name}={value}" for name, value in differing.items())
            raise SettingError(f"the checkpoint is of other settings than {here}")

    def forward(self) -> None:
        """Do nothing: there is no network."""

    def calculate_loss(self, interaction: Any) -> Tensor:
        """Solve, once; return a loss of zero."""
        assert self.weights is not None
        return self.no_loss()

    def predict(self, interaction: Any) -> Tensor:
        """Return the score of each (user, item) pair, ``[B]``."""
        users, place = torch.unique(interaction[self.USER_ID], return_inverse=True)
        return self._scores(users)[place, interaction[self.ITEM_ID]]

    def full_sort_predict(self, interaction: Any) -> Tensor:
        """Return the scores of all items for each user, ``[B * n_items]``."""
        return self._scores(interaction[self.USER_ID]).flatten()

    def _scores(self, users: Tensor) -> Tensor:
        return self.history_scores(self.history[users.cpu().numpy()])

    def history_scores(self, history: scipy.sparse.csr_array) -> Tensor:
        """Return the scores of all items for users with other items than in training, ``[n, n_items]``.

        Args:
            history: ones where a user has an item, ``[n, n_items]``.
        """
        return history_scores(history, self.weights, self.device)


class ContentWeights(NamedTuple):
    """What the content counts.

    Attributes:
        modalities: by name.
        features: of the modalities that have none by name.
        kg: of the tags of the knowledge graph.
        kg_hops: see :func:`~recbole_slifmr.nn.tags.tag_factor`.
        kinds: of the tags of each kind, see :class:`~recbole_slifmr.nn.tags.Tags`, beside ``kg``.
    """

    modalities: dict[str, float]
    features: float
    kg: float
    kg_hops: int = 1
    kinds: np.ndarray | None = None


def relevant_weights(dataset: Any, interactions: scipy.sparse.csr_array, weights: ContentWeights) -> ContentWeights:
    """Weigh modalities and kinds of tags by what they say of who has which items, see ``nn/relevance.py``.

    Args:
        dataset: the training split.
        interactions: weighted, ``[n_items, n_users]``.
        weights: the means of what is returned.
    """
    factors = {name: source.factor for name, source in content_sources(dataset, weights._replace(kg=0.0)).items()}
    triples = dataset.triples if weights.kg else dataset.triples[:0]
    found, by_kind = share_out(interactions, list(factors.values()), tag_factors(triples.numpy(), dataset.item_num))
    named = dict(zip(factors, (weights.features * found).tolist(), strict=True))
    return weights._replace(modalities=named, kinds=by_kind)


def content_sources(dataset: Any, content: ContentWeights) -> dict[str, Source]:
    """Return the modalities by name and the tags of the knowledge graph as ``kg``, without those that weigh nothing.

    Args:
        dataset: the training split.
        content: what each counts.
    """
    weights = dict.fromkeys(dataset.item_features, content.features) | content.modalities
    sources = {
        name: Source(feature_factor(*features), weights[name])
        for name, features in dataset.item_features.items()
        if weights[name]
    }
    if content.kg and len(dataset.triples):
        tags = tag_factors(dataset.triples.numpy(), dataset.item_num, content.kg_hops)
        sources["kg"] = Source(weigh_kinds(tags.items, tags.kinds, content.kinds), content.kg)
    return sources


def weigh_kinds(
    tags: scipy.sparse.csr_array, kinds: np.ndarray, kind_weights: np.ndarray | None
) -> scipy.sparse.csr_array:
    """Return tags ``[n, n_tags]`` whose Gram matrix counts each kind by its weight; the tags themselves if None.

    Args:
        tags: see :class:`~recbole_slifmr.nn.tags.Tags`.
        kinds: of the tags, ``[n_tags]``.
        kind_weights: by kind.
    """
    if kind_weights is None:
        return tags
    return (tags @ scipy.sparse.diags_array(np.sqrt(kind_weights[kinds]))).tocsr()


def new_content_sources(dataset: Any, new: NewItems, content: ContentWeights) -> dict[str, Source]:
    """Return the factors of new items, ``[n_new, c]`` each, by the names of :func:`content_sources`; see there.

    Features are centred by the mean of the training's items, and tags count as they do there.
    """
    sources = {}
    for name, known in content_sources(dataset, content).items():
        if name in new.features:
            mean = feature_mean(*dataset.item_features[name])
            sources[name] = Source(feature_factor(*new.features[name], mean), known.weight)
        elif name == "kg":
            tags = tag_factors(dataset.triples.numpy(), dataset.item_num, content.kg_hops, new.links, len(new.tokens))
            sources[name] = Source(weigh_kinds(tags.new, tags.kinds, content.kinds), known.weight)
    return sources


def make_solver(settings: LinearSettings, n_items: int, device: torch.device | str) -> Solver[Any]:
    """Return the solver of the whole matrix, or with more than ``max_items`` items that of their neighbours."""
    if n_items > settings.max_items:
        return NeighbourSolver(settings.n_neighbours)
    return DenseSolver(PRECISIONS[settings.precision], device)
