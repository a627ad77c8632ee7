"""Closed forms: factors by hand, weights against plain formulas and a solver, and what the models do with them."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import scipy.optimize
import scipy.sparse
import torch
from conftest import QUIET, all_scores
from recbole.data.interaction import Interaction
from recbole.model.general_recommender import EASE
from torch.utils._python_dispatch import TorchDispatchMode

from recbole_slifmr.cli import main
from recbole_slifmr.errors import SettingError, UnknownSettingWarning
from recbole_slifmr.host.settings import make_config, parse_settings
from recbole_slifmr.nn import linear, linear_branch
from recbole_slifmr.nn.linear import (
    DenseSolver,
    NeighbourSolver,
    Source,
    feature_factor,
    interaction_factor,
    top_weights,
)
from recbole_slifmr.nn.linear_branch import LinearBranch, user_weights
from recbole_slifmr.search.space import grid, parse_space
from recbole_slifmr.training.checkpoint import read_checkpoint
from recbole_slifmr.training.experiment import run

CLOSED_FORMS = ("CEASE", "AddEASE", "L3AE")
N_USERS, N_ITEMS, REG = 50, 23, 4.0


@pytest.fixture
def sources():
    """Random interactions and features; item 0 has neither, items 3 and 4 have no features."""
    rng = np.random.default_rng(0)
    users, items = rng.integers(1, N_USERS, 200), rng.integers(1, N_ITEMS, 200)
    mask = torch.ones(N_ITEMS, dtype=torch.bool)
    mask[[0, 3, 4]] = False
    features = feature_factor(torch.from_numpy(rng.normal(size=(N_ITEMS, 6)).astype(np.float32)), mask)
    return Source(interaction_factor(users, items, N_USERS, N_ITEMS)), Source(features, 2.5)


def dense(source):
    factor = source.factor
    return np.sqrt(source.weight) * (factor.toarray() if scipy.sparse.issparse(factor) else factor.numpy())


def plain_ease(gram, reg):
    """EASE as its paper writes it, of a Gram matrix; ``reg`` may differ from item to item."""
    inverse = np.linalg.inv(gram + reg * np.eye(len(gram)))
    weights = inverse / -np.diag(inverse)
    np.fill_diagonal(weights, 0)
    return weights


# -- factors ---------------------------------------------------------------------------------------------------------


def test_an_interaction_that_is_there_twice_counts_once():
    factor = interaction_factor(np.array([1, 1, 2]), np.array([1, 1, 2]), 3, 3)
    assert factor.toarray().tolist() == [[0, 0, 0], [0, 1, 0], [0, 0, 1]]


def test_features_are_centred_over_the_items_that_have_them():
    values = torch.tensor([[0.0, 0.0], [3.0, 1.0], [1.0, 1.0], [9.0, 9.0]])
    factor = feature_factor(values, torch.tensor([False, True, True, False]))
    assert factor.tolist() == [[0, 0], [1, 0], [-1, 0], [0, 0]]


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e5])
def test_rows_that_are_the_mean_say_nothing(scale):
    """Filled in as float32, the mean differs from that of all rows by rounding."""
    rng = np.random.default_rng(0)
    values = scale * rng.normal(1, 1, size=(200, 30)).astype(np.float32)
    lacking = rng.random(200) < 0.5
    values[lacking] = values[~lacking].mean(axis=0, dtype=np.float64)
    before = values.copy()
    factor = feature_factor(torch.from_numpy(values), torch.ones(200, dtype=torch.bool)).numpy()
    assert not factor[lacking].any()
    np.testing.assert_allclose(np.linalg.norm(factor[~lacking], axis=1), 1)
    assert (values == before).all()
    new = feature_factor(torch.from_numpy(values[:1]), torch.ones(1, dtype=torch.bool), torch.from_numpy(values[0]))
    assert not new.any()


class Made(TorchDispatchMode):
    """Notes how many numbers each tensor has that is made anew, not as a view or in place."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        given = {arg.untyped_storage().data_ptr() for arg in args if isinstance(arg, torch.Tensor)}
        if isinstance(made, torch.Tensor) and made.untyped_storage().data_ptr() not in given:
            self.sizes.append(made.numel())
        return made


