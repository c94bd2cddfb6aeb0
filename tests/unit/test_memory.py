"""The page on memory is what the scripts' own estimate says, for the true architectures."""

import functools
import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType

import train_sdxl_lpl
from lpl_finetuning.training import estimates, plan
from lpl_finetuning.training.live_memory import Peak
from lpl_finetuning.training.step_memory import Machine, RunCode, autoencoder_networks, highest, kept_bytes
from tests.runs import ROOT, memory_of

sys.path.insert(0, str(ROOT / "benchmarks"))
import memory

PAGE = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")


def row(setup):
    """The figures of a row of the page, in GB: at the peak, and at the peak of a step without LPL."""
    [line] = [line for line in PAGE.splitlines() if line.startswith(f"| {setup} |")]
    return [float(figure) for figure in re.findall(r"([\d.]+) GB", line)]


@pytest.mark.slow
@pytest.mark.parametrize("setup", memory.SETUPS)
def test_rows_of_the_page_are_counted_anew(setup):
    assert row(setup)[0] == pytest.approx(highest(memory.count(setup)).size / 1e9, abs=0.051)


def test_the_table_is_whole():
    for setup in memory.SETUPS:
        peak, without = row(setup)
        assert without <= peak


def test_the_table_of_the_arithmetic_weighs_the_loss_by_the_share_of_samples():
    """A fifth of SDXL's samples lie below 200, two thirds below a ratio of 3; of SD3's half. An image of the batch."""
    counts = {setup: {"forward": Peak(0, "", {}, 4 * 10**12), "LPL": Peak(0, "", {}, 8 * 10**12)}
              for setup in memory.ARITHMETIC}  # fmt: skip
    lines = {line.split(" | ")[0][2:]: line for line in memory.arithmetic_table(counts).splitlines()[2:]}
    assert lines["`sdxl-lora-16gb`"].endswith(
        "| 4 TFLOP | 8 TFLOP | 1.40 times (20.0% of samples) | 2.35 times (67.4% of samples) |"
    )
    assert "| 1 TFLOP | 2 TFLOP | 1.40 times" in lines["`sdxl-full-80gb`"], "four images at a time"
    assert lines["`sd35-medium-lora`"].endswith("1.01 times (0.6% of samples) | 2.00 times (50.0% of samples) |")
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    assert all(f"\n| {setup} | " in page for setup in memory.ARITHMETIC)


def test_a_rank_computes_what_one_device_computes():
    """Its memory is a share; the arithmetic of its own samples is not."""
    accelerator = SimpleNamespace(num_processes=2, distributed_type=DistributedType.FSDP, state=SimpleNamespace())
    peak = plan.share_of_rank(Peak(80, "LPL: x", {"gradients": 80}, flop=5), torch.nn.Linear(2, 2), accelerator)
    assert peak.flop == 5 and peak.where == "LPL: x" and peak.kinds["gradients"] == 40


def test_the_readme_and_recipes_say_what_the_page_says():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for setup in memory.SETUPS:
        if setup.startswith("`") and setup.endswith("`"):
            figure = f"{row(setup)[0]:.1f} GB"
            recipe = f"{setup[1:-1]}.yaml"
            assert any(recipe in line and figure in line for line in readme.splitlines()), setup
            assert figure in (ROOT / "configs" / "recipes" / recipe).read_text(encoding="utf-8"), setup


# ---------------------------------------------------------------------------------------------------------------------
# What is held throughout a run


class Denoiser(torch.nn.Module):
    """Two linear layers, of which one is frozen, and a norm: 36 + 36 + 8 parameters."""

    def __init__(self):
        super().__init__()
        layers = torch.nn.Linear(64, 4).requires_grad_(False), torch.nn.Linear(64, 4), torch.nn.LayerNorm(4)
        self.unet = torch.nn.ModuleList(layers).to("meta")

    def models(self):
        return {"unet": self.unet}


def held(**flags):
    defaults = {"bnb_quantization_config_path": None, "use_8bit_adam": False, "optimizer": "adamw", "use_ema": False,
                "offload_ema": False}  # fmt: skip
    return kept_bytes(SimpleNamespace(**defaults | flags), Denoiser())


