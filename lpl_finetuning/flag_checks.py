"""Flags against their ranges and against each other: what needs neither a model nor the data."""

import math
import os
import re
import sys
from importlib import metadata
from pathlib import Path

from packaging.version import Version

from lpl_finetuning.adapters import patterns_of
from lpl_finetuning.base_model import hub_like, read_json
from lpl_finetuning.data.wrong_source import refuse_no_folder
from lpl_finetuning.errors import require
from lpl_finetuning.evaluation.networks import DEFAULT_NETWORK, INSTALL, is_installed, missing_package
from lpl_finetuning.files import is_new
from lpl_finetuning.flags import REPOSITORY, feature_parts, framing_rules, mixed_precision
from lpl_finetuning.lora_files import merged_from
from lpl_finetuning.sample_prompts import check_samplers, check_sizes, entries_of

POSITIVE = (
    "train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "max_train_steps", "max_train_samples",
    "rank", "lora_alpha", "lr_num_cycles", "checkpointing_steps", "checkpointing_minutes",
    "checkpoints_total_limit", "max_nonfinite_steps", "logging_steps",
    "validation_steps", "validation_epochs", "validation_split", "max_validation_samples",
    "validation_kid_samples", "lpl_batch_size",
    "lpl_threshold_resolution", "lpl_sigma_threshold", "tag_shuffles", "adam_epsilon",
)  # fmt: skip
NOT_NEGATIVE = (
    "learning_rate", "text_encoder_lr", "lr_warmup_steps", "lr_power", "adam_weight_decay", "max_grad_norm", "seed",
    "ema_update_after_step", "dataloader_num_workers", "num_validation_images", "lpl_start", "keep_tags",
    "cache_variants", "validation_kid_every", "lpl_outlier_reference_resolution",
)  # fmt: skip
AT_MOST = {  # beyond it is a slip of the finger, which would be noticed late
    "max_train_steps": 10**9, "num_train_epochs": 10**9, "resolution": 16384, "dataloader_num_workers": 256,
    "train_batch_size": 10**6, "gradient_accumulation_steps": 10**6, "rank": 10**4,
}  # fmt: skip
SHARES = ("proportion_empty_prompts", "lora_dropout", "ema_decay")
LORA_ONLY = (
    "rank", "lora_alpha", "lora_layers", "lora_blocks", "lora_pattern", "lora_dropout", "use_dora",
    "train_text_encoder", "init_lora",
    "output_kohya_format", "merge_into", "bnb_quantization_config_path",
)  # fmt: skip
ENDLESS = ("max_grad_norm", "lpl_sigma_threshold")  # may be infinite: no clipping, no gate
DIFFUSERS_NAME = "pytorch_lora_weights"


def holds_out(args):
    """Whether some images are held out, whose losses are measured."""
    return bool(args.validation_split or args.validation_data_dir)


def decodes(args):
    """Whether a network of --lpl_features is a decoder, full or tiny: its features grow beyond the latents' size."""
    return bool(feature_parts(args).keys() & {"decoder", "rgb", "tiny_decoder"})


