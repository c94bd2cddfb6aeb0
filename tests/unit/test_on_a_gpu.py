"""What only a GPU can show of the counted memory: CUDA's autocast and its attention kernels. Run with `--gpu`."""

import pytest
import torch
from torch.nn import functional

from lpl_finetuning.training.live_memory import LiveBytes, cuda_rules

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; see --gpu")]

OPERATIONS = {  # function of half-precision and float32 tensors, (2, 16, 8, 8) and (16, 16)
    "linear": lambda x, w: functional.linear(x.flatten(2).transpose(1, 2), w),
    "matmul": lambda x, w: w @ w,
    "conv2d": lambda x, w: functional.conv2d(x, w[:, :, None, None]),
    "group_norm": lambda x, w: functional.group_norm(x, 4),
    "layer_norm": lambda x, w: functional.layer_norm(x, x.shape[-1:]),
    "softmax": lambda x, w: x.softmax(-1),
    "silu": lambda x, w: functional.silu(x),
    "gelu": lambda x, w: functional.gelu(x),
    "pow": lambda x, w: x**2,
    "mse_loss": lambda x, w: functional.mse_loss(x, x + 1),
    "sum": lambda x, w: x.sum(),
    "cat": lambda x, w: torch.cat([x, x.float()]),
    "addition": lambda x, w: x + x.float(),
    "interpolate": lambda x, w: functional.interpolate(x, scale_factor=2.0),
}


def sample_tensors(device, dtype):
    """(x, w) of `OPERATIONS`; w is float32, as LoRA's weights are."""
    x = torch.ones(2, 16, 8, 8, device=device, dtype=dtype)
    return x, torch.ones(16, 16, device=device, requires_grad=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", OPERATIONS)
def test_dtypes_are_those_of_autocast(name, dtype):
    """The emulation on the meta device gives every operation the dtype that CUDA gives it."""
    if dtype == torch.bfloat16 and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("this GPU does not compute in bfloat16")
    with torch.autocast("cuda", dtype):
        real = OPERATIONS[name](*sample_tensors("cuda", dtype)).dtype
    with cuda_rules(), LiveBytes(), torch.autocast("cpu", dtype):
        assert OPERATIONS[name](*sample_tensors("meta", dtype)).dtype == real


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_attention_allocates_what_is_counted(dtype):
    """Output and sums of exponentials, and no matrix of S x S; CUDA rounds each tensor up to 512 bytes."""

    def query_key_value(device):
        return [torch.ones(2, 3, 1024, 64, device=device, dtype=dtype, requires_grad=True) for _ in range(3)]

    with cuda_rules(), LiveBytes() as counter:
        tensors = query_key_value("meta")
        before = counter.total
        out = functional.scaled_dot_product_attention(*tensors)
        counted = counter.total - before
    tensors = query_key_value("cuda")
    functional.scaled_dot_product_attention(*tensors)  # cuBLAS and the kernel get their workspaces
    before = torch.cuda.memory_allocated()
    out = functional.scaled_dot_product_attention(*tensors)
    allocated = torch.cuda.memory_allocated() - before
    assert out.shape == (2, 3, 1024, 64) and allocated == pytest.approx(counted, abs=4 * 512)
