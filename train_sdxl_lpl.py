"""Fine-tune Stable Diffusion XL with the latent perceptual loss (LPL): the whole UNet or a LoRA.

    accelerate launch train_sdxl_lpl.py --use_lpl                       # a complete demonstration on two CPU cores

    accelerate launch train_sdxl_lpl.py --use_lpl --use_lora --rank 16 --mixed_precision bf16 \\
        --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 --train_data_dir my-pictures \\
        --gradient_checkpointing --center_crop --train_batch_size 4 --max_train_steps 2000 --output_dir my-lora \\
        --validation_prompt "a photo of my dog on the beach"

The method, top to bottom: `encode_prompts` and `encode_images` fill the caches, `training_step` is one step of the
paper, `main` is the loop. Symbols: z_0 clean latents as the UNet sees them, z_t = alpha z_0 + sigma eps, B batch,
(B, 4, h, w) latents. Timesteps, noise levels and gates live on the CPU, so that the loop never waits for the device.
"""

# ruff: noqa: E402  (flags and data are checked before the slow imports)
import contextlib
import functools
import os
import sys
from pathlib import Path

from lpl_finetuning.base_model import (
    check_base_model,
    check_files,
    check_init_lora,
    check_lora_layers,
    check_model,
    check_sdxl,
    check_weights,
    is_plan_only,
    loading,
    lora_layers,
    model_file,
    read_json,
    weights_fingerprint,
)
from lpl_finetuning.data.scan import find_images
from lpl_finetuning.errors import errors_for_people, quiet_libraries, require
from lpl_finetuning.flag_checks import check_flags
from lpl_finetuning.flags import (
    REPOSITORY,
    FlagParser,
    add_data_arguments,
    add_lpl_arguments,
    add_model_arguments,
    add_run_arguments,
    add_training_arguments,
)
from lpl_finetuning.results.hub import check_publishing
from lpl_finetuning.training.checkpoint_folders import check_resume, run_identity

EMBEDDED_DEFAULT = REPOSITORY / "examples" / "tiny-sdxl" / "train.yaml"
COMPONENTS = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet", "scheduler")
WEIGHTS = ("vae", "text_encoder", "text_encoder_2", "unet")
REPLACED = {"vae": "pretrained_vae_model_name_or_path", "unet": "pretrained_unet_model_name_or_path"}
LORA_TARGETS = ("to_k", "to_q", "to_v", "to_out.0")


def build_parser():
    """All flags of the recipe."""
    parser = FlagParser(__doc__)
    add_model_arguments(parser)
    add_data_arguments(parser, resolution=1024)
    add_training_arguments(parser, train_batch_size=16, num_train_epochs=100, adam_weight_decay=1e-2)
    group = parser.add_argument_group("diffusion")
    add = group.add_argument
    add(
        "--pretrained_unet_model_name_or_path",
        help="another UNet: a folder or Hub name with its config.json, or with unet/",
    )
    add("--prediction_type", choices=("epsilon", "v_prediction", "sample"), help="default: the base model's")
    add("--snr_gamma", type=float, help="weight the diffusion loss by min(SNR, gamma); 5 is usual (default: off)")
    add("--timestep_bias_strategy", choices=("none", "earlier", "later", "range"), default="none",
        help="draw some timesteps more often (default: %(default)s)")  # fmt: skip
    add("--timestep_bias_multiplier", type=float, default=1.0, help="how much more often (default: %(default)s)")
    add("--timestep_bias_begin", type=int, default=0, help="first biased timestep under range (default: %(default)s)")
    add("--timestep_bias_end", type=int, default=1000, help="end of the range, excluded (default: %(default)s)")
    add("--timestep_bias_portion", type=float, default=0.25, help="biased share of timesteps (default: %(default)s)")
    add_lpl_arguments(parser)
    add_run_arguments(parser, validation_epochs=1)
    return parser


