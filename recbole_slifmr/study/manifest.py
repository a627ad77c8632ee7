"""What is needed to repeat a benchmark: versions, hardware, data, settings, command line."""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from recbole_slifmr.host.settings import make_config
from recbole_slifmr.paths import IN_CHECKOUT
from recbole_slifmr.study.identity import code_hash
from recbole_slifmr.study.runs import Checked
from recbole_slifmr.training.follow import versions


def manifest(plan: Any, checked: Checked) -> dict[str, Any]:
    """Return what is needed to repeat a benchmark.

    Args:
        plan: the :class:`~recbole_slifmr.study.benchmark.Benchmark`.
        checked: what its runs read.
    """
    import psutil
    import torch

    settings = {}
    for title, task in plan.first_tasks.items():
        config = make_config(**task.arguments)
        settings[title] = {name: str(value) for name, value in sorted(config.final_config_dict.items())}
    return {
        "command": shlex.join(sys.argv),
        "study": plan.name,
        "dataset": plan.tasks[0].dataset,
        "fingerprints": checked.fingerprints,
        "inputs": checked.inputs,
        "test_mask": plan.test_mask,
        "seeds": sorted({task.seed for task in plan.tasks}),
        "split_seed": plan.tasks[0].split_seed,
        "threads": plan.tasks[0].threads,
        "versions": versions(),
        "git_commit": _commit(),
        "code": code_hash(),
        "hardware": {
            "machine": platform.machine(),
            "system": platform.system(),
            "cpus": psutil.cpu_count(),
            "memory_gb": round(psutil.virtual_memory().total / 2**30, 1),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "settings": settings,
    }


def _commit() -> str | None:
    """Return the commit of the checkout that the package is in, None without one or without git."""
    if not IN_CHECKOUT:
        return None
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None
    except OSError:
        return None
