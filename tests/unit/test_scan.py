"""The scan: bad images are refused together or left out, and what was learnt is not read again.

Kills are real kills of a real process.
"""

import hashlib
import os
import pickle
import re
import shutil
import signal
import sqlite3
import struct
import subprocess
import sys
import time
import zlib

import pytest

from lpl_finetuning.data import folders, packed, tables, walk
from lpl_finetuning.data import scan as scan_module
from lpl_finetuning.data.scan import scan_folder
from lpl_finetuning.errors import DataError
from tests.children import printed_by, start
from tests.picture_folders import (
    REPOSITORY,
    ROW,
    captioned,
    captions,
    image_bytes,
    lines,
    odd_name,
    picture,
    refusal,
    tar,
)

pytestmark = pytest.mark.usefixtures("own_cache")


# ---------------------------------------------------------------------------------------------------------------------
# Bad images
# ---------------------------------------------------------------------------------------------------------------------


def spoilt_set(folder, count=14):
    captioned(folder, 3)
    for index in range(count):
        (folder / f"bad{index:02d}.png").write_bytes(b"" if index else image_bytes()[:50])
        (folder / f"bad{index:02d}.txt").write_text("x")
    return folder


def test_bad_images_are_refused_together_or_left_out(tmp_path):
    folder = spoilt_set(tmp_path / "set")
    for _ in range(2):
        message = refusal(folder, flag="--validation_data_dir")
        assert message.startswith("--validation_data_dir: 14 images of 17")
        assert message.count(".png: ") == 10 and "and 4 more" in message and "--on_bad_image skip" in message
        assert "\n  bad01.png: the file is empty (0 bytes)\n" in message
    scan = scan_folder(folder, on_bad_image="skip")
    assert len(scan.images) == 3 and len(scan.bad) == scan.skipped == 14 and scan.bad[0][0] == "bad00.png"
    assert len(scan.warnings) == 1 and "14 images" in scan.warnings[0]
    for path in folder.glob("0*"):
        path.unlink()
    assert "none of the 14 images" in refusal(folder, on_bad_image="skip")
    with pytest.raises(DataError, match=r"--on_bad_image.*'drop'"):
        scan_folder(folder, on_bad_image="drop")


def test_the_advice_on_bad_images_is_given_once(tmp_path):
    """Every kind of reason, without an advice of its own."""
    folder = captioned(tmp_path / "set", 4)
    huge = b"\x89PNG\r\n\x1a\n"
    for kind, data in (
        (b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)),
        (b"IDAT", b""),
        (b"IEND", b""),
    ):
        huge += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    for name, data in (("0000", huge), ("0001", b""), ("0002", b"<html>"), ("0003", image_bytes()[:50])):
        (folder / f"{name}.png").write_bytes(data)
    for line in refusal(folder).splitlines()[1:-1]:
        assert not re.search(r"remove|smaller|Replace|\.$", line), line
    assert "60000 x 60000 px are 3600 megapixels; at most 179 are read\n" in refusal(folder)


def test_missing_and_odd_files_are_left_out_when_asked_to(tmp_path):
    lines(ROW, ROW | {"file_name": "b.png"})(tmp_path / "listed")
    scan = scan_folder(tmp_path / "listed", on_bad_image="skip")
    assert captions(scan) == [("a.png", "a")] and len(scan.missing) == scan.skipped == 1
    assert "metadata.jsonl:2" in scan.missing[0]
    assert "b.png" in scan.warnings[0]
    odd_name(b"b\xff")(tmp_path / "odd")
    scan = scan_folder(tmp_path / "odd", on_bad_image="skip")
    assert captions(scan) == [("a.png", "a")] and scan.bad[0][0] == "b\\udcff.png"
    lines(ROW | {"file_name": "b.png"})(tmp_path / "none")
    assert "the only image in" in refusal(tmp_path / "none", on_bad_image="skip")


