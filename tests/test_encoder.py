"""Encoders against dense matrices on graphs of 3 to 5 nodes."""

import math

import pytest
import torch

from recbole_slifmr.nn.encoder import FeatureEncoder, InteractionEncoder, InteractionGraph
from recbole_slifmr.nn.graph import Edges, empty_edges
from recbole_slifmr.nn.knowledge import KnowledgeEncoder

FEEDBACK = Edges(torch.tensor([[1, 2], [2, 1]]), torch.tensor([1.0, 1.0]))  # items 1 - 2


# -- interactions ----------------------------------------------------------------------------------------------------


def interactions():
    """Users 0 (isolated), 1: items 1 and 2, 2: item 1. Item 0 isolated. One interaction is there twice."""
    return torch.tensor([[1, 1, 2, 1], [1, 2, 1, 1]])


def dense_interactions(eta=0.0, weight=(1.0, 1.0, 1.0)):
    r = torch.zeros(3, 3)
    r[[1, 1, 2], [1, 2, 1]] = torch.tensor(weight)
    du, di = r.sum(1), r.sum(0)
    r_hat = torch.nan_to_num(r / (du[:, None] * di[None]).sqrt())
    s = torch.zeros(3, 3)
    s[1, 2] = s[2, 1] = eta
    return torch.cat([torch.cat([torch.zeros(3, 3), r_hat], 1), torch.cat([r_hat.T, s], 1)])


@pytest.mark.parametrize("eta", [0.0, 0.4])
def test_interaction_encoder_equals_dense(eta):
    encoder = InteractionEncoder(interactions(), 3, 3, n_layers=2)
    encoder.set_item_block(Edges(FEEDBACK.edge_index, eta * FEEDBACK.edge_weight))
    ego = torch.randn(6, 2)
    a = dense_interactions(eta)
    expected = (ego + a @ ego + a @ a @ ego) / 3
    users, items = encoder(ego[:3], ego[3:])
    torch.testing.assert_close(torch.cat([users, items]), expected)


def test_interactions_count_as_they_are_weighed():
    weight = torch.tensor([1.0, 0.25, 0.5])
    encoder = InteractionEncoder(interactions(), 3, 3, n_layers=1)
    pairs = torch.tensor([2, 1]), torch.tensor([1, 1])
    assert encoder.weights(*pairs) is None
    encoder.set_edge_weight(weight)
    assert encoder.weights(*pairs).tolist() == [0.5, 1.0]
    ego = torch.randn(6, 2)
    expected = (ego + dense_interactions(weight=weight.tolist()) @ ego) / 2
    torch.testing.assert_close(torch.cat(encoder(ego[:3], ego[3:])), expected)
    means = encoder.graph.user_means(ego[3:] * torch.tensor([[0.0], [1.0], [1.0]]), torch.tensor([False, True, True]))
    torch.testing.assert_close(means[1:], torch.stack([(ego[4] + 0.25 * ego[5]) / 1.25, ego[4]]))


def test_contains_tells_the_training_interactions():
    encoder = InteractionEncoder(interactions(), 3, 3, n_layers=1)
    pairs = torch.cartesian_prod(torch.arange(3), torch.arange(3)).T.reshape(2, 3, 3)
    r = [[False, False, False], [False, True, True], [False, True, False]]
    assert encoder.contains(*pairs).tolist() == r
    encoder.prune(0.5, seed=1)
    assert encoder.contains(*pairs).tolist() == r
    nothing = InteractionEncoder(torch.zeros(2, 0, dtype=torch.long), 3, 3, n_layers=1)
    assert not nothing.contains(*pairs).any()


def test_user_means_skip_items_without_the_view():
    encoder = InteractionEncoder(interactions(), 3, 3, n_layers=1)
    first, second = torch.tensor([[0.0], [2.0], [4.0]]), torch.tensor([[0.0], [6.0], [0.0]])
    mask = torch.tensor([[False, False], [True, True], [True, False]])  # item 2 lacks the second view
    torch.testing.assert_close(encoder.graph.user_means(first, mask[:, 0]), torch.tensor([[0.0], [3.0], [2.0]]))
    torch.testing.assert_close(encoder.graph.user_means(second, mask[:, 1]), torch.tensor([[0.0], [6.0], [6.0]]))
    assert encoder.graph.user_mask(mask).tolist() == [[False, False], [True, True], [True, True]]
    assert encoder.graph.user_mask(mask & ~mask[:, :1]).any().item() is False


