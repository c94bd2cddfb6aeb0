"""LoRA files: what may be in them, told from the header; reading them; putting them into models.

diffusers and PEFT drop the tensors that they do not know. Here every tensor of a file ends in the adapter with its own
values, or the file is refused with the names and the number of the tensors. Nothing here imports torch at the top.

A LoRA in memory is {part: (layers, config)}: tensors in float32 under PEFT's names, and a PEFT configuration.
"""

import contextlib
import json
import re
from collections import Counter, defaultdict
from dataclasses import fields
from pathlib import Path

from lpl_finetuning.base_model import hub_like, hub_problem, tensors_of, weight_problem
from lpl_finetuning.errors import UserError, counted, first_names, is_or_are, require
from lpl_finetuning.files import digest
from lpl_finetuning.kohya_files import KOHYA_STARTS, from_kohya

LORA_FILE = "pytorch_lora_weights.safetensors"
KOHYA_FILE = "pytorch_lora_weights_kohya.safetensors"  # for other programs, without --output_name
SINGLE_FILE = "model.safetensors"  # a whole model for other programs, without --output_name
ADAPTER = "default"  # PEFT's name of the adapter
DOWN = (".lora_A.weight", ".lora_down.weight", ".lora.down.weight", "_lora.down.weight",
        ".lora_linear_layer.down.weight")  # fmt: skip
UP = (".lora_B.weight", ".lora_up.weight", ".lora.up.weight", "_lora.up.weight", ".lora_linear_layer.up.weight")
DORA_SCALE = ".dora_scale"  # DoRA's magnitudes in kohya's format; some programs give one per input
PEFT_MAGNITUDE = ".lora_magnitude_vector"  # in PEFT's names
MAGNITUDE = (PEFT_MAGNITUDE, f"{PEFT_MAGNITUDE}.weight", DORA_SCALE)
KINDS = {  # of LyCORIS -> endings of their tensors
    "LoHa": tuple(f".hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")),
    "LoKr": tuple(f".lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")),
}
WHOLE_LAYERS = {  # kind -> for each factor of a layer the endings of tensors that make it, one set of them at least
    "LoHa": ([{".hada_w1_a", ".hada_w1_b"}], [{".hada_w2_a", ".hada_w2_b"}]),
    "LoKr": ([{".lokr_w1"}, {".lokr_w1_a", ".lokr_w1_b"}], [{".lokr_w2"}, {".lokr_w2_a", ".lokr_w2_b"}]),
}  # fmt: skip
LORA_ENDINGS = (*DOWN, *UP, *MAGNITUDE, *KINDS["LoHa"], *KINDS["LoKr"], ".lora_B.bias", ".alpha")
DORA_NORM = "lpl_dora_norm"  # in a file's metadata: what the norm is of that divides its dora_scale
OTHER_KINDS = {  # pattern in a tensor's name -> what such a tensor is of
    r"\.b?oft_|\.boft": "OFT", r"\.lora_mid": "a convolution in three matrices", r"^bundle_emb":
    "an embedding", r"\.diff(_b)?$": "a difference of whole weights", r"\.[wb]_norm$":
    "a norm", r"\.modules_to_save": "whole weights", r"\.[ab][12]\.weight$": "GLoRA", r"\.on_input$": "IA3",
}  # fmt: skip
NEW_BASE = ("pissa", "olora", "corda", "loftq")  # PEFT's starting points that change the base model's weights
MERGED = "merged.json"  # in a pipeline with a LoRA added: which run's LoRA it is


def file_for_others(args, step=None):
    """The name of the file that a run writes for other programs; None where it writes none.

    Args:
        step: optimizer steps of the checkpoint that the file belongs to; None for the result's file.
    """
    if not (args.output_kohya_format or args.single_file):
        return None
    default = KOHYA_FILE if args.output_kohya_format else SINGLE_FILE
    name = args.output_name or default.removesuffix(".safetensors")
    return f"{name}.safetensors" if step is None else f"{name}-step{step:08d}.safetensors"


# ---------------------------------------------------------------------------------------------------------------------
# From the header, without torch


