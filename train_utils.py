"""What the recipes share and nobody would edit: checkpoints, optimizers, metrics, estimates.

Checkpoints hold safetensors and JSON, never pickle. They are written to a temporary folder and renamed, so that a
folder called checkpoint-N is always complete.
"""

import contextlib
import json
import math
import os
import re
import shutil
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs, ProjectConfiguration
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from cache_utils import latent_key, prompt_key
from cli_utils import UserError, read_json
from data_utils import (
    AddressedBatches,
    TrainingSet,
    addressed_normal,
    addressed_rng,
    addressed_uniform,
    collate,
    stratified_uniform,
    sync_to_disk,
)
from lpl_utils import AutoWeight, LatentPerceptualLoss, LPLGate, noise_to_signal

CHECKPOINT = re.compile(r"checkpoint-(\d+)$")
SETTINGS = ("initial_lr", "weight_decay", "betas", "eps")  # of an optimizer: a resumed run may change them
OLD_RESULTS = ("checkpoint-*", "validation", "image_*.png", "pytorch_lora_weights*.safetensors", "model.safetensors",
               "model_index.json", "README.md", "run.png")  # fmt: skip
HELD_OUT_LEVELS = 10  # noise levels at which the held-out loss is measured
HELD_OUT_SEED = 0  # of its noise: not --seed, so that runs with different seeds can be compared


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


# ---------------------------------------------------------------------------------------------------------------------
# Optimizer and schedule


def quantization(args, dtype):
    """Arguments of `from_pretrained` for --bnb_quantization_config_path; 4-bit weights compute in `dtype`."""
    if not args.bnb_quantization_config_path:
        return {}
    from diffusers import BitsAndBytesConfig

    settings = {"bnb_4bit_compute_dtype": str(dtype)[6:]} | read_json(args.bnb_quantization_config_path)
    return {"quantization_config": BitsAndBytesConfig(**settings)}


def build_optimizer(args, groups):
    """The optimizer of --optimizer and --use_8bit_adam; groups: [{"params", "lr"}]."""
    betas = (args.adam_beta1, args.adam_beta2)
    rate = {"lr": args.learning_rate}  # also as the optimizer's default, which a polynomial schedule looks at
    if args.optimizer == "prodigy":
        from prodigyopt import Prodigy

        return Prodigy(
            groups, **rate, betas=betas, weight_decay=args.adam_weight_decay, eps=args.adam_epsilon,
            use_bias_correction=True, safeguard_warmup=True,
        )  # fmt: skip
    if args.optimizer == "adafactor":
        from transformers.optimization import Adafactor

        # with a learning rate of its own: neither the relative step nor the scaling by a tensor's size, which for
        # LoRA's zeros at the start would be next to nothing
        return Adafactor(
            groups, **rate, weight_decay=args.adam_weight_decay, relative_step=False, scale_parameter=False
        )
    settings = dict(**rate, betas=betas, weight_decay=args.adam_weight_decay, eps=args.adam_epsilon)
    if args.use_8bit_adam:
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(groups, **settings)
    return torch.optim.AdamW(groups, **settings)


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


METRICS = ["train_loss", "diffusion_loss", "grad_norm", "lpl/loss", "lpl/weighted_loss", "lpl/weight",
           "lpl/num_samples", "lpl/application_ratio"]  # fmt: skip


def metric_names(args):
    """The log keys of a run, in the order of the packed read."""
    layers = range(1 + args.lpl_num_blocks if args.use_lpl else 0)
    return METRICS + [f"lpl/features/layer_{layer}/{what}" for layer in layers for what in ("loss", "outlier_ratio")]


def to_device(tensor, device, dtype=None):
    """A CPU tensor on the device, by way of pinned memory where that keeps the host from waiting."""
    tensor = tensor.to(dtype=dtype)  # before it is pinned: a copy that converts goes by unpinned memory
    if torch.device(device).type == "cuda" and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def learning_rates(optimizer):
    """{log key: value}: the first group's learning rate, and under Prodigy the step size that it has found."""
    group = optimizer.param_groups[0]
    return {"lr": group["lr"]} | ({"lr/d*lr": group["d"] * group["lr"]} if "d" in group else {})


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
# The loop's parts: what a step needs, its samples, its end


