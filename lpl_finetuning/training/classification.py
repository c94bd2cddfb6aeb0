"""Measuring a classifier on held-out images: accuracies, the confusion matrix, and the pictures of a run.

Shapes: B samples in a batch, K classes, N held-out images.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from lpl_finetuning.errors import during
from lpl_finetuning.files import dispensable
from lpl_finetuning.flags import settings_from_flags
from lpl_finetuning.training.measures import held_out_batch
from lpl_finetuning.training.objective import autocast
from lpl_finetuning.training.reporter import Subject, draw_curve
from lpl_finetuning.training.sharding import eval_mode
from lpl_finetuning.training.validation import Intervals, held_out_batches

TOP = 5  # the label counts as found among so many classes, where there are more
MOST_CLASSES = 1000  # up to which the confusion matrix is counted
MOST_NAMES, MOST_NUMBERS = 60, 25  # classes up to which the picture of the matrix has names, and numbers in its cells

# ---------------------------------------------------------------------------------------------------------------------
# Counting


class Counts:
    """What a classifier says of held-out images, summed on the device: nothing waits for it until `read`.

    `totals` (3, K) counts for each class its images, those that are found, and those found among the first five;
    `confusion` (K, K) counts images of a class (row) by the class that they are taken for (column).
    """

    def __init__(self, classes, device):
        """classes: number of classes, K."""
        self.top = min(TOP, classes - 1)
        self.totals = torch.zeros(3, classes, device=device, dtype=torch.float64)
        self.loss = torch.zeros((), device=device, dtype=torch.float64)
        size = classes if classes <= MOST_CLASSES else 0
        self.confusion = torch.zeros(size, size, device=device, dtype=torch.float64)

    def add(self, logits, labels, losses):
        """Count a batch: logits (B, K), labels (B,), losses (B,)."""
        first = logits.topk(self.top, dim=1).indices
        found = torch.stack([torch.ones_like(labels), first[:, 0] == labels, (first == labels[:, None]).any(dim=1)])
        self.totals.index_add_(1, labels, found.to(self.totals.dtype))
        self.loss += losses.sum()
        if len(self.confusion):
            cells = labels * len(self.confusion) + first[:, 0]
            self.confusion.view(-1).index_add_(0, cells, torch.ones_like(cells, dtype=self.confusion.dtype))

    def read(self, accelerator):
        """({log key: number}, confusion matrix int64 (K, K) or (0, 0)), over all ranks; ({}, …) without images."""
        packed = torch.cat([self.totals.flatten(), self.confusion.flatten(), self.loss[None]])
        if accelerator.num_processes > 1:
            packed = accelerator.reduce(packed, "sum")
        packed = packed.cpu().numpy()
        images, found, among = packed[: self.totals.numel()].reshape(3, -1)
        confusion = packed[self.totals.numel() : -1].reshape(self.confusion.shape).astype(np.int64)
        if not images.sum():
            return {}, confusion
        values = {
            "validation/loss": packed[-1] / images.sum(),
            "validation/accuracy": found.sum() / images.sum(),
            "validation/balanced_accuracy": balanced_accuracy(images, found),
        }
        if len(images) > TOP:
            values["validation/top5_accuracy"] = among.sum() / images.sum()
        return {key: float(value) for key, value in values.items()}, confusion


def balanced_accuracy(images, found):
    """The mean over the classes of the share of images that are found; (K,) counts, classes without images left out.

    Naming the most frequent class every time scores 1 / K, however frequent the class is.
    """
    there = images > 0
    return float((found[there] / images[there]).mean())


# ---------------------------------------------------------------------------------------------------------------------
# Validation


@dataclass(frozen=True)
class ClassifierSettings:
    """The flags about validation; each field has the name of its flag."""

    output_dir: str
    validation_steps: int | None
    validation_epochs: int
    train_batch_size: int


class ClassifierValidation(Intervals):
    """Measures the held-out images while a run trains; each rank measures its part.

    Attributes:
        values: {log key: number} of the last validation; {} before the first.
        confusion: its confusion matrix, int64 (K, K); None before the first validation.
    """

    def __init__(self, args, accelerator, trainee, objective, data, reporter, signals, held_out_step):
        """
        Args:
            trainee: the `Trainee`; objective: the script's; data: the `RunData`.
            reporter: takes the numbers and the picture; signals: the `StopSignals`, which break validation off.
            held_out_step: the script's function (batch, classifier, objective) -> (logits, labels, losses).
        """
        self.settings = settings_from_flags(ClassifierSettings, args)
        self.accelerator, self.trainee, self.objective, self.data = accelerator, trainee, objective, data
        self.reporter, self.signals, self.held_out_step = reporter, signals, held_out_step
        self.values, self.confusion = {}, None

    def run(self, step):
        """Measure the averaged weights: numbers and confusion matrix go to the reporter. All ranks call it."""
        if not len(self.data.held_out):
            return
        with self.signals.between_steps(), self.reporter.paused(), self.trainee.averaged():
            values, confusion = self._measured()
            if values:
                self.reporter.log(step, values)
                self.values, self.confusion = values, confusion
                self._draw(step, values)
            self.reporter.draw_run()

    def summary(self):
        """The last accuracies in a sentence, beside those of always naming the most frequent class."""
        if not self.values:
            return "No images were held out: --validation_split 0.1 would tell how good the classifier is"
        classes = self.objective.classes
        accuracy, balanced = (100 * self.values[f"validation/{name}accuracy"] for name in ("", "balanced_"))
        there = sum(count > 0 for count in classes.held_out)
        return (f"Held-out accuracy {accuracy:.1f} %, balanced over classes {balanced:.1f} %; the most frequent class "
                f"always: {100 * classes.majority:.1f} % and {100 / there:.1f} %")  # fmt: skip

    @during("measuring the held-out images")
    @torch.no_grad()
    def _measured(self):
        """What `Counts.read` returns of all held-out images; numbers {} where a signal broke it off."""
        accelerator, objective = self.accelerator, self.objective
        counts = Counts(len(objective.classes), objective.device)
        batches = held_out_batches(self.data, self.settings.train_batch_size)
        mine = batches[accelerator.process_index :: accelerator.num_processes]
        quiet = not accelerator.is_local_main_process
        with eval_mode(self.trainee.bare):
            for numbers in tqdm(mine, desc="held-out images", leave=False, disable=quiet):
                if self.signals.requested is not None and accelerator.num_processes == 1:
                    return {}, counts.confusion
                with autocast(objective):
                    found = self.held_out_step(held_out_batch(self.data, numbers), self.trainee.bare, objective)
                counts.add(*found)
        return counts.read(accelerator)

    def _draw(self, step, values):
        if not self.accelerator.is_main_process or not len(self.confusion):
            return
        path = Path(self.settings.output_dir) / "validation" / f"step-{step}.png"
        with dispensable("the confusion matrix"):
            path.parent.mkdir(parents=True, exist_ok=True)
            plot_confusion(self.confusion, self.objective.classes.names, path, f"after {step} steps", values)
            with Image.open(path) as image:
                self.reporter.log_images([("confusion matrix", [image.convert("RGB")])], step)


# ---------------------------------------------------------------------------------------------------------------------
# Reports


def classifier_subject():
    """The `Subject` of a run that trains a classifier."""
    names = ["train_loss", "train_accuracy", "grad_norm"]
    return Subject("Latent classifier", "latent-classifier", names, shown_accuracy, plot_classifier)


def shown_accuracy(values):
    """{name: text} of a row for the progress bar; {} where no step since the last row was finite."""
    if "train_loss" not in values:
        return {}
    return {"loss": f"{values['train_loss']:.3f}", "accuracy": f"{100 * values['train_accuracy']:.0f} %",
            "lr": f"{values['lr']:.1e}"}  # fmt: skip


def plot_classifier(history, path, title):
    """Draw loss and accuracy, in training and held-out, learning rate and throughput of a run."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(12, 7))
    losses, accuracies, rate, speed = figure.subplots(2, 2).flat
    figure.subplots_adjust(left=0.06, right=0.985, top=0.88, bottom=0.07, hspace=0.38, wspace=0.2)
    draw_curve(losses, *history.series("train_loss"), "training, augmented")
    losses.plot(*history.series("validation/loss"), marker="o", label="held out")
    losses.set_title("cross entropy")
    draw_curve(accuracies, *history.series("train_accuracy"), "training, augmented")
    for key in ("accuracy", "balanced_accuracy", "top5_accuracy"):
        series = history.series(f"validation/{key}")
        if series[0]:
            accuracies.plot(*series, marker="o", label=f"held out, {key.replace('_', ' ')}")
    accuracies.set_title("accuracy")
    accuracies.set_ylim(0, 1.02)
    draw_curve(rate, *history.series("lr"), None, smooth=False)
    rate.set_title("learning rate")
    draw_curve(speed, *history.series("samples_per_second"), None, smooth=False)
    speed.set_title("samples per second")
    for axis in (losses, accuracies, rate, speed):
        axis.set_xlabel("optimizer step")
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[1]:
            axis.legend(fontsize="small")
    figure.suptitle(title)
    figure.savefig(path, dpi=110)


