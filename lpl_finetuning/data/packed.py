"""Captioned images in packed form: WebDataset shards, and data sets of Hugging Face's `datasets`.

Sections:

1. shards: the images in a tar, with their captions;
2. data sets: loading, and the images and captions of the rows.

The functions add an entry for each image to the findings of a scan (`data.findings`), without opening the image.
Importing this file imports neither torch nor datasets; a data set imports datasets and pyarrow.
"""

import contextlib
import functools
import json
import os
import re
import tarfile
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lpl_finetuning.data.findings import (
    Findings,
    decode_text,
    json_object,
    refuse_long,
    require_column,
)
from lpl_finetuning.data.formats import IMAGE_EXTENSIONS, PLUGIN_EXTENSIONS, install_advice, taken_extensions
from lpl_finetuning.data.near_names import CAPTION_EXTENSIONS
from lpl_finetuning.data.tables import ROWS_AT_ONCE, stamp_of
from lpl_finetuning.errors import FIRST_NAMES, DataError, because, counted, first_names, is_or_are, shown
from lpl_finetuning.files import digest

# ---------------------------------------------------------------------------------------------------------------------
# 1. Shards
# ---------------------------------------------------------------------------------------------------------------------

_MAX_JSON = 2**24  # bytes of a `.json` member
_CAPTION_KINDS = ("txt", "caption", "json")  # the first kind that is found beside an image is read
_IMAGES = {*IMAGE_EXTENSIONS, *PLUGIN_EXTENSIONS}  # listed with or without the plugin, which may come later
_KIND = re.compile(r"(?:.*/|)[^.]+[.]([^/]*)", re.DOTALL)  # what follows the first dot of the base name
_META = re.compile(r"__[^/]*__($|/)")  # webdataset's own members
_HERE = re.compile(r"(\./+)*")  # `tar -C folder .` writes ./a.png


class ShardImage(NamedTuple):
    """An image in a shard.

    Attributes:
        offset: first byte of the image in the tar.
        length: bytes of the image.
        name: printable name of the image's member.
        caption_name: printable name of the caption's member.
        text: content of the caption's member; None for an image without a caption.
        is_json: 1 where the text is JSON, else 0.
    """

    offset: int
    length: int
    name: str
    caption_name: str
    text: str | None
    is_json: int


class _Member(NamedTuple):
    name: str
    stem: str
    kind: str  # in lower case, without the dot
    info: tarfile.TarInfo
    tar: tarfile.TarFile


def shard_images(path: Path, remarks: list[str]) -> Iterator[ShardImage]:
    """The images in a shard.

    Members are grouped as by webdataset. Neighbours with the same path up to the first dot of the base name belong
    together; the rest of the name, in lower case, is the kind of the member.

    Args:
        path: the tar.
        remarks: gets sentences about members that are not used, at the end.

    Raises:
        DataError: the tar is damaged, cut short or compressed, or a caption can't be read.
    """
    odd, alone = [], []
    with _tar_errors(path):
        for stem, members in groupby(_members(path), key=lambda member: member.stem):
            images, texts = _sample(path, members, odd)
            if texts and not images:
                alone.append(stem)
            for offset, length, image, image_kind in images:
                own = [f"{image_kind}{extension}" for extension in CAPTION_EXTENSIONS]  # as in a.png.txt
                kind = next((kind for kind in (*_CAPTION_KINDS, *own) if kind in texts), None)
                name, text = texts.get(kind, ("", None))
                yield ShardImage(offset, length, image, name, text, int(kind == "json"))
    if odd:
        has = "has more than one dot in its name, so it is no image to webdataset, and is not used"
        have = "have more than one dot in their names, so they are no images to webdataset, and are not used"
        remarks.append(_remark_on_members(path, odd, has, have))
    if alone:
        alone_is, alone_are = "is a caption without an image, and is", "are captions without an image, and are"
        remarks.append(_remark_on_members(path, alone, f"{alone_is} not used", f"{alone_are} not used"))


def _remark_on_members(path: Path, names: list[str], one: str, many: str) -> str:
    what = one if len(names) == 1 else many
    return f"{counted(len(names), 'member')} of {shown(str(path))} {what}: {first_names(names)}."


