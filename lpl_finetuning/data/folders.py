"""Captioned images in a folder: pictures with caption files, and listings.

Sections:

1. walking: the files below a folder, and what can't be used there;
2. caption files: a `.txt` or `.caption` file beside each picture;
3. listings: `metadata.jsonl`, `.csv` and `.parquet`;
4. rows: the lines of a listing, whatever its kind.

This file alone decides which caption belongs to which file. It adds an entry for each image to the findings of a scan
(`data.findings`), without opening the image. Shards in the folder are noted here and read by `data.packed`.

Importing this file imports neither torch nor datasets; a Parquet listing imports pyarrow. Names are paths relative to
the folder, with `/`.
"""

import csv
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from io import TextIOWrapper
from itertools import chain
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

from lpl_finetuning.data.findings import (
    BYTE_ORDER_MARK,
    Findings,
    Named,
    caption_lines,
    decode_text,
    is_utf8,
    json_object,
    not_utf8,
    refuse_long,
    require_column,
)
from lpl_finetuning.data.formats import IMAGE_EXTENSIONS
from lpl_finetuning.data.tables import ROWS_AT_ONCE, in_threads, read_bytes, stamp_of
from lpl_finetuning.errors import FIRST_NAMES, DataError, because, brief, counted, first_names, is_or_are, shown

CAPTION_EXTENSIONS = (".txt", ".caption")  # the first kind that is found beside an image is read
LISTING_NAMES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")

_KNOWN = {*IMAGE_EXTENSIONS, *CAPTION_EXTENSIONS, ".tar"}
_LISTED_ONLY = (".avif", ".jfif", ".jp2", ".psd", ".tga")  # pictures that are read where a listing names them
_NEVER_READ = (".heic", ".heif", ".jxl", ".svg")  # pictures that Pillow can't open
_DATASET_FILES = (".arrow", ".parquet")
_LITTER = {"desktop.ini", "ehthumbs.db", "thumbs.db"}  # files of operating systems, in lower case
_PACKED_TAR = re.compile(r"\.(tgz|tbz2?|txz|tar\.(gz|bz2|xz|zst|lz4?|z))$", re.IGNORECASE)
_ABOUT = re.compile(  # texts beside pictures that are no captions, such as README.txt and LICENSE-MIT.txt
    r"(read[-_]?me|licen[cs]e|copying|copyright|notice|credits|authors|attributions?|sources|citation|changelog|terms"
    r"|requirements)([-_.].*)?\.txt",
    re.IGNORECASE,
)


# ---------------------------------------------------------------------------------------------------------------------
# 1. Walking
# ---------------------------------------------------------------------------------------------------------------------


class FoundFile(NamedTuple):
    """A file below the folder. `suffix` is in lower case; `size` is in bytes; `stamp` is that of `stamp_of`."""

    path: str
    suffix: str
    size: int
    stamp: str

    @property
    def stem(self) -> str:
        """The path without the suffix: the same for an image and its caption file."""
        return self.path[: -len(self.suffix)]


