"""What the recipes share and nobody would edit: models, optimizers, metrics, samples, the held-out loss."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from lpl_finetuning.data.samples import (
    addressed_normal,
    addressed_rng,
    addressed_uniform,
    largest_size,
    stratified_uniform,
)
from lpl_finetuning.training.guard import Guard
from lpl_finetuning.training.models import load_vae, vae_config
from lpl_utils import (
    AutoWeight,
    DecoderStages,
    IdentityStages,
    LatentPerceptualLoss,
    LPLConfig,
    LPLGate,
    noise_to_signal,
)


def to_device(tensor, device, dtype=None):
    """A CPU tensor on the device, by way of pinned memory where that keeps the host from waiting."""
    tensor = tensor.to(dtype=dtype)  # before it is pinned: a copy that converts goes by unpinned memory
    if torch.device(device).type == "cuda" and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


# ---------------------------------------------------------------------------------------------------------------------
# The perceptual loss, from flags


def lpl_config(args):
    """Returns the loss' configuration; the default batch size has at most the pixels of one image of 1024 px."""
    by_default = "stage" if args.gradient_checkpointing else "none"
    return LPLConfig(
        norm_type=args.lpl_norm_type,
        norm_gradient=args.lpl_norm_gradient,
        loss_type=args.lpl_loss_type,
        pow_law=args.lpl_pow_law,
        remove_outliers=args.lpl_remove_outliers,
        checkpointing=args.lpl_checkpointing or by_default,
        batch_size=args.lpl_batch_size or max(1, round(1024**2 / math.prod(largest_size(args)))),
    )


def lpl_stages(args, vae):
    """Returns the `FeatureStages` whose features the loss compares; named as in `stage_names`."""
    if args.lpl_features == "latent":
        return IdentityStages(DecoderStages(vae).upscaling)
    return DecoderStages(vae, args.lpl_num_blocks, rgb=args.lpl_features == "rgb")


def gate_from_flags(args, **by_default):
    """Which samples get the loss; by_default: LPLGate's threshold when no flag gives one."""
    if args.lpl_t_threshold is None and args.lpl_sigma_threshold is None:
        return LPLGate(**by_default, resolution=args.resolution)
    return LPLGate(args.lpl_t_threshold, args.lpl_sigma_threshold, args.lpl_threshold_resolution, args.resolution)


def lpl_dtype(args, mixed_precision):
    """The decoder's dtype in the loss."""
    name = args.lpl_vae_dtype or ("bfloat16" if mixed_precision == "bf16" else "float32")
    return getattr(torch, name)


# ---------------------------------------------------------------------------------------------------------------------
# The loop's parts: what a step needs, its samples, its end


@dataclass
class Recipe:
    """What a training step needs besides the models and its batch."""

    args: object
    device: torch.device
    schedule: object  # noise levels, timesteps and targets: the script's `Schedule`
    dtype: torch.dtype  # the denoiser's inputs
    samples_per_step: int  # of an optimizer step, over micro-steps and ranks
    scaling_factor: float  # z_model = (z_vae - shift_factor) * scaling_factor
    shift_factor: float
    pixels: int  # of an image on a side of one of its latents
    empty_prompt: dict  # the entry of "" in the prompt store; zeros where those are the pipeline's unconditional
    empty_is_zero: bool = False  # whether the pipeline's unconditional embedding is zero
    encoder: object = None  # the autoencoder, where images are encoded in every step
    lpl: LatentPerceptualLoss | None = None
    gate: LPLGate | None = None
    auto_weight: AutoWeight | None = None
    guard: Guard | None = None
    main: bool = True  # whether this is the process that says things
    broken_off: Callable[[], bool] = lambda: False  # whether drawing ends early, since the run is to stop

    def lpl_weight(self):
        """The weight of the LPL term, a number or a scalar tensor on the device."""
        return self.auto_weight() if self.auto_weight is not None else float(self.args.lpl_weight)

    def resolution(self, latents):
        """Of the images of a batch of latents: the side in px of a square of the same area."""
        return self.pixels * math.sqrt(latents.shape[-2] * latents.shape[-1])

    def gated(self, timesteps, latents):
        """Bool (B,) on the CPU: which samples get the loss, at their resolution."""
        gate = self.gate.at(self.resolution(latents))
        return gate(timesteps, noise_to_signal(*self.schedule.levels(timesteps)))

    def to_model_space(self, latents):
        """The autoencoder's latents as the denoiser sees them."""
        return (latents - self.shift_factor) * self.scaling_factor


