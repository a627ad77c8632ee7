r"""Add-EASE: the sum of EASE on the interactions and of EASE on the items' content.

Jeunen, Van Balen, Goethals, "Closed-Form Models for Collaborative Filtering with Side-Information", RecSys 2020,
DOI 10.1145/3383313.3418480, on Steck, "Embarrassingly Shallow Autoencoders for Sparse Data", WWW 2019,
arXiv 1905.03375.

.. math:: B = (1 - \beta) B_X + \beta C, \qquad
    B_X = \mathrm{EASE}(X^T X, \lambda), \quad C = \mathrm{EASE}\Big(\sum_s w_s F_s F_s^T, \lambda_F\Big) .

The factors :math:`F_s` are those of :mod:`~recbole_slifmr.nn.linear`: features, centred and of unit length, and the
tags of the knowledge graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np

from recbole_slifmr.model.linear import LinearRecommender, LinearSettings
from recbole_slifmr.model.settings import Positive, Range
from recbole_slifmr.nn.linear import Solver, Source, solve_columns


@dataclass(frozen=True)
class AddEASESettings(LinearSettings):
    """The settings of Add-EASE."""

    content_reg_weight: Positive
    content_share: Annotated[float, Range(0, 1, "()")]


class AddEASE(LinearRecommender):
    """Two ridge regressions, on interactions and on content, added.

    Args:
        config: RecBole's configuration; the settings are listed in ``properties/model/AddEASE.yaml``.
        dataset: a :class:`~recbole_slifmr.data.dataset.SLIFMRDataset`, the training split.
    """

    settings_class = AddEASESettings
    settings: AddEASESettings
    n_matrices = 2

    def combine(self, solver: Solver[Any], interactions: list[Source], content: list[Source]) -> Any:
        """Return the sum of the weights of the interactions and those of the content."""
        weights, share = solver.solve(interactions, self.settings.reg_weight), self.settings.content_share
        if not content:
            return weights * (1 - share)
        return solver.add(weights, solver.solve(content, self.settings.content_reg_weight), share)

    def combine_new(self, interactions: list[Source], content: list[Source], wanted: np.ndarray) -> np.ndarray:
        """Return the content's share: interactions say nothing of new items."""
        settings = self.settings
        return settings.content_share * solve_columns(content, settings.content_reg_weight, wanted)
