"""What tells the latents of one autoencoder from those of another, whatever file its weights are in. No torch.

A copy in float16, or in a single file with other names and shapes, is the same autoencoder: its latents are equal but
for rounding. A hash of the file does not know that. The norms of the encoder's weight tensors do: neither a name, nor
a shape, nor the precision changes them, and a further training changes some. The decoder makes no latents and does not
count.
"""

import numpy as np

from lpl_finetuning.base_model import tensors_of, weights_here

PREFIXES = tuple(f"{place}{part}." for place in ("", "first_stage_model.") for part in ("encoder", "quant_conv"))
DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
TOLERANCE = 0.002  # relative: bfloat16 has 2^-9 for a number, and much less for the norm of many


def encoder_norms(base):
    """The norms of the encoder's matrices and kernels, largest first, to six digits; None where no file is here.

    Args:
        base: the `BaseModel`; its autoencoder may be a folder, or lie in a single file. What lies on the Hub, in a
            pickle, or in a dtype below 16 bits has no norms.
    """
    part = base.family.autoencoder.name
    single = base.unpacked.get(base.place(part).name)
    paths = [single.path] if single else weights_here(base, part)
    if not paths or any(path.suffix != ".safetensors" for path in paths):
        return None
    found = [norm for path in paths for norm in norms_in(path)]
    return sorted(found, reverse=True) if found and None not in found else None


def norms_in(path):
    """The norms of the encoder's tensors with two or more dimensions in a file; None for a tensor that is not read."""
    header, begins = tensors_of(path)
    found = []
    for name, entry in header.items():
        if not name.startswith(PREFIXES) or len(entry["shape"]) < 2:
            continue
        if entry["dtype"] not in DTYPES:
            return [None]
        first, end = entry["data_offsets"]
        kind = np.dtype(DTYPES[entry["dtype"]])
        values = np.fromfile(path, kind, (end - first) // kind.itemsize, offset=begins + first)
        if entry["dtype"] == "BF16":
            values = (values.astype(np.uint32) << 16).view(np.float32)
        found.append(float(f"{np.linalg.norm(values.astype(np.float64)):.6g}"))
    return found


def same_encoder(one, other):
    """Whether two lists of `encoder_norms` are those of one encoder, but for rounding."""
    return len(one) == len(other) and bool(np.allclose(one, other, rtol=TOLERANCE, atol=0))
