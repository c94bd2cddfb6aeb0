"""The folders of checkpoints: which are whole, and which one a run goes on from. Nothing here imports torch.

`manifest.json`, with the size and sha256 of every other file, is the last file of a checkpoint to be written. So one
that was not finished, or was damaged later, is noticed before anything is loaded.
"""

import json
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import yaml

from lpl_finetuning.errors import UserError, require
from lpl_finetuning.files import free_name, sha256_of, sync_to_disk
from lpl_finetuning.flags import recipe_text

CHECKPOINT = re.compile(r"checkpoint-(\d+)$")
MANIFEST = "manifest.json"
MANIFEST_FORMAT = 1
HASH_THREADS = 4  # sha256 runs without the interpreter's lock
RUN_MARK = "config.yaml"  # a folder that has it is one of a run
LEFT_BY_A_RUN = (
    "checkpoint-*", "damaged-checkpoint-*", "validation", "image_*.png", "run.png", "data_report.json", "README.md",
    "pytorch_lora_weights*.safetensors", "model.safetensors", "model_index.json",
    "unet", "transformer", "vae", "scheduler", "tokenizer", "tokenizer_[23]", "text_encoder", "text_encoder_[23]",
)  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Manifest: what makes a folder a checkpoint


class Damaged(ValueError):
    """What is wrong with a checkpoint's folder; names the file."""


def files_in(folder):
    """{path relative to `folder`, with slashes: path} of every file in it but the manifest, sorted."""
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(Path(folder).rglob("*")) if path.is_file()}
    paths.pop(MANIFEST, None)
    return paths


def write_manifest(folder, step):
    """Flush a finished folder to the disk and list its files in manifest.json, the last file to be written."""
    paths = files_in(folder)
    with ThreadPoolExecutor(HASH_THREADS) as pool:  # reads what is still in memory while the disk is written
        hashes = {name: pool.submit(sha256_of, path) for name, path in paths.items()}
        for path in Path(folder).rglob("*"):
            sync_to_disk(path)
    files = {name: {"sha256": hashes[name].result(), "size": path.stat().st_size} for name, path in paths.items()}
    manifest = {"format": MANIFEST_FORMAT, "step": step, "files": files}
    path = Path(folder) / MANIFEST
    path.write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    for written in (path, folder):
        sync_to_disk(written)


