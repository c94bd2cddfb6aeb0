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
from lpl_finetuning.flag_checks import DEAD_FLAGS, check_dead_flags
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


def test_a_run_keeps_the_gradient_that_it_had(args):
    """Not what its absence stands for in a later version; a run without the loss keeps none."""
    assert "lpl_norm_gradient: null" in recipe_text(args)
    for told, flags in {
        "full": {},
        "none": {"lpl_norm_type": "shared"},
        "half": {"lpl_norm_gradient": "half"},
    }.items():
        assert f"lpl_norm_gradient: {told}\n" in recipe_text(args.but(use_lpl=True, **flags))


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


# ---------------------------------------------------------------------------------------------------------------------
# Flags that do nothing beside the others

DEAD = """\
sdxl | --rank 8 | --use_lora
sdxl | --lora_dropout 0.1 | --use_lora
sdxl | --text_encoder_lr 1e-5 | --train_text_encoder --use_lora
sdxl | --dataset_config_name x | --dataset_name a/b
sdxl | --keep_tags 1 | --shuffle_tags
sdxl | --tag_shuffles 3 | --shuffle_tags
sdxl | --lr_warmup_steps 3 | --lr_scheduler linear
sdxl | --lr_num_cycles 2 | --lr_scheduler cosine_with_restarts
sdxl | --lr_num_cycles 2 --lr_scheduler cosine | --lr_scheduler cosine_with_restarts
sdxl | --lr_power 2 --lr_scheduler linear | --lr_scheduler polynomial
sdxl | --adam_beta1 0.5 --optimizer adafactor | --optimizer adamw
sdxl | --adam_beta2 0.5 --optimizer adafactor | --optimizer prodigy
sdxl | --adam_epsilon 1e-3 --optimizer adafactor | --optimizer adamw
sdxl | --ema_decay 0.9 | --use_ema
sdxl | --ema_update_after_step 9 | --use_ema
sdxl | --offload_ema | --use_ema
sdxl | --foreach_ema | --use_ema
sdxl | --timestep_bias_multiplier 2 | --timestep_bias_strategy earlier
sdxl | --timestep_bias_portion 0.5 | --timestep_bias_strategy later
sdxl | --timestep_bias_portion 0.5 --timestep_bias_strategy range | --timestep_bias_strategy earlier
sdxl | --timestep_bias_begin 5 --timestep_bias_strategy later | --timestep_bias_strategy range
sdxl | --timestep_bias_end 500 | --timestep_bias_strategy range
sd3 | --logit_mean 1 --weighting_scheme mode | --weighting_scheme logit_normal
sd3 | --logit_std 2 --weighting_scheme none | --weighting_scheme logit_normal
sd3 | --mode_scale 1 | --weighting_scheme mode
sd3 | --lora_blocks 1 | --use_lora
sdxl | --lora_pattern attn1=rank:2 | --use_lora
sdxl | --lora_type loha | --use_lora
sdxl | --lokr_factor 4 --use_lora | --lora_type lokr
sdxl | --lpl_weight 3 | --use_lpl
sdxl | --lpl_start 3 | --use_lpl
sdxl | --lpl_share 0.3 --lpl_weight 3 --use_lpl | --lpl_weight auto
sdxl | --lpl_norm_type shared | --use_lpl
sdxl | --no-lpl_pow_law | --validation_split 3
sdxl | --lpl_num_blocks 2 --use_lpl --lpl_features latent | --lpl_features rgb
sdxl | --lpl_outlier_reference_resolution 512 --use_lpl --lpl_features latent | --lpl_features rgb
sdxl | --lpl_outlier_reference_resolution 512 --use_lpl --no-lpl_remove_outliers | --lpl_remove_outliers
sdxl | --lpl_outlier_reference_resolution 512 | --use_lpl
sdxl | --lpl_classifier x --use_lpl | --lpl_features classifier
sdxl | --lpl_classifier_stages 1 --use_lpl | --lpl_features classifier
sdxl | --lpl_tiny_decoder x --use_lpl | --lpl_features tiny_decoder
sdxl | --lpl_augment --validation_split 3 | --use_lpl
sdxl | --validation_steps 5 | --validation_prompt apple
sdxl | --validation_epochs 5 | --validation_split 3
sdxl | --num_validation_images 2 | --validation_prompt apple
sdxl | --max_validation_samples 9 | --validation_data_dir x
sdxl | --validation_kid_every 2 | --validation_metrics
sdxl | --output_name x | --use_lora --output_kohya_format
sdxl | --metadata_title x | --single_file
sdxl | --no-save_tag_frequency | --use_lora --output_kohya_format
sdxl | --checkpoints_kohya_format | --use_lora --output_kohya_format
sdxl | --hub_model_id me/x | --push_to_hub
sdxl | --hub_private_repo | --push_to_hub
sdxl | --revision main --pretrained_model_name_or_path docs | --pretrained_model_name_or_path a/b
sdxl | --variant fp16 --pretrained_model_name_or_path README.md | --pretrained_model_name_or_path docs
sdxl | --config_from x --pretrained_model_name_or_path docs | --pretrained_model_name_or_path README.md
"""


