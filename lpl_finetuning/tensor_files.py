"""Safetensors files written a tensor at a time, and hashed while they are written.

safetensors' own `save_file` brings all tensors of a GPU into the machine's memory before it writes the first: 31 GB
for SDXL with optimizer and average. Its file must be read again to be hashed.
"""

import hashlib
import json

import torch

from lpl_finetuning.base_model import tensors_of

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
NAMES = {name: dtype for dtype, name in DTYPES.items()}
PIECE = 64 * 2**20  # bytes that are written and hashed at a time


def save_dtype(args, default="float32"):
    """The dtype of --save_dtype for what was trained. default: its name where the flag is not given."""
    return getattr(torch, args.save_dtype or default)


def write_tensors(path, tensors, metadata=None):
    """Write a safetensors file; returns the sha256 of its bytes, hex.

    Args:
        tensors: {name: tensor} on any device; tensors that share memory are written once each.
        metadata: {name: text} for the header.
    """
    names = in_file_order(tensors)
    header, end = {"__metadata__": metadata} if metadata else {}, 0
    for name in names:
        value = tensors[name]
        begin, end = end, end + value.numel() * value.element_size()
        header[name] = {"dtype": DTYPES[value.dtype], "shape": list(value.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    content = hashlib.sha256()
    with open(path, "wb", buffering=0) as file:

        def put(data):
            for begin in range(0, len(data), PIECE):
                piece = data[begin : begin + PIECE]
                content.update(piece)
                while len(piece):  # without a buffer a write may be short
                    piece = piece[file.write(piece) :]

        put(memoryview(len(text).to_bytes(8, "little") + text))
        for name in names:
            put(bytes_of(tensors[name]))
    return content.hexdigest()


def in_file_order(tensors):
    """The names of tensors in the order of their bytes in a file, so that each begins at its alignment."""
    return sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))


def sha256_of_tensors(tensors):
    """sha256, hex, of what `write_tensors` writes behind the header: the hash that modelspec and A1111 know."""
    content = hashlib.sha256()
    for name in in_file_order(tensors):
        content.update(bytes_of(tensors[name]))
    return content.hexdigest()


def bytes_of(tensor):
    """The bytes of a tensor; a copy only where it is not contiguous on the CPU."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy()) if flat.numel() else memoryview(b"")


def dtype_of_weights(paths):
    """The dtype of most bytes of the floating-point tensors in safetensors files; None where there are none."""
    sizes = {}
    for entry in (entry for path in paths for entry in tensors_of(path)[0].values()):
        begin, end = entry["data_offsets"]
        dtype = NAMES.get(entry["dtype"])
        if dtype is not None and dtype.is_floating_point and dtype.itemsize > 1:
            sizes[dtype] = sizes.get(dtype, 0) + end - begin
    return max(sizes, key=sizes.get, default=None)