class FolderWalk:
    """One walk over the visible files below a folder: images, caption files, listings and tars.

    The lists are complete when `files` has ended.

    Attributes:
        bad: (name, reason) of each image that can't be read.
        unread_stems: stems of the bad images and of pictures of kinds that are not read.
        others: printable (ending, path) of each file of an unknown kind; the caller may empty the list on the way.
    """

    def __init__(self, root: Path, flag: str):
        """
        Args:
            root: the folder.
            flag: the flag that named the folder, for messages.
        """
        self.root, self.flag = root, flag
        self.bad: list[tuple[str, str]] = []
        self.unread_stems: set[str] = set()
        self.others: list[tuple[str, str]] = []
        self._real_root = os.path.realpath(root)
        self._links, self._outside, self._packed = [], [], []

    def files(self) -> Iterator[FoundFile]:
        """The usable files, in no particular order.

        Raises:
            DataError: a folder can't be read, or a file that is not an image.
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
        # Skipping a folder that can't be read would leave out its images without a word.
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
            elif not _is_expected(entry.name):
                if suffix in _LISTED_ONLY or suffix in _NEVER_READ:
                    self.unread_stems.add(path[: -len(suffix)])
                self.others.append((shown(suffix), path if is_utf8(path) else shown(path)))
        elif entry.is_symlink() and not _is_inside(os.path.realpath(entry.path), self._real_root):
            self._outside.append(path)
        elif is_utf8(path):
            return self._with_status(path, suffix, entry)
        elif suffix in IMAGE_EXTENSIONS:
            self._add_bad(path, suffix, "the name is not UTF-8; rename the file or its folder")
        elif suffix not in CAPTION_EXTENSIONS:
            raise DataError(f"{self.root}: the name {shown(path)} is not UTF-8.", "Rename the file or its folder.")
        return None

    def _with_status(self, path: str, suffix: str, entry: os.DirEntry) -> FoundFile | None:
        try:
            status = entry.stat()
            if stat.S_ISREG(status.st_mode):
                return FoundFile(path, suffix, status.st_size, stamp_of(status))
            reason = "not a file that could be read (a pipe, socket or device)"
        except OSError as error:
            reason = f"{'a broken link' if entry.is_symlink() else 'can not be read'} ({because(error)})"
        if suffix not in IMAGE_EXTENSIONS:
            raise DataError(f"{shown(os.path.join(self.root, path))}: {reason}.", "Replace or remove it.")
        self._add_bad(path, suffix, reason)
        return None

    def _add_bad(self, path: str, suffix: str, reason: str) -> None:
        self.bad.append((shown(path), reason))
        self.unread_stems.add(path[: -len(suffix)])

    def remarks(self) -> list[str]:
        """Sentences about links that are not entered.

        Raises:
            DataError: links lead out of the folder, or shards are compressed.
        """
        if self._outside:
            lead = "is a link that leads" if len(self._outside) == 1 else "are links that lead"
            raise DataError(
                f"{self.flag}: {counted(len(self._outside), 'file')} in {self.root} {lead} out of the folder: "
                f"{first_names(sorted(self._outside))}.",
                "Copy what is meant into the folder.",
            )
        if self._packed:
            raise DataError(
                f"{self.flag}: compressed tars can't be read at random: {first_names(sorted(self._packed))} in "
                f"{self.root}.",
                "Unpack those that are shards (gunzip a.tar.gz gives a.tar), and move the others elsewhere.",
            )
        remarks = []
        if self._links:
            were = "is a link to a folder and was" if len(self._links) == 1 else "are links to folders and were"
            names = first_names([os.path.join(self.root, link) for link in sorted(self._links)])
            remarks.append(f"{names} {were} not entered.")
        return remarks


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link in a loop
        return False


def _is_expected(name: str) -> bool:
    """Whether a file needs no remark: files of operating systems, README.md and the like, and Python scripts."""
    stem, suffix = os.path.splitext(name)
    return (
        name.lower() in _LITTER
        or suffix.lower() == ".py"
        or (suffix.lower() in ("", ".md", ".rst") and _is_about(f"{stem}.txt"))
    )


def _is_inside(path: str, root: str) -> bool:
    """Whether a path is the root or below the root. Both paths are absolute and normalised."""
    return path == root or path.startswith(root.rstrip("/") + "/")


def find_files(findings: Findings) -> tuple[list[str], set[str]]:
    """Fill the tables of files (`pictures`, `sidecars`, `shards`, `others`) and the findings' bad images and warnings.

    Returns:
        The sorted listings, and the stems of pictures that are not read.
    """
    walk = FolderWalk(findings.request.root, findings.request.flag)
    listings, pictures, sidecars, shards = [], [], [], []

    def store() -> None:
        findings.facts.insert("INSERT INTO pictures VALUES (?, ?, ?)", pictures)
        findings.facts.insert("INSERT INTO sidecars VALUES (?, ?, ?, ?, 0)", sidecars)
        findings.facts.insert("INSERT INTO others VALUES (?, ?)", walk.others)
        for rows in (pictures, sidecars, walk.others):
            rows.clear()

    for file in walk.files():
        if os.path.basename(file.path) in LISTING_NAMES:
            listings.append(file.path)
        elif file.suffix == ".tar":
            shards.append((file.path, file.stamp))
        elif file.suffix in CAPTION_EXTENSIONS:
            kind = CAPTION_EXTENSIONS.index(file.suffix)
            sidecars.append((file.stem, kind, file.path, file.size))
        else:
            pictures.append((file.path, file.stem, file.stamp))
        if len(pictures) + len(sidecars) + len(walk.others) >= ROWS_AT_ONCE:
            store()
    store()
    findings.db.execute("CREATE INDEX pictures_stem ON pictures (stem)")
    findings.db.execute(
        "UPDATE sidecars SET second = 1 WHERE EXISTS (SELECT 1 FROM sidecars o WHERE o.stem = sidecars.stem "
        "AND (o.kind, o.path) < (sidecars.kind, sidecars.path))"
    )
    findings.facts.insert("INSERT INTO shards VALUES (?, ?)", shards)
    findings.bad += walk.bad
    findings.warnings += walk.remarks()
    return sorted(listings), walk.unread_stems


def remarks_on_others(findings: Findings) -> list[str]:
    """Remarks on pictures of other kinds and on files of unknown kinds, unless there are none.

    Listed files don't count. Files of unknown kinds are counted by ending.
    """
    return [*_remarks_on_pictures(findings), *_remark_on_unknown(findings)]


_UNLISTED = "FROM others WHERE path NOT IN (SELECT path FROM entries)"


def _remarks_on_pictures(findings: Findings) -> list[str]:
    """A remark on pictures that only a listing makes usable, and another on those that can't be read."""
    remarks = []
    for endings, told in (
        (_LISTED_ONLY, "not used: files with such an ending are read only if a listing names them"),
        (_NEVER_READ, "of a kind that is not read"),
    ):
        found = findings.named(f"SELECT path {_UNLISTED} AND ending IN {endings} ORDER BY path")
        if count := found["count"]:
            names = first_names(found["first"], total=count)
            remarks.append(
                f"{counted(count, 'picture')} in {findings.request.place} {is_or_are(count)} {told}: {names}."
            )
    return remarks


