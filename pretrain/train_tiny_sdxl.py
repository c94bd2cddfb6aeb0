"""Train a complete, tiny Stable Diffusion XL for 64-px pictures from scratch: tokenizers, text encoders and UNet.

    python pretrain/train_autoencoder.py --output_dir pretrain/work/vae-4ch
    python pretrain/train_tiny_sdxl.py --vae pretrain/work/vae-4ch --output_dir pretrain/work/sdxl

The pictures and captions are those of `emoji_images.py`. Only the autoencoder is pretrained. The same command resumes
from the last saved state. The script writes `progress.csv`, every `--sample_every` steps `samples.png` (32 fixed
captions, sampled by the real `StableDiffusionXLPipeline` with the averaged weights) and, at the end, `pipeline/`: the
whole pipeline in float16, checked to load and to fit in `--max_megabytes`.

`--minutes` ends the training early and still saves the pipeline. The learning rate, a cosine over `--steps`, then ends
where it is, so choose `--steps` by the measured speed first.
"""

import argparse
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from pretrain.resumable import autocast
from pretrain.tiny_training import (
    SIZE,
    TRAIN_STEPS,
    add_training_arguments,
    build_tokenizers,
    clip_configs,
    encode_pictures,
    finish,
    load_training_pictures,
    sampling_probabilities,
    tokenize,
    train,
)


def parse_args(argv=None):
    """Command-line arguments; with --hold_out the defaults trained the shipped weights."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_training_arguments(parser, steps=9000, batch_size=32)
    parser.add_argument("--vae", required=True, help="folder of the 4-channel autoencoder")
    parser.add_argument("--block_out_channels", type=int, nargs="+", default=[80, 96])
    parser.add_argument("--text_width", type=int, default=64, help="of each of the two text encoders")
    parser.add_argument("--text_layers", type=int, default=3)
    parser.add_argument("--vocabulary", type=int, default=1000, help="tokens, the 512 bytes and two specials included")
    parser.add_argument("--caption_dropout", type=float, default=0.1)
    parser.add_argument("--prediction_type", choices=("epsilon", "v_prediction"), default="epsilon")
    parser.add_argument("--snr_gamma", type=float, default=5.0, help="min-SNR weighting")
    parser.add_argument("--crops", type=int, default=0, help="shifted and cropped variants encoded of each picture")
    return parser.parse_args(argv)


def build_pipeline(args, captions):
    """An untrained `StableDiffusionXLPipeline` around the trained autoencoder."""
    torch.manual_seed(args.seed)
    tokenizer, tokenizer_2 = build_tokenizers(captions, args.vocabulary)
    width = args.text_width
    text_configs = clip_configs((tokenizer, tokenizer_2), width, args.text_layers)
    levels, time_width = len(args.block_out_channels), 32
    unet = UNet2DConditionModel(
        sample_size=SIZE // 8,
        in_channels=4,
        out_channels=4,
        block_out_channels=tuple(args.block_out_channels),
        down_block_types=("CrossAttnDownBlock2D",) * levels,
        up_block_types=("CrossAttnUpBlock2D",) * levels,
        layers_per_block=1,
        transformer_layers_per_block=1,
        attention_head_dim=[channels // 16 for channels in args.block_out_channels],  # in fact numbers of heads
        norm_num_groups=16,
        cross_attention_dim=2 * width,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=time_width,
        projection_class_embeddings_input_dim=width + 6 * time_width,
    )
    scheduler = EulerDiscreteScheduler(
        num_train_timesteps=TRAIN_STEPS,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=args.prediction_type,
        timestep_spacing="leading",
        steps_offset=1,
    )
    return StableDiffusionXLPipeline(
        vae=AutoencoderKL.from_pretrained(args.vae).eval().requires_grad_(False),
        text_encoder=CLIPTextModel(text_configs[0]),
        text_encoder_2=CLIPTextModelWithProjection(text_configs[1]),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        unet=unet,
        scheduler=scheduler,
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )


def encode_text(text_encoder, text_encoder_2, ids):
    """Penultimate hidden states of both encoders, (B, 77, 2 width), and the second's pooled projection, (B, width)."""
    first = text_encoder(ids[0], output_hidden_states=True)
    second = text_encoder_2(ids[1], output_hidden_states=True)
    return torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1), second.text_embeds


