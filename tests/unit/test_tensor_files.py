"""Safetensors files written a tensor at a time: the same content as safetensors' own, without a copy in memory."""

import ctypes
import hashlib
import json
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lpl_finetuning.base_model import BaseModel, safetensors_of
from lpl_finetuning.families import SD3
from lpl_finetuning.tensor_files import DTYPES, dtype_of_weights, write_tensors
from tests.card import CARD, card
from tests.children import printed_by

MB = 10**6
LIBC, M_MMAP_THRESHOLD = ctypes.CDLL(None), -3


def some_tensors():
    """Tensors of every dtype, and of shapes that need care."""
    torch.manual_seed(0)
    values = {f"of {dtype}": (100 * torch.rand(3, 5)).to(dtype) for dtype in DTYPES}
    shared = torch.randn(6, 4)
    return values | {"scalar": torch.tensor(1.5), "empty": torch.zeros(0, 3), "é": shared, "turned": shared.T,
                     "a part": shared[1:3, ::2], "again": shared}  # fmt: skip


def test_safetensors_reads_the_same(tmp_path):
    path, tensors = tmp_path / "a.safetensors", some_tensors()
    told = write_tensors(path, tensors, {"format": "pt"})
    assert told == hashlib.sha256(path.read_bytes()).hexdigest()
    read = load_file(path)
    assert read.keys() == tensors.keys()
    for name, value in tensors.items():
        assert read[name].dtype == value.dtype and read[name].shape == value.shape
        assert torch.equal(read[name].view(torch.uint8) if value.ndim else read[name],
                           value.contiguous().view(torch.uint8) if value.ndim else value), name  # fmt: skip
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0  # the data are aligned


def peak(work):
    """Bytes by which the memory of this process rises at most while work() runs."""

    def now(name):
        return 1024 * int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1])

    LIBC.malloc_trim(0)  # what was freed and kept for reuse would count as had before
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = now("VmRSS")
    work()
    return now("VmHWM") - before


def peaks_of_writing(folder):
    """Peaks of 160 MB of state, in bytes: on the CPU, of a GPU, and of a GPU by safetensors' own. In a new process."""
    LIBC.mallopt(M_MMAP_THRESHOLD, MB)  # what is freed goes back to the system at once
    here = {str(index): torch.full((5 * MB,), float(index)) for index in range(8)}
    on_cpu = peak(lambda: write_tensors(f"{folder}/a.safetensors", here))
    with card():
        there = {name: here[name].to(CARD) for name in list(here)}
        ours = peak(lambda: write_tensors(f"{folder}/b.safetensors", there))
        return on_cpu, ours, peak(lambda: save_file(there, f"{folder}/c.safetensors"))


@pytest.mark.skipif(
    not (os.access("/proc/self/clear_refs", os.W_OK) and hasattr(LIBC, "mallopt")), reason="needs Linux with glibc"
)
def test_no_second_copy_in_memory(tmp_path):
    """None is copied on the CPU; of a GPU's a tensor at a time, where safetensors copies all."""
    code = f"from tests.unit import test_tensor_files as here; print(list(here.peaks_of_writing({str(tmp_path)!r})))"
    on_cpu, ours, theirs = printed_by(code)
    assert on_cpu < 16 * MB and ours < 60 * MB and theirs > 120 * MB


def test_the_dtype_of_most_bytes(tmp_path):
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"a": torch.zeros(100, dtype=torch.float16), "b": torch.zeros(9),
                         "positions": torch.zeros(900, dtype=torch.int64)})  # fmt: skip
    assert dtype_of_weights([path]) == torch.float16
    write_tensors(path, {"positions": torch.zeros(900, dtype=torch.int64)})
    assert dtype_of_weights([path]) is None and dtype_of_weights([]) is None


def test_files_of_a_model_on_the_hub(tmp_path, monkeypatch):
    """Those in the Hub's cache, whole or in shards; none where nothing is cached, as at the end of a run offline."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    base = BaseModel(SD3, "owner/name")
    assert safetensors_of(base, "text_encoder_3") == []
    snapshot = tmp_path / "models--owner--name" / "snapshots" / ("a" * 40)
    (snapshot / "text_encoder_3").mkdir(parents=True)
    (snapshot / "text_encoder").mkdir()
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("a" * 40)
    shards = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for name in shards:
        write_tensors(snapshot / "text_encoder_3" / name, {name: torch.zeros(9, dtype=torch.float16)})
    listing = {"weight_map": {name: name for name in shards}}
    (snapshot / "text_encoder_3" / "model.safetensors.index.json").write_text(json.dumps(listing))
    write_tensors(snapshot / "text_encoder" / "model.safetensors", {"a": torch.zeros(3)})
    found = safetensors_of(base, "text_encoder_3")
    assert [path.name for path in found] == shards and dtype_of_weights(found) == torch.float16
    assert dtype_of_weights(safetensors_of(base, "text_encoder")) == torch.float32
