"""What the recipes share and nobody would edit: checkpoints, optimizers, metrics, estimates.

Checkpoints hold safetensors and JSON, never pickle. They are written to a temporary folder and renamed, so that a
folder called checkpoint-N is always complete.
"""

import contextlib
import json
import os
import re
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from cli_utils import UserError
from data_utils import sync_to_disk
from lpl_utils import DecoderStages, LatentPerceptualLoss, LPLConfig, LPLGate

CHECKPOINT = re.compile(r"checkpoint-(\d+)$")


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


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
    if final.exists():  # an older run's: it stays complete until the new one is
        os.replace(final, output_dir / f".old-checkpoint-{step}")
    os.replace(temporary, final)
    sync_to_disk(output_dir)
    shutil.rmtree(output_dir / f".old-checkpoint-{step}", ignore_errors=True)
    for _, folder in list_checkpoints(output_dir)[:-limit] if limit else []:
        shutil.rmtree(folder)
    return final


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
        load_optimizer(self.optimizer, part.get("optimizer", {}), info["optimizer"])
        self.lr_scheduler.load_state_dict(info["lr_scheduler"])
        if self.scaler and info["scaler"]:
            self.scaler.load_state_dict(info["scaler"])
        if self.ema is not None:
            for index, shadow in enumerate(self.ema.shadow_params):
                shadow.copy_(part["ema"][str(index)])
            self.ema.optimization_step = info["ema_step"]
        if self.auto_weight is not None and "auto_weight" in part:
            self.auto_weight.load_state_dict(part["auto_weight"])
        return info["step"]


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


# ---------------------------------------------------------------------------------------------------------------------
# Optimizer and schedule


def build_optimizer(args, groups):
    """The optimizer of --optimizer and --use_8bit_adam; groups: [{"params", "lr"}]."""
    betas = (args.adam_beta1, args.adam_beta2)
    if args.optimizer == "prodigy":
        from prodigyopt import Prodigy

        return Prodigy(
            groups, betas=betas, weight_decay=args.adam_weight_decay, eps=args.adam_epsilon, use_bias_correction=True,
            safeguard_warmup=True,
        )  # fmt: skip
    if args.optimizer == "adafactor":
        from transformers.optimization import Adafactor

        # with a learning rate of its own: neither the relative step nor the scaling by a tensor's size, which for
        # LoRA's zeros at the start would be next to nothing
        return Adafactor(groups, weight_decay=args.adam_weight_decay, relative_step=False, scale_parameter=False)
    settings = dict(betas=betas, weight_decay=args.adam_weight_decay, eps=args.adam_epsilon)
    if args.use_8bit_adam:
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(groups, **settings)
    return torch.optim.AdamW(groups, **settings)


def optimizer_state_bytes(args, weights, count):
    """About how many bytes an optimizer keeps for `count` parameters of `weights` bytes."""
    if args.use_8bit_adam:
        return 2 * count
    return {"adamw": 2 * weights, "prodigy": 4 * weights, "adafactor": 0}[args.optimizer]


def build_lr_scheduler(args, optimizer, max_train_steps):
    """The schedule, in optimizer steps: stepped once for each, whatever the accumulation and the number of ranks."""
    from diffusers.optimization import get_scheduler

    return get_scheduler(
        args.lr_scheduler,
        optimizer=optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=max_train_steps,
        num_cycles=args.lr_num_cycles,
        power=args.lr_power,
    )


def build_ema(args, parameters):
    """diffusers' EMA of the parameters, or None."""
    if not args.use_ema:
        return None
    from diffusers.training_utils import EMAModel

    ema = EMAModel(
        parameters,
        decay=args.ema_decay,
        update_after_step=args.ema_update_after_step,
        foreach=args.foreach_ema,
    )
    if args.offload_ema:
        ema.to("cpu")
    return ema


def update_ema(ema, parameters, offload):
    """One step of the average; kept on the CPU under --offload_ema, and computed on the parameters' device."""
    if offload:
        ema.to(parameters[0].device, non_blocking=True)
    ema.step(parameters)
    if offload:
        ema.to("cpu")


@contextlib.contextmanager
def averaged_weights(ema, parameters):
    """Inside, the parameters hold EMA's average (when there is one); afterwards their own values again."""
    if ema is None:
        yield
        return
    ema.store(parameters)
    ema.copy_to(parameters)
    try:
        yield
    finally:
        ema.restore(parameters)


