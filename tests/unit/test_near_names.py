"""Names that nearly match, links that leave the folder, and data behind the wrong flag.

Metamorphic where possible: a set whose names nearly match gives what the set with the right names gives.
"""

import contextlib
import json
import os
import unicodedata
from pathlib import Path

import pytest

from lpl_finetuning.data import folders, near_names
from lpl_finetuning.data.findings import Findings, ScanRequest
from lpl_finetuning.data.near_names import NearFiles, bare_key, matches, near_key
from lpl_finetuning.data.samples import CaptionRules
from lpl_finetuning.data.scan import DataSource, find_images, scan_dataset, scan_folder
from lpl_finetuning.data.tables import Facts
from lpl_finetuning.errors import DataError
from tests.picture_folders import captioned, captions, image_bytes, listing, picture, refusal, tar

pytestmark = pytest.mark.usefixtures("own_cache")

NFC, NFD = "Café à la plage", unicodedata.normalize("NFD", "Café à la plage")


def texts(folder, **files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------------
# Caption files
# ---------------------------------------------------------------------------------------------------------------------

NEAR = {  # (picture, caption file) -> whether a remark is due
    ("a.png", "a.png.txt"): False,
    ("dogs/a.png", "dogs/a.png.caption"): False,
    ("a.png ", "a.txt "): False,
    ("Photo.jpg", "photo.txt"): True,
    ("IMG_1.JPG", "img_1.TXT"): True,
    ("Dogs/a.png", "dogs/a.txt"): True,
    (f"{NFD}.png", f"{NFC}.txt"): True,
    (f"{NFC}.png", f"{NFD}.txt"): True,
    (f"{NFC.upper()}.png", f"{NFD}.txt"): True,
    ("Straße.png", "STRASSE.txt"): True,
    ("a.png", "a .txt"): True,
    ("a .png", "a.txt"): True,
    ("a.png", "a.txt.txt"): True,
    ("a.png", "a.jpg.txt"): True,
    ("a.png.png", "a.txt"): True,
    ("a.png", "A.PNG.txt"): True,
}


@pytest.mark.parametrize("names", NEAR)
def test_a_caption_file_that_nearly_matches_is_taken(tmp_path, names):
    image, file = names
    for folder, caption in (("near", file), ("exact", os.path.splitext(image)[0] + ".txt")):
        picture(tmp_path / folder / image)
        picture(tmp_path / folder / "other.png", color=(1, 2, 3), caption="other")
        texts(tmp_path / folder, **{caption: "a dog"})
    near, exact = scan_folder(tmp_path / "near"), scan_folder(tmp_path / "exact")
    assert captions(near) == captions(exact) and ("a dog" in dict(captions(near)).values())
    assert [row.content for row in near.images] == [row.content for row in exact.images]
    assert near.source == "caption files beside the images" and near.unused_captions["count"] == 0
    remarks = [f"1 image in {tmp_path / 'near'} has the caption of a file whose name matches only nearly: "]
    assert near.warnings == [f"{text}{image} ({file})." for text in remarks * NEAR[names]]
    # A caption of its own comes before one for all.
    assert dict(captions(scan_folder(tmp_path / "near", default_caption="x")))[image] == "a dog"


FAR = [("a.png", "b.txt"), ("a.png", "a1.txt"), ("a1.png", "a.txt"), ("a-b.png", "a_b.txt"), ("e.png", "é.txt"),
       ("x/a.png", "y/a.txt"), ("a.png", "x/a.txt"), ("a b.png", "ab.txt"), ("a.png", "a.tar.txt")]  # fmt: skip


@pytest.mark.parametrize("names", FAR)
def test_other_names_are_not_taken(tmp_path, names):
    picture(tmp_path / "set" / names[0])
    texts(tmp_path / "set", **{names[1]: "a dog"})
    assert "1 of 1 images" in refusal(tmp_path / "set")
    scan = scan_folder(tmp_path / "set", default_caption="x")
    assert captions(scan) == [(names[0], "x")] and scan.unused_captions == {"count": 1, "first": [names[1]]}


def test_the_whole_name_tells_two_pictures_of_one_stem_apart(tmp_path):
    for name in ("a.png", "a.jpg", "b.png", "b.jpg"):
        picture(tmp_path / "set" / name)
    texts(tmp_path / "set", **{"a.png.txt": "p", "a.jpg.txt": "j", "a.jpg.caption": "second", "b.jpg.txt": "bj"})
    assert "1 of 4 images" in (message := refusal(tmp_path / "set")) and ": b.png." in message
    texts(tmp_path / "set", **{"b.txt": "b"})
    scan = scan_folder(tmp_path / "set")
    assert captions(scan) == [("a.jpg", "j"), ("a.png", "p"), ("b.jpg", "b"), ("b.png", "b")]
    [remark] = scan.warnings
    assert "2 caption files" in remark and "others of the same images come first: a.jpg.caption, b.jpg.txt." in remark
    tar(tmp_path / "shards/s.tar", ("a.jpg", image_bytes(kind="JPEG")), ("a.jpg.txt", b"j"), ("a.png", image_bytes()),
        ("a.png.txt", b"p"), ("b.png", image_bytes()), ("b.png.txt", b"whole"), ("b.txt", b"b"))  # fmt: skip
    packed = captions(scan_folder(tmp_path / "shards"))
    assert packed == [("s.tar/a.jpg", "j"), ("s.tar/a.png", "p"), ("s.tar/b.png", "b")]


def test_an_exact_name_comes_first(tmp_path):
    picture(tmp_path / "set/Photo.jpg", caption="exact")
    picture(tmp_path / "set/photo.png", caption="own")
    texts(tmp_path / "set", **{"PHOTO.txt": "near", "Photo.jpg.txt": "whole"})
    scan = scan_folder(tmp_path / "set")
    assert captions(scan) == [("Photo.jpg", "exact"), ("photo.png", "own")]
    assert scan.unused_captions == {"count": 2, "first": ["PHOTO.txt", "Photo.jpg.txt"]}


UNCLEAR = {  # files -> what the error must name
    "Photo.jpg photo.txt PHOTO.txt": "PHOTO.txt and photo.txt nearly match Photo.jpg; which belong together",
    "Photo.jpg photo.png PHOTO.txt": "PHOTO.txt nearly matches Photo.jpg and photo.png; which belong together",
    "a.png a.txt.txt a.caption.txt": "a.caption.txt and a.txt.txt nearly match a.png",
}


@pytest.mark.parametrize("names", UNCLEAR)
@pytest.mark.parametrize("options", [{}, {"default_caption": "x"}])
def test_where_two_could_be_meant_both_are_named(tmp_path, names, options):
    for name in names.split():
        (picture if name.endswith(("jpg", "png")) else Path.write_text)(
            tmp_path / name, **({} if name.endswith(("jpg", "png")) else {"data": "a"})
        )
    message = refusal(tmp_path, **options)
    assert UNCLEAR[names] in message and "Rename the caption file that counts" in message


def test_one_caption_for_pictures_of_one_stem(tmp_path):
    for name in ("Photo.jpg", "Photo.png"):
        picture(tmp_path / "set" / name)
    texts(tmp_path / "set", **{"photo.txt": "a", "photo.caption": "second"})
    scan = scan_folder(tmp_path / "set")
    assert captions(scan) == [("Photo.jpg", "a"), ("Photo.png", "a")]
    assert "2 images" in scan.warnings[0] and "photo.caption" in scan.warnings[1]


def test_keys():
    assert near_key("Dogs \\ A.PNG ") == near_key("dogs/a.png") and bare_key("a.png.TXT .caption") == "a"
    assert bare_key(".png") == ".png" and bare_key("a.b") == "a.b" and bare_key(".txt.txt") == ".txt"


def test_names_are_compared_once_each(monkeypatch):
    """100,000 names must not be compared with 100,000 others."""
    calls = []
    key = near_names.near_key
    monkeypatch.setattr(near_names, "near_key", lambda path: calls.append(path) or key(path))
    pictures = [(f"P{n}.png", f"P{n}") for n in range(2000)]
    found = matches(pictures, [(f"p{n}.txt", f"p{n}") for n in range(2000)])
    assert len(found.taken) == 2000 and found.unclear == [] and len(calls) == 4000
    calls.clear()
    files = NearFiles(path for path, _ in pictures)
    assert [files.find(path.lower()) for path, _ in pictures] == [[path] for path, _ in pictures]
    assert len(calls) == 4000


def test_the_work_of_matching_grows_with_the_names(tmp_path):
    """Instructions of SQLite, not seconds: four times the names are at most five times the work."""

    def work(count, caption):
        request = ScanRequest("--train_data_dir", "set", "image", "text", None, False, False, root=tmp_path)
        with contextlib.closing(Facts(tmp_path / f"{count}{caption[:1]}.sqlite")) as facts:
            findings, steps = Findings(request, facts, []), []
            names = [f"d{n % 7}/P{n}" for n in range(count)]
            facts.insert("INSERT INTO pictures VALUES (?, ?, '')", ((f"{name}.png", name) for name in names))
            stems = [caption.format(name) for name in names]
            facts.insert("INSERT INTO sidecars VALUES (?, 0, ?, 1, 0)", ((stem, f"{stem}.txt") for stem in stems))
            findings.db.execute("CREATE INDEX pictures_stem ON pictures (stem)")
            findings.db.set_progress_handler(lambda: steps.append(1), 100)
            folders._match_caption_files(findings)
            list(folders._with_captions(findings))
            folders._remark_on_second_captions(findings)
            folders._remark_on_lone_captions(findings, set())
            taken = findings.db.execute("SELECT count(*) FROM nearly").fetchone()[0]
            assert taken == (0 if caption in ("{}", "x/{}") else count)
            return len(steps)

    for caption in ("{}", "{}.png", "{}.jpg", "{} ", "x/{}"):
        assert work(800, caption) < 5 * work(200, caption), caption


# ---------------------------------------------------------------------------------------------------------------------
# Listings
# ---------------------------------------------------------------------------------------------------------------------

LISTED = {  # what the listing says -> the file
    "dogs\\a.png": "dogs/a.png",
    ".\\dogs\\sub\\..\\a.png": "dogs/a.png",
    "Dogs/A.PNG": "dogs/a.png",
    "dogs/a.png ": "dogs/a.png",
    " dogs/a.png": "dogs/a.png",
    "dogs/a": "dogs/a.png",
    "DOGS\\A": "dogs/a.png",
    f"{NFC}.png": f"{NFD}.png",
    f"{NFC}\\a.png": f"{NFD}/a.png",
}


@pytest.mark.parametrize("kind", ["metadata.jsonl", "metadata.csv"])
@pytest.mark.parametrize("name", LISTED)
def test_a_listed_name_that_nearly_matches_is_taken(tmp_path, name, kind):
    picture(tmp_path / "set" / LISTED[name])
    picture(tmp_path / "set/other.png", color=(1, 2, 3))
    rows = [{"file_name": name, "text": "a dog"}, {"file_name": "other.png", "text": "b"}]
    if kind == "metadata.csv":
        rows = ["file_name,text", *(f"{row['file_name']},{row['text']}" for row in rows)]
    listing(tmp_path / "set", *rows, name=kind)
    scan = scan_folder(tmp_path / "set")
    assert dict(captions(scan)) == {LISTED[name]: "a dog", "other.png": "b"} and scan.unlisted["count"] == 0
    name = name.lstrip() if kind == "metadata.csv" else name
    exact = name == LISTED[name] if name in LISTED else True
    assert len(scan.warnings) == (not exact)
    assert exact or ("matches a file only nearly" in scan.warnings[0] and LISTED[name] in scan.warnings[0])
    assert all(image.read_bytes() == image.file.read_bytes() for image in scan.images)


def test_what_is_listed_exactly_is_never_another_file(tmp_path):
    for name in ("a.png", "A.png", "dogs\\a.png", "a"):
        picture(tmp_path / "set/x.png").rename(tmp_path / "set" / name)
    listing(tmp_path / "set", *[{"file_name": name, "text": name} for name in ("A.png", "dogs\\a.png", "a")])
    assert captions(scan_folder(tmp_path / "set")) == [
        ("A.png", "A.png"), ("a", "a"), ("dogs\\a.png", "dogs\\a.png"),
    ]  # fmt: skip


HINTS = {  # (what the listing says, files) -> what the error must hold
    ("A.PNG", "a.png A.png"): "; A.png and a.png nearly match: which is meant is not clear.",
    ("a", "a.png a.jpg"): "; a.jpg and a.png nearly match: which is meant is not clear.",
    ("a.jpg", "a.webp"): "there is no such file in {}; there is a.webp.",
    ("a.png", "images/a.png"): "there is no such file in {}; there is images/a.png.",
    ("set/a.png", "a.png"): "there is no such file in {}; there is a.png.",
    ("a.png", "b.png"): "there is no such file in {}.",
    ("dog.png", "dogs.png"): "there is no such file in {}.",
    ("0.png", "a/0.png b/0.png c/0.png d/0.png"): "there is no such file in {}.",
    ("..\\x.png", "x.png"): "leads out of the folder",
    ("\\x.png", "x.png"): "leads out of the folder",
    ("sub\\..\\..\\x.png", "x.png"): "leads out of the folder",
    ("\\\\server\\x.png", "x.png"): "leads out of the folder",
}


@pytest.mark.parametrize("case", HINTS)
def test_what_nearly_matches_is_named_and_nothing_far_off(tmp_path, case):
    name, files = case
    for file in files.split():
        picture(tmp_path / "set" / file)
    picture(tmp_path / "x.png")
    listing(tmp_path / "set", {"file_name": name, "text": "a"})
    message = refusal(tmp_path / "set")
    assert "metadata.jsonl:1: " in message and HINTS[case].format(tmp_path / "set") in message
    if "leads out" not in HINTS[case]:
        listing(tmp_path / "set", {"file_name": name, "text": "a"}, {"file_name": files.split()[0], "text": "b"})
        scan = scan_folder(tmp_path / "set", on_bad_image="skip")
        assert captions(scan) == [(files.split()[0], "b")] and len(scan.missing) == 1


def test_an_absolute_name_in_the_folder_is_no_way_out(tmp_path):
    picture(tmp_path / "set/a.png")
    (tmp_path / "link").symlink_to("set")
    for folder in ("set", "link"):
        listing(tmp_path / "set", {"file_name": str(tmp_path / folder / "a.png"), "text": "a"})
        assert captions(scan_folder(tmp_path / folder)) == [("a.png", "a")]
    listing(tmp_path / "set", {"file_name": str(tmp_path / "set2/a.png"), "text": "a"})
    assert "leads out of the folder" in refusal(tmp_path / "set")


def test_an_image_column_beside_file_name(tmp_path):
    for name in ("a.png", "b.png"):
        picture(tmp_path / "set" / name)
    for other in (3, None, "https://example.org/a.png", "c.png", ["a.png"], "", "a.png", {"bytes": None}):
        listing(tmp_path / "set", {"image": other, "file_name": "a.png", "text": "a"})
        assert captions(scan_folder(tmp_path / "set")) == [("a.png", "a")], other
        listing(tmp_path / "set", {"file_name": other, "image": "a.png", "text": "a"})
        assert captions(scan_folder(tmp_path / "set")) == [("a.png", "a")], other
    listing(tmp_path / "set", {"image": "b.png", "file_name": "a.png", "text": "a"})
    message = refusal(tmp_path / "set")
    assert "'file_name' names 'a.png' and 'image' names 'b.png'; both are there" in message
    assert "--image_column file_name" in message
    assert captions(scan_folder(tmp_path / "set", image_column="file_name")) == [("a.png", "a")]
    listing(tmp_path / "set", {"picture": "b.png", "file_name": "a.png", "text": "a"})
    assert captions(scan_folder(tmp_path / "set", image_column="picture")) == [("b.png", "a")]
    listing(tmp_path / "set", {"image": {"bytes": "x", "path": None}, "text": "a"})
    assert "no listing but a data set" in (message := refusal(tmp_path / "set")) and "--dataset_name" in message


PLAIN = 'file_name,text\na.png,"a, b; c"\n'
TABLES = {
    "sep=,": f"sep=,\n{PLAIN}",
    "byte order mark and sep=,": f"\ufeffsep=,\r\n{PLAIN}",
    "sep=;": 'sep=;\r\nfile_name;text\r\na.png;"a, b; c"\r\n',
    "quoted sep=;": '"sep=;"\nfile_name;text\na.png;"a, b; c"\n',
    "sep=tab": "sep=\t\nfile_name\ttext\na.png\ta, b; c\n",
    "SEP=|": "SEP=|\nfile_name|text\na.png|a, b; c\n",
    "semicolons": '\ufefffile_name;text\na.png;"a, b; c"\n',
    "semicolons, quoted": '"file_name";"text"\n"a.png";"a, b; c"\n',
    "semicolons and usual names": 'image;text\na.png;"a, b; c"\n',
    "tabs": "text\tfile_name\na, b; c\ta.png\n",
}


@pytest.mark.parametrize("name", TABLES)
def test_what_excel_writes_gives_what_commas_give(tmp_path, name):
    picture(tmp_path / "set/a.png")
    (tmp_path / "set/metadata.csv").write_text(TABLES[name], encoding="utf-8", newline="")
    scan = scan_folder(tmp_path / "set")
    assert captions(scan) == [("a.png", "a, b; c")] and scan.warnings == []


def test_lines_of_such_tables_are_counted_from_the_first(tmp_path):
    picture(tmp_path / "set/a.png")
    for head, line, separator in (
        ("sep=;\nfile_name;text\na.png;a\n", 4, "semicolon"),
        ("file_name\ttext\n", 2, "tab"),
    ):
        (tmp_path / "set/metadata.csv").write_text(head + "a.png;a;b\n".replace(";", ";" if "sep" in head else "\t"))
        message = refusal(tmp_path / "set")
        assert f"metadata.csv:{line}: more fields than columns" in message and f"with a {separator} into" in message


# ---------------------------------------------------------------------------------------------------------------------
# Captions that are left blank
# ---------------------------------------------------------------------------------------------------------------------

MARK = "<|blank|>"


@pytest.mark.parametrize("options", [{}, {"default_caption": "a dog"}, {"caption_per_line": True}])
def test_a_caption_is_left_blank_by_the_mark(tmp_path, options):
    picture(tmp_path / "files/a.png", caption=f"\ufeff {MARK}\n")
    tar(tmp_path / "shards/s.tar", ("a.png", image_bytes()), ("a.txt", MARK.encode()))
    for name, row in (
        ("listed", {"file_name": "a.png", "text": MARK}),
        ("several", {"file_name": "a.png", "text": [MARK]}),
    ):
        picture(tmp_path / name / "a.png")
        listing(tmp_path / name, row)
    for name in ("files", "shards", "listed", "several"):
        scan = scan_folder(tmp_path / name, **options)
        assert [image.captions for image in scan.images] == [("",)] and scan.defaulted == 0 and scan.warnings == []
    picture(tmp_path / "files/a.png", caption=f"not {MARK}")
    assert captions(scan_folder(tmp_path / "files", **options)) == [("a.png", f"not {MARK}")]


def test_one_of_several_captions_may_be_blank(tmp_path):
    picture(tmp_path / "set/a.png", caption=f"a dog\n{MARK}\n")
    scan = scan_folder(tmp_path / "set", caption_per_line=True)
    [image] = scan.images
    assert image.captions == ("a dog", "")
    assert {CaptionRules().draw(image.captions, 0, n) for n in range(20)} == {"a dog", ""}
    assert CaptionRules(trigger_word="sks").text("") == "sks"  # a trigger word stands alone
    picture(tmp_path / "set/a.png", caption="")
    assert f"{MARK} is a caption left blank on purpose" in refusal(tmp_path / "set")


# ---------------------------------------------------------------------------------------------------------------------
# Links
# ---------------------------------------------------------------------------------------------------------------------


def hub_tree(root):
    """As `hf download` leaves it: a snapshot of links to blobs without endings."""
    (root / "blobs").mkdir(parents=True)
    snapshot = root / "snapshots/1"
    (snapshot / "images").mkdir(parents=True)
    for number, name in enumerate("ab"):
        (root / f"blobs/{number}").write_bytes(image_bytes((number, 2, 3)))
        (snapshot / f"images/{name}.png").symlink_to(f"../../../blobs/{number}")
    rows = [json.dumps({"file_name": f"images/{name}.png", "text": name}) for name in "ab"]
    (root / "blobs/9").write_text("\n".join(rows))
    (snapshot / "metadata.jsonl").symlink_to("../../blobs/9")
    return snapshot


def test_a_tree_of_links_is_read_by_flag(tmp_path):
    snapshot = hub_tree(tmp_path)
    message = refusal(snapshot)
    assert "3 files in" in message and "--follow_links" in message
    assert "--follow_links" in refusal(snapshot, flag="--real"), "evaluate_models.py has the flag too"
    scan = scan_folder(snapshot, follow_links=True)
    assert captions(scan) == [("images/a.png", "a"), ("images/b.png", "b")] and scan.warnings == []
    assert scan.images[1].read_bytes() == (tmp_path / "blobs/1").read_bytes()
    images, held_out = find_images(
        DataSource(train_data_dir=str(snapshot), validation_data_dir=str(snapshot), follow_links=True)
    )
    assert len(images.images) == len(held_out) == 2


def test_a_target_that_changes_is_noticed(tmp_path):
    picture(tmp_path / "out/a.png", caption="a")
    picture(tmp_path / "out/b.png", color=(9, 9, 9), size=(9, 9), caption="b")
    picture(tmp_path / "set/z.png", caption="z")
    (tmp_path / "set/l.png").symlink_to(tmp_path / "out/a.png")
    (tmp_path / "set/l.txt").symlink_to(tmp_path / "out/a.txt")
    (tmp_path / "set/more").symlink_to(tmp_path / "out")

    def found():
        scan = scan_folder(tmp_path / "set", follow_links=True)
        assert all(image.read_bytes() == image.file.read_bytes() for image in scan.images)
        return {image.name: (image.caption, image.size) for image in scan.images}

    before = found()
    small, large = (6, 8), (9, 9)
    assert before == {"l.png": ("a", small), "more/a.png": ("a", small), "more/b.png": ("b", large),
                      "z.png": ("z", small)}  # fmt: skip
    picture(tmp_path / "out/a.png", size=(10, 10), caption="new")
    assert found() == before | {"l.png": ("new", (10, 10)), "more/a.png": ("new", (10, 10))}
    (tmp_path / "set/l.png").unlink()
    (tmp_path / "set/l.png").symlink_to(tmp_path / "out/b.png")
    assert found()["l.png"] == ("new", large)


def test_no_folder_is_entered_twice_and_circles_end(tmp_path):
    picture(tmp_path / "set/a.png", caption="a")
    picture(tmp_path / "out/x/b.png", color=(1, 1, 1), caption="b")
    for link, target in (("set/loop", "set"), ("set/one", "out"), ("set/two", "out"), ("out/back", "set"),
                         ("out/self", "out"), ("out/x/up", "out"), ("set/deep", "out/x")):  # fmt: skip
        (tmp_path / link).symlink_to(tmp_path / target)
    scan = scan_folder(tmp_path / "set", follow_links=True)
    assert [image.caption for image in scan.images] == ["a", "b"]
    [remark] = scan.warnings
    assert "links to folders that are read under other names, and were not entered again" in remark
    scan = scan_folder(tmp_path / "set")
    assert captions(scan) == [("a.png", "a")] and "--follow_links enters them" in scan.warnings[0]


def test_other_remarks_are_not_lost_with_the_links(tmp_path):
    captioned(tmp_path / "set", 1)
    picture(tmp_path / "out.png")
    (tmp_path / "set/l.png").symlink_to(tmp_path / "out.png")
    (tmp_path / "set/more").symlink_to(tmp_path)
    texts(tmp_path / "set", **{"l.txt": "l", "x.json": "{}", "phone.heic": "", "s.tar.gz": ""})
    (tmp_path / "set/nowhere.png").symlink_to("nothing.png")
    message = refusal(tmp_path / "set")
    for text in ("1 file in", "l.png. Copy what is meant into the folder, or use it where it is with --follow_links.",
                 "compressed tars can't be read at random: s.tar.gz", "more is a link to a folder", "phone.heic",
                 ".json: 1, such as x.json", "nowhere.png can't be read: a broken link"):  # fmt: skip
        assert text in message, text
    for name in ("s.tar.gz", "nowhere.png"):
        (tmp_path / "set" / name).unlink()
    (tmp_path / "set/more").unlink()
    scan = scan_folder(tmp_path / "set", follow_links=True)
    assert ("l.png", "l") in captions(scan) and scan.unused_captions["count"] == 0
    assert any("phone.heic" in text for text in scan.warnings) and any("x.json" in text for text in scan.warnings)
    assert captions(scan_folder(captioned(tmp_path / "only/deep", 1).parent))
    (tmp_path / "links").mkdir()
    (tmp_path / "links/more").symlink_to(tmp_path / "only")
    assert "links/more is a link to a folder" in refusal(tmp_path / "links")


def test_links_of_git_annex_whose_files_are_not_here(tmp_path):
    captioned(tmp_path / "set", 1)
    (tmp_path / "set/a.png").symlink_to("../.git/annex/objects/1/2/SHA256E-s1--0.png/SHA256E-s1--0.png")
    assert "a.png: a link of git-annex whose file is not here; git annex get" in refusal(
        tmp_path / "set", follow_links=True
    )


def test_folders_of_the_system_that_can_not_be_read_are_a_remark(tmp_path, monkeypatch):
    captioned(tmp_path / "set", 1)
    for name in ("lost+found", "deep/System Volume Information"):
        (tmp_path / "set" / name).mkdir(parents=True)
    scandir = os.scandir
    closed = ["lost+found", "System Volume Information"]

    def refuse(path):
        if os.path.basename(str(path).rstrip("/")) in closed:
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    scan = scan_folder(tmp_path / "set")
    assert len(scan.images) == 1 and "are folders of the system that can't be read" in scan.warnings[0]
    closed.append("deep")
    assert "deep/ can't be read: Permission denied" in refusal(tmp_path / "set")


# ---------------------------------------------------------------------------------------------------------------------
# The wrong flag
# ---------------------------------------------------------------------------------------------------------------------


def test_a_folder_of_pictures_is_no_data_set(tmp_path, monkeypatch):
    captioned(tmp_path / "set/dogs", 2)
    for options in ({}, {"default_caption": "x"}):
        with pytest.raises(DataError, match=r"is a folder of images and no data set\. Give --train_data_dir .*set"):
            scan_dataset(str(tmp_path / "set"), **options)
    for name, advice in (("metadata.csv", "--train_data_dir"), ("a.parquet", "--dataset_name"), ("a.tar", "--train")):
        (tmp_path / name).write_text("")
        with pytest.raises(DataError, match=rf"{name} is a file\..*{advice}"):
            scan_dataset(str(tmp_path / name))


def test_a_table_of_file_names_is_no_data_set(tmp_path):
    texts(tmp_path / "set", **{"train.csv": "file_name,text\na.png,a\n"})
    with pytest.raises(DataError, match=r"A table of file names is a listing: call it metadata\.csv or metadata"):
        scan_dataset(str(tmp_path / "set"), cache_dir=tmp_path / "cache")


def test_a_data_set_is_no_folder_of_pictures(tmp_path):
    for names in (["data/train-0.parquet"], ["dataset_info.json", "state.json", "data-0.arrow"]):
        texts(tmp_path / names[0], **dict.fromkeys(names, ""))
        message = refusal(tmp_path / names[0])
        assert "holds no images but a data set" in message and f"Give --dataset_name {tmp_path / names[0]}" in message
    for name, advice in (
        ("a.parquet", f"--dataset_name {tmp_path}"), ("a.arrow", f"--dataset_name {tmp_path}"),
        ("metadata.parquet", f"Name the folder that holds it: {tmp_path}"), ("a.zip", "Unpack it"),
        ("a.png", f"Name the folder that holds it: {tmp_path}"), ("a.tar.gz", "Unpack it"), ("a.x", "Name the folder"),
    ):  # fmt: skip
        (tmp_path / name).write_text("")
        message = refusal(tmp_path / name)
        assert message.startswith(f"--train_data_dir: {tmp_path / name} is not a folder.") and advice in message
        assert "--dataset_name" not in refusal(tmp_path / name, flag="--real")


STRAY = {  # (name, first lines) -> the advice
    ("captions.csv", "image,caption\na.png,a\n"): "captions.csv has the columns image, caption: if it lists the "
    "pictures, rename it to metadata.csv and give --caption_column caption.",
    ("Metadata.csv", "file_name,text\na.png,a\n"): "rename it to metadata.csv.",
    (
        "list.csv",
        "sep=;\nfilename;prompt\na.png;a\n",
    ): "rename it to metadata.csv and give --image_column filename and give --caption_column prompt.",
    ("sub/train.jsonl", '{"file_name": "a.png", "text": "a"}\n'): "rename it to metadata.jsonl.",
    ("stats.csv", "epoch,loss\n1,2\n"): None,
    ("empty.csv", ""): None,
    ("odd.jsonl", "[1]\n"): None,
}


@pytest.mark.parametrize("case", STRAY)
def test_a_stray_table_is_told_by_its_columns(tmp_path, case):
    name, text = case
    picture(tmp_path / "set/a.png")
    texts(tmp_path / "set", **{name: text})
    message = refusal(tmp_path / "set")
    assert (STRAY[case] in message) if STRAY[case] else ("rename it to" not in message)
    listing(tmp_path / "set", {"file_name": "a.png", "text": "a"})
    assert "rename it to" not in "".join(scan_folder(tmp_path / "set").warnings)


def test_no_far_off_column_is_suggested(tmp_path):
    picture(tmp_path / "set/a.png")
    for columns, meant in (
        ({"label": 3, "license": "CC0"}, None), ({"texts": "a"}, "texts"), ({"prompt": "a"}, "prompt"),
        ({"author": "a", "next": "b"}, None),
    ):  # fmt: skip
        listing(tmp_path / "set", {"file_name": "a.png"} | columns)
        message = refusal(tmp_path / "set")
        assert (f"Did you mean --caption_column {meant}?" in message) if meant else ("Did you mean" not in message)
