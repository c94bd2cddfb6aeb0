"""The folders of checkpoints: which are complete, and which one a run resumes from. Nothing here imports torch.

`manifest.json` has the size and sha256 of every other file, and is written last. A checkpoint that was not finished,
or was damaged later, is therefore noticed before anything is loaded.

Names in --output_dir:

    checkpoint-N            a checkpoint after N optimizer steps
    .tmp-checkpoint-N       a checkpoint that is being written or deleted
    .old-checkpoint-N       a checkpoint-N until the new checkpoint-N is in place
    damaged-checkpoint-N    a damaged checkpoint, neither resumed from nor deleted
    previous-1, -2, …       what earlier runs left
"""

import contextlib
import glob
import json
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

import yaml

from lpl_finetuning.errors import UserError, require
from lpl_finetuning.files import free_name, sha256_of, sync_to_disk
from lpl_finetuning.flags import RECIPE_HEAD, recipe_text
from lpl_finetuning.sample_prompts import PROMPTS_FILE, entries_text

CHECKPOINT = re.compile(r"checkpoint-(\d+)$")
MANIFEST = "manifest.json"
MANIFEST_FORMAT = 1
HASH_THREADS = 4  # sha256 releases the interpreter's lock
RUN_MARK = "config.yaml"  # marks a folder as a run's
LEFT_BY_A_RUN = (
    "checkpoint-*", "damaged-checkpoint-*", "validation", "image_*.png", "run.png", "data_report.json", "README.md",
    PROMPTS_FILE,
    "pytorch_lora_weights*.safetensors", "model.safetensors", "model_index.json",
    "diffusion_pytorch_model.safetensors", "config.json",
    "unet", "transformer", "vae", "scheduler", "tokenizer", "tokenizer_[23]", "text_encoder", "text_encoder_[23]",
)  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Manifest: what makes a folder a checkpoint


class Damaged(ValueError):
    """A checkpoint's folder is damaged; the message names the file."""


def files_in(folder):
    """Return {path relative to `folder`, with slashes: path} of every file except the manifest, sorted."""
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(Path(folder).rglob("*")) if path.is_file()}
    paths.pop(MANIFEST, None)
    return paths


def write_manifest(folder, step, known=None):
    """Flush a finished folder to the disk and list its files in manifest.json, the last file written.

    Args:
        known: {path relative to `folder`: sha256} of files that were hashed while they were written.
    """
    paths = files_in(folder)
    with ThreadPoolExecutor(HASH_THREADS) as pool:  # hashes files from memory while the disk is written
        hashes = {name: pool.submit(sha256_of, path) for name, path in paths.items() if name not in (known or {})}
        for path in Path(folder).rglob("*"):
            sync_to_disk(path)
    hashes = (known or {}) | {name: found.result() for name, found in hashes.items()}
    files = {name: {"sha256": hashes[name], "size": path.stat().st_size} for name, path in paths.items()}
    manifest = {"format": MANIFEST_FORMAT, "step": step, "files": files}
    path = Path(folder) / MANIFEST
    path.write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    for written in (path, folder):
        sync_to_disk(written)


def read_manifest(folder):
    """Return {"format": 1, "step": N, "files": {name: {"sha256": hex, "size": bytes}}}.

    Raises:
        Damaged: the manifest is missing or malformed.
    """
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
    """Raise Damaged unless every file of the manifest is there with its size. Reads no file."""
    paths = files_in(folder)
    for name, entry in manifest["files"].items():
        if name not in paths:
            raise Damaged(f"{name} is missing")
        if (size := paths[name].stat().st_size) != entry["size"]:
            raise Damaged(f"{name} has {size} bytes, its manifest says {entry['size']}")


def check_contents(folder, manifest):
    """Raise Damaged unless every file has the manifest's sha256, and no other weights are there. Reads all files."""
    paths = files_in(folder)
    others = sorted(paths.keys() - manifest["files"].keys())
    if weights := [name for name in others if may_hold_weights(name)]:
        raise Damaged(f"{weights[0]} is not in its manifest")
    paths = {name: path for name, path in paths.items() if name not in others}
    with ThreadPoolExecutor(HASH_THREADS) as pool:
        for name, found in zip(paths, pool.map(sha256_of, paths.values()), strict=True):
            if found != manifest["files"][name]["sha256"]:
                raise Damaged(f"{name} has another sha256 than its manifest says")
    step = json.loads(paths["training_state.json"].read_text())["step"] if "training_state.json" in paths else None
    if step != manifest["step"]:
        raise Damaged(f"{MANIFEST} says step {manifest['step']}, training_state.json {step}")


