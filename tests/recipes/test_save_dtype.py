"""The dtypes of a result: what was trained follows --save_dtype, the rest keeps what the base model has."""

import json
import shutil

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import load_file
from transformers import T5EncoderModel

import train_sd3_lpl_flow
import train_sdxl_lpl
from lpl_finetuning.lora_files import LORA_FILE
from lpl_finetuning.results.export import KOHYA_FILE
from tests.runs import run

HALF = {"text_encoder_2": torch.float16, "text_encoder_3": torch.bfloat16, "vae": torch.float16}


@pytest.fixture
def mixed_base(sd3_folder, tmp_path):
    """An SD3 whose parts have several dtypes on disk."""
    folder = shutil.copytree(sd3_folder, tmp_path / "base")
    for part, dtype in HALF.items():
        if part == "text_encoder_3":
            T5EncoderModel.from_pretrained(folder / part).to(dtype).save_pretrained(folder / part)
            continue
        getattr(StableDiffusion3Pipeline.from_pretrained(folder), part).to(dtype).save_pretrained(folder / part)
    return folder


def dtypes(*files):
    """The dtypes of the floating-point tensors in files."""
    return {value.dtype for file in files for value in load_file(file).values() if value.is_floating_point()}


@pytest.mark.parametrize("save_dtype", [None, "bfloat16"])
def test_a_whole_model(save_dtype, mixed_base, flags, tmp_path):
    more = ["--save_dtype", save_dtype] if save_dtype else []
    folder = tmp_path / "out"
    run(train_sd3_lpl_flow, *flags, "--pretrained_model_name_or_path", mixed_base, "--single_file", *more,
        "--max_train_steps", 1, "--checkpointing_steps", 1, "--output_dir", folder)  # fmt: skip
    trained = torch.bfloat16 if save_dtype else torch.float32
    wanted = {"text_encoder": torch.float32, "transformer": trained} | HALF
    for part, dtype in wanted.items():
        assert dtypes(*(folder / part).glob("*.safetensors")) == {dtype}, part
    assert dtypes(folder / "model.safetensors") == {torch.bfloat16 if save_dtype else torch.float16}
    exact = load_file(folder / "checkpoint-1/transformer/diffusion_pytorch_model.safetensors")
    saved = load_file(folder / "transformer/diffusion_pytorch_model.safetensors")
    assert exact.keys() == saved.keys()
    assert all(torch.equal(value.to(trained), saved[name]) for name, value in exact.items())
    for part in HALF:  # untouched to the last bit
        [file] = (folder / part).glob("*.safetensors")
        before = load_file(mixed_base / part / file.name)
        assert all(torch.equal(value, before[name]) for name, value in load_file(file).items())
    assert f"saved in | {save_dtype or 'float32'}" in (folder / "README.md").read_text()


def test_a_lora(flags, sdxl_folder, tmp_path):
    """Both its files, in half precision; it can be gone on from, and the checkpoint has all its bits."""
    shape = [*flags, "--use_lora", "--output_kohya_format", "--max_train_steps", 1, "--checkpointing_steps", 1]
    run(train_sdxl_lpl, *shape, "--save_dtype", "float16", "--output_dir", tmp_path / "lora")
    saved, exact = (load_file(tmp_path / "lora" / name) for name in (LORA_FILE, f"checkpoint-1/{LORA_FILE}"))
    assert {value.dtype for value in exact.values()} == {torch.float32}
    assert all(torch.equal(value.half(), saved[name]) for name, value in exact.items())
    kohya = load_file(tmp_path / "lora" / KOHYA_FILE)
    assert {value.dtype for name, value in kohya.items() if not name.endswith(".alpha")} == {torch.float16}
    manifest = json.loads((tmp_path / "lora/checkpoint-1/manifest.json").read_text())
    assert "training_state.safetensors" in manifest["files"]
    run(train_sdxl_lpl, *flags, "--use_lora", "--init_lora", tmp_path / "lora", "--max_train_steps", 1,
        "--output_dir", tmp_path / "again")  # fmt: skip
