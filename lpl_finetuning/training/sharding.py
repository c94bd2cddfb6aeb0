"""Sharded training of one whole model: FSDP2, and DeepSpeed's ZeRO-2 and ZeRO-3.

A rank's part of a sharded tensor is its *shard*; *full* tensors are gathered from the shards of all ranks.

- FSDP2 and ZeRO-3 shard weights, gradients, the optimizer's state and EMA; ZeRO-2 shards gradients and state only.
- Under FSDP2 parameters are `DTensor`s.
- Under ZeRO-3 a parameter is empty. Its `ds_tensor` is this rank's shard: flat, and padded to one size on all ranks.

Without sharding every function here returns its plain equivalent, so that callers need not ask. DeepSpeed's own
checkpoints are not used. DeepSpeed is imported when an engine is built.
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

BUCKET = 50_000_000  # elements that ZeRO exchanges, or gathers ahead, at a time
SHARDED = ("weights", "gradients", "optimizer state", "EMA")  # entries of the memory estimate

# ---------------------------------------------------------------------------------------------------------------------
# What can be sharded


def is_fsdp(accelerator):
    """Whether FSDP shards the model."""
    return accelerator.distributed_type == DistributedType.FSDP


def is_zero(accelerator):
    """Whether DeepSpeed shards the training state."""
    return accelerator.distributed_type == DistributedType.DEEPSPEED


def is_sharded(accelerator):
    """Whether FSDP or DeepSpeed shards the training state: then all ranks sample, measure and save together."""
    return is_fsdp(accelerator) or is_zero(accelerator)


def zero_stage(accelerator):
    """Return ZeRO's stage, 2 or 3; 0 without DeepSpeed."""
    return accelerator.state.deepspeed_plugin.zero_stage if is_zero(accelerator) else 0


def check_zero_devices():
    """Raise UserError for DeepSpeed without GPUs, before accelerate takes each rank for a single process.

    `DS_ACCELERATOR=cpu`, which the tests set, allows CPUs. Other rules for DeepSpeed: `flag_checks.check_deepspeed`.
    """
    require(
        not wants("DEEPSPEED") or torch.accelerator.is_available() or os.environ.get("DS_ACCELERATOR") == "cpu",
        "accelerate is configured for DeepSpeed, which needs GPUs, and none is here: leave it out",
    )


def set_up_sharding(accelerator, max_grad_norm=0.0):
    """Adapt accelerate's plugin for FSDP or DeepSpeed to this program; do nothing without sharding.

    Raises:
        UserError: accelerate is configured for something that this program can't do.
    """
    if is_zero(accelerator):
        from transformers.integrations import unset_hf_deepspeed_config

        # With the configuration set, transformers would shard the text encoders, and diffusers' EMA gather everything.
        unset_hf_deepspeed_config()
        accelerator.state.deepspeed_plugin.gradient_clipping = max_grad_norm
        return
    if not is_fsdp(accelerator):
        none = "which needs GPUs, and none is here: leave it out"
        alone = "which needs several processes, and this is the only one: use configs/one-gpu.yaml"
        lacking = alone if torch.accelerator.is_available() and accelerator.num_processes == 1 else none
        require(not wants("FSDP"), f"accelerate is configured for FSDP, {lacking}")
        return
    check_fsdp(accelerator)
    # FSDP gathers weights and reduces gradients in float32, and autocast casts: the arithmetic of an unsharded run.
    accelerator.state.fsdp_plugin.mixed_precision_policy = None


def check_fsdp(accelerator):
    """Raise UserError for settings of FSDP that are not supported."""
    plugin = accelerator.state.fsdp_plugin
    require(accelerator.is_fsdp2, "accelerate is configured for the first FSDP; give it fsdp_version: 2, as in "
            "configs/fsdp2.yaml")  # fmt: skip
    require(accelerator.mixed_precision != "fp16", "mixed_precision fp16 is not supported under FSDP; use bf16")
    require(plugin.cpu_offload is None or type(plugin.cpu_offload).__name__ == "OffloadPolicy",
            "fsdp_offload_params is not supported: set it to false; more GPUs make every part smaller")  # fmt: skip
    require(
        getattr(plugin.auto_wrap_policy, "__name__", None) == "transformer_auto_wrap_policy",
        "fsdp_auto_wrap_policy must be TRANSFORMER_BASED_WRAP: without a policy the whole model is gathered at once, "
        "and by size FSDP meets lists of layers that it refuses",
    )
    require(not plugin.activation_checkpointing,
            "fsdp_activation_checkpointing: use --gradient_checkpointing instead")  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# The model under training


