"""Hyper-parameter search with Ray Tune: trials see training and validation only, the winner alone is scored on test."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import logging
import os
import pickle
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from time import monotonic
from typing import Any, ClassVar, NamedTuple

import numpy as np
import optuna
import pandas as pd
import ray
import torch
from ray import tune as ray_tune
from ray.tune import schedulers
from ray.tune.search.optuna import OptunaSearch

from recbole_slifmr.errors import DataError, SettingError, one_line
from recbole_slifmr.files import hold, replace_file, write_json
from recbole_slifmr.host.seal import seal, unseal
from recbole_slifmr.host.settings import make_config
from recbole_slifmr.search import outcome
from recbole_slifmr.search.outcome import Ended, Outcome
from recbole_slifmr.search.plan import DATA, Search, make_search
from recbole_slifmr.search.space import Space, perturb, suggest
from recbole_slifmr.search.trial import TrialData, load_trial_data, run_trial
from recbole_slifmr.study.runs import Task, collect, gpu_share, ray_session, run_all
from recbole_slifmr.study.store import DataStore
from recbole_slifmr.training.shared import pack


class Progress(NamedTuple):
    """How far a search is: numbers of trials, and the best validation score so far."""

    total: int
    running: int
    finished: int
    stopped: int
    failed: int
    best: float | None


def tune(model: str, dataset: str, **options: Any) -> Outcome:
    """Search for hyper-parameters, choose on validation, score the winner on test.

    Args:
        model: name of a model of this package or of RecBole.
        dataset: name of the data set's folder under ``data_path``.
        options: the other arguments of :func:`make_search` and :func:`run_search`.

    Returns:
        the trials and the winner's scores.

    Raises:
        SettingError, DataError: for anything that cannot be used, before anything is trained.
    """
    running = {name: options.pop(name) for name in list(options) if name in _RUNNING}
    return run_search(make_search(model, dataset, **options), **running)


STATE, PICKLES = "*state-*", ("*.pkl", "*/*.pkl")  # what Ray unpickles: its state; the search, the errors of trials
_RUNNING = ("resume", "jobs", "resources", "address", "dashboard", "time_budget", "on_tick")


# -- running ------------------------------------------------------------------------------------------------------


def run_search(
    search: Search,
    resume: bool = False,
    jobs: int | None = None,
    resources: Mapping[str, float] | None = None,
    address: str | None = None,
    dashboard: bool = False,
    time_budget: float | None = None,
    on_tick: Callable[[Progress], None] = lambda progress: None,
) -> Outcome:
    """Run the trials, or what is left of them, choose on validation, score the winner on test, write the outputs.

    Args:
        search: what to try.
        resume: go on with what an interrupted search left in ``search.out``.
        jobs: trials at a time, which share the CPUs and GPUs among them; as many as there are CPUs or GPUs if None.
        resources: ``{"cpu": ..., "gpu": ...}`` of a trial, instead of ``jobs``.
        address: of a running Ray cluster that sees the same files.
        dashboard: open Ray's dashboard, on loopback.
        time_budget: seconds after which no trial goes on.
        on_tick: called a few times a second.

    Raises:
        SettingError, DataError: for anything that cannot be used, before anything is trained.
    """
    _check_folder(search, resume)
    with ray_session(address, dashboard=dashboard), contextlib.ExitStack() as stack:
        share = _share(search, jobs, resources)
        read_once = not DATA & set(search.space)
        shared = ray.put(pack(load_trial_data(search.config(), search.seed))) if read_once else None
        _Watch.search, _Watch.on_tick, _Watch.saved = search, on_tick, 0.0
        search.reports.mkdir(parents=True, exist_ok=True)
        stack.enter_context(hold(search.out))
        _check_folder(search, resume)
        write_json(search.out / "search.json", search.identity())
        ended = _fit(search, resume, shared, share, time_budget)
        trials, history = outcome.write_tables(search, ended)
        for folder in search.folder.glob("*/checkpoint_*"):
            shutil.rmtree(folder)  # no trial goes on any more
        ranked = trials[trials["status"].isin(("finished", "stopped"))]
        if ranked.empty:
            return Outcome(search.metric, trials, None, {}, None, pd.DataFrame(), {})
        threads = _threads(search, share)
        device = {"threads": threads, **({"gpu_id": ""} if torch.cuda.is_available() and not share["gpu"] else {})}
        best, point = outcome.write_best(search, ranked, device)
        runs, failures = _score(search, best, threads, address)
        importance = outcome.plot(search, ranked, history)
    return Outcome(search.metric, trials, best, point, importance, runs, failures)


def _check_folder(search: Search, resume: bool) -> None:
    """Refuse a folder with another search, or with this one unless it is to be resumed."""
    file = search.out / "search.json"
    if not file.is_file():
        return
    if not resume:
        raise SettingError(f"{search.out} holds a search already: --resume goes on with it, another --out starts anew")
    before, now = json.loads(file.read_text()), search.identity()
    changed = [name for name in now if before.get(name) != now[name]]
    if changed:
        raise SettingError(f"{search.out} holds a search with other {', '.join(changed)}: resume it as it was started")


def _share(search: Search, jobs: int | None, asked: Mapping[str, float] | None) -> dict[str, float]:
    """Return CPUs and GPUs of a trial: ``asked``, or its part if ``jobs`` trials share all there are.

    With neither a trial has a GPU of its own, or one CPU where there is no GPU.

    Raises:
        SettingError: if there are not so many anywhere in the cluster.
    """
    if jobs is not None and (jobs < 1 or asked is not None):
        raise SettingError("jobs must be at least 1, and stands instead of resources")
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    most = {name: max((node.get(name.upper(), 0) for node in nodes), default=0) for name in ("cpu", "gpu")}
    if asked is None:
        n_cpus, n_gpus = (sum(node.get(name, 0) for node in nodes) for name in ("CPU", "GPU"))
        n_gpus = n_gpus if search.settings.get("gpu_id", "0") != "" else 0
        if jobs is not None:
            return {"cpu": min(most["cpu"], n_cpus / jobs), "gpu": gpu_share(n_gpus, jobs)}
        return {"cpu": max(1, min(4, n_cpus // n_gpus)) if n_gpus else 1, "gpu": 1 if n_gpus else 0}
    share = {"cpu": 1, "gpu": 0, **asked}
    for name, value in share.items():
        if name not in most or value < 0:
            raise SettingError(f"resources: expected cpu and gpu with a number, not {name}={value}")
        if value > most[name]:
            raise SettingError(f"resources: a trial asks for {name}={value}, the largest machine has {most[name]:g}")
    return share


def _fit(
    search: Search, resume: bool, shared: ray.ObjectRef | None, share: Mapping[str, float], time_budget: float | None
) -> list[Ended]:
    """Run the trials with Ray Tune."""
    os.environ.update(
        {
            "RAY_AIR_NEW_OUTPUT": "0",  # the old one can be silenced
            "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
            "TUNE_DISABLE_SIGINT_HANDLER": "1",  # an interrupted search must not go on to the test split
            "TUNE_GLOBAL_CHECKPOINT_S": "1",
            "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
        }
    )
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # failures stand in trials.csv
    points = search.points()
    _Watch.total = search.trials if points is None else len(points)
    param_space = {} if points is None else {"point": ray_tune.grid_search(points)}
    going_on = resume and _restore_state(search)
    done = outcome.last_reports(search)
    parameters = ray_tune.with_parameters(_trainable, search=search, shared=(shared,), share=dict(share), done=done)
    trainable = ray_tune.with_resources(parameters, dict(share))
    if going_on:
        tuner = ray_tune.Tuner.restore(str(search.folder), trainable, resume_unfinished=True, param_space=param_space)
    else:
        mode = "max" if search.bigger else "min"
        metric = "score" if search.scheduler == "pbt" else "best_score"
        tuner = ray_tune.Tuner(
            trainable,
            param_space=param_space,
            tune_config=ray_tune.TuneConfig(
                metric=metric,
                mode=mode,
                num_samples=search.trials if points is None else 1,
                search_alg=_optuna(search, metric, mode) if points is None else None,
                scheduler=_scheduler(search),
                time_budget_s=time_budget,
                reuse_actors=True,  # a process takes seconds to import torch and RecBole
                trial_dirname_creator=_folder_name,
            ),
            run_config=ray_tune.RunConfig(
                name=search.folder.name,
                storage_path=str(search.out),
                verbose=0,
                callbacks=[_Watch()],
                sync_config=ray_tune.SyncConfig(sync_artifacts=True),
            ),
        )
    grid_of_results = tuner.fit()
    results = [grid_of_results[i] for i in range(len(grid_of_results))]
    return [Ended(Path(result.path).name, (result.config or {})["point"], _reason(result.error)) for result in results]


def _reason(error: Any) -> str | None:
    """Return one line that says why a trial failed."""
    if error is None:
        return None
    cause = getattr(error, "cause", None) or error
    if isinstance(cause, ray.exceptions.RayActorError):
        return "the process died (out of memory?)"
    return one_line(cause)


def _folder_name(trial: Any) -> str:
    return trial.trial_id


def _restore_state(search: Search) -> bool:
    """Put back the last whole state of an interrupted search; return False if it had none yet and starts anew.

    Ray copies its state file by file while it runs: a search that is killed may leave half a file, with which Ray
    starts from the beginning. And Ray unpickles it, which may run anything: what is put back carries a seal of this
    user, and nothing else that Ray would unpickle stays.

    Raises:
        SettingError: if the state came from elsewhere.
    """
    if not search.state.is_file():
        shutil.rmtree(search.folder, ignore_errors=True)
        for file in search.reports.iterdir():
            file.unlink()
        return False
    try:
        content = unseal(search.state.read_bytes(), search.state)
    except DataError as error:
        raise SettingError(f"{search.out} cannot be resumed, start anew with another --out: {error}") from error
    for file in _files(search.folder, STATE, *PICKLES):
        file.unlink()
    with zipfile.ZipFile(io.BytesIO(content)) as state:
        state.extractall(search.folder)
    return True


def _files(folder: Path, *patterns: str) -> list[Path]:
    return [file for pattern in patterns for file in folder.glob(pattern) if file.is_file()]


def _trainable(
    config: dict[str, Any],
    search: Search,
    shared: tuple[ray.ObjectRef | None],
    share: Mapping[str, float],
    done: Mapping[str, Any],
) -> None:
    """Run a trial in a process of Ray, unless it was done before the search was interrupted."""
    trial = ray_tune.get_context().get_trial_id()
    if trial in done:  # Ray's state is a little older
        ray_tune.report(_seen(done[trial]))
        return
    point = config["point"]
    node = ray.get_runtime_context().get_node_id()[:8]

    def report_to_tune(metrics: dict[str, Any], save: Callable[[Path], None]) -> None:
        full = {**metrics, "node": node, "used": point}
        if metrics["finished"] and search.scheduler != "pbt":  # no trial goes on from here
            ray_tune.report({**_seen(full), "report": full})
            return
        with tempfile.TemporaryDirectory() as folder:
            save(Path(folder))
            ray_tune.report({**_seen(full), "report": full}, checkpoint=ray_tune.Checkpoint.from_directory(folder))

    settings = search.config(point, **_run_settings(search, share))
    checkpoint = ray_tune.get_checkpoint()
    with checkpoint.as_directory() if checkpoint else contextlib.nullcontext() as folder:
        data = None if shared[0] is None else _read_shared(shared[0])
        run_trial(settings, search.seed, data, Path(folder) if folder else None, report_to_tune)


@functools.lru_cache(maxsize=1)
def _read_shared(reference: ray.ObjectRef) -> TrialData:
    """Return the data of a search, read once by a process: its trials follow one another."""
    return pickle.loads(ray.get(reference))


def _seen(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return what schedulers and searchers see of a report."""
    return {name: entry[name] for name in ("epoch", "score", "best_score", "finished")}


