"""What the process of every run imports: the process that they are copies of imports it once."""

import torch._dynamo  # noqa: F401  building the first optimiser imports it, which takes seconds

import recbole_slifmr.study.task
import recbole_slifmr.training.experiment  # noqa: F401
