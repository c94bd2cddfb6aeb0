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
import os
import sys
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import cli_utils
from cli_utils import REPOSITORY, UserError, errors_for_people, require
from data_utils import scan_dataset, scan_folder

EMBEDDED_DEFAULT = REPOSITORY / "examples" / "tiny-sdxl" / "train.yaml"
COMPONENTS = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet", "scheduler")
LORA_TARGETS = ("to_k", "to_q", "to_v", "to_out.0")


def parse_args(argv=None):
    """Flags of the recipe, checked; UserError names the flag that is wrong."""
    parser = cli_utils.FlagParser(__doc__)
    cli_utils.add_model_arguments(parser)
    cli_utils.add_data_arguments(parser, resolution=1024)
    cli_utils.add_training_arguments(parser, train_batch_size=16, num_train_epochs=100, adam_weight_decay=1e-2)
    group = parser.add_argument_group("diffusion")
    add = group.add_argument
    add("--pretrained_vae_model_name_or_path", help="another autoencoder, e.g. madebyollin/sdxl-vae-fp16-fix")
    add("--prediction_type", choices=("epsilon", "v_prediction", "sample"), help="default: the base model's")
    add("--snr_gamma", type=float, help="weight the diffusion loss by min(SNR, gamma); 5 is usual (default: off)")
    add("--noise_offset", type=float, default=0.0, help="scale of noise that is constant per channel (default: 0)")
    add("--timestep_bias_strategy", choices=("none", "earlier", "later", "range"), default="none",
        help="draw some timesteps more often (default: %(default)s)")  # fmt: skip
    add("--timestep_bias_multiplier", type=float, default=1.0, help="how much more often (default: %(default)s)")
    add("--timestep_bias_begin", type=int, default=0, help="first biased timestep under range (default: %(default)s)")
    add("--timestep_bias_end", type=int, default=1000, help="end of the range, excluded (default: %(default)s)")
    add("--timestep_bias_portion", type=float, default=0.25, help="biased share of timesteps (default: %(default)s)")
    cli_utils.add_lpl_arguments(parser)
    cli_utils.add_run_arguments(parser, validation_epochs=1)
    args = parser.parse(argv, embedded_default=EMBEDDED_DEFAULT)
    if args.embedded_default:
        print(f"No model and no data named: using the embedded examples, {EMBEDDED_DEFAULT.relative_to(REPOSITORY)}.")
    cli_utils.check_flags(args)
    require(args.snr_gamma is None or args.snr_gamma > 0, f"--snr_gamma is {args.snr_gamma}; it must be above 0")
    require(0 <= args.timestep_bias_begin < args.timestep_bias_end <= 1000,
            "--timestep_bias_begin and --timestep_bias_end must satisfy 0 <= begin < end <= 1000, found "
            f"{args.timestep_bias_begin} and {args.timestep_bias_end}")  # fmt: skip
    require(args.timestep_bias_multiplier > 0, "--timestep_bias_multiplier must be above 0")
    require(0 < args.timestep_bias_portion <= 1, "--timestep_bias_portion must lie above 0 and at most at 1")
    cli_utils.check_base_model(args, "StableDiffusionXL", COMPONENTS)
    return args


def find_images(args):
    """The captioned images, a `Scan`; a DataError names the file or column that is wrong."""
    if args.train_data_dir:
        scan = scan_folder(args.train_data_dir, args.image_column, args.caption_column)
    else:
        scan = scan_dataset(
            args.dataset_name,
            args.dataset_config_name,
            image_column=args.image_column,
            caption_column=args.caption_column,
            cache_dir=args.cache_dir,
            max_samples=args.max_train_samples,
        )
    if args.max_train_samples:
        del scan.images[args.max_train_samples :]
    return scan


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads bring a busy CPU to a halt
    with errors_for_people("--debug" in sys.argv):
        ARGS = parse_args()
        SCAN = find_images(ARGS)
        cli_utils.quiet_libraries(ARGS.debug)

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel, cast_training_params
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from tqdm.auto import tqdm
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

import train_utils
from data_utils import (
    AddressedBatches,
    TensorStore,
    TrainingSet,
    addressed_normal,
    addressed_rng,
    addressed_uniform,
    collate,
    crops_are_forced,
    digest,
    encode_missing,
    fingerprint,
    latent_items,
    open_image,
    prepare_image,
    to_pixel_values,
)
from lpl_utils import (
    AutoWeight,
    DecoderStages,
    LatentPerceptualLoss,
    LPLConfig,
    LPLGate,
    estimate_z0,
    lpl_noise_scale,
    noise_to_signal,
)
from train_utils import to_device

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

    def draw_timesteps(self, seed, numbers):
        """(B,) timesteps of the samples with these numbers."""
        uniform = torch.from_numpy(addressed_uniform(seed, numbers, "timestep"))
        return torch.searchsorted(self.cumulative, uniform, right=True).clamp_max(len(self) - 1)

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


