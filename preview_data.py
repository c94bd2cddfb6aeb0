"""A look at the data: what is in a folder of pictures, and what the model will see of it.

    python preview_data.py FOLDER                               # the report on the data
    python preview_data.py FOLDER --report data_report.json     # and in a file
    python preview_data.py FOLDER --preview preview.png         # and a contact sheet of the first samples
    python preview_data.py FOLDER --preview preview.png --config configs/recipes/sdxl-lora-16gb.yaml
    python preview_data.py FOLDER --preview preview.png --vae madebyollin/sdxl-vae-fp16-fix

Give the seed, batch size and data flags of a run, or the run's recipe as --config. Then the sheet shows the first
samples of that run on one GPU: the same crops, flips, captions and dropped captions. With --vae it also shows the
autoencoder's reconstruction of each picture. No denoiser can produce better pictures than that.

Top to bottom: the flags, the samples, the sheet, the command. `data/contact_sheet.py` draws the sheet. Importing this
file imports no torch, and the report needs none. Sizes are (height, width) in px, positions (top, left).
"""

import argparse
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from lpl_finetuning.base_model import check_part, is_in_pipeline
from lpl_finetuning.data.contact_sheet import SampleFacts, draw_sheet, make_tile
from lpl_finetuning.data.images import Crop, from_pixel_values
from lpl_finetuning.data.report import build_report, refuse_remarks, report_lines, save_report
from lpl_finetuning.data.samples import Framing, SampleOrder, TrainingSet, addressed_normal, addressed_uniform
from lpl_finetuning.data.scan import find_images
from lpl_finetuning.data.tables import CaptionedImage
from lpl_finetuning.errors import UserError, errors_for_people, quiet_libraries, require
from lpl_finetuning.flag_checks import NOT_NEGATIVE, POSITIVE, check_data_flags, check_dead_flags, exclude
from lpl_finetuning.flags import FlagParser, add_data_arguments, caption_rules, data_source, framing_rules
from lpl_finetuning.unpacking import lone_vae, vae_folder

if TYPE_CHECKING:
    import torch


MOST_IMAGES = 1000  # nobody looks at a larger sheet


# ---------------------------------------------------------------------------------------------------------------------
# Flags
# ---------------------------------------------------------------------------------------------------------------------


def build_parser() -> FlagParser:
    """All flags of the command. The flags about the data are those of the training scripts."""
    parser = FlagParser(__doc__.split("\n\nTop to bottom")[0], takes_part_of_a_recipe=True)
    parser.add_argument("folder", nargs="?", metavar="FOLDER", help="the images, as for --train_data_dir")
    group = parser.add_argument_group("preview")
    add = group.add_argument
    add("--preview", metavar="FILE.png", help="draw the first samples of training into this file")
    add("--preview_images", type=int, default=24, help="draw N of them (default: %(default)s)")
    add("--vae", metavar="FOLDER_OR_NAME", help="show what this autoencoder, or a pipeline's, makes of them; "
        "also a .safetensors file")  # fmt: skip
    add("--report", metavar="FILE.json", help="write the report on the data into this file")
    add_data_arguments(parser, resolution=1024)
    # Without effect here, but part of command lines that are copied from a run.
    parser.flags()["dataloader_num_workers"].help = argparse.SUPPRESS
    group = parser.add_argument_group("run")
    add = group.add_argument
    add("--config", help="recipe file of the run, or its config.yaml: the flags about the data are taken from it")
    add("--seed", type=int, default=0, help="seed of the run (default: %(default)s)")
    add("--train_batch_size", type=int, default=16, help="batch size of the run (default: %(default)s, as for SDXL)")
    add("--validation_split", type=float, help="share of the images, or number, that the run holds out")
    add("--validation_data_dir", help="or a folder of captioned images that it holds out")
    add("--max_validation_samples", type=int, default=64, help="held-out images (default: %(default)s)")
    add("--debug", action="store_true", help="show tracebacks")
    return parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags, checked before any image is read.

    Raises:
        UserError: a flag is unknown, out of range, or contradicts another flag; a folder or model does not exist.
    """
    args = build_parser().parse(argv)
    if args.folder and args.config:  # the folder on the command line takes precedence over the recipe
        args = args.but(train_data_dir=None, dataset_name=None)
    sources = [args.folder, args.train_data_dir, args.dataset_name]
    require(any(sources), "no data: give a FOLDER or --dataset_name NAME")
    require(sum(map(bool, sources)) == 1, "name one source of images: a FOLDER, --train_data_dir or --dataset_name")
    args = args.but(train_data_dir=args.folder or args.train_data_dir)
    for flag, folder in (("", args.train_data_dir), ("--validation_data_dir ", args.validation_data_dir)):
        require(folder is None or Path(folder).exists(), f"{flag}{folder}: there is no such folder")
    _check_ranges(args)
    exclude(args, "validation_split", "validation_data_dir")
    check_data_flags(args)
    check_dead_flags(args)
    require(args.preview or not args.vae, "--vae does nothing without --preview")
    require(args.preview or args.preview_images == 24, "--preview_images does nothing without --preview")
    _check_output(args, "preview", ".png")
    _check_output(args, "report", ".json")
    if args.vae and Path(args.vae).is_file():
        lone_vae(f"--vae {args.vae}", Path(args.vae))
    elif args.vae:
        check_part("vae", args.vae, "AutoencoderKL", "vae")
    return args


def _check_ranges(args):
    for name in (*POSITIVE, "preview_images"):
        value = getattr(args, name, None)
        require(value is None or value > 0, f"--{name} is {value}; it must be above 0")
    for name in NOT_NEGATIVE:
        value = getattr(args, name, None)
        require(value is None or value >= 0, f"--{name} is {value}; it must be 0 or more")
    require(args.seed < 2**64, f"--seed is {args.seed}; it must be less than 2**64")
    require(0 <= args.proportion_empty_prompts <= 1,
            f"--proportion_empty_prompts is {args.proportion_empty_prompts}; it must lie between 0 and 1")  # fmt: skip
    require(args.preview_images <= MOST_IMAGES,
            f"--preview_images is {args.preview_images}; at most {MOST_IMAGES} fit on a sheet")  # fmt: skip
    near = max(8, args.resolution // 8 * 8)
    require(args.resolution == near, f"--resolution is {args.resolution}; it must be a multiple of 8, e.g. {near}")


def _check_output(args, name, suffix):
    """Refuse a file that can't be written, before the images are read."""
    if not getattr(args, name):
        return
    path, flag = Path(getattr(args, name)), f"--{name} {getattr(args, name)}"
    require(path.suffix.lower() == suffix, f"{flag}: the file's name must end in {suffix}")
    require(path.parent.is_dir(), f"{flag}: there is no folder {path.parent}; make it, or name another")
    require(not path.is_dir(), f"{flag} is a folder; name a file")
    require(os.access(path if path.exists() else path.parent, os.W_OK), f"{flag}: no permission to write there")
    for folder in (args.train_data_dir, args.validation_data_dir) if suffix == ".png" else ():
        inside = folder and path.resolve().is_relative_to(Path(folder).resolve())
        require(not inside, f"{flag} lies in {folder}, among the images: name another place")