@pytest.mark.parametrize("weighted", [False, True])
def test_pruning_touches_training_only(weighted):
    torch.manual_seed(0)
    edges = torch.cartesian_prod(torch.arange(6), torch.arange(6)).T
    encoder, weight = InteractionEncoder(edges, 6, 6, n_layers=1), torch.rand(36) + 0.1
    if weighted:
        encoder.set_edge_weight(weight)
    ego = torch.randn(6, 2), torch.randn(6, 2)
    whole = encoder.eval()(*ego)
    encoder.prune(0.5, seed=1)
    torch.testing.assert_close(encoder.eval()(*ego), whole)
    assert not torch.allclose(encoder.train()(*ego)[0], whole[0])
    assert encoder.pruned.matrix.nnz < encoder.whole.matrix.nnz
    kept = encoder.kept
    rest = InteractionEncoder(edges[:, kept], 6, 6, n_layers=1)
    rest.set_edge_weight(weight[kept] if weighted else torch.ones(int(kept.sum())))
    torch.testing.assert_close(encoder.train()(*ego), rest(*ego))
    encoder.prune(0.0, seed=1)
    torch.testing.assert_close(encoder.train()(*ego), whole)


# -- features --------------------------------------------------------------------------------------------------------


def feature_encoder(**kwargs):
    """Item 0 lacks the modality, item 4 has a row of zeros; 1, 2, 3 lie on a path 1 - 2 - 3."""
    features = torch.tensor([[9.0, 9.0], [2.0, 0.0], [1.0, 0.9], [0.0, 3.0], [0.0, 0.0]])
    mask = torch.tensor([False, True, True, True, True])
    return FeatureEncoder(features, mask, size=2, knn_k=1, n_layers=1, **kwargs), features


def test_feature_encoder_equals_dense():
    encoder, features = feature_encoder()
    a = torch.zeros(5, 5)
    a[1, 2] = a[2, 1] = a[2, 3] = a[3, 2] = 1 / math.sqrt(2)  # degrees 1, 2, 1
    x = torch.nn.functional.normalize(features, dim=1) * torch.tensor([0, 1, 1, 1, 0])[:, None]
    h = x @ encoder.projection.weight.T
    torch.testing.assert_close(encoder(torch.zeros(5, 2)), (h + a @ h) / 2)
    assert encoder.mask.tolist() == [False, True, True, True, True]


@pytest.mark.parametrize("gate", [False, True])
def test_feature_feedback_blends_with_the_initial_graph_each_time(gate):
    encoder, features = feature_encoder(gate=gate)
    for _ in range(2):  # twice: nothing piles up
        encoder.set_feedback(Edges(torch.tensor([[1, 3, 0, 1], [3, 1, 1, 0]]), torch.ones(4)), 0.25)
    a = torch.zeros(5, 5)
    a[1, 2] = a[2, 1] = a[2, 3] = a[3, 2] = 0.75 / math.sqrt(2)
    a[1, 3] = a[3, 1] = 0.25  # and not (0, 1): an item without the modality is nobody's neighbour
    x = torch.nn.functional.normalize(features, dim=1) * torch.tensor([0, 1, 1, 1, 0])[:, None]
    ego = torch.randn(5, 2)
    h = x @ encoder.projection.weight.T
    h = h * torch.sigmoid(encoder.gate(ego)) if gate else h
    torch.testing.assert_close(encoder(ego), (h + a @ h) / 2)


