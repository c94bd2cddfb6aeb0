"""The networks of --lpl_features: whether their files are whole and fit the autoencoder, from small files alone.

Nothing here imports torch.
"""

import os
import sys
from pathlib import Path

from lpl_finetuning.base_model import (
    check_part,
    check_weight_names,
    files_of,
    read_object,
    weight_files,
    weight_problem,
    weights_fingerprint,
    weights_here,
)
from lpl_finetuning.errors import require
from lpl_finetuning.flags import feature_parts, framing_rules
from lpl_finetuning.networks.encoder_sketch import encoder_sketch, same_encoder

SKETCH = "vae_encoder_sketch"  # in a classifier's config.json
OVER_POSITIONS = ("standard", "target", "batch")  # values of --lpl_norm_type that need more than one position


def check_feature_networks(args, base, vae):
    """Refuse a classifier or a tiny decoder that is not whole, or was made for other latents.

    Args:
        base: the `BaseModel`; vae: the content of its autoencoder's config.json.
    """
    if not (args.use_lpl or args.validation_split or args.validation_data_dir):
        return
    for network, check in {"classifier": check_classifier, "tiny_decoder": check_tiny_decoder}.items():
        if network in feature_parts(args):
            check(args, base, vae)


def check_classifier(args, base, vae):
    """--lpl_classifier: a latent classifier for this autoencoder. See `check_feature_networks`."""
    flag = f"--lpl_classifier {args.lpl_classifier}"
    config = config_of("lpl_classifier", args.lpl_classifier, "LatentClassifier")
    wanted = {
        "latent_channels": vae.get("latent_channels", 4),
        "pixels_per_latent": base.family.pixels_per_latent,
        "scaling_factor": vae.get("scaling_factor"),
        "shift_factor": vae.get("shift_factor") or 0.0,
    }
    advice = advice_for(config, base)
    for field, value in wanted.items():
        require(config.get(field) == value, f"{flag}: its config.json says {field} {config.get(field)}, and "
                f"{base.describe(base.family.autoencoder.name)} has {value}; {advice}")  # fmt: skip
    check_encoder(flag, config, base)
    chosen_stages(args, config)


def advice_for(config, base):
    """What to do about a classifier of other latents. config: content of its config.json."""
    return ("train one on this autoencoder with train_latent_classifier.py, or give the classifier's autoencoder, "
            f"{config.get('vae')}, as --{base.family.autoencoder.flag}")  # fmt: skip


def check_encoder(flag, config, base, is_loaded=False):
    """Refuse a classifier of another autoencoder's latents; warn where that can't be known.

    An autoencoder on the Hub whose files are not here yet passes when the flags are checked.

    Args:
        flag: with the value; config: content of the classifier's config.json; base: the `BaseModel`.
        is_loaded: the base model has been fetched from the Hub meanwhile.
    """
    part, trained_on, before = base.family.autoencoder.name, config.get("vae_fingerprint"), config.get(SKETCH)
    place, here = base.place(part).name, weights_fingerprint(base, part)
    on_disk = Path(place).is_dir()
    plan_only = on_disk and place not in base.unpacked and not weights_here(base, part)
    if here == trained_on or plan_only or not (trained_on or before) or (is_loaded and on_disk):
        return
    sketch = before and encoder_sketch(base)
    if sketch:
        require(same_encoder(before, sketch), f"{flag}: it was trained on the latents of another autoencoder "
                f"({trained_on}) than {base.describe(part)} ({here}); {advice_for(config, base)}")  # fmt: skip
    elif (is_loaded or on_disk) and os.environ.get("RANK", "0") == "0":
        reason = f"{base.describe(part)} has no weights of 16 bits or more in safetensors" if before else \
            f"its config.json has no {SKETCH}"  # fmt: skip
        print(f"warning: {flag}: its autoencoder ({trained_on}) and {base.describe(part)} ({here}) can't be compared, "
              f"since {reason}; scaling, shift and channels agree", file=sys.stderr)  # fmt: skip


def check_tiny_decoder(args, base, vae):
    """--lpl_tiny_decoder: an `AutoencoderTiny` for latents of this size. See `check_feature_networks`."""
    flag = f"--lpl_tiny_decoder {args.lpl_tiny_decoder}"
    config = config_of("lpl_tiny_decoder", args.lpl_tiny_decoder, "AutoencoderTiny")
    channels, wanted = config.get("latent_channels", 4), vae.get("latent_channels", 4)
    require(channels == wanted, f"{flag} takes latents of {channels} channels, and "
            f"{base.describe(base.family.autoencoder.name)} makes {wanted}; give a tiny decoder of this "
            "autoencoder")  # fmt: skip
    factor = config.get("upsampling_scaling_factor", 2) ** (len(config.get("num_decoder_blocks", (3, 3, 3, 1))) - 1)
    require(factor == base.family.pixels_per_latent, f"{flag} makes images {factor} times larger than latents; "
            f"{base.family.pixels_per_latent} is needed: give another")  # fmt: skip


def config_of(flag, name, class_name):
    """The content of a network's config.json, once its weights are seen to be there as safetensors and whole."""
    config = read_object(check_part(flag, name, class_name))
    files = files_of(name)
    if files is not None:
        check_weight_names(f"--{flag} {name}", files, None, False, ())
    for path in weight_files(f"--{flag} {name}", Path(name), None) if Path(name).is_dir() else ():
        problem = weight_problem(path)
        require(not problem, f"--{flag} {name}: {path.name} {problem}")
    return config


def chosen_stages(args, config):
    """Numbers, from 0, of the classifier's stages that the loss compares; "pooled" is the last.

    By default all that --lpl_norm_type can take: a deviation over positions needs more than one position, at all sizes
    of the images.

    Args:
        config: the classifier's, with its `block_widths`.

    Raises:
        UserError: names a stage that is not there, or that --lpl_norm_type can't take.
    """
    stages = len(config["block_widths"])
    unit = config["pixels_per_latent"]
    sizes = [[-(-side // unit) for side in size] for size in framing_rules(args).sizes()]
    single = {stages} | {stage for stage in range(stages) if any(max(size) <= 2**stage for size in sizes)}
    unfit = single if args.lpl_norm_type in OVER_POSITIONS else set()
    if args.lpl_classifier_stages is None:
        found = [stage for stage in range(stages + 1) if stage not in unfit]
        require(found, f"--lpl_norm_type {args.lpl_norm_type} divides by a deviation over positions, and no stage of "
                "--lpl_classifier has more than one position at this resolution: give shared, default or "
                "none")  # fmt: skip
        return found
    flag = f"--lpl_classifier_stages {' '.join(args.lpl_classifier_stages)}"
    numbers = {stages if name == "pooled" else int(name) - 1: name for name in args.lpl_classifier_stages}
    for stage, name in numbers.items():
        require(name == "pooled" or stage < stages, f"{flag}: the classifier has residual stages 1 to {stages}: name "
                "some of them, or pooled")  # fmt: skip
        require(stage not in unfit, f"{flag}: {name} has one position, and --lpl_norm_type {args.lpl_norm_type} "
                f"divides by a deviation over positions: leave {name} out, or give --lpl_norm_type shared, default or "
                "none")  # fmt: skip
    return sorted(numbers)
