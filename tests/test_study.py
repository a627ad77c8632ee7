"""Studies: definitions to runs, runs to tables; the full model's row is the benchmark's run."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import yaml
from conftest import write_tiny

from recbole_slifmr.cli import main
from recbole_slifmr.errors import SettingError
from recbole_slifmr.host.settings import make_config, unknown_settings
from recbole_slifmr.paths import PROPERTIES
from recbole_slifmr.study import statistics
from recbole_slifmr.study.benchmark import Variant, benchmark, make_plan, make_tasks
from recbole_slifmr.study.outputs import relative_losses, run_study, write_data
from recbole_slifmr.study.plan import make_study, read_study, study_names
from recbole_slifmr.study.runs import read_result
from recbole_slifmr.training.callback import Callback
from recbole_slifmr.training.experiment import load_data, run

SETTINGS = {"epochs": 2, "topk": [5, 10], "train_batch_size": 64, "valid_metric": "Recall@10"}


@pytest.fixture
def folder(tmp_path):
    write_tiny(tmp_path)
    return tmp_path


def study_of(folder, name="ablation", changes=None, **arguments):
    settings = {**SETTINGS, "data_path": str(folder), **arguments.pop("settings", {})}
    return make_study(name, "tiny", changes, **{"seeds": 1, "out": folder / "out", "settings": settings, **arguments})


def own_study(folder, **content):
    file = folder / "mine.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return str(file)


# -- from a definition to runs ---------------------------------------------------------------------------------------


def test_the_package_brings_the_papers_studies():
    assert study_names() == ["ablation", "coldstart", "interval", "robustness", "sensitivity"]
    for name in study_names():
        assert read_study(name)["title"]


def test_the_settings_of_the_package_s_studies_are_known():
    variants = read_study("ablation")["variants"].values()
    settings = {name: value for variant in variants for name, value in variant.items()}
    settings |= {name: values[0] for name, values in read_study("sensitivity")["vary"].items()}
    assert unknown_settings(make_config("SLIFMR", "toy", settings=settings)) == []


def test_ablation_has_a_variant_per_modality_and_the_full_model_is_the_benchmark_s_run(folder):
    study = study_of(folder, seeds=2)
    assert {"without text", "without image", "shuffled knowledge graph (control)"} <= set(study.titles)
    assert study.first_tasks["without text"].settings["exclude_modalities"] == ["text"]
    plan = make_plan("tiny", ["SLIFMR"], seeds=2, out=folder / "bench", settings={**SETTINGS, "data_path": str(folder)})
    full = [task for task in study.tasks if task.title == "full model"]
    assert [task.key() for task in full] == [task.key() for task in plan.tasks]


def test_variants_about_inputs_that_are_not_there_are_left_out(folder):
    for file in ("tiny.kg", "tiny.link", "text.npy", "image.npy"):
        (folder / "tiny" / file).unlink()
    titles = study_of(folder).titles
    assert "without self-loop" in titles
    assert not [title for title in titles if "knowledge" in title or "feature" in title or "modality" in title]


def test_variants_that_are_the_full_model_share_its_run(folder):
    tasks = study_of(folder).first_tasks
    assert tasks["fusion: attention"].folder == tasks["full model"].folder
    assert tasks["fusion: sum"].folder != tasks["full model"].folder


def test_noise_that_a_model_does_not_read_is_no_run_of_its_own(folder):
    changes = {"models": ["SLIFMR", "LightGCN"], "kinds": ["interaction", "kg"], "levels": [0, 0.2]}
    study = study_of(folder, "robustness", changes)
    tasks = study.first_tasks
    assert tasks["LightGCN kg_tail=0.2"].folder == tasks["LightGCN interaction_add=0"].folder
    assert tasks["SLIFMR kg_tail=0.2"].settings["noise"] == {"kg_tail": 0.2}
    assert len({task.folder for task in study.tasks}) == 5
    one, other = tasks["SLIFMR kg_tail=0.2"], tasks["SLIFMR kg_tail=0"]
    assert one.data != other.data, "their splits may differ"


def test_other_defaults_make_a_run_unfinished(folder, monkeypatch):
    task = study_of(folder).tasks[0]
    before = task.key()
    shutil.copytree(PROPERTIES, folder / "properties")
    monkeypatch.setattr("recbole_slifmr.study.identity.PROPERTIES", folder / "properties")
    assert task.key() == before
    with (folder / "properties/model/SLIFMR.yaml").open("a") as file:
        file.write("n_layers: 7\n")
    assert task.key() != before


def test_noise_in_a_config_file_lets_the_seeds_differ_too(folder):
    file = folder / "noisy.yaml"
    file.write_text("noise: {interaction_add: 0.2}\n")
    one, other = study_of(folder, "interval", {"intervals": [1]}, seeds=2, config_files=[file]).tasks
    assert one.data != other.data
    one, other = study_of(folder, "interval", {"intervals": [1]}, seeds=2).tasks
    assert one.data == other.data


def test_the_off_switch_and_the_interval_are_settings(folder):
    tasks = study_of(folder, "interval", {"intervals": [1, 5, "adaptive", "off"]}).first_tasks
    assert tasks["never"].settings["self_loop"] is False
    assert tasks["every 5 epochs"].settings["refresh_interval"] == 5
    assert tasks["adaptive"].settings["refresh_interval"] == "adaptive"


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("nothing", {}, "no study 'nothing': there are ablation, coldstart"),
        ("ablation", {"levels": [0]}, "study 'ablation' has no levels"),
        ("robustness", {"kinds": ["rain"]}, "no noise 'rain': there are interaction"),
        ("robustness", {"levels": [0.1]}, "levels must hold 0"),
        ("robustness", {"levels": [0, 20]}, "shares from 0 to 1, not 20"),
        ("sensitivity", {"vary": {"n_layer": [1]}}, "SLIFMR has no setting 'n_layer'"),
        ("interval", {"models": ["SLIFMR", "SLIFMR"]}, "named twice"),
        ("interval", {"intervals": [1, 1]}, "two variants 'every epoch'"),
    ],
)
def test_a_bad_definition_is_one_line(folder, name, changes, message):
    with pytest.raises(SettingError, match=message):
        study_of(folder, name, changes)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"kind": "poem"}, "kind must be one of variants, robustness"),
        ({"variants": {"a": {}}, "levels": [0]}, "unknown entry 'levels'"),
        ({"kind": "interval"}, "needs the entry 'intervals'"),
        ({"variants": {"a": 3}}, "must hold settings"),
        ({"variants": ["a"]}, "mapping of label to settings"),
        ({"variants": {"a": {}}, "models": "SLIFMR"}, "models must be a list"),
        ({"variants": {"a": {}}, "models": ["LightGCN", 5]}, "models must be a list of names, not .'LightGCN', 5.$"),
        ({"variants": {"a": {}}, "kind": ["a"]}, "kind must be one of variants, robustness"),
        ({"variants": {1: {}}}, "a variant's label must be text, not 1: put it in quotes"),
        ({"variants": {"a": {5: 1}}}, "must hold settings"),
        ({"variants": {"a": {"noise": 5}}, "reference": "b"}, "reference 'b' is none of the variants on these data: a"),
        ({"variants": {"a": {"seed": 1}, "b": {"seed": 2}}}, "a: seed is the same for all variants: leave it out"),
        ({"variants": {"a": {}, "b": {"threads": 2}}}, "b: threads is the same for all variants: leave it out"),
        ({"kind": "robustness", "kinds": "kg", "levels": [0]}, "kinds must be a list of names, not 'kg'"),
        ({"kind": "robustness", "kinds": ["kg"], "levels": 0}, "levels must be a list of values, not 0"),
        ({"kind": "interval", "intervals": [[1]]}, "intervals must be a list of values"),
        ({"kind": "sensitivity", "vary": {5: [1]}}, "SLIFMR has no setting '5'"),
        ({"kind": "sensitivity", "vary": {"seed": [1, 2]}}, "seed=1: seed is the same for all variants"),
    ],
)
def test_a_bad_file_is_one_line(folder, content, message):
    with pytest.raises(SettingError, match=message):
        study_of(folder, own_study(folder, **content))


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("robustness", {"noise": {"kg_tail": 0.1}}, "varies noise itself: give --kinds and --levels"),
        ("interval", {"refresh_interval": 5}, "varies refresh_interval itself: give --intervals"),
        ("interval", {"self_loop": False}, "varies self_loop itself: give --intervals"),
        ("ablation", {"data_path": 1}, "data_path must name a folder, not 1"),
    ],
)
def test_settings_that_a_study_would_not_heed_are_refused(folder, name, settings, message):
    with pytest.raises(SettingError, match=message):
        study_of(folder, name, settings=settings)


def test_the_share_of_cold_items_may_be_given(folder):
    study = study_of(folder, "coldstart", {"models": ["BPR"]}, settings={"cold_items": 0.4})
    assert make_config(**study.tasks[0].arguments)["cold_items"] == 0.4
    assert make_config(**study_of(folder, "coldstart", {"models": ["BPR"]}).tasks[0].arguments)["cold_items"] == 0.2


def test_an_option_may_leave_the_reference_out(folder):
    assert study_of(folder, "interval", {"intervals": [2, "off"]}).reference == ""


def test_the_command_reports_a_bad_value_in_one_line(folder, capsys):
    for option in (["--vary=n_layers"], ["--levels=0,0.1"], ["--vary=n_layers=1,2,-1"]):
        with pytest.raises(SystemExit) as stop:
            main(
                ["study", "sensitivity", "--dataset=tiny", f"--data_path={folder}", "--out", str(folder / "o"), *option]
            )
        assert stop.value.code == 2
        assert capsys.readouterr().err.count("error: ") == 1
    assert not (folder / "o").exists()


# -- runs to tables --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_own_study_takes_over_the_benchmark_s_run(folder, monkeypatch):
    settings = {**SETTINGS, "data_path": str(folder)}
    bench = benchmark("tiny", ["SLIFMR", "BPR"], seeds=1, out=folder / "bench", settings=settings)
    variants = {"all": {}, "no {modality}": {"exclude_modalities": ["{modality}"]}, "all again": {"n_layers": 3}}
    study = study_of(folder, own_study(folder, title="Mine", reference="all", variants=variants))
    runs = run_study(study, reuse=[folder / "bench"])
    assert list(runs["variant"]) == ["all", "no image", "no text", "all again"]
    stamp = json.loads((folder / "bench/runs/SLIFMR-2020/result.json").read_text())["seconds"]
    assert runs["seconds"][0] == stamp, "the benchmark's run, not another one"
    assert runs["test_recall@10"][0] == runs["test_recall@10"][3] == bench["test_recall@10"][0]
    assert sorted(path.name for path in (folder / "out/runs").iterdir()) == [
        "all-2020",
        "no_image-2020",
        "no_text-2020",
    ]
    outputs = {path.name for path in (folder / "out").iterdir()}
    assert {"manifest.json", "table.md", "table.tex", "bars.png", "curves.png", "results.csv"} <= outputs
    manifest = json.loads((folder / "out/manifest.json").read_text())
    assert manifest["study"] == "mine"
    assert manifest["settings"]["no text"]["exclude_modalities"] == "['text']"
    with pytest.raises(SettingError, match="holds no runs"):
        run_study(study, reuse=[folder])


@pytest.mark.slow
def test_robustness_reports_the_loss_of_the_same_seed(folder):
    changes = {"models": ["SLIFMR", "BPR"], "kinds": ["interaction"], "levels": [0, 0.5]}
    study = study_of(folder, "robustness", changes, seeds=2)
    folders = write_data(study)
    assert [path.parent.name for path in folders] == ["interaction_add=0.5-2020", "interaction_add=0.5-2021"]
    n_train = len(load_data(make_config(**study.tasks[0].arguments), 2020)[0]._dataset)
    assert len((folders[0] / "tiny.train.inter").read_text().splitlines()) == 1 + n_train + round(0.5 * n_train)
    runs = run_study(study)
    assert len(runs) == 8
    losses = relative_losses(runs, "recall@10")
    row = runs[(runs["model"] == "SLIFMR") & (runs["level"] == 0.5) & (runs["seed"] == 2021)]
    before = runs[(runs["model"] == "SLIFMR") & (runs["level"] == 0) & (runs["seed"] == 2021)]
    expected = 1 - row["test_recall@10"].item() / before["test_recall@10"].item()
    assert losses[row.index].item() == pytest.approx(expected)
    assert (losses[runs["level"] == 0] == 0).all()
    prints = [read_result(task)["fingerprints"] for task in study.tasks]
    by_task = dict(zip([task.name for task in study.tasks], prints, strict=True))
    noisy, other = by_task["SLIFMR interaction_add=0.5-2020"], by_task["SLIFMR interaction_add=0.5-2021"]
    assert noisy == by_task["BPR interaction_add=0.5-2020"], "the same noise for every model"
    assert noisy["train"] != other["train"], "another draw for another seed"
    assert noisy["valid"] == other["valid"] == by_task["BPR interaction_add=0-2020"]["valid"]
    text = (folder / "out/table.md").read_text()
    assert "loss at 50%, %" in text and "more than SLIFMR at 50%, points" in text
    assert (folder / "out/robustness.png").stat().st_size > 1000


@pytest.mark.slow
def test_interval_reports_what_refreshing_costs(folder):
    study = study_of(folder, "interval", {"intervals": [1, 2, "off"]}, settings={"epochs": 4})
    runs = run_study(study).set_index("variant")
    assert runs["refreshes"].fillna(0).to_dict() == {"every epoch": 4, "every 2 epochs": 2, "never": 0}
    assert 0 < runs.loc["every epoch", "refresh_seconds"] < runs.loc["every epoch", "seconds"]
    assert {"turnover.png", "cost.png"} <= {path.name for path in (folder / "out").iterdir()}
    assert "share of time in refreshes" in (folder / "out/table.md").read_text()


@pytest.mark.slow
def test_sensitivity_reports_the_signs_of_failure(folder):
    runs = run_study(
        study_of(folder, "sensitivity", {"vary": {"n_layers": [1, 3], "refresh_interval": [1, "adaptive"]}})
    )
    assert runs["homogenisation"].between(-1, 1).all() and runs["smoothing"].between(-1, 1).all()
    assert runs["homogenisation"].nunique() > 1
    assert "n_layers=3" in (folder / "out/table.md").read_text()


@pytest.mark.slow
def test_coldstart_says_who_cannot_score_a_cold_item_and_goes_on_one_page(folder):
    study = study_of(folder, "coldstart", {"models": ["SLIFMR", "BPR"]})
    runs = run_study(study).set_index("variant")
    assert runs.loc["SLIFMR", "test_recall@10/among_cold"] >= 0
    assert np.isnan(runs.loc["BPR", "test_recall@10/among_cold"])
    lines = (folder / "out/table.md").read_text().splitlines()
    assert lines[0].startswith("| model | Recall@10, cold items among all | Recall@10, among cold |")
    assert [line.count("cannot score them") for line in lines[2:4]] == [0, 4]
    assert (folder / "out/cold.png").stat().st_size > 1000
    main_page = folder / "report.html"
    with pytest.raises(SystemExit) as stop:
        main(["report", str(folder / "out"), f"--out={main_page}"])
    assert stop.value.code == 0
    assert "cannot score them" in main_page.read_text()


def test_noisy_data_hold_all_that_a_model_reads_and_are_written_again_when_the_data_change(folder):
    changes = {"models": ["BPR", "SLIFMR"], "kinds": ["interaction"], "levels": [0, 0.5]}
    (data,) = write_data(study_of(folder, "robustness", changes))
    assert {"tiny.train.inter", "tiny.kg", "tiny.link", "text.npy", "image.npy"} <= {
        file.name for file in data.iterdir()
    }
    file = data / "tiny.train.inter"
    written = file.read_text(), file.stat().st_mtime_ns
    assert write_data(study_of(folder, "robustness", changes)) == [data]
    assert (file.read_text(), file.stat().st_mtime_ns) == written
    inter = folder / "tiny" / "tiny.inter"
    inter.write_text("".join(inter.read_text().splitlines(keepends=True)[:-20]))
    write_data(study_of(folder, "robustness", changes))
    assert len(file.read_text()) < len(written[0])


def test_the_data_of_other_studies_are_not_written(folder):
    with pytest.raises(SettingError, match="a study of robustness: 'interval' is none"):
        write_data(study_of(folder, "interval", {"intervals": [1]}))


def test_the_only_run_without_noise_of_a_model_that_draws_nothing_stands_for_all_seeds():
    runs = pd.DataFrame(
        [("EASE", 0.0, 1, 0.5), ("EASE", 0.2, 1, 0.4), ("EASE", 0.2, 2, 0.3),
         ("BPR", 0.0, 1, 0.2), ("BPR", 0.0, 2, 0.4), ("BPR", 0.2, 1, 0.1), ("BPR", 0.2, 2, 0.3), ("BPR", 0.2, 3, 0.3)],
        columns=["model", "level", "seed", "test_recall@10"],
    )  # fmt: skip
    runs = pd.concat([runs.assign(noise=kind) for kind in ("interaction_add", "kg_tail")], ignore_index=True)
    losses = relative_losses(runs, "recall@10")
    assert losses[:8].tolist() == pytest.approx([0, 0.2, 0.4, 0, 0, 0.5, 0.25, np.nan], nan_ok=True)
    assert losses[8:].tolist() == pytest.approx(losses[:8].tolist(), nan_ok=True)


# -- statistics ------------------------------------------------------------------------------------------------------


def test_the_difference_in_loss_by_hand():
    rng = np.random.default_rng(0)
    scores = {"A 0": rng.uniform(0.4, 0.6, 200), "B 0": rng.uniform(0.4, 0.6, 200)}
    scores |= {"A 1": scores["A 0"] * 0.9, "B 1": scores["B 0"] * 0.7}
    users = pd.concat(
        pd.DataFrame({"user": range(200), "model": title, "seed": 1, "m": values}) for title, values in scores.items()
    )
    difference, low, high = statistics.loss_difference(users, "m", ("B 0", "B 1"), ("A 0", "A 1"))
    assert difference == pytest.approx(0.2) and low == pytest.approx(0.2) and high == pytest.approx(0.2)
    assert statistics.loss_difference(users, "m", ("B 0", "C"), ("A 0", "A 1")) is None


def test_a_callback_of_its_own_kind_has_no_trace(folder, monkeypatch):
    hooks = {name: lambda *args: {} for name, hook in vars(Callback).items() if callable(hook)}
    monkeypatch.setattr("recbole_slifmr.training.trainer.load_callback", lambda path: type("Own", (), hooks)())
    result = run("SLIFMR", "tiny", settings={**SETTINGS, "data_path": str(folder), "callbacks": ["a:B"], "epochs": 1})
    assert set(result.traces) == {"diagnostics", "refreshes"}


def test_settings_that_change_nothing_are_no_settings(folder):
    settings = {**SETTINGS, "data_path": str(folder)}
    variants = [Variant("SLIFMR", {}, "a"), Variant("SLIFMR", {"n_layers": 3, "inter_weight": 9.0}, "b")]
    tasks, _ = make_tasks("tiny", variants, folder, seeds=1, settings=settings)
    assert "n_layers" not in tasks[1].settings and tasks[1].settings["inter_weight"] == 9.0
