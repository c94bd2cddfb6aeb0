"""Fine-tune Stable Diffusion 3 and 3.5 with the latent perceptual loss (LPL): the whole transformer or a LoRA.

    accelerate launch train_sd3_lpl_flow.py --use_lpl                   # a complete demonstration on two CPU cores

    accelerate launch train_sd3_lpl_flow.py --use_lpl --use_lora --rank 16 --mixed_precision bf16 \\
        --pretrained_model_name_or_path stabilityai/stable-diffusion-3.5-medium --train_data_dir my-pictures \\
        --resolution 1024 --gradient_checkpointing --center_crop --max_train_steps 2000 --output_dir my-lora \\
        --validation_prompt "a photo of my dog on the beach"

The method, top to bottom: `encode_prompts` and `encode_images` fill the caches, `training_step` is one step of the
paper, `main` is the loop. Symbols: z_0 clean latents as the transformer sees them, z_t = (1 - sigma) z_0 + sigma eps
(rectified flow; sigma = 1 is pure noise), timesteps 1000 sigma, B batch, (B, 16, h, w) latents. Timesteps, noise
levels and gates live on the CPU, so that the loop never waits for the device. The SDXL recipe has the same names in
the same order.
"""

# ruff: noqa: E402  (flags and data are checked before the slow imports)
import functools
import math
from pathlib import Path

from lpl_finetuning.adapters import check_adapters
from lpl_finetuning.base_model import check_base_model, lora_layers
from lpl_finetuning.errors import require
from lpl_finetuning.families import SD3
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
    shift_or_auto,
)
from lpl_finetuning.results.hub import check_publishing
from lpl_finetuning.start import early, run_main
from lpl_finetuning.training.checkpoint_folders import check_resume

EMBEDDED_DEFAULT = REPOSITORY / "examples" / "tiny-sd3" / "train.yaml"
SAMPLING_STEPS = 28  # of the validation pictures
MOST_TOKENS = 512  # of T5; diffusers' pipeline refuses more


def build_parser():
    """All flags of the recipe."""
    parser = FlagParser(__doc__)
    add_model_arguments(parser)
    add_data_arguments(parser, resolution=512)
    add_training_arguments(parser, train_batch_size=4, num_train_epochs=1, adam_weight_decay=1e-4)
    group = parser.add_argument_group("diffusion")
    add = group.add_argument
    add("--pretrained_transformer_model_name_or_path", type=input_path,
        help="another transformer: a folder or Hub name with its config.json, or with transformer/")  # fmt: skip
    add("--max_sequence_length", type=int, default=77, help="tokens for T5 (default: %(default)s)")
    add("--weighting_scheme", choices=("logit_normal", "mode", "sigma_sqrt", "cosmap", "none"), default="logit_normal",
        help="how noise levels are drawn (logit_normal, mode; else uniformly) or weighted (sigma_sqrt, cosmap), "
        "as in the SD3 paper (default: %(default)s)")  # fmt: skip
    add("--logit_mean", type=float, default=0.0,
        help="of logit_normal; above 0 means less noise (default: %(default)s)")  # fmt: skip
    add("--logit_std", type=float, default=1.0, help="of logit_normal (default: %(default)s)")
    add("--mode_scale", type=float, default=1.29, help="of mode (default: %(default)s)")
    add("--precondition_outputs", type=int, choices=(0, 1), default=0,
        help="1 weights the loss by sigma^2: the loss of the estimate of z_0 (default: %(default)s)")  # fmt: skip
    add("--timestep_shift", type=shift_or_auto, metavar="{auto,NUMBER}",
        help="moves noise levels up (default: the scheduler's; auto: that times resolution / 1024)")  # fmt: skip
    add_lpl_arguments(parser)
    add_run_arguments(parser, validation_epochs=50)
    return parser


