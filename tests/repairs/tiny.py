"""A tiny data set, short runs on it, and the list of checks."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from recbole_slifmr.host import compat

GRAPH_MODELS = ("LightGCN", "NGCF", "NCL", "GCMC", "SpectralCF", "KGIN", "MCCLK")
MODELS = ("BPR", "SGL", "CKE", "CFKG", "KGCN", "KGAT", "EASE", "ItemKNN", *GRAPH_MODELS)
CHECKS: dict[str, Callable[[], None]] = {}


def check(function: Callable[[], None]) -> Callable[[], None]:
    """List a check to be run in a process of its own."""
    CHECKS[function.__name__.removeprefix("check_")] = function
    return function


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


def join(rank: int = 0, count: int = 1) -> None:
    """Join a process group on the CPU."""
    store = f"file://{os.getcwd()}/store{count}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=count)


def shared(rank: int, count: int, **changes: Any) -> Any:
    """Return the settings of one of several processes."""
    config = settings("BPR", **changes)
    config["single_spec"], config["local_rank"], config["world_size"] = False, rank, count
    return config
