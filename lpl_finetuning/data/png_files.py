"""PNG files byte by byte: chunks, checksums, and what is taken out so that Pillow reads the pixels.

Pillow refuses sound pixels for the sake of what lies beside them: a wrong checksum in a chunk of text, or texts of
more than 1 MB after decompression, as ComfyUI writes them. Here these chunks are taken out of the bytes, so no limit
of Pillow is changed. A wrong checksum in a chunk that the pixels need stays an error.
"""

import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

from PIL import PngImagePlugin

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
_OF_THE_PIXELS = (b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")  # texts that may hold the orientation
_MOST_PROFILE = 2**26  # bytes of a colour profile


class Chunk(NamedTuple):
    """A chunk of a PNG: `data[start:stop]` with length, name, content and checksum."""

    name: bytes
    start: int
    stop: int

    @property
    def ancillary(self) -> bool:
        """Whether the pixels can be read without the chunk: its name begins with a small letter."""
        return bool(self.name[0] & 32)


class Mended(NamedTuple):
    """A PNG that Pillow reads.

    Attributes:
        data: the bytes, without the chunks that Pillow refuses.
        faults: what was taken out: "wrong checksum" and "large text", as in the notes of `data.images.ImageFacts`.
    """

    data: bytes
    faults: tuple[str, ...]


def chunks(data: bytes) -> Iterator[Chunk]:
    """The whole chunks of a PNG up to its end; a chunk that is cut short ends the list."""
    place, size = len(SIGNATURE), len(data)
    while place + 12 <= size:
        length, name = struct.unpack_from(">I4s", data, place)
        stop = place + 12 + length
        if stop > size or not name.isalpha():
            return
        yield Chunk(name, place, stop)
        if name == b"IEND":
            return
        place = stop


def contents_before_pixels(data: bytes) -> dict[bytes, bytes]:
    """{name: content} of the chunks of a PNG before the pixels; of several with one name the first."""
    contents: dict[bytes, bytes] = {}
    for chunk in chunks(data):
        if chunk.name == b"IDAT":
            break
        contents.setdefault(chunk.name, data[chunk.start + 8 : chunk.stop - 4])
    return contents


def mended(data: bytes) -> Mended:
    """A PNG without the chunks beside the pixels that Pillow refuses; the same bytes where there are none.

    Raises:
        ValueError: a chunk that the pixels need has a wrong checksum.
    """
    view, wrong, texts = memoryview(data), [], []
    for chunk in chunks(data):
        if zlib.crc32(view[chunk.start + 4 : chunk.stop - 4]) != _checksum(data, chunk):
            if chunk.ancillary:
                wrong.append(chunk)
            elif chunk.name != b"IEND":
                raise ValueError(f"the checksum of its {chunk.name.decode()} chunk is wrong: the pixels are damaged")
        elif chunk.name in _TEXTS:
            texts.append(chunk)
    large = _refused_texts(data, texts)
    faults = ("wrong checksum",) * bool(wrong) + ("large text",) * bool(large)
    return Mended(_without(data, {*wrong, *large}) if faults else data, faults)


def _checksum(data: bytes, chunk: Chunk) -> int:
    return int.from_bytes(data[chunk.stop - 4 : chunk.stop], "big")


def _refused_texts(data: bytes, texts: list[Chunk]) -> list[Chunk]:
    """The texts to take out so that none is too large for Pillow, nor all of them together."""
    most, refused, total = PngImagePlugin.MAX_TEXT_CHUNK, [], 0
    for chunk in texts:
        packed = _packed_text(data[chunk.start + 8 : chunk.stop - 4], chunk.name)
        size = chunk.stop - chunk.start if packed is None else _inflated_length(packed, most + 1)
        total += size
        if packed is not None and size > most:  # Pillow limits a single text only if the text is compressed
            refused.append(chunk)
    if not refused and total <= PngImagePlugin.MAX_TEXT_MEMORY:
        return []
    return [chunk for chunk in texts if chunk in refused or not data.startswith(_OF_THE_PIXELS, chunk.start + 8)]


def _packed_text(content: bytes, name: bytes) -> bytes | None:
    """The compressed part of a chunk of text; None for a text that is not compressed."""
    rest = content.partition(b"\0")[2]
    if name == b"zTXt":
        return rest[1:]
    if name == b"iTXt" and rest[:1] == b"\1":
        return rest[2:].partition(b"\0")[2].partition(b"\0")[2]
    return None


def _inflated_length(packed: bytes, most: int) -> int:
    try:
        return len(zlib.decompressobj().decompress(packed, most))
    except zlib.error:
        return 0


def _without(data: bytes, left_out: set[Chunk]) -> bytes:
    parts, place = [], 0
    for chunk in sorted(left_out, key=lambda chunk: chunk.start):
        parts.append(data[place : chunk.start])
        place = chunk.stop
    return b"".join([*parts, data[place:]])


def without_profile(data: bytes) -> bytes:
    """A PNG without its colour profile."""
    return _without(data, {chunk for chunk in chunks(data) if chunk.name == b"iCCP"})


def large_profile(data: bytes) -> bytes | None:
    """The colour profile of a PNG, also where the profile is too large for Pillow; None for a broken profile."""
    for chunk in chunks(data):
        if chunk.name == b"iCCP":
            packed = data[chunk.start + 8 : chunk.stop - 4].partition(b"\0")[2][1:]
            try:
                found = zlib.decompressobj().decompress(packed, _MOST_PROFILE)
            except zlib.error:
                return None
            return found if len(found) > PngImagePlugin.MAX_TEXT_CHUNK else None
    return None