# ---------------------------------------------------------------------------------------------------------------------
# Samples
# ---------------------------------------------------------------------------------------------------------------------


def training_samples(
    args: argparse.Namespace, images: Sequence[CaptionedImage], framing: Framing
) -> Iterator[tuple[SampleFacts, np.ndarray, np.ndarray | None]]:
    """The first samples of training: (facts, pixels, reconstruction or None), uint8 (H, W, 3) each.

    Only the images of these samples are opened.

    Args:
        args: the flags.
        images: images to train on.
        framing: how the images are cut.

    Raises:
        DataError: an image can't be read, or has changed since the scan.
        UserError: the autoencoder can't be loaded.
    """
    order = SampleOrder(args.seed, args.train_batch_size, framing.buckets)
    samples = TrainingSet(images, order, framing, caption_rules(args))
    vae = load_vae(args.vae, args.cache_dir) if args.vae else None
    for n in range(args.preview_images):
        sample, (epoch, index) = samples[n], order[n]
        view, _ = framing.draw(index, images[index], args.seed, epoch * len(images) + index)
        numbers = [int(value) for value in sample["time_ids"]]
        crop = Crop(*(tuple(numbers[first : first + 2]) for first in (0, 2, 4)))
        # The same draw as in `training.objective.choose_prompts`.
        dropped = bool(addressed_uniform(args.seed, [n], "dropout")[0] < args.proportion_empty_prompts)
        pixels, decoded = from_pixel_values(sample["pixel_values"]), None
        if vae is not None:
            decoded = reconstruct(vae, sample["pixel_values"], args.seed, n)
        quality = None if decoded is None else psnr(pixels, decoded)
        name = images[index].name
        yield SampleFacts(n, epoch, name, sample["caption"], dropped, view.flip, crop, quality), pixels, decoded


def load_vae(name: str, cache_dir: str | None = None, flag: str = "--vae") -> "torch.nn.Module":
    """The `AutoencoderKL` of a folder, file or pipeline, or of the Hub: float32, on the GPU if there is one.

    Raises:
        UserError: the autoencoder can't be loaded.
    """
    quiet_libraries(debug=False)
    import torch
    from diffusers import AutoencoderKL

    if Path(name).is_file():
        name = str(vae_folder(f"{flag} {name}", Path(name), cache_dir))
    try:
        in_pipeline = is_in_pipeline(name, "vae")
        vae = AutoencoderKL.from_pretrained(
            name, subfolder="vae" if in_pipeline else None, dtype=torch.float32, use_safetensors=True
        )
    except Exception as error:  # files are missing, cut short or of another model, or there is no network
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(f"{flag} {name}: the autoencoder can't be loaded: {reason}") from error
    return vae.requires_grad_(False).eval().to("cuda" if torch.cuda.is_available() else "cpu")


