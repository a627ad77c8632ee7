"""The ranker and the metrics against RecBole's own, what a validation computes, and where RecBole's path stays."""

import itertools

import numpy as np
import pytest
import torch
from conftest import QUIET, write_table
from recbole.evaluator.collector import Collector
from recbole.evaluator.evaluator import Evaluator
from recbole.trainer import Trainer
from recbole.utils import get_trainer

from recbole_slifmr.host.settings import make_config
from recbole_slifmr.training import ranking
from recbole_slifmr.training.checkpoint import read_checkpoint
from recbole_slifmr.training.evaluation import evaluate, mask_training_items_only
from recbole_slifmr.training.experiment import load_data, make_trainer, run
from recbole_slifmr.training.ranking import BlockLoader, RankingTrainer

EVERY = [
    "Recall", "NDCG", "MRR", "Hit", "Precision", "MAP", "ItemCoverage", "AveragePopularity", "GiniIndex",
    "ShannonEntropy", "TailPercentage",
]  # fmt: skip
EXACT = {"metrics": EVERY, "metric_decimal_place": 14}


def prepared(model, folder=None, **settings):
    """Return the trainer as a run has it, and the loaders."""
    dataset, path = ("toy", {}) if folder is None else (folder.name, {"data_path": str(folder.parent)})
    config = make_config(model, dataset, settings={**QUIET, **EXACT, **path, **settings})
    loaders = load_data(config)
    return make_trainer(config, loaders[0]), loaders


def of_recbole(trainer, data, train):
    """Return RecBole's own metrics of the trainer's model: its loader, collector and evaluator."""
    plain = Trainer(trainer.config, trainer.model)
    assert type(plain.eval_collector) is Collector and type(plain.evaluator) is Evaluator
    plain.eval_collector.data_collect(train)
    return plain.evaluate(data, load_best_model=False)


def assert_equals_recbole(trainer, loaders):
    train, *splits = loaders
    trainer.eval_collector.data_collect(train)
    for data in splits:
        ours = trainer.evaluate(data, load_best_model=False)
        theirs = of_recbole(trainer, data, train)
        assert list(ours) == list(theirs)
        assert ours == pytest.approx(theirs, abs=1e-9, rel=0)


@pytest.mark.parametrize("model", ["LightGCN", "Pop", "SLIFMR"])  # Pop: nearly all scores are ties
@pytest.mark.parametrize("tail_ratio", [0.2, 3])
def test_all_metrics_equal_recbole_s(model, tail_ratio):
    trainer, loaders = prepared(model, tail_ratio=tail_ratio, epochs=1)
    trainer.fit(*loaders[:2], saved=False)
    assert_equals_recbole(trainer, loaders)


def test_all_metrics_equal_recbole_s_on_ml_100k():
    config = make_config("Pop", "ml-100k", settings={**QUIET, **EXACT})
    loaders = load_data(config)
    trainer = make_trainer(config, loaders[0])
    trainer.fit(*loaders[:2], saved=False)
    assert_equals_recbole(trainer, loaders)


def write_sparse(folder):
    """Write a fixed split: two users without test items, one without any but training items, a pair twice in test."""
    parts = {
        "train": [("a", 1), ("a", 2), ("b", 1), ("c", 3), ("d", 4), ("d", 1), ("e", 5), ("e", 2)],
        "valid": [("a", 3), ("b", 2), ("d", 5)],
        "test": [("a", 4), ("a", 4), ("a", 6), ("b", 3), ("d", 6)],
    }
    root = folder / "sparse"
    root.mkdir()
    for part, rows in parts.items():
        lines = [(user, f"i{item}") for user, item in rows]
        write_table(root / f"sparse.{part}.inter", "user_id:token\titem_id:token", lines)
    return root


SPARSE = {"benchmark_filename": ["train", "valid", "test"], "topk": [2, 3], "valid_metric": "Recall@3"}


def test_users_without_test_items_are_absent_and_a_pair_twice_counts_once(tmp_path):
    trainer, loaders = prepared("BPR", write_sparse(tmp_path), **SPARSE)
    trainer.fit(*loaders[:2])
    assert_equals_recbole(trainer, loaders)
    found = evaluate(trainer, loaders[2], loaders[0])
    assert list(found.per_user.index) == ["a", "b", "d"] and found.n_users == 3
    assert not found.per_user.isna().any(axis=None)
    assert set(found.per_user["recall@3"]) <= {0.0, 0.5, 1.0}, "a has two items in test"
    assert found.metrics["recall@3"] == pytest.approx(found.per_user["recall@3"].mean(), abs=1e-12)


def test_a_pair_twice_counts_once_among_sampled_items_too(tmp_path):
    mode = {"eval_args": {"mode": "uni1", "order": "RO", "group_by": "user", "split": {"RS": [0.6, 0.2, 0.2]}}}
    trainer, (train, valid, test) = prepared("BPR", write_sparse(tmp_path), **SPARSE, **mode)
    trainer.fit(train, valid, saved=False)
    results = []
    for score in (lambda: trainer.evaluate(test, load_best_model=False), lambda: of_recbole(trainer, test, train)):
        np.random.seed(0)
        results.append(score())
    assert results[0] == pytest.approx(results[1], abs=1e-9)
    assert trainer.eval_collector.latest.get("rec.topk")[:, -1].tolist() == [2, 1, 1]