def test_an_item_with_a_row_of_zeros_has_the_neighbours_of_the_feedback_and_no_others():
    encoder, features = feature_encoder()
    assert not encoder(torch.zeros(5, 2))[4].any()
    encoder.set_feedback(Edges(torch.tensor([[1, 4], [4, 1]]), torch.ones(2)), 0.5)
    wanted = encoder.projection(torch.nn.functional.normalize(features[1], dim=0)) * 0.5 / 2
    torch.testing.assert_close(encoder(torch.zeros(5, 2))[4], wanted)


@pytest.mark.parametrize("n_rows", [2, 7], ids=["few", "more than there are"])
def test_feature_rows_are_rows_of_the_whole_view(n_rows):
    encoder, _ = feature_encoder()
    users, items = torch.arange(n_rows) % 3, torch.arange(n_rows) % 5
    for feedback in (empty_edges(), Edges(torch.tensor([[1, 3], [3, 1]]), torch.ones(2))):
        encoder.set_feedback(feedback, 0.5)
        for edges in (torch.tensor([[1, 1, 2], [1, 2, 4]]), torch.tensor([[1, 1, 2], [1, 3, 3]])):
            graph = InteractionGraph(edges, 3, 5)
            view = encoder(torch.zeros(5, 2))
            user_rows, item_rows = encoder.rows(graph, users, items)
            torch.testing.assert_close(item_rows, view[items])
            torch.testing.assert_close(user_rows, graph.user_means(view, encoder.mask)[users])


def test_the_gate_uses_the_id_embedding():
    encoder, _ = feature_encoder(gate=True)
    with torch.no_grad():
        encoder.gate.weight.copy_(torch.eye(2))
        encoder.gate.bias.zero_()
    closed, open_ = encoder(torch.full((5, 2), -50.0)), encoder(torch.full((5, 2), 50.0))
    assert closed.abs().max() < 1e-6
    assert open_[1:4].abs().sum(1).min() > 0


# -- knowledge graph -------------------------------------------------------------------------------------------------

TRIPLES = torch.tensor([[1, 1, 3], [2, 1, 3], [2, 2, 4], [2, 2, 4]])  # items 1, 2; entities 3, 4; a triple twice


def knowledge_encoder(**kwargs):
    return KnowledgeEncoder(TRIPLES, n_entities=5, n_items=3, size=2, n_layers=2, **{"ego": True, **kwargs})


def dense_kg(weights, eta=0.0, feedback=1.0):
    """weights: relation 1 forward, relation 2 forward, relation 1 back, relation 2 back."""
    a = torch.zeros(5, 5)
    a[1, 3] = a[2, 3] = weights[0]
    a[2, 4] = weights[1]
    a[3, 1] = a[3, 2] = weights[2]
    a[4, 2] = weights[3]
    a[1, 2] += eta * feedback
    a[2, 1] += eta * feedback
    return torch.nan_to_num(a / (a.sum(1)[:, None] * a.sum(0)[None]).sqrt())


@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_knowledge_encoder_equals_dense(eta):
    encoder = knowledge_encoder()
    log_weights = torch.tensor([0.3, -0.7, 0.1, 0.9, 0.2])
    with torch.no_grad():
        encoder.relation_log_weight.copy_(log_weights)
    encoder.set_feedback(FEEDBACK, eta)
    items = torch.randn(3, 2)
    nodes = torch.cat([items, encoder.entity_embedding.weight])
    a = dense_kg(log_weights.exp(), eta, log_weights[4].exp())
    torch.testing.assert_close(encoder(items), ((nodes + a @ nodes + a @ a @ nodes) / 3)[:3])
    encoder.ego = False
    torch.testing.assert_close(encoder(items), ((a @ nodes + a @ a @ nodes) / 2)[:3])


def test_without_its_own_embedding_an_unlinked_item_has_no_kg_view_until_feedback_links_it():
    encoder = knowledge_encoder(ego=False)
    assert encoder.mask.tolist() == [False, True, True]
    assert encoder(torch.randn(3, 2))[0].tolist() == [0.0, 0.0]
    encoder.set_feedback(Edges(torch.tensor([[0, 1], [1, 0]]), torch.ones(2)), 0.5)
    assert encoder.mask.all()
    assert encoder(torch.randn(3, 2))[0].abs().sum() > 0


