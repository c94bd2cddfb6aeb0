"""The scan: which images a run trains on and which are held out, checked before training starts.

Sections:

1. the images of a run, from its settings;
2. scans of a folder or a data set;
3. checking the images that were found.

`data.folders` and `data.packed` find images and captions; this file puts their findings together. Importing this file
imports neither torch nor datasets.
"""

import contextlib
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from lpl_finetuning.base_model import offline_without_hub
from lpl_finetuning.data.findings import Findings, Named, ScanRequest, listed, require_column
from lpl_finetuning.data.folders import add_captioned_pictures, add_listings
from lpl_finetuning.data.formats import IMAGE_EXTENSIONS, missing_reader
from lpl_finetuning.data.images import ImageFacts, inspect
from lpl_finetuning.data.packed import add_rows, add_shards, load_dataset, undecoded_images
from lpl_finetuning.data.tables import (
    CaptionedImage,
    DatasetImage,
    Facts,
    ImageTable,
    first_of,
    hold_out,
    is_same_content,
    store_table,
    with_facts,
)
from lpl_finetuning.data.walk import dataset_files, find_files, remarks_on_others
from lpl_finetuning.data.wrong_source import advise_on_columns, refuse_no_data_set, refuse_no_folder
from lpl_finetuning.errors import FIRST_NAMES, DataError, because, counted, first_names, shown

# ---------------------------------------------------------------------------------------------------------------------
# 1. The images of a run
# ---------------------------------------------------------------------------------------------------------------------


def _no_names() -> Named:
    return {"count": 0, "first": []}


