"""Counts the bytes of live tensors while code runs, on the meta device as a CUDA GPU would hold them.

`LiveStorages` sees every operation and follows each storage from its first tensor to its last. `CudaRules` gives
tensors on the meta device what CUDA does and the meta device does not: autocast, attention without its matrix,
optimizers that treat all tensors at once. Nothing is computed, so the figures of SDXL take seconds on any machine.

Not counted: CUDA's own context, workspaces inside a kernel, and memory lost to fragmentation.
"""

import contextlib
import sys
import weakref
from dataclasses import dataclass
from functools import partial
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten

# ---------------------------------------------------------------------------------------------------------------------
# Live storages


@dataclass(frozen=True)
class Peak:
    """The moment at which most bytes were live.

    Attributes:
        size: live bytes.
        where: the label of the code that ran.
        parts: {tag: bytes} of the live storages; the tag of untagged storages is "activations".
    """

    size: int
    where: str
    parts: dict[str, int]


class LiveStorages(TorchDispatchMode):
    """Context manager: follows the storages that operations on `device` return, until nothing refers to them.

    Attributes:
        label: what runs now; the caller sets it.
    """

    def __init__(self, device="meta"):
        super().__init__()
        self.device, self.label = device, ""
        self.events = []  # (number of the storage, bytes, negative where it ends; label)
        self.living = {}  # address of a storage: (its number, reference that reports its end)
        self.tags, self.count, self.first = {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.add(result)
        return result

    @contextlib.contextmanager
    def labelled(self, label):
        """Context manager: operations inside have this label."""
        before, self.label = self.label, label
        try:
            yield
        finally:
            self.label = before

    def begin(self):
        """Leave what has happened up to now out of `peaks`."""
        self.first = len(self.events)

    def add(self, tensors, tag=None):
        """Follow the storages of a tree of tensors; a tag names the part of the memory to which they belong."""
        for tensor in tree_leaves(tensors):
            if not isinstance(tensor, torch.Tensor) or tensor.device.type != self.device:
                continue
            storage = tensor.untyped_storage()
            address = storage._cdata
            if address not in self.living:
                number, size = self.count, storage.nbytes()
                self.count += 1
                ended = partial(self._end, address, number, size)
                self.living[address] = number, weakref.ref(storage, ended)
                self.events.append((number, size, self.label))
            if tag is not None:
                self.tags[self.living[address][0]] = tag

    def _end(self, address, number, size, _):
        del self.living[address]
        self.events.append((number, -size, self.label))

    def peaks(self):
        """Return {label: `Peak`} of what has happened since `begin`."""
        most, total = {}, 0
        for index, (_, size, label) in enumerate(self.events):
            total += size
            if index >= self.first and total > most.get(label, (0, 0))[0]:
                most[label] = total, index
        return {label: Peak(size, label, self.parts_at(index)) for label, (size, index) in most.items()}

    def live_at(self, event):
        """Return {number of a storage: (bytes, label of its first tensor)} after an event."""
        live = {}
        for number, size, label in self.events[: event + 1]:
            if size >= 0:
                live[number] = size, label
            else:
                live.pop(number, None)
        return live

    def parts_at(self, event):
        """Return {tag: live bytes} after an event."""
        parts = {}
        for number, (size, _) in self.live_at(event).items():
            tag = self.tags.get(number, "activations")
            parts[tag] = parts.get(tag, 0) + size
        return parts


# ---------------------------------------------------------------------------------------------------------------------
# What CUDA does and the meta device does not

LOWER = {  # functions that autocast runs in bfloat16 or float16
    "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "linear", "matmul",
    "__matmul__", "__rmatmul__", "mm", "mv", "bmm", "addmm", "addmv", "addbmm", "baddbmm", "einsum", "prelu",
    "scaled_dot_product_attention",
}  # fmt: skip
UPPER = {  # functions whose inputs autocast casts to float32
    "layer_norm", "group_norm", "rms_norm", "interpolate", "pow", "__pow__", "__rpow__", "exp", "expm1", "log",
    "log10", "log1p", "log2", "reciprocal", "rsqrt", "softplus", "norm", "dist", "cdist", "logsumexp",
    "cosine_similarity", "mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "kl_div", "nll_loss",
}  # fmt: skip
FLOAT32_RESULT = {"softmax", "log_softmax", "sum", "prod", "cumsum", "cumprod"}  # their inputs stay as they are
READ = {"item": 1.0, "__bool__": True, "__float__": 1.0}  # what the host reads of a tensor
FLASH_WIDTH = 256  # channels of a head that flash attention takes
DEVICE_LISTS = ("_get_foreach_kernels_supported_devices", "_get_fused_kernels_supported_devices")


class CudaRules(TorchFunctionMode):
    """Context manager: functions of tensors on the meta device take the memory that they take on a CUDA GPU.

    Attributes:
        attention: the function in the place of `scaled_dot_product_attention`.
    """

    def __init__(self, attention=None):
        super().__init__()
        self.attention = attention or efficient_attention
        self.dtype = None  # of autocast; None where autocast is off
        self.casts = {}  # id of a float32 weight: (the weight, its cast)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, getattr(function, "__name__", "")
        if name in READ and is_meta(args[0]):
            return READ[name]
        if name == "tolist" and is_meta(args[0]):
            return [1.0] * args[0].numel()
        if self.dtype is not None and name in LOWER:
            args, kwargs = self._cast((args, kwargs), self.dtype)
        elif self.dtype is not None and name in UPPER:
            args, kwargs = self._cast((args, kwargs), torch.float32)
        elif self.dtype is not None and name in FLOAT32_RESULT and is_meta(args[0]) and args[0].dtype == self.dtype:
            kwargs = {"dtype": torch.float32} | {key: value for key, value in kwargs.items() if value is not None}
        if name == "scaled_dot_product_attention":
            function = self.attention
        return function(*args, **kwargs)

    @contextlib.contextmanager
    def autocast(self, dtype):
        """Context manager: autocast to a dtype, as `torch.autocast` does on CUDA; off where the dtype is float32."""
        before, self.dtype = self.dtype, None if dtype == torch.float32 else dtype
        try:
            with autocast_flag(self.dtype is not None):
                yield
        finally:
            self.dtype = before
            if before is None:
                self.casts.clear()

    def contexts_of_checkpointing(self):
        """The contexts of a forward pass under gradient checkpointing and of its repetition in the backward pass.

        PyTorch's autograd engine leaves modes for functions behind, so the repetition enters these rules again.
        """
        return contextlib.nullcontext(), self._again(self.dtype or torch.float32)

    @contextlib.contextmanager
    def _again(self, dtype):
        with self, self.autocast(dtype):
            yield

    def _cast(self, tree, dtype):
        return tree_map(partial(self._cast_one, dtype=dtype), tree)

    def _cast_one(self, value, dtype):
        if not is_meta(value) or not value.is_floating_point() or value.dtype in (dtype, torch.float64):
            return value
        weight = value.dtype == torch.float32 and value.requires_grad and value.is_leaf and value._base is None
        if not weight:
            return value.to(dtype)
        if id(value) not in self.casts:
            self.casts[id(value)] = value, value.to(dtype)
        return self.casts[id(value)][1]


def is_meta(value):
    """Whether a value is a tensor on the meta device."""
    return isinstance(value, torch.Tensor) and value.is_meta


def efficient_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """Attention that keeps query, key, value, output and the log of the sums: flash attention where it applies."""
    if attn_mask is None and query.dtype != torch.float32 and query.shape[-1] <= FLASH_WIDTH:
        return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
    if attn_mask is not None:
        attn_mask = attn_mask.to(query.dtype).expand(*query.shape[:-1], key.shape[-2])
    kept = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    return aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, kept, dropout_p, is_causal, scale=scale
    )[0]


