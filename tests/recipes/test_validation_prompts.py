"""Validation prompts from a file, in trainings: each entry is sampled as its settings say, also after a resume."""

import numpy as np
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchHeunDiscreteScheduler,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
)
from PIL import Image

from lpl_finetuning.sample_prompts import PROMPTS_FILE
from tests import sd3, sdxl

# 4 steps: `run` of tests.runs gives pictures without such a setting 3.
SDXL_FILE = "a red apple --w 96 --h 80 --d 11 --s 4 --l 3 --n green leaves --ss dpmpp_2m\nthe sun\n"
SD3_FILE = "- {prompt: a red apple, width: 96, seed: 11, steps: 4, guidance: 3, negative: green leaves, sampler: heun}"


def pixels(image):
    return np.asarray(image if isinstance(image, Image.Image) else Image.open(image), dtype=np.int64)


def sampled(pipeline, scheduler_class, height, **more):
    """The picture that a pipeline itself makes with the settings of the files."""
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = scheduler_class.from_config(pipeline.scheduler.config)
    image = pipeline("a red apple", negative_prompt="green leaves", generator=torch.Generator().manual_seed(11),
                     num_inference_steps=4, guidance_scale=3, width=96, height=height, **more).images[0]  # fmt: skip
    return pixels(image)


def test_sdxl_samples_each_entry_as_its_settings_say(flags, sdxl_folder, tmp_path):
    """The picture is the pipeline's own; the card lists the settings; a resumed run samples the same pictures."""
    file, out = tmp_path / "prompts.txt", tmp_path / "out"
    file.write_text(SDXL_FILE)
    flags = [*flags, "--use_lora", "--use_lpl", "--learning_rate", 0, "--validation_prompts_file", file,
             "--num_validation_images", 1, "--checkpointing_steps", 1, "--output_dir", out]  # fmt: skip
    sdxl.run(*flags, "--max_train_steps", 1)
    drawn = [pixels(out / f"image_{number}.png") for number in range(2)]
    pipeline = StableDiffusionXLPipeline.from_pretrained(sdxl_folder)
    assert np.abs(drawn[0] - sampled(pipeline, DPMSolverMultistepScheduler, 80)).max() <= 1
    assert drawn[1].shape == (64, 64, 3)
    assert "| a red apple | green leaves | 96 | 80 | 4 | 3 | 11 | dpmpp_2m |" in (out / "README.md").read_text()
    for number in range(2):
        (out / f"image_{number}.png").unlink()
    sdxl.run(*flags, "--max_train_steps", 2, "--resume_from_checkpoint", "latest")
    for number, before in enumerate(drawn):
        assert np.array_equal(pixels(out / f"image_{number}.png"), before)
    assert (out / PROMPTS_FILE).is_file() and (out / "validation" / "step-2.png").is_file()


def test_sd3_samples_each_entry_as_its_settings_say(sd3_folder, pictures, cache_dir, tmp_path):
    """With a sampler of flows, and without LPL."""
    file, out = tmp_path / "prompts.yaml", tmp_path / "out"
    file.write_text(SD3_FILE)
    sd3.run("--pretrained_model_name_or_path", sd3_folder, "--train_data_dir", pictures, "--cache_dir", cache_dir,
            "--resolution", 64, "--train_batch_size", 2, "--lr_warmup_steps", 0, "--learning_rate", 0, "--seed", 3,
            "--report_to", "none", "--mixed_precision", "no", "--use_lora", "--num_validation_images", 1,
            "--validation_prompts_file", file, "--output_dir", out, "--max_train_steps", 1)  # fmt: skip
    pipeline = StableDiffusion3Pipeline.from_pretrained(sd3_folder)
    wanted = sampled(pipeline, FlowMatchHeunDiscreteScheduler, 64, max_sequence_length=77)
    assert np.abs(pixels(out / "image_0.png") - wanted).max() <= 1
