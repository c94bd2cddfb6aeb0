"""What a scan looks for and what it has found so far: the same for folders, shards and data sets.

Sections:

1. the request: what is scanned, and how captions are read;
2. the findings: tables and lists that a scan fills;
3. cells: captions, columns and JSON objects, checked in the same way for every source.

`data.folders` and `data.packed` add entries to the findings; `data.scan` checks the images of the entries. A place
says where something stands, for messages; the problem of a `DataError` begins with the place.
"""

import contextlib
import json
import os
import re
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from lpl_finetuning.data.conventions import helper_of, without_repeats
from lpl_finetuning.data.tables import SEPARATOR, Facts
from lpl_finetuning.errors import FIRST_NAMES, DataError, brief, counted, first_names, near_name, shown

MOST_LISTED = 10  # mistakes in one message
MAX_CAPTION = 100_000  # characters; a longer text is no caption
BYTE_ORDER_MARK = "\ufeff"  # at the start of a text no part of the text, however often
_BLANKS = "".join(chr(code) for code in range(0x3001) if chr(code).isspace()) + BYTE_ORDER_MARK
BLANK = "<|blank|>"  # a caption that is left blank on purpose: the prompt is empty
USUAL_NAMES = {  # of columns, in small letters
    "--caption_column": ("text", "caption", "captions", "prompt", "prompts", "description", "tags"),
    "--image_column": ("image", "img", "picture", "photo", "jpg", "png", "webp", "file", "filename", "image_path"),
}
Named = dict[str, Any]  # {"count": number of names, "first": [the first few names]}


# ---------------------------------------------------------------------------------------------------------------------
# 1. The request
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ScanRequest:
    """What is scanned, and how: a folder (`root`), or a data set (`images`).

    Attributes:
        flag: the flag that named the folder or data set, for messages.
        place: the folder or data set, for messages.
        image_column, caption_column: columns of listings and data sets.
        default_caption: caption of images without one; None if there is no such caption.
        skip_bad: leave out what can't be used instead of raising an error.
        show: show a progress bar.
        caption_from_folder: the name of the folder is the caption of images without one.
        caption_per_line: each line of a caption file is a caption of its own.
        follow_links: use files that links lead to outside the folder.
        root: the folder; None for a data set.
        images: the data set with its image column alone, undecoded; None for a folder.
        label_from_folder: the only caption of each image is a label, the name of the folder at the top that holds it.
    """

    flag: str
    place: str
    image_column: str
    caption_column: str
    default_caption: str | None
    skip_bad: bool
    show: bool
    caption_from_folder: bool = False
    caption_per_line: bool = False
    follow_links: bool = False
    root: Path | None = None
    images: Any = None
    label_from_folder: bool = False

    def default(self, path: str) -> str | None:
        """The caption of an image without one; None if there is no such caption. path: relative to the root."""
        if self.label_from_folder:
            folders = PurePosixPath(path).parts[:-1]
            return folders[0] if folders else self.root.resolve().name
        if self.default_caption is not None or not self.caption_from_folder:
            return self.default_caption
        folder, _ = without_repeats(self.folder_of(path))
        return " ".join(folder.replace("_", " ").split()) or None

    def folder_of(self, path: str) -> str:
        """The name of the folder of an image. path: relative to the root."""
        return PurePosixPath(path).parent.name or self.root.resolve().name


# ---------------------------------------------------------------------------------------------------------------------
# 2. The findings
# ---------------------------------------------------------------------------------------------------------------------

_TABLES = (
    "pictures (path TEXT PRIMARY KEY, stem TEXT, stamp TEXT)",
    "sidecars (stem TEXT, kind INTEGER, path TEXT, size INTEGER, second INTEGER, PRIMARY KEY (stem, kind, path))",
    "others (ending TEXT, path TEXT)",
    "lone (stem TEXT, kind INTEGER, path TEXT)",
    "nearly (path TEXT PRIMARY KEY, stem TEXT)",
    "shards (path TEXT PRIMARY KEY, stamp TEXT)",
    "entries (name TEXT, captions TEXT, path TEXT, offset INTEGER, length INTEGER, stamp TEXT, place TEXT)",
)