def build_device(accelerator):
    """Return the device on which to build a model: the CPU if it will be sharded, since no GPU need hold all of it."""
    return torch.device("cpu") if is_sharded(accelerator) else accelerator.device


def prepare(accelerator, denoiser, optimizer):
    """Prepare a `Denoiser` and its optimizer for this accelerator; return (denoiser to call, optimizer).

    Sharding changes the model in place, so that it can also be called by itself, as a pipeline does. Afterwards the
    groups of the returned optimizer hold the parameters that are trained.
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
    forward = denoiser.forward

    def forward_in_autocast(*args, **kwargs):  # for models that are not sharded, accelerate's `prepare` does this
        with autocast():
            return forward(*args, **kwargs).float()

    denoiser.forward = forward_in_autocast
    return denoiser, optimizer


def clip_gradients(accelerator, optimizer, parameters, max_norm):
    """Clip the gradients; return their norm before clipping, a scalar tensor that is the same on every rank.

    DeepSpeed clips inside its step: under ZeRO this function also makes the step, unless a gradient is not finite.
    There the limit is the one given to `set_up_sharding`, and `max_norm` is ignored.
    """
    if isinstance(optimizer, ZeroAdamW):
        return optimizer.clip_and_step()
    return full_tensor(accelerator.clip_grad_norm_(parameters, max_norm))


def reshard(model):
    """Drop gathered weights: some stay after a forward pass without backward, and would hide writes to the shards."""
    for parameter in model.parameters():
        if is_zero3_parameter(parameter):
            parameter._z3_optimizer.empty_partition_cache()  # that of the whole model
            break
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextlib.contextmanager
def eval_mode(model):
    """Context manager: eval mode inside; afterwards restores the mode and reshards."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
        reshard(model)


# ---------------------------------------------------------------------------------------------------------------------
# Shards and full tensors


@dataclass(frozen=True)
class ZeroTensor:
    """A float32 tensor sharded by ZeRO like `parameter`: what `DTensor` is to FSDP2."""

    parameter: torch.nn.Parameter
    full_tensor: Callable  # () -> the full tensor; to be called on all ranks together

    def numel(self):
        """Return the number of elements of the full tensor."""
        return full_numel(self.parameter)

    def element_size(self):
        """Return the bytes of an element."""
        return 4


def is_zero3_parameter(tensor):
    """Whether a tensor is a parameter sharded by ZeRO-3."""
    return hasattr(tensor, "ds_tensor")


def is_sharded_tensor(value):
    """Whether this rank has only a shard of a value."""
    return isinstance(value, DTensor | ZeroTensor) or is_zero3_parameter(value)


def full_numel(tensor):
    """Return the number of elements of the full tensor."""
    return tensor.ds_numel if is_zero3_parameter(tensor) else tensor.numel()


def full_bytes(tensor):
    """Return the size of the full tensor in bytes."""
    return full_numel(tensor) * tensor.element_size()


def full_tensor(tensor):
    """Gather a tensor on every rank. All ranks call it together."""
    if isinstance(tensor, DTensor | ZeroTensor):
        return tensor.full_tensor()
    return gather_zero3(tensor.ds_tensor, tensor) if is_zero3_parameter(tensor) else tensor


def full_tensors(tensors, keep):
    """Gather {name: tensor} one tensor at a time, sharded tensors onto the CPU. All ranks call it together.

    Args:
        keep: whether this rank wants the result; otherwise it gives its shards and gets {}.
    """
    found = {}
    for name, tensor in tensors.items():
        value = full_tensor(tensor)
        if keep:
            found[name] = value.cpu() if is_sharded_tensor(tensor) else value
    return found


