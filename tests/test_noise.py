"""Noise in the training inputs: exact, nested, the same for every model, and nowhere else."""

import warnings

import numpy as np
import pytest
import torch
from conftest import QUIET, write_table
from recbole.data import create_dataset

from recbole_slifmr.data.noise import KINDS, Noise, draw_interactions, drop_interactions, reads
from recbole_slifmr.errors import SettingError, UnknownSettingWarning
from recbole_slifmr.host.settings import make_config
from recbole_slifmr.study import runs
from recbole_slifmr.training.experiment import load_data, prepare


def config_of(folder, noise, model="SLIFMR", **settings):
    settings = {**QUIET, "data_path": str(folder.parent), "noise": noise, **settings}
    return make_config(model, folder.name, settings=settings)


def load(folder, noise, model="SLIFMR", **settings):
    """Return the training, validation and test splits, as data sets."""
    return [loader._dataset for loader in load_data(config_of(folder, noise, model, **settings))]


def pairs(data):
    users, items = (data.field2id_token[f][data.inter_feat[f].numpy()] for f in ("user_id", "item_id"))
    return sorted(zip(users.tolist(), items.tolist(), strict=True))


def triples(data):
    heads, relations, tails = data.triples.T.numpy()
    tokens, names = data.field2id_token["entity_id"], data.field2id_token["relation_id"]
    return [(str(tokens[h]), str(names[r]), str(tokens[t])) for h, r, t in zip(heads, relations, tails, strict=True)]


EVERYTHING = {
    **{kind: 0.3 for kind in KINDS},
    "interaction_drop": 0.2,
}


# -- the splits, ids and generators of the rest ----------------------------------------------------------------------


@pytest.mark.parametrize("model", ["SLIFMR", "LightGCN", "KGAT", "LATTICE"])
def test_every_model_gets_the_same_noise_and_clean_validation_and_test(tiny, model):
    clean, noisy = load(tiny, {}, model), load(tiny, EVERYTHING, model)
    assert pairs(noisy[0]) == pairs(load(tiny, EVERYTHING)[0]) != pairs(clean[0])
    assert [pairs(part) for part in noisy[1:]] == [pairs(part) for part in clean[1:]]
    for field in ("user_id", "item_id", "relation_id"):
        assert list(noisy[0].field2id_token[field]) == list(clean[0].field2id_token[field])


@pytest.mark.parametrize("model", ["SLIFMR", "LightGCN", "KGAT", "LATTICE"])
def test_noise_touches_nothing_else_that_is_random(tiny, model):
    noise = {**EVERYTHING, "kg_tail": 0, "kg_drop": 0} if model == "SLIFMR" else EVERYTHING  # they change its entities
    states, parameters = [], []
    start = {"embedding_start": "random"} if model == "SLIFMR" else {}  # the other one is computed from interactions
    for setting in ({}, noise):
        config = config_of(tiny, setting, model, **start)
        load_data(config)
        states.append((torch.get_rng_state(), np.random.get_state()[1]))
        parameters.append(dict(prepare(config).trainer.model.named_parameters()))
    assert torch.equal(states[0][0], states[1][0]) and np.array_equal(states[0][1], states[1][1])
    assert parameters[0].keys() == parameters[1].keys()
    for name, value in parameters[0].items():
        assert torch.equal(value, parameters[1][name]), name


@pytest.mark.parametrize("model", ["LightGCN", "KGAT", "SLIFMR"])
def test_every_model_accepts_the_setting(tiny, model):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnknownSettingWarning)
        assert config_of(tiny, {"interaction_add": 0.1}, model)["noise"] == {"interaction_add": 0.1}


def test_the_seed_is_the_run_s_unless_noise_has_its_own(tiny):
    def train(noise, seed):  # the split is given, so that the run's seed changes nothing but the noise
        config = config_of(tiny, noise, seed=seed)
        return pairs(load_data(config, split_seed=1)[0]._dataset)

    assert train({"interaction_add": 0.3}, 1) != train({"interaction_add": 0.3}, 2)
    assert train({"interaction_add": 0.3, "seed": 5}, 1) == train({"interaction_add": 0.3, "seed": 5}, 2)
    assert train({"interaction_add": 0.3, "seed": 1}, 2) == train({"interaction_add": 0.3}, 1)


def test_kinds_do_not_disturb_each_other(tiny):
    clean = set(pairs(load(tiny, {})[0]))
    alone = set(pairs(load(tiny, {"interaction_add": 0.3})[0])) - clean
    assert set(pairs(load(tiny, {"interaction_add": 0.3, "interaction_drop": 0.2})[0])) - clean == alone


