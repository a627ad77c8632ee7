"""SLIFMR's own behaviour; what it shares with the other models is in test_contract.py."""

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import BOARD as CHECKERBOARD
from conftest import all_scores, batch_of, write_table

from recbole_slifmr.data.dataset import choose_batch_size
from recbole_slifmr.data.features import KG_TAGS
from recbole_slifmr.errors import SettingError
from recbole_slifmr.host.settings import make_config
from recbole_slifmr.model import fused, slifmr
from recbole_slifmr.nn import encoder, loss
from recbole_slifmr.nn.graph import cooccurrence_graph, knn_graph, unique_edges
from recbole_slifmr.nn.parts import sum_over_parts
from recbole_slifmr.paths import ROOT

BOARD = {**CHECKERBOARD, "embedding_start": "random"}  # the spectral start solves it before training
EVERYTHING = {"feature_gate": True, "prune_ratio": 0.2, "eta_interaction": 0.2, "reg_weight": 0.01}


# -- inputs --------------------------------------------------------------------------------------------------


FLOOR = 0.9  # of Recall@1 on the checkerboard: chance has 0.11, propagated random embeddings 0.63


def with_modalities(tiny, n):
    tokens = (tiny / "items.txt").read_text().split()
    rng = np.random.default_rng(1)
    for name in ("text.npy", "image.npy"):
        (tiny / name).unlink()
    for i in range(n):
        np.save(tiny / f"m{i}.npy", rng.normal(size=(len(tokens), 3 + i)))


@pytest.mark.parametrize("use_kg", [True, False], ids=["kg", "no kg"])
@pytest.mark.parametrize("n_modalities", [0, 1, 5])
def test_learns_with_any_subset_of_its_inputs(board, build, use_kg, n_modalities):
    with_modalities(board, n_modalities)
    run = build(board, **BOARD, use_kg=use_kg, linear_scale=0.0)
    modalities = [f"m{i}" for i in range(n_modalities)]
    assert run.model.view_names == ["interaction", *modalities, *([KG_TAGS] if use_kg else [])]
    score, _ = run.trainer.fit(run.train, run.valid, show_progress=False, saved=False)
    assert score >= FLOOR


def test_the_spectral_start_ranks_without_training(board, build):
    settings = {**CHECKERBOARD, "learning_rate": 0.0, "epochs": 1, "linear_scale": 0.0}
    run = build(board, **settings, embedding_start="spectral")
    assert run.trainer.fit(run.train, run.valid, show_progress=False, saved=False)[0] >= FLOOR


def test_what_does_not_learn_stays_below_the_floor(board, build):
    run = build(board, **{**BOARD, "learning_rate": 0.0, "epochs": 2, "linear_scale": 0.0})
    assert run.trainer.fit(run.train, run.valid, show_progress=False, saved=False)[0] < FLOOR


SWITCHES = [
    {"linear_scale": 4.0},
    {"kg_view": "graph"},
    {"kg_view": "both"},
    {"kg_view": "none"},
    {"fusion": "sum"},
    {"fusion": "concat"},
    {"fusion_residual": False},
    {"normalize_views": True},
    {"normalize_views": False},
    {"inter_loss": "cosine"},
    {"intra_loss": "alignment_uniformity"},
    {"intra_views": ["text", "kg"]},
    {"item_graph_weight": 0.0},
    {"structure_weight": 0.0},
    {"intra_views": []},
    {"inter_weight": 0, "intra_weight": 0},
    {"kg_relation_weight": "uniform", "kg_min_degree": 1, "kg_max_degree": 3},
    {"refresh_interval": "adaptive", "refresh_first_epoch": 1},
    {"self_loop": False},
    {"enable_amp": True},
    {"knn_search": "approximate"},
    {"n_layers": 0, "feature_n_layers": 0, "kg_n_layers": 0},
    EVERYTHING,
]


