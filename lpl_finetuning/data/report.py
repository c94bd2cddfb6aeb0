"""The report on the data of a run: what a scan found, as numbers, as remarks, and as one page of the terminal.

Sections:

1. the report: a dictionary, which `data_report.json` holds;
2. statistics of formats, sizes, captions and copies;
3. remarks: sentences about what deserves a look;
4. the page.

Importing this file imports neither torch nor datasets. Sizes are (height, width) in pixels.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lpl_finetuning.data.colours import COLOUR_REMARKS
from lpl_finetuning.data.images import assign_buckets, lost_share
from lpl_finetuning.data.samples import FramingRules
from lpl_finetuning.data.scan import Scan
from lpl_finetuning.data.tables import (
    ROWS_AT_ONCE,
    SEPARATOR,
    CaptionedImage,
    ImageTable,
    contents_of,
    select,
    sizes_of,
)
from lpl_finetuning.errors import FIRST_NAMES, DataError, counted, first_names, shown

# ---------------------------------------------------------------------------------------------------------------------
# 1. The report
# ---------------------------------------------------------------------------------------------------------------------


def build_report(
    scan: Scan, held_out: Sequence[CaptionedImage], rules: FramingRules, batch_size: int = 1
) -> dict[str, Any]:
    """The report on the data, numbers and names that JSON can hold.

    Args:
        scan: with the images to train on.
        held_out: images to validate with.
        rules: how images are cut.
        batch_size: samples of a micro-batch; a bucket with fewer images gets a remark.

    Returns:
        The report; "remarks" are sentences about what deserves a look.
    """
    images, sizes = scan.images, sizes_of(scan.images)
    report: dict[str, Any] = {
        "source": scan.source,
        "images": len(images),
        "held_out": len(held_out),
        "bad": [list(pair) for pair in scan.bad],
        "missing": list(scan.missing),
        "unlisted": scan.unlisted,
        "repeated": scan.repeated,
        "unused_captions": scan.unused_captions,
        **_formats_and_notes(images),
        "sizes": _size_statistics(sizes),
        "captions": {**_caption_statistics(images), "default": scan.defaulted},
        "duplicates": _duplicates(images),
        "in_both": _in_both(images, held_out),
    }
    if len(images):
        report |= _buckets(images, sizes, rules.sizes())
        report["very_wide_or_tall"] = _named(images, sizes.max(axis=1) > 4 * sizes.min(axis=1))
    report["batch_size"], report["bucketed"] = batch_size, bool(rules.aspect_ratio_buckets)
    report["remarks"] = [*scan.warnings, *_remarks(report)]
    return report


def refuse_remarks(report: dict[str, Any]) -> None:
    """Raise a DataError if the report has remarks: the effect of --strict."""
    if report["remarks"]:
        raise DataError("--strict: " + "\n  ".join(["the report on the data remarks:", *report["remarks"]]))


def save_report(report: dict[str, Any], path: str | os.PathLike) -> None:
    """Write the report as JSON."""
    Path(path).write_text(json.dumps(report, indent=1, ensure_ascii=False), encoding="utf-8")


def _buckets(
    images: Sequence[CaptionedImage], sizes: np.ndarray, targets: Sequence[tuple[int, int]]
) -> dict[str, Any]:
    """The number of images of each target size, the share that cropping removes, and the images that are smaller."""
    chosen = assign_buckets(sizes, targets)
    short = np.zeros(len(sizes), dtype=bool)
    buckets = []
    for number, target in enumerate(targets):
        members = np.flatnonzero(chosen == number)
        short[members] = (sizes[members] < np.array(target)).any(axis=1)
        lost = float(lost_share(sizes[members], target).mean()) if len(members) else 0.0
        buckets.append({"size": list(target), "images": len(members), "lost": round(lost, 4)})
    return {"buckets": buckets, "below_resolution": _named(images, short)}


def _named(images: Sequence[CaptionedImage], mask: np.ndarray) -> dict[str, Any]:
    rows = np.flatnonzero(mask)
    first = [shown(image.name) for image in select(images, rows[:FIRST_NAMES])]
    return {"count": len(rows), "first": first}


# ---------------------------------------------------------------------------------------------------------------------
# 2. Statistics
# ---------------------------------------------------------------------------------------------------------------------


def _formats_and_notes(images: Sequence[CaptionedImage]) -> dict[str, Any]:
    """Formats, notes, colour profiles that are converted from, and remarks on colours; each with numbers and names."""
    formats: Counter = Counter()
    notes: dict[str, dict] = {}
    profiles: dict[str, dict] = {}
    colours: dict[str, dict] = {}

    def note(table: dict[str, dict], key: str, name: str) -> None:
        found = table.setdefault(key, {"count": 0, "first": []})
        found["count"] += 1
        if len(found["first"]) < FIRST_NAMES:
            found["first"].append(shown(name))

    if isinstance(images, ImageTable):  # a list has none of these
        columns = "name, format, notes, profile, colour_remark"
        for name, format_name, joined, profile, remark in images.columns(columns):
            formats[format_name] += 1
            for key in joined.split(",") if joined else ():
                note(notes, key, name)
            if profile:
                note(profiles, profile, name)
            if remark:
                note(colours, remark, name)
    most_first = sorted(profiles.items(), key=lambda item: (-item[1]["count"], item[0]))
    return {
        "formats": dict(formats.most_common()),
        "notes": dict(sorted(notes.items())),
        "profiles": dict(most_first),
        "colour_remarks": dict(sorted(colours.items())),
    }


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
        rows = (row[0].split(SEPARATOR) for row in images.columns("captions"))
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
        if len(batch) >= ROWS_AT_ONCE:
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
    """Groups of images with the same bytes under different names. Images are repeated where listings repeat them."""
    _, group_of, sizes = np.unique(contents_of(images), return_inverse=True, return_counts=True)
    rows = np.flatnonzero(sizes[group_of] > 1)
    rows = rows[np.argsort(group_of[rows], kind="stable")]
    groups, copies, first = 0, 0, []
    for group in np.split(rows, np.flatnonzero(np.diff(group_of[rows])) + 1) if len(rows) else ():
        names = sorted({image.name for image in select(images, group)})
        if len(names) > 1:
            groups, copies = groups + 1, copies + len(names) - 1
            if len(first) < FIRST_NAMES:
                first.append([shown(name) for name in names[:FIRST_NAMES]])
    return {"groups": groups, "copies": copies, "first": sorted(first)}


def _in_both(images: Sequence[CaptionedImage], held_out: Sequence[CaptionedImage]) -> dict[str, Any]:
    """Held-out images that are also among the images to train on."""
    if not len(held_out) or not len(images):
        return {"count": 0, "first": []}
    return _named(held_out, np.isin(contents_of(held_out), contents_of(images)))


# ---------------------------------------------------------------------------------------------------------------------
# 3. Remarks
# ---------------------------------------------------------------------------------------------------------------------


# By the note of `ImageFacts`: (predicate for one image, for several images).
NOTE_REMARKS = {
    "broken EXIF": (
        "holds EXIF data that can't be read, and is used without them: look whether it lies on its side",
        "hold EXIF data that can't be read, and are used without them: look whether they lie on their side",
    ),
    "large text": (
        "holds more text than Pillow reads (such as a workflow of ComfyUI), and is used without the text",
        "hold more text than Pillow reads (such as workflows of ComfyUI), and are used without the text",
    ),
    "wrong checksum": (
        "has a wrong checksum in a part beside the pixels, and is used without that part",
        "have wrong checksums in parts beside the pixels, and are used without those parts",
    ),
}


def _remarks(report: dict[str, Any]) -> list[str]:
    nothing = {"count": 0, "first": []}
    remarks = [
        *_remark(report["notes"].get("animated", nothing), "has several frames or pages; the first is used",
                 "have several frames or pages; the first is used"),
        *(line for key, texts in NOTE_REMARKS.items() for line in _remark(report["notes"].get(key, nothing), *texts)),
        *(line for key, found in report["colour_remarks"].items() for line in _remark(found, *COLOUR_REMARKS[key])),
        *_remark_on_copies(report["duplicates"]),
        *_remark(report["in_both"], "to validate with is trained on too", "to validate with are trained on too"),
        *_remark(report.get("below_resolution", nothing), "is enlarged to reach its size",
                 "are enlarged to reach their size"),
        *_remark(report.get("very_wide_or_tall", nothing), "is wider or taller than 4:1",
                 "are wider or taller than 4:1"),
    ]  # fmt: skip
    if report["bucketed"]:
        for bucket in report.get("buckets", ()):
            if 0 < bucket["images"] < report["batch_size"]:
                height, width = bucket["size"]
                held, batch = counted(bucket["images"], "image"), f"a batch of {report['batch_size']}"
                remarks.append(f"The bucket of {height} x {width} px holds {held}, fewer than {batch}.")
    return remarks


def _remark(found: dict[str, Any], one: str, many: str) -> list[str]:
    if not found["count"]:
        return []
    names = first_names(found["first"], total=found["count"])
    return [f"{counted(found['count'], 'image')} {one if found['count'] == 1 else many}: {names}."]


def _remark_on_copies(found: dict[str, Any]) -> list[str]:
    if not found["groups"]:
        return []
    names = "; ".join(" = ".join(group) for group in found["first"])
    are_copies = "is a copy of another" if found["copies"] == 1 else "are copies of others"
    return [f"{counted(found['copies'], 'image')} {are_copies}: {names}."]


# ---------------------------------------------------------------------------------------------------------------------
# 4. The page
# ---------------------------------------------------------------------------------------------------------------------


def report_lines(report: dict[str, Any]) -> list[str]:
    """The report as one page for the terminal, at most 40 lines."""
    what = "labels" if "classes" in report else "captions"
    rows = [(f"{what} from", report["source"]), ("images", f"{report['images']}, held out: {report['held_out']}")]
    if report["formats"]:
        rows.append(("formats", ", ".join(f"{name or '?'} {count}" for name, count in report["formats"].items())))
    if report["notes"]:
        rows.append(("notes", ", ".join(f"{name} {found['count']}" for name, found in report["notes"].items())))
    if report["profiles"]:
        names = [f"{name} {found['count']}" for name, found in report["profiles"].items()]
        rows.append(("colours", f"converted to sRGB from {first_names(names)}"))
    for name, values in report["sizes"].items():
        unit = "" if name == "megapixels" else " px"
        rows.append((name, f"{values[0]:g} to {values[2]:g}{unit}, median {values[1]:g}"))
    captions = report["captions"]
    rows.append((what, f"{captions['count']}, {captions['different']} different"))
    if captions["images_with_several"]:
        several = captions["images_with_several"]
        have = "has" if several == 1 else "have"
        rows[-1] = ("captions", f"{rows[-1][1]}, {counted(several, 'image')} {have} several")
    if captions["default"] and what == "captions":
        rows.append(("", f"{captions['default']} from --instance_prompt or a folder's name"))
    if captions["length"] and what == "captions":
        low, middle, high = captions["length"]
        rows.append(("length", f"{low:g} to {high:g} characters, median {middle:g}"))
    if what == "labels":
        counts = [f"{name} {count}" for name, count in report["classes"].items()]
        rows.append(("classes", first_names(counts)))
    skipped = len(report["bad"]) + len(report["missing"])
    if skipped:
        rows.append(("left out", f"{counted(skipped, 'image')}, see the remarks"))
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
