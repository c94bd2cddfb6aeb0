"""Where images and captions come from: folders, caption files, listings, WebDataset shards, Hugging Face data sets.

What this file holds, in order:

1. folders: the files below one, and what lies there that can't be used;
2. captions: texts as they stand in files and cells;
3. listings: the rows of `metadata.jsonl`, `.csv` and `.parquet`;
4. shards: the images in a tar with their captions;
5. data sets: their images and captions.

Everything is read here with the place of every mistake, and nothing is kept: `data.scan` does that. Importing this
file imports neither torch nor datasets: Parquet listings import pyarrow, and data sets import datasets, when they are
met.

Names are paths relative to the folder, with `/`. A place is where something stands, for messages; a `DataError`
begins with it.
"""

import csv
import difflib
import json
import os
import re
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from io import TextIOWrapper
from itertools import chain
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

from lpl_finetuning.data.images import IMAGE_EXTENSIONS
from lpl_finetuning.data.tables import ROWS_AT_ONCE, SEPARATOR, read_bytes
from lpl_finetuning.errors import DataError, be, because, brief, counted, first_names, shown

CAPTION_EXTENSIONS = (".txt", ".caption")  # the first one found beside an image is read
LISTING_NAMES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
MAX_CAPTION = 100_000  # characters; a longer text is no caption

_KNOWN = {*IMAGE_EXTENSIONS, *CAPTION_EXTENSIONS, ".tar"}
_OTHER_PICTURES = (".avif", ".heic", ".heif", ".jfif", ".jp2", ".jxl", ".psd", ".svg", ".tga")  # told of, not read
_LITTER = {"desktop.ini", "ehthumbs.db", "thumbs.db"}  # what a system hides in folders, in lower case
_PACKED_TAR = re.compile(r"\.(tgz|tbz2?|txz|tar\.(gz|bz2|xz|zst|lz4?|z))$", re.IGNORECASE)
_ABOUT = re.compile(  # texts that lie beside pictures and are no captions, such as README.txt and LICENSE-MIT.txt
    r"(read[-_]?me|licen[cs]e|copying|copyright|notice|credits|authors|attributions?|sources|citation|changelog|terms"
    r"|requirements)([-_.].*)?\.txt",
    re.IGNORECASE,
)
MAX_JSON = 2**24  # bytes of a `.json` in a shard


# ---------------------------------------------------------------------------------------------------------------------
# 1. Folders
# ---------------------------------------------------------------------------------------------------------------------


class FoundFile(NamedTuple):
    """A file below the folder; `suffix` is in lower case."""

    path: str
    suffix: str
    size: int
    mtime_ns: int

    @property
    def stem(self) -> str:
        """The path without its suffix, which an image and its caption file have in common."""
        return self.path[: -len(self.suffix)]


