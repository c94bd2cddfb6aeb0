"""What the recipes share and nobody would edit: models, optimizers, metrics, samples, the held-out loss."""

import contextlib
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration
from diffusers import AutoencoderKL
from tqdm.auto import tqdm

from cache_utils import prompt_key
from check_utils import wants
from cli_utils import OwnError, UserError, require
from data_utils import (
    AddressedBatches,
    SampleOrder,
    TrainingSet,
    addressed_normal,
    addressed_rng,
    addressed_uniform,
    collate,
    stratified_uniform,
)
from guard_utils import Guard, dispensable, leave_signals_to_the_run
from image_utils import DataError
from input_utils import largest_size
from lora_utils import is_text_encoder
from lpl_utils import AutoWeight, DecoderStages, LatentPerceptualLoss, LPLConfig, LPLGate, noise_to_signal
from model_utils import read_json
from safety_utils import loading
from shard_utils import clip, is_sharded, local_part, set_up_sharding
from zero_utils import check_zero_devices

HELD_OUT_LEVELS = 10  # noise levels at which the held-out loss is measured
HELD_OUT_SEED = 0  # of its noise: not --seed, so that runs with different seeds can be compared


# ---------------------------------------------------------------------------------------------------------------------
# Optimizer and schedule


def quantization(args, dtype):
    """Arguments of `from_pretrained` for --bnb_quantization_config_path; 4-bit weights compute in `dtype`."""
    if not args.bnb_quantization_config_path:
        return {}
    from diffusers import BitsAndBytesConfig

    settings = {"bnb_4bit_compute_dtype": str(dtype)[6:]} | read_json(args.bnb_quantization_config_path)
    return {"quantization_config": BitsAndBytesConfig(**settings)}


def build_optimizer(args, groups):
    """The optimizer of --optimizer and --use_8bit_adam; groups: [{"params", "lr"}]."""
    betas = (args.adam_beta1, args.adam_beta2)
    rate = {"lr": args.learning_rate}  # also as the optimizer's default, which a polynomial schedule looks at
    if args.optimizer == "prodigy":
        from prodigyopt import Prodigy

        return Prodigy(
            groups, **rate, betas=betas, weight_decay=args.adam_weight_decay, eps=args.adam_epsilon,
            use_bias_correction=True, safeguard_warmup=True,
        )  # fmt: skip
    if args.optimizer == "adafactor":
        from transformers.optimization import Adafactor

        # with a learning rate of its own: neither the relative step nor the scaling by a tensor's size, which for
        # LoRA's zeros at the start would be next to nothing
        return Adafactor(
            groups, **rate, weight_decay=args.adam_weight_decay, relative_step=False, scale_parameter=False
        )
    settings = dict(**rate, betas=betas, weight_decay=args.adam_weight_decay, eps=args.adam_epsilon)
    if args.use_8bit_adam:
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(groups, **settings)
    return torch.optim.AdamW(groups, **settings)


def build_lr_scheduler(args, optimizer, max_train_steps):
    """The schedule, in optimizer steps: stepped once for each, whatever the accumulation and the number of ranks."""
    from diffusers.optimization import get_scheduler

    return get_scheduler(
        args.lr_scheduler,
        optimizer=optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=max_train_steps,
        num_cycles=args.lr_num_cycles,
        power=args.lr_power,
    )


def build_ema(args, parameters):
    """diffusers' EMA of the parameters, or None; of this rank's part of them where they are sharded."""
    if not args.use_ema:
        return None
    from diffusers.training_utils import EMAModel

    ema = EMAModel(
        map(local_part, parameters),
        decay=args.ema_decay,
        update_after_step=args.ema_update_after_step,
        foreach=args.foreach_ema,
    )
    if args.offload_ema:
        ema.to("cpu")
    return ema


def update_ema(ema, parameters, offload):
    """One step of the average; kept on the CPU under --offload_ema, and computed on the parameters' device."""
    if offload:
        ema.to(parameters[0].device, non_blocking=True)
    ema.step(map(local_part, parameters))
    if offload:
        ema.to("cpu")


@contextlib.contextmanager
def averaged_weights(ema, parameters):
    """Inside, the parameters hold EMA's average (when there is one); afterwards their own values again."""
    if ema is None:
        yield
        return
    parameters = [local_part(parameter) for parameter in parameters]
    ema.store(parameters)
    ema.copy_to(parameters)
    try:
        yield
    finally:
        ema.restore(parameters)


# ---------------------------------------------------------------------------------------------------------------------
# Metrics


