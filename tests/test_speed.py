"""The benchmark harness: what it generates and the structure of what it reports; never how long anything takes."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from rich.console import Console

from benchmarks import evaluate, gpu, quality, run, synthetic
from benchmarks.measure import Job
from benchmarks.synthetic import PRESETS, Counts

TINY = PRESETS["tiny"]
SMALL = synthetic.AMAZON_BOOK.scaled(1 / 64)


def generator():
    return np.random.default_rng(0)


def top_share(degree):
    """Return the share of the edges that the top 1% of the nodes hold."""
    degree = np.sort(degree)[::-1]
    return degree[: max(len(degree) // 100, 1)].sum() / degree.sum()


# -- synthetic data ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("counts", [TINY, SMALL], ids=["tiny", "amazon/64"])
def test_interactions_are_unique_and_reach_everybody(counts):
    pairs = synthetic.interactions(counts, generator())
    assert pairs.shape == (counts.interactions, 2)
    assert len(np.unique(pairs, axis=0)) == counts.interactions
    assert np.array_equal(np.unique(pairs[:, 0]), np.arange(counts.users))
    assert np.array_equal(np.unique(pairs[:, 1]), np.arange(counts.items))


@pytest.mark.parametrize("counts", [TINY, SMALL], ids=["tiny", "amazon/64"])
def test_triples_are_unique_without_loops_and_reach_every_entity_and_relation(counts):
    triples = synthetic.triples(counts, generator())
    assert triples.shape == (counts.triples, 3)
    assert len(np.unique(triples, axis=0)) == counts.triples
    assert (triples[:, 0] != triples[:, 2]).all()
    assert np.array_equal(np.unique(triples[:, [0, 2]]), np.arange(counts.entities))
    assert np.array_equal(np.unique(triples[:, 1]), np.arange(counts.relations))
    assert set(range(counts.items)) <= set(triples[:, 0].tolist()), "every item has a triple of its own"


def test_degrees_follow_a_power_law():
    """Evenly drawn, the top 1% would hold a little over 1%; few nodes hold much, most less than the mean."""
    pairs, triples = synthetic.interactions(SMALL, generator()), synthetic.triples(SMALL, generator())
    users, items = np.bincount(pairs[:, 0]), np.bincount(pairs[:, 1])
    entities = np.bincount(triples[:, [0, 2]].flatten())
    assert top_share(users) > 0.04 and top_share(items) > 0.08 and top_share(entities) > 0.05
    for degree in (users, items, entities):
        assert np.median(degree) < degree.mean() < degree.max() / 8
    relations = np.sort(np.bincount(triples[:, 1]))[::-1]
    assert relations[0] > 5 * relations[len(relations) // 2]


def test_popularity_says_nothing_about_the_token():
    degree = np.bincount(synthetic.interactions(SMALL, generator())[:, 1])
    assert abs(np.corrcoef(np.arange(len(degree)), degree)[0, 1]) < 0.2


def test_features_are_clustered():
    """Cosines of a noise matrix of this dimension stay within 0.3; here items of a cluster are close."""
    values = synthetic.features(500, 256, generator())
    assert values.shape == (500, 256) and values.dtype == np.float32
    unit = values / np.linalg.norm(values, axis=1, keepdims=True)
    cosine = unit @ unit.T - np.eye(500)
    assert np.median(cosine.max(1)) > 0.5 and abs(np.median(cosine)) < 0.1


def test_the_same_seed_gives_the_same_files(tmp_path):
    folders = [synthetic.ensure("x", TINY, tmp_path / name, seed) for name, seed in (("a", 1), ("b", 1), ("c", 2))]
    files = sorted(path.name for path in folders[0].iterdir())
    assert files == ["image.npy", "items.txt", "synthetic.json", "text.npy", "x.inter", "x.kg", "x.link"]
    same = [[(folder / name).read_bytes() for name in files] for folder in folders]
    assert same[0] == same[1]
    for name, first, other in zip(files, same[0], same[2], strict=True):
        assert (first == other) == (name in ("items.txt", "x.link")), name


def test_a_data_set_is_kept_until_its_counts_change(tmp_path):
    folder = synthetic.ensure("x", TINY, tmp_path)
    before = (folder / "x.inter").stat().st_mtime_ns
    assert synthetic.ensure("x", TINY, tmp_path) == folder and (folder / "x.inter").stat().st_mtime_ns == before
    synthetic.ensure("x", replace(TINY, interactions=2_500), tmp_path)
    assert len((folder / "x.inter").read_text().splitlines()) == 2_501
    assert [path.name for path in tmp_path.iterdir()] == ["x"], "nothing half-written stays"


def test_a_folder_made_elsewhere_is_left_alone(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "mine").write_text("")
    with pytest.raises(ValueError, match="was not made here"):
        synthetic.ensure("x", TINY, tmp_path)
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["mine"]


@pytest.mark.parametrize("interactions, message", [(100, "too few"), (9_999, "too many")])
def test_impossible_counts_are_refused(interactions, message):
    with pytest.raises(ValueError, match=message):
        synthetic.interactions(Counts(100, 100, interactions), generator())


def test_the_series_grows_by_two_up_to_amazon_book():
    assert PRESETS["8x"] == PRESETS["amazon-book"]
    for small, large in zip(run.SERIES, run.SERIES[1:], strict=False):
        assert PRESETS[large].triples == pytest.approx(2 * PRESETS[small].triples, abs=2)


# -- the harness ------------------------------------------------------------------------------------------------------

MODELS = ("LightGCN", "KGAT", "LATTICE", "SLIFMR")
ALWAYS = ("data", "loaders", "graph", "sampling", "forward", "backward", "optimiser", "evaluation")


def in_this_process(function, argument):
    try:
        return function(argument)
    except ValueError as error:
        return {"error": f"{type(error).__name__}: {error}"}


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """What ``benchmarks.run`` writes and prints of a tiny preset; in this process, where models start sooner."""
    folder = tmp_path_factory.mktemp("speed")
    arguments = ["--preset", "tiny", "--models", ",".join((*MODELS, "Nobody")), "--steps", "1", "--eval_batches", "2"]
    arguments += ["--eval_batch_sizes", "100000", "--set", "eval_batch_size=10000", "--threads", "1"]
    arguments += ["--data_dir", str(folder / "data"), "--out", str(folder / "speed.json")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "in_new_process", in_this_process)
        outcome = CliRunner().invoke(run.main, arguments)
    assert isinstance(outcome.exception, SystemExit) and outcome.exit_code == 1, outcome.output  # one model failed
    return {**json.loads((folder / "speed.json").read_text()), "printed": outcome.output}


def of(report, model):
    return next(result for result in report["results"] if result["model"] == model)


def test_every_model_has_every_phase(report):
    for model in MODELS:
        result = of(report, model)
        phases = result["phases"]
        assert all(phases[name] > 0 for name in ALWAYS), model
        assert set(phases) == {*ALWAYS, "refresh", "diagnostics"}
        per_epoch = ("sampling", "forward", "backward", "optimiser", "refresh", "diagnostics")
        assert result["epoch"] == pytest.approx(sum(phases[name] or 0 for name in per_epoch))
        assert result["peak_memory_mb"] > 100 and result["evaluation_by_batch_size"]["100000"] > 0
        assert result["scaled"] == {"epoch": True, "evaluation": True}
    refreshing = {model for model in MODELS if of(report, model)["phases"]["refresh"] is not None}
    assert refreshing == {"KGAT", "LATTICE", "SLIFMR"}


def test_sizes_are_those_of_the_preset(report):
    sizes = of(report, "SLIFMR")["sizes"]
    assert (sizes["users"], sizes["items"], sizes["interactions"]) == (TINY.users, TINY.items, TINY.interactions)
    assert (sizes["entities"], sizes["triples"], sizes["modalities"]) == (TINY.entities, TINY.triples, 2)
    assert of(report, "KGAT")["sizes"]["entities"] == TINY.entities
    assert of(report, "LightGCN")["sizes"]["interactions"] == TINY.interactions
    batches = -(-sizes["training_interactions"] // 2048)
    assert of(report, "SLIFMR")["batches"] == {"interactions": batches}
    assert of(report, "KGAT")["batches"] == {"interactions": batches, "triples": -(-TINY.triples // 2048)}


def test_slifmr_has_its_floor_beside_it(report):
    floor = of(report, "SLIFMR")["floor"]
    assert set(floor["parts"]) == {"interaction", "user_means", "text", "image", "kg_tags", "optimiser"}
    assert all(seconds > 0 for seconds in floor["parts"].values())
    assert floor["step"] == pytest.approx(sum(floor["parts"].values()))
    assert floor["epoch"] == pytest.approx(2 * floor["step"]) and floor["bound_epoch"] > 0
    assert floor["strict_step"] > 0 and floor["strict_epoch"] == pytest.approx(2 * floor["strict_step"])
    sizes = of(report, "SLIFMR")["sizes"]
    assert floor["nnz"]["user_means"] == sizes["training_interactions"]
    between_items = floor["nnz"]["interaction"] - sizes["training_interactions"]
    assert 2 * 10 * TINY.items < between_items <= 5 * 2 * 10 * TINY.items  # of refresh, modalities, tags, shared users
    assert TINY.items < floor["nnz"]["kg_tags"] <= 2 * 2 * 10 * TINY.items  # its own and that of the refresh
    assert all("floor" not in of(report, model) for model in MODELS[:3])


def test_ratios_and_tables(report):
    ratios = report["ratios"]["tiny"]
    slifmr, kgat = of(report, "SLIFMR"), of(report, "KGAT")
    assert ratios["epoch / KGAT"] == pytest.approx(slifmr["epoch"] / kgat["epoch"])
    assert ratios["epoch / floor"] == pytest.approx(slifmr["epoch"] / slifmr["floor"]["epoch"])
    assert {"epoch / LightGCN", "epoch / strict floor", "epoch / bandwidth bound", "refresh / epoch"} <= set(ratios)
    for word in (*MODELS, "floor", "bandwidth bound", "scaled up from fewer batches", "SLIFMR on tiny: epoch /"):
        assert word in report["printed"]


def test_a_disturbed_measurement_is_pointed_out(report):
    assert all(0 <= of(report, model)["others_cpu"] <= 1 for model in MODELS)
    console = Console(record=True, width=160)
    results = [{**result, "others_cpu": 0.43} for result in report["results"] if "error" not in result]
    run.show({**report, "results": results}, console)
    assert "KGAT: other processes took 43% of the CPU time" in console.export_text()


def test_a_model_that_fails_is_named_and_the_others_go_on(report):
    assert "unknown model 'Nobody'" in of(report, "Nobody")["error"]
    assert "tiny, Nobody: SettingError: unknown model" in report["printed"]


def test_each_model_has_a_process_and_a_peak_memory_of_its_own(tmp_path):
    folder = synthetic.ensure("x", TINY, tmp_path)
    ballast = np.ones(60_000_000)  # 480 MB of this process
    measured = run.run_job(Job("x", "LightGCN", folder.name, str(tmp_path), threads=1))
    assert 100 < measured["peak_memory_mb"] < ballast.nbytes / 1e6 + 300
    assert measured["scaled"] == {"epoch": False, "evaluation": False}
    failed = run.run_job(Job("x", "LightGCN", "nowhere", str(tmp_path), threads=1))
    assert (failed["preset"], failed["model"]) == ("x", "LightGCN") and "\n" not in failed["error"]
    assert failed["error"].startswith("DataError: data set 'nowhere' not found")


def result(preset, **values):
    phases = {"refresh": None, "evaluation": 1.0}
    return {
        "preset": preset,
        "model": "M",
        "epoch": 1.0,
        "step": 1.0,
        "peak_memory_mb": 1.0,
        "phases": phases,
        **values,
    }


def test_exponents_are_the_slopes_of_the_series():
    results = [result(f"{k}x", epoch=3.0 * k**2, step=5.0 * k, peak_memory_mb=7.0) for k in (1, 2, 4, 8)]
    found = run.exponents([*results, result("amazon-book", epoch=1e9), {"preset": "8x", "model": "M", "error": "x"}])
    assert found["M"] == {"epoch": pytest.approx(2, abs=1e-3), "step": pytest.approx(1, abs=1e-3),
                          "evaluation": pytest.approx(0), "peak_memory": pytest.approx(0)}  # fmt: skip
    assert run.exponents(results[:1]) == {}


def test_of_repeated_results_the_least_figures_count():
    phases = [{"refresh": None, "data": value} for value in (3.0, 9.0, 2.0)]
    runs = [
        {"model": "M", "epoch": value, "phases": row, "n": 7}
        for value, row in zip((5.0, 1.0, 6.0), phases, strict=True)
    ]
    assert run.combine(runs) == {"model": "M", "epoch": 1.0, "phases": {"refresh": None, "data": 2.0}, "n": 7}
    assert run.combine([runs[0], {"model": "M", "error": "x"}]) == {"model": "M", "error": "x"}


# -- time to quality --------------------------------------------------------------------------------------------------


def test_time_to_quality_on_the_planted_set(tmp_path, monkeypatch):
    monkeypatch.setattr(quality, "in_new_process", in_this_process)
    arguments = ["--dataset", "toy", "--epochs", "2", "--threads", "1", "--out", str(tmp_path / "quality.json")]
    outcome = CliRunner().invoke(quality.main, arguments)
    assert outcome.exit_code == 0, outcome.output
    written = json.loads((tmp_path / "quality.json").read_text())
    assert [run["model"] for run in written["runs"]] == ["LightGCN", "SLIFMR"]
    assert [epoch for epoch, *_ in written["runs"][0]["curve"]] == [0, 1]
    assert [row["learning_rate"] for row in written["summary"]] == [0.005, 0.01]  # LightGCN's tuned one, SLIFMR's own
    assert "seconds to LightGCN's best validation Recall@20" in outcome.output


def test_the_target_is_the_best_score_of_the_first_model():
    curves = {
        "A": [[0, 1.0, 0.1], [1, 2.0, 0.3], [2, 3.0, 0.2]],
        "B": [[0, 5.0, 0.2], [1, 9.0, 0.4]],
        "C": [[0, 5.0, 0.2]],
    }
    runs = [{"model": name, "seed": 1, "learning_rate": 0.1, "curve": curve} for name, curve in curves.items()]
    rows = {row["model"]: row for row in quality.summarise(runs)}
    assert {row["target"] for row in rows.values()} == {0.3}
    assert (rows["A"]["target_epoch"], rows["A"]["target_seconds"]) == (1, 2.0)
    assert (rows["B"]["target_epoch"], rows["B"]["target_seconds"], rows["B"]["best"]) == (1, 9.0, 0.4)
    assert rows["C"]["target_seconds"] is None and rows["B"]["seconds_per_epoch"] == 4.5


# -- on a GPU ---------------------------------------------------------------------------------------------------------


def test_the_gpu_script_does_a_little_of_everything_on_the_cpu(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "run_part", lambda part, left: gpu.KINDS[part.kind](**part.arguments))
    monkeypatch.setattr(gpu, "OUTPUT", tmp_path)
    monkeypatch.setattr(gpu, "TESTS", ("", "test_loss.py"))
    outcome = CliRunner().invoke(gpu.main, ["--smoke", "--out", str(tmp_path)])
    assert outcome.exit_code == 0, outcome.output
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert list(report["parts"]) == ["agreement", "tiny, SLIFMR", "tiny, LightGCN", "tests"]
    assert report["parts"]["tests"]["passed"] and "passed" in report["parts"]["tests"]["summary"]
    agreement = report["parts"]["agreement"]
    assert agreement["passed"] and set(agreement["models"]) == {"LightGCN", "SLIFMR"}
    for shares in (
        gpu.shares(report["parts"][f"tiny, {model}"], report["bandwidth"]) for model in ("LightGCN", "SLIFMR")
    ):
        assert all(0 < share < 1 for share in shares)
    table = (tmp_path / "gpu.md").read_text()
    assert "| tiny | LightGCN |" in table and "* agreement: agree with the CPU" in table


def test_the_gpu_script_ends_with_status_1_where_tests_fail(tmp_path, monkeypatch):
    failed = {"passed": False, "summary": "1 failed", "failed": ["FAILED test_x"]}
    monkeypatch.setattr(gpu, "run_part", lambda part, left: failed if part.name == "tests" else {"left out": "no time"})
    outcome = CliRunner().invoke(gpu.main, ["--smoke", "--out", str(tmp_path)])
    assert outcome.exit_code == 1 and "1 failed; FAILED test_x" in outcome.output


def test_parts_of_the_gpu_script_keep_their_time_and_say_how_they_failed(tmp_path):
    job = {"preset": "nowhere", "model": "BPR", "data_path": str(tmp_path)}
    failed = gpu.run_part(gpu.Part("x", "timing", job, 60), 60)
    assert "data set 'nowhere' not found" in failed["error"]
    assert "more than its 0 s" in gpu.run_part(gpu.Part("x", "timing", job, 0.1), 60)["left out"]
    script = Path(gpu.__file__).with_name("gpu.sh")
    command = [str(script), "--smoke", "--seconds=0", f"--out={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHON": sys.executable})
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert all(result == {"left out": "no time was left"} for result in report["parts"].values())


def test_differences_between_devices_are_seen():
    one, other = torch.tensor([1.0, -4.0]), torch.tensor([1.0, -4.002])
    assert gpu._difference([(one, one)]) == 0
    assert gpu._difference([(one, one), (one, other)]) == pytest.approx(5e-4, rel=1e-3)


@pytest.mark.parametrize("preset, without", [("electronics", {"KGAT"}), ("ml-100k", {"LATTICE", "FREEDOM"})])
def test_the_gpu_script_times_the_models_that_a_set_is_enough_for(preset, without):
    timed = {part.arguments["model"] for part in gpu.parts(False, "data") if part.arguments.get("preset") == preset}
    assert timed == set(gpu.MODELS) - without


# -- evaluation -------------------------------------------------------------------------------------------------------


def test_the_cost_of_evaluation_on_the_planted_set(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "in_new_process", in_this_process)
    arguments = [
        "--dataset",
        "toy",
        "--model",
        "BPR",
        "--repeats",
        "1",
        "--threads",
        "1",
        "--out",
        str(tmp_path / "e.json"),
    ]
    outcome = CliRunner().invoke(evaluate.main, arguments)
    assert outcome.exit_code == 0, outcome.output
    result = json.loads((tmp_path / "e.json").read_text())["results"]["toy"]
    seconds = result["seconds"]
    assert set(seconds) == {"validation", "bare", "test", "detailed"} and min(seconds.values()) > 0
    assert result["validation / bare"] == pytest.approx(seconds["validation"] / seconds["bare"])
    assert result["test / validation"] == pytest.approx(seconds["test"] / seconds["validation"])
