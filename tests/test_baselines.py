"""The baselines: the contract that all keep, and each one's own equations on graphs worked out by hand."""

import numpy as np
import pytest
import torch
from conftest import all_scores, batch_of
from recbole.data.interaction import Interaction
from torch.nn import functional as F

from recbole_slifmr.data.features import ItemFeatures
from recbole_slifmr.errors import DataError, SettingError
from recbole_slifmr.model.freedom import frozen_graph
from recbole_slifmr.model.lattice import ModalityGraph, similarity_graph
from recbole_slifmr.nn import loss
from recbole_slifmr.nn.graph import sample_interactions
from recbole_slifmr.nn.loss import bpr_loss

BASELINES = ("LATTICE", "VBPR", "FREEDOM", "BM3", "MSCA", "MGCN", "SMORE")


@pytest.fixture(params=BASELINES)
def model_name(request):
    return request.param


@pytest.mark.parametrize(
    "settings, fix", [({"modalities": {}}, "put .npy files"), ({"use_features": False}, "set use_features to True")]
)
def test_no_modality_is_refused(tiny, build, model_name, settings, fix):
    with pytest.raises(DataError, match=f"{model_name} needs item features and 'tiny' has none: {fix}") as error:
        build(tiny, model_name, **settings)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name, setting, value",
    [
        ("LATTICE", "prune_ratio", 0.5),
        ("BM3", "prune_ratio", 0.5),
        ("FREEDOM", "self_loop", True),
        ("XSimGCL", "self_loop", True),
        ("LightKG", "prune_ratio", 0.5),
        ("AdaKG", "self_loop", True),
    ],
)
def test_what_the_trainer_cannot_ask_of_the_model_is_refused(tiny, build, name, setting, value):
    with pytest.raises(SettingError, match=f"{name} cannot do what {setting} asks for"):
        build(tiny, name, **{setting: value})


@pytest.mark.parametrize("n_modalities", [1, 3])
def test_any_number_of_modalities_moves_the_scores(tiny, build, model_name, n_modalities):
    """An item without a modality (i1 has none at all, i2 lacks the first) is ranked like the others."""
    tokens = (tiny / "items.txt").read_text().split()
    for name in ("text.npy", "image.npy"):
        (tiny / name).unlink()
    scores = []
    for seed in range(2):
        rng = np.random.default_rng(seed)
        for m in range(n_modalities):
            values = rng.normal(size=(len(tokens), 3 + m))
            if m == 0:
                values[tokens.index("i2")] = 0
            np.save(tiny / f"m{m}.npy", values)
        run = build(tiny, model_name)
        assert list(run.dataset.item_features) == [f"m{m}" for m in range(n_modalities)]
        assert (~run.dataset.item_features["m0"].mask).sum() == 3, "the padding item, i1 and i2"
        run.trainer.fit(run.train, run.valid, saved=False, show_progress=False)
        scores.append(all_scores(run))
        assert torch.isfinite(scores[-1]).all()
    assert not torch.allclose(*scores)


# -- LATTICE ---------------------------------------------------------------------------------------------------------

# items 1, 2, 3 beside the padding item: cosines .6 (1-2), .8 (2-3), 0 (1-3)
THREE = ItemFeatures(torch.tensor([[0, 0], [1, 0], [0.6, 0.8], [0, 1]]), torch.tensor([False, True, True, True]))


def as_dict(edges):
    return {tuple(pair): w for pair, w in zip(edges.edge_index.T.tolist(), edges.edge_weight.tolist(), strict=True)}


def test_similarity_graph_by_hand():
    # 1 -> 2, 2 -> 3, 3 -> 2; degrees .6, .6 + .8, .8
    w12, w23 = 0.6 / (0.6 * 1.4) ** 0.5, 0.8 / (1.4 * 0.8) ** 0.5
    edges = as_dict(similarity_graph(THREE.values, 1, THREE.mask))
    assert edges == pytest.approx({(1, 2): w12, (2, 1): w12, (2, 3): w23, (3, 2): w23})


