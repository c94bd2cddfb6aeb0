"""Encoding prompts and latents once, into stores on disk that later runs find again.

Sections:

1. encoding what a store lacks, on one rank;
2. keys and entries of prompts and latents;
3. the caches of a run: all ranks encode, each rank its share, and threads open images ahead of the autoencoder.

The key of a store has what its encodings depend on and nothing else: text encoders and dtype, or autoencoder and
interpolation. So a run with another learning rate, batch size or output folder encodes nothing. With other
aspect-ratio buckets a run encodes only the images whose shape changes.

Importing this file imports no torch.
"""

import contextlib
import itertools
import os
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lpl_finetuning.base_model import BaseModel, idle_weights, model_digest
from lpl_finetuning.data.images import to_pixel_values
from lpl_finetuning.data.samples import CaptionRules, Framing, FramingRules
from lpl_finetuning.data.store import TensorStore, entry_bytes
from lpl_finetuning.data.tables import CaptionedImage
from lpl_finetuning.errors import during
from lpl_finetuning.files import check_free_space, digest, format_bytes

if TYPE_CHECKING:
    import torch

SHARD_ENTRIES = 256  # entries of a shard at most
SHARD_BYTES = 64 * 2**20  # bytes after which a shard is written
BATCHES_AHEAD = 2  # batches that threads prepare while a batch is encoded
ROW_BYTES = 24  # bytes of an entry in a store besides the tensors


# ---------------------------------------------------------------------------------------------------------------------
# 1. Encoding what a store lacks
# ---------------------------------------------------------------------------------------------------------------------


def encode_missing(
    store: TensorStore,
    keys_and_items: Iterable[tuple[str, Any]],
    encode_batch: Callable[[list[Any]], list[dict[str, "torch.Tensor"]]],
    batch_size: int,
    description: str,
    prepare: Callable[[Any], Any] | None = None,
    group: Callable[[Any], Hashable] | None = None,
    rank: int = 0,
    world_size: int = 1,
    show: bool = True,
    barrier: Callable[[], None] = lambda: None,
) -> int:
    """Encode the items whose keys are missing in the store, each key once, and put the encodings there.

    `encode_batch` is not called if no key is missing, so the caller may load the encoder in the first call. A shard is
    written every 256 entries or 64 MiB, and when an error or Ctrl-C ends the work.

    Several ranks share the work if their stores hold the same entries at the start: each rank encodes every
    world_size-th batch. The caller puts a barrier and `refresh` after the call.

    Args:
        store: gets the encodings.
        keys_and_items: (key, item) pairs; all missing items are held in memory, so they should be light.
        encode_batch: function from a list of at most `batch_size` (prepared) items to as many dictionaries of tensors.
        batch_size: items of a batch.
        description: title of the progress bar, such as "encoding images"; the last word is the unit.
        prepare: function of an item whose result `encode_batch` gets instead; called in threads, at most
            `BATCHES_AHEAD` batches ahead.
        group: function of an item, such as its size; the items of a batch belong to one group.
        rank: number of this rank.
        world_size: number of ranks that share the work.
        show: show a progress bar.
        barrier: called once the missing keys are known, so that no rank writes while another rank still looks.

    Returns:
        The number of entries that this rank encoded.

    Raises:
        ValueError: `encode_batch` returned another number of entries than it was given items.
    """
    missing = store.missing_items(keys_and_items)
    barrier()
    batches = _batches(missing, batch_size, group)[rank::world_size]
    num_items = sum(map(len, batches))
    if not num_items:
        return 0
    prepared = _prepared(([missing[key] for key in batch] for batch in batches), prepare)
    with contextlib.closing(prepared):
        _encode_into(store, batches, prepared, encode_batch, description, show)
    return num_items


def _encode_into(
    store: TensorStore,
    batches: list[list[str]],
    prepared: Iterator[list[Any]],
    encode_batch: Callable[[list[Any]], list[dict[str, "torch.Tensor"]]],
    description: str,
    show: bool,
) -> None:
    """Encode batches and put them into the store, a shard at a time; what is encoded is put there on an error too."""
    from tqdm.auto import tqdm

    pending: dict[str, dict[str, torch.Tensor]] = {}
    pending_bytes = 0
    unit = " " + (description.split() or ["items"])[-1]
    total = sum(map(len, batches))
    try:
        with during(description), tqdm(total=total, desc=description, unit=unit, disable=not show) as bar:
            for batch, items in zip(batches, prepared, strict=True):
                encoded = dict(zip(batch, encode_batch(items), strict=True))
                pending |= encoded
                pending_bytes += sum(map(entry_bytes, encoded.values()))
                if len(pending) >= SHARD_ENTRIES or pending_bytes >= SHARD_BYTES:
                    store.put(pending)
                    pending, pending_bytes = {}, 0
                bar.update(len(batch))
    except BaseException:
        with contextlib.suppress(OSError):  # the first error is the one to raise
            store.put(pending)
        raise
    store.put(pending)


