"""The one-step test: how well a denoiser estimates held-out pictures from one noisy version of each.

Target is the mean of the autoencoder's posterior. Each picture gets fixed noise at ten fixed log-SNR levels, the same
for every model. The estimate of z_0 is decoded and compared with the decoded target, so that the autoencoder's own
error does not count. The numbers are paired over pictures and nearly free of noise.

Shapes: N pictures, B of a batch, L levels, C channels, h w of a latent, H W of a feature map or picture.
Names: z0 target, z0_pred estimate; x features of the target, xh features of the estimate.
"""

import contextlib
import math
from dataclasses import dataclass, field

import numpy as np
import torch
from tqdm.auto import tqdm

from lpl_finetuning.data.encoding import encode_images
from lpl_finetuning.data.samples import FramingRules, addressed_normal
from lpl_finetuning.evaluation.models import FLOW, denoiser_of, prediction_kind
from lpl_utils import (
    DecoderStages,
    LatentSpace,
    estimate_z0,
    first_input,
    inlier_mask,
    layer_loss,
    morphology_kernels,
)

LEVELS = (4.5, 3.5, 2.5, 1.5, 0.5, -0.5, -1.5, -2.5, -3.5, -4.5)  # log(alpha^2 / sigma^2): sigma / alpha 0.11 to 9.5
PIXELS_AT_ONCE = 1024**2  # of a batch of which no size is given
HIGH_FREQUENCY = 0.375  # of the Nyquist frequency, and above
OUTLIER_RESOLUTION = 256  # px, at which the outlier mask has its original margin, as the training scripts have it


