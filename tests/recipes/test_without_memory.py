"""Runs of both recipes that are out of memory in the middle: the message, the checkpoint, and going on from it."""

import pytest
from accelerate.state import AcceleratorState

import train_sd3_lpl_flow
import train_sdxl_lpl
from lpl_finetuning.data.scan import find_images
from lpl_finetuning.errors import errors_for_people
from lpl_finetuning.flags import data_source
from lpl_finetuning.training.optimization import Trainee
from lpl_finetuning.training.validation import Validation
from tests import children
from tests.runs import run, weights
from tests.without_memory import out_of_memory_at

SCRIPTS = {"sdxl": train_sdxl_lpl, "sd3": train_sd3_lpl_flow}


def failed(monkeypatch, capsys, owner, name, call, script, *flags):
    """What a run prints on stderr that is out of memory at the `call`-th call of a function; its status must be 2."""
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as left:
        patch.setattr(owner, name, out_of_memory_at(getattr(owner, name), call))
        with errors_for_people(debug=False):
            run(script, *flags)
    assert left.value.code == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    return line


def dry_run(script, *flags):
    """Print the plan."""
    AcceleratorState._reset_state(True)
    args = script.parse_args([*map(str, flags), "--dry_run", "--report_to", "none"])
    script.main(args, *find_images(data_source(args)))


@pytest.mark.parametrize("recipe", SCRIPTS)
def test_a_run_goes_on_after_it(recipe, request, monkeypatch, capsys, flags, tmp_path):
    """In the step, in drawing and in the optimizer; from the last checkpoint the weights come out bit for bit."""
    script, model = SCRIPTS[recipe], request.getfixturevalue(f"{recipe}_folder")
    flags = [*flags, "--pretrained_model_name_or_path", model, "--use_lora", "--use_lpl", "--checkpointing_steps", 2,
             "--max_train_steps", 4, "--output_dir"]  # fmt: skip
    run(script, *flags, tmp_path / "whole")
    told = failed(monkeypatch, capsys, script, "training_step", 4, script, *flags, tmp_path / "run")
    assert told == (
        "error: the machine ran out of memory while training (asked for 2.00 GiB); what helps here, most first: "
        f"{told.split('most first: ')[1].split(';')[0]}; checkpoint-2 is intact: add a flag, and "
        "--resume_from_checkpoint latest goes on from it"
    )
    assert "--gradient_checkpointing" in told and "(about" not in told and "--use_8bit_adam" not in told
    more = ["--resume_from_checkpoint", "latest"]
    dry_run(script, *flags, tmp_path / "run", *more)  # counts a step and keeps the count: then flags have sizes
    told = failed(monkeypatch, capsys, Trainee, "backward", 2, script, *flags, tmp_path / "run", *more)
    assert "while computing the gradients" in told or "while training" in told
    assert "--gradient_checkpointing (about" in told
    run(script, *flags, tmp_path / "run", *more)
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")


def test_drawing_and_encoding(monkeypatch, capsys, flags, tmp_path):
    """Named for what they are; where nothing is saved yet, the message says so."""
    flags = [*flags, "--use_lora", "--validation_prompt", "a dog", "--output_dir", tmp_path / "run"]
    told = failed(monkeypatch, capsys, Validation, "prompt_arguments", 1, train_sdxl_lpl, *flags)
    assert "while drawing the validation pictures" in told and "--num_validation_images 1" in told
    assert told.endswith("; no checkpoint was written yet")
    own = [*flags, "--cache_dir", tmp_path / "cache"]
    told = failed(monkeypatch, capsys, train_sdxl_lpl, "encode_prompts", 1, train_sdxl_lpl, *own)
    assert "while encoding captions" in told


@pytest.mark.parametrize("rank", [1])
def test_one_of_two_ranks(rank, flags, tmp_path):
    """The rank that has no memory says so; the launcher ends the others. No traceback."""
    flags = [*flags, "--use_lora", "--checkpointing_steps", 1, "--max_train_steps", 3, "--output_dir", tmp_path]
    words = children.torchrun(2, "tests/without_memory.py", "train_sdxl_lpl", "training_step", 2, rank, *flags)
    ended = children.run(words, text=True)
    assert ended.returncode == 1  # the launcher's
    told = [line for line in ended.stderr.splitlines() if "error: rank 1: " in line]
    assert len(told) == 1 and "error: rank 1: the machine ran out of memory while training" in told[0]
    assert "checkpoint-1 is intact" in told[0] and "Traceback" not in ended.stderr
    assert ended.stderr.count("error: rank 0: another rank has ended") <= 1