# ---------------------------------------------------------------------------------------------------------------------
# Metrics


class Metrics:
    """Means of detached values that stay where they are until they are read, in one transfer.

    `add(name, value, count)` takes a scalar tensor (or a number of the host's) that is a sum over `count` items.
    """

    def __init__(self, device):
        self.device = device
        self.clear()

    def clear(self):
        """Start the next interval."""
        self.sums, self.counts = {}, {}

    def add(self, name, value, count=1):
        """Take in the sum of `count` items."""
        if isinstance(value, torch.Tensor):
            value = value.detach().to(torch.float32)
        self.sums[name] = self.sums.get(name, 0.0) + value
        self.counts[name] = self.counts.get(name, 0) + count

    def read(self, accelerator, names):
        """{name: mean} over ranks and the interval, of those `names` that have any item; then start anew."""
        sums = [self.sums.get(name, 0.0) for name in names]
        host = [0.0 if isinstance(value, torch.Tensor) else value for value in sums] + [
            float(self.counts.get(name, 0)) for name in names
        ]
        packed = torch.tensor(host, device=self.device)
        for index, value in enumerate(sums):
            if isinstance(value, torch.Tensor):
                packed[index] = value
        if accelerator.num_processes > 1:
            packed = accelerator.reduce(packed, "sum")
        values = packed.tolist()
        self.clear()
        pairs = zip(names, values[: len(names)], values[len(names) :], strict=True)
        return {name: total / count for name, total, count in pairs if count}


def to_device(tensor, device, dtype=None):
    """A CPU tensor on the device, by way of pinned memory where that keeps the host from waiting."""
    if torch.device(device).type == "cuda" and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(device, dtype, non_blocking=True)


def learning_rates(optimizer):
    """{log key: value}: the first group's learning rate, and under Prodigy the step size that it has found."""
    group = optimizer.param_groups[0]
    return {"lr": group["lr"]} | ({"lr/d*lr": group["d"] * group["lr"]} if "d" in group else {})


def rows_of(columns):
    """{name: (N, ...)} to N dictionaries {name: (...)}."""
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def with_means(losses):
    """Add to {"validation/x_loss/level": value} the mean over the levels of each loss, under its bare name."""
    groups = {}
    for name, value in losses.items():
        groups.setdefault(name.rpartition("/")[0], []).append(value)
    return {name: sum(values) / len(values) for name, values in groups.items()} | losses


def warnings_about(args, images, held_out):
    """Remarks on what is allowed and rarely meant."""
    remarks = []
    if args.optimizer == "prodigy" and args.learning_rate < 0.1:
        remarks.append(
            f"--optimizer prodigy multiplies its own step size by --learning_rate {args.learning_rate:g}; 1 is usual"
        )
    both = (
        {image.content_hash() for image in held_out} & {image.content_hash() for image in images} if held_out else ()
    )
    if both:
        remarks.append(
            f"{len(both)} of the {len(held_out)} held-out images are trained on too: their loss proves nothing"
        )
    if args.hub_token:
        remarks.append(
            "--hub_token can be seen by others in the list of processes; prefer HF_TOKEN or `hf auth login`"
        )
    return remarks


def describe_lora(config):
    """A LoRA's configuration in a few words."""
    return f"{'DoRA' if config.use_dora else 'LoRA'} of rank {config.r}, alpha {config.lora_alpha:g}"


def sync_gradients(accelerator, model, last):
    """Context of a micro-step: ranks exchange gradients on the last one only."""
    return contextlib.nullcontext() if last else accelerator.no_sync(model)


def validation_schedule(args, images, batch_size):
    """Function step -> whether a validation is due: every --validation_steps, else every --validation_epochs."""
    if args.validation_steps:
        return lambda step: step % args.validation_steps == 0
    every = args.validation_epochs * images  # samples
    return lambda step: step * batch_size // every > (step - 1) * batch_size // every


def run_identity(args):
    """What must be the same for a checkpoint to be resumed."""
    names = ["use_lora", "seed", "use_ema", "optimizer", "use_8bit_adam", "timestep_sampling"]
    if args.use_lora:
        names += ["rank", "lora_alpha", "lora_layers", "use_dora", "train_text_encoder"]
    return {name: getattr(args, name) for name in names}


# ---------------------------------------------------------------------------------------------------------------------
# The perceptual loss, from flags