def _batches(missing: dict[str, Any], batch_size: int, group: Callable[[Any], Hashable] | None) -> list[list[str]]:
    """Keys in batches; the items of a batch belong to one group."""
    groups: dict[Hashable, list[str]] = {}
    for key, item in missing.items():
        groups.setdefault(group(item) if group else None, []).append(key)
    return [keys[start : start + batch_size] for keys in groups.values() for start in range(0, len(keys), batch_size)]


def _prepared(batches: Iterable[list[Any]], prepare: Callable[[Any], Any] | None) -> Iterator[list[Any]]:
    """The batches with their items prepared by threads, at most `BATCHES_AHEAD` batches ahead of the caller."""
    if prepare is None:
        yield from batches
        return
    pool = ThreadPoolExecutor(os.cpu_count())
    ahead: deque = deque()
    try:
        for batch in batches:
            ahead.append([pool.submit(prepare, item) for item in batch])
            if len(ahead) > BATCHES_AHEAD:
                yield [future.result() for future in ahead.popleft()]
        while ahead:
            yield [future.result() for future in ahead.popleft()]
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


# ---------------------------------------------------------------------------------------------------------------------
# 2. Keys and entries
# ---------------------------------------------------------------------------------------------------------------------


def prompt_key(text: str) -> str:
    """The key of a text in a store of prompts."""
    return digest(caption=text)


def model_identity(base: BaseModel, *parts: str) -> Any:
    """What distinguishes encodings of one model from another's: hashes of its files, or its commit on the Hub."""
    folder = Path(base.name)
    if not folder.is_dir():
        return [base.name, base.file("model_index.json").parent.name, base.variant, *parts]
    return model_digest(folder, *parts, without=idle_weights(base, *parts))


def vae_identity(base: BaseModel) -> Any:
    """What distinguishes encodings of one autoencoder from another's; "pixels" for a model in pixel space."""
    if base.family.autoencoder is None:
        return "pixels"
    if not base.vae:
        return model_identity(base, base.family.autoencoder.name)
    place, idle = base.place(base.family.autoencoder.name), idle_weights(base, base.family.autoencoder.name)
    folder = Path(place.name, place.subfolder)
    return model_digest(folder, without=idle) if folder.is_dir() else folder.as_posix()


def captions_to_encode(
    rules: CaptionRules, *sets: Sequence[CaptionedImage], prompts: Iterable[str] = ()
) -> Iterator[tuple[str, str]]:
    """(key, text) of every prompt that a run may use.

    Args:
        rules: how captions change.
        sets: images whose captions are encoded.
        prompts: further texts; the empty text is always among the prompts.
    """
    for text in ["", *prompts]:
        yield prompt_key(text), text
    for images in sets:
        for image in images:
            for text in rules.texts(image.captions):
                yield prompt_key(text), text


def images_to_encode(images: Sequence[CaptionedImage], framing: Framing) -> Iterator[tuple[str, tuple]]:
    """(key, (image, view, framing)) of every latent that a run may use."""
    for index, image in enumerate(images):
        for view in framing.views(index, image):
            yield view.key(image.pixels), (image, view, framing)


def cut(item: tuple) -> tuple:
    """(pixels uint8 (H, W, 3), `Crop`) of an item of `images_to_encode`."""
    image, view, framing = item
    return framing.cut(image, view)


def encode_images(cuts: list[tuple], vae: "torch.nn.Module") -> list[dict[str, "torch.Tensor"]]:
    """The autoencoder's distribution of each image: {"mean", "std" (C, h, w), "time_ids" (6,)}, on the CPU.

    The store holds mean and deviation instead of a sample, so that caching freezes nothing.

    Args:
        cuts: (pixels uint8 (H, W, 3), `Crop`) of each image, all of one shape.
        vae: the autoencoder.
    """
    import torch

    with torch.no_grad():
        pixels = torch.stack([to_pixel_values(array) for array, _ in cuts])
        posterior = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
        time_ids = torch.tensor([crop.time_ids for _, crop in cuts], dtype=torch.float32)
        return rows_of(
            {"mean": posterior.mean.float().cpu(), "std": posterior.std.float().cpu(), "time_ids": time_ids}
        )


