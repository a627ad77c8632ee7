"""The script that makes the comparisons anew."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from argparse import Namespace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import yaml

FILE = Path(__file__).resolve().parents[1] / "results" / "make.py"


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the script without doing what it would do."""
    command = [sys.executable, str(FILE), "--data_path=DATA", "--dry_run", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope="module")
def script():
    spec = spec_from_file_location("make", FILE)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_each_model_is_searched_with_one_budget_and_all_are_scored_together():
    lines = make("--sets=amazon-baby", "--models=CEASE,MSCA,SLIFMR", "--trials=7", "--patience=4").stdout.splitlines()
    closed, msca, slifmr, benchmark = map(shlex.split, lines)
    assert {"-m", "benchmarks.closed_forms", "--models=CEASE"} <= set(closed)
    for model, command in (("MSCA", msca), ("SLIFMR", slifmr)):
        budget = {f"--model={model}", "--trials=7", "--stopping_step=4", "--scheduler=none", "--seeds=0"}
        assert budget <= set(command)
    assert {"--models=CEASE,MSCA,SLIFMR", "--seeds=5", "--stopping_step=4", "--test_mask=train"} <= set(benchmark)


@pytest.mark.parametrize(("option", "known"), [("--sets=toys", "amazon-toys"), ("--models=LightGNC", "LightGCN")])
def test_an_unknown_name_is_refused_with_those_that_are_known(option, known):
    done = make(option)
    assert done.returncode == 2 and known in done.stderr and not done.stdout


def asked(folder: Path, *arguments: str) -> Namespace:
    values = {"sets": "amazon-toys", "models": "BM3", "trials": 7, "epochs": 9, "patience": 3, "seeds": 1, "jobs": 1,
              "threads": 1, "dry_run": False, "data_path": folder}  # fmt: skip
    return Namespace(**{**values, **dict(argument.split("=") for argument in arguments)})


def test_settings_are_published_with_the_command_that_found_them_and_no_other(script, tmp_path, monkeypatch):
    shutil.copytree(script.ROOT / "properties" / "tune", tmp_path / "properties" / "tune")
    monkeypatch.setattr(script, "ROOT", tmp_path)
    monkeypatch.setattr(script, "HERE", tmp_path / "results")
    next(script.commands(asked(tmp_path)))  # it stops before it has found anything
    search = next(script.commands(asked(tmp_path)))
    assert "--trials=7" in search and "--resume" in search
    with pytest.raises(script.OtherCommandError, match=r"tuned/BM3 is of 'slifmr tune .*--trials=7.* not of .*=12"):
        next(script.commands(asked(tmp_path, "trials=12")))
    best = tmp_path / "results" / "out" / "amazon-toys" / "tuned" / "BM3" / "best.yaml"
    best.write_text("n_layers: 1\n")
    with pytest.raises(script.OtherCommandError):
        next(script.commands(asked(tmp_path, "trials=12")))
    assert "benchmark" in next(script.commands(asked(tmp_path)))
    published = (tmp_path / "properties" / "dataset" / "amazon-toys" / "BM3.yaml").read_text()
    assert "--trials=7" in published
    (best.parent / "command").unlink()
    with pytest.raises(script.OtherCommandError, match="of 'an unknown command'"):
        next(script.commands(asked(tmp_path)))


def test_a_command_that_fails_ends_it(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "HERE", tmp_path)
    monkeypatch.setattr(sys, "argv", ["make.py", f"--data_path={tmp_path}", "--sets=amazon-toys", "--models=BM3"])
    monkeypatch.setattr(script.subprocess, "run", lambda command, cwd: Namespace(returncode=1))
    assert script.main() == 1


def test_what_is_published_holds_the_searched_settings_and_no_folder(script, tmp_path):
    best = tmp_path / "best.yaml"
    best.write_text("# slifmr tune\n# trials: 12\n# validation Recall@20: 0.4\nmodel: EASE\nreg_weight: 50.0\n")
    command = ["-c", "main()", "tune", "--model=EASE", f"--data_path={tmp_path}", f"--out={tmp_path}", "--resume"]
    script.publish(best, tmp_path / "toy" / "EASE.yaml", command)
    text = (tmp_path / "toy" / "EASE.yaml").read_text()
    assert yaml.safe_load(text) == {"reg_weight": 50.0} and str(tmp_path) not in text
    assert "slifmr tune --model=EASE --data_path=DIR --out=DIR\n# trials: 12\n# validation Recall@20: 0.4" in text


def test_a_published_table_names_no_folder_of_this_machine(script, tmp_path):
    made, data = tmp_path / "made", tmp_path / "data"
    made.mkdir()
    manifest = {"command": f"-c benchmark --data_path={data} --out={script.ROOT}/results/out/x"}
    (made / "manifest.json").write_text(json.dumps(manifest))
    (made / "table.md").write_text("| model |")
    script.copy_table(made, tmp_path / "table", data)
    command = json.loads((tmp_path / "table" / "manifest.json").read_text())["command"]
    assert command == "slifmr benchmark --data_path=DATA --out=results/out/x"
    assert (tmp_path / "table" / "table.md").read_text() == "| model |"
