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
WATCHDOG_SECONDS = 15.0  # time a stopped run has to finish its step, on top of twice its slowest step
PARENT_CHECK_SECONDS = 3.0  # interval at which a loader process checks that its run is still alive


class StopSignals:
    """Context manager: SIGTERM, SIGINT and SIGUSR1 stop a run without loss; a second signal ends it at once.

    What the first signal does depends on when it comes:

    - before the first step, a run of one process exits with status 0. One of several processes dies by the signal,
      and the launcher ends the others;
    - in the loop, `requested` holds the signal's number, and the loop stops after its step. A watchdog starts: if the
      step does not end, because another rank is gone, the process exits with the signal's usual status;
    - after the loop, the result is written first.

    Attributes:
        requested: number of the first signal, or None.
    """

    def __init__(self, accelerator):
        self.accelerator = accelerator
        self.requested, self.slowest_step, self.step_start = None, 0.0, None  # slowest_step in seconds
        self._handlers_before, self._watchdog_off = {}, threading.Event()
        self._between_steps = self._after_loop = False

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                self._handlers_before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception):
        self._watchdog_off.set()
        for number, handler in self._handlers_before.items():
            signal.signal(number, handler)

    def step_began(self):
        """Mark the start of a step. The slowest step so far decides how long the watchdog waits."""
        now = time.monotonic()
        if self.step_start is not None:
            self.slowest_step = max(self.slowest_step, now - self.step_start)
        self.step_start = now

    @contextlib.contextmanager
    def between_steps(self):
        """Context manager for sampling, validating and saving: inside, the watchdog waits 60 times as long.

        All ranks leave it together. Rank 0 works longest; the time that it waits for the others counts as in a step.
        """
        start, self._between_steps = time.monotonic(), True
        try:
            yield
            self._between_steps = not self.accelerator.is_main_process
            self.accelerator.wait_for_everyone()
        finally:
            self._between_steps = False
            if self.step_start is not None:
                self.step_start += time.monotonic() - start

    def stop_watchdog(self):
        """Stop the watchdog: the step has ended, and saving may take its time."""
        self._watchdog_off.set()

    def loop_ended(self):
        """Mark the end of the loop: from here on a signal lets the run write its result first."""
        self._watchdog_off.set()
        self._after_loop = True

    def _handle(self, number, frame):
        before_first_step = self.step_start is None and not self._after_loop
        if self.requested is not None or (before_first_step and self.accelerator.num_processes > 1):
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self.requested = number
        if before_first_step:
            print_from_handler(number, "stopped before the first step; what is encoded is kept")
            raise SystemExit(0)
        if self._after_loop:
            print_from_handler(number, "the result is written first; a second signal stops it at once")
            return
        print_from_handler(number, "the run stops after this step and saves; a second signal stops it at once")
        threading.Thread(target=self._run_watchdog, args=(number,), daemon=True).start()

    def _run_watchdog(self, number):
        left, before = WATCHDOG_SECONDS + 2 * self.slowest_step, time.monotonic()
        while left > 0:
            if self._watchdog_off.wait(min(left, 0.5)):
                return
            now = time.monotonic()
            left -= (now - before) / (60 if self._between_steps else 1)
            before = now
        os.write(2, b"the step does not end: is another rank gone? giving up; the last checkpoint is sound\n")
        if "--debug" in sys.argv:
            faulthandler.dump_traceback()
        os._exit(128 + number)


def print_from_handler(number, message):
    """Print a signal's name and a message from a signal handler, where `print` is not safe."""
    os.write(2, f"\n{signal.Signals(number).name}: {message}\n".encode())


def leave_signals_to_the_run(worker=None):
    """Make a loader process ignore stop signals: Ctrl-C reaches the whole group, but the run ends its loaders itself.

    The run ends its loaders with SIGTERM, recognised by the process number of the sender. Loaders of a run that was
    killed end within a few seconds.

    Args:
        worker: number of the loader, given by torch's `DataLoader`; not used.
    """
    if not hasattr(signal, "sigtimedwait"):  # macOS has no way to learn the sender
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    recorded = multiprocessing.parent_process()  # recorded at the start; by now the process may be re-parented
    run = os.getppid() if recorded is None else recorded.pid
    # a fork server ends with its run
    parent = os.getppid() if multiprocessing.get_start_method() == "forkserver" else run
    threading.Thread(target=_await_end_of_run, args=(run, parent), daemon=True).start()


def _await_end_of_run(run, parent):
    """Take all stop signals; exit when the run sends SIGTERM or is gone.

    Args:
        run: process number of the run.
        parent: process number of the expected parent: the run or its fork server.
    """
    while os.getppid() == parent:  # checked after each signal too, so that no orphan ignores a signal
        received = signal.sigtimedwait(STOP_SIGNALS, PARENT_CHECK_SECONDS)
        if received is not None and received.si_signo == signal.SIGTERM and received.si_pid == run:
            break
    os._exit(0)
