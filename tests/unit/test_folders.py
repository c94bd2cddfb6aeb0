"""What is found and what is refused, with the place of every mistake: folders, captions, listings, shards, data sets.

Broken files are really broken, and shards are written by webdataset itself. The tables `CAPTIONS`, `BROKEN` and
`HOSTILE` are promises: each row is a case and what must happen when it is scanned.
"""

import json
import os
import pickle
import subprocess
import tarfile
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import webdataset

from lpl_finetuning.data.scan import scan_dataset, scan_folder
from lpl_finetuning.data.tables import DatasetImage
from lpl_finetuning.errors import DataError
from tests.picture_folders import (
    ROW,
    captioned,
    captions,
    image_bytes,
    lines,
    listing,
    odd_name,
    picture,
    refusal,
    tar,
)

pytestmark = pytest.mark.usefixtures("own_cache")


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


def test_blanks_after_the_commas_of_a_csv(tmp_path):
    picture(tmp_path / "set/a.png")
    for header, row in (
        ("file_name, text", 'a.png, "a, b"'), (" file_name ,\ttext ", 'a.png,"a, b"'),
        ("text, file_name", '"a, b", a.png'),
    ):  # fmt: skip
        listing(tmp_path / "set", header, row, name="metadata.csv")
        assert captions(scan_folder(tmp_path / "set")) == [("a.png", "a, b")]
    listing(tmp_path / "set", "\ufefffile_name,text", "a.png, a;b", name="metadata.csv")
    assert captions(scan_folder(tmp_path / "set")) == [("a.png", "a;b")]


def test_quotes_after_blanks_in_a_csv_are_no_part_of_the_caption(tmp_path):
    picture(tmp_path / "set/a.png")
    for header, row in (
        ("file_name,text", 'a.png, "a dog"'), ("file_name,text", 'a.png,   "a dog"'),
        ("text,file_name", ' "a dog", "a.png"'), ("file_name,text,rest", 'a.png, "a dog", "1, 2"'),
        ("\ufeff\ufefffile_name,text", 'a.png, "a dog"'),
    ):  # fmt: skip
        listing(tmp_path / "set", header, row, name="metadata.csv")
        assert captions(scan_folder(tmp_path / "set")) == [("a.png", "a dog")], (header, row)
    listing(tmp_path / "set", "file_name,text", 'a.png, "a ""big"" dog, red"', name="metadata.csv")
    assert captions(scan_folder(tmp_path / "set")) == [("a.png", 'a "big" dog, red')]
    listing(tmp_path / "set", "file_name,text", 'a.png,a "big" dog', name="metadata.csv")
    assert captions(scan_folder(tmp_path / "set")) == [("a.png", 'a "big" dog')]
    for blank in ("\t", "\xa0", " \t"):
        listing(tmp_path / "set", "file_name,text", f'a.png,{blank}"a dog"', name="metadata.csv")
        assert "metadata.csv:2: a tab or another blank stands between a comma and a quote" in refusal(tmp_path / "set")


ODD_ENDS = "\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"  # where str.splitlines would split


def test_lines_of_a_caption_file_end_where_editors_end_them(tmp_path):
    lines = [f"one{letter}line" for letter in ODD_ENDS]
    path = picture(tmp_path / "set/a.png").with_suffix(".txt")
    for end in ("\n", "\r\n", "\r"):
        text = end.join(["", *lines, " ", "\ufeff", "\ufefflast", ""])
        path.write_bytes(text.encode())
        assert captions(scan_folder(tmp_path / "set", caption_per_line=True)) == [("a.png", *lines, "last")]
        tar(tmp_path / "shards/s.tar", ("a.png", image_bytes()), ("a.txt", text.encode()))
        assert captions(scan_folder(tmp_path / "shards", caption_per_line=True)) == [("s.tar/a.png", *lines, "last")]
        for folder, name in (("set", "a.png"), ("shards", "s.tar/a.png")):
            assert not scan_folder(tmp_path / folder, caption_per_line=True).warnings
            [told] = scan_folder(tmp_path / folder).warnings
            assert "has a caption file of several lines, which are one caption" in told and name in told
    path.write_bytes("".join(lines).encode())
    assert captions(scan_folder(tmp_path / "set")) == [("a.png", "".join(lines))]
    assert not scan_folder(tmp_path / "set").warnings


