"""The report on the data: it counts what is there, remarks upon what deserves a look, and fits on a page."""

import json
import shutil

import pytest
from PIL import Image

from lpl_finetuning.data.report import build_report, report_lines
from lpl_finetuning.data.samples import FramingRules
from lpl_finetuning.data.scan import Scan, scan_folder
from tests.picture_folders import ROW, captioned, lines, picture

pytestmark = pytest.mark.usefixtures("own_cache")


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
    report = build_report(scan, scan.images[:1], FramingRules(64, "64,64; 64,128"), batch_size=3)
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
        "1 image is a copy of another: a.png = twin.png",
        "trained on too",
        "enlarged to reach its size: b.png",
        "4:1: c.png",
        "64 x 128",
    ):
        assert sum(text in remark for remark in remarks) >= 1, text
    assert len(remarks) == 7
    plain = build_report(scan, [], FramingRules(32))
    assert plain["below_resolution"]["count"] == 0 and plain["buckets"][0]["size"] == [32, 32]
    assert not any("bucket" in remark for remark in plain["remarks"])


def test_the_report_on_a_list_and_on_a_clean_set(tmp_path):
    scan = scan_folder(captioned(tmp_path / "set", 4, size=(64, 64)))
    report = build_report(scan, [], FramingRules(64, "64,64"), batch_size=4)
    assert report["remarks"] == []
    as_list = Scan(list(scan.images), [], "a list")
    of_list = build_report(as_list, list(scan.images)[:1], FramingRules(64))
    for name in ("sizes", "captions", "duplicates"):
        assert of_list[name] == report[name]
    assert of_list["in_both"]["count"] == 1 and report_lines(of_list)


def test_groups_of_copies_are_told_apart(tmp_path):
    for index, color in enumerate("rrrbbgwwk"):
        picture(tmp_path / f"set/{index}.png", color=(ord(color), 0, 0), caption="x")
    report = build_report(scan_folder(tmp_path / "set"), [], FramingRules(4))
    duplicates = report["duplicates"]
    assert "4 images are copies of others: 0.png = 1.png = 2.png; 3.png" in "".join(report["remarks"])
    assert duplicates["groups"] == 3 and duplicates["copies"] == 4
    assert duplicates["first"] == [["0.png", "1.png", "2.png"], ["3.png", "4.png"], ["6.png", "7.png"]]


def test_a_row_listed_twice_is_no_duplicate(tmp_path):
    lines(ROW, ROW | {"text": "b"})(tmp_path / "set")
    scan = scan_folder(tmp_path / "set")
    assert build_report(scan, [], FramingRules(4))["duplicates"]["groups"] == 0 and len(scan.images) == 2


def test_the_report_fits_on_a_page(tmp_path):
    scan = report_set(tmp_path / "set")
    buckets = ";".join(f"64,{16 * width}" for width in range(2, 41))
    report = build_report(scan, [], FramingRules(64, buckets), batch_size=4)
    report["remarks"] *= 20
    text = report_lines(report)
    assert "captions      7, 6 different, 1 image has several" in text
    assert len(text) <= 40 and any(line.endswith("#" * 30) for line in text) and "more remarks" in text[-1]
    columns = [line for line in text if line[:2].isdigit() and " x " in line]
    assert len(columns) > 2 and len({line.index("%") for line in columns}) == 1