@pytest.mark.parametrize("n_layers", [1, 2, 3])
@pytest.mark.parametrize("ego", [False, True])
def test_rows_beyond_the_reach_of_an_item_change_nothing(n_layers, ego):
    """A path item 1 - 3 - 4 - 5 - 6 - 7: the view is that of the whole graph, with nodes no further than L hops."""
    triples = torch.tensor([[1, 1, 3], [4, 1, 3], [4, 2, 5], [5, 1, 6], [6, 1, 7]])
    encoder = KnowledgeEncoder(triples, n_entities=8, n_items=3, size=2, n_layers=n_layers, ego=ego)
    assert encoder.n_nodes == 3 + n_layers
    with torch.no_grad():
        encoder.relation_log_weight.copy_(torch.tensor([0.3, -0.7, 0.1, 0.9, 0.2]))
    forward, back = encoder.relation_log_weight[:2].exp(), encoder.relation_log_weight[2:4].exp()
    a = torch.zeros(8, 8)
    for head, relation, tail in triples.tolist():
        a[head, tail], a[tail, head] = forward[relation - 1], back[relation - 1]
    degree = a.sum(1)[:, None] * a.sum(0)[None]
    a = a / degree.where(degree > 0, 1.0).sqrt()
    items = torch.randn(3, 2, requires_grad=True)
    nodes = torch.cat([items, encoder.entity_embedding.weight, torch.randn(8 - encoder.n_nodes, 2)])
    layers = [nodes]
    for _ in range(n_layers):
        layers.append(a @ layers[-1])
    expected = torch.stack(layers[0 if ego else 1 :]).mean(0)[:3]
    torch.testing.assert_close(encoder(items), expected)
    inputs = [items, encoder.entity_embedding.weight, encoder.relation_log_weight]
    upstream = torch.randn(3, 2)
    for actual, dense in zip(
        torch.autograd.grad(encoder(items), inputs, upstream, retain_graph=True),
        torch.autograd.grad(expected, inputs, upstream),
        strict=True,
    ):
        torch.testing.assert_close(actual, dense)


def test_an_item_without_an_entity_keeps_a_node_of_its_own():
    items = torch.randn(3, 2)
    torch.testing.assert_close(knowledge_encoder()(items)[0], items[0] / 3)


@pytest.mark.parametrize("kind, learned", [("learned", True), ("uniform", False)])
def test_relation_weights_learn_only_if_asked(kind, learned):
    encoder = knowledge_encoder(relation_weight=kind)
    encoder(torch.randn(3, 2)).pow(2).sum().backward()
    grad = encoder.relation_log_weight.grad
    assert (grad is not None and grad[:4].abs().min() > 0) if learned else grad is None


def test_feedback_leaves_with_eta_zero():
    encoder = knowledge_encoder()
    items = torch.randn(3, 2)
    before = encoder(items)
    encoder.set_feedback(FEEDBACK, 0.5)
    assert not torch.allclose(encoder(items), before)
    encoder.set_feedback(FEEDBACK, 0.0)
    torch.testing.assert_close(encoder(items), before, rtol=0, atol=0)


def test_entities_outside_the_degree_range_are_left_out_but_items_never():
    # entity 3 has two triples, entity 4 one
    assert knowledge_encoder(degree_range=(2, 0)).n_nodes == 4
    assert knowledge_encoder(degree_range=(1, 1)).n_nodes == 4
    assert knowledge_encoder(degree_range=(5, 0)).n_triples == 0
    items = torch.randn(3, 2)
    torch.testing.assert_close(knowledge_encoder(degree_range=(5, 0))(items), items / 3)


def test_an_unknown_relation_weight_is_refused():
    with pytest.raises(ValueError, match="kg_relation_weight must be one of learned, uniform"):
        knowledge_encoder(relation_weight="random")


def test_empty_feedback_changes_nothing():
    encoder, _ = feature_encoder()
    before = encoder(torch.zeros(5, 2))
    encoder.set_feedback(empty_edges(), 0.5)
    torch.testing.assert_close(encoder(torch.zeros(5, 2)), before, rtol=0, atol=0)
