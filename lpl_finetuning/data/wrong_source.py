"""Data that are given with the wrong flag: a data set as a folder of images, a folder of images as a data set.

The right flag is said before anything is read. Importing this file imports neither torch nor datasets.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from lpl_finetuning.data.formats import taken_extensions
from lpl_finetuning.data.rows import DATASET_EXTENSIONS, LISTING_NAMES
from lpl_finetuning.errors import DataError

_PACKED = (".zip", ".7z", ".rar", ".tgz", ".gz", ".bz2", ".xz", ".zst")
_MOST_LOOKED_AT = 10_000  # files of a folder, to find out whether it holds images


def refuse_no_folder(flag: str, folder: str) -> None:
    """Raise a DataError that says what to give instead, unless a folder of images can be there.

    Args:
        flag: the flag that named the folder, for messages.
        folder: its value.
    """
    if not os.path.exists(folder):
        raise DataError(f"{flag}: {folder} does not exist.")
    if os.path.isdir(folder):
        return
    advice, path = "Name the folder that holds the images.", Path(folder)
    above, suffix = os.path.dirname(folder) or ".", path.suffix.lower()
    if suffix in DATASET_EXTENSIONS and path.name not in LISTING_NAMES and flag == "--train_data_dir":
        advice = f"Is it part of a data set? Then give its folder: --dataset_name {above}"
    elif suffix in _PACKED:
        advice = "Unpack it, and name the folder that it makes."
    elif path.name in LISTING_NAMES or suffix in {*taken_extensions(), ".tar", ".csv", ".jsonl", ".txt"}:
        advice = f"Name the folder that holds it: {above}"
    raise DataError(f"{flag}: {folder} is not a folder.", advice)


def refuse_no_data_set(name: str) -> None:
    """Raise a DataError for a file, or for a folder of images without a listing, given as --dataset_name.

    `datasets` would make a data set of such a folder, without the captions beside the images. With a listing, it reads
    the captions there.
    """
    path, flag = Path(name), f"--dataset_name {name}"
    if path.is_file():
        above, suffix = os.path.dirname(name) or ".", path.suffix.lower()
        if suffix in DATASET_EXTENSIONS and path.name not in LISTING_NAMES:
            raise DataError(f"{flag} is a file.", f"Give the folder of the data set: --dataset_name {above}")
        raise DataError(f"{flag} is a file.", f"If images lie beside it, give their folder: --train_data_dir {above}")
    if path.is_dir() and _is_folder_of_images(path):
        raise DataError(f"{flag} is a folder of images and no data set.", f"Give --train_data_dir {name} instead.")


def _is_folder_of_images(folder: Path) -> bool:
    """Whether a folder holds images, and neither a listing nor parts of a data set."""
    images, looked_at, taken = False, 0, taken_extensions()
    for _, folders, files in os.walk(folder):
        folders[:] = sorted(each for each in folders if not each.startswith("."))
        for file in files:
            suffix = os.path.splitext(file)[1].lower()
            if file in LISTING_NAMES or suffix in DATASET_EXTENSIONS:
                return False
            images = images or (suffix in taken and not file.startswith("."))
        looked_at += len(files)
        if looked_at > _MOST_LOOKED_AT:
            break
    return images


@contextlib.contextmanager
def advise_on_columns(name: str, columns: Sequence[str]) -> Iterator[None]:
    """Context manager: a DataError about the columns of a local folder names the right flag, where that is clear.

    Args:
        name: `--dataset_name`.
        columns: of the data set that was made of it.
    """
    try:
        yield
    except DataError as error:
        if not Path(name).is_dir():
            raise
        if "file_name" in columns:
            advice = f"A table of file names is a listing: call it {LISTING_NAMES[1]} or {LISTING_NAMES[0]}, and give "
            advice += f"the folder with the images as --train_data_dir. {error.advice}"
        elif _holds_images_or_shards(Path(name)):
            advice = f"A folder of images or of WebDataset shards is given as --train_data_dir {name}. {error.advice}"
        else:
            raise
        raise DataError(error.problem, advice) from error


def _holds_images_or_shards(folder: Path) -> bool:
    taken = {*taken_extensions(), ".tar"}
    return any(os.path.splitext(file)[1].lower() in taken for _, _, files in os.walk(folder) for file in files)
