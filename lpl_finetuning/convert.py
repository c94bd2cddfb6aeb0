"""Convert a model in a single file, as ComfyUI and A1111 read it, to a folder that the training scripts take.

    python -m lpl_finetuning.convert model.safetensors my-base
    python -m lpl_finetuning.convert model.safetensors my-base --config_from another-base      # without a network

What the file says of its prediction goes into the folder's scheduler: the tensors v_pred and ztsnr, and the metadata
of modelspec. The configurations come from the Hub, or from --config_from.
"""

import argparse
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from lpl_finetuning.base_model import hub_like, hub_problem, read_object, tensors_of, weight_problem
from lpl_finetuning.errors import UserError, counted, errors_for_people, first_names, quiet_libraries, require
from lpl_finetuning.families import SD3, SDXL
from lpl_finetuning.files import follow_umask, remembered_sha256
from lpl_finetuning.flags import FlagParser
from lpl_finetuning.results.metadata import SOURCE

PARTS = {  # family -> {start of the tensors' names: the part in words}
    SDXL: {
        "model.diffusion_model.input_blocks.": "UNet",
        "first_stage_model.": "autoencoder",
        "conditioner.embedders.0.transformer.": "first text encoder",
        "conditioner.embedders.1.model.": "second text encoder",
    },
    SD3: {
        "model.diffusion_model.joint_blocks.": "transformer",
        "first_stage_model.": "autoencoder",
        "text_encoders.clip_l.": "first text encoder",
        "text_encoders.clip_g.": "second text encoder",
    },
}
T5 = "text_encoders.t5xxl."
FIRST_LAYER = {SDXL: "model.diffusion_model.input_blocks.0.0.weight",
               SD3: "model.diffusion_model.x_embedder.proj.weight"}  # fmt: skip
POSITIONS = {  # pattern of the position embeddings of both text encoders
    SDXL: r"^conditioner\..*(position_embedding\.weight|positional_embedding)$",
    SD3: r"^text_encoders\.clip_[lg]\..*position_embedding\.weight$",
}
EDM = ("edm_mean", "edm_std", "edm_vpred.sigma_max", "edm_vpred.sigma_min")  # marks of noise levels not trained here
KINDS = {"v": "v_prediction", "v_prediction": "v_prediction", "vprediction": "v_prediction", "v_pred": "v_prediction",
         "vpred": "v_prediction", "velocity": "v_prediction", "epsilon": "epsilon", "eps": "epsilon"}  # fmt: skip
ZERO_SNR = ("ss_zero_terminal_snr", "modelspec.zero_terminal_snr")  # metadata that say true or false
UNUSED = re.compile(r"(.*\.)?(v_pred|ztsnr)|.*(position_ids|logit_scale)|(model_ema|denoiser)\..*|\w*(alphas|betas)"
                    r"\w*|global_step")  # fmt: skip
CLIP_PROJECTION = "text_encoders.clip_l.transformer.text_projection.weight"  # taken for the identity by all programs


@dataclass(frozen=True)
class SingleFile:
    """What the header of a single file says.

    Attributes:
        marks: {where in the file: kind of prediction}; "epsilon" and "v_prediction" are the kinds that are known.
        zero_snr: where the file says that its noise reaches zero terminal SNR; empty where it does not.
    """

    path: Path
    family: object
    header: dict
    marks: dict
    zero_snr: tuple = ()


# ---------------------------------------------------------------------------------------------------------------------
# From the header, without torch


