"""The singular vectors that training starts from."""

import numpy as np
import pytest
import torch

from recbole_slifmr.nn.spectral import spectral_embeddings


def interactions(n_users, n_items, n, seed=0):
    cells = np.random.default_rng(seed).permutation(n_users * n_items)[:n]
    return torch.from_numpy(np.stack(np.divmod(cells, n_items)))


def test_they_are_the_largest_singular_vectors_of_the_normalised_interactions():
    edges = interactions(12, 9, 40)
    dense = torch.zeros(12, 9, dtype=torch.float64)
    dense[edges[0], edges[1]] = 1
    dense /= (dense.sum(1, keepdim=True) * dense.sum(0, keepdim=True)).sqrt().clamp(min=1e-9)
    left, values, right = torch.linalg.svd(dense)
    users, items = spectral_embeddings(edges, 12, 9, 4)
    best = left[:, :4] * values[:4] @ right[:4]
    product = (users @ items.T).double()
    torch.testing.assert_close(product * (best.norm() / product.norm()), best, atol=1e-6, rtol=0)
    size = (users.square().mean().sqrt() * items.square().mean().sqrt()).sqrt()
    assert float(size) == pytest.approx(1, abs=1e-6)


def test_users_and_items_without_interactions_have_zeros():
    edges = interactions(12, 9, 40) + 1
    users, items = spectral_embeddings(edges, 14, 11, 4)
    assert not users[[0, 13]].any() and not items[[0, 10]].any()
    assert users[edges[0]].any(dim=1).all()


@pytest.mark.parametrize(("n_users", "n_items", "k"), [(5, 4, 4), (2, 9, 2), (1, 4, 1)])
def test_there_are_no_more_than_the_matrix_has(n_users, n_items, k):
    users, items = spectral_embeddings(torch.tensor([[0], [1]]), n_users, n_items, 64)
    assert users.shape == (n_users, k) and items.shape == (n_items, k)
    assert torch.isfinite(users).all() and torch.isfinite(items).all()


def test_without_interactions_there_are_none():
    assert spectral_embeddings(torch.zeros(2, 0, dtype=torch.long), 5, 4, 3)[0].shape == (5, 0)


def test_equal_singular_values_give_the_same_vectors_every_time():
    """Forty graphs apart from each other have forty singular values of 1."""
    edges = torch.cat([interactions(6, 4, 12, seed) + torch.tensor([[6], [4]]) * seed for seed in range(40)], dim=1)
    first, second = (spectral_embeddings(edges, 240, 160, 16) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    for start in first:
        assert torch.isfinite(start).all()