def local_shard(tensor):
    """Return this rank's shard of a tensor, in the same memory; a tensor that is not sharded as it is."""
    if is_zero3_parameter(tensor):
        return tensor.ds_tensor.detach().requires_grad_(tensor.requires_grad)
    if isinstance(tensor, DTensor):
        return tensor.detach().to_local().requires_grad_(tensor.requires_grad)
    return tensor


def from_local_shard(shard, like):
    """Return the tensor of which `shard` is this rank's part, sharded like `like`; `full_tensor` gathers it.

    Inverse of `local_shard`.
    """
    if is_zero3_parameter(like):
        return ZeroTensor(like, lambda: gather_zero3(shard, like))
    if not isinstance(like, DTensor):
        return shard.contiguous()
    return DTensor.from_local(
        shard.to(like.device), like.device_mesh, like.placements, shape=like.shape, stride=like.stride()
    ).contiguous()


def shard_like(value, like):
    """Shard a full value, which every rank has, like `like`; values of another shape or kind as they are.

    Returns:
        A `DTensor` under FSDP2, this rank's flat shard under ZeRO-3.
    """
    shape = like.ds_shape if is_zero3_parameter(like) else getattr(like, "shape", None)
    if not isinstance(value, torch.Tensor) or value.shape != shape:
        return value
    if is_zero3_parameter(like):
        return zero3_shard(value, like)
    if isinstance(like, DTensor):
        return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
    return value


def zero3_shard(value, parameter):
    """Return this rank's shard of a full value, flat and padded with zeros like the shard of `parameter`."""
    size = parameter.ds_tensor.numel()
    shard = value.flatten()[size * torch.distributed.get_rank() :][:size]
    return torch.nn.functional.pad(shard, (0, size - shard.numel()))


def gather_zero3(shard, parameter):
    """Gather the full tensor of the shards of all ranks, each flat and padded like the shard of `parameter`."""
    shard = shard.to(parameter.ds_tensor.device)
    full = shard.new_empty(torch.distributed.get_world_size() * shard.numel())
    torch.distributed.all_gather_into_tensor(full, shard.contiguous())
    return full[: parameter.ds_numel].view(parameter.ds_shape)


# ---------------------------------------------------------------------------------------------------------------------
# Full weights: out of a model, and into it


def with_full_weights(denoiser, keep):
    """Return the `Denoiser` with full weights: a copy on the CPU if it is sharded. All ranks call it together.

    Args:
        keep: whether this rank wants the result; otherwise it gives its shards and gets None.
    """
    if not any(is_sharded_tensor(parameter) for parameter in denoiser.parameters()):
        return denoiser if keep else None
    [model] = denoiser.models().values()
    reshard(model)
    tensors = {name: value if is_zero3_parameter(value) else value.detach()
               for name, value in model.state_dict(keep_vars=True).items()}  # fmt: skip
    tensors = full_tensors(tensors, keep)
    if not keep:
        return None
    cls = next(base for base in type(model).__mro__ if not issubclass(base, FSDPModule))  # diffusers' own class
    with torch.device("meta"):
        copy = cls.from_config(model.config)
    copy.load_state_dict(tensors, assign=True)
    return type(denoiser)(copy)


def load_full_state(model, tensors):
    """Load full tensors, which every rank has, into a model that may be sharded; as `load_state_dict` does."""
    if has_zero_engine(model):
        load_zero_state(model, tensors)
        return
    own = model.state_dict()
    model.load_state_dict({name: shard_like(value, own.get(name)) for name, value in tensors.items()})


def load_zero_state(model, tensors):
    """`load_full_state` for a model with a ZeRO engine, whose own float32 copies of the weights change too."""
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

    reshard(model)
    with torch.no_grad():
        for name, own in model.state_dict(keep_vars=True).items():
            value = tensors[name].to(own.device)
            if is_zero3_parameter(own):
                own.ds_tensor.copy_(zero3_shard(value, own))
                safe_set_local_fp32_param(own, zero3_shard(value, own))
            else:
                own.copy_(value)
                safe_set_full_fp32_param(own, value)  # does nothing for buffers


# ---------------------------------------------------------------------------------------------------------------------
# Agreement among ranks


def from_rank_0(value, accelerator):
    """Return rank 0's value, which JSON can hold, on every rank. All ranks call it together."""
    return broadcast_json(0, value, accelerator)


