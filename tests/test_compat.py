"""Each repair of RecBole is shown to be needed, to work, and to stay away where it is not needed.

A repair cannot be taken back within a process. So this file is also a program: it loads `host/compat` without the
`__init__` of the package, which would apply everything, and forks a process for each `check_*`.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import json
import logging
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import traceback
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import scipy.sparse as sp
import torch

PACKAGE = Path(__file__).resolve().parents[1] / "recbole_slifmr"
GRAPH_MODELS = ("LightGCN", "NGCF", "NCL", "GCMC", "SpectralCF", "KGIN", "MCCLK")
MODELS = ("BPR", "SGL", "CKE", "CFKG", "KGCN", "KGAT", "EASE", "ItemKNN", *GRAPH_MODELS)
CHECKS: dict[str, Callable[[], None]] = {}
compat: Any = None  # set in the checking process only


def check(function: Callable[[], None]) -> Callable[[], None]:
    """List a check to be run in a process of its own."""
    CHECKS[function.__name__.removeprefix("check_")] = function
    return function


# ------------------------------------------------------------------------------------------ a tiny RecBole


def write_dataset(folder: Path) -> None:
    """Write 30 users, 40 items and their knowledge graph as atomic files."""
    draw = random.Random(0)
    pairs = {(u, (3 * u + k * k) % 40) for u in range(30) for k in range(9)}
    pairs |= {(draw.randrange(30), draw.randrange(40)) for _ in range(90)}
    inter = [f"u{u}\ti{i}\t{n % 5 + 1}\t{n}" for n, (u, i) in enumerate(sorted(pairs))]
    triples = [f"e{i}\tr{r}\tt{r}_{i % (4 + r)}" for i in range(40) for r in range(3)]
    links = [f"i{i}\te{i}" for i in range(40)]
    folder.mkdir()
    for kind, header, rows in (
        ("inter", "user_id:token\titem_id:token\trating:float\ttimestamp:float", inter),
        ("kg", "head_id:token\trelation_id:token\ttail_id:token", triples),
        ("link", "item_id:token\tentity_id:token", links),
    ):
        (folder / f"tiny.{kind}").write_text("\n".join([header, *rows]) + "\n")


def short_run(**changes: Any) -> dict[str, Any]:
    """Return what to tell RecBole for a short run on the tiny dataset."""
    return {
        "data_path": os.getcwd(),
        "use_gpu": False,
        "show_progress": False,
        "state": "ERROR",
        "epochs": 1,
        "train_batch_size": 64,
        "eval_batch_size": 100_000,
        "embedding_size": 8,
        "kg_embedding_size": 8,
        "layers": [8],
        "num_clusters": 5,
        "metrics": ["Recall", "NDCG"],
        "topk": [5],
        "valid_metric": "NDCG@5",
        **changes,
    }


def settings(model: str, **changes: Any) -> Any:
    """Return RecBole's settings for a short run."""
    from recbole.config import Config

    return Config(model=model, dataset="tiny", config_dict=short_run(**changes))


def start(model: str, **changes: Any) -> tuple[Any, list[Any]]:
    """Return a trainer with its model, and the loaders for training, validation and test."""
    from recbole.data import create_dataset, data_preparation
    from recbole.utils import get_model, get_trainer, init_seed

    config = settings(model, **changes)
    init_seed(config["seed"], config["reproducibility"])
    loaders = list(data_preparation(config, create_dataset(config)))
    built = get_model(model)(config, loaders[0]._dataset)
    return get_trainer(config["MODEL_TYPE"], model)(config, built), loaders


def scores(trainer: Any, pairs: bool = False) -> torch.Tensor:
    """Return the scores of all items for a few users, or those of a few pairs."""
    from recbole.data.interaction import Interaction

    users, items = torch.tensor([1, 2, 3]), torch.tensor([4, 5, 6])
    trainer.model.eval()
    with torch.no_grad():
        if not pairs:
            with contextlib.suppress(NotImplementedError):
                return trainer.model.full_sort_predict(Interaction({"user_id": users})).clone()
        return trainer.model.predict(Interaction({"user_id": users, "item_id": items})).clone()


def read(path: Any) -> Any:
    """Read a file that RecBole saved."""
    from recbole_slifmr.host.stored import read_stored

    return read_stored(path)


