"""The page on memory is what the scripts' own estimate says, for the true architectures."""

import contextlib
import functools
import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train_sdxl_lpl
from lpl_finetuning.training import estimates, plan
from tests.runs import ROOT, memory_of

sys.path.insert(0, str(ROOT / "benchmarks"))
import memory

PAGE = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")


def row(model, way, resolution):
    """The figures of a row of the page, in GB."""
    [line] = [line for line in PAGE.splitlines() if line.startswith(f"| {model} | {way} | {resolution} |")]
    return [float(figure) for figure in re.findall(r"([\d.]+) GB", line)]


@pytest.mark.parametrize(
    ("model", "parameters"),
    [("SDXL", 2_567_463_684), ("SD3.5 medium", 2.24e9), pytest.param("SD3.5 large", 8.06e9, marks=pytest.mark.slow)],
)
def test_rows_of_the_page_are_computed_anew(model, parameters):
    """LoRA at 512 px, and by known counts of parameters for all weights: 4 + 4 + 8 bytes each under AdamW."""
    parts = memory.estimate(model, "LoRA, rank 16", 512, lpl=True)
    total, of_the_loss = sum(parts.values()), parts["decoder"] + parts["LPL"]
    figures = [(total - of_the_loss) / 1e9, total / 1e9]
    assert row(model, "LoRA, rank 16", 512)[:2] == pytest.approx(figures, abs=0.051)
    assert row(model, "all weights", 1024)[2] == pytest.approx(16 * parameters / 1e9, rel=0.005)
    assert row(model, "all, 8-bit Adam", 1024)[2] == pytest.approx(10 * parameters / 1e9, rel=0.005)


def test_a_quantized_denoiser_is_counted_in_its_bits(tmp_path):
    """Frozen linear weights in half a byte or one, everything else as it is."""
    frozen, trained = torch.nn.Linear(8, 4).requires_grad_(False), torch.nn.Linear(8, 4)
    models = {"unet": torch.nn.ModuleList([frozen, trained, torch.nn.LayerNorm(4)]), "text_encoder": frozen}
    path = tmp_path / "config.json"
    plain = 4 * (36 + 36 + 8 + 36)
    for content, saved in (('{"load_in_4bit": true}', 32 * 3.5), ('{"load_in_8bit": true}', 32 * 3)):
        path.write_text(content)
        args = SimpleNamespace(bnb_quantization_config_path=path)
        assert plan.weight_bytes(args, models) == plain - saved
    assert plan.weight_bytes(SimpleNamespace(bnb_quantization_config_path=None), models) == plain


def test_the_table_is_whole():
    assert PAGE.count("| SD") == len(memory.MODELS) * len(memory.WAYS) * 2
    for model in memory.MODELS:
        for way in memory.WAYS:
            small, large = row(model, way, 512), row(model, way, 1024)
            assert small[0] < small[1] < large[1] and small[2] == large[2] < small[0]


# ---------------------------------------------------------------------------------------------------------------------
# Estimates are kept


def estimated(args, cache_dir, dtype=torch.float32):
    """{what: bytes} for the tiny SDXL; the cache folder keeps what it took to compute."""
    args = train_sdxl_lpl.parse_args([*args, "--use_lpl", "--cache_dir", str(cache_dir)])
    return dict(memory_of(train_sdxl_lpl, args, dtype, dtype))


def kept(cache_dir):
    """The estimates in a cache folder, {path: content}."""
    return {path: path.read_text() for path in (cache_dir / "lpl" / "plans").iterdir()}


@pytest.fixture
def few_flags(sdxl_folder, pictures, tmp_path):
    """Flags of a LoRA, without a cache."""
    words = "--use_lora --mixed_precision no --resolution 64 --train_batch_size 2 --pretrained_model_name_or_path"
    return [*words.split(), str(sdxl_folder), "--train_data_dir", str(pictures), "--output_dir", str(tmp_path / "run")]


@pytest.fixture
def nothing_runs(monkeypatch):
    """Estimates are 0 bytes: what decides whether one is kept is the key."""
    monkeypatch.setattr(plan, "LatentPerceptualLoss", lambda stages, config: lambda estimate, target: None)
    monkeypatch.setattr(train_sdxl_lpl.Denoiser, "forward", lambda denoiser, *inputs: None)


