"""Colours: what an image file says about its colours, and the conversion of pixels to sRGB.

Sections:

1. the colours of a file: the profile to convert from, or why there is none;
2. where files keep this: PNG chunks, boxes of AVIF, HEIC and JPEG 2000, headers of BMP, EXIF;
3. profiles built from primaries and a curve, for files that name these instead of a profile;
4. the conversion, by LittleCMS through Pillow.

The rendering intent is perceptual. Importing this file imports no torch. x, y are chromaticities (CIE 1931).
"""

import contextlib
import functools
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image, ImageCms

from lpl_finetuning.data.png_files import contents_before_pixels

# The remarks of the report, by the code that a scan stores: (predicate for one image, for several images).
COLOUR_REMARKS = {
    "broken": (
        "holds a colour profile that can't be used, and is read without the profile",
        "hold a colour profile that can't be used, and are read without the profile",
    ),
    "other kind": (
        "holds a colour profile for another kind of pixels (grey, RGB, CMYK or Lab), and is read without the profile",
        "hold a colour profile for another kind of pixels (grey, RGB, CMYK or Lab), and are read without the profile",
    ),
    "RGB for grey": (
        "is greyscale with a colour profile for RGB; the profile is applied to the grey values",
        "are greyscale with a colour profile for RGB; the profile is applied to the grey values",
    ),
    "linked": (
        "names a colour profile in another file, and is read without the profile",
        "name a colour profile in another file, and are read without the profile",
    ),
    "HDR": (
        "is marked as HDR (PQ or HLG), and is read as if it were sRGB",
        "are marked as HDR (PQ or HLG), and are read as if they were sRGB",
    ),
    "unknown": (
        "names primaries, a gamma or a range of values that can't be converted, and is read as if it were sRGB",
        "name primaries, a gamma or a range of values that can't be converted, and are read as if they were sRGB",
    ),
}

_NEAR = 2  # levels of 255; a profile that moves no colour further is sRGB under whatever name
_MOST_NAME = 60  # characters of a profile's name in the report
_CACHED = 32  # profiles whose transforms are kept; a print profile takes about 1 MB

# ---------------------------------------------------------------------------------------------------------------------
# 1. The colours of a file
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Colours:
    """How the pixels of an image become sRGB.

    Attributes:
        profile: ICC profile to convert from; empty where the pixels are used as they are.
        name: name of the profile, for the report.
        remark: a key of `COLOUR_REMARKS`; "" where there is nothing to remark.
    """

    profile: bytes = b""
    name: str = ""
    remark: str = ""

    @property
    def grey(self) -> bool:
        """Whether the profile is for greyscale."""
        return self.profile[16:20] == b"GRAY"


AS_THEY_ARE = Colours()


class _Unusable(Exception):
    """What a file says about its colours can't be followed; the argument is a key of `COLOUR_REMARKS`."""


def colours_of(image: Image.Image, data: bytes) -> Colours:
    """The colours that a file names. Nothing is decoded, and bad profiles are a remark, no error.

    Args:
        image: opened, not decoded yet.
        data: the bytes of the file.
    """
    try:
        profile = _profile_of(image, data)
        if not profile:
            return AS_THEY_ARE
        embedded = profile == image.info.get("icc_profile")
        # In the other formats grey pixels are a short form of RGB, and chunks describe grey like RGB.
        for_pixels = embedded and image.format in ("PNG", "JPEG", "MPO", "TIFF")
        return _judged(profile, _kind_of(image), for_pixels)
    except _Unusable as found:
        return Colours(remark=str(found))


