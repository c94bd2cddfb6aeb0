"""Run a training script as an arm of the experiment: weights by noise level, and the gradient norm of each term.

    python benchmarks/effect_arm.py train_sdxl_lpl.py [--profile FILE] -- FLAGS OF THE SCRIPT

Two things are added to the script, which is otherwise as it is:

- Under --profile each gated sample's perceptual loss is multiplied by a number that depends on its noise level. The
  file comes from `measure_profile`: with it a loss of latents has, at every noise level, the mean that a loss of
  decoder features has. So the two spend their share alike.
- At five steps the gradient norms of the diffusion loss and of the weighted perceptual term are logged
  (gradient/diffusion, gradient/lpl).
"""

import argparse
import importlib
import json
import math
import operator
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.records import start_script

GATE, BINS = 3.0, 10  # largest noise / signal of a gated sample; bins of equal width in the timestep
PICTURES = 320  # of the profile


def bin_edges(alphas_cumprod=None):
    """(BINS + 1,) noise / signal at the edges of the bins. alphas_cumprod: of a discrete schedule; None: flow."""
    import numpy as np

    if alphas_cumprod is None:
        sigmas = np.linspace(0, GATE / (1 + GATE), BINS + 1)
        return sigmas / (1 - sigmas)
    ratios = ((1 - alphas_cumprod) / alphas_cumprod).sqrt().numpy()
    return np.interp(np.linspace(0, (ratios <= GATE).sum() - 1, BINS + 1), np.arange(len(ratios)), ratios)


def measure_profile(folder, pictures):
    """{"edges", "weights", "decoder", "latent"}: mean losses of a pipeline's estimates per bin, and their ratio.

    Args:
        folder: of the pipeline, the base of the arms.
        pictures: folder of captioned training pictures.
    """
    import numpy as np
    import torch
    from diffusers import DDPMScheduler, DiffusionPipeline

    from lpl_finetuning.data.scan import scan_folder
    from lpl_finetuning.data.tables import select
    from lpl_finetuning.evaluation.models import FLOW, prediction_kind
    from lpl_finetuning.evaluation.onestep import OneStepSettings, PipelineEstimate, held_out_of, levels_of, noisy
    from lpl_utils import DecoderStages, IdentityStages, LatentPerceptualLoss, LPLConfig

    pipeline = DiffusionPipeline.from_pretrained(folder)
    flow = prediction_kind(pipeline) == FLOW
    edges = bin_edges(None if flow else DDPMScheduler.from_config(pipeline.scheduler.config).alphas_cumprod)
    middles = (edges[1:] + edges[:-1]) / 2
    settings = OneStepSettings(levels=tuple((-2 * np.log(middles)).tolist()))
    images = scan_folder(pictures).images
    chosen = select(images, np.linspace(0, len(images) - 1, PICTURES).round().astype(int))
    held_out, levels = held_out_of(pipeline, chosen, 64, settings), levels_of(pipeline, settings.levels)
    estimate = PipelineEstimate(pipeline, held_out, levels)
    config = LPLConfig(outlier_reference_resolution=256)
    losses = {
        "decoder": LatentPerceptualLoss(DecoderStages(pipeline.vae), config),
        "latent": LatentPerceptualLoss(IdentityStages(8), config),
    }
    sums = {name: np.zeros(BINS) for name in losses}
    for first in range(0, PICTURES, 32):
        indices = list(range(first, first + 32))
        z0 = torch.stack([held_out.latents[index] for index in indices])
        for level in range(BINS):
            with torch.no_grad():
                z0_pred = estimate(noisy(z0, level, indices, levels, settings)[0], level, indices)
                for name, loss in losses.items():
                    sums[name][level] += loss(z0_pred, z0).per_sample.double().sum().item() / PICTURES
    means = {name: values.tolist() for name, values in sums.items()}
    return {"edges": edges.tolist(), "weights": (sums["decoder"] / sums["latent"]).tolist(), **means}


def level_weights(profile):
    """A function of alpha, sigma (B,) on the CPU that returns the weights (B,) of a profile."""
    import torch

    edges, weights = torch.tensor(profile["edges"][1:-1]), torch.tensor(profile["weights"])
    return lambda alpha, sigma: weights[torch.bucketize(sigma.double() / alpha.double(), edges.double())]


def gradient_norm(loss, parameters):
    """The norm of a scalar's gradient; 0 where it depends on no parameter."""
    import torch

    if not loss.requires_grad:
        return torch.zeros(())
    gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return torch.stack([gradient.square().sum() for gradient in gradients if gradient is not None]).sum().sqrt()


def log_gradients(script, steps):
    """Let the script's training step log the gradient norm of each term at these steps."""
    from lpl_finetuning.training import reporter
    from lpl_finetuning.training.objective import Objective

    reporter.METRICS = [*reporter.METRICS, "gradient/diffusion", "gradient/lpl"]
    training_step, total = script.training_step, Objective.total
    now = {}

    def step_with_parameters(batch, denoiser, objective, step, metrics):
        now["parameters"] = [parameter for parameter in denoiser.parameters() if parameter.requires_grad]
        return training_step(batch, denoiser, objective, step, metrics)

    def total_with_gradients(self, diffusion_loss, lpl_terms, step, metrics):
        loss = total(self, diffusion_loss, lpl_terms, step, metrics)
        if step in steps:
            metrics.add("gradient/diffusion", gradient_norm(diffusion_loss, now["parameters"]))
            if self.lpl_applies(step):
                term = sum(map(operator.mul, self.perceptual.weights(), lpl_terms))
                metrics.add("gradient/lpl", gradient_norm(term, now["parameters"]))
        return loss

    script.training_step, Objective.total = step_with_parameters, total_with_gradients


def main(argv=None):
    """Run the script with what the arm adds."""
    argv = sys.argv[1:] if argv is None else argv
    cut = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script", help="train_sdxl_lpl.py or train_sd3_lpl_flow.py")
    parser.add_argument("--profile", type=Path, help="JSON file of `measure_profile`")
    own, flags = parser.parse_args(argv[:cut]), argv[cut + 1 :]
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    script = importlib.import_module(Path(own.script).stem)
    from lpl_finetuning.training import perceptual

    if own.profile:  # --lpl_scale multiplies each sample by what this function returns
        perceptual.lpl_noise_scale = level_weights(json.loads(own.profile.read_text()))
        flags = [*flags, "--lpl_scale"]

    def prepare(args):
        last = args.max_train_steps - 1
        log_gradients(script, {math.floor(part * last) for part in (0.02, 0.25, 0.5, 0.75, 1)})

    start_script(script, flags, prepare)


if __name__ == "__main__":
    main()
