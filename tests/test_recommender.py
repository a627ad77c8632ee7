"""Training and recommending from Python, with frames in memory: what the commands give, and nothing left behind."""

import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from recbole_slifmr import Recommender
from recbole_slifmr.cli import main
from recbole_slifmr.data.history import History
from recbole_slifmr.errors import DataError, SettingError, StorageError
from recbole_slifmr.serve.newcomers import recommend_for, scorer

N_USERS, N_ITEMS = 30, 20
SETTINGS = {"epochs": 2, "topk": [5], "train_batch_size": 64}


def frames(seed=0):
    """Interactions with whole numbers as tokens, items in another order, a knowledge graph and two modalities."""
    rng = np.random.default_rng(seed)
    pairs = [(user + 100, int(item) + 5) for user in range(N_USERS) for item in rng.choice(N_ITEMS, 8, replace=False)]
    order = rng.permutation(N_ITEMS)
    linked = range(1, N_ITEMS)
    return {
        "interactions": pd.DataFrame(pairs, columns=["userId", "movieId"]).sample(frac=1, random_state=seed),
        "items": pd.DataFrame({"movieId": order + 5, "title": [f"film {item}\nby x" for item in order]}),
        "triples": pd.DataFrame(
            {"head": [f"e{i}" for i in linked], "relation": "r", "tail": [f"x{i % 4}" for i in linked]}
        ),
        "links": pd.DataFrame({"movieId": [i + 5 for i in linked], "entity": [f"e{i}" for i in linked]}),
        "features": {
            "text": rng.normal(size=(N_ITEMS, 6)).astype(np.float32),
            "image": pd.DataFrame(rng.normal(size=(15, 4)), index=pd.Index(np.arange(15) + 5, name="movieId")),
        },
    }


def command(*arguments):
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    assert not stop.value.code


@pytest.fixture(scope="module")
def trained():
    """Return a function from a model's name to a recommender of it, each trained once."""
    done = {}

    def train(model="SLIFMR"):
        if model not in done:
            done[model] = Recommender(model, **SETTINGS).fit(**frames())
        return done[model]

    return train


def from_commands(data, model, settings):
    """Write the frames by hand, convert, train and recommend by commands; return the recommendations of everybody."""
    data["interactions"].to_csv("inter.csv", index=False)
    data["items"].assign(title=data["items"]["title"].str.replace("\n", " ")).to_csv("items.csv", index=False)
    data["triples"].to_csv("triples.csv", index=False)
    data["links"].to_csv("links.csv", index=False)
    Path("text").mkdir()
    np.save("text/text.npy", data["features"]["text"])
    Path("image").mkdir()
    np.save("image/image.npy", data["features"]["image"].to_numpy())
    Path("image/items.txt").write_text("".join(f"{item}\n" for item in data["features"]["image"].index))
    names = {
        "user": "userId",
        "item": "movieId",
        "head": "head",
        "relation": "relation",
        "tail": "tail",
        "entity": "entity",
    }
    command(
        "convert", "csv", "--interactions=inter.csv", "--items=items.csv", "--triples=triples.csv", "--links=links.csv",
        "--features=text=text/text.npy,image=image/image.npy", "--out=sets", "--name=mine",
        *(f"--{kind}-column={name}" for kind, name in names.items()),
    )  # fmt: skip
    command(
        "train", f"--model={model}", "--dataset=mine", "--data_path=sets", "--checkpoint_dir=checkpoints",
        "--state=ERROR", "--show_progress=False", *(f"--{name}={value}" for name, value in settings.items()),
    )  # fmt: skip
    (checkpoint,) = Path("checkpoints").glob("*.pth")
    command("recommend", f"--checkpoint={checkpoint}", "--all", "--k=4", "--out=all.parquet")
    return pd.read_parquet("all.parquet")