def _profile_of(image: Image.Image, data: bytes) -> bytes:
    """The ICC profile of a file, or a profile built from what the file names instead; b"" for sRGB or nothing."""
    if image.format == "PNG":
        return _png_profile(image, contents_before_pixels(data))
    if "icc_profile" in image.info:
        return _whole(image.info["icc_profile"])
    found = None
    if image.format in ("AVIF", "HEIF", "JPEG2000"):
        found = _boxed_profile(data)
    elif image.format == "GIF":
        found = _gif_profile(data)
    elif image.format == "BMP":
        found = _bmp_profile(data)
    elif image.format == "WEBP" and data[12:16] == b"VP8X" and data[20] & 0x20:
        raise _Unusable("broken")  # the header announces a profile that is not there
    return _exif_profile(image) if found is None else found


def _judged(profile: bytes, kind: str, for_pixels: bool) -> Colours:
    """The colours of an image with a profile.

    Args:
        profile: the profile.
        kind: of the pixels, as profiles name the kind.
        for_pixels: whether the profile must be of the kind of the pixels; else it may also be for RGB.

    Raises:
        _Unusable: the profile does not fit the pixels, or can't be used.
    """
    of = profile[16:20].decode("latin-1").strip()
    if of == kind == "Lab":  # Pillow converts Lab itself
        return AS_THEY_ARE
    remark = ""
    if of == "RGB" and kind == "GRAY":
        remark = "RGB for grey" if for_pixels else ""
    elif of != kind:
        raise _Unusable("other kind" if of in ("GRAY", "RGB", "CMYK", "Lab") else "broken")
    name = _verdict(profile)
    if name is None:
        raise _Unusable("broken")
    return Colours(profile, name, remark) if name else AS_THEY_ARE


def _kind_of(image: Image.Image) -> str:
    """ "GRAY", "RGB", "CMYK" or "Lab": the kind of an image's pixels, as profiles name the kind."""
    tile = getattr(image, "tile", None)
    if image.mode in ("1", "L", "LA", "La", "F") or image.mode.startswith("I") or (tile and "LA;16B" in tile[0]):
        return "GRAY"  # Pillow reads greyscale of 16 bits with transparency as RGBA
    return {"CMYK": "CMYK", "LAB": "Lab"}.get(image.mode, "RGB")


def _whole(profile: Any) -> bytes:
    """An ICC profile, unless the profile is empty or cut short."""
    if not isinstance(profile, bytes) or len(profile) < 128 or int.from_bytes(profile[:4], "big") > len(profile):
        raise _Unusable("broken")
    return profile


# ---------------------------------------------------------------------------------------------------------------------
# 2. Where files keep this
# ---------------------------------------------------------------------------------------------------------------------

_EXIF, _INTEROPERABILITY, _COLOUR_SPACE = 0x8769, 0xA005, 0xA001
_WHITE_POINT, _PRIMARIES = 0x013E, 0x013F


def _png_profile(image: Image.Image, chunks: dict[bytes, bytes]) -> bytes:
    """The profile of a PNG. The order of precedence is that of the PNG specification, third edition, section 4.3."""
    has_profile = b"iCCP" in chunks
    cicp = chunks.get(b"cICP", b"")
    if len(cicp) >= 4 and not (has_profile and cicp[1] in (16, 18)):  # a profile beside HDR is for uses without HDR
        if cicp[2] != 0 or cicp[3] != 1:
            raise _Unusable("unknown")
        return _coded_profile(cicp[0], cicp[1], "cICP")
    if has_profile:
        return _whole(image.info.get("icc_profile"))
    if b"sRGB" in chunks:
        return b""
    gamma, primaries = chunks.get(b"gAMA"), chunks.get(b"cHRM")
    if gamma is None and primaries is None:  # EXIF behind the pixels is not searched: Pillow would decode them
        return _exif_profile(image) if b"eXIf" in chunks else b""
    if (gamma is not None and len(gamma) < 4) or (primaries is not None and len(primaries) < 32):
        raise _Unusable("unknown")
    encoding = int.from_bytes(gamma[:4], "big") / 1e5 if gamma else None
    return _described_profile([value / 1e5 for value in struct.unpack(">8I", primaries[:32])] if primaries else None,
                              encoding, "PNG")  # fmt: skip


