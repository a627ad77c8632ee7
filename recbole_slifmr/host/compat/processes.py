"""Repairs of training in several processes."""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from recbole.config import Config
from recbole.data.dataloader import FullSortEvalDataLoader, NegSampleEvalDataLoader
from recbole.data.dataloader.abstract_dataloader import AbstractDataLoader
from recbole.evaluator.collector import Collector
from recbole.trainer import MKRTrainer, Trainer

from recbole_slifmr.host.compat.registry import refers_to, repair


@repair
def process_group() -> bool:
    """Let the processes of a distributed run work without a GPU each (`configurator.py`).

    `Config._init_device` takes NCCL and one GPU of `gpu_id` per process, whatever there is. Now all processes are on
    the CPU, over Gloo, where there are fewer GPUs than processes; without a `gpu_id` from outside they take the first
    ones. `init_method` may replace the port, which torch opens on every interface. Not needed once RecBole names Gloo.
    """
    original = Config._init_device
    if "nccl" not in original.__code__.co_consts or "gloo" in original.__code__.co_consts:
        return False

    @functools.wraps(original)
    def _init_device(self: Any) -> None:
        if "local_rank" in self.final_config_dict:
            _join_process_group(self)
        else:
            original(self)

    Config._init_device = _init_device
    return True


def _join_process_group(config: Any) -> None:
    settings = config.final_config_dict
    n_processes, local_rank = settings["nproc"], settings["local_rank"]
    given = config.external_config_dict.get("gpu_id", tuple(range(n_processes)))
    listed = given if isinstance(given, (tuple, list)) else str(given).split(",")
    named = [str(gpu) for gpu in listed if str(gpu)]
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(named)
    n_gpus = torch.cuda.device_count()
    if 0 < len(named) < n_processes and n_gpus:
        raise ValueError(f"gpu_id names {len(named)} GPUs for {n_processes} processes")
    on_gpu = n_gpus >= n_processes
    if on_gpu:
        torch.cuda.set_device(local_rank)
    else:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.distributed.init_process_group(
        "nccl" if on_gpu else "gloo",
        rank=local_rank + settings["offset"],
        world_size=settings["world_size"],
        init_method=settings.get("init_method") or f"tcp://{settings['ip']}:{settings['port']}",
    )
    settings["gpu_id"] = os.environ["CUDA_VISIBLE_DEVICES"]
    settings["device"] = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    settings["single_spec"] = False
    if local_rank != 0:
        settings.update(state="error", show_progress=False, verbose=False, log_wandb=False)


@repair
def parallel_model() -> bool:
    """Wrap the model for training in several processes on the CPU too, and leave its buffers alone (`trainer.py`).

    `AbstractTrainer.__init__` names a GPU, which torch refuses for a model on the CPU, and has
    `DistributedDataParallel` send every buffer, all graphs among them, at every step; all processes have the same.
    Batch normalisation is synchronised between GPUs only. Only the first process writes for TensorBoard. Not needed
    once RecBole tells it to leave the buffers.
    """
    trainer: Any = importlib.import_module("recbole.trainer.trainer")
    init, get_tensorboard = trainer.AbstractTrainer.__init__, trainer.get_tensorboard
    if "local_rank" not in init.__code__.co_consts or "_buffers" in inspect.getsource(init):
        return False
    known = inspect.signature(torch.nn.parallel.DistributedDataParallel).parameters
    sync = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"

    @functools.wraps(init)
    def __init__(self: Any, config: Any, model: Any) -> None:
        if config["single_spec"]:
            init(self, config, model)
            return
        device, self.config = config["device"], config
        if device.type == "cpu" and any("BatchNorm" in type(module).__name__ for module in model.modules()):
            raise NotImplementedError(f"torch synchronises the batch normalisation of {config['model']} on GPUs only")
        self.model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
        devices = None if device.type == "cpu" else [device.index]
        self.distributed_model = trainer.DistributedDataParallel(self.model, device_ids=devices, **{sync: False})

    trainer.AbstractTrainer.__init__ = __init__
    trainer.get_tensorboard = lambda logger: get_tensorboard(logger) if _is_first() else _NoBoard()
    return True


