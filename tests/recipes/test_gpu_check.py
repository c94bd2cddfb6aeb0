"""The check of a machine: what is measured of a run, and how stages are kept."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from benchmarks import gpu_check, measured_run, random_pipelines
from lpl_utils import LatentPerceptualLoss
from tests.sdxl import run, train_sdxl_lpl, weights


def test_measuring_changes_nothing(flags, tmp_path, monkeypatch):
    """A row per micro-step, the perceptual loss within it; the result is that of the script alone."""
    flags = [*flags, "--use_lpl", "--lpl_t_threshold", 1000, "--max_train_steps", 3]
    run(*flags, "--output_dir", tmp_path / "plain")
    monkeypatch.setattr(train_sdxl_lpl, "training_step", train_sdxl_lpl.training_step)
    monkeypatch.setattr(LatentPerceptualLoss, "forward", LatentPerceptualLoss.forward)
    meter = measured_run.Meter()
    meter.watch(train_sdxl_lpl)
    run(*flags, "--output_dir", tmp_path / "measured")
    assert weights(tmp_path / "plain") == weights(tmp_path / "measured")
    report = meter.report()
    assert len(report["seconds"]) == 2 and len(report["loss_seconds"]) == 3 and report["counted_steps"] == 2
    assert all(0 < loss < step for loss, step in zip(report["loss_seconds"], report["seconds"], strict=False))
    assert report["peak"]["resident"] > 1e8 and report["waits"] == {}


def test_stages_are_kept_skipped_or_told(tmp_path, capsys):
    """What is done is not done again, what fails is tried again, and what can't run here says why."""
    check, calls = gpu_check.Check(tmp_path, "cpu", tiny=True), []

    def works(check):
        calls.append("works")
        return {"seconds_a_step": 0.5, "share_of_loss": 0.25, "peak": {"allocated": 2e9, "reserved": 3e9},
                "waits_a_step": 1.0, "plan": "Memory 2.0 GB"}  # fmt: skip

    def fails(check):
        calls.append("fails")
        raise RuntimeError("no kernel image")

    def skips(check):
        raise gpu_check.Skipped("needs a GPU")

    for _ in range(2):
        assert gpu_check.run_stage("works", works, check, tmp_path)
        assert not gpu_check.run_stage("fails", fails, check, tmp_path)
        assert gpu_check.run_stage("skips", skips, check, tmp_path)
    assert calls == ["works", "fails", "fails"] and "FAILED: RuntimeError: no kernel image" in capsys.readouterr().err
    kept = json.loads((tmp_path / "gpu-works.json").read_text())
    assert kept["sizes"] == "tiny" and kept["device"].endswith("CPU") and kept["commit"]
    page = gpu_check.tables(tmp_path)
    assert "| works | tiny | 0.500 | 25% | 3.00 GB | 1.0 | Memory 2.0 GB |" in page["cpu"] and not page["gpu"]
    assert "| skips | tiny | not run: needs a GPU |" in page["cpu"]
    kept["found"] |= {"seconds_a_step": None, "share_of_loss": None}  # of a single step, which warms up
    (tmp_path / "gpu-works.json").write_text(json.dumps(kept))
    assert "| works | tiny |  |  | 3.00 GB |" in gpu_check.tables(tmp_path)["cpu"]


def test_the_page_is_what_the_results_say():
    text = gpu_check.PAGE.read_text(encoding="utf-8")
    assert text == gpu_check.put_tables(text, gpu_check.tables(gpu_check.RESULTS)), "run gpu_check.py --table"


def test_a_failed_run_is_told_by_its_last_lines(tmp_path):
    words = [gpu_check.sys.executable, "-c", "print('one'); raise SystemExit('two')"]
    with pytest.raises(RuntimeError, match=r"ended with status 1 \(.*log\): one \| two"):
        gpu_check.run(words, 60, tmp_path / "log", "cpu")
    words[-1] = "import time; time.sleep(60)"
    with pytest.raises(RuntimeError, match="took more than 1 s"):
        gpu_check.run(words, 1, tmp_path / "log", "cpu")