DEAD_FLAGS = (  # (flags, when they do nothing, function of the flags that tells whether they work)
    (LORA_ONLY, "without --use_lora", lambda args: args.use_lora),
    (("lora_type",), "without --use_lora", lambda args: args.use_lora or args.use_dora),
    (("lokr_factor",), "without --lora_type lokr", lambda args: args.lora_type == "lokr"),
    (("text_encoder_lr",), "without --train_text_encoder", lambda args: args.train_text_encoder),
    (("dataset_config_name",), "without --dataset_name", lambda args: args.dataset_name),
    (("keep_tags", "tag_shuffles"), "without --shuffle_tags", lambda args: args.shuffle_tags),
    (("revision",), "with a base model in a folder", lambda args: not is_folder(args.pretrained_model_name_or_path)),
    (("revision", "variant"), "with a base model in a single file",
     lambda args: not is_file(args.pretrained_model_name_or_path)),
    (("config_from",), "with a base model that is no single file",
     lambda args: is_file(args.pretrained_model_name_or_path)),
    (("lr_warmup_steps",), "with --lr_scheduler constant; constant_with_warmup warms up",
     lambda args: args.lr_scheduler != "constant" or args.lr_warmup_steps == 0),
    (("lr_num_cycles",), "without --lr_scheduler cosine_with_restarts",
     lambda args: args.lr_scheduler == "cosine_with_restarts"),
    (("lr_power",), "without --lr_scheduler polynomial", lambda args: args.lr_scheduler == "polynomial"),
    (("adam_beta1", "adam_beta2", "adam_epsilon"), "with --optimizer adafactor",
     lambda args: args.optimizer != "adafactor"),
    (("offload_ema", "foreach_ema", "ema_update_after_step", "ema_decay"), "without --use_ema",
     lambda args: args.use_ema),
    (("timestep_bias_multiplier",), "without --timestep_bias_strategy",
     lambda args: args.timestep_bias_strategy != "none"),
    (("timestep_bias_portion",), "without --timestep_bias_strategy earlier or later",
     lambda args: args.timestep_bias_strategy in ("earlier", "later")),
    (("timestep_bias_begin", "timestep_bias_end"), "without --timestep_bias_strategy range",
     lambda args: args.timestep_bias_strategy == "range"),
    (("logit_mean", "logit_std"), "without --weighting_scheme logit_normal",
     lambda args: args.weighting_scheme == "logit_normal"),
    (("mode_scale",), "without --weighting_scheme mode", lambda args: args.weighting_scheme == "mode"),
    (("lpl_weight", "lpl_share", "lpl_scale", "lpl_start"), "without --use_lpl", lambda args: args.use_lpl),
    (("lpl_share",), "beside a --lpl_weight", lambda args: args.lpl_weight == "auto"),
    (("lpl_augment",), "without --use_lpl", lambda args: args.use_lpl),  # held-out images are measured without it
    (("lpl_classifier", "lpl_classifier_stages"), "without --lpl_features classifier",
     lambda args: "classifier" in feature_parts(args)),
    (("lpl_tiny_decoder",), "without --lpl_features tiny_decoder", lambda args: "tiny_decoder" in feature_parts(args)),
    (("lpl_t_threshold", "lpl_sigma_threshold", "lpl_threshold_resolution", "lpl_loss_type", "lpl_features",
      "lpl_norm_type", "lpl_norm_gradient", "lpl_pow_law", "lpl_num_blocks", "lpl_remove_outliers",
      "lpl_outlier_reference_resolution", "lpl_batch_size", "lpl_checkpointing", "lpl_vae_dtype"), "without --use_lpl",
     lambda args: args.use_lpl or holds_out(args)),  # the loss of held-out images is measured either way
    (("lpl_num_blocks", "lpl_pow_law", "lpl_remove_outliers", "lpl_outlier_reference_resolution"),
     "with --lpl_features classifier or latent alone", lambda args: decodes(args)),
    (("lpl_outlier_reference_resolution",), "with --no-lpl_remove_outliers", lambda args: args.lpl_remove_outliers),
    (("validation_steps", "validation_epochs"), "without --validation_prompt, --validation_prompts_file, "
     "--validation_split or --validation_data_dir", lambda args: entries_of(args) or holds_out(args)),
    (("num_validation_images",), "without --validation_prompt or --validation_prompts_file",
     lambda args: entries_of(args) or args.num_validation_images == 0),
    (("output_name", "metadata_title"), "without --output_kohya_format or --single_file, which write the file for "
     "other programs", lambda args: args.output_kohya_format or args.single_file),
    (("save_tag_frequency", "checkpoints_kohya_format"), "without --output_kohya_format",
     lambda args: args.output_kohya_format),
    (("validation_kid_every", "validation_kid_samples"), "without --validation_metrics",
     lambda args: args.validation_metrics),
    (("max_validation_samples",), "without --validation_split or --validation_data_dir", holds_out),
    (("hub_model_id", "hub_private_repo"), "without --push_to_hub", lambda args: args.push_to_hub),
)  # fmt: skip


def check_dead_flags(args):
    """Refuse a flag of the command line that does nothing beside the others; a warning tells of one in a recipe.

    A recipe may have flags for what the command line turns off.
    """
    for names, when, works in DEAD_FLAGS:
        for name in names:
            if name not in args.defaults or getattr(args, name) == args.defaults[name] or works(args):
                continue
            told = f"--{name} does nothing {when}"
            require(name not in args.given, f"{told}: leave it out")
            if os.environ.get("RANK", "0") == "0":
                print(f"warning: {told}; it comes from the recipe", file=sys.stderr)