def read_single_file(path):
    """The `SingleFile` of a path; UserError for anything but a whole SDXL or SD3 in safetensors."""
    path = Path(path)
    require(path.is_file(), f"{path}: there is no such file; give a model in a single .safetensors file")
    require(path.suffix == ".safetensors", f"{path}: {path.suffix or 'a file without an ending'} is not read, only "
            ".safetensors; a pickle can run programs")  # fmt: skip
    problem = weight_problem(path)
    require(not problem, f"{path} {problem}")
    header = tensors_of(path)[0]
    first = {next(iter(starts)): family for family, starts in PARTS.items()}
    family = next((family for start, family in first.items() if any(name.startswith(start) for name in header)), None)
    require(family, f"{path} is no SDXL or SD3 in one file: it holds {first_names(list(header)[:2], len(header))}")
    absent = [part for start, part in PARTS[family].items() if not any(name.startswith(start) for name in header)]
    require(not absent, f"{path} has no {' and no '.join(absent)} of {family.title}; give a file with all parts")
    channels = header[FIRST_LAYER[family]]["shape"][1] if FIRST_LAYER[family] in header else None
    require(channels not in family.special_channels, f"{path} takes {channels} channels: it is made for "
            f"{family.special_channels.get(channels)}; give a plain text-to-image model")  # fmt: skip
    edm = [name for name in header if last_part(name, EDM)]
    require(not edm, f"{path} has EDM's noise levels ({first_names(edm)}), which can't be trained here; give another "
            "model")  # fmt: skip
    return SingleFile(path, family, header, *prediction_marks(path, header))


def last_part(name, marks):
    """Whether a tensor's name is one of the marks, alone or after a dot."""
    return any(name == mark or name.endswith(f".{mark}") for mark in marks)


def prediction_marks(path, header):
    """(marks, zero_snr) of a `SingleFile`: the names of its tensors, and its metadata."""
    with open(path, "rb") as file:
        metadata = json.loads(file.read(int.from_bytes(file.read(8), "little"))).get("__metadata__") or {}
    marks = {f"the tensor {name}": "v_prediction" for name in header if last_part(name, ["v_pred"])}
    said = str(metadata.get("modelspec.prediction_type", "")).strip().lower().replace("-", "_").replace(" ", "_")
    if said:
        marks["modelspec.prediction_type"] = KINDS.get(said, said)
    zero = [f"the tensor {name}" for name in header if last_part(name, ["ztsnr"])]
    zero += [name for name in ZERO_SNR if str(metadata.get(name)).lower() in ("true", "1")]
    return marks, tuple(zero)


def schedule_of(single, prediction_type=None, zero_snr=None):
    """(prediction_type, zero_snr) of a single file; the flags --prediction_type and --zero_snr win over the file.

    Raises:
        UserError: the file contradicts itself, or only its name says what it predicts.
    """
    path, marks = single.path, single.marks
    found = ", ".join(f"{place} says {kind}" for place, kind in marks.items())
    if single.family is SD3:
        tensors = [place for place in (*marks, *single.zero_snr) if place.startswith("the tensor")]
        require(not tensors and prediction_type is None and zero_snr is None,
                f"{path} is SD3, which has one kind of prediction, rectified flow: "
                + (f"{first_names(tensors)} contradicts that; give another file" if tensors else
                   "leave --prediction_type and --zero_snr out"))  # fmt: skip
        return "flow", False
    if prediction_type is None:
        kinds = set(marks.values())
        require(kinds <= {"epsilon", "v_prediction"} and len(kinds) < 2, f"{path} does not say clearly what it "
                f"predicts ({found}); give --prediction_type epsilon or v_prediction")  # fmt: skip
        require(kinds or not re.search(r"v[-_. ]?(pred|param)", path.stem, re.IGNORECASE),
                f"{path}: its name says v-prediction, its content says nothing; give --prediction_type v_prediction "
                "or epsilon")  # fmt: skip
        prediction_type = kinds.pop() if kinds else "epsilon"
    zero = bool(single.zero_snr) if zero_snr is None else zero_snr
    why = "--zero_snr is given" if zero_snr else f"{first_names(single.zero_snr)} asks for zero terminal SNR"
    require(not zero or prediction_type != "epsilon", f"{path}: {why}, at which a model of epsilon learns nothing"
            f"{f' ({found})' if found else ''}; give --prediction_type v_prediction, or --no-zero_snr")  # fmt: skip
    return prediction_type, zero


def check_places(args, family):
    """Refuse a folder that has something in it, and configurations that can't be had."""
    folder, config = Path(args.folder), args.config_from
    require(not folder.exists() or (folder.is_dir() and not any(folder.iterdir())),
            f"{folder} is there already; name a new folder")  # fmt: skip
    if config is None:
        problem = hub_problem()
        require(not problem, f"the configurations of {family.title} come from the Hub, and {problem}; give "
                f"--config_from with the folder of a pipeline of {family.title}")  # fmt: skip
        return
    require(Path(config).is_dir() or hub_like(config),
            f"--config_from {config}: there is no such folder, and Hub names have the form owner/name")  # fmt: skip
    if Path(config).is_dir():
        index = Path(config, "model_index.json")
        kind = str(read_object(index).get("_class_name")) if index.is_file() else "folder without a model_index.json"
        require(kind.startswith(family.pipeline), f"--config_from {config} is a {kind}; the file is {family.title}: "
                f"give a {family.pipeline_class}")  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# The conversion