class Metrics:
    """Means of detached values that stay where they are until they are read, in one transfer.

    `add(name, value, count)` takes a scalar tensor (or a number of the host's) that is a sum over `count` items.
    """

    def __init__(self, device):
        self.device = device
        self.clear()

    def clear(self):
        """Start the next interval."""
        self.sums, self.counts = {}, {}

    def snapshot(self):
        """All that was added so far, for `restore`."""
        return dict(self.sums), dict(self.counts)

    def restore(self, snapshot):
        """Forget what was added since."""
        self.sums, self.counts = snapshot

    def add(self, name, value, count=1):
        """Take in the sum of `count` items."""
        if isinstance(value, torch.Tensor):
            value = value.detach().to(torch.float32)
        self.sums[name] = self.sums.get(name, 0.0) + value
        self.counts[name] = self.counts.get(name, 0) + count

    def read(self, accelerator, names):
        """{name: mean} over ranks and the interval, of those `names` that have any item; then start anew."""
        sums = [self.sums.get(name, 0.0) for name in names]
        host = [0.0 if isinstance(value, torch.Tensor) else value for value in sums] + [
            float(self.counts.get(name, 0)) for name in names
        ]
        packed = torch.tensor(host, device=self.device)
        for index, value in enumerate(sums):
            if isinstance(value, torch.Tensor):
                packed[index] = value
        if accelerator.num_processes > 1:
            packed = accelerator.reduce(packed, "sum")
        values = packed.tolist()
        self.clear()
        pairs = zip(names, values[: len(names)], values[len(names) :], strict=True)
        return {name: total / count for name, total, count in pairs if count}


METRICS = ["train_loss", "diffusion_loss", "grad_norm", "lpl/loss", "lpl/weighted_loss", "lpl/weight",
           "lpl/num_samples", "lpl/application_ratio"]  # fmt: skip


def metric_names(args):
    """The log keys of a run, in the order of the packed read."""
    layers = range(1 + args.lpl_num_blocks if args.use_lpl else 0)
    return METRICS + [f"lpl/features/layer_{layer}/{what}" for layer in layers for what in ("loss", "outlier_ratio")]


def to_device(tensor, device, dtype=None):
    """A CPU tensor on the device, by way of pinned memory where that keeps the host from waiting."""
    tensor = tensor.to(dtype=dtype)  # before it is pinned: a copy that converts goes by unpinned memory
    if torch.device(device).type == "cuda" and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def learning_rates(optimizer):
    """{log key: value}: the first group's learning rate, and under Prodigy the step size that it has found."""
    group = optimizer.param_groups[0]
    return {"lr": group["lr"]} | ({"lr/d*lr": group["d"] * group["lr"]} if "d" in group else {})


def sync_gradients(accelerator, model, last):
    """Context of a micro-step: ranks exchange gradients on the last one only, or each time where they are sharded.

    FSDP would keep them whole until then.
    """
    return contextlib.nullcontext() if last or is_sharded(accelerator) else accelerator.no_sync(model)


def validation_schedule(args, images, batch_size):
    """Function step -> whether a validation is due: every --validation_steps, else every --validation_epochs."""
    if args.validation_steps:
        return lambda step: step % args.validation_steps == 0
    every = args.validation_epochs * images  # samples
    return lambda step: step * batch_size // every > (step - 1) * batch_size // every


# ---------------------------------------------------------------------------------------------------------------------
# Models of the base pipeline


def load_part(args, cls, subfolder, **more):
    """One component of the base pipeline."""
    return cls.from_pretrained(args.pretrained_model_name_or_path, subfolder=subfolder, revision=args.revision, **more)


def load_part_config(args, cls, subfolder):
    """The config.json of one component."""
    return cls.load_config(args.pretrained_model_name_or_path, subfolder=subfolder, revision=args.revision)


def load_vae(args, dtype, device):
    """The frozen autoencoder, evaluated in `dtype`, channels-last."""
    if args.pretrained_vae_model_name_or_path:
        vae = AutoencoderKL.from_pretrained(args.pretrained_vae_model_name_or_path, dtype=dtype, **loading(args))
    else:
        vae = load_part(args, AutoencoderKL, "vae", variant=args.variant, dtype=dtype, **loading(args))
    return vae.requires_grad_(False).eval().to(device, memory_format=torch.channels_last)


def vae_config(args):
    """The autoencoder's config.json as a dictionary, without loading weights."""
    if args.pretrained_vae_model_name_or_path:
        return AutoencoderKL.load_config(args.pretrained_vae_model_name_or_path)
    return load_part_config(args, AutoencoderKL, "vae")


def parameter_groups(denoiser, args):
    """[{"params", "lr"}]: the denoiser's trainable parameters, then the text encoders'."""
    text_rate = args.learning_rate if args.text_encoder_lr is None else args.text_encoder_lr
    groups = [
        {
            "params": [parameter for parameter in model.parameters() if parameter.requires_grad],
            "lr": text_rate if is_text_encoder(name) else args.learning_rate,
        }
        for name, model in denoiser.models().items()
    ]
    return [group for group in groups if group["params"]]


