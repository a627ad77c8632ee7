"""Items that were not in training, scored by features and triples."""

import csv
import io

import numpy as np
import pandas as pd
import pytest
import torch

from recbole_slifmr import Recommender
from recbole_slifmr.cli import main
from recbole_slifmr.errors import DataError, SettingError
from recbole_slifmr.nn import linear
from recbole_slifmr.nn.encoder import FeatureEncoder
from recbole_slifmr.nn.linear import (
    Source,
    gram,
    solve_columns,
)
from recbole_slifmr.nn.tags import tag_factor, tag_factors, tag_vectors, unit_rows

QUICK = {"topk": [5], "valid_metric": "Recall@5", "epochs": 10, "train_batch_size": 128}
N_USERS, N_ITEMS, GROUPS = 40, 60, 2


def planted():
    """Return interactions, items, triples and features: users like items of their group, which content tells apart."""
    rng = np.random.default_rng(0)
    pairs = [
        (f"u{user}", f"i{item}")
        for user in range(N_USERS)
        for item in rng.permutation(np.arange(user % GROUPS, N_ITEMS, GROUPS))[:12]
    ]
    items = pd.DataFrame({"item": [f"i{item}" for item in range(N_ITEMS)]})
    triples = pd.DataFrame(
        [(f"i{item}", "made by", f"brand {item % GROUPS}") for item in range(N_ITEMS)]
        + [(f"brand {group}", "of", f"kind {group}") for group in range(GROUPS)],
        columns=["head", "relation", "tail"],
    )
    return pd.DataFrame(pairs, columns=["user", "item"]), items, triples, {"text": content(N_ITEMS, rng)}


def content(n_items, rng):
    """Return features of items whose group alternates, ``[n_items, 8]``."""
    features = rng.normal(size=(n_items, 8))
    features[:, 0] = 4 * (1 - 2 * (np.arange(n_items) % GROUPS))
    return features


def new_items(n=6):
    """Return frames of new items: groups alternate, and brands say so too."""
    items = pd.DataFrame({"item": [f"n{item}" for item in range(n)]})
    triples = [(f"n{item}", "made by", f"brand {item % GROUPS}") for item in range(n)]
    triples = pd.DataFrame(triples, columns=["head", "relation", "tail"])
    return {"items": items, "triples": triples, "features": {"text": content(n, np.random.default_rng(1))}}


@pytest.fixture(scope="module")
def trained():
    """Return a function from a model's name to a recommender; each is trained once."""
    done = {}

    def train(model, **settings):
        key = model, str(settings)
        if key not in done:
            interactions, items, triples, features = planted()
            done[key] = Recommender(model, **QUICK, **settings).fit(interactions, items, triples, features=features)
        return done[key]

    return train


# -- for whom --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        ("CEASE", {}),
        ("AddEASE", {}),
        ("L3AE", {}),
        ("SLIFMR", {}),
        ("SLIFMR", {"dense_at": 0, "linear_scale": 0}),
        ("SLIFMR", {"feature_gate": True, "kg_view": "both"}),
        ("SLIFMRPaper", {}),
    ],
)
@pytest.mark.parametrize("known", ["triples", "features", "both"])
def test_new_items_go_to_those_who_like_their_kind(trained, model, settings, known):
    if known == "triples" and model == "SLIFMRPaper":
        pytest.skip("its encoder of the knowledge graph does not see new items")
    new = {name: part for name, part in new_items().items() if name in ("items", known) or known == "both"}
    recommender = trained(model, **settings)
    best = recommender.recommend_new(**new, k=3)
    assert len(best) == 3 * N_USERS and set(best["rank"]) == {1, 2, 3}
    same = best["user"].str[1:].astype(int) % GROUPS == best["item"].str[1:].astype(int) % GROUPS
    assert same.mean() > 0.95
    for group in range(GROUPS):
        best = recommender.recommend_new(**new, history=[f"i{group}", f"i{group + 2}"], k=3)
        assert list(best) == ["item", "rank", "score"]
        assert set(best["item"]) == {f"n{item}" for item in range(group, 6, GROUPS)}


def test_a_new_item_s_score_does_not_depend_on_the_others(trained):
    for model in ("CEASE", "SLIFMR"):
        many, few = new_items(6), new_items(6)
        few = {"items": few["items"][:2], "triples": few["triples"], "features": {"text": few["features"]["text"][:2]}}
        scores = [
            trained(model).recommend_new(**new, users="u3", k=9).set_index("item")["score"][["n0", "n1"]]
            for new in (many, few)
        ]
        np.testing.assert_allclose(*scores, rtol=1e-5)


