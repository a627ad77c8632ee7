"""Repairs of RecBole's models and of the training that belongs to one: graphs, clusters, caches, negatives."""

from __future__ import annotations

import functools
import inspect
import sys
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
import torch.nn.functional as F
from recbole.data.dataloader.abstract_dataloader import NegSampleDataLoader
from recbole.model import general_recommender as general
from recbole.model import knowledge_aware_recommender as knowledge_aware
from recbole.model import sequential_recommender as sequential
from recbole.model.abstract_recommender import AbstractRecommender
from recbole.trainer import NCLTrainer

from recbole_slifmr.host.compat.registry import importable, refers_to, repair, with_module


@repair
def bipartite_adjacency() -> bool:
    """Build the graphs of LightGCN, NGCF, NCL, GCMC, SpectralCF, KGIN and MCCLK without a `dok_matrix`.

    They fill their adjacency matrix by `dok_matrix._update`, which scipy 1.13 removed (#2034). The formulas
    stay RecBole's: an entry is 1 however often the pair occurs, and degrees count distinct neighbours. Not
    needed once these methods stop calling `_update`.
    """
    methods = {
        _get_norm_adj_mat: (general.LightGCN, general.NGCF, general.NCL, general.GCMC),
        _get_laplacian_matrix: (general.SpectralCF,),
        _get_norm_inter_matrix: (knowledge_aware.KGIN, knowledge_aware.MCCLK),
    }
    done = False
    for method, models in methods.items():
        name = method.__name__[1:]
        for model in models:
            if refers_to(getattr(model, name), "_update") and not hasattr(sp.dok_matrix, "_update"):
                setattr(model, name, method)
                done = True
    return done


