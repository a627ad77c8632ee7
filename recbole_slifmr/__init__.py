"""SLIF-MR and its multimodal, knowledge-aware neighbours as RecBole models: importing the package registers them."""

import os

__version__ = "0.1.0"

# OpenMP's threads wait for each other busily; where other programs run, they keep those they wait for from working.
# It is read when PyTorch is first imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

try:
    import recbole as _recbole  # noqa: F401
except ImportError as error:
    raise ImportError(
        "recbole-slifmr needs RecBole, which is installed apart from the other packages because it asks for a Ray that "
        "no longer installs: pip install --no-deps recbole==1.2.1"
    ) from error

from recbole_slifmr.moved import redirect as _redirect
from recbole_slifmr.plugin import register as _register

_redirect()
_register()


def __getattr__(name: str) -> object:
    """Import ``Recommender`` when it is asked for: what it needs would make every import slower."""
    if name == "Recommender":
        from recbole_slifmr.serve.recommender import Recommender

        return Recommender
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