@pytest.mark.parametrize("settings", SWITCHES, ids=str)
def test_every_switch_learns(board, build, settings):
    run = build(board, **{**BOARD, "linear_scale": 0.0, **settings})
    score, _ = run.trainer.fit(run.train, run.valid, show_progress=False, saved=False)
    assert score >= FLOOR
    assert torch.isfinite(all_scores(run)).all()


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"fusion": "max"}, "fusion must be one of"),
        ({"inter_loss": "l1"}, "inter_loss must be one of infonce, cosine, not 'l1'"),
        ({"eta_kg": 1.5}, r"eta_kg must be in \[0, 1\]"),
        ({"intra_temperature": 0}, "intra_temperature must be above 0, not 0"),
        ({"prune_ratio": 1.0}, r"prune_ratio must be in \[0, 1\)"),
        ({"n_candidates": 0}, "n_candidates must be 1 or more, not 0"),
        ({"intra_views": ["colour"]}, "intra_views: 'colour' is none of"),
        ({"refresh_interval": 0}, "refresh_interval must be a positive whole number or 'adaptive'"),
    ],
)
def test_settings_out_of_range_are_refused(tiny, build, settings, message):
    with pytest.raises(ValueError, match=message):
        build(tiny, **settings)


@pytest.mark.slow
def test_toy_needs_both_the_knowledge_graph_and_the_features(build):
    """What interactions alone do not tell is planted in both: SLIFMR finds it, and losing either loses it."""
    recall = {}
    for name, settings in {
        "both": {},
        "no kg": {"use_kg": False},
        "no features": {"use_features": False},
        "neither": {"use_kg": False, "use_features": False},
    }.items():
        run = build(
            ROOT / "dataset_atomic" / "toy",
            epochs=6,
            topk=[20],
            valid_metric="Recall@20",
            train_batch_size=512,
            **settings,
        )
        recall[name] = run.trainer.fit(run.train, run.valid, show_progress=False, saved=False)[0]
    assert recall["both"] > recall["no kg"] + 0.1
    assert recall["both"] > recall["no features"] + 0.1
    assert min(recall["no kg"], recall["no features"]) > recall["neither"] + 0.1


# -- losses --------------------------------------------------------------------------------------------------


def test_nothing_flows_into_the_benchmark_representation(tiny, build):
    """The inter-modal loss moves the views, not what only the benchmark depends on: the fusion."""
    run = build(tiny, intra_weight=0, reg_weight=0, inter_weight=0.05)
    torch.nn.init.normal_(run.model.item_fusion.query)
    run.model.calculate_loss(batch_of(run)).inter.backward()
    assert run.model.item_fusion.query.grad is None
    assert run.model.item_fusion.transform.weight.grad is None
    assert run.model.feature_encoders["text"].projection.weight.grad.abs().sum() > 0
    assert run.model.item_embedding.weight.grad.abs().sum() > 0


def dense_normalized(a):
    degree = a.sum(1)[:, None] * a.sum(0)[None]
    return a / degree.where(degree > 0, 1.0).sqrt()


