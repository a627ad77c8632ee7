"""Repairs that let RecBole 1.2.1 run on current numpy, scipy and torch.

Each repair is one function. It looks for the fault itself, never for a version number, and returns whether it
changed anything: a RecBole or a library that does not need it is left alone. numpy only gains aliases that it
lacks, torch is left alone; all else stays inside RecBole.
Numbers such as #2034 are issues of RUCAIBox/RecBole.
"""

from recbole_slifmr.host.compat import models, files, running, processes  # noqa: F401, I001  in the order of repair
from recbole_slifmr.host.compat.registry import REPAIRS, applied, apply

__all__ = ["REPAIRS", "applied", "apply"]
