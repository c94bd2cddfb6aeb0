"""Checkpoints: the state of a run in safetensors and JSON, never pickle.

A checkpoint is written to `.tmp-checkpoint-N`; `manifest.json`, with the size and sha256 of every other file, comes
last; then the folder is renamed to `checkpoint-N`, and only then is the oldest deleted. So whatever moment a run is
killed at, the checkpoint before is whole, and one that was damaged later is noticed before anything is loaded.
"""

import contextlib
import errno
import hashlib
import json
import os
import platform
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from cli_utils import UserError
from shard_utils import distributed_like, from_all_ranks, from_first_rank, gather, is_part, local_part, sharded_like
from store_utils import sync_to_disk

CHECKPOINT = re.compile(r"checkpoint-(\d+)$")
MANIFEST = "manifest.json"
MANIFEST_FORMAT = 1
HASH_THREADS = 4  # sha256 runs without the interpreter's lock, about 0.4 to 2 GB/s a thread
SETTINGS = ("initial_lr", "weight_decay", "betas", "eps")  # of an optimizer: a resumed run may change them
OLD_RESULTS = ("checkpoint-*", "damaged-checkpoint-*", "validation", "image_*.png",
               "pytorch_lora_weights*.safetensors", "model.safetensors", "model_index.json", "README.md",
               "run.png")  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Manifest: what makes a folder a checkpoint


class Damaged(ValueError):
    """What is wrong with a checkpoint's folder; names the file."""


def sha256_of(path):
    """Hex digest of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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


def old_place(folder):
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


def remove(folder):
    """Delete a checkpoint so that a kill on the way leaves no half of one: under its name it is whole or gone."""
    doomed = folder.parent / f".tmp-{folder.name.removeprefix('.old-')}-removed"
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def free_name(output_dir, name):
    """The path `name`, or `name-2`, `name-3` and so on when that is taken."""
    path, number = Path(output_dir) / name, 1
    while path.exists():
        number += 1
        path = Path(output_dir) / f"{name}-{number}"
    return path


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
            remove(folder)
            continue
        if final.is_dir():
            set_damaged_aside(final)
        os.replace(folder, final)


def set_aside(output_dir, resume_from):
    """Move what an earlier run left in the output folder to `previous-1` and so on, so that it is not taken for ours.

    On a fresh start these are its results and checkpoints; resuming, the checkpoints after the one resumed from, of
    which the damaged ones are renamed to damaged-checkpoint-N. Nothing is deleted but what killed runs were writing.
    For the main process alone. What the other ranks may be resuming from keeps its name.
    Returns the folder, or None when there was nothing to move.
    """
    output_dir = Path(output_dir)
    if resume_from is None:
        tidy(output_dir)
        old = [folder for _, folder in candidates(output_dir)]
        if (output_dir / "config.yaml").is_file():  # the mark of an earlier run
            old = [path for pattern in OLD_RESULTS for path in output_dir.glob(pattern)]
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
        os.replace(path, place / path.name)
    return place


def newer_than(resume_from, output_dir):
    """The folders of `candidates` that come after the one resumed from, oldest first."""
    found = candidates(output_dir)
    folders = [folder for _, folder in found]
    if resume_from in folders:
        return folders[folders.index(resume_from) + 1 :]
    reached = read_manifest(resume_from)["step"]  # it lies elsewhere
    return [folder for step, folder in found if step > reached]


# ---------------------------------------------------------------------------------------------------------------------
# Saving


class CheckpointClock:
    """When a checkpoint is due: every `steps` steps, or once `minutes` (None: never) went by since the last.

    Ranks count the same steps, but not the same minutes: there the main process decides. now: counts seconds.
    """

    def __init__(self, steps, minutes=None, now=time.monotonic):
        self.steps, self.minutes, self.now = steps, minutes, now
        self.last = now()

    def due(self, step):
        """Whether `step` optimizer steps are a multiple of `steps`."""
        return step % self.steps == 0

    def late(self):
        """Whether the minutes have gone by."""
        return self.minutes is not None and self.now() - self.last >= 60 * self.minutes

    def saved(self):
        """A checkpoint was written: count the minutes from here."""
        self.last = self.now()


def checkpoint_bytes(state, parameters=()):
    """Bytes of the tensors in a checkpoint: those of `state`, a TrainingState, and the trained `parameters`.

    An optimizer has no state before its first step, so ask after it.
    """

    def size(value):
        if isinstance(value, torch.Tensor):
            return value.numel() * value.element_size()
        if isinstance(value, dict):
            return sum(map(size, value.values()))
        return sum(map(size, value)) if isinstance(value, (list, tuple)) else 0

    averaged = parameters_of(state.optimizer) if state.ema is not None else []
    means = state.auto_weight.state_dict() if state.auto_weight is not None else {}
    return sum(map(size, [state.optimizer.state_dict()["state"], averaged, means, list(parameters)]))


def bytes_needed(output_dir, state):
    """About the size of the next checkpoint: the last one's, or the tensors' when there is none."""
    if found := list_checkpoints(output_dir):
        return sum(entry["size"] for entry in read_manifest(found[-1][1])["files"].values())
    return checkpoint_bytes(state, parameters_of(state.optimizer))


def check_free_space(output_dir, needed):
    """Raise UserError when fewer than `needed` bytes are free where a checkpoint is to be written."""
    free = shutil.disk_usage(output_dir).free
    if free < needed:
        raise UserError(
            f"--output_dir {output_dir}: a checkpoint needs {megabytes(needed)}, only {megabytes(free)} are free. "
            f"Nothing was written{last_one(output_dir)}. Free some space, keep fewer checkpoints with "
            "--checkpoints_total_limit, or choose another --output_dir"
        )


def megabytes(count):
    """Bytes, for people."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def last_one(output_dir):
    """The part of a message that says what is still there."""
    found = list_checkpoints(output_dir)
    return f" and {found[-1][1].name} is intact" if found else ""


