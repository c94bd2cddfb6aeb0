"""Memory and arithmetic of a training step, counted: the run's own code takes a step on the meta device.

The count covers models, gradients, optimizer, average, activations and temporaries: every storage that is made. It
does not cover CUDA's context, workspaces of cuDNN and fragmentation.
"""

import contextlib
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple
from unittest import mock

import torch
from accelerate.utils import DistributedType, convert_outputs_to_fp32

import lpl_utils
from lpl_finetuning.base_model import read_json
from lpl_finetuning.evaluation.onestep import OneStepMeter
from lpl_finetuning.flag_checks import holds_out
from lpl_finetuning.flags import framing_rules
from lpl_finetuning.sample_prompts import pictures_at_once
from lpl_finetuning.stages import no_stages
from lpl_finetuning.training.live_memory import LiveBytes, Peak, cuda_rules
from lpl_finetuning.training.models import decode_latents, latent_space, load_vae
from lpl_finetuning.training.objective import build_objective, with_noise
from lpl_finetuning.training.optimization import Trainee, optimizer_settings, update_ema
from lpl_finetuning.training.perceptual import lpl_dtype, lpl_stages, needs_decoder
from lpl_finetuning.training.reporter import Metrics
from lpl_utils import LatentSpace, LPLGate

WEIGHTS, GRADIENTS, STATE, AVERAGE = "weights", "gradients", "optimizer state", "EMA"
FROZEN, FEATURES = "autoencoder", "other networks of the loss"


class RunCode(NamedTuple):
    """The functions of a training script that a step runs.

    Attributes:
        build_denoiser: (args, dtype, device) -> the script's `Denoiser`.
        training_step: (batch, denoiser, objective, step, metrics) -> (loss, terms).
        example_batch: (denoiser, args, (h, w), dtype) -> a micro-batch as the loader gives it, on the CPU.
        networks: (args, machine) -> the frozen `Networks`.
        held_out: the functions that `Validation` measures held-out images with; None: the script measures none.
    """

    build_denoiser: Callable
    training_step: Callable
    example_batch: Callable
    networks: Callable
    held_out: tuple | None = None


class Networks(NamedTuple):
    """The frozen networks of a step; each may be None.

    Attributes:
        decoder: decodes in the loss and for pictures; stages: {network: `FeatureStages`} of the loss.
        encoder: encodes the images of every step.
        space: the `LatentSpace` of the latents.
    """

    decoder: torch.nn.Module
    stages: dict
    encoder: torch.nn.Module
    space: LatentSpace


def autoencoder_networks(args, machine):
    """The `Networks` of a family with an autoencoder."""
    base, vae, encoder = args.base_model, None, None
    measured = args.use_lpl or holds_out(args)
    if needs_decoder(args, measured):
        vae = load_vae(base, lpl_dtype(args, machine.mixed_precision), machine.device)
    if machine.encodes:
        encoder = load_vae(base, torch.float32, machine.device)
    return Networks(vae, lpl_stages(args, vae, machine) if measured else None, encoder, latent_space(base))


@dataclass(frozen=True)
class Machine:
    """What a count follows from besides the flags.

    Attributes:
        mixed_precision: "no", "bf16" or "fp16".
        ranks: processes.
        encodes: whether the images of every step are encoded in the step.
        device: "meta"; the CPU in tests, where the step runs.
    """

    mixed_precision: str
    ranks: int = 1
    encodes: bool = False
    device: str = "meta"


class CountingAccelerator:
    """What `Trainee` and `Objective` need of accelerate's `Accelerator`, for a step that is counted."""

    distributed_type, process_index, is_main_process = DistributedType.NO, 0, True
    scaler, optimizer_step_was_skipped = None, False

    def __init__(self, machine, dtype, counter):
        self.device, self.num_processes = torch.device(machine.device), machine.ranks
        self.dtype, self.counter = dtype, counter

    def prepare(self, denoiser, optimizer):
        """The denoiser under autocast with float32 outputs, as accelerate prepares it, and the optimizer."""
        forward, dtype = denoiser.forward, self.dtype

        def forward_in_autocast(*args, **kwargs):
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32, cache_enabled=False):
                return forward(*args, **kwargs)

        denoiser.forward = convert_outputs_to_fp32(forward_in_autocast)
        return denoiser, optimizer

    def backward(self, loss):
        """The backward pass; fp16's scale changes no sizes."""
        self.counter.where = "backward: of the losses"
        torch.autograd.backward(loss)  # `loss.backward` would leave `CudaRules`
        self.counter.where = "backward: end"

    def clip_grad_norm_(self, parameters, max_norm):
        """The norm of the gradients, which are clipped."""
        self.counter.where = "optimizer step: clipping"
        return torch.nn.utils.clip_grad_norm_(parameters, max_norm)

    def reduce(self, value, how):
        """The value of this rank."""
        return value


