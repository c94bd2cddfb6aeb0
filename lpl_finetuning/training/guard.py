"""The guard against steps that are not finite: it skips them, names their images, and ends a run of many.

`Guard.read` settles faults and stop requests once per optimizer step, in one packed read. It is the only place where
the loop waits for the device.
"""

import math
import sys
from dataclasses import dataclass

import torch

from lpl_finetuning.errors import UserError

ORDINARY_OVERFLOWS = 24  # in a row; fp16's scaler begins at 65,536 and halves at each: below 0.004 none is left
NAMED_IMAGES = 8  # images named per fault in a message


@dataclass(frozen=True)
class Fault:
    """A term of the loss that was not finite."""

    term: str
    images: tuple[int, ...]  # numbers of this rank's images with that fault; none if only other ranks have it


class Guard:
    """Collects the values that must be finite in a step, and reads them all at once.

    `watch` takes per-sample values while the step is built; `read` packs them with the gradients' norm.

    Attributes:
        in_a_row: consecutive skipped steps up to now.
        total: skipped steps of the run.
        overflows: consecutive steps up to now that fp16's gradient scaler skipped.
    """

    def __init__(self, accelerator, limit, name_of):
        """
        Args:
            limit: consecutive skipped steps after which the run ends.
            name_of: function from the number of an image to its name.
        """
        self.accelerator, self.limit, self.name_of = accelerator, limit, name_of
        self.in_a_row = self.total = self.overflows = 0
        self.watched = []

    def watch(self, term, values, images):
        """Add the values (n,) of one term of the loss, detached here, and the numbers (n,) of their images."""
        self.watched.append((term, values.detach().float(), images))

    def read(self, grad_norm, requests=()):
        """Read everything watched since the last call, in one transfer from the device. All ranks call it together.

        Args:
            grad_norm: scalar tensor, the same on every rank, so that all ranks decide alike.
            requests: bools of this rank, such as to stop or to save.

        Returns:
            (whether the step is finite, this rank's faults, [whether any rank has each request]). Where only other
            ranks have a term that is not finite, this rank's fault is the gradient, of no images.
        """
        watched, self.watched = self.watched, []
        packed = [grad_norm.detach().float().reshape(1), *(values for _, values, _ in watched)]
        if self.accelerator.num_processes > 1:
            mine = torch.tensor([float(request) for request in requests], device=self.accelerator.device)
            packed.append(self.accelerator.reduce(mine, "sum"))
        norm, *values = torch.cat(packed).tolist()
        if self.accelerator.num_processes > 1:
            requests = [count > 0 for count in values[len(values) - len(requests) :]]
        if math.isfinite(norm):
            return True, [], requests
        return False, self._faults(watched, values), requests

    def _faults(self, watched, values):
        """This rank's faults, in a step whose gradient is not finite; values: of `watched`, one after the other."""
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
        return faults

    def _any_rank(self, mine):
        """Whether `mine` is true on any rank. All ranks call it together."""
        if self.accelerator.num_processes == 1:
            return mine
        count = torch.tensor(float(mine), device=self.accelerator.device)
        return self.accelerator.reduce(count, "sum").item() > 0

    def record(self, faults, step, under_scaler=False):
        """Count a skipped step and print its terms and images; without faults, reset the consecutive steps.

        Args:
            faults: from `read`.
            step: number of the step.
            under_scaler: whether fp16's gradient scaler is in use. Gradients then overflow now and then, which the
                scaler handles: up to `ORDINARY_OVERFLOWS` such steps in a row do not count. A term of the loss that is
                not finite on any rank counts on all ranks.

        Raises:
            UserError: --max_nonfinite_steps steps in a row were not finite, or the scaler can't find a scale.
        """
        if not faults:
            self.in_a_row = self.overflows = 0
            return
        if under_scaler and all(fault.term == "gradient" and fault.images for fault in faults):
            self.overflows += 1
            if self.overflows <= ORDINARY_OVERFLOWS:
                return
        self.in_a_row, self.total = self.in_a_row + 1, self.total + 1
        causes = "; ".join(self.describe(fault) for fault in faults)
        rank = f" on rank {self.accelerator.process_index}" if self.accelerator.num_processes > 1 else ""
        # one write per line: torchrun starts ranks unbuffered, and their lines would mix
        print(f"warning: step {step} is skipped{rank}, not finite: {causes}\n", end="", file=sys.stderr, flush=True)
        if self.in_a_row >= self.limit:
            better = {"fp16": "bf16 or no", "bf16": "no"}.get(self.accelerator.mixed_precision)
            precise = f", or use --mixed_precision {better}" if better else ""
            raise UserError(
                f"{self.in_a_row} steps in a row were not finite (--max_nonfinite_steps), the last with {causes}. "
                f"What was saved is sound; look at the images that were named, or lower --learning_rate{precise}, and "
                "start again with --resume_from_checkpoint latest, which goes on from the last checkpoint if there is "
                "one"
            )

    def counts(self):
        """Return {log key: skipped steps so far}; {} while there are none."""
        return {"nonfinite_steps": self.total} if self.total else {}

    def describe(self, fault):
        """Return a fault in words."""
        if not fault.images:
            return f"the {fault.term}, because of another rank"
        names = [self.name_of(image) for image in fault.images]
        more = f" and {len(names) - NAMED_IMAGES} more" if len(names) > NAMED_IMAGES else ""
        return f"the {fault.term} of {', '.join(names[:NAMED_IMAGES])}{more}"
