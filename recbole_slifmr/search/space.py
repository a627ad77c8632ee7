"""Search spaces: from YAML or RecBole's space files to values of settings.

``{choice: [a, b]}`` is one of the values; ``{uniform: [low, high]}`` and ``{loguniform: [low, high]}`` are numbers
between the bounds; ``{quniform: [low, high, q]}`` is one of low, low + q, ... up to high; ``{randint: [low, high]}`` is
a whole number from low to below high. ``if: {other: value}`` beside it makes a setting depend on another of the space,
which must have that value or one of a list of them; else the setting keeps its default.
"""

from __future__ import annotations

import ast
import itertools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from recbole_slifmr.errors import SettingError

N_NUMBERS = {"uniform": 2, "loguniform": 2, "quniform": 3, "randint": 2}
KINDS = ("choice", *N_NUMBERS)

Point = dict[str, Any]  # value by setting


@dataclass(frozen=True)
class Domain:
    """The values that a setting may take.

    Attributes:
        kind: one of ``KINDS``.
        values: the choices; else low, high and, for ``quniform``, the step.
        condition: values that other settings of the space must have, by name.
    """

    kind: str
    values: tuple[Any, ...]
    condition: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    @property
    def steps(self) -> tuple[Any, ...] | None:
        """All values in order; None for a continuous domain."""
        if self.kind == "choice":
            return self.values
        if self.kind == "randint":
            return tuple(range(*self.values))
        if self.kind == "quniform":
            low, high, q = self.values
            count = math.floor((high - low) / q + 1e-9) + 1
            return tuple(low + i * q if isinstance(low + q, int) else round(low + i * q, 12) for i in range(count))
        return None

    @property
    def ends(self) -> tuple[Any, ...]:
        """The choices, or the lowest and the highest value."""
        if self.kind == "choice":
            return self.values
        return self.values if self.steps is None else (self.steps[0], self.steps[-1])

    def sample(self, rng: np.random.Generator) -> Any:
        """Draw a value."""
        if self.steps is not None:
            return self.steps[int(rng.integers(len(self.steps)))]
        low, high = self.values
        if self.kind == "uniform":
            return float(rng.uniform(low, high))
        return float(np.clip(math.exp(rng.uniform(math.log(low), math.log(high))), low, high))

    def suggest(self, trial: Any, name: str) -> Any:
        """Ask an Optuna trial for a value; steps are asked for by position, so that they may be lists."""
        if self.kind == "choice":
            return self.values[trial.suggest_categorical(name, list(range(len(self.values))))]
        if self.steps is not None:
            return self.steps[trial.suggest_int(name, 0, len(self.steps) - 1)]
        return trial.suggest_float(name, *self.values, log=self.kind == "loguniform")

    def perturb(self, value: Any, rng: np.random.Generator) -> Any:
        """Return a neighbour for population-based training: a continuous value times 0.8 or 1.2, or now and then anew.

        Others stay: they may change the shape of the model, and a checkpoint would not fit.
        """
        if self.steps is not None:
            return value
        if rng.random() < 0.25:
            return self.sample(rng)
        return float(np.clip(value * rng.choice([0.8, 1.2]), *self.values))


Space = dict[str, Domain]


# -- reading ------------------------------------------------------------------------------------------------------


def read_space(path: str | Path) -> Space:
    """Read a space from a ``.yaml`` file, or from a file in RecBole's format (``.hyper``, ``.test``).

    Raises:
        SettingError: naming the file, the setting and what is wrong.
    """
    path = Path(path)
    if not path.is_file():
        raise SettingError(f"search space {path} not found")
    text = path.read_text(encoding="utf-8")
    if path.suffix not in (".yaml", ".yml"):
        return _parse_recbole(text, str(path))
    try:
        content = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise SettingError(f"search space {path} is not YAML: {' '.join(str(error).split())}") from error
    return parse_space(content, str(path))


