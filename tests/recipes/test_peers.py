"""What users of the diffusers scripts for SDXL rely on: their command lines, checkpoint folders and results.

The command lines are those of diffusers' examples/text_to_image/README_sdxl.md (read in November 2026), the checkpoint
folders those that its test_text_to_image.py and test_text_to_image_lora.py expect.
"""

import os
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import load_file

import train_sdxl_lpl
from lpl_finetuning.lora_files import LORA_FILE
from tests.sdxl import command, run

COMMANDS = {
    "full": """--pretrained_model_name_or_path=$MODEL_NAME --pretrained_vae_model_name_or_path=$VAE_NAME
        --dataset_name=$DATASET_NAME --enable_xformers_memory_efficient_attention --resolution=512 --center_crop
        --random_flip --proportion_empty_prompts=0.2 --train_batch_size=1 --gradient_accumulation_steps=4
        --gradient_checkpointing --max_train_steps=10000 --use_8bit_adam --learning_rate=1e-06
        --lr_scheduler="constant" --lr_warmup_steps=0 --mixed_precision="fp16" --report_to="wandb"
        --validation_prompt="a cute Sundar Pichai creature" --validation_epochs 5 --checkpointing_steps=5000
        --output_dir="sdxl-pokemon-model" --push_to_hub""",
    "lora": """--use_lora --pretrained_model_name_or_path=$MODEL_NAME --pretrained_vae_model_name_or_path=$VAE_NAME
        --dataset_name=$DATASET_NAME --caption_column="text" --resolution=1024 --random_flip --train_batch_size=1
        --num_train_epochs=2 --checkpointing_steps=500 --learning_rate=1e-04 --lr_scheduler="constant"
        --lr_warmup_steps=0 --mixed_precision="fp16" --seed=42 --output_dir="sd-pokemon-model-lora-sdxl"
        --validation_prompt="cute dragon creature" --report_to="wandb" --push_to_hub""",
    "lora-deepspeed": """--use_lora --pretrained_model_name_or_path=$MODEL_NAME
        --pretrained_vae_model_name_or_path=$VAE_NAME --dataset_name=$DATASET_NAME --caption_column="text"
        --resolution=1024 --train_batch_size=1 --num_train_epochs=2 --checkpointing_steps=2 --learning_rate=1e-04
        --lr_scheduler="constant" --lr_warmup_steps=0 --mixed_precision="fp16" --max_train_steps=20
        --validation_epochs=20 --seed=1234 --output_dir="sd-pokemon-model-lora-sdxl"
        --validation_prompt="cute dragon creature" """,
    "lora-text": """--use_lora --pretrained_model_name_or_path=$MODEL_NAME --dataset_name=$DATASET_NAME
        --caption_column="text" --resolution=1024 --random_flip --train_batch_size=1 --num_train_epochs=2
        --checkpointing_steps=500 --learning_rate=1e-04 --lr_scheduler="constant" --lr_warmup_steps=0 --seed=42
        --output_dir="sd-pokemon-model-lora-sdxl-txt" --train_text_encoder --validation_prompt="cute dragon creature"
        --report_to="wandb" --push_to_hub""",
}
FLAGS = """pretrained_model_name_or_path pretrained_vae_model_name_or_path revision variant dataset_name
    dataset_config_name train_data_dir image_column caption_column validation_prompt num_validation_images
    validation_epochs max_train_samples proportion_empty_prompts output_dir cache_dir seed resolution center_crop
    random_flip train_text_encoder train_batch_size num_train_epochs max_train_steps checkpointing_steps
    checkpoints_total_limit resume_from_checkpoint gradient_accumulation_steps gradient_checkpointing learning_rate
    scale_lr lr_scheduler lr_warmup_steps timestep_bias_strategy timestep_bias_multiplier timestep_bias_begin
    timestep_bias_end
    timestep_bias_portion snr_gamma use_ema allow_tf32 dataloader_num_workers use_8bit_adam adam_beta1
    adam_beta2 adam_weight_decay adam_epsilon max_grad_norm push_to_hub hub_token prediction_type hub_model_id
    logging_dir report_to mixed_precision local_rank enable_xformers_memory_efficient_attention
    enable_npu_flash_attention noise_offset image_interpolation_mode rank debug_loss"""


@pytest.fixture(scope="module")
def dataset(pictures, tmp_path_factory):
    """The pictures as a data set with the columns image and text."""
    import datasets

    files = sorted(pictures.glob("*.png"))
    columns = {
        "image": [str(file) for file in files],
        "text": [file.with_suffix(".txt").read_text() for file in files],
    }
    folder = tmp_path_factory.mktemp("dataset") / "pokemon"
    datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image()).save_to_disk(folder)
    return folder


@pytest.fixture(scope="module")
def another_vae(tmp_path_factory):
    """A VAE folder of its own, as madebyollin/sdxl-vae-fp16-fix is."""
    from tests.tiny_models import autoencoder

    folder = tmp_path_factory.mktemp("vae")
    autoencoder(seed=7).save_pretrained(folder)
    return folder


def words_of(name, sdxl_folder, dataset, another_vae):
    text = COMMANDS[name].replace("$MODEL_NAME", str(sdxl_folder)).replace("$DATASET_NAME", str(dataset))
    return shlex.split(text.replace("$VAE_NAME", str(another_vae)))


def test_every_flag_of_the_peers_is_known():
    known = train_sdxl_lpl.build_parser().flags()
    assert [name for name in FLAGS.split() if name not in known] == []
    for name, default in {"resolution": 1024, "train_batch_size": 16, "num_train_epochs": 100,
                          "learning_rate": 1e-4, "lr_warmup_steps": 500, "checkpointing_steps": 500,
                          "num_validation_images": 4, "validation_epochs": 1,
                          "adam_weight_decay": 1e-2, "logging_dir": "logs"}.items():  # fmt: skip
        assert known[name].default == default, name


