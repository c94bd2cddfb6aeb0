"""Validation: sample pictures of the validation prompts, and the loss of held-out images.

Shapes: B samples in a batch, C channels, h w of a latent.
"""

import contextlib
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from lpl_finetuning.data.samples import addressed_normal
from lpl_finetuning.errors import during
from lpl_finetuning.files import dispensable
from lpl_finetuning.flags import settings_from_flags
from lpl_finetuning.sample_prompts import SamplePrompt, entries_of, pictures_at_once, scheduler_of
from lpl_finetuning.training.measures import Measures, MeasureSettings, held_out_batch
from lpl_finetuning.training.objective import autocast
from lpl_finetuning.training.reporter import Metrics
from lpl_finetuning.training.sharding import eval_mode, is_sharded
from lpl_finetuning.training.transfer import to_device

HELD_OUT_LEVELS = 10  # noise levels at which the held-out loss is measured
HELD_OUT_SEED = 0  # of the held-out noise: not --seed, so that runs with different seeds can be compared


@dataclass(frozen=True)
class ValidationSettings:
    """The flags about validation; each field has the name of its flag."""

    output_dir: str
    entries: tuple[SamplePrompt, ...]  # of --validation_prompt and --validation_prompts_file
    num_validation_images: int
    validation_steps: int | None
    validation_epochs: int
    validation_compare: bool
    resolution: int
    seed: int
    train_batch_size: int
    train_text_encoder: bool


class Intervals:
    """When a run validates; for a class with `settings`, `objective` and `data`."""

    def due(self, step):
        """Whether step `step`, from 1, ends an interval of --validation_steps, else of --validation_epochs."""
        return self.number(step) > self.number(step - 1)

    def number(self, step):
        """How many intervals have ended at step `step`."""
        settings, size = self.settings, self.objective.samples_per_step
        if settings.validation_steps:
            return step // settings.validation_steps
        return step * size // (settings.validation_epochs * len(self.data.images))


