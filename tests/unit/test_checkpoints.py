"""Checkpoints: bit-exact, never lost, never taken when damaged. Kills are real kills of forked processes."""

import argparse
import contextlib
import errno
import json
import os
import pickle
import pickletools
import random
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file

from lpl_finetuning.base_model import BaseModel
from lpl_finetuning.errors import UserError
from lpl_finetuning.families import SDXL
from lpl_finetuning.flags import RECIPE_HEAD
from lpl_finetuning.tensor_files import write_tensors
from lpl_finetuning.training import checkpoint_folders, checkpoints
from lpl_finetuning.training.checkpoint_folders import (
    MANIFEST,
    check_resume,
    keep_own_recipe,
    list_checkpoints,
    named_folder,
    newest_good,
    run_identity,
    set_earlier_run_aside,
    tidy,
    verify_checkpoint,
    write_manifest,
)
from lpl_finetuning.training.checkpoints import (
    CheckpointClock,
    TrainingState,
    checkpoint_bytes,
    checkpoint_to_resume,
    kept_if_unwritten,
    save_checkpoint,
)
from lpl_utils import AutoWeight

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
FILES = [WEIGHTS, "unet/config.json", "training_state.safetensors", "training_state.json", MANIFEST]
FLAGS = {"use_lora": False, "seed": 3, "use_ema": False, "optimizer": "adamw", "use_8bit_adam": False,
         "timestep_sampling": "uniform", "base_model": BaseModel(SDXL, "a/model")}  # fmt: skip


def build(kind="adamw", width=8, ema=True, scaler=True, auto_weight=True):
    """(model, TrainingState) of a layer of width x width, before any step."""
    torch.manual_seed(0)
    model = torch.nn.Linear(width, width)
    if kind == "adamw":
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    elif kind == "adamw8bit":
        optimizer = pytest.importorskip("bitsandbytes").optim.AdamW8bit(model.parameters(), lr=1e-2)
    else:
        optimizer = pytest.importorskip("prodigyopt").Prodigy(model.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    return model, TrainingState(
        optimizer,
        schedule,
        torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3) if scaler else None,
        EMAModel(model.parameters(), decay=0.9) if ema else None,
        AutoWeight() if auto_weight else None,
        run_identity(argparse.Namespace(**FLAGS)),
    )


def train(model, state, first, last):
    """Optimizer steps `first` to `last`, data by the step; an infinite loss at step 2 halves the scale."""
    for step in range(first, last):
        data = torch.randn(4, model.in_features, generator=torch.Generator().manual_seed(step))
        loss = model(data).square().mean()
        if state.scaler:
            state.scaler.scale(loss * (float("inf") if step == 2 else 1)).backward()
            state.scaler.step(state.optimizer)
            state.scaler.update()
        else:
            loss.backward()
            state.optimizer.step()
        state.lr_scheduler.step()
        state.optimizer.zero_grad()
        if state.ema is not None:
            state.ema.step(model.parameters())
        if state.auto_weight is not None:
            state.auto_weight.update(loss.detach(), loss.detach() / 3, torch.tensor(2.0))


def writer(model):
    """The save_model of a script: a folder in the layout of diffusers."""

    def save_model(folder):
        (folder / "unet").mkdir()
        (folder / "unet" / "config.json").write_text('{"width": 8}')
        return {WEIGHTS: write_tensors(folder / WEIGHTS, model.state_dict())}

    return save_model


@pytest.fixture(scope="module")
def trained():
    """A tiny run after four steps."""
    model, state = build()
    train(model, state, 0, 4)
    return model, state


