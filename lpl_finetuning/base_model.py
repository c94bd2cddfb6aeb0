"""The base model: what its family needs, where its parts are, and whether they are all there, safe and fitting.

All checks read small files only (configurations, headers, lists of files), on disk or on the Hub, and import no torch.
"""

import contextlib
import functools
import hashlib
import json
import os
import re
from collections import defaultdict
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from lpl_finetuning.errors import DataError, UserError, require
from lpl_finetuning.files import digest, remembered_sha256

# ---------------------------------------------------------------------------------------------------------------------
# A family of models, and a base model of it


@dataclass(frozen=True)
class Part:
    """A model in a pipeline that a flag can replace."""

    name: str  # its folder in the pipeline: "unet"
    title: str  # its name in messages: "UNet"
    class_name: str  # its class in diffusers
    flag: str  # the flag that names another model
    in_pipelines: bool = False  # whether that flag takes a whole pipeline's folder too


@dataclass(frozen=True, eq=False)
class Family:
    """What distinguishes one family of models from others: names, sizes and checks.

    Each training script has one family. The package asks the family, and knows none by name.
    """

    name: str  # in the keys of caches: "sdxl"
    title: str  # in messages, figures and checkpoints: "SDXL"
    long_name: str  # on the model card: "Stable Diffusion XL"
    tag: str  # the model card's tag
    pipeline: str  # the pipeline's class in diffusers, without "Pipeline"
    denoiser: Part | None  # None: only the autoencoder is used
    autoencoder: Part | None  # None: the denoiser works on pixels
    text_encoders: tuple[str, ...]
    tokenizers: tuple[str, ...]
    lora_layers: tuple[str, ...]  # layers of the denoiser that get a LoRA by default
    check: Callable  # (args, base, {part: config.json}) -> None; UserError for parts and sizes that do not fit
    optional_text_encoders: tuple[str, ...] = ()  # those that a pipeline may lack
    optional_tokenizers: tuple[str, ...] = ()
    pixels_per_latent: int = 8  # side of the square of pixels that one latent stands for
    schedulers: tuple[str, ...] = ()  # what the class of the scheduler must begin with; (): no rule
    foreign_schedulers: tuple[str, ...] = ()  # what that class must not begin with
    half_vae: str | None = None  # on the Hub: an autoencoder whose decoder works in float16
    special_channels: Mapping[int, str] = field(default_factory=dict)  # denoiser channels -> what such a model is for
    example: str = ""  # a pipeline of the family on the Hub
    missing_part: Mapping[str, str] = field(default_factory=dict)  # required part -> advice where it is missing
    other_scripts: Mapping[str, str] = field(default_factory=dict)  # pipeline of another family -> its script
    layer_kinds: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # word in --lora_layers -> its layers
    named_when_unused: tuple[str, ...] = ()  # kinds of layers that the plan names where none of them gets a LoRA
    lora_blocks: Mapping[str, str] = field(default_factory=dict)  # word in --lora_blocks -> start of modules' names
    numbered_blocks: str = ""  # what the numbers in --lora_blocks count: start of modules' names
    fixed_flags: tuple[str, ...] = ()  # further flags that a checkpoint can't be resumed with other values of
    open_base_file: Callable | None = None  # (args, base) -> base, with a single file's folder for the pipeline
    open_vae_file: Callable | None = None  # the same for the autoencoder

    @property
    def components(self):
        """All parts that model_index.json must list."""
        autoencoder = (self.autoencoder.name,) if self.autoencoder else ()
        denoiser = (self.denoiser.name, "scheduler") if self.denoiser else ()
        return (*autoencoder, *self.text_encoders, *self.tokenizers, *denoiser)

    @property
    def replaceable(self):
        """The parts that a flag can replace."""
        return tuple(part for part in (self.denoiser, self.autoencoder) if part)

    @property
    def pipeline_class(self):
        """The name of the pipeline's class in diffusers."""
        return f"{self.pipeline}Pipeline"


class Place(NamedTuple):
    """Where `from_pretrained` finds a part."""

    name: str  # folder, or name on the Hub
    subfolder: str  # "" where the part lies at the top
    revision: str | None
    variant: str | None


