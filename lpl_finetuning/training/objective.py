"""What a training step minimises, apart from the model: samples, noise, timesteps, prompts and the perceptual term.

Every random number follows from the seed and the number of the sample (`data.samples`), so a resumed run repeats it.
Timesteps, noise levels and gates live on the CPU: the loop knows which samples are gated without asking the device.

Shapes: B samples in a micro-batch, C channels, h w of a latent.
"""

import math
from dataclasses import dataclass

import torch

from lpl_finetuning.data.samples import (
    addressed_normal,
    addressed_rng,
    addressed_uniform,
    stratified_uniform,
)
from lpl_finetuning.errors import during
from lpl_finetuning.flags import settings_from_flags
from lpl_finetuning.stages import stage_ended
from lpl_finetuning.training.augmentation import augment_alike
from lpl_finetuning.training.guard import Guard
from lpl_finetuning.training.perceptual import PerceptualTerm, build_perceptual_term, check_tiny_decoder
from lpl_finetuning.training.transfer import pinned, to_device
from lpl_utils import LatentSpace, noise_to_signal

# ---------------------------------------------------------------------------------------------------------------------
# The objective


@dataclass(frozen=True)
class SampleSettings:
    """The flags about how a sample is noised and prompted; each field has the name of its flag."""

    seed: int
    train_batch_size: int
    noise_offset: float
    timestep_sampling: str
    proportion_empty_prompts: float
    lora_dropout: float
    train_text_encoder: bool


@dataclass(frozen=True)
class Objective:
    """What a training step needs besides the model and the batch."""

    settings: SampleSettings
    device: torch.device
    schedule: object  # noise levels, timesteps and targets: the script's `Schedule`
    dtype: torch.dtype  # the denoiser's inputs
    samples_per_step: int  # of an optimizer step, over micro-steps and ranks
    space: LatentSpace  # of the autoencoder's latents
    pixels: int  # of an image on a side of one latent
    empty_prompt: dict  # the entry of "" in the prompt store; zeros where zeros are the pipeline's unconditional
    empty_is_zero: bool  # whether the pipeline's unconditional embedding is zero
    guard: Guard
    encoder: object = None  # the autoencoder, where images are encoded in every step
    perceptual: PerceptualTerm | None = None

    @property
    def stage_names(self):
        """Names of the stages of the perceptual term; () where the objective has none."""
        trains = self.perceptual is not None and self.perceptual.start is not None
        return self.perceptual.loss.stage_names if trains else ()

    def resolution(self, latents):
        """Of the images of latents (B, C, h, w): the side in px of a square of the same area."""
        return self.pixels * math.sqrt(latents.shape[-2] * latents.shape[-1])

    def lpl_applies(self, step):
        """Whether the objective has the perceptual term at a step, counted from 0."""
        return self.perceptual is not None and self.perceptual.applies(step)

    def gated(self, timesteps, latents):
        """Bool (B,) on the CPU: the samples that get the perceptual loss, at the resolution of their images."""
        gate = self.perceptual.gate.at(self.resolution(latents))
        return gate(timesteps, noise_to_signal(*self.schedule.levels(timesteps)))

    @during("computing the perceptual loss")
    def perceptual_terms(self, perceptual_loss, tensors, timesteps, batch, metrics):
        """(perceptual term of each network, scalars with gradient; number of gated samples), with bookkeeping.

        Under --lpl_augment the tensors are flipped, shifted and cut alike. The estimate of the clean latents is a
        linear function of them at each position, so it is augmented just as the clean latents are.

        Args:
            perceptual_loss: the script's function (model_pred, noisy_latents, latents, timesteps, objective) ->
                what `perceptual.loss` returns; called with the gated samples only, and not at all where no sample is
                gated.
            tensors: (model_pred, noisy_latents, latents), (B, C, h, w) each.
            timesteps: (B,) on the CPU.
            batch: of the loader: numbers of the samples, and of the images for messages.
        """
        gated = self.gated(timesteps, tensors[-1]).nonzero().flatten()
        metrics.add("lpl/num_samples", float(len(gated)))
        metrics.add("lpl/application_ratio", float(len(gated)), len(timesteps))
        if not len(gated):
            return self.perceptual.nothing(tensors[-1], metrics), 0
        index = to_device(gated, self.device)
        chosen = [tensor.index_select(0, index) for tensor in tensors]
        if self.perceptual.augments:
            chosen = augment_alike(chosen, batch["number"][gated.numpy()], self.settings.seed)
        output = perceptual_loss(*chosen, timesteps[gated], self)
        for name, values in zip(self.perceptual.loss.stage_names, output.per_layer, strict=True):
            self.guard.watch(f"LPL of the {name}", values, batch["index"][gated.numpy()])
        levels = self.schedule.levels(timesteps[gated])
        return self.perceptual.totals(output, gated, levels, len(timesteps), metrics), len(gated)

    def total(self, diffusion_loss, lpl_terms, step, metrics):
        """diffusion loss + sum over networks of weight * LPL term, a scalar; without terms at steps that have none."""
        loss = diffusion_loss
        metrics.add("diffusion_loss", diffusion_loss)
        if self.lpl_applies(step):
            weighted = self.perceptual.weighted(lpl_terms, metrics)
            loss = diffusion_loss + weighted
        metrics.add("train_loss", loss)
        return loss

    def update_lpl_weight(self, step, terms, accelerator):
        """Take a step's diffusion loss, LPL terms and gated samples, means over micro-steps, into the weights."""
        if self.perceptual is not None:
            micro_batches = self.samples_per_step / self.settings.train_batch_size
            self.perceptual.update_weight(step, terms, micro_batches, accelerator)


