"""What is said of data is true in each case that leads to the message: the case, the text, and the case without."""

import pytest
from PIL import Image

from lpl_finetuning.data.report import build_report, report_lines
from lpl_finetuning.data.samples import FramingRules
from lpl_finetuning.data.scan import DataSource, find_images, scan_folder
from lpl_finetuning.errors import DataError
from tests.picture_folders import captioned, image_bytes, listing, picture, refusal, tar

pytestmark = pytest.mark.usefixtures("own_cache")

LISTED_ONLY, NEVER = "files with such an ending are read only if a listing names them", "of a kind that is not read"


def other_pictures(folder):
    """A folder with a PNG, a PSD and a TGA, to Pillow another PNG and a TGA; the PNG has a caption file."""
    picture(folder / "a.png", caption="a")
    Image.new("RGB", (32, 32), "red").save(folder / "b.psd", format="PNG")
    Image.new("RGB", (32, 32), "blue").save(folder / "c.tga")
    return folder


def test_listed_pictures_are_used_and_not_called_unread(tmp_path):
    folder = other_pictures(tmp_path / "set")
    assert f"2 pictures in {folder} are not used: {LISTED_ONLY}: b.psd, c.tga." in scan_folder(folder).warnings
    listing(folder, *[{"file_name": name, "text": name} for name in ("a.png", "b.psd", "c.tga")])
    scan = scan_folder(folder)
    assert [image.name for image in scan.images] == ["a.png", "b.psd", "c.tga"]
    assert not any(LISTED_ONLY in text or NEVER in text for text in scan.warnings)
    listing(folder, *[{"file_name": name, "text": name} for name in ("a.png", "c.tga")])
    assert f"1 picture in {folder} is not used: {LISTED_ONLY}: b.psd." in scan_folder(folder).warnings


def test_pictures_that_can_not_be_read_are_called_so(tmp_path):
    folder = captioned(tmp_path / "set", 1)
    (folder / "x.svg").write_bytes(b"x")
    [warning] = scan_folder(folder).warnings
    assert warning == f"1 picture in {folder} is {NEVER}: x.svg."


def test_a_folder_of_other_pictures_alone_is_not_called_empty(tmp_path):
    folder = other_pictures(tmp_path / "set")
    (folder / "a.png").unlink()
    message = refusal(folder)
    assert "that are read" in message and LISTED_ONLY in message and "b.psd, c.tga" in message


@pytest.mark.parametrize("ending", ["parquet", "arrow"])
def test_a_data_set_is_not_to_be_renamed(tmp_path, ending):
    (tmp_path / "set/data").mkdir(parents=True)
    (tmp_path / f"set/data/train-00000-of-00001.{ending}").write_bytes(b"x")
    message = refusal(tmp_path / "set")
    assert f"a data set: data/train-00000-of-00001.{ending}. Give --dataset_name {tmp_path / 'set'}" in message
    assert "rename" not in message.lower()
    message = refusal(tmp_path / "set", flag="--validation_data_dir")
    assert "a data set, which --validation_data_dir does not take" in message and "--dataset_name" not in message
    (tmp_path / f"set/data/train-00000-of-00001.{ending}").rename(tmp_path / "set/x.ppm")
    assert "--dataset_name" not in (message := refusal(tmp_path / "set")) and "Convert or rename" in message


@pytest.mark.parametrize(("columns", "told"), [
    ({"width": 3}, "or give one caption for all with --instance_prompt."),
    ({"prompt": "a"}, "Did you mean --caption_column prompt?"),
    ({"txet": "a"}, "Did you mean --caption_column txet?"),
])  # fmt: skip
def test_only_a_column_that_may_be_meant_is_suggested(tmp_path, columns, told):
    picture(tmp_path / "set/a.png")
    listing(tmp_path / "set", {"file_name": "a.png"} | columns)
    assert (message := refusal(tmp_path / "set")).endswith(told)
    assert ("Did you mean" in message) == ("Did" in told)


def test_json_in_a_shard_is_a_file_and_in_a_listing_a_line(tmp_path):
    for content, told in ((b'{"text":', "It must be one object."), (b"[1]", 'an object like {"text": "…"}, not [1]')):
        tar(tmp_path / "shards/s.tar", ("a.png", image_bytes()), ("a.json", content))
        assert told in (message := refusal(tmp_path / "shards")) and "line must" not in message
    picture(tmp_path / "set/a.png")
    listing(tmp_path / "set", '{"file_name":')
    assert "Each line must be one object." in refusal(tmp_path / "set")


def test_archives_beside_pictures_are_not_called_shards(tmp_path):
    tar(captioned(tmp_path / "set", 1) / "backup.tar.gz", ("a.png", b""), mode="w:gz")
    message = refusal(tmp_path / "set")
    assert "compressed tars" in message and "move the others elsewhere" in message and "hardly compress" not in message


@pytest.mark.parametrize(("files", "options", "source"), [
    (("a.txt",), {}, "caption files beside the images"),
    (("a.txt",), {"default_caption": "x"}, "caption files beside the images"),
    ((), {"default_caption": "x"}, "--instance_prompt"),
    ((), {"caption_from_folder": True}, "the names of folders"),
    (("other.txt",), {"caption_from_folder": True}, "the names of folders"),
])  # fmt: skip
def test_the_source_of_captions_is_the_one_that_was_used(tmp_path, files, options, source):
    picture(tmp_path / "set/a.png")
    for name in files:
        (tmp_path / "set" / name).write_text("a caption")
    scan = scan_folder(tmp_path / "set", **options)
    assert scan.source == source
    text = "\n".join(report_lines(build_report(scan, [], FramingRules(32))))
    assert ("1 from --instance_prompt or a folder's name" in text) == (source != "caption files beside the images")
    assert "default caption" not in text


@pytest.mark.parametrize(
    ("split", "told"), [(0.97, "--validation_split 0.97 of 10"), (20, "--validation_split 20 of")]
)
def test_the_split_is_named_as_it_was_given(tmp_path, split, told):
    folder = captioned(tmp_path / "set", 10)
    with pytest.raises(DataError) as caught:
        find_images(DataSource(train_data_dir=str(folder), validation_split=split, cache_dir=str(tmp_path)))
    assert told in str(caught.value)


def test_pages_are_not_called_an_animation(tmp_path):
    (tmp_path / "set").mkdir()
    page = Image.new("RGB", (64, 64), "red")
    page.save(tmp_path / "set/a.tiff", save_all=True, append_images=[page])
    (tmp_path / "set/a.txt").write_text("a")
    [remark] = build_report(scan_folder(tmp_path / "set"), [], FramingRules(64))["remarks"]
    assert remark == "1 image has several frames or pages; the first is used: a.tiff."