class _Loader(yaml.SafeLoader):
    """Reads 1e-4 as a number, as RecBole does."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def parse_space(content: Any, where: str = "search space") -> Space:
    """Build a space from ``{setting: {kind: values, if: {other: value}}}``, settings after those they depend on.

    Raises:
        SettingError: naming ``where``, the setting and what is wrong.
    """
    if not isinstance(content, dict) or not content:
        raise SettingError(f"{where} holds no settings, each name: {{kind: values}}")
    space = {str(name): _parse_domain(entry, f"{where}: {name}") for name, entry in content.items()}
    return _in_order(space, where)


def _parse_domain(entry: Any, where: str) -> Domain:
    kinds = [kind for kind in entry if kind != "if"] if isinstance(entry, dict) else []
    if len(kinds) != 1 or kinds[0] not in KINDS:
        raise SettingError(f"{where}: expected one of {', '.join(KINDS)} with its values, not {entry!r}")
    kind, values, condition = kinds[0], entry[kinds[0]], entry.get("if") or {}
    if not isinstance(values, (list, tuple)) or not values:
        raise SettingError(f"{where}: {kind} takes a list of values, not {values!r}")
    if not isinstance(condition, dict):
        raise SettingError(f"{where}: 'if' reads {{setting: value or list of values}}, not {condition!r}")
    domain = Domain(
        kind,
        tuple(values),
        {str(name): tuple(v) if isinstance(v, list) else (v,) for name, v in condition.items()},
    )
    if kind != "choice":
        _check_numbers(domain, where)
    return domain


def _check_numbers(domain: Domain, where: str) -> None:
    kind, values = domain.kind, domain.values
    numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)
    if len(values) != N_NUMBERS[kind] or not numbers:
        names = "low, high, q" if kind == "quniform" else "low, high"
        raise SettingError(f"{where}: {kind} takes [{names}], not {list(values)!r}")
    if kind == "randint" and not all(isinstance(value, int) for value in values):
        raise SettingError(f"{where}: randint takes whole numbers, not {list(values)!r}")
    if (
        not values[0] < values[1]
        or (kind == "loguniform" and values[0] <= 0)
        or (kind == "quniform" and values[2] <= 0)
    ):
        raise SettingError(f"{where}: {kind} {list(values)!r} holds nothing: low must be below high"
                           + {"loguniform": " and above 0", "quniform": " and q above 0"}.get(kind, ""))  # fmt: skip


def _in_order(space: Space, where: str) -> Space:
    """Return the space with every setting after those that it depends on."""
    for name, domain in space.items():
        for other in domain.condition:
            if other not in space:
                raise SettingError(f"{where}: {name} depends on '{other}', which is not in the space")
    ordered: Space = {}
    while len(ordered) < len(space):
        ready = [n for n, d in space.items() if n not in ordered and all(other in ordered for other in d.condition)]
        if not ready:
            rest = ", ".join(name for name in space if name not in ordered)
            raise SettingError(f"{where}: {rest} depend on each other in a circle")
        ordered.update((name, space[name]) for name in ready)
    return ordered


def _parse_recbole(text: str, where: str) -> Space:
    """Read lines of ``name kind values``; the bounds of a ``loguniform`` are logarithms, as in RecBole and hyperopt."""
    content: dict[str, Any] = {}
    for number, line in enumerate(text.splitlines(), 1):
        name, kind, values = [*line.split(maxsplit=2), "", "", ""][:3]
        if not values:
            continue  # as RecBole does
        place = f"{where}, line {number}: {name}"
        try:
            read = ast.literal_eval(values if kind == "choice" else f"[{values}]")
        except (ValueError, SyntaxError) as error:
            raise SettingError(f"{place}: '{values}' cannot be read as a list of values") from error
        if kind == "loguniform":
            read = [math.exp(bound) for bound in read]
        content[name] = _parse_domain({kind: list(read)}, place)
    if not content:
        raise SettingError(f"{where} holds no settings, each on a line: name kind values")
    return content


# -- points -------------------------------------------------------------------------------------------------------


def _applies(domain: Domain, point: Point) -> bool:
    return all(other in point and point[other] in values for other, values in domain.condition.items())


def sample(space: Space, rng: np.random.Generator) -> Point:
    """Draw a point; settings whose condition is not met are left out."""
    point: Point = {}
    for name, domain in space.items():
        if _applies(domain, point):
            point[name] = domain.sample(rng)
    return point


def suggest(space: Space, prefix: str, trial: Any) -> Point:
    """Ask an Optuna trial for a point, as a function that defines by running; ``prefix`` stands before each name."""
    point: Point = {}
    for name, domain in space.items():
        if _applies(domain, point):
            point[name] = domain.suggest(trial, prefix + name)
    return {prefix + name: value for name, value in point.items()}


def perturb(space: Space, point: Point, rng: np.random.Generator) -> Point:
    """Return a neighbour of a point, see :meth:`Domain.perturb`."""
    return {name: space[name].perturb(value, rng) for name, value in point.items()}


def grid(space: Space) -> list[Point]:
    """Return every point of a space without continuous settings.

    Raises:
        SettingError: naming a continuous setting.
    """
    points: list[Point] = [{}]
    for name, domain in space.items():
        steps = domain.steps
        if steps is None:
            raise SettingError(f"grid search takes settings with countable values: {name} is {domain.kind}")
        points = [
            {**point, **extra}
            for point in points
            for extra in ([{name: value} for value in steps] if _applies(domain, point) else [{}])
        ]
    return points


def ends(space: Space) -> list[Point]:
    """Return points that together hold every choice and both ends of every range, one setting each."""
    return list(itertools.chain.from_iterable([{name: v} for v in d.ends] for name, d in space.items()))


def start(space: Space, values: Mapping[str, Any]) -> Point:
    """Return the point at which settings have the ``values`` that they would have anyway, None for no value.

    They need not lie in the space: a search starts from what its user would get without it.
    """
    point: Point = {}
    for name, domain in space.items():
        if _applies(domain, point) and values[name] is not None:
            point[name] = values[name]
    return point


def draw(space: Space, count: int, seed: int, first: Point) -> list[Point]:
    """Return ``first`` and points drawn that differ: ``count`` in all, or fewer if the space does not hold so many."""
    rng = np.random.default_rng(seed)
    points: dict[str, Point] = {repr(sorted(first.items())): first}
    for _ in range(100 * count):
        if len(points) == count:
            break
        point = sample(space, rng)
        points.setdefault(repr(sorted(point.items())), point)
    return list(points.values())
