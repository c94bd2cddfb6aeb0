"""Run a script that gets a signal at a given place, which then takes longer than the watchdog's patience.

python tests/signalled.py SCRIPT FUNCTION CALL SIGNAL FLAGS...: at its CALL-th call by the first rank, the script's
FUNCTION first sends the signal to its process, and to all other ranks. HANG for a signal: to those SIGSTOP, to its own
SIGTERM.
"""

import importlib
import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lpl_finetuning.data import scan
from lpl_finetuning.flags import data_source
from lpl_finetuning.training import signals

PATIENCE = 0.5


def ranks():
    """Process numbers of this process and of the others that its launcher started."""
    if "RANK" not in os.environ:
        return [os.getpid()]
    children = Path("/proc", str(os.getppid()), "task", str(os.getppid()), "children").read_text().split()
    return [int(child) for child in children]


def signalled(function, call, number):
    """The function, with the signal before its `call`-th call."""
    calls = [0]

    def wrapper(*args, **kwargs):
        calls[0] += 1
        if calls[0] == call and os.environ.get("RANK", "0") == "0":
            for rank in ranks():
                own = signal.SIGTERM if number == "HANG" else signal.Signals[number]
                os.kill(rank, own if rank == os.getpid() or number != "HANG" else signal.SIGSTOP)
            if number != "HANG":
                time.sleep(4 * PATIENCE)
        return function(*args, **kwargs)

    return wrapper


if __name__ == "__main__":
    name, function, call, number, *words = sys.argv[1:]
    script = importlib.import_module(name)
    signals.WATCHDOG_SECONDS = PATIENCE
    setattr(script, function, signalled(getattr(script, function), int(call), number))
    args = script.parse_args(words)
    script.main(args, *scan.find_images(data_source(args)))
