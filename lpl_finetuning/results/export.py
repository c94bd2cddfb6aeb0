"""Results in the layouts that other programs read: a LoRA in kohya's format, and a whole pipeline as one file.

A LoRA is given as `parts`, the return value of `training.models.lora_parts`: {part: (layers, config)} of the trained
parts, which are "unet" or "transformer", "text_encoder" and "text_encoder_2".

Original names are those of Stability AI's code. ComfyUI, A1111 and sd-scripts look LoRA layers up by original names,
and diffusers knows them too. Fewer programs read diffusers' own block numbers: older sd-scripts ignore such layers,
A1111 misplaces an upsampler, and diffusers itself loses `add_embedding`. Of SD3, diffusers reads no kohya file at all;
it reads its own file, which lies beside the kohya file.

diffusers has `convert_state_dict_to_kohya`. It is not used here, because it writes alpha = rank, block names for SD3
that ComfyUI does not read, and DoRA's vectors under names that no program knows. A DoRA's `dora_scale` is for the
formula of ComfyUI and Forge, see `magnitude_in_file`; LyCORIS itself divides by another norm.
"""

import functools
import json
import math
import os
import re
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, StableDiffusion3Pipeline, StableDiffusionXLPipeline
from peft.utils.other import get_pattern_key

from lpl_finetuning.adapters import layer_of
from lpl_finetuning.errors import first_names, require
from lpl_finetuning.files import follow_umask
from lpl_finetuning.kohya_files import (
    DIFFUSERS_PREFIX,
    KOHYA_PREFIXES,
    nested_clip_name,
    original_name,
    underscored,
)
from lpl_finetuning.lora_files import (
    DORA_NORM,
    KOHYA_FILE,
    LORA_FILE,
    alpha_of,
    file_for_others,
    kind_of,
    norm_ratio,
    weight_of,
)
from lpl_finetuning.original_names import (
    OPEN_CLIP_PARTS,
    QKV_THIRD,
    mmdit_name,
    replace_all,
    swaps_halves,
    unet_name,
    vae_name,
)
from lpl_finetuning.results.merging import merge_result
from lpl_finetuning.results.metadata import kohya_version, modelspec, tag_key, training_keys
from lpl_finetuning.tensor_files import save_dtype, sha256_of_tensors, write_tensors
from lpl_finetuning.training.models import in_dtype, lora_parts, save_lora

COMPONENTS = ("unet", "vae", "text_encoder", "text_encoder_2")
SD3_COMPONENTS = ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")


def write_safetensors(path, tensors, metadata):
    """Write a safetensors file that is complete or not there, even if the process is killed."""
    temporary = Path(f"{path}.tmp")
    write_tensors(temporary, tensors, metadata)
    follow_umask(temporary)
    os.replace(temporary, path)


def to_shift_and_scale(module, value, config):
    """Return the rows of SD3's `module` in the original order.

    Two modules give scale and shift in diffusers, shift and scale in the original. The rows of other modules stay.
    """
    return torch.cat(value.chunk(2)[::-1]) if swaps_halves(module, config.num_layers) else value


# ---------------------------------------------------------------------------------------------------------------------
# LoRA


def kohya_state_dict(parts, denoiser_config, models=None):
    """Return the layers under kohya's names, LoHa and LoKr under those of LyCORIS.

    Args:
        denoiser_config: configuration of the UNet or the transformer.
        models: {part: model} with the adapters; only DoRA needs them.

    Raises:
        UserError: a layer has no original name.
    """
    tensors = {}
    for part, (layers, config) in parts.items():
        is_plain = kind_of(config) == "LoRA"
        modules = {}
        for key, value in layers.items():
            module = layer_of(key)
            modules.setdefault(module, {})[key.removeprefix(f"{module}.").removesuffix(".weight")] = value
        for module, own in modules.items():
            name = kohya_name(part, module, denoiser_config, is_plain)
            if "lora_A" in own:
                found = lora_tensors(part, module, own, config, denoiser_config, (models or {}).get(part))
            else:
                found = lycoris_tensors(module, own, config)
            tensors |= {f"{name}.{ending}": value for ending, value in found.items()}
    return fuse_thirds(tensors)


