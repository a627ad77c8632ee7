"""Settings of a model: the type and the limits of each, declared once as a field of a frozen dataclass.

``knn_k: Annotated[int, Range(1)]`` is all that there is to write: :meth:`DataSettings.read` checks the value against
it. Default and meaning stand in ``properties/model/``, the values that a search tries in ``properties/tune/``; tests
hold both against the declarations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, Self, get_args, get_origin, get_type_hints

from recbole_slifmr.errors import SettingError

KINDS = {bool: "True or False", int: "a whole number", float: "a number", str: "a word", list: "a list", dict: "a dict"}


@dataclass(frozen=True)
class Range:
    """The numbers from ``low`` to ``high``; of the ``ends``, ``(`` and ``)`` leave the bound itself out."""

    low: float
    high: float = math.inf
    ends: str = "[]"

    def __contains__(self, value: float) -> bool:
        above = value >= self.low if self.ends[0] == "[" else value > self.low
        return above and (value <= self.high if self.ends[1] == "]" else value < self.high)

    def __str__(self) -> str:
        if self.high < math.inf:
            return f"in {self.ends[0]}{self.low:g}, {self.high:g}{self.ends[1]}"
        return f"{self.low:g} or more" if self.ends[0] == "[" else f"above {self.low:g}"


Count = Annotated[int, Range(1)]
Whole = Annotated[int, Range(0)]
Weight = Annotated[float, Range(0)]
Positive = Annotated[float, Range(0, ends="(]")]
Share = Annotated[float, Range(0, 1)]
PartOf = Annotated[float, Range(0, 1, "[)")]


def split_type(annotation: Any) -> tuple[tuple[type, ...], tuple[Any, ...]]:
    """Return the types and the limits of ``int``, ``str | None``, ``Annotated[int, Range(1)]`` and the like."""
    kind, *limits = get_args(annotation) if get_origin(annotation) is Annotated else (annotation,)
    return get_args(kind) or (kind,), tuple(limits)


def check(name: str, value: Any, annotation: Any) -> None:
    """Refuse a value that the setting ``name`` cannot have; an ``int`` will do for a ``float``.

    Raises:
        SettingError: naming the setting, what it must be and the value.
    """
    kinds, limits = split_type(annotation)
    if not isinstance(value, (*kinds, int) if float in kinds else kinds) or isinstance(value, bool) > (bool in kinds):
        words = " or ".join(KINDS[kind] for kind in kinds if kind in KINDS)
        raise SettingError(f"{name} must be {words}, not {value!r}")
    for limit in limits:
        if value not in limit:
            words = str(limit) if isinstance(limit, Range) else f"one of {', '.join(limit)}"
            raise SettingError(f"{name} must be {words}, not {value!r}")


@dataclass(frozen=True)
class DataSettings:
    """What every model is asked for: what is read of the data set."""

    use_features: bool
    use_kg: bool

    @classmethod
    def read(cls, config: Any) -> Self:
        """Take the settings from RecBole's configuration; what it lacks has the field's default, if there is one.

        Raises:
            SettingError: for a setting of the wrong type or outside its limits.
        """
        values: dict[str, Any] = {}
        for name, annotation in get_type_hints(cls, include_extras=True).items():
            values[name] = getattr(cls, name, None) if config[name] is None else config[name]
            if values[name] is None and type(None) not in split_type(annotation)[0]:
                raise SettingError(
                    f"{name} has no value: set it; a checkpoint of an earlier version has to be made anew"
                )
            check(name, values[name], annotation)
        return cls(**values)


@dataclass(frozen=True)
class ModelSettings(DataSettings):
    """What a model that is trained by gradients is asked for: its size, the trainer's settings."""

    embedding_size: Count
    learning_rate: Weight
    prune_ratio: PartOf
    self_loop: bool
    callbacks: list


@dataclass(frozen=True)
class GraphSettings(ModelSettings):
    """What a model that propagates over the interactions is asked for."""

    n_layers: Whole


@dataclass(frozen=True)
class FeatureSettings(DataSettings):
    """What a model that reads item features is asked for, beside its other settings."""

    modalities: dict | str
    feature_missing: str | None
    feature_path: str | None
