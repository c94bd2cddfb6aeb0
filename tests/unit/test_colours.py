"""Colours: every way in which a file names its colours ends in sRGB, or in a remark.

The reference is ImageCms itself, with the same intent. Profiles are built here, tag by tag; what Pillow does not
write is put into the files byte by byte.
"""

import struct
import zlib
from io import BytesIO

import datasets
import numpy as np
import pytest
from PIL import Image, ImageCms

from lpl_finetuning.data import colours, images
from lpl_finetuning.data.encoding import images_to_encode
from lpl_finetuning.data.images import inspect, open_image
from lpl_finetuning.data.report import build_report, refuse_remarks, report_lines
from lpl_finetuning.data.samples import FramingRules
from lpl_finetuning.data.scan import scan_dataset, scan_folder
from lpl_finetuning.errors import DataError
from tests.picture_folders import image_bytes, tar
from tests.unit.test_images import file_of, png

# ---------------------------------------------------------------------------------------------------------------------
# Profiles and files
# ---------------------------------------------------------------------------------------------------------------------


def fixed(*values):
    return b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def gamma(value):
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(value * 256))


def profile_of(space, name, tags, pcs=b"XYZ ", kind=b"mntr"):
    """An ICC profile of version 2."""
    text = name.encode() + b"\0"
    white = b"XYZ \0\0\0\0" + fixed(0.9642, 1, 0.8249)
    text = b"desc\0\0\0\0" + struct.pack(">I", len(text)) + text + bytes(78)
    tags = {b"desc": text, b"wtpt": white} | tags
    table, body = b"", b""
    for key, content in tags.items():
        table += key + struct.pack(">II", 132 + 12 * len(tags) + len(body), len(content))
        body += content + bytes(-len(content) % 4)
    head = struct.pack(">I4sI4s4s4s", 132 + len(table) + len(body), b"", 0x02400000, kind, space, pcs)
    head += struct.pack(">6H", 2024, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + fixed(0.9642, 1, 0.8249) + bytes(48)
    return head + struct.pack(">I", len(tags)) + table + body


def rgb_tags(exponent, *columns):
    points = {
        key: b"XYZ \0\0\0\0" + fixed(*xyz) for key, xyz in zip((b"rXYZ", b"gXYZ", b"bXYZ"), columns, strict=True)
    }
    return points | dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), gamma(exponent))


def rgb_profile(name, exponent, *columns):
    return profile_of(b"RGB ", name, rgb_tags(exponent, *columns))


def print_profile():
    """Lab of the corners of the CMYK cube, roughly as offset print."""
    corners = {0: (95, 0, -2), 8: (55, -37, -50), 4: (48, 74, -3), 2: (89, -5, 93), 1: (16, 0, 0)}
    corners |= {12: (24, 22, -46), 10: (50, -68, 33), 6: (47, 68, 48), 14: (23, 0, 0)}
    grid = b""
    for corner in range(16):
        share = 0.15 if corner & 1 and corner != 1 else 1  # with black ink
        lightness, a, b = (value * share for value in corners[corner & 14 or corner])
        grid += bytes([round(lightness * 2.55), round(a + 128), round(b + 128)])
    ramp = bytes(range(256))
    table = b"mft1\0\0\0\0\4\3\2\0" + fixed(1, 0, 0, 0, 1, 0, 0, 0, 1) + ramp * 4 + grid + ramp * 3
    return profile_of(b"CMYK", "test print", {b"A2B0": table}, b"Lab ", b"prtr")


# Columns adapted to D50, as the profiles of Apple and Adobe have them.
P3_COLUMNS = (0.51512, 0.2412, -0.00105), (0.29198, 0.69225, 0.04189), (0.1571, 0.06657, 0.78407)
ADOBE_COLUMNS = (0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457)
P3_TAGS = rgb_tags(2.2, *P3_COLUMNS)
P3 = profile_of(b"RGB ", "test P3", P3_TAGS)
ADOBE = rgb_profile("test Adobe RGB", 2.2, *ADOBE_COLUMNS)
LINEAR = profile_of(b"GRAY", "test linear grey", {b"kTRC": gamma(1.0)})
PRINT = print_profile()
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()