def test_modality_graph_blends_raw_and_projected_by_hand():
    graph = ModalityGraph(THREE, 2, knn_k=1, lambda_coeff=0.75)
    with torch.no_grad():
        graph.linear.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))  # 1 and 2 become parallel, 3 becomes zero
        graph.linear.bias.zero_()
    w12, w23 = 0.75 * (0.6 / 1.4) ** 0.5 + 0.25, 0.75 * (0.8 / 1.4) ** 0.5
    expected = {(1, 2): w12, (2, 1): w12, (2, 3): w23, (3, 2): w23}
    assert as_dict(graph.edges()) == pytest.approx(expected)


def dense_similarity(features, k, mask):
    """The same graph as a matrix, the plain way: every cosine, the k largest of each row, either way round."""
    unit = F.normalize(features, dim=1)
    cosine = unit @ unit.T
    usable = cosine.detach().clone().fill_diagonal_(-1.0)
    usable[~mask] = usable[:, ~mask] = -1.0
    near = torch.zeros_like(usable).scatter_(1, usable.topk(k, dim=1).indices, 1.0).bool() & (usable > 0)
    adjacency = cosine * (near | near.T)
    degree = adjacency.sum(1)
    scale = torch.where(degree > 0, degree.clamp(min=1e-9).rsqrt(), 0.0)
    return scale[:, None] * adjacency * scale[None, :]


def test_lattice_equals_its_dense_equations_in_values_and_gradients(tiny, build):
    run = build(tiny, "LATTICE", knn_k=3, lambda_coeff=0.3, item_n_layers=2)
    model = run.model
    torch.nn.init.normal_(model.modality_weight)
    probe = torch.randn(model.n_items, 64)

    sparse_items = model()[1]
    (sparse_items * probe).sum().backward()
    learnt = {name: p.grad.clone() for name, p in model.named_parameters() if name.startswith("modality")}
    model.zero_grad()

    share, adjacency = torch.softmax(model.modality_weight, 0), 0.0
    for m, graph in enumerate(model.modality_graphs.values()):
        raw, projected = (dense_similarity(x, 3, graph.mask) for x in (graph.values, graph.linear(graph.values)))
        adjacency = adjacency + share[m] * (0.3 * raw + 0.7 * projected)
    embeddings = model.item_embedding.weight
    cf_items = model.interaction_encoder(model.user_embedding.weight, embeddings)[1]
    dense_items = cf_items + F.normalize(adjacency @ (adjacency @ embeddings), dim=1)
    torch.testing.assert_close(sparse_items, dense_items)
    (dense_items * probe).sum().backward()
    assert len(learnt) == 5, "two projections with a bias, the weights of the modalities"
    for name, gradient in learnt.items():
        torch.testing.assert_close(gradient, model.get_parameter(name).grad, msg=name)


def test_gradients_reach_the_projections_in_the_first_batch_of_an_epoch_only(tiny, build):
    model = (run := build(tiny, "LATTICE")).model
    learnt = [p for name, p in model.named_parameters() if name.startswith("modality")]

    def reached():
        model.zero_grad()
        sum(model.calculate_loss(batch_of(run))).backward()
        assert model.item_embedding.weight.grad.abs().sum() > 0
        return [p.grad is not None and bool(p.grad.abs().sum() > 0) for p in learnt]

    for _ in range(2):
        assert all(reached())
        graph = model.item_graph
        all_scores(run)  # an evaluation amid the epoch builds a graph of its own
        model.train()
        assert not any(reached())
        assert model.item_graph is graph
        model.start_epoch()


def test_evaluation_uses_the_graph_of_the_current_parameters(tiny, build):
    model = (run := build(tiny, "LATTICE", knn_k=2, lambda_coeff=0.1)).model
    model.calculate_loss(batch_of(run))
    before = all_scores(run)
    torch.nn.init.normal_(model.modality_graphs["text"].linear.weight)
    model.clear_cache()
    assert not torch.allclose(all_scores(run), before)


