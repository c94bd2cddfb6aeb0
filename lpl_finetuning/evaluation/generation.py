"""Pictures of a model for given captions: a seed for each picture, kept in a folder, resumed after a kill.

A folder holds `generation.json` and a folder of PNG files for each guidance, such as `guidance-3/apple.png`.
"""

import hashlib
import io
import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch
from PIL.PngImagePlugin import PngInfo
from tqdm.auto import tqdm

from lpl_finetuning.errors import UserError, require
from lpl_finetuning.evaluation.models import denoiser_of, native_size, prediction_kind, sampling_scheduler
from lpl_finetuning.files import write_whole
from lpl_utils import LatentSpace

RECORD = "generation.json"
PIXELS_AT_ONCE = 4 * 1024**2  # of a batch of which no size is given


@dataclass(frozen=True)
class GenerationSettings:
    """How pictures are made.

    Attributes:
        steps: of the sampler.
        guidance: scales of classifier-free guidance; each gets its own pictures. 1 is without guidance.
        size: (height, width) in px; None for the size that the model makes by itself.
        sampler: "auto", "ddim", "euler" or "own"; see `sampling_scheduler`.
        batch_size: pictures at a time; None for as many as make 4 megapixels, 32 at most. It changes no picture but
            for rounding.
        seed: from which, with its name, the seed of each picture follows.
    """

    steps: int = 25
    guidance: tuple[float, ...] = (1.0, 3.0)
    size: tuple[int, int] | None = None
    sampler: str = "auto"
    batch_size: int | None = None
    seed: int = 0


