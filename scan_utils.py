"""The data front end: every image found, read once and checked before any model is loaded.

What this file holds, in order:

1. captioned images, and tables of them on the disk, which take no memory at a million rows;
2. scanning: folders with caption files or listings, WebDataset shards, Hugging Face data sets;
3. the facts: what is known about unchanged files is kept, so that a second scan reads nothing;
4. captions and listings, read with the place of every mistake;
5. the report on a scan, and the images held out for validation.

Importing this file, and scanning a folder, import neither torch nor datasets, so that a script can check its data
before its slow imports. Parquet listings import pyarrow, and data sets import datasets, when they are met.

Two kinds of SQLite files lie in `<cache folder>/scans`. `images-<digest>.sqlite` is what a run trains on: it is named
by its rows and never changes. `files-<digest>.sqlite` is the memory of one folder or data set: it may be deleted at
any time, and the images are read again then.

Sizes are (height, width) in pixels. Names are paths relative to the folder, with `/`; N counts images.
"""

import contextlib
import csv
import difflib
import hashlib
import json
import logging
import operator
import os
import re
import sqlite3
import stat
import tarfile
import tempfile
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from io import TextIOWrapper
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import PIL
from filelock import FileLock

from image_utils import IMAGE_EXTENSIONS, DataError, ImageFacts, assign_buckets, inspect, lost_share

logger = logging.getLogger(__name__)

CAPTION_EXTENSIONS = (".txt", ".caption")  # the first one found beside an image is read
LISTING_NAMES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
MAX_CAPTION = 100_000  # characters; a longer text is no caption

_OTHER_PICTURES = (".avif", ".heic", ".heif", ".jfif", ".jp2", ".jxl", ".psd", ".svg", ".tga")  # told of, not read
_PACKED_TAR = re.compile(r"\.(tgz|tbz2?|txz|tar\.(gz|bz2|xz|zst|lz4?|z))$", re.IGNORECASE)
_COMMIT_SECONDS = 2.0  # what is lost at most when a scan is killed
_MAX_JSON = 2**24  # bytes of a `.json` in a shard
_SEPARATOR = "\0"  # between the captions of one image in a table; sorts before every character, and is in none
_BATCH = 1000  # rows at once
_FIRST = 5  # names in a remark


# ---------------------------------------------------------------------------------------------------------------------
# 1. Captioned images
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DatasetImage:
    """The image in one row of a `datasets.Dataset` whose only column holds undecoded images."""

    dataset: Any
    index: int
    column: str

    def read_bytes(self) -> bytes:
        """The bytes of the image file, as they were uploaded.

        Raises:
            DataError: there is no image in this row, or its file can't be read.
        """
        cell = self.dataset[self.index][self.column]
        if cell is None or (cell["bytes"] is None and not cell["path"]):
            raise DataError(f"{self}: there is no image in this row. Remove the row from the data set.")
        if cell["bytes"] is not None:
            return cell["bytes"]
        return _read_bytes(Path(cell["path"]))

    def __str__(self) -> str:
        return f"row {self.index} (column {self.column!r}) of the data set"


@dataclass(frozen=True)
class CaptionedImage:
    """An image with its captions.

    `name` is unique enough to sort by and to show. `content` is the sha256 of the image file, hex. `size` is upright.
    Of a `file` that is a tar, the image is the `length` bytes from `offset`.
    """

    name: str
    captions: tuple[str, ...]
    content: str
    size: tuple[int, int]
    file: Path | DatasetImage
    offset: int = 0
    length: int | None = None

    @property
    def caption(self) -> str:
        """The first of the captions."""
        return self.captions[0]

    @property
    def place(self) -> str:
        """Where the image is, for messages."""
        if self.length is None:
            return shown(str(self.file))
        return f"{shown(str(self.file))} (member {shown(self.name.split(f'{self.file.name}/', 1)[-1])})"

    def read_bytes(self) -> bytes:
        """The bytes of the image file, undecoded, and sure to be those that were scanned.

        Raises:
            DataError: the file has vanished or changed, or can't be read.
        """
        if isinstance(self.file, Path):
            data = _read_bytes(self.file, self.offset, self.length)
        else:
            data = self.file.read_bytes()
        if hashlib.sha256(data).hexdigest() != self.content:
            raise DataError(f"{self.place}: the file has changed since it was scanned. Start again with the new file.")
        return data


