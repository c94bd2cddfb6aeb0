"""The small files of a model, on disk or on the Hub: found, fetched and read, or why not."""

import contextlib
import functools
import hashlib
import json
import os
import re
from collections import defaultdict
from pathlib import Path

from lpl_finetuning.errors import DataError, UserError, require
from lpl_finetuning.files import digest


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


# as diffusers and transformers call them; a variant (fp16) and the number of a shard may be part of the name
WEIGHT_NAMES = re.compile(
    r"(?:diffusion_pytorch_model|pytorch_model|model)(?:\.(?P<variant>\w[\w-]*?))?(?:-\d{5}-of-\d{5})?"
    r"(?:\.(?P<legacy>\w+))?\.(?P<kind>safetensors|bin)"
)


def loading(args):
    """Arguments for every `from_pretrained`: safetensors only, unless --allow_pickle."""
    return {"use_safetensors": None if args.allow_pickle else True}


def check_weights(args, components, replaced):
    """Refuse a model that has only pickled weights, or none, for a component that a run would load.

    components: folders of the base model that hold weights; replaced: {component: flag} that may name another model
    for it. Only names of files are looked at. A model on the Hub that can't be listed, for want of a network, is left
    to the loaders, which take safetensors only too.

    Raises:
        UserError: names the model, the component and what it offers.
    """
    for component in components:
        flag, name, subfolder, revision, variant = place_of(args, component, replaced)
        what = f"{flag} {name}:" + (f" {subfolder}/" if subfolder else "")
        check_component(args, what, files_of(name, subfolder, revision), variant)


def place_of(args, component, replaced):
    """(flag, name or folder, folder in it or "", revision, variant) of what is loaded for a component."""
    flag = replaced.get(component)
    if flag and (name := getattr(args, flag)):
        inside = component != "vae" and model_file(name, "config.json", subfolder=component)
        return f"--{flag}", name, component if inside else "", None, None
    name = args.pretrained_model_name_or_path
    return "--pretrained_model_name_or_path", name, component, args.revision, args.variant


def check_component(args, what, files, variant):
    """The check of one component; files: names of its files, or None where they are not known."""
    if files is None:
        return
    found = defaultdict(list)  # by (variant, kind)
    for name in files:
        if match := WEIGHT_NAMES.fullmatch(name):
            found[match["variant"] or match["legacy"] or "", match["kind"]].append(name)
    if found[variant or "", "safetensors"]:
        return
    pickled = found[variant or "", "bin"]
    others = sorted({name for name, _ in found if found[name, "safetensors"] and name != (variant or "")})
    other = f"; it has those of --variant {others[-1]}" if others and others[-1] else ""
    if others and not others[-1]:
        other = "; it has others: leave --variant out"
    require(found[variant or "", "bin"] or not other, f"{what} has no weights {of(variant)}{other}")
    require(pickled, f"{what} has no weights {of(variant)} (no .safetensors file); download the model again")
    require(args.allow_pickle,
            f"{what} has only pickled weights ({pickled[0]}), and a pickle can run programs when it is read{other}. "
            "Choose a model with .safetensors files, save this one anew with save_pretrained where you trust it, or "
            "give --allow_pickle")  # fmt: skip


def of(variant):
    """A variant in words."""
    return f"of --variant {variant}" if variant else "without a variant"


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


STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")  # of weight files: diffusers', transformers'
LFS_POINTER = b"version https://git-lfs"
PIECES = 256  # of a weight file, whose first bytes are looked at to tell it from another
AGAIN = "download the model again"
LYCORIS = ("hada_w1", "lokr_w1", "oft_blocks")  # marks of other adapters than LoRA


