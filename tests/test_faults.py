"""Whatever goes wrong in or after a benchmark, what is finished stays, and the fault is named in a line."""

import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pandas as pd
import pytest
from click import ClickException
from conftest import write_tiny
from filelock import FileLock
from finished import SETTINGS, finish, plan_of

from recbole_slifmr.cli import main
from recbole_slifmr.cli.live import LiveTable, run_live
from recbole_slifmr.errors import DataError, ReportError, SettingError, one_line
from recbole_slifmr.files import to_json, write_json
from recbole_slifmr.study import benchmark, manifest, plots, runs, tables
from recbole_slifmr.study.benchmark import run_plan
from recbole_slifmr.study.outputs import run_study
from recbole_slifmr.study.plan import make_study
from recbole_slifmr.study.task import read_error, read_progress, read_result, run_task
from recbole_slifmr.training import experiment, memory


@pytest.fixture
def folder(tmp_path):
    write_tiny(tmp_path)
    return tmp_path


def no_such_number(text):
    raise AssertionError(f"{text} is not JSON")


def read_json(file):
    return json.loads(file.read_text(), parse_constant=no_such_number)


# -- reports ---------------------------------------------------------------------------------------------------------


def test_metrics_that_no_user_has_do_not_end_the_report(folder):
    plan = plan_of(folder, settings={"metrics": ["ItemCoverage", "Recall"], "topk": [5], "valid_metric": "Recall@5"})
    for task in plan.tasks:
        finish(task, test={"itemcoverage@5": 0.5, "recall@5": 0.25})
    run_plan(plan)
    results = read_json(plan.out / "results.json")
    assert set(results["comparisons"]) == set(results["improvement"]) == {"recall@5"}
    assert (plan.out / "table.md").read_text().startswith("| model | Itemcoverage@5 | Recall@5 |")


def one_user(task):
    """Leave of a finished run the scores of one user."""
    file = task.folder / "per_user.parquet"
    pd.read_parquet(file).iloc[:1].to_parquet(file)


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_one_user_has_a_table_without_an_interval(folder):
    plan = plan_of(folder, ["BPR", "Pop"])
    for task, score in zip(plan.tasks, (0.25, 0.5), strict=True):
        finish(task, test={"recall@10": score})
        one_user(task)
    users = pd.read_parquet(plan.tasks[0].folder / "per_user.parquet")
    (users * 2).to_parquet(plan.tasks[0].folder / "per_user.parquet")
    run_plan(plan)
    assert "| BPR | <u>0.2500</u> |" in (plan.out / "table.md").read_text()
    results = read_json(plan.out / "results.json")
    assert results["improvement"]["recall@10"] == {"best": "Pop", "relative": 1.0, "low": None, "high": None}
    assert results["comparisons"]["recall@10"][0]["p_t"] == 1.0


def test_one_user_has_a_table_of_losses_without_an_interval(folder):
    changes = {"models": ["SLIFMR", "BPR"], "kinds": ["interaction"], "levels": [0, 0.5]}
    study = make_study("robustness", "tiny", changes, folder / "out", settings={**SETTINGS, "data_path": str(folder)},
                       seeds=1)  # fmt: skip
    for task in study.tasks:
        finish(task)
        one_user(task)
    run_study(study)
    assert "| BPR | 0.2500 | 0.2500 | 0.0 | +0.0 |" in (study.out / "table.md").read_text()


@pytest.mark.parametrize(
    ("name", "changes", "metrics"),
    [
        ("interval", {"intervals": ["off"]}, ["Recall"]),
        ("interval", {"intervals": [1, "off"]}, ["ItemCoverage"]),
        ("robustness", {"models": ["SLIFMR", "BPR"], "kinds": ["kg"], "levels": [0, 0.5]}, ["ItemCoverage"]),
        ("sensitivity", {"vary": {"n_layers": [1, 2]}}, ["ItemCoverage"]),
        ("sensitivity", {"vary": {"exclude_modalities": [[], ["text"]]}}, ["Recall"]),
        ("coldstart", {"models": ["BPR"]}, ["ItemCoverage"]),
        ("ablation", {}, ["ItemCoverage"]),
    ],
)
def test_every_study_reports_with_whatever_was_measured(folder, name, changes, metrics):
    metric = f"{metrics[0]}@10"
    settings = {**SETTINGS, "data_path": str(folder), "metrics": metrics, "valid_metric": metric}
    study = make_study(name, "tiny", changes, folder / "out", settings=settings, seeds=1)
    for task in study.tasks:
        finish(task, test={metric.lower(): 0.25})
    assert len(run_study(study)) == len(study.tasks)
    assert "0.2500" in (study.out / "table.md").read_text()
    read_json(study.out / "results.json")


