"""A LoRA on a quantized denoiser, both recipes: what can be checked anywhere, and the run itself on a GPU."""

import json

import pytest
import torch
from safetensors.torch import load_file

from lpl_finetuning.errors import UserError
from lpl_finetuning.lora_files import LORA_FILE
from tests import sd3, sdxl

CONFIGS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16"},
    "int8": {"load_in_8bit": True},
}


@pytest.fixture(params=["sdxl", "sd3"])
def recipe(request, flags, sd3_folder):
    """(run, flags) of each recipe."""
    if request.param == "sdxl":
        return sdxl.run, [*flags, "--use_lora", "--max_train_steps", 3]
    return sd3.run, [*flags, "--use_lora", "--max_train_steps", 3, "--pretrained_model_name_or_path", sd3_folder]


@pytest.mark.skipif(torch.cuda.is_available(), reason="what happens without a GPU")
def test_without_a_gpu_it_is_refused_before_weights_load(recipe, tmp_path):
    run, flags = recipe
    path = tmp_path / "nf4.json"
    path.write_text(json.dumps(CONFIGS["nf4"]))
    with pytest.raises(UserError, match=r"--bnb_quantization_config_path.* needs a (CUDA )?GPU"):
        run(*flags, "--bnb_quantization_config_path", path, "--output_dir", tmp_path / "out")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no such file"),
        ("{", "not valid JSON"),
        ("[]", "load_in_4bit"),
        ('{"load_in_4bit": false}', "load_in_8bit"),
    ],
)
def test_a_wrong_file_is_told(content, said, recipe, tmp_path):
    run, flags = recipe
    path = tmp_path / "config.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=said):
        run(*flags, "--bnb_quantization_config_path", path, "--output_dir", tmp_path / "out")


def test_only_with_lora(recipe, tmp_path):
    run, flags = recipe
    flags = [flag for flag in flags if flag != "--use_lora"]
    with pytest.raises(UserError, match="does nothing without --use_lora"):
        run(*flags, "--bnb_quantization_config_path", "x.json", "--output_dir", tmp_path)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="diffusers quantizes on GPUs only; see --gpu")
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_quantized_base_trains(kind, recipe, tmp_path):
    """The losses are near those of the unquantized base, and the LoRA is float32."""
    run, flags = recipe
    flags = [*flags, "--mixed_precision", "bf16"]
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIGS[kind]))
    exact = run(*flags, "--output_dir", tmp_path / "exact")
    rows = run(*flags, "--bnb_quantization_config_path", path, "--output_dir", tmp_path / "quantized")
    assert rows[-1]["diffusion_loss"] == pytest.approx(exact[-1]["diffusion_loss"], rel=0.1)
    tensors = load_file(tmp_path / "quantized" / LORA_FILE)
    assert {value.dtype for value in tensors.values()} == {torch.float32}
    assert any(value.any() for name, value in tensors.items() if "lora_B" in name)