def build_recipe(args, accelerator, schedule, dtype, empty_prompt, empty_is_zero, gate, data):
    """(Recipe, autoencoder or None). The autoencoder is there for the loss, for measuring it, and for drawing."""
    measure_lpl = bool(len(data.held_out))
    vae, space = None, vae_config(args)
    if args.use_lpl or measure_lpl or args.validation_prompt:
        vae = load_vae(args, lpl_dtype(args, accelerator.mixed_precision), accelerator.device)
    recipe = Recipe(
        args=args,
        device=accelerator.device,
        schedule=schedule,
        dtype=dtype,
        samples_per_step=args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes,
        scaling_factor=space["scaling_factor"],
        shift_factor=space.get("shift_factor") or 0.0,
        pixels=2 ** (len(space["block_out_channels"]) - 1),
        empty_prompt=empty_prompt,
        empty_is_zero=empty_is_zero,
        main=accelerator.is_main_process,
    )
    if not data.cached:
        recipe.encoder = load_vae(args, torch.float32, accelerator.device)
    if args.use_lpl or measure_lpl:
        recipe.lpl, recipe.gate = LatentPerceptualLoss(lpl_stages(args, vae), lpl_config(args)), gate
    if args.use_lpl and args.lpl_weight == "auto":
        recipe.auto_weight = AutoWeight(args.lpl_share).to(accelerator.device)
    recipe.guard = Guard(accelerator, args.max_nonfinite_steps, lambda index: data.images[index].name)
    return recipe, vae


def sample_latents(batch, recipe):
    """z_0 (B, C, h, w) in model space, float32: a sample of the autoencoder's posterior."""
    if "pixel_values" in batch:
        with torch.no_grad():
            pixels = to_device(batch["pixel_values"], recipe.device)
            posterior = recipe.encoder.encode(pixels).latent_dist
        mean, std = posterior.mean, posterior.std
    else:
        mean, std = (to_device(batch[name], recipe.device) for name in ("mean", "std"))
    eps = addressed_normal(recipe.args.seed, batch["number"], mean.shape[1:], "posterior")
    return recipe.to_model_space(mean + std * to_device(eps, recipe.device))


def sample_noise(numbers, shape, recipe):
    """eps (B, *shape) of the samples with these numbers, on the device; with --noise_offset constant parts too."""
    args = recipe.args
    noise = addressed_normal(args.seed, numbers, shape, "noise")
    if args.noise_offset:
        noise += args.noise_offset * addressed_normal(args.seed, numbers, (shape[0], 1, 1), "noise_offset")
    return to_device(noise, recipe.device)


def sample_timesteps(numbers, resolution, recipe):
    """(B,) timesteps of the samples with these numbers and this resolution, on the CPU."""
    args = recipe.args
    if args.timestep_sampling == "stratified":
        uniform = stratified_uniform(args.seed, numbers, args.train_batch_size, recipe.samples_per_step)
    else:
        uniform = addressed_uniform(args.seed, numbers, "timestep")
    return recipe.schedule.draw_timesteps(torch.from_numpy(uniform), resolution)


def choose_prompts(batch, recipe, dropout):
    """The prompts of a batch, on the device; a share `dropout` of them is replaced by the unconditional one.

    Where the text encoders are trained, the prompts are tokens, and the unconditional embedding may be zeros, which no
    tokens give: then "keep" (B,) is 0 for those samples.
    """
    keep = torch.from_numpy(addressed_uniform(recipe.args.seed, batch["number"], "dropout") >= dropout)
    prompt = {}
    for name, empty in recipe.empty_prompt.items():
        value = batch[name]
        if not keep.all():
            value = torch.where(keep.reshape(-1, *[1] * (value.ndim - 1)), value, empty)
        prompt[name] = to_device(value, recipe.device, recipe.dtype if value.is_floating_point() else None)
    if recipe.args.train_text_encoder and recipe.empty_is_zero:
        prompt["keep"] = to_device(keep.float(), recipe.device)
    return prompt


def seed_lora_dropout(numbers, args):
    """Dropout follows from the address of a micro-step too, so that a resumed run repeats it."""
    if args.lora_dropout:
        torch.manual_seed(int(addressed_rng(args.seed, int(numbers[0]), "lora_dropout").integers(2**32)))
