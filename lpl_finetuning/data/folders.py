"""Captioned images in a folder: pictures with caption files, and listings.

Sections:

1. caption files: a `.txt` or `.caption` file beside each picture;
2. listings: `metadata.jsonl`, `.csv` and `.parquet`.

This file alone decides which caption belongs to which file. It adds an entry for each image to the findings of a scan
(`data.findings`), without opening the image. `data.walk` finds the files, `data.rows` reads the lines of listings, and
`data.near_names` knows which names nearly match. Shards are read by `data.packed`.

Importing this file imports neither torch nor datasets. Names are paths relative to the folder, with `/`.
"""

import contextlib
import functools
import os
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path, PureWindowsPath
from typing import Any

from lpl_finetuning.data.findings import (
    Findings,
    Named,
    decode_text,
    is_utf8,
    refuse_long,
    require_column,
)
from lpl_finetuning.data.near_names import CAPTION_EXTENSIONS, NearFiles, matches
from lpl_finetuning.data.rows import listing_rows
from lpl_finetuning.data.tables import ROWS_AT_ONCE, in_threads, read_bytes, stamp_of
from lpl_finetuning.data.walk import is_about, is_inside, remarks_on_others
from lpl_finetuning.errors import FIRST_NAMES, DataError, because, brief, counted, first_names, shown

# ---------------------------------------------------------------------------------------------------------------------
# 1. Caption files
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
    _match_caption_files(findings)
    _add_pictures(findings)
    lone, second = _remark_on_lone_captions(findings, unread_stems), _remark_on_second_captions(findings)
    return {"count": lone["count"] + second["count"], "first": [*lone["first"], *second["first"]][:FIRST_NAMES]}


def _match_caption_files(findings: Findings) -> None:
    """Fill `lone`, then take the caption files out of it that are named like a picture with another name: `nearly`.

    A caption file of exactly the picture's name comes first, then the whole name (`a.png.txt`), then names that nearly
    match, where only one file can be meant.

    Raises:
        DataError: of several caption files or pictures that nearly match, each could be meant.
    """
    db = findings.db
    bare = "FROM pictures p WHERE NOT EXISTS (SELECT 1 FROM sidecars s WHERE s.stem = p.stem)"
    db.execute(
        "INSERT INTO lone SELECT stem, kind, path FROM sidecars s "
        "WHERE NOT EXISTS (SELECT 1 FROM pictures p WHERE p.stem = s.stem)"
    )
    if not findings.has("lone"):
        return
    db.execute(
        "INSERT INTO nearly SELECT DISTINCT stem, stem FROM lone WHERE stem IN (SELECT path FROM pictures) AND NOT "
        "EXISTS (SELECT 1 FROM pictures p JOIN sidecars s ON s.stem = p.stem WHERE p.path = lone.stem)"
    )
    taken_out = "DELETE FROM lone WHERE stem IN (SELECT stem FROM nearly)"
    db.execute(taken_out)
    found = matches(
        db.execute(f"SELECT p.path, p.stem {bare} AND p.path NOT IN (SELECT path FROM nearly)"),
        db.execute("SELECT path, stem FROM lone WHERE stem NOT IN (SELECT path FROM pictures)").fetchall(),
    )
    for pictures, files in sorted(found.unclear):
        with findings.noting():
            raise DataError(
                f"{findings.request.place}: {_several(files)} nearly {'match' if len(files) > 1 else 'matches'} "
                f"{_several(pictures)}; which belong together is not clear.",
                "Rename the caption file that counts to the name of its picture, and move the others elsewhere.",
            )
    findings.refuse_mistakes()
    db.executemany("INSERT INTO nearly VALUES (?, ?)", found.taken.items())
    db.execute(taken_out)
    query = "SELECT s.path FROM nearly n JOIN sidecars s ON s.stem = n.stem AND NOT s.second WHERE n.path = ?"
    pairs = [(name, *db.execute(query, (name,)).fetchone()) for name in sorted(found.taken)[:FIRST_NAMES]]
    findings.remark(
        {"count": len(found.taken), "first": [f"{name} ({file})" for name, file in pairs]},
        "image",
        "has the caption of a file whose name matches only nearly",
        "have the captions of files whose names match only nearly",
    )


