"""The models of a run: loaded, or built without weights on the meta device; LoRA adapters; weights on disk.

`models` is a dictionary of the models that get an adapter, by the names that diffusers gives them in LoRA files:
`unet` or `transformer`, `text_encoder`, `text_encoder_2`.
"""

import contextlib
from collections import Counter

import diffusers
import torch
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from peft import LoHaConfig, LoKrConfig, LoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.lycoris_utils import LycorisLayer
from peft.utils import set_peft_model_state_dict
from safetensors.torch import load_file
from torch.distributed.fsdp import FSDPModule

from lpl_finetuning.adapters import (
    TEXT_ENCODER_TARGETS,
    check_patterns,
    chosen_layers,
    patterns_of,
    settings_of,
)
from lpl_finetuning.base_model import read_json, safetensors_of
from lpl_finetuning.errors import UserError, require
from lpl_finetuning.kohya_files import nested_clip_name
from lpl_finetuning.lora_files import (
    ADAPTER,
    LORA_FILE,
    PEFT_MAGNITUDE,
    adapter_state,
    find_lora,
    is_adapter,
    pattern_of,
    put_lora,
    read_lora,
)
from lpl_finetuning.tensor_files import dtype_of_weights, write_tensors
from lpl_finetuning.training.sharding import load_full_state
from lpl_utils import LatentSpace

# ---------------------------------------------------------------------------------------------------------------------
# LoRA


def is_text_encoder(part):
    """Whether a part of a pipeline is a text encoder, by its name."""
    return part.startswith("text_encoder")


def add_adapters(args, models, pipeline_class, targets):
    """Give each model a trainable adapter in float32, and freeze all other weights.

    With --init_lora, shapes and weights come from that file.

    Args:
        models: {part: model}.
        pipeline_class: diffusers' class of the pipeline, which reads --init_lora.
        targets: names of the denoiser's layers that get an adapter.

    Raises:
        UserError: a layer does not exist or can't have an adapter, or --init_lora does not fit.
    """
    for model in models.values():
        model.requires_grad_(False)
    if args.init_lora:
        loaded = load_init_lora(args, models, pipeline_class)
        check_rates(args, models)
    else:
        loaded = set()
    layers = {part: TEXT_ENCODER_TARGETS if is_text_encoder(part) else targets for part in models.keys() - loaded}
    chosen = layers_for_adapters(args, models, layers) if not loaded else {}
    for part in (part for part in models if part in layers):
        add_new_adapter(args, part, models[part], layers[part], chosen.get(part))
    for model in models.values():
        for name, parameter in model.named_parameters():
            if is_adapter(name):
                parameter.requires_grad_(True)
                parameter.data = parameter.data.float()
        leave_inputs_to_autocast(model)
        compute_products_in_float32(model)


def layers_for_adapters(args, models, layers):
    """{part: names of the layers that get an adapter} by --lora_blocks and --lora_pattern; {} without the flags.

    Args:
        models: {part: model}; layers: {part: names of layers, or ends of names}.

    Raises:
        UserError: a pattern or block fits no layer, or no layer is left.
    """
    patterns = patterns_of(args)
    names = {part: [name for name, module in models[part].named_modules() if hasattr(module, "weight")]
             for part in layers}  # fmt: skip
    chosen = {part: chosen_layers(args, part, ends, names[part]) for part, ends in layers.items()}
    check_patterns(patterns, names, chosen)
    if not patterns and not args.lora_blocks:
        return {}
    return {part: [name for name in found if settings_of(patterns, part, name).get("rank") != 0]
            for part, found in chosen.items()}  # fmt: skip


def check_rates(args, models):
    """Refuse a --lora_pattern that fits no layer of --init_lora."""
    adapted = {part: adapted_layers(model) for part, model in models.items()}
    names = {part: [name for name, module in model.named_modules() if hasattr(module, "weight")]
             for part, model in models.items()}  # fmt: skip
    check_patterns(patterns_of(args), names, adapted)


def adapted_layers(model):
    """The names of a model's layers that have an adapter."""
    return [name for name, module in model.named_modules() if isinstance(module, LoraLayer | LycorisLayer)]


def leave_inputs_to_autocast(model):
    """Let a model's adapters take their inputs as they are, where the result is the same to the last bit.

    PEFT casts an input in half precision to the float32 of the adapter's weights, and autocast casts it back. Dropout
    and DoRA compute with the float32 input in between, so that they keep it. Without autocast all weights are float32.
    """
    config = lora_config(model)
    if getattr(config, "lora_dropout", 0) or getattr(config, "use_dora", False):
        return
    for module in model.modules():
        if isinstance(module, LoraLayer | LycorisLayer):
            module.cast_input_dtype_enabled = False