@pytest.mark.parametrize("model", ["SLIFMR", "BPR", "CEASE"])
def test_scores_are_those_of_the_commands_to_the_last_bit(model):
    settings = {"topk": [5]} if model == "CEASE" else SETTINGS
    data = frames()
    expected = from_commands(data, model, settings)
    got = Recommender(model, **settings).fit(**data).recommend(k=4)
    assert len(got) == 4 * N_USERS and set(got["user"]) == set(data["interactions"]["userId"])
    pd.testing.assert_frame_equal(got.astype({"user": str, "item": str}), expected, check_exact=True)


def test_an_atomic_data_set_by_folder_and_by_name(tiny, monkeypatch):
    by_folder = Recommender("BPR", **SETTINGS).fit(tiny).recommend(["u3", "u1"], k=2)
    by_name = Recommender("BPR", data_path=str(tiny.parent), **SETTINGS).fit("tiny").recommend(["u3", "u1"], k=2)
    assert by_folder["user"].tolist() == ["u3", "u3", "u1", "u1"] and by_folder["rank"].tolist() == [1, 2, 1, 2]
    pd.testing.assert_frame_equal(by_folder, by_name, check_exact=True)


def test_nothing_is_printed_and_nothing_stays(capfd, monkeypatch, tmp_path):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    own = Recommender("BPR", **SETTINGS).fit(**frames())
    own.recommend(101)
    assert capfd.readouterr() == ("", "")
    assert os.listdir() == [] and len(os.listdir(tmp_path)) == 1
    own.fit(**frames(1))
    assert len(os.listdir(tmp_path)) == 1, "the first training's files are gone"
    with pytest.raises(DataError):
        own.fit(frames()["interactions"].rename(columns={"userId": "who"}))
    assert own.recommend(101, k=1)["user"].tolist() == [101], "a training that fails leaves the one before it"
    del own
    gc.collect()
    assert os.listdir(tmp_path) == []


def test_seen_items_and_candidates(trained):
    seen = set(frames()["interactions"].query("userId == 103")["movieId"])
    everything = set(range(5, 5 + N_ITEMS))
    assert set(trained().recommend(103, k=99)["item"]) == everything - seen
    assert set(trained().recommend(103, k=99, exclude_seen=False)["item"]) == everything
    assert set(trained().recommend(103, k=99, candidates=everything - {7})["item"]) == everything - seen - {7}


def test_similar_items_and_explanations_are_those_of_the_command(trained):
    similar = trained().similar([7, 9], k=3)
    assert similar.columns.tolist() == ["item", "similar_item", "rank", "cosine"]
    assert similar["item"].tolist() == [7] * 3 + [9] * 3 and similar["similar_item"].dtype == "int64"
    first = trained().recommend(104, k=2)
    command(
        "recommend", f"--checkpoint={trained().result.checkpoint}", "--users=104", "--k=2", "--explain", "--out=o.jsonl"
    )
    rows = [json.loads(line) for line in Path("o.jsonl").read_text().splitlines()]
    for row, (item, score) in zip(rows, first[["item", "score"]].itertuples(index=False), strict=True):
        why = trained().explain(104, item)
        assert (why.pop("user"), why.pop("item"), why.pop("score")) == (104, item, pytest.approx(score))
        assert why == row["explanation"]
    closed = trained("CEASE").explain(104, 7)
    assert closed["interactions"] + closed["content"] == pytest.approx(closed["score"], abs=2e-4)


def test_evaluation_of_the_test_split_as_a_frame_gives_the_test_metrics(trained):
    own = trained()
    assert own.evaluate() == pytest.approx(own.result.test) and set(own.evaluate()) == set(own.result.test)
    pairs = frames()["interactions"]
    dataset = own.trained.dataset
    learned = {
        (int(own.trained.user_tokens[user]), int(own.trained.item_tokens[item]))
        for user, item in zip(*(dataset.inter_feat[name].tolist() for name in ("user_id", "item_id")), strict=True)
    }
    held_out = pairs[[pair not in learned for pair in pairs.itertuples(index=False)]]
    assert len(held_out) == 2 * N_USERS, "validation and test"
    both = own.evaluate(held_out)
    assert own.evaluate(pairs) == both, "pairs of training are left out"
    ranked = own.recommend(k=99, exclude_seen=False)
    hits = []
    for user, wanted in held_out.groupby("userId")["movieId"]:
        known = {item for other, item in learned if other == user}
        best = [item for item in ranked.query("user == @user")["item"] if item not in known][:5]
        hits.append(len(set(best) & set(wanted)) / 2)
    assert both["recall@5"] == pytest.approx(np.mean(hits), abs=1e-4) and 0 < both["recall@5"] < 1