def _sample(path: Path, members: Iterable[_Member], odd: list[str]) -> tuple[list[tuple], dict[str, tuple[str, str]]]:
    """([(offset, length, name, kind) of each image], {kind: (name, text) of each caption}) of members of one group."""
    images, texts, kinds = [], {}, set()
    for name, _, kind, info, tar in members:
        place = f"{shown(str(path))}: {shown(name)}"
        if kind in kinds:
            raise DataError(f"{place}: there are two members of this kind with one name.", "Rename one.")
        kinds.add(kind)
        if f".{kind}" in _IMAGES:
            images.append((info.offset_data, info.size, _printable(name), kind))
        elif kind in _CAPTION_KINDS or _is_whole_name(kind):
            refuse_long(info.size, place, *([_MAX_JSON] if kind == "json" else []))
            texts[kind] = (_printable(name), decode_text(tar.extractfile(info).read(), place))
        elif f".{kind.rpartition('.')[2]}" in _IMAGES:
            odd.append(name)
    return images, texts


def _is_whole_name(kind: str) -> bool:
    """Whether a kind is that of a caption with the whole name of its image: "png.txt"."""
    image, _, caption = kind.rpartition(".")
    return f".{image}" in _IMAGES and f".{caption}" in CAPTION_EXTENSIONS


def _members(path: Path) -> Iterator[_Member]:
    """The files in a tar, each once, up to the end mark.

    Raises:
        tarfile.TarError: the tar is damaged, or the end mark is missing; tarfile raises other types too.
    """
    with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
        while (info := tar.next()) is not None:
            tar.members.clear()  # tarfile would keep all members in memory
            name = info.name[_HERE.match(info.name).end() :]
            match = _KIND.fullmatch(name)
            if info.isreg() and match and not _META.match(name):
                if info.issparse():
                    raise tarfile.ReadError(f"{shown(name)} is stored with holes; pack it without --sparse")
                yield _Member(name, name[: match.start(1) - 1], match[1].lower(), info, tar)
        # tarfile takes a cut or broken header for the end of the tar. The real end mark is a block of zeros.
        file.seek(tar.offset)
        end = file.read(tarfile.RECORDSIZE + tarfile.BLOCKSIZE)
        if len(end) < tarfile.BLOCKSIZE or any(end[: tarfile.BLOCKSIZE]):
            raise tarfile.ReadError("it ends before its end mark")
        if any(end):
            raise tarfile.ReadError("there is more after its end, as if two were joined")


@contextlib.contextmanager
def _tar_errors(path: Path) -> Iterator[None]:
    """Context manager: turns the many errors of damaged tars into a DataError that names the file."""
    try:
        yield
    except DataError:
        raise
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        with contextlib.suppress(OSError), open(path, "rb") as file:
            if file.read(2) in (b"\x1f\x8b", b"BZ", b"\xfd7", b"(\xb5"):
                raise DataError(
                    f"{shown(str(path))}: a compressed tar.", "Uncompress it; only plain ones are read."
                ) from error
        raise DataError(
            f"{shown(str(path))}: the tar is damaged or cut short ({because(error)}).", "Copy or pack it again."
        ) from error


def _printable(name: str) -> str:
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def add_shards(findings: Findings) -> str:
    """Add an entry for each image in the shards of a folder.

    Returns:
        The number of shards, in words.

    Raises:
        DataError: a shard or a caption can't be used, or an image has no caption.
    """
    _list_shards(findings)
    _add_members(findings)
    (count,) = findings.db.execute("SELECT count(*) FROM shards").fetchone()
    return counted(count, "WebDataset shard")