# -- exactly ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["CEASE", "AddEASE", "L3AE"])
def test_a_closed_form_gives_the_ridge_regression_on_the_items(trained, model):
    recommender = trained(model)
    dataset, fitted = recommender.trained.dataset, recommender.trained.model
    n_items, new = dataset.item_num, new_items()
    settings = fitted.settings

    known = dataset.item_features["text"].values.double()
    mean = known[1:].mean(0)
    text = torch.from_numpy(new["features"]["text"]).float().double() - mean
    text = settings.feature_weight * fitted.sources["text"].factor @ (text / text.norm(dim=1, keepdim=True)).T
    tags = fitted.sources["kg"].factor.toarray()
    brand = {  # a new item has the tags of an old one of the same brand
        row: dataset.field2token_id["item_id"][f"i{row}"] for row in range(6)
    }
    wanted = text.numpy() + settings.kg_weight * tags @ np.stack([tags[item] for item in brand.values()]).T

    content = [source for name, source in fitted.sources.items() if name != "interaction"]
    squares = gram([fitted.sources["interaction"]]).numpy(), gram(content).numpy()
    one = np.eye(n_items)
    if model == "CEASE":
        weights = np.linalg.solve(squares[0] + squares[1] + settings.reg_weight * one, wanted)
    else:
        weights = np.linalg.solve(squares[1] + settings.content_reg_weight * one, wanted)
        if model == "AddEASE":
            weights = settings.content_share * weights
        else:
            near = settings.content_weight
            weights = near * np.linalg.solve(squares[0] + (settings.reg_weight + near) * one, weights)
    history = [dataset.field2token_id["item_id"][item] for item in ("i0", "i7")]
    expected = dict(zip(new["items"]["item"], weights[history].sum(axis=0), strict=True))
    best = recommender.recommend_new(**new, history=["i0", "i7"], k=6)
    np.testing.assert_allclose(best["score"], [expected[item] for item in best["item"]], rtol=1e-4, atol=1e-6)


def test_columns_solve_the_system(monkeypatch):
    rng = np.random.default_rng(0)
    sources = [
        Source(torch.from_numpy(rng.normal(size=(30, 5)))),
        Source(torch.from_numpy(rng.normal(size=(30, 40))), 3.0),
    ]
    wanted = np.concatenate([rng.normal(size=(30, 4)), np.zeros((30, 1))], axis=1)
    expected = np.linalg.solve(gram(sources).numpy() + 2 * np.eye(30), wanted)
    np.testing.assert_allclose(solve_columns(sources, 2.0, wanted), expected, atol=1e-7)
    monkeypatch.setattr(linear, "COLUMNS", 2)
    np.testing.assert_allclose(solve_columns(sources, 2.0, wanted), expected, atol=1e-7)
    monkeypatch.setattr(linear, "MOST_STEPS", 1)
    with pytest.warns(UserWarning, match="the weights of new items are not exact: 1 steps were not enough"):
        solve_columns(sources, 2.0, wanted)


TRIPLES = np.array([(1, 1, 8), (2, 1, 8), (3, 1, 9), (4, 1, 9), (8, 2, 11), (9, 2, 11), (10, 3, 2), (10, 3, 3)])
LINKS = np.array([(0, 2, 8), (1, 7, 10), (2, 2, 10), (2, 4, 11)])  # as item 1; tail of 10, as 2 and 3; tags nobody has


@pytest.mark.parametrize("n_hops", [1, 2])
def test_new_items_have_the_tags_that_others_have(n_hops):
    known, new, kinds = tag_factors(TRIPLES, 6, n_hops, LINKS, 3)
    assert (known != tag_factor(TRIPLES, 6, n_hops)).nnz == 0
    assert kinds.tolist() == [2, 2, 7] + (n_hops - 1) * [2]
    known, new = known.toarray(), new.toarray()
    np.testing.assert_array_equal(new[0], known[1])
    assert new[1].any() and (known[2:4, new[1] > 0] == new[1][new[1] > 0]).all()
    assert not new[2].any()


def test_a_new_item_that_cites_an_item_has_a_tag_of_it():
    cites = np.array([(1, 0, 2), (3, 0, 4)])
    known, new, _ = tag_factors(cites, 6, 1, np.array([(0, 0, 2), (1, 1, 3)]), 2)  # cites 2; is cited by 3
    likeness = (new @ known.T).toarray() > 0
    assert likeness.tolist() == [[False, True, True] + 3 * [False], 3 * [False] + [True, True, False]]