@pytest.mark.parametrize("batch_size", [32, 16])
def test_lattice_builds_its_graph_by_epoch_whatever_asks_for_scores(tiny, build, monkeypatch, batch_size):
    """Dynamic negatives are chosen by score before every batch; what does not move the graph does not build it anew."""
    draws = {"distribution": "uniform", "sample_num": 1, "alpha": 1.0, "dynamic": True, "candidate_num": 3}
    run = build(tiny, "LATTICE", train_neg_sample_args=draws, train_batch_size=batch_size)
    built, build_graph = [], run.model.build_item_graph
    monkeypatch.setattr(run.model, "build_item_graph", lambda: (built.append(1), build_graph())[1])
    run.trainer.fit(run.train, run.valid, saved=False, show_progress=False)
    assert len(run.train) > 2
    # before the first batch; in the first batch of each of two epochs, with gradients; after the step that it takes
    assert len(built) == 1 + 2 * 2


def test_lattice_regularises_the_embeddings_of_the_batch(tiny, build):
    model = (run := build(tiny, "LATTICE", reg_weight=0.3)).model
    batch = batch_of(run)
    user, item = model.user_embedding.weight, model.item_embedding.weight
    rows = user[batch["user_id"]], item[batch["item_id"]], item[batch["neg_item_id"]]
    expected = 0.3 * sum(r.pow(2).sum() for r in rows) / (2 * len(batch))
    torch.testing.assert_close(model.calculate_loss(batch)[1], expected)


def test_lambda_outside_its_range_is_refused(tiny, build):
    with pytest.raises(SettingError, match=r"lambda_coeff must be in \[0, 1\], not 1.5"):
        build(tiny, "LATTICE", lambda_coeff=1.5)


# -- FREEDOM ---------------------------------------------------------------------------------------------------------

FOUR = {
    "text": ItemFeatures(F.pad(THREE.values, (0, 0, 0, 1)), F.pad(THREE.mask, (0, 1))),
    "image": ItemFeatures(torch.tensor([[0, 0], [0, 0], [0, 0], [1, 0], [2, 0.0]]), torch.arange(5) > 2),
}


@pytest.mark.parametrize("weights, text, image", [(None, 0.5, 0.5), ({"image": 1, "text": 3}, 0.75, 0.25)])
def test_frozen_graph_by_hand(weights, text, image):
    # text: 1-2, 2-3 with degrees 1, 2, 1; image: 3-4
    half = text / 2**0.5
    expected = {(1, 2): half, (2, 1): half, (2, 3): half, (3, 2): half, (3, 4): image, (4, 3): image}
    assert as_dict(frozen_graph(FOUR, 1, weights)) == pytest.approx(expected)


@pytest.mark.parametrize(
    "weights", [["text"], {"text": 1}, {"text": 1, "audio": 1}, {"text": 2, "image": -1}, {"text": 0, "image": 0}]
)
def test_modality_weights_that_do_not_fit_are_refused(weights):
    with pytest.raises(SettingError, match="modality_weights must give each of text, image a weight, not"):
        frozen_graph(FOUR, 1, weights)


def test_freedom_propagates_over_the_frozen_graph_which_training_leaves_alone(tiny, build):
    run = build(tiny, "FREEDOM", prune_ratio=0.3, item_n_layers=2, learning_rate=0.01)
    model = run.model
    before = as_dict(model.item_graph.edges())
    run.trainer.fit(run.train, run.valid, saved=False, show_progress=False)
    assert as_dict(model.item_graph.edges()) == before
    dense = torch.zeros(model.n_items, model.n_items)
    dense[tuple(model.item_graph.edges().edge_index)] = model.item_graph.edges().edge_weight
    model.eval()
    users, items = model.interaction_encoder(model.user_embedding.weight, model.item_embedding.weight)
    torch.testing.assert_close(model()[1], items + dense @ dense @ model.item_embedding.weight)
    assert torch.equal(model()[0], users)


