"""What a run reports: metrics, log rows, progress bar, trackers, `run.png`."""

import contextlib
import functools
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from lpl_finetuning.files import dispensable, row_of
from lpl_finetuning.flags import SECRETS, feature_parts

# ---------------------------------------------------------------------------------------------------------------------
# Metrics


class Metrics:
    """Means of detached values that stay on the device until they are read, in one transfer.

    `add(name, value, count)` takes a scalar tensor (or a number of the host's) that is a sum over `count` items.
    """

    def __init__(self, device):
        self.device = device
        self.clear()

    def clear(self):
        """Start the next interval."""
        self.sums, self.counts = {}, {}

    def snapshot(self):
        """The state of the interval, for `restore`."""
        return dict(self.sums), dict(self.counts)

    def restore(self, snapshot):
        """Go back to a snapshot."""
        self.sums, self.counts = snapshot

    def add(self, name, value, count=1):
        """Add the sum of `count` items."""
        if isinstance(value, torch.Tensor):
            value = value.detach().to(torch.float32)
        self.sums[name] = self.sums.get(name, 0.0) + value
        self.counts[name] = self.counts.get(name, 0) + count

    def read(self, accelerator, names):
        """{name: mean over ranks and the interval} of the `names` that have any item; starts the next interval."""
        sums = [self.sums.get(name, 0.0) for name in names]
        host = [0.0 if isinstance(value, torch.Tensor) else value for value in sums] + [
            float(self.counts.get(name, 0)) for name in names
        ]
        packed = torch.tensor(host, device=self.device)
        for index, value in enumerate(sums):
            if isinstance(value, torch.Tensor):
                packed[index] = value
        if accelerator.num_processes > 1:
            packed = accelerator.reduce(packed, "sum")
        values = packed.tolist()
        self.clear()
        pairs = zip(names, values[: len(names)], values[len(names) :], strict=True)
        return {name: total / count for name, total, count in pairs if count}


METRICS = ["train_loss", "diffusion_loss", "grad_norm", "lpl/loss", "lpl/weighted_loss", "lpl/weight",
           "lpl/num_samples", "lpl/application_ratio"]  # fmt: skip


def metric_names(stages, networks=()):
    """The log keys of a run, in the order of the packed read.

    Args:
        stages: number of the stages that the loss compares.
        networks: names of the networks of the loss; of a single one the keys have no name.
    """
    layers, named = range(stages), networks if len(networks) > 1 else ()
    names = [f"lpl/{network}/{what}" for network in named for what in ("loss", "weight", "weighted_loss")]
    names += [f"lpl/features/layer_{layer}/{what}" for layer in layers for what in ("loss", "outlier_ratio")]
    return METRICS + names


def public_flags(args):
    """{flag: value} for the trackers, secrets left out; what trackers do not take is text."""
    public = {key: value for key, value in vars(args).items() if key not in SECRETS}
    return {key: value if isinstance(value, int | float | str | bool) else str(value) for key, value in public.items()}


class History:
    """The rows of log values of a run, in a file of JSON lines that a resumed run continues."""

    def __init__(self, path, first_step):
        self.path = Path(path)
        self.rows = []
        if first_step and self.path.is_file():
            self.rows = [row for row in map(row_of, self.path.read_text(errors="replace").splitlines())
                         if row.get("step", math.inf) <= first_step]  # fmt: skip
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text("".join(json.dumps(row) + "\n" for row in self.rows))

    def append(self, step, values):
        """Add a row."""
        self.rows.append({"step": step, **values})
        with dispensable("the log"), open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(self.rows[-1]) + "\n")

    def series(self, key):
        """(steps, values) of the rows that have the key."""
        rows = [row for row in self.rows if key in row]
        return [row["step"] for row in rows], [row[key] for row in rows]


@dataclass(frozen=True)
class Subject:
    """What the reports of a run are about.

    Attributes:
        title: of `run.png`.
        project: name of the run for the trackers.
        names: the log keys of a training step, in the order of the packed read.
        shown: function (row) -> {name: text} beside the progress bar; {} for a row without a step.
        draw: function (history, path, title) that draws `run.png`.
    """

    title: str
    project: str
    names: list[str]
    shown: Callable
    draw: Callable


