"""Many runs on the same data: each (model, seed) in a process of its own, finished ones never run again."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import math
import multiprocessing
import os
import shutil
import signal
import socket
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from multiprocessing import forkserver
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from recbole_slifmr.errors import DataError, SettingError, one_line
from recbole_slifmr.files import replace_file
from recbole_slifmr.study.store import DataStore
from recbole_slifmr.study.task import Task, number, read_error, read_progress, read_result, run_task
from recbole_slifmr.training.shared import SharedData

METRICS = [
    *("Recall", "NDCG", "Precision", "MRR", "Hit", "MAP"),
    *("ItemCoverage", "AveragePopularity", "GiniIndex", "TailPercentage"),
]
TOPK = [5, 10, 20, 50]
STARTING = "starting"  # from its process to its first validation


# -- before anything is trained -----------------------------------------------------------------------------------


class Checked(NamedTuple):
    """What all runs read.

    Attributes:
        fingerprints: hash of each split of the first run; see :func:`~recbole_slifmr.training.fingerprint.fingerprint`.
        inputs: hash of the knowledge graph and the features that runs like the first read.
    """

    fingerprints: dict[str, str]
    inputs: dict[str, str]


def check(
    tasks: Iterable[Task], data: DataStore | None = None, tell: Callable[[str], None] = lambda words: None
) -> Checked:
    """Read the data of every variant, each data set once, and check its settings; return what they read.

    Args:
        tasks: what is to run; one of each title is checked.
        data: keeps what is read, for the runs.
        tell: called with what is being done.

    Raises:
        SettingError, DataError: for a model, setting or file that cannot be used, splits, features or knowledge graphs
            that differ where they must not, or full and sampled ranking side by side.
    """
    from recbole_slifmr.host.settings import make_config
    from recbole_slifmr.training.experiment import check_model

    same, data = _SameData(), DataStore() if data is None else data
    modes: dict[str, str] = {}
    one_each = {task.title: task for task in tasks}
    for place, task in enumerate(one_each.values(), 1):
        tell(f"checking {task.title} ({place} of {len(one_each)})")
        try:
            config = make_config(**task.arguments)
            seen = data.see(task, config, tell)
            check_model(config, seen.train)
        except (DataError, SettingError) as error:
            raise type(error)(f"{task.title}: {error}") from error
        finally:
            shutil.rmtree(task.checkpoint_dir(), ignore_errors=True)
            with contextlib.suppress(OSError):
                task.folder.rmdir()  # unless an earlier run left its files there
        modes.setdefault(str(config["eval_args"]["mode"]), task.title)
        if len(modes) > 1:
            (one, first), (other, second) = modes.items()
            raise SettingError(
                f"{first} is scored by the ranking mode {one} and {second} by {other}: their scores cannot stand in "
                "one table; give both the same mode in eval_args"
            )
        if not seen.ranks_all:
            raise SettingError(
                f"{task.title}: scores by user and group need all items ranked, not a sample of them: give eval_args "
                "the mode full"
            )
        same.compare(task, task.title, seen.fingerprints, seen.inputs)
    if not modes:
        raise SettingError("no models to run")
    data.forget()
    return same.first()


class _SameData:
    """Refuses runs side by side that have read different data where they must not."""

    def __init__(self) -> None:
        self.splits: dict[str, tuple[str, dict[str, str]]] = {}
        self.read: dict[str, dict[str, tuple[str, str]]] = {}

    def compare(self, task: Task, name: str, fingerprints: dict[str, str], inputs: Mapping[str, str]) -> None:
        """Compare what a run has read with what those before it have.

        Raises:
            DataError: if they differ.
        """
        other, seen = self.splits.setdefault(task.data, (name, fingerprints))
        for split, value in fingerprints.items():
            if seen[split] != value:
                self._refuse(name, other, f"{split} splits", value, seen[split])
        read = self.read.setdefault(task.inputs, {})
        for what, value in inputs.items():
            other, before = read.setdefault(what, (name, value))
            if before != value:
                self._refuse(name, other, f"versions of the {what}", value, before)

    @staticmethod
    def _refuse(one: str, other: str, what: str, value: str, before: str) -> None:
        raise DataError(
            f"{one} and {other} have different {what} ({value} and {before}): they cannot be compared; give both the "
            "same data settings"
        )

    def first(self) -> Checked:
        """Return what the first run has read, and those with the same settings of the data."""
        inputs = next(iter(self.read.values()))
        return Checked(next(iter(self.splits.values()))[1], {what: value for what, (_, value) in inputs.items()})


# -- running ------------------------------------------------------------------------------------------------------


def run_all(
    tasks: Sequence[Task],
    jobs: int = 1,
    address: str | None = None,
    on_tick: Callable[[Mapping[str, str]], None] = lambda states: None,
    data: DataStore | None = None,
) -> dict[str, str]:
    """Run the tasks that have no result yet; one that fails does not stop the others.

    Args:
        tasks: what to run, each under a name of its own; tasks with the same folder are one run under several names.
        jobs: how many at a time; more than one runs them as Ray tasks.
        address: of a running Ray cluster that sees the same files.
        on_tick: called about twice a second with the state of each task by name.
        data: what :func:`check` was given; each run reads its own if None.

    Returns:
        ``{name: "done" | reason of failure}``, an entry per task. One that is done has a result that belongs to it.
    """
    _check_distinct(tasks)
    states = {task.name: "done" if read_result(task) else "waiting" for task in tasks}
    sharing: dict[Path, list[str]] = {}
    for task in tasks:
        sharing.setdefault(task.folder, []).append(task.name)
    waiting = {task.name: task for task in tasks if states[task.name] == "waiting"}
    todo = [task for name, task in waiting.items() if sharing[task.folder][0] == name]
    data = data or DataStore()
    runner = _run_with_ray(todo, jobs, address, data) if jobs > 1 or address else _run_serially(todo, data)
    on_tick(states)
    for name, state in runner:
        states.update(dict.fromkeys(sharing[waiting[name].folder], state))
        on_tick(states)
    for task in tasks:
        if states[task.name] == "done" and read_result(task) is None:
            states[task.name] = read_error(task)
    on_tick(states)
    return states


def _check_distinct(tasks: Sequence[Task]) -> None:
    """Raise a ValueError if two tasks have the same name, or different ones share a folder: one would be lost."""
    folders: dict[Path, Task] = {}
    names = set()
    for task in tasks:
        if task.name in names:
            raise ValueError(f"two runs are called {task.name}")
        names.add(task.name)
        other = folders.setdefault(task.folder, task)
        if other.settings_key() != task.settings_key():
            raise ValueError(f"{other.name} and {task.name} are different runs, but share the folder {task.folder}")


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
            whole = (file.parent / "per_user.parquet").is_file()
            task = wanted.pop(_read_key(file), None) if whole else None
            if task is not None:
                task.folder.mkdir(parents=True, exist_ok=True)
                for name in ("progress.jsonl", "per_user.parquet", "result.json"):  # what counts as done comes last
                    if (file.parent / name).is_file():
                        replace_file(task.folder / name, partial(shutil.copyfile, file.parent / name))
                count += 1
    return count


def _read_key(file: Path) -> str:
    try:
        return str(json.loads(file.read_text(encoding="utf-8"))["key"])
    except (OSError, ValueError, TypeError, KeyError):  # damaged: as if it were not there
        return ""


def _outcome(task: Task, status: int | None = None) -> str:
    if read_result(task):
        return "done"
    if status is not None and status < 0:
        name = signal.Signals(-status).name
        return f"killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    return read_error(task)


def prepare_processes() -> None:
    """Begin to import what every run needs, beside what this process does; without effect where runs are spawned."""
    if _start_method() != "forkserver":
        return
    multiprocessing.set_forkserver_preload(["recbole_slifmr.study.preload"])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, sys.path))  # Python hands on no path of its own
    try:
        forkserver.ensure_running()
    finally:
        del os.environ["PYTHONPATH"]
        if before is not None:
            os.environ["PYTHONPATH"] = before


@functools.cache
def _start_method() -> str:
    """Return how the process of a run starts: as a copy of one that has imported everything, or anew.

    A copy of a process that has looked for a GPU cannot use it, and on macOS system libraries do not stand copying.
    """
    import torch

    return "forkserver" if sys.platform == "linux" and not torch.cuda.is_available() else "spawn"


def _begin(environment: Mapping[str, str], run: Callable[..., None], *arguments: Any) -> None:
    """Run in a new process, with the environment that its driver has now: its copy may be older."""
    os.environ.clear()
    os.environ.update(environment)
    run(*arguments)


def _run_serially(tasks: Sequence[Task], data: DataStore) -> Iterable[tuple[str, str]]:
    prepare_processes()
    context: Any = multiprocessing.get_context(_start_method())
    for task in tasks:
        yield task.name, STARTING
        shared = data.of(task)
        arguments = (task,) if shared is None else (task, None, shared)
        # no daemon: loaders may start processes of their own
        process = context.Process(target=_begin, args=(dict(os.environ), run_task, *arguments))
        process.start()
        try:
            while process.is_alive():
                process.join(0.5)
                yield task.name, "running" if read_progress(task) else STARTING
        finally:
            process.kill()
            process.join()
            shutil.rmtree(task.checkpoint_dir(process.pid), ignore_errors=True)  # of one that was killed
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


def gpu_share(n_gpus: float, jobs: int) -> float:
    """Return what each of several jobs asks Ray for, so that as few as can be share a GPU."""
    return 1 / math.ceil(jobs / n_gpus) if n_gpus else 0


def _reach(address: str) -> None:
    """Raise an OSError if nothing answers at ``host:port``; Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=10).close()


