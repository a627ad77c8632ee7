"""Loss values by hand, gradients and where they flow."""

import math

import pytest
import torch
from torch.nn import functional as F

from recbole_slifmr.nn.diagnostics import homogenisation, smoothing
from recbole_slifmr.nn.loss import (
    alignment_uniformity,
    bpr_gradient,
    bpr_loss,
    collision_mask,
    contrast_nodes,
    cosine_distance,
    info_nce,
    inter_modal_loss,
    intra_modal_loss,
    l2_loss,
    softmax_loss,
)


def test_bpr_by_hand():
    loss = bpr_loss(torch.tensor([2.0, 0.0]), torch.tensor([0.0, 0.0]))
    assert loss.item() == pytest.approx((math.log(1 + math.exp(-2)) + math.log(2)) / 2)


def test_nodes_are_contrasted_once_each_by_hand():
    query = torch.tensor([[9.0, 9.0], [1.0, 0.0], [0.0, 2.0]])
    key = torch.tensor([[9.0, 9.0], [3.0, 0.0], [0.0, 1.0]])
    ids = torch.tensor([2, 1, 2, 2])
    loss = contrast_nodes([(query, key), (query, key.flip(1))], ids, 0.5, 10)  # cosines 1 and 0; the other way round
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-2)) + math.log(1 + math.exp(2)))


def test_softmax_by_hand():
    pos, neg = torch.tensor([2.0, 0.0]), torch.tensor([[0.0, 1.0, 9.0], [0.0, 0.0, 0.0]])
    known = torch.tensor([[False, False, True], [False, False, False]])
    terms = [math.log(1 + math.exp(-2) + math.exp(-1)), math.log(4)]
    assert softmax_loss(pos, neg, known).item() == pytest.approx(sum(terms) / 2)
    assert softmax_loss(pos, neg, known, torch.tensor([3.0, 1.0])).item() == pytest.approx(
        (3 * terms[0] + terms[1]) / 4
    )


def test_softmax_over_one_item_is_bpr():
    pos, neg = torch.randn(2, 50, generator=torch.Generator().manual_seed(0)) * 3
    torch.testing.assert_close(softmax_loss(pos, neg[:, None], torch.zeros(50, 1, dtype=bool)), bpr_loss(pos, neg))


def test_info_nce_by_hand():
    query = torch.tensor([[2.0, 0.0], [0.0, 3.0]])  # lengths do not matter
    key = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    mask = collision_mask(torch.tensor([5, 6]), torch.tensor([5, 6]))
    cos = math.sqrt(0.5)
    # query 0: own key 1, other key cos; query 1: own key cos, other key 0; temperature 0.5
    first = -math.log(math.exp(2) / (math.exp(2) + math.exp(2 * cos)))
    second = -math.log(math.exp(2 * cos) / (math.exp(2 * cos) + 1))
    assert info_nce(query, key, key, mask, 0.5).item() == pytest.approx((first + second) / 2, rel=1e-6)


@pytest.mark.parametrize("cached", [3, 8, 1000])  # one, two and all of the rows at a time
def test_info_nce_equals_the_dense_formula_with_collisions_and_few_negatives(monkeypatch, cached):
    monkeypatch.setattr("recbole_slifmr.nn.loss.CACHED", cached)
    torch.manual_seed(0)
    query, key, ids = torch.randn(6, 4), torch.randn(6, 4), torch.tensor([3, 1, 3, 2, 1, 9])
    q, k = torch.nn.functional.normalize(query, dim=1), torch.nn.functional.normalize(key, dim=1)
    expected = 0.0
    for i in range(6):
        positive = math.exp(float(q[i] @ k[i]) / 0.2)
        negatives = [math.exp(float(q[i] @ k[j]) / 0.2) for j in range(4) if ids[j] != ids[i]]
        expected -= math.log(positive / (positive + sum(negatives))) / 6
    assert info_nce(query, key, key[:4], collision_mask(ids, ids[:4]), 0.2).item() == pytest.approx(expected, rel=1e-5)


def test_info_nce_gradients_equal_those_of_the_plain_formula():
    ids = torch.tensor([3, 1, 3, 2])
    arguments = [rows.clone().requires_grad_() for rows in torch.randn(3, 4, 3, dtype=torch.float64)]
    mask = collision_mask(ids, torch.tensor([9, 2, 3, 3]))
    assert torch.autograd.gradcheck(lambda q, k, n: info_nce(q, k, n, mask, 0.3), arguments)


def test_info_nce_pulls_the_pair_together_and_the_others_apart():
    query = torch.tensor([[1.0, 0.2], [0.2, 1.0]], requires_grad=True)
    key = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    mask = collision_mask(torch.tensor([0, 1]), torch.tensor([0, 1]))
    before = info_nce(query, key, key, mask, 0.5)
    before.backward()
    after = info_nce(query - 0.1 * query.grad, key, key, mask, 0.5)
    assert after < before
    assert query.grad[0, 1] > 0, "away from the other key"


