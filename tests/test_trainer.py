"""Callbacks and checkpoints: when the hooks run, what a checkpoint restores, what resuming gives."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import all_scores

from recbole_slifmr.errors import SettingError
from recbole_slifmr.training.callback import Callback, SelfLoopCallback
from recbole_slifmr.training.checkpoint import read_checkpoint


class Recorder(Callback):
    """Write down every hook as it runs."""

    events: list = []

    def __init__(self):
        Recorder.events = []

    def on_train_start(self, trainer):
        self.events.append("start")

    def on_epoch_start(self, trainer, epoch):
        self.events.append(("begin", epoch))

    def on_epoch_end(self, trainer, epoch, losses):
        self.events.append(("epoch", epoch, sorted(losses)))

    def on_valid_end(self, trainer, epoch, score, result):
        self.events.append(("valid", epoch, round(result["recall@10"], 4) == round(score, 4)))

    def on_fit_end(self, trainer):
        self.events.append("end")


def fit(run):
    return run.trainer.fit(run.train, run.valid, show_progress=False)


def peak_at(run, best_epoch):
    """Make validation scores rise to ``best_epoch`` and fall after it; return the scores of each epoch."""
    scores, real = {}, run.trainer._valid_epoch

    def valid_epoch(*args, **kwargs):
        _, result = real(*args, **kwargs)
        epoch = len(scores)
        scores[epoch] = all_scores(run).clone()
        return -abs(epoch - best_epoch), result

    run.trainer._valid_epoch = valid_epoch
    return scores


# -- hooks -----------------------------------------------------------------------------------------------------------


def test_hooks_run_in_order_every_epoch_also_those_not_validated(tiny, build):
    run = build(tiny, epochs=2, eval_step=2, callbacks=["test_trainer:Recorder"])
    fit(run)
    losses = ["inter", "intra", "ranking", "reg"]
    first, second = [("begin", 0), ("epoch", 0, losses)], [("begin", 1), ("epoch", 1, losses), ("valid", 1, True)]
    assert Recorder.events == ["start", *first, *second, "end"]


def test_refresh_comes_before_validation_and_saving(tiny, build):
    run = build(tiny, epochs=1)
    seen = []
    run.trainer._valid_epoch = lambda *a, **k: (seen.append(run.model.feedback_index.shape[1]), (0.5, {}))[1]
    fit(run)
    assert seen[0] > 0
    saved = read_checkpoint(run.trainer.saved_model_file)["other_parameter"]["feedback_index"]
    assert torch.equal(saved, run.model.feedback_index)


@pytest.mark.parametrize(
    "path, message",
    [
        ("no.such.module:Thing", "cannot be loaded"),
        ("test_trainer:Nothing", "cannot be loaded"),
        ("noclass", "cannot be loaded"),
        ("collections:OrderedDict", "has no on_train_start"),
    ],
)
def test_a_callback_that_cannot_be_used_is_named(tiny, build, path, message):
    with pytest.raises(SettingError, match=message):
        build(tiny, callbacks=[path])


class Trainer:
    """What SelfLoopCallback sees of a trainer."""

    valid_metric_bigger = True

    def __init__(self, turnovers):
        self.turnovers, self.refreshed, self.scalars = iter(turnovers), [], []
        self.model = self.tensorboard = self

    def refresh_graphs(self):
        from recbole_slifmr.model.slifmr import RefreshStats

        return RefreshStats(7, next(self.turnovers))

    def add_scalar(self, name, value, epoch):
        self.scalars.append((name, value, epoch))


def refreshed_epochs(callback, turnovers, n_epochs, scores=None):
    trainer = Trainer(turnovers)
    for epoch in range(n_epochs):
        callback.on_epoch_end(trainer, epoch, {})
        if scores:
            callback.on_valid_end(trainer, epoch, scores[epoch], {})
    return [epoch for name, _, epoch in trainer.scalars if name == "Refresh/edges"]


@pytest.mark.parametrize(
    "first, interval, expected", [(0, 1, [0, 1, 2, 3, 4, 5]), (2, 1, [2, 3, 4, 5]), (1, 3, [1, 4]), (9, 1, [])]
)
def test_first_epoch_and_interval(first, interval, expected):
    assert refreshed_epochs(SelfLoopCallback(first, interval), [0.5] * 9, 6) == expected


def test_adaptive_interval_doubles_in_calm_and_halves_in_storm():
    calm = refreshed_epochs(SelfLoopCallback(interval="adaptive"), [1.0] + [0.01] * 9, 16)
    assert calm == [0, 1, 3, 7, 15]
    # in between, nothing changes (hysteresis); a storm halves the gap
    mixed = refreshed_epochs(SelfLoopCallback(interval="adaptive"), [1.0, 0.01, 0.01, 0.2, 0.9] + [0.2] * 5, 18)
    assert mixed == [0, 1, 3, 7, 11, 13, 15, 17]


def test_a_stalled_score_brings_an_adaptive_refresh_forward():
    rising = list(np.linspace(0.1, 0.9, 16))
    stalled = rising[:8] + [rising[7]] * 8  # epochs 8, 9 and 10 bring nothing
    turnovers = [1.0] + [0.01] * 9
    assert refreshed_epochs(SelfLoopCallback(interval="adaptive"), turnovers, 16, rising) == [0, 1, 3, 7, 15]
    assert refreshed_epochs(SelfLoopCallback(interval="adaptive"), turnovers, 16, stalled) == [0, 1, 3, 7, 11]


def test_refresh_is_logged_and_written_to_tensorboard(tiny, build, caplog):
    run = build(tiny, epochs=2)
    scalars = []
    run.trainer.tensorboard.add_scalar = lambda name, value, epoch: scalars.append((name, epoch))
    with caplog.at_level("INFO"):
        fit(run)
    assert "epoch 0 refresh:" in caplog.text and "turnover 1.000" in caplog.text
    for name in ("Refresh/edges", "Refresh/turnover", "Refresh/seconds", "Diagnostics/smoothing", "Loss/Train/ranking"):
        assert [(name, 0), (name, 1)] == [scalar for scalar in scalars if scalar[0] == name]


def test_collapse_is_warned_of_once(tiny, build, caplog):
    run = build(tiny, epochs=2)
    run.model.diagnostics = lambda: {"homogenisation": 0.99, "smoothing": 0.1}
    with caplog.at_level("WARNING"):
        fit(run)
    assert caplog.text.count("homogenisation is 0.990") == 1 and "smoothing" not in caplog.text
    resumed = build(tiny, epochs=4)
    resumed.model.diagnostics = run.model.diagnostics
    resumed.trainer.resume_checkpoint(run.trainer.saved_model_file)
    with caplog.at_level("WARNING"):
        fit(resumed)
    assert caplog.text.count("homogenisation is 0.990") == 1, "said before the checkpoint"


# -- the self-loop, off ----------------------------------------------------------------------------------------------


def test_with_the_self_loop_off_the_callback_changes_nothing(tiny, build):
    off = build(tiny, self_loop=False, prune_ratio=0.2)
    off_result = fit(off)
    without = build(tiny, self_loop=True, prune_ratio=0.2)
    without.trainer.callbacks = [c for c in without.trainer.callbacks if not isinstance(c, SelfLoopCallback)]
    assert fit(without) == off_result
    on = build(tiny, self_loop=True, prune_ratio=0.2)
    fit(on)
    assert torch.equal(all_scores(off), all_scores(without))
    assert not torch.equal(all_scores(off), all_scores(on)), "on, it does change something"


def test_same_seed_same_bits(tiny, build):
    runs, results = [], []
    for _ in range(2):
        runs.append(build(tiny, prune_ratio=0.2, epochs=3))
        results.append(fit(runs[-1]))
    assert results[0] == results[1]
    for a, b in zip(runs[0].model.state_dict().values(), runs[1].model.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    other = build(tiny, prune_ratio=0.2, epochs=3, seed=1)
    fit(other)
    assert not torch.equal(all_scores(other), all_scores(runs[0]))


def test_a_second_fit_starts_the_self_loop_anew(tiny, build, caplog):
    run = build(tiny, epochs=2, refresh_first_epoch=1)
    with caplog.at_level("INFO"):
        fit(run)
        fit(run)
    assert caplog.text.count("epoch 1 refresh:") == 2 and "epoch 0 refresh:" not in caplog.text
    traces = {callback.trace: len(callback.history) for callback in run.trainer.callbacks if callback.trace}
    assert traces == {"diagnostics": 2, "refreshes": 1}, "of the second fit alone"


# -- checkpoints -----------------------------------------------------------------------------------------------------


def test_the_best_epoch_is_restored_graphs_included(tiny, build):
    run = build(tiny, epochs=5)
    scores = peak_at(run, best_epoch=2)
    fit(run)
    last_graph = run.model.feedback_index.clone()
    run.trainer.evaluate(run.test, load_best_model=True)
    assert torch.equal(all_scores(run), scores[2])
    assert not torch.equal(scores[4], scores[2])
    assert not torch.equal(run.model.feedback_index, last_graph), "the graph of epoch 2, not of the last epoch"


FRESH = """
import sys, numpy as np, torch
checkpoint, out = sys.argv[1:3]
sys.argv = sys.argv[:1]
import recbole_slifmr
from recbole.quick_start import load_data_and_model
from recbole.utils.case_study import full_sort_topk
config, model, dataset, train, valid, test = load_data_and_model(checkpoint)
users = np.arange(1, dataset.user_num)
model.eval()
from recbole.data.interaction import Interaction
np.save(out, model.full_sort_predict(Interaction({"user_id": torch.from_numpy(users)})).view(len(users), -1).numpy())
scores, items = full_sort_topk(users, model, test, k=3)
assert items.shape == (len(users), 3)
"""


def test_a_fresh_process_gives_the_scores_of_the_saved_epoch(tiny, build, tmp_path):
    run = build(tiny, epochs=4)
    scores = peak_at(run, best_epoch=1)
    fit(run)
    out = tmp_path / "scores.npy"
    checkpoint = Path(run.trainer.saved_model_file).resolve()
    subprocess.run([sys.executable, "-c", FRESH, str(checkpoint), str(out)], check=True, cwd=tmp_path)
    np.testing.assert_array_equal(np.load(out), scores[1].numpy())


def test_a_resumed_run_gives_what_the_uninterrupted_one_gives(tiny, build):
    settings = {"prune_ratio": 0.2, "refresh_interval": "adaptive", "stopping_step": 100}
    whole = build(tiny, epochs=6, **settings)
    whole_scores = peak_at(whole, best_epoch=5)
    fit(whole)

    first = build(tiny, epochs=3, **settings)
    first_scores = peak_at(first, best_epoch=2)
    fit(first)
    assert torch.equal(first_scores[2], whole_scores[2])
    second = build(tiny, epochs=6, **settings)
    torch.manual_seed(99)  # a new process is in another state
    np.random.seed(99)
    second.trainer.resume_checkpoint(first.trainer.saved_model_file)
    assert torch.equal(all_scores(second), whole_scores[2]), "exactly the epoch that was saved"
    assert second.trainer.best_valid_result == first.trainer.best_valid_result
    second_scores = peak_at(second, best_epoch=2)
    fit(second)
    assert torch.equal(second_scores[2], whole_scores[5])
    assert (
        second.trainer.callbacks[-1].state_dict()["next_epoch"]
        == whole.trainer.callbacks[-1].state_dict()["next_epoch"]
    )


def test_resuming_leaves_the_file_as_it_is_and_takes_new_settings(tiny, build):
    first = build(tiny, epochs=2)
    fit(first)
    path = Path(first.trainer.saved_model_file)
    before = path.read_bytes()
    second = build(tiny, epochs=4, refresh_interval=7, callbacks=["test_trainer:Recorder"])
    second.trainer.resume_checkpoint(str(path))
    loop = next(c for c in second.trainer.callbacks if isinstance(c, SelfLoopCallback))
    fit(second)
    assert loop.gap == 7 and loop.n_refreshes == 3  # two before, one at once, the next not yet due
    assert path.read_bytes() == before
    assert second.trainer.saved_model_file != str(path)


def test_runs_with_saved_loaders_train(tiny, build):
    run = build(tiny, save_dataloaders=True)
    assert 0 <= fit(run)[0] <= 1


def test_parallel_runs_do_not_overwrite_each_other(tiny, build):
    names = {build(tiny).trainer.saved_model_file for _ in range(5)}
    assert len(names) == 5


def test_an_interrupted_save_leaves_the_old_checkpoint(tiny, build, monkeypatch):
    run = build(tiny)
    fit(run)
    path = Path(run.trainer.saved_model_file)
    before = path.read_bytes()

    def broken(state, file, **kwargs):
        file.write(b"half") if hasattr(file, "write") else Path(file).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(OSError, match="disk full"):
        run.trainer._save_checkpoint(1, verbose=False)
    assert path.read_bytes() == before
    assert [p for p in path.parent.iterdir() if p.name.startswith(path.name)] == [path], "no half-written file stays"