def dense_views(model, dataset, feedback):
    """Every view of every node by the plain formulas of docs/method.md: dense matrices, one power after the other."""
    n_users, n_items, n_entities = model.n_users, model.n_items, dataset.entity_num
    r = torch.zeros(n_users, n_items)
    weight = model.interaction_encoder.edge_weight
    r[tuple(model.interaction_encoder.edge_index)] = 1.0 if weight is None else weight
    s = torch.zeros(n_items, n_items)
    s[tuple(feedback)] = 1
    items = model.item_embedding.weight
    c = torch.zeros(n_items, n_items)
    c[tuple(cooccurrence_graph(model.interaction_encoder.edge_index, n_users, n_items, model.settings.knn_k))] = 1
    sparsity = r.any(1).sum() / (r > 0).sum()
    block = model.settings.eta_interaction * dense_normalized(s)
    block = block + sparsity * model.settings.structure_weight * dense_normalized(c)
    views, masks = [], [torch.ones(n_items, dtype=torch.bool)]

    for name, (x, mask) in model.item_features(dataset).items():
        knn = torch.zeros(n_items, n_items)
        knn[tuple(knn_graph(x, 10, mask))] = 1
        both = (mask[:, None] & mask[None]).float()
        eta = model.settings.eta_feature
        a = (1 - eta) * dense_normalized(knn) + eta * dense_normalized(s) * both
        h = F.normalize(x, dim=1) * mask[:, None] @ model.feature_encoders[name].projection.weight.T
        views.append((h + a @ h) / 2)
        masks.append(mask)
        block = block + model.settings.item_graph_weight * a / len(model.feature_encoders)

    nodes = torch.cat([model.user_embedding.weight, items])
    a = torch.zeros(len(nodes), len(nodes))
    a[:n_users, n_users:], a[n_users:, :n_users] = dense_normalized(r), dense_normalized(r).T
    a[n_users:, n_users:] = block
    users, first = ((nodes + a @ nodes + a @ a @ nodes + a @ a @ a @ nodes) / 4).split([n_users, n_items])
    views.insert(0, first)

    weight = model.kg_encoder.relation_log_weight.exp()
    n_relations = (len(weight) - 1) // 2
    a = torch.zeros(n_entities, n_entities)
    for head, relation, tail in dataset.triples.unique(dim=0).tolist():
        a[head, tail] += weight[relation - 1]
        a[tail, head] += weight[n_relations + relation - 1]
    a[:n_items, :n_items] += model.settings.eta_kg * weight[-1] * s
    used = dataset.triples[:, [0, 2]].unique()
    entities = torch.zeros(n_entities - n_items, items.shape[1])
    nodes = torch.cat(
        [items, entities.index_put((used[used >= n_items] - n_items,), model.kg_encoder.entity_embedding.weight)]
    )
    a = dense_normalized(a)
    views.append(((a @ nodes + a @ a @ nodes) / 2)[:n_items])
    masks.append(a[:n_items].sum(1) > 0)

    item_views, item_mask = torch.stack(views, 1), torch.stack(masks, 1)
    count = r @ item_mask.float()
    means = torch.einsum("ui,ivd->uvd", r, item_views) / count.where(count > 0, 1.0)[:, :, None]
    user_mask = count > 0
    user_mask[:, 0] = True
    return torch.cat([users[:, None], means[:, 1:]], 1), item_views, user_mask, item_mask


def dense_ranking_loss(dataset, user, pos, neg, scores, n_candidates):
    """The cross entropy of each row's positive item, picked one by one: see docs/method.md. ``scores [B, n_items]``."""
    known = set(zip(*(dataset.inter_feat[field].tolist() for field in ("user_id", "item_id")), strict=True))
    terms = []
    for row, own in enumerate(scores):
        sampled = [int(neg[(row + k) % len(neg)]) for k in range(min(n_candidates, len(neg)))]
        sampled = [item for item in sampled if (int(user[row]), item) not in known]
        terms.append(torch.logsumexp(own[[int(pos[row]), *sampled]], 0) - own[pos[row]])
    return torch.stack(terms)


