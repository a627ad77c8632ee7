"""What a hyper-parameter search tries: settings in, plan out; what cannot be used is refused here."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from recbole.config import Config
from recbole.utils.argument_list import dataset_arguments

from recbole_slifmr.errors import SettingError, UnknownSettingWarning
from recbole_slifmr.host.settings import make_config, unknown_settings
from recbole_slifmr.paths import PROPERTIES
from recbole_slifmr.search.space import Point, Space, draw, ends, grid, read_space, start
from recbole_slifmr.study.identity import input_hashes
from recbole_slifmr.training.evaluation import MASKS
from recbole_slifmr.training.experiment import read_threads

SCHEDULERS = ("asha", "none", "pbt")
SEARCHES = ("random", "optuna", "grid")
# What makes trials comparable: one value for all.
PROTOCOL = ("model", "dataset", "data_path", "seed", "epochs", "eval_step", "stopping_step", "eval_args", "metrics",
            "topk", "valid_metric", "valid_metric_bigger", "reproducibility", "threads", "gpu_id", "checkpoint_dir",
            "benchmark_filename", "load_col", "user_inter_num_interval", "item_inter_num_interval", "val_interval",
            "filter_inter_by_user_or_item", "threshold", "rm_dup_inter")  # fmt: skip
# What the loaders depend on: searched over, every trial reads the data for itself.
DATA = {
    *dataset_arguments,
    "modalities",
    "feature_path",
    "feature_missing",
    "use_kg",
    "use_features",
    "train_neg_sample_args",
    "repeatable",
}


@dataclass(frozen=True)
class Search:
    """What a search tries, and where its files go.

    Attributes:
        model: name of the model.
        dataset: name of the data set.
        space: domain by setting.
        out: folder of the outputs, absolute.
        config_files: YAML files of settings, absolute.
        settings: settings of all trials, which win over the files; the point of a trial wins over both.
        trials: how many.
        scheduler: ``asha`` stops bad trials early, ``pbt`` has them go on from better ones, ``none`` lets them be.
        search: ``random`` (the model's own settings first), ``optuna`` (TPE) or ``grid``.
        seeds: how many seeds the winner is scored on test with; 0 leaves test alone.
        seed: of the trainings, of the split and of the search.
        test_mask: see :func:`~recbole_slifmr.training.experiment.run`.
    """

    model: str
    dataset: str
    space: Space
    out: Path
    config_files: tuple[str, ...]
    settings: Mapping[str, Any]
    trials: int
    scheduler: str
    search: str
    seeds: int
    seed: int
    test_mask: str

    def config(self, point: Point | None = None, **more: Any) -> Config:
        """Return RecBole's configuration of a trial, or what all trials share."""
        with _cuda_devices_kept():
            settings = {**self.settings, **(point or {}), **more}
            return make_config(self.model, self.dataset, self.config_files, settings)

    @functools.cached_property
    def bigger(self) -> bool:
        """Whether a bigger validation score is better."""
        return bool(self.config()["valid_metric_bigger"])

    @functools.cached_property
    def threads(self) -> int | None:
        """The CPU threads that all trials are given; None if that depends on their share of the CPUs."""
        return self.config()["threads"]

    def points(self) -> list[Point] | None:
        """Return what is tried: the grid, or what a random search draws; None if Optuna chooses on the way.

        The first point of a random search has the settings that the model has without one.
        """
        if self.search == "optuna":
            return None
        if self.search == "grid":
            return grid(self.space)
        config = self.config()
        first = start(self.space, {name: config[name] for name in self.space})
        return draw(self.space, self.trials, self.seed, first)

    @functools.cached_property
    def metric(self) -> str:
        """What trials are compared by."""
        return self.config()["valid_metric"].lower()

    @property
    def reports(self) -> Path:
        """Where what the trials reported is written down."""
        return self.out / "reports"

    @property
    def folder(self) -> Path:
        """Where Ray keeps the trials."""
        return self.out / "trials"

    @property
    def state(self) -> Path:
        """What a search that is interrupted goes on from."""
        return self.out / "state.zip"

    def identity(self) -> dict[str, Any]:
        """Return what a search that is resumed must share with its beginning, as JSON; data and code as hashes."""
        files = [Path(file).read_text(encoding="utf-8") for file in self.config_files]
        content = {**asdict(self), "out": None, "seeds": None, "test_mask": None, "config_files": files}
        content["data or code"] = input_hashes(self.model, self.dataset, self.config_files, self.settings)
        return json.loads(json.dumps(content, default=str))


def make_search(
    model: str,
    dataset: str,
    space: str | Path | Space | None = None,
    out: str | Path = "tune",
    config_files: Sequence[str | Path] = (),
    settings: Mapping[str, Any] | None = None,
    trials: int = 50,
    scheduler: str = "asha",
    search: str = "random",
    seeds: int = 1,
    test_mask: str = MASKS[0],
) -> Search:
    """Return what a search will try.

    Args:
        model: name of a model of this package or of RecBole.
        dataset: name of the data set's folder under ``data_path``.
        space: file of a search space, or the space itself; that in ``properties/tune`` if None.
        out: folder of the outputs.
        config_files: YAML files of settings for all trials.
        settings: settings for all trials, which win over the files.
        trials: how many trials.
        scheduler: ``asha``, ``none`` or ``pbt``.
        search: ``random``, ``optuna`` or ``grid``.
        seeds: how many seeds the winner is scored on test with.
        test_mask: ``train_valid`` or ``train``, see :func:`~recbole_slifmr.training.experiment.run`.

    Raises:
        SettingError: for anything that cannot be used.
    """
    for name, value, known in (("scheduler", scheduler, SCHEDULERS), ("search", search, SEARCHES),
                               ("test_mask", test_mask, MASKS)):  # fmt: skip
        if value not in known:
            raise SettingError(f"{name} must be one of {', '.join(known)}, not '{value}'")
    if trials < 1 or seeds < 0:
        raise SettingError("trials must be at least 1 and seeds at least 0")
    if scheduler == "pbt" and (search == "optuna" or trials < 2):
        raise SettingError(
            "pbt changes the settings of trials itself: give it search random or grid and 2 trials or more"
        )
    given = dict(settings or {})
    if "data_path" in given:
        if not isinstance(given["data_path"], (str, os.PathLike)):
            raise SettingError(f"data_path must be the folder above that of the data set, not {given['data_path']!r}")
        given["data_path"] = str(Path(given["data_path"]).resolve())
    files = tuple(str(Path(file).resolve()) for file in config_files)
    with _cuda_devices_kept():
        config = make_config(model, dataset, files, given)
    read_threads(config)
    plan = Search(model, dataset, _find_space(space, model), Path(out).resolve(), files, given, trials, scheduler,
                  search, seeds, config["seed"], test_mask)  # fmt: skip
    _check(plan, config)
    if search == "grid" and len(grid(plan.space)) > trials:
        raise SettingError(f"the grid has {len(grid(plan.space))} points, more than the {trials} trials: raise trials")
    return plan


def _find_space(space: str | Path | Space | None, model: str) -> Space:
    if isinstance(space, dict):
        return space
    if space is None:
        shipped = PROPERTIES / "tune" / f"{model}.yaml"
        if not shipped.is_file():
            raise SettingError(f"there is no search space for {model} in {shipped.parent}: name a file with --space")
        return read_space(shipped)
    return read_space(space)


def _check(search: Search, config: Config) -> None:
    """Refuse a space with settings that the model does not know, of the wrong type, or that trials must share."""
    for name in search.space:
        if name in PROTOCOL:
            raise SettingError(f"search space: {name} must be the same for all trials")
        if name in search.settings:
            raise SettingError(f"{name} is in the search space and given as well: leave out one of them")
    if not config["eval_step"] or config["eval_step"] > config["epochs"]:
        raise SettingError(f"eval_step: {config['eval_step']} leaves the {config['epochs']} epochs without validation")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnknownSettingWarning)
        for point in ends(search.space):
            messages = unknown_settings(search.config(point))
            if messages:
                raise SettingError(f"search space: {messages[0]}")


@contextlib.contextmanager
def _cuda_devices_kept() -> Iterator[None]:
    """Undo RecBole's choice of GPUs, which it writes into the environment: the trials' GPUs are Ray's choice."""
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    try:
        yield
    finally:
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)
        if before is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = before