def load_checkpoint(trainer: Any) -> None:
    """Load what the trainer saved, as its `evaluate` does."""
    saved = read(trainer.saved_model_file)
    trainer.model.load_state_dict(saved["state_dict"])
    trainer.model.load_other_parameter(saved["other_parameter"])


def apply_only(name: str) -> list[str]:
    """Apply one repair."""
    return compat.apply(skip=set(compat.REPAIRS) - {name})


def succeeds(function: Callable[[], None], meanwhile: Callable[[], None] | None = None) -> None:
    """Assert that a function succeeds in a forked process."""
    child = os.fork()
    if child == 0:
        with contextlib.suppress(Exception):
            function()
            os._exit(0)
        os._exit(1)
    if meanwhile is not None:
        meanwhile()
    assert os.waitpid(child, 0)[1] == 0


# ------------------------------------------------------------------------------------------ one per repair


@check
def check_numpy_aliases() -> None:
    """`Config` cannot be built without the aliases."""
    compat.apply(skip={"numpy_aliases"})
    for name in ("float_", "complex_", "unicode_", "float"):
        vars(np).pop(name, None)  # numpy 1 has three of them
    with pytest.raises(AttributeError, match="float_"):
        settings("BPR")
    assert apply_only("numpy_aliases") == ["numpy_aliases"]
    assert np.float is np.float64  # before any Config: worker processes build none
    assert settings("BPR")["model"] == "BPR"
    assert (np.float_, np.complex_, np.unicode_) == (np.float64, np.complex128, np.str_)


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
def check_checkpoint_loading() -> None:
    """A test of the best model cannot load it without the repair; what is not listed stays refused."""
    import pickle

    from recbole.config import Config

    from recbole_slifmr.errors import SettingError
    from recbole_slifmr.host.stored import allow_in_checkpoints

    compat.apply(skip={"checkpoint_loading", "evaluated_strings"})
    trainer, (train, valid, test) = start("BPR")
    trainer.fit(train, valid, verbose=False)
    with pytest.raises(pickle.UnpicklingError, match="Weights only"):
        trainer.evaluate(test)
    assert apply_only("checkpoint_loading") == ["checkpoint_loading"]
    assert trainer.evaluate(test)["recall@5"] >= 0
    loaded = read(trainer.saved_model_file)["config"]
    assert type(loaded) is Config
    assert loaded.final_config_dict == trainer.config.final_config_dict
    assert loaded.model_class is type(trainer.model)
    with pytest.raises(pickle.UnpicklingError, match="Weights only"):
        torch.load(trainer.saved_model_file)  # as without this package

    torch.save({"kept": Listed}, "listed.pth")
    with pytest.raises(SettingError, match="Listed, which no checkpoint needs"):
        read("listed.pth")
    allow_in_checkpoints(Listed)
    assert not callable(read("listed.pth")["kept"])
    torch.save(Listed(), "listed.pth")
    with pytest.raises(SettingError):
        read("listed.pth")

    torch.save(Attack(), "attack.pth")  # Config evaluates the strings among its settings
    with pytest.raises(SettingError, match="cannot be read as a checkpoint"):
        trainer.resume_checkpoint("attack.pth")
    with pytest.raises(pickle.UnpicklingError):
        torch.load("attack.pth")
    assert not Path("attacked").exists()
    torch.load("attack.pth", weights_only=False)
    assert Path("attacked").exists()  # the file was dangerous


class Listed:
    """A class of one's own in a checkpoint."""


class Attack:
    """What a file looks like that asks for the settings to be built."""

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        """Ask for a `Config` with a setting that writes a file."""
        from recbole.config import Config

        return Config, ("BPR", "tiny", None, {"data_path": os.getcwd(), "x": "open('attacked', 'w').close()"})


