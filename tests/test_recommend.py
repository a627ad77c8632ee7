"""From a checkpoint to recommendations, explanations and embeddings; what is no checkpoint of these data is refused."""

import csv
import errno
import importlib.util
import io
import json
import os
import pickle
import re
import shutil
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import torch
from conftest import QUIET, all_scores, write_tiny
from rich.cells import cell_len

from recbole_slifmr.cli import main
from recbole_slifmr.serve import recommend
from recbole_slifmr.serve.sentence import NO_LINK, sentence
from recbole_slifmr.serve.trained import load_trained
from recbole_slifmr.training.checkpoint import read_checkpoint
from recbole_slifmr.training.experiment import run


def slifmr(capsys, *arguments):
    """Run a command; return its exit status, its output and the last line of its errors."""
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    return SimpleNamespace(status=stop.value.code, out=said.out, error=(said.err.strip().splitlines() or [""])[-1])


def rows(text):
    return list(csv.DictReader(io.StringIO(text)))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return a function from a model's name to a checkpoint of it on the tiny set; each is trained once."""
    folder, done = tmp_path_factory.mktemp("trained"), {}
    write_tiny(folder)

    def train(model="SLIFMR", **settings):
        key = model, str(settings)
        if key not in done:
            settings = {**QUIET, "data_path": str(folder), "learning_rate": 0.01, **settings}
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(folder)
                done[key] = run(model, "tiny", settings=settings).checkpoint.resolve()
        return done[key]

    train.data = folder / "tiny"
    return train


def history(data):
    seen = {}
    for line in (data / "tiny.inter").read_text().splitlines()[1:]:
        user, item = line.split("\t")
        seen.setdefault(user, set()).add(item)
    return seen


def reference(build, data, checkpoint, model):
    """Return the scores of a model that was loaded as RecBole does, a table of user and item tokens."""
    fresh = build(data, model, learning_rate=0.01)
    fresh.trainer.evaluate(fresh.test, load_best_model=True, model_file=checkpoint)
    users, items = (fresh.dataset.field2id_token[field] for field in ("user_id", "item_id"))
    return pd.DataFrame(all_scores(fresh).numpy()[:, 1:], users[1:], items[1:])


# -- recommendations -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at_once", [1, 50, 2**24])
@pytest.mark.parametrize("model", ["SLIFMR", "LATTICE", "BPR", "KGIN", "EASE"])
def test_everybody_gets_the_brute_force_ranking(trained, build, capsys, monkeypatch, model, at_once):
    monkeypatch.setattr(recommend, "SCORES_AT_ONCE", at_once)
    done = slifmr(capsys, "recommend", "--checkpoint", trained(model), "--all", "--k", 4)
    assert done.status == 0, done.error
    table = pd.DataFrame(rows(done.out)).astype({"rank": int, "score": float})
    scores, seen = reference(build, trained.data, trained(model), model), history(trained.data)
    assert set(table["user"]) == set(seen) and len(table) == 4 * len(seen)
    for user, mine in table.groupby("user"):
        expected = scores.loc[user].drop(list(seen[user])).sort_values(ascending=False)[:4]
        assert mine["item"].tolist() == expected.index.tolist()
        assert mine["rank"].tolist() == [1, 2, 3, 4]
        np.testing.assert_allclose(mine["score"], expected, rtol=1e-5, atol=1e-6)


def test_scores_are_those_of_full_sort_predict_to_the_last_bit(trained, build):
    model = load_trained(trained())
    expected = reference(build, trained.data, trained(), "SLIFMR")
    assert np.array_equal(model.scores(np.arange(1, model.n_users))[:, 1:], expected)


def test_seen_items_and_candidates(trained, capsys, tmp_path):
    seen, file = history(trained.data)["u3"], tmp_path / "items.txt"
    arguments = ["recommend", "--checkpoint", trained(), "--users=u3", "--k=99"]

    def items(*more):
        return {row["item"] for row in rows(slifmr(capsys, *arguments, *more).out)}

    everything = {f"i{i}" for i in range(15)}
    assert items() == everything - seen
    assert items("--include-seen") == everything
    allowed = {"i14", "i3", "i0", *list(seen)[:2]}
    file.write_text("\n".join([*allowed, "", "i3"]))
    assert items(f"--candidates={file}") == allowed - seen
    assert items(f"--candidates={file}", "--include-seen") == allowed
    file.write_text("\n".join(seen))
    assert items(f"--candidates={file}") == set()


