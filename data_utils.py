"""Captioned images, caches and addressed randomness for the training scripts.

What this file holds, in order:

1. addressed randomness: every random number follows from (seed, number of the sample), never from a stream's state;
2. captioned folders and Hub data sets, checked once and completely before any model is loaded;
3. images: opened as RGB whatever the file holds, resized, flipped and cropped together with their coordinates;
4. caches: a content-addressed store of tensors in safetensors shards, in which nothing is ever pickled;
5. the training set, and the batches of sample numbers that each rank works on.

Importing this file and scanning a folder import neither torch nor datasets, so that a script can check its data in a
fraction of a second. What needs torch imports it when called.

Shape suffixes: B samples in a batch, C channels, H height, W width; h, w the same in latent pixels.
Sizes are (height, width) and positions are (top, left), in pixels, wherever nothing else is said.
"""

import contextlib
import csv
import difflib
import functools
import hashlib
import json
import logging
import os
import uuid
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO, StringIO
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

IMAGE_EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
CAPTION_EXTENSIONS = (".txt", ".caption")  # the first one found beside an image is read
LISTING_NAMES = ("metadata.jsonl", "metadata.csv")

INTERPOLATIONS = {  # Pillow's, by diffusers' names: newer versions of Pillow know more
    "nearest": Image.Resampling.NEAREST,
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "hamming": Image.Resampling.HAMMING,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}

# The numbers are part of what a seed means: a changed number changes every run. Add at the end, never renumber.
STREAMS = {
    "noise": 1,
    "timestep": 2,
    "posterior": 3,
    "dropout": 4,
    "augment": 5,
    "order": 6,
    "noise_offset": 7,
    "lora_dropout": 8,
    "validation": 9,
    "timestep_offset": 10,
    "held_out": 11,
}


class DataError(ValueError):
    """A mistake in the user's data. The message names the flag or file, what was found there, and what to do."""


# ---------------------------------------------------------------------------------------------------------------------
# 1. Addressed randomness
# ---------------------------------------------------------------------------------------------------------------------


