"""The files below a folder: which are images, caption files, listings and shards, and what can't be used there.

Sections:

1. walking, with or without the links that lead out of the folder;
2. remarks on the files that are not used.

Nothing is opened here, but for the first lines of tables that may be meant as listings. Importing this file imports
neither torch nor datasets. Names are paths relative to the folder, with `/`.
"""

import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from lpl_finetuning.data.conventions import is_of_the_system
from lpl_finetuning.data.findings import USUAL_NAMES, Findings, is_utf8
from lpl_finetuning.data.formats import PLUGIN_EXTENSIONS, install_advice, taken_extensions
from lpl_finetuning.data.near_names import CAPTION_EXTENSIONS
from lpl_finetuning.data.rows import DATASET_EXTENSIONS, LISTING_NAMES, column_names
from lpl_finetuning.data.tables import ROWS_AT_ONCE, stamp_of
from lpl_finetuning.errors import FIRST_NAMES, DataError, because, counted, first_names, is_or_are, shown

_LISTED_ONLY = (".psd", ".tga")  # pictures that are read where a listing names them
_RAW = (".arw", ".cr2", ".cr3", ".dng", ".nef", ".orf", ".raf", ".rw2")  # photographs as the sensor saw them
_NEVER_READ = (".svg", *_RAW)
_PICTURES = {*_LISTED_ONLY, *_NEVER_READ, *PLUGIN_EXTENSIONS}  # that may not be read
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
    """A file below the folder. `suffix` is in lower case, without blanks at its end; `size` is in bytes."""

    path: str
    suffix: str
    size: int
    stamp: str

    @property
    def stem(self) -> str:
        """The path without the suffix: the same for an image and its caption file."""
        return self.path.rstrip()[: -len(self.suffix)]