def test_features_are_centred_and_scaled_in_one_copy():
    values, mask = torch.ones(40, 30), torch.ones(40, dtype=torch.bool)
    with Made() as made:
        feature_factor(values, mask)
    assert sum(size >= 40 * 30 for size in made.sizes) == 1


# -- weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [7, 1024])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["double", "single"])
def test_weights_equal_the_plain_formula(sources, monkeypatch, block, dtype, tolerance):
    monkeypatch.setattr(linear, "BLOCK", block)
    gram = sum(dense(source) @ dense(source).T for source in sources)
    weights = DenseSolver(dtype).solve(sources, REG)
    assert weights.dtype == dtype
    np.testing.assert_allclose(weights.numpy(), plain_ease(gram, REG), atol=tolerance)


def test_the_padding_item_has_no_part(sources):
    gram = sum(dense(source) @ dense(source).T for source in sources)
    weights = DenseSolver().solve(sources, REG).numpy()
    assert not weights[0].any() and not weights[:, 0].any()
    np.testing.assert_allclose(weights[1:, 1:], plain_ease(gram[1:, 1:], REG), atol=1e-10)


@pytest.mark.parametrize("prior_weight", [0.0, 3.0])
def test_every_column_is_the_optimum_that_a_solver_finds(sources, prior_weight):
    """Each column as a bounded least-squares problem: the item's own weight is held at 0."""
    prior = np.random.default_rng(1).normal(size=(N_ITEMS, N_ITEMS))
    np.fill_diagonal(prior, 0)
    given = (torch.from_numpy(prior.copy()), prior_weight) if prior_weight else ()
    weights = DenseSolver().solve(sources, REG, *given).numpy()
    eye = np.eye(N_ITEMS)
    rows = [*(dense(source).T for source in sources), np.sqrt(REG) * eye, np.sqrt(prior_weight) * eye]
    for j in (1, 3, 17):
        target = [*(dense(source)[j] for source in sources), np.zeros(N_ITEMS), np.sqrt(prior_weight) * prior[:, j]]
        others = np.delete(np.arange(N_ITEMS), j)
        found = scipy.optimize.lsq_linear(np.concatenate(rows)[:, others], np.concatenate(target), tol=1e-14)
        assert found.success
        np.testing.assert_allclose(weights[others, j], found.x, atol=1e-8)
        assert weights[j, j] == 0


def test_neighbours_give_the_same_weights_when_all_items_are_neighbours(sources):
    whole, near = DenseSolver(), NeighbourSolver(N_ITEMS, step=5)
    content = whole.solve(sources[1:], REG)
    np.testing.assert_allclose(near.solve(sources, REG).toarray(), whole.solve(sources, REG).numpy(), atol=1e-10)
    drawn = near.solve(sources[:1], REG, scipy.sparse.csr_array(content.numpy()), 3.0).toarray()
    np.testing.assert_allclose(drawn, whole.solve(sources[:1], REG, content, 3.0).numpy(), atol=1e-10)


def test_wide_factors_are_gathered_for_few_columns_at_a_time(sources, monkeypatch):
    solver = NeighbourSolver(8)
    whole = solver.solve(sources, REG).toarray()
    monkeypatch.setattr(linear, "GATHERED", 100, raising=False)
    with Made() as made:
        np.testing.assert_allclose(solver.solve(sources, REG).toarray(), whole, atol=1e-12)
    assert 8 * 6 in made.sizes and N_ITEMS * 8 * 6 not in made.sizes, "neighbours by numbers"
    rest = 32 * 8 * N_ITEMS + 3 * 8 * solver.step * (N_ITEMS + 8**2)
    assert solver.estimate_memory(N_ITEMS, 1) == rest + 2 * 8 * 100


def test_few_neighbours_are_the_optimum_over_them(sources):
    weights = NeighbourSolver(4).solve(sources, REG).toarray()
    gram = sum(dense(source) @ dense(source).T for source in sources)
    for j in range(1, N_ITEMS):
        near = np.flatnonzero(weights[:, j])
        assert 0 < len(near) <= 4 and j not in near
        expected = np.linalg.solve(gram[np.ix_(near, near)] + REG * np.eye(len(near)), gram[near, j])
        np.testing.assert_allclose(weights[near, j], expected, atol=1e-10)


