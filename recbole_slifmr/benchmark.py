"""Side-by-side benchmarking: several models, several seeds, one data set, one protocol, one table."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from recbole_slifmr import report
from recbole_slifmr.errors import SettingError
from recbole_slifmr.evaluation import ITEM_GROUPS, MASKS, USER_GROUPS
from recbole_slifmr.experiment import make_config
from recbole_slifmr.files import write_json
from recbole_slifmr.runs import METRICS, TOPK, Task, check, collect, read_progress, run_all

FIRST_SEED = 2020
TABLE = ("recall@20", "ndcg@20", "recall@10", "ndcg@10")
PROTOCOL = (
    "epochs",
    "stopping_step",
    "eval_step",
    "valid_metric",
)  # the same for all, whatever a file of parameters says
PACKAGES = ("recbole-slifmr", "recbole", "torch", "numpy", "scipy", "pandas", "ray")


@dataclass(frozen=True)
class Benchmark:
    """What a benchmark compares, and where its files go.

    Attributes:
        tasks: one per model and seed.
        out: folder of the outputs.
        reference: the model that the others are tested against.
        tuned: ``{model: number of trials, or None where unknown}`` for the models with parameters from a file.
        test_mask: see :func:`~recbole_slifmr.experiment.run`.
    """

    tasks: tuple[Task, ...]
    out: Path
    reference: str
    tuned: Mapping[str, int | None]
    test_mask: str

    @property
    def models(self) -> list[str]:
        """The models, in the order asked for."""
        return list(dict.fromkeys(task.model for task in self.tasks))


def benchmark(
    dataset: str, models: Sequence[str], jobs: int = 1, address: str | None = None, **options: Any
) -> pd.DataFrame:
    """Run a benchmark, or what is left of it, and write its outputs.

    Args:
        dataset: name of the data set's folder under ``data_path``.
        models: names; ``SLIFMR``, or else the first, is the reference of the tests of significance.
        jobs: runs at a time; more than one runs them as Ray tasks.
        address: of a running Ray cluster that sees the same files.
        options: the other arguments of :func:`make_plan`.

    Returns:
        one row per finished run.

    Raises:
        SettingError, DataError: for anything that cannot be used, before anything is trained.
    """
    return run_plan(make_plan(dataset, models, **options), jobs, address)


def run_plan(
    plan: Benchmark,
    jobs: int = 1,
    address: str | None = None,
    on_tick: Callable[[Mapping[str, str]], None] = lambda states: None,
) -> pd.DataFrame:
    """Run what is left of a plan and write its outputs; see :func:`benchmark`.

    Early stopping and the choice of the epoch use the validation split only; each run scores the test split once.

    Args:
        plan: what to run.
        jobs: runs at a time.
        address: of a running Ray cluster.
        on_tick: called about twice a second with the state of each run by name.
    """
    fingerprints = check(plan.tasks)
    plan.out.mkdir(parents=True, exist_ok=True)
    write_json(plan.out / "manifest.json", manifest(plan, fingerprints))
    states = run_all(plan.tasks, jobs, address, on_tick)
    runs, users = collect(plan.tasks)
    if len(runs):
        write_outputs(plan, runs, users, states)
    return runs


def make_plan(
    dataset: str,
    models: Sequence[str],
    seeds: int = 5,
    out: str | Path = "benchmark",
    config_files: Sequence[str | Path] = (),
    settings: Mapping[str, Any] | None = None,
    params: str | Path | None = None,
    test_mask: str = "train_valid",
    threads: int = 1,
) -> Benchmark:
    """Return what a benchmark will run. A random split is the same for all seeds.

    Args:
        dataset: name of the data set's folder under ``data_path``.
        models: names; ``SLIFMR``, or else the first, is the reference of the tests of significance.
        seeds: number of training seeds.
        out: folder of the outputs; finished runs found there are not run again.
        config_files: YAML files of settings for all models.
        settings: settings for all models, which win over the files.
        params: folder with ``MODEL.yaml`` or ``MODEL/best.yaml``, which win over ``config_files``.
        test_mask: ``train_valid`` or ``train``, see :func:`~recbole_slifmr.experiment.run`.
        threads: CPU threads per run; results are the same for the same number only.

    Raises:
        SettingError: for anything that cannot be used.
    """
    if not models:
        raise SettingError("no models to run: name at least one")
    if len(set(models)) < len(models):
        raise SettingError("a model is named twice")
    if seeds < 1 or threads < 1:
        raise SettingError("seeds and threads must be at least 1")
    if test_mask not in MASKS:
        raise SettingError(f"test_mask must be one of {', '.join(MASKS)}, not '{test_mask}'")
    files = [Path(file).resolve() for file in config_files]
    for path in files:
        if not path.is_file():
            raise SettingError(f"config file {path} not found")
    common = {"metrics": METRICS, "topk": TOPK, **(settings or {})}
    if "data_path" in common:
        common["data_path"] = str(Path(common["data_path"]).resolve())
    root = Path(out)
    tasks, tuned = [], {}
    for model in models:
        file = _params_file(params, model)
        shared = common
        if file is not None:
            base = make_config(model, dataset, files, common)
            shared = {**common, **{name: base[name] for name in PROTOCOL}}
            trials = re.search(r"^# trials: (\d+)", file.read_text(encoding="utf-8"), re.MULTILINE)
            tuned[model] = int(trials[1]) if trials else None
        own = tuple(str(path) for path in (*files, *([file] if file else [])))
        for seed in range(FIRST_SEED, FIRST_SEED + seeds):
            folder = (root / "runs" / f"{model}-{seed}").resolve()
            tasks.append(Task(model, seed, dataset, folder, own, shared, FIRST_SEED, test_mask, threads))
    return Benchmark(tuple(tasks), root, "SLIFMR" if "SLIFMR" in models else models[0], tuned, test_mask)


def _params_file(params: str | Path | None, model: str) -> Path | None:
    if params is None:
        return None
    if not Path(params).is_dir():
        raise SettingError(f"params: there is no folder {params}")
    candidates = (Path(params) / f"{model}.yaml", Path(params) / model / "best.yaml")
    return next((path.resolve() for path in candidates if path.is_file()), None)


def manifest(plan: Benchmark, fingerprints: Mapping[str, str]) -> dict[str, Any]:
    """Return what is needed to repeat the benchmark: versions, hardware, data, settings, command line."""
    import psutil
    import torch

    settings = {}
    for task in {task.model: task for task in plan.tasks}.values():
        config = make_config(**task.arguments)
        settings[task.model] = {name: str(value) for name, value in sorted(config.final_config_dict.items())}
    commit = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "command": shlex.join(sys.argv),
        "dataset": plan.tasks[0].dataset,
        "fingerprints": dict(fingerprints),
        "test_mask": plan.test_mask,
        "seeds": sorted({task.seed for task in plan.tasks}),
        "split_seed": plan.tasks[0].split_seed,
        "threads": plan.tasks[0].threads,
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "git_commit": commit or None,
        "hardware": {
            "machine": platform.machine(),
            "system": platform.system(),
            "cpus": psutil.cpu_count(),
            "memory_gb": round(psutil.virtual_memory().total / 2**30, 1),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "settings": settings,
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


# -- outputs ------------------------------------------------------------------------------------------------------


def caption(plan: Benchmark, runs: pd.DataFrame, states: Mapping[str, str]) -> str:
    """Say how the numbers of the table came about."""
    config = make_config(**plan.tasks[0].arguments)
    n_seeds = runs.groupby("model")["seed"].nunique()
    seeds = str(n_seeds.iloc[0]) if n_seeds.nunique() == 1 else ", ".join(f"{m}: {n}" for m, n in n_seeds.items())
    split = "fixed split" if config["benchmark_filename"] else f"split {config['eval_args']['split']}"
    items = "training and validation" if plan.test_mask == "train_valid" else "training"
    tuned = [f"{m} ({n} trials)" if n else f"{m} (trials unknown)" for m, n in plan.tuned.items()]
    failed = {task.model: states[task.name] for task in plan.tasks if states[task.name] != "done"}
    parts = [
        f"{plan.tasks[0].dataset}, {split}, test scores, mean ± standard deviation over {seeds} seeds.",
        f"All models: at most {config['epochs']} epochs, patience {config['stopping_step']} evaluations, best epoch by "
        f"validation {config['valid_metric']}; items of {items} are not ranked at test time.",
        f"Hyper-parameters from a file: {', '.join(tuned)}; the others have their defaults."
        if tuned
        else "Hyper-parameters: defaults.",
        f"* p < 0.05, ** p < 0.01 against {plan.reference} (two-sided Wilcoxon signed-rank test over users, Holm).",
        *(f"{model} failed: {reason}." for model, reason in failed.items()),
    ]
    return " ".join(parts)


def write_outputs(plan: Benchmark, runs: pd.DataFrame, users: pd.DataFrame, states: Mapping[str, str]) -> None:
    """Write ``results.csv``, ``results.json``, ``per_user.parquet``, ``table.md``, ``table.tex`` and the plots."""
    summary = report.summarise(runs)
    models = [model for model in plan.models if model in summary.index]
    metrics = [metric for metric in TABLE if f"test_{metric}" in runs] or [
        column.removeprefix("test_") for column in runs if column.startswith("test_") and "/" not in column
    ][:4]
    comparisons, gains = {}, {}
    if plan.reference in models and len(models) > 1:
        comparisons = {metric: report.compare(users, metric, plan.reference) for metric in metrics}
        gains = {metric: report.improvement(users, metric, plan.reference) for metric in metrics}
    text = caption(plan, runs, states)
    table = report.cells(summary, metrics, comparisons)
    out = plan.out
    runs.to_csv(out / "results.csv", index=False)
    users.to_parquet(out / "per_user.parquet", index=False)
    means = {
        model: {name: {"mean": row[name, "mean"], "std": row[name, "std"]} for name in summary.columns.levels[0]}
        for model, row in summary.iterrows()
    }
    write_json(
        out / "results.json",
        {
            "caption": text,
            "models": means,
            "comparisons": {metric: [c._asdict() for c in found] for metric, found in comparisons.items()},
            "improvement": {metric: gain._asdict() for metric, gain in gains.items()},
            "item_groups": ITEM_GROUPS,
            "user_groups": USER_GROUPS,
            "states": dict(states),
        },
    )
    (out / "table.md").write_text(report.markdown(models, metrics, table, text), encoding="utf-8")
    (out / "table.tex").write_text(report.latex(models, metrics, table, text), encoding="utf-8")
    curves = {task.name: read_progress(task) for task in plan.tasks if states[task.name] == "done"}
    valid_metric = make_config(**plan.tasks[0].arguments)["valid_metric"].lower()
    report.plot_curves(out / "curves.png", curves, valid_metric)
    report.plot_bars(out / "bars.png", summary, metrics)
