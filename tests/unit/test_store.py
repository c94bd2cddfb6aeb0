"""The store: what is put is what is got, whoever writes, dies or damages files meanwhile; and the loop that fills it.

Tests of several processes fork this process, which has torch imported.
"""

import errno
import json
import logging
import multiprocessing
import os
import pickle
import random
import resource
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from tqdm import TMonitor

from lpl_finetuning import base_model, files
from lpl_finetuning.base_model import model_digest
from lpl_finetuning.data import encoding
from lpl_finetuning.data import store as store_module
from lpl_finetuning.data.encoding import encode_missing
from lpl_finetuning.data.store import DamagedShard, DataError, TensorStore, entry_bytes
from lpl_finetuning.files import check_free_space, digest
from tests.children import forked, printed_by

REPOSITORY = Path(__file__).resolve().parents[2]
FORK = multiprocessing.get_context("fork")


def entry(seed):
    values = torch.randn(2, 3, generator=torch.Generator().manual_seed(seed))
    return {
        "mean": values,
        "half": values.bfloat16().t(),
        "ids": torch.arange(seed, seed + 4),
        "scalar": torch.tensor(1.5 + seed),
    }


def same(one, two):
    return one.keys() == two.keys() and all(
        one[name].dtype == two[name].dtype and torch.equal(one[name], two[name]) for name in one
    )


def shards(folder):
    return sorted(folder.glob("shard-*.safetensors"))


def all_there(store, keys, entries=entry):
    return all(key in store and same(store.get(key), entries(int(key))) for key in keys)


# ---------------------------------------------------------------------------------------------------------------------
# Keys
# ---------------------------------------------------------------------------------------------------------------------


def test_importing_imports_neither_torch_nor_datasets():
    code = (
        "import json, sys\n"
        "from lpl_finetuning.data import encoding, store\n"
        "store = store.TensorStore('nowhere')\n"
        "print(json.dumps([len(store), store.verify(), list(sys.modules)]))"
    )
    length, bad, loaded = printed_by(code)
    assert length == bad == 0 and "lpl_finetuning.data.encoding" in loaded
    assert not {"torch", "datasets", "transformers"} & set(loaded)
    assert not (REPOSITORY / "nowhere").exists()


def test_digests():
    assert digest(a=1, b=[2.5, None]) == digest(b=[2.5, None], a=1) != digest(a=1, b=[2.5])
    assert len(digest()) == 64
    with pytest.raises(TypeError):
        digest(a=Path("x"))


def later(path):
    """Make a file's time another one: the clock may stand still between two writes."""
    times = path.stat()
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns + 10**9))


def model(folder):
    for name, data in {"vae/config.json": b"{}", "vae/w.safetensors": b"weights", "unet/w.safetensors": b"u"}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def test_fingerprints_tell_models_apart_and_copies_not(tmp_path):
    one, two = model(tmp_path / "one"), model(tmp_path / "two")
    assert model_digest(one, "vae") == model_digest(two, "vae") != model_digest(one, "unet") != model_digest(one)
    (two / "vae/README.md").write_text("does not count")
    (two / "unet/w.safetensors").write_bytes(b"v")
    later(two / "unet/w.safetensors")
    assert model_digest(one, "vae") == model_digest(two, "vae") and model_digest(one) != model_digest(two)
    (two / "vae/w.safetensors").write_bytes(b"Weights")
    later(two / "vae/w.safetensors")
    assert model_digest(one, "vae") != model_digest(two, "vae")
    assert model_digest(one / "vae/w.safetensors") != model_digest(two / "vae/w.safetensors")
    with pytest.raises(DataError, match="vea"):
        model_digest(one, "vea")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no weights"):
        model_digest(tmp_path / "empty")


def test_a_linked_cache_gives_the_fingerprint_of_a_copy_without_reading(tmp_path):
    plain, linked = model(tmp_path / "plain"), tmp_path / "cache/snapshots/main"
    blobs = tmp_path / "cache/blobs"
    blobs.mkdir(parents=True)
    (linked / "vae").mkdir(parents=True)
    weights = base_model._file_hash(plain / "vae/w.safetensors")
    (blobs / weights).write_bytes(b"not read, because its name says it all")
    (blobs / ("a" * 40)).write_bytes(b"{}")  # small files go by git's hash, which says nothing in sha256
    (linked / "vae/w.safetensors").symlink_to(blobs / weights)
    (linked / "vae/config.json").symlink_to(blobs / ("a" * 40))
    assert model_digest(linked, "vae") == model_digest(plain, "vae")


# ---------------------------------------------------------------------------------------------------------------------
# Put and get
# ---------------------------------------------------------------------------------------------------------------------


