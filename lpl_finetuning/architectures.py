"""Names and shapes of a model's tensors in diffusers and transformers, from the model's configuration. No torch.

Each function returns {name: shape} of a whole model's weights. A single file is compared with them before it is read.
"""


def linear(name, inputs, outputs, bias=True):
    """{name: shape} of a linear layer."""
    return {f"{name}.weight": (outputs, inputs)} | ({f"{name}.bias": (outputs,)} if bias else {})


def norm(name, width):
    """{name: shape} of a norm with weight and bias."""
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def conv(name, inputs, outputs, side=3):
    """{name: shape} of a convolution."""
    return {f"{name}.weight": (outputs, inputs, side, side), f"{name}.bias": (outputs,)}


def per_block(value, blocks):
    """A setting of a configuration, which may be one value for all blocks, as a list."""
    return list(value) if isinstance(value, list | tuple) else [value] * blocks


# ---------------------------------------------------------------------------------------------------------------------
# SDXL's UNet


def resnet(name, inputs, outputs, embedding=None):
    """{name: shape} of a residual block. embedding: width of the timestep's embedding; None in an autoencoder."""
    shapes = norm(f"{name}.norm1", inputs) | conv(f"{name}.conv1", inputs, outputs)
    if embedding:
        shapes |= linear(f"{name}.time_emb_proj", embedding, outputs)
    shapes |= norm(f"{name}.norm2", outputs) | conv(f"{name}.conv2", outputs, outputs)
    return shapes | (conv(f"{name}.conv_shortcut", inputs, outputs, side=1) if inputs != outputs else {})


def spatial_transformer(name, width, text, depth):
    """{name: shape} of a stack of transformer blocks that attends to a text of width `text`."""
    shapes = norm(f"{name}.norm", width) | linear(f"{name}.proj_in", width, width)
    for number in range(depth):
        block = f"{name}.transformer_blocks.{number}"
        for attention, source in (("attn1", width), ("attn2", text)):
            shapes |= linear(f"{block}.{attention}.to_q", width, width, bias=False)
            shapes |= linear(f"{block}.{attention}.to_k", source, width, bias=False)
            shapes |= linear(f"{block}.{attention}.to_v", source, width, bias=False)
            shapes |= linear(f"{block}.{attention}.to_out.0", width, width)
        shapes |= linear(f"{block}.ff.net.0.proj", width, 8 * width) | linear(f"{block}.ff.net.2", 4 * width, width)
        for each in ("norm1", "norm2", "norm3"):
            shapes |= norm(f"{block}.{each}", width)
    return shapes | linear(f"{name}.proj_out", width, width)


def unet(config):
    """Of SDXL's UNet."""
    widths, layers, text = config["block_out_channels"], config["layers_per_block"], config["cross_attention_dim"]
    depths, first = per_block(config["transformer_layers_per_block"], len(widths)), widths[0]
    time, pooled = 4 * first, config["projection_class_embeddings_input_dim"]
    shapes = conv("conv_in", config["in_channels"], first)
    for name, inputs in (("time_embedding", first), ("add_embedding", pooled)):
        shapes |= linear(f"{name}.linear_1", inputs, time) | linear(f"{name}.linear_2", time, time)
    skips, width = [first], first
    for block, (kind, outputs, depth) in enumerate(zip(config["down_block_types"], widths, depths, strict=True)):
        for layer in range(layers):
            shapes |= resnet(f"down_blocks.{block}.resnets.{layer}", width, outputs, time)
            if "CrossAttn" in kind:
                shapes |= spatial_transformer(f"down_blocks.{block}.attentions.{layer}", outputs, text, depth)
            skips, width = [*skips, outputs], outputs
        if block < len(widths) - 1:
            shapes |= conv(f"down_blocks.{block}.downsamplers.0.conv", width, width)
            skips.append(width)
    shapes |= resnet("mid_block.resnets.0", width, width, time) | resnet("mid_block.resnets.1", width, width, time)
    shapes |= spatial_transformer("mid_block.attentions.0", width, text, depths[-1])
    for block, (kind, outputs) in enumerate(zip(config["up_block_types"], widths[::-1], strict=True)):
        for layer in range(layers + 1):
            shapes |= resnet(f"up_blocks.{block}.resnets.{layer}", width + skips.pop(), outputs, time)
            if "CrossAttn" in kind:
                depth = depths[::-1][block]
                shapes |= spatial_transformer(f"up_blocks.{block}.attentions.{layer}", outputs, text, depth)
            width = outputs
        if block < len(widths) - 1:
            shapes |= conv(f"up_blocks.{block}.upsamplers.0.conv", width, width)
    return shapes | norm("conv_norm_out", first) | conv("conv_out", first, config.get("out_channels", 4))


