"""LightKG and AdaKG against dense formulas, and what all models of a knowledge graph share."""

import pytest
import torch
from conftest import all_scores
from recbole.data.interaction import Interaction
from torch.nn import functional as F

from recbole_slifmr.errors import DataError, SettingError
from recbole_slifmr.nn.loss import bpr_loss

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


@pytest.mark.parametrize("n_layers", [1, 2, 3, 4])
def test_adakg_sees_nothing_in_the_interactions_of_a_node_without_any(tiny, build, n_layers):
    """Here the padding: nothing at all, where rounding would have a direction."""
    model = build(tiny, "AdaKG", n_layers=n_layers, eps=0.5).model
    generator = torch.Generator().manual_seed(0)
    ego = [torch.randn(n, 64, generator=generator) for n in (model.n_users, model.n_items)]
    z = model.interaction_view(*ego)
    moved = model.interaction_view(*(rows + 0.1 for rows in ego))
    for before, after, q in zip(z, moved, model.instability(ego, z, torch.stack(TRIPLET)), strict=True):
        assert not before[0].any() and not after[0].any()
        assert q[0] > q[1:].mean(), "1 less the mean"


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
