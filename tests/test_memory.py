"""What the C library keeps."""

import platform
import subprocess
import sys

import pytest

from recbole_slifmr.training.memory import keep_freed_memory

GLIBC = platform.libc_ver()[0] == "glibc"


def test_it_takes_effect_where_there_is_glibc():
    assert keep_freed_memory() is GLIBC


@pytest.mark.skipif(not GLIBC, reason="needs glibc")
def test_freed_blocks_stay_with_the_process_once_asked_for():
    """In a process of its own: what the process holds after 5 blocks of 64 MiB were filled and freed."""
    code = """
import sys, torch
from pathlib import Path
from recbole_slifmr.training.memory import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
before = int(Path("/proc/self/statm").read_text().split()[1])
blocks = [torch.ones(2**24) for _ in range(5)]
del blocks
print((int(Path("/proc/self/statm").read_text().split()[1]) - before) * 4096 // 2**20)
"""
    kept, freed = (
        int(subprocess.run([sys.executable, "-c", code, how], capture_output=True, text=True, check=True).stdout)
        for how in ("keep", "free")
    )
    assert kept > 5 * 64 * 0.9
    assert freed < 64