def check_init_lora(args, family):
    """Refuse what --init_lora names if it can't be a LoRA, or one that the run's other flags do not fit."""
    if not args.init_lora:
        return
    flag = f"--init_lora {args.init_lora}"
    path = check_lora(flag, args.init_lora, family)
    kind = path and lycoris_kind(tensors_of(path)[0])
    require(not (kind and args.lora_dropout),
            f"{flag} is a {kind}: --lora_dropout is for LoRA and DoRA, leave it out")  # fmt: skip
    require(not (kind and args.bnb_quantization_config_path), f"{flag} is a {kind}, which is added to whole weights: "
            "leave --bnb_quantization_config_path out")  # fmt: skip


def check_lora(flag, name, family):
    """The path of the LoRA's file; None for a name on the Hub. UserError for what can't be a LoRA of the family.

    Args:
        flag: begins the message.
        name: file, folder or name on the Hub.
    """
    path = Path(name)
    if not path.exists():
        require(name.count("/") == 1 and hub_like(name),
                f"{flag}: there is no such file or folder, and Hub names have the form owner/name")  # fmt: skip
        problem = hub_problem()
        require(not problem, f"{flag}: no file or folder here, and {problem}; give a file, or connect")
        return None
    if path.is_dir():
        path = lora_file(flag, path)
    require(path.suffix == ".safetensors", f"{flag}: {path.suffix or 'a file without an ending'} is not read, only "
            ".safetensors; save the LoRA in that format")  # fmt: skip
    check_lora_file(flag, path, family)
    return path


def lora_file(flag, folder):
    """The .safetensors file of a folder that is read as a LoRA: the one of diffusers' name, else the only one."""
    files = sorted(folder.glob("*.safetensors"))
    found = sorted(file.name for file in folder.iterdir())[:3]
    require(files, f"{flag}: no .safetensors there, only {', '.join(found) or 'nothing'}; give the folder or file "
            "of a LoRA")  # fmt: skip
    usual = [file for file in files if file.name == LORA_FILE] or files
    require(len(usual) == 1, f"{flag}: {len(files)} .safetensors files there ({first_names([x.name for x in files])}) "
            "and none is called " + LORA_FILE + "; give the file of a LoRA")  # fmt: skip
    return usual[0]


def check_lora_file(flag, path, family):
    """Refuse a file with tensors that are not a LoRA's, or that do not make whole layers; its header is read."""
    problem = weight_problem(path)
    require(not problem, f"{flag}: no LoRA could be read there: {path.name} {problem}")
    header = tensors_of(path)[0]
    foreign = [name for name in header if not name.endswith(LORA_ENDINGS)]
    kinds = sorted({kind for mark, kind in OTHER_KINDS.items() if any(re.search(mark, n) for n in foreign)})
    require(kinds or any("lora" in name.lower() for name in header) or lycoris_kind(header),
            f"{flag}: no LoRA could be read there: {path.name} holds {first_names(list(header)[:1]) or 'no tensors'} "
            "and no layers of a LoRA; a whole model is --pretrained_model_name_or_path")  # fmt: skip
    endings = sorted({re.search(r"[^.]+(\.weight|\.bias)?$", name)[0] for name in foreign})
    hint = f": {', '.join(kinds)}" if kinds else ""
    require(not foreign, f"{flag}: {len(foreign)} of the {len(header)} tensors in {path.name} "
            f"{is_or_are(len(foreign))} not a LoRA's ({first_names(endings)}{hint}) and can't be trained here; give "
            "a LoRA without them")  # fmt: skip
    check_family(flag, path, header, family)
    check_layers(flag, path, header)


DENOISERS = {  # starts of the names of their layers, in diffusers' format and in those of sd-scripts and OneTrainer
    "unet": r"unet\.|lora_unet_(input|middle|output|down|mid|up)_",
    "transformer": r"transformer\.|lora_unet_joint_blocks_|lora_transformer_transformer_blocks_",
    "Flux transformer": r"lora_unet_(double|single)_blocks_",
}