def from_all_ranks(value, accelerator):
    """Return [each rank's value], which JSON can hold, on every rank. All ranks call it together."""
    return [broadcast_json(rank, value, accelerator) for rank in range(accelerator.num_processes)]


def broadcast_json(rank, value, accelerator):
    """Return one rank's value on every rank, sent as JSON: torch's object collectives would pickle it."""
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


# ---------------------------------------------------------------------------------------------------------------------
# Memory of a rank


def memory_of_rank(parts, model, ranks, stage=0):
    """Return the memory estimate [(what, bytes)] of one of `ranks` GPUs, from the estimate `parts` without sharding.

    ZeRO-2 leaves weights and EMA whole, and each rank updates a copy of its shard of the weights.

    Args:
        model: the model, unsharded; may be on the meta device.
        stage: stage of ZeRO, 2 or 3; 0 for FSDP2.
    """
    unsharded = ("weights", "EMA") if stage == 2 else ()
    mine = [(what, size / ranks if what in SHARDED and what not in unsharded else size) for what, size in parts]
    if not stage:
        return [*mine, ("gathered layers", gathered_bytes(model))]
    bucket = 4 * min(BUCKET, sum(parameter.numel() for parameter in model.parameters()))
    if stage == 2:
        return [*mine, ("part that is updated", dict(parts)["weights"] / ranks), ("exchange", 2 * bucket)]
    return [*mine, ("gathered layers", 2 * bucket), ("exchange", 2 * bucket)]


def gathered_bytes(model):
    """Estimate the bytes of full float32 weights and gradients that FSDP holds at a time.

    Parameters outside all blocks stay gathered, and so do their gradients. Of the blocks, FSDP holds the one being
    computed and the next one. The gradients of a block exist twice while they are reduced.
    """
    seen, sizes = set(), []
    for module in reversed(list(model.modules())):  # inner modules first
        if module is model or type(module).__name__ in model._no_split_modules:
            own = [parameter for parameter in module.parameters() if id(parameter) not in seen]
            seen.update(map(id, own))
            sizes.append(4 * sum(parameter.numel() for parameter in own))
    *blocks, rest = sizes
    return 2 * rest + 4 * max(blocks, default=0)


# ---------------------------------------------------------------------------------------------------------------------
# ZeRO's engine and optimizer


def zero_config(accelerator):
    """Return DeepSpeed's configuration. It has no `bf16`: weights and sums stay float32, and autocast casts."""
    plugin = accelerator.state.deepspeed_plugin
    clip = plugin.gradient_clipping
    return {
        "train_micro_batch_size_per_gpu": 1,  # required by DeepSpeed, not used here
        "gradient_accumulation_steps": accelerator.gradient_accumulation_steps,
        "managed_gradient_accumulation": False,  # each call of `step` makes a step
        "gradient_clipping": 0.0 if clip == float("inf") else clip,
        "zero_optimization": {
            "stage": plugin.zero_stage,
            "reduce_bucket_size": BUCKET,
            "allgather_bucket_size": BUCKET,
            "stage3_prefetch_bucket_size": BUCKET,
            "stage3_max_live_parameters": BUCKET,
            "stage3_max_reuse_distance": BUCKET,
            "stage3_param_persistence_threshold": 0,  # a weight that stays gathered would hide writes to its shards
            "memory_efficient_linear": False,  # it rounds before it adds the bias
        },
    }


def build_zero_engine(accelerator, model, optimizer):
    """Shard the model in place; return (engine to call instead of the model, `ZeroAdamW`)."""
    import deepspeed

    config = zero_config(accelerator)
    if zero_stage(accelerator) == 3:
        deepspeed.zero.Init(module=model, config_dict_or_path=config)  # tensor by tensor: no GPU holds the full model
        model.to(accelerator.device)  # buffers
    groups = [{**group, "params": list(group["params"])} for group in optimizer.param_groups]
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.AdamW(groups), config=config, dist_init_required=False
    )
    accelerator.deepspeed_engine_wrapped = ZeroAdamW(engine, optimizer)  # accelerate calls its `backward`
    return engine, accelerator.deepspeed_engine_wrapped


