r"""L3AE: EASE on the interactions, drawn to the weights that the items' content gives.

Moon, Park, Lee, "LLM-Enhanced Linear Autoencoders for Recommendation", CIKM 2025, arXiv 2508.13500.

.. math::
    C = \mathrm{EASE}\Big(\sum_s w_s F_s F_s^T, \lambda_F\Big), \qquad
    P = \left(X^T X + (\lambda + \lambda_E) I\right)^{-1},

.. math::
    B = \lambda_E P C - P \, \mathrm{diag}\left(\frac{1 + \lambda_E \mathrm{diag}(P C)}{\mathrm{diag}(P)}\right),
    \quad \mathrm{diag}(B) = 0 ,

which minimises :math:`\|X - XB\|^2 + \lambda \|B\|^2 + \lambda_E \|B - C\|^2` for a zero diagonal.

The factors :math:`F_s` are those of :mod:`~recbole_slifmr.nn.linear`: features, centred and of unit length, and the
tags of the knowledge graph. Deviations: the paper has text alone, as a language model's embeddings, not centred.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from recbole_slifmr.model.linear import LinearRecommender, LinearSettings
from recbole_slifmr.model.settings import Positive
from recbole_slifmr.nn.linear import Solver, Source, solve_columns


@dataclass(frozen=True)
class L3AESettings(LinearSettings):
    """The settings of L3AE."""

    content_reg_weight: Positive
    content_weight: Positive


class L3AE(LinearRecommender):
    """A ridge regression on content, and one on interactions that stays near it.

    Args:
        config: RecBole's configuration; the settings are listed in ``properties/model/L3AE.yaml``.
        dataset: a :class:`~recbole_slifmr.data.dataset.SLIFMRDataset`, the training split.
    """

    settings_class = L3AESettings
    settings: L3AESettings
    n_matrices = 3

    def combine(self, solver: Solver[Any], interactions: list[Source], content: list[Source]) -> Any:
        """Return the weights of the interactions near those of the content."""
        reg, near = self.settings.reg_weight, self.settings.content_weight
        if not content:
            return solver.solve(interactions, reg + near)
        prior = solver.solve(content, self.settings.content_reg_weight)
        return solver.solve(interactions, reg, prior, near)

    def combine_new(self, interactions: list[Source], content: list[Source], wanted: np.ndarray) -> np.ndarray:
        r"""Return what the interactions leave of the weights that the content gives: :math:`\lambda_E P C`."""
        reg, near = self.settings.reg_weight, self.settings.content_weight
        prior = solve_columns(content, self.settings.content_reg_weight, wanted)
        return solve_columns(interactions, reg + near, near * prior)