def check_family(flag, path, header, family):
    """Refuse a file whose layers are those of another denoiser."""
    for other, starts in DENOISERS.items():
        found = [name for name in header if re.match(starts, name)]
        require(not found or other == family.denoiser.name,
                f"{flag}: {path.name} is not a LoRA for {family.title}: {len(found)} of its {len(header)} tensors "
                f"are of a {other}, and {family.title} has a {family.denoiser.name}; give the base model that the "
                "LoRA was made for")  # fmt: skip


def check_layers(flag, path, header):
    """Refuse layers that are not whole, and magnitudes of DoRA in a form that PEFT does not have."""
    layers = defaultdict(dict)
    for name, tensor in header.items():
        layer, ending = split_name(name)
        kind = next((i for i, group in enumerate((DOWN, UP)) if ending in group), ending)
        layers[layer][kind] = tensor["shape"]
    kind = lycoris_kind(header)
    others = [name for name in header if kind and not name.endswith((*KINDS[kind], DORA_SCALE, ".alpha"))]
    require(not others, f"{flag}: {path.name} holds layers of a {kind} and {counted(len(others), 'tensor')} of "
            f"another kind ({first_names(others[:1], len(others))}), which can't be trained together; give a file of "
            "one kind")  # fmt: skip
    whole = [layer for layer, found in layers.items() if is_whole(found, kind)]
    halves = [layer for layer in layers if layer not in whole]
    require(not halves, f"{flag}: {path.name} has {counted(len(halves), 'layer')} without "
            f"{f'all the matrices of a {kind}' if kind else 'one of the two matrices'} ({first_names(halves)}); "
            "download the file again")  # fmt: skip
    scaled = [layer for layer in whole if kind and DORA_SCALE in layers[layer]]
    require(not scaled, f"{flag}: {len(scaled)} of the {len(whole)} layers in {path.name} are a {kind} with "
            "magnitudes (dora_scale), which can't be trained here; give a file without them")  # fmt: skip
    turned = [layer for layer in whole if DORA_SCALE in layers[layer] and not is_per_output(layers[layer])]
    shape = layers[turned[0]][DORA_SCALE] if turned else None
    require(not turned, f"{flag}: {len(turned)} of the {len(whole)} layers in {path.name} are DoRA with a magnitude "
            f"per input (dora_scale of shape {shape}); only a magnitude per output can be trained here: give a LoRA, "
            "or a DoRA of that kind")  # fmt: skip


def lycoris_kind(names):
    """LoHa or LoKr, if some of the tensors are of that kind; None of a LoRA."""
    return next((kind for kind, endings in KINDS.items() if any(name.endswith(endings) for name in names)), None)


def is_whole(found, kind):
    """Whether a layer has all its matrices. found: {ending, or 0 and 1 of LoRA's: shape}; kind: see `lycoris_kind`."""
    if kind is None:
        return {0, 1} <= found.keys()
    return all(any(needed <= found.keys() for needed in choices) for choices in WHOLE_LAYERS[kind])


def split_name(name):
    """(layer, ending) of a tensor's name, with the longest ending of `LORA_ENDINGS` that fits."""
    ending = max((ending for ending in LORA_ENDINGS if name.endswith(ending)), key=len)
    return name.removesuffix(ending), ending


def is_per_output(shapes):
    """Whether a layer's dora_scale has a number per output; shapes: {0: of the down matrix, 1: up, DORA_SCALE: …}."""
    down, up, magnitude = shapes[0], shapes[1], shapes[DORA_SCALE]
    if len(down) < 2 or not up or not magnitude:
        return False
    inputs, outputs = down[1], up[0]
    if magnitude[0] == outputs:
        return all(size == 1 for size in magnitude[1:])
    return len(magnitude) == 4 and magnitude == [1, outputs, 1, 1] and outputs != inputs  # PEFT's, of convolutions


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def find_lora(flag, name, family):
    """The path of the LoRA's file that a file, folder or name on the Hub stands for, checked; it may be downloaded."""
    path = check_lora(flag, name, family)
    if path is None:
        from huggingface_hub import HfApi, hf_hub_download

        try:
            files = [file for file in HfApi().list_repo_files(name) if re.fullmatch(r"[^/]+\.safetensors", file)]
            usual = [file for file in files if file == LORA_FILE] or files
            path = Path(hf_hub_download(name, usual[0])) if len(usual) == 1 else None
        except Exception as error:  # no such repository, no network, no access: many kinds
            raise unreadable_lora(flag, error) from None
        require(path, f"{flag}: {len(files)} .safetensors files there ({first_names(files)}) and none is called "
                f"{LORA_FILE}; download the file of a LoRA and give it")  # fmt: skip
        check_lora_file(flag, path, family)
    return path


