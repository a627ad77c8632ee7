"""Memory of the process: how the C library keeps what training frees and asks for again, and how much it was."""

from __future__ import annotations

import ctypes
import sys

import psutil

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

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


def peak_memory_mb() -> float:
    """Return the largest resident memory of this process so far, in MiB."""
    if resource is None:
        memory = psutil.Process().memory_info()
        return getattr(memory, "peak_wset", memory.rss) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
