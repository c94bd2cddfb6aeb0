"""Flags: their parser, recipe files for --config, and the groups of flags that the training scripts share.

Nothing here imports torch, so that a wrong flag is answered at once.
"""

import argparse
import os
from dataclasses import fields
from pathlib import Path

import yaml

from lpl_finetuning.adapters import pattern_text
from lpl_finetuning.data.encoding import EncodingSettings, vae_identity
from lpl_finetuning.data.images import INTERPOLATIONS
from lpl_finetuning.data.samples import CaptionRules, FramingRules
from lpl_finetuning.data.scan import DataSource
from lpl_finetuning.errors import UserError, near_name, require
from lpl_finetuning.files import cache_folder
from lpl_finetuning.other_flags import advice_on, advice_on_value
from lpl_finetuning.sample_prompts import prompt_texts, read_prompts_file
from lpl_finetuning.yaml_texts import YamlTexts

REPOSITORY = Path(__file__).resolve().parents[1]
LR_SCHEDULERS = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")
SAVE_DTYPES = ("float32", "bfloat16", "float16")
LORA_TYPES = ("lora", "dora", "loha", "lokr")
OPTIMIZERS = ("adamw", "prodigy", "adafactor")
TRACKERS = ("tensorboard", "wandb", "comet_ml", "all", "none")
MODEL_OR_DATA = {"pretrained_model_name_or_path", "dataset_name", "train_data_dir", "instance_data_dir"}
CLASS_WEIGHTS = {"none": 0.0, "sqrt": 0.5, "balanced": 1.0}  # w = n ** -power of a class of n images
SECRETS = ("hub_token",)  # flags whose values never reach a file, a log or a tracker


# ---------------------------------------------------------------------------------------------------------------------
# Parsing: flags, then a recipe file, then defaults


class Flags(argparse.Namespace):
    """The values of all flags, as attributes. They never change: `but` gives a copy with other values.

    base_model: the `BaseModel` that the flags name, once it is checked; defaults: {flag: default}; given: names of the
    flags on the command line; prompts: the entries of --validation_prompts_file, read once. These are no flags, and
    `vars` leaves them out.
    """

    __slots__ = ("base_model", "defaults", "given", "prompts")

    def __init__(self, values, defaults, base_model=None, given=frozenset(), prompts=()):
        vars(self).update(values)
        object.__setattr__(self, "defaults", defaults)
        object.__setattr__(self, "base_model", base_model)
        object.__setattr__(self, "given", given)
        object.__setattr__(self, "prompts", prompts)

    def __setattr__(self, name, value):
        raise AttributeError(f"{name}: flags do not change once they are parsed; take args.but({name}=…)")

    def __delattr__(self, name):
        setattr(self, name, None)

    def __reduce__(self):
        return Flags, (vars(self), self.defaults, self.base_model, self.given, self.prompts)

    def but(self, base_model=None, **changes):
        """A copy with other values of some flags, or another base model."""
        unknown = changes.keys() - vars(self).keys()
        if unknown:
            raise AttributeError(f"no such flags: {', '.join(sorted(unknown))}")
        return Flags(vars(self) | changes, self.defaults, base_model or self.base_model, self.given, self.prompts)


