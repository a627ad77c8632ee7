"""One run of a benchmark, study or search: what it is, how it is run, and what it leaves in its folder."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import multiprocessing.connection
import os
import shutil
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from recbole_slifmr.data.dataset import SETTINGS
from recbole_slifmr.errors import DataError, one_line
from recbole_slifmr.files import read_lines, replace_file, to_json, write_json
from recbole_slifmr.host.own import name_of
from recbole_slifmr.study.identity import input_hashes
from recbole_slifmr.training.memory import peak_memory_mb
from recbole_slifmr.training.shared import SharedData


@dataclass(frozen=True)
class Task:
    """One run of a study.

    Attributes:
        model: name of the model, or ``package.module:Class`` of one of the user's own.
        seed: of the training.
        dataset: name of the data set.
        folder: where the run keeps its files.
        config_files: YAML files of settings, absolute.
        settings: settings that win over the files.
        split_seed: of a random split, the same for all runs.
        test_mask: see :func:`~recbole_slifmr.training.experiment.run`.
        threads: of the CPU; fixed, because sums in another order differ in the last digit.
        label: what the tables call it; the model or its class if empty. The result does not depend on it.
    """

    model: str
    seed: int
    dataset: str
    folder: Path
    config_files: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    split_seed: int = 2020
    test_mask: str = "train_valid"
    threads: int = 1
    label: str = ""

    @property
    def title(self) -> str:
        """What the tables call it."""
        return self.label or name_of(self.model)

    @property
    def name(self) -> str:
        """Title and seed."""
        return f"{self.title}-{self.seed}"

    @property
    def data(self) -> str:
        """What the training data depend on beside the data set: runs with the same must have the same splits."""
        given: dict[str, Any] = {}
        for file in self.config_files:
            given |= yaml.safe_load(Path(file).read_text(encoding="utf-8"))
        given |= self.settings
        noise = given.get("noise")
        return json.dumps([noise, self.seed if noise else None, given.get("cold_items")], sort_keys=True)

    @property
    def inputs(self) -> str:
        """What the other inputs depend on: runs with the same must have read the same features and knowledge graph."""
        own = {name: self.settings.get(name) for name in SETTINGS}
        return json.dumps([self.data, own], sort_keys=True, default=str)

    def settings_key(self) -> str:
        """Return a hash of all that was asked for: the task and the content of the settings files."""
        texts = [Path(file).read_text(encoding="utf-8") for file in self.config_files]
        content = {**asdict(self), "folder": None, "label": None, "config_files": texts}
        return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()

    def key(self) -> str:
        """Return a hash of what the result depends on: what was asked for, the data that is read, the code.

        Raises:
            SettingError: for a model or setting that cannot be used.
        """
        return hashlib.sha256(
            json.dumps([self.settings_key(), self.input_hashes()], sort_keys=True).encode()
        ).hexdigest()

    def input_hashes(self) -> dict[str, str]:
        """Return the hash of each file that the run reads, see :func:`~recbole_slifmr.study.identity.input_hashes`."""
        return input_hashes(self.model, self.dataset, self.config_files, self.settings)

    def checkpoint_dir(self, process: int | None = None) -> Path:
        """Return where a process, this one if None, keeps its checkpoint: no two share one."""
        return self.folder / f"checkpoint-{os.getpid() if process is None else process}"

    @property
    def arguments(self) -> dict[str, Any]:
        """What :func:`~recbole_slifmr.training.experiment.make_config` takes."""
        quiet = {"show_progress": False, "state": "WARNING", "checkpoint_dir": str(self.checkpoint_dir())}
        return {
            "model": self.model,
            "dataset": self.dataset,
            "config_files": self.config_files,
            "settings": {**self.settings, **quiet, "seed": self.seed, "threads": self.threads},
        }


class Point(NamedTuple):
    """A validation on the way.

    Attributes:
        epoch: its number.
        seconds: since training began.
        score: of the validation.
        best: whether the trainer keeps this epoch rather than those before it.
    """

    epoch: int
    seconds: float
    score: float
    best: bool


def run_task(task: Task, devices: str | None = None, shared: SharedData | None = None) -> None:
    """Run a task and leave ``result.json`` and ``per_user.parquet``, or ``error.json``, in its folder.

    Runs in a process of its own. ``progress.jsonl`` gets a line per validated epoch on the way.

    Args:
        task: what to run.
        devices: the GPUs to use, as ``gpu_id``; what the settings say if None.
        shared: the data that it reads; they are read here if None, or if a file has changed since.
    """
    arguments = task.arguments
    if devices is not None and arguments["settings"].get("gpu_id") != "":
        arguments["settings"]["gpu_id"] = devices
    if multiprocessing.parent_process() is not None:  # else it is in Ray's hands
        _end_with_driver(task)
        multiprocessing.set_start_method(None, force=True)  # the loaders' processes start as outside a benchmark
    task.folder.mkdir(parents=True, exist_ok=True)
    names = ("result.json", "error.json", "progress.jsonl")
    for file in (*(task.folder / name for name in names), *task.folder.glob("*.part")):
        file.unlink(missing_ok=True)
    try:
        from recbole_slifmr.training.experiment import run

        key = task.key()
        splits = None if shared is None else shared.read(task.input_hashes())
        with (task.folder / "progress.jsonl").open("w", buffering=1) as progress:
            result = run(
                **arguments,
                split_seed=task.split_seed,
                test_mask=task.test_mask,
                detailed=True,
                on_valid=lambda *point: print(to_json(point), file=progress),
                splits=splits,
            )
        if task.key() != key:
            raise DataError("its data, settings or code changed while it ran: start it again")
        assert result.per_user is not None
        replace_file(task.folder / "per_user.parquet", result.per_user.to_parquet)
        content = {name: value for name, value in vars(result).items() if name != "per_user"}
        content |= {"key": key, "peak_memory_mb": peak_memory_mb()}
        write_json(task.folder / "result.json", content)
    except Exception as error:
        write_json(task.folder / "error.json", {"error": one_line(error)})
        raise SystemExit(1) from None
    finally:
        shutil.rmtree(task.checkpoint_dir(), ignore_errors=True)


def _end_with_driver(task: Task) -> None:
    """Have this process end as soon as the one that started it is gone: a rerun would do the same work beside it."""
    driver = multiprocessing.parent_process()
    assert driver is not None

    def wait() -> None:
        multiprocessing.connection.wait([driver.sentinel])
        shutil.rmtree(task.checkpoint_dir(), ignore_errors=True)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def read_result(task: Task) -> dict[str, Any] | None:
    """Return the finished result of just this task, or None."""
    content = _read_content(task)
    if content is None or not (task.folder / "per_user.parquet").is_file():
        return None
    return content if content.get("key") == task.key() else None


def _read_content(task: Task) -> dict[str, Any] | None:
    """Return what ``result.json`` holds, None if there is none or it cannot be read."""
    try:
        content = json.loads((task.folder / "result.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def read_error(task: Task) -> str:
    """Return why a task has no result."""
    path = task.folder / "error.json"
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))["error"]
    if _read_content(task) is not None:
        return "its data, settings or code changed after it ran: run it again"
    return "its process ended without a result or an error message"


def read_progress(task: Task) -> list[Point]:
    """Return the validations so far."""
    values = read_lines(task.folder / "progress.jsonl")
    points = [Point(*value) for value in values if isinstance(value, list) and len(value) == len(Point._fields)]
    return [point._replace(score=number(point.score)) for point in points]


def number(value: float | None) -> float:
    """Return a number read from JSON, which has null in the place of NaN."""
    return float("nan") if value is None else value