def parse_args(argv=None):
    """The flags of a run, checked; UserError names the flag that is wrong."""
    args = build_parser().parse(argv, embedded_default=EMBEDDED_DEFAULT)
    if args.embedded_default:
        print(f"No model and no data named: using the embedded examples, {EMBEDDED_DEFAULT.relative_to(REPOSITORY)}.")
    check_flags(args)
    require(not args.single_file or args.prediction_type != "sample",
            "--single_file: other programs can't tell --prediction_type sample from epsilon")  # fmt: skip
    require(args.snr_gamma is None or args.snr_gamma > 0, f"--snr_gamma is {args.snr_gamma}; it must be above 0")
    require(0 <= args.timestep_bias_begin < args.timestep_bias_end <= 1000,
            "--timestep_bias_begin and --timestep_bias_end must satisfy 0 <= begin < end <= 1000, found "
            f"{args.timestep_bias_begin} and {args.timestep_bias_end}")  # fmt: skip
    require(args.timestep_bias_multiplier > 0,
            f"--timestep_bias_multiplier is {args.timestep_bias_multiplier}; it must be above 0")  # fmt: skip
    require(0 < args.timestep_bias_portion <= 1,
            f"--timestep_bias_portion is {args.timestep_bias_portion}; it must be above 0 and at most 1")  # fmt: skip
    check_publishing(args)
    check_base_model(args, "StableDiffusionXL", COMPONENTS)
    unet = ("unet", "UNet2DConditionModel", "pretrained_unet_model_name_or_path")
    configs = check_model(args, unet, scheduler=(False, ("EDM", "FlowMatch")))
    if not is_plan_only(args):
        check_weights(args, WEIGHTS, REPLACED)
        check_files(args, WEIGHTS, REPLACED)
        check_lora_layers(args, "unet", REPLACED)
    check_sdxl(args, configs)
    check_init_lora(args)
    args.base_weights = weights_fingerprint(args, "unet", REPLACED)
    check_resume(args)
    return args


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads bring a busy CPU to a halt
    with errors_for_people("--debug" in sys.argv):
        ARGS = parse_args()
        SCAN, HELD_OUT = find_images(ARGS)
        quiet_libraries(ARGS.debug)

import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from tqdm.auto import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from lpl_finetuning.data import encoding
from lpl_finetuning.data.encoding import encode_images, model_identity, rows_of
from lpl_finetuning.results.export import save_kohya, save_single_file
from lpl_finetuning.results.hub import check_access, model_card, publish_or_exit, tell_how_to_publish, write_card
from lpl_finetuning.training.checkpoints import (
    CheckpointClock,
    TrainingState,
    checkpoint_to_resume,
    kept_if_unwritten,
    save_checkpoint,
)
from lpl_finetuning.training.guard import StopSignals
from lpl_finetuning.training.models import (
    adapters,
    add_adapters,
    load_lora,
    load_part,
    load_part_config,
    load_vae,
    parameter_groups,
    quantization,
    save_lora,
    vae_config,
)
from lpl_finetuning.training.objective import (
    build_recipe,
    choose_prompts,
    gate_from_flags,
    lpl_dtype,
    sample_latents,
    sample_noise,
    sample_timesteps,
    seed_lora_dropout,
    to_device,
)
from lpl_finetuning.training.optimization import (
    averaged_weights,
    build_ema,
    build_lr_scheduler,
    build_optimizer,
    optimize,
    sync_gradients,
)
from lpl_finetuning.training.plan import (
    SavedBytes,
    check_data,
    check_machine,
    latent_size,
    memory_parts,
    plan_run,
    print_lpl_plan,
    print_memory,
    print_models,
    print_plan,
    weight_bytes,
)
from lpl_finetuning.training.reporter import Reporter, learning_rates, metric_names
from lpl_finetuning.training.run import batches, end, open_output_dir, start_accelerator
from lpl_finetuning.training.sharding import evaluation, gathered, home, is_sharded, load_state, prepare
from lpl_finetuning.training.validation import Gallery, draw_prompts, held_out_losses, validation_schedule
from lpl_utils import estimate_z0, lpl_noise_scale, noise_to_signal

# ---------------------------------------------------------------------------------------------------------------------
# The noise schedule


