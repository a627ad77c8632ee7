"""Whole searches: choice on validation, early stopping, resuming, failures, files, clusters."""

import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
import zipfile
from pathlib import Path

import pandas as pd
import psutil
import pytest
import yaml
from conftest import write_tiny
from filelock import FileLock

from recbole_slifmr.cli import main
from recbole_slifmr.cli.tune import parse_resources, parse_seconds
from recbole_slifmr.errors import SettingError, UnknownSettingWarning
from recbole_slifmr.files import write_json
from recbole_slifmr.host.settings import make_config
from recbole_slifmr.search import tune as tuning
from recbole_slifmr.search.outcome import last_reports, read_reports, write_report
from recbole_slifmr.search.plan import make_search
from recbole_slifmr.search.space import parse_space
from recbole_slifmr.search.tune import run_search, tune
from recbole_slifmr.study import statistics
from recbole_slifmr.study.benchmark import make_plan
from recbole_slifmr.study.page import write_page
from recbole_slifmr.study.runs import ray_session
from recbole_slifmr.training.callback import load_callback
from recbole_slifmr.training.experiment import fingerprint, prepare, run

SETTINGS = {"epochs": 3, "topk": [5], "valid_metric": "NDCG@5", "train_batch_size": 64}
SPACE = {"learning_rate": {"loguniform": [1e-3, 1e-1]}, "n_layers": {"choice": [1, 2]}}
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def session():
    """One Ray for all tests that do not need one of their own; its processes find the test modules."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))
        with ray_session(n_cpus=2):
            yield


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_tiny(folder)
    return folder


def plan_of(data, out, model="LightGCN", space=None, **arguments):
    settings = {**SETTINGS, "data_path": str(data), **arguments.pop("settings", {})}
    space = parse_space(SPACE) if space is None else parse_space(space)
    return make_search(model, "tiny", space, out, settings=settings, **{"trials": 3, "seeds": 0, **arguments})


@pytest.fixture(scope="module")
def searched(session, data, tmp_path_factory):
    """A search by random with ASHA, its winner scored with two seeds."""
    search = plan_of(data, tmp_path_factory.mktemp("searched") / "out", trials=6, seeds=2, scheduler="asha")
    told = []
    return search, run_search(search, on_tick=told.append), told


# -- what a search gives ---------------------------------------------------------------------------------------------


def test_everything_is_written(searched):
    search, _outcome, told = searched
    written = {path.name for path in search.out.iterdir()}
    assert written >= {
        "best.yaml", "trials.csv", "history.parquet", "history.png", "parallel.html", "importance.png", "test.csv",
    }  # fmt: skip
    assert not [path for path in search.out.rglob("*.part")]
    page = write_page([search.out], search.out.parent / "report.html").read_text()
    assert "Search for LightGCN on tiny" in page and page.count("data:image/png") == 2
    trials = pd.read_csv(search.out / "trials.csv")
    assert len(trials) == 6 and list(trials["score"]) == sorted(trials["score"], reverse=True)
    history = pd.read_parquet(search.out / "history.parquet")
    assert len(history) == trials["epochs"].sum()
    assert history.groupby("trial")["score"].max()[trials["trial"][0]] == trials["score"][0]
    assert {"valid_ndcg@5", "learning_rate", "epoch", "seconds"} <= set(history)
    assert told[-1].finished + told[-1].stopped == told[-1].total == 6 and told[-1].best == trials["score"][0]
    assert told[0].best is None


def test_asha_stops_some_trials_and_the_winner_ran_to_its_end(searched):
    _, outcome, _ = searched
    counts = outcome.trials["status"].value_counts()
    assert counts["stopped"] >= 1 and counts["finished"] >= 1
    assert outcome.trials["status"][0] == "finished" and outcome.trials["epochs"][0] == 3
    assert (outcome.trials.loc[outcome.trials["status"] == "stopped", "epochs"] < 3).all()


def test_best_yaml_gives_the_winner_s_score_to_the_last_digit(searched):
    _search, outcome, _ = searched
    content = yaml.safe_load(outcome.best_file.read_text())
    assert content["model"] == "LightGCN" and content["dataset"] == "tiny" and content["threads"] == 1
    result = run(content["model"], content["dataset"], [outcome.best_file], {"show_progress": False})
    assert result.best_valid_score == outcome.trials["score"][0]
    found = {f"valid_{k}": v for k, v in result.valid.items()}
    reported = outcome.trials.iloc[0].filter(like="valid_").to_dict()  # a trial computes the metric it is judged by
    assert set(reported) == {"valid_ndcg@5"} and reported.items() <= found.items()


def test_the_winner_is_scored_on_test_once_for_each_seed(searched):
    _search, outcome, _ = searched
    assert list(outcome.runs["seed"]) == [2020, 2021] and outcome.failures == {}
    assert outcome.runs["valid_ndcg@5"][0] == outcome.trials["score"][0]
    assert outcome.runs["test_ndcg@5"].between(0, 1).all()
    assert not [column for column in outcome.trials if "test" in column]


def test_the_benchmark_takes_the_settings_but_not_the_epochs(searched):
    search, outcome, _ = searched
    params = search.out.parent / "params" / "LightGCN"
    params.mkdir(parents=True)
    shutil.copy(outcome.best_file, params)
    plan = make_plan("tiny", ["LightGCN", "BPR"], seeds=1, config_files=[], params=params.parent)
    tuned, other = (make_config(**task.arguments) for task in plan.tasks)
    assert plan.tuned == {"LightGCN": 6}
    assert tuned["learning_rate"] == outcome.point["learning_rate"]
    for name in ("epochs", "stopping_step", "valid_metric", "eval_step", "threads"):
        assert tuned[name] == other[name], name


def test_nothing_listens_beyond_this_machine(session):
    own = psutil.Process()
    addresses = set()
    for process in [own, *own.children(recursive=True)]:
        try:
            connections = process.net_connections("inet")
        except psutil.Error:
            continue
        addresses |= {entry.laddr.ip for entry in connections if entry.status == psutil.CONN_LISTEN}
    assert addresses and all(ip.rpartition(":")[2].startswith("127.") or ip == "::1" for ip in addresses), addresses
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"


# -- the test split --------------------------------------------------------------------------------------------------


def test_no_test_split_is_scored_before_the_winner_is_chosen(session, data, tmp_path):
    """A callback in every process writes down which split is scored; first without, then with the final scoring."""
    write_tiny(tmp_path)
    scored = tmp_path / "scored.txt"
    settings = {"callbacks": ["probe:Probe"]}
    search = plan_of(tmp_path, tmp_path / "out", "SLIFMR", trials=2, settings=settings)
    best = run_search(search).best_file.read_bytes()
    splits = prepare(search.config(callbacks=[])).fingerprints()
    assert set(scored.read_text().split()) == {splits["valid"]}
    n_before = len(scored.read_text().split())
    outcome = run_search(
        plan_of(tmp_path, tmp_path / "out", "SLIFMR", trials=2, seeds=1, settings=settings), resume=True
    )
    after = scored.read_text().split()[n_before:]
    assert outcome.best_file.read_bytes() == best, "chosen before"
    assert after.count(splits["test"]) == 1 and set(after) == {splits["valid"], splits["test"]}
    run_search(plan_of(tmp_path, tmp_path / "out", "SLIFMR", trials=2, seeds=1, settings=settings), resume=True)
    assert scored.read_text().split()[n_before:] == after, "once"


def test_the_split_is_that_of_the_benchmark(data):
    search = plan_of(data, "out")
    config = search.config()
    benchmarked = make_plan("tiny", ["LightGCN"], seeds=1, settings={**SETTINGS, "data_path": str(data)}).tasks[0]
    expected = prepare(make_config(**benchmarked.arguments), benchmarked.split_seed).fingerprints()
    assert fingerprint(prepare(config, search.seed).train_data) == expected["train"]


# -- ways of searching -----------------------------------------------------------------------------------------------


def test_optuna_asks_for_conditional_settings(session, data, tmp_path):
    space = {**SPACE, "reg_weight": {"loguniform": [1e-5, 1e-3], "if": {"n_layers": 2}}}
    outcome = tune("LightGCN", "tiny", space=parse_space(space), out=tmp_path / "out", search="optuna", trials=5,
                   seeds=0, scheduler="none", settings={**SETTINGS, "data_path": str(data)})  # fmt: skip
    assert (outcome.trials["status"] == "finished").all() and len(outcome.trials) == 5
    if "reg_weight" in outcome.trials:
        assert (outcome.trials["reg_weight"].notna() == (outcome.trials["n_layers"] == 2)).all()
    assert outcome.trials["learning_rate"].between(1e-3, 1e-1).all()


def test_population_based_training_clones_and_goes_on(session, data, tmp_path):
    """Four trials on two CPUs, so that they are paused too; a clone goes on from the epoch of its model."""
    space = {"learning_rate": {"loguniform": [1e-12, 1e-1]}, "n_layers": {"choice": [1, 2]}}
    outcome = run_search(plan_of(data, tmp_path / "out", space=space, scheduler="pbt", trials=4))
    assert outcome.trials["status"].isin(["finished", "stopped"]).all() and outcome.trials["epochs"][0] >= 1
    assert (outcome.trials["status"] == "finished").any() and outcome.trials["error"].isna().all()
    history = pd.read_parquet(tmp_path / "out" / "history.parquet")
    assert all(list(epochs) == sorted(set(epochs)) for _, epochs in history.groupby("trial")["epoch"])
    used = history[history["score"] == outcome.trials["score"][0]]
    assert outcome.point["learning_rate"] in set(used["learning_rate"]), "that of the best epoch"


def test_a_grid_over_what_the_data_depend_on(session, data, tmp_path):
    space = {"use_kg": {"choice": [True, False]}, "use_features": {"choice": [True, False]}}
    outcome = run_search(plan_of(data, tmp_path / "out", "SLIFMR", space, search="grid", trials=4, scheduler="none"))
    assert (outcome.trials["status"] == "finished").all() and len(outcome.trials) == 4
    assert outcome.trials["score"].nunique() > 1


def test_closed_forms_are_tried_once_each(session, data, tmp_path):
    space = {"reg_weight": {"choice": [1.0, 1e6]}}
    settings = {"eval_step": 3}
    plan = plan_of(data, tmp_path / "out", "EASE", space, search="grid", scheduler="asha", trials=9, settings=settings)
    told = []
    outcome = run_search(plan, on_tick=told.append)
    assert {progress.total for progress in told} == {2} and "\n# trials: 2\n" in outcome.best_file.read_text()
    assert list(outcome.trials["status"]) == ["finished"] * 2 and list(outcome.trials["epochs"]) == [1, 1]
    assert yaml.safe_load(outcome.best_file.read_text())["reg_weight"] == outcome.trials["reg_weight"][0]
    assert len(pd.read_parquet(plan.out / "history.parquet")) == 2


@pytest.mark.parametrize(("given", "expected"), [({}, 2), ({"threads": 1}, 1)])
def test_a_trial_has_the_threads_that_are_given_or_those_of_its_share(session, data, tmp_path, given, expected):
    plan = plan_of(data, tmp_path / "out", "EASE", {"reg_weight": {"choice": [1.0]}}, trials=1, settings=given)
    outcome = run_search(plan, jobs=1)
    assert yaml.safe_load(outcome.best_file.read_text())["threads"] == expected


def test_early_stopping_compares_at_epochs_that_are_validated(data, tmp_path):
    """With rungs at 1, 3, 9 and 27, a trial would be judged at the rung of 1 by its score at 15."""
    plan = plan_of(data, tmp_path / "out", settings={"epochs": 30, "eval_step": 5})
    rungs = re.findall(r"Iter (\d+)", tuning._scheduler(plan).debug_string())
    assert rungs == ["15", "5"]


def test_one_seed_gives_the_same_points(data, tmp_path):
    plan = plan_of(data, tmp_path / "out", search="optuna")
    assert plan.points() == plan.points()
    searchers = [tuning._optuna(plan, "score", "max") for _ in range(2)]
    first, second = ([searcher.suggest(str(number)) for number in range(3)] for searcher in searchers)
    assert first == second and len({repr(point) for point in first}) == 3
    config = {"point": {"learning_rate": 0.01, "n_layers": 1}}
    plan = plan_of(data, tmp_path / "out", scheduler="pbt")
    explored = [
        [explore(config) for _ in range(5)]
        for explore in (tuning._scheduler(plan)._custom_explore_fn for _ in range(2))
    ]
    assert explored[0] == explored[1] and len({repr(point) for point in explored[0]}) > 1


# -- failures --------------------------------------------------------------------------------------------------------


def test_a_failing_trial_is_recorded_and_the_search_goes_on(session, data, tmp_path):
    space = {"learning_rate": {"choice": [0.01, 1e30]}}
    plan = plan_of(data, tmp_path / "out", space=space, search="grid", settings={"learner": "sgd"}, scheduler="none")
    outcome = run_search(plan)
    trials = outcome.trials.set_index("learning_rate")
    assert trials["status"].to_dict() == {0.01: "finished", 1e30: "failed"}
    assert trials["error"][1e30] == "ValueError: Training loss is nan" and outcome.point == {"learning_rate": 0.01}


def test_a_trial_whose_process_dies_is_recorded_and_the_search_goes_on(session, data, tmp_path):
    space = {"callbacks": {"choice": [["probe:Deadly"], []]}}
    outcome = run_search(plan_of(data, tmp_path / "out", "SLIFMR", space, search="grid", scheduler="none"))
    assert sorted(outcome.trials["status"]) == ["failed", "finished"] and outcome.point == {"callbacks": []}
    assert outcome.first_error == "the process died (out of memory?)"


def test_a_search_whose_trials_all_fail_ends_with_the_first_error(session, data, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "space.yaml").write_text("learning_rate: {choice: [1e29, 1e30]}\n")
    with pytest.raises(SystemExit) as stop, warnings.catch_warnings():
        main(["tune", "--model=LightGCN", "--dataset=tiny", f"--data_path={data}", "--space=space.yaml",
              "--search=grid", "--epochs=2", "--topk=[5]", "--learner=sgd", "--out=out"])  # fmt: skip
    assert stop.value.code == 1
    assert "every trial failed; the first: ValueError: Training loss is nan" in capsys.readouterr().err
    assert set(pd.read_csv("out/trials.csv")["status"]) == {"failed"} and not Path("out/best.yaml").exists()


def test_the_command_ends_with_the_winner(session, data, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "space.hyper").write_text("learning_rate loguniform -6,-3\n")
    with pytest.raises(SystemExit) as stop, warnings.catch_warnings():
        main(["tune", "-m", "LightGCN", "-d", "tiny", f"--data_path={data}", "--space=space.hyper", "--trials=2",
              "--epochs=2", "--topk=[5]", "--seeds=0", "--scheduler=none", "--resources=cpu=1",
              "--time-budget=1h"])  # fmt: skip
    shown = capsys.readouterr().out
    assert stop.value.code == 0
    for text in (
        "LightGCN on tiny",
        "2 finished",
        "learning_rate",
        "outputs: tune",
        "--config_files tune/best.yaml",
    ):
        assert text in shown


# -- going on --------------------------------------------------------------------------------------------------------


def test_a_finished_search_is_not_run_again_even_if_ray_s_files_are_torn(searched, data):
    search, outcome, _ = searched
    for file in search.folder.glob("*state-*"):
        file.write_bytes(file.read_bytes()[:10])
    before = {file.name: file.read_bytes() for file in search.reports.iterdir()}
    again = run_search(plan_of(data, search.out, trials=6, seeds=2, scheduler="asha"), resume=True)
    assert {file.name: file.read_bytes() for file in search.reports.iterdir()} == before
    pd.testing.assert_frame_equal(again.trials, outcome.trials)
    pd.testing.assert_frame_equal(again.runs, outcome.runs)


SEARCH = """
import sys
from pathlib import Path
sys.path.insert(0, str(Path(sys.argv[1]) / "tests"))
from test_tune import plan_of
from recbole_slifmr.search.tune import run_search
out = Path(sys.argv[3])
search = plan_of(sys.argv[2], out, "SLIFMR", trials=3, scheduler="none", settings={"epochs": 40, "prune_ratio": 0.2})
run_search(search, resume="resume" in sys.argv, resources={"cpu": 1})
"""


def test_a_report_that_was_cut_off_ends_no_search(data, tmp_path):
    search = plan_of(data, tmp_path / "out")
    search.reports.mkdir(parents=True)
    file = search.reports / "t1.jsonl"
    write_report(search, "t1", {"epoch": 1, "finished": False})
    whole = file.read_text()
    file.write_text(whole + whole[:9])
    write_report(search, "t1", {"epoch": 2, "finished": True})
    assert [entry["epoch"] for entry in read_reports(search, "t1")] == [1, 2]
    file.write_text(whole[:9] + whole)  # as written before: the next report on the line that was cut off
    assert read_reports(search, "t1") == [] and last_reports(search) == {}


@pytest.mark.slow
def test_a_killed_search_goes_on_and_gives_what_it_would_have_given(session, data, tmp_path):
    """The driver gets SIGKILL when its first trial is done; the refreshed graphs of the others go on too."""
    whole = run_search(
        plan_of(
            data, tmp_path / "whole", "SLIFMR", trials=3, scheduler="none", settings={"epochs": 40, "prune_ratio": 0.2}
        )
    )
    command = [sys.executable, "-c", SEARCH, str(ROOT), str(data), str(tmp_path / "out")]
    driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def done():
        return {
            file: lines
            for file in (tmp_path / "out" / "reports").glob("*.jsonl")
            if (lines := file.read_text().splitlines()) and '"finished": true' in lines[-1]
        }

    while not done() and driver.poll() is None:
        time.sleep(0.05)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    finished = done()
    assert finished and not (tmp_path / "out" / "best.yaml").exists()
    for trial in (tmp_path / "out" / "trials").iterdir():  # as if it had got further since the state was kept
        if checkpoints := sorted(trial.glob("checkpoint_*")):
            for number in range(90, 95):
                shutil.copytree(checkpoints[-1], trial / f"checkpoint_{number:06}")
    subprocess.run([*command, "resume"], check=True, capture_output=True, timeout=600)
    for file, lines in finished.items():
        assert file.read_text().splitlines() == lines, "not run again"
    columns = ["learning_rate", "n_layers", "score", "best_epoch", "epochs", "status"]
    resumed = pd.read_csv(tmp_path / "out" / "trials.csv")
    pd.testing.assert_frame_equal(
        resumed[columns].sort_values("learning_rate", ignore_index=True),
        whole.trials[columns].sort_values("learning_rate", ignore_index=True),
        check_dtype=False,
    )


@pytest.mark.parametrize("member", ["tuner.pkl", "../outside", "/outside"])
def test_a_state_from_elsewhere_is_neither_unpacked_nor_unpickled(session, data, tmp_path, member):
    search = plan_of(data, tmp_path / "out")
    search.out.mkdir()
    write_json(search.out / "search.json", search.identity())
    with zipfile.ZipFile(search.state, "w") as archive:
        archive.writestr(member, pickle.dumps(Attack()))
    with pytest.raises(
        SettingError, match=r"cannot be resumed, start anew with another --out: .* was not written by you"
    ):
        run_search(search, resume=True)
    assert not list(tmp_path.rglob("outside")) and not list(tmp_path.rglob("*.pkl")) and not Path("attacked").exists()


class Attack:
    """What a file looks like that runs a command when it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch attacked",)