def _list_shards(findings: Findings) -> None:
    """Bring the table `members` up to date: the images in the shards, with their captions."""
    query = (
        "SELECT s.path, s.stamp FROM shards s LEFT JOIN tars t USING (path) WHERE t.stamp IS NOT s.stamp "
        "ORDER BY s.path"
    )

    def store(item: tuple, _: None) -> None:
        path, stamp = item
        remarks: list[str] = []
        for table in ("tars", "members"):
            findings.db.execute(f"DELETE FROM {table} WHERE path = ?", (path,))
        rows = ((path, *image) for image in shard_images(findings.request.root / path, remarks))
        findings.db.executemany("INSERT INTO members VALUES (?, ?, ?, ?, ?, ?, ?)", rows)
        # The facts of members that lie where they lay stay: only their bytes are compared.
        findings.db.execute(
            "DELETE FROM facts WHERE path = ?1 AND offset NOT IN (SELECT offset FROM members WHERE path = ?1)", (path,)
        )
        findings.db.execute("INSERT INTO tars VALUES (?, ?, ?)", (path, stamp, json.dumps(remarks)))

    # `store` reads the shards one by one, and stores each row as soon as it is read.
    findings.facts.update(query, lambda item: None, store)
    for (remarks,) in findings.db.execute("SELECT t.remarks FROM tars t JOIN shards USING (path) ORDER BY path"):
        findings.warnings += json.loads(remarks)


def _add_members(findings: Findings) -> None:
    """Add an entry for each image in the table `members`.

    Raises:
        DataError: a caption can't be used, or an image has no caption.
    """
    request, bare, total, unread = findings.request, [], 0, []
    needing = PLUGIN_EXTENSIONS.keys() - taken_extensions()
    rows = findings.db.execute(
        "SELECT m.path, offset, length, name, caption_name, text, is_json, s.stamp FROM members m "
        "JOIN shards s ON s.path = m.path ORDER BY m.path, offset"
    )

    @functools.lru_cache(1)
    def stems_in(shard: str) -> set[str]:
        names = findings.db.execute("SELECT name FROM members WHERE path = ?", (shard,))
        return {f"{shard}/{name[: _KIND.fullmatch(name).start(1) - 1]}" for (name,) in names}

    def is_picture(shard: str, stem: str) -> bool:
        return stem in stems_in(shard)

    def entries() -> Iterator[tuple]:
        nonlocal total
        for path, offset, length, member, caption_name, text, is_json, stamp in rows:
            if os.path.splitext(member)[1].lower() in needing:
                unread.append(f"{path}/{member}")
                continue
            total += 1
            default, name = request.default(path), f"{path}/{member}"
            if text is None and default is None:
                bare.append(name if len(bare) <= FIRST_NAMES else "")
                continue
            place = f"{request.root / path}: {shown(caption_name or member)}"
            cell, what = _caption_of(findings, text, is_json, place, name, default is None)
            beside = functools.partial(is_picture, path)
            with findings.noting():
                captions = findings.captions(
                    cell, default, place, what, "sample", path=path, member=name, is_picture=beside
                )
                yield name, captions, path, offset, length, stamp, place

    findings.add_entries(entries())
    _remark_on_plugins(findings, unread)
    if bare:
        raise DataError(
            f"{request.flag}: {len(bare)} of {total} images in the shards of {request.place} have no caption: "
            f"{first_names(bare)}.",
            "Each needs a .txt or .json member of the same name right beside it in the tar; or give all one with "
            "--instance_prompt.",
        )


def _caption_of(
    findings: Findings, text: str | None, is_json: int, place: str, name: str, needed: bool
) -> tuple[Any, str]:
    """(caption or captions in the text of a member, what the caption is called in messages).

    Args:
        text: content of the caption's member; None for an image without a caption.
        is_json: whether the text is JSON.
        place: where the member stands.
        name: of the image.
        needed: refuse JSON without the caption column.
    """
    if is_json:
        row = json_object(text, place, line=False)
        if needed:
            require_column(findings.request.caption_column, row, place, "--caption_column")
        return row.get(findings.request.caption_column), f"the caption {findings.request.caption_column!r}"
    return findings.cell_of(text, name), "the caption"


def _remark_on_plugins(findings: Findings, unread: list[str]) -> None:
    """Add a warning about the images that are not read without a plugin, unless there are none."""
    command = install_advice([os.path.splitext(name)[1].lower() for name in unread])
    findings.remark(
        {"count": len(unread), "first": unread[:FIRST_NAMES]},
        "picture",
        f"is not read without a plugin of Pillow ({command})",
        f"are not read without a plugin of Pillow ({command})",
    )