def lora_tensors(part, module, own, config, denoiser_config, model):
    """{ending: tensor} of a layer of LoRA or DoRA: `lora_down.weight` (r, in), `lora_up.weight` (out, r), `alpha` ().

    Programs scale a layer by alpha / r. diffusers loses alphas that differ within a model, so every alpha is
    `lora_alpha`. Where `alpha_pattern` or rank-stabilised LoRA asks for another strength, `lora_up` is multiplied.

    Args:
        own: {matrix: tensor}; model: with the adapter, for DoRA.
    """
    other = sorted(own.keys() - {"lora_A", "lora_B", "lora_magnitude_vector"})
    require(not other, f"{part}.{module}: kohya's format has no place for {first_names(other)}; leave "
            "--output_kohya_format out")  # fmt: skip
    is_plain = "lora_magnitude_vector" not in own
    factor = alpha_of_layer(config, module) / config.lora_alpha
    factor *= math.sqrt(len(own["lora_A"])) if config.use_rslora else 1
    up = own["lora_B"] if factor == 1 else own["lora_B"] * factor
    if part == "transformer" and is_plain:
        up = to_shift_and_scale(module, up, denoiser_config)
    alpha = torch.tensor(float(config.lora_alpha))  # read by the CPU only
    found = {"lora_down.weight": own["lora_A"], "lora_up.weight": up, "alpha": alpha}
    if not is_plain:
        scale = magnitude_in_file(model, module, own, config)
        scale = to_shift_and_scale(module, scale, denoiser_config) if part == "transformer" else scale
        found["dora_scale"] = scale
    return found


def lycoris_tensors(module, own, config):
    """{ending: tensor} of a layer of LoHa or LoKr. own: {factor: tensor}.

    Programs do not scale a Kronecker product of two whole matrices, so that the first of them has the scale in it.
    """
    alpha = alpha_of_layer(config, module)
    if {"lokr_w1", "lokr_w2"} <= own.keys():
        rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern, module), config.r)
        own = own | {"lokr_w1": own["lokr_w1"] * (alpha / rank)}
    return own | {"alpha": torch.tensor(float(alpha))}


def alpha_of_layer(config, module):
    """The alpha of a module by a PEFT configuration."""
    return config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, module), alpha_of(config))


def kohya_name(part, module, denoiser_config, is_plain):
    """The name of a layer in a kohya file.

    SD3's layers have their names in diffusers where queries, keys and values can't be joined to one layer: in all
    kinds but a plain LoRA. ComfyUI reads both.
    """
    if part == "transformer" and not is_plain:
        return DIFFUSERS_PREFIX + underscored(module)
    return KOHYA_PREFIXES[part] + underscored(original_name(part, module, denoiser_config))


def magnitude_in_file(model, module, own, config):
    """DoRA's magnitudes m of a module for ComfyUI and Forge, (out, 1) or (out, 1, 1, 1).

    PEFT: W' = m V / |V| with V = W + change, norms over all inputs of an output. For a dora_scale with a number per
    output ComfyUI and Forge compute W' = dora_scale V / |W|. Both are equal with dora_scale = m |W| / |V|.
    """
    down, up, magnitude = own["lora_A"], own["lora_B"], own["lora_magnitude_vector"]
    strength = alpha_of_layer(config, module) / (math.sqrt(len(down)) if config.use_rslora else len(down))
    weight = weight_of(model.get_submodule(module).get_base_layer())
    ratio = norm_ratio(weight, down, up, strength)
    return (magnitude.flatten().to(ratio) / ratio).reshape(-1, *[1] * (weight.ndim - 1))


def fuse_thirds(tensors):
    """Join the LoRAs of queries, keys and values, `…_qkv_0` to `…_qkv_2`, into one LoRA of the layer `…_qkv`.

    The joined LoRA of n thirds with ranks r_i has rank R = sum r_i. Its `lora_up` (3 width, R) is block-diagonal, with
    rows of zeros for a third without LoRA. Its alpha is the sum of the thirds' alphas, n alpha, and each third's
    `lora_up` is multiplied by R / (n r_i), so that its strength stays n alpha / R * R / (n r_i) = alpha / r_i.
    """
    layers = {}
    for name in [name for name in tensors if QKV_THIRD.fullmatch(name)]:
        layer, third, leaf = QKV_THIRD.fullmatch(name).groups()
        layers.setdefault(layer, {}).setdefault(leaf, {})[int(third)] = tensors.pop(name)
    for layer, leaves in layers.items():
        downs, ups = leaves[".lora_down.weight"], leaves[".lora_up.weight"]
        rank, width = sum(map(len, downs.values())), len(next(iter(ups.values())))
        ups = {third: up * (rank / (len(ups) * up.shape[1])) for third, up in ups.items()}
        empty = next(iter(ups.values())).new_zeros(width, 0)
        blocks = [ups.get(third, empty) for third in range(3)]
        tensors[f"{layer}.lora_down.weight"] = torch.cat([downs[third] for third in sorted(downs)])
        tensors[f"{layer}.lora_up.weight"] = torch.block_diag(*blocks)
        tensors[f"{layer}.alpha"] = sum(leaves[".alpha"].values())
    return tensors


