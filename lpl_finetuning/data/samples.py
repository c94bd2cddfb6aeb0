"""The samples of a training run: addressed randomness, captions, framing, order and batches.

Sections:

1. addressed randomness: every random number follows from (seed, number of the sample), never from a stream's state;
2. captions: the text that an image gets in an epoch;
3. framing: how images are cut, and which cuts can be encoded once;
4. order: which image is the n-th sample; every batch holds images of one shape;
5. the training set, and the sample numbers of each rank's batches.

`data.scan` finds images, `data.tables` holds them, `data.images` opens and cuts them, `data.store` holds encodings.
Importing this file imports neither torch nor datasets, so that a script can check its data before the slow imports.

Shape suffixes: B samples in a batch, C channels, H height, W width; h, w height and width in latent pixels; N images.
Sizes are (height, width) and positions are (top, left), in pixels unless stated otherwise.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lpl_finetuning.data.images import (
    assign_buckets,
    auto_buckets,
    crop_is_forced,
    open_image,
    parse_buckets,
    prepare_image,
    to_pixel_values,
)
from lpl_finetuning.data.store import TensorStore
from lpl_finetuning.data.tables import CaptionedImage, sizes_of
from lpl_finetuning.errors import DataError
from lpl_finetuning.files import digest

if TYPE_CHECKING:
    import torch


# A seed means these numbers: a changed number changes every run. Add streams at the end, and never renumber.
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
    "caption": 12,
    "tags": 13,
    "crop": 14,
    "slots": 15,
    "phase": 16,
    "one_step": 17,
    "shift": 18,
    "erasing": 19,
    "erasing_place": 20,
    "classifier_dropout": 21,
    "lpl_augment": 22,
}


# ---------------------------------------------------------------------------------------------------------------------
# 1. Addressed randomness
# ---------------------------------------------------------------------------------------------------------------------


def addressed_rng(seed: int, n: int, stream: str) -> np.random.Generator:
    """A generator whose numbers follow from (seed, stream, n) alone.

    The generator is Philox with (seed, stream) as key and n in the highest of four 64-bit counter words. Philox counts
    from the lowest word up, so two addresses share no numbers before 2**192 draws.

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
    """Standard normal noise, float32 (B, *shape) on the CPU. Row b follows from (seed, numbers[b]) alone."""
    import torch

    rows = [addressed_rng(seed, int(n), stream).standard_normal(tuple(shape), dtype=np.float32) for n in numbers]
    return torch.from_numpy(np.stack(rows)) if rows else torch.empty((0, *shape))


def addressed_uniform(seed: int, numbers: Iterable[int], stream: str) -> np.ndarray:
    """Uniform numbers in [0, 1), float64 (B,). Entry b follows from (seed, numbers[b]) alone."""
    return np.array([addressed_rng(seed, int(n), stream).random() for n in numbers], dtype=np.float64)


