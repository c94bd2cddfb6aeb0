"""Pickled weights: refused before they are read, and never run."""

import json
import pickle
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train_sd3_lpl_flow
import train_sdxl_lpl
from lpl_finetuning import base_model, errors
from tests import runs
from tests.runs import command, weights

RECIPES = {
    "sdxl": (train_sdxl_lpl, ("vae", "text_encoder", "text_encoder_2", "unet")),
    "sd3": (train_sd3_lpl_flow, ("vae", "text_encoder", "text_encoder_2", "text_encoder_3", "transformer")),
}
CASES = [(recipe, component) for recipe, (_, components) in RECIPES.items() for component in components]


class Canary:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def flags_for(model, pictures, cache_dir, output_dir):
    """The flags of a LoRA in two steps."""
    return (
        f"--pretrained_model_name_or_path {model} --train_data_dir {pictures} --cache_dir {cache_dir} --resolution 64 "
        "--train_batch_size 2 --max_train_steps 2 --lr_warmup_steps 0 --report_to none --mixed_precision no "
        f"--use_lora --use_lpl --output_dir {output_dir}"
    ).split()


@pytest.fixture
def model(request, tmp_path):
    """Function recipe -> a copy of its tiny model, to be changed."""

    def copy(recipe):
        return Path(shutil.copytree(request.getfixturevalue(f"{recipe}_folder"), tmp_path / "model"))

    return copy


def pickle_weights(folder, content=None):
    """Put a .bin in the place of a component's safetensors: its weights, or `content`."""
    [safe] = folder.glob("*.safetensors")
    name = "diffusion_pytorch_model.bin" if safe.name.startswith("diffusion") else "pytorch_model.bin"
    if content is None:
        torch.save(load_file(safe), folder / name)
    else:
        (folder / name).write_bytes(pickle.dumps(content))
    safe.unlink()


def refused(script, flags):
    with pytest.raises(errors.UserError) as caught:
        script.parse_args(flags)
    return str(caught.value)


@pytest.mark.parametrize(("recipe", "component"), CASES)
def test_a_pickle_is_refused_by_its_name(model, recipe, component, pictures, tmp_path):
    script, folder = RECIPES[recipe][0], model(recipe)
    canary = tmp_path / "canary"
    pickle_weights(folder / component, Canary(canary))
    said = refused(script, flags_for(folder, pictures, tmp_path, tmp_path / "out"))
    assert (
        f"{folder}: {component}/ has only pickled weights (" in said and ".bin)" in said and "--allow_pickle" in said
    )
    assert not canary.exists()


