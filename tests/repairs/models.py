"""Repairs of RecBole's models."""

from __future__ import annotations

import importlib
import math
import sys
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from recbole_slifmr.host import compat
from repairs.tiny import GRAPH_MODELS, apply_only, check, load_checkpoint, scores, start


@check
def check_bipartite_adjacency() -> None:
    """Seven models cannot be built without the repair, and get the matrix of RecBole's formula with it."""
    import recbole.model.general_recommender as general
    import recbole.model.knowledge_aware_recommender as knowledge

    names = {"SpectralCF": "get_laplacian_matrix", "KGIN": "get_norm_inter_matrix"}
    names["MCCLK"] = names["KGIN"]
    methods = {model: names.get(model, "get_norm_adj_mat") for model in GRAPH_MODELS}
    kinds = {model: getattr(general, model, None) or getattr(knowledge, model) for model in GRAPH_MODELS}
    before = {model: getattr(kinds[model], method) for model, method in methods.items()}

    update = getattr(sp.dok_matrix, "_update", lambda self, entries: self._dict.update(entries))
    for kind in sp.dok_matrix.__mro__:
        if "_update" in vars(kind):  # before scipy 1.13
            del kind._update
    compat.apply(skip={"bipartite_adjacency"})
    for model in GRAPH_MODELS:
        with pytest.raises(AttributeError, match="_update"):
            start(model)
    assert apply_only("bipartite_adjacency") == ["bipartite_adjacency"]

    # 3 users, 3 items; the first pair occurs twice; the last user and the last item are isolated
    inter = sp.coo_matrix((np.ones(4, np.float32), ([0, 0, 0, 1], [0, 0, 1, 1])), shape=(3, 3))
    graph = np.zeros((6, 6))
    graph[[0, 0, 1], [3, 4, 4]] = 1
    graph += graph.T
    degree = graph.sum(1)
    root = np.where(degree > 0, np.maximum(degree, 1) ** -0.5, 0)
    symmetric, row_wise = root[:, None] * graph * root, root[:, None] ** 2 * graph

    sp.dok_matrix._update = update  # so that RecBole's own code runs, to compare with
    for model, method in methods.items():
        part = types.SimpleNamespace(n_users=3, n_items=3, n_entities=3, device=torch.device("cpu"))
        part.inter_matrix = part.interaction_matrix = inter
        part.get_eye_mat = lambda size: torch.eye(size).to_sparse()
        for mode in ["si", "bi"] if model in ("KGIN", "MCCLK") else [None]:
            args = [] if mode is None else [mode]
            new, old = getattr(kinds[model], method)(part, *args), before[model](part, *args)
            new, old = (list(pair) if isinstance(pair, tuple) else [pair] for pair in (new, old))
            expected = [np.eye(6) - row_wise] if model == "SpectralCF" else [symmetric]
            if mode:
                whole = symmetric if mode == "bi" else row_wise
                expected = [whole[:3, 3:], whole]
            for ours, theirs, dense in zip(new, old, expected, strict=True):
                ours, theirs = ours.to_dense(), theirs.to_dense()
                torch.testing.assert_close(ours, torch.tensor(dense).float(), msg=f"{model} {mode}")
                torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


@check
def check_kgat_graph() -> None:
    """KGAT cannot be built without DGL, and gets RecBole's two graphs with the repair."""
    from recbole.model.knowledge_aware_recommender import KGAT

    sys.modules["dgl"] = None  # type: ignore[assignment]
    compat.apply(skip={"kgat_graph"})
    with pytest.raises(ImportError, match="dgl"):
        start("KGAT")
    assert apply_only("kgat_graph") == ["kgat_graph"]

    # relation 1: 0->1, 0->2, and 3->0 twice; relation 2: 0->1
    part = types.SimpleNamespace(n_relations=3, matrix_size=torch.Size([4, 4]))
    part.all_hs, part.all_ts, part.all_rs = torch.tensor([[0, 0, 3, 3, 0], [1, 2, 0, 0, 1], [1, 1, 1, 1, 2]])
    expected = [[0, 1.5, 0.5, 0], [0, 0, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]]
    torch.testing.assert_close(KGAT.init_graph(part).to_dense(), torch.tensor(expected))

    model = start("KGAT")[0].model
    heads, tails, relations = model.all_hs.numpy(), model.all_ts.numpy(), model.all_rs.numpy()
    total = np.zeros(tuple(model.matrix_size))
    for relation in range(1, model.n_relations):
        edges = relations == relation
        counts = np.zeros_like(total)
        np.add.at(counts, (heads[edges], tails[edges]), 1)
        total += counts / np.maximum(counts.sum(1, keepdims=True), 1)
    torch.testing.assert_close(model.A_in.to_dense(), torch.tensor(total).float(), rtol=0, atol=1e-7)

    with torch.no_grad():
        model.update_attentive_A()
        attention = torch.zeros(model.matrix_size)
        for head in np.unique(heads):
            edges = [(tails[e], relations[e]) for e in np.flatnonzero(heads == head)]
            score: dict[int, float] = {}
            for tail, relation in edges:
                value = model.generate_transE_score(torch.tensor([head]), torch.tensor([tail]), relation)
                score[tail] = score.get(tail, 0) + value.item()
            weights = {tail: math.exp(value) for tail, value in score.items()}
            for tail, weight in weights.items():
                attention[head, tail] = weight / sum(weights.values())
    torch.testing.assert_close(model.A_in.to_dense(), attention, rtol=1e-4, atol=1e-6)


