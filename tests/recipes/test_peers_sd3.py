"""The command lines of diffusers' DreamBooth scripts for SD3, as far as they apply to fine-tuning on captioned images.

Those of examples/dreambooth/README_sd3.md, read in November 2026. A folder without captions takes --instance_prompt.
"""

import shlex

import pytest
from diffusers import StableDiffusion3Pipeline
from PIL import Image
from safetensors.torch import load_file

import train_sd3_lpl_flow
from lpl_finetuning.data import scan as scan_module
from lpl_finetuning.flags import data_source
from lpl_finetuning.lora_files import LORA_FILE
from tests.sd3 import run

COMMANDS = {
    "full": """--pretrained_model_name_or_path=$MODEL_NAME --instance_data_dir=$INSTANCE_DIR --output_dir=$OUTPUT_DIR
        --mixed_precision="fp16" --instance_prompt="a photo of sks dog" --resolution=1024 --train_batch_size=1
        --gradient_accumulation_steps=4 --learning_rate=1e-4 --report_to="wandb" --lr_scheduler="constant"
        --lr_warmup_steps=0 --max_train_steps=500 --validation_prompt="A photo of sks dog in a bucket"
        --validation_epochs=25 --seed="0" --push_to_hub""",
    "lora": """--use_lora --pretrained_model_name_or_path=$MODEL_NAME --instance_data_dir=$INSTANCE_DIR
        --output_dir=$OUTPUT_DIR --mixed_precision="fp16" --instance_prompt="a photo of sks dog" --resolution=512
        --train_batch_size=1 --gradient_accumulation_steps=4 --learning_rate=4e-4 --report_to="wandb"
        --lr_scheduler="constant" --lr_warmup_steps=0 --max_train_steps=500
        --validation_prompt="A photo of sks dog in a bucket" --validation_epochs=25 --seed="0" --push_to_hub""",
    "lora-text": """--use_lora --pretrained_model_name_or_path=$MODEL_NAME --output_dir=$OUTPUT_DIR
        --dataset_name=$DATASET_NAME --instance_prompt="a photo of TOK yarn art dog" --resolution=1024
        --train_batch_size=1 --train_text_encoder --gradient_accumulation_steps=1 --optimizer="prodigy"
        --learning_rate=1.0 --text_encoder_lr=1.0 --report_to="wandb" --lr_scheduler="constant" --lr_warmup_steps=0
        --max_train_steps=1500 --rank=32 --seed="0" --push_to_hub""",
}
FLAGS = """pretrained_model_name_or_path revision variant dataset_name dataset_config_name instance_data_dir cache_dir
    image_column caption_column instance_prompt max_sequence_length validation_prompt num_validation_images
    validation_epochs rank output_dir seed resolution center_crop random_flip train_text_encoder train_batch_size
    num_train_epochs max_train_steps checkpointing_steps checkpoints_total_limit resume_from_checkpoint
    gradient_accumulation_steps gradient_checkpointing learning_rate text_encoder_lr scale_lr lr_scheduler
    lr_warmup_steps lr_num_cycles lr_power dataloader_num_workers weighting_scheme logit_mean logit_std mode_scale
    precondition_outputs optimizer use_8bit_adam adam_beta1 adam_beta2 adam_weight_decay adam_epsilon max_grad_norm
    push_to_hub hub_token hub_model_id logging_dir allow_tf32 report_to mixed_precision local_rank lora_layers
    lora_blocks"""


@pytest.fixture
def bare_pictures(pictures, tmp_path):
    """A folder of images without captions."""
    folder = tmp_path / "dog"
    folder.mkdir()
    for path in pictures.glob("*.png"):
        Image.open(path).save(folder / path.name)
    return folder


@pytest.fixture
def bare_dataset(bare_pictures, tmp_path):
    """The same as a data set with an image column alone."""
    import datasets

    images = [str(path) for path in sorted(bare_pictures.glob("*.png"))]
    dataset = datasets.Dataset.from_dict({"image": images}).cast_column("image", datasets.Image())
    dataset.save_to_disk(tmp_path / "yarn")
    return tmp_path / "yarn"


def test_their_flags_are_known():
    known = train_sd3_lpl_flow.build_parser().flags()
    assert [name for name in FLAGS.split() if name not in known] == []


@pytest.mark.parametrize("name", COMMANDS)
def test_their_commands_parse_and_run(name, sd3_folder, bare_pictures, bare_dataset, cache_dir, tmp_path):
    """Unchanged for the parser; run on the CPU in full precision, without wandb and push, small and short."""
    text = COMMANDS[name]
    for variable, value in {"MODEL_NAME": sd3_folder, "INSTANCE_DIR": bare_pictures, "DATASET_NAME": bare_dataset,
                            "OUTPUT_DIR": tmp_path / "out"}.items():  # fmt: skip
        text = text.replace(f"${variable}", str(value))
    words = shlex.split(text)
    train_sd3_lpl_flow.build_parser().parse(words)
    words = [word for word in words if word not in ("--push_to_hub", "--report_to=wandb")]
    words += ["--mixed_precision", "no", "--resolution", "64", "--max_train_steps", "2", "--cache_dir", str(cache_dir)]
    args = train_sd3_lpl_flow.parse_args(words)
    scan, _ = scan_module.find_images(data_source(args))
    assert {image.caption for image in scan.images} == {args.instance_prompt} and len(scan.images) == 6
    run(*words)
    pipeline = StableDiffusion3Pipeline.from_pretrained(sd3_folder if args.use_lora else tmp_path / "out")
    if args.use_lora:
        pipeline.load_lora_weights(tmp_path / "out")
        parts = {key.split(".")[0] for key in load_file(tmp_path / "out" / LORA_FILE)}
        assert parts == (
            {"transformer", "text_encoder", "text_encoder_2"} if args.train_text_encoder else {"transformer"}
        )
    assert pipeline("a prompt", num_inference_steps=1, height=64, width=64).images


def test_captions_of_their_own_win_over_the_instance_prompt(pictures, tmp_path, flags):
    folder = tmp_path / "mixed"
    folder.mkdir()
    for number, path in enumerate(sorted(pictures.glob("*.png"))):
        Image.open(path).save(folder / path.name)
        if number == 2:
            (folder / path.with_suffix(".txt").name).write_text("its own")
    args = train_sd3_lpl_flow.build_parser().parse(["--instance_prompt", "a dog", "--train_data_dir", str(folder)])
    scan, _ = scan_module.find_images(data_source(args))
    assert [image.caption for image in scan.images] == ["a dog", "a dog", "its own", "a dog", "a dog", "a dog"]