def is_folder(name):
    """Whether a name, or None, is that of a folder."""
    return name is not None and Path(name).is_dir()


def is_file(name):
    """Whether a name, or None, is that of a file."""
    return name is not None and Path(name).is_file()


def check_flags(args, family):
    """Ranges and contradictions of the flags that all scripts share. family: the models that the script trains."""
    for name, value in vars(args).items():
        require(not isinstance(value, float) or math.isfinite(value) or (value > 0 and name in ENDLESS),
                f"--{name} is {value}; it must be a finite number")  # fmt: skip
    for name, value in ((name, getattr(args, name)) for name in POSITIVE):
        require(value is None or value > 0, f"--{name} is {value}; it must be above 0")
    for name, value in ((name, getattr(args, name)) for name in NOT_NEGATIVE):
        require(value is None or value >= 0, f"--{name} is {value}; it must be 0 or more")
    for name, most in AT_MOST.items():
        value = getattr(args, name)
        require(value is None or value <= most, f"--{name} is {value}; it can be {most} at most")
    for name, value in ((name, getattr(args, name)) for name in SHARES):
        require(0 <= value <= 1, f"--{name} is {value}; it must lie between 0 and 1")
    for name, why in {"lora_dropout": "nothing would be learnt", "ema_decay": "the average would never move"}.items():
        require(getattr(args, name) < 1, f"--{name} is {getattr(args, name)}; it must be below 1, or {why}")
    require(args.seed < 2**64, f"--seed is {args.seed}; it must be less than 2**64")
    unit = family.pixels_per_latent
    require(args.resolution > 0 and args.resolution % unit == 0,
            f"--resolution is {args.resolution}; it must be a multiple of {unit}, because the latents are {unit} "
            f"times smaller, e.g. {max(1, args.resolution // 16) * 16}")  # fmt: skip
    require(args.pretrained_model_name_or_path, "--pretrained_model_name_or_path is missing: give the base model's "
            "folder or Hub name, or leave the data out too for a demonstration")  # fmt: skip
    require(args.train_data_dir or args.dataset_name, "no data: give --train_data_dir FOLDER or --dataset_name NAME")
    exclude(args, "train_data_dir", "dataset_name")
    exclude(args, "validation_split", "validation_data_dir")
    for name in ("train_data_dir", "validation_data_dir"):
        check_data_folder(name, getattr(args, name))
    check_dataset_name(args)
    require(not args.validation_compare or entries_of(args),
            "--validation_compare needs a --validation_prompt or a --validation_prompts_file")  # fmt: skip
    check_sizes(entries_of(args), unit, args.resolution)
    flow = "FlowMatch" in family.schedulers
    check_samplers(entries_of(args), flow, family.title, getattr(args, "prediction_type", None))
    check_output_name(args.output_name)
    check_measures(args, family)
    check_data_flags(args)
    check_output_dir(args, family)
    check_merge_into(args, family)
    check_launch(args)
    check_lora_flags(args)
    check_optimizer_flags(args)
    check_lpl_flags(args)
    check_dead_flags(args)
    check_quantization(args)
    check_xformers(args)
    check_installed(args)
    check_build(args)


def check_output_name(name):
    """--output_name: a file's name on every system, which no program takes for diffusers' own file."""
    if name is None:
        return
    flag = f"--output_name {name}"
    require(not name.lower().endswith(".safetensors"), f"{flag}: leave .safetensors out, which is appended")
    require(name.strip() == name and name.isprintable() and not re.search(r'[\\/:*?"<>|]', name)
            and 0 < len(name.encode()) <= 200 and not name.startswith(".") and not name.endswith("."),
            f"{flag} can't be the name of a file everywhere: give 1 to 200 letters, without / \\ : * ? \" < > | and "
            "without a dot or blank at either end; the folder is --output_dir")  # fmt: skip
    require(not name.endswith(DIFFUSERS_NAME), f"{flag} ends like diffusers' own file {DIFFUSERS_NAME}, which lies "
            "beside it: give another name")  # fmt: skip


