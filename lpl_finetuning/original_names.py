"""Names of layers and tensors in Stability AI's code, of their names in diffusers and transformers. No torch."""

import re

from lpl_finetuning.errors import require

UNET_MODULES = {
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
MMDIT_MODULES = {
    "pos_embed.proj": "x_embedder.proj",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "context_embedder": "context_embedder",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
MMDIT_PARTS = {  # in a block; qkv.0, .1 and .2 are the query, key and value thirds of one layer
    "norm1.linear": "x_block.adaLN_modulation.1",
    "attn.to_q": "x_block.attn.qkv.0",
    "attn.to_k": "x_block.attn.qkv.1",
    "attn.to_v": "x_block.attn.qkv.2",
    "attn.norm_q": "x_block.attn.ln_q",
    "attn.norm_k": "x_block.attn.ln_k",
    "attn.to_out.0": "x_block.attn.proj",
    "attn2.to_q": "x_block.attn2.qkv.0",
    "attn2.to_k": "x_block.attn2.qkv.1",
    "attn2.to_v": "x_block.attn2.qkv.2",
    "attn2.norm_q": "x_block.attn2.ln_q",
    "attn2.norm_k": "x_block.attn2.ln_k",
    "attn2.to_out.0": "x_block.attn2.proj",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "attn.add_q_proj": "context_block.attn.qkv.0",
    "attn.add_k_proj": "context_block.attn.qkv.1",
    "attn.add_v_proj": "context_block.attn.qkv.2",
    "attn.norm_added_q": "context_block.attn.ln_q",
    "attn.norm_added_k": "context_block.attn.ln_k",
    "attn.to_add_out": "context_block.attn.proj",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}
MMDIT_LAYER = re.compile(r"transformer_blocks\.(\d+)\.(.+)")
QKV_THIRD = re.compile(r"(.+qkv)[._]([012])(\..+)")  # (layer, third, rest) of a name in original or kohya form
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
    """Return the original name of a module of the UNet: layers are numbered across blocks, samplers included.

    Args:
        config: the UNet's configuration.
    """
    if module in UNET_MODULES:
        return UNET_MODULES[module]
    match = UNET_LAYER.fullmatch(module)
    part = match and (match[5] if match[3] == "attentions" else UNET_PARTS.get(match[5]))
    require(part, f"unet.{module} has no place in SDXL's original layout, which other programs read: "
            "leave --output_kohya_format or --single_file out")  # fmt: skip
    side, block, kind, layer = match.groups()[:4]
    layer, slot = int(layer), int(kind == "attentions")  # in a layer, slot 0 is the resnet and slot 1 the transformer
    if side is None:
        return f"middle_block.{2 * layer + slot}.{part}"
    last = config.layers_per_block
    if kind == "downsamplers":
        layer, part = last, "op"
    elif kind == "upsamplers":
        layer, slot = last, 1 + ("Attn" in config.up_block_types[int(block)])
    number = int(block) * (last + 1) + layer
    return f"input_blocks.{1 + number}.{slot}.{part}" if side == "down" else f"output_blocks.{number}.{slot}.{part}"


def mmdit_name(module):
    """Return the original name of a module of SD3's transformer; queries, keys and values end in qkv.0, .1 and .2."""
    match = MMDIT_LAYER.fullmatch(module)
    part = MMDIT_PARTS.get(match[2]) if match else MMDIT_MODULES.get(module)
    require(part, f"transformer.{module} has no place in SD3's original layout, which other programs read: "
            "leave --output_kohya_format or --single_file out")  # fmt: skip
    return f"joint_blocks.{match[1]}.{part}" if match else part


def swaps_halves(module, num_layers):
    """Whether a module of SD3's transformer gives scale and shift in diffusers, but shift and scale originally."""
    return module in ("norm_out.linear", f"transformer_blocks.{num_layers - 1}.norm1_context.linear")


def vae_name(parameter, num_blocks):
    """Return the original name of a parameter of the autoencoder: up blocks count down, middle resnets from 1."""
    parameter = re.sub(r"up_blocks\.(\d+)", lambda match: f"up.{num_blocks - 1 - int(match[1])}", parameter)
    parameter = re.sub(r"mid_block\.resnets\.(\d+)", lambda match: f"mid.block_{int(match[1]) + 1}", parameter)
    return replace_all(parameter, VAE_PARTS)


def replace_all(name, parts):
    """Return `name` with each key of `parts` replaced by its value, in order."""
    for ours, original in parts.items():
        name = name.replace(ours, original)
    return name