def stratified_uniform(seed: int, numbers: Iterable[int], batch_size: int, per_step: int) -> np.ndarray:
    """Uniform numbers in [0, 1), float64 (B,), spread evenly within each optimizer step.

    Systematic sampling: the `per_step` samples of a step, over all micro-steps and ranks, lie at
    frac(u + s / per_step). u is one uniform number per step, and s runs over 0..per_step - 1. So an interval of length
    p gets floor or ceil of p * per_step samples, while each single sample is uniform. The strata s are dealt out so
    that the samples of one micro-batch are spread evenly too.

    Args:
        seed: 0 <= seed < 2**64.
        numbers: numbers of the samples, as `AddressedBatches` counts them.
        batch_size: samples of a micro-batch.
        per_step: samples of an optimizer step, a multiple of batch_size.
    """
    steps, places = np.divmod(np.fromiter(numbers, dtype=np.int64), per_step)
    micro_batches, rows = np.divmod(places, batch_size)
    strata = rows * (per_step // batch_size) + micro_batches
    return (addressed_uniform(seed, steps, "timestep_offset") + strata / per_step) % 1


def epoch_order(seed: int, epoch: int, size: int) -> np.ndarray:
    """The order of the images in an epoch: a permutation of range(size), int64 (size,)."""
    return addressed_rng(seed, epoch, "order").permutation(size)


# ---------------------------------------------------------------------------------------------------------------------
# 2. Captions
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CaptionRules:
    """How captions change before they are encoded. Each field is the flag of that name.

    A tag is a part of a caption between commas.

    Attributes:
        trigger_word: word put before every caption, with a comma, unless the caption begins with it as a whole word.
            A tag that equals the trigger word moves to the front.
        shuffle_tags: shuffle the tags in each epoch.
        keep_tags: number of tags at the front that stay in place.
        tag_shuffles: number of orders of each caption that are encoded; each epoch draws one of them.
    """

    trigger_word: str = ""
    shuffle_tags: bool = False
    keep_tags: int = 0
    tag_shuffles: int = 8

    def text(self, caption: str, shuffle: int = 0) -> str:
        """The text of a caption. shuffle: number of the order of the tags, 0 <= shuffle < tag_shuffles."""
        own = {tag.lower() for tag in _tags(self.trigger_word)}
        if self.shuffle_tags:
            tags = _tags(caption)
            kept, moved = ([tag for tag in part if tag.lower() not in own]
                           for part in (tags[: self.keep_tags], tags[self.keep_tags :]))  # fmt: skip
            if own and not kept and moved and self._begins(moved[0]):  # such as "sks dog on a beach"
                kept, moved = moved[:1], moved[1:]
            # The address is the caption, not the seed, so that other runs find the same orders in the cache.
            rng = addressed_rng(int(digest(caption=caption)[:15], 16), shuffle, "tags")
            caption = ", ".join([*kept, *(moved[place] for place in rng.permutation(len(moved)))])
        if self._begins(caption):
            return caption
        others = [tag for tag in _tags(caption) if tag.lower() not in own]
        if len(others) < len(_tags(caption)):
            caption = ", ".join(others)
        return f"{self.trigger_word}, {caption}" if caption else self.trigger_word

    def _begins(self, caption: str) -> bool:
        """Whether a caption begins with the trigger word as a whole word; true without a trigger word."""
        length = len(self.trigger_word)
        same = caption[:length].lower() == self.trigger_word.lower()
        return same and not (length and caption[length : length + 1].isalnum())

    def texts(self, captions: Iterable[str]) -> list[str]:
        """Every text that the captions of an image may become, each once."""
        orders = range(self.tag_shuffles if self.shuffle_tags else 1)
        return list(dict.fromkeys(self.text(caption, order) for caption in captions for order in orders))

    def draw(self, captions: Sequence[str], seed: int, address: int) -> str:
        """The text of one sample. address: epoch * N + index of the image."""
        if len(captions) == 1 and not self.shuffle_tags:
            return self.text(captions[0])
        rng = addressed_rng(seed, address, "caption")
        caption = captions[int(rng.integers(len(captions)))]
        return self.text(caption, int(rng.integers(self.tag_shuffles)))


def _tags(caption: str) -> list[str]:
    """The parts of a caption between commas, without empty parts."""
    return [tag for part in caption.split(",") if (tag := part.strip())]


# ---------------------------------------------------------------------------------------------------------------------
# 3. Framing
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class View:
    """One way to cut an image.

    Attributes:
        size: (height, width) of the cut image.
        flip: mirror left to right.
        crop: number of a random crop. None for the centre, for a forced crop, and for a place that each epoch draws.
    """

    size: tuple[int, int]
    flip: bool = False
    crop: int | None = None

    def key(self, pixels: str) -> str:
        """The key of the view in a store of latents. pixels: what identifies the image (`CaptionedImage.pixels`)."""
        height, width = self.size
        crop = "" if self.crop is None else f"-crop{self.crop}"
        return f"{pixels}-{height}x{width}{crop}{'-flipped' if self.flip else ''}"


@dataclass(frozen=True)
class Framing:
    """How the images of a run are cut.

    Attributes:
        sizes: targets, (height, width) each: one size, or the aspect-ratio buckets.
        buckets: index of each image's size, int (N,).
        center_crop: cut the centre instead of a random place.
        random_flip: mirror half of the samples.
        interpolation: a name from `data.images.INTERPOLATIONS`.
        crops: number of random crops of each image that can be encoded once; 0 draws a new crop in each epoch.
    """

    sizes: tuple[tuple[int, int], ...]
    buckets: np.ndarray
    center_crop: bool = False
    random_flip: bool = False
    interpolation: str = "lanczos"
    crops: int = 0

    def draw(self, index: int, image: CaptionedImage, seed: int, address: int) -> tuple[View, np.random.Generator]:
        """(view of a sample, generator of the crop).

        Args:
            index: of the image in the data set.
            image: the image.
            seed: of the run.
            address: epoch * N + index of the image.
        """
        rng = addressed_rng(seed, address, "augment")
        # The flip is always drawn, so that the crop does not depend on --random_flip.
        flip = bool(rng.random() < 0.5) and self.random_flip
        size = self.sizes[self.buckets[index]]
        if self.crops and not crop_is_forced(image.size, size, self.center_crop):
            return self._numbered(size, int(rng.integers(self.crops))), rng
        return View(size, flip), rng

    def views(self, index: int, image: CaptionedImage) -> list[View]:
        """Every view of an image that `draw` may give. All of them can be encoded once if `can_be_cached`."""
        size = self.sizes[self.buckets[index]]
        if self.crops and not crop_is_forced(image.size, size, self.center_crop):
            return [self._numbered(size, crop) for crop in range(self.crops)]
        return [View(size, flip) for flip in ((False, True) if self.random_flip else (False,))]

    def _numbered(self, size, crop):
        return View(size, self.random_flip and crop % 2 == 1, crop)  # every second crop is mirrored

    def cut(self, image: CaptionedImage, view: View, rng: np.random.Generator | None = None):
        """(pixels uint8 (H, W, 3), `Crop`) of a view. rng: generator of a random crop without a number.

        Raises:
            DataError: the image can't be read, or has changed since the scan.
        """
        if view.crop is not None:
            rng = addressed_rng(int(image.content[:15], 16), view.crop, "crop")
        pixels = open_image(image.read_bytes(), image.place)
        center = self.center_crop or rng is None
        return prepare_image(pixels, view.size, center, view.flip, self.interpolation, rng)

    def can_be_cached(self, images: Sequence[CaptionedImage]) -> bool:
        """Whether each image has a fixed number of views, which can be encoded once."""
        if self.center_crop or self.crops:
            return True
        pairs = np.unique(np.column_stack([sizes_of(images), self.buckets]), axis=0)
        return all(
            crop_is_forced((height, width), self.sizes[bucket], False) for height, width, bucket in pairs.tolist()
        )


@dataclass(frozen=True)
class FramingRules:
    """How a run cuts images, whichever images these are. Each field is the flag of that name."""

    resolution: int
    aspect_ratio_buckets: str | None = None
    center_crop: bool = False
    cache_variants: int = 0
    random_flip: bool = False
    image_interpolation_mode: str = "lanczos"

    def sizes(self) -> tuple[tuple[int, int], ...]:
        """The targets, (height, width) each: the square of the resolution, or the aspect-ratio buckets.

        Raises:
            DataError: --aspect_ratio_buckets, or --resolution for automatic buckets, is not usable.
        """
        if not self.aspect_ratio_buckets:
            return ((self.resolution, self.resolution),)
        if self.aspect_ratio_buckets == "auto":
            return auto_buckets(self.resolution)
        return parse_buckets(self.aspect_ratio_buckets)

    def largest_size(self) -> tuple[int, int]:
        """The target with the most pixels, (height, width)."""
        return max(self.sizes(), key=lambda size: size[0] * size[1])

    def framing(self, images: Sequence[CaptionedImage], held_out: bool = False) -> Framing:
        """The framing of some images. held_out: cut each image in one way only, the centre without a flip."""
        sizes = self.sizes()
        return Framing(
            sizes,
            assign_buckets(sizes_of(images), sizes) if len(images) else np.zeros(0, np.int16),
            center_crop=self.center_crop or held_out,
            random_flip=self.random_flip and not held_out,
            interpolation=self.image_interpolation_mode,
            crops=0 if held_out else self.cache_variants,
        )


# ---------------------------------------------------------------------------------------------------------------------
# 4. Order
# ---------------------------------------------------------------------------------------------------------------------


class SampleOrder:
    """Which image is the n-th sample of the endless stream of epochs.

    Each bucket has a stream of its own: the permutations of its images in successive epochs, cut into batches. So
    every batch is full and of one shape, and an image comes once in each epoch of its bucket's stream. Only a batch at
    the seam of two epochs holds images of both.

    An epoch deals out the batches of all buckets in random order, as many of each bucket as the bucket's images fill.
    That number is rounded up in some epochs and down in others, by a random phase of the bucket. So on average over
    seeds each image is used once per epoch. Everything follows from (seed, epoch) alone.
    """

    def __init__(self, seed: int, batch_size: int, buckets: np.ndarray):
        """
        Args:
            seed: seed of the permutations.
            batch_size: samples of a micro-batch.
            buckets: bucket of each image, int (N,).

        Raises:
            ValueError: no images.
        """
        if not len(buckets):
            raise ValueError("A training set needs at least one image.")
        self.seed, self.batch_size = seed, batch_size
        names, self.buckets, counts = np.unique(buckets, return_inverse=True, return_counts=True)  # of buckets in use
        self.counts = counts.astype(np.int64)  # images in each bucket
        # Without phases a bucket with fewer images than a batch would have a batch in the first epoch of every run.
        phases = [addressed_rng(seed, int(name), "phase").integers(batch_size) for name in names]
        self.phases = np.array(phases, dtype=np.int64)
        self.starts = np.concatenate([[0], np.cumsum(self.counts)])
        self._members = functools.lru_cache(maxsize=4)(self._epoch_members)
        self._slots = functools.lru_cache(maxsize=4)(self._epoch_slots)

    def __getstate__(self) -> dict:  # a spawned worker makes its own caches
        return {name: value for name, value in self.__dict__.items() if name not in ("_members", "_slots")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._members = functools.lru_cache(maxsize=4)(self._epoch_members)
        self._slots = functools.lru_cache(maxsize=4)(self._epoch_slots)

    def __len__(self) -> int:
        return len(self.buckets)

    def __getitem__(self, n: int) -> tuple[int, int]:
        """(epoch, index) of the n-th sample.

        Raises:
            ValueError: n is negative.
        """
        if n < 0:
            raise ValueError(f"There is no sample {n}.")
        batch, row = divmod(n, self.batch_size)
        bucket, number = self._batch(batch)
        epoch, place = divmod(number * self.batch_size + row, int(self.counts[bucket]))
        return epoch, int(self._members(epoch)[self.starts[bucket] + place])

    def _batch(self, batch: int) -> tuple[int, int]:
        """(bucket, number in the bucket's stream) of a micro-batch, by the number among the batches of all buckets."""
        if len(self.counts) == 1:
            return 0, batch
        epoch = batch * self.batch_size // len(self.buckets)  # a guess; each bucket may be off by up to one batch
        while self._begun(epoch).sum() > batch:
            epoch -= 1
        while self._begun(epoch + 1).sum() <= batch:
            epoch += 1
        buckets, numbers = self._slots(epoch)
        place = batch - int(self._begun(epoch).sum())
        return int(buckets[place]), int(numbers[place])

    def _begun(self, epoch: int) -> np.ndarray:
        """Number of batches of each bucket that are dealt out before an epoch."""
        return (epoch * self.counts + self.phases) // self.batch_size

    def _epoch_slots(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(bucket, number in the bucket's stream) of the batches of an epoch, in order; two arrays."""
        first, end = self._begun(epoch), self._begun(epoch + 1)
        buckets = np.repeat(np.arange(len(self.counts)), end - first)
        addressed_rng(self.seed, epoch, "slots").shuffle(buckets)
        numbers = np.empty_like(buckets)
        for bucket in range(len(self.counts)):
            numbers[buckets == bucket] = np.arange(first[bucket], end[bucket])
        return buckets, numbers

    def _epoch_members(self, epoch: int) -> np.ndarray:
        """Indices of all images, int32 (N,): bucket after bucket, within a bucket in the order of the epoch."""
        order = epoch_order(self.seed, epoch, len(self.buckets))
        return order[np.argsort(self.buckets[order], kind="stable")].astype(np.int32)


# ---------------------------------------------------------------------------------------------------------------------
# 5. The training set
# ---------------------------------------------------------------------------------------------------------------------


class TrainingSet:
    """A map-style data set for torch's DataLoader: samples by the number n in the endless stream of epochs.

    `self[n]` holds

    - with `latents`: `mean` and `std` of the encoder's distribution, float32 (C, h, w);
      without: `pixel_values`, float32 (3, H, W) in [-1, 1];
    - `time_ids`: micro-conditioning of the sample's crop (`Crop.time_ids`), float32 (6,);
    - with `prompts`: the tensors of the prompt, by the names in the store;
    - `number` (n), `index` of the image, and the drawn `caption`.

    Order, caption, flip and crop follow from (seed, epoch, index) alone, and are the same on every worker and rank.
    """

    def __init__(
        self,
        images: Sequence[CaptionedImage],
        order: SampleOrder,
        framing: Framing,
        captions: CaptionRules = CaptionRules(),
        latents: TensorStore | None = None,
        prompts: TensorStore | None = None,
        prompt_key: Callable[[str], str] | None = None,
    ):
        """
        Args:
            images: captioned images, in the same order on every rank and in every run.
            order: which image is which sample.
            framing: how images are cut.
            captions: how captions change.
            latents: store of encoded images, by `View.key`; without it the images are opened and cut.
            prompts: store of encoded prompts.
            prompt_key: key of a text in `prompts`.
        """
        self.images, self.order, self.framing, self.captions = images, order, framing, captions
        self.latents, self.prompts, self.prompt_key = latents, prompts, prompt_key

    def __len__(self) -> int:
        """The number of images, which is the length of an epoch. Sample numbers go on beyond it."""
        return len(self.images)

    def __getitem__(self, n: int) -> dict[str, Any]:
        n = int(n)
        epoch, index = self.order[n]
        image, address = self.images[index], epoch * len(self.images) + index
        caption = self.captions.draw(image.captions, self.order.seed, address)
        view, rng = self.framing.draw(index, image, self.order.seed, address)
        sample = self._pixels(image, view, rng) if self.latents is None else self._latents(image, view)
        if self.prompts is not None:
            sample.update(self._entry(self.prompts, self.prompt_key(caption), image))
        return {**sample, "number": n, "index": index, "caption": caption}

    def _pixels(self, image: CaptionedImage, view: View, rng: np.random.Generator) -> dict[str, Any]:
        import torch

        pixels, crop = self.framing.cut(image, view, rng)
        time_ids = torch.tensor(crop.time_ids, dtype=torch.float32)
        return {"pixel_values": to_pixel_values(pixels), "time_ids": time_ids}

    def _latents(self, image: CaptionedImage, view: View) -> dict[str, Any]:
        entry = self._entry(self.latents, view.key(image.pixels), image)
        return {name: entry[name].float() for name in ("mean", "std", "time_ids")}

    def _entry(self, store: TensorStore, key: str, image: CaptionedImage) -> dict[str, "torch.Tensor"]:
        try:
            return store.get(key)
        except KeyError as error:
            raise KeyError(f"{image.name} is not in the cache {store.folder}; it must be encoded first.") from error


def collate(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The batch of some samples: tensors (B, ...), numbers as int64 arrays (B,), captions as a list."""
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
