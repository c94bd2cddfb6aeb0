"""Run a training script and measure its steps: python benchmarks/measured_run.py FILE SCRIPT FLAGS OF THE SCRIPT

FILE gets a JSON object. The script is as it is; its training step and its perceptual loss are called through a clock.
The GPU's own clock is used, so measuring adds no wait to the steps.

- seconds: of each micro-step, from its begin to the begin of the next one; the last one's end is not seen.
- loss_seconds: of the perceptual loss in each micro-step: the decoder, its backward pass to the latents, and masks.
- peak: most bytes that PyTorch had in use (allocated) and had taken from the driver (reserved), on a GPU; on the CPU
  the most memory that the process has had (resident).
- waits: {file:line: times} where a micro-step after the first made the host wait for the GPU.
"""

import importlib
import json
import os
import sys
import time
import warnings
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.records import start_script

WARM_UP = 1  # micro-steps that are not counted: kernels are chosen and memory is taken


class Clock:
    """Marks in time, on the GPU where there is one."""

    def __init__(self):
        import torch

        self.cuda = torch.cuda.is_available()

    def mark(self):
        """A point in time."""
        if not self.cuda:
            return time.perf_counter()
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, first, last):
        """Time between two marks, after `settle`."""
        return first.elapsed_time(last) / 1000 if self.cuda else last - first

    def settle(self):
        """Wait for the GPU."""
        if self.cuda:
            import torch

            torch.cuda.synchronize()


class Meter:
    """What is measured of a run. `watch` puts it between a script and its functions."""

    def __init__(self):
        self.clock, self.begins, self.losses, self.waits = Clock(), [], [], Counter()

    def watch(self, script):
        """Measure the training steps of a script, and the perceptual loss in them."""
        from lpl_utils import LatentPerceptualLoss

        training_step, forward = script.training_step, LatentPerceptualLoss.forward

        def step(*args):
            self.begins.append(self.clock.mark())
            self.losses.append([])
            if self.clock.cuda and len(self.begins) == WARM_UP + 1:
                self.count_waits()
            return training_step(*args)

        def loss(module, *args, **options):
            began = self.clock.mark()
            result = forward(module, *args, **options)
            if self.losses:  # not while validating before the first step
                self.losses[-1].append((began, self.clock.mark()))
            return result

        script.training_step, LatentPerceptualLoss.forward = step, loss

    def count_waits(self):
        """From now on, count where the host waits for the GPU."""
        import torch

        show = warnings.showwarning

        def shown(message, category, filename, lineno, *args):
            if "synchronizing CUDA operation" in str(message):
                self.waits[f"{Path(filename).name}:{lineno}"] += 1
            else:
                show(message, category, filename, lineno, *args)

        warnings.filterwarnings("always", message=".*synchronizing CUDA operation")
        warnings.showwarning = shown
        torch.cuda.set_sync_debug_mode("warn")

    def report(self):
        """The numbers, as `FILE` has them."""
        import torch

        if self.clock.cuda:
            torch.cuda.set_sync_debug_mode("default")
            peak = {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
        else:
            peak = {"resident": peak_of_process()}
        self.clock.settle()
        return {
            "seconds": [self.clock.seconds(*pair) for pair in zip(self.begins, self.begins[1:], strict=False)],
            "loss_seconds": [sum(self.clock.seconds(*pair) for pair in pairs) for pairs in self.losses],
            "peak": peak,
            "waits": dict(self.waits),
            "counted_steps": max(0, len(self.begins) - WARM_UP),
        }


def peak_of_process():
    """The most bytes of memory that this process has had; on other systems than Linux 0."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def main(argv=None):
    """The command; its exit status is the script's."""
    file, script, *flags = sys.argv[1:] if argv is None else argv
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    script = importlib.import_module(Path(script).stem)
    meter = Meter()
    meter.watch(script)
    try:
        start_script(script, flags)
    finally:
        if int(os.environ.get("RANK", 0)) == 0:
            Path(file).write_text(json.dumps(meter.report()))


if __name__ == "__main__":
    main()