@dataclass(frozen=True)
class OneStepSettings:
    """How the one-step test is made.

    Attributes:
        seed: of the noise.
        levels: log-SNR values.
        batch_size: pictures at a time; None for as many as make one megapixel, 32 at most.
    """

    seed: int = 0
    levels: tuple[float, ...] = LEVELS
    batch_size: int | None = None

    def at_once(self, pixels):
        """Pictures of so many pixels that are measured at a time."""
        return self.batch_size or max(1, min(32, PIXELS_AT_ONCE // pixels))


@dataclass(frozen=True)
class OneStepResult:
    """Numbers of the one-step test.

    Attributes:
        levels: log-SNR of each level.
        timesteps: of the model at each level.
        metrics: {name: float32 (L, N)}; see `OneStepMeter`.
    """

    levels: tuple[float, ...]
    timesteps: tuple[float, ...]
    metrics: dict[str, np.ndarray] = field(repr=False)


# ---------------------------------------------------------------------------------------------------------------------
# Noise levels


@dataclass(frozen=True)
class NoiseLevels:
    """The levels of the test as a model has them, (L,) each, on the CPU.

    Attributes:
        log_snr: the wanted values.
        timesteps: what the denoiser is given.
        alphas, sigmas: float32, of exactly these timesteps: z_t = alpha * z_0 + sigma * eps.
    """

    log_snr: tuple[float, ...]
    timesteps: torch.Tensor
    alphas: torch.Tensor
    sigmas: torch.Tensor


def flow_levels(log_snr=LEVELS):
    """The `NoiseLevels` of rectified flow, exact: sigma = 1 / (1 + exp(log_snr / 2)), alpha = 1 - sigma."""
    sigmas = torch.sigmoid(-torch.tensor(log_snr, dtype=torch.float64) / 2)
    return NoiseLevels(log_snr, (1000 * sigmas).float(), (1 - sigmas).float(), sigmas.float())


def discrete_levels(alphas, sigmas, log_snr=LEVELS):
    """The `NoiseLevels` of a discrete schedule: the timesteps whose log-SNR is nearest to the wanted values.

    The noise has exactly the level of the timestep, so model and noise agree. The wanted level is missed by at most
    half the distance of two timesteps: on SDXL's schedule by at most 0.035 in log-SNR at 4.5, by less than 0.01 below.

    Args:
        alphas, sigmas: (T,) of all timesteps.
    """
    own = 2 * (alphas.double().log() - sigmas.double().log())
    wanted = torch.tensor(log_snr, dtype=torch.float64)
    timesteps = (own[None, :] - wanted[:, None]).abs().argmin(dim=1)
    return NoiseLevels(log_snr, timesteps, alphas[timesteps].float(), sigmas[timesteps].float())


def levels_of(pipeline, log_snr=LEVELS):
    """The `NoiseLevels` of a loaded pipeline, from the schedule that it was trained with."""
    if prediction_kind(pipeline) == FLOW:
        return flow_levels(log_snr)
    from diffusers import DDPMScheduler

    abar = DDPMScheduler.from_config(pipeline.scheduler.config).alphas_cumprod.double()
    return discrete_levels(abar.sqrt(), (1 - abar).clamp_min(0).sqrt(), log_snr)


def levels_of_schedule(schedule, log_snr=LEVELS):
    """The `NoiseLevels` of a training script's `Schedule`."""
    if schedule.prediction_type == FLOW:
        return flow_levels(log_snr)
    return discrete_levels(*schedule.levels(torch.arange(len(schedule))), log_snr)


def noisy(latents, level, indices, levels, settings):
    """(z_t (B, C, h, w), eps) of pictures with these indices, by fixed noise.

    The noise follows from seed, picture and level, whatever the batch or the model.

    Args:
        latents: z0, (B, C, h, w), float32.
    """
    addresses = [int(index) * len(levels.log_snr) + level for index in indices]
    eps = addressed_normal(settings.seed, addresses, latents.shape[1:], "one_step").to(latents.device)
    return float(levels.alphas[level]) * latents + float(levels.sigmas[level]) * eps, eps


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


class OneStepMeter:
    """Compares estimates of latents with their targets, by latents, decoder features and decoded pictures.

    The numbers, one for each picture:

    - latent_mse: mean squared error of z_0 in model space.
    - gain: the factor on the estimate that would give its latents the target's spread, sqrt(V / v), with V and v the
      variances of target and estimate around the means of their channels. 1 is right, above 1 the estimate shrinks.
    - lpl/STAGE: the latent perceptual loss of a decoder stage, unweighted, as in the paper ("standard", outliers left
      out).
    - spread/STAGE: the median over channels of var(xh) / var(x), variances over positions. 1 is right.
    - psnr: of the decoded pictures, in dB.
    - high_frequency: log of the power from 0.375 of the Nyquist frequency up, estimate against target. 0 is right.
    - perceptual/NETWORK: mean over the network's stages of the squared distance of features normalised to unit
      length at each position, 0 to 4.
    """

    def __init__(self, vae, networks=()):
        """
        Args:
            vae: the autoencoder; it computes in its own dtype.
            networks: each has `.name` and `.stages(images uint8 (B, H, W, 3)) -> list of (B, C, h, w)`.
        """
        self.stages, self.networks = DecoderStages(vae, rgb=True), networks

    @property
    def names(self):
        """Names of all numbers."""
        stages = self.stages.names[:-1]
        return ("latent_mse", "gain", *(f"lpl/{name}" for name in stages), *(f"spread/{name}" for name in stages),
                "psnr", "high_frequency", *(f"perceptual/{network.name}" for network in self.networks))  # fmt: skip

    @torch.no_grad()
    def target(self, z0):
        """What `compare` needs of the targets z0, (B, C, h, w): computed once for all levels."""
        features = list(self._stages_of(z0))
        return z0, features, [list(map(unit_length, net.stages(to_bytes(features[-1])))) for net in self.networks]

    @torch.no_grad()
    def compare(self, z0_pred, target):
        """{name: (B,) float32} of the estimates, (B, C, h, w). target: from `target`."""
        z0, features, seen = target
        z0_pred = z0_pred.to(z0.dtype)
        found = {
            "latent_mse": (z0_pred - z0).square().mean(dim=(1, 2, 3)),
            "gain": (within_channels(z0) / within_channels(z0_pred).clamp_min(1e-12)).sqrt(),
        }
        image_size = features[-1].shape[2:]
        for name, x, estimate in zip(self.stages.names, features, self._stages_of(z0_pred), strict=True):
            if x is features[-1]:
                continue  # the decoded picture
            found[f"lpl/{name}"] = stage_loss(x, estimate, image_size)
            ratio = variance(estimate) / variance(x).clamp_min(1e-12)
            found[f"spread/{name}"] = ratio.median(dim=1).values
        picture, other = (pixels.float().clamp(-1, 1) for pixels in (features[-1], estimate))
        error = (picture - other).square().mean(dim=(1, 2, 3))
        found["psnr"] = 10 * torch.log10(4 / error.clamp_min(1e-10))
        found["high_frequency"] = (high_power(other) / high_power(picture)).log()
        for network, theirs in zip(self.networks, seen, strict=True):
            ours = map(unit_length, network.stages(to_bytes(estimate)))
            distances = [(x - xh).square().sum(dim=1).mean(dim=(1, 2)) for x, xh in zip(theirs, ours, strict=True)]
            found[f"perceptual/{network.name}"] = torch.stack(distances).mean(dim=0)
        return {name: found[name].float() for name in self.names}

    def _stages_of(self, z0):
        """Generator of the features of every stage, the decoded picture last; without autocast, in the autoencoder's
        dtype."""
        x, device = first_input(self.stages, z0), z0.device.type
        has_autocast = torch.amp.is_autocast_available(device)  # the meta device, where memory is counted, has not
        for index in range(len(self.stages)):
            with torch.autocast(device, enabled=False) if has_autocast else contextlib.nullcontext():
                x = self.stages.run(index, x)
            yield x


def stage_loss(x, xh, image_size):
    """The latent perceptual loss of one stage, (B,), with the options of the paper."""
    x, xh = x.float(), xh.float()
    kernels = morphology_kernels(x.shape[2] / image_size[0], image_size, OUTLIER_RESOLUTION)
    mask = None if kernels is None else inlier_mask(x, kernels)
    return layer_loss(x, xh, mask, "standard", "mse", "none")


def variance(features):
    """(B, C) variance over positions."""
    return features.float().var(dim=(2, 3), correction=0)


def within_channels(latents):
    """(B,) variance of latents around the means of their channels."""
    return variance(latents).mean(dim=1)


def high_power(pictures):
    """(B,) power of pictures (B, 3, H, W) from 0.375 of the Nyquist frequency up, in any direction."""
    height, width = pictures.shape[2:]
    spectrum = torch.fft.rfft2(pictures, norm="ortho").abs().square().sum(dim=1)
    vertical = torch.fft.fftfreq(height, device=pictures.device)
    horizontal = torch.fft.rfftfreq(width, device=pictures.device)
    radius = (vertical[:, None].square() + horizontal[None, :].square()).sqrt() * 2  # 1 is the Nyquist frequency
    return (spectrum * (radius >= HIGH_FREQUENCY)).sum(dim=(1, 2)).clamp_min(1e-12)


def to_bytes(pixels):
    """Pictures uint8 (B, H, W, 3) of decoded ones (B, 3, H, W) in [-1, 1]."""
    return ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def unit_length(features):
    """Features (B, C, H, W), divided by their norm over channels at each position."""
    return torch.nn.functional.normalize(features.float(), dim=1, eps=1e-10)


def one_step(estimate, levels, vae, latents, settings, networks=(), bar=True):
    """The `OneStepResult` of a model.

    Args:
        estimate: function (z_t (B, C, h, w), level, indices of the pictures) -> z0_pred (B, C, h, w).
        levels: the `NoiseLevels` of the model.
        vae: the autoencoder of the model.
        latents: targets z0 in model space, (C, h, w) float32 of each picture.
        networks: for perceptual distances; see `OneStepMeter`.
        bar: whether a progress bar is shown.
    """
    meter, count = OneStepMeter(vae, networks), len(latents)
    metrics = {name: np.full((len(levels.log_snr), count), np.nan, np.float32) for name in meter.names}
    work = batches_of(latents, settings, meter.stages.upscaling)
    with tqdm(total=count * len(levels.log_snr), desc="one-step test", disable=not bar) as progress:
        for indices in work:
            z0 = torch.stack([latents[index] for index in indices]).float().to(vae.device)
            target = meter.target(z0)
            for level in range(len(levels.log_snr)):
                z_t, _ = noisy(z0, level, indices, levels, settings)
                for name, values in meter.compare(estimate(z_t, level, indices), target).items():
                    metrics[name][level, indices] = values.cpu().numpy()
                progress.update(len(indices))
    return OneStepResult(tuple(levels.log_snr), tuple(levels.timesteps.tolist()), metrics)


def batches_of(latents, settings, upscaling):
    """Lists of indices of latents of one shape, as many as are measured at a time."""
    groups = {}
    for index, z0 in enumerate(latents):
        groups.setdefault(tuple(z0.shape), []).append(index)
    for shape, indices in groups.items():
        size = settings.at_once(math.prod(shape[1:]) * upscaling**2)
        yield from (indices[first : first + size] for first in range(0, len(indices), size))


# ---------------------------------------------------------------------------------------------------------------------
# A loaded pipeline


@dataclass(frozen=True)
class HeldOut:
    """Held-out pictures as a pipeline sees them.

    Attributes:
        latents: targets z0 in model space, (C, h, w) float32 of each picture, on the CPU.
        time_ids: (N, 6) float32: height and width of the picture's file, top and left of the crop, height and width
            of the crop.
        captions: of each picture.
    """

    latents: list[torch.Tensor]
    time_ids: torch.Tensor
    captions: list[str]


def held_out_of(pipeline, images, resolution, settings=OneStepSettings()):
    """The `HeldOut` of images (`CaptionedImage`): cut to the centre square as in validation, then encoded."""
    framing = FramingRules(resolution).framing(images, held_out=True)
    space, rows = LatentSpace.of(pipeline.vae), []
    at_once = settings.at_once(resolution**2)
    for first in range(0, len(images), at_once):
        numbers = range(first, min(first + at_once, len(images)))
        cuts = [framing.cut(images[number], framing.views(number, images[number])[0]) for number in numbers]
        rows += encode_images(cuts, pipeline.vae)
    latents = [space.to_model(row["mean"]) for row in rows]
    return HeldOut(latents, torch.stack([row["time_ids"] for row in rows]), [image.caption for image in images])


class PipelineEstimate:
    """The estimate of z_0 by a loaded SDXL or SD3 pipeline, with the captions of the pictures as its prompts.

    SDXL's micro-conditioning is that of each picture: its own size and its crop. There is no guidance.
    """

    def __init__(self, pipeline, held_out, levels, max_sequence_length=256):
        """max_sequence_length: tokens of SD3's third text encoder."""
        self.pipeline, self.held_out, self.levels, self.length = pipeline, held_out, levels, max_sequence_length
        self.denoiser, self.kind = denoiser_of(pipeline), prediction_kind(pipeline)
        self.last = None, None  # (indices, conditions) of the last batch: all levels of a batch follow each other

    @torch.no_grad()
    def __call__(self, noisy_latents, level, indices):
        """z0_pred (B, C, h, w), float32, from z_t at a level; `indices`: of the pictures."""
        if self.last[0] != tuple(indices):
            self.last = tuple(indices), self.conditions(indices)
        timesteps = self.levels.timesteps[level].repeat(len(indices)).to(noisy_latents.device)
        out = self.denoise(noisy_latents.to(self.denoiser.dtype), timesteps, self.last[1])
        alpha, sigma = (values[level].repeat(len(indices)) for values in (self.levels.alphas, self.levels.sigmas))
        return estimate_z0(out, noisy_latents, alpha, sigma, self.kind)

    def conditions(self, indices):
        """(prompt embeddings, pooled embeddings, time ids or None) of pictures."""
        captions = [self.held_out.captions[index] for index in indices]
        more = {"device": self.denoiser.device, "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
        if self.kind == FLOW:
            prompts = {"prompt": captions, "prompt_2": None, "prompt_3": None, "max_sequence_length": self.length}
            embeds, _, pooled, _ = self.pipeline.encode_prompt(**prompts, **more)
            return embeds, pooled, None
        embeds, _, pooled, _ = self.pipeline.encode_prompt(captions, **more)
        return embeds, pooled, self.held_out.time_ids[list(indices)].to(self.denoiser.device)

    def denoise(self, latents, timesteps, conditions):
        """The denoiser's output, (B, C, h, w)."""
        embeds, pooled, time_ids = conditions
        if time_ids is None:
            return self.denoiser(latents, embeds, pooled, timesteps).sample
        added = {"text_embeds": pooled, "time_ids": time_ids}
        return self.denoiser(latents, timesteps, embeds, added_cond_kwargs=added).sample


def one_step_of(pipeline, images, resolution, settings=OneStepSettings(), networks=(), bar=True):
    """The `OneStepResult` of a loaded pipeline on held-out images (`CaptionedImage`), cut to the resolution, px."""
    held_out, levels = held_out_of(pipeline, images, resolution, settings), levels_of(pipeline, settings.levels)
    estimate = PipelineEstimate(pipeline, held_out, levels)
    return one_step(estimate, levels, pipeline.vae, held_out.latents, settings, networks, bar)
