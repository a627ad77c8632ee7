"""The start of a benchmark: data read once and handed on, settings checked without building models, what is told."""

import json
import pickle
from dataclasses import replace

import pandas as pd
import pytest
from conftest import QUIET, write_tiny
from finished import SETTINGS, plan_of
from recbole.model.general_recommender import BPR, EASE
from rich.console import Console

from recbole_slifmr.cli.live import LiveTable
from recbole_slifmr.errors import DataError, SettingError
from recbole_slifmr.host.settings import make_config
from recbole_slifmr.model.slifmr import SLIFMR
from recbole_slifmr.study import runs
from recbole_slifmr.study.benchmark import Variant, make_tasks, run_plan
from recbole_slifmr.study.store import DataStore
from recbole_slifmr.study.task import read_result, run_task
from recbole_slifmr.training import experiment
from recbole_slifmr.training.experiment import check_model, load_data
from recbole_slifmr.training.shared import data_key, pack_splits


@pytest.fixture
def folder(tmp_path):
    write_tiny(tmp_path)
    return tmp_path


@pytest.fixture
def reads(monkeypatch):
    """The models whose data have been read from files, in this process."""
    read, create = [], experiment.create_dataset

    def counting(config):
        read.append(config["model"])
        return create(config)

    monkeypatch.setattr(experiment, "create_dataset", counting)
    return read


DATA = [{}, {"cold_items": 0.2}, {"noise": {"interaction_add": 0.2, "kg_tail": 0.2, "feature_swap": 0.3}}]


@pytest.mark.parametrize("settings", DATA, ids=["as it is", "cold items", "noise"])
@pytest.mark.parametrize("model", ["SLIFMR", "BPR", "KGAT"])
def test_handed_on_data_give_what_files_give(folder, reads, model, settings):
    task = plan_of(folder, [model], settings=settings).tasks[0]
    run_task(task)
    alone, users = read_result(task), pd.read_parquet(task.folder / "per_user.parquet")
    store = DataStore()
    runs.check([task], store)
    reads.clear()
    run_task(task, shared=store.of(task))
    assert reads == [], "the run has read nothing"
    shared = read_result(task)
    for name in ("valid", "test", "fingerprints", "inputs", "best_epoch", "best_valid_score"):
        assert shared[name] == alone[name]
    pd.testing.assert_frame_equal(pd.read_parquet(task.folder / "per_user.parquet"), users, check_exact=True)


def test_data_are_read_once_for_all_that_read_the_same(folder, reads):
    plan = plan_of(folder, ["BPR", "SLIFMR", "LightGCN", "LATTICE"], seeds=3)
    store = DataStore()
    runs.check(plan.tasks, store)
    without_features = [model for model in reads if model in ("BPR", "LightGCN")]
    assert without_features == ["BPR"] and reads.count("SLIFMR") == 1
    shared = {task.name: store.of(task) for task in plan.tasks}
    assert all(shared.values())
    assert shared["BPR-2020"] is shared["BPR-2022"] is shared["LightGCN-2021"] is not shared["SLIFMR-2020"]


@pytest.mark.parametrize(
    "settings",
    [
        {"seed": 5, "noise": {"interaction_add": 0.2}},  # drawn with the run's seed unless it names one
        {"use_kg": False},
        {"exclude_modalities": ["text"]},
        {"cold_items": 0.1},
        {"user_inter_num_interval": "[2,inf)"},
        {"eval_args": {"split": {"RS": [0.6, 0.2, 0.2]}}},
    ],
    ids=str,
)
def test_settings_that_change_data_are_told_apart(folder, settings):
    def key(values, split_seed=1):
        return data_key(make_config("SLIFMR", "tiny", settings={"data_path": str(folder), **values}), split_seed)

    assert key({}) == key({"seed": 7, "learning_rate": 0.5, "train_batch_size": 7}) != key({}, split_seed=2)
    assert key(settings) not in (key({}), key({**settings, "seed": 9}) if "noise" in settings else None)


def test_data_that_are_to_be_stored_are_not_shared(folder):
    given = {"data_path": str(folder), "save_dataset": True}
    assert data_key(make_config("BPR", "tiny", settings=given), 1) is None


def test_a_run_reads_files_that_changed_since_they_were_read(folder, reads):
    task = plan_of(folder, ["BPR"]).tasks[0]
    store = DataStore()
    before = runs.check([task], store).fingerprints
    lines = (folder / "tiny" / "tiny.inter").read_text().splitlines()
    (folder / "tiny" / "tiny.inter").write_text("\n".join(lines[:-5]) + "\n")
    reads.clear()
    run_task(task, shared=store.of(task))
    assert reads == ["BPR"] and read_result(task)["fingerprints"] != before