@pytest.mark.parametrize("solver", [DenseSolver(), NeighbourSolver(N_ITEMS)], ids=["dense", "neighbours"])
def test_each_item_may_have_a_penalty_of_its_own(sources, solver):
    gram = sum(dense(source) @ dense(source).T for source in sources)
    reg = np.linspace(1, 9, N_ITEMS)
    weights = solver.solve(sources, torch.from_numpy(reg))
    expected = plain_ease(gram, reg)
    np.testing.assert_allclose(weights.toarray() if scipy.sparse.issparse(weights) else weights, expected, atol=1e-10)
    x = torch.linalg.solve(torch.from_numpy(gram + np.diag(reg)), torch.ones(N_ITEMS, 1, dtype=torch.float64))
    found = linear.solve_columns(sources, torch.from_numpy(reg), np.ones((N_ITEMS, 1)))
    np.testing.assert_allclose(found, x.numpy(), atol=1e-6)


@pytest.mark.parametrize("user_power, popularity_reg", [(0.0, 0.0), (0.5, 2.0)])
@pytest.mark.parametrize("solver", [DenseSolver(), NeighbourSolver(N_ITEMS)], ids=["dense", "neighbours"])
def test_leave_one_out_scores_are_those_of_weights_fitted_without_the_user(sources, solver, user_power, popularity_reg):
    history = sources[0].factor.T.tocsr()
    x = history.toarray()
    branch = LinearBranch(history, lambda: sources[1:], REG, 2.5, solver, "cpu", user_power, popularity_reg)
    counts = x.sum(axis=1)
    shares = (np.maximum(counts, 1) / counts[counts > 0].mean()) ** -user_power
    reg = REG + popularity_reg * x.sum(axis=0)
    full = x.T @ np.diag(shares) @ x + dense(sources[1]) @ dense(sources[1]).T
    rest = [full - share * np.outer(row, row) for row, share in zip(x, shares, strict=True)]
    expected = np.stack([row @ plain_ease(gram, reg) for row, gram in zip(x, rest, strict=True)])
    users, items = torch.arange(N_USERS), torch.arange(N_ITEMS).expand(N_USERS, -1)
    scores = branch.leave_one_out(users, items, torch.from_numpy(x > 0))
    np.testing.assert_allclose(scores / branch.scale, expected, atol=1e-6)
    lacking = (x == 0) & x.any(axis=1, keepdims=True) & (np.arange(N_ITEMS) > 0)  # item 0 is padding
    assert branch.scale * expected[lacking].std() == pytest.approx(2.5, rel=1e-5)
    np.testing.assert_allclose(branch.scores(users), branch.scale * x @ plain_ease(full, reg), atol=1e-5)
    torch.testing.assert_close(branch.pair_scores(users, items), branch.scores(users))
    rows, columns = np.nonzero(x)
    deviations = branch.scale * expected[rows, columns] / 2.5
    for strength in (0.0, 0.6, 1.0):
        trust = branch.trust(torch.from_numpy(rows), torch.from_numpy(columns), strength)
        found = np.maximum(1 - strength / (1 + np.exp((deviations - 0.5) / 0.5)), 1e-3)
        np.testing.assert_allclose(trust, found, rtol=1e-4)


def test_a_user_with_the_mean_number_of_items_counts_as_one_whoever_else_is_there():
    history = scipy.sparse.csr_array([[0] * 4, [1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 0], *[[0] * 4] * 90])
    found = user_weights(history, 0.5)
    np.testing.assert_allclose(found[1:4], np.sqrt([3 / 2, 3 / 4, 1]))
    assert np.isfinite(found).all()
    assert user_weights(scipy.sparse.csr_array((5, 4)), 0.5).tolist() == [1] * 5


