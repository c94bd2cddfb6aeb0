"""A contact sheet: pictures with captions and crops, in batches, beside counts of all of them.

Sections:

1. facts about a sample, and the texts that describe them;
2. text in letters that the fonts have, in lines that fit;
3. layout: the place of each picture;
4. drawing: header, pictures and panel.

Sizes of images are (height, width) and positions (top, left), as in `data.samples`. Places and sizes on the sheet are
Pillow's, (left, top) and (width, height). Importing this file imports no torch.
"""

import bisect
import functools
import math
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lpl_finetuning.data.images import Crop, lost_share, resized_size
from lpl_finetuning.errors import shown

# Lengths on the sheet, in px
WIDTH, MARGIN, PANEL = 1600, 32, 250
PICTURE = 224  # largest height of a picture
NARROW = 128  # smallest width of the text below a picture
TILE_GAP, BLOCK_GAP, SHELF_GAP, ROW_GAP, PAIR_GAP = 16, 28, 28, 16, 4
BAND = 32  # from the top of a block to its pictures
ROOM = WIDTH - 2 * MARGIN - PANEL - 2 * BLOCK_GAP  # width of the part with the pictures
WIDE = (ROOM - 3 * TILE_GAP) // 4  # largest width of a picture
LINE, SMALL_LINE = 18, 15  # heights of the lines of captions and details

CAPTION_LINES, DETAIL_LINES = 3, 5
TITLE, HEADING, TEXT, SMALL = 26, 17, 14, 12  # font sizes
INK, GREY, PALE, LIGHT = "#1f2430", "#6b7280", "#a0a5b0", "#d7dae0"
COLOURS = ("#2563eb", "#c2410c", "#15803d", "#7c3aed", "#be185d", "#0e7490", "#a16207", "#4b5563")  # of buckets
MOST_BARS = 14
UNKNOWN = "□"


# ---------------------------------------------------------------------------------------------------------------------
# 1. Facts
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SampleFacts:
    """What the sheet shows about a sample.

    Attributes:
        number: number of the sample in the stream of samples.
        epoch: epoch of the image, from 0.
        name: name of the image.
        caption: drawn caption, before it is dropped or not.
        dropped: whether the caption is dropped.
        flipped: whether the image is mirrored.
        crop: how the image is cut.
        psnr: quality of the autoencoder's reconstruction in dB; None without an autoencoder.
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
        """Factor by which the image is resized; above 1 for an image that is smaller than the target."""
        original, target = self.crop.original_size, self.crop.target_size
        return max(new / old for new, old in zip(resized_size(original, target), original, strict=True))

    @property
    def lost(self) -> float:
        """The share of the image that the crop removes."""
        return float(lost_share(np.array([self.crop.original_size]), self.crop.target_size)[0])


def caption_shown(facts: SampleFacts) -> tuple[str, bool]:
    """(text below a picture, whether the text is the caption): a word replaces a dropped or empty caption."""
    if facts.dropped:
        return "(dropped)", False
    return (facts.caption, True) if facts.caption.strip() else ("(empty)", False)


def crop_shown(facts: SampleFacts) -> list[str]:
    """How the image was cut, in words: "from 1080 x 1920", "crop top 0 left 12", "3% lost", "flipped"."""
    crop = facts.crop
    parts = ["from {} x {}".format(*crop.original_size)]
    if facts.enlarged > 1.005:
        parts.append(f"enlarged {facts.enlarged:.2f}x")
    if crop.target_size == resized_size(crop.original_size, crop.target_size):
        parts.append("not cropped")
    else:
        parts += ["crop top {} left {}".format(*crop.crop_top_left), f"{facts.lost:.0%} lost"]
    return [*parts, "flipped"] if facts.flipped else parts


# ---------------------------------------------------------------------------------------------------------------------
# 2. Text
# ---------------------------------------------------------------------------------------------------------------------


@functools.cache
def small_font(size: int) -> ImageFont.FreeTypeFont:
    """Pillow's default font, which has little more than ASCII."""
    return ImageFont.load_default(size)


@functools.cache
def large_font(size: int) -> ImageFont.FreeTypeFont:
    """Matplotlib's font: Latin with accents, Greek, Cyrillic, Hebrew and Arabic, but no Chinese."""
    import matplotlib

    path = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    return ImageFont.truetype(str(path), size - 1)  # the letters are larger than those of Pillow's font


@functools.cache
def _has(font, character):
    """Whether a font has a character. A font draws a missing character like U+10FFFF, which no font has."""
    glyphs = [font.getmask(letter) for letter in (character, "\U0010ffff")]
    return character == " " or (glyphs[0].size, bytes(glyphs[0])) != (glyphs[1].size, bytes(glyphs[1]))


