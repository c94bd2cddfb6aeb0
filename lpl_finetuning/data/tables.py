"""Captioned images, and the SQLite files that hold captioned images and facts about files.

Sections:

1. captioned images: a name, captions, and the place of the bytes;
2. tables of captioned images on disk; a table of a million rows takes no memory;
3. selections of rows, and the images held out for validation;
4. facts that earlier scans have stored about files, so that unchanged files are not read again.

The folder `scans` in the cache folder holds two kinds of SQLite files. `images-<digest>.sqlite` is a table that a run
trains on. The digest is that of the rows, and the file never changes. A table that nobody has opened for a month is
removed. `files-<digest>.sqlite` holds the facts about one folder or data set. It may be deleted at any time; the next
scan then reads the images again.

Importing this file imports neither torch nor datasets. Sizes are (height, width) in pixels; N counts images.
"""

import contextlib
import hashlib
import operator
import os
import sqlite3
import tempfile
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import PIL
from filelock import FileLock

from lpl_finetuning.errors import DataError, because, counted, shown
from lpl_finetuning.files import cache_folder

SEPARATOR = "\0"  # between the captions of one image in a table; sorts before every character and is in no caption
ROWS_AT_ONCE = 1000
COMMIT_SECONDS = 2.0  # a killed scan loses at most the work of this time
OLD_SECONDS = 30 * 24 * 3600  # a table that nobody has opened for this time is removed

Result = TypeVar("Result")


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
        """The bytes of the image file as uploaded.

        Raises:
            DataError: the row holds no image, or the image's file can't be read.
        """
        cell = self.dataset[self.index][self.column]
        if cell is None or (cell["bytes"] is None and not cell["path"]):
            raise DataError(f"{self}: there is no image in this row.", "Remove the row from the data set.")
        if cell["bytes"] is not None:
            return cell["bytes"]
        return read_bytes(Path(cell["path"]))

    def __str__(self) -> str:
        return f"row {self.index} (column {self.column!r}) of the data set"


@dataclass(frozen=True)
class CaptionedImage:
    """An image with its captions.

    Attributes:
        name: for sorting and messages; the name of a file is its path relative to the folder, with `/`.
        captions: one or more.
        content: sha256 of the image file, hex.
        size: (height, width) of the upright image.
        file: the image file, the tar that contains the image, or the row of a data set.
        offset: first byte of the image in a tar.
        length: bytes of the image in a tar; None for a file that is the image.
        revision: of the way in which the pixels are read; see `data.images.ImageFacts`.
        facts: the SQLite file of the facts about the image; None for an image that no scan has found.
    """

    name: str
    captions: tuple[str, ...]
    content: str
    size: tuple[int, int]
    file: Path | DatasetImage
    offset: int = 0
    length: int | None = None
    revision: int = 0
    facts: Path | None = None

    @property
    def pixels(self) -> str:
        """What identifies the pixels: the digest of the file and, above 0, the revision."""
        return f"{self.content}-revision{self.revision}" if self.revision else self.content

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
        """The bytes of the image file, undecoded; their sha256 is checked against the scan's.

        Where the file has changed, the facts about the file are forgotten: the next scan reads the file again, even if
        size and times look the same.

        Raises:
            DataError: the file has vanished, has changed, or can't be read.
        """
        if isinstance(self.file, Path):
            data = read_bytes(self.file, self.offset, self.length)
        else:
            data = self.file.read_bytes()
        if hashlib.sha256(data).hexdigest() != self.content:
            forget_content(self.facts, self.content)
            raise DataError(
                f"{self.place}: the file has changed since it was scanned.", "Start again: the new file is read."
            )
        return data


def read_bytes(path: Path, offset: int = 0, length: int | None = None) -> bytes:
    """The bytes of a file, or `length` bytes from `offset`.

    Raises:
        DataError: the file can't be read.
    """
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            return file.read(-1 if length is None else length)
    except (OSError, ValueError) as error:
        raise DataError(f"{shown(str(path))}: can't be read: {because(error)}.") from error