RNG = np.random.default_rng(0)
NOISE = RNG.integers(0, 256, (8, 8, 4), dtype=np.uint8)
EXACT = {
    "JPEG": {"quality": 100, "subsampling": 0},
    "MPO": {"quality": 100, "subsampling": 0},
    "WEBP": {"lossless": True},
    "AVIF": {"quality": 100},
}


def reference(image, profile):
    """What ImageCms makes of the pixels, uint8 (H, W, 3)."""
    done = ImageCms.profileToProfile(
        image, ImageCms.ImageCmsProfile(BytesIO(profile)), ImageCms.createProfile("sRGB"), outputMode="RGB"
    )
    return np.asarray(done).astype(float)


def flat(mode, color):
    return Image.new(mode, (16, 16), color)


def pixels_of(data):
    return np.asarray(open_image(data, "it")).astype(float)


def color_of(data):
    return tuple(int(value) for value in pixels_of(data)[3, 3])


def png_with(image, **chunks):
    """A PNG with further chunks before the pixels."""
    data = file_of(image, "PNG")
    for name, content in chunks.items():
        body = name.encode() + content
        data = data[:33] + struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body)) + data[33:]
    return data


def gif_with(image, profile):
    data = file_of(image, "GIF")
    place = data.index(b"\x2c" if b"\x21" not in data else b"\x21")
    blocks = b"".join(bytes([len(profile[n : n + 255])]) + profile[n : n + 255] for n in range(0, len(profile), 255))
    return data[:place] + b"\x21\xff\x0bICCRGBG1012" + blocks + b"\0" + data[place:]


def jp2_with(image, profile):
    data = bytearray(file_of(image, "JPEG2000"))
    place = data.index(b"colr") - 4
    (length,) = struct.unpack_from(">I", data, place)
    box = struct.pack(">I4s", 11 + len(profile), b"colr") + b"\2\0\0" + profile
    head = data.index(b"jp2h") - 4
    (size,) = struct.unpack_from(">I", data, head)
    data[head : head + 4] = struct.pack(">I", size - length + len(box))
    return bytes(data[:place] + box + data[place + length :])


def bmp_5(color, kind, points=(0,) * 9, exponents=(0, 0, 0), profile=b""):
    """One pixel, with a header of version 5."""
    fields = struct.pack("<IiiHHIIiiII", 124, 1, 1, 1, 24, 0, 4, 2835, 2835, 0, 0)
    fields += struct.pack("<4I", 0xFF0000, 0xFF00, 0xFF, 0) + kind[::-1] + struct.pack("<9i", *points)
    fields += struct.pack("<3I", *exponents) + struct.pack("<4I", 4, 128, len(profile), 0)
    body = bytes(color[::-1]) + b"\0" + profile
    return b"BM" + struct.pack("<IHHI", 138 + len(body), 0, 0, 138) + fields + body


def avif_with(image, primaries, transfer):
    data = file_of(image, "AVIF", quality=100)
    place = data.index(b"colrnclx") + 8
    return data[:place] + struct.pack(">2H", primaries, transfer) + data[place + 4 :]


# ---------------------------------------------------------------------------------------------------------------------
# Profiles
# ---------------------------------------------------------------------------------------------------------------------


def test_known_colours():
    assert (
        np.abs(np.subtract(color_of(file_of(flat("RGB", (200, 60, 60)), "PNG", icc_profile=P3)), (219, 37, 49))).max()
        <= 2
    )
    assert (
        np.abs(
            np.subtract(color_of(file_of(flat("RGB", (200, 60, 60)), "PNG", icc_profile=ADOBE)), (231, 57, 57))
        ).max()
        <= 2
    )
    assert color_of(file_of(flat("L", 64), "PNG", icc_profile=LINEAR)) == (137, 137, 137)
    cyan = color_of(file_of(flat("CMYK", (255, 0, 0, 0)), "TIFF", icc_profile=PRINT))
    assert np.abs(np.subtract(cyan, (0, 150, 218))).max() <= 2


