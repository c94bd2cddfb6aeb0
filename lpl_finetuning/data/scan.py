"""The data of a run, as its flags name them: images and held-out images, sizes, captions, and the report on them."""

import contextlib
import json
import os
import re
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from lpl_finetuning.base_model import offline_without_hub
from lpl_finetuning.data.folders import (
    CAPTION_EXTENSIONS,
    LISTING_NAMES,
    FolderWalk,
    caption_lines,
    is_about,
    join_captions,
    json_object,
    listed_name,
    listed_status,
    listing_rows,
    read_caption_file,
    refuse_two_listings,
    require_column,
)
from lpl_finetuning.data.images import IMAGE_EXTENSIONS, ImageFacts, inspect
from lpl_finetuning.data.packed import cells_of, files_of_rows, load_dataset, shard_images, undecoded_images
from lpl_finetuning.data.tables import (
    ROWS_AT_ONCE,
    CaptionedImage,
    DatasetImage,
    Facts,
    ImageTable,
    hold_out,
    select,
    store_table,
    with_facts,
)
from lpl_finetuning.errors import FIRST_NAMES, DataError, be, because, brief, counted, first_names, shown


def find_images(args):
    """(`Scan` of the images to train on, held-out images); a DataError names the file or column that is wrong."""
    columns = {
        "image_column": args.image_column,
        "caption_column": args.caption_column,
        "default_caption": args.instance_prompt,
        "on_bad_image": args.on_bad_image,
        "cache_dir": args.cache_dir,
        "show": int(os.environ.get("RANK", "0")) == 0,
    }
    of_folders = {"caption_from_folder": args.caption_from_folder, "caption_per_line": args.caption_per_line}
    if args.train_data_dir:
        scan = scan_folder(args.train_data_dir, **columns, **of_folders)
    else:
        local = Path(args.dataset_name).is_dir()
        with contextlib.nullcontext() if local else offline_without_hub():
            scan = scan_dataset(
                args.dataset_name, args.dataset_config_name, **columns, max_samples=args.max_train_samples
            )
    images, held_out = scan.images, []
    if args.validation_data_dir:
        held = scan_folder(args.validation_data_dir, flag="--validation_data_dir", **columns, **of_folders)
        remarks = held.warnings + [f"{held.skipped} of the images are left out."] * bool(held.skipped)
        scan = replace(scan, warnings=scan.warnings + [f"--validation_data_dir: {remark}" for remark in remarks])
        held_out = held.images
    elif args.validation_split:
        share = args.validation_split
        wanted = share if share >= 1 else share * len(images)
        images, held_out = hold_out(images, min(wanted, args.max_validation_samples) if wanted >= 1 else share)
    return replace(scan, images=first_of(images, args.max_train_samples)), first_of(
        held_out, args.max_validation_samples
    )


def first_of(images, count):
    """The first images; all of them where count is None."""
    if count is None or len(images) <= count:
        return images
    return select(images, np.arange(count))


MOST_LISTED = 10  # mistakes in one message
Named = dict[str, Any]  # {"count": how many, "first": [the names of the first few]}


# ---------------------------------------------------------------------------------------------------------------------
# 1. Scanning
# ---------------------------------------------------------------------------------------------------------------------


def _nothing() -> Named:
    return {"count": 0, "first": []}


