"""Several processes: they start alike, share the work, stay alike, and end together."""

import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from conftest import QUIET, write_tiny
from recbole.trainer import Trainer
from recbole.utils import get_trainer

from recbole_slifmr.cli import run_script
from recbole_slifmr.errors import DataError, ProcessError
from recbole_slifmr.host.settings import make_config
from recbole_slifmr.training.distributed import launch, rank_and_count
from recbole_slifmr.training.experiment import prepare

N_USERS = 21  # odd: two shares of evaluation differ in size
SETTINGS = {**QUIET, "prune_ratio": 0.3, "metrics": ["Recall", "NDCG", "ItemCoverage"], "epochs": 3}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("data"), n_users=N_USERS)


def prepared(data, rank=None, rendezvous=None, **settings):
    group = {"local_rank": rank, "nproc": 2, "world_size": 2, "offset": 0, "init_method": rendezvous}
    settings = {**SETTINGS, "data_path": str(data.parent), **settings, **(group if rendezvous else {})}
    return prepare(make_config("SLIFMR", data.name, settings=settings))


def gradients(model, batches):
    """Return the gradients of the mean loss of the batches; the draws of each start from the same seed."""
    model.zero_grad()
    for batch in batches:
        torch.manual_seed(5)
        (sum(model.calculate_loss(batch)) / len(batches)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def observe(rank, rendezvous, data):
    """Train in one of two processes and return what all of them saw."""
    run = prepared(data, rank, rendezvous)
    trainer, model, seen = run.trainer, run.trainer.model, {}
    seen["initial"] = [p.detach().clone() for p in model.parameters()]

    shards = []
    for epoch in range(2):
        run.train_data.sampler.set_epoch(epoch)
        shards.append([i for batch in run.train_data.batch_sampler for i in batch])
    seen["shards"], seen["batch"] = shards, next(iter(run.train_data))

    trainer.model.train()
    model.zero_grad()
    trainer.set_reduce_hook()
    sync = trainer.sync_grad_loss()
    torch.manual_seed(5)
    (sum(model.calculate_loss(seen["batch"])) + sync).backward()
    seen["gradients"] = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    seen["graphs"], refreshed = [], []
    refresh = model.refresh_graphs
    model.refresh_graphs = lambda: refreshed.append(1) or refresh()
    steps = []
    train_epoch, step = Trainer._train_epoch, trainer.optimizer.step
    trainer.optimizer.step = lambda *args: steps.append(1) or step(*args)

    def recording(self, *args, **kwargs):
        result = train_epoch(self, *args, **kwargs)
        seen["graphs"].append([model.feedback_index.clone(), model.interaction_encoder.kept.clone()])
        return result

    Trainer._train_epoch = recording
    seen["valid"] = trainer.fit(run.train_data, run.valid_data, show_progress=False)
    seen["test"] = trainer.evaluate(run.test_data)
    seen["steps"], seen["refreshed"] = len(steps), len(refreshed)
    seen["callbacks"] = [callback.state_dict() for callback in trainer.callbacks]
    for entry in (entry for state in seen["callbacks"] for entry in state.get("history", ())):
        entry.pop("seconds", None)  # of its own in each process
    seen["final"] = [p.detach().clone() for p in model.parameters()]
    seen["file"] = trainer.saved_model_file
    gathered = [None, None]
    dist.all_gather_object(gathered, seen)
    return gathered


@pytest.fixture(scope="module")
def both(data, tmp_path_factory):
    """What the two processes of a run saw, and the folder they worked in."""
    before, folder = Path.cwd(), tmp_path_factory.mktemp("both")
    os.chdir(folder)
    try:
        return SimpleNamespace(ranks=launch(observe, (data,), 2), folder=folder)
    finally:
        os.chdir(before)


def test_processes_start_from_the_same_parameters_those_of_a_single_process(both, data):
    alone = prepared(data).trainer.model.parameters()
    for first, second, single in zip(*(rank["initial"] for rank in both.ranks), alone, strict=True):
        assert torch.equal(first, second) and torch.equal(first, single)


def test_processes_share_each_epoch_which_is_shuffled_anew(both, data):
    count = len(prepared(data).train_data._dataset)
    (first, again), (second, _) = (rank["shards"] for rank in both.ranks)
    assert len(first) == len(second) and set(first) | set(second) == set(range(count))
    assert len(set(first) & set(second)) <= 1, "at most one interaction fills up the shares"
    assert first != again
    assert both.ranks[0]["steps"] == both.ranks[1]["steps"] == 3 * -(-len(first) // 32), "batches of 64 are halved"


def test_gradients_are_the_mean_over_the_processes(both, data):
    model = prepared(data).trainer.model.train()
    wanted = gradients(model, [rank["batch"] for rank in both.ranks])
    for rank in both.ranks:
        assert rank["gradients"].keys() == wanted.keys()
        for name, value in wanted.items():
            torch.testing.assert_close(rank["gradients"][name], value, rtol=1e-5, atol=1e-7, msg=name)
    negatives = [rank["batch"]["neg_item_id"] for rank in both.ranks]
    assert not torch.equal(*negatives)


def test_processes_stay_alike(both):
    first, second = both.ranks
    for one, other in zip(first["final"], second["final"], strict=True):
        assert torch.equal(one, other)
    for one, other in zip(first["graphs"], second["graphs"], strict=True):
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])
    assert first["callbacks"] == second["callbacks"]
    assert first["valid"] == second["valid"] and first["test"] == second["test"]
    assert (first["refreshed"], second["refreshed"]) == (3, 0), "the first process refreshes"
    assert first["graphs"][1][0].shape[1] > 0
    assert not torch.equal(first["graphs"][0][1], first["graphs"][1][1]), "each epoch is pruned anew"


