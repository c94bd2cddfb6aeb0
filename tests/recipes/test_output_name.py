"""Files for other programs: their names, what they say of themselves, and one with every checkpoint."""

import hashlib
import json
import re

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors import safe_open
from safetensors.torch import load_file

import train_sdxl_lpl
from lpl_finetuning.errors import UserError
from lpl_finetuning.lora_files import LORA_FILE, lora_file
from lpl_finetuning.results.hub import publishable_files
from lpl_finetuning.training.checkpoint_folders import verify_checkpoint
from tests import sd3, sdxl


def metadata(path):
    with safe_open(path, "np") as file:
        return file.metadata()


def hash_behind_header(path):
    content = path.read_bytes()
    return hashlib.sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()


def test_a_lora_for_other_programs_has_a_name_and_says_what_it_is(flags, sdxl_folder, tmp_path):
    """The file has the name, diffusers' file keeps its own; the checkpoint has a file of the averaged weights."""
    out = tmp_path / "out"
    flags = [*flags, "--use_lora", "--use_lpl", "--use_ema", "--output_kohya_format", "--checkpoints_kohya_format",
             "--output_name", "my [style]", "--metadata_trigger_phrase", "in my style", "--trigger_word", "sks",
             "--max_train_steps", 3, "--checkpointing_steps", 2, "--output_dir", out]  # fmt: skip
    sdxl.run(*flags)
    file, step = out / "my [style].safetensors", out / "checkpoint-2" / "my [style]-step00000002.safetensors"
    assert sorted(path.name for path in out.glob("*.safetensors")) == sorted([LORA_FILE, file.name])
    said = metadata(file)
    sha256 = hash_behind_header(file)
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ", said.pop("modelspec.date"))
    tags = json.loads(said.pop("ss_tag_frequency"))["my [style]"]
    assert next(iter(tags.items())) == ("sks", 6) and len(tags) > 2, "the most frequent tag first"
    for key, value in {
        "modelspec.sai_model_spec": "1.0.0", "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.implementation": "sgm", "modelspec.title": "my [style]", "modelspec.resolution": "64x64",
        "modelspec.prediction_type": "epsilon", "modelspec.trigger_phrase": "in my style",
        "modelspec.hash_sha256": f"0x{sha256}", "sshs_model_hash": sha256, "ss_output_name": "my [style]",
        "ss_base_model_version": "sdxl_base_v1-0", "ss_network_dim": "4", "ss_resolution": "(64, 64)",
        "ss_steps": "3", "ss_max_train_steps": "3", "ss_num_train_images": "6", "ss_epoch": "2",
        "ss_learning_rate": "0.001", "ss_training_comment": "with the latent perceptual loss",
    }.items():  # fmt: skip
        assert said[key] == value, key
    assert str(tmp_path) not in json.dumps(said) and "ss_sd_model_name" not in said, "no local path"
    card = (out / "README.md").read_text()
    assert "`in my style`" in card and "| file for other programs | my [style].safetensors |" in card

    assert metadata(step)["ss_steps"] == "2" and verify_checkpoint(step.parent) is None
    raw = [value for name, value in load_file(step.parent / LORA_FILE).items() if "lora_B" in name]
    average = [value for name, value in load_file(step).items() if "lora_up" in name]
    assert len(raw) == len(average) and not any(torch.equal(a, b) for a in raw for b in average), "of the average"
    assert lora_file("--init_lora", out).name == lora_file("--init_lora", step.parent).name == LORA_FILE
    pipeline = StableDiffusionXLPipeline.from_pretrained(sdxl_folder)
    pipeline.load_lora_weights(out)
    assert file in publishable_files(out)
    sdxl.run(*flags[:-6], "--no-save_tag_frequency", "--max_train_steps", 3, "--checkpointing_steps", 2,
             "--resume_from_checkpoint", "latest", "--output_dir", out)  # fmt: skip
    assert "ss_tag_frequency" not in metadata(file) and metadata(file)["ss_steps"] == "3"
    sdxl.run(*flags[:-6], "--max_train_steps", 1, "--output_dir", out)
    assert (out / "previous-1" / file.name).is_file() and file.is_file()


def test_a_whole_model_for_other_programs(sd3_folder, pictures, cache_dir, tmp_path):
    """SD3 in a single file under a name of its own, beside the pipeline."""
    sd3.run("--pretrained_model_name_or_path", sd3_folder, "--train_data_dir", pictures, "--cache_dir", cache_dir,
            "--resolution", 64, "--train_batch_size", 2, "--lr_warmup_steps", 0, "--report_to", "none",
            "--mixed_precision", "no", "--max_train_steps", 1, "--single_file", "--output_name", "my-sd3",
            "--metadata_title", "My model", "--output_dir", tmp_path)  # fmt: skip
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["my-sd3.safetensors"]
    said = metadata(tmp_path / "my-sd3.safetensors")
    assert said["modelspec.architecture"] == "stable-diffusion-v3-medium" and said["modelspec.title"] == "My model"
    assert "modelspec.prediction_type" not in said and "ss_tag_frequency" not in said
    assert tmp_path / "my-sd3.safetensors" in publishable_files(tmp_path)


@pytest.mark.parametrize(("name", "message"), [
    ("a/b", "can't be the name of a file everywhere"), ("a:b", "can't be the name of a file everywhere"),
    (".a", "can't be the name of a file everywhere"), ("a ", "can't be the name of a file everywhere"),
    ("", "can't be the name of a file everywhere"), ("ä" * 101, "give 1 to 200 letters"),
    ("a.safetensors", "leave .safetensors out, which is appended"),
    ("my_pytorch_lora_weights", "ends like diffusers' own file pytorch_lora_weights"),
])  # fmt: skip
def test_names_that_no_file_should_have(name, message, tmp_path):
    with pytest.raises(UserError, match=f"--output_name.*{message}"):
        train_sdxl_lpl.parse_args(["--use_lora", "--output_kohya_format", "--output_name", name, "--output_dir",
                                   str(tmp_path / "out")])  # fmt: skip
