"""Formats of images: the endings that are taken, the plugins of Pillow, and what the bytes say where no reader fits.

A plugin is imported when the first image needs the plugin, and then stays registered with Pillow, beside Pillow's own
readers. Importing this file imports no plugin and no torch.
"""

import functools
import importlib
import importlib.util
import re
from typing import NamedTuple

from PIL import features

# Endings in lower case. What a file holds follows from the bytes and not from the ending.
IMAGE_EXTENSIONS = (
    *(".apng", ".avif", ".avifs", ".bmp", ".gif", ".j2c", ".j2k", ".jfif", ".jif", ".jp2", ".jpc", ".jpe", ".jpeg"),
    *(".jpf", ".jpg", ".jpx", ".mpo", ".pjp", ".pjpeg", ".png", ".tif", ".tiff", ".webp"),
)
SHOWN_EXTENSIONS = ".jpg, .png, .webp, .avif, .tif, .gif, .bmp and .jp2, with their other spellings,"  # for messages


class Plugin(NamedTuple):
    """A package that teaches Pillow a format.

    Attributes:
        kind: the format in messages.
        format: Pillow's name of the format.
        package: what pip installs.
        module: what Python imports.
        extensions: endings of such files, in lower case.
    """

    kind: str
    format: str
    package: str
    module: str
    extensions: tuple[str, ...]


PLUGINS = (
    Plugin("HEIC", "HEIF", "pillow-heif", "pillow_heif", (".heic", ".heics", ".heif", ".heifs", ".hif")),
    Plugin("JPEG XL", "JXL", "pillow-jxl-plugin", "pillow_jxl", (".jxl",)),
)
_HEIF, _JXL = PLUGINS
PLUGIN_EXTENSIONS = {extension: plugin for plugin in PLUGINS for extension in plugin.extensions}

_HEVC = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"}  # brands of HEIF with HEVC
_AV1 = {b"avif", b"avis"}
_JXL_BOX = b"\0\0\0\x0cJXL \r\n\x87\n"
_BUILT_IN = {  # format -> (name of the feature in Pillow, what the format is called)
    "AVIF": ("avif", "AVIF"),
    "JPEG2000": ("jpg_2000", "JPEG 2000"),
    "WEBP": ("webp", "WebP"),
}


def is_installed(plugin: Plugin) -> bool:
    """Whether a plugin can be imported; the plugin is not imported yet."""
    try:
        return importlib.util.find_spec(plugin.module) is not None
    except (ImportError, ValueError):
        return False


def taken_extensions() -> set[str]:
    """The endings of files that are images here and now: with those of the plugins that are installed."""
    taken = set(IMAGE_EXTENSIONS)
    for plugin in PLUGINS:
        if is_installed(plugin):
            taken.update(plugin.extensions)
    return taken


def plugin_of(data: bytes) -> Plugin | None:
    """The plugin that an image needs, by the first bytes; None where Pillow's own readers are to try."""
    if data[:2] == b"\xff\x0a" or data[:12] == _JXL_BOX:
        return _JXL
    brands = _brands(data)
    return _HEIF if brands & _HEVC and not brands & _AV1 else None


def _brands(data: bytes) -> set[bytes]:
    """The brands in the first box of an ISO file (AVIF, HEIC); empty for any other file."""
    if data[4:8] != b"ftyp":
        return set()
    box = data[8 : min(int.from_bytes(data[:4], "big"), 256)]
    return {box[:4], *(box[place : place + 4] for place in range(8, len(box) - 3, 4))}


@functools.cache
def register(plugin: Plugin) -> None:
    """Let Pillow open the format of a plugin. A second call does nothing.

    Raises:
        ImportError: the plugin is not installed, or can't be imported; other types from a broken plugin.
    """
    module = importlib.import_module(plugin.module)  # JPEG XL registers itself
    if plugin is _HEIF:
        module.register_heif_opener()


def missing_reader(data: bytes) -> str:
    """Why an image can't be read until something is installed or fetched, without a full stop; "" for other reasons.

    Such a reason may be gone at the next start, although the file is the same.
    """
    plugin = plugin_of(data)
    if plugin is not None:
        return "" if is_installed(plugin) else f"{plugin.kind}, which needs a plugin: {_pip(plugin)}"
    feature, kind = _BUILT_IN.get(_format_in_header(data), ("", ""))
    if feature and not features.check(feature):
        return f"{kind}, which this build of Pillow can't read: pip install --upgrade --force-reinstall pillow"
    return ""


def install_advice(extensions: list[str]) -> str:
    """The one command that installs the plugins for some endings."""
    packages = {PLUGIN_EXTENSIONS[extension].package for extension in extensions}
    return f"pip install {' '.join(sorted(packages))}"


def _pip(plugin: Plugin) -> str:
    return f"pip install {plugin.package}"


def _format_in_header(data: bytes) -> str:
    """The format of `_BUILT_IN` that the first bytes announce; "" for any other."""
    if _brands(data) & _AV1:
        return "AVIF"
    if data[:12] == b"\0\0\0\x0cjP  \r\n\x87\n" or data[:4] == b"\xff\x4f\xff\x51":
        return "JPEG2000"
    return "WEBP" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else ""


_POINTERS = (  # what programs put in the place of a file that is kept elsewhere
    (
        re.compile(rb"version https://git-lfs\.github\.com/spec/"),
        "a pointer of Git LFS; git lfs pull fetches the file",
    ),
    (re.compile(rb"/annex/objects/"), "a pointer of git-annex; git annex get fetches the file"),
)


def why_unknown(data: bytes) -> str:
    """Why no reader accepts a file, without a full stop."""
    for pattern, reason in _POINTERS:
        if pattern.match(data):
            return reason
    plugin = plugin_of(data)
    if plugin is not None and is_installed(plugin):
        return f"damaged, or a {plugin.kind} that {plugin.package} can't read"
    return missing_reader(data) or "not in an image format that Pillow knows"
