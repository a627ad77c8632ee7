"""The phases of one model on one data set, timed in this process. Only public seams of RecBole and the package."""

from __future__ import annotations

import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice, pairwise
from pathlib import Path
from time import perf_counter
from typing import Any

import psutil
import torch
from recbole.data import create_dataset, data_preparation
from recbole.data.dataloader import KnowledgeBasedDataLoader
from recbole.data.utils import get_dataloader
from recbole.trainer import KGATTrainer
from recbole.utils import KGDataLoaderState, get_model, get_trainer, init_seed

from benchmarks import floor
from recbole_slifmr.host.settings import bad_input, make_config
from recbole_slifmr.training.ranking import BlockLoader, with_ranking

STEP_PHASES = ("sampling", "forward", "backward", "optimiser")
WARM_UP = 3


@dataclass(frozen=True)
class Job:
    """What to measure.

    Attributes:
        preset: name in the output.
        model: name of a model.
        dataset: name of the data set's folder.
        data_path: the folder that holds it; None where the package finds it.
        steps: training steps to time; an epoch of more is scaled up from them.
        eval_batches: evaluation batches to time, likewise.
        eval_batch_sizes: more values of ``eval_batch_size`` to time the evaluation with.
        threads: of torch.
        settings: settings of the model that win over the defaults.
    """

    preset: str
    model: str
    dataset: str
    data_path: str | None = None
    steps: int = 20
    eval_batches: int = 50
    eval_batch_sizes: tuple[int, ...] = ()
    threads: int = 1
    settings: Mapping[str, Any] = field(default_factory=dict)


class Clock:
    """Seconds on a device: what was started is waited for."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self) -> float:
        """Return the time now."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return perf_counter()

    def time(self, function: Callable[[], Any]) -> tuple[float, Any]:
        """Return the seconds that a function takes, and what it returns."""
        start = self()
        result = function()
        return self() - start, result


def measure(job: Job) -> dict[str, Any]:
    """Return the sizes, phases in seconds and peak memory of a job.

    ``phases``: ``data`` (files to data set), ``loaders`` (split, samplers, loaders), ``graph`` (the model's
    construction); of a training epoch ``sampling``, ``forward``, ``backward``, ``optimiser`` (with zero_grad);
    ``refresh`` (what the model does to its graphs once an epoch, None if nothing), ``diagnostics`` (likewise),
    ``evaluation`` (full ranking of the validation split). ``epoch`` is all that an epoch takes without evaluation,
    ``others_cpu`` the share of the machine's CPU time that other processes took meanwhile.

    Raises:
        DataError, SettingError: for data or settings that cannot be used.
    """
    with scratch(job.threads):
        before = _cpu_seconds()
        result = _measure(job)
        own, all_of_them, there = (b - a for a, b in zip(before, _cpu_seconds(), strict=True))
        result["others_cpu"] = max(all_of_them - own, 0.0) / max(there, 1e-9)
        return result


def _cpu_seconds() -> tuple[float, float, float]:
    """Return the CPU seconds that this process has used, that all have used, and that there were."""
    machine, own = psutil.cpu_times(), psutil.Process().cpu_times()
    idle = machine.idle + getattr(machine, "iowait", 0.0)
    there = sum(getattr(machine, name, 0.0) for name in ("user", "nice", "system", "idle", "iowait", "irq", "softirq"))
    return own.user + own.system, there - idle, there


@contextmanager
def scratch(threads: int) -> Iterator[None]:
    """Work in a temporary folder, where RecBole leaves its logs, without messages and with so many threads of torch."""
    folder, level, before = Path.cwd(), logging.root.manager.disable, torch.get_num_threads()
    with tempfile.TemporaryDirectory(prefix="slifmr-benchmark-") as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="recbole")  # deprecations of pandas and torch
        logging.disable(logging.WARNING)
        torch.set_num_threads(threads)
        os.chdir(temporary)
        try:
            yield
        finally:
            os.chdir(folder)
            torch.set_num_threads(before)
            logging.disable(level)