@pytest.mark.parametrize("ids", [[4], [4, 4]], ids=["single", "all the same"])
def test_info_nce_without_a_negative_is_zero_with_finite_gradients(ids):
    query = torch.randn(len(ids), 3, requires_grad=True)
    key, ids = torch.randn(len(ids), 3), torch.tensor(ids)
    loss = info_nce(query, key, key, collision_mask(ids, ids), 0.2)
    loss.backward()
    assert loss.item() == 0.0
    assert torch.isfinite(query.grad).all()


def test_no_negative_has_the_view():
    query = torch.randn(2, 3, requires_grad=True)
    loss = info_nce(query, torch.randn(2, 3), torch.zeros(0, 3), torch.zeros(2, 0), 0.2)
    loss.backward()
    assert loss.item() == 0.0 and not query.grad.any()


def test_info_nce_survives_a_small_temperature():
    query, key = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[-1.0, 0.0], [0.0, -1.0]])
    mask = collision_mask(torch.tensor([0, 1]), torch.tensor([0, 1]))
    assert info_nce(query, key, key, mask, 0.005).item() == pytest.approx(200.0)


def test_cosine_distance_by_hand():
    query, key = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[5.0, 0.0], [0.0, 2.0]])
    assert cosine_distance(query, key).item() == pytest.approx(0.5)


def test_alignment_uniformity_by_hand():
    query = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    key = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    # alignment: (0 + 2) / 2; uniformity: log e^{-2 * 2} for the queries, log e^{-2 * 4} for the keys
    assert alignment_uniformity(query, key, 2).item() == pytest.approx(1 + (-4 - 8) / 2, rel=1e-5)


@pytest.mark.parametrize(
    "loss",
    [
        lambda q: info_nce(q, q, q, torch.zeros(0, 0), 0.2),
        lambda q: info_nce(q, q, torch.ones(2, 3), torch.zeros(0, 2), 0.2),
        lambda q: cosine_distance(q, q),
        lambda q: alignment_uniformity(q, q, 4),
    ],
)
def test_an_empty_batch_costs_nothing(loss):
    assert loss(torch.zeros(0, 3, requires_grad=True)).item() == 0.0


def test_alignment_uniformity_of_one_pair_is_its_alignment():
    assert alignment_uniformity(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]), 4).item() == pytest.approx(2.0)


def test_masks_leave_rows_out():
    torch.manual_seed(0)
    query, key, mask = torch.randn(6, 3), torch.randn(6, 3), torch.tensor([True, False, True, True, False, False])
    for loss in (cosine_distance, lambda query, key, *mask: alignment_uniformity(query, key, 6, *mask)):
        torch.testing.assert_close(loss(query, key, mask), loss(query[mask], key[mask]))
        assert loss(query, key, torch.zeros(6, dtype=torch.bool)).item() == 0
    torch.testing.assert_close(bpr_loss(query[:, 0], key[:, 0], mask), bpr_loss(query[mask, 0], key[mask, 0]))


def test_a_view_that_nobody_has_adds_nothing_and_has_finite_gradients():
    users, items = torch.randn(3, 2, 4, requires_grad=True), torch.randn(3, 2, 4)
    mask, ids = torch.tensor([[True, False]]).expand(3, 2), torch.arange(3)
    for kind in ("infonce", "alignment_uniformity"):
        both = intra_modal_loss(users, items, mask, ids, (items, mask, ids + 9), kind, 0.3, 2)
        one = intra_modal_loss(
            users[:, :1], items[:, :1], mask[:, :1], ids, (items[:, :1], mask[:, :1], ids + 9), kind, 0.3, 2
        )
        torch.testing.assert_close(both, one / 2)
        (gradient,) = torch.autograd.grad(both, users)
        assert gradient.isfinite().all() and not gradient[:, 1].any()


def test_l2_by_hand():
    assert l2_loss(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.ones(2, 2)).item() == pytest.approx((25 + 4) / 4)


# -- consistency -----------------------------------------------------------------------------------------------------


def test_inter_modal_loss_is_the_mean_over_the_views_an_item_has():
    views = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [9.0, 9.0]]])
    mask = torch.tensor([[True, True], [True, False]])
    benchmark = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    ids = torch.tensor([1, 2])
    # first view: distances 0 and 1; second: 1, and the other item lacks it
    assert inter_modal_loss(views, mask, benchmark, ids, "cosine", 0.2, 8).item() == pytest.approx((0.5 + 1) / 2)
    first = info_nce(views[:, 0], benchmark, benchmark, collision_mask(ids, ids), 0.2)
    second = info_nce(views[:1, 1], benchmark[:1], benchmark[:1], collision_mask(ids[:1], ids[:1]), 0.2)
    torch.testing.assert_close(inter_modal_loss(views, mask, benchmark, ids, "infonce", 0.2, 8), (first + second) / 2)


