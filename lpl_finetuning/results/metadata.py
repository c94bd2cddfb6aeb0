"""What the files for other programs say of themselves: modelspec's keys, and the `ss_` keys of sd-scripts.

modelspec is the published standard (github.com/Stability-AI/ModelSpec); names of architectures are those that ComfyUI,
SwarmUI and sd-scripts write, with "/lora" for a LoRA. A1111, Forge and Civitai read the `ss_` keys.
"""

import json
import time
from collections import Counter
from pathlib import Path

from lpl_finetuning.base_model import hub_like, read_object
from lpl_finetuning.flags import caption_rules
from lpl_finetuning.unpacking import SOURCE

SPEC = "1.0.0"  # version of modelspec
IMPLEMENTATION = "sgm"  # the code base whose names the tensors have: Stability AI's
ARCHITECTURES = {  # version of the base model as sd-scripts calls it -> modelspec's architecture
    "sdxl_base_v1-0": "stable-diffusion-xl-v1-base",
    "3-medium": "stable-diffusion-v3-medium",
    "3-5-medium": "stable-diffusion-v3.5-medium",
    "3-5-large": "stable-diffusion-v3.5-large",
}
PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v"}  # modelspec's names; it has none for flow and sample
MOST_TAGS = 1000  # tags that a file lists: a header is read into memory whenever a program lists its files


def kohya_version(denoiser_config):
    """(network module, version of the base model) as sd-scripts writes and reads them."""
    if "joint_attention_dim" not in denoiser_config:
        return "networks.lora", "sdxl_base_v1-0"
    if denoiser_config.qk_norm is None:
        return "networks.lora_sd3", "3-medium"
    return "networks.lora_sd3", "3-5-medium" if denoiser_config.dual_attention_layers else "3-5-large"


def title_of(args):
    """The title of a run's result."""
    on_hub = (args.hub_model_id or "").rpartition("/")[2]
    return args.metadata_title or args.output_name or on_hub or Path(args.output_dir).resolve().name


def trigger_of(args):
    """The words that call what was learnt; None where no flag has any."""
    return args.metadata_trigger_phrase or args.trigger_word or args.instance_prompt or None


def modelspec(args, denoiser_config, prediction_type, is_lora):
    """{key: text} of modelspec.

    Args:
        denoiser_config: configuration of the UNet or the transformer.
        prediction_type: of the model.
    """
    values = {
        "sai_model_spec": SPEC,
        "architecture": ARCHITECTURES[kohya_version(denoiser_config)[1]] + "/lora" * is_lora,
        "implementation": IMPLEMENTATION,
        "title": title_of(args),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "resolution": f"{args.resolution}x{args.resolution}",
        "prediction_type": PREDICTIONS.get(prediction_type),
        "trigger_phrase": trigger_of(args),
    }
    return {f"modelspec.{name}": value for name, value in values.items() if value}


def training_keys(args, plan, images, step):
    """{key: text} of the `ss_` keys on how a LoRA was trained, without the tags of the captions.

    Args:
        plan: the `Plan`.
        images: the images that it is trained on.
        step: optimizer steps that the weights have seen.
    """
    name, sha256 = base_source(args.base_model)
    values = {
        "output_name": args.output_name,
        "sd_model_name": name,
        "new_sd_model_hash": sha256,
        "v2": False,
        "resolution": (args.resolution, args.resolution),
        "num_train_images": len(images),
        "batch_size_per_device": args.train_batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "total_batch_size": plan.batch_size,
        "steps": step,
        "max_train_steps": plan.total_steps,
        "epoch": step * plan.batch_size // len(images),
        "num_epochs": -(-plan.total_steps * plan.batch_size // len(images)),
        "learning_rate": args.learning_rate * (plan.batch_size if args.scale_lr else 1),
        "lr_scheduler": args.lr_scheduler,
        "optimizer": "AdamW8bit" if args.use_8bit_adam else args.optimizer,
        "mixed_precision": args.mixed_precision,
        "seed": args.seed,
        "noise_offset": args.noise_offset or None,
        "min_snr_gamma": getattr(args, "snr_gamma", None),
        "caption_dropout_rate": args.proportion_empty_prompts or None,
        "training_comment": "with the latent perceptual loss" if args.use_lpl else None,
    }
    return {f"ss_{name}": str(value) for name, value in values.items() if value is not None}


def base_source(base):
    """(name, sha256) of the base model, each None where it is not known or would tell a local path.

    The sha256 is that of the single file that the folder was made from; nothing is hashed here.
    """
    folder = Path(base.name)
    if not folder.is_dir():
        return (base.name if hub_like(base.name) else None), None
    source = read_object(folder / SOURCE) if (folder / SOURCE).is_file() else {}
    return source.get("file"), source.get("sha256")


def tag_key(args, images):
    """{"ss_tag_frequency": JSON} of the captions' tags, as A1111 shows them; {} with --no-save_tag_frequency."""
    if not args.save_tag_frequency:
        return {}
    return {"ss_tag_frequency": json.dumps({title_of(args): tag_frequency(images, caption_rules(args))})}


def tag_frequency(images, rules):
    """{tag: number of captions that have it} of the most frequent tags, the most frequent first.

    Args:
        rules: the `CaptionRules`; a tag is a part of a caption between commas.
    """
    counts = Counter()
    for image in images:
        for caption in image.captions:
            counts.update({tag for part in rules.text(caption).split(",") if (tag := part.strip())})
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:MOST_TAGS])
