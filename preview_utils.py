"""A look at the data: what is in a folder of pictures, and what the model will see of it.

    python data_utils.py FOLDER                               # the report on the data
    python data_utils.py FOLDER --report data_report.json     # and in a file
    python data_utils.py FOLDER --preview preview.png         # and a contact sheet of the first samples
    python data_utils.py FOLDER --preview preview.png --config configs/recipes/sdxl-lora-16gb.yaml
    python data_utils.py FOLDER --preview preview.png --vae madebyollin/sdxl-vae-fp16-fix

With a run's seed, batch size and data flags, or its recipe as --config, the sheet has the very samples that this run
on one GPU begins with: the same crops, flips, captions and dropped captions. With --vae it shows beside each picture
what the autoencoder makes of its latents: no denoiser can draw better than that.

What this file holds, in order:

1. flags of the command, and their checks;
2. samples: the first ones of training, as the training set gives them;
3. text: what is written under a picture, in letters that the fonts have;
4. layout: which tile stands where;
5. drawing: header, tiles and panel;
6. the command.

Sizes are (height, width) in pixels and positions (top, left), as in `data_utils`; places in the sheet are Pillow's,
(left, top). Importing this file imports no torch; the report needs none either.
"""

import argparse
import bisect
import functools
import math
import os
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

import check_utils
import cli_utils
import input_utils
import model_utils
import preflight_utils
from cli_utils import UserError, require
from data_report_utils import report_lines
from data_utils import Framing, SampleOrder, TrainingSet, addressed_normal, addressed_uniform
from image_utils import Crop, from_pixel_values, lost_share, resized_size
from table_utils import CaptionedImage, shown

if TYPE_CHECKING:
    import torch

MOST_IMAGES = 1000  # a sheet of more is no longer one that anybody looks at

# Of the sheet, in px
WIDTH, MARGIN, PANEL = 1600, 32, 250
PICTURE = 224  # height of a picture at most
NARROW = 128  # width of the text under a picture at least
TILE_GAP, BLOCK_GAP, SHELF_GAP, ROW_GAP, PAIR_GAP = 16, 28, 28, 16, 4
BAND = 32  # from the top of a block to its pictures
ROOM = WIDTH - 2 * MARGIN - PANEL - 2 * BLOCK_GAP  # width of the part with the pictures
WIDE = (ROOM - 3 * TILE_GAP) // 4  # width of a picture at most
LINE, SMALL_LINE = 18, 15  # heights of a caption's lines and of those below

CAPTION_LINES, DETAIL_LINES = 3, 5
TITLE, HEADING, TEXT, SMALL = 26, 17, 14, 12  # font sizes
INK, GREY, PALE, LIGHT = "#1f2430", "#6b7280", "#a0a5b0", "#d7dae0"
COLOURS = ("#2563eb", "#c2410c", "#15803d", "#7c3aed", "#be185d", "#0e7490", "#a16207", "#4b5563")  # of buckets
MOST_BARS = 14
UNKNOWN = "□"


# ---------------------------------------------------------------------------------------------------------------------
# 1. Flags
# ---------------------------------------------------------------------------------------------------------------------