class FolderWalk:
    """One walk over the visible files below a folder: images, caption files, listings and tars.

    When `files` has ended, `bad` has the images that can't be read, with reasons, and `unread_stems` the stems of
    these and of pictures of other kinds. `others` has (ending, path) of files of which nothing is known, as they can
    be printed; whoever walks may empty it on the way.
    """

    def __init__(self, root: Path, flag: str):
        """
        Args:
            root: the folder.
            flag: that named it, for messages.
        """
        self.root, self.flag = root, flag
        self.bad: list[tuple[str, str]] = []
        self.unread_stems: set[str] = set()
        self.others: list[tuple[str, str]] = []
        self._real_root = os.path.realpath(root)
        self._links, self._outside, self._packed, self._pictures = [], [], [], []

    def files(self) -> Iterator[FoundFile]:
        """The files that may be used, in no order.

        Raises:
            DataError: a folder or a file that is no image can't be read.
        """
        folders = [""]
        while folders:
            folder = folders.pop()
            for entry in self._entries(folder):
                path = f"{folder}{entry.name}"
                if not _is_folder(entry):
                    if (found := self._file(path, entry)) is not None:
                        yield found
                elif entry.is_symlink():
                    self._links.append(path)
                else:
                    folders.append(f"{path}/")

    def _entries(self, folder: str) -> Iterator[os.DirEntry]:
        # A folder that can't be read must not be passed over: its images would silently be missing.
        try:
            with os.scandir(os.path.join(self.root, folder)) as entries:
                yield from (entry for entry in entries if not entry.name.startswith("."))
        except OSError as error:
            place = shown(os.path.join(self.root, folder))
            raise DataError(f"{self.flag}: {place} can't be read: {because(error)}.") from error

    def _file(self, path: str, entry: os.DirEntry) -> FoundFile | None:
        suffix = os.path.splitext(entry.name)[1].lower()
        if suffix not in _KNOWN and entry.name not in LISTING_NAMES:
            if _PACKED_TAR.search(entry.name):
                self._packed.append(path)
            elif suffix in _OTHER_PICTURES:
                self._pictures.append(path)
                self.unread_stems.add(path[: -len(suffix)])
            elif not _needs_no_word(entry.name):
                self.others.append((shown(suffix), path if is_utf8(path) else shown(path)))
        elif entry.is_symlink() and not _is_inside(os.path.realpath(entry.path), self._real_root):
            self._outside.append(path)
        elif is_utf8(path):
            return self._with_status(path, suffix, entry)
        elif suffix in IMAGE_EXTENSIONS:
            self._add_bad(path, suffix, "the name is not UTF-8; rename the file or its folder")
        elif suffix not in CAPTION_EXTENSIONS:
            raise DataError(f"{self.root}: the name {shown(path)} is not UTF-8. Rename the file or its folder.")
        return None

    def _with_status(self, path: str, suffix: str, entry: os.DirEntry) -> FoundFile | None:
        try:
            status = entry.stat()
            if stat.S_ISREG(status.st_mode):
                return FoundFile(path, suffix, status.st_size, status.st_mtime_ns)
            reason = "not a file that could be read (a pipe, socket or device)"
        except OSError as error:
            reason = f"{'a broken link' if entry.is_symlink() else 'can not be read'} ({because(error)})"
        if suffix not in IMAGE_EXTENSIONS:
            raise DataError(f"{shown(os.path.join(self.root, path))}: {reason}. Replace or remove it.")
        self._add_bad(path, suffix, reason)
        return None

    def _add_bad(self, path: str, suffix: str, reason: str) -> None:
        self.bad.append((shown(path), reason))
        self.unread_stems.add(path[: -len(suffix)])

    def remarks(self) -> list[str]:
        """Sentences about what was not used.

        Raises:
            DataError: links lead out of the folder, or shards are compressed.
        """
        if self._outside:
            lead = "is a link that leads" if len(self._outside) == 1 else "are links that lead"
            raise DataError(
                f"{self.flag}: {counted(len(self._outside), 'file')} in {self.root} {lead} out of the folder: "
                f"{first_names(sorted(self._outside))}. Copy what is meant into the folder."
            )
        if self._packed:
            raise DataError(
                f"{self.flag}: compressed shards can't be read at random: {first_names(sorted(self._packed))} in "
                f"{self.root}. Unpack them (gunzip a.tar.gz gives a.tar); the images in them hardly compress."
            )
        remarks = []
        if self._links:
            were = "is a link to a folder and was" if len(self._links) == 1 else "are links to folders and were"
            names = first_names([os.path.join(self.root, link) for link in sorted(self._links)])
            remarks.append(f"{names} {were} not entered.")
        if count := len(self._pictures):
            names = first_names(sorted(self._pictures))
            remarks.append(
                f"{counted(count, 'picture')} in {self.root} {be(count)} of a kind that is not read: {names}."
            )
        return remarks


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link in a loop
        return False


def _needs_no_word(name: str) -> bool:
    """Whether a file of no kind that is read is left by a system, about the folder (README.md), or made it (.py)."""
    stem, suffix = os.path.splitext(name)
    return (
        name.lower() in _LITTER
        or suffix.lower() == ".py"
        or (suffix.lower() in ("", ".md", ".rst") and is_about(f"{stem}.txt"))
    )


def _is_inside(path: str, root: str) -> bool:
    """Whether a path is the root or below it; both are absolute and normal."""
    return path == root or path.startswith(root.rstrip("/") + "/")


