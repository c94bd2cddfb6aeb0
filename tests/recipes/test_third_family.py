"""A family of models that the package does not know trains with the loss, resumes bit-equal and saves."""

import os

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from tests import children, pixel_script, runs
from tests.tiny_models import picture_folder


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """Flags for a random pixel pipeline and pictures of 20 px, a size that no autoencoder here could take."""
    folder = tmp_path_factory.mktemp("pixels")
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=20, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(folder / "model")
    pictures = picture_folder(folder / "pictures", count=5, size=20)
    return (
        f"--pretrained_model_name_or_path {folder / 'model'} --train_data_dir {pictures} --resolution 20 --use_lpl "
        f"--cache_dir {folder / 'cache'} --train_batch_size 2 --lr_warmup_steps 0 --learning_rate 1e-3 "
        "--report_to none --logging_steps 1 --mixed_precision no --checkpointing_steps 2"
    ).split()


def test_a_third_family_trains_saves_and_measures(flags, tmp_path):
    more = ["--validation_split", 1, "--max_train_steps", 4, "--output_dir", tmp_path]
    rows = runs.run(pixel_script, *flags, *more)
    steps = [row for row in rows if "train_loss" in row]
    assert len(steps) == 4 and all(np.isfinite(row["train_loss"]) for row in steps)
    assert any(row["lpl/loss"] > 0 for row in steps), "some samples were gated"
    layers = {key for row in rows for key in row if key.startswith("lpl/features/")}
    assert layers == {f"lpl/features/layer_{n}/{what}" for n in (0, 1) for what in ("loss", "outlier_ratio")}
    assert any("validation/lpl_loss" in row for row in rows)
    pipeline = DDPMPipeline.from_pretrained(tmp_path)
    before = DDPMPipeline.from_pretrained(flags[1]).unet.state_dict()
    assert any(not torch.equal(value, before[name]) for name, value in pipeline.unet.state_dict().items())


def on_two_ranks(flags, folder, *more):
    """Run the script on two ranks to its end."""
    words = children.torchrun(2, "-m", "tests.pixel_script", *flags, "--output_dir", folder, *more)
    children.run(words, check=True, env={**os.environ, "ACCELERATE_USE_CPU": "true"}, cwd=runs.ROOT)


def test_a_third_family_resumes_bit_equal_on_two_ranks(flags, tmp_path):
    on_two_ranks(flags, tmp_path / "whole", "--max_train_steps", 4)
    on_two_ranks(flags, tmp_path / "resumed", "--max_train_steps", 2)
    on_two_ranks(flags, tmp_path / "resumed", "--max_train_steps", 4, "--resume_from_checkpoint", "latest")
    assert runs.weights(tmp_path / "resumed") == runs.weights(tmp_path / "whole")
