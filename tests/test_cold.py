"""Items held out of training: the split, the training negatives, what each model makes of them, their metrics."""

import warnings

import numpy as np
import pytest
import recbole.data.utils
import torch
from conftest import all_scores
from recbole.data.dataset import KnowledgeBasedDataset

from recbole_slifmr.data.cold import can_score_cold, choose_items, is_cold
from recbole_slifmr.data.dataset import SLIFMRDataset
from recbole_slifmr.errors import DataError, SettingError, UnknownSettingWarning
from recbole_slifmr.host.settings import make_config
from recbole_slifmr.paths import DATASETS, ROOT
from recbole_slifmr.training.evaluation import evaluate
from recbole_slifmr.training.experiment import fingerprint, load_data

FEATURE_MODELS = ("SLIFMR", "LATTICE", "FREEDOM", "VBPR", "MSCA", "MGCN", "SMORE")
KG_MODELS = ("LightKG", "AdaKG")


def pairs_of(loader):
    feat = loader._dataset.inter_feat
    return set(zip(feat["user_id"].tolist(), feat["item_id"].tolist(), strict=True))


@pytest.fixture(params=["random", "fixed"])
def loaders(request, tiny):
    """Return a function from settings to the three loaders, over a random split or the fixed one of ``toy``."""

    def make(model="SLIFMR", split_seed=7, **settings):
        where = ("tiny", {"data_path": str(tiny.parent)}) if request.param == "random" else ("toy", {})
        config = make_config(model, where[0], settings={"state": "ERROR", "topk": [5], **where[1], **settings})
        return load_data(config, split_seed)

    return make


# -- the split -------------------------------------------------------------------------------------------------------


def test_only_the_training_interactions_of_cold_items_move(loaders):
    before, after = loaders(), loaders(cold_items=0.2)
    untrained = is_cold(before[0]._dataset)
    cold = set((is_cold(after[0]._dataset) & ~untrained).nonzero().flatten().tolist())
    n_items = after[0]._dataset.item_num - 1
    assert 0 < len(cold) <= round(0.2 * n_items)
    train, valid, test = (pairs_of(loader) for loader in after)
    old_train, old_valid, old_test = (pairs_of(loader) for loader in before)
    assert train == {pair for pair in old_train if pair[1] not in cold}
    assert old_valid <= valid and old_test <= test
    moved_to_valid, moved_to_test = valid - old_valid, test - old_test
    assert moved_to_valid | moved_to_test == old_train - train and not moved_to_valid & moved_to_test
    for item in cold:
        counts = [sum(pair[1] == item for pair in moved) for moved in (moved_to_valid, moved_to_test)]
        assert abs(counts[0] - counts[1]) <= 1


def test_the_split_is_that_of_its_seed_for_every_model_and_training_seed(loaders):
    prints = [
        [fingerprint(loader) for loader in loaders(model, cold_items=0.2, seed=seed)]
        for model, seed in (("SLIFMR", 1), ("SLIFMR", 2), ("LightGCN", 1), ("KGAT", 1), ("VBPR", 3))
    ]
    assert all(found == prints[0] for found in prints)
    assert [fingerprint(loader) for loader in loaders(split_seed=8, cold_items=0.2)] != prints[0]


def test_items_are_chosen_uniformly_among_those_with_interactions():
    items = np.array([2, 2, 5, 7, 9, 9, 9, 11])
    drawn = np.array([choose_items(items, 0.4, seed) for seed in range(500)])
    assert drawn.shape == (500, 2) and set(np.unique(drawn)) == {2, 5, 7, 9, 11}
    assert np.bincount(drawn.ravel())[[2, 5, 7, 9, 11]].min() > 150  # 200 expected
    assert len(choose_items(items, 0.01, 0)) == 1


@pytest.mark.parametrize("share", [-0.1, 1.0, 0.99, "many", True], ids=str)
def test_a_share_that_cannot_be_is_named(tiny, build, share):
    with pytest.raises(SettingError, match="cold_items"):
        build(tiny, cold_items=share)


def test_it_is_a_setting_of_recbole_s_models_too():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnknownSettingWarning)
        assert make_config("LightGCN", "toy", settings={"cold_items": 0.2})["cold_items"] == 0.2


