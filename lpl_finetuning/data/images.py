"""Images: from the bytes of a file to the pixels, coordinates and aspect-ratio buckets that training works on.

What this file holds, in order:

1. opening: 8-bit RGB, upright, whatever the file holds;
2. inspecting: everything about an image in one look, so that a damaged file is found before training starts;
3. preparing: an image resized, flipped and cropped to a size, together with the coordinates that SDXL is told;
4. aspect-ratio buckets: sizes of about the same area, and which of them an image goes to.

Importing this file imports no torch. Nothing here is global or random: a generator is an argument.

Shape suffixes: N images, H height, W width. Sizes are (height, width) and positions are (top, left), in pixels.
"""

import contextlib
import hashlib
import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from lpl_finetuning.errors import DataError

if TYPE_CHECKING:
    import torch


IMAGE_EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")

INTERPOLATIONS = {  # Pillow's, by diffusers' names: newer versions of Pillow know more
    "nearest": Image.Resampling.NEAREST,
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "hamming": Image.Resampling.HAMMING,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}

MAX_PIXELS = 178_956_970  # Pillow's own limit for an error
_MAX_RESIZED = 2**25  # px; a resized image of more than this (128 MiB) is made in the part that is kept only
_MARGIN = 4  # px; a little more than the support of the widest filter, Lanczos, where an image is enlarged
_SAME = 1e-9  # a difference of log aspect ratios that is rounding

# Pillow warns at half the size that it refuses. The limit is looked after here, and a warning names no file.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


# ---------------------------------------------------------------------------------------------------------------------
# 1. Opening
# ---------------------------------------------------------------------------------------------------------------------


def open_image(data: bytes, place: str) -> Image.Image:
    """Open an image as 8-bit RGB, upright.

    EXIF orientation is applied, transparency is composited on white, 16-bit greyscale is scaled (Pillow's own
    conversion clips it to white), CMYK is converted. Of an animation the first frame is taken.

    Args:
        data: the bytes of the file.
        place: a path, or "row 3 of …"; the message of an error begins with it.

    Raises:
        DataError: the file is empty, cut short, too large, or no image.
    """
    try:
        with _open_header(data) as image:
            ImageOps.exif_transpose(image, in_place=True)  # which also decodes it
            return _to_rgb(image)
    except Exception as error:  # damaged files make Pillow's decoders raise nearly anything
        raise DataError(f"{place}: {_why(error)}") from error


def _open_header(data: bytes) -> Image.Image:
    """The image with its header read and nothing decoded.

    Raises:
        DataError: there are no data, or too many pixels; the message lacks the place.
        Exception: nearly any other, from Pillow.
    """
    if not data:
        raise DataError("the file is empty (0 bytes). Replace or remove it.")
    try:
        image = Image.open(BytesIO(data))
    except Image.DecompressionBombError:  # its message lacks the sides
        _refuse_too_many_pixels(*_size_in_header(data))
        raise
    _refuse_too_many_pixels(*image.size)
    if image.format == "EPS":  # Pillow would start Ghostscript on a program that may come from anywhere
        raise ValueError("EPS is a drawing; save it as PNG")
    return image


