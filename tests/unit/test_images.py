"""Images: files of every kind and of none, crops and their coordinates, aspect-ratio buckets.

Metamorphic where possible: `inspect` agrees with `open_image`, a cut file is refused or loses nothing, a part that is
resized alone agrees with the whole. All files are made here, the hostile ones byte by byte.
"""

import functools
import hashlib
import itertools
import struct
import zlib
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from lpl_finetuning.data import images
from lpl_finetuning.data.images import (
    INTERPOLATIONS,
    Crop,
    ImageFacts,
    assign_buckets,
    auto_buckets,
    crop_is_forced,
    from_pixel_values,
    inspect,
    lost_share,
    open_image,
    parse_buckets,
    prepare_image,
    resized_size,
    to_pixel_values,
)
from lpl_finetuning.errors import DataError
from tests.children import printed_by

# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


def photo(height, width, seed=0):
    """Smooth noise plus grain, uint8 (H, W, 3)."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (height // 32 + 2, width // 32 + 2, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(float)
    return np.clip(smooth + rng.normal(0, 6, smooth.shape), 0, 255).astype(np.uint8)


def file_of(image, format_name, **options):
    buffer = BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(buffer, format_name, **options)
    return buffer.getvalue()


def png(width, height, bits, color, rows, transparency=b""):
    """A PNG by hand, for what Pillow does not write. `transparency`: the colour that is."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    masked = chunk(b"tRNS", transparency) if transparency else b""
    return b"\x89PNG\r\n\x1a\n" + header + masked + data + chunk(b"IEND", b"")


def big_endian_tiff(values):
    """uint16 (H, W) as an uncompressed big-endian TIFF, which Pillow does not write."""
    height, width = values.shape
    tags = [(256, 3, width << 16), (257, 3, height << 16), (258, 3, 16 << 16), (259, 3, 1 << 16), (262, 3, 1 << 16)]
    tags += [(273, 4, 8 + 2 + 9 * 12 + 4), (277, 3, 1 << 16), (278, 3, height << 16), (279, 4, values.size * 2)]
    body = b"".join(struct.pack(">HHII", tag, kind, 1, value) for tag, kind, value in tags)
    return b"MM\0*\0\0\0\x08" + struct.pack(">H", len(tags)) + body + bytes(4) + values.astype(">u2").tobytes()


def tiff(values, bits, photometric=1, sample_format=1, order="<", data=None, samples=(), compression=1):
    """(H, W) as a TIFF. data: the bytes of the pixels; samples: ExtraSamples."""
    height, width = values.shape[:2]
    count = values.shape[2] if values.ndim == 3 else 1
    data = values.tobytes() if data is None else data
    tags = [(256, width), (257, height), (258, bits), (259, compression), (262, photometric), (273, 0), (277, count)]
    tags += [(278, height), (279, len(data)), *((338, value) for value in samples), (339, sample_format)]
    tags = [(273, 8 + 2 + 12 * len(tags) + 4) if tag == 273 else (tag, value) for tag, value in tags]
    body = b""
    for tag, value in tags:
        if tag == 258 and count == 2:
            body += struct.pack(f"{order}HHIHH", tag, 3, 2, value, value)
        elif tag in (273, 279):
            body += struct.pack(f"{order}HHII", tag, 4, 1, value)
        else:
            body += struct.pack(f"{order}HHIHH", tag, 3, 1, value, 0)
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8)
    return head + struct.pack(f"{order}H", len(tags)) + body + bytes(4) + data


