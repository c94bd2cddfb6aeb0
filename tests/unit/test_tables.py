"""Tables of images: sequences that take no memory and never change; and the files that they and the facts are in."""

import hashlib
import multiprocessing
import os
import pickle
import shutil
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from lpl_finetuning.data import folders, tables
from lpl_finetuning.data.scan import scan_folder
from lpl_finetuning.data.tables import CaptionedImage, ImageTable, contents_of, hold_out, sizes_of
from lpl_finetuning.errors import DataError
from lpl_finetuning.files import cache_folder
from tests.picture_folders import REPOSITORY, captioned, captions, picture

pytestmark = pytest.mark.usefixtures("own_cache")


# ---------------------------------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def table(tmp_path):
    for index in range(5):
        size = (8 + index, 6)
        picture(tmp_path / f"set/{index}.png", size, (index, 0, 0), f"picture {index}")
    return scan_folder(tmp_path / "set").images


def test_a_table_is_a_sequence(table):
    images = list(table)
    assert len(table) == 5 and [table[index] for index in range(5)] == images == [table[np.int64(i)] for i in range(5)]
    assert table[-1] == images[4] and list(table[1:4:2]) == images[1:4:2] and list(table[:0]) == []
    for index in (5, -6):
        with pytest.raises(IndexError):
            table[index]
    view = table.select(np.array([3, 1, 1]))
    assert list(view) == [images[3], images[1], images[1]] and view[-1] == images[1] and len(view) == 3
    assert list(view.select(np.array([2, 0]))) == [images[1], images[3]] and images[2] in table
    for rows in ([5], [-1]):
        with pytest.raises(IndexError):
            table.select(np.array(rows))
    with pytest.raises(IndexError):
        view.select(np.array([3]))
    for other in (table, view, table[:0]):
        copy = list(other)
        assert other.sizes().tolist() == sizes_of(copy).tolist() and sizes_of(copy).dtype == other.sizes().dtype
        assert other.contents().tolist() == contents_of(copy).tolist() and other.contents().dtype == "S64"
        assert other.sizes().shape == sizes_of(copy).shape == (len(other), 2)
    assert view.sizes()[0].tolist() == [6, 11] and "3 images" in repr(view)


def test_a_table_is_named_by_its_rows_and_never_changes(tmp_path, table):
    before = table.path.read_bytes()
    (tmp_path / "set/0.txt").write_text("other")
    other = scan_folder(tmp_path / "set").images
    assert other.path != table.path and table.path.read_bytes() == before
    assert table[0].caption == "picture 0" and other[0].caption == "other"
    (tmp_path / "set/0.txt").write_text("picture 0")
    assert scan_folder(tmp_path / "set").images.path == table.path
    shutil.copytree(tmp_path / "set", tmp_path / "copy")
    copy = scan_folder(tmp_path / "copy").images
    assert copy.path == table.path and copy[0].file == tmp_path / "copy/0.png"
    with pytest.raises(sqlite3.OperationalError):
        table._execute("DELETE FROM images")


def test_more_rows_than_are_read_at_once(tmp_path, monkeypatch):
    folder = captioned(tmp_path / "set", 50)
    for module in (folders, tables):
        monkeypatch.setattr(module, "ROWS_AT_ONCE", 7)
    table = scan_folder(folder).images
    assert [image.caption for image in table] == [f"picture {index}" for index in range(50)]
    rows = np.random.default_rng(0).permutation(50)
    assert [image.caption for image in table.select(rows)] == [f"picture {index}" for index in rows]


def _caption_of(table, index, queue):
    queue.put((table[index].caption, table.select(np.array([index]))[0].content, os.getpid()))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_table_goes_to_workers(table, method):
    view = table.select(np.array([4, 3, 2]))
    assert view[0].caption == "picture 4"  # opens a connection that the worker must not use
    connection = view._connection
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    worker = context.Process(target=_caption_of, args=(view, 1, queue))
    worker.start()
    caption, content, pid = queue.get(timeout=30)
    worker.join()
    assert (caption, content) == ("picture 3", table[3].content) and pid != os.getpid()
    assert view._connection is connection and view[0].caption == "picture 4"


