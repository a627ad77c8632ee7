"""A result belongs to the data, the settings and the code that it was made with, or it is not taken for one."""

import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from conftest import write_table, write_tiny
from finished import SETTINGS, finish, plan_of

from recbole_slifmr import paths
from recbole_slifmr.errors import DataError, SettingError
from recbole_slifmr.study import identity, runs
from recbole_slifmr.study.benchmark import Variant, make_tasks
from recbole_slifmr.study.task import read_error, read_result, run_task
from recbole_slifmr.training import experiment
from recbole_slifmr.training.fingerprint import fingerprint, input_fingerprints


@pytest.fixture
def folder(tmp_path):
    write_tiny(tmp_path)
    return tmp_path


# -- the data --------------------------------------------------------------------------------------------------------


def test_the_files_of_a_data_set_whose_name_has_signs_of_a_pattern_are_hashed(tmp_path):
    names = ["a[1]", "a*", "a"]
    for name in names:
        write_tiny(tmp_path, name)
    for name in names:
        found = identity.input_hashes("BPR", name, settings={"data_path": str(tmp_path)})
        assert {file for file in found if file.endswith(".inter")} == {f"{name}.inter"}


def half_of_the_interactions(data):
    lines = (data / "tiny.inter").read_text().splitlines()
    (data / "tiny.inter").write_text("\n".join(lines[: len(lines) // 2]) + "\n")


def another_text_npy(data):
    np.save(data / "text.npy", np.load(data / "text.npy") + 1)


def another_kg(data):
    (data / "tiny.kg").write_text((data / "tiny.kg").read_text().replace("\tr1\t", "\tr0\t"))


def one_more_modality(data):
    shutil.copy(data / "text.npy", data / "more.npy")


@pytest.mark.parametrize(
    ("change", "changed"),
    [
        (half_of_the_interactions, {"SLIFMR", "BPR"}),
        (another_text_npy, {"SLIFMR"}),
        (another_kg, {"SLIFMR"}),
        (one_more_modality, {"SLIFMR"}),
    ],
)
def test_a_run_on_other_data_is_not_taken_for_this_one(folder, change, changed):
    """A model that does not read what has changed keeps its run."""
    tasks = plan_of(folder).tasks
    for task in tasks:
        finish(task)
    assert all(map(read_result, tasks))
    change(folder / "tiny")
    assert {task.model for task in tasks if read_result(task) is None} == changed
    elsewhere = [replace(task, folder=folder / task.name) for task in tasks]
    assert runs.take_over(elsewhere, [folder / "out"]) == 2 - len(changed)


def test_a_file_that_a_setting_names_is_part_of_the_run(folder):
    weights = folder / "weights.pth"
    weights.write_bytes(b"one")
    task = plan_of(folder, ["NeuMF"], settings={"mf_pretrain_path": str(weights)}).tasks[0]
    before = task.key()
    weights.write_bytes(b"two")
    assert task.key() != before


def test_a_callback_of_the_user_s_is_part_of_the_run(folder, monkeypatch):
    monkeypatch.syspath_prepend(folder)
    (folder / "my_callback.py").write_text("one = 1\n")
    task = plan_of(folder, ["SLIFMR"], settings={"callbacks": ["my_callback:Mine"]}).tasks[0]
    before = task.key()
    (folder / "my_callback.py").write_text("one = 2\n")
    assert task.key() != before


def test_features_that_are_made_on_first_use_keep_their_name(folder, monkeypatch):
    """Those of ml-100k are: the process that made them and one that starts after it are to agree."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(paths, "ROOT", folder)
    settings = {"data_path": str(folder), "feature_path": "made", "modalities": {"text": "text.npy"}}
    before = identity.input_hashes("SLIFMR", "tiny", [], settings)
    (folder / "made").mkdir()
    shutil.copy(folder / "tiny" / "text.npy", folder / "made")
    after = identity.input_hashes("SLIFMR", "tiny", [], settings)
    monkeypatch.setattr(identity, "_sources", {})  # as in a process that starts now
    assert identity.input_hashes("SLIFMR", "tiny", [], settings) == after != before


def test_files_are_hashed_once(folder, monkeypatch):
    tasks = plan_of(folder).tasks
    keys = [task.key() for task in tasks]
    monkeypatch.setattr(identity.hashlib, "file_digest", None)
    monkeypatch.setattr(identity, "make_config", None)
    assert [task.key() for task in tasks] == keys


# -- the code --------------------------------------------------------------------------------------------------------


def test_a_run_of_other_code_is_not_taken_for_this_one(folder, monkeypatch):
    """What trains and scores counts; a repaired report must not cost the runs."""
    copy = folder / "package"
    shutil.copytree(identity.PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    original = identity.code_hash.__wrapped__
    monkeypatch.setattr(identity, "PACKAGE", copy)
    monkeypatch.setattr(identity, "code_hash", original)
    task = plan_of(folder).tasks[0]
    finish(task)
    for file in ("study/plots.py", "cli/live.py"):
        with (copy / file).open("a") as source:
            source.write("# changed\n")
    assert read_result(task)
    with (copy / "nn" / "loss.py").open("a") as source:
        source.write("# changed\n")
    assert read_result(task) is None
    assert read_error(task) == "its data, settings or code changed after it ran: run it again"


def test_a_run_with_another_library_is_not_taken_for_this_one(folder, monkeypatch):
    before = identity.code_hash.__wrapped__()
    monkeypatch.setattr(identity.importlib.metadata, "version", lambda name: "99.0")
    assert identity.code_hash.__wrapped__() != before


def test_data_that_change_while_a_run_goes_on_are_no_result(folder, monkeypatch):
    task = plan_of(folder, ["BPR"]).tasks[0]

    def training(**arguments):
        half_of_the_interactions(folder / "tiny")
        return SimpleNamespace(per_user=pd.DataFrame({"recall@10": [0.5]}))

    monkeypatch.setattr(experiment, "run", training)
    with pytest.raises(SystemExit):
        run_task(task)
    assert read_result(task) is None
    assert read_error(task) == "its data, settings or code changed while it ran: start it again"


def test_a_run_that_belongs_to_other_data_by_the_end_is_named_as_missing(folder, monkeypatch):
    tasks = plan_of(folder).tasks
    for task in tasks:
        finish(task)

    def on_tick(states):
        another_kg(folder / "tiny")

    states = runs.run_all(tasks, on_tick=on_tick)
    assert states == {
        "SLIFMR-2020": "its data, settings or code changed after it ran: run it again",
        "BPR-2020": "done",
    }
    assert list(runs.collect(tasks)[0]["model"]) == ["BPR"]


# -- every row -------------------------------------------------------------------------------------------------------


def test_variants_whose_labels_differ_in_signs_only_are_two_rows(folder):
    settings = {**SETTINGS, "data_path": str(folder)}
    variants = [
        Variant("BPR", {"embedding_size": 8}, "size 8"),
        Variant("BPR", {"embedding_size": 16}, "size, 8"),
        Variant("BPR", {"embedding_size": 32}, "SIZE 8"),
        Variant("BPR", {"embedding_size": 8}, "the same"),
    ]
    tasks, _ = make_tasks("tiny", variants, folder / "out", seeds=1, settings=settings)
    assert tasks[0].folder.name == "size_8-2020" and tasks[3].folder == tasks[0].folder
    assert len({str(task.folder).casefold() for task in tasks}) == 3, "also where A and a are the same file"
    for task, score in zip(tasks, (0.1, 0.2, 0.3), strict=False):
        finish(task, test={"recall@10": score})
    assert set(runs.run_all(tasks).values()) == {"done"}
    assert runs.collect(tasks)[0].set_index("model")["test_recall@10"].to_dict() == {
        "size 8": 0.1, "size, 8": 0.2, "SIZE 8": 0.3, "the same": 0.1,
    }  # fmt: skip


def test_runs_that_would_hide_each_other_are_refused(folder):
    task = plan_of(folder, ["BPR"]).tasks[0]
    with pytest.raises(ValueError, match="two runs are called BPR-2020"):
        runs.run_all([task, task])
    with pytest.raises(ValueError, match="BPR-2020 and other-2020 are different runs, but share the folder"):
        runs.run_all([task, replace(task, label="other", settings={**task.settings, "epochs": 3})])


def test_half_a_result_is_none(folder):
    task, other = plan_of(folder).tasks
    finish(task)
    text = (task.folder / "result.json").read_text()
    for damaged in (text[: len(text) // 2], "[]", "", "\x00"):
        (task.folder / "result.json").write_text(damaged)
        assert read_result(task) is None
        assert runs.take_over([replace(task, folder=folder / "new")], [folder / "out"]) == 0
    finish(other)
    (other.folder / "per_user.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"per_user.parquet cannot be read .* delete .*BPR-2020 and run it again"):
        runs.collect([other])
    (other.folder / "per_user.parquet").unlink()
    assert read_result(other) is None


# -- fingerprints ----------------------------------------------------------------------------------------------------


def read_inputs(run):
    return input_fingerprints(run.train._dataset)


def test_fingerprints_cover_the_knowledge_graph_and_the_features(tiny, build):
    one = build(tiny, "SLIFMR")
    before = read_inputs(one)
    assert set(before) == {"knowledge graph", "features 'text'", "features 'image'"}
    assert read_inputs(build(tiny, "KGAT")) == {"knowledge graph": before["knowledge graph"]}
    assert read_inputs(build(tiny, "BPR")) == {}
    another_text_npy(tiny)
    after = read_inputs(build(tiny, "SLIFMR"))
    assert {name for name in after if after[name] != before[name]} == {"features 'text'"}
    another_kg(tiny)
    assert read_inputs(build(tiny, "KGAT"))["knowledge graph"] != before["knowledge graph"]


def test_the_order_of_the_rows_and_with_it_the_ids_do_not_matter(tiny, build):
    """Nothing changes if the files list the same in another order, which gives other ids."""
    split = {"eval_args": {"split": {"RS": [1.0, 0.0, 0.0]}, "order": "RO", "group_by": None, "mode": "full"}}
    one = build(tiny, "SLIFMR", **split)
    for name in ("tiny.inter", "tiny.kg", "tiny.link"):
        header, *rows = (tiny / name).read_text().splitlines()
        write_table(tiny / name, header, [row.split("\t") for row in reversed(rows)])
    other = build(tiny, "SLIFMR", **split)
    tokens = [run.dataset.field2id_token["item_id"].tolist() for run in (one, other)]
    assert tokens[0] != tokens[1], "other ids"
    assert fingerprint(one.train) == fingerprint(other.train)
    assert read_inputs(one) == read_inputs(other)


def test_every_model_with_a_knowledge_graph_has_the_same(tiny, build):
    found = {
        model: read_inputs(build(tiny, model))["knowledge graph"] for model in ("KGAT", "CKE", "RippleNet", "KGIN")
    }
    assert len(set(found.values())) == 1, found


def test_models_with_other_features_are_refused(folder):
    """A file of tuned settings may name other features; a variant of a study says so in its row."""
    shutil.copytree(folder / "tiny", folder / "other")
    another_text_npy(folder / "other")
    params = folder / "params"
    params.mkdir()
    (params / "VBPR.yaml").write_text(f"feature_path: {folder / 'other'}\nuse_kg: False\n")
    with pytest.raises(DataError, match="VBPR and SLIFMR have different versions of the features 'text'"):
        runs.check(plan_of(folder, ["SLIFMR", "VBPR"], params=params).tasks)
    variants = [Variant("SLIFMR"), Variant("SLIFMR", {"feature_path": str(folder / "other")}, "other features")]
    tasks, _ = make_tasks("tiny", variants, folder / "out", seeds=1, settings={**SETTINGS, "data_path": str(folder)})
    assert set(runs.check(tasks).inputs) == {"knowledge graph", "features 'text'", "features 'image'"}


def test_finished_runs_with_other_features_are_refused(folder):
    tasks = plan_of(folder).tasks
    finish(tasks[0], inputs={"features 'text'": "x"})
    finish(tasks[1], inputs={"features 'text'": "y"})
    with pytest.raises(DataError, match=r"BPR-2020 and SLIFMR-2020 have different versions of the features 'text'"):
        runs.collect(tasks)


def test_full_and_sampled_ranking_do_not_stand_in_one_table(folder):
    params = folder / "params"
    params.mkdir()
    (params / "BPR.yaml").write_text("eval_args: {mode: uni5}\n")
    plan = plan_of(folder, ["LightGCN", "BPR"], params=params)
    with pytest.raises(SettingError, match=r"LightGCN is scored by .*full.* and BPR by .*uni5.*: their scores cannot"):
        runs.check(plan.tasks)
    with pytest.raises(SettingError, match="BPR: scores by user and group need all items ranked"):
        runs.check(plan.tasks[1:])


# -- which epoch -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metric", "scores", "best"),
    [
        ("GiniIndex@10", [0.9, 0.2, 0.5, 0.4], 1),
        ("GiniIndex@10", [0.9, 0.2, 0.2, 0.4], 2),
        ("Recall@10", [0.1, 0.4, 0.4, 0.2], 2),
        ("Recall@10", [0.1, float("nan"), 0.05, float("nan")], 0),
    ],
)
def test_the_best_epoch_is_the_one_that_the_trainer_keeps(folder, monkeypatch, metric, scores, best):
    from recbole.trainer import Trainer

    original, left, points = Trainer._valid_epoch, list(scores), []
    monkeypatch.setattr(Trainer, "_valid_epoch", lambda *a, **k: (left.pop(0), original(*a, **k)[1]))
    settings = {**SETTINGS, "data_path": str(folder), "epochs": 4, "metrics": ["Recall", "GiniIndex"]}
    settings |= {"valid_metric": metric, "show_progress": False, "state": "ERROR"}
    result = experiment.run("BPR", "tiny", settings=settings, on_valid=lambda *point: points.append(point))
    assert result.best_epoch == best
    assert [epoch for epoch, _, _, is_best in points if is_best][-1] == best
    from recbole_slifmr.training.checkpoint import read_checkpoint

    assert read_checkpoint(result.checkpoint)["epoch"] == best


def test_without_validation_the_last_epoch_is_tested(folder):
    settings = {**SETTINGS, "data_path": str(folder), "eval_step": 0, "show_progress": False, "state": "ERROR"}
    result = experiment.run("BPR", "tiny", settings=settings)
    assert result.curve == [] and result.best_epoch == 1


def test_tables_take_the_epoch_that_the_run_names(folder):
    task = plan_of(folder, ["SLIFMR"]).tasks[0]
    signs = [{"epoch": 0, "smoothing": 0.1}, {"epoch": 1, "smoothing": 0.2}, {"epoch": 2, "smoothing": None}]
    curve = [[0, 1.0, 0.9], [1, 2.0, 0.2], [2, 3.0, 0.2]]
    finish(task, curve=curve, best_epoch=1, traces={"diagnostics": signs})
    frame, _ = runs.collect([task])
    assert frame["best_epoch"][0] == 1 and frame["smoothing"][0] == 0.2
    finish(task, curve=curve, best_epoch=2, traces={"diagnostics": signs}, test={"recall@10": None})
    frame, _ = runs.collect([task])
    assert frame["best_epoch"][0] == 2 and np.isnan(frame["smoothing"][0]) and np.isnan(frame["test_recall@10"][0])


# -- who is scored ---------------------------------------------------------------------------------------------------


def test_users_without_test_items_are_absent_and_a_pair_twice_counts_once(folder, monkeypatch):
    data = folder / "tiny"
    rows = [line.split("\t") for line in (data / "tiny.inter").read_text().splitlines()[1:]]
    parts = {name: [] for name in ("train", "valid", "test")}
    for number, row in enumerate(sorted(rows)):
        part = {0: "test", 1: "valid"}.get(number % 7, "train")
        part = "train" if row[0] in ("u3", "u5") and part == "test" else part
        parts[part].append(row)
    settings = {"benchmark_filename": ["train", "valid", "test"], "epochs": 1, "show_progress": False}
    settings = {**SETTINGS, "data_path": str(folder), "state": "ERROR", **settings}

    def score(rows):
        for name, lines in {**parts, "test": rows}.items():
            write_table(data / f"tiny.{name}.inter", "user_id:token\titem_id:token", lines)
        return experiment.run("BPR", "tiny", settings=settings, detailed=True)

    once, twice = score(parts["test"]), score([*parts["test"], *parts["test"][:4]])
    assert set(once.per_user.index) == {f"u{i}" for i in range(20)} - {"u3", "u5"}
    assert not once.per_user.isna().any(axis=None)
    assert once.test["recall@10"] == pytest.approx(once.per_user["recall@10"].mean(), abs=1e-4)
    pd.testing.assert_frame_equal(once.per_user, twice.per_user)
    assert once.test == pytest.approx(twice.test, nan_ok=True, abs=0)
