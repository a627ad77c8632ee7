"""How much each source says of which items have the same users, and what the linear branch makes of it."""

import tracemalloc

import numpy as np
import pytest
import scipy.optimize
import scipy.sparse
import torch
from conftest import write_table

from recbole_slifmr.data.survey import survey
from recbole_slifmr.nn import relevance as module
from recbole_slifmr.nn.relevance import relevance, share_out, shares
from recbole_slifmr.nn.tags import Tags

N_USERS, N_ITEMS = 60, 24


def sparse(matrix):
    return scipy.sparse.csr_array(np.asarray(matrix, dtype=float))


@pytest.fixture
def data():
    """Weighted interactions, and three sources: dense features and two sparse sets of tags."""
    rng = np.random.default_rng(0)
    interactions = (rng.random((N_ITEMS, N_USERS)) < 0.2) * np.sqrt(rng.uniform(0.5, 2, N_USERS))
    features = rng.normal(size=(N_ITEMS, 5))
    tags = [(rng.random((N_ITEMS, width)) < 0.3) * rng.uniform(1, 2, width) for width in (6, 9)]
    return interactions, [features, *tags]


def test_relevance_is_the_least_squares_fit_to_shared_users_off_the_diagonal(data, monkeypatch):
    interactions, factors = data
    pairs = ~np.eye(N_ITEMS, dtype=bool)
    popularity = np.square(interactions).sum(axis=1)
    columns = [np.outer(popularity, popularity), *(factor @ factor.T for factor in factors)]
    design = np.stack([column[pairs] for column in columns], axis=1)
    expected = scipy.optimize.nnls(design, (interactions @ interactions.T)[pairs])[0][1:]
    assert (expected > 0).any()
    given = [torch.from_numpy(factors[0]), *map(sparse, factors[1:])]
    np.testing.assert_allclose(relevance(sparse(interactions), given), expected, atol=1e-6)
    monkeypatch.setattr(module, "COLUMNS", 4)
    monkeypatch.setattr(module, "DENSE", 2)
    np.testing.assert_allclose(relevance(sparse(interactions), given), expected, atol=1e-6)


def test_wide_sources_are_neither_copied_nor_multiplied_as_a_whole(monkeypatch):
    rng, n_items, n_tags, size = np.random.default_rng(0), 300, 3000, 600
    monkeypatch.setattr(module, "COLUMNS", 300)
    monkeypatch.setattr(module, "DENSE", 50, raising=False)
    features = torch.from_numpy(rng.normal(size=(n_items, size)))
    tags = scipy.sparse.random_array((n_items, n_tags), density=0.002, rng=rng, format="csr")
    users = scipy.sparse.random_array((n_items, 2000), density=0.002, rng=rng, format="csr")
    tracemalloc.start()
    relevance(users, [features, tags])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * n_items * size  # the tags' products with the features would take ten times that


def test_what_users_go_by_counts_more_than_what_they_do_not(data):
    rng = np.random.default_rng(1)
    groups = [np.eye(4)[rng.integers(4, size=N_ITEMS)] for _ in range(2)]
    likes = groups[0] @ np.eye(4)[rng.integers(4, size=N_USERS)].T  # each user likes a group of the first kind
    beta = relevance(sparse(likes * (rng.random(likes.shape) < 0.5)), [sparse(group) for group in groups])
    assert beta[0] > 10 * beta[1]
    found = shares(beta, groups_of := [sparse(group) for group in groups])
    assert found[0] > 3 * found[1]
    assert found.mean() == pytest.approx(1), "both kinds have as many tags"
    np.testing.assert_allclose(found[1] / found[0], np.sqrt(beta[1] / beta[0]))
    heavier = shares(beta, [groups_of[0] * 2, groups_of[1]])
    assert (4 * heavier[0] + heavier[1]) / 5 == pytest.approx(1), "weighed by the squares of the tags"


def test_sources_that_say_nothing_count_the_same():
    empty = [sparse(np.zeros((N_ITEMS, 3))), torch.zeros(N_ITEMS, 2)]
    nobody = sparse(np.zeros((N_ITEMS, N_USERS)))
    for factors in ([], empty, [sparse(np.eye(N_ITEMS)), torch.ones(N_ITEMS, 2)]):
        beta = relevance(nobody, factors)
        assert beta.tolist() == [0] * len(factors)
        assert shares(beta, factors).tolist() == [1] * len(factors)