def addressed_rng(seed: int, n: int, stream: str) -> np.random.Generator:
    """A generator whose numbers follow from (seed, stream, n) alone.

    Philox with (seed, stream) as key and n in the highest of its four 64-bit counter words. The generator itself
    counts from the lowest word up, so two addresses share no numbers before 2**192 draws.

    Args:
        seed: 0 <= seed < 2**64.
        n: address within the stream, 0 <= n < 2**64.
        stream: a name from `STREAMS`.

    Raises:
        KeyError: the stream is not in the table.
        DataError: the seed does not fit into 64 bits.
        ValueError: n does not fit into 64 bits.
    """
    if not 0 <= seed < 2**64:
        raise DataError(f"--seed is {seed}; it must be at least 0 and less than 2**64.")
    if not 0 <= n < 2**64:
        raise ValueError(f"A sample's number must be at least 0 and less than 2**64, not {n}.")
    key = np.array([seed, STREAMS[stream]], dtype=np.uint64)
    counter = np.array([0, 0, 0, n], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def addressed_normal(seed: int, numbers: Iterable[int], shape: Sequence[int], stream: str) -> "torch.Tensor":
    """Standard normal noise, float32 (B, *shape) on the CPU: row b follows from (seed, numbers[b]) alone."""
    import torch

    rows = [addressed_rng(seed, int(n), stream).standard_normal(tuple(shape), dtype=np.float32) for n in numbers]
    return torch.from_numpy(np.stack(rows)) if rows else torch.empty((0, *shape))


def addressed_uniform(seed: int, numbers: Iterable[int], stream: str) -> np.ndarray:
    """Uniform numbers in [0, 1), float64 (B,): entry b follows from (seed, numbers[b]) alone."""
    return np.array([addressed_rng(seed, int(n), stream).random() for n in numbers], dtype=np.float64)


def stratified_uniform(seed: int, numbers: Iterable[int], batch_size: int, per_step: int) -> np.ndarray:
    """Uniform numbers in [0, 1), float64 (B,), of which those of one optimizer step are spread evenly.

    Systematic sampling: the `per_step` samples of a step (those of all micro-steps and ranks) sit at
    frac(u + s / per_step), where u is uniform, one for each step, and s runs over 0..per_step - 1. So an interval of
    length p gets floor or ceil of p * per_step of them, while each sample for itself is uniform. The strata are dealt
    out so that the samples of one micro-batch are spread evenly too.

    Args:
        numbers: of samples, counted as `AddressedBatches` counts them.
        batch_size: of a micro-batch.
        per_step: samples of an optimizer step, a multiple of batch_size.
    """
    steps, places = np.divmod(np.fromiter(numbers, dtype=np.int64), per_step)
    micro_batches, rows = np.divmod(places, batch_size)
    strata = rows * (per_step // batch_size) + micro_batches
    return (addressed_uniform(seed, steps, "timestep_offset") + strata / per_step) % 1


@functools.lru_cache(maxsize=4)  # workers run ahead, so the last epoch's order is still asked for after the next's
def epoch_order(seed: int, epoch: int, size: int) -> np.ndarray:
    """The order of an epoch: a permutation of range(size), int64 (size,), read-only because it is cached."""
    order = addressed_rng(seed, epoch, "order").permutation(size)
    order.flags.writeable = False
    return order


def sample_address(n: int, size: int, seed: int) -> tuple[int, int]:
    """(epoch, index) of the n-th sample of the endless stream that completes each epoch's permutation in turn.

    Raises:
        ValueError: n is negative or the set is empty.
    """
    if n < 0 or size < 1:
        raise ValueError(f"There is no sample {n} in a set of {size} images.")
    epoch, place = divmod(n, size)
    return epoch, int(epoch_order(seed, epoch, size)[place])


# ---------------------------------------------------------------------------------------------------------------------
# 2. Captioned images
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DatasetImage:
    """The image in one row of a `datasets.Dataset` whose only column holds undecoded images."""

    dataset: Any
    index: int
    column: str

    def read_bytes(self) -> bytes:
        """The bytes of the image file, as they were uploaded."""
        cell = self.dataset[self.index][self.column]
        if cell is None or (cell["bytes"] is None and not cell["path"]):
            raise DataError(f"{self}: there is no image in this row. Remove the row from the data set.")
        if cell["bytes"] is not None:
            return cell["bytes"]
        return _read_bytes(Path(cell["path"]))

    def __str__(self) -> str:
        return f"row {self.index} (column {self.column!r}) of the data set"


@dataclass(frozen=True)
class CaptionedImage:
    """An image with its caption. `name` is unique enough to sort by and to name in a message."""

    path: Path | DatasetImage
    caption: str
    name: str

    def read_bytes(self) -> bytes:
        """The bytes of the image file, undecoded."""
        return _read_bytes(self.path) if isinstance(self.path, Path) else self.path.read_bytes()

    def content_hash(self) -> str:
        """sha256 of the image file, hex. Read once per process, and again only when the file has changed."""
        if isinstance(self.path, Path):
            return _file_hash(self.path)
        return hashlib.sha256(self.read_bytes()).hexdigest()


@dataclass(frozen=True)
class Scan:
    """What was found: the images sorted by name, remarks for the user, and where the captions came from."""

    images: list[CaptionedImage]
    warnings: list[str]
    source: str


def scan_folder(
    folder: str | os.PathLike,
    image_column: str = "image",
    caption_column: str = "text",
    default_caption: str | None = None,
) -> Scan:
    """Find the images below a folder and their captions, and check all of it.

    Captions come from `metadata.jsonl` or `metadata.csv` (one line per image: `{"file_name": "a.png", "text": "…"}`,
    file names relative to the listing), in the folder or below it. Where there is no listing they come from a `.txt`
    or `.caption` file beside each image. Hidden files and folders are passed over.

    Args:
        folder: `--train_data_dir`.
        image_column: `--image_column`; a listing without it is read by its column `file_name`.
        caption_column: `--caption_column`.
        default_caption: `--instance_prompt`, for images without a caption file; without it they are an error.

    Raises:
        DataError: something is missing, unreadable, without a caption, or outside the folder.
    """
    folder = Path(folder)
    if not folder.exists():
        raise DataError(f"--train_data_dir: {folder} does not exist.")
    if not folder.is_dir():
        raise DataError(f"--train_data_dir: {folder} is not a folder. Name the folder that holds the images.")
    files, warnings = _walk(folder)
    image_files = [path for path in files if path.suffix.lower() in IMAGE_EXTENSIONS]
    listings = [path for path in files if path.name in LISTING_NAMES]
    if listings:
        _refuse_two_listings(listings)
        images = [image for path in listings for image in _read_listing(path, folder, image_column, caption_column)]
        source = ", ".join(path.relative_to(folder).as_posix() for path in listings)
        if not images:
            raise DataError(f"--train_data_dir: {source} in {folder} lists no images. Fill it, or remove it.")
        warnings += _remarks_on_listing(images, image_files, folder)
    else:
        images = _read_sidecars(image_files, folder, default_caption)
        source = "caption files beside the images"
        if not images:
            raise DataError(
                f"--train_data_dir: there are no images in {folder} or below it. "
                f"Files ending in {', '.join(IMAGE_EXTENSIONS)} are read."
            )
    return Scan(sorted(images, key=lambda image: (image.name, image.caption)), warnings, source)


def scan_dataset(
    dataset_name: str,
    dataset_config_name: str | None = None,
    split: str = "train",
    image_column: str = "image",
    caption_column: str = "text",
    cache_dir: str | None = None,
    max_samples: int | None = None,
    default_caption: str | None = None,
) -> Scan:
    """Load a data set from the Hub, or from a folder that `save_to_disk` wrote, and check it like a folder.

    The images stay undecoded bytes until they are needed. Of several captions the first is taken. An empty caption is
    allowed here, since a Hub data set is seldom the user's to correct, but is counted in a warning. Without the
    caption column every image has `default_caption`, when there is one.

    Raises:
        DataError: the data set can't be loaded, a column is missing or of another kind, a caption is not text.
    """
    import datasets

    dataset = _load_dataset(dataset_name, dataset_config_name, split, cache_dir)
    _require_column(image_column, dataset.column_names, f"--dataset_name {dataset_name}", "--image_column")
    captioned = caption_column in dataset.column_names or default_caption is None
    if captioned:
        _require_column(caption_column, dataset.column_names, f"--dataset_name {dataset_name}", "--caption_column")
    if max_samples is not None:
        dataset = dataset.select(range(min(max_samples, len(dataset))))
    if not len(dataset):
        raise DataError(f"--dataset_name {dataset_name}: the split {split!r} is empty.")
    # One column only: reading a row decodes every column of it.
    pictures = dataset.select_columns([image_column])
    try:
        pictures = pictures.cast_column(image_column, datasets.Image(decode=False))
    except (TypeError, ValueError, NotImplementedError) as error:  # pyarrow's are among these
        raise DataError(
            f"--image_column {image_column!r} of {dataset_name} holds {dataset.features[image_column]}, not images."
        ) from error
    images, num_empty = [], 0
    captions = dataset.select_columns([caption_column])[caption_column] if captioned else []
    for index, caption in enumerate(captions or [default_caption] * len(dataset)):
        caption = caption[0] if isinstance(caption, (list, tuple)) and caption else caption
        if not isinstance(caption, str):
            raise DataError(
                f"--caption_column {caption_column!r} of {dataset_name}: row {index} holds {_brief(caption)}, "
                "not text. Name another column, or remove the row."
            )
        num_empty += not caption.strip()
        images.append(CaptionedImage(DatasetImage(pictures, index, image_column), caption.strip(), f"{index:09d}"))
    warnings = [f"{num_empty} of {len(images)} captions of {dataset_name} are empty."] if num_empty else []
    return Scan(images, warnings, dataset_name)


def hold_out(images: Sequence[CaptionedImage], amount: float) -> tuple[list[CaptionedImage], list[CaptionedImage]]:
    """(training images, held-out images): which are held out follows from their content alone.

    Adding pictures to a folder later moves few of the others, and copies of one picture are never on both sides.

    Args:
        images: all images.
        amount: a share of them if below 1, else their number.

    Raises:
        DataError: nothing would be left on one of the two sides.
    """
    wanted = amount if amount >= 1 else amount * len(images)
    ranks = [hashlib.sha256(image.content_hash().encode()).hexdigest() for image in images]
    count = round(wanted)
    limit = sorted(ranks)[count - 1] if 0 < count <= len(images) else ""
    held_out = [image for image, rank in zip(images, ranks, strict=True) if rank <= limit]
    training = [image for image, rank in zip(images, ranks, strict=True) if rank > limit]
    if not held_out or not training:
        raise DataError(
            f"--validation_split {amount:g} of {len(images)} images leaves {len(training)} to train on and "
            f"{len(held_out)} to validate with; both must be at least 1."
        )
    return training, held_out


def check_images(images: Iterable[CaptionedImage]) -> list[tuple[CaptionedImage, DataError]]:
    """Open every image completely and return those that can't be used, each with its error. Slow: decodes all."""
    bad = []
    for image in images:
        try:
            open_image(image)
        except DataError as error:
            bad.append((image, error))
    return bad


def _walk(folder: Path) -> tuple[list[Path], list[str]]:
    """All visible files below a folder, sorted, and a warning for each folder that could not be entered."""
    files, warnings = [], []

    def refuse(error: OSError) -> None:  # os.walk passes over what it can't read, and images would silently be missing
        raise DataError(f"--train_data_dir: {error.filename} can't be read: {error.strerror}.") from error

    for parent, folders, names in os.walk(folder, onerror=refuse):
        for name in [name for name in folders if os.path.islink(os.path.join(parent, name))]:
            warnings.append(f"{os.path.join(parent, name)} is a link to a folder and was not entered.")
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [Path(parent, name) for name in names if not name.startswith(".")]
    return sorted(files), warnings


def _refuse_two_listings(listings: list[Path]) -> None:
    parents = Counter(path.parent for path in listings)
    for parent, count in parents.items():
        if count > 1:
            raise DataError(
                f"--train_data_dir: both {' and '.join(LISTING_NAMES)} are in {parent}; "
                "which one counts is not clear. Remove one."
            )


def _read_text(path: Path) -> str:
    """The text of a caption or listing, without the byte order mark that some editors write."""
    try:
        return _read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 (byte {error.start}). Save the file as UTF-8.") from error


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: can't be read: {error.strerror}.") from error


def _read_sidecars(image_files: list[Path], folder: Path, default_caption: str | None) -> list[CaptionedImage]:
    images, bare = [], []
    for path in image_files:
        captions = [path.with_suffix(suffix) for suffix in CAPTION_EXTENSIONS if path.with_suffix(suffix).is_file()]
        if not captions and default_caption is None:
            bare.append(path.relative_to(folder).as_posix())
            continue
        caption = _read_text(captions[0]).strip() if captions else default_caption
        if not caption:
            raise DataError(f"{captions[0]}: the caption is empty. Write one, or remove the image.")
        images.append(CaptionedImage(path, caption, path.relative_to(folder).as_posix()))
    if bare:
        raise DataError(
            f"--train_data_dir: {len(bare)} of {len(image_files)} images in {folder} have no caption: {_first(bare)}. "
            f"Put a file ending in {' or '.join(CAPTION_EXTENSIONS)} beside each, or list the images in "
            'metadata.jsonl, one {"file_name": "…", "text": "…"} per line, or give all one with --instance_prompt.'
        )
    return images


def _read_listing(listing: Path, folder: Path, image_column: str, caption_column: str) -> Iterator[CaptionedImage]:
    root = folder.resolve()
    rows = _json_rows(listing) if listing.suffix == ".jsonl" else _csv_rows(listing)
    for place, row in rows:
        column = image_column if image_column in row else "file_name"
        _require_column(column, row, place, "--image_column")
        _require_column(caption_column, row, place, "--caption_column")
        file_name, caption = row[column], row[caption_column]
        if not isinstance(file_name, str) or not file_name.strip():
            raise DataError(f"{place}: {column!r} must be the name of a file, not {_brief(file_name)}.")
        if not isinstance(caption, str):
            raise DataError(f"{place}: the caption {caption_column!r} must be text, not {_brief(caption)}.")
        if not caption.strip():
            raise DataError(f"{place}: the caption {caption_column!r} is empty. Write one, or remove the line.")
        path = _listed_file(file_name, listing, root, place)
        yield CaptionedImage(path, caption.strip(), Path(os.path.relpath(path, folder)).as_posix())


def _listed_file(file_name: str, listing: Path, root: Path, place: str) -> Path:
    """The file a listing names, once it is sure to lie in the folder, links resolved: listings come from strangers."""
    path = listing.parent / file_name
    absolute = PurePosixPath(file_name).is_absolute() or PureWindowsPath(file_name).is_absolute()
    try:
        inside = not absolute and path.resolve().is_relative_to(root)
        found = inside and path.is_file()
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a name with a zero byte, one too long
        raise DataError(f"{place}: {_brief(file_name)} is no usable file name: {error}.") from error
    if not inside:
        raise DataError(f"{place}: {file_name!r} leads out of the folder {root}. Copy the file into the folder.")
    if not found:
        raise DataError(f"{place}: {file_name!r} is listed but there is no such file in {listing.parent}.")
    return path


def _json_rows(listing: Path) -> Iterator[tuple[str, dict]]:
    # Not splitlines(): that also splits at U+2028 and the like, which may stand inside a JSON string.
    for number, line in enumerate(_read_text(listing).split("\n"), start=1):
        if not line.strip():
            continue
        place = f"{listing}:{number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{place}: not JSON ({error}). Each line must be one object.") from error
        if not isinstance(row, dict):
            raise DataError(f'{place}: must be an object like {{"file_name": "…", "text": "…"}}, not {_brief(row)}.')
        yield place, row


def _csv_rows(listing: Path) -> Iterator[tuple[str, dict]]:
    # newline="" leaves line breaks, also those inside quotes, to csv.
    reader = csv.DictReader(StringIO(_read_text(listing), newline=""), strict=True)
    try:
        for row in reader:
            place = f"{listing}:{reader.line_num}"
            if None in row:
                raise DataError(f"{place}: more fields than columns. Put a caption with a comma into quotes.")
            yield place, row
    except csv.Error as error:
        # Counted up to the row before: an open quote is noticed only at the end of the file.
        raise DataError(f"{listing}:{reader.line_num + 1}: not CSV ({error}). Is a quote left open?") from error


def _require_column(column: str, columns: Iterable[str], place: str, flag: str) -> None:
    columns = list(columns)
    if column in columns:
        return
    near = difflib.get_close_matches(column, [str(name) for name in columns], n=1, cutoff=0.0)
    advice = f"Did you mean {flag} {near[0]}?" if near else f"Name the right one with {flag}."
    raise DataError(f"{place}: there is no column {column!r} ({flag}); the columns are {columns}. {advice}")


def _remarks_on_listing(images: list[CaptionedImage], image_files: list[Path], folder: Path) -> list[str]:
    listed = Counter(image.name for image in images)
    remarks = []
    unlisted = [name for path in image_files if (name := path.relative_to(folder).as_posix()) not in listed]
    if unlisted:
        remarks.append(f"{len(unlisted)} images in {folder} are in no listing and are not used: {_first(unlisted)}.")
    twice = [name for name, count in listed.items() if count > 1]
    if twice:
        remarks.append(f"{len(twice)} images in {folder} are listed more than once: {_first(twice)}.")
    return remarks


def _load_dataset(name, config, split, cache_dir):
    """`datasets.load_dataset`, or `load_from_disk` for a folder that `save_to_disk` wrote."""
    import datasets

    folder = Path(name)
    try:
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            dataset = datasets.load_from_disk(name)
            if not isinstance(dataset, datasets.DatasetDict):
                return dataset
            if split not in dataset:
                raise DataError(f"--dataset_name {name}: there is no split {split!r}, only {sorted(dataset)}.")
            return dataset[split]
        return datasets.load_dataset(name, config, split=split, cache_dir=cache_dir)
    except DataError:
        raise
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        config_text = f" --dataset_config_name {config}" if config else ""
        raise DataError(
            f"--dataset_name {name}{config_text}: the split {split!r} can't be loaded: {error} "
            "For a folder with images use --train_data_dir."
        ) from error


def _first(names: Sequence[str], count: int = 5) -> str:
    return ", ".join(names[:count]) + (", …" if len(names) > count else "")


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


# ---------------------------------------------------------------------------------------------------------------------
# 3. Images
# ---------------------------------------------------------------------------------------------------------------------


def open_image(source: CaptionedImage | str | os.PathLike) -> Image.Image:
    """Open an image as 8-bit RGB, upright.

    EXIF orientation is applied, transparency is composited on white, 16-bit greyscale is scaled (Pillow's own
    conversion clips it to white), CMYK is converted. Of an animation the first frame is taken, and a warning says so.

    Raises:
        DataError: the file is missing, empty, cut short, too large, or no image; the message names it.
    """
    record = source if isinstance(source, CaptionedImage) else CaptionedImage(Path(source), "", str(source))
    place = str(record.path)
    data = _image_bytes(record)
    try:
        with Image.open(BytesIO(data)) as image:
            if getattr(image, "n_frames", 1) > 1:
                _warn_once(f"{place}: an animation of {image.n_frames} frames; the first one is used.")
                image.seek(0)
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # damaged files make Pillow's decoders raise nearly anything
        raise _unusable(place, error) from error


def image_size(source: CaptionedImage) -> tuple[int, int]:
    """(width, height) in pixels, upright, read from the header without decoding.

    Raises:
        DataError: as `open_image`, as far as the header shows it.
    """
    try:
        file = source.path if isinstance(source.path, Path) else BytesIO(source.read_bytes())
        with Image.open(file) as image:
            width, height = image.size
            # Pillow turns a TIFF by itself, and gives its upright size from the start.
            turned = image.format != "TIFF" and image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
    except Exception as error:  # see open_image
        raise _unusable(str(source.path), error) from error
    return (height, width) if turned else (width, height)


@dataclass(frozen=True)
class Crop:
    """What SDXL is told about a crop. Sizes are (height, width), the position is (top, left), all in pixels.

    `original_size` is that of the image as opened, before resizing; `crop_top_left` is counted in the resized image.
    """

    original_size: tuple[int, int]
    crop_top_left: tuple[int, int]
    target_size: tuple[int, int]

    @property
    def time_ids(self) -> tuple[int, int, int, int, int, int]:
        """SDXL's micro-conditioning: original height, width, crop top, left, target height, width."""
        return (*self.original_size, *self.crop_top_left, *self.target_size)


def prepare_image(
    image: Image.Image,
    resolution: int,
    center_crop: bool,
    flip: bool,
    interpolation: str = "lanczos",
    rng: np.random.Generator | None = None,
) -> tuple[np.ndarray, Crop]:
    """Resize the shorter side to the resolution, flip, then crop a square.

    Args:
        image: RGB, upright (`open_image`).
        resolution: side of the square, in pixels.
        center_crop: crop the centre; otherwise a place drawn from `rng`.
        flip: mirror left to right, before the crop: its coordinates are those of the mirrored image, as in diffusers.
        interpolation: a name from `INTERPOLATIONS`.
        rng: needed for a random crop only; nothing is drawn where the crop is forced.

    Returns:
        pixels uint8 (H, W, 3), and the crop.

    Raises:
        DataError: unknown interpolation.
        ValueError: a random crop without a generator.
    """
    if interpolation not in INTERPOLATIONS:
        raise DataError(
            f"--image_interpolation_mode is {interpolation!r}; it must be one of {', '.join(sorted(INTERPOLATIONS))}."
        )
    width, height = _resized(image.width, image.height, resolution)
    resized = image if (width, height) == image.size else image.resize((width, height), INTERPOLATIONS[interpolation])
    if flip:
        resized = ImageOps.mirror(resized)
    if center_crop:
        top, left = round((height - resolution) / 2), round((width - resolution) / 2)
    elif (width, height) == (resolution, resolution):
        top, left = 0, 0
    elif rng is None:
        raise ValueError("A random crop needs a generator.")
    else:
        top, left = int(rng.integers(height - resolution + 1)), int(rng.integers(width - resolution + 1))
    pixels = np.asarray(resized.crop((left, top, left + resolution, top + resolution)))
    return pixels, Crop((image.height, image.width), (top, left), (resolution, resolution))


def to_pixel_values(pixels: np.ndarray) -> "torch.Tensor":
    """uint8 (H, W, 3) to float32 (3, H, W) in [-1, 1]."""
    import torch

    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1), dtype=np.float32)) / 127.5 - 1.0


