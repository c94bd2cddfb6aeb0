"""Several ranks: configurations, FSDP2 end to end on a CPU, what is refused, and one decision on resuming for all."""

import contextlib
import json
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from safetensors.torch import load_file

import train_sd3_lpl_flow
import train_sdxl_lpl
from lpl_finetuning import flag_checks
from lpl_finetuning.base_model import BaseModel
from lpl_finetuning.errors import UserError
from lpl_finetuning.families import SDXL
from lpl_finetuning.training import sharding
from lpl_finetuning.training.checkpoint_folders import run_identity
from lpl_finetuning.training.checkpoints import TrainingState, save_checkpoint
from tests import children, runs
from tests.fsdp_on_cpu import launch_environment
from tests.runs import ROOT
from tests.zero_on_cpu import launch_environment as zero_environment

sys.path.insert(0, str(ROOT / "benchmarks"))
import memory

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
PAGE = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------------
# Configurations


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_takes_the_file_and_every_key_of_it(path, monkeypatch):
    config, text = load_config_from_file(str(path)), path.read_text()
    assert text.startswith("# ") and "not run on" in text.lower().split("compute_environment")[0]
    flags = vars(launch_command_parser().parse_args(["train_sdxl_lpl.py"]))
    for key in [*(config.fsdp_config or {}), *(config.deepspeed_config or {})]:
        assert key in flags, key  # accelerate itself takes any
    settings = zero_environment(path) if "zero" in path.stem else launch_environment(path)
    assert settings["ACCELERATE_MIXED_PRECISION"] == "bf16"
    if "zero" in path.stem:
        assert settings["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == path.stem[-1]
        monkeypatch.setattr(flag_checks, "check_installed_deepspeed", lambda: None)
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
        assert flag_checks.wants("DEEPSPEED")
        flag_checks.check_launch(SimpleNamespace(**FLAGS))
    assert ("ACCELERATE_USE_FSDP" in settings) == ("fsdp" in path.stem)
    if "fsdp" in path.stem:
        assert settings["FSDP_VERSION"] == "2" and settings["FSDP_AUTO_WRAP_POLICY"] == "TRANSFORMER_BASED_WRAP"


def test_a_typo_in_a_key_would_be_seen(tmp_path, monkeypatch):
    path, right = tmp_path / "fsdp2.yaml", yaml.safe_load((ROOT / "configs" / "fsdp2.yaml").read_text())

    def check(config):
        path.write_text("# not run on GPUs\n" + yaml.dump(config))
        test_accelerate_takes_the_file_and_every_key_of_it(path, monkeypatch)

    check(right)
    for wrong in ({"num_process": 8}, {"fsdp_config": right["fsdp_config"] | {"fsdp_versoin": 2}}):
        with pytest.raises((ValueError, AssertionError, KeyError)):
            check(right | wrong)


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


def accelerator_with(monkeypatch, **settings):
    """As far as `set_up_sharding` looks at one, under FSDP with these settings of accelerate."""
    for name, value in {"FSDP_VERSION": 2, "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", **settings}.items():
        monkeypatch.setenv(name, str(value))
    plugin = FullyShardedDataParallelPlugin()
    return SimpleNamespace(
        distributed_type=DistributedType.FSDP, is_fsdp2=plugin.fsdp_version == 2, mixed_precision="bf16",
        state=SimpleNamespace(fsdp_plugin=plugin),
    )  # fmt: skip


FLAGS = {"use_lora": False, "optimizer": "adamw", "use_8bit_adam": False, "torch_compile": False,
         "mixed_precision": None, "gradient_accumulation_steps": 1, "max_grad_norm": 1.0}  # fmt: skip


def refused_under(name):
    """Mark with what is refused where FSDP or DeepSpeed shards the model: (flags, what the message says)."""
    cases = [
        ({"use_lora": True}, f"--use_lora is not supported under {name}.*configs/ddp.yaml"),
        ({"optimizer": "prodigy"}, f"--optimizer prodigy works on whole tensors; under {name}"),
        ({"use_8bit_adam": True}, f"--use_8bit_adam works on whole tensors; under {name}"),
        ({"torch_compile": True}, f"--torch_compile is not supported under {name}"),
    ]
    return pytest.mark.parametrize(("flags", "said"), cases)


@refused_under("FSDP")
def test_flags_that_cannot_be_sharded_are_refused_under_fsdp_only(flags, said, monkeypatch):
    args = SimpleNamespace(**{**FLAGS, **flags})
    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)
    flag_checks.check_launch(args)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    flag_checks.check_launch(SimpleNamespace(**FLAGS))
    with pytest.raises(UserError, match=said):
        flag_checks.check_launch(args)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"FSDP_VERSION": 1}, "fsdp_version: 2"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "--gradient_checkpointing"),
        ({"FSDP_AUTO_WRAP_POLICY": "NO_WRAP"}, "TRANSFORMER_BASED_WRAP"),
        ({"FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP"}, "TRANSFORMER_BASED_WRAP"),
    ],
)
def test_settings_of_fsdp_that_are_not_supported_are_refused(settings, said, monkeypatch):
    with pytest.raises(UserError, match=said):
        sharding.set_up_sharding(accelerator_with(monkeypatch, **settings))


