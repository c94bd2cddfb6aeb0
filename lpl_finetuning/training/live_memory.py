"""Live bytes of a computation: every storage that an operation makes is counted until it is freed.

Computations run on the meta device, whose tensors have shapes and no memory. The meta device has neither autocast nor
attention kernels. `CudaRules` applies those of CUDA, so that the counted tensors are the tensors of a GPU.
"""

import contextlib
import sys
import weakref
from collections import Counter
from dataclasses import dataclass
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
ADDITION, SILU_BACKWARD = aten.add.Tensor, aten.silu_backward.grad_input
REST = "everything else"  # kind of the storages that have no other: activations and temporaries

# ---------------------------------------------------------------------------------------------------------------------
# The count


@dataclass(frozen=True)
class Peak:
    """The largest number of live bytes of a phase, and what the phase computes.

    Attributes:
        size: bytes.
        where: what ran at that time.
        kinds: {kind of storage: bytes} at that time.
        flop: floating-point operations of the phase in a step, see `LiveBytes`; validation counts none.
    """

    size: int
    where: str
    kinds: dict
    flop: int = 0


class LiveBytes(TorchDispatchMode):
    """Context manager: counts the bytes of live storages on a device, and the peak of each phase.

    A storage counts from the operation that makes it until nothing holds it, autograd included. Storages from before
    the context, such as weights, count after `hold`.

    Attributes:
        where: what runs now, "phase: details".
        live: {kind: bytes} now.
        peaks: {phase: Peak}, without their operations.
        flop: {phase: floating-point operations} of matrix products, convolutions and attention, as PyTorch counts
            them: a product and its addition are two. Other operations are limited by memory, not by arithmetic.
    """

    def __init__(self, device="meta"):
        super().__init__()
        self.device, self.where = torch.device(device).type, "start"
        self.storages, self.live, self.peaks, self.total = {}, Counter(), {}, 0
        self.flop = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is ADDITION and _accumulates(*args[:2]):
            return args[0] if args[0].is_meta else args[0].add_(args[1])
        result = kwargs.get("grad_input") if func is SILU_BACKWARD else _short_cut(func, args, kwargs)
        if result is None:
            if func is aten._local_scalar_dense.default and args[0].is_meta:
                return 1.0
            if func is aten._to_copy.default and args[0].is_meta and str(kwargs.get("device", "meta")) == "cpu":
                return torch.empty((), dtype=kwargs.get("dtype") or args[0].dtype).expand(args[0].shape)
            result = func(*args, **kwargs)
        if count := flop_registry.get(func.overloadpacket):
            self.flop[self.where.partition(":")[0]] += count(*args, **kwargs, out_val=result)
        self._note(result)
        return result

    def hold(self, kind, tensors):
        """Count the storages of these tensors under a kind, whether they are known or new."""
        for tensor in tensors:
            self._note(tensor, kind)

    def _note(self, result, kind=None):
        """Count the storages of an operation's result: a tensor, or lists of tensors."""
        if isinstance(result, torch.Tensor):
            if result.device.type == self.device:
                self._add(result.untyped_storage(), kind)
        elif isinstance(result, list | tuple):
            for item in result:
                self._note(item, kind)

    def _add(self, storage, kind):
        """Count a storage. A kind given replaces the one that it had."""
        key = storage._cdata
        known = self.storages.get(key)
        if known is None:
            size = storage.nbytes()
            self.storages[key] = [weakref.ref(storage, lambda _: self._remove(key)), size, kind or REST]
            self.live[kind or REST] += size
            self.total += size
            self._compare()
        elif kind is not None and known[2] != kind:
            self.live[known[2]] -= known[1]
            self.live[kind] += known[1]
            known[2] = kind

    def _remove(self, key):
        """Forget a storage that was freed."""
        _, size, kind = self.storages.pop(key)
        self.live[kind] -= size
        self.total -= size

    def _compare(self):
        """Take the live bytes into the peak of the phase."""
        phase = self.where.partition(":")[0]
        if phase not in self.peaks or self.total > self.peaks[phase].size:
            self.peaks[phase] = Peak(self.total, self.where, dict(self.live))

    @contextlib.contextmanager
    def at(self, where):
        """Context manager: what runs inside is called `where`."""
        before, self.where = self.where, where
        self._compare()
        try:
            yield
        finally:
            self.where = before