def test_metrics_are_those_of_a_single_process(both, data):
    alone = prepared(data)
    assert alone.valid_data.sample_size % 2, "shares of different sizes"
    alone.trainer.eval_collector.data_collect(alone.train_data)
    file = both.folder / both.ranks[0]["file"]
    assert dict(alone.trainer.evaluate(alone.valid_data, model_file=file)) == dict(both.ranks[0]["valid"][1])
    assert dict(alone.trainer.evaluate(alone.test_data, model_file=file)) == dict(both.ranks[0]["test"])
    assert len(list(both.folder.glob("saved/*"))) == len(list(both.folder.glob("log_tensorboard/*"))) == 1


ARGUMENTS = ["--nproc=2", "--topk=[5]", "--valid_metric=Recall@5", "--show_progress=False"]


def test_the_command_prints_the_table_and_one_process_loads_what_several_saved(data, capsys):
    """KGAT has a trainer of its own, which alternates between interactions and triples."""
    from recbole.quick_start import load_data_and_model  # imports Ray, which the processes need not wait for

    where = [f"--dataset={data.name}", f"--data_path={data.parent}"]
    with pytest.raises(SystemExit) as stop:
        run_script(["--model=KGAT", *where, *ARGUMENTS, "--epochs=1", "--state=ERROR"])
    shown = capsys.readouterr().out
    assert stop.value.code == 0 and "KGAT on tiny" in shown and shown.count("1 epochs in") == 1

    (checkpoint,) = Path("saved").iterdir()
    config, model, _, _, valid, test = load_data_and_model(checkpoint)
    trainer = get_trainer(config["MODEL_TYPE"], "KGAT")(config, model)
    scores = [trainer.evaluate(split, load_best_model=False)["recall@5"] for split in (valid, test)]
    row = next(line for line in shown.splitlines() if "Recall@5" in line)
    assert [float(cell) for cell in row.split() if cell[0].isdigit()] == scores


def end(rank, rendezvous, how):
    """Join the group, then end in some way in the second process, while the first waits."""
    if how == "bad input":
        raise DataError("such as it is")
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
    assert rank_and_count() == (rank, 2)
    if rank == 1 and how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == 1:
        raise ZeroDivisionError("such as it is")
    dist.barrier()


def test_a_failing_process_ends_all():
    with pytest.raises(DataError, match=r"^such as it is$"):
        launch(end, ("bad input",), 1)
    with pytest.raises(ProcessError, match=r"^process 1 of 2 failed: ZeroDivisionError: such as it is\n") as failure:
        launch(end, ("bug",), 2)
    assert "in end" in failure.value.__notes__[0]
    with pytest.raises(ProcessError, match=r"^process 1 of 2 was killed by SIGKILL$"):
        launch(end, ("killed",), 2)


def test_ctrl_c_leaves_no_process(data):
    train = [sys.executable, "-c", "from recbole_slifmr.cli import run_recbole; run_recbole()"]
    where = [f"--dataset={data.name}", f"--data_path={data.parent}"]
    endless = [*where, *ARGUMENTS, "--epochs=1000000", "--stopping_step=1000000"]
    listening = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's background ignores it
    with subprocess.Popen(
        [*train, *endless, "--verbose"], stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=listening
    ) as process:
        lines = iter(process.stderr.readline, "")
        before = []
        for line in lines:
            before.append(line)
            if "epoch 1 training" in line:
                break
        else:
            pytest.fail("it ended before its second epoch: " + "".join(before))
        os.killpg(process.pid, signal.SIGINT)
        rest = list(lines)  # ends when no process of the group holds it any more
    assert process.returncode == 130
    assert rest[-1].strip() == "stopped" and not any("Traceback" in line for line in rest)
