"""Many runs to one table: protocol, fingerprints, statistics, outputs, going on, failures."""

import json
import math
import multiprocessing
import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import QUIET, all_scores, write_table, write_tiny
from recbole.data.dataset import Dataset
from recbole.quick_start import run_recbole
from scipy import stats

from recbole_slifmr.errors import DataError, SettingError
from recbole_slifmr.paths import PROPERTIES
from recbole_slifmr.study import runs, statistics, tables
from recbole_slifmr.study.benchmark import benchmark, make_plan, origin_of_settings, run_plan
from recbole_slifmr.study.page import write_page
from recbole_slifmr.training.evaluation import evaluate, item_groups, mask_training_items_only
from recbole_slifmr.training.experiment import fingerprint

SETTINGS = {"epochs": 2, "topk": [5, 10], "train_batch_size": 64, "valid_metric": "Recall@10"}


@pytest.fixture
def folder(tmp_path):
    write_tiny(tmp_path)
    return tmp_path


def plan_of(folder, models=("SLIFMR", "BPR"), **arguments):
    settings = {**SETTINGS, "data_path": str(folder), **arguments.pop("settings", {})}
    return make_plan("tiny", models, **{"seeds": 1, "out": folder / "out", "settings": settings, **arguments})


# -- evaluation ------------------------------------------------------------------------------------------------------


def test_per_user_metrics_average_to_recbole_s(tiny, build):
    run = build(tiny, metrics=["Recall", "NDCG", "MAP", "ItemCoverage"])
    run.trainer.fit(run.train, run.valid, show_progress=False)
    plain = run.trainer.evaluate(run.test)
    metrics, per_user = evaluate(run.trainer, run.test, run.train)
    assert set(per_user.index) == {f"u{i}" for i in range(20)}
    for name, value in plain.items():
        assert metrics[name] == value
        if "itemcoverage" not in name:
            assert per_user[name].mean() == pytest.approx(value, abs=1e-4)


def test_scores_by_popularity_and_activity_by_hand(tiny, build):
    """Recomputed from the scores themselves, user by user."""
    run = build(tiny, topk=[3, 10])
    run.trainer.fit(run.train, run.valid, show_progress=False)
    metrics, per_user = evaluate(run.trainer, run.test, run.train)
    scores = all_scores(run)
    scores[:, 0] = -torch.inf
    for loader in (run.train, run.valid):
        data = loader._dataset.inter_feat
        scores[data["user_id"] - 1, data["item_id"]] = -torch.inf
    ranked = scores.topk(3).indices
    held_out = {}
    for user, item in zip(*(run.test._dataset.inter_feat[f].tolist() for f in ("user_id", "item_id")), strict=True):
        held_out.setdefault(user, set()).add(item)
    train = run.train._dataset.inter_feat
    popularity = torch.bincount(train["item_id"], minlength=16)[1:]
    order = sorted(range(1, 16), key=lambda i: (-popularity[i - 1], i))
    # 15 items: 3 head (up to 20%), 4 middle (up to 50%: the 7th ends at 46.7%), 8 tail
    assert set(np.flatnonzero(item_groups(run.train._dataset) == 2)) == set(order[7:])
    tail = set(order[7:])
    recalls, gains = [], []
    for user, items in held_out.items():
        wanted = items & tail
        if wanted:
            ranks = [r for r, i in enumerate(ranked[user - 1].tolist()) if i in wanted]
            recalls.append(len(ranks) / len(wanted))
            ideal = sum(1 / math.log2(r + 2) for r in range(min(len(wanted), 3)))
            gains.append(sum(1 / math.log2(r + 2) for r in ranks) / ideal)
    assert metrics["recall@3/tail"] == pytest.approx(np.mean(recalls))
    assert metrics["ndcg@3/tail"] == pytest.approx(np.mean(gains))
    groups = [metrics[f"recall@3/{name}"] for name in ("active", "average", "quiet")]
    assert np.dot(groups, [6, 7, 7]) / 20 == pytest.approx(per_user["recall@3"].mean())


def test_the_other_protocol_masks_training_items_only(tiny, build):
    run = build(tiny)
    before = {user: set(run.test.uid2history_item[user].tolist()) for user in run.test.uid_list.tolist()}
    mask_training_items_only(run.test, run.train)
    train = run.train._dataset.inter_feat
    valid = run.valid._dataset.inter_feat
    for user in run.test.uid_list.tolist():
        seen = set(train["item_id"][train["user_id"] == user].tolist())
        assert set(run.test.uid2history_item[user].tolist()) == seen
        assert before[user] == seen | set(valid["item_id"][valid["user_id"] == user].tolist())