def parse_args(argv=None):
    """The flags of a run, checked; UserError names the flag that is wrong."""
    args = build_parser().parse(argv, embedded_default=EMBEDDED_DEFAULT)
    check_flags(args, SD3)
    require(1 <= args.max_sequence_length <= MOST_TOKENS, f"--max_sequence_length is {args.max_sequence_length}; it "
            f"must lie between 1 and {MOST_TOKENS}, the most that the pipeline takes")  # fmt: skip
    require(args.logit_std > 0, f"--logit_std is {args.logit_std}; it must be above 0")
    require(-1 <= args.mode_scale <= 2 / (math.pi - 2),
            f"--mode_scale is {args.mode_scale}; it must lie between -1 and {2 / (math.pi - 2):.3f}, where noise "
            "levels stay in order")  # fmt: skip
    check_publishing(args)
    args = args.but(base_model=check_base_model(args, SD3))
    check_adapters(args, SD3)
    check_resume(args)
    return args


RUN = early(__name__, parse_args)

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import AutoTokenizer, CLIPTextModelWithProjection, T5EncoderModel

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
    """Rectified flow: noise levels, their distribution and weights, all on the CPU.

    A uniform number is turned into u by --weighting_scheme; the level before the shift is 1 - u, so that a positive
    --logit_mean means less noise; the shift s gives sigma = s (1 - u) / (1 + (s - 1) (1 - u)) (SD3 paper, eq. 23).
    """

    prediction_type = "flow"

    def __init__(self, args):
        self.args = args
        scheduler = load_part(args.base_model, FlowMatchEulerDiscreteScheduler, "scheduler")
        self.weights_losses = args.weighting_scheme in ("sigma_sqrt", "cosmap") or bool(args.precondition_outputs)
        self.own_shift = scheduler.config.shift
        self.shift = self.shift_at(args.resolution)

    def shift_at(self, resolution):
        """The shift of images of a resolution, in px, which --timestep_shift auto takes into account."""
        if self.args.timestep_shift == "auto":
            return self.own_shift * resolution / 1024
        return self.own_shift if self.args.timestep_shift is None else self.args.timestep_shift

    def draw_timesteps(self, uniform, resolution=None):
        """(B,) timesteps, float32, for uniform numbers in [0, 1), by the inverse of the distribution.

        resolution: of the images in px, sqrt(height * width); default: --resolution.
        """
        args, uniform = self.args, torch.as_tensor(uniform, dtype=torch.float64)
        shift = self.shift_at(resolution or args.resolution)
        if args.weighting_scheme == "logit_normal":
            u = torch.sigmoid(args.logit_mean + args.logit_std * torch.special.ndtri(uniform))
        elif args.weighting_scheme == "mode":
            u = 1 - uniform - args.mode_scale * (torch.cos(math.pi * uniform / 2) ** 2 - 1 + uniform)
        else:
            u = uniform
        sigmas = (1 - u).clamp(1e-3, 1)  # the scheduler's lowest level
        return (1000 * shift * sigmas / (1 + (shift - 1) * sigmas)).float()

    def held_out_timesteps(self, count):
        """(count,) the middles of as many equal parts of all timesteps."""
        return (torch.arange(count) + 0.5) * 1000 / count

    def levels(self, timesteps):
        """alpha, sigma: (B,) float32."""
        sigmas = timesteps / 1000
        return 1 - sigmas, sigmas

    def loss_weights(self, timesteps):
        """(B,) weights of the velocity's loss: of the scheme (SD3 paper, section 3.1), and of the preconditioning."""
        sigmas, weights = timesteps / 1000, torch.ones(len(timesteps))
        if self.args.weighting_scheme == "sigma_sqrt":
            weights = sigmas**-2
        elif self.args.weighting_scheme == "cosmap":
            weights = 2 / (math.pi * (1 - 2 * sigmas + 2 * sigmas**2))
        return weights * sigmas**2 if self.args.precondition_outputs else weights

    def target(self, latents, noise):
        """What the transformer should return: the velocity eps - z_0, (B, 16, h, w)."""
        return noise - latents

    def describe(self):
        """The schedule in a few words."""
        return f"rectified flow, {self.args.weighting_scheme}, shift {self.shift:g}"

    def typical_timesteps(self):
        """(100000,) timesteps with exactly the distribution's quantiles."""
        return self.draw_timesteps((torch.arange(100000) + 0.5) / 100000)

    def gated_share(self, gate):
        """Expected share of samples that get LPL, from the distribution of timesteps."""
        timesteps = self.typical_timesteps()
        return gate(timesteps, noise_to_signal(*self.levels(timesteps))).double().mean().item()

    def threshold_for(self, share, by_timestep):
        """The flag with a threshold that would take a share of the samples."""
        level = self.typical_timesteps().quantile(share)
        if by_timestep:
            return f"--lpl_t_threshold {math.ceil(level)}"
        return f"--lpl_sigma_threshold {math.ceil(100 * noise_to_signal(*self.levels(level))) / 100:g}"


