"""Tests, agreement with the CPU and timings on a GPU: ``benchmarks/gpu.sh``, or ``python -m benchmarks.gpu``.

Each part runs in a process of its own with its own time limit; what there is so far is written after each. A part that
does not fit in the time that is left is reported as left out.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import click
import torch
from recbole.data.interaction import Interaction
from recbole.utils import init_seed
from torch.nn import functional as F

from benchmarks.measure import Clock, Job, measure
from benchmarks.run import OUTPUT, machine, write_json
from benchmarks.synthetic import PRESETS, ensure
from recbole_slifmr.host.settings import make_config
from recbole_slifmr.training.experiment import load_data, make_trainer

ROOT = Path(__file__).parents[1]
MODELS = ("SLIFMR", "LightGCN", "LATTICE", "FREEDOM", "KGAT")
TESTS = ("test_contract.py", "test_loss.py", "test_graph.py", "test_layers.py", "test_encoder.py")
TOLERANCE = 1e-4
WHOLE = 525.0  # seconds; with the time to start and to end, nine minutes
LEAST = 10.0  # a part is not started with less time left
LIMITS = {"ml-100k": 45.0, "amazon-toys": 45.0, "amazon-book": 75.0, "electronics": 90.0, "tiny": 45.0}
FIXED_SPLIT: dict[str, Any] = {"benchmark_filename": ["train", "valid", "test"]}
DENSE = {"linear_max_items": 100_000}  # a GPU has room for a dense linear branch on all of these sets
ADAM_BYTES = 28  # per parameter and step: reads parameter, gradient and two moments, writes all but the gradient
SCORE_BYTES = 8  # a score is written by the product and read by top-k


class Part(NamedTuple):
    """A part of the whole.

    Attributes:
        name: what the outputs call it.
        kind: a key of ``KINDS``.
        arguments: of its function.
        limit: seconds.
    """

    name: str
    kind: str
    arguments: Mapping[str, Any]
    limit: float


def parts(smoke: bool, data_path: str | None) -> list[Part]:
    """Return what is to be done, the most telling first."""
    found = [Part("agreement", "agreement", {"models": ["LightGCN", "SLIFMR"] if smoke else MODELS}, 90)]
    tests = Part("tests", "tests", {"files": TESTS[1:2] if smoke else TESTS}, 150)
    sets = ["tiny"] if smoke else [*(["amazon-toys"] if data_path else []), "amazon-book", "electronics", "ml-100k"]
    models = ("SLIFMR", "LightGCN") if smoke else MODELS
    first = [(name, model) for name in sets[:2] for model in models[:2]]
    others = [(name, model) for name in sets for model in models if (name, model) not in first]
    timings = [
        Part(f"{name}, {model}", "timing", _timing_of(name, model, smoke, data_path), LIMITS[name])
        for name, model in [*first, *others]
        if _fits(model, name)
    ]
    return [*found, *timings[: len(first)], tests, *timings[len(first) :]]


def _fits(model: str, dataset: str) -> bool:
    needs_kg = model == "KGAT"
    has_features = dataset != "ml-100k"  # RecBole's own, which has a knowledge graph only
    has_kg = dataset == "ml-100k" or dataset not in PRESETS or PRESETS[dataset].triples > 0
    return (has_kg or not needs_kg) and (has_features or model not in ("LATTICE", "FREEDOM"))


def _timing_of(name: str, model: str, smoke: bool, data_path: str | None) -> dict[str, Any]:
    settings = dict(FIXED_SPLIT) if name == "amazon-toys" else {}
    if model == "SLIFMR" and not smoke:
        settings |= DENSE
    path = data_path if name == "amazon-toys" else None
    steps, batches = (1, 1) if smoke else (20, 50)
    return {"preset": name, "model": model, "data_path": path, "steps": steps, "eval_batches": batches,
            "settings": settings}  # fmt: skip


@click.command()
@click.option("--smoke", is_flag=True, help="A little of everything, in under a minute, on the CPU too.")
@click.option("--data_path", default=None, envvar="SLIFMR_DATA", help="Folder that holds amazon-toys.")
@click.option("--out", default=str(OUTPUT / "gpu"), show_default=True, help="Folder of gpu.json and gpu.md.")
@click.option("--seconds", default=WHOLE, show_default=True, help="For everything.")
@click.option("--part", "one", default=None, hidden=True, help="Run one part, JSON, and print its result.")
def main(smoke: bool, data_path: str | None, out: str, seconds: float, one: str | None) -> None:
    """Run the tests on this machine's device, compare it with the CPU and time the models."""
    if one is not None:
        part = json.loads(one)
        print(json.dumps(KINDS[part["kind"]](**part["arguments"])))
        return
    if not smoke and not torch.cuda.is_available():
        raise click.UsageError("torch finds no GPU here: --smoke runs a little of everything on the CPU")
    start, folder = perf_counter(), Path(out).resolve()
    path = data_path and str(Path(data_path).resolve())
    report: dict[str, Any] = {"machine": machine(torch.get_num_threads()), "parts": {}}
    report["bandwidth"] = bandwidth(
        torch.device("cuda" if torch.cuda.is_available() else "cpu"), 2**20 if smoke else 2**28
    )
    for part in parts(smoke, path):
        report["parts"][part.name] = run_part(part, seconds - (perf_counter() - start))
        report["seconds"] = perf_counter() - start
        write_json(folder / "gpu.json", report)
        (folder / "gpu.md").write_text(markdown(report), encoding="utf-8")
        print(f"{report['seconds']:5.0f} s  {part.name}: {_in_a_word(report['parts'][part.name])}", flush=True)
    print(f"written: {folder / 'gpu.json'}, {folder / 'gpu.md'}")
    if any("error" in result or result.get("passed") is False for result in report["parts"].values()):
        sys.exit(1)