class Validation(Intervals):
    """Samples the validation prompts and measures the held-out loss while a run trains.

    Ranks that share a sharded model sample and measure together; otherwise rank 0 samples, and every rank measures
    its part of the held-out images.
    """

    def __init__(self, args, accelerator, trainee, objective, data, reporter, signals, sampling, held_out):
        """
        Args:
            trainee: the `Trainee`; objective: the `Objective`; data: the `RunData`.
            reporter: takes losses and pictures; signals: the `StopSignals`, which break validation off.
            sampling: (function denoiser -> a diffusers pipeline without text encoders, function latents -> decoded
                images (B, 3, H, W), inference steps).
            held_out: the script's functions (conditioning, held_out_step, denoise).
        """
        self.settings = settings_from_flags(ValidationSettings, args, entries=entries_of(args))
        self.accelerator, self.trainee, self.objective, self.data = accelerator, trainee, objective, data
        self.reporter, self.signals = reporter, signals
        self.sampling_pipeline, self.decode, self.inference_steps = sampling
        self.conditioning, self.held_out_step, denoise = held_out
        self.sharded = is_sharded(accelerator)
        self.samples_here = accelerator.is_main_process or self.sharded
        self.grids = Grids(Path(args.output_dir) / "validation", write=accelerator.is_main_process)
        measured, self.measures = settings_from_flags(MeasureSettings, args), None
        if measured.validation_metrics:
            vae = self.sampling_pipeline(trainee.bare).vae
            self.measures = Measures(measured, objective, data, self.conditioning, denoise, vae)
        if self.settings.validation_compare and self.samples_here:
            self.grids.keep_start(self.sample())

    def run(self, step):
        """Validate with the averaged weights: losses and pictures go to the reporter. All ranks call it."""
        prompts, held_out = self.settings.entries, len(self.data.held_out)
        if not held_out and not prompts:
            return
        works = held_out or self.samples_here  # the others need no average, which takes their weights into the memory
        averaged = self.trainee.averaged() if works else contextlib.nullcontext()
        with self.signals.between_steps(), self.reporter.paused(), averaged:
            if held_out and (losses := self.held_out_losses()):
                self.reporter.log(step, losses | self.measured(step))
            if prompts and self.samples_here:
                self.reporter.log_images(self.grids.add(step, self.sample), step)
            self.reporter.draw_run()

    def broken_off(self):
        """Whether a signal asks this process to stop and the other ranks do not wait for it here."""
        return self.signals.requested is not None and not self.sharded

    # -----------------------------------------------------------------------------------------------------------------
    # Sample pictures

    @during("drawing the validation pictures")
    @torch.no_grad()
    def sample(self):
        """[(label, [PIL images])] of the entries, with the same seeds each time; None where a signal broke it off."""
        settings, denoiser = self.settings, self.trainee.bare
        images = settings.num_validation_images
        pipeline = self.sampling_pipeline(denoiser)
        pipeline.set_progress_bar_config(disable=True)
        own = pipeline.scheduler
        rows = [(entry, []) for entry in settings.entries]
        quiet = not self.accelerator.is_main_process
        with eval_mode(denoiser):
            for entry, drawn in tqdm(rows, desc="validation images", leave=False, disable=quiet):
                pipeline.scheduler = scheduler_of(entry.sampler, own)
                at_once = min(images, pictures_at_once(*entry.size(settings.resolution)))
                seed = settings.seed if entry.seed is None else entry.seed
                for first in range(0, images, at_once):
                    if self.broken_off():
                        return None
                    seeds = range(seed + first, seed + min(first + at_once, images))
                    drawn += self._pictures(pipeline, entry, seeds)
        return [(entry.label(), drawn) for entry, drawn in rows]

    def _pictures(self, pipeline, entry, seeds):
        """PIL images of a `SamplePrompt`, one for each seed."""
        objective, (height, width) = self.objective, entry.size(self.settings.resolution)
        generators = [torch.Generator(objective.device).manual_seed(seed) for seed in seeds]
        guidance = {} if entry.guidance is None else {"guidance_scale": entry.guidance}
        with autocast(objective):
            latents = pipeline(
                **self.prompt_arguments([entry.prompt] * len(seeds), entry.negative), **guidance,
                generator=generators, num_inference_steps=entry.steps or self.inference_steps, height=height,
                width=width, output_type="latent",
            ).images  # fmt: skip
        # outside autocast: the decoder has a dtype of its own
        return pipeline.image_processor.postprocess(self.decode(latents).float())

    def prompt_arguments(self, prompts, negative=""):
        """Embeddings of prompts and of as many negative prompts, as arguments of the pipeline.

        Args:
            negative: one for all; "" for the unconditional prompt.
        """
        objective = self.objective

        def embeds(entries):
            batch = {name: torch.stack([entry[name] for entry in entries]).to(objective.device) for name in entries[0]}
            return self.trainee.bare.embed(batch) if self.settings.train_text_encoder else batch

        positive = embeds([self.data.prompt(prompt) for prompt in prompts])
        other = embeds([self.data.prompt(negative) if negative else objective.empty_prompt] * len(prompts))
        if objective.empty_is_zero and not negative:
            other = {name: torch.zeros_like(value) for name, value in other.items()}
        both = positive | {f"negative_{name}": value for name, value in other.items()}
        return {name: value.to(objective.dtype) for name, value in both.items()}

    # -----------------------------------------------------------------------------------------------------------------
    # The held-out loss

    def held_out_losses(self):
        """{log key: loss} of the held-out images, at fixed noise levels and with fixed noise; {} if broken off.

        `validation/diffusion_loss` is the mean over the levels, `validation/lpl_loss` over the gated levels; each
        level has an entry too. Where the model is sharded, all ranks run it equally often, some for nothing.
        """
        levels = self.objective.schedule.held_out_timesteps(HELD_OUT_LEVELS)
        names = [f"validation/{loss}_loss/t{timestep:g}" for loss in ("diffusion", "lpl") for timestep in levels]
        return self._over_held_out("held-out loss", names, lambda numbers: self._losses_of_batch(numbers, levels))

    def measured(self, step):
        """{log key: number} of --validation_metrics at a step; what a signal breaks off is left out."""
        measures, accelerator = self.measures, self.accelerator
        if measures is None:
            return {}
        denoiser = self.trainee.bare
        found = self._over_held_out(
            "one-step test", measures.one_step_names(), lambda numbers: measures.one_step(denoiser, numbers),
            pictures_at_once(self.settings.resolution, self.settings.resolution),
        )  # fmt: skip
        if not measures.kid_due(self.number(step)) and not (measures.network and step == self.reporter.total_steps):
            return found
        with during("drawing pictures for KID"), torch.no_grad(), eval_mode(denoiser):
            kid = measures.kid(
                self.sampling_pipeline(denoiser), self.inference_steps, self.prompt_arguments, self.decode,
                accelerator, stop=lambda: accelerator.num_processes == 1 and self.broken_off(),
            )  # fmt: skip
        return found if kid is None else found | {"validation/kid": kid}

    @during("measuring the held-out images")
    @torch.no_grad()
    def _over_held_out(self, what, names, values_of_batch, most=None):
        """{log key: mean} over the held-out images and ranks, with the means over the levels; {} if broken off.

        Args:
            what: the progress bar's title.
            names: the log keys of the levels.
            values_of_batch: function (numbers of images) -> generator of (log key, values (B,)).
            most: images at once; by default those of a micro-batch.
        """
        accelerator, metrics = self.accelerator, Metrics(self.objective.device)
        at_once = min(self.settings.train_batch_size, most or math.inf)
        batches, ranks = held_out_batches(self.data, at_once), accelerator.num_processes
        mine = batches[accelerator.process_index :: ranks]
        idle = -(-len(batches) // ranks) - len(mine) if self.sharded else 0
        work = [(numbers, True) for numbers in mine] + [(batches[0], False)] * idle
        quiet = not accelerator.is_local_main_process
        with eval_mode(self.trainee.bare):
            for numbers, counted in tqdm(work, desc=what, leave=False, disable=quiet):
                if ranks == 1 and self.broken_off():
                    return {}
                for name, values in values_of_batch(numbers):
                    if counted:
                        metrics.add(name, values.sum(), len(values))
        return with_means(metrics.read(accelerator, names))

    def _losses_of_batch(self, numbers, levels):
        """Generator of (log key, losses (B,)) of held-out images at each noise level."""
        objective, denoiser = self.objective, self.trainee.bare
        batch = held_out_batch(self.data, numbers)
        latents = objective.space.to_model(to_device(batch["mean"].float(), objective.device))
        gated = objective.gated(levels, latents).tolist()
        conditions = self.conditioning(batch, objective, 0)
        for level, timestep in enumerate(levels):
            addresses = [number * HELD_OUT_LEVELS + level for number in numbers]
            noise = addressed_normal(HELD_OUT_SEED, addresses, latents.shape[1:], "held_out")
            with autocast(objective):
                losses = self.held_out_step(
                    conditions, latents, to_device(noise, objective.device), timestep.repeat(len(numbers)),
                    gated[level], denoiser, objective,
                )  # fmt: skip
            for name, values in zip(("diffusion_loss", "lpl_loss"), losses, strict=True):
                if values is not None:
                    yield f"validation/{name}/t{timestep:g}", values


def held_out_batches(data, size):
    """Lists of numbers of held-out images, each of one shape and at most `size` long."""
    buckets = data.held_out_framing.buckets
    groups = [np.flatnonzero(buckets == bucket).tolist() for bucket in np.unique(buckets)]
    return [group[first : first + size] for group in groups for first in range(0, len(group), size)]


def with_means(losses):
    """Add to {"validation/x_loss/level": value} the mean over the levels of each loss, under its bare name."""
    groups = {}
    for name, value in losses.items():
        groups.setdefault(name.rpartition("/")[0], []).append(value)
    return {name: sum(values) / len(values) for name, values in groups.items()} | losses


class Grids:
    """The grids of sample pictures of a run, and the pictures that the run started from."""

    def __init__(self, folder, write=True):
        """write: whether this rank writes the files."""
        self.folder, self.write, self.start = folder, write, None

    def keep_start(self, rows):
        """Keep the pictures of the model that the run started from, also in `validation/before`."""
        self.start = rows
        if not self.write or rows is None:
            return
        folder = self.folder / "before"
        folder.mkdir(parents=True, exist_ok=True)
        for row, (_, images) in enumerate(rows):
            for column, image in enumerate(images):
                image.save(folder / f"{row}-{column}.png")

    def add(self, step, sample):
        """Sample every entry and write the grid of a step: rows [(label, [images])]; [] where it was broken off."""
        rows = shown = self.start if self.start and step == 0 else sample()
        if rows is None:
            return []
        if self.start and step:
            shown = [
                (with_moment(label, when), images)
                for (label, before), (_, after) in zip(self.start, rows, strict=True)
                for when, images in (("before", before), (f"after {step} steps", after))
            ]
        if self.write and any(images for _, images in rows):
            with dispensable("the validation grid"):
                self.folder.mkdir(parents=True, exist_ok=True)
                labelled_rows(shown).save(self.folder / f"step-{step}.png")
        return rows


def with_moment(label, when):
    """The label of an entry with a moment behind the prompt, which is the first line."""
    prompt, *settings = label.split("\n")
    return "\n".join([f"{prompt}  ({when})", *settings])


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def image_grid(images, columns, gap=2):
    """PIL images of one size, pasted row by row on white."""
    from PIL import Image

    width, height = images[0].size
    rows = math.ceil(len(images) / columns)
    grid = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + gap) + gap), "white")
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        grid.paste(image, (gap + column * (width + gap), gap + row * (height + gap)))
    return grid


def labelled_rows(rows, gap=2):
    """A grid with a caption over each row, [(caption, [images])]; small images are enlarged, large ones shrunk.

    The images of a row have one size. A caption may have several lines.
    """
    from PIL import Image, ImageDraw, ImageFont

    grids = []
    for caption, images in rows:
        size = max(images[0].size)
        factor = max(1, 160 // size) if size < 512 else 512 / size
        images = [
            image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.LANCZOS)
            for image in images
        ]
        grids.append((caption, image_grid(images, len(images), gap)))
    font = ImageFont.load_default(size=max(13, grids[0][1].height // 28))
    band = int(font.size * 1.6)
    lines = sum(len(caption.split("\n")) for caption, _ in grids)
    sheet = Image.new(
        "RGB", (max(grid.width for _, grid in grids), sum(grid.height for _, grid in grids) + band * lines), "white"
    )
    top = 0
    for caption, grid in grids:
        for line in caption.split("\n"):
            ImageDraw.Draw(sheet).text((gap + 2, top + band * 0.15), line[:200], fill="black", font=font)
            top += band
        sheet.paste(grid, (0, top))
        top += grid.height
    return sheet
