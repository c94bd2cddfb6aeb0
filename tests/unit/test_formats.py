"""Formats that everyone else takes, and sound pixels beside damaged metadata.

Metamorphic: the same picture under another name, in another format or with damage beside its pixels gives the same
pixels and the same caption. The plugin of the tests stands for pillow-heif: it reads an AVIF that calls itself HEIC.
"""

import importlib
import io
import os
import struct
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image, ImageFile, PngImagePlugin, features

from lpl_finetuning.data import formats, png_files
from lpl_finetuning.data.formats import IMAGE_EXTENSIONS, missing_reader, plugin_of
from lpl_finetuning.data.images import inspect, open_image
from lpl_finetuning.data.report import NOTE_REMARKS, build_report
from lpl_finetuning.data.samples import FramingRules
from lpl_finetuning.data.scan import scan_folder
from lpl_finetuning.errors import DataError
from tests.picture_folders import captions, image_bytes, listing, refusal, tar

pytestmark = pytest.mark.usefixtures("own_cache")

NOISE = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
KINDS = {".avif": "AVIF", ".bmp": "BMP", ".gif": "GIF", ".jp2": "JPEG2000", ".mpo": "MPO", ".png": "PNG"}
KINDS |= {".tif": "TIFF", ".webp": "WEBP", ".jpg": "JPEG", ".j2k": "JPEG2000"}
SPELLINGS = {".avifs": ".avif", ".apng": ".png", ".tiff": ".tif", **dict.fromkeys((".j2c", ".jpc"), ".j2k")}
SPELLINGS |= dict.fromkeys((".jpf", ".jpx"), ".jp2")
SPELLINGS |= dict.fromkeys((".jfif", ".jif", ".jpe", ".jpeg", ".pjp", ".pjpeg"), ".jpg")


def file_of(kind="PNG", image=NOISE, **options):
    buffer = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(buffer, kind, **options)
    return buffer.getvalue()


def pixels(data):
    return np.asarray(open_image(data, "it"))


def turned_by_6():
    """EXIF of a camera on its side; new for each file, since Pillow takes the orientation out when it writes AVIF."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def put(folder, name, data, caption="a"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(data)
    if caption:
        (folder / name).with_suffix(".txt").write_text(caption)


# ---------------------------------------------------------------------------------------------------------------------
# Endings
# ---------------------------------------------------------------------------------------------------------------------


def test_every_ending_is_taken_and_changes_nothing(tmp_path):
    assert {*KINDS, *SPELLINGS} == set(IMAGE_EXTENSIONS)
    for extension in IMAGE_EXTENSIONS:
        data = file_of(KINDS[SPELLINGS.get(extension, extension)])
        put(tmp_path / "set", f"of{extension[1:]}{extension.upper()}", data, extension)
    scan = scan_folder(tmp_path / "set")
    assert scan.warnings == [] and {image.caption for image in scan.images} == set(IMAGE_EXTENSIONS)
    own = {image.caption: pixels(image.read_bytes()) for image in scan.images}
    for spelling, extension in SPELLINGS.items():
        assert np.array_equal(own[spelling], own[extension]), spelling
    members = [(path.name, path.read_bytes()) for path in sorted((tmp_path / "set").iterdir())]
    tar(tmp_path / "shards/s.tar", *members)
    packed = scan_folder(tmp_path / "shards").images
    assert [(image.caption, image.content) for image in packed] == [
        (image.caption, image.content) for image in scan.images
    ]


FRAMES = [Image.new("RGB", (16, 12), color) for color in ((255, 0, 0), (0, 255, 0))]


def test_of_moving_pictures_the_first_is_taken_and_that_is_said(tmp_path):
    for name, kind, options in (
        ("a.apng", "PNG", {}), ("a.avif", "AVIF", {"quality": 100}), ("a.avifs", "AVIF", {"quality": 100}),
        ("b.apng", "PNG", {"default_image": True}), ("a.webp", "WEBP", {"lossless": True}), ("a.gif", "GIF", {}),
    ):  # fmt: skip
        data = file_of(kind, FRAMES[0], save_all=True, append_images=FRAMES[1:] * 2, **options)
        assert np.abs(pixels(data).astype(int) - (255, 0, 0)).max() <= 2, name
        put(tmp_path / "set", name, data)
    scan = scan_folder(tmp_path / "set")
    report = build_report(scan, [], FramingRules(8))
    [remark] = [line for line in report["remarks"] if "frames" in line]
    assert remark.startswith("6 images have several frames or pages; the first is used: a.apng")


@pytest.mark.parametrize("kind", ["AVIF", "JPEG", "PNG", "MPO"])
def test_new_endings_are_turned_upright_like_the_others(kind):
    options = {"AVIF": {"quality": 100, "subsampling": "4:4:4"}, "PNG": {}}.get(kind, {"quality": 100})
    data, plain = file_of(kind, exif=turned_by_6(), **options), file_of(kind, np.rot90(NOISE, -1).copy(), **options)
    assert inspect(data).size == (16, 12) and inspect(data).notes == ("rotated",)
    assert np.abs(pixels(data).astype(int) - pixels(plain)).mean() < (0 if kind == "PNG" else 12) + 0.01


# ---------------------------------------------------------------------------------------------------------------------
# Plugins
# ---------------------------------------------------------------------------------------------------------------------

PLUGIN = """
from io import BytesIO
from PIL import AvifImagePlugin, Image

