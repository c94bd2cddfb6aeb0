"""The guarded optimizer step: gradients over micro-steps and ranks, clipping, schedule, and the weights' average.

`Trainee` is the model under training with everything that changes it. The training scripts' loop reads

    for batch in trainee.micro_steps(micro_batches):
        loss, terms = training_step(batch, trainee.denoiser, objective, step, metrics)
        trainee.backward(loss, terms)
    outcome = trainee.step(step + 1, wishes)
"""

import contextlib
import math
from dataclasses import dataclass, replace

import torch

from lpl_finetuning.adapters import layer_of, patterns_of
from lpl_finetuning.errors import during
from lpl_finetuning.flags import settings_from_flags
from lpl_finetuning.stages import stage_ended
from lpl_finetuning.training.sharding import clip_gradients, is_sharded, local_shard, prepare


@dataclass(frozen=True)
class OptimizerSettings:
    """The flags about the optimizer step; each field has the name of its flag.

    `learning_rate` and `text_encoder_lr` are the rates in use: under --scale_lr already multiplied by the images of
    an optimizer step, and so are those of `patterns`, the `LayerPattern`s of --lora_pattern.
    """

    optimizer: str
    use_8bit_adam: bool
    learning_rate: float
    text_encoder_lr: float | None
    adam_beta1: float
    adam_beta2: float
    adam_epsilon: float
    adam_weight_decay: float
    lr_scheduler: str
    lr_warmup_steps: int
    lr_num_cycles: int
    lr_power: float
    max_grad_norm: float
    gradient_accumulation_steps: int
    use_ema: bool
    ema_decay: float
    ema_update_after_step: int
    foreach_ema: bool
    offload_ema: bool
    patterns: tuple = ()


def optimizer_settings(args, batch_size):
    """The `OptimizerSettings` of a run whose optimizer steps have `batch_size` images."""
    factor = batch_size if args.scale_lr else 1
    text_rate = args.text_encoder_lr and args.text_encoder_lr * factor
    rates = {"learning_rate": args.learning_rate * factor, "text_encoder_lr": text_rate}
    patterns = tuple(replace(pattern, lr=pattern.lr and pattern.lr * factor) for pattern in patterns_of(args))
    return settings_from_flags(OptimizerSettings, args, **rates, patterns=patterns)


# ---------------------------------------------------------------------------------------------------------------------
# Optimizer, schedule, average


def parameter_groups(models, settings):
    """[{"params", "lr"}]: the trainable parameters of the denoiser, then those of the text encoders.

    A model has one group, and one more for each pattern of --lora_pattern that sets a rate in it, whatever the rate:
    a resumed run may have another --learning_rate.

    Args:
        models: {name in diffusers: model}.
    """
    text_rate = settings.learning_rate if settings.text_encoder_lr is None else settings.text_encoder_lr
    groups = {}
    for part, model in models.items():
        own = text_rate if part.startswith("text_encoder") else settings.learning_rate
        groups[part, None] = {"params": [], "lr": own}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                layer = layer_of(name)
                sets = [pattern for pattern in settings.patterns if pattern.lr and pattern.matches(part, layer)]
                key, rate = (sets[-1], sets[-1].lr) if sets else (None, own)
                groups.setdefault((part, key), {"params": [], "lr": rate})["params"].append(parameter)
    return [group for group in groups.values() if group["params"]]


