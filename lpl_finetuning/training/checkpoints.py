"""Checkpoints: the state of a run in safetensors and JSON, never pickle.

A checkpoint is written to `.tmp-checkpoint-N`, its manifest last; then the folder is renamed to `checkpoint-N`, and
only then is the oldest deleted. A run may be killed at any moment: the checkpoint before is whole.
`training.checkpoint_folders` says what makes a folder a checkpoint.
"""

import contextlib
import errno
import json
import os
import platform
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from lpl_finetuning.errors import UserError, during, require
from lpl_finetuning.files import follow_umask, format_bytes, sha256_of, sync_to_disk
from lpl_finetuning.flags import settings_from_flags, step_images
from lpl_finetuning.tensor_files import write_tensors
from lpl_finetuning.training.checkpoint_folders import (
    MANIFEST,
    Damaged,
    check_sizes,
    choose_checkpoint,
    images_seen,
    is_complete,
    list_checkpoints,
    read_manifest,
    remove_checkpoint,
    replaced_path,
    run_identity,
    set_damaged_aside,
    tidy,
    write_manifest,
)
from lpl_finetuning.training.sharding import (
    from_all_ranks,
    from_local_shard,
    from_rank_0,
    full_bytes,
    full_tensors,
    is_sharded,
    is_sharded_tensor,
    local_shard,
    shard_like,
    with_full_weights,
)

SETTINGS = ("initial_lr", "weight_decay", "betas", "eps")  # entries of an optimizer's groups that flags may change


# ---------------------------------------------------------------------------------------------------------------------
# When and what


