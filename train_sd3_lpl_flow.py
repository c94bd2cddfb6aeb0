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
import argparse
import contextlib
import functools
import math
import os
import sys
from pathlib import Path

from lpl_finetuning.base_model import (
    check_base_model,
    check_files,
    check_init_lora,
    check_lora_layers,
    check_model,
    check_sd3,
    check_weights,
    is_plan_only,
    loading,
    lora_layers,
    model_file,
    read_json,
    weights_fingerprint,
)
from lpl_finetuning.data.samples import target_sizes
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
    is_number,
)
from lpl_finetuning.results.hub import check_publishing
from lpl_finetuning.training.checkpoint_folders import check_resume, run_identity

EMBEDDED_DEFAULT = REPOSITORY / "examples" / "tiny-sd3" / "train.yaml"
COMPONENTS = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "transformer", "scheduler")
WEIGHTS = ("vae", "text_encoder", "text_encoder_2", "transformer")  # and the third text encoder, where there is one
REPLACED = {"vae": "pretrained_vae_model_name_or_path", "transformer": "pretrained_transformer_model_name_or_path"}
LORA_TARGETS = (
    "attn.add_k_proj", "attn.add_q_proj", "attn.add_v_proj", "attn.to_add_out", "attn.to_k", "attn.to_out.0",
    "attn.to_q", "attn.to_v",
)  # fmt: skip


def build_parser():
    """All flags of the recipe."""
    parser = FlagParser(__doc__)
    add_model_arguments(parser)
    add_data_arguments(parser, resolution=512)
    add_training_arguments(parser, train_batch_size=4, num_train_epochs=1, adam_weight_decay=1e-4)
    group = parser.add_argument_group("diffusion")
    add = group.add_argument
    add("--pretrained_transformer_model_name_or_path",
        help="another transformer: a folder or Hub name with its config.json, or with transformer/")  # fmt: skip
    add("--max_sequence_length", type=int, default=77, help="tokens for T5 (default: %(default)s)")
    add("--weighting_scheme", choices=("logit_normal", "mode", "sigma_sqrt", "cosmap", "none"), default="logit_normal",
        help="how noise levels are drawn (logit_normal, mode; else uniformly) or weighted (sigma_sqrt, cosmap), "
        "as in the SD3 paper (default: %(default)s)")  # fmt: skip
    add(
        "--logit_mean",
        type=float,
        default=0.0,
        help="of logit_normal; above 0 means less noise (default: %(default)s)",
    )
    add("--logit_std", type=float, default=1.0, help="of logit_normal (default: %(default)s)")
    add("--mode_scale", type=float, default=1.29, help="of mode (default: %(default)s)")
    add("--precondition_outputs", type=int, choices=(0, 1), default=0,
        help="1 weights the loss by sigma^2: the loss of the estimate of z_0 (default: %(default)s)")  # fmt: skip
    add("--timestep_shift", type=shift_or_auto, metavar="{auto,NUMBER}",
        help="moves noise levels up (default: the scheduler's; auto: that times resolution / 1024)")  # fmt: skip
    add("--lora_blocks", help="comma-separated numbers of the transformer blocks that get a LoRA (default: all)")
    add_lpl_arguments(parser)
    add_run_arguments(parser, validation_epochs=50)
    return parser


