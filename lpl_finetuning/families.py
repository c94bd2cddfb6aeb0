"""The families of models that the training scripts train: their `Family`, and what must fit together in each."""

import os
import sys
from pathlib import Path

from lpl_finetuning.adapters import block_prefixes
from lpl_finetuning.base_model import Family, Part, check_channels, model_file, read_object
from lpl_finetuning.errors import require
from lpl_finetuning.flags import framing_rules, mixed_precision
from lpl_finetuning.networks.checks import check_feature_networks
from lpl_finetuning.sample_prompts import check_zero_snr, entries_of
from lpl_finetuning.single_file import SD3_FILE, SDXL_FILE
from lpl_finetuning.unpacking import open_base_file, open_vae_file

VAE = Part("vae", "autoencoder", "AutoencoderKL", "pretrained_vae_model_name_or_path", in_pipelines=True)

# ---------------------------------------------------------------------------------------------------------------------
# Any pipeline with an AutoencoderKL, for what is trained on its latents

LATENTS = Family(
    name="latents",
    title="Latent classifier",
    long_name="latent classifier",
    tag="latent-classifier",
    pipeline="",
    denoiser=None,
    autoencoder=VAE,
    text_encoders=(),
    tokenizers=(),
    lora_layers=(),
    check=lambda args, base, configs: None,
    example="stabilityai/stable-diffusion-xl-base-1.0",
    fixed_flags=("block_widths", "blocks_per_stage"),
    open_base_file=open_base_file,
    open_vae_file=open_vae_file,
)

# ---------------------------------------------------------------------------------------------------------------------
# SDXL


def check_sdxl(args, base, configs):
    """Latents, text and micro-conditioning must have the sizes that the UNet takes. configs: {part: config.json}."""
    unet, first, second = (configs[name] for name in ("unet", "text_encoder", "text_encoder_2"))
    check_channels(base, unet.get("in_channels", 4), configs["vae"])
    which, kind = base.describe("unet"), unet.get("addition_embed_type")
    require(
        kind == "text_time", f"{which} is not SDXL's: addition_embed_type is {kind}, not text_time; give an SDXL UNet"
    )
    widths = [config.get("hidden_size") for config in (first, second)]
    width = unet.get("cross_attention_dim")
    require(None in widths or not isinstance(width, int) or width == sum(widths),
            f"{which} takes text of width {width}, the text encoders give {' + '.join(map(str, widths))}; give a UNet "
            "and a base model that belong together")  # fmt: skip
    pooled, size = second.get("projection_dim"), unet.get("projection_class_embeddings_input_dim")
    each = unet.get("addition_time_embed_dim") or 256
    require(not pooled or not size or size == pooled + 6 * each,
            f"{which} takes a pooled prompt and {(size or 0) - (pooled or 0)} numbers of micro-conditioning, SDXL has "
            f"{6 * each}; the refiner can't be trained here, give a base model's UNet")  # fmt: skip
    check_prediction(args, base)
    check_feature_networks(args, base, configs["vae"])


def check_prediction(args, base):
    """Ask for --prediction_type where two models contradict each other; warn where it contradicts the base model.

    The denoiser's folder has a say where it is a whole pipeline or the part of one.
    """
    said, zero_snr = scheduler_says(base.name, base.revision) or ("epsilon", False)
    other, other_zero_snr = (base.denoiser and scheduler_says(base.denoiser)) or (said, zero_snr)
    which, given, zero_flag = base.flag("unet"), args.prediction_type, args.rescale_betas_zero_snr
    require(given or other == said, f"{which} is of a model of {other}, and the base model's scheduler says {said}; "
            "give --prediction_type")  # fmt: skip
    require(zero_flag is not None or other_zero_snr == zero_snr,
            f"{which}: its scheduler says rescale_betas_zero_snr {other_zero_snr}, and the base model's {zero_snr}; "
            "give the UNet's own pipeline as --pretrained_model_name_or_path")  # fmt: skip
    zero_snr = zero_snr if zero_flag is None else zero_flag
    require(not zero_flag or (given or said) != "epsilon", "--rescale_betas_zero_snr: at zero terminal SNR a model of "
            "epsilon learns nothing; give --prediction_type v_prediction, or leave it out")  # fmt: skip
    check_zero_snr(entries_of(args), zero_snr)
    if given in (None, said) or os.environ.get("RANK", "0") != "0":
        return
    advice = "the model must learn another prediction, or its scheduler is wrong"
    if args.use_lora:
        advice = "wherever the LoRA is loaded, the scheduler must be set to it, as the model card does"
    print(f"warning: --prediction_type {given}, and the base model's scheduler says {said}: {advice}", file=sys.stderr)


