"""Sharded training (DeepSpeed's ZeRO-2 and ZeRO-3): what can be divided, an engine for one step, parts and wholes.

Under both each rank keeps a part of gradients and AdamW's state, under ZeRO-3 of the weights too: a parameter is then
empty, and `ds_tensor` is this rank's part of it, flat, and padded so that all parts have one size. DeepSpeed's own
checkpoints are not used. DeepSpeed is imported only when used.
"""

import contextlib
import functools
import json
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch.distributed
from accelerate.utils import DistributedType
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from lpl_finetuning.errors import require
from lpl_finetuning.flag_checks import wants

BUCKET = 50_000_000  # elements that are exchanged, or gathered ahead, at a time


def is_zero(accelerator):
    """Whether DeepSpeed divides what a rank has."""
    return accelerator.distributed_type == DistributedType.DEEPSPEED


def zero_stage(accelerator):
    """2 or 3; 0 without DeepSpeed."""
    return accelerator.state.deepspeed_plugin.zero_stage if is_zero(accelerator) else 0


# ---------------------------------------------------------------------------------------------------------------------
# Setting up


def check_zero_devices():
    """Raise UserError for DeepSpeed without GPUs: accelerate would take each rank for alone. Tests ask for it."""
    require(
        not wants("DEEPSPEED") or torch.accelerator.is_available() or os.environ.get("DS_ACCELERATOR") == "cpu",
        "accelerate is configured for DeepSpeed, which needs GPUs, and none is here: leave it out",
    )


def set_up_zero(accelerator, max_grad_norm):
    """Set accelerate up for this program."""
    from transformers.integrations import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()  # transformers would take the text encoders apart, diffusers' EMA gather everything
    accelerator.state.deepspeed_plugin.gradient_clipping = max_grad_norm


def engine_config(accelerator):
    """DeepSpeed's configuration. No `bf16`: weights and sums stay in float32, and autocast computes, as always."""
    plugin = accelerator.state.deepspeed_plugin
    clip = plugin.gradient_clipping
    return {
        "train_micro_batch_size_per_gpu": 1,  # counts nothing here, but has to be there
        "gradient_accumulation_steps": accelerator.gradient_accumulation_steps,
        "managed_gradient_accumulation": False,  # a step is made when it is called
        "gradient_clipping": 0.0 if clip == float("inf") else clip,
        "zero_optimization": {
            "stage": plugin.zero_stage,
            "reduce_bucket_size": BUCKET,
            "allgather_bucket_size": BUCKET,
            "stage3_prefetch_bucket_size": BUCKET,
            "stage3_max_live_parameters": BUCKET,
            "stage3_max_reuse_distance": BUCKET,
            "stage3_param_persistence_threshold": 0,  # what stayed gathered would hide what is written to the parts
            "memory_efficient_linear": False,  # it rounds before it adds the bias
        },
    }


def build_zero_engine(accelerator, model, optimizer):
    """(engine to call in place of the model, which is divided in place; the `ZeroAdamW`)."""
    import deepspeed

    config = engine_config(accelerator)
    if zero_stage(accelerator) == 3:
        deepspeed.zero.Init(module=model, config_dict_or_path=config)  # tensor by tensor: the GPU never has the whole
        model.to(accelerator.device)  # buffers
    groups = [{**group, "params": list(group["params"])} for group in optimizer.param_groups]
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.AdamW(groups), config=config, dist_init_required=False
    )
    accelerator.deepspeed_engine_wrapped = ZeroAdamW(engine, optimizer)  # whose `backward` accelerate calls
    return engine, accelerator.deepspeed_engine_wrapped


def zero_autocast(accelerator):
    """Function that gives the context to compute in; accelerate's own is off under DeepSpeed."""
    enabled = accelerator.mixed_precision == "bf16"
    return functools.partial(torch.autocast, accelerator.device.type, torch.bfloat16, enabled=enabled)


