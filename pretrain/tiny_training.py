"""Shared by the scripts that train the tiny pipelines: tokenizers, text configs, pictures, loop, samples, saving."""

import csv
import json
import time
from pathlib import Path

import numpy as np
import torch
from diffusers.training_utils import EMAModel
from PIL import Image
from safetensors.torch import save_file
from tokenizers import pre_tokenizers, trainers
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTokenizer, PreTrainedTokenizerFast

from pretrain.emoji_images import DOMAINS, concept, held_out, in_domain, load_emoji
from pretrain.resumable import autocast, load_state, save_state

SIZE = 64  # px of a picture; 8 x 8 latents
MARGIN = 8  # px by which pictures are larger for random crops
TRAIN_STEPS = 1000  # timesteps of the noise schedule
SAMPLE_CAPTIONS = """red apple|banana|strawberry|pizza|hamburger|birthday cake|hot beverage|avocado
cat face|dog face|panda|fox|frog|penguin|octopus|butterfly
grinning face|smiling face with sunglasses|crying face|red heart|fire|star|sun|rainbow
automobile|rocket|sailboat|house|soccer ball|guitar|woman artist|man farmer dark skin tone"""


def add_training_arguments(parser, steps, batch_size):
    """Add the flags that `encode_pictures`, `train` and `finish` read."""
    parser.add_argument("--work_dir", default="pretrain/work", help="where the pictures are unpacked")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--minutes", type=float, help="stop training this long after the start and save the pipeline")
    parser.add_argument("--batch_size", type=int, default=batch_size)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--save_every", type=int, default=300, help="steps between saved states")
    parser.add_argument("--sample_every", type=int, default=1200, help="steps between sample grids")
    parser.add_argument("--keep_every", type=int, help="steps between averaged weights that are kept, in float16")
    parser.add_argument(
        "--hold_out", action="store_true", help="leave out the pictures that train_autoencoder.py holds out"
    )
    parser.add_argument("--domain", choices=DOMAINS, default="all", help="pictures to train on")
    parser.add_argument("--guidance_scale", type=float, default=4.0, help="of the sample grids")
    parser.add_argument("--max_megabytes", type=float, default=15.0, help="of the saved pipeline, 10^6 bytes each")
    parser.add_argument("--seed", type=int, default=0)


