"""Numbers that follow from a model's structure and from shapes: computed once, then read from the cache folder."""

import contextlib
import inspect
import json

import diffusers
import peft
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

import lpl_utils
from lpl_finetuning.files import cache_folder, digest, sha256_of, write_whole

LIBRARIES = {library.__name__: library.__version__ for library in (diffusers, peft, torch, transformers)}
PLACE_AND_HOOKS = ("_name_or_path", "_backward", "_forward", "_state_dict", "_load_state_dict", "_is_full_backward")


def remembered(cache_dir, code, compute, **what):
    """What an earlier start computed from the same things, from `plans` in the cache folder; else compute().

    The estimate of SDXL takes seconds, and every start of a run needs the same estimate.

    Args:
        code: functions and classes that the result follows from. The key contains the content of their files, of this
            file and of `lpl_utils`, and the versions of the libraries.
        compute: function without arguments; returns what JSON can hold.
        what: everything else that the result follows from, described by `described`.
    """
    try:
        files = [__file__, lpl_utils.__file__, *map(inspect.getfile, code)]
        key = digest(libraries=LIBRARIES, code=sorted({sha256_of(file) for file in files}), **what)
    except (OSError, TypeError):  # code that has no file, for instance in a notebook
        return compute()
    path = cache_folder(cache_dir) / "plans" / f"{key}.json"
    with contextlib.suppress(OSError, ValueError):
        return json.loads(path.read_text())
    result = compute()
    with contextlib.suppress(OSError):  # the cache can't be written
        write_whole(path, json.dumps(result).encode())
    return result


def described(value):
    """All that a forward pass on the meta device may read of a value, in a form that JSON can hold.

    Modules are given by their classes and attributes, tensors by shape, dtype and requires_grad, other objects by
    their class.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, torch.nn.Module):
        return {name: [type(module).__qualname__, described(vars(module))]
                for name, module in value.named_modules()}  # fmt: skip
    if isinstance(value, torch.Tensor):
        return [*value.shape, str(value.dtype), value.requires_grad]
    if isinstance(value, dict):
        return {str(key): entry_of(item) for key, item in value.items() if not str(key).startswith(PLACE_AND_HOOKS)}
    if isinstance(value, list | tuple):
        return [entry_of(item) for item in value]
    return str(value) if isinstance(value, torch.dtype) else getattr(value, "__qualname__", type(value).__qualname__)


def entry_of(value):
    """`described`, but a module by its class only: `described` lists each module of a model once."""
    return type(value).__qualname__ if isinstance(value, torch.nn.Module) else described(value)


def described_parts(value):
    """`described` for each attribute of an object, models among them, under the name of its class."""
    return [type(value).__qualname__, {name: described(part) for name, part in vars(value).items()}]


class ShapesOfNorms(TorchDispatchMode):
    """Context manager: group norms on the meta device give tensors of the right shapes and nothing else.

    PyTorch has no meta kernel for them and composes them of a dozen operations, half of the time of an estimate.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.native_group_norm.default and args[0].is_meta:
            x, _, _, samples, _, _, groups, _ = args
            normed = torch.empty_like(x, memory_format=torch.contiguous_format)
            return normed, x.new_empty(samples, groups), x.new_empty(samples, groups)
        if func is torch.ops.aten.native_group_norm_backward.default and args[0].is_meta:
            _, x, _, _, _, _, channels, _, _, wanted = args
            shapes = zip((x.shape, (channels,), (channels,)), wanted, strict=True)
            return tuple(x.new_empty(shape) if is_wanted else None for shape, is_wanted in shapes)
        return func(*args, **(kwargs or {}))