def compute_products_in_float32(model):
    """Let LoHa and LoKr compute the change of a weight without autocast, from their float32 factors.

    Under autocast PEFT multiplies pairs of matrices in half precision.
    """
    for module in model.modules():
        if isinstance(module, LycorisLayer):
            module.get_delta_weight = WithoutAutocast(type(module).get_delta_weight, module)


class WithoutAutocast:
    """A method of a module that runs without autocast. A copy of the module gets a copy for itself."""

    def __init__(self, method, module):
        self.method, self.module = method, module

    def __call__(self, *args, **more):
        """What the method returns."""
        with torch.autocast(next(self.module.parameters()).device.type, enabled=False):
            return self.method(self.module, *args, **more)


def add_new_adapter(args, part, model, layers, chosen=None):
    """Give a model an adapter with the shape of the flags.

    Args:
        layers: names of the layers that get an adapter, or ends of names.
        chosen: from `layers_for_adapters`; None: all layers with those names.
    """
    if chosen is None:
        chosen = list(layers)
    rank, alpha = args.rank or 4, args.lora_alpha or args.rank or 4
    patterns, ranks, alphas = patterns_of(args), {}, {}
    for name in chosen if patterns else ():
        found = settings_of(patterns, part, name)
        own = found.get("rank", rank)
        ranks[pattern_of(part, name)], alphas[pattern_of(part, name)] = own, found.get("alpha", alpha * own / rank)
    if patterns:  # PEFT searches all keys of its patterns for each layer: the fewer, the better
        rank, alpha = (Counter(found.values()).most_common(1)[0][0] for found in (ranks, alphas))
        ranks = {key: own for key, own in ranks.items() if own != rank}
        alphas = {key: own for key, own in alphas.items() if own != alpha}
    config = new_config(args, rank, alpha, target_modules=chosen, rank_pattern=ranks, alpha_pattern=alphas)
    try:
        model.add_adapter(config, adapter_name=ADAPTER)
    except (ValueError, TypeError) as error:  # e.g. a kind of layer for which PEFT has no adapter
        raise UserError(f"--lora_layers: {error}") from None


def new_config(args, rank, alpha, **more):
    """PEFT's configuration of a new adapter of --lora_type, which changes nothing before it is trained."""
    if args.lora_type == "loha":
        return LoHaConfig(r=rank, alpha=alpha, init_weights=True, **more)
    if args.lora_type == "lokr":
        return LoKrConfig(r=rank, alpha=alpha, init_weights="lycoris", decompose_factor=args.lokr_factor, **more)
    return LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=args.lora_dropout, use_dora=args.use_dora,
                      init_lora_weights="gaussian", **more)  # fmt: skip


def load_init_lora(args, models, pipeline_class):
    """Put --init_lora into the models, in float32; return the names of the parts that it has."""
    flag, family = f"--init_lora {args.init_lora}", args.base_model.family
    lora = read_lora(flag, find_lora(flag, args.init_lora, family), family, pipeline_class, models)
    left = sorted(lora.keys() - models.keys())
    hint = "; add --train_text_encoder" if all(is_text_encoder(part) for part in left) else ""
    require(not left, f"{flag}: it has layers for {', '.join(left)}, which this run does not train{hint}")
    for part, (layers, config) in lora.items():
        if hasattr(config, "lora_dropout"):
            config.lora_dropout = args.lora_dropout
        put_lora(flag, part, models[part], layers, config, torch.float32)
    return lora.keys()


def lora_config(model):
    """Return the PEFT configuration of a model's adapter."""
    return model.peft_config[ADAPTER]


def lora_parts(models):
    """Return {part: (layers, config)}: adapters in float32 under PEFT's names, and their PEFT configurations."""
    return {
        part: ({name: value.float() for name, value in adapter_state(model).items()}, lora_config(model))
        for part, model in models.items()
    }


def save_lora(folder, parts, pipeline_class):
    """Write `pytorch_lora_weights.safetensors` in diffusers' format, with the configurations as metadata.

    Layers of text encoders get nested names. The configurations name modules without "text_model.", which matches
    nested and flat models alike. The magnitudes of DoRA in text encoders end in ".weight": transformers drops them
    without it, and PEFT reads both forms.

    Args:
        parts: from `lora_parts`.
    """
    arguments = {}
    for part, (layers, config) in parts.items():
        metadata = config.to_dict()
        if is_text_encoder(part):
            layers = {nested_clip_name(name): value for name, value in layers.items()}
            layers = {f"{name}.weight" if name.endswith(PEFT_MAGNITUDE) else name: value
                      for name, value in layers.items()}  # fmt: skip
            for field in ("rank_pattern", "alpha_pattern"):
                metadata[field] = {key.removeprefix("text_model."): value for key, value in metadata[field].items()}
        if not isinstance(metadata["target_modules"], str):
            metadata["target_modules"] = sorted(x.removeprefix("text_model.") for x in metadata["target_modules"])
        arguments |= {f"{part}_lora_layers": layers, f"{part}_lora_adapter_metadata": metadata}
    pipeline_class.save_lora_weights(folder, **arguments)