def test_users_come_in_the_order_given_and_once(trained, capsys, tmp_path):
    file = tmp_path / "users.txt"
    file.write_text("u7\nu2\n\nu7\nu11\n")
    given = {"--users=u7,u2,u7, u11", f"--users-file={file}"}
    outputs = {slifmr(capsys, "recommend", "--checkpoint", trained(), users, "--k=1").out for users in given}
    assert [row["user"] for row in rows(outputs.pop())] == ["u7", "u2", "u11"] and not outputs


def test_the_formats_hold_the_same(trained, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(recommend, "SCORES_AT_ONCE", 50)  # several parts
    files = {kind: tmp_path / f"out.{kind}" for kind in recommend.FORMATS}
    for file in files.values():
        done = slifmr(capsys, "recommend", "--checkpoint", trained(), "--all", "--k=3", "--out", file)
        assert done.status == 0 and f"60 recommendations for 20 users: {file}" in done.out
    parquet = pd.read_parquet(files["parquet"])
    assert parquet["score"].dtype == np.float32
    pd.testing.assert_frame_equal(pd.read_csv(files["csv"]).astype({"score": np.float32}), parquet)
    as_json = pd.DataFrame(map(json.loads, files["jsonl"].read_text().splitlines()))
    pd.testing.assert_frame_equal(as_json.astype({"score": np.float32}), parquet)


@pytest.mark.parametrize("kind", recommend.FORMATS)
def test_an_interrupted_run_leaves_the_old_file(tmp_path, kind):
    file = tmp_path / "out"
    file.write_text("old")

    def tables():
        yield pd.DataFrame({"user": ["u1"], "score": [1.0]})
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recommend.write_tables(tables(), kind, file, io.StringIO())
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]


def test_similar_items_are_the_nearest_by_cosine(trained, capsys):
    done = slifmr(capsys, "recommend", "--checkpoint", trained(), "--similar-items=i4", "--k=5")
    model = load_trained(trained())
    items = model.embeddings()[1].numpy()[1:]
    items = items / np.linalg.norm(items, axis=1, keepdims=True)
    own = model.item_ids(["i4"])[0] - 1
    cosine = pd.Series(items @ items[own], model.item_tokens[1:]).drop("i4").sort_values(ascending=False)[:5]
    table = pd.DataFrame(rows(done.out))
    assert table["similar_item"].tolist() == cosine.index.tolist()
    np.testing.assert_allclose(table["cosine"].astype(float), cosine, rtol=1e-5)


