"""DeepSpeed's ZeRO-2 and ZeRO-3: real ranks on a CPU against one process, checkpoints that move, what is refused."""

import contextlib
import math
import os
import re
import shutil
import signal
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import train_sd3_lpl_flow
import train_sdxl_lpl
from lpl_finetuning import flag_checks
from lpl_finetuning.errors import UserError
from lpl_finetuning.training.sharding import BUCKET, full_numel, memory_of_rank, zero3_shard
from tests import children, runs
from tests.processes.test_scaling import FLAGS, assert_same, refused_under, rows, scaling_flags, wait_for
from tests.runs import ROOT

needs_deepspeed = pytest.mark.skipif(not flag_checks.is_installed("deepspeed"), reason="DeepSpeed is not installed")
slow = pytest.mark.slow


@contextlib.contextmanager
def on_ranks(count, log, stage, *words):
    """Start a script with ZeRO on the CPU; at the end of the context nothing of it is left."""
    with open(log, "a") as file:
        words = children.torchrun(count, ROOT / "tests" / "zero_on_cpu.py", stage, *words)
        with children.ended(words, stdout=file, stderr=file, cwd=ROOT) as process:
            yield process, []


def run_on_ranks(count, log, stage, *words):
    with on_ranks(count, log, stage, *words) as (process, _):
        assert process.wait(timeout=200) == 0, log.read_text()[-3000:]


# ---------------------------------------------------------------------------------------------------------------------
# Ranks against one process


@pytest.fixture(scope="module")
def reference(sdxl_folder, pictures, cache_dir, tmp_path_factory):
    """(flags, folder of one process' run of 4 steps), with all that a rank can do wrong."""
    flags = scaling_flags(sdxl_folder, pictures, cache_dir, MORE)
    folder = tmp_path_factory.mktemp("one")
    runs.run(train_sdxl_lpl, *flags, *END, "--gradient_accumulation_steps", 4, "--output_dir", folder,
             pictures=True)  # fmt: skip
    return flags, folder


MORE = ["--gradient_checkpointing", "--validation_split", 3, "--lpl_t_threshold", 600, "--validation_steps", 1,
        "--ema_decay", 0.5, "--lr_scheduler", "constant_with_warmup", "--lr_warmup_steps", 3]  # fmt: skip
END = ["--validation_prompt", "apple", "--validation_compare", "--num_validation_images", 1, "--max_train_steps", 4,
       "--checkpointing_steps", 2, "--validation_steps", 3]  # fmt: skip


@needs_deepspeed
@pytest.mark.parametrize("stage", [pytest.param(2, marks=slow), 3])
def test_sdxl_is_trained_killed_resumed_and_saved(reference, stage, tmp_path):
    """Two ranks, killed and resumed: the weights, state, held-out losses and pictures of one process.

    With accumulation, gradient checkpointing, EMA in what is measured between steps and saved, held-out pictures of
    which the ranks have unequal shares, drawing by all ranks. One process goes on from their checkpoint too.
    """
    flags, expected = reference
    log, folder, other = tmp_path / "log", tmp_path / "two", tmp_path / "other"
    script = ["train_sdxl_lpl.py", *flags, "--gradient_accumulation_steps", 2, "--output_dir", folder]
    with on_ranks(2, log, stage, *script, "--max_train_steps", 3000, "--checkpointing_steps", 1000,
                  "--checkpointing_minutes", 1e-9) as (process, found):  # fmt: skip
        wait_for((folder / "checkpoint-2").is_dir, process, log, found)
    for path in folder.glob("checkpoint-*"):
        if path.name not in ("checkpoint-1", "checkpoint-2"):
            shutil.rmtree(path)
    assert_same(expected / "checkpoint-2", folder / "checkpoint-2", 1e-5)
    shutil.copytree(folder, other)
    run_on_ranks(2, log, stage, *script, *END, "--resume_from_checkpoint", "latest")
    runs.run(train_sdxl_lpl, *flags, *END, "--gradient_accumulation_steps", 4, "--output_dir", other,
             "--resume_from_checkpoint", "latest")  # fmt: skip
    for place in ("", "checkpoint-4"):
        assert_same(expected / place, folder / place, 1e-5)
        assert_same(other / place, folder / place, 1e-6)
    assert {path.suffix for path in (folder / "checkpoint-4").rglob("*.*")} == {".json", ".safetensors"}
    for name, steps in {"validation/diffusion_loss": {0, 3, 4}, "grad_norm": {1, 2, 3, 4}}.items():
        one, two = ({row["step"]: row[name] for row in rows(place) if name in row and row["step"] in steps}
                    for place in (expected, folder))  # fmt: skip
        assert two == pytest.approx(one, rel=1e-4) and one.keys() == steps
    for place in ("validation/step-4.png", "image_0.png", "run.png"):
        assert (folder / place).is_file()
    start = [(place / "validation" / "before" / "0-0.png").read_bytes() for place in (expected, folder)]
    assert start[0] == start[1]