class CheckpointClock:
    """When a checkpoint is due: every `steps` steps, or once `minutes` (None: never) have gone by since the last.

    Ranks count the same steps, but not the same minutes: rank 0 decides about minutes. now: counts seconds.
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


@dataclass(frozen=True)
class CheckpointSettings:
    """The flags about checkpoints; each field has the name of its flag."""

    output_dir: str
    checkpointing_steps: int
    checkpointing_minutes: float | None
    checkpoints_total_limit: int | None


class Checkpoints:
    """The checkpoints of a run: resumes from one, knows when one is due, writes them.

    Rank 0 writes. Where the model is sharded, every rank gives its parts.
    """

    def __init__(self, args, accelerator, trainee, objective, signals, save_weights, load_weights, save_more=None):
        """
        Args:
            trainee: the `Trainee`; objective: the `Objective`; signals: the `StopSignals`.
            save_weights, load_weights: functions (folder, denoiser) for the trained weights in their usual layout.
            save_more: function (folder, denoiser, step) that writes the averaged weights in another layout too, which
                is not read; None for none. The model must not be sharded.
        """
        self.settings = settings_from_flags(CheckpointSettings, args)
        self.accelerator, self.trainee, self.signals = accelerator, trainee, signals
        self.save_weights, self.load_weights, self.save_more = save_weights, load_weights, save_more
        self.sharded = is_sharded(accelerator)
        self.writes_here = accelerator.is_main_process or self.sharded
        auto_weight = objective.perceptual.auto_weight if objective.perceptual is not None else None
        self.state = TrainingState(
            trainee.optimizer,
            trainee.lr_scheduler,
            accelerator.scaler,
            trainee.ema,
            auto_weight,
            run_identity(args),
            step_images(args, accelerator.num_processes),
        )
        self.clock = CheckpointClock(self.settings.checkpointing_steps, self.settings.checkpointing_minutes)

    def resume(self, folder, total_steps):
        """Load a checkpoint (None: a fresh start); returns the steps it has made. All ranks call it."""
        if folder is None:
            return 0
        self.load_weights(folder, self.trainee.bare)
        step = self.state.load(folder)
        self.accelerator.print(f"Resumed from {folder} at step {step}")
        if step >= total_steps:
            self.accelerator.print(f"Its {total_steps} steps are made already: saving the result once more")
        return step

    def late(self):
        """Whether this rank wants a checkpoint because --checkpointing_minutes have gone by."""
        return self.accelerator.is_main_process and self.clock.late()

    def due(self, step, outcome, total_steps):
        """Whether a checkpoint is to be written after step `step`, from 1, with its `Outcome`."""
        stopped_early = outcome.stop and step < total_steps
        return outcome.save or self.clock.due(step) or stopped_early

    def save(self, step):
        """Write checkpoint-`step`. All ranks call it; rank 0 writes."""
        with self.signals.between_steps():
            if self.writes_here:
                self._write(step)
        self.clock.saved()

    def kept_if_unwritten(self, step):
        """Context manager for writing the result: where that fails, the steps are in a checkpoint at least."""
        return kept_if_unwritten(None if self.sharded else lambda: self._write(step))

    @during("saving a checkpoint")
    def _write(self, step):
        whole = with_full_weights(self.trainee.bare, self.accelerator.is_main_process)

        def save_model(folder):
            hashes = self.save_weights(folder, whole)
            if self.save_more is not None:
                with self.trainee.averaged():
                    self.save_more(folder, whole, step)
            return hashes

        save_checkpoint(
            self.settings.output_dir, step, self.state, save_model, self.settings.checkpoints_total_limit,
            self.accelerator.is_main_process,
        )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Saving


def checkpoint_bytes(state, parameters=()):
    """Bytes of the tensors in a checkpoint: those of `state`, a `TrainingState`, and the trained `parameters`.

    An optimizer has no state before its first step: the sum is too small until then.
    """

    def size(value):
        if isinstance(value, torch.Tensor) or is_sharded_tensor(value):
            return full_bytes(value)
        if isinstance(value, dict):
            return sum(map(size, value.values()))
        return sum(map(size, value)) if isinstance(value, (list, tuple)) else 0

    averaged = parameters_of(state.optimizer) if state.ema is not None else []
    means = state.auto_weight.state_dict() if state.auto_weight is not None else {}
    return sum(map(size, [state.optimizer.state_dict()["state"], averaged, means, list(parameters)]))


def bytes_needed(output_dir, state):
    """Estimated bytes of the next checkpoint: the size of the last checkpoint, or of the tensors for the first."""
    if found := list_checkpoints(output_dir):
        return sum(entry["size"] for entry in read_manifest(found[-1][1])["files"].values())
    return checkpoint_bytes(state, parameters_of(state.optimizer))


def check_room(output_dir, needed):
    """Raise UserError where fewer than `needed` bytes are free in --output_dir."""
    free = shutil.disk_usage(output_dir).free
    if free < needed:
        raise UserError(
            f"--output_dir {output_dir}: a checkpoint needs {format_bytes(needed)}, only {format_bytes(free)} are "
            f"free. Nothing was written{last_one(output_dir)}. Free some space, keep fewer checkpoints with "
            "--checkpoints_total_limit, or choose another --output_dir"
        )


def last_one(output_dir):
    """The part of a message that names the last valid checkpoint; empty where there is none."""
    found = list_checkpoints(output_dir)
    return f" and {found[-1][1].name} is intact" if found else ""


FULL = (errno.ENOSPC, errno.EDQUOT)  # the system's numbers of a full disk and a used-up quota


def system_code(error):
    """The system's number of a failed write; None where `error` is not a failed write."""
    if isinstance(error, SafetensorError) and (match := re.search(r"os error (\d+)", str(error))):
        return int(match[1])  # safetensors wraps the system's error
    return error.errno if isinstance(error, OSError) else None


def write_error(error, final):
    """The UserError for a failed write of checkpoint `final`; None where `error` is not a failed write."""
    code = system_code(error)
    if code is None and not isinstance(error, OSError):
        return None
    advice = ". Free some space, keep fewer checkpoints with --checkpoints_total_limit, or choose another --output_dir"
    kept = f"the unfinished folder was removed{last_one(final.parent)}"
    if code == errno.EFBIG:
        return UserError(f"can't save {final} ({error}): {kept}. Files may not be that large there: choose another "
                         "--output_dir")  # fmt: skip
    if code in FULL:
        return UserError(f"disk full while saving {final} ({error}): {kept}{advice}")
    return UserError(f"can't save {final} ({error}): {kept}")


def save_checkpoint(output_dir, step, state, save_model, limit=None, is_main=True):
    """Write checkpoint-`step`, then remove the oldest beyond `limit`. Returns its folder, None on the other ranks.

    Args:
        state: the `TrainingState`.
        save_model: function that writes the trained weights into a folder, in their usual layout; it may return
            {file: sha256} of what it hashed while writing.
        is_main: whether this rank writes; the other ranks only give their parts of sharded tensors.

    Raises:
        UserError: the disk is too small or a write failed; the last checkpoint is untouched.
    """
    collected = state.collect(is_main)
    if not is_main:
        return None
    output_dir = Path(output_dir)
    final, temporary = output_dir / f"checkpoint-{step}", output_dir / f".tmp-checkpoint-{step}"
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        tidy(output_dir)
        check_room(output_dir, bytes_needed(output_dir, state))
        temporary.mkdir()
        hashes = (save_model(temporary) or {}) | state.save(temporary, step, collected)
        follow_umask(temporary)
        write_manifest(temporary, step, hashes)
        put_in_place(temporary, final)
    except BaseException as error:  # Ctrl-C too must leave no half-written checkpoint
        with contextlib.suppress(OSError):
            tidy(output_dir)
        if (clear := write_error(error, final)) is not None:
            raise clear from error
        raise
    prune(output_dir, final, limit)
    return final