class HeifImageFile(AvifImagePlugin.AvifImageFile):
    format = "HEIF"

    def _open(self):
        data = self.fp.read()
        self.fp = BytesIO(data[:64].replace(b"heic", b"avif") + data[64:])
        super()._open()

def register_heif_opener():
    Image.register_open("HEIF", HeifImageFile, lambda prefix: prefix[4:12] == b"ftypheic")
"""


def heic(**options):
    data = file_of("AVIF", quality=100, **options)
    return data[:64].replace(b"avif", b"heic") + data[64:]


JXL = b"\xff\x0a" + bytes(100)


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """A function that installs the plugin; gone after the test. Whatever is really installed is hidden."""
    found = importlib.util.find_spec
    hidden = {"pillow_heif", "pillow_jxl"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in hidden else found(name))
    formats.register.cache_clear()

    def install():
        (tmp_path / "site").mkdir()
        (tmp_path / "site/pillow_heif.py").write_text(PLUGIN)
        monkeypatch.syspath_prepend(tmp_path / "site")
        monkeypatch.delitem(sys.modules, "pillow_heif", raising=False)
        hidden.discard("pillow_heif")

    yield install
    formats.register.cache_clear()
    Image.OPEN.pop("HEIF", None)
    if "HEIF" in Image.ID:
        Image.ID.remove("HEIF")
    sys.modules.pop("pillow_heif", None)


def test_a_folder_of_pictures_that_need_a_plugin_says_so(tmp_path, plugin):
    put(tmp_path / "set", "a.heic", heic())
    put(tmp_path / "set", "b.HIF", heic())
    message = refusal(tmp_path / "set")
    assert "no images in" in message and "2 pictures in" in message
    assert "not read without a plugin of Pillow (pip install pillow-heif): a.heic, b.HIF." in message
    put(tmp_path / "set", "c.jxl", JXL)
    assert "(pip install pillow-heif pillow-jxl-plugin)" in refusal(tmp_path / "set")


def test_the_plugin_is_used_as_soon_as_it_is_installed(tmp_path, plugin):
    """Nothing that an earlier scan has stored stands in the way: by ending, by content, in a shard."""
    put(tmp_path / "set", "a.heic", heic(), "phone")
    put(tmp_path / "set", "b.jpg", heic(), "in disguise")
    put(tmp_path / "set", "z.png", file_of(), "z")
    tar(tmp_path / "set/s.tar", ("c.heic", heic()), ("c.txt", b"packed"), ("d.png", file_of()), ("d.txt", b"d"))
    assert "b.jpg: HEIC, which needs a plugin: pip install pillow-heif" in refusal(tmp_path / "set")
    scan = scan_folder(tmp_path / "set", on_bad_image="skip")
    assert captions(scan) == [("s.tar/d.png", "d"), ("z.png", "z")]
    assert scan.unused_captions["count"] == 0
    text = "\n".join(scan.warnings)
    assert "(pip install pillow-heif): a.heic." in text and "(pip install pillow-heif): s.tar/c.heic." in text
    plugin()
    scan = scan_folder(tmp_path / "set")
    assert [image.caption for image in scan.images] == ["phone", "in disguise", "packed", "d", "z"]
    assert scan.warnings == []
    for image in scan.images[:3]:
        assert np.array_equal(pixels(image.read_bytes()), pixels(file_of("AVIF", quality=100)))


def test_a_plugin_is_not_imported_unless_it_is_needed(tmp_path, plugin):
    plugin()
    put(tmp_path / "set", "z.png", file_of())
    put(tmp_path / "set", "y.avif", file_of("AVIF"))
    scan_folder(tmp_path / "set")
    assert "pillow_heif" not in sys.modules
    assert inspect(heic()).error == "" and "pillow_heif" in sys.modules
    assert inspect(heic()[:-200]).error and inspect(heic()[:40]).error == (
        "damaged, or a HEIC that pillow-heif can't read"
    )


def test_colours_and_orientation_of_a_plugin_are_those_of_the_other_formats(plugin):
    plugin()
    turned = heic(exif=turned_by_6())
    assert inspect(turned).format == "HEIF" and inspect(turned).size == (16, 12)
    assert np.array_equal(pixels(turned), pixels(file_of("AVIF", quality=100, exif=turned_by_6())))
    # Display P3 by the codes of nclx
    data = heic()
    place = data.index(b"colrnclx") + 8
    coded = data[:place] + struct.pack(">2H", 12, 13) + data[place + 4 :]
    assert inspect(coded).profile == "Display P3, transfer 13 (nclx)" and inspect(data).profile == ""
    back = coded[:64].replace(b"heic", b"avif") + coded[64:]
    assert np.array_equal(pixels(coded), pixels(back)) and not np.array_equal(pixels(coded), pixels(data))


def test_real_plugins_where_they_are_installed():
    pytest.importorskip("pillow_heif").register_heif_opener()
    pytest.importorskip("pillow_jxl")
    smooth = np.asarray(Image.fromarray(NOISE).resize((96, 64), Image.Resampling.BICUBIC))
    turned, plain = (
        file_of("HEIF", smooth, quality=100, exif=turned_by_6().tobytes()),
        file_of("HEIF", smooth, quality=100),
    )
    assert inspect(turned).size == (96, 64) and np.array_equal(pixels(turned), np.rot90(pixels(plain), -1))
    jxl = file_of("JXL", smooth, lossless=True)
    assert np.array_equal(pixels(jxl), smooth) and inspect(jxl).profile == ""
    # The standard of JPEG XL gives EXIF no say: the decoder turns what is to be turned.
    assert np.array_equal(pixels(file_of("JXL", smooth, lossless=True, exif=turned_by_6().tobytes())), smooth)


def test_what_the_first_bytes_say(monkeypatch):
    assert plugin_of(b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic" + bytes(50)).package == "pillow-heif"
    assert plugin_of(b"\0\0\0\x18ftypmif1\0\0\0\0mif1avif" + bytes(50)) is None
    assert plugin_of(JXL).package == "pillow-jxl-plugin" and plugin_of(file_of("AVIF")) is None
    for kind, name in (("AVIF", "AVIF"), ("JPEG2000", "JPEG 2000"), ("WEBP", "WebP")):
        data = file_of(kind)
        assert missing_reader(data) == ""
        with monkeypatch.context() as patch:
            patch.setattr(features, "check", lambda feature: False)
            patch.setattr(Image, "open", lambda *_: (_ for _ in ()).throw(Image.UnidentifiedImageError("")))
            assert inspect(data).error.startswith(f"{name}, which this build of Pillow can't read: pip install")
    lfs = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n"
    assert "git lfs pull" in inspect(lfs).error and "git annex get" in inspect(b"/annex/objects/SHA256-s1--00").error


# ---------------------------------------------------------------------------------------------------------------------
# Damage beside the pixels
# ---------------------------------------------------------------------------------------------------------------------


def chunk(name, content, crc=None):
    crc = zlib.crc32(name + content) if crc is None else crc
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", crc)


def png_with(*more, behind=False):
    data = file_of()
    place = len(data) - 12 if behind else 33
    return data[:place] + b"".join(more) + data[place:]


def with_wrong_checksum(data, name):
    place = data.index(name)
    (length,) = struct.unpack_from(">I", data, place - 4)
    end = place + 4 + length
    return data[:end] + bytes([data[end] ^ 1]) + data[end + 1 :]


WORKFLOW = b'{"nodes": []}' * 90_000
EXIF_6 = b"II*\0\x08\0\0\0\x01\0" + struct.pack("<HHIHH", 0x112, 3, 1, 6, 0) + bytes(4)
XMP_6 = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
BESIDE = {  # what lies beside the pixels -> (chunks, note)
    "text": ([chunk(b"tEXt", b"a\0b", 7)], "wrong checksum"),
    "size of a pixel": ([chunk(b"pHYs", struct.pack(">IIB", 1, 1, 0), 7)], "wrong checksum"),
    "unknown": ([chunk(b"prVt", b"x", 7)], "wrong checksum"),
    "exif": ([chunk(b"eXIf", EXIF_6, 7)], "wrong checksum"),
    "gamma": ([chunk(b"gAMA", struct.pack(">I", 100_000), 7)], "wrong checksum"),
    "key": ([chunk(b"tRNS", struct.pack(">3H", *map(int, NOISE[0, 0])), 7)], "wrong checksum"),
    "zTXt": ([chunk(b"zTXt", b"workflow\0\0" + zlib.compress(WORKFLOW))], "large text"),
    "iTXt": ([chunk(b"iTXt", b"workflow\0\1\0\0\0" + zlib.compress(WORKFLOW))], "large text"),
    "many texts": ([chunk(b"tEXt", b"workflow\0" + WORKFLOW)] * 2, "large text"),
    "both": ([chunk(b"tEXt", b"a\0b", 7), chunk(b"zTXt", b"w\0\0" + zlib.compress(WORKFLOW))], "large text"),
}


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("name", BESIDE)
def test_damage_beside_the_pixels_changes_no_pixel(name, behind, monkeypatch):
    if name == "many texts":  # of 64 MB as Pillow has it, the test would only be slower
        monkeypatch.setattr(PngImagePlugin, "MAX_TEXT_MEMORY", 2_000_000)
    parts, note = BESIDE[name]
    data = png_with(*parts, behind=behind)
    facts = inspect(data)
    assert facts.error == "" and note in facts.notes and len(facts.notes) == 1 + (name == "both")
    assert np.array_equal(pixels(data), NOISE) and facts.profile == facts.colour_remark == ""
    assert (facts.revision, facts.size, facts.format) == (0, NOISE.shape[:2], "PNG")


def test_small_and_sound_texts_are_no_fault():
    for more in (
        chunk(b"tEXt", b"a\0b"), chunk(b"zTXt", b"a\0\0" + zlib.compress(b"x" * 900_000)),
        chunk(b"tEXt", b"a\0" + WORKFLOW), chunk(b"zTXt", b"a\0\0no zlib"), chunk(b"zTXt", b""),
        chunk(b"iTXt", b"a\0\1"),
    ):  # fmt: skip
        data = png_with(more)
        assert inspect(data).notes == () and png_files.mended(data).data is data
        assert np.array_equal(pixels(data), NOISE)


def test_the_orientation_stays_where_a_workflow_is_left_out():
    big = chunk(b"zTXt", b"workflow\0\0" + zlib.compress(WORKFLOW))
    for own in (chunk(b"eXIf", EXIF_6), chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP_6)):
        data = png_with(own, big)
        assert inspect(data).notes == ("rotated", "large text") and inspect(data).size == (16, 12)
        assert np.array_equal(pixels(data), np.rot90(NOISE, -1))


@pytest.mark.parametrize("name", [b"IHDR", b"PLTE", b"IDAT"])
def test_a_wrong_checksum_of_the_pixels_is_an_error(name):
    image = Image.fromarray(NOISE).quantize(8) if name == b"PLTE" else NOISE
    data = with_wrong_checksum(file_of("PNG", image), name)
    reason = f"the checksum of its {name.decode()} chunk is wrong: the pixels are damaged"
    assert inspect(data).error == reason
    with pytest.raises(DataError, match=reason):
        open_image(data, "it")
    assert inspect(with_wrong_checksum(file_of(), b"IEND")).error == ""


def jpeg_with(exif, **options):
    return file_of("JPEG", exif=b"Exif\0\0" + exif, quality=100, **options)


def entries(*tags):
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + b"".join(tags) + bytes(4)


def test_broken_exif_beside_sound_pixels():
    six, plain = struct.pack("<HHIHH", 0x112, 3, 1, 6, 0), pixels(file_of("JPEG", quality=100))
    odd = struct.pack("<HHI4s", 0x11A, 2, 3, b"ab\0\0")  # a resolution that is a text: Pillow can't write it back
    lost = struct.pack("<HHII", 0x8769, 4, 1, 0xFFFFFF)
    for exif in (entries(six), entries(six, odd), entries(six, lost)):
        data = jpeg_with(exif)
        assert inspect(data).notes == ("rotated",) and np.array_equal(pixels(data), np.rot90(plain, -1))
    for data in (
        jpeg_with(b"garbage"), jpeg_with(b"MM\0*\xff\xff\xff\xff"), jpeg_with(entries(odd)[:12]),
        png_with(chunk(b"eXIf", b"garbage!")), png_with(chunk(b"tEXt", b"Raw profile type exif\0\nexif\n 4\nzzzz")),
        file_of("WEBP", exif=b"garbage!", lossless=True),
    ):  # fmt: skip
        assert inspect(data).notes == ("broken EXIF",) and inspect(data).error == ""
        assert np.array_equal(pixels(data), plain if data[:2] == b"\xff\xd8" else NOISE)
    for exif in (b"", bytes(20), entries(), b"MM\0*\0\0\0\x08" + bytes(6)):
        assert inspect(jpeg_with(exif)).notes == ()


def test_broken_exif_of_an_avif():
    sound = file_of("AVIF", quality=100, exif=entries(struct.pack("<HHI4s", 0x10F, 2, 4, b"abc\0")))
    place = sound.index(b"II*\0\x08")
    for damage in (b"II*\0\xff\xff\xff\xff", sound[place : place + 12] + b"\x05\0"):
        data = sound[:place] + damage + sound[place + len(damage) :]
        assert inspect(data).error == "" and np.array_equal(pixels(data), pixels(sound))
    assert inspect(sound[:place] + b"II*\0\xff\xff\xff\xff" + sound[place + 8 :]).notes == ("broken EXIF",)
    # Pillow writes the EXIF of a turned AVIF anew, and can't where a resolution is a text.
    make = struct.pack("<HHI", 0x10F, 2, 4)
    turned = file_of("AVIF", quality=100, exif=entries(make + b"abc\0", struct.pack("<HHIHH", 0x112, 3, 1, 6, 0)))
    data = turned.replace(make, struct.pack("<HHI", 0x11A, 2, 4))
    assert inspect(data).notes == ("rotated", "broken EXIF") and np.array_equal(pixels(data), pixels(turned))


def test_what_was_left_out_is_remarked_upon(tmp_path):
    put(tmp_path / "set", "exif.jpg", jpeg_with(b"garbage"))
    put(tmp_path / "set", "sum.png", png_with(chunk(b"tEXt", b"a\0b", 7)))
    put(tmp_path / "set", "text.png", png_with(chunk(b"zTXt", b"a\0\0" + zlib.compress(WORKFLOW))))
    for _ in range(2):  # the second scan reads nothing
        scan = scan_folder(tmp_path / "set")
        remarks = build_report(scan, [], FramingRules(8))["remarks"]
        for note, name in (("broken EXIF", "exif.jpg"), ("wrong checksum", "sum.png"), ("large text", "text.png")):
            [remark] = [line for line in remarks if line.endswith(f": {name}.")]
            assert NOTE_REMARKS[note][0] in remark


def test_no_setting_of_pillow_is_changed_and_threads_do_not_mix():
    files = [png_with(*parts) for parts, _ in BESIDE.values()] + [file_of(), jpeg_with(b"garbage")]
    settings = PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY, ImageFile.LOAD_TRUNCATED_IMAGES
    expected = [inspect(data) for data in files]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(inspect, files * 3)) == expected * 3
    assert settings == (
        PngImagePlugin.MAX_TEXT_CHUNK,
        PngImagePlugin.MAX_TEXT_MEMORY,
        ImageFile.LOAD_TRUNCATED_IMAGES,
    )
    with pytest.raises(ValueError, match="MAX_TEXT_CHUNK"):
        Image.open(io.BytesIO(png_with(*BESIDE["zTXt"][0])))


def test_listed_pictures_of_rare_kinds_and_raw_photographs(tmp_path):
    put(tmp_path / "set", "a.tga", file_of("TGA"), "")
    put(tmp_path / "set", "b.CR2", b"II*\0", "raw")
    put(tmp_path / "set", "z.png", image_bytes(), "z")
    text = "\n".join(scan_folder(tmp_path / "set").warnings)
    assert "only if a listing names them: a.tga." in text and "save them as .jpg or .png: b.CR2." in text
    assert "b.txt" not in text
    listing(tmp_path / "set", {"file_name": "a.tga", "text": "listed"})
    assert captions(scan_folder(tmp_path / "set")) == [("a.tga", "listed")]
    assert os.path.exists(tmp_path / "set/b.CR2")