def is_utf8(text: str) -> bool:
    """Whether a text can be written as UTF-8, which the names of files need not be."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


# ---------------------------------------------------------------------------------------------------------------------
# 2. Captions
# ---------------------------------------------------------------------------------------------------------------------


def join_captions(
    cell: Any, place: str, what: str, unit: str, default: str | None, empty_allowed: bool = False
) -> str | None:
    """The captions in a cell (a text or a list of texts), stripped, joined by `SEPARATOR`.

    None where the default caption takes their place, because all are empty or there are none. An empty one is refused
    where there is no default caption, unless it is allowed.

    Raises:
        DataError: "{place}: {what} must be text", and the like; a caption that is not to be had goes with its {unit}.
    """
    texts = list(cell) if isinstance(cell, (list, tuple)) else [cell]
    if default is not None:
        texts = [text for text in texts if text is not None]
    for text in texts:
        if not isinstance(text, str):
            raise DataError(f"{place}: {what} must be text, not {brief(text)}. Correct it, or name another column.")
        if len(text) > MAX_CAPTION:
            raise DataError(f"{place}: not a caption: {len(text)} characters. At most {MAX_CAPTION} are read.")
        if SEPARATOR in text:
            raise DataError(f"{place}: {what} holds a zero byte ({brief(text)}). Is it UTF-16? Save it as UTF-8.")
        if not is_utf8(text):
            raise DataError(f"{place}: {what} holds half a character ({brief(text)}). Write it anew.")
    kept = [text.strip() for text in texts if text.strip()]
    if (not kept or len(kept) < len(texts)) and default is None and not empty_allowed:
        raise DataError(f"{place}: {what} is empty. Write one, or remove the {unit}.")
    return SEPARATOR.join(kept) if kept or default is None else None


def caption_lines(text: str) -> list[str] | str:
    """The lines of a caption file that has a caption in each; an empty caption where there are none."""
    return [line for line in text.splitlines() if line.strip()] or ""


def read_caption_file(path: Path, size: int) -> str:
    """The text of a caption file of so many bytes."""
    refuse_long(size, str(path))
    return decode_text(read_bytes(path), path)


def is_about(path: str) -> bool:
    """Whether a file is one of those that are about a folder of pictures, README.txt and the like, and no caption."""
    return _ABOUT.fullmatch(os.path.basename(path)) is not None


def refuse_long(size: int, place: str, limit: int = 4 * MAX_CAPTION) -> None:
    """A file of more bytes than a caption can have is not even read."""
    if size > limit:
        raise DataError(f"{shown(place)}: not a caption: {size} bytes. At most {MAX_CAPTION} characters are read.")


def decode_text(data: bytes, place: str | os.PathLike) -> str:
    """The text of a caption file, without the byte order mark that some editors write."""
    try:
        text = data.decode("utf-8-sig")
        if (at := data.find(b"\0")) >= 0:
            raise DataError(f"{shown(str(place))}: byte {at} is zero. Is it UTF-16? Save the file as UTF-8.")
    except UnicodeDecodeError as error:
        raise _not_utf8(place, error.start) from error
    return text


def _not_utf8(place: str | os.PathLike, byte: int) -> DataError:
    return DataError(f"{shown(str(place))}: not UTF-8 (byte {byte}). Save the file as UTF-8.")


# ---------------------------------------------------------------------------------------------------------------------
# 3. Listings
# ---------------------------------------------------------------------------------------------------------------------


def refuse_two_listings(listings: Sequence[str], root: Path, flag: str) -> None:
    """Raise a DataError where two listings lie in one folder."""
    parents = Counter(os.path.dirname(path) for path in listings)
    for parent, count in parents.items():
        if count > 1:
            names = [os.path.basename(path) for path in listings if os.path.dirname(path) == parent]
            raise DataError(
                f"{flag}: {' and '.join(names)} are in {os.path.join(root, parent)}; "
                "which one counts is not clear. Remove all but one."
            )


def listing_rows(
    listing: Path, image_column: str, caption_column: str, caption_needed: bool
) -> Iterator[tuple[str, dict]]:
    """(place, row) of each row of a listing, of whatever kind. Of Parquet only the columns that matter are read."""
    if listing.suffix == ".jsonl":
        return _json_rows(listing)
    if listing.suffix == ".csv":
        return _csv_rows(listing)
    return _parquet_rows(listing, image_column, caption_column, caption_needed)


def _json_rows(listing: Path) -> Iterator[tuple[str, dict]]:
    # Binary, since text would also be split at U+2028 and the like inside a string.
    start = 0
    for number, line in enumerate(_lines(listing), start=1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise _not_utf8(f"{listing}:{number}", start + error.start) from error
        start += len(line)
        if text.strip():
            yield f"{listing}:{number}", json_object(text, f"{listing}:{number}")


def _lines(listing: Path) -> Iterator[bytes]:
    try:
        with open(listing, "rb") as file:
            yield from file
    except OSError as error:
        raise DataError(f"{shown(str(listing))}: can't be read: {because(error)}.") from error


def json_object(text: str, place: str) -> dict:
    """The object that a line of JSON is, or a DataError."""
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: not JSON ({error}). Each line must be one object.") from error
    if not isinstance(row, dict):
        raise DataError(f'{place}: must be an object like {{"file_name": "…", "text": "…"}}, not {brief(row)}.')
    return row


def _csv_rows(listing: Path) -> Iterator[tuple[str, dict]]:
    try:
        # newline="" leaves line breaks, also those inside quotes, to csv.
        with open(listing, "rb") as file, TextIOWrapper(file, encoding="utf-8-sig", newline="") as text:
            header = text.readline()
            # Blanks after the commas of the header: those of the rows are no part of their fields either.
            reader = csv.DictReader(chain([header], text), strict=True, skipinitialspace=", " in header)
            try:
                reader.fieldnames = _csv_header(reader.fieldnames or [], f"{listing}:1")
                for row in reader:
                    place = f"{listing}:{reader.line_num}"
                    if None in row:
                        raise DataError(f"{place}: more fields than columns. Put a caption with a comma into quotes.")
                    yield place, row
            except csv.Error as error:
                # Counted up to the row before: an open quote is noticed only at the end of the file.
                place = f"{listing}:{reader.line_num + 1}"
                raise DataError(f"{place}: not CSV ({error}). Is a quote left open?") from error
    except UnicodeDecodeError:
        # It is counted from the start of what was read last, so the place is looked for again.
        _refuse_not_utf8(listing)
        raise
    except OSError as error:
        raise DataError(f"{shown(str(listing))}: can't be read: {because(error)}.") from error


def _csv_header(names: Sequence[str], place: str) -> list[str]:
    """The names of the columns without blanks around them; those of another kind of table are refused."""
    if len(names) == 1:
        for separator, what in ((";", "semicolons"), ("\t", "tabs")):
            if separator in names[0]:
                raise DataError(
                    f"{place}: the columns seem to be separated by {what}; they must be separated by commas. "
                    "Save the file with commas, and captions with a comma in quotes."
                )
    return [name.strip() for name in names]


def _refuse_not_utf8(listing: Path) -> None:
    """Raise an error for the first line that is not UTF-8."""
    start = 0
    for number, line in enumerate(_lines(listing), start=1):
        try:
            line.decode()
        except UnicodeDecodeError as error:
            raise _not_utf8(f"{listing}:{number}", start + error.start) from error
        start += len(line)


def _parquet_rows(
    listing: Path, image_column: str, caption_column: str, caption_needed: bool
) -> Iterator[tuple[str, dict]]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(listing) as file:
            names = file.schema_arrow.names
            wanted = [name for name in (image_column, "file_name", caption_column) if name in names]
            if image_column not in names and "file_name" not in names:
                require_column("file_name", names, str(listing), "--image_column")
            if caption_needed:
                require_column(caption_column, names, str(listing), "--caption_column")
            number = 0
            for batch in file.iter_batches(batch_size=ROWS_AT_ONCE, columns=list(dict.fromkeys(wanted))):
                for row in batch.to_pylist():
                    yield f"{listing}: row {number} (counted from 0)", row
                    number += 1
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{shown(str(listing))}: can't be read as Parquet: {because(error)}") from error


def listed_name(cell: Any, column: str, parent: str, root: str, place: str) -> str:
    """The path, relative to the root, of a file in a listing. It leads nowhere else: listings come from strangers.

    Args:
        cell: what stands in the listing.
        column: its column, for messages.
        parent: the folder of the listing, relative to the root.
        root: the folder, absolute and without links.
        place: the listing with the line.
    """
    if not isinstance(cell, str) or not cell.strip():
        raise DataError(f"{place}: {column!r} must be the name of a file, not {brief(cell)}.")
    if "\0" in cell or not is_utf8(cell):
        raise DataError(f"{place}: {brief(cell)} is no usable file name. Correct it.")
    absolute = PurePosixPath(cell).is_absolute() or PureWindowsPath(cell).is_absolute()
    path = os.path.normpath(os.path.join(root, parent, cell))
    if absolute or not _is_inside(path, root):
        raise DataError(f"{place}: {brief(cell)} leads out of the folder {root}. Copy the file into the folder.")
    return os.path.relpath(path, root)


def listed_status(path: str, root: str, place: str) -> tuple[tuple[int, int] | None, str]:
    """((size, mtime_ns), "") of a listed file, or (None, why there is none). `root` is as in `listed_name`.

    Raises:
        DataError: a link on the way leads out of the folder.
    """
    try:
        real = os.path.realpath(os.path.join(root, path))
        if not _is_inside(real, root):
            raise DataError(f"{place}: {brief(path)} leads out of the folder {root}. Copy the file into it.")
        status = os.stat(real)
    except DataError:
        raise
    except FileNotFoundError:
        return None, "there is no such file"
    except (OSError, ValueError) as error:
        return None, because(error)
    if not stat.S_ISREG(status.st_mode):
        return None, "it is no file"
    return (status.st_size, status.st_mtime_ns), ""


def require_column(column: str, columns: Iterable[str], place: str, flag: str) -> None:
    """Raise a DataError, with the nearest name, unless the column is among the columns."""
    columns = list(columns)
    if column in columns:
        return
    near = difflib.get_close_matches(column, [str(name) for name in columns], n=1, cutoff=0.0)
    advice = f"Did you mean {flag} {near[0]}?" if near else f"Name the right one with {flag}."
    raise DataError(f"{place}: there is no column {column!r} ({flag}); the columns are {columns}. {advice}")