def test_freedom_prunes_anew_every_epoch_and_evaluates_on_the_whole_graph(tiny, build, monkeypatch):
    run = build(tiny, "FREEDOM", prune_ratio=0.4)
    encoder, kept = run.model.interaction_encoder, []
    prune = run.model.prune_interactions
    monkeypatch.setattr(run.model, "prune_interactions", lambda seed: (prune(seed), kept.append(encoder.kept)))
    scores = all_scores(run)
    run.model.prune_interactions(5)
    run.model.clear_cache()
    assert torch.equal(all_scores(run), scores)
    assert torch.equal(kept[0], sample_interactions(encoder.edge_index, encoder.n_users, encoder.n_items, 0.4, 5))
    assert not kept[0].all()
    run.trainer.fit(run.train, run.valid, saved=False, show_progress=False)
    assert len(kept) == 3 and not torch.equal(kept[1], kept[2])


def test_freedom_feature_terms_count_the_pairs_that_have_the_modality(tiny, build):
    run = build(tiny, "FREEDOM", feature_weight=0.5, prune_ratio=0.0)
    model, ids = run.model, run.dataset.field2token_id["item_id"]
    pos, neg = (torch.tensor([ids[i] for i in tokens]) for tokens in (("i1", "i2", "i3"), ("i4", "i5", "i1")))
    user = torch.tensor([1, 2, 3])
    batch = Interaction({"user_id": user, "item_id": pos, "neg_item_id": neg})
    bpr, feature = model.calculate_loss(batch)
    users, items = model()
    score = users @ items.T
    torch.testing.assert_close(bpr, bpr_loss(score[user, pos], score[user, neg]))
    expected = 0.0
    for projection in model.projections.values():  # only the second pair: i1 has no features
        score = users[2] @ projection().T
        expected = expected + bpr_loss(score[pos[1:2]], score[neg[1:2]])
    torch.testing.assert_close(feature, 0.5 * expected)


# -- BM3 -------------------------------------------------------------------------------------------------------------


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


# -- VBPR ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("feature_bias", [True, False])
def test_vbpr_scores_equal_the_formula(tiny, build, feature_bias):
    run = build(tiny, "VBPR", embedding_size=5, feature_embedding_size=3, feature_bias=feature_bias)
    for parameter in run.model.parameters():
        torch.nn.init.normal_(parameter)
    p = {name: value.detach().numpy() for name, value in run.model.named_parameters()}
    assert ("feature_bias.weight" in p) == feature_bias
    features = []
    for values, mask in run.dataset.item_features.values():
        norm = np.linalg.norm(values.numpy(), axis=1, keepdims=True)
        features.append(np.where(mask.numpy()[:, None], values.numpy() / np.where(norm > 0, norm, 1), 0))
    f = np.concatenate(features, axis=1)
    assert f.shape == (run.dataset.item_num, 6 + 4)
    expected = np.empty((run.dataset.user_num, run.dataset.item_num))
    for u, i in np.ndindex(*expected.shape):
        expected[u, i] = p["item_bias.weight"][i, 0] + p["user_embedding.weight"][u] @ p["item_embedding.weight"][i]
        expected[u, i] += p["user_taste.weight"][u] @ (p["projection.weight"] @ f[i])
        if feature_bias:
            expected[u, i] += p["feature_bias.weight"][0] @ f[i]
    np.testing.assert_allclose(all_scores(run).numpy(), expected[1:], rtol=1e-4, atol=1e-4)
    batch = batch_of(run)
    user, pos, neg = (batch[key].numpy() for key in ("user_id", "item_id", "neg_item_id"))
    loss = np.log1p(np.exp(expected[user, neg] - expected[user, pos])).mean()
    assert run.model.calculate_loss(batch)[0].item() == pytest.approx(loss, rel=1e-4)
    rows = [p["user_embedding.weight"][user], p["user_taste.weight"][user]]
    rows += [p[f"item_{name}.weight"][item] for name in ("embedding", "bias") for item in (pos, neg)]
    norm = sum((array**2).sum() for array in rows) / (2 * len(user))
    assert run.model.calculate_loss(batch)[1].item() == pytest.approx(run.config["reg_weight"] * norm, rel=1e-4)


