"""A content-addressed store of small dictionaries of tensors on disk.

Sections:

1. shards: files of many entries of one schema, with a checksum for each entry and without pickles;
2. the store: a folder of shards, for 10 to 10 million entries.

Importing this file imports neither torch nor datasets; functions that need torch import it when they are called.

A shard `shard-<digest>.safetensors` is a safetensors file of N entries with the same names, dtypes and shapes. Rows
are stacked: one tensor (N, ...) for each name, after two tensors

    __keys       uint8 (N, 16)  first 16 bytes of the sha256 of each key
    __checksums  int64 (N,)     CRC32 of the schema, then the 16 bytes of the key, then the row of each name, by name

So the header has a few hundred bytes for any number of rows. A row is read by `pread` into memory of its own instead
of through a memory map. That is as fast, no mapped pages add up, and a truncated file kills no process by SIGBUS.

Shapes: N rows of a shard, K keys, E entries of a store. Sizes are in bytes.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import logging
import os
import struct
import time
import uuid
import zlib
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lpl_finetuning.errors import DataError
from lpl_finetuning.files import digest, sync_to_disk

if TYPE_CHECKING:
    import torch


logger = logging.getLogger(__name__)

_DTYPES = {  # safetensors' names -> (torch's, bytes)
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}
_SAFETENSORS_NAMES = {f"torch.{torch_name}": name for name, (torch_name, _) in _DTYPES.items()}
_ROW_OVERHEAD = 16 + 8  # key and checksum
_FIRST_READ = 16384  # bytes; enough for the header and the keys of a shard of 256 entries
_MAX_HEADER = 16 * 2**20
_BLOCK_BYTES = 8 * 2**20  # bytes that `verify` reads at a time

_OPEN_SHARDS = 32  # file descriptors that stay open
_RECENT_ENTRIES = 4096  # entries of this process that need not be in the sorted index yet
_KEYS_AT_ONCE = 65536
_OLD_SECONDS = 24 * 3600  # a temporary file of this age belongs to no running process
_VERIFIED = "verified.jsonl"

Schema = tuple[tuple[str, str, tuple[int, ...]], ...]  # (name, safetensors' dtype, shape of a row), sorted by name
State = tuple[int, int]  # (size, mtime_ns) of a file


# ---------------------------------------------------------------------------------------------------------------------
# 1. Shards
# ---------------------------------------------------------------------------------------------------------------------


class DamagedShard(DataError):
    """An entry can't be read, because its shard is damaged."""


class _Damage(ValueError):
    """What is wrong with a shard; the message follows the name of the shard."""


@dataclass(frozen=True)
class _Layout:
    """The position of everything in a shard. The schema and N alone determine the layout and all of the header."""

    schema: Schema
    num_rows: int
    header: bytes  # with the 8 bytes of its length
    offsets: dict[str, int]  # first byte of each tensor, from the beginning of the file
    row_bytes: dict[str, int]  # bytes of a row of each tensor in the schema
    size: int  # of the whole file
    schema_checksum: int

    @property
    def file_order(self) -> list[str]:
        """The names of the schema in the order of the file."""
        return sorted(self.row_bytes, key=self.offsets.get)


