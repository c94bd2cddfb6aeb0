"""Messages of flags, models, runs and the Hub are true in each case that leads to them.

Each test has the case in which a message was false once, the text that is right there, and the case of the old text.
"""

import errno
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

import evaluate_models
import train_sd3_lpl_flow
import train_sdxl_lpl
from lpl_finetuning import base_model, start
from lpl_finetuning.base_model import check_weight_names, instead_of_folder, instead_of_pipeline, require_layers
from lpl_finetuning.errors import DataError, UserError
from lpl_finetuning.evaluation import networks
from lpl_finetuning.evaluation.models import EvaluatedModel
from lpl_finetuning.families import SD3, SDXL
from lpl_finetuning.files import WARNED, dispensable
from lpl_finetuning.flag_checks import precision_source
from lpl_finetuning.results import hub
from lpl_finetuning.training import checkpoint_folders, run, sharding
from lpl_finetuning.training.checkpoints import kept_if_unwritten, write_error
from lpl_finetuning.training.guard import Fault, Guard
from lpl_finetuning.training.plan import print_lpl_plan, print_run, warnings_about
from lpl_finetuning.training.reporter import History, Reporter
from lpl_finetuning.training.step_memory import Machine
from tests.picture_folders import captioned
from tests.runs import ROOT

SCRIPTS = {"sdxl": train_sdxl_lpl, "sd3": train_sd3_lpl_flow}


@pytest.fixture
def parse(tmp_path, own_cache):
    """Function script, words -> the checked flags of a run on the embedded model and ten pictures."""
    folder = captioned(tmp_path / "photos", 10)

    def parse(script="sdxl", *words, data=folder, model=None):
        named = ["--pretrained_model_name_or_path", str(model or ROOT / "examples" / f"tiny-{script}"),
                 "--train_data_dir", str(data), "--resolution", "64", "--report_to", "none"]  # fmt: skip
        output = [] if "--output_dir" in words else ["--output_dir", str(tmp_path / "out")]
        return SCRIPTS[script].parse_args([*named, *output, *map(str, words)])

    return parse


def refused(function, *args, **options):
    """The text of the UserError that a call raises."""
    with pytest.raises(UserError) as caught:
        function(*args, **options)
    return str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------
# Flags


def test_a_folder_named_like_a_package_is_no_package(parse, tmp_path, monkeypatch):
    """Runs of wandb leave a folder wandb/, which Python would import as an empty package."""
    (tmp_path / "wandb").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert not networks.is_installed("wandb") and networks.is_installed("yaml")
    for more in ([], ["--dry_run"]):
        told = refused(parse, "sdxl", "--report_to", "wandb", *more)
        assert told.startswith("--report_to wandb: wandb is not installed")


@pytest.mark.parametrize("flag", ["train_data_dir", "validation_data_dir"])
def test_an_output_folder_among_pictures_is_told_as_that(parse, tmp_path, flag):
    folder = captioned(tmp_path / "others", 1)
    told = refused(parse, "sdxl", f"--{flag}", folder, "--output_dir", folder / "out")
    assert f"lies in --{flag} {folder}: the run's own pictures would lie among those" in told
    assert "trained on" not in told


def test_what_comes_from_the_embedded_recipe_is_not_said_to_come_from_the_flag(tmp_path, capsys):
    train_sdxl_lpl.parse_args(["--num_validation_images", "0", "--output_dir", str(tmp_path / "out")])
    told = capsys.readouterr().err
    assert "--validation_steps does nothing" in told and "it comes from the recipe" in told and "--config" not in told


def test_a_recipe_may_name_the_hub_where_the_command_line_does_not_publish(parse, tmp_path, capsys):
    (tmp_path / "r.yaml").write_text("push_to_hub: true\nhub_model_id: me/x\n")
    parse("sdxl", "--config", tmp_path / "r.yaml", "--no-push_to_hub")
    assert "--hub_model_id does nothing without --push_to_hub; it comes from the recipe" in capsys.readouterr().err
    assert "--hub_model_id does nothing" in refused(parse, "sdxl", "--hub_model_id", "me/x")


@pytest.mark.parametrize(("script", "given", "near"), [("sdxl", 108, 96), ("sd3", 108, 96), ("sd3", 9, 16)])
def test_the_resolution_that_is_proposed_is_one_that_is_taken(parse, script, given, near):
    assert refused(parse, script, "--resolution", given).endswith(f"e.g. {near}")
    assert parse(script, "--resolution", near).resolution == near