def fine_tuning(args, stages):
    """The `Subject` of a run that trains a denoiser. stages: names of the stages that the loss compares."""
    kind, loss = "LoRA" if args.use_lora else "full", "with" if args.use_lpl else "without"
    family = args.base_model.family
    title = f"{family.title} {kind} fine-tuning, {loss} LPL"
    return Subject(title, f"{family.name}-lpl", metric_names(len(stages), [*feature_parts(args)]), shown_losses,
                   functools.partial(plot_run, stages=stages))  # fmt: skip


def shown_losses(values):
    """{name: text} of a row's losses for the progress bar; {} where no step since the last row was finite."""
    if "diffusion_loss" not in values:
        return {}
    shown = {"diffusion": f"{values['diffusion_loss']:.4f}", "lr": f"{values['lr']:.1e}"}
    if "lpl/loss" in values:
        shown |= {"LPL": f"{values['lpl/loss']:.4f}"}
    if "lpl/weighted_loss" in values:
        shown |= {"share": f"{100 * values.get('lpl/share', 0):.0f} %"}
    return shown


class Reporter:
    """What a run reports while it trains: progress bar, metrics file, trackers, `run.png`.

    Attributes:
        metrics: the `Metrics` of the interval since the last row.
        history: the `History` of all rows, on rank 0.
    """

    def __init__(self, args, accelerator, subject, first_step, total_steps):
        """
        Args:
            subject: the `Subject`.
            first_step: steps that the run has made already.
        """
        self.args, self.accelerator, self.subject = args, accelerator, subject
        self.first_step, self.total_steps = first_step, total_steps
        self.metrics = Metrics(accelerator.device)
        self.output_dir = Path(args.output_dir)
        self.main = accelerator.is_main_process
        if self.main:
            self.history = History(self.output_dir / args.logging_dir / "metrics.jsonl", first_step)
            accelerator.init_trackers(self.subject.project, public_flags(args))
        self.bar, self.samples, self.since, self.warned = None, 0, time.perf_counter(), False

    def steps(self):
        """Generator of the steps that are left, from 0, under a progress bar."""
        self.bar = tqdm(
            range(self.first_step, self.total_steps), initial=self.first_step, total=self.total_steps, desc="training",
            disable=not self.accelerator.is_local_main_process,
        )  # fmt: skip
        for step in self.bar:
            self._before = self.metrics.snapshot()
            yield step

    @contextlib.contextmanager
    def paused(self):
        """Context manager: the time inside, for sampling and measuring, does not count for samples per second."""
        start = time.perf_counter()
        yield
        self.since += time.perf_counter() - start

    def step(self, step, outcome, batch_size, values):
        """Report an optimizer step; every --logging_steps the metrics are read, in one transfer.

        Args:
            step: number of the step, from 1.
            outcome: the step's `Outcome`; the metrics of a step that was not made are dropped.
            batch_size: images of the step, over all ranks.
            values: more {log key: value}.
        """
        if not outcome.made:
            self.metrics.restore(self._before)
        self.samples += batch_size
        if step % self.args.logging_steps and step < self.total_steps and not outcome.stop:
            return
        read = self.metrics.read(self.accelerator, self.subject.names)
        now = time.perf_counter()
        read |= values | {"samples_per_second": self.samples / (now - self.since)}
        self.samples, self.since = 0, now
        for name in [name for name in read if name.endswith("/weighted_loss")]:
            share = f"{name.removesuffix('weighted_loss')}share"
            read[share] = read[name] / max(read["train_loss"], 1e-12)
        if self.main:
            self._pass_on(step, read)

    def log(self, step, values):
        """A row of values for the metrics file and the trackers."""
        if self.main:
            self.history.append(step, values)
            with dispensable("the trackers' log"):
                self.accelerator.log(values, step=step)

    def _pass_on(self, step, values):
        self.log(step, values)
        if not (shown := self.subject.shown(values)):
            return
        self.bar.set_postfix(shown)
        if self.args.use_lpl and not self.warned and step >= 100 and self.args.lpl_weight != "auto":
            shares = self.history.series("lpl/share")[1]
            if shares and sum(shares) / len(shares) < 0.01:
                self.warned = True
                print("warning: LPL is under 1 % of the loss and hardly matters; raise --lpl_weight, or use auto")

    def log_images(self, rows, step):
        """Pass validation pictures, [(label, [images])], to the trackers and write them as `image_N.png`."""
        if not self.main:
            return
        with dispensable("the trackers' log"):
            for tracker in self.accelerator.trackers:
                if tracker.name == "tensorboard":
                    for number, (_, images) in enumerate(rows):
                        stacked = np.stack([np.asarray(image) for image in images])
                        tracker.writer.add_images(f"validation/{number}", stacked, step, dataformats="NHWC")
                elif tracker.name == "wandb":
                    tracker.log_images({label.replace("\n", "  "): images for label, images in rows}, step=step)
        with dispensable("validation images"):
            for number, image in enumerate(image for _, images in rows for image in images):
                image.save(self.output_dir / f"image_{number}.png")

    def draw_run(self):
        """Draw `run.png`: the run at a glance so far."""
        if self.main and self.history.series("train_loss")[0]:
            with dispensable("run.png"):
                self.subject.draw(self.history, self.output_dir / "run.png", self.subject.title)

    def stopped(self, step):
        """Report the end of a run that a signal stopped, after its checkpoint."""
        self.draw_run()
        self.accelerator.print(
            f"\nStopped after step {step}, which is saved. --resume_from_checkpoint latest goes on from there; with "
            f"--max_train_steps {step} as well, it makes a result of it"
        )

    def finish(self):
        """Draw `run.png` and print where the results are."""
        self.draw_run()
        if not self.main:
            return
        steps, held_out = self.history.series("validation/diffusion_loss")
        drawn = {int(path.stem[5:]): path for path in (self.output_dir / "validation").glob("step-*.png")}
        steps_made = max(self.first_step, self.total_steps)  # a result of an earlier step leaves later grids
        grids = [drawn[step] for step in sorted(drawn) if step <= steps_made]
        print(f"\nDone. Results in {self.output_dir}; the run at a glance: {self.output_dir / 'run.png'}")
        if len(held_out) > 1:
            print(f"Held-out diffusion loss: {held_out[0]:.5f} {when(steps[0])}, {held_out[-1]:.5f} {when(steps[-1])}")
        if len(grids) > 1:
            print(f"Pictures {when(int(grids[0].stem[5:]))} and {when(int(grids[-1].stem[5:]))}: {grids[0]} and "
                  f"{grids[-1]}")  # fmt: skip