# ---------------------------------------------------------------------------------------------------------------------
# 2. Tables
# ---------------------------------------------------------------------------------------------------------------------

TABLE_LAYOUT = (
    "CREATE TABLE images (row INTEGER PRIMARY KEY, name TEXT, captions TEXT, content TEXT, height INTEGER, "
    "width INTEGER, path TEXT, offset INTEGER, length INTEGER, revision INTEGER, format TEXT, notes TEXT, "
    "profile TEXT, colour_remark TEXT)"
)
_OF_AN_IMAGE = "name, captions, content, height, width, path, offset, length, revision"
_COLUMNS = f"{_OF_AN_IMAGE}, format, notes, profile, colour_remark"  # only the report reads the last four


class ImageTable(Sequence[CaptionedImage]):
    """Captioned images in an immutable SQLite file, sorted by (name, captions), or a selection of the rows.

    Each access reads a row, so memory does not grow with the number of rows. Each process opens a connection of its
    own, so forked and spawned DataLoader workers may use the table.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        root: str | os.PathLike = "",
        dataset: Any = None,
        column: str = "",
        rows: np.ndarray | None = None,
        facts: Path | None = None,
    ):
        """
        Args:
            path: the SQLite file.
            root: the folder that the paths of image files are relative to.
            dataset: `datasets.Dataset` with the images, where the images are not files.
            column: the only column of the data set, undecoded images.
            rows: selected rows of the file, int64 (N,), each 0 <= row < the number of rows; None selects all.
            facts: see `CaptionedImage`.

        Raises:
            DataError: the file is missing or damaged.
        """
        self.path, self.root, self._dataset, self._column = Path(path), Path(root), dataset, column
        self._facts, self._pid, self._connection = facts, -1, None
        try:
            (self._total,) = self._execute("SELECT count FROM header").fetchone()
            (last,) = self._execute("SELECT max(row) FROM images").fetchone()
        except (sqlite3.Error, TypeError) as error:
            raise DataError(
                f"{self.path}: not a table of images ({error}).", "Start again: it is made anew."
            ) from error
        if last != self._total - 1:
            raise DataError(f"{self.path}: the table of images is incomplete.", "Delete it, and start again.")
        self._rows = None if rows is None else self._checked(rows)

    def _checked(self, rows: np.ndarray) -> np.ndarray:
        rows = np.asarray(rows, dtype=np.int64)
        if rows.size and (rows.min() < 0 or rows.max() >= self._total):
            raise IndexError(f"Rows must be at least 0 and less than {self._total}.")
        return rows

    def _execute(self, query: str, values: Sequence = ()) -> sqlite3.Cursor:
        if self._pid != os.getpid():  # first use, or a forked worker, which must not use its parent's connection
            address = f"{self.path.resolve().as_uri()}?mode=ro&immutable=1"
            try:
                self._connection = sqlite3.connect(address, uri=True, check_same_thread=False)
            except sqlite3.Error as error:
                raise DataError(f"{self.path}: can't be opened ({error}).", "Start again: it is made anew.") from error
            with contextlib.suppress(OSError):
                os.utime(self.path)  # marks the table as used: see `_remove_old`
            self._connection.execute("PRAGMA cache_size = -1024")  # KiB
            self._pid = os.getpid()
        return self._connection.execute(query, values)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_pid": -1, "_connection": None}  # an open file can't go to a spawned worker

    def __len__(self) -> int:
        return self._total if self._rows is None else len(self._rows)

    def __getitem__(self, index):
        """The image at an index; for a slice, the table of the rows in the slice."""
        if isinstance(index, slice):
            return self.select(np.arange(*index.indices(len(self)), dtype=np.int64))
        index, length = operator.index(index), len(self)
        if not -length <= index < length:
            raise IndexError(f"There is no image {index} among {length}.")
        row = index % length if self._rows is None else int(self._rows[index])
        return self._image(self._execute(f"SELECT {_OF_AN_IMAGE} FROM images WHERE row = ?", (row,)).fetchone())

    def _image(self, row: tuple) -> CaptionedImage:
        name, captions, content, height, width, path, offset, length, revision = row
        if self._dataset is None:
            file = self.root / path
        else:
            file, offset = DatasetImage(self._dataset, offset, self._column), 0
        return CaptionedImage(
            name,
            tuple(captions.split(SEPARATOR)),
            content,
            (height, width),
            file,
            offset,
            length,
            revision,
            self._facts,
        )

    def __iter__(self) -> Iterator[CaptionedImage]:
        return map(self._image, self.columns(_OF_AN_IMAGE))

    def select(self, rows: np.ndarray) -> "ImageTable":
        """The table of the images at some indices of this table, in the order of the indices. The file is shared.

        Args:
            rows: indices, integers (M,).

        Raises:
            IndexError: an index is below 0 or beyond the table.
        """
        rows = np.asarray(rows, dtype=np.int64)
        if rows.size and (rows.min() < 0 or rows.max() >= len(self)):
            raise IndexError(f"Indices must be at least 0 and less than {len(self)}.")
        rows = rows if self._rows is None else self._rows[rows]
        return ImageTable(self.path, self.root, self._dataset, self._column, rows, self._facts)

    def columns(self, names: str) -> Iterator[tuple]:
        """Rows of some columns ("name, format") in the order of this table; few rows are in memory at a time."""
        for start in range(0, len(self), ROWS_AT_ONCE):
            if self._rows is None:
                where = "row >= ? AND row < ? ORDER BY row"
                yield from self._execute(f"SELECT {names} FROM images WHERE {where}", (start, start + ROWS_AT_ONCE))
                continue
            rows = self._rows[start : start + ROWS_AT_ONCE].tolist()
            where = f"row IN ({','.join(map(str, rows))})"
            found = {row[0]: row[1:] for row in self._execute(f"SELECT row, {names} FROM images WHERE {where}")}
            yield from (found[row] for row in rows)

    def sizes(self) -> np.ndarray:
        """Sizes of the images: int32 (N, 2), (height, width)."""
        return np.fromiter(self.columns("height, width"), dtype=(np.int32, 2), count=len(self))

    def contents(self) -> np.ndarray:
        """sha256 of each image file: hex, 'S64' (N,)."""
        return np.fromiter((row[0].encode() for row in self.columns("content")), dtype="S64", count=len(self))

    def __repr__(self) -> str:
        return f"ImageTable({str(self.path)!r}, {len(self)} images)"


def store_table(
    facts: "Facts", query: str, root: Path | None = None, dataset: Any = None, column: str = ""
) -> ImageTable:
    """The table of the rows of a query. A table with the same rows is used again; old tables are removed.

    Args:
        facts: the database of the query; the table is written into the same folder.
        query: gives the columns of `TABLE_LAYOUT` after the row.
        root, dataset, column: see `ImageTable`.
    """
    db = facts.db
    db.execute(TABLE_LAYOUT.replace("TABLE images", "TEMP TABLE final"))
    number = "row_number() OVER (ORDER BY name, captions, offset) - 1"
    db.execute(f"INSERT INTO final SELECT {number}, {_COLUMNS} FROM ({query})")
    state, total = hashlib.sha256(), 0
    for row in db.execute("SELECT * FROM final ORDER BY row"):
        state.update(repr(row).encode("utf-8", "surrogatepass"))
        total += 1
    path = facts.folder / f"images-{state.hexdigest()[:32]}.sqlite"
    options = {"root": os.path.abspath(root) if root else "", "dataset": dataset, "column": column}
    try:
        table = ImageTable(path, **options, facts=facts.path)
    except DataError:  # missing or damaged
        _write_table(db, path, total)
        table = ImageTable(path, **options, facts=facts.path)
    _remove_old(facts.folder, path)
    return table


def _write_table(db: sqlite3.Connection, path: Path, total: int) -> None:
    """Write the temporary table `final` into a file; the file is complete or does not exist."""
    temporary = path.parent / f".tmp-{uuid.uuid4().hex}"
    try:
        temporary.touch()
        db.execute("ATTACH ? AS made", (str(temporary),))
        try:
            db.execute("PRAGMA made.journal_mode = OFF")
            db.execute("PRAGMA made.synchronous = FULL")
            db.execute("BEGIN")
            db.execute(TABLE_LAYOUT.replace("TABLE images", "TABLE made.images"))
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
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _remove_old(scans: Path, used: Path) -> None:
    """Remove tables that nobody has opened for `OLD_SECONDS`, and temporary files of killed scans.

    A process that has a table open can go on reading the table. The age of a file counts from the last opening or,
    where the file system records it, from the last reading.
    """
    limit = time.time() - OLD_SECONDS
    for path in (*scans.glob("images-*.sqlite"), *scans.glob(".tmp-*")):
        with contextlib.suppress(OSError):  # another scan was faster, or the file belongs to another user
            status = path.stat()
            if path != used and max(status.st_atime, status.st_mtime) < limit:
                path.unlink()


# ---------------------------------------------------------------------------------------------------------------------
# 3. Choosing among images
# ---------------------------------------------------------------------------------------------------------------------


def sizes_of(images: Sequence[CaptionedImage]) -> np.ndarray:
    """Sizes of the images in a table or another sequence: int32 (N, 2), (height, width)."""
    if isinstance(images, ImageTable):
        return images.sizes()
    return np.array([image.size for image in images], dtype=np.int32).reshape(-1, 2)


def contents_of(images: Sequence[CaptionedImage]) -> np.ndarray:
    """sha256 of each image file in a table or another sequence: hex, 'S64' (N,)."""
    if isinstance(images, ImageTable):
        return images.contents()
    return np.array([image.content.encode() for image in images], dtype="S64")


def select(images: Sequence[CaptionedImage], rows: np.ndarray) -> Sequence[CaptionedImage]:
    """The images at some indices, integers (M,): a view of a table, a list for any other sequence."""
    return images.select(rows) if isinstance(images, ImageTable) else [images[int(row)] for row in rows]


def first_of(images: Sequence[CaptionedImage], count: int | None) -> Sequence[CaptionedImage]:
    """The first `count` images; all images where count is None."""
    if count is None or len(images) <= count:
        return images
    return select(images, np.arange(count))


def hold_out(
    images: Sequence[CaptionedImage], amount: float, given: float | None = None
) -> tuple[Sequence[CaptionedImage], Sequence[CaptionedImage]]:
    """(training images, held-out images). The choice depends on the content of the images alone.

    Images that are added later move few images from one side to the other. Copies of an image are on the same side.

    Args:
        images: all images, a table or a list.
        amount: share of the images to hold out if below 1, else number of images.
        given: the flag's own value, for the message.

    Returns:
        Two selections, in the order of `images`.

    Raises:
        DataError: one of the two sides would be empty.
    """
    ranks = np.array([hashlib.sha256(content).hexdigest().encode() for content in contents_of(images)], dtype="S64")
    count = round(amount if amount >= 1 else amount * len(images))
    limit = np.sort(ranks)[count - 1] if 0 < count <= len(images) else b""
    held_out, training = np.flatnonzero(ranks <= limit), np.flatnonzero(ranks > limit)
    if not len(held_out) or not len(training):
        split = amount if given is None else given
        raise DataError(
            f"--validation_split {split:g} of {counted(len(images), 'image')} leaves {len(training)} to train on and "
            f"{len(held_out)} to validate with; both must be at least 1."
        )
    return select(images, training), select(images, held_out)


# ---------------------------------------------------------------------------------------------------------------------
# 4. Facts
# ---------------------------------------------------------------------------------------------------------------------

_FACTS_LAYOUT = (  # images, shards and members of shards; the stamp is the file's, NULL for what may not last
    "CREATE TABLE facts (path TEXT, offset INTEGER, stamp TEXT, content TEXT, format TEXT, height INTEGER, "
    "width INTEGER, notes TEXT, error TEXT, profile TEXT, colour_remark TEXT, revision INTEGER, "
    "PRIMARY KEY (path, offset)) WITHOUT ROWID",
    "CREATE TABLE tars (path TEXT PRIMARY KEY, stamp TEXT, remarks TEXT) WITHOUT ROWID",
    "CREATE TABLE members (path TEXT, offset INTEGER, length INTEGER, name TEXT, caption_name TEXT, text TEXT, "
    "is_json INTEGER, PRIMARY KEY (path, offset)) WITHOUT ROWID",
)
# Where this number differs from that of a file, everything is read again: another layout, or another Pillow, which may
# refuse other images.
FACTS_VERSION = int(hashlib.sha256(f"5 {PIL.__version__} {_FACTS_LAYOUT}".encode()).hexdigest()[:7], 16)


def stamp_of(status: os.stat_result) -> str:
    """What tells whether a file has changed: size, time of the content, time of the last change, inode.

    The first two survive `cp -p`, `rsync -t` and unpacking, whatever the content.
    """
    return f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} {status.st_ino}"


def is_same_content(stamp: str, status: os.stat_result) -> bool:
    """Whether size and time of the content are those of a stamp."""
    return stamp.split()[:2] == stamp_of(status).split()[:2]


def forget_content(facts: Path | None, content: str) -> None:
    """Make the next scan read every file again that had this content, and its shard. facts: the SQLite file."""
    if facts is None or not facts.is_file():
        return
    with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(facts, timeout=60)) as db, db:
        db.execute("UPDATE tars SET stamp = NULL WHERE path IN (SELECT path FROM facts WHERE content = ?)", (content,))
        db.execute("UPDATE facts SET stamp = NULL WHERE content = ?", (content,))


class Facts:
    """What is known about one folder or data set, in a SQLite file that any number of processes share.

    `db` is the connection; a scan adds temporary tables of its own. Statements outside BEGIN and COMMIT commit at
    once.
    """

    def __init__(self, path: Path):
        self.path, self.folder, self.lock = path, path.parent, FileLock(f"{path}.lock")
        with self.lock:
            with contextlib.suppress(OSError):
                path.touch()  # with the permissions of the umask; SQLite gives 0644 to a file that it makes
            self.db = sqlite3.connect(path, timeout=600, isolation_level=None)
            try:
                self._prepare()
            except BaseException:
                self.db.close()
                raise

    def _prepare(self) -> None:
        self.db.execute("PRAGMA cache_size = -8192")  # KiB
        self.db.execute("PRAGMA temp.cache_size = -8192")
        self.db.execute("PRAGMA synchronous = NORMAL")
        if self.db.execute("PRAGMA user_version").fetchone()[0] == FACTS_VERSION:
            return
        self.db.execute("BEGIN IMMEDIATE")
        for (name,) in self.db.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
            self.db.execute(f'DROP TABLE "{name}"')
        for statement in _FACTS_LAYOUT:
            self.db.execute(statement)
        self.db.execute(f"PRAGMA user_version = {FACTS_VERSION}")
        self.db.execute("COMMIT")

    def close(self) -> None:
        """Close the connection."""
        self.db.close()

    def insert(self, query: str, rows: Iterable[tuple]) -> None:
        """Insert many rows in one transaction. The rows are not collected in memory."""
        self.db.execute("BEGIN")
        try:
            self.db.executemany(query, rows)
        except BaseException:
            self.db.execute("ROLLBACK")
            raise
        self.db.execute("COMMIT")

    def update(
        self, query: str, read: Callable[[tuple], Any], store: Callable[[tuple, Any], Any], progress: str = ""
    ) -> None:
        """Add the facts that are missing: `store(row, read(row))` for each row of a query.

        Without rows nothing is locked. Otherwise one process works, and the other processes wait and then have
        nothing to do. The results are committed every few seconds, and when an error or Ctrl-C ends the work.

        Args:
            query: rows of what is not known yet.
            read: called in threads.
            store: called in this thread, in the order of the rows.
            progress: title of the progress bar; no bar if empty.
        """
        if self.db.execute(f"SELECT 1 FROM ({query}) LIMIT 1").fetchone() is None:
            return
        with self.lock:
            # The query is run once, into a table: it reads tables that `store` writes.
            self.db.execute("DROP TABLE IF EXISTS temp.todo")
            self.db.execute(f"CREATE TEMP TABLE todo AS {query}")
            (total,) = self.db.execute("SELECT count(*) FROM todo").fetchone()
            self.db.execute("BEGIN IMMEDIATE")
            last = time.monotonic()
            try:
                for row, found in _with_progress(in_threads(read, self._todo()), total, progress):
                    store(row, found)
                    if time.monotonic() - last > COMMIT_SECONDS:
                        self.db.execute("COMMIT")
                        self.db.execute("BEGIN IMMEDIATE")
                        last = time.monotonic()
            finally:
                if self.db.in_transaction:
                    self.db.execute("COMMIT")

    def _todo(self) -> Iterator[tuple]:
        last, query = 0, f"SELECT rowid, * FROM todo WHERE rowid > ? LIMIT {ROWS_AT_ONCE}"
        while rows := self.db.execute(query, (last,)).fetchall():
            yield from (row[1:] for row in rows)
            last = rows[-1][0]

    def forget(self, table: str, known: str) -> None:
        """Delete the rows of a table whose paths are not among those of the query `known`."""
        gone = f"FROM {table} WHERE path NOT IN ({known})"
        if self.db.execute(f"SELECT 1 {gone} LIMIT 1").fetchone():
            with self.lock:
                self.db.execute(f"DELETE {gone}")


def in_threads(work: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
    """(item, work(item)) in the order of the items; only a few items are taken ahead."""
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


def _with_progress(items: Iterable, total: int, progress: str) -> Iterable:
    if not progress:
        return items
    from tqdm import tqdm

    return tqdm(items, progress, total, unit=" images", delay=1, leave=False)


def _scans_folder(cache_dir: str | os.PathLike | None) -> tuple[Path, list[str]]:
    """(folder of the SQLite files, warnings): a temporary folder and a warning where the cache can't be written."""
    folder = cache_folder(cache_dir) / "scans"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder, []
    except OSError as error:
        temporary = Path(tempfile.mkdtemp(prefix="lpl-scans-"))
        return temporary, [
            f"{folder} can't be written ({because(error)}); what the scan finds out is kept in {temporary}, and the "
            "next run reads all images again. Name another folder with --cache_dir."
        ]


