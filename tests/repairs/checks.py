"""All checks by name."""

from repairs import files, models, processes, running, whole
from repairs.tiny import CHECKS

__all__ = ["CHECKS", "files", "models", "processes", "running", "whole"]
