"""Random autoencoders and a whole random SDXL pipeline, small enough to be built in a second."""

import json

import torch
from diffusers import (
    AsymmetricAutoencoderKL,
    AutoencoderKL,
    AutoencoderTiny,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from lpl_finetuning.base_model import BaseModel, weights_fingerprint
from lpl_finetuning.networks.encoder_sketch import encoder_sketch
from lpl_finetuning.networks.latent_classifier import LatentClassifier
from pretrain.train_tiny_sdxl import build_tokenizers

WORDS = ["a red apple", "a photo of a dog", "the sun", "green leaves", "a blue house by the sea"]


def autoencoder(kind="sdxl", width=8, groups=4, seed=0, dtype=torch.float32):
    """A random `AutoencoderKL` like SDXL's or SD3's, or an `AsymmetricAutoencoderKL`; 8x downsampling."""
    torch.manual_seed(seed)
    blocks = (width, 2 * width, 2 * width, 2 * width)
    if kind == "asymmetric":
        vae = AsymmetricAutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            down_block_out_channels=blocks,
            layers_per_down_block=1,
            up_block_types=("UpDecoderBlock2D",) * 4,
            up_block_out_channels=blocks,
            layers_per_up_block=1,
            latent_channels=4,
            norm_num_groups=groups,
            scaling_factor=0.18215,
        )
    else:
        sd3 = kind == "sd3"
        vae = AutoencoderKL(
            block_out_channels=blocks,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=1,
            latent_channels=16 if sd3 else 4,
            norm_num_groups=groups,
            scaling_factor=1.5305 if sd3 else 0.13025,
            shift_factor=0.0609 if sd3 else None,
            use_quant_conv=not sd3,
            use_post_quant_conv=not sd3,
        )
    with torch.no_grad():  # PyTorch's initial norms are trivial: give them something that a mistake would show in
        for module in vae.modules():
            if isinstance(module, torch.nn.GroupNorm):
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.5, 0.5)
    return vae.to(dtype).eval()


def tiny_decoder(width=4, channels=4, seed=0, dtype=torch.float32):
    """A random `AutoencoderTiny` with two blocks in the first stage and one in each other."""
    torch.manual_seed(seed)
    tiny = AutoencoderTiny(
        latent_channels=channels, decoder_block_out_channels=(width,) * 4, num_decoder_blocks=(2, 1, 1, 1),
        encoder_block_out_channels=(1,) * 4, num_encoder_blocks=(1,) * 4,
    )  # fmt: skip
    return tiny.requires_grad_(False).eval().to(dtype)


def latent_classifier(dtype=torch.float32, **config):
    """A random `LatentClassifier` of three stages whose every weight matters."""
    torch.manual_seed(0)
    network = LatentClassifier(classes=("a", "b", "c"), block_widths=(8, 16, 24), blocks_per_stage=1, **config)
    for parameter in network.parameters():  # a new block is its shortcut, and norms are trivial
        torch.nn.init.normal_(parameter, std=0.3) if parameter.ndim > 1 else parameter.data.uniform_(0.5, 1.5)
    return network.requires_grad_(False).eval().to(dtype)


def save_feature_networks(folder, pipeline, family):
    """{flag: folder} of a random classifier and a random tiny decoder for a pipeline's latents, with the flags."""
    base = BaseModel(family, str(pipeline))
    vae = json.loads((pipeline / "vae" / "config.json").read_text())
    own = {"latent_channels": vae["latent_channels"], "scaling_factor": vae["scaling_factor"],
           "shift_factor": vae["shift_factor"] or 0.0, "vae": "its own",
           "vae_fingerprint": weights_fingerprint(base, "vae"),
           "vae_encoder_sketch": encoder_sketch(base)}  # fmt: skip
    latent_classifier(**own).save_pretrained(folder / "classifier")
    tiny_decoder(channels=vae["latent_channels"]).save_pretrained(folder / "tiny")
    return {"--lpl_classifier": folder / "classifier", "--lpl_tiny_decoder": folder / "tiny"}


def clip_config(tokenizer, width=16):
    """A CLIP text encoder of two layers for a tokenizer."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def sdxl_pipeline(seed=0, prediction_type="epsilon", **scheduler):
    """A random `StableDiffusionXLPipeline` for 64 px with every part that the real one has."""
    torch.manual_seed(seed)
    tokenizers = build_tokenizers(WORDS, 600)
    width = 16
    configs = [clip_config(tokenizer, width) for tokenizer in tokenizers]
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        transformer_layers_per_block=1,
        attention_head_dim=(1, 2),
        norm_num_groups=8,
        cross_attention_dim=2 * width,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=width + 6 * 8,
    )
    options = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    options |= {"timestep_spacing": "leading", "prediction_type": prediction_type, **scheduler}
    return StableDiffusionXLPipeline(
        vae=autoencoder("sdxl", seed=seed),
        text_encoder=CLIPTextModel(configs[0]),
        text_encoder_2=CLIPTextModelWithProjection(configs[1]),
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        unet=unet,
        scheduler=EulerDiscreteScheduler(**options),
        add_watermarker=False,
    )


def t5_tokenizer(words=WORDS):
    """A T5 tokenizer that knows these words and all their letters (training one is not reproducible)."""
    letters = sorted({letter for text in words for letter in text if letter != " "})
    known = sorted({"▁" + word for text in words for word in text.split()})
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(letter, -4.0) for letter in letters] + [(word, -3.0) for word in known]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)


def sd3_pipeline(seed=0, t5=True, sd35=False, shift=3.0):
    """A random `StableDiffusion3Pipeline` for 64 px: SD3 or (dual attention, qk-norm) SD3.5, with or without T5."""
    torch.manual_seed(seed)
    tokenizers = build_tokenizers(WORDS, 600)
    width = 16
    encoders = [CLIPTextModelWithProjection(clip_config(tokenizer, width)) for tokenizer in tokenizers]
    third, tokenizer_3 = None, None
    if t5:
        tokenizer_3 = t5_tokenizer()
        third = T5EncoderModel(
            T5Config(vocab_size=len(tokenizer_3), d_model=40, d_kv=8, d_ff=48, num_layers=2, num_heads=2)
        ).eval()
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=16,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=40,
        caption_projection_dim=32,
        pooled_projection_dim=2 * width,
        out_channels=16,
        pos_embed_max_size=16,
        dual_attention_layers=(0, 1) if sd35 else (),
        qk_norm="rms_norm" if sd35 else None,
    )
    with torch.no_grad():  # AdaLN's zero start would hide the conditions
        for parameter in transformer.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
        vae=autoencoder("sd3", seed=seed),
        text_encoder=encoders[0],
        tokenizer=tokenizers[0],
        text_encoder_2=encoders[1],
        tokenizer_2=tokenizers[1],
        text_encoder_3=third,
        tokenizer_3=tokenizer_3,
    )


def picture_folder(folder, count=6, size=64, seed=0):
    """A folder of smooth random pictures with `.txt` captions beside them."""
    import numpy as np
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for index in range(count):
        coarse = rng.integers(0, 255, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC).save(folder / f"{index:02d}.png")
        (folder / f"{index:02d}.txt").write_text(WORDS[index % len(WORDS)])
    return folder


def random_lora(base, folder, seed=0):
    """A LoRA of random weights for the UNet of an SDXL pipeline on disk."""
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    torch.manual_seed(seed)
    unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet")
    unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    StableDiffusionXLPipeline.save_lora_weights(folder, unet_lora_layers=get_peft_model_state_dict(unet))
    return folder