def _is_first() -> bool:
    distributed = torch.distributed
    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0


class _NoBoard:
    """A TensorBoard that takes everything and writes nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None


@contextlib.contextmanager
def without_board() -> Iterator[None]:
    """Have trainers that are built within write nothing for TensorBoard."""
    trainer: Any = importlib.import_module("recbole.trainer.trainer")
    kept, trainer.get_tensorboard = trainer.get_tensorboard, lambda logger: _NoBoard()
    try:
        yield
    finally:
        trainer.get_tensorboard = kept


@repair
def shares_of_data() -> bool:
    """Give each process its share of the data: shuffled by the seed, and in evaluation nobody twice.

    `AbstractDataLoader.__init__` shuffles by torch's default seed in every run, and fills up the shares until all are
    equal, so that some users count twice in the metrics. Training keeps the equal shares, which make equal numbers of
    steps; a share of evaluation may be empty. MKR's trainer never tells the loader its epoch: each epoch has the same
    order. Not needed once RecBole has a sampler of its own.
    """
    init, train_mkr = AbstractDataLoader.__init__, MKRTrainer._train_epoch
    if not refers_to(init, "DistributedSampler"):
        return False

    @functools.wraps(init)
    def __init__(self: Any, config: Any, dataset: Any, sampler: Any, shuffle: bool = False) -> None:
        init(self, config, dataset, sampler, shuffle)
        if config["single_spec"]:
            return
        self.sampler.seed = config["seed"]
        if isinstance(self, (FullSortEvalDataLoader, NegSampleEvalDataLoader)):
            rank, count = torch.distributed.get_rank(), torch.distributed.get_world_size()
            share = range(self.sample_size * rank // count, self.sample_size * (rank + 1) // count)
            vars(self)["sampler"] = self.batch_sampler.sampler = share

    @functools.wraps(train_mkr)
    def _train_epoch(self: Any, train_data: Any, epoch_idx: int, *args: Any, **kwargs: Any) -> Any:
        if not self.config["single_spec"]:
            train_data.knowledge_shuffle(epoch_idx)
        return train_mkr(self, train_data, epoch_idx, *args, **kwargs)

    AbstractDataLoader.__init__ = __init__
    AbstractDataLoader.__bool__ = lambda self: self.sample_size > 0  # else `Trainer.evaluate` leaves the others waiting
    if not refers_to(train_mkr, "knowledge_shuffle"):
        MKRTrainer._train_epoch = _train_epoch
    return True


@repair
def shared_evaluation() -> bool:
    """Evaluate all users together, whichever process ranked their items (`collector.py`, `trainer.py`).

    `Trainer._map_reduce` averages the metrics of the processes by their number of batches, taken for that of users;
    and a coverage or an entropy is no average of those of the shares. Now every process has what all have collected,
    in the order of a single process, and all go on with the numbers of the first. Not needed once `_map_reduce` gathers
    no metrics.
    """
    original = Collector.get_data_struct
    if not refers_to(Trainer._map_reduce, "all_gather"):
        return False

    @functools.wraps(original)
    def get_data_struct(self: Any) -> Any:
        config = getattr(self, "config", None)
        if config is not None and not config["single_spec"]:
            _gather(self.data_struct._data_dict)
        return original(self)

    Collector.get_data_struct, Trainer._map_reduce = get_data_struct, _map_reduce
    return True


def _gather(held: dict[str, Any]) -> None:
    """Put in place of each tensor the tensors of all processes, one after the other."""
    own = {key: value.cpu() for key, value in held.items() if isinstance(value, torch.Tensor)}
    parts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, own)
    for key in {key for part in parts for key in part}:
        held[key] = torch.cat([part[key] for part in parts if key in part])


def _map_reduce(self: Any, result: Any, num_sample: int) -> Any:
    held = [result]
    torch.distributed.broadcast_object_list(held, src=0)
    return held[0]
