"""Data: addressed randomness, what scanning refuses, images of every kind, caches, and the training set.

Metamorphic where possible: a relation that must hold (any order, any batch split, any number of ranks) rather than a
recorded number. The few recorded numbers tell when the meaning of a seed has changed.
"""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

import data_utils
from data_utils import (
    AddressedBatches,
    CaptionedImage,
    Crop,
    DataError,
    TensorStore,
    TrainingSet,
    addressed_normal,
    addressed_rng,
    addressed_uniform,
    check_images,
    collate,
    crop_is_forced,
    crops_are_forced,
    digest,
    encode_missing,
    epoch_order,
    fingerprint,
    image_size,
    latent_items,
    open_image,
    prepare_image,
    sample_address,
    scan_dataset,
    scan_folder,
    to_pixel_values,
)

REPOSITORY = Path(data_utils.__file__).parent


# ---------------------------------------------------------------------------------------------------------------------
# Addressed randomness
# ---------------------------------------------------------------------------------------------------------------------


def test_addressed_numbers_do_not_depend_on_order_or_batch():
    numbers = [5, 0, 2**40, 17]
    together = addressed_normal(3, numbers, (2, 3), "noise")
    assert together.dtype == torch.float32 and together.shape == (4, 2, 3)
    assert torch.equal(together.flip(0), addressed_normal(3, numbers[::-1], (2, 3), "noise"))
    assert torch.equal(together, torch.cat([addressed_normal(3, [n], (2, 3), "noise") for n in numbers]))
    uniform = addressed_uniform(3, numbers, "timestep")
    assert uniform.dtype == np.float64 and uniform.shape == (4,)
    assert uniform.tolist() == [addressed_uniform(3, [n], "timestep")[0] for n in numbers]


def test_addresses_differ_in_every_bit_of_seed_and_number_and_in_stream():
    addresses = [(seed, n, "noise") for seed in (0, 1, 2**32, 2**63) for n in (0, 1, 2**32, 2**63, 2**32 + 1)]
    addresses += [(0, 0, stream) for stream in data_utils.STREAMS if stream != "noise"]
    draws = {tuple(addressed_rng(*address).random(8)) for address in addresses}
    assert len(draws) == len(addresses)
    # Neighbours must not overlap either: no value of one stream may turn up further along in another.
    values = np.concatenate([addressed_rng(*address).random(1000) for address in addresses])
    assert len(np.unique(values)) == len(values)


def test_addressed_numbers_are_distributed_as_they_should():
    uniform = addressed_uniform(0, range(4000), "timestep")
    assert uniform.min() >= 0 and uniform.max() < 1
    assert abs(uniform.mean() - 0.5) < 0.02 and abs(np.corrcoef(uniform[:-1], uniform[1:])[0, 1]) < 0.05
    normal = addressed_normal(0, range(4000), (), "noise")
    assert abs(normal.mean()) < 0.06 and abs(normal.std() - 1) < 0.05


def test_what_a_seed_means_is_fixed():
    assert addressed_uniform(42, [0, 7], "noise").tolist() == [0.443746921343274, 0.7153377995449304]
    assert data_utils.STREAMS["noise"] == 1 and data_utils.STREAMS["validation"] == 9
    assert len(set(data_utils.STREAMS.values())) == len(data_utils.STREAMS)


def test_unknown_streams_and_bad_seeds_are_refused():
    with pytest.raises(KeyError):
        addressed_rng(0, 0, "nosie")
    for seed in (-1, 2**64):
        with pytest.raises(DataError, match="--seed"):
            addressed_rng(seed, 0, "noise")
    with pytest.raises(ValueError, match="number"):
        addressed_rng(0, -1, "noise")


