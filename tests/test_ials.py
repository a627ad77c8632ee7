"""iALS against the plain formulas."""

from itertools import pairwise

import numpy as np
import pytest
import scipy.sparse
import torch
from conftest import all_scores, batch_of

from recbole_slifmr.model import ials
from recbole_slifmr.model.ials import batches
from recbole_slifmr.serve.newcomers import scorer

ALPHA, REG, POWER = 0.2, 0.5, 0.7
SETTINGS = {"embedding_size": 6, "unobserved_weight": ALPHA, "reg_weight": REG, "reg_exponent": POWER}


@pytest.fixture
def solved(tiny, build):
    """Return a function from settings to a run after its first training step."""

    def make(**settings):
        run = build(tiny, "IALS", **SETTINGS | settings)
        run.model.calculate_loss(batch_of(run))
        return run

    return make


def ridge(own, everyone, n_others):
    """Return the embedding of one who has ``own`` of ``everyone``."""
    reg = REG * (len(own) + ALPHA * n_others) ** POWER
    gram = own.T @ own + ALPHA * everyone.T @ everyone + reg * np.eye(own.shape[1])
    return np.linalg.solve(gram, own.sum(axis=0))


def objective(model):
    x = model.history.toarray()[1:, 1:]
    users, items = (part.double().numpy()[1:] for part in (model.users, model.items))
    scores = users @ items.T
    of_users, of_items = (REG * (x.sum(axis=axis) + ALPHA * x.shape[axis]) ** POWER for axis in (1, 0))
    lengths = (of_users @ np.square(users)).sum() + (of_items @ np.square(items)).sum()
    return (x * np.square(scores - 1)).sum() + ALPHA * np.square(scores).sum() + lengths


def test_the_side_solved_last_is_the_ridge_regression_on_the_other(solved, monkeypatch):
    for most in (2**24, 100):
        monkeypatch.setattr(ials, "MOST", most)
        model = solved(n_sweeps=3).model
        users, x = model.users.double().numpy(), model.history.toarray()
        expected = [ridge(users[x[:, item] > 0], users, len(users) - 1) for item in range(1, model.n_items)]
        np.testing.assert_allclose(model.items[1:], expected, atol=1e-5)
        assert not model.items[0].any() and not model.users[0].any()


def test_every_sweep_lowers_the_objective(solved):
    values = [objective(solved(n_sweeps=n).model) for n in (1, 2, 4, 16, 64)]
    assert all(later < earlier for earlier, later in pairwise(values))
    assert values[-1] == pytest.approx(objective(solved(n_sweeps=80).model), rel=1e-3)


def test_items_that_nobody_has_and_users_who_have_nothing_are_zeros(solved):
    run = solved(cold_items=0.3, n_sweeps=1)
    cold = ~run.model.history.toarray().any(axis=0)
    assert cold[1:].any() and not run.model.items[cold].any()
    assert not all_scores(run)[:, cold].any()
    users, x = run.model.users.double().numpy(), run.model.history.toarray()
    assert not users[~x.any(axis=1)].any()


def test_where_it_starts_depends_on_the_seed(solved):
    first, same, other = (solved(seed=seed, n_sweeps=1).model.items for seed in (1, 1, 2))
    torch.testing.assert_close(first, same, rtol=0, atol=0)
    assert not torch.allclose(first, other)


def test_training_goes_on_from_nothing_only(solved):
    run = solved()
    before = run.model.items.clone()
    run.model.calculate_loss(batch_of(run))
    torch.testing.assert_close(run.model.items, before, rtol=0, atol=0)


def test_a_new_user_with_the_items_of_a_known_one_gets_what_the_last_half_sweep_would_give(solved):
    run = solved()
    model = run.model
    score, items = scorer(type("Trained", (), {"model": model})()), model.items.double().numpy()
    history = model.history[[3, 5]]
    users = [ridge(items[row > 0], items, len(items) - 1) for row in history.toarray()]
    np.testing.assert_allclose(score(history), np.stack(users) @ items.T, atol=1e-5)
    assert not score(scipy.sparse.csr_array((1, model.n_items))).any(), "nobody knows one who has nothing"


def test_batches_hold_each_row_once_with_its_columns(monkeypatch):
    rng = np.random.default_rng(0)
    dense = (rng.random((40, 30)) < rng.random((40, 1)) ** 2).astype(float)
    for most in (2**24, 300, 1):
        monkeypatch.setattr(ials, "MOST", most)
        found = np.zeros_like(dense)
        for rows, columns, there in batches(scipy.sparse.csr_array(dense), "cpu", 4):
            assert len(rows) == 1 or 4 * len(rows) * max(4, there.shape[1]) <= most
            for row, some, present in zip(rows, columns, there, strict=True):
                found[row, some[present]] += 1
        np.testing.assert_array_equal(found, dense)


def test_scores_are_inner_products_and_zero_before_training(tiny, build, solved):
    run = solved()
    torch.testing.assert_close(all_scores(run), run.model.users[1:] @ run.model.items.T)
    assert not all_scores(build(tiny, "IALS")).any()
