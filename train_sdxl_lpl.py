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
import functools
from pathlib import Path

from lpl_finetuning.adapters import check_adapters
from lpl_finetuning.base_model import check_base_model, lora_layers
from lpl_finetuning.errors import require
from lpl_finetuning.families import SDXL
from lpl_finetuning.flag_checks import check_flags
from lpl_finetuning.flags import (
    REPOSITORY,
    FlagParser,
    add_data_arguments,
    add_lpl_arguments,
    add_model_arguments,
    add_run_arguments,
    add_training_arguments,
    encoding_settings,
    input_path,
)
from lpl_finetuning.results.hub import check_publishing
from lpl_finetuning.start import early, run_main
from lpl_finetuning.training.checkpoint_folders import check_resume

EMBEDDED_DEFAULT = REPOSITORY / "examples" / "tiny-sdxl" / "train.yaml"
SAMPLING_STEPS = 25  # of the validation pictures


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
        type=input_path,
        help="another UNet: a folder or Hub name with its config.json, or with unet/",
    )
    add("--prediction_type", choices=("epsilon", "v_prediction", "sample"), help="default: the base model's")
    add("--rescale_betas_zero_snr", action="store_true", default=None, help="train at zero terminal SNR, for "
        "v-prediction; --no-rescale_betas_zero_snr: not (default: the base model's)")  # fmt: skip
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
    check_flags(args, SDXL)
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
    args = args.but(base_model=check_base_model(args, SDXL))
    check_adapters(args, SDXL)
    check_resume(args)
    return args


RUN = early(__name__, parse_args)

import torch
from diffusers import DDPMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from lpl_finetuning.data import encoding
from lpl_finetuning.data.encoding import encode_images, model_identity, rows_of
from lpl_finetuning.results.export import checkpoint_exporter, save_result
from lpl_finetuning.results.hub import check_access, model_card, publish_result, write_card
from lpl_finetuning.training.checkpoints import Checkpoints
from lpl_finetuning.training.models import (
    decode_latents,
    latent_channels,
    latent_space,
    load_denoiser,
    load_part,
    load_part_config,
    load_pipeline,
    load_text_encoder,
    load_vae,
    load_weights,
    prepare_for_training,
    save_weights,
)
from lpl_finetuning.training.objective import (
    build_objective,
    choose_prompts,
    sample_latents,
    sample_timesteps,
    seed_lora_dropout,
)
from lpl_finetuning.training.optimization import Trainee, optimizer_settings
from lpl_finetuning.training.out_of_memory import explained_if_out_of_memory
from lpl_finetuning.training.perceptual import gate_from_flags, lpl_dtype, lpl_stages, needs_decoder
from lpl_finetuning.training.plan import check_data, plan_run, print_plan
from lpl_finetuning.training.reporter import Reporter, fine_tuning
from lpl_finetuning.training.run import check_start, end, open_batches, open_output_dir, start_accelerator
from lpl_finetuning.training.sharding import build_device, with_full_weights
from lpl_finetuning.training.signals import StopSignals
from lpl_finetuning.training.step_memory import RunCode, autoencoder_networks
from lpl_finetuning.training.transfer import to_device
from lpl_finetuning.training.validation import Validation
from lpl_utils import estimate_z0, noise_to_signal

# ---------------------------------------------------------------------------------------------------------------------
# The noise schedule


class Schedule:
    """SDXL's discrete noise schedule: levels, timestep distribution and weights, all on the CPU."""

    def __init__(self, args):
        scheduler = load_part(args.base_model, DDPMScheduler, "scheduler")
        abar = scheduler.alphas_cumprod.double()
        self.alphas, self.sigmas = abar.sqrt().float(), (1 - abar).clamp_min(0).sqrt().float()
        self.prediction_type = args.prediction_type or scheduler.config.prediction_type
        self.snr_gamma = args.snr_gamma
        self.weights_losses = args.snr_gamma is not None
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

    def describe(self):
        """The schedule in a few words."""
        return f"{self.prediction_type} prediction" + ", zero terminal SNR" * bool(self.alphas[-1] < 1e-3)

    def threshold_for(self, share, by_timestep):
        """The flag with a threshold that would take a share of the samples."""
        timestep = int(torch.searchsorted(self.cumulative, share)) + 1
        if by_timestep:
            return f"--lpl_t_threshold {timestep}"
        return f"--lpl_sigma_threshold {noise_to_signal(*self.levels(torch.tensor(timestep))):.2f}"


# ---------------------------------------------------------------------------------------------------------------------
# Models


