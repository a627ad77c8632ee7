"""Time and memory of recommending to everybody, without a data set: ``python -m benchmarks.recommend``."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from time import perf_counter

import click
import numpy as np
import torch

from benchmarks.measure import peak_memory
from recbole_slifmr.data.history import History
from recbole_slifmr.serve.recommend import FORMATS, rank_items, table, write_tables


@click.command()
@click.option("--users", default=200_000, show_default=True, help="Number of users.")
@click.option("--items", default=50_000, show_default=True, help="Number of items.")
@click.option("--size", default=64, show_default=True, help="Dimension of the representations.")
@click.option("--seen", default=20, show_default=True, help="Items that a user has seen.")
@click.option("--k", default=20, show_default=True, help="Items per user.")
@click.option("--format", "kind", default="csv", show_default=True, type=click.Choice(FORMATS))
@click.option("--threads", default=os.cpu_count() or 1, show_default=True)
def main(users: int, items: int, size: int, seen: int, k: int, kind: str, threads: int) -> None:
    """Rank all items for all users by inner products of random representations, as the models do; print a JSON line."""
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    user_rows, item_rows = (torch.randn(n, size, generator=generator) for n in (users, items))
    rng = np.random.default_rng(0)
    history = History.of(np.repeat(np.arange(users), seen), rng.integers(1, items, users * seen), users, items)
    names = [np.array([f"{kind}{i}" for i in range(n)], dtype=object) for kind, n in (("u", users), ("i", items))]
    before, start = peak_memory(), perf_counter()
    rankings = rank_items(lambda ids: user_rows[ids] @ item_rows.T, np.arange(users), k, items, history)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / f"out.{kind}"
        n_rows = write_tables((table(ranking, *names) for ranking in rankings), kind, out, sys.stdout)
        size_of_file = out.stat().st_size
    seconds = perf_counter() - start
    result = {"users": users, "items": items, "k": k, "rows": n_rows, "seconds": round(seconds, 1), "threads": threads}
    print(json.dumps({**result, "file MB": size_of_file >> 20, "MB before": before, "peak MB": peak_memory()}))


if __name__ == "__main__":
    main()
