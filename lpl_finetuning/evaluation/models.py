"""Models to be evaluated: what a text names, checked before torch is imported; loading them; their samplers.

A text is the folder, single file or Hub name of a pipeline, BASE+LORA, BASE+CHECKPOINT, or a folder of pictures.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

from lpl_finetuning.base_model import (
    BaseModel,
    check_files,
    check_parts,
    check_pipeline,
    check_small_parts,
    check_weights,
    hub_like,
    is_lora_file,
    model_file,
    read_object,
    unreadable,
    weights_fingerprint,
)
from lpl_finetuning.data.formats import IMAGE_EXTENSIONS
from lpl_finetuning.errors import UserError, require
from lpl_finetuning.families import SD3, SDXL
from lpl_finetuning.files import sha256_of
from lpl_finetuning.lora_files import check_lora, find_lora, put_lora, read_lora
from lpl_finetuning.single_file import read_single_file
from lpl_finetuning.unpacking import open_base_file

FAMILIES = (SDXL, SD3)
SAMPLERS = ("auto", "ddim", "euler", "own")
FLOW = "flow"  # rectified flow; the other kinds of prediction are diffusers' names


@dataclass(frozen=True)
class EvaluatedModel(BaseModel):
    """A pipeline to be evaluated. Messages name the text that stands for it instead of a flag of training."""

    text: str = ""

    def flag(self, part=None):
        """The flag with the model's text, whichever the part."""
        return f"--model {self.text}"

    def loading_flags(self, part):
        """None: `evaluate_models.py` has no flags about files."""
        return ()

    def describe(self, part):
        """The same: one text names all parts."""
        return self.flag(part)


@dataclass(frozen=True)
class ModelSource:
    """What the text of a model names: a pipeline, a pipeline with other weights, or pictures.

    Attributes:
        text: as it was given.
        base: the `EvaluatedModel`; its denoiser is a checkpoint's where the text names one. None for pictures.
        lora: a LoRA's file or folder, or its name on the Hub; None without.
        pictures: folder of finished pictures; None for a model.
        weights: fingerprint of denoiser and LoRA; None for pictures.
    """

    text: str
    base: EvaluatedModel | None = None
    lora: str | None = None
    pictures: Path | None = None
    weights: str | None = None

    @property
    def kind(self):
        """ "pictures", "LoRA", "checkpoint" or "pipeline"."""
        if self.pictures:
            return "pictures"
        return "LoRA" if self.lora else "checkpoint" if self.base.denoiser else "pipeline"


# ---------------------------------------------------------------------------------------------------------------------
# From a text to a model, without torch


def find_source(text, config_from=None, cache_dir=None):
    """The `ModelSource` of a text, checked as far as small files tell.

    A text is split at its last `+` unless the whole of it exists.

    Args:
        config_from: folder or Hub name of a pipeline with what a single file lacks.
        cache_dir: of single files; by default the user's cache.

    Raises:
        UserError: there is no such model, or a part of it is missing, damaged, unsafe or of an unknown family.
    """
    flag, path = f"--model {text}", Path(text)
    require(text.strip(), "--model is empty: give a pipeline, BASE+LORA or a folder of pictures")
    if path.exists() or "+" not in text:
        require(not is_trained_part(path), f"{flag} has only what was trained: write BASE+{text}, with the base model "
                "before the +")  # fmt: skip
        if is_picture_folder(path):
            return ModelSource(text, pictures=path)
        base = check_evaluated(pipeline_of(flag, text, text, config_from, cache_dir))
        return ModelSource(text, base, weights=weights_fingerprint(base))
    name, _, addition = text.rpartition("+")
    require(name and addition, f"{flag}: nothing stands {'after' if name else 'before'} the +; write BASE+LORA")
    base = pipeline_of(flag, name, text, config_from, cache_dir)
    if Path(addition, base.family.denoiser.name, "config.json").is_file():
        base = check_evaluated(replace(base, denoiser=addition))
        return ModelSource(text, base, weights=weights_fingerprint(base))
    path = check_lora(flag, addition, base.family)
    base = check_evaluated(base)
    added = f"sha256:{sha256_of(path)[:16]}" if path else f"hub:{addition}"
    return ModelSource(text, base, addition, weights=f"{weights_fingerprint(base)}+{added}")


