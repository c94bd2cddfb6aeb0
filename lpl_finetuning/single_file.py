"""Models in a single file, as A1111 and ComfyUI read it: what the header says, which tensors are whose. No torch.

A single file has the names of Stability AI's code. Its tensors have the same bytes as those of diffusers, but for
rows that are joined, swapped or transposed; a `Piece` says how a tensor of diffusers is cut out of the file.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from lpl_finetuning import architectures
from lpl_finetuning.base_model import tensors_of, weight_problem
from lpl_finetuning.errors import first_names, require
from lpl_finetuning.original_names import (
    OPEN_CLIP_PARTS,
    QKV_THIRD,
    mmdit_name,
    replace_all,
    swaps_halves,
    unet_name,
    vae_name,
)

# ---------------------------------------------------------------------------------------------------------------------
# Which tensor of the file becomes which tensor of diffusers


@dataclass(frozen=True)
class Piece:
    """How a tensor of diffusers is cut out of a single file.

    Attributes:
        source: name in the file, without the prefix of the part; None for the identity matrix.
        shape: of the tensor in diffusers.
        cuts: (number, of how many) equal shares of the source's rows, which are joined in this order.
        transposed: whether the source is the transpose.
    """

    source: str | None
    shape: tuple
    cuts: tuple = ((0, 1),)
    transposed: bool = False

    @property
    def source_shape(self):
        """The shape that the source must have."""
        rows, *rest = self.shape[::-1] if self.transposed else self.shape
        return (rows * self.cuts[0][1] // len(self.cuts), *rest)


def unet_pieces(config):
    """{name in diffusers: Piece} of SDXL's UNet."""
    names, found = SimpleNamespace(**config), {}
    for name, shape in architectures.unet(config).items():
        module, _, leaf = name.rpartition(".")
        found[name] = Piece(f"{unet_name(module, names)}.{leaf}", shape)
    return found


def mmdit_pieces(config):
    """The same of SD3's transformer."""
    found = {}
    for name, shape in architectures.mmdit(config).items():
        module, _, leaf = name.rpartition(".")
        source = leaf if module == "pos_embed" else f"{mmdit_name(module)}.{leaf}"
        if match := QKV_THIRD.fullmatch(source):
            found[name] = Piece(match[1] + match[3], shape, cuts=((int(match[2]), 3),))
        else:
            swapped = swaps_halves(module, config["num_layers"])
            found[name] = Piece(source, shape, cuts=((1, 2), (0, 2)) if swapped else ((0, 1),))
    return found


def vae_pieces(config):
    """The same of the autoencoder; the file may have its attention as 1x1 convolutions."""
    blocks = len(config["block_out_channels"])
    return {name: Piece(vae_name(name, blocks), shape) for name, shape in architectures.autoencoder(config).items()}


def plain_vae_pieces(config):
    """The same of an autoencoder's file in diffusers' own layout."""
    return {name: Piece(name, shape) for name, shape in architectures.autoencoder(config).items()}


def clip_pieces(config):
    """The same of CLIP under transformers' names, without a projection."""
    return {name: Piece(name, shape) for name, shape in architectures.clip(config, projects=False).items()}


def projecting_clip_pieces(config):
    """The same with a projection."""
    return {name: Piece(name, shape) for name, shape in architectures.clip(config, projects=True).items()}


def clip_l_pieces(config):
    """The same of SD3's first text encoder, whose projection all programs take for the identity."""
    found = projecting_clip_pieces(config)
    return found | {"text_projection.weight": Piece(None, found["text_projection.weight"].shape)}


def open_clip_pieces(config):
    """The same under OpenCLIP's names: queries, keys and values in one tensor, the projection transposed."""
    found = {}
    for name, shape in architectures.clip(config, projects=True).items():
        third = re.search(r"\.([qkv])_proj\.", name)
        source = replace_all(name.replace(third[0], ".q_proj.") if third else name, OPEN_CLIP_PARTS)
        cut = ("qkv".index(third[1]), 3) if third else (0, 1)
        found[name] = Piece(source, shape, (cut,), transposed=name == "text_projection.weight")
    return found