def test_a_modality_gets_the_same_noise_whatever_else_is_read(tiny):
    alone = load(tiny, {"feature_swap": 0.5}, modalities={"text": "text.npy"})[0].item_features["text"]
    assert torch.equal(load(tiny, {"feature_swap": 0.5})[0].item_features["text"].values, alone.values)


def test_a_saved_data_set_is_not_used_for_other_noise(tiny):
    settings = {"save_dataset": True}
    create_dataset(config_of(tiny, {}, **settings))
    assert len(create_dataset(config_of(tiny, {"kg_drop": 0.5}, **settings)).triples) == 8


def test_runs_of_several_seeds_share_validation_and_test(tiny):
    settings = {**QUIET, "epochs": 1, "data_path": str(tiny.parent), "noise": {"interaction_add": 0.3}}
    tasks = [runs.Task("BPR", seed, "tiny", tiny.parent / f"run{seed}", settings=settings) for seed in (1, 2)]
    for task in tasks:
        runs.run_task(task)
    assert len(runs.collect(tasks)[0]) == 2
    one, other = (runs.read_result(task)["fingerprints"] for task in tasks)
    assert one["train"] != other["train"] and one["test"] == other["test"]


# -- interactions ----------------------------------------------------------------------------------------------------


def test_added_interactions_are_exact_new_and_nested(tiny):
    clean = load(tiny, {})
    known, n = {pair for part in clean for pair in pairs(part)}, len(clean[0].inter_feat)
    before = set()
    for level in (0.1, 0.2, 0.5):
        noisy = pairs(load(tiny, {"interaction_add": level})[0])
        added = set(noisy) - known
        assert len(noisy) == n + round(level * n) and len(added) == round(level * n)
        assert before < added
        before = added


def test_added_interactions_are_uniform_over_the_free_pairs():
    """10 users and 20 items; a quarter of the pairs is known."""
    users, items = (ids.ravel() for ids in np.meshgrid(np.arange(1, 11), np.arange(1, 6), indexing="ij"))
    counts = np.zeros((11, 21))
    for seed in range(300):
        u, i, donors = draw_interactions(Noise({"interaction_add": 1.0}, seed), 50, users, items, 11, 21)
        np.add.at(counts, (u, i), 1)
        assert len(set(zip(u.tolist(), i.tolist(), strict=True))) == 50 and donors.max() < 50
    free = counts[1:, 6:]
    assert counts.sum() == free.sum() == 300 * 50
    assert abs(free - 100).max() < 5 * np.sqrt(100 * 2 / 3)  # each is drawn a third of the time


def test_pairs_of_more_users_and_items_than_32_bits_tell_apart():
    """200,000 x 60,000 pairs: a product in 32 bits would take new pairs for known ones, and the other way round."""
    users, items = np.arange(1, 200_001, dtype=np.int32), (np.arange(200_000, dtype=np.int32) * 7 % 60_000) + 1
    new = draw_interactions(Noise({"interaction_add": 0.5}, 0), 200_000, users, items, 200_001, 60_001)[:2]
    added = set(zip(*(part.tolist() for part in new), strict=True))
    assert len(added) == 100_000 and not added & set(zip(users.tolist(), items.tolist(), strict=True))
    assert max(user for user, _ in added) > 199_900 and max(item for _, item in added) > 59_900


def test_dropped_interactions_are_exact_nested_and_leave_everyone_something(tiny):
    clean = load(tiny, {})[0]
    n, users, items = len(clean.inter_feat), *(set(ids) for ids in zip(*pairs(clean), strict=True))
    before = set(pairs(clean))
    for level in (0.1, 0.4, 0.7):
        noisy = pairs(load(tiny, {"interaction_drop": level})[0])
        assert len(noisy) == n - round(level * n)
        assert set(noisy) < before
        assert {user for user, _ in noisy} == users and {item for _, item in noisy} == items
        before = set(noisy)


