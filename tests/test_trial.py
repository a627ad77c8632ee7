"""One trial: it goes on exactly from its checkpoints and never scores the test split."""

import contextlib
import pickle

import pytest
import torch
from conftest import QUIET, write_table

from recbole_slifmr.host.settings import make_config
from recbole_slifmr.model import MODELS as PACKAGE_MODELS
from recbole_slifmr.search.trial import CHECKPOINT, load_trial_data, run_trial
from recbole_slifmr.training.checkpoint import read_checkpoint
from recbole_slifmr.training.experiment import run
from recbole_slifmr.training.shared import pack

SETTINGS = {**QUIET, "epochs": 4, "valid_metric": "NDCG@5"}  # Recall@10 of 15 items says little
MODELS = {
    "SLIFMR": {"refresh_interval": "adaptive", "prune_ratio": 0.3},
    "LightGCN": {},
    "KGAT": {},
    "NCL": {"num_clusters": 3, "warm_up_step": 2, "m_step": 1},
}


class Stop(Exception):
    """What the tuner does to a trial that it pauses."""


def trial(folder, model, pause=None, go_on=None, keep=None, data=None, **settings):
    """Run a trial; return its reports. With ``pause``, stop it when it reports that epoch."""
    config = make_config(
        model, folder.name, settings={**SETTINGS, "data_path": str(folder.parent), "epochs": 4, **settings}
    )
    reports = []

    def report(metrics, save):
        reports.append(metrics)
        if metrics["epoch"] == pause:
            keep.mkdir(exist_ok=True)
            save(keep)
            raise Stop

    with contextlib.suppress(Stop):
        run_trial(config, config["seed"], data, go_on, report)
    return reports


def scores(reports):
    return [
        (entry["epoch"], entry["score"], entry["best_score"], entry["finished"], entry["valid"]) for entry in reports
    ]


@pytest.mark.parametrize("model", MODELS)
def test_a_paused_trial_gives_what_an_unpaused_one_gives(tiny, tmp_path, model):
    whole = trial(tiny, model, **MODELS[model])
    first = trial(tiny, model, pause=2, keep=tmp_path / "paused", **MODELS[model])
    rest = trial(tiny, model, go_on=tmp_path / "paused", **MODELS[model])
    assert scores(first) + scores(rest) == scores(whole)
    assert [entry["finished"] for entry in whole] == [False, False, False, True]


@pytest.mark.parametrize("model", MODELS)
def test_a_trial_trains_as_a_plain_run_does(tiny, model):
    settings = {**SETTINGS, "data_path": str(tiny.parent), "threads": 1, **MODELS[model]}
    curve = run(model, "tiny", settings=settings).curve
    assert [(e + 1, s) for e, _, s in curve] == [x[:2] for x in scores(trial(tiny, model, threads=1, **MODELS[model]))]


@pytest.mark.parametrize("model", [*PACKAGE_MODELS, "KGAT", "LightGCN", "EASE"])
def test_trials_that_share_data_one_after_another_give_what_data_of_their_own_give(tiny, model):
    """A trial that wrote into the data would change the next one in its process."""
    config = make_config(model, "tiny", settings={**SETTINGS, "data_path": str(tiny.parent)})
    shared = pickle.loads(pack(load_trial_data(config, config["seed"])))
    for batch_size in (64, 16):
        settings = {"train_batch_size": batch_size, "epochs": 2}
        assert scores(trial(tiny, model, data=shared, **settings)) == scores(trial(tiny, model, **settings))


def test_sharing_copies_no_tensor_one_by_one(tiny):
    """Torch pickles a tensor with its storage, at several times the size and the cost: there are two for each user."""
    config = make_config("LightGCN", "tiny", settings={**SETTINGS, "data_path": str(tiny.parent)})
    packed = pack(load_trial_data(config, config["seed"]))
    assert b"_rebuild_tensor" not in packed and b"from_numpy" in packed