def test_byte_order_marks_are_no_part_of_a_caption(tmp_path):
    mark = "\ufeff"
    path = picture(tmp_path / "set/a.png").with_suffix(".txt")
    for text in (f"{mark}a dog", f"{mark}{mark}a dog", f"{mark} {mark}a dog\n", f"a dog{mark}"):
        path.write_bytes(text.encode())
        assert captions(scan_folder(tmp_path / "set")) == [("a.png", "a dog")]
        tar(tmp_path / "shards/s.tar", ("a.png", image_bytes()), ("a.txt", text.encode()))
        assert captions(scan_folder(tmp_path / "shards")) == [("s.tar/a.png", "a dog")]
    path.write_bytes((mark * 2).encode())
    assert "a.txt: the caption is empty" in refusal(tmp_path / "set")
    path.unlink()
    for line in ('{"file_name": "a.png", "text": "a dog"}', f'{{"file_name": "a.png", "text": "{mark}a dog"}}'):
        for marks in ("", mark, mark * 2):
            listing(tmp_path / "set", marks + line)
            assert captions(scan_folder(tmp_path / "set")) == [("a.png", "a dog")]


# ---------------------------------------------------------------------------------------------------------------------
# Conventions of other programs
# ---------------------------------------------------------------------------------------------------------------------

HELPERS = {
    "rex-masklabel.png": "masks of OneTrainer (name-masklabel)",
    "rex-condlabel.png": "conditioning images of OneTrainer (name-condlabel)",
    "@eaDir/rex.jpg/SYNOPHOTO_THUMB_M.jpg": "thumbnails of a Synology NAS (@eaDir)",
    "@eaDir/rex.png": "thumbnails of a Synology NAS (@eaDir)",
    "SYNOFILE_THUMB_S.jpg": "thumbnails of a Synology NAS (SYNOFILE_THUMB…)",
    "#recycle/old.png": "deleted files of a NAS (#recycle)",
    "$RECYCLE.BIN/old.png": "deleted files of Windows ($RECYCLE.BIN)",
    "__MACOSX/rex.png": "files that macOS adds to archives (__MACOSX)",
    "rex_depth.png": "depth images beside their pictures (name_depth)",
    "rex-Canny.PNG": "canny images beside their pictures (name_canny)",
    "rex.mask.png": "mask images beside their pictures (name_mask)",
    "rex_control.jpg": "control images beside their pictures (name_control)",
    "rex_openpose.png": "openpose images beside their pictures (name_openpose)",
    "depth_rex.png": "depth images beside their pictures (depth_name)",
    "rex-150x150.jpg": "smaller copies beside their pictures (name-150x150)",
    "masks/rex.png": "masks images of pictures with the same names (masks/name)",
    "conditioning_images/rex.jpg": "conditioning_images images of pictures with the same names",
}


@pytest.mark.parametrize("path", HELPERS)
def test_helper_files_are_remarked_where_they_would_be_trained_on(tmp_path, path):
    for name in ("rex.jpg", path):
        picture(tmp_path / "set" / name)
    scan = scan_folder(tmp_path / "set", default_caption="a dog")
    [remark] = scan.warnings
    assert remark.startswith("1 image in ") and remark.endswith(f": {path}.") and HELPERS[path] in remark
    assert len(scan.images) == 2
    assert HELPERS[path] in scan_folder(tmp_path / "set", caption_from_folder=True).warnings[0]
    if path.count("/") < 2 and ".mask" not in path:  # such a member has a kind of its own
        tar(tmp_path / "shards/s.tar", *[(name, image_bytes()) for name in ("rex.jpg", path)])
        [remark] = scan_folder(tmp_path / "shards", default_caption="a dog").warnings
        assert HELPERS[path] in remark and remark.endswith(f": s.tar/{path}.")
    # Whoever has captioned or listed the picture means it.
    for name in ("rex.jpg", path):
        (tmp_path / "set" / name).with_suffix(".txt").write_text("a dog")
    assert scan_folder(tmp_path / "set", default_caption="a dog").warnings == []
    listing(tmp_path / "shards/listed", *[{"file_name": name} for name in ("rex.jpg", path)])
    for name in ("rex.jpg", path):
        picture(tmp_path / "shards/listed" / name)
    (tmp_path / "shards/s.tar").unlink(missing_ok=True)
    assert scan_folder(tmp_path / "shards/listed", default_caption="a dog").warnings == []