# -- XSimGCL ---------------------------------------------------------------------------------------------------------


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


# -- models that read the knowledge graph ----------------------------------------------------------------------------

KG_MODELS = ("LightKG", "AdaKG")


@pytest.mark.parametrize("model", KG_MODELS)
@pytest.mark.parametrize(
    "settings, fix", [({}, "put tiny.kg and tiny.link"), ({"use_kg": False}, "set use_kg to True")]
)
def test_no_knowledge_graph_is_refused(tiny, build, model, settings, fix):
    (tiny / "tiny.kg").unlink()
    with pytest.raises(DataError, match=f"{model} needs a knowledge graph and 'tiny' has none: {fix}") as error:
        build(tiny, model, **settings)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("model", KG_MODELS)
def test_the_knowledge_graph_moves_the_scores_and_features_are_not_read(tiny, build, model):
    before = all_scores(build(tiny, model))
    (tiny / "text.npy").unlink()
    assert torch.equal(all_scores(run := build(tiny, model)), before) and not run.dataset.item_features
    kg = tiny / "tiny.kg"
    kg.write_text(kg.read_text().replace("e2\tr0\tx2", "e2\tr0\tx3"))
    assert not torch.equal(all_scores(build(tiny, model)), before)


@pytest.mark.parametrize("model", KG_MODELS)
def test_a_triple_or_an_interaction_twice_counts_once(tiny, build, model):
    before = all_scores(build(tiny, model))
    kg = tiny / "tiny.kg"
    kg.write_text(kg.read_text() + "e2\tr0\tx2\n")
    torch.testing.assert_close(all_scores(build(tiny, model)), before)


TRIPLET = torch.tensor([1, 2, 1, 3]), torch.tensor([4, 4, 5, 6]), torch.tensor([7, 8, 9, 4])


def a_batch():
    return Interaction(dict(zip(("user_id", "item_id", "neg_item_id"), TRIPLET, strict=True)))


def check_gradients(model, losses, expected):
    """Compare losses and the gradients of all parameters."""
    torch.testing.assert_close(losses, expected)
    gradients = torch.autograd.grad(sum(losses), list(model.parameters()), retain_graph=True)
    wanted = torch.autograd.grad(sum(expected), list(model.parameters()))
    for (name, _), gradient, other in zip(model.named_parameters(), gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, other, msg=name)


def dense_lightkg(run):
    """Return adjacency with relation weights, plain adjacency and nodes: users, items, other entities."""
    model, data = run.model, run.train._dataset
    n_users, n_nodes = model.n_users, model.n_users + data.entity_num
    relations = sorted(set(data.triples[:, 1].tolist()))
    n_directions = len(relations) + 1
    assert len(model.relation_weight) == 2 * n_directions
    weighted, plain = torch.zeros(n_nodes, n_nodes).double(), torch.zeros(n_nodes, n_nodes).double()
    pairs = list(zip(data.inter_feat["user_id"].tolist(), data.inter_feat["item_id"].tolist(), strict=True))
    edges = [(user, n_users + item, 0) for user, item in pairs]
    edges += [(n_users + h, n_users + t, 1 + relations.index(r)) for h, r, t in data.triples.tolist()]
    for head, tail, relation in edges:
        weighted[head, tail] = weighted[head, tail] + model.relation_weight[relation]
        weighted[tail, head] = weighted[tail, head] + model.relation_weight[n_directions + relation]
        plain[head, tail] = plain[tail, head] = 1
    return weighted, plain