def load_lora(folder, models):
    """Load what `save_lora` wrote into models that already have adapters."""
    tensors = load_file(folder / LORA_FILE)
    for part, model in models.items():
        prefix = part + "."
        if is_text_encoder(part) and not hasattr(model, "text_model"):
            prefix += "text_model."
        layers = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        layers = {f"{name.split(PEFT_MAGNITUDE)[0]}{PEFT_MAGNITUDE}" if PEFT_MAGNITUDE in name else name: value
                  for name, value in layers.items()}  # fmt: skip
        fits = layers.keys() == adapter_state(model).keys()
        result = set_peft_model_state_dict(model, layers, adapter_name=ADAPTER) if fits else None
        require(
            fits and not result.unexpected_keys,
            f"{folder}: its LoRA has other layers for the {part} than this run's (--lora_layers, --rank, --lora_type)",
        )


# ---------------------------------------------------------------------------------------------------------------------
# Optimizer and schedule


def quantization(args, dtype):
    """Arguments of `from_pretrained` for --bnb_quantization_config_path; 4-bit weights compute in `dtype`."""
    if not args.bnb_quantization_config_path:
        return {}
    from diffusers import BitsAndBytesConfig

    settings = {"bnb_4bit_compute_dtype": str(dtype)[6:]} | read_json(args.bnb_quantization_config_path)
    return {"quantization_config": BitsAndBytesConfig(**settings)}


# ---------------------------------------------------------------------------------------------------------------------
# Models of the base pipeline


def load_part(base, cls, part, **more):
    """A part of the base pipeline without weights: a tokenizer, a scheduler or a configuration."""
    more |= base.schedule if part == "scheduler" else {}
    return cls.from_pretrained(base.name, subfolder=part, revision=base.revision, **more)


def load_part_config(base, cls, part):
    """The configuration of a part, from where its weights come from, as a dictionary."""
    place = base.place(part)
    config = cls.load_config(place.name, subfolder=place.subfolder, revision=place.revision)
    return dict(config) | base.schedule if part == "scheduler" else config


def load_model(base, cls, part, **more):
    """A part of the base model with its weights: safetensors only, unless --allow_pickle."""
    place = base.place(part)
    return cls.from_pretrained(
        place.name, subfolder=place.subfolder, revision=place.revision, variant=place.variant,
        use_safetensors=safetensors_only(base), **more,
    )  # fmt: skip


def safetensors_only(base):
    """The use_safetensors of `from_pretrained`."""
    return None if base.allow_pickle else True


def load_pipeline(base, pipeline_class, **parts):
    """The whole base pipeline with these parts in the place of its own; the others in the dtype of their files."""
    dtypes = {part: dtype_of_weights(safetensors_of(base, part)) or torch.float32
              for part in base.models() if part not in parts}  # fmt: skip
    if base.vae:
        part = base.family.autoencoder
        cls, dtype = getattr(diffusers, part.class_name), dtypes.pop(part.name)
        parts[part.name] = load_model(base, cls, part.name, dtype=dtype)
    if base.schedule:
        config = load_part_config(base, diffusers.DDPMScheduler, "scheduler")
        parts["scheduler"] = getattr(diffusers, config["_class_name"]).from_config(config)
    return pipeline_class.from_pretrained(
        base.name, revision=base.revision, variant=base.variant, dtype=dtypes | {"default": torch.float32},
        use_safetensors=safetensors_only(base), **dict.fromkeys(base.absent_parts()), **parts,
    )  # fmt: skip


def cast(model, dtype):
    """The model in another dtype. The `to` of diffusers warns of modules to be kept in float32, even of none."""
    return torch.nn.Module.to(model, dtype)


def load_vae(base, dtype, device):
    """The frozen autoencoder in `dtype`, channels-last; on the meta device without memory or weights."""
    part = base.family.autoencoder
    cls = getattr(diffusers, part.class_name)
    if str(device) == "meta":
        with torch.device("meta"):
            vae = cast(cls.from_config(vae_config(base)).requires_grad_(False), dtype)
        return torch.nn.Module.to(vae, memory_format=torch.channels_last)
    vae = load_model(base, cls, part.name, dtype=dtype)
    return vae.requires_grad_(False).eval().to(device, memory_format=torch.channels_last)


