"""The ready-made recipes and the page of flags: they run, and they are up to date."""

import subprocess
import sys

import pytest
import torch
import yaml

import train_sd3_lpl_flow
import train_sdxl_lpl
from lpl_finetuning.errors import UserError
from tests import sd3, sdxl
from tests.runs import ROOT

RECIPES = sorted((ROOT / "configs" / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_run(recipe, sdxl_folder, sd3_folder, pictures, cache_dir, tmp_path):
    """Each trains the tiny pipeline, with only model, data, size and number of steps replaced.

    Quantizing and float16 need a GPU: without one a copy of the recipe that leaves them out.
    """
    text, gpu = recipe.read_text(), torch.cuda.is_available()
    left_out = ("pretrained_vae_", *(() if gpu else ("bnb_", "lpl_vae_dtype: float16")))
    lines = [line for line in text.splitlines() if not line.startswith(left_out)]
    quantized = [line for line in text.splitlines() if line.startswith("bnb_")]
    if quantized:
        assert (recipe.parent / quantized[0].split()[1]).is_file()
    changed = "\n".join(lines) if gpu else "\n".join(lines).replace("mixed_precision: fp16", "mixed_precision: bf16")
    if changed != "\n".join(text.splitlines()):
        recipe = tmp_path / "recipe" / recipe.name
        recipe.parent.mkdir()
        recipe.write_text(changed)
    split = ["--validation_split", 2] if "validation_split" in recipe.read_text() else []
    run, model = (sd3.run, sd3_folder) if recipe.stem.startswith("sd3") else (sdxl.run, sdxl_folder)
    rows = run("--config", recipe, "--pretrained_model_name_or_path", model, "--train_data_dir", pictures,
               "--resolution", 64, "--max_train_steps", 2, "--output_dir", tmp_path, "--cache_dir", cache_dir,
               "--report_to", "none", "--logging_steps", 1, "--validation_prompt", "a red apple",
               "--num_validation_images", 1, *split)  # fmt: skip
    assert len([row for row in rows if "lpl/loss" in row]) == 2
    result = "pytorch_lora_weights.safetensors" if "lora" in recipe.stem else "model_index.json"
    assert (tmp_path / result).is_file() and list((tmp_path / "validation").glob("step-*.png"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_explain_themselves(recipe):
    """The command at the top names the file, and the flags that are not obvious have a reason beside them."""
    text = recipe.read_text()
    assert f"--config configs/recipes/{recipe.name}" in text
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert sum("#" in line for line in lines) >= len(lines) / 4
    assert yaml.safe_load(text)["use_lpl"] is True


@pytest.mark.parametrize("script", [train_sdxl_lpl, train_sd3_lpl_flow])
def test_every_switch_of_a_recipe_can_be_turned_off(script, tmp_path):
    """On the command line, and in a recipe against a default that is on; both forms at once are a mistake."""
    parser = script.build_parser()
    switches = {dest for dest, action in parser.flags().items() if action.nargs == 0}
    assert {"use_lpl", "use_lora", "center_crop", "lpl_pow_law", "push_to_hub"} <= switches
    recipe = tmp_path / "all.yaml"
    for value in (True, False):
        recipe.write_text("".join(f"{name}: {str(value).lower()}\n" for name in switches))
        words = [f"--{name}" if not value else f"--no-{name}" for name in switches]
        args = vars(parser.parse(["--config", str(recipe), *words]))
        assert {args[name] for name in switches} == {not value}
    for name in switches:
        with pytest.raises(UserError, match=f"--{name} and --no-{name} exclude each other"):
            parser.parse([f"--{name}", f"--no-{name}"])
    with pytest.raises(UserError, match="unknown flag --no-rank"):
        parser.parse(["--no-rank"])


def test_there_is_a_recipe_for_each_need():
    assert {path.stem for path in RECIPES} >= {
        "sdxl-lora-8gb",
        "sdxl-lora-16gb",
        "sdxl-full-80gb",
        "sdxl-style-lora",
        "sdxl-subject-lora",
        "sd35-medium-lora",
    }


def test_the_page_of_flags_is_up_to_date():
    """docs/flags.md is what docs/flags.py writes, and has every flag."""
    sys.path.insert(0, str(ROOT / "docs"))
    import flags

    assert (ROOT / "docs" / "flags.md").read_text(encoding="utf-8") == flags.page(), "run python docs/flags.py"
    for script in (train_sdxl_lpl, train_sd3_lpl_flow):
        for name in script.build_parser().flags():
            assert f"`--{name}`" in flags.page()


def test_help_is_readable():
    """In groups, each flag with a line of help."""
    said = subprocess.run(
        [sys.executable, str(ROOT / "train_sdxl_lpl.py"), "--help"], capture_output=True, text=True, check=True
    ).stdout
    for group in ("model:", "LoRA:", "data:", "training:", "latent perceptual loss:", "validation:", "publishing:"):
        assert group in said
    actions = train_sdxl_lpl.build_parser().flags().values()
    assert [action.dest for action in actions if not action.help] == []