def legible(text: str) -> str:
    """The text in one line, with `UNKNOWN` for each character that the fonts lack, such as Chinese characters."""
    letters = []
    for letter in " ".join(unicodedata.normalize("NFC", text).split()):
        kind = unicodedata.category(letter)
        if kind[0] != "C" and (_has(small_font(TEXT), letter) or _has(large_font(TEXT), letter)):
            letters.append(letter)
        elif kind not in ("Cf", "Mn", "Me"):  # these kinds only change neighbouring characters
            letters.append(UNKNOWN)
    return "".join(letters)


def font_for(text: str, size: int) -> ImageFont.FreeTypeFont:
    """The font for a legible text: Pillow's font if it has all letters, else matplotlib's."""
    font = small_font(size)
    return font if all(_has(small_font(TEXT), letter) for letter in text) else large_font(size)


def wrap(words: Iterable[str], font: ImageFont.FreeTypeFont, width: float, most: int) -> list[str]:
    """Legible words in at most `most` lines of `width` px. Long words are broken; an ellipsis marks what is cut."""
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
    """A name in one line of at most `width` px. A long name keeps its end, which distinguishes files."""
    if font.getlength(text) <= width:
        return text
    while len(text) > 1 and font.getlength(f"…{text}") > width:
        text = text[1:]
    return f"…{text}"


# ---------------------------------------------------------------------------------------------------------------------
# 3. Layout
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tile:
    """One sample on the sheet: the picture, with an autoencoder also the reconstruction, and the lines below."""

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
    """The size on the sheet of a picture of a size; both are (height, width).

    A large picture shrinks to fit. A small picture grows by a whole factor, so that every pixel can be seen.
    """
    factor = min(PICTURE / size[0], WIDE / size[1])
    factor = math.floor(factor) if factor >= 1 else factor
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


def make_tile(facts: SampleFacts, pixels: np.ndarray, decoded: np.ndarray | None) -> Tile:
    """The tile of a sample; it holds the pictures in the size on the sheet.

    Args:
        facts: about the sample.
        pixels: the cut image, uint8 (H, W, 3).
        decoded: the autoencoder's reconstruction, uint8 (H, W, 3); None without an autoencoder.
    """
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
    """Tiles of a batch side by side. A wide batch has several blocks, of which only the first has a heading."""

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
        """Height of the heading and the rule below the heading."""
        return BAND if self.heading else 0


def batch_blocks(tiles: Sequence[Tile], batch_size: int, room: int = ROOM) -> Iterator[Block]:
    """Blocks of at most `room` px: one per batch, or several with about the same number of tiles."""
    several_epochs = any(tile.facts.epoch for tile in tiles)
    for batch, group in groupby(tiles, key=lambda tile: tile.facts.number // batch_size):
        group = list(group)
        heading = "batch {}: {} x {}".format(batch + 1, *group[0].facts.crop.target_size)
        if several_epochs:
            epochs = sorted({tile.facts.epoch + 1 for tile in group})
            heading += f", epoch {epochs[0]}" if len(epochs) == 1 else f", epochs {epochs[0]} to {epochs[-1]}"
        fit = max(1, (room + TILE_GAP) // (group[0].size[0] + TILE_GAP))  # the tiles of a batch have the same width
        fit = math.ceil(len(group) / math.ceil(len(group) / fit))
        for first in range(0, len(group), fit):
            yield Block("" if first else heading, group[first : first + fit])


def arrange(blocks: Sequence[Block], room: int = ROOM) -> tuple[list[tuple[int, int, Block]], tuple[int, int]]:
    """([(left, top, block)], (width, height) of all blocks): blocks with a heading share rows where they fit."""
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
# 4. Drawing
# ---------------------------------------------------------------------------------------------------------------------


def draw_sheet(title: str, subtitle: str, tiles: Sequence[Tile], batch_size: int, counts: dict) -> Image.Image:
    """The sheet.

    Args:
        title: first line of the header.
        subtitle: second line of the header.
        tiles: samples, in the order of their numbers.
        batch_size: samples of a batch.
        counts: {bucket: number of images} of the buckets in use.
    """
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
    """Draw the heading of a batch, a rule in the colour of the bucket, and the tiles."""
    draw = ImageDraw.Draw(sheet)
    if block.heading:
        draw.text((left, top), block.heading, INK, small_font(HEADING))
        draw.line([left - 1, top + BAND - 9, left + block.size[0], top + BAND - 9], colour, 2)
    for tile in block.tiles:
        draw_tile(sheet, left, top + block.band, tile)
        left += tile.size[0] + TILE_GAP


def draw_tile(sheet: Image.Image, left: int, top: int, tile: Tile) -> None:
    """Draw a picture, the reconstruction, the caption and the details."""
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
    """The column on the right: the buckets of all images, and counts of the samples on the sheet."""
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
    """Counts of the samples on the sheet: (name, value)."""
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
    """Explanations at the end of the panel."""
    note = "Sizes are height x width in px. A crop's place is counted in the resized, flipped image."
    if any(UNKNOWN in line for tile in tiles for line in (*tile.caption, *tile.details)):
        note += f" {UNKNOWN} is a character that this sheet has no letter for; the model gets the real one."
    return note