def save_kohya(folder, parts, denoiser_config, dtype=torch.float32, name=KOHYA_FILE, about=None, models=None):
    """Write a LoRA for ComfyUI, sd-scripts and (SDXL only) A1111, with hashes of its tensors in the metadata.

    Programs that read a whole SD3 take heads of width 64 for granted. For a LoRA they do not, so that the LoRA of a
    smaller model is written like any other.

    Args:
        denoiser_config: configuration of the UNet or the transformer.
        dtype: of the matrices; alphas are float32.
        name: of the file.
        about: {key: text} for the file's metadata.
        models: {part: model} with the adapters; only DoRA needs them.
    """
    tensors = {name: value if name.endswith(".alpha") else value.to(dtype)
               for name, value in kohya_state_dict(parts, denoiser_config, models).items()}  # fmt: skip
    ranks = {value.shape[0] for name, value in tensors.items() if "lora_down" in name}
    for _, config in () if ranks else parts.values():
        ranks |= {config.r, *config.rank_pattern.values()}
    alphas = {value.item() for name, value in tensors.items() if name.endswith(".alpha")}
    module, version = kohya_version(denoiser_config)
    metadata = {
        "format": "pt",
        "ss_network_module": module,
        "ss_base_model_version": version,
        "ss_network_dim": str(ranks.pop()) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": f"{alphas.pop():g}" if len(alphas) == 1 else "Dynamic",
    }
    metadata |= lycoris_keys(parts)
    sha256 = sha256_of_tensors(tensors)
    metadata |= {"sshs_model_hash": sha256, "modelspec.hash_sha256": f"0x{sha256}"} | (about or {})
    write_safetensors(Path(folder, name), tensors, metadata)


def lycoris_keys(parts):
    """{key: text} that tell programs which kind of LyCORIS' networks a file is of; {} for a plain LoRA."""
    config = next(iter(parts.values()))[1]
    kind = kind_of(config)
    if kind == "LoRA":
        return {}
    arguments = {"algo": "lora" if kind == "DoRA" else kind.lower()}
    arguments |= {"dora_wd": True, "wd_on_output": True} if kind == "DoRA" else {}
    arguments |= {"factor": config.decompose_factor} if kind == "LoKr" else {}
    found = {"ss_network_module": "lycoris.kohya", "ss_network_args": json.dumps(arguments)}
    return found | ({DORA_NORM: "base weight"} if kind == "DoRA" else {})


def kohya_exporter(args, images, plan):
    """Function (folder, denoiser, step, name) that writes a run's LoRA for other programs; tags are counted once.

    Args:
        images: the images that it is trained on; plan: the `Plan`.
    """
    tags = functools.cache(lambda: tag_key(args, images))

    def save(folder, denoiser, step, name):
        config = next(iter(denoiser.models().values())).config
        about = modelspec(args, config, plan.schedule.prediction_type, is_lora=True)
        about |= training_keys(args, plan, images, step) | tags()
        dtype = save_dtype(args)
        save_kohya(folder, lora_parts(denoiser.models()), config, dtype, name, about, denoiser.models())

    return save


def checkpoint_exporter(args, images, plan):
    """Function (folder, denoiser, step) that puts the LoRA for other programs into a checkpoint's folder.

    None without --checkpoints_kohya_format. images, plan: see `kohya_exporter`.
    """
    if not args.checkpoints_kohya_format:
        return None
    save = kohya_exporter(args, images, plan)
    return lambda folder, denoiser, step: save(folder, denoiser, step, file_for_others(args, step))


# ---------------------------------------------------------------------------------------------------------------------
# The whole pipeline in one file


def original_unet(unet):
    """Return the UNet's tensors under their original names."""
    tensors = {}
    for parameter, value in unet.state_dict().items():
        module, _, leaf = parameter.rpartition(".")
        tensors[f"{unet_name(module, unet.config)}.{leaf}"] = value
    return tensors


