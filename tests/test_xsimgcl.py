"""XSimGCL's equations, its noise and its contrast."""

import pytest
import torch
from conftest import all_scores, batch_of
from recbole.data.interaction import Interaction
from torch.nn import functional as F

from recbole_slifmr.errors import SettingError
from recbole_slifmr.nn import loss
from recbole_slifmr.nn.loss import bpr_loss


def dense_layers(run, n_layers):
    """Return users and items of the layers from 1 on, by products with the whole normalised adjacency."""
    model, train = run.model, run.train._dataset.inter_feat
    adjacency = torch.zeros(model.n_users, model.n_items)
    adjacency[train["user_id"], train["item_id"]] = 1
    scale = [adjacency.sum(dim).clamp(min=1).rsqrt() for dim in (1, 0)]
    adjacency = scale[0][:, None] * adjacency * scale[1]
    users, items, layers = model.user_embedding.weight, model.item_embedding.weight, []
    for _ in range(n_layers):
        users, items = adjacency @ items, adjacency.T @ users
        layers.append((users, items))
    return layers


def test_xsimgcl_equals_its_dense_equations_in_values_and_gradients(tiny, build):
    settings = {"n_layers": 3, "contrast_layer": 2, "cl_weight": 0.7, "temperature": 0.5, "reg_weight": 0.3}
    model = (run := build(tiny, "XSimGCL", eps=0.0, **settings)).model
    user, pos, neg = torch.tensor([1, 2, 1, 3]), torch.tensor([4, 4, 5, 6]), torch.tensor([7, 8, 9, 4])
    losses = model.calculate_loss(Interaction({"user_id": user, "item_id": pos, "neg_item_id": neg}))
    sum(losses).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()

    layers = dense_layers(run, 3)
    z_users, z_items = (sum(rows) / 3 for rows in zip(*layers, strict=True))  # layer 0 is not among them
    contrast = 0.0
    for final, layer, ids in ((z_users, layers[1][0], [1, 2, 3]), (z_items, layers[1][1], [4, 5, 6])):  # each once
        cosine = F.cosine_similarity(final[ids][:, None], layer[ids][None], dim=2)
        contrast = contrast + F.cross_entropy(cosine / 0.5, torch.arange(3))
    score = z_users @ z_items.T
    ego = model.user_embedding.weight[user], model.item_embedding.weight[pos], model.item_embedding.weight[neg]
    norm = sum(rows.pow(2).sum() for rows in ego) / (2 * 4)
    expected = bpr_loss(score[user, pos], score[user, neg]), 0.7 * contrast, 0.3 * norm
    torch.testing.assert_close(losses, expected)
    sum(expected).backward()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, model.get_parameter(name).grad, msg=name)
    torch.testing.assert_close(all_scores(run), score[1:])


def test_xsimgcl_adds_noise_of_one_length_away_from_zero_and_in_training_only(tiny, build):
    model = (run := build(tiny, "XSimGCL", n_layers=1, eps=0.3)).model
    for noisy, plain in zip(model(), dense_layers(run, 1)[0], strict=True):
        noise = noisy - plain
        reached = plain.any(1)
        torch.testing.assert_close(noise[reached].norm(dim=1), torch.full((int(reached.sum()),), 0.3))
        assert (noise * plain >= 0).all() and not noise[0].any(), "the padding row stays zero"
        assert noise[1].abs().unique().numel() > 60, "each dimension its own"
    assert not torch.equal(model()[0], model()[0]), "drawn anew"
    model.eval()
    torch.testing.assert_close(model(), dense_layers(run, 1)[0])


def test_xsimgcl_propagates_the_noise_of_a_layer(tiny, build):
    """One pass: what layer 2 sees is layer 1 with its noise."""
    model = build(tiny, "XSimGCL", n_layers=2, eps=0.3).model
    (users, items), (next_users, next_items) = model.encode()
    for noisy, plain in (
        (next_users, model.interaction_encoder.graph.matrix.multiply(items)),
        (next_items, model.interaction_encoder.graph.matrix.multiply_transposed(users)),
    ):
        reached = plain.any(1)
        torch.testing.assert_close((noisy - plain)[reached].norm(dim=1), torch.full((int(reached.sum()),), 0.3))


def test_xsimgcl_draws_negatives_where_a_batch_has_more_than_it_contrasts_with(tiny, build, monkeypatch):
    losses, seen = {}, []
    contrast = loss.info_nce
    monkeypatch.setattr(loss, "info_nce", lambda *args: (seen.append(args[2]), contrast(*args))[1])
    for n_negatives in (4096, 15, 3):  # 15: as many as there are items
        model = (run := build(tiny, "XSimGCL", n_negatives=n_negatives, eps=0.0)).model
        batch = batch_of(run)
        seen.clear()
        torch.manual_seed(0)
        losses[n_negatives] = model.calculate_loss(batch)
        n_users, n_items = (len(batch[field].unique()) for field in ("user_id", "item_id"))
        assert [len(rows) for rows in seen] == [min(n_users, n_negatives), min(n_items, n_negatives)]
        assert all(len(rows.unique(dim=0)) == len(rows) for rows in seen), "without repeats"
    assert losses[15][0] == losses[4096][0] == losses[3][0], "BPR takes no part in it"
    assert losses[3][1] < losses[4096][1]


def test_xsimgcl_runs_on_interactions_alone(tiny, build):
    for path in tiny.iterdir():
        if path.suffix != ".inter":
            path.unlink()
    run = build(tiny, "XSimGCL")
    run.trainer.fit(run.train, run.valid, saved=False, show_progress=False)
    assert not run.dataset.item_features and torch.isfinite(all_scores(run)).all()


@pytest.mark.parametrize(
    "setting, message",
    [
        ({"eps": -0.1}, "eps must be 0 or more, not -0.1"),
        ({"temperature": 0}, "temperature must be above 0, not 0"),
        ({"n_negatives": 0}, "n_negatives must be 1 or more, not 0"),
        ({"contrast_layer": 0}, "contrast_layer must be from 1 to n_layers, here 2, not 0"),
        ({"contrast_layer": 3}, "contrast_layer must be from 1 to n_layers, here 2, not 3"),
        ({"n_layers": 0}, "contrast_layer must be from 1 to n_layers, here 0, not 1"),
    ],
)
def test_xsimgcl_settings_outside_their_range_are_refused(tiny, build, setting, message):
    with pytest.raises(SettingError, match=f"^{message}$"):
        build(tiny, "XSimGCL", **setting)