class NoGuard:
    """A `Guard` that reads nothing: every step is finite."""

    def watch(self, term, values, images):
        """Take nothing."""

    def read(self, grad_norm, requests=()):
        """Finite, without faults."""
        return True, [], requests

    def record(self, faults, step, under_scaler=False):
        """Count nothing."""


class NamedStages:
    """A network's `FeatureStages` that tell the counter which stage runs, for target, estimate and gradient."""

    def __init__(self, stages, counter):
        self.stages, self.counter = stages, counter

    def __len__(self):
        return len(self.stages)

    def __getattr__(self, name):
        return getattr(self.stages, name)

    def run(self, index, x):
        """See `FeatureStages.run`."""
        return self.named(index, lambda x: self.stages.run(index, x), x)

    def pieces(self, index):
        """The pieces of a stage; one where the network has none."""
        pieces = self.stages.pieces(index) if hasattr(self.stages, "pieces") else [lambda x: self.stages.run(index, x)]
        return [NamedPiece(self, index, piece) for piece in pieces]

    def named(self, index, compute, x):
        """The features that a function computes of x, with the counter told what runs."""
        name, counter, again = self.stages.names[index], self.counter, torch.is_grad_enabled()
        counter.where = f"LPL: {'recomputation' if again else 'forward'} of the {name}"
        features = compute(x)
        if features.requires_grad:
            features.register_hook(lambda gradient: setattr(counter, "where", f"LPL: backward of the {name}"))
        counter.where = f"LPL: comparison of the {name}"
        return features


class NamedPiece:
    """A piece of a stage of `NamedStages`, which tells the counter that it runs."""

    def __init__(self, stages, index, piece):
        self.stages, self.index, self.piece = stages, index, piece
        if hasattr(piece, "input_gradient"):
            self.input_gradient = self._input_gradient

    def __call__(self, x):
        return self.stages.named(self.index, self.piece, x)

    def _input_gradient(self, x, held):
        """See `lpl_utils.ResnetPiece.input_gradient`."""
        self.stages.counter.where = f"LPL: backward of the {self.stages.names[self.index]}"
        return self.piece.input_gradient(x, held)


# ---------------------------------------------------------------------------------------------------------------------
# Models


class FrozenQuantized(torch.nn.Module):
    """A frozen linear layer in 4 or 8 bits, as bitsandbytes keeps it; each pass makes a temporary weight."""

    def __init__(self, linear, bits):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.dtype, count = linear.weight.dtype, linear.weight.numel()
        make = {"device": linear.weight.device}
        self.weight = torch.nn.Parameter(torch.empty(count * bits // 8, dtype=torch.uint8, **make), False)
        scales = count // 64 + count // 64 // 256 * 4 if bits == 4 else 4 * self.out_features  # nf4: scaled twice
        self.scales = torch.nn.Parameter(torch.empty(scales, dtype=torch.uint8, **make), False)
        self.bias = linear.bias

    def forward(self, x):
        """The output (..., out_features), in the dtype that x has."""
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else self.dtype
        return _Dequantized.apply(x.to(dtype), self.out_features, self.bias).to(x.dtype)


class _Dequantized(torch.autograd.Function):
    """A linear layer whose weight is made for the forward pass and again for the backward pass."""

    @staticmethod
    def forward(ctx, x, out_features, bias):
        ctx.features = out_features, x.shape[-1]
        return torch.nn.functional.linear(x, x.new_empty(ctx.features), bias)

    @staticmethod
    def backward(ctx, grad):
        return grad @ grad.new_empty(ctx.features), None, None


def quantize(args, denoiser):
    """Put the frozen linear layers of the denoiser into 4 or 8 bits, with PEFT's layers for them."""
    bits = 4 if read_json(args.bnb_quantization_config_path).get("load_in_4bit") else 8
    model = next(iter(denoiser.models().values()))
    frozen = [(name, module) for name, module in model.named_modules()
              if type(module) is torch.nn.Linear and not module.weight.requires_grad]  # fmt: skip
    for name, module in frozen:
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, FrozenQuantized(module, bits))
    with contextlib.suppress(ImportError, AttributeError):
        from peft.tuners.lora import bnb, layer

        quantized = bnb.Linear4bit if bits == 4 else bnb.Linear8bitLt
        for module in model.modules():
            if type(module) is layer.Linear:
                module.__class__ = quantized


def name_blocks(model, part, counter):
    """Tell the counter which block of a model runs, forward or backward."""

    def watch(name, module):
        def before(module, inputs):
            again = counter.where.startswith("backward")
            counter.where = f"backward: recomputation of {name}" if again else f"forward: {name}"

        def after(module, inputs, output):
            first = output[0] if isinstance(output, tuple) else getattr(output, "sample", output)
            if isinstance(first, torch.Tensor) and first.requires_grad:
                first.register_hook(lambda gradient: setattr(counter, "where", f"backward: {name}"))

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)

    for name, module in model.named_modules():
        if 0 < len(name.split(".")) <= 2 and not isinstance(module, torch.nn.ModuleList):
            watch(f"{part}.{name}", module)