# ---------------------------------------------------------------------------------------------------------------------
# Models


def load_tokenizers(args):
    """Two CLIP tokenizers, and T5's where the pipeline has it."""
    names = ["tokenizer", "tokenizer_2"] + ["tokenizer_3"] * args.base_model.has("text_encoder_3")
    tokenizers = [load_part(args.base_model, AutoTokenizer, name) for name in names]
    for tokenizer, length in zip(tokenizers, (77, 77, args.max_sequence_length), strict=False):
        tokenizer.model_max_length = length
    return tokenizers


TEXT_ENCODERS = {"text_encoder": CLIPTextModelWithProjection, "text_encoder_2": CLIPTextModelWithProjection}


def load_text_encoders(args, dtype, device):
    """Both CLIP text encoders, frozen."""
    return [load_text_encoder(args.base_model, cls, name, dtype, device) for name, cls in TEXT_ENCODERS.items()]


def load_t5(args, dtype, device):
    """The third text encoder, frozen; None where the pipeline has none."""
    base, part = args.base_model, "text_encoder_3"
    return load_text_encoder(base, T5EncoderModel, part, dtype, device) if base.has(part) else None


class Denoiser(torch.nn.Module):
    """The transformer, and the CLIP text encoders where they are trained too: one module for all gradients."""

    def __init__(self, transformer, text_encoders=()):
        super().__init__()
        self.transformer = transformer
        self.text_encoder, self.text_encoder_2 = text_encoders or (None, None)

    def models(self):
        """{name in diffusers: model}"""
        return dict(self.named_children())

    def embed(self, prompt):
        """Prompt embeddings from {"input_ids", "input_ids_2" (B, 77), "t5_embeds" (B, S, D)}."""
        encoders = [self.text_encoder, self.text_encoder_2]
        clip_embeds, pooled = embed_tokens([prompt["input_ids"], prompt["input_ids_2"]], encoders)
        return {"prompt_embeds": join_embeds(clip_embeds, prompt["t5_embeds"]), "pooled_prompt_embeds": pooled}

    def forward(self, noisy_latents, timesteps, prompt):
        """The transformer's output (B, 16, h, w). prompt: embeddings, or what `embed` takes."""
        if self.text_encoder is not None:
            prompt = self.embed(prompt)
        return self.transformer(
            noisy_latents, prompt["prompt_embeds"], prompt["pooled_prompt_embeds"], timesteps
        ).sample


def build_denoiser(args, dtype, device):
    """The models to train; on the meta device without weights, for counting. Trainable parameters are float32."""
    transformer = load_denoiser(args, SD3Transformer2DModel, dtype, device)
    place = "meta" if device == "meta" else "cpu"
    text_encoders = load_text_encoders(args, dtype, place) if args.train_text_encoder else ()
    torch.manual_seed(args.seed)  # the LoRA's initial weights
    denoiser = Denoiser(transformer, text_encoders)
    denoiser = prepare_for_training(args, denoiser, StableDiffusion3Pipeline, lora_targets(args), device)
    return denoiser


def lora_targets(args):
    """Layers of the transformer that get a LoRA, in the blocks of --lora_blocks."""
    return lora_layers(args, SD3)


# ---------------------------------------------------------------------------------------------------------------------
# Encoding, once, into caches on disk