def parse_args(argv=None):
    """The flags of a run, checked; UserError names the flag that is wrong."""
    args = build_parser().parse(argv, embedded_default=EMBEDDED_DEFAULT)
    if args.embedded_default:
        print(f"No model and no data named: using the embedded examples, {EMBEDDED_DEFAULT.relative_to(REPOSITORY)}.")
    check_flags(args)
    require(args.max_sequence_length > 0, f"--max_sequence_length is {args.max_sequence_length}; it must be above 0")
    require(args.logit_std > 0, f"--logit_std is {args.logit_std}; it must be above 0")
    require(-1 <= args.mode_scale <= 2 / (math.pi - 2),
            f"--mode_scale is {args.mode_scale}; it must lie between -1 and {2 / (math.pi - 2):.3f}, where noise "
            "levels stay in order")  # fmt: skip
    require(not args.lora_blocks or args.use_lora, "--lora_blocks does nothing without --use_lora")
    require(not (args.lora_blocks and args.init_lora), "--init_lora brings its own --lora_blocks: leave that out")
    require(not args.lora_blocks or all(word.strip().isdigit() for word in args.lora_blocks.split(",")),
            f"--lora_blocks {args.lora_blocks}: expected numbers such as 0,1,12")  # fmt: skip
    check_publishing(args)
    check_base_model(args, "StableDiffusion3", COMPONENTS)
    transformer = ("transformer", "SD3Transformer2DModel", "pretrained_transformer_model_name_or_path")
    configs = check_model(args, transformer, scheduler=(True, ("FlowMatch",)))
    if not is_plan_only(args):
        weights = [*WEIGHTS, *["text_encoder_3"] * has_t5(args)]
        check_weights(args, weights, REPLACED)
        check_files(args, weights, REPLACED)
        check_lora_layers(args, "transformer", REPLACED)
    check_sd3(args, configs)
    check_init_lora(args)
    blocks = configs["transformer"].get("num_layers", 18)
    wrong = [block for block in (args.lora_blocks or "").split(",") if block.strip() and int(block) >= blocks]
    require(
        not wrong, f"--lora_blocks {args.lora_blocks}: the transformer has blocks 0 to {blocks - 1}: name some of them"
    )
    check_sizes(args, configs["transformer"])
    args.base_weights = weights_fingerprint(args, "transformer", REPLACED)
    check_resume(args)
    return args


def has_t5(args):
    """Whether the base pipeline brings its third text encoder, which is optional."""
    index = model_file(args.pretrained_model_name_or_path, "model_index.json", args.revision)
    return bool((read_json(index).get("text_encoder_3") or [None])[0])


def check_sizes(args, config):
    """Refuse images that do not fall into tokens, or into more than the positions that the transformer knows."""
    patch, positions = 8 * config.get("patch_size", 2), config.get("pos_embed_max_size", 192)
    flag = "--aspect_ratio_buckets" if args.aspect_ratio_buckets else "--resolution"
    for size in target_sizes(args):
        found = " x ".join(map(str, size)) if args.aspect_ratio_buckets else size[0]
        require(not any(side % patch for side in size),
                f"{flag} is {found}; it must be a multiple of {patch}, the pixels of a token")  # fmt: skip
        require(max(size) <= patch * positions,
                f"{flag} is {found}; this transformer knows positions up to {patch * positions} px: "
                "give less")  # fmt: skip


def shift_or_auto(text):
    """Type of --timestep_shift: "auto" or a number above 0."""
    if text != "auto" and not (is_number(text) and float(text) > 0):
        raise argparse.ArgumentTypeError("it must be auto or a number above 0")
    return text if text == "auto" else float(text)


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads bring a busy CPU to a halt
    with errors_for_people("--debug" in sys.argv):
        ARGS = parse_args()
        SCAN, HELD_OUT = find_images(ARGS)
        quiet_libraries(ARGS.debug)

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from tqdm.auto import tqdm
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModelWithProjection, T5EncoderModel

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
    """Rectified flow: noise levels, their distribution and weights, all on the CPU.

    A uniform number is turned into u by --weighting_scheme; the level before the shift is 1 - u, so that a positive
    --logit_mean means less noise; the shift s gives sigma = s (1 - u) / (1 + (s - 1) (1 - u)) (SD3 paper, eq. 23).
    """

    prediction_type = "flow"

    def __init__(self, args):
        self.args = args
        scheduler = load_part(args, FlowMatchEulerDiscreteScheduler, "scheduler")
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
    names = ["tokenizer", "tokenizer_2"] + ["tokenizer_3"] * has_t5(args)
    tokenizers = [load_part(args, AutoTokenizer, name) for name in names]
    for tokenizer, length in zip(tokenizers, (77, 77, args.max_sequence_length), strict=False):
        tokenizer.model_max_length = length
    return tokenizers


TEXT_ENCODERS = {"text_encoder": CLIPTextModelWithProjection, "text_encoder_2": CLIPTextModelWithProjection}


def load_text_encoders(args, dtype, device):
    """Both CLIP text encoders, frozen."""
    encoders = [load_part(args, cls, name, variant=args.variant, dtype=dtype, **loading(args))
                for name, cls in TEXT_ENCODERS.items()]  # fmt: skip
    return [encoder.requires_grad_(False).eval().to(device) for encoder in encoders]