def _boxes(data: bytes, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """(name, start, end) of each box between two places of an ISO file; the places are those of the content."""
    while start + 8 <= end:
        length, name = struct.unpack_from(">I4s", data, start)
        head = 8
        if length == 1 and start + 16 <= end:
            (length,), head = struct.unpack_from(">Q", data, start + 8), 16
        stop = end if length == 0 else start + length
        if stop < start + head or stop > end:
            return
        yield name, start + head, stop
        start = stop


def _boxed_profile(data: bytes) -> bytes | None:
    """The profile of the first colour box that says something, of AVIF and HEIC (the main item's) or JPEG 2000."""
    places: list[tuple[int, int]] = []
    for name, start, end in _boxes(data, 0, len(data)):
        if name == b"jp2h":
            places += [(first, last) for kind, first, last in _boxes(data, start, end) if kind == b"colr"]
        elif name == b"meta":
            places += _main_colours(data, start + 4, end)
    coded = None
    for start, end in places:
        kind = data[start : start + 4]
        if kind in (b"prof", b"rICC"):
            return _whole(data[start + 4 : end])
        if kind == b"nclx" and end - start >= 10:
            coded = struct.unpack_from(">2H", data, start + 4)
        elif kind[:1] in (b"\2", b"\3") and kind not in (b"prof", b"rICC"):  # JPEG 2000: method, precedence, approx
            return _whole(data[start + 3 : end])
    return None if coded is None else _coded_profile(*coded, "nclx")


def _main_colours(data: bytes, start: int, end: int) -> list[tuple[int, int]]:
    """(start, end) of the colour boxes that belong to the main item in the `meta` box of an AVIF or HEIC."""
    boxes = {name: (first, last) for name, first, last in _boxes(data, start, end)}
    if b"iprp" not in boxes:
        return []
    inside = {name: (first, last) for name, first, last in _boxes(data, *boxes[b"iprp"])}
    properties = list(_boxes(data, *inside.get(b"ipco", (0, 0))))
    own = _main_properties(data, boxes.get(b"pitm"), inside.get(b"ipma"))
    return [
        (first, last)
        for number, (name, first, last) in enumerate(properties, start=1)
        if name == b"colr" and (own is None or number in own)
    ]


def _main_properties(data: bytes, pitm: tuple | None, ipma: tuple | None) -> set[int] | None:
    """Numbers, from 1, of the properties of the main item; None where the file does not say."""
    with contextlib.suppress(struct.error, TypeError):
        main = struct.unpack_from(">I" if data[pitm[0]] else ">H", data, pitm[0] + 4)[0]
        version, wide = data[ipma[0]], data[ipma[0] + 3] & 1
        (count,), place = struct.unpack_from(">I", data, ipma[0] + 4), ipma[0] + 8
        for _ in range(count):
            (item,) = struct.unpack_from(">I" if version else ">H", data, place)
            place += 4 if version else 2
            numbers, place = data[place], place + 1
            form = f">{numbers}{'H' if wide else 'B'}"
            if item == main:
                return {value & (0x7FFF if wide else 0x7F) for value in struct.unpack_from(form, data, place)}
            place += struct.calcsize(form)
    return None


def _gif_profile(data: bytes) -> bytes | None:
    """The profile in the application extension of a GIF, in blocks of at most 255 bytes."""
    place = data.find(b"\x21\xff\x0bICCRGBG1012")
    if place < 0:
        return None
    place, parts = place + 14, []
    while place < len(data) and data[place]:
        parts.append(data[place + 1 : place + 1 + data[place]])
        place += 1 + data[place]
    return _whole(b"".join(parts))


def _bmp_profile(data: bytes) -> bytes | None:
    """The profile that a BMP of version 4 or 5 embeds, or a profile built from its primaries and gammas."""
    size = int.from_bytes(data[14:18], "little")
    if size < 108 or len(data) < 14 + size:
        return None
    kind = int.from_bytes(data[70:74], "little").to_bytes(4, "big")
    if kind == b"LINK":
        raise _Unusable("linked")
    if kind == b"MBED" and size >= 124:
        start, length = struct.unpack_from("<2I", data, 126)
        return _whole(data[14 + start : 14 + start + length])
    points, gammas = struct.unpack_from("<9i", data, 74), struct.unpack_from("<3I", data, 110)
    if kind != bytes(4) or not any(points):
        return b""
    ends = np.array(points, dtype=np.float64).reshape(3, 3) / 2**30
    with np.errstate(all="ignore"):
        xy = [*ends.sum(0)[:2] / ends.sum(), *(ends[:, :2] / ends.sum(1, keepdims=True)).ravel()]
    encoding = 65536 / gammas[0] if gammas[0] else None
    if not gammas[0] == gammas[1] == gammas[2]:
        raise _Unusable("unknown")
    return _described_profile([float(value) for value in xy], encoding, "BMP")


def _exif_profile(image: Image.Image) -> bytes:
    """The profile that EXIF or TIFF tags describe: Adobe RGB of cameras, or primaries; b"" for none."""
    exif: Any = {}
    with contextlib.suppress(Exception):  # damaged EXIF raises nearly any type
        exif = image.getexif()
    if not exif:
        return b""
    space, index = None, ""
    with contextlib.suppress(Exception):
        space = exif.get_ifd(_EXIF).get(_COLOUR_SPACE)
        index = str(exif.get_ifd(_INTEROPERABILITY).get(1, ""))
    if space == 2 or (space != 1 and index.startswith("R03")):  # DCF 2.0: the optional colour space is Adobe RGB
        return _built_profile(_ADOBE, _D65, _gamma(563 / 256), "Adobe RGB (EXIF)")
    if space == 1 or _WHITE_POINT not in exif or _PRIMARIES not in exif:
        return b""
    try:
        points = [float(value) for value in (*exif[_WHITE_POINT], *exif[_PRIMARIES])]
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise _Unusable("unknown") from error
    if len(points) != 8:
        raise _Unusable("unknown")
    return _described_profile(points, None, "tags")


# ---------------------------------------------------------------------------------------------------------------------
# 3. Profiles built from primaries and a curve
# ---------------------------------------------------------------------------------------------------------------------

_D65, _WHITE_C = (0.3127, 0.3290), (0.310, 0.316)
_ADOBE = ((0.64, 0.33), (0.21, 0.71), (0.15, 0.06))
_SRGB = ((0.64, 0.33), (0.30, 0.60), (0.15, 0.06))
_SMPTE = ((0.630, 0.340), (0.310, 0.595), (0.155, 0.070))
_P3 = ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060))
# ITU-T H.273, table 2: code -> (name, primaries of red, green and blue, white).
_CODED_PRIMARIES = {
    1: ("BT.709", _SRGB, _D65),
    2: ("sRGB primaries", _SRGB, _D65),  # unspecified
    4: ("BT.470 M", ((0.67, 0.33), (0.21, 0.71), (0.14, 0.08)), _WHITE_C),
    5: ("BT.470 BG", ((0.64, 0.33), (0.29, 0.60), (0.15, 0.06)), _D65),
    6: ("BT.601", _SMPTE, _D65),
    7: ("SMPTE 240M", _SMPTE, _D65),
    8: ("film", ((0.681, 0.319), (0.243, 0.692), (0.145, 0.049)), _WHITE_C),
    9: ("BT.2020", ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046)), _D65),
    11: ("DCI-P3", _P3, (0.314, 0.351)),
    12: ("Display P3", _P3, _D65),
    22: ("EBU 3213", ((0.630, 0.340), (0.295, 0.605), (0.155, 0.077)), _D65),
}
Curve = tuple[float, float, float, float, float]  # g, a, b, c, d: (a x + b)**g where x >= d, else c x
_SRGB_CURVE: Curve = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
_BT_709_CURVE: Curve = (1 / 0.45, 1 / 1.099, 0.099 / 1.099, 1 / 4.5, 0.081)
_SMPTE_240_CURVE: Curve = (1 / 0.45, 1 / 1.1115, 0.1115 / 1.1115, 1 / 4, 0.0912)


