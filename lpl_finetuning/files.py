"""Caches: a content-addressed store of small dictionaries of tensors on disk, and the loop that fills it.

Four parts:

1. keys: `digest` of values that JSON can hold, `fingerprint` of a model's files;
2. shards: one file holds many entries of one schema, with a checksum for each, and nothing in it is ever pickled;
3. `TensorStore`: a folder of shards, for 10 to 10 million entries;
4. `encode_missing`: encodes what a store does not have, on any number of ranks, while threads prepare what comes next.

Importing this file imports neither torch nor datasets. What needs torch imports it when called.

A shard `shard-<digest>.safetensors` is a safetensors file of N entries with the same names, dtypes and shapes. Their
rows are stacked: one tensor (N, ...) for each name, and before those

    __keys       uint8 (N, 16)  first 16 bytes of the sha256 of each key
    __checksums  int64 (N,)     CRC32 of the schema, then the 16 bytes of the key, then the row of each name, by name

so a header has a few hundred bytes however many rows there are. Rows are read by `pread` into memory of their own, not
through a memory map: it is as fast, no mapped pages add up, and a file that is cut short ends no process by SIGBUS.

Shapes: N rows of a shard, K keys, E entries of a store. Sizes are in bytes.
"""

import contextlib
import hashlib
import json
import os
import shutil
import sys
import uuid
from pathlib import Path
from typing import Any

from lpl_finetuning.errors import DataError

FREE_MARGIN = 100 * 10**6


# ---------------------------------------------------------------------------------------------------------------------
# 1. Keys
# ---------------------------------------------------------------------------------------------------------------------


def digest(**what: Any) -> str:
    """sha256, hex, of keyword arguments that JSON can hold; their order does not matter.

    Raises:
        TypeError: a value that JSON can't hold.
    """
    text = json.dumps(what, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def sync_to_disk(path: Path) -> None:
    """Flush a file, or the names in a folder, without which a rename may be lost in a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---------------------------------------------------------------------------------------------------------------------
# 4. Filling a store
# ---------------------------------------------------------------------------------------------------------------------


def check_free_space(folder: str | os.PathLike, needed_bytes: int, what: str) -> None:
    """Refuse to begin what would fill the disk; 100 MB are to stay free.

    Args:
        folder: where it will be written; it need not exist yet.
        what: names it in the message, such as "the cache of 1000 images".

    Raises:
        DataError: there is less room.
    """
    place = Path(folder).absolute()
    while not place.is_dir() and place != place.parent:
        place = place.parent
    free = shutil.disk_usage(place).free
    if needed_bytes + FREE_MARGIN > free:
        raise DataError(
            f"{folder}: {what} needs {_readable(needed_bytes)} and {_readable(FREE_MARGIN)} to spare, but "
            f"{_readable(free)} are free there.",
            "Make room, or name a folder on another disk with --cache_dir.",
        )


def _readable(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.0f} MB"


def write_whole(path: Path, data: bytes) -> None:
    """Write a small file so that it is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{uuid.uuid4().hex}")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def sha256_of(path):
    """Hex digest of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def free_name(output_dir, name):
    """The path `name`, or `name-2`, `name-3` and so on when that is taken."""
    path, number = Path(output_dir) / name, 1
    while path.exists():
        number += 1
        path = Path(output_dir) / f"{name}-{number}"
    return path


def cache_folder(cache_dir: str | os.PathLike | None = None) -> Path:
    """The folder that holds scans and encodings: `lpl` in --cache_dir, or in the user's cache without --cache_dir.

    The user's cache is $XDG_CACHE_HOME, or ~/.cache where that variable is unset or empty.
    """
    return Path(cache_dir or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lpl"


# ---------------------------------------------------------------------------------------------------------------------
# Files that a run can do without

TOLD = set()  # what has been warned of


@contextlib.contextmanager
def dispensable(what):
    """Inside, a file that can't be written (a full disk) is a warning: for a log or a picture no run has to end."""
    try:
        yield
    except OSError as error:
        if what not in TOLD:
            TOLD.add(what)
            print(f"\nwarning: {what} can't be written ({error}); training goes on", file=sys.stderr, flush=True)


def gigabytes(count):
    """1234567890 -> "1.23 GB"; small ones in MB."""
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def megabytes(count):
    """Bytes, for people."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