BAD = {
    "unknown users": (["--users=u1,v1,v2"], "unknown users 'v1', 'v2': 'tiny' has 20 users"),
    "many unknown users": (["--users=" + ",".join("abcdefgh")], "'a', 'b', 'c', 'd', 'e' and 3 more"),
    "the padding user": (["--users=[PAD]"], "unknown user '[PAD]'"),
    "unknown candidate": (["--all", "--candidates=words"], "unknown items 'two', 'words'"),
    "unknown item": (["--similar-items=x"], "unknown item 'x': 'tiny' has 15 items"),
    "no file of users": (["--users-file=nowhere"], "nowhere cannot be read: No such file"),
    "an empty file of users": (["--users-file=empty"], "empty holds no tokens"),
    "nobody": ([], "name users with --users"),
    "users twice": (["--users=u1", "--all"], "name users with --users"),
    "no folder": (["--all", "--out=no/out.csv"], "no/out.csv cannot be written: there is no folder no"),
    "the folder itself": (["--similar-items=i1", "--out=."], ". cannot be written: Is a directory"),
    "parquet on the terminal": (["--all", "--format=parquet"], "parquet is for files"),
    "explaining everybody": (["--all", "--explain"], "--explain is for users"),
    "explaining in a flat file": (["--users=u1", "--explain", "--out=out.csv"], "explanations are nested"),
    "no items": (["--users=u1", "--k=0"], "0 is not in the range"),
    "no such data": (["--all", "--dataset=other"], "data set 'other' not found"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_status_2(trained, capsys, case):
    arguments, message = BAD[case]
    Path("words").write_text("two\nwords\ni1\n")
    Path("empty").touch()
    done = slifmr(capsys, "recommend", "--checkpoint", trained(), *arguments)
    assert done.status == 2 and message in done.error
    assert not Path("out.csv").exists()


def test_scores_that_are_no_numbers_are_refused(trained, capsys):
    state = read_checkpoint(trained("BPR"))
    state["state_dict"]["item_embedding.weight"][3] = torch.nan
    torch.save(state, "nan.pth", pickle_protocol=2)
    done = slifmr(capsys, "recommend", "--checkpoint=nan.pth", "--all")
    assert done.status == 2 and "scores are not numbers" in done.error


# -- explanations ----------------------------------------------------------------------------------------------------


def test_explanations_are_what_the_files_and_the_graph_say(trained, capsys, build):
    done = slifmr(
        capsys, "recommend", "--checkpoint", trained(), "--users=u2,u9", "--k=4", "--explain", "--format=jsonl"
    )
    found = [json.loads(line) for line in done.out.splitlines()]
    assert [row["rank"] for row in found] == [1, 2, 3, 4] * 2
    fresh = build(trained.data, "SLIFMR", learning_rate=0.01)
    fresh.trainer.evaluate(fresh.test, load_best_model=True, model_file=trained())
    model, data = fresh.model, fresh.train._dataset
    users, items = (data.field2token_id[field] for field in ("user_id", "item_id"))
    views = model.encode()
    normalize = model.settings.normalize_views
    item_weights = model.item_fusion.weights(
        torch.nn.functional.normalize(views.items, dim=2) if normalize else views.items, views.item_mask
    )
    edges = set(map(tuple, model.feedback_index.T.tolist()))
    z_user, z_item = (part.detach() for part in model())
    z = torch.nn.functional.normalize(z_item, dim=1)
    learned = set(map(tuple, torch.stack([data.inter_feat["user_id"], data.inter_feat["item_id"]]).T.tolist()))
    # i -> e_i, whose only triple is (e_i, r, x_{i % 4}); i0 is not linked
    n_near = n_shared = 0
    for row in found:
        user, item, why = users[row["user"]], items[row["item"]], row["explanation"]
        assert list(why["item_views"]) == list(why["user_views"]) == ["interaction", "image", "text", "kg_tags"]
        np.testing.assert_allclose(list(why["item_views"].values()), item_weights[item].tolist(), atol=1e-4)
        assert sum(why["user_views"].values()) == pytest.approx(1, abs=1e-3)
        own = {token for token, i in items.items() if (user, i) in learned}
        assert why["graphs"] == pytest.approx(float(z_user[user] @ z_item[item]), abs=1e-3)
        assert why["graphs"] + why["linear"] == pytest.approx(row["score"], abs=1e-3)
        shares = {o: model.linear.scale * float(model.linear.weights[items[o], item]) for o in own}
        assert [n["item"] for n in why["items"]] == sorted((o for o in own if shares[o] > 0), key=shares.get)[::-1][:5]
        for n in why["items"]:
            assert n["score"] == pytest.approx(shares[n["item"]], abs=1e-4)
        near = sorted((o for o in own if (item, items[o]) in edges), key=lambda o: -float(z[item] @ z[items[o]]))
        assert [n["item"] for n in why["neighbours"]] == near[:5]
        for n in why["neighbours"]:
            assert n["cosine"] == pytest.approx(float(z[item] @ z[items[n["item"]]]), abs=1e-4)
        number = int(row["item"][1:])
        common = {o for o in own if int(o[1:]) % 4 == number % 4 and o not in ("i0", row["item"])} if number else set()
        shared = why["shared_entities"]
        assert len(shared) == bool(common)
        if common:
            assert (shared[0]["entity"], shared[0]["relation"]) == (f"x{number % 4}", f"r{number % 2}")
            assert set(shared[0]["items"]) == common
        n_near, n_shared = n_near + len(near), n_shared + len(shared)
    assert n_near and n_shared, "there was something to compare"


def test_explanations_need_slifmr_and_weights(trained, capsys):
    explain = ["--users=u2", "--k=1", "--explain", "--format=jsonl"]
    done = slifmr(capsys, "recommend", "--checkpoint", trained("BPR"), *explain)
    assert done.status == 2 and "--explain is for SLIFMR: BPR has no feedback graph" in done.error
    plain = trained(fusion="concat", self_loop=False, use_kg=False, linear_scale=0.0)
    why = json.loads(slifmr(capsys, "recommend", "--checkpoint", plain, *explain).out)["explanation"]
    assert why == {"user_views": None, "item_views": None, "neighbours": [], "shared_entities": []}


# -- export ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["SLIFMR", "BM3", "BPR", "LightGCN", "KGAT"])
def test_inner_products_of_exported_rows_are_the_scores(trained, build, capsys, model):
    done = slifmr(capsys, "export", "--checkpoint", trained(model), "--out=vectors")
    assert done.status == 0, done.error
    users, items = (np.load(f"vectors/{name}.npy") for name in ("users", "items"))
    assert users.dtype == items.dtype == np.float32
    names = [Path(f"vectors/{name}.txt").read_text().split("\n")[:-1] for name in ("users", "items")]
    expected = reference(build, trained.data, trained(model), model)
    scores, files = users @ items.T, ["items.npy", "items.txt", "users.npy", "users.txt"]
    if model == "SLIFMR":  # and the linear branch, whose weights are all there with so few items
        files.append("weights.npz")
        known = load_trained(trained()).linear_branch.history[1:, 1:]
        scores = scores + known @ scipy.sparse.load_npz("vectors/weights.npz")
    pd.testing.assert_frame_equal(pd.DataFrame(scores, *names), expected, rtol=1e-4, atol=1e-4, check_dtype=False)
    assert sorted(os.listdir("vectors")) == files


def test_the_index_finds_what_the_model_ranks_first(trained, capsys):
    faiss = pytest.importorskip("faiss")
    refused = slifmr(capsys, "export", "--checkpoint", trained(), "--out=vectors", "--faiss")
    assert refused.status == 2 and "a linear branch adds to them" in refused.error
    plain = trained(linear_scale=0.0)
    done = slifmr(capsys, "export", "--checkpoint", plain, "--out=vectors", "--faiss")
    assert done.status == 0, done.error
    users = np.load("vectors/users.npy")
    found = faiss.read_index("vectors/items.faiss").search(users, 3)[1]
    items = Path("vectors/items.txt").read_text().split()
    arguments = ["--all", "--k=3", "--include-seen"]
    ranked = [row["item"] for row in rows(slifmr(capsys, "recommend", "--checkpoint", plain, *arguments).out)]
    assert [items[i] for i in found.flatten()] == ranked


def test_an_export_takes_the_place_of_an_earlier_one(trained, capsys, monkeypatch):
    Path("vectors").mkdir()
    Path("vectors/mine.txt").touch()
    for model, files in (
        ("SLIFMR", {"items.npy", "items.txt", "users.npy", "users.txt", "weights.npz"}),
        ("EASE", {"items.npy", "items.txt", "users.npy", "users.txt", "weights.npz"}),  # refused
        ("CEASE", {"items.txt", "weights.npz"}),
        ("BPR", {"items.npy", "items.txt", "users.npy", "users.txt"}),
    ):
        slifmr(capsys, "export", "--checkpoint", trained(model), "--out=vectors")
        assert set(os.listdir("vectors")) == {"mine.txt", *files}, model
    before = Path("vectors/users.npy").read_bytes()
    monkeypatch.setattr(np, "save", full)
    done = slifmr(capsys, "export", "--checkpoint", trained(), "--out=vectors")
    assert done.status == 1 and done.error == "error: vectors cannot be written: No space left on device"
    assert set(os.listdir("vectors")) == {"mine.txt", *files} and Path("vectors/users.npy").read_bytes() == before


def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_is_one_line_and_status_1(trained, capsys, monkeypatch):
    monkeypatch.setattr(recommend, "_write_text", full)
    done = slifmr(capsys, "recommend", "--checkpoint", trained("BPR"), "--all", "--out=out.csv")
    assert done.status == 1 and done.error == "error: out.csv cannot be written: No space left on device"
    assert os.listdir() == []


def test_a_file_of_tokens_may_begin_with_a_byte_order_mark(trained, capsys):
    Path("users").write_bytes(b"\xef\xbb\xbfu1\n")
    Path("items").write_bytes(b"\xef\xbb\xbfi1,i2\n")
    for option in ("--users-file=users", "--histories=items"):
        done = slifmr(capsys, "recommend", "--checkpoint", trained("EASE"), option, "--k=1")
        assert done.status == 0 and len(rows(done.out)) == 1


def test_what_cannot_be_exported_is_said(trained, capsys, monkeypatch):
    for command in (["export", "--out=vectors"], ["recommend", "--similar-items=i1"]):
        done = slifmr(capsys, *command, "--checkpoint", trained("EASE"))
        assert done.status == 2 and "EASE has no representations" in done.error
    Path("file").touch()
    done = slifmr(capsys, "export", "--out=file", "--checkpoint", trained())
    assert done.status == 2 and "file cannot be written" in done.error
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "faiss" else find(name, *a))
    done = slifmr(capsys, "export", "--out=vectors", "--faiss", "--checkpoint", trained())
    assert done.status == 2 and "--faiss needs FAISS: pip install" in done.error
    assert not Path("vectors").exists()


# -- trust -----------------------------------------------------------------------------------------------------------


class Attack:
    """What a file looks like that runs a command when it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch attacked",)


class OwnModel(torch.nn.Module):
    """A model that only its author has."""


def write_bad(kind, good, path):
    state = read_checkpoint(good)
    if kind == "attack":
        torch.save({**state, "more": Attack()}, path, pickle_protocol=2)
    elif kind == "attack in a plain pickle":
        path.write_bytes(pickle.dumps({"config": Attack()}))
    elif kind == "attack in the old format":
        torch.save({"config": Attack()}, path, _use_new_zipfile_serialization=False)
    elif kind == "unknown model":
        vars(state["config"])["model_class"] = OwnModel
        torch.save(state, path, pickle_protocol=2)
    elif kind == "written by plain RecBole":
        torch.save(state, path, pickle_protocol=4)
    elif kind == "cut short":
        path.write_bytes(good.read_bytes()[:-2000])
    elif kind == "damaged":
        content = bytearray(good.read_bytes())
        content[: len(content) // 2] = bytes(len(content) // 2)
        path.write_bytes(content)
    elif kind == "text":
        path.write_text("just words\n")
    elif kind == "empty":
        path.touch()
    elif kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a.txt", "words")
    elif kind == "tensor":
        torch.save(torch.zeros(3), path)
    elif kind == "only parameters":
        torch.save(state["state_dict"], path)
    elif kind == "other parameters":
        torch.save({**state, "state_dict": {"weight": torch.zeros(3)}}, path, pickle_protocol=2)
    elif kind == "odd record":
        torch.save({**state, "data": [1]}, path, pickle_protocol=2)
    elif kind == "other graphs":
        torch.save({**state, "other_parameter": {"forward": 1}}, path, pickle_protocol=2)


BAD_FILES = {
    "attack": "asks for posix.system, which no checkpoint needs; nothing of it was run",
    "attack in a plain pickle": "cannot be read as a checkpoint",
    "attack in the old format": "asks for posix.system",
    "unknown model": "asks for test_recommend.OwnModel",
    "written by plain RecBole": "as RecBole without this package does",
    "cut short": "damaged, cut short or no file of torch's",
    "damaged": "damaged, cut short or no file of torch's",
    "text": "damaged, cut short or no file of torch's",
    "empty": "damaged, cut short or no file of torch's",
    "zip": "damaged, cut short or no file of torch's",
    "tensor": "is no checkpoint of a model",
    "only parameters": "is no checkpoint of a model",
    "other parameters": "Missing key(s)",
    "odd record": "what it says of its data cannot be read",
    "other graphs": "unknown forward",
    "missing": "checkpoint bad.pth not found",
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_what_is_no_checkpoint_is_refused_in_one_line_by_every_command(trained, capsys, kind):
    bad = Path("bad.pth")
    write_bad(kind, trained(), bad)
    commands = {
        "recommend": ["--checkpoint", bad, "--all"],
        "export": ["--checkpoint", bad, "--out=vectors"],
        "train": [f"--resume={bad}", "--model=SLIFMR", "--dataset=tiny", f"--data_path={trained.data.parent}",
                  "--epochs=3", "--topk=[5]", "--state=ERROR", "--show_progress=False"],
    }  # fmt: skip
    if kind == "other graphs":
        del commands["train"]  # SLIFMR takes over its own graph and no other
    for command, arguments in commands.items():
        done = slifmr(capsys, command, *arguments)
        assert done.status == 2, command
        assert done.error.startswith("error: bad.pth") or kind == "missing"
        assert BAD_FILES[kind] in done.error
    assert not Path("attacked").exists() and not Path("vectors").exists()


def test_the_attack_is_one(trained):
    write_bad("attack", trained(), Path("bad.pth"))
    torch.load("bad.pth", weights_only=False)
    assert Path("attacked").exists()


def test_settings_in_a_checkpoint_are_not_run_and_name_no_file_that_is(trained, capsys):
    attack = "__import__('os').system('touch attacked')"
    state = read_checkpoint(trained())
    settings = {"modality_weight": attack, "callbacks": ["antigravity:Callback"], "checkpoint_dir": "."}
    state["config"].final_config_dict.update(settings, dataset_save_path="data.pkl", dataloaders_save_path="data.pkl")
    torch.save(state, "bad.pth", pickle_protocol=2)
    for file in ("data.pkl", "tiny-SLIFMRDataset.pth", "tiny-for-SLIFMR-dataloader.pth"):
        Path(file).write_bytes(pickle.dumps(Attack()))
    done = slifmr(capsys, "recommend", "--checkpoint=bad.pth", "--users=u1", "--k=1")
    assert done.status == 0, done.error
    state["config"].final_config_dict.update(model="KD_DAGFM", teacher=attack)
    torch.save(state, "bad.pth", pickle_protocol=2)
    done = slifmr(capsys, "recommend", "--checkpoint=bad.pth", "--all")
    assert done.status == 2 and "bad.pth is of 'KD_DAGFM'" in done.error
    assert not Path("attacked").exists()


def test_a_model_that_ranks_no_items_is_refused(trained, capsys):
    done = slifmr(capsys, "recommend", "--checkpoint", trained("NeuMF"), "--all")
    assert done.status == 2 and "NeuMF has no full_sort_predict" in done.error


# -- the data --------------------------------------------------------------------------------------------------------


@pytest.fixture
def moved(trained, tmp_path):
    """A copy of the data in another place, under another name."""
    folder = tmp_path / "elsewhere" / "copy"
    shutil.copytree(trained.data, folder)
    for file in folder.glob("tiny.*"):
        file.rename(folder / file.name.replace("tiny", "copy"))
    return folder


def test_data_may_have_moved(trained, capsys, moved):
    arguments = ["recommend", "--checkpoint", trained(), "--all"]
    there = [*arguments, f"--data_path={moved.parent}", "--dataset=copy"]
    expected = slifmr(capsys, *arguments).out
    assert slifmr(capsys, *there).out == expected
    swap(moved)
    done = slifmr(capsys, *there)
    assert done.status == 2 and f"was trained on other data than {moved} gives: user tokens" in done.error


def swap(folder):
    """Let two users change their names: as many users, items and interactions as before, other ids."""
    file = folder / "copy.inter"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([lines[0], *reversed(lines[1:])]) + "\n")


def without_record(checkpoint):
    state = read_checkpoint(checkpoint)
    del state["data"]
    torch.save(state, "old.pth", pickle_protocol=2)
    return "old.pth"


def test_checkpoints_without_a_record_of_their_data_load(trained, capsys, moved):
    old, arguments = without_record(trained()), ["--all", f"--data_path={moved.parent}", "--dataset=copy"]
    expected = slifmr(capsys, "recommend", "--checkpoint", trained(), "--all").out
    assert slifmr(capsys, "recommend", f"--checkpoint={old}", *arguments).out == expected
    with (moved / "copy.inter").open("a") as file:
        file.write("another\ti1\n")
    done = slifmr(capsys, "recommend", f"--checkpoint={old}", *arguments)
    assert (
        done.status == 2 and f"old.pth does not fit SLIFMR on {moved}" in done.error and "size mismatch" in done.error
    )


def change_a_user(folder):
    """Give the user of the last line other items, as many as before."""
    file = folder / "copy.inter"
    header, *lines = file.read_text().splitlines()
    user = lines[-1].split("\t")[0]
    taken = {line.split("\t")[1] for line in lines if line.startswith(f"{user}\t")}
    others = (f"{user}\ti{i}" for i in range(15) if f"i{i}" not in taken)
    lines = [next(others) if line.startswith(f"{user}\t") else line for line in lines]
    file.write_text("\n".join([header, *lines]) + "\n")


def change_a_relation(folder):
    file = folder / "copy.kg"
    file.write_text(file.read_text().replace("\tr2\t", "\tr7\t"))


CHANGES = {
    "training interactions": change_a_user,
    "features 'text'": lambda folder: np.save(folder / "text.npy", np.load(folder / "text.npy") * [1, 1, 1, 1, 1, 2]),
    "relation tokens": change_a_relation,
}


@pytest.mark.parametrize("what", CHANGES)
def test_other_data_of_equal_sizes_are_named(trained, capsys, moved, what):
    CHANGES[what](moved)
    there = [f"--data_path={moved.parent}", "--dataset=copy"]
    done = slifmr(capsys, "export", "--checkpoint", trained(), "--out=vectors", *there)
    assert done.status == 2 and what in done.error.split(" gives: ")[1].split(";")[0]
    fast = ["--model=SLIFMR", "--epochs=3", "--topk=[5,10]", "--valid_metric=Recall@10", "--state=ERROR"]
    done = slifmr(capsys, "train", f"--resume={trained()}", *there, *fast, "--show_progress=False")
    assert done.status == 2 and what in done.error


# -- names -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def titled(moved):
    """Titles and years of the items, but for i3, which has no row, and i4, which has no title; as arguments."""
    lines = [f"i{i}\t{'' if i == 4 else f'Film, {i}'}\t{1990 + i}" for i in range(15) if i != 3]
    (moved / "copy.item").write_text("item_id:token\ttitle:token_seq\tyear:float\n" + "\n".join(lines) + "\n")
    return [f"--data_path={moved.parent}", "--dataset=copy"]


def title_of(token):
    return "" if token in ("i3", "i4") else f"Film, {token[1:]}"


def year_of(token):
    return "" if token == "i3" else str(1990 + int(token[1:]))


@pytest.mark.parametrize("kind", recommend.FORMATS)
def test_columns_of_the_items_stand_beside_their_ids_in_every_format(trained, capsys, titled, tmp_path, kind):
    file = tmp_path / f"out.{kind}"
    arguments = ["recommend", "--checkpoint", trained(), *titled, "--all", "--k=15", "--include-seen", "--out", file]
    assert slifmr(capsys, *arguments, "--show=title,year").status == 0
    read = {
        "csv": lambda: pd.read_csv(file, dtype=str, keep_default_na=False),
        "jsonl": lambda: pd.DataFrame(map(json.loads, file.read_text().splitlines())),
        "parquet": lambda: pd.read_parquet(file),
    }[kind]
    table = read()
    assert list(table) == ["user", "item", "title", "year", "rank", "score"]
    assert set(table["item"]) == {f"i{i}" for i in range(15)}
    assert table["title"].tolist() == list(map(title_of, table["item"]))
    assert table["year"].tolist() == list(map(year_of, table["item"]))
    assert slifmr(capsys, *arguments).status == 0
    pd.testing.assert_frame_equal(read(), table.drop(columns=["title", "year"]))  # files stay as they are


def test_columns_stand_beside_similar_items_and_explanations_stay_for_machines(trained, capsys, titled):
    done = slifmr(capsys, "recommend", "--checkpoint", trained(), *titled, "--similar-items=i5", "--k=4", "--show=year")
    table = rows(done.out)
    assert list(table[0]) == ["item", "similar_item", "year", "rank", "cosine"] and len(table) == 4
    assert all(row["year"] == year_of(row["similar_item"]) for row in table)
    explain = ["recommend", "--checkpoint", trained(), *titled, "--users=u2", "--explain", "--format=jsonl"]
    plain, shown = (
        [json.loads(line) for line in slifmr(capsys, *explain, *more).out.splitlines()]
        for more in ([], ["--show=title"])
    )
    assert [row.pop("title") for row in shown] == [title_of(row["item"]) for row in plain]
    assert shown == plain


def test_a_name_that_the_output_has_already_is_told_apart(trained, capsys, titled, moved):
    (moved / "copy.item").write_text("item_id:token\trank:token\ni1\tgold\n")
    done = slifmr(capsys, "recommend", "--checkpoint", trained(), *titled, "--users=u2", "--k=3", "--show=rank")
    assert done.out.splitlines()[0] == "user,item,item_rank,rank,score"


def test_a_terminal_shows_titles_without_being_asked(trained, capsys, titled, monkeypatch):
    arguments = ["recommend", "--checkpoint", trained(), *titled, "--users=u2", "--k=2"]
    assert slifmr(capsys, *arguments).out.splitlines()[0] == "user,item,rank,score"
    monkeypatch.setattr(type(sys.stdout), "isatty", lambda self: True)
    table = rows(slifmr(capsys, *arguments).out)
    assert [row["title"] for row in table] == [title_of(row["item"]) for row in table]
    assert "title" not in slifmr(capsys, *arguments, "--show=").out
    assert "title" not in slifmr(capsys, *arguments, "--format=csv").out


@pytest.mark.parametrize(
    "content, show, message",
    [
        ("item_id:token\ttitle:token\ni1\tone\n", "titel", "copy.item has no column 'titel', only item_id, title"),
        ("item_id:token\ttitle:token\ni1\tone\ni1\ttwo\n", "title", "lines 2 and 3 say different things of item_id"),
        (None, "title", "copy.item not found: it should hold the column 'title'"),
    ],
)
def test_columns_that_cannot_be_shown_are_named(trained, capsys, moved, content, show, message):
    if content is not None:
        (moved / "copy.item").write_text(content)
    there = [f"--data_path={moved.parent}", "--dataset=copy"]
    arguments = ["recommend", "--checkpoint", trained(), *there, "--users=u2"]
    done = slifmr(capsys, *arguments, f"--show={show}")
    assert done.status == 2 and done.out == "" and message in done.error


# -- sentences -------------------------------------------------------------------------------------------------------


def facts_of(sentence):
    """Take a sentence apart: the items after `because of`, (relation, entity, item) of `shares`, items after `near`."""
    because, shares, near = [], [], []
    for part in sentence.split("; "):
        if part.startswith("because of "):
            because = part.removeprefix("because of ").split(" and ")
        elif part.startswith("near "):
            near = part.removeprefix("near ").split(" and ")
        elif match := re.fullmatch(r"shares (\w+) (\w+) with (.+)", part):
            shares.append(match.groups())
        else:
            assert re.fullmatch(r"content adds -?\d+\.\d\d of -?\d+\.\d\d", part) or part == NO_LINK, part
    return because, shares, near


def test_every_part_of_a_sentence_is_a_fact_of_the_data(trained, capsys, titled, build):
    arguments = ["recommend", "--checkpoint", trained(), *titled, "--users=u2,u9,u11", "--k=4", "--explain"]
    done = slifmr(capsys, *arguments)
    lines = done.out.splitlines()
    assert done.status == 0 and max(map(len, lines)) <= 80 and len(lines) == 3 * (1 + 4 * 2)
    ranked = pd.DataFrame(rows(slifmr(capsys, *arguments[:-1]).out))
    fresh = build(trained.data, "SLIFMR", learning_rate=0.01)
    fresh.trainer.evaluate(fresh.test, load_best_model=True, model_file=trained())
    model, data = fresh.model, fresh.train._dataset
    ids = data.field2token_id["item_id"]
    tokens = {(title_of(token) or token): token for token in ids}
    edges = set(map(tuple, model.feedback_index.T.tolist()))
    read = {path: [line.split("\t") for line in (trained.data / f"tiny.{path}").read_text().splitlines()[1:]]
            for path in ("kg", "link")}  # fmt: skip
    entity = dict(read["link"])
    found = {"because": 0, "shares": 0, "near": 0}
    for start in range(0, len(lines), 9):
        user = re.match(r"user (\w+), views: interaction", lines[start])[1]
        own = set(data.inter_feat["item_id"][data.inter_feat["user_id"] == data.token2id("user_id", user)].tolist())
        for place in range(4):
            head, why = lines[start + 1 + 2 * place : start + 3 + 2 * place]
            row = ranked[(ranked["user"] == user) & (ranked["rank"] == str(place + 1))].iloc[0]
            shown = " ".join(part for part in (row["item"], title_of(row["item"])) if part)
            assert head == f" {place + 1}  {shown}  {float(row['score']):.4f}"
            item = ids[row["item"]]
            because, shares, near = facts_of(why.strip())
            adds = {token: float(model.linear.weights[ids[token], item]) for token in ids if ids[token] in own}
            largest = sorted((token for token in adds if adds[token] > 0), key=adds.get, reverse=True)
            assert [tokens[name] for name in because] == largest[: len(because)] and (because or not largest)
            for relation, tail, name in shares:
                other = tokens[name]
                assert ids[other] in own
                for linked in (row["item"], other):
                    assert [entity[linked], relation, tail] in read["kg"]
            for name in near:
                assert (item, ids[tokens[name]]) in edges and ids[tokens[name]] in own
            for kind, named in (("because", because), ("shares", shares), ("near", near)):
                found[kind] += bool(named)
    assert all(found.values()), f"there was something of each kind to compare: {found}"


WHY = {
    "items": [{"item": "a", "score": 0.5}, {"item": "b", "score": 0.2}, {"item": "c", "score": -0.1}],
    "neighbours": [{"item": "b", "cosine": 0.9}, {"item": "d", "cosine": 0.8}],
    "shared_entities": [{"entity": "m.1", "relation": "film.director.film", "items": ["e", "a"]}],
}


@pytest.mark.parametrize(
    "why, said",
    [
        (WHY, "because of A and B; shares director film m.1 with E; near D"),
        ({**WHY, "items": []}, "shares director film m.1 with E; near B and D"),
        ({**WHY, "items": WHY["items"][2:], "shared_entities": [], "neighbours": []}, NO_LINK),
        (
            {"interactions": 0.5, "content": -0.125, "items": WHY["items"][1:]},
            "because of B; content adds -0.12 of 0.38",
        ),
        ({"interactions": 0.5, "content": 0.0, "items": WHY["items"][:1]}, "because of A"),
    ],
)
def test_a_sentence_says_what_the_explanation_does(why, said):
    assert sentence(why, str.upper) == said


@pytest.mark.parametrize("length", [1, 20, 30, 60, 200])
@pytest.mark.parametrize("letter", ["x", "映"])
def test_a_sentence_fits_its_line_whatever_the_names(length, letter):
    name = f"{letter * length}\n\x1b[31m".__add__
    said = sentence(WHY, name, 76)
    assert cell_len(said) <= 76 and said.isprintable() and said.startswith(f"because of {letter}")
    assert cell_len(sentence({**WHY, "items": []}, name, 40)) <= 40