def _remark_on_unknown(findings: Findings) -> list[str]:
    """A remark on the files of unknown kinds, counted by ending, unless there are none."""
    rows = findings.db.execute(
        f"SELECT ending, count(*), min(path) {_UNLISTED} AND ending NOT IN {(*_LISTED_ONLY, *_NEVER_READ)} "
        "GROUP BY ending ORDER BY count(*) DESC, ending"
    ).fetchall()
    if not rows:
        return []
    count = sum(row[1] for row in rows)
    kinds = [
        f"{ending or 'no ending'}: {number}, such as {shown(path)}" for ending, number, path in rows[:FIRST_NAMES]
    ]
    if len(rows) > FIRST_NAMES:
        kinds.append(f"and {counted(len(rows) - FIRST_NAMES, 'more ending')}")
    advice = f"Convert or rename what is meant, a picture to .png, a caption to .txt, a listing to {_LISTINGS}, and "
    advice += "move the rest elsewhere."
    if any(ending in _DATASET_FILES for ending, *_ in rows):
        advice = (
            f"A listing must be called {_LISTINGS}. Parquet and Arrow files that hold the pictures themselves are "
        )
        advice += f"a data set, {_where_data_sets_go(findings.request.flag)}"
    are = is_or_are(count)
    return [f"{counted(count, 'file')} in {findings.request.place} {are} of no kind that is read "
            f"({'; '.join(kinds)}). {advice}"]  # fmt: skip


_LISTINGS = " or ".join(LISTING_NAMES)


def _where_data_sets_go(flag: str) -> str:
    """What to do with a data set, depending on the flag that names the folder."""
    if flag == "--train_data_dir":
        return "whose folder is given as --dataset_name."
    return f"which {flag.split()[0]} does not take."