@pytest.mark.parametrize("n_rows", [5, 1000], ids=["fewer rows than nodes", "more"])
@pytest.mark.parametrize(
    "n_candidates, contrasted", [(1, 2048), (4, 2048), (4, 3), (1000, 2048)], ids=["1", "4", "4, three rows", "all"]
)
def test_the_loss_and_its_gradients_are_those_of_the_plain_dense_formula(
    tiny, build, monkeypatch, n_candidates, contrasted, n_rows
):
    monkeypatch.setattr(slifmr, "CONTRASTED", contrasted)
    weights = {"inter_weight": 0.3, "intra_weight": 0.3, "reg_weight": 0.01}
    settings = {"n_candidates": n_candidates, "contrast_share": 0.0, **weights}
    run = build(tiny, kg_min_degree=1, kg_view="graph", linear_scale=0.0, **settings)
    model, dataset = run.model, run.train._dataset
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    model.refresh_graphs()
    batch = batch_of(run)[:n_rows]
    assert (2 * len(batch) < dataset.item_num) == (n_rows == 5)
    user, pos, neg = model.batch_ids(batch)
    users, items, user_mask, item_mask = dense_views(model, dataset, model.feedback_index)
    z_user = model.fuse(model.user_fusion, users, user_mask)[user]
    z_item = model.fuse(model.item_fusion, items, item_mask)
    interacting = dataset.inter_feat[model.USER_ID]
    reg_weight = 0.01 * len(interacting.unique()) / len(interacting)
    chosen = [0, 1, 2, 3]
    ranking = dense_ranking_loss(dataset, user, pos, neg, z_user @ z_item.T, n_candidates).mean()
    if n_candidates == 1:
        bpr = loss.bpr_loss((z_user * z_item[pos]).sum(1), (z_user * z_item[neg]).sum(1))
        torch.testing.assert_close(ranking, bpr)
    some = slice(contrasted)
    of, to = user[some], pos[some]
    expected = [
        ranking,
        0.3 * loss.inter_modal_loss(items[to], item_mask[to], z_item[to], to, "infonce", 0.2, 512),
        0.3
        * loss.intra_modal_loss(
            users[of][:, chosen],
            items[to][:, chosen],
            user_mask[of] & item_mask[to],
            to,
            (items[neg][:, chosen], item_mask[neg], neg),
            "infonce",
            0.2,
            512,
        ),
        reg_weight * loss.l2_loss(model.user_embedding(user), model.item_embedding(pos), model.item_embedding(neg)),
    ]
    actual = model.train().calculate_loss(batch)
    for term, dense in zip(actual, expected, strict=True):
        torch.testing.assert_close(term, dense)
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad(sum(actual), list(parameters.values()))
    for name, sparse, dense in zip(
        parameters, gradients, torch.autograd.grad(sum(expected), list(parameters.values())), strict=True
    ):
        torch.testing.assert_close(sparse, dense, rtol=1e-4, atol=1e-6, msg=name)


def test_loss_weights_scale_their_terms(tiny, build):
    terms = []
    for weight in (0.1, 0.3):
        run = build(tiny, inter_weight=weight, intra_weight=weight, reg_weight=weight)
        terms.append(run.model.calculate_loss(batch_of(run)))
    assert terms[0].ranking == terms[1].ranking
    for name in ("inter", "intra", "reg"):
        torch.testing.assert_close(3 * getattr(terms[0], name), getattr(terms[1], name))


def test_the_loss_compares_scores_with_the_linear_part_that_has_not_seen_the_user(tiny, build):
    run = build(tiny, n_candidates=1000)
    model, dataset = run.model, run.train._dataset
    batch = batch_of(run)
    user, pos, neg = model.batch_ids(batch)
    every = torch.arange(model.n_items).expand(model.n_users, -1)
    history = torch.from_numpy(model.linear.history.toarray()) > 0
    unseen = model.linear.leave_one_out(torch.arange(model.n_users), every, history)
    z_user, z_item = model()
    scores = z_user @ z_item.T + unseen
    trust = torch.sigmoid((unseen[user, pos] / model.linear.size - 0.5) / 0.5)
    terms = trust * dense_ranking_loss(dataset, user, pos, neg, scores[user], 1000)
    torch.testing.assert_close(model.train().calculate_loss(batch).ranking, terms.sum() / trust.sum())


