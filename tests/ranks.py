"""Starts the ranks of a script as torchrun on one machine does, each a fork of a process with the libraries imported.

python tests/ranks.py COUNT [-m] SCRIPT ARGUMENTS...: like `torchrun --standalone --nproc_per_node COUNT`. When a rank
fails, the others get SIGTERM, and SIGKILL after `GRACE_SECONDS`; the exit status is then 1. `tests.children.start`
puts this in the place of torchrun, whose ranks each import torch, diffusers and transformers again.
"""

import contextlib
import os
import signal
import socket
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GRACE_SECONDS = 30  # torchrun's


def free_port():
    """A TCP port of this machine that nothing listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start_rank(rank, argv):
    """The process number of a rank: a fork of this process, as a Python of its own with the arguments `argv`."""
    from tests.fork_server import run_python

    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        run_python(argv, os.getcwd())
    return pid


def send(number, pids):
    """Send a signal to those of the processes that still run."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def wait_for_all(pids):
    """Wait for all ranks; returns 0 if none failed, else 1."""
    left, status, killed_at = set(pids), 0, None
    while left:
        pid, ended = os.waitpid(-1, os.WNOHANG)
        if not pid:
            if killed_at is not None and time.monotonic() > killed_at:
                send(signal.SIGKILL, left)
            time.sleep(0.01)
            continue
        left.discard(pid)
        if ended and not status:
            status, killed_at = 1, time.monotonic() + GRACE_SECONDS
            send(signal.SIGTERM, left)
    return status


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    count, argv = int(sys.argv[1]), sys.argv[2:]
    os.environ |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}  # fmt: skip
    ranks = [start_rank(rank, argv) for rank in range(count)]
    signal.signal(signal.SIGTERM, lambda number, frame: send(number, ranks))
    sys.exit(wait_for_all(ranks))
