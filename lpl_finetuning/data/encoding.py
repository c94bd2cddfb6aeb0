"""Everything is encoded once, into stores on disk that later runs find again: prompts and latents.

The stores are keyed by what they depend on and nothing else: the text encoders and their dtype; the autoencoder and
the interpolation. A second run with another learning rate, batch size or output folder encodes nothing, and neither
does one with other aspect-ratio buckets for the images whose shape stays the same.

All ranks encode, each its share, and images are opened while the autoencoder is at work.
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

import torch

from lpl_finetuning.base_model import model_digest, model_file
from lpl_finetuning.data import samples
from lpl_finetuning.data.images import to_pixel_values
from lpl_finetuning.data.samples import CaptionRules, Framing, caption_rules
from lpl_finetuning.data.store import BATCHES_AHEAD, SHARD_BYTES, SHARD_ENTRIES, TensorStore, entry_bytes
from lpl_finetuning.data.tables import CaptionedImage
from lpl_finetuning.files import cache_folder, check_free_space, digest

if TYPE_CHECKING:
    import torch


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
    listed: Callable[[], None] = lambda: None,
) -> int:
    """Encode the items whose keys the store does not have, each key once, and put them there.

    When none is missing `encode_batch` is not called, so a caller may load its encoder in the first call. A shard is
    written every 256 entries or 64 MiB, and when an error or Ctrl-C ends the work: little is lost.

    Several ranks share the work if their stores hold the same entries when they call this: each encodes every
    world_size-th batch. Put a barrier and `refresh` after it.

    Args:
        keys_and_items: (key, whatever `encode_batch` takes); all missing ones are held, so keep the items light.
        encode_batch: a list of at most `batch_size` items to as many dictionaries of tensors.
        description: stands before the progress bar, such as "encoding images"; its last word is what is counted.
        prepare: what `encode_batch` gets instead of an item. Called in threads, at most two batches ahead.
        group: of an item, such as its size; the items of a batch belong to one group.
        show: whether to show a progress bar.
        listed: called once it is known what is missing: a barrier, so that no rank writes while another still looks.

    Returns:
        The number of entries that this rank encoded.

    Raises:
        ValueError: `encode_batch` returned another number of entries than it was given items.
    """
    missing = store._missing(keys_and_items)
    listed()
    batches = _batches(missing, batch_size, group)[rank::world_size]
    num_items = sum(map(len, batches))
    if not num_items:
        return 0
    from tqdm.auto import tqdm

    pending: dict[str, dict[str, torch.Tensor]] = {}
    pending_bytes = 0
    unit = " " + (description.split() or ["items"])[-1]
    prepared = _prepared(([missing[key] for key in batch] for batch in batches), prepare)
    try:
        with contextlib.closing(prepared), tqdm(total=num_items, desc=description, unit=unit, disable=not show) as bar:
            for batch, items in zip(batches, prepared, strict=True):
                encoded = dict(zip(batch, encode_batch(items), strict=True))
                pending |= encoded
                pending_bytes += sum(map(entry_bytes, encoded.values()))
                if len(pending) >= SHARD_ENTRIES or pending_bytes >= SHARD_BYTES:
                    store.put(pending)
                    pending, pending_bytes = {}, 0
                bar.update(len(batch))
    except BaseException:
        with contextlib.suppress(OSError):  # the first error is the one to tell
            store.put(pending)
        raise
    store.put(pending)
    return num_items


def _batches(missing: dict[str, Any], batch_size: int, group: Callable[[Any], Hashable] | None) -> list[list[str]]:
    """Keys in batches of one group each."""
    groups: dict[Hashable, list[str]] = {}
    for key, item in missing.items():
        groups.setdefault(group(item) if group else None, []).append(key)
    return [keys[start : start + batch_size] for keys in groups.values() for start in range(0, len(keys), batch_size)]


def _prepared(batches: Iterable[list[Any]], prepare: Callable[[Any], Any] | None) -> Iterator[list[Any]]:
    """The batches with their items prepared by threads, at most `BATCHES_AHEAD` ahead of the one that is yielded."""
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


ROW_BYTES = 24  # what a store keeps of an entry besides its tensors


@dataclass(frozen=True)
class RunData:
    """What the loop reads: images, how they are cut, what their captions become, and the stores of their encodings."""

    images: Sequence[CaptionedImage]
    held_out: Sequence[CaptionedImage]
    framing: Framing
    held_out_framing: Framing
    captions: CaptionRules
    prompts: TensorStore
    latents: TensorStore
    cached: bool  # whether the images to train on are among the latents; the held-out ones always are

    def prompt(self, caption):
        """The tensors of one prompt."""
        return self.prompts.get(prompt_key(caption))

    def held_out_entry(self, number):
        """(latent entry, prompt entry) of a held-out image."""
        image = self.held_out[number]
        [view] = self.held_out_framing.views(number, image)
        return self.latents.get(view.key(image.content)), self.prompt(self.captions.text(image.caption))


def prompt_key(text):
    """Key of a text in its store."""
    return digest(caption=text)


def model_identity(args, *subfolders):
    """What tells one model's encodings from another's: hashes of its files, or its commit on the Hub."""
    folder = Path(args.pretrained_model_name_or_path)
    if not folder.is_dir():
        index = model_file(str(folder), "model_index.json", args.revision)
        return [str(folder), index.parent.name, args.variant, *subfolders]
    return model_digest(folder, *subfolders)


def vae_identity(args):
    """The same for the autoencoder, which --pretrained_vae_model_name_or_path may replace."""
    other = args.pretrained_vae_model_name_or_path
    if not other:
        return model_identity(args, "vae")
    return model_digest(other) if Path(other).is_dir() else other


def rows_of(columns):
    """{name: (N, ...)} to N dictionaries {name: (...)}."""
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


@torch.no_grad()
def encode_images(cuts, vae):
    """Images as the autoencoder sees them: a list of {"mean", "std" (C, h, w), "time_ids" (6,)} on the CPU.

    cuts: [(pixels uint8 (H, W, 3), Crop)] of one shape. Mean and deviation are kept, not a sample, so that caching
    freezes nothing.
    """
    pixels = torch.stack([to_pixel_values(array) for array, _ in cuts])
    posterior = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
    time_ids = torch.tensor([crop.time_ids for _, crop in cuts], dtype=torch.float32)
    return rows_of({"mean": posterior.mean.float().cpu(), "std": posterior.std.float().cpu(), "time_ids": time_ids})


def latent_bytes(size, vae_config):
    """Bytes of the entry of an image cut to `size`, (height, width); vae_config: the autoencoder's config.json."""
    factor = 2 ** (len(vae_config["block_out_channels"]) - 1)
    values = 2 * vae_config["latent_channels"] * (size[0] // factor) * (size[1] // factor)
    return 4 * (values + 6) + ROW_BYTES


def captions_to_encode(args, rules, *sets):
    """(key, text) of every prompt that a run may ask for."""
    for text in ["", *(args.validation_prompt or [])]:
        yield prompt_key(text), text
    for images in sets:
        for image in images:
            for text in rules.texts(image.captions):
                yield prompt_key(text), text


def images_to_encode(images, cuts):
    """(key, (image, view, how images are cut)) of every latent that a run may ask for; cuts: their `Framing`."""
    for index, image in enumerate(images):
        for view in cuts.views(index, image):
            yield view.key(image.content), (image, view, cuts)


def cut(item):
    """(pixels, Crop) of one of `images_to_encode`'s items."""
    image, view, cuts = item
    return cuts.cut(image, view)


def open_store(folder, accelerator):
    """A store whose shards are known to be sound; every rank checks its share of those that are new."""
    TensorStore(folder).verify(accelerator.process_index, accelerator.num_processes)
    accelerator.wait_for_everyone()
    return TensorStore(folder)


def count_missing(store, items, entry_bytes):
    """(how many of the items, each once, are not in the store; bytes of their entries)."""
    seen, size = set(), 0
    for key, item in items:
        if key not in store and hash(key) not in seen:
            seen.add(hash(key))
            size += entry_bytes(item)
    return len(seen), size


def in_chunks(items, size=65536):
    """Lists of the items, so that a million of them are never held at once."""
    items = iter(items)
    while chunk := list(itertools.islice(items, size)):
        yield chunk


def encode_on_all_ranks(store, items, encode, at_once, description, accelerator, **more):
    """Encode what is missing, each rank its share. items: function that gives them, the same on every rank."""
    world, machine = accelerator.num_processes, int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))
    passes = [(accelerator.process_index, world)]
    if world > machine:  # whose disks may be their own: then each machine encodes what the others kept to themselves
        passes.append((accelerator.local_process_index, machine))
    for rank, size in passes:
        for chunk in in_chunks(items()):
            encode_missing(
                store, chunk, encode, at_once, description, rank=rank, world_size=size,
                listed=accelerator.wait_for_everyone, show=accelerator.is_local_main_process, **more,
            )  # fmt: skip
            accelerator.wait_for_everyone()
            store.refresh()