def crop_is_forced(width: int, height: int, center_crop: bool, resolution: int | None = None) -> bool:
    """Whether an image can be cropped in one way only: centred, or square.

    With the resolution given, "square" means after resizing (1000 x 1001 is square at 64); without it, before.
    """
    if resolution is not None:
        width, height = _resized(width, height, resolution)
    return center_crop or width == height


def crops_are_forced(images: Iterable[CaptionedImage], center_crop: bool, resolution: int) -> bool:
    """Whether every image can be cropped in one way only, so that its latents can be cached. Reads headers only."""
    return center_crop or all(crop_is_forced(*image_size(image), center_crop, resolution) for image in images)


def _resized(width: int, height: int, resolution: int) -> tuple[int, int]:
    """(width, height) once the shorter side is the resolution; the longer is rounded down, as torchvision does."""
    if width <= height:
        return resolution, resolution * height // width
    return resolution * width // height, resolution


def _unusable(place: str, error: Exception) -> DataError:
    # Pillow's own message names the buffer in memory.
    reason = "not in an image format that Pillow knows" if isinstance(error, UnidentifiedImageError) else error
    return DataError(f"{place}: can't be used as an image: {str(reason).rstrip('.')}. Replace or remove the file.")


def _image_bytes(record: CaptionedImage) -> bytes:
    data = record.read_bytes()
    if not data:
        raise DataError(f"{record.path}: the file is empty (0 bytes). Replace or remove it.")
    return data


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_deep_to_8_bit(np.asarray(image))).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _deep_to_8_bit(values: np.ndarray) -> np.ndarray:
    """Greyscale of more than 8 bits, (H, W), to uint8 with white staying white. Pillow's conversion clips at 255."""
    low, high = float(values.min()), float(values.max())
    # Integers are of 16 bits here, also where Pillow holds them in 32 (PGM); a true 32-bit image is out of range.
    white = 1.0 if values.dtype.kind == "f" else 65535.0
    if not 0.0 <= low <= high <= white:  # false for NaN too
        raise ValueError(f"its values go from {low:g} to {high:g}, not 0 to {white:g}; save it with 8 or 16 bits")
    return np.round(values.astype(np.float64) * (255.0 / white)).astype(np.uint8)