def when(step):
    """A moment of a run in words: "before training", or "after 500 steps"."""
    return f"after {step} steps" if step else "before training"


def plot_run(history, path, title, stages):
    """Draw losses, the loss per stage (`stages`: names), learning rate, throughput, and held-out losses if any."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    viridis = colormaps["viridis"]
    held_out = history.series("validation/diffusion_loss")[0]
    measured = history.series("validation/one_step/psnr")[0]
    rows = 2 + bool(held_out) + bool(measured)
    height = 3.5 * rows
    figure = Figure(figsize=(12, height))
    axes = figure.subplots(rows, 2)
    figure.subplots_adjust(left=0.06, right=0.985, top=1 - 0.8 / height, bottom=0.5 / height, hspace=0.38, wspace=0.2)
    losses, layers, rate, speed = axes[-2:].flat
    for key, label in [
        ("train_loss", "total"),
        ("diffusion_loss", "diffusion"),
        ("lpl/weighted_loss", "weight × LPL"),
    ]:
        draw_curve(losses, *history.series(key), label)
    losses.set_title("losses in training")
    for layer, name in enumerate(stages):
        series = history.series(f"lpl/features/layer_{layer}/loss")
        draw_curve(layers, *series, name, viridis(layer / max(5, len(stages))))
    if history.series("lpl/features/layer_0/loss")[0]:
        logarithmic(layers)
    else:
        layers.text(0.5, 0.5, "no LPL in these steps", ha="center", va="center", transform=layers.transAxes)
    layers.set_title("LPL per stage, unweighted")
    draw_curve(rate, *history.series("lr"), None, smooth=False)
    rate.set_title("learning rate")
    rate.set_ylim(bottom=0)
    rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    draw_curve(speed, *history.series("samples_per_second"), None, smooth=False)
    speed.set_title("samples per second")
    speed.set_ylim(bottom=0)
    if held_out:
        plot_held_out(history, axes[0], viridis)
    if measured:
        plot_measures(history, axes[1])
    for axis in axes.flat:
        axis.set_xlabel("optimizer step")
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axis.set_title(axis.get_title(), y=1)  # a place of its own, or matplotlib lays out every axis twice
        axis.grid(alpha=0.3)
        labels = axis.get_legend_handles_labels()[1]
        if len(labels) > 6:  # in rows of their own above the curves
            low, high = axis.get_ylim()
            axis.set_ylim(low, high + 0.3 * (high - low))
            axis.legend(fontsize="x-small", ncols=4, loc="upper left")
        elif labels:
            axis.legend(fontsize="small")
    figure.suptitle(title)
    figure.savefig(path, dpi=110)


def logarithmic(axis):
    """A logarithmic y axis with plain labels at 1, 2 and 5, or at powers of ten where the values span over 100."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_yscale("log")
    low, high = axis.get_ylim()
    axis.yaxis.set_major_locator(LogLocator(subs=(1,) if high > 100 * low else (1, 2, 5)))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, position: f"{value:g}"))


