"""Many runs on the same data: each (model, seed) in a process of its own, finished ones never run again."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import multiprocessing
import os
import resource
import shutil
import signal
import socket
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from recbole_slifmr import __version__
from recbole_slifmr.errors import DataError, SettingError
from recbole_slifmr.files import replace_file, write_json
from recbole_slifmr.paths import PROPERTIES

METRICS = [
    *("Recall", "NDCG", "Precision", "MRR", "Hit", "MAP"),
    *("ItemCoverage", "AveragePopularity", "GiniIndex", "TailPercentage"),
]
TOPK = [5, 10, 20, 50]


@dataclass(frozen=True)
class Task:
    """One run of a study.

    Attributes:
        model: name of the model.
        seed: of the training.
        dataset: name of the data set.
        folder: where the run keeps its files.
        config_files: YAML files of settings, absolute.
        settings: settings that win over the files.
        split_seed: of a random split, the same for all runs.
        test_mask: see :func:`~recbole_slifmr.training.experiment.run`.
        threads: of the CPU; fixed, because sums in another order differ in the last digit.
        label: what the tables call it; the model if empty. The result does not depend on it.
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
        return self.label or self.model

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

    def key(self) -> str:
        """Return a hash of what the result depends on: the task, the content of the settings files, the version."""
        names = ("overall.yaml", f"model/{self.model}.yaml", f"dataset/{self.dataset}.yaml")
        defaults = [PROPERTIES / name for name in names]
        files = [*map(Path, self.config_files), *(file for file in defaults if file.is_file())]
        texts = [file.read_text(encoding="utf-8") for file in files]
        content = {**asdict(self), "folder": None, "files": texts, "version": __version__}
        del content["label"]
        return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()

    @property
    def checkpoint_dir(self) -> Path:
        """Where this process keeps its checkpoint: a run whose driver was killed may still be going in another."""
        return self.folder / f"checkpoint-{os.getpid()}"

    @property
    def arguments(self) -> dict[str, Any]:
        """What :func:`~recbole_slifmr.training.experiment.make_config` takes."""
        quiet = {"show_progress": False, "state": "WARNING", "checkpoint_dir": str(self.checkpoint_dir)}
        return {
            "model": self.model,
            "dataset": self.dataset,
            "config_files": self.config_files,
            "settings": {**self.settings, **quiet, "seed": self.seed, "threads": self.threads},
        }


def run_task(task: Task) -> None:
    """Run a task and leave ``result.json`` and ``per_user.parquet``, or ``error.json``, in its folder.

    Runs in a process of its own. ``progress.jsonl`` gets a line per validated epoch on the way.
    """
    task.folder.mkdir(parents=True, exist_ok=True)
    for name in ("result.json", "error.json", "progress.jsonl"):
        (task.folder / name).unlink(missing_ok=True)
    try:
        from recbole_slifmr.training.experiment import run

        with (task.folder / "progress.jsonl").open("w", buffering=1) as progress:
            result = run(
                **task.arguments,
                split_seed=task.split_seed,
                test_mask=task.test_mask,
                detailed=True,
                on_valid=lambda *point: print(json.dumps(point), file=progress),
            )
        assert result.per_user is not None
        replace_file(task.folder / "per_user.parquet", result.per_user.to_parquet)
        content = {name: value for name, value in vars(result).items() if name != "per_user"}
        content |= {"key": task.key(), "peak_memory_mb": peak_memory_mb()}
        write_json(task.folder / "result.json", content)
    except Exception as error:
        write_json(task.folder / "error.json", {"error": f"{type(error).__name__}: {error}".splitlines()[0]})
        raise SystemExit(1) from None
    finally:
        shutil.rmtree(task.checkpoint_dir, ignore_errors=True)