def pipeline_of(flag, name, text, *where):
    """The `EvaluatedModel` of a folder, a name on the Hub, or a single file; where: see `opened`."""
    return opened(EvaluatedModel(family_of(flag, name), name, text=text), *where)


def opened(base, config_from=None, cache_dir=None):
    """An `EvaluatedModel` whose files can be read: a single file is unpacked into the cache.

    Args:
        config_from: folder or Hub name of a pipeline with what a single file lacks.
        cache_dir: of single files; by default the user's cache.
    """
    base = open_base_file(SimpleNamespace(cache_dir=cache_dir, config_from=config_from, dry_run=False), base)
    base.unpack()
    return base


def is_picture_folder(path):
    """Whether a folder holds pictures, also in folders within it, and no model; hidden files do not count."""
    if not path.is_dir() or (path / "model_index.json").is_file():
        return False
    names = [file.name for file in path.rglob("*") if not file.name.startswith(".")]
    suffixes = {Path(name).suffix.lower() for name in names}
    return bool(suffixes & set(IMAGE_EXTENSIONS)) and ".safetensors" not in suffixes


def is_trained_part(path):
    """Whether a path is a LoRA's file, or a folder with a LoRA or a checkpoint and no pipeline."""
    if path.is_file():
        return path.suffix == ".safetensors" and is_lora_file(path)
    if not path.is_dir() or (path / "model_index.json").is_file():
        return False
    marks = ("training_state.json", "pytorch_lora_weights.safetensors", "adapter_config.json")
    return any((path / mark).is_file() for mark in marks)


def family_of(flag, name):
    """The family of a pipeline's folder or Hub name, from its model_index.json, or of a single file, by its header."""
    if Path(name).is_file():
        single = read_single_file(name, f"{flag}: {name}")
        return next(family for family in FAMILIES if single.layout.pipeline == family.pipeline)
    if not Path(name).is_dir() and not hub_like(name):
        return SDXL  # `check_pipeline` tells what is wrong
    try:
        path = model_file(name, "model_index.json")
    except Exception as error:  # the Hub client raises many kinds: no network, no such model, no possible name
        raise UserError(f"{flag}: {name}: {unreadable(name, error)}") from error
    if path is None:
        return SDXL
    kind = str(read_object(path).get("_class_name") or "pipeline without a class name")
    family = next((family for family in FAMILIES if kind.startswith(family.pipeline)), None)
    known = " and ".join(family.pipeline for family in FAMILIES)
    require(family, f"{flag}: {name} is a {kind}; what can be evaluated are {known} pipelines")
    return family


def check_evaluated(base):
    """The pipeline itself, whole and safe; UserError tells what is wrong."""
    check_pipeline(base)
    check_parts(base)
    check_small_parts(base)
    check_weights(base)
    check_files(base)
    return base


# ---------------------------------------------------------------------------------------------------------------------
# Loading


def load_pipeline(source, dtype, device):
    """The diffusers pipeline of a `ModelSource`, frozen, in eval mode; its autoencoder is in float32.

    The autoencoder makes every number and picture of an evaluation, and some autoencoders overflow in float16.

    Raises:
        UserError: the LoRA does not fit the pipeline.
    """
    import diffusers
    import torch

    base, parts = source.base, dict.fromkeys(source.base.absent_parts())
    apart = {base.family.autoencoder: torch.float32} | ({base.family.denoiser: dtype} if base.denoiser else {})
    for part, own_dtype in apart.items():
        cls, place = getattr(diffusers, part.class_name), base.place(part.name)
        parts[part.name] = cls.from_pretrained(
            place.name, subfolder=place.subfolder, dtype=own_dtype, use_safetensors=True
        )
    more = {"add_watermarker": False} if base.family is SDXL else {}
    cls = getattr(diffusers, base.family.pipeline_class)
    pipeline = cls.from_pretrained(base.name, dtype=dtype, use_safetensors=True, **parts, **more)
    if source.lora:
        load_lora(pipeline, source)
    pipeline.to(device)
    for model in pipeline.components.values():
        if isinstance(model, torch.nn.Module):
            model.requires_grad_(False).eval()
    return pipeline


