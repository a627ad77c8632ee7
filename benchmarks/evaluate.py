"""What evaluation costs: ``python -m benchmarks.evaluate --dataset amazon-toys --data_path DATA``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import click
import torch

from benchmarks.measure import Clock, forget_embeddings, peak_memory, scratch
from benchmarks.run import OUTPUT, in_new_process, machine, parse_settings, write_json
from benchmarks.synthetic import PRESETS, Counts, ensure
from recbole_slifmr.host.settings import make_config
from recbole_slifmr.study.benchmark import METRICS, TOPK
from recbole_slifmr.training.evaluation import evaluate
from recbole_slifmr.training.experiment import load_data, make_trainer

LARGE = Counts(100_000, 50_000, 1_000_000, modalities=())


@dataclass(frozen=True)
class Job:
    """What to evaluate.

    Attributes:
        model: name of a model; untrained, which costs the same.
        dataset: name of the data set's folder.
        data_path: the folder that holds it; None where the package finds it.
        repeats: rounds; the least time of each part counts.
        threads: of torch.
        settings: settings that win over the defaults.
    """

    model: str
    dataset: str
    data_path: str | None = None
    repeats: int = 3
    threads: int = 1
    settings: dict[str, Any] = field(default_factory=dict)


@click.command()
@click.option("--dataset", default="ml-100k", show_default=True, help=f"A folder, or any of {', '.join(PRESETS)}.")
@click.option("--data_path", default=None, help="Folder of the data set.")
@click.option("--model", default="LightGCN", show_default=True)
@click.option("--repeats", default=3, show_default=True, help="Rounds; the least times count.")
@click.option("--threads", default=os.cpu_count() or 1, show_default=True)
@click.option("--set", "settings", multiple=True, callback=parse_settings, help="A setting, name=value.")
@click.option("--large/--no-large", default=False, help="Also 100,000 users x 50,000 items: time and peak memory.")
@click.option("--share", default=0, help="Also the share of slifmr benchmark's time outside training, so many epochs.")
@click.option("--out", default=str(OUTPUT / "evaluate.json"), show_default=True, help="The file of results.")
def main(
    dataset: str, data_path: str | None, model: str, repeats: int, threads: int, settings: dict[str, Any],
    large: bool, share: int, out: str,
) -> None:  # fmt: skip
    """Compare a validation with the bare products and top-k, and the test list with a validation."""
    path = data_path and str(Path(data_path).resolve())
    if dataset in PRESETS:
        folder = ensure(f"synthetic-{dataset}", PRESETS[dataset], OUTPUT / "data")
        dataset, path = folder.name, str(folder.parent.resolve())
    report = {"machine": machine(threads), "results": {}}

    def add(name: str, result: dict[str, Any]) -> None:
        report["results"][name] = result
        print(json.dumps({name: result}), flush=True)
        write_json(Path(out), report)

    add(dataset, in_new_process(measure, Job(model, dataset, path, repeats, threads, settings)))
    if large:
        folder = ensure("synthetic-100k-50k", LARGE, OUTPUT / "data")
        job = Job("BPR", folder.name, str(folder.parent.resolve()), 1, threads)
        add("100,000 x 50,000", in_new_process(measure, job))
    if share:
        add("slifmr benchmark", time_outside_training(dataset, path, share, threads, settings))
    if any("error" in result for result in report["results"].values()):
        sys.exit(1)


def measure(job: Job) -> dict[str, Any]:
    """Return the seconds of each part, their ratios and the peak memory in MB up to the end of the first validation.

    ``bare``: blocks of ``users @ items.T`` and ``topk``, as many scores at once as the validation, on the embeddings of
    the model's size; ``validation``: as between two epochs, with the model's final embeddings; ``test``: all metrics of
    ``slifmr benchmark``; ``detailed``: those and the scores by user and by group. CPU time, of all threads, is less
    disturbed by other processes.
    """
    with scratch(job.threads):
        path = {"data_path": job.data_path} if job.data_path else {}
        quiet = {"show_progress": False, "state": "ERROR", "metrics": METRICS, "topk": TOPK}
        config = make_config(job.model, job.dataset, settings={**quiet, **path, **job.settings})
        train, valid, test = load_data(config)
        trainer = make_trainer(config, train)
        trainer.eval_collector.data_collect(train)
        clock = Clock(config["device"])
        trainer._save_checkpoint(0, verbose=False)
        parts: dict[str, Callable[[], Any]] = {
            "validation": lambda: trainer._valid_epoch(valid),
            "bare": _bare(config, valid),
            "test": lambda: trainer.evaluate(test, load_best_model=False),
            "detailed": lambda: evaluate(trainer, test, train),
        }
        seconds: dict[str, list[float]] = {name: [] for name in parts}
        cpu_seconds: dict[str, list[float]] = {name: [] for name in parts}
        peak = None
        for _ in range(job.repeats):
            for name, part in parts.items():
                forget_embeddings(trainer.model)
                before = process_time()
                seconds[name].append(clock.time(part)[0])
                cpu_seconds[name].append(process_time() - before)
                peak = peak or peak_memory()
    least = {name: min(values) for name, values in seconds.items()}
    least_cpu = {name: min(values) for name, values in cpu_seconds.items()}
    return {
        "users": len(valid.uid_list),
        "items": valid._dataset.item_num - 1,
        "eval_batch_size": config["eval_batch_size"],
        "device": str(config["device"]),
        "seconds": least,
        "cpu_seconds": least_cpu,
        "validation / bare, CPU time": least_cpu["validation"] / least_cpu["bare"],
        "validation / bare": least["validation"] / least["bare"],
        "test / validation": least["test"] / least["validation"],
        "detailed / validation": least["detailed"] / least["validation"],
        "peak_memory_mb": peak,
    }


def _bare(config: Any, valid: Any) -> Callable[[], None]:
    """Return what ranks by random embeddings without masks and metrics."""
    generator = torch.Generator().manual_seed(0)
    n_users, n_items, size = len(valid.uid_list), valid._dataset.item_num, config["embedding_size"]
    users, items = (torch.randn(n, size, generator=generator).to(config["device"]) for n in (n_users, n_items))

    def rank() -> None:
        for block in users.split(valid.step):
            (block @ items.T).topk(max(config["topk"]), dim=1)

    return rank


def time_outside_training(
    dataset: str, data_path: str | None, epochs: int, threads: int, settings: dict[str, Any]
) -> dict[str, Any]:
    """Run ``slifmr benchmark`` on LightGCN and SLIFMR; return the seconds of the whole and of its parts.

    ``training`` is all that an epoch does before its validation, refreshes and diagnostics included.
    """
    with tempfile.TemporaryDirectory(prefix="slifmr-benchmark-") as folder:
        given = {"epochs": epochs, "stopping_step": epochs, "threads": threads, **settings}
        if data_path:
            given["data_path"] = data_path
        command = [sys.executable, "-c", "from recbole_slifmr.cli import main; main()", "benchmark", "--seeds=1"]
        command += [f"--dataset={dataset}", "--models=LightGCN,SLIFMR", *(f"--{k}={v}" for k, v in given.items())]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        start = perf_counter()
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        whole = perf_counter() - start
        if done.returncode:
            lines = (done.stderr or done.stdout).strip().splitlines()
            return {"error": lines[-1] if lines else f"slifmr benchmark ended with status {done.returncode}"}
        runs = [json.loads(file.read_text()) for file in sorted(Path(folder).glob("benchmark/runs/*/result.json"))]
    training = {run["model"]: run["seconds"] - run["validation_seconds"] for run in runs}
    return {
        "epochs": epochs,
        "seconds": whole,
        "training": training,
        "validation": {run["model"]: run["validation_seconds"] for run in runs},
        "outside training": 1 - sum(training.values()) / whole,
    }


if __name__ == "__main__":
    main()
