"""The processes of a distributed run: starting them, ending them, and what they tell each other."""

from __future__ import annotations

import contextlib
import multiprocessing.connection
import os
import pickle
import signal
import socket
import tempfile
import threading
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tqdm import tqdm

from recbole_slifmr.errors import DataError, ProcessError, SettingError

T = TypeVar("T")


def rank_and_count() -> tuple[int, int]:
    """Return the number of this process, from 0, and that of all; 0 and 1 without a process group."""
    joined = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if joined else (0, 1)


def from_first(value: T) -> T:
    """Return the value of the first process, in all of them; it is pickled: keep its tensors on the CPU."""
    held: list[Any] = [value]
    dist.broadcast_object_list(held, src=0)
    return held[0]


def launch(function: Callable[..., T], arguments: Sequence[Any], n_processes: int) -> T:
    """Call ``function(rank, rendezvous, *arguments)`` in new processes and return what the first one returned.

    Args:
        function: of a module, so that it can be pickled. Rank is that of the process, from 0; rendezvous is the address
            of a file for ``init_process_group`` of processes on this machine.
        arguments: the rest of its arguments.
        n_processes: how many processes.

    Raises:
        DataError, SettingError: that a process raised.
        ProcessError: if a process raised anything else or was killed. No process is left then.
    """
    with tempfile.TemporaryDirectory(prefix="slifmr-") as name:
        folder = Path(name)
        processes = mp.spawn(_work, (folder, n_processes, function, arguments), n_processes, join=False).processes
        try:
            while waiting := [process.sentinel for process in processes if process.exitcode is None]:
                multiprocessing.connection.wait(waiting)
                if any(process.exitcode for process in processes):
                    break
            codes = [process.exitcode for process in processes]
        finally:
            _end(processes)
        for rank, code in enumerate(codes):
            if code is not None and code < 0:  # before the failures of those that miss it
                raise ProcessError(f"process {rank} of {n_processes} was killed by {signal.Signals(-code).name}")
        if (folder / "failure").exists():
            rank, error, line, trace = pickle.loads((folder / "failure").read_bytes())
            if error is None:
                error = ProcessError(f"process {rank} of {n_processes} failed: {line}")
                error.add_note(trace)
            raise error
        for rank, code in enumerate(codes):
            if code:
                raise ProcessError(f"process {rank} of {n_processes} ended with status {code}")
        return pickle.loads((folder / "result").read_bytes())


def _end(processes: Sequence[Any]) -> None:
    """End the processes that still run, those that hang too."""
    for process in processes:
        process.terminate()
    for process in processes:
        process.join(5)
        if process.exitcode is None:
            process.kill()
            process.join()


def _work(rank: int, folder: Path, n_processes: int, function: Callable[..., Any], arguments: Sequence[Any]) -> None:
    """Run in each process: call the function, leave its result or the first failure of all in the folder."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // n_processes))
    tqdm.set_lock(threading.RLock())  # its own is a semaphore between processes, which a sudden end leaves behind
    try:
        result = function(rank, (folder / "rendezvous").as_uri(), *arguments)
        if rank == 0:
            (folder / "result").write_bytes(pickle.dumps(result))
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()
    except Exception as error:
        _report(folder, rank, error)
        os._exit(1)  # at once: a process group whose other members wait could hold up an orderly exit
    except KeyboardInterrupt:
        os._exit(130)


def _report(folder: Path, rank: int, error: Exception) -> None:
    """Leave the error in the folder; of several, the first: the others are only about the loss of that process."""
    expected = error if isinstance(error, (DataError, SettingError)) else None
    line = f"{type(error).__name__}: {' '.join(str(error).split())}"
    part = folder / f"failure-{rank}"
    part.write_bytes(pickle.dumps((rank, expected, line, traceback.format_exc())))
    with contextlib.suppress(FileExistsError):
        os.link(part, folder / "failure")


def stay_on_this_machine() -> None:
    """Have the backends of torch.distributed talk over the loopback interface, unless the environment names another."""
    loopback = next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), None)
    if loopback is not None:
        for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(variable, loopback)
