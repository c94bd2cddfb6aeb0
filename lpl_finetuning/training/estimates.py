"""The count of a step's memory, kept in the cache folder: a large model takes ten seconds and more to count."""

import contextlib
import inspect
import json
from dataclasses import asdict

import diffusers
import peft
import torch
import transformers

import lpl_utils
from lpl_finetuning.base_model import model_file, read_json
from lpl_finetuning.files import cache_folder, digest, sha256_of, write_whole
from lpl_finetuning.flag_checks import holds_out
from lpl_finetuning.networks import latent_classifier
from lpl_finetuning.training import (
    augmentation,
    live_memory,
    models,
    objective,
    optimization,
    perceptual,
    step_memory,
)
from lpl_finetuning.training.live_memory import Peak

LIBRARIES = {library.__name__: library.__version__ for library in (diffusers, peft, torch, transformers)}
CODE = (augmentation, latent_classifier, live_memory, models, objective, optimization, perceptual, step_memory,
        lpl_utils)  # modules that a count runs through  # fmt: skip
FLAGS = (  # that a count follows from
    "adam_beta1", "aspect_ratio_buckets", "foreach_ema", "gradient_accumulation_steps", "gradient_checkpointing",
    "init_lora", "lokr_factor", "lora_alpha", "lora_blocks", "lora_dropout", "lora_layers", "lora_pattern",
    "lora_type", "lpl_augment", "lpl_batch_size", "lpl_checkpointing", "lpl_classifier_stages", "lpl_features",
    "lpl_loss_type", "lpl_norm_gradient", "lpl_norm_type", "lpl_num_blocks", "lpl_outlier_reference_resolution",
    "lpl_pow_law", "lpl_remove_outliers", "lpl_scale", "lpl_vae_dtype", "max_sequence_length", "noise_offset",
    "num_validation_images", "offload_ema", "optimizer", "precondition_outputs", "prediction_type",
    "proportion_empty_prompts", "rank", "resolution", "snr_gamma", "train_batch_size", "train_text_encoder",
    "use_8bit_adam", "use_dora", "use_ema", "use_lora", "use_lpl", "validation_metrics",
    "weighting_scheme",
)  # fmt: skip


def counted_peaks(args, plan, code, machine, count=True, denoiser=None):
    """{phase: Peak} of a step: kept by an earlier start, or counted and kept; None where neither.

    Args:
        plan: the `Plan`; code: the `RunCode`; machine: the `Machine`.
        count: whether to count where nothing is kept.
        denoiser: see `count_step`.
    """
    path = place_of_count(args, plan, code, machine)
    with contextlib.suppress(OSError, ValueError, TypeError):
        return {phase: Peak(**peak) for phase, peak in json.loads(path.read_text()).items()}
    if not count:
        return None
    peaks = step_memory.count_step(args, plan, code, machine, denoiser)
    with contextlib.suppress(OSError):  # the cache can't be written
        content = json.dumps({phase: asdict(peak) for phase, peak in peaks.items()})
        write_whole(path, content.encode())
    return peaks


def place_of_count(args, plan, code, machine):
    """The file for a count: its name follows from flags, models, precision, code and libraries."""
    files = {module.__file__ for module in CODE} | {
        inspect.getfile(function) for function in (*code[:-1], *(code.held_out or ()))
    }
    quantized = args.bnb_quantization_config_path
    key = digest(
        flags={name: getattr(args, name, None) for name in FLAGS},
        prompts=bool(args.validation_prompt),
        held_out=holds_out(args),
        quantization=read_json(quantized) if quantized else None,
        models=configurations(args.base_model) | network_configurations(args),
        dtype=str(plan.dtype),
        machine=asdict(machine),
        code=sorted(map(sha256_of, files)),
        libraries=LIBRARIES,
    )
    return cache_folder(args.cache_dir) / "plans" / f"{key}.json"


def configurations(base):
    """{part: content of its config.json} of the models that the flags name."""
    places = {part: base.place(part) for part in base.models()}
    files = {part: model_file(it.name, "config.json", it.revision, it.subfolder) for part, it in places.items()}
    return {part: file and read_json(file) for part, file in files.items()}


def network_configurations(args):
    """{flag: content of config.json} of the networks of the loss that flags name."""
    names = {flag: getattr(args, flag) for flag in ("lpl_classifier", "lpl_tiny_decoder")}
    return {flag: read_json(model_file(name, "config.json")) for flag, name in names.items() if name}