def build_optimizer(settings, groups):
    """The optimizer of --optimizer and --use_8bit_adam for the `parameter_groups`."""
    betas, decay = (settings.adam_beta1, settings.adam_beta2), settings.adam_weight_decay
    rate = {"lr": settings.learning_rate}  # as the optimizer's default too: a polynomial schedule reads the default
    if settings.optimizer == "prodigy":
        from prodigyopt import Prodigy

        return Prodigy(
            groups, **rate, betas=betas, weight_decay=decay, eps=settings.adam_epsilon, use_bias_correction=True,
            safeguard_warmup=True,
        )  # fmt: skip
    if settings.optimizer == "adafactor":
        from transformers.optimization import Adafactor

        # A fixed learning rate. Scaled by a tensor's size, the step of LoRA's zero matrices would be next to nothing.
        return Adafactor(groups, **rate, weight_decay=decay, relative_step=False, scale_parameter=False)
    adamw = dict(**rate, betas=betas, weight_decay=decay, eps=settings.adam_epsilon)
    if settings.use_8bit_adam:
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(groups, **adamw)
    optimizer = torch.optim.AdamW(groups, **adamw, fused=on_cuda(groups) or None)
    if on_cuda(groups):
        optimizer.register_load_state_dict_pre_hook(keep_fused)
    return optimizer


def on_cuda(groups):
    """Whether the parameters are on a CUDA GPU. There AdamW is fused: PyTorch's default makes 4 bytes of temporaries
    per parameter. On the CPU the two round differently."""
    return groups[0]["params"][0].device.type == "cuda"


def keep_fused(optimizer, state):
    """The state of a checkpoint for a fused AdamW, whatever implementation wrote it."""
    return state | {"param_groups": [group | {"fused": True, "foreach": None} for group in state["param_groups"]]}


def build_lr_scheduler(settings, optimizer, total_steps):
    """The learning-rate schedule, counted in optimizer steps whatever the accumulation and the number of ranks."""
    from diffusers.optimization import get_scheduler

    return get_scheduler(
        settings.lr_scheduler,
        optimizer=optimizer,
        num_warmup_steps=settings.lr_warmup_steps,
        num_training_steps=total_steps,
        num_cycles=settings.lr_num_cycles,
        power=settings.lr_power,
    )


def build_ema(settings, parameters):
    """diffusers' `EMAModel` of the parameters, or None; of this rank's parts where the parameters are sharded."""
    if not settings.use_ema:
        return None
    from diffusers.training_utils import EMAModel

    ema = EMAModel(
        map(local_shard, parameters),
        decay=settings.ema_decay,
        update_after_step=settings.ema_update_after_step,
        foreach=settings.foreach_ema,
    )
    if settings.offload_ema:
        ema.to("cpu")
    return ema


def update_ema(ema, parameters, offload):
    """One step of the average; with `offload` computed on the parameters' device and kept on the CPU.

    Both copies run while the host goes on: PyTorch copies from a GPU into pinned memory where it need not wait. The
    CPU may read the average after a synchronisation only.
    """
    if offload:
        ema.to(parameters[0].device, non_blocking=True)
    ema.step(map(local_shard, parameters))
    if offload:
        ema.to("cpu", non_blocking=True)


def learning_rates(optimizer):
    """{log key: learning rate of the first group}; under Prodigy also the step size that it has found."""
    group = optimizer.param_groups[0]
    return {"lr": group["lr"]} | ({"lr/d*lr": group["d"] * group["lr"]} if "d" in group else {})


# ---------------------------------------------------------------------------------------------------------------------
# The step


@dataclass(frozen=True)
class Outcome:
    """What came of an optimizer step; the same on every rank."""

    made: bool  # False: a loss or gradient was not finite, and nothing was changed
    stop: bool  # a signal asked some rank to stop
    save: bool  # --checkpointing_minutes have gone by