def test_lists_are_the_same_in_blocks_of_any_size(tiny):
    found = []
    for size in (16, 70, 100_000):
        trainer, loaders = prepared("Pop", tiny, eval_batch_size=size)
        trainer.fit(*loaders[:2], saved=False)
        trainer.evaluate(loaders[2], load_best_model=False)
        assert len(BlockLoader.of(loaders[2])) == -(-20 // max(size // 16, 1))
        found.append(trainer.eval_collector.latest.get("rec.items"))
    assert all(torch.equal(found[0], items) for items in found[1:])


# -- what a validation computes --------------------------------------------------------------------------------------


def test_a_validation_computes_the_selecting_metric_and_the_best_epoch_has_all(tiny, monkeypatch):
    trainer, (train, valid, _) = prepared("LightGCN", tiny, epochs=4, valid_metric="NDCG@5", learning_rate=0.05)
    seen, validate = [], trainer._valid_epoch

    def watching(*args, **kwargs):
        score, result = validate(*args, **kwargs)
        whole = of_recbole(trainer, valid, train)
        assert result == pytest.approx({name: whole[name] for name in ("ndcg@5", "ndcg@10")}, abs=1e-9, rel=0)
        seen.append((score, whole))
        return score, result

    monkeypatch.setattr(trainer, "_valid_epoch", watching)
    score, result = trainer.fit(train, valid, saved=False)
    best = max(range(4), key=lambda epoch: (seen[epoch][0], epoch))  # of equals the last, as RecBole chooses
    assert score == seen[best][0] and result == pytest.approx(seen[best][1], abs=1e-9, rel=0)
    assert trainer.best_valid_result is result


def test_no_metric_is_computed_in_a_python_loop_over_users(tiny, monkeypatch):
    """Ten times the users take hardly more calls of Python functions and lines: none is executed per user or item."""
    import sys

    lines = []
    for n_users in (20, 200):
        rng = np.random.default_rng(0)
        hits = rng.random((n_users, 10)) < 0.3
        trainer, (train, *_) = prepared("BPR", tiny, topk=[5, 10])
        trainer.eval_collector.data_collect(train)
        struct = trainer.eval_collector.data_struct
        items = np.argsort(rng.random((n_users, 15)), axis=1)[:, :10] + 1
        struct.set("rec.items", torch.from_numpy(items))
        lists = np.concatenate([hits, hits.sum(1, keepdims=True) + 1], axis=1)
        struct.set("rec.topk", torch.from_numpy(lists.astype(np.int32)))
        count = itertools.count()

        def trace(frame, event, argument, count=count):
            next(count)
            return trace

        sys.settrace(trace)
        try:
            trainer.evaluator.evaluate(struct)
        finally:
            sys.settrace(None)
        lines.append(next(count))
    assert lines[1] == lines[0]


def test_a_resumed_run_without_a_better_epoch_still_has_all_metrics(tiny):
    settings = {**QUIET, **EXACT, "data_path": str(tiny.parent), "epochs": 1}
    first = run("SLIFMR", "tiny", settings=settings)
    state = read_checkpoint(first.checkpoint)
    torch.save({**state, "best_valid_score": 2.0}, "unbeaten.pth", pickle_protocol=2)
    again = run("SLIFMR", "tiny", settings={**settings, "epochs": 2}, resume="unbeaten.pth")
    assert again.best_valid_score == 2.0 and again.n_epochs == 1
    assert set(first.valid) == set(first.test) and again.valid == first.valid


# -- any model, any trainer ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["KGAT", "NCL", "EASE", "RecVAE", "MKR", "RaCT"])
def test_the_trainers_of_recbole_keep_their_ways(model, tiny):
    settings = {"train_stage": "actor_pretrain", "pretrain_epochs": 1, "save_step": 1} if model == "RaCT" else {}
    trainer, loaders = prepared(model, tiny, epochs=1, **settings)
    own = get_trainer(trainer.config["MODEL_TYPE"], model)
    assert isinstance(trainer, RankingTrainer) and isinstance(trainer, own) and type(trainer).__name__ == own.__name__
    trainer.fit(*loaders[:2])
    assert_equals_recbole(trainer, loaders)


@pytest.mark.parametrize("model", ["BPR", "SLIFMR"])
def test_freed_memory_is_kept_while_any_model_trains(model, tiny, monkeypatch):
    calls = []
    monkeypatch.setattr(ranking, "keep_freed_memory", lambda: calls.append(model))
    trainer, (train, valid, _) = prepared(model, tiny, epochs=1, use_gpu=False)
    trainer.fit(train, valid, saved=False)
    assert calls == [model], "else the system clears the scores of each block anew, page by page"


def test_a_model_that_scores_pairs_is_ranked_too(tiny):
    trainer, loaders = prepared("NeuMF", tiny, epochs=1, eval_batch_size=64, mlp_hidden_size=[8])
    trainer.fit(*loaders[:2], saved=False)
    assert_equals_recbole(trainer, loaders)


def test_a_trainer_of_recbole_itself_can_be_scored_in_detail(tiny, build):
    run = build(tiny, "LightGCN", **EXACT)
    assert not isinstance(run.trainer, RankingTrainer)
    run.trainer.fit(run.train, run.valid)
    assert run.trainer.evaluate(run.test) == pytest.approx(
        {k: v for k, v in evaluate(run.trainer, run.test, run.train).metrics.items() if "/" not in k}, abs=1e-9
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"eval_args": {"mode": "uni5"}},
        {"metrics": ["Recall", "GAUC", "TailPercentage"]},
        {"eval_args": {"mode": "labeled"}, "metrics": ["AUC", "LogLoss"], "valid_metric": "AUC", "topk": [5]},
    ],
    ids=["sampled", "of all scores", "by label"],
)
def test_where_lists_do_not_suffice_recbole_s_own_way_is_taken(tiny, settings, tmp_path):
    folder = tiny
    if "LogLoss" in settings.get("metrics", ()):
        lines = (tiny / "tiny.inter").read_text().splitlines()
        rows = [(*line.split("\t"), number % 2) for number, line in enumerate(lines[1:])]
        write_table(tiny / "tiny.inter", f"{lines[0]}\tlabel:float", rows)
        settings = {**settings, "load_col": {"inter": ["user_id", "item_id", "label"]}, "LABEL_FIELD": "label"}
        settings["train_neg_sample_args"] = None
    model = "NeuMF" if "LABEL_FIELD" in settings else "BPR"
    split = {"split": {"RS": [0.6, 0.2, 0.2]}, "order": "RO", "group_by": "user"}
    if "eval_args" in settings:
        settings["eval_args"] = {**split, **settings["eval_args"]}
    trainer, (train, valid, test) = prepared(model, folder, epochs=1, **settings)
    _, result = trainer.fit(train, valid, saved=False)
    for data in (valid, test):
        torch.manual_seed(0), np.random.seed(0)
        ours = trainer.evaluate(data, load_best_model=False)
        torch.manual_seed(0), np.random.seed(0)
        assert ours == pytest.approx(of_recbole(trainer, data, train), abs=1e-9)
    assert set(result) == set(ours)


