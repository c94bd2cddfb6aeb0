"""Distil the decoder of a tiny pipeline into an `AutoencoderTiny`, the build of taesdxl and taesd3.

    python pretrain/train_tiny_decoder.py --vae examples/tiny-sdxl/vae --output_dir pretrain/work/tiny-decoder-4ch
    python pretrain/train_tiny_decoder.py --vae examples/tiny-sd3/vae --output_dir pretrain/work/tiny-decoder-16ch

The small decoder learns what the full one makes of the same latents: its pictures (L1 and L2), and its features. For
the features a 1 x 1 convolution at each size, which is thrown away in the end, predicts the full decoder's features
there, standardised per channel, from the small decoder's. The latents are samples of the posterior of the pictures of
`emoji_images.py`, less the held-out ones. Half of them are drawn with more noise, since the loss gives the decoder
estimates, which are off the latents of pictures. The small decoder takes latents in model space.

The same command resumes from the last saved state. The script writes `progress.csv` (step, seconds, losses, PSNR of
held-out pictures against those of the full decoder), `pictures.png` (the full decoder's above, the small decoder's
below) and, at the end, the averaged weights as a diffusers `AutoencoderTiny`. Its encoder is as small as can be and
zero: only the decoder is of use.
"""

import argparse
import csv
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, AutoencoderTiny
from diffusers.training_utils import EMAModel
from tqdm import tqdm

from lpl_utils import DecoderStages, LatentSpace, TinyDecoderStages, stage_features
from pretrain.emoji_images import held_out, load_emoji
from pretrain.resumable import autocast, load_state, save_state
from pretrain.train_autoencoder import SIZE, psnr, save_reconstructions

FEATURES = (0, 1, 2, 4)  # stages of the full decoder with the sizes of the small one's: 1, 2, 4, 8 px per latent
CALIBRATION = 64  # pictures from which the means and deviations of the features are measured


def parse_args(argv=None):
    """Command-line arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", default="pretrain/work", help="where the pictures are unpacked")
    parser.add_argument("--vae", required=True, help="folder of the autoencoder whose decoder is copied")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--width", type=int, default=16, help="channels of the small decoder; 64 in taesdxl")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--minutes", type=float, help="end after so many, with the weights of that moment")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--feature_weight", type=float, default=0.2)
    parser.add_argument("--noise", type=float, default=0.5, help="largest standard deviation of the added noise")
    parser.add_argument("--save_every", type=int, default=500, help="steps between saved states")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def build_tiny(vae, width, seed=0):
    """An `AutoencoderTiny` for the latents of an `AutoencoderKL`, with an encoder of zeros."""
    torch.manual_seed(seed)
    tiny = AutoencoderTiny(
        latent_channels=vae.config.latent_channels, decoder_block_out_channels=(width,) * 4,
        encoder_block_out_channels=(1,) * 4, num_encoder_blocks=(1,) * 4,
    )  # fmt: skip
    for parameter in tiny.encoder.parameters():
        torch.nn.init.zeros_(parameter)
    return tiny


class Student(torch.nn.Module):
    """The small decoder, and the 1 x 1 convolutions that predict the full decoder's features from its own."""

    def __init__(self, tiny, channels):
        """channels: of the full decoder's features at each size."""
        super().__init__()
        self.decoder = tiny.decoder
        self.stages = TinyDecoderStages(tiny)
        width = tiny.config.decoder_block_out_channels[0]
        self.heads = torch.nn.ModuleList(torch.nn.Conv2d(width, count, 1) for count in channels)

    def forward(self, latents):
        """(pictures (B, 3, H, W) in [-1, 1], [predicted features]) of latents in model space."""
        features = list(stage_features(self.stages, latents))
        return self.decoder.layers[-1](features[-1]) * 2 - 1, [
            head(x) for head, x in zip(self.heads, features, strict=True)
        ]


class Teacher:
    """The full decoder: pictures, and features standardised per channel."""

    def __init__(self, vae, latents):
        """latents: (N, C, h, w) in model space, of which means and deviations are measured."""
        self.stages = DecoderStages(vae, rgb=True)
        self.statistics = None
        _, features = self(latents)
        self.statistics = [(x.mean((0, 2, 3), keepdim=True), x.std((0, 2, 3), keepdim=True) + 1e-6) for x in features]

    @torch.no_grad()
    def __call__(self, latents):
        """(pictures (B, 3, H, W), [features]) of latents in model space."""
        *features, pictures = stage_features(self.stages, latents)
        features = [features[index] for index in FEATURES]
        if self.statistics:
            features = [(x - mean) / std for x, (mean, std) in zip(features, self.statistics, strict=True)]
        return pictures, features