@pytest.fixture
def save(trained, tmp_path):
    """save(step, limit=None, folder=tmp_path): one checkpoint of the tiny run."""
    model, state = trained
    return lambda step, limit=None, folder=tmp_path: save_checkpoint(folder, step, state, writer(model), limit)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def flip(path, position, mask=1):
    """Change bits of one byte of a file."""
    with open(path, "r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ mask]))


def arguments(folder, which="latest"):
    return argparse.Namespace(resume_from_checkpoint=which, output_dir=str(folder), **FLAGS)


# ---------------------------------------------------------------------------------------------------------------------
# What is saved comes back


def plain(value):
    """A state without what JSON changes: tuples become lists, tensors bytes."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.contiguous().numpy().tobytes()
    if isinstance(value, dict):
        return {str(key): plain(entry) for key, entry in value.items() if not callable(entry)}
    return [plain(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def everything(model, state):
    """All that decides how a run goes on."""
    parts = {"model": model.state_dict(), "optimizer": state.optimizer.state_dict(),
             "schedule": state.lr_scheduler.state_dict()}  # fmt: skip
    if state.scaler:
        parts["scaler"] = state.scaler.state_dict()
    if state.ema is not None:
        parts["ema"] = [state.ema.optimization_step, state.ema.shadow_params]
    if state.auto_weight is not None:
        parts["auto_weight"] = state.auto_weight.state_dict()
    return plain(parts)


@pytest.mark.parametrize("extras", [True, False], ids=["all-parts", "bare"])
@pytest.mark.parametrize(("kind", "width"), [("adamw", 8), ("adamw8bit", 64), ("prodigy", 8)])
def test_a_run_goes_on_bit_for_bit(kind, width, extras, tmp_path):
    """Saved at step 4, restored in fresh objects, trained on to step 7: equal to one that was never interrupted."""
    more = {"ema": extras, "auto_weight": extras, "scaler": extras and kind != "prodigy"}
    model, state = build(kind, width, **more)
    train(model, state, 0, 4)
    folder = save_checkpoint(tmp_path, 4, state, writer(model))
    before = everything(model, state)
    train(model, state, 4, 7)

    again, restored = build(kind, width, **more)
    again.load_state_dict(load_file(folder / WEIGHTS))
    assert restored.load(folder) == 4
    assert everything(again, restored) == before
    train(again, restored, 4, 7)
    assert everything(again, restored) == everything(model, state) != before


def test_the_manifest_lists_every_file(save, tmp_path):
    folder = save(4)
    manifest = json.loads((folder / MANIFEST).read_text())
    assert manifest["format"] == 1 and manifest["step"] == 4
    assert set(manifest["files"]) == set(FILES) - {MANIFEST}
    for name, entry in manifest["files"].items():
        said = subprocess.run(["sha256sum", folder / name], capture_output=True, text=True, check=True).stdout
        assert entry == {"sha256": said.split()[0], "size": (folder / name).stat().st_size}
    assert verify_checkpoint(folder) is None and names(tmp_path) == ["checkpoint-4"]


def test_no_pickle(trained, save, monkeypatch):
    """Nothing pickles while it is saved or loaded, and every file is safetensors or JSON by its bytes, too."""

    def forbidden(*args, **kwargs):
        raise AssertionError("pickle")

    for name in ("dump", "dumps", "load", "loads", "Pickler", "Unpickler"):
        monkeypatch.setattr(pickle, name, forbidden)
    for name in ("save", "load"):
        monkeypatch.setattr(torch, name, forbidden)
    folder = save(4)
    build()[1].load(folder)
    for path in folder.rglob("*"):
        if path.is_dir():
            continue
        data = path.read_bytes()
        assert path.suffix in (".safetensors", ".json")
        assert not data.startswith(b"PK"), "the zip of torch.save"
        with pytest.raises(ValueError):
            list(pickletools.genops(data))
        if path.suffix == ".json":
            json.loads(data)
        else:
            header = int.from_bytes(data[:8], "little")
            entries = json.loads(data[8 : 8 + header])
            end = max(entry["data_offsets"][1] for key, entry in entries.items() if key != "__metadata__")
            assert len(data) == 8 + header + end, "tensors and nothing else"


def test_large_files_are_hashed_while_they_are_written(save, monkeypatch):
    """Weights and state are not read again for the manifest, which has their hashes all the same."""
    read, real = [], checkpoint_folders.sha256_of
    monkeypatch.setattr(checkpoint_folders, "sha256_of", lambda path: (read.append(Path(path).name), real(path))[1])
    folder = save(1)
    assert sorted(read) == ["config.json", "training_state.json"]
    listed = json.loads((folder / MANIFEST).read_text())["files"]
    assert {name: real(folder / name) for name in listed} == {name: file["sha256"] for name, file in listed.items()}


def test_a_pickle_in_the_folder_is_refused_not_read(save):
    folder = save(4)
    (folder / "training_state.bin").write_bytes(b"\x80\x04.")
    assert verify_checkpoint(folder) == "training_state.bin is not in its manifest"


@pytest.mark.parametrize("name", [
    ".DS_Store", "unet/.nfs0001", "._training_state.safetensors", "Thumbs.db", "notes.txt", "unet/preview.png",
    ".ipynb_checkpoints/training_state-checkpoint.json", ".ipynb_checkpoints/weights.safetensors",
])  # fmt: skip
def test_what_other_programs_leave_in_a_checkpoint_is_no_damage(name, save, tmp_path):
    save(3)
    folder = save(4)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("x")
    assert verify_checkpoint(folder) is None and checkpoint_to_resume(arguments(tmp_path)) == folder
    assert build()[1].load(folder) == 4


def test_a_result_that_only_all_ranks_could_save_is_told_as_lost_since_the_last_checkpoint():
    told = r"^the result can't be written \(.*\)\. .* after the last checkpoint once more$"
    with pytest.raises(UserError, match=told), kept_if_unwritten(None):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(ValueError), kept_if_unwritten(None):
        raise ValueError("nothing about writing")


def test_the_first_step_after_a_resume_has_the_rate_of_todays_schedule(save):
    """The checkpoint's schedule had ended at 0."""
    folder = save(4)
    _, state = build()
    state.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(state.optimizer, lambda step: 1.0)
    state.load(folder)
    assert [group["lr"] for group in state.optimizer.param_groups] == [1e-2]
    assert state.optimizer.param_groups[0]["lr"] != build()[1].lr_scheduler.lr_lambdas[0](4) * 1e-2


def test_the_images_of_steps_of_several_sizes_are_added(tmp_path):
    """4 steps of 3 images, then 2 of 5."""
    model, state = build()
    train(model, state, 0, 4)
    state.batch_size = 3
    folder = save_checkpoint(tmp_path, 4, state, writer(model))
    assert checkpoint_folders.images_seen(folder, 99) == 12
    model, later = build()
    later.batch_size = 5
    later.load(folder)
    assert checkpoint_folders.images_seen(save_checkpoint(tmp_path, 6, later, writer(model)), 99) == 22


def test_other_groups_of_weights_are_a_message(save):
    folder = save(4)
    model, state = build()
    state.optimizer = torch.optim.AdamW([{"params": [value]} for value in model.parameters()], lr=1e-2)
    with pytest.raises(UserError, match=r"groups of \[2\] weights .* this run \[1, 1\]: give the --lora_pattern"):
        state.load(folder)


# ---------------------------------------------------------------------------------------------------------------------
# Damage


def damage(folder, name, how):
    path = folder / name
    if how == "flip":
        flip(path, path.stat().st_size // 2)
    elif how == "truncate":
        os.truncate(path, path.stat().st_size - 1)
    elif how == "empty":
        os.truncate(path, 0)
    elif how == "longer":
        path.write_bytes(path.read_bytes() + b"\n")
    elif how == "delete":
        path.unlink()
    else:
        path.with_name(path.name + ".bin").write_bytes(b"x")


@pytest.mark.parametrize(
    ("name", "how"),
    [(name, how) for name in FILES for how in ("flip", "truncate", "empty", "longer", "delete", "add")
     if (name, how) != (MANIFEST, "longer")],  # white space after JSON is no damage
)  # fmt: skip
def test_damage_is_noticed_named_and_gone_around(name, how, save, tmp_path, capsys):
    good, bad = save(300), save(400)
    damage(bad, name, how)
    capsys.readouterr()
    assert checkpoint_to_resume(arguments(tmp_path)) == good
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1 and said[0].startswith("checkpoint-400 is damaged: ")
    assert said[0].endswith("; going back to checkpoint-300") and name in said[0]
    if how == "flip" and name == WEIGHTS:
        wrong = f"{WEIGHTS} has another sha256 than its manifest says"
        assert said == [f"checkpoint-400 is damaged: {wrong}; going back to checkpoint-300"]
    assert names(tmp_path) == ["checkpoint-300", "checkpoint-400"], "deciding changes nothing"
    unseen = how == "add" or (how == "flip" and name != MANIFEST)  # by the cheap check
    assert list_checkpoints(tmp_path)[-1][0] == (400 if unseen else 300)
    files = sorted(path.name for path in bad.rglob("*"))
    assert set_earlier_run_aside(tmp_path, good) is None
    assert names(tmp_path) == ["checkpoint-300", "damaged-checkpoint-400"]
    assert sorted(path.name for path in (tmp_path / "damaged-checkpoint-400").rglob("*")) == files
    assert checkpoint_to_resume(arguments(tmp_path)) == good, "as a slower rank sees it"
    assert capsys.readouterr().out == ""


def test_every_flipped_bit_is_noticed(save):
    """Of the manifest itself every byte, of the other files a sample."""
    folder = save(4)
    for name in FILES:
        path = folder / name
        whole, size = path.read_bytes(), path.stat().st_size
        for position in range(size) if name == MANIFEST else random.Random(0).sample(range(size), min(size, 10)):
            mask = 1 << random.Random(position).randrange(8)
            flip(path, position, mask)
            with contextlib.suppress(ValueError):
                if name == MANIFEST and json.loads(path.read_text()) == json.loads(whole):
                    path.write_bytes(whole)
                    continue  # white space
            assert verify_checkpoint(folder) is not None, (name, position, mask)
            path.write_bytes(whole)
    assert verify_checkpoint(folder) is None


def test_the_early_look_leaves_damage_to_the_later_one(save, tmp_path):
    """A damaged newest checkpoint may look like another run's; one that is another run's is refused by both."""
    check_resume(arguments(tmp_path))
    good = save(300)
    for file in FILES:
        damage(save(400), file, "delete")
        check_resume(arguments(tmp_path))
    bad = save(400)
    check_resume(arguments(tmp_path))
    path = bad / "training_state.json"
    path.write_text(path.read_text().replace('"seed": 3', '"seed": 7'))
    check_resume(arguments(tmp_path))
    assert checkpoint_to_resume(arguments(tmp_path)) == good
    write_manifest(bad, 400)
    for look in (check_resume, checkpoint_to_resume):
        for which in ("latest", "checkpoint-400", bad):
            with pytest.raises(UserError, match=r"checkpoint-400 is of another run \(seed was 7, is 3\)"):
                look(arguments(tmp_path, which))


def test_a_manifest_of_another_step_is_damage(save):
    folder = save(4)
    path = folder / MANIFEST
    path.write_text(path.read_text().replace('"step": 4', '"step": 5'))
    assert verify_checkpoint(folder) == "manifest.json says step 5, training_state.json 4"


@pytest.mark.parametrize(
    "content", ["[]", "{}", '{"format": 2}', '{"format": 1, "step": 4, "files": []}', "\xff", "null",
                '{"format": 1, "step": 4, "files": {"a": 3}}', '{"format": 1, "step": 4, "files": {}}']
)  # fmt: skip
def test_a_strange_manifest_is_damage_not_a_traceback(content, save):
    folder = save(4)
    (folder / MANIFEST).write_bytes(content.encode("latin-1"))
    assert verify_checkpoint(folder)
    if content != '{"format": 1, "step": 4, "files": {}}':
        assert list_checkpoints(folder.parent) == []


def test_several_damaged_ones_are_all_named_and_kept(save, tmp_path, capsys):
    for step in (1, 2, 3):
        save(step)
    damage(tmp_path / "checkpoint-3", WEIGHTS, "delete")
    damage(tmp_path / "checkpoint-2", WEIGHTS, "flip")
    (tmp_path / "damaged-checkpoint-3").mkdir()  # of an earlier time
    assert checkpoint_to_resume(arguments(tmp_path)).name == "checkpoint-1"
    said = capsys.readouterr().out.splitlines()
    assert said == [f"checkpoint-3 is damaged: {WEIGHTS} is missing; going back to checkpoint-1",
                    f"checkpoint-2 is damaged: {WEIGHTS} has another sha256 than its manifest says; going back to "
                    "checkpoint-1"]  # fmt: skip
    set_earlier_run_aside(tmp_path, tmp_path / "checkpoint-1")
    assert names(tmp_path) == [
        "checkpoint-1",
        "damaged-checkpoint-2",
        "damaged-checkpoint-3",
        "damaged-checkpoint-3-2",
    ]


def test_only_the_first_rank_speaks(save, tmp_path, capsys, monkeypatch):
    save(1), save(2)
    damage(tmp_path / "checkpoint-2", WEIGHTS, "flip")
    monkeypatch.setenv("RANK", "1")
    assert checkpoint_to_resume(arguments(tmp_path)).name == "checkpoint-1"
    assert capsys.readouterr().out == ""


def test_all_damaged_is_an_error_not_a_fresh_start(save, tmp_path):
    save(1), save(2)
    damage(tmp_path / "checkpoint-1", MANIFEST, "delete")
    damage(tmp_path / "checkpoint-2", WEIGHTS, "flip")
    with pytest.raises(
        UserError, match=r"checkpoint-2: unet/diff.*; checkpoint-1: manifest.json.*Nothing was\s+deleted"
    ):
        checkpoint_to_resume(arguments(tmp_path))
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2"]


def test_no_checkpoint_is_a_fresh_start(tmp_path, capsys):
    for folder in (tmp_path, tmp_path / "not-there-yet"):
        assert checkpoint_to_resume(arguments(folder)) is None
        assert "starting fresh" in capsys.readouterr().out
    assert checkpoint_to_resume(arguments(tmp_path, None)) is None


def test_a_named_checkpoint(save, tmp_path, monkeypatch):
    good, bad = save(300), save(400)
    damage(bad, WEIGHTS, "flip")
    for which in ("checkpoint-400", str(bad), f"{bad}/"):
        with pytest.raises(UserError, match=f"is damaged: {WEIGHTS} has another.*newest good one is .*checkpoint-300"):
            checkpoint_to_resume(arguments(tmp_path, which))
    assert checkpoint_to_resume(arguments(tmp_path, "checkpoint-300")) == good
    damage(good, WEIGHTS, "truncate")
    with pytest.raises(UserError, match="bytes, its manifest says") as caught:
        checkpoint_to_resume(arguments(tmp_path, "checkpoint-300"))
    assert "newest good" not in str(caught.value)
    monkeypatch.chdir(tmp_path)
    for message, names in {
        "no checkpoint there": ("checkpoint-9", "nowhere"),
        "is no checkpoint itself": (".", "..", str(tmp_path)),
    }.items():
        for which in names:
            with pytest.raises(UserError, match=message):
                checkpoint_to_resume(arguments(tmp_path, which))
    named = save(5).rename(tmp_path / "best")
    assert checkpoint_to_resume(arguments(tmp_path / "new", named)) == named


def test_another_runs_checkpoint_is_refused(save, tmp_path):
    save(1)
    args = arguments(tmp_path)
    args.seed = 4
    with pytest.raises(UserError, match="seed was 3, is 4"):
        checkpoint_to_resume(args)


# ---------------------------------------------------------------------------------------------------------------------
# Folders


def test_the_oldest_go_and_the_newest_stays(save, tmp_path):
    for step in (2, 4, 6, 10):
        save(step, limit=2)
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-6"]
    assert [step for step, _ in list_checkpoints(tmp_path)] == [6, 10]
    save(3, limit=1)
    assert names(tmp_path) == ["checkpoint-3"], "never the one just written"


def test_a_damaged_folder_is_neither_counted_nor_deleted(save, tmp_path):
    save(1), save(2)
    damage(tmp_path / "checkpoint-2", WEIGHTS, "delete")
    save(3, limit=2)
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    save(2, limit=2)
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-3", "damaged-checkpoint-2"]


def test_results_of_earlier_runs_move(save, tmp_path):
    for step in (1, 2, 3):
        save(step)
    (tmp_path / ".tmp-checkpoint-4").mkdir()
    (tmp_path / "previous-2").mkdir()
    damage(tmp_path / "checkpoint-2", WEIGHTS, "flip")
    assert set_earlier_run_aside(tmp_path, tmp_path / "checkpoint-1") == tmp_path / "previous-1"
    assert names(tmp_path) == ["checkpoint-1", "damaged-checkpoint-2", "previous-1", "previous-2"]
    assert names(tmp_path / "previous-1") == ["checkpoint-3"]
    assert set_earlier_run_aside(tmp_path, tmp_path / "checkpoint-1") is None
    assert set_earlier_run_aside(tmp_path, None) == tmp_path / "previous-3"
    assert names(tmp_path) == ["damaged-checkpoint-2", "previous-1", "previous-2", "previous-3"]
    save(5)
    (tmp_path / "config.yaml").touch()
    assert set_earlier_run_aside(tmp_path, None) == tmp_path / "previous-4"
    assert names(tmp_path / "previous-4") == ["checkpoint-5", "config.yaml", "damaged-checkpoint-2"]


def test_a_run_that_showed_nothing_leaves_nothing_to_keep(tmp_path):
    (tmp_path / "logs").mkdir()
    for name in ("config.yaml", "data_report.json", "logs/metrics.jsonl", "notes.txt"):
        (tmp_path / name).touch()
    assert set_earlier_run_aside(tmp_path, None) is None
    (tmp_path / "logs" / "metrics.jsonl").write_text("{}")
    assert set_earlier_run_aside(tmp_path, None) == tmp_path / "previous-1"
    assert names(tmp_path) == ["notes.txt", "previous-1"], "what is the user's own stays"
    assert names(tmp_path / "previous-1") == ["config.yaml", "data_report.json", "logs"]


OWN_RECIPE = "# why rank 16: ...\nuse_lora: true\nseed: 3\nmax_train_steps: 9\noutput_dir: here\ndry_run: false\n"


def test_a_folder_with_a_recipe_of_ones_own_is_no_runs(tmp_path):
    """Nothing in it moves, but the recipe makes room for the run's flags."""
    for name in ("config.yaml", "README.md", "vae/mine.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(OWN_RECIPE)
    assert set_earlier_run_aside(tmp_path, None) is None
    assert names(tmp_path) == ["README.md", "config.yaml", "vae"]
    (tmp_path / "config.yaml.yours").touch()
    kept = keep_own_recipe(tmp_path)
    assert kept == tmp_path / "config.yaml.yours-2" and kept.read_text() == OWN_RECIPE
    assert not (tmp_path / "config.yaml").exists() and keep_own_recipe(tmp_path) is None
    earlier = "\n".join(line for line in OWN_RECIPE.splitlines() if not line.startswith("#"))
    for text in ("", f"{RECIPE_HEAD}seed: 3\n", RECIPE_HEAD + "seed: [", earlier):
        (tmp_path / "config.yaml").write_text(text)
        assert keep_own_recipe(tmp_path) is None, "a run's, by this version or an earlier one"


def test_resuming_from_elsewhere_moves_what_is_newer(save, tmp_path):
    save(1), save(3)
    best = save(2).rename(tmp_path / "best")
    save(2)
    set_earlier_run_aside(tmp_path, best)
    assert names(tmp_path) == ["best", "checkpoint-1", "checkpoint-2", "previous-1"]
    assert names(tmp_path / "previous-1") == ["checkpoint-3"]


def test_the_clock():
    now = [0.0]
    clock = CheckpointClock(10, 30, now=lambda: now[0])
    assert [clock.due(step) for step in (1, 9, 10, 20, 21)] == [False, False, True, True, False]
    now[0] = 1799.0
    assert not clock.late()
    now[0] = 1800.0
    assert clock.late() and clock.late()
    clock.saved()
    assert not clock.late()
    now[0] = 3600.0
    assert clock.late()
    assert not CheckpointClock(10, now=iter([0.0, 1e9, 1e9]).__next__).late()


# ---------------------------------------------------------------------------------------------------------------------
# The disk is full


@pytest.mark.parametrize("kind", ["adamw", "adamw8bit", "prodigy"])
def test_the_bytes_of_a_checkpoint(kind, tmp_path):
    """The estimate from the tensors is what a save takes, but for headers and JSON."""
    model, state = build(kind, 64)
    train(model, state, 0, 1)
    folder = save_checkpoint(tmp_path, 1, state, writer(model))
    took = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    assert 0 <= took - checkpoint_bytes(state, model.parameters()) < 4000


def test_too_little_space_is_said_before_anything_is_written(save, trained, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    called = []
    first = checkpoint_bytes(trained[1], trained[0].parameters())

    def with_free(free):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=free))

    with_free(first - 1)
    with pytest.raises(
        UserError, match=r"a checkpoint needs 0.0 MB, only 0.0 MB are free. Nothing was written\. Free"
    ):
        save(1)
    assert names(tmp_path) == []
    with_free(first)
    folder = save(1)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    assert size > first
    with_free(size - 1)
    with pytest.raises(UserError, match=r"written and checkpoint-1 is intact.*--checkpoints_total_limit"):
        save_checkpoint(tmp_path, 2, trained[1], called.append, 1)
    assert not called and names(tmp_path) == ["checkpoint-1"] and verify_checkpoint(folder) is None
    with_free(size)
    save(2)


def in_fork(work):
    """Run work() in a forked child; its wait status."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
    return os.waitpid(child, 0)[1]


@pytest.mark.parametrize(
    ("limit", "since"),
    [*((limit, "start") for limit in (0, 11, 100, 500, 1000)), (0, "manifest"), (500, "manifest")],
)
def test_a_disk_that_fills_up_while_saving(limit, since, save, tmp_path, monkeypatch):
    """No file may grow beyond `limit`, as the kernel sees it: an error of ours, no leftover, the last one intact."""
    sizes = {path.name: path.stat().st_size for path in save(1).rglob("*")}
    assert max(sizes.values()) > 1000 and sizes[MANIFEST] > 500, "under each limit a file fails"

    def fill_up():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

    def work():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        if since == "start":
            fill_up()
        else:
            write = checkpoints.write_manifest
            monkeypatch.setattr(checkpoints, "write_manifest", lambda *args: (fill_up(), write(*args)))
        with pytest.raises(
            UserError, match=r"can't save .*checkpoint-2.*checkpoint-1 is intact\. Files may not be that"
        ):
            save(2, limit=1)

    assert in_fork(work) == 0
    assert names(tmp_path) == ["checkpoint-1"] and verify_checkpoint(tmp_path / "checkpoint-1") is None
    save(2, limit=1)
    assert names(tmp_path) == ["checkpoint-2"]


def test_a_real_full_disk(tmp_path):
    """A file system of 2 MB, checkpoints of 0.8: the third is refused, and fails if it is tried anyway."""
    place = tmp_path / "small"
    place.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", place],
                                           capture_output=True).returncode:  # fmt: skip
        pytest.skip("no file system can be mounted here")
    try:
        model, state = build(width=250, ema=False, scaler=False, auto_weight=False)
        train(model, state, 0, 1)
        for step in (1, 2):
            save_checkpoint(place, step, state, writer(model))
        with pytest.raises(UserError, match=r"needs 0.8 MB, only 0\.\d MB are free"):
            save_checkpoint(place, 3, state, writer(model))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(checkpoints, "check_room", lambda *args: None)
            with pytest.raises(UserError, match=r"disk full .*No space left.*checkpoint-2 is intact"):
                save_checkpoint(place, 3, state, writer(model))
        assert names(place) == ["checkpoint-1", "checkpoint-2"]
        assert [verify_checkpoint(folder) for _, folder in list_checkpoints(place)] == [None, None]
    finally:
        subprocess.run(["umount", place], check=True)


@pytest.mark.parametrize(
    ("error", "expected"),
    [(OSError(errno.EDQUOT, "quota"), "disk full"), (OSError(errno.EIO, "bad sector"), "can't save .*bad sector"),
     (PermissionError(errno.EACCES, "no"), "can't save")],
)  # fmt: skip
@pytest.mark.parametrize("again", [False, True], ids=["new-step", "same-step"])
@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_any_failed_write_leaves_the_last_one(function, again, error, expected, save, tmp_path, monkeypatch):
    """At each fsync and each rename in turn."""
    save(1, limit=1)
    true, calls = getattr(os, function), []

    def failing(*args, **kwargs):
        calls.append(args)
        if len(calls) == fail_at:
            raise error
        return true(*args, **kwargs)

    monkeypatch.setattr(os, function, failing)
    fail_at = 0
    while fail_at < 30:
        fail_at += 1
        calls.clear()
        try:
            save(1 if again else 2, limit=2)
            break
        except UserError as caught:
            assert caught.__cause__ is error
        except OSError:
            assert function == "replace" and len(calls) > 1 + again, "only deleting the oldest"
        listed = list_checkpoints(tmp_path)
        assert listed and all(verify_checkpoint(folder) is None for _, folder in listed)
        assert not [name for name in names(tmp_path) if name.startswith(".")]
    assert fail_at > (5 if function == "fsync" else 1)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("shapes"), SystemExit(3)])
def test_an_error_or_ctrl_c_leaves_no_half(error, save, trained, tmp_path):
    save(1)

    def save_model(folder):
        writer(trained[0])(folder)
        raise error

    with pytest.raises(type(error)):
        save_checkpoint(tmp_path, 2, trained[1], save_model)
    assert names(tmp_path) == ["checkpoint-1"]


def test_an_error_of_safetensors_that_is_no_full_disk_stays_what_it_is(trained, tmp_path):
    from safetensors import SafetensorError

    def save_model(folder):
        raise SafetensorError("invalid header")

    with pytest.raises(SafetensorError):
        save_checkpoint(tmp_path, 2, trained[1], save_model)


def test_a_power_cut_finds_the_files_before_the_name(save, tmp_path, monkeypatch):
    """Every file and folder is flushed before the rename, the manifest last; the rename before the old one goes."""
    save(1)
    events, fsync, replace = [], os.fsync, os.replace

    def log_fsync(descriptor):
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).relative_to(tmp_path).as_posix())
        fsync(descriptor)

    def log_replace(source, target):
        events.append(f"{Path(source).name} -> {Path(target).name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", log_fsync)
    monkeypatch.setattr(os, "replace", log_replace)
    save(2, limit=1)
    temporary = ".tmp-checkpoint-2"
    flushed, last = events[:-5], events[-5:]
    assert {f"{temporary}/{name}" for name in {*FILES, "unet"} - {MANIFEST}} == set(flushed)
    assert last == [f"{temporary}/{MANIFEST}", temporary, f"{temporary} -> checkpoint-2", ".",
                    "checkpoint-1 -> .tmp-checkpoint-1-removed"]  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Kills


class Killer:
    """Counts what changes the disk, and kills its own process before the call number `kill_at`.

    A file is written in two halves, so that it is also killed half-way.
    """

    def __init__(self, kill_at, log=None):
        self.kill_at, self.count, self.log = kill_at, 0, log

    def tick(self, name):
        self.count += 1
        if self.log is not None:
            self.log.append(name)
        if self.count == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def wrap(self, name, function):
        def wrapped(*args, **kwargs):
            self.tick(name)
            return function(*args, **kwargs)

        return wrapped

    def install(self, patch):
        for name in ("replace", "rename", "fsync", "unlink", "rmdir", "mkdir"):
            patch.setattr(os, name, self.wrap(name, getattr(os, name)))
        save_tensors, write_text = write_tensors, Path.write_text

        def save_in_halves(path, tensors):
            self.tick("write_tensors")
            sha256 = save_tensors(path, tensors)
            whole = Path(path).read_bytes()
            os.truncate(path, len(whole) // 2)
            self.tick("half a tensor file")
            Path(path).write_bytes(whole)
            return sha256

        def write_in_halves(path, text, **kwargs):
            self.tick("write_text")
            write_text(path, text[: len(text) // 2], **kwargs)
            self.tick("half a text")
            return write_text(path, text, **kwargs)

        patch.setattr(checkpoints, "write_tensors", save_in_halves)
        patch.setitem(globals(), "write_tensors", save_in_halves)
        patch.setattr(Path, "write_text", write_in_halves)


def kill_at_every_call(action, folder, before, check):
    """For every k: `folder` as `before`, action() in a child killed at its k-th change of the disk, check(k).

    Returns what the calls were.
    """
    calls = []
    for kill_at in range(1, 500):
        shutil.rmtree(folder)
        shutil.copytree(before, folder)

        def work(kill_at=kill_at):
            with pytest.MonkeyPatch.context() as patch:
                Killer(kill_at).install(patch)
                action()

        status = in_fork(work)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
        check(kill_at)
    with pytest.MonkeyPatch.context() as patch:  # the same once more, to see what was counted
        shutil.rmtree(folder)
        shutil.copytree(before, folder)
        Killer(None, calls).install(patch)
        action()
    assert len(calls) == kill_at - 1
    return calls


@pytest.mark.parametrize(
    ("there", "step", "limit"),
    [([], 1, 1), ([1], 2, 1), ([1], 1, 1), ([1, 2], 2, 1), ([1, 2, 3], 4, 2), ([1, 2], 1, None)],
    ids=["first", "limit-1", "same-step", "same-step-and-delete", "limit-2", "same-step-not-the-last"],
)
def test_killed_at_every_write_of_a_save(there, step, limit, save, tmp_path):
    """After each kill only valid checkpoints are listed, one at least if there was one; the next save cleans."""
    before, folder = tmp_path / "before", tmp_path / "run"
    before.mkdir(), folder.mkdir()
    for old in there:
        save(old, folder=before)
    seen = set()

    def check(kill_at):
        listed = list_checkpoints(folder)
        assert all(verify_checkpoint(place) is None for _, place in listed)
        assert bool(listed) >= bool(there), "there is always a valid one"
        steps = [found for found, _ in listed]
        assert set(there) - {step} <= set(steps) or step in steps, "old ones go after the new one has its name"
        assert len(set(steps)) == len(steps)
        good, damaged = newest_good(folder)
        assert not damaged and good == (listed[-1][1] if listed else None), "a killed save is no damage"
        if steps:
            named = SimpleNamespace(resume_from_checkpoint=f"checkpoint-{steps[-1]}", output_dir=folder)
            assert named_folder(named) == good
            assert build()[1].load(good) == steps[-1]
            assert set_earlier_run_aside(folder, good) is None, "on a start with `latest`"
            assert good.is_dir(), "what other ranks load from keeps its name"
        seen.update(name.split("checkpoint")[0] for name in names(folder))
        save(step + 1, limit=1, folder=folder)
        assert names(folder) == [f"checkpoint-{step + 1}"] or (step < max(there, default=0) and limit is None)
        assert not [name for name in names(folder) if name.startswith(".")]

    calls = kill_at_every_call(lambda: save(step, limit, folder), folder, before, check)
    assert {"replace", "fsync", "mkdir", "write_tensors", "half a tensor file", "half a text"} <= set(calls)
    assert ("unlink" in calls) == (step in there or (limit is not None and bool(there)))
    if step in there:
        assert ".old-" in seen, "the window between the two renames was hit"


def test_killed_while_it_recovers(save, tmp_path):
    """The next save, or a fresh start, is itself killed at every call while it cleans up after a killed one."""
    before, folder = tmp_path / "before", tmp_path / "run"
    folder.mkdir()
    save(1, folder=before), save(2, folder=before)
    (before / "checkpoint-2").rename(before / ".old-checkpoint-2")
    shutil.copytree(before / "checkpoint-1", before / ".tmp-checkpoint-2")

    def check(kill_at):
        good, damaged = newest_good(folder)
        assert good is not None and not damaged
        assert {1, 2} <= {step for step, _ in list_checkpoints(folder)}

    kill_at_every_call(lambda: tidy(folder), folder, before, check)
    assert names(folder) == ["checkpoint-1", "checkpoint-2"]

    def check_kept(kill_at):
        places = [folder, *folder.glob("previous-*")]
        kept = [verify_checkpoint(place) for where in places for _, place in list_checkpoints(where)]
        assert kept == [None, None]

    kill_at_every_call(lambda: set_earlier_run_aside(folder, None), folder, before, check_kept)
    assert names(folder) == ["previous-1"] and names(folder / "previous-1") == ["checkpoint-1", "checkpoint-2"]

    (before / "my" / "logs").mkdir(parents=True)
    (before / "my" / "logs" / "metrics.jsonl").write_text("{}")
    for name in ("config.yaml", "image_0.png", "model_index.json"):
        (before / name).write_text(RECIPE_HEAD if name == "config.yaml" else name)
    mine = ["config.yaml", "image_0.png", "metrics.jsonl", "model_index.json"]

    def check_results(kill_at):
        set_earlier_run_aside(folder, None, "my/logs")
        kept = [path for path in folder.rglob("*") if path.name in mine]
        assert sorted(path.name for path in kept) == mine
        assert all(path.relative_to(folder).parts[0].startswith("previous-") for path in kept)

    assert kill_at_every_call(lambda: set_earlier_run_aside(folder, None, "my/logs"), folder, before, check_results)


def test_an_old_one_beside_a_damaged_new_one(save, tmp_path, capsys):
    """Killed before the old one of the same step was deleted, and the new one damaged since: the old one is used."""
    save(1), save(2)
    (tmp_path / "checkpoint-2").rename(tmp_path / ".old-checkpoint-2")
    save(1), shutil.copytree(tmp_path / "checkpoint-2", tmp_path / ".old-checkpoint-2")
    damage(tmp_path / "checkpoint-2", WEIGHTS, "flip")
    good = checkpoint_to_resume(arguments(tmp_path))
    assert good == tmp_path / ".old-checkpoint-2"
    assert "checkpoint-2 is damaged" in capsys.readouterr().out
    for start in (lambda: set_earlier_run_aside(tmp_path, good), lambda: tidy(tmp_path)):
        copy = shutil.copytree(tmp_path, tmp_path.with_name(tmp_path.name + "-copy"))
        start()
        assert verify_checkpoint(newest_good(tmp_path)[0]) is None
        assert "damaged-checkpoint-2" in names(tmp_path)
        save(3)
        assert names(tmp_path) == ["checkpoint-1", "checkpoint-2", "checkpoint-3", "damaged-checkpoint-2"]
        assert not newest_good(tmp_path)[1] and verify_checkpoint(tmp_path / "checkpoint-2") is None
        shutil.rmtree(tmp_path)
        copy.rename(tmp_path)


def test_killed_from_outside_at_random_moments(tmp_path):
    """A child saves without end, limit 1, each step twice; SIGKILL after 1 to 250 ms; the next one goes on."""
    model, state = build(width=400, ema=False, scaler=False, auto_weight=False)  # about 2 MB
    train(model, state, 0, 1)
    random_wait, step, windows = random.Random(), 1, set()
    save_checkpoint(tmp_path, 0, state, writer(model))

    def save_without_end():
        for number in range(step, step + 10_000):
            for _ in range(2):
                save_checkpoint(tmp_path, number, state, writer(model), 1)

    deadline, kills = time.monotonic() + 4, 0
    while kills < 10 or (kills < 20 and time.monotonic() < deadline):
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                save_without_end()
            os._exit(1)
        time.sleep(random_wait.uniform(0.001, 0.25))
        os.kill(child, signal.SIGKILL)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL, "it ended by itself"
        kills += 1
        listed = list_checkpoints(tmp_path)
        assert listed and all(verify_checkpoint(folder) is None for _, folder in listed)
        good, damaged = newest_good(tmp_path)
        assert good == listed[-1][1] and not damaged
        windows.update(name.split("checkpoint")[0] for name in names(tmp_path))
        step = listed[-1][0] + 1
    assert step > 2 and ".tmp-" in windows, "some saves were killed half-way"
    save_checkpoint(tmp_path, step, state, writer(model), 1)
    assert names(tmp_path) == [f"checkpoint-{step}"]
