"""Steps that are not finite, and signals: real runs of both recipes, poisoned or asked to stop."""

import contextlib
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train_sd3_lpl_flow
import train_sdxl_lpl
from lpl_finetuning import errors as errors_module
from lpl_finetuning.training import checkpoint_folders, signals
from lpl_finetuning.training import guard as guard_module
from tests import runs
from tests.children import ranks_of, start, torchrun
from tests.children import run as run_child
from tests.runs import command, weights

SCRIPTS = {"sdxl": train_sdxl_lpl, "sd3": train_sd3_lpl_flow}


@pytest.fixture(params=["sdxl", "sd3"])
def recipe(request, pictures, cache_dir):
    """(script, flags of a LoRA with the loss)."""
    model = request.getfixturevalue(f"{request.param}_folder")
    flags = (
        f"--pretrained_model_name_or_path {model} --train_data_dir {pictures} --cache_dir {cache_dir} --resolution 64 "
        "--train_batch_size 2 --lr_warmup_steps 0 --learning_rate 1e-3 --report_to none --seed 3 --logging_steps 1 "
        "--mixed_precision no --use_lora --use_lpl --lpl_t_threshold 900"
    ).split()
    return SCRIPTS[request.param], flags


# The loops of the two scripts are the same (test_twins), so that what takes long is tried with one of them.
WITH_SDXL, WITH_SD3 = (pytest.mark.parametrize("recipe", [name], indirect=True) for name in SCRIPTS)


def poison(monkeypatch, script, term, calls):
    """Make one term of the loss NaN for the first image of a batch, in the given calls of the training step."""
    count = [0]
    original = script.training_step

    def counted(*args):
        count[0] += 1
        return original(*args)

    def spoil(values):
        if count[0] not in calls:
            return values
        return torch.cat([values[:1] * math.nan, values[1:]])

    monkeypatch.setattr(script, "training_step", counted)
    if term == "diffusion loss":
        denoise = script.denoise

        def spoilt(*args):
            errors, *rest = denoise(*args)
            return spoil(errors), *rest

        monkeypatch.setattr(script, "denoise", spoilt)
    elif term == "gradient":
        forward = script.denoise

        def hooked(*args):
            errors, model_pred, noisy_latents = forward(*args)
            if count[0] in calls:
                errors.register_hook(lambda grad: grad * math.inf)
            return errors, model_pred, noisy_latents

        monkeypatch.setattr(script, "denoise", hooked)
    else:
        loss = script.perceptual_loss

        def spoilt_loss(*args):
            output = loss(*args)
            of_decoder = output.outputs["decoder"]
            of_decoder.per_layer[1][:1] *= math.nan if count[0] in calls else 1
            of_decoder.per_sample = spoil(of_decoder.per_sample)
            return output

        monkeypatch.setattr(script, "perceptual_loss", spoilt_loss)


@pytest.mark.parametrize(
    ("recipe", "term"),
    [("sdxl", "diffusion loss"), ("sdxl", "LPL of the up block 1"), ("sdxl", "gradient"), ("sd3", "diffusion loss")],
    indirect=["recipe"],
)
def test_a_step_that_is_not_finite_is_skipped_and_named(recipe, tmp_path, monkeypatch, capsys, term):
    script, flags = recipe
    poison(monkeypatch, script, term, {3})
    rows = runs.run(script, *flags, "--max_train_steps", 5, "--checkpointing_steps", 1, "--use_ema",
                    "--output_dir", tmp_path)  # fmt: skip
    said = capsys.readouterr().err
    assert f"warning: step 3 is skipped, not finite: the {term} of " in said and ".png" in said
    assert said.count(".png") == (2 if term == "gradient" else 1), (
        "the image that it was, or all where none is to blame"
    )
    assert [row.get("nonfinite_steps") for row in rows] == [None, None, 1, 1, 1]
    assert "train_loss" not in rows[2] and all(math.isfinite(rows[step]["train_loss"]) for step in (0, 1, 3, 4))
    states = [load_file(tmp_path / f"checkpoint-{step}" / "training_state.safetensors") for step in (2, 3, 4)]
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]), f"{key} changed in the skipped step"
    assert any(not torch.equal(value, states[2][key]) for key, value in states[0].items()), "and goes on after it"
    assert weights(tmp_path / "checkpoint-2") == weights(tmp_path / "checkpoint-3")


