"""Unknown flags: what is said of those of other programs, and which names are near enough to be meant."""

import re

import pytest

import evaluate_models
import preview_data
import train_sd3_lpl_flow
import train_sdxl_lpl
from lpl_finetuning.errors import UserError, near_name
from lpl_finetuning.other_flags import _ADVICE, advice_on
from tests.docs.test_errors import ROOT

PARSERS = {"sdxl": train_sdxl_lpl.build_parser(), "sd3": train_sd3_lpl_flow.build_parser(),
           "preview": preview_data.build_parser(), "evaluate": evaluate_models.build_parser()}  # fmt: skip


def said(script, *words):
    """The message about unknown words."""
    with pytest.raises(UserError) as caught:
        PARSERS[script].parse(words)
    return str(caught.value)


def test_every_advice_names_flags_that_there_are_and_is_of_an_unknown_flag():
    known = [set(PARSERS[script].flags()) for script in ("sdxl", "sd3")]
    for name, advice in _ADVICE.items():
        for text in (advice,) if isinstance(advice, str) else advice:
            named = set(re.findall(r"--(\w+)", text))
            assert any(named <= flags for flags in known), (name, text)
        assert any(name not in flags for flags in known), name
        assert all(advice_on(name, flags) for flags in known if name not in flags and isinstance(advice, tuple)), name
    scripts = set(re.findall(r"\w+\.py", str(_ADVICE)))
    assert scripts and all((ROOT / name).is_file() for name in scripts)


@pytest.mark.parametrize(("script", "flag", "message"), [
    ("sdxl", "cache_latents", "kept where the crops are fixed; random crops are encoded in every step"),
    ("sdxl", "cache_text_encoder_outputs", "where --train_text_encoder trains their encoders"),
    ("sdxl", "save_precision", "use --save_dtype"),
    ("sdxl", "min_snr_gamma", "use --snr_gamma"),
    ("sd3", "min_snr_gamma", "rectified flow has --weighting_scheme instead"),
    ("sdxl", "v_parameterization", "use --prediction_type v_prediction"),
    ("sd3", "v_parameterization", "rectified flow has no choice"),
    ("sd3", "snr_gamma", "rectified flow has --weighting_scheme instead"),
    ("sdxl", "timestep_shift", "it is of train_sd3_lpl_flow.py"),
    ("sdxl", "training_shift", "--help lists all flags"),
    ("sd3", "training_shift", "use --timestep_shift"),
    ("sdxl", "num_processes", "accelerate launch, which takes it before the script's name"),
    ("evaluate", "num_processes", "--help lists all flags"),
    ("preview", "network_dim", "--help lists all flags"),
    ("preview", "weighting_scheme", "--help lists all flags"),
])  # fmt: skip
def test_advice_is_true_for_the_script_that_gives_it(script, flag, message):
    text = said(script, f"--{flag}")
    assert text.startswith(f"unknown flag --{flag}: ") and message in text
    assert "always" not in text or "encoded" not in text
    assert all(name in PARSERS[script].flags() for name in re.findall(r"--(\w+)", text.split(": ", 1)[1])
               if name != "help")  # fmt: skip


@pytest.mark.parametrize(("word", "name"), [
    ("lpl_wieght", "lpl_weight"), ("learning-rate", "learning_rate"), ("trainbatchsize", "train_batch_size"),
    ("checkpoint_steps", "checkpointing_steps"), ("val_split", "validation_split"), ("rnak", "rank"),
    ("gradient_accumulation", "gradient_accumulation_steps"), ("sede", "seed"), ("use_lroa", "use_lora"),
    ("no_lpl_pow_law", "no-lpl_pow_law"), ("use_8bit_adm", "use_8bit_adam"), ("outptu_dir", "output_dir"),
])  # fmt: skip
def test_a_slip_or_a_short_form_is_recognized(word, name):
    assert f"did you mean --{name}?" in said("sdxl", f"--{word}")


@pytest.mark.parametrize("word", [
    "metadata_author", "log_every_n", "class_images", "deepspeed", "wandb_mode", "flow",
    "regularization", "in_jsonl", "random_seed", "debug_dataset", "adam_beta3", "mode", "output", "dataset", "test",
])  # fmt: skip
def test_nothing_is_suggested_that_was_not_meant(word):
    assert said("sdxl", f"--{word}").endswith("--help lists all flags")


def test_values_that_are_other_values_are_no_slips():
    assert "did you mean" not in said("sdxl", "--mixed_precision", "fp32")
    assert "did you mean" not in said("sdxl", "--lpl_loss_type", "l2")
    assert "'AdamW8bit'; AdamW8bit is --use_8bit_adam; choose from" in said("sdxl", "--optimizer", "AdamW8bit")
    assert said("sdxl", "--resolution", "1024,1024").endswith("it must be a whole number: for a square give 1024")
    assert said("sd3", "--resolution", "1024x768").endswith("--aspect_ratio_buckets trains on shapes")
    assert said("sd3", "--resolution", "large").endswith("it must be a whole number")
    assert "float32 is no; choose from" in said("sdxl", "--mixed_precision", "float32")
    assert "did you mean" not in said("evaluate", "--sampler", "ddpm")
    assert "did you mean cosine?" in said("sdxl", "--lr_scheduler", "cosinus")
    assert near_name("tensorbord", ("tensorboard", "wandb")) == "tensorboard"


def test_switches_and_lost_words_are_told_by_what_they_are():
    assert (
        said("sdxl", "--no-lpl_pow_law=1")
        == "--no-lpl_pow_law takes no value, found '1'; write --no-lpl_pow_law alone"
    )
    assert said("evaluate", "--real", "x", "true") == "unknown argument true: switches take no value"
    assert "a value follows its flag, and a value with blanks needs quotes" in said("sdxl", "my-pictures")