def test_pictures_of_their_own_are_no_helper_files(tmp_path):
    for name in ("deep_depth.png", "mask.png", "a mask.png", "masks/venice.png", "rex-12x.png", "pose/one.png",
                 "unmasked.png", "thumbs_up.png"):  # fmt: skip
        picture(tmp_path / "set" / name)
    assert scan_folder(tmp_path / "set", default_caption="a mask").warnings == []


def test_numbers_of_repeats_are_no_part_of_a_caption(tmp_path):
    for name in (
        "10_sks dog/a.png",
        "10_sks dog/b.png",
        "3_cat_on_mat/a.png",
        "2024_spring/a.png",
        "7up/a.png",
        "5_/a.png",
    ):
        picture(tmp_path / "set" / name)
    scan = scan_folder(tmp_path / "set", caption_from_folder=True)
    assert dict(captions(scan)) == {
        "10_sks dog/a.png": "sks dog", "10_sks dog/b.png": "sks dog", "3_cat_on_mat/a.png": "cat on mat",
        "2024_spring/a.png": "2024 spring", "7up/a.png": "7up", "5_/a.png": "5",
    }  # fmt: skip
    [remark] = scan.warnings
    assert remark.startswith("2 folders in ") and remark.endswith(": 10_sks dog, 3_cat_on_mat.") and "kohya" in remark
    root = scan_folder(tmp_path / "set/10_sks dog", caption_from_folder=True)
    assert captions(root) == [("a.png", "sks dog"), ("b.png", "sks dog")] and "10_sks dog" in root.warnings[0]
    tar(tmp_path / "20_blue bird/s.tar", ("a.png", image_bytes()))
    shard = scan_folder(tmp_path / "20_blue bird", caption_from_folder=True)
    assert captions(shard) == [("s.tar/a.png", "blue bird")] and "20_blue bird" in shard.warnings[0]
    for name in ("a", "b"):
        (tmp_path / f"set/10_sks dog/{name}.txt").write_text("own")
    assert scan_folder(tmp_path / "set/10_sks dog", caption_from_folder=True).warnings == []
    listing(tmp_path / "set", {"file_name": "10_sks dog/a.png"})
    listed = scan_folder(tmp_path / "set", caption_from_folder=True)
    assert captions(listed) == [("10_sks dog/a.png", "sks dog")] and "kohya" in " ".join(listed.warnings)


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


MISTAKES = {  # case: (how 14 samples are made, of which 12 have a mistake; what the lines about those must hold)
    "caption files": (
        lambda folder: [path.with_suffix(".txt").write_bytes(b"\xff") for path in numbered(folder)[2:]],
        ["0002.txt: not UTF-8", "0011.txt: not UTF-8"],
    ),
    "empty caption files": (
        lambda folder: [path.with_suffix(".txt").write_text("") for path in numbered(folder)[2:]],
        ["0002.txt: the caption is empty", "0011.txt: the caption is empty"],
    ),
    "captions in a listing": (
        lambda folder: listing(folder, *[{"file_name": path.name, "text": [3, "a"][index < 2]}
                                         for index, path in enumerate(numbered(folder))]),
        ["metadata.jsonl:3: the caption 'text' must be text, not 3", "metadata.jsonl:12: "],
    ),
    "files in a listing": (
        lambda folder: listing(folder, *[{"file_name": f"{index + 12 * (index > 1):04d}.png", "text": "a"}
                                         for index, _ in enumerate(numbered(folder))]),
        ["metadata.jsonl:3: '0014.png' is listed, but there is no such file in ", "metadata.jsonl:12: '0023.png' "],
    ),
    "shard": (
        lambda folder: tar(folder / "s.tar", *[member for index in range(14) for member in (
            (f"{index}.png", image_bytes()), (f"{index}.txt", [b" ", b"a"][index < 2]))]),
        ["s.tar: 2.txt: the caption is empty", "s.tar: 11.txt: "],
    ),
}  # fmt: skip