OWN_ESTIMATES = {  # flags: which estimates follow from them
    "--resolution 128": ("denoiser", "LPL"),
    "--aspect_ratio_buckets 64,64;64,128": ("denoiser", "LPL"),
    "--train_batch_size 1": ("denoiser", "LPL"),
    "--gradient_checkpointing": ("denoiser", "LPL"),  # --lpl_checkpointing stage follows from it
    "--rank 8": ("denoiser",),
    "--lora_dropout 0.5": ("denoiser",),
    "--lora_layers to_q": ("denoiser",),
    "--use_dora": ("denoiser",),
    "--train_text_encoder": ("denoiser",),
    "--lpl_num_blocks 2": ("LPL",),
    "--lpl_norm_type batch": ("LPL",),
    "--lpl_loss_type l1": ("LPL",),
    "--lpl_batch_size 1": ("LPL",),
    "--lpl_checkpointing stage": (),
    "--no-lpl_remove_outliers": ("LPL",),
    "--seed 5 --learning_rate 1 --max_train_steps 9 --lpl_weight 7": (),
}


def test_what_an_estimate_follows_from_is_in_its_key(few_flags, tmp_path, nothing_runs):
    estimated(few_flags, tmp_path)
    count = len(kept(tmp_path))
    assert count == 2
    for flags, which in OWN_ESTIMATES.items():
        estimated([*few_flags, *flags.split()], tmp_path)
        count += len(which)
        assert len(kept(tmp_path)) == count, flags
    estimated(few_flags, tmp_path)
    assert len(kept(tmp_path)) == count


def test_another_dtype_model_code_or_library_is_estimated_anew(
    few_flags, sdxl_folder, tmp_path, monkeypatch, nothing_runs
):
    estimated(few_flags, tmp_path)
    estimated(few_flags, tmp_path, torch.bfloat16)
    assert len(kept(tmp_path)) == 4
    other = shutil.copytree(sdxl_folder, tmp_path / "other")
    estimated([*few_flags, "--pretrained_model_name_or_path", str(other)], tmp_path)
    assert len(kept(tmp_path)) == 4, "the same model in another folder"
    for part, setting in (("unet", "norm_eps"), ("vae", "act_fn")):
        path = other / part / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {setting: {"norm_eps": 1e-3}.get(setting, "relu")}))
    estimated([*few_flags, "--pretrained_model_name_or_path", str(other)], tmp_path)
    assert len(kept(tmp_path)) == 6
    monkeypatch.setitem(estimates.LIBRARIES, "torch", "another")
    estimated(few_flags, tmp_path)
    assert len(kept(tmp_path)) == 8
    digest = estimates.sha256_of
    for file, new in (("plan.py", 2), ("estimates.py", 2), ("lpl_utils.py", 2), ("train_sdxl_lpl.py", 1)):
        changed = functools.partial(lambda name, path: digest(path) + "changed" * (Path(path).name == name), file)
        monkeypatch.setattr(estimates, "sha256_of", changed)
        count = len(kept(tmp_path))
        estimated(few_flags, tmp_path)
        assert len(kept(tmp_path)) == count + new, file


def test_a_kept_estimate_is_read_and_a_broken_one_computed_anew(few_flags, tmp_path, monkeypatch):
    before = estimated(few_flags, tmp_path)
    there = kept(tmp_path)
    for path in there:
        path.write_text(there[path][: len(there[path]) // 2] + "?")
    assert estimated(few_flags, tmp_path) == before and kept(tmp_path) == there
    monkeypatch.setattr(plan, "SavedBytes", None)
    assert estimated(few_flags, tmp_path) == before, "nothing is computed"


def test_without_a_place_or_a_file_of_the_code_estimates_are_computed(few_flags, tmp_path):
    (tmp_path / "full/lpl").mkdir(parents=True)
    (tmp_path / "full/lpl/plans").write_text("a file is in the folder's place")
    assert estimated(few_flags, tmp_path / "full") == estimated(few_flags, tmp_path)
    numbers = iter(range(2))
    assert [estimates.remembered(tmp_path, [int], lambda: next(numbers)) for _ in range(2)] == [0, 1]


@pytest.mark.parametrize("more", ["", "--gradient_checkpointing", "--lpl_norm_type batch --lpl_checkpointing stage"])
def test_short_cuts_of_norms_keep_the_same_bytes(few_flags, tmp_path, monkeypatch, more):
    few_flags = [flag for flag in few_flags if flag != "--use_lora"] + more.split()
    short = estimated(few_flags, tmp_path)
    monkeypatch.setattr(plan, "ShapesOfNorms", contextlib.nullcontext)
    assert estimated(few_flags, tmp_path / "another") == short
