"""Graphs against numbers worked out by hand and against dense formulas."""

import math

import numpy as np
import pytest
import scipy.sparse
import torch

from recbole_slifmr.nn import graph
from recbole_slifmr.nn.graph import (
    Edges,
    blend,
    cooccurrence_graph,
    edge_turnover,
    empty_edges,
    knn_graph,
    knn_recall,
    max_edges,
    normalize_symmetric,
    normalized_knn,
    sample_interactions,
    sparse_knn_graph,
    sum_edges,
    unique_edges,
)
from recbole_slifmr.nn.sparse import SparseMatrix


def dense(edges: Edges, shape):
    matrix = torch.zeros(shape)
    matrix.index_put_(tuple(edges.edge_index), edges.edge_weight, accumulate=True)
    return matrix


def as_set(edge_index):
    return set(map(tuple, edge_index.T.tolist()))


def test_unique_edges_sorts_and_counts_duplicates_once():
    edges = torch.tensor([[1, 0, 1, 0], [0, 2, 0, 1]])
    assert unique_edges(edges, 3).tolist() == [[0, 0, 1], [1, 2, 0]]


def test_max_edges_keeps_the_larger_weight():
    one = Edges(torch.tensor([[0, 1], [2, 0]]), torch.tensor([0.5, 0.25]))
    other = Edges(torch.tensor([[1, 0, 1], [1, 2, 0]]), torch.tensor([1.0, 0.125, 0.75]))
    index, weight = max_edges([one, other], 3)
    assert index.tolist() == [[0, 1, 1], [2, 0, 1]] and weight.tolist() == [0.5, 0.75, 1.0]


def test_cooccurrence_graph_by_hand():
    # users 0, 1 have items 0, 1, 2; user 2 has 0, 1, 3; user 3 has 3: common users 0-1: 3, 0-2, 1-2: 2, with 3: 1
    pairs = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (2, 3), (3, 3)]
    interactions = torch.tensor(pairs).T
    assert as_set(cooccurrence_graph(interactions, 4, 4, 1)) == {(0, 1), (1, 0), (2, 0), (0, 2)}  # 2: a tie, the lower
    assert as_set(cooccurrence_graph(interactions, 4, 4, 2)) == {(i, j) for i in range(3) for j in range(3) if i != j}
    assert as_set(cooccurrence_graph(interactions, 4, 4, 9, min_count=3)) == {(0, 1), (1, 0)}
    assert cooccurrence_graph(interactions[:, :0], 4, 4, 2).shape == (2, 0)


@pytest.mark.parametrize("block_size", [1, 7, 100])
def test_cooccurrence_graph_equals_dense_counts(block_size):
    matrix = (torch.rand(40, 25, generator=torch.Generator().manual_seed(0)) < 0.3).float()
    counts = (matrix.T @ matrix).fill_diagonal_(0)
    expected = set()
    for i in range(25):
        for j in sorted(range(25), key=lambda j, i=i: (-counts[i, j], j))[:4]:
            if counts[i, j] > 1:
                expected |= {(i, j), (j, i)}
    index = cooccurrence_graph(matrix.nonzero().T, 40, 25, 4, block_size=block_size)
    assert as_set(index) == expected and index.shape[1] == len(expected)


def test_sum_edges_adds_duplicates():
    edges = sum_edges(torch.tensor([[1, 0, 1], [0, 1, 0]]), torch.tensor([1.0, 2.0, 3.0]), 2)
    assert edges.edge_index.tolist() == [[0, 1], [1, 0]]
    assert edges.edge_weight.tolist() == [2.0, 4.0]


def test_normalize_symmetric_by_hand():
    # user 0 - items 0, 1; user 1 - item 0; user 2 isolated. Degrees: users 2, 1, 0; items 2, 1.
    weight = normalize_symmetric(torch.tensor([[0, 0, 1], [0, 1, 0]]), torch.ones(3), (3, 2))
    expected = [1 / 2, 1 / math.sqrt(2), 1 / math.sqrt(2)]
    torch.testing.assert_close(weight, torch.tensor(expected))