def test_scanning_imports_nothing_slow(tmp_path):
    captioned(tmp_path / "set", 2)
    tar(tmp_path / "set/s.tar", ("a.png", image_bytes()), ("a.txt", b"a"))
    code = (
        "import json, sys\n"
        "from lpl_finetuning.data import report, samples, scan, tables\n"
        f"found = scan.scan_folder({str(tmp_path / 'set')!r})\n"
        "report.report_lines(report.build_report(found, [], samples.FramingRules(64))), found.images[0].read_bytes()\n"
        "tables.hold_out(found.images, 1)\n"
        "print(json.dumps(list(sys.modules)))\n"
    )
    loaded = printed_by(code)
    assert "tarfile" in loaded and not {"torch", "datasets", "pyarrow", "webdataset", "safetensors"} & set(loaded)


# ---------------------------------------------------------------------------------------------------------------------
# What is kept
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def looks(monkeypatch):
    """Counts what is read: images looked into, caption files, and shards listed."""
    seen = {"images": [], "texts": [], "shards": []}

    def count(module, name, kind, name_of):
        function = getattr(module, name)

        def counting(*args):
            seen[kind].append(name_of(*args))
            return function(*args)

        monkeypatch.setattr(module, name, counting)

    count(scan_module, "read_facts", "images", lambda request, item: item[0])
    count(folders, "read_caption_file", "texts", lambda path, size: os.path.basename(path))
    count(packed, "shard_images", "shards", lambda path, remarks: path.name)

    def taken():
        counts = {kind: sorted(found) for kind, found in seen.items() if found}
        for found in seen.values():
            found.clear()
        return counts

    return taken


def test_unchanged_files_are_not_read_again(tmp_path, looks):
    folder = captioned(tmp_path / "set", 2)
    shard = tar(folder / "s.tar", ("a.png", image_bytes()), ("a.txt", b"a"))
    first = scan_folder(folder)
    assert looks() == {
        "images": ["0000.png", "0001.png", "s.tar"], "texts": ["0000.txt", "0001.txt"], "shards": ["s.tar"],
    }  # fmt: skip
    texts = {"texts": ["0000.txt", "0001.txt"]}  # captions are small and read anew
    again = scan_folder(folder)
    assert looks() == texts and captions(again) == captions(first) and again.images.path == first.images.path
    for path, kind in ((folder / "0000.png", "images"), (folder / "0001.txt", "texts")):  # same size, other time
        data = path.read_bytes()
        path.write_bytes(data[:-1] + b"!")
        os.utime(path, ns=(5, 5))
        changed = scan_folder(folder)
        assert (
            looks() == texts | ({kind: [path.name]} if kind == "images" else {})
            and changed.images.path != first.images.path
        )
    assert changed.images[1].caption == "picture !"
    os.utime(shard, ns=(5, 5))
    scan_folder(folder)
    assert looks() == texts | {"images": ["s.tar"], "shards": ["s.tar"]}
    # The first table is still what it was, and says so when its file has changed.
    assert first.images[1].read_bytes() and first.images[1].caption == "picture 1"
    with pytest.raises(DataError, match=r"0000\.png: the file has changed"):
        first.images[0].read_bytes()
    (folder / "0000.png").unlink()
    with pytest.raises(DataError, match=r"0000\.png: can't be read"):
        first.images[0].read_bytes()
    shutil.move(folder, tmp_path / "moved")
    captioned(folder, 1)
    assert captions(scan_folder(folder)) == [("0000.png", "picture 0")]


def replaced(path, data, in_place=False):
    """Another content with the size and time of the old, as `cp -p`, `rsync -t` and reproducible archives leave it."""
    status = path.stat()
    assert len(data) == status.st_size
    if not in_place:
        path.unlink()
    with open(path, "r+b" if in_place else "wb") as file:
        file.write(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)


