"""From the YAML of a study to the runs it needs."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recbole_slifmr.data.noise import KINDS, reads
from recbole_slifmr.errors import SettingError
from recbole_slifmr.host.own import name_of
from recbole_slifmr.host.settings import make_config, read_settings
from recbole_slifmr.paths import PROPERTIES
from recbole_slifmr.study.benchmark import Benchmark, Variant, given_settings, make_tasks, refuse_twice
from recbole_slifmr.training.experiment import load_data

STUDIES = PROPERTIES / "study"
ALLOWED = {
    "variants": {"variants"},
    "robustness": {"kinds", "levels"},
    "interval": {"intervals"},
    "sensitivity": {"vary"},
    "coldstart": {"cold_items"},
}
GROUPS = {"interaction": "interaction_add", "feature": "feature_swap", "kg": "kg_tail"}  # short for
COMMON = {"title", "kind", "models", "reference"}
LISTS = {  # entries that are lists, and of what
    "models": (str,),
    "kinds": (str,),
    "levels": (str, int, float),
    "intervals": (str, int, float),
}
VARIED = {  # what a study itself sets, and how it is told
    "robustness": {"noise": "--kinds and --levels"},
    "interval": {"refresh_interval": "--intervals", "self_loop": "--intervals"},
}


@dataclass(frozen=True)
class Study(Benchmark):
    """A benchmark over variants.

    Attributes:
        kind: how it is reported, a key of ``ALLOWED``.
        heading: title of the table.
        factors: what sets each row apart, by title.
    """

    kind: str = "variants"
    heading: str = ""
    factors: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def study_names() -> list[str]:
    """Return the names of the studies that come with the package."""
    return sorted(file.stem for file in STUDIES.glob("*.yaml"))


def read_study(name: str, changes: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the definition of a study.

    Args:
        name: of a study of the package, or a YAML file.
        changes: entries that win over the file's.

    Raises:
        SettingError: for an unknown study or an entry that it does not have.
    """
    file = Path(name)
    if file.suffix not in (".yaml", ".yml"):
        file = STUDIES / f"{name}.yaml"
        if not file.is_file():
            raise SettingError(f"no study '{name}': there are {', '.join(study_names())}, or name a YAML file")
    definition = {"title": file.stem, "kind": "variants", "models": ["SLIFMR"], "reference": "", **read_settings(file)}
    kind = definition["kind"]
    if kind not in list(ALLOWED):  # it may be anything that YAML has
        raise SettingError(f"{file}: kind must be one of {', '.join(ALLOWED)}, not '{kind}'")
    for entry in changes or {}:
        if entry not in ALLOWED[kind] | COMMON:
            raise SettingError(f"study '{name}' has no {entry}: it is of the kind '{kind}'")
    definition.update(changes or {})
    for entry in definition:
        if entry not in ALLOWED[kind] | COMMON:
            raise SettingError(f"{file}: unknown entry '{entry}'; a study of kind '{kind}' has "
                               f"{', '.join(sorted(ALLOWED[kind] | COMMON))}")  # fmt: skip
    for entry in ALLOWED[kind]:
        if entry not in definition:
            raise SettingError(f"{file}: a study of kind '{kind}' needs the entry '{entry}'")
    for entry, types in LISTS.items():
        values = definition.get(entry, [""])
        if not isinstance(values, list) or not values or not all(isinstance(value, types) for value in values):
            what = "names" if types == (str,) else "values"
            raise SettingError(f"{file}: {entry} must be a list of {what}, not {values!r}")
    refuse_twice(definition["models"])
    return definition


def make_study(
    name: str,
    dataset: str,
    changes: Mapping[str, Any] | None = None,
    out: str | Path | None = None,
    config_files: Sequence[str | Path] = (),
    settings: Mapping[str, Any] | None = None,
    **options: Any,
) -> Study:
    """Return what a study will run.

    Args:
        name: of a study of the package, or a YAML file.
        dataset: name of the data set's folder under ``data_path``.
        changes: entries of the definition that win over the file's, such as ``levels``.
        out: folder of the outputs; ``NAME-DATASET`` if None.
        config_files: YAML files of settings for all variants.
        settings: settings for all variants, which win over the files.
        options: the other arguments of :func:`~recbole_slifmr.study.benchmark.make_tasks`.

    Raises:
        SettingError: for anything that cannot be used.
    """
    definition = read_study(name, changes)
    stem = Path(name).stem
    given = given_settings(config_files, settings)
    for setting, option in VARIED.get(definition["kind"], {}).items():
        if setting in (given if setting == "noise" else settings or {}):  # a tuned interval in a file is no wish
            raise SettingError(f"study '{name}' varies {setting} itself: give {option}")
    if definition["kind"] == "coldstart":
        definition["cold_items"] = given.get("cold_items", definition["cold_items"])
    context = _Context(dataset, tuple(config_files), dict(settings or {}))
    variants = list(EXPANSIONS[definition["kind"]](definition, context))
    titles = [variant.label or name_of(variant.model) for variant in variants]
    for title in titles:
        if titles.count(title) > 1:
            raise SettingError(f"study '{name}' has two variants '{title}'")
    reference = definition["reference"]
    if reference and reference not in titles:
        if not {"models", "intervals"} & set(changes or {}):
            raise SettingError(f"study '{name}': reference '{reference}' is none of the variants on these data: "
                               f"{', '.join(titles)}")  # fmt: skip
        reference = ""  # the options may have left it out
    folder = Path(out or f"{stem}-{dataset}")
    tasks, tuned = make_tasks(dataset, variants, folder, config_files=config_files, settings=settings, **options)
    return Study(
        tasks, folder, reference, tuned, tasks[0].test_mask, stem, definition["kind"], definition["title"],
        dict(zip(titles, (variant.factors for variant in variants), strict=True)),
    )  # fmt: skip


