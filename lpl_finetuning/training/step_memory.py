"""The memory of a training step, counted: the run's own step on the meta device, in the place of a CUDA GPU."""

import contextlib
from dataclasses import asdict, dataclass, replace
from types import SimpleNamespace

import numpy as np
import torch
from accelerate.utils import DistributedType

from lpl_finetuning.flags import framing_rules
from lpl_finetuning.training.live_memory import CudaRules, LiveStorages, as_on_cuda
from lpl_finetuning.training.optimization import Trainee, build_ema, optimizer_settings
from lpl_finetuning.training.reporter import Metrics
from lpl_utils import LatentPerceptualLoss, LPLGate

META = torch.device("meta")
EVERY_SAMPLE = LPLGate(t_threshold=float("inf"))


@dataclass(frozen=True)
class Script:
    """The functions of a training script that a step is made of; each field has the function's name."""

    build_denoiser: object
    prepare_objective: object
    training_step: object
    example_inputs: object
    decode: object  # function (autoencoder, latents) -> images


class MetaAccelerator:
    """What a run asks of its accelerator, for one GPU whose place the meta device takes."""

    device, distributed_type, num_processes = META, DistributedType.NO, 1
    is_main_process, optimizer_step_was_skipped, scaler = True, False, None

    def __init__(self, mixed_precision, dtype, accumulation, rules, live):
        self.mixed_precision, self.dtype, self.gradient_accumulation_steps = mixed_precision, dtype, accumulation
        self.rules, self.live = rules, live

    def prepare(self, denoiser, optimizer):
        """Put autocast around the forward pass, with an output in float32, as accelerate does."""
        forward = denoiser.forward

        def forward_in_autocast(*args, **kwargs):
            with self.live.labelled("forward pass"):
                with self.rules.autocast(self.dtype):
                    result = forward(*args, **kwargs)
                return result.float()

        denoiser.forward = forward_in_autocast
        return denoiser, optimizer

    def backward(self, loss):
        """The backward pass of a micro-step."""
        with self.live.labelled("backward pass"):
            (loss / self.gradient_accumulation_steps).backward()

    def no_sync(self, model):
        """Gradients are not exchanged."""
        return contextlib.nullcontext()

    def clip_grad_norm_(self, parameters, max_norm):
        """Clip the gradients, as accelerate does."""
        with self.live.labelled("clipping of gradients"):
            return torch.nn.utils.clip_grad_norm_(parameters, max_norm)


class LabelledStages:
    """`FeatureStages` that label what the loss runs by the stage."""

    def __init__(self, stages, live):
        self.stages, self.live = stages, live

    def __len__(self):
        return len(self.stages)

    def __getattr__(self, name):
        return getattr(self.stages, name)

    def run(self, index, x):
        """See `FeatureStages.run`. With gradient checkpointing a stage runs with a graph in the backward pass only."""
        again = "recomputation and backward of" if torch.is_grad_enabled() else "forward and comparison of"
        self.live.label = f"LPL: {again} {self.stages.names[index]}"
        return self.stages.run(index, x)


def count_step(args, plan, script, mixed_precision):
    """Return the `LiveStorages` that have followed a step of a run on one GPU.

    Args:
        plan: the `Plan`; script: the `Script`; mixed_precision: "no", "fp16" or "bf16".
    """
    args = args.but(proportion_empty_prompts=0.0)
    rules, live = CudaRules(), LiveStorages()
    accelerator = MetaAccelerator(mixed_precision, plan.dtype, args.gradient_accumulation_steps, rules, live)
    denoiser = script.build_denoiser(args, plan.dtype, "meta")
    for model in denoiser.models().values() if args.gradient_checkpointing else ():
        repeat_in_autocast(model, rules)
    inputs = script.example_inputs(denoiser, args, latent_size(args), plan.dtype)
    batch, data = example_batch(args, inputs)
    objective, vae = script.prepare_objective(args, accelerator, plan, data)
    if objective.perceptual is not None:
        objective.perceptual.gate = EVERY_SAMPLE
        loss = objective.perceptual.loss
        objective.perceptual.loss = LatentPerceptualLoss(LabelledStages(loss.stages, live), loss.config)
    with as_on_cuda(rules), live:
        live.add(list(denoiser.parameters()) + list(denoiser.buffers()), "weights")
        for network, tag in ((vae, "decoder"), (objective.encoder, "encoder")):
            if network is not None:
                live.add(list(network.parameters()), tag)
        run_step(args, plan, script, accelerator, denoiser, objective, batch)
    return live


def run_step(args, plan, script, accelerator, denoiser, objective, batch):
    """Run a step after others: with the optimizer's state, and with gradients where steps have several micro-steps."""
    live, settings = accelerator.live, optimizer_settings(args, plan.batch_size)
    kept = replace(settings, use_ema=settings.use_ema and not settings.offload_ema)
    trainee, metrics = Trainee(kept, accelerator, denoiser, plan.total_steps, objective.guard), Metrics(META)
    if trainee.ema is not None:
        live.add(trainee.ema.shadow_params, "EMA")
    fill_gradients(trainee.parameters)
    trainee.optimizer.step()
    trainee.optimizer.zero_grad(set_to_none=True)
    live.add(list(trainee.optimizer.state.values()), "optimizer state")
    if settings.gradient_accumulation_steps > 1:
        fill_gradients(trainee.parameters)
    live.begin()
    step = args.lpl_start or 0
    for _ in trainee.micro_steps():
        loss, terms = script.training_step(batch, trainee.denoiser, objective, step, metrics)
        trainee.backward(loss, terms)
        del loss, terms
        break
    live.add([parameter.grad for parameter in trainee.parameters], "gradients")
    live.label = "optimizer step"
    trainee.step(1, (False, False), metrics)
    if settings.use_ema and settings.offload_ema:
        live.label = "average of weights"
        ema = build_ema(replace(settings, offload_ema=False), trainee.parameters)
        ema.step(trainee.parameters)


def fill_gradients(parameters):
    """Give each parameter a gradient."""
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)


def repeat_in_autocast(model, rules):
    """Give a model with gradient checkpointing autocast in the repetition of its blocks."""
    arguments = {"use_reentrant": False, "context_fn": rules.contexts_of_checkpointing}
    if hasattr(model, "enable_gradient_checkpointing"):  # diffusers
        model.enable_gradient_checkpointing(lambda *args: torch.utils.checkpoint.checkpoint(*args, **arguments))
    else:
        model.gradient_checkpointing_enable(arguments)


def latent_size(args):
    """Return (h, w) of the latents of the largest bucket."""
    pixels = args.base_model.family.pixels_per_latent
    return tuple(side // pixels for side in framing_rules(args).largest_size())


def example_batch(args, inputs):
    """Return (a micro-batch on the meta device, the `RunData` that it could come from).

    Args:
        inputs: from the script's `example_inputs`.
    """
    latents, _, prompt, *_ = inputs
    size, cached = len(latents), args.center_crop or bool(args.cache_variants)
    numbers = np.arange(size)
    batch = {"number": numbers, "index": numbers, "time_ids": torch.zeros(size, 6), **prompt}
    if cached:
        batch |= {"mean": torch.empty_like(latents, dtype=torch.float32, device=META)}
        batch |= {"std": torch.empty_like(batch["mean"])}
    else:
        batch |= {"pixel_values": torch.empty(size, 3, *framing_rules(args).largest_size(), device=META)}
    row = {name: value[0] for name, value in prompt.items()}
    return batch, SimpleNamespace(prompt=lambda caption: row, held_out=(), images=(), cached=cached)