class FlagParser(argparse.ArgumentParser):
    """An ArgumentParser with named groups, no abbreviations, and a suggestion for a misspelt flag."""

    def __init__(self, description, takes_part_of_a_recipe=False):
        """takes_part_of_a_recipe: a file for --config may have flags of other scripts too, which are left out."""
        self.takes_part_of_a_recipe = takes_part_of_a_recipe
        self.withdrawn = {}
        super().__init__(
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def flags(self):
        """dest -> action of everything but --help."""
        return {action.dest: action for action in self._actions if action.dest != "help"}

    def withdraw(self, *names):
        """Take flags away that a script has no use for: unknown to its users, they keep their defaults as values."""
        for name in names:
            action = self.flags()[name]
            self.withdrawn[name] = action.default
            self._actions.remove(action)
            for text in action.option_strings:
                del self._option_string_actions[text]
            for group in self._action_groups:
                if action in group._group_actions:
                    group._group_actions.remove(action)

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
                advice = advice_on_value(action.dest, text)
                raise UserError(f"{place} is {text!r}; it must be a {kind}{f': {advice}' if advice else ''}") from None
            raise UserError(f"{place} is {text!r}; {error}") from None
        if action.choices and value not in action.choices:
            near = near_name(str(value), map(str, action.choices))
            advice = advice_on_value(action.dest, text)
            meant = f"{advice}; " if advice else f"did you mean {near}? " if near else ""
            raise UserError(f"{place} is {text!r}; {meant}choose from {', '.join(map(str, action.choices))}")
        return value

    def parse(self, argv=None, embedded_default=None):
        """The `Flags` that `argv` sets; a flag that is not there takes its value from --config, then its default.

        embedded_default: path of the recipe that is used when neither a base model nor data are named.
        """
        given = self._given(argv)
        defaults = {dest: action.default for dest, action in self.flags().items()}
        recipe = self.read_recipe(given["config"]) if given.get("config") else {}
        if embedded_default and not (given.keys() | recipe.keys()) & MODEL_OR_DATA:
            require(embedded_default.is_file(),
                    "no model and no data named, and the demonstration needs a clone of the repository: name both, or "
                    "run `pip install -e .` in a clone")  # fmt: skip
            recipe = self.read_recipe(embedded_default) | recipe
            place = embedded_default.relative_to(REPOSITORY)
            print(f"No model and no data named: using the embedded examples, {place}.")
        values = one_lora_type(resolved(self.withdrawn | defaults | recipe | given), given)
        file = values.get("validation_prompts_file")
        return Flags(values, defaults, given=frozenset(given), prompts=read_prompts_file(file) if file else ())

    def _given(self, argv):
        """{flag: value} of the command line."""
        missing = object()
        namespace = argparse.Namespace(**dict.fromkeys(self.flags(), missing))
        namespace, words = self.parse_known_args(argv, namespace)
        switches = {f"--no-{dest}": dest for dest, action in self.flags().items() if is_switch(action)}
        given = {dest: value for dest, value in vars(namespace).items() if value is not missing}
        for off in (word for word in words if word in switches):
            on = off.replace("--no-", "--", 1)
            require(given.get(switches[off]) is not True, f"{on} and {off} exclude each other: give one")
            given[switches[off]] = False
        unknown = [word for word in words if word not in switches]
        if unknown:
            raise UserError("; ".join(self._unknown(unknown)))
        return given

    def _unknown(self, words):
        """A message for each unknown flag, and for each argument that is not the value of one."""
        switches = {f"no-{dest}" for dest, action in self.flags().items() if is_switch(action)}
        options = [*self.flags(), *sorted(switches)]
        previous = ""
        for word in words:
            if word.startswith("-") and not is_number(word):
                name = word.split("=")[0]
                if name.lstrip("-") in switches:
                    yield f"{name} takes no value, found {word.partition('=')[2]!r}; write {name} alone"
                    continue
                near = near_name(name.lstrip("-"), options)
                advice = advice_on(name.lstrip("-"), self.flags())
                if not advice:
                    advice = f"did you mean --{near}?" if near else "--help lists all flags"
                yield f"unknown flag {name}: {advice}"
            elif not word.strip():
                yield f"unknown argument {word!r}: a backslash that continues a line must be its last character"
            elif not previous.startswith("-"):
                switch = word.lower() in ("true", "false", "1", "0", "yes", "no")
                text = "a value follows its flag, and a value with blanks needs quotes"
                yield f"unknown argument {word}: {'switches take no value' if switch else text}"
                break  # the words that follow belong to it
            previous = word

    def read_recipe(self, path):
        """The flags in a YAML file, checked as on the command line. Relative paths in it are seen from its folder."""
        path = Path(path)
        require(not path.is_dir(), f"--config {path} is a folder; name a YAML file such as those in configs/recipes")
        require(path.is_file(), f"--config {path}: there is no such file; the recipes are in configs/recipes")
        try:
            text = path.read_text(encoding="utf-8")
            content, as_written = yaml.safe_load(text) or {}, yaml.load(text, YamlTexts) or {}
        except yaml.YAMLError as error:
            text = " ".join(str(error).split())
            raise UserError(f"--config {path}: not valid YAML: {text}; write lines such as `rank: 16`") from None
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--config {path}: can't be read as text ({error}); name a YAML file") from None
        if not isinstance(content, dict):
            found = type(content).__name__
            raise UserError(f"--config {path}: found a {found}; expected lines such as `learning_rate: 1e-4`")
        if self.takes_part_of_a_recipe:
            left = [str(key) for key in content if key not in self.flags()]
            content = {key: value for key, value in content.items() if key in self.flags()}
            out = f"; left out are {', '.join(left)}" if left else ""
            print(f"--config {path}: taken are {', '.join(content) or 'no flags'}{out}")
        return {key: self._recipe_value(path, key, value, as_written.get(str(key))) for key, value in content.items()}

    def _recipe_value(self, path, key, value, as_written):
        """A value of a recipe. as_written: its text, before YAML reads `no` as false and `007` as 7."""
        action = self.flags().get(key)
        if action is None:
            near = near_name(str(key), self.flags())
            advice = f"did you mean {near}?" if near else "its keys are flags without their dashes"
            raise UserError(f"--config {path}: unknown key {key}; {advice_on(str(key), self.flags()) or advice}")
        if value is None:
            require(action.default is None, f"--config {path}: {key} has no value; give one, or remove the line")
            return None
        if is_switch(action):
            if not isinstance(value, bool):
                raise UserError(f"--config {path}: {key} is {value!r}; it must be true or false")
            return value
        if isinstance(value, dict) or (isinstance(value, list) and (action.nargs not in ("+", "*") or not value)):
            raise UserError(f"--config {path}: {key} is {value!r}; it takes one value")
        if action.type not in (int, float):
            value = as_written
        values = value if isinstance(value, list) else [value]
        values = [self.convert(action, str(item), f"--config {path}: {key}") for item in values]
        if action.type is input_path and (path.parent / values[0]).exists():
            values = [str((path.parent / values[0]).resolve())]
        return values if action.nargs in ("+", "*") else values[0]


def resolved(values):
    """{flag: value} with one name for what several flags can say."""
    values = dict(values)
    if values.get("instance_data_dir"):  # the DreamBooth scripts' name for --train_data_dir
        require(not values["train_data_dir"],
                "--train_data_dir and --instance_data_dir exclude each other: give one")  # fmt: skip
        values |= {"train_data_dir": values["instance_data_dir"], "instance_data_dir": None}
    for name in ("lpl_features", "lpl_weight"):  # a single value stands alone, as in the files of older runs
        if isinstance(values.get(name), list) and len(values[name]) == 1:
            values[name] = values[name][0]
    if values.get("num_validation_images") == 0:
        values |= {"validation_prompt": None, "validation_prompts_file": None, "validation_compare": False}
    return values


def one_lora_type(values, given):
    """{flag: value} in which --use_dora and --lora_type dora say the same; the command line's word counts.

    Args:
        given: {flag: value} of the command line.
    """
    kind, dora = values.get("lora_type", "lora"), values.get("use_dora", False)
    if ("use_dora" in given) == ("lora_type" in given):
        require(
            not dora or kind in ("lora", "dora"), f"--use_dora and --lora_type {kind} exclude each other: give one"
        )
        kind = "dora" if dora else kind
    elif "use_dora" in given:
        kind = "dora" if dora else ("lora" if kind == "dora" else kind)
    return values | {"lora_type": kind, "use_dora": kind == "dora"}


NOT_IN_RECIPES = ("config", "dry_run", "debug", "local_rank", "resume_from_checkpoint", *SECRETS)


def recipe_text(args):
    """The resolved flags, secrets left out, as YAML that `--config` reads."""
    values = {key: value for key, value in vars(args).items() if key in args.defaults and key not in NOT_IN_RECIPES}
    if values.get("use_lpl"):
        values["lpl_norm_gradient"] = deviation_gradient(args)
    return yaml.safe_dump(values, sort_keys=False)


def deviation_gradient(args):
    """--lpl_norm_gradient, or what its absence stands for in the loss."""
    from lpl_utils import LPLConfig  # imports torch: a run is on its way

    return LPLConfig(norm_type=args.lpl_norm_type, norm_gradient=args.lpl_norm_gradient).deviation_gradient


RECIPE_HEAD = "# All flags of a run, as it resolved them. To use them again: --config with this file.\n"


def save_recipe(args, path):
    """Write the resolved flags into a file."""
    Path(path).write_text(RECIPE_HEAD + recipe_text(args), encoding="utf-8")


def changed_flags(args):
    """{flag: value} of the flags that differ from their defaults, secrets left out, in the order of --help."""
    return {flag: value for flag, value in vars(args).items()
            if flag not in SECRETS and flag in args.defaults and value != args.defaults[flag]}  # fmt: skip


def print_configuration(args, say):
    """Print the flags that differ from their defaults, one a line; `config.yaml` in the output folder has all."""
    changed = changed_flags(args)
    width = max(map(len, changed), default=0)
    say("\nFlags that differ from their defaults (config.yaml in the output folder has all of them):")
    for flag, value in changed.items():
        text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
        say(f"    {flag:{width}}  {text}")


def settings_from_flags(cls, args, **more):
    """An instance of a settings dataclass: each field has the value of the flag of its name, or that in `more`."""
    return cls(**{field.name: getattr(args, field.name) for field in fields(cls) if field.name not in more}, **more)


def path(text):
    """Type of a flag that names a file or folder: ~ is the home folder, which a shell leaves alone in --flag=~/x."""
    return os.path.expanduser(text)


def input_path(text):
    """Type of a flag that names a file or folder to be read: in a recipe it is seen from the recipe's folder."""
    return path(text)


def weight_or_auto(text):
    """Type of --lpl_weight: "auto" or a number, 0 or more."""
    if text == "auto":
        return text
    if not is_number(text) or not float(text) >= 0:
        raise argparse.ArgumentTypeError("it must be auto or a number, 0 or more")
    return float(text)


FEATURES = ("decoder", "rgb", "tiny_decoder", "classifier", "latent")  # networks of --lpl_features


def network_and_part(text):
    """Type of --lpl_features: a network, or network=part with a number above 0 and at most 1. The text is kept."""
    network, equals, part = text.partition("=")
    if network not in FEATURES:
        near = near_name(network, FEATURES)
        meant = f"did you mean {near}? " if near else ""
        raise argparse.ArgumentTypeError(f"{meant}choose from {', '.join(FEATURES)}")
    if equals and not (is_number(part) and 0 < float(part) <= 1):
        raise argparse.ArgumentTypeError(f"the part of {network} must be a number above 0 and at most 1")
    return text


def classifier_stage(text):
    """Type of --lpl_classifier_stages: the number of a residual stage, from 1, or "pooled"."""
    if text != "pooled" and not (text.isascii() and text.isdigit() and int(text)):
        raise argparse.ArgumentTypeError("it must be pooled or the number of a residual stage, from 1")
    return text


def feature_parts(args):
    """{network: its part of the perceptual loss, or None} of --lpl_features, in their order."""
    given = [args.lpl_features] if isinstance(args.lpl_features, str) else args.lpl_features
    pairs = [text.partition("=") for text in given]
    return {network: float(part) if equals else None for network, equals, part in pairs}


def feature_fractions(args):
    """{network: its part of the perceptual loss} of --lpl_features; the parts are equal where none is given."""
    parts = feature_parts(args)
    return {network: 1 / len(parts) if part is None else part for network, part in parts.items()}


def shift_or_auto(text):
    """Type of --timestep_shift: "auto" or a number above 0."""
    if text != "auto" and not (is_number(text) and float(text) > 0):
        raise argparse.ArgumentTypeError("it must be auto or a number above 0")
    return text if text == "auto" else float(text)


def is_number(text):
    """Whether a text is a number, finite or not."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def is_switch(action):
    """Whether a flag is on or off: `parse` takes --name, and --no-name against a recipe or a default that is on."""
    return action.nargs == 0 and action.dest != "help"


# ---------------------------------------------------------------------------------------------------------------------
# Argument groups that the recipes share


def add_model_arguments(parser):
    """What is trained."""
    group = parser.add_argument_group("model")
    add = group.add_argument
    add(
        "--pretrained_model_name_or_path",
        type=input_path,
        help="Hub name or folder of the base pipeline (diffusers layout), or a whole model in a single .safetensors "
        "file",
    )
    add("--config_from", type=input_path, help="folder or Hub name of a pipeline with what a single file lacks: "
        "configurations, tokenizers, text encoders (default: the package's, which has no text encoders)")  # fmt: skip
    add("--revision", help="revision of the base model on the Hub")
    add("--variant", help="file variant of the base model, e.g. fp16")
    add("--allow_pickle", action="store_true", help="load weights that are there as pickles (.bin) only, which can "
        "run programs; without it safetensors only")  # fmt: skip
    add("--pretrained_vae_model_name_or_path", type=input_path,
        help="another autoencoder (madebyollin/sdxl-vae-fp16-fix), a pipeline's, or a .safetensors file")  # fmt: skip
    add("--single_file", action="store_true", help="save a whole model as one file too, model.safetensors for ComfyUI "
        "and (SDXL) A1111")  # fmt: skip
    add("--save_dtype", choices=SAVE_DTYPES, help="dtype of what was trained in the saved LoRA or model (default: "
        "float32, in a --single_file float16); other parts keep that of the base model")  # fmt: skip
    add("--output_name", help="name of the file for other programs, without .safetensors: of --output_kohya_format "
        "(default: pytorch_lora_weights_kohya) or --single_file (default: model)")  # fmt: skip
    add("--metadata_title", help="title that other programs show, in that file (default: --output_name, else the name "
        "on the Hub or the output folder's)")  # fmt: skip
    add("--metadata_trigger_phrase", help="words that call what was learnt, in that file and on the model card "
        "(default: --trigger_word or --instance_prompt)")  # fmt: skip
    add("--save_tag_frequency", action="store_true", default=True, help="list the captions' tags in the file of "
        "--output_kohya_format, as sd-scripts does; they tell what is in the captions (default: on; "
        "--no-save_tag_frequency)")  # fmt: skip
    group = parser.add_argument_group("LoRA")
    add = group.add_argument
    add("--use_lora", action="store_true", help="train a LoRA; without it the whole denoiser is trained")
    add("--rank", type=int, help="rank of the LoRA (default: 4)")
    add("--lora_alpha", type=float, help="its strength is alpha / rank (default: the rank)")
    add("--lora_dropout", type=float, default=0.0, help="dropout in LoRA layers (default: %(default)s)")
    add("--lora_layers", help="comma-separated layer names that get a LoRA, or kinds of layers: attention, "
        "feed-forward, for SD3.5 medium attn2 (default: attention)")  # fmt: skip
    add("--lora_blocks", help="comma-separated blocks whose layers get a LoRA; SDXL: style, content, layout, or names "
        "such as down_blocks.2; SD3: numbers (default: all)")  # fmt: skip
    add("--lora_pattern", nargs="+", type=pattern_text, metavar="PATTERN=SETTINGS", help="rank, alpha and learning "
        'rate of layers that a regular expression is found in: "attn2=rank:8,lr:5e-5"; rank:0 leaves them out; of '
        "several that fit the last counts")  # fmt: skip
    add("--lora_type", choices=LORA_TYPES, default="lora", help="lora; dora learns magnitude and direction apart, "
        "slower; loha and lokr are Hadamard and Kronecker products, as in LyCORIS (default: %(default)s)")  # fmt: skip
    add("--lokr_factor", type=int, default=-1, help="size of the smaller Kronecker factor of lokr; -1: near the "
        "square root (default: %(default)s)")  # fmt: skip
    add("--use_dora", action="store_true", help="the same as --lora_type dora")
    add("--train_text_encoder", action="store_true", help="give the CLIP text encoders a LoRA too")
    add(
        "--init_lora",
        type=input_path,
        help="go on from this LoRA, a file, folder or Hub name; rank, alpha and layers are the file's",
    )
    add("--bnb_quantization_config_path", type=input_path, help="JSON file of a BitsAndBytesConfig: the "
        "frozen denoiser in 4 or 8 bits, on a GPU")  # fmt: skip
    add("--output_kohya_format", action="store_true", help="save it for ComfyUI, sd-scripts and (SDXL) A1111 too")
    add("--merge_into", type=path, metavar="FOLDER", help="new folder for a whole model too: the base model with the "
        "LoRA added to its weights, in their dtype")  # fmt: skip


def add_data_arguments(parser, resolution):
    """What it is trained on."""
    group = parser.add_argument_group("data")
    add = group.add_argument
    add("--train_data_dir", type=input_path, help="folder of images, also in folders within it, with "
        "metadata.jsonl, .csv or .parquet or a .txt file beside each image, or of WebDataset shards "
        "(*.tar)")  # fmt: skip
    add("--dataset_name", type=path, help="data set on the Hub, or a folder written by datasets' save_to_disk")
    add("--dataset_config_name", help="configuration of that data set")
    add("--instance_data_dir", type=input_path, help="the same as --train_data_dir, as the DreamBooth scripts call it")
    add("--instance_prompt", help="caption of all images that have none")
    add("--image_column", default="image", help="column with the image (default: %(default)s)")
    add("--caption_column", default="text", help="column with the caption (default: %(default)s)")
    add("--caption_from_folder", action="store_true", help="the folder's name is the caption of images without one")
    add("--caption_per_line", action="store_true", help="each line of a .txt file is a caption of its own; one is "
        "drawn in each epoch")  # fmt: skip
    add("--follow_links", action="store_true", help="use pictures outside the folder that links in it lead to")
    add("--trigger_word", default="", help="stands before every caption that does not begin with it as a whole word")
    add("--shuffle_tags", action="store_true", help="shuffle what stands between the commas of a caption")
    add("--keep_tags", type=int, default=0, help="keep the first N tags in front (default: %(default)s)")
    add("--tag_shuffles", type=int, default=8, help="orders of each caption that are encoded; one is drawn in each "
        "epoch (default: %(default)s)")  # fmt: skip
    add("--on_bad_image", choices=("error", "skip"), default="error", help="what to do about images that can't be "
        "used (default: %(default)s)")  # fmt: skip
    add("--strict", action="store_true", help="stop at anything that the report on the data remarks upon")
    add("--max_train_samples", type=int, help="use only the first N images")
    add(
        "--cache_dir",
        type=path,
        help="folder of data sets and of encoded latents and prompts (default: the user's cache)",
    )
    add("--resolution", type=int, default=resolution, help="training size in px (default: %(default)s)")
    add("--aspect_ratio_buckets", help='train on several shapes: "h,w;h,w", or auto for those of constant area around '
        "--resolution, multiples of 64")  # fmt: skip
    add("--center_crop", action="store_true", help="crop the middle instead of a random part")
    add("--cache_variants", type=int, default=0, help="encode N random crops of each image once, instead of a "
        "new one in every step (default: %(default)s)")  # fmt: skip
    add("--random_flip", action="store_true", help="flip half of the images left to right")
    add("--image_interpolation_mode", choices=INTERPOLATIONS, default="lanczos", help="default: %(default)s")
    add("--proportion_empty_prompts", type=float, default=0.0, help="share of captions dropped (default: %(default)s)")
    add("--dataloader_num_workers", type=int, default=0, help="processes that load data (default: %(default)s)")


def add_training_arguments(parser, train_batch_size, num_train_epochs, adam_weight_decay):
    """How it is trained."""
    group = parser.add_argument_group("training")
    add = group.add_argument
    add("--output_dir", type=path, default="sd-model-finetuned", help="default: %(default)s")
    add("--seed", type=int, default=0, help="every draw follows from it (default: %(default)s)")
    add("--train_batch_size", type=int, default=train_batch_size, help="per device (default: %(default)s)")
    add("--num_train_epochs", type=int, default=num_train_epochs, help="default: %(default)s")
    add("--max_train_steps", type=int, help="optimizer steps; overrides --num_train_epochs")
    add("--gradient_accumulation_steps", type=int, default=1, help="default: %(default)s")
    add("--gradient_checkpointing", action="store_true", help="less memory, more time")
    add("--learning_rate", type=float, default=1e-4, help="default: %(default)s")
    add("--scale_lr", action="store_true", help="multiply it by devices, accumulation and batch size")
    add("--lr_scheduler", choices=LR_SCHEDULERS, default="constant", help="default: %(default)s")
    add("--lr_warmup_steps", type=int, default=500, help="optimizer steps in which the rate rises from 0; without "
        "effect under --lr_scheduler constant (default: %(default)s)")  # fmt: skip
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
    add("--max_nonfinite_steps", type=int, default=10, help="stop after N steps in a row whose loss or gradient is "
        "not finite; each of them is skipped (default: %(default)s)")  # fmt: skip
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
        help="stratified spreads the timesteps of a step as evenly as possible, and so the samples that get the "
        "perceptual loss; each sample's distribution stays the same (default: %(default)s)")  # fmt: skip


def add_lpl_arguments(parser):
    """The latent perceptual loss."""
    group = parser.add_argument_group("latent perceptual loss")
    add = group.add_argument
    add("--use_lpl", action="store_true", help="add the latent perceptual loss to the objective")
    add("--lpl_weight", type=weight_or_auto, nargs="+", default="auto", metavar="{auto,NUMBER}",
        help="auto keeps the loss at --lpl_share of the total; with several --lpl_features a number for each, in the "
        "same order (default: %(default)s)")  # fmt: skip
    add("--lpl_share", type=float, default=0.2, help="share of the total under auto (default: %(default)s)")
    add("--lpl_t_threshold", type=float, help="apply it where the timestep is below this, on a scale of 0 to 1000 "
        "(SDXL: 200 if no threshold is given)")  # fmt: skip
    add("--lpl_sigma_threshold", type=float, help="or where noise / signal is at most this (SD3: 3 if no "
        "threshold is given; the paper: 3 to 6)")  # fmt: skip
    add("--lpl_threshold_resolution", type=float, help="resolution that --lpl_sigma_threshold is meant for, px")
    add("--lpl_loss_type", choices=("mse", "l1"), default="mse", help="default: %(default)s")
    add("--lpl_features", type=network_and_part, nargs="+", default="decoder", metavar="NETWORK[=PART]",
        help="networks whose features are compared: decoder; rgb, the decoder with the decoded picture; tiny_decoder; "
        "classifier; latent, the latents themselves, as a control. Of several each has an equal part of the loss, or "
        "PART, as in decoder=0.7 classifier=0.3 (default: %(default)s)")  # fmt: skip
    add("--lpl_classifier", type=input_path, help="classifier of latents for --lpl_features classifier: the output "
        "folder of train_latent_classifier.py, or its name on the Hub")  # fmt: skip
    add("--lpl_classifier_stages", type=classifier_stage, nargs="+", metavar="STAGE", help="stages of it that are "
        "compared: numbers of residual stages from 1, pooled (default: all that --lpl_norm_type takes)")  # fmt: skip
    add("--lpl_tiny_decoder", type=input_path, help="AutoencoderTiny for --lpl_features tiny_decoder: a folder or "
        "Hub name, such as madebyollin/taesdxl or madebyollin/taesd3")  # fmt: skip
    add("--lpl_augment", action="store_true", help="flip, shift and cut out a rectangle of both latents alike, at "
        "random, before any network sees them")  # fmt: skip
    add("--lpl_norm_type", choices=("standard", "shared", "default", "batch", "target", "none"), default="standard",
        help="how features are normalised; a weight means nothing without it (default: %(default)s)")  # fmt: skip
    add("--lpl_norm_gradient", choices=("none", "half", "full"),
        help="gradient through the deviation that --lpl_norm_type standard divides by (default: full)")  # fmt: skip
    add("--lpl_pow_law", action="store_true", default=True,
        help="weight deeper layers by the inverse of their size (default: on; --no-lpl_pow_law)")  # fmt: skip
    add("--lpl_num_blocks", type=int, default=4, help="up blocks of the decoder, full or tiny, that are used; a tiny "
        "one has 3 (default: %(default)s)")  # fmt: skip
    add("--lpl_remove_outliers", action="store_true", default=True,
        help="leave out activations of huge magnitude (default: on; --no-lpl_remove_outliers)")  # fmt: skip
    add("--lpl_outlier_reference_resolution", type=float, default=256, help="resolution in px at which the mask of "
        "those activations has its original margin; the margin grows in proportion to the image, as in the paper; "
        "0: the same margin at any size (default: %(default)s)")  # fmt: skip
    add("--lpl_scale", action="store_true", help="weight each sample by alpha^2 / (alpha^2 + sigma^2)")
    add("--lpl_start", type=int, default=0, help="first optimizer step that it applies to (default: %(default)s)")
    add(
        "--lpl_batch_size",
        type=int,
        help="samples in a network at a time (default: by the resolution, 1 at 1024 px; in a classifier more)",
    )
    add(
        "--lpl_checkpointing",
        choices=("none", "stage"),
        help="default: stage with --gradient_checkpointing, else none",
    )
    add("--lpl_vae_dtype", choices=("float32", "bfloat16", "float16"),
        help="dtype of the networks in the loss (default: bfloat16 under bf16, else float32)")  # fmt: skip


def add_classifier_arguments(parser):
    """The latent classifier: its labels, network and augmentation."""
    group = parser.add_argument_group("classifier")
    add = group.add_argument
    add("--label_column", help="column with the label, of a listing, a data set or the .json members of shards "
        "(default: the names of the folders at the top of --train_data_dir; of a data set, label)")  # fmt: skip
    add("--block_widths", type=int, nargs="+", default=[64, 128, 256], help="channels of each residual stage, "
        "multiples of 8; each stage after the first halves the size (default: %(default)s)")  # fmt: skip
    add("--blocks_per_stage", type=int, default=2, help="residual blocks of a stage (default: %(default)s)")
    add("--dropout", type=float, default=0.1, help="in the blocks and before the last layer (default: %(default)s)")
    add("--label_smoothing", type=float, default=0.1, help="share of the target that all classes have in common "
        "(default: %(default)s)")  # fmt: skip
    add("--class_weights", choices=tuple(CLASS_WEIGHTS), default="sqrt", help="weight of a class of n images in the "
        "loss: 1, 1 / sqrt(n) or 1 / n (default: %(default)s)")  # fmt: skip
    add("--latent_pad", type=int, help="pad latents by N on each side, repeating their edge, and cut them back at "
        "random (default: a sixteenth of their size, 1 at least)")  # fmt: skip
    add("--random_erasing", type=float, default=0.5, help="share of samples in which a rectangle of latents is "
        "replaced by noise (default: %(default)s)")  # fmt: skip
    add("--erasing_area", type=float, default=0.25, help="area of that rectangle at most, as a share of the latent "
        "(default: %(default)s)")  # fmt: skip


def add_run_arguments(parser, validation_epochs):
    """Checkpoints, validation, logs."""
    group = parser.add_argument_group("checkpoints")
    add = group.add_argument
    add("--checkpointing_steps", type=int, default=500, help="optimizer steps between them (default: %(default)s)")
    add("--checkpointing_minutes", type=float, help="minutes between them, besides the steps")
    add("--checkpoints_kohya_format", action="store_true", help="put a file for other programs into every checkpoint "
        "too, with --output_kohya_format")  # fmt: skip
    add("--checkpoints_total_limit", type=int, help="keep at most N; the oldest goes after the newest is safe")
    add("--resume_from_checkpoint", type=path, help="a checkpoint folder, or latest")
    group = parser.add_argument_group("validation")
    add = group.add_argument
    add("--validation_prompt", nargs="+", help="one or several prompts to draw, always with the same seeds")
    add("--validation_prompts_file", type=input_path, help="prompts with a size, steps, guidance, seed and sampler of "
        "their own: a YAML list, or lines of sd-scripts (.txt); drawn after those of --validation_prompt")  # fmt: skip
    add("--num_validation_images", type=int, default=4, help="per prompt (default: %(default)s)")
    add("--validation_epochs", type=int, default=validation_epochs, help="epochs between grids (default: %(default)s)")
    add("--validation_steps", type=int, help="optimizer steps between grids; overrides --validation_epochs")
    add("--validation_split", type=float, help="share of the images (or, from 1 up, number) that is held out: the "
        "loss on them tells learning from memorising")  # fmt: skip
    add("--validation_data_dir", type=input_path, help="or a folder of captioned images that are held out")
    add("--max_validation_samples", type=int, default=64, help="held-out images that are used (default: %(default)s)")
    add("--validation_compare", action="store_true",
        help="draw each prompt by the model that the run started from too, with the same seeds")  # fmt: skip
    add("--validation_metrics", action="store_true", help="at every validation, the one-step test on the held-out "
        "images: what is wrong with the model's estimates at ten noise levels")  # fmt: skip
    add("--validation_kid_every", type=int, default=5, help="with it, at the first, every N-th and the last "
        "validation the kernel distance (KID) of samples to the held-out images; 0: never "
        "(default: %(default)s)")  # fmt: skip
    add("--validation_kid_samples", type=int, default=256, help="samples for it (default: %(default)s)")
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
    add("--hub_private_repo", action="store_true", help="make the repository private if this run creates it")
    group = parser.add_argument_group("other")
    add = group.add_argument
    add(
        "--config",
        type=path,
        help="YAML file that sets any flag; the command line wins, --no-NAME over a switch that is on",
    )
    add("--dry_run", action="store_true", help="check everything, print the plan and stop")
    add("--debug", action="store_true", help="show tracebacks, and how long the stages of the start take")
    add("--local_rank", type=int, default=-1, help="accepted for compatibility")
    add("--debug_loss", action="store_true", help="accepted for compatibility: every loss is logged anyway")
    add("--enable_npu_flash_attention", action="store_true", help="accepted for compatibility")


# ---------------------------------------------------------------------------------------------------------------------
# Settings from flags


def mixed_precision(args):
    """The precision of a run: "no", "fp16" or "bf16", from the flag or accelerate's configuration."""
    return (args.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION") or "no").lower()


def step_images(args, ranks):
    """Images of an optimizer step, over all ranks."""
    return args.train_batch_size * ranks * args.gradient_accumulation_steps


def data_source(args):
    """Where images and captions come from, or under --label_column images and labels."""
    if "label_column" not in args.defaults:
        return settings_from_flags(DataSource, args, label_from_folder=False)
    named = {"caption_column": args.label_column or "label"}
    return settings_from_flags(DataSource, args, **named, label_from_folder=is_sorted_by_folders(args))


def is_sorted_by_folders(args):
    """Whether labels are names of folders: those of a --train_data_dir without --label_column."""
    return bool(args.train_data_dir and not args.label_column)


def framing_rules(args):
    """How images are cut."""
    return settings_from_flags(FramingRules, args)


def caption_rules(args):
    """How captions change before they are encoded."""
    return settings_from_flags(CaptionRules, args)


def encoding_settings(args):
    """What is encoded, and where the encodings are kept. Reads the autoencoder's files for their digests."""
    return EncodingSettings(
        folder=cache_folder(args.cache_dir),
        framing_rules=framing_rules(args),
        caption_rules=caption_rules(args),
        prompts=prompt_texts(args),
        vae_identity=vae_identity(args.base_model),
        pixels_per_latent=args.base_model.family.pixels_per_latent,
    )