@pytest.mark.parametrize("in_place", [False, True])
def test_what_is_replaced_with_the_same_size_and_time_is_seen(tmp_path, looks, in_place):
    folder = captioned(tmp_path / "set", 2)
    other = image_bytes((1, 1, 1), kind="BMP")
    (folder / "0000.png").write_bytes(image_bytes((0, 0, 0), kind="BMP"))
    members = [
        ("a.png", image_bytes((0, 0, 0), kind="BMP")),
        ("a.txt", b"old"),
        ("b.png", image_bytes()),
        ("b.txt", b"b"),
    ]
    shard = tar(folder / "s.tar", *members)
    first = scan_folder(folder)
    looks()
    replaced(folder / "0000.png", other, in_place)
    second = scan_folder(folder)
    assert looks()["images"] == ["0000.png"]
    assert second.images[0].content == hashlib.sha256(other).hexdigest() != first.images[0].content
    assert [image.content for image in second.images][1:] == [image.content for image in first.images][1:]
    replaced(folder / "0001.txt", b"another 1", in_place)
    assert captions(scan_folder(folder))[1] == ("0001.png", "another 1")
    looks()
    packed_anew = tar(tmp_path / "new.tar", ("a.png", other), ("a.txt", b"new"), *members[2:])
    replaced(shard, packed_anew.read_bytes(), in_place)
    last = scan_folder(folder)
    assert captions(last)[2:] == [("s.tar/a.png", "new"), ("s.tar/b.png", "b")]
    assert last.images[2].read_bytes() == other and last.images[3].content == first.images[3].content
    assert [image.read_bytes() for image in last.images]
    looks()
    scan_folder(folder)
    assert "images" not in looks() and "shards" not in looks()


def test_only_changed_bytes_are_looked_into(tmp_path, looks, monkeypatch):
    """A copy, a restored backup or `chmod` changes inode or ctime: the bytes are hashed, and nothing is decoded."""
    folder = captioned(tmp_path / "set", 3)
    tar(folder / "s.tar", ("a.png", image_bytes()), ("a.txt", b"a"))
    first = scan_folder(folder)
    looks()
    shutil.copytree(folder, tmp_path / "copy")
    shutil.rmtree(folder)
    shutil.move(tmp_path / "copy", folder)
    os.chmod(folder / "0002.png", 0o600)
    with monkeypatch.context() as patch:
        patch.setattr(scan_module, "inspect", lambda data: pytest.fail("an image was decoded"))
        second = scan_folder(folder)
        assert looks()["images"] == ["0000.png", "0001.png", "0002.png", "s.tar"]
        assert second.images.path == first.images.path
        scan_folder(folder)
        assert "images" not in looks()


def test_a_change_that_only_reading_finds_heals_itself(tmp_path, monkeypatch):
    """Where a file system shows no change at all, the second start reads the new file."""
    folder = captioned(tmp_path / "set", 2)
    old, member, new = (image_bytes((grey, 0, 0), kind="BMP") for grey in (0, 1, 2))
    (folder / "0000.png").write_bytes(old)
    tar(folder / "s.tar", ("a.png", member), ("a.txt", b"old caption"))
    monkeypatch.setattr(walk, "stamp_of", lambda status: f"{status.st_size} 0 0 0")
    monkeypatch.setattr(scan_module, "is_same_content", lambda stamp, status: True)
    scan_folder(folder)
    (folder / "0000.png").write_bytes(new)
    packed_anew = (folder / "s.tar").read_bytes().replace(member, new).replace(b"old cap", b"new cap")
    (folder / "s.tar").write_bytes(packed_anew)
    for index in (0, 2):
        images = scan_folder(folder).images
        with pytest.raises(DataError, match=r"has changed since it was scanned\. Start again: the new file is read"):
            pickle.loads(pickle.dumps(images))[index].read_bytes()
    healed = scan_folder(folder).images
    assert [healed[index].read_bytes() for index in (0, 2)] == [new, new] and healed[2].caption == "new caption"


def test_every_option_goes_with_one_look(tmp_path, looks):
    folder = tmp_path / "set"
    picture(folder / "a.png", caption="b\na")
    tar(folder / "s.tar", ("a.png", image_bytes()), ("a.json", b'{"text": "t", "other": "o"}'))
    assert captions(scan_folder(folder)) == [("a.png", "b\na"), ("s.tar/a.png", "t")]
    looks()
    scan = scan_folder(folder, caption_per_line=True, caption_column="other")
    assert captions(scan) == [("a.png", "b", "a"), ("s.tar/a.png", "o")] and looks() == {"texts": ["a.txt"]}