def test_each_process_has_a_connection_of_its_own(table):
    read, write = os.pipe()
    inherited = table._connection
    pid = os.fork()
    if not pid:
        table[0]
        os.write(write, b"own" if table._connection is not inherited else b"parent's")
        os._exit(0)
    os.waitpid(pid, 0)
    assert os.read(read, 20) == b"own"


MEMORY = """
import numpy as np
from lpl_finetuning.data import folders, tables
table = tables.ImageTable({path!r})
for row in np.random.default_rng(0).integers(0, len(table), 3000):
    table[row]
for image in table: pass
print(next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS")))
"""


def big_table(path, count):
    db = sqlite3.connect(path)
    db.execute(tables.TABLE_LAYOUT)
    rows = (
        (
            i,
            f"{i:07d}.png",
            "a caption of some length " * 8,
            f"{i:064x}",
            512,
            768,
            f"{i:07d}.png",
            0,
            None,
            0,
            "PNG",
            "",
            "",
            "",
        )
        for i in range(count)
    )
    db.executemany("INSERT INTO images VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", rows)
    db.execute("CREATE TABLE header (count INTEGER)")
    db.execute("INSERT INTO header VALUES (?)", (count,))
    db.commit()
    db.close()
    return path


def test_memory_does_not_grow_with_the_table(tmp_path):
    used = []
    for count in (1000, 100_000):
        code = MEMORY.format(path=str(big_table(tmp_path / f"{count}.sqlite", count)))
        result = subprocess.run(
            [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
        )
        used.append(int(result.stdout) / 1024)
    assert abs(used[1] - used[0]) < 30


def test_a_message_shows_odd_names():
    image = CaptionedImage("b\nc.png", ("a",), "0" * 64, (1, 1), Path("/nowhere/b\nc.png"))
    with pytest.raises(DataError, match=r"b\\nc\.png: can't be read"):
        image.read_bytes()


# ---------------------------------------------------------------------------------------------------------------------
# Held-out images
# ---------------------------------------------------------------------------------------------------------------------


def test_held_out_images_follow_from_their_content(tmp_path):
    folder = captioned(tmp_path / "set", 30)
    shutil.copy(folder / "0003.png", folder / "copy.png")
    (folder / "copy.txt").write_text("copy")
    table = scan_folder(folder).images
    for amount in (0.2, 6, 3.4):
        parts = hold_out(table, amount)
        lists = hold_out(list(table), amount)
        assert all(isinstance(part, ImageTable) for part in parts)
        assert [list(part) for part in parts] == list(lists) and sum(map(len, parts)) == 31
        assert not {image.content for image in parts[0]} & {image.content for image in parts[1]}
        assert len(parts[1]) in {0.2: (6, 7), 6: (6, 7), 3.4: (3, 4)}[amount]
        held_out = {image.content for image in parts[1]}
    (folder / "0000.png").unlink()
    fewer = {image.content for image in hold_out(scan_folder(folder).images, 3)[1]}
    assert len(held_out & fewer) >= 2
    # The rule, spelled out: it is what a seedless split means, and a changed rule would mix up the sides.
    ranks = sorted((hashlib.sha256(image.content.encode()).hexdigest(), image.name) for image in table)
    assert {image.name for image in hold_out(table, 1)[1]} == {name for rank, name in ranks if rank == ranks[0][0]}
    for amount in (0, 0.001, 31, 40):
        with pytest.raises(DataError, match="--validation_split"):
            hold_out(table, amount)


def test_holding_out_is_fast(tmp_path):
    table = ImageTable(big_table(tmp_path / "t.sqlite", 100_000))
    start = time.process_time()
    training, held_out = hold_out(table, 0.01)
    assert time.process_time() - start < 2 and len(held_out) == 1000 and len(training) == 99_000


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variable", [None, "", "/elsewhere"])
def test_the_cache_folder(tmp_path, monkeypatch, variable):
    """An empty variable counts as unset; the flag wins over the variable."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if variable is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", variable)
    assert cache_folder() == (Path(variable) if variable else tmp_path / ".cache") / "lpl"
    assert cache_folder("") == cache_folder() and cache_folder(tmp_path / "given") == tmp_path / "given/lpl"


@pytest.mark.parametrize("damage", ["not a file of SQLite", "a page", "cut"])
def test_a_damaged_memory_is_made_anew(tmp_path, own_cache, damage):
    folder = captioned(tmp_path / "set", 300)
    first = scan_folder(folder)
    (facts,) = own_cache.glob("files-*.sqlite")
    data = facts.read_bytes()
    broken = {"not a file of SQLite": b"x" * 5000, "a page": data[:4096] + b"\xff" * (len(data) - 4096)}
    facts.write_bytes(broken.get(damage, data[: len(data) // 2]))
    scan = scan_folder(folder)
    assert "was damaged" in scan.warnings[0] and captions(scan) == captions(first)
    assert scan_folder(folder).warnings == []


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: b"x" * 9000, lambda data: data[: len(data) // 2]])
def test_a_damaged_table_is_written_anew(tmp_path, damage):
    folder = captioned(tmp_path / "set", 200)
    table = scan_folder(folder).images
    data = table.path.read_bytes()
    table.path.write_bytes(damage(data))
    with pytest.raises(DataError, match="images-"):
        ImageTable(table.path)
    assert len(list(scan_folder(folder).images)) == 200
    table.path.unlink()
    with pytest.raises(DataError, match="images-"):
        ImageTable(table.path)


def test_a_table_without_its_last_rows_is_refused(tmp_path):
    with sqlite3.connect(big_table(tmp_path / "t.sqlite", 10)) as db:
        db.execute("DELETE FROM images WHERE row > 5")
    db.close()
    with pytest.raises(DataError, match="incomplete"):
        ImageTable(tmp_path / "t.sqlite")


def test_a_full_disk_is_told_of(tmp_path):
    folder = captioned(tmp_path / "set", 300)
    code = (
        "import resource\n"
        "from lpl_finetuning.data import scan\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))\n"
        f"try: scan.scan_folder({str(folder)!r}, show=False)\n"
        "except scan.DataError as error: print(error)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert "Is the disk full?" in result.stdout and "--cache_dir" in result.stdout and not result.stderr
    scan = scan_folder(folder)
    assert len(list(scan.images)) == 300 and scan.warnings == []


def test_a_cache_that_can_not_be_written(tmp_path, monkeypatch):
    folder = captioned(tmp_path / "set", 2)
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(tables.tempfile, "tempdir", str(tmp_path))
    scan = scan_folder(folder, cache_dir=tmp_path / "file")
    assert len(scan.images) == 2 and "can't be written" in scan.warnings[0] and "--cache_dir" in scan.warnings[0]
    assert scan.images.path.parent.parent == tmp_path


def test_nothing_but_what_is_meant_lies_in_the_cache(tmp_path, own_cache):
    scan_folder(captioned(tmp_path / "set", 2))
    names = sorted(path.name.split("-")[0] + path.suffix for path in own_cache.iterdir())
    assert [name for name in names if name != "files.lock"] == ["files.sqlite", "images.sqlite"]
    assert list(scan_folder(tmp_path / "set", cache_dir=tmp_path / "other").images)
    assert (tmp_path / "other/lpl/scans").is_dir()


def test_tables_that_nobody_has_opened_for_a_month_are_removed(tmp_path, own_cache):
    folder = captioned(tmp_path / "set", 2)
    first = scan_folder(folder).images
    (own_cache / ".tmp-killed").write_bytes(b"")
    (own_cache / "notes.txt").write_text("somebody's")
    for age, there in ((29, True), (31, False)):
        (folder / "0000.txt").write_text(f"other {age}")  # so that another table is made and used
        scan_folder(folder)
        for path in own_cache.iterdir():
            os.utime(path, (time.time() - age * 24 * 3600,) * 2)
        used = scan_folder(folder).images
        assert first.path.exists() is (own_cache / ".tmp-killed").exists() is there
    assert [*own_cache.glob("images-*")] == [used.path] and used.path.stat().st_mtime > time.time() - 60
    assert (own_cache / "notes.txt").exists() and [*own_cache.glob("files-*.sqlite")]
    assert [image.caption for image in first] == ["picture 0", "picture 1"]  # still open here


def test_a_table_is_in_use_when_it_is_opened(tmp_path, own_cache):
    table = scan_folder(captioned(tmp_path / "set", 2)).images
    os.utime(table.path, (1, 1))
    pickle.loads(pickle.dumps(table))[0]  # as a worker does it
    scan_folder(captioned(tmp_path / "other", 3))
    assert table.path.exists()