def name_encoding(encoder, counter):
    """Tell the counter when images are encoded: a phase of its own."""
    encode = encoder.encode

    def encode_named(images):
        with counter.at("encoding: images"):
            return encode(images)

    encoder.encode = encode_named


def hold_models(counter, denoiser, frozen):
    """Count the weights and buffers of the models."""
    counter.hold(WEIGHTS, [*denoiser.parameters(), *denoiser.buffers()])
    for model in frozen:
        if model is not None:
            counter.hold(FROZEN, [*model.parameters(), *model.buffers()])


def kept_bytes(args, denoiser):
    """{kind: bytes} of what a device holds throughout a run, without a count.

    Args:
        denoiser: on the meta device; is quantized here where the flags say so.
    """
    if args.bnb_quantization_config_path:
        quantize(args, denoiser)
    trained = sum(parameter.nbytes for parameter in denoiser.parameters() if parameter.requires_grad)
    state = 0.5 if args.use_8bit_adam else {"adamw": 2, "prodigy": 4, "adafactor": 0}[args.optimizer]
    return {
        WEIGHTS: sum(tensor.nbytes for tensor in (*denoiser.parameters(), *denoiser.buffers())),
        GRADIENTS: trained,
        STATE: int(state * trained),
        AVERAGE: trained if args.use_ema and not args.offload_ema else 0,
    }


# ---------------------------------------------------------------------------------------------------------------------
# The step


@contextlib.contextmanager
def few_blocks():
    """Context manager: the comparison of the perceptual loss takes two blocks of each feature map.

    Blocks are of one size, and what a block makes is freed before the next one.
    """
    every = lpl_utils.blocks_of
    with mock.patch.object(lpl_utils, "blocks_of", lambda *args: itertools.islice(every(*args), 2)):
        yield


def count_step(args, plan, code, machine, denoiser=None):
    """{phase: Peak} of a step on one device, every sample gated, all gradients and states there as in a later step.

    Args:
        plan: the `Plan`; code: the `RunCode`; machine: the `Machine`.
        denoiser: on the machine's device, as the flags build it; the count changes it. Default: a new one.
    """
    args = args.but(lpl_weight=1.0)
    few = few_blocks() if machine.device == "meta" else contextlib.nullcontext()
    denoiser = denoiser or code.build_denoiser(args, plan.dtype, machine.device)
    with no_stages(), few, cuda_rules(), LiveBytes(machine.device) as counter:
        accelerator = CountingAccelerator(machine, plan.dtype, counter)
        if args.bnb_quantization_config_path:
            quantize(args, denoiser)
        objective, vae = counting_objective(args, plan, code, machine, accelerator, denoiser)
        hold_models(counter, denoiser, (vae, objective.encoder))
        trainee = warm_trainee(args, plan, machine, accelerator, denoiser, objective.guard)
        for name, model in denoiser.models().items():
            name_blocks(model, name, counter)
        counter.where = "forward: inputs"
        counter.peaks.clear()
        counter.flop.clear()
        one_step(args, plan, code, trainee, objective, counter)
        flop = dict(counter.flop)  # of the step alone: what follows is validation
        if holds_out(args) and code.held_out:
            held_out_once(args, plan, trainee, objective, code, counter)
        if args.validation_metrics:
            test_once(args, trainee, vae, objective, code, counter)
        if args.validation_prompt:
            sample_once(args, trainee, vae, objective, code, counter)
    return {phase: replace(peak, flop=flop.get(phase, 0)) for phase, peak in counter.peaks.items()}