@dataclass
class Recipe:
    """What a training step needs besides the models and its batch."""

    args: object
    device: torch.device
    schedule: object  # noise levels, timesteps and targets: the script's `Schedule`
    dtype: torch.dtype  # the denoiser's inputs
    samples_per_step: int  # of an optimizer step, over micro-steps and ranks
    scaling_factor: float  # z_model = (z_vae - shift_factor) * scaling_factor
    shift_factor: float
    empty_prompt: dict  # the entry of "" in the prompt store; zeros where those are the pipeline's unconditional
    empty_is_zero: bool = False  # whether the pipeline's unconditional embedding is zero
    encoder: object = None  # the autoencoder, where images are encoded in every step
    lpl: LatentPerceptualLoss | None = None
    gate: LPLGate | None = None
    auto_weight: AutoWeight | None = None

    def lpl_weight(self):
        """The weight of the LPL term, a number or a scalar tensor on the device."""
        return self.auto_weight() if self.auto_weight is not None else float(self.args.lpl_weight)

    def to_model_space(self, latents):
        """The autoencoder's latents as the denoiser sees them."""
        return (latents - self.shift_factor) * self.scaling_factor


def start_accelerator(args):
    """The Accelerator, with trackers below the output folder."""
    logging_dir = Path(args.output_dir, args.logging_dir)
    patience = timedelta(hours=12)  # other ranks wait while the first encodes and draws; NCCL's own is 10 minutes
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(project_dir=args.output_dir, logging_dir=logging_dir),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=patience)],
    )
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise UserError("--mixed_precision fp16 needs a GPU, and none is here; use bf16 or no")
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise UserError(
            f"accelerate is configured for {accelerator.distributed_type.value}, which is not supported yet; give "
            "accelerate launch a configuration without it"
        )
    if args.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    return accelerator


def sample_latents(batch, recipe):
    """z_0 (B, C, h, w) in model space, float32: a sample of the autoencoder's posterior."""
    if "pixel_values" in batch:
        with torch.no_grad():
            pixels = to_device(batch["pixel_values"], recipe.device)
            posterior = recipe.encoder.encode(pixels).latent_dist
        mean, std = posterior.mean, posterior.std
    else:
        mean, std = (to_device(batch[name], recipe.device) for name in ("mean", "std"))
    eps = addressed_normal(recipe.args.seed, batch["number"], mean.shape[1:], "posterior")
    return recipe.to_model_space(mean + std * to_device(eps, recipe.device))


def sample_noise(numbers, shape, recipe):
    """eps (B, *shape) of the samples with these numbers, on the device; with --noise_offset constant parts too."""
    args = recipe.args
    noise = addressed_normal(args.seed, numbers, shape, "noise")
    if args.noise_offset:
        noise += args.noise_offset * addressed_normal(args.seed, numbers, (shape[0], 1, 1), "noise_offset")
    return to_device(noise, recipe.device)


def sample_timesteps(numbers, recipe):
    """(B,) timesteps of the samples with these numbers, on the CPU."""
    args = recipe.args
    if args.timestep_sampling == "stratified":
        uniform = stratified_uniform(args.seed, numbers, args.train_batch_size, recipe.samples_per_step)
    else:
        uniform = addressed_uniform(args.seed, numbers, "timestep")
    return recipe.schedule.draw_timesteps(torch.from_numpy(uniform))


def choose_prompts(batch, recipe, dropout):
    """The prompts of a batch, on the device; a share `dropout` of them is replaced by the unconditional one.

    Where the text encoders are trained, the prompts are tokens, and the unconditional embedding may be zeros, which no
    tokens give: then "keep" (B,) is 0 for those samples.
    """
    keep = torch.from_numpy(addressed_uniform(recipe.args.seed, batch["number"], "dropout") >= dropout)
    prompt = {}
    for name, empty in recipe.empty_prompt.items():
        value = batch[name]
        if not keep.all():
            value = torch.where(keep.reshape(-1, *[1] * (value.ndim - 1)), value, empty)
        prompt[name] = to_device(value, recipe.device, recipe.dtype if value.is_floating_point() else None)
    if recipe.args.train_text_encoder and recipe.empty_is_zero:
        prompt["keep"] = to_device(keep.float(), recipe.device)
    return prompt