@dataclass(frozen=True)
class Scan:
    """The result of a scan.

    Attributes:
        images: usable images, sorted by (name, captions).
        warnings: sentences for the user.
        source: where the captions come from.
        bad: (name, reason) of each image that was left out.
        missing: entries of listings without a file, left out.
        unlisted: images in no listing.
        repeated: images that are listed more than once.
        unused_captions: caption files without an image, beside a listed image, or beside another caption file.
        defaulted: number of captions that are the default caption or a folder's name.
    """

    images: Sequence[CaptionedImage]
    warnings: list[str]
    source: str
    bad: list[tuple[str, str]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unlisted: Named = field(default_factory=_no_names)
    repeated: Named = field(default_factory=_no_names)
    unused_captions: Named = field(default_factory=_no_names)
    defaulted: int = 0

    @property
    def skipped(self) -> int:
        """Number of images that were left out."""
        return len(self.bad) + len(self.missing)


@dataclass(frozen=True)
class DataSource:
    """Where the images and captions of a run come from. Each field is the flag of that name."""

    train_data_dir: str | None = None
    dataset_name: str | None = None
    dataset_config_name: str | None = None
    image_column: str = "image"
    caption_column: str = "text"
    instance_prompt: str | None = None
    caption_from_folder: bool = False
    caption_per_line: bool = False
    follow_links: bool = False
    on_bad_image: str = "error"
    cache_dir: str | None = None
    max_train_samples: int | None = None
    validation_data_dir: str | None = None
    validation_split: float | None = None
    max_validation_samples: int = 64
    label_from_folder: bool = False  # no flag: whether the folders at the top are the classes of labelled images


def find_images(source: DataSource) -> tuple[Scan, Sequence[CaptionedImage]]:
    """(`Scan` of the images to train on, held-out images).

    Raises:
        DataError: images or captions can't be used; the message names the file or column.
    """
    scan = _scan_source(source)
    images, held_out = scan.images, []
    if source.validation_data_dir:
        held = scan_folder(source.validation_data_dir, flag="--validation_data_dir", **_folder_options(source))
        remarks = held.warnings + [f"{held.skipped} of the images are left out."] * bool(held.skipped)
        scan = replace(scan, warnings=scan.warnings + [f"--validation_data_dir: {remark}" for remark in remarks])
        held_out = held.images
    elif source.validation_split:
        share = source.validation_split
        wanted = share if share >= 1 else share * len(images)
        amount = min(wanted, source.max_validation_samples) if wanted >= 1 else share
        images, held_out = hold_out(images, amount, given=share)
    scan = replace(scan, images=first_of(images, source.max_train_samples))
    return scan, first_of(held_out, source.max_validation_samples)


def _scan_source(source: DataSource) -> Scan:
    """The scan of all images of the training folder or data set."""
    if source.train_data_dir:
        return scan_folder(source.train_data_dir, **_folder_options(source))
    local = Path(source.dataset_name).is_dir()
    with contextlib.nullcontext() if local else offline_without_hub():
        return scan_dataset(
            source.dataset_name, source.dataset_config_name, max_samples=source.max_train_samples, **_options(source)
        )


def _options(source: DataSource) -> dict[str, Any]:
    """The keyword arguments that `scan_folder` and `scan_dataset` have in common."""
    return {
        "image_column": source.image_column,
        "caption_column": source.caption_column,
        "default_caption": source.instance_prompt,
        "on_bad_image": source.on_bad_image,
        "cache_dir": source.cache_dir,
        "show": int(os.environ.get("RANK", "0")) == 0,
    }


def _folder_options(source: DataSource) -> dict[str, Any]:
    """The keyword arguments of `scan_folder`."""
    return _options(source) | {
        "caption_from_folder": source.caption_from_folder,
        "caption_per_line": source.caption_per_line,
        "follow_links": source.follow_links,
        "label_from_folder": source.label_from_folder,
    }


# ---------------------------------------------------------------------------------------------------------------------
# 2. Scans
# ---------------------------------------------------------------------------------------------------------------------


def scan_folder(
    folder: str | os.PathLike,
    *,
    flag: str = "--train_data_dir",
    image_column: str = "image",
    caption_column: str = "text",
    default_caption: str | None = None,
    caption_from_folder: bool = False,
    caption_per_line: bool = False,
    follow_links: bool = False,
    on_bad_image: str = "error",
    cache_dir: str | os.PathLike | None = None,
    show: bool = True,
    label_from_folder: bool = False,
) -> Scan:
    """Find the images below a folder and their captions, and check all of them.

    Captions come from `metadata.jsonl`, `.csv` or `.parquet` in the folder or below it. A row has the name of a file,
    relative to the listing, and a text or a list of texts: `{"file_name": "a.png", "text": "…"}`. Without a listing,
    captions come from a `.txt` or `.caption` file beside each image. WebDataset shards (`*.tar`) are read in place.
    Hidden files and folders are skipped. Images that have not changed since an earlier scan are not read.

    Args:
        folder: `--train_data_dir`.
        flag: the flag that named the folder, for messages.
        image_column: `--image_column`; in a listing without this column the column is `file_name`.
        caption_column: `--caption_column`, in listings and in the `.json` members of shards.
        default_caption: `--instance_prompt`, for images without a caption.
        caption_from_folder: `--caption_from_folder`: the name of the folder for images without a caption.
        caption_per_line: `--caption_per_line`: each line of a caption file is a caption of its own.
        follow_links: `--follow_links`: use files outside the folder that links in the folder lead to.
        on_bad_image: "error", or "skip" to leave out and list what can't be used.
        cache_dir: `--cache_dir`; the user's cache if None.
        show: show a progress bar after one second.
        label_from_folder: the only caption of each image is the name of the folder at the top that holds it.

    Raises:
        DataError: something is missing, unreadable, without a caption, or outside the folder.
    """
    request = ScanRequest(
        flag, str(folder), image_column, caption_column, default_caption, _skips(on_bad_image), show,
        caption_from_folder, caption_per_line, follow_links, Path(folder), label_from_folder=label_from_folder,
    )  # fmt: skip
    refuse_no_folder(flag, str(folder))
    key = os.fsencode(request.root.resolve())
    return with_facts(cache_dir, key, lambda facts, warnings: _scan_folder(Findings(request, facts, warnings)))


def _scan_folder(findings: Findings) -> Scan:
    found, sources = {}, []
    listings, unread_stems = find_files(findings)
    if listings:
        found = add_listings(findings, listings)
        sources.append(", ".join(listings))
    elif findings.has("pictures"):
        found = {"unused_captions": add_captioned_pictures(findings, unread_stems)}
        sources.append(_beside_images(findings))
    if findings.has("shards"):
        sources.append(add_shards(findings))
    source = " and ".join(sources)
    if not findings.has("entries"):
        _refuse_nothing(findings, source)
    findings.warnings += remarks_on_others(findings)
    findings.remark_on_conventions()
    images = _checked_images(findings)
    _forget_vanished(findings.facts)
    return _result(findings, images, source, **found)


def _beside_images(findings: Findings) -> str:
    """Where the captions of pictures come from without a listing, in words."""
    used = "SELECT 1 FROM sidecars s JOIN pictures p ON p.stem = s.stem LIMIT 1"
    if findings.request.label_from_folder:
        return "the names of folders"
    if findings.has("nearly") or findings.db.execute(used).fetchone() or not findings.defaulted:
        return "caption files beside the images"
    return "the names of folders" if findings.request.default_caption is None else "--instance_prompt"


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

    The images stay undecoded bytes. A caption may be a text or a list of texts. The default caption replaces empty
    captions. Without a default caption empty captions are allowed, since users can seldom correct a data set of the
    Hub; a warning counts them. Without the caption column every image gets the default caption.

    Args:
        dataset_name: `--dataset_name`.
        dataset_config_name: `--dataset_config_name`.
        split: the split to read.
        max_samples: `--max_train_samples`; further rows are not read.
        image_column, caption_column, default_caption, on_bad_image, cache_dir, show: see `scan_folder`.

    Raises:
        DataError: the data set can't be loaded, a column is missing or of another kind, a caption is not text, or
            images can't be used.
    """
    skip_bad = _skips(on_bad_image)
    refuse_no_data_set(dataset_name)
    dataset = load_dataset(dataset_name, dataset_config_name, split, cache_dir)
    key = f"{dataset._fingerprint} {image_column}".encode()  # of all rows: fewer rows have the same facts
    if max_samples is not None:
        dataset = dataset.select(range(min(max_samples, len(dataset))))
    place = f"--dataset_name {dataset_name}"
    if not len(dataset):
        raise DataError(f"{place}: the split {split!r} is empty.")
    with advise_on_columns(dataset_name, dataset.column_names):
        require_column(image_column, dataset.column_names, place, "--image_column")
        if default_caption is None:
            require_column(caption_column, dataset.column_names, place, "--caption_column")
    request = ScanRequest(
        "--dataset_name", dataset_name, image_column, caption_column, default_caption, skip_bad, show,
        images=undecoded_images(dataset, image_column, dataset_name),
    )  # fmt: skip
    return with_facts(cache_dir, key, lambda facts, warnings: _scan_rows(Findings(request, facts, warnings), dataset))


def _scan_rows(findings: Findings, dataset: Any) -> Scan:
    add_rows(findings, dataset)
    return _result(findings, _checked_images(findings), findings.request.place)


def _result(findings: Findings, images: ImageTable, source: str, **found: Named) -> Scan:
    return Scan(
        images, findings.warnings, source, findings.bad, findings.missing, defaulted=findings.defaulted, **found
    )


def _skips(on_bad_image: str) -> bool:
    if on_bad_image not in ("error", "skip"):
        raise DataError(f"--on_bad_image is {on_bad_image!r}; it must be error or skip.")
    return on_bad_image == "skip"


def _refuse_nothing(findings: Findings, source: str) -> None:
    """Raise the DataError for a folder without usable images. source: where captions come from, if from anywhere."""
    if findings.bad or findings.missing:
        _refuse_all_bad(findings)
    flag, place = findings.request.flag, findings.request.place
    others = "".join(f" {remark}" for remark in [*findings.warnings, *remarks_on_others(findings)])
    if source:
        advice = "Fill it, or remove it." if findings.listings else "Fill what is empty, or name another folder."
        raise DataError(f"{flag}: there are no images in {shown(source)} of {place}.", advice + others)
    parts = dataset_files(findings)
    if parts and flag == "--train_data_dir":
        raise DataError(
            f"{flag}: {place} holds no images but a data set: {first_names(parts)}.",
            f"Give --dataset_name {place} instead.",
        )
    raise DataError(
        f"{flag}: there are no images in {place} or below it that are read.",
        f"Files ending in {', '.join(IMAGE_EXTENSIONS)} are read, and WebDataset shards (.tar).{others}",
    )


def _forget_vanished(facts: Facts) -> None:
    """Remove the facts about files that are gone. Facts about unlisted files stay: they may be listed again."""
    facts.forget("facts", "SELECT path FROM pictures UNION SELECT path FROM entries")
    facts.forget("tars", "SELECT path FROM shards")
    facts.forget("members", "SELECT path FROM shards")


# ---------------------------------------------------------------------------------------------------------------------
# 3. Checking images
# ---------------------------------------------------------------------------------------------------------------------


def _checked_images(findings: Findings) -> ImageTable:
    """The table of the usable images among the entries. New and changed images are read; see `_judge_bad`."""
    query = (
        "SELECT DISTINCT e.path, e.offset, e.length, e.stamp, f.content FROM entries e LEFT JOIN facts f "
        "ON f.path = e.path AND f.offset = e.offset WHERE f.stamp IS NOT e.stamp ORDER BY e.path, e.offset"
    )
    request = findings.request

    def store(item: tuple, found: tuple[ImageFacts | None, bool]) -> None:
        (path, offset, _, stamp, _), (facts, lasting) = item, found
        if facts is None:
            findings.db.execute("UPDATE facts SET stamp = ? WHERE path = ? AND offset = ?", (stamp, path, offset))
            return
        # No file has the stamp NULL: facts that may not last, such as a read error, are read again by the next scan.
        findings.db.execute(
            "INSERT OR REPLACE INTO facts VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (path, offset, stamp if lasting else None, facts.content, facts.format, *facts.size,
             ",".join(facts.notes), facts.error, facts.profile, facts.colour_remark, facts.revision),
        )  # fmt: skip

    findings.facts.update(query, partial(read_facts, request), store, "checking images" if request.show else "")
    _judge_bad(findings)
    return store_table(
        findings.facts,
        "SELECT e.name, e.captions, f.content, f.height, f.width, e.path, e.offset, e.length, f.revision, "
        "f.format, f.notes, f.profile, f.colour_remark "
        "FROM entries e JOIN facts f ON f.path = e.path AND f.offset = e.offset WHERE f.error = ''",
        request.root,
        request.images,
        request.image_column if request.images is not None else "",
    )


def read_facts(request: ScanRequest, item: tuple) -> tuple[ImageFacts | None, bool]:
    """(facts, whether they last) of one image; no facts where the known facts still hold. Called in threads.

    Args:
        request: the scan's.
        item: (path, offset, length, stamp, sha256) of an entry; the digest is what an earlier scan has found, or None.
    """
    path, offset, length, stamp, content = item
    try:
        if request.images is not None:
            return _facts_of(DatasetImage(request.images, offset, request.image_column).read_bytes(), content)
        with open(request.root / path, "rb") as file:
            file.seek(offset)
            data = file.read() if length is None else file.read(length)
            status = os.fstat(file.fileno())
    except DataError as error:
        return ImageFacts("", "", (0, 0), (), f"can't be read: {error.problem.rstrip('.')}"), False
    except OSError as error:
        return ImageFacts("", "", (0, 0), (), f"can't be read: {because(error)}"), False
    if not is_same_content(stamp, status):
        return ImageFacts("", "", (0, 0), (), "the file changed while it was read"), False
    return _facts_of(data, content)


def _facts_of(data: bytes, content: str | None) -> tuple[ImageFacts | None, bool]:
    """(facts, whether they last); no facts where the bytes have the digest of an earlier scan, whose facts hold.

    That a plugin is missing does not last, and is stored without a digest: the next scan may find the plugin.
    """
    if missing_reader(data):
        return replace(inspect(data), content=""), False
    return (None if content and hashlib.sha256(data).hexdigest() == content else inspect(data)), True


def _judge_bad(findings: Findings) -> None:
    """Add the unusable images to `bad`; refuse them or, under --on_bad_image skip, warn of them."""
    request, refused = findings.request, 0
    for name, error in findings.db.execute(
        "SELECT DISTINCT e.name, f.error FROM entries e JOIN facts f ON f.path = e.path AND f.offset = e.offset "
        "WHERE f.error != ''"
    ):
        refused += 1
        findings.bad.append((shown(name) if request.images is None else f"row {int(name)}", error))
    if not findings.bad:
        return
    findings.bad.sort()
    (total,) = findings.db.execute("SELECT count(DISTINCT name) FROM entries").fetchone()
    if not request.skip_bad:
        count = counted(len(findings.bad), "image")
        raise DataError(
            f"{request.flag}: {count} of {total - refused + len(findings.bad)} in {request.place} can't be used:"
            f"{_reasons(findings.bad)}",
            "Replace or remove them, or leave them out with --on_bad_image skip.",
        )
    if refused == total:
        _refuse_all_bad(findings)
    first = [f"{name} ({reason})" for name, reason in findings.bad[:FIRST_NAMES]]
    found = {"count": len(findings.bad), "first": first}
    findings.remark(found, "image", "can't be used and is left out", "can't be used and are left out")


def _refuse_all_bad(findings: Findings) -> None:
    bad = findings.bad + [(name, "listed, but not there") for name in findings.missing]
    none = "the only image" if len(bad) == 1 else f"none of the {len(bad)} images"
    can = "can't" if len(bad) == 1 else "can"
    raise DataError(f"{findings.request.flag}: {none} in {findings.request.place} {can} be used:{_reasons(bad)}")


def _reasons(bad: list[tuple[str, str]]) -> str:
    """A list of bad images, one per line."""
    return listed([f"{name}: {reason}" for name, reason in bad], len(bad))