@pytest.mark.parametrize("profile", [P3, ADOBE])
@pytest.mark.parametrize(
    "kind", ["PNG", "JPEG", "WEBP", "TIFF", "AVIF", "MPO", "gif", "jp2", "bmp", "palette", "bmp grey", "apng", "avifs"]
)
def test_every_format_is_converted(kind, profile):
    image, before = flat("RGB", (200, 60, 60)), flat("RGB", (200, 60, 60))
    if kind == "gif":
        data = gif_with(image.quantize(4), profile)
    elif kind == "jp2":
        data = jp2_with(image, profile)
    elif kind == "bmp":
        data, before = bmp_5((200, 60, 60), b"MBED", profile=profile), Image.new("RGB", (1, 1), (200, 60, 60))
    elif kind in ("apng", "avifs"):
        more = [flat("RGB", (0, 200, 0))] * 2
        name = {"apng": "PNG", "avifs": "AVIF"}[kind]
        data = file_of(image, name, save_all=True, append_images=more, icc_profile=profile, **EXACT.get(name, {}))
    elif kind == "palette":
        data = file_of(image.quantize(4), "PNG", icc_profile=profile)
    elif kind == "bmp grey":
        data, before = gif_with(flat("L", 60), profile), flat("RGB", (60, 60, 60))  # grey palettes open as greyscale
    else:
        data = file_of(image, kind, icc_profile=profile, **EXACT.get(kind, {}))
    facts = inspect(data)
    assert facts.profile.startswith("test ") and facts.revision == 1 and (facts.colour_remark, facts.error) == ("", "")
    assert np.abs(pixels_of(data) - reference(before, profile)).max() <= (3 if kind in ("JPEG", "MPO") else 2)


def test_a_profile_too_large_for_pillow_is_used_all_the_same():
    """More than 1 MB after decompression: Pillow refuses the PNG."""
    large = profile_of(b"RGB ", "test large", P3_TAGS | {b"targ": b"text\0\0\0\0" + bytes(1_200_000)})
    data, plain = (png_with(flat("RGB", (200, 60, 60)), iCCP=icc_chunk(profile)) for profile in (large, P3))
    assert inspect(data).profile == "test large" and inspect(data).colour_remark == ""
    assert np.array_equal(pixels_of(data), pixels_of(plain))
    broken = png_with(flat("RGB", (200, 60, 60)), iCCP=b"p\0\0" + zlib.compress(bytes(1_200_000)))
    assert (inspect(broken).colour_remark, inspect(broken).error) == ("broken", "")


def test_every_pixel_is_converted_as_by_imagecms():
    rgb = Image.fromarray(NOISE[..., :3])
    for profile in (P3, ADOBE):
        assert np.array_equal(pixels_of(file_of(rgb, "PNG", icc_profile=profile)), reference(rgb, profile))
    grey, ink = Image.fromarray(NOISE[..., 0]), Image.fromarray(NOISE, "CMYK")
    assert np.array_equal(pixels_of(file_of(grey, "TIFF", icc_profile=LINEAR)), reference(grey, LINEAR))
    assert np.array_equal(pixels_of(file_of(ink, "TIFF", icc_profile=PRINT)), reference(ink, PRINT))
    bits = Image.fromarray(NOISE[..., 0] > 128)
    assert np.array_equal(pixels_of(file_of(bits, "PNG", icc_profile=LINEAR)), reference(bits.convert("L"), LINEAR))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "PA", "L"])