def vae_config(base):
    """The content of the autoencoder's config.json."""
    part = base.family.autoencoder
    return load_part_config(base, getattr(diffusers, part.class_name), part.name)


def load_denoiser(args, cls, dtype, device):
    """The denoiser, such as a UNet or transformer; on the meta device without memory or weights.

    Args:
        cls: its class in diffusers.
        dtype: of the computation. A model that is trained whole has float32 weights.
    """
    base, part = args.base_model, args.base_model.family.denoiser.name
    weights = dtype if args.use_lora else torch.float32
    if device == "meta":
        config = load_part_config(base, cls, part)
        with torch.device("meta"):
            return cast(cls.from_config(config), weights)
    return load_model(base, cls, part, dtype=weights, **quantization(args, dtype))


def load_text_encoder(base, cls, part, dtype, device):
    """A text encoder of the base pipeline, frozen, in eval mode; on the meta device without memory or weights."""
    if device == "meta":
        with torch.device("meta"):
            return cls(load_part(base, cls.config_class, part)).to(dtype)
    encoder = load_model(base, cls, part, dtype=dtype)
    return encoder.requires_grad_(False).eval().to(device)


def prepare_for_training(args, denoiser, pipeline_class, targets, device):
    """The script's `Denoiser` with its LoRA, checkpointing, attention and compilation, in train mode on the device.

    Args:
        targets: names of the layers that get a LoRA; pipeline_class: of diffusers, which reads --init_lora.
    """
    with torch.device("meta") if device == "meta" else contextlib.nullcontext():
        if args.use_lora:
            add_adapters(args, denoiser.models(), pipeline_class, targets)
    for model in denoiser.models().values() if args.gradient_checkpointing else ():
        if hasattr(model, "enable_gradient_checkpointing"):  # diffusers
            model.enable_gradient_checkpointing()
        else:  # transformers
            model.gradient_checkpointing_enable({"use_reentrant": False})
    denoiser = denoiser.train()
    if device == "meta":
        return denoiser
    denoiser = denoiser.to(device)
    model = next(iter(denoiser.models().values()))
    if args.enable_xformers_memory_efficient_attention:
        model.enable_xformers_memory_efficient_attention()
    if args.torch_compile:
        model.compile()
    return denoiser


def latent_space(base):
    """The `LatentSpace` of the base model's autoencoder, from config.json."""
    config = vae_config(base)
    return LatentSpace(config["scaling_factor"], config.get("shift_factor") or 0.0)


def latent_channels(base):
    """Channels of the latents of the base model's autoencoder."""
    return vae_config(base)["latent_channels"]


def decode_latents(vae, latents):
    """Images (B, 3, H, W) in [-1, 1] of the denoiser's latents (B, C, h, w), in the autoencoder's dtype."""
    return vae.decode(LatentSpace.of(vae).from_model(latents).to(vae.dtype)).sample


# ---------------------------------------------------------------------------------------------------------------------
# Trained weights on disk


def save_weights(folder, denoiser, pipeline_class, use_lora):
    """Write the trained weights as diffusers does: `unet/` or `transformer/`, or a LoRA file.

    Returns:
        {path relative to `folder`: sha256} of a model's file, which is hashed while it is written.
    """
    if use_lora:
        save_lora(folder, lora_parts(denoiser.models()), pipeline_class)
        return {}
    name, model = next(iter(denoiser.models().items()))
    model.save_config(folder / name)
    file = f"{name}/{SAFETENSORS_WEIGHTS_NAME}"
    return {file: write_tensors(folder / file, model.state_dict(), {"format": "pt"})}


def in_dtype(model, dtype):
    """A copy of a diffusers model on the CPU, in a dtype; its own weights stay as they are."""
    with torch.device("meta"):
        copy = type(model).from_config(model.config)
    tensors = {name: value.to("cpu", dtype if value.is_floating_point() else None)
               for name, value in model.state_dict().items()}  # fmt: skip
    copy.load_state_dict(tensors, assign=True)
    return copy


def load_weights(folder, denoiser, use_lora):
    """Put back what `save_weights` wrote."""
    if use_lora:
        load_lora(folder, denoiser.models())
        return
    name, model = next(iter(denoiser.models().items()))
    cls = next(kind for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))  # diffusers' own class
    saved = cls.from_pretrained(folder, subfolder=name, use_safetensors=True)
    load_full_state(model, saved.state_dict())
