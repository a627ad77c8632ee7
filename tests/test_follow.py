"""Where runs are followed: what MLflow and Weights & Biases are told, by stand-ins for them."""

import sys
from types import SimpleNamespace

import pytest

from recbole_slifmr.errors import SettingError
from recbole_slifmr.study.benchmark import make_plan
from recbole_slifmr.study.manifest import manifest
from recbole_slifmr.study.runs import Checked
from recbole_slifmr.training import follow
from recbole_slifmr.training.callback import load_callback
from recbole_slifmr.training.experiment import run

NAME = "recbole_slifmr.training.follow:MLflow"


@pytest.fixture
def settings(tiny):
    return {"epochs": 2, "topk": [5], "valid_metric": "Recall@5", "data_path": str(tiny.parent), "show_progress": False}


class MLflow:
    """Keeps what it is told; runs can be nested, as in MLflow."""

    def __init__(self):
        self.active, self.runs = [], []

    def active_run(self):
        return self.active[-1] if self.active else None

    def start_run(self, run_name, nested=False):
        assert nested or not self.active, "MLflow refuses a second run that is not nested"
        new = SimpleNamespace(info=SimpleNamespace(run_id=str(len(self.runs))), name=run_name, told=[], ended=False)
        self.active.append(new)
        self.runs.append(new)
        return new

    def end_run(self):
        self.active.pop().ended = True

    def log_params(self, params):
        self.active[-1].told.append(("params", params, None))

    def log_metrics(self, metrics, step=None):
        assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789_/") for name in metrics), metrics
        self.active[-1].told.append(("metrics", metrics, step))

    def log_dict(self, content, file):
        self.active[-1].told.append((file, content, None))


@pytest.fixture
def mlflow(monkeypatch):
    stand_in = MLflow()
    monkeypatch.setitem(sys.modules, "mlflow", stand_in)
    monkeypatch.setattr(follow.MLflow, "_started", None)
    return stand_in


def test_mlflow_has_settings_scores_by_epoch_test_scores_and_a_manifest(mlflow, settings):
    result = run("SLIFMR", "tiny", settings={**settings, "callbacks": [NAME]}, log=False)
    (followed,) = mlflow.runs
    assert followed.name == "SLIFMR-tiny-2020" and followed.ended and not mlflow.active
    (params,) = [content for kind, content, _ in followed.told if kind == "params"]
    assert params["epochs"] == "2" and params["model"] == "SLIFMR"
    told = {(name, step): value for kind, content, step in followed.told if kind == "metrics"
            for name, value in content.items()}  # fmt: skip
    for epoch, _, score in result.curve:
        assert told["valid/recall_at_5", epoch] == score
        assert told["train/ranking", epoch] > 0
    assert {name: value for (name, step), value in told.items() if name.startswith("test/")} == {
        f"test/{name.replace('@', '_at_')}": value for name, value in result.test.items()
    }
    assert followed.told[-1][0] == "manifest.json"
    about = followed.told[-1][1]
    assert about["fingerprints"] == result.fingerprints and set(about["inputs"]) == set(result.inputs)
    assert about["versions"]["recbole"] and about["settings"]["topk"] == "[5]"


def test_a_run_of_mlflow_s_that_is_active_stays_open_and_one_that_was_left_is_ended(mlflow, settings, monkeypatch):
    outer = mlflow.start_run("mine")
    follow.MLflow().on_train_start(SimpleNamespace(config=_Config(model="SLIFMR")))
    left = mlflow.active[-1]
    run("SLIFMR", "tiny", settings={**settings, "epochs": 1, "callbacks": [NAME]}, log=False)
    assert left.ended and [one.ended for one in mlflow.runs] == [False, True, True]
    assert mlflow.active == [outer] and outer.told == []


class _Config(dict):
    """Settings as RecBole's ``Config`` gives them: None for what there is not."""

    final_config_dict = {"model": "SLIFMR"}

    def __missing__(self, name):
        return None


def test_without_mlflow_one_line_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(SettingError, match="MLflow is not installed: pip install mlflow-skinny"):
        load_callback(NAME)


def test_a_server_that_does_not_answer_is_one_line(mlflow, monkeypatch):
    def start_run(**arguments):
        raise ConnectionError("nobody there\nat all")

    monkeypatch.setattr(mlflow, "start_run", start_run)
    with pytest.raises(SettingError, match=r"^MLflow cannot follow the run: ConnectionError: nobody there$"):
        follow.MLflow().on_train_start(SimpleNamespace(config=_Config(model="SLIFMR")))


def test_a_server_that_is_lost_on_the_way_costs_no_run(mlflow, settings, monkeypatch, caplog):
    def log_metrics(metrics, step=None):
        raise ConnectionError("gone")

    monkeypatch.setattr(mlflow, "log_metrics", log_metrics)
    with caplog.at_level("WARNING"):  # a log of a test before may have set the level of all
        result = run("SLIFMR", "tiny", settings={**settings, "callbacks": [NAME]}, log=False)
    assert result.test and "MLflow was not told (log_metrics): ConnectionError: gone" in caplog.text


class _Update(dict):
    def update(self, content, allow_val_change=False):
        super().update(content)


class Wandb:
    """As much of wandb as RecBole's logger and this package use."""

    def __init__(self):
        self.run, self.logged, self.finished = None, [], 0

    def init(self, project, config):
        self.run = SimpleNamespace(summary=_Update(), config=_Update(), finish=self.finish)

    def finish(self):
        self.finished += 1

    def define_metric(self, name, step_metric):
        pass

    def log(self, metrics, commit=True):
        self.logged.append(metrics)


@pytest.mark.parametrize("model", ["BPR", "EASE"])
def test_wandb_has_the_test_scores_and_a_manifest_of_any_model(model, settings, monkeypatch):
    wandb = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    wandb.__spec__ = SimpleNamespace()
    result = run(model, "tiny", settings={**settings, "log_wandb": True}, log=False)
    assert {f"test/{name}": value for name, value in result.test.items()}.items() <= wandb.run.summary.items()
    about = wandb.run.config["manifest"]
    assert about["settings"]["model"] == model and about["fingerprints"] == result.fingerprints
    assert any("valid/recall@5" in metrics for metrics in wandb.logged), "RecBole's own part"
    assert wandb.finished == 1, "or the next run of this process would overwrite its scores"


def test_a_callback_without_the_hook_at_the_end_still_runs(settings, monkeypatch, tmp_path):
    hooks = ["on_train_start", "on_epoch_start", "on_epoch_end", "on_valid_end", "on_fit_end", "load_state_dict"]
    lines = ["class Old:", "    def state_dict(self): return {}", *(f"    def {h}(self, *a): pass" for h in hooks)]
    (tmp_path / "old_callback.py").write_text("\n".join(lines) + "\n")
    monkeypatch.syspath_prepend(tmp_path)
    given = {**settings, "epochs": 1, "callbacks": ["old_callback:Old"]}
    assert run("SLIFMR", "tiny", settings=given, log=False).test


def test_a_run_and_a_benchmark_name_the_same_versions(tiny):
    plan = make_plan("tiny", ["BPR"], seeds=1, settings={"data_path": str(tiny.parent)})
    assert manifest(plan, Checked({}, {}))["versions"] == follow.versions()