@check
def check_scatter_functions() -> None:
    """KGIN and MCCLK need torch_scatter without the repair; with it, they alone see the replacements."""
    sys.modules["torch_scatter"] = None  # type: ignore[assignment]
    compat.apply(skip={"scatter_functions"})
    trainers = [start(model)[0] for model in ("KGIN", "MCCLK")]
    for trainer in trainers:
        with pytest.raises(ImportError, match="torch_scatter"):
            scores(trainer)
    assert apply_only("scatter_functions") == ["scatter_functions"]
    for trainer in trainers:
        assert scores(trainer).isfinite().all()
    with pytest.raises(ImportError):
        importlib.import_module("torch_scatter")

    torch.manual_seed(0)
    src = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([4, 0, 4, 2, 0, 4, 2])  # nothing at 1, 3 and 5
    mean, soft = compat.models._scatter_mean(src=src, index=index, dim_size=6, dim=0), torch.zeros(7, 3).double()
    for group in range(6):
        rows = src[index == group]
        torch.testing.assert_close(mean[group], rows.mean(0) if len(rows) else torch.zeros(3).double())
        soft[index == group] = rows.softmax(0)
    torch.testing.assert_close(compat.models._scatter_softmax(src, index=index, dim=0), soft)
    large = compat.models._scatter_softmax(src * 1e4, index=index, dim=0)
    assert large.isfinite().all()
    assert torch.autograd.gradcheck(lambda x: compat.models._scatter_mean(x, index, 0, 6), src)
    assert torch.autograd.gradcheck(lambda x: compat.models._scatter_softmax(x, index, 0), src)


@check
def check_ncl_clustering() -> None:
    """NCL needs faiss without the repair; with it, the clusters are right and the same every time."""
    sys.modules["faiss"] = None  # type: ignore[assignment]
    compat.apply(skip={"ncl_clustering"})
    model = start("NCL", num_clusters=2)[0].model
    generator = np.random.default_rng(0)
    near = generator.normal(0, 0.1, (40, 8)).astype(np.float32)
    points = near + np.where(np.arange(40) % 2, 5, -5)[:, None].astype(np.float32)
    with pytest.raises(ImportError, match="faiss"):
        model.run_kmeans(points)
    assert apply_only("ncl_clustering") == ["ncl_clustering"]

    centroids, cluster = model.run_kmeans(points)
    odd = int(cluster[1])
    assert (cluster == torch.tensor([1 - odd, odd] * 20)).all()
    expected = torch.nn.functional.normalize(torch.from_numpy(points[1::2].mean(0)), dim=0)
    torch.testing.assert_close(centroids[odd], expected)
    model.k = 7
    first, second = model.run_kmeans(near), model.run_kmeans(near)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    model.k = 100
    assert sorted(model.run_kmeans(points)[1].tolist()) == list(range(40))