def _several(names: list[str]) -> str:
    """The first names of a list, with "and" before the last."""
    shorter = [shown(name) for name in names[:FIRST_NAMES]] + ["…"] * (len(names) > FIRST_NAMES)
    return " and ".join([", ".join(shorter[:-1]), shorter[-1]] if len(shorter) > 1 else shorter)


def _with_captions(findings: Findings) -> Iterator[tuple[str, str, str | None, str | DataError | None]]:
    """(path, stamp, path of the caption file, text or error) of each picture; None for no caption file.

    Caption files are small, and are read anew by every scan: nothing about an old text can be out of date.
    """
    cursor = findings.db.execute(
        "SELECT p.path, p.stamp, s.path, s.size FROM pictures p LEFT JOIN nearly n ON n.path = p.path "
        "LEFT JOIN sidecars s ON s.stem = coalesce(n.stem, p.stem) AND NOT s.second ORDER BY p.path"
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
                cell = findings.cell_of(text, path)
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
    shards = {os.path.splitext(path)[0] for (path,) in findings.db.execute("SELECT path FROM shards")}
    found: Named = {"count": 0, "first": []}
    alone = "SELECT stem, path FROM lone WHERE stem NOT IN (SELECT path FROM pictures) ORDER BY path"
    for stem, path in findings.db.execute(alone):
        if stem in unread_stems or stem in shards or is_about(path):
            continue
        found["count"] += 1
        if len(found["first"]) < FIRST_NAMES:
            found["first"].append(shown(path))
    findings.remark(found, "caption file", "has no image and is not used", "have no images and are not used")
    return found


def _remark_on_second_captions(findings: Findings) -> Named:
    """The caption files beside an image whose captions come from another caption file."""
    found = findings.named(
        "SELECT path FROM sidecars s WHERE (second AND (EXISTS (SELECT 1 FROM pictures p WHERE p.stem = s.stem) "
        "OR stem IN (SELECT stem FROM nearly))) "
        "OR path IN (SELECT path FROM lone WHERE stem IN (SELECT path FROM pictures)) ORDER BY path"
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


# ---------------------------------------------------------------------------------------------------------------------
# 2. Listings
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
    what, parent = f"the caption {request.caption_column!r}", os.path.dirname(listing)
    needed = request.default("x") is None

    def entries() -> Iterator[tuple]:
        for place, row in listing_rows(request.root / listing, request.image_column, request.caption_column, needed):
            column = _image_column(findings, row, parent, root, place)
            if needed:
                require_column(request.caption_column, row, place, "--caption_column")
            with findings.noting():
                name = _listed_name(row[column], column, parent, root, place)
                captions = findings.captions(
                    row.get(request.caption_column), request.default(name), place, what, "line", path=name
                )
                yield name, captions, name, 0, None, None, place

    findings.add_entries(entries())


def _image_column(findings: Findings, row: dict, parent: str, root: str, place: str) -> str:
    """The column of a row that names the file: `--image_column`, else `file_name`.

    Many tables have a column `image` beside `file_name`, with an address or a number. Where `--image_column` is not
    given, the column counts that names a file.

    Raises:
        DataError: there is no such column, or the two columns name two files.
    """
    column = findings.request.image_column
    if column not in row:
        require_column("file_name", row, place, "--image_column")
        return "file_name"
    if column != _USUAL_COLUMN or "file_name" not in row or row[column] == row["file_name"]:
        return column
    names = {}
    for each in ("file_name", column):
        with contextlib.suppress(DataError):
            name = _listed_name(row[each], each, parent, root, place)
            if _is_picture(findings, name):
                names[each] = name
    if len(set(names.values())) == 2:
        raise DataError(
            f"{place}: 'file_name' names {brief(row['file_name'])} and {column!r} names {brief(row[column])}; both "
            "are there.",
            "Give --image_column file_name, or remove the column that does not count.",
        )
    return next(iter(names), "file_name")


_USUAL_COLUMN = "image"  # of --image_column, if the flag is not given


def _is_picture(findings: Findings, path: str) -> bool:
    return findings.db.execute("SELECT 1 FROM pictures WHERE path = ?", (path,)).fetchone() is not None


def _check_listed(findings: Findings) -> None:
    """Set the stamp of each listed entry. An entry without a file is an error, or noted and left out.

    Where a listed file is not there, the one file whose name nearly matches takes its place.
    """
    db, root = findings.db, os.path.realpath(findings.request.root)
    db.execute("UPDATE entries SET stamp = (SELECT stamp FROM pictures p WHERE p.path = entries.path)")
    # The other files are missing, hidden, below a link, or have another ending than images.
    rest = db.execute("SELECT rowid, path, place FROM entries WHERE stamp IS NULL ORDER BY rowid").fetchall()
    near = functools.cache(lambda: NearFiles(
        path for (path,) in db.execute("SELECT path FROM pictures UNION ALL SELECT path FROM others")))  # fmt: skip
    taken: list[str] = []
    for row, path, place in rest:
        with findings.noting():
            stamp, reason = _listed_stamp(path, root, place, findings.request.follow_links)
            if stamp is None:
                path, stamp, reason = _near_file(findings, near(), path, root, place, reason, taken)
            if stamp is not None:
                db.execute("UPDATE entries SET name = ?1, path = ?1, stamp = ?2 WHERE rowid = ?3", (path, stamp, row))
            elif findings.request.skip_bad:
                db.execute("DELETE FROM entries WHERE rowid = ?", (row,))
                findings.missing.append(f"{place}: {shown(path)}")
            else:
                raise DataError(
                    f"{place}: {brief(path)} is listed, but {reason}.",
                    "Correct the line, or leave out all such lines with --on_bad_image skip.",
                )
    findings.refuse_mistakes()
    findings.remark(
        {"count": len(taken), "first": taken[:FIRST_NAMES]},
        "listed name",
        "matches a file only nearly, which is used",
        "match files only nearly, which are used",
    )
    if findings.missing:
        findings.warnings.append(
            f"{counted(len(findings.missing), 'listed file')} left out: not there: {first_names(findings.missing)}."
        )


def _near_file(
    findings: Findings, near: NearFiles, path: str, root: str, place: str, reason: str, taken: list[str]
) -> tuple[str, str | None, str]:
    """(path, stamp, "") of the one file that a listed name nearly matches, or (name, None, reason).

    Args:
        findings: of the scan.
        near: the files below the folder.
        path: the listed name, relative to the root.
        root: the folder, absolute and without links.
        place: the listing and the line.
        reason: why the file of exactly that name can't be used.
        taken: gets the name and the file.
    """
    found, links = near.find(path), findings.request.follow_links
    if len(found) == 1:
        stamp, reason = _listed_stamp(found[0], root, place, links)
        if stamp is not None:
            taken.append(f"{brief(path)} ({found[0]})")
            return found[0], stamp, ""
    reason = f"{reason} in {findings.request.place}"
    if len(found) > 1:
        return path, None, f"{reason}; {_several(sorted(found))} nearly match: which is meant is not clear"
    hints = near.hints(path)
    return path, None, f"{reason}; there is {_several(sorted(hints))}" if 0 < len(hints) <= 3 else reason


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
        "OR stem IN (SELECT path FROM entries) ORDER BY path"
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
    if isinstance(cell, dict) and cell.keys() & {"bytes", "path"}:
        raise DataError(
            f"{place}: {column!r} holds an image and not the name of a file: this is no listing but a data set.",
            "Move it into a folder of its own, under another name, and give that folder as --dataset_name.",
        )
    if not isinstance(cell, str) or not cell.strip():
        raise DataError(f"{place}: {column!r} must be the name of a file, not {brief(cell)}.")
    if "\0" in cell or not is_utf8(cell):
        raise DataError(f"{place}: {brief(cell)} is no usable file name.", "Correct the name.")
    # A name that Windows wrote must not leave the root either, though \\ is an ordinary letter of names here.
    name = os.path.join(os.path.realpath(os.path.dirname(cell)), os.path.basename(cell)) if cell[0] == "/" else cell
    paths = [os.path.normpath(os.path.join(root, parent, each)) for each in (name, name.replace("\\", "/"))]
    if PureWindowsPath(cell).is_absolute() or not all(is_inside(path, root) for path in paths):
        raise DataError(f"{place}: {brief(cell)} leads out of the folder {root}.", "Copy the file into the folder.")
    return os.path.relpath(paths[0], root)


def _listed_stamp(path: str, root: str, place: str, follow_links: bool) -> tuple[str | None, str]:
    """(stamp, "") of a listed file, or (None, reason) for a file that can't be read.

    Raises:
        DataError: a link in the path leads out of the folder.
    """
    try:
        real = os.path.realpath(os.path.join(root, path))
        if not follow_links and not is_inside(real, root):
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