# ---------------------------------------------------------------------------------------------------------------------
# The autoencoder


def middle(name, width):
    """{name: shape} of the middle of the encoder or the decoder."""
    shapes = resnet(f"{name}.resnets.0", width, width) | norm(f"{name}.attentions.0.group_norm", width)
    for each in ("to_q", "to_k", "to_v", "to_out.0"):
        shapes |= linear(f"{name}.attentions.0.{each}", width, width)
    return shapes | resnet(f"{name}.resnets.1", width, width)


def autoencoder(config):
    """Of an `AutoencoderKL`."""
    widths, layers, latent = config["block_out_channels"], config["layers_per_block"], config["latent_channels"]
    shapes, width = conv("encoder.conv_in", config.get("in_channels", 3), widths[0]), widths[0]
    for block, outputs in enumerate(widths):
        for layer in range(layers):
            shapes |= resnet(f"encoder.down_blocks.{block}.resnets.{layer}", width, outputs)
            width = outputs
        if block < len(widths) - 1:
            shapes |= conv(f"encoder.down_blocks.{block}.downsamplers.0.conv", width, width)
    shapes |= middle("encoder.mid_block", width) | norm("encoder.conv_norm_out", width)
    shapes |= conv("encoder.conv_out", width, 2 * latent) | conv("decoder.conv_in", latent, width)
    shapes |= middle("decoder.mid_block", width)
    for block, outputs in enumerate(widths[::-1]):
        for layer in range(layers + 1):
            shapes |= resnet(f"decoder.up_blocks.{block}.resnets.{layer}", width, outputs)
            width = outputs
        if block < len(widths) - 1:
            shapes |= conv(f"decoder.up_blocks.{block}.upsamplers.0.conv", width, width)
    shapes |= norm("decoder.conv_norm_out", width) | conv("decoder.conv_out", width, config.get("out_channels", 3))
    if config.get("use_quant_conv", True):
        shapes |= conv("quant_conv", 2 * latent, 2 * latent, side=1)
    return shapes | (
        conv("post_quant_conv", latent, latent, side=1) if config.get("use_post_quant_conv", True) else {}
    )


# ---------------------------------------------------------------------------------------------------------------------
# Text encoders


def clip(config, projects):
    """Of CLIP's text encoder, under the nested names; projects: whether it is the one with a projection."""
    width, inner = config["hidden_size"], config["intermediate_size"]
    shapes = {
        "text_model.embeddings.token_embedding.weight": (config["vocab_size"], width),
        "text_model.embeddings.position_embedding.weight": (config["max_position_embeddings"], width),
    }
    for number in range(config["num_hidden_layers"]):
        layer = f"text_model.encoder.layers.{number}"
        for each in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= linear(f"{layer}.self_attn.{each}", width, width)
        shapes |= linear(f"{layer}.mlp.fc1", width, inner) | linear(f"{layer}.mlp.fc2", inner, width)
        shapes |= norm(f"{layer}.layer_norm1", width) | norm(f"{layer}.layer_norm2", width)
    shapes |= norm("text_model.final_layer_norm", width)
    return shapes | (linear("text_projection", width, config["projection_dim"], bias=False) if projects else {})