def test_a_store_gives_back_what_was_put(tmp_path):
    folder = tmp_path / "deep/store"
    store = TensorStore(folder)
    assert len(store) == 0 and "a" not in store and not folder.exists()
    view = torch.arange(12.0).reshape(3, 4)
    store.put({"a": entry(1), "with/slash": entry(2), "ü": entry(3)})
    store.put({"views": {"row": view[1], "column": view[:, 1], "wide": view[:1].expand(3, 4)}})
    before = [path.stat() for path in shards(folder)]
    store.put({"a": entry(1)})  # nothing new
    store.put({})
    assert [path.stat() for path in shards(folder)] == before and len(before) == 2
    for reader in (store, TensorStore(folder), pickle.loads(pickle.dumps(store))):
        assert len(reader) == 4 and "a" in reader and "b" not in reader
        assert reader.missing(iter(["x", "a", "b", "x", "ü", "b"])) == ["x", "b"]
        assert [same(reader.get(key), entry(n)) for n, key in enumerate(["a", "with/slash", "ü"], 1)] == [True] * 3
        assert torch.equal(reader.get("views")["column"], view[:, 1])
        assert torch.equal(reader.get("views")["wide"], view[:1].expand(3, 4))
        with pytest.raises(KeyError):
            reader.get("b")
    for bad in ({}, {"__keys": view}, {"z": view.to(torch.complex64)}):
        with pytest.raises(ValueError, match=r"entry needs|complex64"):
            store.put({"c": bad})


@pytest.mark.parametrize("shape", [(), (1,), (0, 4), (5,), (3, 2, 2)])
def test_every_dtype_and_shape_comes_back(tmp_path, shape):
    values = (torch.rand(7, *shape) * 50 - 25).double()
    dtypes = {name: getattr(torch, name) for name, _ in store_module._DTYPES.values()}
    rows = {str(n): {name: values[n].abs().to(dtype) for name, dtype in dtypes.items()} for n in range(7)}
    rows["0"]["float32"] = torch.full(shape, float("nan"))
    TensorStore(tmp_path).put(rows)
    store = TensorStore(tmp_path)
    for key, row in rows.items():
        found = store.get(key)
        assert found.keys() == row.keys()
        for name, tensor in row.items():
            assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
            assert torch.equal(found[name].nan_to_num(), tensor.nan_to_num())
            assert torch.equal(found[name].isnan(), tensor.isnan())
            assert found[name].untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    assert store.verify() == 0


def test_one_shard_for_each_schema_in_the_documented_format(tmp_path):
    store = TensorStore(tmp_path)
    entries = {str(n): entry(n) for n in range(20)}
    others = {f"other {n}": {"mean": torch.full((n % 2 + 1,), n)} for n in range(10)}
    store.put(entries | others)
    assert len(shards(tmp_path)) == 3 and len(store) == 30
    assert all(same(store.get(key), row) for key, row in (entries | others).items())
    for path in shards(tmp_path):
        columns = load_file(path)  # safetensors' own reader, and its checks
        names = columns.keys() - {"__keys", "__checksums"}
        num_rows = len(columns["__keys"])
        assert columns["__keys"].shape == (num_rows, 16) and columns["__checksums"].dtype == torch.int64
        assert columns["__checksums"].shape == (num_rows,)
        of_hash = {store_module._key_hash(key): row for key, row in (entries | others).items()}
        for index, key in enumerate(columns["__keys"].numpy()):
            assert same({name: columns[name][index] for name in names}, of_hash[key.tobytes()])
    header_bytes = [int.from_bytes(path.read_bytes()[:8], "little") for path in shards(tmp_path)]
    sizes = sum(map(entry_bytes, [*entries.values(), *others.values()]))
    assert sum(path.stat().st_size for path in shards(tmp_path)) == sizes + sum(header_bytes) + 8 * 3
    assert max(header_bytes) < 1000
    store.put({str(n): entry(n) for n in range(100, 600)})
    assert max(int.from_bytes(path.read_bytes()[:8], "little") for path in shards(tmp_path)) < 1000


def test_the_order_of_keys_and_names_does_not_change_the_file(tmp_path):
    keys = [str(n) for n in range(9)]
    TensorStore(tmp_path / "a").put({key: entry(int(key)) for key in keys})
    TensorStore(tmp_path / "b").put({key: dict(reversed(entry(int(key)).items())) for key in reversed(keys)})
    (one,), (two,) = shards(tmp_path / "a"), shards(tmp_path / "b")
    assert one.name == two.name and one.read_bytes() == two.read_bytes()


def test_got_tensors_own_their_memory(tmp_path):
    store = TensorStore(tmp_path)
    store.put({"1": entry(1)})
    store.get("1")["mean"].zero_()
    assert same(store.get("1"), entry(1))
    assert store.get("1")["ids"].untyped_storage().nbytes() == 32
    assert store._open and not pickle.loads(pickle.dumps(store))._open  # file descriptors mean nothing elsewhere