def generate(pipeline, captions, settings, folder, model="", bar=True):
    """Make a picture for every caption and guidance that has none yet; returns {guidance: folder}.

    A picture follows from the model, the settings, its stem and its caption. Which other pictures exist or are made
    with it changes nothing but rounding. Every model starts from the same noise.

    Args:
        pipeline: from `load_pipeline`.
        captions: {stem of the file: caption}; a stem may begin with folders, as in "animals/cat".
        folder: where the pictures are kept; what is there is not made again.
        model: what tells the model from others, such as `ModelSource.weights`.
        bar: whether a progress bar is shown.

    Raises:
        UserError: the folder has pictures of another model, other settings or other captions.
    """
    folder = Path(folder)
    size = settings.size or native_size(pipeline)
    check_size(pipeline, size)
    check_stems(captions)
    pipeline.scheduler = sampling_scheduler(pipeline, settings.sampler, settings.steps)
    record(folder, captions, record_of(pipeline, settings, size, model))
    pipeline.set_progress_bar_config(disable=True)
    at_once = settings.batch_size or max(1, min(32, PIXELS_AT_ONCE // (size[0] * size[1])))
    folders = {guidance: guidance_folder(folder, guidance) for guidance in settings.guidance}
    work = [(guidance, stem) for guidance in settings.guidance for stem in sorted(captions)]
    missing = [(guidance, stem) for guidance, stem in work if not picture_path(folders[guidance], stem).is_file()]
    with tqdm(total=len(work), initial=len(work) - len(missing), desc="pictures", disable=not bar) as progress:
        for guidance in settings.guidance:
            stems = [stem for other, stem in missing if other == guidance]
            for first in range(0, len(stems), at_once):
                batch = {stem: captions[stem] for stem in stems[first : first + at_once]}
                for stem, image in zip(batch, sample(pipeline, batch, settings, guidance, size), strict=True):
                    save_picture(picture_path(folders[guidance], stem), image, captions[stem])
                    progress.update()
    return folders


@torch.no_grad()
def sample(pipeline, captions, settings, guidance, size):
    """PIL images of a model for {stem: caption}, (height, width) = size."""
    latents = torch.cat([start_noise(pipeline, settings.seed, stem, size) for stem in captions])
    latents = pipeline(
        prompt=list(captions.values()), latents=latents, num_inference_steps=settings.steps, guidance_scale=guidance,
        height=size[0], width=size[1], output_type="latent",
    ).images  # fmt: skip
    return [image for one in latents.split(1) for image in decoded(pipeline, one)]  # decoding takes the most memory


def decoded(pipeline, latents):
    """PIL images of latents (B, C, h, w), by the autoencoder in its own dtype."""
    vae = pipeline.vae
    pixels = vae.decode(LatentSpace.of(vae).from_model(latents).to(vae.dtype)).sample.float()
    require(bool(pixels.isfinite().all()), "the model made a picture that is not finite: choose --dtype float32")
    return pipeline.image_processor.postprocess(pixels)


def picture_seed(seed, stem):
    """The seed of a picture, below 2**63: it follows from the seed of all and the picture's stem."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{stem}".encode()).digest()[:8], "little") >> 1


def start_noise(pipeline, seed, stem, size):
    """The noise that a picture starts from, (1, C, h, w): drawn on the CPU, so that every device has the same."""
    generator = torch.Generator().manual_seed(picture_seed(seed, stem))
    scale, channels = pipeline.vae_scale_factor, pipeline.vae.config.latent_channels
    noise = torch.randn(1, channels, size[0] // scale, size[1] // scale, generator=generator)
    denoiser = denoiser_of(pipeline)
    return noise.to(denoiser.device, denoiser.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# The folder


def guidance_folder(folder, guidance):
    """Where the pictures of a guidance are."""
    return Path(folder) / f"guidance-{guidance:g}"


def picture_path(folder, stem):
    """The file of a picture."""
    return folder / f"{stem}.png"


def save_picture(path, image, caption):
    """Write a PNG file with its caption, whole or not at all."""
    note = PngInfo()
    note.add_itxt("caption", caption)
    content = io.BytesIO()
    image.save(content, "PNG", pnginfo=note)
    write_whole(path, content.getvalue())


def record_of(pipeline, settings, size, model):
    """What the pictures of a folder have in common: the content of `generation.json` without the captions."""
    return {
        "model": model,
        "prediction": prediction_kind(pipeline),
        "sampler": type(pipeline.scheduler).__name__,
        "steps": settings.steps,
        "size": list(size),
        "seed": settings.seed,
        "dtype": str(denoiser_of(pipeline).dtype)[6:],
    }


def record(folder, captions, now):
    """Write `generation.json`; UserError where the folder was made with something else.

    What an interrupted run left half written is removed.
    """
    path, before = folder / RECORD, {}
    if path.is_file():
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            raise UserError(f"{path}: not valid JSON; remove the folder, and its pictures are made again") from None
    elif folder.is_dir() and any(folder.rglob("*.png")):
        raise UserError(f"{folder} has pictures but no {RECORD}, so nobody knows how they were made: name another "
                        "folder, or remove them")  # fmt: skip
    earlier = before.pop("captions", {})
    for name, value in now.items():
        require(not before or before.get(name) == value, f"{folder}: its pictures were made with {name} "
                f"{before.get(name)}, not {value}: name another folder, or remove them")  # fmt: skip
    changed = [stem for stem, caption in captions.items() if earlier.get(stem, caption) != caption]
    require(not changed, f"{folder}: {len(changed)} of its pictures were made for other captions, such as "
            f"{changed[:1] and changed[0]}: name another folder, or remove them")  # fmt: skip
    for left in folder.rglob(".tmp-*"):
        with suppress(OSError):
            left.unlink()
    text = json.dumps(now | {"captions": earlier | dict(captions)}, indent=1, ensure_ascii=False)
    write_whole(path, text.encode())


def check_stems(captions):
    """Refuse names that would lead out of the folder."""
    for stem in captions:
        path = PurePosixPath(stem)
        require(not path.is_absolute() and ".." not in path.parts, f"{stem} can't be the name of a picture: it leads "
                "out of the folder; rename it")  # fmt: skip


def check_size(pipeline, size):
    """Refuse a size that the model can't make."""
    unit = pipeline.vae_scale_factor * getattr(pipeline, "patch_size", 1)
    require(all(side > 0 and side % unit == 0 for side in size),
            f"--size is {size[0]} x {size[1]}; both sides must be multiples of {unit}, the model's unit")  # fmt: skip