def t5_pieces(config):
    """The same of T5's encoder."""
    return {name: Piece(name, shape) for name, shape in architectures.t5(config).items()}


# ---------------------------------------------------------------------------------------------------------------------
# Layouts


@dataclass(frozen=True)
class PartOfFile:
    """A part of a pipeline in a single file: its title in words, the prefix of its names, its {name: Piece}."""

    title: str
    prefix: str
    pieces: Callable


@dataclass(frozen=True)
class Layout:
    """What a single file of a family of models has.

    Attributes:
        title: of the family; folder: of the configurations, below `pipelines/`.
        pipeline: the pipeline's class in diffusers, without "Pipeline".
        denoiser: the part that is trained; first_layer: the name of the weight that takes the latents.
        special_channels: {input channels of that layer: what such a model is made for}.
        parts: {part of the pipeline: `PartOfFile`}; optional: those that a pipeline may lack.
    """

    title: str
    folder: str
    pipeline: str
    denoiser: str
    first_layer: str
    special_channels: dict
    parts: dict
    optional: tuple = ()


DENOISER = "model.diffusion_model."
SDXL_FILE = Layout(
    title="SDXL",
    folder="sdxl",
    pipeline="StableDiffusionXL",
    denoiser="unet",
    first_layer="input_blocks.0.0.weight",
    special_channels={9: "inpainting", 8: "InstructPix2Pix"},
    parts={
        "unet": PartOfFile("UNet", DENOISER, unet_pieces),
        "vae": PartOfFile("autoencoder", "first_stage_model.", vae_pieces),
        "text_encoder": PartOfFile("first text encoder", "conditioner.embedders.0.transformer.", clip_pieces),
        "text_encoder_2": PartOfFile("second text encoder", "conditioner.embedders.1.model.", open_clip_pieces),
    },
)
SD3_FILE = Layout(
    title="SD3",
    folder="sd3",
    pipeline="StableDiffusion3",
    denoiser="transformer",
    first_layer="x_embedder.proj.weight",
    special_channels={33: "inpainting"},
    parts={
        "transformer": PartOfFile("transformer", DENOISER, mmdit_pieces),
        "vae": PartOfFile("autoencoder", "first_stage_model.", vae_pieces),
        "text_encoder": PartOfFile("first text encoder", "text_encoders.clip_l.transformer.", clip_l_pieces),
        "text_encoder_2": PartOfFile("second text encoder", "text_encoders.clip_g.transformer.",
                                     projecting_clip_pieces),
        "text_encoder_3": PartOfFile("third text encoder (T5)", "text_encoders.t5xxl.transformer.", t5_pieces),
    },
    optional=("text_encoder_3",),
)  # fmt: skip
LAYOUTS = (SDXL_FILE, SD3_FILE)


@dataclass(frozen=True)
class SingleFile:
    """What the header of a single file says.

    Attributes:
        begins: byte at which the tensors' data begin.
        prefixes: {part: prefix of its names} of the parts that are there.
        marks: {where in the file: kind of prediction}; "epsilon" and "v_prediction" are the kinds that are known.
        zero_snr: where the file says that its noise reaches zero terminal SNR; empty where it does not.
    """

    path: Path
    layout: Layout
    header: dict
    begins: int
    prefixes: dict
    marks: dict
    zero_snr: tuple = ()


# ---------------------------------------------------------------------------------------------------------------------
# What a file is

