"""Weights are loaded as data (safetensors), not as pickles, which are programs: what a model offers, seen early."""

import re
from collections import defaultdict
from pathlib import Path

from cli_utils import require
from model_utils import hub_problem, model_file

# as diffusers and transformers call them; a variant (fp16) and the number of a shard may be part of the name
WEIGHTS = re.compile(
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
        if match := WEIGHTS.fullmatch(name):
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