@pytest.mark.parametrize("model", ["SLIFMR", "VBPR"])
def test_without_cold_items_nothing_changes(tiny, build, monkeypatch, model):
    """Not a bit of a trained model, though some items have no training interactions."""
    settings = {"eval_args": {"split": {"RS": [0.1, 0.4, 0.5]}, "order": "RO", "group_by": "none", "mode": "full"}}
    ours = build(tiny, model, **settings)
    assert is_cold(ours.train._dataset).any()
    ours.trainer.fit(ours.train, ours.valid, show_progress=False)
    monkeypatch.setattr(SLIFMRDataset, "build", KnowledgeBasedDataset.build)
    monkeypatch.setattr(recbole.data.utils, "create_samplers", recbole.data.utils.create_samplers.__wrapped__)
    plain = build(tiny, model, **settings)
    monkeypatch.setattr(plain.model, "known", lambda embedding, items=None: embedding)
    plain.trainer.fit(plain.train, plain.valid, show_progress=False)
    for name, value in plain.model.state_dict().items():
        assert torch.equal(value, ours.model.state_dict()[name]), name
    assert torch.equal(all_scores(plain), all_scores(ours))


# -- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("distribution", ["uniform", "popularity"])
def test_training_negatives_are_warm(tiny, build, distribution):
    arguments = {"distribution": distribution, "sample_num": 1, "alpha": 1.0, "dynamic": False, "candidate_num": 0}
    run = build(tiny, "BPR", cold_items=0.4, train_neg_sample_args=arguments)
    cold = is_cold(run.train._dataset)
    drawn = torch.cat([batch["neg_item_id"] for _ in range(10) for batch in run.train])
    assert set(drawn.tolist()) == set((~cold).nonzero().flatten().tolist()) - {0}


def test_a_user_with_every_warm_item_is_named(tiny, build):
    with pytest.raises(DataError, match="hold out fewer"):
        build(tiny, "BPR", cold_items=0.9)


# -- the models ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [*FEATURE_MODELS, *KG_MODELS])
def test_a_cold_item_s_own_embedding_counts_for_nothing(tiny, build, model):
    run = build(tiny, model, cold_items=0.4)
    run.trainer.fit(run.train, run.valid, show_progress=False)
    cold = is_cold(run.train._dataset)
    before = all_scores(run)
    with torch.no_grad():
        run.model.item_embedding.weight[cold] += 10
    run.model.clear_cache()
    assert torch.equal(all_scores(run), before)
    known = torch.isin(torch.arange(len(cold)), run.dataset.triples)
    if model in FEATURE_MODELS:
        known = run.dataset.item_features["text"].mask
    known &= cold
    assert before[:, known].std(dim=1).min() > 0  # and yet they are told apart


def test_slifmr_lends_a_cold_item_the_interactions_of_its_warm_neighbours(tiny, build):
    run = build(tiny, cold_items=0.4, modalities={"text": "text.npy"}, knn_k=3, kg_view="graph")
    cold = is_cold(run.train._dataset)
    run.model.eval()
    views = run.model.encode()
    values, mask = run.dataset.item_features["text"]
    unit = torch.nn.functional.normalize(values, dim=1)
    cosine = (unit @ unit.T).fill_diagonal_(-1)
    near = torch.zeros(cosine.shape, dtype=torch.bool).scatter_(1, cosine.topk(3, dim=1).indices, True)
    near = (near & (cosine > 0) & mask & mask[:, None]).float()
    near = ((near + near.T) > 0).float()
    degree = near.sum(1).clamp(min=1)
    weight = near / (degree[:, None] * degree).sqrt() * ~cold
    expected = weight @ views.items[:, 0] / weight.sum(1, keepdim=True).clamp(min=1e-12)
    torch.testing.assert_close(views.items[cold, 0], expected[cold])
    assert torch.equal(views.item_mask[:, 0], ~cold | (weight.sum(1) > 0))