def test_the_vectors_of_new_tags_are_those_of_the_items_with_the_same():
    rng = np.random.default_rng(0)
    triples = np.stack([rng.integers(1, 40, 200), rng.integers(1, 3, 200), rng.integers(40, 70, 200)], axis=1)
    links = np.concatenate([np.stack([0 * t[:, 0] + row, 2 * t[:, 1], t[:, 2]], axis=1)
                            for row, item in enumerate((3, 5)) for t in [triples[triples[:, 0] == item]]])  # fmt: skip
    for size in (8, 500):
        tags = tag_factors(triples, 40, 1, links, 2)
        rows, new = unit_rows(tags.items), unit_rows(tags.new)
        torch.testing.assert_close(tag_vectors(rows, size, new), tag_vectors(rows, size)[[3, 5]], rtol=0, atol=1e-6)


@pytest.mark.parametrize("n_layers", [0, 1, 2])
@pytest.mark.parametrize("gate", [False, True])
def test_a_new_row_takes_from_its_neighbours_what_they_have_one_layer_before(n_layers, gate):
    torch.manual_seed(0)
    features, mask = torch.randn(12, 5), torch.ones(12, dtype=torch.bool)
    encoder = FeatureEncoder(features, mask, 4, 3, n_layers, gate).double()
    embedding, new = torch.randn(12, 4).double(), torch.randn(2, 5).double()
    rows = torch.nn.functional.normalize(features.double(), dim=1)
    own = torch.nn.functional.normalize(new, dim=1)
    graph = encoder.graph.edges()
    matrix = torch.zeros(12, 12).double().index_put_(tuple(graph.edge_index), graph.edge_weight.double())
    weight = torch.zeros(2, 12).double()
    for k in range(2):
        cosine = rows @ own[k]
        near = [int(i) for i in cosine.argsort(descending=True)[:3] if cosine[i] > 0]
        for i in near:
            weight[k, i] = 1 / (len(near) * (matrix[i] > 0).sum()) ** 0.5
    hidden, hidden_new = rows @ encoder.projection.weight.T, own @ encoder.projection.weight.T
    if gate:
        hidden, hidden_new = hidden * encoder.gate(embedding).sigmoid(), hidden_new * encoder.gate.bias.sigmoid()
    layers = [hidden_new]
    for _ in range(n_layers):
        layers.append(weight @ hidden)
        hidden = matrix @ hidden
    view, neighbours = encoder.new_rows(new, embedding)
    torch.testing.assert_close(neighbours, weight)
    torch.testing.assert_close(view, torch.stack(layers).mean(0))


# -- what cannot be used ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"items": pd.DataFrame({"item": ["i3", "n0"]})}, "new items 'i3' were in training"),
        ({"features": {"image": np.ones((6, 3))}}, "there was no modality 'image' in training, only text"),
        ({"features": {"text": np.ones((6, 3))}}, r"features\['text'\] has 3 numbers per item, in training"),
        ({"features": {"text": np.ones((5, 8))}}, "it must have a row for each of the 6 items"),
        ({"features": None, "triples": None}, "new items 'n0', 'n1', 'n2', 'n3', 'n4' and 1 more: they have neither"),
        ({"features": None, "triples": pd.DataFrame({"head": ["n0"], "relation": "made by", "tail": "nobody"})},
         "new items 'n0'"),
        ({"triples": pd.DataFrame({"head": ["n0"]})}, "triples has no column of relations"),
        ({"items": pd.DataFrame({"item": ["n0", "n0"]})}, "is there twice"),
    ],
)  # fmt: skip
def test_frames_that_cannot_be_used(trained, change, message):
    with pytest.raises(DataError, match=message):
        trained("CEASE").recommend_new(**{**new_items(), **change})


def test_items_of_which_nothing_is_known_are_left_out(trained):
    new = new_items()
    new["features"]["text"][3] = 0
    triples = pd.DataFrame([("n0", "made by", "brand 0"), ("n3", "made by", "nobody")], columns=list(new["triples"]))
    for model in ("CEASE", "SLIFMR"):
        with pytest.warns(UserWarning, match="new items 'n3' are left out: they have neither features"):
            some = trained(model).recommend_new(**{**new, "triples": triples}, users=["u1"])
        rest = {"items": new["items"].drop(index=3), "triples": triples[:1]}
        rest["features"] = {"text": np.delete(new["features"]["text"], 3, axis=0)}
        pd.testing.assert_frame_equal(some, trained(model).recommend_new(**rest, users=["u1"]))
        assert set(some["item"]) == {"n0", "n1", "n2", "n4", "n5"}