# -- what may be recommended -----------------------------------------------------------------------------------------


def test_no_list_holds_padding_or_seen_items_and_the_mask_may_spare_validation_items(tiny):
    trainer, (train, valid, test) = prepared("BPR", tiny, epochs=1, topk=[5], valid_metric="Recall@5")
    trainer.fit(train, valid, saved=False)
    pairs = {
        name: set(zip(*(loader._dataset.inter_feat[field].tolist() for field in ("user_id", "item_id")), strict=True))
        for name, loader in (("train", train), ("valid", valid), ("test", test))
    }
    for banned in (pairs["train"] | pairs["valid"], pairs["train"]):
        trainer.evaluate(test, load_best_model=False)
        items = trainer.eval_collector.latest.get("rec.items").tolist()
        listed = {(user, item) for user, row in zip(test.uid_list.tolist(), items, strict=True) for item in row}
        assert not listed & banned and all(item for _, item in listed)
        if banned == pairs["train"]:
            assert listed & pairs["valid"], "validation items are recommended at test time now"
        mask_training_items_only(test, train)
    for user in test.uid_list.tolist():
        wanted = {item for u, item in pairs["train"] if u == user} - {item for u, item in pairs["test"] if u == user}
        assert set(test.uid2history_item[user].tolist()) == wanted


def test_an_evaluation_that_was_interrupted_leaves_nothing_behind(tiny, monkeypatch):
    trainer, (train, valid, test) = prepared("BPR", tiny, epochs=1, eval_batch_size=100)
    trainer.fit(train, valid, saved=False)
    expected = trainer.evaluate(test, load_best_model=False)
    collect, count = trainer.eval_collector.eval_batch_collect, itertools.count()

    def failing(*args):
        collect(*args)
        if next(count) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(trainer.eval_collector, "eval_batch_collect", failing)
    with pytest.raises(KeyboardInterrupt):
        trainer.evaluate(test, load_best_model=False)
    assert trainer.evaluate(test, load_best_model=False) == expected


def test_the_default_block_follows_the_memory_at_hand(monkeypatch):
    from types import SimpleNamespace

    import psutil

    sizes = []
    for available in (64e9, 1e9, 1e6):
        monkeypatch.setattr(psutil, "virtual_memory", lambda value=available: SimpleNamespace(available=int(value)))
        sizes.append(make_config("LightGCN", "toy", settings={"use_gpu": False})["eval_batch_size"])
    assert sizes[0] > sizes[1] > sizes[2] >= 65_536 and sizes[0] * 4 < 100e6
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert make_config("LightGCN", "toy", settings={"eval_batch_size": 5, "use_gpu": False})["eval_batch_size"] == 5