def test_a_report_that_fails_leaves_the_data_and_says_so_in_a_line(folder, monkeypatch, capsys):
    def fail(*arguments):
        raise RuntimeError("no \x1b[1mink\x1b[0m\nat all")

    monkeypatch.setattr(plots, "plot_bars", fail)
    plan = plan_of(folder, ["BPR"])
    finish(plan.tasks[0])
    with pytest.raises(ReportError, match=r"results.csv, but a table or plot cannot be written: RuntimeError: no ink$"):
        run_plan(plan)
    assert list(pd.read_csv(plan.out / "results.csv")["test_recall@10"]) == [0.25]
    settings = [f"--{name}={value}" for name, value in {**SETTINGS, "data_path": folder}.items()]
    with pytest.raises(SystemExit) as stop:
        main(["benchmark", "--dataset=tiny", "--models=BPR", "--seeds=1", f"--out={plan.out}", *settings])
    assert stop.value.code == 1
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "the runs are done" in lines[0], err
    assert read_result(plan.tasks[0])


def test_a_manifest_belongs_to_the_tables_beside_it(folder, monkeypatch):
    plan = plan_of(folder, ["BPR"])
    finish(plan.tasks[0])
    run_plan(plan)
    made = [(plan.out / name).read_text() for name in ("manifest.json", "table.md")]
    changed = plan_of(folder, ["BPR"], settings={"epochs": 1})
    with monkeypatch.context() as patch:
        patch.setattr(benchmark, "run_all", lambda tasks, *rest: dict.fromkeys([task.name for task in tasks], "lost"))
        assert run_plan(changed).empty, "a benchmark that fails leaves both"
    assert [(plan.out / name).read_text() for name in ("manifest.json", "table.md")] == made
    finish(changed.tasks[0])
    with monkeypatch.context() as patch:
        patch.setattr(plots, "plot_bars", lambda *arguments: 1 / 0)
        with pytest.raises(ReportError):
            run_plan(changed)
    assert not (plan.out / "manifest.json").exists(), "some of the tables are new, and some are not"
    run_plan(changed)
    assert read_json(plan.out / "manifest.json")["settings"]["BPR"]["epochs"] == "1"


def test_two_benchmarks_in_one_folder_are_refused(folder):
    plan = plan_of(folder, ["BPR"])
    plan.out.mkdir()
    with (
        FileLock(plan.out / ".lock"),
        pytest.raises(SettingError, match="holds a search, benchmark or study that is running: name another --out"),
    ):
        run_plan(plan)
    assert not (plan.out / "manifest.json").exists()


def test_one_seed_gives_json(folder):
    plan = plan_of(folder)
    for task in plan.tasks:
        finish(task, test={"recall@10": 0.25, "recall@10/cold": None})
    run_plan(plan)
    scores = read_json(plan.out / "results.json")["models"]["BPR"]
    assert scores["test_recall@10"] == {"mean": 0.25, "std": None}
    assert scores["test_recall@10/cold"] == {"mean": None, "std": None}


def test_what_json_does_not_have_is_null():
    import numpy as np

    content = {"a": [math.nan, np.float32("inf"), (1, np.int64(2))], "b": {"c": -math.inf}, "d": np.float64(0.5)}
    assert json.loads(to_json(content)) == {"a": [None, None, [1, 2]], "b": {"c": None}, "d": 0.5}


def test_a_half_written_file_replaces_nothing(tmp_path):
    file = tmp_path / "a.json"
    write_json(file, {"a": 1})
    loop = []
    loop.append(loop)
    with pytest.raises(RecursionError):
        write_json(file, loop)
    assert read_json(file) == {"a": 1} and list(tmp_path.iterdir()) == [file]


def test_the_caption_says_how_many_users_were_scored_and_which_seed_failed(folder):
    plan = plan_of(folder, seeds=2)
    for task in plan.tasks[:3]:
        finish(task)
    missing = plan.tasks[3]
    missing.folder.mkdir(parents=True)
    write_json(missing.folder / "error.json", {"error": "out of paper."})
    frame, _ = runs.collect(plan.tasks)
    states = {task.name: "done" for task in plan.tasks[:3]} | {missing.name: read_error(missing)}
    text = benchmark.caption(plan, frame, states)
    assert "3 users with test items are scored." in text
    assert text.endswith("BPR failed with seed 2021: out of paper.")
    nothing = benchmark.caption(plan, frame[frame["model"] == "SLIFMR"], {**states, "BPR-2020": "lost"})
    assert nothing.endswith("BPR failed: lost.")