def test_views_are_over_the_interactions_as_far_as_they_are_trusted(tiny, build):
    run = build(tiny, kg_min_degree=1, kg_view="graph", denoising=0.8)
    model = run.model
    model.refresh_graphs()
    users, items = model.interaction_encoder.edge_index
    unseen = model.linear.leave_one_out(users, items[:, None], torch.ones(1, 1, dtype=torch.bool)).squeeze(1)
    trust = 0.2 + 0.8 * torch.sigmoid((unseen / model.linear.size - 0.5) / 0.5)
    torch.testing.assert_close(model.interaction_encoder.edge_weight, trust)
    for view, dense in zip(model.encode(), dense_views(model, run.train._dataset, model.feedback_index), strict=True):
        torch.testing.assert_close(view, dense)
    for settings in ({"denoising": 0.0}, {"linear_scale": 0.0}):
        assert build(tiny, **settings).model.interaction_encoder.edge_weight is None


def test_interactions_at_random_are_trusted_less(build):
    """Of those that were added to the planted set most are."""
    toy = ROOT / "dataset_atomic" / "toy"
    clean = build(toy).model.interaction_encoder
    encoder = build(toy, noise={"interaction_add": 0.2}).model.interaction_encoder
    added = ~clean.contains(*encoder.edge_index)
    assert added.float().mean().item() == pytest.approx(0.2 / 1.2, rel=0.01)
    median = encoder.edge_weight[~added].median()
    assert (encoder.edge_weight[added] < median).float().mean() > 0.8


def test_a_score_is_the_inner_product_and_the_linear_part_of_all_interactions(tiny, build):
    run = build(tiny)
    model = run.model
    users, items = (part.detach() for part in model())
    linear = model.linear.scale * torch.from_numpy(model.linear.history.toarray()).float() @ model.linear.weights
    scores = users @ items.T + linear
    torch.testing.assert_close(all_scores(run)[:, 1:], scores[1:, 1:])
    pairs = {"user_id": torch.tensor([1, 2, 2]), "item_id": torch.tensor([3, 1, 4])}
    torch.testing.assert_close(model.predict(pairs), scores[pairs["user_id"], pairs["item_id"]])
    without = build(tiny, linear_scale=0.0)
    assert without.model.linear is None
    assert not torch.allclose(all_scores(without)[:, 1:], scores[1:, 1:])


def test_with_more_items_than_a_matrix_has_room_for_the_linear_branch_has_neighbours(tiny, build):
    dense, sparse = build(tiny, linear_max_items=100), build(tiny, linear_max_items=5)
    assert isinstance(dense.model.linear.weights, torch.Tensor)
    assert not isinstance(sparse.model.linear.weights, torch.Tensor)
    torch.testing.assert_close(all_scores(sparse)[:, 1:], all_scores(dense)[:, 1:], rtol=1e-4, atol=1e-4)
    batch = batch_of(dense)
    for term, same in zip(sparse.model.calculate_loss(batch), dense.model.calculate_loss(batch), strict=True):
        torch.testing.assert_close(term, same, rtol=1e-4, atol=1e-4)


def test_the_memory_of_the_linear_branch_is_that_of_solving_and_of_what_it_reads(tiny, build):
    run = build(tiny)
    settings, data = run.model.settings, run.train._dataset

    def estimate(**changes):
        return run.model.memory_parts(replace(settings, **changes), data, 0)["linear branch"]

    n_numbers = sum(features.values.numel() for features in data.item_features.values())
    nothing = estimate(linear_feature_weight=0.0, linear_kg_weight=0.0)
    assert nothing == run.model.linear.solver.estimate_memory(data.item_num, 1)
    assert estimate(linear_kg_weight=0.0) - nothing == 8 * n_numbers
    assert estimate(linear_feature_weight=0.0) - nothing == 100 * len(data.triples)