@dataclass(frozen=True)
class BaseModel:
    """The model that a run starts from: a pipeline, whose denoiser and autoencoder may come from elsewhere."""

    family: Family
    name: str  # folder, or name on the Hub
    revision: str | None = None
    variant: str | None = None
    vae: str | None = None  # folder or name of another autoencoder
    denoiser: str | None = None  # folder or name of another denoiser
    allow_pickle: bool = False
    weights: str | None = None  # fingerprint of the denoiser's weights, else the autoencoder's: `weights_fingerprint`
    unpacked: Mapping = field(default_factory=dict)  # {folder: `Unpacked`} of single files, for name and vae
    schedule: Mapping = field(default_factory=dict)  # settings of the scheduler that win over the pipeline's own

    def replacement(self, part):
        """(the `Part`, folder or name) of the model that a flag puts in the place of a part; None without such."""
        family = self.family
        for each, name in ((family.denoiser, self.denoiser), (family.autoencoder, self.vae)):
            if name and each.name == part:
                return each, name
        return None

    def place(self, part):
        """The `Place` of a part."""
        if found := self.replacement(part):
            each, name = found
            inside = each.in_pipelines and is_in_pipeline(name, part)
            return Place(name, part if inside else "", None, None)
        return Place(self.name, part, self.revision, self.variant)

    def flag(self, part=None):
        """The flag that a part comes from, with its value; without a part that of the pipeline."""
        if found := self.replacement(part):
            return f"--{found[0].flag} {self.given(found[1])}"
        return f"--pretrained_model_name_or_path {self.given(self.name)}"

    def given(self, name):
        """A folder or name as the flag has it: the single file, where the folder is an unpacked one."""
        return self.unpacked[name].path if name in self.unpacked else name

    @property
    def is_unpacked(self):
        """Whether the weights of all single files are in their folders."""
        return all(each.is_made for each in self.unpacked.values())

    def unpack(self):
        """Write the weights of single files into their folders, unless they are there."""
        for each in self.unpacked.values():
            each.make()

    def loading_flags(self, part):
        """Names of the flags that say which files of a part are loaded. --variant is for the pipeline's own parts."""
        return ("allow_pickle",) if self.replacement(part) else ("variant", "allow_pickle")

    def describe(self, part):
        """A replaceable part in words: its flag with its value, or "the base model's UNet"."""
        if self.replacement(part):
            return self.flag(part)
        return f"the base model's {next(each.title for each in self.family.replaceable if each.name == part)}"

    def file(self, name, part=None):
        """Path of a small file of the pipeline; None where there is none."""
        return model_file(self.name, name, self.revision, part)

    def index(self):
        """The content of model_index.json."""
        return read_object(self.file("model_index.json"))

    def has(self, part):
        """Whether the pipeline brings a part."""
        return is_listed(self.index(), part)

    def absent_parts(self):
        """The optional parts that the pipeline lacks."""
        index, family = self.index(), self.family
        optional = (*family.optional_text_encoders, *family.optional_tokenizers)
        return [part for part in optional if not is_listed(index, part)]

    def models(self):
        """The parts that have weights."""
        family, absent = self.family, self.absent_parts()
        encoders = (*family.text_encoders, *family.optional_text_encoders)
        autoencoder = [family.autoencoder.name] if family.autoencoder else []
        denoiser = [family.denoiser.name] if family.denoiser else []
        return [*autoencoder, *(part for part in encoders if part not in absent), *denoiser]


def base_model_of(args, family):
    """The `BaseModel` that the flags name."""
    replaced = {part: getattr(args, part.flag) for part in family.replaceable}
    return BaseModel(
        family,
        args.pretrained_model_name_or_path,
        args.revision,
        args.variant,
        vae=replaced.get(family.autoencoder),
        denoiser=replaced.get(family.denoiser),
        allow_pickle=args.allow_pickle,
        schedule=schedule_from_flags(args),
    )


def schedule_from_flags(args):
    """Settings of the scheduler from --rescale_betas_zero_snr; at zero SNR sampling begins at the last timestep."""
    zero = getattr(args, "rescale_betas_zero_snr", None)
    if zero is None:
        return {}
    return {"rescale_betas_zero_snr": zero} | ({"timestep_spacing": "trailing"} if zero else {})


def is_listed(index, part):
    """Whether a model_index.json names a class for a part."""
    return bool((index.get(part) or [None])[0])