def scheduler_says(name, revision=None):
    """(prediction_type, rescale_betas_zero_snr) of a pipeline, or of the pipeline around a unet/; None if unknown."""
    places = [Path(name), Path(name).parent] if Path(name).is_dir() and Path(name).name == "unet" else [name]
    try:
        paths = [model_file(place, "scheduler_config.json", revision, "scheduler") for place in places]
    except Exception:  # a model on the Hub that was fetched without its scheduler, and no network: many kinds
        return None
    config = next((read_object(path) for path in paths if path), None)
    if config is None:
        return None
    return config.get("prediction_type", "epsilon"), config.get("rescale_betas_zero_snr", False)


SDXL = Family(
    name="sdxl",
    title="SDXL",
    long_name="Stable Diffusion XL",
    tag="stable-diffusion-xl",
    pipeline="StableDiffusionXL",
    denoiser=Part("unet", "unet", "UNet2DConditionModel", "pretrained_unet_model_name_or_path", in_pipelines=True),
    autoencoder=VAE,
    text_encoders=("text_encoder", "text_encoder_2"),
    tokenizers=("tokenizer", "tokenizer_2"),
    lora_layers=("to_k", "to_q", "to_v", "to_out.0"),
    layer_kinds={
        "attention": ("to_k", "to_q", "to_v", "to_out.0"),
        "feed-forward": ("ff.net.0.proj", "ff.net.2"),
        "projections": ("proj_in", "proj_out"),
    },
    lora_blocks={  # style and content of B-LoRA, style and layout of InstantStyle
        "style": "up_blocks.0.attentions.1",
        "content": "up_blocks.0.attentions.0",
        "layout": "down_blocks.2.attentions.1",
    },
    check=check_sdxl,
    foreign_schedulers=("EDM", "FlowMatch"),
    half_vae="madebyollin/sdxl-vae-fp16-fix",
    example="stabilityai/stable-diffusion-xl-base-1.0",
    special_channels=SDXL_FILE.special_channels,
    missing_part={"text_encoder": "the refiner can't be trained here, give the base model"},
    other_scripts={"StableDiffusion3": "train_sd3_lpl_flow.py"},
    open_base_file=open_base_file,
    open_vae_file=open_vae_file,
)

# ---------------------------------------------------------------------------------------------------------------------
# SD3


def check_sd3(args, base, configs):
    """Latents, text and images must have the sizes that the transformer takes. configs: {part: config.json}."""
    config = configs["transformer"]
    check_channels(base, config.get("in_channels", 16), configs["vae"])
    which, belong = base.describe("transformer"), "give a transformer and a base model that belong together"
    clip = [configs[name] for name in ("text_encoder", "text_encoder_2")]
    pooled, size = [config.get("projection_dim") for config in clip], config.get("pooled_projection_dim")
    require(None in pooled or not size or size == sum(pooled),
            f"{which} takes a pooled prompt of {size} numbers, the text encoders give "
            f"{' + '.join(map(str, pooled))}; {belong}")  # fmt: skip
    width, widths = config.get("joint_attention_dim"), [config.get("hidden_size") for config in clip]
    t5 = configs.get("text_encoder_3", {}).get("d_model")
    require(not width or ((None in widths or sum(widths) <= width) and t5 in (None, width)),
            f"{which} takes text of width {width}, the text encoders give {' + '.join(map(str, widths))}"
            f"{f' and {t5}' if t5 else ''}; {belong}")  # fmt: skip
    blocks = config.get("num_layers", 18)
    wrong = [word for word in block_prefixes(args, SD3) if int(word) >= blocks]
    require(not wrong, f"--lora_blocks {args.lora_blocks}: the transformer has blocks 0 to {blocks - 1}: name some of "
            "them")  # fmt: skip
    check_attention(args, config)
    check_tokens(args, config)
    check_feature_networks(args, base, configs["vae"])


