"""What the recipes share and nobody would edit: models, optimizers, metrics, samples, the held-out loss."""

import math
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from lpl_finetuning.data.samples import addressed_normal, collate
from lpl_finetuning.files import dispensable
from lpl_finetuning.training.objective import to_device
from lpl_finetuning.training.reporter import Metrics
from lpl_finetuning.training.sharding import is_sharded
from lpl_utils import DecoderStages

HELD_OUT_LEVELS = 10  # noise levels at which the held-out loss is measured
HELD_OUT_SEED = 0  # of its noise: not --seed, so that runs with different seeds can be compared


def validation_schedule(args, images, batch_size):
    """Function step -> whether a validation is due: every --validation_steps, else every --validation_epochs."""
    if args.validation_steps:
        return lambda step: step % args.validation_steps == 0
    every = args.validation_epochs * images  # samples
    return lambda step: step * batch_size // every > (step - 1) * batch_size // every


# ---------------------------------------------------------------------------------------------------------------------
# Validation: pictures and the held-out loss


def draw_prompts(pipeline, prompt_of, vae, recipe, num_inference_steps):
    """[(prompt, [images])] of --validation_prompt, with the same seeds every time; None where it was broken off.

    prompt_of: function from a list of prompts to the pipeline's arguments for them.
    """
    args, images = recipe.args, recipe.args.num_validation_images
    at_once = min(images, max(1, (1024 // args.resolution) ** 2))
    rows = [(prompt, []) for prompt in args.validation_prompt]
    for prompt, drawn in tqdm(rows, desc="validation images", leave=False, disable=not recipe.main):
        for first in range(0, images, at_once):
            if recipe.broken_off():
                return None
            seeds = range(args.seed + first, args.seed + min(first + at_once, images))
            generators = [torch.Generator(recipe.device).manual_seed(seed) for seed in seeds]
            with torch.autocast(recipe.device.type, recipe.dtype, enabled=recipe.dtype != torch.float32):
                latents = pipeline(
                    **prompt_of([prompt] * len(seeds)), generator=generators, num_inference_steps=num_inference_steps,
                    height=args.resolution, width=args.resolution, output_type="latent",
                ).images  # fmt: skip
            decoded = vae.decode(DecoderStages(vae).to_vae_space(latents)).sample  # no autocast: see LPL's dtype
            drawn += pipeline.image_processor.postprocess(decoded.float())
    return rows


@torch.no_grad()
def held_out_losses(data, recipe, accelerator, conditioning, measure):
    """{log key: loss} of the held-out images, at fixed noise levels and with fixed noise.

    `validation/diffusion_loss` is the mean over the levels, `validation/lpl_loss` over those that the gate takes; each
    level has its own entry too. Every rank takes its share of the images; where the model is sharded, all of them call
    it equally often, some for nothing. Empty where a run of one process was broken off.

    conditioning: function (batch, recipe, share of dropped prompts) -> the denoiser's conditions;
    measure: function (conditions, latents, noise, timesteps, with LPL or not) -> (diffusion losses (B,), LPL (B,)).
    """
    metrics, levels = Metrics(recipe.device), recipe.schedule.held_out_timesteps(HELD_OUT_LEVELS)
    batches, ranks = held_out_batches(data, recipe.args.train_batch_size), accelerator.num_processes
    mine = batches[accelerator.process_index :: ranks]
    idle = -(-len(batches) // ranks) - len(mine) if is_sharded(accelerator) else 0
    work = [(numbers, True) for numbers in mine] + [(batches[0], False)] * idle
    for numbers, counted in tqdm(
        work, desc="held-out loss", leave=False, disable=not accelerator.is_local_main_process
    ):
        if ranks == 1 and recipe.broken_off():
            return {}
        batch = collate([latent | prompt for latent, prompt in map(data.held_out_entry, numbers)])
        batch["number"] = numbers
        latents = recipe.to_model_space(to_device(batch["mean"].float(), recipe.device))
        gated = recipe.gated(levels, latents).tolist()
        conditions = conditioning(batch, recipe, 0)
        for level, timestep in enumerate(levels):
            addresses = [number * HELD_OUT_LEVELS + level for number in numbers]
            noise = to_device(addressed_normal(HELD_OUT_SEED, addresses, latents.shape[1:], "held_out"), recipe.device)
            losses = measure(conditions, latents, noise, timestep.repeat(len(numbers)), gated[level])
            for name, values in zip(("diffusion_loss", "lpl_loss"), losses, strict=True):
                if values is not None and counted:
                    metrics.add(f"validation/{name}/t{timestep:g}", values.sum(), len(values))
    names = [f"validation/{loss}_loss/t{timestep:g}" for loss in ("diffusion", "lpl") for timestep in levels]
    return with_means(metrics.read(accelerator, names))


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


class Gallery:
    """The validation grids of a run, and with --validation_compare the pictures that it started from."""

    def __init__(self, args, draw, keep=True):
        """draw: function without arguments that returns [(prompt, [images])] or None; keep: whether to write files."""
        self.folder, self.keep = Path(args.output_dir) / "validation", keep
        self.compare, self.draw_rows, self.start = args.validation_compare, draw, None

    def draw_start(self):
        """Draw the model that the run started from, and keep its pictures in `validation/before`."""
        self.start = self.draw_rows()
        if not self.keep:
            return
        folder = self.folder / "before"
        folder.mkdir(parents=True, exist_ok=True)
        for row, (_, images) in enumerate(self.start):
            for column, image in enumerate(images):
                image.save(folder / f"{row}-{column}.png")

    def draw(self, step):
        """Draw every prompt, save the grid, return the rows [(prompt, [images])]; nothing where it was broken off."""
        rows = shown = self.start if self.start and step == 0 else self.draw_rows()
        if rows is None:
            return []
        if self.start and step:
            shown = [
                (f"{prompt}  ({when})", images)
                for (prompt, before), (_, after) in zip(self.start, rows, strict=True)
                for when, images in (("before", before), (f"after {step} steps", after))
            ]
        if self.keep and any(images for _, images in rows):
            with dispensable("the validation grid"):
                self.folder.mkdir(parents=True, exist_ok=True)
                labelled_rows(shown).save(self.folder / f"step-{step}.png")
        return rows


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
    """A grid with a caption over each row, [(caption, [images])]; small images are enlarged, large ones shrunk."""
    from PIL import Image, ImageDraw, ImageFont

    size = rows[0][1][0].width
    factor = max(1, 160 // size) if size < 512 else 512 / size
    grids = []
    for caption, images in rows:
        images = [
            image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.LANCZOS)
            for image in images
        ]
        grids.append((caption, image_grid(images, len(images), gap)))
    font = ImageFont.load_default(size=max(13, grids[0][1].height // 28))
    band = int(font.size * 1.6)
    sheet = Image.new(
        "RGB", (max(grid.width for _, grid in grids), sum(grid.height + band for _, grid in grids)), "white"
    )
    top = 0
    for caption, grid in grids:
        ImageDraw.Draw(sheet).text((gap + 2, top + band * 0.15), caption[:200], fill="black", font=font)
        sheet.paste(grid, (0, top + band))
        top += band + grid.height
    return sheet