def read_manifest(folder):
    """{"format": 1, "step": N, "files": {name: {"sha256": hex, "size": bytes}}}. Raises Damaged."""
    try:
        manifest = json.loads((Path(folder) / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Damaged(f"{MANIFEST} is missing") from None
    except ValueError as error:
        raise Damaged(f"{MANIFEST} is not JSON ({error})") from None
    if not isinstance(manifest, dict) or manifest.get("format") != MANIFEST_FORMAT:
        raise Damaged(f"{MANIFEST} is not of format {MANIFEST_FORMAT}")
    step, files = manifest.get("step"), manifest.get("files")
    if type(step) is not int or not isinstance(files, dict):
        raise Damaged(f"{MANIFEST} lacks a step or its files")
    for name, entry in files.items():
        if not isinstance(entry, dict) or type(entry.get("size")) is not int or "sha256" not in entry:
            raise Damaged(f"{MANIFEST} lacks size or sha256 of {name}")
    return manifest


def check_sizes(folder, manifest):
    """That the files of a manifest are there with their sizes, without reading them. Raises Damaged."""
    paths = files_in(folder)
    for name, entry in manifest["files"].items():
        if name not in paths:
            raise Damaged(f"{name} is missing")
        if (size := paths[name].stat().st_size) != entry["size"]:
            raise Damaged(f"{name} has {size} bytes, its manifest says {entry['size']}")


def check_contents(folder, manifest):
    """That every file is the one of the manifest, and that there is no other. Reads all. Raises Damaged."""
    paths = files_in(folder)
    if extra := sorted(paths.keys() - manifest["files"].keys()):
        raise Damaged(f"{extra[0]} is not in its manifest")
    with ThreadPoolExecutor(HASH_THREADS) as pool:
        for name, found in zip(paths, pool.map(sha256_of, paths.values()), strict=True):
            if found != manifest["files"][name]["sha256"]:
                raise Damaged(f"{name} has another sha256 than its manifest says")
    step = json.loads(paths["training_state.json"].read_text())["step"] if "training_state.json" in paths else None
    if step != manifest["step"]:
        raise Damaged(f"{MANIFEST} says step {manifest['step']}, training_state.json {step}")


def verify_checkpoint(folder):
    """None for a checkpoint whose files are all as they were saved, else what is wrong, naming the file."""
    try:
        manifest = read_manifest(folder)
        check_sizes(folder, manifest)
        check_contents(folder, manifest)
    except (Damaged, OSError) as error:  # OSError: can't be read, or another rank is just setting it aside
        return str(error)
    return None


def is_complete(folder):
    """The cheap check: a manifest, and every file of it with the right size."""
    try:
        check_sizes(folder, read_manifest(folder))
    except (Damaged, OSError):
        return False
    return True


# ---------------------------------------------------------------------------------------------------------------------
# The folders of a run


def replaced_path(folder):
    """Where a checkpoint waits while a new one of the same step takes its name."""
    return folder.parent / f".old-{folder.name}"


def candidates(output_dir):
    """[(step, folder)] of all that may be a checkpoint, complete or not, oldest first.

    A run killed while it saved a step once more may leave that step in `.old-checkpoint-N`: it counts, and comes
    before a checkpoint-N.
    """
    output_dir, found = Path(output_dir), []
    for path in output_dir.iterdir() if output_dir.is_dir() else ():
        match = CHECKPOINT.match(path.name.removeprefix(".old-"))
        if match and path.is_dir():
            found.append((int(match[1]), not path.name.startswith(".old-"), path))
    return [(step, path) for step, _, path in sorted(found)]


def list_checkpoints(output_dir):
    """[(step, folder)] of the complete checkpoints of a run, one a step, oldest first; sizes are looked at only."""
    return sorted({step: folder for step, folder in candidates(output_dir) if is_complete(folder)}.items())


def remove_checkpoint(folder):
    """Delete a checkpoint so that a kill on the way leaves no half of one: under its name it is whole or gone."""
    doomed = folder.parent / f".tmp-{folder.name.removeprefix('.old-')}-removed"
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def set_damaged_aside(folder):
    """Rename a damaged checkpoint to damaged-checkpoint-N, so that it is neither resumed nor deleted; the new path."""
    place = free_name(folder.parent, f"damaged-{folder.name.removeprefix('.old-')}")
    os.replace(folder, place)
    return place


def remove_temporary(output_dir):
    """Delete what killed runs were writing or deleting."""
    for path in Path(output_dir).glob(".tmp-checkpoint-*"):
        shutil.rmtree(path, ignore_errors=True)


def tidy(output_dir):
    """Clean up after killed runs: delete what they were writing, give `.old-checkpoint-N` its name back if need be."""
    remove_temporary(output_dir)
    for _, folder in candidates(output_dir):
        if not folder.name.startswith(".old-"):
            continue
        final = folder.with_name(folder.name.removeprefix(".old-"))
        if final.is_dir() and verify_checkpoint(final) is None:
            remove_checkpoint(folder)
            continue
        if final.is_dir():
            set_damaged_aside(final)
        os.replace(folder, final)


def set_earlier_run_aside(output_dir, resume_from, logging_dir="logs"):
    """Move what an earlier run left in the output folder to `previous-1` and so on, so that it is not taken for ours.

    On a fresh start that is everything it wrote, logs and flags included; resuming, the checkpoints after the one
    resumed from, of which the damaged ones are renamed to damaged-checkpoint-N. Nothing is deleted but what killed
    runs were writing. A run that was refused or stopped before it had anything to show leaves nothing to be kept.
    For the main process alone. What the other ranks may be resuming from keeps its name.
    Returns the folder, or None when there was nothing to move.
    """
    output_dir = Path(output_dir)
    if resume_from is None:
        tidy(output_dir)
        old = [folder for _, folder in candidates(output_dir)]
        if (output_dir / RUN_MARK).is_file():
            old = left_by_a_run(output_dir, logging_dir)
    else:
        remove_temporary(output_dir)
        old = []
        for folder in newer_than(resume_from, output_dir):
            if verify_checkpoint(folder) is None:
                old.append(folder)
            else:
                set_damaged_aside(folder)
    if not old:
        return None
    number = 1
    while (place := output_dir / f"previous-{number}").exists():
        number += 1
    place.mkdir()
    for path in old:
        (place / path.relative_to(output_dir)).parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, place / path.relative_to(output_dir))
    return place


def left_by_a_run(output_dir, logging_dir):
    """What a run wrote into its folder, in the order to move it: the mark last, should the mover be killed."""
    logs = output_dir / logging_dir
    logs = [logs] if (logs / "metrics.jsonl").is_file() and logs.is_relative_to(output_dir) else []
    results = [path for pattern in LEFT_BY_A_RUN for path in sorted(output_dir.glob(pattern))]
    shown = any((path / "metrics.jsonl").stat().st_size for path in logs)
    begun = any(not (path / RUN_MARK).is_file() for path in output_dir.glob("previous-*"))  # to be moved, perhaps
    if not shown and not begun and all(path.name == "data_report.json" for path in results):
        return []
    return [*results, *logs, output_dir / RUN_MARK]


def newer_than(resume_from, output_dir):
    """The folders of `candidates` that come after the one resumed from, oldest first."""
    found = candidates(output_dir)
    folders = [folder for _, folder in found]
    if resume_from in folders:
        return folders[folders.index(resume_from) + 1 :]
    reached = read_manifest(resume_from)["step"]  # it lies elsewhere
    return [folder for step, folder in found if step > reached]


# ---------------------------------------------------------------------------------------------------------------------
# Which one a run goes on from


def check_resume(args):
    """Refuse early, from small files alone, what --resume_from_checkpoint can't go on from.

    `choose_checkpoint` verifies everything later. A newest checkpoint whose small files are damaged is left to it too:
    the one before may do.
    """
    wish = args.resume_from_checkpoint
    if not wish:
        return
    found = [folder for _, folder in candidates(args.output_dir)] if wish == "latest" else [named_folder(args)]
    if not found:
        return
    state = found[-1] / "training_state.json"
    try:
        whole = read_manifest(found[-1])["files"]["training_state.json"]["sha256"] == sha256_of(state)
    except (Damaged, OSError, KeyError):
        return
    if whole:
        check_identity(args, found[-1])


def choose_checkpoint(args):
    """The folder that the flags mean, verified, and of this run; or None. Raises UserError."""
    if not args.resume_from_checkpoint:
        return None
    if args.resume_from_checkpoint == "latest":
        folder = latest_checkpoint(args.output_dir)
    else:
        folder = verified_folder(args.resume_from_checkpoint, named_folder(args))
    if folder is not None:
        check_identity(args, folder)
    return folder


def check_identity(args, folder):
    """Refuse a checkpoint of another run."""
    found, wanted = json.loads((folder / "training_state.json").read_text())["identity"], run_identity(args)
    different = [
        f"{key} was {found.get(key)}, is {value}" for key, value in wanted.items() if differs(key, found, value)
    ]
    require(
        not different,
        f"--resume_from_checkpoint {args.resume_from_checkpoint}: {folder} is of another run "
        f"({', '.join(different)}); give its flags, or start without --resume_from_checkpoint",
    )


def differs(key, found, value):
    """Whether an entry of a checkpoint's identity tells that it is another run's."""
    if key == "base_weights":  # a name on the Hub and files can't be compared
        before = found.get(key) or ""
        return bool(value) and before.partition(":")[0] == value.partition(":")[0] and before != value
    return found.get(key) != value


def named_folder(args):
    """The folder that --resume_from_checkpoint names, whole or not. Raises UserError where none is."""
    name = args.resume_from_checkpoint
    # the diffusers scripts look for the name inside the output folder
    for folder in (Path(name), Path(args.output_dir) / Path(name).name):
        place = folder if folder.is_dir() else replaced_path(folder)
        if place.is_dir() and (CHECKPOINT.match(folder.name) or (place / MANIFEST).is_file()):
            return place
    raise UserError(
        f"--resume_from_checkpoint {name}: no checkpoint there, nor in {args.output_dir}; give a folder checkpoint-N, "
        "or latest"
    )


def verified_folder(name, folder):
    """The folder of --resume_from_checkpoint `name`. Raises UserError for a damaged one."""
    if (problem := verify_checkpoint(folder)) is not None:
        good, _ = newest_good(folder.parent)
        advice = f"; the newest good one is {good}" if good else ""
        raise UserError(
            f"--resume_from_checkpoint {name}: {folder} is damaged: {problem}{advice}. Nothing was deleted"
        )
    return folder


def newest_good(output_dir):
    """(the newest checkpoint that verifies or None, [(folder, what is wrong)] of the newer ones, newest first)."""
    damaged = []
    for _, folder in reversed(candidates(output_dir)):
        if (problem := verify_checkpoint(folder)) is None:
            return folder, damaged
        damaged.append((folder, problem))
    return None, damaged


def latest_checkpoint(output_dir):
    """The newest checkpoint that verifies, or None when there is none at all. Raises UserError if all are damaged."""
    good, damaged = newest_good(output_dir)
    if good is None and damaged:
        problems = "; ".join(f"{folder.name}: {problem}" for folder, problem in damaged)
        raise UserError(
            f"--resume_from_checkpoint latest: every checkpoint in {output_dir} is damaged ({problems}). Nothing was "
            "deleted; without the flag a run starts afresh and keeps them in a folder called previous-N"
        )
    if int(os.environ.get("RANK", "0")) == 0:
        for folder, problem in damaged:
            print(f"{folder.name} is damaged: {problem}; going back to {good.name}")
        if good is None:
            print(f"--resume_from_checkpoint latest: no checkpoint in {output_dir} yet, starting fresh")
    return good


def run_identity(args):
    """What must be the same for a checkpoint to be resumed."""
    names = ["use_lora", "seed", "use_ema", "optimizer", "use_8bit_adam", "timestep_sampling"]
    if args.use_lora:
        names += ["rank", "lora_alpha", "lora_layers", "use_dora", "train_text_encoder"]
    identity = {"recipe": args.base_model.family.title}
    if args.use_lora:  # it is worth nothing on other weights than those it is trained on
        identity["base_weights"] = args.base_model.weights
    return identity | {name: getattr(args, name) for name in names}


def changes_since(args, folder, images):
    """["resolution was 512, is 1024", ...]: flags and number of images that differ from those of a checkpoint's run.

    Of the files beside the checkpoint; [] where they are not there or can't be read.
    """
    try:
        before = yaml.safe_load((folder.parent / RUN_MARK).read_text(encoding="utf-8"))
        before["images"] = json.loads((folder.parent / "data_report.json").read_text(encoding="utf-8"))["images"]
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError):
        return []
    now = yaml.safe_load(recipe_text(args)) | {"images": images}
    return [f"{name} was {before[name]}, is {value}" for name, value in now.items()
            if name in before and before[name] != value and name != "output_dir"]  # fmt: skip