def test_a_store_takes_in_what_another_process_wrote(tmp_path):
    one, two = TensorStore(tmp_path), TensorStore(tmp_path)
    one.put({"1": entry(1)})
    assert "1" not in two
    two.refresh()
    assert all_there(two, ["1"])
    two.put({"1": entry(1), "2": entry(2)})
    one.refresh()
    assert all_there(one, ["1", "2"]) and len(one) == len(two) == 2
    three = TensorStore(tmp_path / "elsewhere")
    three.put({"1": entry(1), "2": entry(2), "3": entry(3)})
    os.replace(shards(three.folder)[0], tmp_path / "shard-elsewhere.safetensors")
    one.refresh()  # 1 and 2 are there twice now
    three.refresh()
    assert len(one) == 3 and all_there(one, "123") and len(three) == 0
    for path in shards(tmp_path):
        if path.name != "shard-elsewhere.safetensors":
            path.unlink()
    one.refresh()
    assert len(one) == 3 and all_there(one, "123")
    (tmp_path / "shard-elsewhere.safetensors").unlink()
    assert same(one.get("2"), entry(2))  # still open
    one._open.clear()
    with pytest.raises(DamagedShard, match="elsewhere"):
        one.get("2")
    assert len(one) == 0


def test_recent_entries_are_folded_in(tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "_RECENT_ENTRIES", 10)
    store = TensorStore(tmp_path)
    for start in range(0, 60, 4):
        store.put({str(n): entry(n) for n in range(start, start + 4)})
        assert len(store) == start + 4 and len(store._recent) <= 10
        assert store.missing(str(n) for n in range(start + 6)) == [str(start + 4), str(start + 5)]
    assert all_there(store, map(str, range(60)))
    store.refresh()
    assert len(store) == 60 and not store._recent and all_there(store, map(str, range(60)))


def test_few_shards_are_kept_open(tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "_OPEN_SHARDS", 2)
    store = TensorStore(tmp_path)
    for index in range(5):
        store.put({str(index): entry(index)})
    before = len(os.listdir("/proc/self/fd"))
    for index in [0, 1, 2, 3, 4, 0, 4, 2]:
        assert all_there(store, [str(index)])
        assert len(store._open) <= 2 and len(os.listdir("/proc/self/fd")) <= before + 2
    opened = []
    monkeypatch.setattr(store_module, "_OpenShard", lambda path: opened.append(path) or pytest.fail("was open"))
    assert all_there(store, "424")


def test_keys_that_share_their_first_half(tmp_path, monkeypatch):
    def colliding(key):  # 3 first halves, and those of neighbours differ in one bit
        return (int(key) % 3).to_bytes(8, "little") + real(key)[8:]

    real = store_module._key_hash
    monkeypatch.setattr(store_module, "_key_hash", colliding)
    store = TensorStore(tmp_path)
    for start in range(0, 60, 20):
        store.put({str(n): entry(n) for n in range(start, start + 20)})
    for reader in (store, TensorStore(tmp_path)):
        assert len(reader) == 60 and all_there(reader, map(str, range(60)))
        assert reader.missing(map(str, range(50, 70))) == [str(n) for n in range(60, 70)]
        assert "61" not in reader and "62" not in reader
    other = TensorStore(tmp_path / "other")
    other.put({str(n): entry(n) for n in range(60)})
    os.replace(shards(other.folder)[0], tmp_path / "shard-other.safetensors")
    store.refresh()  # everything is there twice
    assert len(store) == 60 and all_there(store, map(str, range(60)))


class Samples(torch.utils.data.Dataset):
    def __init__(self, store, keys):
        self.store, self.keys = store, keys

    def __len__(self):
        return len(self.keys)

    def __getitem__(self, index):
        return self.store.get(self.keys[index])["mean"]


@pytest.mark.parametrize("workers, context", [(2, "fork"), (1, "spawn")])
def test_workers_read_the_same(tmp_path, workers, context):
    store = TensorStore(tmp_path)
    store.put({str(n): entry(n) for n in range(10)})
    store.refresh()
    store.put({str(n): entry(n) for n in range(10, 20)})  # not in the sorted index yet
    keys = [str(n) for n in range(20)]
    samples = Samples(store, keys)
    assert torch.equal(samples[3], entry(3)["mean"])  # a shard is open in this process
    loader = DataLoader(samples, batch_size=None, num_workers=workers, multiprocessing_context=context)
    assert all(torch.equal(mean, entry(n)["mean"]) for n, mean in enumerate(loader))
    damage(shards(tmp_path)[0], -1)
    if context == "spawn":  # takes PyTorch 15 s to wind up after an error
        return
    with pytest.raises(DamagedShard, match=r"(?s)shard-.*resume_from_checkpoint latest"):
        list(loader)


