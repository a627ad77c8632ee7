r"""SLIF-MR: self-loop iterative fusion of heterogeneous auxiliary information.

Guo, Jiang, Guo, Song, Sun, "SLIF-MR: Self-loop Iterative Fusion of Heterogeneous Auxiliary Information for Multimodal
Recommendation", arXiv 2507.09998.

Every item is seen through several views: the interactions, each modality, the knowledge graph. Each view has its own
graph and encoder (``nn/encoder.py``); attentive fusion makes one representation of them (``layers.py``); after an epoch
the k nearest neighbours among the fused items go back into all three graphs (:meth:`SLIFMR.refresh_graphs`). The loss:

.. math::
    L = L_{rank} + w_{inter} L_{inter} + w_{intra} L_{intra} + \lambda \|E\|^2 .

A score is the inner product of the fused :math:`z` and what a linear model of the same data adds, which in training
has not seen the user (``nn/linear_branch.py``):

.. math::
    s_{ui} = z_u^T z_i + w (x_u B)_i .

The same linear model says how far an interaction is trusted, :math:`\tau_{ui}`: so much it counts in the graphs and in
the ranking loss, a softmax over the positive and some sampled items.

Where the paper leaves a choice open, ``docs/method.md`` says what was chosen and why.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor

from recbole_slifmr.data.cold import ColdScoring
from recbole_slifmr.data.features import KG_TAGS
from recbole_slifmr.errors import SettingError
from recbole_slifmr.model.base import full_precision
from recbole_slifmr.model.fused import FusedRecommender, FusedSettings, Propagated, interactions_per_user, sparsity
from recbole_slifmr.model.settings import Count, Positive, Share, Weight, Whole
from recbole_slifmr.nn.diagnostics import homogenisation, smoothing
from recbole_slifmr.nn.graph import (
    Edges,
    RefreshStats,
    cooccurrence_graph,
    correlation_graph,
    empty_edges,
    sum_edges,
    unweighted,
)
from recbole_slifmr.nn.loss import (
    INTER_LOSSES,
    INTRA_LOSSES,
    Losses,
    inter_modal_loss,
    intra_modal_loss,
    softmax_loss,
)
from recbole_slifmr.nn.parts import sum_over_parts
from recbole_slifmr.nn.spectral import spectral_embeddings

STARTS = ("spectral", "random")
PART = 20480  # most rows of a batch at a time
CONTRASTED = 2048  # rows that the consistency losses are over, at least
SPREAD = 3.0  # of spectral embeddings, in standard deviations of random ones


@dataclass(frozen=True)
class SLIFMRSettings(FusedSettings):
    """The settings of SLIFMR."""

    structure_weight: Weight
    refresh_first_epoch: Whole
    refresh_interval: int | str
    refresh_k: Count
    eta_interaction: Share
    eta_feature: Share
    eta_kg: Share
    train_batch_size: int | str
    n_candidates: Count
    inter_weight: Weight
    inter_loss: Annotated[str, INTER_LOSSES]
    inter_temperature: Positive
    intra_weight: Weight
    intra_loss: Annotated[str, INTRA_LOSSES]
    intra_temperature: Positive
    intra_views: list
    n_negatives: Count
    contrast_share: Share
    reg_weight: Weight
    embedding_start: Annotated[str, STARTS] = "spectral"


def contrast_rows(n_rows: int, share: float) -> int:
    """Return how many rows of a batch the consistency losses are over."""
    return min(n_rows, max(CONTRASTED, round(share * n_rows)))


class _Nodes(NamedTuple):
    """The nodes that a batch computes: those of its rows, or all there are where the batch has as many rows.

    Attributes:
        ids: of the nodes.
        rows: the place of each row of the batch among them; None where they are the rows.
    """

    ids: Tensor
    rows: Tensor | None

    @classmethod
    def of(cls, rows: Tensor, n_nodes: int) -> _Nodes:
        """Return the nodes for the rows ``[B]`` of a batch."""
        return cls(rows, None) if len(rows) < n_nodes else cls(torch.arange(n_nodes, device=rows.device), rows)

    def pick(self, values: Tensor, some: slice = slice(None)) -> Tensor:
        """Return the values of the nodes ``[n, ...]`` for the rows of the batch, or some of them."""
        return values[some] if self.rows is None else values.index_select(0, self.rows[some])


class SLIFMR(FusedRecommender):
    """Fuse interactions, a knowledge graph and item features; refresh the graphs from what was learned.

    Runs with any subset of its inputs: no knowledge graph, no modality, items missing from either.

    Args:
        config: RecBole's configuration; the settings are listed in ``properties/model/SLIFMR.yaml``.
        dataset: a :class:`~recbole_slifmr.data.dataset.SLIFMRDataset`, the training split.

    Raises:
        SettingError: for a setting outside its range.
    """

    settings_class = SLIFMRSettings
    settings: SLIFMRSettings
    intra_views: Tensor
    other_parameter_name = ("feedback_index",)
    loss_names = Losses._fields

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        self.register_buffer("intra_views", self._choose_views(self.settings.intra_views), persistent=False)
        self.feedback_index = torch.zeros(2, 0, dtype=torch.long)
        self.structure = empty_edges(self.device)
        self.reg_weight = self.settings.reg_weight / interactions_per_user(dataset)
        self.structure_weight = self.settings.structure_weight * sparsity(self.settings.dense_at, dataset)
        if self.structure_weight:
            edges = self.interaction_encoder.edge_index
            index = cooccurrence_graph(edges, self.n_users, self.n_items, self.settings.knn_k)
            self.structure = unweighted(index, self.n_items)
        self._set_item_block(empty_edges(self.device))
        if self.settings.embedding_start == "spectral":
            self._add_spectral_embeddings()

    @torch.no_grad()
    def _add_spectral_embeddings(self) -> None:
        """Add the singular vectors of the interactions to the random embeddings of users and items."""
        tables = self.user_embedding.weight, self.item_embedding.weight
        spread = SPREAD * math.prod(2 / sum(table.shape) for table in tables) ** 0.25  # of Xavier's distribution
        edges = self.interaction_encoder.edge_index
        for table, start in zip(
            tables, spectral_embeddings(edges, self.n_users, self.n_items, self.embedding_size), strict=True
        ):
            table[:, : start.shape[1]] += spread * start.to(table)

    @classmethod
    def check(cls, config: Any, dataset: Any) -> None:
        """Refuse a name in ``intra_views`` that is no view, beside what every fused model refuses."""
        super().check(config, dataset)
        known = ("interaction", "modality", "kg", KG_TAGS, *dataset.item_features)
        for name in cls.settings_class.read(config).intra_views:
            if name not in known:
                raise SettingError(f"intra_views: '{name}' is none of {', '.join(known)}")

    def _choose_views(self, names: Sequence[str]) -> Tensor:
        """Return the positions of the views that ``intra_views`` names."""
        modalities = set(self.feature_encoders) - {KG_TAGS}
        chosen = set(names) | (modalities if "modality" in names else set()) | ({KG_TAGS} if "kg" in names else set())
        return torch.tensor([v for v, name in enumerate(self.view_names) if name in chosen], dtype=torch.long)

    @classmethod
    def memory_parts(cls, settings: Any, dataset: Any, batch_size: int) -> dict[str, int]:
        """Return the bytes of what is fused, of the correlation graph, the contrasts of a step and a refresh."""
        batch_size = min(batch_size, PART)
        parts = super().memory_parts(settings, dataset, batch_size)
        n_views, n_items = 3 + len(dataset.item_features), dataset.item_num
        parts["item graphs"] += 2 * settings.refresh_k * n_items * (20 + 8 * n_views)
        parts["item graphs"] += (
            40 * settings.knn_k * n_items * (settings.structure_weight * sparsity(settings.dense_at, dataset) > 0)
        )
        if settings.inter_weight or settings.intra_weight:
            n_rows = contrast_rows(batch_size, settings.contrast_share)
            parts["training step"] += 4 * n_rows * (2 * n_views + 1) * settings.n_negatives
        parts["training step"] += 4 * batch_size * (30 * n_views + 2 * settings.n_candidates) * settings.embedding_size
        parts["refresh"] = 12 * 1024 * n_items
        return parts

    @classmethod
    def scores_cold(cls, config: Any) -> ColdScoring:
        """Say whether there may be anything but interactions."""
        if config["use_features"] or config["use_kg"]:
            return ColdScoring(True, "SLIFMR scores cold items by features and knowledge graph")
        return ColdScoring(False, "SLIFMR without features and knowledge graph knows items by their interactions only")

    # -- training -------------------------------------------------------------------------------------------------

    @full_precision
    def calculate_loss(self, interaction: Any) -> Losses:
        """Return the terms of the loss for a batch of (user, positive item, negative item).

        The graphs are propagated over once. A large batch is then gone through in parts, each with negatives of its
        own, see ``nn/parts.py``: memory does not grow with the batch.
        """
        self.clear_cache()
        ids = self.batch_ids(interaction)
        n_rows = len(ids[0])
        if n_rows <= PART:
            return self._losses(self.propagate(by_rows=True), *ids)
        propagated = self.propagate()
        parts = list(zip(*(rows.chunk(-(-n_rows // PART)) for rows in ids), strict=True))
        whole, views = propagated.views, [tensor for pair in propagated.views if pair is not None for tensor in pair]

        def terms(inputs: list[Tensor], part: tuple[Tensor, ...]) -> Tensor:
            pairs = iter(zip(inputs[::2], inputs[1::2], strict=True))
            stand_ins = [None if pair is None else next(pairs) for pair in whole]
            losses = self._losses(propagated._replace(views=stand_ins), *part)
            return torch.stack(losses) * (len(part[0]) / n_rows)

        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return Losses(*sum_over_parts(terms, parts, views, parameters))

    def _losses(self, propagated: Propagated, user: Tensor, pos: Tensor, neg: Tensor) -> Losses:
        users, items = _Nodes.of(user, self.n_users), _Nodes.of(torch.cat([pos, neg]), self.n_items)
        views = self.views_of(propagated, users.ids, items.ids)
        z_user = users.pick(self.fuse(self.user_fusion, views.users, views.user_mask))
        z_pos, z_neg = items.pick(self.fuse(self.item_fusion, views.items, views.item_mask)).split([len(pos), len(neg)])

        trust = self.interaction_encoder.weights(user, pos)
        ranking = softmax_loss(*self._sampled_scores(user, pos, neg, z_user, z_pos, z_neg), trust)
        inter = intra = torch.zeros_like(ranking)
        settings = self.settings
        n_rows = contrast_rows(len(pos), settings.contrast_share)
        first, others = slice(n_rows), slice(len(pos), len(pos) + settings.n_negatives)
        if settings.inter_weight:
            inter = inter_modal_loss(
                items.pick(views.items, first),
                items.pick(views.item_mask, first),
                z_pos[first],
                pos[first],
                settings.inter_loss,
                settings.inter_temperature,
                settings.n_negatives,
            )
        if settings.intra_weight and len(self.intra_views):
            of_users = self._contrasted(views.users, views.user_mask)
            of_items = self._contrasted(views.items, views.item_mask)
            intra = intra_modal_loss(
                users.pick(of_users[0], first),
                items.pick(of_items[0], first),
                users.pick(of_users[1], first) & items.pick(of_items[1], first),
                pos[first],
                (items.pick(of_items[0], others), items.pick(of_items[1], others), neg[: settings.n_negatives]),
                settings.intra_loss,
                settings.intra_temperature,
                settings.n_negatives,
            )
        inter, intra = settings.inter_weight * inter, settings.intra_weight * intra
        return Losses(ranking, inter, intra, self.reg_weight * self.ego_norm(user, pos, neg))

    def _contrasted(self, views: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return the views ``[B, V, d]`` that the intra-modal loss is on, and their mask ``[B, V]``."""
        if len(self.intra_views) == views.shape[1]:
            return views, mask
        return views.index_select(1, self.intra_views), mask.index_select(1, self.intra_views)

    def _sampled_scores(
        self, user: Tensor, pos: Tensor, neg: Tensor, z_user: Tensor, z_pos: Tensor, z_neg: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return what each row scores its positive item ``[B]`` and K sampled ones ``[B, K]``, and which it knows.

        The K are ``n_candidates``: the row's own negative and those of the rows after it, which were drawn just as
        uniformly.
        """
        rows = torch.arange(len(neg), device=neg.device)
        candidates = (rows[:, None] + rows[: self.settings.n_candidates]) % len(rows)
        sampled = neg[candidates]
        known = self.interaction_encoder.contains(user[:, None].expand_as(sampled), sampled)
        compared = z_neg.index_select(0, candidates.flatten()).view(*candidates.shape, -1)  # gradients in a fixed order
        pos_score, neg_scores = (z_user * z_pos).sum(1), (z_user.unsqueeze(1) * compared).sum(2)
        if self.linear is not None:
            first = torch.arange(1 + candidates.shape[1], device=neg.device) == 0
            linear = self.linear.leave_one_out(user, torch.cat([pos[:, None], sampled], dim=1), first)
            pos_score, neg_scores = pos_score + linear[:, 0], neg_scores + linear[:, 1:]
        return pos_score, neg_scores, known

    # -- graphs ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def refresh_graphs(self) -> RefreshStats:
        """Link each item with its nearest neighbours among the fused items, in all three graphs.

        Blended with the *initial* graphs each time. Parameters, gradients and random states are left alone.
        """
        items = self._final_embeddings()[1]
        index, stats = correlation_graph(items, self.settings.refresh_k, self.settings.knn_search, self.feedback_index)
        self._set_feedback(index)
        return stats

    def _set_feedback(self, edge_index: Tensor) -> None:
        self.feedback_index = edge_index.to(self.item_embedding.weight.device)
        feedback = unweighted(self.feedback_index, self.n_items)
        for encoder in self.feature_encoders.values():
            encoder.set_feedback(feedback, self.settings.eta_feature)
        if self.kg_encoder is not None:
            self.kg_encoder.set_feedback(feedback, self.settings.eta_kg)
        self._set_item_block(feedback)
        self.clear_cache()

    def _set_item_block(self, feedback: Edges) -> None:
        """Put the correlation graph, that of shared users and the mean of the feature graphs between the items."""
        parts = [(self.settings.eta_interaction, feedback), (self.structure_weight, self.structure)]
        share = self.settings.item_graph_weight / max(len(self.feature_encoders), 1)
        parts += [(share, encoder.edges()) for encoder in self.feature_encoders.values()]
        parts = [(weight, edges) for weight, edges in parts if weight]
        if not parts:
            return
        index = torch.cat([edges.edge_index for _, edges in parts], dim=1)
        weight = torch.cat([weight * edges.edge_weight for weight, edges in parts])
        self.interaction_encoder.set_item_block(sum_edges(index, weight, self.n_items))

    def prune_interactions(self, seed: int) -> None:
        """Draw anew which interactions are left out of training propagation."""
        self.interaction_encoder.prune(self.settings.prune_ratio, seed)

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
            "smoothing": smoothing(self._final[1][1:]),
        }