OTHERS = (  # (pattern of a name in the file, what such a file is and what to do); the first that is found counts
    (r"lora_(up|down|A|B)|lora\.(up|down)|\.lora_|lokr_w|hada_w|oft_blocks",
     "is a LoRA; give the model that it was made for, and the LoRA as --init_lora"),
    (r"^(control_model|controlnet)|controlnet_(cond_embedding|blocks|down_blocks)|^input_hint_block",
     "is a ControlNet; give the base model"),
    (r"(^|\.)double_blocks\.\d", "is a Flux model (it has double_blocks), which can't be trained here; give SDXL or "
     "SD3"),
    (r"^cond_stage_model\.model\.", "is Stable Diffusion 2 (it has cond_stage_model.model), which can't be trained "
     "here; give SDXL or SD3"),
    (r"^cond_stage_model\.", "is Stable Diffusion 1 (it has cond_stage_model), which can't be trained here; give SDXL "
     "or SD3"),
    (r"^conditioner\.embedders\.0\.model\.", "is SDXL's refiner (its first text encoder is OpenCLIP's), which can't "
     "be trained here; give the base model"),
    (r"scaled_fp8|\.(scale_weight|weight_scale|absmax|qweight|weight\.nested_absmax)$",
     "is quantized; give the same model in float16, bfloat16 or float32"),
)  # fmt: skip
ALONE = (  # (pattern that all names match, what such a file is and what to do)
    (r"(first_stage_model\.|vae\.)?(encoder|decoder|quant_conv|post_quant_conv|loss)\..*", "is an autoencoder alone; "
     "give a whole model, and this as --pretrained_vae_model_name_or_path"),
    (r"(text_model|transformer\.text_model|text_projection|logit_scale|transformer\.resblocks|token_embedding|ln_final|"
     r"positional_embedding|encoder\.block|shared|encoder\.final).*", "is a text encoder alone; give a whole model"),
    (r"(emb_params|clip_[lg]|string_to_param).*", "is an embedding of textual inversion; give a whole model"),
    (r"(down_blocks|mid_block|up_blocks|conv_|time_embedding|add_embedding).*", "is a UNet in diffusers' layout; put "
     "it into a folder with its config.json, and give that as --pretrained_unet_model_name_or_path"),
    (r"(transformer_blocks|pos_embed|time_text_embed|context_embedder|norm_out|proj_out).*", "is a transformer in "
     "diffusers' layout; put it into a folder with its config.json, and give that as "
     "--pretrained_transformer_model_name_or_path"),
)  # fmt: skip
PICKLES = (".ckpt", ".pt", ".pth", ".bin")
EDM = ("edm_mean", "edm_std", "edm_vpred.sigma_max", "edm_vpred.sigma_min")  # marks of noise levels not trained here
KINDS = {"v": "v_prediction", "v_prediction": "v_prediction", "vprediction": "v_prediction", "v_pred": "v_prediction",
         "vpred": "v_prediction", "velocity": "v_prediction", "epsilon": "epsilon", "eps": "epsilon"}  # fmt: skip
PREDICTION_KEYS = ("modelspec.prediction_type", "modelspec.predict_key")
ZERO_SNR = ("ss_zero_terminal_snr", "modelspec.zero_terminal_snr")  # metadata that say true or false
UNUSED = re.compile(r"(.*\.)?(v_pred|ztsnr)|.*(position_ids|logit_scale)|(model_ema|denoiser)\..*|\w*(alphas|betas)"
                    r"\w*|global_step|.*(encoder\.embed_tokens|shared|text_projection)\.weight")  # fmt: skip


def read_header(what, path):
    """(header, byte at which the data begin) of a safetensors file; UserError for a pickle or a damaged file.

    Args:
        what: the flag with the file, or the file, for messages.
    """
    require(path.is_file(), f"{what}: there is no such file; give a model in a single .safetensors file")
    require(path.suffix not in PICKLES, f"{what} is a pickle ({path.suffix}), which can run programs when it is read; "
            "give the same model as .safetensors")  # fmt: skip
    require(path.suffix == ".safetensors", f"{what}: {path.suffix or 'a file without an ending'} is not read; give a "
            "folder in diffusers' layout, or a single .safetensors file")  # fmt: skip
    problem = weight_problem(path)
    require(not problem, f"{what} {problem}")
    return tensors_of(path)