def check_measures(args, family):
    """--validation_metrics and the flags that need it."""
    if not args.validation_metrics:
        return
    require(family.autoencoder, f"--validation_metrics needs a decoder, and {family.title} has none: leave it out")
    require(args.validation_split or args.validation_data_dir, "--validation_metrics measures held-out images: give "
            "--validation_split or --validation_data_dir")  # fmt: skip
    require(not args.validation_kid_every or args.validation_kid_samples > 1,
            f"--validation_kid_samples is {args.validation_kid_samples}; KID needs 2 or more")  # fmt: skip
    missing = missing_package(DEFAULT_NETWORK) if args.validation_kid_every else None
    require(not missing, f"--validation_metrics: the package {missing} is not installed, which KID needs; {INSTALL}, "
            "or give --validation_kid_every 0")  # fmt: skip


def check_data_folder(name, folder):
    """A flag that names a folder of images."""
    if folder is None:
        return
    kind = "a data set on the Hub is --dataset_name" if name == "train_data_dir" else "check the spelling"
    require(Path(folder).exists(), f"--{name} {folder}: there is no such folder; {kind}")
    refuse_no_folder(f"--{name}", str(folder))


def check_dataset_name(args):
    """--dataset_name: a folder, or a name that the Hub can have."""
    name = args.dataset_name
    require(not name or Path(name).is_dir() or hub_like(name), f"--dataset_name {name}: there is no such folder, and "
            "Hub names have the form owner/name; a folder of images is --train_data_dir")  # fmt: skip


def check_output_dir(args, family):
    """The output folder must not be this repository, nor hold what the run starts from; it can be written to."""
    for name in ("output_dir", "cache_dir"):
        if getattr(args, name):
            folder = Path(getattr(args, name))
            there = next(place for place in (folder.absolute(), *folder.absolute().parents) if os.path.exists(place))
            require(there.is_dir(), f"--{name} {folder}: {there} is a file; name a folder")
            require(os.access(there, os.W_OK | os.X_OK),
                    f"--{name} {folder}: no permission to write in {there}; name another folder")  # fmt: skip
    logs = Path(args.output_dir, args.logging_dir)
    require(not logs.exists() or logs.is_dir(), f"--logging_dir {args.logging_dir}: {logs} is a file; name a folder")
    output_dir = Path(args.output_dir).resolve()
    for name in ("train_data_dir", "validation_data_dir"):
        inside = getattr(args, name) and output_dir.is_relative_to(Path(getattr(args, name)).resolve())
        require(not inside, f"--output_dir {args.output_dir} lies in --{name} {getattr(args, name)}: the run's own "
                "pictures would lie among those; name a folder outside")  # fmt: skip
    require(output_dir != REPOSITORY, f"--output_dir {args.output_dir} is this repository: name a folder of its own")
    for name in ("pretrained_model_name_or_path", *(part.flag for part in family.replaceable), "init_lora",
                 "lpl_classifier", "lpl_tiny_decoder"):  # fmt: skip
        value = getattr(args, name)
        inside = value and Path(value).exists() and Path(value).resolve().is_relative_to(output_dir)
        require(not inside, f"--{name} {value} lies in --output_dir {args.output_dir}, which the run will write to: "
                "name another output folder")  # fmt: skip


def check_merge_into(args, family):
    """--merge_into is new or empty, apart from what the run reads and writes, and can be put into its parent."""
    if not args.merge_into:
        return
    flag, folder = f"--merge_into {args.merge_into}", Path(args.merge_into).resolve()
    require(not os.path.ismount(folder), f"{flag} is a mount point, which can't be replaced: name a folder in it")
    there = next(place for place in folder.parents if place.exists())
    require(there.is_dir(), f"{flag}: {there} is a file; name a folder")
    require(os.access(there, os.W_OK | os.X_OK), f"{flag}: no permission to write in {there}; name another folder")
    names = ("output_dir", "cache_dir", "train_data_dir", "validation_data_dir", "pretrained_model_name_or_path",
             *(part.flag for part in family.replaceable), "init_lora", "lpl_classifier", "lpl_tiny_decoder",
             "config_from")  # fmt: skip
    for name in names:
        value = getattr(args, name)
        if value and (name == "output_dir" or Path(value).exists()):
            other = Path(value).resolve()
            apart = not other.is_relative_to(folder) and not folder.is_relative_to(other)
            require(apart, f"{flag} and --{name} {value} lie in each other: name a folder apart from it")
    logs = Path(args.output_dir, args.logging_dir).resolve()
    require(not logs.is_relative_to(folder), f"{flag} holds --logging_dir {args.logging_dir}: name another folder")
    require(is_new(folder) or merged_from(folder, args.output_dir), f"{flag} is there already; name a new folder")


