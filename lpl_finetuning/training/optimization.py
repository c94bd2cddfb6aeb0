"""What the recipes share and nobody would edit: models, optimizers, metrics, samples, the held-out loss."""

import contextlib
import math

import torch

from lpl_finetuning.training.sharding import clip, is_sharded, local_part


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
    """diffusers' EMA of the parameters, or None; of this rank's part of them where they are sharded."""
    if not args.use_ema:
        return None
    from diffusers.training_utils import EMAModel

    ema = EMAModel(
        map(local_part, parameters),
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
    ema.step(map(local_part, parameters))
    if offload:
        ema.to("cpu")


@contextlib.contextmanager
def averaged_weights(ema, parameters):
    """Inside, the parameters hold EMA's average (when there is one); afterwards their own values again."""
    if ema is None:
        yield
        return
    parameters = [local_part(parameter) for parameter in parameters]
    ema.store(parameters)
    ema.copy_to(parameters)
    try:
        yield
    finally:
        ema.restore(parameters)


def sync_gradients(accelerator, model, last):
    """Context of a micro-step: ranks exchange gradients on the last one only, or each time where they are sharded.

    FSDP would keep them whole until then.
    """
    return contextlib.nullcontext() if last or is_sharded(accelerator) else accelerator.no_sync(model)


def optimize(args, accelerator, optimizer, lr_scheduler, ema, parameters, metrics, guard, step, wishes):
    """The optimizer step at the end of the accumulation: clip, look, step, schedule, average.

    A step that is not finite is skipped and leaves everything as it was. Returns (whether it was made, *whether any
    rank has each of the wishes); wishes: this rank's, bools.
    """
    grad_norm = clip(accelerator, optimizer, parameters, args.max_grad_norm or math.inf)  # 0: no clipping
    finite, faults, wishes = guard.read(grad_norm, wishes)
    guard.judge(faults, step, under_scaler=accelerator.scaler is not None)
    if finite:
        metrics.add("grad_norm", grad_norm)
    if finite or accelerator.scaler is not None:  # which skips the step itself, and lowers its scale
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if finite and not accelerator.optimizer_step_was_skipped:
        lr_scheduler.step()
        if ema is not None:
            update_ema(ema, parameters, args.offload_ema)
    return finite, *wishes