class Schedule:
    """SDXL's discrete noise schedule: levels, timestep distribution and weights, all on the CPU."""

    def __init__(self, args):
        scheduler = DDPMScheduler.from_pretrained(
            args.pretrained_model_name_or_path, subfolder="scheduler", revision=args.revision
        )
        abar = scheduler.alphas_cumprod.double()
        self.alphas, self.sigmas = abar.sqrt().float(), (1 - abar).clamp_min(0).sqrt().float()
        self.prediction_type = args.prediction_type or scheduler.config.prediction_type
        self.snr_gamma = args.snr_gamma
        self.probabilities = self._timestep_probabilities(args)
        self.cumulative = self.probabilities.cumsum(0)

    def __len__(self):
        return len(self.alphas)

    def _timestep_probabilities(self, args):
        """(T,) the chance of each timestep under --timestep_bias_*, float64."""
        weights = torch.ones(len(self), dtype=torch.float64)
        biased = int(args.timestep_bias_portion * len(self))
        where = {
            "none": slice(0, 0),
            "earlier": slice(0, biased),
            "later": slice(len(self) - biased, len(self)),
            "range": slice(args.timestep_bias_begin, args.timestep_bias_end),
        }[args.timestep_bias_strategy]
        weights[where] *= args.timestep_bias_multiplier
        return weights / weights.sum()

    def draw_timesteps(self, uniform, resolution=None):
        """(B,) timesteps for uniform numbers in [0, 1), by the distribution's inverse; the same at any resolution."""
        uniform = torch.as_tensor(uniform)
        return torch.searchsorted(self.cumulative, uniform, right=True).clamp_max(len(self) - 1)

    def held_out_timesteps(self, count):
        """(count,) the middles of as many equal parts of all timesteps."""
        return ((torch.arange(count) + 0.5) * len(self) / count).long()

    def levels(self, timesteps):
        """alpha, sigma: (B,) float32."""
        return self.alphas[timesteps], self.sigmas[timesteps]

    def loss_weights(self, timesteps):
        """(B,) min-SNR weights of the diffusion loss (Hang et al. 2023); 1 without --snr_gamma.

        The weight of the z_0 loss is min(SNR, gamma); that of eps is 1 / SNR times it, of v 1 / (SNR + 1) times it.
        """
        if self.snr_gamma is None:
            return torch.ones(len(timesteps))
        snr = (self.alphas[timesteps] / self.sigmas[timesteps]) ** 2
        if self.prediction_type == "epsilon":  # min(SNR, gamma) / SNR, which is 1 where SNR is 0
            return torch.where(snr > self.snr_gamma, self.snr_gamma / snr.clamp_min(1e-12), 1)
        clipped = snr.clamp_max(self.snr_gamma)
        return clipped / (snr + 1) if self.prediction_type == "v_prediction" else clipped

    def target(self, latents, noise, alpha, sigma):
        """What the UNet should return, (B, 4, h, w); alpha and sigma shaped to multiply it."""
        if self.prediction_type == "epsilon":
            return noise
        return alpha * noise - sigma * latents if self.prediction_type == "v_prediction" else latents

    def gated_share(self, gate):
        """Expected share of samples that get LPL, from the distribution of timesteps."""
        timesteps = torch.arange(len(self))
        return self.probabilities[gate(timesteps, noise_to_signal(*self.levels(timesteps)))].sum().item()


# ---------------------------------------------------------------------------------------------------------------------
# Models


def load_tokenizers(args):
    """Both tokenizers."""
    return [load_part(args, CLIPTokenizer, "tokenizer" + suffix) for suffix in ("", "_2")]


TEXT_ENCODERS = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}


def load_text_encoders(args, dtype, device):
    """Both text encoders, frozen."""
    encoders = [load_part(args, cls, name, variant=args.variant, dtype=dtype, **loading(args))
                for name, cls in TEXT_ENCODERS.items()]  # fmt: skip
    return [encoder.requires_grad_(False).eval().to(device) for encoder in encoders]


def denoiser_place(args):
    """(name or folder, subfolder, revision, variant) of the UNet to start from."""
    other = args.pretrained_unet_model_name_or_path
    if not other:
        return args.pretrained_model_name_or_path, "unet", args.revision, args.variant
    return other, "unet" if model_file(other, "config.json", subfolder="unet") else "", None, None


class Denoiser(torch.nn.Module):
    """The UNet, and the text encoders where they are trained too: one module, so that ranks exchange all gradients."""

    def __init__(self, unet, text_encoders=()):
        super().__init__()
        self.unet = unet
        self.text_encoder, self.text_encoder_2 = text_encoders or (None, None)

    def models(self):
        """{name in diffusers: model}"""
        return dict(self.named_children())

    def embed(self, prompt):
        """Prompt embeddings from {"input_ids", "input_ids_2" (B, 77)}, zero where "keep" (B,) is."""
        encoders = [self.text_encoder, self.text_encoder_2]
        embeds = embed_tokens([prompt["input_ids"], prompt["input_ids_2"]], encoders)
        if "keep" in prompt:
            for name, value in embeds.items():
                embeds[name] = value * prompt["keep"].to(value.dtype).view(-1, *[1] * (value.ndim - 1))
        return embeds

    def forward(self, noisy_latents, timesteps, prompt, time_ids):
        """The UNet's output (B, 4, h, w). prompt: embeddings as `embed_tokens` gives them, or what `embed` takes."""
        if self.text_encoder is not None:
            prompt = self.embed(prompt)
        added = {"text_embeds": prompt["pooled_prompt_embeds"], "time_ids": time_ids}
        return self.unet(noisy_latents, timesteps, prompt["prompt_embeds"], added_cond_kwargs=added).sample