def test_a_search_is_not_mixed_with_another(searched, data):
    search, _, _ = searched
    with pytest.raises(SettingError, match="holds a search already: --resume goes on with it"):
        run_search(search)
    with pytest.raises(SettingError, match="holds a search with other trials, scheduler: resume it as it was started"):
        run_search(plan_of(data, search.out, trials=5, scheduler="none"), resume=True)


def test_a_search_that_runs_keeps_its_folder(session, data, tmp_path):
    search = plan_of(data, tmp_path / "out")
    search.out.mkdir()
    with (
        FileLock(search.out / ".lock"),
        pytest.raises(SettingError, match="holds a search, benchmark or study that is running: name another --out"),
    ):
        run_search(search)
    assert not (search.out / "search.json").exists()


def test_replaced_data_are_not_mixed_with_a_search(data, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    search = plan_of(tmp_path / "data", tmp_path / "out")
    search.out.mkdir()
    (search.out / "search.json").write_text(json.dumps(search.identity()))
    file = tmp_path / "data" / "tiny" / "tiny.inter"
    file.write_text("\n".join(file.read_text().splitlines()[:-30]) + "\n")
    with pytest.raises(SettingError, match="holds a search with other data or code: resume it as it was started"):
        run_search(plan_of(tmp_path / "data", search.out), resume=True)


# -- a cluster -------------------------------------------------------------------------------------------------------

CLUSTER = """
import json, sys
from pathlib import Path
sys.path.insert(0, str(Path(sys.argv[1]) / "tests"))
from ray.cluster_utils import Cluster
from test_tune import plan_of
from recbole_slifmr.search.tune import run_search
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
cluster.add_node(num_cpus=1)
search = plan_of(sys.argv[2], Path(sys.argv[3]), trials=4, seeds=2, scheduler="none", settings={"epochs": 2})
outcome = run_search(search, address=cluster.address)
found = [sorted(set(outcome.trials["node"])), list(outcome.trials["status"]), len(outcome.runs), outcome.failures]
print(json.dumps(found))
cluster.shutdown()
"""


@pytest.mark.slow
def test_a_search_runs_on_both_nodes_of_a_cluster(data, tmp_path):
    command = [sys.executable, "-c", CLUSTER, str(ROOT), str(data), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    nodes, statuses, n_runs, failures = json.loads(done.stdout.splitlines()[-1])
    assert not failures, failures
    assert len(nodes) == 2 and statuses == ["finished"] * 4 and n_runs == 2


# -- what cannot be used ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"space": {"n_layer": {"choice": [1]}}}, "unknown setting 'n_layer': .*; did you mean 'n_layers'"),
        ({"space": {"knn_k": {"choice": [1]}}}, "unknown setting 'knn_k': neither RecBole nor LightGCN reads it"),
        ({"space": {"epochs": {"choice": [1]}}}, "search space: epochs must be the same for all trials"),
        ({"space": {"topk": {"choice": [[1]]}}}, "search space: topk must be the same for all trials"),
        ({"settings": {"n_layers": 2}}, "n_layers is in the search space and given as well"),
        ({"settings": {"eval_step": 4}}, "eval_step: 4 leaves the 3 epochs without validation"),
        ({"model": "SLIFMR", "space": {"knn_k": {"choice": [5, "five"]}}}, "knn_k must be a whole number, not 'five'"),
        ({"search": "grid"}, "grid search takes settings with countable values: learning_rate is loguniform"),
        (
            {"search": "grid", "trials": 1, "space": {"n_layers": {"choice": [1, 2]}}},
            "has 2 points, more than the 1 trials",
        ),
        ({"scheduler": "hyperband"}, "scheduler must be one of asha, none, pbt, not 'hyperband'"),
        ({"search": "bayes"}, "search must be one of random, optuna, grid"),
        ({"scheduler": "pbt", "search": "optuna"}, "pbt changes the settings of trials itself"),
        ({"trials": 0}, "trials must be at least 1"),
        ({"model": "LightGCNN"}, "unknown model 'LightGCNN'"),
        ({"settings": {"threads": "abc"}}, "threads must be a whole number from 1, not 'abc'"),
        ({"settings": {"data_path": None}}, "data_path must be the folder above that of the data set, not None"),
        ({"settings": {"data_path": 1}}, "data_path must be the folder above that of the data set, not 1"),
        ({"settings": {"valid_metric": 5}}, "valid_metric must be a word, not 5"),
        ({"settings": {"learning_rat": 1}}, "unknown setting 'learning_rat'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_search_that_cannot_work_is_refused_before_anything_runs(data, tmp_path, arguments, message):
    with warnings.catch_warnings(), pytest.raises((SettingError, UnknownSettingWarning), match=message):
        warnings.simplefilter("error", UnknownSettingWarning)
        plan_of(data, tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "resources, message",
    [
        ({"cpu": 64}, "a trial asks for cpu=64, the largest machine has 2"),
        ({"gpu": 1}, "a trial asks for gpu=1, the largest machine has 0"),
        ({"tpu": 1}, "expected cpu and gpu with a number, not tpu=1"),
    ],
)
def test_resources_that_are_not_there_are_named(session, data, tmp_path, resources, message):
    with pytest.raises(SettingError, match=message):
        run_search(plan_of(data, tmp_path / "out"), resources=resources)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "nodes, jobs, settings, share",
    [
        ([(8, 0)], None, {}, (1, 0)),
        ([(8, 0)], 3, {}, (8 / 3, 0)),
        ([(8, 0)], 16, {}, (0.5, 0)),
        ([(16, 2)], None, {}, (4, 1)),
        ([(16, 2)], 1, {}, (16, 1)),
        ([(16, 2)], 2, {}, (8, 1)),
        ([(16, 2)], 3, {}, (16 / 3, 0.5)),
        ([(16, 2)], 8, {}, (2, 0.25)),
        ([(16, 2)], 4, {"gpu_id": ""}, (4, 0)),
        ([(4, 1), (4, 1)], 1, {}, (4, 1)),
        ([(4, 1), (4, 1)], 4, {}, (2, 0.5)),
    ],
)
def test_trials_share_cpus_and_gpus(data, tmp_path, monkeypatch, nodes, jobs, settings, share):
    listed = [{"Alive": True, "Resources": {"CPU": cpu, "GPU": gpu}} for cpu, gpu in nodes]
    monkeypatch.setattr("ray.nodes", lambda: listed)
    found = tuning._share(plan_of(data, tmp_path / "out", settings=settings), jobs, None)
    assert found == {"cpu": share[0], "gpu": share[1]}


def test_a_model_without_a_space_needs_one(data):
    with pytest.raises(SettingError, match=r"there is no search space for BPR in .*: name a file with --space"):
        make_search("BPR", "tiny", settings={"data_path": str(data)})


def test_a_cluster_that_is_not_there_is_named(monkeypatch):
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)  # there is the session of these tests
    with (
        pytest.raises(SettingError, match=r"no Ray cluster at '127\.0\.0\.1:1': .*refused"),
        ray_session("127.0.0.1:1"),
    ):
        pass


def test_shares_and_times_are_read():
    assert parse_resources("cpu=2,gpu=0.5") == {"cpu": 2.0, "gpu": 0.5} and parse_resources(None) is None
    assert [parse_seconds(text) for text in (None, "90", "90s", "1.5m", "2h")] == [None, 90, 90, 90, 7200]
    for bad in ("cpu", "cpu=many"):
        with pytest.raises(SettingError, match="--resources reads cpu=1,gpu=0"):
            parse_resources(bad)
    for bad in ("soon", "2d", "0h"):
        with pytest.raises(SettingError, match="--time_budget reads 90s, 30m or 2h"):
            parse_seconds(bad)


def test_importance_finds_the_setting_that_matters():
    frame = pd.DataFrame({"a": [i / 40 for i in range(40)], "b": ["x", "y"] * 20, "c": [[1], [2], [3], [4]] * 10})
    frame["score"] = [3 * a + (b == "x") for a, b in zip(frame["a"], frame["b"], strict=True)]
    found = statistics.importance(frame, ["c", "b", "a", "not_there"])
    assert list(found.index) == ["a", "b", "c"] and found.sum() == pytest.approx(1) and found["c"] < 0.05
    assert statistics.importance(frame.head(3), ["a"]) is None


def test_a_callback_in_the_working_directory_is_found_as_the_slifmr_script_finds_it(tmp_path, monkeypatch):
    """The script's own folder stands first in the search path, not the working directory."""
    (tmp_path / "own_callback.py").write_text(
        "from recbole_slifmr.training.callback import Callback\n\nclass Own(Callback):\n    pass\n"
    )
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    with pytest.raises(SettingError, match="'own_callback:Own' cannot be loaded"):
        load_callback("own_callback:Own")
    monkeypatch.chdir(tmp_path)
    assert type(load_callback("own_callback:Own")).__name__ == "Own"