def test_a_start_of_the_loss_matters_only_with_the_loss(parse, tmp_path, capsys):
    (tmp_path / "r.yaml").write_text("lpl_start: 100\n")
    words = ["--config", tmp_path / "r.yaml", "--max_train_steps", 50]
    parse("sdxl", *words)
    assert "--lpl_start does nothing without --use_lpl" in capsys.readouterr().err
    assert "the loss would never be used" in refused(parse, "sdxl", "--use_lpl", *words)


def test_tokens_are_as_many_as_the_pipeline_takes(parse):
    for wrong in (0, -1, 513, 4096):
        told = refused(parse, "sd3", "--max_sequence_length", wrong)
        assert told.startswith(f"--max_sequence_length is {wrong}; it must lie between 1 and 512")
    for right in (1, 77, 512):
        assert parse("sd3", "--max_sequence_length", right).max_sequence_length == right


def test_a_distance_of_one_sample_is_refused_before_training(parse):
    metrics = ["--validation_metrics", "--validation_split"]
    assert refused(parse, "sdxl", *metrics, 3, "--validation_kid_samples", 1).endswith("KID needs 2 or more")
    args = parse("sdxl", *metrics, 1)
    assert "there is 1; hold out more" in refused(start.find_training_images, args)
    start.find_training_images(parse("sdxl", *metrics, 1, "--validation_kid_every", 0))
    start.find_training_images(parse("sdxl", *metrics, 2, "--validation_kid_samples", 2))


def test_the_precision_is_named_by_where_it_comes_from(parse, monkeypatch):
    assert precision_source(parse("sdxl", "--mixed_precision", "bf16")) == "--mixed_precision"
    args = parse("sdxl")
    assert precision_source(args) == "accelerate's mixed_precision"
    fake = SimpleNamespace(num_processes=1, mixed_precision="fp16", device=torch.device("cpu"))
    monkeypatch.setattr(run, "Accelerator", lambda **options: fake)
    told = refused(run.start_accelerator, args)
    assert told.startswith("accelerate's mixed_precision fp16 needs a GPU") and "--mixed" not in told


def test_only_a_token_on_the_command_line_can_be_seen(parse, tmp_path):
    (tmp_path / "r.yaml").write_text("hub_token: hf_secret\n")
    assert not warnings_about(parse("sdxl", "--config", tmp_path / "r.yaml"), 10, 0)
    [told] = warnings_about(parse("sdxl", "--hub_token", "hf_secret"), 10, 0)
    assert "can be seen by others" in told


# ---------------------------------------------------------------------------------------------------------------------
# The plan


@pytest.mark.parametrize("scaled", [False, True])
def test_the_threshold_that_is_proposed_is_meant_without_scaling(parse, scaled, capsys):
    words = ["--use_lpl", "--lpl_sigma_threshold", 0.01] + ["--lpl_threshold_resolution", 1024] * scaled
    args, said = parse("sd3", *words), []
    gate = train_sd3_lpl_flow.lpl_gate(args)
    schedule = train_sd3_lpl_flow.Schedule(args)
    hint = schedule.threshold_for(0.2, by_timestep=False)
    vae = train_sd3_lpl_flow.load_vae(args.base_model, torch.float32, "meta")
    stages = train_sd3_lpl_flow.lpl_stages(args, vae, Machine("no"))
    print_lpl_plan(args, gate, schedule.gated_share(gate), hint, stages, (16, 8, 8), said.append)
    told = said[-1]
    assert ("without --lpl_threshold_resolution would give 20 %" in told) == scaled and "would give 20 %" in told
    proposed = parse("sd3", "--use_lpl", *hint.split())
    assert schedule.gated_share(train_sd3_lpl_flow.lpl_gate(proposed)) == pytest.approx(0.2, abs=0.01)


@pytest.mark.parametrize(("every", "told"), [(1, "at each of them"), (2, "the last and validations 2, 4, …")])
def test_the_validations_with_kid_are_counted_in_words(parse, every, told):
    args = parse("sdxl", "--validation_metrics", "--validation_split", 4, "--validation_kid_every", every)
    said, accelerator = [], SimpleNamespace(num_processes=1)
    accelerator.print = said.append
    report = {"images": 6, "held_out": 4, "source": "", "formats": {}, "notes": {}, "profiles": {}, "sizes": {},
              "captions": {"count": 6, "different": 6, "images_with_several": 0, "default": 0, "length": []},
              "bad": [], "missing": [], "remarks": []}  # fmt: skip
    plan = SimpleNamespace(total_steps=4, batch_size=1, first_step=0, first_image=0, resume_from=None)
    print_run(args, report, accelerator, plan)
    assert said[-1].endswith(told) and "th " not in said[-1]