def unreadable_lora(flag, error):
    """The UserError for a LoRA that a library can't read."""
    return UserError(f"{flag}: no LoRA could be read there ({type(error).__name__}: {' '.join(str(error).split())})")


def read_lora(flag, path, family, pipeline_class, models):
    """The LoRA {part: (layers, config)} of a file that `check_lora_file` passed.

    Args:
        flag: begins the message.
        family: the models that the LoRA must be for.
        pipeline_class: diffusers' class of the pipeline, which knows other programs' names of layers.
        models: {part: model}; the UNet's configuration tells the blocks that sd-scripts numbers.

    Raises:
        UserError: a tensor has no place in diffusers' names, or the file's configuration can't be followed.
    """
    from safetensors import safe_open
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
        with safe_open(path, "pt") as file:
            own = file.metadata() or {}
            metadata = json.loads(own.get("lora_adapter_metadata", "{}"))
    except Exception as error:  # a damaged file: many kinds
        raise unreadable_lora(flag, error) from None
    kind = lycoris_kind(tensors)
    if any(name.startswith(KOHYA_STARTS) for name in tensors):
        lora, alphas = from_kohya(flag, path, tensors, models)
    elif kind:
        lora, alphas = by_part(flag, path, tensors, family), defaultdict(dict)
    else:
        lora, alphas = from_diffusers(flag, path, tensors, family, pipeline_class, models)
    for part, layers in lora.items():
        lora[part] = {name: value.float() for name, value in with_magnitudes(layers).items()} if part in models else {}
        if DORA_NORM in own and part in models:
            restore_magnitudes(models[part], lora[part], alphas[part])
    return {part: (layers, config_of(flag, part, kind, layers, alphas[part], metadata))
            for part, layers in lora.items()}  # fmt: skip


def by_part(flag, path, tensors, family):
    """{part: {PEFT's name: tensor}} of tensors called part.name, the text encoders' names as PEFT has them."""
    known, lora = (family.denoiser.name, *family.text_encoders), defaultdict(dict)
    for name, value in tensors.items():
        part, _, own = name.partition(".")
        lora[part][own] = value
    lost = [name for name in tensors if name.partition(".")[0] not in known]
    require(not lost, f"{flag}: {len(lost)} of the {len(tensors)} tensors in {path.name} have names of no layer of "
            f"{family.title} ({first_names(lost[:2], len(lost))}); give a file for {family.title}")  # fmt: skip
    return lora


def from_diffusers(flag, path, tensors, family, pipeline_class, models):
    """({part: {PEFT's name: tensor}}, {part: {module: alpha}}) of a LoRA in a format that diffusers reads."""
    try:
        apart = {name: tensors.pop(name) for name in list(tensors) if name.endswith((".alpha", *MAGNITUDE))}
        names = peft_names(tensors, pipeline_class, getattr(models.get("unet"), "config", None))
    except Exception as error:  # names that diffusers can't follow: many kinds
        raise unreadable_lora(flag, error) from None
    lost = sorted(set(tensors) - set(names))
    require(not lost, f"{flag}: diffusers drops {len(lost)} of the {len(tensors)} matrices in {path.name} "
            f"({first_names(lost[:2], len(lost))}), as it does where a file names layers in two ways; give a LoRA "
            "with one naming")  # fmt: skip
    known = (family.denoiser.name, *family.text_encoders)
    lost = sorted(name for name, (part, _) in names.items() if part not in known)
    require(not lost, f"{flag}: {len(lost)} of the {len(tensors)} matrices in {path.name} have names of no layer of "
            f"{family.title} ({first_names(lost[:2], len(lost))}); give a LoRA for {family.title} in diffusers' or "
            "kohya's format")  # fmt: skip
    lora, alphas = defaultdict(dict), defaultdict(dict)
    for name, (part, own) in names.items():
        lora[part][own] = tensors[name]
    places = {split_name(name)[0]: (part, split_name(own)[0]) for name, (part, own) in names.items()}
    for name, value in apart.items():
        layer, ending = split_name(name)
        part, module = places[layer]
        if ending == ".alpha":
            alphas[part][module] = float(value)
        else:
            lora[part][module + DORA_SCALE] = value
    return lora, alphas


