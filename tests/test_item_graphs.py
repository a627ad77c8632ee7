"""LATTICE and FREEDOM: their equations, and when their item graphs are built and pruned."""

import pytest
import torch
from conftest import all_scores, batch_of
from recbole.data.interaction import Interaction
from torch.nn import functional as F

from recbole_slifmr.data.features import ItemFeatures
from recbole_slifmr.errors import SettingError
from recbole_slifmr.model.freedom import frozen_graph
from recbole_slifmr.model.lattice import ModalityGraph, similarity_graph
from recbole_slifmr.nn.graph import sample_interactions
from recbole_slifmr.nn.loss import bpr_loss

# -- LATTICE -----------------------------------------------------------------------------------------------------------


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


# -- FREEDOM -----------------------------------------------------------------------------------------------------------


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