def original_transformer(transformer):
    """Return the tensors of SD3's transformer under original names; queries, keys and values in one, (3 width, …)."""
    tensors, thirds = {}, {}
    for parameter, value in transformer.state_dict().items():
        module, _, leaf = parameter.rpartition(".")
        name = leaf if module == "pos_embed" else f"{mmdit_name(module)}.{leaf}"
        if match := QKV_THIRD.fullmatch(name):
            thirds.setdefault(match[1] + match[3], {})[match[2]] = value
        else:
            tensors[name] = to_shift_and_scale(module, value, transformer.config)
    return tensors | {name: torch.cat([found[third] for third in "012"]) for name, found in thirds.items()}


def original_vae(vae):
    """Return the autoencoder's tensors under original names, its attention as 1x1 convolutions, (C, C, 1, 1)."""
    require(
        type(vae) is AutoencoderKL,
        f"vae: {type(vae).__name__} has no place in the original layout; leave --single_file out",
    )
    tensors = {vae_name(name, len(vae.config.up_block_types)): value for name, value in vae.state_dict().items()}
    return {name: value[:, :, None, None] if ".attn_1." in name and value.ndim == 2 else value
            for name, value in tensors.items()}  # fmt: skip


def open_clip(text_encoder):
    """Return a text encoder's tensors as OpenCLIP has them: q, k and v in one, the projection transposed."""
    ours = text_encoder.state_dict()
    tensors = {}
    for name, value in ours.items():
        if ".q_proj." in name:
            value = torch.cat([ours[name.replace(".q_proj.", f".{which}_proj.")] for which in "qkv"])
        if not re.search(r"\.[kv]_proj\.", name):
            tensors[replace_all(name, OPEN_CLIP_PARTS)] = value.T if name == "text_projection.weight" else value
    return tensors


def original_state_dict(unet, vae, text_encoder, text_encoder_2):
    """Return the tensors of a whole SDXL under original names, without the constants position_ids and logit_scale."""
    return {
        **{f"model.diffusion_model.{name}": value for name, value in original_unet(unet).items()},
        **{f"first_stage_model.{name}": value for name, value in original_vae(vae).items()},
        **{f"conditioner.embedders.0.transformer.{nested_clip_name(name)}": value
           for name, value in text_encoder.state_dict().items()},
        **{f"conditioner.embedders.1.model.{name}": value for name, value in open_clip(text_encoder_2).items()},
    }  # fmt: skip


def original_sd3_state_dict(transformer, vae, text_encoder, text_encoder_2, text_encoder_3):
    """Return the tensors of a whole SD3 under original names; text_encoder_3 (T5) may be None.

    Programs take the projection of `text_encoder` (CLIP-L) for the identity: ComfyUI skips the projection, diffusers
    replaces it. Any other projection is therefore multiplied into the layer that takes its output, (width, pooled).
    """
    clip_l, clip_g = text_encoder.state_dict(), text_encoder_2.state_dict()
    t5 = text_encoder_3.state_dict() if text_encoder_3 is not None else {}
    if t5:  # diffusers' loader looks for this one tensor under both names; safetensors holds no tensor twice
        t5["encoder.embed_tokens.weight"] = t5["shared.weight"].clone()
    mmdit = original_transformer(transformer)
    projection, pooled = clip_l["text_projection.weight"], mmdit["y_embedder.mlp.0.weight"]
    mmdit["y_embedder.mlp.0.weight"] = torch.cat([pooled[:, : len(projection)] @ projection.to(pooled),
                                                  pooled[:, len(projection) :]], dim=1)  # fmt: skip
    clip_l["text_projection.weight"] = torch.eye(projection.shape[1]).to(projection)
    return {
        **{f"model.diffusion_model.{name}": value for name, value in mmdit.items()},
        **{f"first_stage_model.{name}": value for name, value in original_vae(vae).items()},
        **{f"text_encoders.clip_l.transformer.{nested_clip_name(name)}": value for name, value in clip_l.items()},
        **{f"text_encoders.clip_g.transformer.{nested_clip_name(name)}": value for name, value in clip_g.items()},
        **{f"text_encoders.t5xxl.transformer.{name}": value for name, value in t5.items()},
    }