def write_error(error, final):
    """The UserError for a failed write of a checkpoint, or None when the error is no failed write."""
    code = error.errno if isinstance(error, OSError) else None
    if isinstance(error, SafetensorError) and (match := re.search(r"os error (\d+)", str(error))):
        code = int(match[1])  # safetensors has an error of its own for them
    elif not isinstance(error, OSError):
        return None
    full = code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    advice = ". Free some space, keep fewer checkpoints with --checkpoints_total_limit, or choose another --output_dir"
    kept = f"the unfinished folder was removed{last_one(final.parent)}"
    if full:
        return UserError(f"disk full while saving {final} ({error}): {kept}{advice}")
    return UserError(f"can't save {final} ({error}): {kept}")


def save_checkpoint(output_dir, step, state, save_model, limit=None, is_main=True):
    """Write checkpoint-`step`, and only then remove the oldest beyond `limit`. Returns its folder.

    state: a TrainingState; save_model: called with the folder, writes the trained weights in their usual layout;
    is_main: the other ranks only give their parts of what is sharded.
    Raises UserError when the disk is too small or a write fails: then the last checkpoint is as it was.
    """
    collected = state.collect(is_main)
    if not is_main:
        return None
    output_dir = Path(output_dir)
    final, temporary = output_dir / f"checkpoint-{step}", output_dir / f".tmp-checkpoint-{step}"
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        tidy(output_dir)
        check_free_space(output_dir, bytes_needed(output_dir, state))
        temporary.mkdir()
        save_model(temporary)
        state.save(temporary, step, collected)
        write_manifest(temporary, step)
        put_in_place(temporary, final)
    except BaseException as error:  # Ctrl-C too leaves no half
        with contextlib.suppress(OSError):
            tidy(output_dir)
        if (clear := write_error(error, final)) is not None:
            raise clear from error
        raise
    prune(output_dir, final, limit)
    return final


def put_in_place(temporary, final):
    """Give a finished folder its name. One of that name stays, as `old_place`, until the new one has it."""
    if final.exists() and not is_complete(final):
        set_damaged_aside(final)
    if final.exists():
        os.replace(final, old_place(final))
    os.replace(temporary, final)
    sync_to_disk(final.parent)
    if old_place(final).exists():
        remove(old_place(final))


def prune(output_dir, newest, limit):
    """Delete the oldest checkpoints beyond `limit` (None: keep all), never the one just written."""
    others = [folder for _, folder in list_checkpoints(output_dir) if folder != newest]
    for folder in others[: max(0, len(others) + 1 - limit)] if limit else []:
        remove(folder)


# ---------------------------------------------------------------------------------------------------------------------
# The state of a run


def parameters_of(optimizer):
    """All parameters, in the order of its state."""
    return [value for group in optimizer.param_groups for value in group["params"]]