def with_magnitudes(layers):
    """The layers with DoRA's magnitudes as PEFT has them: (out,), of convolutions (1, out, 1, 1)."""
    found = {}
    for name, value in layers.items():
        if name.endswith(DORA_SCALE):
            module = name.removesuffix(DORA_SCALE)
            shape = (1, -1, 1, 1) if layers[f"{module}.lora_B.weight"].ndim == 4 else (-1,)
            name, value = module + PEFT_MAGNITUDE, value.reshape(shape)
        found[name] = value
    return found


def restore_magnitudes(model, layers, alphas):
    """Turn magnitudes for the norm of the model's weights W, in place, to those for the norm of W + change."""
    for name in [name for name in layers if name.endswith(PEFT_MAGNITUDE)]:
        module = name.removesuffix(PEFT_MAGNITUDE)
        down, up = layers[f"{module}.lora_A.weight"], layers[f"{module}.lora_B.weight"]
        weight = weight_of(model.get_submodule(module))
        if not weight.is_meta:
            ratio = norm_ratio(weight, down, up, alphas.get(module, len(down)) / len(down))
            layers[name] = layers[name] * ratio.reshape(layers[name].shape).to(layers[name].device)


def weight_of(layer):
    """The weight of a layer in float32, which may be quantized."""
    from peft.utils.integrations import dequantize_module_weight

    if layer.weight.is_meta or layer.weight.is_floating_point():
        return layer.weight.detach().float()
    return dequantize_module_weight(layer).detach().float()


def norm_ratio(weight, down, up, scale):
    """(out,) the norms of W + scale up @ down by those of W, over all inputs of an output."""
    rows = weight.flatten(1)
    change = scale * up.to(rows).flatten(1) @ down.to(rows).flatten(1)
    return (rows + change).norm(dim=1) / rows.norm(dim=1)


def peft_names(tensors, pipeline_class, unet_config):
    """{name in the file: (part, PEFT's name)} of the tensors that diffusers has a name for.

    diffusers renames the tensors and copies none, so that a tensor tells its old name under the new one.
    """
    from diffusers.utils import convert_state_dict_to_peft, convert_unet_state_dict_to_peft
    from diffusers.utils.state_dict_utils import StateDictType

    renamed, *_ = pipeline_class.lora_state_dict(dict(tensors), return_lora_metadata=True, unet_config=unet_config)
    parts = defaultdict(dict)
    for name, value in renamed.items():
        part, _, own = name.partition(".")
        parts[part][own] = value
    before, names = {id(value): name for name, value in tensors.items()}, {}
    for part, layers in parts.items():
        if not all(name.endswith((".lora_A.weight", ".lora_B.weight", ".lora_B.bias")) for name in layers):
            if part.startswith("text_encoder"):
                for form in (StateDictType.DIFFUSERS_OLD, StateDictType.DIFFUSERS):
                    layers = convert_state_dict_to_peft(layers, original_type=form)
            else:
                layers = convert_unet_state_dict_to_peft(layers)
        names |= {before[id(value)]: (part, name) for name, value in layers.items() if id(value) in before}
    return names