# ---------------------------------------------------------------------------------------------------------------------
# Models


def lora_file(path):
    """A file with a layer of a LoRA, whatever its name."""
    save_file({"unet.down.to_q.lora_A.weight": np.zeros((2, 2), np.float32)}, path)
    return path


def weights_file(path):
    """A file with a layer of a whole model."""
    save_file({"model.diffusion_model.weight": np.zeros((2, 2), np.float32)}, path)
    return path


def test_a_file_in_the_place_of_a_folder_is_called_what_it_is(parse, tmp_path):
    notes = tmp_path / "notes.md"
    notes.write_text("x")
    assert ".md is not read; give a folder in diffusers' layout" in refused(parse, model=notes)
    assert "is a LoRA" in refused(parse, model=lora_file(tmp_path / "style.safetensors"))
    whole = weights_file(tmp_path / "explorations.safetensors")
    assert "is no SDXL or SD3 in one file: it holds model.diffusion_model.weight" in refused(parse, model=whole)
    told = refused(parse, "sdxl", "--pretrained_vae_model_name_or_path", tmp_path / "style.safetensors")
    assert told.endswith("is a LoRA; give an AutoencoderKL as .safetensors, or a folder") and "init_lora" not in told
    (tmp_path / "lora-v2.ckpt").write_bytes(b"x")
    assert "is a LoRA" in instead_of_folder(tmp_path / "lora-v2.ckpt", "X")


def test_a_folder_is_a_loras_by_its_layers_not_by_its_letters(tmp_path):
    (tmp_path / "a").mkdir()
    weights_file(tmp_path / "a/explorations.safetensors")
    assert "it holds single files (explorations.safetensors)" in instead_of_pipeline(tmp_path / "a", "")
    lora_file(tmp_path / "a/my-style.safetensors")
    assert instead_of_pipeline(tmp_path / "a", "").startswith("it is a LoRA")


@pytest.mark.parametrize(("family", "name"), [(SDXL, "stable-diffusion-xl-base-1.0"), (SD3, "stable-diffusion-3.5")])
def test_the_pipeline_that_is_proposed_is_of_the_scripts_family(family, name, tmp_path):
    assert name in instead_of_pipeline(tmp_path / "not-here", family.example)


def test_flags_about_files_are_proposed_where_there_are_such_flags():
    base = base_model.BaseModel(SDXL, "a/b", vae="c/d")
    halves, pickles = ["model.fp16.safetensors"], ["pytorch_model.bin"]
    own, other = base.loading_flags("unet"), base.loading_flags("vae")
    assert "those of --variant fp16" in refused(check_weight_names, "x", halves, None, False, own)
    told = refused(check_weight_names, "x", halves, None, False, other)
    assert "the variant fp16, which is not read here" in told and "--variant" not in told
    assert "or give --allow_pickle" in refused(check_weight_names, "x", pickles, None, False, other)
    evaluated = EvaluatedModel(SDXL, "a/b", text="a/b").loading_flags("unet")
    for names in (halves, pickles):
        told = refused(check_weight_names, "x", names, None, False, evaluated)
        assert "--variant" not in told and "--allow_pickle" not in told


def test_layers_that_are_missing_in_a_block_are_told_by_the_flag_that_was_given(parse):
    words = ("--use_lora", "--lora_blocks", "2", "--lora_layers", "attn.to_add_out")
    told = refused(parse, "sd3", *words)
    assert told.startswith("--lora_blocks 2: the transformer has no layer called attn.to_add_out")
    assert "leave that block out" in told
    assert refused(require_layers, "unet", ["x"], ["to_q"]).startswith("--lora_layers: the unet has no layer called x")


# ---------------------------------------------------------------------------------------------------------------------
# Runs


def test_a_folder_with_checkpoints_is_not_said_to_have_none(tmp_path):
    args = SimpleNamespace(output_dir=str(tmp_path / "out"), resume_from_checkpoint=str(tmp_path / "run"))
    (tmp_path / "run/checkpoint-20").mkdir(parents=True)
    (tmp_path / "run/checkpoint-5").mkdir()
    told = refused(checkpoint_folders.named_folder, args)
    assert told.endswith(f"is no checkpoint itself; give {tmp_path / 'run/checkpoint-20'}, which is in it")
    args.resume_from_checkpoint = str(tmp_path / "elsewhere")
    assert "no checkpoint there, nor in" in refused(checkpoint_folders.named_folder, args)


