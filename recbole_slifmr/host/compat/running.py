"""Repairs of what every run needs: names of numpy and torch, metrics, loaders."""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import sys
import types
from typing import Any

import numpy as np
import torch
from recbole.config import Config
from recbole.data.dataloader.knowledge_dataloader import KnowledgeBasedDataLoader
from recbole.evaluator.collector import Collector, DataStruct

from recbole_slifmr.host.compat.registry import refers_to, repair


@repair
def numpy_aliases() -> bool:
    """Add the numpy names that `Config` (`configurator.py`) and the metrics read.

    `Config.compatibility_settings` copies `np.float_`, `np.complex_` and `np.unicode_`, gone from numpy 2: no
    run starts (#2215). It makes `np.float` of the first, which `Interaction` and the metrics read even in a
    process that builds no `Config`. Not needed once RecBole stops naming them.
    """
    settings = getattr(Config, "compatibility_settings", None)
    if settings is None or not refers_to(settings, "float_"):
        return False
    aliases = {"float_": np.float64, "complex_": np.complex128, "unicode_": np.str_, "float": np.float64}
    missing = [name for name in aliases if name not in vars(np)]
    for name in missing:
        setattr(np, name, aliases[name])
    return bool(missing)


@repair
def metric_inputs() -> bool:
    """Let metrics that need counts run (`collector.py`), such as ItemCoverage and AveragePopularity.

    `Collector.get_data_struct` calls `.cpu()` on all it holds, and an int or a Counter has none (#2131,
    #2191). Not needed once it moves tensors only.
    """
    original, probe = Collector.get_data_struct, Collector.__new__(Collector)
    probe.data_struct = DataStruct()
    probe.data_struct.set("data.num_items", 1)
    with contextlib.suppress(AttributeError):
        original(probe)
        return False

    @functools.wraps(original)
    def get_data_struct(self: Any) -> Any:
        held = self.data_struct._data_dict
        others = {key: held.pop(key) for key in list(held) if not isinstance(held[key], torch.Tensor)}
        returned = original(self)
        for struct in (self.data_struct, returned):
            struct._data_dict.update(others)
        return returned

    Collector.get_data_struct = get_data_struct
    return True


@repair
def knowledge_loader_dataset() -> bool:
    """Give the loader of knowledge-aware models (`knowledge_dataloader.py`) the `dataset` that others have.

    `Collector.data_collect` reads `train_data.dataset` for metrics that need counts, but this loader only has
    `_dataset`: the run crashes (#1743). Not needed once it has both.
    """
    if hasattr(KnowledgeBasedDataLoader, "dataset"):
        return False
    KnowledgeBasedDataLoader.dataset = property(lambda self: self._dataset)
    return True


@repair
def flops_estimate() -> bool:
    """Keep a failing estimate of a model's cost (`get_flops`, `utils.py`) from ending the run.

    It needs thop, which needs distutils (gone from Python 3.12), and it copies the model to call `predict`,
    which not every model has. A failure is logged and the estimate is nan. `quick_start` imports Ray, so it
    is changed only if it is loaded already. Not needed once `get_flops` catches its failures.
    """
    utils = importlib.import_module("recbole.utils.utils")
    original, quiet = utils.get_flops, logging.Logger("probe", logging.CRITICAL)
    with contextlib.suppress(Exception):
        original(types.SimpleNamespace(type=None), None, None, quiet, None)
        return False

    @functools.wraps(original)
    def get_flops(model: Any, dataset: Any, device: Any, logger: Any, *args: Any, **kwargs: Any) -> float:
        try:
            return original(model, dataset, device, logger, *args, **kwargs)
        except Exception as error:
            logger.warning(f"FLOPs of {type(model).__name__} unknown: {type(error).__name__}: {error}")
            return float("nan")

    for name in ("recbole.utils.utils", "recbole.utils", "recbole.quick_start.quick_start"):
        if getattr(sys.modules.get(name), "get_flops", None) is original:
            vars(sys.modules[name])["get_flops"] = get_flops
    return True


@repair
def amp_warnings() -> bool:
    """Use torch's current names for mixed precision in the trainers (`trainer.py`).

    `torch.cuda.amp.GradScaler` and `autocast` are deprecated and warn in each epoch; the new names do the
    same. Not needed once RecBole leaves `torch.cuda.amp`, or where torch has no new names.
    """
    trainer: Any = importlib.import_module("recbole.trainer.trainer")
    if getattr(trainer, "amp", None) is not torch.cuda.amp or not hasattr(torch.amp, "GradScaler"):
        return False
    trainer.amp = types.SimpleNamespace(
        GradScaler=functools.partial(torch.amp.GradScaler, "cuda"),
        autocast=functools.partial(torch.amp.autocast, "cuda"),
    )
    return True