def config_of(flag, part, kind, layers, alphas, metadata):
    """The PEFT configuration of a part: the file's, else one made from the shapes and alphas of the layers.

    A layer without an alpha has its rank as alpha, in diffusers' format and in kohya's.

    Args:
        kind: see `lycoris_kind`.
        layers: {PEFT's name: tensor}; alphas: {module: alpha}; metadata: {part.field: value} of the file.
    """
    from peft import LoHaConfig, LoKrConfig, LoraConfig

    cls = {"LoHa": LoHaConfig, "LoKr": LoKrConfig}.get(kind, LoraConfig)
    own = {name.removeprefix(f"{part}."): value for name, value in metadata.items() if name.startswith(f"{part}.")}
    if own:
        return config_of_file(flag, part, cls, own, alphas)
    ranks = ranks_of(layers)
    alphas = {module: alphas.get(module, rank) for module, rank in ranks.items()}
    rank, alpha = (Counter(found.values()).most_common(1)[0][0] if found else 1 for found in (ranks, alphas))
    shape = dict(
        r=rank,
        rank_pattern={pattern_of(part, module): own for module, own in ranks.items() if own != rank},
        alpha_pattern={pattern_of(part, module): own for module, own in alphas.items() if own != alpha},
        target_modules=[module.removeprefix("text_model.") for module in ranks],
    )
    if kind:
        return cls(alpha=alpha, **shape)
    return LoraConfig(
        lora_alpha=alpha,
        use_dora=any(name.endswith(PEFT_MAGNITUDE) for name in layers),
        lora_bias=any(name.endswith(".lora_B.bias") for name in layers),
        **shape,
    )


def config_of_file(flag, part, cls, own, alphas):
    """The PEFT configuration that a file has of a part. own: {field: value}; alphas: {module: alpha}."""
    known = {field.name for field in fields(cls)}
    unknown = sorted(name for name, value in own.items() if name not in known and value)
    require(not unknown, f"{flag}: its configuration of the {part} has {first_names(unknown)}, which the "
            "installed peft does not know: pip install -U peft")  # fmt: skip
    config = cls(**{name: value for name, value in own.items() if name in known and name != "peft_type"})
    start = str(getattr(config, "init_lora_weights", None)).lower()
    require(not start.startswith(NEW_BASE), f"{flag}: it was started with init_lora_weights {start}, which "
            "changes the base model too, and can't be continued; save it as a plain LoRA")  # fmt: skip
    config.inference_mode = False
    config.alpha_pattern |= {pattern_of(part, module): alpha for module, alpha in alphas.items()}
    return config


def ranks_of(layers):
    """{module: rank} of layers under PEFT's names; 1 of a LoKr of two whole matrices."""
    ranks = {}
    for name, value in layers.items():
        module, _, ending = name.partition(".lora_A.")
        if ending:
            ranks[module] = len(value)
        for mark in (".lokr_w1", ".lokr_w1_b", ".lokr_w2_b", ".hada_w1_b"):
            if name.endswith(mark):
                module = name.removesuffix(mark)
                ranks[module] = max(ranks.get(module, 1), 1 if mark == ".lokr_w1" else len(value))
    return ranks


def pattern_of(part, module):
    """The key of PEFT's patterns that means one module; in text encoders it fits nested and flat names."""
    return module.removeprefix("text_model.") if part.startswith("text_encoder") else f"^{module}"


# ---------------------------------------------------------------------------------------------------------------------
# Into a model


def alpha_of(config):
    """The alpha of a PEFT configuration; a layer's change is scaled by alpha / rank."""
    return config.lora_alpha if hasattr(config, "lora_alpha") else config.alpha


def kind_of(config):
    """LoRA, DoRA, LoHa or LoKr: what a PEFT configuration, or its dictionary, is of."""
    values = config if isinstance(config, dict) else vars(config)
    kind = str(getattr(values.get("peft_type"), "value", values.get("peft_type"))).lower()
    return {"loha": "LoHa", "lokr": "LoKr"}.get(kind, "DoRA" if values.get("use_dora") else "LoRA")


def is_adapter(name):
    """Whether a parameter belongs to an adapter, by its name."""
    return any(f".{mark}" in name for mark in ("lora_", "lokr_", "hada_"))


def adapter_state(model):
    """{PEFT's name: tensor} of a model's adapter."""
    from peft.utils import get_peft_model_state_dict

    return get_peft_model_state_dict(model, adapter_name=ADAPTER, save_embedding_layers=False)


