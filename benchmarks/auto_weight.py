"""Simulate the first steps of the automatic weight: how far above its later value does it go, and when is it right?

    python benchmarks/auto_weight.py                        # the tiny SDXL in examples/, 200 runs per batch size
    python benchmarks/auto_weight.py --runs 20 --batch_sizes 4 --ramps 16 64

LPL and the diffusion loss are measured at every gated timestep (t < 200) and at every eighth of the others. The runs
then draw timesteps and losses from what was measured, and `AutoWeight` takes them in; "ramp" is its option. "plain" is
the ratio of running means over about 100 optimizer steps, without a ramp: what the scripts did first.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from diffusers import StableDiffusionXLPipeline

from benchmarks.latent_structure import ROOT, encode, load_pictures
from lpl_utils import AutoWeight, LatentPerceptualLoss, estimate_z0

GATE, SHARE = 200, 0.2


@torch.no_grad()
def measure(model, pictures, captions, per_level):
    """(timesteps (L,), diffusion losses (L, N), LPL (L, N), 0 where it is not gated) of an SDXL pipeline."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(model)
    latents, lpl, size = encode(pipeline.vae, pictures), LatentPerceptualLoss(pipeline.vae), pictures.shape[-1]
    embeds, _, pooled, _ = pipeline.encode_prompt(captions, device="cpu", do_classifier_free_guidance=False)
    abar = pipeline.scheduler.alphas_cumprod
    timesteps = np.r_[0:GATE, GATE : len(abar) : 8]
    found = np.zeros((2, len(timesteps), per_level))
    torch.manual_seed(0)
    for row, t in enumerate(timesteps.tolist()):
        chosen, noise = torch.randint(len(latents), (per_level,)), torch.randn(per_level, *latents.shape[1:])
        alpha, sigma = abar[t].sqrt(), (1 - abar[t]).sqrt()
        noisy = alpha * latents[chosen] + sigma * noise
        added = {"text_embeds": pooled[chosen], "time_ids": torch.tensor([[size, size, 0, 0, size, size]] * per_level)}
        eps = pipeline.unet(noisy, t, embeds[chosen], added_cond_kwargs=added).sample
        found[0, row] = (eps - noise).square().mean(dim=(1, 2, 3))
        if t < GATE:
            levels = alpha.expand(per_level), sigma.expand(per_level)
            found[1, row] = lpl(estimate_z0(eps, noisy, *levels, "epsilon"), latents[chosen]).per_sample
    return timesteps, *found


def draw_runs(measured, batch_size, runs, steps, rng):
    """(runs, steps, 3): diffusion loss, LPL term and gated samples of simulated optimizer steps."""
    timesteps, diffusion, lpl = measured
    drawn = rng.integers(0, 1000, (runs, steps, batch_size))
    place = drawn, rng.integers(0, diffusion.shape[1], drawn.shape)
    row = np.abs(timesteps[None] - np.arange(1000)[:, None]).argmin(axis=1)[place[0]]
    values = diffusion[row, place[1]].mean(-1), lpl[row, place[1]].mean(-1), (drawn < GATE).sum(-1)
    return np.stack(values, axis=-1)


def right_weight(measured):
    """The weight of the true means."""
    timesteps, diffusion, lpl = measured
    row = np.abs(timesteps[None] - np.arange(1000)[:, None]).argmin(axis=1)
    return SHARE / (1 - SHARE) * diffusion[row].mean() / lpl[row].mean()


def plain_weights(values, decay=0.99):
    """(runs, steps) ratios of running means over optimizer steps."""
    means, weights = np.zeros((len(values), 2)), []
    for step in range(values.shape[1]):
        means = decay * means + (1 - decay) * values[:, step, :2]
        weights.append(np.divide(means[:, 0], means[:, 1], out=np.zeros(len(means)), where=means[:, 1] > 0))
    return SHARE / (1 - SHARE) * np.stack(weights, axis=1)


def automatic_weights(values, ramp):
    """(runs, steps) weights of `AutoWeight`; ramp: gated samples until the weight is whole."""
    weights = np.empty(values.shape[:2])
    for run, steps in enumerate(torch.from_numpy(values)):
        auto = AutoWeight(SHARE, ramp=ramp)
        for step, each in enumerate(steps):
            auto.update(*each)
            weights[run, step] = auto()
    return weights


def main(argv=None):
    """Measure, simulate, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200, help="per batch size (default: %(default)s)")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--ramps", type=int, nargs="+", default=[32], help="default: that of the scripts")
    parser.add_argument("--per_level", type=int, default=16, help="pictures per timestep (default: %(default)s)")
    args = parser.parse_args(argv)
    folder = ROOT / "examples" / "fluent-emoji"
    pictures = load_pictures(folder, 10**6, 64)
    captions = [path.stem.replace("-", " ") for path in sorted(folder.glob("*.webp"))]
    measured = measure(ROOT / "examples" / "tiny-sdxl", pictures, captions, args.per_level)
    rng, right = np.random.default_rng(0), right_weight(measured)
    print("| batch | weight | largest, median run | largest, run in ten | runs above 1.5 | mean after 200 gated "
          "| 90 % of runs are within | of their own later weight |")  # fmt: skip
    print("|---:|---|---:|---:|---:|---:|---:|---:|")
    for batch_size in args.batch_sizes:
        steps = round(400 / SHARE / batch_size)
        values = draw_runs(measured, batch_size, args.runs, steps, rng)
        after = int(200 / SHARE / batch_size)
        weights_of = {"plain": plain_weights(values)}
        weights_of |= {f"ramp {ramp}": automatic_weights(values, ramp) for ramp in args.ramps}
        for name, weights in weights_of.items():
            largest, then = (weights / right).max(axis=1), weights[:, after] / right
            own = np.quantile(abs(weights[:, after] / weights[:, -1] - 1), 0.9)
            print(f"| {batch_size} | {name} | {np.median(largest):.2f} | {np.quantile(largest, 0.9):.2f} "
                  f"| {100 * (largest > 1.5).mean():.0f} % | {then.mean():.2f} "
                  f"| {100 * np.quantile(abs(then - 1), 0.9):.0f} % | {100 * own:.0f} % |")  # fmt: skip
    print(f"\n{args.runs} runs each, over the first 400 gated samples; relative to the weight of the true means")


if __name__ == "__main__":
    main()