@WITH_SD3
def test_too_many_in_a_row_end_the_run_and_leave_the_last_good_checkpoint(recipe, tmp_path, monkeypatch):
    script, flags = recipe
    flags = [*flags, "--max_train_steps", 9, "--checkpointing_steps", 2, "--output_dir", tmp_path]
    with monkeypatch.context() as patch:
        poison(patch, script, "diffusion loss", {2, 4, 5, 6, 7, 8, 9})
        with pytest.raises(errors_module.UserError, match=r"3 steps in a row were not finite.*\.png.*latest"):
            runs.run(script, *flags, "--max_nonfinite_steps", 3)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    rows = runs.run(script, *flags, "--resume_from_checkpoint", "latest")
    assert all(math.isfinite(row["train_loss"]) for row in rows if row["step"] > 4)


class Ranks:
    """As much of an accelerator as a Guard needs; others: the values that the other ranks give to its reductions."""

    device, process_index, mixed_precision = torch.device("cpu"), 0, "no"

    def __init__(self, *others):
        self.others, self.num_processes, self.reduced = list(others), 1 + bool(others), 0

    def reduce(self, tensor, how):
        self.reduced += 1
        return tensor + torch.tensor(self.others.pop(0))


def watching(accelerator, values, limit=9):
    """A Guard that watches one term of the images 4 and 7."""
    guard = guard_module.Guard(accelerator, limit, lambda image: f"{image}.png")
    guard.watch("diffusion loss", torch.tensor(values), torch.tensor([4, 7]))
    return guard


@pytest.mark.parametrize(("mine", "another_has_one", "told"), [
    ([1, math.nan], 0.0, "the diffusion loss of 7.png"),
    ([math.inf, math.nan], 1.0, "the diffusion loss of 4.png, 7.png"),
    ([1, 2], 1.0, "the gradient, because of another rank"),
    ([1, 2], 0.0, "the gradient of 4.png, 7.png"),
])  # fmt: skip
@pytest.mark.parametrize("under_scaler", [False, True])
def test_only_the_rank_that_has_the_image_names_it(capsys, mine, another_has_one, told, under_scaler):
    guard = watching(Ranks([0.0, 1.0], another_has_one), mine)
    finite, faults, wishes = guard.read(torch.tensor(math.nan), [False, False])
    assert not finite and wishes == [False, True] and "; ".join(map(guard.describe, faults)) == told
    guard.record(faults, 3, under_scaler)
    counts = not under_scaler or not told.startswith("the gradient of")
    assert guard.in_a_row == counts, "the ranks count the same steps"
    assert (f"step 3 is skipped on rank 0, not finite: {told}\n" in capsys.readouterr().err) == counts


@pytest.mark.parametrize("accelerator", [Ranks(), Ranks([0.0])], ids=["one", "two"])
def test_an_ordinary_step_waits_for_the_device_once(monkeypatch, accelerator):
    transfers = []
    for name in ("tolist", "item", "cpu", "numpy", "__bool__", "__float__", "__int__"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda self, *args, name=name, original=original:
                            transfers.append(name) or original(self, *args))  # fmt: skip
    guard = watching(accelerator, [1.0, 2.0])
    assert guard.read(torch.tensor(0.5), [False]) == (True, [], [False])
    assert transfers == ["tolist"] and accelerator.reduced == accelerator.num_processes - 1


def test_the_rank_that_tells_how_the_run_ended_may_have_no_image():
    guard = watching(Ranks([0.0], 1.0), [1, 2], limit=1)
    _, faults, _ = guard.read(torch.tensor(math.nan), [False])
    told = r"the last with the gradient, because of another rank\. What was saved is sound; .* if there is one"
    with pytest.raises(errors_module.UserError, match=told):
        guard.record(faults, 3)


