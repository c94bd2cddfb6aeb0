"""What the text of a model names, and the samplers: their last step returns the model's own estimate."""

import shutil
import sys

import pytest
import torch
from diffusers import DDIMScheduler

from lpl_finetuning import unpacking
from lpl_finetuning.errors import UserError
from lpl_finetuning.evaluation.models import (
    denoiser_of,
    find_source,
    load_pipeline,
    native_size,
    prediction_kind,
    sampling_scheduler,
)
from lpl_finetuning.results.export import save_single_file
from lpl_utils import estimate_z0
from tests import children
from tests.tiny_models import sd3_pipeline, sdxl_pipeline

# ---------------------------------------------------------------------------------------------------------------------
# From a text to a source


@pytest.fixture(scope="module")
def lora_folder(tmp_path_factory, sdxl_folder, pictures):
    """Output of a LoRA run of one step, with a checkpoint."""
    from tests import sdxl

    folder = tmp_path_factory.mktemp("runs") / "lora"
    sdxl.run("--pretrained_model_name_or_path", sdxl_folder, "--train_data_dir", pictures, "--use_lora",
             "--resolution", 64, "--train_batch_size", 2, "--learning_rate", 0.1, "--report_to", "none", "--rank", 2,
             "--cache_dir", folder.parent / "cache", "--lr_warmup_steps", 0, "--mixed_precision", "no",
             "--max_train_steps", 1, "--checkpointing_steps", 1, "--output_dir", folder)  # fmt: skip
    return folder


def test_pipelines_and_pictures(sdxl_folder, sd3_folder, pictures):
    source = find_source(str(sdxl_folder))
    assert (source.kind, source.base.family.name, source.lora) == ("pipeline", "sdxl", None)
    assert source.weights.startswith("sha256:")
    assert find_source(str(sd3_folder)).base.family.name == "sd3"
    assert (find_source(str(pictures)).kind, find_source(str(pictures)).pictures) == ("pictures", pictures)


@pytest.mark.parametrize("where", ["", "checkpoint-1", "pytorch_lora_weights.safetensors"])
def test_base_and_lora(sdxl_folder, lora_folder, where):
    source = find_source(f"{sdxl_folder}+{lora_folder / where}")
    assert source.kind == "LoRA" and source.base.name == str(sdxl_folder)
    assert source.weights != find_source(str(sdxl_folder)).weights
    pipelines = [load_pipeline(each, torch.float32, "cpu") for each in (source, find_source(str(sdxl_folder)))]
    inputs = torch.randn(1, 4, 8, 8), 500, torch.randn(1, 77, 32)
    added = {"text_embeds": torch.randn(1, 16), "time_ids": torch.zeros(1, 6)}
    with_lora, without = (each.unet(*inputs, added_cond_kwargs=added).sample for each in pipelines)
    assert not torch.allclose(with_lora, without), "the LoRA does nothing"


def test_a_single_file_is_unpacked(tmp_path, sdxl_folder, lora_folder, monkeypatch):
    """Alone and below a LoRA, with the configurations of the tiny pipeline in the place of the package's."""
    monkeypatch.setattr(unpacking, "packaged_files", lambda folder: unpacking.files_from(sdxl_folder))
    save_single_file(sdxl_folder, tmp_path / "model.safetensors", torch.float32)
    source = find_source(str(tmp_path / "model.safetensors"))
    assert source.kind == "pipeline" and source.base.is_unpacked
    ours, theirs = (load_pipeline(each, torch.float32, "cpu").unet.state_dict()
                    for each in (source, find_source(str(sdxl_folder))))  # fmt: skip
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    assert find_source(f"{tmp_path / 'model.safetensors'}+{lora_folder}").kind == "LoRA"


def test_a_single_file_that_lacks_something_takes_it_from_a_pipeline(singles, tmp_path):
    """A file of other sizes than SDXL's, with the configurations of its own pipeline."""
    file, example = singles["sdxl"], children.ROOT / "examples" / "tiny-sdxl"
    with pytest.raises(UserError, match=f"--model {file} lacks .* --config_from"):
        find_source(str(file), cache_dir=tmp_path)
    source = find_source(str(file), str(example), tmp_path)
    assert source.base.name.startswith(str(tmp_path))
    ours, theirs = (load_pipeline(each, torch.float32, "cpu").unet.state_dict()
                    for each in (source, find_source(str(example))))  # fmt: skip
    assert all(torch.equal(value, theirs[name].half().float()) for name, value in ours.items())


def test_a_plus_in_a_path(tmp_path, sdxl_folder, lora_folder):
    folder = shutil.copytree(sdxl_folder, tmp_path / "a+b")
    assert find_source(str(folder)).kind == "pipeline"
    source = find_source(f"{folder}+{lora_folder}")
    assert (source.base.name, source.lora) == (str(folder), str(lora_folder))


def test_a_checkpoint_of_all_weights(tmp_path, sdxl_folder):
    other = sdxl_pipeline(seed=5).unet
    other.save_pretrained(tmp_path / "checkpoint-7" / "unet")
    (tmp_path / "checkpoint-7" / "training_state.json").write_text("{}")
    source = find_source(f"{sdxl_folder}+{tmp_path / 'checkpoint-7'}")
    assert source.kind == "checkpoint" and source.weights != find_source(str(sdxl_folder)).weights
    loaded = load_pipeline(source, torch.float32, "cpu").unet
    assert torch.equal(loaded.conv_in.weight, other.conv_in.weight)