@check
def check_pickled_files() -> None:
    """RecBole unpickles whatever lies beside its checkpoints; with the repair, what it has saved itself."""
    import pickle

    from recbole.data import create_dataset, data_preparation
    from recbole.data.utils import load_split_dataloaders

    from recbole_slifmr.errors import DataError

    compat.apply(skip={"pickled_files", "evaluated_strings"})

    def load(**changes: Any) -> Any:
        config = settings("BPR", **changes)
        return load_split_dataloaders(config) or data_preparation(config, create_dataset(config))

    files = [Path("saved/tiny-Dataset.pth"), Path("saved/tiny-for-BPR-dataloader.pth")]
    files[0].parent.mkdir()
    for file in files:
        file.write_bytes(pickle.dumps(Attack()))
        with contextlib.suppress(Exception):
            load()
        assert Path("attacked").exists()
        Path("attacked").unlink()
        file.unlink()
    assert apply_only("pickled_files") == ["pickled_files"]
    for file in files:
        file.write_bytes(pickle.dumps(Attack()))
        with pytest.raises(DataError, match=f"{file} was not written by you"):
            load()
        file.unlink()
    assert not Path("attacked").exists()
    saved = load(save_dataset=True, save_dataloaders=True)[0].dataset.inter_feat.interaction
    for _ in files:  # the data set from its file, then the loaders, too
        again = load()[0].dataset.inter_feat.interaction
        assert all(torch.equal(again[name], saved[name]) for name in saved)
        files.pop().write_bytes(b"")

    sys.modules["recbole.model.general_recommender.ldiffrec"].np.save("item_emb.npy", np.array([Attack()]))
    with pytest.raises(ValueError, match="allow_pickle=False"):
        sys.modules["recbole.model.general_recommender.ldiffrec"].np.load("item_emb.npy", allow_pickle=True)


@check
def check_evaluated_strings() -> None:
    """A string among the settings is evaluated without the repair; with it, values are read and nothing runs."""
    from recbole.model.context_aware_recommender import kd_dagfm

    code = "open('attacked', 'w').close()"
    compat.apply(skip={"evaluated_strings"})
    settings("BPR", extra=code)
    assert Path("attacked").exists()
    Path("attacked").unlink()
    assert apply_only("evaluated_strings") == ["evaluated_strings"]
    read = settings("BPR", extra=code, sizes="[8, 4]", rate="1e-3", flag="True", nothing="None", word="len")
    assert (read["extra"], read["sizes"], read["rate"], read["flag"]) == (code, [8, 4], 1e-3, True)
    assert (read["nothing"], read["word"]) == (None, "len")
    assert vars(kd_dagfm)["eval"]("CrossNet") is kd_dagfm.CrossNet
    for name in (code, "nn", "KD_DAGFM(None, None)"):
        with pytest.raises(ValueError, match="KD_DAGFM has no network"):
            vars(kd_dagfm)["eval"](name)
    assert not Path("attacked").exists()


@check
def check_readers() -> None:
    """Every module of RecBole that reads tensors, unpickles or evaluates is one that is repaired."""
    import re

    import recbole

    root = Path(recbole.__file__).parent
    found: dict[str, set[str]] = {}
    for path in root.rglob("*.py"):
        name = ".".join(("recbole", *path.relative_to(root).with_suffix("").parts))
        for pattern in (r"torch\.load\(", r"pickle\.\w+\(|allow_pickle=True", r"(?<![\w.])eval\(", r"(?<!\w)exec\("):
            if re.search(pattern, path.read_text()):
                found.setdefault(pattern, set()).add(name)
    expected = [
        {*compat.files.READERS, "recbole.quick_start.quick_start"},
        {name for name, _ in compat.files.PICKLES},
        set(compat.files.EVALUATE),
    ]
    assert list(map(sorted, found.values())) == list(map(sorted, expected))


