"""Draw docs/images/how-lpl-works.png from real data: the tiny SDXL of examples/ and its pictures.

    python docs/figures.py                                  # about a minute on one CPU core
    python docs/figures.py --pictures 4 --output /tmp/f.png

The upper part follows one picture through the loss. The lower part shows the loss at every noise level. Estimates are
single predictions of the UNet; feature maps and differences are those that `lpl_utils` compares. The values are stored
in the PNG's text chunk "figures" (JSON), so that a test can tell when the picture is out of date.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from diffusers import DDPMScheduler, StableDiffusionXLPipeline
from diffusers.utils import logging as diffusers_logging
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch
from PIL import Image
from transformers.utils import logging as transformers_logging

from lpl_utils import (
    DecoderStages,
    LatentPerceptualLoss,
    LPLGate,
    estimate_z0,
    inlier_mask,
    morphology_kernels,
    noise_to_signal,
    normalized_difference,
    stage_features,
)

ROOT = Path(__file__).resolve().parent.parent
SIZE = 64  # px of the tiny model's pictures
SHOWN = "tiger-face"  # the picture of the upper part
SHOWN_T = 199  # its timestep, the noisiest that passes the default gate
CURVE_T = (0, 50, 100, 150, 199, 250, 300, 350, 400, 450, 500, 550, 600, 650, 700, 750, 800, 850, 900, 950, 999)
THUMBNAIL_T = (0, 199, 400, 600, 800, 950)
STAGES = ("middle block", "up block 1", "up block 2", "up block 3", "up block 4")
TITLES = (
    "The loss: does the decoder make the same of the estimate as of the truth?",
    "The gate: the more noise, the less a single prediction can know",
)
GATE = LPLGate(t_threshold=200)

INK, GREY, RED, GREEN = "#1f2430", "#6b7280", "#c2410c", "#15803d"
WIDTH, HEIGHT = 12.0, 10.6  # inches
CELL = 1.3  # inches; a picture or feature map
COLUMNS = (0.2, 2.25, *(4.3 + 1.54 * index for index in range(5)))  # left edges, inches
ROWS = (1.1, 2.98, 4.78)  # top edges, inches


# ---------------------------------------------------------------------------------------------------------------------
# Values


class Tiny:
    """The tiny pipeline, its noise schedule and the example pictures with their captions and latents."""

    def __init__(self):
        folder = ROOT / "examples" / "tiny-sdxl"
        self.pipe = StableDiffusionXLPipeline.from_pretrained(folder)
        self.pipe.vae.requires_grad_(False)
        self.abar = DDPMScheduler.from_pretrained(folder, subfolder="scheduler").alphas_cumprod
        lines = (ROOT / "examples" / "fluent-emoji" / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
        captions = {Path(line["file_name"]).stem: line["text"] for line in map(json.loads, lines)}
        self.names = [SHOWN, *sorted(captions.keys() - {SHOWN})]
        self.captions = [captions[name] for name in self.names]

    def picture(self, name):
        """(3, SIZE, SIZE) in -1..1."""
        picture = Image.open(ROOT / "examples" / "fluent-emoji" / f"{name}.webp").convert("RGB")
        pixels = np.asarray(picture.resize((SIZE, SIZE), Image.Resampling.LANCZOS), dtype=np.float32)
        return torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1

    def latents(self, names):
        """z_0 (B, 4, 8, 8) in model space: posterior means."""
        posterior = self.pipe.vae.encode(torch.stack([self.picture(name) for name in names])).latent_dist
        return DecoderStages(self.pipe.vae).to_model_space(posterior.mean)

    def predict(self, latents, captions, t, seed=0):
        """(noisy latents, estimate of z_0) (B, 4, 8, 8): one prediction of the UNet at timestep t."""
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed))
        alpha, sigma = self.abar[t].sqrt().expand(len(latents)), (1 - self.abar[t]).sqrt().expand(len(latents))
        noisy = alpha[0] * latents + sigma[0] * noise
        prompt_embeds, _, pooled, _ = self.pipe.encode_prompt(captions, do_classifier_free_guidance=False)
        time_ids = torch.tensor([[SIZE, SIZE, 0, 0, SIZE, SIZE]], dtype=torch.float32).repeat(len(latents), 1)
        added = {"text_embeds": pooled, "time_ids": time_ids}
        output = self.pipe.unet(noisy, t, prompt_embeds, added_cond_kwargs=added).sample
        return noisy, estimate_z0(output, noisy, alpha, sigma, "epsilon")

    def decode(self, latents):
        """(B, H, W, 3) pictures in 0..1."""
        pictures = self.pipe.vae.decode(DecoderStages(self.pipe.vae).to_vae_space(latents)).sample
        return (pictures / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()


def as_rgb(target, *others):
    """Feature maps (C, H, W) as RGB (H, W, 3): the target's three principal components, one scale for all."""
    rows = target.flatten(1).T.double()
    mean = rows.mean(dim=0)
    axes = torch.linalg.svd(rows - mean, full_matrices=False).Vh[:3]
    axes *= torch.sign((axes * axes.abs()).sum(dim=1, keepdim=True))  # a sign that does not depend on the library
    projected = [((x.flatten(1).T.double() - mean) @ axes.T).reshape(*x.shape[1:], 3) for x in (target, *others)]
    low, high = (torch.quantile(projected[0].flatten(0, 1), q, dim=0) for q in (0.02, 0.98))
    low, high = low - 0.15 * (high - low), high + 0.15 * (high - low)
    return [((x - low) / (high - low)).clamp(0, 1).numpy() for x in projected]


