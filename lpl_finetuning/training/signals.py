"""Signals that stop a run, and the watchdog that ends a run whose step never ends."""

import contextlib
import faulthandler
import multiprocessing
import os
import signal
import sys
import threading
import time

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
WATCHDOG_SECONDS = 15.0  # seconds that a stopped run has for its step, besides the time that its slowest step took
PARENT_CHECK_SECONDS = 3.0  # seconds after which a loading process looks again whether the run is still there


class StopSignals:
    """Context in which SIGTERM, SIGINT and SIGUSR1 end a run without loss; a second one ends it at once.

    Before the first step a run of one process ends there and then, with status 0; one of several dies by the signal,
    and its launcher takes the others along. In the loop, `requested` tells it to stop after its step. From the signal
    on a watchdog counts: where the step does not end, because another rank is gone and will never answer, the process
    ends itself with the signal's usual status. `stop_watchdog` stops it. After the loop, the result is written first.
    """

    def __init__(self, accelerator):
        self.accelerator = accelerator
        self.requested, self.slowest, self.began = None, 0.0, None
        self._before, self._reached, self._in_no_hurry, self._ending = {}, threading.Event(), False, False

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception):
        self._reached.set()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def step_began(self):
        """To be called at the start of every step: how long one takes decides how long the watchdog waits."""
        now = time.monotonic()
        if self.began is not None:
            self.slowest = max(self.slowest, now - self.began)
        self.began = now

    @contextlib.contextmanager
    def between_steps(self):
        """Between steps, to draw, to measure or to save: the watchdog counts minutes for seconds.

        The ranks leave it together. The first, which works the longest, waits for the others as in a step.
        """
        began, self._in_no_hurry = time.monotonic(), True
        try:
            yield
            self._in_no_hurry = not self.accelerator.is_main_process
            self.accelerator.wait_for_everyone()
        finally:
            self._in_no_hurry = False
            if self.began is not None:
                self.began += time.monotonic() - began

    def stop_watchdog(self):
        """The loop has seen the request and saves: no more hurry."""
        self._reached.set()

    def loop_ended(self):
        """The loop is over; what is left is to write the result."""
        self._reached.set()
        self._ending = True

    def _handle(self, number, frame):
        before_training = self.began is None and not self._ending
        if self.requested is not None or (before_training and self.accelerator.num_processes > 1):
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self.requested = number
        if before_training:
            print_from_handler(number, "stopped before the first step; what is encoded is kept")
            raise SystemExit(0)
        if self._ending:
            print_from_handler(number, "the result is written first; a second signal stops it at once")
            return
        print_from_handler(number, "the run stops after this step and saves; a second signal stops it at once")
        threading.Thread(target=self._watch, args=(number,), daemon=True).start()

    def _watch(self, number):
        left, before = WATCHDOG_SECONDS + 2 * self.slowest, time.monotonic()
        while left > 0:
            if self._reached.wait(min(left, 0.5)):
                return
            now = time.monotonic()
            left -= (now - before) / (60 if self._in_no_hurry else 1)
            before = now
        os.write(2, b"the step does not end: is another rank gone? giving up; the last checkpoint is sound\n")
        if "--debug" in sys.argv:
            faulthandler.dump_traceback()
        os._exit(128 + number)


def print_from_handler(number, what):
    """Say what a signal does, from its handler: print is not safe there."""
    os.write(2, f"\n{signal.Signals(number).name}: {what}\n".encode())


def leave_signals_to_the_run(worker=None):
    """For the data loader's processes, which end when the run says so: Ctrl-C goes to the whole group.

    The run ends them with a SIGTERM of its own, which is told from others by its sender. They outlive a run that was
    killed by a few seconds at most.
    """
    if not hasattr(signal, "sigtimedwait"):  # macOS can't tell
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    known = multiprocessing.parent_process()  # from before it began, while the system may name its heir by now
    run = os.getppid() if known is None else known.pid
    above = os.getppid() if multiprocessing.get_start_method() == "forkserver" else run  # which ends with the run
    threading.Thread(target=_await_parent, args=(run, above), daemon=True).start()


def _await_parent(run, above):
    """Take the signals that come; end the process when the run sends SIGTERM, and once the run is gone.

    run: number of its process; above: of this one's parent.
    """
    while os.getppid() == above:  # looked at after each signal too: none is ignored without a parent
        received = signal.sigtimedwait(STOP_SIGNALS, PARENT_CHECK_SECONDS)
        if received is not None and received.si_signo == signal.SIGTERM and received.si_pid == run:
            break
    os._exit(0)
