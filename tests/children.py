"""Processes that tests start: none outlives its test, however that ends."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

MARK = "STARTED_BY_TEST"  # an environment variable that all descendants inherit, also those in groups of their own
STARTED = []  # (process, its mark)
ROOT = Path(__file__).parents[1]


def start(words, *, env=None, **options):
    """subprocess.Popen, in a process group of its own; what is left at the test's end is killed by `end_all`."""
    mark = uuid.uuid4().hex
    environment = {**(os.environ if env is None else env), MARK: mark}
    process = subprocess.Popen(words, env=environment, start_new_session=True, **options)
    STARTED.append((process, mark))
    return process


def alive(mark):
    """Numbers of the processes that bear a mark."""
    found, entry = [], f"{MARK}={mark}".encode()
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if entry in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return found


def kill(process, mark):
    """SIGKILL to a process and to all that it and its children have started; back when none is left."""
    if process.poll() is None:
        process.kill()
        process.wait()
    while left := alive(mark):
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream:
            stream.close()


def end_all():
    """Kill what is left of all that `start` has started."""
    while STARTED:
        kill(*STARTED.pop())


@contextlib.contextmanager
def ended(words, **options):
    """`start`, and nothing is left of it at the end of the context."""
    process = start(words, **options)
    try:
        yield process
    finally:
        [at] = [at for at, (other, _) in enumerate(STARTED) if other is process]
        kill(*STARTED.pop(at))


def printed_by(code, *options):
    """What Python code prints in a process of its own, in the repository, as JSON."""
    words = [sys.executable, *options, "-c", code]
    return json.loads(subprocess.run(words, check=True, cwd=ROOT, stdout=subprocess.PIPE).stdout)