def latent_size(args):
    """(h, w) of the latents of the largest bucket."""
    pixels = args.base_model.family.pixels_per_latent
    return tuple(side // pixels for side in framing_rules(args).largest_size())


def counting_batch(args, plan, code, encodes, denoiser):
    """A micro-batch of zeros on the CPU, as the loader gives it."""
    h, w = latent_size(args)
    batch = code.example_batch(denoiser, args, (h, w), plan.dtype)
    if encodes:
        size = [side * args.base_model.family.pixels_per_latent for side in (h, w)]
        del batch["mean"], batch["std"]
        batch["pixel_values"] = torch.zeros(args.train_batch_size, 3, *size)
    return batch


@dataclass(frozen=True)
class NoData:
    """The `RunData` of a counted step: no images."""

    images: tuple = ()
    held_out: tuple = ()


def counting_objective(args, plan, code, machine, accelerator, denoiser):
    """(the run's `Objective` with a gate that takes every sample, decoder or None)."""
    networks = code.networks(args, machine)
    stages = None
    if networks.stages:
        stages = {name: NamedStages(each, accelerator.counter) for name, each in networks.stages.items()}
        held = [each.network for each in networks.stages.values() if hasattr(each, "network")]
        accelerator.counter.hold(FEATURES, [tensor for network in held for tensor in network.parameters()])
    batch = counting_batch(args, plan, code, machine.encodes, denoiser)
    empty = {name: value[0] for name, value in batch.items() if name not in OWN_COLUMNS}
    gate = LPLGate(t_threshold=math.inf)
    objective = build_objective(
        args, accelerator, plan, NoData(), networks.space, stages, networks.encoder, empty, True, gate
    )
    if networks.encoder is not None:
        name_encoding(networks.encoder, accelerator.counter)
    return replace(objective, guard=NoGuard()), networks.decoder


OWN_COLUMNS = ("number", "index", "mean", "std", "pixel_values", "time_ids")  # of a batch; the others are the prompt


def warm_trainee(args, plan, machine, accelerator, denoiser, guard):
    """The `Trainee` after its first step, with the optimizer's state and the gradients of other micro-steps."""
    counter = accelerator.counter
    with counter.at("start"):
        trainee = Trainee(optimizer_settings(args, plan.batch_size), accelerator, denoiser, plan.total_steps, guard)
        for parameter in trainee.parameters:
            parameter.grad = torch.zeros_like(parameter)
            parameter.register_post_accumulate_grad_hook(lambda it: counter.hold(GRADIENTS, [it.grad]))
        counter.hold(GRADIENTS, [parameter.grad for parameter in trainee.parameters])
        first_optimizer_step(trainee.optimizer)
        counter.hold(STATE, tensors_of(trainee.optimizer.state))
        if trainee.ema is not None:
            counter.hold(AVERAGE, trainee.ema.shadow_params)
        if machine.ranks == 1 and args.gradient_accumulation_steps == 1:
            trainee.optimizer.zero_grad(set_to_none=True)
    return trainee


def tensors_of(value):
    """All tensors in nested dictionaries and lists."""
    if isinstance(value, torch.Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for item in items for tensor in tensors_of(item)]


def first_optimizer_step(optimizer):
    """Make the optimizer's state."""
    if hasattr(optimizer, "init_state"):  # bitsandbytes: its kernels take no meta tensors
        for gindex, group in enumerate(optimizer.param_groups):
            for pindex, parameter in enumerate(group["params"]):
                optimizer.init_state(group, parameter, gindex, pindex)
    elif isinstance(optimizer, torch.optim.AdamW) and optimizer.param_groups[0]["params"][0].is_meta:
        for group in optimizer.param_groups:  # a step's temporaries are none of a later step: see `optimizer_step`
            for parameter in group["params"]:
                optimizer.state[parameter] = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
    else:
        optimizer.step()


def optimizer_step(optimizer):
    """A later step of the optimizer, with its temporaries; AdamW is fused on CUDA, and makes none."""
    if not isinstance(optimizer, torch.optim.AdamW) and not hasattr(optimizer, "init_state"):
        optimizer.step()


def one_step(args, plan, code, trainee, objective, counter):
    """The last micro-step of a step, and the step of the optimizer."""
    batch = counting_batch(args, plan, code, objective.encoder is not None, trainee.bare)
    batch = with_noise(batch, objective)
    metrics, step = Metrics(objective.device), args.lpl_start
    trainee.terms = 0.0
    loss, terms = code.training_step(batch, trainee.denoiser, objective, step, metrics)
    trainee.backward(loss, terms)
    del loss, terms
    trainee.accelerator.clip_grad_norm_(trainee.parameters, args.max_grad_norm or math.inf)
    counter.where = "optimizer step: weights"
    optimizer_step(trainee.optimizer)
    trainee.optimizer.zero_grad(set_to_none=True)
    if trainee.ema is not None:
        counter.where = "optimizer step: EMA"
        update_ema(trainee.ema, trainee.parameters, args.offload_ema)
    counter.where = "between steps"


def held_out_once(args, plan, trainee, objective, code, counter):
    """The losses of a batch of held-out images at a noise level within the gate, as `Validation` measures them."""
    conditioning, held_out_step, _ = code.held_out
    batch = counting_batch(args, plan, code, False, trainee.bare)
    latents = batch["mean"].to(objective.device)
    timesteps = objective.schedule.held_out_timesteps(1).repeat(len(latents))
    trainee.bare.eval()
    with torch.no_grad(), counter.at("held-out loss: denoiser"):
        conditions = conditioning(batch, objective, 0)
        held_out_step(conditions, latents, torch.zeros_like(latents), timesteps, True, trainee.denoiser, objective)
    trainee.bare.train()


def test_once(args, trainee, vae, objective, code, counter):
    """The one-step test of --validation_metrics at a noise level, the denoiser aside: it needs less than in a step."""
    at_once = min(args.train_batch_size, pictures_at_once(args.resolution, args.resolution))
    shape = code.example_batch(trainee.bare, args, latent_size(args), torch.float32)["mean"].shape[1:]
    z0, meter = torch.zeros(at_once, *shape, device=objective.device), OneStepMeter(vae)
    with counter.at("one-step test: targets"):
        target = meter.target(z0)
        counter.where = "one-step test: estimates"
        meter.compare(z0, target)


def sample_once(args, trainee, vae, objective, code, counter):
    """A step of sampling and the decoding of pictures, as many at a time as validation samples."""
    at_once = min(args.num_validation_images, pictures_at_once(args.resolution, args.resolution))
    side = args.resolution // args.base_model.family.pixels_per_latent
    batch = code.example_batch(trainee.bare, args.but(train_batch_size=2 * at_once), (side, side), objective.dtype)
    prompt = {name: value.to(objective.device) for name, value in batch.items() if name not in OWN_COLUMNS}
    more = [batch["time_ids"].to(objective.device)] if "time_ids" in batch else []
    latents = batch["mean"].to(objective.device, objective.dtype)
    trainee.bare.eval()
    with torch.no_grad(), counter.at("sampling: denoiser"):
        trainee.bare(latents, torch.zeros(2 * at_once, device=objective.device), prompt, *more)
        counter.where = "sampling: decoder"
        decode_latents(vae, latents[:at_once])
    trainee.bare.train()


def highest(peaks):
    """The `Peak` of the phase with the most bytes."""
    return max(peaks.values(), key=lambda peak: peak.size, default=Peak(0, "", {}))


def flop_of_step(peaks):
    """Floating-point operations of a micro-step, (without the perceptual loss, of the perceptual loss of all samples).

    peaks: of `count_step`.
    """
    lpl = peaks["LPL"].flop if "LPL" in peaks else 0
    return sum(peak.flop for peak in peaks.values()) - lpl, lpl