class ImageTable(Sequence[CaptionedImage]):
    """Captioned images in an immutable SQLite file, sorted by (name, captions), or a selection of them.

    Rows are read when they are asked for, so memory does not grow with their number. Each process opens a connection
    of its own: the table may be handed to DataLoader workers, forked or spawned.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        root: str | os.PathLike = "",
        dataset: Any = None,
        column: str = "",
        rows: np.ndarray | None = None,
    ):
        """
        Args:
            path: of the SQLite file.
            root: the folder that the files' paths are relative to.
            dataset: `datasets.Dataset` that the images are in, if they are not files.
            column: its only column, of undecoded images.
            rows: which rows of the file, int64 (N,), each 0 <= row < the number of rows; all if None.

        Raises:
            DataError: the file is missing or damaged.
        """
        self.path, self.root, self._dataset, self._column = Path(path), Path(root), dataset, column
        self._pid, self._connection = -1, None
        try:
            (self._total,) = self._execute("SELECT count FROM header").fetchone()
            (last,) = self._execute("SELECT max(row) FROM images").fetchone()
        except (sqlite3.Error, TypeError) as error:
            raise DataError(f"{self.path}: not a table of images ({error}). Start again to have it made.") from error
        if last != self._total - 1:
            raise DataError(f"{self.path}: the table of images is incomplete. Delete it, and start again.")
        self._rows = None if rows is None else self._checked(rows)

    def _checked(self, rows: np.ndarray) -> np.ndarray:
        rows = np.asarray(rows, dtype=np.int64)
        if rows.size and (rows.min() < 0 or rows.max() >= self._total):
            raise IndexError(f"Rows must be at least 0 and less than {self._total}.")
        return rows

    def _execute(self, query: str, values: Sequence = ()) -> sqlite3.Cursor:
        if self._pid != os.getpid():  # first use, or a forked worker: its parent's connection is not to be shared
            address = f"{self.path.resolve().as_uri()}?mode=ro&immutable=1"
            try:
                self._connection = sqlite3.connect(address, uri=True, check_same_thread=False)
            except sqlite3.Error as error:
                raise DataError(f"{self.path}: can't be opened ({error}). Start again to have it made.") from error
            self._connection.execute("PRAGMA cache_size = -1024")  # KiB
            self._pid = os.getpid()
        return self._connection.execute(query, values)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_pid": -1, "_connection": None}  # an open file can't go to a spawned worker

    def __len__(self) -> int:
        return self._total if self._rows is None else len(self._rows)

    def __getitem__(self, index):
        """The image at an index; for a slice the table of its rows."""
        if isinstance(index, slice):
            return self.select(np.arange(*index.indices(len(self)), dtype=np.int64))
        index, length = operator.index(index), len(self)
        if not -length <= index < length:
            raise IndexError(f"There is no image {index} among {length}.")
        row = index % length if self._rows is None else int(self._rows[index])
        return self._image(self._execute(f"SELECT {_ROW} FROM images WHERE row = ?", (row,)).fetchone())

    def _image(self, row: tuple) -> CaptionedImage:
        name, captions, content, height, width, path, offset, length = row
        if self._dataset is None:
            file = self.root / path
        else:
            file, offset = DatasetImage(self._dataset, offset, self._column), 0
        return CaptionedImage(name, tuple(captions.split(_SEPARATOR)), content, (height, width), file, offset, length)

    def __iter__(self) -> Iterator[CaptionedImage]:
        return map(self._image, self.columns(_ROW))

    def select(self, rows: np.ndarray) -> "ImageTable":
        """The images at these indices of this table, integers (M,), in their order. The file is shared.

        Raises:
            IndexError: an index below 0 or beyond the table.
        """
        rows = np.asarray(rows, dtype=np.int64)
        if rows.size and (rows.min() < 0 or rows.max() >= len(self)):
            raise IndexError(f"Indices must be at least 0 and less than {len(self)}.")
        rows = rows if self._rows is None else self._rows[rows]
        return ImageTable(self.path, self.root, self._dataset, self._column, rows)

    def columns(self, names: str) -> Iterator[tuple]:
        """Rows of columns ("name, format"), in the order of this table, a few at a time."""
        for start in range(0, len(self), _BATCH):
            if self._rows is None:
                where = "row >= ? AND row < ? ORDER BY row"
                yield from self._execute(f"SELECT {names} FROM images WHERE {where}", (start, start + _BATCH))
                continue
            rows = self._rows[start : start + _BATCH].tolist()
            where = f"row IN ({','.join(map(str, rows))})"
            found = {row[0]: row[1:] for row in self._execute(f"SELECT row, {names} FROM images WHERE {where}")}
            yield from (found[row] for row in rows)

    def sizes(self) -> np.ndarray:
        """int32 (N, 2), (height, width)."""
        return np.fromiter(self.columns("height, width"), dtype=(np.int32, 2), count=len(self))

    def contents(self) -> np.ndarray:
        """sha256 of each image file, hex, 'S64' (N,)."""
        return np.fromiter((row[0].encode() for row in self.columns("content")), dtype="S64", count=len(self))

    def __repr__(self) -> str:
        return f"ImageTable({str(self.path)!r}, {len(self)} images)"


_ROW = "name, captions, content, height, width, path, offset, length"
_DETAILS = "format, notes"  # only the report asks for these


def sizes_of(images: Sequence[CaptionedImage]) -> np.ndarray:
    """int32 (N, 2), (height, width), of a table or of any other sequence."""
    if isinstance(images, ImageTable):
        return images.sizes()
    return np.array([image.size for image in images], dtype=np.int32).reshape(-1, 2)


def contents_of(images: Sequence[CaptionedImage]) -> np.ndarray:
    """sha256 of each image file, hex, 'S64' (N,), of a table or of any other sequence."""
    if isinstance(images, ImageTable):
        return images.contents()
    return np.array([image.content.encode() for image in images], dtype="S64")


def select(images: Sequence[CaptionedImage], rows: np.ndarray) -> Sequence[CaptionedImage]:
    """The images at these indices, integers (M,): a view of a table, a list of anything else."""
    return images.select(rows) if isinstance(images, ImageTable) else [images[int(row)] for row in rows]


def _read_bytes(path: Path, offset: int = 0, length: int | None = None) -> bytes:
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            return file.read(-1 if length is None else length)
    except (OSError, ValueError) as error:
        raise DataError(f"{shown(str(path))}: can't be read: {_because(error)}.") from error


def shown(name: str) -> str:
    """A name as it can be printed: line breaks, bytes that are not UTF-8 and the like are escaped."""
    return name if name.isprintable() else repr(name)[1:-1]


def _because(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


# ---------------------------------------------------------------------------------------------------------------------
# 2. Scanning
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scan:
    """What was found.

    `images` are sorted by (name, captions). `warnings` are sentences for the user. `source` tells where the captions
    came from. `bad` are the images that were left out, with their reasons; `missing` are the entries of listings
    without a file, left out too. `unlisted` and `repeated` count the images in no listing, or listed more than once,
    with their first names. `defaulted` counts the captions that are a prompt or a folder's name.
    """

    images: Sequence[CaptionedImage]
    warnings: list[str]
    source: str
    bad: list[tuple[str, str]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unlisted: dict[str, Any] = field(default_factory=lambda: {"count": 0, "first": []})
    repeated: dict[str, Any] = field(default_factory=lambda: {"count": 0, "first": []})
    defaulted: int = 0

    @property
    def skipped(self) -> int:
        """How many images were left out."""
        return len(self.bad) + len(self.missing)


@dataclass
class _Task:
    """One scan under way: what was asked for, the facts' database, and what was found so far."""

    flag: str
    place: str  # the folder or data set, for messages
    image_column: str
    caption_column: str
    default_caption: str | None
    caption_from_folder: bool
    caption_per_line: bool
    skip_bad: bool
    show: bool
    db: sqlite3.Connection = None
    lock: FileLock = None
    scans: Path = None
    root: Path = None
    dataset: Any = None
    warnings: list[str] = field(default_factory=list)
    bad: list[tuple[str, str]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    defaulted: int = 0

    def default(self, path: str) -> str | None:
        """The caption of an image without one, if there is such a thing."""
        if self.default_caption is not None or not self.caption_from_folder:
            return self.default_caption
        folder = PurePosixPath(path).parent.name or self.root.resolve().name
        return " ".join(folder.replace("_", " ").split()) or None

    def or_default(self, captions: str | None, default: str | None) -> str | None:
        """The captions of an image, or the default, which is counted."""
        self.defaulted += captions is None
        return default if captions is None else captions


def scan_folder(
    folder: str | os.PathLike,
    *,
    flag: str = "--train_data_dir",
    image_column: str = "image",
    caption_column: str = "text",
    default_caption: str | None = None,
    caption_from_folder: bool = False,
    caption_per_line: bool = False,
    on_bad_image: str = "error",
    cache_dir: str | os.PathLike | None = None,
    show: bool = True,
) -> Scan:
    """Find the images below a folder and their captions, and check all of it.

    Captions come from `metadata.jsonl`, `.csv` or `.parquet` (`{"file_name": "a.png", "text": "…"}`, file names
    relative to the listing, a text or a list of texts), in the folder or below it. Where there is no listing they come
    from a `.txt` or `.caption` file beside each image. WebDataset shards (`*.tar`) are read where they lie.
    Hidden files and folders are passed over. Files that have not changed since an earlier scan are not read.

    Args:
        folder: `--train_data_dir`.
        flag: the flag that named the folder, for messages.
        image_column: `--image_column`; a listing without it is read by its column `file_name`.
        caption_column: `--caption_column`, in listings and in the `.json` members of shards.
        default_caption: `--instance_prompt`, for images without a caption.
        caption_from_folder: `--caption_from_folder`, the name of the folder for images without a caption.
        caption_per_line: `--caption_per_line`, each line of a caption file is a caption of its own.
        on_bad_image: "error", or "skip" to leave out and list what can't be used.
        cache_dir: `--cache_dir`; the user's cache if None.
        show: a progress bar, where it takes longer than a second.

    Raises:
        DataError: something is missing, unreadable, without a caption, or outside the folder.
    """
    task = _Task(
        flag, str(folder), image_column, caption_column, default_caption, caption_from_folder, caption_per_line,
        _skips(on_bad_image), show,
    )  # fmt: skip
    task.root = Path(folder)
    if not os.path.exists(folder):
        raise DataError(f"{flag}: {folder} does not exist.")
    if not os.path.isdir(folder):
        raise DataError(f"{flag}: {folder} is not a folder. Name the folder that holds the images.")
    return _with_facts(task, cache_dir, os.fsencode(task.root.resolve()), _scan_folder)


def scan_dataset(
    dataset_name: str,
    dataset_config_name: str | None = None,
    split: str = "train",
    *,
    image_column: str = "image",
    caption_column: str = "text",
    default_caption: str | None = None,
    on_bad_image: str = "error",
    cache_dir: str | os.PathLike | None = None,
    max_samples: int | None = None,
    show: bool = True,
) -> Scan:
    """Load a data set from the Hub, or from a folder that `save_to_disk` wrote, and check it like a folder.

    The images stay undecoded bytes. A caption may be a text or a list of texts. An empty caption becomes the default
    caption; without one it is allowed here, since a Hub data set is seldom the user's to correct, but is counted in a
    warning. Without the caption column every image has the default caption, when there is one.

    Args:
        dataset_name: `--dataset_name`.
        dataset_config_name: `--dataset_config_name`.
        split: the split to read.
        max_samples: `--max_train_samples`; the rows after these are not read.
        image_column, caption_column, default_caption, on_bad_image, cache_dir, show: see `scan_folder`.

    Raises:
        DataError: the data set can't be loaded, a column is missing or of another kind, a caption is not text, or
            images can't be used.
    """
    dataset = _load_dataset(dataset_name, dataset_config_name, split, cache_dir)
    task = _Task(
        "--dataset_name", dataset_name, image_column, caption_column, default_caption, False, False,
        _skips(on_bad_image), show,
    )  # fmt: skip
    key = f"{dataset._fingerprint} {image_column}".encode()
    if max_samples is not None:
        dataset = dataset.select(range(min(max_samples, len(dataset))))
    if not len(dataset):
        raise DataError(f"--dataset_name {dataset_name}: the split {split!r} is empty.")
    task.dataset = _pictures(dataset, task)
    return _with_facts(task, cache_dir, key, partial(_scan_dataset, dataset=dataset))


def _skips(on_bad_image: str) -> bool:
    if on_bad_image not in ("error", "skip"):
        raise DataError(f"--on_bad_image is {on_bad_image!r}; it must be error or skip.")
    return on_bad_image == "skip"


def _scan_folder(task: _Task) -> Scan:
    listings, tars = _walk(task)
    _make_entries_table(task.db)
    unlisted = repeated = {"count": 0, "first": []}
    sources = []
    if listings:
        _refuse_two_listings(listings, task)
        for listing in listings:
            _add_listing(task, listing)
        _check_listed(task)
        unlisted, repeated = _remarks_on_listing(task)
        sources.append(", ".join(listings))
    elif task.db.execute("SELECT count(*) FROM pictures").fetchone()[0]:
        _read_sidecars(task)
        _add_pictures(task)
        sources.append("caption files beside the images")
    if tars:
        _list_tars(task, tars)
        _add_members(task, tars)
        sources.append(f"{len(tars)} WebDataset shard{'s' * (len(tars) > 1)}")
    source = " and ".join(sources)
    if not task.db.execute("SELECT count(*) FROM entries").fetchone()[0]:
        _refuse_nothing(task, listings, source)
    images = _check_images(task)
    _forget_vanished(task)
    return Scan(images, task.warnings, source, task.bad, task.missing, unlisted, repeated, task.defaulted)


def _refuse_nothing(task: _Task, listings: list[str], source: str) -> None:
    if task.bad or task.missing:
        _refuse_all_bad(task)
    if source:
        what = "lists no images. Fill it, or remove it." if listings else "hold no images."
        raise DataError(f"{task.flag}: {shown(source)} in {task.place} {what}")
    raise DataError(
        f"{task.flag}: there are no images in {task.place} or below it. "
        f"Files ending in {', '.join(IMAGE_EXTENSIONS)} are read, and WebDataset shards (.tar)."
    )


def _make_entries_table(db: sqlite3.Connection) -> None:
    """`entries`: a row for each image that will be in the table, with its captions but before it was looked into.

    Those of one file may be several. `size` and `mtime_ns` are of the file that holds the image.
    """
    db.execute(
        "CREATE TEMP TABLE entries (name TEXT, captions TEXT, path TEXT, offset INTEGER, length INTEGER, "
        "size INTEGER, mtime_ns INTEGER, place TEXT)"
    )


def _insert(db: sqlite3.Connection, query: str, rows: Iterable[tuple]) -> None:
    """Many rows in one transaction; nothing is held in memory."""
    db.execute("BEGIN")
    try:
        db.executemany(query, rows)
    except BaseException:
        db.execute("ROLLBACK")
        raise
    db.execute("COMMIT")


_INSERT_ENTRY = "INSERT INTO entries VALUES (?, ?, ?, ?, ?, ?, ?, ?)"


# The files ----------------------------------------------------------------------------------------------------------


def _walk(task: _Task) -> tuple[list[str], list[str]]:
    """Fill `pictures` and `sidecars` with the files below the folder; returns the sorted listings and shards."""
    task.db.execute("CREATE TEMP TABLE pictures (path TEXT PRIMARY KEY, stem TEXT, size INTEGER, mtime_ns INTEGER)")
    task.db.execute(
        "CREATE TEMP TABLE sidecars (stem TEXT PRIMARY KEY, kind INTEGER, path TEXT, size INTEGER, mtime_ns INTEGER)"
    )
    task.db.execute("CREATE TEMP TABLE shards (path TEXT PRIMARY KEY, size INTEGER, mtime_ns INTEGER)")
    listings, tars, outside, packed, others = [], [], [], [], []
    pictures, sidecars = [], []
    for path, suffix, entry in _files(task, outside, packed, others):
        status = _status(task, path, suffix, entry)
        if status is None:
            continue
        if entry.name in LISTING_NAMES:
            listings.append(path)
        elif suffix == ".tar":
            tars.append((path, *status))
        elif suffix in CAPTION_EXTENSIONS:
            kind = CAPTION_EXTENSIONS.index(suffix)
            sidecars.append((path[: -len(suffix)], kind, path, *status))
        else:
            pictures.append((path, path[: -len(suffix)], *status))
        if len(pictures) + len(sidecars) >= _BATCH:
            _store_files(task.db, pictures, sidecars)
    _store_files(task.db, pictures, sidecars)
    task.db.execute("CREATE INDEX pictures_stem ON pictures (stem)")
    _refuse_outside(task, outside)
    if packed:
        raise DataError(
            f"{task.flag}: compressed shards can't be read at random: {_first(sorted(packed))} in {task.place}. "
            "Unpack them (gunzip a.tar.gz gives a.tar); the images in them hardly compress."
        )
    if others:
        task.warnings.append(
            f"{len(others)} pictures in {task.place} are of a kind that is not read: {_first(sorted(others))}."
        )
    return sorted(listings), sorted(tars)


def _store_files(db: sqlite3.Connection, pictures: list[tuple], sidecars: list[tuple]) -> None:
    _insert(db, "INSERT INTO pictures VALUES (?, ?, ?, ?)", pictures)
    _insert(
        db,
        "INSERT INTO sidecars VALUES (?, ?, ?, ?, ?) ON CONFLICT (stem) DO UPDATE SET kind = excluded.kind, "
        "path = excluded.path, size = excluded.size, mtime_ns = excluded.mtime_ns "
        "WHERE (excluded.kind, excluded.path) < (kind, path)",
        sidecars,
    )
    pictures.clear()
    sidecars.clear()


def _files(
    task: _Task, outside: list[str], packed: list[str], others: list[str]
) -> Iterator[tuple[str, str, os.DirEntry]]:
    """(path, lower-case suffix, entry) of the visible files that may be used, in no order; the rest goes to lists."""
    root, known = os.path.realpath(task.root), {*IMAGE_EXTENSIONS, *CAPTION_EXTENSIONS, ".tar"}
    folders, links = [""], []
    while folders:
        folder = folders.pop()
        for entry in _entries(task, folder):
            path = f"{folder}{entry.name}"
            if _is_folder(entry):
                links.append(path) if entry.is_symlink() else folders.append(f"{path}/")
                continue
            suffix = os.path.splitext(entry.name)[1].lower()
            if suffix not in known and entry.name not in LISTING_NAMES:
                if _PACKED_TAR.search(entry.name):
                    packed.append(path)
                elif suffix in _OTHER_PICTURES:
                    others.append(path)
            elif entry.is_symlink() and not _is_inside(os.path.realpath(entry.path), root):
                outside.append(path)
            elif _is_utf8(path):
                yield path, suffix, entry
            elif suffix in IMAGE_EXTENSIONS:
                task.bad.append((shown(path), "the name is not UTF-8; rename the file or its folder"))
            elif suffix not in CAPTION_EXTENSIONS:
                raise DataError(f"{task.place}: the name {shown(path)} is not UTF-8. Rename the file or its folder.")
    if links:
        verb = "is a link to a folder and was" if len(links) == 1 else "are links to folders and were"
        task.warnings.append(
            f"{_first([os.path.join(task.root, link) for link in sorted(links)])} {verb} not entered."
        )


def _entries(task: _Task, folder: str) -> Iterator[os.DirEntry]:
    # A folder that can't be read must not be passed over: its images would silently be missing.
    try:
        with os.scandir(os.path.join(task.root, folder)) as entries:
            yield from (entry for entry in entries if not entry.name.startswith("."))
    except OSError as error:
        place = shown(os.path.join(task.root, folder))
        raise DataError(f"{task.flag}: {place} can't be read: {_because(error)}.") from error


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link in a loop
        return False


def _status(task: _Task, path: str, suffix: str, entry: os.DirEntry) -> tuple[int, int] | None:
    """(size, mtime_ns) of a file; None for an image that is none, which is noted."""
    try:
        status = entry.stat()
        reason = "" if stat.S_ISREG(status.st_mode) else "not a file that could be read (a pipe, socket or device)"
    except OSError as error:
        reason = f"{'a broken link' if entry.is_symlink() else 'can not be read'} ({_because(error)})"
    if not reason:
        return status.st_size, status.st_mtime_ns
    if suffix not in IMAGE_EXTENSIONS:
        raise DataError(f"{shown(os.path.join(task.root, path))}: {reason}. Replace or remove it.")
    task.bad.append((shown(path), reason))
    return None


def _refuse_outside(task: _Task, outside: list[str]) -> None:
    if outside:
        be = "is a link that leads" if len(outside) == 1 else "are links that lead"
        raise DataError(
            f"{task.flag}: {_count(len(outside), 'file')} in {task.place} {be} out of the folder: "
            f"{_first(sorted(outside))}. Copy what is meant into the folder."
        )


def _is_inside(path: str, root: str) -> bool:
    return path == root or path.startswith(root.rstrip("/") + "/")


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


# Caption files ------------------------------------------------------------------------------------------------------


def _read_sidecars(task: _Task) -> None:
    """Bring `texts` up to date: the caption files that stand beside an image."""
    query = (
        "SELECT s.path, s.size, s.mtime_ns FROM sidecars s LEFT JOIN texts t ON t.path = s.path "
        "WHERE (t.path IS NULL OR t.size != s.size OR t.mtime_ns != s.mtime_ns) "
        "AND EXISTS (SELECT 1 FROM pictures p WHERE p.stem = s.stem) ORDER BY s.path"
    )

    def read(item: tuple) -> str:
        path = os.path.join(task.root, item[0])
        _refuse_long(item[1], path)
        return _decode(_read_bytes(Path(path)), path)

    with _updating(task, query) as (items, _, commit):
        for (path, size, mtime_ns), text in _in_threads(read, items):
            task.db.execute("INSERT OR REPLACE INTO texts VALUES (?, ?, ?, ?)", (path, size, mtime_ns, text))
            commit()


def _add_pictures(task: _Task) -> None:
    """An entry for each image, with the captions of its caption file."""
    bare, total = [], 0
    rows = task.db.execute(
        "SELECT p.path, p.size, p.mtime_ns, t.path, t.text FROM pictures p LEFT JOIN sidecars s ON s.stem = p.stem "
        "LEFT JOIN texts t ON t.path = s.path ORDER BY p.path"
    )

    def entries() -> Iterator[tuple]:
        nonlocal total
        for path, size, mtime_ns, sidecar, text in rows:
            total += 1
            default = task.default(path)
            if sidecar is None and default is None:
                bare.append(path) if len(bare) <= _FIRST else bare.append("")
                continue
            place = str(task.root / (sidecar or path))
            cell = text.splitlines() if text and task.caption_per_line else text
            if isinstance(cell, list):
                cell = [line for line in cell if line.strip()] or ""
            captions = _captions(cell, place, "the caption", "image", default)
            captions = task.or_default(captions, default)
            yield path, captions, path, 0, None, size, mtime_ns, place

    _insert(task.db, _INSERT_ENTRY, entries())
    if bare:
        raise DataError(
            f"{task.flag}: {len(bare)} of {total} images in {task.place} have no caption: {_first(bare)}. "
            f"Put a file ending in {' or '.join(CAPTION_EXTENSIONS)} beside each, or list the images in "
            'metadata.jsonl, one {"file_name": "…", "text": "…"} per line, or give all one with --instance_prompt, '
            "or each the name of its folder with --caption_from_folder."
        )


# Listings -----------------------------------------------------------------------------------------------------------


def _refuse_two_listings(listings: list[str], task: _Task) -> None:
    parents = Counter(os.path.dirname(path) for path in listings)
    for parent, count in parents.items():
        if count > 1:
            names = [os.path.basename(path) for path in listings if os.path.dirname(path) == parent]
            raise DataError(
                f"{task.flag}: {' and '.join(names)} are in {os.path.join(task.root, parent)}; "
                "which one counts is not clear. Remove all but one."
            )


def _add_listing(task: _Task, listing: str) -> None:
    """An entry for each row of a listing; whether the files are there is looked at later, for all at once."""
    path, root = task.root / listing, os.path.realpath(task.root)
    kinds = {".jsonl": _json_rows, ".csv": _csv_rows, ".parquet": partial(_parquet_rows, task=task)}

    def entries() -> Iterator[tuple]:
        for place, row in kinds[path.suffix](path):
            column = task.image_column if task.image_column in row else "file_name"
            _require_column(column, row, place, "--image_column")
            name = _listed_name(row[column], column, os.path.dirname(listing), root, place)
            default = task.default(name)
            if task.caption_column not in row and default is None:
                _require_column(task.caption_column, row, place, "--caption_column")
            what = f"the caption {task.caption_column!r}"
            captions = _captions(row.get(task.caption_column), place, what, "line", default)
            captions = task.or_default(captions, default)
            yield name, captions, name, 0, None, None, None, place

    _insert(task.db, _INSERT_ENTRY, entries())


def _listed_name(cell: Any, column: str, parent: str, root: str, place: str) -> str:
    """The path, relative to the root, of a file in a listing. It leads nowhere else: listings come from strangers."""
    if not isinstance(cell, str) or not cell.strip():
        raise DataError(f"{place}: {column!r} must be the name of a file, not {_brief(cell)}.")
    if "\0" in cell or not _is_utf8(cell):
        raise DataError(f"{place}: {_brief(cell)} is no usable file name. Correct it.")
    absolute = PurePosixPath(cell).is_absolute() or PureWindowsPath(cell).is_absolute()
    path = os.path.normpath(os.path.join(root, parent, cell))
    if absolute or not _is_inside(path, root):
        raise DataError(f"{place}: {_brief(cell)} leads out of the folder {root}. Copy the file into the folder.")
    return os.path.relpath(path, root)


def _check_listed(task: _Task) -> None:
    """Give every listed entry its file's size and time; those without a file are an error, or noted and left out."""
    db, root = task.db, os.path.realpath(task.root)
    update = (
        "UPDATE entries SET (size, mtime_ns) = (SELECT size, mtime_ns FROM pictures p WHERE p.path = entries.path)"
    )
    db.execute(update)
    # The rest is missing, or hidden, or below a link, or does not end like an image.
    rest = db.execute("SELECT rowid, path, place FROM entries WHERE size IS NULL ORDER BY rowid").fetchall()
    for row, path, place in rest:
        try:
            real = os.path.realpath(os.path.join(root, path))
            if not _is_inside(real, root):
                raise DataError(f"{place}: {_brief(path)} leads out of the folder {root}. Copy the file into it.")
            status = os.stat(real)
            reason = "" if stat.S_ISREG(status.st_mode) else "it is no file"
        except (OSError, ValueError) as error:
            if isinstance(error, DataError):
                raise
            reason = "there is no such file" if isinstance(error, FileNotFoundError) else _because(error)
        if not reason:
            db.execute("UPDATE entries SET size = ?, mtime_ns = ? WHERE rowid = ?",
                       (status.st_size, status.st_mtime_ns, row))  # fmt: skip
            continue
        if not task.skip_bad:
            raise DataError(
                f"{place}: {_brief(path)} is listed, but {reason} in {task.place}. "
                "Correct the line, or leave out all such lines with --on_bad_image skip."
            )
        db.execute("DELETE FROM entries WHERE rowid = ?", (row,))
        task.missing.append(f"{place}: {shown(path)}")
    if task.missing:
        task.warnings.append(
            f"{_count(len(task.missing), 'listed file')} left out: not there: {_first(task.missing)}."
        )


def _remarks_on_listing(task: _Task) -> tuple[dict, dict]:
    """What is in no listing, and what is listed more than once, each {"count": …, "first": […]}."""
    unlisted = _first_of(
        task.db,
        "SELECT p.path FROM pictures p LEFT JOIN (SELECT DISTINCT path FROM entries) e ON e.path = p.path "
        "WHERE e.path IS NULL ORDER BY p.path",
    )
    names = [name for name, _ in task.bad]  # files that can't be read, which no line that is left can name
    unlisted = {"count": unlisted["count"] + len(names), "first": (unlisted["first"] + names)[:_FIRST]}
    task.bad = []
    repeated = _first_of(task.db, "SELECT name FROM entries GROUP BY name HAVING count(*) > 1 ORDER BY name")
    for found, verb in ((unlisted, "in no listing and not used"), (repeated, "listed more than once")):
        if found["count"]:
            be = "is" if found["count"] == 1 else "are"
            names = _first(found["first"], total=found["count"])
            task.warnings.append(f"{_count(found['count'], 'image')} in {task.place} {be} {verb}: {names}.")
    return unlisted, repeated


def _first_of(db: sqlite3.Connection, query: str) -> dict[str, Any]:
    (count,) = db.execute(f"SELECT count(*) FROM ({query})").fetchone()
    return {"count": count, "first": [shown(row[0]) for row in db.execute(f"{query} LIMIT {_FIRST}")]}


# Shards -------------------------------------------------------------------------------------------------------------


def _list_tars(task: _Task, tars: list[tuple[str, int, int]]) -> None:
    """Bring `members` up to date: the images in the shards, with their captions."""
    _insert(task.db, "INSERT INTO shards VALUES (?, ?, ?)", tars)
    query = (
        "SELECT s.* FROM shards s LEFT JOIN tars t USING (path, size, mtime_ns) WHERE t.path IS NULL ORDER BY s.path"
    )
    with _updating(task, query) as (items, _, commit):
        for path, size, mtime_ns in items:
            remarks: list[str] = []
            for table in ("tars", "members", "facts"):
                task.db.execute(f"DELETE FROM {table} WHERE path = ?", (path,))
            rows = ((path, *row) for row in _shard_images(task.root / path, remarks))
            with _tar_errors(task.root / path):
                task.db.executemany("INSERT INTO members VALUES (?, ?, ?, ?, ?, ?, ?)", rows)
            task.db.execute("INSERT OR REPLACE INTO tars VALUES (?, ?, ?, ?)",
                            (path, size, mtime_ns, json.dumps(remarks)))  # fmt: skip
            commit()
    for (remarks,) in task.db.execute("SELECT t.remarks FROM tars t JOIN shards USING (path) ORDER BY path"):
        task.warnings += json.loads(remarks)


def _shard_images(path: Path, remarks: list[str]) -> Iterator[tuple[int, int, str, str, str | None, int]]:
    """(offset, length, name, caption's member, its text, whether that is JSON) of each image in a shard.

    Members are grouped as webdataset does it: neighbours with the same path up to the first dot of the base name
    belong together, and the rest of the name, in lower case, tells what they are.
    """
    key, images, texts, odd, alone = None, [], {}, [], []

    def sample() -> Iterator[tuple]:
        if texts and not images:
            alone.append(key)
        kind = next((kind for kind in ("txt", "caption", "json") if kind in texts), None)
        name, text = texts.get(kind, ("", None))
        for offset, length, image in images:
            yield offset, length, image, name, text, int(kind == "json")

    for name, kind, member, tar in _members(path):
        stem = name[: len(name) - len(kind) - 1]
        if stem != key:
            yield from sample()
            key, images, texts, kinds = stem, [], {}, set()
        place = f"{shown(str(path))}: {shown(name)}"
        if kind in kinds:
            raise DataError(f"{place}: there are two members of this kind with one name. Rename one.")
        kinds.add(kind)
        if f".{kind}" in IMAGE_EXTENSIONS:
            images.append((member.offset_data, member.size, _printable(name)))
        elif kind in ("txt", "caption", "json"):
            _refuse_long(member.size, place, _MAX_JSON if kind == "json" else None)
            texts[kind] = (_printable(name), _decode(tar.extractfile(member).read(), place))
        elif f".{kind.rpartition('.')[2]}" in IMAGE_EXTENSIONS:
            odd.append(name)
    yield from sample()
    for names, what in (
        (odd, "have more than one dot in their names, so they are no images to webdataset, and are not used"),
        (alone, "are captions without an image, and are not used"),
    ):
        if names:
            remarks.append(f"{len(names)} members of {shown(str(path))} {what}: {_first(names)}.")


_MEMBER = re.compile(r"(?:.*/|)[^.]+[.]([^/]*)", re.DOTALL)


def _members(path: Path) -> Iterator[tuple[str, str, tarfile.TarInfo, tarfile.TarFile]]:
    """(name, kind, member, tar) of the files in a tar, once each; sure to reach the end of it.

    Raises whatever tarfile raises.
    """
    with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
        while (member := tar.next()) is not None:
            tar.members.clear()  # or all of them would be held
            match = _MEMBER.fullmatch(member.name)
            if member.isreg() and match and not re.match(r"__[^/]*__($|/)", member.name):
                if member.issparse():
                    raise tarfile.ReadError(f"{shown(member.name)} is stored with holes; pack it without --sparse")
                yield member.name, match[1].lower(), member, tar
        # tarfile takes a cut or a broken header for the end. The real one is a block of zeros.
        file.seek(tar.offset)
        end = file.read(tarfile.RECORDSIZE + tarfile.BLOCKSIZE)
        if len(end) < tarfile.BLOCKSIZE or any(end[: tarfile.BLOCKSIZE]):
            raise tarfile.ReadError("it ends before its end mark")
        if any(end):
            raise tarfile.ReadError("there is more after its end, as if two were joined")


@contextlib.contextmanager
def _tar_errors(path: Path) -> Iterator[None]:
    """Turn the many errors of damaged tars into one that names the file."""
    try:
        yield
    except DataError:
        raise
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        with contextlib.suppress(OSError), open(path, "rb") as file:
            if file.read(2) in (b"\x1f\x8b", b"BZ", b"\xfd7", b"(\xb5"):
                message = f"{shown(str(path))}: a compressed tar. Uncompress it; only plain ones are read."
                raise DataError(message) from error
        raise DataError(
            f"{shown(str(path))}: the tar is damaged or cut short ({_because(error)}). Copy or pack it again."
        ) from error


def _printable(name: str) -> str:
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _add_members(task: _Task, tars: list[tuple[str, int, int]]) -> None:
    """An entry for each image in the shards."""
    bare, total = [], 0
    rows = task.db.execute(
        "SELECT m.path, offset, length, name, caption_name, text, is_json, s.size, s.mtime_ns FROM members m "
        "JOIN shards s ON s.path = m.path ORDER BY m.path, offset"
    )

    def entries() -> Iterator[tuple]:
        nonlocal total
        for path, offset, length, member, caption_name, text, is_json, size, mtime_ns in rows:
            total += 1
            default, name = task.default(path), f"{path}/{member}"
            place, what = f"{task.root / path}: {shown(caption_name or member)}", "the caption"
            if is_json:
                row, what = _json_object(text, place), f"the caption {task.caption_column!r}"
                if default is None:
                    _require_column(task.caption_column, row, place, "--caption_column")
                text = row.get(task.caption_column)
            elif text is not None and task.caption_per_line:
                text = [line for line in text.splitlines() if line.strip()] or ""
            elif text is None and default is None:
                bare.append(name) if len(bare) <= _FIRST else bare.append("")
                continue
            captions = _captions(text, place, what, "sample", default)
            captions = task.or_default(captions, default)
            yield name, captions, path, offset, length, size, mtime_ns, place

    _insert(task.db, _INSERT_ENTRY, entries())
    if bare:
        raise DataError(
            f"{task.flag}: {len(bare)} of {total} images in the shards of {task.place} have no caption: "
            f"{_first(bare)}. Each needs a .txt or .json member of the same name right beside it in the tar; "
            "or give all one with --instance_prompt."
        )


# Data sets ----------------------------------------------------------------------------------------------------------


def _load_dataset(name: str, config: str | None, split: str, cache_dir: str | os.PathLike | None) -> Any:
    """`datasets.load_dataset`, or `load_from_disk` for a folder that `save_to_disk` wrote."""
    import datasets

    folder = Path(name)
    try:
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            dataset = datasets.load_from_disk(name)
            if not isinstance(dataset, datasets.DatasetDict):
                return dataset
            if split not in dataset:
                raise DataError(f"--dataset_name {name}: there is no split {split!r}, only {sorted(dataset)}.")
            return dataset[split]
        return datasets.load_dataset(name, config, split=split, cache_dir=cache_dir)
    except DataError:
        raise
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        config_text = f" --dataset_config_name {config}" if config else ""
        raise DataError(
            f"--dataset_name {name}{config_text}: the split {split!r} can't be loaded: {error} "
            "Check its name and the network; a folder with images is --train_data_dir."
        ) from error


def _pictures(dataset: Any, task: _Task) -> Any:
    """The data set with nothing but its images, undecoded, once its columns are sure to be there."""
    import datasets

    place = f"{task.flag} {task.place}"
    _require_column(task.image_column, dataset.column_names, place, "--image_column")
    if task.default_caption is None:
        _require_column(task.caption_column, dataset.column_names, place, "--caption_column")
    # One column only: reading a row decodes every column of it.
    try:
        pictures = dataset.select_columns([task.image_column])
        return pictures.cast_column(task.image_column, datasets.Image(decode=False))
    except (TypeError, ValueError, NotImplementedError) as error:  # pyarrow's are among these
        raise DataError(
            f"--image_column {task.image_column!r} of {task.place} holds {dataset.features[task.image_column]}, "
            "not images."
        ) from error


def _scan_dataset(task: _Task, dataset: Any) -> Scan:
    _make_entries_table(task.db)
    num_empty = 0
    column = task.caption_column if task.caption_column in dataset.column_names else None

    def captions_of_rows() -> Iterator[Any]:
        if column is None:
            yield from [None] * len(dataset)
            return
        for batch in dataset.select_columns([column]).iter(batch_size=_BATCH):
            yield from batch[column]

    def entries() -> Iterator[tuple]:
        nonlocal num_empty
        for index, cell in enumerate(captions_of_rows()):
            place = f"--caption_column {task.caption_column!r} of {task.place}: row {index}"
            texts = cell if isinstance(cell, (list, tuple)) else [cell]
            if task.default_caption is None:
                num_empty += any(isinstance(text, str) and not text.strip() for text in texts) or not texts
            default = task.default_caption
            captions = _captions(cell, place, "the caption", "row", default, default is None)
            captions = task.or_default(captions, default)
            size, mtime_ns = files.get(index, (0, 0))
            yield f"{index:09d}", captions, "", index, None, size, mtime_ns, place

    files = _files_of_rows(task)
    _insert(task.db, _INSERT_ENTRY, entries())
    if num_empty:
        task.warnings.append(f"{num_empty} of {len(dataset)} captions of {task.place} are empty.")
    images = _check_images(task)
    return Scan(images, task.warnings, task.place, task.bad, defaulted=task.defaulted)


def _files_of_rows(task: _Task) -> dict[int, tuple[int, int]]:
    """(size, mtime_ns) for the rows that hold no bytes but the path of a file, which may change under the data set."""
    import pyarrow.compute as compute

    files, start = {}, 0
    for batch in task.dataset.with_format("arrow").iter(batch_size=_BATCH):
        cells = batch.column(task.image_column).combine_chunks()
        without = compute.is_null(compute.struct_field(cells, "bytes"))
        for index in np.flatnonzero(without.to_numpy(zero_copy_only=False)):
            path = compute.struct_field(cells, "path")[int(index)].as_py()
            with contextlib.suppress(OSError, TypeError, ValueError):
                status = os.stat(path)
                files[start + int(index)] = (status.st_size, status.st_mtime_ns)
        start += len(cells)
    return files


# ---------------------------------------------------------------------------------------------------------------------
# 3. Facts: what is known about files, and the tables made of it
# ---------------------------------------------------------------------------------------------------------------------

_LAYOUT = (
    "CREATE TABLE facts (path TEXT, offset INTEGER, size INTEGER, mtime_ns INTEGER, content TEXT, format TEXT, "
    "height INTEGER, width INTEGER, notes TEXT, error TEXT, PRIMARY KEY (path, offset)) WITHOUT ROWID",
    "CREATE TABLE texts (path TEXT PRIMARY KEY, size INTEGER, mtime_ns INTEGER, text TEXT) WITHOUT ROWID",
    "CREATE TABLE tars (path TEXT PRIMARY KEY, size INTEGER, mtime_ns INTEGER, remarks TEXT) WITHOUT ROWID",
    "CREATE TABLE members (path TEXT, offset INTEGER, length INTEGER, name TEXT, caption_name TEXT, text TEXT, "
    "is_json INTEGER, PRIMARY KEY (path, offset)) WITHOUT ROWID",
)
# Another layout, or another Pillow with other verdicts, and everything is read anew.
_VERSION = int(hashlib.sha256(f"1 {PIL.__version__} {_LAYOUT}".encode()).hexdigest()[:7], 16)
_TABLE = (
    "CREATE TABLE images (row INTEGER PRIMARY KEY, name TEXT, captions TEXT, content TEXT, height INTEGER, "
    "width INTEGER, path TEXT, offset INTEGER, length INTEGER, format TEXT, notes TEXT)"
)


def _with_facts(task: _Task, cache_dir: str | os.PathLike | None, key: bytes, scan: Callable[[_Task], Scan]) -> Scan:
    """Run a scan with the facts that are known about the folder or data set."""
    task.scans, warnings = _scans_folder(cache_dir)
    path = task.scans / f"files-{hashlib.sha256(key).hexdigest()[:32]}.sqlite"
    task.lock = FileLock(f"{path}.lock")
    for attempt in (1, 2):
        task.warnings, task.bad, task.missing, task.defaulted = list(warnings), [], [], 0
        try:
            with contextlib.closing(_open_facts(path, task.lock)) as task.db:
                return scan(task)
        except (sqlite3.DatabaseError, OSError) as error:
            # Damage is a DatabaseError itself; a full disk and the like are kinds of it.
            if attempt == 2 or type(error) is not sqlite3.DatabaseError:
                raise DataError(
                    f"{path}: can't be used ({error}). Is the disk full? Name another folder with --cache_dir."
                ) from error
            warnings.append(f"{path} was damaged; it was removed, and the images are read anew.")
            with task.lock:
                _remove_damaged(path)
        finally:
            task.db = None
    raise AssertionError("unreachable")


def _scans_folder(cache_dir: str | os.PathLike | None) -> tuple[Path, list[str]]:
    """The folder of the SQLite files, and a warning where it is a temporary one."""
    root = Path(cache_dir or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = root / "lpl" / "scans"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder, []
    except OSError as error:
        temporary = Path(tempfile.mkdtemp(prefix="lpl-scans-"))
        return temporary, [
            f"{folder} can't be written ({_because(error)}); what is learnt about the images is kept in {temporary}, "
            "and will be read again by the next run. Name another folder with --cache_dir."
        ]


def _open_facts(path: Path, lock: FileLock) -> sqlite3.Connection:
    with lock:
        db = sqlite3.connect(path, timeout=600, isolation_level=None)
        try:
            db.execute("PRAGMA cache_size = -8192")  # KiB
            db.execute("PRAGMA temp.cache_size = -8192")
            db.execute("PRAGMA synchronous = NORMAL")
            if db.execute("PRAGMA user_version").fetchone()[0] != _VERSION:
                db.execute("BEGIN IMMEDIATE")
                for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
                    db.execute(f'DROP TABLE "{name}"')
                for statement in _LAYOUT:
                    db.execute(statement)
                db.execute(f"PRAGMA user_version = {_VERSION}")
                db.execute("COMMIT")
        except BaseException:
            db.close()
            raise
    return db


def _remove_damaged(path: Path) -> None:
    """Remove a damaged file, unless another rank has done so and made a new one."""
    with contextlib.suppress(sqlite3.DatabaseError), contextlib.closing(sqlite3.connect(path)) as db:
        if db.execute("PRAGMA quick_check(1)").fetchone() == ("ok",):
            return
    for suffix in ("", "-journal"):
        Path(f"{path}{suffix}").unlink(missing_ok=True)


@contextlib.contextmanager
def _updating(task: _Task, query: str) -> Iterator[tuple[Iterator[tuple], int, Callable[[], None]]]:
    """(rows of a query for what is unknown, their number, a function to call after each) for the time of an update.

    When nothing is unknown, nothing is locked. Otherwise one process works and the others wait, and find it done.
    What was learnt is committed every few seconds, and when an error or Ctrl-C ends the work.
    """
    if task.db.execute(f"SELECT 1 FROM ({query}) LIMIT 1").fetchone() is None:
        yield iter(()), 0, lambda: None
        return
    last = time.monotonic()

    def commit() -> None:
        nonlocal last
        if time.monotonic() - last > _COMMIT_SECONDS:
            task.db.execute("COMMIT")
            task.db.execute("BEGIN IMMEDIATE")
            last = time.monotonic()

    with task.lock:
        # A table of its own: the query reads what the update writes.
        task.db.execute("DROP TABLE IF EXISTS temp.todo")
        task.db.execute(f"CREATE TEMP TABLE todo AS {query}")
        task.db.execute("BEGIN IMMEDIATE")
        try:
            yield _pages(task.db), task.db.execute("SELECT count(*) FROM todo").fetchone()[0], commit
        finally:
            if task.db.in_transaction:
                task.db.execute("COMMIT")


def _pages(db: sqlite3.Connection) -> Iterator[tuple]:
    last = 0
    while rows := db.execute(f"SELECT rowid, * FROM todo WHERE rowid > ? LIMIT {_BATCH}", (last,)).fetchall():
        yield from (row[1:] for row in rows)
        last = rows[-1][0]


def _in_threads(work: Callable[[tuple], Any], items: Iterable[tuple]) -> Iterator[tuple[tuple, Any]]:
    """(item, work(item)) in the items' order; only a few are taken ahead."""
    threads = os.cpu_count() or 1
    pending: deque = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                pending.append((item, pool.submit(work, item)))
                if len(pending) > 4 * threads:
                    done, future = pending.popleft()
                    yield done, future.result()
            while pending:
                done, future = pending.popleft()
                yield done, future.result()
        finally:
            for _, future in pending:
                future.cancel()


def _check_images(task: _Task) -> ImageTable:
    """Look into the images that are unknown or have changed, refuse or leave out the bad ones; returns the table."""
    query = (
        "SELECT DISTINCT e.path, e.offset, e.length, e.size, e.mtime_ns FROM entries e LEFT JOIN facts f "
        "ON f.path = e.path AND f.offset = e.offset "
        "WHERE f.path IS NULL OR f.size != e.size OR f.mtime_ns IS NOT e.mtime_ns ORDER BY e.path, e.offset"
    )
    with _updating(task, query) as (items, total, commit):
        looked = _in_threads(partial(_look, task), items)
        for (path, offset, _, size, mtime_ns), (facts, lasting) in _with_progress(task, looked, total):
            # What may be gone by the next scan, such as an unreadable file, is not kept: no file is of that time.
            task.db.execute(
                "INSERT OR REPLACE INTO facts VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (path, offset, size, mtime_ns if lasting else None, facts.content, facts.format, *facts.size,
                 ",".join(facts.notes), facts.error),
            )  # fmt: skip
            commit()
    task.db.execute(
        "CREATE TEMP TABLE checked AS SELECT DISTINCT e.name, f.error FROM entries e JOIN facts f "
        "ON f.path = e.path AND f.offset = e.offset WHERE f.error != ''"
    )
    prefix = "row " if task.dataset is not None else ""
    for name, error in task.db.execute("SELECT name, error FROM checked ORDER BY name"):
        task.bad.append((prefix + (str(int(name)) if prefix else shown(name)), _short(error)))
    _judge_bad(task)
    return _make_table(task)


def _look(task: _Task, item: tuple) -> tuple[ImageFacts, bool]:
    """(facts, whether they last) of one image, in a thread."""
    path, offset, length, size, mtime_ns = item
    try:
        if task.dataset is not None:
            return inspect(DatasetImage(task.dataset, offset, task.image_column).read_bytes()), True
        with open(os.path.join(task.root, path), "rb") as file:
            file.seek(offset)
            data = file.read() if length is None else file.read(length)
            status = os.fstat(file.fileno())
    except (OSError, DataError) as error:
        return ImageFacts("", "", (0, 0), (), f"can't be read: {_because(error)}"), False
    if (status.st_size, status.st_mtime_ns) != (size, mtime_ns):
        return ImageFacts("", "", (0, 0), (), "the file changed while it was read"), False
    return inspect(data), True


def _with_progress(task: _Task, looked: Iterable, total: int) -> Iterable:
    if not total:
        return looked
    from tqdm import tqdm

    return tqdm(looked, "checking images", total, unit=" images", delay=1, disable=not task.show, leave=False)


def _short(error: str) -> str:
    """The reason without the advice, which is given once for all."""
    reason = error.removeprefix("can't be used as an image: ")
    return re.sub(r" (Replace or remove|Make the image smaller|Remove the row)[^.]*\.?$", "", reason).rstrip(".")


def _judge_bad(task: _Task) -> None:
    task.bad.sort()
    if not task.bad:
        return
    (total,) = task.db.execute("SELECT count(DISTINCT name) FROM entries").fetchone()
    (refused,) = task.db.execute("SELECT count(*) FROM checked").fetchone()
    if not task.skip_bad:
        raise DataError(
            f"{task.flag}: {_count(len(task.bad), 'image')} of {total - refused + len(task.bad)} in {task.place} "
            f"can't be used:{_listed(task.bad)}\nReplace or remove them, or leave them out with --on_bad_image skip."
        )
    if refused == total:
        _refuse_all_bad(task)
    verb = "is" if len(task.bad) == 1 else "are"
    names = _first([f"{name} ({reason})" for name, reason in task.bad])
    task.warnings.append(
        f"{_count(len(task.bad), 'image')} in {task.place} can't be used and {verb} left out: {names}."
    )


def _refuse_all_bad(task: _Task) -> None:
    bad = task.bad + [(name, "listed, but not there") for name in task.missing]
    raise DataError(f"{task.flag}: none of the {len(bad)} images in {task.place} can be used:{_listed(bad)}")


def _listed(bad: list[tuple[str, str]]) -> str:
    rest = f"\n  and {len(bad) - 10} more" if len(bad) > 10 else ""
    return "".join(f"\n  {name}: {reason}" for name, reason in bad[:10]) + rest


def _make_table(task: _Task) -> ImageTable:
    """Write the table of the usable images, unless another scan has written the same one."""
    db = task.db
    db.execute(_TABLE.replace("TABLE images", "TEMP TABLE final"))
    db.execute(
        "INSERT INTO final SELECT row_number() OVER (ORDER BY e.name, e.captions, e.offset) - 1, e.name, e.captions, "
        "f.content, f.height, f.width, e.path, e.offset, e.length, f.format, f.notes "
        "FROM entries e JOIN facts f ON f.path = e.path AND f.offset = e.offset WHERE f.error = ''"
    )
    state, total = hashlib.sha256(), 0
    for row in db.execute("SELECT * FROM final ORDER BY row"):
        state.update(repr(row).encode("utf-8", "surrogatepass"))
        total += 1
    path = task.scans / f"images-{state.hexdigest()[:32]}.sqlite"
    column = task.image_column if task.dataset is not None else ""
    table = partial(ImageTable, path, os.path.abspath(task.root) if task.root else "", task.dataset, column)
    with contextlib.suppress(DataError):  # not there, or damaged
        return table()
    temporary = task.scans / f".tmp-{uuid.uuid4().hex}"
    try:
        _write_table(db, temporary, total)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return table()


def _write_table(db: sqlite3.Connection, path: Path, total: int) -> None:
    db.execute("ATTACH ? AS made", (str(path),))
    try:
        db.execute("PRAGMA made.journal_mode = OFF")
        db.execute("PRAGMA made.synchronous = FULL")
        db.execute("BEGIN")
        db.execute(_TABLE.replace("TABLE images", "TABLE made.images"))
        db.execute("INSERT INTO made.images SELECT * FROM final ORDER BY row")
        db.execute("CREATE TABLE made.header (count INTEGER)")
        db.execute("INSERT INTO made.header VALUES (?)", (total,))
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise
    finally:
        db.execute("DETACH made")


def _forget_vanished(task: _Task) -> None:
    """Remove what is known about files that are gone. Only that: an unlisted file may be listed again."""
    there = "SELECT path FROM pictures UNION SELECT path FROM entries"
    for table, known in (
        ("facts", there),
        ("texts", "SELECT path FROM sidecars"),
        ("tars", "SELECT path FROM shards"),
        ("members", "SELECT path FROM shards"),
    ):
        gone = f"FROM {table} WHERE path NOT IN ({known})"
        if task.db.execute(f"SELECT 1 {gone} LIMIT 1").fetchone():
            with task.lock:
                task.db.execute(f"DELETE {gone}")


# ---------------------------------------------------------------------------------------------------------------------
# 4. Captions and listings
# ---------------------------------------------------------------------------------------------------------------------


def _captions(
    cell: Any, place: str, what: str, unit: str, default: str | None, empty_allowed: bool = False
) -> str | None:
    """The captions in a cell (a text or a list of texts), stripped, joined by `_SEPARATOR`.

    None where the default caption takes their place, because all are empty or there are none.
    """
    texts = list(cell) if isinstance(cell, (list, tuple)) else [cell]
    if default is not None:
        texts = [text for text in texts if text is not None]
    for text in texts:
        if not isinstance(text, str):
            raise DataError(f"{place}: {what} must be text, not {_brief(text)}. Correct it, or name another column.")
        if len(text) > MAX_CAPTION:
            raise DataError(f"{place}: not a caption: {len(text)} characters. At most {MAX_CAPTION} are read.")
        if _SEPARATOR in text:
            raise DataError(f"{place}: {what} holds a zero byte ({_brief(text)}). Is it UTF-16? Save it as UTF-8.")
        if not _is_utf8(text):
            raise DataError(f"{place}: {what} holds half a character ({_brief(text)}). Write it anew.")
    kept = [text.strip() for text in texts if text.strip()]
    if (not kept or len(kept) < len(texts)) and default is None and not empty_allowed:
        raise DataError(f"{place}: {what} is empty. Write one, or remove the {unit}.")
    return _SEPARATOR.join(kept) if kept or default is None else None


def _decode(data: bytes, place: str | os.PathLike) -> str:
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


def _refuse_long(size: int, place: str, limit: int | None = None) -> None:
    """A file of more bytes than a caption can have is not even read."""
    if size > (limit or 4 * MAX_CAPTION):
        raise DataError(f"{shown(place)}: not a caption: {size} bytes. At most {MAX_CAPTION} characters are read.")


def _json_rows(listing: Path) -> Iterator[tuple[str, dict]]:
    """(place, row) of each line. Binary, since text would also be split at U+2028 and the like inside a string."""
    start = 0
    for number, line in enumerate(_lines(listing), start=1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise _not_utf8(f"{listing}:{number}", start + error.start) from error
        start += len(line)
        if text.strip():
            yield f"{listing}:{number}", _json_object(text, f"{listing}:{number}")


def _lines(listing: Path) -> Iterator[bytes]:
    try:
        with open(listing, "rb") as file:
            yield from file
    except OSError as error:
        raise DataError(f"{shown(str(listing))}: can't be read: {_because(error)}.") from error


def _json_object(text: str, place: str) -> dict:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: not JSON ({error}). Each line must be one object.") from error
    if not isinstance(row, dict):
        raise DataError(f'{place}: must be an object like {{"file_name": "…", "text": "…"}}, not {_brief(row)}.')
    return row


def _csv_rows(listing: Path) -> Iterator[tuple[str, dict]]:
    try:
        # newline="" leaves line breaks, also those inside quotes, to csv.
        with open(listing, "rb") as file, TextIOWrapper(file, encoding="utf-8-sig", newline="") as text:
            reader = csv.DictReader(text, strict=True)
            try:
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
        raise DataError(f"{shown(str(listing))}: can't be read: {_because(error)}.") from error


def _refuse_not_utf8(listing: Path) -> None:
    """Raise an error for the first line that is not UTF-8."""
    start = 0
    for number, line in enumerate(_lines(listing), start=1):
        try:
            line.decode()
        except UnicodeDecodeError as error:
            raise _not_utf8(f"{listing}:{number}", start + error.start) from error
        start += len(line)


def _parquet_rows(listing: Path, task: _Task) -> Iterator[tuple[str, dict]]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(listing) as file:
            names = file.schema_arrow.names
            wanted = [name for name in (task.image_column, "file_name", task.caption_column) if name in names]
            if task.image_column not in names and "file_name" not in names:
                _require_column("file_name", names, str(listing), "--image_column")
            if task.caption_column not in names and task.default("x") is None:
                _require_column(task.caption_column, names, str(listing), "--caption_column")
            number = 0
            for batch in file.iter_batches(batch_size=_BATCH, columns=list(dict.fromkeys(wanted))):
                for row in batch.to_pylist():
                    yield f"{listing}: row {number} (counted from 0)", row
                    number += 1
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{shown(str(listing))}: can't be read as Parquet: {_because(error)}") from error


def _require_column(column: str, columns: Iterable[str], place: str, flag: str) -> None:
    columns = list(columns)
    if column in columns:
        return
    near = difflib.get_close_matches(column, [str(name) for name in columns], n=1, cutoff=0.0)
    advice = f"Did you mean {flag} {near[0]}?" if near else f"Name the right one with {flag}."
    raise DataError(f"{place}: there is no column {column!r} ({flag}); the columns are {columns}. {advice}")


def _first(names: Sequence[str], total: int | None = None) -> str:
    names, total = list(names[:_FIRST]), len(names) if total is None else total
    return ", ".join(map(shown, names)) + (", …" if total > len(names) else "")


def _count(number: int, unit: str) -> str:
    return f"{number} {unit}{'s' * (number != 1)}"


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


# ---------------------------------------------------------------------------------------------------------------------
# 5. The report, and images held out
# ---------------------------------------------------------------------------------------------------------------------


def build_report(
    scan: Scan,
    held_out: Sequence[CaptionedImage],
    resolution: int,
    buckets: Sequence[tuple[int, int]] | None = None,
    batch_size: int = 1,
) -> dict[str, Any]:
    """What is in the data, as numbers and names that JSON can hold.

    Args:
        scan: its images are those to train on.
        held_out: images to validate with.
        resolution: `--resolution`, the side of the square that images are cropped to without buckets.
        buckets: sizes, of which each image goes to the one of the nearest aspect ratio.
        batch_size: of a micro-batch; a bucket with fewer images is remarked upon.

    Returns:
        Among others "remarks": sentences about what deserves a look.
    """
    images, targets = scan.images, list(buckets or [(resolution, resolution)])
    sizes = sizes_of(images)
    report: dict[str, Any] = {
        "source": scan.source,
        "images": len(images),
        "held_out": len(held_out),
        "bad": [list(pair) for pair in scan.bad],
        "missing": list(scan.missing),
        "unlisted": scan.unlisted,
        "repeated": scan.repeated,
        **_formats_and_notes(images),
        "sizes": _size_statistics(sizes),
        "captions": {**_caption_statistics(images), "default": scan.defaulted},
        "duplicates": _duplicates(images),
        "in_both": _in_both(images, held_out),
    }
    if len(images):
        chosen = assign_buckets(sizes, targets)
        short = np.zeros(len(sizes), dtype=bool)
        report["buckets"] = []
        for number, target in enumerate(targets):
            members = np.flatnonzero(chosen == number)
            short[members] = (sizes[members] < np.array(target)).any(axis=1)
            lost = float(lost_share(sizes[members], target).mean()) if len(members) else 0.0
            report["buckets"].append({"size": list(target), "images": len(members), "lost": round(lost, 4)})
        report["below_resolution"] = _named(images, short)
        report["very_wide_or_tall"] = _named(images, sizes.max(axis=1) > 4 * sizes.min(axis=1))
    report["batch_size"], report["bucketed"] = batch_size, buckets is not None
    report["remarks"] = [*scan.warnings, *_remarks(report)]
    return report


def _named(images: Sequence[CaptionedImage], mask: np.ndarray) -> dict[str, Any]:
    rows = np.flatnonzero(mask)
    first = [shown(image.name) for image in select(images, rows[:_FIRST])]
    return {"count": len(rows), "first": first}


def _formats_and_notes(images: Sequence[CaptionedImage]) -> dict[str, Any]:
    formats: Counter = Counter()
    notes: dict[str, dict] = {}
    if isinstance(images, ImageTable):  # a list knows nothing of these
        for name, format_name, joined in images.columns(f"name, {_DETAILS}"):
            formats[format_name] += 1
            for note in joined.split(",") if joined else ():
                found = notes.setdefault(note, {"count": 0, "first": []})
                found["count"] += 1
                if len(found["first"]) < _FIRST:
                    found["first"].append(shown(name))
    return {"formats": dict(formats.most_common()), "notes": dict(sorted(notes.items()))}


def _size_statistics(sizes: np.ndarray) -> dict[str, list[float]]:
    if not len(sizes):
        return {}
    columns = {"height": sizes[:, 0], "width": sizes[:, 1]}
    columns["megapixels"] = sizes[:, 0].astype(np.float64) * sizes[:, 1] / 1e6
    return {name: _spread(column) for name, column in columns.items()}


def _spread(values: np.ndarray) -> list[float]:
    return [round(float(value), 3) for value in (values.min(), np.median(values), values.max())]


def _caption_statistics(images: Sequence[CaptionedImage]) -> dict[str, Any]:
    if isinstance(images, ImageTable):
        rows = (row[0].split(_SEPARATOR) for row in images.columns("captions"))
    else:
        rows = (image.captions for image in images)
    lengths, hashes, several = [np.empty(0, np.int32)], [np.empty(0, np.uint64)], 0
    batch: list[str] = []

    def flush() -> None:
        lengths.append(np.array([len(text) for text in batch], dtype=np.int32))
        keys = b"".join(hashlib.blake2b(text.encode(), digest_size=8).digest() for text in batch)
        hashes.append(np.frombuffer(keys, dtype=np.uint64))
        batch.clear()

    for captions in rows:
        several += len(captions) > 1
        batch += captions
        if len(batch) >= _BATCH:
            flush()
    flush()
    characters = np.concatenate(lengths)
    return {
        "count": len(characters),
        "different": len(np.unique(np.concatenate(hashes))),
        "images_with_several": several,
        "empty": int((characters == 0).sum()),
        "length": _spread(characters) if len(characters) else [],
    }


def _duplicates(images: Sequence[CaptionedImage]) -> dict[str, Any]:
    """Groups of images with the same bytes under different names."""
    contents = contents_of(images)
    order = np.argsort(contents, kind="stable")
    same = contents[order[1:]] == contents[order[:-1]]
    groups, first, group = 0, [], []
    extra = 0

    def close() -> None:
        nonlocal groups, extra, group
        names = sorted({image.name for image in select(images, np.array(group))})
        if len(names) > 1:
            groups, extra = groups + 1, extra + len(names) - 1
            if len(first) < _FIRST:
                first.append([shown(name) for name in names[:_FIRST]])
        group = []

    for place in np.flatnonzero(same):
        if group and group[-1] != order[place]:  # another run of equal neighbours
            close()
        if not group:
            group.append(int(order[place]))
        group.append(int(order[place + 1]))
    if group:
        close()
    return {"groups": groups, "copies": extra, "first": sorted(first)}


def _in_both(images: Sequence[CaptionedImage], held_out: Sequence[CaptionedImage]) -> dict[str, Any]:
    """Images to validate with that are trained on too."""
    if not len(held_out) or not len(images):
        return {"count": 0, "first": []}
    return _named(held_out, np.isin(contents_of(held_out), contents_of(images)))


def _remarks(report: dict[str, Any]) -> list[str]:
    remarks = []

    def remark(found: dict[str, Any], one: str, many: str) -> None:
        if found["count"]:
            names = ", ".join(found["first"]) + (", …" if found["count"] > len(found["first"]) else "")
            remarks.append(f"{_count(found['count'], 'image')} {one if found['count'] == 1 else many}: {names}.")

    nothing = {"count": 0, "first": []}
    remark(report["notes"].get("animated", nothing), "is animated; the first frame is used",
           "are animated; the first frame is used")  # fmt: skip
    if report["duplicates"]["groups"]:
        names = "; ".join(" = ".join(group) for group in report["duplicates"]["first"])
        remarks.append(f"{report['duplicates']['copies']} images are copies of others: {names}.")
    remark(report["in_both"], "to validate with is trained on too", "to validate with are trained on too")
    remark(
        report.get("below_resolution", nothing), "is enlarged to reach its size", "are enlarged to reach their size"
    )
    remark(report.get("very_wide_or_tall", nothing), "is wider or taller than 4:1", "are wider or taller than 4:1")
    if report["bucketed"]:
        few = [bucket for bucket in report.get("buckets", ()) if 0 < bucket["images"] < report["batch_size"]]
        for bucket in few:
            height, width = bucket["size"]
            held = _count(bucket["images"], "image")
            batch = f"a batch of {report['batch_size']}"
            remarks.append(f"The bucket of {height} x {width} px holds {held}, fewer than {batch}.")
    return remarks


def report_lines(report: dict[str, Any]) -> list[str]:
    """The report as one page for the terminal: at most 40 lines."""
    rows = [("captions from", report["source"]), ("images", f"{report['images']}, held out: {report['held_out']}")]
    if report["formats"]:
        rows.append(("formats", ", ".join(f"{name or '?'} {count}" for name, count in report["formats"].items())))
    if report["notes"]:
        rows.append(("notes", ", ".join(f"{name} {found['count']}" for name, found in report["notes"].items())))
    for name, values in report["sizes"].items():
        unit = "" if name == "megapixels" else " px"
        rows.append((name, f"{values[0]:g} to {values[2]:g}{unit}, median {values[1]:g}"))
    captions = report["captions"]
    rows.append(("captions", f"{captions['count']}, {captions['different']} different"))
    if captions["images_with_several"]:
        rows[-1] = ("captions", f"{rows[-1][1]}, {captions['images_with_several']} images have several")
    if captions["default"]:
        rows.append(("", f"{captions['default']} are the default caption"))
    if captions["length"]:
        low, middle, high = captions["length"]
        rows.append(("length", f"{low:g} to {high:g} characters, median {middle:g}"))
    skipped = len(report["bad"]) + len(report["missing"])
    if skipped:
        rows.append(("left out", f"{_count(skipped, 'image')}, see the remarks"))
    lines = [f"{name:<14}{value}" for name, value in rows]
    lines += _bucket_lines(report)
    room = 40 - len(lines) - 1
    for remark in report["remarks"][:room]:
        lines.append(f"! {remark}")
    if len(report["remarks"]) > room:
        lines.append(f"! and {len(report['remarks']) - room} more remarks")
    return lines


def _bucket_lines(report: dict[str, Any]) -> list[str]:
    filled = sorted((b for b in report.get("buckets", ()) if b["images"]), key=lambda bucket: -bucket["images"])
    if not filled:
        return []
    lines = [f"{'size (h x w)':<14}{'images':>8}  {'cropped':>7}"]
    for bucket in filled[:12]:
        height, width = bucket["size"]
        bar = "#" * max(1, round(30 * bucket["images"] / filled[0]["images"]))
        lines.append(f"{f'{height} x {width}':<14}{bucket['images']:>8}  {bucket['lost']:>7.1%}  {bar}")
    if len(filled) > 12:
        rest = sum(bucket["images"] for bucket in filled[12:])
        lines.append(f"{f'{len(filled) - 12} more':<14}{rest:>8}")
    return lines


def hold_out(
    images: Sequence[CaptionedImage], amount: float
) -> tuple[Sequence[CaptionedImage], Sequence[CaptionedImage]]:
    """(training images, held-out images): which are held out follows from their content alone.

    Adding pictures to a folder later moves few of the others, and copies of one picture are never on both sides.

    Args:
        images: all images, a table or a list.
        amount: a share of them if below 1, else their number.

    Returns:
        Two selections, in the order of the images.

    Raises:
        DataError: nothing would be left on one of the two sides.
    """
    ranks = np.array([hashlib.sha256(content).hexdigest().encode() for content in contents_of(images)], dtype="S64")
    count = round(amount if amount >= 1 else amount * len(images))
    limit = np.sort(ranks)[count - 1] if 0 < count <= len(images) else b""
    held_out, training = np.flatnonzero(ranks <= limit), np.flatnonzero(ranks > limit)
    if not len(held_out) or not len(training):
        raise DataError(
            f"--validation_split {amount:g} of {len(images)} images leaves {len(training)} to train on and "
            f"{len(held_out)} to validate with; both must be at least 1."
        )
    return select(images, training), select(images, held_out)
