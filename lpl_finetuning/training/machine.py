"""What the GPUs of this machine can do, compared with the flags before any weights load.

A capability is CUDA's pair (major, minor): (7, 5) for a T4, (8, 0) for an A100.
"""

import os
import sys
from dataclasses import dataclass

import torch
from accelerate.utils import is_bf16_available

from lpl_finetuning.base_model import read_json
from lpl_finetuning.errors import require
from lpl_finetuning.evaluation.networks import is_installed
from lpl_finetuning.flag_checks import precision_source
from lpl_finetuning.flags import mixed_precision

BFLOAT16 = (8, 0)  # lowest capability that computes in bfloat16; PyTorch emulates it below, and cuDNN has no kernels
INT8 = (7, 5)  # of bitsandbytes' multiplication in 8 bits
TRITON = (7, 0)  # of torch.compile


@dataclass(frozen=True)
class Card:
    """A GPU of NVIDIA."""

    name: str
    capability: tuple[int, int]
    kernels: tuple[str, ...]  # what PyTorch was built for: "sm_75", "compute_90"

    def __str__(self):
        return f"{self.name} (compute capability {'.'.join(map(str, self.capability))})"


def cards_in_use():
    """The `Card`s that this machine's ranks will use; none without CUDA, or with a GPU of AMD."""
    if not torch.cuda.is_available() or torch.version.hip:
        return []
    ranks = min(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count())
    kernels = tuple(torch.cuda.get_arch_list())
    return [Card(torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index), kernels)
            for index in range(ranks)]  # fmt: skip


def has_kernels(capability, kernels):
    """Whether a build of PyTorch runs on a GPU: by a kernel of its major version, or one that is compiled anew."""
    for name in kernels:
        kind, _, number = name.partition("_")
        version = divmod(int(number.rstrip("af")), 10)
        same = version[0] == capability[0] and version <= tuple(capability)
        exact = not number.isdigit() and kind == "sm"  # sm_90a runs on 9.0 alone
        if (version == tuple(capability) if exact else same) or (kind == "compute" and version <= tuple(capability)):
            return True
    return not kernels


def check_cards(args, cards):
    """Refuse what a GPU can't compute, or only emulates.

    Args:
        cards: the `Card`s of this machine.

    Raises:
        UserError: names the flag and the GPU.
    """
    require(cards or mixed_precision(args) != "bf16" or is_bf16_available(ignore_tpu=True),
            f"{precision_source(args)} bf16: this device does not compute in bfloat16; use no")  # fmt: skip
    if not cards and mixed_precision(args) == "bf16" and emulates_bfloat16():
        print(f"warning: {precision_source(args)} bf16: this CPU emulates bfloat16, in which convolutions take many "
              "times as long; use no", file=sys.stderr)  # fmt: skip
    for card in cards:
        require(has_kernels(card.capability, card.kernels),
                f"{card}: the installed PyTorch {torch.__version__} has no kernels for this GPU, only for "
                f"{', '.join(card.kernels)}; install a build of PyTorch that has them")  # fmt: skip
        for flag in flags_in_bfloat16(args):
            require(card.capability >= BFLOAT16, f"{flag}: {card} does not compute in bfloat16, which needs 8.0 (RTX "
                    "30, A100) or newer, and emulates it slowly; use float16: --mixed_precision fp16")  # fmt: skip
        require(not args.torch_compile or card.capability >= TRITON,
                f"--torch_compile: {card} is too old for PyTorch's compiler, which needs 7.0 (V100) or newer; leave "
                "it out")  # fmt: skip
        require(not in_eight_bits(args) or card.capability >= INT8,
                f"--bnb_quantization_config_path {args.bnb_quantization_config_path}: {card} does not multiply in 8 "
                "bits, which needs 7.5 (T4, RTX 20) or newer; use load_in_4bit")  # fmt: skip
    require(not (cards and args.torch_compile) or is_installed("triton"),
            "--torch_compile: the package triton is not installed, with which PyTorch compiles for GPUs; install it, "
            "or leave the flag out")  # fmt: skip
    if args.allow_tf32 and any(card.capability < BFLOAT16 for card in cards):
        print("warning: --allow_tf32 does nothing on a GPU below compute capability 8.0", file=sys.stderr)


def emulates_bfloat16():
    """Whether the device is a CPU that converts bfloat16 to float32 and back in software."""
    return not torch.accelerator.is_available() and not computes_bfloat16()


def computes_bfloat16():
    """Whether this CPU has instructions that PyTorch's kernels use for bfloat16, which begin with AVX512."""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def flags_in_bfloat16(args):
    """The flags, with their values, that ask for bfloat16 on the GPU."""
    found = [f"{precision_source(args)} bf16"] if mixed_precision(args) == "bf16" else []
    if args.lpl_vae_dtype == "bfloat16":
        found.append("--lpl_vae_dtype bfloat16")
    if quantization_settings(args).get("bnb_4bit_compute_dtype") == "bfloat16":
        found.append(f"bnb_4bit_compute_dtype bfloat16 in {args.bnb_quantization_config_path}")
    return found


def in_eight_bits(args):
    """Whether the base model is quantized to 8 bits."""
    return bool(quantization_settings(args).get("load_in_8bit"))


def quantization_settings(args):
    """The content of --bnb_quantization_config_path; {} without it."""
    return read_json(args.bnb_quantization_config_path) if args.bnb_quantization_config_path else {}