def test_threads_may_read_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "_OPEN_SHARDS", 1)
    store, wrong = TensorStore(tmp_path), []
    for n in range(6):
        store.put({str(n): entry(n)})

    def read(start):
        for n in range(200):
            if not all_there(store, [str((start + n) % 6)]):
                wrong.append(n)

    threads = [threading.Thread(target=read, args=(start,)) for start in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not wrong and len(store) == 6


# ---------------------------------------------------------------------------------------------------------------------
# Several writers, killed writers, full disks
# ---------------------------------------------------------------------------------------------------------------------


def put_many(store, child, start):
    time.sleep(max(0, start - time.time()))
    for first in range(0, 200, 10):
        store.put({str(n): entry(n) for n in range(first, first + 10 + child % 2)})
    assert all_there(store, map(str, range(200)))


def test_processes_may_put_the_same_entries_at_once(tmp_path):
    store, start = TensorStore(tmp_path), time.time() + 0.3
    children = [FORK.Process(target=put_many, args=(store, child, start), daemon=True) for child in range(3)]
    [child.start() for child in children]
    [child.join(60) for child in children]
    assert [child.exitcode for child in children] == [0] * 3
    store = TensorStore(tmp_path)
    assert len(store) == 201 and all_there(store, map(str, range(201)))
    (tmp_path / "verified.jsonl").unlink()
    assert store.verify() == 0 and not list(tmp_path.glob(".tmp-*"))


def put_endlessly(store, rows, kill, begun):
    for start in range(0, 10**6, 200):
        store.put({f"{kill} {start + n}": {"x": rows[n] + kill} for n in range(200)})
        begun.send(None)


def test_a_writer_may_be_killed_at_any_moment(tmp_path):
    store, rows = TensorStore(tmp_path), torch.randn(200, 3000)
    for kill in range(25):
        begun, writing = FORK.Pipe(duplex=False)
        child = FORK.Process(target=put_endlessly, args=(store, rows, kill, writing), daemon=True)
        child.start()
        begun.recv()  # one shard is written
        time.sleep(random.uniform(0, 0.05))
        child.kill()
        child.join()
        store.refresh()
    assert len(store) == 200 * len(shards(tmp_path)) >= 200 * 25
    assert len(TensorStore(tmp_path)) == len(store)
    left = list(tmp_path.glob(".tmp-*"))
    assert left, "no put was interrupted"
    (tmp_path / "verified.jsonl").unlink(missing_ok=True)
    assert store.verify() == 0 and not list(tmp_path.glob("*.damaged"))
    assert sorted(tmp_path.glob(".tmp-*")) == sorted(left)  # their writers may be alive
    os.utime(left[0], (0, time.time() - 25 * 3600))
    store.verify()
    assert not left[0].exists() and len(list(tmp_path.glob(".tmp-*"))) == len(left) - 1


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch, function):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    store = TensorStore(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, function, full)
        with pytest.raises(OSError, match="No space"):
            store.put({"1": entry(1), "other": {"x": torch.ones(2)}})
    assert list(tmp_path.iterdir()) == [] and "1" not in store and len(store) == 0
    store.put({"1": entry(1)})
    assert all_there(TensorStore(tmp_path), ["1"])


def test_everything_is_on_the_disk_before_its_name_is(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, real=real: calls.append(name) or real(*args))
    TensorStore(tmp_path).put({"1": entry(1)})
    assert calls == ["fsync", "replace", "fsync"]


def put_on_a_full_disk(folder):
    store = TensorStore(folder)
    store.put({"1": entry(1)})
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    with pytest.raises(OSError) as caught:
        store.put({"small": {"a": torch.ones(9)}, "large": {"x": torch.ones(50_000)}})
    assert caught.value.errno == errno.EFBIG and len(store) == 1 and "small" not in store
    store.put({"2": entry(2)})


def test_a_full_disk(tmp_path):
    forked(put_on_a_full_disk, tmp_path)
    assert len(shards(tmp_path)) == 2 and not list(tmp_path.glob(".tmp-*"))
    store = TensorStore(tmp_path)
    assert len(store) == 2 and all_there(store, "12")


# ---------------------------------------------------------------------------------------------------------------------
# Damage
# ---------------------------------------------------------------------------------------------------------------------


def damage(path, place, keep_time=False):
    """Flip one bit of the byte at a place."""
    times, data = path.stat(), bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    if keep_time:
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    else:
        later(path)


def offset(name):
    """Position of a tensor in a shard, from the header."""

    def position(data):
        end = 8 + int.from_bytes(data[:8], "little")
        return end + json.loads(data[8:end])[name]["data_offsets"][0]

    return position


def flipped(position, by=1):
    def flip(data):
        place = position(data) if callable(position) else position
        return data[:place] + bytes([data[place] ^ by]) + data[place + 1 :]

    return flip


def renamed(old, new):
    return lambda data: data.replace(old, new, 1)


BAD_FORM = {
    "shorter": lambda data: data[:-1],
    "longer": lambda data: data + b"x",
    "header cut": lambda data: data[:20],
    "empty": lambda data: b"",
    "seven bytes": lambda data: data[:7],
    "length": lambda data: b"\xff" * 8 + data[8:],
    "length by one": flipped(0),
    "length by a lot": flipped(4),
    "not JSON": lambda data: data[:8] + b"x" + data[9:],
    "not UTF-8": flipped(40, by=128),
    "other JSON": lambda data: (7).to_bytes(8, "little") + b"[1,2,3]",
    "no tensors": lambda data: (2).to_bytes(8, "little") + b"{}",
    "no shard": lambda data: (9).to_bytes(8, "little") + b'{"a/b":1}',
    "unknown dtype": renamed(b'"F32"', b'"F31"'),
    "no integer": renamed(b"[3,16]", b"[3.16]"),
    "other row count": renamed(b'"shape":[3]', b'"shape":[2]'),
}
BAD_ROWS = {  # in the first three the header is right in itself
    "other dtype": renamed(b'"F32"', b'"I32"'),
    "other shape": renamed(b"[3,2,3]", b"[3,3,2]"),
    "other name": renamed(b'"mean"', b'"meam"'),
    "key": flipped(offset("__keys")),
    "last key": lambda data: flipped(offset("__keys")(data) + 3 * 16 - 1)(data),
    "checksum": flipped(offset("__checksums")),
    "checksum's upper half": lambda data: flipped(offset("__checksums")(data) + 7)(data),
    "data": flipped(offset("mean")),
    "last byte": lambda data: flipped(len(data) - 1, by=128)(data),
    "two rows changed places": lambda data: swapped(data, offset("ids")(data), 32),
}


