"""Train a complete, tiny Stable Diffusion XL for 64-px pictures from nothing: tokenizers, text encoders and UNet.

    python pretrain/train_autoencoder.py --output_dir pretrain/work/vae-4ch
    python pretrain/train_tiny_sdxl.py --vae pretrain/work/vae-4ch --output_dir pretrain/work/sdxl

The pictures and captions are those of `emoji_images.py`. Nothing pretrained goes in except the autoencoder. Resumable:
started again with the same arguments it goes on from the last saved state. It writes `progress.csv`, now and then
`samples.png` (32 fixed captions, drawn by the real `StableDiffusionXLPipeline` with the averaged weights) and, at the
end, `pipeline/`: the whole pipeline in float16, checked to load and to fit in `--max_megabytes`.

`--minutes` ends the training early and saves the pipeline all the same; the learning rate, a cosine over `--steps`, is
then cut where it stands, so choose `--steps` by the measured speed first.
"""

import argparse
import csv
import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from diffusers.training_utils import EMAModel
from PIL import Image
from tokenizers import pre_tokenizers, trainers
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from pretrain.emoji_images import concept, load_emoji
from pretrain.resumable import load_state, save_state

SIZE = 64  # px of the pictures, 8 x 8 latents
MARGIN = 8  # px of extra size that random crops move in
TRAIN_STEPS = 1000  # timesteps of the noise schedule
SAMPLE_CAPTIONS = """red apple|banana|strawberry|pizza|hamburger|birthday cake|hot beverage|avocado
cat face|dog face|panda|fox|frog|penguin|octopus|butterfly
grinning face|smiling face with sunglasses|crying face|red heart|fire|star|sun|rainbow
automobile|rocket|sailboat|house|soccer ball|guitar|woman artist|man farmer dark skin tone"""


