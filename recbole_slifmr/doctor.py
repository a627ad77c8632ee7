"""What is installed and whether it works together: one check per line, each with its fix."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import re
import shutil
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
from packaging.requirements import Requirement

from recbole_slifmr import __version__
from recbole_slifmr.host import compat
from recbole_slifmr.host.settings import make_config
from recbole_slifmr.model import MODELS
from recbole_slifmr.paths import DATASETS, IN_CHECKOUT, PROPERTIES, ROOT

RECBOLE = "recbole==1.2.1"
# The modules not named like their package
MODULES = {
    "scikit-learn": "sklearn",
    "pyyaml": "yaml",
    "faiss-cpu": "faiss",
    "pillow": "PIL",
    "markdown-it-py": "markdown_it",
    "mlflow-skinny": "mlflow",
}
OK, ABSENT, BROKEN = "ok", "absent", "broken"


class Check(NamedTuple):
    """One thing that was looked at.

    Attributes:
        group: what it belongs to.
        name: what it is.
        state: ``ok``, ``absent`` (and not needed) or ``broken``.
        found: what there is.
        fix: what to do about it; empty if nothing.
    """

    group: str
    name: str
    state: str
    found: str
    fix: str = ""


def examine() -> list[Check]:
    """Look at packages, repairs, hardware, folders and the files of the package."""
    return [*_packages(), *_repairs(), *_machine(), *_folders(), *_own_files()]


def _packages() -> Iterator[Check]:
    yield Check("packages", "recbole-slifmr", OK, __version__)
    yield Check("packages", "python", OK, platform.python_version())  # pip refuses an older one
    for requirement in (Requirement(RECBOLE), *requirements()):
        yield check_package(requirement)


def requirements() -> list[Requirement]:
    """Return what the package asks for, that of its extras (``dev`` apart) with the extra as marker."""
    if IN_CHECKOUT:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        lines = list(project["dependencies"])
        for extra, optional in project["optional-dependencies"].items():
            lines += [f"{line}; extra == '{extra}'" for line in optional]
    else:
        lines = importlib.metadata.requires("recbole-slifmr") or []
    return [requirement for requirement in map(Requirement, lines) if extra_of(requirement) != "dev"]


def extra_of(requirement: Requirement) -> str:
    """Return the extra that asks for a requirement; empty for one that is always asked for."""
    named = re.search(r"extra == [\"'](\w+)[\"']", str(requirement.marker or ""))
    return named[1] if named else ""


def check_package(requirement: Requirement) -> Check:
    """See whether a package is there, imports and has the version asked for."""
    name, extra = requirement.name, extra_of(requirement)
    bare = str(requirement).partition(";")[0].strip()
    install = f"pip install {'--no-deps ' if bare == RECBOLE else ''}'{bare}'"
    try:
        module = importlib.import_module(MODULES.get(name.lower(), name.replace("-", "_")))
    except ModuleNotFoundError as error:
        state, found = (ABSENT if extra else BROKEN), f"not installed ({error})" if not extra else "not installed"
        return Check("packages", name, state, f"{found}, {_wish(requirement, extra)}", install)
    except Exception as error:
        return Check("packages", name, BROKEN, f"does not import: {type(error).__name__}: {error}", install)
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        version = str(getattr(module, "__version__", ""))
    good = not version or requirement.specifier.contains(version, prereleases=True)
    found = _against(version or "unknown version", _wish(requirement, extra))
    return Check("packages", name, OK if good else BROKEN, found, "" if good else install)


def _wish(requirement: Requirement, extra: str) -> str:
    return f"{requirement.specifier}{f' for the extra {extra}' if extra else ''}"


def _against(found: str, wanted: str) -> str:
    return f"{found} ({wanted})" if wanted else found


def _repairs() -> Iterator[Check]:
    """Run each repair of RecBole again: one that holds finds nothing left to do."""
    for name, repair in compat.REPAIRS.items():
        why = (repair.__doc__ or "").partition("\n")[0].strip().rstrip(".")
        try:
            undone = repair()
        except Exception as error:
            fix = f"install what it was made for: pip install --no-deps {RECBOLE}"
            yield Check("repairs of RecBole", name, BROKEN, f"{type(error).__name__}: {error}", fix)
            continue
        state = "redone now" if undone else "repaired" if name in compat.applied else "not needed"
        yield Check("repairs of RecBole", name, OK, f"{state}: {why}")


def _machine() -> Iterator[Check]:
    memory = psutil.virtual_memory()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Check("machine", "system", OK, f"{platform.system()} {platform.release()}, {platform.machine()}")
    yield Check("machine", "CPU", OK, f"{cores} cores, {torch.get_num_threads()} threads of torch")
    fast = torch.backends.mkl.is_available()
    note = "" if fast else "slow on the CPU: install the torch of pytorch.org, which has MKL"
    yield Check("machine", "MKL", OK if fast else ABSENT, "sparse products" if fast else "not in this torch", note)
    yield Check("machine", "memory", OK, f"{memory.available / 1e9:.1f} GB free of {memory.total / 1e9:.1f}")
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(i)
            found = f"{device.name}, {device.total_memory / 1e9:.1f} GB, CUDA {torch.version.cuda}"
            yield Check("machine", f"GPU {i}", OK, found)
    else:
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built without CUDA"
        yield Check("machine", "GPU", ABSENT, f"none, {built}: models train on the CPU")


def _folders() -> Iterator[Check]:
    """See whether the folders that commands write into can be written, without making them."""
    checkpoints = make_config("SLIFMR", "toy")["checkpoint_dir"]
    for name in (checkpoints, "log", "log_tensorboard", "benchmark", "tune", "inspect", ROOT / DATASETS / "ml-100k"):
        yield check_folder(Path(name))


def check_folder(folder: Path) -> Check:
    """See whether files can be written into a folder or, if it is not there yet, into the one that it goes into."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        fix = f"work in another folder, or let {there} be written"
        return Check("folders", str(folder), BROKEN, f"cannot be written: {error.strerror}", fix)
    return Check("folders", str(folder), OK, f"{shutil.disk_usage(there).free / 1e9:.1f} GB free")


def _own_files() -> Iterator[Check]:
    """See whether the settings and the set ``toy`` came with the package."""
    toy = ROOT / DATASETS / "toy"
    for path in (PROPERTIES / "overall.yaml", *(PROPERTIES / "model" / f"{name}.yaml" for name in MODELS), toy):
        there = path.exists()
        fix = "" if there else "install the package anew: pip install --no-deps --force-reinstall recbole-slifmr"
        name = str(path.relative_to(ROOT))
        yield Check("files of the package", name, OK if there else BROKEN, "there" if there else f"no {path}", fix)
