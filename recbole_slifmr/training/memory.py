"""How the C library keeps memory that training frees and asks for again at every step."""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_LARGEST = 2**31 - 1
_BLOCK = 2**27  # bytes; above the tensors of a step on half a million nodes. Still larger ones would leave large holes


def keep_freed_memory() -> bool:
    """Have glibc keep freed blocks of up to 128 MiB for the next request instead of giving them back to the system.

    A training step frees and asks for dozens of blocks of many megabytes. By default each is a fresh mapping, which the
    system fills with zeros page by page: several times the cost of the arithmetic on it. The process keeps its peak
    memory until it ends. Holds for the whole process; does nothing without glibc.

    Returns:
        whether it took effect.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _BLOCK)) and bool(mallopt(_M_TRIM_THRESHOLD, _LARGEST))