class _Context:
    """What an expansion may ask about the data."""

    def __init__(self, dataset: str, config_files: tuple[str | Path, ...], settings: dict[str, Any]) -> None:
        self.dataset, self.config_files, self.settings = dataset, config_files, settings
        self._inputs: dict[str, tuple[bool, list[str]]] = {}

    def config(self, model: str) -> Any:
        return make_config(model, self.dataset, self.config_files, self.settings)

    def inputs(self, model: str) -> tuple[bool, list[str]]:
        """Return whether the model gets a knowledge graph, and the modalities that it gets."""
        if model not in self._inputs:
            data = load_data(self.config(model))[0]._dataset
            self._inputs[model] = data.has_kg, list(data.item_features)
        return self._inputs[model]


def _variants(definition: Mapping[str, Any], context: _Context) -> Iterator[Variant]:
    if not isinstance(definition["variants"], Mapping):
        raise SettingError("a study's variants are a mapping of label to settings")
    for model, (label, settings) in itertools.product(definition["models"], definition["variants"].items()):
        if not isinstance(label, str):
            raise SettingError(f"a variant's label must be text, not {label!r}: put it in quotes")
        if not isinstance(settings, Mapping) or not all(isinstance(setting, str) for setting in settings):
            raise SettingError(f"variant '{label}' must hold settings, name: value, not {settings!r}")
        has_kg, modalities = context.inputs(model)
        needed = _needs(settings)
        if ("kg" in needed and not has_kg) or ("feature" in needed and not modalities):
            continue
        prefix = f"{name_of(model)}, " if len(definition["models"]) > 1 else ""
        if "{modality}" not in label:
            yield Variant(model, settings, prefix + label)
            continue
        for modality in modalities:
            filled = json.loads(json.dumps(settings, default=str).replace("{modality}", modality))
            yield Variant(model, filled, prefix + label.replace("{modality}", modality))


def _needs(settings: Mapping[str, Any]) -> set[str]:
    """Return which inputs, ``kg`` or ``feature``, the settings are about."""
    noise = settings.get("noise")
    names = [*settings, *(map(str, noise) if isinstance(noise, Mapping) else [])]
    of_features = ("use_features", "eta_feature", "exclude_modalities", "modalities", "item_graph_weight")
    needed = set()
    if any(name in ("use_kg", "eta_kg") or name.startswith("kg_") for name in names):
        needed.add("kg")
    if any(name in of_features or name.startswith("feature_") for name in names):
        needed.add("feature")
    return needed


def _robustness(definition: Mapping[str, Any], context: _Context) -> Iterator[Variant]:
    kinds = list(dict.fromkeys(GROUPS.get(kind, kind) for kind in definition["kinds"]))
    for kind in kinds:
        if kind not in KINDS:
            raise SettingError(f"no noise '{kind}': there are {', '.join([*GROUPS, *KINDS])}")
    levels = definition["levels"]
    for level in levels:
        if isinstance(level, bool) or not isinstance(level, (int, float)) or not 0 <= level <= 1:
            raise SettingError(f"levels must be shares from 0 to 1, not {level!r}")
    if 0 not in levels:
        raise SettingError("levels must hold 0: the loss is relative to the score without noise")
    for model, kind, level in itertools.product(definition["models"], kinds, sorted(levels)):
        seen = kind.partition("_")[0] in reads(context.config(model))
        settings = {"noise": {kind: level}} if level and seen else {}
        yield Variant(
            model,
            settings,
            f"{name_of(model)} {kind}={level:g}",
            {"model": name_of(model), "noise": kind, "level": level},
        )


def _interval(definition: Mapping[str, Any], context: _Context) -> Iterator[Variant]:
    for model, interval in itertools.product(definition["models"], definition["intervals"]):
        off = interval in ("off", False)
        settings = {"self_loop": False} if off else {"self_loop": True, "refresh_interval": interval}
        names = {1: "every epoch", "off": "never", False: "never", "adaptive": "adaptive"}
        label = names.get(interval, f"every {interval} epochs")
        prefix = f"{name_of(model)}, " if len(definition["models"]) > 1 else ""
        yield Variant(
            model, settings, prefix + label, {"model": name_of(model), "interval": "off" if off else interval}
        )


def _sensitivity(definition: Mapping[str, Any], context: _Context) -> Iterator[Variant]:
    if not isinstance(definition["vary"], Mapping) or not definition["vary"]:
        raise SettingError(f"vary must name settings and lists of values, not {definition['vary']!r}")
    for model, (setting, values) in itertools.product(definition["models"], definition["vary"].items()):
        config = context.config(model)
        if not isinstance(setting, str) or setting not in config:
            raise SettingError(f"vary: {model} has no setting '{setting}'")
        prefix = f"{name_of(model)} " if len(definition["models"]) > 1 else ""
        for value in values if isinstance(values, list) else [values]:
            shown = value if isinstance(value, (str, int, float)) else str(value)
            factors = {"model": name_of(model), "setting": setting, "value": shown, "default": config[setting]}
            yield Variant(model, {setting: value}, f"{prefix}{setting}={value}", factors)


def _coldstart(definition: Mapping[str, Any], context: _Context) -> Iterator[Variant]:
    for model in definition["models"]:
        yield Variant(model, {"cold_items": definition["cold_items"]}, "", {"model": name_of(model)})


EXPANSIONS = {
    "variants": _variants,
    "robustness": _robustness,
    "interval": _interval,
    "sensitivity": _sensitivity,
    "coldstart": _coldstart,
}
