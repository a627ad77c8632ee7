"""All repairs together."""

from __future__ import annotations

import contextlib
import importlib
import math
import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import scipy.sparse as sp
import torch

from recbole_slifmr.host import compat
from repairs.tiny import MODELS, check, scores, short_run, start


@check
def check_apply() -> None:
    """All repairs are made once, and a second call changes nothing."""
    from recbole.model.knowledge_aware_recommender import KGIN
    from recbole.trainer import Trainer

    assert compat.apply() == list(compat.REPAIRS)
    before = dict(vars(Trainer)), dict(vars(KGIN)), len(torch.serialization.get_safe_globals())
    assert compat.apply() == []
    assert (dict(vars(Trainer)), dict(vars(KGIN)), len(torch.serialization.get_safe_globals())) == before
    with pytest.raises(ValueError, match="no_such_repair"):
        compat.apply(skip={"no_such_repair"})
    assert "ray" not in sys.modules


@check
def check_not_needed() -> None:
    """Where RecBole or a library is already right, nothing is changed."""
    from recbole.config import Config
    from recbole.data.dataloader.abstract_dataloader import AbstractDataLoader, NegSampleDataLoader
    from recbole.data.dataloader.knowledge_dataloader import KnowledgeBasedDataLoader
    from recbole.evaluator.collector import Collector
    from recbole.model.general_recommender import NCL
    from recbole.model.knowledge_aware_recommender import KGAT, KGIN, MCCLK
    from recbole.trainer import NCLTrainer, Trainer

    trainer, utils = (
        importlib.import_module("recbole.trainer.trainer"),
        importlib.import_module("recbole.utils.utils"),
    )
    logger = importlib.import_module("recbole.utils.logger")

    def init(self: Any, config: Any, model: Any) -> None:
        torch.distributed.broadcast_object_list([])

    Config.compatibility_settings = lambda self: None
    sp.dok_matrix._update = lambda self, data: None
    sys.modules["dgl"] = types.SimpleNamespace(edge_subgraph=lambda graph, edges, preserve_nodes: None)
    sys.modules["torch_scatter"] = types.ModuleType("present")
    NCL.run_kmeans = lambda self, x: (x, x)
    Trainer._save_checkpoint = lambda self, epoch: os.replace("a", "b")
    KGIN.other_parameter = MCCLK.other_parameter = KGAT.other_parameter = lambda self: {}
    for module in (trainer, logger, utils):
        module.get_local_time = lambda: os.urandom(4).hex()
    Trainer.__init__ = init
    Collector.get_data_struct = lambda self: self.data_struct
    KnowledgeBasedDataLoader.dataset = None
    utils.get_flops = lambda *args, **kwargs: 0
    utils.ensure_dir = lambda path: os.makedirs(path, exist_ok=True)
    trainer.amp = torch.amp
    Config._init_device = lambda self: None
    trainer.AbstractTrainer.__init__ = lambda self, config, model: {"broadcast_buffers": False}
    AbstractDataLoader.__init__ = lambda self, *args: None
    NegSampleDataLoader._neg_sampling = lambda self, inter_feat: torch.zeros(1).cpu()
    Trainer._map_reduce = lambda self, result, num_sample: result
    NCLTrainer.fit = lambda self, train_data: train_data.get_model(self.model)
    torch.autograd.set_detect_anomaly(False)
    for name in compat.files.READERS:
        vars(importlib.import_module(name))["torch"] = types.SimpleNamespace(cuda=torch.cuda)
    for name, attribute in compat.files.PICKLES:
        vars(importlib.import_module(name))[attribute] = None
    for name in compat.files.EVALUATE:
        vars(importlib.import_module(name))["eval"] = None
    assert compat.apply() == []
    del sp.dok_matrix._update  # and with the fault back, so is the repair
    assert compat.apply() == ["bipartite_adjacency"]


@check
def check_models() -> None:
    """Every model trains for an epoch, is saved, loaded and tested; its saved scores come back."""
    importlib.import_module("recbole.quick_start")

    compat.apply()
    from recbole.quick_start import load_data_and_model, run_recbole

    for model in MODELS:
        trainer, (train, valid, test) = start(model, metrics=["Recall", "NDCG", "ItemCoverage"])
        _, best = trainer.fit(train, valid, verbose=False)
        before = scores(trainer)
        for parameter in trainer.model.parameters():
            parameter.data.zero_()
        result = trainer.evaluate(test)
        assert result.keys() == best.keys(), model
        assert all(math.isfinite(value) for value in [*best.values(), *result.values()]), model
        torch.testing.assert_close(scores(trainer), before, rtol=0, atol=0, msg=model)
    with open(os.devnull, "w") as sink, contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
        for model in ("BPR", "KGIN"):
            result = run_recbole(model, "tiny", config_dict=short_run())
            assert math.isfinite(result["best_valid_score"]), model
            newest = max(Path("saved").glob(f"{model}-*.pth"), key=os.path.getmtime)
            assert load_data_and_model(str(newest))[0]["model"] == model
