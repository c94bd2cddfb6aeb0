"""Images: from the bytes of a file to the pixels, coordinates and aspect-ratio buckets of training.

Sections:

1. opening: every image becomes upright 8-bit RGB in sRGB;
2. inspecting: all facts about an image in one pass, which finds damaged files before training starts;
3. preparing: resize, flip and crop, with the coordinates for SDXL's micro-conditioning;
4. aspect-ratio buckets: target sizes of about the same area, and the bucket of each image.

Importing this file imports no torch. There is no global state; random functions take a generator.

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
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from lpl_finetuning.data import png_files
from lpl_finetuning.data.colours import AS_THEY_ARE, Colours, colours_of, to_srgb
from lpl_finetuning.data.formats import is_installed, plugin_of, register, why_unknown
from lpl_finetuning.errors import DataError

if TYPE_CHECKING:
    import torch


INTERPOLATIONS = {  # diffusers' names; newer versions of Pillow have more
    "nearest": Image.Resampling.NEAREST,
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "hamming": Image.Resampling.HAMMING,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}

MAX_PIXELS = 178_956_970  # Pillow's own limit for an error
_MAX_RESIZED = 2**25  # px (128 MiB); of a larger resized image only the cropped part is computed
_MARGIN = 4  # px; more than the support of the widest filter, Lanczos, of an enlarged image
_SAME = 1e-9  # smaller differences of log aspect ratios are rounding errors

# Pillow warns without a file name: at half of the size that it refuses, which this file checks itself, and of damaged
# metadata, on which the report remarks.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings(
    "ignore", "(Corrupt EXIF data|Tag offset too large|Tag data larger than file|Metadata Warning)"
)
warnings.filterwarnings("ignore", "image file could not be identified because")  # the error says it


# ---------------------------------------------------------------------------------------------------------------------
# 1. Opening
# ---------------------------------------------------------------------------------------------------------------------


class _Opened(NamedTuple):
    """An image with the header read.

    Attributes:
        image: nothing is decoded yet, except for a 16-bit PNG with a transparent colour.
        rawmode: Pillow's name for the storage of a pixel in the file; "" where unknown.
        colours: how the pixels become sRGB.
        white: the value of white in greyscale of more than 8 bits.
        inverted: whether white is stored as 0, in greyscale of more than 8 bits.
        revision: see `ImageFacts`.
        faults: notes of `ImageFacts` on what was left out to read the pixels.
    """

    image: Image.Image
    rawmode: str
    colours: Colours
    white: float
    inverted: bool
    revision: int
    faults: tuple[str, ...] = ()


def open_image(data: bytes, place: str) -> Image.Image:
    """An image as upright 8-bit sRGB.

    The colours are converted from the embedded profile first (`data.colours`). EXIF orientation is applied,
    transparency is composited on white, CMYK is converted. Greyscale of more than 8 bits is scaled; Pillow's own
    conversion would clip it to white. Of an animation the first frame is used.

    Args:
        data: the bytes of the file.
        place: a path, or "row 3 of …"; error messages begin with it.

    Raises:
        DataError: the file is empty, cut short, too large, or no image.
    """
    try:
        opened = _opened(data)
        with opened.image as image:
            image.load()
            return _to_rgb(_upright(image, _orientation(image)[0]), opened)
    except DataError as error:
        raise DataError(f"{place}: {error.problem}", error.advice) from error
    except Exception as error:  # Pillow's decoders raise nearly any type on damaged files
        raise DataError(
            f"{place}: can't be used as an image: {_reason(error)}.", "Replace or remove the file."
        ) from error


def _opened(data: bytes) -> _Opened:
    """The image with the header read.

    Raises:
        DataError: there are no data, or too many pixels; the message lacks the place.
        Exception: nearly any other type, from Pillow.
    """
    if not data:
        raise DataError("the file is empty (0 bytes).", "Replace or remove it.")
    image, data, faults = _with_header(data)
    _refuse_too_many_pixels(*image.size)
    if image.format == "EPS":  # Pillow would run Ghostscript on a program from an unknown source
        raise ValueError("EPS is a drawing; save it as PNG")
    tags = getattr(image, "tag_v2", {}) if image.format == "TIFF" else {}
    _refuse_wide_integers(image, tags)
    colours, rawmode = colours_of(image, data), _rawmode(image)
    white = 1.0 if image.mode == "F" else 4095.0 if tags.get(_BITS) == (12,) else 65535.0
    inverted = _is_deep(image) and tags.get(_PHOTOMETRIC) == 0
    image, masked_anew = _with_true_transparency(image, data) if image.format == "PNG" else (image, False)
    read_anew = masked_anew or inverted or white == 4095.0
    return _Opened(image, rawmode, colours, white, inverted, int(bool(colours.profile) or read_anew), faults)


def _with_header(data: bytes) -> tuple[Image.Image, bytes, tuple[str, ...]]:
    """(image, the bytes that it was read from, faults): bytes without what Pillow refuses beside sound pixels."""
    if data.startswith(png_files.SIGNATURE):
        data, faults = png_files.mended(data)
        return _png_with_header(data), data, faults
    try:
        return _with_reader(data), data, ()
    except DataError:
        raise
    except Exception as error:  # damaged EXIF of an AVIF raises nearly any type
        bare = _without_avif_exif(data)
        if bare != data:
            with contextlib.suppress(Exception):
                return _with_reader(bare), bare, ("broken EXIF",)
        if not isinstance(error, UnidentifiedImageError):
            raise
        if data[:4] in (b"II*\0", b"MM\0*"):
            raise ValueError("a damaged TIFF, or one of a kind that Pillow can't read; save it as PNG") from error
        raise ValueError(why_unknown(data)) from error  # Pillow's message names the buffer in memory


def _with_reader(data: bytes) -> Image.Image:
    """The image with the header read, by the plugin that it needs or by one of Pillow's own readers."""
    plugin = plugin_of(data)
    try:
        if plugin is not None and is_installed(plugin):
            register(plugin)
        return Image.open(BytesIO(data))
    except Image.DecompressionBombError:  # Pillow's message lacks the sides
        _refuse_too_many_pixels(*_size_in_header(data))
        raise
    except Exception as error:  # a plugin may raise any type
        if plugin is None:
            raise
        raise ValueError(why_unknown(data)) from error


