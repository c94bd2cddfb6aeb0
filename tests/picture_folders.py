"""Folders of pictures as a scan may find them: with caption files, listings and shards."""

import io
import json
import os
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from lpl_finetuning.data.scan import scan_folder
from lpl_finetuning.errors import DataError

REPOSITORY = Path(__file__).resolve().parent.parent
ROW = {"file_name": "a.png", "text": "a"}


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


def lines(*rows, name="metadata.jsonl"):
    return lambda folder: (picture(folder / "a.png"), listing(folder, *rows, name=name))


def odd_name(name):
    def make(folder):
        picture(folder / "a.png", caption="a")
        for suffix, data in ((".png", image_bytes()), (".txt", b"odd")):
            Path(os.fsdecode(os.fsencode(folder) + b"/" + name + suffix.encode())).write_bytes(data)

    return make


def tar(path, *members, mode="w"):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as file:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


def captions(scan):
    return [(image.name, *image.captions) for image in scan.images]


def refusal(*args, **options):
    with pytest.raises(DataError) as caught:
        scan_folder(*args, show=False, **options)
    return str(caught.value)
