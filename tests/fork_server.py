"""Starts Python scripts by forking a process that has already imported the slow libraries.

    python -m tests.fork_server SOCKET          # with torch and all
    python -m tests.fork_server SOCKET light    # without: a child that imports torch ends with status 99

A start from nothing imports torch, diffusers, transformers, accelerate and peft, which takes longer than most tests.
The server imports them once. Each start is a fork of the server, in a session of its own, with the arguments,
environment, folder and files of the test. The server runs no thread. Of the project it imports what all scripts share.
`Forked` looks like subprocess.Popen: the process is a real one, with real signals and a real exit status.

What a library reads from the environment when it is imported is the server's: the number of threads, for instance.
The variables of the Hub's client are read anew.
"""

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


# ---------------------------------------------------------------------------------------------------------------------
# The server


LIGHT_IMPORTS = ("numpy", "PIL.Image", "yaml", "lpl_finetuning.flag_checks", "lpl_finetuning.families",
                 "lpl_finetuning.start")  # fmt: skip
SLOW_IMPORTS = ("tests.warm", "lpl_finetuning.training.plan", "lpl_finetuning.training.run",
                "lpl_finetuning.training.validation", "lpl_finetuning.results.export")  # fmt: skip


def import_all(names):
    """Import modules, of which none reads the environment that a test sets."""
    for name in names:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # collections in the forks skip these objects, whose memory stays shared


IMPORTED_TORCH = 99  # exit status of a child of the light server that has imported torch


def become(request, files):
    """Turn this forked process into a start of Python with the arguments of a request; never returns."""
    os.setsid()
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD, signal.SIGPIPE):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    read_the_hubs_environment()
    sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
    run_python(request["argv"], request["cwd"])


def read_the_hubs_environment():
    """Let the Hub's client, imported by the server, see the address, folders and switches of this process."""
    if client := sys.modules.get("huggingface_hub"):
        importlib.reload(client.constants)
        client.hf_api.api.endpoint = client.constants.ENDPOINT


def run_python(argv, folder):
    """Do in this process what `python ARGV` does, in a folder, and end it; never returns."""
    status = 1
    try:
        sys.argv = argv
        if sys.argv[0] == "-m":
            sys.argv = sys.argv[1:]
            sys.path[0] = folder
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        elif sys.argv[0] == "-c":
            sys.path[0] = ""
            code, sys.argv = sys.argv[1], ["-c", *sys.argv[2:]]
            exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
        else:
            sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
            runpy.run_path(sys.argv[0], run_name="__main__")
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        end(status)


def end(status):
    """Leave as the interpreter does: threads joined, exit handlers called, streams flushed."""
    with contextlib.suppress(Exception):
        threading._shutdown()
    with contextlib.suppress(Exception):
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(IMPORTED_TORCH if LIGHT and "torch" in sys.modules else status & 0xFF)


LIGHT = False


def serve(path, light=False):
    """Answer requests on a socket until the client goes: [pid] at once, [pid, wait status] at the end of each."""
    global LIGHT
    LIGHT = light
    import_all(LIGHT_IMPORTS if light else [*LIGHT_IMPORTS, *SLOW_IMPORTS])
    assert threading.active_count() == 1, "a fork has only the thread that forks; a lock of another stays locked"
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(path)
    listener.listen()
    client, _ = listener.accept()
    wake, waker = socket.socketpair()
    waker.setblocking(False)
    wake.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.set_wakeup_fd(waker.fileno(), warn_on_full_buffer=False)
    while True:
        ready, _, _ = select.select([client, wake], [], [])
        if wake in ready:
            with contextlib.suppress(BlockingIOError):
                wake.recv(4096)
            with contextlib.suppress(ChildProcessError):
                while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                    client.sendall(json.dumps(ended).encode() + b"\n")
        if client in ready:
            head, files, _, _ = socket.recv_fds(client, 8, 3)
            if not head:
                os._exit(0)
            content = b""
            while len(content) < int(head):
                content += client.recv(int(head) - len(content))
            child = os.fork()
            if child == 0:
                signal.set_wakeup_fd(-1)
                for used in (client, wake, waker, listener):
                    used.close()
                become(json.loads(content), files)
            for file in files:
                os.close(file)
            client.sendall(json.dumps([child]).encode() + b"\n")


# ---------------------------------------------------------------------------------------------------------------------
# The client