def swapped(data, start, length):
    one, two = data[start : start + length], data[start + length : start + 2 * length]
    return data[:start] + two + one + data[start + 2 * length :]


def damaged_store(folder, change):
    store = TensorStore(folder)
    store.put({str(n): entry(n) for n in range(3)})
    (path,) = shards(folder)
    store.put({"7": entry(7)})
    path.write_bytes(change(before := path.read_bytes()))
    later(path)
    assert path.read_bytes() != before
    return path


def made_again(folder, caplog):
    """What every test of damage ends with."""
    store, asked = TensorStore(folder), []
    work = [(str(n), n) for n in (0, 1, 2, 7)]
    assert encode_missing(store, work, lambda items: asked.extend(items) or list(map(entry, items)), 4, "") == 3
    assert asked == [0, 1, 2] and all_there(store, "0127")
    caplog.clear()
    again = TensorStore(folder)
    assert again.verify() == 0 and all_there(again, "0127") and not caplog.messages and len(again) == 4


@pytest.mark.parametrize("kind", BAD_FORM)
def test_a_shard_of_a_wrong_form_is_refused_at_once(tmp_path, kind, caplog):
    path = damaged_store(tmp_path, BAD_FORM[kind])
    store = TensorStore(tmp_path)
    assert len(store) == 1 and all_there(store, "7") and "0" not in store
    assert len(caplog.messages) == 1 and str(path) in caplog.messages[0]
    assert not path.exists() and path.with_name(path.name + ".damaged").exists()
    made_again(tmp_path, caplog)


def test_a_header_of_fractions_is_refused():
    schema = (("fractions", "F32", (2,)),)
    with pytest.raises(store_module._Damage, match="no integer"):
        store_module._parse_header(store_module._layout.__wrapped__(schema, 5.0).header[8:])
    assert b"5.0" not in store_module._layout(schema, 5).header  # 5 == 5.0, also to a cache


@pytest.mark.parametrize("kind", BAD_FORM | BAD_ROWS)
def test_verify_sets_a_damaged_shard_aside(tmp_path, kind, caplog):
    before = TensorStore(tmp_path)
    path = damaged_store(tmp_path, (BAD_FORM | BAD_ROWS)[kind])
    before.folder = tmp_path / "none"
    after = TensorStore(tmp_path) if kind in BAD_ROWS else None
    if after is None:  # opened while the shard was sound
        data = path.read_bytes()
        path.unlink()
        TensorStore(tmp_path).put({str(n): entry(n) for n in range(3)})
        after = TensorStore(tmp_path)
        path.write_bytes(data)
        later(path)
    assert not caplog.messages and len(after) == 4
    assert after.verify() == 1
    assert len(caplog.messages) == 1 and str(path) in caplog.messages[0]
    assert len(after) == 1 and all_there(after, "7") and path.with_name(path.name + ".damaged").exists()
    assert after.verify() == 0
    made_again(tmp_path, caplog)


@pytest.mark.parametrize("is_open", [True, False])
@pytest.mark.parametrize("kind", ["key", "checksum", "data", "other name", "two rows changed places", "shorter"])
def test_get_notices_what_verify_would_pass_over(tmp_path, kind, is_open, caplog):
    store = TensorStore(tmp_path)
    store.put({str(n): entry(n) for n in range(3)})
    (path,) = shards(tmp_path)
    store.put({"7": entry(7)})
    times, data = path.stat(), path.read_bytes()
    if is_open and kind != "other name":  # in an open shard the header has been read
        store.get("2")
    with open(path, "r+b") as file:  # the same file, not another of this name
        file.write((BAD_FORM | BAD_ROWS)[kind](data))
        file.truncate(file.tell())
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert kind == "shorter" or TensorStore(tmp_path).verify() == 0  # it is in verified.jsonl
    if is_open and kind == "checksum":
        assert all_there(store, "012")  # it has read the checksums already, and the rows are sound
        store = TensorStore(tmp_path)
    if kind == "key":  # which of the rows it is follows from the hashes
        assert all_there(store, "012")  # it knows the keys already
        store = TensorStore(tmp_path)
        assert min("012", key=store_module._key_hash) not in store
        (tmp_path / "verified.jsonl").unlink()
        assert store.verify() == 1
    else:
        with pytest.raises(DamagedShard, match=r"resume_from_checkpoint latest") as caught:
            for key in "012":
                store.get(key)
        assert str(path) in str(caught.value) and isinstance(caught.value, DataError)
        assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    assert not path.exists() and path.with_name(path.name + ".damaged").exists() and len(caplog.messages) == 1
    assert len(store) == 1 and all_there(store, "7")
    made_again(tmp_path, caplog)