def seed_lora_dropout(numbers, args):
    """Dropout follows from the address of a micro-step too, so that a resumed run repeats it."""
    if args.lora_dropout:
        torch.manual_seed(int(addressed_rng(args.seed, int(numbers[0]), "lora_dropout").integers(2**32)))


def batches(args, images, prompt_store, latent_store, accelerator, first_step, last_step):
    """Iterator over the micro-batches of this rank from `first_step` on."""
    data = TrainingSet(
        images, args.seed, args.resolution, args.center_crop, args.random_flip, args.image_interpolation_mode,
        latents=latent_store, prompts=prompt_store, latent_key=latent_key, prompt_key=prompt_key,
    )  # fmt: skip
    numbers = AddressedBatches(
        first_step, last_step, args.train_batch_size, args.gradient_accumulation_steps, accelerator.num_processes,
        accelerator.process_index,
    )  # fmt: skip
    return iter(
        torch.utils.data.DataLoader(
            data,
            batch_sampler=numbers,
            collate_fn=collate,
            num_workers=args.dataloader_num_workers,
            pin_memory=accelerator.device.type == "cuda",
        )
    )


def optimize(args, accelerator, optimizer, lr_scheduler, ema, parameters, metrics):
    """The optimizer step at the end of the accumulation: clip, step, schedule, average."""
    grad_norm = accelerator.clip_grad_norm_(parameters, args.max_grad_norm or math.inf)  # 0: no clipping
    metrics.add("grad_norm", grad_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if not accelerator.optimizer_step_was_skipped:  # fp16: the scaler skips a step whose gradients overflow
        lr_scheduler.step()
        if ema is not None:
            update_ema(ema, parameters, args.offload_ema)


# ---------------------------------------------------------------------------------------------------------------------
# Held-out loss


@torch.no_grad()
def held_out_losses(images, prompt_store, latent_store, recipe, accelerator, measure):
    """{log key: loss} of the held-out images, at fixed noise levels and with fixed noise.

    `validation/diffusion_loss` is the mean over the levels, `validation/lpl_loss` over those that the gate takes; each
    level has its own entry too. Every rank takes its share of the images.

    measure: function (batch, latents, noise, timesteps, whether to measure LPL) -> (diffusion losses (B,), LPL (B,)).
    """
    schedule, metrics = recipe.schedule, Metrics(recipe.device)
    levels = schedule.held_out_timesteps(HELD_OUT_LEVELS)
    gated = recipe.gate(levels, noise_to_signal(*schedule.levels(levels))).tolist()
    mine = range(accelerator.process_index, len(images), accelerator.num_processes)
    size = recipe.args.train_batch_size
    for first in tqdm(range(0, len(mine), size), desc="held-out loss", leave=False,
                      disable=not accelerator.is_local_main_process):  # fmt: skip
        numbers = mine[first : first + size]
        entries = [latent_store.get(latent_key(images[number].content_hash(), False)) for number in numbers]
        prompts = [prompt_store.get(prompt_key(images[number].caption)) for number in numbers]
        batch = collate([latent | prompt for latent, prompt in zip(entries, prompts, strict=True)])
        batch["number"] = numbers
        latents = recipe.to_model_space(to_device(batch["mean"].float(), recipe.device))
        for level, timestep in enumerate(levels):
            addresses = [number * HELD_OUT_LEVELS + level for number in numbers]
            noise = to_device(addressed_normal(HELD_OUT_SEED, addresses, latents.shape[1:], "held_out"), recipe.device)
            losses = measure(batch, latents, noise, timestep.repeat(len(numbers)), gated[level])
            for name, values in zip(("diffusion_loss", "lpl_loss"), losses, strict=True):
                if values is not None:
                    metrics.add(f"validation/{name}/t{timestep:g}", values.sum(), len(values))
    names = [f"validation/diffusion_loss/t{timestep:g}" for timestep in levels]
    names += [f"validation/lpl_loss/t{timestep:g}" for timestep, chosen in zip(levels, gated, strict=True) if chosen]
    return with_means(metrics.read(accelerator, names))


def with_means(losses):
    """Add to {"validation/x_loss/level": value} the mean over the levels of each loss, under its bare name."""
    groups = {}
    for name, value in losses.items():
        groups.setdefault(name.rpartition("/")[0], []).append(value)
    return {name: sum(values) / len(values) for name, values in groups.items()} | losses