def test_bad_images_are_not_read_again_but_unreadable_ones_are(tmp_path, looks, monkeypatch):
    folder = spoilt_set(tmp_path / "set", 1)
    refusal(folder)
    looks()
    refusal(folder)
    assert "images" not in looks()
    (folder / "bad00.png").write_bytes(image_bytes())
    assert len(scan_folder(folder).images) == 4 and looks()["images"] == ["bad00.png"]
    os.utime(folder / "bad00.png", ns=(1, 1))

    def fail(*args):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(scan_module, "open", fail, raising=False)
        assert "bad00.png: can't be read: Input/output error" in refusal(folder)
    assert len(scan_folder(folder).images) == 4


def test_a_file_that_changes_while_it_is_read_is_bad(tmp_path, monkeypatch):
    folder = captioned(tmp_path / "set", 2)
    read_facts = scan_module.read_facts

    def touch_before(request, item):
        if item[0] == "0001.png":
            os.utime(folder / item[0], ns=(1, 1))
        return read_facts(request, item)

    with monkeypatch.context() as patch:
        patch.setattr(scan_module, "read_facts", touch_before)
        assert "0001.png: the file changed while it was read" in refusal(folder)
    assert len(scan_folder(folder).images) == 2


def test_another_pillow_reads_everything_anew(tmp_path, looks, monkeypatch):
    folder = captioned(tmp_path / "set", 2)
    scan_folder(folder)
    looks()
    monkeypatch.setattr(tables, "FACTS_VERSION", 7)
    scan_folder(folder)
    assert looks() == {"images": ["0000.png", "0001.png"], "texts": ["0000.txt", "0001.txt"]}


def test_what_is_gone_is_forgotten(tmp_path, own_cache):
    folder = captioned(tmp_path / "set", 3)
    tar(folder / "s.tar", ("a.png", image_bytes()), ("a.txt", b"a"))
    scan_folder(folder)
    for name in ("0000.png", "0001.txt", "0001.png", "s.tar"):
        (folder / name).unlink()
    (folder / "0000.txt").unlink()
    scan_folder(folder)
    (facts,) = own_cache.glob("files-*.sqlite")
    db = sqlite3.connect(facts)
    counts = [db.execute(f"SELECT count(*) FROM {name}").fetchone()[0] for name in ("facts", "tars", "members")]
    assert counts == [1, 0, 0]


SLOW = """
import os, time
from lpl_finetuning.data import scan, tables
os.cpu_count = lambda: 2  # threads: as many images may be read and not yet kept when a kill comes
tables.COMMIT_SECONDS = 0.05
read_facts = scan.read_facts
def slow(request, item):
    with open({log!r}, "a") as file:
        file.write(item[0] + "\\n")
    time.sleep({pause})
    return read_facts(request, item)
scan.read_facts = slow
print(len(scan.scan_folder({folder!r}, show=False).images))
"""


def slow_scan(folder, log, pause):
    code = SLOW.format(folder=str(folder), log=str(log), pause=pause)
    return start([sys.executable, "-c", code], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)


def test_a_killed_scan_goes_on_where_it_stopped(tmp_path):
    folder, log = captioned(tmp_path / "set", 200), tmp_path / "log"
    process = slow_scan(folder, log, 0.02)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and (not log.exists() or len(log.read_text().splitlines()) < 80):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -9
    first = log.read_text().splitlines()
    log.unlink()
    process = slow_scan(folder, log, 0)
    assert process.communicate(timeout=30)[0] == "200\n" and process.returncode == 0
    second = log.read_text().splitlines()
    assert 80 <= len(first) < 200 and len(second) < 160
    assert set(first) | set(second) == {f"{index:04d}.png" for index in range(200)}


def test_of_two_processes_one_reads(tmp_path):
    folder = captioned(tmp_path / "set", 60)
    logs = [tmp_path / "one", tmp_path / "two"]
    processes = [slow_scan(folder, log, 0.03) for log in logs]
    assert [process.communicate(timeout=40)[0] for process in processes] == ["60\n"] * 2
    read = [line for log in logs if log.exists() for line in log.read_text().splitlines()]
    assert len(read) == len(set(read)) == 60
