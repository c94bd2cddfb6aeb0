"""Layers in the files of sd-scripts, LyCORIS and OneTrainer, under their names in diffusers and PEFT.

A tensor is called `layer.ending`: the layer as `lora_unet_…`, the ending as `lora_down.weight`, `hada_w1_a` or
`lokr_w1`. SD3's original layout has queries, keys and values in one layer, `…_attn_qkv`; diffusers has three, which
share its rows. Letters: r rank, R rank of a layer that three layers were joined to. No torch at the top.
"""

import re
from collections import defaultdict

from lpl_finetuning.errors import UserError, first_names, require
from lpl_finetuning.original_names import mmdit_name, swaps_halves, unet_name

KOHYA_PREFIXES = {
    "unet": "lora_unet_",
    "transformer": "lora_unet_",
    "text_encoder": "lora_te1_",
    "text_encoder_2": "lora_te2_",
}
DIFFUSERS_PREFIX = "lora_transformer_"  # SD3's layers by their names in diffusers, as OneTrainer writes them
KOHYA_STARTS = (*sorted(set(KOHYA_PREFIXES.values())), DIFFUSERS_PREFIX, "lora_te_", "lora_te3_", "lycoris_")
PEFT_ENDINGS = {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight"}
ROWS = ("lora_up.weight", "hada_w1_a", "hada_w2_a", "dora_scale", "lokr_w1", "lokr_w1_a")  # that outputs follow


def nested_clip_name(name):
    """Return a name with the "text_model." that other programs expect and transformers 5 drops in `CLIPTextModel`."""
    return name if name.startswith(("text_model.", "text_projection")) else "text_model." + name


def original_name(part, module, denoiser_config):
    """Return the original name of a module of `part`."""
    if part == "unet":
        return unet_name(module, denoiser_config)
    return mmdit_name(module) if part == "transformer" else nested_clip_name(module)


def names_in_files(part, module, config):
    """(name of the layer in a kohya file, third) of a module; third: 0 to 2 of a layer qkv, None of a whole layer."""
    if part.startswith("text_encoder"):
        yield KOHYA_PREFIXES[part] + underscored(nested_clip_name(module)), None
        return
    own = underscored(module)
    prefixes = ("lora_unet_", "lycoris_") + ((DIFFUSERS_PREFIX,) if part == "transformer" else ())
    yield from ((prefix + own, None) for prefix in prefixes)
    try:
        name = underscored(original_name(part, module, config))
    except UserError:  # no place in the original layout, as the modules that only hold others
        return
    third = re.fullmatch(r"(.+_qkv)_([012])", name)
    yield "lora_unet_" + (third[1] if third else name), int(third[2]) if third else None


def underscored(name):
    """A name with underscores for dots."""
    return name.replace(".", "_")


def places_of(models):
    """{name of a layer in a kohya file: {third: (part, module)}} of all layers of the models."""
    places = defaultdict(dict)
    for part, model in models.items():
        for module, layer in model.named_modules():
            if getattr(layer, "weight", None) is not None and layer.weight.ndim > 1:
                for name, third in names_in_files(part, module, getattr(model, "config", None)):
                    places[name][third] = part, module
    return places


def from_kohya(flag, path, tensors, models):
    """({part: {PEFT's name: tensor}}, {part: {module: alpha}}) of a file whose layers have kohya's names.

    The alpha of a LoKr of two whole matrices does not count in these files: the module's alpha is 1, as its rank.

    Args:
        flag: begins the message; path: of the file.
        models: {part: model} of the parts that may have an adapter; others are found by their names' start.

    Raises:
        UserError: a layer has no place, or can't be divided as diffusers' layers are.
    """
    layers = defaultdict(dict)
    for name, value in tensors.items():
        layer, _, ending = name.partition(".")
        layers[layer][ending] = value
    places, lora, alphas, lost = places_of(models), defaultdict(dict), defaultdict(dict), []
    for layer, found in layers.items():
        if layer not in places:
            absent = [part for part in KOHYA_PREFIXES if part.startswith("text") and part not in models]
            part = next((part for part in absent if layer.startswith(KOHYA_PREFIXES[part])), None)
            lost += [layer] if part is None else []
            lora[part][layer] = None
            continue
        for third, (part, module) in sorted(places[layer].items(), key=str):
            own = dict(found)
            if third is not None:
                own = third_of(f"{flag}: {path.name}", layer, found, third)
            if own is None:
                continue
            if part == "transformer" and swaps_halves(module, models[part].config.num_layers):
                diffusers_order = layer == DIFFUSERS_PREFIX + underscored(module)  # ComfyUI turns the change itself
                turned = ("dora_scale",) if diffusers_order else ROWS
                own |= {ending: divided(f"{flag}: {path.name}", layer, value, 2, slice(None, None, -1))
                        for ending, value in own.items() if ending in turned}  # fmt: skip
            if "alpha" in own:
                alphas[part][module] = float(own.pop("alpha"))
            if {"lokr_w1", "lokr_w2"} <= own.keys():
                alphas[part][module] = 1.0
            lora[part] |= {f"{module}.{PEFT_ENDINGS.get(ending, ending)}": value for ending, value in own.items()}
    lora.pop(None, None)
    require(not lost, f"{flag}: {len(lost)} of the {len(layers)} layers in {path.name} are no layers of this model "
            f"({first_names(sorted(lost)[:2], len(lost))}); give a LoRA that was made for it")  # fmt: skip
    return lora, alphas


def third_of(flag, layer, found, third):
    """The tensors of one of the three layers that a layer qkv is divided into; None where it has no LoRA.

    A LoRA that was joined from layers of their own is block-diagonal, (3 width, R): each of the three gets its own
    r columns back, and r / R of alpha, so that its strength stays alpha / R.
    """
    own = {ending: divided(flag, layer, value, 3, third) if ending in ROWS and value.ndim else value
           for ending, value in found.items()}  # fmt: skip
    if "lora_up.weight" not in found:
        return own
    used = [block.ne(0).any(dim=0) for block in found["lora_up.weight"].chunk(3)]
    overlap = any((used[a] & used[b]).any() for a, b in ((0, 1), (0, 2), (1, 2)))
    if overlap or not any(columns.any() for columns in used):
        return own
    columns = used[third]
    if not columns.any():
        return None
    rank = len(found["lora_down.weight"])
    own |= {"lora_up.weight": own["lora_up.weight"][:, columns], "lora_down.weight": own["lora_down.weight"][columns]}
    return own | {"alpha": found["alpha"] * int(columns.sum()) / rank} if "alpha" in found else own


def divided(flag, layer, value, count, chosen):
    """The rows of a tensor that belong to some of `count` equal parts of a layer's outputs.

    chosen: number of the part, or a slice for an order of all parts.
    """
    import torch

    require(len(value) % count == 0, f"{flag}: {layer} is a product that can't be divided into {count} layers, as "
            "diffusers has them; it can't be trained here")  # fmt: skip
    parts = list(value.chunk(count))
    return torch.cat(parts[chosen]) if isinstance(chosen, slice) else parts[chosen]