# -- saving ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["SLIFMR", "BPR", "CEASE"])
def test_a_saved_recommender_recommends_in_another_process_what_it_did(trained, model):
    own = trained(model)
    own.save("kept")
    own.save("kept")
    assert sorted(os.listdir()) == ["kept"]
    code = (
        "import sys; from recbole_slifmr import Recommender; r = Recommender.load('kept'); print(repr(r));"
        "r.recommend(k=4).to_parquet('there.parquet'); print(r.evaluate() == eval(sys.argv[1]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, repr(own.evaluate())], capture_output=True, text=True, timeout=120
    )
    assert done.stdout.splitlines() == [f"Recommender('{model}'): 30 users, 20 items", "True"], done.stderr
    assert sorted(os.listdir()) == ["kept", "there.parquet"]
    pd.testing.assert_frame_equal(pd.read_parquet("there.parquet"), own.recommend(k=4), check_exact=True)


def test_save_replaces_nothing_else_and_leaves_nothing_half_written(trained, monkeypatch):
    Path("mine").mkdir()
    Path("mine/thesis.txt").touch()
    with pytest.raises(SettingError, match="mine is there already and no saved recommender"):
        trained().save("mine")
    trained().save("kept")
    before = sorted(path.name for path in Path("kept").rglob("*"))
    monkeypatch.setattr(
        "recbole_slifmr.serve.recommender.write_json", lambda *_: (_ for _ in ()).throw(OSError(28, "full"))
    )
    with pytest.raises(StorageError, match="kept cannot be written: full"):
        trained("BPR").save("kept")
    assert sorted(path.name for path in Path("kept").rglob("*")) == before and sorted(os.listdir()) == ["kept", "mine"]


def test_loading_runs_nothing_and_refuses_other_data(trained):
    from test_recommend import write_bad

    trained().save("kept")
    good = Path("kept/checkpoint.pth")
    for change, kind, message in (
        (
            lambda: Path("kept/data/frames/frames.inter").write_text("user_id:token\titem_id:token\n"),
            DataError,
            "frames",
        ),
        (lambda: write_bad("attack", good, good), SettingError, "asks for posix.system"),
        (lambda: Path("kept/recommender.json").write_text("[]"), SettingError, "kept is no saved recommender"),
    ):
        change()
        with pytest.raises(kind, match=message):
            Recommender.load("kept")
    assert not Path("attacked").exists()
    Path("kept/recommender.json").write_text(json.dumps({"model": "BPR", "settings": {}, "dataset": "../other"}))
    with pytest.raises(SettingError, match="no saved recommender"):
        Recommender.load("kept")


# -- what cannot be used ----------------------------------------------------------------------------------------------


def bad(**changes):
    return lambda: {**frames(), **changes}


def pairs(**columns):
    return pd.DataFrame({"user": ["a", "b"], "item": ["x", "y"], **columns})