def difference_maps(stages, target, estimate):
    """Per stage: (features of the target, of the estimate (C, H, W), squared normalised difference (H, W))."""
    shown = []
    for x, xh in zip(stage_features(stages, target), stage_features(stages, estimate), strict=True):
        kernels = morphology_kernels(x.shape[2] / SIZE, (SIZE, SIZE))
        mask = torch.ones_like(x, dtype=torch.bool) if kernels is None else inlier_mask(x, kernels)
        difference = normalized_difference(x, xh, mask, "standard", "none") * mask
        shown.append((x[0], xh[0], difference[0].square().mean(dim=0).numpy()))
    return shown


def curve(tiny, count):
    """LPL of the first `count` pictures at each of CURVE_T, (T, count)."""
    lpl = LatentPerceptualLoss(tiny.pipe.vae)
    latents, captions = tiny.latents(tiny.names[:count]), tiny.captions[:count]
    return torch.stack([lpl(tiny.predict(latents, captions, t, seed=t)[1], latents).per_sample for t in CURVE_T])


# ---------------------------------------------------------------------------------------------------------------------
# Drawing; positions are inches from the left and the top


class Sheet:
    """A white page in inches from its top left corner."""

    def __init__(self):
        self.figure = Figure(figsize=(WIDTH, HEIGHT), facecolor="white")

    def axes(self, left, top, width, height):
        return self.figure.add_axes((left / WIDTH, 1 - (top + height) / HEIGHT, width / WIDTH, height / HEIGHT))

    def picture(self, pixels, left, top, size=CELL, **options):
        axes = self.axes(left, top, size, size)
        axes.imshow(pixels, interpolation="nearest", **options)
        axes.set(xticks=[], yticks=[])
        for spine in axes.spines.values():
            spine.set(color=GREY, linewidth=0.8)

    def text(self, left, top, words, size=12, color=INK, **options):
        options = {"ha": "left", "va": "center", "linespacing": 1.35} | options
        self.figure.text(left / WIDTH, 1 - top / HEIGHT, words, fontsize=size, color=color, **options)

    def arrow(self, start, end, color=GREY, **options):
        (x0, y0), (x1, y1) = start, end
        self.figure.add_artist(
            FancyArrowPatch(
                (x0 / WIDTH, 1 - y0 / HEIGHT), (x1 / WIDTH, 1 - y1 / HEIGHT), arrowstyle="-|>", mutation_scale=15,
                linewidth=1.6, color=color, shrinkA=0, shrinkB=0, **options)
        )  # fmt: skip


