"""A model in one file becomes a folder: what the file says of its prediction stays, and every tensor arrives."""

import json

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file

import train_sdxl_lpl
from lpl_finetuning import convert
from lpl_finetuning.errors import UserError
from lpl_finetuning.files import sha256_of
from lpl_finetuning.results.export import LAYOUTS
from lpl_finetuning.results.metadata import SOURCE
from tests.runs import ROOT

EXAMPLES = {"sdxl": ROOT / "examples" / "tiny-sdxl", "sd3": ROOT / "examples" / "tiny-sd3"}
MARK = torch.tensor([])


@pytest.fixture
def made(singles, tmp_path):
    """Function that writes the single file of a family with other content."""

    def write(family="sdxl", name="model", without=(), metadata=None, **more):
        tensors = {key: value for key, value in load_file(singles[family]).items() if not key.startswith(without)}
        path = tmp_path / f"{name}.safetensors"
        save_file(tensors | {key.replace("__", "."): value for key, value in more.items()}, path, metadata)
        return path

    return write


def run(path, *flags, config="sdxl"):
    """Convert a file: the folder, and its scheduler's configuration."""
    folder = path.with_suffix("")
    config_from = ["--config_from", str(EXAMPLES[config])] if config else []
    convert.main([str(path), str(folder), *config_from, *flags])
    return folder, json.loads((folder / "scheduler" / "scheduler_config.json").read_text())


def refused(capsys, path, *flags, config="sdxl"):
    """The message of a refused conversion, which leaves nothing behind."""
    with pytest.raises(SystemExit) as stopped:
        run(path, *flags, config=config)
    assert stopped.value.code == 2 and not list(path.parent.glob("*/model_index.json"))
    return capsys.readouterr().err


@pytest.mark.parametrize("family", EXAMPLES)
def test_every_tensor_arrives(family, singles, made):
    """Out of the folder comes the same single file, though both text encoders of the examples have one width."""
    folder, _ = run(made(family), config=family)
    pipeline = DiffusionPipeline.from_pretrained(folder)
    vae = load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in vae.values()} == {torch.float16}, "no tensor is widened"
    sha256 = sha256_of(folder.with_suffix(".safetensors"))
    source = json.loads((folder / SOURCE).read_text())
    assert (source["file"], source["sha256"]) == ("model.safetensors", sha256)
    components, layout = LAYOUTS[type(pipeline)]
    again, file = layout(*(getattr(pipeline, name) for name in components)), load_file(singles[family])
    assert again.keys() == file.keys()
    assert all(torch.equal(again[name].to(value.dtype), value) for name, value in file.items())


SAID = {  # what is in the file -> (tensors, metadata, flags, prediction_type, zero terminal SNR)
    "nothing": ({}, {}, [], "epsilon", False),
    "v_pred": ({"v_pred": MARK}, {}, [], "v_prediction", False),
    "v_pred, ztsnr": ({"v_pred": MARK, "ztsnr": MARK}, {}, [], "v_prediction", True),
    "v_pred below": ({"model__diffusion_model__v_pred": MARK}, {}, [], "v_prediction", False),
    "modelspec v": ({}, {"modelspec.prediction_type": "v"}, [], "v_prediction", False),
    "modelspec epsilon": ({}, {"modelspec.prediction_type": "epsilon"}, [], "epsilon", False),
    "modelspec v, zero": ({}, {"modelspec.prediction_type": "V-Prediction", "ss_zero_terminal_snr": "True"}, [],
                          "v_prediction", True),
    "both, flag": ({"v_pred": MARK}, {"modelspec.prediction_type": "epsilon"}, ["--prediction_type", "v_prediction"],
                   "v_prediction", False),
    "v_pred, flag": ({"v_pred": MARK}, {}, ["--prediction_type", "epsilon"], "epsilon", False),
    "v_pred, zero": ({"v_pred": MARK}, {}, ["--zero_snr"], "v_prediction", True),
}  # fmt: skip


@pytest.mark.parametrize("case", SAID)
def test_what_the_file_says_is_in_the_scheduler(case, made, capsys):
    tensors, metadata, flags, prediction_type, zero_snr = SAID[case]
    _, scheduler = run(made(metadata=metadata or None, **tensors), *flags)
    assert (scheduler["prediction_type"], scheduler["rescale_betas_zero_snr"]) == (prediction_type, zero_snr)
    assert scheduler["timestep_spacing"] == ("trailing" if zero_snr else "leading")
    said = capsys.readouterr().out
    assert f"prediction_type {prediction_type}" in said and ("wins over" in said) == bool(flags)


def test_it_is_trained_as_it_says(made, pictures):
    """The training script takes the prediction and the noise levels from the folder."""
    folder, _ = run(made(v_pred=MARK, ztsnr=MARK))
    flags = f"--resolution 64 --pretrained_model_name_or_path {folder} --train_data_dir {pictures} --output_dir"
    args = train_sdxl_lpl.parse_args([*flags.split(), str(folder.parent / "out")])
    schedule = train_sdxl_lpl.Schedule(args)
    assert schedule.prediction_type == "v_prediction" and schedule.alphas[-1] < 1e-3
    assert StableDiffusionXLPipeline.from_pretrained(folder).scheduler.config.prediction_type == "v_prediction"


