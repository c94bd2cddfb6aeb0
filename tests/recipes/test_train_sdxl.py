"""The SDXL recipe end to end, on a tiny random pipeline: real files, real processes, real kills."""

import errno
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import GeneralTracker
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file

import train_sdxl_lpl
from lpl_finetuning import files
from lpl_finetuning.data import scan as scan_module
from lpl_finetuning.errors import UserError, errors_for_people
from lpl_finetuning.flags import data_source
from lpl_finetuning.results import export
from lpl_finetuning.training import checkpoints
from lpl_finetuning.training import run as run_module
from lpl_utils import LPLGate
from tests import children
from tests.children import start
from tests.runs import ROOT, forbid_loading, memory_of, objective_of, tensors_of
from tests.sdxl import command, draw, run, weights

GOLDEN = Path(__file__).parents[1] / "golden"


# ---------------------------------------------------------------------------------------------------------------------
# Golden curves


@pytest.mark.parametrize("name", ["full", "full-lpl", "lora-lpl"])
def test_golden_curve(name, flags, tmp_path, request):
    """20 steps give the losses they always gave: any change of the recipe shows here."""
    extra = {"full": [], "full-lpl": ["--use_lpl"], "lora-lpl": ["--use_lpl", "--use_lora", "--lora_alpha", 8]}[name]
    rows = run(*flags, *extra, "--max_train_steps", 20, "--output_dir", tmp_path)
    keys = ["train_loss", "diffusion_loss", "lpl/loss", "lpl/weight", "grad_norm"]
    curve = {key: [row[key] for row in rows if key in row] for key in keys}
    path = GOLDEN / f"sdxl-{name}.json"
    if request.config.getoption("--update-golden"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({key: [float(f"{v:.6g}") for v in values] for key, values in curve.items()}))
    golden = json.loads(path.read_text())
    assert golden.keys() == curve.keys()
    for key, values in golden.items():
        assert curve[key] == pytest.approx(values, rel=2e-3, abs=1e-6), key
    assert (len(golden["lpl/loss"]) == 20) == ("lpl" in name)


# ---------------------------------------------------------------------------------------------------------------------
# Results


def test_lora_loads_in_diffusers_and_changes_the_picture(flags, sdxl_folder, tmp_path):
    run(*flags, "--use_lpl", "--use_lora", "--rank", 4, "--lora_alpha", 16, "--learning_rate", 0.03,
        "--max_train_steps", 8, "--output_dir", tmp_path)  # fmt: skip
    before, _ = draw(sdxl_folder)
    after, pipeline = draw(sdxl_folder, lora=tmp_path)
    assert np.abs(after - before).max() > 8
    adapter = pipeline.unet.peft_config["default_0"]
    assert (adapter.r, adapter.lora_alpha) == (4, 16), "rank and alpha travel with the file"
    tensors = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    assert all(name.startswith("unet.") for name in tensors)
    assert {value.dtype for value in tensors.values()} == {torch.float32}


def test_full_training_saves_a_whole_pipeline(flags, sdxl_folder, tmp_path):
    run(*flags, "--use_lpl", "--max_train_steps", 4, "--output_dir", tmp_path,
        "--validation_prompt", "a red apple", "the sun", "--num_validation_images", 2,
        "--validation_steps", 2, pictures=True)  # fmt: skip
    before, _ = draw(sdxl_folder)
    after, _ = draw(tmp_path)
    assert np.abs(after - before).max() > 8
    base, trained = (
        load_file(folder / "vae" / "diffusion_pytorch_model.safetensors") for folder in (sdxl_folder, tmp_path)
    )
    assert all(torch.equal(base[name], trained[name]) for name in base), "the autoencoder is frozen"
    for name in ["run.png", "validation/step-0.png", "validation/step-2.png", "validation/step-4.png", "image_3.png"]:
        assert np.asarray(Image.open(tmp_path / name)).std() > 1, f"{name} is a picture"
    assert "hub_token" not in (tmp_path / "config.yaml").read_text()


def test_the_curves_are_drawn_as_the_run_goes(flags, tmp_path, monkeypatch):
    """Not at its end only: with the first validation there is something to look at."""
    there, step = [], train_sdxl_lpl.training_step
    monkeypatch.setattr(train_sdxl_lpl, "training_step",
                        lambda *args: (there.append((tmp_path / "run.png").is_file()), step(*args))[1])  # fmt: skip
    run(*flags, "--use_lora", "--max_train_steps", 5, "--validation_steps", 2, "--validation_split", 2,
        "--output_dir", tmp_path)  # fmt: skip
    assert there[2:] == [True] * 3


def test_validation_uses_the_same_seeds_and_the_real_pipeline(flags, sdxl_folder, tmp_path):
    """The grid's first picture before training is what the base pipeline draws with that seed."""
    run(*flags, "--max_train_steps", 1, "--output_dir", tmp_path, "--learning_rate", 0, "--num_validation_images", 1,
        "--validation_prompt", "a red apple", pictures=True)  # fmt: skip
    pipeline = StableDiffusionXLPipeline.from_pretrained(sdxl_folder)
    image = pipeline("a red apple", generator=torch.Generator().manual_seed(3), num_inference_steps=25, height=64,
                     width=64).images[0]  # fmt: skip
    drawn = np.asarray(Image.open(tmp_path / "image_0.png"), dtype=np.int64)
    assert np.abs(drawn - np.asarray(image, dtype=np.int64)).max() <= 1


# ---------------------------------------------------------------------------------------------------------------------
# Resuming