def check_base_model(args, family):
    """The `BaseModel` that the flags name, checked as far as small files tell.

    Raises:
        UserError: a part is missing, damaged, unsafe or of another family, or the parts do not fit together.
    """
    base = base_model_of(args, family)
    base = family.open_base_file(args, base) if family.open_base_file else base
    check_pipeline(base)
    base = family.open_vae_file(args, base) if family.open_vae_file else base
    configs = check_parts(base)
    check_small_parts(base)
    if family.autoencoder:
        check_autoencoder(args, base, configs[family.autoencoder.name])
    if base.is_unpacked and not (args.dry_run and is_plan_only(base)):
        check_weights(base)
        check_files(base)
        if family.denoiser:
            check_lora_layers(args, base)
    family.check(args, base, configs)
    return replace(base, weights=weights_fingerprint(base))


# ---------------------------------------------------------------------------------------------------------------------
# Small files, on disk or on the Hub


@functools.cache
def _hub_problem(endpoint):
    from huggingface_hub import get_session

    try:
        get_session().head(endpoint, timeout=4)  # any answer will do
    except Exception as error:  # no network, no such host, a proxy that refuses: many kinds
        return f"{endpoint.split('://')[-1]} can't be reached: {' '.join(str(error).split()) or type(error).__name__}"
    return None


def hub_problem():
    """Why the Hub can't be asked, or None. It is tried once, for 4 s, where its client would try for half a minute."""
    from huggingface_hub import constants, is_offline_mode

    if is_offline_mode():
        return "HF_HUB_OFFLINE is set"
    return _hub_problem(constants.ENDPOINT)


@contextlib.contextmanager
def offline_without_hub():
    """Inside, the clients of the Hub look into their caches at once when it can't be reached."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or bool(hub_problem())
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def model_file(name_or_path, file, revision=None, subfolder=None):
    """Path of one small file of a model, on disk or fetched from the Hub; None when the model does not have it."""
    folder = Path(name_or_path)
    relative = f"{subfolder}/{file}" if subfolder else file
    if folder.is_dir():
        return folder / relative if (folder / relative).is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(name_or_path, relative, revision=revision, local_files_only=bool(hub_problem())))
    except LocalEntryNotFoundError:  # no network, which says nothing about the file
        raise
    except EntryNotFoundError:
        return None


def is_in_pipeline(name, part):
    """Whether a model that a flag names lies in the folder `part` of a pipeline, and not at the top.

    On the Hub the top is looked at first, and the answer is kept: a run may lose the network. What is not here, and
    can't be asked for, is taken to lie at the top.
    """
    from huggingface_hub.errors import LocalEntryNotFoundError

    if Path(name).is_dir():
        return Path(name, part, "config.json").is_file()
    with contextlib.suppress(LocalEntryNotFoundError):
        return _is_in_pipeline_on_hub(name, part)
    return False


@functools.cache
def _is_in_pipeline_on_hub(name, part):
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        if model_file(name, "config.json"):
            return False
    except LocalEntryNotFoundError:  # without network: the top of a pipeline has none that could be in the cache
        pass
    return model_file(name, "config.json", subfolder=part) is not None


def unreadable(name, error):
    """Why a name could not be read on the Hub and what to do, from the exception of its client."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return f"it is gated: accept its licence at https://huggingface.co/{name}, then run `hf auth login`"
    if isinstance(error, errors.RevisionNotFoundError):
        return "it has no such --revision; its revisions are at " + f"https://huggingface.co/{name}/tree/main"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "no folder here, and no model on the Hub that you may see; check the name, or run `hf auth login`"
    if problem := hub_problem():
        return f"no folder here, not in the Hub's cache on this machine, and {problem}; give a folder, or connect"
    return f"neither a folder here nor readable on the Hub ({type(error).__name__}: {' '.join(str(error).split())})"


def read_json(path):
    """A JSON file's content; UserError names a file that is damaged."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:  # no JSON, no UTF-8, no permission
        raise UserError(f"{path}: not valid JSON ({error}); repair it, or download the model again") from None


def read_object(path):
    """The same for a file that must hold an object, such as a config.json."""
    content = read_json(path)
    require(isinstance(content, dict), f"{path}: found a JSON {type(content).__name__}, expected an object; "
            "download the model again")  # fmt: skip
    return content


def hub_like(name):
    """Whether a name can be one of the Hub's, name or owner/name, and not a path."""
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name, re.ASCII) and not name.startswith((".", "-"))


