"""Out of memory: which flags a message names, in which order, and which errors it is about."""

from types import SimpleNamespace

import pytest
import torch

import train_sdxl_lpl
from lpl_finetuning.errors import RankError, during
from lpl_finetuning.training import out_of_memory
from lpl_finetuning.training.live_memory import Peak

GB = 10**9
FIXED = {"weights": 10 * GB, "gradients": 9 * GB, "optimizer state": 20 * GB, "EMA": 8 * GB}


def peak(rest):
    """A `Peak` with so many bytes of activations and temporaries."""
    return Peak(sum(FIXED.values()) + rest, "", FIXED | {"everything else": rest})


PEAKS = {"forward": peak(40 * GB), "LPL": peak(46 * GB), "backward": peak(42 * GB), "optimizer step": peak(0)}
GPU, CPU = (SimpleNamespace(device=torch.device(kind), num_processes=1, process_index=0, mixed_precision="bf16")
            for kind in ("cuda", "cpu"))  # fmt: skip


def said(error, flags, *more, accelerator=GPU, doing="training", peaks=PEAKS):
    """The message about an error in a run with some flags."""
    args = train_sdxl_lpl.parse_args([*flags, *map(str, more)])
    explained = out_of_memory.explained_if_out_of_memory(args, accelerator, peaks)
    with pytest.raises(RankError) as caught, explained, during(doing):
        raise error
    return str(caught.value)


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 15.77 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried "
                 "to allocate 80000000000 bytes. Error code 12 (Cannot allocate memory)"),
    RuntimeError("MPS backend out of memory (MPS allocated: 18.13 GB)"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    MemoryError(),
])  # fmt: skip
def test_errors_of_all_kinds(error):
    assert out_of_memory.is_out_of_memory(error)


def test_other_errors_pass(flags):
    args = train_sdxl_lpl.parse_args(flags)
    with pytest.raises(RuntimeError, match="same device"), \
            out_of_memory.explained_if_out_of_memory(args, GPU, PEAKS):  # fmt: skip
        raise RuntimeError("Expected all tensors to be on the same device")


def test_flags_in_order_of_what_they_save(flags, tmp_path):
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0")
    full = said(error, flags, "--use_ema", "--use_lpl", "--output_dir", tmp_path, doing="computing the gradients")
    assert full == (
        "the GPU ran out of memory while computing the gradients (asked for 2.00 GiB); what helps here, most first: "
        "--use_lora (about 42.00 GB), --gradient_checkpointing (about 32.00 GB), --train_batch_size 2 with "
        "--gradient_accumulation_steps 2 (about 23.00 GB), --optimizer adafactor (about 19.80 GB), --use_8bit_adam "
        "(about 15.00 GB); no checkpoint was written yet"
    )
    set_already = ["--use_ema", "--offload_ema", "--use_8bit_adam", "--gradient_checkpointing", "--use_lora",
                   "--train_batch_size", 1]  # fmt: skip
    lora = said(error, flags, *set_already, "--output_dir", tmp_path)
    assert "configs/nf4.json (about 6.00 GB), --resolution below 64;" in lora
    assert not any(flag in lora for flag in map(str, set_already))


def test_what_was_being_done_decides(flags, tmp_path):

    def said_while(doing, **more):
        return said(
            torch.OutOfMemoryError("CUDA out of memory."), flags, "--output_dir", tmp_path, doing=doing, **more
        )

    drawn = said_while("drawing the validation pictures")
    assert "--num_validation_images 1" in drawn and "--gradient_checkpointing" not in drawn
    encoded = said_while("encoding images")
    assert "while encoding images; what helps here, most first: close other programs" in encoded
    measured = said_while("measuring the held-out images")
    assert "--train_batch_size 2" in measured
    bare = said_while("training", accelerator=CPU, peaks={})
    assert bare.startswith("the machine ran out of memory while training; what helps here, most first: --use_lora,")
    assert "bit" not in bare and "bf16" not in bare


def test_the_innermost_name_stays():
    with pytest.raises(ValueError) as caught, during("training"), during("making an optimizer step"):
        raise ValueError
    assert caught.value.during == "making an optimizer step"


def test_a_flag_saves_what_the_highest_phase_falls():
    """LPL's 6 GB stand above the backward pass by 4 GB; the flags of LPL save no more than that."""
    assert out_of_memory.saved_bytes(PEAKS, {out_of_memory.LPL: 1}) == 4 * GB
    assert out_of_memory.saved_bytes(PEAKS, {out_of_memory.LPL: 0.5}) == 3 * GB
    assert out_of_memory.saved_bytes(PEAKS, {"EMA": 1}) == 8 * GB
    assert out_of_memory.saved_bytes({}, {"EMA": 1}) == 0


def test_without_a_count_the_gpu_says_what_it_held(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 60 * GB)
    there = {"": Peak(47 * GB, "", FIXED)}
    found = out_of_memory.in_use(there, torch.device("cuda"))
    assert found["backward"].kinds["everything else"] == 13 * GB and found["backward"].size == 60 * GB
    assert out_of_memory.in_use(there, torch.device("cpu")) == there
    assert out_of_memory.in_use(PEAKS, torch.device("cuda")) == PEAKS