def packed_12(values):
    """Integers of 12 bits, (H, W), each row padded to whole bytes."""
    rows = []
    for row in values:
        bits = "".join(f"{value:012b}" for value in row.tolist())
        bits += "0" * (-len(bits) % 8)
        rows.append(int(bits, 2).to_bytes(len(bits) // 8, "big"))
    return b"".join(rows)


def packed_grey(values, bits):
    """Integers of 1, 2 or 4 bits, (H, W), as rows of a PNG."""
    rows = []
    for row in values:
        text = "".join(f"{value:0{bits}b}" for value in row.tolist())
        text += "0" * (-len(text) % 8)
        rows.append(int(text, 2).to_bytes(len(text) // 8, "big"))
    return rows


GREY16 = np.linspace(0, 65535, 12, dtype=np.uint16).reshape(3, 4)
COLOR16 = np.linspace(0, 65535, 36, dtype=np.uint16).reshape(3, 4, 3)
PHOTO = photo(40, 56)
FRAMES = [Image.new("RGB", (8, 8), color) for color in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]


def palette_image():
    image = Image.new("P", (2, 1))
    image.putpalette([250, 0, 0, 0, 0, 250])
    image.putpixel((1, 0), 1)
    return image


def spread(values, scale):
    """Greyscale (H, W) to what is expected of `open_image`, float (H, W, 3) in 0..255."""
    return np.repeat(values[..., None] / scale * 255, 3, axis=2)


def ink(*values):
    return Image.new("CMYK", (8, 8), values)


def grey(image):
    return np.asarray(Image.fromarray(image).convert("L"))


def bmp_of_5_6_5_bits():
    """Two pixels, red and blue, of 16 bits each: that is less than 8 bits a colour, not more."""
    masks = struct.pack("<III", 0xF800, 0x07E0, 0x001F)
    header = struct.pack("<IiiHHIIiiII", 40, 2, 1, 1, 16, 3, 4, 2835, 2835, 0, 0)
    offset = 14 + len(header) + len(masks)
    return b"BM" + struct.pack("<IHHI", offset + 4, 0, 0, offset) + header + masks + struct.pack("<HH", 0xF800, 0x001F)


def animation(format_name, **options):
    return file_of(FRAMES[0], format_name, save_all=True, append_images=FRAMES[1:], **options)


@functools.cache
def golden_table():
    """name -> (bytes, expected pixels (H, W, 3) or None, tolerance, notes)"""
    bilevel = np.array([[True, False, True]])
    floats = (GREY16 / 65535).astype(np.float32)
    red = np.full((8, 8, 3), (255, 0, 0))
    alpha = Image.new("RGBA", (3, 2), (200, 0, 0, 128))
    opaque = Image.new("RGBA", (3, 2), (200, 0, 0, 255))
    half = np.full((2, 3, 3), (227.4, 127, 127))
    masked = np.array([[[250, 0, 0], [255, 255, 255]]])
    deep, grey_deep = ("16-bit",), ("16-bit", "grayscale")
    return {
        "rgb.png": (file_of(PHOTO, "PNG"), PHOTO, 0, ()),
        "rgb.bmp": (file_of(PHOTO, "BMP"), PHOTO, 0, ()),
        "565.bmp": (bmp_of_5_6_5_bits(), np.array([[[255, 0, 0], [0, 0, 255]]]), 0, ()),
        "rgb.tif": (file_of(PHOTO, "TIFF"), PHOTO, 0, ()),
        "lzw.tif": (file_of(PHOTO, "TIFF", compression="tiff_lzw"), PHOTO, 0, ()),
        "rgb.webp": (file_of(PHOTO, "WEBP", lossless=True), PHOTO, 0, ()),
        "rgb.jpg": (file_of(PHOTO, "JPEG", quality=95, subsampling=0), PHOTO, 20, ()),
        "progressive.jpg": (file_of(PHOTO, "JPEG", quality=95, subsampling=0, progressive=True), PHOTO, 20, ()),
        "rgb.jp2": (file_of(PHOTO, "JPEG2000"), PHOTO, 0, ()),
        "grey.png": (file_of(grey(PHOTO), "PNG"), spread(grey(PHOTO), 255), 0, ("grayscale",)),
        "grey.jpg": (file_of(grey(PHOTO), "JPEG", quality=95), spread(grey(PHOTO), 255), 16, ("grayscale",)),
        "bilevel.png": (file_of(bilevel, "PNG"), spread(bilevel, 1), 0, ("grayscale",)),
        "bilevel.tif": (file_of(bilevel, "TIFF"), spread(bilevel, 1), 0, ("grayscale",)),
        "grey16.png": (file_of(GREY16, "PNG"), spread(GREY16, 65535), 1, grey_deep),
        "grey16.tif": (file_of(GREY16, "TIFF"), spread(GREY16, 65535), 1, grey_deep),
        "grey16.ppm": (file_of(GREY16, "PPM"), spread(GREY16, 65535), 1, grey_deep),
        "grey16 big.tif": (big_endian_tiff(GREY16), spread(GREY16, 65535), 1, grey_deep),
        "float.tif": (file_of(floats, "TIFF"), spread(GREY16, 65535), 1, grey_deep),
        "grey16 masked.png": (
            png(4, 3, 16, 0, [row.astype(">u2").tobytes() for row in GREY16], GREY16[1, 1:2].astype(">u2").tobytes()),
            np.where(np.arange(12).reshape(3, 4, 1) == 5, 255, spread(GREY16, 65535)), 1,
            ("16-bit", "transparent", "grayscale"),
        ),
        "rgb16.png": (png(4, 3, 16, 2, [row.astype(">u2").tobytes() for row in COLOR16]), COLOR16 / 257, 1, deep),
        "cmyk white.jpg": (file_of(ink(0, 0, 0, 0), "JPEG"), np.full((8, 8, 3), 255), 3, ("CMYK",)),
        "cmyk cyan.jpg": (file_of(ink(255, 0, 0, 0), "JPEG"), np.full((8, 8, 3), (0, 255, 255)), 3, ("CMYK",)),
        "cmyk black.tif": (file_of(ink(0, 0, 0, 255), "TIFF"), np.zeros((8, 8, 3)), 3, ("CMYK",)),
        "palette.png": (file_of(palette_image(), "PNG"), np.array([[[250, 0, 0], [0, 0, 250]]]), 0, ("palette",)),
        "palette.gif": (file_of(palette_image(), "GIF"), np.array([[[250, 0, 0], [0, 0, 250]]]), 0, ("palette",)),
        "masked palette.png": (
            file_of(palette_image(), "PNG", transparency=1), masked, 0, ("palette", "transparent"),
        ),
        "masked palette.gif": (
            file_of(palette_image(), "GIF", transparency=1), masked, 0, ("palette", "transparent"),
        ),
        "alpha palette.png": (
            file_of(palette_image(), "PNG", transparency=bytes([255, 0])), masked, 0, ("palette", "transparent"),
        ),
        "masked rgb.png": (
            file_of(palette_image().convert("RGB"), "PNG", transparency=(0, 0, 250)), masked, 0, ("transparent",),
        ),
        "rgba.png": (file_of(alpha, "PNG"), half, 1, ("transparent",)),
        "rgba.webp": (file_of(alpha, "WEBP", lossless=True), half, 1, ("transparent",)),
        "rgba.tif": (file_of(alpha, "TIFF"), half, 1, ("transparent",)),
        "opaque.png": (file_of(opaque, "PNG"), np.full((2, 3, 3), (200, 0, 0)), 0, ()),
        "la.png": (
            file_of(Image.new("LA", (3, 2), (100, 128)), "PNG"), np.full((2, 3, 3), 177.2), 1,
            ("transparent", "grayscale"),
        ),
        "animated.gif": (animation("GIF"), red, 0, ("animated", "palette")),
        "animated.webp": (animation("WEBP", lossless=True), red, 0, ("animated",)),
        "animated.png": (animation("PNG"), red, 0, ("animated",)),
        "pages.tif": (animation("TIFF"), red, 0, ("animated",)),
        "pair.mpo": (animation("MPO", quality=95), red, 3, ()),
        "one pixel.png": (file_of(PHOTO[:1, :1], "PNG"), PHOTO[:1, :1], 0, ()),
        "one pixel.jpg": (file_of(PHOTO[:1, :1], "JPEG"), PHOTO[:1, :1], 16, ()),
        "row.png": (file_of(np.zeros((1, 10000, 3), np.uint8), "PNG"), np.zeros((1, 10000, 3)), 0, ()),
        "column.jpg": (file_of(np.zeros((10000, 1, 3), np.uint8), "JPEG"), np.zeros((10000, 1, 3)), 0, ()),
    }  # fmt: skip


def stored(upright, orientation):
    """As cameras store it: the transformation that the viewer has to undo, by the definition of the EXIF tag."""
    turned = upright.transpose(1, 0, 2)
    return np.ascontiguousarray(
        {
            1: upright,
            2: upright[:, ::-1],
            3: upright[::-1, ::-1],
            4: upright[::-1],
            5: turned,
            6: turned[::-1],
            7: turned[::-1, ::-1],
            8: turned[:, ::-1],
        }[orientation]
    )


def rotated(format_name, orientation, pixels=PHOTO):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}}.get(format_name, {})
    return file_of(stored(pixels, orientation), format_name, exif=exif, **options)


def refused_table():
    """name -> (bytes, what the message must hold)"""
    good = file_of(PHOTO, "PNG")
    damaged = bytearray(good)
    damaged[200:220] = bytes(20)
    return {
        "empty.png": (b"", "0 bytes"),
        "text.png": (b"hello", "not in an image format"),
        "page.jpg": (b"<!DOCTYPE html><html><body>404</body></html>", "not in an image format"),
        "header.png": (good[:20], "can't be used"),
        "cut.png": (good[: len(good) // 2], "can't be used"),
        "damaged.png": (bytes(damaged), "can't be used"),
        "cut.jpg": (file_of(PHOTO, "JPEG")[:-20], "truncated"),
        "loud.tif": (file_of(GREY16.astype(np.float32), "TIFF"), "0 to 65535, not 0 to 1"),
        "negative.tif": (file_of(np.full((2, 2), -1, np.int32), "TIFF"), "signed integers"),
        "drawing.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n%%EOF\n", "drawing"),
        "large.png": (png(12000, 20000, 8, 2, []), "12000 x 20000 px are 240 megapixels; at most 179 are read"),
        "huge.png": (png(60000, 60000, 8, 2, []), "60000 x 60000 px are 3600 megapixels; at most 179 are read"),
    }


def rare_table():
    """name -> (bytes, expected pixels (H, W) or (H, W, 3), float in 0..255)"""
    table = {}
    for bits in (1, 2, 4):
        values = np.arange(16).reshape(2, 8) % 2**bits
        expected = values * (255 / (2**bits - 1))
        for key in range(2**bits):
            data = png(8, 2, bits, 0, packed_grey(values, bits), struct.pack(">H", key))
            table[f"png of {bits} bits, {key} transparent"] = data, np.where(values == key, 255, expected)
    colors = np.array([[[0x1234, 0x5678, 0x9ABC], [0x1235, 0x5678, 0x9ABC], [0x1200, 0x5600, 0x9A00]]], np.uint16)
    for key in range(3):
        rows = [row.astype(">u2").tobytes() for row in colors]
        expected = np.where(np.arange(3)[None, :, None] == key, 255, colors // 256)
        data = png(3, 1, 16, 2, rows, colors[0, key].astype(">u2").tobytes())
        table[f"16-bit png, color {key} transparent"] = data, expected
    table["8-bit png with a key of more bits"] = (
        png(2, 1, 8, 0, [bytes([5, 9])], struct.pack(">H", 0x105)), np.array([[255, 9]]),
    )  # fmt: skip
    floats = (GREY16 / 65535).astype(np.float32)
    grey = GREY16 / 257
    deep = np.array([[0, 1000, 2048, 4000, 4095]])
    table |= {
        "white is zero, 16 bits": (tiff(GREY16, 16, 0), 255 - grey),
        "white is zero, 16 bits, deflated": (
            tiff(GREY16, 16, 0, data=zlib.compress(GREY16.tobytes()), compression=8), 255 - grey,
        ),
        "white is zero, float": (tiff(floats, 32, 0, 3), 255 - grey),
        "white is zero, float, big": (tiff(floats, 32, 0, 3, ">", floats.astype(">f4").tobytes()), 255 - grey),
        "white is zero, 8 bits": (tiff(np.array([[0, 200]], np.uint8), 8, 0), np.array([[255, 55]])),
        "white is zero, 4 bits": (tiff(np.array([[0, 15]]), 4, 0, data=bytes([0x0F])), np.array([[255, 0]])),
        "12 bits": (tiff(deep, 12, data=packed_12(deep)), deep * (255 / 4095)),
        "premultiplied greyscale": (
            tiff(np.array([[[50, 100], [0, 0], [80, 255]]], np.uint8), 8, samples=(1,)),
            np.array([[50 + 155, 255, 80]]),
        ),
    }  # fmt: skip
    return table


# ---------------------------------------------------------------------------------------------------------------------
# Opening and inspecting
# ---------------------------------------------------------------------------------------------------------------------


def agreed(data):
    """(pixels, None) or (None, message) of `open_image`, once `inspect` was seen to agree with it."""
    facts = inspect(data)
    assert facts.content == hashlib.sha256(data).hexdigest()
    known = {"animated", "16-bit", "CMYK", "palette", "transparent", "rotated", "grayscale", "broken EXIF"}
    assert set(facts.notes) <= known | {"large text", "wrong checksum"}
    try:
        image = open_image(data, "somewhere")
    except DataError as error:
        problem = error.problem.removeprefix("somewhere: ").removeprefix("can't be used as an image: ")
        assert problem == f"{facts.error}." and facts.error and facts.size == (0, 0) and error.advice
        assert "BytesIO" not in str(error) and str(error).endswith(".")
        return None, str(error)
    assert facts.error == "" and image.mode == "RGB" and facts.size == (image.height, image.width) and facts.format
    return np.asarray(image), None


@pytest.mark.parametrize("name", golden_table())
def test_every_kind_of_image_is_opened(name):
    data, expected, tolerance, notes = golden_table()[name]
    pixels, _ = agreed(data)
    assert pixels is not None and pixels.shape == expected.shape and pixels.dtype == np.uint8
    assert np.abs(pixels - expected.astype(float)).max() <= tolerance
    suffix = name.rsplit(".", 1)[1]
    formats = {"tif": "TIFF", "jpg": "JPEG", "jp2": "JPEG2000"}
    assert inspect(data) == ImageFacts(
        hashlib.sha256(data).hexdigest(), formats.get(suffix, suffix.upper()), expected.shape[:2], notes
    )


@pytest.mark.parametrize("name", rare_table())
def test_rare_pixels_are_right(name):
    data, expected = rare_table()[name]
    pixels, message = agreed(data)
    expected = expected if expected.ndim == 3 else expected[..., None]
    assert message is None and np.abs(pixels - expected.astype(float)).max() <= 1
    facts = inspect(data)
    assert ("transparent" in facts.notes) == ("transparent" in name or "key" in name or "premultiplied" in name)
    # Where these pixels were wrong before, encodings of the wrong pixels must not be found again.
    right_before = (
        "png of 1 bits",
        "white is zero, 8",
        "white is zero, 4",
        "png of 2 bits, 0",
        "png of 4 bits, 0",
        "premultiplied",
    )
    assert facts.revision == (not name.startswith(right_before))


def test_a_tiff_of_a_kind_that_pillow_can_not_read_is_refused_as_such():
    for data in (
        tiff(GREY16, 16, 0, 1, ">", GREY16.astype(">u2").tobytes()),  # white as zero, big-endian
        tiff(np.zeros((2, 2)), 64, 1, 3),
        tiff(np.zeros((2, 2), np.float16), 16, 1, 3),
        tiff(np.array([[1, 2]]), 12, 0, data=packed_12(np.array([[1, 2]]))),
    ):
        assert "of a kind that Pillow can't read; save it as PNG" in agreed(data)[1]


def test_a_pgm_is_scaled_by_its_own_white():
    data = b"P5 2 1 4095\n" + struct.pack(">2H", 4000, 4095)
    assert agreed(data)[0][0, :, 0].tolist() == [249, 255]


@pytest.mark.parametrize("kind", ["unsigned", "signed", "16-bit", "8-bit", "big"])
def test_integers_without_a_white_are_refused(kind):
    values = np.array([[0, 100, 200]])
    data = {
        "unsigned": tiff(values.astype("<u4"), 32),
        "signed": tiff(values.astype("<i4"), 32, 1, 2),
        "16-bit": tiff(values.astype("<i2"), 16, 1, 2),
        "8-bit": tiff(values.astype("<i1"), 8, 1, 2),
        "big": tiff(values, 32, 1, 2, ">", values.astype(">i4").tobytes()),
    }[kind]
    assert "integers, which have no agreed white; save it with 8 or 16 bits" in agreed(data)[1]


@pytest.mark.parametrize("format_name", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(format_name, orientation):
    data = rotated(format_name, orientation)
    pixels, _ = agreed(data)
    assert pixels.shape == PHOTO.shape
    assert np.abs(pixels.astype(int) - PHOTO).max() <= (20 if format_name == "JPEG" else 0)
    assert inspect(data).notes == (("rotated",) if orientation > 1 else ())


@pytest.mark.parametrize("name", refused_table())
def test_what_is_no_image_is_refused_with_the_place_named(name):
    data, expected = refused_table()[name]
    _, message = agreed(data)
    assert message is not None and expected in message


def test_a_wrong_name_does_not_matter():
    """A file is what its bytes say: nothing knows its name."""
    assert inspect(file_of(PHOTO, "WEBP")).format == "WEBP"


def cuts(data):
    """Where to cut: everywhere at both ends, and here and there between."""
    return sorted({*range(40), *range(40, len(data), max(1, len(data) // 60)), *range(len(data) - 40, len(data))})


@pytest.mark.filterwarnings("ignore")  # damaged metadata
@pytest.mark.parametrize(
    "format_name, options",
    [
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("JPEG", {"progressive": True, "subsampling": 0, "optimize": True}),
        ("JPEG", {"restart_marker_rows": 1}),
        ("PNG", {}),
        ("WEBP", {}),
        ("WEBP", {"lossless": True}),
        ("GIF", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("BMP", {}),
    ],
)
def test_a_file_that_was_cut_is_refused_or_lost_nothing(format_name, options):
    data = file_of(PHOTO, format_name, **options)
    whole, _ = agreed(data)
    refused = 0
    for cut in cuts(data):
        pixels, message = agreed(data[:cut])
        refused += message is not None
        assert message is not None or np.array_equal(pixels, whole), cut
    assert refused >= 0.9 * len(cuts(data)) - 40  # what lies behind the pixels may be lost
    assert format_name != "JPEG" or refused == len(cuts(data))


@pytest.mark.filterwarnings("ignore")  # damaged metadata
def test_random_damage_raises_nothing_else():
    rng = np.random.default_rng(0)
    refused = total = 0
    files = [data for data, *_ in golden_table().values() if len(data) < 20000]
    files += [rotated(format_name, 6) for format_name in ("JPEG", "PNG", "WEBP", "TIFF")]
    for data in files:
        for _ in range(25):
            damaged = bytearray(data)
            for place in rng.integers(0, len(data) if rng.random() < 0.5 else min(len(data), 200), rng.integers(1, 5)):
                damaged[place] = rng.integers(256)
            refused += agreed(bytes(damaged))[1] is not None
            total += 1
    assert 0.2 * total < refused < 0.9 * total
    for _ in range(300):
        agreed(rng.integers(0, 256, int(rng.integers(1, 100)), dtype=np.uint8).tobytes())


def test_inspecting_a_jpeg_is_quick_and_not_only_on_paper(monkeypatch):
    data = file_of(PHOTO, "JPEG")
    sizes = []
    check = images._is_transparent
    monkeypatch.setattr(images, "_is_transparent", lambda image: sizes.append(image.size) or check(image))
    inspect(data)
    assert sizes == [(7, 5)]


def test_a_quick_look_that_fails_is_no_verdict(monkeypatch):
    def fail(*_):
        raise OSError("only quick looks fail")

    monkeypatch.setattr(JpegImageFile, "draft", fail)
    assert agreed(file_of(PHOTO, "JPEG"))[1] is None


@pytest.mark.parametrize("format_name", ["JPEG", "PNG"])
def test_a_failing_conversion_is_found_too(monkeypatch, format_name):
    def fail(*_):
        raise ValueError("no such colours")

    monkeypatch.setattr(images, "_to_rgb", fail)
    assert "no such colours" in agreed(file_of(PHOTO, format_name))[1]


def test_a_large_image_is_refused_at_once_and_without_memory():
    files = png(60000, 60000, 8, 2, []), png(10000, 10000, 1, 0, [])
    code = (
        "import json, time\nfrom lpl_finetuning.data import images\n"
        "from tests.children import peak\n"
        f"large, between = {files}\n"
        "before, start = peak(), time.process_time()\n"
        "errors = [images.inspect(large).error]\n"
        "grown, seconds = peak() - before, time.process_time() - start\n"
        "errors.append(images.inspect(between).error)\n"
        "print(json.dumps([errors, grown, seconds]))\n"
    )
    (large, between), grown, seconds = printed_by(code, "-W", "error::RuntimeWarning")
    assert "3600 megapixels" in large and grown < 20_000 and seconds < 1
    # Between Pillow's warning and its error nothing is said, not even where warnings are errors.
    assert "truncated" in between


def test_the_limit_is_ours_where_pillow_has_none(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    _, message = agreed(png(12000, 20000, 8, 2, []))
    assert "12000 x 20000 px are 240 megapixels" in message
    monkeypatch.setattr(images, "MAX_PIXELS", PHOTO.size // 3)
    assert agreed(file_of(PHOTO, "PNG"))[1] is None
    monkeypatch.setattr(images, "MAX_PIXELS", PHOTO.size // 3 - 1)
    assert "56 x 40 px" in agreed(file_of(PHOTO, "PNG"))[1]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    monkeypatch.setattr(images, "MAX_PIXELS", 10**6)
    assert "limit of 200 pixels" in agreed(file_of(PHOTO, "PNG"))[1]


def test_importing_needs_no_torch():
    loaded = printed_by(
        "import json, sys; from lpl_finetuning.data import images; print(json.dumps(list(sys.modules)))"
    )
    assert "PIL" in loaded and not {"torch", "datasets"} & set(loaded)


# ---------------------------------------------------------------------------------------------------------------------
# Preparing
# ---------------------------------------------------------------------------------------------------------------------


def square_before(image, resolution, center_crop, flip, interpolation, rng):
    """What was done before there were other targets than squares; old runs must not change by a bit."""
    if image.width <= image.height:
        width, height = resolution, resolution * image.height // image.width
    else:
        width, height = resolution * image.width // image.height, resolution
    resized = image.resize((width, height), INTERPOLATIONS[interpolation])
    if flip:
        resized = resized.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    top, left = 0, 0
    if center_crop:
        top, left = round((height - resolution) / 2), round((width - resolution) / 2)
    elif (width, height) != (resolution, resolution):
        top, left = int(rng.integers(height - resolution + 1)), int(rng.integers(width - resolution + 1))
    return np.asarray(resized)[top : top + resolution, left : left + resolution], (top, left)


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_squares_are_as_they_always_were(interpolation):
    rng = np.random.default_rng(0)
    for case in range(120):
        height, width = (int(side) for side in rng.integers(1, 200, 2))
        if case % 6 == 0:
            height = width
        resolution = int(rng.choice([8, 31, 64])) if case % 5 else height
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        options = bool(rng.random() < 0.3), bool(rng.random() < 0.5), interpolation
        rngs = [np.random.default_rng(case) for _ in range(2)]
        expected, place = square_before(image, resolution, *options, rngs[0])
        pixels, crop = prepare_image(image, (resolution, resolution), *options, rngs[1])
        assert np.array_equal(pixels, expected) and crop.crop_top_left == place, (height, width, resolution, options)
        assert rngs[0].random() == rngs[1].random()  # as many numbers were drawn


def coordinates(height, width):
    """An image whose red is the row and whose green is the column of each pixel."""
    rows, columns = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([rows, columns, 0 * rows], axis=-1).astype(np.uint8))


@pytest.mark.parametrize(
    "original, size", [((64, 100), (64, 64)), ((100, 64), (64, 64)), ((90, 60), (48, 60)), ((60, 90), (60, 33))]
)
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("center_crop", [False, True])
def test_the_crop_is_where_it_says(original, size, flip, center_crop):
    (height, width), rng, places = original, np.random.default_rng(3), set()
    for _ in range(12):
        pixels, crop = prepare_image(coordinates(height, width), size, center_crop, flip, "lanczos", rng)
        assert pixels.shape == (*size, 3) and pixels.dtype == np.uint8
        assert crop.original_size == original and crop.target_size == size
        top, left = crop.crop_top_left
        assert 0 <= top <= height - size[0] and 0 <= left <= width - size[1]
        # Coordinates are those of the mirrored image.
        assert tuple(pixels[0, 0, :2]) == (top, width - 1 - left if flip else left)
        last = left + size[1] - 1
        assert tuple(pixels[-1, -1, :2]) == (top + size[0] - 1, width - 1 - last if flip else last)
        places.add((top, left))
    assert len(places) == 1 if center_crop else len(places) > 1
    if center_crop:
        assert abs(2 * top - (height - size[0])) <= 1 and abs(2 * left - (width - size[1])) <= 1


@pytest.mark.parametrize("original, size", [((200, 120), (96, 32)), ((100, 250), (64, 80)), ((50, 60), (120, 100))])
def test_the_crop_is_where_it_says_in_the_resized_image(original, size):
    """A gradient is scaled with the image, so that its colours tell where in the original the crop lies."""
    image, resized = coordinates(*original), resized_size(original, size)
    for seed in range(8):
        pixels, crop = prepare_image(image, size, False, bool(seed % 2), "bilinear", np.random.default_rng(seed))
        for axis in (0, 1):
            places = crop.crop_top_left[axis] + np.arange(size[axis]) + 0.5
            places = resized[axis] - places if axis and seed % 2 else places
            expected = places * original[axis] / resized[axis] - 0.5
            inner = (expected > 2) & (expected < original[axis] - 3)
            found = pixels[size[0] // 2, :, 1] if axis else pixels[:, size[1] // 2, 0]
            assert np.abs(found - expected)[inner].max() <= 1


def test_a_flip_before_a_centred_crop_mirrors_it():
    image = coordinates(64, 100)
    for size in ((64, 64), (32, 64), (64, 30)):  # with an even number of pixels to spare
        plain, _ = prepare_image(image, size, True, False)
        mirrored, _ = prepare_image(image, size, True, True)
        assert np.array_equal(plain[:, ::-1], mirrored)


def random_sizes(count, seed=0, high=5000):
    return np.exp(np.random.default_rng(seed).uniform(0, np.log(high), (count, 2))).astype(int)


@pytest.mark.parametrize("size", [(64, 64), (96, 32), (40, 1000), (1, 1)])
def test_a_resized_image_just_covers_the_target(size):
    sizes = random_sizes(2000)
    for height, width in sizes.tolist():
        resized = resized_size((height, width), size)
        assert resized[0] >= size[0] and resized[1] >= size[1] and size[0] * size[1] > 0
        assert resized[0] == size[0] or resized[1] == size[1]
        scale = max(size[0] / height, size[1] / width)
        assert -1e-6 <= height * scale - resized[0] < 1 and -1e-6 <= width * scale - resized[1] < 1
        # Turning the image and the target turns the result.
        assert resized_size((width, height), size[::-1]) == resized[::-1]
    shares = lost_share(sizes, size)
    expected = [1 - size[0] * size[1] / np.prod(resized_size(pair, size), dtype=float) for pair in sizes.tolist()]
    assert shares.shape == (2000,) and shares.min() >= 0 and shares.max() < 1
    np.testing.assert_allclose(shares, expected, atol=1e-12)
    forced = [crop_is_forced(pair, size, False) for pair in sizes.tolist()]
    assert ((shares == 0) == forced).all() and all(crop_is_forced(pair, size, True) for pair in sizes.tolist())


def test_what_a_crop_throws_away():
    assert lost_share([(100, 100), (100, 200), (300, 100), (1000, 1001)], (64, 64)).tolist() == pytest.approx(
        [0, 0.5, 2 / 3, 0], abs=1e-2
    )
    assert lost_share([(50, 100)], (64, 128)).tolist() == [0]
    assert lost_share(np.zeros((0, 2), int), (64, 64)).shape == (0,)
    with pytest.raises(ValueError, match="1 x 1"):
        lost_share([(0, 0)], (64, 64))


def test_a_crop_is_forced_when_it_cannot_fall_elsewhere():
    for original in ((1000, 1001), (64, 65), (70, 70), (30, 10)):
        for size in ((64, 64), (96, 32)):
            rngs = [np.random.default_rng(seed) for seed in range(12)]
            crops = {prepare_image(Image.new("RGB", original[::-1]), size, False, False, "box", r)[1] for r in rngs}
            assert (len(crops) == 1) == crop_is_forced(original, size, False)
    assert crop_is_forced([30, 10], [96, 32], False)
    prepare_image(coordinates(96, 96), (64, 64), False, False)  # no generator is needed


def test_interpolations_and_their_errors():
    image = Image.fromarray(photo(96, 96))
    results = {name: prepare_image(image, (40, 40), True, False, name)[0].tobytes() for name in INTERPOLATIONS}
    assert set(results) == {"nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"}
    assert len(set(results.values())) == 6
    with pytest.raises(DataError, match=r"--image_interpolation_mode.*lanczos"):
        prepare_image(image, (40, 40), True, False, "cubic")
    with pytest.raises(ValueError, match="generator"):
        prepare_image(coordinates(96, 97), (96, 96), False, False)


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("original", [(5, 200), (300, 7), (3, 90)])
def test_a_part_resized_alone_agrees_with_the_whole(monkeypatch, interpolation, original):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (*original, 3), dtype=np.uint8))
    for seed in range(12):
        size = (48, 40) if seed % 2 else (40, 40)
        options = image, size, seed == 0, seed % 3 == 0, interpolation
        whole, crop = prepare_image(*options, np.random.default_rng(seed))
        with monkeypatch.context() as patch:
            patch.setattr(images, "_MAX_RESIZED", 0)
            part, crop_of_part = prepare_image(*options, np.random.default_rng(seed))
        assert crop == crop_of_part and part.shape == whole.shape
        difference = np.abs(part.astype(int) - whole)
        # Nearest and box jump from pixel to pixel of the original, and may do so a pixel earlier.
        if interpolation in ("nearest", "box"):
            assert (difference > 1).mean() < 0.06
        else:
            assert (difference <= 2).mean() > 0.95 and difference.max() <= 40 and difference.mean() < 1


@pytest.mark.parametrize("original", [(1, 10000), (20000, 1), (2, 65000), (1, 1)])
def test_extreme_aspect_ratios_take_little_memory_and_time(original):
    """And the middle of the crop shows what the original has there."""
    code = (
        "import json, time, numpy as np\n"
        "from PIL import Image\n"
        "from lpl_finetuning.data import images\n"
        "from tests.children import peak\n"
        f"original = {original}\n"
        "pixels = np.repeat(np.arange(max(original), dtype=np.uint32).astype(np.uint8), min(original))\n"
        "image = Image.fromarray(pixels.reshape(original) if original[0] > 1 and original[1] == 1 else\n"
        "    pixels.reshape(original[::-1]).T).convert('RGB')\n"
        "before, start, shapes, offs = peak(), time.process_time(), [], []\n"
        "for interpolation in images.INTERPOLATIONS:\n"
        "    for center_crop in (False, True):\n"
        "        rng = np.random.default_rng(3)\n"
        "        pixels, crop = images.prepare_image(image, (1024, 960), center_crop, True, interpolation, rng)\n"
        "        resized = images.resized_size(original, (1024, 960))\n"
        "        axis = int(original[1] > original[0])\n"
        "        middle = crop.crop_top_left[axis] + (512, 480)[axis]\n"
        "        if axis: middle = resized[1] - middle\n"
        "        expected = middle * original[axis] / resized[axis]\n"
        "        shapes.append(pixels.shape)\n"
        "        offs.append((float(pixels[512, 480, 0]) - expected + 128) % 256 - 128)\n"
        "print(json.dumps([shapes, offs, time.process_time() - start, peak() - before]))\n"
    )
    shapes, offs, seconds, grown = printed_by(code)
    assert len(shapes) == 2 * len(images.INTERPOLATIONS) and all(shape == [1024, 960, 3] for shape in shapes)
    assert max(map(abs, offs)) <= 1.5 or max(original) == 1
    assert seconds < 15 and grown < 100_000


def test_time_ids_and_pixel_values():
    assert Crop((1, 2), (3, 4), (5, 6)).time_ids == (1, 2, 3, 4, 5, 6)
    values = to_pixel_values(np.array([[[0, 255, 255]]], dtype=np.uint8))
    assert values.flatten().tolist() == [-1, 1, 1]
    pixels = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)[:, ::-1]
    values = to_pixel_values(pixels)
    assert values.shape == (3, 16, 16) and values.dtype == torch.float32 and values.is_contiguous()
    for inverse in (from_pixel_values(values), from_pixel_values(values.double().numpy())):
        assert inverse.dtype == np.uint8 and np.array_equal(inverse, pixels)
    rough = from_pixel_values(values.requires_grad_().bfloat16())
    assert np.abs(rough.astype(int) - pixels).max() <= 1
    beyond = torch.tensor([-1.5, 1.5, float("nan"), float("inf"), 0.001, -0.005]).reshape(3, 1, 2)
    assert from_pixel_values(beyond).tolist() == [[[0, 0, 128], [255, 255, 127]]]


# ---------------------------------------------------------------------------------------------------------------------
# Aspect-ratio buckets
# ---------------------------------------------------------------------------------------------------------------------


def test_buckets_are_parsed():
    assert parse_buckets("832,1216; 1024,1024") == ((832, 1216), (1024, 1024))
    assert parse_buckets(" 64 , 8 ") == ((64, 8),) and parse_buckets("6,2;2,6", unit=2) == ((6, 2), (2, 6))
    for resolution in (64, 512, 1024):
        text = ";".join(f"{height},{width}" for height, width in auto_buckets(resolution))
        assert parse_buckets(text) == auto_buckets(resolution)


@pytest.mark.parametrize(
    "text, found",
    [
        ("", "''"),
        ("832x1216", "'832x1216'"),
        ("832,1216;", "'' is no size"),
        ("832", "'832'"),
        ("832,1216,3", "'832,1216,3'"),
        ("64,-8", "'64,-8'"),
        ("64,6_4", "'64,6_4'"),
        ("64,6٤", "is no size"),
        ("64,8.0", "'64,8.0'"),
        ("64,64;0,64", "'0,64'"),
        ("64,64;64,65", "'64,65'"),
        ("63,64", "'63,64'"),
        ("64,64; 064,64", "'064,64' is there twice"),
        ("64," + "8" * 5000, "is no size"),
    ],
)
def test_other_buckets_are_refused_with_the_flag_named(text, found):
    with pytest.raises(DataError) as caught:
        parse_buckets(text)
    for expected in ("--aspect_ratio_buckets", found, '"h,w;h,w"', "multiples of 8"):
        assert expected in str(caught.value)


@pytest.mark.parametrize("resolution", [8, 16, 64, 72, 128, 256, 400, 504, 512, 768, 1000, 1024, 1032, 1048, 1536])
def test_automatic_buckets(resolution):
    buckets = auto_buckets(resolution)
    unit = 64 if resolution >= 512 else max(16, resolution // 8 // 16 * 16)
    assert buckets.count((resolution, resolution)) == 1 and len(set(buckets)) == len(buckets)
    assert {(width, height) for height, width in buckets} == set(buckets)
    ratios = [height / width for height, width in buckets]
    assert ratios == sorted(ratios) and ratios[0] >= 0.25 and ratios[-1] <= 4
    assert all(high / low > 1.03 for low, high in itertools.pairwise(ratios))
    for height, width in buckets:
        if height != width:
            assert height % unit == 0 and width % unit == 0
            assert resolution**2 - unit * min(height, width) < height * width <= resolution**2
    # Nothing is missing: every shorter side for which there is a longer one within 1:4.
    shorter = {min(bucket) for bucket in buckets} - {resolution}
    for short in range(unit, resolution, unit):
        longest = resolution**2 // short // unit * unit
        assert (short in shorter) == (short < longest <= 4 * short)
    assert resolution < 128 or len(buckets) >= 5


SDXL_TABLE = (  # arXiv 2307.01952, appendix I: the sizes that are no wider than high, as shorter side: longer sides
    (512, (2048, 1984, 1920, 1856)), (576, (1792, 1728, 1664)), (640, (1600, 1536)), (704, (1472, 1408)),
    (768, (1344, 1280)), (832, (1216, 1152)), (896, (1152, 1088)), (960, (1088, 1024)), (1024, (1024,)),
)  # fmt: skip


def test_the_buckets_at_1024_are_among_those_of_sdxl():
    expected = {size for short, sides in SDXL_TABLE for size in ((short, sides[0]), (sides[0], short))}
    assert set(auto_buckets(1024)) == expected and len(expected) == 17


@pytest.mark.parametrize("resolution", [0, -8, 7, 100])
def test_automatic_buckets_need_a_multiple_of_8(resolution):
    with pytest.raises(DataError, match=f"--resolution is {resolution};"):
        auto_buckets(resolution)


def test_images_go_to_the_nearest_bucket():
    buckets = auto_buckets(1024)
    sizes = random_sizes(3000)
    found = assign_buckets(sizes, buckets)
    assert found.dtype == np.int16 and found.shape == (3000,)
    distances = np.abs(np.log(sizes[:, :1] / sizes[:, 1:]) - np.log([height / width for height, width in buckets]))
    np.testing.assert_allclose(distances[np.arange(3000), found], distances.min(axis=1), atol=1e-9)
    # Each bucket takes itself; an image and its enlargement go the same way; turned images go to the turned bucket.
    assert assign_buckets(buckets, buckets).tolist() == list(range(len(buckets)))
    assert (assign_buckets(sizes * 7, buckets) == found).all()
    assert (assign_buckets(sizes[:, ::-1], buckets) == len(buckets) - 1 - found).all()
    order = np.random.default_rng(0).permutation(3000)
    assert (assign_buckets(sizes[order], buckets) == found[order]).all()
    assert (assign_buckets(sizes, buckets[::-1]) == len(buckets) - 1 - found).all()


def test_ties_go_to_the_nearest_area():
    buckets = [(416, 608), (832, 1216), (64, 64), (1664, 2432)]
    assert assign_buckets([(400, 600), (900, 1300), (4000, 6000), (50, 51)], buckets).tolist() == [0, 1, 3, 2]
    assert assign_buckets([(100, 100)], [(64, 128), (128, 64)]).tolist() == [0]
    assert assign_buckets([(100, 100)], [(64, 128), (96, 48)]).tolist() == [0]
    assert assign_buckets([(60, 60)], [(64, 128), (96, 48)]).tolist() == [1]


def test_a_million_images_are_assigned_in_bounded_memory():
    code = (
        "import tracemalloc, numpy as np\n"
        "from lpl_finetuning.data import images\n"
        "sizes = np.random.default_rng(0).integers(1, 5000, (1_000_000, 2))\n"
        "tracemalloc.start()\n"
        "images.assign_buckets(sizes, images.auto_buckets(1536))\n"
        "print(tracemalloc.get_traced_memory()[1])\n"
    )
    assert 1e6 < printed_by(code) < 120e6


def test_assigning_refuses_what_is_no_size():
    assert assign_buckets(np.zeros((0, 2), int), [(64, 64)]).shape == (0,)
    with pytest.raises(ValueError, match="one bucket"):
        assign_buckets([(1, 1)], [])
    with pytest.raises(ValueError, match="1 x 1"):
        assign_buckets([(64, 0)], [(64, 64)])