@check
def check_checkpoint_saving() -> None:
    """RecBole writes what torch refuses, and spoils the file if it is stopped; the repair does neither."""
    import pickle

    from recbole.trainer import PretrainTrainer, Trainer

    compat.apply(skip={"checkpoint_saving"})
    trainer, _ = start("BPR")
    trainer._save_checkpoint(0, verbose=False)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(trainer.saved_model_file)
    save = torch.save

    def stop(state: Any, path: str, **kwargs: Any) -> None:
        Path(path).write_text("half")
        raise KeyboardInterrupt

    def interrupt() -> None:
        torch.save = stop
        with pytest.raises(KeyboardInterrupt):
            trainer._save_checkpoint(1, verbose=False)
        torch.save = save

    interrupt()
    assert Path(trainer.saved_model_file).read_text() == "half"

    assert apply_only("checkpoint_saving") == ["checkpoint_saving"]
    trainer._save_checkpoint(0)
    interrupt()
    state = read(trainer.saved_model_file)
    assert os.listdir("saved") == [os.path.basename(trainer.saved_model_file)]
    names = {"config", "epoch", "cur_step", "best_valid_score", "state_dict", "other_parameter", "optimizer"}
    assert set(state) == names
    assert state["epoch"] == 0
    trainer.resume_checkpoint(trainer.saved_model_file)
    assert trainer.start_epoch == 1

    pretrainer = PretrainTrainer(trainer.config, trainer.model)
    pretrainer.save_pretrained_model(0, "pretrained.pth")
    torch.save = stop
    with pytest.raises(KeyboardInterrupt):
        pretrainer.save_pretrained_model(1, "pretrained.pth")
    torch.save = save
    assert read(pretrainer.saved_model_file)["epoch"] == 0
    assert not list(Path().glob("*.part"))

    class Extended(Trainer):
        def _checkpoint_state(self, epoch: int) -> dict[str, Any]:
            return {**super()._checkpoint_state(epoch), "more": epoch}

    extended = Extended(trainer.config, trainer.model)
    extended._save_checkpoint(7, saved_model_file=Path("elsewhere.pth"))
    assert read("elsewhere.pth")["more"] == 7

    waited: list[bool] = []
    torch.distributed.barrier = lambda: waited.append(Path("shared.pth").exists())
    trainer.config["single_spec"], trainer.config["local_rank"] = False, 1
    trainer._save_checkpoint(8, saved_model_file="shared.pth")
    trainer.config["local_rank"] = 0
    trainer._save_checkpoint(8, saved_model_file="shared.pth")
    assert waited == [False, True], "the first process writes, and no other goes on before"
    saved = read("shared.pth")["config"]
    assert (saved["single_spec"], trainer.config["single_spec"]) == (True, False)


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
def check_run_names() -> None:
    """Runs of one second share files without the repair; with it, only the processes of one run do."""
    from recbole.trainer import Trainer
    from recbole.utils import get_tensorboard, init_logger

    def names() -> dict[str, set[str]]:
        found: dict[str, set[str]] = {"checkpoint": set(), "log": set(), "board": set()}
        for _ in range(4):  # of which at least two fall into the same second
            found["checkpoint"].add(Trainer(config, model).saved_model_file)
            root = logging.getLogger()
            root.handlers.clear()
            found["board"].add(get_tensorboard(root).log_dir)
            init_logger(config)
            found["log"].add(root.handlers[-1].baseFilename)
        return found

    compat.apply(skip={"run_names"})
    trainer, _ = start("BPR")
    config, model = trainer.config, trainer.model
    assert all(len(found) < 4 for found in names().values())
    assert apply_only("run_names") == ["run_names"]
    states = random.getstate(), np.random.get_state()[2], torch.get_rng_state()
    found = names()
    assert {kind: len(paths) for kind, paths in found.items()} == {"checkpoint": 4, "log": 4, "board": 4}
    assert all(path.startswith("saved") and path.endswith(".pth") for path in found["checkpoint"])
    assert (random.getstate(), np.random.get_state()[2]) == states[:2]
    assert torch.equal(torch.get_rng_state(), states[2])

    def name_of(rank: int) -> None:
        join(rank, 2)
        Path(f"rank{rank}").write_text(Trainer(config, model).saved_model_file)
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()

    config["single_spec"] = False
    torch.nn.SyncBatchNorm.convert_sync_batchnorm = lambda module: module
    importlib.import_module("recbole.trainer.trainer").DistributedDataParallel = lambda module, **_: module
    succeeds(lambda: name_of(1), meanwhile=lambda: name_of(0))
    assert Path("rank0").read_text() == Path("rank1").read_text()


@check
def check_metric_inputs() -> None:
    """Metrics that need counts crash without the repair."""
    metrics = ["ItemCoverage", "AveragePopularity", "GiniIndex", "TailPercentage", "Recall"]
    compat.apply(skip={"metric_inputs"})
    trainer, (train, valid, test) = start("BPR", metrics=metrics, valid_metric="Recall@5")
    with pytest.raises(AttributeError, match="cpu"):
        trainer.fit(train, valid, verbose=False)
    assert apply_only("metric_inputs") == ["metric_inputs"]
    trainer, (train, valid, test) = start("BPR", metrics=metrics, valid_metric="Recall@5")
    trainer.fit(train, valid, verbose=False)
    first, second = trainer.evaluate(test), trainer.evaluate(test)  # the counts are kept between the two
    assert first == second
    assert 0 < first["itemcoverage@5"] <= 1
    assert first["averagepopularity@5"] > 0
    assert len(first) == len(metrics)