@WITH_SDXL
def test_a_rank_is_not_blamed_for_another(recipe, tmp_path):
    script, flags = recipe
    words = torchrun(2, runs.ROOT / "tests" / "poisoned.py", script.__name__, 1, "3,4", *flags,
                     "--max_train_steps", 5, "--output_dir", tmp_path)  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    result = run_child(words, env=environment, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    told = dict(re.findall(r"warning: step (\d is skipped on rank \d), not finite: (.*)", result.stderr))
    assert len(told) == result.stderr.count("warning: step") == 4
    for step in (3, 4):
        assert told[f"{step} is skipped on rank 0"] == "the gradient, because of another rank"
        guilty = told[f"{step} is skipped on rank 1"]
        assert guilty.startswith("the diffusion loss of ") and guilty.count(".png") == 1, "no LPL, no other image"


# ---------------------------------------------------------------------------------------------------------------------
# fp16


@pytest.fixture
def fp16(monkeypatch):
    """Function scale -> fp16 on the CPU, where accelerate offers none: autocast and gradient scaler are real."""

    def switch_on(scale):
        start = train_sdxl_lpl.start_accelerator

        def patched(args):
            accelerator = start(args)
            accelerator.state._mixed_precision, accelerator.native_amp = "fp16", True
            accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
            return accelerator

        for script in (train_sdxl_lpl, train_sd3_lpl_flow):
            monkeypatch.setattr(script, "start_accelerator", patched)

    return switch_on


@WITH_SDXL
def test_overflows_that_the_scaler_sees_to_do_not_count(recipe, tmp_path, capsys, fp16):
    script, flags = recipe
    fp16(2.0**24)
    steps = 12
    rows = runs.run(script, *flags, "--max_train_steps", steps, "--max_nonfinite_steps", 1, "--checkpointing_steps", 1,
                    "--use_ema", "--output_dir", tmp_path)  # fmt: skip
    said = capsys.readouterr().err
    assert "not finite" not in said and not any("nonfinite_steps" in row for row in rows)
    states = [json.loads((tmp_path / f"checkpoint-{step}" / "training_state.json").read_text()) for step in (1, steps)]
    assert states[0]["scaler"]["scale"] < 2.0**24, "the first step overflowed"
    assert states[0]["ema_step"] == 0 and states[0]["lr_scheduler"]["_step_count"] == 1, "and counts nowhere"
    assert states[1]["ema_step"] > 0
    whole = weights(tmp_path)
    shutil.rmtree(tmp_path / f"checkpoint-{steps}")
    [shutil.rmtree(tmp_path / f"checkpoint-{step}") for step in range(4, steps)]
    runs.run(script, *flags, "--max_train_steps", steps, "--max_nonfinite_steps", 1, "--checkpointing_steps", 1,
             "--use_ema", "--output_dir", tmp_path, "--resume_from_checkpoint", "latest")  # fmt: skip
    assert weights(tmp_path) == whole, "the scale is a part of the state"


@WITH_SD3
def test_under_fp16_a_loss_that_is_not_finite_counts(recipe, tmp_path, monkeypatch, capsys, fp16):
    script, flags = recipe
    fp16(1.0)
    poison(monkeypatch, script, "diffusion loss", {2})
    runs.run(script, *flags, "--max_train_steps", 3, "--output_dir", tmp_path)
    assert "warning: step 2 is skipped, not finite: the diffusion loss of " in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# Signals


def started(words, folder, fresh=False):
    """A run in a process group of its own, once its third step is logged."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    process = start(words, fresh=fresh, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    log, end = Path(folder, "logs", "metrics.jsonl"), time.monotonic() + 120
    while not (log.is_file() and log.read_text().count("\n") >= 3):
        assert process.poll() is None, process.stderr.read()[-2000:]
        assert time.monotonic() < end
        time.sleep(0.05)
    return process


def steps_of(folder):
    return sorted(int(path.name.split("-")[1]) for path in Path(folder).glob("checkpoint-*"))


@pytest.mark.parametrize(
    ("recipe", "number"), [("sdxl", signal.SIGTERM), ("sdxl", signal.SIGINT), ("sd3", signal.SIGUSR1)],
    indirect=["recipe"],
)  # fmt: skip
def test_a_signal_saves_and_the_next_start_goes_on_to_the_same_end(recipe, tmp_path, number):
    script, flags = recipe
    flags = [*flags, "--dataloader_num_workers", 2, "--checkpointing_steps", 1000]
    process = started(command(script, *flags, "--max_train_steps", 3000, "--output_dir", tmp_path), tmp_path)
    os.killpg(process.pid, number)  # the group: Ctrl-C reaches the loader's processes too
    assert process.wait(timeout=60) == 0, process.stderr.read()[-2000:]
    [step] = steps_of(tmp_path)
    whole = [*flags, "--max_train_steps", step + 2]
    runs.run(script, *whole, "--output_dir", tmp_path, "--resume_from_checkpoint", "latest")
    runs.run(script, *whole, "--output_dir", tmp_path / "whole")
    assert weights(tmp_path) == weights(tmp_path / "whole")


def two_ranks(script, flags, folder):
    """The command line of a long run on two ranks."""
    return torchrun(2, *command(script, *flags, "--max_train_steps", 3000, "--output_dir", folder)[1:])


STEP_WITHOUT_END = """
import os, sys
from lpl_finetuning.training import signals
signals.WATCHDOG_SECONDS = float(sys.argv[1])
with signals.StopSignals(accelerator=None) as stop:
    stop.step_began()
    os.write(1, b"ready")
    lock = __import__("threading").Lock()
    lock.acquire()
    lock.acquire()  # another rank will never answer
"""


def in_a_step_without_end(patience):
    words = [sys.executable, "-c", STEP_WITHOUT_END, str(patience)]
    process = start(words, cwd=runs.ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.read(5) == b"ready"
    process.send_signal(signal.SIGTERM)
    assert b"SIGTERM: the run stops after this step and saves" in process.stderr.readline() + process.stderr.readline()
    return process


def test_a_second_signal_stops_at_once():
    process = in_a_step_without_end(patience=100)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=50) == -signal.SIGTERM


def test_the_watchdog_ends_a_run_whose_step_does_not_end():
    process = in_a_step_without_end(patience=3)  # more than it may take to read a line
    asked = time.monotonic()
    assert process.wait(timeout=20) == 128 + signal.SIGTERM
    assert time.monotonic() - asked > 0.5 and b"giving up; the last checkpoint is sound" in process.stderr.read()


def signalled_words(script, function, call, number, ranks, flags):
    """The command of a run that gets a signal as it calls one of its functions for the `call`-th time."""
    words = [runs.ROOT / "tests" / "signalled.py", script.__name__, function, call, number, *flags]
    return torchrun(ranks, *words) if ranks > 1 else [sys.executable, *map(str, words)]


def signalled(script, function, call, *flags, number="SIGTERM", ranks=1):
    """Such a run, to its end."""
    return run_child(signalled_words(script, function, call, number, ranks, flags), text=True)


PICTURES = ["--validation_prompt", "a red apple", "the sun", "--num_validation_images", 1, "--validation_steps", 2]


@WITH_SDXL
def test_a_signal_while_pictures_are_drawn(recipe, tmp_path):
    """Drawing, which may take longer than the watchdog waits, is broken off; one more step, and the run is saved."""
    script, flags = recipe
    flags = [*flags, *PICTURES, "--max_train_steps", 1000, "--output_dir", tmp_path]
    result = signalled(script, "sampling_pipeline", 2, *flags)
    assert result.returncode == 0 and "the run stops after this step and saves" in result.stderr, result.stderr
    assert steps_of(tmp_path) == [3] and "Stopped after step 3" in result.stdout
    assert {path.name for path in tmp_path.glob("validation/*.png")} == {"step-0.png"}
    assert (tmp_path / "run.png").is_file()


@WITH_SD3
def test_a_signal_while_the_held_out_loss_is_measured(recipe, tmp_path):
    """With one process it is broken off between batches, and half a measurement is not logged."""
    script, flags = recipe
    flags = [*flags, "--validation_split", 4, "--validation_steps", 2, "--max_train_steps", 1000]
    result = signalled(script, "held_out_step", 21, *flags, "--output_dir", tmp_path)  # twice ten levels before
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in (tmp_path / "logs" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "validation/diffusion_loss" in row] == [0] and steps_of(tmp_path) == [3]


@pytest.mark.parametrize(("recipe", "number"), [("sdxl", "SIGTERM"), ("sd3", "SIGINT")], indirect=["recipe"])
def test_a_signal_before_the_first_step(recipe, tmp_path, number):
    script, flags = recipe
    result = signalled(script, "prepare_objective", 1, *flags, "--output_dir", tmp_path, number=number)
    assert result.returncode == 0 and "Traceback" not in result.stderr
    assert f"{number}: stopped before the first step; what is encoded is kept" in result.stderr
    assert not steps_of(tmp_path)


@WITH_SDXL
def test_a_signal_while_a_checkpoint_is_written(recipe, tmp_path):
    script, flags = recipe
    flags = [*flags, "--checkpointing_steps", 2, "--max_train_steps", 1000, "--output_dir", tmp_path]
    result = signalled(script, "save_weights", 1, *flags)
    assert result.returncode == 0 and steps_of(tmp_path) == [2, 3]
    assert checkpoint_folders.latest_checkpoint(tmp_path).name == "checkpoint-3"


@WITH_SDXL
def test_a_signal_while_the_result_is_written(recipe, tmp_path):
    script, flags = recipe
    result = signalled(script, "save_result", 1, *flags, "--max_train_steps", 2, "--output_dir", tmp_path)
    assert result.returncode == 0 and "the result is written first" in result.stderr
    assert (tmp_path / "pytorch_lora_weights.safetensors").is_file() and (tmp_path / "README.md").is_file()


@WITH_SDXL
def test_ranks_wait_for_the_one_that_draws(recipe, tmp_path):
    """A signal to all, while the first draws and the other is at the next step: nobody gives up."""
    script, flags = recipe
    flags = [*flags, *PICTURES, "--max_train_steps", 1000, "--output_dir", tmp_path]
    result = signalled(script, "sampling_pipeline", 2, *flags, ranks=2)
    assert result.returncode == 0 and "giving up" not in result.stderr, result.stderr
    assert steps_of(tmp_path) == [3]


@pytest.mark.parametrize("place", ["training_step", "save_weights"])
@WITH_SDXL
def test_a_rank_that_hangs_does_not_keep_the_other_from_ending(place, recipe, tmp_path):
    """In a step, and while the first rank writes a checkpoint, after which it waits for the other."""
    script, flags = recipe
    flags = [*flags, "--checkpointing_steps", 1, "--max_train_steps", 3000, "--output_dir", tmp_path]
    process = start(
        signalled_words(script, place, 3, "HANG", 2, flags), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
        text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    while True:  # until one rank stands still
        states = {pid: state_of(pid) for pid in ranks_of(process)}
        if "T" in states.values():
            break
        assert process.poll() is None, process.stderr.read()[-2000:]
        time.sleep(0.02)
    [hung] = [pid for pid, state in states.items() if state == "T"]
    [other] = states.keys() - {hung}
    asked = time.monotonic()
    while state_of(other) not in ("", "Z"):
        assert time.monotonic() - asked < 20
        time.sleep(0.05)
    os.kill(hung, signal.SIGKILL)
    assert process.wait(timeout=60) != 0 and "giving up; the last checkpoint is sound" in process.stderr.read()
    assert checkpoint_folders.latest_checkpoint(tmp_path).name == (
        "checkpoint-2" if place == "training_step" else "checkpoint-3"
    )


def state_of(pid):
    """A process' letter in /proc: T for stopped, Z for ended; "" when there is none."""
    try:
        return Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


@WITH_SDXL
def test_a_run_that_fails_takes_its_loading_processes_along(recipe, tmp_path):
    """They ignore what others send them, but not the run's own end."""
    script, flags = recipe
    flags = [*flags, "--learning_rate", "1e25", "--max_nonfinite_steps", 2, "--dataloader_num_workers", 2]
    words = command(script, *flags, "--max_train_steps", 3000, "--output_dir", tmp_path)
    process = start(words, env={**os.environ, "ACCELERATE_USE_CPU": "true"}, stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE, text=True)  # fmt: skip
    said = process.communicate(timeout=240)[1]
    assert process.returncode == 2 and "2 steps in a row were not finite" in said, said[-2000:]
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


@WITH_SD3
def test_the_loading_processes_end_with_the_loop(recipe, tmp_path, monkeypatch):
    script, flags = recipe
    alive = {}

    def noting(name, function):
        def noted(*args):
            alive[name] = len(multiprocessing.active_children())
            return function(*args)

        return noted

    monkeypatch.setattr(script, "training_step", noting("in the loop", script.training_step))
    monkeypatch.setattr(script, "save_result", noting("after it", script.save_result))
    flags = [*flags, "--max_train_steps", 2, "--dataloader_num_workers", 2]
    runs.run(script, *flags, "--output_dir", tmp_path)
    assert alive == {"in the loop": 2, "after it": 0}


@WITH_SD3
@pytest.mark.parametrize(("minutes", "steps"), [(1e-9, [1, 2, 3]), (60, [])])
def test_a_checkpoint_is_saved_when_the_minutes_have_gone_by(minutes, steps, recipe, tmp_path):
    script, flags = recipe
    flags = [*flags, "--max_train_steps", 3, "--checkpointing_steps", 1000, "--checkpointing_minutes", minutes]
    runs.run(script, *flags, "--output_dir", tmp_path)
    assert steps_of(tmp_path) == steps


def test_a_loading_process_that_is_told_to_end_by_the_run_ends():
    context = multiprocessing.get_context("fork")
    ready = context.Event()

    def work():
        signals.leave_signals_to_the_run()
        ready.set()
        while True:
            time.sleep(0.1)

    process = context.Process(target=work, daemon=True)
    process.start()
    ready.wait(10)
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM):
        subprocess.run(["kill", f"-{number}", str(process.pid)], check=True)  # not from its parent
    process.join(0.5)
    assert process.is_alive()
    process.terminate()
    process.join(10)
    assert process.exitcode == 0