@pytest.mark.parametrize("name", COMMANDS)
def test_their_commands_parse_and_run(name, sdxl_folder, dataset, another_vae, cache_dir, tmp_path):
    """Unchanged for the parser; run on the CPU in full precision, without xformers, wandb and push, and short."""
    words = words_of(name, sdxl_folder, dataset, another_vae)
    args = train_sdxl_lpl.build_parser().parse(words)
    assert args.lr_scheduler == "constant" and args.validation_prompt[0].endswith("creature")
    leave_out = {"--push_to_hub", "--enable_xformers_memory_efficient_attention", "--report_to=wandb"}
    words = [word for word in words if word not in leave_out]
    rows = run(*words, "--mixed_precision", "no", "--report_to", "tensorboard", "--output_dir", tmp_path,
               "--max_train_steps", 2, "--resolution", 64, "--cache_dir", cache_dir, "--logging_steps", 1)  # fmt: skip
    assert len([row for row in rows if "train_loss" in row]) == 2
    pipeline = StableDiffusionXLPipeline.from_pretrained(sdxl_folder if args.use_lora else tmp_path)
    if args.use_lora:
        tensors = load_file(tmp_path / LORA_FILE)
        starts = ("unet", "text_encoder", "text_encoder_2") if args.train_text_encoder else ("unet",)
        assert all("lora" in key and key.startswith(starts) for key in tensors)
        pipeline.load_lora_weights(tmp_path)
    else:
        saved, own = (AutoencoderKL.from_pretrained(folder).state_dict() for folder in (tmp_path / "vae", another_vae))
        assert all(torch.equal(saved[key], own[key]) for key in own), "the named VAE is saved with the pipeline"
    assert pipeline("a prompt", num_inference_steps=1, height=64, width=64).images
    assert (tmp_path / "image_3.png").is_file() and list((tmp_path / "logs").rglob("events.out.tfevents*"))


def test_as_a_process_under_accelerate(sdxl_folder, dataset, another_vae, cache_dir, tmp_path):
    """`accelerate launch`, as the README says it."""
    words = words_of("lora-deepspeed", sdxl_folder, dataset, another_vae)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    result = subprocess.run(
        [*launch, *command(*words, "--mixed_precision", "no", "--resolution", 64, "--max_train_steps", 2,
                           "--output_dir", tmp_path, "--cache_dir", cache_dir)[1:]],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    assert (tmp_path / LORA_FILE).is_file() and (tmp_path / "checkpoint-2").is_dir()


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoint folders


@pytest.fixture
def short(sdxl_folder, dataset, cache_dir, tmp_path):
    """The flags of diffusers' own tests."""
    return (
        f"--pretrained_model_name_or_path {sdxl_folder} --dataset_name {dataset} --resolution 64 --train_batch_size 1 "
        "--gradient_accumulation_steps 1 --learning_rate 5.0e-04 --scale_lr --lr_scheduler constant "
        "--lr_warmup_steps 0 --checkpointing_steps=2 --seed=0 --num_validation_images=0 "
        f"--output_dir {tmp_path} --cache_dir {cache_dir}"
    ).split()


def checkpoints(folder):
    return {name for name in os.listdir(folder) if "checkpoint" in name}


def test_total_limit(short, tmp_path):
    run(*short, "--max_train_steps", 7, "--checkpoints_total_limit", 2)
    assert checkpoints(tmp_path) == {"checkpoint-4", "checkpoint-6"}


def test_total_limit_for_lora_with_text_encoders(short, sdxl_folder, tmp_path):
    run(*short, "--use_lora", "--train_text_encoder", "--max_train_steps", 6, "--checkpoints_total_limit", 2)
    assert checkpoints(tmp_path) == {"checkpoint-4", "checkpoint-6"}
    pipeline = StableDiffusionXLPipeline.from_pretrained(sdxl_folder)
    pipeline.load_lora_weights(tmp_path)
    assert pipeline("a prompt", num_inference_steps=1, height=64, width=64).images


def test_resuming_removes_several_old_checkpoints(short, tmp_path):
    run(*short, "--max_train_steps", 9)
    assert checkpoints(tmp_path) == {"checkpoint-2", "checkpoint-4", "checkpoint-6", "checkpoint-8"}
    run(*short, "--max_train_steps", 11, "--resume_from_checkpoint=checkpoint-8", "--checkpoints_total_limit=3")
    assert checkpoints(tmp_path) == {"checkpoint-6", "checkpoint-8", "checkpoint-10"}


def test_intermediate_checkpoints_load_and_resume(short, sdxl_folder, tmp_path):
    run(*short, "--max_train_steps", 5, "--use_ema")
    assert checkpoints(tmp_path) == {"checkpoint-2", "checkpoint-4"}
    unet = UNet2DConditionModel.from_pretrained(tmp_path, subfolder="checkpoint-2/unet")
    pipeline = StableDiffusionXLPipeline.from_pretrained(sdxl_folder, unet=unet)
    assert pipeline("a prompt", num_inference_steps=1, height=64, width=64).images
    shutil.rmtree(tmp_path / "checkpoint-2")
    run(*short, "--max_train_steps", 7, "--use_ema", "--resume_from_checkpoint=checkpoint-4")
    assert checkpoints(tmp_path) == {"checkpoint-4", "checkpoint-6"}
    assert (tmp_path / "scheduler" / "scheduler_config.json").is_file()
    assert (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").is_file()