def draw_walk(sheet, tiny, latents):
    """Draw the upper part: picture, latents, estimate, features, differences. Returns the `LPLOutput`."""
    noisy, estimate = tiny.predict(latents, tiny.captions[:1], SHOWN_T, seed=SHOWN_T)
    output = LatentPerceptualLoss(tiny.pipe.vae)(estimate, latents)
    maps = difference_maps(DecoderStages(tiny.pipe.vae), latents, estimate)
    z0_rgb, noisy_rgb, estimate_rgb = as_rgb(latents[0], noisy[0], estimate[0])
    picture = (tiny.picture(SHOWN).permute(1, 2, 0).numpy() + 1) / 2
    shown = {
        (0, 0): (picture, "picture"),
        (1, 0): (z0_rgb, "clean latents $z_0$"),
        (0, 1): (noisy_rgb, f"noisy $z_t$, t = {SHOWN_T}"),
        (1, 1): (estimate_rgb, r"estimate $\hat{z}_0$"),
    }
    for (column, row), (pixels, words) in shown.items():
        sheet.picture(pixels, COLUMNS[column], ROWS[row])
        sheet.text(COLUMNS[column] + CELL / 2, ROWS[row] - 0.16, words, ha="center")
    limit = max(np.quantile(difference, 0.98) for _, _, difference in maps)
    for index, (x, xh, difference) in enumerate(maps):
        left, centre = COLUMNS[2 + index], COLUMNS[2 + index] + CELL / 2
        for row, pixels in enumerate(as_rgb(x, xh)):
            sheet.picture(pixels, left, ROWS[row])
        sheet.picture(difference, left, ROWS[2], cmap="OrRd", vmin=0, vmax=limit)
        sheet.text(centre, ROWS[0] - 0.3, f"{STAGES[index]}\n{' × '.join(map(str, x.shape))}", 11.5, ha="center")
        shrunk = x.shape[1] // maps[0][0].shape[1]
        weight = f"× 1/{shrunk}" if shrunk > 1 else "× 1"
        sheet.text(centre, ROWS[2] + CELL + 0.2, f"{output.per_layer[index, 0]:.3f} {weight}", 13, RED, ha="center")
    draw_arrows(sheet)
    sheet.text(0.2, 0.25, TITLES[0], 14.5, weight="bold")
    sheet.text(
        COLUMNS[2],
        ROWS[2] + CELL + 0.58,
        f"LPL of this sample: the mean of the five = {output.per_sample[0]:.3f}",
        14,
        RED,
        weight="bold",
    )
    return output


def draw_arrows(sheet):
    """Draw the arrows of the upper part with their labels."""
    middle = [row + CELL / 2 for row in ROWS]
    for row, words, color in ((0, "encoder", INK), (1, "UNet", RED)):
        for column, label, paint in ((0, words, color), (1, "decoder", INK)):
            right, next_left = COLUMNS[column] + CELL, COLUMNS[column + 1]
            sheet.arrow((right + 0.08, middle[row]), (next_left - 0.08, middle[row]), paint)
            sheet.text((right + next_left) / 2, middle[row] - 0.17, label, 11.5, paint, ha="center")
        sheet.text((COLUMNS[1] + CELL + COLUMNS[2]) / 2, middle[row] + 0.17, "(frozen)", 11.5, GREY, ha="center")
    sheet.arrow((COLUMNS[1] - 0.06, ROWS[0] + CELL + 0.02), (COLUMNS[0] + CELL + 0.06, ROWS[1] - 0.02))
    sheet.text(COLUMNS[1] - 0.38, ROWS[0] + CELL + 0.16, "+ noise", 11.5, GREY, ha="right")
    gradient = (COLUMNS[0] + CELL + COLUMNS[1]) / 2, middle[1] + 0.1
    sheet.arrow((COLUMNS[2] - 0.1, ROWS[2] + 0.2), gradient, RED, connectionstyle="angle,angleA=180,angleB=90,rad=8")
    sheet.text(COLUMNS[2] - 0.15, ROWS[2] + 0.03, "gradient to the UNet", 11.5, RED, ha="right")
    sheet.text(
        COLUMNS[2] - 0.15,
        middle[2] + 0.12,
        "squared difference of the features,\nin units of the estimate's standard\n"
        "deviation in each channel;\nextreme activations left out",
        11.5,
        ha="right",
    )


