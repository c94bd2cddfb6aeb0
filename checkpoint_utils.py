"""Checkpoints: the state of a run in safetensors and JSON, never pickle.

They are written to a temporary folder and renamed, so that a folder called checkpoint-N is always complete.
"""

import json
import os
import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from cli_utils import UserError
from data_utils import sync_to_disk

CHECKPOINT = re.compile(r"checkpoint-(\d+)$")
SETTINGS = ("initial_lr", "weight_decay", "betas", "eps")  # of an optimizer: a resumed run may change them
OLD_RESULTS = ("checkpoint-*", "validation", "image_*.png", "pytorch_lora_weights*.safetensors", "model.safetensors",
               "model_index.json", "README.md", "run.png")  # fmt: skip


def optimizer_to_tensors(optimizer):
    """An optimizer's state as (tensors by path, JSON-able rest); bitsandbytes nests its entries in dictionaries."""
    state = optimizer.state_dict()
    tensors, rest, storages = {}, {"param_groups": state["param_groups"], "values": {}}, set()

    def flatten(path, value):
        if isinstance(value, dict):
            for name, entry in value.items():
                flatten(f"{path}/{name}", entry)
        elif isinstance(value, torch.Tensor):
            shared = value.untyped_storage().data_ptr() in storages  # safetensors refuses tensors that share memory
            storages.add(value.untyped_storage().data_ptr())
            tensors[path] = value.clone() if shared else value.contiguous()
        else:
            rest["values"][path] = value

    for index, entries in state["state"].items():
        flatten(str(index), entries)
    return tensors, rest


def load_optimizer(optimizer, tensors, rest):
    """Put back what `optimizer_to_tensors` took."""
    state = {}
    for path, value in {**tensors, **rest["values"]}.items():
        index, *names, last = path.split("/")
        entries = state.setdefault(int(index), {})
        for name in names:
            entries = entries.setdefault(name, {})
        entries[last] = value
    optimizer.load_state_dict({"state": state, "param_groups": rest["param_groups"]})


def list_checkpoints(output_dir):
    """[(step, folder)] of the complete checkpoints of a run, oldest first."""
    found = [(CHECKPOINT.match(path.name), path) for path in Path(output_dir).glob("checkpoint-*")]
    return sorted((int(match[1]), path) for match, path in found if match and (path / "training_state.json").is_file())


def save_checkpoint(output_dir, step, state, save_model, limit=None):
    """Write checkpoint-`step`, and only then remove the oldest beyond `limit`.

    state: a TrainingState; save_model: called with the folder, writes the trained weights in their usual layout.
    """
    output_dir = Path(output_dir)
    temporary = output_dir / f".tmp-checkpoint-{step}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_model(temporary)
    state.save(temporary, step)
    for path in [*temporary.rglob("*"), temporary]:
        sync_to_disk(path)
    final = output_dir / f"checkpoint-{step}"
    shutil.rmtree(output_dir / f".old-checkpoint-{step}", ignore_errors=True)  # of a save that was killed
    if final.exists():  # an older run's: it stays complete until the new one is
        os.replace(final, output_dir / f".old-checkpoint-{step}")
    os.replace(temporary, final)
    sync_to_disk(output_dir)
    shutil.rmtree(output_dir / f".old-checkpoint-{step}", ignore_errors=True)
    for _, folder in list_checkpoints(output_dir)[:-limit] if limit else []:
        shutil.rmtree(folder)
    return final


def set_aside(output_dir, resume_from):
    """Move what an earlier run left in the output folder to `previous-1` and so on, so that it is not taken for ours.

    On a fresh start these are its results and checkpoints; resuming, the checkpoints after the one resumed from.
    Returns the folder, or None when there was nothing to move.
    """
    output_dir = Path(output_dir)
    if resume_from is not None:
        step = int(CHECKPOINT.match(resume_from.name)[1]) if CHECKPOINT.match(resume_from.name) else None
        old = [folder for found, folder in list_checkpoints(output_dir) if step is not None and found > step]
    elif (output_dir / "config.yaml").is_file():  # the mark of an earlier run
        old = [path for pattern in OLD_RESULTS for path in output_dir.glob(pattern)]
    else:
        old = []
    if not old:
        return None
    number = 1 + sum(1 for _ in output_dir.glob("previous-*"))
    place = output_dir / f"previous-{number}"
    place.mkdir()
    for path in old:
        os.replace(path, place / path.name)
    return place


class TrainingState:
    """All of a run that is not weights: optimizer, LR schedule, scaler, EMA, LPL's running means, position.

    Noise, timesteps and data order follow from the seed and the step, so no generator has a state to save.
    """

    def __init__(self, optimizer, lr_scheduler, scaler=None, ema=None, auto_weight=None, identity=None):
        self.optimizer, self.lr_scheduler, self.scaler = optimizer, lr_scheduler, scaler
        self.ema, self.auto_weight, self.identity = ema, auto_weight, identity or {}

    def save(self, folder, step):
        """Write training_state.safetensors and training_state.json into a folder."""
        tensors, rest = optimizer_to_tensors(self.optimizer)
        tensors = {f"optimizer/{name}": value for name, value in tensors.items()}
        if self.ema is not None:
            tensors |= {f"ema/{index}": value.contiguous() for index, value in enumerate(self.ema.shadow_params)}
        if self.auto_weight is not None:
            tensors |= {f"auto_weight/{name}": value for name, value in self.auto_weight.state_dict().items()}
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
            for index, shadow in enumerate(self.ema.shadow_params):
                shadow.copy_(part["ema"][str(index)])
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


def checkpoint_to_resume(args):
    """The folder to resume from, or None for a fresh start. Raises UserError for none, or another run's."""
    folder = find_checkpoint(args.resume_from_checkpoint, args.output_dir)
    if folder is not None:
        found, wanted = json.loads((folder / "training_state.json").read_text())["identity"], run_identity(args)
        different = [
            f"{key} was {found.get(key)}, is {value}" for key, value in wanted.items() if found.get(key) != value
        ]
        if different:
            flag = f"--resume_from_checkpoint {args.resume_from_checkpoint}"
            raise UserError(f"{flag}: {folder} is of another run ({', '.join(different)})")
    return folder


def find_checkpoint(resume_from_checkpoint, output_dir):
    """The folder that --resume_from_checkpoint means, or None."""
    if not resume_from_checkpoint:
        return None
    if resume_from_checkpoint == "latest":
        found = list_checkpoints(output_dir)
        if not found:
            print(f"--resume_from_checkpoint latest: no checkpoint in {output_dir} yet, starting fresh")
        return found[-1][1] if found else None
    # the diffusers scripts look for the name inside the output folder
    for folder in (Path(resume_from_checkpoint), Path(output_dir) / Path(resume_from_checkpoint).name):
        if (folder / "training_state.json").is_file():
            return folder
    raise UserError(f"--resume_from_checkpoint {resume_from_checkpoint}: no checkpoint there, nor in {output_dir}")


def run_identity(args):
    """What must be the same for a checkpoint to be resumed."""
    names = ["use_lora", "seed", "use_ema", "optimizer", "use_8bit_adam", "timestep_sampling"]
    if args.use_lora:
        names += ["rank", "lora_alpha", "lora_layers", "use_dora", "train_text_encoder"]
    return {name: getattr(args, name) for name in names}