def wants(name):
    """Whether accelerate's configuration asks for FSDP or DEEPSPEED."""
    return os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true"


def check_launch(args):
    """What accelerate is configured for: one of three precisions; a sharded run can't have every flag."""
    precision = mixed_precision(args)
    require(precision in ("no", "fp16", "bf16"), f"{precision_source(args)} {precision} is not among those of these "
            "scripts: give --mixed_precision no, fp16 or bf16")  # fmt: skip
    if not wants("FSDP") and not wants("DEEPSPEED"):
        return
    by = "DeepSpeed" if wants("DEEPSPEED") else "FSDP"
    require(not args.use_lora, f"--use_lora is not supported under {by}: a LoRA's own state is small; train it with "
            "configs/ddp.yaml, a large model in 4 bits with --bnb_quantization_config_path")  # fmt: skip
    require(args.optimizer == "adamw" and not args.use_8bit_adam,
            f"{'--use_8bit_adam' if args.use_8bit_adam else f'--optimizer {args.optimizer}'} works on whole tensors; "
            f"under {by} leave it out: AdamW's state is sharded anyway")  # fmt: skip
    require(not args.torch_compile, f"--torch_compile is not supported under {by}: leave it out")
    if wants("DEEPSPEED"):
        check_deepspeed(args)


DEEPSPEED = "0.19.8"  # skips a step whose gradients are not finite in float32 too; older ones were not tried


def check_installed_deepspeed():
    """That DeepSpeed is there, and new enough."""
    require(is_installed("deepspeed"),
            "accelerate is configured for DeepSpeed, which is not installed: pip install deepspeed")  # fmt: skip
    found = metadata.version("deepspeed")
    require(Version(found) >= Version(DEEPSPEED), f"DeepSpeed is {found}; it must be {DEEPSPEED} or newer, which "
            "skips steps that are not finite: pip install -U deepspeed")  # fmt: skip


def check_deepspeed(args):
    """DeepSpeed as it is installed, and as accelerate's file sets it: what is a flag here is not to be set there."""
    check_installed_deepspeed()

    def setting(name, default="none"):
        return os.environ.get(f"ACCELERATE_{name}".upper(), default)

    require(mixed_precision(args) != "fp16",
            f"{precision_source(args)} fp16 is not supported under DeepSpeed; use bf16")  # fmt: skip
    stage, file = setting("deepspeed_zero_stage", "2"), setting("deepspeed_config_file")
    require(file == "none", f"deepspeed_config_file {file} is not supported: give zero_stage in accelerate's own "
            "file, as configs/zero2.yaml does")  # fmt: skip
    require(stage in ("2", "3"), f"zero_stage is {stage}; it must be 2 or 3, as in configs/zero2.yaml and "
            "configs/zero3.yaml; what fits on every GPU is for configs/ddp.yaml")  # fmt: skip
    for name in ("offload_optimizer_device", "offload_param_device"):
        device = setting(f"deepspeed_{name}")
        require(device == "none", f"{name} {device} is not supported: set it to none; more GPUs make every part "
                "smaller")  # fmt: skip
    for name, flag in {"gradient_accumulation_steps": "gradient_accumulation_steps",
                       "gradient_clipping": "max_grad_norm"}.items():  # fmt: skip
        value, ours = setting(name, ""), getattr(args, flag)
        require(value in ("", str(ours), f"{ours:g}"),
                f"{name} is {value} in accelerate's file, and --{flag} {ours:g}: leave it out there")  # fmt: skip


def precision_source(args):
    """What the precision of a run comes from: the flag, or mixed_precision of accelerate's configuration."""
    return "--mixed_precision" if args.mixed_precision else "accelerate's mixed_precision"