def optimizer_to_tensors(optimizer):
    """An optimizer's state as (tensors by path, JSON-able rest); bitsandbytes nests its entries in dictionaries."""
    state = optimizer.state_dict()
    tensors, rest, storages = {}, {"param_groups": state["param_groups"], "values": {}}, set()

    def flatten(path, value):
        if isinstance(value, dict):
            for name, entry in value.items():
                flatten(f"{path}/{name}", entry)
        elif isinstance(value, torch.Tensor):
            tensors[path] = value if is_part(value) else apart(value, storages)
        else:
            rest["values"][path] = value

    for index, entries in state["state"].items():
        flatten(str(index), entries)
    return tensors, rest


def apart(tensor, storages):
    """A contiguous tensor that shares no memory with those seen before, which safetensors would refuse."""
    storage = tensor.untyped_storage().data_ptr()
    if storage in storages:
        return tensor.clone()
    storages.add(storage)
    return tensor.contiguous()


def load_optimizer(optimizer, tensors, rest):
    """Put back what `optimizer_to_tensors` took, made whole; each rank keeps its part where that is sharded."""
    parameters, state = parameters_of(optimizer), {}
    for path, value in {**tensors, **rest["values"]}.items():
        index, *names, last = path.split("/")
        entries = state.setdefault(int(index), {})
        for name in names:
            entries = entries.setdefault(name, {})
        entries[last] = distributed_like(value, parameters[int(index)])
    optimizer.load_state_dict({"state": state, "param_groups": rest["param_groups"]})


class TrainingState:
    """All of a run that is not weights: optimizer, LR schedule, scaler, EMA, LPL's running means, position.

    Noise, timesteps and data order follow from the seed and the step, so no generator has a state to save.
    """

    def __init__(self, optimizer, lr_scheduler, scaler=None, ema=None, auto_weight=None, identity=None):
        self.optimizer, self.lr_scheduler, self.scaler = optimizer, lr_scheduler, scaler
        self.ema, self.auto_weight, self.identity = ema, auto_weight, identity or {}

    def collect(self, keep):
        """(all tensors by name, what else the optimizer has), whole; ranks that don't `keep` them give their parts."""
        tensors, rest = optimizer_to_tensors(self.optimizer)
        tensors = {f"optimizer/{name}": value for name, value in tensors.items()}
        if self.ema is not None:
            pairs = zip(self.ema.shadow_params, parameters_of(self.optimizer), strict=True)
            tensors |= {f"ema/{index}": sharded_like(*pair).contiguous() for index, pair in enumerate(pairs)}
        if self.auto_weight is not None:
            tensors |= {f"auto_weight/{name}": value for name, value in self.auto_weight.state_dict().items()}
        return gather(tensors, keep), rest

    def save(self, folder, step, collected):
        """Write training_state.safetensors and training_state.json into a folder. collected: by `collect`."""
        tensors, rest = collected
        schedule = {name: value for name, value in self.lr_scheduler.state_dict().items() if is_plain(value)}
        info = {
            "step": step,
            "optimizer": rest,
            "lr_scheduler": schedule,
            "scaler": self.scaler.state_dict() if self.scaler else None,
            "ema_step": self.ema.optimization_step if self.ema is not None else None,
            "identity": self.identity,
        }
        save_file(tensors, Path(folder) / "training_state.safetensors")
        (Path(folder) / "training_state.json").write_text(json.dumps(info, indent=1))

    def load(self, folder):
        """Restore from a checkpoint's folder; returns its step."""
        info = json.loads((Path(folder) / "training_state.json").read_text())
        tensors = load_file(Path(folder) / "training_state.safetensors")
        part = {}
        for name, value in tensors.items():
            kind, rest = name.split("/", 1)
            part.setdefault(kind, {})[rest] = value
        settings = [{key: group[key] for key in SETTINGS if key in group} for group in self.optimizer.param_groups]
        load_optimizer(self.optimizer, part.get("optimizer", {}), info["optimizer"])
        self.lr_scheduler.load_state_dict(info["lr_scheduler"])
        self._take_settings(settings)
        if self.scaler and info["scaler"]:
            self.scaler.load_state_dict(info["scaler"])
        if self.ema is not None:
            pairs = zip(self.ema.shadow_params, parameters_of(self.optimizer), strict=True)
            for index, (shadow, parameter) in enumerate(pairs):
                shadow.copy_(local_part(distributed_like(part["ema"][str(index)], parameter)))
            self.ema.optimization_step = info["ema_step"]
        if self.auto_weight is not None and "auto_weight" in part:
            self.auto_weight.load_state_dict(part["auto_weight"])
        return info["step"]

    def _take_settings(self, settings):
        """What the flags say now counts, not what they said when the checkpoint was written."""
        for index, (group, now) in enumerate(zip(self.optimizer.param_groups, settings, strict=True)):
            for key, value in now.items():
                before = tuple(group[key]) if isinstance(group[key], list) else group[key]
                if before != value:
                    print(f"{key} was {before} in the checkpoint, is {value} from now on")
                    group[key] = value
            rate = now["initial_lr"] * self.lr_scheduler.lr_lambdas[index](self.lr_scheduler.last_epoch)
            if self.lr_scheduler.base_lrs[index] != now["initial_lr"]:
                self.lr_scheduler.base_lrs[index], group["lr"] = now["initial_lr"], rate