def test_the_caption_says_how_far_epochs_and_patience_differ(folder):
    vary = {"epochs": [1, 3], "stopping_step": [4], "cold_items": [0.2]}
    settings = {**SETTINGS, "data_path": str(folder)}
    study = make_study("sensitivity", "tiny", {"models": ["BPR"], "vary": vary}, folder, settings=settings, seeds=1)
    for task in study.tasks:
        finish(task)
    frame, _ = runs.collect([study.tasks[0]])
    text = benchmark.caption(study, frame, {task.name: "done" for task in study.tasks})
    assert "All models: at most 1 to 3 epochs, patience 4 to 10 evaluations" in text
    assert "0% to 20% of the items held out of training" in text


def test_labels_do_not_break_the_tables():
    cell = {("a|b {x}\\y^2", "recall@5"): tables.Cell(0.1, math.nan, False, False, "")}
    models = ["a|b {x}\\y^2"]
    assert r"| a\|b {x}\y^2 | 0.1000 |" in tables.markdown(models, ["recall@5"], cell, "")
    tex = tables.latex(models, ["recall@5"], cell, "")
    assert r"a|b \{x\}\textbackslash{}y\textasciicircum{}2 & 0.1000" in tex


# -- failures in a line ----------------------------------------------------------------------------------------------


def test_why_a_run_failed_is_one_clean_line(folder, monkeypatch):
    task = plan_of(folder, ["BPR"]).tasks[0]

    def fail(**arguments):
        raise RuntimeError("\n \x1b[31mWeights only load failed.\x1b[0m See\tbelow\nmore\n" + "x" * 5000)

    monkeypatch.setattr(experiment, "run", fail)
    with pytest.raises(SystemExit):
        run_task(task)
    assert read_error(task) == "RuntimeError: Weights only load failed. See below"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (DataError("a.inter, line 3: no user"), "a.inter, line 3: no user"),
        (KeyError("itemcoverage@5"), "KeyError: 'itemcoverage@5'"),
        (AssertionError(), "AssertionError"),
        (ValueError("y" * 1000), "ValueError: " + "y" * 285 + "..."),
    ],
)
def test_errors_become_one_line(error, line):
    assert one_line(error) == line and len(line) <= 300


def test_runs_that_fail_end_the_command_with_the_table_and_a_reason(folder, monkeypatch, capsys):
    plan = plan_of(folder)
    finish(plan.tasks[0])

    def fail(tasks, jobs, address, on_tick, data):
        states = {"SLIFMR-2020": "done", "BPR-2020": "out of paper"}
        on_tick(states)
        return states

    monkeypatch.setattr(benchmark, "run_all", fail)
    with pytest.raises(ClickException) as stop:
        run_live(plan, partial(run_plan, plan))
    assert stop.value.exit_code == 1
    assert stop.value.message == "1 of 2 runs failed; the first, BPR-2020: out of paper"
    shown = capsys.readouterr().out
    assert "| SLIFMR |" in shown and "BPR failed: out of paper." in shown and "outputs: " in shown


def test_a_run_of_other_data_by_the_end_is_told(folder, monkeypatch):
    task = plan_of(folder, ["BPR"]).tasks[0]
    finish(task)
    found = iter([True, None])
    monkeypatch.setattr(runs, "read_result", lambda task: next(found))
    told = []
    states = runs.run_all([task], on_tick=lambda states: told.append(dict(states)))
    assert told[-1] == states == {"BPR-2020": "its data, settings or code changed after it ran: run it again"}


def test_a_run_that_left_nothing_is_described_in_plain_words(folder):
    assert read_error(plan_of(folder).tasks[0]) == "its process ended without a result or an error message"


# -- machines --------------------------------------------------------------------------------------------------------


def test_without_git_the_manifest_has_no_commit(folder, monkeypatch):
    plan = plan_of(folder, ["BPR"])
    checked = runs.check(plan.tasks)
    monkeypatch.setenv("PATH", str(folder))
    assert manifest.manifest(plan, checked)["git_commit"] is None


def test_the_commit_of_a_repository_around_an_installed_package_is_not_its_own(monkeypatch):
    monkeypatch.setattr(manifest, "IN_CHECKOUT", False)
    assert manifest._commit() is None


