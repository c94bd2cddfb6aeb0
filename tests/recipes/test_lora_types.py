"""LoHa, LoKr and layers with settings of their own, through whole runs of both recipes."""

from pathlib import Path

import pytest
import torch
import yaml
from diffusers import StableDiffusion3Pipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file

import train_sdxl_lpl
from lpl_finetuning.errors import UserError
from lpl_finetuning.lora_files import KOHYA_FILE, LORA_FILE
from lpl_finetuning.results import merging
from tests import sd3, sdxl
from tests.runs import assert_resume_is_exact

DENOISERS = {"sdxl": "unet", "sd3": "transformer"}


def test_a_lokr_with_patterns_resumes_bit_for_bit(flags, tmp_path):
    """Under autocast, with LPL, the average and two rates; the patterns are in config.yaml and on the card."""
    patterns = ["attn2=lr:1e-3", r"to_out\.0$=rank:0"]
    flags = [*flags, "--use_lora", "--lora_type", "lokr", "--rank", 2, "--use_lpl", "--use_ema", "--mixed_precision",
             "bf16", "--output_kohya_format", "--lora_pattern", *patterns]  # fmt: skip
    assert_resume_is_exact(train_sdxl_lpl, flags, tmp_path, steps=2, at=1)
    recipe = yaml.safe_load((tmp_path / "whole" / "config.yaml").read_text())
    assert recipe["lora_pattern"] == patterns and recipe["lora_type"] == "lokr" and recipe["use_dora"] is False
    card = (tmp_path / "whole" / "README.md").read_text()
    assert "A LoKr for" in card and "attn2=lr:1e-3; to_out" in card and "lpl_finetuning.merge" in card
    assert "load_lora_weights" not in card, "diffusers does not read it"
    tensors = load_file(tmp_path / "whole" / LORA_FILE)
    assert tensors and not any("to_out" in name for name in tensors)
    assert all(".lokr_" in name for name in tensors)
    assert any(name.endswith(".lokr_w1") for name in load_file(tmp_path / "whole" / KOHYA_FILE))
    start = flags[: flags.index("--lora_pattern")]
    with pytest.raises(UserError, match=r"lora_pattern was .*, is None"):
        sdxl.run(*start, "--output_dir", tmp_path / "resumed", "--max_train_steps", 3, "--resume_from_checkpoint",
                 "latest")  # fmt: skip


@pytest.fixture
def sd3_flags(sd3_folder, pictures, cache_dir):
    """The flags of a run of the SD3 recipe."""
    return (
        f"--pretrained_model_name_or_path {sd3_folder} --train_data_dir {pictures} --cache_dir {cache_dir} "
        "--resolution 64 --train_batch_size 4 --report_to none --seed 3 --logging_steps 1 --mixed_precision no"
    ).split()


def test_a_loha_of_sd3_is_continued_from_its_file_for_others(sd3_flags, tmp_path):
    """With LPL; a rate of zero leaves every value as it is."""
    flags = [*sd3_flags, "--use_lora", "--use_lpl", "--output_kohya_format", "--max_train_steps", 1]
    sd3.run(*flags, "--lora_type", "loha", "--lora_blocks", "0,1", "--rank", 2, "--learning_rate", 0.1,
            "--output_dir", tmp_path / "a")  # fmt: skip
    before = load_file(tmp_path / "a" / LORA_FILE)
    assert any(value.abs().max() > 0 for name, value in before.items() if name.endswith("hada_w2_b"))
    sd3.run(*flags, "--init_lora", tmp_path / "a" / KOHYA_FILE, "--learning_rate", 0, "--output_dir", tmp_path / "b")
    after = load_file(tmp_path / "b" / LORA_FILE)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_a_dora_for_other_programs_is_continued(flags, tmp_path):
    """The file for ComfyUI has magnitudes of another meaning, which are turned back."""
    flags = [*flags, "--use_lora", "--max_train_steps", 1, "--output_kohya_format"]
    sdxl.run(
        *flags, "--lora_type", "dora", "--lora_layers", "to_q", "--learning_rate", 0.1, "--output_dir", tmp_path / "a"
    )
    assert any(name.endswith("dora_scale") for name in load_file(tmp_path / "a" / KOHYA_FILE))
    sdxl.run(*flags, "--init_lora", tmp_path / "a" / KOHYA_FILE, "--learning_rate", 0, "--output_dir", tmp_path / "b")
    before, after = load_file(tmp_path / "a" / LORA_FILE), load_file(tmp_path / "b" / LORA_FILE)
    assert before.keys() == after.keys()
    assert all(torch.allclose(before[name], after[name], rtol=1e-5, atol=1e-6) for name in before)