# ---------------------------------------------------------------------------------------------------------------------
# 2. Caption files
# ---------------------------------------------------------------------------------------------------------------------


def add_captioned_pictures(findings: Findings, unread_stems: set[str]) -> Named:
    """Add an entry for each picture, with the captions of the caption file beside the picture.

    Args:
        findings: with the tables that `find_files` fills.
        unread_stems: stems of pictures that are not read; caption files beside them get no remark.

    Returns:
        The caption files that are not used.

    Raises:
        DataError: a picture has no caption, or caption files can't be used.
    """
    _add_pictures(findings)
    lone, second = _remark_on_lone_captions(findings, unread_stems), _remark_on_second_captions(findings)
    return {"count": lone["count"] + second["count"], "first": [*lone["first"], *second["first"]][:FIRST_NAMES]}


def _with_captions(findings: Findings) -> Iterator[tuple[str, str, str | None, str | DataError | None]]:
    """(path, stamp, path of the caption file, text or error) of each picture; None for no caption file.

    Caption files are small, and are read anew by every scan: nothing about an old text can be out of date.
    """
    cursor = findings.db.execute(
        "SELECT p.path, p.stamp, s.path, s.size FROM pictures p LEFT JOIN sidecars s "
        "ON s.stem = p.stem AND NOT s.second ORDER BY p.path"
    )

    root = findings.request.root

    def read(rows: list[tuple]) -> list[str | DataError | None]:  # in a thread
        texts: list[str | DataError | None] = []
        for *_, sidecar, size in rows:
            try:
                text = None if sidecar is None else read_caption_file(os.path.join(root, sidecar), size)
            except DataError as error:
                text = error
            texts.append(text)
        return texts

    chunks = iter(lambda: cursor.fetchmany(ROWS_AT_ONCE), [])
    for rows, texts in in_threads(read, chunks):
        for (path, stamp, sidecar, _), text in zip(rows, texts, strict=True):
            yield path, stamp, sidecar, text


def _add_pictures(findings: Findings) -> None:
    """Add an entry for each picture; refuse all mistakes in caption files, then pictures without a caption."""
    request, bare, total = findings.request, [], 0

    def is_picture(stem: str) -> bool:
        return findings.db.execute("SELECT 1 FROM pictures WHERE stem = ?", (stem,)).fetchone() is not None

    def entries() -> Iterator[tuple]:
        nonlocal total
        for path, stamp, sidecar, text in _with_captions(findings):
            total += 1
            default = request.default(path)
            if sidecar is None and default is None:
                bare.append(path if len(bare) <= FIRST_NAMES else "")
                continue
            place = str(request.root / (sidecar or path))
            with findings.noting():
                if isinstance(text, DataError):
                    raise text
                cell = caption_lines(text) if text is not None and request.caption_per_line else text
                captions = findings.captions(
                    cell, default, place, "the caption", "image", path=path, is_picture=is_picture
                )
                yield path, captions, path, 0, None, stamp, place

    findings.add_entries(entries())
    if bare:
        others = "".join(f" {remark}" for remark in remarks_on_others(findings))
        raise DataError(
            f"{request.flag}: {len(bare)} of {total} images in {request.place} have no caption: {first_names(bare)}.",
            f"Put a file ending in {' or '.join(CAPTION_EXTENSIONS)} beside each, or list the images in "
            'metadata.jsonl, one {"file_name": "…", "text": "…"} per line, or give all one with --instance_prompt, '
            f"or each the name of its folder with --caption_from_folder.{others}",
        )


def _remark_on_lone_captions(findings: Findings, unread_stems: set[str]) -> Named:
    """The caption files beside neither an image, nor a picture that is not read, nor a shard."""
    lone = "FROM sidecars s WHERE NOT EXISTS (SELECT 1 FROM pictures p WHERE p.stem = s.stem)"
    shards = {os.path.splitext(path)[0] for (path,) in findings.db.execute("SELECT path FROM shards")}
    found: Named = {"count": 0, "first": []}
    for stem, path in findings.db.execute(f"SELECT s.stem, s.path {lone} ORDER BY s.path"):
        if stem in unread_stems or stem in shards or _is_about(path):
            continue
        found["count"] += 1
        if len(found["first"]) < FIRST_NAMES:
            found["first"].append(shown(path))
    findings.remark(found, "caption file", "has no image and is not used", "have no images and are not used")
    return found