class FolderWalk:
    """One walk over the visible files below a folder: images, caption files, listings and tars.

    The lists are complete when `files` has ended. No folder is entered twice, so links in a circle end.

    Attributes:
        bad: (name, reason) of each image that can't be read.
        unread_stems: stems and paths of the bad images and of pictures of kinds that are not read.
        others: printable (ending, path) of each file of an unknown kind; the caller may empty the list on the way.
        outside: links to files outside the folder that were not followed.
        packed: compressed tars.
    """

    def __init__(self, root: Path, flag: str, follow_links: bool = False):
        """
        Args:
            root: the folder.
            flag: the flag that named the folder, for messages.
            follow_links: enter linked folders, and use linked files that lie elsewhere.
        """
        self.root, self.flag, self.follow_links = root, flag, follow_links
        self.bad: list[tuple[str, str]] = []
        self.unread_stems: set[str] = set()
        self.others: list[tuple[str, str]] = []
        self.outside: list[str] = []
        self.packed: list[str] = []
        self._images = taken_extensions()
        self._known = {*self._images, *CAPTION_EXTENSIONS, ".tar"}
        self._real_root = os.path.realpath(root)
        self._links: list[str] = []  # to folders
        self._twice: list[str] = []  # links to folders that were entered under another name
        self._closed: list[str] = []  # folders of the system that can't be read
        self._entered: set[tuple[int, int]] = set()  # only where links are followed

    def files(self) -> Iterator[FoundFile]:
        """The usable files, in no particular order.

        Raises:
            DataError: a folder can't be read, or a file that is not an image.
        """
        yield from self._below("")
        while self.follow_links and self._links:
            links, self._links = sorted(self._links), []
            for link in links:
                if self._is_new(link):
                    yield from self._below(f"{link}/")
                else:
                    self._twice.append(link)

    def _below(self, top: str) -> Iterator[FoundFile]:
        """The files below a folder; links to folders are noted for later."""
        if self.follow_links and not top:
            self._is_new(top)
        folders = [top]
        while folders:
            folder = folders.pop()
            for entry in self._entries(folder):
                path = f"{folder}{entry.name}"
                if not _is_folder(entry):
                    if (found := self._file(path, entry)) is not None:
                        yield found
                elif entry.is_symlink():
                    self._links.append(path)
                elif not self.follow_links or self._is_new(path):
                    folders.append(f"{path}/")

    def _is_new(self, folder: str) -> bool:
        """Whether a folder has not been entered yet; from now on it has."""
        try:
            status = os.stat(os.path.join(self.root, folder))
        except OSError:  # reading the folder tells the reason
            return True
        key = (status.st_dev, status.st_ino)
        is_new = key not in self._entered
        self._entered.add(key)
        return is_new

    def _entries(self, folder: str) -> Iterator[os.DirEntry]:
        # Skipping a folder that can't be read would leave out its images without a word.
        try:
            with os.scandir(os.path.join(self.root, folder)) as entries:
                yield from (entry for entry in entries if not entry.name.startswith("."))
        except OSError as error:
            if folder and isinstance(error, PermissionError) and is_of_the_system(os.path.basename(folder[:-1])):
                self._closed.append(folder[:-1])
                return
            place = shown(os.path.join(self.root, folder))
            raise DataError(f"{self.flag}: {place} can't be read: {because(error)}.") from error

    def _file(self, path: str, entry: os.DirEntry) -> FoundFile | None:
        suffix = os.path.splitext(entry.name)[1].rstrip().lower()
        if suffix not in self._known and entry.name not in LISTING_NAMES:
            if _PACKED_TAR.search(entry.name):
                self.packed.append(path)
            elif not _is_expected(entry.name):
                if suffix in _PICTURES:
                    self._add_unread(path, suffix)
                self.others.append((shown(suffix), path if is_utf8(path) else shown(path)))
        elif self._leads_out(entry):
            self.outside.append(path)
            self._add_unread(path, suffix)
        elif is_utf8(path):
            return self._with_status(path, suffix, entry)
        elif suffix in self._images:
            self._add_bad(path, suffix, "the name is not UTF-8; rename the file or its folder")
        elif suffix not in CAPTION_EXTENSIONS:
            raise DataError(f"{self.root}: the name {shown(path)} is not UTF-8.", "Rename the file or its folder.")
        return None

    def _leads_out(self, entry: os.DirEntry) -> bool:
        if self.follow_links or not entry.is_symlink():
            return False
        return not is_inside(os.path.realpath(entry.path), self._real_root)

    def _with_status(self, path: str, suffix: str, entry: os.DirEntry) -> FoundFile | None:
        try:
            status = entry.stat()
            if stat.S_ISREG(status.st_mode):
                return FoundFile(path, suffix, status.st_size, stamp_of(status))
            reason = "not a file that could be read (a pipe, socket or device)"
        except OSError as error:
            reason = f"{_broken_link(entry) if entry.is_symlink() else 'can not be read'} ({because(error)})"
        if suffix not in self._images:
            raise DataError(f"{shown(os.path.join(self.root, path))}: {reason}.", "Replace or remove it.")
        self._add_bad(path, suffix, reason)
        return None

    def _add_bad(self, path: str, suffix: str, reason: str) -> None:
        self.bad.append((shown(path), reason))
        self._add_unread(path, suffix)

    def _add_unread(self, path: str, suffix: str) -> None:
        self.unread_stems |= {path, path.rstrip()[: -len(suffix)]}

    def remarks(self) -> list[str]:
        """Sentences about folders that were not entered."""
        remarks = []
        for names, one, many in (
            (self._links, "is a link to a folder and was not entered; --follow_links enters it",
             "are links to folders and were not entered; --follow_links enters them"),
            (self._twice, "is a link to a folder that is read under another name, and was not entered again",
             "are links to folders that are read under other names, and were not entered again"),
            (self._closed, "is a folder of the system that can't be read, and was left out",
             "are folders of the system that can't be read, and were left out"),
        ):  # fmt: skip
            if names:
                listed = first_names([os.path.join(self.root, name) for name in sorted(names)])
                remarks.append(f"{listed} {one if len(names) == 1 else many}.")
        return remarks

    def refuse_links(self, others: list[str]) -> None:
        """Raise a DataError where links lead out of the folder, or shards are compressed.

        Args:
            others: further remarks, which would be lost with the error.
        """
        problems = []
        if self.outside:
            lead = "is a link that leads" if len(self.outside) == 1 else "are links that lead"
            problems.append(DataError(
                f"{self.flag}: {counted(len(self.outside), 'file')} in {self.root} {lead} out of the folder: "
                f"{first_names(sorted(self.outside))}.",
                "Copy what is meant into the folder, or use it where it is with --follow_links.",
            ))  # fmt: skip
        if self.packed:
            problems.append(DataError(
                f"{self.flag}: compressed tars can't be read at random: {first_names(sorted(self.packed))} in "
                f"{self.root}.",
                "Unpack those that are shards (gunzip a.tar.gz gives a.tar), and move the others elsewhere.",
            ))  # fmt: skip
        if problems:
            first, *more = problems
            raise DataError(first.problem, " ".join([first.advice, *map(str, more), *others]))


def _broken_link(entry: os.DirEntry) -> str:
    try:
        target = os.readlink(entry.path)
    except OSError:
        target = ""
    if "annex/objects/" in target:
        return "a link of git-annex whose file is not here; git annex get fetches it"
    return "a broken link"


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
        or (suffix.lower() in ("", ".md", ".rst") and is_about(f"{stem}.txt"))
    )


def is_inside(path: str, root: str) -> bool:
    """Whether a path is the root or below the root. Both paths are absolute and normalised."""
    return path == root or path.startswith(root.rstrip("/") + "/")


# ---------------------------------------------------------------------------------------------------------------------
# 2. Remarks
# ---------------------------------------------------------------------------------------------------------------------


def is_about(path: str) -> bool:
    """Whether a file describes the folder (README.txt and the like) and is no caption."""
    return _ABOUT.fullmatch(os.path.basename(path)) is not None


