"""What is said and checked before any weights load: the plan of a run, and an estimate of its memory."""

from dataclasses import replace
from itertools import pairwise

import torch

import cli_utils
from cli_utils import require
from lora_utils import lora_config
from lpl_utils import DecoderStages, LatentPerceptualLoss
from train_utils import HELD_OUT_LEVELS, lpl_config


def latent_side(args, vae):
    """Height and width of the latents."""
    return args.resolution // 2 ** (len(vae.config.block_out_channels) - 1)


def lpl_bytes(args, vae):
    """Bytes that the loss keeps for its backward pass: of all stages, or of the largest when they are recomputed."""
    config, side = lpl_config(args), latent_side(args, vae)
    totals = [0]
    for blocks in range(1 + config.num_blocks):
        with torch.device("meta"), SavedBytes() as kept:
            batch = min(args.train_batch_size, config.batch_size)
            pair = torch.randn(2, batch, vae.config.latent_channels, side, side)
            LatentPerceptualLoss(vae, replace(config, num_blocks=blocks))(pair[0].requires_grad_(), pair[1])
        totals.append(kept.total)
    stages = [after - before for before, after in pairwise(totals)]
    return max(stages) if config.checkpointing == "stage" else sum(stages)


def stage_shapes(args, vae):
    """[(C, H, W)] of the features that the loss compares; `vae` on the meta device."""
    side, stages = latent_side(args, vae), DecoderStages(vae)
    x, shapes = torch.empty(1, vae.config.latent_channels, side, side, device="meta"), []
    for index in range(1 + args.lpl_num_blocks):
        x = stages.run(index, x)
        shapes.append(tuple(x.shape[1:]))
    return shapes


# ---------------------------------------------------------------------------------------------------------------------
# Estimates before training


class SavedBytes:
    """Context that counts the bytes autograd keeps for the backward pass; on meta tensors it costs nothing.

    Leaves (parameters, inputs) are not counted: they are there anyway.
    """

    def __enter__(self):
        self.storages = {}
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *exception):
        self.hooks.__exit__(*exception)

    def _pack(self, tensor):
        if not (tensor.is_leaf and tensor.requires_grad):
            storage = tensor.untyped_storage()
            self.storages[storage._cdata] = (
                storage,
                storage.nbytes(),
            )  # the storage itself: its id must not be reused
        return tensor

    @property
    def total(self):
        """Bytes."""
        return sum(size for _, size in self.storages.values())


def parameter_bytes(parameters):
    """Bytes of a collection of parameters."""
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)


def weight_bytes(args, models):
    """Bytes of all weights; with a quantized denoiser, its frozen linear layers in 4 or 8 bits."""
    total = sum(parameter_bytes(model.parameters()) for model in models.values())
    if not args.bnb_quantization_config_path:
        return total
    share = 0.5 if cli_utils.read_json(args.bnb_quantization_config_path).get("load_in_4bit") else 1
    denoiser = next(iter(models.values()))
    linear = [module.weight for module in denoiser.modules() if isinstance(module, torch.nn.Linear)]
    frozen = [weight for weight in linear if not weight.requires_grad]
    return int(total - sum(weight.numel() * (weight.element_size() - share) for weight in frozen))


def gigabytes(count):
    """1234567890 -> "1.23 GB"; small ones in MB."""
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def optimizer_state_bytes(args, weights, count):
    """About how many bytes an optimizer keeps for `count` parameters of `weights` bytes."""
    if args.use_8bit_adam:
        return 2 * count
    return {"adamw": 2 * weights, "prodigy": 4 * weights, "adafactor": 0}[args.optimizer]


def warnings_about(args, images, held_out):
    """Remarks on what is allowed and rarely meant."""
    remarks = []
    if args.optimizer == "prodigy" and args.learning_rate < 0.1:
        remarks.append(
            f"--optimizer prodigy multiplies its own step size by --learning_rate {args.learning_rate:g}; 1 is usual"
        )
    both = (
        {image.content_hash() for image in held_out} & {image.content_hash() for image in images} if held_out else ()
    )
    if both:
        remarks.append(
            f"{len(both)} of the {len(held_out)} held-out images are trained on too: their loss proves nothing"
        )
    if args.hub_token:
        remarks.append(
            "--hub_token can be seen by others in the list of processes; prefer HF_TOKEN or `hf auth login`"
        )
    return remarks


def describe_lora(config):
    """A LoRA's configuration in a few words."""
    return f"{'DoRA' if config.use_dora else 'LoRA'} of rank {config.r}, alpha {config.lora_alpha:g}"


# ---------------------------------------------------------------------------------------------------------------------
# The plan


def truncated_captions(tokenizers, captions):
    """How many different captions are longer than the tokenizers take."""
    longest = [
        max(len(tokenizer(caption).input_ids) - tokenizer.model_max_length for tokenizer in tokenizers)
        for caption in set(captions)
    ]
    return sum(excess > 0 for excess in longest)