@slow
@needs_deepspeed
def test_sd3_goes_on_where_one_process_stopped(sd3_folder, pictures, cache_dir, tmp_path):
    """A checkpoint of one process is resumed by three ranks, whose parts are padded; one gets SIGTERM, all save."""
    stage = 3
    flags = scaling_flags(sd3_folder, pictures, cache_dir, ["--checkpointing_steps", 2])
    wide = [*flags, "--gradient_accumulation_steps", 3]
    runs.run(train_sd3_lpl_flow, *wide, "--max_train_steps", 2, "--output_dir", tmp_path / "two")
    log = tmp_path / "log"
    with on_ranks(3, log, stage, "train_sd3_lpl_flow.py", *flags, "--max_train_steps", 3000, "--output_dir",
                  tmp_path / "two", "--resume_from_checkpoint", "latest",
                  "--checkpointing_steps", 4) as (process, _):  # fmt: skip
        wait_for(lambda: len(rows(tmp_path / "two")) >= 4, process, log, [])
        found = children.ranks_of(process)
        assert len(found) == 3
        os.kill(found[1], signal.SIGTERM)
        assert process.wait(timeout=100) == 0, log.read_text()[-3000:]
    saved = sorted((int(path.name.split("-")[1]), path) for path in (tmp_path / "two").glob("checkpoint-*"))
    assert saved[-1][0] == rows(tmp_path / "two")[-1]["step"], "it has saved where it stopped"
    for step, path in saved:
        if step > 4:
            shutil.rmtree(path)
    end = ["--max_train_steps", 5, "--checkpointing_steps", 1000]
    runs.run(train_sd3_lpl_flow, *wide, *end, "--output_dir", tmp_path / "two", "--resume_from_checkpoint", "latest")
    runs.run(train_sd3_lpl_flow, *wide, *end, "--output_dir", tmp_path / "one")
    assert_same(tmp_path / "one", tmp_path / "two", 1e-5)


@needs_deepspeed
@pytest.mark.parametrize("stage", [2, pytest.param(3, marks=slow)])
def test_a_step_that_is_not_finite_is_skipped_and_named(stage, sdxl_folder, pictures, cache_dir, tmp_path):
    """One rank has a loss that is no number: nothing changes on any, it is counted, and the next step is made."""
    flags = scaling_flags(sdxl_folder, pictures, cache_dir, ["--lr_scheduler", "linear"])
    log = tmp_path / "log"
    run_on_ranks(2, log, stage, "tests/poisoned.py", "train_sdxl_lpl", 1, "3", *flags, "--max_train_steps", 4,
                 "--checkpointing_steps", 1, "--output_dir", tmp_path)  # fmt: skip
    told = log.read_text()
    assert "step 3 is skipped on rank 0, not finite: the gradient, because of another rank" in told
    assert re.search(r"step 3 is skipped on rank 1, not finite: the diffusion loss of \d+\.png\n", told)
    assert [row.get("nonfinite_steps") for row in rows(tmp_path) if "lr" in row] == [None, None, 1, 1]
    rates = [row["lr"] for row in rows(tmp_path) if "lr" in row]
    assert rates[1] == rates[2] > rates[3]
    states = [load_file(tmp_path / f"checkpoint-{step}" / "training_state.safetensors") for step in (2, 3, 4)]
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]) and value.isfinite().all(), name
    assert any(not torch.equal(value, states[2][name]) for name, value in states[0].items())
    saved = [runs.weights(tmp_path / f"checkpoint-{step}") for step in (2, 3, 4)]
    assert saved[0] == saved[1] != saved[2]


@needs_deepspeed
def test_too_many_in_a_row_end_the_run(sdxl_folder, pictures, cache_dir, tmp_path):
    flags = scaling_flags(sdxl_folder, pictures, cache_dir)
    log = tmp_path / "log"
    script = ["tests/poisoned.py", "train_sdxl_lpl", 0, "2,3,4", *flags]
    with on_ranks(2, log, 3, *script, "--max_train_steps", 9, "--max_nonfinite_steps", 3,
                  "--output_dir", tmp_path) as (process, _):  # fmt: skip
        assert process.wait(timeout=200) != 0
    assert "3 steps in a row were not finite (--max_nonfinite_steps)" in log.read_text()


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


