"""SLIF-MR as its paper has it: SLIFMR without what this package adds.

Guo, Jiang, Guo, Song, Sun, "SLIF-MR: Self-loop Iterative Fusion of Heterogeneous Auxiliary Information for Multimodal
Recommendation", arXiv 2507.09998.

Left out are the linear branch, the knowledge graph as features, item graphs among the interactions, that of shared
users included, several sampled items per interaction, the interaction view as a residual and the spectral start; the
inter-modal loss is back, and the learning rate is .005, since training starts further away: see
``properties/model/SLIFMRPaper.yaml``. Other choices that the paper leaves open are those of SLIFMR.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from recbole_slifmr.model.slifmr import SLIFMR, STARTS, SLIFMRSettings


@dataclass(frozen=True)
class SLIFMRPaperSettings(SLIFMRSettings):
    """The settings of SLIFMR, of which only the start has a default: that of models from before it was a setting."""

    embedding_start: Annotated[str, STARTS] = "random"


class SLIFMRPaper(SLIFMR):
    """SLIFMR with the settings of ``properties/model/SLIFMRPaper.yaml``.

    Args:
        config: RecBole's configuration.
        dataset: a :class:`~recbole_slifmr.data.dataset.SLIFMRDataset`, the training split.
    """

    settings_class = SLIFMRPaperSettings
