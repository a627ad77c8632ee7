"""MSCA, MGCN and SMORE against their equations, written with whole matrices, in values and gradients."""

import pytest
import torch
from conftest import all_scores, batch_of
from recbole.data.interaction import Interaction
from torch.nn import functional as F

from recbole_slifmr.errors import SettingError
from recbole_slifmr.nn.loss import bpr_loss

SETTINGS = {"knn_k": 3, "n_layers": 2, "cl_weight": 0.7, "temperature": 0.5, "reg_weight": 0.3}


def scaled(matrix):
    """Divide by the roots of row and column sums."""
    scale = [torch.where(matrix.sum(dim) > 0, matrix.sum(dim).clamp(min=1).rsqrt(), 0.0) for dim in (1, 0)]
    return scale[0][:, None] * matrix * scale[1]


def either_way(near):
    return ((near + near.T) > 0).float()


def interactions(run):
    train = run.train._dataset.inter_feat
    matrix = torch.zeros(run.model.n_users, run.model.n_items)
    matrix[train["user_id"], train["item_id"]] = 1
    return matrix


def neighbours(values, mask, k=3):
    unit = F.normalize(values, dim=1)
    cosine = (unit @ unit.T).fill_diagonal_(-1.0)
    cosine[~mask] = cosine[:, ~mask] = -1.0
    near = torch.zeros_like(cosine).scatter_(1, cosine.topk(k, dim=1).indices, 1.0) * (cosine > 0)
    return scaled(either_way(near))


def common_users(matrix, k=3):
    counts = (matrix.T @ matrix).fill_diagonal_(0)
    near = torch.zeros_like(counts)
    for i, row in enumerate(counts.tolist()):
        best = sorted(range(len(row)), key=lambda j, row=row: (-row[j], j))[:k]
        near[i, [j for j in best if row[j] > 1]] = 1.0
    return scaled(either_way(near))


def layers(run):
    """Return users and items of the layers from 0 on, one below the other, by products with the whole adjacency."""
    adjacency = scaled(interactions(run))
    users, items = run.model.user_embedding.weight, run.model.item_embedding.weight
    found = [torch.cat([users, items])]
    for _ in range(2):
        users, items = adjacency @ items, adjacency.T @ users
        found.append(torch.cat([users, items]))
    return found


def gate(view, model, features):
    return model.item_embedding.weight * torch.sigmoid(F.linear(features, view.gate.weight, view.gate.bias))


def projected(model, run):
    """Return the projected features of each modality, from the features as they were loaded."""
    found = {}
    for name, (values, mask) in run.dataset.item_features.items():
        linear = model.projections[name].linear
        found[name] = F.linear(F.normalize(values, dim=1) * mask[:, None], linear.weight, linear.bias)
    return found


def attention(fusion, views):
    score = torch.stack([torch.tanh(F.linear(v, fusion.transform.weight, fusion.transform.bias)) for v in views])
    return torch.softmax(score @ fusion.query, dim=0)


def msca(run):
    model, adjacency = run.model, scaled(interactions(run))
    views = [common_users(interactions(run)) @ model.item_embedding.weight]
    for name, features in projected(model, run).items():
        views.append(neighbours(*run.dataset.item_features[name]) @ gate(model.views[name], model, features))
    views = [torch.cat([adjacency @ view, view]) for view in views]
    share = 1 - attention(model.fusion, views)
    interaction_view = sum(layers(run)[1:]) / 2
    final = interaction_view + 0.6 * sum(share[v][:, None] * view for v, view in enumerate(views))
    return final, [(interaction_view, view) for view in views]


def mgcn(run):
    model, adjacency = run.model, scaled(interactions(run))
    views, masks = [], []
    for name, features in projected(model, run).items():
        graph = neighbours(*run.dataset.item_features[name])
        view = graph @ gate(model.views[name], model, features)
        views.append(torch.cat([adjacency @ view, view]))
        linked = graph.sum(1) > 0
        masks.append(torch.cat([interactions(run) @ linked.float() > 0, linked]))
    interaction_view = sum(layers(run)) / 3
    weight = torch.stack([torch.tanh(model.fusion.transform(view)) @ model.fusion.query for view in views]).exp()
    weight = weight * torch.stack(masks)
    weight = weight / weight.sum(0).clamp(min=1e-9)
    shared = sum(weight[m][:, None] * view for m, view in enumerate(views))
    content = shared
    for view, mask, prefer in zip(views, masks, model.preferences, strict=True):
        content = content + mask[:, None] * (view - shared) * torch.sigmoid(prefer(interaction_view))
    return interaction_view + content / 3, [(content / 3, interaction_view)]