def _accumulates(old, new):
    """Whether an addition is autograd's sum of two gradients, of which nothing else holds the first.

    Autograd adds such gradients in place, but never under a dispatch mode. The numbers are what PyTorch counts for a
    tensor that autograd alone holds, with the holders of this call.
    """
    if torch._C._current_graph_task_id() == -1 or torch.is_grad_enabled() or not isinstance(new, torch.Tensor):
        return False
    storage = old.untyped_storage()
    alone = old._use_count() == 4 and sys.getrefcount(old) <= 4 and torch._C._storage_Use_Count(storage._cdata) == 2
    return alone and old.nbytes == storage.nbytes() and old.shape == new.shape and old.dtype == new.dtype


def _overload(name):
    """The operation with a name like "add.Tensor"."""
    packet, _, overload = name.partition(".")
    return getattr(getattr(aten, packet), overload)


IN_PLACE = frozenset(map(_overload, (
    "add_.Tensor", "mul_.Tensor", "mul_.Scalar", "lerp_.Scalar", "addcmul_.default", "addcdiv_.default",
    "zero_.default", "normal_.default", "uniform_.default", "fill_.Scalar", "copy_.default",
)))  # fmt: skip
PRODUCTS = (aten.mm.default, aten.addmm.default)
ELEMENTWISE = frozenset(map(_overload, (
    "add.Tensor", "sub.Tensor", "mul.Tensor", "div.Tensor", "sqrt.default", "gelu.default", "silu.default",
    "gelu_backward.default", "silu_backward.default",
)))  # fmt: skip


def _short_cut(func, args, kwargs):
    """The result of an operation on the meta device, shapes only; None where the operation has no short cut.

    PyTorch computes these shapes in Python, or composes the operation of a dozen others. That takes most of a count.
    """
    if not args or not isinstance(args[0], torch.Tensor) or not args[0].is_meta:
        return None
    if kwargs.get("dtype") not in (None, args[0].dtype) or kwargs.get("device") not in (None, args[0].device):
        return None
    x = args[0]
    if func in IN_PLACE:
        return x
    if func in ELEMENTWISE and x.is_floating_point():
        other = args[1] if len(args) > 1 else None
        if isinstance(other, torch.Tensor):
            same = other.is_meta and other.dtype == x.dtype and other.shape == x.shape
            return _like(x) if same else None
        return _like(x)
    if func is aten.zeros_like.default and len(args) == 1:
        return _like(x)
    if func in PRODUCTS:
        left, right = args[-2:]
        return left.new_empty((left.shape[0], right.shape[1]))
    if func is aten.native_layer_norm.default:
        rows = x.shape[: x.dim() - len(args[1])] + (1,) * len(args[1])
        return torch.empty_like(x), x.new_empty(rows, dtype=torch.float32), x.new_empty(rows, dtype=torch.float32)
    if func is aten.native_layer_norm_backward.default:
        weight, wanted = args[5], args[7]
        likes = zip((x, weight, weight), wanted, strict=True)
        return tuple(torch.empty_like(like) if is_wanted else None for like, is_wanted in likes)
    if func is aten.linalg_vector_norm.default and len(args) < 3:
        return x.new_empty(())
    if func is aten.convolution.default and (is_channels_last(x) or is_channels_last(args[1])):
        return torch.empty_like(func(*args), memory_format=torch.channels_last)  # cuDNN's rule; meta ignores weights
    return _group_norm(func, args)


def _like(x):
    """`torch.empty_like`, which is slow on the meta device."""
    return x.new_empty(x.shape) if x.is_contiguous() else torch.empty_like(x)


def is_channels_last(x):
    """Whether a tensor is stored with its channels last, and not in the usual order too."""
    return x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def _group_norm(func, args):
    """`_short_cut` for group norms."""
    if func is aten.native_group_norm.default:
        x, _, _, samples, _, _, groups, _ = args
        normed = torch.empty_like(x, memory_format=torch.contiguous_format)
        return normed, x.new_empty(samples, groups), x.new_empty(samples, groups)
    if func is aten.native_group_norm_backward.default:
        _, x, _, _, _, _, channels, _, _, wanted = args
        shapes = zip((x.shape, (channels,), (channels,)), wanted, strict=True)
        return tuple(x.new_empty(shape) if is_wanted else None for shape, is_wanted in shapes)
    return None


# ---------------------------------------------------------------------------------------------------------------------
# CUDA's rules of autocast and attention

