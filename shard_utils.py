"""Sharded training (FSDP2, ZeRO): what can be sharded, parts of tensors and whole ones, and ranks that agree.

Under FSDP2 every parameter is a DTensor, of which each rank holds a part; for DeepSpeed's ZeRO see `zero_utils`.
Checkpoints and results are those of one process: whole tensors, gathered one at a time and kept by the first rank
alone, so that a run goes on with any number of ranks, sharded or not.
"""

import contextlib
import json

import torch
import torch.distributed
from accelerate.utils import DistributedType
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

import zero_utils
from check_utils import wants
from cli_utils import require
from zero_utils import Part, is_divided

# ---------------------------------------------------------------------------------------------------------------------
# What can be sharded


def is_sharded(accelerator):
    """Whether FSDP or DeepSpeed divides the training's state among the ranks: they draw, measure and save together."""
    return is_fsdp(accelerator) or zero_utils.is_zero(accelerator)


def is_fsdp(accelerator):
    """Whether FSDP distributes the model over the ranks."""
    return accelerator.distributed_type == DistributedType.FSDP


def set_up_sharding(accelerator, max_grad_norm=0.0):
    """Set FSDP or DeepSpeed up. Raises UserError for what accelerate is configured for and can't be done."""
    if zero_utils.is_zero(accelerator):
        return zero_utils.set_up_zero(accelerator, max_grad_norm)
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


def home(accelerator):
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
        engine, optimizer = zero_utils.initialize(accelerator, model, optimizer)
        denoiser, autocast = type(denoiser)(engine), zero_utils.autocast(accelerator)
    torch.set_autocast_cache_enabled(False)  # it would keep a copy of every weight that is let go of
    forward = denoiser.forward

    def in_autocast(*args, **kwargs):  # which `prepare` does itself for models that it doesn't shard
        with autocast():
            return forward(*args, **kwargs).float()

    denoiser.forward = in_autocast
    return denoiser, optimizer


def clip(accelerator, optimizer, parameters, max_norm):
    """Clip the gradients, and give their norm, the same on every rank. DeepSpeed also makes the step, if it's finite.

    max_norm: for all but DeepSpeed, which was told by `set_up_sharding`.
    """
    if isinstance(optimizer, zero_utils.ZeroAdamW):
        return optimizer.clip_and_step()
    return whole(accelerator.clip_grad_norm_(parameters, max_norm))


def reshard(model):
    """Let go of gathered weights: without a backward pass some stay, and would hide what is written to the parts."""
    zero_utils.let_go(model)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextlib.contextmanager
def evaluation(model):
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


def is_part(value):
    """Whether this rank has a part of it only."""
    return isinstance(value, DTensor | Part) or is_divided(value)


def whole_bytes(tensor):
    """Bytes of the whole tensor."""
    return zero_utils.numel(tensor) * tensor.element_size()


def local_part(tensor):
    """This rank's part of a tensor, in the same memory; a tensor that is not sharded itself."""
    if is_divided(tensor):
        return tensor.ds_tensor.detach().requires_grad_(tensor.requires_grad)
    if not isinstance(tensor, DTensor):
        return tensor
    return tensor.detach().to_local().requires_grad_(tensor.requires_grad)


def whole(tensor):
    """The whole tensor on every rank; all of them have to ask."""
    if isinstance(tensor, Part):
        return tensor.whole()
    if is_divided(tensor):
        return zero_utils.joined(tensor.ds_tensor, tensor)
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sharded_like(part, tensor):
    """A rank's part of a tensor that is sharded like another one, contiguous, as what `whole` takes."""
    if is_divided(tensor):
        return Part(tensor, lambda: zero_utils.joined(part, tensor))
    if not isinstance(tensor, DTensor):
        return part.contiguous()
    return DTensor.from_local(
        part.to(tensor.device), tensor.device_mesh, tensor.placements, shape=tensor.shape, stride=tensor.stride()
    ).contiguous()


def distributed_like(value, tensor):
    """A whole value, which every rank has, sharded like a tensor of its shape; other values as they are."""
    if is_divided(tensor):
        same = isinstance(value, torch.Tensor) and value.shape == tensor.ds_shape
        return zero_utils.part_of(value, tensor) if same else value
    if not isinstance(tensor, DTensor) or not isinstance(value, torch.Tensor) or value.shape != tensor.shape:
        return value
    return distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None)


def gather(tensors, keep):
    """{name: whole tensor} of {name: tensor}, on the CPU if sharded, one at a time; {} where `keep` is false."""
    found = {}
    for name, tensor in tensors.items():
        value = whole(tensor)
        if keep:
            found[name] = value.cpu() if is_part(tensor) else value
    return found


def gathered(denoiser, keep):
    """The `Denoiser` with whole weights, on the CPU if it was sharded; None where `keep` is false. All ranks ask."""
    if not any(is_part(parameter) for parameter in denoiser.parameters()):
        return denoiser if keep else None
    [model] = denoiser.models().values()
    reshard(model)
    tensors = {name: value if is_divided(value) else value.detach()
               for name, value in model.state_dict(keep_vars=True).items()}  # fmt: skip
    tensors = gather(tensors, keep)
    if not keep:
        return None
    kind = next(base for base in type(model).__mro__ if not issubclass(base, FSDPModule))  # diffusers' own class
    with torch.device("meta"):
        copy = kind.from_config(model.config)
    copy.load_state_dict(tensors, assign=True)
    return type(denoiser)(copy)


def load_state(model, tensors):
    """`load_state_dict` with whole tensors, which every rank has, for a model that may be sharded."""
    if zero_utils.has_engine(model):
        return zero_utils.load_weights(model, tensors)
    own = model.state_dict()
    model.load_state_dict({name: distributed_like(value, own.get(name)) for name, value in tensors.items()})


# ---------------------------------------------------------------------------------------------------------------------
# Agreement


def from_first_rank(value, accelerator):
    """What the first rank says, on every rank: anything that JSON can hold."""
    return said_by(0, value, accelerator)


def from_all_ranks(value, accelerator):
    """[what each rank says], on every rank."""
    return [said_by(rank, value, accelerator) for rank in range(accelerator.num_processes)]


def said_by(rank, value, accelerator):
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