def read_single_file(path, what=None):
    """The `SingleFile` of a path; UserError for anything but SDXL or SD3 in safetensors. what: see `read_header`."""
    path, what = Path(path), what or str(path)
    header, begins = read_header(what, path)
    refuse_others(what, header)
    layout, denoiser_prefix = layout_of(what, header)
    prefixes = {name: denoiser_prefix if name == layout.denoiser else part.prefix
                for name, part in layout.parts.items()}  # fmt: skip
    first = header.get(prefixes[layout.denoiser] + layout.first_layer)
    channels = first["shape"][1] if first and len(first["shape"]) > 1 else None
    require(channels not in layout.special_channels, f"{what} takes {channels} channels: it is made for "
            f"{layout.special_channels.get(channels)}; give a plain text-to-image model")  # fmt: skip
    edm = [name for name in header if last_part(name, EDM)]
    require(not edm, f"{what} has EDM's noise levels ({first_names(edm)}), which can't be trained here; give another "
            "model")  # fmt: skip
    there = {name: prefix for name, prefix in prefixes.items() if any(each.startswith(prefix) for each in header)}
    return SingleFile(path, layout, header, begins, there, *prediction_marks(path, header))


def refuse_others(what, header):
    """Refuse a file whose names tell that it is something else than a whole SDXL or SD3."""
    for pattern, text in OTHERS:
        require(not any(re.search(pattern, name) for name in header), f"{what} {text}")
    for pattern, text in ALONE:
        require(not header or not all(re.fullmatch(pattern, name) for name in header), f"{what} {text}")


def layout_of(what, header):
    """(the `Layout` of a file, the prefix of its denoiser's names)."""
    for layout, start in ((SDXL_FILE, "input_blocks."), (SD3_FILE, "joint_blocks.")):
        for prefix in (DENOISER, ""):
            is_there = any(name.startswith(prefix + start) for name in header)
            if is_there and (layout is not SDXL_FILE or f"{prefix}label_emb.0.0.weight" in header):
                return layout, prefix
    found = first_names(list(header)[:2], len(header)) if header else "no tensor"
    require(False, f"{what} is no SDXL or SD3 in one file: it holds {found}; give another file, or a folder")


def last_part(name, marks):
    """Whether a tensor's name is one of the marks, alone or after a dot."""
    return any(name == mark or name.endswith(f".{mark}") for mark in marks)


def prediction_marks(path, header):
    """(marks, zero_snr) of a `SingleFile`: the names of its tensors, and its metadata."""
    metadata = metadata_of(path)
    marks = {f"the tensor {name}": "v_prediction" for name in header if last_part(name, ["v_pred"])}
    for key in PREDICTION_KEYS:
        if said := str(metadata.get(key, "")).strip().lower().replace("-", "_").replace(" ", "_"):
            marks[key] = KINDS.get(said, said)
    zero = [f"the tensor {name}" for name in header if last_part(name, ["ztsnr"])]
    zero += [name for name in ZERO_SNR if str(metadata.get(name)).lower() in ("true", "1")]
    return marks, tuple(zero)


def metadata_of(path):
    """{key: text} of a safetensors file's metadata."""
    with open(path, "rb") as file:
        found = json.loads(file.read(int.from_bytes(file.read(8), "little"))).get("__metadata__")
    return found if isinstance(found, dict) else {}