@functools.lru_cache(maxsize=1024)
def _layout(schema: Schema, num_rows: int) -> _Layout:
    fields = [("__keys", "U8", (16,)), ("__checksums", "I64", ())]
    fields += sorted(schema, key=lambda field: (-_DTYPES[field[1]][1], field[0]))  # so that all are aligned
    header, starts, row_bytes, end = {"__metadata__": {"format": "pt", "lpl_store": "1"}}, {}, {}, 0
    for name, dtype, shape in fields:
        starts[name] = end
        row_bytes[name] = _DTYPES[dtype][1] * int(np.prod(shape, dtype=np.int64))
        end += num_rows * row_bytes[name]
        header[name] = {"dtype": dtype, "shape": [num_rows, *shape], "data_offsets": [starts[name], end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    begin = 8 + len(text)
    return _Layout(
        schema,
        num_rows,
        len(text).to_bytes(8, "little") + text,
        {name: begin + start for name, start in starts.items()},
        {name: row_bytes[name] for name, _, _ in schema},
        begin + end,
        zlib.crc32(json.dumps(schema).encode()),
    )


@functools.lru_cache(maxsize=1024)
def _parse_header(header: bytes) -> _Layout:
    """The layout that a header (without its length) describes.

    Raises:
        _Damage: `_layout` would write other bytes.
    """
    try:
        fields = json.loads(header)
        num_rows = fields["__keys"]["shape"][0]
        schema = [(name, f["dtype"], tuple(f["shape"][1:])) for name, f in fields.items() if name[:2] != "__"]
        if not all(type(size) is int for size in itertools.chain([num_rows], *(shape for *_, shape in schema))):
            raise ValueError("a size is no integer")
        layout = _layout(tuple(sorted(schema)), num_rows)
    except (AttributeError, KeyError, IndexError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise _Damage(f"its header is not that of a shard ({error!r})") from error
    if layout.header[8:] != header or num_rows < 1 or not schema:
        raise _Damage("its header is not that of a shard")
    return layout


def entry_bytes(tensors: dict[str, "torch.Tensor"]) -> int:
    """Bytes of an entry on disk, without the header (some hundred bytes for a whole shard)."""
    return _ROW_OVERHEAD + sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _key_hash(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()[:16]


def _schema(tensors: dict[str, "torch.Tensor"]) -> Schema:
    if not tensors or any(name.startswith("__") for name in tensors):
        raise ValueError("An entry needs at least one tensor, and names that do not begin with two underscores.")
    unknown = {str(tensor.dtype) for tensor in tensors.values()} - _SAFETENSORS_NAMES.keys()
    if unknown:
        raise ValueError(f"A store does not hold tensors of {', '.join(sorted(unknown))}.")
    names = sorted(tensors.items())
    return tuple((name, _SAFETENSORS_NAMES[str(tensor.dtype)], tuple(tensor.shape)) for name, tensor in names)


def _raw_bytes(tensor: "torch.Tensor") -> np.ndarray:
    """The bytes of a tensor, uint8 (bytes,): the tensor's memory if contiguous and on the CPU, else a copy."""
    import torch

    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def _write_shard(path: Path, layout: _Layout, entries: list[tuple[bytes, dict[str, np.ndarray]]]) -> State:
    """Write a shard and flush it to the disk.

    Args:
        path: of the file.
        layout: of the shard.
        entries: N of (16 bytes of the key, {name: uint8 (bytes of the row,)}).
    """
    checksums = []
    for key_hash, rows in entries:
        checksum = zlib.crc32(key_hash, layout.schema_checksum)
        for name, _, _ in layout.schema:
            checksum = zlib.crc32(rows[name], checksum)
        checksums.append(checksum)
    with open(path, "xb") as file:
        file.write(layout.header)
        file.write(b"".join(key_hash for key_hash, _ in entries))
        file.write(np.array(checksums, "<i8"))
        for name in layout.file_order:
            for _, rows in entries:
                file.write(rows[name])
        file.flush()
        os.fsync(file.fileno())
        return _state(os.fstat(file.fileno()))


def _state(status: os.stat_result) -> State:
    return status.st_size, status.st_mtime_ns


class _OpenShard:
    """A shard that is open for reading, with a correct header and length. Threads and forked processes may share it.

    Raises:
        _Damage: the header or the length is wrong.
        FileNotFoundError: there is no such shard.
    """

    def __init__(self, path: Path):
        self.descriptor = os.open(path, os.O_RDONLY)
        status = os.fstat(self.descriptor)
        self.state = _state(status)
        self.identity = (status.st_dev, status.st_ino)
        self.head = os.pread(self.descriptor, _FIRST_READ, 0)
        end = 8 + int.from_bytes(self.head[:8], "little")
        if len(self.head) < 8 or end > min(status.st_size, _MAX_HEADER):
            raise _Damage("it ends within its header")
        header = self.head[8:end] if end <= len(self.head) else os.pread(self.descriptor, end - 8, 8)
        self.layout = _parse_header(header)
        if self.layout.size != status.st_size:
            raise _Damage(f"it has {status.st_size} bytes where its header says {self.layout.size}")

    def __del__(self, close=os.close):  # after the last user: an open shard's descriptor is never reused
        if hasattr(self, "descriptor"):
            close(self.descriptor)

    def keys(self) -> bytes:
        """The first 16 bytes of the sha256 of each key, 16 N bytes."""
        start, length = self.layout.offsets["__keys"], 16 * self.layout.num_rows
        if start + length <= len(self.head):
            return self.head[start : start + length]
        return self._bytes(start, length).tobytes()

    @functools.cached_property
    def checksums(self) -> list[int]:
        """The checksums of all N rows, read once."""
        return self._bytes(self.layout.offsets["__checksums"], 8 * self.layout.num_rows).view("<i8").tolist()

    def entry(self, row: int, key_hash: bytes) -> dict[str, "torch.Tensor"]:
        """The tensors of a row, in memory of their own.

        Raises:
            _Damage: the row differs from what was written under this key.
        """
        import torch

        layout = self.layout
        if row >= layout.num_rows:
            raise _Damage(f"it has no row {row}")
        checksum, tensors = zlib.crc32(key_hash, layout.schema_checksum), {}
        for name, dtype, shape in layout.schema:
            raw = self._bytes(layout.offsets[name] + layout.row_bytes[name] * row, layout.row_bytes[name])
            checksum = zlib.crc32(raw, checksum)
            dtype = getattr(torch, _DTYPES[dtype][0])
            tensor = torch.from_numpy(raw).view(dtype) if raw.size else torch.empty(0, dtype=dtype)
            tensors[name] = tensor.reshape(shape)
        if checksum != self.checksums[row]:
            raise _Damage(f"the checksum of row {row} is wrong")
        return tensors

    def check(self) -> None:
        """Read all rows and compare the checksums.

        Raises:
            _Damage: a row differs from what was written.
        """
        layout, keys = self.layout, self.keys()
        checksums = [zlib.crc32(keys[at : at + 16], layout.schema_checksum) for at in range(0, len(keys), 16)]
        for name, _, _ in layout.schema:
            length = layout.row_bytes[name]
            step = max(1, _BLOCK_BYTES // max(1, length))
            for start in range(0, layout.num_rows, step):
                stop = min(start + step, layout.num_rows)
                block = memoryview(self._bytes(layout.offsets[name] + start * length, (stop - start) * length))
                for row in range(start, stop):
                    at = (row - start) * length
                    checksums[row] = zlib.crc32(block[at : at + length], checksums[row])
        expected = self._bytes(layout.offsets["__checksums"], 8 * layout.num_rows).view("<i8")
        wrong = np.flatnonzero(expected != np.array(checksums, np.int64))
        if wrong.size:
            raise _Damage(f"the checksum of row {wrong[0]} is wrong, and {wrong.size - 1} more")

    def _bytes(self, start: int, length: int) -> np.ndarray:
        """Bytes of the file, uint8 (length,)."""
        raw = np.empty(length, np.uint8)
        self._read(start, raw)
        return raw

    def _read(self, start: int, raw: np.ndarray) -> None:
        """Read bytes of the file into `raw`, uint8 (length,)."""
        if raw.size and os.preadv(self.descriptor, [raw], start) != raw.size:
            raise _Damage(f"it ends before byte {start + raw.size}")


# ---------------------------------------------------------------------------------------------------------------------
# 2. The store
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Index:
    """The place of each entry, 24 bytes per entry, sorted by both halves of the 16 bytes of a key. Immutable.

    An entry that two shards hold appears twice, in neighbouring rows.
    """

    first: np.ndarray  # bytes 0 to 7 of the key, little-endian, uint64 (E,)
    second: np.ndarray  # bytes 8 to 15 of the key, uint64 (E,)
    places: np.ndarray  # number of the shard * 2**32 + row, int64 (E,)
    num_keys: int = 0  # different keys

    @classmethod
    def sorted(cls, first: np.ndarray, second: np.ndarray, places: np.ndarray) -> "_Index":
        """An index from arrays in any order."""
        order = np.argsort(first, kind="stable")
        first = first[order]  # one by one, so that few copies are in memory at a time
        second = second[order]
        places = places[order]
        if not (first[1:] == first[:-1]).any():
            return cls(first, second, places, first.size)
        order = np.lexsort((second, first))  # for equal keys, and keys with the same first half
        first, second, places = first[order], second[order], places[order]
        changes = (first[1:] != first[:-1]) | (second[1:] != second[:-1])
        return cls(first, second, places, 1 + int(np.count_nonzero(changes)))

    def lookup(self, hashes: bytes) -> np.ndarray:
        """The place of each of K keys, int64 (K,); -1 for a missing key. hashes: 16 K bytes."""
        wanted = np.frombuffer(hashes, "<u8").reshape(-1, 2)
        at = np.searchsorted(self.first, wanted[:, 0])
        found = np.full(len(wanted), -1, np.int64)
        open_keys = np.arange(len(wanted))
        while open_keys.size:  # more than once only for keys that share the first half with other keys
            open_keys = open_keys[at[open_keys] < self.first.size]
            open_keys = open_keys[self.first[at[open_keys]] == wanted[open_keys, 0]]
            same = self.second[at[open_keys]] == wanted[open_keys, 1]
            found[open_keys[same]] = self.places[at[open_keys[same]]]
            open_keys = open_keys[~same]
            at[open_keys] += 1
        return found

    def place(self, key_hash: bytes) -> int:
        """The place of one key, or -1. Takes a seventh of the time of `lookup`, which suits many keys."""
        first, second = struct.unpack("<QQ", key_hash)
        at = int(self.first.searchsorted(np.uint64(first)))
        while at < self.first.size and self.first[at] == first:
            if self.second[at] == second:
                return int(self.places[at])
            at += 1
        return -1

    def with_rows(self, hashes: bytearray, places: np.ndarray) -> "_Index":
        """An index with K more entries. hashes: 16 K bytes; places: int64 (K,)."""
        added = np.frombuffer(hashes, "<u8").reshape(-1, 2)
        first, second = np.append(self.first, added[:, 0]), np.append(self.second, added[:, 1])
        return _Index.sorted(first, second, np.append(self.places, places))

    def without_shards(self, numbers: list[int]) -> "_Index":
        """An index without the entries of some shards."""
        kept = ~np.isin(self.places >> 32, numbers)
        return _Index.sorted(self.first[kept], self.second[kept], self.places[kept])


def _empty_index() -> _Index:
    return _Index(np.empty(0, np.uint64), np.empty(0, np.uint64), np.empty(0, np.int64))


class TensorStore:
    """A store of small dictionaries of tensors, in shards `shard-*.safetensors` in one folder.

    Keys are digests of what the content depends on (`files.digest`). So an entry never changes, and several processes
    may write the same entry. A shard is complete or does not exist. A damaged shard is set aside as `<name>.damaged`,
    and its entries are missing from then on. Forked and spawned DataLoader workers may use the store. A million
    entries take 24 MB of memory, also while they are read at random.
    """

    def __init__(self, folder: str | os.PathLike):
        """Open the store. The first `put` makes the folder. See `refresh`."""
        self.folder = Path(folder)
        self._index = _empty_index()
        self._recent: dict[bytes, int] = {}  # 16 bytes of a key -> place, of entries that are not in the index yet
        self._names: list[str] = []  # names of shards by number; a number is never used again
        self._numbers: dict[str, int] = {}  # numbers of the shards in use
        self._refused: dict[str, State] = {}  # damaged shards that could not be renamed
        self._num_refused = 0  # all damaged shards
        self._verified: dict[str, State] = {}  # shards that this process has verified
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()
        self.refresh()

    def __len__(self) -> int:
        return self._index.num_keys + len(self._recent)

    def __contains__(self, key: str) -> bool:
        return self._place(_key_hash(key)) >= 0

    def missing(self, keys: Iterable[str]) -> list[str]:
        """The keys that the store lacks, each once, in order."""
        return list(self.missing_items((key, None) for key in keys))

    def missing_items(self, keys_and_items: Iterable[tuple[str, Any]]) -> dict[str, Any]:
        """{key: item} of the keys that the store lacks, with the first item of each key.

        Few of the other items are in memory at a time.
        """
        missing: dict[str, Any] = {}
        pairs = iter(keys_and_items)
        while chunk := list(itertools.islice(pairs, _KEYS_AT_ONCE)):
            hashes = [_key_hash(key) for key, _ in chunk]
            places = self._index.lookup(b"".join(hashes)).tolist()
            for (key, item), key_hash, place in zip(chunk, hashes, places, strict=True):
                if place < 0 and key_hash not in self._recent:
                    missing.setdefault(key, item)
        return missing

    def refresh(self) -> None:
        """Add the shards that other processes have written since, and remove the shards that they have set aside.

        Of a new shard only the header and the keys are read; `verify` reads the rest. A shard with a damaged header
        or a wrong length is set aside with a warning.
        """
        present = self._shard_files()
        self._forget(self._numbers.keys() - present)
        hashes, new = bytearray(), []
        for name in sorted(present - self._numbers.keys()):
            with contextlib.suppress(FileNotFoundError):  # another rank has just set the shard aside
                if name in self._refused and self._refused[name] == self._state_of(name):
                    continue
                try:
                    keys = _OpenShard(self.folder / name).keys()
                except _Damage as damage:
                    self._set_aside(name, damage)
                    continue
                hashes += keys
                new.append((self._number(name), len(keys) // 16))
        places, end = np.empty(len(hashes) // 16, np.int64), 0
        for number, num_rows in new:
            places[end : end + num_rows] = np.arange(num_rows) + (number << 32)
            end += num_rows
        self._take_in(hashes, places)

    def get(self, key: str) -> dict[str, "torch.Tensor"]:
        """The tensors of an entry, on the CPU, with the dtypes of `put` and in memory of their own.

        Raises:
            KeyError: the key is not in the store.
            DamagedShard: the entry differs from what was put. The shard is set aside, and all its entries are missing.
        """
        key_hash = _key_hash(key)
        place = self._place(key_hash)
        if place < 0:
            raise KeyError(key)
        number, row = divmod(place, 2**32)
        with contextlib.suppress(_Damage, OSError):
            return self._shard(number).entry(row, key_hash)
        # Another process may have replaced the open file with a sound file of the same name: open it again.
        self._open.pop(number, None)
        name = self._names[number]
        try:
            return self._shard(number).entry(row, key_hash)
        except FileNotFoundError as error:
            self._forget([name])
            raise self._damaged(name, "another process has set it aside", True) from error
        except _Damage as damage:
            renamed = self._set_aside(name, damage, self._open.pop(number, None))
            raise self._damaged(name, damage, renamed) from damage

    def put(self, entries: dict[str, dict[str, "torch.Tensor"]]) -> None:
        """Write the new entries, one shard for each schema.

        The entries are complete on the disk when this method returns.

        Raises:
            ValueError: an entry has no tensors, a name that begins with "__", or an unknown dtype.
            OSError: the disk is full or can't be written; no files are left behind.
        """
        groups: dict[Schema, list[tuple[bytes, dict[str, np.ndarray]]]] = {}
        for key in self.missing(entries):
            schema = _schema(entries[key])
            rows = {name: _raw_bytes(tensor) for name, tensor in entries[key].items()}
            groups.setdefault(schema, []).append((_key_hash(key), rows))
        if not groups:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        written: list[tuple[Path, str, list[bytes], State]] = []
        temporary = None
        try:
            for schema, group in groups.items():
                group.sort(key=lambda entry: entry[0])
                hashes = [key_hash for key_hash, _ in group]
                # Keys and schema determine the name and the order of rows, so every process makes the same file.
                name = f"shard-{digest(keys=[h.hex() for h in hashes], schema=schema)[:32]}.safetensors"
                temporary = self.folder / f".tmp-{uuid.uuid4().hex}"
                written.append((temporary, name, hashes, (0, 0)))
                state = _write_shard(temporary, _layout(schema, len(group)), group)
                written[-1] = (temporary, name, hashes, state)
            for path, name, _, _ in written:
                os.replace(path, self.folder / name)
            sync_to_disk(self.folder)
        except BaseException:
            for path, *_ in written:
                path.unlink(missing_ok=True)
            raise
        for _, name, hashes, state in written:
            self._add(name, hashes, state)

    def verify(self, rank: int = 0, world_size: int = 1) -> int:
        """Check the checksums of all shards that were not checked in their present state; set damaged shards aside.

        `verified.jsonl` records size and time of each shard that was checked or written by `put`, so a warm start
        reads nothing. Each rank checks its share, which depends on the names of the shards. The caller puts a barrier
        and `refresh` after the call. Temporary files of killed processes are removed when they are a day old.

        Returns:
            The number of shards that this rank has set aside.
        """
        self._remove_old_temporaries()
        before = self._num_refused
        self.refresh()
        verified = self._read_verified()
        waiting = []
        for name in sorted(self._numbers):
            if zlib.crc32(name.encode()) % world_size == rank:
                with contextlib.suppress(FileNotFoundError):
                    state = self._state_of(name)
                    if state not in (self._verified.get(name), *verified.get(name, ())):
                        waiting.append((name, state[0]))
        if waiting:
            self._check_all(waiting, show=rank == 0)
        return self._num_refused - before

    def _check_all(self, names_and_sizes: list[tuple[str, int]], show: bool) -> None:
        from tqdm.auto import tqdm

        total = sum(size for _, size in names_and_sizes)
        options = {"unit": "B", "unit_scale": True, "delay": 1, "disable": not show}
        with tqdm(total=total, desc="verifying cached files", **options) as progress:
            for name, size in names_and_sizes:
                shard = None
                try:
                    shard = _OpenShard(self.folder / name)
                    shard.check()
                    self._note_verified(name, shard.state)
                except FileNotFoundError:  # another rank has just set the shard aside
                    self._forget([name])
                except _Damage as damage:
                    self._set_aside(name, damage, shard)
                progress.update(size)

    def _place(self, key_hash: bytes) -> int:
        place = self._recent.get(key_hash)
        return self._index.place(key_hash) if place is None else place

    def _shard_files(self) -> set[str]:
        try:
            with os.scandir(self.folder) as entries:
                return {e.name for e in entries if e.name.startswith("shard-") and e.name.endswith(".safetensors")}
        except FileNotFoundError:
            return set()

    def _state_of(self, name: str) -> State:
        return _state(os.stat(self.folder / name))

    def _number(self, name: str) -> int:
        """The number of a shard; a new number for a shard that is not in use."""
        if name not in self._numbers:
            self._numbers[name] = len(self._names)
            self._names.append(name)
        return self._numbers[name]

    def _shard(self, number: int) -> _OpenShard:
        """The open shard. The shards that were used last stay open."""
        shard = self._open.pop(number, None) or _OpenShard(self.folder / self._names[number])
        self._open[number] = shard
        while len(self._open) > _OPEN_SHARDS:
            self._open.popitem(last=False)
        return shard

    def _add(self, name: str, hashes: list[bytes], state: State) -> None:
        """Add a shard that this process has written."""
        self._refused.pop(name, None)
        self._note_verified(name, state)
        number = self._number(name)
        self._open.pop(number, None)
        self._recent |= {key_hash: (number << 32) + row for row, key_hash in enumerate(hashes)}
        if len(self._recent) > _RECENT_ENTRIES:
            self._take_in(bytearray(), np.empty(0, np.int64))

    def _take_in(self, hashes: bytearray, places: np.ndarray) -> None:
        """Put rows, and the recent entries of this process, into the index."""
        if self._recent:
            hashes += b"".join(self._recent)
            places = np.append(places, np.fromiter(self._recent.values(), np.int64, len(self._recent)))
        if hashes:
            self._index = self._index.with_rows(hashes, places)
            self._recent = {}

    def _forget(self, names: Iterable[str]) -> None:
        """Remove the entries of some shards."""
        numbers = [self._numbers.pop(name) for name in names if name in self._numbers]
        if numbers:
            self._index = self._index.without_shards(numbers)
            gone = set(numbers)
            self._recent = {h: place for h, place in self._recent.items() if place >> 32 not in gone}
            for number in numbers:
                self._open.pop(number, None)

    def _set_aside(self, name: str, damage: _Damage, shard: _OpenShard | None = None) -> bool:
        """Put a damaged shard out of use.

        Args:
            name: of the file.
            damage: what is wrong.
            shard: the open shard that is damaged; None for a shard that could not be opened.

        Returns:
            Whether the file could be renamed, or is gone.
        """
        path = self.folder / name
        logger.warning(f"{path}: a damaged cache file is set aside, its entries will be made again: {damage}.")
        self._forget([name])
        self._verified.pop(name, None)
        try:
            status = os.stat(path)
            if shard and shard.identity != (status.st_dev, status.st_ino):  # another rank has replaced the file
                return True
            self._refused[name] = _state(status)
            self._num_refused += 1
            os.replace(path, path.with_name(name + ".damaged"))
            del self._refused[name]
        except FileNotFoundError:  # another rank was first
            self._num_refused -= self._refused.pop(name, None) is not None
        except OSError:  # the cache is read-only
            return False
        return True

    def _damaged(self, name: str, reason: Any, renamed: bool) -> DamagedShard:
        advice = (
            "Start the run again (with --resume_from_checkpoint latest): it encodes the entries of this file anew."
            if renamed
            else "It could not be renamed. Remove it, or name a folder that can be written with --cache_dir, and "
            "start the run again (with --resume_from_checkpoint latest): it encodes the entries of this file anew."
        )
        return DamagedShard(f"{self.folder / name}: this cache file is damaged, {reason}.", advice)

    def _note_verified(self, name: str, state: State) -> None:
        """Append a line in one write, since other processes append too. A lost line means a shard is read twice."""
        self._verified[name] = state
        with contextlib.suppress(OSError):  # the cache is read-only
            descriptor = os.open(self.folder / _VERIFIED, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            try:
                os.write(descriptor, f"\n{json.dumps([name, *state])}".encode())
            finally:
                os.close(descriptor)

    def _read_verified(self) -> dict[str, list[State]]:
        """{name of a shard: states that were verified}. Lines that a crash has garbled are ignored."""
        verified: dict[str, list[State]] = {}
        with contextlib.suppress(OSError), open(self.folder / _VERIFIED, "rb") as file:
            for line in file:
                with contextlib.suppress(ValueError, TypeError):
                    name, size, mtime_ns = json.loads(line)
                    verified.setdefault(name, []).append((size, mtime_ns))
        return verified

    def _remove_old_temporaries(self) -> None:
        with contextlib.suppress(OSError), os.scandir(self.folder) as entries:
            for item in entries:
                with contextlib.suppress(OSError):
                    if item.name.startswith(".tmp-") and time.time() - item.stat().st_mtime > _OLD_SECONDS:
                        os.unlink(item.path)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_open": OrderedDict()}  # a spawned worker opens its own files