def test_a_sound_file_in_the_place_of_an_open_damaged_one(tmp_path, caplog):
    store = TensorStore(tmp_path)
    store.put({str(n): entry(n) for n in range(3)})
    store.get("1")
    (path,) = shards(tmp_path)
    data = path.read_bytes()
    damage(path, -1)
    os.replace(path, tmp_path / "aside")
    path.write_bytes(data)
    assert all_there(store, "012") and not caplog.messages
    damaged = store_module._OpenShard(tmp_path / "aside")
    store._set_aside(path.name, store_module._Damage("bad"), damaged)  # another rank was quicker
    assert path.exists() and len(store) == 0
    store.refresh()
    assert all_there(store, "012")


def reads(monkeypatch):
    read = []
    real = store_module._OpenShard.check
    monkeypatch.setattr(store_module._OpenShard, "check", lambda shard: read.append(shard) or real(shard))
    return read


def test_a_warm_start_reads_nothing(tmp_path, monkeypatch):
    read = reads(monkeypatch)
    store = TensorStore(tmp_path)
    for n in range(6):
        store.put({str(n): entry(n)})
    assert store.verify() == 0 and TensorStore(tmp_path).verify() == 0 and not read
    record = tmp_path / "verified.jsonl"
    record.write_bytes(record.read_bytes()[:-30] + b"\0\0\xff")  # a crash: the last line is lost, the rest is not
    assert TensorStore(tmp_path).verify() == 0 and len(read) == 1
    assert TensorStore(tmp_path).verify() == 0 and len(read) == 1
    os.utime(shards(tmp_path)[2], (0, 0))
    assert TensorStore(tmp_path).verify() == 0 and len(read) == 2
    record.write_text('\n7\n["x"]\nnull\n[[], 1, 2]\n{}\n')
    assert TensorStore(tmp_path).verify() == 0 and len(read) == 8
    assert TensorStore(tmp_path).verify() == 0 and len(read) == 8


def test_ranks_share_the_verification(tmp_path, monkeypatch, caplog):
    writer = TensorStore(tmp_path)
    for n in range(30):
        writer.put({str(n): entry(n)})
    (tmp_path / "verified.jsonl").unlink()
    for path in shards(tmp_path)[4:7]:
        damage(path, -3)
    read = reads(monkeypatch)
    ranks = [TensorStore(tmp_path) for _ in range(3)]
    num_damaged = 0
    for rank, store in enumerate(ranks):
        num_damaged += store.verify(rank, 3)
        (tmp_path / "verified.jsonl").unlink()  # they would do it at the same time
    assert num_damaged == 3
    assert len(read) == 30 and len(caplog.messages) == 3 and len(list(tmp_path.glob("*.damaged"))) == 3
    for store in ranks:
        store.refresh()
        assert len(store) == 27
    assert [store.verify(rank, 3) for rank, store in enumerate(ranks)] == [0, 0, 0] and len(read) == 30


@pytest.mark.parametrize("kind", ["shorter", "data"])
def test_a_read_only_cache(tmp_path, monkeypatch, kind, caplog):
    path = damaged_store(tmp_path, BAD_FORM[kind] if kind in BAD_FORM else BAD_ROWS[kind])
    (tmp_path / "verified.jsonl").unlink()
    (tmp_path / ".tmp-old").write_bytes(b"")
    os.utime(tmp_path / ".tmp-old", (0, 0))

    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    real = os.open
    with monkeypatch.context() as patch:  # permissions do not bind root
        for name in ("replace", "unlink", "rename", "write"):
            patch.setattr(os, name, refuse)
        patch.setattr(os, "open", lambda path, flags, *rest: (refuse if flags & os.O_WRONLY else real)(path, flags))
        store = TensorStore(tmp_path)
        if kind == "data":
            assert TensorStore(tmp_path).verify() == 1
            with pytest.raises(DamagedShard, match="--cache_dir"):
                [store.get(key) for key in "012"]
        for _ in range(2):
            store.refresh()
            assert store.verify() == 0 and len(store) == 1 and all_there(store, "7")
        assert path.exists() and len(caplog.messages) == (2 if kind == "data" else 1)
        with pytest.raises(PermissionError):
            store.put({"8": {"x": torch.ones(2)}})
    if kind == "shorter":
        store.put(
            {str(n): entry(n) for n in range(3)}
        )  # it can be written again: the sound shard replaces the bad one
        assert all_there(store, "0127") and TensorStore(tmp_path).verify() == 0
        store.refresh()
        assert len(store) == 4