BAD = {
    "no column of users": (
        lambda: {"interactions": pd.DataFrame({"who": [1], "item": [2]})},
        "interactions has no column of users, only who, item: call it user_id, or name it by columns={'user': ...}",
    ),
    "a misspelt column": (bad(columns={"user": "uzer"}), "no frame has the column 'uzer' that columns['user'] names"),
    "an unknown kind": (bad(columns={"viewer": "userId"}), "columns: 'viewer' is none of user, item, rating"),
    "no frame": (bad(items=[1, 2]), "items must be a pandas DataFrame, not list"),
    "no token": (
        lambda: {"interactions": pairs(item=["x", None])},
        "interactions, column 'item', row 1 (None): there is no value: fill it in or drop the row",
    ),
    "a tab": (lambda: {"interactions": pairs(item=["x\ty", "z"])}, "column 'item', row 0 ('x\\ty'): has a tab or"),
    "a rating": (
        lambda: {"interactions": pairs(rating=["1", "good"])}, "column 'rating', row 1 ('good'): must be a number"
    ),
    "an item twice": (
        bad(items=pd.DataFrame({"movieId": [5, 6, 5]})), "items, column 'movieId', row 2 ('5'): is there twice"
    ),
    "no interactions": (lambda: {"interactions": pairs()[:0]}, "interactions holds nothing"),
    "items of another set": (
        bad(items=pd.DataFrame({"movieId": ["q"]}), features=None), "items: none of its 1 items (such as 'q')"
    ),
    "an array without items": (bad(items=None), "features['text'] is an array: give items, whose rows it has"),
    "an array of another length": (
        bad(features={"text": np.ones((3, 2))}), "features['text'] has the shape (3, 2): it must have a row for each of"
    ),
    "features with words": (
        bad(features={"text": frames()["items"]}), "features['text'], column 'title': its lists must be of one length"
    ),
    "features that are nameless": (
        bad(features={"text": pd.DataFrame(np.ones((20, 2)))}), "features['text'] has no column of items, only 0, 1"
    ),
    "features with NaN": (bad(features={"text": np.full((20, 2), np.nan)}), "features['text'], row 0: NaN or infinite"),
    "a modality's name": (bad(features={"te xt": np.ones((20, 2))}), "features: 'te xt' cannot be a modality's name"),
    "links without triples": (bad(triples=None), "links leads from items to entities: give triples too"),
    "a data set and frames": (
        lambda: {"interactions": "toy", "items": frames()["items"]}, "has items, triples, links and features of its own"
    ),
    "no data set": (lambda: {"interactions": "nowhere"}, "data set 'nowhere' not found"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_frames_are_named_in_one_line(case):
    make, message = BAD[case]
    with pytest.raises((DataError, SettingError)) as refused:
        Recommender("BPR", **SETTINGS).fit(**make())
    assert message in str(refused.value) and "\n" not in str(refused.value)
    assert "slifmr-" not in str(refused.value) and "--" not in str(refused.value), "in the words of the frames"
    assert os.listdir() == []


def test_questions_that_cannot_be_answered(trained):
    for ask, message in (
        (lambda: trained().recommend([101, 1]), "unknown user '1'"),
        (lambda: trained().recommend(101, candidates=["x"]), "unknown item 'x'"),
        (lambda: trained().recommend(101, k=0), "k must be a whole number from 1, not 0"),
        (lambda: trained().recommend([]), "no users or items are named"),
        (lambda: trained().similar("x"), "unknown item 'x'"),
        (lambda: trained("CEASE").similar(7), "CEASE has no representations"),
        (lambda: trained("BPR").explain(101, 7), "BPR has no feedback graph"),
        (lambda: trained().explain([101, 102], 7), "one user and one item"),
        (lambda: trained().evaluate(pd.DataFrame({"user": [1], "item": [7]})), "unknown user '1'"),
        (lambda: trained().evaluate(pd.DataFrame({"user": [], "item": []})), "nothing but pairs of the training split"),
        (lambda: Recommender().recommend(1), "SLIFMR is not trained yet: call fit first"),
        (lambda: Recommender("BPR", epoch=3).fit(**frames()), "unknown setting 'epoch'"),
        (lambda: Recommender("SLIFNR").fit(**frames()), "did you mean 'SLIFMR'"),
        (lambda: Recommender.load("nowhere"), "nowhere is no saved recommender"),
    ):
        with pytest.raises((DataError, SettingError), match=message):
            ask()


def test_columns_are_found_by_their_usual_names_or_by_name(tmp_path):
    from recbole_slifmr.data.convert.frames import convert_frames

    when = pd.to_datetime(["2020-01-01", "1970-01-01 00:00:01.5"], format="ISO8601")
    usual = pd.DataFrame({"Item ID": [1.0, 2.0], "User": ["a", "b"], "TIME": when, "stars": [1, 2.5]})
    own = usual.set_axis(["sku", "viewer", "at", "liked"], axis=1)
    convert_frames(tmp_path / "1", usual)
    convert_frames(tmp_path / "2", own, columns={"item": "sku", "user": "viewer", "time": "at", "rating": "liked"})
    texts = [(tmp_path / name / "frames" / "frames.inter").read_text() for name in ("1", "2")]
    assert texts[0] == texts[1]
    assert texts[0].splitlines()[1:] == ["a\t1\t1.0\t1577836800.0", "b\t2\t2.5\t1.5"]


def test_importing_the_package_does_not_import_the_recommender():
    code = "import sys, recbole_slifmr; print('recbole_slifmr.serve.recommender' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "False", done.stderr


# -- users who were not in training ------------------------------------------------------------------------------------


def learned_items(own):
    """Return the training items of each user, by token as given."""
    dataset, pairs = own.trained.dataset, {}
    for user, item in zip(*(dataset.inter_feat[name].tolist() for name in ("user_id", "item_id")), strict=True):
        pairs.setdefault(int(own.trained.user_tokens[user]), []).append(int(own.trained.item_tokens[item]))
    return pairs


def scores_of_known_and_as_new(own, user, items):
    known = own.recommend(user, k=99, exclude_seen=False).set_index("item")["score"].drop(items)
    return known, own.recommend_for(items, k=99).set_index("item")["score"].reindex(known.index)


@pytest.mark.parametrize("model", ["EASE", "CEASE", "AddEASE", "L3AE"])
def test_a_closed_form_gives_a_new_user_the_scores_of_a_known_one_with_the_same_items(trained, model):
    own = trained(model)
    for user, items in list(learned_items(own).items())[:5]:
        known, new = scores_of_known_and_as_new(own, user, items)
        assert len(known) == N_ITEMS - len(items)
        np.testing.assert_allclose(new, known, rtol=1e-5, atol=1e-6)


def test_of_slifmr_all_but_the_interaction_view_is_exact(trained):
    from recbole_slifmr.nn.fold_in import fold_in, item_shares

    own = trained()
    model, views = own.trained.model, own.trained.model.encode()
    edges, weight = model.interaction_encoder.edge_index, model.interaction_encoder.edge_weight
    shares = item_shares(views.users[:, 0], views.items[:, 0], edges, weight)
    seen = model.linear.scores(torch.arange(own.trained.n_users))[*edges] / model.linear.size
    weight = torch.sigmoid((seen - 0.5) / 0.5)  # a new user's: the regression has not been fitted to them
    folded, graph = fold_in(shares, edges, own.trained.n_users, weight), torch.zeros(own.trained.n_users, len(shares))
    graph[*edges] = weight
    means = [
        graph @ view / (graph @ mask.float()).unsqueeze(1)
        for view, mask in zip(views.items[:, 1:].unbind(1), views.item_mask[:, 1:].unbind(1), strict=True)
    ]
    mixed = torch.stack([folded, *(mean.nan_to_num() for mean in means)], dim=1)
    users = model.fuse(model.user_fusion, mixed, views.user_mask)
    everybody = torch.arange(own.trained.n_users)
    expected = (users @ model.forward()[1].T + model.linear.scores(everybody)).detach()
    for user, items in list(learned_items(own).items())[:5]:
        new = own.recommend_for(items, k=99)
        row = expected[own.trained.user_ids([str(user)])[0]]
        np.testing.assert_allclose(
            new["score"], row[own.trained.item_ids(new["item"].astype(str))], rtol=1e-4, atol=1e-5
        )
        assert not set(new["item"]) & set(items)


@pytest.mark.parametrize("model", ["SLIFMR", "LightGCN", "XSimGCL", "FREEDOM", "LightKG"])
def test_known_users_scored_by_their_items_alone_have_nearly_their_own_scores(model):
    """On the planted set, where there is taste to learn."""
    own = Recommender(model, epochs=8, learning_rate=0.01, seed=1).fit("toy")
    trained, rows = own.trained, []
    score = scorer(trained)
    by_user = History.of(
        *(trained.dataset.inter_feat[name].numpy() for name in ("user_id", "item_id")), trained.n_users, trained.n_items
    )
    for user in range(1, 60):
        items = by_user.of_user(user)
        ranking = next(recommend_for(score, [items], trained.n_items, trained.n_items))
        kept = np.isfinite(ranking.scores[0])
        own_scores = trained.scores(np.array([user]))[0, ranking.items[0][kept]]
        rows.append(np.corrcoef(own_scores, ranking.scores[0][kept])[0, 1])
    assert np.mean(rows) > 0.9


def test_folding_in_by_hand():
    """Two users, three items; user 0 has items 0 and 1, user 1 has item 1; a new one has items 1 and 2."""
    from recbole_slifmr.nn.fold_in import fold_in, item_shares

    items = torch.tensor([[1.0, 0.0], [0.0, 2.0], [4.0, 0.0]])
    known = torch.tensor([[0, 0, 1], [0, 1, 1]])
    of_known = torch.tensor([[1 / 2**0.5, 2 / 2], [0.0, 2 / 2**0.5]])
    new = fold_in(item_shares(3 * of_known, items, known), torch.tensor([[0, 0], [1, 2]]), 1)
    torch.testing.assert_close(new, 3 * torch.tensor([[4 / 2**0.5, 2 / 2]]))


def test_new_users_by_commands(trained):
    own = trained("CEASE")
    Path("new.txt").write_text("5,6, 7\n9\n")
    Path("some.txt").write_text("10\n11\n5\n")
    checkpoint = f"--checkpoint={own.result.checkpoint}"
    command("recommend", checkpoint, "--histories=new.txt", "--k=3", "--out=o.parquet")
    command("recommend", checkpoint, "--history=9", "--k=3", "--out=one.parquet")
    command("recommend", checkpoint, "--history=5", "--k=3", "--candidates=some.txt", "--out=few.parquet")
    both, one, few = (pd.read_parquet(name) for name in ("o.parquet", "one.parquet", "few.parquet"))
    assert both["user"].tolist() == ["1"] * 3 + ["2"] * 3
    for number, items in (("1", [5, 6, 7]), ("2", [9])):
        expected = own.recommend_for(items, k=3)
        assert both[both["user"] == number]["item"].astype(int).tolist() == expected["item"].tolist()
        assert not set(expected["item"]) & set(items)
    assert one["item"].tolist() == both["item"].tolist()[3:]
    assert set(few["item"]) == {"10", "11"}


def test_new_users_who_cannot_be_served(trained, capsys):
    Path("new.txt").write_text("5,x\n\ny,9\n")
    Path("gap.txt").write_text("5\n\n9\n")
    for model, arguments, message in (
        ("CEASE", ["--histories=new.txt"], "unknown items 'x', 'y'"),
        ("CEASE", ["--histories=gap.txt"], "a new user is known by items: name at least one of each"),
        ("CEASE", ["--history="], "name at least one of each"),
        ("CEASE", ["--history=5", "--all"], "name users with --users"),
        ("CEASE", ["--history=5", "--explain"], "--explain is for users named"),
        ("CEASE", ["--history=5", "--include-seen"], "are never recommended: leave out --include-seen"),
        ("CEASE", ["--histories=nowhere"], "nowhere cannot be read: No such file"),
        ("BPR", ["--history=5"], "BPR cannot recommend to users who were not in training: EASE, CEASE"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["recommend", f"--checkpoint={trained(model).result.checkpoint}", *arguments])
        error = capsys.readouterr().err.strip().splitlines()
        assert stop.value.code == 2 and message in error[-1], arguments
    with pytest.raises(DataError, match="unknown item 'x'"):
        trained("CEASE").recommend_for(["x", 5])