def test_transparency_is_composited_after_the_conversion(mode):
    profile, options, kind = P3, {}, "PNG"
    image = Image.fromarray(NOISE)
    if mode in ("LA", "L"):
        profile, image = LINEAR, image.convert("LA")
    alpha = image.getchannel("A")
    if mode in ("P", "PA"):
        image = image.convert("RGB").quantize(16)
        base = image.convert("RGB")
        if mode == "PA":
            kind, image = "TIFF", image.copy()
            image = image.convert("PA")
            image.putalpha(alpha)
        else:
            values = bytes(range(0, 256, 16))
            options, alpha = (
                {"transparency": values},
                Image.fromarray(np.asarray(bytearray(values))[np.asarray(image)]),
            )
    else:
        base = image.convert("L" if mode == "LA" else "RGB") if mode != "L" else image.getchannel("L")
    if mode == "L":
        image, options = base, {"transparency": int(np.asarray(base)[0, 0])}
        alpha = Image.fromarray(np.where(np.asarray(base) == np.asarray(base)[0, 0], 0, 255).astype(np.uint8))
    data = file_of(image, kind, icc_profile=profile, **options)
    share = np.asarray(alpha)[..., None] / 255.0
    expected = reference(base, profile) * share + 255 * (1 - share)
    assert np.abs(pixels_of(data) - expected).max() <= 1.5 and "transparent" in inspect(data).notes


def test_deep_greyscale_is_converted_with_all_its_bits():
    values = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    dark = np.linspace(0, 514, 256, dtype=np.uint16).reshape(16, 16)
    for deep in (values, dark):
        light = deep / 65535
        expected = 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
        for kind in ("PNG", "TIFF"):
            data = file_of(deep, kind, icc_profile=LINEAR)
            assert np.abs(pixels_of(data) - expected[..., None]).max() <= 1
            assert inspect(data).notes == ("16-bit", "grayscale") and inspect(data).profile
    floats = file_of((values / 65535).astype(np.float32), "TIFF", icc_profile=LINEAR)
    assert np.abs(pixels_of(floats) - pixels_of(file_of(values, "TIFF", icc_profile=LINEAR))).max() <= 1


def icc_chunk(profile):
    return b"p\0\0" + zlib.compress(profile)


def test_deep_colours_and_deep_greyscale_with_transparency():
    chunk = icc_chunk(P3)
    data = png(2, 1, 16, 2, [np.array([[200, 60, 60]] * 2, ">u2").__mul__(257).astype(">u2").tobytes()])
    body = b"iCCP" + chunk
    data = data[:33] + struct.pack(">I", len(chunk)) + body + struct.pack(">I", zlib.crc32(body)) + data[33:]
    assert np.abs(pixels_of(data) - reference(Image.new("RGB", (2, 1), (200, 60, 60)), P3)).max() <= 1
    data = png(2, 1, 16, 4, [struct.pack(">4H", 64 * 257, 65535, 64 * 257, 0)])
    chunk = icc_chunk(LINEAR)
    body = b"iCCP" + chunk
    data = data[:33] + struct.pack(">I", len(chunk)) + body + struct.pack(">I", zlib.crc32(body)) + data[33:]
    assert pixels_of(data).tolist() == [[[137] * 3, [255] * 3]] and inspect(data).colour_remark == ""


def test_turned_photographs_are_converted_too():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = file_of(flat("RGB", (200, 60, 60)).resize((16, 8)), "JPEG", icc_profile=P3, exif=exif, **EXACT["JPEG"])
    facts = inspect(data)
    assert facts.size == (16, 8) and facts.notes == ("rotated",) and facts.profile == "test P3"
    assert np.abs(pixels_of(data) - (219, 37, 49)).max() <= 2 and pixels_of(data).shape == (16, 8, 3)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "AVIF"])
def test_srgb_is_left_alone_to_the_last_bit(kind):
    image = Image.fromarray(NOISE[..., :3])
    with_profile = file_of(image, kind, icc_profile=SRGB, **EXACT.get(kind, {}))
    without = file_of(image, kind, **EXACT.get(kind, {}))
    assert np.array_equal(pixels_of(with_profile), pixels_of(without))
    facts = inspect(with_profile)
    assert (facts.profile, facts.colour_remark, facts.revision) == ("", "", 0)