WRONG = {  # case -> (what is made, flags, words of the message)
    "contradiction": ({"v_pred": MARK, "metadata": {"modelspec.prediction_type": "epsilon"}}, [],
                      "the tensor v_pred says v_prediction, modelspec.prediction_type says epsilon"),
    "unknown": ({"metadata": {"modelspec.prediction_type": "x0"}}, [], "modelspec.prediction_type says x0"),
    "only its name": ({"name": "my-vpred"}, [], "its name says v-prediction"),
    "ztsnr alone": ({"ztsnr": MARK}, [], "the tensor ztsnr asks for zero terminal SNR"),
    "zero epsilon": ({}, ["--zero_snr"], "--zero_snr is given"),
    "edm": ({"edm_vpred__sigma_max": torch.tensor(120.0)}, [], "EDM's noise levels"),
    "no vae": ({"without": "first_stage_model.", "config": None}, [], "has no autoencoder of SDXL"),
    "a tensor less": ({"without": "model.diffusion_model.out.2.weight"}, [], "lacks"),
    "a tensor more": ({"model__diffusion_model__more__weight": torch.zeros(2)}, [], "1 of its"),
    "inpainting": ({"model__diffusion_model__input_blocks__0__0__weight": torch.zeros(8, 9, 3, 3)}, [], "inpainting"),
    "sd3 v": ({"family": "sd3", "v_pred": MARK}, [], "the tensor v_pred contradicts that"),
    "sd3 flag": ({"family": "sd3"}, ["--prediction_type", "epsilon"], "leave --prediction_type and --zero_snr out"),
    "sd3 text": ({"family": "sd3", "without": "text_encoders.", "config": None}, [],
                 "no first text encoder and no second"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_refused(case, made, capsys):
    content, flags, words = WRONG[case]
    config = content.get("config", content.get("family", "sdxl"))
    path = made(**{name: value for name, value in content.items() if name != "config"})
    assert words in refused(capsys, path, *flags, config=config)


def test_files_and_places_that_are_refused(made, tmp_path, capsys):
    path = made()
    assert "is a StableDiffusion3Pipeline" in refused(capsys, path, config="sd3")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.txt").touch()
    assert "is there already" in refused(capsys, path)
    (tmp_path / "old.ckpt").write_bytes(b"PK")
    assert "is a pickle (.ckpt)" in refused(capsys, tmp_path / "old.ckpt")
    save_file({"lora_unet_a.lora_up.weight": MARK}, tmp_path / "lora.safetensors")
    assert "is a LoRA; give the model" in refused(capsys, tmp_path / "lora.safetensors")
    with pytest.raises(SystemExit):
        convert.main([str(path), str(tmp_path / "new")])
    assert "or --config_from with a pipeline of the same sizes" in capsys.readouterr().err


def test_what_a_file_lacks_comes_from_the_other_pipeline(made):
    """As copies: the folder stands on its own."""
    folder, scheduler = run(made("sd3", without="text_encoders."), config="sd3")
    assert scheduler["_class_name"].startswith("FlowMatch")
    assert not [path for path in folder.rglob("*") if path.is_symlink()]
    for part in ("text_encoder", "text_encoder_3"):
        copy, original = folder / part / "model.safetensors", EXAMPLES["sd3"] / part / "model.safetensors"
        assert copy.read_bytes() == original.read_bytes()


# ---------------------------------------------------------------------------------------------------------------------
# A flag that contradicts the folder


@pytest.fixture
def models(sdxl_folder, tmp_path):
    """{name: folder of a pipeline}, which differ in their schedulers only."""
    found = {"epsilon": sdxl_folder}
    v = {"prediction_type": "v_prediction"}
    for name, changes in {"v": v, "zero": v | {"rescale_betas_zero_snr": True}}.items():
        found[name] = tmp_path / name
        found[name].mkdir()
        for part in sdxl_folder.iterdir():
            if part.name != "scheduler":
                (found[name] / part.name).symlink_to(part)
        config = json.loads((sdxl_folder / "scheduler" / "scheduler_config.json").read_text()) | changes
        (found[name] / "scheduler").mkdir()
        (found[name] / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    return found


def test_flags_and_folders_that_contradict_each_other(models, pictures, tmp_path, capsys):
    def parse(base, *flags):
        train_sdxl_lpl.parse_args(["--pretrained_model_name_or_path", str(models[base]), "--train_data_dir",
                                   str(pictures), "--output_dir", str(tmp_path / "out"), "--resolution", "64",
                                   *map(str, flags)])  # fmt: skip
        return capsys.readouterr().err

    unet = "--pretrained_unet_model_name_or_path"
    assert not parse("v") and not parse("v", "--prediction_type", "v_prediction") and not parse("v", unet, models["v"])
    assert "scheduler says epsilon: the model must learn" in parse("epsilon", "--prediction_type", "v_prediction")
    told = parse("epsilon", "--prediction_type", "v_prediction", "--use_lora")
    assert "wherever the LoRA is loaded, the scheduler must be set to it" in told
    for place in (models["v"], models["v"] / "unet"):
        with pytest.raises(UserError, match="is of a model of v_prediction, and the base model's"):
            parse("epsilon", unet, place)
    assert parse("epsilon", unet, models["v"], "--prediction_type", "v_prediction")
    with pytest.raises(UserError, match="its scheduler says rescale_betas_zero_snr True"):
        parse("v", unet, models["zero"])
    (tmp_path / "prompts.txt").write_text("cat --ss heun")
    assert not parse("v", "--validation_prompts_file", tmp_path / "prompts.txt")
    with pytest.raises(UserError, match="the sampler heun knows no zero terminal SNR"):
        parse("zero", "--validation_prompts_file", tmp_path / "prompts.txt")
