"""Repairs of how RecBole runs."""

from __future__ import annotations

import importlib
import logging
import math
import sys
import warnings

import numpy as np
import pytest

from recbole_slifmr.host import compat
from repairs.tiny import apply_only, check, settings, start, succeeds


@check
def check_numpy_aliases() -> None:
    """`Config` cannot be built without the aliases."""
    compat.apply(skip={"numpy_aliases"})
    for name in ("float_", "complex_", "unicode_", "float"):
        vars(np).pop(name, None)  # numpy 1 has three of them
    with pytest.raises(AttributeError, match="float_"):
        settings("BPR")
    assert apply_only("numpy_aliases") == ["numpy_aliases"]
    assert np.float is np.float64  # before any Config: worker processes build none
    assert settings("BPR")["model"] == "BPR"
    assert (np.float_, np.complex_, np.unicode_) == (np.float64, np.complex128, np.str_)


@check
def check_metric_inputs() -> None:
    """Metrics that need counts crash without the repair."""
    metrics = ["ItemCoverage", "AveragePopularity", "GiniIndex", "TailPercentage", "Recall"]
    compat.apply(skip={"metric_inputs"})
    trainer, (train, valid, test) = start("BPR", metrics=metrics, valid_metric="Recall@5")
    with pytest.raises(AttributeError, match="cpu"):
        trainer.fit(train, valid, verbose=False)
    assert apply_only("metric_inputs") == ["metric_inputs"]
    trainer, (train, valid, test) = start("BPR", metrics=metrics, valid_metric="Recall@5")
    trainer.fit(train, valid, verbose=False)
    first, second = trainer.evaluate(test), trainer.evaluate(test)  # the counts are kept between the two
    assert first == second
    assert 0 < first["itemcoverage@5"] <= 1
    assert first["averagepopularity@5"] > 0
    assert len(first) == len(metrics)


@check
def check_knowledge_loader_dataset() -> None:
    """Knowledge-aware models crash with metrics that need counts, without the repair."""
    compat.apply(skip={"knowledge_loader_dataset"})
    changes = {"metrics": ["Recall", "ItemCoverage"], "valid_metric": "Recall@5"}
    trainer, (train, valid, _) = start("CKE", **changes)
    with pytest.raises(AttributeError, match="dataset"):
        trainer.fit(train, valid, verbose=False)
    assert apply_only("knowledge_loader_dataset") == ["knowledge_loader_dataset"]
    assert 0 < trainer.fit(train, valid, verbose=False)[1]["itemcoverage@5"] <= 1


@check
def check_flops_estimate() -> None:
    """A model without `predict` ends a run without the repair; Ray is not imported for it."""
    import recbole.utils
    from recbole.data.transform import construct_transform

    compat.apply(skip={"flops_estimate"})
    trainer, (train, _, _) = start("BPR")
    transform, logger = construct_transform(trainer.config), logging.getLogger("flops")
    arguments = (trainer.model, train._dataset, trainer.config["device"], logger, transform)
    right = recbole.utils.get_flops(*arguments)
    assert right > 0
    type(trainer.model).predict = lambda self, interaction: 1 / 0
    with pytest.raises(ZeroDivisionError):
        recbole.utils.get_flops(*arguments)

    def after_quick_start() -> None:
        quick_start = importlib.import_module("recbole.quick_start.quick_start")
        apply_only("flops_estimate")
        assert math.isnan(quick_start.get_flops(*arguments))

    succeeds(after_quick_start)
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    assert apply_only("flops_estimate") == ["flops_estimate"]
    assert not messages
    assert math.isnan(recbole.utils.get_flops(*arguments))
    assert "BPR" in messages[0]
    assert "ZeroDivisionError" in messages[0]
    assert "ray" not in sys.modules
    assert "recbole.quick_start" not in sys.modules


@check
def check_amp_warnings() -> None:
    """Each epoch warns of old names without the repair."""

    def warned(model: str) -> bool:
        trainer, (train, valid, _) = start(model)
        with warnings.catch_warnings(record=True) as raised:
            warnings.simplefilter("always")
            trainer.fit(train, valid, verbose=False, saved=False)
        return any("torch.cuda.amp" in str(warning.message) for warning in raised)

    compat.apply(skip={"amp_warnings"})
    assert warned("BPR")
    assert warned("NCL")
    assert apply_only("amp_warnings") == ["amp_warnings"]
    assert not warned("BPR")
    assert not warned("NCL")