# -- the same data ---------------------------------------------------------------------------------------------------


def test_a_fingerprint_tells_data_apart_not_ids(tiny, build):
    one, other = build(tiny, "BPR"), build(tiny, "SLIFMR")
    assert fingerprint(one.train) == fingerprint(other.train) != fingerprint(one.valid)
    (tiny / "tiny.inter").write_text((tiny / "tiny.inter").read_text().replace("\ti14", "\ti99"))
    assert fingerprint(build(tiny, "BPR").train) != fingerprint(one.train)


def test_models_with_different_data_are_refused(folder):
    plan = plan_of(folder)
    eval_args = {"split": {"RS": [0.4, 0.3, 0.3]}, "order": "RO", "group_by": "user", "mode": "full"}
    other = replace(plan.tasks[1], settings={**plan.tasks[1].settings, "eval_args": eval_args})
    with pytest.raises(DataError, match="BPR and SLIFMR have different train splits"):
        runs.check([plan.tasks[0], other])


def test_a_random_split_is_the_same_for_all_seeds(folder):
    plan = plan_of(folder, seeds=2)
    assert runs.check(plan.tasks[:1]) == runs.check(plan.tasks[1:2]) == runs.check(plan.tasks)


def test_the_seed_is_that_of_the_split_and_the_first_of_the_runs(folder):
    file = folder / "seed.yaml"
    file.write_text("seed: 5\n")
    for given, first in (({}, 2020), ({"settings": {"seed": 7}}, 7), ({"config_files": [file]}, 5)):
        plan = plan_of(folder, ["BPR"], seeds=2, **given)
        assert [(task.seed, task.split_seed) for task in plan.tasks] == [(first, first), (first + 1, first)]
    assert plan_of(folder, ["BPR"], settings={"seed": 2020}).tasks == plan_of(folder, ["BPR"]).tasks


def test_a_model_that_draws_nothing_is_run_once(folder):
    models = ["BPR", "EASE", "CEASE"]
    plan = plan_of(folder, models=models, seeds=3, settings={"noise": {"interaction_add": 0.1}})
    assert [task.title for task in plan.tasks] == [model for model in models for _ in range(3)]  # noise is drawn
    plan = plan_of(folder, models=models, seeds=3)
    assert [task.title for task in plan.tasks] == ["BPR"] * 3 + ["EASE", "CEASE"]
    frame = run_plan(plan)
    text = (plan.out / "table.md").read_text()
    row = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("| ")}
    assert "±" in row["BPR"] and "±" not in row["EASE"] + row["CEASE"]
    assert "over BPR: 3, CEASE: 1, EASE: 1 seeds" in " ".join(text.split())
    assert len(frame) == 5


def test_lightgcn_is_recbole_s_lightgcn(folder, monkeypatch):
    """Same scores as RecBole's own run_recbole on its own data set class."""
    import recbole.data.dataset

    settings = {**QUIET, "data_path": str(folder), "epochs": 3}
    monkeypatch.setattr(recbole.data.dataset, "LightGCNDataset", Dataset)
    monkeypatch.setattr("sys.argv", ["pytest"])  # RecBole's Config reads them
    plain = run_recbole("LightGCN", "tiny", config_dict=dict(settings))
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    from recbole_slifmr.training.experiment import run

    ours = run("LightGCN", "tiny", settings=settings)
    assert ours.test == dict(plain["test_result"]) and ours.valid == dict(plain["best_valid_result"])


# -- statistics ------------------------------------------------------------------------------------------------------


def test_holm_by_hand():
    assert statistics.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert statistics.holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert statistics.holm([]) == []


def users_table():
    rng = np.random.default_rng(0)
    base = rng.random(60)
    rows = []
    for model, gain in (("SLIFMR", 0.10), ("A", 0.0), ("B", 0.09)):
        for seed in (1, 2):
            values = base + gain + 0.05 * rng.normal(size=60)
            rows += [{"user": f"u{i}", "model": model, "seed": seed, "recall@20": v} for i, v in enumerate(values)]
    return pd.DataFrame(rows)