@pytest.mark.slow
def test_stages_run_on_the_tiny_pipelines(tmp_path):
    """Two trainings of the real scripts: stopped, resumed, exported, read back."""
    check = gpu_check.Check(tmp_path, "cpu", tiny=True)
    found = gpu_check.all_stages()["lifecycle-sdxl"](check)
    assert found["resumed_is_equal"] and found["tensors_read_back"][0] == found["tensors_read_back"][1] > 0
    assert found["first"]["share_of_loss"] > 0 and found["pictures"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sdxl", "sd3"])
def test_a_model_in_one_file_is_trained(family, tmp_path):
    """Packed, unpacked by a run and compared; one wrong tensor is told."""
    check = gpu_check.Check(tmp_path, "cpu", tiny=True)
    stage = gpu_check.all_stages()[f"single-file-{family}"]
    found = stage(check)
    assert found["equal_tensors"] > 300 and found["trained_tensors"] > 0 and found["tensors_in_file"] > 300
    [weights] = (tmp_path / "cache").glob("lpl/base-models/*/vae/*.safetensors")
    tensors = load_file(weights)
    name = next(iter(tensors))
    tensors[name] = tensors[name] + 1
    save_file(tensors, weights)
    with pytest.raises(RuntimeError, match="is not what was packed"):
        stage(check)


def test_the_float16_recipe_has_an_autoencoder_of_its_own(tmp_path):
    """That of the pipeline with the same weights, which says that it does not overflow in float16."""
    check = gpu_check.Check(tmp_path, "cpu", tiny=True)
    ours, source = AutoencoderKL.from_pretrained(check.half_vae("SDXL")), check.model("SDXL") / "vae"
    assert ours.config.force_upcast is False and check.half_vae("SDXL").is_relative_to(tmp_path)
    theirs = AutoencoderKL.from_pretrained(source).state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.state_dict().items())


def test_every_recipe_and_architecture_has_a_stage():
    stages = gpu_check.all_stages()
    assert {f"recipe-{path.stem}" for path in gpu_check.RECIPES} <= stages.keys() and len(gpu_check.RECIPES) >= 7
    assert all(gpu_check.family_of(model) in gpu_check.SCRIPTS for model in random_pipelines.MODELS)


def test_a_random_pipeline_is_whole(tmp_path, monkeypatch):
    """Built small, it is found sound by the checks that a training script makes, and loads."""
    from diffusers import StableDiffusionXLPipeline

    from lpl_finetuning.evaluation.models import find_source

    script, pipeline, part, denoiser, vae = random_pipelines.MODELS["SDXL"]
    small = denoiser | {"block_out_channels": [32, 64, 64], "transformer_layers_per_block": 1,
                        "attention_head_dim": [2, 4, 4], "cross_attention_dim": 128,
                        "projection_class_embeddings_input_dim": 6 * 256 + 64}  # fmt: skip
    monkeypatch.setitem(random_pipelines.MODELS, "SDXL", (
        script, pipeline, part, small, vae | {"block_out_channels": [32] * 4}))  # fmt: skip
    clip = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
            "projection_dim": 64}  # fmt: skip
    monkeypatch.setattr(random_pipelines, "CLIP_L", random_pipelines.CLIP_L | clip)
    monkeypatch.setattr(random_pipelines, "CLIP_BIG_G", random_pipelines.CLIP_BIG_G | clip)
    folder = random_pipelines.build_pipeline("SDXL", tmp_path / "model")
    assert find_source(str(folder)).kind == "pipeline"
    loaded = StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
    assert next(loaded.text_encoder_2.parameters()).isfinite().all()
    times = {path: path.stat().st_mtime_ns for path in Path(folder).rglob("*")}
    random_pipelines.build_pipeline("SDXL", folder)
    assert times == {path: path.stat().st_mtime_ns for path in Path(folder).rglob("*")}, "it is made once"
