"""Sets of pictures of one size: real ones and finished ones, cut to the centre square and kept as PNG files.

Importing this file imports no torch.
"""

import io
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image
from tqdm import tqdm

from lpl_finetuning.data.images import open_image, prepare_image
from lpl_finetuning.data.tables import CaptionedImage
from lpl_finetuning.errors import require
from lpl_finetuning.files import write_whole

AT_ONCE = 64  # pictures in memory


@dataclass(frozen=True)
class PictureSet:
    """Pictures of one size on disk.

    Attributes:
        paths: {stem: file}, in the order in which features are computed.
    """

    paths: dict[str, Path]

    @property
    def stems(self) -> list[str]:
        """Names of the pictures."""
        return list(self.paths)

    @property
    def files(self) -> list[Path]:
        """Files of the pictures."""
        return list(self.paths.values())

    def of(self, stems: Sequence[str]) -> "PictureSet":
        """The pictures with these stems, in their order."""
        return PictureSet({stem: self.paths[stem] for stem in stems})


def stems_of(images: Sequence[CaptionedImage]) -> list[str]:
    """A name for each image: the file's without its suffix; with its folders, joined by "--", where names repeat."""
    paths = [PurePosixPath(image.name) for image in images]
    counts = Counter(path.stem for path in paths)
    return [
        path.stem if counts[path.stem] == 1 else "--".join(path.with_suffix("").parts if unique else path.parts)
        for unique in [len({path.with_suffix("") for path in paths}) == len(paths)]
        for path in paths
    ]


def cut_pictures(images: Sequence[CaptionedImage], folder: Path, size: tuple[int, int]) -> PictureSet:
    """The images cut to the centre at (height, width) px, as PNG files; files that exist are not made again.

    A file's name ends in digits of the image's content, so a changed image gets a file of its own.
    """
    paths = {
        stem: folder / f"{stem}.{image.content[:8]}.png" for stem, image in zip(stems_of(images), images, strict=True)
    }

    def cut(item: tuple[CaptionedImage, Path]) -> None:
        image, path = item
        if not path.is_file():
            pixels, _ = prepare_image(open_image(image.read_bytes(), image.place), size, True, False)
            content = io.BytesIO()
            Image.fromarray(pixels).save(content, "PNG", compress_level=1)
            write_whole(path, content.getvalue())

    work = list(zip(images, paths.values(), strict=True))
    with ThreadPoolExecutor(2) as threads:
        for _ in tqdm(threads.map(cut, work), "cutting", len(work), unit=" pictures", delay=2, leave=False):
            pass
    return PictureSet(paths)


def read_pictures(paths: Sequence[Path]) -> np.ndarray:
    """uint8 (N, H, W, 3) of pictures of one size."""
    found = []
    for path in paths:
        with Image.open(path) as image:
            found.append(np.asarray(image.convert("RGB")))
    sizes = {pixels.shape for pixels in found}
    require(len(sizes) == 1, f"{Path(paths[0]).parent}: its pictures have several sizes; remove the folder")
    return np.stack(found)


def batches(files: Sequence[Path]) -> Iterator[np.ndarray]:
    """Yield the pictures of files of one size, a few at a time: uint8 (B, H, W, 3)."""
    for first in range(0, len(files), AT_ONCE):
        yield read_pictures(files[first : first + AT_ONCE])


def short_labels(texts: Sequence[str]) -> list[str]:
    """Short names that tell models apart: the last parts of their paths, as many as it takes."""
    parts = [[part for part in re.split("[/+]", text) if part] or [text] for text in texts]
    labels = []
    for index, own in enumerate(parts):
        for count in range(1, len(own) + 1):
            label = "/".join(own[-count:])
            if all("/".join(other[-count:]) != label for place, other in enumerate(parts) if place != index):
                break
        labels.append(label)
    return labels