def test_comparisons_are_paired_over_users_and_corrected():
    users = users_table()
    found = {c.model: c for c in statistics.compare(users, "recall@20", "SLIFMR")}
    means = users.pivot_table(index="user", columns="model", values="recall@20")
    raw = [stats.wilcoxon(means["SLIFMR"] - means[m]).pvalue for m in ("A", "B")]
    assert found["A"].p_wilcoxon == pytest.approx(min(1, 2 * raw[0]))
    assert found["B"].p_wilcoxon == pytest.approx(max(2 * raw[0], raw[1]))
    assert found["A"].p_t < 0.001 and found["A"].difference == pytest.approx(0.1, abs=0.03)


def test_a_model_equal_to_the_reference_is_no_different():
    users = users_table()
    twin = users[users.model == "SLIFMR"].assign(model="twin")
    found = statistics.compare(pd.concat([users, twin]), "recall@20", "SLIFMR")
    assert next(c for c in found if c.model == "twin").p_wilcoxon == 1.0


def test_improvement_is_over_the_best_other_model_with_an_interval():
    users = users_table()
    means = users.groupby("model")["recall@20"].mean()
    gain = statistics.improvement(users, "recall@20", "SLIFMR")
    assert gain.best == "B"
    assert gain.relative == pytest.approx(means["SLIFMR"] / means["B"] - 1)
    assert gain.low < gain.relative < gain.high


def test_the_table_marks_best_second_and_significant():
    runs = pd.DataFrame({"model": ["SLIFMR", "SLIFMR", "A", "B"], "seed": [1, 2, 1, 1],
                         "test_recall@20": [0.30, 0.32, 0.10, 0.20],
                         "test_giniindex@20": [0.5, 0.5, 0.4, 0.9]})  # fmt: skip
    table = tables.cells(
        statistics.summarise(runs), ["recall@20", "giniindex@20"],
        {"recall@20": [statistics.Comparison("A", 0.2, 0.001, 0.2), statistics.Comparison("B", 0.1, 0.03, 0.2)]},
    )  # fmt: skip
    text = tables.markdown(["SLIFMR", "A", "B"], ["recall@20", "giniindex@20"], table, "caption")
    assert "| SLIFMR | **0.3100** ± 0.0141 | <u>0.5000</u> ± 0.0000 |" in text
    assert r"| A | 0.1000\*\* | **0.4000** |" in text, "a smaller Gini index is better"
    assert r"| B | <u>0.2000</u>\* | 0.9000 |" in text
    tex = tables.latex(["SLIFMR", "A", "B"], ["recall@20"], table, "50% & more_")
    assert r"\textbf{0.3100}" in tex and r"\underline{0.2000}$^{*}$" in tex and r"50\% \& more\_" in tex
    assert r"\toprule" in tex


# -- whole benchmarks ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_benchmark_writes_everything_and_goes_on_where_it_stopped(folder, monkeypatch):
    monkeypatch.chdir(folder)
    arguments = {
        "dataset": "tiny", "models": ["SLIFMR", "BPR"], "seeds": 1, "out": folder / "out",
        "settings": {**SETTINGS, "data_path": str(folder)},
    }  # fmt: skip
    runs = benchmark(**arguments)
    assert list(runs["model"]) == ["SLIFMR", "BPR"]
    written = {path.name for path in (folder / "out").iterdir()}
    assert written == {
        "results.csv", "results.json", "per_user.parquet", "table.md", "table.tex", "curves.png", "bars.png",
        "manifest.json", "runs", ".lock",
    }  # fmt: skip
    manifest = json.loads((folder / "out" / "manifest.json").read_text())
    assert set(manifest["fingerprints"]) == {"train", "valid", "test"} and manifest["versions"]["torch"]
    results = json.loads((folder / "out" / "results.json").read_text())
    assert results["models"]["SLIFMR"]["test_recall@10"]["mean"] == runs["test_recall@10"][0]
    caption = (folder / "out" / "table.md").read_text()
    for text in ("at most 2 epochs, patience 10", "validation Recall@10", "training and validation", "defaults"):
        assert text in " ".join(caption.split())
    assert "one seed: stars and intervals are over the users of one training run" in results["caption"]
    assert max(map(len, caption.splitlines())) <= 120
    page = write_page([folder / "out"], folder / "report.html").read_text()
    assert "Benchmark on tiny" in page and caption.splitlines()[-1].split("*")[0] in page
    assert page.count("data:image/png") == 2
    users = pd.read_parquet(folder / "out" / "per_user.parquet")
    assert len(users) == 40 and users["recall@10"].between(0, 1).all()

    # a finished run is not run again; one whose settings changed is; more seeds only add
    stamp = (folder / "out/runs/SLIFMR-2020/result.json").stat().st_mtime_ns
    (folder / "out/runs/BPR-2020/result.json").unlink()
    again = benchmark(**arguments)
    assert (folder / "out/runs/SLIFMR-2020/result.json").stat().st_mtime_ns == stamp
    numbers = [column for column in runs if column.startswith(("test_", "valid_"))]
    pd.testing.assert_frame_equal(again[numbers], runs[numbers])
    changed = benchmark(**{**arguments, "settings": {**arguments["settings"], "epochs": 1}})
    assert list(changed["epochs"]) == [1, 1]