def start_and_kill(flags, output_dir, after):
    """Start a process, kill it without warning once more steps than `after` were logged: it was saved at that."""
    process = start(command(*flags, "--output_dir", output_dir), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    metrics = Path(output_dir, "logs", "metrics.jsonl")
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        if metrics.is_file() and metrics.read_text().count("\n") > after:
            process.send_signal(signal.SIGKILL)
        time.sleep(0.005)
    assert time.monotonic() < deadline, "the run never came so far"
    assert process.wait() == -signal.SIGKILL, "the run ended before it was killed: make it longer"


@pytest.mark.parametrize(
    "kind",
    [
        "--use_lora --lora_dropout 0.3 --use_ema --gradient_accumulation_steps 2",
        "--random_flip --dataloader_num_workers 2 --lpl_augment --lpl_features decoder classifier tiny_decoder",
    ],
    ids=["lora-ema-accumulation", "full-workers-networks"],
)
def test_a_killed_run_goes_on_bit_for_bit(kind, flags, feature_networks, tmp_path):
    """SIGKILL in mid-epoch, resume: the same weights as a run that was never killed, to the last bit."""
    if "classifier" in kind:
        kind += "".join(f" {flag} {folder}" for flag, folder in feature_networks.items())
    flags = [*flags, *kind.split(), "--use_lpl", "--max_train_steps", 12, "--checkpointing_steps", 4]
    flags += ["--checkpoints_total_limit", 2]
    run(*flags, "--output_dir", tmp_path / "whole")
    start_and_kill(flags, tmp_path / "killed", after=5)
    assert not (tmp_path / "killed" / "checkpoint-12").exists()
    run(*flags, "--output_dir", tmp_path / "killed", "--resume_from_checkpoint", "latest")
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")
    for name in ("training_state.safetensors",):
        states = [load_file(tmp_path / which / "checkpoint-12" / name) for which in ("whole", "killed")]
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0]), "optimizer, EMA, LPL's means"
    losses = [(tmp_path / which / "logs" / "metrics.jsonl").read_text().splitlines() for which in ("whole", "killed")]
    assert [json.loads(a)["train_loss"] for a in losses[0]] == [json.loads(b)["train_loss"] for b in losses[1]]


def test_eight_bit_adam_goes_on_bit_for_bit(flags, tmp_path):
    """Its state, nested and with shared maps, comes back from safetensors as it was."""
    flags = [*flags, "--use_8bit_adam", "--checkpointing_steps", 3, "--output_dir"]
    run(*flags, tmp_path / "whole", "--max_train_steps", 6)
    run(*flags, tmp_path / "resumed", "--max_train_steps", 3)
    run(*flags, tmp_path / "resumed", "--max_train_steps", 6, "--resume_from_checkpoint", "latest")
    assert weights(tmp_path / "resumed") == weights(tmp_path / "whole")


def test_checkpoints_are_limited_complete_and_free_of_pickle(flags, tmp_path):
    run(*flags, "--use_lora", "--max_train_steps", 7, "--checkpointing_steps", 2, "--checkpoints_total_limit", 2,
        "--output_dir", tmp_path)  # fmt: skip
    assert sorted(path.name for path in tmp_path.glob("*checkpoint*")) == ["checkpoint-4", "checkpoint-6"]
    names = {path.name for path in (tmp_path / "checkpoint-6").iterdir()}
    assert names == {
        "pytorch_lora_weights.safetensors", "training_state.safetensors", "training_state.json", "manifest.json",
    }  # fmt: skip


def test_resume_by_path_and_refusal_of_another_run(flags, tmp_path):
    flags = [*flags, "--use_lora", "--output_dir", tmp_path]
    run(*flags, "--max_train_steps", 4, "--checkpointing_steps", 2)
    rows = run(*flags, "--max_train_steps", 6, "--resume_from_checkpoint", tmp_path / "checkpoint-2")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    with pytest.raises(UserError, match="seed was 3, is 4"):
        run(*flags, "--seed", 4, "--max_train_steps", 6, "--resume_from_checkpoint", "latest")
    with pytest.raises(UserError, match="no checkpoint there"):
        run(*flags, "--max_train_steps", 6, "--resume_from_checkpoint", "checkpoint-99")


def test_a_resumed_run_takes_the_flags_of_today(flags, tmp_path, capsys):
    """Learning rate and weight decay may change at a resume, which is said; what did not change stays bit-exact."""
    flags = [*flags, "--checkpointing_steps", 2, "--output_dir", tmp_path, "--lr_scheduler", "cosine"]
    run(*flags, "--max_train_steps", 2)
    rows = run(*flags, "--max_train_steps", 4, "--resume_from_checkpoint", "latest", "--learning_rate", 5e-5,
               "--adam_weight_decay", 0.3)  # fmt: skip
    said = capsys.readouterr().out
    assert "initial_lr was 0.001 in the checkpoint, is 5e-05 from now on" in said and "weight_decay was 0.01" in said
    assert rows[2]["lr"] == pytest.approx(5e-5 * 0.5 * (1 + math.cos(math.pi * 3 / 4)))


def test_a_fresh_run_keeps_the_results_of_an_earlier_one_apart(flags, tmp_path):
    """Its checkpoints are neither pruned by nor mistaken for the new run's; nor are those after a resumed step."""
    flags = [
        *flags,
        "--use_lora",
        "--checkpointing_steps",
        2,
        "--checkpoints_total_limit",
        2,
        "--output_dir",
        tmp_path,
    ]
    run(*flags, "--max_train_steps", 8)
    first, left = weights(tmp_path), {path.name for path in tmp_path.iterdir()} - {".lock"}
    run(*flags, "--seed", 8, "--max_train_steps", 4)
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
    kept = tmp_path / "previous-1"
    assert {path.name for path in kept.glob("checkpoint-*")} == {"checkpoint-6", "checkpoint-8"}
    assert weights(kept) == first != weights(tmp_path)
    assert {path.name for path in kept.iterdir()} == left >= {"config.yaml", "data_report.json", "logs", "run.png"}
    assert "seed: 3" in (kept / "config.yaml").read_text() and "seed: 8" in (tmp_path / "config.yaml").read_text()
    assert [len((folder / "logs" / "metrics.jsonl").read_text().splitlines()) for folder in (kept, tmp_path)] == [8, 4]
    run(*flags, "--seed", 8, "--max_train_steps", 3, "--resume_from_checkpoint", "checkpoint-2")
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-2"}
    assert (tmp_path / "previous-2" / "checkpoint-4").is_dir()


