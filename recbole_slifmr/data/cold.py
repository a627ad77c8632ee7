"""Cold items: a share of the items held out of training entirely, to be recommended without a single interaction.

The setting ``cold_items`` is that share. A cold item is one without training interactions: those held out and, while
the setting is above 0, those that the split leaves without any, too.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from recbole.data.interaction import cat_interactions
from recbole.utils import ModelType
from torch import Tensor

from recbole_slifmr.errors import DataError, SettingError


class ColdScoring(NamedTuple):
    """Whether a model can tell one cold item from another.

    Attributes:
        possible: whether it can.
        reason: what it scores them by, or why it cannot; one line.
    """

    possible: bool
    reason: str


def can_score_cold(config: Any) -> ColdScoring:
    """Say whether the model of the settings can score cold items.

    A model of this package says so in its class method ``scores_cold``; of RecBole's, those with a knowledge graph can.
    """
    model, name = config.model_class, config["model"]
    if hasattr(model, "scores_cold"):
        return model.scores_cold(config)
    if config["MODEL_TYPE"] == ModelType.KNOWLEDGE:
        return ColdScoring(True, f"{name} scores cold items by the knowledge graph")
    return ColdScoring(False, f"{name} knows items by their interactions only")


def choose_items(items: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Return the distinct ids of a share of the items, rounded but at least one, chosen uniformly.

    Args:
        items: item of each interaction, ``[E]``.
        share: in (0, 1).
        seed: of the choice.

    Raises:
        SettingError: if the share is out of range or leaves no item to train with.
    """
    if not 0 < share < 1:
        raise SettingError(f"cold_items must be in [0, 1), not {share}")
    known = np.unique(items)
    n_cold = max(1, round(share * len(known)))
    if n_cold == len(known):
        raise SettingError(f"cold_items: {share} leaves none of the {len(known)} items to train with")
    return np.sort(np.random.default_rng(seed).choice(known, n_cold, replace=False))


def hold_out(parts: list[Any], share: float, seed: int) -> str:
    """Move the training interactions of a share of the items to validation and test, half of each item's to either.

    All other interactions stay where they are, those of the same items in validation and test included.

    Args:
        parts: RecBole's data sets of training, validation and test, changed in place.
        share: see :func:`choose_items`.
        seed: of the choice and of the halves.

    Returns:
        what was moved, in words.
    """
    train, valid, test = parts
    items = [part.inter_feat[part.iid_field].numpy() for part in parts]
    chosen = choose_items(np.concatenate(items), share, seed)
    held = np.isin(items[0], chosen)
    rows = np.flatnonzero(held)
    np.random.default_rng([seed, 1]).shuffle(rows)
    rows = rows[np.argsort(items[0][rows], kind="stable")]  # item by item, in random order within
    before = train.inter_feat
    for part, moved in ((valid, rows[::2]), (test, rows[1::2])):
        part.inter_feat = cat_interactions([part.inter_feat, before[torch.from_numpy(moved)]])
    train.inter_feat = before[torch.from_numpy(np.flatnonzero(~held))]
    users = [np.unique(feat[train.uid_field].numpy()) for feat in (before, train.inter_feat)]
    return (
        f"cold items: {len(chosen)} of {train.item_num - 1} held out of training; {len(rows[::2])} interactions moved "
        f"to validation, {len(rows[1::2])} to test; {len(users[0]) - len(users[1])} users left without any in training"
    )


def is_cold(train: Any) -> Tensor:
    """Return whether an item has no training interaction, ``[n_items]`` bool; False for the padding item.

    Args:
        train: RecBole's data set of the training split.
    """
    cold = torch.bincount(train.inter_feat[train.iid_field], minlength=train.item_num) == 0
    cold[0] = False
    return cold


def sample_warm_only(sampler: Any, cold: Tensor) -> None:
    """Have a sampler draw no cold items: in training they do not exist yet, and as negatives they would be pushed down.

    Args:
        sampler: RecBole's sampler of training negatives, changed in place.
        cold: ``[n_items]`` bool.

    Raises:
        DataError: if a user has every warm item.
    """
    n_warm = len(cold) - 1 - int(cold.sum())
    if max(map(len, sampler.used_ids)) >= n_warm:
        raise DataError(f"cold_items: a user has all {n_warm} items that are left in training: hold out fewer")
    sampler.sampling = partial(_sample_warm, sampler.sampling, cold.numpy())


def _sample_warm(draw: Any, cold: np.ndarray, n: int) -> np.ndarray:
    items = draw(n)
    while len(again := np.flatnonzero(cold[items])):
        items[again] = draw(len(again))
    return items