@pytest.mark.parametrize("solver", [DenseSolver(), NeighbourSolver(8)], ids=["dense", "neighbours"])
def test_however_many_items_a_user_has_few_weights_are_looked_up_at_a_time(sources, monkeypatch, solver):
    history = sources[0].factor.T.tocsr()
    users, items = torch.arange(N_USERS), torch.arange(N_ITEMS).expand(N_USERS, -1)
    rows, columns = (torch.from_numpy(ids.astype(np.int64)) for ids in history.nonzero())

    def look():
        branch = LinearBranch(history, lambda: sources[1:], REG, 2.5, solver, "cpu")
        scores = branch.leave_one_out(users, items, torch.from_numpy(history.toarray() > 0))
        few = branch.leave_one_out(users, items[:, :3], torch.ones(1, 1, dtype=torch.bool))
        none = branch.leave_one_out(users[:0], items[:0], torch.ones(1, 1, dtype=torch.bool))
        return scores, few, none, branch.pair_scores(users, items), branch.trust(rows, columns)

    whole, look_up, sizes = look(), linear_branch._look_up, []
    monkeypatch.setattr(linear_branch, "LOOKED_UP", 400, raising=False)
    monkeypatch.setattr(linear_branch, "_look_up", lambda *args: sizes.append(args[2].numel()) or look_up(*args))
    for part, expected in zip(look(), whole, strict=True):
        torch.testing.assert_close(part, expected)
    most = int(np.diff(history.indptr).max())
    assert max(sizes) <= 400 + most * N_ITEMS


@pytest.mark.parametrize("k", [5, 10])
def test_with_some_weights_only_leave_one_out_scores_are_nearly_those_of_the_same_weights_refitted(sources, k):
    history = sources[0].factor.T.tocsr()
    x, content = history.toarray(), dense(sources[1]) @ dense(sources[1]).T
    branch = LinearBranch(history, lambda: sources[1:], REG, 2.5, NeighbourSolver(k), "cpu")
    weights = branch.weights.toarray()
    expected = np.zeros_like(x)
    for user, item in np.ndindex(*x.shape):
        near = np.flatnonzero(weights[:, item])
        gram = x.T @ x - np.outer(x[user], x[user]) + content + REG * np.eye(N_ITEMS)
        expected[user, item] = x[user, near] @ np.linalg.solve(gram[np.ix_(near, near)], gram[near, item])
    items = torch.arange(N_ITEMS).expand(N_USERS, -1)
    scores = branch.leave_one_out(torch.arange(N_USERS), items, torch.from_numpy(x > 0)).numpy() / branch.scale
    for chosen in (x > 0, x == 0):
        seen = np.abs(x @ weights - expected)[chosen].mean()
        assert np.abs(scores - expected)[chosen].mean() < 0.15 * seen


def test_a_matrix_that_cannot_be_inverted_is_named(sources):
    with pytest.raises(SettingError, match="not positive definite: set reg_weight higher"):
        DenseSolver().solve(sources, -1.0)
    with pytest.raises(SettingError, match="not positive definite: set reg_weight higher"):
        NeighbourSolver(4).solve(sources, -1000.0)


# -- models ----------------------------------------------------------------------------------------------------------


@pytest.fixture(params=CLOSED_FORMS)
def model_name(request):
    return request.param


def test_without_content_it_is_recbole_s_ease(tiny, build, caplog):
    ease = build(tiny, "EASE", reg_weight=30.0)
    plain = build(tiny, "CEASE", reg_weight=30.0, use_features=False, use_kg=False)
    assert plain.model.sources.keys() == {"interaction"}
    assert isinstance(ease.model, EASE)
    torch.testing.assert_close(all_scores(plain), all_scores(ease), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    "settings, names",
    [
        ({}, "interaction image text kg"),
        ({"use_features": False}, "interaction kg"),
        ({"kg_weight": 0.0}, "interaction image text"),
        ({"use_kg": False, "modality_weights": {"image": 0.0}}, "interaction text"),
        ({"use_kg": False, "feature_weight": 0.0}, "interaction"),
    ],
    ids=str,
)
def test_each_source_is_optional(tiny, build, model_name, settings, names):
    run = build(tiny, model_name, **settings)
    assert list(run.model.sources) == names.split()
    run.trainer.fit(run.train, run.valid, show_progress=False)
    assert torch.isfinite(all_scores(run)).all()