def exclude(args, *names):
    """Refuse more than one of these flags."""
    given = [f"--{name}" for name in names if getattr(args, name)]
    require(len(given) < 2, f"{' and '.join(given)} exclude each other: give one")


def check_lora_flags(args):
    """Flags that make no sense without --use_lora, or together."""
    require(not (args.single_file and args.use_lora),
            "--single_file is for whole models; a LoRA for other programs is --output_kohya_format")  # fmt: skip
    given = [name for name in ("rank", "lora_alpha", "lora_layers", "lora_blocks", "use_dora") if getattr(args, name)]
    given += ["lora_type"] if args.lora_type in ("loha", "lokr") else []
    require(not (args.init_lora and given), f"--init_lora brings its own --{(given or [''])[0]}: leave that out")
    patterns = patterns_of(args)
    shaped = [pattern.text for pattern in patterns if (pattern.rank, pattern.alpha) != (None, None)]
    require(not (args.init_lora and shaped), f"--init_lora brings its own rank and alpha, which --lora_pattern "
            f"{(shaped or [''])[0]} sets too: leave them out; lr alone works")  # fmt: skip
    kind = args.lora_type
    require(kind in ("lora", "dora") or not args.lora_dropout,
            f"--lora_dropout is for lora and dora: with --lora_type {kind} leave it out")  # fmt: skip
    require(kind in ("lora", "dora") or not args.bnb_quantization_config_path,
            f"--lora_type {kind} and --bnb_quantization_config_path exclude each other: it is added to whole weights; "
            "leave one out")  # fmt: skip
    require(args.lokr_factor == -1 or args.lokr_factor > 0,
            f"--lokr_factor is {args.lokr_factor}; it must be above 0, or -1")  # fmt: skip
    rates = [pattern.text for pattern in patterns if pattern.lr is not None]
    require(args.optimizer != "prodigy" or not rates, f"--optimizer prodigy has one step size for all: leave lr out "
            f"of --lora_pattern {(rates or [''])[0]}")  # fmt: skip


SDPA = "leave xformers out: PyTorch's attention saves memory too"


def check_xformers(args):
    """Refuse xformers where layers give another dtype than they would without an adapter: LoHa and LoKr."""
    mixed = args.use_lora and args.lora_type in ("loha", "lokr") and mixed_precision(args) != "no"
    require(not (mixed and args.enable_xformers_memory_efficient_attention),
            f"--lora_type {args.lora_type} and --enable_xformers_memory_efficient_attention exclude each other under "
            f"{precision_source(args)} {mixed_precision(args)}: queries and keys get different dtypes, which xformers "
            f"refuses; {SDPA}")  # fmt: skip


def check_quantization(args):
    """The file of --bnb_quantization_config_path: it must be there and say what it wants."""
    path = args.bnb_quantization_config_path
    if not path:
        return
    flag = f"--bnb_quantization_config_path {path}"
    require(Path(path).is_file(), f"{flag}: there is no such file; write a JSON file of a BitsAndBytesConfig")
    require(not args.enable_xformers_memory_efficient_attention,
            f"{flag} and --enable_xformers_memory_efficient_attention exclude each other: queries and keys get "
            f"different dtypes, which xformers refuses; {SDPA}")  # fmt: skip
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
        require(not wanted or is_installed(package), f"{flag}: {package} is not installed; {hint}")


def is_for_cpus_only():
    """Whether PyTorch, as installed, can use no GPU at all: its build for CPUs, and no plug-in for other devices."""
    return metadata.version("torch").endswith("+cpu") and not metadata.entry_points(group="torch.backends")


def check_build(args):
    """Flags that need a GPU, where PyTorch is installed without; where none is found, the run says it later."""
    needing = {
        "--mixed_precision fp16": (args.mixed_precision == "fp16", "use bf16 or no"),
        "--enable_xformers_memory_efficient_attention": (
            args.enable_xformers_memory_efficient_attention, "leave it out: PyTorch's attention saves memory too",
        ),
        "--bnb_quantization_config_path": (args.bnb_quantization_config_path, "leave it out"),
    }  # fmt: skip
    for flag, (wanted, advice) in needing.items():
        require(not wanted or not is_for_cpus_only(),
                f"{flag} needs a GPU, and PyTorch is installed here for CPUs only; {advice}")  # fmt: skip