def load_t5(args, dtype, device):
    """The third text encoder, frozen; None where the pipeline has none."""
    if not has_t5(args):
        return None
    t5 = load_part(args, T5EncoderModel, "text_encoder_3", variant=args.variant, dtype=dtype, **loading(args))
    return t5.requires_grad_(False).eval().to(device)


def denoiser_place(args):
    """(name or folder, subfolder, revision, variant) of the transformer to start from."""
    other = args.pretrained_transformer_model_name_or_path
    if not other:
        return args.pretrained_model_name_or_path, "transformer", args.revision, args.variant
    subfolder = "transformer" if model_file(other, "config.json", subfolder="transformer") else ""
    return other, subfolder, None, None


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
    """The models to train, loaded. Trainable parameters are float32."""
    name, subfolder, revision, variant = denoiser_place(args)
    transformer = SD3Transformer2DModel.from_pretrained(
        name, subfolder=subfolder, revision=revision, variant=variant,
        dtype=dtype if args.use_lora else torch.float32, **quantization(args, dtype),
        **loading(args),
    )  # fmt: skip
    text_encoders = load_text_encoders(args, dtype, "cpu") if args.train_text_encoder else ()
    torch.manual_seed(args.seed)  # the LoRA's initial weights
    denoiser = prepare_for_training(Denoiser(transformer, text_encoders), args).to(device)
    if args.enable_xformers_memory_efficient_attention:
        transformer.enable_xformers_memory_efficient_attention()
    if args.torch_compile:
        transformer.compile()
    return denoiser


def lora_targets(args):
    """Layers of the transformer that get a LoRA: those of --lora_layers in the blocks of --lora_blocks."""
    layers = lora_layers(args, LORA_TARGETS)
    if not args.lora_blocks:
        return layers
    return [f"transformer_blocks.{int(block)}.{layer}" for block in args.lora_blocks.split(",") for layer in layers]


def prepare_for_training(denoiser, args):
    """Give it its LoRA and gradient checkpointing."""
    if args.use_lora:
        add_adapters(args, denoiser.models(), StableDiffusion3Pipeline, lora_targets(args))
    if args.gradient_checkpointing:
        denoiser.transformer.enable_gradient_checkpointing()
        for encoder in (denoiser.text_encoder, denoiser.text_encoder_2):
            if encoder is not None:
                encoder.gradient_checkpointing_enable({"use_reentrant": False})
    return denoiser.train()


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
    width = load_part_config(args, SD3Transformer2DModel, "transformer")["joint_attention_dim"]
    t5_embeds = embed_t5(captions, tokenizers, t5, args, width)
    if not encoders:  # they are trained: only T5's part is fixed
        return rows_of(tokenize(captions, tokenizers) | {"t5_embeds": t5_embeds.cpu()})
    clip_embeds, pooled = embed_tokens(tokenize(captions, tokenizers).values(), encoders)
    prompt_embeds = join_embeds(clip_embeds.cpu(), t5_embeds.cpu())
    return rows_of({"prompt_embeds": prompt_embeds, "pooled_prompt_embeds": pooled.cpu()})