@check
def check_stale_embeddings() -> None:
    """After the best epoch is loaded, its scores come back, not those of the last epoch."""

    def saved_and_loaded(model: str, pairs: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        trainer, (train, valid, _) = start(model)
        trainer.fit(train, valid, verbose=False)
        best = scores(trainer, pairs)
        trainer._train_epoch(train, 1)
        last = scores(trainer, pairs)
        load_checkpoint(trainer)
        return best, last, scores(trainer, pairs)

    cases = (("KGIN", False), ("MCCLK", False), ("KGAT", True))
    compat.apply(skip={"stale_embeddings"})
    for model, pairs in cases:
        best, last, loaded = saved_and_loaded(model, pairs)
        assert not torch.allclose(best, loaded), model
        assert torch.equal(last, loaded) or model == "KGAT"
    assert apply_only("stale_embeddings") == ["stale_embeddings"]
    for model, pairs in cases:
        best, last, loaded = saved_and_loaded(model, pairs)
        torch.testing.assert_close(loaded, best, rtol=0, atol=0, msg=model)
        assert not torch.allclose(best, last), model

    trainer, _ = start("KGIN")  # a file of an unrepaired RecBole holds no cache: nothing old may be used
    scores(trainer)
    trainer.model.load_state_dict(trainer.model.state_dict())
    assert trainer.model.restore_user_e is None


@check
def check_dynamic_negatives() -> None:
    """The candidate of the highest score is taken, also where the scores are on another device, without gradients.

    A model that does more in `train` than to set its mode, as SGL does, is not disturbed.
    """

    class Elsewhere:
        """Scores on a device whose tensors may not index those on the CPU."""

        def __init__(self, values: torch.Tensor) -> None:
            self.values = values

        def cpu(self) -> torch.Tensor:
            return self.values

    class HighestItem(torch.nn.Module):
        """The higher the item, the harder it is."""

        device = torch.device("cpu")

        def __init__(self) -> None:
            super().__init__()
            self.modes: list[bool] = []
            self.recording: list[bool] = []
            self.asked: list[bool] = []
            self.place: Callable[[torch.Tensor], Any] = torch.Tensor.float

        def predict(self, pairs: Any) -> Any:
            self.recording.append(torch.is_grad_enabled())
            self.asked.append(self.training)
            self.drawn = pairs["item_id"].reshape(4, -1)
            return self.place(pairs["item_id"])

        def train(self, mode: bool = True) -> HighestItem:
            self.modes.append(mode)
            return super().train(mode)

    compat.apply(skip={"dynamic_negatives"})
    draws = {"distribution": "uniform", "sample_num": 1, "alpha": 1.0, "dynamic": True, "candidate_num": 4}
    trainer, (train, _, _) = start("BPR", train_neg_sample_args=draws)
    batch = train._dataset.inter_feat[:20]
    model = HighestItem()
    train.get_model(model)
    chosen = train._neg_sampling(batch)["neg_item_id"]
    assert chosen.equal(model.drawn.max(0).values)
    assert model.recording == [True]
    assert model.modes == [False, True]
    model.place = Elsewhere
    with pytest.raises(AttributeError, match="reshape"):
        train._neg_sampling(batch)
    model.modes.clear()
    assert apply_only("dynamic_negatives") == ["dynamic_negatives"]
    chosen = train._neg_sampling(batch)["neg_item_id"]
    assert chosen.equal(model.drawn.max(0).values)
    assert model.recording == [True, True, False]
    assert model.asked == [False, False, False]
    assert model.modes == []
    assert model.training
    assert train.model is model
    train.get_model(trainer.model)
    assert all((batch["neg_item_id"] > 0).all() for batch in train)
    train.neg_sample_args["dynamic"] = False
    assert len(train._neg_sampling(batch)["neg_item_id"]) == len(batch)


@check
def check_dynamic_negatives_of_sgl() -> None:
    """SGL draws its views once per epoch, also with dynamic negatives."""
    from recbole.model.general_recommender import SGL

    draws = {"distribution": "uniform", "sample_num": 1, "alpha": 1.0, "dynamic": True, "candidate_num": 4}
    compat.apply()
    drawn = []
    construct = SGL.graph_construction
    SGL.graph_construction = lambda self: (drawn.append(self), construct(self))[1]
    trainer, (train, _, _) = start("SGL", train_neg_sample_args=draws, epochs=3)
    trainer.fit(train, saved=False)
    assert len(train) > 1
    assert len(drawn) == 3


@check
def check_ncl_dynamic_negatives() -> None:
    """NCL trains with dynamic negatives, which it chooses by its own scores."""
    compat.apply(skip={"ncl_dynamic_negatives"})
    draws = {"distribution": "uniform", "sample_num": 1, "alpha": 1.0, "dynamic": True, "candidate_num": 4}
    settings = {"num_clusters": 2, "train_neg_sample_args": draws}
    trainer, (train, _, _) = start("NCL", **settings)
    with pytest.raises(AttributeError, match="NoneType"):
        trainer.fit(train)
    assert apply_only("ncl_dynamic_negatives") == ["ncl_dynamic_negatives"]
    trainer.fit(train)
    assert train.model is trainer.model
    trainer, (train, _, _) = start("NCL", num_clusters=2)
    trainer.fit(train)
    assert train.model is None


@check
def check_anomaly_detection() -> None:
    assert torch.is_anomaly_enabled(), "importing RecBole's models turns it on"
    assert apply_only("anomaly_detection") == ["anomaly_detection"]
    assert not torch.is_anomaly_enabled()
    assert apply_only("anomaly_detection") == []