def _bipartite_edges(inter: sp.coo_matrix, n_users: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows and columns of [[0, R], [R^T, 0]], each pair of R once."""
    n_items = inter.shape[1]
    pairs = np.unique(inter.row.astype(np.int64) * n_items + inter.col)
    users, items = pairs // n_items, pairs % n_items + n_users
    return np.concatenate([users, items]), np.concatenate([items, users])


def _sparse(row: np.ndarray, col: np.ndarray, values: np.ndarray, shape: tuple[int, int]) -> torch.Tensor:
    indices, weights = torch.from_numpy(np.stack([row, col])), torch.from_numpy(values).float()
    return torch.sparse_coo_tensor(indices, weights, shape, check_invariants=True).coalesce()


def _get_norm_adj_mat(self: Any) -> torch.Tensor:
    """Return D^-1/2 A D^-1/2 over users and items."""
    n_nodes = self.n_users + self.n_items
    row, col = _bipartite_edges(self.interaction_matrix, self.n_users)
    scale = np.power(np.bincount(row, minlength=n_nodes) + 1e-7, -0.5)
    return _sparse(row, col, scale[row] * scale[col], (n_nodes, n_nodes))


def _get_laplacian_matrix(self: Any) -> torch.Tensor:
    """Return I - D^-1 A over users and items."""
    n_nodes = self.n_users + self.n_items
    row, col = _bipartite_edges(self.interaction_matrix, self.n_users)
    scale = 1 / (np.bincount(row, minlength=n_nodes) + 1e-7)
    return self.get_eye_mat(n_nodes) - _sparse(row, col, scale[row], (n_nodes, n_nodes))


def _get_norm_inter_matrix(self: Any, mode: str = "bi") -> tuple[torch.Tensor, torch.Tensor]:
    """Return the user-entity block of the graph over users and entities, and the graph.

    It is D^-1/2 A D^-1/2 in mode `bi` and D^-1 A in mode `si`.
    """
    if mode not in ("bi", "si"):
        raise NotImplementedError(f"Normalize mode [{mode}] has not been implemented.")
    n_nodes = self.n_users + self.n_entities
    row, col = _bipartite_edges(self.inter_matrix, self.n_users)
    degree = np.bincount(row, minlength=n_nodes)  # 0 for a node without edges, which no edge reads
    values = 1 / degree[row] if mode == "si" else 1 / np.sqrt(degree[row] * degree[col])
    users = row < self.n_users
    block = _sparse(row[users], col[users] - self.n_users, values[users], (self.n_users, self.n_entities))
    return block.to(self.device), _sparse(row, col, values, (n_nodes, n_nodes)).to(self.device)


@repair
def kgat_graph() -> bool:
    """Build the first attention graph of KGAT (`kgat.py`) without DGL.

    KGAT calls `edge_subgraph(preserve_nodes=...)` and `adjacency_matrix(scipy_fmt=...)`, which DGL dropped
    (#1758, #2201); no DGL that has them is built for current torch. `update_attentive_A` is plain torch and
    stays RecBole's. Not needed with such an old DGL, or once `init_graph` stops importing it.
    """
    kgat, init = knowledge_aware.KGAT, knowledge_aware.KGAT.__init__
    if not refers_to(kgat.init_graph, "dgl"):
        return False
    if importable("dgl"):
        subgraph = inspect.signature(sys.modules["dgl"].edge_subgraph)
        if "preserve_nodes" in subgraph.parameters:
            return False

    @functools.wraps(init)
    def __init__(self: Any, config: Any, dataset: Any) -> None:
        init(self, config, _WithoutDGL(dataset))

    kgat.__init__, kgat.init_graph = __init__, _init_graph
    return True


class _WithoutDGL:
    """A dataset that answers a request for a DGL graph with a scipy matrix."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __getattr__(self, name: str) -> Any:
        return getattr(self._dataset, name)

    def ckg_graph(self, form: str = "coo", value_field: str | None = None) -> Any:
        return self._dataset.ckg_graph("coo" if form == "dgl" else form, value_field)


def _init_graph(self: Any) -> torch.Tensor:
    """Return the sum over relations of D_r^-1 A_r; rows are heads, a repeated triple counts repeatedly."""
    known = self.all_rs > 0  # 0 is padding
    heads, tails, relations = self.all_hs[known], self.all_ts[known], self.all_rs[known]
    keys = heads * self.n_relations + relations
    _, group, count = torch.unique(keys, return_inverse=True, return_counts=True)
    indices, values = torch.stack([heads, tails]), (1 / count.double())[group]
    graph = torch.sparse_coo_tensor(indices, values, self.matrix_size, check_invariants=True)
    return graph.coalesce().float()


@repair
def scatter_functions() -> bool:
    """Give KGIN and MCCLK (`kgin.py`, `mcclk.py`) the two functions they import from torch_scatter.

    torch_scatter has to be built for each torch and CUDA and is rarely there (#1638). Only the two methods
    see the replacements: other code that asks for torch_scatter still finds it missing. Not needed where
    torch_scatter imports, or once `Aggregator.forward` stops importing it.
    """
    stand_in = types.SimpleNamespace(scatter_mean=_scatter_mean, scatter_softmax=_scatter_softmax)
    done = False
    for module in (knowledge_aware.kgin, knowledge_aware.mcclk):
        forward = module.Aggregator.forward
        repaired = forward.__globals__ is not vars(module)
        if refers_to(forward, "torch_scatter") and not repaired and not importable("torch_scatter"):
            module.Aggregator.forward = with_module(forward, "torch_scatter", stand_in)
            done = True
    return done


def _scatter_mean(src: torch.Tensor, index: torch.Tensor, dim: int, dim_size: int) -> torch.Tensor:
    """Return the mean of the rows of `src`, `[n, d]`, that share an index; 0 for an index without rows."""
    count = torch.bincount(index, minlength=dim_size).clamp(min=1).unsqueeze(1)
    return src.new_zeros(dim_size, src.shape[1]).index_add(dim, index, src) / count


def _scatter_softmax(src: torch.Tensor, index: torch.Tensor, dim: int) -> torch.Tensor:
    """Return the softmax, in each column, over the rows of `src`, `[n, d]`, that share an index."""
    start = src.new_zeros(int(index.max()) + 1, src.shape[1])
    groups = index.unsqueeze(1).expand_as(src)
    top = start.scatter_reduce(dim, groups, src.detach(), "amax", include_self=False)
    weight = (src - top[index]).exp()
    return weight / start.index_add(dim, index, weight)[index]


@repair
def ncl_clustering() -> bool:
    """Cluster the embeddings of NCL (`ncl.py`) with scikit-learn in place of faiss.

    NCL asks faiss for a GPU, and faiss refuses more clusters than points, as in ml-100k with the default of
    1000 (#1957); here each point is then a cluster. As in faiss, a fixed seed draws the first centroids from
    the points and 25 rounds follow. Not needed once `run_kmeans` does not import faiss.
    """
    if not refers_to(general.NCL.run_kmeans, "faiss"):
        return False
    general.NCL.run_kmeans = _run_kmeans
    return True


def _run_kmeans(self: Any, x: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the centroids, scaled to length 1, and the cluster of each row of `x`."""
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    kmeans = KMeans(min(self.k, len(x)), init="random", n_init=1, max_iter=25, random_state=1234)
    with threadpool_limits(1):  # several threads add up in an order that varies
        kmeans.fit(x)
    centroids = F.normalize(torch.from_numpy(kmeans.cluster_centers_).float(), dim=1)
    return centroids.to(self.device), torch.from_numpy(kmeans.labels_).long().to(self.device)


@repair
def stale_embeddings() -> bool:
    """Keep what KGIN, MCCLK and KGAT computed for validation together with the parameters it belongs to.

    KGIN and MCCLK cache all embeddings, but do not name the cache in `other_parameter_name`: the test of the
    best checkpoint silently ranks by the embeddings of the last epoch. They also drop edges at random during
    evaluation, so the cache is saved, as LightGCN does, not only cleared. KGAT does not name its attention
    graph, so `predict` uses that of the last epoch. Not needed once the models name them.
    """
    cache, done = ("restore_user_e", "restore_entity_e"), False
    for model, names in {"KGIN": cache, "MCCLK": cache, "KGAT": ("A_in",)}.items():
        kind = getattr(knowledge_aware, model)
        if "other_parameter" in vars(kind) or f'"{names[0]}"' in inspect.getsource(kind):
            continue
        kind.other_parameter = _saving(names)
        if names is cache:
            kind.load_state_dict = _clearing(kind.load_state_dict, names)
        done = True
    return done


def _saving(names: tuple[str, ...]) -> Callable[[Any], dict[str, Any]]:
    def other_parameter(self: Any) -> dict[str, Any]:
        named = AbstractRecommender.other_parameter(self)
        return {**named, **{name: getattr(self, name, None) for name in names}}

    return other_parameter


def _clearing(load_state_dict: Callable[..., Any], names: tuple[str, ...]) -> Callable[..., Any]:
    @functools.wraps(load_state_dict)
    def load(self: Any, *args: Any, **kwargs: Any) -> Any:
        for name in names:
            setattr(self, name, None)
        return load_state_dict(self, *args, **kwargs)

    return load


@repair
def dynamic_negatives() -> bool:
    """Let dynamic negatives (`abstract_dataloader.py`) be chosen where the model is on a GPU, and without gradients.

    The candidates are on the CPU and are indexed by positions on the model's device, which torch refuses. The
    scores are only compared, but what their gradients would need is recorded for every batch. And SGL's own `train`,
    which begins an epoch by drawing its two views, would be called for every batch. Not needed once `_neg_sampling`
    sees to these.
    """
    if any(refers_to(NegSampleDataLoader._neg_sampling, name) for name in ("cpu", "no_grad")):
        return False
    NegSampleDataLoader._neg_sampling = _scoring_on_cpu(NegSampleDataLoader._neg_sampling)
    return True


def _scoring_on_cpu(neg_sampling: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(neg_sampling)
    def sample(self: Any, inter_feat: Any) -> Any:
        if not self.neg_sample_args.get("dynamic", False):
            return neg_sampling(self, inter_feat)
        model = self.model
        self.model = types.SimpleNamespace(
            device=model.device,
            eval=lambda: torch.nn.Module.train(model, False),
            train=lambda: torch.nn.Module.train(model),
            predict=lambda pairs: model.predict(pairs).cpu(),
        )
        try:
            with torch.no_grad():
                return neg_sampling(self, inter_feat)
        finally:
            self.model = model

    return sample


@repair
def ncl_dynamic_negatives() -> bool:
    """Tell the data loader the model that chooses dynamic negatives in NCL's own `fit` (`trainer.py`), too.

    `Trainer.fit` does, the copy in `NCLTrainer` does not: the first batch ends in an error. Not needed once that copy
    calls `get_model`.
    """
    if refers_to(NCLTrainer.fit, "get_model"):
        return False
    NCLTrainer.fit = _telling_the_model(NCLTrainer.fit)
    return True


def _telling_the_model(fit: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(fit)
    def telling(self: Any, train_data: Any, *args: Any, **kwargs: Any) -> Any:
        if self.config["train_neg_sample_args"].get("dynamic", False):
            train_data.get_model(self.model)
        return fit(self, train_data, *args, **kwargs)

    return telling


@repair
def anomaly_detection() -> bool:
    """Turn off the anomaly detection of autograd, which RecBole leaves on in the whole process.

    Importing SINE (`sine.py`), and so `get_model` for any knowledge-aware model, turns it on: every backward pass is
    searched for NaN, which about doubles the time of a training step. To use it, turn it on after importing this
    package. Not needed once that line is gone.
    """
    module = inspect.getmodule(getattr(sequential, "SINE", None))
    if module is None or "set_detect_anomaly" not in inspect.getsource(module) or not torch.is_anomaly_enabled():
        return False
    torch.autograd.set_detect_anomaly(False)
    return True