def min_snr_weights(alphas_cumprod, gamma, prediction_type):
    """Loss weights (T,): min(SNR, gamma) / SNR for epsilon, min(SNR, gamma) / (SNR + 1) for v prediction.

    Source: Hang et al., "Efficient Diffusion Training via Min-SNR Weighting Strategy", 2023.
    """
    snr = alphas_cumprod / (1 - alphas_cumprod)
    return snr.clamp(max=gamma) / (snr if prediction_type == "epsilon" else snr + 1)


def train_loss(pipeline, batch, schedule):
    """Weighted mean squared error of the predicted noise or velocity; a scalar.

    batch: ids (2, B, 77), keep (B,) 0 or 1, latents and noise (B, 4, 8, 8), timesteps (B,), time_ids (B, 6).
    schedule: cumulative alphas (T,) and loss weights (T,).
    """
    alphas_cumprod, weights = schedule
    alphas = alphas_cumprod[batch["timesteps"]].view(-1, 1, 1, 1)
    noisy = alphas.sqrt() * batch["latents"] + (1 - alphas).sqrt() * batch["noise"]
    target = batch["noise"]
    if pipeline.scheduler.config.prediction_type == "v_prediction":
        target = alphas.sqrt() * batch["noise"] - (1 - alphas).sqrt() * batch["latents"]
    with autocast():
        states, pooled = encode_text(pipeline.text_encoder, pipeline.text_encoder_2, batch["ids"])
        added = {"text_embeds": pooled * batch["keep"].view(-1, 1), "time_ids": batch["time_ids"]}
        states = states * batch["keep"].view(-1, 1, 1)
        predicted = pipeline.unet(noisy, batch["timesteps"], states, added_cond_kwargs=added).sample
    errors = (predicted.float() - target).pow(2).mean(dim=(1, 2, 3))
    return (errors * weights[batch["timesteps"]]).mean()


def draw_batch(rng, ids, posteriors, probabilities, args):
    """A random batch for `train_loss`. With --crops half of the pictures are whole and half are crops.

    The original size in `time_ids` is 64 px (the pipeline's default) or 256 px (the files' size).
    """
    means, stds, corners = posteriors
    size = args.batch_size
    rows = rng.choice(len(probabilities), size=size, p=probabilities)
    columns = rng.integers(1, 1 + args.crops, size=size) * (rng.random(size) < 0.5) if args.crops else 0 * rows
    original = torch.from_numpy(rng.choice([SIZE, 256], size=(size, 1))).expand(-1, 2)
    spread, noise = torch.from_numpy(rng.standard_normal((2, size, *means.shape[2:]), dtype=np.float32))
    return {
        "ids": ids[:, rows],
        "keep": torch.from_numpy(rng.random(size) >= args.caption_dropout).float(),
        "latents": means[rows, columns] + stds[rows, columns] * spread,
        "noise": noise,
        "timesteps": torch.from_numpy(rng.integers(TRAIN_STEPS, size=size)),
        "time_ids": torch.cat([original, corners[rows, columns], torch.full((size, 2), SIZE)], dim=1),
    }


def main(argv=None):
    """Train, then save the pipeline."""
    args = parse_args(argv)
    started = time.time()
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    _, captions = load_training_pictures(args, SIZE)
    _, all_captions = load_training_pictures(args, SIZE, "all")
    pipeline = build_pipeline(args, all_captions)  # so tokens are the same for each domain
    posteriors = encode_pictures(pipeline.vae.to(memory_format=torch.channels_last), args, args.crops)
    ids, probabilities = tokenize(pipeline, captions), sampling_probabilities(captions)
    alphas_cumprod = pipeline.scheduler.alphas_cumprod.clone()
    schedule = alphas_cumprod, min_snr_weights(alphas_cumprod, args.snr_gamma, args.prediction_type)

    # on a CPU, PyTorch's fused attention takes half of a step's time: plain attention doubles the speed
    pipeline.unet.set_attn_processor(AttnProcessor())
    pipeline.text_encoder.set_attn_implementation("eager")
    pipeline.text_encoder_2.set_attn_implementation("eager")
    print(f"latents: standard deviation {posteriors[0].std():.3f}, of the posteriors {posteriors[1].mean():.3f}")

    def step_loss(rng):
        return train_loss(pipeline, draw_batch(rng, ids, posteriors, probabilities, args), schedule)

    train(pipeline, ("unet", "text_encoder", "text_encoder_2"), args, started, step_loss)
    finish(pipeline, args, output_dir / "pipeline", add_watermarker=False)


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    main()
