"""How long the stages of a start take, printed under --debug."""

import contextlib
import sys
import time

LAST = [time.monotonic()]  # when the last stage ended; empty: nothing is printed any more
SHOWN = []  # not empty: the stages are printed


def show_stages():
    """Print the stages from here on."""
    SHOWN.append(True)


@contextlib.contextmanager
def no_stages():
    """Context manager: stages that end inside are not printed, and their time belongs to the next stage."""
    kept, LAST[:] = LAST[:], []
    try:
        yield
    finally:
        LAST[:] = kept


def stage_ended(name, last=False):
    """A stage of the start has ended; after the `last` stage nothing is printed any more."""
    if not LAST:
        return
    now = time.monotonic()
    if SHOWN:
        print(f"start-up: {now - LAST[0]:5.1f} s  {name}", file=sys.stderr, flush=True)
    LAST[:] = [] if last else [now]