def build_tokenizers(captions, size):
    """Two CLIP tokenizers with a byte-level vocabulary of at most `size` tokens, learnt from the captions.

    Ids have CLIP's order: bytes ("!" is 0), bytes that end a word, merges, start and end of text. As in SDXL, the
    first tokenizer pads with the end of text and the second with "!".
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    start, end = "<|startoftext|>", "<|endoftext|>"
    backend = CLIPTokenizer().backend_tokenizer  # has CLIP's normalisation and word splitting
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


def clip_configs(tokenizers, width, layers):
    """Configs of the two CLIP text encoders of SDXL and SD3."""
    return [
        CLIPTextConfig(
            vocab_size=len(tokens),
            hidden_size=width,
            intermediate_size=4 * width,
            projection_dim=width,
            num_hidden_layers=layers,
            num_attention_heads=width // 16,
            max_position_embeddings=77,
            hidden_act=activation,
            bos_token_id=tokens.bos_token_id,
            eos_token_id=tokens.eos_token_id,  # the last id, not 2: pooling takes the first end of text
            pad_token_id=tokens.pad_token_id,
        )
        for tokens, activation in zip(tokenizers, ("quick_gelu", "gelu"), strict=True)
    ]


def tokenize(pipeline, captions):
    """Token ids of both CLIP tokenizers, int64 (2, N, 77), padded as in the pipelines."""
    ids = [
        tokenizer(captions, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
        for tokenizer in (pipeline.tokenizer, pipeline.tokenizer_2)
    ]
    return torch.stack(ids)


def load_training_pictures(args, size, domain=None):
    """Images and captions of `load_emoji` in a domain (None: --domain); under --hold_out without the held-out ones."""
    images, captions = load_emoji(args.work_dir, size)
    kept = in_domain(args.work_dir, captions, domain or args.domain)
    if args.hold_out:
        kept &= ~held_out(captions)
    return images[kept], [caption for caption, keep in zip(captions, kept, strict=True) if keep]


@torch.no_grad()
def encode_pictures(vae, args, crops=0):
    """Posteriors of all pictures: each picture whole, and `crops` crops of it at random corners.

    Returns mean and standard deviation in the denoiser's space (shifted and scaled), float32
    (N, 1 + crops, channels, 8, 8), and the crops' corners (top, left) in px, int64 (N, 1 + crops, 2). There are no
    flips: names tell left from right.
    """
    whole, _ = load_training_pictures(args, SIZE)
    large, _ = load_training_pictures(args, SIZE + MARGIN)
    corners = np.random.default_rng(args.seed).integers(MARGIN + 1, size=(len(whole), 1 + crops, 2))
    corners[:, 0] = 0  # the whole picture
    means, stds = [], []
    for start in tqdm(range(0, len(whole), 16), desc="encoding pictures", mininterval=5):
        variants = [
            whole[row] if column == 0 else large[row, top : top + SIZE, left : left + SIZE]
            for row in range(start, min(start + 16, len(whole)))
            for column, (top, left) in enumerate(corners[row])
        ]
        pictures = torch.from_numpy(np.stack(variants)).permute(0, 3, 1, 2).float().div(127.5).sub(1)
        with autocast():
            posterior = vae.encode(pictures.contiguous(memory_format=torch.channels_last)).latent_dist
        means.append(posterior.mean.float().unflatten(0, (-1, 1 + crops)))
        stds.append(posterior.std.float().unflatten(0, (-1, 1 + crops)))
    shift, scale = vae.config.shift_factor or 0.0, vae.config.scaling_factor
    return (torch.cat(means) - shift) * scale, torch.cat(stds) * scale, torch.from_numpy(corners)


def sampling_probabilities(captions):
    """Sampling probability (N,) of each picture. The n skin tones of a concept together count as sqrt(n) pictures."""
    _, inverse, counts = np.unique([concept(caption) for caption in captions], return_inverse=True, return_counts=True)
    weights = counts[inverse] ** -0.5
    return weights / weights.sum()


@torch.no_grad()
def save_samples(pipeline, args, path, columns=8, scale=2):
    """Sample the fixed captions, each with its own seed, into a grid of four rows; print the captions."""
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
    image = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    # a palette makes the file a quarter as large
    image.quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=3).save(path, optimize=True)
    tqdm.write("\n".join([f"{path}:"] + ["    " + ", ".join(row) for row in captions]))


def folder_megabytes(folder):
    """Size of all files below a folder, 10^6 bytes."""
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file()) / 1e6


def finish(pipeline, args, folder, **options):
    """Save the pipeline in float16, check its size, load it again (with `options`) and sample from the loaded one."""
    nets = [name for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)]
    pipeline.vae.register_to_config(_name_or_path="")  # else it names a folder of this machine
    for part in pipeline.components.values():
        if isinstance(part, PreTrainedTokenizerFast):  # else its file keeps the last padding and truncation
            part.backend_tokenizer.no_truncation()
            part.backend_tokenizer.no_padding()
    pipeline.to(torch.float16).save_pretrained(folder)
    for name in nets:
        if name.startswith("text_encoder"):
            # without a dtype argument transformers takes this file's dtype and diffusers float32: make both float32
            path = folder / name / "config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": "float32"}, indent=2) + "\n")
    size = folder_megabytes(folder)
    if size > args.max_megabytes:
        raise SystemExit(f"{folder} has {size:.2f} MB, more than the {args.max_megabytes} MB of --max_megabytes")
    loaded = type(pipeline).from_pretrained(folder, **options)
    if {getattr(loaded, name).dtype for name in nets} != {torch.float32}:
        raise SystemExit(f"{folder} does not load as float32")
    save_samples(loaded, args, folder.parent / "samples.png")
    print(f"saved {folder}: {size:.2f} MB")


def save_average(nets, ema, path):
    """Write the averaged weights of all nets in float16, named `net.parameter`."""
    averages = zip(nets.named_parameters(), ema.shadow_params, strict=True)
    save_file({name: average.to(torch.float16).contiguous() for (name, _), average in averages}, path)


def train(pipeline, names, args, started, step_loss):
    """Train the parts `names` of the pipeline and leave the averaged weights in them; writes states and sample grids.

    started: time in seconds that --minutes counts from.
    step_loss: function of the step's own numpy generator; draws a batch and returns its loss, a scalar.
    """
    output_dir = Path(args.output_dir)
    nets = torch.nn.ModuleDict({name: getattr(pipeline, name) for name in names})
    nets.train()
    ema = EMAModel(nets.parameters(), decay=0.9995, use_ema_warmup=True, inv_gamma=1, power=0.75)
    optimizer = torch.optim.AdamW(
        nets.parameters(), lr=args.learning_rate, betas=(0.9, 0.99), weight_decay=1e-2, fused=True
    )
    counts = {name: sum(p.numel() for p in net.parameters()) for name, net in (*nets.items(), ("vae", pipeline.vae))}
    print("parameters:", ", ".join(f"{name} {count:,}" for name, count in counts.items()))
    first_step = load_state(output_dir / "state", nets, optimizer, ema)

    bar = tqdm(range(first_step, args.steps), initial=first_step, total=args.steps, mininterval=5)
    losses, since = [], time.time()
    for step in bar:
        warmup, decay = min(1.0, (step + 1) / 200), 0.5 * (1 + np.cos(np.pi * step / args.steps))
        optimizer.param_groups[0]["lr"] = args.learning_rate * warmup * max(decay, 0.01)
        rng = np.random.Generator(np.random.Philox(key=args.seed, counter=[0, 0, 0, step]))
        loss = step_loss(rng)
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
        if args.keep_every and ((step + 1) % args.keep_every == 0 or last):
            save_average(nets, ema, output_dir / f"average-{step + 1:06}.safetensors")
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