@contextlib.contextmanager
def autocast_flag(enabled):
    """Context manager: libraries that ask whether autocast is on are told so."""
    before = torch.is_autocast_enabled("cuda")
    torch.set_autocast_enabled("cuda", enabled)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", before)


class ShortCuts(TorchDispatchMode):
    """Context manager: kernels that the meta device lacks, or composes of many operations, give shapes only."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is aten.native_group_norm.default and args[0].is_meta:
            x, _, _, samples, _, _, groups, _ = args
            normed = torch.empty_like(x, memory_format=torch.contiguous_format)
            return normed, x.new_empty(samples, groups), x.new_empty(samples, groups)
        if function is aten.native_group_norm_backward.default and args[0].is_meta:
            _, x, _, _, _, _, channels, _, _, wanted = args
            shapes = zip((x.shape, (channels,), (channels,)), wanted, strict=True)
            return tuple(x.new_empty(shape) if is_wanted else None for shape, is_wanted in shapes)
        if function is aten._fused_adamw_.default and args[0][0].is_meta:
            return None
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def as_on_cuda(rules):
    """Context manager: the meta device takes the place of a CUDA GPU, in the rules given and for optimizers."""
    with contextlib.ExitStack() as stack:
        for module in (sys.modules["torch.optim.optimizer"], sys.modules["torch.utils._foreach_utils"]):
            for name in DEVICE_LISTS:
                devices = [*getattr(module, name)(), "meta"]
                stack.enter_context(mock.patch.object(module, name, lambda devices=devices: devices))
        stack.enter_context(ShortCuts())
        stack.enter_context(rules)
        yield
