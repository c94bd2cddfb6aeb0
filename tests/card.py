"""A device that exists nowhere, with real numbers, that refuses to mix with the CPU as a GPU does.

Inside `card()` a tensor on "meta:1" is an `OnCard`: it holds a CPU tensor with the numbers. An
operation on such a tensor and a CPU tensor of one dimension or more raises RuntimeError, as CUDA does, and so does
reading the numbers without `.cpu()`. FakeTensorMode would refuse the same, but has no numbers to save.
"""

import contextlib
import functools
import os
from unittest import mock

import torch
import torch._dynamo  # it would be imported under the mode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

CARD = torch.device("meta", 1)  # PyTorch knows this kind; the libraries load by way of "meta", which has no number


class OnCard(torch.Tensor):
    """A tensor on `CARD`; `numbers` is a CPU tensor of the same shape and strides."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, numbers):
        return torch.Tensor._make_wrapper_subclass(
            cls, numbers.shape, strides=numbers.stride(), storage_offset=numbers.storage_offset(),
            dtype=numbers.dtype, device=CARD, requires_grad=numbers.requires_grad,
        )  # fmt: skip

    def __init__(self, numbers):
        self.numbers = numbers

    def tolist(self):
        """The numbers; PyTorch refuses this for its subclasses, and allows it on a GPU."""
        return self.numbers.tolist()

    def __repr__(self, **_):
        return f"OnCard({self.numbers})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})


COPIES = ("aten::_to_copy", "aten::copy_")  # what may move numbers from one device to the other


@functools.cache
def aliases(func):
    """Whether an operation returns one of its arguments, or a view of it."""
    return any(value.alias_info is not None for value in func._schema.returns)


def compute(func, args, kwargs):
    """What an operation of PyTorch gives, on the device that its arguments ask for."""
    found = []
    bare_args, bare_kwargs = bare(args, found), {name: bare(value, found) for name, value in kwargs.items()}
    name, wanted = func._schema.name, kwargs.get("device")
    on_card = any(isinstance(each, OnCard) for each in found)
    mixed = on_card and any(not isinstance(each, OnCard) and each.ndim for each in found)
    if mixed and name not in COPIES:
        raise RuntimeError(f"Expected all tensors to be on the same device, but found cpu and {CARD}: {func}")
    to_card = torch.device(wanted) == CARD if wanted is not None else on_card
    if name == "aten::copy_":
        to_card = isinstance(args[0], OnCard)
    elif to_card or (on_card and wanted is not None):
        bare_kwargs |= {"device": torch.device("cpu")} if wanted is not None else {}
    result = func(*bare_args, **bare_kwargs)
    if not to_card:
        return result.clone() if on_card and isinstance(result, torch.Tensor) and name != "aten::copy_" else result
    wrapped = on_the_card(result)
    return return_and_correct_aliasing(func, args, kwargs, wrapped) if on_card and aliases(func) else wrapped


def on_the_card(result):
    """What an operation returned on the CPU, as what it would return on `CARD`."""
    if isinstance(result, torch.Tensor):
        return OnCard(result)
    return type(result)(map(on_the_card, result)) if isinstance(result, (list, tuple)) else result


def bare(value, found):
    """A value with the CPU tensors of its `OnCard`s in their place; adds all its tensors to `found`."""
    if isinstance(value, torch.Tensor):
        found.append(value)
        return value.numbers if isinstance(value, OnCard) else value
    if isinstance(value, (list, tuple)):
        return type(value)(bare(each, found) for each in value)
    return value


class Card(TorchDispatchMode):
    """Inside, PyTorch makes an `OnCard` where a tensor is asked for on `CARD`."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})


class CpuGenerator(torch.Generator):
    """A generator on the CPU, whatever device is asked for; diffusers moves what it draws."""

    def __new__(cls, device="cpu"):
        return super().__new__(cls)


def on_device(make):
    """`torch.tensor`, by way of the CPU: PyTorch makes it without numbers."""

    def tensor(data, *, device=None, **more):
        if device is not None and torch.device(device) == CARD:
            return make(data, device="cpu", **more).to(CARD)
        return make(data, device=device, **more)

    return tensor


class Autocast(torch.autocast):
    """Autocast, which PyTorch does not have for `CARD`: nothing happens inside."""

    def __init__(self, device_type, *args, **kwargs):
        super().__init__("cpu" if device_type == CARD.type else device_type, *args, **kwargs)


@contextlib.contextmanager
def card():
    """Context manager: `Accelerator` runs on `CARD`."""
    with mock.patch.dict(os.environ, ACCELERATE_TORCH_DEVICE=str(CARD)), \
            mock.patch.multiple(torch, Generator=CpuGenerator, autocast=Autocast, tensor=on_device(torch.tensor)), \
            Card():  # fmt: skip
        yield
