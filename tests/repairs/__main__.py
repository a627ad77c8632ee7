"""Run checks by name, each in a forked process, and write its traceback to ``<name>.json``, empty if it passed.

The package's own ``__init__`` would apply every repair, so a package without one takes its place.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import tempfile
import traceback
import types
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "recbole_slifmr"


def main(names: list[str]) -> None:
    """Run the checks of these names."""
    package = sys.modules["recbole_slifmr"] = types.ModuleType("recbole_slifmr")
    package.__path__ = [str(PACKAGE)]
    checks = importlib.import_module("repairs.checks").CHECKS
    tiny = importlib.import_module("repairs.tiny")
    sys.argv = sys.argv[:1]  # RecBole's Config reads them
    for name in names:
        report = Path(f"{name}.json").resolve()
        child = os.fork()
        if child == 0:
            signal.alarm(100)
            os.chdir(tempfile.mkdtemp(dir="."))
            try:
                tiny.write_dataset(Path("tiny"))
                checks[name]()
                trace = ""
            except BaseException:
                trace = traceback.format_exc()
            report.write_text(json.dumps(trace))
            os._exit(0)
        os.waitpid(child, 0)


main(sys.argv[1:])
