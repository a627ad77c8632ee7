"""Settings of closed forms by validation: one after the other over the search space, until no other value is better.

python -m benchmarks.closed_forms --dataset=amazon-toys --data_path=DATA --models=EASE,CEASE,AddEASE,L3AE

The data are read once; a setting that is tried costs one inversion. The test split is not looked at.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import yaml

import recbole_slifmr  # noqa: F401  registers the models
from recbole_slifmr.files import replace_file
from recbole_slifmr.host.settings import make_config
from recbole_slifmr.paths import PROPERTIES
from recbole_slifmr.search.space import Point, Space, read_space, start
from recbole_slifmr.search.trial import load_trial_data
from recbole_slifmr.training.experiment import make_trainer


class Found(NamedTuple):
    """The best settings, their validation score, and how many were tried."""

    point: Point
    score: float
    n_trials: int


def search(model: str, dataset: str, settings: Mapping[str, Any], space: Space | None = None) -> Found:
    """Search from the model's defaults.

    Args:
        model: name of a model.
        dataset: name of the data set's folder under ``data_path``.
        settings: of RecBole, which win over the defaults.
        space: settings with countable values; that of ``properties/tune`` if None.
    """
    config = make_config(model, dataset, settings=settings)
    space = read_space(PROPERTIES / "tune" / f"{model}.yaml") if space is None else space
    data = load_trial_data(config, config["seed"])
    scores: dict[str, float] = {}

    def score(point: Point) -> float:
        if str(point) not in scores:
            trainer = make_trainer(make_config(model, dataset, settings={**settings, **point}), data.train)
            scores[str(point)] = float(trainer._valid_epoch(data.valid)[0])
        return scores[str(point)]

    best, before = start(space, config), None
    while best != before:
        before = best
        for name, domain in space.items():
            best = max([best, *({**best, name: value} for value in domain.steps or ())], key=score)
    return Found(best, score(best), len(scores))


def main() -> None:
    """Print the settings found for each model as YAML, and write them to files if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--data_path", required=True)
    parser.add_argument("--models", default="EASE,CEASE,AddEASE,L3AE")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--out", type=Path, help="Folder for MODEL/best.yaml, as slifmr tune writes it.")
    asked = parser.parse_args()
    settings = {"data_path": asked.data_path, "threads": asked.threads, "show_progress": False, "state": "ERROR"}
    for model in asked.models.split(","):
        found = search(model, asked.dataset, settings)
        text = f"# closed_forms: {model} on {asked.dataset}\n# trials: {found.n_trials}\n"
        text += f"# validation score: {found.score:.4f}\n{yaml.safe_dump(found.point, sort_keys=False)}"
        print(text, flush=True)
        if asked.out:
            file = asked.out / model / "best.yaml"
            file.parent.mkdir(parents=True, exist_ok=True)
            replace_file(file, partial(Path.write_text, data=text, encoding="utf-8"))


if __name__ == "__main__":
    main()