def test_wrong_texts(tmp_path, sdxl_folder, lora_folder, pictures):
    broken = shutil.copytree(sdxl_folder, tmp_path / "broken")
    weights = next((broken / "unet").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    (tmp_path / "empty").mkdir()
    (tmp_path / "flux").mkdir()
    (tmp_path / "flux" / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    wrong = {
        "": "--model is empty",
        str(tmp_path / "nowhere"): "no such folder",
        str(tmp_path / "empty"): "it is empty",
        str(tmp_path / "flux"): "is a FluxPipeline",
        str(broken): "can't be read as safetensors|is cut short",
        str(lora_folder): r"write BASE\+",
        str(lora_folder / "checkpoint-1"): r"write BASE\+",
        str(lora_folder / "pytorch_lora_weights.safetensors"): r"write BASE\+",
        f"{sdxl_folder}+": r"nothing stands after the \+",
        f"+{lora_folder}": r"nothing stands before the \+",
        f"{sdxl_folder}+{pictures}": "no .safetensors there",
        f"{sdxl_folder}+{tmp_path / 'nowhere'}": "no such file or folder",
        f"{tmp_path / 'nowhere'}+{lora_folder}": "no such folder",
    }
    for text, message in wrong.items():
        with pytest.raises(UserError, match=message):
            find_source(text)


def test_a_lora_of_another_base(sd3_folder, lora_folder):
    with pytest.raises(UserError, match=r"is not a LoRA for .*: \d+ of its \d+ tensors are of a unet"):
        find_source(f"{sd3_folder}+{lora_folder}")


def test_wrong_text_is_told_before_torch(tmp_path):
    """A child of the light server that imports torch ends with status 99."""
    code = (
        "import sys; from lpl_finetuning.errors import errors_for_people\n"
        "from lpl_finetuning.evaluation.models import find_source\n"
        "with errors_for_people(False): find_source(sys.argv[1])"
    )
    result = children.run([sys.executable, "-c", code, tmp_path / "none"], light=True, text=True, cwd=children.ROOT)
    assert result.returncode == 2 and "no such folder" in result.stderr, result


# ---------------------------------------------------------------------------------------------------------------------
# Samplers


def last_step(scheduler, kind, shape=(2, 4, 8, 8), steps=25):
    """(what the last step returns, the model's own estimate) for estimates well beyond +-1."""
    torch.manual_seed(0)
    scheduler.set_timesteps(steps)
    timestep = scheduler.timesteps[-1]
    sample, out = 3 * torch.randn(2, *shape)
    if kind == "flow":
        scheduler._step_index = steps - 1
        levels = 1 - scheduler.sigmas[-2], scheduler.sigmas[-2]
    else:
        abar = scheduler.alphas_cumprod[timestep]
        levels = abar.sqrt(), (1 - abar).sqrt()
    own = estimate_z0(out, sample, *(level.expand(2) for level in levels), kind)
    assert own.abs().max() > 2
    return scheduler.step(out, timestep, sample).prev_sample, own


@pytest.mark.parametrize("steps", [10, 25, 50])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample", "flow"])
def test_the_last_step_returns_the_models_own_estimate(kind, steps):
    pipeline = sd3_pipeline(t5=False) if kind == "flow" else sdxl_pipeline(prediction_type=kind)
    assert prediction_kind(pipeline) == kind
    returned, own = last_step(sampling_scheduler(pipeline, steps=steps), kind, steps=steps)
    torch.testing.assert_close(returned, own, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_what_diffusers_does_by_default_is_not_that(kind):
    """Euler's configuration has no clip_sample, and DDIM's default clips latents to -1..1."""
    pipeline = sdxl_pipeline(prediction_type=kind)
    scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    returned, own = last_step(scheduler, kind)
    assert returned.abs().max() <= 1 < own.abs().max()


def test_zero_terminal_snr_is_kept():
    pipeline = sdxl_pipeline(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    scheduler = sampling_scheduler(pipeline)
    scheduler.set_timesteps(25)
    assert scheduler.timesteps[0] == 999 and scheduler.alphas_cumprod[-1] == 0
    pipeline.scheduler = scheduler
    pipeline.set_progress_bar_config(disable=True)
    latents = pipeline("a red apple", num_inference_steps=5, output_type="latent", height=64, width=64).images
    assert latents.isfinite().all()


def test_other_samplers():
    sdxl, sd3 = sdxl_pipeline(), sd3_pipeline(t5=False)
    assert type(sampling_scheduler(sdxl, "euler")).__name__ == "EulerDiscreteScheduler"
    assert sampling_scheduler(sdxl, "own").config == sdxl.scheduler.config
    assert sampling_scheduler(sd3).config.shift == sd3.scheduler.config.shift
    with pytest.raises(UserError, match="not for rectified flow"):
        sampling_scheduler(sd3, "ddim")
    with pytest.raises(UserError, match=r"--steps is 30.*give 25 or 40"):
        sampling_scheduler(sdxl, steps=30)
    assert native_size(sdxl) == native_size(sd3) == (64, 64) and denoiser_of(sd3) is sd3.transformer