def rows_of(columns: dict[str, "torch.Tensor"]) -> list[dict[str, "torch.Tensor"]]:
    """N dictionaries {name: (...)} from one dictionary {name: (N, ...)}."""
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def latent_bytes(size: tuple[int, int], channels: int, pixels: int) -> int:
    """Bytes of the store's entry for an image that is cut to `size`.

    Args:
        size: (height, width) in px.
        channels: channels of the latents.
        pixels: pixels of an image per latent pixel, in each direction.
    """
    values = 2 * channels * (size[0] // pixels) * (size[1] // pixels)
    return 4 * (values + 6) + ROW_BYTES


# ---------------------------------------------------------------------------------------------------------------------
# 3. The caches of a run
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EncodingSettings:
    """What is encoded, and where the encodings are kept.

    Attributes:
        folder: the cache folder.
        framing_rules: how images are cut.
        caption_rules: how captions change.
        prompts: texts that are encoded besides the captions.
        vae_identity: what distinguishes encodings of the autoencoder from another's; values that JSON can hold.
        pixels_per_latent: pixels of an image per latent pixel, in each direction.
    """

    folder: Path
    framing_rules: FramingRules
    caption_rules: CaptionRules
    prompts: Sequence[str] = ()
    vae_identity: Any = None
    pixels_per_latent: int = 8


@dataclass(frozen=True)
class RunData:
    """What the training loop reads.

    Attributes:
        images: images to train on.
        held_out: images to validate with.
        framing, held_out_framing: how the images are cut.
        captions: how captions change.
        prompts, latents: stores of the encodings.
        cached: whether `latents` holds the images to train on; it always holds the held-out images.
    """

    images: Sequence[CaptionedImage]
    held_out: Sequence[CaptionedImage]
    framing: Framing
    held_out_framing: Framing
    captions: CaptionRules
    prompts: TensorStore
    latents: TensorStore
    cached: bool

    def prompt(self, caption: str) -> dict[str, "torch.Tensor"]:
        """The tensors of a prompt."""
        return self.prompts.get(prompt_key(caption))

    def held_out_entry(self, number: int) -> tuple[dict[str, "torch.Tensor"], dict[str, "torch.Tensor"]]:
        """(latent entry, prompt entry) of a held-out image."""
        image = self.held_out[number]
        [view] = self.held_out_framing.views(number, image)
        return self.latents.get(view.key(image.pixels)), self.prompt(self.captions.text(image.caption))


def fill_caches(
    settings: EncodingSettings,
    images: Sequence[CaptionedImage],
    held_out: Sequence[CaptionedImage],
    accelerator: Any,
    prompt_id: dict[str, Any],
    prompt_bytes: int,
    latent_channels: int,
    encode_prompts: Callable[[list[str]], list[dict[str, "torch.Tensor"]]],
    encode_latents: Callable[[list[tuple]], list[dict[str, "torch.Tensor"]]],
) -> RunData:
    """Encode the prompts and latents of a run that are not on disk yet.

    Neither of the two functions is called if nothing is missing.

    Args:
        settings: what is encoded, and where the encodings are kept.
        images: images to train on; latents are cached if each image has a fixed number of views.
        held_out: images to validate with.
        accelerator: accelerate's.
        prompt_id: what encoded prompts depend on; values that JSON can hold.
        prompt_bytes: bytes of an encoded prompt.
        latent_channels: channels of the latents.
        encode_prompts: function from texts to tensors.
        encode_latents: function from [(pixels, `Crop`)] to tensors.

    Raises:
        DataError: the disk has no room for the encodings.
    """
    root, rules, framing_rules = settings.folder, settings.caption_rules, settings.framing_rules
    framing, held_out_framing = framing_rules.framing(images), framing_rules.framing(held_out, held_out=True)
    cached = framing.can_be_cached(images)
    mode = framing_rules.image_interpolation_mode
    latent_id = digest(kind="latents", vae=settings.vae_identity, interpolation=mode)
    prompts = open_store(root / "prompts" / digest(**prompt_id)[:16], accelerator)
    latents = open_store(root / "latents" / latent_id[:16], accelerator)

    def texts():
        return captions_to_encode(rules, images, held_out, prompts=settings.prompts)

    def pictures():
        yield from images_to_encode(held_out, held_out_framing)
        if cached:
            yield from images_to_encode(images, framing)

    def picture_bytes(item):
        return latent_bytes(item[1].size, latent_channels, settings.pixels_per_latent)

    new_texts = count_missing(prompts, texts(), lambda text: prompt_bytes + ROW_BYTES)
    new_pictures = count_missing(latents, pictures(), picture_bytes)
    _announce(accelerator, root, new_texts, new_pictures, cached)
    new_texts, new_pictures = _on_any_rank(accelerator, new_texts[0], new_pictures[0])
    if new_texts:
        encode_on_all_ranks(prompts, texts, encode_prompts, 16, "encoding captions", accelerator)
    if new_pictures:
        at_once = max(1, min(16, (1024 // framing_rules.resolution) ** 2))
        encode_on_all_ranks(latents, pictures, encode_latents, at_once, "encoding images", accelerator, prepare=cut,
                            group=lambda item: item[1].size)  # fmt: skip
    return RunData(images, held_out, framing, held_out_framing, rules, prompts, latents, cached)


def _announce(accelerator: Any, root: Path, texts: tuple[int, int], pictures: tuple[int, int], cached: bool) -> None:
    """Print what will be encoded, as (entries, bytes); DataError where the disk has no room for it."""
    accelerator.print(
        f"Caches in {root}: to be encoded are {texts[0]:,} captions ({format_bytes(texts[1])}) and "
        f"{pictures[0]:,} images ({format_bytes(pictures[1])}); the rest is there"
    )
    if not cached:
        accelerator.print(
            "Random crops: images are encoded in every step; --center_crop or --cache_variants encodes them once"
        )
    check_free_space(root, texts[1] + pictures[1], "encoded captions and images")


def open_store(folder: Path, accelerator: Any) -> TensorStore:
    """A store of sound shards. Each rank checks its share of the shards that were not checked before."""
    TensorStore(folder).verify(accelerator.process_index, accelerator.num_processes)
    accelerator.wait_for_everyone()
    return TensorStore(folder)


def count_missing(
    store: TensorStore, items: Iterable[tuple[str, Any]], entry_bytes: Callable[[Any], int]
) -> tuple[int, int]:
    """(number of the items that the store lacks, bytes of their entries). An item with the same key counts once."""
    seen, size = set(), 0
    for key, item in items:
        if key not in store and hash(key) not in seen:
            seen.add(hash(key))
            size += entry_bytes(item)
    return len(seen), size


def _on_any_rank(accelerator: Any, *counts: int) -> list[int]:
    """The sums of some counts over all ranks."""
    import torch

    return accelerator.reduce(torch.tensor(counts, device=accelerator.device), "sum").tolist()


def encode_on_all_ranks(
    store: TensorStore,
    items: Callable[[], Iterable[tuple[str, Any]]],
    encode: Callable[[list[Any]], list[dict[str, "torch.Tensor"]]],
    at_once: int,
    description: str,
    accelerator: Any,
    **options: Any,
) -> None:
    """Encode what the store lacks, each rank a share.

    Args:
        store: gets the encodings.
        items: function that gives (key, item) pairs, the same on every rank.
        encode: function from a list of items to tensors.
        at_once: items of a batch.
        description: title of the progress bar.
        accelerator: accelerate's.
        options: for `encode_missing`.
    """
    world, machine = accelerator.num_processes, int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))
    passes = [(accelerator.process_index, world)]
    if world > machine:  # the machines may not share a disk: then each machine encodes what it lacks after pass 1
        passes.append((accelerator.local_process_index, machine))
    for rank, size in passes:
        for chunk in in_chunks(items()):
            encode_missing(
                store, chunk, encode, at_once, description, rank=rank, world_size=size,
                barrier=accelerator.wait_for_everyone, show=accelerator.is_local_main_process, **options,
            )  # fmt: skip
            accelerator.wait_for_everyone()
            store.refresh()


def in_chunks(items: Iterable[Any], size: int = 65536) -> Iterator[list[Any]]:
    """Lists of at most `size` items; a million items are never in memory at once."""
    items = iter(items)
    while chunk := list(itertools.islice(items, size)):
        yield chunk