@pytest.mark.parametrize(
    ("flags", "times"),
    [({}, 2), ({"optimizer": "prodigy"}, 4), ({"optimizer": "adafactor"}, 0), ({"use_8bit_adam": True}, 0.5)],
)
def test_the_optimizers_state(flags, times):
    """In float32: Adam's two moments, Prodigy's four, none of Adafactor worth a count, two bytes in 8 bits."""
    trained = 4 * (64 * 4 + 4 + 8)
    assert held(**flags)["optimizer state"] == times * trained and held(**flags)["gradients"] == trained


def test_the_average_counts_where_it_is():
    trained = 4 * (64 * 4 + 4 + 8)
    assert [held(use_ema=True)["EMA"], held(use_ema=True, offload_ema=True)["EMA"], held()["EMA"]] == [trained, 0, 0]


def test_a_quantized_denoiser_is_counted_in_its_bits(tmp_path):
    """Frozen linear weights take half a byte or one, and their scales; everything else stays as it is."""
    path, plain = tmp_path / "config.json", held()["weights"]
    assert plain == 4 * (2 * (64 * 4 + 4) + 8)
    for content, own in (('{"load_in_4bit": true}', 128 + 4), ('{"load_in_8bit": true}', 256 + 16)):
        path.write_text(content)
        assert held(bnb_quantization_config_path=path)["weights"] == plain - 4 * 256 + own


# ---------------------------------------------------------------------------------------------------------------------
# Counts are kept


@pytest.fixture
def few_flags(sdxl_folder, pictures, tmp_path):
    """Flags of a LoRA, without a cache."""
    words = "--use_lora --use_lpl --mixed_precision no --resolution 64 --pretrained_model_name_or_path"
    return [*words.split(), str(sdxl_folder), "--train_data_dir", str(pictures), "--output_dir", str(tmp_path / "run")]


@pytest.fixture
def place(few_flags, tmp_path):
    """Function from more flags to the name of the file that keeps the count."""

    def place(*flags, dtype=torch.float32, machine=Machine("no"), model=None):
        model = ["--pretrained_model_name_or_path", str(model)] if model else []
        args = train_sdxl_lpl.parse_args([*few_flags, *flags, *model, "--cache_dir", str(tmp_path)])
        return estimates.place_of_count(args, SimpleNamespace(dtype=dtype), CODE, machine).name

    return place


CODE = RunCode(train_sdxl_lpl.build_denoiser, train_sdxl_lpl.training_step, train_sdxl_lpl.example_batch,
               autoencoder_networks, train_sdxl_lpl.held_out_functions())  # fmt: skip
DECIDE = (
    "--resolution 128", "--aspect_ratio_buckets 64,64;64,128", "--train_batch_size 1", "--gradient_checkpointing",
    "--rank 8", "--lora_layers to_q", "--use_dora", "--train_text_encoder", "--lpl_num_blocks 2", "--use_ema",
    "--lpl_norm_type batch", "--lpl_batch_size 1", "--lpl_checkpointing stage", "--no-lpl_remove_outliers",
    "--optimizer prodigy", "--gradient_accumulation_steps 2", "--validation_prompt x",
    "--validation_split 2",
)  # fmt: skip


def test_what_a_count_follows_from_is_in_its_name(place, sdxl_folder, tmp_path):
    names = [place(*flags.split()) for flags in ("", *DECIDE)]
    names += [place(dtype=torch.bfloat16), place(machine=Machine("no", ranks=2)), place(machine=Machine("bf16"))]
    names.append(place(machine=Machine("no", encodes=True)))
    other = shutil.copytree(sdxl_folder, tmp_path / "other")
    assert place(model=other) == names[0], "the same model in another folder"
    path = other / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"norm_eps": 1e-3}))
    names.append(place(model=other))
    assert len(set(names)) == len(names)
    assert place(*["--seed", "5", "--learning_rate", "1", "--max_train_steps", "9", "--lpl_weight", "7"]) == names[0]