def plot_held_out(history, axes, colors):
    """Draw the held-out diffusion loss and LPL over the run, relative to the first: mean and noise levels."""
    for axis, key, title in zip(axes, ("diffusion_loss", "lpl_loss"), ("diffusion loss", "LPL"), strict=True):
        key = f"validation/{key}"
        names = {name for row in history.rows for name in row if name.startswith(key + "/t")}
        levels = sorted(int(name.rpartition("t")[2]) for name in names)
        for index, level in enumerate(levels):
            steps, values = history.series(f"{key}/t{level}")
            relative = [value / values[0] for value in values]
            color = colors(index / max(1, len(levels) - 1))
            axis.plot(steps, relative, linewidth=1, marker=".", color=color, label=f"t = {level}")
        steps, values = history.series(key)
        if steps:
            relative = [value / values[0] for value in values]
            axis.plot(steps, relative, linewidth=2.5, marker="o", color="black", label="mean")
        axis.axhline(1, color="grey", linestyle=":", linewidth=1)
        start = when(steps[0]) if steps else "the first validation"
        axis.set_title(f"held-out {title}, relative to {start}")


def plot_measures(history, axes):
    """Draw what --validation_metrics found: errors relative to the first, and ratios that should be 1."""
    errors, ratios = axes
    labels = {"validation/one_step/latent_mse": "latent error", "validation/kid": "KID"}
    names = sorted({name for row in history.rows for name in row if name.count("/") == 3})
    labels |= {name: "LPL of the middle block" for name in names if name.endswith("one_step/lpl/middle_block")}
    labels |= {name: f"{name.rpartition('/')[2]} features" for name in names if "one_step/perceptual/" in name}
    for key, label in labels.items():
        steps, values = history.series(key)
        if steps and values[0] > 0:
            errors.plot(steps, [value / values[0] for value in values], marker="o", label=label)
    steps, power = history.series("validation/one_step/high_frequency")
    ratios.plot(steps, [math.exp(value) for value in power], marker="o", label="power of high frequencies")
    for key, label in (("spread/middle_block", "spread, middle block"), ("gain", "gain that would set it right")):
        ratios.plot(*history.series(f"validation/one_step/{key}"), marker="o", label=label)
    steps, _ = history.series("validation/one_step/latent_mse")
    errors.set_title(f"one-step test, relative to {when(steps[0]) if steps else 'the first validation'}")
    ratios.set_title("one-step test, estimate against picture: 1 is right")
    for axis in axes:
        axis.axhline(1, color="grey", linestyle=":", linewidth=1)


def draw_curve(axis, steps, values, label, color=None, smooth=True):
    """Draw values as a thin line and their running mean over a tenth of the run as a thick line."""
    if not steps:
        return
    if not smooth or len(values) < 10:
        axis.plot(steps, values, label=label, color=color, marker="." if len(values) < 10 else "")
        return
    (thin,) = axis.plot(steps, values, alpha=0.25, linewidth=0.8, color=color)
    window = max(3, len(values) // 10)
    means = [sum(values[max(0, i - window + 1) : i + 1]) / min(window, i + 1) for i in range(len(values))]
    axis.plot(steps, means, label=label, color=thin.get_color())