def check_model(args, denoiser, scheduler):
    """The configurations and weights of all parts that a run loads; returns {part: config.json's content}.

    denoiser: (part's name, class, flag that names another one); scheduler: (whether its class must begin with one of
    these names or must not, the names).
    """
    part, class_name, other_flag = denoiser
    other = {
        part: check_part(args, other_flag, class_name, part),
        "vae": check_part(args, "pretrained_vae_model_name_or_path", "AutoencoderKL"),
    }
    flags = {part: other_flag, "vae": "pretrained_vae_model_name_or_path"}
    classes = {part: class_name, "vae": "AutoencoderKL"}
    base = f"--pretrained_model_name_or_path {args.pretrained_model_name_or_path}"
    index = read_object(model_file(args.pretrained_model_name_or_path, "model_index.json", args.revision))
    parts = [part, "vae", *(name for name in index if name.startswith("text_encoder") and (index[name] or [None])[0])]
    configs = {}
    for name in parts:
        place = other.get(name)
        flag = f"--{flags[name]} {getattr(args, flags[name])}" if place else base
        path = place or model_file(args.pretrained_model_name_or_path, "config.json", args.revision, name)
        require(path, f"{flag}: {name}/config.json is missing; {AGAIN}")
        configs[name] = read_object(path)
        found, wanted = configs[name].get("_class_name"), classes.get(name)
        require(not wanted or found == wanted,
                f"{flag}: {name}/config.json is of a {found}; this script needs {wanted}" + (
                    "; give one as --pretrained_vae_model_name_or_path" if name == "vae" else ""))  # fmt: skip
    check_small_parts(args, base, index, scheduler)
    check_autoencoder(args, configs["vae"])
    return configs


def check_base_model(args, pipeline_class, components):
    """Refuse anything but a diffusers folder of the right pipeline, from `model_index.json` alone.

    pipeline_class: name that `_class_name` must start with; components: entries that it must have.
    """
    name = args.pretrained_model_name_or_path
    flag = f"--pretrained_model_name_or_path {name}"
    require(not Path(name).is_file(),
            f"{flag} is a single file; a folder in diffusers' layout is needed: load the file with "
            f"{pipeline_class}Pipeline.from_single_file and save it with save_pretrained")  # fmt: skip
    address = re.match(r"https?://huggingface\.co/([\w.-]+/[\w.-]+)", name)
    require(not address, f"{flag} is an address; give the name alone: {address and address[1]}")
    if not Path(name).is_dir() and (name.count("/") != 1 or not hub_like(name)):
        raise UserError(f"{flag}: there is no such folder, and Hub names have the form owner/name")
    try:
        index = model_file(name, "model_index.json", args.revision)
    except Exception as error:  # the Hub client raises many kinds: no network, no such model, no access
        raise UserError(f"{flag}: {unreadable(name, error)}") from error
    require(index, f"{flag}: no model_index.json there; {instead_of_pipeline(Path(name))}")
    found = read_object(index)
    kind = found.get("_class_name") or "pipeline without a class name"
    other = {"StableDiffusionXL": "train_sdxl_lpl.py", "StableDiffusion3": "train_sd3_lpl_flow.py"}
    better = next((script for start, script in other.items() if str(kind).startswith(start)), None)
    require(str(kind).startswith(pipeline_class), f"{flag} is a {kind}; this script trains {pipeline_class} models: "
            + (f"use {better}" if better else "give one of those"))  # fmt: skip
    missing = [part for part in components if not (found.get(part) or [None])[0]]
    refiner = "; the refiner can't be trained here, give the base model" if missing[:1] == ["text_encoder"] else ""
    require(not missing, f"{flag}: its model_index.json has no {', '.join(missing)}; a whole pipeline is needed"
            + refiner)  # fmt: skip
    if Path(name).is_dir():
        gone = [part for part in components if not (Path(name) / part).is_dir()]
        require(not gone, f"{flag}: the folder {gone[:1] and gone[0]}/ named in model_index.json is missing; download "
                "the model again")  # fmt: skip


def instead_of_pipeline(folder):
    """What a folder without a model_index.json holds, and what to do with it."""
    if not folder.is_dir():
        return "a whole pipeline in diffusers' layout is needed, such as stabilityai/stable-diffusion-xl-base-1.0"
    below = [path for pattern in ("*", "snapshots/*") for path in sorted(folder.glob(f"{pattern}/model_index.json"))]
    if below:
        return f"the pipeline is further down: give {below[0].parent}"
    if (folder / "training_state.json").is_file():
        return "it is a checkpoint of a run: give the run's base model, and this as --resume_from_checkpoint"
    files = sorted(path.name for path in folder.iterdir() if path.suffix in (".safetensors", ".ckpt"))
    if any("lora" in file.lower() for file in files) or (folder / "adapter_config.json").is_file():
        return "it is a LoRA: give the model that it was made for, and the LoRA as --init_lora"
    if (folder / "config.json").is_file():
        return "it is one part of a pipeline; give the whole pipeline's folder"
    if files:
        return f"it holds single files ({files[0]}): load one with from_single_file and save it with save_pretrained"
    if not any(folder.iterdir()):
        return "it is empty; give the folder of a whole pipeline"
    return "a whole pipeline in diffusers' layout is needed"