# ---------------------------------------------------------------------------------------------------------------------
# The pipeline and the configurations of its parts

AGAIN = "download the model again"


def check_pipeline(base):
    """Refuse anything but a pipeline of the family in diffusers' layout, from model_index.json alone."""
    name, family, flag = base.name, base.family, base.flag()
    if Path(name).is_file():
        raise UserError(f"{flag} {instead_of_folder(Path(name), family.pipeline_class)}")
    address = re.match(r"https?://huggingface\.co/([\w.-]+/[\w.-]+)", name)
    require(not address, f"{flag} is an address; give the name alone: {address and address[1]}")
    if not Path(name).is_dir() and (name.count("/") != 1 or not hub_like(name)):
        raise UserError(f"{flag}: there is no such folder, and Hub names have the form owner/name")
    try:
        index = base.file("model_index.json")
    except Exception as error:  # the Hub client raises many kinds: no network, no such model, no access
        raise UserError(f"{flag}: {unreadable(name, error)}") from error
    require(index, f"{flag}: no model_index.json there; {instead_of_pipeline(Path(name), family.example)}")
    check_index(base, read_object(index))


def check_index(base, index):
    """Refuse a pipeline of another family, or without all its parts. index: the content of model_index.json."""
    family, flag = base.family, base.flag()
    kind = str(index.get("_class_name") or "pipeline without a class name")
    other = next((script for start, script in family.other_scripts.items() if kind.startswith(start)), None)
    require(kind.startswith(family.pipeline), f"{flag} is a {kind}; this script trains {family.pipeline} models: "
            + (f"use {other}" if other else "give one of those"))  # fmt: skip
    missing = [part for part in family.components if not is_listed(index, part)]
    advice = family.missing_part.get(missing[0]) if missing else None
    require(not missing, f"{flag}: its model_index.json has no {', '.join(missing)}; a whole pipeline is needed"
            + (f"; {advice}" if advice else ""))  # fmt: skip
    if Path(base.name).is_dir():
        gone = [part for part in family.components if not (Path(base.name) / part).is_dir()]
        require(not gone, f"{flag}: the folder {gone[:1] and gone[0]}/ named in model_index.json is missing; {AGAIN}")


def instead_of_folder(path, class_name):
    """What a file in the place of a model's folder is, and what to do with it. class_name: of diffusers."""
    if path.suffix not in SINGLE_FILES:
        return "is a file; give the folder of a model in diffusers' layout"
    if is_lora_file(path):
        return "is a LoRA; give the model that it was made for, and the LoRA as --init_lora"
    if not class_name.startswith("Autoencoder"):
        return (f"is a single file; a folder in diffusers' layout is needed: python -m lpl_finetuning.convert {path} "
                "FOLDER makes one of a whole model")  # fmt: skip
    return (f"is a single file; a folder in diffusers' layout is needed: load the file with {class_name}"
            ".from_single_file and save it with save_pretrained")  # fmt: skip


SINGLE_FILES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")


def is_lora_file(path):
    """Whether a file holds layers of a LoRA: by its tensors, or by its name where they can't be read."""
    try:
        if path.suffix == ".safetensors":
            return any(re.search("lora|lokr|hada_", name.lower()) for name in tensors_of(path)[0])
    except (OSError, ValueError):
        pass
    return re.search("(?<![a-z])lora(?![a-z])", path.name.lower()) is not None


def instead_of_pipeline(folder, example):
    """What a folder without a model_index.json holds, and what to do with it. example: a pipeline on the Hub."""
    if not folder.is_dir():
        return f"a whole pipeline in diffusers' layout is needed, such as {example}"
    below = [path for pattern in ("*", "snapshots/*") for path in sorted(folder.glob(f"{pattern}/model_index.json"))]
    if below:
        return f"the pipeline is further down: give {below[0].parent}"
    if (folder / "training_state.json").is_file():
        return "it is a checkpoint of a run: give the run's base model, and this as --resume_from_checkpoint"
    files = sorted(path.name for path in folder.iterdir() if path.suffix in SINGLE_FILES)
    if any(is_lora_file(folder / file) for file in files) or (folder / "adapter_config.json").is_file():
        return "it is a LoRA: give the model that it was made for, and the LoRA as --init_lora"
    if (folder / "config.json").is_file():
        return "it is one part of a pipeline; give the whole pipeline's folder"
    if files:
        return f"it holds single files ({files[0]}): give one of them, such as {folder / files[0]}"
    if not any(folder.iterdir()):
        return "it is empty; give the folder of a whole pipeline"
    return "a whole pipeline in diffusers' layout is needed"