def lpl_config(args):
    """The loss' configuration; by default as many samples are decoded at a time as have the size of one of 1024 px."""
    by_default = "stage" if args.gradient_checkpointing else "none"
    return LPLConfig(
        num_blocks=args.lpl_num_blocks,
        norm_type=args.lpl_norm_type,
        loss_type=args.lpl_loss_type,
        pow_law=args.lpl_pow_law,
        remove_outliers=args.lpl_remove_outliers,
        checkpointing=args.lpl_checkpointing or by_default,
        batch_size=args.lpl_batch_size or max(1, round((1024 / args.resolution) ** 2)),
    )


def lpl_gate(args, **by_default):
    """Which samples get the loss; by_default: LPLGate's threshold when no flag gives one."""
    if args.lpl_t_threshold is None and args.lpl_sigma_threshold is None:
        return LPLGate(**by_default, resolution=args.resolution)
    return LPLGate(args.lpl_t_threshold, args.lpl_sigma_threshold, args.lpl_threshold_resolution, args.resolution)


def lpl_dtype(args, mixed_precision):
    """The decoder's dtype in the loss."""
    name = args.lpl_vae_dtype or ("bfloat16" if mixed_precision == "bf16" else "float32")
    return getattr(torch, name)


def latent_side(args, vae):
    """Height and width of the latents."""
    return args.resolution // 2 ** (len(vae.config.block_out_channels) - 1)


def lpl_bytes(args, vae):
    """Bytes that the loss keeps for its backward pass: of all stages, or of the largest when they are recomputed."""
    config, side = lpl_config(args), latent_side(args, vae)
    totals = [0]
    for blocks in range(1 + config.num_blocks):
        with torch.device("meta"), SavedBytes() as kept:
            batch = min(args.train_batch_size, config.batch_size)
            pair = torch.randn(2, batch, vae.config.latent_channels, side, side)
            LatentPerceptualLoss(vae, replace(config, num_blocks=blocks))(pair[0].requires_grad_(), pair[1])
        totals.append(kept.total)
    stages = [after - before for before, after in pairwise(totals)]
    return max(stages) if config.checkpointing == "stage" else sum(stages)


def stage_shapes(args, vae):
    """[(C, H, W)] of the features that the loss compares; `vae` on the meta device."""
    side, stages = latent_side(args, vae), DecoderStages(vae)
    x, shapes = torch.empty(1, vae.config.latent_channels, side, side, device="meta"), []
    for index in range(1 + args.lpl_num_blocks):
        x = stages.run(index, x)
        shapes.append(tuple(x.shape[1:]))
    return shapes


def print_lpl_plan(args, gate, share, vae, say):
    """The lines about the loss: share of gated samples, decoder stages, weight."""
    config = lpl_config(args)
    rule = f"t < {gate.limit:g}" if gate.t_threshold is not None else f"sigma / alpha <= {gate.limit:g}"
    say(f"LPL: where {rule}, {100 * share:.1f} % of samples; weight {args.lpl_weight}"
        + (f" (a share of {args.lpl_share:g} of the loss)" if args.lpl_weight == "auto" else "")
        + f"; {config.norm_type} normalization, {config.loss_type}, at most {config.batch_size} samples at a time, "
        f"checkpointing {config.checkpointing}, {str(vae.dtype)[6:]}")  # fmt: skip
    shapes = stage_shapes(args, vae)
    say("     decoder stages: " + ", ".join("x".join(map(str, shape)) for shape in shapes))


# ---------------------------------------------------------------------------------------------------------------------
# Estimates before training


class SavedBytes:
    """Context that counts the bytes autograd keeps for the backward pass; on meta tensors it costs nothing.

    Leaves (parameters, inputs) are not counted: they are there anyway.
    """

    def __enter__(self):
        self.storages = {}
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *exception):
        self.hooks.__exit__(*exception)

    def _pack(self, tensor):
        if not (tensor.is_leaf and tensor.requires_grad):
            storage = tensor.untyped_storage()
            self.storages[storage._cdata] = (
                storage,
                storage.nbytes(),
            )  # the storage itself: its id must not be reused
        return tensor

    @property
    def total(self):
        """Bytes."""
        return sum(size for _, size in self.storages.values())


def parameter_bytes(parameters):
    """Bytes of a collection of parameters."""
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)


def gigabytes(count):
    """1234567890 -> "1.23 GB"; small ones in MB."""
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
