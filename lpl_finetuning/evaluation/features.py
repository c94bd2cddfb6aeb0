"""Features of pictures, computed once for each network and set of pictures, and kept in a file."""

import io
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from lpl_finetuning.data.formats import IMAGE_EXTENSIONS
from lpl_finetuning.data.images import open_image
from lpl_finetuning.errors import DataError
from lpl_finetuning.evaluation.networks import FeatureNetwork
from lpl_finetuning.files import digest, sha256_of, write_whole

BATCH_SIZE = 32
BLOCK = 512  # pictures whose features share a file: what a kill can lose


@dataclass(frozen=True)
class FeatureSet:
    """Features of a set of pictures.

    Attributes:
        names: file names without the suffix, in the order of the rows.
        values: float32 (N, D).
    """

    names: tuple[str, ...]
    values: np.ndarray


def features_of(
    pictures: str | Path | Sequence[str | Path],
    network: FeatureNetwork,
    store_dir: str | Path,
    batch_size: int | None = None,
    bar: bool = True,
    whose: str = "",
) -> FeatureSet:
    """Features of all pictures: from `store_dir` if they are there, else computed and stored, 512 pictures to a file.

    A stored file is found by the digests of the network's weights and of its pictures' bytes, so that a changed
    picture is noticed; the names of pictures do not matter.

    Args:
        pictures: a folder, whose pictures are taken in the order of their names, or paths.
        network: of `networks.load_network`.
        store_dir: folder of the stored features; it is made if need be.
        batch_size: pictures of a forward pass, 32 by default.
        bar: show a progress bar.
        whose: the model's name, for the bar.

    Raises:
        DataError: no pictures, or a file that is no picture.
    """
    paths = _paths(pictures)
    names = tuple(path.stem for path in paths)
    with ThreadPoolExecutor(4) as pool:
        digests = list(pool.map(sha256_of, paths))
    title = f"features{' of ' * bool(whose)}{whose} ({network.name})"
    with tqdm(total=len(paths), desc=title, unit=" pictures", disable=not bar, leave=False, delay=1) as progress:
        found = [_block(paths[first : first + BLOCK], digests[first : first + BLOCK], network, Path(store_dir),
                        batch_size or BATCH_SIZE, progress) for first in range(0, len(paths), BLOCK)]  # fmt: skip
    return FeatureSet(names, np.concatenate(found))


def _block(
    paths: Sequence[Path],
    digests: Sequence[str],
    network: FeatureNetwork,
    folder: Path,
    batch_size: int,
    progress: tqdm,
) -> np.ndarray:
    """Features of pictures that share a file."""
    key = digest(network=network.name, weights=network.fingerprint(), pictures=digests)
    label = "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in Path(network.name).name)
    file = folder / f"{label}-{key[:32]}.npy"
    values = _stored(file, (len(paths), network.dims))
    if values is not None:
        progress.update(len(paths))
        return values
    values = np.concatenate(list(_batches(paths, network, batch_size, progress))).astype(np.float32)
    content = io.BytesIO()
    np.save(content, values)
    write_whole(file, content.getvalue())
    return values


def _paths(pictures: str | Path | Sequence[str | Path]) -> list[Path]:
    """Files of pictures, or a DataError."""
    if isinstance(pictures, str | Path):
        paths = sorted(path for path in Path(pictures).iterdir() if path.suffix.lower() in IMAGE_EXTENSIONS)
        if not paths:
            raise DataError(f"{pictures}: no pictures are in this folder.", "Name a folder that holds pictures.")
        return paths
    return [Path(path) for path in pictures]


def _stored(file: Path, shape: tuple[int, int]) -> np.ndarray | None:
    """The stored features; None where the file is missing or damaged."""
    try:
        values = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return values if values.shape == shape and values.dtype == np.float32 else None


def _batches(paths: Sequence[Path], network: FeatureNetwork, batch_size: int, progress: tqdm) -> Iterator[np.ndarray]:
    """Features (B, D) batch by batch; pictures of different sizes are passed one by one."""
    with ThreadPoolExecutor(4) as pool:
        for first in range(0, len(paths), batch_size):
            images = list(pool.map(_pixels, paths[first : first + batch_size]))
            alike = len({image.shape for image in images}) == 1
            for batch in [np.stack(images)] if alike else [image[None] for image in images]:
                yield network(torch.from_numpy(batch)).float().cpu().numpy()
            progress.update(len(images))


def _pixels(path: Path) -> np.ndarray:
    """uint8 (H, W, 3)."""
    return np.array(open_image(path.read_bytes(), str(path)))