def fill_caches(
    args, images, held_out, accelerator, prompt_id, prompt_bytes, vae_config, encode_prompts, encode_latents
):
    """Encode what is not on disk yet; returns `RunData`.

    prompt_id: what the encoded prompts depend on, for `digest`; prompt_bytes: of one of them; encode_prompts: function
    from texts to a list of {name: tensor}; encode_latents: the same from [(pixels, Crop)]. Neither is called when
    nothing is missing.

    Raises:
        DataError: the disk has no room for what would be encoded.
    """
    root, rules = cache_folder(args.cache_dir), caption_rules(args)
    cuts, held_out_cuts = samples.framing(args, images), samples.framing(args, held_out, held_out=True)
    cached = cuts.can_be_cached(images)
    latent_id = digest(kind="latents", vae=vae_identity(args), interpolation=args.image_interpolation_mode)
    prompts = open_store(root / "prompts" / digest(**prompt_id)[:16], accelerator)
    latents = open_store(root / "latents" / latent_id[:16], accelerator)

    def texts():
        return captions_to_encode(args, rules, images, held_out)

    def pictures():
        yield from images_to_encode(held_out, held_out_cuts)
        if cached:
            yield from images_to_encode(images, cuts)

    new_texts, text_bytes = count_missing(prompts, texts(), lambda text: prompt_bytes + ROW_BYTES)
    new_pictures, picture_bytes = count_missing(
        latents, pictures(), lambda item: latent_bytes(item[1].size, vae_config)
    )
    accelerator.print(
        f"Caches in {root}: to be encoded are {new_texts:,} captions ({text_bytes / 1e6:,.1f} MB) and "
        f"{new_pictures:,} images ({picture_bytes / 1e6:,.1f} MB); the rest is there"
    )
    if not cached:
        accelerator.print(
            "Random crops: images are encoded in every step; --center_crop or --cache_variants encodes them once"
        )
    check_free_space(root, text_bytes + picture_bytes, "encoded captions and images")
    anywhere = accelerator.reduce(torch.tensor([new_texts, new_pictures], device=accelerator.device), "sum").tolist()
    if anywhere[0]:
        encode_on_all_ranks(prompts, texts, encode_prompts, 16, "encoding captions", accelerator)
    if anywhere[1]:
        at_once = max(1, min(16, (1024 // args.resolution) ** 2))
        encode_on_all_ranks(latents, pictures, encode_latents, at_once, "encoding images", accelerator, prepare=cut,
                            group=lambda item: item[1].size)  # fmt: skip
    return RunData(images, held_out, cuts, held_out_cuts, rules, prompts, latents, cached)