def test_settings_that_are_supported_are_not(monkeypatch):
    accelerator = accelerator_with(monkeypatch)
    sharding.set_up_sharding(accelerator)
    assert accelerator.state.fsdp_plugin.mixed_precision_policy is None
    accelerator.mixed_precision = "fp16"
    with pytest.raises(UserError, match="use bf16"):
        sharding.set_up_sharding(accelerator)


def test_fsdp_without_gpus_is_refused(flags, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match="needs GPUs"):
        runs.run(train_sdxl_lpl, *flags, "--output_dir", tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# FSDP2 end to end


@contextlib.contextmanager
def on_ranks(count, log, *words):
    """Start a script with FSDP2 on the CPU; at the end of the context nothing of it is left."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(log, "a") as file:
        words = children.torchrun(count, ROOT / "tests" / "fsdp_on_cpu.py", *words)
        with children.ended(words, env=environment, stdout=file, stderr=file, cwd=ROOT) as process:
            yield process, []


def wait_for(condition, process, log, found):
    """Until a running script has come so far; then `found` has the process ids of its ranks."""
    end = time.monotonic() + 120
    while not condition():
        assert process.poll() is None and time.monotonic() < end, Path(log).read_text()[-3000:]
        time.sleep(0.02)
    found += children.ranks_of(process)


def run_on_ranks(count, log, *words):
    with on_ranks(count, log, *words) as (process, _):
        assert process.wait(timeout=150) == 0, Path(log).read_text()[-3000:]


def trained(folder):
    """{name: tensor} of a result or a checkpoint, with its state."""
    files = [path for part in ("unet", "transformer") for path in Path(folder, part).glob("*.safetensors")]
    return {name: value for path in [*files, *Path(folder).glob("*_state.safetensors")]
            for name, value in load_file(path).items()}  # fmt: skip


def assert_same(one, other, tolerance):
    one, other = trained(one), trained(other)
    assert one.keys() == other.keys() and one
    for key, value in one.items():
        assert value.shape == other[key].shape and value.dtype == other[key].dtype, key
        assert torch.allclose(value, other[key], rtol=0, atol=tolerance), key


def rows(folder):
    return [json.loads(line) for line in (folder / "logs" / "metrics.jsonl").read_text().splitlines()]


def scaling_flags(model, pictures, cache_dir, more=()):
    """Flags of a full run; Adam's epsilon keeps the rounding of tiny gradients from becoming whole steps."""
    return (
        f"--pretrained_model_name_or_path {model} --train_data_dir {pictures} --cache_dir {cache_dir} --resolution 64 "
        "--lr_warmup_steps 0 --learning_rate 1e-3 --adam_epsilon 1e-3 --report_to none --seed 3 --logging_steps 1 "
        "--mixed_precision no --use_lpl --use_ema --train_batch_size 1"
    ).split() + [str(word) for word in more]


def test_sdxl_is_trained_killed_resumed_and_saved(sdxl_folder, pictures, cache_dir, tmp_path):
    """Two ranks with a part of the model each, killed and resumed: the weights, state and pictures of one process.

    With gradient checkpointing, accumulation, EMA, held-out pictures of which the ranks have unequal shares, drawing
    by all ranks, checkpoints by the first one's clock.
    """
    more = ["--gradient_checkpointing", "--validation_split", 3, "--lpl_t_threshold", 600, "--validation_steps", 4]
    drawn = ["--validation_prompt", "apple", "--validation_compare", "--num_validation_images", 1]
    flags = scaling_flags(sdxl_folder, pictures, cache_dir, more)
    wide = [*flags, "--gradient_accumulation_steps", 4]
    runs.run(train_sdxl_lpl, *wide, *drawn, "--checkpointing_steps", 2, "--max_train_steps", 4, "--output_dir",
             tmp_path / "one", pictures=True)  # fmt: skip
    script = ["train_sdxl_lpl.py", *flags, "--gradient_accumulation_steps", 2, "--output_dir", tmp_path / "two"]
    log = tmp_path / "log"
    with on_ranks(2, log, *script, "--max_train_steps", 3000, "--checkpointing_steps", 1000,
                  "--checkpointing_minutes", 1e-9) as (process, found):  # fmt: skip
        wait_for((tmp_path / "two" / "checkpoint-2").is_dir, process, log, found)
        assert len(found) == 2
    for path in (tmp_path / "two").glob("checkpoint-*"):
        if path.name not in ("checkpoint-1", "checkpoint-2"):
            shutil.rmtree(path)
    assert_same(tmp_path / "one" / "checkpoint-2", tmp_path / "two" / "checkpoint-2", 1e-5)
    shutil.copytree(tmp_path / "two", tmp_path / "other")
    run_on_ranks(2, log, *script, *drawn, "--max_train_steps", 4, "--checkpointing_steps", 2,
                 "--resume_from_checkpoint", "latest")  # fmt: skip
    runs.run(train_sdxl_lpl, *wide, "--max_train_steps", 4, "--checkpointing_steps", 2, "--output_dir",
             tmp_path / "other", "--resume_from_checkpoint", "latest")  # fmt: skip
    for folder in ("", "checkpoint-4"):
        assert_same(tmp_path / "one" / folder, tmp_path / "two" / folder, 1e-5)
        assert_same(tmp_path / "other" / folder, tmp_path / "two" / folder, 1e-6)
    losses = [[row["validation/diffusion_loss"] for row in rows(tmp_path / name)
               if "validation/diffusion_loss" in row] for name in ("one", "two")]  # fmt: skip
    assert [losses[1][0], losses[1][-1]] == pytest.approx([losses[0][0], losses[0][-1]], rel=1e-4)
    for place in ("validation/step-4.png", "image_0.png", "run.png"):
        assert (tmp_path / "two" / place).is_file()
    start = [(tmp_path / name / "validation" / "before" / "0-0.png").read_bytes() for name in ("one", "two")]
    assert start[0] == start[1]
    _, pipeline = runs.draw(train_sdxl_lpl.StableDiffusionXLPipeline, tmp_path / "two")
    assert type(pipeline.unet).__name__ == "UNet2DConditionModel"


@pytest.mark.slow
def test_sd3_goes_on_sharded_where_one_process_stopped(sd3_folder, pictures, cache_dir, tmp_path):
    """A checkpoint of one process is resumed by two with a part each, asked to stop, and ended by one."""
    flags = scaling_flags(sd3_folder, pictures, cache_dir, ["--checkpointing_steps", 2])
    wide = [*flags, "--gradient_accumulation_steps", 2]
    runs.run(train_sd3_lpl_flow, *wide, "--max_train_steps", 2, "--output_dir", tmp_path / "two")
    log = tmp_path / "log"
    with on_ranks(2, log, "train_sd3_lpl_flow.py", *flags, "--max_train_steps", 3000, "--output_dir", tmp_path / "two",
                  "--resume_from_checkpoint", "latest",
                  "--checkpointing_steps", 4) as (process, found):  # fmt: skip
        wait_for(lambda: len(rows(tmp_path / "two")) >= 4, process, log, found)
        os.kill(found[1], signal.SIGTERM)
        assert process.wait(timeout=60) == 0, log.read_text()[-3000:]
    saved = sorted((int(path.name.split("-")[1]), path) for path in (tmp_path / "two").glob("checkpoint-*"))
    assert saved[-1][0] == rows(tmp_path / "two")[-1]["step"], "it has saved where it stopped"
    for step, path in saved:  # how soon it stopped is chance, and rounding differs the more, the longer it went on
        if step > 4:
            shutil.rmtree(path)
    end = ["--max_train_steps", 5, "--checkpointing_steps", 1000]
    runs.run(train_sd3_lpl_flow, *wide, *end, "--output_dir", tmp_path / "two", "--resume_from_checkpoint", "latest")
    runs.run(train_sd3_lpl_flow, *wide, *end, "--output_dir", tmp_path / "one")
    assert_same(tmp_path / "one", tmp_path / "two", 1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# One decision for all ranks


RUN = {"use_lora": False, "seed": 3, "use_ema": False, "optimizer": "adamw", "use_8bit_adam": False,
       "timestep_sampling": "uniform"}  # fmt: skip


def checkpoint(folder, step, content=b"weights"):
    """A checkpoint of nothing much."""
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1)
    state = TrainingState(
        optimizer, schedule, identity=run_identity(SimpleNamespace(**RUN, base_model=BaseModel(SDXL, "a/model")))
    )

    def save_model(place):
        (place / "weights").write_bytes(content)

    return save_checkpoint(folder, step, state, save_model)


def test_the_first_rank_decides_and_the_others_look(tmp_path):
    """Two machines with disks of their own: all ranks resume the same checkpoint, or are told why not."""
    first, second = tmp_path / "machine-0", tmp_path / "machine-1"
    for name in ("shared", "newer-elsewhere", "damaged", "other", "cut"):
        checkpoint(first / name, 10)
    checkpoint(first / "missing", 10)
    checkpoint(first / "damaged", 20)
    for name in ("shared", "newer-elsewhere", "damaged", "cut"):
        shutil.copytree(first / name, second / name)
    checkpoint(second / "newer-elsewhere", 20)
    checkpoint(second / "other", 10, b"anybody")
    checkpoint(second / "fresh", 10)
    (second / "cut" / "checkpoint-10" / "weights").write_bytes(b"w")
    (first / "damaged" / "checkpoint-20" / "weights").write_bytes(b"WEIGHTS")
    cases = ["shared", "newer-elsewhere", "damaged", "fresh", "missing", "other", "cut"]
    words = children.torchrun(2, ROOT / "tests" / "resume_on_ranks.py", tmp_path, json.dumps(RUN), *cases)
    children.run(words, check=True, timeout=100)
    answers = [json.loads((tmp_path / f"answer-{rank}.json").read_text()) for rank in range(2)]
    for case in cases:
        assert answers[0][case][0] == answers[1][case][0], case
        assert answers[1][case][1] in ([], ["manifest.json"]), "no rank but the first reads the weights"
    found = {case: answer for case, (answer, _) in answers[1].items()}
    for case in ("shared", "newer-elsewhere", "damaged"):
        assert found[case] == f"{case}/checkpoint-10"
    assert "weights" in answers[0]["shared"][1]
    assert found["fresh"] is None, "as the first rank sees it"
    assert re.search("there is no missing/checkpoint-10.*--output_dir must lie on a disk", found["missing"])
    assert "other/checkpoint-10 is another checkpoint" in found["other"]
    assert "weights has 1 bytes" in found["cut"]


# ---------------------------------------------------------------------------------------------------------------------
# The page


def rows_of_the_page():
    """{row: memory of a GPU in GB, for each number of GPUs}."""
    lines = [line for line in PAGE.splitlines() if re.match(r"\| SD[\w. -]+(, ZeRO-\d)? \| [\d.]+ GB", line)]
    return {line.split("|")[1].strip(): [float(figure) for figure in re.findall(r"([\d.]+) GB", line)]
            for line in lines}  # fmt: skip


def test_the_memory_of_a_rank():
    """More GPUs hold less each, and one GPU holds what the page on memory says."""
    rows, memory_page = rows_of_the_page(), (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
    assert rows.keys() == {model + suffix for model in memory.MODELS for suffix in memory.SHARDINGS}
    for row, figures in rows.items():
        assert len(figures) == len(memory.RANKS) and figures == sorted(figures, reverse=True)
        assert f"| {row.partition(',')[0]}, all weights | {figures[0]} GB |" in memory_page


@pytest.mark.slow
def test_rows_of_the_page_are_counted_anew():
    name = "SD3.5 medium, all weights"
    shares, rows = memory.ranks_of(name, memory.count(name)), rows_of_the_page()
    for (row, ranks), size in shares.items():
        assert size / 1e9 == pytest.approx(rows[row][memory.RANKS.index(ranks)], abs=0.051), (row, ranks)


def test_what_is_gathered():
    class Block(torch.nn.Linear):
        pass

    model = torch.nn.Sequential(Block(3, 3), torch.nn.Linear(2, 1), Block(4, 4))
    model._no_split_modules = ["Block"]
    assert sharding.gathered_bytes(model) == 2 * 4 * 3 + 4 * 4 * 20
    parts = sharding.memory_of_rank([("weights", 80), ("activations", 8)], model, 4)
    assert dict(parts) == {"weights": 20, "activations": 8, "gathered layers": 344}
