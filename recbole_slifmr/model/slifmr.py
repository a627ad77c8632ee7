r"""SLIF-MR: self-loop iterative fusion of heterogeneous auxiliary information.

Guo, Jiang, Guo, Song, Sun, "SLIF-MR: Self-loop Iterative Fusion of Heterogeneous Auxiliary Information for Multimodal
Recommendation", arXiv 2507.09998.

Every item is seen through several views: the interactions, each modality, the knowledge graph. Each view has its own
graph and encoder (``nn/encoder.py``); attentive fusion makes one representation of them (``layers.py``); after an epoch
the k nearest neighbours among the fused items go back into all three graphs (:meth:`SLIFMR.refresh_graphs`). The loss:

.. math::
    L = \mathrm{BPR}(s) + w_{inter} L_{inter} + w_{intra} L_{intra} + \lambda \|E\|^2 .

Scores :math:`s_{ui}` are inner products of the fused :math:`z`; on sparse data popularity has a part in them.
Where the paper leaves a choice open, ``docs/method.md`` says what was chosen and why.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from recbole.model.init import xavier_uniform_initialization
from torch import Tensor, nn

from recbole_slifmr.data.cold import ColdScoring
from recbole_slifmr.errors import SettingError
from recbole_slifmr.model.base import EmbeddingRecommender
from recbole_slifmr.nn.diagnostics import homogenisation, smoothing
from recbole_slifmr.nn.encoder import RELATION_WEIGHTS, FeatureEncoder, InteractionEncoder, KnowledgeEncoder
from recbole_slifmr.nn.graph import (
    KNN_SEARCHES,
    Edges,
    edge_turnover,
    empty_edges,
    knn_graph,
    knn_recall,
    normalize_symmetric,
    sum_edges,
)
from recbole_slifmr.nn.layers import FUSIONS, Fusion, unit
from recbole_slifmr.nn.loss import (
    INTER_LOSSES,
    INTRA_LOSSES,
    Losses,
    bpr_loss,
    hardest_negatives,
    inter_modal_loss,
    intra_modal_loss,
    l2_loss,
)


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


class RefreshStats(NamedTuple):
    """What a refresh did.

    Attributes:
        edges: edges of the correlation graph.
        turnover: the share of them that the last one did not have.
        recall: the share of the exact nearest neighbours that it has, of a sample of the items; 1 for an exact search.
    """

    edges: int
    turnover: float
    recall: float = 1.0


class SLIFMR(EmbeddingRecommender):
    """Fuse interactions, a knowledge graph and item features; refresh the graphs from what was learned.

    Runs with any subset of its inputs: no knowledge graph, no modality, items missing from either.

    Args:
        config: RecBole's configuration; the settings are listed in ``properties/model/SLIFMR.yaml``.
        dataset: a :class:`~recbole_slifmr.data.dataset.SLIFMRDataset`, the training split.

    Raises:
        SettingError: for a setting outside its range.
    """

    other_parameter_name = ("feedback_index",)
    loss_names = Losses._fields

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        # settings
        _check_ranges(config)
        self.embedding_size = size = int(config["embedding_size"])
        self.reg_weight: float = config["reg_weight"]
        self.refresh_k: int = config["refresh_k"]
        self.knn_search = _choice(config, "knn_search", KNN_SEARCHES)
        if self.knn_search == "approximate" and importlib.util.find_spec("faiss") is None:
            raise SettingError("knn_search: approximate needs FAISS: pip install faiss-cpu, or set it to exact")
        self.etas = {name: float(config[f"eta_{name}"]) for name in ("interaction", "feature", "kg")}
        self.item_graph_weight: float = config["item_graph_weight"]
        self.prune_ratio: float = config["prune_ratio"]
        self.normalize_views: bool = config["normalize_views"]
        self.fusion_residual: bool = config["fusion_residual"]
        self.inter_weight: float = config["inter_weight"]
        self.inter_loss = _choice(config, "inter_loss", INTER_LOSSES)
        self.inter_temperature: float = config["inter_temperature"]
        self.density = _density(dataset, config["dense_at"])
        self.intra_weight: float = config["intra_weight"]
        self.intra_loss = _choice(config, "intra_loss", INTRA_LOSSES)
        self.intra_temperature: float = config["intra_temperature"]
        self.n_negatives: int = config["n_negatives"]
        self.n_candidates = 1 + round((config["n_candidates"] - 1) * self.density)

        # encoders, one per graph
        self.user_embedding = nn.Embedding(self.n_users, size)
        self.item_embedding = nn.Embedding(self.n_items, size)
        self.interaction_encoder = InteractionEncoder(
            self.training_interactions(dataset), self.n_users, self.n_items, config["n_layers"]
        )
        self.feature_encoders: Mapping[str, FeatureEncoder] = nn.ModuleDict(  # type: ignore[assignment]
            {
                modality: FeatureEncoder(
                    features.values,
                    features.mask,
                    size,
                    config["knn_k"],
                    config["feature_n_layers"],
                    config["feature_gate"],
                    self.knn_search,
                )
                for modality, features in self.item_features(dataset).items()
            }
        )
        self.kg_encoder = None
        if len(dataset.triples):
            self.kg_encoder = KnowledgeEncoder(
                dataset.triples.to(self.device),
                dataset.entity_num,
                self.n_items,
                size,
                config["kg_n_layers"],
                _choice(config, "kg_relation_weight", RELATION_WEIGHTS),
                (config["kg_min_degree"], config["kg_max_degree"]),
                config["kg_ego"],
            )
        self.view_names = ["interaction", *self.feature_encoders, *(["kg"] if self.kg_encoder is not None else [])]
        fusion = _choice(config, "fusion", FUSIONS)
        self.user_fusion = Fusion(fusion, len(self.view_names), size)
        self.item_fusion = Fusion(fusion, len(self.view_names), size)

        self.intra_view_indices = self._choose_views(config["intra_views"])

        # popularity, where users have few interactions
        self.popularity: Tensor | None
        self.register_buffer("popularity", None, persistent=False)
        if config["popularity"] and self.density < 1:
            self.popularity = (1 - self.density) * self._log_popularity(dataset)
            self.popularity_weight = nn.Parameter(torch.zeros(()))

        # initialisation
        self.apply(xavier_uniform_initialization)
        self.user_fusion.reset_parameters()
        self.item_fusion.reset_parameters()
        self.feedback_index = torch.zeros(2, 0, dtype=torch.long)
        self._set_item_block(empty_edges(self.device))

    def _choose_views(self, names: Sequence[str]) -> list[int]:
        """Return the positions of the views that ``intra_views`` names."""
        known = ("interaction", "modality", "kg", *self.feature_encoders)
        for name in names:
            if name not in known:
                raise SettingError(f"intra_views: '{name}' is none of {', '.join(known)}")
        chosen = set(names) | (set(self.feature_encoders) if "modality" in names else set())
        return [v for v, name in enumerate(self.view_names) if name in chosen]

    def _log_popularity(self, dataset: Any) -> Tensor:
        """Return log(1 + training interactions) of every item, ``[n_items]``; for a cold one the mean of the others."""
        count = torch.bincount(self.training_interactions(dataset)[1], minlength=self.n_items)
        popularity = count.to(self.item_embedding.weight.dtype).log1p()
        if self.warm is not None:
            warm = self.warm.squeeze(1)
            popularity = torch.where(warm, popularity, popularity[1:][warm[1:]].mean())  # 0 is padding
        return popularity

    @classmethod
    def scores_cold(cls, config: Any) -> ColdScoring:
        """Say whether there may be anything but interactions."""
        if config["use_features"] or config["use_kg"]:
            return ColdScoring(True, "SLIFMR scores cold items by features and knowledge graph")
        return ColdScoring(False, "SLIFMR without features and knowledge graph knows items by their interactions only")

    # -- representations ------------------------------------------------------------------------------------------

    def encode(self, users: Tensor | None = None, items: Tensor | None = None) -> Views:
        """Run every encoder over the whole graphs; return all nodes, or the ``users [B]`` and ``items [C]`` asked for.

        Features without a gate are computed for the nodes asked for only: see ``FeatureEncoder``.
        """
        graph, item_embedding = self.interaction_encoder.graph, self.known(self.item_embedding.weight)
        u_c, i_c = self.interaction_encoder(self.user_embedding.weight, item_embedding)
        masks = [torch.ones(self.n_items, dtype=torch.bool, device=i_c.device)]
        if self.warm is not None:
            i_c = self._lend_interactions(i_c, self.warm)
            masks = [i_c.detach().any(dim=1)]
        views = [(_rows(u_c, users), _rows(i_c, items))]
        encoders: list[FeatureEncoder | KnowledgeEncoder] = [*self.feature_encoders.values()]
        encoders += [] if self.kg_encoder is None else [self.kg_encoder]
        for encoder in encoders:
            masks.append(encoder.mask)
            if users is not None and items is not None and isinstance(encoder, FeatureEncoder) and encoder.gate is None:
                views.append(encoder.rows(graph, users, items))
            else:
                view = encoder(item_embedding)
                views.append((_rows(graph.user_means(view, encoder.mask), users), _rows(view, items)))
        item_mask = torch.stack(masks, dim=1)
        user_mask = graph.user_mask(item_mask)
        user_mask[:, 0] = True  # everyone has an embedding
        return Views(
            torch.stack([user_view for user_view, _ in views], dim=1),
            torch.stack([item_view for _, item_view in views], dim=1),
            _rows(user_mask, users),
            _rows(item_mask, items),
        )

    def _lend_interactions(self, view: Tensor, warm: Tensor) -> Tensor:
        """Give each cold item the mean interaction view of its warm neighbours by features, zeros if it has none.

        Args:
            view: interaction view of every item, ``[n_items, d]``.
            warm: ``[n_items, 1]`` bool.
        """
        lent, n_modalities = torch.zeros_like(view), torch.zeros_like(view[:, :1])
        for encoder in self.feature_encoders.values():
            weight = encoder.graph.multiply(warm.to(view.dtype))
            lent = lent + encoder.graph.multiply(view * warm) / torch.where(weight > 0, weight, 1.0)
            n_modalities = n_modalities + (weight > 0)
        return torch.where(warm, view, lent / n_modalities.clamp(min=1))

    def fuse(self, fusion: Fusion, views: Tensor, mask: Tensor) -> Tensor:
        """Fuse ``views [n, V, d]`` into ``z [n, d]``, with the interaction view as residual if so set."""
        fused = fusion(unit(views), mask) * self.density if self.normalize_views else fusion(views, mask)
        return fused + views[:, 0] if self.fusion_residual else fused

    def forward(self) -> tuple[Tensor, Tensor]:
        """Return the final embeddings of all users ``[n_users, d]`` and items ``[n_items, d]``.

        The fused representations; where popularity has a part in the score, with one more coordinate for it.
        """
        return self._fuse_all(self.encode())

    def _fuse_all(self, views: Views) -> tuple[Tensor, Tensor]:
        return self._add_popularity(
            self.fuse(self.user_fusion, views.users, views.user_mask),
            self.fuse(self.item_fusion, views.items, views.item_mask),
        )

    def _add_popularity(self, z_user: Tensor, z_item: Tensor, items: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Append a coordinate to users ``[n, d]`` and items ``[m, d]``, all or ``items [m]``, if popularity counts.

        1 for users, weight times log-popularity for items: the score gains their product.
        """
        if self.popularity is None:
            return z_user, z_item
        popularity = self.popularity_weight * _rows(self.popularity, items)
        return torch.cat([z_user, z_user.new_ones(len(z_user), 1)], 1), torch.cat([z_item, popularity[:, None]], 1)

    # -- training -------------------------------------------------------------------------------------------------

    @torch.autocast("cpu", enabled=False)  # sparse products have no half precision
    @torch.autocast("cuda", enabled=False)
    def calculate_loss(self, interaction: Any) -> Losses:
        """Return the terms of the loss for a batch of (user, positive item, negative item)."""
        self.clear_cache()
        user, pos, neg = self.batch_ids(interaction)
        items = torch.cat([pos, neg])
        user_views, item_views, user_mask, item_mask = self.encode(user, items)
        fused = self.fuse(self.item_fusion, item_views, item_mask)
        z_user, z_item = self._add_popularity(self.fuse(self.user_fusion, user_views, user_mask), fused, items)
        z_pos, z_neg = z_item.split([len(pos), len(neg)])
        pos_views, pos_mask = item_views[: len(pos)], item_mask[: len(pos)]

        if self.n_candidates > 1:
            z_neg = z_neg.index_select(0, self._choose_negatives(user, neg, z_user, z_neg))
        bpr = bpr_loss((z_user * z_pos).sum(1), (z_user * z_neg).sum(1))
        inter = intra = torch.zeros_like(bpr)
        if self.inter_weight:
            inter = inter_modal_loss(
                pos_views, pos_mask, fused[: len(pos)], pos, self.inter_loss, self.inter_temperature, self.n_negatives
            )
        if self.intra_weight and self.intra_view_indices:
            chosen = torch.tensor(self.intra_view_indices, device=pos.device)
            negatives = item_views[len(pos) :], item_mask[len(pos) :]
            intra = intra_modal_loss(
                user_views.index_select(1, chosen),
                pos_views.index_select(1, chosen),
                (user_mask & pos_mask)[:, chosen],
                pos,
                (negatives[0].index_select(1, chosen), negatives[1][:, chosen], neg),
                self.intra_loss,
                self.intra_temperature,
                self.n_negatives,
            )
        reg = l2_loss(self.user_embedding(user), self.item_embedding(pos), self.item_embedding(neg))
        return Losses(bpr, self.inter_weight * inter, self.intra_weight * intra, self.reg_weight * reg)

    def _choose_negatives(self, user: Tensor, neg: Tensor, z_user: Tensor, z_neg: Tensor) -> Tensor:
        """Return the position in the batch, ``[B]``, of the negative that BPR compares each row with.

        The candidates of a row are its own negative and those of the rows after it, drawn just as uniformly.
        """
        rows = torch.arange(len(neg), device=neg.device)
        candidates = (rows[:, None] + rows[: self.n_candidates]) % len(rows)
        known = self.interaction_encoder.contains(user[:, None].expand_as(candidates), neg[candidates])
        return hardest_negatives(z_user, z_neg, candidates, known)

    # -- graphs ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def refresh_graphs(self) -> RefreshStats:
        """Link each item with its nearest neighbours among the fused items, in all three graphs.

        Blended with the *initial* graphs each time. Parameters, gradients and random states are left alone.
        """
        items = self._final_embeddings()[1][:, : self.embedding_size]
        mask = torch.ones(self.n_items, dtype=torch.bool, device=items.device)
        mask[0] = False
        index = knn_graph(items, self.refresh_k, mask, search=self.knn_search)
        turnover = edge_turnover(self.feedback_index.to(index.device), index, self.n_items)
        exact = self.knn_search == "exact"
        recall = 1.0 if exact else knn_recall(items, index, self.refresh_k, mask)
        stats = RefreshStats(index.shape[1], turnover, recall)
        self._set_feedback(index)
        return stats

    def _set_feedback(self, edge_index: Tensor) -> None:
        edge_index = edge_index.to(self.item_embedding.weight.device)
        shape = (self.n_items, self.n_items)
        weight = normalize_symmetric(edge_index, torch.ones(edge_index.shape[1], device=edge_index.device), shape)
        feedback = Edges(edge_index, weight)
        self.feedback_index = edge_index
        for encoder in self.feature_encoders.values():
            encoder.set_feedback(feedback, self.etas["feature"])
        if self.kg_encoder is not None:
            self.kg_encoder.set_feedback(feedback, self.etas["kg"])
        self._set_item_block(feedback)
        self.clear_cache()

    def _set_item_block(self, feedback: Edges) -> None:
        """Put the correlation graph and the mean of the feature graphs into the interaction graph."""
        parts = [(self.etas["interaction"], feedback)]
        share = self.item_graph_weight / max(len(self.feature_encoders), 1)
        parts += [(share, encoder.edges()) for encoder in self.feature_encoders.values()]
        parts = [(weight, edges) for weight, edges in parts if weight]
        if not parts:
            return
        index = torch.cat([edges.edge_index for _, edges in parts], dim=1)
        weight = torch.cat([weight * edges.edge_weight for weight, edges in parts])
        self.interaction_encoder.set_item_block(sum_edges(index, weight, self.n_items))

    def prune_interactions(self, seed: int) -> None:
        """Draw anew which interactions are left out of training propagation."""
        self.interaction_encoder.prune(self.prune_ratio, seed)

    def load_other_parameter(self, para: dict[str, Any] | None) -> None:
        """Restore the refreshed graphs of a checkpoint."""
        self._set_feedback((para or {}).get("feedback_index", self.feedback_index[:, :0]))

    @torch.no_grad()
    def diagnostics(self) -> dict[str, float]:
        """Return the signs of failure (``diagnostics.py``) of the items: ``homogenisation`` and ``smoothing``."""
        training = self.training
        self.eval()
        views = self.encode()
        self._final = self._fuse_all(views)  # a refresh or validation that follows need not encode again
        self.train(training)
        return {
            "homogenisation": homogenisation(views.items[1:], views.item_mask[1:]),
            "smoothing": smoothing(self._final[1][1:, : self.embedding_size]),
        }