def _remark_on_second_captions(findings: Findings) -> Named:
    """The caption files beside an image whose captions come from another caption file."""
    found = findings.named(
        "SELECT path FROM sidecars s WHERE second AND EXISTS (SELECT 1 FROM pictures p WHERE p.stem = s.stem) "
        "ORDER BY path"
    )
    findings.remark(found, "caption file", "is not used, since another one of the same image comes first",
                "are not used, since others of the same images come first")  # fmt: skip
    return found


def read_caption_file(path: str, size: int) -> str:
    """The text of a caption file; a file that is too long is not opened. size: bytes of the file."""
    refuse_long(size, path)
    try:  # a scan reads all caption files: plain system calls take a quarter of the time of `open`
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            data = os.read(descriptor, size + 1)
        finally:
            os.close(descriptor)
    except OSError:
        data = None
    if data is None or len(data) != size:  # gone, or changed since the walk
        data = read_bytes(Path(path))
    return decode_text(data, path)


def _is_about(path: str) -> bool:
    """Whether a file describes the folder (README.txt and the like) and is no caption."""
    return _ABOUT.fullmatch(os.path.basename(path)) is not None


# ---------------------------------------------------------------------------------------------------------------------
# 3. Listings
# ---------------------------------------------------------------------------------------------------------------------


def add_listings(findings: Findings, listings: Sequence[str]) -> dict[str, Named]:
    """Add an entry for each row of the listings.

    Returns:
        "unlisted" images, images that are "repeated" in listings, and "unused_captions", by the names of `Scan`.

    Raises:
        DataError: two listings lie in one folder, or rows can't be used.
    """
    _refuse_two_listings(listings, findings.request.root, findings.request.flag)
    for listing in listings:
        _add_listing(findings, listing)
    _check_listed(findings)
    return _remark_on_listed(findings)


def _refuse_two_listings(listings: Sequence[str], root: Path, flag: str) -> None:
    """Raise a DataError where two listings lie in one folder."""
    parents = Counter(os.path.dirname(path) for path in listings)
    for parent, count in parents.items():
        if count > 1:
            names = [os.path.basename(path) for path in listings if os.path.dirname(path) == parent]
            raise DataError(
                f"{flag}: {' and '.join(names)} are in {os.path.join(root, parent)}; which one counts is not clear.",
                "Remove all but one.",
            )


def _add_listing(findings: Findings, listing: str) -> None:
    """Add an entry for each row of a listing. `_check_listed` checks later whether the files exist."""
    request, root = findings.request, os.path.realpath(findings.request.root)
    what = f"the caption {request.caption_column!r}"
    needed = request.default("x") is None

    def entries() -> Iterator[tuple]:
        for place, row in _listing_rows(request.root / listing, request.image_column, request.caption_column, needed):
            column = request.image_column if request.image_column in row else "file_name"
            require_column(column, row, place, "--image_column")
            if needed:
                require_column(request.caption_column, row, place, "--caption_column")
            with findings.noting():
                name = _listed_name(row[column], column, os.path.dirname(listing), root, place)
                captions = findings.captions(
                    row.get(request.caption_column), request.default(name), place, what, "line", path=name
                )
                yield name, captions, name, 0, None, None, place

    findings.add_entries(entries())


