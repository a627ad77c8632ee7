"""BM3's equations."""

import pytest
import torch
from conftest import all_scores, batch_of
from recbole.data.interaction import Interaction
from torch.nn import functional as F

from recbole_slifmr.errors import SettingError


def plain_bm3(tiny, build):
    """Return BM3 as bare embeddings: no layers, no dropout, the identity as predictor; and one training pair."""
    run = build(tiny, "BM3", n_layers=0, dropout=0.0, reg_weight=0.0, feature_weight=1.0)
    with torch.no_grad():
        run.model.predictor.weight.copy_(torch.eye(64))
    pair = Interaction({"user_id": torch.tensor([1]), "item_id": torch.tensor([2])})
    assert run.dataset.item_features["text"].mask[2]
    return run.model, pair


def test_bm3_equals_its_equations_in_values_and_gradients(tiny, build):
    run = build(tiny, "BM3", dropout=0.0, reg_weight=0.3, feature_weight=0.7)
    model, ids = run.model, run.dataset.field2token_id["item_id"]
    torch.nn.init.normal_(model.predictor.bias)
    user, item = torch.tensor([1, 2, 3]), torch.tensor([ids[i] for i in ("i2", "i1", "i3")])
    losses = model.calculate_loss(Interaction({"user_id": user, "item_id": item}))
    sum(losses).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()

    def distance(online, target):
        return (1 - F.cosine_similarity(model.predictor(online), target.detach(), dim=1)).mean()

    ego = model.item_embedding.weight
    users, items = model.interaction_encoder(model.user_embedding.weight, ego)
    h_user, h_item = users[user], items[item] + ego[item]
    align = mask = 0.0
    for projection in model.projections.values():
        h_feature = projection.linear(projection.values[item[[0, 2]]])  # i1 has no features
        align = align + distance(h_feature, h_item[[0, 2]])
        mask = mask + distance(h_feature, h_feature)
    norm = (h_user.pow(2).sum() + h_item.pow(2).sum()) / (2 * 3)
    expected = distance(h_user, h_item) + distance(h_item, h_user), 0.7 * align, 0.7 * mask, 0.3 * norm
    torch.testing.assert_close(losses, expected)
    sum(expected).backward()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, model.get_parameter(name).grad, msg=name)


def test_bm3_stops_the_gradient_at_the_targets(tiny, build):
    model, pair = plain_bm3(tiny, build)
    user, item = model.user_embedding.weight[1].detach(), 2 * model.item_embedding.weight[2].detach()
    model.calculate_loss(pair)[0].backward()
    # of the two terms only the one where the user is the online view pulls at it: -d cos(u, i) / du
    u, i = F.normalize(user, dim=0), F.normalize(item, dim=0)
    torch.testing.assert_close(model.user_embedding.weight.grad[1], -(i - (u @ i) * u) / user.norm())
    torch.testing.assert_close(model.item_embedding.weight.grad[2], -2 * (u - (u @ i) * i) / item.norm())
    model.zero_grad()
    _, align, mask, _ = model.calculate_loss(pair)
    (align + mask).backward()
    assert model.item_embedding.weight.grad is None, "items are targets here"
    assert all(p.linear.weight.grad.abs().sum() > 0 for p in model.projections.values())


def test_bm3_drops_out_of_the_targets_in_training_only(tiny, build):
    model = build(tiny, "BM3", dropout=0.5).model
    ones = torch.ones(100, 64)
    dropped = model.train().target(ones)
    assert set(dropped.unique().tolist()) == {0.0, 2.0} and 0.4 < (dropped == 0).float().mean() < 0.6
    assert torch.equal(model.eval().target(ones), ones)


def test_bm3_looks_at_no_negatives_and_scores_with_the_online_views(tiny, build):
    model = (run := build(tiny, "BM3", dropout=0.0)).model
    batch = batch_of(run)
    losses = model.calculate_loss(batch)
    batch.interaction["neg_item_id"] = torch.ones_like(batch["neg_item_id"])
    assert model.calculate_loss(batch) == losses
    torch.nn.init.normal_(model.predictor.bias)
    users, items = (model.predictor(rows) for rows in model.encode())
    torch.testing.assert_close(all_scores(run), (users @ items.T)[1:])


def test_dropout_outside_its_range_is_refused(tiny, build):
    with pytest.raises(SettingError, match=r"dropout must be in \[0, 1\), not 1"):
        build(tiny, "BM3", dropout=1)
