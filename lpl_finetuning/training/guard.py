"""What keeps a run from being lost while it trains: steps that are not finite, full disks, signals, a watchdog.

Faults and signals are settled once per optimizer step, in one packed read: `Guard.read` is the only place where the
loop waits for the device.
"""

import contextlib
import faulthandler
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass

import torch

from lpl_finetuning.errors import UserError

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
PATIENCE = 15.0  # seconds that a stopped run has for its step, besides the time that its slowest step took
PARENT_CHECK = 3.0  # seconds after which a loading process looks again whether the run is still there


# ---------------------------------------------------------------------------------------------------------------------
# Steps that are not finite


@dataclass(frozen=True)
class Fault:
    """A term of the loss that was not finite, and the numbers of its images; none when another rank has them."""

    term: str
    images: tuple[int, ...]


class Guard:
    """Collects what has to be finite in a step, and the wish to stop; reads all of it at once.

    `watch` takes values of each sample while the step is built, `read` packs them with the gradients' norm.
    """

    def __init__(self, accelerator, limit, name_of):
        """limit: so many in a row end the run; name_of: function from an image's number to its name."""
        self.accelerator, self.limit, self.name_of = accelerator, limit, name_of
        self.in_a_row = self.total = 0
        self.watched = []

    def watch(self, term, values, images):
        """Values (n,) of one term, detached here; images: (n,) the numbers of their images."""
        self.watched.append((term, values.detach().float(), images))

    def read(self, grad_norm, wishes=()):
        """(whether the step is finite, faults, [whether any rank has each wish]), in one transfer from the device.

        grad_norm: scalar tensor, the same on every rank, which therefore all decide alike; wishes: bools of this
        rank, to stop or to save. The faults are this rank's; where only others have a term that is not finite, whose
        gradients all share, it is the gradient of no images.
        """
        watched, self.watched = self.watched, []
        packed = [grad_norm.detach().float().reshape(1), *(values for _, values, _ in watched)]
        if self.accelerator.num_processes > 1:
            asked = torch.tensor([float(wish) for wish in wishes], device=self.accelerator.device)
            packed.append(self.accelerator.reduce(asked, "sum"))
        norm, *values = torch.cat(packed).tolist()
        if self.accelerator.num_processes > 1:
            wishes = [count > 0 for count in values[len(values) - len(wishes) :]]
        if math.isfinite(norm):
            return True, [], wishes
        faults = []
        for term, tensor, images in watched:
            found, values = values[: len(tensor)], values[len(tensor) :]
            bad = tuple(int(image) for image, value in zip(images, found, strict=True) if not math.isfinite(value))
            if bad:
                faults.append(Fault(term, bad))
        if self._any_rank(bool(faults)) and not faults:
            faults.append(Fault("gradient", ()))
        elif not faults:
            everything = dict.fromkeys(int(image) for _, _, images in watched for image in images)
            faults.append(Fault("gradient", tuple(everything)))
        return False, faults, wishes

    def _any_rank(self, mine):
        """Whether it is so on any rank. All ranks come here together."""
        if self.accelerator.num_processes == 1:
            return mine
        count = torch.tensor(float(mine), device=self.accelerator.device)
        return self.accelerator.reduce(count, "sum").item() > 0

    def judge(self, faults, step, under_scaler=False):
        """Count a step that was not finite, and say which term and images that was; none end a row of them.

        under_scaler: fp16, where gradients overflow now and then, which the scaler sees to itself: those do not count,
        but a term of any rank does, on all of them.

        Raises:
            UserError: --max_nonfinite_steps steps in a row were not finite.
        """
        if not faults:
            self.in_a_row = 0
            return
        if under_scaler and all(fault.term == "gradient" and fault.images for fault in faults):
            return
        self.in_a_row, self.total = self.in_a_row + 1, self.total + 1
        told = "; ".join(self.describe(fault) for fault in faults)
        rank = f" on rank {self.accelerator.process_index}" if self.accelerator.num_processes > 1 else ""
        # the line in one write: torchrun starts ranks unbuffered, and theirs would run into each other
        print(f"warning: step {step} is skipped{rank}, not finite: {told}\n", end="", file=sys.stderr, flush=True)
        if self.in_a_row >= self.limit:
            raise UserError(
                f"{self.in_a_row} steps in a row were not finite (--max_nonfinite_steps), the last with {told}. "
                "What was saved is sound; look at the images that were named, lower --learning_rate, or use "
                "--mixed_precision bf16 or no, and start again with --resume_from_checkpoint latest, which goes on "
                "from the last checkpoint if there is one"
            )

    def counts(self):
        """{log key: steps that were skipped so far}, when there are any."""
        return {"nonfinite_steps": self.total} if self.total else {}

    def describe(self, fault):
        """A fault in words."""
        if not fault.images:
            return f"the {fault.term}, because of another rank"
        names = [self.name_of(image) for image in fault.images]
        shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        return f"the {fault.term} of {shown}"


# ---------------------------------------------------------------------------------------------------------------------
# Signals


class StopSignals:
    """Context in which SIGTERM, SIGINT and SIGUSR1 end a run without loss; a second one ends it at once.

    Before the first step a run of one process ends there and then, with status 0; one of several dies by the signal,
    and its launcher takes the others along. In the loop, `requested` tells it to stop after its step. From the signal
    on a watchdog counts: where the step does not end, because another rank is gone and will never answer, the process
    ends itself with the signal's usual status. `reached` calls it off. After the loop, the result is written first.
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
    def unhurried(self):
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

    def reached(self):
        """The loop has seen the request and saves: no more hurry."""
        self._reached.set()

    def ending(self):
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
            tell(number, "stopped before the first step; what is encoded is kept")
            raise SystemExit(0)
        if self._ending:
            tell(number, "the result is written first; a second signal stops it at once")
            return
        tell(number, "the run stops after this step and saves; a second signal stops it at once")
        threading.Thread(target=self._watch, args=(number,), daemon=True).start()

    def _watch(self, number):
        left, before = PATIENCE + 2 * self.slowest, time.monotonic()
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


def tell(number, what):
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
        received = signal.sigtimedwait(STOP_SIGNALS, PARENT_CHECK)
        if received is not None and received.si_signo == signal.SIGTERM and received.si_pid == run:
            break
    os._exit(0)