def check_machine(args, vae):
    """Raises UserError for what this decoder or this machine can't do; `vae` on the meta device."""
    blocks = len(vae.config.block_out_channels)
    require(args.lpl_num_blocks <= blocks,
            f"--lpl_num_blocks is {args.lpl_num_blocks}; this decoder has {blocks} up blocks")  # fmt: skip
    require(not args.enable_xformers_memory_efficient_attention or torch.cuda.is_available(),
            "--enable_xformers_memory_efficient_attention: xformers needs a CUDA GPU, and none is here")  # fmt: skip
    require(not args.bnb_quantization_config_path or torch.cuda.is_available(),
            "--bnb_quantization_config_path: quantizing needs a CUDA GPU, and none is here")  # fmt: skip


def print_plan(args, scan, held_out, accelerator, total_steps, tokenizers):
    """Configuration, data, steps and validation."""
    say = accelerator.print
    batch = args.train_batch_size * accelerator.num_processes * args.gradient_accumulation_steps
    captions = [image.caption for image in scan.images]
    cli_utils.print_configuration(args, say)
    for warning in scan.warnings + warnings_about(args, scan.images, held_out):
        say(f"warning: {warning}")
    say(f"Data: {len(captions)} images with {len(set(captions))} captions from {scan.source}; "
        f"{truncated_captions(tokenizers, captions)} captions are longer than the tokenizers take"
        + (f"; {len(held_out)} more are held out" if held_out else ""))  # fmt: skip
    say(f"Steps: {total_steps} of {batch} images ({args.train_batch_size} per device x {accelerator.num_processes} "
        f"x {args.gradient_accumulation_steps} accumulated); {len(captions) / batch:.1f} steps an epoch, "
        f"{total_steps * batch / len(captions):.1f} epochs")  # fmt: skip
    what = []
    if args.validation_prompt:
        what.append(f"{len(args.validation_prompt)} x {args.num_validation_images} images")
    if held_out:
        what.append(f"the loss of {len(held_out)} held-out images at {HELD_OUT_LEVELS} noise levels")
    if what:
        every = args.validation_steps or args.validation_epochs * len(captions) / batch
        say(f"Validation: {' and '.join(what)} every {every:g} steps"
            + ("; --validation_steps sets another interval" if args.validation_steps is None else ""))  # fmt: skip


def print_models(args, models, how, say):
    """What is trained; models: {name: model}, how: of prediction and precision."""
    for name, model in models.items():
        trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        everything = sum(parameter.numel() for parameter in model.parameters())
        kind = describe_lora(lora_config(model)) if args.use_lora else "all"
        say(f"Training: {trainable:,} of {everything:,} parameters of the {name} ({kind})")
    say(f"          {how}, {args.optimizer}")


def print_lpl_plan(args, gate, share, hint, vae, say):
    """The lines about the loss: share of gated samples, decoder stages, weight; hint: a threshold for more samples."""
    config = lpl_config(args)
    rule = f"t < {gate.limit:g}" if gate.t_threshold is not None else f"sigma / alpha <= {gate.limit:g}"
    say(f"LPL: where {rule}, {100 * share:.1f} % of samples; weight {args.lpl_weight}"
        + (f" (a share of {args.lpl_share:g} of the loss)" if args.lpl_weight == "auto" else "")
        + f"; {config.norm_type} normalization, {config.loss_type}, at most {config.batch_size} samples at a time, "
        f"checkpointing {config.checkpointing}, {str(vae.dtype)[6:]}")  # fmt: skip
    shapes = stage_shapes(args, vae)
    say("     decoder stages: " + ", ".join("x".join(map(str, shape)) for shape in shapes))
    if share < 0.02:
        say(f"warning: LPL applies to under 2 % of the samples and will hardly matter; {hint} would give 20 %")


def print_memory(parts, say):
    """The estimate; parts: [(what, bytes)]."""
    total = gigabytes(sum(size for _, size in parts))
    say(
        f"Memory, estimated: {total}: " + ", ".join(f"{what} {gigabytes(size)}" for what, size in parts if size) + "\n"
    )


def memory_parts(args, weights, trained, activations, vae):
    """[(what, bytes)] that training needs on one device, every sample taken as gated.

    weights: bytes of all models that are trained or run in every step; trained: the trainable parameters; activations:
    bytes that their forward pass keeps.
    """
    size, count = parameter_bytes(trained), sum(parameter.numel() for parameter in trained)
    parts = [
        ("weights", weights),
        ("gradients", size),
        ("optimizer state", optimizer_state_bytes(args, size, count)),
        ("EMA", size if args.use_ema and not args.offload_ema else 0),
        ("activations", activations),
    ]
    if args.use_lpl:
        decoder = parameter_bytes(vae.decoder.parameters())
        parts += [("decoder", decoder), ("LPL", lpl_bytes(args, vae))]
    return parts