def build_parser() -> cli_utils.FlagParser:
    """All flags of the command. Those about the data are the training scripts' own."""
    parser = cli_utils.FlagParser(__doc__.split("\n\nWhat this file holds")[0], takes_part_of_a_recipe=True)
    parser.add_argument("folder", nargs="?", metavar="FOLDER", help="the images, as for --train_data_dir")
    group = parser.add_argument_group("preview")
    add = group.add_argument
    add("--preview", metavar="FILE.png", help="draw the first samples of training into this file")
    add("--preview_images", type=int, default=24, help="draw N of them (default: %(default)s)")
    add("--vae", metavar="FOLDER_OR_NAME", help="show what this autoencoder, or a pipeline's, makes of them")
    add("--report", metavar="FILE.json", help="write the report on the data into this file")
    cli_utils.add_data_arguments(parser, resolution=1024)
    # Of no use here, but a line copied from a run may have it.
    parser.flags()["dataloader_num_workers"].help = argparse.SUPPRESS
    group = parser.add_argument_group("run")
    add = group.add_argument
    add("--config", help="recipe file of that run, or its config.yaml: its flags about the data are taken")
    add("--seed", type=int, default=0, help="of the run that is looked ahead at (default: %(default)s)")
    add("--train_batch_size", type=int, default=16, help="of that run (default: %(default)s, as for SDXL)")
    add("--validation_split", type=float, help="share of the images, or number, that the run holds out")
    add("--validation_data_dir", help="or a folder of captioned images that it holds out")
    add("--max_validation_samples", type=int, default=64, help="held-out images (default: %(default)s)")
    add("--debug", action="store_true", help="show tracebacks")
    return parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Flags, checked before any image is read.

    Raises:
        UserError: a flag is unknown, out of range, or contradicts another; a folder or model is not there.
    """
    args = build_parser().parse(argv)
    if args.folder and args.config:  # the folder named on the command line wins over the recipe's
        args.train_data_dir = args.instance_data_dir = args.dataset_name = None
    sources = [args.folder, args.train_data_dir, args.instance_data_dir, args.dataset_name]
    require(any(sources), "no data: give a FOLDER or --dataset_name NAME")
    require(sum(map(bool, sources)) == 1, "name one source of images: a FOLDER, --train_data_dir or --dataset_name")
    args.train_data_dir = args.folder or args.train_data_dir or args.instance_data_dir
    for flag, folder in (("", args.train_data_dir), ("--validation_data_dir ", args.validation_data_dir)):
        require(folder is None or Path(folder).is_dir(), f"{flag}{folder}: there is no such folder")
    _check_ranges(args)
    check_utils.exclude(args, "validation_split", "validation_data_dir")
    check_utils.check_data_flags(args)
    require(args.preview or not args.vae, "--vae does nothing without --preview")
    require(args.preview or args.preview_images == 24, "--preview_images does nothing without --preview")
    _check_output(args, "preview", ".png")
    _check_output(args, "report", ".json")
    preflight_utils.check_part(args, "vae", "AutoencoderKL", "vae")
    return args


def _check_ranges(args):
    for name in (*check_utils.POSITIVE, "preview_images"):
        value = getattr(args, name, None)
        require(value is None or value > 0, f"--{name} is {value}; it must be above 0")
    for name in check_utils.NOT_NEGATIVE:
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
        require(not inside, f"{flag} lies among the images of {folder}, and would be one of them: name another place")


# ---------------------------------------------------------------------------------------------------------------------
# 2. Samples
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SampleFacts:
    """What is told of a sample.

    number: in the stream of samples; epoch: in which its image comes here, from 0.
    name: of the image. caption: as drawn, before it is dropped or not.
    psnr: of the autoencoder's reconstruction, in dB; None without an autoencoder.
    """

    number: int
    epoch: int
    name: str
    caption: str
    dropped: bool
    flipped: bool
    crop: Crop
    psnr: float | None = None

    @property
    def enlarged(self) -> float:
        """By how much the image was resized; more than 1 where it is smaller than its target."""
        original, target = self.crop.original_size, self.crop.target_size
        return max(new / old for new, old in zip(resized_size(original, target), original, strict=True))

    @property
    def lost(self) -> float:
        """The share of the image that the crop throws away."""
        return float(lost_share(np.array([self.crop.original_size]), self.crop.target_size)[0])


def training_samples(
    args: argparse.Namespace, images: Sequence[CaptionedImage], cuts: Framing
) -> Iterator[tuple[SampleFacts, np.ndarray, np.ndarray | None]]:
    """The first samples of training: (facts, pixels, reconstruction or None), uint8 (H, W, 3) each.

    Only their images are opened. images: to train on; cuts: how they are cut, `input_utils.framing`.

    Raises:
        DataError: an image can't be read, or has changed since it was scanned.
        UserError: the autoencoder can't be loaded.
    """
    order = SampleOrder(args.seed, args.train_batch_size, cuts.buckets)
    samples = TrainingSet(images, order, cuts, input_utils.caption_rules(args))
    vae = load_vae(args.vae) if args.vae else None
    for n in range(args.preview_images):
        sample, (epoch, index) = samples[n], order[n]
        view, _ = cuts.draw(index, images[index], args.seed, epoch * len(images) + index)
        numbers = [int(value) for value in sample["time_ids"]]
        crop = Crop(*(tuple(numbers[first : first + 2]) for first in (0, 2, 4)))
        # As `train_utils.choose_prompts` draws it.
        dropped = bool(addressed_uniform(args.seed, [n], "dropout")[0] < args.proportion_empty_prompts)
        pixels, decoded = from_pixel_values(sample["pixel_values"]), None
        if vae is not None:
            decoded = reconstruct(vae, sample["pixel_values"], args.seed, n)
        quality = None if decoded is None else psnr(pixels, decoded)
        name = images[index].name
        yield SampleFacts(n, epoch, name, sample["caption"], dropped, view.flip, crop, quality), pixels, decoded


def load_vae(name: str) -> "torch.nn.Module":
    """The `AutoencoderKL` of this folder or name, or of the pipeline there; float32, on the GPU if there is one.

    Raises:
        UserError: it can't be loaded.
    """
    cli_utils.quiet_libraries(debug=False)
    import torch
    from diffusers import AutoencoderKL

    in_pipeline = model_utils.model_file(name, "config.json", subfolder="vae")
    try:
        vae = AutoencoderKL.from_pretrained(
            name, subfolder="vae" if in_pipeline else None, dtype=torch.float32, use_safetensors=True
        )
    except Exception as error:  # files that are missing, cut short or of another model, or no network
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(f"--vae {name}: the autoencoder can't be loaded: {reason}") from error
    return vae.requires_grad_(False).eval().to("cuda" if torch.cuda.is_available() else "cpu")


def reconstruct(vae: "torch.nn.Module", pixel_values: "torch.Tensor", seed: int, n: int) -> np.ndarray:
    """What the autoencoder makes of the latents that the n-th sample is trained on, uint8 (H, W, 3).

    pixel_values: float32 (3, H, W) in [-1, 1]. The latents are a sample of the posterior, as in
    `train_utils.sample_latents`.

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
    """Peak signal-to-noise ratio of two uint8 pictures in dB: 10 log10(255^2 / mse); infinite where they agree."""
    mse = float(np.square(pixels.astype(np.float64) - estimate).mean())
    return 10 * math.log10(255**2 / mse) if mse else math.inf