def load_lora(pipeline, source):
    """Put a source's LoRA into its pipeline, in the models' own dtype; UserError where it does not fit."""
    family, flag = source.base.family, f"--model {source.text}"
    parts = (family.denoiser.name, *family.text_encoders)
    models = {part: getattr(pipeline, part) for part in parts}
    lora = read_lora(flag, find_lora(flag, source.lora, family), family, pipeline, models)
    for part, (layers, config) in lora.items():
        put_lora(flag, part, models[part], layers, config, models[part].dtype)


def prediction_kind(pipeline):
    """What the denoiser predicts: "epsilon", "v_prediction", "sample" or "flow"."""
    if type(pipeline.scheduler).__name__.startswith("FlowMatch"):
        return FLOW
    return pipeline.scheduler.config.prediction_type


def check_steps(source, sampler, steps):
    """Refuse a sampler or a number of steps that a source's model can't be sampled with; only its files are read."""
    path = source.base.file("scheduler_config.json", "scheduler")
    config = read_object(path) if path else {}
    named_sampler(sampler, config.get("_class_name", "").startswith("FlowMatch"), steps,
                  config.get("num_train_timesteps", 1000))  # fmt: skip


def named_sampler(sampler, flow, steps, total):
    """The sampler, with a name for "auto"; flow: whether the model is a flow, total: its training timesteps.

    Raises:
        UserError: the sampler is for other models, or DDIM can't make so many steps.
    """
    if sampler == "auto":
        sampler = "euler" if flow else "ddim"
    require(steps <= total, f"--steps is {steps}; the model knows {total} noise levels: give {total} or less")
    require(sampler != "ddim" or not flow, f"--sampler {sampler} is not for rectified flow: give euler or own")
    fitting = [count for count in range(1, total + 1) if total % count == 0]
    near = {max(count for count in fitting if count <= max(1, steps)),
            min(count for count in fitting if count >= min(steps, total))}  # fmt: skip
    require(sampler != "ddim" or steps in fitting, f"--steps is {steps}; under DDIM it must divide {total}, so that "
            f"the last step ends at noise 0: give {' or '.join(map(str, sorted(near)))}")  # fmt: skip
    return sampler


def sampling_scheduler(pipeline, sampler="auto", steps=25):
    """The scheduler that a sampler stands for, made from the pipeline's own noise levels.

    "auto" is "ddim" for epsilon, v and sample prediction and "euler" for flow; "own" is the pipeline's scheduler. The
    last step of "ddim" and "euler" returns the model's own estimate of the clean latents. For DDIM that needs:

    - clip_sample=False: latents are not bounded, but diffusers clips estimates to -1..1 unless the configuration
      says otherwise, and that of another scheduler says nothing;
    - set_alpha_to_one=True, and steps that divide the number of timesteps: with others diffusers ends above noise 0.

    Raises:
        UserError: the sampler is for other models, or DDIM can't make so many steps.
    """
    import diffusers

    own, flow = pipeline.scheduler, prediction_kind(pipeline) == FLOW
    sampler = named_sampler(sampler, flow, steps, own.config.num_train_timesteps)
    if sampler == "own":
        return type(own).from_config(own.config)
    if flow:
        return diffusers.FlowMatchEulerDiscreteScheduler.from_config(own.config)
    if sampler == "euler":
        return diffusers.EulerDiscreteScheduler.from_config(own.config, timestep_spacing="trailing")
    return diffusers.DDIMScheduler.from_config(
        own.config, timestep_spacing="trailing", clip_sample=False, thresholding=False, set_alpha_to_one=True
    )


def denoiser_of(pipeline):
    """The UNet or transformer of a pipeline."""
    return getattr(pipeline, "unet", None) or pipeline.transformer


def native_size(pipeline):
    """(height, width) in px that the pipeline makes by itself."""
    side = denoiser_of(pipeline).config.sample_size * pipeline.vae_scale_factor
    return side, side