def with_facts(cache_dir: str | os.PathLike | None, key: bytes, work: Callable[[Facts, list[str]], Result]) -> Result:
    """`work(facts, warnings)` with the facts that are stored under a key.

    Where the file of the facts is damaged, it is removed, and `work` is called once more.

    Args:
        cache_dir: `--cache_dir`; the user's cache if None.
        key: identifies the folder or data set.
        work: its `warnings` begin with those about the cache.

    Raises:
        DataError: the file of the facts can't be used.
    """
    scans, warnings = _scans_folder(cache_dir)
    path = scans / f"files-{hashlib.sha256(key).hexdigest()[:32]}.sqlite"
    for attempt in (1, 2):
        try:
            with contextlib.closing(Facts(path)) as facts:
                return work(facts, [*warnings])
        except (sqlite3.DatabaseError, OSError) as error:
            # Damage raises DatabaseError itself; a full disk and the like raise subclasses.
            if attempt == 2 or type(error) is not sqlite3.DatabaseError:
                raise DataError(
                    f"{path}: can't be used ({error}). Is the disk full?", "Name another folder with --cache_dir."
                ) from error
            warnings.append(f"{path} was damaged; it was removed, and the images are read again.")
            with FileLock(f"{path}.lock"):
                _remove_damaged(path)
    raise AssertionError("unreachable")


def _remove_damaged(path: Path) -> None:
    """Remove a damaged file, unless another rank has already replaced it with a sound file."""
    with contextlib.suppress(sqlite3.DatabaseError), contextlib.closing(sqlite3.connect(path)) as db:
        if db.execute("PRAGMA quick_check(1)").fetchone() == ("ok",):
            return
    for suffix in ("", "-journal"):
        Path(f"{path}{suffix}").unlink(missing_ok=True)
