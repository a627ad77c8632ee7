"""What the result of a run depends on beside its settings: the files that it reads and the code that it runs.

A finished run counts as just the run that is asked for only while these are the same. Files are hashed by content, once
per process as long as size and times stay as they are.
"""

from __future__ import annotations

import functools
import glob
import hashlib
import importlib.metadata
import importlib.util
import inspect
import json
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from recbole.config import Config

from recbole_slifmr.data.dataset import feature_folder_of
from recbole_slifmr.data.noise import reads
from recbole_slifmr.files import file_hash
from recbole_slifmr.host.own import sources_of
from recbole_slifmr.host.settings import make_config
from recbole_slifmr.paths import PROPERTIES

PACKAGE = Path(__file__).parents[1]
ROOMS = ("nn", "host", "data", "model", "training")  # what trains and scores; reports and commands change no result
LIBRARIES = ("recbole", "torch", "numpy", "scipy", "pandas")


def input_hashes(
    model: str, dataset: str, config_files: Sequence[str | Path] = (), settings: Mapping[str, Any] | None = None
) -> dict[str, str]:
    """Return a hash by name of all that a run reads: the code, default settings, data files, files that settings name.

    Args:
        model: name of the model.
        dataset: name of the data set's folder under ``data_path``.
        config_files: YAML files of settings; not hashed, but the files that they name are.
        settings: settings that win over the files; not hashed either.

    Returns:
        ``code`` and one entry per file. A knowledge graph and features are among them if the model reads them.

    Raises:
        SettingError: for a model or setting that cannot be used.
    """
    texts = [Path(file).read_text(encoding="utf-8") for file in config_files]
    content = [model, dataset, texts, dict(settings or {}), os.getcwd()]
    key = json.dumps(content, sort_keys=True, default=str)
    if key not in _sources:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # shown when the run itself is set up
            _sources[key] = _find_sources(make_config(model, dataset, config_files, settings))
    source = _sources[key]
    defaults = ("overall.yaml", f"model/{model}.yaml", f"dataset/{dataset}.yaml")
    files = {f"properties/{name}": PROPERTIES / name for name in defaults}
    files |= {path.name: path for path in source.data_files()}
    files |= {str(path.resolve()): path for path in source.named}
    return {"code": code_hash(), **{name: file_hash(path) for name, path in files.items() if path.is_file()}}


class _Sources(NamedTuple):
    """Where a run's inputs lie: a configuration is slow to make, a folder is quick to list."""

    folder: Path
    dataset: str
    reads_kg: bool
    features: Path | None
    named: tuple[Path, ...]

    def data_files(self) -> Iterator[Path]:
        """Yield the atomic files and the feature files, by name."""
        if self.folder.is_dir():
            for path in sorted(self.folder.glob(f"{glob.escape(self.dataset)}.*")):
                if self.reads_kg or path.suffix not in (".kg", ".link"):
                    yield path
        if self.features is not None and self.features.is_dir():
            for kind in ("*.npy", "*.txt"):
                yield from sorted(self.features.glob(kind))


_sources: dict[str, _Sources] = {}


def _find_sources(config: Config) -> _Sources:
    inputs = reads(config)
    features = feature_folder_of(config) if "feature" in inputs else None
    named = [*_named_files(config), *_foreign_code(config)]
    if features is not None and isinstance(config["modalities"], Mapping):
        for entry in config["modalities"].values():
            names = entry.values() if isinstance(entry, Mapping) else [entry]
            named += [features / name for name in names if isinstance(name, str)]  # one may be made later
    return _Sources(Path(config["data_path"]), config["dataset"], "kg" in inputs, features, tuple(dict.fromkeys(named)))


def _named_files(config: Config) -> list[Path]:
    """Return the files that settings name, such as weights to begin with."""
    values = config.final_config_dict.values()
    return [Path(value) for value in values if isinstance(value, str) and os.path.isfile(value)]


def _foreign_code(config: Config) -> list[Path]:
    """Return the source files of the model and of the callbacks as far as they are outside this package.

    Of a model of the user's own, what :func:`~recbole_slifmr.host.own.sources_of` says.
    """
    files = [inspect.getsourcefile(config.model_class), *map(str, sources_of(config["model"]))]
    for callback in config["callbacks"] or []:
        try:
            spec = importlib.util.find_spec(str(callback).partition(":")[0])
        except (ImportError, ValueError):  # the trainer says what is wrong with it
            continue
        files.append(spec.origin if spec is not None else None)
    paths = [Path(file) for file in files if file and os.path.isfile(file)]
    return [path for path in paths if PACKAGE not in path.parents]


@functools.cache
def code_hash() -> str:
    """Return a hash of the package's code that a result depends on, and of the versions of the libraries below it."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(path for room in ROOMS for path in (PACKAGE / room).rglob("*.py")):
        digest.update(f"{path.relative_to(PACKAGE).as_posix()} {file_hash(path)}\n".encode())
    for library in LIBRARIES:
        digest.update(f"{library} {importlib.metadata.version(library)}\n".encode())
    return digest.hexdigest()
