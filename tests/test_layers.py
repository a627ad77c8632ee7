"""Layers against numbers worked out by hand."""

import math

import pytest
import torch

from recbole_slifmr.nn.layers import FUSIONS, Fusion, light_propagation, unit


def test_light_propagation_averages_the_layers():
    adjacency = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    embeddings = torch.tensor([[1.0], [3.0]])
    # layers: (1, 3), (3, 1), (1, 3)
    out = light_propagation(lambda x: adjacency @ x, embeddings, 2)
    torch.testing.assert_close(out, torch.tensor([[5 / 3], [7 / 3]]))
    torch.testing.assert_close(light_propagation(lambda x: adjacency @ x, embeddings, 0), embeddings)


def fusion_by_hand():
    fusion = Fusion("attention", 2, 2)
    with torch.no_grad():
        fusion.transform.weight.copy_(torch.eye(2))
        fusion.query.copy_(torch.tensor([1.0, 0.0]))
    return fusion


def test_attention_by_hand():
    views = torch.tensor([[[2.0, 0.0], [0.0, 4.0]]])
    weight = math.exp(math.tanh(2)) / (math.exp(math.tanh(2)) + 1)  # the second view scores tanh(0) = 0
    out = fusion_by_hand()(views, torch.tensor([[True, True]]))
    torch.testing.assert_close(out, torch.tensor([[2 * weight, 4 * (1 - weight)]]))


@pytest.mark.parametrize("kind", FUSIONS)
def test_fusion_starts_as_the_mean_of_the_views(kind):
    views = torch.randn(5, 3, 4)
    out = Fusion(kind, 3, 4)(views, torch.ones(5, 3, dtype=torch.bool))
    torch.testing.assert_close(out, views.mean(1))


@pytest.mark.parametrize("kind", FUSIONS)
def test_a_missing_view_has_no_say_and_no_gradient(kind):
    fusion = Fusion(kind, 2, 3)
    views = torch.randn(4, 2, 3, requires_grad=True)
    mask = torch.tensor([[True, True], [True, False], [False, True], [False, False]])
    out = fusion(views, mask)
    other = torch.where(mask.unsqueeze(2), views.detach(), torch.full_like(views, 7.0))
    torch.testing.assert_close(out, fusion(other, mask))
    out.sum().backward()
    assert torch.isfinite(views.grad).all()
    assert views.grad[~mask].abs().sum() == 0
    assert out[3].abs().sum() == 0


@pytest.mark.parametrize("kind", ["attention", "sum"])
def test_weights_add_up_to_one_over_the_views_present(kind):
    fusion = Fusion(kind, 3, 4)
    torch.nn.init.normal_(fusion.transform.weight) if kind == "attention" else None
    mask = torch.tensor([[True, True, False], [False, True, False]])
    weights = fusion.weights(torch.randn(2, 3, 4), mask)
    torch.testing.assert_close(weights.sum(1), torch.ones(2))
    assert (weights[~mask] == 0).all()


def test_an_unknown_fusion_is_refused():
    with pytest.raises(ValueError, match="fusion must be one of attention, sum, concat"):
        Fusion("maximum", 2, 3)


def test_unit_equals_normalize_forward_and_backward():
    rows = torch.randn(3, 2, 4, dtype=torch.float64)
    rows[1, 0] = 0
    torch.testing.assert_close(unit(rows), torch.nn.functional.normalize(rows, dim=2))
    assert torch.autograd.gradcheck(unit, rows[0].clone().requires_grad_())