@contextlib.contextmanager
def kept_if_unwritten(save):
    """Context manager for writing the result: if that fails, save() puts the steps into a checkpoint.

    Args:
        save: function without arguments, called on this rank alone; None where a checkpoint takes all ranks, since
            the other ranks do not know of the failure.

    Raises:
        UserError: the disk is full or can't be written to.
    """
    try:
        with during("writing the result"):
            yield
    except (OSError, SafetensorError) as error:
        failed = f"the result can't be written ({error})"
        first = "Free some space" if system_code(error) in FULL else "Put that right"
        if save is None:
            raise UserError(f"{failed}. {first}; --resume_from_checkpoint latest does what came after the last "
                            "checkpoint once more") from error  # fmt: skip
        try:
            save()
        except UserError as second:
            raise UserError(f"{failed}, nor a checkpoint: {second}") from error
        raise UserError(
            f"{failed}; its steps are saved. {first}, and give the same command with --resume_from_checkpoint latest: "
            "it writes the result"
        ) from error


def put_in_place(temporary, final):
    """Rename a finished folder. A folder of that name is kept as `replaced_path` until the new one is in place."""
    if final.exists() and not is_complete(final):
        set_damaged_aside(final)
    if final.exists():
        os.replace(final, replaced_path(final))
    os.replace(temporary, final)
    sync_to_disk(final.parent)
    if replaced_path(final).exists():
        remove_checkpoint(replaced_path(final))


def prune(output_dir, newest, limit):
    """Delete the oldest checkpoints beyond `limit` (None: keep all), never the newest."""
    others = [folder for _, folder in list_checkpoints(output_dir) if folder != newest]
    for folder in others[: max(0, len(others) + 1 - limit)] if limit else []:
        remove_checkpoint(folder)


# ---------------------------------------------------------------------------------------------------------------------
# The state of a run


def parameters_of(optimizer):
    """All parameters, in the order of the optimizer's state."""
    return [value for group in optimizer.param_groups for value in group["params"]]


def optimizer_to_tensors(optimizer):
    """An optimizer's state as ({path: tensor}, the rest for JSON); bitsandbytes nests entries in dictionaries."""
    state = optimizer.state_dict()
    tensors, rest = {}, {"param_groups": state["param_groups"], "values": {}}

    def flatten(path, value):
        if isinstance(value, dict):
            for name, entry in value.items():
                flatten(f"{path}/{name}", entry)
        elif isinstance(value, torch.Tensor) or is_sharded_tensor(value):
            tensors[path] = value
        else:
            rest["values"][path] = value

    for index, entries in state["state"].items():
        flatten(str(index), entries)
    return tensors, rest


def load_optimizer(optimizer, tensors, rest):
    """Load what `optimizer_to_tensors` returned, whole; a sharded optimizer keeps this rank's parts."""
    parameters, state = parameters_of(optimizer), {}
    for path, value in {**tensors, **rest["values"]}.items():
        index, *names, last = path.split("/")
        entries = state.setdefault(int(index), {})
        for name in names:
            entries = entries.setdefault(name, {})
        entries[last] = shard_like(value, parameters[int(index)])
    before, now = rest["param_groups"], optimizer.param_groups
    sizes, now = ([len(group["params"]) for group in groups] for groups in (before, now))
    require(sizes == now, f"the checkpoint has groups of {sizes} weights with a learning rate of their own, this run "
            f"{now}: give the --lora_pattern that the checkpoint was made with")  # fmt: skip
    optimizer.load_state_dict({"state": state, "param_groups": rest["param_groups"]})


