"""Scanning: what is found and what is refused, with the place of every mistake; what is kept, and for whom.

Kills are real kills of a real process, broken files are really broken, and shards are written by webdataset itself.
The tables `HOSTILE`, `BROKEN` and `CAPTIONS` are promises: each row is a case and what must happen.
"""

import hashlib
import io
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import sqlite3
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import webdataset
from PIL import Image

import scan_utils
from scan_utils import (
    CaptionedImage,
    DataError,
    DatasetImage,
    ImageTable,
    build_report,
    contents_of,
    hold_out,
    report_lines,
    scan_dataset,
    scan_folder,
    sizes_of,
)

REPOSITORY = Path(scan_utils.__file__).parent


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Each test has a cache of its own, outside its data."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/lpl/scans"


def image_bytes(color=(10, 200, 30), size=(8, 6), kind="PNG", **options):
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, kind, **options)
    return buffer.getvalue()


def picture(path, size=(8, 6), color=(10, 200, 30), caption=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(image_bytes(color, size, "JPEG" if path.suffix.lower() == ".jpg" else "PNG"))
    if caption is not None:
        path.with_suffix(".txt").write_text(caption)
    return path


def captioned(folder, count, **options):
    for index in range(count):
        picture(
            folder / f"{index:04d}.png", color=(index % 256, index // 256, 7), caption=f"picture {index}", **options
        )
    return folder


def listing(folder, *rows, name="metadata.jsonl"):
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")


def captions(scan):
    return [(image.name, *image.captions) for image in scan.images]


def tar(path, *members, mode="w"):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as file:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


def refusal(*args, **options):
    with pytest.raises(DataError) as caught:
        scan_folder(*args, show=False, **options)
    return str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------
# Captions
# ---------------------------------------------------------------------------------------------------------------------


def test_the_sources_of_captions_agree(tmp_path):
    pairs = [("a.png", "eine Katze 🐈, rot"), ("deep/b.JPG", "line\u2028separator"), ("deep/c.png", 'she said "c"')]
    folders = ("json", "csv", "parquet", "txt", "caption", "CAPTION", "nested")
    for folder in folders:
        for name, _ in pairs:
            picture(tmp_path / folder / name)
    listing(tmp_path / "json", *[{"file_name": name, "text": text} for name, text in reversed(pairs)])
    rows = ['{},"{}"'.format(name, text.replace('"', '""')) for name, text in pairs]
    listing(tmp_path / "csv", "file_name,text", *rows, name="metadata.csv")
    columns = {"image": [name for name, _ in pairs], "text": [text for _, text in pairs], "other": [1, 2, 3]}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "parquet/metadata.parquet")
    for suffix in ("txt", "caption", "CAPTION"):
        for name, text in pairs:
            (tmp_path / suffix / name).with_suffix("." + suffix).write_text(text + "\n", encoding="utf-8")
    listing(tmp_path / "nested", {"file_name": "a.png", "text": pairs[0][1]})
    listing(tmp_path / "nested/deep", *[{"file_name": name[5:], "text": text} for name, text in pairs[1:]])
    for folder in folders:
        scan = scan_folder(tmp_path / folder)
        assert captions(scan) == pairs and scan.warnings == [], folder
        assert [image.file for image in scan.images] == [tmp_path / folder / name for name, _ in pairs]
        assert [image.read_bytes() for image in scan.images] == [image.file.read_bytes() for image in scan.images]


def test_columns_byte_order_mark_and_remarks(tmp_path):
    for name in "abc":
        picture(tmp_path / f"set/{name}.png")
    picture(tmp_path / "set/.hidden.png")
    text = '{"image": "a.png", "title": "A"}\r\n\r\n{"file_name": "./b.png", "title": " B "}\n'
    text += '{"image": "b.png", "title": "B2"}'
    (tmp_path / "set/metadata.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode())
    scan = scan_folder(os.path.relpath(tmp_path / "set"), caption_column="title")
    assert captions(scan) == [("a.png", "A"), ("b.png", "B"), ("b.png", "B2")]
    assert len(scan.warnings) == 2 and "1 image in" in scan.warnings[0] and "c.png" in scan.warnings[0]
    assert "more than once: b.png" in scan.warnings[1] and scan.source == "metadata.jsonl"
    assert scan.unlisted == {"count": 1, "first": ["c.png"]} and scan.repeated == {"count": 1, "first": ["b.png"]}


def raw(data, suffix=".txt"):
    return lambda folder: picture(folder / "a.png").with_suffix(suffix).write_bytes(data)


def listed(*cells, **more):
    def make(folder):
        picture(folder / "a.png")
        listing(folder, *[{"file_name": "a.png", "text": cell} | more for cell in cells])

    return make


def in_shard(name, data):
    return lambda folder: tar(folder / "s.tar", ("a.png", image_bytes()), (name, data))


NO_DEFAULT, DEFAULT, FROM_FOLDER = {}, {"default_caption": "xyz"}, {"caption_from_folder": True}
PER_LINE = {"caption_per_line": True}
CAPTIONS = {  # case: (how it is made, options, the captions of the one image, or what the message must name)
    "text": (raw(b"a cat\n"), NO_DEFAULT, ["a cat"]),
    "byte order mark": (raw(b"\xef\xbb\xbfa"), NO_DEFAULT, ["a"]),
    "unicode": (raw("é 猫 🐈 \u202eابت".encode()), NO_DEFAULT, ["é 猫 🐈 \u202eابت"]),
    "one caption of two lines": (raw(b"a\nb"), NO_DEFAULT, ["a\nb"]),
    "per line": (raw(b"b\r\n\n  \na\n"), PER_LINE, ["b", "a"]),
    "per line, shard": (in_shard("a.txt", b"b\n\na"), PER_LINE, ["b", "a"]),
    "per line, empty": (raw(b"\n \n"), PER_LINE, "a.txt: the caption is empty"),
    "missing": (lambda f: picture(f / "a.png"), NO_DEFAULT, "1 of 1 images"),
    "missing, default": (lambda f: picture(f / "a.png"), DEFAULT, ["xyz"]),
    "missing, both": (lambda f: picture(f / "a.png"), DEFAULT | FROM_FOLDER, ["xyz"]),
    "missing, folder": (lambda f: picture(f / "red_fox/a.png"), FROM_FOLDER, ["red fox"]),
    "missing, top folder": (lambda f: picture(f / "a.png"), FROM_FOLDER, ["the set"]),
    "empty": (raw(b" \n"), NO_DEFAULT, "a.txt: the caption is empty"),
    "empty, default": (raw(b"\xef\xbb\xbf \n"), DEFAULT, ["xyz"]),
    "latin-1": (raw(b"gr\xfcn"), NO_DEFAULT, "a.txt: not UTF-8 (byte 2)"),
    "UTF-16": (raw("grün".encode("utf-16")), NO_DEFAULT, "a.txt: not UTF-8 (byte 0)"),
    "UTF-16 without a mark": (raw("abc".encode("utf-16-le")), NO_DEFAULT, "a.txt: byte 1 is zero"),
    "longest": (raw(b"x" * 100_000), NO_DEFAULT, ["x" * 100_000]),
    "too long": (raw(b"x" * 100_001), NO_DEFAULT, "a.txt: not a caption: 100001 characters"),
    "huge": (raw(b"x" * 500_000), DEFAULT, "a.txt: not a caption: 500000 bytes"),
    "list": (listed(["b", " a "]), NO_DEFAULT, ["b", "a"]),
    "list, one empty": (listed(["b", " "]), NO_DEFAULT, "metadata.jsonl:1: the caption 'text' is empty"),
    "list, one empty, default": (listed(["b", " "]), DEFAULT, ["b"]),
    "list, none": (listed([]), NO_DEFAULT, "metadata.jsonl:1: the caption 'text' is empty"),
    "list, none, default": (listed([]), DEFAULT, ["xyz"]),
    "list with a number": (listed(["b", 3]), DEFAULT, "metadata.jsonl:1: the caption 'text' must be text, not 3"),
    "listed empty, default": (listed(""), DEFAULT, ["xyz"]),
    "listed null, default": (listed(None), DEFAULT, ["xyz"]),
    "listed number, default": (listed(3), DEFAULT, "must be text, not 3"),
    "half a character": (listed("\ud83d"), NO_DEFAULT, "metadata.jsonl"),
    "zero byte": (listed("a\0b"), NO_DEFAULT, "metadata.jsonl:1: the caption 'text' holds a zero byte"),
    "listed too long": (listed("x" * 100_001), NO_DEFAULT, "metadata.jsonl:1: not a caption"),
    "shard": (in_shard("a.caption", b"c"), NO_DEFAULT, ["c"]),
    "shard, JSON": (in_shard("a.json", b'{"text": ["c", "d"]}'), NO_DEFAULT, ["c", "d"]),
    "shard, JSON, column": (in_shard("a.json", b'{"txet": "c"}'), NO_DEFAULT, "a.json: there is no column 'text'"),
    "shard, JSON, no column, default": (in_shard("a.json", b'{"txet": "c"}'), DEFAULT, ["xyz"]),
    "shard, JSON, broken": (in_shard("a.json", b"{"), NO_DEFAULT, "s.tar: a.json: not JSON"),
    "shard, missing": (in_shard("b.txt", b"c"), NO_DEFAULT, "1 of 1 images in the shards"),
    "shard, missing, default": (in_shard("a.cls", b"3"), DEFAULT, ["xyz"]),
    "shard, empty": (in_shard("a.txt", b" "), NO_DEFAULT, "s.tar: a.txt: the caption is empty"),
    "shard, latin-1": (in_shard("a.txt", b"gr\xfcn"), NO_DEFAULT, "s.tar: a.txt: not UTF-8 (byte 2)"),
    "shard, too long": (in_shard("a.txt", b"x" * 500_000), NO_DEFAULT, "s.tar: a.txt: not a caption"),
}


@pytest.mark.parametrize("case", CAPTIONS)
def test_captions(tmp_path, case):
    make, options, expected = CAPTIONS[case]
    folder = tmp_path / "the_set"
    folder.mkdir()
    if case == "half a character":
        picture(folder / "a.png")
        (folder / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "\\ud83d"}')
    else:
        make(folder)
    if isinstance(expected, str):
        message = refusal(folder, **options)
        assert expected in message and str(folder) in message
        return
    scan = scan_folder(folder, **options)
    assert [image.captions for image in scan.images] == [tuple(expected)] and scan.images[0].caption == expected[0]
    assert scan.defaulted == (expected in (["xyz"], ["red fox"], ["the set"]))


def test_the_first_caption_file_counts(tmp_path):
    picture(tmp_path / "set/a.png", caption="txt").with_suffix(".caption").write_text("caption")
    (tmp_path / "set/a.TXT").write_text("TXT")
    assert captions(scan_folder(tmp_path / "set")) == [("a.png", "TXT")]
    (tmp_path / "set/a.TXT").unlink()
    assert captions(scan_folder(tmp_path / "set")) == [("a.png", "txt")]
    (tmp_path / "set/a.txt").unlink()
    assert captions(scan_folder(tmp_path / "set")) == [("a.png", "caption")]


def test_not_utf8_in_listings_names_line_and_byte(tmp_path):
    picture(tmp_path / "set/a.png")
    for name, head in (
        ("metadata.jsonl", b'{"file_name": "a.png", "text": "a"}\n'),
        ("metadata.csv", b"file_name,text\n"),
    ):
        (tmp_path / f"set/{name}").write_bytes(head + b"a.png,\xfc\n")
        assert f"{name}:2: not UTF-8 (byte {len(head) + 6})" in refusal(tmp_path / "set")
        (tmp_path / f"set/{name}").unlink()


# ---------------------------------------------------------------------------------------------------------------------
# What is refused
# ---------------------------------------------------------------------------------------------------------------------

ROW = {"file_name": "a.png", "text": "a"}


def lines(*rows, name="metadata.jsonl"):
    return lambda folder: (picture(folder / "a.png"), listing(folder, *rows, name=name))


def bare(folder):
    for index in range(7):
        picture(folder / f"{index}.png")
    (folder / "3.txt").write_text("three")


def parquet(**columns):
    def make(folder):
        picture(folder / "a.png")
        pyarrow.parquet.write_table(pyarrow.table(columns), folder / "metadata.parquet")

    return make


def cut(name):
    def make(folder):
        path = tar(
            folder / "s.tar",
            ("a.png", image_bytes()),
            ("a.txt", b"a" * 700),
            ("b.png", image_bytes()),
            ("b.txt", b"b"),
        )
        ends = {"header": 100, "image": 600, "text": 1800, "boundary": 3072, "end mark": 4608}
        os.truncate(path, ends[name])

    return make


def two_listings(folder):
    lines(ROW)(folder)
    listing(folder, "file_name,text", "a.png,a", name="metadata.csv")


def joined(folder):
    path = tar(folder / "s.tar", ("a.png", image_bytes()), ("a.txt", b"a"))
    path.write_bytes(path.read_bytes() * 2)


LINE_2 = "metadata.jsonl:2"
BROKEN = {  # case: (how it is made, what the message must name)
    "no folder": (lambda f: f.rmdir(), ["--train_data_dir", "does not exist"]),
    "a file": (lambda f: (f.rmdir(), f.write_text("")), ["--train_data_dir", "not a folder"]),
    "no images": (lambda f: None, ["--train_data_dir", "no images", ".jpeg", ".webp", ".tar"]),
    "no caption": (bare, ["6 of 7", "0.png, 1.png, 2.png, 4.png, 5.png, …", "metadata.jsonl", "--instance_prompt"]),
    "two listings": (two_listings, ["metadata.jsonl", "metadata.csv", "Remove all but one"]),
    "not there": (lines(ROW, {"file_name": "b.png", "text": "b"}), [LINE_2, "'b.png'", "--on_bad_image skip"]),
    "a folder": (lines(ROW, {"file_name": ".", "text": "b"}), [LINE_2, "'.'"]),
    "no column": (lines({"file_name": "a.png", "txet": "a"}), [":1", "'text'", "--caption_column txet"]),
    "no file name": (lines({"file": "a.png", "text": "a"}), [":1", "'file_name'", "--image_column file"]),
    "later no column": (lines(ROW, {"file_name": "a.png"}), [LINE_2, "'text'"]),
    "not JSON": (lines(ROW, '{"file_name": '), [LINE_2, "not JSON"]),
    "not an object": (lines(ROW, "[1]"), [LINE_2, "object"]),
    "empty caption": (lines(ROW, ROW | {"text": " "}), [LINE_2, "'text'", "empty"]),
    "caption null": (lines(ROW, ROW | {"text": None}), [LINE_2, "None"]),
    "caption number": (lines(ROW, ROW | {"text": 3}), [LINE_2, "3"]),
    "name number": (lines(ROW, ROW | {"file_name": 3}), [LINE_2, "'file_name'", "3"]),
    "csv comma": (lines("file_name,text", "a.png,a,b", name="metadata.csv"), ["metadata.csv:2", "quotes"]),
    "csv short": (lines("file_name,text", "a.png", name="metadata.csv"), ["metadata.csv:2", "'text'"]),
    "csv quotes": (lines("file_name,text", 'a.png,"a', name="metadata.csv"), ["metadata.csv:2", "not CSV"]),
    "csv column": (lines("file_name,caption", "a.png,a", name="metadata.csv"), ["metadata.csv:2", "caption"]),
    "csv header only": (lines("file_name,text", name="metadata.csv"), ["--train_data_dir", "metadata.csv"]),
    "parquet column": (parquet(file_name=["a.png"], txt=["a"]), ["metadata.parquet", "--caption_column txt"]),
    "parquet null": (parquet(file_name=["a.png"] * 2, text=["a", None]), ["metadata.parquet: row 1", "None"]),
    "parquet missing": (parquet(file_name=["a.png", "b.png"], text=["a", "b"]), [".parquet: row 1", "'b.png'"]),
    "not parquet": (lines("x", name="metadata.parquet"), ["metadata.parquet", "Parquet"]),
    "packed shard": (lambda f: tar(f / "s.tar.gz", ("a.png", b""), mode="w:gz"), ["s.tar.gz", "gunzip"]),
    "packed shard in disguise": (lambda f: tar(f / "s.tar", ("a.png", b"x"), mode="w:gz"), ["s.tar", "compressed"]),
    **{f"shard cut in {at}": (cut(at), ["s.tar", "cut short"]) for at in ("header", "image", "text", "boundary")},
    "shard without its end": (cut("end mark"), ["s.tar", "cut short"]),
    "empty shard": (lambda f: (f / "s.tar").write_bytes(b""), ["s.tar", "cut short"]),
    "joined shards": (joined, ["s.tar", "joined"]),
    "twins in a shard": (in_shard("a.PNG", image_bytes()), ["s.tar: a.PNG", "two members"]),
    "shard without images": (lambda f: tar(f / "s.tar", ("a.txt", b"a")), ["1 WebDataset shard", "no images"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_set_is_refused_with_the_place_named(tmp_path, case):
    folder = tmp_path / "set"
    folder.mkdir()
    make, expected = BROKEN[case]
    make(folder)
    for _ in range(2):  # what was learnt the first time must not hide the mistake
        message = refusal(folder)
        for text in [str(folder), *expected]:
            assert text in message


def link_out(name):
    def make(folder):
        picture(folder / "a.png", caption="a")
        picture(folder.parent / f"outside{Path(name).suffix}")
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(folder.parent / f"outside{Path(name).suffix}")

    return make


def linked_folder(folder, target):
    picture(folder / "a.png", caption="a")
    (folder / "more").symlink_to(target)


def odd_name(name):
    def make(folder):
        picture(folder / "a.png", caption="a")
        for suffix, data in ((".png", image_bytes()), (".txt", b"odd")):
            Path(os.fsdecode(os.fsencode(folder) + b"/" + name + suffix.encode())).write_bytes(data)

    return make


def hidden_outside(folder):
    lines({"file_name": "more/outside.png", "text": "x"})(folder)
    picture(folder.parent / "elsewhere/outside.png")
    (folder / "more").symlink_to(folder.parent / "elsewhere")


A = ("a.png", "a")
HOSTILE = {  # case: (how it is made, the images, or what the message must name; what a warning must name)
    "listed parent": (lines(ROW, ROW | {"file_name": "../x.png"}), [LINE_2, "'../x.png'", "out of the folder"], None),
    "listed parent deep": (lines(ROW, ROW | {"file_name": "b/../../x.png"}), [LINE_2, "out of the folder"], None),
    "listed neighbour": (lines(ROW, ROW | {"file_name": "../set2/x.png"}), [LINE_2, "out of the folder"], None),
    "listed and back": (lines(ROW | {"file_name": "../set/./b/../a.png"}), [A], None),
    "listed absolute": (lines(ROW, ROW | {"file_name": "/etc/passwd"}), [LINE_2, "out of the folder"], None),
    "listed windows": (lines(ROW, ROW | {"file_name": "C:\\a.png"}), [LINE_2, "out of the folder"], None),
    "listed below a link": (hidden_outside, ["metadata.jsonl:1", "out of the folder"], None),
    "listed zero byte": (lines(ROW, ROW | {"file_name": "a\0.png"}), [LINE_2, "file name"], None),
    "listed half a character": (lines('{"file_name": "\\ud83d", "text": "a"}'), [":1", "file name"], None),
    "listed too long": (lines(ROW, ROW | {"file_name": "a" * 5000}), [LINE_2, "aaa"], None),
    "image link out": (link_out("b.png"), ["b.png", "out of the folder", "Copy"], None),
    "caption link out": (link_out("a.txt"), ["a.txt", "out of the folder", "Copy"], None),
    "shard link out": (link_out("s.tar"), ["s.tar", "out of the folder", "Copy"], None),
    "listing link out": (link_out("metadata.csv"), ["metadata.csv", "out of the folder", "Copy"], None),
    "link within": (lambda f: (picture(f / "a.png", caption="a"), (f / "b.png").symlink_to("a.png"),
                               (f / "b.txt").symlink_to("a.txt")), [A, ("b.png", "a")], None),
    "link to nowhere": (lambda f: (picture(f / "a.png", caption="a"), (f / "b.png").symlink_to("c.png")),
                        ["b.png: a broken link", "--on_bad_image skip"], None),
    "link to itself": (lambda f: (picture(f / "a.png", caption="a"), (f / "b.png").symlink_to("b.png")),
                       ["b.png: a broken link"], None),
    "caption link to nowhere": (lambda f: (picture(f / "a.png"), (f / "a.txt").symlink_to("c.txt")),
                                ["a.txt", "broken link"], None),
    "folder linked to nowhere": (lambda f: linked_folder(f, f.parent / "elsewhere"), [A], None),
    "linked folder": (lambda f: (picture(f.parent / "x/b.png"), linked_folder(f, f.parent / "x")), [A],
                      "more is a link"),
    "folder loop": (lambda f: linked_folder(f, f), [A], "more is a link"),
    "pipe": (lambda f: (picture(f / "a.png", caption="a"), os.mkfifo(f / "b.png")), ["b.png: not a file"], None),
    "caption pipe": (lambda f: (picture(f / "a.png"), os.mkfifo(f / "a.txt")), ["a.txt: not a file"], None),
    "newline in a name": (odd_name(b"b\nc"), [A, ("b\nc.png", "odd")], None),
    "not UTF-8 in a name": (odd_name(b"b\xff"), ["b\\udcff.png", "not UTF-8"], None),
    "shard with ../": (lambda f: tar(f / "s.tar", ("../../a.png", image_bytes()), ("../../a.txt", b"a")),
                       [("s.tar/../../a.png", "a")], None),
    "shard from the root": (lambda f: tar(f / "s.tar", ("/etc/a.png", image_bytes()), ("/etc/a.txt", b"a")),
                            [("s.tar//etc/a.png", "a")], None),
    "other kinds": (lambda f: (picture(f / "a.png", caption="a"), (f / "b.heic").write_bytes(b"")), [A], "b.heic"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_input(tmp_path, case):
    folder = tmp_path / "set"
    folder.mkdir()
    make, expected, warning = HOSTILE[case]
    make(folder)
    if isinstance(expected[0], tuple):
        scan = scan_folder(folder)
        assert captions(scan) == expected
        assert all(image.read_bytes() for image in scan.images)
        assert any(warning in text for text in scan.warnings) if warning else not scan.warnings
        return
    message = refusal(folder)
    assert all(text in message for text in expected), message


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


def test_missing_and_odd_files_are_left_out_when_asked_to(tmp_path):
    lines(ROW, ROW | {"file_name": "b.png"})(tmp_path / "listed")
    scan = scan_folder(tmp_path / "listed", on_bad_image="skip")
    assert captions(scan) == [A] and len(scan.missing) == scan.skipped == 1 and LINE_2 in scan.missing[0]
    assert "b.png" in scan.warnings[0]
    odd_name(b"b\xff")(tmp_path / "odd")
    scan = scan_folder(tmp_path / "odd", on_bad_image="skip")
    assert captions(scan) == [A] and scan.bad[0][0] == "b\\udcff.png"
    lines(ROW | {"file_name": "b.png"})(tmp_path / "none")
    assert "none of the 1 images" in refusal(tmp_path / "none", on_bad_image="skip")


def test_an_unreadable_folder_is_not_passed_over(tmp_path, monkeypatch):
    captioned(tmp_path / "set/deep", 1)
    scandir = os.scandir

    def refuse(path):
        if str(path).rstrip("/").endswith("deep"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    message = refusal(tmp_path / "set")
    assert "deep" in message and "Permission denied" in message


def test_scanning_imports_nothing_slow(tmp_path):
    captioned(tmp_path / "set", 2)
    tar(tmp_path / "set/s.tar", ("a.png", image_bytes()), ("a.txt", b"a"))
    code = (
        "import sys, scan_utils as s\n"
        f"scan = s.scan_folder({str(tmp_path / 'set')!r})\n"
        "s.report_lines(s.build_report(scan, [], 64)), s.hold_out(scan.images, 1), scan.images[0].read_bytes()\n"
        "assert not {'torch', 'datasets', 'pyarrow', 'webdataset', 'safetensors'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY)


# ---------------------------------------------------------------------------------------------------------------------
# Shards
# ---------------------------------------------------------------------------------------------------------------------


def test_shards_give_what_webdataset_gives(tmp_path):
    (tmp_path / "set/sub").mkdir(parents=True)
    paths = [tmp_path / "set/a-000.tar", tmp_path / "set/sub/a-001.TAR"]
    for number, path in enumerate(paths):
        with webdataset.TarWriter(str(path)) as writer:
            for index in range(5):
                image = image_bytes((index, number, 0), (8 + index, 6), "JPEG" if index % 2 else "PNG")
                sample = {"__key__": f"dir.x/{number}{index}", "jpg" if index % 2 else "PNG": image}
                sample |= {"txt": f"text {index}"} if index < 3 else {"json": {"text": f"json {index}", "cls": 3}}
                writer.write(sample | {"cls": 7, "seg.png": image_bytes()})
    expected = []
    for path in paths:
        for sample in webdataset.WebDataset(str(path), shardshuffle=False):
            data = sample["jpg"] if "jpg" in sample else sample["png"]
            text = sample["txt"].decode() if "txt" in sample else json.loads(sample["json"])["text"]
            expected.append((data, text))
    scan = scan_folder(tmp_path / "set")
    assert len(expected) == 10 and [(image.read_bytes(), image.caption) for image in scan.images] == expected
    assert scan.images[1].size == (6, 9) and scan.images[0].name.startswith("a-000.tar/dir.x/00.")
    assert scan.images[0].place == f"{paths[0]} (member dir.x/00.PNG)" or ".png" in scan.images[0].place
    assert scan.source == "2 WebDataset shards"
    assert all("more than one dot" in warning and "seg.png" in warning for warning in scan.warnings)


def test_shards_and_loose_images_are_both_used(tmp_path):
    captioned(tmp_path / "set", 1)
    tar(
        tmp_path / "set/s.tar",
        ("__meta__/a.png", b"x"), ("__note__", b"x"), ("no-dot", b"x"),
        ("a.png", image_bytes()), ("a.jpg", image_bytes(kind="JPEG")), ("a.txt", b"a"),
        ("b.txt", b"alone"), ("umlaut\udcff.png", image_bytes((1, 1, 1))), ("umlaut\udcff.txt", b"u"),
    )  # fmt: skip
    with tarfile.open(tmp_path / "set/s.tar", "a") as file:
        link = tarfile.TarInfo("c.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        file.addfile(link)
    scan = scan_folder(tmp_path / "set")
    assert captions(scan) == [
        ("0000.png", "picture 0"), ("s.tar/a.jpg", "a"), ("s.tar/a.png", "a"), ("s.tar/umlaut\\xff.png", "u"),
    ]  # fmt: skip
    assert scan.source == "caption files beside the images and 1 WebDataset shard"
    assert len(scan.warnings) == 1 and "without an image" in scan.warnings[0] and "b" in scan.warnings[0]
    assert scan_folder(tmp_path / "set").warnings == scan.warnings
    listing(tmp_path / "set", {"file_name": "0000.png", "text": "listed"})
    assert captions(scan_folder(tmp_path / "set"))[0] == ("0000.png", "listed")


def test_a_changed_shard_is_listed_anew(tmp_path):
    path = tar(tmp_path / "set/s.tar", ("a.png", image_bytes()), ("a.txt", b"a"))
    first = scan_folder(tmp_path / "set")
    tar(path, ("b.png", image_bytes((9, 9, 9))), ("b.txt", b"b"))
    os.utime(path, ns=(1, 1))
    second = scan_folder(tmp_path / "set")
    assert captions(second) == [("s.tar/b.png", "b")] and second.images[0].content != first.images[0].content
    with pytest.raises(DataError, match=r"s\.tar \(member a\.png\): the file has changed"):
        first.images[0].read_bytes()


# ---------------------------------------------------------------------------------------------------------------------
# Data sets
# ---------------------------------------------------------------------------------------------------------------------


def hub_set(folder, texts, column="text", count=3):
    files = [str(picture(folder / f"files/{index}.png", color=(index, 0, 0))) for index in range(count)]
    data = datasets.Dataset.from_dict({"image": files, column: texts, "other": files})
    data = data.cast_column("image", datasets.Image()).cast_column("other", datasets.Image())
    data.save_to_disk(folder / "saved")
    return str(folder / "saved"), [Path(file) for file in files]


def test_a_saved_data_set_gives_what_its_files_give(tmp_path):
    saved, files = hub_set(tmp_path, [["first", "second"], ["b"], [" "]])
    scan = scan_dataset(saved)
    assert captions(scan) == [("000000000", "first", "second"), ("000000001", "b"), ("000000002", "")]
    assert len(scan.warnings) == 1 and "1 of 3" in scan.warnings[0]
    for index, (image, file) in enumerate(zip(scan.images, files, strict=True)):
        assert image.read_bytes() == file.read_bytes() and image.size == (6, 8)
        assert isinstance(image.file, DatasetImage) and f"row {index} " in image.place
    copy = pickle.loads(pickle.dumps(scan.images))
    assert copy[1].read_bytes() == scan.images[1].read_bytes()
    given = scan_dataset(saved, default_caption="xyz")
    assert captions(given)[2] == ("000000002", "xyz") and given.warnings == [] and given.defaulted == 1
    assert len(scan_dataset(saved, max_samples=2).images) == 2
    bare = datasets.load_from_disk(saved).remove_columns("text")
    bare.save_to_disk(tmp_path / "bare")
    assert scan_dataset(str(tmp_path / "bare"), default_caption="xyz").defaulted == 3


def test_a_data_set_is_read_once(tmp_path, monkeypatch):
    saved, _ = hub_set(tmp_path, ["a", "b", "c"])
    first = scan_dataset(saved)
    monkeypatch.setattr(DatasetImage, "read_bytes", lambda image: 1 / 0)
    assert scan_dataset(saved).images.path == first.images.path
    assert len(scan_dataset(saved, max_samples=2).images) == 2


def test_a_data_set_of_paths_notices_changed_files(tmp_path):
    files = [str(picture(tmp_path / f"files/{index}.png")) for index in range(2)]
    cells = [{"bytes": None, "path": file} for file in files]
    data = datasets.Dataset.from_dict({"image": cells, "text": ["a", "b"]})
    data.save_to_disk(tmp_path / "saved")
    first = scan_dataset(str(tmp_path / "saved"))
    Path(files[1]).write_bytes(image_bytes((7, 7, 7), (10, 10)))
    second = scan_dataset(str(tmp_path / "saved"))
    assert [image.size for image in first.images] == [(6, 8)] * 2 and second.images[1].size == (10, 10)
    assert second.images[1].read_bytes() == Path(files[1]).read_bytes()


def test_a_broken_data_set_is_refused_with_the_flag_named(tmp_path):
    saved, _ = hub_set(tmp_path, ["a", "b", None], column="txt")
    with pytest.raises(DataError, match=r"'text' \(--caption_column\).*'txt'.*--caption_column txt"):
        scan_dataset(saved)
    with pytest.raises(DataError, match=r"--caption_column 'txt'.*row 2.*None"):
        scan_dataset(saved, caption_column="txt")
    datasets.load_from_disk(saved).rename_column("image", "img").save_to_disk(tmp_path / "renamed")
    with pytest.raises(DataError, match="--image_column img"):
        scan_dataset(str(tmp_path / "renamed"), caption_column="txt")
    numbers = datasets.Dataset.from_dict({"image": [1], "text": ["a"]})
    numbers.save_to_disk(tmp_path / "numbers")
    with pytest.raises(DataError, match=r"--image_column 'image'.*not images"):
        scan_dataset(str(tmp_path / "numbers"))
    datasets.DatasetDict({"test": numbers}).save_to_disk(tmp_path / "splits")
    with pytest.raises(DataError, match=r"--dataset_name .*'train', only \['test'\]"):
        scan_dataset(str(tmp_path / "splits"))
    with pytest.raises(DataError, match=r"--dataset_name .*--train_data_dir"):
        scan_dataset(str(tmp_path / "absent"))
    cells = [{"bytes": image_bytes(), "path": None}, {"bytes": b"x", "path": None}, None]
    data = datasets.Dataset.from_dict({"image": cells, "text": ["a", "b", "c"]})
    data.cast_column("image", datasets.Image(decode=False)).save_to_disk(tmp_path / "bad")
    with pytest.raises(DataError, match=r"(?s)2 images of 3 .*row 1: .*row 2: .*no image.*--on_bad_image skip"):
        scan_dataset(str(tmp_path / "bad"))
    scan = scan_dataset(str(tmp_path / "bad"), on_bad_image="skip")
    assert captions(scan) == [("000000000", "a")] and [name for name, _ in scan.bad] == ["row 1", "row 2"]


# ---------------------------------------------------------------------------------------------------------------------
# What is kept
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def looks(monkeypatch):
    """Counts what is read: images looked into, caption files, and shards listed."""
    seen = {"images": [], "texts": [], "shards": []}
    look, read, members = scan_utils._look, scan_utils._read_bytes, scan_utils._shard_images

    monkeypatch.setattr(scan_utils, "_look", lambda task, item: seen["images"].append(item[0]) or look(task, item))
    monkeypatch.setattr(scan_utils, "_read_bytes", lambda path, *a: seen["texts"].append(path.name) or read(path, *a))
    monkeypatch.setattr(
        scan_utils, "_shard_images", lambda path, *a: seen["shards"].append(path.name) or members(path, *a)
    )

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
    again = scan_folder(folder)
    assert looks() == {} and captions(again) == captions(first) and again.images.path == first.images.path
    for path, kind in ((folder / "0000.png", "images"), (folder / "0001.txt", "texts")):  # same size, other time
        data = path.read_bytes()
        path.write_bytes(data[:-1] + b"!")
        os.utime(path, ns=(5, 5))
        changed = scan_folder(folder)
        assert looks() == {kind: [path.name]} and changed.images.path != first.images.path
    assert changed.images[1].caption == "picture !"
    os.utime(shard, ns=(5, 5))
    scan_folder(folder)
    assert looks() == {"images": ["s.tar"], "shards": ["s.tar"]}
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


def test_every_option_goes_with_one_look(tmp_path, looks):
    folder = tmp_path / "set"
    picture(folder / "a.png", caption="b\na")
    tar(folder / "s.tar", ("a.png", image_bytes()), ("a.json", b'{"text": "t", "other": "o"}'))
    assert captions(scan_folder(folder)) == [("a.png", "b\na"), ("s.tar/a.png", "t")]
    looks()
    scan = scan_folder(folder, caption_per_line=True, caption_column="other")
    assert captions(scan) == [("a.png", "b", "a"), ("s.tar/a.png", "o")] and looks() == {}


def test_bad_images_are_not_read_again_but_unreadable_ones_are(tmp_path, looks, monkeypatch):
    folder = spoilt_set(tmp_path / "set", 1)
    refusal(folder)
    looks()
    refusal(folder)
    assert looks() == {}
    (folder / "bad00.png").write_bytes(image_bytes())
    assert len(scan_folder(folder).images) == 4 and looks() == {"images": ["bad00.png"]}
    os.utime(folder / "bad00.png", ns=(1, 1))

    def fail(*args):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(scan_utils, "open", fail, raising=False)
        assert "bad00.png: can't be read: Input/output error" in refusal(folder)
    assert len(scan_folder(folder).images) == 4


def test_a_file_that_changes_while_it_is_read_is_bad(tmp_path, monkeypatch):
    folder = captioned(tmp_path / "set", 2)
    status = scan_utils._status

    def touch_after(task, path, suffix, entry):
        found = status(task, path, suffix, entry)
        if path == "0001.png":
            os.utime(folder / path, ns=(1, 1))
        return found

    with monkeypatch.context() as patch:
        patch.setattr(scan_utils, "_status", touch_after)
        os.utime(folder / "0001.png", ns=(2, 2))
        assert "0001.png: the file changed while it was read" in refusal(folder)
    assert len(scan_folder(folder).images) == 2


def test_another_pillow_reads_everything_anew(tmp_path, looks, monkeypatch):
    folder = captioned(tmp_path / "set", 2)
    scan_folder(folder)
    looks()
    monkeypatch.setattr(scan_utils, "_VERSION", 7)
    scan_folder(folder)
    assert looks() == {"images": ["0000.png", "0001.png"], "texts": ["0000.txt", "0001.txt"]}


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
        "import resource, scan_utils\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))\n"
        f"try: scan_utils.scan_folder({str(folder)!r}, show=False)\n"
        "except scan_utils.DataError as error: print(error)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert "Is the disk full?" in result.stdout and "--cache_dir" in result.stdout and not result.stderr
    scan = scan_folder(folder)
    assert len(list(scan.images)) == 300 and scan.warnings == []


def test_a_cache_that_can_not_be_written(tmp_path, monkeypatch):
    folder = captioned(tmp_path / "set", 2)
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(scan_utils.tempfile, "tempdir", str(tmp_path))
    scan = scan_folder(folder, cache_dir=tmp_path / "file")
    assert len(scan.images) == 2 and "can't be written" in scan.warnings[0] and "--cache_dir" in scan.warnings[0]
    assert scan.images.path.parent.parent == tmp_path


def test_nothing_but_what_is_meant_lies_in_the_cache(tmp_path, own_cache):
    scan_folder(captioned(tmp_path / "set", 2))
    names = sorted(path.name.split("-")[0] + path.suffix for path in own_cache.iterdir())
    assert [name for name in names if name != "files.lock"] == ["files.sqlite", "images.sqlite"]
    assert list(scan_folder(tmp_path / "set", cache_dir=tmp_path / "other").images)
    assert (tmp_path / "other/lpl/scans").is_dir()


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
    counts = [
        db.execute(f"SELECT count(*) FROM {name}").fetchone()[0] for name in ("facts", "texts", "tars", "members")
    ]
    assert counts == [1, 1, 0, 0]


SLOW = """
import sys, time, scan_utils
scan_utils._COMMIT_SECONDS = 0.05
look = scan_utils._look
def slow(task, item):
    with open({log!r}, "a") as file:
        file.write(item[0] + "\\n")
    time.sleep({pause})
    return look(task, item)
scan_utils._look = slow
print(len(scan_utils.scan_folder({folder!r}, show=False).images))
"""


def slow_scan(folder, log, pause):
    code = SLOW.format(folder=str(folder), log=str(log), pause=pause)
    return subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)


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
    monkeypatch.setattr(scan_utils, "_BATCH", 7)
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
import sys, numpy as np, scan_utils
table = scan_utils.ImageTable({path!r})
for row in np.random.default_rng(0).integers(0, len(table), 3000):
    table[row]
for image in table: pass
print(next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS")))
"""


def big_table(path, count):
    db = sqlite3.connect(path)
    db.execute(scan_utils._TABLE)
    rows = (
        (i, f"{i:07d}.png", "a caption of some length " * 8, f"{i:064x}", 512, 768, f"{i:07d}.png", 0, None, "PNG", "")
        for i in range(count)
    )
    db.executemany("INSERT INTO images VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", rows)
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


# ---------------------------------------------------------------------------------------------------------------------
# Held-out images, and the report
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


def report_set(folder):
    for name, size in (("a", (64, 64)), ("b", (32, 64)), ("c", (640, 64)), ("d", (200, 100))):
        picture(folder / f"{name}.png", size, (size[0] % 256, 1, 2), name * 3)
    shutil.copy(folder / "a.png", folder / "twin.png")
    (folder / "twin.txt").write_text("aaa\nsecond\n")
    frames = [Image.new("RGB", (64, 64), color) for color in ("red", "blue")]
    frames[0].save(folder / "film.gif", save_all=True, append_images=frames[1:])
    (folder / "film.txt").write_text("f")
    (folder / "zero.png").write_bytes(b"")
    (folder / "zero.txt").write_text("z")
    return scan_folder(folder, on_bad_image="skip", caption_per_line=True)


def test_the_report_counts_what_is_there(tmp_path):
    scan = report_set(tmp_path / "set")
    report = build_report(scan, scan.images[:1], 64, [(64, 64), (64, 128)], batch_size=3)
    assert json.loads(json.dumps(report)) == report
    assert (report["images"], report["held_out"], report["source"]) == (6, 1, scan.source)
    assert report["formats"] == {"PNG": 5, "GIF": 1} and report["notes"]["animated"] == {
        "count": 1,
        "first": ["film.gif"],
    }
    assert report["sizes"] == {
        "height": [64, 64, 100], "width": [32, 64, 640], "megapixels": [0.002, 0.004, 0.041],
    }  # fmt: skip
    assert report["captions"] == {
        "count": 7, "different": 6, "images_with_several": 1, "empty": 0, "length": [1, 3, 6], "default": 0,
    }  # fmt: skip
    assert report["duplicates"] == {"groups": 1, "copies": 1, "first": [["a.png", "twin.png"]]}
    assert report["in_both"] == {"count": 1, "first": ["a.png"]}
    assert report["below_resolution"] == {"count": 1, "first": ["b.png"]}
    assert report["very_wide_or_tall"] == {"count": 1, "first": ["c.png"]}
    assert [(bucket["size"], bucket["images"]) for bucket in report["buckets"]] == [([64, 64], 4), ([64, 128], 2)]
    assert report["buckets"][0]["lost"] == 0.125 and report["buckets"][1]["lost"] == 0.4
    assert [name for name, _ in report["bad"]] == ["zero.png"]
    remarks = report["remarks"]
    for text in (
        "zero.png",
        "film.gif",
        "a.png = twin.png",
        "trained on too",
        "enlarged to reach its size: b.png",
        "4:1: c.png",
        "64 x 128",
    ):
        assert sum(text in remark for remark in remarks) >= 1, text
    assert len(remarks) == 7
    plain = build_report(scan, [], 32)
    assert plain["below_resolution"]["count"] == 0 and plain["buckets"][0]["size"] == [32, 32]
    assert not any("bucket" in remark for remark in plain["remarks"])


def test_the_report_on_a_list_and_on_a_clean_set(tmp_path):
    scan = scan_folder(captioned(tmp_path / "set", 4, size=(64, 64)))
    report = build_report(scan, [], 64, [(64, 64)], batch_size=4)
    assert report["remarks"] == []
    as_list = scan_utils.Scan(list(scan.images), [], "a list")
    of_list = build_report(as_list, list(scan.images)[:1], 64)
    for name in ("sizes", "captions", "duplicates"):
        assert of_list[name] == report[name]
    assert of_list["in_both"]["count"] == 1 and report_lines(of_list)


def test_groups_of_copies_are_told_apart(tmp_path):
    for index, color in enumerate("rrrbbgwwk"):
        picture(tmp_path / f"set/{index}.png", color=(ord(color), 0, 0), caption="x")
    duplicates = build_report(scan_folder(tmp_path / "set"), [], 4)["duplicates"]
    assert duplicates["groups"] == 3 and duplicates["copies"] == 4
    assert duplicates["first"] == [["0.png", "1.png", "2.png"], ["3.png", "4.png"], ["6.png", "7.png"]]


def test_a_row_listed_twice_is_no_duplicate(tmp_path):
    lines(ROW, ROW | {"text": "b"})(tmp_path / "set")
    scan = scan_folder(tmp_path / "set")
    assert build_report(scan, [], 4)["duplicates"]["groups"] == 0 and len(scan.images) == 2


def test_the_report_fits_on_a_page(tmp_path):
    scan = report_set(tmp_path / "set")
    buckets = [(64, 16 * width) for width in range(2, 41)]
    report = build_report(scan, [], 64, buckets, batch_size=4)
    report["remarks"] *= 20
    text = report_lines(report)
    assert len(text) <= 40 and any(line.endswith("#" * 30) for line in text) and "more remarks" in text[-1]
    columns = [line for line in text if line[:2].isdigit() and " x " in line]
    assert len(columns) > 2 and len({line.index("%") for line in columns}) == 1


def test_a_message_shows_odd_names():
    image = CaptionedImage("b\nc.png", ("a",), "0" * 64, (1, 1), Path("/nowhere/b\nc.png"))
    with pytest.raises(DataError, match=r"b\\nc\.png: can't be read"):
        image.read_bytes()