@pytest.mark.parametrize(("code", "told"), [
    (errno.ENOSPC, "disk full while saving"), (errno.EFBIG, "Files may not be that large there"),
    (errno.EACCES, "can't save"),
])  # fmt: skip
def test_a_failed_write_is_told_by_its_cause(code, told, tmp_path):
    message = str(write_error(OSError(code, os.strerror(code)), tmp_path / "checkpoint-2"))
    assert told in message and ("disk full" in message) == (code == errno.ENOSPC)
    for save in (None, lambda: None):
        with pytest.raises(UserError) as caught, kept_if_unwritten(save):
            raise OSError(code, os.strerror(code))
        assert ("Free some space" in str(caught.value)) == (code == errno.ENOSPC)
        assert ("Put that right" in str(caught.value)) == (code != errno.ENOSPC)


@pytest.mark.parametrize(("precision", "told"), [
    ("fp16", "or use --mixed_precision bf16 or no,"), ("bf16", "or use --mixed_precision no,"), ("no", None),
])  # fmt: skip
def test_another_precision_is_proposed_than_the_one_in_use(precision, told):
    guard = Guard(SimpleNamespace(num_processes=1, process_index=0, mixed_precision=precision), 1, str)
    message = refused(guard.record, [Fault("diffusion loss", (3,))], 7)
    assert told in message if told else "--mixed_precision" not in message


def test_what_the_run_can_do_without_does_not_speak_of_training(capsys):
    WARNED.discard("the very thing")
    with dispensable("the very thing"):
        raise OSError("no")
    told = capsys.readouterr().err
    assert "the very thing can't be written (no); the run goes on without it" in told and "training" not in told


@pytest.mark.parametrize(("first", "told"), [
    (0, "0.50000 before training, 0.25000 after 9 steps"), (3, "0.50000 after 3 steps, 0.25000 after 9 steps"),
])  # fmt: skip
def test_a_run_resumed_elsewhere_has_no_value_from_before_training(first, told, tmp_path, capsys, monkeypatch):
    reporter = Reporter.__new__(Reporter)
    reporter.main, reporter.output_dir, reporter.first_step, reporter.total_steps = True, tmp_path, first, 9
    reporter.history = History(tmp_path / "logs/metrics.jsonl", 0)
    monkeypatch.setattr(reporter, "draw_run", lambda: None)
    reporter.history.append(first, {"validation/diffusion_loss": 0.5, "validation/one_step/psnr": 1.0})
    reporter.finish()
    assert "Held-out" not in capsys.readouterr().out, "one value is no comparison"
    reporter.history.append(9, {"validation/diffusion_loss": 0.25})
    (tmp_path / "validation").mkdir()
    for step in (first, 9, 12):  # 12: of a run that was taken back to step 9
        (tmp_path / f"validation/step-{step}.png").write_bytes(b"")
    reporter.finish()
    said = capsys.readouterr().out
    start = f"after {first} steps" if first else "before training"
    assert told in said and f"Pictures {start} and after 9 steps: " in said
    found, since = hub.measures_of(tmp_path / "logs/metrics.jsonl")
    assert found["diffusion loss"] == "0.5 -> 0.25" and since == ("after 3 steps" if first else "before")
    assert hub.measures_of(tmp_path / "none.jsonl") == ({}, "")


@pytest.mark.parametrize(("gpu", "told"), [
    (True, "needs several processes, and this is the only one"), (False, "needs GPUs, and none is here"),
])  # fmt: skip
def test_fsdp_alone_on_a_gpu_is_not_told_that_there_is_none(gpu, told, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: gpu)
    alone = SimpleNamespace(num_processes=1, distributed_type="NO", state=SimpleNamespace())
    monkeypatch.setattr(sharding, "is_zero", lambda accelerator: False)
    monkeypatch.setattr(sharding, "is_fsdp", lambda accelerator: False)
    assert told in refused(sharding.set_up_sharding, alone)


def test_a_dry_run_is_refused_where_another_run_writes(parse, tmp_path):
    """The end of a dry run asks for the lock, and leaves no trace."""
    args, asked = parse("sdxl"), []
    main = SimpleNamespace(is_main_process=True)
    run.check_start(args, main, asked.append)
    assert not (tmp_path / "out").exists() and not asked
    (tmp_path / "out").mkdir()
    (tmp_path / "out/.lock").write_text("process 1 on host")
    run.check_start(args, main, asked.append)
    program = "import fcntl, sys; file = open(sys.argv[1], 'r+'); fcntl.lockf(file, fcntl.LOCK_EX); print('held', "
    program += "flush=True); sys.stdin.read()"
    words = [sys.executable, "-c", program, str(tmp_path / "out/.lock")]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        assert "another run is writing there (process 1 on host)" in refused(run.check_start, args, main, None)
        holder.stdin.close()
    assert (tmp_path / "out/.lock").read_text() == "process 1 on host"


