"""Results in the layouts that other programs read: a LoRA in kohya's format, and a whole SDXL pipeline as one file.

A LoRA is given as `parts`, as `lora_utils.adapters` returns it: {"unet", "text_encoder", "text_encoder_2": (layers,
config)}, as far as trained.

"Original" names are those of Stability AI's code. ComfyUI, A1111 and sd-scripts build the same modules and look LoRA
layers up by these names, and diffusers knows them. Diffusers' own block numbers are read by fewer: older sd-scripts
ignore them, A1111 misplaces an upsampler with them, and diffusers itself loses `add_embedding`.
"""

import math
import os
import re
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline
from peft.utils.other import get_pattern_key
from safetensors.torch import save_file

from cli_utils import require
from lora_utils import nested

KOHYA_FILE = "pytorch_lora_weights_kohya.safetensors"
KOHYA_PREFIXES = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
COMPONENTS = ("unet", "vae", "text_encoder", "text_encoder_2")

# ---------------------------------------------------------------------------------------------------------------------
# Names, from diffusers and transformers to the original

UNET_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
UNET_LAYER = re.compile(
    r"(?:(down|up)_blocks\.(\d+)|mid_block)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)"
)
UNET_PARTS = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
    "conv": "conv",
}
VAE_PARTS = {
    "down_blocks.": "down.",
    ".resnets.": ".block.",
    "samplers.0.": "sample.",
    "mid_block.attentions.0.group_norm": "mid.attn_1.norm",
    "mid_block.attentions.0.to_out.0": "mid.attn_1.proj_out",
    "mid_block.attentions.0.to_": "mid.attn_1.",
    "conv_norm_out": "norm_out",
    "conv_shortcut": "nin_shortcut",
}
OPEN_CLIP_PARTS = {
    "text_model.": "",
    "embeddings.token_embedding": "token_embedding",
    "embeddings.position_embedding.weight": "positional_embedding",
    "encoder.layers.": "transformer.resblocks.",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.": "attn.",
    "q_proj.": "in_proj_",
    "final_layer_norm": "ln_final",
    "text_projection.weight": "text_projection",
}


def unet_name(module, config):
    """The original name of a module of the UNet. Layers are numbered through all blocks, samplers included."""
    if module in UNET_ENDS:
        return UNET_ENDS[module]
    match = UNET_LAYER.fullmatch(module)
    part = match and (match[5] if match[3] == "attentions" else UNET_PARTS.get(match[5]))
    require(part, f"unet.{module} has no place in SDXL's original layout, which other programs read")
    side, block, kind, layer = match.groups()[:4]
    layer, slot = int(layer), int(kind == "attentions")  # each layer: slot 0 its resnet, slot 1 its transformer
    if side is None:
        return f"middle_block.{2 * layer + slot}.{part}"
    last = config.layers_per_block
    if kind == "downsamplers":
        layer, part = last, "op"
    elif kind == "upsamplers":
        layer, slot = last, 1 + ("Attn" in config.up_block_types[int(block)])
    number = int(block) * (last + 1) + layer
    return f"input_blocks.{1 + number}.{slot}.{part}" if side == "down" else f"output_blocks.{number}.{slot}.{part}"


def vae_name(parameter, num_blocks):
    """The original name of a parameter of the autoencoder: up blocks count down, middle resnets from 1."""
    parameter = re.sub(r"up_blocks\.(\d+)", lambda match: f"up.{num_blocks - 1 - int(match[1])}", parameter)
    parameter = re.sub(r"mid_block\.resnets\.(\d+)", lambda match: f"mid.block_{int(match[1]) + 1}", parameter)
    return replace_all(parameter, VAE_PARTS)


def replace_all(name, parts):
    """`name` with each key of `parts` replaced by its value, in order."""
    for ours, original in parts.items():
        name = name.replace(ours, original)
    return name


def write(path, tensors, metadata):
    """Write a safetensors file that is whole or not there, even when the process is killed."""
    temporary = Path(f"{path}.tmp")
    save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, temporary, metadata)
    os.replace(temporary, path)


# ---------------------------------------------------------------------------------------------------------------------
# LoRA


def kohya_state_dict(parts, unet_config):
    """The layers under kohya's names: `lora_unet_….lora_down.weight` (r, …), `.lora_up.weight` (…, r), `.alpha` ().

    Readers scale a layer by its alpha / r. Diffusers loses alphas that differ within a model, so each is `lora_alpha`,
    and where `alpha_pattern` or rank-stabilised LoRA ask for another strength, `lora_up` is multiplied.
    """
    tensors = {}
    for part, (layers, config) in parts.items():
        for key, value in layers.items():
            module, _, matrix = key.removesuffix(".weight").rpartition(".")
            require(matrix in ("lora_A", "lora_B"), f"{part}.{key}: kohya's format holds plain LoRA only; drop "
                    "--use_dora or --output_kohya_format")  # fmt: skip
            name = unet_name(module, unet_config) if part == "unet" else nested(module)
            name = KOHYA_PREFIXES[part] + name.replace(".", "_")
            if matrix == "lora_B":
                alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, module), config.lora_alpha)
                factor = alpha / config.lora_alpha * (math.sqrt(value.shape[1]) if config.use_rslora else 1)
                value = value if factor == 1 else value * factor
                tensors[f"{name}.alpha"] = torch.tensor(float(config.lora_alpha))
            tensors[f"{name}.{'lora_up' if matrix == 'lora_B' else 'lora_down'}.weight"] = value
    return tensors