def check_parts(base):
    """{part: content of config.json} of every model of the pipeline; UserError for one that is missing or wrong."""
    replaceable = {part.name: part for part in base.family.replaceable}
    configs = {}
    for name in base.models():
        part, flag = replaceable.get(name), base.flag(name)
        if found := base.replacement(name):
            path = check_part(part.flag, found[1], part.class_name, name if part.in_pipelines else None)
        else:
            path = base.file("config.json", name)
        require(path, f"{flag}: {name}/config.json is missing; {AGAIN}")
        configs[name] = read_object(path)
        kind = configs[name].get("_class_name")
        require(not part or kind == part.class_name,
                f"{flag}: {name}/config.json is of a {kind}; this script needs {part and part.class_name}" + (
                    f"; give one as --{part.flag}" if part == base.family.autoencoder else ""))  # fmt: skip
    return configs


def check_part(flag, name, class_name, subfolder=None):
    """The path of the config.json of a model that a flag names; UserError unless it is of the class.

    subfolder: where a whole pipeline's folder has such a model, if the flag takes a pipeline too.
    """
    if Path(name).is_file():
        lora = f"is a LoRA; give a folder with a model of the class {class_name}"
        raise UserError(
            f"--{flag} {name} {lora if is_lora_file(Path(name)) else instead_of_folder(Path(name), class_name)}"
        )
    require(Path(name).is_dir() or (name.count("/") == 1 and hub_like(name)),
            f"--{flag} {name}: there is no such folder, and Hub names have the form owner/name")  # fmt: skip
    try:
        inside = subfolder and is_in_pipeline(name, subfolder)
        config = model_file(name, "config.json", subfolder=subfolder if inside else None)
    except Exception as error:  # the Hub client raises many kinds: no network, no such model, no possible name
        raise UserError(f"--{flag} {name}: {unreadable(name, error)}") from error
    where = f"config.json nor {subfolder}/config.json" if subfolder else "config.json"
    require(config, f"--{flag} {name}: no {where} there; {class_name} in diffusers' layout is needed")
    found = read_object(config).get("_class_name")
    require(found == class_name, f"--{flag} {name}: found {found}, expected {class_name}; give another folder")
    return config


def check_small_parts(base):
    """Refuse a scheduler whose noise levels the family does not have, and tokenizers on disk without their files."""
    if "scheduler" not in base.family.components:
        return
    path = base.file("scheduler_config.json", "scheduler")
    require(path, f"{base.flag()}: scheduler/scheduler_config.json is missing; {AGAIN}")
    kind, family = read_object(path).get("_class_name") or "", base.family
    fits = kind.startswith(family.schedulers or "") and not kind.startswith(family.foreign_schedulers)
    require(fits, f"{base.flag()}: its scheduler is a {kind}, whose noise levels this script does not train; give "
            "another base model")  # fmt: skip
    folder = Path(base.name)
    if not folder.is_dir():
        return
    for name in (*family.tokenizers, *family.optional_tokenizers):
        if base.has(name):
            there = {path.name for path in (folder / name).glob("*")}
            whole = "tokenizer.json" in there or {"vocab.json", "merges.txt"} <= there or "spiece.model" in there
            require(whole, f"{base.flag()}: {name}/ has neither tokenizer.json nor vocab.json and merges.txt; "
                    f"{AGAIN}")  # fmt: skip


def check_autoencoder(args, base, config):
    """Refuse an autoencoder of another scale, and flags of the loss that its decoder does not fit.

    config: the content of the autoencoder's config.json.
    """
    family, flag = base.family, f"--{base.family.autoencoder.flag}"
    blocks = len(config.get("block_out_channels", (64,)))
    require(2 ** (blocks - 1) == family.pixels_per_latent,
            f"{base.describe(family.autoencoder.name)} makes latents {2 ** (blocks - 1)} times smaller than images; "
            f"{family.pixels_per_latent} is needed: give another {flag}")  # fmt: skip
    require(args.lpl_num_blocks <= blocks,
            f"--lpl_num_blocks is {args.lpl_num_blocks}; this decoder has {blocks} up blocks: give {blocks} or "
            "less")  # fmt: skip
    overflows = args.lpl_vae_dtype == "float16" and config.get("force_upcast", True)
    hint = f", or give {flag} {family.half_vae}" if family.half_vae else ""
    require(not overflows, "--lpl_vae_dtype float16: this VAE's decoder overflows in float16 (force_upcast in its "
            "config); use bfloat16 or float32" + hint)  # fmt: skip