def test_lightkg_equals_its_dense_equations_in_values_and_gradients(tiny, build):
    kg = tiny / "tiny.kg"  # a second relation between two nodes, and a link between two items
    kg.write_text(kg.read_text() + "e2\tr1\tx2\ne4\tr0\te5\n")
    settings = {"user_cl_weight": 0.3, "item_cl_weight": 0.2, "temperature": 0.5, "reg_weight": 0.1, "n_layers": 2}
    run = build(tiny, "LightKG", mess_dropout=0.0, **settings)
    model = run.model.double()
    torch.nn.init.uniform_(model.relation_weight)
    losses = model.calculate_loss(a_batch())

    weighted, plain = dense_lightkg(run)
    degree = plain.sum(1)
    scale = torch.where(degree > 0, degree, torch.inf).rsqrt()
    ego = torch.cat([model.user_embedding.weight, model.item_embedding.weight, model.entity_embedding.weight])
    step = scale[:, None] * weighted * scale
    final = (ego + step @ ego + step @ step @ ego) / 3
    user, pos, neg = TRIPLET
    score = final[: model.n_users] @ final[model.n_users : model.n_users + model.n_items].T
    common = plain @ plain + plain
    contrast = 0.0
    for weight, nodes in ((0.3, [1, 2, 3]), (0.2, [model.n_users + item for item in range(4, 10)])):
        for i in nodes:
            for j in nodes:
                if i != j:
                    root = (degree[i] * degree[j]).sqrt()
                    cosine = F.cosine_similarity(ego[i], ego[j], dim=0)
                    term = (1 - 1 / root) * torch.exp(cosine * (1 - common[i, j] / root) / 0.5)
                    contrast = contrast + weight * term
    batch = ego[user], ego[model.n_users + pos], ego[model.n_users + neg]
    norm = sum(rows.pow(2).sum() for rows in batch) / (2 * 4)
    check_gradients(model, losses, (bpr_loss(score[user, pos], score[user, neg]), contrast, 0.1 * norm))
    torch.testing.assert_close(all_scores(run), score[1:])


def test_lightkg_drops_messages_in_training_only(tiny, build):
    model = build(tiny, "LightKG", mess_dropout=0.5, n_layers=1).model
    (noisy, _), (other, _) = model(), model()
    model.eval()
    plain = model()[0]
    dropped = 2 * noisy[1:] - model.user_embedding.weight[1:]  # layer 1: either 0 or twice what it is without
    whole = 2 * plain[1:] - model.user_embedding.weight[1:]
    zero = dropped.abs() < 1e-6
    assert 0.4 < zero.float().mean() < 0.6 and not torch.equal(noisy, other)
    torch.testing.assert_close(dropped[~zero], 2 * whole[~zero])
    assert torch.equal(model()[0], plain)


def dense_adakg(run, user, pos, neg):
    """Return interaction view, knowledge view and share of users and items; the step by autograd."""
    model, data, n_layers = run.model, run.train._dataset, run.config["n_layers"]
    adjacency = torch.zeros(model.n_users, model.n_items).double()
    adjacency[data.inter_feat["user_id"], data.inter_feat["item_id"]] = 1
    scale = [adjacency.sum(dim).clamp(min=1).rsqrt() for dim in (1, 0)]
    normal = scale[0][:, None] * adjacency * scale[1]

    def interactions(users, items):
        layers = []
        for _ in range(n_layers):
            users, items = normal @ items, normal.T @ users
            layers.append((users, items))
        return [sum(rows) / n_layers for rows in zip(*layers, strict=True)]

    ego = [model.user_embedding.weight, model.item_embedding.weight]
    z = interactions(*ego)
    start = [rows.detach().requires_grad_() for rows in ego]
    users, items = interactions(*start)
    score = users @ items.T
    slope = torch.autograd.grad(bpr_loss(score[user, pos], score[user, neg]), start)
    moved = [
        e.detach() + run.config["eps"] * e.detach().norm(dim=1, keepdim=True) * F.normalize(g, dim=1)
        for e, g in zip(ego, slope, strict=True)
    ]
    shares = []
    for before, after in zip(z, interactions(*moved), strict=True):
        q = 1 - F.cosine_similarity(before.detach(), after, dim=1)[:, None]
        shares.append(torch.sigmoid(F.softplus(model.gamma) * (q - q[before.any(1)].mean())))

    relations = sorted(set(data.triples[:, 1].tolist()))
    entities, users = torch.cat([ego[1], model.triple_encoder.entity_embedding.weight]), ego[0]
    around = [[] for _ in range(data.entity_num)]
    for head, relation, tail in data.triples.tolist():
        r = relations.index(relation)
        around[head].append((r, tail))
        around[tail].append((len(relations) + r, head))
    of_relation = model.triple_encoder.relation_embedding.weight
    all_users, all_items = [users], [ego[1]]
    for _ in range(n_layers):
        means = adjacency @ entities[: model.n_items] / adjacency.sum(1, keepdim=True).clamp(min=1)
        all_users.append(F.normalize(means, dim=1))
        entities = torch.stack(
            [
                F.normalize(torch.stack([of_relation[r] * entities[t] for r, t in near]).mean(0), dim=0)
                if near
                else torch.zeros_like(entities[0])
                for near in around
            ]
        )
        all_items.append(entities[: model.n_items])
    k = [sum(rows) / (n_layers + 1) for rows in (all_users, all_items)]
    return z, k, shares