@dataclass
class Findings:
    """What a scan has found so far.

    The database of the facts gets temporary tables. `pictures`, `sidecars` (caption files), `shards` and `others`
    (files that are not read) hold the files below the folder. Among the sidecars of one stem, all but the first by
    `kind` are `second`. `lone` holds the sidecars that have the stem of no picture. `nearly` holds the pictures whose
    caption file is named otherwise, such as `a.png.txt`, with the stem of that file. `entries` has a row for each
    image of the table to be made, with captions, before the image is checked. One file may have several entries. The
    `stamp` of an entry is that of the file that holds the image.

    Attributes:
        request: what is scanned.
        facts: what earlier scans have stored about the files.
        warnings: sentences for the user.
        bad: (name, reason) of each image that can't be used.
        missing: entries of listings without a file.
        defaulted: number of captions that are the default caption.
        helpers: images with the default caption that look like helper files, by the convention of their names.
        several_lines: images whose caption file has several lines that are one caption.
        repeats: folders whose names begin with a number of repeats, where the name is a caption.
        listings: paths of the listings.
        mistakes: the first `MOST_LISTED` mistakes in captions and lines.
        num_mistakes: number of all mistakes.
        advice: the different advice on all mistakes, in order.
    """

    request: ScanRequest
    facts: Facts
    warnings: list[str]
    bad: list[tuple[str, str]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    defaulted: int = 0
    helpers: dict[str, Named] = field(default_factory=dict)
    several_lines: Named = field(default_factory=lambda: {"count": 0, "first": []})
    repeats: dict[str, None] = field(default_factory=dict)
    listings: list[str] = field(default_factory=list)
    mistakes: list[DataError] = field(default_factory=list)
    num_mistakes: int = 0
    advice: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for columns in _TABLES:
            self.db.execute(f"CREATE TEMP TABLE {columns}")

    @property
    def db(self) -> sqlite3.Connection:
        """The connection to the facts."""
        return self.facts.db

    def has(self, table: str) -> bool:
        """Whether a table has any rows."""
        return self.db.execute(f"SELECT 1 FROM {table} LIMIT 1").fetchone() is not None

    def named(self, query: str) -> Named:
        """The number of names that a query gives, and the first few names."""
        (count,) = self.db.execute(f"SELECT count(*) FROM ({query})").fetchone()
        return {"count": count, "first": [shown(row[0]) for row in self.db.execute(f"{query} LIMIT {FIRST_NAMES}")]}

    def remark(self, found: Named, unit: str, one: str, many: str) -> None:
        """Add a warning about some names, unless there are none.

        Args:
            found: the names.
            unit: what the names are names of, singular.
            one: the predicate for one name.
            many: the predicate for several names.
        """
        if count := found["count"]:
            names = first_names(found["first"], total=count)
            self.warnings.append(
                f"{counted(count, unit)} in {self.request.place} {one if count == 1 else many}: {names}."
            )

    @contextlib.contextmanager
    def noting(self) -> Iterator[None]:
        """Context manager: a DataError inside is noted as one mistake; `refuse_mistakes` raises all of them."""
        try:
            yield
        except DataError as error:
            self.num_mistakes += 1
            if len(self.mistakes) < MOST_LISTED:
                self.mistakes.append(error)
            if error.advice and error.advice not in self.advice:
                self.advice.append(error.advice)

    def refuse_mistakes(self) -> None:
        """Raise one DataError for all mistakes that were noted: users should not need a start for each mistake."""
        if self.num_mistakes == 1:
            raise DataError(self.mistakes[0].problem, self.mistakes[0].advice)
        if self.mistakes:
            found = listed([mistake.problem.rstrip(".") for mistake in self.mistakes], self.num_mistakes)
            problem = f"{self.request.flag}: {self.num_mistakes} mistakes in {self.request.place}:{found}"
            raise DataError(problem, " ".join(self.advice))

    def add_entries(self, rows: Iterable[tuple]) -> None:
        """Insert rows into `entries`, then refuse the mistakes that were noted while the rows were made."""
        self.facts.insert("INSERT INTO entries VALUES (?, ?, ?, ?, ?, ?, ?)", rows)
        self.refuse_mistakes()

    def captions(
        self,
        cell: Any,
        default: str | None,
        place: str,
        what: str,
        unit: str,
        empty_allowed: bool = False,
        path: str = "",
        member: str = "",
        is_picture: Callable[[str], bool] | None = None,
    ) -> str:
        """The captions in a cell, joined by `SEPARATOR`, or the default caption, which is counted.

        Args:
            cell: a text or a list of texts.
            default: takes the place of captions that are all empty or missing.
            place: where the cell stands.
            what: names the caption in messages.
            unit: names what the caption belongs to in messages.
            empty_allowed: without a default caption, keep empty captions instead of raising an error.
            path: of the file that holds the image, relative to the root, for remarks on the default caption; "" for
                none.
            member: path of the image in a shard, after the path of the shard.
            is_picture: whether there is a picture with a path without ending; None for images that somebody has
                listed, which are no helper files.

        Raises:
            DataError: a caption is not text, too long, not UTF-8, or empty.
        """
        if self.request.label_from_folder:
            return default
        captions = _joined(cell, place, what, unit, default, empty_allowed)
        if captions is not None:
            return captions
        self.defaulted += 1
        if path:
            self._note_conventions(path, member or path, is_picture)
        return default

    def cell_of(self, text: str | None, name: str) -> Any:
        """What `captions` takes for the content of a caption file, None without one; several lines that are one
        caption are noted. name: of the image."""
        if text is None:
            return None
        lines = caption_lines(text)
        if self.request.caption_per_line:
            return lines
        if self.request.label_from_folder or isinstance(lines, str) or len(lines) == 1:
            return text
        self.several_lines["count"] += 1
        if len(self.several_lines["first"]) < FIRST_NAMES:
            self.several_lines["first"].append(shown(name))
        return text

    def _note_conventions(self, path: str, name: str, is_picture: Callable[[str], bool] | None) -> None:
        """Note an image with the default caption whose name, or whose folder's name, follows a convention."""
        if self.request.default_caption is None:
            folder = self.request.folder_of(path)
            if without_repeats(folder)[1]:
                self.repeats[folder] = None
        helper = helper_of(name) if is_picture else None
        if helper and (helper.partners is None or any(map(is_picture, helper.partners))):
            found = self.helpers.setdefault(helper.what, {"count": 0, "first": []})
            found["count"] += 1
            if len(found["first"]) < FIRST_NAMES:
                found["first"].append(shown(name))

    def remark_on_conventions(self) -> None:
        """Add a warning for each convention that names of images and folders follow."""
        for what, found in sorted(self.helpers.items()):
            self.remark(
                found,
                "image",
                f"has no caption of its own, and is named like {what}; move it elsewhere if it is",
                f"have no captions of their own, and are named like {what}; move them elsewhere if they are",
            )
        self.remark(
            self.several_lines,
            "image",
            "has a caption file of several lines, which are one caption; with --caption_per_line each is one",
            "have caption files of several lines, which are one caption; with --caption_per_line each is one",
        )
        names = sorted(self.repeats)
        self.remark(
            {"count": len(names), "first": names[:FIRST_NAMES]},
            "folder",
            "is named as for kohya's scripts, with a number of repeats; the number is left out of the caption, and "
            "images are not repeated",
            "are named as for kohya's scripts, with numbers of repeats; the numbers are left out of the captions, and "
            "images are not repeated",
        )


def listed(lines: list[str], total: int) -> str:
    """The first lines of a list, each indented on a line of its own, and the number of further lines."""
    more = f"\n  and {total - MOST_LISTED} more" if total > MOST_LISTED else ""
    return "".join(f"\n  {line}" for line in lines[:MOST_LISTED]) + more


# ---------------------------------------------------------------------------------------------------------------------
# 3. Cells
# ---------------------------------------------------------------------------------------------------------------------


def _joined(
    cell: Any, place: str, what: str, unit: str, default: str | None, empty_allowed: bool = False
) -> str | None:
    """The stripped captions in a cell, joined by `SEPARATOR`; None where the default caption takes their place."""
    texts = list(cell) if isinstance(cell, (list, tuple)) else [cell]
    if default is not None:
        texts = [text for text in texts if text is not None]
    for text in texts:
        if not isinstance(text, str):
            raise DataError(
                f"{place}: {what} must be text, not {brief(text)}.", "Correct the caption, or name another column."
            )
        if len(text) > MAX_CAPTION:
            raise DataError(f"{place}: not a caption: {len(text)} characters. At most {MAX_CAPTION} are read.")
        if SEPARATOR in text:
            raise DataError(
                f"{place}: {what} holds a zero byte ({brief(text)}). Is it UTF-16?", "Save the file as UTF-8."
            )
        if not is_utf8(text):
            raise DataError(f"{place}: {what} holds half a character ({brief(text)}).", "Write the character again.")
    kept = ["" if bare == BLANK else bare for text in texts if (bare := text.strip(_BLANKS))]
    if (not kept or len(kept) < len(texts)) and default is None and not empty_allowed:
        advice = f"Write a caption, or remove the {unit}; {BLANK} is a caption left blank on purpose."
        raise DataError(f"{place}: {what} is empty.", advice)
    return SEPARATOR.join(kept) if kept or default is None else None


def caption_lines(text: str) -> list[str] | str:
    """The lines of a caption file with one caption per line; an empty caption for a file without lines.

    A line ends where an editor ends the line: at LF, CR or CR LF. `splitlines` would also split at form feeds, U+0085,
    U+2028 and the like.
    """
    return [line for line in re.split("\r\n|\n|\r", text) if line.strip(_BLANKS)] or ""


def refuse_long(size: int, place: str, limit: int = 4 * MAX_CAPTION) -> None:
    """Refuse a caption file of more than `limit` bytes before the file is read."""
    if size > limit:
        raise DataError(f"{shown(place)}: not a caption: {size} bytes. At most {MAX_CAPTION} characters are read.")


def decode_text(data: bytes, place: str | os.PathLike) -> str:
    """The text of a caption file, without byte order marks at the start.

    Raises:
        DataError: the bytes are not UTF-8, or one of them is zero.
    """
    try:
        text = data.decode().lstrip(BYTE_ORDER_MARK)
    except UnicodeDecodeError as error:
        raise not_utf8(place, error.start) from error
    if (at := data.find(b"\0")) >= 0:
        raise DataError(f"{shown(str(place))}: byte {at} is zero. Is it UTF-16?", "Save the file as UTF-8.")
    return text


def not_utf8(place: str | os.PathLike, byte: int) -> DataError:
    """The error for a file that is not UTF-8. byte: number of the first wrong byte, from 0."""
    return DataError(f"{shown(str(place))}: not UTF-8 (byte {byte}).", "Save the file as UTF-8.")


def is_utf8(text: str) -> bool:
    """Whether a text can be written as UTF-8; names of files need not be UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def json_object(text: str, place: str, line: bool = True) -> dict:
    """The object in a line of JSON, or in a file of its own.

    Raises:
        DataError: the text is not JSON, or not an object.
    """
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        advice = "Each line must be one object." if line else "It must be one object."
        raise DataError(f"{place}: not JSON ({error}).", advice) from error
    if not isinstance(row, dict):
        example = '{"file_name": "…", "text": "…"}' if line else '{"text": "…"}'
        raise DataError(f"{place}: must be an object like {example}, not {brief(row)}.")
    return row


def require_column(column: str, columns: Iterable[str], place: str, flag: str) -> None:
    """Raise a DataError, with a suggestion where a name is near or usual, unless the column is among the columns."""
    columns = list(columns)
    if column in columns:
        return
    names = [str(name) for name in columns]
    near = near_name(column, names) or next((name for name in names if name.lower() in USUAL_NAMES[flag]), None)
    advice = f"Did you mean {flag} {near}?" if near else f"Name the right one with {flag}."
    if not near and flag == "--caption_column":
        advice = f"Name the right one with {flag}, or give one caption for all with --instance_prompt."
    raise DataError(f"{place}: there is no column {column!r} ({flag}); the columns are {columns}.", advice)