def find_files(findings: Findings) -> tuple[list[str], set[str]]:
    """Fill the tables of files (`pictures`, `sidecars`, `shards`, `others`) and the findings' bad images and warnings.

    Returns:
        The sorted listings, and the stems of pictures that are not read.
    """
    walk = FolderWalk(findings.request.root, findings.request.flag, findings.request.follow_links)
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
    findings.listings = sorted(listings)
    findings.bad += walk.bad
    remarks = walk.remarks()
    bad = [f"{name} can't be read: {reason}." for name, reason in sorted(walk.bad)[:FIRST_NAMES]]
    walk.refuse_links([*remarks, *bad, *remarks_on_others(findings)])
    findings.warnings += remarks
    return findings.listings, walk.unread_stems


def remarks_on_others(findings: Findings) -> list[str]:
    """Remarks on pictures of other kinds and on files of unknown kinds, unless there are none.

    Listed files don't count. Files of unknown kinds are counted by ending.
    """
    return [*_remarks_on_pictures(findings), *_remark_on_unknown(findings)]


_UNLISTED = "FROM others WHERE path NOT IN (SELECT path FROM entries)"


def _remarks_on_pictures(findings: Findings) -> list[str]:
    """A remark on pictures that only a listing makes usable, and others on those that can't be read."""
    plugins = sorted(PLUGIN_EXTENSIONS)
    rows = findings.db.execute(f"SELECT DISTINCT ending {_UNLISTED} AND ending IN {(*plugins,)}").fetchall()
    needed = f"not read without a plugin of Pillow ({install_advice([ending for (ending,) in rows])})" if rows else ""
    remarks = []
    for endings, told in (
        (plugins, needed),
        (_LISTED_ONLY, "not used: files with such an ending are read only if a listing names them"),
        (_RAW, "not used: photographs as the sensor saw them; save them as .jpg or .png"),
        (_NEVER_READ, "of a kind that is not read"),
    ):
        condition = f"AND ending IN {(*endings,)}" + f" AND ending NOT IN {_RAW}" * (endings is _NEVER_READ)
        found = findings.named(f"SELECT path {_UNLISTED} {condition} ORDER BY path")
        if count := found["count"]:
            names = first_names(found["first"], total=count)
            remarks.append(
                f"{counted(count, 'picture')} in {findings.request.place} {is_or_are(count)} {told}: {names}."
            )
    return remarks


def _remark_on_unknown(findings: Findings) -> list[str]:
    """A remark on the files of unknown kinds, counted by ending, unless there are none."""
    rows = findings.db.execute(
        f"SELECT ending, count(*), min(path) {_UNLISTED} AND ending NOT IN {(*_PICTURES,)} "
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
    if any(ending in DATASET_EXTENSIONS for ending, *_ in rows):
        advice = (
            f"A listing must be called {_LISTINGS}. Parquet and Arrow files that hold the pictures themselves are "
        )
        advice += f"a data set, {_where_data_sets_go(findings.request.flag)}"
    are = is_or_are(count)
    return [f"{counted(count, 'file')} in {findings.request.place} {are} of no kind that is read "
            f"({'; '.join(kinds)}). {_tables_that_may_be_listings(findings)}{advice}"]  # fmt: skip


def _tables_that_may_be_listings(findings: Findings) -> str:
    """What to do with a table that looks like a listing of another name: how to name it, and the flags it needs."""
    request = findings.request
    if findings.listings or request.root is None:
        return ""
    for (path,) in findings.db.execute(
        f"SELECT path {_UNLISTED} AND ending IN ('.csv', '.jsonl') ORDER BY path LIMIT {FIRST_NAMES}"
    ):
        names = column_names(Path(request.root, path))
        image, caption = _usual("--image_column", names), _usual("--caption_column", names)
        if image:
            flags = f" and give --image_column {image}" * (image not in ("file_name", request.image_column))
            if caption and caption != request.caption_column:
                flags += f" and give --caption_column {caption}"
            return (f"{shown(path)} has the columns {', '.join(map(shown, names[:FIRST_NAMES]))}: if it lists the "
                    f"pictures, rename it to metadata{os.path.splitext(path)[1].lower()}{flags}. ")  # fmt: skip
    return ""


def _usual(flag: str, names: list[str]) -> str | None:
    usual = (*USUAL_NAMES[flag], *(("file_name",) if flag == "--image_column" else ()))
    return next((name for name in names if name.lower() in usual), None)


def dataset_files(findings: Findings) -> list[str]:
    """The first Parquet and Arrow files that no listing names: parts of a data set."""
    return findings.named(f"SELECT path {_UNLISTED} AND ending IN {DATASET_EXTENSIONS} ORDER BY path")["first"]


_LISTINGS = " or ".join(LISTING_NAMES)


def _where_data_sets_go(flag: str) -> str:
    """What to do with a data set, depending on the flag that names the folder."""
    if flag == "--train_data_dir":
        return "whose folder is given as --dataset_name."
    return f"which {flag.split()[0]} does not take."