def test_the_additions_for_sparse_data_count_less_with_more_interactions_per_user(tiny, build):
    settings = {"linear_scale": 3.0, "structure_weight": 0.4}
    users = build(tiny).train._dataset.inter_feat["user_id"]
    per_user = len(users) / len(users.unique())
    for dense_at in (0.0, 1.1 * per_user):
        run = build(tiny, **settings, dense_at=dense_at)
        model = run.model
        known = torch.zeros(model.n_users, model.n_items, dtype=torch.bool)
        known[tuple(model.training_interactions(run.train._dataset))] = True
        items = torch.arange(model.n_items).expand(model.n_users, -1)
        scores = model.linear.leave_one_out(torch.arange(model.n_users), items, known)[1:, 1:]
        assert scores[~known[1:, 1:]].std(correction=0).item() == pytest.approx(3.0 / per_user, rel=1e-3)
        assert model.structure_weight == pytest.approx(0.4 / per_user)
    for dense_at in (per_user, per_user / 2):
        model = build(tiny, **settings, dense_at=dense_at).model
        assert model.linear is None and model.structure_weight == 0


def test_items_that_share_most_users_are_linked_in_the_interaction_graph(tiny, build):
    others = {"item_graph_weight": 0.0, "eta_interaction": 0.0, "dense_at": 0.0, "knn_k": 2}
    assert build(tiny, **others, structure_weight=0.0).model.interaction_encoder.item_block is None
    run = build(tiny, **others, structure_weight=0.3)
    block = run.model.interaction_encoder.item_block.edges()
    expected = cooccurrence_graph(run.model.interaction_encoder.edge_index, run.model.n_users, run.model.n_items, 2)
    degree = torch.bincount(expected[0], minlength=run.model.n_items).float()
    torch.testing.assert_close(block.edge_index, expected)
    weight = run.model.structure_weight / (degree[expected[0]] * degree[expected[1]]).sqrt()
    torch.testing.assert_close(block.edge_weight, weight)


def test_tags_of_the_knowledge_graph_are_a_view_of_their_own(tiny, build):
    assert build(tiny, kg_view="tags").model.view_names[-1] == KG_TAGS
    assert build(tiny, kg_view="graph").model.view_names[-1] == "kg"
    assert build(tiny, kg_view="both").model.view_names[-2:] == [KG_TAGS, "kg"]
    assert not {KG_TAGS, "kg"} & set(build(tiny, kg_view="none").model.view_names)
    assert not {KG_TAGS, "kg"} & set(build(tiny, use_kg=False).model.view_names)


def test_items_of_rare_tags_have_no_neighbours_but_those_with_the_same(tiny, build, monkeypatch):
    tokens = [f"i{i}" for i in range(14)]
    write_table(tiny / "tiny.link", "item_id:token\tentity_id:token", [(token, f"e{token}") for token in tokens])
    triples = [(f"e{token}", "brand", f"b{i // 2}") for i, token in enumerate(tokens)]
    write_table(tiny / "tiny.kg", "head_id:token\trelation_id:token\ttail_id:token", triples)
    monkeypatch.setattr(fused, "MOST_TAG_NUMBERS", 2)  # fewer than brands
    run = build(tiny, knn_k=5)
    ids = run.dataset.token2id(run.dataset.iid_field, tokens)
    pairs = {(int(a), int(b)) for a, b in ids.reshape(-1, 2)}
    edges = run.model.feature_encoders[KG_TAGS].graph.edges().edge_index
    assert set(zip(*edges.tolist(), strict=True)) == pairs | {(b, a) for a, b in pairs}


# -- graphs --------------------------------------------------------------------------------------------------


def test_refresh_links_the_nearest_fused_items_in_all_three_graphs(tiny, build):
    run = build(tiny, refresh_k=2, kg_view="both")
    model = run.model
    with torch.no_grad():
        model.eval()
        z = model()[1]
    expected = knn_graph(z[1:], 2) + 1  # the padding item is left out
    stats = model.refresh_graphs()
    assert torch.equal(model.feedback_index, expected)
    assert stats.edges == expected.shape[1] and stats.turnover == 1.0
    assert torch.equal(model.kg_encoder.feedback.edges().edge_index, expected)
    mask = model.feature_encoders["text"].mask
    both = mask[expected[0]] & mask[expected[1]]
    assert torch.equal(model.feature_encoders["text"].feedback.edges().edge_index, expected[:, both])
    block = model.interaction_encoder.item_block.edges().edge_index
    parts = [
        expected,
        model.structure.edge_index,
        *(encoder.edges().edge_index for encoder in model.feature_encoders.values()),
    ]
    assert torch.equal(block, unique_edges(torch.cat(parts, dim=1), model.n_items))
    assert not (model.feedback_index == 0).any()