@check
def check_knowledge_loader_dataset() -> None:
    """Knowledge-aware models crash with metrics that need counts, without the repair."""
    compat.apply(skip={"knowledge_loader_dataset"})
    changes = {"metrics": ["Recall", "ItemCoverage"], "valid_metric": "Recall@5"}
    trainer, (train, valid, _) = start("CKE", **changes)
    with pytest.raises(AttributeError, match="dataset"):
        trainer.fit(train, valid, verbose=False)
    assert apply_only("knowledge_loader_dataset") == ["knowledge_loader_dataset"]
    assert 0 < trainer.fit(train, valid, verbose=False)[1]["itemcoverage@5"] <= 1


@check
def check_flops_estimate() -> None:
    """A model without `predict` ends a run without the repair; Ray is not imported for it."""
    import recbole.utils
    from recbole.data.transform import construct_transform

    compat.apply(skip={"flops_estimate"})
    trainer, (train, _, _) = start("BPR")
    transform, logger = construct_transform(trainer.config), logging.getLogger("flops")
    arguments = (trainer.model, train._dataset, trainer.config["device"], logger, transform)
    right = recbole.utils.get_flops(*arguments)
    assert right > 0
    type(trainer.model).predict = lambda self, interaction: 1 / 0
    with pytest.raises(ZeroDivisionError):
        recbole.utils.get_flops(*arguments)

    def after_quick_start() -> None:
        quick_start = importlib.import_module("recbole.quick_start.quick_start")
        apply_only("flops_estimate")
        assert math.isnan(quick_start.get_flops(*arguments))

    succeeds(after_quick_start)
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    assert apply_only("flops_estimate") == ["flops_estimate"]
    assert not messages
    assert math.isnan(recbole.utils.get_flops(*arguments))
    assert "BPR" in messages[0]
    assert "ZeroDivisionError" in messages[0]
    assert "ray" not in sys.modules
    assert "recbole.quick_start" not in sys.modules


@check
def check_anomaly_detection() -> None:
    assert torch.is_anomaly_enabled(), "importing RecBole's models turns it on"
    assert apply_only("anomaly_detection") == ["anomaly_detection"]
    assert not torch.is_anomaly_enabled()
    assert apply_only("anomaly_detection") == []


@check
def check_shared_folders() -> None:
    """Another process makes the folder between the look and the making."""
    from recbole.data import utils as data_utils
    from recbole.utils import ensure_dir, logger, utils

    compat.apply(skip={"shared_folders"})
    look = os.path.exists
    slow = patch.object(os.path, "exists", lambda path: look(path) or bool(os.makedirs(path)))
    with slow, pytest.raises(FileExistsError):
        ensure_dir("first/saved")
    assert apply_only("shared_folders") == ["shared_folders"]
    with patch.object(os.path, "exists", lambda path: False):
        for number, module in enumerate((utils, logger, data_utils)):
            for _ in range(2):
                module.ensure_dir(f"second/{number}")
            assert os.path.isdir(f"second/{number}")


@check
def check_amp_warnings() -> None:
    """Each epoch warns of old names without the repair."""

    def warned(model: str) -> bool:
        trainer, (train, valid, _) = start(model)
        with warnings.catch_warnings(record=True) as raised:
            warnings.simplefilter("always")
            trainer.fit(train, valid, verbose=False, saved=False)
        return any("torch.cuda.amp" in str(warning.message) for warning in raised)

    compat.apply(skip={"amp_warnings"})
    assert warned("BPR")
    assert warned("NCL")
    assert apply_only("amp_warnings") == ["amp_warnings"]
    assert not warned("BPR")
    assert not warned("NCL")


def join(rank: int = 0, count: int = 1) -> None:
    """Join a process group on the CPU."""
    store = f"file://{os.getcwd()}/store{count}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=count)


def shared(rank: int, count: int, **changes: Any) -> Any:
    """Return the settings of one of several processes."""
    config = settings("BPR", **changes)
    config["single_spec"], config["local_rank"], config["world_size"] = False, rank, count
    return config