def test_verifying_shows_its_progress_when_it_takes_long(tmp_path, monkeypatch, capsys):
    store = TensorStore(tmp_path)
    for n in range(3):
        store.put({str(n): entry(n)})
    for pause, shown in [(0, False), (0.45, True)]:
        store = TensorStore(tmp_path)
        (tmp_path / "verified.jsonl").unlink()
        monkeypatch.setattr(store_module._OpenShard, "check", lambda shard, pause=pause: time.sleep(pause))
        store.verify()
        assert ("verifying" in capsys.readouterr().err) == shown


# ---------------------------------------------------------------------------------------------------------------------
# Encoding
# ---------------------------------------------------------------------------------------------------------------------


def encode(items):
    return [{"x": torch.tensor(float(item))} for item in items]


def work(*numbers):
    return [(str(n), n) for n in numbers]


def encoded(folder):
    store = TensorStore(folder)
    return sorted(n for n in range(1000) if str(n) in store and store.get(str(n))["x"] == n)


def test_each_missing_key_is_encoded_once(tmp_path, capsys):
    batches = []
    store = TensorStore(tmp_path)
    store.put({"3": {"x": torch.tensor(3.0)}})
    keys_and_items = work(0, 1, 2, 3, 4, 1, 0)
    assert encode_missing(store, iter(keys_and_items), lambda b: batches.append(b) or encode(b), 3, "encoding it") == 4
    assert batches == [[0, 1, 2], [4]] and encoded(tmp_path) == [0, 1, 2, 3, 4]
    assert "encoding it" in (shown := capsys.readouterr().err) and "4/4" in shown

    def never(items):
        raise AssertionError("nothing is missing")

    assert encode_missing(TensorStore(tmp_path), keys_and_items, never, 3, "encoding", prepare=never) == 0
    with pytest.raises(ValueError):
        encode_missing(store, work(8, 9), lambda items: encode(items)[:1], 2, "", show=False)
    assert "8" not in store and "9" not in store and capsys.readouterr().err == ""


def test_a_batch_is_of_one_group(tmp_path):
    batches = []
    numbers = [1, 10, 2, 11, 3, 12, 4, 13, 5, 20]
    options = {"group": lambda n: n // 10, "prepare": lambda n: n, "show": False}
    encode_missing(TensorStore(tmp_path), work(*numbers), lambda b: batches.append(b) or encode(b), 2, "", **options)
    assert batches == [[1, 2], [3, 4], [5], [10, 11], [12, 13], [20]] and encoded(tmp_path) == sorted(numbers)


@pytest.mark.parametrize("count", [1, 2, 47])
def test_ranks_share_the_work(tmp_path, count):
    ranks = [TensorStore(tmp_path) for _ in range(3)]
    done = []
    for rank, store in enumerate(ranks):
        mine = []
        args = (lambda b, mine=mine: mine.extend(b) or encode(b), 4, "", None, lambda n: n % 2, rank, 3, False)
        assert encode_missing(store, work(*range(count)), *args) == len(mine)
        done.append(mine)
    assert sorted(n for mine in done for n in mine) == list(range(count)) == encoded(tmp_path)
    assert count < 10 or min(map(len, done)) >= 12
    ranks[0].refresh()
    assert len(ranks[0]) == count


def running():
    """The threads, but for tqdm's own, which the first progress bar of a process starts."""
    return {thread for thread in threading.enumerate() if not isinstance(thread, TMonitor)}


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
@pytest.mark.parametrize("where", ["encode", "prepare"])
def test_little_is_lost_when_encoding_ends_early(tmp_path, monkeypatch, where, error):
    monkeypatch.setattr(encoding, "SHARD_ENTRIES", 4)

    def fails(place):
        def function(items):
            if place == where and 13 in (items if isinstance(items, list) else [items]):
                raise error("thirteen")
            return encode(items) if place == "encode" else items

        return function

    store, threads = TensorStore(tmp_path), running()
    with pytest.raises(error, match="thirteen"):
        encode_missing(store, work(*range(40)), fails("encode"), 2, "", fails("prepare"), show=False)
    assert running() == threads
    assert encoded(tmp_path) == list(range(12)) and len(shards(tmp_path)) == 3
    with pytest.raises(error):
        encode_missing(store, work(*range(10, 14)), fails("encode"), 1, "", fails("prepare"), show=False)
    assert encoded(tmp_path) == list(range(13))
    asked = []
    assert encode_missing(TensorStore(tmp_path), work(*range(40)), lambda b: asked.extend(b) or encode(b), 2, "") == 27
    assert asked == list(range(13, 40)) and encoded(tmp_path) == list(range(40))


def test_shards_are_written_in_time(tmp_path, monkeypatch):
    store, seen = TensorStore(tmp_path), []

    def watching(items):
        seen.append(len(shards(tmp_path)))
        return encode(items)

    encode_missing(store, work(*range(600)), watching, 100, "", show=False)
    assert seen == [0, 0, 0, 1, 1, 1] and len(shards(tmp_path)) == 2
    monkeypatch.setattr(encoding, "SHARD_BYTES", 2 * 28)
    seen.clear()
    encode_missing(store, work(*range(600, 605)), watching, 1, "", show=False)
    assert seen == [2, 2, 3, 3, 4] and len(shards(tmp_path)) == 5


def test_the_first_error_is_told_when_the_disk_is_full_too(tmp_path, monkeypatch):
    def broken(items):
        monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
        if 2 in items:
            raise ZeroDivisionError
        return encode(items)

    with pytest.raises(ZeroDivisionError):
        encode_missing(TensorStore(tmp_path), work(0, 1, 2), broken, 1, "", show=False)
    with pytest.raises(OSError, match="full"):
        encode_missing(TensorStore(tmp_path), work(0, 1), broken, 1, "", show=False)


def test_preparing_overlaps_with_encoding_and_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    prepared, finished, ahead, pause = [], [0], [], [0.02]

    def prepare(item):
        prepared.append(item)
        time.sleep(pause[0])
        return [item]

    def slow_encode(items):
        time.sleep(0.04)
        ahead.append(len(prepared) - finished[0])
        finished[0] += len(items)
        return encode([item for (item,) in items])

    encode_missing(TensorStore(tmp_path), work(*range(48)), slow_encode, 4, "", prepare, show=False)
    assert 4 < max(ahead) <= 3 * 4 and encoded(tmp_path) == list(range(48))
    prepared.clear()
    ahead.clear()
    finished[0], pause[0] = 0, 0  # preparing is faster than encoding
    encode_missing(TensorStore(tmp_path / "b"), work(*range(48)), slow_encode, 4, "", prepare, show=False)
    assert max(ahead) == 3 * 4  # the batch at work and two more


def test_a_long_list_is_held_only_where_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "_KEYS_AT_ONCE", 100)
    store, alive, most = TensorStore(tmp_path), [0], [0]
    encode_missing(store, work(*range(1000)), encode, 100, "", show=False)

    class Item:
        def __init__(self):
            alive[0] += 1
            most[0] = max(alive + most)

        def __del__(self):
            alive[0] -= 1

    with_one_missing = ((str(n), Item()) for n in range(1001))
    assert encode_missing(store, with_one_missing, lambda items: encode([7]), 4, "", show=False) == 1
    assert most[0] <= 301