def has_zero_engine(model):
    """Whether an engine has the model: its parameters are marked."""
    parameter = next(model.parameters())
    return is_zero3_parameter(parameter) or hasattr(parameter, "_hp_mapping")


class ZeroAdamW:
    """AdamW, of whose state each rank has a part, as loop and checkpoints know an optimizer.

    optimizer: what the LR schedule knows; its groups have the settings and the model's parameters, it has no state.
    The one in the engine has flat parts for parameters, and gets the settings before every step.
    """

    def __init__(self, engine, optimizer):
        self.engine, self.optimizer = engine, optimizer
        self.flat = (
            engine.optimizer.fp32_partitioned_groups_flat
            if engine.zero_optimization_stage() == 3
            else engine.optimizer.single_partition_of_fp32_groups
        )
        for part in self.flat:  # what AdamW would do in its first step, since a checkpoint may be loaded before
            self.inner.state[part] = {"step": torch.tensor(0.0)} | {
                name: torch.zeros_like(part, requires_grad=False) for name in ("exp_avg", "exp_avg_sq")
            }
        if engine.zero_optimization_stage() == 2:
            engine.optimizer._lazy_init_hp_params_optimizer_state()  # as after a first step

    @property
    def inner(self):
        """The AdamW of the engine."""
        return self.engine.optimizer.optimizer

    @property
    def param_groups(self):
        """The settings, and the model's parameters."""
        return self.optimizer.param_groups

    def parameters(self):
        """Those of the model, in the order of the state."""
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def backward(self, loss, **_):
        """Add to the gradients; accelerate's own wrapper would make the step too."""
        self.engine.backward(loss)

    def clip_and_step(self):
        """Clip and step, unless the gradients are not finite; their norm, which is then inf."""
        for theirs, ours in zip(self.inner.param_groups, self.param_groups, strict=True):
            theirs.update({name: value for name, value in ours.items() if name != "params"})
        self.engine.step()
        norm = self.engine.get_global_grad_norm() if self.engine.was_step_applied() else float("inf")
        return torch.as_tensor(norm, dtype=torch.float32, device=self.engine.device)

    def step(self):
        """For the LR schedule, which looks whether there was one: made in `clip_and_step`, no gradient is left."""
        self.optimizer.step()

    def zero_grad(self, set_to_none=True):
        """Done by the engine."""

    def state_dict(self):
        """As of a torch optimizer, with a `ZeroTensor` for each tensor that is divided."""
        from deepspeed.utils import safe_get_full_optimizer_state

        def part(parameter, name):
            return ZeroTensor(parameter, lambda: safe_get_full_optimizer_state(parameter, name))

        step = next(iter(self.inner.state.values()))["step"]
        state = {index: {"step": step.clone()} | {name: part(parameter, name) for name in ("exp_avg", "exp_avg_sq")}
                 for index, parameter in enumerate(self.parameters())}  # fmt: skip
        return {"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]}

    def load_state_dict(self, state):
        """Take what `state_dict` gave, or a torch AdamW's; each tensor whole, or this rank's part under ZeRO-3."""
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        parameters = self.parameters()
        for index, entries in state["state"].items():
            parameter = parameters[index]
            put = safe_set_local_optimizer_state if is_zero3_parameter(parameter) else safe_set_full_optimizer_state
            for name in ("exp_avg", "exp_avg_sq"):
                put(parameter, entries[name].to(self.engine.device), name)
            for part in self.flat:
                self.inner.state[part]["step"].copy_(entries["step"])
        self.optimizer.load_state_dict({"state": {}, "param_groups": state["param_groups"]})


# ---------------------------------------------------------------------------------------------------------------------
# Parts and wholes


@dataclass(frozen=True)
class ZeroTensor:
    """A tensor of a parameter's shape, of which this rank has a part; `full_tensor` gathers it on all ranks."""

    parameter: torch.nn.Parameter
    full_tensor: Callable

    def numel(self):
        """Of the whole tensor."""
        return full_numel(self.parameter)

    def element_size(self):
        """Bytes: float32."""
        return 4


def is_zero3_parameter(tensor):
    """Whether it is a parameter under ZeRO-3."""
    return hasattr(tensor, "ds_tensor")


def full_numel(tensor):
    """Of the whole tensor, which may be a parameter under ZeRO-3."""
    return tensor.ds_numel if is_zero3_parameter(tensor) else tensor.numel()


def zero3_shard(value, parameter):
    """This rank's part of a whole value, flat, as that of a parameter under ZeRO-3."""
    size = parameter.ds_tensor.numel()
    part = value.flatten()[size * torch.distributed.get_rank() :][:size]
    return torch.nn.functional.pad(part, (0, size - part.numel()))


def gather_zero3(part, parameter):
    """The whole tensor of every rank's part of a parameter under ZeRO-3."""
    part = part.to(parameter.ds_tensor.device)
    whole = part.new_empty(torch.distributed.get_world_size() * part.numel())
    torch.distributed.all_gather_into_tensor(whole, part.contiguous())
    return whole[: parameter.ds_numel].view(parameter.ds_shape)


def drop_gathered_weights(model):
    """Under ZeRO-3, release gathered weights: what is written to the parts has to be seen."""
    for parameter in model.parameters():
        if is_zero3_parameter(parameter):
            return parameter._z3_optimizer.empty_partition_cache()


def load_zero_weights(model, tensors):
    """`load_state_dict` with whole tensors, which every rank has, for a model that an engine has."""
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

    drop_gathered_weights(model)
    with torch.no_grad():
        for name, own in model.state_dict(keep_vars=True).items():
            value = tensors[name].to(own.device)
            if is_zero3_parameter(own):
                own.ds_tensor.copy_(zero3_shard(value, own))
                safe_set_local_fp32_param(own, zero3_shard(value, own))
            else:
                own.copy_(value)
                safe_set_full_fp32_param(own, value)  # of a buffer there is none


# ---------------------------------------------------------------------------------------------------------------------
# What can be sharded


def is_sharded(accelerator):
    """Whether FSDP or DeepSpeed divides the training's state among the ranks: they draw, measure and save together."""
    return is_fsdp(accelerator) or is_zero(accelerator)


def is_fsdp(accelerator):
    """Whether FSDP distributes the model over the ranks."""
    return accelerator.distributed_type == DistributedType.FSDP


def set_up_sharding(accelerator, max_grad_norm=0.0):
    """Set FSDP or DeepSpeed up. Raises UserError for what accelerate is configured for and can't be done."""
    if is_zero(accelerator):
        return set_up_zero(accelerator, max_grad_norm)
    if not is_fsdp(accelerator):
        require(
            not wants("FSDP"), "accelerate is configured for FSDP, which needs GPUs, and none is here: leave it out"
        )
        return
    plugin = accelerator.state.fsdp_plugin
    require(accelerator.is_fsdp2, "accelerate is configured for the first FSDP; give it fsdp_version: 2, as in "
            "configs/fsdp2.yaml")  # fmt: skip
    require(accelerator.mixed_precision != "fp16", "--mixed_precision fp16 is not supported under FSDP; use bf16")
    require(plugin.cpu_offload is None or type(plugin.cpu_offload).__name__ == "OffloadPolicy",
            "fsdp_offload_params is not supported: set it to false; more GPUs make every part smaller")  # fmt: skip
    require(
        getattr(plugin.auto_wrap_policy, "__name__", None) == "transformer_auto_wrap_policy",
        "fsdp_auto_wrap_policy must be TRANSFORMER_BASED_WRAP: without a policy the whole model is gathered at once, "
        "and by size FSDP meets lists of layers that it refuses",
    )
    require(not plugin.activation_checkpointing,
            "fsdp_activation_checkpointing: use --gradient_checkpointing instead")  # fmt: skip
    # weights are gathered and gradients reduced in float32, and autocast casts: the same arithmetic as without FSDP
    plugin.mixed_precision_policy = None


def build_device(accelerator):
    """The device on which a model is built: one that is sharded goes to the GPU piece by piece, each rank its part."""
    return torch.device("cpu") if is_sharded(accelerator) else accelerator.device


def prepare(accelerator, denoiser, optimizer):
    """accelerate's `prepare`, for a `Denoiser`; afterwards the optimizer's groups have the parameters that count.

    Sharded, its one model is so in place, so that it can be called by itself too, as a pipeline does.
    """
    if not is_sharded(accelerator):
        return accelerator.prepare(denoiser, optimizer)
    [model] = denoiser.models().values()
    if is_fsdp(accelerator):
        _, optimizer = accelerator.prepare(model, optimizer)
        autocast = accelerator.autocast
    else:
        engine, optimizer = build_zero_engine(accelerator, model, optimizer)
        denoiser, autocast = type(denoiser)(engine), zero_autocast(accelerator)
    torch.set_autocast_cache_enabled(False)  # it would keep a copy of every weight that is let go of
    forward = denoiser.forward

    def in_autocast(*args, **kwargs):  # which `prepare` does itself for models that it doesn't shard
        with autocast():
            return forward(*args, **kwargs).float()

    denoiser.forward = in_autocast
    return denoiser, optimizer


def clip_gradients(accelerator, optimizer, parameters, max_norm):
    """Clip the gradients, and give their norm, the same on every rank. DeepSpeed also makes the step, if it's finite.

    max_norm: for all but DeepSpeed, which was told by `set_up_sharding`.
    """
    if isinstance(optimizer, ZeroAdamW):
        return optimizer.clip_and_step()
    return full_tensor(accelerator.clip_grad_norm_(parameters, max_norm))


def reshard(model):
    """Let go of gathered weights: without a backward pass some stay, and would hide what is written to the parts."""
    drop_gathered_weights(model)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextlib.contextmanager
def eval_mode(model):
    """Inside, the model is as it draws and is measured; afterwards in its mode of before, every rank with its part."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
        reshard(model)


# ---------------------------------------------------------------------------------------------------------------------
# Parts and wholes


def is_sharded_tensor(value):
    """Whether this rank has a part of it only."""
    return isinstance(value, DTensor | ZeroTensor) or is_zero3_parameter(value)


def full_bytes(tensor):
    """Bytes of the whole tensor."""
    return full_numel(tensor) * tensor.element_size()


def local_shard(tensor):
    """This rank's part of a tensor, in the same memory; a tensor that is not sharded itself."""
    if is_zero3_parameter(tensor):
        return tensor.ds_tensor.detach().requires_grad_(tensor.requires_grad)
    if not isinstance(tensor, DTensor):
        return tensor
    return tensor.detach().to_local().requires_grad_(tensor.requires_grad)


def full_tensor(tensor):
    """The whole tensor on every rank; all of them have to ask."""
    if isinstance(tensor, ZeroTensor):
        return tensor.full_tensor()
    if is_zero3_parameter(tensor):
        return gather_zero3(tensor.ds_tensor, tensor)
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def from_local_shard(part, tensor):
    """A rank's part of a tensor that is sharded like another one, contiguous, as what `full_tensor` takes."""
    if is_zero3_parameter(tensor):
        return ZeroTensor(tensor, lambda: gather_zero3(part, tensor))
    if not isinstance(tensor, DTensor):
        return part.contiguous()
    return DTensor.from_local(
        part.to(tensor.device), tensor.device_mesh, tensor.placements, shape=tensor.shape, stride=tensor.stride()
    ).contiguous()


def shard_like(value, tensor):
    """A whole value, which every rank has, sharded like a tensor of its shape; other values as they are."""
    if is_zero3_parameter(tensor):
        same = isinstance(value, torch.Tensor) and value.shape == tensor.ds_shape
        return zero3_shard(value, tensor) if same else value
    if not isinstance(tensor, DTensor) or not isinstance(value, torch.Tensor) or value.shape != tensor.shape:
        return value
    return distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None)


