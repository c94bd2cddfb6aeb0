"""Sets of pictures of one size, their names, and short names of models."""

import numpy as np
import pytest
from PIL import Image

from lpl_finetuning.data.scan import scan_folder
from lpl_finetuning.evaluation.picture_sets import cut_pictures, read_pictures, short_labels, stems_of


def folder_of(folder, *names, size=(30, 20)):
    """Pictures with these names, each of another grey."""
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (number * 40,) * 3).save(folder / name)
    return scan_folder(folder, default_caption="", show=False).images


@pytest.mark.parametrize(("texts", "labels"), [
    (["runs/a", "runs/b"], ["a", "b"]),
    (["x/a/last", "x/b/last"], ["a/last", "b/last"]),
    (["a", "x/a"], ["a", "x/a"]),
    (["examples/base", "examples/base+runs/my-lora"], ["base", "my-lora"]),
    (["base+lora-a/step-400", "base+lora-b/step-400/"], ["lora-a/step-400", "lora-b/step-400"]),
    (["owner/model"], ["model"]),
    (["/"], ["/"]),
])  # fmt: skip
def test_labels_are_short_and_tell_models_apart(texts, labels):
    assert short_labels(texts) == labels


def test_names_that_repeat_get_their_folders(tmp_path, own_cache):
    images = folder_of(tmp_path / "data", "cat.png", "a/dog.png", "b/dog.png")
    assert dict(zip((image.name for image in images), stems_of(images), strict=True)) == {
        "cat.png": "cat", "a/dog.png": "a--dog", "b/dog.png": "b--dog",
    }  # fmt: skip
    images = folder_of(tmp_path / "more", "cat.png", "cat.webp")
    assert len(set(stems_of(images))) == 2, "two files that differ in their suffix only"


def test_pictures_are_cut_to_the_centre_and_made_once(tmp_path, own_cache):
    images = folder_of(tmp_path / "data", "a.png", "b.png", "c.png")
    cut = cut_pictures(images, tmp_path / "cut", (16, 16))
    pixels = read_pictures(cut.files)
    assert cut.stems == ["a", "b", "c"] and pixels.shape == (3, 16, 16, 3) and pixels.dtype == np.uint8
    assert pixels[:, 8, 8, 0].tolist() == [0, 40, 80]
    times = [path.stat().st_mtime_ns for path in cut.files]
    again = cut_pictures(images, tmp_path / "cut", (16, 16))
    assert again == cut and [path.stat().st_mtime_ns for path in again.files] == times
    assert list(cut.of(["c", "a"]).paths) == ["c", "a"]


def test_a_picture_that_changed_is_cut_anew(tmp_path, own_cache):
    before = cut_pictures(folder_of(tmp_path / "data", "a.png"), tmp_path / "cut", (16, 16))
    after = cut_pictures(folder_of(tmp_path / "data", "b.png", "a.png"), tmp_path / "cut", (16, 16))
    assert read_pictures(before.files)[0, 0, 0, 0] == 0 and read_pictures([after.paths["a"]])[0, 0, 0, 0] == 40