def test_names_of_profiles_do_not_count():
    named = rgb_profile("sRGB IEC61966-2.1", 2.2, *P3_COLUMNS)
    data = file_of(flat("RGB", (200, 60, 60)), "PNG", icc_profile=named)
    assert np.abs(np.subtract(color_of(data), (219, 37, 49))).max() <= 2
    assert inspect(data).profile == "sRGB IEC61966-2.1"
    odd = rgb_profile("a\x01,b\n" + "c" * 100, 2.2, *P3_COLUMNS)
    assert inspect(file_of(flat("RGB", 0), "PNG", icc_profile=odd)).profile == "a ,b " + "c" * 55


def test_grey_with_a_profile_for_rgb_is_converted_and_remarked():
    data = file_of(flat("L", 60), "PNG", icc_profile=rgb_profile("dark", 1.0, *P3_COLUMNS))
    facts = inspect(data)
    assert color_of(data) == (133, 133, 133) and (facts.profile, facts.colour_remark) == ("dark", "RGB for grey")
    assert inspect(file_of(flat("L", 60), "JPEG", icc_profile=SRGB)).colour_remark == ""


WRONG = {
    "grey for RGB": ("RGB", LINEAR, "other kind"),
    "RGB for CMYK": ("CMYK", P3, "other kind"),
    "CMYK for RGB": ("RGB", PRINT, "other kind"),
    "CMYK for grey": ("L", PRINT, "other kind"),
    "grey for CMYK": ("CMYK", LINEAR, "other kind"),
    "Lab": ("RGB", profile_of(b"Lab ", "lab", {}), "other kind"),
    "no kind": ("RGB", P3[:16] + b"oops" + P3[20:], "broken"),
    "cut": ("RGB", P3[:-20], "broken"),
    "cut behind all that counts": ("RGB", profile_of(b"RGB ", "test", P3_TAGS | {b"cprt": bytes(40)})[:-8], "broken"),
    "half": ("RGB", P3[: len(P3) // 2], "broken"),
    "header": ("RGB", P3[:60], "broken"),
    "noise": ("RGB", bytes(range(256)), "broken"),
    "zeros": ("RGB", bytes(400), "broken"),
    "no tags": ("RGB", profile_of(b"RGB ", "bare", {}), "broken"),
    "link": ("RGB", P3[:12] + b"link" + P3[16:], "broken"),
}


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP", "AVIF"])
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_profile_is_a_remark(name, kind):
    mode, profile, remark = WRONG[name]
    if (mode == "CMYK" and kind not in ("JPEG", "TIFF")) or (mode == "L" and kind == "WEBP"):
        pytest.skip("no such files")
    image = flat(mode, {"RGB": (200, 60, 60), "CMYK": (200, 60, 0, 0), "L": 60}[mode])
    data, plain = (file_of(image, kind, **EXACT.get(kind, {}), **more) for more in ({"icc_profile": profile}, {}))
    facts = inspect(data)
    assert (facts.colour_remark, facts.profile, facts.revision, facts.error) == (remark, "", 0, "")
    assert np.array_equal(pixels_of(data), pixels_of(plain))


def test_a_profile_that_pillow_can_not_take_out_is_a_remark():
    image = flat("RGB", (200, 60, 60))
    jpeg = file_of(image, "JPEG", icc_profile=P3)
    place = jpeg.index(b"ICC_PROFILE\0") + 12
    tiff = file_of(image, "TIFF", icc_profile=b"")
    webp = bytearray(file_of(Image.fromarray(NOISE), "WEBP", exif=b"Exif\0\0"))
    webp[20] |= 0x20
    for data in (
        png_with(image, iCCP=b"p\0\0" + zlib.compress(P3)[:-9]),
        png_with(image, iCCP=b"p\0\0no zlib"),
        png_with(image, iCCP=b"p\0\7" + zlib.compress(P3)),
        png_with(image, iCCP=b""),
        png_with(image, iCCP=b"p\0\0" + zlib.compress(b"")),
        jpeg[:place] + b"\1\2" + jpeg[place + 2 :],  # the first of two parts
        gif_with(image.quantize(2), b""),
        bmp_5((200, 60, 60), b"MBED"),
        bytes(webp),
    ):
        facts = inspect(data)
        assert (facts.colour_remark, facts.error, facts.revision) == ("broken", "", 0), data[:40]
        assert open_image(data, "it").mode == "RGB"
    assert inspect(tiff).error == ""
    assert inspect(bmp_5((200, 60, 60), b"LINK")).colour_remark == "linked"


# ---------------------------------------------------------------------------------------------------------------------
# Colours that are named without a profile
# ---------------------------------------------------------------------------------------------------------------------

RED = (200, 60, 60)
SRGB_POINTS = (31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000)
P3_POINTS = (31270, 32900, 68000, 32000, 26500, 69000, 15000, 6000)
ADOBE_POINTS = (31270, 32900, 64000, 33000, 21000, 71000, 15000, 6000)


def gama(exponent):
    return struct.pack(">I", round(exponent * 1e5))


def exif_file(kind="JPEG", space=None, points=None):
    exif = Image.Exif()
    if space is not None:
        exif.get_ifd(0x8769)[0xA001] = space
    if points is not None:
        exif[0x013E], exif[0x013F] = points[:2], points[2:]
    return file_of(flat("RGB", RED), kind, exif=exif, **EXACT.get(kind, {}))


def camera_file(index):
    """A JPEG with the tags of DCF: colour space uncalibrated, and the index of interoperability."""

    def folder(*entries):
        return struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)

    exif = b"Exif\0\0II*\0\x08\0\0\0" + folder(struct.pack("<HHII", 0x8769, 4, 1, 26))
    exif += folder(struct.pack("<HHIHH", 0xA001, 3, 1, 65535, 0), struct.pack("<HHII", 0xA005, 4, 1, 56))
    exif += folder(struct.pack("<HHI4s", 1, 2, 4, index))
    return file_of(flat("RGB", RED), "JPEG", exif=exif, **EXACT["JPEG"])


def test_what_files_name_without_a_profile_is_converted():
    srgb_p3 = (217, 42, 52)  # Display P3 has the curve of sRGB
    red, p3_points = flat("RGB", RED), struct.pack(">8I", *P3_POINTS)
    cases = {
        "cICP P3": (png_with(red, cICP=bytes([12, 13, 0, 1])), srgb_p3),
        "cICP before iCCP": (png_with(red, cICP=bytes([12, 13, 0, 1]), iCCP=icc_chunk(ADOBE)), srgb_p3),
        "cICP linear": (png_with(flat("L", 64), cICP=bytes([1, 8, 0, 1])), (137,) * 3),
        "nclx P3": (avif_with(red, 12, 13), srgb_p3),
        "nclx linear": (avif_with(flat("L", 64), 1, 8), (137,) * 3),
        "gAMA 1": (png_with(flat("L", 64), gAMA=gama(1)), (137,) * 3),
        "gAMA 1 of a palette": (png_with(flat("RGB", (64, 64, 64)).quantize(2), gAMA=gama(1)), (137,) * 3),
        "cHRM": (png_with(red, cHRM=p3_points), srgb_p3),
        "gAMA and cHRM": (png_with(red, gAMA=gama(1 / 2.2), cHRM=struct.pack(">8I", *ADOBE_POINTS)), (231, 57, 57)),
        "Adobe RGB of a camera": (camera_file(b"R03\0"), (231, 57, 57)),
        "EXIF 2": (exif_file(space=2), (231, 57, 57)),
        "EXIF 2, WebP": (exif_file("WEBP", space=2), (231, 57, 57)),
        "EXIF points": (exif_file(points=[value / 1e5 for value in P3_POINTS]), srgb_p3),
        "BMP": (
            bmp_5(RED, bytes(4), [round(v * 2**30) for v in (0.64, 0.33, 0.03, 0.21, 0.71, 0.08, 0.15, 0.06, 0.79)],
                  [144179] * 3), None,
        ),
    }  # fmt: skip
    for name, (data, expected) in cases.items():
        facts = inspect(data)
        assert facts.profile and facts.revision == 1 and facts.colour_remark == "", name
        if expected is not None:
            assert np.abs(pixels_of(data)[0, 0] - expected).max() <= 2, (name, pixels_of(data)[0, 0])


def test_what_names_srgb_is_left_alone():
    red, points = flat("RGB", RED), struct.pack(">8I", *SRGB_POINTS)
    for data in (
        png_with(red, sRGB=b"\0", gAMA=gama(1), cHRM=struct.pack(">8I", *P3_POINTS)),
        png_with(red, gAMA=gama(1 / 2.2)),
        png_with(red, gAMA=gama(0.45455), cHRM=points),
        png_with(red, cHRM=points),
        png_with(red, cICP=bytes([1, 13, 0, 1])),
        png_with(red, cICP=bytes([2, 2, 0, 1])),
        png_with(red, cICP=bytes([1, 13, 0, 1]), iCCP=icc_chunk(P3)),
        avif_with(red, 1, 13),
        avif_with(red, 2, 2),
        exif_file(space=1, points=[value / 1e5 for value in P3_POINTS]),
        exif_file(space=65535),
        camera_file(b"R98\0"),
        bmp_5(RED, b"sRGB"),
        bmp_5(RED, b"Win "),
        bmp_5(RED, bytes(4)),
    ):
        facts = inspect(data)
        assert (facts.profile, facts.colour_remark, facts.revision) == ("", "", 0), data[:60]


def test_what_can_not_be_converted_is_remarked():
    red = flat("RGB", RED)
    for data, remark in (
        (png_with(red, cICP=bytes([9, 16, 0, 1])), "HDR"),
        (png_with(red, cICP=bytes([9, 18, 0, 1])), "HDR"),
        (avif_with(red, 9, 16), "HDR"),
        (png_with(red, cICP=bytes([12, 13, 0, 0])), "unknown"),
        (png_with(red, cICP=bytes([12, 13, 1, 1])), "unknown"),
        (png_with(red, cICP=bytes([99, 13, 0, 1])), "unknown"),
        (avif_with(red, 12, 9), "unknown"),
        (png_with(red, gAMA=gama(0)), "unknown"),
        (png_with(red, cHRM=bytes(32)), "unknown"),
        (png_with(red, cHRM=struct.pack(">8I", *[30000] * 8)), "unknown"),
        (exif_file(points=[0.3, 0.3, 0.6]), "unknown"),
        (bmp_5(RED, bytes(4), [1] * 9), "unknown"),
    ):
        facts = inspect(data)
        assert (facts.colour_remark, facts.profile, facts.revision, facts.error) == (remark, "", 0, ""), data[:60]
        assert np.abs(pixels_of(data)[0, 0] - RED).max() <= 2
    fallback = png_with(red, cICP=bytes([9, 16, 0, 1]), iCCP=icc_chunk(P3))
    assert inspect(fallback).profile == "test P3" and np.abs(pixels_of(fallback)[0, 0] - (219, 37, 49)).max() <= 2


def test_random_damage_of_colours_raises_nothing():
    """A damaged file has either a size or a reason; a part of the files can be used all the same."""
    rng = np.random.default_rng(1)
    red = flat("RGB", RED)
    files = [
        file_of(red, kind, icc_profile=P3, **EXACT.get(kind, {})) for kind in ("PNG", "JPEG", "TIFF", "WEBP", "AVIF")
    ]
    files += [
        avif_with(red, 12, 13),
        jp2_with(red, P3),
        gif_with(red.quantize(2), P3),
        bmp_5(RED, b"MBED", profile=P3),
    ]
    usable = []
    for data in files:
        for _ in range(30):
            damaged = bytearray(data)
            for place in rng.integers(0, min(len(data), 900), rng.integers(1, 6)):
                damaged[place] = rng.integers(256)
            facts = inspect(bytes(damaged))
            assert (facts.size == (0, 0)) == bool(facts.error)
            usable.append(not facts.error)
    assert 0.2 < np.mean(usable) < 0.8


# ---------------------------------------------------------------------------------------------------------------------
# Scans
# ---------------------------------------------------------------------------------------------------------------------


def three_sources(root):
    """{source: scan} of the same four pictures in a folder, a shard and a data set."""
    files = {
        "adobe.png": file_of(flat("RGB", RED), "PNG", icc_profile=ADOBE),
        "cut.png": file_of(flat("RGB", RED), "PNG", icc_profile=P3[:-20]),
        "p3.png": file_of(flat("RGB", RED), "PNG", icc_profile=P3),
        "plain.png": file_of(flat("RGB", RED), "PNG"),
    }
    for name, data in files.items():
        (root / "folder").mkdir(parents=True, exist_ok=True)
        (root / "folder" / name).write_bytes(data)
    tar(root / "shards/s.tar", *files.items())
    cells = [{"bytes": data, "path": None} for data in files.values()]
    data = datasets.Dataset.from_dict({"image": cells, "text": ["a"] * 4}).cast_column("image", datasets.Image())
    data.save_to_disk(root / "set")
    return {
        "folder": scan_folder(root / "folder", default_caption="a"),
        "shard": scan_folder(root / "shards", default_caption="a"),
        "data set": scan_dataset(str(root / "set")),
    }


@pytest.mark.usefixtures("own_cache")
def test_folders_shards_and_data_sets_are_converted_alike_and_reported(tmp_path):
    for scan in three_sources(tmp_path).values():
        opened = [np.asarray(open_image(image.read_bytes(), image.place))[0, 0].tolist() for image in scan.images]
        assert np.abs(np.subtract(opened, [(231, 57, 57), RED, (219, 37, 49), RED])).max() <= 2
        report = build_report(scan, [], FramingRules(8))
        assert {name: found["count"] for name, found in report["profiles"].items()} == {
            "test Adobe RGB": 1,
            "test P3": 1,
        }
        assert "colours       converted to sRGB from test Adobe RGB 1, test P3 1" in report_lines(report)
        [remark] = [line for line in report["remarks"] if "colour profile" in line]
        assert remark.startswith("1 image holds a colour profile that can't be used")
        with pytest.raises(DataError, match="colour profile"):
            refuse_remarks(report)
        # Encodings of converted pictures have keys of their own; all others keep their keys.
        framing = FramingRules(8, center_crop=True).framing(scan.images)
        keys, items = zip(*images_to_encode(scan.images, framing), strict=True)
        cuts = [framing.cut(image, view)[0][4, 4].tolist() for image, view, _ in items]
        assert np.abs(np.subtract(cuts, opened)).max() <= 1
        wanted = ["-revision1-8x8", "-8x8", "-revision1-8x8", "-8x8"]
        assert [*keys] == [image.content + end for image, end in zip(scan.images, wanted, strict=True)]


def test_pictures_without_a_profile_cost_nothing(monkeypatch):
    def fail(*_):
        raise AssertionError("LittleCMS was called")

    monkeypatch.setattr(colours, "_transform", fail)
    monkeypatch.setattr(images, "to_srgb", fail)
    for kind in ("PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP"):
        data = file_of(flat("RGB", RED), kind)
        assert inspect(data).error == "" and open_image(data, "it")
    assert inspect(image_bytes()).error == ""


def test_a_profile_is_looked_into_once(monkeypatch):
    built = []
    build = ImageCms.buildTransform
    monkeypatch.setattr(ImageCms, "buildTransform", lambda *args: built.append(args[2]) or build(*args))
    colours._transform.cache_clear()
    colours._verdict.cache_clear()
    for color in range(5):
        data = file_of(flat("RGB", (color, 60, 60)), "PNG", icc_profile=P3)
        inspect(data)
        open_image(data, "it")
    assert len(built) == 2  # perceptual, and relative colorimetric to recognise sRGB