@pytest.mark.parametrize("line", DEAD.splitlines())
def test_a_flag_that_does_nothing_is_refused(line, tmp_path, capsys):
    """On the command line it is an error, in a recipe a warning, and beside what it needs neither."""
    script, dead, alive = (part.split() for part in line.split("|"))
    parser, name = SCRIPTS[script[0]][0].build_parser(), dead[0].removeprefix("--").removeprefix("no-")
    with pytest.raises(UserError, match=f"--{name} does nothing .*: leave it out"):
        check_dead_flags(parser.parse(dead))
    undone = {word.replace("--", "--no-", 1) for word in alive}
    args = parser.parse([*(word for word in dead if word not in undone), *alive])
    check_dead_flags(args)
    assert capsys.readouterr().err == ""
    value, recipe = getattr(args, name), tmp_path / "recipe.yaml"
    recipe.write_text(f"{name}: {str(value).lower()}\n")
    others = dead[1:] if isinstance(value, bool) else dead[2:]
    check_dead_flags(parser.parse(["--config", str(recipe), *others]))
    assert f"warning: --{name} does nothing " in capsys.readouterr().err


def test_every_rule_about_dead_flags_is_tried():
    """Each flag that the rules name exists, and each rule has a line above."""
    known = {name for script, _ in SCRIPTS.values() for name in script.build_parser().flags()}
    for names, when, _ in DEAD_FLAGS:
        assert set(names) <= known
        assert any(f"{name} " in DEAD for name in names), when


@pytest.mark.parametrize(("line", "name", "value"), [
    ("validation_prompt: no", "validation_prompt", ["no"]),
    ("validation_prompt: [no, yes]", "validation_prompt", ["no", "yes"]),
    ("trigger_word: 007", "trigger_word", "007"), ("trigger_word: 1:30", "trigger_word", "1:30"),
    ("trigger_word: 2026-01-02", "trigger_word", "2026-01-02"), ("mixed_precision: no", "mixed_precision", "no"),
    ("lpl_sigma_threshold: .inf", "lpl_sigma_threshold", float("inf")), ("rank: 16", "rank", 16),
    ("validation_prompt:", "validation_prompt", None), ("learning_rate: 1e-4", "learning_rate", 1e-4),
])  # fmt: skip
def test_texts_in_a_recipe_stay_as_they_are_written(line, name, value, tmp_path):
    """YAML reads a bare no as false, 007 as 7 and 1:30 as 90."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(line + "\n")
    assert getattr(train_sdxl_lpl.build_parser().parse(["--config", str(recipe)]), name) == value


def test_a_key_that_comes_twice_in_a_recipe_is_refused(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("rank: 4\nseed: 3\nrank: 8\n")
    with pytest.raises(UserError, match="not valid YAML: rank comes twice"):
        train_sdxl_lpl.build_parser().parse(["--config", str(recipe)])