def _check_listed(findings: Findings) -> None:
    """Set the stamp of each listed entry. An entry without a file is an error, or noted and left out."""
    db, root = findings.db, os.path.realpath(findings.request.root)
    db.execute("UPDATE entries SET stamp = (SELECT stamp FROM pictures p WHERE p.path = entries.path)")
    # The other files are missing, hidden, below a link, or have another ending than images.
    rest = db.execute("SELECT rowid, path, place FROM entries WHERE stamp IS NULL ORDER BY rowid").fetchall()
    for row, path, place in rest:
        with findings.noting():
            stamp, reason = _listed_stamp(path, root, place)
            if stamp is not None:
                db.execute("UPDATE entries SET stamp = ? WHERE rowid = ?", (stamp, row))
            elif findings.request.skip_bad:
                db.execute("DELETE FROM entries WHERE rowid = ?", (row,))
                findings.missing.append(f"{place}: {shown(path)}")
            else:
                raise DataError(
                    f"{place}: {brief(path)} is listed, but {reason} in {findings.request.place}.",
                    "Correct the line, or leave out all such lines with --on_bad_image skip.",
                )
    findings.refuse_mistakes()
    if findings.missing:
        findings.warnings.append(
            f"{counted(len(findings.missing), 'listed file')} left out: not there: {first_names(findings.missing)}."
        )


def _remark_on_listed(findings: Findings) -> dict[str, Named]:
    """Images in no listing, images that are listed more than once, and caption files of listed images."""
    unlisted = findings.named(
        "SELECT p.path FROM pictures p LEFT JOIN (SELECT DISTINCT path FROM entries) e ON e.path = p.path "
        "WHERE e.path IS NULL ORDER BY p.path"
    )
    names = [name for name, _ in findings.bad]  # no entry can name a file that can't be read
    unlisted = {"count": unlisted["count"] + len(names), "first": (unlisted["first"] + names)[:FIRST_NAMES]}
    findings.bad = []
    repeated = findings.named("SELECT name FROM entries GROUP BY name HAVING count(*) > 1 ORDER BY name")
    beside = findings.named(
        "SELECT path FROM sidecars WHERE stem IN (SELECT p.stem FROM pictures p JOIN entries e ON e.path = p.path) "
        "ORDER BY path"
    )
    findings.remark(unlisted, "image", "is in no listing and not used", "are in no listing and not used")
    findings.remark(repeated, "image", "is listed more than once", "are listed more than once")
    findings.remark(beside, "caption file", "is not used, since its image is listed",
                "are not used, since their images are listed")  # fmt: skip
    return {"unlisted": unlisted, "repeated": repeated, "unused_captions": beside}


def _listed_name(cell: Any, column: str, parent: str, root: str, place: str) -> str:
    """The path of a listed file, relative to the root. Listings come from strangers: a path must not leave the root.

    Args:
        cell: the content of the cell.
        column: the column of the cell, for messages.
        parent: the folder of the listing, relative to the root.
        root: the folder, absolute and without links.
        place: the listing and the line.
    """
    if not isinstance(cell, str) or not cell.strip():
        raise DataError(f"{place}: {column!r} must be the name of a file, not {brief(cell)}.")
    if "\0" in cell or not is_utf8(cell):
        raise DataError(f"{place}: {brief(cell)} is no usable file name.", "Correct the name.")
    absolute = PurePosixPath(cell).is_absolute() or PureWindowsPath(cell).is_absolute()
    path = os.path.normpath(os.path.join(root, parent, cell))
    if absolute or not _is_inside(path, root):
        raise DataError(f"{place}: {brief(cell)} leads out of the folder {root}.", "Copy the file into the folder.")
    return os.path.relpath(path, root)


def _listed_stamp(path: str, root: str, place: str) -> tuple[str | None, str]:
    """(stamp, "") of a listed file, or (None, reason) for a file that can't be read.

    Raises:
        DataError: a link in the path leads out of the folder.
    """
    try:
        real = os.path.realpath(os.path.join(root, path))
        if not _is_inside(real, root):
            raise DataError(
                f"{place}: {brief(path)} leads out of the folder {root}.", "Copy the file into the folder."
            )
        status = os.stat(real)
    except DataError:
        raise
    except FileNotFoundError:
        return None, "there is no such file"
    except (OSError, ValueError) as error:
        return None, because(error)
    if not stat.S_ISREG(status.st_mode):
        return None, "it is no file"
    return stamp_of(status), ""