def full_tensors(tensors, keep):
    """{name: whole tensor} of {name: tensor}, on the CPU if sharded, one at a time; {} where `keep` is false."""
    found = {}
    for name, tensor in tensors.items():
        value = full_tensor(tensor)
        if keep:
            found[name] = value.cpu() if is_sharded_tensor(tensor) else value
    return found


def with_full_weights(denoiser, keep):
    """The `Denoiser` with whole weights, on the CPU if it was sharded; None where `keep` is false. All ranks ask."""
    if not any(is_sharded_tensor(parameter) for parameter in denoiser.parameters()):
        return denoiser if keep else None
    [model] = denoiser.models().values()
    reshard(model)
    tensors = {name: value if is_zero3_parameter(value) else value.detach()
               for name, value in model.state_dict(keep_vars=True).items()}  # fmt: skip
    tensors = full_tensors(tensors, keep)
    if not keep:
        return None
    kind = next(base for base in type(model).__mro__ if not issubclass(base, FSDPModule))  # diffusers' own class
    with torch.device("meta"):
        copy = kind.from_config(model.config)
    copy.load_state_dict(tensors, assign=True)
    return type(denoiser)(copy)


def load_full_state(model, tensors):
    """`load_state_dict` with whole tensors, which every rank has, for a model that may be sharded."""
    if has_zero_engine(model):
        return load_zero_weights(model, tensors)
    own = model.state_dict()
    model.load_state_dict({name: shard_like(value, own.get(name)) for name, value in tensors.items()})