def zero_autocast(accelerator):
    """Return the function that makes autocast's context: under DeepSpeed accelerate's own does nothing."""
    enabled = accelerator.mixed_precision == "bf16"
    return functools.partial(
        torch.autocast, accelerator.device.type, torch.bfloat16, enabled=enabled, cache_enabled=False
    )


def has_zero_engine(model):
    """Whether a ZeRO engine trains the model: the engine marks the parameters."""
    parameter = next(model.parameters())
    return is_zero3_parameter(parameter) or hasattr(parameter, "_hp_mapping")


class ZeroAdamW:
    """AdamW with state sharded by ZeRO, in the interface of a torch optimizer that loop and checkpoints expect."""

    def __init__(self, engine, optimizer):
        """
        Args:
            engine: DeepSpeed's engine; its own AdamW has the state, and flat shards as parameters.
            optimizer: the AdamW that the LR schedule knows. It has the model's parameters and the settings, and no
                state; before every step the settings are copied into the engine's AdamW.
        """
        self.engine, self.optimizer = engine, optimizer
        self.flat_shards = (
            engine.optimizer.fp32_partitioned_groups_flat
            if engine.zero_optimization_stage() == 3
            else engine.optimizer.single_partition_of_fp32_groups
        )
        for shard in self.flat_shards:  # AdamW makes its state in the first step; a checkpoint may be loaded before
            self.inner.state[shard] = {"step": torch.tensor(0.0)} | {
                name: torch.zeros_like(shard, requires_grad=False) for name in ("exp_avg", "exp_avg_sq")
            }
        if engine.zero_optimization_stage() == 2:
            engine.optimizer._lazy_init_hp_params_optimizer_state()  # DeepSpeed does this after its first step

    @property
    def inner(self):
        """The engine's AdamW."""
        return self.engine.optimizer.optimizer

    @property
    def param_groups(self):
        """The groups with settings and the model's parameters."""
        return self.optimizer.param_groups

    def parameters(self):
        """Return the model's parameters, in the order of the state."""
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def backward(self, loss, **_):
        """Add to the gradients. accelerate's own wrapper would also make the step."""
        self.engine.backward(loss)

    def clip_and_step(self):
        """Clip and step unless a gradient is not finite; return the gradients' norm, inf where no step was made."""
        for theirs, ours in zip(self.inner.param_groups, self.param_groups, strict=True):
            theirs.update({name: value for name, value in ours.items() if name != "params"})
        self.engine.step()
        norm = self.engine.get_global_grad_norm() if self.engine.was_step_applied() else float("inf")
        return torch.as_tensor(norm, dtype=torch.float32, device=self.engine.device)

    def step(self):
        """Count a step for the LR schedule. `clip_and_step` has made it, so no parameter has a gradient."""
        self.optimizer.step()

    def zero_grad(self, set_to_none=True):
        """Do nothing: the engine has cleared the gradients."""

    def state_dict(self):
        """Return the state as a torch AdamW does, with a `ZeroTensor` for each sharded tensor."""
        from deepspeed.utils import safe_get_full_optimizer_state

        def sharded(parameter, name):
            return ZeroTensor(parameter, lambda: safe_get_full_optimizer_state(parameter, name))

        step = next(iter(self.inner.state.values()))["step"]
        state = {
            index: {"step": step.clone()} | {name: sharded(parameter, name) for name in ("exp_avg", "exp_avg_sq")}
            for index, parameter in enumerate(self.parameters())
        }
        return {"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]}

    def load_state_dict(self, state):
        """Load the state of a torch AdamW: full tensors under ZeRO-2, this rank's shards under ZeRO-3."""
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        parameters = self.parameters()
        for index, entries in state["state"].items():
            parameter = parameters[index]
            put = safe_set_local_optimizer_state if is_zero3_parameter(parameter) else safe_set_full_optimizer_state
            for name in ("exp_avg", "exp_avg_sq"):
                put(parameter, entries[name].to(self.engine.device), name)
            for shard in self.flat_shards:
                self.inner.state[shard]["step"].copy_(entries["step"])
        self.optimizer.load_state_dict({"state": {}, "param_groups": state["param_groups"]})
