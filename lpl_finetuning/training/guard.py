"""What keeps a run from being lost while it trains: steps that are not finite, full disks, signals, a watchdog.

Faults and signals are settled once per optimizer step, in one packed read: `Guard.read` is the only place where the
loop waits for the device.
"""

import math
import sys
from dataclasses import dataclass

import torch

from lpl_finetuning.errors import UserError


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

    def record(self, faults, step, under_scaler=False):
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
