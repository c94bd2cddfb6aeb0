"""Everything is encoded once, into stores on disk that later runs find again: prompts and latents.

The stores are keyed by what they depend on and nothing else: the text encoders and their dtype; the autoencoder,
resolution and interpolation. A second run with another learning rate or output folder encodes nothing.
"""

import os
from pathlib import Path

import torch

import cli_utils
from data_utils import (
    TensorStore,
    crops_are_forced,
    digest,
    encode_missing,
    fingerprint,
    latent_items,
    open_image,
    prepare_image,
    to_pixel_values,
)


def prompt_key(caption):
    """Key of a caption in its store."""
    return digest(caption=caption)


def latent_key(content_hash, flip):
    """Key of an image in its store."""
    return f"{content_hash}-{'flipped' if flip else 'plain'}"


def model_identity(args, *subfolders):
    """What tells one model's encodings from another's: hashes of its files, or its commit on the Hub."""
    folder = Path(args.pretrained_model_name_or_path)
    if not folder.is_dir():
        index = cli_utils.model_file(str(folder), "model_index.json", args.revision)
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
def encode_images(items, vae, args):
    """Images as the autoencoder sees them: a list of {"mean", "std" (C, h, w), "time_ids" (6,)} on the CPU.

    items: [(CaptionedImage, whether flipped)]. Mean and deviation are kept, not a sample, so that caching freezes
    nothing. Where the crop is not forced, it is the middle: these are held-out images.
    """
    prepared = [
        prepare_image(open_image(image), args.resolution, True, flip, args.image_interpolation_mode)
        for image, flip in items
    ]
    pixels = torch.stack([to_pixel_values(array) for array, _ in prepared])
    posterior = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
    time_ids = torch.tensor([crop.time_ids for _, crop in prepared], dtype=torch.float32)
    return rows_of({"mean": posterior.mean.float().cpu(), "std": posterior.std.float().cpu(), "time_ids": time_ids})


def fill_caches(args, images, held_out, accelerator, prompt_id, encode_prompts, encode_latents):
    """Encode what is not on disk yet; returns (prompt store, latent store, whether the images are in it).

    Held-out images are always in the latent store, the others unless their crops are random.

    prompt_id: what the encoded prompts depend on, for `digest`; encode_prompts: function from captions to a list of
    {name: tensor}; encode_latents: the same from [(image, flip)]. Neither is called when nothing is missing.
    """
    root = Path(args.cache_dir or os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "lpl"
    latent_id = digest(kind="latents", vae=vae_identity(args), crop=[args.resolution, args.image_interpolation_mode])
    cacheable = crops_are_forced(images, args.center_crop, args.resolution)
    with accelerator.main_process_first():
        prompt_store = TensorStore(root / "prompts" / digest(**prompt_id)[:16])
        captions = ["", *(args.validation_prompt or []), *(image.caption for image in [*images, *held_out])]
        items = [(prompt_key(caption), caption) for caption in captions]
        encoded = [encode_missing(prompt_store, items, encode_prompts, 16, "encoding captions")]
        latent_store = TensorStore(root / "latents" / latent_id[:16])
        items = [*latent_items(held_out, latent_key, False)]
        if cacheable:
            items += latent_items(images, latent_key, args.random_flip)
        at_once = max(1, min(16, (1024 // args.resolution) ** 2))
        encoded.append(encode_missing(latent_store, items, encode_latents, at_once, "encoding images"))
    accelerator.print(f"Caches in {root}: encoded {encoded[0]} captions and {encoded[1]} images, the rest was there.")
    if not cacheable:
        accelerator.print("Random crops: images are encoded in every step. --center_crop encodes each of them once.")
    return prompt_store, latent_store, cacheable
