"""How well items that were not in training find their users: Recall@20 among the new items.

A tenth of the items, drawn by seed 0, is taken out of an atomic data set with a fixed split; a model is trained on the
rest, and the users who have some of the items taken out are recommended these by ``Recommender.recommend_new``. Beside
it stands what a random order finds.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

from recbole_slifmr import Recommender

ALL = {"split": {"RS": [0.9, 0.1, 0.0]}, "order": "RO", "group_by": "user", "mode": "full"}
K = 20


def read(folder: Path) -> tuple[pd.DataFrame, list[str], pd.DataFrame, pd.DataFrame, dict[str, np.ndarray]]:
    """Return interactions, the items of the feature rows, triples, links and features of an atomic data set."""
    parts = [pd.read_csv(file, sep="\t", dtype=str) for file in sorted(folder.glob("*.inter"))]
    pairs = pd.concat(parts).iloc[:, :2].set_axis(["user", "item"], axis=1)
    triples = pd.read_csv(folder / f"{folder.name}.kg", sep="\t", dtype=str)
    triples = triples.set_axis(["head", "relation", "tail"], axis=1)
    links = pd.read_csv(folder / f"{folder.name}.link", sep="\t", dtype=str).set_axis(["item", "entity"], axis=1)
    items = (folder / "items.txt").read_text(encoding="utf-8").splitlines()
    return pairs, items, triples, links, {file.stem: np.load(file) for file in sorted(folder.glob("*.npy"))}


def main() -> None:
    """Print a row per model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", required=True, type=Path, help="Folder of a data set with all inputs.")
    parser.add_argument("--models", default="CEASE,L3AE,SLIFMR", help="With commas between them.")
    parser.add_argument("--epochs", default=6, type=int, help="Of SLIFMR.")
    arguments = parser.parse_args()
    pairs, items, triples, links, features = read(arguments.dataset)
    new = np.zeros(len(items), dtype=bool)
    new[np.random.default_rng(0).choice(len(items), len(items) // 10, replace=False)] = True
    tokens = pd.Series(items)
    held = pairs["item"].isin(tokens[new])
    known = pairs[~held]
    wanted = pairs[held & pairs["user"].isin(known["user"])].groupby("user")["item"].agg(set)
    entity = triples["head"].isin(links["entity"][links["item"].isin(tokens[new])])
    of_item = dict(zip(links["entity"], links["item"], strict=True))
    new_triples = triples[entity].assign(head=triples["head"][entity].map(of_item))
    print(f"{new.sum()} new items, {len(wanted)} users of theirs; in a random order {K / new.sum():.4f}", flush=True)
    for model in arguments.models.split(","):
        epochs = {"epochs": arguments.epochs} if model.startswith("SLIFMR") else {}
        own = Recommender(model, eval_args=ALL, **epochs).fit(
            known,
            pd.DataFrame({"item": tokens[~new]}),
            triples[~entity],
            links[~links["item"].isin(tokens[new])],
            {name: rows[~new] for name, rows in features.items()},
        )
        of_new = {name: rows[new] for name, rows in features.items()}
        lists = own.recommend_new(pd.DataFrame({"item": tokens[new]}), new_triples, of_new, wanted.index, k=K)
        found = lists.groupby("user")["item"].agg(set)
        recall = np.mean([len(wanted[user] & found[user]) / len(wanted[user]) for user in wanted.index])
        print(f"{model}: {recall:.4f}", flush=True)


if __name__ == "__main__":
    main()