# ---------------------------------------------------------------------------------------------------------------------
# 2. Data sets
# ---------------------------------------------------------------------------------------------------------------------


def load_dataset(name: str, config: str | None, split: str, cache_dir: str | os.PathLike | None) -> Any:
    """A split of a data set from the Hub, or of a folder that `save_to_disk` wrote.

    Raises:
        DataError: the data set can't be loaded, or has no such split.
    """
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
            f"--dataset_name {name}{config_text}: the split {split!r} can't be loaded: {error}",
            "Check its name and the network; a folder with images is --train_data_dir.",
        ) from error


def undecoded_images(dataset: Any, column: str, place: str) -> Any:
    """The data set with its image column alone, undecoded. Reading a row of more columns would decode all of them.

    Raises:
        DataError: the column holds no images.
    """
    import datasets

    try:
        return dataset.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    except (TypeError, ValueError, NotImplementedError) as error:  # pyarrow's are among these
        raise DataError(
            f"--image_column {column!r} of {place} holds {dataset.features[column]}, not images."
        ) from error


def _cells_of(dataset: Any, column: str) -> Iterator[Any]:
    """The cells of a column, names where they are a ClassLabel's; None for each row where there is no such column."""
    if column not in dataset.column_names:
        yield from [None] * len(dataset)
        return
    names = getattr(dataset.features[column], "names", None)  # of a ClassLabel, whose cells are numbers
    for batch in dataset.select_columns([column]).iter(batch_size=ROWS_AT_ONCE):
        if names is None:
            yield from batch[column]
        else:
            yield from (None if cell is None or cell < 0 else names[cell] for cell in batch[column])


def _stamp_of_dataset(dataset: Any) -> str:
    """The stamps of the files that hold a data set's rows, as one digest; "" for a data set in memory."""
    stamps = []
    for file in dataset.cache_files:
        with contextlib.suppress(OSError):
            stamps.append(stamp_of(os.stat(file["filename"])))
    return digest(stamps=stamps)[:16] if stamps else ""


def _stamps_of_rows(images: Any, column: str) -> dict[int, str]:
    """{row: stamp of the file} of the rows that hold a path instead of bytes."""
    import pyarrow.compute as compute

    files, start = {}, 0
    for batch in images.with_format("arrow").iter(batch_size=ROWS_AT_ONCE):
        cells = batch.column(column).combine_chunks()
        without = compute.is_null(compute.struct_field(cells, "bytes"))
        for index in np.flatnonzero(without.to_numpy(zero_copy_only=False)):
            path = compute.struct_field(cells, "path")[int(index)].as_py()
            with contextlib.suppress(OSError, TypeError, ValueError):
                files[start + int(index)] = stamp_of(os.stat(path))
        start += len(cells)
    return files


def add_rows(findings: Findings, dataset: Any) -> None:
    """Add an entry for each row of a data set.

    Without a default caption an empty caption is allowed, and counted in a warning.

    Raises:
        DataError: a caption can't be used.
    """
    request, num_empty = findings.request, 0
    default, files = request.default_caption, _stamps_of_rows(request.images, request.image_column)
    stamp = _stamp_of_dataset(request.images)

    def entries() -> Iterator[tuple]:
        nonlocal num_empty
        for index, cell in enumerate(_cells_of(dataset, request.caption_column)):
            place = f"--caption_column {request.caption_column!r} of {request.place}: row {index}"
            texts = cell if isinstance(cell, (list, tuple)) else [cell]
            if default is None:
                num_empty += any(isinstance(text, str) and not text.strip() for text in texts) or not texts
            with findings.noting():
                captions = findings.captions(cell, default, place, "the caption", "row", empty_allowed=default is None)
                yield f"{index:09d}", captions, "", index, None, files.get(index, stamp), place

    findings.add_entries(entries())
    if num_empty:
        findings.warnings.append(
            f"{num_empty} of {len(dataset)} captions of {request.place} {is_or_are(num_empty)} empty."
        )