def _png_with_header(data: bytes) -> Image.Image:
    """A PNG with the header read, also where Pillow refuses the colour profile: the pixels may be sound."""
    try:
        return _with_reader(data)
    except (UnidentifiedImageError, ValueError) as error:
        if isinstance(error, DataError) or b"iCCP" not in png_files.contents_before_pixels(data):
            raise
        image = _with_reader(png_files.without_profile(data))
        image.info["icc_profile"] = png_files.large_profile(data)
        return image


_EXIF_IN_BOXES = re.compile(rb"\0\0(II\*\0|MM\0\*)")  # behind the offset, or the mark, at the start of EXIF in a box
_NO_EXIF = b"II*\0\x08\0\0\0\0\0\0\0\0\0"  # EXIF without entries


def _without_avif_exif(data: bytes) -> bytes:
    """An AVIF with empty EXIF of the same length: Pillow refuses the image for the sake of damaged EXIF."""
    match = _EXIF_IN_BOXES.search(data) if data[4:8] == b"ftyp" and plugin_of(data) is None else None
    if match is None or match.start(1) + len(_NO_EXIF) > len(data):
        return data
    return data[: match.start(1)] + _NO_EXIF + data[match.start(1) + len(_NO_EXIF) :]


def _refuse_too_many_pixels(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        found, limit = round(width * height / 1e6), round(MAX_PIXELS / 1e6)
        raise DataError(
            f"{width} x {height} px are {found} megapixels; at most {limit} are read.",
            "Make it smaller, or remove it.",
        )


def _size_in_header(data: bytes) -> tuple[int, int]:
    """(width, height) from the first of Pillow's readers that accepts the file; (0, 0) where no reader does."""
    for factory, accept in list(Image.OPEN.values()):
        with contextlib.suppress(Exception):
            if accept is None or accept(data[:16]) is True:
                return factory(BytesIO(data), "").size
    return 0, 0


def _reason(error: Exception) -> str:
    """Why an image can't be used, without a full stop, from the exception that opening the image raised."""
    if isinstance(error, DataError):
        return error.problem.rstrip(".")
    if isinstance(error, UnidentifiedImageError):  # Pillow's message names the buffer in memory
        return "damaged, or of a kind that Pillow can't read"
    return str(error).rstrip(".") or type(error).__name__


def _is_deep(image: Image.Image) -> bool:
    """Whether an image is greyscale of more than 8 bits. Pillow reads colours of 16 bits as 8 bits, rounded down."""
    return image.mode.startswith("I") or image.mode == "F"


_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339  # tags of TIFF


def _refuse_wide_integers(image: Image.Image, tags: dict) -> None:
    """Raise a ValueError for integers whose white is not known."""
    signed = 2 in tags.get(_SAMPLE_FORMAT, ())
    # Pillow holds a PGM of 16 bits in 32, scaled to 65535. Other files have true 32-bit values.
    if signed or (image.mode == "I" and image.format != "PPM"):
        kind = "signed" if signed else "32-bit"
        raise ValueError(f"its values are {kind} integers, which have no agreed white; save it with 8 or 16 bits")


def _with_true_transparency(image: Image.Image, data: bytes) -> tuple[Image.Image, bool]:
    """(a PNG whose transparent colour is right, whether Pillow has that colour wrong).

    The file gives the colour in its own bits. Pillow compares it with values that it has scaled to 8 bits.
    """
    color, rawmode = image.info.get("transparency"), _rawmode(image)
    if rawmode == "RGB;16B" and isinstance(color, tuple):
        return _with_mask(image, data, color), True
    if rawmode in ("L;2", "L;4") and isinstance(color, int):
        largest = 3 if rawmode == "L;2" else 15
        image.info["transparency"] = (color & largest) * (255 // largest)
    elif rawmode in ("L", "RGB") and color is not None:  # only the low bits count
        image.info["transparency"] = tuple(c & 255 for c in color) if isinstance(color, tuple) else color & 255
    return image, image.info.get("transparency") != color


def _with_mask(image: Image.Image, data: bytes, color: tuple[int, int, int]) -> Image.Image:
    """A 16-bit colour PNG as RGBA, transparent where all 16 bits of each channel are those of the colour."""
    low = Image.open(BytesIO(data))
    low.tile = [tile._replace(args="RGB;16L") for tile in low.tile]  # the second byte of each value
    values = np.asarray(image).astype(np.uint16) << 8 | np.asarray(low)
    mask = (values == np.array(color)).all(axis=-1)
    image.info.pop("transparency")
    masked = image.convert("RGBA")
    masked.putalpha(Image.fromarray(np.where(mask, 0, 255).astype(np.uint8)))
    masked.format = image.format
    return masked


def _to_rgb(image: Image.Image, opened: _Opened, colours: Colours | None = None) -> Image.Image:
    """A decoded image as 8-bit sRGB. colours: instead of those of the file."""
    colours = opened.colours if colours is None else colours
    if _is_deep(image):
        return _deep_to_rgb(np.asarray(image), image.info.get("transparency"), opened, colours)
    image = _not_premultiplied(image)
    profile, alpha = colours.profile, None
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if not profile:
            return _on_white(image)
        alpha = image.getchannel("A")
    if not profile:
        return image.convert("RGB")
    if colours.grey:
        image = image.getchannel("R") if alpha else image.convert("L")
    elif image.mode != "CMYK":
        image = image.convert("RGB")
    image = to_srgb(image, profile)
    if alpha:
        image.putalpha(alpha)
        return _on_white(image)
    return image


def _not_premultiplied(image: Image.Image) -> Image.Image:
    """The image, with values that are not multiplied by alpha; Pillow converts such modes in no other way."""
    return image.convert(image.mode.upper()) if image.mode in ("La", "RGBa") else image


def _on_white(image: Image.Image) -> Image.Image:
    """An RGBA image composited on white, as RGB."""
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _deep_to_rgb(values: np.ndarray, transparency: int | None, opened: _Opened, colours: Colours) -> Image.Image:
    """Greyscale of more than 8 bits, (H, W), as 8-bit sRGB; white stays white. Pillow's conversion would clip at 255.

    A grey profile is applied to 16 bits, a profile for RGB to 8 bits.
    """
    low, high, white = float(values.min()), float(values.max()), opened.white
    if not 0.0 <= low <= high <= white:  # also refuses NaN
        raise ValueError(f"its values go from {low:g} to {high:g}, not 0 to {white:g}; save it with 8 or 16 bits")
    shares = values.astype(np.float64)
    shares = white - shares if opened.inverted else shares
    if colours.grey:
        deep = np.round(shares * (65535.0 / white)).astype(np.uint16)
        image = to_srgb(Image.fromarray(deep), colours.profile)
    else:
        image = Image.fromarray(np.round(shares * (255.0 / white)).astype(np.uint8)).convert("RGB")
        image = to_srgb(image, colours.profile) if colours.profile else image
    if transparency is not None:
        image.paste("white", mask=Image.fromarray(values == transparency))
    return image


# ---------------------------------------------------------------------------------------------------------------------
# 2. Inspecting
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImageFacts:
    """Facts about one image file.

    Attributes:
        content: sha256 of the file's bytes, hex.
        format: Pillow's name ("JPEG", "PNG", …); "" where unknown.
        size: (height, width) of the image that `open_image` gives; (0, 0) where `open_image` fails.
        notes: any of

            - "animated": there are frames (in a TIFF: pages) after the first frame, which is used;
            - "16-bit": greyscale (also 32-bit floats) or colours, reduced to 8 bits;
            - "CMYK", "palette", "grayscale": converted to RGB;
            - "transparent": some pixels are transparent and become white;
            - "rotated": turned or mirrored according to the EXIF orientation;
            - "broken EXIF": left out, so the image may lie on its side;
            - "large text", "wrong checksum": parts of a PNG beside the pixels, left out.
        error: why the image can't be used, without place, advice and full stop; "" for a usable image.
        profile: name of the colour profile that the pixels are converted from; "" where they are used as they are.
        colour_remark: a key of `data.colours.COLOUR_REMARKS`, or "".
        revision: 0 where the pixels are what the first version of this file made of them. 1 where they are not:
            converted colours, white as zero, 12 bits, transparent colours of rare PNGs. Encodings of such an image
            have keys of their own.
    """

    content: str
    format: str
    size: tuple[int, int]
    notes: tuple[str, ...]
    error: str = ""
    profile: str = ""
    colour_remark: str = ""
    revision: int = 0


def inspect(data: bytes) -> ImageFacts:
    """The facts about an image. Bad data are a fact, and raise nothing.

    All of the image is decoded, so that a file that was cut short is found now and not in step 7000. A JPEG is
    decoded at an eighth of its size and without colour, which still reads the file to its end.
    """
    content, format_name, error = hashlib.sha256(data).hexdigest(), "", ""
    for quick in (True, False):  # where the quick pass fails, the thorough pass decides, as in `open_image`
        try:
            opened = _opened(data)
            with opened.image as image:
                format_name, colours = image.format or "", opened.colours
                size, notes = _examine(image, opened, quick)
                return ImageFacts(content, format_name, size, notes, "", colours.name, colours.remark, opened.revision)
        except Exception as caught:  # see open_image
            error = _reason(caught)
    return ImageFacts(content, format_name, (0, 0), (), error)


def _examine(image: Image.Image, opened: _Opened, quick: bool) -> tuple[tuple[int, int], tuple[str, ...]]:
    """(size, notes) of an image whose header was read. Raises what `open_image` would raise."""
    mode, rawmode = image.mode, opened.rawmode
    reduced = quick and image.format in ("JPEG", "MPO")
    size, in_header = image.size, _orientation(image) if image.format == "TIFF" else None
    if reduced:
        image.draft("L", (1, 1))
    image.load()  # turns a TIFF upright, and clears its orientation
    orientation, broken = in_header or _orientation(image)
    size = size if reduced else image.size
    size = size if in_header is None and orientation in _TURNED else size[::-1]
    deep = _is_deep(image)
    # One pixel is enough to try the conversion; only the conversion of deep greyscale depends on all values. The
    # profile of an image that was decoded without colour fits no longer; `colours_of` has tried it.
    _to_rgb(image if deep else image.crop((0, 0, 1, 1)), opened, AS_THEY_ARE if reduced else None)
    facts = {
        "animated": _is_animated(image),  # reads further in the file, so it comes after decoding
        "16-bit": deep or (";16" in rawmode and not rawmode.startswith("BGR")),  # BGR;16 has 5 + 6 + 5 bits
        "CMYK": mode == "CMYK",
        "palette": mode in ("P", "PA"),
        "transparent": _is_transparent(image),
        "rotated": orientation in _UPRIGHT,
        "grayscale": deep or mode in ("1", "L", "LA", "La"),
        "broken EXIF": broken,
    }
    return size, (*(name for name, holds in facts.items() if holds), *opened.faults)


_UPRIGHT = {  # EXIF orientation -> what turns the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_TURNED = (5, 6, 7, 8)  # orientations that swap height and width


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    """A decoded image, turned upright. `ImageOps.exif_transpose` also writes EXIF anew, which may fail."""
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def _orientation(image: Image.Image) -> tuple[int, bool]:
    """(EXIF orientation, whether the EXIF data are damaged); orientation 1 where there is none.

    The decoder of JPEG XL turns the image itself, but for a JPEG inside: the standard gives EXIF no say.
    """
    if image.format == "JXL" and not getattr(image, "jpeg", False):
        return 1, False
    try:
        exif = image.getexif()
        found = exif.get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged EXIF raises nearly any type
        return 1, True
    return found if isinstance(found, int) else 1, not exif and _has_content(image.info.get("exif"))


def _has_content(raw: bytes | None) -> bool:
    """Whether EXIF data, in which Pillow has found nothing, are not empty but damaged."""
    raw = (raw or b"").removeprefix(b"Exif\0\0")
    if not raw.strip(b"\0") or raw[:4] not in (b"II*\0", b"MM\0*"):
        return bool(raw.strip(b"\0"))
    order = "little" if raw[:2] == b"II" else "big"
    start = int.from_bytes(raw[4:8], order)
    return len(raw) < start + 2 or raw[start : start + 2] != b"\0\0"


def _rawmode(image: Image.Image) -> str:
    """Pillow's name for the storage of a pixel in the file; "" where unknown or after decoding has begun."""
    arguments = image.tile[0].args if getattr(image, "tile", None) else ""
    return str(arguments[0] if isinstance(arguments, tuple) and arguments else arguments)


def _is_transparent(image: Image.Image) -> bool:
    """Whether at least one pixel is transparent; an alpha channel alone is not enough."""
    if not image.has_transparency_data or _is_deep(image):
        transparency = image.info.get("transparency")
        return transparency is not None and bool((np.asarray(image) == transparency).any())
    image = _not_premultiplied(image)
    if image.mode not in ("LA", "RGBA"):
        image = image.convert("RGBA")
    return image.getchannel("A").getextrema()[0] < 255


def _is_animated(image: Image.Image) -> bool:
    if image.format == "MPO":  # a photograph; the other frames are previews and depth maps
        return False
    with contextlib.suppress(Exception):  # damage after the first frame does not matter
        return bool(getattr(image, "is_animated", False))
    return False


# ---------------------------------------------------------------------------------------------------------------------
# 3. Preparing
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Crop:
    """The coordinates of a crop, in pixels, for SDXL's micro-conditioning.

    Attributes:
        original_size: (height, width) of the opened image, before resizing.
        crop_top_left: (top, left) in the resized (and mirrored) image.
        target_size: (height, width) of the crop.
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
    """(pixels uint8 (H, W, 3), crop) of an image: resized to just cover the target, flipped, then cropped.

    Args:
        image: upright RGB (`open_image`).
        size: (height, width) of the target.
        center_crop: crop the centre instead of a place that is drawn from `rng`.
        flip: mirror left to right before the crop; the coordinates are those in the mirrored image, as in diffusers.
        interpolation: a name from `INTERPOLATIONS`.
        rng: generator, for a random crop only; nothing is drawn where the crop is forced.

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
    # Mirroring the crop at the mirrored place gives the same pixels as mirroring the whole image, with less work.
    place = top, spare[1] - left if flip else left
    cropped = _resized_crop(image, resized, place, size, INTERPOLATIONS[interpolation])
    pixels = np.asarray(ImageOps.mirror(cropped) if flip else cropped)
    return pixels, Crop(original, (top, left), (size[0], size[1]))


def resized_size(original: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of an image that is resized to just cover a target.

    One side has the length of the target's side, the other side is not shorter. The other side is rounded down, as by
    torchvision when it resizes the shorter side to a resolution.
    """
    if original[1] * size[0] >= original[0] * size[1]:  # at least as wide as the target, in proportion
        return size[0], size[0] * original[1] // original[0]
    return size[1] * original[0] // original[1], size[1]


def crop_is_forced(original: tuple[int, int], size: tuple[int, int], center_crop: bool) -> bool:
    """Whether there is only one crop: the centre, or all of the resized image.

    Example: 1000 x 1001 px have one crop of 64 x 64 px, since they are resized to 64 x 64 px.
    """
    return center_crop or resized_size(original, size) == tuple(size)


def lost_share(originals: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The share of each image that a crop removes: float64 (N,), 0 <= share < 1.

    Args:
        originals: sizes of the images, integers (N, 2).
        size: (height, width) of the target.

    Raises:
        ValueError: a size below 1 x 1.
    """
    heights, widths = _checked_sizes(originals)
    # As in `resized_size`: one side has the length of the target's side, the other side is not shorter.
    resized_heights = np.maximum(size[1] * heights // widths, size[0])
    resized_widths = np.maximum(size[0] * widths // heights, size[1])
    return 1.0 - size[0] / resized_heights * (size[1] / resized_widths)


def to_pixel_values(pixels: np.ndarray) -> "torch.Tensor":
    """Pixels uint8 (H, W, 3) as float32 (3, H, W) in [-1, 1]."""
    import torch

    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1), dtype=np.float32)) / 127.5 - 1.0


def from_pixel_values(pixel_values: "torch.Tensor | np.ndarray") -> np.ndarray:
    """Floats (3, H, W) in [-1, 1] as pixels uint8 (H, W, 3): the inverse of `to_pixel_values`.

    Values are rounded, and clipped where a decoder exceeds the range. NaN becomes black. Any dtype and device will do.
    """
    if not isinstance(pixel_values, np.ndarray):
        pixel_values = pixel_values.detach().float().cpu().numpy()  # numpy has no bfloat16
    values = np.nan_to_num(pixel_values.astype(np.float32), nan=-1.0).clip(-1.0, 1.0)
    return np.ascontiguousarray(np.round((values + 1.0) * 127.5).astype(np.uint8).transpose(1, 2, 0))


def _resized_crop(
    image: Image.Image,
    resized: tuple[int, int],
    place: tuple[int, int],
    size: tuple[int, int],
    resample: Image.Resampling,
) -> Image.Image:
    """The crop of `size` at `place` of an image that is resized to `resized`."""
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
    """The same as `_resized_crop` for an enlarged image; memory depends on the crop alone.

    A picture of 10000 x 1 px would be resized to 10 gigapixels. Pillow can resize a part of an image, but with other
    passes and other rounding than for the whole. So ordinary images are not prepared this way: pixels would change.
    """
    ranges, boxes = [], []
    for side, whole, first, length in zip((image.height, image.width), resized, place, size, strict=True):
        start, end = first * side / whole, min((first + length) * side / whole, side)
        offset = max(0, math.floor(start) - _MARGIN)
        ranges.append((offset, min(side, math.ceil(end) + _MARGIN)))
        boxes.append((start - offset, end - offset))  # small numbers, since Pillow stores them as 32-bit floats
    (y0, y1), (x0, x1) = ranges
    (top, bottom), (left, right) = boxes
    return image.crop((x0, y0, x1, y1)).resize(size[::-1], resample, box=(left, top, right, bottom))


def _checked_sizes(sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(heights, widths), int64 (N,) each, of sizes, integers (N, 2)."""
    sizes = np.asarray(sizes, dtype=np.int64).reshape(-1, 2)
    if (sizes < 1).any():
        raise ValueError("An image has at least 1 x 1 pixels; leave out the images that can't be used.")
    return sizes[:, 0], sizes[:, 1]


# ---------------------------------------------------------------------------------------------------------------------
# 4. Aspect-ratio buckets
# ---------------------------------------------------------------------------------------------------------------------


def parse_buckets(text: str, unit: int = 8) -> tuple[tuple[int, int], ...]:
    """The sizes in a text like "832,1216; 1024,1024": (height, width) each, in the order of the text.

    Args:
        text: `--aspect_ratio_buckets`.
        unit: every side must be a multiple of this number of pixels.

    Raises:
        DataError: the form is another, a side is 0 or no multiple of the unit, or a size appears twice.
    """

    def refusal(found: str) -> DataError:
        return DataError(
            f"--aspect_ratio_buckets is {text!r}: {found}.",
            f'The form is "h,w;h,w": heights and widths in pixels, multiples of {unit}, each size once.',
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
    """Sizes of about the same area with aspect ratios from 1:4 to 4:1, sorted by height / width.

    The square of the resolution is a bucket, and with (h, w) also (w, h). Each shorter side is a multiple of the unit.
    The longer side is the largest multiple whose area does not exceed the square's, so no bucket needs more memory.
    The unit is 64 px. Below a resolution of 512 the unit is an eighth of the resolution, rounded down to a multiple of
    16 px (the size of a token of SD3), and at least 16 px.

    At 1024 px these are 17 of the 40 sizes that SDXL was trained with (arXiv 2307.01952, appendix I). That table has
    up to four longer sides per shorter side, down to 90% of the area. Here each shorter side has only the longest of
    them, which spreads a small data set over fewer buckets.

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
    """The bucket of each image, int16 (N,): the bucket with the nearest logarithm of the aspect ratio.

    Among equally near buckets the bucket with the nearest area wins, then the first.

    Args:
        sizes: sizes of the images, integers (N, 2).
        buckets: sizes to choose from.

    Raises:
        ValueError: no buckets, or a size below 1 x 1.
    """
    if not buckets:
        raise ValueError("There must be at least one bucket.")
    heights, widths = _checked_sizes(sizes)
    # A difference of logarithms: swapping height and width changes exactly its sign, unlike the log of a quotient.
    ratios, areas = np.log(heights) - np.log(widths), heights * widths
    nearest = np.zeros(len(ratios), dtype=np.int16)
    distances, excesses = np.full(len(ratios), np.inf), np.zeros(len(ratios), dtype=np.int64)
    for index, (height, width) in enumerate(buckets):  # one by one, so that memory depends on N alone
        distance = np.abs(ratios - (np.log(height) - np.log(width)))
        excess = np.abs(areas - height * width)
        better = (distance < distances - _SAME) | ((distance <= distances + _SAME) & (excess < excesses))
        nearest[better], distances[better], excesses[better] = index, distance[better], excess[better]
    return nearest