@pytest.mark.parametrize("off", ["interaction", "feature", "kg"])
def test_each_eta_switches_its_graph_off(tiny, build, off):
    run = build(tiny, item_graph_weight=0.0, structure_weight=0.0, kg_view="both", **{f"eta_{off}": 0.0})
    encoder = {
        "interaction": run.model.interaction_encoder,
        "feature": run.model.feature_encoders["text"],
        "kg": run.model.kg_encoder,
    }[off]
    ego = run.model.item_embedding.weight
    arguments = (run.model.user_embedding.weight, ego) if off == "interaction" else (ego,)
    before = encoder(*arguments)
    scores = all_scores(run)
    run.model.refresh_graphs()
    after = encoder(*arguments)
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert not torch.equal(all_scores(run), scores), "the other two graphs did change"


def test_refresh_touches_neither_parameters_nor_random_states(tiny, build):
    run = build(tiny)
    parameters = {name: value.clone() for name, value in run.model.state_dict().items()}
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    run.model.train()
    run.model.refresh_graphs()
    assert run.model.training
    assert torch.equal(torch.get_rng_state(), torch_state)
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_state)
    for name, value in run.model.state_dict().items():
        assert torch.equal(value, parameters[name])
    assert all(p.grad is None for p in run.model.parameters())


def test_pruning_is_redrawn_and_spares_evaluation(tiny, build):
    run = build(tiny, prune_ratio=0.3)
    scores = all_scores(run)
    run.model.prune_interactions(1)
    first = run.model.interaction_encoder.kept
    assert torch.equal(all_scores(run), scores)
    run.model.prune_interactions(2)
    assert not torch.equal(run.model.interaction_encoder.kept, first)
    run.model.prune_interactions(1)
    assert torch.equal(run.model.interaction_encoder.kept, first)