@check
def check_process_group() -> None:
    """One process of a distributed run cannot start without a GPU; with the repair it is on the CPU."""
    group = {"local_rank": 0, "nproc": 1, "world_size": 1, "offset": 0, "init_method": f"file://{os.getcwd()}/store"}
    compat.apply(skip={"process_group"})
    with pytest.raises(Exception, match=r"NCCL"):
        settings("BPR", **group, ip="localhost", port=1)
    assert apply_only("process_group") == ["process_group"]
    assert settings("BPR")["single_spec"]
    config = settings("BPR", **group)
    assert (config["device"], config["single_spec"]) == (torch.device("cpu"), False)
    assert torch.distributed.get_backend() == "gloo"

    torch.cuda.device_count = lambda: 4
    with pytest.raises(ValueError, match="gpu_id names 1 GPUs for 2 processes"):
        settings("BPR", **group | {"nproc": 2, "gpu_id": 3})
    joined: dict[str, Any] = {}
    torch.distributed.init_process_group = lambda backend, **kwargs: joined.update(backend=backend, **kwargs)
    torch.cuda.set_device = lambda index: joined.update(index=index)
    config = settings("BPR", **group | {"nproc": 2, "world_size": 4, "offset": 2, "local_rank": 1})
    assert (config["device"], config["gpu_id"], config["show_progress"]) == (torch.device("cuda", 1), "0,1", False)
    assert (joined["backend"], joined["rank"], joined["world_size"], joined["index"]) == ("nccl", 3, 4, 1)


@check
def check_parallel_model() -> None:
    """A model on the CPU cannot be trained in several processes without the repair."""
    from recbole.trainer import Trainer

    compat.apply(skip={"parallel_model"})
    trainer, (train, *_) = start("BPR")
    join()
    with pytest.raises(ValueError, match="device_ids"):
        Trainer(shared(0, 1), trainer.model)
    assert apply_only("parallel_model") == ["parallel_model"]
    trainer.model.register_buffer("graph", torch.zeros(3))
    parallel = Trainer(shared(0, 1), trainer.model)
    before = trainer.model.item_embedding.weight.clone()
    assert parallel._train_epoch(type(train)(shared(0, 1), train._dataset, train._sampler, shuffle=True), 0) > 0
    assert not torch.equal(trainer.model.item_embedding.weight, before)
    assert not parallel.distributed_model.will_sync_module_buffers()
    assert os.listdir("log_tensorboard")
    boards = len(os.listdir("log_tensorboard"))
    torch.distributed.get_rank = lambda *group: 1
    Trainer(shared(0, 1), trainer.model).tensorboard.add_scalar("x", 1, 0)
    assert len(os.listdir("log_tensorboard")) == boards
    trainer.model.norm = torch.nn.BatchNorm1d(3)
    with pytest.raises(NotImplementedError, match="batch normalisation of BPR on GPUs only"):
        Trainer(shared(0, 1), trainer.model)


@check
def check_shares_of_data() -> None:
    """Two users count twice in the shares of four processes without the repair, and each seed shuffles the same way."""
    from recbole.data.dataloader import FullSortEvalDataLoader, TrainDataLoader

    def shares(kind: Any, loader: Any, count: int = 4, **changes: Any) -> list[list[int]]:
        found = []
        torch.distributed.get_world_size = lambda *group: count
        for rank in range(count):
            torch.distributed.get_rank = lambda *group, rank=rank: rank
            made = kind(
                shared(rank, count, **changes), loader._dataset, loader._sampler, shuffle=kind is TrainDataLoader
            )
            found.append([index for batch in made.batch_sampler for index in batch])
            assert len(list(made)) == len(made)
            if found[-1] == []:
                assert made, "an empty share is no reason to skip an evaluation that others wait for"
        return found

    compat.apply(skip={"shares_of_data"})
    _, (train, valid, _) = start("BPR")
    torch.distributed.is_initialized = lambda: True
    n_users = valid.sample_size
    assert n_users == 30
    assert sum(map(len, shares(FullSortEvalDataLoader, valid))) == 32
    assert shares(TrainDataLoader, train, seed=1) == shares(TrainDataLoader, train, seed=2)
    assert apply_only("shares_of_data") == ["shares_of_data"]
    assert list(itertools.chain(*shares(FullSortEvalDataLoader, valid))) == list(range(n_users))
    assert list(itertools.chain(*shares(FullSortEvalDataLoader, valid, 31))) == list(range(n_users))
    assert shares(TrainDataLoader, train, seed=1) != shares(TrainDataLoader, train, seed=2)
    for changes in ({}, {"shuffle": False}):
        found = shares(TrainDataLoader, train, **changes)
        assert {len(share) for share in found} == {math.ceil(train.sample_size / 4)}, "equal numbers of steps"
        assert set().union(*found) == set(range(train.sample_size))