def dtype_of(single):
    """The narrowest of float16, bfloat16 and float32 that holds all of the model's tensors."""
    import torch

    kinds = {entry["dtype"] for name, entry in single.header.items() if name.startswith((*PARTS[single.family], T5))}
    if kinds & {"F32", "F64"} or {"F16", "BF16"} <= kinds:
        return torch.float32
    return torch.bfloat16 if "BF16" in kinds else torch.float16


def load_single_file(single, config_from=None):
    """The diffusers pipeline of a single file, with every tensor of the file in its place."""
    import diffusers

    family, more = single.family, {}
    if config_from is not None:
        more = {"config": str(config_from), "local_files_only": Path(config_from).is_dir()}
    if family is SD3 and not any(name.startswith(T5) for name in single.header):
        more |= {"text_encoder_3": None, "tokenizer_3": None}
    try:
        if config_from is not None and has_equal_widths(single):
            more["text_encoder_2"] = second_text_encoder(single, config_from)
        cls = getattr(diffusers, family.pipeline_class)
        pipeline = cls.from_single_file(str(single.path), dtype=dtype_of(single), **more)
    except NotImplementedError:  # a parameter is on the meta device still
        raise UserError(f"{single.path} lacks tensors of {family.title}; give a whole model") from None
    except Exception as error:  # no network, other shapes than the configuration's: many kinds
        raise UserError(f"{single.path}: diffusers can't read it as {family.title} ({type(error).__name__}: "
                        f"{' '.join(str(error).split())[:300]}); give --config_from with a pipeline of the same "
                        "architecture") from None  # fmt: skip
    check_values(pipeline, single)
    return pipeline


def has_equal_widths(single):
    """Whether both text encoders have one width. diffusers tells them apart by it, and would read the first twice."""
    places = [name for name in single.header if re.search(POSITIONS[single.family], name)]
    return len({single.header[name]["shape"][-1] for name in places}) == 1


def second_text_encoder(single, config_from):
    """The second text encoder of a single file."""
    from diffusers.loaders.single_file_utils import convert_ldm_clip_checkpoint, convert_open_clip_checkpoint
    from safetensors.torch import load_file
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = CLIPTextConfig.from_pretrained(config_from, subfolder="text_encoder_2")
    encoder, tensors = CLIPTextModelWithProjection(config).eval(), load_file(single.path)
    if single.family is SD3:
        own = convert_ldm_clip_checkpoint(tensors, "text_encoders.clip_g.transformer.")
    else:
        own = convert_open_clip_checkpoint(encoder, tensors, prefix="conditioner.embedders.1.model.")
    encoder.load_state_dict(own, strict=False)  # `check_values` compares the tensors
    return encoder.to(dtype_of(single))


def check_values(pipeline, single):
    """Refuse a conversion that has lost or changed a tensor: all are compared, under their names in the file."""
    from safetensors import safe_open

    from lpl_finetuning.results.export import LAYOUTS

    components, layout = LAYOUTS[type(pipeline)]
    ours = layout(*(getattr(pipeline, name) for name in components))
    absent = [name for name in ours if name not in single.header and not name.endswith(("embed_tokens.weight",
              "shared.weight")) and name != CLIP_PROJECTION]  # fmt: skip
    require(not absent, f"{single.path} lacks {len(absent)} of the {len(ours)} tensors of {single.family.title} "
            f"({first_names(absent)}); give a whole model")  # fmt: skip
    wrong = []
    with safe_open(single.path, "pt") as file:
        for name, value in ours.items():
            if name in single.header and name != CLIP_PROJECTION:
                theirs = file.get_tensor(name).to(value.dtype)
                same = not value.is_meta and theirs.numel() == value.numel()
                if not same or not (theirs.reshape(value.shape) == value).all():
                    wrong.append(name)
    require(not wrong, f"{single.path}: {len(wrong)} of the {len(ours)} tensors did not arrive in the pipeline "
            f"({first_names(wrong)}); the installed diffusers can't convert this file")  # fmt: skip
    left = [name for name in single.header if name not in ours and not UNUSED.fullmatch(name)]
    lost = [name for name in left if name.startswith("model.diffusion_model.")]
    require(not lost, f"{single.path}: {len(lost)} of its {len(single.header)} tensors have no place in "
            f"{single.family.title} ({first_names(lost)}); give a plain model")  # fmt: skip
    if left:
        print(f"left out: {counted(len(left), 'tensor')} that no {single.family.title} has ({first_names(left)})")