def peak_memory_mb() -> float:
    """Return the largest resident memory of this process so far, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def read_result(task: Task) -> dict[str, Any] | None:
    """Return the finished result of just this task, or None."""
    path = task.folder / "result.json"
    if not path.is_file():
        return None
    content = json.loads(path.read_text())
    return content if content.get("key") == task.key() else None


def read_error(task: Task) -> str:
    """Return why a task has no result."""
    path = task.folder / "error.json"
    return json.loads(path.read_text())["error"] if path.is_file() else "the process ended without a word"


def read_progress(task: Task) -> list[tuple[int, float, float]]:
    """Return epoch, seconds and validation score of the epochs so far."""
    path = task.folder / "progress.jsonl"
    if not path.is_file():
        return []
    return [tuple(json.loads(line)) for line in path.read_text().splitlines() if line.endswith("]")]


# -- before anything is trained -----------------------------------------------------------------------------------


def check(tasks: Iterable[Task]) -> dict[str, str]:
    """Build data and model of every variant once; return the fingerprint of each split of the first.

    Raises:
        SettingError, DataError: for a model, setting or file that cannot be used, or splits that differ where they must
            not.
    """
    from recbole_slifmr.host.settings import make_config
    from recbole_slifmr.training.experiment import prepare

    seen: dict[str, tuple[str, dict[str, str]]] = {}
    for task in {task.title: task for task in tasks}.values():
        try:
            prepared = prepare(make_config(**task.arguments), task.split_seed)
        except (DataError, SettingError) as error:
            raise type(error)(f"{task.title}: {error}") from error
        finally:
            shutil.rmtree(task.checkpoint_dir, ignore_errors=True)
            with contextlib.suppress(OSError):
                task.folder.rmdir()  # unless an earlier run left its files there
        found = (task.title, prepared.fingerprints())
        _compare(seen.setdefault(task.data, found), found)
    if not seen:
        raise SettingError("no models to run")
    return next(iter(seen.values()))[1]


def _compare(one: tuple[str, dict[str, str]], other: tuple[str, dict[str, str]]) -> None:
    for split, value in one[1].items():
        if other[1][split] != value:
            raise DataError(
                f"{other[0]} and {one[0]} have different {split} splits ({other[1][split]} and {value}): they cannot "
                "be compared; give both the same data settings"
            )


# -- running ------------------------------------------------------------------------------------------------------


def run_all(
    tasks: Sequence[Task],
    jobs: int = 1,
    address: str | None = None,
    on_tick: Callable[[Mapping[str, str]], None] = lambda states: None,
) -> dict[str, str]:
    """Run the tasks that have no result yet; one that fails does not stop the others.

    Args:
        tasks: what to run; tasks with the same folder are one run under several names.
        jobs: how many at a time; more than one runs them as Ray tasks.
        address: of a running Ray cluster that sees the same files.
        on_tick: called about twice a second with the state of each task by name.

    Returns:
        ``{name: "done" | reason of failure}``.
    """
    states = {task.name: "done" if read_result(task) else "waiting" for task in tasks}
    sharing: dict[Path, list[str]] = {}
    for task in tasks:
        sharing.setdefault(task.folder, []).append(task.name)
    waiting = {task.name: task for task in tasks if states[task.name] == "waiting"}
    todo = [task for name, task in waiting.items() if sharing[task.folder][0] == name]
    runner = _run_with_ray(todo, jobs, address) if jobs > 1 or address else _run_serially(todo)
    on_tick(states)
    for name, state in runner:
        states.update(dict.fromkeys(sharing[waiting[name].folder], state))
        on_tick(states)
    return states


def take_over(tasks: Sequence[Task], folders: Iterable[Path]) -> int:
    """Copy finished runs of just these tasks from other outputs; return how many.

    Args:
        tasks: those that have a result already are left alone.
        folders: output folders of benchmarks and studies.

    Raises:
        SettingError: if a folder holds no runs.
    """
    wanted = {task.key(): task for task in tasks if read_result(task) is None}
    count = 0
    for folder in folders:
        if not (folder / "runs").is_dir():
            raise SettingError(f"reuse: {folder} holds no runs of a benchmark or study")
        for file in sorted((folder / "runs").glob("*/result.json")):
            task = wanted.pop(json.loads(file.read_text()).get("key"), None)
            if task is not None:
                task.folder.mkdir(parents=True, exist_ok=True)
                for name in ("progress.jsonl", "per_user.parquet", "result.json"):  # what counts as done comes last
                    replace_file(task.folder / name, partial(shutil.copyfile, file.parent / name))
                count += 1
    return count


def _outcome(task: Task, status: int | None = None) -> str:
    if read_result(task):
        return "done"
    if status is not None and status < 0:
        return f"killed by {signal.Signals(-status).name}" + (" (out of memory?)" if -status == signal.SIGKILL else "")
    return read_error(task)


def _run_serially(tasks: Sequence[Task]) -> Iterable[tuple[str, str]]:
    context = multiprocessing.get_context("spawn")
    for task in tasks:
        yield task.name, "running"
        process = context.Process(target=run_task, args=(task,), daemon=True)
        process.start()
        try:
            while process.is_alive():
                process.join(0.5)
                yield task.name, "running"
        finally:
            process.kill()
            process.join()
        yield task.name, _outcome(task, process.exitcode)


@contextlib.contextmanager
def ray_session(address: str | None = None, n_cpus: int | None = None, dashboard: bool = False) -> Iterator[None]:
    """Connect to the Ray cluster at ``address``, or start one on this machine alone; use a session that is there.

    A cluster of its own listens on loopback only, reports nothing to anybody and opens a dashboard only if asked.

    Raises:
        SettingError: if there is no cluster at the address, or the dashboard is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    from ray._private import ray_constants

    if ray.is_initialized():
        yield
        return
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if address:
            _reach(address)
            ray.init(address=address, **quiet)
        else:
            # What keeps Ray to loopback on Windows and macOS; elsewhere it replaces 127.0.0.1 by a reachable address.
            ray_constants.ENABLE_RAY_CLUSTER = False
            ray.init(address="local", num_cpus=n_cpus, include_dashboard=dashboard, **quiet)
    except (OSError, ValueError) as error:
        raise SettingError(f"no Ray cluster at '{address}': {' '.join(str(error).split())}") from error
    except Exception as error:
        if not dashboard:
            raise
        raise SettingError(f"--dashboard needs pip install 'ray[default]=={ray.__version__}' ({error})") from error
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = True
    try:
        yield
    finally:
        ray.shutdown()