def build_denoiser(args, dtype, device):
    """The models to train, loaded. Trainable parameters are float32."""
    name, subfolder, revision, variant = denoiser_place(args)
    unet = UNet2DConditionModel.from_pretrained(
        name, subfolder=subfolder, revision=revision, variant=variant,
        dtype=dtype if args.use_lora else torch.float32, **quantization(args, dtype),
        **loading(args),
    )  # fmt: skip
    text_encoders = load_text_encoders(args, dtype, "cpu") if args.train_text_encoder else ()
    torch.manual_seed(args.seed)  # the LoRA's initial weights
    denoiser = prepare_for_training(Denoiser(unet, text_encoders), args).to(device)
    if args.enable_xformers_memory_efficient_attention:
        unet.enable_xformers_memory_efficient_attention()
    if args.torch_compile:
        unet.compile()
    return denoiser


def lora_targets(args):
    """Layers of the UNet that get a LoRA."""
    return lora_layers(args, LORA_TARGETS)


def prepare_for_training(denoiser, args):
    """Give it its LoRA and gradient checkpointing."""
    if args.use_lora:
        add_adapters(args, denoiser.models(), StableDiffusionXLPipeline, lora_targets(args))
        if denoiser.text_encoder is not None:  # SDXL reads it before its last layer, which gets no gradient
            text_model = getattr(denoiser.text_encoder, "text_model", denoiser.text_encoder)
            text_model.encoder.layers[-1].requires_grad_(False)
    if args.gradient_checkpointing:
        denoiser.unet.enable_gradient_checkpointing()
        for encoder in (denoiser.text_encoder, denoiser.text_encoder_2):
            if encoder is not None:
                encoder.gradient_checkpointing_enable({"use_reentrant": False})
    return denoiser.train()


# ---------------------------------------------------------------------------------------------------------------------
# Encoding, once, into caches on disk


def tokenize(captions, tokenizers):
    """{"input_ids", "input_ids_2" (N, 77)}, int64."""
    ids = [
        tokenizer(
            captions, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
        ).input_ids
        for tokenizer in tokenizers
    ]
    return {"input_ids": ids[0], "input_ids_2": ids[1]}


def embed_tokens(input_ids, encoders):
    """Captions as SDXL sees them: {"prompt_embeds" (N, 77, D), "pooled_prompt_embeds" (N, P)}.

    The hidden states before the last layer of both text encoders, side by side, and the projection of the second.
    """
    hidden = []
    for ids, encoder in zip(input_ids, encoders, strict=True):
        output = encoder(ids.to(encoder.device), output_hidden_states=True)
        hidden.append(output.hidden_states[-2])
    return {"prompt_embeds": torch.cat(hidden, dim=-1), "pooled_prompt_embeds": output[0]}


@torch.no_grad()
def encode_prompts(captions, tokenizers, encoders):
    """[{"prompt_embeds" (77, D), "pooled_prompt_embeds" (P,)}] of captions, on the CPU."""
    embeds = embed_tokens(tokenize(captions, tokenizers).values(), encoders)
    return rows_of({name: value.cpu() for name, value in embeds.items()})


def prompt_bytes(args, dtype):
    """Bytes of an encoded prompt."""
    if args.train_text_encoder:
        return 2 * 77 * 8
    config = load_part_config(args, UNet2DConditionModel, "unet")
    pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
    return (77 * config["cross_attention_dim"] + pooled) * dtype.itemsize