@pytest.mark.parametrize(("family", "more"), [
    ("sdxl", ["--lora_type", "dora", "--train_text_encoder", "--prediction_type", "v_prediction"]),
    ("sd3", ["--use_lpl", "--timestep_shift", "1.5"]),
])  # fmt: skip
def test_a_run_ends_in_a_whole_model_too(family, more, request, tmp_path, capsys):
    """--merge_into: the weights are those that diffusers makes of the base model and the LoRA. The plan names it."""
    flags = request.getfixturevalue("flags" if family == "sdxl" else "sd3_flags")
    cls, script = {"sdxl": (StableDiffusionXLPipeline, sdxl), "sd3": (StableDiffusion3Pipeline, sd3)}[family]
    whole, lora = tmp_path / "whole", tmp_path / "lora"
    flags = [*flags, "--use_lora", *more, "--learning_rate", 0.01, "--merge_into", whole]
    script.run(*flags, "--max_train_steps", 1, "--checkpointing_steps", 1, "--output_dir", lora)
    assert f"Result: a whole model in {whole} too" in capsys.readouterr().out
    expected = cls.from_pretrained(flags[flags.index("--pretrained_model_name_or_path") + 1])
    before = {name: value.clone() for name, value in expected.components[DENOISERS[family]].state_dict().items()}
    expected.load_lora_weights(lora)
    expected.fuse_lora(components=[name for name in (*DENOISERS.values(), "text_encoder", "text_encoder_2")
                                   if name in expected._lora_loadable_modules])  # fmt: skip
    expected.unload_lora_weights()
    found, changed = cls.from_pretrained(whole), 0
    for part in (DENOISERS[family], "text_encoder", "text_encoder_2"):
        ours, theirs = found.components[part].state_dict(), expected.components[part].state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.allclose(ours[name], theirs[name], rtol=1e-5, atol=1e-6) for name in ours)
        changed += sum(not torch.equal(ours[name], before[name]) for name in ours if name in before)
    assert changed
    if family == "sd3":
        assert found.scheduler.config.shift == expected.scheduler.config.shift != 1.5, "sampled as the LoRA is"
    else:
        assert found.scheduler.config.prediction_type == "v_prediction"
    with pytest.raises(UserError, match=f"--merge_into {whole} is there already"):
        script.run(*flags, "--max_train_steps", 1, "--output_dir", tmp_path / "another")
    script.run(*flags, "--max_train_steps", 2, "--resume_from_checkpoint", "latest", "--output_dir", lora)
    later = cls.from_pretrained(whole).components[DENOISERS[family]].state_dict()
    assert any(
        not torch.equal(later[name], value) for name, value in found.components[DENOISERS[family]].state_dict().items()
    )
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "whole-before-1", "lora"}, "nothing is deleted"
    assert str(tmp_path) not in (whole / "merged.json").read_text()


@pytest.mark.parametrize("words", [
    "--merge_into out --output_dir out/lora",
    "--merge_into out/logs --output_dir out",
    "--merge_into out --output_dir out",
    "--merge_into base/x --output_dir out --pretrained_model_name_or_path base",
])  # fmt: skip
def test_a_whole_model_lies_apart_from_the_run(words, flags, tmp_path, monkeypatch):
    """It would replace the folder that the run reads or writes."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").symlink_to(flags[list(flags).index("--pretrained_model_name_or_path") + 1])
    flags = [*flags, "--use_lora", "--max_train_steps", 1]
    with pytest.raises(UserError, match="lie in each other"):
        sdxl.run(*flags, *words.split())
    for folder, told in (("/proc", "is a mount point"), (Path(__file__) / "x", "is a file; name a folder")):
        with pytest.raises(UserError, match=told):
            sdxl.run(*flags, "--output_dir", "out", "--merge_into", folder)


def test_what_comes_into_the_way_of_a_whole_model_is_kept(flags, tmp_path, monkeypatch, capsys):
    """Another's folder, made during the run, gets another name. A merge that fails is a warning: the LoRA is there."""
    flags = [*flags, "--use_lora", "--max_train_steps", 1, "--merge_into", tmp_path / "whole"]
    merge = merging.add_lora

    def meanwhile(*args):
        (tmp_path / "whole").mkdir()
        (tmp_path / "whole" / "mine.txt").touch()
        return merge(*args)

    monkeypatch.setattr(merging, "add_lora", meanwhile)
    sdxl.run(*flags, "--output_dir", tmp_path / "a")
    assert (tmp_path / "whole-before-1" / "mine.txt").is_file() and (tmp_path / "whole" / "unet").is_dir()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(merging, "add_lora", full)
    sdxl.run(*flags[:-1], tmp_path / "more", "--output_dir", tmp_path / "b")
    assert "could not be written" in capsys.readouterr().err
    assert (tmp_path / "b" / LORA_FILE).is_file() and (tmp_path / "b" / "README.md").is_file()
    assert not (tmp_path / "more").exists()