def numbered(folder):
    """14 pictures with captions."""
    return sorted(captioned(folder, 14).glob("*.png"))


@pytest.mark.parametrize("case", MISTAKES)
def test_all_mistakes_are_told_at_once(tmp_path, case):
    make, (first, tenth) = MISTAKES[case]
    make(tmp_path / "set")
    head, *mistakes, end, advice = refusal(tmp_path / "set").splitlines()
    assert head == f"--train_data_dir: 12 mistakes in {tmp_path / 'set'}:" and end == "  and 2 more"
    assert len(mistakes) == 10 and first in mistakes[0] and tenth in mistakes[9]
    assert advice.endswith(".") and not any(line.endswith(".") or advice in line for line in mistakes)


def test_files_that_are_no_text_and_empty_ones_are_told_together(tmp_path):
    first, second, *_ = numbered(tmp_path / "set")
    first.with_suffix(".txt").write_bytes(b"\xff")
    second.with_suffix(".txt").write_text("")
    for options in (NO_DEFAULT, DEFAULT):
        message = refusal(tmp_path / "set", **options)
        assert "0000.txt: not UTF-8" in message and ("0001.txt: the caption is empty" in message) == (not options)
        assert message.count("Save the file as UTF-8.") == 1
        assert ("\nSave the file as UTF-8. Write a caption, or remove the image; <|blank|> is" in message) == (
            not options
        )


def test_a_column_that_is_in_no_row_is_one_mistake(tmp_path):
    listing(tmp_path / "set", *[{"file_name": path.name} for path in numbered(tmp_path / "set")])
    assert refusal(tmp_path / "set").count("there is no column 'text'") == 1


def test_the_first_caption_file_counts(tmp_path):
    picture(tmp_path / "set/a.png", caption="txt").with_suffix(".caption").write_text("caption")
    (tmp_path / "set/a.TXT").write_text("TXT")
    assert captions(scan_folder(tmp_path / "set")) == [("a.png", "TXT")]
    (tmp_path / "set/a.TXT").unlink()
    assert captions(scan_folder(tmp_path / "set")) == [("a.png", "txt")]
    (tmp_path / "set/a.txt").unlink()
    assert captions(scan_folder(tmp_path / "set")) == [("a.png", "caption")]


def test_a_second_caption_file_is_remarked_upon(tmp_path):
    folder = captioned(tmp_path / "set", 3)
    (folder / "0001.caption").write_text("another")
    scan = scan_folder(folder)
    assert captions(scan)[1] == ("0001.png", "picture 1") and len(scan.warnings) == 1
    assert scan.warnings[0].startswith(f"1 caption file in {folder} is not used, since another one of the same image")
    assert scan.warnings[0].endswith(": 0001.caption.")
    assert scan.unused_captions == {"count": 1, "first": ["0001.caption"]}
    (folder / "0002.TXT").write_text("another")
    (folder / "lone.txt").write_text("one")
    (folder / "lone.caption").write_text("two")
    scan = scan_folder(folder)
    assert captions(scan)[2] == ("0002.png", "another") and len(scan.warnings) == 2
    assert "2 caption files" in scan.warnings[0] and ": lone.caption, lone.txt." in scan.warnings[0]
    assert "are not used, since others" in scan.warnings[1] and ": 0001.caption, 0002.txt." in scan.warnings[1]
    assert scan.unused_captions["count"] == 4
    listing(folder, {"file_name": "0001.png", "text": "listed"})
    assert scan_folder(folder).unused_captions == {"count": 2, "first": ["0001.caption", "0001.txt"]}