def _refuse_too_many_pixels(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        found, limit = round(width * height / 1e6), round(MAX_PIXELS / 1e6)
        raise DataError(
            f"{width} x {height} px are {found} megapixels; at most {limit} are read. Make it smaller, or remove it."
        )


def _size_in_header(data: bytes) -> tuple[int, int]:
    """(width, height) from the first reader of Pillow's that accepts the file; (0, 0) where none does."""
    for factory, accept in list(Image.OPEN.values()):
        with contextlib.suppress(Exception):
            if accept is None or accept(data[:16]) is True:
                return factory(BytesIO(data), "").size
    return 0, 0


def _why(error: Exception) -> str:
    """The sentence that follows the place in a message."""
    if isinstance(error, DataError):
        return str(error)
    # Pillow's own message names the buffer in memory.
    unknown = isinstance(error, UnidentifiedImageError)
    reason = "not in an image format that Pillow knows" if unknown else str(error).rstrip(".") or type(error).__name__
    return f"can't be used as an image: {reason}. Replace or remove the file."


def _is_deep(image: Image.Image) -> bool:
    """Whether it is greyscale of more than 8 bits. Pillow reads colours of 16 bits as 8, rounding down."""
    return image.mode.startswith("I") or image.mode == "F"


def _to_rgb(image: Image.Image) -> Image.Image:
    if _is_deep(image):
        return Image.fromarray(_deep_to_8_bit(np.asarray(image), image.info.get("transparency"))).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _deep_to_8_bit(values: np.ndarray, transparency: int | None = None) -> np.ndarray:
    """Greyscale of more than 8 bits, (H, W), to uint8 with white staying white. Pillow's conversion clips at 255."""
    low, high = float(values.min()), float(values.max())
    # Integers are of 16 bits here, also where Pillow holds them in 32 (PGM); a true 32-bit image is out of range.
    white = 1.0 if values.dtype.kind == "f" else 65535.0
    if not 0.0 <= low <= high <= white:  # false for NaN too
        raise ValueError(f"its values go from {low:g} to {high:g}, not 0 to {white:g}; save it with 8 or 16 bits")
    pixels = np.round(values.astype(np.float64) * (255.0 / white)).astype(np.uint8)
    return pixels if transparency is None else np.where(values == transparency, np.uint8(255), pixels)


# ---------------------------------------------------------------------------------------------------------------------
# 2. Inspecting
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImageFacts:
    """What one look at an image file tells.

    `content` is the sha256 of the file's bytes, hex. `format` is Pillow's name ("JPEG", "PNG", …), "" where unknown.
    `size` is (height, width) of the image as `open_image` gives it; (0, 0) where that fails. `notes` are from

    - "animated": there are more frames (in a TIFF: pages) than the first, which is the one that is used;
    - "16-bit": reduced to 8 bits; greyscale, also of 32-bit floats, and colours alike;
    - "CMYK", "palette", "grayscale": converted to RGB;
    - "transparent": some pixels are, and lie on white then;
    - "rotated": turned or mirrored as its EXIF orientation says.

    `error` is why the image can't be used, as `open_image` says it, without the place; "" where it can.
    """

    content: str
    format: str
    size: tuple[int, int]
    notes: tuple[str, ...]
    error: str = ""


def inspect(data: bytes) -> ImageFacts:
    """Everything about an image in one look. It never raises for bad data.

    All of the image is decoded, so that a file that was cut short is found now and not in step 7000. JPEGs are
    decoded at an eighth of their size and without colour: that reads the file to its end all the same.
    """
    content, format_name, error = hashlib.sha256(data).hexdigest(), "", ""
    for quick in (True, False):  # a quick look that fails is no verdict yet: `open_image` looks thoroughly
        try:
            with _open_header(data) as image:
                format_name = image.format or ""
                size, notes = _examine(image, quick)
                return ImageFacts(content, format_name, size, notes)
        except Exception as caught:  # see open_image
            error = _why(caught)
    return ImageFacts(content, format_name, (0, 0), (), error)


def _examine(image: Image.Image, quick: bool) -> tuple[tuple[int, int], tuple[str, ...]]:
    """(size, notes) of an image whose header was read. Raises whatever opening it would raise."""
    mode, rawmode = image.mode, _rawmode(image)
    orientation = image.getexif().get(ExifTags.Base.Orientation, 1)  # before decoding, which clears that of a TIFF
    reduced = quick and image.format in ("JPEG", "MPO")
    size = image.size[::-1] if orientation not in (5, 6, 7, 8) else image.size
    if reduced:
        image.draft("L", (1, 1))
    image.load()
    deep = _is_deep(image)
    # The conversion itself is tried on one pixel; that of deep greyscale depends on all values.
    _to_rgb(image if deep else image.crop((0, 0, 1, 1)))
    transparent = _is_transparent(image)
    ImageOps.exif_transpose(image, in_place=True)
    facts = {
        "animated": _is_animated(image),  # last: it moves on in the file
        "16-bit": deep or (";16" in rawmode and not rawmode.startswith("BGR")),  # BGR;16 is 5 + 6 + 5 bits
        "CMYK": mode == "CMYK",
        "palette": mode in ("P", "PA"),
        "transparent": transparent,
        "rotated": orientation in range(2, 9),
        "grayscale": deep or mode in ("1", "L", "LA", "La"),
    }
    return size if reduced else image.size[::-1], tuple(name for name, holds in facts.items() if holds)


def _rawmode(image: Image.Image) -> str:
    """How the file stores a pixel, in Pillow's words; "" where that is unknown or decoding has begun."""
    arguments = image.tile[0].args if getattr(image, "tile", None) else ""
    return str(arguments[0] if isinstance(arguments, tuple) and arguments else arguments)


def _is_transparent(image: Image.Image) -> bool:
    """Whether some pixel is, not only whether some could be."""
    if not image.has_transparency_data or _is_deep(image):
        transparency = image.info.get("transparency")
        return transparency is not None and bool((np.asarray(image) == transparency).any())
    if image.mode not in ("LA", "RGBA"):
        image = image.convert("RGBA")
    return image.getchannel("A").getextrema()[0] < 255


def _is_animated(image: Image.Image) -> bool:
    if image.format == "MPO":  # a photograph; the other pictures are previews and depth maps
        return False
    with contextlib.suppress(Exception):  # damage behind the first frame is no concern
        return bool(getattr(image, "is_animated", False))
    return False


# ---------------------------------------------------------------------------------------------------------------------
# 3. Preparing
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Crop:
    """What SDXL is told about a crop. Sizes are (height, width), the position is (top, left), all in pixels.

    `original_size` is that of the image as opened, before resizing; `crop_top_left` is counted in the resized (and
    mirrored) image.
    """

    original_size: tuple[int, int]
    crop_top_left: tuple[int, int]
    target_size: tuple[int, int]

    @property
    def time_ids(self) -> tuple[int, int, int, int, int, int]:
        """SDXL's micro-conditioning: original height, width, crop top, left, target height, width."""
        return (*self.original_size, *self.crop_top_left, *self.target_size)


def prepare_image(
    image: Image.Image,
    size: tuple[int, int],
    center_crop: bool,
    flip: bool,
    interpolation: str = "lanczos",
    rng: np.random.Generator | None = None,
) -> tuple[np.ndarray, Crop]:
    """Resize an image so that it just covers the target (`resized_size`), flip, then crop.

    Args:
        image: RGB, upright (`open_image`).
        size: of the target.
        center_crop: crop the centre; otherwise a place drawn from `rng`.
        flip: mirror left to right, before the crop: its coordinates are those of the mirrored image, as in diffusers.
        interpolation: a name from `INTERPOLATIONS`.
        rng: needed for a random crop only; nothing is drawn where the crop is forced.

    Returns:
        pixels uint8 (H, W, 3), and the crop.

    Raises:
        DataError: unknown interpolation.
        ValueError: a random crop without a generator.
    """
    if interpolation not in INTERPOLATIONS:
        raise DataError(
            f"--image_interpolation_mode is {interpolation!r}; it must be one of {', '.join(sorted(INTERPOLATIONS))}."
        )
    original = image.height, image.width
    resized = resized_size(original, size)
    spare = resized[0] - size[0], resized[1] - size[1]
    if center_crop:
        top, left = round(spare[0] / 2), round(spare[1] / 2)
    elif crop_is_forced(original, size, center_crop):
        top, left = 0, 0
    elif rng is None:
        raise ValueError("A random crop needs a generator.")
    else:
        top, left = int(rng.integers(spare[0] + 1)), int(rng.integers(spare[1] + 1))
    # Mirroring the crop at the mirrored place is mirroring before the crop, for less work.
    place = top, spare[1] - left if flip else left
    cropped = _resized_crop(image, resized, place, size, INTERPOLATIONS[interpolation])
    pixels = np.asarray(ImageOps.mirror(cropped) if flip else cropped)
    return pixels, Crop(original, (top, left), (size[0], size[1]))


def resized_size(original: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of an image once it just covers the target: one side is the target's, the other not shorter.

    The other side is rounded down, as torchvision does it where it resizes the shorter side to a resolution.
    """
    if original[1] * size[0] >= original[0] * size[1]:  # wider than the target, or of its aspect ratio
        return size[0], size[0] * original[1] // original[0]
    return size[1] * original[0] // original[1], size[1]


def crop_is_forced(original: tuple[int, int], size: tuple[int, int], center_crop: bool) -> bool:
    """Whether an image can be cropped in one way only: centred, or with nothing to spare once it is resized.

    So 1000 x 1001 pixels can be cropped to 64 x 64 in one way only, since they are resized to that.
    """
    return center_crop or resized_size(original, size) == tuple(size)


def lost_share(originals: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The share of each image that a crop throws away, 0 <= share < 1, float64 (N,); 0 where nothing is to spare.

    Args:
        originals: sizes of the images, integers (N, 2).
        size: of the target.

    Raises:
        ValueError: a size below 1 x 1.
    """
    heights, widths = _checked_sizes(originals)
    # As `resized_size`: one of the sides is the target's, since the other would leave it uncovered there.
    resized_heights = np.maximum(size[1] * heights // widths, size[0])
    resized_widths = np.maximum(size[0] * widths // heights, size[1])
    return 1.0 - size[0] / resized_heights * (size[1] / resized_widths)


def to_pixel_values(pixels: np.ndarray) -> "torch.Tensor":
    """uint8 (H, W, 3) to float32 (3, H, W) in [-1, 1]."""
    import torch

    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1), dtype=np.float32)) / 127.5 - 1.0


def from_pixel_values(pixel_values: "torch.Tensor | np.ndarray") -> np.ndarray:
    """Float (3, H, W) in [-1, 1] to uint8 (H, W, 3): rounded, and clipped where a decoder went beyond.

    The inverse of `to_pixel_values`; of any dtype and on any device. NaN becomes black.
    """
    if not isinstance(pixel_values, np.ndarray):
        pixel_values = pixel_values.detach().float().cpu().numpy()  # numpy knows no bfloat16
    values = np.nan_to_num(pixel_values.astype(np.float32), nan=-1.0).clip(-1.0, 1.0)
    return np.ascontiguousarray(np.round((values + 1.0) * 127.5).astype(np.uint8).transpose(1, 2, 0))


def _resized_crop(
    image: Image.Image,
    resized: tuple[int, int],
    place: tuple[int, int],
    size: tuple[int, int],
    resample: Image.Resampling,
) -> Image.Image:
    """What resizing all of an image and cropping `size` at `place` gives."""
    (top, left), (height, width) = place, size
    if math.prod(resized) > max(_MAX_RESIZED, math.prod(image.size), math.prod(size)):
        return _resized_part(image, resized, place, size, resample)
    if resized != (image.height, image.width):
        image = image.resize(resized[::-1], resample)
    return image.crop((left, top, left + width, top + height))


def _resized_part(
    image: Image.Image,
    resized: tuple[int, int],
    place: tuple[int, int],
    size: tuple[int, int],
    resample: Image.Resampling,
) -> Image.Image:
    """As `_resized_crop`, of an image that is enlarged, in memory that follows from the crop alone.

    A picture of 10000 x 1 pixels would be resized to 10 gigapixels. Pillow can resize a part, but neither passes nor
    rounding are the same as for the whole, so ordinary images are not prepared like this: their pixels would change.
    """
    ranges, boxes = [], []
    for side, whole, first, length in zip((image.height, image.width), resized, place, size, strict=True):
        start, end = first * side / whole, min((first + length) * side / whole, side)
        offset = max(0, math.floor(start) - _MARGIN)
        ranges.append((offset, min(side, math.ceil(end) + _MARGIN)))
        boxes.append((start - offset, end - offset))  # small numbers: Pillow takes them as 32-bit floats
    (y0, y1), (x0, x1) = ranges
    (top, bottom), (left, right) = boxes
    return image.crop((x0, y0, x1, y1)).resize(size[::-1], resample, box=(left, top, right, bottom))


def _checked_sizes(sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Heights and widths, int64 (N,) each, of integers (N, 2)."""
    sizes = np.asarray(sizes, dtype=np.int64).reshape(-1, 2)
    if (sizes < 1).any():
        raise ValueError("An image has at least 1 x 1 pixels; leave out the images that can't be used.")
    return sizes[:, 0], sizes[:, 1]


# ---------------------------------------------------------------------------------------------------------------------
# 4. Aspect-ratio buckets
# ---------------------------------------------------------------------------------------------------------------------


def parse_buckets(text: str, unit: int = 8) -> tuple[tuple[int, int], ...]:
    """The sizes in "832,1216; 1024,1024", (height, width), in the order given.

    Args:
        text: `--aspect_ratio_buckets`.
        unit: what every side must be a multiple of, in pixels.

    Raises:
        DataError: another form, a side of 0 or no multiple of the unit, or a size given twice.
    """

    def refusal(found: str) -> DataError:
        return DataError(
            f'--aspect_ratio_buckets is {text!r}: {found}. The form is "h,w;h,w": heights and widths in pixels, '
            f"multiples of {unit}, each size once."
        )

    buckets: list[tuple[int, int]] = []
    for part in text.split(";"):
        match = re.fullmatch(r"\s*([0-9]{1,6})\s*,\s*([0-9]{1,6})\s*", part)
        if match is None:
            raise refusal(f"{part.strip()!r} is no size")
        bucket = int(match[1]), int(match[2])
        if min(bucket) < 1 or bucket[0] % unit or bucket[1] % unit:
            raise refusal(f"the sides of {part.strip()!r} are no positive multiples of {unit}")
        if bucket in buckets:
            raise refusal(f"{part.strip()!r} is there twice")
        buckets.append(bucket)
    return tuple(buckets)


def auto_buckets(resolution: int) -> tuple[tuple[int, int], ...]:
    """Sizes of about one area, from 1:4 to 4:1, sorted by height / width; with each (h, w) there is (w, h).

    The square of the resolution is among them. For every shorter side that is a multiple of the unit, the longer side
    is the largest multiple that makes the area no larger than the square's, so that no bucket needs more memory. The
    unit is 64 pixels; under a resolution of 512 it is an eighth of the resolution, rounded down to a multiple of 16,
    the pixels of one of SD3's tokens, and at least that.

    At 1024 these are 17 of the 40 sizes that SDXL was trained with (arXiv 2307.01952, appendix I). The table there has
    up to four longer sides for one shorter side, down to 90% of the area, for the aspect ratios in between. Here each
    shorter side has one, the longest, so that a small data set is spread over fewer buckets.

    Raises:
        DataError: the resolution is no positive multiple of 8.
    """
    if resolution < 8 or resolution % 8:
        raise DataError(f"--resolution is {resolution}; for aspect-ratio buckets it must be a multiple of 8.")
    unit = 64 if resolution >= 512 else max(16, resolution // 128 * 16)
    buckets = {(resolution, resolution)}
    for short in range(unit, resolution, unit):
        long = resolution**2 // (short * unit) * unit
        if short < long <= 4 * short:
            buckets |= {(short, long), (long, short)}
    return tuple(sorted(buckets, key=lambda bucket: bucket[0] / bucket[1]))


def assign_buckets(sizes: np.ndarray, buckets: Sequence[tuple[int, int]]) -> np.ndarray:
    """The bucket of each image, int16 (N,): the one whose aspect ratio is nearest, as a ratio (by its logarithm).

    Of several the one whose area is nearest to the image's is taken, and of those the first.

    Args:
        sizes: of the images, integers (N, 2).
        buckets: sizes to choose from.

    Raises:
        ValueError: no buckets, or a size below 1 x 1.
    """
    if not buckets:
        raise ValueError("There must be at least one bucket.")
    heights, widths = _checked_sizes(sizes)
    # A difference of logarithms: unlike the logarithm of a quotient, it only changes its sign when turned.
    ratios, areas = np.log(heights) - np.log(widths), heights * widths
    nearest = np.zeros(len(ratios), dtype=np.int16)
    distances, excesses = np.full(len(ratios), np.inf), np.zeros(len(ratios), dtype=np.int64)
    for index, (height, width) in enumerate(buckets):  # one after the other, so that memory goes with N alone
        distance = np.abs(ratios - (np.log(height) - np.log(width)))
        excess = np.abs(areas - height * width)
        better = (distance < distances - _SAME) | ((distance <= distances + _SAME) & (excess < excesses))
        nearest[better], distances[better], excesses[better] = index, distance[better], excess[better]
    return nearest
