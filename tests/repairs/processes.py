"""Repairs of runs of several processes."""

from __future__ import annotations

import itertools
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from recbole_slifmr.host import compat
from repairs.tiny import apply_only, check, join, settings, shared, start, succeeds


@check
def check_process_group() -> None:
    """One process of a distributed run cannot start without a GPU; with the repair it is on the CPU."""
    group = {"local_rank": 0, "nproc": 1, "world_size": 1, "offset": 0, "init_method": f"file://{os.getcwd()}/store"}
    compat.apply(skip={"process_group"})
    with pytest.raises(Exception, match=r"NCCL"):
        settings("BPR", **group, ip="localhost", port=1)
    assert apply_only("process_group") == ["process_group"]
    assert settings("BPR")["single_spec"]
    config = settings("BPR", **group)
    assert (config["device"], config["single_spec"]) == (torch.device("cpu"), False)
    assert torch.distributed.get_backend() == "gloo"

    torch.cuda.device_count = lambda: 4
    with pytest.raises(ValueError, match="gpu_id names 1 GPUs for 2 processes"):
        settings("BPR", **group | {"nproc": 2, "gpu_id": 3})
    joined: dict[str, Any] = {}
    torch.distributed.init_process_group = lambda backend, **kwargs: joined.update(backend=backend, **kwargs)
    torch.cuda.set_device = lambda index: joined.update(index=index)
    config = settings("BPR", **group | {"nproc": 2, "world_size": 4, "offset": 2, "local_rank": 1})
    assert (config["device"], config["gpu_id"], config["show_progress"]) == (torch.device("cuda", 1), "0,1", False)
    assert (joined["backend"], joined["rank"], joined["world_size"], joined["index"]) == ("nccl", 3, 4, 1)


@check
def check_parallel_model() -> None:
    """A model on the CPU cannot be trained in several processes without the repair."""
    from recbole.trainer import Trainer

    compat.apply(skip={"parallel_model"})
    trainer, (train, *_) = start("BPR")
    join()
    with pytest.raises(ValueError, match="device_ids"):
        Trainer(shared(0, 1), trainer.model)
    assert apply_only("parallel_model") == ["parallel_model"]
    trainer.model.register_buffer("graph", torch.zeros(3))
    parallel = Trainer(shared(0, 1), trainer.model)
    before = trainer.model.item_embedding.weight.clone()
    assert parallel._train_epoch(type(train)(shared(0, 1), train._dataset, train._sampler, shuffle=True), 0) > 0
    assert not torch.equal(trainer.model.item_embedding.weight, before)
    assert not parallel.distributed_model.will_sync_module_buffers()
    assert os.listdir("log_tensorboard")
    boards = len(os.listdir("log_tensorboard"))
    torch.distributed.get_rank = lambda *group: 1
    Trainer(shared(0, 1), trainer.model).tensorboard.add_scalar("x", 1, 0)
    assert len(os.listdir("log_tensorboard")) == boards
    trainer.model.norm = torch.nn.BatchNorm1d(3)
    with pytest.raises(NotImplementedError, match="batch normalisation of BPR on GPUs only"):
        Trainer(shared(0, 1), trainer.model)


@check
def check_shares_of_data() -> None:
    """Two users count twice in the shares of four processes without the repair, and each seed shuffles the same way."""
    from recbole.data.dataloader import FullSortEvalDataLoader, TrainDataLoader

    def shares(kind: Any, loader: Any, count: int = 4, **changes: Any) -> list[list[int]]:
        found = []
        torch.distributed.get_world_size = lambda *group: count
        for rank in range(count):
            torch.distributed.get_rank = lambda *group, rank=rank: rank
            made = kind(
                shared(rank, count, **changes), loader._dataset, loader._sampler, shuffle=kind is TrainDataLoader
            )
            found.append([index for batch in made.batch_sampler for index in batch])
            assert len(list(made)) == len(made)
            if found[-1] == []:
                assert made, "an empty share is no reason to skip an evaluation that others wait for"
        return found

    compat.apply(skip={"shares_of_data"})
    _, (train, valid, _) = start("BPR")
    torch.distributed.is_initialized = lambda: True
    n_users = valid.sample_size
    assert n_users == 30
    assert sum(map(len, shares(FullSortEvalDataLoader, valid))) == 32
    assert shares(TrainDataLoader, train, seed=1) == shares(TrainDataLoader, train, seed=2)
    assert apply_only("shares_of_data") == ["shares_of_data"]
    assert list(itertools.chain(*shares(FullSortEvalDataLoader, valid))) == list(range(n_users))
    assert list(itertools.chain(*shares(FullSortEvalDataLoader, valid, 31))) == list(range(n_users))
    assert shares(TrainDataLoader, train, seed=1) != shares(TrainDataLoader, train, seed=2)
    for changes in ({}, {"shuffle": False}):
        found = shares(TrainDataLoader, train, **changes)
        assert {len(share) for share in found} == {math.ceil(train.sample_size / 4)}, "equal numbers of steps"
        assert set().union(*found) == set(range(train.sample_size))


@check
def check_shared_evaluation() -> None:
    """The metrics of two processes are those of one only with the repair."""
    compat.apply(skip={"shared_evaluation"})
    metrics = ["Recall", "ItemCoverage", "GiniIndex"]
    trainer, (train, valid, _) = start("BPR", metrics=metrics, valid_metric="Recall@5")
    trainer.eval_collector.data_collect(train)
    alone = trainer.evaluate(valid, load_best_model=False)

    def together(rank: int, name: str) -> None:
        join(rank, 2)
        config = shared(rank, 2, metrics=metrics, valid_metric="Recall@5")
        trainer.config = trainer.eval_collector.config = config
        share = type(valid)(config, valid._dataset, valid._sampler)
        result = trainer.evaluate(share, load_best_model=False)
        Path(f"{name}{rank}.json").write_text(json.dumps(result))
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
        Path("store2").unlink(missing_ok=True)

    succeeds(lambda: together(1, "before"), meanwhile=lambda: together(0, "before"))
    assert json.loads(Path("before0.json").read_text()) != alone
    assert apply_only("shared_evaluation") == ["shared_evaluation"]
    succeeds(lambda: together(1, "after"), meanwhile=lambda: together(0, "after"))
    assert json.loads(Path("after0.json").read_text()) == json.loads(Path("after1.json").read_text()) == alone
