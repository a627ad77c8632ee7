"""Time and memory of models on data sets: ``python -m benchmarks.run --preset ml-100k,amazon-book --models ...``."""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click
import yaml
from rich.console import Console
from rich.table import Table

from benchmarks.synthetic import PRESETS, ensure

OUTPUT = Path(__file__).parent / "out"
SERIES = ("1x", "2x", "4x", "8x")
DISTURBED = 0.1  # share of the CPU time that others took
COLUMNS = {
    "data": "data set",
    "loaders": "loaders",
    "graph": "graph",
    "sampling": "sampling",
    "forward": "forward",
    "backward": "backward",
    "optimiser": "optimiser",
    "refresh": "refresh",
    "diagnostics": "diagnostics",
    "evaluation": "evaluation",
}


def parse_names(context: click.Context, parameter: click.Parameter, value: str) -> list[str]:
    """Split ``a,b``."""
    return [name.strip() for name in value.split(",") if name.strip()]


def parse_settings(context: click.Context, parameter: click.Parameter, values: Sequence[str]) -> dict[str, Any]:
    """Turn each ``name=value`` into an entry; values are YAML."""
    settings = {}
    for value in values:
        name, equals, text = value.partition("=")
        if not equals:
            raise click.BadParameter(f"'{value}' should read name=value")
        settings[name] = yaml.safe_load(text)
    return settings


@click.command()
@click.option("--preset", "presets", default="ml-100k,amazon-book", show_default=True, callback=parse_names,
              help=f"Any of {', '.join(PRESETS)}, or the name of a data set's folder.")  # fmt: skip
@click.option("--models", default="LightGCN,KGAT,LATTICE,SLIFMR", show_default=True, callback=parse_names)
@click.option("--data_path", default=None, help="Folder of the data sets that are no preset.")
@click.option("--data_dir", default=str(OUTPUT / "data"), help="Where synthetic data sets are kept.")
@click.option("--seed", default=0, show_default=True, help="Of the synthetic data.")
@click.option("--steps", default=20, show_default=True, help="Training steps to time; longer epochs are scaled up.")
@click.option("--eval_batches", default=50, show_default=True, help="Evaluation batches to time, likewise.")
@click.option("--eval_batch_sizes", default="", callback=parse_names, help="More eval_batch_size to evaluate with.")
@click.option("--repeats", default=1, show_default=True, help="Rounds over all models; the least figures count.")
@click.option("--threads", default=os.cpu_count() or 1, show_default=True)
@click.option("--set", "settings", multiple=True, callback=parse_settings, help="A setting of every model, name=value.")
@click.option("--out", default=str(OUTPUT / "speed.json"), show_default=True, help="The file of results.")
def main(
    presets: list[str], models: list[str], data_path: str | None, data_dir: str, seed: int, steps: int,
    eval_batches: int, eval_batch_sizes: list[str], repeats: int, threads: int, settings: dict[str, Any], out: str,
) -> None:  # fmt: skip
    """Measure each model on each data set in a process of its own; print tables and a JSON line per result."""
    from benchmarks.measure import Job

    jobs = []
    for preset in presets:
        path = data_path and str(Path(data_path).resolve())
        if preset in PRESETS:
            path = str(ensure(f"synthetic-{preset}", PRESETS[preset], data_dir, seed).parent.resolve())
        name = f"synthetic-{preset}" if preset in PRESETS else preset
        sizes = tuple(int(size) for size in eval_batch_sizes)
        jobs += [Job(preset, model, name, path, steps, eval_batches, sizes, threads, settings) for model in models]
    rounds: list[list[dict[str, Any]]] = []
    for _ in range(repeats):
        rounds.append([])
        for job in jobs:
            result = run_job(job)
            rounds[-1].append(result)
            print(json.dumps(result), flush=True)
    results = [combine(runs) for runs in zip(*rounds, strict=True)]
    report = {
        "machine": machine(threads),
        "arguments": {
            "steps": steps,
            "eval_batches": eval_batches,
            "repeats": repeats,
            "seed": seed,
            **settings,
        },
        "results": results,
        "ratios": {preset: ratios([r for r in results if r["preset"] == preset]) for preset in presets},
        "exponents": exponents(results),
        "runs": rounds if repeats > 1 else [],
    }
    write_json(Path(out), report)
    show(report, Console(width=None if sys.stdout.isatty() else 180))
    print(f"written: {os.path.relpath(out)}")
    if any("error" in result for result in results):
        sys.exit(1)


def in_new_process(function: Callable[[Any], dict[str, Any]], argument: Any) -> dict[str, Any]:
    """Return what a function returns in a new process, or ``{"error": one line}``."""
    try:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            return pool.submit(function, argument).result()
    except BrokenProcessPool:
        return {"error": "the process was killed: out of memory?"}
    except Exception as raised:  # whatever a model raises: the others go on
        return {"error": " ".join(f"{type(raised).__name__}: {raised}".split())}


def run_job(job: Any) -> dict[str, Any]:
    """Measure a job in a new process; return its result, or preset, model and ``error``."""
    from benchmarks.measure import measure

    return {"preset": job.preset, "model": job.model, **in_new_process(measure, job)}