def load_part(args, cls, subfolder, **more):
    """One component of the base pipeline."""
    return cls.from_pretrained(args.pretrained_model_name_or_path, subfolder=subfolder, revision=args.revision, **more)


def load_vae(args, dtype, device):
    """The frozen autoencoder, evaluated in `dtype`, channels-last."""
    if args.pretrained_vae_model_name_or_path:
        vae = AutoencoderKL.from_pretrained(args.pretrained_vae_model_name_or_path, dtype=dtype)
    else:
        vae = load_part(args, AutoencoderKL, "vae", variant=args.variant, dtype=dtype)
    return vae.requires_grad_(False).eval().to(device, memory_format=torch.channels_last)


def vae_config(args):
    """The autoencoder's config.json as a dictionary, without loading weights."""
    if args.pretrained_vae_model_name_or_path:
        return AutoencoderKL.load_config(args.pretrained_vae_model_name_or_path)
    return load_part_config(args, AutoencoderKL, "vae")


def load_part_config(args, cls, subfolder):
    """The config.json of one component."""
    return cls.load_config(args.pretrained_model_name_or_path, subfolder=subfolder, revision=args.revision)


def load_text_encoders(args, dtype, device):
    """((tokenizer, text encoder), (tokenizer 2, text encoder 2)), frozen."""
    classes = ((CLIPTokenizer, CLIPTextModel, ""), (CLIPTokenizer, CLIPTextModelWithProjection, "_2"))
    return [
        (
            load_part(args, tokenizer, "tokenizer" + suffix),
            load_part(args, encoder, "text_encoder" + suffix, variant=args.variant, dtype=dtype)
            .requires_grad_(False)
            .to(device),
        )
        for tokenizer, encoder, suffix in classes
    ]


def add_lora(unet, args):
    """Give the UNet a trainable LoRA; its base weights are frozen. Returns the LoRA's configuration."""
    targets = [name.strip() for name in args.lora_layers.split(",")] if args.lora_layers else list(LORA_TARGETS)
    config = LoraConfig(
        r=args.rank,
        lora_alpha=args.lora_alpha or args.rank,
        lora_dropout=args.lora_dropout,
        init_lora_weights="gaussian",
        target_modules=targets,
    )
    unet.requires_grad_(False)
    try:
        unet.add_adapter(config)
    except ValueError as error:
        raise UserError(f"--lora_layers {args.lora_layers}: {error}") from None
    return config


def build_unet(args, dtype, device):
    """The UNet ready to train: (unet, LoRA configuration or None). Trainable parameters are float32."""
    unet = load_part(
        args, UNet2DConditionModel, "unet", variant=args.variant, dtype=dtype if args.use_lora else torch.float32
    )
    torch.manual_seed(args.seed)  # the LoRA's initial weights
    lora_config = add_lora(unet, args) if args.use_lora else None
    if args.use_lora:
        cast_training_params(unet, dtype=torch.float32)
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    return unet.to(device).train(), lora_config


# ---------------------------------------------------------------------------------------------------------------------
# Encoding, once, into caches on disk


@torch.no_grad()
def encode_prompts(captions, encoders):
    """Captions as SDXL sees them: a list of {"prompt_embeds" (77, D), "pooled_prompt_embeds" (P,)} on the CPU.

    The hidden states before the last layer of both text encoders, side by side, and the projection of the second.
    """
    hidden = []
    for tokenizer, encoder in encoders:
        tokens = tokenizer(
            captions, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
        )
        output = encoder(tokens.input_ids.to(encoder.device), output_hidden_states=True)
        hidden.append(output.hidden_states[-2])
    prompt_embeds, pooled = torch.cat(hidden, dim=-1).cpu(), output[0].cpu()
    return [dict(prompt_embeds=a, pooled_prompt_embeds=b) for a, b in zip(prompt_embeds, pooled, strict=True)]


@torch.no_grad()
def encode_images(items, vae, args):
    """Images as the autoencoder sees them: a list of {"mean", "std" (4, h, w), "time_ids" (6,)} on the CPU.

    items: [(CaptionedImage, whether flipped)]. Mean and deviation are kept, not a sample, so that caching freezes
    nothing.
    """
    prepared = [
        prepare_image(open_image(image), args.resolution, args.center_crop, flip, args.image_interpolation_mode)
        for image, flip in items
    ]
    pixels = torch.stack([to_pixel_values(array) for array, _ in prepared])
    posterior = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
    columns = zip(posterior.mean.float().cpu(), posterior.std.float().cpu(), prepared, strict=True)
    return [
        dict(mean=mean, std=std, time_ids=torch.tensor(crop.time_ids, dtype=torch.float32))
        for mean, std, (_, crop) in columns
    ]


def prompt_key(caption):
    """Key of a caption in its store."""
    return digest(caption=caption)