LAYOUTS = {  # pipeline class: (names of its models, function that returns the tensors of those models)
    StableDiffusionXLPipeline: (COMPONENTS, original_state_dict),
    StableDiffusion3Pipeline: (SD3_COMPONENTS, original_sd3_state_dict),
}


def save_single_file(pipeline, path, dtype=torch.float16, about=None):
    """Write a whole SDXL or SD3 as the single file that ComfyUI loads, and A1111 for SDXL.

    The empty tensor `v_pred` marks a v-prediction model, the empty tensor `ztsnr` zero terminal SNR. Programs take
    everything else for granted. For SDXL: the shapes, the noise schedule, and a scale of 0.13025 for the latents. For
    SD3: as many heads as blocks, heads of width 64, a timestep shift of 3, and latents scaled by 1.5305 and shifted by
    0.0609.

    Args:
        pipeline: the pipeline or its folder.
        dtype: dtype of the tensors in the file.
        about: {key: text} for the file's metadata.

    Raises:
        UserError: the layout can't hold the pipeline.
    """
    if not isinstance(pipeline, DiffusionPipeline):
        parts = DiffusionPipeline.load_config(pipeline)
        absent = [name for name, kind in parts.items() if isinstance(kind, list | tuple) and kind[0] is None]
        pipeline = DiffusionPipeline.from_pretrained(
            pipeline, dtype=dtype, use_safetensors=True, **dict.fromkeys(absent)
        )
    require(type(pipeline) in LAYOUTS, f"{type(pipeline).__name__}: single files are there for SDXL and SD3")
    components, layout = LAYOUTS[type(pipeline)]
    schedule, models = pipeline.scheduler.config, [getattr(pipeline, name) for name in components]
    prediction_type = schedule.get("prediction_type", "epsilon")  # flow matching has no such setting
    require(prediction_type in ("epsilon", "v_prediction"),
            f"prediction type {prediction_type}: other programs know epsilon and v_prediction")  # fmt: skip
    require(not any(".lora_A." in name for model in models if model is not None for name in model.state_dict()),
            "the pipeline has a LoRA loaded: call its fuse_lora() and unload_lora_weights() before")  # fmt: skip
    tensors = {name: value.to("cpu", dtype) for name, value in layout(*models).items()}
    if prediction_type == "v_prediction":
        tensors["v_pred"] = torch.tensor([])
    if schedule.get("rescale_betas_zero_snr", False):
        tensors["ztsnr"] = torch.tensor([])
    write_safetensors(path, tensors, {"format": "pt"} | (about or {}))


def cast(layers, dtype):
    """{name: tensor} in a dtype."""
    return {name: value.to(dtype) for name, value in layers.items()}


def save_result(args, denoiser, pipeline_class, result_pipeline, images, plan, step):
    """Write the result into --output_dir: a LoRA or a whole pipeline, and their other formats.

    With --merge_into a LoRA is also added to the base model, for a whole pipeline in that folder.

    What was trained is saved in --save_dtype, by default float32; the other parts of a pipeline in the dtype of the
    base model. A single file has one dtype, by default float16.

    Args:
        denoiser: the script's `Denoiser` with full weights.
        pipeline_class: diffusers' class of the pipeline.
        result_pipeline: function that returns the whole pipeline, {name: model} in the place of the base model's.
        images: the images that it was trained on; plan: the `Plan`; step: optimizer steps that were made.
    """
    folder, dtype = Path(args.output_dir), save_dtype(args)
    part, model = next(iter(denoiser.models().items()))
    if args.use_lora:
        parts = lora_parts(denoiser.models())
        save_lora(
            folder, {name: (cast(layers, dtype), config) for name, (layers, config) in parts.items()}, pipeline_class
        )
        follow_umask(folder / LORA_FILE)
        if args.output_kohya_format:
            kohya_exporter(args, images, plan)(folder, denoiser, step, file_for_others(args))
        if args.merge_into:
            merge_result(args.base_model.family, folder, result_pipeline, Path(args.merge_into))
        return
    pipeline = result_pipeline(**denoiser.models())
    if args.single_file:
        about = modelspec(args, model.config, plan.schedule.prediction_type, is_lora=False)
        save_single_file(pipeline, folder / file_for_others(args), save_dtype(args, "float16"), about)
    if dtype != torch.float32:
        pipeline.register_modules(**{part: in_dtype(model, dtype)})
    pipeline.save_pretrained(folder)
    for part in pipeline.components:
        follow_umask(folder / part)
