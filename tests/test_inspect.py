"""What is found in a data set is what is in it."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import QUIET, write_table

from recbole_slifmr.cli import main
from recbole_slifmr.data.survey import co_consumption_auc, survey
from recbole_slifmr.data.survey_report import remarks
from recbole_slifmr.host.settings import make_config
from recbole_slifmr.training.experiment import load_data


def survey_of(folder, **settings):
    config = make_config("SLIFMR", folder.name, settings={**QUIET, "data_path": str(folder.parent), **settings})
    splits = [loader._dataset for loader in load_data(config)]
    return survey(config, dict(zip(("train", "valid", "test"), splits, strict=True)), n_pairs=5_000)


def run(*arguments):
    with pytest.raises(SystemExit) as stop:
        main(["inspect", *map(str, arguments)])
    return stop.value.code


@pytest.fixture
def small(tmp_path):
    """Three users, four items; everything that can be odd is, once or twice."""
    root = tmp_path / "small"
    root.mkdir()
    header = "user_id:token\titem_id:token"
    write_table(root / "small.train.inter", header, [("a", 1), ("a", 2), ("b", 1), ("b", 2), ("b", 2), ("c", 3)])
    write_table(root / "small.valid.inter", header, [("a", 1), ("b", 3), ("c", 1)])
    write_table(root / "small.test.inter", header, [("a", 3), ("c", 4), ("d", 1)])
    triples = [("x1", "r", "g"), ("x1", "r", "g"), ("x2", "r", "g"), ("x3", "s", "h"), ("h", "s", "k")]
    write_table(root / "small.kg", "head_id:token\trelation_id:token\ttail_id:token", triples)
    links = [(1, "x1"), (1, "x1"), (2, "x1"), (3, "x3"), (4, "lost"), (9, "x2")]
    write_table(root / "small.link", "item_id:token\tentity_id:token", links)
    (root / "items.txt").write_text("1\n2\n")
    np.save(root / "text.npy", np.array([[1.0, 0.0], [1.0, 0.1]]))
    return root


def test_everything_is_counted(small):
    found = survey_of(small, benchmark_filename=["train", "valid", "test"], topk=[2], valid_metric="Recall@2")
    assert found["counts"]["all"] == {"users": 4, "items": 4, "interactions": 12, "density": 12 / 16}
    assert found["counts"]["train"] == {"users": 3, "items": 3, "interactions": 6, "density": 6 / 9}
    assert found["unseen"]["valid"] == {"users": 0, "items": 0, "pairs_of_training": 1}
    assert found["unseen"]["test"] == {"users": 1, "items": 1, "pairs_of_training": 0}
    assert found["duplicates"] == {"train.inter": 1, "valid.inter": 0, "test.inter": 0, "kg": 1, "link": 1}
    assert found["knowledge_graph"] == {
        "triples": 5, "relations": 2, "entities": 6, "items_linked": 2, "links": 5, "links_to_unknown_items": 1,
        "links_to_unknown_entities": 1, "entities_of_several_items": 1,
    }  # fmt: skip
    assert found["modalities"] == {"text": {"dimension": 2, "items": 2}}
    assert found["items_without_either"] == 1
    assert found["degrees"]["users"] == pytest.approx(
        {"min": 0, "median": 1.5, "mean": 1.5, "max": 3, "share_of_top_fifth": 0.5}
    )
    assert found["degrees"]["entities"]["max"] == 3
    text = "\n".join(remarks(found))
    for line in (
        "1 pairs of user and item are in valid and in training",
        "1 items of test (33.3%) are not in training",
        "1 rows of .train.inter repeat an earlier one",
        "1 links to unknown items",
        "1 entities of several items",
        "1 items (25.0%) have neither an entity nor features",
    ):
        assert line in text


def test_the_auc_is_1_for_a_perfect_similarity_and_a_half_for_none():
    rng = np.random.default_rng(0)
    users = np.repeat(np.arange(200), 10)
    items = rng.integers(0, 20, 2_000) * 2 + users % 2  # users of two tastes, items of two kinds
    pairs = np.stack([users, items])
    same_kind, n_pairs = co_consumption_auc(pairs, lambda a, b: (a % 2 == b % 2).astype(float), 20_000, 0)
    assert n_pairs > 15_000
    assert same_kind == pytest.approx(0.75, abs=0.02)  # half of the random pairs are of the same kind, too
    noise = rng.random(40)
    assert co_consumption_auc(pairs, lambda a, b: noise[a] * noise[b], 20_000, 0)[0] == pytest.approx(0.5, abs=0.02)
    again = co_consumption_auc(pairs, lambda a, b: (a % 2 == b % 2).astype(float), 20_000, 0)
    assert again == (same_kind, n_pairs)


def test_popularity_alone_is_no_similarity():
    rng = np.random.default_rng(0)
    weight = 1 / np.arange(1, 501) ** 0.7
    items = rng.choice(500, 8_000, p=weight / weight.sum())
    pairs = np.unique(np.stack([rng.integers(0, 300, 8_000), items]), axis=1)
    items = pairs[1]
    popularity = np.bincount(items)
    auc, _ = co_consumption_auc(pairs, lambda a, b: popularity[a] * popularity[b].astype(float), 20_000, 0)
    assert auc == pytest.approx(0.5, abs=0.03)


def test_without_pairs_there_is_no_auc():
    assert co_consumption_auc(np.array([[0, 1], [0, 1]]), lambda a, b: a * 1.0, 10, 0) == (None, 0)
    assert co_consumption_auc(np.zeros((2, 0), dtype=int), lambda a, b: a * 1.0, 10, 0) == (None, 0)


def test_features_and_graph_of_the_planted_set_tell_taste():
    from recbole_slifmr.paths import DATASETS, ROOT

    found = survey_of(ROOT / DATASETS / "toy")
    assert found["similarity"]["text"]["auc"] > 0.55 and found["similarity"]["knowledge graph"]["auc"] > 0.55
    assert all(value >= 0 for value in found["memory_mb"].values())


def said_of_text(rows, folder):
    """Inspect the planted set with other text features; return the remarks on them."""
    from recbole_slifmr.paths import DATASETS, ROOT

    toy = ROOT / DATASETS / "toy"
    folder.mkdir()
    np.save(folder / "text.npy", rows(np.load(toy / "text.npy")))
    (folder / "items.txt").write_text((toy / "items.txt").read_text())
    return [line for line in remarks(survey_of(toy, feature_path=str(folder))) if line.startswith("text: ")]


def test_features_that_say_nothing_are_named(tmp_path):
    noise = np.random.default_rng(0)
    assert said_of_text(lambda good: good, tmp_path / "good") == []
    constant = said_of_text(lambda good: np.ones_like(good), tmp_path / "constant")
    assert any("items have the same features, which tell none from another" in line for line in constant)
    (line,) = said_of_text(lambda good: noise.normal(size=good.shape), tmp_path / "noise")
    assert line.startswith("text: similar items are not consumed by the same users (AUC 0.")
    placeholder = said_of_text(lambda good: np.where(np.arange(len(good))[:, None] % 4, good, 1), tmp_path / "some")
    assert any("have the features of an earlier item" in line for line in placeholder)


def test_a_set_of_interactions_alone(tiny):
    for file in ("tiny.kg", "tiny.link", "text.npy", "image.npy"):
        (tiny / file).unlink()
    found = survey_of(tiny)
    assert found["knowledge_graph"] is None and found["similarity"] == {} and found["modalities"] == {}
    assert found["relations"] == []
    assert found["items_without_either"] == 15 and list(found["degrees"]) == ["users", "items"]


def test_the_command_prints_and_writes(tiny, tmp_path, capsys):
    before = {path.name: path.read_bytes() for path in tiny.iterdir()}
    out = tmp_path / "out"
    assert run("tiny", f"--data_path={tiny.parent}", f"--out={out}", "--topk=[5]") == 0
    shown = capsys.readouterr().out
    for text in ("tiny: sizes", "interactions", "knowledge graph", "AUC", "what relations tell", "in all", "outputs:"):
        assert text in shown
    assert sorted(path.name for path in out.iterdir()) == ["degrees.png", "inspect.json", "inspect.md"]
    found = json.loads((out / "inspect.json").read_text())
    assert found["counts"]["all"]["interactions"] == 140
    assert found["knowledge_graph"]["links_to_unknown_items"] == 1
    assert {row["relation"] for row in found["relations"]} == {"r0", "r1"}
    assert all(row["item_is"] == "head" and 2 <= row["tags"] <= row["items"] <= 7 for row in found["relations"])
    assert "| interactions | 140 |" in (out / "inspect.md").read_text()
    assert (out / "degrees.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name: path.read_bytes() for path in tiny.iterdir()} == before


@pytest.mark.parametrize("model", ["LATTICE", "XSimGCL", "LightKG", "CEASE"])
def test_the_memory_is_that_of_the_model_asked_for(tiny, tmp_path, model):
    assert run("tiny", f"--model={model}", f"--data_path={tiny.parent}", f"--out={tmp_path}", "--topk=[5]") == 0
    found = json.loads((tmp_path / "inspect.json").read_text())
    assert ("item graphs" in found["memory_mb"]) == (model == "LATTICE")
    assert ("solving" in found["memory_mb"]) == (model == "CEASE")
    assert set(found["modalities"]) == (set() if model in ("XSimGCL", "LightKG") else {"text", "image"})


def test_no_command_writes_into_the_folder_of_the_data(tiny, capsys):
    def state():
        return {path: (path.is_dir() or path.read_bytes(), path.stat().st_mtime_ns) for path in [tiny, *tiny.iterdir()]}

    before = state()
    data, fast = f"--data_path={tiny.parent}", ("--epochs=1", "--topk=[5]", "--show_progress=False", "--state=ERROR")
    commands = [
        ("train", "--model=SLIFMR", "--dataset=tiny", data, *fast, "--checkpoint_dir=saved"),
        ("inspect", "tiny", data, "--topk=[5]"),
    ]
    for command in commands:
        with pytest.raises(SystemExit) as stop:
            main(list(command))
        assert stop.value.code == 0, capsys.readouterr().err
    (checkpoint,) = Path("saved").glob("*.pth")
    for command in (("recommend", "--all", "--out=r.csv"), ("export", "--out=exported")):
        with pytest.raises(SystemExit) as stop:
            main([*command, f"--checkpoint={checkpoint}"])
        assert stop.value.code == 0, capsys.readouterr().err
    assert state() == before


def test_bad_input_to_the_command_is_one_line(tiny, capsys):
    assert run("nothere") == 2
    assert run("tiny", f"--data_path={tiny.parent}", "--knn_kk=3") == 2
    said = capsys.readouterr().err.splitlines()
    assert any("data set 'nothere' not found" in line for line in said)
    assert "unknown setting 'knn_kk'" in said[-1]
