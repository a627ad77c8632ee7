"""The real data sets, where they are."""

import pytest
from recbole.data import create_dataset

from recbole_slifmr.host.settings import make_config
from recbole_slifmr.training.experiment import run

COUNTS = {
    "lastfm-mm": {"users": 1858, "items": 1425, "split": (44_327, 4_799, 7_219), "linked": 856,
                  "triples": 21_205, "modalities": {"text": 384, "audio": 128}},
    "ml-100k-mm": {"users": 943, "items": 1682, "split": (33_220, 33_346, 33_434), "linked": 1598,
                   "triples": 91_631, "modalities": {"text": 384, "image": 64}},
}  # fmt: skip


@pytest.mark.parametrize("name", COUNTS)
def test_everything_is_loaded(real_data, name):
    dataset = create_dataset(make_config("SLIFMR", name, settings={"data_path": real_data, "state": "ERROR"}))
    wanted = COUNTS[name]
    assert (dataset.user_num - 1, dataset.item_num - 1) == (wanted["users"], wanted["items"])
    assert tuple(len(part.inter_feat) for part in dataset.build()) == wanted["split"]
    assert (len(dataset.item2entity), len(dataset.triples)) == (wanted["linked"], wanted["triples"])
    assert {name: f.values.shape[1] for name, f in dataset.item_features.items()} == wanted["modalities"]
    assert all(features.mask.sum() == wanted["items"] for features in dataset.item_features.values())


@pytest.mark.slow
def test_two_epochs_already_rank_better_than_popularity(real_data):
    settings = {"data_path": real_data, "epochs": 2, "show_progress": False, "state": "ERROR"}
    scores = {name: run(name, "lastfm-mm", settings=settings).best_valid_score for name in ("SLIFMR", "Pop")}
    assert scores["SLIFMR"] > scores["Pop"] + 0.05
