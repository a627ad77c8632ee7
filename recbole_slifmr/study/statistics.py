"""Statistics over runs and users: means, tests of significance, intervals, importance of settings."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy import stats


class Comparison(NamedTuple):
    """A model against the reference on one metric, over the users.

    Attributes:
        model: the other model.
        difference: mean over users of reference minus model.
        p_wilcoxon: two-sided Wilcoxon signed-rank test, Holm-corrected over the models.
        p_t: two-sided paired t test, Holm-corrected over the models.
    """

    model: str
    difference: float
    p_wilcoxon: float
    p_t: float


def summarise(runs: pd.DataFrame) -> pd.DataFrame:
    """Return mean and standard deviation over the seeds: one row per model, columns ``(name, "mean" | "std")``."""
    grouped = runs.drop(columns="seed").groupby("model", sort=False)
    return grouped.agg(["mean", "std"])


def holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm's step-down correction (Scandinavian Journal of Statistics, 1979), in the order given."""
    order = np.argsort(p_values)
    n = len(p_values)
    raised = np.maximum.accumulate([min(1.0, (n - i) * p_values[j]) for i, j in enumerate(order)])
    corrected = np.empty(n)
    corrected[order] = raised
    return corrected.tolist()


def user_means(users: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Return the mean over the seeds: one row per user, one column per model."""
    return users.pivot_table(index="user", columns="model", values=metric, aggfunc="mean")


def compare(users: pd.DataFrame, metric: str, reference: str) -> list[Comparison]:
    """Test the reference against every other model, user by user (each user's mean over the seeds).

    Returns:
        one comparison per other model; p = 1 where no user differs, or where there is but one user.
    """
    table = user_means(users, metric)
    others = [model for model in users["model"].unique() if model != reference]
    differences = [table[reference] - table[model] for model in others]
    differ = [len(table) > 1 and bool((difference != 0).any()) for difference in differences]
    wilcoxon = [float(stats.wilcoxon(d).pvalue) if some else 1.0 for d, some in zip(differences, differ, strict=True)]
    t_test = [
        float(stats.ttest_rel(table[reference], table[model]).pvalue) if some else 1.0
        for model, some in zip(others, differ, strict=True)
    ]
    corrected = zip(others, differences, holm(wilcoxon), holm(t_test), strict=True)
    return [Comparison(model, float(d.mean()), w, t) for model, d, w, t in corrected]


class Improvement(NamedTuple):
    """Relative improvement of the reference over the best other model, with a 95% bootstrap interval over users.

    The interval is NaN with fewer than two users.
    """

    best: str
    relative: float
    low: float
    high: float


def improvement(users: pd.DataFrame, metric: str, reference: str, n_resamples: int = 2000) -> Improvement:
    """Return the relative improvement in the mean of ``metric`` over the best of the other models."""
    table = user_means(users, metric)
    best = table.drop(columns=reference).mean().idxmax()
    one, other = table[reference].to_numpy(), table[best].to_numpy()

    def relative(a: np.ndarray, b: np.ndarray, axis: int = -1) -> Any:
        return a.mean(axis=axis) / b.mean(axis=axis) - 1

    return Improvement(str(best), float(relative(one, other)), *_interval((one, other), relative, n_resamples))


def _interval(samples: Sequence[np.ndarray], statistic: Callable[..., Any], n_resamples: int) -> tuple[float, float]:
    """Return the 95% bootstrap interval of a statistic over users, NaN with fewer than two of them."""
    if len(samples[0]) < 2:
        return math.nan, math.nan
    found = stats.bootstrap(
        samples, statistic, paired=True, n_resamples=n_resamples, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    return float(found.low), float(found.high)


def loss_difference(
    users: pd.DataFrame, metric: str, one: tuple[str, str], other: tuple[str, str], n_resamples: int = 2000
) -> tuple[float, float, float] | None:
    """Return how much larger one model's relative loss is than another's, with a 95% bootstrap interval over users.

    Args:
        users: one row per run and user.
        metric: what is lost.
        one: titles of the model without and with noise.
        other: titles of the other model without and with noise.
        n_resamples: of the bootstrap.

    Returns:
        difference, low and high, which are NaN with fewer than two users; None if a run is missing.
    """
    table = user_means(users, metric)
    if not {*one, *other} <= set(table):
        return None

    def difference(a: np.ndarray, b: np.ndarray, c: np.ndarray, d: np.ndarray, axis: int = -1) -> Any:
        return d.mean(axis=axis) / c.mean(axis=axis) - b.mean(axis=axis) / a.mean(axis=axis)

    scores = tuple(table[title].to_numpy() for title in (*one, *other))
    return float(difference(*scores)), *_interval(scores, difference, n_resamples)


def importance(trials: pd.DataFrame, names: Sequence[str]) -> pd.Series | None:
    """Return how much each setting tells about the score: permutation importance in a random forest over the trials.

    The importances add up to 1. Settings that a trial left at their default count as a value of their own.

    Args:
        trials: one row per trial with ``score`` and the settings.
        names: of the settings.

    Returns:
        importance by name, falling; None with fewer than four scored trials or scores that do not differ.
    """
    from sklearn.ensemble import RandomForestRegressor
    from sklearn.inspection import permutation_importance

    scored = trials[trials["score"].notna()]
    names = [name for name in names if name in scored]
    if len(scored) < 4 or scored["score"].nunique() < 2 or not names:
        return None
    features = pd.concat([as_numbers(scored[name])[0] for name in names], axis=1).fillna(-1e9)
    forest = RandomForestRegressor(n_estimators=200, min_samples_leaf=2, random_state=0).fit(features, scored["score"])
    found = permutation_importance(forest, features, scored["score"], n_repeats=20, random_state=0)
    positive = np.clip(found.importances_mean, 0, None)
    share = positive / positive.sum() if positive.sum() > 0 else positive
    return pd.Series(share, index=names).sort_values(ascending=False)


def as_numbers(column: pd.Series) -> tuple[pd.Series, list[str] | None]:
    """Return a column as numbers, NaN where empty, and what the numbers stand for if they are positions in a list."""
    if all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in column.dropna()):
        return column.astype(float), None
    values = sorted({str(value) for value in column.dropna()})
    return column.map(lambda value: values.index(str(value)), na_action="ignore").astype(float), values
