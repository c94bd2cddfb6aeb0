"""Flags: they never change once they are parsed, and they name a base model that is one value."""

import copy
import dataclasses
import pickle
from pathlib import Path

import pytest

import train_sd3_lpl_flow
import train_sdxl_lpl
from lpl_finetuning.base_model import BaseModel, Place
from lpl_finetuning.errors import UserError
from lpl_finetuning.families import SD3, SDXL
from lpl_finetuning.flags import print_configuration, recipe_text
from tests.runs import ROOT

SCRIPTS = {"sdxl": (train_sdxl_lpl, SDXL), "sd3": (train_sd3_lpl_flow, SD3)}


@pytest.fixture(params=SCRIPTS)
def args(request, pictures, tmp_path):
    """The flags of a run on an embedded model, parsed and checked."""
    script, _ = SCRIPTS[request.param]
    model = ROOT / "examples" / f"tiny-{request.param}"
    return script.parse_args(["--pretrained_model_name_or_path", str(model), "--instance_data_dir", str(pictures),
                              "--resolution", "64", "--output_dir", str(tmp_path / "out"), "--report_to", "none",
                              "--num_validation_images", "0", "--validation_prompt", "an apple"])  # fmt: skip


def test_flags_never_change(args):
    before = dict(vars(args))
    with pytest.raises(AttributeError, match=r"take args.but\(seed=…\)"):
        args.seed = 4
    with pytest.raises(AttributeError):
        args.something_new = 4
    with pytest.raises(AttributeError):
        del args.seed
    with pytest.raises(AttributeError, match="no such flags: sead"):
        args.but(sead=4)
    other = args.but(seed=4)
    assert (args.seed, other.seed) == (0, 4) and vars(args) == before
    assert other.base_model is args.base_model and other.but(seed=0) == args


def test_copies_are_equal(args):
    for other in (copy.copy(args), copy.deepcopy(args), pickle.loads(pickle.dumps(args.but()))):
        assert other == args and other.base_model.name == args.base_model.name


def test_flags_of_two_names_are_resolved_while_they_are_parsed(args, pictures):
    assert (args.train_data_dir, args.instance_data_dir) == (str(pictures), None)
    assert args.validation_prompt is None, "no image is asked for"


def test_no_flag_is_lost_and_nothing_else_is_saved(args):
    names = {line.split(":")[0] for line in recipe_text(args).splitlines() if not line.startswith(("-", " "))}
    assert names <= vars(args).keys() and "base_model" not in names and "hub_token" not in names


def test_the_base_model_is_one_frozen_value(args):
    base = args.base_model
    with pytest.raises(dataclasses.FrozenInstanceError):
        base.name = "another"
    assert base.weights.startswith("sha256:") and base.name == args.pretrained_model_name_or_path
    family = base.family
    assert {family.denoiser.name, "vae", *family.text_encoders} <= set(base.models())


@pytest.mark.parametrize("family", [SDXL, SD3], ids=["sdxl", "sd3"])
def test_places_and_names_of_parts(family, tmp_path):
    """A denoiser's flag takes the model or a pipeline's folder; a replaced part has neither revision nor variant."""
    part = family.denoiser.name
    base = BaseModel(family, "a/model", revision="main", variant="fp16", vae="b/vae", denoiser=str(tmp_path))
    assert base.place("text_encoder") == Place("a/model", "text_encoder", "main", "fp16")
    assert base.place("vae") == Place("b/vae", "", None, None)
    assert base.place(part) == Place(str(tmp_path), "", None, None)
    Path(tmp_path, part).mkdir()
    Path(tmp_path, part, "config.json").write_text("{}")
    assert base.place(part) == Place(str(tmp_path), part, None, None)
    assert base.flag("text_encoder") == base.flag() == "--pretrained_model_name_or_path a/model"
    assert base.describe("vae") == base.flag("vae") == "--pretrained_vae_model_name_or_path b/vae"
    plain = BaseModel(family, "a/model", revision="main", variant="fp16")
    assert plain.place(part) == Place("a/model", part, "main", "fp16")
    assert plain.describe(part) == f"the base model's {part}" and plain.describe("vae").endswith("autoencoder")


def test_both_names_of_the_data_folder_exclude_each_other(pictures):
    with pytest.raises(UserError, match="--train_data_dir and --instance_data_dir exclude each other"):
        train_sdxl_lpl.build_parser().parse(["--train_data_dir", str(pictures), "--instance_data_dir", str(pictures)])


@pytest.mark.parametrize("script", [train_sdxl_lpl, train_sd3_lpl_flow], ids=["sdxl", "sd3"])
def test_the_plan_lists_the_flags_that_differ(script):
    """Aligned, one a line, without secrets and without what was given its default."""
    words = ["--rank", "8", "--use_lora", "--learning_rate", "1e-4", "--hub_token", "hf_secret", "--seed", "7",
             "--validation_prompt", "a dog", "a cat"]  # fmt: skip
    said = []
    print_configuration(script.build_parser().parse(words), said.append)
    assert sorted(said[1:]) == ["    rank               8", "    seed               7", "    use_lora           True",
                                "    validation_prompt  a dog, a cat"]  # fmt: skip


def test_the_demonstration_needs_the_clone(tmp_path):
    """An installed package has no examples; the error says so instead of naming a recipe that nobody gave."""
    with pytest.raises(UserError, match="the demonstration needs a clone"):
        train_sdxl_lpl.build_parser().parse([], embedded_default=tmp_path / "train.yaml")
