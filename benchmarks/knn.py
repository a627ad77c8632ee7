"""Time, memory and recall of the nearest-neighbour search behind a refresh: ``python -m benchmarks.knn``."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.measure import peak_memory
from benchmarks.run import OUTPUT, in_new_process, write_json

N_CLUSTERS, NOISE = 200, 1.0


@click.command()
@click.option("--items", default="25000,50000,100000", show_default=True, help="Numbers of items.")
@click.option("--size", default=64, show_default=True, help="Dimension of the representations.")
@click.option("--k", default=10, show_default=True, help="Neighbours per item.")
@click.option("--threads", default=os.cpu_count() or 1, show_default=True)
@click.option("--out", default=str(OUTPUT / "knn.json"), show_default=True, help="The file of results.")
def main(items: str, size: int, k: int, threads: int, out: str) -> None:
    """Search with both methods, each in a process of its own; print a table and JSON lines."""
    results = []
    for n in (int(n) for n in items.split(",")):
        for search in ("exact", "approximate"):
            results.append({"items": n, "search": search, **in_new_process(measure, (n, size, k, search, threads))})
            print(json.dumps(results[-1]), flush=True)
    write_json(Path(out), {"size": size, "k": k, "threads": threads, "results": results})
    table = Table(
        "items", "search", "seconds", "recall", "MB more than before", title=f"{k} neighbours, {size} numbers"
    )
    for result in results:
        row = [result.get(name) for name in ("seconds", "recall", "memory_mb")]
        table.add_row(f"{result['items']:,}", result["search"], *(f"{v:,.3g}" if v is not None else "-" for v in row))
    Console().print(table)


def measure(job: Sequence[Any]) -> dict[str, float]:
    """Return seconds, recall and memory (MB) of a search among clustered representations."""
    from recbole_slifmr.nn.graph import knn_graph, knn_recall

    n, size, k, search, threads = job
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    features = torch.randn(N_CLUSTERS, size)[torch.randint(0, N_CLUSTERS, (n,))] + NOISE * torch.randn(n, size)
    knn_graph(features[:1000], k, search=search)  # libraries are loaded
    before, start = peak_memory(), perf_counter()
    edge_index = knn_graph(features, k, search=search)
    seconds = perf_counter() - start
    return {
        "seconds": seconds,
        "recall": knn_recall(features, edge_index, k, n_sample=1000),
        "memory_mb": peak_memory() - before,
    }


if __name__ == "__main__":
    main()