def build_objective(args, accelerator, plan, data, space, stages, encoder, empty_prompt, empty_is_zero, gate):
    """The `Objective` of a run.

    Args:
        plan: the `Plan`; data: the `RunData`.
        space: the `LatentSpace` of the autoencoder's latents.
        stages: {network: `FeatureStages`} that the loss compares; None where it is neither used nor measured.
        encoder: the autoencoder, where images are encoded in every step; else None.
        empty_prompt: the tensors of the unconditional prompt; empty_is_zero: whether they stand for zeros.
        gate: the `LPLGate`.
    """
    if stages and accelerator.is_main_process:
        check_tiny_decoder(stages, data, space, encoder)
    stage_ended("captions and images in the caches; decoder")
    return Objective(
        settings=settings_from_flags(SampleSettings, args),
        device=accelerator.device,
        schedule=plan.schedule,
        dtype=plan.dtype,
        samples_per_step=plan.batch_size,
        space=space,
        pixels=args.base_model.family.pixels_per_latent,
        empty_prompt=empty_prompt,
        empty_is_zero=empty_is_zero,
        guard=Guard(accelerator, args.max_nonfinite_steps, lambda index: data.images[index].name),
        encoder=encoder,
        perceptual=build_perceptual_term(args, stages, gate, accelerator.device) if stages else None,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Samples


def latent_shape(batch, objective):
    """(C, h, w) of the latents in a batch of the loader."""
    if "mean" in batch:
        return batch["mean"].shape[1:]
    height, width = (size // objective.pixels for size in batch["pixel_values"].shape[-2:])
    return objective.encoder.config.latent_channels, height, width


def with_posterior_noise(batch, objective):
    """The batch of the loader, with what `sample_latents` draws by: "posterior_noise" (B, C, h, w) on the CPU."""
    shape = latent_shape(batch, objective)
    noise = addressed_normal(objective.settings.seed, batch["number"], shape, "posterior")
    return batch | {"posterior_noise": pinned(noise, objective.device)}


def with_noise(batch, objective):
    """The batch of the loader, with the noise of its samples on the CPU: "posterior_noise" and "noise" (B, C, h, w).

    Under --noise_offset the noise has a part that is constant over each channel.
    """
    settings, numbers, shape = objective.settings, batch["number"], latent_shape(batch, objective)
    noise = addressed_normal(settings.seed, numbers, shape, "noise")
    if settings.noise_offset:
        noise += settings.noise_offset * addressed_normal(settings.seed, numbers, (shape[0], 1, 1), "noise_offset")
    return with_posterior_noise(batch, objective) | {"noise": pinned(noise, objective.device)}


def sample_latents(batch, objective):
    """z_0 (B, C, h, w) as the denoiser sees it, float32: a sample of the autoencoder's posterior."""
    if "pixel_values" in batch:
        with torch.no_grad():
            mean, std = encode_in_chunks(batch["pixel_values"], objective)
    else:
        mean, std = (to_device(batch[name], objective.device) for name in ("mean", "std"))
    return objective.space.to_model(mean + std * to_device(batch["posterior_noise"], objective.device))


def encode_in_chunks(pixels, objective):
    """(mean, std), (B, C, h, w) each, of images (B, 3, H, W): one image of 1024 px, or as many pixels, at a time.

    The encoder of SDXL takes 43 GB for 16 images of 1024 px at once, and 2.7 GB for one: computed, with `LiveBytes`.
    """
    size = max(1, round(1024**2 / math.prod(pixels.shape[-2:])))
    found = []
    for chunk in pixels.split(size):
        posterior = objective.encoder.encode(to_device(chunk, objective.device)).latent_dist
        found.append((posterior.mean, posterior.std))
    return tuple(torch.cat(parts) for parts in zip(*found, strict=True))


def sample_timesteps(numbers, latents, objective):
    """(B,) timesteps of the samples with these numbers, on the CPU; the resolution is that of the latents."""
    settings = objective.settings
    if settings.timestep_sampling == "stratified":
        size = settings.train_batch_size
        uniform = stratified_uniform(settings.seed, numbers, size, objective.samples_per_step)
    else:
        uniform = addressed_uniform(settings.seed, numbers, "timestep")
    return objective.schedule.draw_timesteps(torch.from_numpy(uniform), objective.resolution(latents))


def choose_prompts(batch, objective, dropout):
    """The prompts of a batch, on the device; a share `dropout` of them is replaced by the unconditional prompt.

    Where the text encoders are trained, the prompts are tokens. No tokens give an unconditional embedding of zeros:
    there "keep" (B,) is 0 for the samples whose embedding has to be zero.
    """
    keep = torch.from_numpy(addressed_uniform(objective.settings.seed, batch["number"], "dropout") >= dropout)
    prompt = {}
    for name, empty in objective.empty_prompt.items():
        value = batch[name]
        if not keep.all():
            value = torch.where(keep.reshape(-1, *[1] * (value.ndim - 1)), value, empty)
        prompt[name] = to_device(value, objective.device, objective.dtype if value.is_floating_point() else None)
    if objective.settings.train_text_encoder and objective.empty_is_zero:
        prompt["keep"] = to_device(keep.float(), objective.device)
    return prompt


def seed_lora_dropout(numbers, objective):
    """Seed torch's generator from the micro-step's first sample, so that a resumed run repeats LoRA's dropout."""
    settings = objective.settings
    if settings.lora_dropout:
        torch.manual_seed(int(addressed_rng(settings.seed, int(numbers[0]), "lora_dropout").integers(2**32)))


# ---------------------------------------------------------------------------------------------------------------------
# Precision


def autocast(objective):
    """Autocast to the dtype of the denoiser's inputs, off in float32; no copies of weights are kept, whole or
    gathered."""
    enabled = objective.dtype != torch.float32
    return torch.autocast(objective.device.type, objective.dtype, enabled=enabled, cache_enabled=False)