def test_too_little_room_is_told_before_anything_is_written(tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 3_000_000_000})
    asked = []
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: asked.append(path) or usage)
    check_free_space(tmp_path / "a/b", 2_900_000_000, "the cache")
    with pytest.raises(
        DataError, match=r"a/b: the cache of 9 images needs 2\.90 GB .*3\.00 GB.*--cache_dir"
    ) as caught:
        check_free_space(tmp_path / "a/b", 2_900_000_001, "the cache of 9 images")
    assert "0.10 GB" in str(caught.value) and asked == [tmp_path] * 2 and not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------------------------
# Size
# ---------------------------------------------------------------------------------------------------------------------


def quick_store(folder, count, row_bytes):
    """Write shards directly, as `put` would write them."""
    folder.mkdir()
    schema = (("x", "F32", (row_bytes // 4,)),)
    row = {"x": np.arange(row_bytes, dtype=np.uint8)}
    for start in range(0, count, 256):
        hashes = sorted(store_module._key_hash(str(n)) for n in range(start, min(start + 256, count)))
        path = folder / f"shard-{start:032x}.safetensors"
        store_module._write_shard(path, store_module._layout(schema, len(hashes)), [(h, row) for h in hashes])
    return TensorStore(folder)


def resident():
    """Memory of this process in MiB."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmRSS")) / 1024


def open_and_read(folder):
    """(entries, seconds to open, MiB of memory) of a store from which rows are read at random."""
    before, start = resident(), time.process_time()
    store = TensorStore(folder)
    seconds = time.process_time() - start
    for _ in range(20_000):
        store.get(str(random.randrange(len(store))))
    return len(store), seconds, resident() - before


def test_memory_is_flat_and_opening_quick(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)
    for count in (1000, 100_000):
        quick_store(tmp_path / str(count), count, 2048)
        found, seconds, grown = forked(open_and_read, tmp_path / str(count))
        assert found == count and seconds < 0.5 and grown < 60


def test_a_million_keys_are_looked_up_in_seconds(monkeypatch):
    rng = np.random.default_rng(0)
    index = store_module._empty_index().with_rows(bytearray(rng.bytes(16 * 10**6)), np.arange(10**6))
    assert len(index.first) == index.num_keys == 10**6
    assert sum(array.nbytes for array in (index.first, index.second, index.places)) == 24 * 10**6
    store = TensorStore("nowhere")
    store._index = index
    start = time.process_time()
    assert len(store.missing(str(n % 500_000) for n in range(10**6))) == 500_000
    assert time.process_time() - start < 8


def test_nothing_is_logged_or_shown_by_a_sound_store(tmp_path, caplog, capsys):
    caplog.set_level(logging.DEBUG)
    store = TensorStore(tmp_path)
    store.put({"1": entry(1)})
    store.refresh()
    store.get("1")
    TensorStore(tmp_path).verify()
    assert not caplog.messages and capsys.readouterr() == ("", "")