def set_schedule(pipeline, prediction_type, zero_snr):
    """Give an SDXL pipeline the scheduler of its prediction, and return what was set.

    With zero terminal SNR sampling must begin at the last timestep: spacing "trailing".
    """
    from diffusers import EulerDiscreteScheduler

    settings = {"prediction_type": prediction_type, "rescale_betas_zero_snr": zero_snr}
    settings |= {"timestep_spacing": "trailing"} if zero_snr else {}
    pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config, **settings)
    return settings


def save_whole(pipeline, folder, source):
    """Write a pipeline's folder, which is complete or not there. source: the single file; its hash is kept."""
    temporary = folder.with_name(f".tmp-{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        pipeline.save_pretrained(temporary)
        kept = {"file": source.name, "sha256": remembered_sha256(source)}
        (temporary / SOURCE).write_text(json.dumps(kept), encoding="utf-8")
        for place in (temporary, *temporary.iterdir()):
            follow_umask(place)
        if folder.exists():
            folder.rmdir()
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def tell(single, settings):
    """Print what the file says, and what the folder's scheduler was set to."""
    said = [f"{place}: {kind}" for place, kind in single.marks.items()]
    said += [f"{place}: zero terminal SNR" for place in single.zero_snr]
    print(f"{single.path.name} is {single.family.title}. Of its prediction it says: {'; '.join(said) or 'nothing'}")
    print("scheduler: " + ", ".join(f"{name} {value}" for name, value in settings.items()))
    if single.family is SD3:
        print("Such a file has no timestep shift: it is the configuration's")
        return
    kind = settings["prediction_type"]
    if any(other != kind for other in single.marks.values()):
        print(f"--prediction_type {kind} wins over what the file says")
    if bool(single.zero_snr) != settings["rescale_betas_zero_snr"]:
        print(f"--{'no-' if single.zero_snr else ''}zero_snr wins over what the file says")
    if not said and kind == "epsilon":
        print("Nearly all such files predict epsilon. If this one does not: --prediction_type v_prediction")


def build_parser():
    """The flags of the command."""
    parser = FlagParser(__doc__)
    add = parser.add_argument
    add("file", help="the model, a .safetensors file")
    add("folder", help="new folder for the pipeline")
    add("--config_from", help="folder or Hub name of a pipeline with the configurations and tokenizers (default: "
        "the Hub's for this kind of model)")  # fmt: skip
    add("--prediction_type", choices=("epsilon", "v_prediction"), help="what an SDXL predicts, where the file does "
        "not say it or says it wrongly")  # fmt: skip
    add("--zero_snr", action=argparse.BooleanOptionalAction, help="whether the noise of an SDXL reaches zero "
        "terminal SNR (default: what the file says)")  # fmt: skip
    return parser


def main(argv=None):
    """The command: exit status 0, or 2 for a mistake of the user's."""
    with errors_for_people(False):
        args = build_parser().parse(argv)
        single = read_single_file(args.file)
        prediction_type, zero_snr = schedule_of(single, args.prediction_type, args.zero_snr)
        check_places(args, single.family)
        quiet_libraries(False)
        pipeline = load_single_file(single, args.config_from)
        if single.family is SDXL:
            settings = set_schedule(pipeline, prediction_type, zero_snr)
        else:
            settings = {"shift": pipeline.scheduler.config.shift}
        save_whole(pipeline, Path(args.folder), single.path)
        tell(single, settings)
        print(f"{args.folder} is a base model now: --pretrained_model_name_or_path {args.folder}")


if __name__ == "__main__":
    main()