def test_the_approximate_search_without_faiss_is_refused_and_says_what_to_install(tiny, build, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(SettingError, match="knn_search: approximate needs FAISS: pip install faiss-cpu"):
        build(tiny, knn_search="approximate")


# -- prediction and diagnostics ------------------------------------------------------------------------------


def test_final_embeddings_are_cached_until_training_refreshing_or_loading(tiny, build):
    run = build(tiny)
    model = run.model
    clear = {
        "training": lambda: model.calculate_loss(batch_of(run)),
        "refreshing": model.refresh_graphs,
        "loading parameters": lambda: model.load_state_dict(model.state_dict()),
        "loading graphs": lambda: model.load_other_parameter(model.other_parameter()),
    }
    for name, action in clear.items():
        first = model._final_embeddings()
        assert model._final_embeddings() is first, "cached"
        action()
        assert model._final is None, name


def test_diagnostics_by_hand(tiny, build):
    run = build(tiny, kg_view="graph")
    with torch.no_grad():
        for encoder in run.model.feature_encoders.values():
            encoder.projection.weight.zero_()
        # one direction for everything the other views see
        for embedding in (run.model.item_embedding, run.model.user_embedding, run.model.kg_encoder.entity_embedding):
            embedding.weight.fill_(1.0)
    report = run.model.diagnostics()
    # of 4 views two are parallel and two are zero: 2 of 12 ordered pairs have cosine 1, for 13 items; item i1 has no
    # features: 2 of 2; item i0 has no entity: 0 of 6
    assert report["homogenisation"] == pytest.approx((13 * 2 + 2) / (13 * 12 + 2 + 6), abs=1e-5)
    assert report["smoothing"] == pytest.approx(1.0, abs=1e-5)


def test_printing_the_model_shows_the_sizes_of_its_graphs(tiny, build):
    assert "21 x 16" in str(build(tiny).model) and "entries" in str(build(tiny).model)


# -- batches -------------------------------------------------------------------------------------------------


def test_a_batch_in_parts_is_the_mean_of_the_parts(tiny, build, monkeypatch):
    run = build(tiny, kg_view="both", n_candidates=2, inter_weight=0.2, train_batch_size=1000)
    model, batch = run.model.train(), batch_of(run)
    n_rows = len(batch["user_id"])
    size = -(-n_rows // 3)
    parts = [batch[start : start + size] for start in range(0, n_rows, size)]
    terms = [torch.stack(model.calculate_loss(part)) * len(part["user_id"]) / n_rows for part in parts]
    expected, parameters = torch.stack(terms).sum(0), list(model.parameters())
    monkeypatch.setattr(slifmr, "PART", size)
    actual = torch.stack(model.calculate_loss(batch))
    torch.testing.assert_close(actual, expected)
    gradients = [torch.autograd.grad(loss.sum(), parameters, allow_unused=True) for loss in (actual, expected)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


def test_parts_may_give_gradients_that_are_shared_or_expanded():
    a, b = (torch.arange(3.0).requires_grad_() for _ in range(2))

    def terms(inputs, part):
        return torch.stack([((inputs[0] + b) * part).sum(), inputs[0].sum()])

    total = sum_over_parts(terms, [1.0, 2.0, 4.0], [a], [b])
    torch.testing.assert_close(total.detach(), torch.tensor([42.0, 9.0]))
    total.sum().backward()
    assert a.grad.tolist() == [10.0] * 3 and b.grad.tolist() == [7.0] * 3
    with torch.no_grad():
        torch.testing.assert_close(sum_over_parts(terms, [1.0, 2.0, 4.0], [a], [b]), torch.tensor([42.0, 9.0]))


def test_features_too_large_to_average_ahead_give_the_same_loss(tiny, build, monkeypatch):
    model, batch = (run := build(tiny)).model.train(), batch_of(run)
    ahead = torch.stack(model.calculate_loss(batch))
    assert all(feature.user_features is not None for feature in model.feature_encoders.values())
    monkeypatch.setattr(encoder, "MOST_AHEAD", 0)
    model = (run := build(tiny)).model.train()
    torch.testing.assert_close(torch.stack(model.calculate_loss(batch)), ahead)
    assert all(feature.user_features is None for feature in model.feature_encoders.values())


@pytest.mark.parametrize("n, size", [(100, 2048), (100_000, 6250), (10**7, 625_000)])
def test_the_batch_follows_the_data_where_it_is_left_to_it(tiny, n, size):
    config = make_config("SLIFMR", "tiny", settings={"data_path": str(tiny.parent)})
    assert config["train_batch_size"] == "auto"
    choose_batch_size(config, n)
    assert config["train_batch_size"] == size
    given = make_config("SLIFMR", "tiny", settings={"data_path": str(tiny.parent), "train_batch_size": 7})
    choose_batch_size(given, n)
    assert given["train_batch_size"] == 7


def test_loaders_have_the_batch_that_follows_the_data(tiny, build):
    run = build(tiny, train_batch_size="auto")
    assert run.train.step == run.trainer.config["train_batch_size"] == 2048
    for value in ("automatic", 0.5):
        with pytest.raises(SettingError, match="train_batch_size must be a whole number"):
            build(tiny, train_batch_size=value)


@pytest.mark.parametrize("n_rows, rows", [(100, 100), (4000, 2048), (10000, 2500)])
def test_the_contrast_is_over_a_share_of_a_batch_but_over_no_few_rows(n_rows, rows):
    assert slifmr.contrast_rows(n_rows, 0.25) == rows
    assert slifmr.contrast_rows(n_rows, 1.0) == n_rows
