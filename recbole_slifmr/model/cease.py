r"""CEASE: EASE that reconstructs the items' content along with the interactions.

Jeunen, Van Balen, Goethals, "Closed-Form Models for Collaborative Filtering with Side-Information", RecSys 2020,
DOI 10.1145/3383313.3418480, on Steck, "Embarrassingly Shallow Autoencoders for Sparse Data", WWW 2019,
arXiv 1905.03375.

.. math::
    P = \Big(X^T X + \sum_s w_s F_s F_s^T + \lambda I\Big)^{-1}, \qquad B = -P \, \mathrm{diag}(P)^{-1},
    \quad \mathrm{diag}(B) = 0 .

The factors :math:`F_s` are those of :mod:`~recbole_slifmr.nn.linear`: features, centred and of unit length, and the
tags of the knowledge graph. Deviation: each source has a weight of its own, where the paper has one for all.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from recbole_slifmr.model.linear import LinearRecommender, LinearSettings
from recbole_slifmr.nn.linear import Solver, Source, solve_columns


class CEASE(LinearRecommender):
    """One ridge regression on interactions and content.

    Args:
        config: RecBole's configuration; the settings are listed in ``properties/model/CEASE.yaml``.
        dataset: a :class:`~recbole_slifmr.data.dataset.SLIFMRDataset`, the training split.
    """

    settings_class = LinearSettings
    n_matrices = 1

    def combine(self, solver: Solver[Any], interactions: list[Source], content: list[Source]) -> Any:
        """Return the weights of all sources together."""
        return solver.solve(interactions + content, self.settings.reg_weight)

    def combine_new(self, interactions: list[Source], content: list[Source], wanted: np.ndarray) -> np.ndarray:
        """Return the ridge regression of new items on the items."""
        return solve_columns(interactions + content, self.settings.reg_weight, wanted)