def test_refused_in_a_process_before_torch_is_imported(model, pictures, tmp_path):
    folder = model("sdxl")
    pickle_weights(folder / "unet", Canary(tmp_path / "canary"))
    words = command(train_sdxl_lpl, *flags_for(folder, pictures, tmp_path, tmp_path / "out"))
    done = subprocess.run([words[0], "-X", "importtime", *words[1:]], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "error: --pretrained_model_name_or_path" in done.stderr
    assert "lpl_finetuning.flags" in done.stderr and " torch\n" not in done.stderr
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(("recipe", "component"), CASES)
def test_the_loaders_refuse_a_pickle_by_themselves(model, recipe, component, pictures, tmp_path, monkeypatch):
    """As with a model on the Hub whose files could not be listed."""
    script, folder = RECIPES[recipe][0], model(recipe)
    pickle_weights(folder / component)
    monkeypatch.setattr(base_model, "check_weights", lambda base: None)
    args = script.parse_args(flags_for(folder, pictures, tmp_path, tmp_path / "out"))

    def load():
        if component == "vae":
            return script.load_vae(args.base_model, torch.float32, "cpu")
        if component == "text_encoder_3":
            return script.load_t5(args, torch.float32, "cpu")
        if component.startswith("text"):
            return script.load_text_encoders(args, torch.float32, "cpu")
        return script.build_denoiser(args, torch.float32, "cpu")

    with pytest.raises(OSError, match="safetensors"):
        load()
    args = args.but(base_model=replace(args.base_model, allow_pickle=True))
    load()


@pytest.mark.parametrize(("recipe", "component"), CASES)
def test_a_pickle_that_is_allowed_is_read_as_weights_only(model, recipe, component, pictures, cache_dir, tmp_path):
    """Even then no program in it runs."""
    script, folder = RECIPES[recipe][0], model(recipe)
    canary = tmp_path / "canary"
    pickle_weights(folder / component, Canary(canary))
    with pytest.raises(Exception, match=r"(?i)weights.only|unpickl|corrupt|unable to load|_pickle"):
        runs.run(script, *flags_for(folder, pictures, cache_dir, tmp_path / "out"), "--allow_pickle")
    assert not canary.exists()


@pytest.mark.parametrize("recipe", RECIPES)
def test_honest_pickles_train_to_the_same_weights(request, model, recipe, pictures, tmp_path):
    """Both encode the pictures themselves, in the same batches: another batch may change the last bit."""
    script, components = RECIPES[recipe]
    folder = model(recipe)
    for component in components:
        pickle_weights(folder / component)
    runs.run(script, *flags_for(folder, pictures, tmp_path / "cache", tmp_path / "bin"), "--allow_pickle")
    safe = request.getfixturevalue(f"{recipe}_folder")
    runs.run(script, *flags_for(safe, pictures, tmp_path / "cache", tmp_path / "safe"))
    assert weights(tmp_path / "bin") == weights(tmp_path / "safe")


def test_what_another_flag_names_is_looked_at_in_its_place(model, sdxl_folder, pictures, tmp_path):
    folder = model("sdxl")
    pickle_weights(folder / "unet", Canary(tmp_path / "canary"))
    flags = flags_for(folder, pictures, tmp_path, tmp_path / "out")
    train_sdxl_lpl.parse_args([*flags, "--pretrained_unet_model_name_or_path", str(sdxl_folder)])
    flags = flags_for(sdxl_folder, pictures, tmp_path, tmp_path / "out")
    for other in (folder, folder / "unet"):
        said = refused(train_sdxl_lpl, [*flags, "--pretrained_unet_model_name_or_path", str(other)])
        inside = "unet/ " if other == folder else ""
        assert f"--pretrained_unet_model_name_or_path {other}: {inside}has only pickled weights" in said
    pickle_weights(folder / "vae", Canary(tmp_path / "canary"))
    said = refused(train_sdxl_lpl, [*flags, "--pretrained_vae_model_name_or_path", str(folder / "vae")])
    assert f"--pretrained_vae_model_name_or_path {folder / 'vae'}: has only pickled weights" in said


@pytest.mark.parametrize("form", ["variant", "shards", "variant shards", "legacy variant shards"])
def test_the_names_that_weights_have(model, pictures, tmp_path, form):
    folder = model("sdxl")
    flags = flags_for(folder, pictures, tmp_path, tmp_path / "out")
    old = folder / "unet" / "diffusion_pytorch_model.safetensors"
    new = {
        "variant": "diffusion_pytorch_model.fp16.safetensors",
        "shards": "diffusion_pytorch_model-00001-of-00002.safetensors",
        "variant shards": "diffusion_pytorch_model.fp16-00001-of-00002.safetensors",
        "legacy variant shards": "diffusion_pytorch_model-00001-of-00002.fp16.safetensors",
    }[form]
    old.rename(folder / "unet" / new)
    if form == "shards":
        train_sdxl_lpl.parse_args(flags)
        return
    assert "unet/ has no weights without a variant; it has those of --variant fp16" in refused(train_sdxl_lpl, flags)
    said = refused(train_sdxl_lpl, [*flags, "--variant", "fp16"])
    assert "vae/ has no weights of --variant fp16; it has others: leave --variant out" in said
    for component in ("vae", "text_encoder", "text_encoder_2"):
        [path] = (folder / component).glob("*.safetensors")
        path.rename(path.with_suffix(".fp16.safetensors"))
    train_sdxl_lpl.parse_args([*flags, "--variant", "fp16"])


def test_a_folder_without_weights(model, pictures, tmp_path):
    folder = model("sdxl")
    (folder / "text_encoder" / "model.safetensors").unlink()
    said = refused(train_sdxl_lpl, flags_for(folder, pictures, tmp_path, tmp_path / "out"))
    assert "text_encoder/ has no weights" in said and "download the model again" in said


def test_no_code_is_taken_from_a_model(model, pictures, cache_dir, tmp_path):
    """A pipeline and configurations that name code of their own: it stays where it is."""
    folder = model("sdxl")
    code = f"import pathlib\npathlib.Path({str(tmp_path / 'canary')!r}).touch()\n"
    for place in (folder, folder / "unet", folder / "tokenizer"):
        (place / "pipeline.py").write_text(code)
    for config in (folder / "unet" / "config.json", folder / "text_encoder" / "config.json"):
        content = json.loads(config.read_text())
        names = {"AutoModel": "pipeline.Model", "AutoConfig": "pipeline.Config"}
        config.write_text(json.dumps(content | {"auto_map": names}))
    runs.run(train_sdxl_lpl, *flags_for(folder, pictures, cache_dir, tmp_path / "out"))
    assert not (tmp_path / "canary").exists()
    for path in runs.ROOT.glob("*.py"):
        assert "trust_remote_code=True" not in path.read_text(encoding="utf-8"), path.name


def test_the_canary_sings(tmp_path):
    """The test above could not fail if it did not."""
    pickle.loads(pickle.dumps(Canary(tmp_path / "canary")))
    assert (tmp_path / "canary").exists()