def _rows(nodes: Tensor, rows: Tensor | None) -> Tensor:
    return nodes if rows is None else nodes.index_select(0, rows)


def _choice(config: Any, name: str, allowed: Sequence[str]) -> str:
    if config[name] not in allowed:
        raise SettingError(f"{name} must be one of {', '.join(allowed)}, not '{config[name]}'")
    return config[name]


def _density(dataset: Any, dense_at: float) -> float:
    """Return the mean interactions per user as a share of ``dense_at``, at most 1; 1 for a ``dense_at`` of 0."""
    users = dataset.inter_feat[dataset.uid_field]
    return min(1.0, len(users) / (len(users.unique()) * dense_at)) if dense_at else 1.0


def _check_ranges(config: Any) -> None:
    """Refuse numbers outside their range.

    Raises:
        SettingError: naming setting, range and value.
    """
    positive = (
        "inter_temperature",
        "intra_temperature",
        "n_negatives",
        "n_candidates",
        "refresh_k",
        "embedding_size",
        "knn_k",
    )
    not_negative = (
        "n_layers",
        "feature_n_layers",
        "kg_n_layers",
        "inter_weight",
        "intra_weight",
        "dense_at",
        "reg_weight",
        "item_graph_weight",
    )
    for name in positive:
        if not config[name] > 0:
            raise SettingError(f"{name} must be positive, not {config[name]}")
    for name in (*not_negative, "kg_min_degree", "kg_max_degree"):
        if not config[name] >= 0:
            raise SettingError(f"{name} must be 0 or more, not {config[name]}")
    for name in ("eta_interaction", "eta_feature", "eta_kg"):
        if not 0 <= config[name] <= 1:
            raise SettingError(f"{name} must be in [0, 1], not {config[name]}")
    if not 0 <= config["prune_ratio"] < 1:
        raise SettingError(f"prune_ratio must be in [0, 1), not {config['prune_ratio']}")
    if config["train_neg_sample_args"]["distribution"] == "none":
        raise SettingError("train_neg_sample_args: the model learns from sampled negative items: name a distribution")