def test_dropping_goes_in_random_order_and_refuses_only_the_last_of_a_user_or_item():
    """The definition, one interaction after the other."""
    rng = np.random.default_rng(0)
    users, items = rng.integers(1, 30, 120), rng.integers(1, 25, 120)
    kept = np.ones(120, dtype=bool)
    order = Noise({"interaction_drop": 0.5}, 7).generator("interaction_drop").permutation(120)
    for place in order:
        if (users[kept] == users[place]).sum() > 1 and (items[kept] == items[place]).sum() > 1:
            kept[place] = False
    most = (120 - kept.sum()) / 120
    np.testing.assert_array_equal(drop_interactions(Noise({"interaction_drop": most}, 7), users, items), kept)
    with pytest.raises(SettingError, match=f"only {120 - kept.sum()} can go with one left for every user and item"):
        drop_interactions(Noise({"interaction_drop": most + 0.01}, 7), users, items)


def test_other_columns_of_an_added_interaction_are_those_of_a_training_interaction(tiny):
    lines = (tiny / "tiny.inter").read_text().splitlines()[1:]
    rows = [(*line.split("\t"), 1 + n % 5, 1000 + n % 5) for n, line in enumerate(lines)]
    write_table(tiny / "tiny.inter", "user_id:token\titem_id:token\trating:float\ttimestamp:float", rows)
    load_col = {"inter": ["user_id", "item_id", "rating", "timestamp"]}
    data = load(tiny, {"interaction_add": 0.5}, load_col=load_col)[0].inter_feat
    n = len(load(tiny, {}, load_col=load_col)[0].inter_feat)
    assert len(data) == n + round(n / 2)
    assert set(zip(data["rating"].tolist(), data["timestamp"].tolist(), strict=True)) == {
        (1.0 + n, 1000.0 + n) for n in range(5)
    }


def test_added_interactions_reach_propagation_negatives_and_masks(tiny):
    noisy = load_data(config_of(tiny, {"interaction_add": 0.5}, "LightGCN"))
    clean = load_data(config_of(tiny, {}, "LightGCN"))
    added = set(pairs(noisy[0]._dataset)) - set(pairs(clean[0]._dataset))
    assert added
    matrix = noisy[0]._dataset.inter_matrix(form="csr")
    ids = noisy[0]._dataset.field2token_id
    for user, item in added:
        u, i = ids["user_id"][user], ids["item_id"][item]
        assert matrix[u, i] == 1
        assert i in noisy[0]._sampler.used_ids[u]
        assert i in noisy[2].uid2history_item[u] and i not in clean[2].uid2history_item[u]


# -- features --------------------------------------------------------------------------------------------------------


def modality(folder, noise, name="text"):
    values, mask = load(folder, noise)[0].item_features[name]
    return values.numpy(), mask.numpy()