@pytest.mark.slow
def test_ray_gives_what_the_serial_runs_give(folder, monkeypatch):
    monkeypatch.chdir(folder)
    serial, parallel = plan_of(folder), plan_of(folder, out=folder / "ray")
    assert set(runs.run_all(serial.tasks).values()) == {"done"}
    assert set(runs.run_all(parallel.tasks, jobs=2).values()) == {"done"}
    (one, users), (other, other_users) = runs.collect(serial.tasks), runs.collect(parallel.tasks)
    numbers = [column for column in one if column.startswith(("test_", "valid_"))]
    pd.testing.assert_frame_equal(one[numbers], other[numbers], check_exact=True)
    pd.testing.assert_frame_equal(users, other_users, check_exact=True)


@pytest.mark.slow
def test_ray_says_which_process_it_has_lost(folder, monkeypatch):
    monkeypatch.chdir(folder)
    (whole,), (deadly,) = (
        plan_of(folder, models=["SLIFMR"], out=folder / name, settings={"callbacks": callbacks}).tasks
        for name, callbacks in (("whole", []), ("deadly", ["probe:Deadly"]))
    )
    deadly = replace(deadly, seed=whole.seed + 1)
    states = runs.run_all([whole, deadly], jobs=2)
    assert states[whole.name] == "done"
    assert states[deadly.name].startswith("Ray lost its process: ") and "\n" not in states[deadly.name]


@pytest.mark.slow
def test_a_failing_model_does_not_lose_the_others(folder, monkeypatch):
    monkeypatch.chdir(folder)
    plan = plan_of(folder, models=("BPR", "SLIFMR"))
    bad = replace(plan.tasks[0], settings={**plan.tasks[0].settings, "learning_rate": 1e30, "learner": "sgd"})
    states = runs.run_all([bad, plan.tasks[1]])
    assert states["SLIFMR-2020"] == "done"
    assert "nan" in states["BPR-2020"].lower()
    assert runs.read_result(bad) is None


def _die(task):
    import os
    import signal

    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_run_says_so(folder, monkeypatch):
    monkeypatch.setattr(runs, "run_task", _die)
    task = plan_of(folder).tasks[0]
    task.folder.mkdir(parents=True)
    context = multiprocessing.get_context("spawn")
    monkeypatch.setattr(runs.multiprocessing, "get_context", lambda kind: context)
    assert runs.run_all([task]) == {task.name: "killed by SIGKILL (out of memory?)"}


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"models": []}, "no models to run"),
        ({"models": ["BPR", "BPR"]}, "a model is named twice"),
        ({"seeds": 0}, "seeds and threads must be at least 1"),
        ({"test_mask": "none"}, "test_mask must be one of train_valid, train"),
        ({"params": "nowhere"}, "params: there is no folder nowhere"),
        ({"config_files": ["no.yaml"]}, "config file .*no.yaml not found"),
        ({"config_files": ["latin.yaml"]}, "config file .*latin.yaml is not YAML"),
        ({"params": "latin"}, "config file .*BPR.yaml is not YAML"),
        ({"settings": {"data_path": None}}, "data_path must name a folder, not None"),
        ({"settings": {"data_path": 1}}, "data_path must name a folder, not 1"),
        ({"settings": {"seed": "a"}}, "seed must be a whole number from 0, not 'a'"),
        ({"settings": {"model": "EASE"}}, "model is no setting for all models: name them with --models"),
    ],
)
def test_a_plan_that_cannot_work_is_refused(folder, monkeypatch, arguments, message):
    monkeypatch.chdir(folder)
    (folder / "latin").mkdir()
    for file in ("latin.yaml", "latin/BPR.yaml"):
        (folder / file).write_bytes("# größer\nn_layers: 2\n".encode("latin-1"))
    models = arguments.pop("models", ["BPR"])
    with pytest.raises(SettingError, match=message):
        plan_of(folder, models, **arguments)