def tokenize(captions, tokenizers):
    """{"input_ids", "input_ids_2" (N, 77)}, int64, for the two CLIP text encoders."""
    ids = [
        tokenizer(captions, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
        for tokenizer in tokenizers[:2]
    ]
    return {"input_ids": ids[0], "input_ids_2": ids[1]}


def embed_tokens(input_ids, encoders):
    """CLIP's share of a prompt: (hidden states before the last layers, side by side (N, 77, C); pooled (N, P))."""
    outputs = [
        encoder(ids.to(encoder.device), output_hidden_states=True)
        for ids, encoder in zip(input_ids, encoders, strict=True)
    ]
    hidden = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
    return hidden, torch.cat([output[0] for output in outputs], dim=-1)


def embed_t5(captions, tokenizers, t5, args, width):
    """T5's share of a prompt, (N, S, width) with S = --max_sequence_length; zeros without T5, as in the pipeline."""
    if t5 is None:
        return torch.zeros(len(captions), args.max_sequence_length, width)
    ids = tokenizers[2](
        captions, padding="max_length", max_length=args.max_sequence_length, truncation=True, return_tensors="pt"
    ).input_ids
    return t5(ids.to(t5.device))[0]


def join_embeds(clip_embeds, t5_embeds):
    """The prompt as the transformer sees it, (N, 77 + S, D): CLIP's part padded to T5's width, then T5's."""
    clip_embeds = torch.nn.functional.pad(clip_embeds, (0, t5_embeds.shape[-1] - clip_embeds.shape[-1]))
    return torch.cat([clip_embeds, t5_embeds.to(clip_embeds.dtype)], dim=-2)


@torch.no_grad()
def encode_prompts(captions, tokenizers, encoders, t5, args):
    """[{"prompt_embeds" (77 + S, D), "pooled_prompt_embeds" (P,)}] of captions, on the CPU."""
    width = load_part_config(args.base_model, SD3Transformer2DModel, "transformer")["joint_attention_dim"]
    t5_embeds = embed_t5(captions, tokenizers, t5, args, width)
    if not encoders:  # they are trained: only T5's part is fixed
        return rows_of(tokenize(captions, tokenizers) | {"t5_embeds": t5_embeds.cpu()})
    clip_embeds, pooled = embed_tokens(tokenize(captions, tokenizers).values(), encoders)
    prompt_embeds = join_embeds(clip_embeds.cpu(), t5_embeds.cpu())
    return rows_of({"prompt_embeds": prompt_embeds, "pooled_prompt_embeds": pooled.cpu()})


def prompt_bytes(args, dtype):
    """Bytes of an encoded prompt."""
    config, length = load_part_config(args.base_model, SD3Transformer2DModel, "transformer"), args.max_sequence_length
    if args.train_text_encoder:
        return 2 * 77 * 8 + length * config["joint_attention_dim"] * dtype.itemsize
    return ((77 + length) * config["joint_attention_dim"] + config["pooled_projection_dim"]) * dtype.itemsize


def fill_caches(args, images, held_out, dtype, accelerator):
    """The `RunData` of a run, with everything in its stores that was missing.

    Where the CLIP text encoders are trained, the prompts are stored as tokens, with T5's embeddings.
    """
    device = accelerator.device
    tokenizers = functools.cache(lambda: load_tokenizers(args))
    text_encoders = functools.cache(lambda: () if args.train_text_encoder else load_text_encoders(args, dtype, device))
    t5 = functools.cache(lambda: load_t5(args, dtype, device))
    vae = functools.cache(lambda: load_vae(args.base_model, torch.float32, device))
    parts = ["tokenizer", "tokenizer_2", "tokenizer_3", "text_encoder_3"]
    parts += [] if args.train_text_encoder else ["text_encoder", "text_encoder_2"]
    absent = args.base_model.absent_parts()
    prompt_id = {
        "kind": "sd3 tokens" if args.train_text_encoder else "sd3 prompts",
        "model": model_identity(args.base_model, *(part for part in parts if part not in absent)),
        "dtype": str(dtype),
        "length": args.max_sequence_length,
    }

    def encode(captions):
        return encode_prompts(captions, tokenizers(), text_encoders(), t5(), args)

    def encode_latents(cuts):
        text_encoders.cache_clear()  # one model at a time
        t5.cache_clear()
        return encode_images(cuts, vae())

    return encoding.fill_caches(
        encoding_settings(args), images, held_out, accelerator, prompt_id, prompt_bytes(args, dtype),
        latent_channels(args.base_model), encode, encode_latents,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# The training step


def conditioning(batch, objective, dropout):
    """(prompt,) for `Denoiser`; a share `dropout` of the prompts is replaced by the unconditional one."""
    return (choose_prompts(batch, objective, dropout),)


def denoise(denoiser, latents, noise, timesteps, conditions, objective):
    """One forward pass: (squared error of each sample (B,), model_pred (B, 16, h, w), noisy_latents (B, 16, h, w)).

    The timesteps go in as float32 whatever the precision: bfloat16 has 8 bits, and would round 987 to 988.
    """
    alpha, sigma = to_device(torch.stack(objective.schedule.levels(timesteps)), objective.device).view(2, -1, 1, 1, 1)
    noisy_latents = alpha * latents + sigma * noise
    model_pred = denoiser(noisy_latents.to(objective.dtype), to_device(timesteps, objective.device), *conditions)
    target = objective.schedule.target(latents, noise)
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
    scheduler = load_part(args.base_model, FlowMatchEulerDiscreteScheduler, "scheduler")
    if not args.use_lora:  # a whole model is saved with the shift that it was trained with
        scheduler = scheduler.from_config(scheduler.config, shift=schedule.shift)
    text_parts = dict.fromkeys(
        f"{kind}{number}" for kind in ("tokenizer", "text_encoder") for number in ("", "_2", "_3")
    )
    return StableDiffusion3Pipeline(vae=vae, transformer=denoiser.transformer, scheduler=scheduler, **text_parts)


# ---------------------------------------------------------------------------------------------------------------------
# The run


def lpl_gate(args):
    """Which samples get the loss; with no threshold given: sigma / alpha <= 3, the lower end of the paper's range."""
    return gate_from_flags(args, sigma_threshold=3)


def example_batch(denoiser, args, size, dtype):
    """A micro-batch of latents of `size`, (h, w), as the loader gives it: what the count of the memory runs."""
    batch, length, config = args.train_batch_size, args.max_sequence_length, denoiser.transformer.config
    if args.train_text_encoder:
        prompt = {"input_ids": torch.zeros(batch, 77, dtype=torch.long)}
        prompt["input_ids_2"] = prompt["input_ids"]
        prompt["t5_embeds"] = torch.zeros(batch, length, config.joint_attention_dim, dtype=dtype)
    else:
        prompt = {
            "prompt_embeds": torch.zeros(batch, 77 + length, config.joint_attention_dim, dtype=dtype),
            "pooled_prompt_embeds": torch.zeros(batch, config.pooled_projection_dim, dtype=dtype),
        }
    numbers, latents = torch.arange(batch).numpy(), torch.zeros(batch, config.in_channels, *size)
    return {"number": numbers, "index": numbers, "mean": latents, "std": latents} | prompt


def prepare_objective(args, accelerator, plan, data):
    """(`Objective`, autoencoder or None). The autoencoder serves the loss, measuring it, and sampling pictures."""
    empty_is_zero, empty = False, data.prompt("")  # SD3's unconditional embedding is that of the empty prompt
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
    pipeline = load_pipeline(args.base_model, StableDiffusion3Pipeline, **trained)
    if not args.use_lora:  # a LoRA is sampled with its base model's
        pipeline.scheduler.register_to_config(shift=schedule.shift)
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
        save_weights=lambda folder, denoiser: save_weights(folder, denoiser, StableDiffusion3Pipeline, args.use_lora),
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
                save_result(args, whole, StableDiffusion3Pipeline, result, images, plan, done)
    validation.run(done)
    if accelerator.is_main_process:
        card = model_card(args, done, plan.batch_size, len(images), lpl_gate(args), hub_name)
        write_card(Path(args.output_dir), card)
    reporter.finish()
    return True


run_main(main, RUN)