# fmt: off
LOWER = frozenset((  # computed in autocast's dtype
    "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "prelu", "addmm",
    "addmv", "addr", "matmul", "__matmul__", "__rmatmul__", "einsum", "mm", "mv", "linear", "addbmm", "baddbmm", "bmm",
    "chain_matmul",
))
FLOAT32 = frozenset((  # computed in float32
    "acos", "asin", "cosh", "erfinv", "exp", "expm1", "log", "log10", "log2", "log1p", "reciprocal", "rsqrt", "sinh",
    "tan", "pow", "__pow__", "softplus", "layer_norm", "rms_norm", "group_norm", "cosine_similarity", "nll_loss",
    "kl_div", "l1_loss", "smooth_l1_loss", "huber_loss", "mse_loss", "cdist", "renorm", "logsumexp", "interpolate",
    "prod", "softmax", "log_softmax", "cumprod", "cumsum", "norm", "sum",
))
# fmt: on
RULED = LOWER | FLOAT32 | {"scaled_dot_product_attention"}


@contextlib.contextmanager
def cuda_rules():
    """Context manager: `CudaRules`, with the copies of weights dropped where CUDA's autocast drops them."""
    rules, clear, enabled = CudaRules(), torch.clear_autocast_cache, torch.is_autocast_enabled

    def clear_both():
        rules.copies.clear()
        clear()

    with (
        mock.patch.object(torch, "clear_autocast_cache", clear_both),
        mock.patch.object(torch, "is_autocast_enabled", lambda device="cpu": enabled("cpu")),
        mock.patch.object(torch.autograd, "has_torch_function", lambda tensors: False),  # rules hold in backward too
        rules,
    ):
        yield


class CudaRules(TorchFunctionMode):
    """Context manager: tensors take the dtypes of CUDA's autocast, and attention keeps what CUDA's kernels keep.

    Autocast is on where `torch.autocast("cpu", dtype)` is on. That context has no effect on meta tensors, and gradient
    checkpointing restores it in the recomputation. Copies of float32 weights stay until the outermost context ends.

    The attention kernels are FlashAttention in half precision and memory-efficient attention otherwise. Both keep
    query, key, value, output and the logarithm of the sum of exponentials.
    """

    def __init__(self):
        super().__init__()
        self.copies = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if name not in RULED:
            return func(*args, **kwargs)
        if name == "scaled_dot_product_attention":
            return self._attention(*args, **kwargs)
        if torch.is_autocast_enabled():
            dtype = torch.get_autocast_dtype("cpu") if name in LOWER else torch.float32
            args = [self._cast(value, dtype) for value in args]
            kwargs = {key: self._cast(value, dtype) for key, value in kwargs.items()}
        return func(*args, **kwargs)

    def _cast(self, value, dtype):
        """A tensor on the meta device in a dtype; other values as they are."""
        if isinstance(value, list | tuple) and value and isinstance(value[0], torch.Tensor):
            return type(value)([self._cast(item, dtype) for item in value])
        if not isinstance(value, torch.Tensor) or not value.is_meta or not value.is_floating_point():
            return value
        if value.dtype in (dtype, torch.float64):
            return value
        weight = value.dtype == torch.float32 and value.requires_grad and value.is_leaf and not value._is_view()
        if dtype == torch.float32 or not weight or not torch.is_autocast_cache_enabled():
            return value.to(dtype)
        if id(value) not in self.copies:
            self.copies[id(value)] = value.to(dtype)
        return self.copies[id(value)]

    def _attention(self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **more):
        """The output of attention, (B, H, S, D)."""
        if torch.is_autocast_enabled():
            dtype = torch.get_autocast_dtype("cpu")
            query, key, value = (self._cast(tensor, dtype) for tensor in (query, key, value))
        if query.device.type == "cpu":
            return aten._scaled_dot_product_flash_attention_for_cpu(
                query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
            )[0]
        flash = query.dtype != torch.float32 and attn_mask is None and query.shape[-1] <= 256
        if flash and query.shape[-1] % 8 == 0:
            return aten._scaled_dot_product_flash_attention(
                query, key, value, dropout_p, is_causal, False, scale=scale
            )[0]
        if attn_mask is not None:
            attn_mask = attn_mask.to(query.dtype).expand(*query.shape[:-1], key.shape[-2])
        keeps = any(tensor.requires_grad for tensor in (query, key, value))
        return aten._scaled_dot_product_efficient_attention(
            query, key, value, attn_mask, keeps, dropout_p, is_causal, scale=scale
        )[0]