@pytest.mark.parametrize(
    "models, settings, message",
    [
        (["BPR", "Lightgcn"], {}, "Lightgcn: unknown model 'Lightgcn'.*did you mean 'LightGCN'"),
        (["BPR", "KGAT"], {"no_kg": True}, r"KGAT: .*tiny\.kg not found: KGAT needs a knowledge graph"),
        (["BPR"], {"eta_kgg": 1}, "unknown setting 'eta_kgg'"),
    ],
)
def test_bad_input_is_named_before_anything_is_trained(folder, models, settings, message):
    import warnings

    from recbole_slifmr.errors import UnknownSettingWarning

    if settings.pop("no_kg", False):
        (folder / "tiny" / "tiny.kg").unlink()
    plan = plan_of(folder, models, settings=settings)
    with warnings.catch_warnings(), pytest.raises((DataError, SettingError, UnknownSettingWarning), match=message):
        warnings.simplefilter("error", UnknownSettingWarning)
        runs.check(plan.tasks)
    assert not list(folder.rglob("*.json"))


def test_tuned_settings_come_from_files_and_are_told(folder):
    params = folder / "params"
    (params / "SLIFMR").mkdir(parents=True)
    (params / "SLIFMR" / "best.yaml").write_text("# trials: 12\nrefresh_k: 3\n")
    (params / "BPR.yaml").write_text("embedding_size: 8\n")
    plan = plan_of(folder, ["SLIFMR", "BPR", "LightGCN"], params=params)
    assert plan.tuned == {"SLIFMR": 12, "BPR": None}
    stated = (PROPERTIES / "model" / "SLIFMR.yaml").read_text(encoding="utf-8")
    by_hand = re.search(r"^# runs behind the defaults: (.+)$", stated, re.MULTILINE)[1]
    assert origin_of_settings(plan) == (
        f"Settings: SLIFMR (defaults from {by_hand}, then 12 trials), BPR (trials unknown), LightGCN (defaults)."
    )
    by_model = {task.model: task for task in plan.tasks}
    from recbole_slifmr.host.settings import make_config

    assert make_config(**by_model["SLIFMR"].arguments)["refresh_k"] == 3
    assert by_model["LightGCN"].config_files == ()
    before = by_model["BPR"].key()
    (params / "BPR.yaml").write_text("embedding_size: 16\n")
    assert by_model["BPR"].key() != before


def test_the_command_ends_with_the_table(folder, monkeypatch, capsys):
    from recbole_slifmr.cli import main

    monkeypatch.chdir(folder)
    write_table(folder / "x.txt", "a", [])
    with pytest.raises(SystemExit) as stop:
        main(["benchmark", "--dataset=tiny", "--models=BPR", "--seeds=1", f"--data_path={folder}", "--epochs=1",
              "--topk=[5]", "--valid_metric=Recall@5", "--out=bench"])  # fmt: skip
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert "| BPR |" in shown and "outputs: bench" in shown
    with pytest.raises(SystemExit) as stop:
        main(["benchmark", "--dataset=tiny", "--models=BPR", f"--data_path={folder}", "--epochs=abc", "--out=bench2"])
    assert stop.value.code == 2 and "epochs must be a whole number, not 'abc'" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main(["benchmark", "--dataset=tiny", "--models=BPRR", f"--data_path={folder}", "--topk=[5]", "--out=bench2"])
    assert stop.value.code == 2 and "unknown model 'BPRR'" in capsys.readouterr().err
    assert not (folder / "bench2").exists()


@pytest.mark.parametrize("n_gpus, jobs, share", [(0, 4, 0), (1, 1, 1), (1, 3, 1 / 3), (2, 3, 0.5), (4, 2, 1)])
def test_jobs_share_the_gpus(n_gpus, jobs, share):
    assert runs.gpu_share(n_gpus, jobs) == share


def test_a_job_uses_the_gpu_that_ray_gave_it(monkeypatch, tmp_path):
    """Without it every job would take RecBole's ``gpu_id``, the first of the machine."""
    given = []

    def stop(**arguments):
        given.append(arguments["settings"].get("gpu_id"))
        raise ValueError("far enough")

    monkeypatch.setattr("recbole_slifmr.training.experiment.run", stop)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    for number, settings in enumerate(({}, {"gpu_id": ""})):
        with pytest.raises(SystemExit):
            runs._run_on_share(runs.Task("BPR", 1, "tiny", tmp_path / str(number), settings=settings))
    assert given == ["3", ""], "a run that is told to stay on the CPU does"