def check_part(args, flag, class_name, subfolder=None):
    """Refuse what a flag like --pretrained_vae_model_name_or_path names unless it is one model of the right class.

    Returns its config.json's path, or None when the flag is not given.
    """
    name = getattr(args, flag)
    if not name:
        return None
    require(not Path(name).is_file(), f"--{flag} {name} is a single file; a folder in diffusers' layout is needed: "
            f"load the file with {class_name}.from_single_file and save it with save_pretrained")  # fmt: skip
    require(Path(name).is_dir() or (name.count("/") == 1 and hub_like(name)),
            f"--{flag} {name}: there is no such folder, and Hub names have the form owner/name")  # fmt: skip
    try:
        config = subfolder and model_file(name, "config.json", subfolder=subfolder)
        config = config or model_file(name, "config.json")
    except Exception as error:  # the Hub client raises many kinds: no network, no such model, no possible name
        raise UserError(f"--{flag} {name}: {unreadable(name, error)}") from error
    where = f"config.json nor {subfolder}/config.json" if subfolder else "config.json"
    below = Path(name, "vae", "config.json").is_file() and not subfolder
    require(config, f"--{flag} {name}: no {where} there; {class_name} in diffusers' layout is needed"
            + (f": give {Path(name, 'vae')}" if below else ""))  # fmt: skip
    found = read_object(config).get("_class_name")
    require(found == class_name, f"--{flag} {name}: found {found}, expected {class_name}; give another folder")
    return config


def check_vae_dtype(args, vae_config):
    """Refuse an explicit float16 where the decoder overflows in it. vae_config: the autoencoder's config.json."""
    if args.lpl_vae_dtype == "float16" and vae_config.get("force_upcast", True):
        hint = ", or give --pretrained_vae_model_name_or_path madebyollin/sdxl-vae-fp16-fix"
        raise UserError(
            "--lpl_vae_dtype float16: this VAE's decoder overflows in float16 (force_upcast in its config); use "
            "bfloat16 or float32" + (hint if vae_config.get("latent_channels") == 4 else "")
        )


# ---------------------------------------------------------------------------------------------------------------------
# Files


def is_plan_only(args):
    """Whether a folder on disk holds configurations only, which are enough for --dry_run up to the tokenizers."""
    folder = Path(args.pretrained_model_name_or_path)
    weights = (path for path in folder.rglob("*") if path.suffix in (".safetensors", ".bin"))
    return args.dry_run and folder.is_dir() and next(weights, None) is None


def check_files(args, components, replaced):
    """Refuse weights on disk that are not all there, cut short, or only Git LFS' pointers.

    components, replaced: see `base_model.check_weights`, which has looked at their names before.
    """
    for component in components:
        flag, paths = weights_here(args, component, replaced)
        for path in paths:
            problem = weight_problem(path)
            require(not problem, f"{flag}: {component}/{path.name} {problem}")


def weights_here(args, component, replaced):
    """(flag with its value, weight files on disk of what is loaded for a component); none of a model on the Hub."""
    flag, name, subfolder, _, variant = place_of(args, component, replaced)
    folder, flag = Path(name, subfolder), f"{flag} {name}"
    return flag, weight_files(flag, folder, variant) if folder.is_dir() else []


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