# ---------------------------------------------------------------------------------------------------------------------
# The perceptual loss, from flags


def lpl_config(args):
    """The loss' configuration; by default as many samples are decoded at a time as have the size of one of 1024 px."""
    by_default = "stage" if args.gradient_checkpointing else "none"
    return LPLConfig(
        num_blocks=args.lpl_num_blocks,
        norm_type=args.lpl_norm_type,
        loss_type=args.lpl_loss_type,
        pow_law=args.lpl_pow_law,
        remove_outliers=args.lpl_remove_outliers,
        checkpointing=args.lpl_checkpointing or by_default,
        batch_size=args.lpl_batch_size or max(1, round(1024**2 / math.prod(largest_size(args)))),
    )


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
        recipe.lpl, recipe.gate = LatentPerceptualLoss(vae, lpl_config(args)), gate
    if args.use_lpl and args.lpl_weight == "auto":
        recipe.auto_weight = AutoWeight(args.lpl_share).to(accelerator.device)
    recipe.guard = Guard(accelerator, args.max_nonfinite_steps, lambda index: data.images[index].name)
    return recipe, vae


def start_accelerator(args):
    """The Accelerator, with trackers below the output folder."""
    logging_dir = Path(args.output_dir, args.logging_dir)
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    patience = timedelta(hours=12)  # other ranks wait while the first encodes and draws; NCCL's own is 10 minutes
    check_zero_devices()
    sharded = wants("FSDP") or wants("DEEPSPEED")
    accelerator = Accelerator(
        cpu=ranks > 1 and not torch.accelerator.is_available() and not sharded,  # it would take each for alone
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(project_dir=args.output_dir, logging_dir=logging_dir),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=patience)],
    )
    require(
        accelerator.num_processes == ranks,
        f"{ranks} processes were started, but accelerate takes this one for one of {accelerator.num_processes}: start "
        "them with accelerate launch or torchrun",
    )
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise UserError("--mixed_precision fp16 needs a GPU, and none is here; use bf16 or no")
    set_up_sharding(accelerator, args.max_grad_norm)
    if args.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    return accelerator


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


def batches(args, data, accelerator, first_step, last_step):
    """Generator of the micro-batches of this rank from `first_step` on; data: the `RunData`.

    To be closed, which ends the loader's processes.
    """
    order = SampleOrder(args.seed, args.train_batch_size, data.framing.buckets)
    samples = TrainingSet(
        data.images,
        order,
        data.framing,
        data.captions,
        data.latents if data.cached else None,
        data.prompts,
        prompt_key,
    )
    numbers = AddressedBatches(
        first_step, last_step, args.train_batch_size, args.gradient_accumulation_steps, accelerator.num_processes,
        accelerator.process_index,
    )  # fmt: skip
    loader = torch.utils.data.DataLoader(
        samples,
        batch_sampler=numbers,
        collate_fn=collate,
        num_workers=args.dataloader_num_workers,
        pin_memory=accelerator.device.type == "cuda",
        worker_init_fn=leave_signals_to_the_run,
    )
    try:
        yield from loader
    except DataError as error:  # of a loading process' it holds the whole traceback, whose last line is the message
        kind = f"{type(error).__module__}.{type(error).__qualname__}: "
        raise OwnError(str(error).rpartition(kind)[2].strip()) from error


def optimize(args, accelerator, optimizer, lr_scheduler, ema, parameters, metrics, guard, step, wishes):
    """The optimizer step at the end of the accumulation: clip, look, step, schedule, average.

    A step that is not finite is skipped and leaves everything as it was. Returns (whether it was made, *whether any
    rank has each of the wishes); wishes: this rank's, bools.
    """
    grad_norm = clip(accelerator, optimizer, parameters, args.max_grad_norm or math.inf)  # 0: no clipping
    finite, faults, wishes = guard.read(grad_norm, wishes)
    guard.judge(faults, step, under_scaler=accelerator.scaler is not None)
    if finite:
        metrics.add("grad_norm", grad_norm)
    if finite or accelerator.scaler is not None:  # which skips the step itself, and lowers its scale
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if finite and not accelerator.optimizer_step_was_skipped:
        lr_scheduler.step()
        if ema is not None:
            update_ema(ema, parameters, args.offload_ema)
    return finite, *wishes