# ---------------------------------------------------------------------------------------------------------------------
# The Hub


def test_publishing_offline_is_refused_with_the_flags(parse, monkeypatch):
    monkeypatch.setattr("huggingface_hub.is_offline_mode", lambda: True)
    told = refused(parse, "sdxl", "--push_to_hub", "--hub_token", "hf_x", "--dry_run")
    assert told.startswith("--push_to_hub needs the network, but HF_HUB_OFFLINE is set")


def test_a_name_that_comes_from_the_folder_is_told_as_that(parse, tmp_path):
    told = refused(parse, "sdxl", "--push_to_hub", "--hub_token", "hf_x", "--output_dir", tmp_path / "my run")
    assert told.startswith("the folder's name, my run, can't be a name on the Hub; --hub_model_id: give owner/name")
    told = refused(parse, "sdxl", "--push_to_hub", "--hub_token", "hf_x", "--hub_model_id", "my run")
    assert told.startswith("--hub_model_id my run: give owner/name")


def test_links_are_not_said_to_be_missing(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/model.safetensors").symlink_to(weights_file(tmp_path / "x.safetensors"))
    assert "links to files elsewhere do not count" in refused(hub.publishable_files, tmp_path / "run")


def test_the_command_that_publishes_works_where_it_is_printed(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert hub.retry_command("runs/x", "me/x", False).startswith("python -m lpl_finetuning.publish runs/x ")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "is_distributed", lambda name: False)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    told = hub.retry_command("runs/x", "me/x", False)
    assert told.startswith(f"cd {ROOT} && python -m lpl_finetuning.publish {tmp_path}/runs/x ")
    monkeypatch.setattr(hub, "is_distributed", lambda name: True)
    assert hub.retry_command("runs/x", "me/x", False).startswith("python -m lpl_finetuning.publish runs/x ")


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation


@pytest.fixture
def evaluated(tmp_path, own_cache):
    """Function words -> what `evaluate_models` finds for finished pictures without captions, and a model."""
    from tests.picture_folders import picture

    for number in range(16):
        for name in ("real", "made"):
            picture(tmp_path / name / f"{number}.png", (32 + 16 * (name == "made"), 48), (number, 9, 9))

    def found(*words, model=tmp_path / "made"):
        args = evaluate_models.parse_args(["--real", str(tmp_path / "real"), "--model", str(model), "--output",
                                           str(tmp_path / "report"), *map(str, words)])  # fmt: skip
        return args, evaluate_models.find_everything(args)

    return found


def test_a_size_that_the_model_can_not_make_is_told_before_it_loads(evaluated):
    words = ["--instance_prompt", "x", "--size"]
    for script, unit in (("sdxl", 8), ("sd3", 16)):
        model = ROOT / "examples" / f"tiny-{script}"
        told = refused(evaluated, *words, 36, model=model)
        assert told.endswith(f"it must be a multiple of {unit}, e.g. {36 // unit * unit}")
        evaluated(*words, 48, model=model)
    evaluated("--size", 36), "finished pictures are cut to any size"


def test_a_caption_counts_for_clip_though_all_pictures_are_finished(evaluated, monkeypatch):
    assert "--instance_prompt does nothing" in refused(evaluated, "--instance_prompt", "x")
    monkeypatch.setattr(evaluate_models, "check_clip", lambda name: None)
    _, (_, real, _) = evaluated("--instance_prompt", "x", "--clip_model", "a/b")
    assert {image.caption for image in real} == {"x"}
    with pytest.raises(DataError, match="have no caption"):
        evaluated("--clip_model", "a/b")
    assert "--steps does nothing" in refused(evaluated, "--steps", 5, "--clip_model", "a/b")


def test_finished_pictures_are_not_said_to_be_made(evaluated, tmp_path):
    args, (contenders, *_) = evaluated("--model", tmp_path / "real")
    told = refused(evaluate_models.picture_size, args, contenders)
    assert told.startswith("--size is missing: the models' pictures have different sizes (")


def test_more_steps_than_noise_levels_and_unknown_devices_are_refused(evaluated):
    model = ROOT / "examples" / "tiny-sdxl"
    words = ["--instance_prompt", "x", "--sampler", "euler", "--steps"]
    assert "the model knows 1000 noise levels" in refused(evaluated, *words, 1001, model=model)
    evaluated(*words, 1000, model=model)
    for device in ("gpu", "cpu:x"):
        assert refused(evaluate_models.check_device, device).startswith(f"--device {device}: it can't be used here")
    evaluate_models.check_device("cpu")