def weights_fingerprint(args, part, replaced):
    """What tells a denoiser's weights from others: of files here, samples of their content, else the Hub's name."""
    _, name, _, revision, _ = place_of(args, part, replaced)
    if not Path(name).is_dir():
        return f"hub:{name}@{revision or 'main'}"
    digest = hashlib.sha256()
    for path in weights_here(args, part, replaced)[1]:
        size = path.stat().st_size
        with open(path, "rb") as file:
            for piece in range(PIECES):
                file.seek(size * piece // PIECES)
                digest.update(file.read(4096))
        digest.update(size.to_bytes(8, "little"))
    return f"sha256:{digest.hexdigest()[:16]}"


def check_lora_layers(args, part, replaced):
    """Refuse names in --lora_layers that no layer of the denoiser has, where its files are here to tell."""
    paths = weights_here(args, part, replaced)[1] if args.lora_layers else []
    if not paths or any(path.suffix != ".safetensors" for path in paths):
        return
    tensors = {name: entry for path in paths for name, entry in tensors_of(path)[0].items()}
    layers = [name.removesuffix(".weight") for name, entry in tensors.items()
              if name.endswith(".weight") and len(entry["shape"]) > 1]  # fmt: skip
    require_layers(part, lora_layers(args, ()), layers)


def lora_layers(args, targets):
    """The names in --lora_layers, or the recipe's own."""
    return [name.strip() for name in args.lora_layers.split(",")] if args.lora_layers else targets


def require_layers(part, wanted, names):
    """Refuse what is not the end of the name of any layer. names: the layers of a part of the pipeline."""
    missing = [layer for layer in wanted if not any(f".{name}".endswith(f".{layer}") for name in names)]
    require(not missing, f"--lora_layers: the {part} has no layer called {', '.join(missing)}; give names such as "
            "to_q,to_v")  # fmt: skip


def check_small_parts(args, base, index, scheduler):
    """The scheduler's configuration, and on disk the tokenizers' files."""
    path = model_file(args.pretrained_model_name_or_path, "scheduler_config.json", args.revision, "scheduler")
    require(path, f"{base}: scheduler/scheduler_config.json is missing; {AGAIN}")
    kind = read_object(path).get("_class_name") or ""
    only, names = scheduler
    require(kind.startswith(names) == only, f"{base}: its scheduler is a {kind}, whose noise levels this script does "
            "not train; give another base model")  # fmt: skip
    folder = Path(args.pretrained_model_name_or_path)
    if not folder.is_dir():
        return
    for name in index:
        if name.startswith("tokenizer") and (index[name] or [None])[0]:
            there = {path.name for path in (folder / name).glob("*")}
            whole = "tokenizer.json" in there or {"vocab.json", "merges.txt"} <= there or "spiece.model" in there
            require(whole, f"{base}: {name}/ has neither tokenizer.json nor vocab.json and merges.txt; {AGAIN}")


# ---------------------------------------------------------------------------------------------------------------------
# What must fit together


def check_autoencoder(args, config):
    """The flags that depend on the autoencoder, and its scale."""
    given = args.pretrained_vae_model_name_or_path
    flag = f"--pretrained_vae_model_name_or_path {given}" if given else "the base model's autoencoder"
    blocks = len(config.get("block_out_channels", (64,)))
    require(blocks == 4, f"{flag} makes latents {2 ** (blocks - 1)} times smaller than images; 8 is needed: give "
            "another --pretrained_vae_model_name_or_path")  # fmt: skip
    require(args.lpl_num_blocks <= blocks,
            f"--lpl_num_blocks is {args.lpl_num_blocks}; this decoder has {blocks} up blocks: give {blocks} or "
            "less")  # fmt: skip
    check_vae_dtype(args, config)


def check_channels(args, part, channels, vae):
    """Refuse a denoiser for other latents than the autoencoder's."""
    latents = vae.get("latent_channels", 4)
    special = {
        9: ": it is made for inpainting",
        8: ": it is made for InstructPix2Pix",
        33: ": it is made for inpainting",
    }
    given = args.pretrained_vae_model_name_or_path
    advice = "another --pretrained_vae_model_name_or_path" if given else "a plain text-to-image model"
    require(channels == latents, f"the {part} takes {channels} channels, the autoencoder makes {latents}"
            + ("" if given else special.get(channels, "")) + f"; give {advice}")  # fmt: skip


def check_sdxl(args, configs):
    """SDXL: latents, text and micro-conditioning must have the sizes that the UNet takes."""
    unet, first, second = (configs[name] for name in ("unet", "text_encoder", "text_encoder_2"))
    check_channels(args, "unet", unet.get("in_channels", 4), configs["vae"])
    which = args.pretrained_unet_model_name_or_path
    which = f"--pretrained_unet_model_name_or_path {which}" if which else "the base model's unet"
    kind = unet.get("addition_embed_type")
    require(
        kind == "text_time", f"{which} is not SDXL's: addition_embed_type is {kind}, not text_time; give an SDXL UNet"
    )
    widths = [config.get("hidden_size") for config in (first, second)]
    width = unet.get("cross_attention_dim")
    require(None in widths or not isinstance(width, int) or width == sum(widths),
            f"{which} takes text of width {width}, the text encoders give {' + '.join(map(str, widths))}; give a UNet "
            "and a base model that belong together")  # fmt: skip
    pooled, size = second.get("projection_dim"), unet.get("projection_class_embeddings_input_dim")
    each = unet.get("addition_time_embed_dim") or 256
    require(not pooled or not size or size == pooled + 6 * each,
            f"{which} takes a pooled prompt and {(size or 0) - (pooled or 0)} numbers of micro-conditioning, SDXL has "
            f"{6 * each}; the refiner can't be trained here, give a base model's UNet")  # fmt: skip


def check_sd3(args, configs):
    """SD3: latents and text must have the sizes that the transformer takes."""
    config = configs["transformer"]
    check_channels(args, "transformer", config.get("in_channels", 16), configs["vae"])
    which = args.pretrained_transformer_model_name_or_path
    which = f"--pretrained_transformer_model_name_or_path {which}" if which else "the base model's transformer"
    belong = "give a transformer and a base model that belong together"
    clip = [configs[name] for name in ("text_encoder", "text_encoder_2")]
    pooled, size = [config.get("projection_dim") for config in clip], config.get("pooled_projection_dim")
    require(None in pooled or not size or size == sum(pooled),
            f"{which} takes a pooled prompt of {size} numbers, the text encoders give "
            f"{' + '.join(map(str, pooled))}; {belong}")  # fmt: skip
    width, widths = config.get("joint_attention_dim"), [config.get("hidden_size") for config in clip]
    t5 = configs.get("text_encoder_3", {}).get("d_model")
    require(not width or ((None in widths or sum(widths) <= width) and t5 in (None, width)),
            f"{which} takes text of width {width}, the text encoders give {' + '.join(map(str, widths))}"
            f"{f' and {t5}' if t5 else ''}; {belong}")  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# A LoRA to go on from, publishing


def check_init_lora(args):
    """Refuse an --init_lora that can't be one, before a model is looked at."""
    name = args.init_lora
    if not name:
        return
    flag, path = f"--init_lora {name}", Path(name)
    if not path.exists():
        require(name.count("/") == 1 and hub_like(name),
                f"{flag}: there is no such file or folder, and Hub names have the form owner/name")  # fmt: skip
        problem = hub_problem()
        require(not problem, f"{flag}: no file or folder here, and {problem}; give a file, or connect")
        return
    if path.is_dir():
        files = sorted(path.glob("*.safetensors"))
        found = sorted(file.name for file in path.iterdir())[:3]
        require(files, f"{flag}: no .safetensors there, only {', '.join(found) or 'nothing'}; give the folder or file "
                "of a LoRA")  # fmt: skip
        path = next((file for file in files if file.name == "pytorch_lora_weights.safetensors"), files[0])
    require(path.suffix == ".safetensors", f"{flag}: {path.suffix or 'a file without an ending'} is not read, only "
            ".safetensors; save the LoRA in that format")  # fmt: skip
    problem = weight_problem(path)
    require(not problem, f"{flag}: no LoRA could be read there: {path.name} {problem}")
    names = list(tensors_of(path)[0])
    lycoris = next((mark for mark in LYCORIS if any(mark in name for name in names)), None)
    require(not lycoris, f"{flag}: it is a LyCORIS adapter ({lycoris}), not a LoRA; give a LoRA")
    require(any("lora" in name.lower() for name in names), f"{flag}: no LoRA could be read there: {path.name} holds "
            f"{names[0] if names else 'no tensors'} and no layers of a LoRA; a whole model is "
            "--pretrained_model_name_or_path")  # fmt: skip


_FILE_HASHES: dict[tuple[str, int, int], str] = {}  # (path, size, mtime_ns) -> sha256
_MODEL_SUFFIXES = (".safetensors", ".bin", ".json", ".txt", ".model")  # weights, configurations, tokenizers


def model_digest(folder_or_file: str | os.PathLike, *names: str) -> str:
    """sha256, hex, of the weights and configurations of a model, to tell one model's cache entries from another's.

    Args:
        folder_or_file: a model's folder, or one file.
        names: files or folders below it that count, such as "vae"; all of it when there are none.

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
            if path.is_file():
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
        status = path.stat()
        key = (os.path.abspath(path), status.st_size, status.st_mtime_ns)
        if key not in _FILE_HASHES:
            with open(path, "rb") as file:
                _FILE_HASHES[key] = hashlib.file_digest(file, "sha256").hexdigest()
        return _FILE_HASHES[key]
    except OSError as error:
        raise DataError(f"{path}: can't be read: {error.strerror}.") from error
