"""The script that makes the comparisons anew."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
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
