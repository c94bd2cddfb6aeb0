"""Files and folders: written whole or not at all, digests, free space, the cache, bytes in words. No torch."""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import sys
import time
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


def is_new(folder: str | os.PathLike) -> bool:
    """Whether a folder is not there yet, or is there and empty."""
    folder = Path(folder)
    return not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))


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


LARGE = 16 * 10**6  # bytes from which a file's hash is kept: smaller files are hashed as fast
SETTLED = 2.0  # seconds after its last change from which a file's stamp tells the next change


def remembered_sha256(path: Path) -> str:
    """sha256 of a file's bytes, hex; for a large file kept in the user's cache until the file changes.

    The file is known again by path, size, inode and the times of its last changes. One process hashes it, and the
    others on the machine, such as the other ranks, wait for the result. Without a cache every process hashes.
    """
    if path.stat().st_size < LARGE:
        return sha256_of(path)
    name = os.path.abspath(path)
    place = cache_folder() / "hashes" / f"{digest(path=name)[:32]}.json"
    with alone(place.with_suffix(".lock")):
        stamp = _stamp(path)
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            kept = json.loads(place.read_text(encoding="utf-8"))
            if kept["path"] == name and kept["stamp"] == stamp:
                return kept["sha256"]
        found = sha256_of(path)
        status = path.stat()
        settled = time.time() - max(status.st_mtime, status.st_ctime) > SETTLED
        if settled and _stamp(path) == stamp:
            with contextlib.suppress(OSError):  # the cache can't be written
                write_whole(place, json.dumps({"path": name, "stamp": stamp, "sha256": found}).encode())
        return found


def _stamp(path: Path) -> list[int]:
    """What changes when a file's content does: size, inode and times of the last changes, in ns."""
    status = path.stat()
    return [status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns]


@contextlib.contextmanager
def alone(lock: Path):
    """Context manager: at most one process of the machine is inside; all are where the lock can't be written."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            lock.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(lock, "a"))
            fcntl.lockf(file, fcntl.LOCK_EX)
        yield


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