def _run_on_share(task: Task, shared: SharedData | None = None) -> None:
    """Run a task on the GPU that Ray chose for this process: left alone, RecBole takes the machine's first."""
    run_task(task, os.environ.get("CUDA_VISIBLE_DEVICES"), shared)


def _run_with_ray(tasks: Sequence[Task], jobs: int, address: str | None, data: DataStore) -> Iterable[tuple[str, str]]:
    import ray

    with ray_session(address, jobs):
        n_gpus = gpu_share(ray.cluster_resources().get("GPU", 0), jobs)
        remote: Any = ray.remote(num_cpus=1, num_gpus=n_gpus, max_calls=1, max_retries=0)(_run_on_share)
        stored: dict[int, Any] = {}  # a data set goes to Ray once
        running = {}
        for task in tasks:
            shared = data.of(task)
            if shared is not None and id(shared) not in stored:
                stored[id(shared)] = ray.put(shared)
            running[remote.remote(task, None if shared is None else stored[id(shared)])] = task
        while running:
            ready, _ = ray.wait(list(running), timeout=0.5)
            for reference in ready:
                task = running.pop(reference)
                lost = ""
                try:
                    ray.get(reference)
                except ray.exceptions.RayTaskError:
                    pass  # the folder says what happened
                except ray.exceptions.RayError as error:  # the run could not say it itself
                    lost = f"Ray lost its process: {one_line(error)}"
                yield task.name, "done" if read_result(task) else lost or _outcome(task)
            for task in running.values():
                yield task.name, "running" if read_progress(task) else "waiting"