def may_hold_weights(name):
    """Whether a loader would take a file, by its path in a checkpoint. File managers, Jupyter and network disks leave
    hidden files and folders anywhere, and people their notes and pictures."""
    path = PurePosixPath(name)
    hidden = any(part.startswith(".") for part in path.parts)
    return not hidden and path.suffix.lower() in (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl")


def verify_checkpoint(folder):
    """Return None for a checkpoint whose files are as they were saved, else what is wrong, naming the file."""
    try:
        manifest = read_manifest(folder)
        check_sizes(folder, manifest)
        check_contents(folder, manifest)
    except (Damaged, OSError) as error:  # OSError: unreadable, or being renamed by another rank
        return str(error)
    return None


def is_complete(folder):
    """Whether a checkpoint has a manifest and every file of the right size. Reads the manifest only."""
    try:
        check_sizes(folder, read_manifest(folder))
    except (Damaged, OSError):
        return False
    return True


# ---------------------------------------------------------------------------------------------------------------------
# The folders of a run


def replaced_path(folder):
    """Return the name that a checkpoint keeps while a new checkpoint of the same step takes its own."""
    return folder.parent / f".old-{folder.name}"


def candidates(output_dir):
    """Return [(step, folder)] of all checkpoints, complete or not, oldest first.

    A run that was killed while it saved a step again may leave `.old-checkpoint-N`. That folder is listed too, before
    checkpoint-N.
    """
    output_dir, found = Path(output_dir), []
    for path in output_dir.iterdir() if output_dir.is_dir() else ():
        match = CHECKPOINT.match(path.name.removeprefix(".old-"))
        if match and path.is_dir():
            found.append((int(match[1]), not path.name.startswith(".old-"), path))
    return [(step, path) for step, _, path in sorted(found)]


def list_checkpoints(output_dir):
    """Return [(step, folder)] of a run's complete checkpoints, one per step, oldest first; checks sizes only."""
    return sorted({step: folder for step, folder in candidates(output_dir) if is_complete(folder)}.items())


def remove_checkpoint(folder):
    """Delete a checkpoint. Under its own name it is complete or gone, even if the process is killed meanwhile."""
    doomed = folder.parent / f".tmp-{folder.name.removeprefix('.old-')}-removed"
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def set_damaged_aside(folder):
    """Rename a damaged checkpoint to damaged-checkpoint-N; return the new path."""
    place = free_name(folder.parent, f"damaged-{folder.name.removeprefix('.old-')}")
    os.replace(folder, place)
    return place


def remove_temporary(output_dir):
    """Delete the folders that killed runs were writing or deleting."""
    for path in Path(output_dir).glob(".tmp-checkpoint-*"):
        shutil.rmtree(path, ignore_errors=True)


def tidy(output_dir):
    """Clean up after killed runs: delete unfinished folders; restore `.old-checkpoint-N` if need be."""
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
    """Move what an earlier run left in the output folder to previous-1, previous-2, …; only rank 0 calls it.

    On a fresh start, that is everything the earlier run wrote, logs and flags included, unless it had stopped before
    it wrote any result. On resuming, that is the checkpoints after the one resumed from, of which damaged ones are
    renamed to damaged-checkpoint-N instead. Checkpoints that other ranks may resume from keep their names. Nothing is
    deleted but unfinished folders of killed runs.

    Args:
        resume_from: folder of the checkpoint resumed from, or None.
        logging_dir: folder of the logs, relative to `output_dir`.

    Returns:
        The folder previous-N, or None when there was nothing to move.
    """
    output_dir = Path(output_dir)
    if resume_from is None:
        tidy(output_dir)
        old = [folder for _, folder in candidates(output_dir)]
        if is_run_recipe(output_dir / RUN_MARK):
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
    """Return the paths that a run wrote, in the order to move them; `RUN_MARK` last, in case the mover is killed."""
    patterns = [
        *LEFT_BY_A_RUN,
        *([f"{glob.escape(name)}.safetensors"] if (name := output_name_of(output_dir)) else []),
    ]
    logs = output_dir / logging_dir
    logs = [logs] if (logs / "metrics.jsonl").is_file() and logs.is_relative_to(output_dir) else []
    results = [path for pattern in patterns for path in sorted(output_dir.glob(pattern))]
    logged = any((path / "metrics.jsonl").stat().st_size for path in logs)
    # a previous-N without the mark: a move that was killed may have moved the results already
    half_moved = any(not (path / RUN_MARK).is_file() for path in output_dir.glob("previous-*"))
    if not logged and not half_moved and all(path.name == "data_report.json" for path in results):
        return []
    return [*results, *logs, output_dir / RUN_MARK]


def is_run_recipe(path):
    """Whether a file holds the flags of a run, as a run writes them, and not a person's own recipe."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        if not text or text.startswith(RECIPE_HEAD):  # empty: of a run that was killed
            return True
        values = yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError):
        return False
    bare = not any(line.startswith("#") for line in text.splitlines())  # as earlier versions wrote them
    return bare and isinstance(values, dict) and {"output_dir", "seed", "max_train_steps", "dry_run"} <= values.keys()


def keep_own_recipe(output_dir):
    """Rename a `config.yaml` that no run has written, for the run's own; returns the new path, None where none is."""
    path = Path(output_dir) / RUN_MARK
    if not path.exists() or is_run_recipe(path):
        return None
    kept = free_name(output_dir, f"{RUN_MARK}.yours")
    os.replace(path, kept)
    return kept


def output_name_of(output_dir):
    """The --output_name of the run in a folder, from its flags; None where it has none."""
    try:
        name = yaml.safe_load((Path(output_dir) / RUN_MARK).read_text(encoding="utf-8")).get("output_name")
    except (OSError, ValueError, AttributeError, yaml.YAMLError):
        return None
    return name if isinstance(name, str) and name and Path(name).name == name else None


def images_seen(folder, batch_size):
    """How many images a checkpoint's run had seen, repetitions included; earlier versions did not write it, and are
    taken to have had steps of `batch_size` images, as the run that resumes."""
    info = json.loads((Path(folder) / "training_state.json").read_text())
    return info.get("images_seen", info["step"] * batch_size)


def newer_than(resume_from, output_dir):
    """Return the folders of `candidates` after the checkpoint resumed from, oldest first."""
    found = candidates(output_dir)
    folders = [folder for _, folder in found]
    if resume_from in folders:
        return folders[folders.index(resume_from) + 1 :]
    first_step = read_manifest(resume_from)["step"]  # the checkpoint lies in another folder
    return [folder for step, folder in found if step > first_step]


# ---------------------------------------------------------------------------------------------------------------------
# The checkpoint that a run resumes from


def check_resume(args):
    """Raise UserError early, from small files alone, if --resume_from_checkpoint names a checkpoint of another run.

    `choose_checkpoint` verifies all files later. If the small files are damaged it decides, as with `latest` an older
    checkpoint may be sound.
    """
    name = args.resume_from_checkpoint
    if not name:
        return
    found = [folder for _, folder in candidates(args.output_dir)] if name == "latest" else [named_folder(args)]
    if not found:
        return
    state = found[-1] / "training_state.json"
    try:
        is_sound = read_manifest(found[-1])["files"]["training_state.json"]["sha256"] == sha256_of(state)
    except (Damaged, OSError, KeyError):
        return
    if is_sound:
        check_identity(args, found[-1])


def choose_checkpoint(args):
    """Return the folder of --resume_from_checkpoint, verified and of this run; None for a fresh start.

    Raises:
        UserError: there is no such checkpoint, it is damaged, or it belongs to another run.
    """
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
    """Raise UserError if a checkpoint belongs to another run."""
    found, wanted = json.loads((folder / "training_state.json").read_text())["identity"], run_identity(args)
    different = [
        f"{key} was {found.get(key)}, is {value}" for key, value in wanted.items() if differs(key, found, value)
    ]
    require(
        not different,
        f"--resume_from_checkpoint {args.resume_from_checkpoint}: {folder} is of another run "
        f"({', '.join(different)}); give its flags, or start without --resume_from_checkpoint",
    )


NEWER_FLAGS = {  # flags that older checkpoints do not have -> what their runs did
    "lora_blocks": None, "lora_pattern": None, "lora_type": "lora", "lokr_factor": -1,
}  # fmt: skip


def differs(key, found, value):
    """Whether an entry of a checkpoint's identity shows that it belongs to another run."""
    if key == "base_weights":  # weights on the Hub and weights in a folder can't be compared
        before = found.get(key) or ""
        return bool(value) and before.partition(":")[0] == value.partition(":")[0] and before != value
    return found.get(key, NEWER_FLAGS.get(key)) != value


def named_folder(args):
    """Return the folder that --resume_from_checkpoint names, damaged or not; raise UserError if there is none."""
    name = args.resume_from_checkpoint
    # the diffusers scripts look for the name inside the output folder
    for folder in (Path(name), Path(args.output_dir) / Path(name).name):
        place = folder if folder.is_dir() else replaced_path(folder)
        if place.is_dir() and (CHECKPOINT.match(folder.name) or (place / MANIFEST).is_file()):
            return place
    within = candidates(name)
    advice = f"give {within[-1][1]}, which is in it" if within else "give a folder checkpoint-N, or latest"
    what = "is no checkpoint itself" if Path(name).is_dir() else f"no checkpoint there, nor in {args.output_dir}"
    raise UserError(f"--resume_from_checkpoint {name}: {what}; {advice}")


def verified_folder(name, folder):
    """Return `folder`, which --resume_from_checkpoint `name` names; raise UserError if it is damaged."""
    if (problem := verify_checkpoint(folder)) is not None:
        good, _ = newest_good(folder.parent)
        advice = f"; the newest good one is {good}" if good else ""
        raise UserError(
            f"--resume_from_checkpoint {name}: {folder} is damaged: {problem}{advice}. Nothing was deleted"
        )
    return folder


def newest_good(output_dir):
    """Return (newest sound checkpoint or None, [(folder, what is wrong)] of newer checkpoints, newest first)."""
    damaged = []
    for _, folder in reversed(candidates(output_dir)):
        if (problem := verify_checkpoint(folder)) is None:
            return folder, damaged
        damaged.append((folder, problem))
    return None, damaged


def latest_checkpoint(output_dir):
    """Return the newest sound checkpoint, or None if there is no checkpoint; raise UserError if all are damaged."""
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
    """Return the entries that must be equal for a run to resume from a checkpoint."""
    names = ["use_lora", "seed", "use_ema", "optimizer", "use_8bit_adam", "timestep_sampling"]
    names += args.base_model.family.fixed_flags
    if args.use_lora:
        names += ["rank", "lora_alpha", "lora_layers", "use_dora", "train_text_encoder"]
        names += [name for name in NEWER_FLAGS if name != "lora_type"]
    identity = {"recipe": args.base_model.family.title}
    if args.use_lora:  # a LoRA only fits the weights that it is trained on
        identity["base_weights"] = args.base_model.weights
    if args.use_lora:
        identity["lora_type"] = "lora" if args.use_dora else args.lora_type  # use_dora is an entry of its own
    return identity | {name: getattr(args, name) for name in names}


def changes_since(args, folder, images):
    """Return ["resolution was 512, is 1024", …]: flags and number of images that differ from the checkpoint's run.

    Compares with the files beside the checkpoint; returns [] if they are missing or unreadable.
    """
    try:
        before = yaml.safe_load((folder.parent / RUN_MARK).read_text(encoding="utf-8"))
        before["images"] = json.loads((folder.parent / "data_report.json").read_text(encoding="utf-8"))["images"]
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError):
        return []
    now = yaml.safe_load(recipe_text(args)) | {"images": images}
    changes = [f"{name} was {before[name]}, is {value}" for name, value in now.items()
               if name in before and before[name] != value and name != "output_dir"
               and (name, before[name]) != ("lpl_norm_gradient", None)]  # a run without the loss  # fmt: skip
    with contextlib.suppress(OSError, ValueError):
        if args.prompts and (folder.parent / PROMPTS_FILE).read_text(encoding="utf-8") != entries_text(args.prompts):
            changes.append("validation_prompts_file has other entries")
    return changes
