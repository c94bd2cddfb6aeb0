"""Flags, recipe files and the checks that need no model: what runs before the slow imports.

Nothing here imports torch, so that a wrong flag, folder or base model is answered at once.
"""

import argparse
import contextlib
import difflib
import functools
import importlib.util
import json
import logging
import math
import os
import re
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import yaml

from data_report_utils import build_report
from data_utils import CaptionRules, Framing
from image_utils import INTERPOLATIONS, DataError, assign_buckets, auto_buckets, parse_buckets
from scan_utils import scan_dataset, scan_folder
from table_utils import hold_out, select, sizes_of

REPOSITORY = Path(__file__).resolve().parent
LR_SCHEDULERS = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")
OPTIMIZERS = ("adamw", "prodigy", "adafactor")
TRACKERS = ("tensorboard", "wandb", "comet_ml", "all", "none")
MODEL_OR_DATA = {"pretrained_model_name_or_path", "dataset_name", "train_data_dir", "instance_data_dir"}
PATHS = (
    "pretrained_model_name_or_path", "pretrained_vae_model_name_or_path", "pretrained_unet_model_name_or_path",
    "pretrained_transformer_model_name_or_path", "train_data_dir", "instance_data_dir", "validation_data_dir",
    "init_lora", "bnb_quantization_config_path",
)  # fmt: skip
HOME = (*PATHS, "dataset_name", "output_dir", "cache_dir", "config", "resume_from_checkpoint")  # ~ is the home folder
SECRETS = ("hub_token",)  # flags whose values never reach a file, a log or a tracker


class UserError(ValueError):
    """A mistake that the user can put right; its message names the flag or file, what was found and what to do."""


@contextlib.contextmanager
def errors_for_people(debug):
    """Turn a UserError (or a data error) into one clear message and exit status 2; `--debug` shows the traceback."""
    try:
        yield
    except (UserError, DataError) as error:
        if debug:
            raise
        if int(os.environ.get("RANK", "0")) == 0:
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except PermissionError as error:
        if debug:
            raise
        print(f"error: {error.filename}: {error.strerror}; give one that you may use", file=sys.stderr)
        sys.exit(2)