@check
def check_shared_evaluation() -> None:
    """The metrics of two processes are those of one only with the repair."""
    compat.apply(skip={"shared_evaluation"})
    metrics = ["Recall", "ItemCoverage", "GiniIndex"]
    trainer, (train, valid, _) = start("BPR", metrics=metrics, valid_metric="Recall@5")
    trainer.eval_collector.data_collect(train)
    alone = trainer.evaluate(valid, load_best_model=False)

    def together(rank: int, name: str) -> None:
        join(rank, 2)
        config = shared(rank, 2, metrics=metrics, valid_metric="Recall@5")
        trainer.config = trainer.eval_collector.config = config
        share = type(valid)(config, valid._dataset, valid._sampler)
        result = trainer.evaluate(share, load_best_model=False)
        Path(f"{name}{rank}.json").write_text(json.dumps(result))
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
        Path("store2").unlink(missing_ok=True)

    succeeds(lambda: together(1, "before"), meanwhile=lambda: together(0, "before"))
    assert json.loads(Path("before0.json").read_text()) != alone
    assert apply_only("shared_evaluation") == ["shared_evaluation"]
    succeeds(lambda: together(1, "after"), meanwhile=lambda: together(0, "after"))
    assert json.loads(Path("after0.json").read_text()) == json.loads(Path("after1.json").read_text()) == alone


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


# -------------------------------------------------------------------------------------------- all together


@check
def check_apply() -> None:
    """All repairs are made once, and a second call changes nothing."""
    from recbole.model.knowledge_aware_recommender import KGIN
    from recbole.trainer import Trainer

    assert compat.apply() == list(compat.REPAIRS)
    before = dict(vars(Trainer)), dict(vars(KGIN)), len(torch.serialization.get_safe_globals())
    assert compat.apply() == []
    assert (dict(vars(Trainer)), dict(vars(KGIN)), len(torch.serialization.get_safe_globals())) == before
    with pytest.raises(ValueError, match="no_such_repair"):
        compat.apply(skip={"no_such_repair"})
    assert "ray" not in sys.modules


@check
def check_not_needed() -> None:
    """Where RecBole or a library is already right, nothing is changed."""
    from recbole.config import Config
    from recbole.data.dataloader.abstract_dataloader import AbstractDataLoader, NegSampleDataLoader
    from recbole.data.dataloader.knowledge_dataloader import KnowledgeBasedDataLoader
    from recbole.evaluator.collector import Collector
    from recbole.model.general_recommender import NCL
    from recbole.model.knowledge_aware_recommender import KGAT, KGIN, MCCLK
    from recbole.trainer import NCLTrainer, Trainer

    trainer, utils = (
        importlib.import_module("recbole.trainer.trainer"),
        importlib.import_module("recbole.utils.utils"),
    )
    logger = importlib.import_module("recbole.utils.logger")

    def init(self: Any, config: Any, model: Any) -> None:
        torch.distributed.broadcast_object_list([])

    Config.compatibility_settings = lambda self: None
    sp.dok_matrix._update = lambda self, data: None
    sys.modules["dgl"] = types.SimpleNamespace(edge_subgraph=lambda graph, edges, preserve_nodes: None)
    sys.modules["torch_scatter"] = types.ModuleType("present")
    NCL.run_kmeans = lambda self, x: (x, x)
    Trainer._save_checkpoint = lambda self, epoch: os.replace("a", "b")
    KGIN.other_parameter = MCCLK.other_parameter = KGAT.other_parameter = lambda self: {}
    for module in (trainer, logger, utils):
        module.get_local_time = lambda: os.urandom(4).hex()
    Trainer.__init__ = init
    Collector.get_data_struct = lambda self: self.data_struct
    KnowledgeBasedDataLoader.dataset = None
    utils.get_flops = lambda *args, **kwargs: 0
    utils.ensure_dir = lambda path: os.makedirs(path, exist_ok=True)
    trainer.amp = torch.amp
    Config._init_device = lambda self: None
    trainer.AbstractTrainer.__init__ = lambda self, config, model: {"broadcast_buffers": False}
    AbstractDataLoader.__init__ = lambda self, *args: None
    NegSampleDataLoader._neg_sampling = lambda self, inter_feat: torch.zeros(1).cpu()
    Trainer._map_reduce = lambda self, result, num_sample: result
    NCLTrainer.fit = lambda self, train_data: train_data.get_model(self.model)
    torch.autograd.set_detect_anomaly(False)
    for name in compat.files.READERS:
        vars(importlib.import_module(name))["torch"] = types.SimpleNamespace(cuda=torch.cuda)
    for name, attribute in compat.files.PICKLES:
        vars(importlib.import_module(name))[attribute] = None
    for name in compat.files.EVALUATE:
        vars(importlib.import_module(name))["eval"] = None
    assert compat.apply() == []
    del sp.dok_matrix._update  # and with the fault back, so is the repair
    assert compat.apply() == ["bipartite_adjacency"]