def draw_gate(sheet, tiny, latents, losses):
    """Draw the lower part: the losses (T, count) at every noise level, and decoded estimates."""
    left, width, top, height = 0.95, 10.75, 8.65, 1.35
    axes = sheet.axes(left, top, width, height)
    axes.axvspan(0, GATE.limit, color=GREEN, alpha=0.13, linewidth=0)
    axes.fill_between(CURVE_T, *torch.quantile(losses, torch.tensor([0.1, 0.9]), dim=1), color=RED, alpha=0.15, lw=0)
    axes.plot(CURVE_T, losses.mean(dim=1), color=RED, linewidth=2.2)
    axes.set(xlim=(0, 1000), ylim=(0, None), xticks=range(0, 1001, 100))
    axes.tick_params(labelsize=11.5, colors=INK)
    axes.set_xlabel("timestep t: noise grows to the right", fontsize=12, color=INK)
    axes.set_ylabel("LPL", fontsize=12, color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    y = axes.get_ylim()[1]
    axes.text(GATE.limit / 2, 0.9 * y, f"gate: t < {GATE.limit:g}", color=GREEN, fontsize=12, ha="center", va="top")
    words = f"mean of {losses.shape[1]} pictures, and where 80 % of them lie"
    axes.text(GATE.limit + 15, 0.7 * y, words, color=RED, fontsize=12, va="center")
    axes.text(754, 0.2 * y, "paper's best limits", color=GREY, fontsize=11.5, ha="center", va="bottom")
    ratios = noise_to_signal(tiny.abar.sqrt(), (1 - tiny.abar).sqrt())
    for limit in (3, 6):
        t = int((ratios <= limit).sum())
        axes.axvline(t, color=GREY, linewidth=1.2, linestyle="--")
        axes.text(t + 6, 0.06 * y, f"σ/α = {limit}", color=GREY, fontsize=11.5, va="bottom")
    sheet.text(0.2, top - 1.55, TITLES[1], 14.5, weight="bold")
    size = 0.95
    for t in THUMBNAIL_T:
        x = left + width * t / 1000
        _, estimate = tiny.predict(latents, tiny.captions[:1], t, seed=t)
        sheet.picture(tiny.decode(estimate)[0], x - size / 2, top - size - 0.3, size)
        sheet.text(x, top - 0.15, f"t = {t}", 11.5, ha="center")


def main(argv=None):
    """Compute the values, draw the figure and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default=str(ROOT / "docs" / "images" / "how-lpl-works.png"))
    parser.add_argument("--pictures", type=int, default=96, help="how many the curve of the lower part is a mean of")
    args = parser.parse_args(argv)
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    sheet = Sheet()
    with torch.no_grad():
        tiny = Tiny()
        latents = tiny.latents([SHOWN])
        output = draw_walk(sheet, tiny, latents)
        losses = curve(tiny, args.pictures)
        draw_gate(sheet, tiny, latents, losses)
    figures = {
        "per_layer": output.per_layer[:, 0].tolist(),
        "per_sample": output.per_sample.item(),
        "shown_curve": losses[:, 0].tolist(),
        "mean_curve": losses.mean(dim=1).tolist(),
        "pictures": args.pictures,
    }
    sheet.figure.savefig(args.output, dpi=150, metadata={"figures": json.dumps(figures)})
    print(args.output)


if __name__ == "__main__":
    main()