class TrainingState:
    """The state of a run besides the weights: optimizer, LR schedule, fp16 scaler, EMA, LPL's running means, step.

    Noise, timesteps and data order follow from the seed and the step: no generator has a state to save.
    """

    def __init__(self, optimizer, lr_scheduler, scaler=None, ema=None, auto_weight=None, identity=None, batch_size=1):
        """batch_size: images of an optimizer step."""
        self.batch_size, self.resumed_step, self.resumed_images = batch_size, 0, 0
        self.optimizer, self.lr_scheduler, self.scaler = optimizer, lr_scheduler, scaler
        self.ema, self.auto_weight, self.identity = ema, auto_weight, identity or {}

    def collect(self, keep):
        """({name: whole tensor}, the optimizer's rest). Every rank gives its parts; ranks that `keep` get wholes."""
        tensors, rest = optimizer_to_tensors(self.optimizer)
        tensors = {f"optimizer/{name}": value for name, value in tensors.items()}
        if self.ema is not None:
            if torch.accelerator.is_available():
                torch.accelerator.synchronize()  # an offloaded average may still be on its way
            pairs = zip(self.ema.shadow_params, parameters_of(self.optimizer), strict=True)
            tensors |= {f"ema/{index}": from_local_shard(*pair) for index, pair in enumerate(pairs)}
        if self.auto_weight is not None:
            tensors |= {f"auto_weight/{name}": value for name, value in self.auto_weight.state_dict().items()}
        return full_tensors(tensors, keep), rest

    def save(self, folder, step, collected):
        """Write training_state.safetensors and .json into a folder; returns {file: sha256} of the former.

        collected: what `collect` returned.
        """
        tensors, rest = collected
        schedule = {name: value for name, value in self.lr_scheduler.state_dict().items() if is_plain(value)}
        info = {
            "step": step,
            "images_seen": self.resumed_images + (step - self.resumed_step) * self.batch_size,
            "optimizer": rest,
            "lr_scheduler": schedule,
            "scaler": self.scaler.state_dict() if self.scaler else None,
            "ema_step": self.ema.optimization_step if self.ema is not None else None,
            "identity": self.identity,
        }
        name = "training_state.safetensors"
        hashes = {name: write_tensors(Path(folder) / name, tensors)}
        (Path(folder) / "training_state.json").write_text(json.dumps(info, indent=1))
        return hashes

    def load(self, folder):
        """Restore the state from a checkpoint's folder; returns its step."""
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
                shadow.copy_(local_shard(shard_like(part["ema"][str(index)], parameter)))
            self.ema.optimization_step = info["ema_step"]
        if self.auto_weight is not None and "auto_weight" in part:
            if part["auto_weight"].keys() == self.auto_weight.state_dict().keys():
                self.auto_weight.load_state_dict(part["auto_weight"])
            else:
                print("The checkpoint has the automatic weight of LPL for other --lpl_features, or of an earlier "
                      "version: it starts from 0 again")  # fmt: skip
        self.resumed_step, self.resumed_images = info["step"], images_seen(folder, self.batch_size)
        return info["step"]

    def _take_settings(self, settings):
        """Put this run's flags over the settings in the checkpoint, and print what changed."""
        for index, (group, now) in enumerate(zip(self.optimizer.param_groups, settings, strict=True)):
            for key, value in now.items():
                before = tuple(group[key]) if isinstance(group[key], list) else group[key]
                if before != value:
                    print(f"{key} was {before} in the checkpoint, is {value} from now on")
                    group[key] = value
            # of this run's schedule, which may be another one, or of another length
            group["lr"] = now["initial_lr"] * self.lr_scheduler.lr_lambdas[index](self.lr_scheduler.last_epoch)
            self.lr_scheduler.base_lrs[index] = now["initial_lr"]


def is_plain(value):
    """Whether JSON can hold a value."""
    if isinstance(value, (list, tuple)):
        return all(is_plain(item) for item in value)
    return isinstance(value, (int, float, str, bool, type(None)))


# ---------------------------------------------------------------------------------------------------------------------
# Resuming with several ranks


def checkpoint_to_resume(args, accelerator=None):
    """The folder to resume from, or None for a fresh start. Changes nothing.

    Rank 0 reads the files and decides for all ranks. The other ranks check that they see the same folder, which ranks
    on another machine may not; if one does not, all ranks raise.

    Raises:
        UserError: the checkpoint is damaged, is another run's, or is not there on every machine.
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
    decision = from_rank_0(decision, accelerator)
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
    """Why a folder is not the checkpoint whose manifest has this sha256, judged by file sizes; None where it is."""
    try:
        if not folder.is_dir():
            raise Damaged(f"there is no {folder}")
        check_sizes(folder, read_manifest(folder))
        if sha256_of(folder / MANIFEST) != manifest:
            raise Damaged(f"{folder} is another checkpoint")
    except (Damaged, OSError) as error:
        return str(error)
    return None