def load_tokenizers(args):
    """Both tokenizers."""
    return [load_part(args.base_model, CLIPTokenizer, "tokenizer" + suffix) for suffix in ("", "_2")]


TEXT_ENCODERS = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}


def load_text_encoders(args, dtype, device):
    """Both text encoders, frozen."""
    return [load_text_encoder(args.base_model, cls, name, dtype, device) for name, cls in TEXT_ENCODERS.items()]


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
    """The models to train; on the meta device without weights, for counting. Trainable parameters are float32."""
    unet = load_denoiser(args, UNet2DConditionModel, dtype, device)
    place = "meta" if device == "meta" else "cpu"
    text_encoders = load_text_encoders(args, dtype, place) if args.train_text_encoder else ()
    torch.manual_seed(args.seed)  # the LoRA's initial weights
    denoiser = Denoiser(unet, text_encoders)
    denoiser = prepare_for_training(args, denoiser, StableDiffusionXLPipeline, lora_targets(args), device)
    if args.train_text_encoder:  # SDXL reads the first encoder before its last layer, which gets no gradient
        text_model = getattr(denoiser.text_encoder, "text_model", denoiser.text_encoder)
        text_model.encoder.layers[-1].requires_grad_(False)
    return denoiser


def lora_targets(args):
    """Layers of the UNet that get a LoRA, in the blocks of --lora_blocks."""
    return lora_layers(args, SDXL)


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
    config = load_part_config(args.base_model, UNet2DConditionModel, "unet")
    pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
    return (77 * config["cross_attention_dim"] + pooled) * dtype.itemsize