def check_attention(args, config):
    """Refuse xformers where norms in float32 give queries and keys another dtype than values: SD3.5, trained whole."""
    split = config.get("qk_norm") and not args.use_lora and mixed_precision(args) != "no"
    require(not (split and args.enable_xformers_memory_efficient_attention),
            "--enable_xformers_memory_efficient_attention: queries and keys of this transformer are float32, its "
            f"values {mixed_precision(args)}, which xformers refuses; leave it out: PyTorch's attention saves memory "
            "too")  # fmt: skip


def check_tokens(args, config):
    """Refuse images that do not fall into tokens, or into more tokens than the transformer has positions for."""
    patch, positions = SD3.pixels_per_latent * config.get("patch_size", 2), config.get("pos_embed_max_size", 192)
    flag = "--aspect_ratio_buckets" if args.aspect_ratio_buckets else "--resolution"
    for entry in (entry for entry in entries_of(args) if entry.place):
        for side in entry.size(args.resolution):
            require(side % patch == 0 and side <= patch * positions, f"{entry.place}: a side of {side} px; this "
                    f"transformer takes multiples of {patch} up to {patch * positions}: give such a side")  # fmt: skip
    for size in framing_rules(args).sizes():
        found = " x ".join(map(str, size)) if args.aspect_ratio_buckets else size[0]
        require(not any(side % patch for side in size),
                f"{flag} is {found}; it must be a multiple of {patch}, the pixels of a token")  # fmt: skip
        require(max(size) <= patch * positions,
                f"{flag} is {found}; this transformer knows positions up to {patch * positions} px: "
                "give less")  # fmt: skip


SD3_ATTENTION = ("attn.add_k_proj", "attn.add_q_proj", "attn.add_v_proj", "attn.to_add_out", "attn.to_k",
                 "attn.to_out.0", "attn.to_q", "attn.to_v")  # fmt: skip
SD3 = Family(
    name="sd3",
    title="SD3",
    long_name="Stable Diffusion 3",
    tag="sd3",
    pipeline="StableDiffusion3",
    denoiser=Part("transformer", "transformer", "SD3Transformer2DModel", "pretrained_transformer_model_name_or_path",
                  in_pipelines=True),
    autoencoder=VAE,
    text_encoders=("text_encoder", "text_encoder_2"),
    optional_text_encoders=("text_encoder_3",),
    tokenizers=("tokenizer", "tokenizer_2"),
    optional_tokenizers=("tokenizer_3",),
    lora_layers=SD3_ATTENTION,
    layer_kinds={
        "attention": SD3_ATTENTION, "attn2": ("attn2.to_k", "attn2.to_q", "attn2.to_v", "attn2.to_out.0"),
        "feed-forward": ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    },
    named_when_unused=("attn2",),
    numbered_blocks="transformer_blocks",
    check=check_sd3,
    schedulers=("FlowMatch",),
    special_channels=SD3_FILE.special_channels,
    example="stabilityai/stable-diffusion-3.5-medium",
    other_scripts={"StableDiffusionXL": "train_sdxl_lpl.py"},
    open_base_file=open_base_file,
    open_vae_file=open_vae_file,
)  # fmt: skip