def save_kohya(folder, parts, unet_config):
    """Write `pytorch_lora_weights_kohya.safetensors`, a LoRA of SDXL for ComfyUI, A1111 and sd-scripts."""
    tensors = kohya_state_dict(parts, unet_config)
    ranks = {value.shape[0] for name, value in tensors.items() if "lora_down" in name}
    alphas = {value.item() for name, value in tensors.items() if name.endswith(".alpha")}
    metadata = {
        "format": "pt",
        "ss_network_module": "networks.lora",
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_network_dim": str(ranks.pop()) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": f"{alphas.pop():g}" if len(alphas) == 1 else "Dynamic",
    }
    write(Path(folder, KOHYA_FILE), tensors, metadata)


# ---------------------------------------------------------------------------------------------------------------------
# The whole pipeline in one file


def original_unet(unet):
    """The UNet's tensors under their original names."""
    tensors = {}
    for parameter, value in unet.state_dict().items():
        module, _, leaf = parameter.rpartition(".")
        tensors[f"{unet_name(module, unet.config)}.{leaf}"] = value
    return tensors


def original_vae(vae):
    """The autoencoder's tensors under their original names; there its attention is 1x1 convolutions, (C, C, 1, 1)."""
    require(type(vae) is AutoencoderKL, f"vae: {type(vae).__name__} has no place in SDXL's original layout")
    tensors = {vae_name(name, len(vae.config.up_block_types)): value for name, value in vae.state_dict().items()}
    return {name: value[:, :, None, None] if ".attn_1." in name and value.ndim == 2 else value
            for name, value in tensors.items()}  # fmt: skip


def open_clip(text_encoder):
    """A text encoder's tensors as OpenCLIP keeps them: queries, keys and values in one, the projection transposed."""
    ours = text_encoder.state_dict()
    tensors = {}
    for name, value in ours.items():
        if ".q_proj." in name:
            value = torch.cat([ours[name.replace(".q_proj.", f".{which}_proj.")] for which in "qkv"])
        if not re.search(r"\.[kv]_proj\.", name):
            tensors[replace_all(name, OPEN_CLIP_PARTS)] = value.T if name == "text_projection.weight" else value
    return tensors


def original_state_dict(unet, vae, text_encoder, text_encoder_2):
    """A whole SDXL under the names of Stability AI's file, less its constants `position_ids` and `logit_scale`."""
    return {
        **{f"model.diffusion_model.{name}": value for name, value in original_unet(unet).items()},
        **{f"first_stage_model.{name}": value for name, value in original_vae(vae).items()},
        **{f"conditioner.embedders.0.transformer.{nested(name)}": value
           for name, value in text_encoder.state_dict().items()},
        **{f"conditioner.embedders.1.model.{name}": value for name, value in open_clip(text_encoder_2).items()},
    }  # fmt: skip


def save_single_file(pipeline, path, dtype=torch.float16):
    """Write a whole SDXL pipeline (or the folder of one) as the single file that ComfyUI and A1111 load.

    Programs that read it know a v-prediction model by the empty tensor `v_pred` and its zero terminal SNR by `ztsnr`,
    and take everything else for granted: SDXL's shapes, its noise schedule, 0.13025 as the scale of the latents.
    """
    if not isinstance(pipeline, StableDiffusionXLPipeline):
        pipeline = StableDiffusionXLPipeline.from_pretrained(pipeline, dtype=dtype)
    schedule, models = pipeline.scheduler.config, [getattr(pipeline, name) for name in COMPONENTS]
    require(schedule.prediction_type in ("epsilon", "v_prediction"),
            f"prediction type {schedule.prediction_type}: other programs know epsilon and v_prediction")  # fmt: skip
    require(not any(".lora_A." in name for model in models for name in model.state_dict()),
            "the pipeline has a LoRA loaded: call its fuse_lora() and unload_lora_weights() before")  # fmt: skip
    tensors = {name: value.to("cpu", dtype) for name, value in original_state_dict(*models).items()}
    if schedule.prediction_type == "v_prediction":
        tensors["v_pred"] = torch.tensor([])
    if schedule.get("rescale_betas_zero_snr", False):
        tensors["ztsnr"] = torch.tensor([])
    write(path, tensors, {"format": "pt"})