def test_every_epoch_goes_through_all_images_in_another_order():
    orders = [epoch_order(1, epoch, 50) for epoch in range(3)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3
    stream = [sample_address(n, 7, 1) for n in range(21)]
    for epoch in range(3):
        part = stream[7 * epoch : 7 * epoch + 7]
        assert {address[0] for address in part} == {epoch} and sorted(index for _, index in part) == list(range(7))
    with pytest.raises(ValueError):
        sample_address(-1, 7, 1)


def test_two_ranks_work_on_what_one_rank_with_twice_the_accumulation_does():
    one = list(AddressedBatches(3, 6, 4, accumulation=2))
    two = [list(AddressedBatches(3, 6, 4, world_size=2, rank=rank)) for rank in (0, 1)]
    assert one == [batch for pair in zip(*two, strict=True) for batch in pair]
    numbers = [n for batch in one for n in batch]
    assert numbers == list(range(3 * 8, 6 * 8))


def test_a_resumed_run_goes_on_with_the_same_batches():
    whole = AddressedBatches(0, 5, 3, accumulation=2, world_size=3, rank=1)
    parts = [AddressedBatches(first, last, 3, 2, 3, 1) for first, last in ((0, 2), (2, 5))]
    assert list(whole) == [batch for part in parts for batch in part]
    assert len(whole) == len(list(whole)) == 10 and len(AddressedBatches(5, 5, 3)) == 0
    with pytest.raises(ValueError, match="rank=2"):
        AddressedBatches(0, 1, 1, world_size=2, rank=2)


# ---------------------------------------------------------------------------------------------------------------------
# Scanning
# ---------------------------------------------------------------------------------------------------------------------


def picture(path, size=(8, 6), color=(10, 200, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)
    return path


def listing(folder, *rows, name="metadata.jsonl"):
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")


def captions(scan):
    return [(image.name, image.caption) for image in scan.images]


def test_the_sources_of_captions_agree(tmp_path):
    pairs = [("a.png", "eine Katze 🐈, rot"), ("deep/b.JPG", "line\u2028separator"), ("deep/c.png", 'she said "c"')]
    for folder in ("json", "csv", "txt", "caption", "nested"):
        for name, _ in pairs:
            picture(tmp_path / folder / name)
    listing(tmp_path / "json", *[{"file_name": name, "text": text} for name, text in reversed(pairs)])
    rows = ['{},"{}"'.format(name, text.replace('"', '""')) for name, text in pairs]
    listing(tmp_path / "csv", "file_name,text", *rows, name="metadata.csv")
    for suffix in ("txt", "caption"):
        for name, text in pairs:
            (tmp_path / suffix / name).with_suffix("." + suffix).write_text(text + "\n", encoding="utf-8")
    listing(tmp_path / "nested", {"file_name": "a.png", "text": pairs[0][1]})
    listing(tmp_path / "nested/deep", *[{"file_name": name[5:], "text": text} for name, text in pairs[1:]])
    for folder in ("json", "csv", "txt", "caption", "nested"):
        scan = scan_folder(tmp_path / folder)
        assert captions(scan) == pairs and scan.warnings == [], folder
        assert [image.path for image in scan.images] == [tmp_path / folder / name for name, _ in pairs]


def test_columns_byte_order_mark_and_remarks(tmp_path):
    for name in "abc":
        picture(tmp_path / f"{name}.png")
    picture(tmp_path / ".hidden.png")
    text = '{"image": "a.png", "title": "A"}\r\n\r\n{"file_name": "./b.png", "title": " B "}\n'
    text += '{"image": "b.png", "title": "B2"}'
    (tmp_path / "metadata.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode())
    scan = scan_folder(os.path.relpath(tmp_path), caption_column="title")
    assert captions(scan) == [("a.png", "A"), ("b.png", "B"), ("b.png", "B2")]
    assert len(scan.warnings) == 2 and "1 images" in scan.warnings[0] and "c.png" in scan.warnings[0]
    assert "more than once: b.png" in scan.warnings[1] and scan.source == "metadata.jsonl"


def test_a_link_to_a_folder_is_told_of(tmp_path):
    picture(tmp_path / "elsewhere/b.png")
    picture(tmp_path / "set/a.png").with_suffix(".txt").write_text("a")
    (tmp_path / "set/more").symlink_to(tmp_path / "elsewhere")
    scan = scan_folder(tmp_path / "set")
    assert captions(scan) == [("a.png", "a")] and "more is a link" in scan.warnings[0]


def broken_sets(folder):
    """name -> (how to make it, what the message must name)"""
    row = {"file_name": "a.png", "text": "a"}

    def lines(*rows, name="metadata.jsonl"):
        return lambda: (picture(folder / "a.png"), listing(folder, *rows, name=name))

    def both():
        picture(folder / "a.png")
        listing(folder, row)
        listing(folder, "file_name,text", "a.png,a", name="metadata.csv")

    def bare():
        for index in range(7):
            picture(folder / f"{index}.png")
        (folder / "3.txt").write_text("three")

    def raw(name, data):
        return lambda: (picture(folder / "a.png"), (folder / name).write_bytes(data))

    def link():
        outside = picture(folder.parent / "outside.png")
        picture(folder / "a.png")
        (folder / "link.png").symlink_to(outside)
        listing(folder, row, {"file_name": "link.png", "text": "x"})

    line_2 = "metadata.jsonl:2"
    return {
        "no folder": (lambda: None, ["--train_data_dir", "does not exist"]),
        "a file": (lambda: folder.write_text(""), ["--train_data_dir", "not a folder"]),
        "no images": (folder.mkdir, ["--train_data_dir", "no images", ".jpeg", ".webp"]),
        "no caption": (bare, ["6 of 7", "0.png, 1.png, 2.png, 4.png, 5.png, …", ".txt", "metadata.jsonl"]),
        "two listings": (both, ["metadata.jsonl", "metadata.csv", "Remove one"]),
        "not there": (lines(row, {"file_name": "b.png", "text": "b"}), [line_2, "'b.png'"]),
        "a folder": (lines(row, {"file_name": ".", "text": "b"}), [line_2, "'.'"]),
        "no column": (lines({"file_name": "a.png", "txet": "a"}), [":1", "'text'", "--caption_column txet"]),
        "no file name": (lines({"file": "a.png", "text": "a"}), [":1", "'file_name'", "--image_column file"]),
        "later no column": (lines(row, {"file_name": "a.png"}), [line_2, "'text'"]),
        "not JSON": (lines(row, '{"file_name": '), [line_2, "not JSON"]),
        "not an object": (lines(row, "[1]"), [line_2, "object"]),
        "empty caption": (lines(row, row | {"text": " "}), [line_2, "'text'", "empty"]),
        "caption null": (lines(row, row | {"text": None}), [line_2, "None"]),
        "caption number": (lines(row, row | {"text": 3}), [line_2, "3"]),
        "name number": (lines(row, row | {"file_name": 3}), [line_2, "'file_name'", "3"]),
        "parent": (lines(row, row | {"file_name": "../x.png"}), [line_2, "'../x.png'", "out of the folder"]),
        "absolute": (lines(row, row | {"file_name": str(folder / "a.png")}), [line_2, "out of the folder"]),
        "windows": (lines(row, row | {"file_name": "C:\\a.png"}), [line_2, "out of the folder"]),
        "link": (link, [line_2, "'link.png'", "out of the folder"]),
        "zero byte": (lines(row, row | {"file_name": "a\0.png"}), [line_2, "file name"]),
        "too long": (lines(row, row | {"file_name": "a" * 5000}), [line_2, "file name"]),
        "csv comma": (lines("file_name,text", "a.png,a,b", name="metadata.csv"), ["metadata.csv:2", "quotes"]),
        "csv short": (lines("file_name,text", "a.png", name="metadata.csv"), ["metadata.csv:2", "'text'"]),
        "csv quotes": (lines("file_name,text", 'a.png,"a', name="metadata.csv"), ["metadata.csv:2", "not CSV"]),
        "csv column": (lines("file_name,caption", "a.png,a", name="metadata.csv"), ["metadata.csv:2", "caption"]),
        "csv header only": (lines("file_name,text", name="metadata.csv"), ["--train_data_dir", "metadata.csv"]),
        "empty sidecar": (raw("a.txt", b"\xef\xbb\xbf \n"), ["a.txt", "empty"]),
        "latin-1 sidecar": (raw("a.txt", b"gr\xfcn"), ["a.txt", "UTF-8"]),
        "utf-16 listing": (raw("metadata.jsonl", "{}".encode("utf-16")), ["metadata.jsonl", "UTF-8"]),
    }


@pytest.mark.parametrize("name", broken_sets(Path("x")))
def test_a_broken_set_is_refused_with_the_place_named(tmp_path, name):
    folder = tmp_path / "set"
    make, expected = broken_sets(folder)[name]
    make()
    with pytest.raises(DataError) as caught:
        scan_folder(folder)
    for text in [str(folder), *expected] if name != "link" else expected:
        assert text in str(caught.value)


def test_scanning_imports_neither_torch_nor_datasets(tmp_path):
    picture(tmp_path / "a.png").with_suffix(".txt").write_text("a")
    code = (
        "import sys, data_utils\n"
        f"scan = data_utils.scan_folder({str(tmp_path)!r})\n"
        "assert not data_utils.check_images(scan.images) and scan.images[0].content_hash()\n"
        "data_utils.crops_are_forced(scan.images, False, 4), len(data_utils.TensorStore('nowhere'))\n"
        "data_utils.addressed_uniform(0, [1], 'noise')\n"
        "assert not {'torch', 'datasets', 'safetensors'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY)


def hub_set(folder, texts, column="text", count=3):
    files = [str(picture(folder / f"files/{index}.png", color=(index, 0, 0))) for index in range(count)]
    data = datasets.Dataset.from_dict({"image": files, column: texts, "other": files})
    data = data.cast_column("image", datasets.Image()).cast_column("other", datasets.Image())
    data.save_to_disk(folder / "saved")
    return str(folder / "saved"), [Path(file) for file in files]


def test_a_saved_data_set_gives_what_its_files_give(tmp_path):
    saved, files = hub_set(tmp_path, [["first", "second"], ["b"], [" "]])
    scan = scan_dataset(saved)
    assert [image.caption for image in scan.images] == ["first", "b", ""]
    assert len(scan.warnings) == 1 and "1 of 3" in scan.warnings[0]
    for image, file in zip(scan.images, files, strict=True):
        assert image.content_hash() == CaptionedImage(file, "", "").content_hash()
        assert np.array_equal(np.asarray(open_image(image)), np.asarray(open_image(file)))
        assert image_size(image) == (8, 6)
    assert len(scan_dataset(saved, max_samples=2).images) == 2
    assert pickle.loads(pickle.dumps(scan.images[1])).content_hash() == scan.images[1].content_hash()


def test_a_broken_data_set_is_refused_with_the_flag_named(tmp_path):
    saved, _ = hub_set(tmp_path, ["a", "b", None], column="txt")
    with pytest.raises(DataError, match=r"'text' \(--caption_column\).*'txt'.*--caption_column txt"):
        scan_dataset(saved)
    with pytest.raises(DataError, match=r"--caption_column 'txt'.*row 2 holds None"):
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


# ---------------------------------------------------------------------------------------------------------------------
# Images
# ---------------------------------------------------------------------------------------------------------------------


def opened(image, path, **options):
    image.save(path, **options)
    result = open_image(path)
    assert result.mode == "RGB"
    assert image_size(CaptionedImage(path, "", "")) == result.size
    return np.asarray(result)


@pytest.mark.parametrize("mode, color", [("RGBA", (200, 0, 0, 128)), ("LA", (100, 128)), ("RGBA", (9, 9, 9, 0))])
def test_alpha_is_composited_on_white(tmp_path, mode, color):
    *values, alpha = color
    expected = [255 + (value - 255) * alpha / 255 for value in (values if len(values) == 3 else values * 3)]
    pixels = opened(Image.new(mode, (3, 2), color), tmp_path / "a.png")
    assert np.abs(pixels - np.array(expected)).max() <= 1


@pytest.mark.parametrize("transparency", [1, bytes([255, 0])])
def test_a_palette_with_transparency(tmp_path, transparency):
    image = Image.new("P", (2, 1))
    image.putpalette([250, 0, 0, 0, 0, 250])
    image.putdata([0, 1])
    pixels = opened(image, tmp_path / "a.png", transparency=transparency)
    assert pixels.tolist() == [[[250, 0, 0], [255, 255, 255]]]


def test_transparent_colours_of_rgb_and_grey(tmp_path):
    image = Image.new("RGB", (2, 1), (1, 2, 3))
    image.putpixel((1, 0), (5, 6, 7))
    assert opened(image, tmp_path / "a.png", transparency=(5, 6, 7)).tolist() == [[[1, 2, 3], [255] * 3]]


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, name, orientation):
    upright = np.zeros((16, 24, 3), np.uint8)
    upright[:8, :8], upright[:8, 8:] = (250, 0, 0), (0, 0, 250)
    # As cameras store it: the transformation that the viewer has to undo, by the definition of the EXIF tag.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: upright.transpose(1, 0, 2)[::-1],
        7: upright.transpose(1, 0, 2)[::-1, ::-1],
        8: upright.transpose(1, 0, 2)[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"exif": exif} | ({"quality": 95, "subsampling": 0} if name == "a.jpg" else {})
    options |= {"lossless": True} if name == "a.webp" else {}
    pixels = opened(Image.fromarray(np.ascontiguousarray(stored)), tmp_path / name, **options)
    assert pixels.shape == upright.shape and np.abs(pixels.astype(int) - upright).max() <= (12 if "jpg" in name else 0)


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.ppm"])
def test_16_bit_greyscale_is_scaled(tmp_path, name):
    values = np.linspace(0, 65535, 12, dtype=np.uint16).reshape(3, 4)
    pixels = opened(Image.fromarray(values), tmp_path / name)
    assert np.abs(pixels / 255 - values[..., None] / 65535).max() <= 1 / 255
    assert pixels.min() == 0 and pixels.max() == 255


def test_big_endian_and_float_greyscale(tmp_path):
    values = np.linspace(0, 65535, 12, dtype=np.uint16).reshape(3, 4)
    header = b"MM\0*\0\0\0\x08"
    tags = [(256, 3, 1, 4 << 16), (257, 3, 1, 3 << 16), (258, 3, 1, 16 << 16), (259, 3, 1, 1 << 16)]
    tags += [(262, 3, 1, 1 << 16), (273, 4, 1, 8 + 2 + 9 * 12 + 4), (277, 3, 1, 1 << 16), (278, 3, 1, 3 << 16)]
    tags += [(279, 4, 1, 24)]
    body = len(tags).to_bytes(2, "big")
    for tag, kind, count, value in tags:
        body += tag.to_bytes(2, "big") + kind.to_bytes(2, "big") + count.to_bytes(4, "big") + value.to_bytes(4, "big")
    (tmp_path / "a.tif").write_bytes(header + body + bytes(4) + values.astype(">u2").tobytes())
    pixels = np.asarray(open_image(tmp_path / "a.tif"))
    assert np.abs(pixels / 255 - values[..., None] / 65535).max() <= 1 / 255
    floats = (values / 65535).astype(np.float32)
    assert np.abs(opened(Image.fromarray(floats), tmp_path / "f.tif") / 255 - floats[..., None]).max() <= 1 / 255
    Image.fromarray(floats * 1000).save(tmp_path / "g.tif")
    with pytest.raises(DataError, match=r"g.tif.*1000, not 0 to 1"):
        open_image(tmp_path / "g.tif")


@pytest.mark.parametrize("name", ["a.jpg", "a.tif"])
def test_cmyk_is_converted(tmp_path, name):
    for ink, expected in (
        ((0, 0, 0, 0), (255, 255, 255)),
        ((255, 0, 0, 0), (0, 255, 255)),
        ((0, 0, 0, 255), (0,) * 3),
    ):
        pixels = opened(Image.new("CMYK", (8, 8), ink), tmp_path / name)
        assert np.abs(pixels.astype(int) - np.array(expected)).max() <= 3


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png"])
def test_the_first_frame_of_an_animation(tmp_path, name, caplog):
    frames = [Image.new("RGB", (8, 8), color) for color in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    pixels = opened(frames[0], tmp_path / name, save_all=True, append_images=frames[1:], lossless=True)
    assert (pixels == (255, 0, 0)).all()
    open_image(tmp_path / name)
    assert [record.getMessage() for record in caplog.records].count(caplog.messages[0]) == 1
    assert name in caplog.messages[0] and "3 frames" in caplog.messages[0]


def bad_images(folder):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    good = {}
    for suffix in ("png", "jpg", "gif", "webp", "tif", "bmp"):
        Image.fromarray(noise).save(folder / f"good.{suffix}")
        good[suffix] = (folder / f"good.{suffix}").read_bytes()
    bad = {f"cut.{suffix}": data[: len(data) // 2] for suffix, data in good.items()}
    bad |= {"empty.png": b"", "text.png": b"hello", "header.png": good["png"][:20], "html.jpg": b"<html></html>" * 9}
    damaged = bytearray(good["png"])
    damaged[200:220] = bytes(20)
    return bad | {"damaged.png": bytes(damaged)}


def test_files_that_are_no_images_are_named(tmp_path):
    bad = bad_images(tmp_path)
    records = [CaptionedImage(tmp_path / "absent.png", "a", "absent.png")]
    for name, data in bad.items():
        (tmp_path / name).write_bytes(data)
        records.append(CaptionedImage(tmp_path / name, "a", name))
    fine = CaptionedImage(tmp_path / "good.png", "a", "good.png")
    found = check_images([fine, *records])
    assert [record for record, _ in found] == records
    for record, error in found:
        assert str(record.path) in str(error) and "BytesIO" not in str(error), error
    assert "0 bytes" in str(dict(found)[records[1 + list(bad).index("empty.png")]])


def test_a_bomb_is_refused(tmp_path, monkeypatch):
    picture(tmp_path / "a.png", (100, 100))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(DataError, match=r"a.png.*10000 pixels"):
        open_image(tmp_path / "a.png")


def coordinates(width, height):
    """An image whose red is the row and whose green is the column of each pixel."""
    rows, columns = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([rows, columns, 0 * rows], axis=-1).astype(np.uint8))


@pytest.mark.parametrize("width, height", [(100, 64), (64, 100), (65, 64)])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("center_crop", [False, True])
def test_the_crop_is_where_it_says(width, height, flip, center_crop):
    rng = np.random.default_rng(3)
    places = set()
    for _ in range(12):
        pixels, crop = prepare_image(coordinates(width, height), 64, center_crop, flip, "lanczos", rng)
        assert pixels.shape == (64, 64, 3) and pixels.dtype == np.uint8
        assert crop.original_size == (height, width) and crop.target_size == (64, 64)
        top, left = crop.crop_top_left
        assert 0 <= top <= height - 64 and 0 <= left <= width - 64
        # Coordinates are those of the mirrored image.
        assert tuple(pixels[0, 0, :2]) == (top, width - 1 - left if flip else left)
        assert tuple(pixels[-1, -1, :2]) == (top + 63, width - 64 - left if flip else left + 63)
        places.add((top, left))
    assert len(places) == 1 if center_crop else len(places) > 1
    if center_crop:
        assert abs(2 * top - (height - 64)) <= 1 and abs(2 * left - (width - 64)) <= 1


def test_a_flip_before_a_centred_crop_mirrors_it():
    image = coordinates(100, 64)
    plain, _ = prepare_image(image, 64, True, False)
    mirrored, _ = prepare_image(image, 64, True, True)
    assert np.array_equal(plain[:, ::-1], mirrored)


@pytest.mark.parametrize("width, height", [(37, 91), (91, 37), (640, 480), (48, 48)])
def test_the_shorter_side_becomes_the_resolution(width, height):
    pixels, crop = prepare_image(Image.new("RGB", (width, height), (7, 8, 9)), 48, False, False, "bicubic", _Last())
    assert (pixels == (7, 8, 9)).all()
    longer = 48 * max(width, height) // min(width, height)
    assert max(crop.crop_top_left) == longer - 48 and min(crop.crop_top_left) == 0
    assert crop.original_size == (height, width)


class _Last:
    """Draws the last place there is."""

    def integers(self, high):
        return high - 1


def test_interpolations_and_their_errors():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8))
    results = {name: prepare_image(image, 40, True, False, name)[0].tobytes() for name in data_utils.INTERPOLATIONS}
    assert set(results) == {"nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"}
    assert len(set(results.values())) == 6
    with pytest.raises(DataError, match=r"--image_interpolation_mode.*lanczos"):
        prepare_image(image, 40, True, False, "cubic")
    with pytest.raises(ValueError, match="generator"):
        prepare_image(coordinates(96, 97), 96, False, False)


def test_a_crop_is_forced_when_it_cannot_fall_elsewhere(tmp_path):
    assert crop_is_forced(5, 5, False) and crop_is_forced(5, 6, True) and not crop_is_forced(5, 6, False)
    assert crop_is_forced(1000, 1001, False, 64) and not crop_is_forced(1000, 1001, False)
    assert not crop_is_forced(1000, 1100, False, 64)
    for width, height in ((1000, 1001), (64, 65), (70, 70)):
        image = Image.new("RGB", (width, height))
        rngs = [np.random.default_rng(seed) for seed in range(12)]
        places = {prepare_image(image, 64, False, False, "box", rng)[1] for rng in rngs}
        assert (len(places) == 1) == crop_is_forced(width, height, False, 64)
    square = CaptionedImage(picture(tmp_path / "a.png", (9, 9)), "", "a")
    wide = CaptionedImage(picture(tmp_path / "b.png", (19, 9)), "", "b")
    assert crops_are_forced([square], False, 8) and crops_are_forced([square, wide], True, 8)
    assert not crops_are_forced([square, wide], False, 8)


def test_time_ids_and_pixel_values():
    assert Crop((1, 2), (3, 4), (5, 6)).time_ids == (1, 2, 3, 4, 5, 6)
    pixels = np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    values = to_pixel_values(pixels)
    assert values.shape == (3, 4, 5) and values.dtype == torch.float32 and values.is_contiguous()
    assert np.array_equal(((values + 1) * 127.5).round().numpy().transpose(1, 2, 0).astype(np.uint8), pixels)
    assert to_pixel_values(np.array([[[0, 255, 255]]], dtype=np.uint8)).flatten().tolist() == [-1, 1, 1]


# ---------------------------------------------------------------------------------------------------------------------
# Caches
# ---------------------------------------------------------------------------------------------------------------------


def test_digests():
    assert digest(a=1, b=[2.5, None]) == digest(b=[2.5, None], a=1) != digest(a=1, b=[2.5])
    assert len(digest()) == 64
    with pytest.raises(TypeError):
        digest(a=Path("x"))


def test_a_content_hash_follows_the_content(tmp_path):
    record = CaptionedImage(picture(tmp_path / "a.png"), "", "a")
    copy = CaptionedImage(picture(tmp_path / "b.png"), "", "b")
    first = record.content_hash()
    assert first == copy.content_hash() == record.content_hash()
    picture(tmp_path / "a.png", size=(9, 9))
    assert record.content_hash() != first
    with pytest.raises(DataError, match=r"absent.png"):
        CaptionedImage(tmp_path / "absent.png", "", "").content_hash()


def model(folder):
    for name, data in {"vae/config.json": b"{}", "vae/w.safetensors": b"weights", "unet/w.safetensors": b"u"}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def test_fingerprints_tell_models_apart_and_copies_not(tmp_path):
    one, two = model(tmp_path / "one"), model(tmp_path / "two")
    assert fingerprint(one, "vae") == fingerprint(two, "vae") != fingerprint(one, "unet") != fingerprint(one)
    (two / "vae/README.md").write_text("does not count")
    (two / "unet/w.safetensors").write_bytes(b"v")
    assert fingerprint(one, "vae") == fingerprint(two, "vae") and fingerprint(one) != fingerprint(two)
    (two / "vae/w.safetensors").write_bytes(b"Weights")
    assert fingerprint(one, "vae") != fingerprint(two, "vae")
    assert fingerprint(one / "vae/w.safetensors") != fingerprint(two / "vae/w.safetensors")
    with pytest.raises(DataError, match="vea"):
        fingerprint(one, "vea")


def test_a_linked_cache_gives_the_fingerprint_of_a_copy_without_reading(tmp_path):
    plain, linked = model(tmp_path / "plain"), tmp_path / "cache/snapshots/main"
    blobs = tmp_path / "cache/blobs"
    blobs.mkdir(parents=True)
    (linked / "vae").mkdir(parents=True)
    weights = CaptionedImage(plain / "vae/w.safetensors", "", "").content_hash()
    (blobs / weights).write_bytes(b"not read, because its name says it all")
    (blobs / ("a" * 40)).write_bytes(b"{}")  # small files go by git's hash, which says nothing in sha256
    (linked / "vae/w.safetensors").symlink_to(blobs / weights)
    (linked / "vae/config.json").symlink_to(blobs / ("a" * 40))
    assert fingerprint(linked, "vae") == fingerprint(plain, "vae")


def entry(seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(2, 3, generator=generator)
    return {
        "mean": values,
        "half": values.bfloat16().t(),
        "ids": torch.arange(seed, seed + 4),
        "scalar": torch.tensor(1.5),
    }


def same(one, two):
    return one.keys() == two.keys() and all(
        one[name].dtype == two[name].dtype and torch.equal(one[name], two[name]) for name in one
    )


def shards(folder):
    return sorted(folder.glob("shard-*.safetensors"))


def test_a_store_gives_back_what_was_put(tmp_path):
    store = TensorStore(tmp_path / "deep/store")
    assert store.keys() == [] and not shards(tmp_path / "deep/store")
    view = torch.arange(12.0).reshape(3, 4)
    store.put({"a": entry(1), "with/slash": entry(2)})
    store.put({"views": {"row": view[1], "column": view[:, 1], "wide": view[:1].expand(3, 4)}})
    store.put({"a": entry(1)})  # nothing new
    for reader in (store, TensorStore(tmp_path / "deep/store"), pickle.loads(pickle.dumps(store))):
        assert sorted(reader.keys()) == ["a", "views", "with/slash"] and len(reader) == 3
        assert "a" in reader and "b" not in reader
        assert same(reader.get("a"), entry(1)) and same(reader.get("with/slash"), entry(2))
        assert (
            torch.equal(reader.get("views")["column"], view[:, 1]) and reader.get("a")["half"].dtype == torch.bfloat16
        )
        with pytest.raises(KeyError):
            reader.get("b")
    assert len(shards(tmp_path / "deep/store")) == 2
    for bad in ({"c": {}}, {"c": {"x/y": view}}):
        with pytest.raises(ValueError, match="entry needs"):
            store.put(bad)


def test_a_store_takes_in_what_another_process_wrote(tmp_path):
    one, two = TensorStore(tmp_path), TensorStore(tmp_path)
    one.put({"a": entry(1)})
    assert "a" not in two
    two.refresh()
    assert same(two.get("a"), entry(1))


def test_few_shards_are_kept_open(tmp_path, monkeypatch):
    monkeypatch.setattr(data_utils, "_OPEN_SHARDS", 2)
    store = TensorStore(tmp_path)
    for index in range(5):
        store.put({str(index): entry(index)})
    for index in [0, 1, 2, 3, 4, 0, 4, 2]:
        assert same(store.get(str(index)), entry(index))
        assert len(store._handles) <= 2


def test_what_a_killed_writer_leaves_is_passed_over(tmp_path):
    code = (
        "import os, signal, sys, torch, data_utils\n"
        f"store = data_utils.TensorStore({str(tmp_path)!r})\n"
        "store.put({'a': {'x': torch.ones(3)}})\n"
        "os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "store.put({'b': {'x': torch.ones(3)}})\n"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY).returncode == -9
    assert [path.name for path in tmp_path.glob(".tmp-*")] and len(shards(tmp_path)) == 1
    store = TensorStore(tmp_path)
    assert store.keys() == ["a"]
    store.put({"b": {"x": torch.zeros(3)}})
    assert sorted(TensorStore(tmp_path).keys()) == ["a", "b"]


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    store = TensorStore(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            store.put({"a": entry(1)})
    assert list(tmp_path.iterdir()) == [] and "a" not in store
    store.put({"a": entry(1)})
    assert same(TensorStore(tmp_path).get("a"), entry(1))


DAMAGE = {
    "shorter": lambda data: data[:-1],
    "longer": lambda data: data + b"x",
    "header cut": lambda data: data[:20],
    "empty": lambda data: b"",
    "length": lambda data: b"\xff" * 8 + data[8:],
    "not JSON": lambda data: data[:8] + b"x" + data[9:],
    "other JSON": lambda data: (7).to_bytes(8, "little") + b"[1,2,3]",
    "no tensors": lambda data: (2).to_bytes(8, "little") + b"{}",
    "no shard": lambda data: (9).to_bytes(8, "little") + b'{"a/b":1}',
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_shard_is_dropped_and_made_again(tmp_path, kind, caplog):
    store = TensorStore(tmp_path)
    store.put({"a": entry(1)})
    store.put({"b": entry(2)})
    damaged = tmp_path / store._index["a"][0]
    damaged.write_bytes(DAMAGE[kind](damaged.read_bytes()))
    reopened = TensorStore(tmp_path)
    assert reopened.keys() == ["b"] and len(caplog.messages) == 1 and str(damaged) in caplog.messages[0]
    asked = []
    assert encode_missing(reopened, [("a", 1), ("b", 2)], lambda items: asked.extend(items) or [entry(1)], 4, "") == 1
    assert asked == [1] and same(reopened.get("a"), entry(1)) and same(reopened.get("b"), entry(2))
    caplog.clear()
    assert sorted(TensorStore(tmp_path).keys()) == ["a", "b"] and not caplog.messages


def test_each_missing_key_is_encoded_once(tmp_path):
    batches = []

    def encode(items):
        batches.append(items)
        return [{"x": torch.tensor(float(item))} for item in items]

    store = TensorStore(tmp_path)
    store.put({"3": {"x": torch.tensor(3.0)}})
    work = [(str(item), item) for item in [0, 1, 2, 3, 4, 1, 0]]
    assert encode_missing(store, iter(work), encode, 3, "Encoding") == 4
    assert batches == [[0, 1, 2], [4]]
    assert all(store.get(str(item))["x"] == item for item in range(5))

    def never(items):
        raise AssertionError("nothing is missing")

    assert encode_missing(TensorStore(tmp_path), work, never, 3, "Encoding") == 0
    with pytest.raises(ValueError):
        encode_missing(store, [("8", 8), ("9", 9)], lambda items: encode(items)[:1], 2, "")
    assert "8" not in store and "9" not in store


def test_little_is_lost_when_encoding_ends_early(tmp_path, monkeypatch):
    monkeypatch.setattr(data_utils, "_SHARD_ENTRIES", 4)

    def encode(items):
        if 9 in items:
            raise KeyboardInterrupt
        return [{"x": torch.tensor(float(item))} for item in items]

    store = TensorStore(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        encode_missing(store, [(str(item), item) for item in range(12)], encode, 2, "")
    assert sorted(TensorStore(tmp_path).keys()) == sorted(str(item) for item in range(8))
    assert len(shards(tmp_path)) == 2
    monkeypatch.setattr(data_utils, "_SHARD_BYTES", 1)
    assert encode_missing(store, [("20", 20), ("21", 21)], encode, 1, "") == 2
    assert len(shards(tmp_path)) == 4


# ---------------------------------------------------------------------------------------------------------------------
# The training set
# ---------------------------------------------------------------------------------------------------------------------


def image_set(folder, count=5, size=(40, 32)):
    images = []
    for index in range(count):
        pixels = np.random.default_rng(index).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        path = folder / f"{index}.png"
        Image.fromarray(pixels).save(path)
        images.append(CaptionedImage(path, f"picture {index}", path.name))
    return images


def latent_key(content_hash, flip):
    return digest(image=content_hash, flip=flip)


def encode_image(item):
    record, flip = item
    pixels, crop = prepare_image(open_image(record), 32, True, flip)
    mean = to_pixel_values(pixels)[:, ::8, ::8]
    return {"mean": mean.bfloat16(), "std": torch.full_like(mean, 0.1), "time_ids": torch.tensor(crop.time_ids)}


def equal_samples(one, two):
    return one.keys() == two.keys() and all(
        torch.equal(one[name], two[name]) if isinstance(one[name], torch.Tensor) else one[name] == two[name]
        for name in one
    )


def test_a_sample_follows_from_its_number_alone(tmp_path):
    images = image_set(tmp_path)
    one, two = (TrainingSet(images, 7, 32, random_flip=True) for _ in range(2))
    forward = [one[n] for n in range(15)]
    backward = [two[n] for n in reversed(range(15))][::-1]
    assert all(equal_samples(a, b) for a, b in zip(forward, backward, strict=True))
    assert [sample["number"] for sample in forward] == list(range(15))
    assert [sample["index"] for sample in forward] == [sample_address(n, 5, 7)[1] for n in range(15)]
    assert all(sample["caption"] == f"picture {sample['index']}" for sample in forward)
    assert forward[0]["pixel_values"].shape == (3, 32, 32) and forward[0]["time_ids"].dtype == torch.float32
    # Augmentation changes from epoch to epoch.
    of_one_image = {sample["pixel_values"].numpy().tobytes() for sample in forward if sample["index"] == 0}
    assert len(of_one_image) > 1
    assert not equal_samples(TrainingSet(images, 8, 32)[0], one[0])


def test_half_of_the_samples_are_flipped_and_the_crop_does_not_change(tmp_path):
    images = image_set(tmp_path, count=1)
    flipped, plain = (TrainingSet(images, 0, 32, random_flip=flip) for flip in (True, False))
    pixels = np.asarray(open_image(images[0]))
    count = 0
    for n in range(60):
        sample = flipped[n]
        assert torch.equal(sample["time_ids"], plain[n]["time_ids"])
        top, left = sample["time_ids"][2:4].int().tolist()
        sides = [to_pixel_values(side[top : top + 32, left : left + 32]) for side in (pixels, pixels[:, ::-1])]
        assert torch.equal(plain[n]["pixel_values"], sides[0])
        count += torch.equal(sample["pixel_values"], sides[1])
        assert any(torch.equal(sample["pixel_values"], side) for side in sides)
    assert 18 <= count <= 42


@pytest.mark.parametrize("random_flip", [False, True])
def test_cached_samples_agree_with_those_encoded_on_the_fly(tmp_path, random_flip):
    images = image_set(tmp_path)
    store = TensorStore(tmp_path / "latents")
    items = list(latent_items(images, latent_key, random_flip))
    assert len(items) == (10 if random_flip else 5)
    assert encode_missing(store, items, lambda batch: [encode_image(item) for item in batch], 4, "") == len(items)
    prompts = TensorStore(tmp_path / "prompts")
    prompts.put(
        {f"key of {image.caption}": {"embeds": torch.full((2, 2), float(i))} for i, image in enumerate(images)}
    )
    cached = TrainingSet(
        images, 7, 32, True, random_flip, latents=store, prompts=prompts,
        latent_key=latent_key, prompt_key=lambda caption: f"key of {caption}",
    )  # fmt: skip
    direct = TrainingSet(images, 7, 32, True, random_flip)
    for n in range(10):
        sample, expected = cached[n], direct[n]
        assert torch.equal(sample["mean"], expected["pixel_values"][:, ::8, ::8].bfloat16().float())
        assert all(sample[name].dtype == torch.float32 for name in ("mean", "std", "time_ids"))
        assert torch.equal(sample["time_ids"], expected["time_ids"]) and "pixel_values" not in sample
        assert (sample["embeds"] == sample["index"]).all() and sample["index"] == expected["index"]
    (tmp_path / "0.png").unlink()  # the image is not needed any more
    assert len([cached[n] for n in range(5)]) == 5


def test_what_is_not_in_the_cache_is_named(tmp_path):
    images = image_set(tmp_path, count=1)
    with pytest.raises(KeyError, match=r"0.png is not in the cache"):
        TrainingSet(images, 7, 32, latents=TensorStore(tmp_path / "none"), latent_key=latent_key)[0]
    with pytest.raises(ValueError, match="keys"):
        TrainingSet(images, 7, 32, latents=TensorStore(tmp_path / "none"))
    with pytest.raises(ValueError, match="image"):
        TrainingSet([], 7, 32)


@pytest.mark.parametrize("workers, context", [(0, None), (2, "fork"), (1, "spawn")])
def test_the_loader_gives_the_numbered_samples(tmp_path, workers, context):
    images = image_set(tmp_path)
    store = TensorStore(tmp_path / "latents")
    encode_missing(
        store, latent_items(images, latent_key, True), lambda batch: [encode_image(item) for item in batch], 4, ""
    )
    samples = TrainingSet(images, 7, 32, True, True, latents=store, latent_key=lambda *side: latent_key(*side))
    samples[0]  # opens a handle in this process that the workers must not use
    batches = AddressedBatches(1, 4, 2, accumulation=2)
    loader = DataLoader(
        samples,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate,
        multiprocessing_context=context,
    )
    seen = list(loader)
    assert len(seen) == len(loader) == len(batches)
    for numbers, batch in zip(batches, seen, strict=True):
        expected = [samples[n] for n in numbers]
        assert batch["number"].tolist() == numbers and batch["number"].dtype == np.int64
        assert batch["index"].tolist() == [sample["index"] for sample in expected]
        assert batch["caption"] == [sample["caption"] for sample in expected]
        assert batch["time_ids"].shape == (2, 6) and batch["time_ids"].dtype == torch.float32
        assert torch.equal(batch["mean"], torch.stack([sample["mean"] for sample in expected]))