# ---------------------------------------------------------------------------------------------------------------------
# 4. Rows
# ---------------------------------------------------------------------------------------------------------------------


def _listing_rows(
    listing: Path, image_column: str, caption_column: str, caption_needed: bool
) -> Iterator[tuple[str, dict]]:
    """(place, row) of each row of a listing; the ending of the name tells the kind.

    Args:
        listing: the file.
        image_column, caption_column: the columns of a Parquet file that are read.
        caption_needed: refuse a Parquet file without the caption column.
    """
    if listing.suffix == ".jsonl":
        return _json_rows(listing)
    if listing.suffix == ".csv":
        return _csv_rows(listing)
    return _parquet_rows(listing, image_column, caption_column, caption_needed)


def _json_rows(listing: Path) -> Iterator[tuple[str, dict]]:
    # Lines of a binary file: lines of a text file would also end at U+2028 and the like inside a string.
    start = 0
    for number, line in enumerate(_lines(listing), start=1):
        try:
            text = line.decode().lstrip(BYTE_ORDER_MARK)
        except UnicodeDecodeError as error:
            raise not_utf8(f"{listing}:{number}", start + error.start) from error
        start += len(line)
        if text.strip():
            yield f"{listing}:{number}", json_object(text, f"{listing}:{number}")


def _lines(listing: Path) -> Iterator[bytes]:
    try:
        with open(listing, "rb") as file:
            yield from file
    except OSError as error:
        raise DataError(f"{shown(str(listing))}: can't be read: {because(error)}.") from error


def _csv_rows(listing: Path) -> Iterator[tuple[str, dict]]:
    try:
        # newline="" leaves line breaks, also those inside quotes, to csv.
        with open(listing, "rb") as file, TextIOWrapper(file, encoding="utf-8-sig", newline="") as text:
            header = text.readline().lstrip(BYTE_ORDER_MARK)
            # Without skipinitialspace, a quote after a comma and a blank would begin no quoted field.
            reader = csv.DictReader(chain([header], text), strict=True, skipinitialspace=True)
            try:
                reader.fieldnames = _csv_header(reader.fieldnames or [], f"{listing}:1")
                for row in reader:
                    place = f"{listing}:{reader.line_num}"
                    if None in row:
                        raise DataError(
                            f"{place}: more fields than columns.", "Put a caption with a comma into quotes."
                        )
                    if any(_LATE_QUOTE.match(cell) for cell in row.values() if cell):
                        raise DataError(
                            f"{place}: a tab or another blank stands between a comma and a quote.", "Remove the blank."
                        )
                    yield place, row
            except csv.Error as error:
                # line_num counts the rows before this row: csv notices an open quote only at the end of the file.
                place = f"{listing}:{reader.line_num + 1}"
                raise DataError(f"{place}: not CSV ({error}). Is a quote left open?") from error
    except UnicodeDecodeError:
        # The error counts from the start of the last block, so the file is searched again for the place.
        _refuse_not_utf8(listing)
        raise
    except OSError as error:
        raise DataError(f"{shown(str(listing))}: can't be read: {because(error)}.") from error


_LATE_QUOTE = re.compile(r'\s+"')  # at the start of a cell: csv has taken the quote for a part of the text


def _csv_header(names: Sequence[str], place: str) -> list[str]:
    """The names of the columns without blanks around them. A table with other separators is refused."""
    if len(names) == 1:
        for separator, what in ((";", "semicolons"), ("\t", "tabs")):
            if separator in names[0]:
                raise DataError(
                    f"{place}: the columns seem to be separated by {what}; they must be separated by commas.",
                    "Save the file with commas, and captions with a comma in quotes.",
                )
    return [name.strip() for name in names]


def _refuse_not_utf8(listing: Path) -> None:
    """Raise a DataError for the first line that is not UTF-8."""
    start = 0
    for number, line in enumerate(_lines(listing), start=1):
        try:
            line.decode()
        except UnicodeDecodeError as error:
            raise not_utf8(f"{listing}:{number}", start + error.start) from error
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
