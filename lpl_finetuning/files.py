"""Files and folders: written whole or not at all, digests, free space, the cache, bytes in words. No torch."""

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

FREE_MARGIN = 100 * 10**6  # bytes that the caches leave free


def digest(**what: Any) -> str:
    """sha256, hex, of keyword arguments that JSON can hold; their order does not matter.

    Raises:
        TypeError: a value that JSON can't hold.
    """
    text = json.dumps(what, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def sync_to_disk(path: Path) -> None:
    """Flush a file or a folder's names to the disk; without it a power cut may undo a rename."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_free_space(folder: str | os.PathLike, needed_bytes: int, what: str) -> None:
    """Refuse to write what would leave less than 100 MB free on the disk.

    Args:
        folder: where the files will be written; it need not exist yet.
        needed_bytes: size of the files.
        what: the files in the message, such as "the cache of 1000 images".

    Raises:
        DataError: there is less room.
    """
    place = Path(folder).absolute()
    while not place.is_dir() and place != place.parent:
        place = place.parent
    free = shutil.disk_usage(place).free
    if needed_bytes + FREE_MARGIN > free:
        raise DataError(
            f"{folder}: {what} needs {format_bytes(needed_bytes)} and {format_bytes(FREE_MARGIN)} to spare, but "
            f"{format_bytes(free)} are free there.",
            "Make room, or name a folder on another disk with --cache_dir.",
        )


def write_whole(path: Path, data: bytes) -> None:
    """Write a small file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{uuid.uuid4().hex}")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def file_mode() -> int:
    """The permission bits that the umask gives to a new file, such as 0o644."""
    mask = os.umask(0o077)  # the only way to read it everywhere; a file made meanwhile is too private, not too open
    os.umask(mask)
    return 0o666 & ~mask


def follow_umask(place: str | os.PathLike) -> None:
    """Give a file, or all files of a folder, the permissions that the umask gives to new files.

    safetensors writes every file with mode 0600, so that no other user, container or web UI could read it.
    """
    place, mode = Path(place), file_mode()
    for path in place.rglob("*") if place.is_dir() else [place]:
        if path.is_file() and not path.is_symlink() and path.stat().st_mode & 0o777 == 0o600 != mode:
            path.chmod(mode)


def sha256_of(path):
    """sha256 of a file's bytes, hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def free_name(output_dir, name):
    """The path `name` in a folder, or the first of `name-2`, `name-3`, … that does not exist."""
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

WARNED = set()  # names of files that have been warned of


@contextlib.contextmanager
def dispensable(what):
    """Context manager: an OSError inside is one warning, since no run has to end for a log or a picture."""
    try:
        yield
    except OSError as error:
        if what not in WARNED:
            WARNED.add(what)
            print(
                f"\nwarning: {what} can't be written ({error}); the run goes on without it",
                file=sys.stderr,
                flush=True,
            )


def format_bytes(count: float) -> str:
    """1234567890 -> "1.23 GB"; below 100 MB in MB with one decimal."""
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def row_of(line: str) -> dict[str, Any]:
    """The row in a line of a run's log; {} for a line that a kill or a full disk left unfinished."""
    try:
        row = json.loads(line)
    except ValueError:
        return {}
    return row if isinstance(row, dict) else {}