def smore(run):
    """With the transforms as matrices, of the frequencies 0 to d / 2."""
    model, adjacency = run.model, scaled(interactions(run))
    d = model.settings.embedding_size
    wave = torch.fft.fft(torch.eye(d), norm="ortho")

    def back(spectrum):
        """A signal is real if frequency -k is the conjugate of k; what is imaginary in 0 and d / 2 does not count."""
        inner, ends = spectrum[:, 1 : d // 2], spectrum[:, [0, d // 2]].real + 0j
        whole = torch.cat([ends[:, :1], inner, ends[:, 1:], inner.conj().flip(1)], dim=1)
        return (whole @ wave.conj()).real

    graphs = {name: neighbours(*features) for name, features in run.dataset.item_features.items()}
    spectra = {
        name: torch.where(run.dataset.item_features[name].mask[:, None], (x + 0j) @ wave[:, : d // 2 + 1], 1.0)
        for name, x in projected(model, run).items()
    }
    graphs["fused"], spectra["fused"] = torch.stack(list(graphs.values())).amax(0), spectra["text"] * spectra["image"]
    interaction_view = sum(layers(run)) / 3
    views = {}
    for name, spectrum in spectra.items():
        real, imaginary = model.filters[name].weight.unbind(1)
        view = graphs[name] @ gate(model.views[name], model, back(spectrum * torch.complex(real, imaginary)))
        views[name] = torch.cat([adjacency @ view, view])
    content = 0.0
    for name, view in views.items():
        if name != "fused":
            hidden, _, query = model.attentions[name]
            score = torch.tanh(F.linear(views["fused"], hidden.weight, hidden.bias)) @ query.weight.T
            view = view * score.exp() / score.exp().sum(1, keepdim=True)
        content = content + view * torch.sigmoid(model.preferences[name](interaction_view))
    return interaction_view + content / 3, [(content / 3, interaction_view)]


@pytest.mark.parametrize(
    "name, equations, settings", [("MSCA", msca, {"view_weight": 0.6}), ("MGCN", mgcn, {}), ("SMORE", smore, {})]
)
def test_models_equal_their_dense_equations_in_values_and_gradients(tiny, build, name, equations, settings):
    model = (run := build(tiny, name, **SETTINGS, **settings)).model
    for parameter in (p for key, p in model.named_parameters() if not key.endswith("embedding.weight")):
        torch.nn.init.normal_(parameter, std=0.5)
    user, pos, neg = torch.tensor([1, 2, 1, 3]), torch.tensor([4, 4, 5, 6]), torch.tensor([7, 8, 9, 4])
    losses = model.calculate_loss(Interaction({"user_id": user, "item_id": pos, "neg_item_id": neg}))
    sum(losses).backward()
    gradients = {key: p.grad.clone() for key, p in model.named_parameters()}
    model.zero_grad()

    final, pairs = equations(run)
    users, items = final.split([model.n_users, model.n_items])
    score = users @ items.T
    contrast = 0.0
    for query, key in pairs:
        for ids in ([1, 2, 3], [model.n_users + i for i in (4, 5, 6)]):  # each once, among its kind
            cosine = F.cosine_similarity(query[ids][:, None], key[ids][None], dim=2)
            contrast = contrast + F.cross_entropy(cosine / 0.5, torch.arange(3))
    ego = model.user_embedding.weight[user], model.item_embedding.weight[pos], model.item_embedding.weight[neg]
    norm = sum(rows.pow(2).sum() for rows in ego) / (2 * 4)
    expected = bpr_loss(score[user, pos], score[user, neg]), 0.7 * contrast, 0.3 * norm
    torch.testing.assert_close(losses, expected)
    sum(expected).backward()
    assert len(gradients) == len(list(model.named_parameters()))
    for key, gradient in gradients.items():
        torch.testing.assert_close(gradient, model.get_parameter(key).grad, msg=key, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(all_scores(run), score[1:])


def test_an_item_of_one_view_keeps_it_in_msca(tiny, build):
    """Item i1 has no features: what is left is the graph of shared users."""
    run = build(tiny, "MSCA", knn_k=3)
    item = run.dataset.field2token_id["item_id"]["i1"]
    final, pairs = run.model.fuse(*run.model.encode())
    (interaction_view, structure), *others = pairs
    node = run.model.n_users + item
    assert structure[node].any() and not any(view[node].any() for _, view in others)
    torch.testing.assert_close(final[node], interaction_view[node] + 0.4 * (1 - 1 / 3) * structure[node])


@pytest.mark.parametrize("name", ["MSCA", "MGCN", "SMORE"])
def test_the_contrast_draws_negatives_where_a_batch_has_more(tiny, build, name):
    losses = {}
    for n_negatives in (4096, 15, 3):
        run = build(tiny, name, n_negatives=n_negatives)
        losses[n_negatives] = run.model.calculate_loss(batch_of(run))
    assert losses[4096][0] == losses[3][0] and losses[3][1] < losses[15][1]


@pytest.mark.parametrize(
    "name, setting, message",
    [
        ("MSCA", {"n_layers": 0}, "n_layers must be 1 or more, not 0"),
        ("MGCN", {"temperature": 0}, "temperature must be above 0, not 0"),
        ("SMORE", {"knn_k": 0}, "knn_k must be 1 or more, not 0"),
    ],
)
def test_settings_outside_their_range_are_refused(tiny, build, name, setting, message):
    with pytest.raises(SettingError, match=f"^{message}$"):
        build(tiny, name, **setting)
