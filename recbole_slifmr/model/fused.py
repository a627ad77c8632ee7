r"""Items and users seen through several views, fused: the representations of SLIF-MR (arXiv 2507.09998).

A view each of the interactions, of each modality and of the knowledge graph, with a graph and an encoder of its own
(``nn/encoder.py``), and attentive fusion of them (``nn/layers.py``). Beside them stands a linear model of the same
data (``nn/linear_branch.py``), whose scores are added.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import numpy as np
import scipy.sparse
import torch
from torch import Tensor, nn

from recbole_slifmr.data.features import KG_TAGS, ItemFeatures
from recbole_slifmr.data.new_items import NewItems
from recbole_slifmr.errors import SettingError
from recbole_slifmr.model.base import GraphRecommender
from recbole_slifmr.model.linear import ContentWeights, content_sources, new_content_sources, relevant_weights
from recbole_slifmr.model.settings import Count, FeatureSettings, GraphSettings, Positive, Share, Weight, Whole
from recbole_slifmr.nn.encoder import MOST_AHEAD, FeatureEncoder, InteractionGraph
from recbole_slifmr.nn.fold_in import fold_in, item_shares
from recbole_slifmr.nn.graph import KNN_SEARCHES, Edges, sparse_knn_graph, unweighted
from recbole_slifmr.nn.knowledge import RELATION_WEIGHTS, KnowledgeEncoder, filter_by_degree
from recbole_slifmr.nn.layers import FUSIONS, Fusion, unit
from recbole_slifmr.nn.linear import (
    DenseSolver,
    NeighbourSolver,
    Solver,
    cross_gram,
    interaction_factor,
)
from recbole_slifmr.nn.linear_branch import LinearBranch, trust, user_weights, weighted_interactions
from recbole_slifmr.nn.sparse import SparseMatrix
from recbole_slifmr.nn.tags import tag_factor, tag_factors, tag_vectors, unit_rows

KG_VIEWS = ("graph", "tags", "both", "none")
SHARES = ("relevance", "equal")
MOST_TAG_NUMBERS = 256
N_NEIGHBOURS = 200  # weights per item, where there are too many items for a dense matrix


class Views(NamedTuple):
    """Every node seen through every view.

    Attributes:
        users: ``[n_users, V, d]``.
        items: ``[n_items, V, d]``.
        user_mask: ``[n_users, V]`` bool, whether the user has the view.
        item_mask: ``[n_items, V]`` bool.
    """

    users: Tensor
    items: Tensor
    user_mask: Tensor
    item_mask: Tensor


class Propagated(NamedTuple):
    """What propagation over whole graphs gives.

    Attributes:
        views: of all users ``[n_users, d]`` and items ``[n_items, d]``; None for a view that is computed for the nodes
            asked for, see :meth:`FusedRecommender.views_of`.
        user_mask: ``[n_users, V]`` bool, whether the user has the view.
        item_mask: ``[n_items, V]`` bool.
    """

    views: list[tuple[Tensor, Tensor] | None]
    user_mask: Tensor
    item_mask: Tensor


@dataclass(frozen=True)
class FusedSettings(FeatureSettings, GraphSettings):
    """The settings of encoders, fusion and score."""

    feature_n_layers: Whole
    kg_n_layers: Whole
    knn_k: Count
    knn_search: Annotated[str, KNN_SEARCHES]
    item_graph_weight: Weight
    feature_gate: bool
    kg_view: Annotated[str, KG_VIEWS]
    kg_ego: bool
    kg_relation_weight: Annotated[str, RELATION_WEIGHTS]
    kg_min_degree: Whole
    kg_max_degree: Whole
    fusion: Annotated[str, FUSIONS]
    fusion_residual: bool
    normalize_views: bool
    linear_scale: Weight
    linear_reg_weight: Positive
    linear_popularity_reg: Weight
    linear_user_power: Share
    linear_feature_weight: Weight
    linear_kg_weight: Weight
    linear_shares: Annotated[str, SHARES]
    linear_max_items: Count
    denoising: Share
    dense_at: Weight


class FusedRecommender(GraphRecommender):
    """Score by representations that are fused of several views; a model adds how they are learned.

    Runs with any subset of its inputs: no knowledge graph, no modality, items missing from either.

    Args:
        config: RecBole's configuration.
        dataset: a :class:`~recbole_slifmr.data.dataset.SLIFMRDataset`, the training split.

    Raises:
        SettingError: for an approximate search without FAISS.
    """

    settings: FusedSettings

    @classmethod
    def check(cls, config: Any, dataset: Any) -> None:
        """Refuse an approximate search without FAISS, beside what every model refuses."""
        super().check(config, dataset)
        settings: Any = cls.settings_class.read(config)
        if settings.knn_search == "approximate" and importlib.util.find_spec("faiss") is None:
            raise SettingError("knn_search: approximate needs FAISS: pip install faiss-cpu, or set it to exact")

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        settings = self.settings
        self.embedding_size = size = settings.embedding_size

        # encoders beside that of the interactions, one per graph
        self.feature_encoders: Mapping[str, FeatureEncoder] = nn.ModuleDict(  # type: ignore[assignment]
            {
                modality: FeatureEncoder(
                    *features,
                    size,
                    settings.knn_k,
                    settings.feature_n_layers,
                    settings.feature_gate,
                    settings.knn_search,
                    graph,
                )
                for modality, (features, graph) in self._content(dataset).items()
            }
        )
        self.kg_encoder = None
        if len(dataset.triples) and settings.kg_view in ("graph", "both"):
            self.kg_encoder = KnowledgeEncoder(
                dataset.triples.to(self.device),
                dataset.entity_num,
                self.n_items,
                size,
                settings.kg_n_layers,
                settings.kg_relation_weight,
                (settings.kg_min_degree, settings.kg_max_degree),
                settings.kg_ego,
            )

        # fusion and what is added to its scores
        self.view_names = ["interaction", *self.feature_encoders, *(["kg"] if self.kg_encoder is not None else [])]
        self.user_fusion = Fusion(settings.fusion, len(self.view_names), size)
        self.item_fusion = Fusion(settings.fusion, len(self.view_names), size)
        weight = linear_scale(settings, dataset)
        self.linear = self._linear_branch(dataset, weight) if weight else None
        if self.linear is not None and settings.denoising:
            users, items = self.interaction_encoder.edge_index
            self.interaction_encoder.set_edge_weight(self.linear.trust(users, items, settings.denoising))
        self.reset_parameters()

    def _content(self, dataset: Any) -> dict[str, tuple[ItemFeatures, Edges | None]]:
        """Return the item features by modality and, if it is seen so, the knowledge graph as features of its own.

        Beside features is their item graph, if it is not that of the nearest neighbours by them. Tags have one by all
        their numbers, of which the vectors keep too few for items with rare tags, unless the search is approximate.
        """
        content: dict[str, tuple[ItemFeatures, Edges | None]]
        content = {modality: (features, None) for modality, features in self.item_features(dataset).items()}
        if len(dataset.triples) and self.settings.kg_view in ("tags", "both"):
            rows = unit_rows(tag_factor(dataset.triples.numpy(), self.n_items))
            values = tag_vectors(rows, MOST_TAG_NUMBERS).to(self.device)
            graph = None
            if self.settings.knn_search == "exact":
                graph = unweighted(sparse_knn_graph(rows, self.settings.knn_k).to(self.device), self.n_items)
            content[KG_TAGS] = ItemFeatures(values, values.any(dim=1)), graph
        return content

    def _linear_branch(self, dataset: Any, weight: float) -> LinearBranch:
        settings, (users, items) = self.settings, self.training_interactions(dataset).cpu().numpy()
        history = interaction_factor(users, items, self.n_users, self.n_items).T.tocsr()

        weights = ContentWeights({}, settings.linear_feature_weight, settings.linear_kg_weight)
        if settings.linear_shares == "relevance":
            weighted = weighted_interactions(history, user_weights(history, settings.linear_user_power))
            weights = relevant_weights(dataset, weighted, weights)
        self._content_weights = weights
        return LinearBranch(
            history,
            lambda: list(content_sources(dataset, weights).values()),
            settings.linear_reg_weight,
            weight,
            linear_solver(settings, self.n_items, self.device),
            self.device,
            settings.linear_user_power,
            settings.linear_popularity_reg,
        )

    def reset_parameters(self) -> None:
        """Initialise all parameters; fusion starts as the plain mean of the views."""
        super().reset_parameters()
        self.user_fusion.reset_parameters()
        self.item_fusion.reset_parameters()

    @classmethod
    def memory_parts(cls, settings: Any, dataset: Any, batch_size: int) -> dict[str, int]:
        """Return the bytes of the base, of features propagated ahead, the linear branch and the knowledge graph."""
        parts = super().memory_parts(settings, dataset, batch_size)
        n_items, size, n_layers = dataset.item_num, settings.embedding_size, settings.kg_n_layers
        triples, n_others = dataset.triples[:0], 0
        sizes = [features.values.shape[1] for features in dataset.item_features.values()]
        factors = 8 * sum(sizes) * n_items * (settings.linear_feature_weight > 0)
        factors += 100 * len(dataset.triples) * (settings.linear_kg_weight > 0)
        if settings.kg_view in ("graph", "both"):
            degrees = settings.kg_min_degree, settings.kg_max_degree
            triples = filter_by_degree(dataset.triples, dataset.entity_num, n_items, degrees)
            n_others = int((triples[:, [0, 2]].unique() >= n_items).sum())
        if len(dataset.triples) and settings.kg_view in ("tags", "both"):
            sizes.append(MOST_TAG_NUMBERS)
        parts["parameters and Adam"] += 16 * size * n_others
        ahead = [numbers for numbers in (n * dataset.user_num for n in sizes) if numbers <= MOST_AHEAD]
        parts["features"] = 4 * (2 * sum(sizes) * n_items + sum(ahead))
        parts["item graphs"] = 16 * len(sizes) * settings.knn_k * n_items
        if linear_scale(settings, dataset):
            parts["linear branch"] = factors + linear_solver(settings, n_items, "cpu").estimate_memory(n_items, 1)
        parts["knowledge graph"] = 2 * len(triples) * (16 * n_layers + 52)
        parts["training step"] += 4 * size * (n_layers + 4) * (n_items + n_others) * (len(triples) > 0)
        return parts

    def encode(self) -> Views:
        """Run every encoder over the whole graphs; return the views of all nodes."""
        views, user_mask, item_mask = self.propagate()
        users, items = (torch.stack(part, dim=1) for part in zip(*filter(None, views), strict=True))
        return Views(users, items, user_mask, item_mask)

    def propagate(self, by_rows: bool = False) -> Propagated:
        """Run the encoders over the whole graphs.

        Args:
            by_rows: leave out the features that :meth:`views_of` computes for the nodes asked for.
        """
        graph, item_embedding = self.interaction_encoder.graph, self.known(self.item_embedding.weight)
        users, items = self.interaction_encoder(self.user_embedding.weight, item_embedding)
        masks = [torch.ones(self.n_items, dtype=torch.bool, device=items.device)]
        if self.warm is not None:
            items = lend_interactions(items, self.warm, [encoder.graph for encoder in self.feature_encoders.values()])
            masks = [items.detach().any(dim=1)]
        views: list[tuple[Tensor, Tensor] | None] = [(users, items)]
        encoders: list[FeatureEncoder | KnowledgeEncoder] = [*self.feature_encoders.values()]
        encoders += [] if self.kg_encoder is None else [self.kg_encoder]
        for encoder in encoders:
            masks.append(encoder.mask)
            if by_rows and isinstance(encoder, FeatureEncoder) and encoder.is_ahead(self.n_users):
                views.append(None)
            else:
                view = encoder(item_embedding)
                views.append((graph.user_means(view, encoder.mask), view))
        item_mask = torch.stack(masks, dim=1)
        user_mask = graph.user_mask(item_mask)
        user_mask[:, 0] = True  # everyone has an embedding
        return Propagated(views, user_mask, item_mask)

    def views_of(self, propagated: Propagated, users: Tensor, items: Tensor) -> Views:
        """Return the views of the ``users [B]`` and ``items [C]`` asked for, from what :meth:`propagate` returns."""
        graph, rows = self.interaction_encoder.graph, []
        for view, encoder in zip(propagated.views, [None, *self.feature_encoders.values(), None], strict=False):
            if view is not None:
                rows.append((view[0].index_select(0, users), view[1].index_select(0, items)))
            elif encoder is not None:
                rows.append(encoder.rows(graph, users, items))
        of_users, of_items = (torch.stack(part, dim=1) for part in zip(*rows, strict=True))
        masks = propagated.user_mask.index_select(0, users), propagated.item_mask.index_select(0, items)
        return Views(of_users, of_items, *masks)

    def fuse(self, fusion: Fusion, views: Tensor, mask: Tensor) -> Tensor:
        """Fuse ``views [n, V, d]`` into ``z [n, d]``, with the interaction view as residual if so set."""
        fused = fusion(unit(views) if self.settings.normalize_views else views, mask)
        return fused + views[:, 0] if self.settings.fusion_residual else fused

    def forward(self) -> tuple[Tensor, Tensor]:
        """Return the fused representations of all users ``[n_users, d]`` and items ``[n_items, d]``."""
        return self._fuse_all(self.encode())

    def _fuse_all(self, views: Views) -> tuple[Tensor, Tensor]:
        return (
            self.fuse(self.user_fusion, views.users, views.user_mask),
            self.fuse(self.item_fusion, views.items, views.item_mask),
        )

    def predict(self, interaction: Any) -> Tensor:
        """Return the score of each (user, item) pair, ``[B]``."""
        scores = super().predict(interaction)
        if self.linear is None:
            return scores
        users, items = interaction[self.USER_ID], interaction[self.ITEM_ID]
        return scores + self.linear.pair_scores(users, items.unsqueeze(1)).squeeze(1)

    def full_sort_predict(self, interaction: Any) -> Tensor:
        """Return the scores of all items for each user, ``[B * n_items]``."""
        scores = super().full_sort_predict(interaction)
        return scores if self.linear is None else scores.add_(self.linear.scores(interaction[self.USER_ID]).flatten())

    def new_user_representations(self) -> Callable[..., Tensor]:
        """Return a function from the items of users who were not in training to their fused representations.

        It takes ones where a user has an item, ``[n, n_items]``, and returns ``[n, d]``. The means over a user's items
        are exact, items trusted as by a regression that has not seen the user; the interaction view is folded in, see
        ``nn/fold_in.py``. The linear branch's scores ``[n, n_items]``, where they are known, are its second argument.
        """
        views, encoder, linear = self.encode(), self.interaction_encoder, self.linear
        shares = item_shares(views.users[:, 0], views.items[:, 0], encoder.edge_index, encoder.edge_weight)

        def represent(history: scipy.sparse.csr_array, scores: Tensor | None = None) -> Tensor:
            n_users, edge_index = history.shape[0], torch.from_numpy(np.stack(history.nonzero()).astype(np.int64))
            edge_index, weight = edge_index.to(shares.device), None
            if linear is not None and self.settings.denoising:  # B has not seen these users
                scores = linear.history_scores(history) if scores is None else scores
                weight = trust(scores[*edge_index] / linear.size, self.settings.denoising)
            graph = InteractionGraph(edge_index, n_users, self.n_items, weight)
            users = [fold_in(shares, edge_index, n_users, weight)]
            for v in range(1, len(self.view_names)):
                users.append(graph.user_means(views.items[:, v], views.item_mask[:, v]))
            mask = graph.user_mask(views.item_mask)
            mask[:, 0] = True  # as in training
            return self.fuse(self.user_fusion, torch.stack(users, dim=1), mask)

        return represent

    def score_new_users(self) -> Callable[[scipy.sparse.csr_array], Tensor]:
        """Return a function from the items of users who were not in training to the scores of all items.

        It takes ones where a user has an item, ``[n, n_items]``, and returns ``[n, n_items]``. The linear branch is
        exact; for the rest see :meth:`new_user_representations`.
        """
        represent, items = self.new_user_representations(), self._final_embeddings()[1]

        def score(history: scipy.sparse.csr_array) -> Tensor:
            if self.linear is None:
                return represent(history) @ items.T
            scores = self.linear.history_scores(history)
            return scores.add_(represent(history, scores) @ items.T)

        return score

    def new_item_representations(self, dataset: Any, new: NewItems) -> Tensor:
        """Return the fused representations of items that were not in training, ``[n_new, d]``.

        Features and tags are seen as in training, see :meth:`FeatureEncoder.new_rows`; the interaction view is the mean
        of the neighbours' by features and tags, as a cold item's in training. A view by the knowledge graph's own
        encoder is missing.

        Args:
            dataset: the training split.
            new: the items.
        """
        features, embedding = dict(new.features), self.known(self.item_embedding.weight)
        likeness = {}
        if KG_TAGS in self.feature_encoders:
            tags = tag_factors(dataset.triples.numpy(), self.n_items, 1, new.links, len(new.tokens))
            rows, of_new = unit_rows(tags.items), unit_rows(tags.new)
            values = tag_vectors(rows, MOST_TAG_NUMBERS, of_new)
            features[KG_TAGS] = ItemFeatures(values, values.any(dim=1))
            likeness[KG_TAGS] = torch.from_numpy((of_new @ rows.T).toarray()).to(embedding.device)
        n_new, lender = len(new.tokens), self.encode().items[:, 0]
        views = embedding.new_zeros(n_new, len(self.view_names), self.embedding_size)
        mask = torch.zeros(n_new, len(self.view_names), dtype=torch.bool, device=embedding.device)
        lenders = embedding.new_zeros(n_new, 1)
        for v, (name, encoder) in enumerate(self.feature_encoders.items(), start=1):
            if name in features:
                values = features[name].values.to(embedding.device)
                views[:, v], near = encoder.new_rows(values, embedding, likeness.get(name))
                mask[:, v] = features[name].mask
                weight = near.sum(1, keepdim=True)
                views[:, 0] += near @ lender / torch.where(weight > 0, weight, 1.0)
                lenders += weight > 0
        views[:, 0] /= lenders.clamp(min=1)
        mask[:, 0] = lenders[:, 0] > 0
        return self.fuse(self.item_fusion, views, mask)

    def new_content(self, dataset: Any, new: NewItems) -> np.ndarray:
        """Return the linear branch's inner products of items and new items, ``[n_items, n_new]``; zeros without it."""
        nothing = np.zeros((self.n_items, len(new.tokens)))
        if self.linear is None:
            return nothing
        weights = self._content_weights
        of_new, known = new_content_sources(dataset, new, weights), content_sources(dataset, weights)
        if not of_new:
            return nothing
        return cross_gram([known[name] for name in of_new], list(of_new.values()))


