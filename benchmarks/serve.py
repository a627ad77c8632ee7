"""Requests per second of ``slifmr serve``, their times and its memory: ``python -m benchmarks.serve``."""

from __future__ import annotations

import json
import multiprocessing
import random
import re
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from multiprocessing.connection import Connection
from time import perf_counter
from types import SimpleNamespace

import click
import numpy as np
import pandas as pd
import torch

from recbole_slifmr.data.history import History
from recbole_slifmr.serve.lookup import Lookup
from recbole_slifmr.serve.names import ItemColumns
from recbole_slifmr.serve.trained import Trained
from recbole_slifmr.serve.web import bind, make_app, run_app

QUESTIONS = {
    "recommend": "/api/recommend?user=u{}&k={}",
    "recommend, mixed": "/api/recommend?user=u{}&k={}&popularity=0.3",
    "similar": "/api/similar?item=i{}&k={}",
    "search": "/api/search?q=film+{}&limit={}",
}


def random_model(n_users: int, n_items: int, size: int, seen: int) -> Trained:
    """Return a model with random representations whose scores are inner products, as LightGCN's are."""
    generator, rng = torch.Generator().manual_seed(0), np.random.default_rng(0)
    users, items = (torch.randn(n, size, generator=generator) for n in (n_users, n_items))
    history = History.of(
        np.repeat(np.arange(1, n_users), seen), rng.integers(1, n_items, (n_users - 1) * seen), n_users, n_items
    )
    tokens = {
        f"{kind}_id": np.array([f"{kind[0]}{i}" for i in range(n)], dtype=object)
        for kind, n in (("user", n_users), ("item", n_items))
    }
    dataset = SimpleNamespace(
        uid_field="user_id", iid_field="item_id", user_num=n_users, item_num=n_items, field2id_token=tokens,
        field2token_id={field: {token: i for i, token in enumerate(names)} for field, names in tokens.items()},
        inter_feat={"item_id": torch.from_numpy(history.items)},
    )  # fmt: skip
    model = SimpleNamespace(
        restore_user_e=users, restore_item_e=items,
        full_sort_predict=lambda interaction: (users[interaction["user_id"]] @ items.T).flatten(),
    )  # fmt: skip
    return Trained({"model": "random", "dataset": "synthetic", "device": "cpu"}, model, dataset, history)


def serve(port: Connection, threads: int, sizes: tuple[int, int, int, int]) -> None:
    """Serve a random model on a free port, which is sent back."""
    torch.set_num_threads(threads)
    trained = random_model(*sizes)
    titles = pd.DataFrame({"title": [f"Film {i}" for i in range(trained.n_items)]}, index=trained.item_tokens)
    app = make_app(Lookup(trained, ItemColumns(titles)))
    with bind("127.0.0.1", 0) as listener:
        listener.listen()
        port.send(listener.getsockname()[1])
        run_app(app, listener)


def ask(port: int, question: str, k: int, largest: int, until: float, seed: int) -> list[float]:
    """Ask one question after the other on one connection; return the seconds that each took."""
    connection, rng, times = HTTPConnection("127.0.0.1", port), random.Random(seed), []
    while (start := perf_counter()) < until:
        connection.request("GET", question.format(rng.randint(1, largest), k))
        response = connection.getresponse()
        response.read()
        if response.status != 200:
            raise RuntimeError(f"status {response.status}")
        times.append(perf_counter() - start)
    return times


def measure(port: int, question: str, k: int, largest: int, clients: int, seconds: float) -> dict[str, float]:
    """Ask from some threads for some seconds; return requests per second and quantiles of their milliseconds."""
    start = perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        asked = [pool.submit(ask, port, question, k, largest, start + seconds, seed) for seed in range(clients)]
    times = [time for client in asked for time in client.result()]
    p50, p99 = np.percentile(times, [50, 99]) * 1000
    rate = len(times) / (perf_counter() - start)
    return {"per second": round(rate), "p50 ms": round(p50, 1), "p99 ms": round(p99, 1)}


@click.command()
@click.option("--users", default=100_000, show_default=True, help="Number of users.")
@click.option("--items", default=100_000, show_default=True, help="Number of items.")
@click.option("--size", default=64, show_default=True, help="Dimension of the representations.")
@click.option("--seen", default=20, show_default=True, help="Items that a user has seen.")
@click.option("--k", default=10, show_default=True, help="Items per answer.")
@click.option("--clients", default=8, show_default=True, help="Connections that ask at the same time.")
@click.option("--seconds", default=10.0, show_default=True, help="For each question.")
@click.option("--threads", default=1, show_default=True, help="Of torch in the server.")
@click.option("--port", default=None, type=int, help="Of another server, which runs already; with --question.")
@click.option("--question", default=None, help="What to ask it: a path with {} for a user's number and for k.")
def main(
    users: int, items: int, size: int, seen: int, k: int, clients: int, seconds: float, threads: int,
    port: int | None, question: str | None,
) -> None:  # fmt: skip
    """Ask a server in a process of its own from this one, each client as fast as it is answered; print JSON lines."""
    if port is not None:
        print(json.dumps(measure(port, question or "", k, users, clients, seconds)))
        return
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    server = context.Process(target=serve, args=(there, threads, (users + 1, items + 1, size, seen)), daemon=True)
    server.start()
    try:
        port = here.recv()
        for name, path in QUESTIONS.items():
            found = measure(port, path, k, min(users, items), clients, seconds)
            print(json.dumps({"question": name, "items": items, "clients": clients, "threads": threads, **found}))
        connection = HTTPConnection("127.0.0.1", port)
        connection.request("GET", "/metrics")
        memory = re.findall(r"slifmr_resident_bytes (\d+)", connection.getresponse().read().decode())
        print(json.dumps({"resident MB": int(memory[0]) >> 20}))
    finally:
        server.terminate()
        server.join()


if __name__ == "__main__":
    main()
