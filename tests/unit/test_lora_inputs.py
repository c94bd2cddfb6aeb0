"""LoRA layers take half-precision inputs as they are: the same outputs and gradients, bit for bit, and no casts."""

import copy

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer

from lpl_finetuning.training.models import TEXT_ENCODER_TARGETS, leave_inputs_to_autocast
from tests.tiny_models import sd3_pipeline, sdxl_pipeline

SDXL_INPUTS = {"sample": (2, 4, 8, 8), "encoder_hidden_states": (2, 7, 32)}
SD3_INPUTS = {"hidden_states": (2, 16, 8, 8), "encoder_hidden_states": (2, 5, 40), "pooled_projections": (2, 32)}


def models():
    """{name: (model in bfloat16, its arguments, layers with a LoRA)}"""
    torch.manual_seed(0)
    sdxl, sd3 = sdxl_pipeline(), sd3_pipeline(t5=False, sd35=True)
    time = torch.tensor([200.0, 700.0])

    def drawn(shapes):
        return {name: torch.randn(shape).bfloat16() for name, shape in shapes.items()}

    added = {"text_embeds": torch.randn(2, 16).bfloat16(), "time_ids": torch.randn(2, 6)}
    return {
        "unet": (sdxl.unet, drawn(SDXL_INPUTS) | {"timestep": time, "added_cond_kwargs": added},
                 ["to_q", "to_k", "to_v", "to_out.0", "conv1", "proj_in"]),
        "transformer": (sd3.transformer, drawn(SD3_INPUTS) | {"timestep": time},
                        ["to_q", "to_k", "attn.to_v", "add_k_proj"]),
        "text_encoder": (sdxl.text_encoder, {"input_ids": torch.arange(14).view(2, 7)}, list(TEXT_ENCODER_TARGETS)),
    }  # fmt: skip


def passed(model, inputs):
    """(output, {name: gradient}, number of casts to float32 in LoRA layers) of a pass under autocast."""
    casts, own = [0], LoraLayer._cast_input_dtype

    def counted(layer, x, dtype):
        result = own(layer, x, dtype)
        casts[0] += result.dtype != x.dtype
        return result

    LoraLayer._cast_input_dtype = counted
    try:
        with torch.autocast("cpu", torch.bfloat16):
            output = model(**inputs)[0]
            output.float().square().mean().backward()
    finally:
        del LoraLayer._cast_input_dtype
    gradients = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    return output, gradients, casts[0]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["unet", "transformer", "text_encoder"])
def test_the_same_numbers_without_casts(name, checkpointing):
    model, inputs, layers = models()[name]
    model = model.bfloat16().requires_grad_(False).train()
    if checkpointing:
        turn_on = getattr(model, "enable_gradient_checkpointing", None) or model.gradient_checkpointing_enable
        turn_on()
    model.add_adapter(LoraConfig(r=4, target_modules=layers, init_lora_weights=False), adapter_name="default")
    for parameter in (value for key, value in model.named_parameters() if "lora_" in key):
        parameter.data = parameter.data.float()
    ours = copy.deepcopy(model)
    leave_inputs_to_autocast(ours)
    wanted, found = passed(model, inputs), passed(ours, inputs)
    assert wanted[2] > 0 and found[2] == 0
    assert torch.equal(wanted[0], found[0])
    assert wanted[1].keys() == found[1].keys() and wanted[1]
    assert all(torch.equal(value, found[1][key]) for key, value in wanted[1].items())


@pytest.mark.parametrize("more", [{"lora_dropout": 0.1}, {"use_dora": True}])
def test_where_the_cast_matters_it_stays(more):
    model, _, layers = models()["transformer"]
    model.add_adapter(LoraConfig(r=4, target_modules=layers, **more), adapter_name="default")
    leave_inputs_to_autocast(model)
    assert all(module.cast_input_dtype_enabled for module in model.modules() if isinstance(module, LoraLayer))
