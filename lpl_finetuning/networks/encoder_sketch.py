"""What tells the latents of one autoencoder from those of another, whatever file its weights are in. No torch.

A copy in float16, or in a single file under other names, is the same autoencoder: its latents are equal but for
rounding. A hash of the file does not know that; a random projection of the encoder's weights does. Its numbers change
little by rounding, and much where channels are exchanged, a sign is flipped or the encoder is trained further. The
decoder makes no latents and does not count.
"""

import functools
from pathlib import Path

import numpy as np

from lpl_finetuning.base_model import safetensors_of, tensors_of, weight_files, weight_problem

ENCODER = ("encoder.", "quant_conv.")  # beginnings of diffusers' names
DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}  # 8 bits round too much
TOLERANCE = 0.01  # of the norm; rounding to bfloat16 moves a number by 0.001 of it (standard deviation)


def encoder_sketch(base):
    """[[tensors' size, norm, projection]] of the encoder's weights, by size, to six digits; None where they can't be
    read: they are not on this machine, in a pickle, or in a dtype below 16 bits.

    The norm and the projection are those of all tensors of a size. Each is projected on a vector of random signs.

    Args:
        base: the `BaseModel`; its autoencoder may be a folder, lie in a single file or in the Hub's cache.
    """
    places = weights_of(base)
    if not places or any(weight_problem(path) for path, _ in places):
        return None
    found = {}
    for path, names in places:
        status = path.stat()
        sums = sums_of(path, names, (status.st_size, status.st_mtime_ns))
        if sums is None:
            return None
        for size, (square, projection) in sums.items():
            before = found.get(size, (0.0, 0.0))
            found[size] = before[0] + square, before[1] + projection
    return [[size, rounded(square**0.5), rounded(projection)] for size, (square, projection) in sorted(found.items())]


def rounded(number):
    """The number to six digits."""
    return float(f"{number:.6g}")


def weights_of(base):
    """[(file, names of the encoder's tensors in it)] of the autoencoder; [] where there is no such file here."""
    part = base.family.autoencoder.name
    single = base.unpacked.get(base.place(part).name)
    if not single:
        paths = safetensors_of(base, part)
    elif part in single.borrowed:
        folder = Path(single.borrowed[part])
        paths = weight_files(base.flag(part), folder, None) if folder.is_dir() else []
    else:
        return [
            (single.path, tuple(prefix + piece.source for name, piece in pieces.items() if name.startswith(ENCODER)))
            for file, (prefix, pieces) in single.parts.items()
            if file.split("/")[0] in (part, file)
        ]
    if any(path.suffix != ".safetensors" for path in paths):
        return []
    return [(path, None) for path in paths]


@functools.lru_cache(maxsize=8)
def sums_of(path, names, stamp):
    """{size: (sum of squares, projection)} of tensors of a safetensors file; None where one is not read.

    Args:
        names: of the tensors; None for those that diffusers calls the encoder's.
        stamp: size and time of the file, for the cache.
    """
    header, begins = tensors_of(path)
    names = [name for name in header if name.startswith(ENCODER)] if names is None else names
    found = {}
    for name in names:
        entry = header[name]
        if entry["dtype"] not in DTYPES:
            return None
        kind, (first, end) = np.dtype(DTYPES[entry["dtype"]]), entry["data_offsets"]
        values = np.fromfile(path, kind, (end - first) // kind.itemsize, offset=begins + first)
        if entry["dtype"] == "BF16":
            values = (values.astype(np.uint32) << 16).view(np.float32)
        values = values.astype(np.float64)
        square, projection = found.get(values.size, (0.0, 0.0))
        found[values.size] = square + float(values @ values), projection + float(values @ signs(values.size))
    return found


@functools.lru_cache(maxsize=32)
def signs(count):
    """(count,) of 1 and -1, int8: always the same ones, from the bits of a generator that numpy keeps as it is."""
    words = np.random.PCG64(count).random_raw(-(-count // 64)).astype("<u8")
    return np.unpackbits(words.view(np.uint8))[:count].astype(np.int8) * 2 - 1


def same_encoder(one, other):
    """Whether two results of `encoder_sketch` are those of one encoder, but for rounding."""
    if [row[0] for row in one] != [row[0] for row in other]:
        return False
    (_, norms, projections), (_, other_norms, other_projections) = np.array(one).T, np.array(other).T
    apart = np.maximum(abs(norms - other_norms), abs(projections - other_projections))
    return bool((apart <= TOLERANCE * norms).all())