def parse_args(argv=None):
    """Command-line arguments; the defaults are what the shipped weights were trained with."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", default="pretrain/work", help="where the pictures are unpacked")
    parser.add_argument("--vae", required=True, help="folder of the 4-channel autoencoder")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--block_out_channels", type=int, nargs="+", default=[80, 96])
    parser.add_argument("--text_width", type=int, default=64, help="of each of the two text encoders")
    parser.add_argument("--text_layers", type=int, default=3)
    parser.add_argument("--vocabulary", type=int, default=1000, help="tokens, the 512 bytes and two specials included")
    parser.add_argument("--steps", type=int, default=6500)
    parser.add_argument("--minutes", type=float, help="stop training this long after the start and save the pipeline")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--caption_dropout", type=float, default=0.1)
    parser.add_argument("--snr_gamma", type=float, default=5.0, help="min-SNR weighting")
    parser.add_argument("--crops", type=int, default=0, help="shifted and cropped variants encoded of each picture")
    parser.add_argument("--save_every", type=int, default=300, help="steps between saved states")
    parser.add_argument("--sample_every", type=int, default=1200, help="steps between sample grids")
    parser.add_argument("--guidance_scale", type=float, default=4.0, help="of the sample grids")
    parser.add_argument("--max_megabytes", type=float, default=15.0, help="of the saved pipeline, 10^6 bytes each")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def build_tokenizers(captions, size):
    """Two CLIP tokenizers with a byte-level vocabulary of at most `size` tokens, learnt from the captions.

    Ids are ordered as CLIP's are: bytes ("!" is 0), bytes that end a word, merges, start and end of text. The first
    tokenizer pads with the end of text, the second with "!", as SDXL's do.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    start, end = "<|startoftext|>", "<|endoftext|>"
    backend = CLIPTokenizer().backend_tokenizer  # brings CLIP's normalisation and splitting into words
    trainer = trainers.BpeTrainer(
        vocab_size=4 * size, min_frequency=2, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    backend.train_from_iterator(captions, trainer)
    merges = [tuple(pair) for pair in json.loads(backend.to_str())["model"]["merges"]]
    merges = merges[: size - 2 * len(alphabet) - 2]
    tokens = [
        *alphabet,
        *(byte + "</w>" for byte in alphabet),
        *(first + second for first, second in merges),
        start,
        end,
    ]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    return [CLIPTokenizer(vocab=vocabulary, merges=merges, pad_token=pad, model_max_length=77) for pad in (end, "!")]


def build_pipeline(args, captions):
    """An untrained `StableDiffusionXLPipeline` around the trained autoencoder."""
    torch.manual_seed(args.seed)
    tokenizer, tokenizer_2 = build_tokenizers(captions, args.vocabulary)
    width = args.text_width
    text_configs = [
        CLIPTextConfig(
            vocab_size=len(tokens),
            hidden_size=width,
            intermediate_size=4 * width,
            projection_dim=width,
            num_hidden_layers=args.text_layers,
            num_attention_heads=width // 16,
            max_position_embeddings=77,
            hidden_act=activation,
            bos_token_id=tokens.bos_token_id,
            eos_token_id=tokens.eos_token_id,  # the last id, not 2: pooling takes the first end of text
            pad_token_id=tokens.pad_token_id,
        )
        for tokens, activation in ((tokenizer, "quick_gelu"), (tokenizer_2, "gelu"))
    ]
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
        attention_head_dim=[channels // 16 for channels in args.block_out_channels],  # numbers of heads, in fact
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
        prediction_type="epsilon",
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


def tokenize(pipeline, captions):
    """Token ids of both tokenizers, padded to 77 as the pipeline does: int64 (2, N, 77)."""
    ids = [
        tokenizer(captions, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
        for tokenizer in (pipeline.tokenizer, pipeline.tokenizer_2)
    ]
    return torch.stack(ids)


def encode_text(text_encoder, text_encoder_2, ids):
    """Penultimate hidden states of both encoders, (B, 77, 2 width), and the second's pooled projection, (B, width)."""
    first = text_encoder(ids[0], output_hidden_states=True)
    second = text_encoder_2(ids[1], output_hidden_states=True)
    return torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1), second.text_embeds


@torch.no_grad()
def encode_pictures(vae, args):
    """Posteriors of each picture whole and cropped at random corners, in memory for the whole training.

    Returns the mean and standard deviation, float32 (N, 1 + crops, 4, 8, 8), multiplied by the scaling factor, and the
    crops' corners in px, int64 (N, 1 + crops, 2) as (top, left). There are no flips: names tell left from right.
    """
    whole, _ = load_emoji(args.work_dir, SIZE)
    large, _ = load_emoji(args.work_dir, SIZE + MARGIN)
    corners = np.random.default_rng(args.seed).integers(MARGIN + 1, size=(len(whole), 1 + args.crops, 2))
    corners[:, 0] = 0  # the whole picture
    means, stds = [], []
    for start in tqdm(range(0, len(whole), 16), desc="encoding pictures", mininterval=5):
        variants = [
            whole[row] if column == 0 else large[row, top : top + SIZE, left : left + SIZE]
            for row in range(start, min(start + 16, len(whole)))
            for column, (top, left) in enumerate(corners[row])
        ]
        pictures = torch.from_numpy(np.stack(variants)).permute(0, 3, 1, 2).float().div(127.5).sub(1)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(pictures.contiguous(memory_format=torch.channels_last)).latent_dist
        means.append(posterior.mean.float().unflatten(0, (-1, 1 + args.crops)))
        stds.append(posterior.std.float().unflatten(0, (-1, 1 + args.crops)))
    scale = vae.config.scaling_factor
    return torch.cat(means) * scale, torch.cat(stds) * scale, torch.from_numpy(corners)


def sampling_probabilities(captions):
    """Probability (N,) of drawing each picture: the n skin tones of one concept count together as sqrt(n) pictures."""
    _, inverse, counts = np.unique([concept(caption) for caption in captions], return_inverse=True, return_counts=True)
    weights = counts[inverse] ** -0.5
    return weights / weights.sum()


def min_snr_weights(alphas_cumprod, gamma):
    """Loss weights (T,) of epsilon prediction: min(SNR, gamma) / SNR."""
    snr = alphas_cumprod / (1 - alphas_cumprod)
    return snr.clamp(max=gamma) / snr


def train_loss(nets, batch, args, schedule):
    """Weighted mean squared error of the predicted noise; a scalar.

    `batch` holds ids (2, B, 77), keep (B,) as 0 or 1, latents and noise (B, 4, 8, 8), timesteps (B,), time_ids (B, 6).
    """
    alphas_cumprod, weights = schedule
    alphas = alphas_cumprod[batch["timesteps"]].view(-1, 1, 1, 1)
    noisy = alphas.sqrt() * batch["latents"] + (1 - alphas).sqrt() * batch["noise"]
    with torch.autocast("cpu", torch.bfloat16):
        states, pooled = encode_text(nets["text_encoder"], nets["text_encoder_2"], batch["ids"])
        added = {"text_embeds": pooled * batch["keep"].view(-1, 1), "time_ids": batch["time_ids"]}
        states = states * batch["keep"].view(-1, 1, 1)
        predicted = nets["unet"](noisy, batch["timesteps"], states, added_cond_kwargs=added).sample
    errors = (predicted.float() - batch["noise"]).pow(2).mean(dim=(1, 2, 3))
    return (errors * weights[batch["timesteps"]]).mean()


def draw_batch(rng, ids, posteriors, probabilities, args):
    """A random batch as `train_loss` takes it; half of the pictures whole, half of them crops.

    The original size told to the UNet is 64 px (what the pipeline says by default) or 256 px (what the files have).
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


@torch.no_grad()
def save_samples(pipeline, args, path, columns=8, scale=2):
    """Draw the fixed captions, each with its own seed, as a grid of four rows; print the captions."""
    captions = [line.split("|") for line in SAMPLE_CAPTIONS.split("\n")]
    flat = [caption for row in captions for caption in row]
    pipeline.set_progress_bar_config(disable=True)
    pictures = pipeline(
        flat,
        height=SIZE,
        width=SIZE,
        num_inference_steps=25,
        guidance_scale=args.guidance_scale,
        generator=[torch.Generator().manual_seed(args.seed + index) for index in range(len(flat))],
        output_type="np",
    ).images
    grid = pictures.reshape(-1, columns, SIZE, SIZE, 3).transpose(0, 2, 1, 3, 4).reshape(-1, columns * SIZE, 3)
    image = Image.fromarray((grid * 255).round().astype(np.uint8))
    image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST).save(path, optimize=True)
    tqdm.write("\n".join([f"{path}:"] + ["    " + ", ".join(row) for row in captions]))


def folder_megabytes(folder):
    """Size of all files below a folder, in 10^6 bytes."""
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file()) / 1e6


def finish(pipeline, args, folder):
    """Save the pipeline in float16, check its size, load it again and draw the samples with that."""
    pipeline.vae.register_to_config(_name_or_path="")  # a folder of the machine that trained it
    pipeline.to(torch.float16).save_pretrained(folder)
    for name in ("text_encoder", "text_encoder_2"):
        # not asked for a dtype, transformers takes the one of this file, diffusers float32: let them agree
        path = folder / name / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": "float32"}, indent=2) + "\n")
    size = folder_megabytes(folder)
    if size > args.max_megabytes:
        raise SystemExit(f"{folder} has {size:.2f} MB, more than the {args.max_megabytes} MB of --max_megabytes")
    loaded = StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
    if {getattr(loaded, name).dtype for name in ("vae", "unet", "text_encoder", "text_encoder_2")} != {torch.float32}:
        raise SystemExit(f"{folder} does not load as float32")
    save_samples(loaded, args, folder.parent / "samples.png")
    print(f"saved {folder}: {size:.2f} MB")


def main(argv=None):
    """Train, with saved states and sample grids on the way, then save the pipeline."""
    args = parse_args(argv)
    started = time.time()
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    _, captions = load_emoji(args.work_dir, SIZE)
    pipeline = build_pipeline(args, captions)
    posteriors = encode_pictures(pipeline.vae.to(memory_format=torch.channels_last), args)
    ids, probabilities = tokenize(pipeline, captions), sampling_probabilities(captions)
    alphas_cumprod = pipeline.scheduler.alphas_cumprod.clone()
    schedule = alphas_cumprod, min_snr_weights(alphas_cumprod, args.snr_gamma)

    nets = torch.nn.ModuleDict({name: getattr(pipeline, name) for name in ("unet", "text_encoder", "text_encoder_2")})
    nets.train()
    # on a CPU, PyTorch's fused attention takes half of the time of a step: the plain one doubles the speed
    pipeline.unet.set_attn_processor(AttnProcessor())
    pipeline.text_encoder.set_attn_implementation("eager")
    pipeline.text_encoder_2.set_attn_implementation("eager")
    ema = EMAModel(nets.parameters(), decay=0.9995, use_ema_warmup=True, inv_gamma=1, power=0.75)
    optimizer = torch.optim.AdamW(
        nets.parameters(), lr=args.learning_rate, betas=(0.9, 0.99), weight_decay=1e-2, fused=True
    )
    counts = {name: sum(p.numel() for p in net.parameters()) for name, net in (*nets.items(), ("vae", pipeline.vae))}
    print("parameters:", ", ".join(f"{name} {count:,}" for name, count in counts.items()))
    print(f"latents: standard deviation {posteriors[0].std():.3f}, of the posteriors {posteriors[1].mean():.3f}")
    first_step = load_state(output_dir / "state", nets, optimizer, ema)

    bar = tqdm(range(first_step, args.steps), initial=first_step, total=args.steps, mininterval=5)
    losses, since = [], time.time()
    for step in bar:
        warmup, decay = min(1.0, (step + 1) / 200), 0.5 * (1 + np.cos(np.pi * step / args.steps))
        optimizer.param_groups[0]["lr"] = args.learning_rate * warmup * max(decay, 0.01)
        rng = np.random.Generator(np.random.Philox(key=args.seed, counter=[0, 0, 0, step]))
        loss = train_loss(nets, draw_batch(rng, ids, posteriors, probabilities, args), args, schedule)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(nets.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(nets.parameters())

        losses.append(loss.item())
        late = args.minutes is not None and time.time() - started > 60 * args.minutes
        last = late or step + 1 == args.steps
        if step % 50 == 0:
            bar.set_postfix(loss=f"{np.mean(losses[-50:]):.4f}")
        if (step + 1) % args.save_every == 0 or last:
            save_state(output_dir / "state", step + 1, nets, optimizer, ema)
            speed = len(losses) * args.batch_size / (time.time() - since)
            row = [step + 1, round(time.time() - started), round(float(np.mean(losses)), 5), round(speed, 1)]
            with open(output_dir / "progress.csv", "a", newline="") as file:
                csv.writer(file).writerow(row)
            tqdm.write(f"step {row[0]}: {row[1]} s, loss {row[2]:.4f}, {row[3]} samples/s")
        if (step + 1) % args.sample_every == 0 and not last:
            ema.store(nets.parameters())
            ema.copy_to(nets.parameters())
            save_samples(pipeline, args, output_dir / "samples.png")
            ema.restore(nets.parameters())
        if (step + 1) % args.save_every == 0:
            losses, since = [], time.time()
        if late:
            tqdm.write(f"stopped by --minutes after step {step + 1} of {args.steps}")
            break
    ema.copy_to(nets.parameters())
    finish(pipeline, args, output_dir / "pipeline")


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    main()