def latent_key(content_hash, flip):
    """Key of an image in its store."""
    return f"{content_hash}-{'flipped' if flip else 'plain'}"


def identity(args, *subfolders):
    """What tells one model's encodings from another's: hashes of its files, or its commit on the Hub."""
    folder = Path(args.pretrained_model_name_or_path)
    if not folder.is_dir():
        index = cli_utils.model_file(str(folder), "model_index.json", args.revision)
        return [str(folder), index.parent.name, args.variant, *subfolders]
    return fingerprint(folder, *subfolders)


def fill_caches(args, images, dtype, accelerator):
    """Encode what is not on disk yet; returns (prompt store, latent store or None for random crops).

    The stores are keyed by what they depend on and nothing else: the text encoders and their dtype; the autoencoder,
    resolution, crop and interpolation. A second run with another learning rate or output folder encodes nothing.
    """
    root = Path(args.cache_dir or os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "lpl"
    text_id = digest(kind="sdxl prompts", model=identity(args, *COMPONENTS[1:5]), dtype=str(dtype))
    vae_name = args.pretrained_vae_model_name_or_path
    vae_id = (fingerprint(vae_name) if Path(vae_name).is_dir() else vae_name) if vae_name else identity(args, "vae")
    crop = [args.resolution, args.center_crop, args.image_interpolation_mode]
    latent_id = digest(kind="sdxl latents", vae=vae_id, crop=crop)
    cacheable = crops_are_forced(images, args.center_crop, args.resolution)
    loaded = {}

    def encode_prompt_batch(captions):
        if "text" not in loaded:
            loaded["text"] = load_text_encoders(args, dtype, accelerator.device)
        return encode_prompts(captions, loaded["text"])

    def encode_image_batch(items):
        if "vae" not in loaded:
            loaded["vae"] = load_vae(args, torch.float32, accelerator.device)
        return encode_images(items, loaded["vae"], args)

    with accelerator.main_process_first():
        prompt_store = TensorStore(root / "prompts" / text_id[:16])
        captions = ["", *(args.validation_prompt or []), *(image.caption for image in images)]
        items = [(prompt_key(caption), caption) for caption in captions]
        encoded = [encode_missing(prompt_store, items, encode_prompt_batch, 16, "encoding captions")]
        latent_store = TensorStore(root / "latents" / latent_id[:16]) if cacheable else None
        if cacheable:
            items = latent_items(images, latent_key, args.random_flip)
            batch = max(1, min(16, (1024 // args.resolution) ** 2))
            encoded.append(encode_missing(latent_store, items, encode_image_batch, batch, "encoding images"))
    if cacheable:
        accelerator.print(
            f"Caches in {root}: encoded {encoded[0]} captions and {encoded[1]} images, the rest was there."
        )
    else:
        accelerator.print("Random crops: images are encoded in every step. --center_crop encodes each of them once.")
    return prompt_store, latent_store


# ---------------------------------------------------------------------------------------------------------------------
# The training step


@dataclass
class Recipe:
    """What a training step needs besides its batch."""

    args: object
    device: torch.device
    schedule: Schedule
    dtype: torch.dtype  # the UNet's inputs
    scaling_factor: float
    empty_prompt: dict  # what the pipeline uses as its unconditional embedding
    encoder: object = None  # the autoencoder, where images are encoded in every step
    lpl: LatentPerceptualLoss | None = None
    gate: LPLGate | None = None
    auto_weight: AutoWeight | None = None

    def lpl_weight(self):
        """The weight of the LPL term, a number or a scalar tensor on the device."""
        return self.auto_weight() if self.auto_weight is not None else float(self.args.lpl_weight)


def sample_latents(batch, recipe):
    """z_0 (B, 4, h, w) in model space, float32: a sample of the autoencoder's posterior."""
    if "pixel_values" in batch:
        with torch.no_grad():
            pixels = batch["pixel_values"].to(recipe.device, torch.float32)
            posterior = recipe.encoder.encode(pixels).latent_dist
        mean, std = posterior.mean, posterior.std
    else:
        mean, std = (to_device(batch[name], recipe.device) for name in ("mean", "std"))
    eps = addressed_normal(recipe.args.seed, batch["number"], mean.shape[1:], "posterior")
    return (mean + std * to_device(eps, recipe.device)) * recipe.scaling_factor


def conditioning(batch, recipe):
    """Prompt embeddings (B, 77, D), some replaced by the unconditional one, and SDXL's added conditions."""
    keep = addressed_uniform(recipe.args.seed, batch["number"], "dropout") >= recipe.args.proportion_empty_prompts
    keep = torch.from_numpy(keep)
    embeds = []
    for name in ("prompt_embeds", "pooled_prompt_embeds"):
        value = batch[name]
        if not keep.all():
            value = torch.where(keep.reshape(-1, *[1] * (value.ndim - 1)), value, recipe.empty_prompt[name])
        embeds.append(to_device(value, recipe.device, recipe.dtype))
    time_ids = to_device(batch["time_ids"], recipe.device, recipe.dtype)
    return embeds[0], {"text_embeds": embeds[1], "time_ids": time_ids}


def training_step(batch, unet, recipe, step, metrics):
    """One micro-step: (objective, a scalar with gradient; [diffusion loss, LPL term] (2,), detached).

    loss = diffusion + weight * (1 / B) * sum over gated samples of s_b * LPL_b
    """
    args, schedule, numbers = recipe.args, recipe.schedule, batch["number"]
    latents = sample_latents(batch, recipe)
    noise = addressed_normal(args.seed, numbers, latents.shape[1:], "noise")
    if args.noise_offset:
        noise += args.noise_offset * addressed_normal(args.seed, numbers, (latents.shape[1], 1, 1), "noise_offset")
    noise = to_device(noise, recipe.device)
    timesteps = schedule.draw_timesteps(args.seed, numbers)
    levels = torch.stack([*schedule.levels(timesteps), schedule.loss_weights(timesteps)])
    alpha, sigma, loss_weights = to_device(levels, recipe.device)

    alpha_, sigma_ = alpha.view(-1, 1, 1, 1), sigma.view(-1, 1, 1, 1)
    noisy_latents = alpha_ * latents + sigma_ * noise
    prompt_embeds, added = conditioning(batch, recipe)
    if args.lora_dropout:  # dropout follows from the address too, so that a resumed run repeats it
        torch.manual_seed(int(addressed_rng(args.seed, int(numbers[0]), "lora_dropout").integers(2**32)))
    model_pred = unet(
        noisy_latents.to(recipe.dtype),
        to_device(timesteps, recipe.device),
        prompt_embeds,
        added_cond_kwargs=added,
    ).sample

    target = schedule.target(latents, noise, alpha_, sigma_)
    per_sample = (model_pred.float() - target).square().mean(dim=(1, 2, 3))
    diffusion_loss = (loss_weights * per_sample).mean()
    metrics.add("diffusion_loss", diffusion_loss)
    loss, lpl_term = diffusion_loss, torch.zeros_like(diffusion_loss)
    if recipe.lpl is not None and step >= args.lpl_start:
        lpl_term = perceptual_term(model_pred, noisy_latents, latents, timesteps, recipe, metrics)
        weight = recipe.lpl_weight()
        loss = diffusion_loss + weight * lpl_term
        metrics.add("lpl/weight", weight)
        metrics.add("lpl/weighted_loss", weight * lpl_term)
    metrics.add("train_loss", loss)
    return loss, torch.stack([diffusion_loss, lpl_term]).detach()


def perceptual_term(model_pred, noisy_latents, latents, timesteps, recipe, metrics):
    """(1 / B) * sum over gated samples of s_b * LPL_b: a scalar, divided by the batch and not by the gated samples."""
    levels = recipe.schedule.levels(timesteps)
    gated = recipe.gate(timesteps, noise_to_signal(*levels)).nonzero().flatten()
    metrics.add("lpl/num_samples", float(len(gated)))
    metrics.add("lpl/application_ratio", float(len(gated)), len(timesteps))
    if not len(gated):
        metrics.add("lpl/loss", 0.0)
        return latents.new_zeros(())
    scale = lpl_noise_scale(*levels) if recipe.args.lpl_scale else torch.ones(len(timesteps))
    alpha, sigma, scale = to_device(torch.stack([*levels, scale])[:, gated], recipe.device)
    gated = to_device(gated, recipe.device)
    noisy_latents, model_pred, latents_ = (x.index_select(0, gated) for x in (noisy_latents, model_pred, latents))
    z0_pred = estimate_z0(model_pred, noisy_latents, alpha, sigma, recipe.schedule.prediction_type)
    output = recipe.lpl(z0_pred, latents_)
    for layer, values in enumerate(output.per_layer):
        metrics.add(f"lpl/features/layer_{layer}/loss", values.sum(), len(values))
        outliers = (1 - output.inlier_fraction[layer]) * len(values)
        metrics.add(f"lpl/features/layer_{layer}/outlier_ratio", outliers, len(values))
    lpl_term = (scale * output.per_sample).sum() / len(latents)
    metrics.add("lpl/loss", lpl_term)
    return lpl_term


# ---------------------------------------------------------------------------------------------------------------------
# Validation and saving


@torch.no_grad()
def validate(args, unet, vae, prompt_store, recipe, folder, step):
    """Draw every validation prompt, with the same seeds every time; returns [(prompt, [images])] and saves a grid."""
    import diffusers

    scheduler_config = load_part_config(args, DDPMScheduler, "scheduler")
    scheduler = getattr(diffusers, scheduler_config["_class_name"]).from_config(
        scheduler_config, prediction_type=recipe.schedule.prediction_type
    )
    pipeline = StableDiffusionXLPipeline(
        vae=vae, unet=unet, scheduler=scheduler, text_encoder=None, text_encoder_2=None, tokenizer=None,
        tokenizer_2=None, add_watermarker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    was_training = unet.training
    unet.eval()
    at_once = min(args.num_validation_images, max(1, (1024 // args.resolution) ** 2))
    rows = [(prompt, []) for prompt in args.validation_prompt]
    for prompt, images in tqdm(rows, desc=f"validation at step {step}", leave=False):
        embeds = prompt_store.get(prompt_key(prompt))
        embeds |= {f"negative_{name}": value for name, value in recipe.empty_prompt.items()}
        embeds = {name: value[None].to(recipe.device, recipe.dtype) for name, value in embeds.items()}
        for first in range(0, args.num_validation_images, at_once):
            seeds = range(args.seed + first, args.seed + min(first + at_once, args.num_validation_images))
            generators = [torch.Generator(recipe.device).manual_seed(seed) for seed in seeds]
            with torch.autocast(recipe.device.type, recipe.dtype, enabled=recipe.dtype != torch.float32):
                latents = pipeline(
                    **embeds, generator=generators, num_images_per_prompt=len(seeds), num_inference_steps=25,
                    height=args.resolution, width=args.resolution, output_type="latent",
                ).images  # fmt: skip
            decoded = vae.decode(DecoderStages(vae).to_vae_space(latents)).sample  # without autocast: see LPL's dtype
            images += pipeline.image_processor.postprocess(decoded.float())
    unet.train(was_training)
    folder.mkdir(parents=True, exist_ok=True)
    train_utils.labelled_rows(rows).save(folder / f"step-{step}.png")
    return rows


def save_weights(folder, unet, lora_config):
    """The trained weights in the layout of diffusers: `unet/`, or `pytorch_lora_weights.safetensors`."""
    if lora_config is None:
        unet.save_pretrained(folder / "unet")
        return
    layers = {name: value.float() for name, value in get_peft_model_state_dict(unet).items()}
    metadata = lora_config.to_dict()
    metadata["target_modules"] = sorted(metadata["target_modules"])
    StableDiffusionXLPipeline.save_lora_weights(folder, unet_lora_layers=layers, unet_lora_adapter_metadata=metadata)


def load_weights(folder, unet, lora_config):
    """Put back what `save_weights` wrote."""
    if lora_config is None:
        unet.load_state_dict(UNet2DConditionModel.from_pretrained(folder, subfolder="unet").state_dict())
        return
    layers = load_file(folder / "pytorch_lora_weights.safetensors")
    layers = {name.removeprefix("unet."): value for name, value in layers.items()}
    wrong = set_peft_model_state_dict(unet, layers)
    require(not wrong.unexpected_keys, f"{folder}: its LoRA has other layers than this run's (--lora_layers, --rank)")


def save_result(args, unet, lora_config, schedule):
    """What the run is for: a LoRA, or a whole pipeline that `from_pretrained` loads."""
    folder = Path(args.output_dir)
    if lora_config is not None:
        save_weights(folder, unet, lora_config)
        return
    more = {}
    if args.pretrained_vae_model_name_or_path:
        more["vae"] = AutoencoderKL.from_pretrained(args.pretrained_vae_model_name_or_path)
    pipeline = StableDiffusionXLPipeline.from_pretrained(
        args.pretrained_model_name_or_path, unet=unet, revision=args.revision, variant=args.variant,
        dtype=torch.float32, **more,
    )  # fmt: skip
    pipeline.scheduler.register_to_config(prediction_type=schedule.prediction_type)
    pipeline.save_pretrained(folder)


# ---------------------------------------------------------------------------------------------------------------------
# The plan: what is printed before anything is loaded


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
        batch_size=args.lpl_batch_size or max(1, round((1024 / args.resolution) ** 2)),
    )


def lpl_gate(args):
    """Which samples get the loss; with no threshold given: t < 200, a fifth of uniform timesteps."""
    threshold = args.lpl_t_threshold
    if threshold is None and args.lpl_sigma_threshold is None:
        threshold = 200
    return LPLGate(threshold, args.lpl_sigma_threshold, args.lpl_threshold_resolution, args.resolution)


def lpl_dtype(args, mixed_precision):
    """The decoder's dtype in the loss."""
    name = args.lpl_vae_dtype or ("bfloat16" if mixed_precision == "bf16" else "float32")
    return getattr(torch, name)


def build_on_meta(args, dtype, vae_dtype):
    """(UNet with its LoRA, autoencoder) without memory or weights: for counting, and for checks before loading."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(load_part_config(args, UNet2DConditionModel, "unet"))
        vae = AutoencoderKL.from_config(vae_config(args)).requires_grad_(False).to(vae_dtype)
        unet.to(dtype if args.use_lora else torch.float32)
        if args.use_lora:
            add_lora(unet, args)
            cast_training_params(unet, dtype=torch.float32)
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    return unet.train(), vae


def memory_estimate(args, unet, vae, dtype):
    """[(what, bytes)] that training needs on one device, every sample taken as gated; from shapes, nothing is run."""
    side = args.resolution // 2 ** (len(vae.config.block_out_channels) - 1)
    batch = args.train_batch_size
    weights = train_utils.parameter_bytes(unet.parameters())
    size = train_utils.parameter_bytes(parameter for parameter in unet.parameters() if parameter.requires_grad)
    unet.to(dtype)  # what autocast would run in: the meta device has no autocast
    with torch.device("meta"), train_utils.SavedBytes() as denoiser:
        pooled = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
        added = {
            "text_embeds": torch.randn(batch, pooled, dtype=dtype),
            "time_ids": torch.randn(batch, 6, dtype=dtype),
        }
        latents = torch.randn(batch, unet.config.in_channels, side, side, dtype=dtype)
        embeds = torch.randn(batch, 77, unet.config.cross_attention_dim, dtype=dtype)
        unet(latents, torch.zeros(batch, dtype=torch.long), embeds, added_cond_kwargs=added)
    parts = [
        ("UNet", weights),
        ("gradients", size),
        ("optimizer state", size // 2 if args.use_8bit_adam else 2 * size),
        ("EMA", size if args.use_ema else 0),
        ("activations of the UNet", denoiser.total),
    ]
    if args.use_lpl:
        decoder = train_utils.parameter_bytes(vae.decoder.parameters())
        parts += [("decoder", decoder), ("LPL", lpl_bytes(args, vae, side))]
    return parts


def lpl_bytes(args, vae, side):
    """Bytes that the loss keeps for its backward pass: of all stages, or of the largest when they are recomputed."""
    config = lpl_config(args)
    totals = [0]
    for blocks in range(1 + config.num_blocks):
        with torch.device("meta"), train_utils.SavedBytes() as kept:
            pair = torch.randn(
                2, min(args.train_batch_size, config.batch_size), vae.config.latent_channels, side, side
            )
            LatentPerceptualLoss(vae, replace(config, num_blocks=blocks))(pair[0].requires_grad_(), pair[1])
        totals.append(kept.total)
    stages = [after - before for before, after in pairwise(totals)]
    return max(stages) if config.checkpointing == "stage" else sum(stages)


def stage_shapes(args, vae):
    """[(C, H, W)] of the features that LPL compares."""
    side = args.resolution // 2 ** (len(vae.config.block_out_channels) - 1)
    stages = DecoderStages(vae)
    x, shapes = torch.empty(1, vae.config.latent_channels, side, side, device="meta"), []
    for index in range(1 + args.lpl_num_blocks):
        x = stages.run(index, x)
        shapes.append(tuple(x.shape[1:]))
    return shapes


def truncated_captions(args, captions):
    """How many captions are longer than the tokenizers take."""
    tokenizers = [load_part(args, CLIPTokenizer, "tokenizer" + suffix) for suffix in ("", "_2")]
    longest = [
        max(len(tokenizer(caption).input_ids) - tokenizer.model_max_length for tokenizer in tokenizers)
        for caption in set(captions)
    ]
    return sum(excess > 0 for excess in longest)


def check_and_print_plan(args, scan, schedule, accelerator, dtype, total_steps):
    """Check what can be checked without weights, and say what will happen. Raises UserError."""
    cli_utils.check_vae_dtype(args, vae_config(args))
    unet, vae = build_on_meta(args, dtype, lpl_dtype(args, accelerator.mixed_precision))
    blocks = len(vae.config.block_out_channels)
    require(args.lpl_num_blocks <= blocks,
            f"--lpl_num_blocks is {args.lpl_num_blocks}; this decoder has {blocks} up blocks")  # fmt: skip
    trainable = sum(parameter.numel() for parameter in unet.parameters() if parameter.requires_grad)
    everything = sum(parameter.numel() for parameter in unet.parameters())
    batch = args.train_batch_size * accelerator.num_processes * args.gradient_accumulation_steps
    captions = [image.caption for image in scan.images]
    say = accelerator.print
    say("\nConfiguration: " + ", ".join(f"{key}={value}" for key, value in sorted(vars(args).items())
                                        if value not in (None, False) and key not in cli_utils.SECRETS))  # fmt: skip
    for warning in scan.warnings:
        say(f"warning: {warning}")
    say(f"Data: {len(captions)} images with {len(set(captions))} captions from {scan.source}; "
        f"{truncated_captions(args, captions)} captions are longer than the tokenizers take")  # fmt: skip
    say(f"Steps: {total_steps} of {batch} images ({args.train_batch_size} per device x {accelerator.num_processes} "
        f"x {args.gradient_accumulation_steps} accumulated); {len(captions) / batch:.1f} steps an epoch, "
        f"{total_steps * batch / len(captions):.1f} epochs")  # fmt: skip
    if args.validation_prompt:
        every = args.validation_steps or args.validation_epochs * len(captions) / batch
        say(f"Validation: {len(args.validation_prompt)} x {args.num_validation_images} images every {every:g} steps"
            + ("; --validation_steps sets another interval" if args.validation_steps is None else ""))  # fmt: skip
    say(f"Training: {trainable:,} of {everything:,} UNet parameters "
        f"({f'LoRA of rank {args.rank}' if args.use_lora else 'all'}), "
        f"{schedule.prediction_type} prediction, {str(dtype)[6:]}")  # fmt: skip
    if args.use_lpl:
        print_lpl_plan(args, schedule, vae, say)
    parts = memory_estimate(args, unet, vae, dtype)
    total = train_utils.gigabytes(sum(size for _, size in parts))
    say(
        f"Memory, estimated: {total}: "
        + ", ".join(f"{what} {train_utils.gigabytes(size)}" for what, size in parts if size)
    )
    say()


def print_lpl_plan(args, schedule, vae, say):
    """The lines about the loss: share of gated samples, decoder stages, weight."""
    gate, config = lpl_gate(args), lpl_config(args)
    share = schedule.gated_share(gate)
    rule = f"t < {gate.limit:g}" if gate.t_threshold is not None else f"sigma / alpha <= {gate.limit:g}"
    say(f"LPL: where {rule}, {100 * share:.1f} % of samples; weight {args.lpl_weight}"
        + (f" (a share of {args.lpl_share:g} of the loss)" if args.lpl_weight == "auto" else "")
        + f"; {config.norm_type} normalization, {config.loss_type}, at most {config.batch_size} samples at a time, "
        f"checkpointing {config.checkpointing}, {str(vae.dtype)[6:]}")  # fmt: skip
    shapes = stage_shapes(args, vae)
    say("     decoder stages: " + ", ".join("x".join(map(str, shape)) for shape in shapes))
    if share < 0.02:
        say("warning: LPL applies to under 2 % of the samples and will hardly matter; raise --lpl_t_threshold "
            "(200 gives 20 % of uniform timesteps)")  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# The run


METRICS = ["train_loss", "diffusion_loss", "grad_norm", "lpl/loss", "lpl/weighted_loss", "lpl/weight",
           "lpl/num_samples", "lpl/application_ratio"]  # fmt: skip


def metric_names(args):
    """The log keys of a run, in the order of the packed read."""
    layers = range(1 + args.lpl_num_blocks if args.use_lpl else 0)
    return METRICS + [f"lpl/features/layer_{layer}/{what}" for layer in layers for what in ("loss", "outlier_ratio")]


def start_accelerator(args):
    """The Accelerator, with trackers below the output folder."""
    logging_dir = Path(args.output_dir, args.logging_dir)
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(project_dir=args.output_dir, logging_dir=logging_dir),
    )
    if args.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    return accelerator


def prepare_recipe(args, accelerator, schedule, dtype, prompt_store, latent_store):
    """(recipe, autoencoder or None): everything but the UNet, loaded."""
    vae = None
    if args.use_lpl or args.validation_prompt:
        vae = load_vae(args, lpl_dtype(args, accelerator.mixed_precision), accelerator.device)
    index = cli_utils.read_json(
        cli_utils.model_file(args.pretrained_model_name_or_path, "model_index.json", args.revision)
    )
    empty = prompt_store.get(prompt_key(""))
    if index.get("force_zeros_for_empty_prompt", True):
        empty = {name: torch.zeros_like(value) for name, value in empty.items()}
    recipe = Recipe(args, accelerator.device, schedule, dtype, vae_config(args)["scaling_factor"], empty)
    if latent_store is None:
        recipe.encoder = load_vae(args, torch.float32, accelerator.device)
    if args.use_lpl:
        recipe.lpl = LatentPerceptualLoss(vae, lpl_config(args))
        recipe.gate = lpl_gate(args)
        if args.lpl_weight == "auto":
            recipe.auto_weight = AutoWeight(args.lpl_share).to(accelerator.device)
    return recipe, vae


def batches(args, images, prompt_store, latent_store, accelerator, first_step, last_step):
    """Iterator over the micro-batches of this rank from `first_step` on."""
    data = TrainingSet(
        images, args.seed, args.resolution, args.center_crop, args.random_flip, args.image_interpolation_mode,
        latents=latent_store, prompts=prompt_store, latent_key=latent_key, prompt_key=prompt_key,
    )  # fmt: skip
    numbers = AddressedBatches(
        first_step, last_step, args.train_batch_size, args.gradient_accumulation_steps, accelerator.num_processes,
        accelerator.process_index,
    )  # fmt: skip
    return iter(
        torch.utils.data.DataLoader(
            data,
            batch_sampler=numbers,
            collate_fn=collate,
            num_workers=args.dataloader_num_workers,
            pin_memory=accelerator.device.type == "cuda",
        )
    )


def optimize(args, accelerator, optimizer, lr_scheduler, ema, parameters, metrics):
    """The optimizer step at the end of the accumulation: clip, step, schedule, average."""
    grad_norm = accelerator.clip_grad_norm_(parameters, args.max_grad_norm)
    metrics.add("grad_norm", grad_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if not accelerator.optimizer_step_was_skipped:  # fp16: the scaler skips a step whose gradients overflow
        lr_scheduler.step()
        if ema is not None:
            ema.step(parameters)


def main(args, scan):
    """The run, from the plan to the saved model."""
    accelerator = start_accelerator(args)
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
    schedule = Schedule(args)
    batch_size = args.train_batch_size * accelerator.num_processes * args.gradient_accumulation_steps
    total_steps = args.max_train_steps or -(-args.num_train_epochs * len(scan.images) // batch_size)
    resume_from = train_utils.checkpoint_to_resume(args)
    check_and_print_plan(args, scan, schedule, accelerator, dtype, total_steps)
    if args.dry_run:
        return
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    if accelerator.is_main_process:
        cli_utils.save_recipe(args, output_dir / "config.yaml")

    prompt_store, latent_store = fill_caches(args, scan.images, dtype, accelerator)
    recipe, vae = prepare_recipe(args, accelerator, schedule, dtype, prompt_store, latent_store)
    unet, lora_config = build_unet(args, dtype, accelerator.device)
    parameters = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    if args.scale_lr:
        args.learning_rate *= batch_size
    optimizer = train_utils.build_optimizer(args, parameters)
    lr_scheduler = train_utils.build_lr_scheduler(args, optimizer, total_steps)
    ema = EMAModel(parameters, decay=args.ema_decay) if args.use_ema else None
    bare_unet = unet
    unet, optimizer = accelerator.prepare(unet, optimizer)
    state = train_utils.TrainingState(
        optimizer, lr_scheduler, accelerator.scaler, ema, recipe.auto_weight, train_utils.run_identity(args)
    )
    first_step = 0
    if resume_from is not None:
        load_weights(resume_from, bare_unet, lora_config)
        first_step = state.load(resume_from)
        accelerator.print(f"Resumed from {resume_from} at step {first_step}")
    reporter = train_utils.Reporter(args, accelerator, "sdxl-lpl", metric_names(args), first_step)
    metrics = reporter.metrics

    def save(step):
        train_utils.save_checkpoint(
            output_dir, step, state, lambda folder: save_weights(folder, bare_unet, lora_config),
            args.checkpoints_total_limit,
        )  # fmt: skip

    def draw(step):
        with train_utils.averaged_weights(ema, parameters):
            rows = validate(args, bare_unet, vae, prompt_store, recipe, output_dir / "validation", step)
        reporter.log_images(rows, step)

    validation_due = train_utils.validation_schedule(args, len(scan.images), batch_size)
    loader = batches(args, scan.images, prompt_store, latent_store, accelerator, first_step, total_steps)
    if args.validation_prompt and first_step == 0 and accelerator.is_main_process:
        draw(0)
    bar = tqdm(range(first_step, total_steps), initial=first_step, total=total_steps, desc="training",
               disable=not accelerator.is_local_main_process)  # fmt: skip
    for step in bar:
        parts = torch.zeros(2, device=accelerator.device)  # diffusion loss and LPL term, for the auto weight
        for micro_step in range(args.gradient_accumulation_steps):
            last = micro_step + 1 == args.gradient_accumulation_steps
            with train_utils.sync_gradients(accelerator, unet, last):
                loss, micro_parts = training_step(next(loader), unet, recipe, step, metrics)
                accelerator.backward(loss)
            parts += micro_parts / args.gradient_accumulation_steps
        optimize(args, accelerator, optimizer, lr_scheduler, ema, parameters, metrics)
        if recipe.auto_weight is not None and step >= args.lpl_start:
            recipe.auto_weight.update(*accelerator.reduce(parts, "mean"))
        done = step + 1
        reporter.step(done, batch_size, lr_scheduler.get_last_lr()[0], bar, last=done == total_steps)
        if accelerator.is_main_process:
            if done % args.checkpointing_steps == 0 or done == total_steps:
                save(done)
            if args.validation_prompt and (validation_due(done) or done == total_steps):
                draw(done)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        with train_utils.averaged_weights(ema, parameters):
            save_result(args, bare_unet, lora_config, schedule)
        reporter.finish(
            f"SDXL {'LoRA' if args.use_lora else 'full'} fine-tuning, {'with' if args.use_lpl else 'without'} LPL"
        )
    accelerator.end_training()


if __name__ == "__main__":
    with errors_for_people(ARGS.debug):
        main(ARGS, SCAN)