@check
def check_models() -> None:
    """Every model trains for an epoch, is saved, loaded and tested; its saved scores come back."""
    importlib.import_module("recbole.quick_start")

    compat.apply()
    from recbole.quick_start import load_data_and_model, run_recbole

    for model in MODELS:
        trainer, (train, valid, test) = start(model, metrics=["Recall", "NDCG", "ItemCoverage"])
        _, best = trainer.fit(train, valid, verbose=False)
        before = scores(trainer)
        for parameter in trainer.model.parameters():
            parameter.data.zero_()
        result = trainer.evaluate(test)
        assert result.keys() == best.keys(), model
        assert all(math.isfinite(value) for value in [*best.values(), *result.values()]), model
        torch.testing.assert_close(scores(trainer), before, rtol=0, atol=0, msg=model)
    with open(os.devnull, "w") as sink, contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
        for model in ("BPR", "KGIN"):
            result = run_recbole(model, "tiny", config_dict=short_run())
            assert math.isfinite(result["best_valid_score"]), model
            newest = max(Path("saved").glob(f"{model}-*.pth"), key=os.path.getmtime)
            assert load_data_and_model(str(newest))[0]["model"] == model


# ---------------------------------------------------------------------------------------- run and report


def run_check(name: str) -> str:
    """Run a check in a folder of its own and return its traceback, empty if it passed."""
    try:
        write_dataset(Path("tiny"))
        CHECKS[name]()
    except BaseException:
        return traceback.format_exc() or "failed"
    return ""


def main(names: list[str]) -> None:
    """Run each check in a forked process and write its traceback to `<name>.json`."""
    global compat
    package = sys.modules["recbole_slifmr"] = types.ModuleType("recbole_slifmr")
    package.__path__ = [str(PACKAGE)]
    compat = importlib.import_module("recbole_slifmr.host.compat")
    sys.argv = sys.argv[:1]  # Config reads them
    for name in names:
        report = Path(f"{name}.json").resolve()
        child = os.fork()
        if child == 0:
            signal.alarm(100)
            os.chdir(tempfile.mkdtemp(dir="."))
            report.write_text(json.dumps(run_check(name)))
            os._exit(0)
        os.waitpid(child, 0)


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """Run all checks that were asked for and return the folder of their reports."""
    if not hasattr(os, "fork"):
        pytest.skip("the checks run in forked processes")
    folder = tmp_path_factory.mktemp("compat")
    wanted = [item.callspec.params["name"] for item in request.session.items if item.path == request.path]
    command = [sys.executable, "-W", "ignore", __file__, *wanted]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "XDG_DATA_HOME": str(folder)}
    subprocess.run(command, cwd=folder, env=environment, check=True, timeout=900)
    return folder


@pytest.mark.parametrize("name", CHECKS)
def test_compat(reports: Path, name: str) -> None:
    """A check of this name, above, passes in a process of its own."""
    report = reports / f"{name}.json"
    assert report.exists(), "the check was stopped"
    assert not (trace := json.loads(report.read_text())), trace


if __name__ == "__main__":
    main(sys.argv[1:])