def test_models_and_questions_that_cannot_be_answered(trained):
    with pytest.raises(SettingError, match="LightGCN cannot score items that were not in training"):
        trained("LightGCN").recommend_new(**new_items())
    with pytest.raises(SettingError, match="name one of them"):
        trained("CEASE").recommend_new(**new_items(), users=["u1"], history=["i1"])
    with pytest.raises(SettingError, match="gives no weight to what is known"):
        trained("CEASE", kg_weight=0).recommend_new(**{**new_items(), "features": None})
    with pytest.raises(SettingError, match="SLIFMRPaper gives no weight to what is known of the new items 'n0'"):
        trained("SLIFMRPaper").recommend_new(**{**new_items(), "features": None})


def test_items_of_which_the_model_sees_nothing_are_left_out(trained):
    new = new_items()
    new["features"]["text"][3] = 0  # the triples of new items are nothing to the paper's model
    with pytest.warns(UserWarning, match="new items 'n3' are left out: SLIFMRPaper sees nothing of them"):
        some = trained("SLIFMRPaper").recommend_new(**new, users=["u1"], k=6)
    assert set(some["item"]) == {"n0", "n1", "n2", "n4", "n5"}


# -- by command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path):
    new = new_items()
    new["items"].to_csv(tmp_path / "new.csv", index=False)
    new["triples"].to_csv(tmp_path / "triples.csv", index=False)
    np.save(tmp_path / "text.npy", new["features"]["text"])
    return tmp_path


def slifmr(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        main(["recommend", *map(str, arguments)])
    said = capsys.readouterr()
    return stop.value.code, said.out, said.err.strip().splitlines()[-1:]


def options(recommender, folder):
    data = ["--checkpoint", recommender._checkpoint, "--data_path", recommender._data.parent]
    return [*data, "--new_items", folder / "new.csv", "--new_triples", folder / "triples.csv",
            "--new_features", f"text={folder / 'text.npy'}"]  # fmt: skip


@pytest.mark.parametrize("model", ["CEASE", "SLIFMR"])
def test_the_command_recommends_as_the_object_does(trained, files, capsys, model):
    recommender = trained(model)
    for whom, expected in (
        (["--users=u4,u1"], recommender.recommend_new(**new_items(), users=["u4", "u1"], k=4)),
        (["--history=i0,i7"], recommender.recommend_new(**new_items(), history=["i0", "i7"], k=4)),
    ):
        status, out, error = slifmr(capsys, *options(recommender, files), *whom, "--k=4")
        assert status == 0, error
        rows = list(csv.DictReader(io.StringIO(out)))
        assert [row["item"] for row in rows] == expected["item"].tolist()
        np.testing.assert_allclose([float(row["score"]) for row in rows], expected["score"], rtol=1e-5)


def test_bad_files_end_with_a_line(trained, files, capsys):
    given = options(trained("CEASE"), files)
    for more, message in (
        (["--users=u1", "--explain"], "--new-items goes without"),
        (["--all", "--new_features", "text"], "--new-features reads name=file"),
        ([], "name users with"),
        (["--users=nobody"], "unknown user 'nobody'"),
    ):
        status, out, error = slifmr(capsys, *given, *more)
        assert (status, out) == (2, "") and message in error[0]
    (files / "empty.txt").write_text("")
    status, out, error = slifmr(capsys, *given, "--histories", files / "empty.txt")
    assert (status, out) == (2, "") and "name at least one" in error[0]
    new = new_items()["features"]["text"]
    new[2] = 0
    np.save(files / "text.npy", new)
    (files / "triples.csv").write_text("head,relation,tail\nn0,made by,brand 0\n")
    status, out, error = slifmr(capsys, *given, "--users=u1")
    assert status == 0 and "'n2' are left out" in error[0] and "n2" not in out
    (files / "triples.csv").write_text("a,b\n1,2\n")
    status, out, error = slifmr(capsys, *given, "--all")
    assert (status, out) == (2, "") and "triples" in error[0]
    status, out, error = slifmr(capsys, *given[:4], "--all", "--new_triples", files / "triples.csv")
    assert (status, out) == (2, "") and "name the file of items too" in error[0]