def schedule_of(single, prediction_type=None, zero_snr=None, what=None, zero_flag="--zero_snr"):
    """(prediction_type, zero_snr) of a single file; given values win over the file. SD3's is ("flow", False).

    Args:
        zero_flag: the flag of zero_snr, for messages.

    Raises:
        UserError: the file contradicts itself, or only its name says what it predicts.
    """
    what, marks = what or str(single.path), single.marks
    found = ", ".join(f"{place} says {kind}" for place, kind in marks.items())
    if single.layout is SD3_FILE:
        tensors = [place for place in (*marks, *single.zero_snr) if place.startswith("the tensor")]
        require(not tensors and prediction_type is None and zero_snr is None,
                f"{what} is SD3, which has one kind of prediction, rectified flow: "
                + (f"{first_names(tensors)} contradicts that; give another file" if tensors else
                   f"leave --prediction_type and {zero_flag} out"))  # fmt: skip
        return "flow", False
    if prediction_type is None:
        kinds = set(marks.values())
        require(kinds <= {"epsilon", "v_prediction"} and len(kinds) < 2, f"{what} does not say clearly what it "
                f"predicts ({found}); give --prediction_type epsilon or v_prediction")  # fmt: skip
        require(kinds or not re.search(r"v[-_. ]?(pred|param)", single.path.stem, re.IGNORECASE),
                f"{what}: its name says v-prediction, its content says nothing; give --prediction_type v_prediction "
                "or epsilon")  # fmt: skip
        prediction_type = kinds.pop() if kinds else "epsilon"
    zero = bool(single.zero_snr) if zero_snr is None else zero_snr
    why = f"{zero_flag} is given" if zero_snr else f"{first_names(single.zero_snr)} asks for zero terminal SNR"
    require(not zero or prediction_type != "epsilon", f"{what}: {why}, at which a model of epsilon learns nothing"
            f"{f' ({found})' if found else ''}; give --prediction_type v_prediction, or "
            f"{zero_flag.replace('--', '--no-')}")  # fmt: skip
    return prediction_type, zero


# ---------------------------------------------------------------------------------------------------------------------
# Which tensors make up a part


def transformer_config(header, prefix):
    """The configuration of SD3's transformer, from the shapes of its tensors; heads have the width 64."""
    shapes = {name.removeprefix(prefix): entry["shape"] for name, entry in header.items() if name.startswith(prefix)}
    blocks = [int(match[1]) for name in shapes if (match := re.match(r"joint_blocks\.(\d+)\.", name))]
    dual = sorted(
        {int(match[1]) for name in shapes if (match := re.match(r"joint_blocks\.(\d+)\.x_block\.attn2", name))}
    )
    width, channels, patch, _ = shapes["x_embedder.proj.weight"]
    return {
        "_class_name": "SD3Transformer2DModel",
        "attention_head_dim": 64,
        "caption_projection_dim": width,
        "dual_attention_layers": dual,
        "in_channels": channels,
        "joint_attention_dim": shapes["context_embedder.weight"][1],
        "num_attention_heads": width // 64,
        "num_layers": max(blocks) + 1,
        "out_channels": shapes["final_layer.linear.weight"][0] // patch**2,
        "patch_size": patch,
        "pooled_projection_dim": shapes["y_embedder.mlp.0.weight"][1],
        "pos_embed_max_size": round(shapes["pos_embed"][1] ** 0.5),
        "qk_norm": "rms_norm" if "joint_blocks.0.x_block.attn.ln_q.weight" in shapes else None,
        "sample_size": 128,
    }


def plain(shape):
    """A shape without sides of 1 at its end: a 1x1 convolution is a linear layer."""
    shape = list(shape)
    while len(shape) > 1 and shape[-1] == 1:
        shape.pop()
    return shape


def check_pieces(what, title, pieces, prefix, header, advice):
    """Refuse a part of which tensors are missing or have other shapes; header: of the file; advice: what to do."""
    names = {name: prefix + piece.source for name, piece in pieces.items() if piece.source is not None}
    absent = sorted({source for source in names.values() if source not in header})
    require(not absent, f"{what} lacks {len(absent)} of the {len(set(names.values()))} tensors of the {title} "
            f"({first_names(absent)}); {advice}")  # fmt: skip
    for name, source in names.items():
        found, wanted = header[source]["shape"], pieces[name].source_shape
        require(plain(found) == plain(wanted), f"{what}: {source} is {' x '.join(map(str, found))}, and this {title} "
                f"needs {' x '.join(map(str, wanted))}; {advice}")  # fmt: skip