def run_part(part: Part, left: float) -> dict[str, Any]:
    """Run a part in a new process; return its result, ``error`` in one line, or why it was left out."""
    if left < LEAST:
        return {"left out": "no time was left"}
    limit = min(part.limit, left)
    command = [sys.executable, "-m", "benchmarks.gpu", "--part", json.dumps(part._asdict())]
    start = perf_counter()
    done = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        stdout, stderr = done.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(done.pid, signal.SIGKILL)  # with what it has started
        done.communicate()
        return {"left out": f"it took more than its {limit:.0f} s"}
    lines = (stdout if done.returncode == 0 else stderr).strip().splitlines()
    if done.returncode or not lines:
        return {"error": lines[-1] if lines else f"ended with status {done.returncode}"}
    return {**json.loads(lines[-1]), "took": perf_counter() - start}


# -- the parts --------------------------------------------------------------------------------------------------------


def run_tests(files: Sequence[str]) -> dict[str, Any]:
    """Run test files, which use the GPU where there is one; return pytest's last line and whether all passed.

    With one CPU thread: tests of equality to the last digit on the CPU need sums in a fixed order.
    """
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *(f"tests/{name}" for name in files)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    lines = done.stdout.strip().splitlines() or [done.stderr.strip()[-200:]]
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return {"passed": done.returncode == 0, "summary": lines[-1], "failed": failed}


def agreement(models: Sequence[str]) -> dict[str, Any]:
    """Return by model how far scores and gradients on the GPU are from those on the CPU, on the planted set.

    Relative to the largest value. The same parameters; the gradients are of a BPR loss of the final embeddings, which
    draws nothing at random. Without a GPU the CPU is compared with itself.
    """
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for model in models:
            (scores, gradients), (others, other_gradients) = _on_both(model, folder)
            pairs = [(gradients[name], other_gradients[name]) for name in gradients]
            found[model] = {
                "scores": _difference([(scores, others)]),
                "gradients": _difference(pairs),
            }
    agree = all(value < TOLERANCE for values in found.values() for value in values.values())
    return {"models": found, "passed": agree}