# ---------------------------------------------------------------------------------------------------------------------
# 4. Caches
# ---------------------------------------------------------------------------------------------------------------------

_FILE_HASHES: dict[tuple[str, int, int], str] = {}  # (path, size, mtime_ns) -> sha256
_MODEL_SUFFIXES = (".safetensors", ".bin", ".json", ".txt", ".model")  # weights, configurations, tokenizers
_SHARD_ENTRIES = 256
_SHARD_BYTES = 64 * 2**20
_OPEN_SHARDS = 1024  # each is a memory map; their number per process is limited


def digest(**what: Any) -> str:
    """sha256, hex, of keyword arguments that JSON can hold; their order does not matter.

    Raises:
        TypeError: a value that JSON can't hold.
    """
    text = json.dumps(what, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def fingerprint(folder_or_file: str | os.PathLike, *names: str) -> str:
    """sha256, hex, of the weights and configurations of a model, to tell one model's cache entries from another's.

    Args:
        folder_or_file: a model's folder, or one file.
        names: files or folders below it that count, such as "vae"; all of it when there are none.

    In the Hugging Face cache a large file is a link to a blob that is named by its sha256: that is taken instead of
    reading the file, and so gives the same fingerprint as a plain copy of the model.

    Raises:
        DataError: one of the names does not exist, or there is nothing to be read.
    """
    root = Path(folder_or_file)
    digests = {}
    for start in [root / name for name in names] or [root]:
        if not start.exists():
            raise DataError(f"{start} does not exist. Is {root} a model in diffusers' format?")
        files = [start] if start.is_file() else [path for path in start.rglob("*") if path.suffix in _MODEL_SUFFIXES]
        for path in files:
            if path.is_file():
                name = path.relative_to(root).as_posix() if path != root else ""
                digests[name] = _blob_name(path) or _file_hash(path)
    if not digests:
        raise DataError(f"{root}: there are no weights or configurations ({', '.join(_MODEL_SUFFIXES)}) in it.")
    return digest(files=digests)


def _blob_name(path: Path) -> str | None:
    """The sha256 that the Hugging Face cache named a linked file by. Small files go by 40-digit git hashes: None."""
    if not path.is_symlink():
        return None
    target = path.resolve()
    is_sha256 = len(target.name) == 64 and set(target.name) <= set("0123456789abcdef")
    return target.name if target.parent.name == "blobs" and is_sha256 else None


def _file_hash(path: Path) -> str:
    try:
        status = path.stat()
        key = (os.path.abspath(path), status.st_size, status.st_mtime_ns)
        if key not in _FILE_HASHES:
            with open(path, "rb") as file:
                _FILE_HASHES[key] = hashlib.file_digest(file, "sha256").hexdigest()
        return _FILE_HASHES[key]
    except OSError as error:
        raise DataError(f"{path}: can't be read: {error.strerror}.") from error


class TensorStore:
    """A store of small dictionaries of tensors, in safetensors shards `shard-*.safetensors` in one folder.

    Entries are addressed by their content (`digest`, `fingerprint`), so an entry is never changed and several
    processes may write the same one. A shard appears complete or not at all. Tensors are read through a memory map
    that each process opens for itself, so the store may be handed to DataLoader workers, forked or spawned.
    """

    def __init__(self, folder: str | os.PathLike):
        """Open the store; the folder is made with the first entry. See `refresh`."""
        self.folder = Path(folder)
        self._index: dict[str, tuple[str, tuple[str, ...]]] = {}  # key -> (shard's file name, names of its tensors)
        self._shards: set[str] = set()
        self._handles: OrderedDict[str, Any] = OrderedDict()
        self._pid = os.getpid()
        self.refresh()

    def __len__(self) -> int:
        return len(self._index)

    def __contains__(self, key: str) -> bool:
        return key in self._index

    def keys(self) -> list[str]:
        """All keys, in no particular order."""
        return list(self._index)

    def refresh(self) -> None:
        """Take in the shards that other processes have written since.

        A damaged shard is set aside under another name with a warning: its entries are then missing and can be encoded
        again. Temporary files that a killed process left behind are passed over.
        """
        for path in sorted(self.folder.glob("shard-*.safetensors")):
            if path.name in self._shards:
                continue
            try:
                entries = _shard_entries(path)
            except ValueError as error:
                logger.warning(f"{path}: a damaged cache file is set aside, its entries will be made again: {error}.")
                with contextlib.suppress(OSError):  # another rank was first, or the cache is read-only
                    os.replace(path, path.with_name(path.name + ".damaged"))
                continue
            except FileNotFoundError:  # another rank has just set it aside
                continue
            self._add(path.name, entries)

    def get(self, key: str) -> dict[str, "torch.Tensor"]:
        """The tensors of one entry, on the CPU, in the type they were put in.

        Raises:
            KeyError: the key is not in the store.
        """
        shard, names = self._index[key]
        handle = self._handle(shard)
        return {name: handle.get_tensor(f"{key}/{name}") for name in names}

    def put(self, entries: dict[str, dict[str, "torch.Tensor"]]) -> None:
        """Write the entries that are new as one shard: complete on the disk when this returns, or not there at all.

        Raises:
            ValueError: an entry without tensors, or a tensor's name with a slash.
            OSError: the disk is full or can't be written; nothing is left behind.
        """
        import torch
        from safetensors.torch import save

        entries = {key: tensors for key, tensors in entries.items() if key not in self._index}
        if not entries:
            return
        if not all(entries.values()) or any("/" in name for tensors in entries.values() for name in tensors):
            raise ValueError("An entry needs at least one tensor, and names without a slash.")
        flat = {
            # A copy of its own for each: safetensors refuses tensors that share memory.
            f"{key}/{name}": tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
            for key, tensors in entries.items()
            for name, tensor in tensors.items()
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.folder / f".tmp-{uuid.uuid4().hex}"
        try:
            # Not save_file(): it makes a file that no other user may read, in a cache that may be shared.
            with open(temporary, "xb") as file:
                file.write(save(flat))
                file.flush()
                os.fsync(file.fileno())
            # The name follows from the keys, so two processes that make the same shard write one file.
            shard = f"shard-{digest(keys=sorted(entries))[:32]}.safetensors"
            os.replace(temporary, self.folder / shard)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_to_disk(self.folder)
        self._add(shard, {key: tuple(tensors) for key, tensors in entries.items()})

    def _add(self, shard: str, entries: dict[str, tuple[str, ...]]) -> None:
        self._shards.add(shard)
        self._handles.pop(shard, None)
        for key, names in entries.items():
            self._index.setdefault(key, (shard, names))

    def _handle(self, shard: str):
        from safetensors import safe_open

        if self._pid != os.getpid():  # a forked worker: its parent's handles are not to be shared
            self._handles, self._pid = OrderedDict(), os.getpid()
        if shard not in self._handles:
            self._handles[shard] = safe_open(self.folder / shard, framework="pt", device="cpu")
            if len(self._handles) > _OPEN_SHARDS:
                self._handles.popitem(last=False)
        self._handles.move_to_end(shard)
        return self._handles[shard]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_handles": OrderedDict()}  # open handles can't go to a spawned worker


def _shard_entries(path: Path) -> dict[str, tuple[str, ...]]:
    """key -> names of its tensors, from a shard's header alone. Without torch.

    Raises:
        ValueError: the header can't be read, or the file's length is not what the header says.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError("it ends within its header")
        header = json.loads(file.read(length))  # both of its errors are ValueErrors
    try:
        header.pop("__metadata__", None)
        end = max(int(tensor["data_offsets"][1]) for tensor in header.values())
        names: dict[str, list[str]] = {}
        for full_name in header:
            key, name = full_name.rsplit("/", 1)
            names.setdefault(key, []).append(name)
    except (AttributeError, KeyError, IndexError, TypeError) as error:
        raise ValueError(f"its header is not that of a shard ({error!r})") from error
    if 8 + length + end != size:
        raise ValueError(f"it has {size} bytes where its header says {8 + length + end}")
    return {key: tuple(sorted(tensor_names)) for key, tensor_names in names.items()}


def sync_to_disk(path: Path) -> None:
    """Flush a file, or the names in a folder, without which a rename may be lost in a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def encode_missing(
    store: TensorStore,
    keys_and_items: Iterable[tuple[str, Any]],
    encode_batch: Callable[[list[Any]], list[dict[str, "torch.Tensor"]]],
    batch_size: int,
    description: str,
) -> int:
    """Encode the items whose keys the store does not have, each key once, and put them there.

    When none is missing `encode_batch` is not called, so a caller may load its encoder in the first call. A shard is
    written every 256 entries or 64 MiB, and when an error or Ctrl-C ends the work: little is lost.

    Args:
        keys_and_items: (key, whatever `encode_batch` takes); all missing ones are held, so keep the items light.
        encode_batch: a list of at most `batch_size` items to as many dictionaries of tensors.
        description: stands before the progress bar.

    Returns:
        The number of entries encoded.

    Raises:
        ValueError: `encode_batch` returned another number of entries than it was given items.
    """
    missing = {key: item for key, item in keys_and_items if key not in store}
    if not missing:
        return 0
    from tqdm.auto import tqdm

    keys = list(missing)
    pending: dict[str, dict[str, torch.Tensor]] = {}
    try:
        with tqdm(total=len(keys), desc=description) as progress:
            for start in range(0, len(keys), batch_size):
                batch = keys[start : start + batch_size]
                encoded = encode_batch([missing[key] for key in batch])
                pending |= dict(zip(batch, encoded, strict=True))
                if len(pending) >= _SHARD_ENTRIES or _num_bytes(pending) >= _SHARD_BYTES:
                    store.put(pending)
                    pending = {}
                progress.update(len(batch))
    finally:
        store.put(pending)
    return len(keys)


def _num_bytes(entries: dict[str, dict[str, "torch.Tensor"]]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensors in entries.values() for tensor in tensors.values())


# ---------------------------------------------------------------------------------------------------------------------
# 5. The training set
# ---------------------------------------------------------------------------------------------------------------------


class TrainingSet:
    """Samples by their number n in the endless stream of epochs; a map-style data set for torch's DataLoader.

    `self[n]` holds

    - with `latents`: `mean` and `std`, float32 (C, h, w), of the encoder's distribution;
      without: `pixel_values`, float32 (3, H, W) in [-1, 1];
    - `time_ids`: float32 (6,), the micro-conditioning of this very crop (`Crop.time_ids`);
    - with `prompts`: the prompt's tensors, under the names they were stored by;
    - `number` (n), `index` (of the image) and `caption`.

    Order, flip and crop follow from (seed, epoch, index) alone: they depend on no worker, batch size or rank.
    """

    def __init__(
        self,
        images: Sequence[CaptionedImage],
        seed: int,
        resolution: int,
        center_crop: bool = False,
        random_flip: bool = False,
        interpolation: str = "lanczos",
        latents: TensorStore | None = None,
        prompts: TensorStore | None = None,
        latent_key: Callable[[str, bool], str] | None = None,
        prompt_key: Callable[[str], str] | None = None,
    ):
        """
        Args:
            images: the captioned images, in an order that is the same for every rank and run.
            seed: of the order, the flips and the crops.
            resolution, center_crop, interpolation: see `prepare_image`.
            random_flip: mirror half of the samples.
            latents: encoded images; with `random_flip` both sides of each (see `latent_items`).
            prompts: encoded prompts.
            latent_key: (content hash of the image, flip) to its key in `latents`.
            prompt_key: caption to its key in `prompts`.

        Raises:
            ValueError: no images, or a store without the function that gives its keys.
        """
        if not images:
            raise ValueError("A training set needs at least one image.")
        if (latents is not None and latent_key is None) or (prompts is not None and prompt_key is None):
            raise ValueError("A store needs the function that gives its keys.")
        self.images, self.seed, self.resolution = images, seed, resolution
        self.center_crop, self.random_flip, self.interpolation = center_crop, random_flip, interpolation
        self.latents, self.prompts = latents, prompts
        # Keys are made here, once: workers can't be handed local functions and need not read the files again.
        self._latent_keys = self._prompt_keys = None
        if latents is not None:
            sides = (False, True) if random_flip else (False,)
            hashes = [image.content_hash() for image in images]
            self._latent_keys = [[latent_key(content_hash, side) for side in sides] for content_hash in hashes]
        if prompts is not None:
            self._prompt_keys = [prompt_key(image.caption) for image in images]

    def __len__(self) -> int:
        """The number of images, which is the length of an epoch; numbers go on beyond it."""
        return len(self.images)

    def __getitem__(self, n: int) -> dict[str, Any]:
        n = int(n)
        epoch, index = sample_address(n, len(self.images), self.seed)
        rng = addressed_rng(self.seed, epoch * len(self.images) + index, "augment")
        # Drawn whether used or not, so that the crop does not depend on whether images are flipped.
        flip = bool(rng.random() < 0.5) and self.random_flip
        sample = self._cached_image(index, flip) if self.latents is not None else self._image(index, flip, rng)
        if self.prompts is not None:
            sample.update(self._entry(self.prompts, self._prompt_keys[index], index))
        return {**sample, "number": n, "index": index, "caption": self.images[index].caption}

    def _image(self, index: int, flip: bool, rng: np.random.Generator) -> dict[str, Any]:
        import torch

        image = open_image(self.images[index])
        pixels, crop = prepare_image(image, self.resolution, self.center_crop, flip, self.interpolation, rng)
        return {
            "pixel_values": to_pixel_values(pixels),
            "time_ids": torch.tensor(crop.time_ids, dtype=torch.float32),
        }

    def _cached_image(self, index: int, flip: bool) -> dict[str, Any]:
        entry = self._entry(self.latents, self._latent_keys[index][flip], index)
        return {name: entry[name].float() for name in ("mean", "std", "time_ids")}

    def _entry(self, store: TensorStore, key: str, index: int) -> dict[str, "torch.Tensor"]:
        if key not in store:
            raise KeyError(f"{self.images[index].name} is not in the cache {store.folder}; it must be encoded first.")
        return store.get(key)


def latent_items(
    images: Iterable[CaptionedImage], latent_key: Callable[[str, bool], str], random_flip: bool
) -> Iterator[tuple[str, tuple[CaptionedImage, bool]]]:
    """(key, (image, flip)) of every latent a training set may ask for: both sides with `random_flip`."""
    for image in images:
        content_hash = image.content_hash()
        for flip in (False, True) if random_flip else (False,):
            yield latent_key(content_hash, flip), (image, flip)


def collate(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Samples to a batch: tensors are stacked to (B, ...), numbers become int64 arrays (B,), captions a list."""
    import torch

    batch: dict[str, Any] = {}
    for name, first in samples[0].items():
        values = [sample[name] for sample in samples]
        if isinstance(first, torch.Tensor):
            batch[name] = torch.stack(values)
        else:
            batch[name] = np.array(values, dtype=np.int64) if isinstance(first, int) else values
    return batch


class AddressedBatches:
    """The sample numbers of each micro-batch of one rank, from `first_step` up to but not including `last_step`.

    The b-th sample of a micro-step has n = ((step * accumulation + micro_step) * world_size + rank) * batch_size + b,
    so that two ranks see in a step what one rank with twice the accumulation sees. A `batch_sampler` for torch's
    DataLoader; a resumed run starts at its step, with nothing to be skipped.
    """

    def __init__(
        self,
        first_step: int,
        last_step: int,
        batch_size: int,
        accumulation: int = 1,
        world_size: int = 1,
        rank: int = 0,
    ):
        """
        Raises:
            ValueError: a negative step, a size below 1, or a rank outside the world.
        """
        if first_step < 0 or min(batch_size, accumulation, world_size) < 1 or not 0 <= rank < world_size:
            raise ValueError(
                f"No batches with {first_step=}, {batch_size=}, {accumulation=}, {world_size=}, {rank=} can be made."
            )
        self.first_step, self.last_step, self.batch_size = first_step, last_step, batch_size
        self.accumulation, self.world_size, self.rank = accumulation, world_size, rank

    def __len__(self) -> int:
        return max(0, self.last_step - self.first_step) * self.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        start = self.first_step * self.accumulation
        for micro_step in range(start, start + len(self)):
            first = (micro_step * self.world_size + self.rank) * self.batch_size
            yield list(range(first, first + self.batch_size))