def _reach(address: str) -> None:
    """Raise an OSError if nothing answers at ``host:port``; Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=10).close()


def _run_with_ray(tasks: Sequence[Task], jobs: int, address: str | None) -> Iterable[tuple[str, str]]:
    import ray

    with ray_session(address, jobs):
        remote = ray.remote(num_cpus=1, max_calls=1, max_retries=0)(run_task)
        running = {remote.remote(task): task for task in tasks}
        while running:
            ready, _ = ray.wait(list(running), timeout=0.5)
            for reference in ready:
                task = running.pop(reference)
                with contextlib.suppress(ray.exceptions.RayError):  # the folder says what happened
                    ray.get(reference)
                yield task.name, _outcome(task)
            for task in running.values():
                yield task.name, "running" if read_progress(task) else "waiting"


def collect(tasks: Sequence[Task]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return one row per finished run, and one per finished run and user.

    Raises:
        DataError: if the runs saw different data.
    """
    rows, users = [], []
    seen: dict[str, tuple[str, dict[str, str]]] = {}
    for task in tasks:
        result = read_result(task)
        if result is None:
            continue
        found = (task.name, result["fingerprints"])
        _compare(seen.setdefault(task.data, found), found)
        scores = {f"{split}_{name}": value for split in ("valid", "test") for name, value in result[split].items()}
        rows.append(
            {
                "model": task.title,
                "seed": task.seed,
                **scores,
                "epochs": result["n_epochs"],
                "best_epoch": max(result["curve"], key=lambda point: point[2])[0] if result["curve"] else None,
                "seconds": result["seconds"],
                "seconds_per_epoch": result["seconds"] / max(result["n_epochs"], 1),
                "peak_memory_mb": result["peak_memory_mb"],
                "n_parameters": result["n_parameters"],
                **_from_traces(result),
            }
        )
        frame = pd.read_parquet(task.folder / "per_user.parquet").reset_index()
        users.append(frame.assign(model=task.title, seed=task.seed))
    return pd.DataFrame(rows), pd.concat(users, ignore_index=True) if users else pd.DataFrame()


def _from_traces(result: Mapping[str, Any]) -> dict[str, float]:
    """Return refreshes, their seconds and the signs of failure at the best epoch, as far as the model has them."""
    found: dict[str, float] = {}
    traces = result.get("traces", {})
    if "refreshes" in traces:
        seconds = [entry["seconds"] for entry in traces["refreshes"]]
        found |= {"refreshes": len(seconds), "refresh_seconds": sum(seconds)}
    best = max(result["curve"], key=lambda point: point[2])[0] if result["curve"] else None
    for entry in traces.get("diagnostics", ()):
        if entry["epoch"] == best:
            found |= {name: value for name, value in entry.items() if name != "epoch"}
    return found
