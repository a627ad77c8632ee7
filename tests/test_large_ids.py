"""Ids of 200,000 users and 60,000 items: their product is beyond 32 bits, and pairs must not be taken for others."""

import numpy as np
import pytest
import torch
from conftest import QUIET
from recbole.data import create_dataset
from recbole.utils import get_model

from recbole_slifmr.data.survey import survey
from recbole_slifmr.host.settings import make_config
from recbole_slifmr.training.checkpoint import data_record

N_USERS, N_ITEMS = 200_000, 60_000


def config_of(folder, model="SLIFMR"):
    settings = {**QUIET, "data_path": str(folder), "benchmark_filename": ["train", "valid", "test"]}
    return make_config(model, "large", settings={**settings, "use_features": False, "embedding_size": 2})


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A fixed split in which every user has one training interaction; half of validation is in training too."""
    root = tmp_path_factory.mktemp("large")
    (root / "large").mkdir()
    users = np.arange(N_USERS)
    items = users * 7 % N_ITEMS
    last = slice(N_USERS - 1000, N_USERS)
    known = items[last] + np.arange(1000) % 2
    for part, who, what in (
        ("train", users, items),
        ("valid", users[last], known),
        ("test", users[last], items[:1000]),
    ):
        lines = "".join(f"u{user}\ti{item}\n" for user, item in zip(who.tolist(), what.tolist(), strict=True))
        (root / "large" / f"large.{part}.inter").write_text("user_id:token\titem_id:token\n" + lines)
    config = config_of(root)
    return config, dict(zip(("train", "valid", "test"), create_dataset(config).build(), strict=True))


def test_inspect_and_checkpoints_tell_pairs_apart(large):
    config, splits = large
    assert survey(config, splits, n_pairs=100)["unseen"]["valid"]["pairs_of_training"] == 500
    before = data_record(splits["train"], 0)["hashes"]["training interactions"]
    other = splits["train"].copy(splits["train"].inter_feat[list(range(N_USERS))])
    other.inter_feat["item_id"][-1] = other.inter_feat["item_id"][-1] % N_ITEMS + 1
    assert data_record(other, 0)["hashes"]["training interactions"] != before


def test_slifmr_knows_its_training_pairs(large):
    config, splits = large
    encoder = get_model("SLIFMR")(config, splits["train"]).interaction_encoder
    users, items = (splits["train"].inter_feat[field] for field in ("user_id", "item_id"))
    assert encoder.contains(users, items).all() and not encoder.contains(users, items % N_ITEMS + 1).any()


def test_recbole_s_graph_has_every_pair_once(large):
    config, splits = large
    config = config_of(config["data_path"].removesuffix("large"), "LightGCN")
    row, col = get_model("LightGCN")(config, splits["train"]).norm_adj_matrix.coalesce().indices()
    of_users = row <= N_USERS
    found = torch.stack([row[of_users], col[of_users] - N_USERS - 1])
    wanted = torch.stack([splits["train"].inter_feat[field] for field in ("user_id", "item_id")])
    assert torch.equal(found, wanted[:, wanted[0].argsort()])