@pytest.mark.parametrize("kind", ["cosine", "infonce"])
def test_no_gradient_reaches_the_benchmark(kind):
    views, benchmark = torch.randn(4, 2, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    mask = torch.ones(4, 2, dtype=torch.bool)
    inter_modal_loss(views, mask, benchmark, torch.arange(4), kind, 0.2, 8).backward()
    assert benchmark.grad is None
    assert views.grad.abs().sum() > 0


def test_a_step_brings_the_views_nearer_to_the_benchmark():
    torch.manual_seed(0)
    views, benchmark = torch.randn(8, 2, 5, requires_grad=True), torch.randn(8, 5)
    inter_modal_loss(
        views, torch.ones(8, 2, dtype=torch.bool), benchmark, torch.arange(8), "infonce", 0.2, 8
    ).backward()
    after = views.detach() - 0.5 * views.grad
    cosine = torch.nn.functional.cosine_similarity
    assert cosine(after, benchmark[:, None], dim=2).mean() > cosine(views, benchmark[:, None], dim=2).mean()


def test_intra_modal_loss_is_the_mean_over_the_views_that_both_have():
    users, items, ids = torch.randn(3, 2, 4), torch.randn(3, 2, 4), torch.tensor([7, 8, 9])
    mask = torch.tensor([[True, True], [True, False], [True, True]])
    some = mask[:, 1]
    others, other_ids = torch.randn(4, 2, 4), torch.tensor([5, 8, 6, 7])
    other_mask = torch.tensor([[True, False], [True, True], [True, True], [True, True]])
    negatives = (others, other_mask, other_ids)
    first = info_nce(users[:, 0], items[:, 0], others[:2, 0], collision_mask(ids, other_ids[:2]), 0.3)
    second = info_nce(users[some, 1], items[some, 1], others[1:2, 1], collision_mask(ids[some], other_ids[1:2]), 0.3)
    torch.testing.assert_close(
        intra_modal_loss(users, items, mask, ids, negatives, "infonce", 0.3, 2), (first + second) / 2
    )
    first = alignment_uniformity(users[:, 0], items[:, 0], 8)
    second = alignment_uniformity(users[some, 1], items[some, 1], 8)
    both = intra_modal_loss(users, items, mask, ids, negatives, "alignment_uniformity", 0.3, 8)
    torch.testing.assert_close(both, (first + second) / 2)


# -- diagnostics -----------------------------------------------------------------------------------------------------


def test_homogenisation_by_hand():
    views = torch.tensor([[[1.0, 0.0], [2.0, 0.0], [0.0, 3.0]], [[1.0, 0.0], [1.0, 1.0], [5.0, 5.0]]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    # node 0: pairs 1, 0, 0; node 1: one pair of cosine sqrt(1/2)
    assert homogenisation(views, mask) == pytest.approx((1 + math.sqrt(0.5)) / 4, rel=1e-6)
    assert math.isnan(homogenisation(views[:, :1], mask[:, :1]))


def test_smoothing_tells_collapse_from_spread():
    assert smoothing(torch.ones(5, 3)) == pytest.approx(1.0)
    assert smoothing(torch.eye(40)) == pytest.approx(0.0)
    assert smoothing(torch.tensor([[1.0, 0.0], [-1.0, 0.0]])) == pytest.approx(-1.0), "never a node with itself"


def test_the_gradient_of_bpr_equals_autograd_s():
    users, items = torch.randn(4, 3, dtype=torch.double), torch.randn(6, 3, dtype=torch.double)
    users.requires_grad_()
    items.requires_grad_()
    user, pos, neg = torch.tensor([[0, 1, 1, 3], [2, 2, 5, 0], [4, 4, 2, 1]])  # items repeat, also as pos and neg
    loss = F.softplus((users[user] * items[neg]).sum(1) - (users[user] * items[pos]).sum(1)).sum()
    with torch.no_grad():
        found = bpr_gradient(users, items, torch.stack([user, pos, neg]))
    torch.testing.assert_close(found, torch.autograd.grad(loss, (users, items)))


def test_info_nce_weighs_its_queries():
    query, key = torch.randn(3, 4), torch.randn(3, 4)
    mask = collision_mask(torch.arange(3), torch.arange(3))
    each = [info_nce(query[[i]], key[[i]], key, mask[[i]], 0.5) for i in range(3)]
    weight = torch.tensor([0.0, 1.0, 3.0])
    expected = (each[1] + 3 * each[2]) / 3
    torch.testing.assert_close(info_nce(query, key, key, mask, 0.5, weight), expected)