def test_a_source_counts_by_its_weight(tiny, build):
    run = build(tiny, "CEASE", feature_weight=2.0, modality_weights={"text": 5.0}, kg_weight=0.5)
    assert {name: source.weight for name, source in run.model.sources.items()} == {
        "interaction": 1.0, "image": 2.0, "text": 5.0, "kg": 0.5,
    }  # fmt: skip
    gram = sum(dense(source) @ dense(source).T for source in run.model.sources.values())
    expected = plain_ease(gram, run.config["reg_weight"])
    np.testing.assert_allclose(run.model.weights.numpy(), expected, atol=1e-7)


def test_addease_and_l3ae_equal_their_papers_formulas(tiny, build):
    added = build(tiny, "AddEASE", content_share=0.3, reg_weight=7.0, content_reg_weight=2.0)
    drawn = build(tiny, "L3AE", content_weight=5.0, reg_weight=7.0, content_reg_weight=2.0)
    interactions, *content = (dense(source) @ dense(source).T for source in added.model.sources.values())
    prior = plain_ease(sum(content), 2.0)
    np.testing.assert_allclose(
        added.model.weights.numpy(), 0.7 * plain_ease(interactions, 7.0) + 0.3 * prior, atol=1e-7
    )
    inverse = np.linalg.inv(interactions + 12.0 * np.eye(len(interactions)))
    product = inverse @ prior
    expected = 5.0 * product - inverse * ((1 + 5.0 * np.diag(product)) / np.diag(inverse))
    np.fill_diagonal(expected, 0)
    np.testing.assert_allclose(drawn.model.weights.numpy(), expected, atol=1e-7)


def test_a_cold_item_is_scored_by_its_content(tiny, build, model_name):
    run = build(tiny, model_name, cold_items=0.2)
    plain = build(tiny, model_name, cold_items=0.2, use_features=False, use_kg=False)
    cold = np.flatnonzero(np.diff(run.model.sources["interaction"].factor.indptr) == 0)[1:]
    assert len(cold) and len(all_scores(run)[:, cold].unique()) > len(cold)
    assert not all_scores(plain)[:, cold].any()


def test_training_takes_one_epoch_whatever_epochs_says(tiny, build, model_name):
    run = build(tiny, model_name, epochs=5)
    run.trainer.fit(run.train, run.valid, show_progress=False)
    assert list(run.trainer.train_loss_dict) == [0]


def test_a_checkpoint_gives_the_same_scores_without_holding_the_weights(tiny, build, model_name):
    run = build(tiny, model_name)
    run.trainer.fit(run.train, run.valid, show_progress=False)
    state = read_checkpoint(run.trainer.saved_model_file)
    assert sum(value.numel() for value in state["state_dict"].values() if isinstance(value, torch.Tensor)) == 1
    other = build(tiny, model_name)
    other.trainer.evaluate(other.test, load_best_model=True, model_file=run.trainer.saved_model_file)
    assert torch.equal(all_scores(other), all_scores(run))
    for setting, value in {"reg_weight": 77.0, "use_kg": False}.items():
        changed = build(tiny, model_name, **{setting: value})
        with pytest.raises(SettingError, match=f"of other settings than {setting}={value}$"):
            changed.trainer.evaluate(changed.test, load_best_model=True, model_file=run.trainer.saved_model_file)


def test_features_that_have_moved_fit_the_checkpoint(tiny, build, tmp_path):
    run = build(tiny, "CEASE")
    run.trainer.fit(run.train, run.valid, show_progress=False)
    moved = build(tiny, "CEASE", feature_path=str(shutil.copytree(tiny, tmp_path / "moved")))
    moved.trainer.evaluate(moved.test, load_best_model=True, model_file=run.trainer.saved_model_file)
    assert torch.equal(all_scores(moved), all_scores(run))


def test_more_than_max_items_are_solved_by_their_neighbours(tiny, build, model_name, caplog):
    whole = build(tiny, model_name)
    near = build(tiny, model_name, max_items=5, n_neighbours=15, state="INFO")
    with caplog.at_level("INFO"):
        near.trainer.fit(near.train, near.valid, show_progress=False)
    assert scipy.sparse.issparse(near.model.weights)
    torch.testing.assert_close(all_scores(near), all_scores(whole), atol=1e-5, rtol=1e-4)
    assert "16 items are more than max_items: each item's score takes weights of its 15 nearest" in caplog.text


