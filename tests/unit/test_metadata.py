"""What files for other programs say: the tags, the base model, the architecture, the title."""

import hashlib
import json
from types import SimpleNamespace

import pytest
import torch

import train_sd3_lpl_flow
import train_sdxl_lpl
from lpl_finetuning.data.samples import CaptionRules
from lpl_finetuning.results import metadata
from lpl_finetuning.tensor_files import sha256_of_tensors, write_tensors


def captioned(*captions):
    return SimpleNamespace(captions=captions)


def test_tags_by_frequency():
    """Each tag once a caption, with the trigger word; the most frequent first, then by name; the rarest are cut."""
    images = [captioned("cat, red", "cat,  cat, "), captioned("red, a dog on grass")]
    found = metadata.tag_frequency(images, CaptionRules(trigger_word="sks"))
    assert list(found.items()) == [("sks", 3), ("cat", 2), ("red", 2), ("a dog on grass", 1)]
    many = [captioned(*(f"tag {number}" for number in range(metadata.MOST_TAGS + 5)))]
    assert len(metadata.tag_frequency(many, CaptionRules())) == metadata.MOST_TAGS


def test_the_base_model_is_named_where_that_tells_no_path(tmp_path):
    """A name on the Hub; the single file that a folder was converted from, with its kept hash; no other folder."""

    def source(name):
        return metadata.base_source(SimpleNamespace(name=str(name)))

    assert source("someone/base-xl") == ("someone/base-xl", None)
    assert source(tmp_path) == (None, None)
    (tmp_path / metadata.SOURCE).write_text(json.dumps({"file": "pony.safetensors", "sha256": "ab" * 32}))
    assert source(tmp_path) == ("pony.safetensors", "ab" * 32)


@pytest.mark.parametrize(("config", "architecture"), [
    ({}, "stable-diffusion-xl-v1-base"),
    ({"qk_norm": None}, "stable-diffusion-v3-medium"),
    ({"qk_norm": "rms_norm", "dual_attention_layers": (0,)}, "stable-diffusion-v3.5-medium"),
    ({"qk_norm": "rms_norm", "dual_attention_layers": ()}, "stable-diffusion-v3.5-large"),
])  # fmt: skip
def test_the_architecture_of_modelspec(config, architecture):
    class Config(dict):
        __getattr__ = dict.get

    script = train_sd3_lpl_flow if config else train_sdxl_lpl
    config = Config(config, joint_attention_dim=4) if config else Config()
    args = script.parse_args(["--output_dir", "never-made"])
    said = metadata.modelspec(args, config, "v_prediction", is_lora=True)
    assert said["modelspec.architecture"] == architecture + "/lora"
    assert said["modelspec.prediction_type"] == "v" and said["modelspec.title"] == "never-made"
    assert "modelspec.trigger_phrase" not in said
    said = metadata.modelspec(args.but(hub_model_id="me/on-hub"), config, "flow", is_lora=False)
    assert said["modelspec.architecture"] == architecture and said["modelspec.title"] == "on-hub"
    assert "modelspec.prediction_type" not in said


def test_the_hash_is_that_of_the_bytes_behind_the_header(tmp_path):
    tensors = {"b": torch.arange(3.0), "a": torch.arange(2, dtype=torch.float16), "c": torch.tensor([])}
    write_tensors(tmp_path / "x.safetensors", tensors, {"any": "thing"})
    content = (tmp_path / "x.safetensors").read_bytes()
    behind = content[8 + int.from_bytes(content[:8], "little") :]
    assert sha256_of_tensors(tensors) == hashlib.sha256(behind).hexdigest()