class Server:
    """The fork server of a test session; it is started with the first process that is asked for."""

    def __init__(self, light=False):
        self.light, self.process, self.connection = light, None, None
        self.ended, self.unread = {}, b""

    def open(self, folder):
        """Start the server and connect to it. folder: a new folder for its socket."""
        path = str(Path(folder) / "fork-server")
        quiet = {"DIFFUSERS_VERBOSITY": "error", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1",
                 "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1", "OMP_NUM_THREADS": "1"}  # fmt: skip
        words = [sys.executable, "-m", "tests.fork_server", path, *["light"] * self.light]
        self.process = subprocess.Popen(words, cwd=ROOT, stdin=subprocess.DEVNULL, env={**os.environ, **quiet})
        self.connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        limit = time.monotonic() + 180
        while True:
            try:
                self.connection.connect(path)
                return
            except OSError:
                if time.monotonic() > limit or self.process.poll() is not None:
                    raise
                time.sleep(0.05)

    def close(self):
        """End the server; its children have ended before."""
        if self.process is not None:
            self.connection.close()
            self.process.wait(20)
            self.process = None

    def fork(self, argv, env, cwd, files):
        """Fork a process; returns its number."""
        content = json.dumps({"argv": [str(word) for word in argv], "env": dict(env), "cwd": str(cwd)}).encode()
        socket.send_fds(self.connection, [f"{len(content):8}".encode()], files)
        self.connection.sendall(content)
        while True:
            for answer in self.read(None):
                if len(answer) == 1:
                    return answer[0]

    def read(self, timeout):
        """Take in what the server says within `timeout` seconds (None: wait for something); returns the answers."""
        answers = []
        if select.select([self.connection], [], [], timeout)[0]:
            received = self.connection.recv(65536)
            if not received:
                raise RuntimeError("the fork server has ended")
            *lines, self.unread = (self.unread + received).split(b"\n")
            answers = [json.loads(line) for line in lines]
            self.ended |= {answer[0]: answer[1] for answer in answers if len(answer) == 2}
        return answers


class Forked:
    """A process of the fork server, with the part of subprocess.Popen's interface that tests use."""

    def __init__(self, server, words, env=None, cwd=None, stdin=None, stdout=None, stderr=None, text=False):
        self.server, self.args, self.text, self.returncode = server, words, text, None
        self.stdin = self.stdout = self.stderr = None
        given, opened = [], []
        for number, (name, wish) in enumerate((("stdin", stdin), ("stdout", stdout), ("stderr", stderr))):
            if wish == subprocess.PIPE:
                reading, writing = os.pipe()
                mine, theirs = (writing, reading) if number == 0 else (reading, writing)
                mode = ("w" if number == 0 else "r") + ("" if text else "b")
                setattr(self, name, os.fdopen(mine, mode))
                opened.append(theirs)
            elif wish == subprocess.STDOUT:
                theirs = given[1]
            elif wish == subprocess.DEVNULL or (wish is None and number == 0):
                theirs = os.open(os.devnull, os.O_RDWR)
                opened.append(theirs)
            else:
                theirs = number if wish is None else wish if isinstance(wish, int) else wish.fileno()
            given.append(theirs)
        self.pid = server.fork(words, os.environ if env is None else env, cwd or os.getcwd(), given)
        for file in opened:
            os.close(file)

    def poll(self):
        """The exit status, negative for a signal; None while the process runs."""
        if self.returncode is None:
            self.server.read(0)
            self._look()
        return self.returncode

    def _look(self):
        if self.pid in self.server.ended:
            status = self.server.ended.pop(self.pid)
            self.returncode = os.waitstatus_to_exitcode(status)

    def wait(self, timeout=None):
        """Wait for the end; TimeoutExpired after so many seconds."""
        limit = None if timeout is None else time.monotonic() + timeout
        while self.poll() is None:
            left = None if limit is None else limit - time.monotonic()
            if left is not None and left <= 0:
                raise subprocess.TimeoutExpired(self.args, timeout)
            self.server.read(left)
            self._look()
        return self.returncode

    def communicate(self, input=None, timeout=None):
        """(standard output, standard error), read to their ends."""
        if self.stdin:
            if input:
                self.stdin.write(input)
            self.stdin.close()
        texts = {}
        readers = []
        for name in ("stdout", "stderr"):
            if stream := getattr(self, name):
                readers.append(threading.Thread(target=lambda n=name, s=stream: texts.update({n: s.read()})))
                readers[-1].daemon = True
                readers[-1].start()
        limit = None if timeout is None else time.monotonic() + timeout
        for reader in readers:
            reader.join(None if limit is None else max(0.0, limit - time.monotonic()))
        if any(reader.is_alive() for reader in readers):
            raise subprocess.TimeoutExpired(self.args, timeout)
        self.wait(None if limit is None else max(0.1, limit - time.monotonic()))
        for stream in (self.stdout, self.stderr):
            if stream:
                stream.close()
        return texts.get("stdout"), texts.get("stderr")

    def send_signal(self, number):
        """Send a signal to the process, if it has not ended: its parent may reap it between the question and this."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self):
        """SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self):
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)


if __name__ == "__main__":
    serve(sys.argv[1], light=sys.argv[2:] == ["light"])