def quiet_libraries(debug):
    """Before diffusers and transformers are imported: only their errors are shown, so that ours can be read."""
    if debug:
        return
    for name in ("DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY"):
        os.environ.setdefault(name, "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    from transformers.utils import logging as transformers_logging  # the light part of transformers

    transformers_logging.disable_progress_bar()


# Flags of other scripts that people bring along, and what to do here.
_ACCELERATE = "it is a flag of accelerate launch: write it before the script's name"
_NO_PRIOR = "prior preservation is not in these scripts; leave it out"
_ENCODED_ONCE = "leave it out: latents and prompts are always encoded once and kept"
_PRODIGY = "leave it out: it is on with --optimizer prodigy"
ELSEWHERE = dict.fromkeys(
    ("num_processes", "num_machines", "multi_gpu", "gpu_ids", "main_process_port", "config_file", "use_deepspeed",
     "use_fsdp", "num_cpu_threads_per_process", "dynamo_backend", "machine_rank"), _ACCELERATE,
) | dict.fromkeys(
    ("with_prior_preservation", "prior_loss_weight", "class_data_dir", "class_prompt", "num_class_images",
     "prior_generation_precision", "sample_batch_size"), _NO_PRIOR,
) | dict.fromkeys(
    ("cache_latents", "cache_latents_to_disk", "cache_text_encoder_outputs", "vae_encode_batch_size",
     "vae_batch_size", "precompute_latents"), _ENCODED_ONCE,
) | dict.fromkeys(("prodigy_safeguard_warmup", "prodigy_use_bias_correction", "prodigy_decouple"), _PRODIGY) | {
    "network_dim": "use --rank", "network_alpha": "use --lora_alpha", "network_dropout": "use --lora_dropout",
    "network_module": "use --use_lora", "network_weights": "use --init_lora", "lora_rank": "use --rank",
    "max_train_epochs": "use --num_train_epochs", "repeats": "use --num_train_epochs",
    "batch_size": "use --train_batch_size", "lr": "use --learning_rate", "unet_lr": "use --learning_rate",
    "optimizer_type": "use --optimizer", "use_prodigy": "use --optimizer prodigy",
    "min_snr_gamma": "use --snr_gamma", "v_parameterization": "use --prediction_type v_prediction",
    "save_every_n_steps": "use --checkpointing_steps", "save_every_n_epochs": "use --checkpointing_steps",
    "save_steps": "use --checkpointing_steps", "resume": "use --resume_from_checkpoint",
    "enable_bucket": "use --aspect_ratio_buckets auto", "keep_tokens": "use --keep_tags",
    "shuffle_caption": "use --shuffle_tags", "caption_dropout_rate": "use --proportion_empty_prompts",
    "flip_aug": "use --random_flip", "color_aug": "colours are never changed; leave it out",
    "xformers": "use --enable_xformers_memory_efficient_attention",
    "sdpa": "leave it out: PyTorch's attention is what is used", "output_name": "use --output_dir",
    "sample_prompts": "use --validation_prompt", "caption_extension": "captions are .txt or .caption files",
    "vae": "use --pretrained_vae_model_name_or_path", "save_model_as": "leave it out: weights are safetensors",
    "fp16": "use --mixed_precision fp16", "bf16": "use --mixed_precision bf16",
    "push": "use --push_to_hub", "wandb": "use --report_to wandb",
    "snr_gamma": "rectified flow has --weighting_scheme instead", "prediction_type": "rectified flow has no choice",
    "pretrained_unet_model_name_or_path": "use --pretrained_transformer_model_name_or_path",
    "pretrained_transformer_model_name_or_path": "use --pretrained_unet_model_name_or_path",
    "weighting_scheme": "it is of train_sd3_lpl_flow.py; SDXL has --snr_gamma and --timestep_bias_strategy",
    "max_sequence_length": "it is of train_sd3_lpl_flow.py; SDXL's text encoders take 77 tokens",
    "lora_blocks": "it is of train_sd3_lpl_flow.py; use --lora_layers",
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Parsing: flags, then a recipe file, then defaults


class FlagParser(argparse.ArgumentParser):
    """An ArgumentParser with named groups, no abbreviations, and a suggestion for a misspelt flag."""

    def __init__(self, description):
        super().__init__(
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def flags(self):
        """dest -> action of everything but --help."""
        return {action.dest: action for action in self._actions if action.dest != "help"}

    def error(self, message):
        """Called by argparse; "argument --x: expected one argument" becomes a message of ours."""
        flag, _, rest = message.removeprefix("argument ").partition(": ")
        if rest.startswith("expected"):
            raise UserError(f"{flag}: no value follows it; give one (one that begins with a dash as {flag}=-1)")
        if rest.startswith("ignored explicit argument"):
            raise UserError(f"{flag} takes no value, found {rest[26:]}; write {flag} alone to set it, or leave it out")
        raise UserError(message.removeprefix("argument "))

    def _get_value(self, action, arg_string):
        return self.convert(action, arg_string, "/".join(action.option_strings) or action.dest)

    def _check_value(self, action, value):
        pass  # `convert` has looked at the choices

    def convert(self, action, text, place):
        """The value that a text means for a flag; UserError begins with `place`."""
        try:
            value = action.type(text) if action.type else text
        except (ValueError, argparse.ArgumentTypeError) as error:
            kind = {int: "whole number", float: "number"}.get(action.type)
            if kind:
                raise UserError(f"{place} is {text!r}; it must be a {kind}") from None
            raise UserError(f"{place} is {text!r}; {error}") from None
        if action.choices and value not in action.choices:
            near = difflib.get_close_matches(str(value), map(str, action.choices), n=1)
            meant = f"did you mean {near[0]}? " if near else ""
            raise UserError(f"{place} is {text!r}; {meant}choose from {', '.join(map(str, action.choices))}")
        return value

    def parse(self, argv=None, embedded_default=None):
        """Parse `argv`; a flag that is not there takes its value from --config, then from its default.

        embedded_default: path of the recipe that is used when neither a base model nor data are named.
        """
        missing = object()
        namespace = argparse.Namespace(**dict.fromkeys(self.flags(), missing))
        namespace, unknown = self.parse_known_args(argv, namespace)
        if unknown:
            raise UserError("; ".join(self._unknown(unknown)))
        given = {dest: value for dest, value in vars(namespace).items() if value is not missing}
        defaults = {dest: action.default for dest, action in self.flags().items()}
        recipe = self.read_recipe(given["config"]) if given.get("config") else {}
        named = given.keys() | recipe.keys()
        if embedded_default and not named & MODEL_OR_DATA:
            recipe = self.read_recipe(embedded_default) | recipe
            recipe["embedded_default"] = True
        values = {"embedded_default": False} | defaults | recipe | given
        for name in HOME:  # a shell leaves the ~ of --flag=~/x alone
            if isinstance(values.get(name), str):
                values[name] = os.path.expanduser(values[name])
        return argparse.Namespace(**values)

    def _unknown(self, words):
        """A message for each unknown flag, and for each argument that is not the value of one."""
        options = [option for action in self._actions for option in action.option_strings]
        previous = ""
        for word in words:
            if word.startswith("-") and not is_number(word):
                name = word.split("=")[0]
                near = difflib.get_close_matches(name.replace("-", "_").replace("__", "--", 1), options, n=1)
                advice = ELSEWHERE.get(name.lstrip("-").replace("-", "_"))
                if not advice:
                    advice = f"did you mean {near[0]}?" if near else "--help lists all flags"
                yield f"unknown flag {name}: {advice}"
            elif not word.strip():
                yield f"unknown argument {word!r}: a backslash that continues a line must be its last character"
            elif not previous.startswith("-"):
                switch = word.lower() in ("true", "false", "1", "0", "yes", "no")
                advice = "switches such as --use_lora take no value" if switch else "a value with blanks needs quotes"
                yield f"unknown argument {word}: {advice}"
                break  # the words that follow belong to it
            previous = word

    def read_recipe(self, path):
        """The flags in a YAML file, checked as on the command line. Relative paths in it are seen from its folder."""
        path = Path(path)
        require(not path.is_dir(), f"--config {path} is a folder; name a YAML file such as those in configs/recipes")
        require(path.is_file(), f"--config {path}: there is no such file; the recipes are in configs/recipes")
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        except yaml.YAMLError as error:
            text = " ".join(str(error).split())
            raise UserError(f"--config {path}: not valid YAML: {text}; write lines such as `rank: 16`") from None
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--config {path}: can't be read as text ({error}); name a YAML file") from None
        if not isinstance(content, dict):
            found = type(content).__name__
            raise UserError(f"--config {path}: found a {found}; expected lines such as `learning_rate: 1e-4`")
        return {key: self._recipe_value(path, key, value) for key, value in content.items()}

    def _recipe_value(self, path, key, value):
        action = self.flags().get(key)
        if action is None:
            near = difflib.get_close_matches(str(key), self.flags(), n=1)
            advice = f"did you mean {near[0]}?" if near else "its keys are flags without their dashes"
            raise UserError(f"--config {path}: unknown key {key}; {ELSEWHERE.get(key, advice)}")
        if value is None:
            require(action.default is None, f"--config {path}: {key} has no value; give one, or remove the line")
            return None
        if action.nargs == 0 or isinstance(action, argparse.BooleanOptionalAction):
            if not isinstance(value, bool):
                raise UserError(f"--config {path}: {key} is {value!r}; it must be true or false")
            return value
        if isinstance(value, dict) or (isinstance(value, list) and (action.nargs not in ("+", "*") or not value)):
            raise UserError(f"--config {path}: {key} is {value!r}; it takes one value")
        if value is False and "no" in (action.choices or ()):  # YAML reads a bare no as false
            value = "no"
        values = value if isinstance(value, list) else [value]
        values = [self.convert(action, str(item), f"--config {path}: {key}") for item in values]
        if key in PATHS and (path.parent / values[0]).exists():
            values = [str((path.parent / values[0]).resolve())]
        return values if action.nargs in ("+", "*") else values[0]


def save_recipe(
    args, path, skip=("config", "embedded_default", "dry_run", "debug", "local_rank", "resume_from_checkpoint")
):
    """Write the resolved flags, secrets left out, as a YAML file that `--config` reads."""
    flags = {key: value for key, value in vars(args).items() if key not in SECRETS and key not in skip}
    Path(path).write_text(yaml.safe_dump(flags, sort_keys=False), encoding="utf-8")


def print_configuration(args, say):
    """The flags that are set, in one line, secrets left out."""
    flags = {key: value for key, value in sorted(vars(args).items()) if key not in SECRETS}
    say(
        "\nConfiguration: " + ", ".join(f"{key}={value}" for key, value in flags.items() if value not in (None, False))
    )


def weight_or_auto(text):
    """Type of --lpl_weight: "auto" or a number, 0 or more."""
    if text == "auto":
        return text
    if not is_number(text) or not float(text) >= 0:
        raise argparse.ArgumentTypeError("it must be auto or a number, 0 or more")
    return float(text)


def is_number(text):
    """Whether a text is a number, finite or not."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def add_switch(group, name, default, text):
    """A switch that is recommended: on by default, with both forms --name and --no-name."""
    group.add_argument(f"--{name}", f"--no-{name}", dest=name, action=_OnOff, nargs=0, default=default, help=text)


class _OnOff(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, not option_string.startswith("--no-"))


# ---------------------------------------------------------------------------------------------------------------------
# Argument groups that the recipes share


def add_model_arguments(parser):
    """What is trained."""
    group = parser.add_argument_group("model")
    add = group.add_argument
    add("--pretrained_model_name_or_path", help="Hub name or folder of the base pipeline (diffusers layout)")
    add("--revision", help="revision of the base model on the Hub")
    add("--variant", help="file variant of the base model, e.g. fp16")
    add("--allow_pickle", action="store_true", help="load weights that are there as pickles (.bin) only, which can "
        "run programs; without it safetensors only")  # fmt: skip
    add("--pretrained_vae_model_name_or_path", help="another autoencoder, e.g. madebyollin/sdxl-vae-fp16-fix")
    add("--single_file", action="store_true", help="save a whole model as one file too, model.safetensors for ComfyUI "
        "and A1111")  # fmt: skip
    group = parser.add_argument_group("LoRA")
    add = group.add_argument
    add("--use_lora", action="store_true", help="train a LoRA; without it the whole denoiser is trained")
    add("--rank", type=int, help="rank of the LoRA (default: 4)")
    add("--lora_alpha", type=float, help="its strength is alpha / rank (default: the rank)")
    add("--lora_dropout", type=float, default=0.0, help="dropout in LoRA layers (default: %(default)s)")
    add("--lora_layers", help="comma-separated layer names that get a LoRA (default: attention projections)")
    add("--use_dora", action="store_true", help="learn magnitude and direction apart (DoRA); slower")
    add("--train_text_encoder", action="store_true", help="give the CLIP text encoders a LoRA too")
    add("--init_lora", help="go on from this LoRA, a file, folder or Hub name; rank, alpha and layers are the file's")
    add("--bnb_quantization_config_path", help="JSON file of a BitsAndBytesConfig: the frozen denoiser in 4 or 8 "
        "bits, on a GPU")  # fmt: skip
    add("--output_kohya_format", action="store_true", help="save it for ComfyUI and A1111 too")


def add_data_arguments(parser, resolution):
    """What it is trained on."""
    group = parser.add_argument_group("data")
    add = group.add_argument
    add("--train_data_dir", help="folder of images, also in folders within it, with metadata.jsonl, .csv or .parquet "
        "or a .txt file beside each image, or of WebDataset shards (*.tar)")  # fmt: skip
    add("--dataset_name", help="data set on the Hub, or a folder written by datasets' save_to_disk")
    add("--dataset_config_name", help="configuration of that data set")
    add("--instance_data_dir", help="the same as --train_data_dir, as the DreamBooth scripts call it")
    add("--instance_prompt", help="caption of all images that have none")
    add("--image_column", default="image", help="column with the image (default: %(default)s)")
    add("--caption_column", default="text", help="column with the caption (default: %(default)s)")
    add("--caption_from_folder", action="store_true", help="the folder's name is the caption of images without one")
    add("--caption_per_line", action="store_true", help="each line of a .txt file is a caption of its own; one is "
        "drawn in each epoch")  # fmt: skip
    add("--trigger_word", default="", help="stands before every caption that does not begin with it")
    add("--shuffle_tags", action="store_true", help="shuffle what stands between the commas of a caption")
    add("--keep_tags", type=int, default=0, help="so many tags stay in front (default: %(default)s)")
    add("--tag_shuffles", type=int, default=8, help="orders of each caption that are encoded; one is drawn in each "
        "epoch (default: %(default)s)")  # fmt: skip
    add("--on_bad_image", choices=("error", "skip"), default="error", help="what to do about images that can't be "
        "used (default: %(default)s)")  # fmt: skip
    add("--strict", action="store_true", help="stop at anything that the report on the data remarks upon")
    add("--max_train_samples", type=int, help="use the first so many images only")
    add("--cache_dir", help="folder of data sets and of encoded latents and prompts (default: the user's cache)")
    add("--resolution", type=int, default=resolution, help="training size in px (default: %(default)s)")
    add("--aspect_ratio_buckets", help='train on several shapes: "h,w;h,w", or auto for those of constant area around '
        "--resolution, multiples of 64")  # fmt: skip
    add("--center_crop", action="store_true", help="crop the middle instead of a random part")
    add("--cache_variants", type=int, default=0, help="encode so many random crops of each image once, instead of "
        "encoding a new one in every step (default: %(default)s)")  # fmt: skip
    add("--random_flip", action="store_true", help="flip half of the images left to right")
    add("--image_interpolation_mode", choices=INTERPOLATIONS, default="lanczos", help="default: %(default)s")
    add("--proportion_empty_prompts", type=float, default=0.0, help="share of captions dropped (default: %(default)s)")
    add("--dataloader_num_workers", type=int, default=0, help="processes that load data (default: %(default)s)")


def add_training_arguments(parser, train_batch_size, num_train_epochs, adam_weight_decay):
    """How it is trained."""
    group = parser.add_argument_group("training")
    add = group.add_argument
    add("--output_dir", default="sd-model-finetuned", help="default: %(default)s")
    add("--seed", type=int, default=0, help="every draw follows from it (default: %(default)s)")
    add("--train_batch_size", type=int, default=train_batch_size, help="per device (default: %(default)s)")
    add("--num_train_epochs", type=int, default=num_train_epochs, help="default: %(default)s")
    add("--max_train_steps", type=int, help="optimizer steps; overrides --num_train_epochs")
    add("--gradient_accumulation_steps", type=int, default=1, help="default: %(default)s")
    add("--gradient_checkpointing", action="store_true", help="less memory, more time")
    add("--learning_rate", type=float, default=1e-4, help="default: %(default)s")
    add("--scale_lr", action="store_true", help="multiply it by devices, accumulation and batch size")
    add("--lr_scheduler", choices=LR_SCHEDULERS, default="constant", help="default: %(default)s")
    add("--lr_warmup_steps", type=int, default=500, help="optimizer steps (default: %(default)s)")
    add("--lr_num_cycles", type=int, default=1, help="restarts of cosine_with_restarts (default: %(default)s)")
    add("--lr_power", type=float, default=1.0, help="power of polynomial (default: %(default)s)")
    add("--text_encoder_lr", type=float, help="learning rate of the text encoders (default: --learning_rate)")
    add("--optimizer", type=str.lower, choices=OPTIMIZERS, default="adamw",
        help="prodigy finds the step size itself: give it --learning_rate 1 (default: %(default)s)")  # fmt: skip
    add("--use_8bit_adam", action="store_true", help="AdamW of bitsandbytes, with a quarter of the state")
    add("--adam_beta1", type=float, default=0.9, help="default: %(default)s")
    add("--adam_beta2", type=float, default=0.999, help="default: %(default)s")
    add("--adam_weight_decay", type=float, default=adam_weight_decay, help="default: %(default)s")
    add("--adam_epsilon", type=float, default=1e-8, help="default: %(default)s")
    add("--max_nonfinite_steps", type=int, default=10, help="stop after so many steps in a row whose loss or gradient "
        "is not finite; each of them is skipped (default: %(default)s)")  # fmt: skip
    add("--max_grad_norm", type=float, default=1.0, help="default: %(default)s")
    add("--use_ema", action="store_true", help="average the weights; the average is what is saved and validated")
    add("--ema_decay", type=float, default=0.9999, help="reached gradually (default: %(default)s)")
    add("--ema_update_after_step", type=int, default=0, help="average from this step on (default: %(default)s)")
    add("--offload_ema", action="store_true", help="keep the average in the CPU's memory: slower, less GPU memory")
    add("--foreach_ema", action="store_true", help="average all tensors in one call: faster, more memory")
    add("--mixed_precision", choices=("no", "fp16", "bf16"), help="default: what accelerate is configured with")
    add("--allow_tf32", action="store_true", help="faster float32 on Ampere and later GPUs")
    add("--enable_xformers_memory_efficient_attention", action="store_true",
        help="xformers' attention; PyTorch's own is as good on most GPUs")  # fmt: skip
    add("--torch_compile", action="store_true", help="compile the denoiser: slow start, faster steps")
    add("--noise_offset", type=float, default=0.0, help="scale of noise that is constant per channel (default: 0)")
    add("--timestep_sampling", choices=("independent", "stratified"), default="independent",
        help="stratified spreads the timesteps of a step evenly, so that every step has its share of samples that get "
        "the perceptual loss; each sample's distribution stays the same (default: %(default)s)")  # fmt: skip


def add_lpl_arguments(parser):
    """The latent perceptual loss."""
    group = parser.add_argument_group("latent perceptual loss")
    add = group.add_argument
    add("--use_lpl", action="store_true", help="add the latent perceptual loss to the objective")
    add("--lpl_weight", type=weight_or_auto, default="auto", metavar="{auto,NUMBER}",
        help="auto keeps the loss at --lpl_share of the total (default: %(default)s)")  # fmt: skip
    add("--lpl_share", type=float, default=0.2, help="share of the total under auto (default: %(default)s)")
    add("--lpl_t_threshold", type=float, help="apply it where the timestep is below this, on a scale of 0 to 1000")
    add("--lpl_sigma_threshold", type=float, help="or where noise / signal is at most this (the paper: 3 to 6)")
    add("--lpl_threshold_resolution", type=float, help="resolution that --lpl_sigma_threshold is meant for, px")
    add("--lpl_loss_type", choices=("mse", "l1"), default="mse", help="default: %(default)s")
    add("--lpl_norm_type", choices=("standard", "shared", "default", "batch"), default="standard",
        help="how features are normalised; a weight means nothing without it (default: %(default)s)")  # fmt: skip
    add_switch(group, "lpl_pow_law", True, "weight deeper layers by the inverse of their size (default: on)")
    add("--lpl_num_blocks", type=int, default=4, help="up blocks of the decoder that are used (default: %(default)s)")
    add_switch(group, "lpl_remove_outliers", True, "leave out activations of huge magnitude (default: on)")
    add("--lpl_scale", action="store_true", help="weight each sample by alpha^2 / (alpha^2 + sigma^2)")
    add("--lpl_start", type=int, default=0, help="first optimizer step that it applies to (default: %(default)s)")
    add(
        "--lpl_batch_size",
        type=int,
        help="samples in the decoder at a time (default: by the resolution, 1 at 1024 px)",
    )
    add(
        "--lpl_checkpointing",
        choices=("none", "stage"),
        help="default: stage with --gradient_checkpointing, else none",
    )
    add("--lpl_vae_dtype", choices=("float32", "bfloat16", "float16"),
        help="dtype of the decoder in the loss (default: bfloat16 under bf16, else float32)")  # fmt: skip


def add_run_arguments(parser, validation_epochs):
    """Checkpoints, validation, logs."""
    group = parser.add_argument_group("checkpoints")
    add = group.add_argument
    add("--checkpointing_steps", type=int, default=500, help="optimizer steps between them (default: %(default)s)")
    add("--checkpointing_minutes", type=float, help="minutes between them, besides the steps")
    add("--checkpoints_total_limit", type=int, help="keep so many; the oldest goes after the newest is safe")
    add("--resume_from_checkpoint", help="a checkpoint folder, or latest")
    group = parser.add_argument_group("validation")
    add = group.add_argument
    add("--validation_prompt", nargs="+", help="one or several prompts to draw, always with the same seeds")
    add("--num_validation_images", type=int, default=4, help="per prompt (default: %(default)s)")
    add("--validation_epochs", type=int, default=validation_epochs, help="epochs between grids (default: %(default)s)")
    add("--validation_steps", type=int, help="optimizer steps between grids; overrides --validation_epochs")
    add("--validation_split", type=float, help="share of the images (or, from 1 up, number) that is held out: the "
        "loss on them is the curve that says whether training helps")  # fmt: skip
    add("--validation_data_dir", help="or a folder of captioned images that are held out")
    add("--max_validation_samples", type=int, default=64, help="held-out images that are used (default: %(default)s)")
    add("--validation_compare", action="store_true",
        help="draw each prompt by the model that the run started from too, with the same seeds")  # fmt: skip
    group = parser.add_argument_group("logging")
    add = group.add_argument
    add("--report_to", choices=TRACKERS, default="tensorboard", help="default: %(default)s")
    add("--logging_dir", default="logs", help="below the output folder (default: %(default)s)")
    add("--logging_steps", type=int, default=10, help="optimizer steps between log rows (default: %(default)s)")
    group = parser.add_argument_group("publishing")
    add = group.add_argument
    add("--push_to_hub", action="store_true", help="publish the result on the Hugging Face Hub")
    add("--hub_model_id", help="owner/name or name there (default: the output folder's name)")
    add("--hub_token", help="prefer `hf auth login` or HF_TOKEN: other users of a machine can see command lines")
    add("--hub_private_repo", action="store_true", help="make the repository private")
    group = parser.add_argument_group("other")
    add = group.add_argument
    add("--config", help="YAML file that sets any flag; the command line wins")
    add("--dry_run", action="store_true", help="check everything, print the plan and stop")
    add("--debug", action="store_true", help="show tracebacks")
    add("--local_rank", type=int, default=-1, help="accepted for compatibility")
    add("--debug_loss", action="store_true", help="accepted for compatibility: every loss is logged anyway")
    add("--enable_npu_flash_attention", action="store_true", help="accepted for compatibility")


# ---------------------------------------------------------------------------------------------------------------------
# Checks that need no model


def require(condition, message):
    """Raise UserError(message) unless the condition holds."""
    if not condition:
        raise UserError(message)


POSITIVE = (
    "train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "max_train_steps", "max_train_samples",
    "rank", "lora_alpha", "lr_num_cycles", "checkpointing_steps", "checkpointing_minutes",
    "checkpoints_total_limit", "max_nonfinite_steps", "logging_steps",
    "validation_steps", "validation_epochs", "validation_split", "max_validation_samples", "lpl_batch_size",
    "lpl_threshold_resolution", "lpl_sigma_threshold", "tag_shuffles", "adam_epsilon",
)  # fmt: skip
NOT_NEGATIVE = (
    "learning_rate", "text_encoder_lr", "lr_warmup_steps", "lr_power", "adam_weight_decay", "max_grad_norm", "seed",
    "ema_update_after_step", "dataloader_num_workers", "num_validation_images", "lpl_start", "keep_tags",
    "cache_variants",
)  # fmt: skip
SHARES = ("proportion_empty_prompts", "lora_dropout", "ema_decay")
LORA_ONLY = (
    "rank", "lora_alpha", "lora_layers", "lora_dropout", "use_dora", "train_text_encoder", "init_lora",
    "output_kohya_format", "bnb_quantization_config_path",
)  # fmt: skip


ENDLESS = ("max_grad_norm", "lpl_sigma_threshold")  # may be infinite: no clipping, no gate


def check_flags(args):
    """Ranges and contradictions of the shared flags."""
    for name, value in vars(args).items():
        require(not isinstance(value, float) or math.isfinite(value) or (value > 0 and name in ENDLESS),
                f"--{name} is {value}; it must be a finite number")  # fmt: skip
    for name, value in ((name, getattr(args, name)) for name in POSITIVE):
        require(value is None or value > 0, f"--{name} is {value}; it must be above 0")
    for name, value in ((name, getattr(args, name)) for name in NOT_NEGATIVE):
        require(value is None or value >= 0, f"--{name} is {value}; it must be 0 or more")
    for name, value in ((name, getattr(args, name)) for name in SHARES):
        require(0 <= value <= 1, f"--{name} is {value}; it must lie between 0 and 1")
    for name, why in {"lora_dropout": "nothing would be learnt", "ema_decay": "the average would never move"}.items():
        require(getattr(args, name) < 1, f"--{name} is {getattr(args, name)}; it must be below 1, or {why}")
    require(args.seed < 2**64, f"--seed is {args.seed}; it must be less than 2**64")
    require(args.resolution > 0 and args.resolution % 8 == 0,
            f"--resolution is {args.resolution}; it must be a multiple of 8, because the latents are 8 times smaller, "
            f"e.g. {max(8, args.resolution // 8 * 8)}")  # fmt: skip
    require(args.pretrained_model_name_or_path, "--pretrained_model_name_or_path is missing: give the base model's "
            "folder or Hub name, or leave the data out too for a demonstration")  # fmt: skip
    exclude(args, "train_data_dir", "instance_data_dir")
    args.train_data_dir, args.instance_data_dir = args.train_data_dir or args.instance_data_dir, None
    require(args.train_data_dir or args.dataset_name, "no data: give --train_data_dir FOLDER or --dataset_name NAME")
    exclude(args, "train_data_dir", "dataset_name")
    exclude(args, "validation_split", "validation_data_dir")
    for name in ("train_data_dir", "validation_data_dir"):
        check_data_folder(name, getattr(args, name))
    check_dataset_name(args)
    require(not args.validation_compare or args.validation_prompt, "--validation_compare needs a --validation_prompt")
    if args.num_validation_images == 0:
        args.validation_prompt, args.validation_compare = None, False
    check_data_flags(args)
    check_output_dir(args)
    check_resume(args)
    check_lora_flags(args)
    check_quantization(args)
    check_optimizer_flags(args)
    check_installed(args)
    check_lpl_flags(args)


def check_data_folder(name, folder):
    """A flag that names a folder of images."""
    if folder is None:
        return
    kind = "a data set on the Hub is --dataset_name" if name == "train_data_dir" else "check the spelling"
    require(Path(folder).exists(), f"--{name} {folder}: there is no such folder; {kind}")
    require(Path(folder).is_dir(), f"--{name} {folder} is a file; name the folder that holds it, unpacked if it is "
            "an archive other than tar")  # fmt: skip


def hub_like(name):
    """Whether a name can be one of the Hub's, name or owner/name, and not a path."""
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name, re.ASCII) and not name.startswith((".", "-"))


def check_dataset_name(args):
    """--dataset_name: a folder, or a name that the Hub can have."""
    name = args.dataset_name
    require(name or not args.dataset_config_name, "--dataset_config_name does nothing without --dataset_name")
    require(not name or Path(name).is_dir() or hub_like(name), f"--dataset_name {name}: there is no such folder, and "
            "Hub names have the form owner/name; a folder of images is --train_data_dir")  # fmt: skip


def check_resume(args):
    """--resume_from_checkpoint: latest, or a folder that is there; `checkpoint_utils` looks into it later."""
    given = args.resume_from_checkpoint
    if not given or given == "latest":
        return
    output_dir = Path(args.output_dir)
    places = (Path(given), output_dir / Path(given).name)
    there = any(place.is_dir() or place.with_name(f".old-{place.name}").is_dir() for place in places)
    require(there, f"--resume_from_checkpoint {given}: no checkpoint there, nor in {output_dir}; give a folder "
            "checkpoint-N, or latest")  # fmt: skip


def check_output_dir(args):
    """The output folder must not be this repository, nor hold what the run starts from; it can be written to."""
    for name in ("output_dir", "cache_dir"):
        if getattr(args, name):
            folder = Path(getattr(args, name))
            there = next(place for place in (folder.absolute(), *folder.absolute().parents) if os.path.exists(place))
            require(there.is_dir(), f"--{name} {folder}: {there} is a file; name a folder")
            require(os.access(there, os.W_OK | os.X_OK),
                    f"--{name} {folder}: no permission to write in {there}; name another folder")  # fmt: skip
    output_dir = Path(args.output_dir).resolve()
    require(output_dir != REPOSITORY, f"--output_dir {args.output_dir} is this repository: name a folder of its own")
    for name in (*PATHS[:4], "init_lora"):
        value = getattr(args, name, None)
        inside = value and Path(value).exists() and Path(value).resolve().is_relative_to(output_dir)
        require(not inside, f"--{name} {value} lies in --output_dir {args.output_dir}, which the run will write to: "
                "name another output folder")  # fmt: skip


def exclude(args, *names):
    """Refuse more than one of these flags."""
    given = [f"--{name}" for name in names if getattr(args, name)]
    require(len(given) < 2, f"{' and '.join(given)} exclude each other: give one")


def check_lora_flags(args):
    """Flags that make no sense without --use_lora, or together."""
    require(not (args.single_file and args.use_lora),
            "--single_file is for whole models; a LoRA for other programs is --output_kohya_format")  # fmt: skip
    for name in LORA_ONLY:
        require(args.use_lora or not getattr(args, name), f"--{name} does nothing without --use_lora")
    for name in ("rank", "lora_alpha", "lora_layers", "use_dora"):
        require(not (args.init_lora and getattr(args, name)), f"--init_lora brings its own --{name}: leave that out")
    require(not (args.use_dora and args.output_kohya_format),
            "--use_dora and --output_kohya_format exclude each other: kohya's format can't hold DoRA; "
            "leave one out")  # fmt: skip
    require(args.text_encoder_lr is None or args.train_text_encoder,
            "--text_encoder_lr does nothing without --train_text_encoder")  # fmt: skip


def check_quantization(args):
    """The file of --bnb_quantization_config_path: it must be there and say what it wants."""
    path = args.bnb_quantization_config_path
    if not path:
        return
    flag = f"--bnb_quantization_config_path {path}"
    require(Path(path).is_file(), f"{flag}: there is no such file; write a JSON file of a BitsAndBytesConfig")
    content = read_json(path)
    example = '{"load_in_4bit": true, "bnb_4bit_quant_type": "nf4"} or {"load_in_8bit": true}'
    require(isinstance(content, dict), f"{flag}: found {type(content).__name__}; expected {example}")
    bits = [bool(content.get(name)) for name in ("load_in_4bit", "load_in_8bit")]
    require(sum(bits) == 1, f"{flag}: it sets {'both' if all(bits) else 'neither'} of load_in_4bit and load_in_8bit; "
            f"expected {example}")  # fmt: skip
    kind = content.get("bnb_4bit_quant_type", "fp4")
    require(kind in ("fp4", "nf4"), f"{flag}: bnb_4bit_quant_type is {kind!r}; it must be nf4 or fp4")
    known = {"quant_method", "_load_in_4bit", "_load_in_8bit", "load_in_4bit", "load_in_8bit"}
    wrong = [name for name in content if name not in known and not name.startswith(("bnb_4bit_", "llm_int8_"))]
    require(not wrong, f"{flag}: unknown {', '.join(wrong)}; expected {example}")


def check_optimizer_flags(args):
    """Contradictions among the optimizers' and EMA's flags."""
    require(args.optimizer == "adamw" or not args.use_8bit_adam,
            f"--use_8bit_adam and --optimizer {args.optimizer} exclude each other: leave one out")  # fmt: skip
    require(args.optimizer != "prodigy" or args.text_encoder_lr in (None, args.learning_rate),
            "--optimizer prodigy has one step size for all: leave --text_encoder_lr out")  # fmt: skip
    for name in ("adam_beta1", "adam_beta2"):
        require(0 <= getattr(args, name) < 1, f"--{name} is {getattr(args, name)}; it must be at least 0 and below 1")
    require(args.lr_scheduler != "polynomial" or args.learning_rate > 1e-7,
            "--lr_scheduler polynomial ends at 1e-7: --learning_rate must be above that")  # fmt: skip
    require(args.optimizer != "prodigy" or args.learning_rate > 0, "--optimizer prodigy needs --learning_rate above 0")
    for name, default in {"offload_ema": False, "foreach_ema": False, "ema_update_after_step": 0,
                          "ema_decay": 0.9999}.items():  # fmt: skip
        require(args.use_ema or getattr(args, name) == default, f"--{name} does nothing without --use_ema")


def check_installed(args):
    """Libraries that a flag needs and requirements.txt does not bring."""
    needed = {
        "--enable_xformers_memory_efficient_attention": (
            args.enable_xformers_memory_efficient_attention, "xformers",
            "pip install -r requirements-xformers.txt, or leave the flag out: PyTorch's attention saves memory too",
        ),
        f"--report_to {args.report_to}": (
            args.report_to in ("tensorboard", "wandb", "comet_ml"), args.report_to,
            f"pip install {args.report_to}, or give --report_to none",
        ),
        "--optimizer prodigy": (args.optimizer == "prodigy", "prodigyopt", "pip install -r requirements.txt"),
        "--use_8bit_adam": (args.use_8bit_adam, "bitsandbytes", "pip install -r requirements.txt"),
        f"--bnb_quantization_config_path {args.bnb_quantization_config_path}": (
            args.bnb_quantization_config_path, "bitsandbytes", "pip install -r requirements.txt",
        ),
    }  # fmt: skip
    for flag, (wanted, package, hint) in needed.items():
        require(not wanted or importlib.util.find_spec(package), f"{flag}: {package} is not installed; {hint}")


def check_lpl_flags(args):
    """Ranges and contradictions of the loss' flags."""
    for name, default in {"lpl_weight": "auto", "lpl_share": 0.2, "lpl_scale": False, "lpl_start": 0}.items():
        require(args.use_lpl or getattr(args, name) == default, f"--{name} does nothing without --use_lpl")
    require(
        args.lpl_weight == "auto" or args.lpl_share == 0.2,
        "--lpl_share does nothing beside a --lpl_weight: leave one out",
    )
    exclude(args, "lpl_t_threshold", "lpl_sigma_threshold")
    if args.lpl_t_threshold is not None:
        require(0 < args.lpl_t_threshold <= 1000,
                f"--lpl_t_threshold is {args.lpl_t_threshold}; give a timestep above 0 and up to 1000")  # fmt: skip
    require(args.lpl_threshold_resolution is None or args.lpl_sigma_threshold is not None,
            "--lpl_threshold_resolution scales --lpl_sigma_threshold: give both")  # fmt: skip
    require(not args.lpl_start or not args.max_train_steps or args.lpl_start < args.max_train_steps,
            f"--lpl_start is {args.lpl_start}, but the run ends at --max_train_steps {args.max_train_steps}: the loss "
            "would never be used; give a lower --lpl_start")  # fmt: skip
    require(0 < args.lpl_share < 1, f"--lpl_share is {args.lpl_share}; it must lie between 0 and 1")
    require(args.lpl_num_blocks >= 0, f"--lpl_num_blocks is {args.lpl_num_blocks}; it must be 0 or more")


def check_data_flags(args):
    """Contradictions among the flags about captions and crops."""
    target_sizes(args)
    require(not (args.center_crop and args.cache_variants),
            "--cache_variants are random crops: leave it or --center_crop out")  # fmt: skip
    require(args.shuffle_tags or not args.keep_tags, "--keep_tags does nothing without --shuffle_tags")
    require(args.shuffle_tags or args.tag_shuffles == 8, "--tag_shuffles does nothing without --shuffle_tags")
    require(args.train_data_dir or not args.caption_from_folder, "--caption_from_folder needs a --train_data_dir")
    require(args.train_data_dir or not args.caption_per_line, "--caption_per_line needs a --train_data_dir")
    require(not (args.instance_prompt and args.caption_from_folder),
            "--instance_prompt and --caption_from_folder exclude each other: give one")  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# The data, from flags


def cache_folder(args):
    """Where scans and encodings are kept: `lpl` in --cache_dir, or in the user's cache."""
    return Path(args.cache_dir or os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "lpl"


def target_sizes(args):
    """The shapes that images are cut to, ((height, width), ...)."""
    if not args.aspect_ratio_buckets:
        return ((args.resolution, args.resolution),)
    if args.aspect_ratio_buckets == "auto":
        return auto_buckets(args.resolution)
    return parse_buckets(args.aspect_ratio_buckets)


def largest_size(args):
    """The target with the most pixels, (height, width)."""
    return max(target_sizes(args), key=lambda size: size[0] * size[1])


def framing(args, images, held_out=False):
    """How images are cut; held-out ones always in the same way."""
    sizes = target_sizes(args)
    return Framing(
        sizes,
        assign_buckets(sizes_of(images), sizes) if images else np.zeros(0, np.int16),
        center_crop=args.center_crop or held_out,
        random_flip=args.random_flip and not held_out,
        interpolation=args.image_interpolation_mode,
        crops=0 if held_out else args.cache_variants,
    )


def caption_rules(args):
    """What becomes of captions before they are encoded."""
    return CaptionRules(args.trigger_word, args.shuffle_tags, args.keep_tags, args.tag_shuffles)


def find_images(args):
    """(`Scan` of the images to train on, held-out images); a DataError names the file or column that is wrong."""
    columns = {
        "image_column": args.image_column,
        "caption_column": args.caption_column,
        "default_caption": args.instance_prompt,
        "on_bad_image": args.on_bad_image,
        "cache_dir": args.cache_dir,
        "show": int(os.environ.get("RANK", "0")) == 0,
    }
    of_folders = {"caption_from_folder": args.caption_from_folder, "caption_per_line": args.caption_per_line}
    if args.train_data_dir:
        scan = scan_folder(args.train_data_dir, **columns, **of_folders)
    else:
        local = Path(args.dataset_name).is_dir()
        with contextlib.nullcontext() if local else offline_without_hub():
            scan = scan_dataset(
                args.dataset_name, args.dataset_config_name, **columns, max_samples=args.max_train_samples
            )
    images, held_out = scan.images, []
    if args.validation_data_dir:
        held = scan_folder(args.validation_data_dir, flag="--validation_data_dir", **columns, **of_folders)
        remarks = held.warnings + [f"{held.skipped} of the images are left out."] * bool(held.skipped)
        scan = replace(scan, warnings=scan.warnings + [f"--validation_data_dir: {remark}" for remark in remarks])
        held_out = held.images
    elif args.validation_split:
        share = args.validation_split
        wanted = share if share >= 1 else share * len(images)
        images, held_out = hold_out(images, min(wanted, args.max_validation_samples) if wanted >= 1 else share)
    return replace(scan, images=first_of(images, args.max_train_samples)), first_of(
        held_out, args.max_validation_samples
    )


def first_of(images, count):
    """The first images; all of them where count is None."""
    if count is None or len(images) <= count:
        return images
    return select(images, np.arange(count))


def data_report(args, scan, held_out):
    """The report on the data of a run, `data_report_utils.build_report`."""
    sizes = target_sizes(args) if args.aspect_ratio_buckets else None
    return build_report(scan, held_out, args.resolution, sizes, args.train_batch_size)


def check_strict(args, report):
    """Under --strict, everything that the report on the data remarks upon is an error."""
    if args.strict and report["remarks"]:
        raise DataError("--strict: " + "\n  ".join(["the report on the data remarks:", *report["remarks"]]))


def save_report(report, path):
    """Write the report on the data as JSON."""
    Path(path).write_text(json.dumps(report, indent=1, ensure_ascii=False), encoding="utf-8")


@functools.cache
def _hub_problem(endpoint):
    from huggingface_hub import get_session

    try:
        get_session().head(endpoint, timeout=4)  # any answer will do
    except Exception as error:  # no network, no such host, a proxy that refuses: many kinds
        return f"{endpoint.split('://')[-1]} can't be reached: {' '.join(str(error).split()) or type(error).__name__}"
    return None


def hub_problem():
    """Why the Hub can't be asked, or None. It is tried once, for 4 s, where its client would try for half a minute."""
    from huggingface_hub import constants, is_offline_mode

    if is_offline_mode():
        return "HF_HUB_OFFLINE is set"
    return _hub_problem(constants.ENDPOINT)


@contextlib.contextmanager
def offline_without_hub():
    """Inside, the clients of the Hub look into their caches at once when it can't be reached."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or bool(hub_problem())
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def model_file(name_or_path, file, revision=None, subfolder=None):
    """Path of one small file of a model, on disk or fetched from the Hub; None when the model does not have it."""
    folder = Path(name_or_path)
    relative = f"{subfolder}/{file}" if subfolder else file
    if folder.is_dir():
        return folder / relative if (folder / relative).is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(name_or_path, relative, revision=revision, local_files_only=bool(hub_problem())))
    except LocalEntryNotFoundError:  # no network, which says nothing about the file
        raise
    except EntryNotFoundError:
        return None


def unreadable(name, error):
    """Why a name could not be read on the Hub and what to do, from the exception of its client."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return f"it is gated: accept its licence at https://huggingface.co/{name}, then run `hf auth login`"
    if isinstance(error, errors.RevisionNotFoundError):
        return "it has no such --revision; its revisions are at " + f"https://huggingface.co/{name}/tree/main"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "no folder here, and no model on the Hub that you may see; check the name, or run `hf auth login`"
    if problem := hub_problem():
        return f"no folder here, not in the Hub's cache on this machine, and {problem}; give a folder, or connect"
    return f"neither a folder here nor readable on the Hub ({type(error).__name__}: {' '.join(str(error).split())})"


def read_json(path):
    """A JSON file's content; UserError names a file that is damaged."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:  # no JSON, no UTF-8, no permission
        raise UserError(f"{path}: not valid JSON ({error}); repair it, or download the model again") from None


def read_object(path):
    """The same for a file that must hold an object, such as a config.json."""
    content = read_json(path)
    require(isinstance(content, dict), f"{path}: found a JSON {type(content).__name__}, expected an object; "
            "download the model again")  # fmt: skip
    return content


def check_base_model(args, pipeline_class, components):
    """Refuse anything but a diffusers folder of the right pipeline, from `model_index.json` alone.

    pipeline_class: name that `_class_name` must start with; components: entries that it must have.
    """
    name = args.pretrained_model_name_or_path
    flag = f"--pretrained_model_name_or_path {name}"
    require(not Path(name).is_file(),
            f"{flag} is a single file; a folder in diffusers' layout is needed: load the file with "
            f"{pipeline_class}Pipeline.from_single_file and save it with save_pretrained")  # fmt: skip
    address = re.match(r"https?://huggingface\.co/([\w.-]+/[\w.-]+)", name)
    require(not address, f"{flag} is an address; give the name alone: {address and address[1]}")
    if not Path(name).is_dir() and (name.count("/") != 1 or not hub_like(name)):
        raise UserError(f"{flag}: there is no such folder, and Hub names have the form owner/name")
    try:
        index = model_file(name, "model_index.json", args.revision)
    except Exception as error:  # the Hub client raises many kinds: no network, no such model, no access
        raise UserError(f"{flag}: {unreadable(name, error)}") from error
    require(index, f"{flag}: no model_index.json there; {instead_of_pipeline(Path(name))}")
    found = read_object(index)
    kind = found.get("_class_name") or "pipeline without a class name"
    other = {"StableDiffusionXL": "train_sdxl_lpl.py", "StableDiffusion3": "train_sd3_lpl_flow.py"}
    better = next((script for start, script in other.items() if str(kind).startswith(start)), None)
    require(str(kind).startswith(pipeline_class), f"{flag} is a {kind}; this script trains {pipeline_class} models: "
            + (f"use {better}" if better else "give one of those"))  # fmt: skip
    missing = [part for part in components if not (found.get(part) or [None])[0]]
    refiner = "; the refiner can't be trained here, give the base model" if missing[:1] == ["text_encoder"] else ""
    require(not missing, f"{flag}: its model_index.json has no {', '.join(missing)}; a whole pipeline is needed"
            + refiner)  # fmt: skip
    if Path(name).is_dir():
        gone = [part for part in components if not (Path(name) / part).is_dir()]
        require(not gone, f"{flag}: the folder {gone[:1] and gone[0]}/ named in model_index.json is missing; download "
                "the model again")  # fmt: skip


def instead_of_pipeline(folder):
    """What a folder without a model_index.json holds, and what to do with it."""
    if not folder.is_dir():
        return "a whole pipeline in diffusers' layout is needed, such as stabilityai/stable-diffusion-xl-base-1.0"
    below = [path for pattern in ("*", "snapshots/*") for path in sorted(folder.glob(f"{pattern}/model_index.json"))]
    if below:
        return f"the pipeline is further down: give {below[0].parent}"
    if (folder / "training_state.json").is_file():
        return "it is a checkpoint of a run: give the run's base model, and this as --resume_from_checkpoint"
    files = sorted(path.name for path in folder.iterdir() if path.suffix in (".safetensors", ".ckpt"))
    if any("lora" in file.lower() for file in files) or (folder / "adapter_config.json").is_file():
        return "it is a LoRA: give the model that it was made for, and the LoRA as --init_lora"
    if (folder / "config.json").is_file():
        return "it is one part of a pipeline; give the whole pipeline's folder"
    if files:
        return f"it holds single files ({files[0]}): load one with from_single_file and save it with save_pretrained"
    if not any(folder.iterdir()):
        return "it is empty; give the folder of a whole pipeline"
    return "a whole pipeline in diffusers' layout is needed"


def check_part(args, flag, class_name, subfolder=None):
    """Refuse what a flag like --pretrained_vae_model_name_or_path names unless it is one model of the right class.

    Returns its config.json's path, or None when the flag is not given.
    """
    name = getattr(args, flag)
    if not name:
        return None
    require(not Path(name).is_file(), f"--{flag} {name} is a single file; a folder in diffusers' layout is needed: "
            f"load the file with {class_name}.from_single_file and save it with save_pretrained")  # fmt: skip
    require(Path(name).is_dir() or (name.count("/") == 1 and hub_like(name)),
            f"--{flag} {name}: there is no such folder, and Hub names have the form owner/name")  # fmt: skip
    try:
        config = subfolder and model_file(name, "config.json", subfolder=subfolder)
        config = config or model_file(name, "config.json")
    except Exception as error:  # the Hub client raises many kinds: no network, no such model, no possible name
        raise UserError(f"--{flag} {name}: {unreadable(name, error)}") from error
    where = f"config.json nor {subfolder}/config.json" if subfolder else "config.json"
    below = Path(name, "vae", "config.json").is_file() and not subfolder
    require(config, f"--{flag} {name}: no {where} there; {class_name} in diffusers' layout is needed"
            + (f": give {Path(name, 'vae')}" if below else ""))  # fmt: skip
    found = read_object(config).get("_class_name")
    require(found == class_name, f"--{flag} {name}: found {found}, expected {class_name}; give another folder")
    return config


def check_vae_dtype(args, vae_config):
    """Refuse an explicit float16 where the decoder overflows in it. vae_config: the autoencoder's config.json."""
    if args.lpl_vae_dtype == "float16" and vae_config.get("force_upcast", True):
        hint = ", or give --pretrained_vae_model_name_or_path madebyollin/sdxl-vae-fp16-fix"
        raise UserError(
            "--lpl_vae_dtype float16: this VAE's decoder overflows in float16 (force_upcast in its config); use "
            "bfloat16 or float32" + (hint if vae_config.get("latent_channels") == 4 else "")
        )