# ---------------------------------------------------------------------------------------------------------------------
# 3. Text
# ---------------------------------------------------------------------------------------------------------------------


def caption_shown(facts: SampleFacts) -> tuple[str, bool]:
    """(text under a picture, whether it is the sample's caption): a dropped or empty one has a word in its place."""
    if facts.dropped:
        return "(dropped)", False
    return (facts.caption, True) if facts.caption.strip() else ("(empty)", False)


def crop_shown(facts: SampleFacts) -> list[str]:
    """How the image became the picture: "from 1080 x 1920", "crop top 0 left 12", "3% lost", "flipped"."""
    crop = facts.crop
    parts = ["from {} x {}".format(*crop.original_size)]
    if facts.enlarged > 1.005:
        parts.append(f"enlarged {facts.enlarged:.2f}x")
    if crop.target_size == resized_size(crop.original_size, crop.target_size):
        parts.append("not cropped")
    else:
        parts += ["crop top {} left {}".format(*crop.crop_top_left), f"{facts.lost:.0%} lost"]
    return [*parts, "flipped"] if facts.flipped else parts


@functools.cache
def small_font(size: int) -> ImageFont.FreeTypeFont:
    """Pillow's own font, which has little more than ASCII."""
    return ImageFont.load_default(size)


@functools.cache
def large_font(size: int) -> ImageFont.FreeTypeFont:
    """The font that comes with matplotlib: Latin with accents, Greek, Cyrillic, Hebrew, Arabic, but no Chinese."""
    import matplotlib

    path = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    return ImageFont.truetype(str(path), size - 1)  # its letters are larger