def test_an_earlier_step_is_made_a_result(flags, tmp_path):
    """--resume_from_checkpoint checkpoint-N --max_train_steps N: averaged weights and all files, as of a run of N."""
    flags = [
        *flags,
        "--use_lora",
        "--use_ema",
        "--ema_decay",
        0.5,
        "--output_kohya_format",
        "--checkpointing_steps",
        2,
    ]
    run(*flags, "--max_train_steps", 2, "--output_dir", tmp_path / "short")
    run(*flags, "--max_train_steps", 4, "--output_dir", tmp_path / "long")
    assert weights(tmp_path / "long") != weights(tmp_path / "short") != weights(tmp_path / "long" / "checkpoint-2")
    run(*flags, "--max_train_steps", 2, "--resume_from_checkpoint", "checkpoint-2", "--output_dir", tmp_path / "long")
    assert weights(tmp_path / "long") == weights(tmp_path / "short")
    kohya = "pytorch_lora_weights_kohya.safetensors"
    assert tensors_of(tmp_path / "long" / kohya) == tensors_of(tmp_path / "short" / kohya)
    assert (tmp_path / "long" / "previous-1" / "checkpoint-4").is_dir()


def test_the_result_does_not_fit_on_the_disk(flags, tmp_path, monkeypatch):
    """Its steps are saved, and the same command with `latest` writes it."""
    flags = [*flags, *["--use_lora", "--output_kohya_format", "--max_train_steps", "3", "--checkpointing_steps", "2"]]

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"the result can't be .*its steps are saved"):
        patch.setattr(export, "save_kohya", full)
        run(*flags, "--output_dir", tmp_path)
    assert (tmp_path / "checkpoint-3").is_dir()
    run(*flags, "--output_dir", tmp_path, "--resume_from_checkpoint", "latest")
    assert (tmp_path / "pytorch_lora_weights_kohya.safetensors").is_file()
    with monkeypatch.context() as patch, pytest.raises(UserError, match="nor a checkpoint: disk full while saving"):
        patch.setattr(export, "save_kohya", full)
        patch.setattr(checkpoints, "write_manifest", full)
        run(*flags, "--output_dir", tmp_path, "--seed", 8, "--checkpointing_steps", 9)


def test_the_result_of_two_ranks_does_not_fit_on_the_disk(flags, tmp_path):
    """The first one alone saves what the result would have been; the other waits for nothing."""
    flags = [*map(str, flags), "--use_lora", "--max_train_steps", "2", "--output_dir", str(tmp_path)]
    words = children.torchrun(2, "tests/full_disk.py", "train_sdxl_lpl", *flags)
    result = children.run(words, cwd=ROOT, text=True, timeout=200)
    assert result.returncode != 0 and "its steps are saved" in result.stderr, result.stderr[-3000:]
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    run(*flags, "--resume_from_checkpoint", "latest")
    assert weights(tmp_path)


class TrackerOnFullDisk(GeneralTracker):
    """A tracker whose every write finds no space."""

    name, requires_logging_directory, tracker = "full", False, None

    def store_init_configuration(self, values):
        pass

    def log(self, values, step=None, **more):
        Path("/dev/full").write_text(str(values))

    def finish(self):
        Path("/dev/full").write_text("end")


def test_a_log_that_can_not_be_written_ends_no_run(flags, tmp_path, capsys, monkeypatch):
    """Neither the run's own log, a tracker's nor a picture; each is told of once."""
    monkeypatch.setattr(files, "WARNED", set())
    (tmp_path / "logs").mkdir()
    for name in ("logs/metrics.jsonl", "run.png", "image_0.png"):
        (tmp_path / name).symlink_to("/dev/full")
    (tmp_path / "validation").write_text("a file in the place of a folder")
    flags = [*map(str, flags), "--use_lora", "--max_train_steps", "2", "--output_dir", str(tmp_path)]
    flags += ["--validation_prompt", "apple", "--num_validation_images", "1", "--validation_steps", "1"]
    args = train_sdxl_lpl.parse_args(flags)
    tracked = {"log_with": TrackerOnFullDisk()}
    monkeypatch.setattr(run_module, "Accelerator", lambda **settings: Accelerator(**settings | tracked))
    train_sdxl_lpl.main(args, *scan_module.find_images(data_source(args)))
    said = capsys.readouterr().err
    assert weights(tmp_path)
    for what in ("the log", "the trackers' log", "run.png", "validation images", "the validation grid"):
        assert said.count(f"warning: {what} can't be written ([Errno ") == 1, what


def test_two_runs_do_not_write_into_one_folder(flags, tmp_path):
    """The second is refused while the first lives, and nothing of it is moved."""
    flags = [*flags, "--use_lora", "--output_dir", tmp_path]
    first = start(command(*flags, "--max_train_steps", 3000), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log = tmp_path / "logs" / "metrics.jsonl"
    while not (log.is_file() and log.stat().st_size):
        assert first.poll() is None
        time.sleep(0.05)
    refused = rf"another run is writing there \(process {first.pid} on .*\): wait"
    with pytest.raises(UserError, match=refused):
        run(*flags, "--max_train_steps", 1)
    assert first.poll() is None and not list(tmp_path.glob("previous-*"))
    first.kill()
    first.wait()
    run(*flags, "--max_train_steps", 1)
    assert (tmp_path / "previous-1").is_dir()


def test_a_resumed_run_says_what_has_changed(flags, pictures, tmp_path, capsys):
    """Flags and the number of pictures; nothing where nothing has, or where the earlier flags can't be read."""
    flags = [*flags, "--use_lora", "--checkpointing_steps", 1, "--output_dir", tmp_path / "out"]
    run(*flags, "--max_train_steps", 1, "--hub_token", "hf_first")
    more = shutil.copytree(pictures, tmp_path / "more")
    shutil.copy(next(more.glob("*.png")), more / "another.png")
    (more / "another.txt").write_text("one more")
    resumed = [*flags, "--resume_from_checkpoint", "latest", "--hub_token", "hf_second"]
    capsys.readouterr()
    run(*resumed, "--max_train_steps", 1)
    assert "since then" not in capsys.readouterr().out
    run(*resumed, "--max_train_steps", 2, "--train_data_dir", more, "--train_batch_size", 2, "--use_lpl")
    [line] = [line for line in capsys.readouterr().out.splitlines() if "since then changed" in line]
    told = dict(part.split(" was ") for part in line.split(": ", 1)[1].split("; "))
    assert told == {"train_data_dir": f"{pictures}, is {more}", "train_batch_size": "4, is 2", "images": "6, is 7",
                    "use_lpl": "False, is True", "max_train_steps": "1, is 2"}  # fmt: skip
    (tmp_path / "out" / "config.yaml").write_text("[")
    run(*resumed, "--max_train_steps", 3)
    assert "since then" not in capsys.readouterr().out


def test_a_lora_goes_on_with_its_own_base_model_only(flags, sdxl_folder, tmp_path):
    """The same weights in another folder are the same model; others are not, whatever the folder is called."""
    flags = [*flags, "--use_lora", "--checkpointing_steps", 1, "--output_dir", tmp_path / "out"]
    run(*flags, "--max_train_steps", 1)
    moved = shutil.copytree(sdxl_folder, tmp_path / "moved")
    resume = ["--resume_from_checkpoint", "latest", "--pretrained_model_name_or_path", moved]
    run(*flags, "--max_train_steps", 2, *resume)
    file = moved / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: value * 1.5 for name, value in load_file(file).items()}, file)
    with pytest.raises(UserError, match=r"is of another run \(base_weights was sha256:.*, is sha256:"):
        run(*flags, "--max_train_steps", 3, *resume)


