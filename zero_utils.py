"""Sharded training (DeepSpeed's ZeRO-2 and ZeRO-3): what can be divided, an engine for one step, parts and wholes.

Under both each rank keeps a part of gradients and AdamW's state, under ZeRO-3 of the weights too: a parameter is then
empty, and `ds_tensor` is this rank's part of it, flat, and padded so that all parts have one size. DeepSpeed's own
checkpoints are not used. `shard_utils` is how the rest of the program sees this; DeepSpeed is imported only when used.
"""

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed
from accelerate.utils import DistributedType

from check_utils import wants
from cli_utils import require

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


def initialize(accelerator, model, optimizer):
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


def autocast(accelerator):
    """Function that gives the context to compute in; accelerate's own is off under DeepSpeed."""
    enabled = accelerator.mixed_precision == "bf16"
    return functools.partial(torch.autocast, accelerator.device.type, torch.bfloat16, enabled=enabled)


def has_engine(model):
    """Whether an engine has the model: its parameters are marked."""
    parameter = next(model.parameters())
    return is_divided(parameter) or hasattr(parameter, "_hp_mapping")


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
        """As of a torch optimizer, with a `Part` for each tensor that is divided."""
        from deepspeed.utils import safe_get_full_optimizer_state

        def part(parameter, name):
            return Part(parameter, lambda: safe_get_full_optimizer_state(parameter, name))

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
            put = safe_set_local_optimizer_state if is_divided(parameter) else safe_set_full_optimizer_state
            for name in ("exp_avg", "exp_avg_sq"):
                put(parameter, entries[name].to(self.engine.device), name)
            for part in self.flat:
                self.inner.state[part]["step"].copy_(entries["step"])
        self.optimizer.load_state_dict({"state": {}, "param_groups": state["param_groups"]})


# ---------------------------------------------------------------------------------------------------------------------
# Parts and wholes


@dataclass(frozen=True)
class Part:
    """A tensor of a parameter's shape, of which this rank has a part; `whole` gathers it, and is for all ranks."""

    parameter: torch.nn.Parameter
    whole: Callable

    def numel(self):
        """Of the whole tensor."""
        return numel(self.parameter)

    def element_size(self):
        """Bytes: float32."""
        return 4


def is_divided(tensor):
    """Whether it is a parameter under ZeRO-3."""
    return hasattr(tensor, "ds_tensor")


def numel(tensor):
    """Of the whole tensor, which may be a parameter under ZeRO-3."""
    return tensor.ds_numel if is_divided(tensor) else tensor.numel()


def part_of(value, parameter):
    """This rank's part of a whole value, flat, as that of a parameter under ZeRO-3."""
    size = parameter.ds_tensor.numel()
    part = value.flatten()[size * torch.distributed.get_rank() :][:size]
    return torch.nn.functional.pad(part, (0, size - part.numel()))


def joined(part, parameter):
    """The whole tensor of every rank's part of a parameter under ZeRO-3."""
    part = part.to(parameter.ds_tensor.device)
    whole = part.new_empty(torch.distributed.get_world_size() * part.numel())
    torch.distributed.all_gather_into_tensor(whole, part.contiguous())
    return whole[: parameter.ds_numel].view(parameter.ds_shape)


def let_go(model):
    """Under ZeRO-3, release gathered weights: what is written to the parts has to be seen."""
    for parameter in model.parameters():
        if is_divided(parameter):
            return parameter._z3_optimizer.empty_partition_cache()


def load_weights(model, tensors):
    """`load_state_dict` with whole tensors, which every rank has, for a model that an engine has."""
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

    let_go(model)
    with torch.no_grad():
        for name, own in model.state_dict(keep_vars=True).items():
            value = tensors[name].to(own.device)
            if is_divided(own):
                own.ds_tensor.copy_(part_of(value, own))
                safe_set_local_fp32_param(own, part_of(value, own))
            else:
                own.copy_(value)
                safe_set_full_fp32_param(own, value)  # of a buffer there is none
