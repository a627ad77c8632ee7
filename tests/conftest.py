"""Small data sets and a fast way from settings to a trained model."""

import os

# Under pytest-xdist the workers share the cores: threads of several processes would wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import recbole_slifmr  # noqa: F401  registers the models
from recbole_slifmr.host.settings import make_config

REAL_DATA = Path(__file__).parents[2] / "shared" / "data"
THREADS = torch.get_num_threads()
QUIET = {
    "show_progress": False,
    "state": "ERROR",
    "train_batch_size": 64,
    "eval_batch_size": 100_000,
    "epochs": 2,
    "topk": [5, 10],
    "valid_metric": "Recall@10",
}


@pytest.fixture(autouse=True, scope="session")
def _own_key(tmp_path_factory):
    """The key of seals lies in a folder of the tests, also for fixtures of whole modules."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_DATA_HOME", str(tmp_path_factory.getbasetemp() / "data"))
        yield


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path_factory, monkeypatch):
    """RecBole writes log, log_tensorboard and saved into the working directory."""
    monkeypatch.chdir(tmp_path_factory.mktemp("work"))
    torch.manual_seed(0)
    np.random.seed(0)


@pytest.fixture(autouse=True)
def _own_threads():
    """A command that is given threads sets them for the whole process; sums then differ in the last digit."""
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(THREADS)


@pytest.fixture
def real_data():
    """The folder of the real data sets, beside the checkout."""
    if not REAL_DATA.is_dir():
        pytest.skip(f"the real data sets are not in {REAL_DATA.parent.name}/{REAL_DATA.name} beside the checkout")
    return REAL_DATA


def write_table(path, header, rows):
    path.write_text("\n".join([header, *("\t".join(map(str, row)) for row in rows)]) + "\n", encoding="utf-8")


def write_tiny(folder, name="tiny", n_users=20, n_items=15, seed=0):
    """Write a small random set with a KG, a link file and two modalities; return its folder.

    Item i0 has no entity, item i1 no features; the KG links to an unknown item and an unknown entity.
    """
    rng = np.random.default_rng(seed)
    root = Path(folder) / name
    root.mkdir(parents=True)
    pairs = sorted({(int(u), int(i)) for u in range(n_users) for i in rng.choice(n_items, 7, replace=False)})
    rng.shuffle(pairs)
    write_table(root / f"{name}.inter", "user_id:token\titem_id:token", [(f"u{u}", f"i{i}") for u, i in pairs])
    triples = [(f"e{i}", f"r{i % 2}", f"x{i % 4}") for i in range(1, n_items)] + [("x0", "r2", "y"), ("x1", "r2", "y")]
    write_table(root / f"{name}.kg", "head_id:token\trelation_id:token\ttail_id:token", triples)
    links = [(f"i{i}", f"e{i}") for i in range(1, n_items)] + [("stray", "e1"), ("i0", "nowhere")]
    write_table(root / f"{name}.link", "item_id:token\tentity_id:token", links)
    tokens = [f"i{i}" for i in range(n_items) if i != 1] + ["unseen"]
    (root / "items.txt").write_text("\n".join(tokens) + "\n")
    np.save(root / "text.npy", rng.normal(size=(len(tokens), 6)).astype(np.float32))
    np.save(root / "image.npy", rng.normal(size=(len(tokens), 4)).astype(np.float32))
    return root


@pytest.fixture
def tiny(tmp_path):
    return write_tiny(tmp_path)


@pytest.fixture
def board(tmp_path):
    """A checkerboard of two groups; each user's one held-out item is the only item of the group not seen in training.

    Features and knowledge graph are noise: the groups show in the interactions alone. Chance ranks the held-out item
    first for one user in nine.
    """
    root = tmp_path / "board"
    root.mkdir()
    for name, is_part in (
        ("train", lambda u, i: u != i),
        ("valid", lambda u, i: u == i),
        ("test", lambda u, i: u == i),
    ):
        rows = [(f"u{g}{u}", f"i{g}{i}") for g in range(2) for u in range(8) for i in range(8) if is_part(u, i)]
        write_table(root / f"board.{name}.inter", "user_id:token\titem_id:token", rows)
    rng, tokens = np.random.default_rng(0), [f"i{g}{i}" for g in range(2) for i in range(8)]
    (root / "items.txt").write_text("\n".join(tokens) + "\n")
    for name in ("text", "image"):
        np.save(root / f"{name}.npy", rng.normal(size=(len(tokens), 64)))
    triples = [(f"e{token}", f"r{rng.integers(2)}", f"x{rng.integers(6)}") for token in tokens]
    write_table(root / "board.kg", "head_id:token\trelation_id:token\ttail_id:token", triples)
    write_table(root / "board.link", "item_id:token\tentity_id:token", [(token, f"e{token}") for token in tokens])
    return root


BOARD = {
    "benchmark_filename": ["train", "valid", "test"],
    "topk": [1],
    "valid_metric": "Recall@1",
    "epochs": 20,
    "learning_rate": 0.01,
}


@pytest.fixture
def build():
    """Return a function from settings to everything of a run, before training."""
    from recbole.data import create_dataset, data_preparation
    from recbole.utils import get_model, get_trainer, init_seed

    def make(folder, model="SLIFMR", **settings):
        folder = Path(folder)
        config = make_config(model, folder.name, settings={**QUIET, "data_path": str(folder.parent), **settings})
        init_seed(config["seed"], True)
        dataset = create_dataset(config)
        train, valid, test = data_preparation(config, dataset)
        init_seed(config["seed"], True)
        network = get_model(model)(config, train._dataset).to(config["device"])
        trainer = get_trainer(config["MODEL_TYPE"], model)(config, network)
        return SimpleNamespace(
            config=config, dataset=dataset, train=train, valid=valid, test=test, model=network, trainer=trainer
        )

    return make


@pytest.fixture
def fresh(tiny, build, model_name):
    """A run of the test's model, before training."""
    return build(tiny, model_name)


def batch_of(run):
    """Return a training batch."""
    return next(iter(run.train)).to(run.config["device"])


def all_scores(run):
    """Return the scores of every user and item, ``[n_users, n_items]``."""
    from recbole.data.interaction import Interaction

    run.model.eval()
    users = torch.arange(1, run.dataset.user_num, device=run.config["device"])
    with torch.no_grad():
        return run.model.full_sort_predict(Interaction({"user_id": users})).view(len(users), -1)