def combine(runs: Sequence[Any]) -> Any:
    """Return the least of repeated results, figure by figure; what is no figure is taken from the first.

    Whatever else the machine does only adds to a time.
    """
    first = runs[0]
    failed = [run for run in runs if isinstance(run, Mapping) and "error" in run]
    if failed:
        return failed[0]
    if isinstance(first, Mapping):
        return {key: combine([run[key] for run in runs]) for key in first}
    return min(runs) if isinstance(first, float) else first


def ratios(results: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return what SLIFMR takes, of one data set, over what others take: epoch over epoch."""
    epochs = {result["model"]: result["epoch"] for result in results if "error" not in result}
    slifmr = next((result for result in results if result["model"] == "SLIFMR" and "error" not in result), None)
    if slifmr is None:
        return {}
    epoch, floor = slifmr["epoch"], slifmr["floor"]
    return {
        **{f"epoch / {model}": epoch / other for model, other in epochs.items() if model != "SLIFMR"},
        "epoch / floor": epoch / floor["epoch"],
        "epoch / strict floor": epoch / floor["strict_epoch"],
        "epoch / bandwidth bound": epoch / floor["bound_epoch"],
        "refresh / epoch": slifmr["phases"]["refresh"] / epoch,
        "evaluation / epoch": slifmr["phases"]["evaluation"] / epoch,
    }


def exponents(results: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Return, by model, the exponents of epoch, step and memory over the edges of the series; least squares on logs."""
    points: dict[str, list[Mapping[str, Any]]] = {}
    for result in results:
        if result["preset"] in SERIES and "error" not in result:
            points.setdefault(result["model"], []).append(result)
    values: dict[str, Callable[[Mapping[str, Any]], float | None]] = {
        "epoch": lambda result: result["epoch"],
        "step": lambda result: result["step"],
        "refresh": lambda result: result["phases"]["refresh"],
        "evaluation": lambda result: result["phases"]["evaluation"],
        "peak_memory": lambda result: result["peak_memory_mb"],
    }
    return {
        model: {
            name: _slope([(n_edges(result), value(result)) for result in of_model])
            for name, value in values.items()
            if all(value(result) for result in of_model)
        }
        for model, of_model in points.items()
        if len({result["preset"] for result in of_model}) > 1
    }


def n_edges(result: Mapping[str, Any]) -> int:
    """Return the interactions and triples of the preset, the same for every model."""
    counts = PRESETS[result["preset"]]
    return counts.interactions + counts.triples


def _slope(points: Sequence[tuple[float, Any]]) -> float:
    x, y = [math.log(a) for a, _ in points], [math.log(b) for _, b in points]
    return statistics.linear_regression(x, y).slope


def machine(threads: int) -> dict[str, Any]:
    """Return what the figures were measured on."""
    import torch

    from recbole_slifmr import __version__

    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        cpu = next((line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line), cpu)
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": threads,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "recbole_slifmr": __version__,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def write_json(path: Path, content: Any) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def show(report: Mapping[str, Any], console: Console) -> None:
    """Print the tables of a report."""
    for preset in report["ratios"]:
        _show_phases(preset, [r for r in report["results"] if r["preset"] == preset], console)
    for preset, values in report["ratios"].items():
        if values:
            console.print(f"SLIFMR on {preset}: " + ", ".join(f"{name} {value:.3g}" for name, value in values.items()))
    for result in report["results"]:
        if result.get("evaluation_by_batch_size"):
            times = ", ".join(f"{int(n):,}: {_seconds(t)}" for n, t in result["evaluation_by_batch_size"].items())
            console.print(f"evaluation of {result['model']} on {result['preset']} by eval_batch_size: {times}")
    for model, values in report["exponents"].items():
        line = ", ".join(f"{name} {value:.2f}" for name, value in values.items())
        console.print(f"exponents of {model} over the edges: {line}")


def _show_phases(preset: str, results: Sequence[Mapping[str, Any]], console: Console) -> None:
    table = Table(title=f"{preset}: seconds", title_justify="left")
    table.add_column("model")
    for title in [*COLUMNS.values(), "epoch", "peak MB"]:
        table.add_column(title, justify="right")
    for result in results:
        if "error" in result:
            continue
        mark = "*" if result["scaled"]["epoch"] else ""
        cells = []
        for phase in COLUMNS:
            scaled = phase in ("sampling", "forward", "backward", "optimiser") and mark
            scaled = scaled or (phase == "evaluation" and result["scaled"]["evaluation"])
            cells.append(_seconds(result["phases"][phase]) + ("*" if scaled else ""))
        table.add_row(result["model"], *cells, _seconds(result["epoch"]) + mark, f"{result['peak_memory_mb']:,.0f}")
        if "floor" in result:
            for title, name in (
                ("floor", "epoch"),
                ("strict floor", "strict_epoch"),
                ("bandwidth bound", "bound_epoch"),
            ):
                table.add_row(f"  {title}", *[""] * len(COLUMNS), _seconds(result["floor"][name]), "")
    if table.row_count:
        console.print(table)
    for result in results:
        if "error" in result:
            console.print(f"{preset}, {result['model']}: {result['error']}", markup=False)
    if any(result.get("scaled", {}).get(name) for result in results for name in ("epoch", "evaluation")):
        console.print("* scaled up from fewer batches")
    for result in results:
        if result.get("others_cpu", 0.0) > DISTURBED:
            share = f"{result['others_cpu']:.0%}"
            console.print(f"{result['model']}: other processes took {share} of the CPU time: its times are too long")


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


if __name__ == "__main__":
    main()