def _gamma(exponent: float) -> Curve:
    return (exponent, 1.0, 0.0, 0.0, 0.0)


# ITU-T H.273, table 3: code -> curve from values to light.
_CODED_CURVES = {
    2: _SRGB_CURVE,  # unspecified
    4: _gamma(2.2),
    5: _gamma(2.8),
    7: _SMPTE_240_CURVE,
    8: _gamma(1.0),
    13: _SRGB_CURVE,
    **dict.fromkeys((1, 6, 11, 12, 14, 15), _BT_709_CURVE),
}


def _coded_profile(primaries: int, curve: int, where: str) -> bytes:
    """The profile of the codes of ITU-T H.273 for primaries and curve; b"" for sRGB."""
    if curve in (16, 18):
        raise _Unusable("HDR")
    if primaries not in _CODED_PRIMARIES or curve not in _CODED_CURVES:
        raise _Unusable("unknown")
    if primaries in (1, 2) and curve in (2, 13):
        return b""
    name, points, white = _CODED_PRIMARIES[primaries]
    return _built_profile(points, white, _CODED_CURVES[curve], f"{name}, transfer {curve} ({where})")


def _described_profile(points: Sequence[float] | None, encoding: float | None, where: str) -> bytes:
    """The profile of described colours; b"" for sRGB.

    Args:
        points: x, y of white, red, green and blue; None for those of sRGB.
        encoding: exponent from light to values; None for the curve of sRGB.
        where: what describes the colours, for the name.
    """
    standard = (*_D65, *(value for point in _SRGB for value in point))
    usual = points is None or max(abs(a - b) for a, b in zip(points, standard, strict=True)) < 0.003
    if encoding is not None and not 0.1 <= encoding <= 10:
        raise _Unusable("unknown")
    # 1 / 2.2 is what writers of sRGB put beside sRGB's primaries or alone.
    if usual and (encoding is None or abs(encoding - 1 / 2.2) < 0.005):
        return b""
    curve = _SRGB_CURVE if encoding is None else _gamma(1 / encoding)
    name = f"primaries ({where})" if encoding is None else f"gamma {1 / encoding:.2f} ({where})"
    if usual:
        return _built_profile(_SRGB, _D65, curve, name)
    red, green, blue = ((points[n], points[n + 1]) for n in (2, 4, 6))
    return _built_profile((red, green, blue), (points[0], points[1]), curve, name)