def _on_both(model: str, folder: str) -> list[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    results, state = [], None
    for use_gpu in (False, True):
        settings = {"use_gpu": use_gpu, "show_progress": False, "state": "ERROR", "checkpoint_dir": folder}
        config = make_config(model, "toy", settings=settings)
        train, *_ = load_data(config)
        init_seed(config["seed"], True)
        network = make_trainer(config, train).model
        state = network.state_dict() if state is None else state
        network.load_state_dict(state)
        results.append(_scores_and_gradients(network, train))
    return results


def _scores_and_gradients(model: Any, train: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.eval()
    data = train._dataset
    with torch.no_grad():
        ids = Interaction({data.uid_field: torch.arange(1, data.user_num)}).to(model.device)
        scores = model.full_sort_predict(ids).view(data.user_num - 1, -1).cpu()
    users, items = model.forward()[:2]
    rows, positive = (data.inter_feat[name].to(model.device) for name in (data.uid_field, data.iid_field))
    negative = (positive * 7919) % (data.item_num - 1) + 1
    loss = -F.logsigmoid((users[rows] * (items[positive] - items[negative])).sum(1)).mean()
    loss.backward()
    return scores, {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}


def _difference(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Return the largest difference over the largest value, of all pairs."""
    largest = max(float(one.abs().max()) for one, _ in pairs)
    return max(float((one - other).abs().max()) for one, other in pairs) / max(largest, 1e-30)


def timing(preset: str, model: str, data_path: str | None, **job: Any) -> dict[str, Any]:
    """Return what :func:`benchmarks.measure.measure` does of a model on a data set."""
    name = preset
    if preset in PRESETS:
        folder = ensure(f"synthetic-{preset}", PRESETS[preset], OUTPUT / "data")
        name, data_path = folder.name, str(folder.parent.resolve())
    return measure(Job(preset, model, name, data_path, threads=torch.get_num_threads(), **job))


KINDS: dict[str, Callable[..., dict[str, Any]]] = {"tests": run_tests, "agreement": agreement, "timing": timing}


def bandwidth(device: torch.device, n_numbers: int) -> float:
    """Return the bytes per second of a copy within the device's memory, read and written ones counted."""
    source = torch.ones(n_numbers, device=device)
    target, clock = torch.empty_like(source), Clock(device)
    return 2 * 4 * n_numbers / min(clock.time(lambda: target.copy_(source))[0] for _ in range(6))


# -- what comes out ---------------------------------------------------------------------------------------------------


def shares(result: Mapping[str, Any], bytes_per_second: float) -> tuple[float, float]:
    """Return which share of the memory's bandwidth an epoch and an evaluation use, counting what they must move.

    Of an epoch: the bound by bandwidth of ``floor.py`` for SLIFMR, Adam's passes over the parameters for the others. Of
    an evaluation: every score written and read once.
    """
    sizes, epoch = result["sizes"], result["epoch"]
    steps = sum(result["batches"].values())
    least = ADAM_BYTES * sizes["parameters"] * steps / bytes_per_second
    if "floor" in result:
        least = result["floor"]["bound_epoch"]
    scores = sizes["evaluated_users"] * (sizes["items"] + 1)
    return least / epoch, SCORE_BYTES * scores / bytes_per_second / result["phases"]["evaluation"]


def markdown(report: Mapping[str, Any]) -> str:
    """Return the report as Markdown: a line per check, a table of timings; shares are of the memory's bandwidth."""
    on = report["machine"]["gpu"] or report["machine"]["cpu"]
    text = [f"# Measured on {on}", "", f"Memory bandwidth of a copy: {report['bandwidth'] / 1e9:,.0f} GB/s.", ""]
    rows = []
    for name, result in report["parts"].items():
        if "phases" not in result:
            text.append(f"* {name}: {_in_a_word(result)}")
            continue
        phases = result["phases"]
        device_mb = result["peak_device_memory_mb"]
        epoch_share, evaluation_share = shares(result, report["bandwidth"])
        cells = [result["preset"], result["model"], f"{result['epoch']:.3g}"]
        cells += [f"{phases[phase]:.3g}" if phases[phase] is not None else "-" for phase in ("refresh", "evaluation")]
        cells += [f"{result['peak_memory_mb']:,.0f}", f"{device_mb:,.0f}" if device_mb else "-"]
        rows.append([*cells, f"{epoch_share:.0%}", f"{evaluation_share:.0%}"])
    titles = [
        "set",
        "model",
        "epoch s",
        "refresh s",
        "evaluation s",
        "peak MB",
        "device MB",
        "epoch: share",
        "evaluation: share",
    ]
    lines = [titles, ["---"] * 2 + ["---:"] * 7, *rows]
    return "\n".join([*text, "", *(f"| {' | '.join(line)} |" for line in lines)]) + "\n"


def _in_a_word(result: Mapping[str, Any]) -> str:
    for name in ("error", "left out"):
        if name in result:
            return f"{name}: {result[name]}"
    if "models" in result:
        worst = max(value for values in result["models"].values() for value in values.values())
        return f"{'agree' if result['passed'] else 'DIFFER'} with the CPU, at most by {worst:.1e} of the largest value"
    if "summary" in result:
        return "; ".join([result["summary"], *result["failed"]])
    return f"epoch {result['epoch']:.3g} s, evaluation {result['phases']['evaluation']:.3g} s"


if __name__ == "__main__":
    main()