class Trainee:
    """The model under training: optimizer, schedule, average, guard, and the ranks that share them.

    Attributes:
        bare: the script's `Denoiser` as it was built, for sampling, saving and loading.
        denoiser: the same as accelerate prepared it, for the training step.
        parameters: the trainable parameters, in the order of the optimizer's state.
        ema: diffusers' `EMAModel`, or None.
    """

    def __init__(self, settings, accelerator, denoiser, total_steps, guard):
        """
        Args:
            settings: `OptimizerSettings`.
            denoiser: the script's `Denoiser`, on its device, trainable parameters in float32.
            total_steps: optimizer steps of the whole run.
            guard: the `Guard` that reads whether a step is finite.
        """
        stage_ended("weights of the models")
        self.settings, self.accelerator, self.guard = settings, accelerator, guard
        self.bare = denoiser
        optimizer = build_optimizer(settings, parameter_groups(denoiser.models(), settings))
        self.lr_scheduler = build_lr_scheduler(settings, optimizer, total_steps)
        self.denoiser, self.optimizer = prepare(accelerator, denoiser, optimizer)
        self.parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        self.ema = build_ema(settings, self.parameters)
        # Of several ranks: gradients are views of DDP's buckets, which stay. Without them a micro-step that exchanges
        # nothing would make gradients beside the buckets, so that they took twice the memory.
        self.keeps_gradients = accelerator.num_processes > 1 and not is_sharded(accelerator)
        self.terms = None

    def micro_steps(self, batches):
        """Generator of the batch of each micro-step, inside the context in which its backward pass belongs.

        Ranks exchange gradients in the last micro-step only. Where gradients are sharded the ranks exchange them in
        each, since FSDP would keep whole gradients until then. The next batch is made after the backward pass was
        queued: a GPU is still computing it.

        Args:
            batches: the `Batches` of the run.
        """
        self.terms = 0.0
        for index in range(self.settings.gradient_accumulation_steps):
            last = index + 1 == self.settings.gradient_accumulation_steps
            each_time = last or is_sharded(self.accelerator)
            with contextlib.nullcontext() if each_time else self.accelerator.no_sync(self.denoiser):
                yield next(batches)
            batches.make_ahead()

    def backward(self, loss, terms=0.0):
        """The backward pass of a micro-step; adds its `terms`, a vector if it has any, to the step's means."""
        with during("computing the gradients"):
            self.accelerator.backward(loss)
        self.terms = self.terms + terms / self.settings.gradient_accumulation_steps

    @during("making an optimizer step")
    def step(self, step, wishes, metrics):
        """Clip, check, step, schedule and average at the end of the accumulation: an `Outcome`.

        A step that is not finite leaves weights, optimizer, schedule and average as they were.

        Args:
            step: number of the step, counted from 1.
            wishes: (stop, save), bools of this rank.
            metrics: takes the norm of the gradients.

        Raises:
            UserError: --max_nonfinite_steps steps in a row were not finite.
        """
        grad_norm = clip_gradients(
            self.accelerator, self.optimizer, self.parameters, self.settings.max_grad_norm or math.inf
        )
        finite, faults, wishes = self.guard.read(grad_norm, wishes)
        under_scaler = self.accelerator.scaler is not None  # fp16: the scaler skips the step itself, lowers its scale
        self.guard.record(faults, step, under_scaler=under_scaler)
        if finite:
            metrics.add("grad_norm", grad_norm)
        if finite or under_scaler:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=not self.keeps_gradients)
        if finite and not self.accelerator.optimizer_step_was_skipped:
            self.lr_scheduler.step()
            if self.ema is not None:
                update_ema(self.ema, self.parameters, self.settings.offload_ema)
        stage_ended("first step", last=True)
        return Outcome(finite, *wishes)

    @contextlib.contextmanager
    def averaged(self):
        """Context manager: the parameters hold the average inside, if there is one; their own values afterwards."""
        if self.ema is None:
            yield
            return
        parameters = [local_shard(parameter) for parameter in self.parameters]
        self.ema.store(parameters)
        self.ema.copy_to(parameters)
        try:
            yield
        finally:
            self.ema.restore(parameters)

    def log_values(self):
        """{log key: value} of the learning rate and the skipped steps."""
        return learning_rates(self.optimizer) | self.guard.counts()

    def release(self):
        """Drop the prepared model. It has to go before the ranks' process group ends: see `training.run.end`."""
        self.denoiser = None
