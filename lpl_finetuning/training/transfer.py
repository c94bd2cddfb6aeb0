"""Tensors on their way from the host to the device."""

import torch


def pinned(tensor, device):
    """A CPU tensor in memory from which it can be copied to the device while the host goes on."""
    return tensor.pin_memory() if torch.device(device).type == "cuda" and not tensor.is_pinned() else tensor


def to_device(tensor, device, dtype=None):
    """A CPU tensor on the device; by way of pinned memory on CUDA, so that the host does not wait."""
    tensor = tensor.to(dtype=dtype)  # before it is pinned: a copy that converts goes by unpinned memory
    return pinned(tensor, device).to(device, non_blocking=True)