def test_normalize_symmetric_of_weighted_edges_equals_the_dense_formula():
    edge_index = torch.tensor([[0, 0, 1, 2, 2], [1, 2, 0, 0, 2]])
    weight = torch.tensor([1.0, 3.0, 2.0, 0.5, 4.0])
    matrix = dense(Edges(edge_index, weight), (4, 4))
    row, col = matrix.sum(1), matrix.sum(0)
    expected = matrix / (row[:, None] * col[None, :]).sqrt()
    got = dense(Edges(edge_index, normalize_symmetric(edge_index, weight, (4, 4))), (4, 4))
    torch.testing.assert_close(got, torch.nan_to_num(expected))


def test_normalize_symmetric_is_differentiable_in_the_weights():
    edge_index = torch.tensor([[0, 0, 1, 2], [1, 2, 0, 0]])
    weight = torch.tensor([1.0, 3.0, 2.0, 0.5], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w: normalize_symmetric(edge_index, w, (3, 3)), weight)


# -- nearest neighbours ----------------------------------------------------------------------------------------------


def test_knn_links_both_ways_without_self_edges():
    features = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
    # nearest: 0 -> 1, 1 -> 0, 2 -> 1 (cosine 0.11 against 0)
    assert as_set(knn_graph(features, 1)) == {(0, 1), (1, 0), (2, 1), (1, 2)}


def test_knn_ties_go_to_the_lowest_index():
    features = torch.tensor([[1.0, 0.0]] * 4)
    assert as_set(knn_graph(features, 1)) == {(0, 1), (1, 0), (2, 0), (0, 2), (3, 0), (0, 3)}


@pytest.mark.parametrize("k", [1, 3, 8, 150])
def test_knn_of_many_ties_equals_the_naive_answer(monkeypatch, k):
    """Cosines are multiples of 1/4 here, without rounding; no row is sorted, which takes long."""
    monkeypatch.setattr(graph, "TIED", 7)
    monkeypatch.delattr(torch, "sort")
    features = torch.randint(0, 2, (120, 4), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    features[5], features[70:80] = 0, 1
    similarity = features @ features.T / 4
    expected = set()
    for i, row in enumerate(similarity.tolist()):
        order = sorted((j for j in range(120) if j != i and row[j] > 0), key=lambda j, row=row: (-row[j], j))
        for j in order[:k]:
            expected |= {(i, j), (j, i)}
    for block_size in (1, 50, 1024):
        assert as_set(knn_graph(features, k, block_size=block_size)) == expected
    assert knn_recall(features, knn_graph(features, k), k) == 1


def test_knn_leaves_out_zero_rows_and_masked_items():
    features = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 0.1], [1.0, 0.2]])
    mask = torch.tensor([True, True, True, False])
    assert as_set(knn_graph(features, 3, mask)) == {(1, 2), (2, 1)}


def test_knn_leaves_out_neighbours_that_point_away():
    assert knn_graph(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), 1).shape == (2, 0)


def test_knn_of_a_single_item_has_no_edge():
    assert knn_graph(torch.ones(1, 2), 5).shape == (2, 0)


@pytest.mark.parametrize("block_size", [1, 3, 100])
def test_knn_blocks_equal_the_dense_answer(block_size):
    features = torch.randn(20, 5, generator=torch.Generator().manual_seed(1))
    unit = features / features.norm(dim=1, keepdim=True)
    similarity = unit @ unit.T
    similarity.fill_diagonal_(-2)
    expected = set()
    for i, row in enumerate(similarity.topk(4, dim=1).indices.tolist()):
        for j in row:
            if similarity[i, j] > 0:
                expected |= {(i, j), (j, i)}
    assert as_set(knn_graph(features, 4, block_size=block_size)) == expected


@pytest.mark.parametrize("block_size", [1, 7, 100])
def test_sparse_knn_equals_the_dense_one_but_for_rounding(block_size):
    rows = scipy.sparse.random_array((30, 12), density=0.3, rng=np.random.default_rng(0), format="csr")
    dense = torch.from_numpy(rows.toarray())
    unit = scipy.sparse.csr_array(torch.nn.functional.normalize(dense, dim=1).numpy())
    assert as_set(sparse_knn_graph(unit, 4, block_size)) == as_set(knn_graph(dense, 4))


def test_knn_refuses_k_below_one():
    with pytest.raises(ValueError, match="k must be at least 1"):
        knn_graph(torch.ones(3, 2), 0)


def test_normalized_knn_by_hand():
    edges = normalized_knn(torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]]), 1)
    # a path 0 - 1 - 2: degrees 1, 2, 1
    torch.testing.assert_close(edges.edge_weight, torch.full((4,), 1 / math.sqrt(2)))