def collect(tasks: Sequence[Task]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return one row per finished run, and one per finished run and user.

    Raises:
        DataError: if the runs saw different data.
    """
    rows, users = [], []
    same = _SameData()
    for task in tasks:
        result = read_result(task)
        if result is None:
            continue
        same.compare(task, task.name, result["fingerprints"], result["inputs"])
        frame = _read_users(task)
        users.append(frame.assign(model=task.title, seed=task.seed))
        rows.append(
            {
                "model": task.title,
                "seed": task.seed,
                **{f"valid_{name}": number(value) for name, value in result["valid"].items()},
                **{f"test_{name}": number(value) for name, value in result["test"].items()},
                "n_users": len(frame),
                "epochs": result["n_epochs"],
                "best_epoch": result["best_epoch"],
                "seconds": result["seconds"],
                "seconds_per_epoch": result["seconds"] / max(result["n_epochs"], 1),
                "peak_memory_mb": result["peak_memory_mb"],
                "n_parameters": result["n_parameters"],
                **_from_traces(result),
            }
        )
    return pd.DataFrame(rows), pd.concat(users, ignore_index=True) if users else pd.DataFrame()


def _read_users(task: Task) -> pd.DataFrame:
    path = task.folder / "per_user.parquet"
    try:
        return pd.read_parquet(path).reset_index()
    except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
        raise DataError(f"{path} cannot be read ({one_line(error)}): delete {task.folder} and run it again") from error


def _from_traces(result: Mapping[str, Any]) -> dict[str, float]:
    """Return refreshes, their seconds and the signs of failure at the best epoch, as far as the model has them."""
    found: dict[str, float] = {}
    traces = result["traces"]
    if "refreshes" in traces:
        seconds = [entry["seconds"] for entry in traces["refreshes"]]
        found |= {"refreshes": len(seconds), "refresh_seconds": sum(seconds)}
    for entry in traces.get("diagnostics", ()):
        if entry["epoch"] == result["best_epoch"]:
            found |= {name: number(value) for name, value in entry.items() if name != "epoch"}
    return found