def test_a_whole_model_of_an_earlier_run_is_kept_too(flags, tmp_path):
    flags = [*flags, "--output_dir", tmp_path, "--logging_dir", "my/logs"]
    run(*flags, "--max_train_steps", 1)
    before = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("[!.]*") if path.is_file()}
    run(*flags, "--max_train_steps", 1, "--seed", 8)
    kept = tmp_path / "previous-1"
    assert before == {path.relative_to(kept): path.read_bytes() for path in kept.rglob("*") if path.is_file()}
    assert len(before) > 15 and weights(kept) != weights(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# Caches


def test_a_second_run_encodes_nothing(flags, tmp_path, monkeypatch, capsys):
    """Another learning rate, another output folder: neither the encoder nor the text encoders are loaded."""
    flags = [*flags, "--max_train_steps", 1, "--cache_dir", tmp_path / "cache"]
    first = run(*flags, "--output_dir", tmp_path / "a")
    out = capsys.readouterr().out
    assert "to be encoded are 6 captions" in out and " 6 images" in out, "five captions and the empty one"

    forbid_loading(monkeypatch, train_sdxl_lpl, ["load_text_encoders", "load_vae"])
    second = run(*flags, "--output_dir", tmp_path / "b", "--adam_weight_decay", 0.5)
    assert "to be encoded are 0 captions (0.0 MB) and 0 images (0.0 MB)" in capsys.readouterr().out
    assert second[0]["train_loss"] == first[0]["train_loss"]
    for more in (["--resolution", 32], ["--image_interpolation_mode", "nearest"]):  # another encoding each
        with pytest.raises(AssertionError, match="load_vae was called"):
            run(*flags, "--output_dir", tmp_path / "c", *more)


def test_cached_latents_are_the_images(flags, sdxl_folder, pictures, tmp_path):
    """What training sees through the caches is what the pipeline's own encoders give for that image and caption."""
    args = train_sdxl_lpl.parse_args([*flags, "--output_dir", str(tmp_path), "--cache_dir", str(tmp_path / "cache")])
    AcceleratorState._reset_state(True)
    accelerator = run_module.start_accelerator(args)
    scan, _ = scan_module.find_images(data_source(args))
    data = train_sdxl_lpl.fill_caches(args, scan.images, [], torch.float32, accelerator)
    assert data.cached
    loader = run_module.batches(args, data, accelerator, 0, 3)
    pipeline = StableDiffusionXLPipeline.from_pretrained(sdxl_folder)
    seen = set()
    for batch in loader:
        for row, index in enumerate(batch["index"]):
            image = scan.images[index]
            seen.add(image.name)
            pixels = (
                torch.from_numpy(np.asarray(Image.open(image.file).convert("RGB"))).permute(2, 0, 1)[None] / 127.5 - 1
            )
            with torch.no_grad():
                posterior = pipeline.vae.encode(pixels).latent_dist
                embeds, _, pooled, _ = pipeline.encode_prompt(image.caption)
            assert torch.allclose(batch["mean"][row], posterior.mean[0], atol=1e-5)
            assert torch.allclose(batch["std"][row], posterior.std[0], atol=1e-5)
            assert torch.allclose(batch["prompt_embeds"][row], embeds[0], atol=1e-5)
            assert torch.allclose(batch["pooled_prompt_embeds"][row], pooled[0], atol=1e-5)
            assert batch["time_ids"][row].tolist() == [64, 64, 0, 0, 64, 64]
    assert len(seen) == 6


def test_random_crops_are_encoded_in_every_step(flags, sdxl_folder, cache_dir, tmp_path):
    from tests.tiny_models import picture_folder

    wide = picture_folder(tmp_path / "wide", count=4, size=64)
    for path in wide.glob("*.png"):
        Image.open(path).resize((96, 64)).save(path)
    rows = run(*flags, "--train_data_dir", wide, "--use_lpl", "--max_train_steps", 2, "--output_dir", tmp_path / "out")
    assert len(rows) == 2 and math.isfinite(rows[1]["train_loss"])


# ---------------------------------------------------------------------------------------------------------------------
# The method


@pytest.fixture
def schedule(flags):
    return lambda *more: train_sdxl_lpl.Schedule(train_sdxl_lpl.parse_args([*flags, *map(str, more)]))


def test_timesteps_follow_their_distribution(schedule):
    for more in (
        [],
        ["--timestep_bias_strategy", "earlier", "--timestep_bias_multiplier", 3],
        ["--timestep_bias_strategy", "range", "--timestep_bias_multiplier", 0.5, "--timestep_bias_begin", 100,
         "--timestep_bias_end", 300],
    ):  # fmt: skip
        law = schedule(*more)
        drawn = law.draw_timesteps(np.random.default_rng(0).random(20000))
        empirical = torch.bincount(drawn, minlength=1000).cumsum(0) / 20000
        assert (empirical - law.probabilities.cumsum(0)).abs().max() < 0.012, "Kolmogorov-Smirnov, 20,000 draws"
    assert schedule().gated_share(LPLGate(t_threshold=200)) == pytest.approx(0.2)
    assert schedule(*more).gated_share(LPLGate(t_threshold=200)) == pytest.approx(150 / 900)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_min_snr_weights_agree_on_the_z0_loss(schedule, prediction_type):
    """Each weight times (d z_0 / d output)^2 is min(SNR, gamma), whatever is predicted; finite at SNR 0."""
    law = schedule("--prediction_type", prediction_type, "--snr_gamma", 5)
    timesteps = torch.arange(1000)
    alpha, sigma = (level.double() for level in law.levels(timesteps))
    snr = (alpha / sigma) ** 2
    jacobian = {"epsilon": sigma / alpha, "v_prediction": sigma, "sample": torch.ones(1000)}[prediction_type]
    implied = law.loss_weights(timesteps).double() / jacobian**2
    assert torch.allclose(implied, snr.clamp_max(5), rtol=1e-4)
    law.alphas[-1], law.sigmas[-1] = 0.0, 1.0
    assert torch.isfinite(law.loss_weights(timesteps)).all()


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_zero_terminal_snr_does_not_divide_by_zero(prediction_type, flags, tmp_path):
    from tests.tiny_models import sdxl_pipeline

    folder = tmp_path / "model"
    sdxl_pipeline(prediction_type=prediction_type, rescale_betas_zero_snr=True).save_pretrained(folder)
    rows = run(*flags, "--pretrained_model_name_or_path", folder, "--use_lpl", "--snr_gamma", 5,
               "--max_train_steps", 3, "--lpl_t_threshold", 1000, "--lpl_scale", "--noise_offset", 0.1,
               "--timestep_bias_strategy", "range", "--timestep_bias_begin", 999, "--timestep_bias_multiplier", 1e6,
               "--output_dir", tmp_path / "out")  # fmt: skip
    assert all(math.isfinite(row[key]) for row in rows for key in ("train_loss", "lpl/loss", "grad_norm"))


def test_lpl_does_not_depend_on_accumulation(flags, tmp_path):
    """A batch of 4 equals two of 2 accumulated: the gated terms are divided by the batch, not by their number."""
    fixed = [*flags, "--use_lpl", "--lpl_t_threshold", 500, "--max_train_steps", 3]
    whole = run(*fixed, "--output_dir", tmp_path / "a")
    halves = run(*fixed, "--train_batch_size", 2, "--gradient_accumulation_steps", 2, "--output_dir", tmp_path / "b")
    for a, b in zip(whole, halves, strict=True):
        for key in ("train_loss", "lpl/loss", "lpl/weight", "grad_norm"):
            assert a[key] == pytest.approx(b[key], rel=1e-4), key
    assert whole[2]["lpl/weight"] > 0


def test_lpl_start_and_auto_weight(flags, tmp_path):
    """Nothing before --lpl_start; the weight is 0 until something was gated and then brings the share asked for."""
    rows = run(*flags, "--use_lpl", "--lpl_start", 3, "--lpl_t_threshold", 600, "--max_train_steps", 30,
               "--output_dir", tmp_path)  # fmt: skip
    assert ["lpl/loss" in row for row in rows[:4]] == [False, False, False, True]
    assert rows[3]["lpl/weight"] == 0 and rows[4]["lpl/weight"] > 0
    shares = [row["lpl/share"] for row in rows[5:]]
    assert 0.1 < sum(shares) / len(shares) < 0.3


def test_lpl_options_reach_the_loss(flags, tmp_path):
    """Each option changes the loss of the first step, so none is accepted and ignored."""
    seen = {}
    for name, more in {
        "plain": [], "l1": ["--lpl_loss_type", "l1"], "shared": ["--lpl_norm_type", "shared"],
        "default": ["--lpl_norm_type", "default"], "batch": ["--lpl_norm_type", "batch"],
        "no pow law": ["--no-lpl_pow_law"], "blocks": ["--lpl_num_blocks", 2], "scale": ["--lpl_scale"],
        "sigma": ["--lpl_sigma_threshold", 0.2], "target": ["--lpl_norm_type", "target"],
        "none": ["--lpl_norm_type", "none"], "latent": ["--lpl_features", "latent"], "rgb": ["--lpl_features", "rgb"],
    }.items():  # fmt: skip
        threshold = [] if name == "sigma" else ["--lpl_t_threshold", 500]
        rows = run(*flags, "--use_lpl", *threshold, *more, "--max_train_steps", 1, "--output_dir", tmp_path / name,
                   result=False)  # fmt: skip
        seen[name] = rows[0]["lpl/loss"]
    assert len({f"{value:.5g}" for value in seen.values()}) == len(seen), seen
    same = {}
    for name, more in {
        "a": [], "chunks": ["--lpl_batch_size", 1], "stage": ["--lpl_checkpointing", "stage"],
        "none": ["--lpl_norm_gradient", "none"], "half": ["--lpl_norm_gradient", "half"],
    }.items():  # fmt: skip
        rows = run(*flags, "--use_lpl", "--lpl_t_threshold", 500, *more, "--lpl_weight", 1, "--max_train_steps", 1,
                   "--output_dir", tmp_path / name, result=False)  # fmt: skip
        same[name] = rows[0]["grad_norm"]
    assert same["chunks"] == pytest.approx(same["a"], rel=1e-5) and same["stage"] == pytest.approx(same["a"], rel=1e-5)
    assert len({f"{same[name]:.5g}" for name in ("a", "half", "none")}) == 3, same  # equal values, other gradients


def test_training_options_reach_the_run(flags, tmp_path):
    """Each option changes what is trained within three steps, so none is accepted and ignored."""
    options = {
        "plain": [], "noise offset": ["--noise_offset", 0.5], "min-SNR": ["--snr_gamma", 1],
        "dropout": ["--proportion_empty_prompts", 1], "clipping": ["--max_grad_norm", 1e-4],
        "8-bit": ["--use_8bit_adam"], "scaled": ["--scale_lr"], "v": ["--prediction_type", "v_prediction"],
        "sample": ["--prediction_type", "sample"], "seed": ["--seed", 4], "flip": ["--random_flip"],
        "bias": ["--timestep_bias_strategy", "later", "--timestep_bias_multiplier", 9], "betas": ["--adam_beta1", 0.1],
        "decay": ["--adam_weight_decay", 50], "epsilon": ["--adam_epsilon", 1], "few": ["--max_train_samples", 2],
    }  # fmt: skip
    seen = {}
    for name, more in options.items():
        rows = run(*flags, *more, "--max_train_steps", 3, "--output_dir", tmp_path / name, result=False)
        seen[name] = f"{rows[2]['train_loss']:.7g}"
    assert len(set(seen.values())) == len(seen), seen


def test_a_dropped_caption_is_what_the_pipeline_calls_unconditional(flags, tmp_path):
    args = train_sdxl_lpl.parse_args([*flags, "--proportion_empty_prompts", "0.3", "--output_dir", str(tmp_path)])
    empty = {"prompt_embeds": torch.full((7, 4), -1.0), "pooled_prompt_embeds": torch.full((3,), -2.0)}
    recipe = objective_of(args, empty_prompt=empty, empty_is_zero=True)
    count = 2000
    batch = {"number": np.arange(count), "prompt_embeds": torch.ones(count, 7, 4), "time_ids": torch.zeros(count, 6)}
    batch["pooled_prompt_embeds"] = torch.ones(count, 3)
    prompt, _ = train_sdxl_lpl.conditioning(batch, recipe, dropout=0.3)
    embeds = prompt["prompt_embeds"]
    dropped = (embeds == -1).all(dim=(1, 2))
    assert torch.equal(dropped, (prompt["pooled_prompt_embeds"] == -2).all(dim=1)), "both of a sample, or neither"
    assert (embeds[~dropped] == 1).all() and dropped.float().mean().item() == pytest.approx(0.3, abs=0.04)


def test_the_learning_rate_follows_optimizer_steps(flags, tmp_path):
    """One step of the schedule for each optimizer step, whatever the accumulation."""
    rows = run(*flags, "--lr_scheduler", "constant_with_warmup", "--lr_warmup_steps", 4, "--max_train_steps", 6,
               "--gradient_accumulation_steps", 3, "--output_dir", tmp_path)  # fmt: skip
    assert [row["lr"] for row in rows] == pytest.approx([0.00025, 0.0005, 0.00075, 0.001, 0.001, 0.001])


def test_with_ema_the_average_is_saved(flags, tmp_path):
    """The result holds EMA's weights, the checkpoint the raw ones, and the average is what EMA's formula gives."""
    flags = [*flags, "--use_lora", "--use_ema", "--learning_rate", 0.01, "--max_train_steps", 3]
    run(*flags, "--checkpointing_steps", 1, "--output_dir", tmp_path)
    name = "pytorch_lora_weights.safetensors"
    raw = [load_file(tmp_path / f"checkpoint-{step}" / name) for step in (1, 2, 3)]
    average = raw[0]  # diffusers' EMA: the first step copies, then decay (1 + n) / (10 + n)
    for step, weights_ in enumerate(raw[1:], start=1):
        decay = (1 + step) / (10 + step)
        average = {key: decay * average[key] + (1 - decay) * weights_[key] for key in average}
    saved = load_file(tmp_path / name)
    for key in saved:
        assert torch.allclose(saved[key], average[key], atol=1e-6), key
    assert any(not torch.allclose(saved[key], raw[2][key], atol=1e-5) for key in saved)


def test_gradient_checkpointing_keeps_less(flags, tmp_path):
    """The flag reaches the UNet, LPL's decoder and the estimate of the memory."""
    kept = {}
    for more in ([], ["--gradient_checkpointing"]):
        args = train_sdxl_lpl.parse_args([*flags, "--use_lpl", *more, "--output_dir", str(tmp_path)])
        denoiser = train_sdxl_lpl.build_denoiser(args, torch.float32, "cpu")
        assert denoiser.unet.is_gradient_checkpointing == bool(more)
        peaks = memory_of(train_sdxl_lpl, args, torch.float32)
        kept[bool(more)] = {phase: peaks[phase].kinds["everything else"] for phase in ("forward", "LPL")}
    assert kept[True]["forward"] < 0.8 * kept[False]["forward"]
    assert kept[True]["LPL"] < 0.9 * kept[False]["LPL"]


def test_latent_features_load_no_decoder(flags, tmp_path, monkeypatch):
    """Once the images are encoded, the autoencoder is on the meta device only, and the plan counts no decoder."""
    flags = [*flags, "--use_lpl", "--lpl_features", "latent", "--lpl_t_threshold", 500, "--max_train_steps", 1]
    run(*flags, "--output_dir", tmp_path / "first", result=False)
    load, devices = train_sdxl_lpl.load_vae, []
    monkeypatch.setattr(train_sdxl_lpl, "load_vae", lambda *args: devices.append(str(args[2])) or load(*args))
    rows = run(*flags, "--output_dir", tmp_path / "second", result=False)
    assert set(devices) <= {"meta"} and rows[0]["lpl/loss"] > 0
    args = train_sdxl_lpl.parse_args([*map(str, flags), "--output_dir", str(tmp_path)])
    assert "autoencoder" not in memory_of(train_sdxl_lpl, args, torch.float32)["LPL"].kinds


def test_the_step_reads_nothing_from_the_device(flags, tmp_path, monkeypatch):
    """No `.item()`, `.tolist()`, `bool()`, ... of a computed tensor inside a training step.

    What the host has drawn itself, it may read: which captions are dropped, and which samples get the loss.
    """
    reads, allowed = [], []
    hosts = {("__bool__", "choose_prompts"), ("nonzero", "perceptual_terms"), ("numpy", "perceptual_terms")}
    for name in ("item", "tolist", "numpy", "cpu", "nonzero", "__array__", "__bool__", "__float__", "__int__",
                 "__index__"):  # fmt: skip
        original = getattr(torch.Tensor, name)

        def spy(self, *args, _original=original, _name=name, **kwargs):
            names = callers()
            if "training_step" in names:
                of_the_host = (_name, names[0]) in hosts and not self.is_floating_point()
                (allowed if of_the_host else reads).append((_name, names[:6]))
            return _original(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, spy)
    rows = run(*flags, "--use_lpl", "--lpl_t_threshold", 900, "--max_train_steps", 4, "--logging_steps", 4,
               "--output_dir", tmp_path)  # fmt: skip
    assert [row["step"] for row in rows] == [4] and not reads
    assert {(name, names[0]) for name, names in allowed} == hosts, "the spies see what is read"


def callers():
    """Names of the functions that are running, the nearest first, without the one that asks."""
    frame, names = sys._getframe(2), []
    while frame:
        names.append(frame.f_code.co_name)
        frame = frame.f_back
    return names


def test_bf16_and_checkpointing_train(flags, tmp_path, monkeypatch):
    """Near to float32. No low-precision copies of the weights are kept through a pass."""
    kept, forward = set(), UNet2DConditionModel.forward

    def spied(*args, **kwargs):
        if torch.is_autocast_enabled("cpu"):
            kept.add((torch.is_grad_enabled(), torch.is_autocast_cache_enabled()))
        return forward(*args, **kwargs)

    monkeypatch.setattr(UNet2DConditionModel, "forward", spied)
    flags = [*flags, "--use_lpl", "--lpl_t_threshold", 600, "--max_train_steps", 2]
    exact = run(*flags, "--output_dir", tmp_path / "a")
    drawn = ["--validation_prompt", "x", "--num_validation_images", 1]
    for name, more in {
        "bf16": ["--mixed_precision", "bf16", *drawn],
        "lora": ["--mixed_precision", "bf16", "--use_lora"],
        "checkpointing": ["--gradient_checkpointing"],
    }.items():
        rows = run(*flags, *more, "--output_dir", tmp_path / name)
        assert rows[0]["diffusion_loss"] == pytest.approx(exact[0]["diffusion_loss"], rel=0.02), name
        assert rows[0]["lpl/loss"] == pytest.approx(exact[0]["lpl/loss"], rel=0.1), name
    assert kept == {(True, False), (False, False)}, "in steps and in sampling"


def test_two_ranks_equal_one_with_twice_the_accumulation(flags, tmp_path):
    """Under torchrun with two processes on the CPU: the same samples, noise and objective; the same weights."""
    flags = [*flags, "--use_lpl", "--lpl_t_threshold", 600, "--max_train_steps", 4, "--train_batch_size", 2]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    children.run(
        children.torchrun(2, *command(*flags, "--output_dir", tmp_path / "two")[1:]),
        check=True, env=environment, capture_output=True, timeout=300,
    )  # fmt: skip
    children.run(
        command(*flags, "--gradient_accumulation_steps", 2, "--output_dir", tmp_path / "one"),
        check=True, env=environment, capture_output=True, timeout=300,
    )  # fmt: skip
    one, two = (load_file(tmp_path / name / "unet" / "diffusion_pytorch_model.safetensors") for name in ("one", "two"))
    for key in one:
        assert torch.allclose(one[key], two[key], atol=1e-6), key
    rows = [[json.loads(line) for line in (tmp_path / name / "logs/metrics.jsonl").read_text().splitlines()]
            for name in ("one", "two")]  # fmt: skip
    for a, b in zip(*rows, strict=True):
        assert a["lpl/loss"] == pytest.approx(b["lpl/loss"], rel=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def wrong_models(sdxl_folder, tmp_path):
    """Base models that are not SDXL."""
    sd15, gutted, single = tmp_path / "sd15", tmp_path / "gutted", tmp_path / "model.safetensors"
    for folder in (sd15, gutted):
        shutil.copytree(sdxl_folder, folder)
    edit_json(sd15 / "model_index.json", _class_name="StableDiffusionPipeline")
    shutil.rmtree(gutted / "text_encoder_2")
    single.write_bytes(b"")
    return {"sd15": sd15, "gutted": gutted, "single": single, "empty": tmp_path}


MISTAKES = [
    ("--lpl_wieght 1", "--lpl_weight"),
    ("--resolution 100", "--resolution is 100; it must be a multiple of 8"),
    ("--lpl_t_threshold 100 --lpl_sigma_threshold 3", "exclude each other"),
    ("--lpl_share 1.5", "--lpl_share"),
    ("--lpl_weight -1", "--lpl_weight"),
    ("--lpl_num_blocks 7 --use_lpl", "--lpl_num_blocks is 7; this decoder has 4"),
    (
        "--use_lpl --lpl_features latent --lpl_num_blocks 2",
        "with --lpl_features classifier or latent alone",
    ),
    ("--lpl_norm_gradient full --lpl_norm_type shared", "--lpl_norm_gradient full is for --lpl_norm_type standard"),
    ("--lpl_threshold_resolution 256", "--lpl_sigma_threshold"),
    ("--rank 0 --use_lora", "--rank"),
    ("--lora_alpha 3", "without --use_lora"),
    ("--lora_layers no_such_layer --use_lora", "has no layer called no_such_layer"),
    ("--train_batch_size 0", "--train_batch_size"),
    ("--snr_gamma 0", "--snr_gamma"),
    (
        "--timestep_bias_strategy range --timestep_bias_begin 500 --timestep_bias_end 100",
        "must satisfy 0 <= begin < end",
    ),
    ("--dataset_name someone/something", "exclude each other"),
    ("--train_data_dir /no/such/folder", "/no/such/folder"),
    ("--train_data_dir {empty}", "no images"),
    ("--train_data_dir {uncaptioned}", "1 of 1 images in"),
    ("--train_data_dir {listed} --caption_column prompt", "prompt"),
    ("--pretrained_model_name_or_path {sd15}", "StableDiffusionPipeline"),
    ("--pretrained_model_name_or_path {gutted}", "text_encoder_2"),
    ("--pretrained_model_name_or_path {single}", "is empty (0 bytes)"),
    ("--pretrained_model_name_or_path {empty}", "model_index.json"),
    ("--pretrained_model_name_or_path ./nowhere", "./nowhere"),
    ("--config {recipe}", "learning_rat"),
    ("--lpl_vae_dtype float16 --use_lpl", "--lpl_vae_dtype float16"),
    ("--resume_from_checkpoint nowhere", "--resume_from_checkpoint nowhere"),
    ("--lr_scheduler cosinus", "--lr_scheduler"),
    ("--report_to paper", "--report_to"),
    ("--report_to comet_ml", "--report_to comet_ml: comet_ml is not installed"),
    ("--enable_xformers_memory_efficient_attention", "requirements-xformers.txt"),
    ("--validation_split 2 --validation_data_dir {empty}", "exclude each other"),
    ("--validation_split 0", "--validation_split"),
    ("--validation_split 6", "--validation_split 6 of 6 images leaves 0"),
    ("--validation_data_dir /no/such/folder", "/no/such/folder"),
    ("--validation_compare", "--validation_compare needs a --validation_prompt"),
    ("--use_dora", "--use_dora does nothing without --use_lora"),
    ("--train_text_encoder", "--train_text_encoder does nothing without --use_lora"),
    ("--use_lora --text_encoder_lr 1e-5", "--text_encoder_lr does nothing without --train_text_encoder"),
    ("--use_lora --init_lora ./nowhere", "./nowhere"),
    ("--use_lora --init_lora x/y --rank 4", "--init_lora brings its own --rank"),
    ("--optimizer prodigy --use_8bit_adam", "exclude each other"),
    ("--optimizer sgd", "--optimizer"),
    ("--offload_ema", "--offload_ema does nothing without --use_ema"),
    ("--single_file --use_lora", "--single_file"),
    ("--single_file --prediction_type sample", "--single_file"),
    ("--pretrained_unet_model_name_or_path ./nowhere", "./nowhere: there is no such folder"),
    ("--pretrained_unet_model_name_or_path {empty}", "no config.json nor unet/config.json"),
    ("--pretrained_vae_model_name_or_path {sd15}/unet", "found UNet2DConditionModel, expected AutoencoderKL"),
    ("--push_to_hub", "no token for the Hub"),
    ("--mixed_precision fp16", "--mixed_precision fp16 needs a GPU"),
    ("--lpl_weight 3", "--lpl_weight does nothing without --use_lpl"),
    ("--use_lpl --lpl_weight 3 --lpl_share 0.3", "--lpl_share does nothing beside a --lpl_weight"),
    ("--adam_beta1 1", "--adam_beta1"),
    ("--lr_scheduler polynomial --learning_rate 1e-8", "--lr_scheduler polynomial"),
    ("--use_lora --lora_layers to_q,typo", "the unet has no layer called typo"),
    ("--validation_data_dir {none}", "--validation_data_dir: there are no images"),
    ("--config {list}", "learning_rate is [0.1, 0.2]; it takes one value"),
    ("--use_lora --init_lora {inside}", "lies in --output_dir"),
]


@pytest.mark.parametrize(("mistake", "said"), MISTAKES, ids=[mistake[:50] for mistake, _ in MISTAKES])
def test_mistakes_are_told_before_weights_load(mistake, said, flags, wrong_models, tmp_path, monkeypatch, capsys):
    """Each ends in exit status 2 with one message that names the flag or file, and no model is loaded."""
    empty = tmp_path / "no-images"
    uncaptioned = tmp_path / "uncaptioned"
    listed = tmp_path / "listed"
    for folder in (empty, uncaptioned, listed):
        folder.mkdir()
    Image.new("RGB", (64, 64)).save(uncaptioned / "a.png")
    Image.new("RGB", (64, 64)).save(listed / "a.png")
    (listed / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "hello"}\n')
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("learning_rat: 1\n")
    (tmp_path / "list.yaml").write_text("learning_rate: [0.1, 0.2]\n")
    inside = tmp_path / "out" / "old"
    inside.mkdir(parents=True)
    places = {**wrong_models, "uncaptioned": uncaptioned, "listed": listed, "recipe": recipe, "none": empty,
              "list": tmp_path / "list.yaml", "inside": inside}  # fmt: skip
    places |= {"empty": empty} if "train_data_dir" in mistake else {}
    forbid_loading(monkeypatch, train_sdxl_lpl)
    words = [*flags, *mistake.format(**places).split(), "--output_dir", tmp_path / "out", "--max_train_steps", 1]
    with pytest.raises(SystemExit) as stopped, errors_for_people(False):
        run(*words)
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert said in message and "Traceback" not in message


def test_a_mistake_is_answered_before_torch_is_imported(flags):
    """And as a process: quickly, without a traceback, with exit status 2."""
    result = subprocess.run(
        [sys.executable, "-X", "importtime", *command(*flags, "--resolution", 100)[1:]], capture_output=True, text=True
    )
    assert result.returncode == 2
    assert "error: --resolution is 100" in result.stderr and "Traceback" not in result.stderr
    assert " lpl_finetuning.flags\n" in result.stderr and " torch\n" not in result.stderr, (
        "it was imported to tell a wrong flag"
    )


def test_dry_run_prints_the_plan_and_stops(flags, tmp_path, monkeypatch, capsys):
    warned = []
    monkeypatch.setattr("diffusers.models.modeling_utils.logger.warning", warned.append)
    forbid_loading(monkeypatch, train_sdxl_lpl)
    AcceleratorState._reset_state(True)
    args = train_sdxl_lpl.parse_args([*flags, "--use_lpl", "--dry_run", "--output_dir", str(tmp_path)])
    train_sdxl_lpl.main(args, *scan_module.find_images(data_source(args)))
    assert not warned, "as diffusers does of each model that it casts"
    said = capsys.readouterr().out
    for part in ["images        6, held out: 0", "6, 5 different", "1.5 steps an epoch", "261,684 of 261,684",
                 "20.0 % of samples", "standard normalization (full gradient)", "middle block 16x8x8, up block 1 "
                 "16x16x16", "up block 4 8x64x64", "Memory, computed", "Arithmetic, computed"]:  # fmt: skip
        assert part in said, part
    assert re.search(r"^    learning_rate +0.001$", said, re.MULTILINE)
    assert not list(tmp_path.glob("checkpoint-*"))


def test_recipe_files(flags, tmp_path):
    """A recipe sets flags, the command line wins, and the saved configuration runs again to the same weights."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("max_train_steps: 3\nuse_lpl: true\nlpl_remove_outliers: false\nlearning_rate: 5e-4\n")
    run(*flags, "--config", recipe, "--output_dir", tmp_path / "a")
    saved = (tmp_path / "a" / "config.yaml").read_text()
    assert "learning_rate: 0.001" in saved and "max_train_steps: 3" in saved and "lpl_remove_outliers: false" in saved
    run("--config", tmp_path / "a" / "config.yaml", "--output_dir", tmp_path / "b")
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