def _measure(job: Job) -> dict[str, Any]:
    settings: dict[str, Any] = {"embedding_size": 64, "show_progress": False, "state": "ERROR"}
    if job.data_path is not None:
        settings["data_path"] = job.data_path
    config = make_config(job.model, job.dataset, settings={**settings, **job.settings})
    model_class = get_model(job.model)
    clock = Clock(config["device"])
    init_seed(config["seed"], config["reproducibility"])
    phases: dict[str, float | None] = {}
    with bad_input():
        phases["data"], dataset = clock.time(lambda: create_dataset(config))
        phases["loaders"], (train, valid, _) = clock.time(lambda: data_preparation(config, dataset))
    phases["graph"], model = clock.time(lambda: model_class(config, train._dataset).to(config["device"]))
    trainer = with_ranking(get_trainer(config["MODEL_TYPE"], job.model))(config, model)

    epoch = _train(trainer, train, clock, job.steps)
    phases.update(epoch.phases)
    evaluation, eval_scaled = _evaluate(trainer, valid, clock, job.eval_batches)
    phases["evaluation"] = evaluation
    result: dict[str, Any] = {
        "preset": job.preset,
        "model": job.model,
        "device": str(config["device"]),
        "threads": job.threads,
        "sizes": _sizes(dataset, train, valid, model),
        "batches": epoch.batches,
        "phases": phases,
        "step": sum(phases[name] or 0.0 for name in STEP_PHASES) / sum(epoch.batches.values()),
        "epoch": sum(phases[name] or 0.0 for name in (*STEP_PHASES, "refresh", "diagnostics")),
        "scaled": {"epoch": epoch.scaled, "evaluation": eval_scaled},
        "peak_memory_mb": peak_memory(),
        "peak_device_memory_mb": torch.cuda.max_memory_allocated() / 1e6 if clock.device.type == "cuda" else None,
    }
    result["evaluation_by_batch_size"] = {
        str(size): _evaluate(trainer, _with_batch_size(config, valid, size), clock, job.eval_batches)[0]
        for size in job.eval_batch_sizes
    }
    if hasattr(model, "refresh_graphs"):
        result["floor"] = floor.measure(model, train._dataset, config, sum(epoch.batches.values()), clock.time)
    return result


# -- training ---------------------------------------------------------------------------------------------------------


@dataclass
class Epoch:
    """One epoch: seconds by phase, number of batches by part, whether it was scaled up from fewer steps."""

    phases: dict[str, float | None]
    batches: dict[str, int]
    scaled: bool


def _parts(trainer: Any, train: Any) -> dict[str, tuple[Any, Callable[..., Any]]]:
    """Return the parts of an epoch in turn: state of the loader and loss function, as RecBole's trainers have them."""
    loss = trainer.model.calculate_loss
    if not isinstance(train, KnowledgeBasedDataLoader):
        return {"interactions": (None, loss)}
    if isinstance(trainer, KGATTrainer):
        kg_loss = trainer.model.calculate_kg_loss
        return {"interactions": (KGDataLoaderState.RS, loss), "triples": (KGDataLoaderState.KG, kg_loss)}
    return {"interactions": (KGDataLoaderState.RSKG, loss)}


def _train(trainer: Any, train: Any, clock: Clock, n_steps: int) -> Epoch:
    model, trainer.epochs = trainer.model, 0
    trainer.fit(train, saved=False)  # no epoch: only what comes before the first
    phases: dict[str, float | None] = dict.fromkeys(STEP_PHASES, 0.0)
    parts, batches = _parts(trainer, train), {}
    _run_parts(trainer, train, parts, clock, WARM_UP)
    _end_epoch(model, clock)  # the graphs of all epochs but the first
    rebuild = None
    for name, rows in _run_parts(trainer, train, parts, clock, n_steps).items():
        batches[name] = len(_in_state(train, parts[name][0]))
        typical = [min(column) for column in zip(*(rows[1:] or rows), strict=True)]
        extra = [max(seconds - usual, 0.0) for seconds, usual in zip(rows[0], typical, strict=True)]  # of the first
        if batches[name] <= n_steps:
            total = [sum(column) for column in zip(*rows, strict=True)]
        else:
            total = [seconds * batches[name] for seconds in typical]
            total[0] += extra[0]  # shuffling
        if hasattr(model, "start_epoch"):  # the first batch builds the graph anew
            rebuild = extra[1] + extra[2]
            if batches[name] <= n_steps:
                total[1:3] = total[1] - extra[1], total[2] - extra[2]
        for phase, seconds in zip(STEP_PHASES, total, strict=True):
            phases[phase] = (phases[phase] or 0.0) + seconds
    phases["diagnostics"], refresh = _end_epoch(model, clock)
    phases["refresh"] = rebuild if refresh is None else refresh
    return Epoch(phases, batches, any(count > n_steps for count in batches.values()))


def _in_state(train: Any, state: Any) -> Any:
    if state is not None:
        train.set_mode(state)
    return train


def _run_parts(
    trainer: Any, train: Any, parts: Mapping[str, tuple[Any, Callable[..., Any]]], clock: Clock, n_steps: int
) -> dict[str, list[tuple[float, ...]]]:
    """Train as RecBole's ``_train_epoch`` does, at most ``n_steps`` batches of each part; return seconds by step."""
    trainer.model.train()
    if hasattr(trainer.model, "start_epoch"):
        trainer.model.start_epoch()
    return {
        name: list(islice(_steps(trainer, iter(_in_state(train, state)), loss, clock), n_steps))
        for name, (state, loss) in parts.items()
    }


