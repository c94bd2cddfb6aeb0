"""The control that costs nothing: a model's estimates of the clean latents are scaled while sampling.

A denoiser shrinks its estimates. If LPL only undid that, a number per noise level would do as well. `fit_gains` finds
these numbers on training pictures, and `sample_with_gains` samples with them: each estimate is scaled around the means
of its channels. Above the gate of the other arms nothing is scaled, since there LPL does not act either.
"""

import contextlib

import numpy as np
import torch

from benchmarks.effect_arm import GATE
from lpl_finetuning.evaluation import generation
from lpl_finetuning.evaluation.models import FLOW, prediction_kind, sampling_scheduler
from lpl_finetuning.evaluation.onestep import (
    OneStepSettings,
    PipelineEstimate,
    held_out_of,
    levels_of,
    noisy,
    within_channels,
)
from lpl_utils import estimate_z0


def levels_of_steps(scheduler, flow):
    """(alphas, sigmas) of a sampler's steps, float64 (S,) each, without the final clean one."""
    if flow:
        sigmas = scheduler.sigmas[:-1].double()
        return 1 - sigmas, sigmas
    abar = scheduler.alphas_cumprod[scheduler.timesteps].double()
    return abar.sqrt(), (1 - abar).sqrt()


def fit_gains(pipeline, images, steps, batch_size=32):
    """The gain of each of the sampler's steps, a list of S numbers; 1 where noise / signal is above the gate.

    A gain is sqrt(V / v): V and v are the variances of the clean latents and of their estimates around the means of
    their channels, means over the images.

    Args:
        pipeline: from `load_pipeline`.
        images: training pictures (`CaptionedImage`).
        steps: of the sampler.
    """
    flow = prediction_kind(pipeline) == FLOW
    scheduler = sampling_scheduler(pipeline, "auto", steps)
    scheduler.set_timesteps(steps)
    alphas, sigmas = levels_of_steps(scheduler, flow)
    gated = (sigmas / alphas <= GATE).nonzero().flatten().tolist()
    settings = OneStepSettings(levels=tuple((2 * (alphas / sigmas).log())[gated].tolist()))
    held_out, levels = held_out_of(pipeline, images, 64, settings), levels_of(pipeline, settings.levels)
    estimate = PipelineEstimate(pipeline, held_out, levels)
    sums = np.zeros((len(gated), 2))
    for first in range(0, len(images), batch_size):
        indices = list(range(first, min(first + batch_size, len(images))))
        z0 = torch.stack([held_out.latents[index] for index in indices])
        for level in range(len(gated)):
            z0_pred = estimate(noisy(z0, level, indices, levels, settings)[0], level, indices)
            sums[level] += [within_channels(each).double().sum().item() for each in (z0, z0_pred)]
    gains = np.ones(steps)
    gains[gated] = np.sqrt(sums[:, 0] / sums[:, 1])
    return gains.tolist()


def scaled(output, sample, alpha, sigma, kind, gain):
    """The denoiser's output (B, C, h, w) whose estimate of z_0 is that of `output`, scaled by a gain.

    The estimate is z_0 = (z_t - sigma eps) / alpha for epsilon, alpha z_t - sigma v for v, z_t - sigma v for flow: in
    each case a change of it changes the output in proportion.
    """
    count = torch.ones(len(sample), dtype=torch.float64)
    z0 = estimate_z0(output, sample, alpha * count, sigma * count, kind)
    change = (gain - 1) * (z0 - z0.mean(dim=(2, 3), keepdim=True))
    return output - (alpha / sigma if kind == "epsilon" else 1 / sigma) * change.to(output.dtype)


@contextlib.contextmanager
def sampling_with(gains):
    """Context manager: `generate` samples with these gains, one for each step."""
    plain = generation.sampling_scheduler

    def with_gains(pipeline, sampler, steps):
        scheduler, kind = plain(pipeline, sampler, steps), prediction_kind(pipeline)
        step = scheduler.step

        def scaled_step(output, timestep, sample, *args, **more):
            place = int((scheduler.timesteps - timestep).abs().argmin())
            alphas, sigmas = levels_of_steps(scheduler, kind == FLOW)
            output = scaled(output, sample, alphas[place], sigmas[place], kind, gains[place])
            return step(output, timestep, sample, *args, **more)

        scheduler.step = scaled_step
        return scheduler

    generation.sampling_scheduler = with_gains
    try:
        yield
    finally:
        generation.sampling_scheduler = plain


def sample_with_gains(pipeline, captions, settings, folder, model, gains):
    """Pictures of a pipeline for {stem: caption}, estimates scaled; returns {guidance: folder}, as `generate` does."""
    with sampling_with(gains):
        return generation.generate(pipeline, captions, settings, folder, f"{model} with gains")
