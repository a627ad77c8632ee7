"""Repairs that let RecBole 1.2.1 run on current numpy, scipy and torch.

Each repair is one function. It looks for the fault itself, never for a version number, and returns whether it
changed anything: a RecBole or a library that does not need it is left alone. numpy only gains aliases that it
lacks, torch is left alone; all else stays inside RecBole.
Numbers such as #2034 are issues of RUCAIBox/RecBole.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import copy
import functools
import importlib
import inspect
import logging
import os
import pickle
import secrets
import sys
import types
from collections.abc import Callable, Collection, Iterator
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
import torch.nn.functional as F
from recbole.config import Config
from recbole.data.dataloader import FullSortEvalDataLoader, NegSampleEvalDataLoader
from recbole.data.dataloader.abstract_dataloader import AbstractDataLoader, NegSampleDataLoader
from recbole.data.dataloader.knowledge_dataloader import KnowledgeBasedDataLoader
from recbole.evaluator.collector import Collector, DataStruct
from recbole.model import general_recommender as general
from recbole.model import knowledge_aware_recommender as knowledge_aware
from recbole.model import sequential_recommender as sequential
from recbole.model.abstract_recommender import AbstractRecommender
from recbole.trainer import MKRTrainer, NCLTrainer, PretrainTrainer, Trainer
from recbole.utils import set_color

from recbole_slifmr.errors import StorageError
from recbole_slifmr.host.seal import seal, unseal
from recbole_slifmr.host.stored import read_stored

REPAIRS: dict[str, Callable[[], bool]] = {}
applied: set[str] = set()  # the repairs that were needed so far in this process


def apply(skip: Collection[str] = ()) -> list[str]:
    """Repair what is broken, except the repairs named in `skip`; return the names of those that were needed.

    A second call finds nothing left to do and returns an empty list.
    """
    if unknown := set(skip) - set(REPAIRS):
        raise ValueError(f"no such repair: {', '.join(sorted(unknown))}; there are {', '.join(REPAIRS)}")
    needed = [name for name, repair in REPAIRS.items() if name not in skip and repair()]
    applied.update(needed)
    return needed


def _repair(function: Callable[[], bool]) -> Callable[[], bool]:
    REPAIRS[function.__name__] = function
    return function


def _refers_to(function: Any, name: str) -> bool:
    """Return whether the code of a function uses a name: a global, an attribute or an import."""
    return name in function.__code__.co_names


def _importable(name: str) -> bool:
    """Return whether a module imports; one built for another torch raises more than ImportError."""
    try:
        importlib.import_module(name)
    except Exception:
        return False
    return True


@_repair
def numpy_aliases() -> bool:
    """Add the numpy names that `Config` (`configurator.py`) and the metrics read.

    `Config.compatibility_settings` copies `np.float_`, `np.complex_` and `np.unicode_`, gone from numpy 2: no
    run starts (#2215). It makes `np.float` of the first, which `Interaction` and the metrics read even in a
    process that builds no `Config`. Not needed once RecBole stops naming them.
    """
    settings = getattr(Config, "compatibility_settings", None)
    if settings is None or not _refers_to(settings, "float_"):
        return False
    aliases = {"float_": np.float64, "complex_": np.complex128, "unicode_": np.str_, "float": np.float64}
    missing = [name for name in aliases if name not in vars(np)]
    for name in missing:
        setattr(np, name, aliases[name])
    return bool(missing)


@_repair
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
            if _refers_to(getattr(model, name), "_update") and not hasattr(sp.dok_matrix, "_update"):
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


@_repair
def kgat_graph() -> bool:
    """Build the first attention graph of KGAT (`kgat.py`) without DGL.

    KGAT calls `edge_subgraph(preserve_nodes=...)` and `adjacency_matrix(scipy_fmt=...)`, which DGL dropped
    (#1758, #2201); no DGL that has them is built for current torch. `update_attentive_A` is plain torch and
    stays RecBole's. Not needed with such an old DGL, or once `init_graph` stops importing it.
    """
    kgat, init = knowledge_aware.KGAT, knowledge_aware.KGAT.__init__
    if not _refers_to(kgat.init_graph, "dgl"):
        return False
    if _importable("dgl"):
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


@_repair
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
        if _refers_to(forward, "torch_scatter") and not repaired and not _importable("torch_scatter"):
            module.Aggregator.forward = with_module(forward, "torch_scatter", stand_in)
            done = True
    return done


def with_module(function: Any, name: str, module: Any) -> Callable[..., Any]:
    """Copy a function so that `import name` inside it yields `module`."""

    def find(wanted: str, *args: Any, **kwargs: Any) -> Any:
        return module if wanted == name else builtins.__import__(wanted, *args, **kwargs)

    scope = {**function.__globals__, "__builtins__": {**vars(builtins), "__import__": find}}
    code, defaults, closure = function.__code__, function.__defaults__, function.__closure__
    return functools.wraps(function)(types.FunctionType(code, scope, function.__name__, defaults, closure))


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


@_repair
def ncl_clustering() -> bool:
    """Cluster the embeddings of NCL (`ncl.py`) with scikit-learn in place of faiss.

    NCL asks faiss for a GPU, and faiss refuses more clusters than points, as in ml-100k with the default of
    1000 (#1957); here each point is then a cluster. As in faiss, a fixed seed draws the first centroids from
    the points and 25 rounds follow. Not needed once `run_kmeans` does not import faiss.
    """
    if not _refers_to(general.NCL.run_kmeans, "faiss"):
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


class Module(types.ModuleType):
    """Stands for a module where one of RecBole's names it, with some of its functions replaced."""

    def __init__(self, module: types.ModuleType, **replaced: Any) -> None:
        super().__init__(module.__name__)
        self._module = module
        vars(self).update(replaced)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


# Modules that call `torch.load` (`quick_start` too; if it is loaded later, see `plugin.py`), unpickle or evaluate.
READERS = (
    "recbole.trainer.trainer",
    *(f"recbole.model.general_recommender.{name}" for name in ("convncf", "nais", "neumf", "ract")),
    "recbole.model.context_aware_recommender.kd_dagfm",
    "recbole.model.sequential_recommender.s3rec",
)
PICKLES = (
    ("recbole.data.utils", "pickle"),
    ("recbole.data.dataset.dataset", "pickle"),
    ("recbole.model.general_recommender.ldiffrec", "np"),
)
EVALUATE = (
    "recbole.config.configurator",
    "recbole.trainer.hyper_tuning",
    "recbole.model.context_aware_recommender.kd_dagfm",
)


@_repair
def checkpoint_loading() -> bool:
    """Let RecBole read its checkpoints, and pretrained models, as data.

    `Trainer.evaluate` and `resume_checkpoint` (`trainer.py`) read settings, numpy numbers and matrices with the
    weights, which torch refuses by default since 2.6 (#2215); so do the models that start from another. To list these
    classes for `torch.load` would let any file call them, in the whole process. So these modules get a reader of their
    own (`stored.py`). Not needed once they do not call `torch.load`.
    """
    reading_data = Module(torch, load=read_stored)
    done = any([_replace_in(name, "torch", torch, reading_data) for name in READERS])
    for name in ("recbole.quick_start.quick_start", "recbole.quick_start"):  # if loaded: it imports Ray
        if done and name in sys.modules:
            module = vars(sys.modules[name])
            module["load_data_and_model"] = with_module(module["load_data_and_model"], "torch", reading_data)
    return done


def _replace_in(name: str, attribute: str, module: types.ModuleType, stand_in: Module) -> bool:
    """Replace a module where a module of RecBole names it; return whether it did."""
    user = vars(importlib.import_module(name))
    if user.get(attribute) is not module:
        return False
    user[attribute] = stand_in
    return True


@_repair
def pickled_files() -> bool:
    """Unpickle no file that came from elsewhere: saved data sets and loaders (`data/utils.py`), item vectors.

    `create_dataset` and `load_split_dataloaders` unpickle what lies in the folder of the checkpoints, asked for or not;
    LDiffRec (`ldiffrec.py`) lets numpy unpickle the `item_emb.npy` of a data set. A pickle may run anything. What this
    user saved carries a seal (`seal.py`). Not needed once RecBole reads these without `pickle`.
    """
    modules = {
        "pickle": (pickle, Module(pickle, dump=_dump, load=_load)),
        "np": (np, Module(np, load=lambda file, **kwargs: np.load(file))),
    }
    return any([_replace_in(name, attribute, *modules[attribute]) for name, attribute in PICKLES])


def _dump(content: Any, file: Any) -> None:
    file.write(seal(pickle.dumps(content)))


def _load(file: Any) -> Any:
    return pickle.loads(unseal(file.read(), file.name))


@_repair
def evaluated_strings() -> bool:
    """Read the strings among the settings as values, and evaluate none (`configurator.py`, `kd_dagfm.py`).

    `Config` evaluates those of a dictionary and of the command line as Python, KD_DAGFM the name of its teacher,
    `HyperTuning` the choices in a file; a setting may come from a file that somebody else wrote. Not needed once
    nothing of RecBole calls `eval`.
    """
    missing = [name for name in EVALUATE if "eval" not in vars(importlib.import_module(name))]
    for name in missing:
        vars(sys.modules[name])["eval"] = _teacher if name.endswith("kd_dagfm") else _literal
    return bool(missing)


def _literal(text: str) -> Any:
    """Return the value that a string spells: a number, a truth value, a string, None, or a collection of these."""
    try:
        return ast.literal_eval(text)
    except (ValueError, MemoryError, RecursionError) as error:
        raise SyntaxError(f"no value: {text}") from error  # which `Config` takes for a string


def _teacher(name: str) -> type:
    """Return a network of `kd_dagfm.py` by its name."""
    module = importlib.import_module("recbole.model.context_aware_recommender.kd_dagfm")
    kind = vars(module).get(name)
    if not (inspect.isclass(kind) and issubclass(kind, torch.nn.Module) and kind.__module__ == module.__name__):
        raise ValueError(f"teacher: KD_DAGFM has no network {name!r}")
    return kind


@_repair
def checkpoint_saving() -> bool:
    """Save checkpoints whole or not at all, and in a form that `torch.load` reads without running code.

    `Trainer._save_checkpoint` (`trainer.py`) writes pickle protocol 4, which torch refuses by default since
    2.6 (#2215), and writes in place: a run that is stopped meanwhile loses its best model. What is saved is
    what `Trainer._checkpoint_state(epoch)` returns, which a trainer may extend. Not needed once RecBole moves
    the finished file into place by `os.replace`.
    """
    if Trainer._save_checkpoint is _save_checkpoint or _refers_to(Trainer._save_checkpoint, "replace"):
        return False
    Trainer._checkpoint_state, Trainer._save_checkpoint = _checkpoint_state, _save_checkpoint
    PretrainTrainer.save_pretrained_model = _save_pretrained_model
    return True


def _checkpoint_state(self: Any, epoch: int) -> dict[str, Any]:
    """Return what the checkpoint of an epoch holds; ``data_record`` is what says which data it was trained on."""
    return {
        "config": _as_stored(self.config),
        "epoch": epoch,
        "cur_step": self.cur_step,
        "best_valid_score": self.best_valid_score,
        "state_dict": self.model.state_dict(),
        "other_parameter": self.model.other_parameter(),
        "optimizer": self.optimizer.state_dict(),
        **({"data": self.data_record} if hasattr(self, "data_record") else {}),
    }


def _as_stored(config: Any) -> Any:
    """Return settings with which a single process can go on from what several have saved.

    The class of a model of the user's own is left out: a file that names it could be read by its writer alone.
    """
    stored = copy.copy(config)
    if config["own_model"]:
        del stored.model_class
    if not config["single_spec"]:
        single = {"single_spec": True, "local_rank": 0, "device": torch.device(config["device"].type)}
        stored.final_config_dict = {**config.final_config_dict, **single}
    return stored


@contextlib.contextmanager
def _replacing(path: str) -> Iterator[str]:
    """Give a name to write to, and move what is there to `path` once it is whole."""
    part = f"{path}.{secrets.token_hex(4)}.part"
    try:
        yield part
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.remove(part)
        raise


def _save(state: dict[str, Any], path: str) -> None:
    """Save whole or not at all; raise a `StorageError` where there is no room."""
    try:
        with _replacing(path) as part:
            torch.save(state, part, pickle_protocol=2)
    except (OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "inline_container" not in str(error):  # the writer of torch
            raise
        reason = str(error) if isinstance(error, OSError) else "the disk is full, or the folder cannot be written"
        raise StorageError(f"checkpoint {path} cannot be saved: {reason}") from error


def _save_pretrained_model(self: Any, epoch: int, saved_model_file: Any) -> None:
    """Save the state after an epoch of pretraining, as RecBole does."""
    path = os.fspath(saved_model_file)
    state = {
        "config": _as_stored(self.config),
        "epoch": epoch,
        "state_dict": self.model.state_dict(),
        "optimizer": self.optimizer.state_dict(),
        "other_parameter": self.model.other_parameter(),
    }
    _save(state, path)
    self.saved_model_file = saved_model_file


def _save_checkpoint(self: Any, epoch: int, verbose: bool = True, **kwargs: Any) -> None:
    """Save the state of the training; in a distributed run, the first process of each machine does, and all wait."""
    if self.config["single_spec"] or self.config["local_rank"] == 0:
        path = os.fspath(kwargs.pop("saved_model_file", self.saved_model_file))
        _save(self._checkpoint_state(epoch), path)
        if verbose:
            self.logger.info(set_color("Saving current", "blue") + f": {path}")
    if not self.config["single_spec"]:
        torch.distributed.barrier()


@_repair
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


@_repair
def dynamic_negatives() -> bool:
    """Let dynamic negatives (`abstract_dataloader.py`) be chosen where the model is on a GPU, and without gradients.

    The candidates are on the CPU and are indexed by positions on the model's device, which torch refuses. The
    scores are only compared, but what their gradients would need is recorded for every batch. And SGL's own `train`,
    which begins an epoch by drawing its two views, would be called for every batch. Not needed once `_neg_sampling`
    sees to these.
    """
    if any(_refers_to(NegSampleDataLoader._neg_sampling, name) for name in ("cpu", "no_grad")):
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


@_repair
def ncl_dynamic_negatives() -> bool:
    """Tell the data loader the model that chooses dynamic negatives in NCL's own `fit` (`trainer.py`), too.

    `Trainer.fit` does, the copy in `NCLTrainer` does not: the first batch ends in an error. Not needed once that copy
    calls `get_model`.
    """
    if _refers_to(NCLTrainer.fit, "get_model"):
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


@_repair
def run_names() -> bool:
    """Give each run files of its own, and all processes of a distributed run the same checkpoint.

    Checkpoints (`trainer.py`), logs (`logger.py`) and TensorBoard folders (`utils.py`) bear the second.
    Runs that start together overwrite each other; the processes of one run may each look for another file.
    The token does not come from the seeded generators. Not needed once `get_local_time` differs from call to
    call and `Trainer` shares its name.
    """
    done, init = False, Trainer.__init__
    for name in ("recbole.trainer.trainer", "recbole.utils.logger", "recbole.utils.utils"):
        module: Any = importlib.import_module(name)
        if len({module.get_local_time() for _ in range(3)}) < 3:
            module.get_local_time = _unique(module.get_local_time)
            done = True
    if _refers_to(init, "broadcast_object_list"):
        return done

    @functools.wraps(init)
    def __init__(self: Any, config: Any, model: Any) -> None:
        init(self, config, model)
        if not config["single_spec"]:
            names = [os.path.basename(self.saved_model_file)]
            torch.distributed.broadcast_object_list(names, src=0)
            self.saved_model_file = os.path.join(self.checkpoint_dir, names[0])

    Trainer.__init__ = __init__
    return True


def _unique(get_local_time: Callable[[], str]) -> Callable[[], str]:
    return functools.wraps(get_local_time)(lambda: f"{get_local_time()}-{secrets.token_hex(4)}")


@_repair
def shared_folders() -> bool:
    """Let several processes make the same folder at once (`utils.py`, and where `ensure_dir` is imported).

    `ensure_dir` looks whether a folder is there and then makes it; of two processes of a run that start in an empty
    folder one could end with a FileExistsError. Not needed once it passes `exist_ok`.
    """
    names = ("utils.utils", "utils", "utils.logger", "trainer.trainer", "data.dataset.dataset", "data.utils")
    modules: list[Any] = [importlib.import_module(f"recbole.{name}") for name in names]
    if "exist_ok" in inspect.getsource(modules[0].ensure_dir):
        return False
    for module in modules:
        module.ensure_dir = _make_folder
    return True


def _make_folder(dir_path: str) -> None:
    os.makedirs(dir_path, exist_ok=True)


@_repair
def metric_inputs() -> bool:
    """Let metrics that need counts run (`collector.py`), such as ItemCoverage and AveragePopularity.

    `Collector.get_data_struct` calls `.cpu()` on all it holds, and an int or a Counter has none (#2131,
    #2191). Not needed once it moves tensors only.
    """
    original, probe = Collector.get_data_struct, Collector.__new__(Collector)
    probe.data_struct = DataStruct()
    probe.data_struct.set("data.num_items", 1)
    with contextlib.suppress(AttributeError):
        original(probe)
        return False

    @functools.wraps(original)
    def get_data_struct(self: Any) -> Any:
        held = self.data_struct._data_dict
        others = {key: held.pop(key) for key in list(held) if not isinstance(held[key], torch.Tensor)}
        returned = original(self)
        for struct in (self.data_struct, returned):
            struct._data_dict.update(others)
        return returned

    Collector.get_data_struct = get_data_struct
    return True


@_repair
def knowledge_loader_dataset() -> bool:
    """Give the loader of knowledge-aware models (`knowledge_dataloader.py`) the `dataset` that others have.

    `Collector.data_collect` reads `train_data.dataset` for metrics that need counts, but this loader only has
    `_dataset`: the run crashes (#1743). Not needed once it has both.
    """
    if hasattr(KnowledgeBasedDataLoader, "dataset"):
        return False
    KnowledgeBasedDataLoader.dataset = property(lambda self: self._dataset)
    return True


@_repair
def flops_estimate() -> bool:
    """Keep a failing estimate of a model's cost (`get_flops`, `utils.py`) from ending the run.

    It needs thop, which needs distutils (gone from Python 3.12), and it copies the model to call `predict`,
    which not every model has. A failure is logged and the estimate is nan. `quick_start` imports Ray, so it
    is changed only if it is loaded already. Not needed once `get_flops` catches its failures.
    """
    utils = importlib.import_module("recbole.utils.utils")
    original, quiet = utils.get_flops, logging.Logger("probe", logging.CRITICAL)
    with contextlib.suppress(Exception):
        original(types.SimpleNamespace(type=None), None, None, quiet, None)
        return False

    @functools.wraps(original)
    def get_flops(model: Any, dataset: Any, device: Any, logger: Any, *args: Any, **kwargs: Any) -> float:
        try:
            return original(model, dataset, device, logger, *args, **kwargs)
        except Exception as error:
            logger.warning(f"FLOPs of {type(model).__name__} unknown: {type(error).__name__}: {error}")
            return float("nan")

    for name in ("recbole.utils.utils", "recbole.utils", "recbole.quick_start.quick_start"):
        if getattr(sys.modules.get(name), "get_flops", None) is original:
            vars(sys.modules[name])["get_flops"] = get_flops
    return True


@_repair
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


@_repair
def amp_warnings() -> bool:
    """Use torch's current names for mixed precision in the trainers (`trainer.py`).

    `torch.cuda.amp.GradScaler` and `autocast` are deprecated and warn in each epoch; the new names do the
    same. Not needed once RecBole leaves `torch.cuda.amp`, or where torch has no new names.
    """
    trainer: Any = importlib.import_module("recbole.trainer.trainer")
    if getattr(trainer, "amp", None) is not torch.cuda.amp or not hasattr(torch.amp, "GradScaler"):
        return False
    trainer.amp = types.SimpleNamespace(
        GradScaler=functools.partial(torch.amp.GradScaler, "cuda"),
        autocast=functools.partial(torch.amp.autocast, "cuda"),
    )
    return True


@_repair
def process_group() -> bool:
    """Let the processes of a distributed run work without a GPU each (`configurator.py`).

    `Config._init_device` takes NCCL and one GPU of `gpu_id` per process, whatever there is. Now all processes are on
    the CPU, over Gloo, where there are fewer GPUs than processes; without a `gpu_id` from outside they take the first
    ones. `init_method` may replace the port, which torch opens on every interface. Not needed once RecBole names Gloo.
    """
    original = Config._init_device
    if "nccl" not in original.__code__.co_consts or "gloo" in original.__code__.co_consts:
        return False

    @functools.wraps(original)
    def _init_device(self: Any) -> None:
        if "local_rank" in self.final_config_dict:
            _join_process_group(self)
        else:
            original(self)

    Config._init_device = _init_device
    return True


def _join_process_group(config: Any) -> None:
    settings = config.final_config_dict
    n_processes, local_rank = settings["nproc"], settings["local_rank"]
    given = config.external_config_dict.get("gpu_id", tuple(range(n_processes)))
    listed = given if isinstance(given, (tuple, list)) else str(given).split(",")
    named = [str(gpu) for gpu in listed if str(gpu)]
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(named)
    n_gpus = torch.cuda.device_count()
    if 0 < len(named) < n_processes and n_gpus:
        raise ValueError(f"gpu_id names {len(named)} GPUs for {n_processes} processes")
    on_gpu = n_gpus >= n_processes
    if on_gpu:
        torch.cuda.set_device(local_rank)
    else:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.distributed.init_process_group(
        "nccl" if on_gpu else "gloo",
        rank=local_rank + settings["offset"],
        world_size=settings["world_size"],
        init_method=settings.get("init_method") or f"tcp://{settings['ip']}:{settings['port']}",
    )
    settings["gpu_id"] = os.environ["CUDA_VISIBLE_DEVICES"]
    settings["device"] = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    settings["single_spec"] = False
    if local_rank != 0:
        settings.update(state="error", show_progress=False, verbose=False, log_wandb=False)


@_repair
def parallel_model() -> bool:
    """Wrap the model for training in several processes on the CPU too, and leave its buffers alone (`trainer.py`).

    `AbstractTrainer.__init__` names a GPU, which torch refuses for a model on the CPU, and has
    `DistributedDataParallel` send every buffer, all graphs among them, at every step; all processes have the same.
    Batch normalisation is synchronised between GPUs only. Only the first process writes for TensorBoard. Not needed
    once RecBole tells it to leave the buffers.
    """
    trainer: Any = importlib.import_module("recbole.trainer.trainer")
    init, get_tensorboard = trainer.AbstractTrainer.__init__, trainer.get_tensorboard
    if "local_rank" not in init.__code__.co_consts or "_buffers" in inspect.getsource(init):
        return False
    known = inspect.signature(torch.nn.parallel.DistributedDataParallel).parameters
    sync = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"

    @functools.wraps(init)
    def __init__(self: Any, config: Any, model: Any) -> None:
        if config["single_spec"]:
            init(self, config, model)
            return
        device, self.config = config["device"], config
        if device.type == "cpu" and any("BatchNorm" in type(module).__name__ for module in model.modules()):
            raise NotImplementedError(f"torch synchronises the batch normalisation of {config['model']} on GPUs only")
        self.model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
        devices = None if device.type == "cpu" else [device.index]
        self.distributed_model = trainer.DistributedDataParallel(self.model, device_ids=devices, **{sync: False})

    trainer.AbstractTrainer.__init__ = __init__
    trainer.get_tensorboard = lambda logger: get_tensorboard(logger) if _is_first() else _NoBoard()
    return True


def _is_first() -> bool:
    distributed = torch.distributed
    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0


class _NoBoard:
    """A TensorBoard that takes everything and writes nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None


@contextlib.contextmanager
def without_board() -> Iterator[None]:
    """Have trainers that are built within write nothing for TensorBoard."""
    trainer: Any = importlib.import_module("recbole.trainer.trainer")
    kept, trainer.get_tensorboard = trainer.get_tensorboard, lambda logger: _NoBoard()
    try:
        yield
    finally:
        trainer.get_tensorboard = kept


@_repair
def shares_of_data() -> bool:
    """Give each process its share of the data: shuffled by the seed, and in evaluation nobody twice.

    `AbstractDataLoader.__init__` shuffles by torch's default seed in every run, and fills up the shares until all are
    equal, so that some users count twice in the metrics. Training keeps the equal shares, which make equal numbers of
    steps; a share of evaluation may be empty. MKR's trainer never tells the loader its epoch: each epoch has the same
    order. Not needed once RecBole has a sampler of its own.
    """
    init, train_mkr = AbstractDataLoader.__init__, MKRTrainer._train_epoch
    if not _refers_to(init, "DistributedSampler"):
        return False

    @functools.wraps(init)
    def __init__(self: Any, config: Any, dataset: Any, sampler: Any, shuffle: bool = False) -> None:
        init(self, config, dataset, sampler, shuffle)
        if config["single_spec"]:
            return
        self.sampler.seed = config["seed"]
        if isinstance(self, (FullSortEvalDataLoader, NegSampleEvalDataLoader)):
            rank, count = torch.distributed.get_rank(), torch.distributed.get_world_size()
            share = range(self.sample_size * rank // count, self.sample_size * (rank + 1) // count)
            vars(self)["sampler"] = self.batch_sampler.sampler = share

    @functools.wraps(train_mkr)
    def _train_epoch(self: Any, train_data: Any, epoch_idx: int, *args: Any, **kwargs: Any) -> Any:
        if not self.config["single_spec"]:
            train_data.knowledge_shuffle(epoch_idx)
        return train_mkr(self, train_data, epoch_idx, *args, **kwargs)

    AbstractDataLoader.__init__ = __init__
    AbstractDataLoader.__bool__ = lambda self: self.sample_size > 0  # else `Trainer.evaluate` leaves the others waiting
    if not _refers_to(train_mkr, "knowledge_shuffle"):
        MKRTrainer._train_epoch = _train_epoch
    return True


@_repair
def shared_evaluation() -> bool:
    """Evaluate all users together, whichever process ranked their items (`collector.py`, `trainer.py`).

    `Trainer._map_reduce` averages the metrics of the processes by their number of batches, taken for that of users;
    and a coverage or an entropy is no average of those of the shares. Now every process has what all have collected,
    in the order of a single process, and all go on with the numbers of the first. Not needed once `_map_reduce` gathers
    no metrics.
    """
    original = Collector.get_data_struct
    if not _refers_to(Trainer._map_reduce, "all_gather"):
        return False

    @functools.wraps(original)
    def get_data_struct(self: Any) -> Any:
        config = getattr(self, "config", None)
        if config is not None and not config["single_spec"]:
            _gather(self.data_struct._data_dict)
        return original(self)

    Collector.get_data_struct, Trainer._map_reduce = get_data_struct, _map_reduce
    return True


def _gather(held: dict[str, Any]) -> None:
    """Put in place of each tensor the tensors of all processes, one after the other."""
    own = {key: value.cpu() for key, value in held.items() if isinstance(value, torch.Tensor)}
    parts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, own)
    for key in {key for part in parts for key in part}:
        held[key] = torch.cat([part[key] for part in parts if key in part])


def _map_reduce(self: Any, result: Any, num_sample: int) -> Any:
    held = [result]
    torch.distributed.broadcast_object_list(held, src=0)
    return held[0]