LOADING_PROCESS = """
import multiprocessing, os, sys, time
from lpl_finetuning.training import signals

def work():
    if sys.argv[1] == "late":  # the run is gone before its process is asked to look
        while os.getppid() == multiprocessing.parent_process().pid:
            time.sleep(0.01)
    signals.PARENT_CHECK_SECONDS = float(sys.argv[2])
    signals.leave_signals_to_the_run()
    os.write(1, b"%d\\n" % os.getpid())
    time.sleep(1000)

if __name__ == "__main__":
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    os.write(1, b"%d\\n" % process.pid)
    process.join()
"""


def is_gone(pid, within):
    """Whether a process has ended, or does in so many seconds; one that nobody has waited for has ended as well."""
    end = time.monotonic() + within
    while time.monotonic() < end:
        stat = Path("/proc", str(pid), "stat")
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if stat.read_text().rpartition(")")[2].split()[0] != "Z":
                time.sleep(0.05)
                continue
        return True
    return False


@pytest.mark.parametrize("case", ["in time", "late", "asked"])
def test_a_loading_process_whose_run_was_killed_ends(case):
    """By itself, though the run was gone before it could look, and at once when anybody sends it SIGTERM."""
    words = [sys.executable, "-c", LOADING_PROCESS, case, "100" if case == "asked" else "0.5"]
    process = start(words, cwd=runs.ROOT, stdout=subprocess.PIPE)
    pid = int(process.stdout.readline())
    if case != "late":
        assert int(process.stdout.readline()) == pid
        os.kill(pid, signal.SIGTERM)  # not from the run
        assert not is_gone(pid, 1.5), "it leaves when the run says so"
    process.kill()
    process.wait()
    if case == "asked":
        assert not is_gone(pid, 0.5)
        os.kill(pid, signal.SIGTERM)
    assert is_gone(pid, 20)


