"""Everything is encoded once, into stores on disk that later runs find again: prompts and latents.

The stores are keyed by what they depend on and nothing else: the text encoders and their dtype; the autoencoder and
the interpolation. A second run with another learning rate, batch size or output folder encodes nothing, and neither
does one with other aspect-ratio buckets for the images whose shape stays the same.

All ranks encode, each its share, and images are opened while the autoencoder is at work.
"""

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import input_utils
import model_utils
from data_utils import CaptionRules, Framing
from image_utils import to_pixel_values
from store_utils import TensorStore, check_free_space, digest, encode_missing, fingerprint
from table_utils import CaptionedImage

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
        index = model_utils.model_file(str(folder), "model_index.json", args.revision)
        return [str(folder), index.parent.name, args.variant, *subfolders]
    return fingerprint(folder, *subfolders)


def vae_identity(args):
    """The same for the autoencoder, which --pretrained_vae_model_name_or_path may replace."""
    other = args.pretrained_vae_model_name_or_path
    if not other:
        return model_identity(args, "vae")
    return fingerprint(other) if Path(other).is_dir() else other


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
    root, rules = input_utils.cache_folder(args), input_utils.caption_rules(args)
    cuts, held_out_cuts = input_utils.framing(args, images), input_utils.framing(args, held_out, held_out=True)
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