def put_lora(flag, part, model, layers, config, dtype):
    """Give a model an adapter with the values of a file; on the meta device only names and shapes are compared.

    Args:
        flag: begins the message; part: the model's name in the pipeline.
        layers, config: an entry of `read_lora`.
        dtype: of the adapter, whatever the model's.

    Raises:
        UserError: the model has other layers than the file, or not each value arrived.
    """
    from peft.utils import set_peft_model_state_dict

    if part.startswith("text_encoder") and not hasattr(model, "text_model"):
        layers = {name.removeprefix("text_model."): value for name, value in layers.items()}
    fit = f"{flag}: it does not fit this model's {part}, give one made for it"
    try:
        model.add_adapter(config, adapter_name=ADAPTER)
    except ValueError as error:  # none of the layers is there, or PEFT has no LoRA for it
        raise UserError(f"{fit}: {str(error)[:300]}") from None
    if lycoris_kind(layers):
        take_shapes(flag, part, model, layers)
    for name, parameter in model.named_parameters():
        if is_adapter(name):
            parameter.data = parameter.data.to(dtype)
    own = adapter_state(model)
    extra, absent = sorted(layers.keys() - own.keys()), sorted(own.keys() - layers.keys())
    require(not extra, f"{flag}: it has {len(layers)} tensors for the {part}, of which this model takes "
            f"{len(layers) - len(extra)} (not {first_names(extra)}); give one made for this model")  # fmt: skip
    require(not absent, f"{flag}: it lacks {len(absent)} of the {len(own)} tensors that its configuration asks for "
            f"({first_names(absent)}); save the LoRA again, whole")  # fmt: skip
    wrong = [name for name in own if own[name].shape != layers[name].shape]
    require(not wrong, f"{fit}: {len(wrong)} of its {len(own)} tensors have another shape ({first_names(wrong)})")
    if any(value.is_meta for value in own.values()):
        return
    set_peft_model_state_dict(model, layers, adapter_name=ADAPTER)
    wrong = [name for name, value in adapter_state(model).items() if not (value.cpu() == layers[name].to(dtype)).all()]
    require(not wrong, f"{flag}: {len(wrong)} of the {len(own)} tensors for the {part} did not arrive in the model "
            f"({first_names(wrong)}); the installed peft and diffusers do not fit each other")  # fmt: skip


def take_shapes(flag, part, model, layers):
    """Give the factors of a LoHa or LoKr the shapes that a file has, where they make a weight of the layer's shape.

    A Kronecker product can be divided in many ways, of which PEFT's configuration knows few.

    Args:
        flag: begins the message; part: the model's name in the pipeline.
    """
    import torch

    files = defaultdict(dict)
    for name, value in layers.items():
        module, _, factor = name.rpartition(".")
        files[module][factor] = value
    wrong = []
    for module, layer in ((name, module) for name, module in model.named_modules() if name in files):
        for factor in getattr(layer, "adapter_layer_names", ()):
            factors = getattr(layer, factor)
            if factor in files[module]:
                device = layer.get_base_layer().weight.device
                factors[ADAPTER] = torch.nn.Parameter(files[module][factor].to(device))
            elif ADAPTER in factors:
                del factors[ADAPTER]
        try:
            with torch.no_grad():
                layer.get_delta_weight(ADAPTER)
        except (AttributeError, RuntimeError):  # no adapter there, or shapes that do not fit each other
            wrong.append(module)
    require(not wrong, f"{flag}: it does not fit this model's {part}, give one made for it: {len(wrong)} of its "
            f"{len(files)} layers have another shape ({first_names(wrong)})")  # fmt: skip


def mark_of(folder):
    """What tells the folder of a run's LoRA from others, without its path."""
    return digest(lora=str(Path(folder).resolve()))[:16]


def merged_from(folder, lora):
    """Whether `results.merging` made the model in a folder with the LoRA of the folder `lora`."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return json.loads(Path(folder, MERGED).read_text(encoding="utf-8"))["lora"] == mark_of(lora)
    return False