def t5(config):
    """Of T5's encoder with gated layers."""
    width, inner, heads = config["d_model"], config["d_ff"], config["num_heads"]
    attention = heads * config["d_kv"]
    shapes = {"shared.weight": (config["vocab_size"], width)}
    for number in range(config["num_layers"]):
        layer, feed = f"encoder.block.{number}.layer.0", f"encoder.block.{number}.layer.1"
        for each in "qkv":
            shapes |= linear(f"{layer}.SelfAttention.{each}", width, attention, bias=False)
        shapes |= linear(f"{layer}.SelfAttention.o", attention, width, bias=False)
        if number == 0:
            bias = (config["relative_attention_num_buckets"], heads)
            shapes[f"{layer}.SelfAttention.relative_attention_bias.weight"] = bias
        for each in ("wi_0", "wi_1"):
            shapes |= linear(f"{feed}.DenseReluDense.{each}", width, inner, bias=False)
        shapes |= linear(f"{feed}.DenseReluDense.wo", inner, width, bias=False)
        shapes |= {f"{layer}.layer_norm.weight": (width,), f"{feed}.layer_norm.weight": (width,)}
    return shapes | {"encoder.final_layer_norm.weight": (width,)}


# ---------------------------------------------------------------------------------------------------------------------
# SD3's transformer


def mmdit_block(name, width, head, is_last, has_norms, is_dual):
    """{name: shape} of a block of SD3's transformer; the last one updates no text."""
    parts = ("to_q", "to_k", "to_v", "to_out.0")
    text = ("add_q_proj", "add_k_proj", "add_v_proj") + (() if is_last else ("to_add_out",))
    shapes = linear(f"{name}.norm1.linear", width, (9 if is_dual else 6) * width)
    shapes |= linear(f"{name}.norm1_context.linear", width, (2 if is_last else 6) * width)
    for each in (*parts, *text):
        shapes |= linear(f"{name}.attn.{each}", width, width)
    for each in parts if is_dual else ():
        shapes |= linear(f"{name}.attn2.{each}", width, width)
    if has_norms:
        norms = ["attn.norm_q", "attn.norm_k", "attn.norm_added_q", "attn.norm_added_k"]
        norms += ["attn2.norm_q", "attn2.norm_k"] if is_dual else []
        shapes |= {f"{name}.{each}.weight": (head,) for each in norms}
    for each in ("ff",) if is_last else ("ff", "ff_context"):
        shapes |= linear(f"{name}.{each}.net.0.proj", width, 4 * width)
        shapes |= linear(f"{name}.{each}.net.2", 4 * width, width)
    return shapes


def mmdit(config):
    """Of SD3's transformer."""
    head, blocks, patch = config["attention_head_dim"], config["num_layers"], config["patch_size"]
    width = head * config["num_attention_heads"]
    shapes = {"pos_embed.pos_embed": (1, config["pos_embed_max_size"] ** 2, width)}
    shapes |= conv("pos_embed.proj", config["in_channels"], width, side=patch)
    for name, inputs in (("timestep", 256), ("text", config["pooled_projection_dim"])):
        shapes |= linear(f"time_text_embed.{name}_embedder.linear_1", inputs, width)
        shapes |= linear(f"time_text_embed.{name}_embedder.linear_2", width, width)
    shapes |= linear("context_embedder", config["joint_attention_dim"], config["caption_projection_dim"])
    for number in range(blocks):
        is_dual, has_norms = number in config.get("dual_attention_layers", ()), bool(config.get("qk_norm"))
        shapes |= mmdit_block(f"transformer_blocks.{number}", width, head, number == blocks - 1, has_norms, is_dual)
    shapes |= linear("norm_out.linear", width, 2 * width)
    return shapes | linear("proj_out", width, patch * patch * (config.get("out_channels") or config["in_channels"]))