def prompt_bytes(args, dtype):
    """Bytes of an encoded prompt."""
    config, length = load_part_config(args, SD3Transformer2DModel, "transformer"), args.max_sequence_length
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
    vae = functools.cache(lambda: load_vae(args, torch.float32, device))
    parts = ["tokenizer", "tokenizer_2", "tokenizer_3", "text_encoder_3"]
    parts += [] if args.train_text_encoder else ["text_encoder", "text_encoder_2"]
    prompt_id = {
        "kind": "sd3 tokens" if args.train_text_encoder else "sd3 prompts",
        "model": model_identity(args, *(part for part in parts if has_t5(args) or not part.endswith("3"))),
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
        args, images, held_out, accelerator, prompt_id, prompt_bytes(args, dtype), vae_config(args), encode,
        encode_latents,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# The training step


def conditioning(batch, recipe, dropout):
    """(prompt,) for `Denoiser`; a share `dropout` of the prompts is replaced by the unconditional one."""
    return (choose_prompts(batch, recipe, dropout),)


def denoise(denoiser, latents, noise, timesteps, conditions, recipe):
    """One forward pass: (squared error of each sample (B,), model_pred (B, 16, h, w), noisy_latents (B, 16, h, w)).

    The timesteps go in as float32 whatever the precision: bfloat16 has 8 bits, and would round 987 to 988.
    """
    alpha, sigma = to_device(torch.stack(recipe.schedule.levels(timesteps)), recipe.device).view(2, -1, 1, 1, 1)
    noisy_latents = alpha * latents + sigma * noise
    model_pred = denoiser(noisy_latents.to(recipe.dtype), to_device(timesteps, recipe.device), *conditions)
    target = recipe.schedule.target(latents, noise)
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
    if args.weighting_scheme in ("sigma_sqrt", "cosmap") or args.precondition_outputs:
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
    args = recipe.args
    scheduler = load_part(args, FlowMatchEulerDiscreteScheduler, "scheduler")
    if not args.use_lora:  # a whole model is saved with the shift that it was trained with
        scheduler = scheduler.from_config(scheduler.config, shift=recipe.schedule.shift)
    text_parts = dict.fromkeys(
        f"{kind}{number}" for kind in ("tokenizer", "text_encoder") for number in ("", "_2", "_3")
    )
    pipeline = StableDiffusion3Pipeline(vae=vae, transformer=denoiser.transformer, scheduler=scheduler, **text_parts)
    pipeline.set_progress_bar_config(disable=True)
    prompt_of = functools.partial(pipeline_prompt, denoiser=denoiser, data=data, recipe=recipe)
    with evaluation(denoiser):
        return draw_prompts(pipeline, prompt_of, vae, recipe, num_inference_steps=28)


def pipeline_prompt(prompts, denoiser, data, recipe):
    """Validation prompts' embeddings and the unconditional ones, as arguments of the pipeline."""

    def embeds(entries):
        batch = {name: torch.stack([entry[name] for entry in entries]).to(recipe.device) for name in entries[0]}
        return denoiser.embed(batch) if denoiser.text_encoder is not None else batch

    positive = embeds([data.prompt(prompt) for prompt in prompts])
    negative = embeds([recipe.empty_prompt] * len(prompts))
    prompts = positive | {f"negative_{name}": value for name, value in negative.items()}
    return {name: value.to(recipe.dtype) for name, value in prompts.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Saving


def save_weights(folder, denoiser, args):
    """The trained weights in the layout of diffusers: `transformer/`, or `pytorch_lora_weights.safetensors`."""
    if args.use_lora:
        save_lora(folder, adapters(denoiser.models()), StableDiffusion3Pipeline)
    else:
        denoiser.transformer.save_pretrained(folder / "transformer")


def load_weights(folder, denoiser, args):
    """Put back what `save_weights` wrote."""
    if args.use_lora:
        load_lora(folder, denoiser.models())
    else:
        saved = SD3Transformer2DModel.from_pretrained(folder, subfolder="transformer", use_safetensors=True)
        load_state(denoiser.transformer, saved.state_dict())


def save_result(args, denoiser, schedule):
    """What the run is for: a LoRA, or a whole pipeline that `from_pretrained` loads; and their other formats."""
    folder = Path(args.output_dir)
    if args.use_lora:
        save_weights(folder, denoiser, args)
        if args.output_kohya_format:
            save_kohya(folder, adapters(denoiser.models()), denoiser.transformer.config)
        return
    more = {} if has_t5(args) else {"text_encoder_3": None, "tokenizer_3": None}
    if args.pretrained_vae_model_name_or_path:
        more["vae"] = AutoencoderKL.from_pretrained(args.pretrained_vae_model_name_or_path, **loading(args))
    pipeline = StableDiffusion3Pipeline.from_pretrained(
        args.pretrained_model_name_or_path, transformer=denoiser.transformer, revision=args.revision,
        variant=args.variant, dtype=torch.float32, **loading(args), **more,
    )  # fmt: skip
    pipeline.scheduler.register_to_config(shift=schedule.shift)
    pipeline.save_pretrained(folder)
    if args.single_file:
        save_single_file(pipeline, folder / "model.safetensors")


# ---------------------------------------------------------------------------------------------------------------------
# The plan: what is printed before anything is loaded


def lpl_gate(args):
    """Which samples get the loss; with no threshold given: sigma / alpha <= 3, the lower end of the paper's range."""
    return gate_from_flags(args, sigma_threshold=3)


def build_on_meta(args, dtype, vae_dtype):
    """(denoiser, autoencoder) without memory or weights: for counting, and for checks before loading."""
    name, subfolder, revision, _ = denoiser_place(args)
    with torch.device("meta"):
        transformer = SD3Transformer2DModel.from_config(
            SD3Transformer2DModel.load_config(name, subfolder=subfolder, revision=revision)
        ).to(dtype if args.use_lora else torch.float32)
        vae = AutoencoderKL.from_config(vae_config(args)).requires_grad_(False).to(vae_dtype)
        text_encoders = ()
        if args.train_text_encoder:
            text_encoders = [
                cls(load_part(args, CLIPTextConfig, name)).to(dtype) for name, cls in TEXT_ENCODERS.items()
            ]
        return prepare_for_training(Denoiser(transformer, text_encoders), args), vae


def memory_estimate(args, denoiser, vae, dtype):
    """[(what, bytes)] that training needs on one device; from shapes, nothing is run."""
    batch, config = args.train_batch_size, denoiser.transformer.config
    weights = weight_bytes(args, denoiser.models())
    trained = [parameter for group in parameter_groups(denoiser, args) for parameter in group["params"]]
    trained = [torch.empty_like(parameter) for parameter in trained]  # of their own dtype, which changes now
    denoiser.to(dtype)  # what autocast would run in: the meta device has no autocast
    size, length, width = latent_size(args, vae), args.max_sequence_length, config.joint_attention_dim
    with torch.device("meta"), SavedBytes() as activations:
        if args.train_text_encoder:
            ids = torch.zeros(batch, 77, dtype=torch.long)
            t5_embeds = torch.randn(batch, length, width, dtype=dtype)
            prompt = {"input_ids": ids, "input_ids_2": ids, "t5_embeds": t5_embeds}
        else:
            prompt = {
                "prompt_embeds": torch.randn(batch, 77 + length, width, dtype=dtype),
                "pooled_prompt_embeds": torch.randn(batch, config.pooled_projection_dim, dtype=dtype),
            }
        latents = torch.randn(batch, config.in_channels, *size, dtype=dtype)
        denoiser(latents, torch.zeros(batch), prompt)
    return memory_parts(args, weights, trained, activations.total, vae)


def check_and_print_plan(args, scan, held_out, plan, accelerator):
    """Check what needs no weights, and say what will happen; returns the report on the data. Raises UserError."""
    say = accelerator.print
    report = check_data(args, scan, held_out, load_tokenizers(args), accelerator)
    denoiser, vae = build_on_meta(args, plan.dtype, lpl_dtype(args, accelerator.mixed_precision))
    check_machine(args)
    print_plan(args, report, accelerator, plan)
    how = f"rectified flow, {args.weighting_scheme}, shift {plan.schedule.shift:g}, {str(plan.dtype)[6:]}"
    print_models(args, denoiser.models(), how, say)
    if args.use_lpl:
        gate = lpl_gate(args)
        share = plan.schedule.gated_share(gate)
        hint = plan.schedule.threshold_for(0.2, by_timestep=gate.t_threshold is not None)
        print_lpl_plan(args, gate, share, hint, vae, say)
    print_memory(memory_estimate(args, denoiser, vae, plan.dtype), denoiser, accelerator)
    return report


# ---------------------------------------------------------------------------------------------------------------------
# The run


def prepare_recipe(args, accelerator, schedule, dtype, data):
    """(recipe, autoencoder or None): everything but the models that are trained, loaded."""
    empty = data.prompt("")  # SD3's unconditional embedding is that of the empty prompt
    return build_recipe(args, accelerator, schedule, dtype, empty, False, lpl_gate(args), data)


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
    reporter = Reporter(args, accelerator, "SD3", metric_names(args), first_step)
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
        card = model_card(args, "sd3", plan.total_steps, plan.batch_size, len(images), lpl_gate(args))
        write_card(Path(args.output_dir), card)
    reporter.finish()
    return True


if __name__ == "__main__":
    with errors_for_people(ARGS.debug):
        main(ARGS, SCAN, HELD_OUT)