@functools.cache
def _has(font, character):
    """Whether a font has a character: it draws a missing one as it draws one that no font has."""
    glyphs = [font.getmask(letter) for letter in (character, "\U0010ffff")]
    return character == " " or (glyphs[0].size, bytes(glyphs[0])) != (glyphs[1].size, bytes(glyphs[1]))


def legible(text: str) -> str:
    """The text in one line, with `UNKNOWN` for every character that the fonts can't draw, such as Chinese ones."""
    letters = []
    for letter in " ".join(unicodedata.normalize("NFC", text).split()):
        kind = unicodedata.category(letter)
        if kind[0] != "C" and (_has(small_font(TEXT), letter) or _has(large_font(TEXT), letter)):
            letters.append(letter)
        elif kind not in ("Cf", "Mn", "Me"):  # which only change their neighbours
            letters.append(UNKNOWN)
    return "".join(letters)


def font_for(text: str, size: int) -> ImageFont.FreeTypeFont:
    """The font for a legible text: Pillow's own, where it has all letters."""
    font = small_font(size)
    return font if all(_has(small_font(TEXT), letter) for letter in text) else large_font(size)


def wrap(words: Iterable[str], font: ImageFont.FreeTypeFont, width: float, most: int) -> list[str]:
    """Legible words in lines of at most `width` px, those too long for one broken; after `most` lines an ellipsis."""
    lines, line = [], ""
    for word in words:
        if font.getlength(f"{line} {word}".strip()) <= width:
            line = f"{line} {word}".strip()
            continue
        lines += [line] if line else []
        while font.getlength(word) > width and len(lines) <= most:
            fits = bisect.bisect_right(range(1, len(word)), width, key=lambda end: font.getlength(word[:end]))
            lines.append(word[: max(1, fits)])
            word = word[max(1, fits) :]
        line = word
        if len(lines) > most:
            break
    lines += [line] if line else []
    if len(lines) <= most:
        return lines
    last = lines[most - 1]
    while last and font.getlength(f"{last}…") > width:
        last = last[:-1]
    return [*lines[: most - 1], last.rstrip(" ,") + "…"]