def fill_caches(args, images, held_out, dtype, accelerator):
    """The `RunData` of a run, with everything in its stores that was missing.

    Where the text encoders are trained, the prompts are stored as tokens.
    """
    tokenizers = functools.cache(lambda: load_tokenizers(args))
    text_encoders = functools.cache(lambda: load_text_encoders(args, dtype, accelerator.device))
    vae = functools.cache(lambda: load_vae(args, torch.float32, accelerator.device))
    if args.train_text_encoder:
        prompt_id = {"kind": "sdxl tokens", "model": model_identity(args, "tokenizer", "tokenizer_2")}
    else:
        prompt_id = {"kind": "sdxl prompts", "model": model_identity(args, *COMPONENTS[1:5]), "dtype": str(dtype)}

    def encode(captions):
        if args.train_text_encoder:
            return rows_of(tokenize(captions, tokenizers()))
        return encode_prompts(captions, tokenizers(), text_encoders())

    def encode_latents(cuts):
        text_encoders.cache_clear()  # one model at a time
        return encode_images(cuts, vae())

    return encoding.fill_caches(
        args, images, held_out, accelerator, prompt_id, prompt_bytes(args, dtype), vae_config(args), encode,
        encode_latents,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# The training step


def conditioning(batch, recipe, dropout):
    """(prompt, time_ids) for `Denoiser`; a share `dropout` of the prompts is replaced by the unconditional one."""
    return choose_prompts(batch, recipe, dropout), to_device(batch["time_ids"], recipe.device)


def denoise(denoiser, latents, noise, timesteps, conditions, recipe):
    """One forward pass: (squared error of each sample (B,), model_pred (B, 4, h, w), noisy_latents (B, 4, h, w))."""
    alpha, sigma = to_device(torch.stack(recipe.schedule.levels(timesteps)), recipe.device).view(2, -1, 1, 1, 1)
    noisy_latents = alpha * latents + sigma * noise
    model_pred = denoiser(noisy_latents.to(recipe.dtype), to_device(timesteps, recipe.device), *conditions)
    target = recipe.schedule.target(latents, noise, alpha, sigma)
    return (model_pred.float() - target).square().mean(dim=(1, 2, 3)), model_pred, noisy_latents


def training_step(batch, denoiser, recipe, step, metrics):
    """One micro-step: (objective, a scalar with gradient; [diffusion loss, LPL term] (2,), detached).

    loss = diffusion + weight * (1 / B) * sum over gated samples of s_b * LPL_b
    """
    args, numbers = recipe.args, batch["number"]
    latents = sample_latents(batch, recipe)
    noise = sample_noise(numbers, latents.shape[1:], recipe)
    timesteps = sample_timesteps(numbers, recipe.resolution(latents), recipe)
    conditions = conditioning(batch, recipe, args.proportion_empty_prompts)
    seed_lora_dropout(numbers, args)

    errors, model_pred, noisy_latents = denoise(denoiser, latents, noise, timesteps, conditions, recipe)
    recipe.guard.watch("diffusion loss", errors, batch["index"])
    if args.snr_gamma is not None:
        errors = to_device(recipe.schedule.loss_weights(timesteps), recipe.device) * errors
    diffusion_loss = errors.mean()
    metrics.add("diffusion_loss", diffusion_loss)
    loss, lpl_term = diffusion_loss, torch.zeros_like(diffusion_loss)
    if args.use_lpl and step >= args.lpl_start:
        lpl_term = perceptual_term(model_pred, noisy_latents, latents, timesteps, batch["index"], recipe, metrics)
        weight = recipe.lpl_weight()
        loss = diffusion_loss + weight * lpl_term
        metrics.add("lpl/weight", weight)
        metrics.add("lpl/weighted_loss", weight * lpl_term)
    metrics.add("train_loss", loss)
    return loss, torch.stack([diffusion_loss, lpl_term]).detach()


def perceptual_term(model_pred, noisy_latents, latents, timesteps, images, recipe, metrics):
    """(1 / B) * sum over gated samples of s_b * LPL_b: a scalar, divided by the batch and not by the gated samples.

    images: (B,) their numbers.
    """
    gated = recipe.gated(timesteps, latents).nonzero().flatten()
    metrics.add("lpl/num_samples", float(len(gated)))
    metrics.add("lpl/application_ratio", float(len(gated)), len(timesteps))
    if not len(gated):
        metrics.add("lpl/loss", 0.0)
        return latents.new_zeros(())
    index = to_device(gated, recipe.device)
    output = perceptual_loss(*(x.index_select(0, index) for x in (model_pred, noisy_latents, latents)),
                             timesteps[gated], recipe)  # fmt: skip
    for layer, values in enumerate(output.per_layer):
        recipe.guard.watch(f"LPL of layer {layer}", values, images[gated.numpy()])
        metrics.add(f"lpl/features/layer_{layer}/loss", values.sum(), len(values))
        outliers = (1 - output.inlier_fraction[layer]) * len(values)
        metrics.add(f"lpl/features/layer_{layer}/outlier_ratio", outliers, len(values))
    per_sample = output.per_sample
    if recipe.args.lpl_scale:
        levels = recipe.schedule.levels(timesteps[gated])
        per_sample = to_device(lpl_noise_scale(*levels), recipe.device) * per_sample
    lpl_term = per_sample.sum() / len(latents)
    metrics.add("lpl/loss", lpl_term)
    return lpl_term


def perceptual_loss(model_pred, noisy_latents, latents, timesteps, recipe):
    """LPL between the estimate of z_0 and z_0 itself, an `LPLOutput`; everything (B, 4, h, w)."""
    alpha, sigma = to_device(torch.stack(recipe.schedule.levels(timesteps)), recipe.device)
    z0_pred = estimate_z0(model_pred, noisy_latents, alpha, sigma, recipe.schedule.prediction_type)
    return recipe.lpl(z0_pred, latents)


# ---------------------------------------------------------------------------------------------------------------------
# Validation


def held_out_step(conditions, latents, noise, timesteps, with_lpl, denoiser, recipe):
    """(diffusion losses (B,), LPL (B,) or None) of held-out images at given noise and timesteps."""
    with torch.autocast(recipe.device.type, recipe.dtype, enabled=recipe.dtype != torch.float32):
        errors, model_pred, noisy_latents = denoise(denoiser, latents, noise, timesteps, conditions, recipe)
    if not with_lpl:
        return errors, None
    return errors, perceptual_loss(model_pred, noisy_latents, latents, timesteps, recipe).per_sample


@torch.no_grad()
def draw(denoiser, vae, data, recipe):
    """Draw every validation prompt, with the same seeds every time: [(prompt, [images])]."""
    import diffusers

    args = recipe.args

    scheduler_config = load_part_config(args, DDPMScheduler, "scheduler")
    scheduler = getattr(diffusers, scheduler_config["_class_name"]).from_config(
        scheduler_config, prediction_type=recipe.schedule.prediction_type
    )
    pipeline = StableDiffusionXLPipeline(
        vae=vae, unet=denoiser.unet, scheduler=scheduler, text_encoder=None, text_encoder_2=None, tokenizer=None,
        tokenizer_2=None, add_watermarker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    prompt_of = functools.partial(pipeline_prompt, denoiser=denoiser, data=data, recipe=recipe)
    with evaluation(denoiser):
        return draw_prompts(pipeline, prompt_of, vae, recipe, num_inference_steps=25)


def pipeline_prompt(prompts, denoiser, data, recipe):
    """Validation prompts' embeddings and the unconditional ones, as arguments of the pipeline."""

    def embeds(entries):
        batch = {name: torch.stack([entry[name] for entry in entries]).to(recipe.device) for name in entries[0]}
        return denoiser.embed(batch) if denoiser.text_encoder is not None else batch

    positive = embeds([data.prompt(prompt) for prompt in prompts])
    negative = embeds([recipe.empty_prompt] * len(prompts))
    if recipe.empty_is_zero:
        negative = {name: torch.zeros_like(value) for name, value in negative.items()}
    prompts = positive | {f"negative_{name}": value for name, value in negative.items()}
    return {name: value.to(recipe.dtype) for name, value in prompts.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Saving


def save_weights(folder, denoiser, args):
    """The trained weights in the layout of diffusers: `unet/`, or `pytorch_lora_weights.safetensors`."""
    if args.use_lora:
        save_lora(folder, adapters(denoiser.models()), StableDiffusionXLPipeline)
    else:
        denoiser.unet.save_pretrained(folder / "unet")


def load_weights(folder, denoiser, args):
    """Put back what `save_weights` wrote."""
    if args.use_lora:
        load_lora(folder, denoiser.models())
    else:
        saved = UNet2DConditionModel.from_pretrained(folder, subfolder="unet", use_safetensors=True)
        load_state(denoiser.unet, saved.state_dict())


def save_result(args, denoiser, schedule):
    """What the run is for: a LoRA, or a whole pipeline that `from_pretrained` loads; and their other formats."""
    folder = Path(args.output_dir)
    if args.use_lora:
        save_weights(folder, denoiser, args)
        if args.output_kohya_format:
            save_kohya(folder, adapters(denoiser.models()), denoiser.unet.config)
        return
    more = {}
    if args.pretrained_vae_model_name_or_path:
        more["vae"] = AutoencoderKL.from_pretrained(args.pretrained_vae_model_name_or_path, **loading(args))
    pipeline = StableDiffusionXLPipeline.from_pretrained(
        args.pretrained_model_name_or_path, unet=denoiser.unet, revision=args.revision, variant=args.variant,
        dtype=torch.float32, **loading(args), **more,
    )  # fmt: skip
    pipeline.scheduler.register_to_config(prediction_type=schedule.prediction_type)
    pipeline.save_pretrained(folder)
    if args.single_file:
        save_single_file(pipeline, folder / "model.safetensors")


# ---------------------------------------------------------------------------------------------------------------------
# The plan: what is printed before anything is loaded


def lpl_gate(args):
    """Which samples get the loss; with no threshold given: t < 200, a fifth of uniform timesteps."""
    return gate_from_flags(args, t_threshold=200)


def build_on_meta(args, dtype, vae_dtype):
    """(denoiser, autoencoder) without memory or weights: for counting, and for checks before loading."""
    name, subfolder, revision, _ = denoiser_place(args)
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(
            UNet2DConditionModel.load_config(name, subfolder=subfolder, revision=revision)
        ).to(dtype if args.use_lora else torch.float32)
        vae = AutoencoderKL.from_config(vae_config(args)).requires_grad_(False).to(vae_dtype)
        text_encoders = ()
        if args.train_text_encoder:
            text_encoders = [
                cls(load_part(args, CLIPTextConfig, name)).to(dtype) for name, cls in TEXT_ENCODERS.items()
            ]
        return prepare_for_training(Denoiser(unet, text_encoders), args), vae


def memory_estimate(args, denoiser, vae, dtype):
    """[(what, bytes)] that training needs on one device; from shapes, nothing is run."""
    batch, unet = args.train_batch_size, denoiser.unet
    weights = weight_bytes(args, denoiser.models())
    trained = [parameter for group in parameter_groups(denoiser, args) for parameter in group["params"]]
    trained = [torch.empty_like(parameter) for parameter in trained]  # of their own dtype, which changes now
    denoiser.to(dtype)  # what autocast would run in: the meta device has no autocast
    size, width = latent_size(args, vae), unet.config.projection_class_embeddings_input_dim
    with torch.device("meta"), SavedBytes() as activations:
        if args.train_text_encoder:
            ids = torch.zeros(batch, 77, dtype=torch.long)
            prompt = {"input_ids": ids, "input_ids_2": ids}
        else:
            pooled = width - 6 * unet.config.addition_time_embed_dim
            prompt = {
                "prompt_embeds": torch.randn(batch, 77, unet.config.cross_attention_dim, dtype=dtype),
                "pooled_prompt_embeds": torch.randn(batch, pooled, dtype=dtype),
            }
        latents = torch.randn(batch, unet.config.in_channels, *size, dtype=dtype)
        denoiser(latents, torch.zeros(batch, dtype=torch.long), prompt, torch.randn(batch, 6, dtype=dtype))
    return memory_parts(args, weights, trained, activations.total, vae)


def check_and_print_plan(args, scan, held_out, plan, accelerator):
    """Check what needs no weights, and say what will happen; returns the report on the data. Raises UserError."""
    say = accelerator.print
    report = check_data(args, scan, held_out, load_tokenizers(args), accelerator)
    denoiser, vae = build_on_meta(args, plan.dtype, lpl_dtype(args, accelerator.mixed_precision))
    check_machine(args)
    print_plan(args, report, accelerator, plan)
    how = f"{plan.schedule.prediction_type} prediction, {str(plan.dtype)[6:]}"
    print_models(args, denoiser.models(), how, say)
    if args.use_lpl:
        gate = lpl_gate(args)
        share = plan.schedule.gated_share(gate)
        print_lpl_plan(args, gate, share, "--lpl_t_threshold 200", vae, say)
    print_memory(memory_estimate(args, denoiser, vae, plan.dtype), denoiser, accelerator)
    return report


# ---------------------------------------------------------------------------------------------------------------------
# The run


def prepare_recipe(args, accelerator, schedule, dtype, data):
    """(recipe, autoencoder or None): everything but the models that are trained, loaded."""
    index = model_file(args.pretrained_model_name_or_path, "model_index.json", args.revision)
    empty_is_zero = read_json(index).get("force_zeros_for_empty_prompt", True)
    empty = data.prompt("")
    if empty_is_zero and not args.train_text_encoder:
        empty = {name: torch.zeros_like(value) for name, value in empty.items()}
    return build_recipe(args, accelerator, schedule, dtype, empty, empty_is_zero, lpl_gate(args), data)


def main(args, scan, held_out=()):
    """The run, from the plan to the published model."""
    accelerator = start_accelerator(args)
    resume_from = checkpoint_to_resume(args, accelerator)
    plan = plan_run(args, accelerator, Schedule(args), len(scan.images), resume_from)
    report = check_and_print_plan(args, scan, held_out, plan, accelerator)
    if args.dry_run:
        return
    folder = open_output_dir(args, accelerator, plan.resume_from, report, check_access)
    with folder, StopSignals(accelerator) as signals:
        is_done = train(args, scan.images, held_out, plan, accelerator, signals)
    end(accelerator)
    if not (is_done and args.push_to_hub and accelerator.is_main_process):
        return
    if signals.requested is not None:
        tell_how_to_publish(args.output_dir, args.hub_model_id, args.hub_private_repo)
    else:
        publish_or_exit(args.output_dir, args.hub_model_id, args.hub_token, args.hub_private_repo)


def train(args, images, held_out, plan, accelerator, signals):
    """Everything that needs the weights, up to the result on disk; returns whether it came to its end."""
    data = fill_caches(args, images, held_out, plan.dtype, accelerator)
    recipe, vae = prepare_recipe(args, accelerator, plan.schedule, plan.dtype, data)
    bare_denoiser = build_denoiser(args, plan.dtype, home(accelerator))
    if args.scale_lr:
        args.learning_rate *= plan.batch_size
        args.text_encoder_lr = args.text_encoder_lr and args.text_encoder_lr * plan.batch_size
    optimizer = build_optimizer(args, parameter_groups(bare_denoiser, args))
    lr_scheduler = build_lr_scheduler(args, optimizer, plan.total_steps)
    denoiser, optimizer = prepare(accelerator, bare_denoiser, optimizer)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    ema = build_ema(args, parameters)
    state = TrainingState(optimizer, lr_scheduler, accelerator.scaler, ema, recipe.auto_weight, run_identity(args))
    together = is_sharded(accelerator)  # drawing and saving are for all ranks, not the first alone
    takes_part = accelerator.is_main_process or together
    recipe.broken_off = lambda: signals.requested is not None and not together
    gallery = Gallery(args, lambda: draw(bare_denoiser, vae, data, recipe), accelerator.is_main_process)
    if takes_part and args.validation_compare:
        gallery.draw_start()
    first_step = 0
    if plan.resume_from is not None:
        load_weights(plan.resume_from, bare_denoiser, args)
        first_step = state.load(plan.resume_from)
        accelerator.print(f"Resumed from {plan.resume_from} at step {first_step}")
        if first_step >= plan.total_steps:
            accelerator.print(f"--max_train_steps {plan.total_steps} is reached already: saving the result once more")
    guard = recipe.guard
    clock = CheckpointClock(args.checkpointing_steps, args.checkpointing_minutes)
    reporter = Reporter(args, accelerator, "SDXL", metric_names(args), first_step)
    metrics = reporter.metrics

    def measure_held_out():
        measure = functools.partial(held_out_step, denoiser=bare_denoiser, recipe=recipe)
        with evaluation(bare_denoiser):
            return held_out_losses(data, recipe, accelerator, conditioning, measure)

    def validate(step):
        if not held_out and not args.validation_prompt:
            return
        with signals.unhurried(), reporter.paused(), averaged_weights(ema, parameters):
            if held_out and (losses := measure_held_out()):
                reporter.log(step, losses)
            if args.validation_prompt and takes_part:
                reporter.log_images(gallery.draw(step), step)
            reporter.draw_run()

    def write_checkpoint(step):
        trained = gathered(bare_denoiser, accelerator.is_main_process)
        save_checkpoint(
            args.output_dir, step, state, lambda folder: save_weights(folder, trained, args),
            args.checkpoints_total_limit, accelerator.is_main_process,
        )  # fmt: skip

    def save(step):
        with signals.unhurried():
            if takes_part:
                write_checkpoint(step)
        clock.saved()

    validation_due = validation_schedule(args, len(images), plan.batch_size)
    loader = contextlib.closing(batches(args, data, accelerator, first_step, plan.total_steps))
    if first_step == 0:
        validate(0)
    done = first_step
    bar = tqdm(range(first_step, plan.total_steps), initial=first_step, total=plan.total_steps, desc="training",
               disable=not accelerator.is_local_main_process)  # fmt: skip
    with loader as micro_batches:
        for step in bar:
            signals.step_began()
            before = metrics.snapshot()
            parts = torch.zeros(2, device=accelerator.device)  # diffusion loss and LPL term, for the auto weight
            for micro_step in range(args.gradient_accumulation_steps):
                last = micro_step + 1 == args.gradient_accumulation_steps
                with sync_gradients(accelerator, denoiser, last):
                    loss, micro_parts = training_step(next(micro_batches), denoiser, recipe, step, metrics)
                    accelerator.backward(loss)
                parts += micro_parts / args.gradient_accumulation_steps
            done = step + 1
            wishes = (signals.requested is not None, accelerator.is_main_process and clock.late())
            finite, stop, late = optimize(
                args, accelerator, optimizer, lr_scheduler, ema, parameters, metrics, guard, done, wishes
            )
            if not finite:
                metrics.restore(before)
            elif recipe.auto_weight is not None and step >= args.lpl_start:
                recipe.auto_weight.update(*accelerator.reduce(parts, "mean"))
            rates = learning_rates(optimizer) | guard.counts()
            reporter.step(done, plan.batch_size, rates, bar, last=stop or done == plan.total_steps)
            if stop:
                signals.reached()
            if late or clock.due(done) or (stop and done < plan.total_steps):
                save(done)
            if stop and done < plan.total_steps:
                break
            if validation_due(done) and done < plan.total_steps:
                validate(done)
    signals.ending()
    del denoiser
    if done < plan.total_steps:
        reporter.stopped(done)
        return False
    if takes_part:
        last = None if together else lambda: write_checkpoint(done)
        with kept_if_unwritten(last), averaged_weights(ema, parameters):
            trained = gathered(bare_denoiser, accelerator.is_main_process)
            if accelerator.is_main_process:
                save_result(args, trained, plan.schedule)
    validate(done)
    if accelerator.is_main_process:
        card = model_card(args, "sdxl", plan.total_steps, plan.batch_size, len(images), lpl_gate(args))
        write_card(Path(args.output_dir), card)
    reporter.finish()
    return True


if __name__ == "__main__":
    with errors_for_people(ARGS.debug):
        main(ARGS, SCAN, HELD_OUT)