def _run_settings(search: Search, share: Mapping[str, float]) -> dict[str, Any]:
    """Return the settings that depend on where a trial runs: threads, and the GPUs that Ray gave it."""
    devices = os.environ.get("CUDA_VISIBLE_DEVICES", "") if share["gpu"] else ""
    return {"threads": _threads(search, share), "gpu_id": devices, "show_progress": False}


def _threads(search: Search, share: Mapping[str, float]) -> int:
    """Return the CPU threads of a trial: the setting ``threads`` if it is given, else its share of the CPUs."""
    return max(1, int(share["cpu"])) if search.threads is None else search.threads


def _optuna(search: Search, metric: str, mode: str) -> Any:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    ask = functools.partial(suggest, search.space, "point/")
    return OptunaSearch(ask, metric=metric, mode=mode, seed=search.seed)


def _scheduler(search: Search) -> Any:
    epochs, eval_step = search.config()["epochs"], search.config()["eval_step"]
    if search.scheduler == "asha":  # below eval_step two rungs would fall on one report, and the second on a later one
        return _Asha(time_attr="epoch", max_t=epochs, grace_period=max(eval_step, epochs // 27), reduction_factor=3)
    if search.scheduler == "pbt":
        explore = functools.partial(_explore, search.space, np.random.default_rng(search.seed))
        return schedulers.PopulationBasedTraining(
            time_attr="epoch",
            perturbation_interval=_perturbation_interval(search),
            custom_explore_fn=explore,
            log_config=False,
        )
    return schedulers.FIFOScheduler()


def _perturbation_interval(search: Search) -> int:
    return max(1, search.config()["epochs"] // 10)


def _kept_checkpoints(search: Search) -> int:
    """Return how many checkpoints of a trial stay; population-based training clones from the last perturbation."""
    return 3 + (_perturbation_interval(search) if search.scheduler == "pbt" else 0)


def _explore(space: Space, rng: np.random.Generator, config: dict[str, Any]) -> dict[str, Any]:
    return {"point": perturb(space, config["point"], rng)}


class _Asha(schedulers.ASHAScheduler):
    """Ray's ASHA with a memory for what trials reported before a restart, which Ray does not keep."""

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        super().on_trial_add(tune_controller, trial)
        for result in outcome.read_reports(_Watch.search, trial.trial_id):
            self.on_trial_result(tune_controller, trial, result)


class _Watch(ray_tune.Callback):
    """Write down each report as it comes and tell how far the search is.

    The class holds what it needs: Ray pickles the instance with the search.
    """

    search: ClassVar[Search]
    total: ClassVar[int]
    saved: ClassVar[float]
    on_tick: ClassVar[Callable[[Progress], None]]
    last: ClassVar[float] = 0.0

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Write down a report."""
        if "report" in result:
            outcome.write_report(self.search, trial.trial_id, result["report"])

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Note that a trial is done, whether it finished or was stopped."""
        outcome.write_done(self.search, trial.trial_id)

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Tell, a few times a second, and keep Ray's state whenever it is new."""
        if monotonic() - _Watch.last > 0.25:
            self._tell(trials)
        if trials:
            self._keep_state(trials)

    def on_experiment_end(self, trials: list[Any], **info: Any) -> None:
        """Tell how it ended and keep the last state."""
        self._tell(trials)
        if trials:
            self._keep_state(trials)

    def _keep_state(self, trials: list[Any]) -> None:
        folder = Path(trials[0].storage.experiment_driver_staging_path)
        files = _files(folder, STATE)
        saved = max((file.stat().st_mtime for file in files), default=self.saved)
        if saved == self.saved:
            return

        def write(part: Path) -> None:
            content = io.BytesIO()
            with zipfile.ZipFile(content, "w") as archive:
                for file in files:
                    archive.write(file, file.name)
                for file in _files(self.search.folder, *PICKLES):
                    archive.write(file, file.relative_to(self.search.folder))
            part.write_bytes(seal(content.getvalue()))

        replace_file(self.search.state, write)
        _Watch.saved = saved
        for trial in trials:  # as the state has them: of a search that went on, the folder may hold later checkpoints
            if trial.checkpoint:
                last = Path(trial.checkpoint.path)
                older = [file for file in sorted(last.parent.glob("checkpoint_*")) if file.name <= last.name]
                for checkpoint in older[: -_kept_checkpoints(self.search)]:
                    shutil.rmtree(checkpoint, ignore_errors=True)

    def _tell(self, trials: list[Any]) -> None:
        _Watch.last = monotonic()
        ended = [trial for trial in trials if trial.status == "TERMINATED" and "epoch" in trial.last_result]
        finished = sum(trial.last_result["finished"] for trial in ended)
        failed = sum(trial.status == "ERROR" for trial in trials)
        running = sum(trial.status == "RUNNING" for trial in trials)
        scored = [trial.last_result for trial in trials if "best_score" in (trial.last_result or {})]
        sign = 1 if self.search.bigger else -1
        best = max((sign * result["best_score"] for result in scored), default=None)
        _Watch.on_tick(
            Progress(
                total=self.total,
                running=running,
                finished=finished,
                stopped=len(ended) - finished,
                failed=failed,
                best=None if best is None else sign * best,
            )
        )


def _score(search: Search, best: Path, threads: int, address: str | None) -> tuple[pd.DataFrame, dict[str, str]]:
    """Train with the winner's settings and score on test, once for each seed; what is done already is not repeated.

    Returns:
        one row per finished run, and why others failed.
    """
    tasks = [
        Task(
            search.model,
            seed,
            search.dataset,
            search.out / "winner" / str(seed),
            (str(best),),
            split_seed=search.seed,
            test_mask=search.test_mask,
            threads=threads,
        )
        for seed in range(search.seed, search.seed + search.seeds)
    ]
    data = DataStore()
    if len(tasks) > 1:
        with contextlib.suppress(DataError, SettingError):  # the runs say what is wrong, each in its line
            data.see(tasks[0], make_config(**tasks[0].arguments))
            data.forget()
    states = run_all(tasks, address=address, data=data)
    runs, _ = collect(tasks)
    if len(runs):
        outcome.write_csv(search.out / "test.csv", runs)
    return runs, {name: state for name, state in states.items() if state != "done"}