def reconstruct(vae: "torch.nn.Module", pixel_values: "torch.Tensor", seed: int, n: int) -> np.ndarray:
    """The autoencoder's picture of the latents that the n-th sample is trained on, uint8 (H, W, 3).

    The latents are the sample of the posterior that `training.objective.sample_latents` draws.

    Args:
        vae: the autoencoder.
        pixel_values: the cut image, float32 (3, H, W) in [-1, 1].
        seed: seed of the run.
        n: number of the sample.

    Raises:
        UserError: the autoencoder gives pictures of another size.
    """
    import torch

    with torch.no_grad():
        posterior = vae.encode(pixel_values[None].to(vae.device)).latent_dist
        eps = addressed_normal(seed, [n], posterior.mean.shape[1:], "posterior").to(vae.device)
        decoded = vae.decode(posterior.mean + posterior.std * eps).sample[0]
    (height, width), found = pixel_values.shape[1:], decoded.shape[1:]
    require(found == pixel_values.shape[1:],
            f"--vae makes {found[0]} x {found[1]} px of {height} x {width}: choose a --resolution, or buckets, that "
            "its factor divides")  # fmt: skip
    return from_pixel_values(decoded)


def psnr(pixels: np.ndarray, estimate: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two uint8 pictures in dB, 10 log10(255^2 / mse); infinite for equal pictures."""
    mse = float(np.square(pixels.astype(np.float64) - estimate).mean())
    return 10 * math.log10(255**2 / mse) if mse else math.inf


# ---------------------------------------------------------------------------------------------------------------------
# The sheet
# ---------------------------------------------------------------------------------------------------------------------


def preview(args: argparse.Namespace, images: Sequence[CaptionedImage]) -> Image.Image:
    """The contact sheet of a run with these flags. images: images to train on."""
    from tqdm import tqdm

    framing = framing_rules(args).framing(images)
    samples = tqdm(training_samples(args, images, framing), "drawing", args.preview_images, unit=" images", delay=1,
                   leave=False)  # fmt: skip
    tiles = [make_tile(*sample) for sample in samples]
    numbers = np.bincount(framing.buckets, minlength=len(framing.sizes)).tolist()
    counts = {size: number for size, number in zip(framing.sizes, numbers, strict=True) if number}
    return draw_sheet(*header(args, len(images), len(counts)), tiles, args.train_batch_size, counts)


def header(args: argparse.Namespace, images: int, buckets: int) -> tuple[str, str]:
    """(title, subtitle) of the sheet.

    Args:
        args: the flags.
        images: number of images to train on.
        buckets: number of buckets in use.
    """
    name = args.dataset_name or Path(args.train_data_dir).resolve().name
    parts = [
        f"{images:,} images",
        f"{args.resolution} px" if not args.aspect_ratio_buckets else f"{buckets} buckets around {args.resolution} px",
        f"seed {args.seed}",
        f"batches of {args.train_batch_size}",
    ]
    if args.aspect_ratio_buckets not in (None, "auto"):
        parts[1] = f"{buckets} buckets"
    if args.trigger_word:
        parts.append(f'trigger word "{args.trigger_word}"')
    if args.shuffle_tags:
        parts.append("tags shuffled")
    if args.cache_variants:
        parts.append(f"{args.cache_variants} crops of each image")
    if args.center_crop:
        parts.append("center crop")
    if args.proportion_empty_prompts:
        parts.append(f"{args.proportion_empty_prompts:.0%} of captions dropped")
    if args.vae:
        parts.append(f"VAE {args.vae}")
    return f"{name}: what the model will see first", ", ".join(parts)


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def write(flag: str, path: str, save: Callable[[str], object]) -> None:
    """Call save(path); raise a UserError that names the flag if the file can't be written."""
    try:
        save(path)
    except OSError as error:
        raise UserError(f"{flag} {path}: can't be written: {error.strerror or error}") from error


def main(argv: Sequence[str] | None = None) -> None:
    """The command: print the report, write it, draw the sheet."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads bring a busy CPU to a halt
    argv = sys.argv[1:] if argv is None else list(argv)
    with errors_for_people("--debug" in argv):
        args = parse_args(argv)
        scan, held_out = find_images(data_source(args))
        report = build_report(scan, held_out, framing_rules(args), args.train_batch_size)
        print("\n".join(report_lines(report)))
        if args.report:
            write("--report", args.report, lambda path: save_report(report, path))
        if args.strict:
            refuse_remarks(report)
        if args.preview:
            sheet = preview(args, scan.images)
            write("--preview", args.preview, sheet.save)
            print(f"\nThe first {args.preview_images} samples of training: {args.preview}")


if __name__ == "__main__":
    main()