@WITH_SD3
def test_one_of_two_ranks_is_asked_and_both_stop(recipe, tmp_path):
    script, flags = recipe
    process = started(two_ranks(script, flags, tmp_path), tmp_path)
    os.kill(ranks_of(process)[1], signal.SIGTERM)
    assert process.wait(timeout=60) == 0, process.stderr.read()[-2000:]
    assert len(steps_of(tmp_path)) == 1


@WITH_SDXL
def test_a_rank_that_dies_takes_the_other_along(recipe, tmp_path):
    """Under the real torchrun."""
    script, flags = recipe
    process = started(two_ranks(script, flags, tmp_path), tmp_path, fresh=True)
    ranks = ranks_of(process)
    os.kill(ranks[0], signal.SIGKILL)
    killed = time.monotonic()
    assert process.wait(timeout=60) != 0
    assert time.monotonic() - killed < 30
    assert not any(Path("/proc", str(pid)).exists() for pid in ranks)


@pytest.mark.parametrize(("recipe", "steps"), [("sdxl", 2), ("sd3", 3000)], indirect=["recipe"])
def test_the_shared_model_goes_before_the_group_of_ranks(recipe, tmp_path, steps):
    """In the other order a rank may hang for ever as it ends, seldom enough to be missed by all other tests."""
    script, flags = recipe
    words = command(script, *flags, "--max_train_steps", steps, "--output_dir", tmp_path)
    process = start(torchrun(2, "-m", "tests.ends_in_order", *words[1:]), cwd=runs.ROOT, stdout=subprocess.PIPE,
                    text=True, stderr=subprocess.STDOUT,
                    env={**os.environ, "ACCELERATE_USE_CPU": "true"})  # fmt: skip
    if steps > 2:
        log, end = tmp_path / "logs" / "metrics.jsonl", time.monotonic() + 120
        while not log.is_file() or not log.read_text():
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.1)
        os.kill(ranks_of(process)[1], signal.SIGTERM)
    said = process.communicate(timeout=240)[0]
    assert process.returncode == 0, said[-2000:]
    assert said.count("models that outlive the group: 0") == 2, said[-2000:]


@pytest.mark.parametrize(("error", "heard"), [(errors_module.UserError, False), (errors_module.RankError, True)])
def test_what_one_rank_alone_knows_it_says_itself(monkeypatch, capsys, error, heard):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as stopped, errors_module.errors_for_people(debug=False):
        raise error("a file is damaged")
    assert stopped.value.code == 2 and ("error: a file is damaged" in capsys.readouterr().err) == heard