def plot_confusion(confusion, names, path, when, values):
    """Draw a confusion matrix (K, K), each row as shares of its class, with counts in the cells of a small matrix."""
    from matplotlib.figure import Figure

    shares = confusion / confusion.sum(axis=1, keepdims=True).clip(1)
    size = min(14.0, 3.5 + 0.45 * len(names))
    figure = Figure(figsize=(size + 1.5, size), layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(shares, cmap="viridis", vmin=0, vmax=1)
    figure.colorbar(image, ax=axis, label="share of the class", fraction=0.046)
    if len(names) <= MOST_NAMES:
        axis.set_xticks(range(len(names)), names, rotation=60, ha="right")
        axis.set_yticks(range(len(names)), [f"{name} ({count})" for name, count in zip(names, confusion.sum(axis=1),
                                                                                        strict=True)])  # fmt: skip
    if len(names) <= MOST_NUMBERS:
        for (row, column), count in np.ndenumerate(confusion):
            if count:
                color = "black" if shares[row, column] > 0.6 else "white"
                axis.text(column, row, str(count), ha="center", va="center", fontsize="small", color=color)
    axis.set_xlabel("taken for")
    axis.set_ylabel("held-out images of")
    axis.set_title(f"{when}: accuracy {100 * values['validation/accuracy']:.1f} %, balanced "
                   f"{100 * values['validation/balanced_accuracy']:.1f} %", fontsize="medium")  # fmt: skip
    figure.savefig(path, dpi=110)