def check_lpl_flags(args):
    """Ranges and contradictions of the loss' flags."""
    exclude(args, "lpl_t_threshold", "lpl_sigma_threshold")
    if args.lpl_t_threshold is not None:
        require(0 < args.lpl_t_threshold <= 1000,
                f"--lpl_t_threshold is {args.lpl_t_threshold}; give a timestep above 0 and up to 1000")  # fmt: skip
    require(args.lpl_threshold_resolution is None or args.lpl_sigma_threshold is not None,
            "--lpl_threshold_resolution scales --lpl_sigma_threshold: give both")  # fmt: skip
    runs_out = args.use_lpl and args.max_train_steps and args.lpl_start >= args.max_train_steps
    require(not runs_out,
            f"--lpl_start is {args.lpl_start}, but the run ends at --max_train_steps {args.max_train_steps}: the loss "
            "would never be used; give a lower --lpl_start")  # fmt: skip
    require(0 < args.lpl_share < 1, f"--lpl_share is {args.lpl_share}; it must lie between 0 and 1")
    require(args.lpl_num_blocks >= 0, f"--lpl_num_blocks is {args.lpl_num_blocks}; it must be 0 or more")
    require(args.lpl_norm_gradient in (None, "none") or args.lpl_norm_type == "standard",
            f"--lpl_norm_gradient {args.lpl_norm_gradient} is for --lpl_norm_type standard only, found "
            f"{args.lpl_norm_type}: leave one out")  # fmt: skip
    check_feature_flags(args)


def check_feature_flags(args):
    """The networks of --lpl_features with their parts, weights and files."""
    given = [args.lpl_features] if isinstance(args.lpl_features, str) else args.lpl_features
    parts, features = feature_parts(args), " ".join(given)
    flag = f"--lpl_features {features}"
    require(len(parts) == len(given), f"{flag} names a network twice: name each once")
    require(not {"decoder", "rgb"} <= parts.keys(), f"{flag}: rgb has the features of the decoder too: leave decoder "
            "out")  # fmt: skip
    known = [part for part in parts.values() if part is not None]
    require(len(known) in (0, len(parts)), f"{flag}: some networks have a part and others not: give each one, or none")
    require(not known or abs(sum(known) - 1) < 1e-6,
            f"{flag}: the parts add up to {sum(known):g}; they must add up to 1")  # fmt: skip
    weights = args.lpl_weight if isinstance(args.lpl_weight, list) else [args.lpl_weight]
    text = " ".join(weight if weight == "auto" else f"{weight:g}" for weight in weights)
    require(weights == ["auto"] or "auto" not in weights, f"--lpl_weight {text}: auto is for all networks: give auto "
            "alone, or numbers")  # fmt: skip
    require(weights == ["auto"] or len(weights) == len(parts), f"--lpl_weight {text}: {flag} needs {len(parts)} "
            "numbers in the order of the networks, whose losses have different scales; or give auto")  # fmt: skip
    require(weights == ["auto"] or not known or len(parts) == 1,
            f"{flag}: parts are for --lpl_weight auto, found {text}: leave the parts out")  # fmt: skip
    for network in ("classifier", "tiny_decoder"):
        require(network not in parts or getattr(args, f"lpl_{network}"), f"{flag} needs --lpl_{network}: name its "
                "folder or Hub name")  # fmt: skip


def check_data_flags(args):
    """Contradictions among the flags about captions and crops."""
    framing_rules(args).sizes()
    require(not (args.center_crop and args.cache_variants),
            "--cache_variants are random crops: leave it or --center_crop out")  # fmt: skip
    require(args.train_data_dir or not args.caption_from_folder, "--caption_from_folder needs a --train_data_dir")
    require(args.train_data_dir or not args.caption_per_line, "--caption_per_line needs a --train_data_dir")
    require(args.train_data_dir or args.validation_data_dir or not args.follow_links,
            "--follow_links needs a --train_data_dir")  # fmt: skip
    require(not (args.instance_prompt and args.caption_from_folder),
            "--instance_prompt and --caption_from_folder exclude each other: give one")  # fmt: skip
