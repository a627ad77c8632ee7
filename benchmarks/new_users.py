"""How well users who were not in training are served: Recall@20 of the same users in training and as new users.

On RecBole's ml-100k. Each user's history is 80% of the interactions, drawn by seed 0, and the rest is to be found. A
model is trained on the histories of all users, and once more without every fifth user; these users are then recommended
to by ``Recommender.recommend_for``. Settings are fixed, not tuned.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
import recbole

from recbole_slifmr import Recommender

MODELS = {
    "EASE": {"reg_weight": 250.0},
    "LightGCN": {"epochs": 20, "learning_rate": 0.01},
    "XSimGCL": {"epochs": 10, "learning_rate": 0.005},
    "SLIFMR": {"epochs": 6, "learning_rate": 0.005},
}
ALL = {"split": {"RS": [1.0, 0.0, 0.0]}, "order": "RO", "group_by": "user", "mode": "full"}
K = 20


def read() -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return histories and what is to be found."""
    file = Path(recbole.__file__).parent / "dataset_example/ml-100k/ml-100k.inter"
    pairs = pd.read_csv(file, sep="\t", dtype=str).iloc[:, :2].set_axis(["user", "item"], axis=1)
    pairs = pairs.sample(frac=1, random_state=0)
    by_user = pairs.groupby("user")["item"]
    is_known = by_user.cumcount() < 0.8 * by_user.transform("size")
    return pairs[is_known], pairs[~is_known]


def main() -> None:
    """Print a row per model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default=",".join(MODELS), help="With commas between them.")
    models = parser.parse_args().models.split(",")
    known, wanted = read()
    new = sorted(known["user"].unique())[::5]
    history, wanted = known.groupby("user")["item"].agg(list), wanted.groupby("user")["item"].agg(set)

    def recall(lists: pd.Series) -> float:
        return float(np.mean([len(wanted[user] & set(lists[user])) / len(wanted[user]) for user in new]))

    popular = known["item"].value_counts().index
    lists = pd.Series({user: [item for item in popular if item not in set(history[user])][:K] for user in new})
    print(f"{len(new)} users; most popular items: {recall(lists):.4f}", flush=True)
    for model in models:
        own = Recommender(model, eval_args=ALL, **MODELS[model]).fit(known)
        in_training = recall(own.recommend(new, k=K).groupby("user")["item"].agg(list))
        own.fit(known[~known["user"].isin(new)])
        items = set(own.trained.item_tokens)
        lists = {user: own.recommend_for([i for i in history[user] if i in items], k=K)["item"] for user in new}
        print(f"{model}: in training {in_training:.4f}, as new users {recall(pd.Series(lists)):.4f}", flush=True)


if __name__ == "__main__":
    main()