def test_what_is_handed_on_holds_no_settings(folder):
    config = make_config("BPR", "tiny", settings={"data_path": str(folder)})
    splits = pickle.loads(pack_splits(experiment.read_splits(config, 1)))
    assert [data.config for data in (splits.dataset, *splits.parts)] == [None] * 4


def test_too_much_data_are_read_by_each_run(folder, monkeypatch):
    monkeypatch.setattr("recbole_slifmr.study.store.LARGEST", 10)
    task = plan_of(folder, ["BPR"]).tasks[0]
    store = DataStore()
    runs.check([task], store)
    assert store.of(task) is None


# -- checks -----------------------------------------------------------------------------------------------------------


def test_a_model_of_the_package_is_checked_without_being_built(folder, monkeypatch):
    def build(self, *arguments):
        raise AssertionError("built")

    monkeypatch.setattr(SLIFMR, "__init__", build)
    runs.check(plan_of(folder, ["SLIFMR"]).tasks)


@pytest.mark.parametrize(
    "model, settings, message",
    [
        ("SLIFMR", {"intra_views": ["sound"]}, "intra_views: 'sound' is none of interaction"),
        ("FREEDOM", {"modality_weights": {"text": 1.0}}, "modality_weights must give each of"),
        ("CEASE", {"modality_weights": {"sound": 1.0}}, "there is no modality 'sound'"),
        ("VBPR", {"exclude_modalities": ["text", "image"]}, "VBPR needs item features"),
        ("LATTICE", {"train_neg_sample_args": None}, "the model learns from sampled negative items"),
        ("XSimGCL", {"self_loop": True}, "cannot do what self_loop asks for"),
        ("SLIFMR", {"callbacks": ["nowhere:Nothing"]}, "callbacks: 'nowhere:Nothing' cannot be loaded"),
        ("SLIFMR", {"refresh_interval": "often"}, "refresh_interval must be"),
        ("BPR", {"learning_rate": -0.1}, "learning_rate must be at least 0"),
        ("BPR", {"topk": [5, 10, 20]}, "topk: 20 is more than the 15 items"),
        ("SLIFMR", {"feature_path": "nowhere"}, "there is no folder"),
    ],
)
def test_what_cannot_be_used_is_one_line_before_anything_is_trained(folder, model, settings, message):
    tasks, _ = make_tasks(
        "tiny", [Variant(model, settings)], folder / "out", seeds=1, settings={**SETTINGS, "data_path": str(folder)}
    )
    with pytest.raises((SettingError, DataError), match=f"^{model}: .*{message}") as raised:
        runs.check(tasks)
    assert "\n" not in str(raised.value) and not (folder / "out").exists()


# -- what is shown ----------------------------------------------------------------------------------------------------


def test_it_says_what_it_does_from_the_start(folder):
    told = []
    plan = plan_of(folder, ["BPR", "LightGCN"], settings={"epochs": 1})
    states = []
    run_plan(plan, tell=told.append, on_tick=lambda now: states.append(dict(now)))
    assert told == [
        "checking BPR (1 of 2)",
        "reading the data of BPR",
        "checking LightGCN (2 of 2)",
        "",
        "writing tables and plots",
    ]
    assert runs.STARTING in {now["BPR-2020"] for now in states}
    assert set(states[-1].values()) == {"done"}


def test_the_display_shows_it(folder):
    table = LiveTable(plan_of(folder, ["BPR"]).tasks)
    console = Console(width=100)
    with console.capture() as first:
        console.print(table._table())
    table.tell("checking BPR (1 of 1)")
    with console.capture() as then:
        console.print(table._table())
    assert "reading the settings" in first.get() and "checking BPR (1 of 1)" in then.get()


def test_runs_without_a_check_read_their_own_data(folder):
    task = plan_of(folder, ["BPR"]).tasks[0]
    assert DataStore().of(task) is None
    assert runs.run_all([replace(task)]) == {"BPR-2020": "done"}
    assert json.loads((task.folder / "result.json").read_text())["test"]


def test_a_model_that_is_trained_by_being_built_is_not_built_for_a_check(folder, monkeypatch):
    def build(*args):
        raise AssertionError("built")

    monkeypatch.setattr(EASE, "__init__", build)
    config = make_config("EASE", "tiny", settings={**QUIET, "data_path": str(folder)})
    check_model(config, load_data(config)[0]._dataset)
    monkeypatch.setattr(BPR, "__init__", build)
    with pytest.raises(AssertionError, match="built"):
        check_model(make_config("BPR", "tiny", settings={**QUIET, "data_path": str(folder)}), None)