def linear_scale(settings: FusedSettings, dataset: Any) -> float:
    """Return the standard deviation of the linear branch's scores, see :func:`sparsity`."""
    return settings.linear_scale * sparsity(settings.dense_at, dataset)


def sparsity(dense_at: float, dataset: Any) -> float:
    """Return what the additions for sparse data count by: 1 / mean interactions per user, 0 from ``dense_at`` on."""
    mean = interactions_per_user(dataset)
    return 1 / mean if not dense_at or mean < dense_at else 0.0


def interactions_per_user(dataset: Any) -> float:
    """Return the mean number of training interactions of the users who have any."""
    users = dataset.inter_feat[dataset.uid_field]
    return len(users) / len(users.unique())


def linear_solver(settings: FusedSettings, n_items: int, device: torch.device | str) -> Solver[Any]:
    """Return the solver of the linear branch."""
    if n_items > settings.linear_max_items:
        return NeighbourSolver(N_NEIGHBOURS)
    return DenseSolver(torch.float32, device)


def lend_interactions(view: Tensor, warm: Tensor, graphs: Iterable[SparseMatrix]) -> Tensor:
    """Give each cold item the mean interaction view of its warm neighbours by features, zeros if it has none.

    Args:
        view: interaction view of every item, ``[n_items, d]``.
        warm: ``[n_items, 1]`` bool.
        graphs: of the neighbours, one per modality.
    """
    lent, n_modalities = torch.zeros_like(view), torch.zeros_like(view[:, :1])
    for graph in graphs:
        weight = graph.multiply(warm.to(view.dtype))
        lent = lent + graph.multiply(view * warm) / torch.where(weight > 0, weight, 1.0)
        n_modalities = n_modalities + (weight > 0)
    return torch.where(warm, view, lent / n_modalities.clamp(min=1))