@pytest.mark.parametrize("n, masked", [(3000, True), (30, False)])
def test_the_approximate_search_finds_nearly_all_neighbours(n, masked):
    pytest.importorskip("faiss")
    torch.manual_seed(0)
    features = torch.randn(20, 8)[torch.randint(0, 20, (n,))] + 0.5 * torch.randn(n, 8)
    mask = torch.arange(n) % 3 > 0 if masked else None
    exact = knn_graph(features, 5, mask)
    found = knn_graph(features, 5, mask, search="approximate")
    assert knn_recall(features, exact, 5, mask) == 1.0
    recall = knn_recall(features, found, 5, mask)
    assert recall > 0.9
    half = exact[:, torch.rand(exact.shape[1]) < 0.5]
    assert knn_recall(features, half, 5, mask) == pytest.approx(0.5, abs=0.06 if n > 100 else 0.2)
    assert (found[0] != found[1]).all() and (mask is None or mask[found].all())
    both = torch.cat([found, found.flip(0)], dim=1).unique(dim=1)
    assert torch.equal(both, found), "undirected, sorted, unique"


def test_an_unknown_search_is_refused():
    with pytest.raises(ValueError, match="search must be one of exact, approximate"):
        knn_graph(torch.randn(4, 2), 1, search="fast")


# -- blending and turnover -------------------------------------------------------------------------------------------


def test_blend_is_the_weighted_sum():
    a = Edges(torch.tensor([[0, 1], [1, 0]]), torch.tensor([1.0, 1.0]))
    s = Edges(torch.tensor([[0, 2], [1, 0]]), torch.tensor([0.5, 0.5]))
    expected = 0.7 * dense(a, (3, 3)) + 0.3 * dense(s, (3, 3))
    torch.testing.assert_close(dense(blend(a, s, 0.3, 3), (3, 3)), expected)


def test_blend_with_nothing_is_the_initial_graph():
    a = Edges(torch.tensor([[0, 1], [1, 0]]), torch.tensor([1.0, 1.0]))
    assert blend(a, empty_edges(), 0.3, 3) is a
    assert blend(a, a, 0.0, 3) is a


def test_edge_turnover_counts_new_edges():
    old, new = torch.tensor([[0, 1], [1, 0]]), torch.tensor([[0, 1, 2, 0], [1, 0, 0, 2]])
    assert edge_turnover(old, new, 3) == 0.5
    assert edge_turnover(new, new, 3) == 0.0
    assert edge_turnover(new[:, :0], new, 3) == 1.0


# -- pruning ---------------------------------------------------------------------------------------------------------


def star_and_leaves():
    """A popular corner (users 0-9 x items 0-9, complete) and a thin one (users 10-19, one item each)."""
    dense_part = torch.cartesian_prod(torch.arange(10), torch.arange(10)).T
    thin_part = torch.stack([torch.arange(10, 20), torch.arange(10, 20)])
    return torch.cat([dense_part, thin_part], dim=1)


def test_pruning_leaves_out_the_asked_share_and_cuts_nobody_off():
    edges = star_and_leaves()
    keep = sample_interactions(edges, 20, 20, 0.5, seed=3)
    assert 55 <= keep.sum() <= 55 + 20
    assert torch.bincount(edges[0, keep], minlength=20).min() >= 1
    assert torch.bincount(edges[1, keep], minlength=20).min() >= 1


def test_a_node_cut_off_gets_an_edge_back():
    edges = torch.cartesian_prod(torch.arange(5), torch.arange(5)).T
    keep = sample_interactions(edges, 5, 5, 0.95, seed=0)  # asks for 2 of 25 edges, 5 users need one each
    assert torch.bincount(edges[0, keep], minlength=5).min() >= 1
    assert torch.bincount(edges[1, keep], minlength=5).min() >= 1
    assert keep.sum() < 15


def test_edges_between_popular_ends_go_first():
    edges = torch.cat([star_and_leaves(), torch.tensor([[10, 11, 12, 13], [11, 12, 13, 14]])], dim=1)
    popular = torch.arange(edges.shape[1]) < 100
    kept = torch.stack([sample_interactions(edges, 20, 20, 0.5, seed=s) for s in range(200)]).float().mean(0)
    assert kept[popular].mean() < 0.55
    assert kept[~popular].mean() > 0.85