@torch.no_grad()
def posteriors(vae, images):
    """(mean, std), (N, C, h, w) each, in the autoencoder's space, of uint8 images (N, H, W, 3)."""
    found = []
    for chunk in tqdm(np.array_split(images, max(1, len(images) // 64)), desc="encoding"):
        pictures = torch.from_numpy(chunk).permute(0, 3, 1, 2).float().div(127.5).sub(1)
        posterior = vae.encode(pictures).latent_dist
        found.append((posterior.mean, posterior.std))
    return tuple(torch.cat(parts) for parts in zip(*found, strict=True))


def draw_latents(mean, std, space, rng, args):
    """(B, C, h, w) latents in model space: random pictures, half of them with more noise."""
    rows = torch.from_numpy(rng.integers(len(mean), size=args.batch_size))
    noise = torch.from_numpy(rng.standard_normal((2, args.batch_size, *mean.shape[1:]), dtype=np.float32))
    level = torch.from_numpy(args.noise * rng.random(args.batch_size) * (rng.random(args.batch_size) < 0.5))
    return space.to_model(mean[rows] + std[rows] * noise[0]) + level.float().view(-1, 1, 1, 1) * noise[1]


def load_pictures(args):
    """(training pictures, held-out pictures), uint8 (N, SIZE, SIZE, 3)."""
    images, captions = load_emoji(args.work_dir, SIZE)
    hidden = held_out(captions)
    return images[~hidden], images[hidden]


class Progress:
    """Saved states, `progress.csv` and `pictures.png` in the output folder."""

    def __init__(self, output_dir, latents, pictures):
        """latents: of held-out pictures, in model space; pictures: what the full decoder makes of them."""
        self.output_dir, self.latents, self.pictures, self.started = output_dir, latents, pictures, time.time()

    @torch.no_grad()
    def save(self, step, student, optimizer, ema, numbers):
        """Save the state; then measure the averaged weights, and write a row."""
        save_state(self.output_dir / "state", step, student, optimizer, ema)
        ema.store(student.parameters())
        ema.copy_to(student.parameters())
        made = torch.cat([student(part)[0] for part in self.latents.split(32)]).clamp(-1, 1)
        ema.restore(student.parameters())
        save_reconstructions(self.pictures, made, self.output_dir / "pictures.png")
        row = [step, round(time.time() - self.started), *numbers, round(psnr(made, self.pictures), 2)]
        with open(self.output_dir / "progress.csv", "a", newline="") as file:
            csv.writer(file).writerow(row)
        tqdm.write(f"step {step}: {row[1]} s, held-out PSNR against the full decoder {row[-1]:.2f} dB")


def losses(student, teacher, latents):
    """(pixel loss, feature loss): scalars."""
    with autocast():
        pictures, wanted = teacher(latents)
        made, predicted = student(latents)
    error = made.float() - pictures.float()
    pixels = error.abs().mean() + 2 * error.square().mean()
    pairs = zip(predicted, wanted, strict=True)
    return pixels, sum(F.mse_loss(x.float(), y.float()) for x, y in pairs) / len(wanted)


def main(argv=None):
    """Train, and write the small decoder."""
    args = parse_args(argv)
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    vae = AutoencoderKL.from_pretrained(args.vae).requires_grad_(False).eval().to(memory_format=torch.channels_last)
    space = LatentSpace.of(vae)
    shown, hidden = load_pictures(args)
    mean, std = posteriors(vae, shown)
    teacher = Teacher(vae, space.to_model(mean[:: max(1, len(mean) // CALIBRATION)][:CALIBRATION]))
    tiny = build_tiny(vae, args.width, args.seed)
    student = Student(tiny, [x.shape[1] for x, _ in teacher.statistics]).to(memory_format=torch.channels_last)
    ema = EMAModel(student.parameters(), decay=0.995, use_ema_warmup=True, inv_gamma=1, power=0.75)
    optimizer = torch.optim.AdamW(student.parameters(), lr=args.learning_rate, betas=(0.9, 0.99), weight_decay=0)
    first_step = load_state(output_dir / "state", student, optimizer, ema)
    counts = [sum(p.numel() for p in decoder.parameters()) for decoder in (tiny.decoder, vae.decoder)]
    print(
        f"{counts[0]:,} parameters, the full decoder has {counts[1]:,}; {len(shown)} pictures, {len(hidden)} held out"
    )
    test = space.to_model(posteriors(vae, hidden)[0])
    progress = Progress(output_dir, test, torch.cat([teacher(part)[0] for part in test.split(32)]).clamp(-1, 1))
    started = time.time()
    for step in tqdm(range(first_step, args.steps), initial=first_step, total=args.steps, mininterval=5):
        optimizer.param_groups[0]["lr"] = learning_rate(args, step)
        rng = np.random.Generator(np.random.Philox(key=args.seed, counter=[0, 0, 0, step]))
        pixels, features = losses(student, teacher, draw_latents(mean, std, space, rng, args))
        (pixels + args.feature_weight * features).backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(student.parameters())
        late = args.minutes is not None and time.time() - started > 60 * args.minutes
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps or late:
            progress.save(step + 1, student, optimizer, ema, [round(pixels.item(), 4), round(features.item(), 4)])
        if late:
            break
    ema.copy_to(student.parameters())
    tiny.to(memory_format=torch.contiguous_format).save_pretrained(output_dir)
    print(f"saved {output_dir}")


def learning_rate(args, step):
    """The learning rate: warm-up and cosine."""
    return args.learning_rate * min(1.0, (step + 1) / 100) * max(0.5 * (1 + np.cos(np.pi * step / args.steps)), 0.01)


if __name__ == "__main__":
    main()