@functools.lru_cache(_CACHED)
def _built_profile(primaries: tuple, white: tuple, curve: Curve, name: str) -> bytes:
    """An ICC profile (version 4, matrix and curves) of an RGB space.

    Args:
        primaries: (x, y) of red, green and blue.
        white: (x, y) of white.
        curve: from values to light.
        name: the profile's description.

    Raises:
        _Unusable: the primaries span no space.
    """
    d50 = np.array([0.9642, 1.0, 0.8249])
    bradford = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
    try:
        if not all(0 <= x < 1 and 0 < y < 1 for x, y in (*primaries, white)):
            raise _Unusable("unknown")
        columns = np.array([[x / y, 1.0, (1 - x - y) / y] for x, y in primaries]).T
        white_xyz = np.array([white[0] / white[1], 1.0, (1 - sum(white)) / white[1]])
        columns = columns * np.linalg.solve(columns, white_xyz)
        adapted = np.linalg.inv(bradford) @ np.diag(bradford @ d50 / (bradford @ white_xyz)) @ bradford @ columns
    except np.linalg.LinAlgError as error:
        raise _Unusable("unknown") from error
    if not np.isfinite(adapted).all() or np.abs(adapted).max() > 10:
        raise _Unusable("unknown")

    def fixed(*values: float) -> bytes:
        return b"".join(struct.pack(">i", round(float(value) * 65536)) for value in values)

    text = name.encode("utf-16-be")
    tone = b"para\0\0\0\0\0\3\0\0" + fixed(*curve)
    tags = {
        b"desc": b"mluc\0\0\0\0" + struct.pack(">II4sII", 1, 12, b"enUS", len(text), 28) + text,
        b"wtpt": b"XYZ \0\0\0\0" + fixed(*d50),
        **{key: b"XYZ \0\0\0\0" + fixed(*adapted[:, n]) for n, key in enumerate((b"rXYZ", b"gXYZ", b"bXYZ"))},
        **dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), tone),
    }
    table, body, start = b"", b"", 132 + 12 * len(tags)
    for key, content in tags.items():
        table += key + struct.pack(">II", start + len(body), len(content))
        body += content + bytes(-len(content) % 4)
    head = struct.pack(">I4sI4s4s4s", start + len(body), b"", 0x04200000, b"mntr", b"RGB ", b"XYZ ")
    head += struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + fixed(*d50) + bytes(48)
    return head + struct.pack(">I", len(tags)) + table + body