def test_the_runners_import_and_measure_memory_where_there_is_no_module_resource(monkeypatch):
    """As on Windows, where neither ``resource`` nor SIGKILL exist."""
    code = (
        "import sys, pkgutil, importlib, ray, ray.tune, torch, pandas, sklearn, optuna\n"
        "sys.modules.pop('resource', None); sys.modules['resource'] = None\n"
        "import recbole_slifmr.study, recbole_slifmr.search.tune\n"
        "for module in pkgutil.iter_modules(recbole_slifmr.study.__path__):\n"
        "    importlib.import_module('recbole_slifmr.study.' + module.name)\n"
        "from recbole_slifmr.training.memory import peak_memory_mb, resource\n"
        "print(resource, peak_memory_mb() > 1)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.split() == ["None", "True"], done.stderr
    before = memory.peak_memory_mb()
    monkeypatch.setattr(memory, "resource", None)
    assert memory.peak_memory_mb() == pytest.approx(before, rel=0.5)


def test_a_smaller_score_is_the_best_on_the_live_display_too(folder):
    from rich.console import Console

    task = plan_of(folder, ["BPR"]).tasks[0]
    task.folder.mkdir(parents=True)
    lines = [[0, 1.0, 0.9, True], [1, 2.0, 0.25, True], [2, 3.0, 0.75, False], [3, 4.0, None, False]]
    (task.folder / "progress.jsonl").write_text(
        "\n".join(map(json.dumps, lines)) + "\n[4, 5.0, 0.[5, 6.0, 0.5, true]\n[6]\n[7, 8.0, 0."
    )
    assert len(read_progress(task)) == 4 and math.isnan(read_progress(task)[3].score)
    console = Console(width=100)
    with console.capture() as shown:
        console.print(LiveTable([task])._table())
    assert "0.2500" in shown.get() and "0.9000" not in shown.get()


# -- processes -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_loaders_may_have_processes_of_their_own(folder):
    task = plan_of(folder, ["BPR"], settings={"worker": 1, "epochs": 1}).tasks[0]
    assert runs.run_all([task]) == {"BPR-2020": "done"}


def _train_forever(task):
    """Do as a run in its first epoch does, without end."""
    from recbole_slifmr.study.task import _end_with_driver

    _end_with_driver(task)
    task.checkpoint_dir().mkdir(parents=True)
    (task.folder / "pid").write_text(str(os.getpid()))
    time.sleep(600)


def _wait_for(condition, seconds=300):
    """Wait; two processes that import torch one after the other take long on a busy machine."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_is_killed_costs_no_other_and_is_run_again(folder, monkeypatch, sent):
    done, killed = plan_of(folder).tasks
    finish(done)
    stamp = (done.folder / "result.json").stat().st_mtime_ns
    with monkeypatch.context() as patch:
        patch.setattr(runs, "run_task", _train_forever)
        pid = killed.folder / "pid"
        killer = threading.Thread(target=lambda: (_wait_for(pid.is_file), os.kill(int(pid.read_text() or 0), sent)))
        killed.folder.mkdir(parents=True)
        killer.start()
        states = runs.run_all([done, killed])
        killer.join()
    assert states["SLIFMR-2020"] == "done" and states["BPR-2020"].startswith(f"killed by {sent.name}")
    assert list(killed.folder.iterdir()) == [pid], "the checkpoint is gone, and nothing is half-written"
    finish(killed)
    assert set(runs.run_all([done, killed]).values()) == {"done"}
    assert (done.folder / "result.json").stat().st_mtime_ns == stamp


def _drive(tasks):
    runs.run_task = _train_forever
    runs.run_all(tasks)


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_ends_with_its_driver(folder, sent):
    import psutil

    done, running = plan_of(folder).tasks
    finish(done)
    running.folder.mkdir(parents=True)
    driver = multiprocessing.get_context("spawn").Process(target=_drive, args=([done, running],))
    driver.start()
    pid = running.folder / "pid"
    _wait_for(lambda: pid.is_file() and pid.read_text())
    os.kill(driver.pid, sent)
    driver.join(30)
    assert driver.exitcode == -sent
    _wait_for(lambda: not psutil.pid_exists(int(pid.read_text())))
    assert list(running.folder.iterdir()) == [pid]
    assert read_result(done) and read_result(running) is None


def test_what_a_killed_run_left_behind_is_cleared_away(folder, monkeypatch):
    task = plan_of(folder, ["BPR"]).tasks[0]
    task.folder.mkdir(parents=True)
    for name in ("result.json.123.part", "per_user.parquet.9.part", "error.json"):
        (task.folder / name).write_text("half")
    frame = pd.DataFrame({"recall@10": [0.5]}, index=pd.Index(["u1"], name="user"))
    monkeypatch.setattr(experiment, "run", lambda **arguments: SimpleNamespace(per_user=frame, valid={}))
    run_task(task)
    assert {file.name for file in task.folder.iterdir()} == {"result.json", "per_user.parquet", "progress.jsonl"}
    assert read_result(replace(task, label="renamed")), "a label changes no result"


def test_a_benchmark_without_models_is_refused(folder):
    with pytest.raises(SettingError, match="no models to run"):
        runs.check([])
