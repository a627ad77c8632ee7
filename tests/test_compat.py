"""Each repair of RecBole is shown to be needed, to work, and to stay away where it is not needed.

A repair cannot be taken back within a process. So the checks, in ``tests/repairs``, run in processes of their own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from repairs.checks import CHECKS

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """Run all checks that were asked for and return the folder of their reports."""
    if not hasattr(os, "fork"):
        pytest.skip("the checks run in forked processes")
    folder = tmp_path_factory.mktemp("compat")
    wanted = [item.callspec.params["name"] for item in request.session.items if item.path == request.path]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "XDG_DATA_HOME": str(folder), "PYTHONPATH": str(HERE)}
    command = [sys.executable, "-W", "ignore", "-m", "repairs", *wanted]
    subprocess.run(command, cwd=folder, env=environment, check=True, timeout=900)
    return folder


@pytest.mark.parametrize("name", CHECKS)
def test_compat(reports: Path, name: str) -> None:
    """A check of this name passes in a process of its own."""
    report = reports / f"{name}.json"
    assert report.exists(), "the check was stopped"
    assert not (trace := json.loads(report.read_text())), trace