def test_what_says_nothing_is_left_out_beside_what_says_something():
    """Even if it is the only modality, or the only relation."""
    group = np.eye(4)[np.arange(N_ITEMS) % 4]
    likes, other = np.kron(group, np.ones(N_USERS // 4)), np.eye(N_ITEMS)

    def found(features, tags, interactions=likes):
        columns = Tags(sparse(tags), sparse(tags[:0]), np.full(tags.shape[1], 3))
        return [
            part.tolist() for part in share_out(sparse(interactions), list(map(torch.from_numpy, features)), columns)
        ]

    assert found([group], other) == [[1], [1, 1, 1, 0]]
    assert found([other], group) == [[0], [1, 1, 1, 1]]
    assert found([other, other], group) == [[0, 0], [1, 1, 1, 1]]
    assert found([other], other) == [[1], [1, 1, 1, 1]], "nothing says anything"
    assert found([group], group, np.zeros_like(likes)) == [[1], [1, 1, 1, 1]]
    assert found([], other[:, :0]) == [[], []]


@pytest.mark.filterwarnings("error")
def test_a_source_that_likens_no_two_items_says_nothing(data):
    interactions, factors = data
    turned = np.linalg.qr(np.random.default_rng(0).normal(size=(N_ITEMS, N_ITEMS)))[0]  # of which rounding is left
    with_others = relevance(sparse(interactions), [torch.from_numpy(turned), sparse(factors[1])])
    assert with_others[0] == 0
    assert with_others[1] == pytest.approx(relevance(sparse(interactions), [sparse(factors[1])])[0])


def test_two_sources_that_say_the_same_share_what_one_says(data):
    interactions, factors = data
    once = relevance(sparse(interactions), [sparse(factors[1])])
    twice = relevance(sparse(interactions), [sparse(factors[1])] * 2)
    assert twice.sum() == pytest.approx(once[0], abs=1e-6)


@pytest.fixture
def brands(tmp_path):
    """Users like brands; colours, and one of two modalities, are drawn at random."""
    rng, root = np.random.default_rng(0), tmp_path / "brands"
    root.mkdir()
    brand, colour = rng.integers(4, size=N_ITEMS), rng.integers(4, size=N_ITEMS)
    pairs = [(f"u{u}", f"i{i}") for u in range(N_USERS) for i in np.flatnonzero(brand == u % 4) if rng.random() < 0.8]
    write_table(root / "brands.inter", "user_id:token\titem_id:token", pairs)
    triples = [(f"e{i}", "brand", f"b{brand[i]}") for i in range(N_ITEMS)]
    triples += [(f"e{i}", "colour", f"c{colour[i]}") for i in range(N_ITEMS)]
    write_table(root / "brands.kg", "head_id:token\trelation_id:token\ttail_id:token", triples)
    write_table(root / "brands.link", "item_id:token\tentity_id:token", [(f"i{i}", f"e{i}") for i in range(N_ITEMS)])
    (root / "items.txt").write_text("\n".join(f"i{i}" for i in range(N_ITEMS)) + "\n")
    np.save(root / "text.npy", np.eye(4)[brand] + rng.normal(scale=0.3, size=(N_ITEMS, 4)))
    np.save(root / "noise.npy", rng.normal(size=(N_ITEMS, 4)))
    return root


def test_the_linear_branch_weighs_relations_and_modalities_by_what_they_say(brands, build):
    run = build(brands, linear_feature_weight=3.0, linear_kg_weight=0.5)
    weights = run.model._content_weights
    assert weights.modalities["text"] > 3 > weights.modalities["noise"]
    assert np.mean(list(weights.modalities.values())) == pytest.approx(3)
    names = run.train._dataset.field2id_token["relation_id"].tolist()
    of = {name: weights.kinds[2 * names.index(name)] for name in ("brand", "colour")}
    assert of["brand"] > 1 > of["colour"]

    said = survey(run.config, {"train": run.train._dataset})["relations"]
    assert [(row["relation"], row["item_is"], row["tags"], row["items"]) for row in said] == [
        ("brand", "head", 4, N_ITEMS),
        ("colour", "head", 4, N_ITEMS),
    ]
    assert [row["weight"] for row in said] == pytest.approx([of["brand"], of["colour"]])

    def scores(**settings):
        model = build(brands, **settings).model
        return model.linear.history_scores(scipy.sparse.csr_array(np.eye(model.n_items)))

    equal = scores(linear_shares="equal")
    assert not torch.allclose(scores(), equal)
    one = {"modalities": {"text": "text.npy"}, "use_kg": False}
    torch.testing.assert_close(scores(**one), scores(**one, linear_shares="equal"), msg="one source alone")


def test_new_items_have_the_weights_of_known_ones(brands, build):
    from recbole_slifmr.data.new_items import NewItems

    run = build(brands)
    model, dataset = run.model, run.train._dataset
    known = torch.arange(1, dataset.item_num)
    triples = dataset.triples.numpy()
    own = triples[triples[:, 0] < dataset.item_num]
    links = np.stack([own[:, 0] - 1, 2 * own[:, 1], own[:, 2]], axis=1)
    features = {name: type(part)(part.values[known], part.mask[known]) for name, part in dataset.item_features.items()}
    copies = NewItems([f"copy {item}" for item in known.tolist()], features, links)
    products = sum(
        source.weight * np.asarray((source.factor @ source.factor.T) if isinstance(source.factor, torch.Tensor)
                                   else (source.factor @ source.factor.T).toarray())
        for source in model.linear.content()
    )  # fmt: skip
    np.testing.assert_allclose(model.new_content(dataset, copies), products[:, 1:], atol=1e-6)