def shorten(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """A name in one line of at most `width` px; of a long one the end is kept, which tells files apart."""
    if font.getlength(text) <= width:
        return text
    while len(text) > 1 and font.getlength(f"…{text}") > width:
        text = text[1:]
    return f"…{text}"


# ---------------------------------------------------------------------------------------------------------------------
# 4. Layout
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tile:
    """One sample on the sheet: its picture, and with an autoencoder the reconstruction, and the lines below."""

    facts: SampleFacts
    pictures: tuple[Image.Image, ...]
    caption: list[str]
    details: list[str]

    @property
    def size(self) -> tuple[int, int]:
        """(width, height)."""
        width = sum(max(picture.width, NARROW) for picture in self.pictures) + PAIR_GAP * (len(self.pictures) - 1)
        return width, self.pictures[0].height + 8 + LINE * len(self.caption) + 4 + SMALL_LINE * len(self.details)


def shown_size(size: tuple[int, int]) -> tuple[int, int]:
    """How large a picture of a size is drawn, (height, width).

    Shrunk to fit, or enlarged by a whole factor, so that every pixel of a small one can be seen.
    """
    factor = min(PICTURE / size[0], WIDE / size[1])
    factor = math.floor(factor) if factor >= 1 else factor
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


def make_tile(facts: SampleFacts, pixels: np.ndarray, decoded: np.ndarray | None) -> Tile:
    """The tile of a sample; of the pixels only what is drawn is kept."""
    height, width = shown_size(pixels.shape[:2])
    resample = Image.Resampling.NEAREST if height >= pixels.shape[0] else Image.Resampling.LANCZOS
    arrays = [pixels] if decoded is None else [pixels, decoded]
    pictures = tuple(Image.fromarray(array).resize((width, height), resample) for array in arrays)
    text, room = legible(caption_shown(facts)[0][:4000]), max(width, NARROW)
    name, parts = legible(shown(facts.name)), crop_shown(facts)
    parts = [*(f"{part}," for part in parts[:-1]), parts[-1]]
    lines = [shorten(name, font_for(name, SMALL), room), *wrap(parts, small_font(SMALL), room, DETAIL_LINES - 1)]
    return Tile(facts, pictures, wrap(text.split(), font_for(text, TEXT), room, CAPTION_LINES), lines)


@dataclass(frozen=True)
class Block:
    """The tiles of a batch, or of a part of it, that stand side by side; only its first part has a heading."""

    heading: str
    tiles: list[Tile]

    @property
    def size(self) -> tuple[int, int]:
        """(width, height)."""
        widths, heights = zip(*(tile.size for tile in self.tiles), strict=True)
        width = sum(widths) + TILE_GAP * (len(widths) - 1)
        return max(width, math.ceil(small_font(HEADING).getlength(self.heading))), self.band + max(heights)

    @property
    def band(self) -> int:
        """Height of the heading, with the rule below it."""
        return BAND if self.heading else 0


def batch_blocks(tiles: Sequence[Tile], batch_size: int, room: int = ROOM) -> Iterator[Block]:
    """Blocks of at most `room` px, one for each batch, or several of about the same number of tiles."""
    several_epochs = any(tile.facts.epoch for tile in tiles)
    for batch, group in groupby(tiles, key=lambda tile: tile.facts.number // batch_size):
        group = list(group)
        heading = "batch {}: {} x {}".format(batch + 1, *group[0].facts.crop.target_size)
        if several_epochs:
            epochs = sorted({tile.facts.epoch + 1 for tile in group})
            heading += f", epoch {epochs[0]}" if len(epochs) == 1 else f", epochs {epochs[0]} to {epochs[-1]}"
        fit = max(1, (room + TILE_GAP) // (group[0].size[0] + TILE_GAP))  # all of a batch are of one width
        fit = math.ceil(len(group) / math.ceil(len(group) / fit))
        for first in range(0, len(group), fit):
            yield Block("" if first else heading, group[first : first + fit])


def arrange(blocks: Sequence[Block], room: int = ROOM) -> tuple[list[tuple[int, int, Block]], tuple[int, int]]:
    """([(left, top, block)], (width, height) of all): blocks with a heading fill shelf after shelf."""
    placed, left, top, shelf, right = [], 0, 0, 0, 0
    for block in blocks:
        width, height = block.size
        aligned = block.heading and placed and placed[-1][2].heading
        if placed and not (aligned and left + width <= room):
            left, top, shelf = 0, top + shelf + (SHELF_GAP if block.heading else ROW_GAP), 0
        placed.append((left, top, block))
        right, shelf = max(right, left + width), max(shelf, height)
        left += width + BLOCK_GAP
    return placed, (right, top + shelf)


# ---------------------------------------------------------------------------------------------------------------------
# 5. Drawing
# ---------------------------------------------------------------------------------------------------------------------


def draw_sheet(title: str, subtitle: str, tiles: Sequence[Tile], batch_size: int, counts: dict) -> Image.Image:
    """The sheet. counts: {bucket: number of images in it}, of those in use."""
    counts = dict(sorted(counts.items(), key=lambda pair: -pair[1]))
    colours = {bucket: COLOURS[number % len(COLOURS)] for number, bucket in enumerate(counts)}
    placed, (width, height) = arrange(list(batch_blocks(tiles, batch_size)))
    panel = draw_panel(tiles, counts, colours)
    width, header = max(width, 640), MARGIN + 84
    size = MARGIN + width + 2 * BLOCK_GAP + PANEL + MARGIN, header + max(height, panel.height) + MARGIN
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    inner = size[0] - 2 * MARGIN
    for text, top, points, colour in ((title, 0, TITLE, INK), (subtitle, 40, TEXT, GREY)):
        text = legible(text)
        font = font_for(text, points)
        draw.text((MARGIN, MARGIN - 6 + top), wrap(text.split(), font, inner, 1)[0], colour, font)
    draw.line([MARGIN, header - 26, size[0] - MARGIN, header - 26], LIGHT)
    for left, top, block in placed:
        draw_block(sheet, MARGIN + left, header + top, block, colours[block.tiles[0].facts.crop.target_size])
    sheet.paste(panel, (MARGIN + width + 2 * BLOCK_GAP, header))
    return sheet


def draw_block(sheet: Image.Image, left: int, top: int, block: Block, colour: str) -> None:
    """A batch: its heading over a rule in the colour of its bucket, and its tiles."""
    draw = ImageDraw.Draw(sheet)
    if block.heading:
        draw.text((left, top), block.heading, INK, small_font(HEADING))
        draw.line([left - 1, top + BAND - 9, left + block.size[0], top + BAND - 9], colour, 2)
    for tile in block.tiles:
        draw_tile(sheet, left, top + block.band, tile)
        left += tile.size[0] + TILE_GAP


def draw_tile(sheet: Image.Image, left: int, top: int, tile: Tile) -> None:
    """A picture, its reconstruction, its caption and where it comes from."""
    draw = ImageDraw.Draw(sheet)
    column = left
    for number, picture in enumerate(tile.pictures):
        draw.rectangle([column - 1, top - 1, column + picture.width, top + picture.height], outline=LIGHT)
        sheet.paste(picture, (column, top))
        if number:
            quality = f"VAE, {tile.facts.psnr:.1f} dB" if math.isfinite(tile.facts.psnr) else "VAE, exact"
            draw.text((column, top + picture.height + 10), quality, GREY, small_font(SMALL))
        column += max(picture.width, NARROW) + PAIR_GAP
    top += tile.pictures[0].height + 8
    real = caption_shown(tile.facts)[1]
    font = font_for("".join(tile.caption), TEXT)
    for line in tile.caption:
        draw.text((left, top), line, INK if real else PALE, font)
        top += LINE
    top += 4
    for line in tile.details:
        draw.text((left, top), line, GREY, font_for(line, SMALL))
        top += SMALL_LINE


def draw_panel(tiles: Sequence[Tile], counts: dict, colours: dict) -> Image.Image:
    """The column on the right: the buckets of the whole training set, and counts of what is on the sheet."""
    panel = Image.new("RGB", (PANEL, 130 + 22 * min(len(counts), MOST_BARS + 1) + 200), "white")
    draw = ImageDraw.Draw(panel)
    draw.text((0, 0), "All images by size" if len(counts) > 1 else "Size", INK, small_font(HEADING))
    top, longest = 32, max(counts.values())
    for bucket, count in list(counts.items())[:MOST_BARS]:
        draw.text((0, top), f"{bucket[0]} x {bucket[1]}", INK, small_font(SMALL))
        end = 90 + max(2, round(108 * count / longest))
        draw.rectangle([90, top + 2, end, top + 13], colours[bucket])
        draw.text((end + 7, top), f"{count:,}", GREY, small_font(SMALL))
        top += 22
    if len(counts) > MOST_BARS:
        rest = list(counts.values())[MOST_BARS:]
        draw.text((0, top), f"{sum(rest):,} in {len(rest)} more", GREY, small_font(SMALL))
        top += 22
    top += 24
    draw.text((0, top), "On this sheet", INK, small_font(HEADING))
    top += 32
    for name, value in panel_rows([tile.facts for tile in tiles]):
        draw.text((0, top), name, GREY, small_font(SMALL))
        draw.text((90, top), value, INK, small_font(SMALL))
        top += 20
    note = panel_note(tiles)
    for line in wrap(note.split(), font_for(note, SMALL), PANEL, 8):
        top += SMALL_LINE
        draw.text((0, top), line, GREY, font_for(note, SMALL))
    return panel.crop((0, 0, PANEL, top + 20))


def panel_rows(facts: Sequence[SampleFacts]) -> list[tuple[str, str]]:
    """What is counted on a sheet: (name, value)."""
    total = len(facts)
    rows = [("samples", f"{total:,}"), ("images", f"{len({fact.name for fact in facts}):,} different")]
    for name, number in (
        ("flipped", sum(fact.flipped for fact in facts)),
        ("dropped", sum(fact.dropped for fact in facts)),
        ("enlarged", sum(fact.enlarged > 1.005 for fact in facts)),
    ):
        rows.append((name, f"{number:,}  ({number / total:.0%})"))
    rows.append(("cropped off", f"{np.mean([fact.lost for fact in facts]):.1%} on average"))
    qualities = [fact.psnr for fact in facts if fact.psnr is not None and math.isfinite(fact.psnr)]
    if qualities:
        rows.append(("VAE", f"{min(qualities):.1f} to {max(qualities):.1f} dB, mean {np.mean(qualities):.1f}"))
    return rows


def panel_note(tiles: Sequence[Tile]) -> str:
    """The small print."""
    note = "Sizes are height x width in px. A crop's place is counted in the resized, flipped image."
    if any(UNKNOWN in line for tile in tiles for line in (*tile.caption, *tile.details)):
        note += f" {UNKNOWN} is a character that this sheet has no letter for; the model gets the real one."
    return note


# ---------------------------------------------------------------------------------------------------------------------
# 6. The command
# ---------------------------------------------------------------------------------------------------------------------


def preview(args: argparse.Namespace, images: Sequence[CaptionedImage]) -> Image.Image:
    """The contact sheet of a run with these flags; images: those that it trains on."""
    from tqdm import tqdm

    cuts = input_utils.framing(args, images)
    samples = tqdm(training_samples(args, images, cuts), "drawing", args.preview_images, unit=" images", delay=1,
                   leave=False)  # fmt: skip
    tiles = [make_tile(*sample) for sample in samples]
    numbers = np.bincount(cuts.buckets, minlength=len(cuts.sizes)).tolist()
    counts = {size: number for size, number in zip(cuts.sizes, numbers, strict=True) if number}
    return draw_sheet(*header(args, len(images), len(counts)), tiles, args.train_batch_size, counts)


def header(args: argparse.Namespace, images: int, buckets: int) -> tuple[str, str]:
    """(title, line below it) of a sheet; buckets: how many are in use."""
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


def write(flag: str, path: str, save) -> None:
    """Call save(path); a UserError names the flag where the file can't be written."""
    try:
        save(path)
    except OSError as error:
        raise UserError(f"{flag} {path}: can't be written: {error.strerror or error}") from error


def main(argv: Sequence[str] | None = None) -> None:
    """The command: print the report, write it, draw the sheet."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads bring a busy CPU to a halt
    argv = sys.argv[1:] if argv is None else list(argv)
    with cli_utils.errors_for_people("--debug" in argv):
        args = parse_args(argv)
        scan, held_out = input_utils.find_images(args)
        report = input_utils.data_report(args, scan, held_out)
        print("\n".join(report_lines(report)))
        if args.report:
            write("--report", args.report, lambda path: input_utils.save_report(report, path))
        input_utils.check_strict(args, report)
        if args.preview:
            sheet = preview(args, scan.images)
            write("--preview", args.preview, sheet.save)
            print(f"\nThe first {args.preview_images} samples of training: {args.preview}")