def test_sampling_probability_follows_the_degrees():
    # numpy draws without replacement one after the other; the blocks are so full that hardly an edge has to be put back
    small, large = torch.cartesian_prod(*[torch.arange(4)] * 2), torch.cartesian_prod(*[torch.arange(4, 16)] * 2)
    edges = torch.cat([small, large]).T
    weight = np.repeat([1 / 4, 1 / 12], [16, 144])  # 1 / sqrt(d_u d_i)
    rng, expected = np.random.default_rng(0), np.zeros(160)
    for _ in range(1000):
        expected[rng.choice(160, 80, replace=False, p=weight / weight.sum())] += 1 / 1000
    kept = torch.stack([sample_interactions(edges, 16, 16, 0.5, seed) for seed in range(1000)]).float().mean(0)
    assert kept[:16].mean().item() == pytest.approx(expected[:16].mean(), abs=0.01)
    assert kept[16:].mean().item() == pytest.approx(expected[16:].mean(), abs=0.01)


def test_pruning_leaves_the_global_random_state_alone():
    edges = star_and_leaves()
    state = torch.get_rng_state()
    first = sample_interactions(edges, 20, 20, 0.3, seed=7)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, sample_interactions(edges, 20, 20, 0.3, seed=7))
    assert not torch.equal(first, sample_interactions(edges, 20, 20, 0.3, seed=8))


def test_pruning_nothing_keeps_everything():
    assert sample_interactions(star_and_leaves(), 20, 20, 0.0, 0).all()


@pytest.mark.parametrize("ratio", [-0.1, 1.0])
def test_pruning_refuses_a_ratio_out_of_range(ratio):
    with pytest.raises(ValueError, match="prune_ratio"):
        sample_interactions(star_and_leaves(), 20, 20, ratio, 0)


# -- products --------------------------------------------------------------------------------------------------------


def random_matrix():
    generator = torch.Generator().manual_seed(0)
    edge_index = torch.stack(
        [torch.randint(0, 4, (9,), generator=generator), torch.randint(0, 6, (9,), generator=generator)]
    )
    return Edges(edge_index, torch.rand(9, generator=generator)), (4, 6)


def test_sparse_product_equals_dense_forward_and_backward():
    edges, shape = random_matrix()
    x = torch.randn(6, 3, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    upstream = torch.randn(4, 3)
    sparse = SparseMatrix(edges, shape).multiply(x)
    full = dense(edges, shape) @ y
    torch.testing.assert_close(sparse, full)
    sparse.backward(upstream)
    full.backward(upstream)
    torch.testing.assert_close(x.grad, y.grad)


def test_weighted_product_equals_dense_in_both_gradients():
    edges, shape = random_matrix()
    matrix = SparseMatrix(edges, shape)
    x = torch.randn(6, 3, dtype=torch.float64)
    y, upstream = x.clone(), torch.randn(4, 3, dtype=torch.float64)
    weight = torch.rand(9, dtype=torch.float64)
    grads = []
    for product in (
        lambda w, d: matrix.multiply(d, w),
        lambda w, d: torch.zeros(shape, dtype=torch.float64).index_put(tuple(edges.edge_index), w, accumulate=True) @ d,
    ):
        w, d = weight.clone().requires_grad_(), y.clone().requires_grad_()
        out = product(w, d)
        out.backward(upstream)
        grads.append((out.detach(), w.grad, d.grad))
    for sparse, full in zip(*grads, strict=True):
        torch.testing.assert_close(sparse, full)


def test_products_of_an_empty_matrix_are_zero():
    matrix = SparseMatrix(empty_edges(), (3, 5))
    x = torch.randn(5, 2, requires_grad=True)
    out = matrix.multiply(x)
    out.sum().backward()
    assert out.tolist() == [[0.0, 0.0]] * 3
    assert x.grad.abs().sum() == 0


def test_sparse_matrix_returns_its_edges_and_stays_out_of_checkpoints():
    edges, shape = random_matrix()
    matrix = SparseMatrix(edges, shape)
    torch.testing.assert_close(dense(matrix.edges(), shape), dense(edges, shape))
    assert matrix.state_dict() == {}
    assert not any(buffer.is_sparse or buffer.layout != torch.strided for buffer in matrix.buffers())