# ---------------------------------------------------------------------------------------------------------------------
# Agreement


def from_rank_0(value, accelerator):
    """What the first rank says, on every rank: anything that JSON can hold."""
    return broadcast_json(0, value, accelerator)


def from_all_ranks(value, accelerator):
    """[what each rank says], on every rank."""
    return [broadcast_json(rank, value, accelerator) for rank in range(accelerator.num_processes)]


def broadcast_json(rank, value, accelerator):
    """A value of one rank, as JSON: accelerate and torch would pickle it."""
    if accelerator.num_processes == 1:
        return value
    device = accelerator.device
    text = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8, device=device)
    length = torch.tensor([len(text)], device=device)
    torch.distributed.broadcast(length, rank)
    if accelerator.process_index != rank:
        text = torch.empty(int(length), dtype=torch.uint8, device=device)
    torch.distributed.broadcast(text, rank)
    return json.loads(bytes(text.tolist()))


SHARDED = ("weights", "gradients", "optimizer state", "EMA")


def gathered_bytes(model):
    """About how many bytes of whole weights and gradients FSDP has at a time; float32.

    What is in no block stays gathered, with its gradients, and of the blocks the one that is computed and the next;
    its gradients are there twice while they are reduced.
    """
    taken, sizes = set(), []
    for module in reversed(list(model.modules())):  # the inner ones first
        if module is model or type(module).__name__ in model._no_split_modules:
            own = [parameter for parameter in module.parameters() if id(parameter) not in taken]
            taken.update(map(id, own))
            sizes.append(4 * sum(parameter.numel() for parameter in own))
    *blocks, rest = sizes
    return 2 * rest + 4 * max(blocks, default=0)


def memory_of_rank(parts, model, ranks, stage=0):
    """`memory_parts` for one of `ranks` GPUs among which FSDP distributes a model, or DeepSpeed's ZeRO of a stage.

    ZeRO-2 leaves weights and EMA whole; each rank updates a part of the weights in a copy of its own.
    """
    whole = ("weights", "EMA") if stage == 2 else ()
    mine = [(what, size / ranks if what in SHARDED and what not in whole else size) for what, size in parts]
    if not stage:
        return [*mine, ("gathered layers", gathered_bytes(model))]
    bucket = 4 * min(BUCKET, sum(parameter.numel() for parameter in model.parameters()))
    if stage == 2:
        return [*mine, ("part that is updated", dict(parts)["weights"] / ranks), ("exchange", 2 * bucket)]
    return [*mine, ("gathered layers", 2 * bucket), ("exchange", 2 * bucket)]
