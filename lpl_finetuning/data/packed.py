"""Where images and captions come from: folders, caption files, listings, WebDataset shards, Hugging Face data sets.

What this file holds, in order:

1. folders: the files below one, and what lies there that can't be used;
2. captions: texts as they stand in files and cells;
3. listings: the rows of `metadata.jsonl`, `.csv` and `.parquet`;
4. shards: the images in a tar with their captions;
5. data sets: their images and captions.

Everything is read here with the place of every mistake, and nothing is kept: `data.scan` does that. Importing this
file imports neither torch nor datasets: Parquet listings import pyarrow, and data sets import datasets, when they are
met.

Names are paths relative to the folder, with `/`. A place is where something stands, for messages; a `DataError`
begins with it.
"""

import contextlib
import os
import re
import tarfile
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lpl_finetuning.data.folders import MAX_JSON, decode_text, refuse_long
from lpl_finetuning.data.images import IMAGE_EXTENSIONS
from lpl_finetuning.data.tables import ROWS_AT_ONCE
from lpl_finetuning.errors import DataError, because, counted, first_names, shown

# ---------------------------------------------------------------------------------------------------------------------
# 4. Shards
# ---------------------------------------------------------------------------------------------------------------------

_CAPTION_KINDS = ("txt", "caption", "json")  # the first one found beside an image is read
_KIND = re.compile(r"(?:.*/|)[^.]+[.]([^/]*)", re.DOTALL)  # what follows the first dot of the base name
_META = re.compile(r"__[^/]*__($|/)")  # webdataset's own
_HERE = re.compile(r"(\./+)*")  # `tar -C folder .` writes ./a.png


class ShardImage(NamedTuple):
    """An image in a shard; `text` is that of its caption's member, None where there is none."""

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
    """The images in a shard; what is not used is remarked upon at the end.

    Members are grouped as webdataset does it: neighbours with the same path up to the first dot of the base name
    belong together, and the rest of the name, in lower case, tells what they are.

    Raises:
        DataError: the tar is damaged, cut short or compressed, or a caption can't be read.
    """
    odd, alone = [], []
    with _tar_errors(path):
        for stem, members in groupby(_members(path), key=lambda member: member.stem):
            images, texts = _sample(path, members, odd)
            if texts and not images:
                alone.append(stem)
            kind = next((kind for kind in _CAPTION_KINDS if kind in texts), None)
            name, text = texts.get(kind, ("", None))
            for offset, length, image in images:
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
    """([(offset, length, name) of an image], {kind: (name, text) of a caption}) among members that belong together."""
    images, texts, kinds = [], {}, set()
    for name, _, kind, info, tar in members:
        place = f"{shown(str(path))}: {shown(name)}"
        if kind in kinds:
            raise DataError(f"{place}: there are two members of this kind with one name. Rename one.")
        kinds.add(kind)
        if f".{kind}" in IMAGE_EXTENSIONS:
            images.append((info.offset_data, info.size, _printable(name)))
        elif kind in _CAPTION_KINDS:
            refuse_long(info.size, place, *([MAX_JSON] if kind == "json" else []))
            texts[kind] = (_printable(name), decode_text(tar.extractfile(info).read(), place))
        elif f".{kind.rpartition('.')[2]}" in IMAGE_EXTENSIONS:
            odd.append(name)
    return images, texts


def _members(path: Path) -> Iterator[_Member]:
    """The files in a tar, once each; sure to reach the end of it. Raises whatever tarfile raises."""
    with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
        while (info := tar.next()) is not None:
            tar.members.clear()  # or all of them would be held
            name = info.name[_HERE.match(info.name).end() :]
            match = _KIND.fullmatch(name)
            if info.isreg() and match and not _META.match(name):
                if info.issparse():
                    raise tarfile.ReadError(f"{shown(name)} is stored with holes; pack it without --sparse")
                yield _Member(name, name[: match.start(1) - 1], match[1].lower(), info, tar)
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
            f"{shown(str(path))}: the tar is damaged or cut short ({because(error)}). Copy or pack it again."
        ) from error


def _printable(name: str) -> str:
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


# ---------------------------------------------------------------------------------------------------------------------
# 5. Data sets
# ---------------------------------------------------------------------------------------------------------------------


def load_dataset(name: str, config: str | None, split: str, cache_dir: str | os.PathLike | None) -> Any:
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


def undecoded_images(dataset: Any, column: str, place: str) -> Any:
    """The data set with nothing but its images, undecoded. One column only: reading a row decodes every column."""
    import datasets

    try:
        return dataset.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    except (TypeError, ValueError, NotImplementedError) as error:  # pyarrow's are among these
        raise DataError(
            f"--image_column {column!r} of {place} holds {dataset.features[column]}, not images."
        ) from error


def cells_of(dataset: Any, column: str) -> Iterator[Any]:
    """The cells of a column; None for each row where the data set has no such column."""
    if column not in dataset.column_names:
        yield from [None] * len(dataset)
        return
    for batch in dataset.select_columns([column]).iter(batch_size=ROWS_AT_ONCE):
        yield from batch[column]


def files_of_rows(images: Any, column: str) -> dict[int, tuple[int, int]]:
    """(size, mtime_ns) for the rows that hold no bytes but the path of a file, which may change under the data set."""
    import pyarrow.compute as compute

    files, start = {}, 0
    for batch in images.with_format("arrow").iter(batch_size=ROWS_AT_ONCE):
        cells = batch.column(column).combine_chunks()
        without = compute.is_null(compute.struct_field(cells, "bytes"))
        for index in np.flatnonzero(without.to_numpy(zero_copy_only=False)):
            path = compute.struct_field(cells, "path")[int(index)].as_py()
            with contextlib.suppress(OSError, TypeError, ValueError):
                status = os.stat(path)
                files[start + int(index)] = (status.st_size, status.st_mtime_ns)
        start += len(cells)
    return files