def test_files_of_no_kind_that_is_read_are_counted(tmp_path):
    folder = captioned(tmp_path / "set", 2)
    for name in (
        ".DS_Store",
        "Thumbs.db",
        "desktop.ini",
        "README.md",
        "LICENSE",
        "make.py",
        "sub/.gitkeep",
        ".cache/x.json",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("")
    assert scan_folder(folder).warnings == []
    (folder / "sub/photo.xcf").write_text("")
    assert scan_folder(folder).warnings == [
        f"1 file in {folder} is of no kind that is read (.xcf: 1, such as sub/photo.xcf). Convert or rename what is "
        "meant, a picture to .png, a caption to .txt, a listing to metadata.jsonl or metadata.csv or "
        "metadata.parquet, and move the rest elsewhere."
    ]
    for name in ("c.JSON", "a.json", "b.json", "Metadata.csv", "x.ppm", "x.jpg_large", "bare", "a.x1", "a.x2"):
        (folder / name).write_text("")
    picture(folder / os.fsdecode(b"b\xff")).rename(folder / os.fsdecode(b"b\xff.x3"))
    [warning] = scan_folder(folder).warnings
    kinds = "(.json: 3, such as a.json; no ending: 1, such as bare; .csv: 1, such as Metadata.csv; "
    kinds += ".jpg_large: 1, such as x.jpg_large; .ppm: 1, such as x.ppm; and 4 more endings)"
    assert warning.startswith(f"11 files in {folder} are of no kind") and kinds in warning


def test_a_listed_file_is_read_whatever_its_ending(tmp_path):
    folder = tmp_path / "set"
    for name in ("a.xyz", "b.xyz"):
        picture(folder / "x.png").rename(folder / name)
    listing(folder, {"file_name": "a.xyz", "text": "a"})
    scan = scan_folder(folder)
    assert captions(scan) == [("a.xyz", "a")] and "(.xyz: 1, such as b.xyz)" in scan.warnings[0]


def test_files_that_are_not_read_are_named_where_nothing_else_is_found(tmp_path):
    folder = tmp_path / "set"
    picture(folder / "a.png")
    (folder / "Metadata.csv").write_text("file_name,text\na.png,a\n")
    assert "1 of 1 images" in (message := refusal(folder)) and ".csv: 1, such as Metadata.csv" in message
    (folder / "a.png").rename(folder / "a.ppm")
    assert "no images in" in (message := refusal(folder)) and ".ppm: 1, such as a.ppm" in message


def test_caption_files_without_an_image_are_remarked_upon(tmp_path):
    folder = captioned(tmp_path / "set", 2)
    for name in ("README.txt", "LICENSE-MIT.txt", "sub/Credits.txt", "s.txt", "phone.txt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("not a caption of its own")
    tar(folder / "s.tar", ("a.png", image_bytes()), ("a.txt", b"a"))
    (folder / "phone.heic").write_bytes(b"")
    scan = scan_folder(folder)
    assert scan.unused_captions == {"count": 0, "first": []} and len(scan.warnings) == 1
    assert "1 picture in" in scan.warnings[0] and scan.warnings[0].endswith("(pip install pillow-heif): phone.heic.")
    for name in ("moved.txt", "readme.caption", "license plate.txt"):
        (folder / name).write_text("a caption")
    scan = scan_folder(folder)
    assert scan.unused_captions == {"count": 3, "first": ["license plate.txt", "moved.txt", "readme.caption"]}
    assert scan.warnings[0].startswith(f"3 caption files in {folder} have no images and are not used: license plate")
    for name in ("readme.caption", "license plate.txt"):
        (folder / name).unlink()
    assert "1 caption file in" in (text := scan_folder(folder).warnings[0]) and "has no image and is not used" in text


def test_caption_files_of_images_that_can_not_be_read_are_not_alone(tmp_path):
    folder = captioned(tmp_path / "set", 2)
    (folder / "0001.png").unlink()
    (folder / "0001.png").symlink_to("nowhere.png")
    scan = scan_folder(folder, on_bad_image="skip")
    assert scan.unused_captions["count"] == 0 and len(scan.bad) == len(scan.warnings) == 1


def test_caption_files_beside_listed_images_are_remarked_upon(tmp_path):
    folder = captioned(tmp_path / "set", 2)
    (folder / "alone.txt").write_text("of no image")
    listing(folder, {"file_name": "0000.png", "text": "listed"})
    scan = scan_folder(folder)
    assert captions(scan) == [("0000.png", "listed")] and scan.unused_captions == {"count": 1, "first": ["0000.txt"]}
    assert [text.split(" in ")[0] for text in scan.warnings] == ["1 image", "1 caption file"]
    assert "is not used, since its image is listed: 0000.txt." in scan.warnings[1]


def test_texts_beside_shards_are_no_captions(tmp_path):
    tar(tmp_path / "set/s.tar", ("a.png", image_bytes()), ("a.txt", b"a"))
    (tmp_path / "set/list.txt").write_text("s.tar")
    assert scan_folder(tmp_path / "set").warnings == []


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
    "csv semicolons": (lines("file;words", "a.png;a, b", name="metadata.csv"),
                       ["metadata.csv:2", "'file_name'", "['file', 'words']", "--image_column file"]),
    "csv bars": (lines("file_name|text", "a.png|a", name="metadata.csv"), ["metadata.csv:1", "separated by bars"]),
    "csv tabs": (lines("name\twords", "a.png\ta", name="metadata.csv"), ["metadata.csv:1", "separated by tabs"]),
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
    "folder linked to nowhere": (lambda f: linked_folder(f, f.parent / "elsewhere"), [A],
                                "no ending: 1, such as more"),
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
    assert scan.images[0].place == f"{paths[0]} (member dir.x/00.PNG)"
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
    assert len(scan.warnings) == 1 and scan.warnings[0].startswith("1 member of ")
    assert scan.warnings[0].endswith("s.tar is a caption without an image, and is not used: b.")
    assert scan_folder(tmp_path / "set").warnings == scan.warnings
    listing(tmp_path / "set", {"file_name": "0000.png", "text": "listed"})
    assert captions(scan_folder(tmp_path / "set"))[0] == ("0000.png", "listed")


def test_a_shard_that_was_packed_from_within_a_folder(tmp_path):
    """As docs/data.md does it: the members are named ./b.png."""
    captioned(tmp_path / "pictures/deep", 1)
    picture(tmp_path / "pictures/b.png", caption="b")
    (tmp_path / "set").mkdir()
    subprocess.run(["tar", "--sort=name", "-cf", tmp_path / "set/s.tar", "-C", tmp_path / "pictures", "."], check=True)
    scan = scan_folder(tmp_path / "set")
    assert captions(scan) == [("s.tar/b.png", "b"), ("s.tar/deep/0000.png", "picture 0")]
    assert scan.images[1].place.endswith("s.tar (member deep/0000.png)")
    (tmp_path / "pictures/deep/0000.txt").write_bytes(b"gr\xfcn")
    subprocess.run(["tar", "--sort=name", "-cf", tmp_path / "set/s.tar", "-C", tmp_path / "pictures", "."], check=True)
    assert "s.tar: deep/0000.txt: not UTF-8" in refusal(tmp_path / "set")


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


def test_a_data_set_whose_rows_are_replaced_under_the_same_name_is_read_anew(tmp_path):
    """The fingerprint and the times of the files stay; only change time and inode tell."""
    saved, _ = hub_set(tmp_path / "one", ["a", "b", "c"])
    first = scan_dataset(saved)
    for index in range(3):
        picture(tmp_path / f"two/other/{index}.png", color=(9, index, 9))
    files = [str(tmp_path / f"two/other/{index}.png") for index in range(3)]
    other = datasets.Dataset.from_dict({"image": files, "text": ["a", "b", "new"], "other": files})
    other.cast_column("image", datasets.Image()).cast_column("other", datasets.Image()).save_to_disk(tmp_path / "new")
    [path], [source] = Path(saved).glob("*.arrow"), (tmp_path / "new").glob("*.arrow")
    status = path.stat()
    path.unlink()
    path.write_bytes(source.read_bytes())
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    second = scan_dataset(saved)
    assert captions(second)[2] == ("000000002", "new") and second.images.path != first.images.path
    assert all(image.read_bytes() for image in second.images)


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