@pytest.mark.parametrize("max_items", [5, 30000])
def test_pairs_are_scored_as_all_items_are(tiny, build, max_items):
    run = build(tiny, "CEASE", max_items=max_items)
    users, items = torch.tensor([3, 1, 3, 7]), torch.tensor([5, 5, 2, 15])
    pairs = run.model.predict(Interaction({"user_id": users, "item_id": items}))
    torch.testing.assert_close(pairs, all_scores(run)[users - 1, items])


def test_single_precision_is_near_double(tiny, build, model_name):
    double, single = build(tiny, model_name), build(tiny, model_name, precision="single")
    torch.testing.assert_close(all_scores(single), all_scores(double), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    "model, settings, message",
    [
        ("CEASE", {"reg_weight": 0.0}, "reg_weight must be above 0, not 0.0"),
        ("CEASE", {"precision": "half"}, "precision must be one of double, single, not 'half'"),
        ("CEASE", {"kg_hops": 3}, r"kg_hops must be in \[1, 2\], not 3"),
        ("CEASE", {"kg_weight": -1.0}, "kg_weight must be 0 or more, not -1.0"),
        ("CEASE", {"max_items": 0}, "max_items must be 1 or more, not 0"),
        ("CEASE", {"modality_weights": {"text": -1.0}}, "modality_weights: text must be 0 or more, not -1.0"),
        ("CEASE", {"modality_weights": {"audio": 1.0}}, "there is no modality 'audio'; the data set has image, text"),
        ("AddEASE", {"content_share": 1.0}, r"content_share must be in \(0, 1\), not 1.0"),
        ("L3AE", {"content_weight": 0.0}, "content_weight must be above 0"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_used_are_named(tiny, build, model, settings, message):
    with pytest.raises(SettingError, match=message):
        build(tiny, model, **settings)


@pytest.mark.parametrize(
    "setting", ["learning_rate=0.01", "embedding_size=32", "self_loop=True", "prune_ratio=0.1", "callbacks=[]"]
)
def test_settings_of_training_by_gradients_are_unknown_to_it(tiny, model_name, setting):
    name = setting.split("=")[0]
    with pytest.warns(UnknownSettingWarning, match=f"unknown setting '{name}': neither RecBole nor {model_name} reads"):
        make_config(model_name, "tiny", settings={"data_path": str(tiny.parent), **parse_settings([f"--{setting}"])})


def test_a_closed_form_runs_no_callbacks(tiny, build):
    with pytest.warns(UnknownSettingWarning):
        run = build(tiny, "CEASE", self_loop=True, prune_ratio=0.1, callbacks=["not.there:Callback"])
    assert run.trainer.callbacks == []


def test_the_memory_of_solving_is_that_of_its_matrices(tiny, build):
    """An item-item matrix of 16 x 16 in the solver's precision, the weights, and three blocks of a Gram matrix."""

    def solving(model, **settings):
        run = build(tiny, model, **settings)
        return run.model.memory_parts(run.model.settings, run.train._dataset, 0)["solving"]

    blocks = 3 * 8 * 16**2
    assert solving("CEASE") == 16**2 * (8 + 4) + blocks
    assert solving("AddEASE") == 16**2 * (2 * 8 + 4) + blocks
    assert solving("L3AE") == 16**2 * (3 * 8 + 4) + blocks
    assert solving("L3AE", precision="single") == 16**2 * 3 * 4 + blocks
    few, more = (solving("CEASE", max_items=5, n_neighbours=k) for k in (1, 15))
    assert few < more


def test_an_item_without_features_keeps_its_interactions(tiny, build, model_name):
    run = build(tiny, model_name)
    lacking = run.dataset.token2id("item_id", "i1")
    assert not run.model.sources["text"].factor[lacking].any()
    assert run.model.weights[lacking].any() and run.model.weights[:, lacking].any()


# -- serving ---------------------------------------------------------------------------------------------------------


def slifmr(capsys, *arguments):
    """Run a command; return its output, or its error."""
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    return said.err if stop.value.code else said.out


@pytest.mark.parametrize("max_items", [5, 30000])
def test_an_explanation_adds_up_to_the_score(tiny, build, model_name, capsys, max_items):
    settings = {**QUIET, "data_path": str(tiny.parent), "max_items": max_items}
    checkpoint = run(model_name, "tiny", settings=settings).checkpoint
    command = ["recommend", "--checkpoint", checkpoint, "--users=u2,u9", "--k=3", "--explain"]
    capsys.readouterr()
    found = [json.loads(line) for line in slifmr(capsys, *command, "--format=jsonl").splitlines()]
    plain = build(tiny, model_name, use_features=False, use_kg=False, max_items=max_items)
    scores = all_scores(plain)
    assert len(found) == 6
    for row in found:
        why, items = row["explanation"], row["explanation"]["items"]
        user, item = (plain.dataset.token2id(f"{kind}_id", row[kind]) for kind in ("user", "item"))
        assert why["interactions"] + why["content"] == pytest.approx(row["score"], abs=2e-4)
        assert why["interactions"] == pytest.approx(float(scores[user - 1, item]), abs=2e-4)
        if plain.model.history[[user]].nnz <= 5:
            assert sum(near["score"] for near in items) == pytest.approx(row["score"], abs=1e-3)
        assert [near["score"] for near in items] == sorted((near["score"] for near in items), reverse=True)
        assert items[0]["alike"].keys() == {"interaction", "image", "text", "kg"}
    said = slifmr(capsys, *command).splitlines()
    assert said[0] == "user u2" and len(said) == 2 * (1 + 3 * 2)
    reasons = [line.strip() for line in said if line.startswith("    ")]
    for row, reason in zip(found, reasons, strict=True):
        first = [near["item"] for near in row["explanation"]["items"] if near["score"] > 0][:2]
        content, total = (float(number) for number in re.findall(r"content adds (\S+) of (\S+)", reason)[0])
        assert content == pytest.approx(row["explanation"]["content"], abs=0.006)
        assert total == pytest.approx(row["score"], abs=0.006)
        assert reason.partition("; content")[0] == f"because of {' and '.join(first)}"


def test_exported_weights_are_the_largest_of_each_column(tiny, model_name, capsys, tmp_path):
    checkpoint = run(model_name, "tiny", settings={**QUIET, "data_path": str(tiny.parent)}).checkpoint
    out = tmp_path / "weights"
    said = slifmr(capsys, "export", "--checkpoint", checkpoint, f"--out={out}", "--n-weights=4")
    assert said.splitlines() == [str(out / "items.txt"), str(out / "weights.npz")]
    kept = scipy.sparse.load_npz(out / "weights.npz")
    assert kept.shape == (15, 15) and len(Path(out / "items.txt").read_text().splitlines()) == 15
    assert np.diff(kept.tocsc().indptr).max() == 4
    refused = slifmr(capsys, "export", "--checkpoint", checkpoint, f"--out={out}", "--faiss")
    assert f"--faiss is for vectors: {model_name} has weights between items" in refused or "faiss-cpu" in refused


@pytest.mark.parametrize("sparse", [False, True])
def test_top_weights_keep_sign_and_place(sparse, monkeypatch):
    monkeypatch.setattr(linear, "BLOCK", 2)
    weights = np.array([[0.0, -3.0, 0.5], [1.0, 0.0, -0.7], [-2.0, 0.1, 0.0]])
    given = scipy.sparse.csr_array(weights) if sparse else torch.from_numpy(weights)
    assert top_weights(given, 1).toarray().tolist() == [[0, -3, 0], [0, 0, -0.7], [-2, 0, 0]]
    assert top_weights(given, 2).nnz == 6 and (top_weights(given, 9).toarray() == weights).all()


# -- search ----------------------------------------------------------------------------------------------------------


def test_the_search_ends_where_no_other_value_is_better(tiny):
    from benchmarks.closed_forms import search

    space = parse_space({"reg_weight": {"choice": [1.0, 200.0]}, "feature_weight": {"choice": [0.0, 3.0]}})
    settings = {**QUIET, "data_path": str(tiny.parent)}
    found = search("CEASE", "tiny", settings, space)
    assert 3 <= found.n_trials <= 4
    score = {
        repr(point): run("CEASE", "tiny", settings={**settings, **point}).best_valid_score for point in grid(space)
    }
    near = [{**found.point, name: value} for name, domain in space.items() for value in domain.values]
    assert found.score == score[repr(found.point)] == max(score[repr(point)] for point in near)
