"""Checks of the repairs of RecBole, each to be run in a process of its own by ``python -m repairs NAME ...``."""