def is_plain(value):
    """Whether JSON can hold it."""
    if isinstance(value, (list, tuple)):
        return all(is_plain(item) for item in value)
    return isinstance(value, (int, float, str, bool, type(None)))


# ---------------------------------------------------------------------------------------------------------------------
# Resuming


def checkpoint_to_resume(args, accelerator=None):
    """The folder to resume from, or None for a fresh start. Raises UserError for a damaged one or another run's.

    Nothing is changed. The first rank alone reads the files and decides for all; the others look whether they have the
    same folder, which those of another machine may not, and if one has not, all of them raise UserError.
    """
    if accelerator is None or accelerator.num_processes == 1:
        return choose_checkpoint(args)
    decision, problem = {}, None
    if accelerator.is_main_process:
        try:
            folder = choose_checkpoint(args)
            decision = {"folder": str(folder), "manifest": sha256_of(folder / MANIFEST)} if folder else {}
        except UserError as error:
            decision = {"error": str(error)}
    decision = from_first_rank(decision, accelerator)
    if "error" in decision:
        raise UserError(decision["error"])
    if not decision:
        return None
    folder = Path(decision["folder"])
    if not accelerator.is_main_process:
        problem = what_differs(folder, decision["manifest"])
    problems = [f"{name}: {said}" for name, said in from_all_ranks([platform.node(), problem], accelerator) if said]
    if problems:
        raise UserError(
            f"--resume_from_checkpoint {args.resume_from_checkpoint}: the first rank goes on from {folder}, but not "
            f"all machines have it ({'; '.join(dict.fromkeys(problems))}). --output_dir must lie on a disk that all "
            "of them share, or the folder be copied to each"
        )
    return folder


def what_differs(folder, manifest):
    """None where a folder holds the checkpoint with this sha256 of its manifest, by the files' sizes, else why not."""
    try:
        if not folder.is_dir():
            raise Damaged(f"there is no {folder}")
        check_sizes(folder, read_manifest(folder))
        if sha256_of(folder / MANIFEST) != manifest:
            raise Damaged(f"{folder} is another checkpoint")
    except (Damaged, OSError) as error:
        return str(error)
    return None


def choose_checkpoint(args):
    """The folder that the flags mean, verified, and of this run; or None. Raises UserError."""
    folder = find_checkpoint(args.resume_from_checkpoint, args.output_dir)
    if folder is not None:
        found, wanted = json.loads((folder / "training_state.json").read_text())["identity"], run_identity(args)
        different = [
            f"{key} was {found.get(key)}, is {value}" for key, value in wanted.items() if found.get(key) != value
        ]
        if different:
            flag = f"--resume_from_checkpoint {args.resume_from_checkpoint}"
            raise UserError(
                f"{flag}: {folder} is of another run ({', '.join(different)}); give its flags, or start without "
                "--resume_from_checkpoint"
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


def find_checkpoint(resume_from_checkpoint, output_dir):
    """The folder that --resume_from_checkpoint means, verified, or None. Raises UserError."""
    if not resume_from_checkpoint:
        return None
    if resume_from_checkpoint == "latest":
        return latest_checkpoint(output_dir)
    flag = f"--resume_from_checkpoint {resume_from_checkpoint}"
    # the diffusers scripts look for the name inside the output folder
    for folder in (Path(resume_from_checkpoint), Path(output_dir) / Path(resume_from_checkpoint).name):
        place = folder if folder.is_dir() else old_place(folder)
        if not place.is_dir() or not (CHECKPOINT.match(folder.name) or (place / MANIFEST).is_file()):
            continue
        if (problem := verify_checkpoint(place)) is not None:
            good, _ = newest_good(place.parent)
            advice = f"; the newest good one is {good}" if good else ""
            raise UserError(f"{flag}: {place} is damaged: {problem}{advice}. Nothing was deleted")
        return place
    raise UserError(f"{flag}: no checkpoint there, nor in {output_dir}; give a folder checkpoint-N, or latest")


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
    return {name: getattr(args, name) for name in names}