def fill_caches(args, images, held_out, dtype, accelerator):
    """The `RunData` of a run, with everything in its stores that was missing.

    Where the text encoders are trained, the prompts are stored as tokens.
    """
    tokenizers = functools.cache(lambda: load_tokenizers(args))
    text_encoders = functools.cache(lambda: load_text_encoders(args, dtype, accelerator.device))
    vae = functools.cache(lambda: load_vae(args.base_model, torch.float32, accelerator.device))
    if args.train_text_encoder:
        prompt_id = {"kind": "sdxl tokens", "model": model_identity(args.base_model, "tokenizer", "tokenizer_2")}
    else:
        prompt_id = {
            "kind": "sdxl prompts",
            "model": model_identity(args.base_model, *SDXL.text_encoders, *SDXL.tokenizers),
            "dtype": str(dtype),
        }

    def encode(captions):
        if args.train_text_encoder:
            return rows_of(tokenize(captions, tokenizers()))
        return encode_prompts(captions, tokenizers(), text_encoders())

    def encode_latents(cuts):
        text_encoders.cache_clear()  # one model at a time
        return encode_images(cuts, vae())

    return encoding.fill_caches(
        encoding_settings(args), images, held_out, accelerator, prompt_id, prompt_bytes(args, dtype),
        latent_channels(args.base_model), encode, encode_latents,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# The training step


def conditioning(batch, objective, dropout):
    """(prompt, time_ids) for `Denoiser`; a share `dropout` of the prompts is replaced by the unconditional one."""
    return choose_prompts(batch, objective, dropout), to_device(batch["time_ids"], objective.device)


def denoise(denoiser, latents, noise, timesteps, conditions, objective):
    """One forward pass: (squared error of each sample (B,), model_pred (B, 4, h, w), noisy_latents (B, 4, h, w))."""
    alpha, sigma = to_device(torch.stack(objective.schedule.levels(timesteps)), objective.device).view(2, -1, 1, 1, 1)
    noisy_latents = alpha * latents + sigma * noise
    model_pred = denoiser(noisy_latents.to(objective.dtype), to_device(timesteps, objective.device), *conditions)
    target = objective.schedule.target(latents, noise, alpha, sigma)
    return (model_pred.float() - target).square().mean(dim=(1, 2, 3)), model_pred, noisy_latents


def training_step(batch, denoiser, objective, step, metrics):
    """One micro-step: (objective, a scalar with gradient; [diffusion loss, LPL terms, gated samples], detached).

    loss = diffusion + sum over networks of weight * (1 / B) * sum over gated samples of s_b * LPL_b
    """
    numbers = batch["number"]
    latents = sample_latents(batch, objective)
    noise = to_device(batch["noise"], objective.device)
    timesteps = sample_timesteps(numbers, latents, objective)
    conditions = conditioning(batch, objective, objective.settings.proportion_empty_prompts)
    seed_lora_dropout(numbers, objective)

    errors, model_pred, noisy_latents = denoise(denoiser, latents, noise, timesteps, conditions, objective)
    objective.guard.watch("diffusion loss", errors, batch["index"])
    if objective.schedule.weights_losses:
        errors = to_device(objective.schedule.loss_weights(timesteps), objective.device) * errors
    diffusion_loss = errors.mean()
    lpl_terms, gated = (), 0
    if objective.lpl_applies(step):
        tensors = model_pred, noisy_latents, latents
        lpl_terms, gated = objective.perceptual_terms(perceptual_loss, tensors, timesteps, batch, metrics)
    loss = objective.total(diffusion_loss, lpl_terms, step, metrics)
    return loss, torch.stack([diffusion_loss, *lpl_terms, torch.full_like(diffusion_loss, gated)]).detach()


def perceptual_loss(model_pred, noisy_latents, latents, timesteps, objective):
    """LPL between the estimate of z_0 and z_0 itself, an `OutputOfNetworks`; tensors (B, C, h, w)."""
    alpha, sigma = to_device(torch.stack(objective.schedule.levels(timesteps)), objective.device)
    z0_pred = estimate_z0(model_pred, noisy_latents, alpha, sigma, objective.schedule.prediction_type)
    return objective.perceptual.loss(z0_pred, latents)


# ---------------------------------------------------------------------------------------------------------------------
# Validation


def held_out_step(conditions, latents, noise, timesteps, with_lpl, denoiser, objective):
    """(diffusion losses (B,), LPL (B,) or None) of held-out images at given noise and timesteps."""
    errors, model_pred, noisy_latents = denoise(denoiser, latents, noise, timesteps, conditions, objective)
    if not with_lpl:
        return errors, None
    return errors, perceptual_loss(model_pred, noisy_latents, latents, timesteps, objective).per_sample


def held_out_functions():
    """The functions that measure held-out images."""
    return conditioning, held_out_step, denoise


def sampling_pipeline(denoiser, args, vae, schedule):
    """The pipeline that samples the validation prompts, from embeddings: without text encoders."""
    import diffusers

    config = load_part_config(args.base_model, DDPMScheduler, "scheduler")
    scheduler = getattr(diffusers, config["_class_name"]).from_config(config, prediction_type=schedule.prediction_type)
    text_parts = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    return StableDiffusionXLPipeline(
        vae=vae, unet=denoiser.unet, scheduler=scheduler, add_watermarker=False, **text_parts
    )


# ---------------------------------------------------------------------------------------------------------------------
# The run


def lpl_gate(args):
    """Which samples get the loss; with no threshold given: t < 200, a fifth of uniform timesteps."""
    return gate_from_flags(args, t_threshold=200)


def example_batch(denoiser, args, size, dtype):
    """A micro-batch of latents of `size`, (h, w), as the loader gives it: what the count of the memory runs."""
    batch, config = args.train_batch_size, denoiser.unet.config
    if args.train_text_encoder:
        prompt = {"input_ids": torch.zeros(batch, 77, dtype=torch.long)}
        prompt["input_ids_2"] = prompt["input_ids"]
    else:
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        prompt = {
            "prompt_embeds": torch.zeros(batch, 77, config.cross_attention_dim, dtype=dtype),
            "pooled_prompt_embeds": torch.zeros(batch, pooled, dtype=dtype),
        }
    numbers, latents = torch.arange(batch).numpy(), torch.zeros(batch, config.in_channels, *size)
    time_ids = torch.zeros(batch, 6)
    return {"number": numbers, "index": numbers, "mean": latents, "std": latents, "time_ids": time_ids} | prompt


def prepare_objective(args, accelerator, plan, data):
    """(`Objective`, autoencoder or None). The autoencoder serves the loss, measuring it, and sampling pictures."""
    empty_is_zero = args.base_model.index().get("force_zeros_for_empty_prompt", True)
    empty = data.prompt("")
    if empty_is_zero and not args.train_text_encoder:
        empty = {name: torch.zeros_like(value) for name, value in empty.items()}
    base, vae, measured = args.base_model, None, args.use_lpl or len(data.held_out)
    if needs_decoder(args, measured):
        vae = load_vae(base, lpl_dtype(args, accelerator.mixed_precision), accelerator.device)
    encoder = None if data.cached else load_vae(base, torch.float32, accelerator.device)
    stages = lpl_stages(args, vae, accelerator) if measured else None
    objective = build_objective(
        args, accelerator, plan, data, latent_space(base), stages, encoder, empty, empty_is_zero, lpl_gate(args)
    )
    return objective, vae


def result_pipeline(args, schedule, **trained):
    """The whole pipeline as it is saved. trained: parts that take the place of the base model's."""
    pipeline = load_pipeline(args.base_model, StableDiffusionXLPipeline, **trained)
    pipeline.scheduler.register_to_config(prediction_type=schedule.prediction_type)
    return pipeline


def main(args, scan, held_out=()):
    """The run, from the plan to the published model."""
    accelerator = start_accelerator(args)
    plan = plan_run(args, accelerator, Schedule(args), len(scan.images))
    report = check_data(args, scan, held_out, load_tokenizers(args), accelerator)
    code = RunCode(build_denoiser, training_step, example_batch, autoencoder_networks, held_out_functions())
    peaks = print_plan(args, report, accelerator, plan, lpl_gate(args), code)
    if args.dry_run:
        return check_start(args, accelerator, check_access)
    output_dir = open_output_dir(args, accelerator, plan.resume_from, report, check_access)
    explained = explained_if_out_of_memory(args, accelerator, peaks)
    with output_dir as hub_name, explained, StopSignals(accelerator) as signals:
        is_done = train(args, scan.images, held_out, plan, accelerator, signals, hub_name)
    end(accelerator)
    if is_done and hub_name:
        publish_result(args, hub_name, stopped=signals.requested is not None)


def train(args, images, held_out, plan, accelerator, signals, hub_name):
    """Everything that needs the weights, up to the result on disk; returns whether it came to its end."""
    data = fill_caches(args, images, held_out, plan.dtype, accelerator)
    objective, vae = prepare_objective(args, accelerator, plan, data)
    denoiser = build_denoiser(args, plan.dtype, build_device(accelerator))
    settings = optimizer_settings(args, plan.batch_size)
    trainee = Trainee(settings, accelerator, denoiser, plan.total_steps, objective.guard)
    checkpoints = Checkpoints(
        args, accelerator, trainee, objective, signals,
        save_weights=lambda folder, denoiser: save_weights(folder, denoiser, StableDiffusionXLPipeline, args.use_lora),
        load_weights=lambda folder, denoiser: load_weights(folder, denoiser, args.use_lora),
        save_more=checkpoint_exporter(args, images, plan),
    )  # fmt: skip
    subject = fine_tuning(args, objective.stage_names)
    reporter = Reporter(args, accelerator, subject, plan.first_step, plan.total_steps)
    pipeline = functools.partial(sampling_pipeline, args=args, vae=vae, schedule=plan.schedule)
    sampling = pipeline, functools.partial(decode_latents, vae), SAMPLING_STEPS
    validation = Validation(args, accelerator, trainee, objective, data, reporter, signals, sampling,
                            held_out_functions())  # fmt: skip
    done = checkpoints.resume(plan.resume_from, plan.total_steps)
    if done == 0:
        validation.run(0)
    with open_batches(args, data, accelerator, objective, done, plan.total_steps) as micro_batches:
        for step in reporter.steps():
            signals.step_began()
            for batch in trainee.micro_steps(micro_batches):
                loss, terms = training_step(batch, trainee.denoiser, objective, step, reporter.metrics)
                trainee.backward(loss, terms)
            done, wishes = step + 1, (signals.requested is not None, checkpoints.late())
            outcome = trainee.step(done, wishes, reporter.metrics)
            if outcome.made:
                objective.update_lpl_weight(step, trainee.terms, accelerator)
            reporter.step(done, outcome, plan.batch_size, trainee.log_values())
            if outcome.stop:
                signals.stop_watchdog()
            if checkpoints.due(done, outcome, plan.total_steps):
                checkpoints.save(done)
            if outcome.stop and done < plan.total_steps:
                break
            if validation.due(done) and done < plan.total_steps:
                validation.run(done)
    signals.loop_ended()
    trainee.release()
    if done < plan.total_steps:
        reporter.stopped(done)
        return False
    if checkpoints.writes_here:
        with checkpoints.kept_if_unwritten(done), trainee.averaged():
            whole = with_full_weights(denoiser, accelerator.is_main_process)
            if accelerator.is_main_process:
                result = functools.partial(result_pipeline, args, plan.schedule)
                save_result(args, whole, StableDiffusionXLPipeline, result, images, plan, done)
    validation.run(done)
    if accelerator.is_main_process:
        card = model_card(args, done, plan.batch_size, len(images), lpl_gate(args), hub_name)
        write_card(Path(args.output_dir), card)
    reporter.finish()
    return True


run_main(main, RUN)