@dataclass(frozen=True)
class Scan:
    """What was found.

    `images` are sorted by (name, captions). `warnings` are sentences for the user. `source` tells where the captions
    came from. `bad` are the images that were left out, with their reasons; `missing` are the entries of listings
    without a file, left out too. `unlisted` and `repeated` count the images in no listing, or listed more than once,
    with their first names; `unused_captions` does so for caption files without an image, or beside a listed one or
    another caption file. `defaulted` counts the captions that are a prompt or a folder's name.
    """

    images: Sequence[CaptionedImage]
    warnings: list[str]
    source: str
    bad: list[tuple[str, str]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unlisted: Named = field(default_factory=_nothing)
    repeated: Named = field(default_factory=_nothing)
    unused_captions: Named = field(default_factory=_nothing)
    defaulted: int = 0

    @property
    def skipped(self) -> int:
        """How many images were left out."""
        return len(self.bad) + len(self.missing)


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
    asked = _Asked(
        flag, str(folder), image_column, caption_column, default_caption, _skips(on_bad_image), show,
        caption_from_folder, caption_per_line, Path(folder),
    )  # fmt: skip
    if not os.path.exists(folder):
        raise DataError(f"{flag}: {folder} does not exist.")
    if not os.path.isdir(folder):
        raise DataError(f"{flag}: {folder} is not a folder. Name the folder that holds the images.")
    key = os.fsencode(asked.root.resolve())
    return with_facts(cache_dir, key, lambda facts, warnings: _scan_folder(_Task(asked, facts, warnings)))


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
    skip_bad = _skips(on_bad_image)
    dataset = load_dataset(dataset_name, dataset_config_name, split, cache_dir)
    key = f"{dataset._fingerprint} {image_column}".encode()
    if max_samples is not None:
        dataset = dataset.select(range(min(max_samples, len(dataset))))
    place = f"--dataset_name {dataset_name}"
    if not len(dataset):
        raise DataError(f"{place}: the split {split!r} is empty.")
    require_column(image_column, dataset.column_names, place, "--image_column")
    if default_caption is None:
        require_column(caption_column, dataset.column_names, place, "--caption_column")
    asked = _Asked(
        "--dataset_name", dataset_name, image_column, caption_column, default_caption, skip_bad, show,
        images=undecoded_images(dataset, image_column, dataset_name),
    )  # fmt: skip
    return with_facts(cache_dir, key, lambda facts, warnings: _scan_dataset(_Task(asked, facts, warnings), dataset))


def _skips(on_bad_image: str) -> bool:
    if on_bad_image not in ("error", "skip"):
        raise DataError(f"--on_bad_image is {on_bad_image!r}; it must be error or skip.")
    return on_bad_image == "skip"


@dataclass(frozen=True)
class _Asked:
    """What is to be scanned, and how: a folder `root`, or a data set with nothing but `images`."""

    flag: str
    place: str  # the folder or data set, for messages
    image_column: str
    caption_column: str
    default_caption: str | None
    skip_bad: bool
    show: bool
    caption_from_folder: bool = False
    caption_per_line: bool = False
    root: Path | None = None
    images: Any = None

    def default(self, path: str) -> str | None:
        """The caption of an image without one, if there is such a thing."""
        if self.default_caption is not None or not self.caption_from_folder:
            return self.default_caption
        folder = PurePosixPath(path).parent.name or self.root.resolve().name
        return " ".join(folder.replace("_", " ").split()) or None


@dataclass
class _Task:
    """One scan under way: what is asked for, the facts with the scan's own tables among them, what was found so far.

    The tables: `pictures`, `sidecars` (caption files), `shards` and `others` (what is not read) are the files below
    the folder. Of the sidecars of one stem all but the first, by their `kind`, are `second`. `entries` has a row for
    each image that will be in the table, with its captions but before it was looked into; those of one file may be
    several. Its `size` and `mtime_ns` are of the file that holds the image.
    """

    asked: _Asked
    facts: Facts
    warnings: list[str]
    bad: list[tuple[str, str]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    defaulted: int = 0
    mistakes: list[str] = field(default_factory=list)  # the first of them
    num_mistakes: int = 0

    def __post_init__(self) -> None:
        for columns in (
            "pictures (path TEXT PRIMARY KEY, stem TEXT, size INTEGER, mtime_ns INTEGER)",
            "sidecars (stem TEXT, kind INTEGER, path TEXT, size INTEGER, mtime_ns INTEGER, second INTEGER, "
            "PRIMARY KEY (stem, kind, path))",
            "others (ending TEXT, path TEXT)",
            "shards (path TEXT PRIMARY KEY, size INTEGER, mtime_ns INTEGER)",
            "entries (name TEXT, captions TEXT, path TEXT, offset INTEGER, length INTEGER, size INTEGER, "
            "mtime_ns INTEGER, place TEXT)",
        ):
            self.db.execute(f"CREATE TEMP TABLE {columns}")

    @property
    def db(self) -> sqlite3.Connection:
        """The connection to the facts."""
        return self.facts.db

    def has(self, table: str) -> bool:
        """Whether there is anything in a table."""
        return self.db.execute(f"SELECT 1 FROM {table} LIMIT 1").fetchone() is not None

    def named(self, query: str) -> Named:
        """How many names a query gives, and the first few."""
        (count,) = self.db.execute(f"SELECT count(*) FROM ({query})").fetchone()
        return {"count": count, "first": [shown(row[0]) for row in self.db.execute(f"{query} LIMIT {FIRST_NAMES}")]}

    def remark(self, found: Named, unit: str, one: str, many: str) -> None:
        """A warning about what was found, if anything was."""
        if count := found["count"]:
            names = first_names(found["first"], total=count)
            self.warnings.append(
                f"{counted(count, unit)} in {self.asked.place} {one if count == 1 else many}: {names}."
            )

    @contextlib.contextmanager
    def noting(self) -> Iterator[None]:
        """Inside, a DataError is a mistake in one caption or line; `refuse_mistakes` tells of all together."""
        try:
            yield
        except DataError as error:
            self.num_mistakes += 1
            if self.num_mistakes <= MOST_LISTED:
                self.mistakes.append(str(error))

    def refuse_mistakes(self) -> None:
        """Raise a DataError for the mistakes that were noted, if any were: nobody wants to hear of one a start."""
        if self.num_mistakes == 1:
            raise DataError(self.mistakes[0])
        if self.mistakes:
            found = "".join(f"\n  {mistake}" for mistake in self.mistakes) + _more(self.num_mistakes)
            raise DataError(f"{self.asked.flag}: {self.num_mistakes} mistakes in {self.asked.place}:{found}")

    def add_entries(self, rows: Iterable[tuple]) -> None:
        """Rows of `entries`; mistakes that were noted while they were made are refused."""
        self.facts.insert("INSERT INTO entries VALUES (?, ?, ?, ?, ?, ?, ?, ?)", rows)
        self.refuse_mistakes()

    def captions(
        self, cell: Any, default: str | None, place: str, what: str, unit: str, empty_allowed: bool = False
    ) -> str:
        """The captions in a cell, joined, or the default, which is counted; see `join_captions`."""
        captions = join_captions(cell, place, what, unit, default, empty_allowed)
        self.defaulted += captions is None
        return default if captions is None else captions

    def result(self, source: str, **found: Named) -> Scan:
        """The scan, when all entries have been added."""
        images = _check_images(self)
        if self.asked.root is not None:
            _forget_vanished(self.facts)
        return Scan(images, self.warnings, source, self.bad, self.missing, defaulted=self.defaulted, **found)


def _scan_folder(task: _Task) -> Scan:
    asked, found, sources = task.asked, {}, []
    walk, listings = _find_files(task)
    if listings:
        refuse_two_listings(listings, asked.root, asked.flag)
        for listing in listings:
            _add_listing(task, listing)
        _check_listed(task)
        found = _remark_on_listed(task)
        sources.append(", ".join(listings))
    elif task.has("pictures"):
        _read_sidecars(task)
        _add_pictures(task)
        lone, second = _remark_on_lone_captions(task, walk), _remark_on_second_captions(task)
        first = [*lone["first"], *second["first"]][:FIRST_NAMES]
        found = {"unused_captions": {"count": lone["count"] + second["count"], "first": first}}
        sources.append("caption files beside the images")
    if task.has("shards"):
        _list_shards(task)
        _add_members(task)
        (count,) = task.db.execute("SELECT count(*) FROM shards").fetchone()
        sources.append(counted(count, "WebDataset shard"))
    source = " and ".join(sources)
    if not task.has("entries"):
        _refuse_nothing(task, listings, source)
    task.warnings += _others(task)
    return task.result(source, **found)


def _refuse_nothing(task: _Task, listings: list[str], source: str) -> None:
    if task.bad or task.missing:
        _refuse_all_bad(task)
    flag, place = task.asked.flag, task.asked.place
    if source:
        what = "lists no images. Fill it, or remove it." if listings else "hold no images."
        raise DataError(f"{flag}: {shown(source)} in {place} {what}")
    others = "".join(f" {remark}" for remark in _others(task))
    raise DataError(
        f"{flag}: there are no images in {place} or below it. "
        f"Files ending in {', '.join(IMAGE_EXTENSIONS)} are read, and WebDataset shards (.tar).{others}"
    )


def _others(task: _Task) -> list[str]:
    """A remark on the files that are not read, by their endings, if there are any. A listing may name any file."""
    rows = task.db.execute(
        "SELECT ending, count(*), min(path) FROM others WHERE path NOT IN (SELECT path FROM entries) "
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
    return [
        f"{counted(count, 'file')} in {task.asked.place} {be(count)} of no kind that is read ({'; '.join(kinds)}). "
        "Convert or rename what is meant, a picture to .png, a caption to .txt, a listing to "
        f"{' or '.join(LISTING_NAMES)}, and move the rest elsewhere."
    ]


# ---------------------------------------------------------------------------------------------------------------------
# 2. Entries
# ---------------------------------------------------------------------------------------------------------------------


def _find_files(task: _Task) -> tuple[FolderWalk, list[str]]:
    """Fill `pictures`, `sidecars`, `shards` and `others`; returns the walk over the folder and the sorted listings."""
    walk, listings, pictures, sidecars, shards = FolderWalk(task.asked.root, task.asked.flag), [], [], [], []

    def store() -> None:
        task.facts.insert("INSERT INTO pictures VALUES (?, ?, ?, ?)", pictures)
        task.facts.insert("INSERT INTO sidecars VALUES (?, ?, ?, ?, ?, 0)", sidecars)
        task.facts.insert("INSERT INTO others VALUES (?, ?)", walk.others)
        for rows in (pictures, sidecars, walk.others):
            rows.clear()

    for file in walk.files():
        if os.path.basename(file.path) in LISTING_NAMES:
            listings.append(file.path)
        elif file.suffix == ".tar":
            shards.append((file.path, file.size, file.mtime_ns))
        elif file.suffix in CAPTION_EXTENSIONS:
            kind = CAPTION_EXTENSIONS.index(file.suffix)
            sidecars.append((file.stem, kind, file.path, file.size, file.mtime_ns))
        else:
            pictures.append((file.path, file.stem, file.size, file.mtime_ns))
        if len(pictures) + len(sidecars) + len(walk.others) >= ROWS_AT_ONCE:
            store()
    store()
    task.db.execute("CREATE INDEX pictures_stem ON pictures (stem)")
    task.db.execute(
        "UPDATE sidecars SET second = 1 WHERE EXISTS (SELECT 1 FROM sidecars o WHERE o.stem = sidecars.stem "
        "AND (o.kind, o.path) < (sidecars.kind, sidecars.path))"
    )
    task.facts.insert("INSERT INTO shards VALUES (?, ?, ?)", shards)
    task.bad += walk.bad
    task.warnings += walk.remarks()
    return walk, sorted(listings)


# Caption files ------------------------------------------------------------------------------------------------------


def _read_sidecars(task: _Task) -> None:
    """Bring `texts` up to date: the caption files beside images. `_add_pictures` refuses what is noted here."""
    query = (
        "SELECT s.path, s.size, s.mtime_ns FROM sidecars s LEFT JOIN texts t ON t.path = s.path "
        "WHERE (t.path IS NULL OR t.size != s.size OR t.mtime_ns != s.mtime_ns) "
        "AND NOT s.second AND EXISTS (SELECT 1 FROM pictures p WHERE p.stem = s.stem) ORDER BY s.path"
    )

    def read(item: tuple) -> str | DataError:  # in a thread
        try:
            return read_caption_file(task.asked.root / item[0], item[1])
        except DataError as error:
            return error

    def store(item: tuple, text: str | DataError) -> None:
        with task.noting():
            if isinstance(text, DataError):
                raise text
            task.db.execute("INSERT OR REPLACE INTO texts VALUES (?, ?, ?, ?)", (*item, text))

    task.facts.update(query, read, store)


def _add_pictures(task: _Task) -> None:
    """An entry for each image, with the captions of its caption file."""
    asked, bare, total = task.asked, [], 0
    rows = task.db.execute(
        "SELECT p.path, p.size, p.mtime_ns, t.path, t.text FROM pictures p LEFT JOIN sidecars s "
        "ON s.stem = p.stem AND NOT s.second LEFT JOIN texts t ON t.path = s.path ORDER BY p.path"
    )

    def entries() -> Iterator[tuple]:
        nonlocal total
        for path, size, mtime_ns, sidecar, text in rows:
            total += 1
            default = asked.default(path)
            if sidecar is None and default is None:
                bare.append(path if len(bare) <= FIRST_NAMES else "")
                continue
            place = str(asked.root / (sidecar or path))
            cell = caption_lines(text) if text is not None and asked.caption_per_line else text
            with task.noting():
                captions = task.captions(cell, default, place, "the caption", "image")
                yield path, captions, path, 0, None, size, mtime_ns, place

    task.add_entries(entries())
    if bare:
        others = "".join(f" {remark}" for remark in _others(task))
        raise DataError(
            f"{asked.flag}: {len(bare)} of {total} images in {asked.place} have no caption: "
            f"{first_names(bare)}. "
            f"Put a file ending in {' or '.join(CAPTION_EXTENSIONS)} beside each, or list the images in "
            'metadata.jsonl, one {"file_name": "…", "text": "…"} per line, or give all one with --instance_prompt, '
            f"or each the name of its folder with --caption_from_folder.{others}"
        )


def _remark_on_lone_captions(task: _Task, walk: FolderWalk) -> Named:
    """The caption files that stand beside nothing: no image, also none that can't be read, and no shard."""
    lone = "FROM sidecars s WHERE NOT EXISTS (SELECT 1 FROM pictures p WHERE p.stem = s.stem)"
    shards = {os.path.splitext(path)[0] for (path,) in task.db.execute("SELECT path FROM shards")}
    found = _nothing()
    for stem, path in task.db.execute(f"SELECT s.stem, s.path {lone} ORDER BY s.path"):
        if stem in walk.unread_stems or stem in shards or is_about(path):
            continue
        found["count"] += 1
        if len(found["first"]) < FIRST_NAMES:
            found["first"].append(shown(path))
    task.remark(found, "caption file", "has no image and is not used", "have no images and are not used")
    return found


def _remark_on_second_captions(task: _Task) -> Named:
    """The caption files that stand beside an image and another caption file, which comes first."""
    found = task.named(
        "SELECT path FROM sidecars s WHERE second AND EXISTS (SELECT 1 FROM pictures p WHERE p.stem = s.stem) "
        "ORDER BY path"
    )
    task.remark(found, "caption file", "is not used, since another one of the same image comes first",
                "are not used, since others of the same images come first")  # fmt: skip
    return found


# Listings -----------------------------------------------------------------------------------------------------------


def _add_listing(task: _Task, listing: str) -> None:
    """An entry for each row of a listing; whether the files are there is looked at later, for all at once."""
    asked, root = task.asked, os.path.realpath(task.asked.root)
    what = f"the caption {asked.caption_column!r}"
    needed = asked.default("x") is None

    def entries() -> Iterator[tuple]:
        for place, row in listing_rows(asked.root / listing, asked.image_column, asked.caption_column, needed):
            column = asked.image_column if asked.image_column in row else "file_name"
            require_column(column, row, place, "--image_column")
            if needed:
                require_column(asked.caption_column, row, place, "--caption_column")
            with task.noting():
                name = listed_name(row[column], column, os.path.dirname(listing), root, place)
                captions = task.captions(row.get(asked.caption_column), asked.default(name), place, what, "line")
                yield name, captions, name, 0, None, None, None, place

    task.add_entries(entries())


def _check_listed(task: _Task) -> None:
    """Give every listed entry its file's size and time; those without a file are an error, or noted and left out."""
    db, root = task.db, os.path.realpath(task.asked.root)
    db.execute(
        "UPDATE entries SET (size, mtime_ns) = (SELECT size, mtime_ns FROM pictures p WHERE p.path = entries.path)"
    )
    # The rest is missing, or hidden, or below a link, or does not end like an image.
    rest = db.execute("SELECT rowid, path, place FROM entries WHERE size IS NULL ORDER BY rowid").fetchall()
    for row, path, place in rest:
        with task.noting():
            status, reason = listed_status(path, root, place)
            if status is not None:
                db.execute("UPDATE entries SET size = ?, mtime_ns = ? WHERE rowid = ?", (*status, row))
            elif task.asked.skip_bad:
                db.execute("DELETE FROM entries WHERE rowid = ?", (row,))
                task.missing.append(f"{place}: {shown(path)}")
            else:
                raise DataError(
                    f"{place}: {brief(path)} is listed, but {reason} in {task.asked.place}. "
                    "Correct the line, or leave out all such lines with --on_bad_image skip."
                )
    task.refuse_mistakes()
    if task.missing:
        task.warnings.append(
            f"{counted(len(task.missing), 'listed file')} left out: not there: {first_names(task.missing)}."
        )


def _remark_on_listed(task: _Task) -> dict[str, Named]:
    """What is in no listing, what is listed more than once, and which caption files the listings take the place of."""
    unlisted = task.named(
        "SELECT p.path FROM pictures p LEFT JOIN (SELECT DISTINCT path FROM entries) e ON e.path = p.path "
        "WHERE e.path IS NULL ORDER BY p.path"
    )
    names = [name for name, _ in task.bad]  # files that can't be read, which no line that is left can name
    unlisted = {"count": unlisted["count"] + len(names), "first": (unlisted["first"] + names)[:FIRST_NAMES]}
    task.bad = []
    repeated = task.named("SELECT name FROM entries GROUP BY name HAVING count(*) > 1 ORDER BY name")
    beside = task.named(
        "SELECT path FROM sidecars WHERE stem IN (SELECT p.stem FROM pictures p JOIN entries e ON e.path = p.path) "
        "ORDER BY path"
    )
    task.remark(unlisted, "image", "is in no listing and not used", "are in no listing and not used")
    task.remark(repeated, "image", "is listed more than once", "are listed more than once")
    task.remark(beside, "caption file", "is not used, since its image is listed",
                "are not used, since their images are listed")  # fmt: skip
    return {"unlisted": unlisted, "repeated": repeated, "unused_captions": beside}


# Shards -------------------------------------------------------------------------------------------------------------


def _list_shards(task: _Task) -> None:
    """Bring `members` up to date: the images in the shards, with their captions."""
    query = (
        "SELECT s.* FROM shards s LEFT JOIN tars t USING (path, size, mtime_ns) WHERE t.path IS NULL ORDER BY s.path"
    )

    def store(item: tuple, _: None) -> None:
        path, size, mtime_ns = item
        remarks: list[str] = []
        for table in ("tars", "members", "facts"):
            task.db.execute(f"DELETE FROM {table} WHERE path = ?", (path,))
        rows = ((path, *image) for image in shard_images(task.asked.root / path, remarks))
        task.db.executemany("INSERT INTO members VALUES (?, ?, ?, ?, ?, ?, ?)", rows)
        task.db.execute("INSERT INTO tars VALUES (?, ?, ?, ?)", (path, size, mtime_ns, json.dumps(remarks)))

    task.facts.update(query, lambda item: None, store)  # one after the other: a shard's rows are stored as it is read
    for (remarks,) in task.db.execute("SELECT t.remarks FROM tars t JOIN shards USING (path) ORDER BY path"):
        task.warnings += json.loads(remarks)


def _add_members(task: _Task) -> None:
    """An entry for each image in the shards."""
    asked, bare, total = task.asked, [], 0
    rows = task.db.execute(
        "SELECT m.path, offset, length, name, caption_name, text, is_json, s.size, s.mtime_ns FROM members m "
        "JOIN shards s ON s.path = m.path ORDER BY m.path, offset"
    )

    def entries() -> Iterator[tuple]:
        nonlocal total
        for path, offset, length, member, caption_name, text, is_json, size, mtime_ns in rows:
            total += 1
            default, name = asked.default(path), f"{path}/{member}"
            place, what = f"{asked.root / path}: {shown(caption_name or member)}", "the caption"
            cell = text
            if is_json:
                row, what = json_object(text, place), f"the caption {asked.caption_column!r}"
                if default is None:
                    require_column(asked.caption_column, row, place, "--caption_column")
                cell = row.get(asked.caption_column)
            elif text is not None and asked.caption_per_line:
                cell = caption_lines(text)
            elif text is None and default is None:
                bare.append(name if len(bare) <= FIRST_NAMES else "")
                continue
            with task.noting():
                captions = task.captions(cell, default, place, what, "sample")
                yield name, captions, path, offset, length, size, mtime_ns, place

    task.add_entries(entries())
    if bare:
        raise DataError(
            f"{asked.flag}: {len(bare)} of {total} images in the shards of {asked.place} have no caption: "
            f"{first_names(bare)}. Each needs a .txt or .json member of the same name right beside it in the tar; "
            "or give all one with --instance_prompt."
        )


# Data sets ----------------------------------------------------------------------------------------------------------


def _scan_dataset(task: _Task, dataset: Any) -> Scan:
    asked, num_empty = task.asked, 0
    default, files = asked.default_caption, files_of_rows(asked.images, asked.image_column)

    def entries() -> Iterator[tuple]:
        nonlocal num_empty
        for index, cell in enumerate(cells_of(dataset, asked.caption_column)):
            place = f"--caption_column {asked.caption_column!r} of {asked.place}: row {index}"
            texts = cell if isinstance(cell, (list, tuple)) else [cell]
            if default is None:
                num_empty += any(isinstance(text, str) and not text.strip() for text in texts) or not texts
            with task.noting():
                captions = task.captions(cell, default, place, "the caption", "row", empty_allowed=default is None)
                yield f"{index:09d}", captions, "", index, None, *files.get(index, (0, 0)), place

    task.add_entries(entries())
    if num_empty:
        task.warnings.append(f"{num_empty} of {len(dataset)} captions of {asked.place} {be(num_empty)} empty.")
    return task.result(asked.place)


# ---------------------------------------------------------------------------------------------------------------------
# 3. The check
# ---------------------------------------------------------------------------------------------------------------------


def _check_images(task: _Task) -> ImageTable:
    """Look into the images that are unknown or have changed, refuse or leave out the bad ones; returns the table."""
    query = (
        "SELECT DISTINCT e.path, e.offset, e.length, e.size, e.mtime_ns FROM entries e LEFT JOIN facts f "
        "ON f.path = e.path AND f.offset = e.offset "
        "WHERE f.path IS NULL OR f.size != e.size OR f.mtime_ns IS NOT e.mtime_ns ORDER BY e.path, e.offset"
    )
    asked = task.asked

    def store(item: tuple, found: tuple[ImageFacts, bool]) -> None:
        (path, offset, _, size, mtime_ns), (facts, lasting) = item, found
        # What may be gone by the next scan, such as an unreadable file, is not kept: no file is of that time.
        task.db.execute(
            "INSERT OR REPLACE INTO facts VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (path, offset, size, mtime_ns if lasting else None, facts.content, facts.format, *facts.size,
             ",".join(facts.notes), facts.error),
        )  # fmt: skip

    task.facts.update(query, partial(look, asked), store, "checking images" if asked.show else "")
    _judge_bad(task)
    return store_table(
        task.facts,
        "SELECT e.name, e.captions, f.content, f.height, f.width, e.path, e.offset, e.length, f.format, f.notes "
        "FROM entries e JOIN facts f ON f.path = e.path AND f.offset = e.offset WHERE f.error = ''",
        asked.root,
        asked.images,
        asked.image_column if asked.images is not None else "",
    )


def look(asked: _Asked, item: tuple) -> tuple[ImageFacts, bool]:
    """(facts, whether they last) of one image, (path, offset, length, size, mtime_ns), in a thread."""
    path, offset, length, size, mtime_ns = item
    try:
        if asked.images is not None:
            return inspect(DatasetImage(asked.images, offset, asked.image_column).read_bytes()), True
        with open(asked.root / path, "rb") as file:
            file.seek(offset)
            data = file.read() if length is None else file.read(length)
            status = os.fstat(file.fileno())
    except (OSError, DataError) as error:
        return ImageFacts("", "", (0, 0), (), f"can't be read: {because(error)}"), False
    if (status.st_size, status.st_mtime_ns) != (size, mtime_ns):
        return ImageFacts("", "", (0, 0), (), "the file changed while it was read"), False
    return inspect(data), True


def _judge_bad(task: _Task) -> None:
    """Add the images that can't be used to `bad`, and refuse them or remark upon them."""
    asked, refused = task.asked, 0
    for name, error in task.db.execute(
        "SELECT DISTINCT e.name, f.error FROM entries e JOIN facts f ON f.path = e.path AND f.offset = e.offset "
        "WHERE f.error != ''"
    ):
        refused += 1
        task.bad.append((shown(name) if asked.images is None else f"row {int(name)}", _reason(error)))
    if not task.bad:
        return
    task.bad.sort()
    (total,) = task.db.execute("SELECT count(DISTINCT name) FROM entries").fetchone()
    if not asked.skip_bad:
        count = counted(len(task.bad), "image")
        raise DataError(
            f"{asked.flag}: {count} of {total - refused + len(task.bad)} in {asked.place} can't be used:"
            f"{_listed(task.bad)}\nReplace or remove them, or leave them out with --on_bad_image skip."
        )
    if refused == total:
        _refuse_all_bad(task)
    found = {"count": len(task.bad), "first": [f"{name} ({reason})" for name, reason in task.bad[:FIRST_NAMES]]}
    task.remark(found, "image", "can't be used and is left out", "can't be used and are left out")


def _reason(error: str) -> str:
    """An error of `data.images` without its advice, which is given once for all."""
    reason = error.removeprefix("can't be used as an image: ")
    return re.sub(r" (Replace or remove|Make it smaller|Remove the row)[^.]*\.?$", "", reason).rstrip(".")


def _refuse_all_bad(task: _Task) -> None:
    bad = task.bad + [(name, "listed, but not there") for name in task.missing]
    none = "the only image" if len(bad) == 1 else f"none of the {len(bad)} images"
    can = "can't" if len(bad) == 1 else "can"
    raise DataError(f"{task.asked.flag}: {none} in {task.asked.place} {can} be used:{_listed(bad)}")


def _listed(bad: list[tuple[str, str]]) -> str:
    return "".join(f"\n  {name}: {reason}" for name, reason in bad[:MOST_LISTED]) + _more(len(bad))


def _more(count: int) -> str:
    """The last line of a list of the first few of so many."""
    return f"\n  and {count - MOST_LISTED} more" if count > MOST_LISTED else ""


def _forget_vanished(facts: Facts) -> None:
    """Remove what is known about files that are gone. Only that: an unlisted file may be listed again."""
    facts.forget("facts", "SELECT path FROM pictures UNION SELECT path FROM entries")
    facts.forget("texts", "SELECT path FROM sidecars")
    facts.forget("tars", "SELECT path FROM shards")
    facts.forget("members", "SELECT path FROM shards")