def test_slifmr_without_features_sees_no_interactions_of_a_cold_item(tiny, build):
    run = build(tiny, cold_items=0.4, use_features=False, kg_view="graph")
    run.model.refresh_graphs()
    cold = is_cold(run.train._dataset)
    views = run.model.encode()
    assert torch.equal(views.item_mask[:, 0], ~cold) and not views.items[cold, 0].any()


def test_who_can_score_cold_items():
    for model in (*FEATURE_MODELS, *KG_MODELS, "KGAT", "CKE"):
        assert can_score_cold(make_config(model, "toy")).possible
    for model in ("LightGCN", "BPR", "EASE", "BM3", "XSimGCL", "IALS"):
        possible, reason = can_score_cold(make_config(model, "toy"))
        assert not possible and reason.startswith(f"{model} ") and "interactions" in reason
    bare = make_config("SLIFMR", "toy", settings={"use_kg": False, "use_features": False})
    assert not can_score_cold(bare).possible


@pytest.mark.slow
def test_slifmr_finds_planted_taste_in_cold_items(build):
    run = build(
        ROOT / DATASETS / "toy", cold_items=0.2, epochs=3, train_batch_size=512, topk=[5], valid_metric="Recall@5"
    )
    run.trainer.fit(run.train, run.valid, show_progress=False)
    metrics, _ = evaluate(run.trainer, run.valid, run.train)
    assert metrics["recall@5/among_cold"] > 2 * 5 / 32  # twice chance: 32 items are cold


# -- the metrics -----------------------------------------------------------------------------------------------------


def test_metrics_of_cold_and_warm_items_by_hand(tiny, build):
    run = build(tiny, cold_items=0.4, topk=[3], valid_metric="Recall@3")
    run.trainer.fit(run.train, run.valid, show_progress=False)
    metrics, per_user = evaluate(run.trainer, run.test, run.train)
    cold = set(is_cold(run.train._dataset).nonzero().flatten().tolist())
    warm = set(range(1, 16)) - cold
    scores = all_scores(run)
    scores[:, 0] = -torch.inf
    for user, item in pairs_of(run.train) | pairs_of(run.valid):
        scores[user - 1, item] = -torch.inf
    expected = {"cold": [], "warm": [], "among_cold": []}
    gains = {name: [] for name in expected}
    for user in {user for user, _ in pairs_of(run.test)}:
        order = sorted(range(16), key=lambda i: -scores[user - 1, i])
        for name, ranked, group in (
            ("cold", order, cold),
            ("warm", order, warm),
            ("among_cold", [i for i in order if i in cold], cold),
        ):
            wanted = {item for u, item in pairs_of(run.test) if u == user} & group
            if wanted:
                ranks = [rank for rank, item in enumerate(ranked[:3]) if item in wanted]
                expected[name].append(len(ranks) / len(wanted))
                ideal = sum(1 / np.log2(rank + 2) for rank in range(min(len(wanted), 3)))
                gains[name].append(sum(1 / np.log2(rank + 2) for rank in ranks) / ideal)
    for name in expected:
        assert metrics[f"recall@3/{name}"] == pytest.approx(np.mean(expected[name]))
        assert metrics[f"ndcg@3/{name}"] == pytest.approx(np.mean(gains[name]))
    assert metrics["recall@3"] == pytest.approx(per_user["recall@3"].mean(), abs=1e-4)


def test_a_model_that_cannot_score_cold_items_says_so(tiny, build, caplog):
    run = build(tiny, "LightGCN", cold_items=0.4)
    run.trainer.fit(run.train, run.valid, show_progress=False)
    with caplog.at_level("INFO"):
        metrics, _ = evaluate(run.trainer, run.test, run.train)
    assert "LightGCN knows items by their interactions only" in caplog.text
    assert all(
        np.isnan(metrics[f"{name}@5/{group}"]) for name in ("recall", "ndcg") for group in ("cold", "among_cold")
    )
    assert 0 <= metrics["recall@5/warm"] <= 1


def test_without_cold_items_there_are_no_such_metrics(tiny, build):
    run = build(tiny, "VBPR")
    run.trainer.fit(run.train, run.valid, show_progress=False)
    assert not [name for name in evaluate(run.trainer, run.test, run.train)[0] if name.endswith(("cold", "warm"))]