def test_another_code_or_library_is_counted_anew(place, monkeypatch):
    names = [place()]
    monkeypatch.setitem(estimates.LIBRARIES, "torch", "another")
    names.append(place())
    digest = estimates.sha256_of
    for file in ("live_memory.py", "step_memory.py", "lpl_utils.py", "train_sdxl_lpl.py"):
        changed = functools.partial(lambda name, path: digest(path) + "changed" * (Path(path).name == name), file)
        monkeypatch.setattr(estimates, "sha256_of", changed)
        names.append(place())
    assert len(set(names)) == len(names)


def test_a_kept_count_is_read_and_a_broken_one_counted_anew(few_flags, tmp_path, monkeypatch):
    args = train_sdxl_lpl.parse_args([*few_flags, "--cache_dir", str(tmp_path)])
    before = memory_of(train_sdxl_lpl, args, torch.float32)
    [path] = (tmp_path / "lpl" / "plans").iterdir()
    content = path.read_text()
    path.write_text(content[: len(content) // 2] + "?")
    assert memory_of(train_sdxl_lpl, args, torch.float32) == before and path.read_text() == content
    monkeypatch.setattr(estimates.step_memory, "count_step", None)
    assert memory_of(train_sdxl_lpl, args, torch.float32) == before, "nothing is counted"
    path.unlink()
    plan = SimpleNamespace(dtype=torch.float32)
    assert estimates.counted_peaks(args, plan, CODE, Machine("no"), count=False) is None


# ---------------------------------------------------------------------------------------------------------------------
# What the plan says


def sizes():
    """Function from flags to bytes: 10 GB less what the flags save."""
    saved = {"gradient_checkpointing": 3e9, "lpl_num_blocks": 1e9, "bnb_quantization_config_path": 2e9}
    start = {"gradient_checkpointing": False, "lpl_num_blocks": 4, "bnb_quantization_config_path": None}
    return lambda args: 10e9 - sum(size for flag, size in saved.items() if getattr(args, flag) != start[flag])


@pytest.mark.parametrize(
    ("flags", "room", "said"),
    [
        ("", 12e9, "fits this GPU"),
        ("", 8.5e9, "with --gradient_checkpointing it takes 7.00 GB and fits"),
        ("--gradient_checkpointing", 11.5e9, "fits without --gradient_checkpointing too, with 10.00 GB"),
        ("--gradient_checkpointing", 9e9, "fits this GPU"),
        ("--gradient_checkpointing", 5.5e9, "--lpl_num_blocks 3 --bnb_quantization_config_path configs/nf4.json"),
        ("", 2e9, "does NOT fit this GPU (1.00 GB free for tensors), nor with --gradient_checkpointing"),
    ],
)
def test_the_plan_names_the_flag_that_makes_a_step_fit(few_flags, flags, room, said):
    words = [*few_flags, "--train_batch_size", "1", "--lpl_batch_size", "1", *flags.split()]
    [line] = plan.fit_lines(train_sdxl_lpl.parse_args(words), room, sizes())
    assert said in line


@pytest.mark.parametrize(
    ("flags", "room", "said"),
    [
        ("", 7.5e9, "with --use_8bit_adam it takes 6.00 GB and fits"),
        ("--gradient_checkpointing", 5.5e9, "with --optimizer adafactor it takes 4.00 GB and fits"),
        ("", 5.5e9, "with --gradient_checkpointing --optimizer adafactor it takes 4.00 GB and fits"),
        ("--gradient_checkpointing --use_8bit_adam", 5.5e9, "with --no-use_8bit_adam --optimizer adafactor it takes "),
        ("--optimizer adafactor", 5.5e9, "with --gradient_checkpointing it takes 4.00 GB and fits"),
    ],
)
def test_the_plan_of_all_weights_names_one_optimizer(few_flags, flags, room, said):
    """Weights and gradients take 4 GB, AdamW's state 5, in 8 bits 2, Adafactor's 1; checkpointing saves 1."""
    words = [word for word in few_flags if word != "--use_lora"]
    words += ["--train_batch_size", "1", "--lpl_batch_size", "1", *flags.split()]

    def size_of(args):
        state = 2e9 if args.use_8bit_adam else {"adamw": 5e9, "adafactor": 1e9}[args.optimizer]
        return 4e9 + state - 1e9 * args.gradient_checkpointing

    [line] = plan.fit_lines(train_sdxl_lpl.parse_args(words), room, size_of)
    assert said in line