def _steps(
    trainer: Any, batches: Iterator[Any], loss_function: Callable[..., Any], clock: Clock
) -> Iterator[tuple[float, ...]]:
    """Take a training step per batch and yield its seconds by phase."""
    device, optimizer = trainer.device, trainer.optimizer
    while True:
        times = [clock()]
        batch = next(batches, None)
        if batch is None:
            return
        batch = batch.to(device)
        times.append(clock())
        optimizer.zero_grad()
        times.append(clock())
        with torch.autocast(device_type=device.type, enabled=trainer.enable_amp):
            losses = loss_function(batch)
        terms = losses if isinstance(losses, tuple) else (losses,)
        loss: Any = sum(terms)
        for term in terms:
            term.item()
        times.append(clock())
        loss.backward()
        times.append(clock())
        optimizer.step()
        times.append(clock())
        sampling, zero_grad, forward, backward, step = (b - a for a, b in pairwise(times))
        yield sampling, forward, backward, zero_grad + step


def _end_epoch(model: Any, clock: Clock) -> tuple[float | None, float | None]:
    """Do what the trainers do to the model after an epoch; return the seconds of diagnostics and refresh."""
    diagnostics = clock.time(model.diagnostics)[0] if hasattr(model, "diagnostics") else None
    if hasattr(model, "refresh_graphs"):
        return diagnostics, clock.time(model.refresh_graphs)[0]
    if hasattr(model, "update_attentive_A"):
        model.eval()
        with torch.no_grad():
            return diagnostics, clock.time(model.update_attentive_A)[0]
    return diagnostics, None


# -- evaluation -------------------------------------------------------------------------------------------------------


class _FirstBatches(BlockLoader):
    """The first batches of a full-ranking loader."""

    def __init__(self, loader: Any, n_batches: int) -> None:
        self.__dict__.update(BlockLoader.of(loader).__dict__, _n_batches=n_batches)

    def __iter__(self) -> Iterator[Any]:
        return islice(super().__iter__(), self._n_batches)

    def __len__(self) -> int:
        return self._n_batches


def forget_embeddings(model: Any) -> None:
    """Leave a model as a training step leaves it: without cached final embeddings."""
    model.train()
    if hasattr(model, "clear_cache"):
        model.clear_cache()
    for name in ("restore_user_e", "restore_item_e", "restore_entity_e"):  # RecBole's caches
        if hasattr(model, name):
            setattr(model, name, None)


def _evaluate(trainer: Any, valid: Any, clock: Clock, n_batches: int) -> tuple[float, bool]:
    """Return the seconds of ``trainer.evaluate`` on a split, and whether they are scaled up from fewer batches.

    The first batch, which computes the final embeddings, is timed apart.
    """
    forget_embeddings(trainer.model)
    if len(valid) <= n_batches:
        return clock.time(lambda: trainer.evaluate(valid, load_best_model=False))[0], False
    first, _ = clock.time(lambda: trainer.evaluate(_FirstBatches(valid, 1), load_best_model=False))
    some, _ = clock.time(lambda: trainer.evaluate(_FirstBatches(valid, n_batches), load_best_model=False))
    return first + some / n_batches * (len(valid) - 1), True


def _with_batch_size(config: Any, valid: Any, size: int) -> Any:
    before = config["eval_batch_size"]
    config["eval_batch_size"] = size
    try:
        return get_dataloader(config, "valid")(config, valid._dataset, valid._sampler, shuffle=False)
    finally:
        config["eval_batch_size"] = before


# -- sizes ------------------------------------------------------------------------------------------------------------


def _sizes(dataset: Any, train: Any, valid: Any, model: Any) -> dict[str, int]:
    has_kg = dataset.has_kg
    return {
        "users": dataset.user_num - 1,
        "items": dataset.item_num - 1,
        "interactions": dataset.inter_num,
        "training_interactions": len(train._dataset.inter_feat),
        "evaluated_users": len(valid.uid_list),
        "entities": dataset.entity_num - 1 if has_kg else 0,
        "triples": len(dataset.triples) if has_kg else 0,
        "modalities": len(dataset.item_features),
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }


def peak_memory() -> float:
    """Return the peak resident memory of this process in MB.

    Linux' ``VmHWM``: ``ru_maxrss`` of a started process also counts its parent's memory at the start.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / 1e6
    import resource
    import sys

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6