@pytest.fixture
def launched(monkeypatch):
    """Function (flags, settings of accelerate) -> check_launch of them, under DeepSpeed as this program needs it."""

    def check(flags=(), **settings):
        for name, value in {"USE_DEEPSPEED": "true", "DEEPSPEED_ZERO_STAGE": "2", **settings}.items():
            monkeypatch.setenv(f"ACCELERATE_{name}", value)
        flag_checks.check_launch(SimpleNamespace(**{**FLAGS, "gradient_accumulation_steps": 2, **dict(flags)}))

    monkeypatch.setattr(flag_checks, "is_installed", lambda name: True)
    monkeypatch.setattr(flag_checks.metadata, "version", lambda name: flag_checks.DEEPSPEED)
    return check


@refused_under("DeepSpeed")
def test_flags_that_are_refused(flags, said, launched):
    launched()
    with pytest.raises(UserError, match=said):
        launched(flags)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"DEEPSPEED_ZERO_STAGE": "0"}, "zero_stage is 0.*configs/zero2.yaml"),
        ({"DEEPSPEED_ZERO_STAGE": "1"}, "zero_stage is 1"),
        ({"DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"}, "offload_optimizer_device cpu"),
        ({"DEEPSPEED_OFFLOAD_PARAM_DEVICE": "nvme"}, "offload_param_device nvme"),
        ({"DEEPSPEED_CONFIG_FILE": "ds.json"}, "deepspeed_config_file ds.json"),
        ({"GRADIENT_ACCUMULATION_STEPS": "1"}, "gradient_accumulation_steps is 1 .* --gradient_accumulation_steps 2"),
        ({"GRADIENT_CLIPPING": "auto"}, "gradient_clipping is auto .* --max_grad_norm 1: leave it out"),
        ({"MIXED_PRECISION": "fp16"}, "use bf16"),
    ],
)
def test_settings_that_are_refused(settings, said, launched):
    """And --mixed_precision, which counts more than accelerate's file."""
    launched({}, GRADIENT_CLIPPING="1.0", GRADIENT_ACCUMULATION_STEPS="2", DEEPSPEED_ZERO_STAGE="3")
    with pytest.raises(UserError, match=said):
        launched({}, **settings)
    with pytest.raises(UserError, match="use bf16"):
        launched({"mixed_precision": "fp16"}, DEEPSPEED_ZERO_STAGE="3", MIXED_PRECISION="bf16")


def test_deepspeed_that_is_not_there_or_too_old_is_refused(launched, monkeypatch):
    monkeypatch.setattr(flag_checks.metadata, "version", lambda name: "0.17.1")
    with pytest.raises(UserError, match=r"DeepSpeed is 0.17.1.*pip install -U deepspeed"):
        launched()
    monkeypatch.setattr(flag_checks, "is_installed", lambda name: False)
    with pytest.raises(UserError, match="not installed: pip install deepspeed"):
        launched()


def test_deepspeed_without_gpus_is_refused(launched, flags, tmp_path, monkeypatch):
    launched()
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    with pytest.raises(UserError, match="DeepSpeed, which needs GPUs"):
        runs.run(train_sdxl_lpl, *flags, "--output_dir", tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# Parts


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_parts_are_equal_and_make_the_whole(ranks, monkeypatch):
    value = torch.arange(10.0).reshape(2, 5)
    parameter = SimpleNamespace(ds_tensor=torch.empty(math.ceil(10 / ranks)), ds_numel=10)
    parts = []
    for rank in range(ranks):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        parts.append(zero3_shard(value, parameter))
    assert {part.shape for part in parts} == {parameter.ds_tensor.shape}
    assert torch.equal(torch.cat(parts)[: full_numel(parameter)].reshape(2, 5), value)


def test_the_memory_of_a_rank():
    model = torch.nn.Linear(4, 5, bias=False)
    parts = [("weights", 80), ("gradients", 80), ("optimizer state", 160), ("EMA", 80), ("activations", 8)]
    two, three = (dict(memory_of_rank(parts, model, 4, stage)) for stage in (2, 3))
    assert two == {"weights": 80, "gradients": 20, "optimizer state": 40, "EMA": 80, "activations": 8,
                   "part that is updated": 20, "exchange": 160}  # fmt: skip
    assert three == {"weights": 20, "gradients": 20, "optimizer state": 40, "EMA": 20, "activations": 8,
                     "gathered layers": 160, "exchange": 160}  # fmt: skip
    with torch.device("meta"):
        large = torch.nn.Linear(BUCKET, 4)
    assert dict(memory_of_rank(parts, large, 4, 3))["exchange"] == 8 * BUCKET