def test_gaussian_noise_has_the_scale_of_each_dimension(tiny):
    rows = np.random.default_rng(0).normal(size=(15, 4000)) * np.repeat([1, 100], 2000)
    np.save(tiny / "text.npy", rows.astype(np.float32))
    clean, mask = modality(tiny, {})
    noisy, after = modality(tiny, {"feature_gaussian": 0.5})
    relative = ((noisy - clean) / clean[mask].std(axis=0))[mask]
    assert relative[:, :2000].std() == pytest.approx(0.5, rel=0.02)
    assert relative[:, 2000:].std() == pytest.approx(0.5, rel=0.02)
    assert np.array_equal(mask, after) and not noisy[~mask].any()
    half = modality(tiny, {"feature_gaussian": 0.25})[0]
    np.testing.assert_allclose(noisy - clean, 2 * (half - clean), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("kind", ["feature_swap", "feature_random", "feature_missing"])
def test_as_many_rows_as_said_are_changed_and_nested(tiny, kind):
    clean, mask = modality(tiny, {})
    before = np.zeros_like(mask)
    for level in (0.2, 0.5, 0.9):
        noisy, after = modality(tiny, {kind: level})
        changed = (noisy != clean).any(axis=1)
        assert changed.sum() == round(level * 14) and (before <= changed).all() and not changed[~mask].any()
        before = changed
        if kind == "feature_missing":
            assert np.array_equal(after, mask & ~changed) and not noisy[changed].any()
        else:
            assert np.array_equal(after, mask)
        if kind == "feature_swap":
            assert sorted(map(tuple, noisy)) == sorted(map(tuple, clean))


def test_random_rows_have_the_mean_and_scale_of_the_clean_ones(tiny):
    rows = 5 + 3 * np.random.default_rng(0).normal(size=(15, 4000))
    np.save(tiny / "text.npy", rows.astype(np.float32))
    noisy, mask = modality(tiny, {"feature_random": 1.0})
    clean, _ = modality(tiny, {})
    assert noisy[mask].mean() == pytest.approx(5, abs=0.1)
    assert noisy[mask].std() == pytest.approx(3, abs=0.1)
    apart = [(values - clean[mask].mean(axis=0)).ravel() for values in (noisy[mask], clean[mask])]
    assert abs(np.corrcoef(*apart)[0, 1]) < 0.02


def test_modalities_are_disturbed_apart(tiny):
    chosen = [(modality(tiny, {"feature_missing": 0.5}, name)[1]) for name in ("text", "image")]
    assert not np.array_equal(*chosen)


# -- knowledge graph -------------------------------------------------------------------------------------------------


def test_tails_are_exchanged_for_other_entities(tiny):
    clean = triples(load(tiny, {})[0])
    before = set()
    for level in (0.2, 0.5, 1.0):
        noisy = triples(load(tiny, {"kg_tail": level})[0])
        changed = {at for at, (a, b) in enumerate(zip(clean, noisy, strict=True)) if a != b}
        assert len(changed) == round(level * 16) and before <= changed
        assert [t[:2] for t in noisy] == [t[:2] for t in clean]
        assert {t[2] for t in noisy} <= {e for h, _, t in clean for e in (h, t)}
        before = changed


def test_dropped_triples(tiny):
    clean = triples(load(tiny, {})[0])
    before = set(clean)
    for level in (0.2, 0.5, 0.9):
        noisy = set(triples(load(tiny, {"kg_drop": level})[0]))
        assert len(noisy) == 16 - round(level * 16) and noisy < before
        before = noisy


def test_links_are_exchanged_and_the_graph_keeps_its_structure(tiny):
    clean = load(tiny, {})[0]
    before = set()
    for level in (0.2, 0.5, 1.0):
        noisy = load(tiny, {"kg_link": level})[0]
        changed = {item for item, entity in clean.item2entity.items() if noisy.item2entity[item] != entity}
        assert len(changed) == round(level * 14) and before <= changed
        assert sorted(noisy.item2entity.values()) == sorted(clean.item2entity.values())
        assert triples(noisy) == triples(clean), "the same by name, of other items"
        for item, entity in noisy.item2entity.items():
            assert noisy.token2id("entity_id", entity) == noisy.token2id("item_id", item)
            assert noisy.entity2item[entity] == item
        before = changed


@pytest.mark.parametrize("kind", ["kg_tail", "kg_drop", "kg_link"])
def test_the_noise_in_the_knowledge_graph_is_the_same_in_kgat(tiny, kind):
    ours, kgat = (load(tiny, {kind: 0.5}, model)[0] for model in ("SLIFMR", "KGAT"))
    assert torch.equal(ours.triples, kgat.triples)
    clean = load(tiny, {}, "KGAT")[0]
    assert not np.array_equal(kgat.kg_graph().toarray(), clean.kg_graph().toarray())
    graph = kgat.ckg_graph(value_field="relation_id")
    n_users = kgat.user_num
    edges = sorted(zip(graph.row - n_users, graph.data, graph.col - n_users, strict=True))
    assert [tuple(map(int, e)) for e in edges if e[0] >= 0 and e[2] >= 0] == sorted(map(tuple, ours.triples.tolist()))


def test_reverse_triples_are_those_of_the_noisy_ones(tiny):
    data = load(tiny, {"kg_tail": 0.5}, kg_reverse_r=True)[0]
    forth, back = data.triples[:16], data.triples[16:]
    assert torch.equal(forth[:, [2, 0]], back[:, [0, 2]])


# -- settings --------------------------------------------------------------------------------------------------------

BAD = {
    "unknown kind": ({"kg_add": 0.1}, "noise: 'kg_add' is none of interaction_drop, "),
    "above 1": ({"kg_tail": 1.5}, "noise: the level of kg_tail must be a number from 0 to 1, not 1.5"),
    "below 0": ({"kg_tail": -0.1}, "from 0 to 1, not -0.1"),
    "no number": ({"kg_tail": "much"}, "from 0 to 1, not 'much'"),
    "NaN": ({"kg_tail": float("nan")}, "from 0 to 1, not nan"),
    "no mapping": (0.2, "noise must map kinds to levels"),
    "no seed": ({"kg_tail": 0.2, "seed": "x"}, "noise: the seed must be a whole number from 0, not 'x'"),
    "all triples": ({"kg_drop": 1.0}, "noise: kg_drop 1 leaves no triple"),
    "all rows": ({"feature_missing": 1}, "noise: feature_missing 1 leaves no row of '(text|image)'"),
    "one row": ({"feature_swap": 0.05}, "noise: feature_swap 0.05 is one of the rows of '(text|image)'"),
    "one link": ({"kg_link": 0.05}, "noise: kg_link 0.05 is one of the 14 linked items"),
    "too many dropped": ({"interaction_drop": 0.95}, r"is \d+ of \d+ training interactions, but only \d+ can go"),
}


@pytest.mark.parametrize("case", BAD)
def test_noise_that_cannot_be_had_is_named(tiny, case):
    noise, message = BAD[case]
    with pytest.raises(SettingError, match=message) as error:
        load(tiny, noise)
    assert "\n" not in str(error.value)


def test_a_user_keeps_an_item_that_is_not_theirs(tmp_path):
    root = tmp_path / "full"
    root.mkdir()
    for part, items in (("train", range(4)), ("valid", [4]), ("test", [5])):
        write_table(
            root / f"full.{part}.inter",
            "user_id:token\titem_id:token",
            [(f"u{u}", f"i{i}") for u in "ab" for i in items],
        )
    split = {"benchmark_filename": ["train", "valid", "test"], "topk": [2], "valid_metric": "Recall@2"}
    with pytest.raises(SettingError, match="but only 0 pairs of user and item are in no split"):
        load(root, {"interaction_add": 0.25}, "LightGCN", **split)
    train = [("ua", "i0"), ("ua", "i1"), ("ua", "i2"), ("ub", "i3")]  # 1 pair of ua is free, 3 of ub
    write_table(root / "full.train.inter", "user_id:token\titem_id:token", train)
    with pytest.raises(SettingError, match="a user would have every item"):
        load(root, {"interaction_add": 0.75}, "LightGCN", **split)
    write_table(root / "full.train.inter", "user_id:token\titem_id:token", [*train, ("uc", "i3")])
    assert len(load(root, {"interaction_add": 0.2, "seed": 1}, "LightGCN", **split)[0].inter_feat) == 6


def test_noise_in_what_a_data_set_lacks_is_refused_and_in_what_a_model_does_not_read_ignored(tiny):
    noise = {"kg_tail": 0.2, "feature_swap": 0.5}
    assert pairs(load(tiny, noise, "LightGCN")[0]) == pairs(load(tiny, {}, "LightGCN")[0])
    for name in ("text", "image"):
        (tiny / f"{name}.npy").unlink()
    with pytest.raises(SettingError, match="noise: feature_swap needs item features, and 'tiny' has none"):
        load(tiny, noise)
    for name in ("kg", "link"):
        (tiny / f"tiny.{name}").unlink()
    for model in ("SLIFMR", "LightGCN"):
        with pytest.raises(SettingError, match=r"noise: kg_tail needs a knowledge graph, and there is no .*tiny\.kg"):
            load(tiny, noise, model)


def test_items_that_are_held_out_get_no_noise(tiny):
    with pytest.raises(SettingError, match="noise: interaction_add would reach the items that cold_items holds out"):
        load(tiny, {"interaction_add": 0.2}, cold_items=0.2)
    clean, noisy = (load(tiny, noise, cold_items=0.2) for noise in ({}, {"interaction_drop": 0.2}))
    assert set(pairs(noisy[0])) < set(pairs(clean[0])) and pairs(noisy[2]) == pairs(clean[2])


def test_a_level_of_zero_is_no_noise(tiny):
    (tiny / "tiny.kg").unlink()
    assert pairs(load(tiny, {kind: 0 for kind in KINDS})[0]) == pairs(load(tiny, {})[0])


def test_a_model_that_noise_would_not_reach_is_refused():
    with pytest.raises(SettingError, match="noise: FM reads its data by a class of RecBole's"):
        make_config("FM", "toy", settings={"noise": {"interaction_add": 0.1}})


def test_what_a_model_reads():
    assert reads(make_config("LightGCN", "toy")) == {"interaction"}
    assert reads(make_config("KGAT", "toy")) == {"interaction", "kg"}
    assert reads(make_config("LATTICE", "toy")) == {"interaction", "feature"}
    assert reads(make_config("SLIFMR", "toy")) == {"interaction", "feature", "kg"}
    assert reads(make_config("SLIFMR", "toy", settings={"use_kg": False, "use_features": False})) == {"interaction"}


def test_noise_is_logged(tiny, caplog):
    with caplog.at_level("INFO"):
        load(tiny, {"kg_drop": 0.25, "interaction_add": 0.5, "seed": 3})
    assert "noise: interaction_add 0.5, kg_drop 0.25 (seed 3)" in caplog.text