@pytest.mark.parametrize("model", ["EASE", "ItemKNN", "Pop"])
def test_a_model_without_epochs_reports_once_whatever_eval_step_says(tiny, model):
    settings = {"eval_step": 3, "epochs": 4}
    assert [(entry["epoch"], entry["finished"]) for entry in trial(tiny, model, **settings)] == [(1, True)]
    result = run(model, "tiny", settings={**SETTINGS, "data_path": str(tiny.parent), **settings})
    assert len(result.curve) == 1 and result.test


def test_a_checkpoint_of_other_settings_goes_on_with_the_new_ones(tiny, tmp_path):
    """As population-based training wants it: the optimiser's saved learning rate gives way."""
    folders = {name: tmp_path / name for name in ("before", "same", "frozen")}
    trial(tiny, "LightGCN", pause=2, keep=folders["before"], learning_rate=0.01)
    for name, rate in (("same", 0.01), ("frozen", 1e-12)):
        trial(tiny, "LightGCN", pause=3, go_on=folders["before"], keep=folders[name], learning_rate=rate)
    weights = {
        name: read_checkpoint(folder / CHECKPOINT)["state_dict"]["user_embedding.weight"]
        for name, folder in folders.items()
    }
    assert torch.allclose(weights["frozen"], weights["before"], atol=1e-9), "nothing moves any more"
    assert not torch.allclose(weights["same"], weights["before"], atol=1e-3)


def test_a_trial_with_all_its_epochs_has_nothing_to_report(tiny, tmp_path):
    trial(tiny, "LightGCN", pause=4, keep=tmp_path / "x")
    assert trial(tiny, "LightGCN", go_on=tmp_path / "x") == []


def test_a_lost_checkpoint_means_to_begin_again(tiny, tmp_path):
    assert scores(trial(tiny, "LightGCN", go_on=tmp_path / "nowhere")) == scores(trial(tiny, "LightGCN"))


@pytest.mark.parametrize("model", ["SLIFMR", "KGAT"])
def test_what_is_held_out_for_test_changes_nothing(tiny, tmp_path, model):
    """Two data sets with the same training and validation splits; no interaction of the test splits is shared."""
    rows = [line.split("\t") for line in (tiny / "tiny.inter").read_text().splitlines()[1:]]
    by_user = {}
    for user, item in rows:
        by_user.setdefault(user, []).append(item)
    header = "user_id:token\titem_id:token"
    settings = {"benchmark_filename": ["train", "valid", "test"], "load_col": {"inter": ["user_id", "item_id"]}}
    found, held_out = [], []
    for shift in (0, 1):
        parts = {
            "train": [(u, i) for u, items in by_user.items() for i in items[:4]],
            "valid": [(u, i) for u, items in by_user.items() for i in items[4:5]],
            "test": [(u, items[5 + shift]) for u, items in by_user.items()],
        }
        for part, pairs in parts.items():
            write_table(tiny / f"tiny.{part}.inter", header, pairs)
        held_out.append(set(parts["test"]))
        found.append(scores(trial(tiny, model, **settings)))
    assert not held_out[0] & held_out[1]
    assert found[0] == found[1]


def test_a_trial_holds_no_test_split(tiny):
    config = make_config("KGAT", "tiny", settings={**SETTINGS, "data_path": str(tiny.parent)})
    data = load_trial_data(config, config["seed"])
    n_all = len((tiny / "tiny.inter").read_text().splitlines()) - 1
    n_held = len(data.train._dataset.inter_feat) + len(data.valid._dataset.inter_feat)
    assert n_held < n_all
    seen, reached, rest = set(), [], [data.train, data.valid]
    while rest:  # everything that the loaders lead to
        value = rest.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if type(value).__name__ == "SLIFMRDataset":
            reached.append(len(value.inter_feat))
        if isinstance(value, (list, tuple, dict)):
            rest += value.values() if isinstance(value, dict) else value
        elif type(value).__module__.startswith(("recbole", "torch.utils")):
            rest += vars(value).values()
    assert sorted(reached) == sorted([len(data.train._dataset.inter_feat), len(data.valid._dataset.inter_feat)])