def check_channels(base, channels, vae):
    """Refuse a denoiser for other latents than the autoencoder's.

    channels: the denoiser's input channels; vae: the content of the autoencoder's config.json.
    """
    latents, special = vae.get("latent_channels", 4), base.family.special_channels.get(channels)
    advice = f"another --{base.family.autoencoder.flag}" if base.vae else "a plain text-to-image model"
    require(channels == latents,
            f"the {base.family.denoiser.name} takes {channels} channels, the autoencoder makes {latents}"
            + (f": it is made for {special}" if special and not base.vae else "") + f"; give {advice}")  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Weight files

# as diffusers and transformers call them; a variant (fp16) and the number of a shard may be part of the name
WEIGHT_NAMES = re.compile(
    r"(?:diffusion_pytorch_model|pytorch_model|model)(?:\.(?P<variant>\w[\w-]*?))?(?:-\d{5}-of-\d{5})?"
    r"(?:\.(?P<legacy>\w+))?\.(?P<kind>safetensors|bin)"
)
STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")  # of weight files: diffusers', transformers'
LFS_POINTER = b"version https://git-lfs"
PIECES = 256  # samples of a weight file that its fingerprint reads, 4096 bytes each


def is_plan_only(base):
    """Whether the model is a folder of configurations without weights, which is enough for a plan."""
    folder = Path(base.name)
    weights = (path for path in folder.rglob("*") if path.suffix in (".safetensors", ".bin"))
    return folder.is_dir() and next(weights, None) is None


def check_weights(base):
    """Refuse a model that has only pickled weights, or none, for a part that a run would load.

    Only names of files are looked at. A model on the Hub that can't be listed, for want of a network, is left to the
    loaders, which take safetensors only too.

    Raises:
        UserError: names the model, the part and what it offers.
    """
    for part in base.models():
        place = base.place(part)
        what = f"{base.flag(part)}:" + (f" {place.subfolder}/" if place.subfolder else "")
        files = files_of(place.name, place.subfolder, place.revision)
        if files is not None:
            check_weight_names(what, files, place.variant, base.allow_pickle, base.loading_flags(part))


def check_weight_names(what, names, variant, allow_pickle, flags=("variant", "allow_pickle")):
    """The check of the weights of one part, `what`; names: its files; flags: those that say which are loaded."""
    found = defaultdict(list)  # by (variant, kind)
    for name in names:
        if match := WEIGHT_NAMES.fullmatch(name):
            found[match["variant"] or match["legacy"] or "", match["kind"]].append(name)
    wanted = variant or ""
    if found[wanted, "safetensors"]:
        return
    pickled = found[wanted, "bin"]
    others = sorted({name for name, _ in found if found[name, "safetensors"] and name != wanted})
    other = f"; it has those of --variant {others[-1]}" if others and others[-1] else ""
    if other and "variant" not in flags:
        other = f"; it has those of the variant {others[-1]}, which is not read here: save them without one"
    if others and not others[-1]:
        other = "; it has others: leave --variant out"
    which = f"of --variant {variant}" if variant else "without a variant"
    require(pickled or not other, f"{what} has no weights {which}{other}")
    require(pickled, f"{what} has no weights {which} (no .safetensors file); {AGAIN}")
    require(allow_pickle,
            f"{what} has only pickled weights ({pickled[0]}), and a pickle can run programs when it is read{other}. "
            "Choose a model with .safetensors files, or save this one anew with save_pretrained where you trust it"
            + (", or give --allow_pickle" if "allow_pickle" in flags else ""))  # fmt: skip


def files_of(name, subfolder="", revision=None):
    """Names of the files directly in a folder of a model, here or on the Hub; None where that can't be known."""
    folder = Path(name)
    if folder.is_dir():
        place = folder / subfolder
        return [path.name for path in place.iterdir()] if place.is_dir() else []
    if hub_problem():
        return None
    from huggingface_hub import HfApi

    try:
        files = HfApi().list_repo_files(name, revision=revision)
    except Exception:  # no network, a limit, a server's fault: the loaders decide
        return None
    parent = Path(subfolder)
    return [Path(file).name for file in files if Path(file).parent == parent]