def end(accelerator):
    """Close the trackers and part from the other ranks. The caller no longer holds the prepared model.

    That has to go before the ranks' process group: if it is the last to hold the group, PyTorch waits, with the
    interpreter's lock, for a thread of the group that waits for this lock.
    """
    accelerator.free_memory()
    with dispensable("the trackers' log"):
        accelerator.end_training()


# ---------------------------------------------------------------------------------------------------------------------
# Validation: pictures and the held-out loss


def draw_prompts(pipeline, prompt_of, vae, recipe, num_inference_steps):
    """[(prompt, [images])] of --validation_prompt, with the same seeds every time; None where it was broken off.

    prompt_of: function from a list of prompts to the pipeline's arguments for them.
    """
    args, images = recipe.args, recipe.args.num_validation_images
    at_once = min(images, max(1, (1024 // args.resolution) ** 2))
    rows = [(prompt, []) for prompt in args.validation_prompt]
    for prompt, drawn in tqdm(rows, desc="validation images", leave=False, disable=not recipe.main):
        for first in range(0, images, at_once):
            if recipe.broken_off():
                return None
            seeds = range(args.seed + first, args.seed + min(first + at_once, images))
            generators = [torch.Generator(recipe.device).manual_seed(seed) for seed in seeds]
            with torch.autocast(recipe.device.type, recipe.dtype, enabled=recipe.dtype != torch.float32):
                latents = pipeline(
                    **prompt_of([prompt] * len(seeds)), generator=generators, num_inference_steps=num_inference_steps,
                    height=args.resolution, width=args.resolution, output_type="latent",
                ).images  # fmt: skip
            decoded = vae.decode(DecoderStages(vae).to_vae_space(latents)).sample  # no autocast: see LPL's dtype
            drawn += pipeline.image_processor.postprocess(decoded.float())
    return rows


@torch.no_grad()
def held_out_losses(data, recipe, accelerator, conditioning, measure):
    """{log key: loss} of the held-out images, at fixed noise levels and with fixed noise.

    `validation/diffusion_loss` is the mean over the levels, `validation/lpl_loss` over those that the gate takes; each
    level has its own entry too. Every rank takes its share of the images; where the model is sharded, all of them call
    it equally often, some for nothing. Empty where a run of one process was broken off.

    conditioning: function (batch, recipe, share of dropped prompts) -> the denoiser's conditions;
    measure: function (conditions, latents, noise, timesteps, with LPL or not) -> (diffusion losses (B,), LPL (B,)).
    """
    metrics, levels = Metrics(recipe.device), recipe.schedule.held_out_timesteps(HELD_OUT_LEVELS)
    batches, ranks = held_out_batches(data, recipe.args.train_batch_size), accelerator.num_processes
    mine = batches[accelerator.process_index :: ranks]
    idle = -(-len(batches) // ranks) - len(mine) if is_sharded(accelerator) else 0
    work = [(numbers, True) for numbers in mine] + [(batches[0], False)] * idle
    for numbers, counted in tqdm(
        work, desc="held-out loss", leave=False, disable=not accelerator.is_local_main_process
    ):
        if ranks == 1 and recipe.broken_off():
            return {}
        batch = collate([latent | prompt for latent, prompt in map(data.held_out_entry, numbers)])
        batch["number"] = numbers
        latents = recipe.to_model_space(to_device(batch["mean"].float(), recipe.device))
        gated = recipe.gated(levels, latents).tolist()
        conditions = conditioning(batch, recipe, 0)
        for level, timestep in enumerate(levels):
            addresses = [number * HELD_OUT_LEVELS + level for number in numbers]
            noise = to_device(addressed_normal(HELD_OUT_SEED, addresses, latents.shape[1:], "held_out"), recipe.device)
            losses = measure(conditions, latents, noise, timestep.repeat(len(numbers)), gated[level])
            for name, values in zip(("diffusion_loss", "lpl_loss"), losses, strict=True):
                if values is not None and counted:
                    metrics.add(f"validation/{name}/t{timestep:g}", values.sum(), len(values))
    names = [f"validation/{loss}_loss/t{timestep:g}" for loss in ("diffusion", "lpl") for timestep in levels]
    return with_means(metrics.read(accelerator, names))


def held_out_batches(data, size):
    """Lists of numbers of held-out images, each of one shape and at most `size` long."""
    buckets = data.held_out_framing.buckets
    groups = [np.flatnonzero(buckets == bucket).tolist() for bucket in np.unique(buckets)]
    return [group[first : first + size] for group in groups for first in range(0, len(group), size)]


def with_means(losses):
    """Add to {"validation/x_loss/level": value} the mean over the levels of each loss, under its bare name."""
    groups = {}
    for name, value in losses.items():
        groups.setdefault(name.rpartition("/")[0], []).append(value)
    return {name: sum(values) / len(values) for name, values in groups.items()} | losses