# ---------------------------------------------------------------------------------------------------------------------
# 4. The conversion
# ---------------------------------------------------------------------------------------------------------------------


def to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """An image in sRGB, mode RGB.

    Args:
        image: in a mode of the profile's kind: L or I;16 for grey, RGB, or CMYK.
        profile: of `colours_of`.
    """
    return ImageCms.applyTransform(image, _transform(profile, image.mode, ImageCms.Intent.PERCEPTUAL))


@functools.lru_cache(_CACHED)
def _transform(profile: bytes, mode: str, intent: int) -> ImageCms.ImageCmsTransform:
    """The transform from a profile to sRGB; raises nearly any type for a bad profile.

    The flags are the defaults of ImageCms. For 16 bits, the default optimization would darken the darkest values.
    """
    source, flags = ImageCms.ImageCmsProfile(BytesIO(profile)), ImageCms.Flags.NONE
    if mode == "I;16":
        flags = ImageCms.Flags.NOOPTIMIZE
    return ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB", intent, flags)


@functools.lru_cache(_CACHED)
def _verdict(profile: bytes) -> str | None:
    """The name of a profile; "" for a profile that is sRGB under whatever name, None for an unusable profile."""
    mode = {b"GRAY": "L", b"RGB ": "RGB", b"CMYK": "CMYK"}[profile[16:20]]
    try:
        for intent in (ImageCms.Intent.PERCEPTUAL, ImageCms.Intent.RELATIVE_COLORIMETRIC):
            if mode != "CMYK" and _changes_nothing(_transform(profile, mode, intent), mode):
                return ""
        _transform(profile, mode, ImageCms.Intent.PERCEPTUAL)
        name = ImageCms.ImageCmsProfile(BytesIO(profile)).profile.profile_description or ""
    except Exception:  # LittleCMS and Pillow raise OSError, ValueError and others
        return None
    name = " ".join("".join(letter if letter.isprintable() else " " for letter in name).split())
    return name[:_MOST_NAME].strip() or "without a name"


def _changes_nothing(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Whether a transform moves no colour by more than `_NEAR` levels."""
    greys = np.arange(256, dtype=np.uint8)
    if mode == "L":
        before, image = np.repeat(greys[:, None], 3, axis=1), Image.fromarray(greys[None])
    else:
        steps = np.linspace(0, 255, 17).astype(np.uint8)
        grid = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(-1, 3)
        before = np.concatenate([grid, np.repeat(greys[:, None], 3, axis=1)])
        image = Image.fromarray(before[None])
    after = np.asarray(ImageCms.applyTransform(image, transform))[0]
    return int(np.abs(after.astype(int) - before).max()) <= _NEAR