def check_files(base):
    """Refuse weights on disk that are not all there, cut short, or only Git LFS' pointers."""
    for part in base.models():
        for path in weights_here(base, part):
            problem = weight_problem(path)
            require(not problem, f"{base.flag(part)}: {part}/{path.name} {problem}")


def weights_here(base, part):
    """The weight files on disk of a part; none of a model on the Hub."""
    place = base.place(part)
    folder = Path(place.name, place.subfolder)
    return weight_files(base.flag(part), folder, place.variant) if folder.is_dir() else []


def weight_files(flag, folder, variant):
    """The files of a folder that would be loaded; UserError where an index names more than are there."""
    middle = f".{variant}" if variant else ""
    for suffix in (".safetensors", ".bin"):
        for stem in STEMS:
            if (single := folder / f"{stem}{middle}{suffix}").is_file():
                return [single]
            if (listing := folder / f"{stem}{suffix}.index{middle}.json").is_file():
                shards = sorted(set(read_object(listing).get("weight_map", {}).values()))
                gone = [shard for shard in shards if not (folder / shard).is_file()]
                require(
                    shards and not gone,
                    f"{flag}: {folder.name}/{listing.name} names {len(shards)} files, missing are "
                    f"{', '.join(gone[:3])}; {AGAIN}",
                )
                return [folder / shard for shard in shards]
    return []


def idle_weights(base, *parts):
    """The weight files beside those that are loaded, in the folders of some parts: other variants, pickles."""
    found = set()
    for part in set(parts) & set(base.models()):
        place, loaded = base.place(part), weights_here(base, part)
        folder = Path(place.name, place.subfolder)
        files = folder.iterdir() if loaded else ()
        found |= {path for path in files if path.suffix in (".safetensors", ".bin")} - set(loaded)
    return found


def safetensors_of(base, part):
    """Paths of the .safetensors files that a part is loaded from, here or in the Hub's cache; [] for none there."""
    place = base.place(part)
    if Path(place.name).is_dir():
        return [path for path in weights_here(base, part) if path.suffix == ".safetensors"]
    middle = f".{place.variant}" if place.variant else ""

    def cached(name):
        from huggingface_hub import hf_hub_download

        file = f"{place.subfolder}/{name}" if place.subfolder else name
        try:
            return Path(hf_hub_download(place.name, file, revision=place.revision, local_files_only=True))
        except Exception:  # not in the cache, or no cache: many kinds
            return None

    for stem in STEMS:
        if single := cached(f"{stem}{middle}.safetensors"):
            return [single]
        if listing := cached(f"{stem}.safetensors.index{middle}.json"):
            shards = [cached(name) for name in sorted(set(read_object(listing).get("weight_map", {}).values()))]
            return [shard for shard in shards if shard]
    return []


