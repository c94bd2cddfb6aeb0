"""Processes that tests start: none outlives its test, however that ends."""

import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from tests.fork_server import Forked, Server

MARK = "STARTED_BY_TEST"  # an environment variable that all descendants inherit, also those in groups of their own
STARTED = []  # (process, its mark)
SERVER, LIGHT_SERVER = Server(), Server(light=True)
ROOT = Path(__file__).parents[1]


def start(words, *, env=None, fresh=False, light=False, **options):
    """subprocess.Popen, in a session of its own; what is left at the test's end is killed by `end_all`.

    A Python script is forked from a process that has the libraries imported (`tests.fork_server`), unless `fresh`;
    under `light` from one that has not, where importing torch is an error. The ranks of torchrun are forked too
    (`tests.ranks`).
    """
    mark = uuid.uuid4().hex
    environment = {**(os.environ if env is None else env), MARK: mark}
    if not fresh and [str(word) for word in words[:5]] == torchrun(0)[:5]:
        words = [sys.executable, str(ROOT / "tests" / "ranks.py"), *words[5:]]
    if fresh or not is_script(words):
        process = subprocess.Popen(words, env=environment, start_new_session=True, **options)
    else:
        server = LIGHT_SERVER if light else SERVER
        if server.process is None:
            server.open(tempfile.mkdtemp(prefix="lpl-forks-"))
        process = Forked(server, words[1:], environment, **options)
    STARTED.append((process, mark))
    return process


def run(words, *, timeout=300, check=False, capture_output=True, **options):
    """subprocess.run with `start`."""
    words, text = [str(word) for word in words], options.pop("text", False)
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
        streams = {"stdout": out, "stderr": errors} if capture_output else {}
        status = start(words, **streams, **options).wait(timeout)
        said = []
        for file in (out, errors):
            file.seek(0)
            said.append(file.read().decode() if text else file.read())
    result = subprocess.CompletedProcess(words, status, *said)
    if check:
        result.check_returncode()
    return result


def torchrun(count, *words):
    """The command that starts a script on `count` ranks of this machine."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
    return [*launch, *map(str, words)]


def ranks_of(process):
    """Process numbers of the ranks that a launcher has started."""
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def is_script(words):
    """Whether a command starts a Python script or module of the project, without options of the interpreter."""
    if str(words[0]) != sys.executable or len(words) < 2:
        return False
    first = str(words[1])
    return first.endswith(".py") or first == "-c" or (first == "-m" and not str(words[2]).startswith("torch"))


def alive(mark, session=None):
    """Numbers of the processes that bear a mark or belong to a session."""
    found, entry = [], f"{MARK}={mark}".encode()
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            fields = Path(path.parent, "stat").read_text().rpartition(")")[2].split()
            if entry in path.read_bytes().split(b"\0") or (fields[3] == str(session) and fields[0] != "Z"):
                found.append(int(path.parent.name))
    return found


def kill(process, mark):
    """SIGKILL to a process and to all that it and its children have started; back when none is left."""
    if process.poll() is None:
        process.kill()
        process.wait()
    session = process.pid if isinstance(process, Forked) else None
    while left := alive(mark, session):
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


def forked(work, *arguments):
    """work(*arguments), from a fork of this process, which has its own memory and limits; errors come back too."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
        return pool.submit(work, *arguments).result()


def printed_by(code, *options):
    """What Python code prints in a process of its own, in the repository, as JSON."""
    words = [sys.executable, *options, "-c", code]
    return json.loads(subprocess.run(words, check=True, cwd=ROOT, stdout=subprocess.PIPE).stdout)


def peak():
    """The most memory that this process has had, in KiB; ru_maxrss would begin with that of its parent."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM:"))