def test_adakg_equals_its_dense_equations_in_values_and_gradients(tiny, build):
    settings = {"n_layers": 2, "eps": 0.7, "cl_weight": 0.6, "temperature": 0.5, "reg_weight": 0.1}
    model = (run := build(tiny, "AdaKG", **settings)).model.double()
    torch.nn.init.constant_(model.gamma, 2.0)
    losses = model.calculate_loss(a_batch())
    user, pos, neg = TRIPLET
    z, k, shares = dense_adakg(run, user, pos, neg)
    assert shares[0][1:].std() > 1e-3 and shares[1][1:].std() > 1e-3, "nodes differ"
    users, items = (a + share * b for a, b, share in zip(z, k, shares, strict=True))
    score, contrast = users @ items.T, 0.0
    for view, other, share, ids in zip(z, k, shares, ([1, 2, 3], [4, 5, 6]), strict=True):
        cosine = F.cosine_similarity(view[ids][:, None], other[ids][None], dim=2)
        terms = F.cross_entropy(cosine / 0.5, torch.arange(3), reduction="none")
        contrast = contrast + (share[ids, 0].detach() * terms).mean()
    ego = model.user_embedding.weight[user], model.item_embedding.weight[pos], model.item_embedding.weight[neg]
    norm = sum(rows.pow(2).sum() for rows in ego) / (2 * 4)
    check_gradients(model, losses, (bpr_loss(score[user, pos], score[user, neg]), 0.6 * contrast, 0.1 * norm))


def test_adakg_scores_with_the_step_against_all_interactions(tiny, build):
    model = (run := build(tiny, "AdaKG", n_layers=2)).model.double()
    z, k, shares = dense_adakg(run, *model.interaction_encoder.edge_index, model.drawn)
    users, items = (a + share * b for a, b, share in zip(z, k, shares, strict=True))
    torch.testing.assert_close(all_scores(run), (users @ items.T)[1:])


def test_adakg_leans_on_the_knowledge_graph_most_where_there_are_no_interactions(tiny, build):
    run = build(tiny, "AdaKG", cold_items=0.4, eps=0.1)
    torch.nn.init.constant_(run.model.gamma, 5.0)
    share = run.model.encode(torch.stack(TRIPLET))[1][2].squeeze(1)
    cold = ~run.model.warm.squeeze(1)
    assert share[cold].min() > share[1:][~cold[1:]].max()


@pytest.mark.parametrize(
    "model, setting, message",
    [
        ("LightKG", {"temperature": 0}, "temperature must be above 0, not 0"),
        ("LightKG", {"mess_dropout": 1.0}, r"mess_dropout must be in \[0, 1\), not 1.0"),
        ("AdaKG", {"eps": -1.0}, "eps must be 0 or more, not -1.0"),
        ("AdaKG", {"n_layers": 0}, "n_layers must be 1 or more, not 0: AdaKG leaves layer 0 out"),
    ],
)
def test_settings_of_kg_models_outside_their_range_are_refused(tiny, build, model, setting, message):
    with pytest.raises(SettingError, match=f"^{message}$"):
        build(tiny, model, **setting)