def weight_problem(path):
    """What is wrong with a weight file, and what to do; None when nothing is."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(len(LFS_POINTER))
    if start == LFS_POINTER:
        return "is only a pointer of Git LFS; run `git lfs pull` in the model's folder"
    if not size:
        return f"is empty (0 bytes); {AGAIN}"
    if path.suffix != ".safetensors":
        return None
    try:
        header, begins = tensors_of(path)
    except ValueError as error:
        return f"can't be read as safetensors: {error}; {AGAIN}"
    wanted = begins + max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
    if size < wanted:
        return f"is cut short: {size:,} of {wanted:,} bytes; {AGAIN}"
    return None


def tensors_of(path):
    """({name: {"dtype", "shape", "data_offsets"}}, where the data begin) from a safetensors file's header.

    Raises ValueError for another file.
    """
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(100_000_000, path.stat().st_size):
            raise ValueError("its header is longer than the file")
        try:
            header = json.loads(file.read(length))
        except ValueError:
            raise ValueError("its header is not JSON") from None
    if not isinstance(header, dict):
        raise ValueError("its header is no object")
    header.pop("__metadata__", None)
    return header, 8 + length


def weights_fingerprint(base, part=None):
    """What tells the weights of a part from others: for files on disk samples of them, else the name on the Hub.

    By default the part is the denoiser, or the autoencoder of a family without a denoiser.
    """
    part = part or (base.family.denoiser or base.family.autoencoder).name
    place = base.place(part)
    if not Path(place.name).is_dir():
        return f"hub:{place.name}@{place.revision or 'main'}"
    single = base.unpacked.get(place.name)
    return f"sha256:{fingerprint_of([single.path] if single else weights_here(base, part))[:16]}"


def fingerprint_of(paths):
    """sha256, hex, of samples of files and of their sizes."""
    content = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        with open(path, "rb") as file:
            for piece in range(PIECES):
                file.seek(size * piece // PIECES)
                content.update(file.read(4096))
        content.update(size.to_bytes(8, "little"))
    return content.hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# Layers that get a LoRA


def check_lora_layers(args, base):
    """Refuse names in --lora_layers that no layer of the denoiser has, where its files are here to tell."""
    part = base.family.denoiser.name
    paths = weights_here(base, part) if args.lora_layers else []
    if not paths or any(path.suffix != ".safetensors" for path in paths):
        return
    tensors = {name: entry for path in paths for name, entry in tensors_of(path)[0].items()}
    layers = [name.removesuffix(".weight") for name, entry in tensors.items()
              if name.endswith(".weight") and len(entry["shape"]) > 1]  # fmt: skip
    require_layers(part, lora_layers(args, base.family), layers)


def lora_layers(args, family):
    """The names in --lora_layers with those that its words stand for, or by default the family's."""
    if not args.lora_layers:
        return family.lora_layers
    words = [word.strip() for word in args.lora_layers.split(",")]
    return [layer for word in words for layer in family.layer_kinds.get(word, (word,))]


def require_layers(part, wanted, names, flag="--lora_layers"):
    """Refuse what is not the end of the name of any layer.

    Args:
        part: of the pipeline.
        names: its layers.
        flag: the flag that the layers come from.
    """
    missing = [layer for layer in wanted if not any(f".{name}".endswith(f".{layer}") for name in names)]
    advice = "give names such as to_q,to_v" if flag == "--lora_layers" else "leave that block out, or name layers"
    advice += "" if flag == "--lora_layers" else " that all blocks have with --lora_layers"
    require(not missing, f"{flag}: the {part} has no layer called {', '.join(missing)}; {advice}")


# ---------------------------------------------------------------------------------------------------------------------
# The identity of a model, for caches

_MODEL_SUFFIXES = (".safetensors", ".bin", ".json", ".txt", ".model")  # weights, configurations, tokenizers


def model_digest(folder_or_file: str | os.PathLike, *names: str, without: Container[Path] = ()) -> str:
    """sha256, hex, of the weights and configurations of a model, to tell one model's cache entries from another's.

    Args:
        folder_or_file: a model's folder, or one file.
        names: files or folders below it that count, such as "vae"; all of it when there are none.
        without: files that do not count, as they are not loaded.

    In the Hugging Face cache a large file is a link to a blob that is named by its sha256: that is taken instead of
    reading the file, and so gives the same fingerprint as a plain copy of the model.

    Raises:
        DataError: one of the names does not exist, or there is nothing to be read.
    """
    root = Path(folder_or_file)
    digests = {}
    for start in [root / name for name in names] or [root]:
        if not start.exists():
            raise DataError(f"{start} does not exist. Is {root} a model in diffusers' format?")
        files = [start] if start.is_file() else [path for path in start.rglob("*") if path.suffix in _MODEL_SUFFIXES]
        for path in files:
            if path.is_file() and path not in without:
                name = path.relative_to(root).as_posix() if path != root else ""
                digests[name] = _blob_name(path) or _file_hash(path)
    if not digests:
        raise DataError(f"{root}: there are no weights or configurations ({', '.join(_MODEL_SUFFIXES)}) in it.")
    return digest(files=digests)


def _blob_name(path: Path) -> str | None:
    """The sha256 that the Hugging Face cache named a linked file by. Small files go by 40-digit git hashes: None."""
    if not path.is_symlink():
        return None
    target = path.resolve()
    is_sha256 = len(target.name) == 64 and set(target.name) <= set("0123456789abcdef")
    return target.name if target.parent.name == "blobs" and is_sha256 else None


def _file_hash(path: Path) -> str:
    try:
        return remembered_sha256(path)
    except OSError as error:
        raise DataError(f"{path}: can't be read: {error.strerror}.") from error
