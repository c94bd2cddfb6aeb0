"""The two training scripts are twins: the same functions in the same order, the same flags, the same loop."""

import ast
import difflib

import train_sd3_lpl_flow
import train_sdxl_lpl
from tests.runs import ROOT

SCRIPTS = (train_sdxl_lpl, train_sd3_lpl_flow)
# What only one of them needs, with its reason.
OWN_FUNCTIONS = {
    "load_t5": "SD3's third text encoder is optional",
    "embed_t5": "the same",
    "join_embeds": "SD3 joins three encoders' outputs",
}
OWN_FLAGS = {
    "snr_gamma", "prediction_type", "rescale_betas_zero_snr", "timestep_bias_strategy", "timestep_bias_multiplier",
    "timestep_bias_begin", "timestep_bias_end", "timestep_bias_portion",  # SDXL's discrete schedule
    "pretrained_unet_model_name_or_path", "pretrained_transformer_model_name_or_path",
    "max_sequence_length", "weighting_scheme", "logit_mean", "logit_std", "mode_scale", "precondition_outputs",
    "timestep_shift",
}  # fmt: skip
DEFAULTS = {  # as in the diffusers scripts for SDXL and SD3
    "resolution": (1024, 512), "train_batch_size": (16, 4), "num_train_epochs": (100, 1),
    "adam_weight_decay": (1e-2, 1e-4), "validation_epochs": (1, 50),
}  # fmt: skip


def definitions(script):
    """(names of functions and classes in order, {name: node}) of a script."""
    tree = ast.parse((ROOT / f"{script.__name__}.py").read_text(encoding="utf-8"))
    nodes = [node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    return [node.name for node in nodes], {node.name: node for node in nodes}


def test_the_same_functions_in_the_same_order():
    names = [[name for name in definitions(script)[0] if name not in OWN_FUNCTIONS] for script in SCRIPTS]
    assert names[0] == names[1]
    everything = definitions(SCRIPTS[0])[0] + definitions(SCRIPTS[1])[0]
    assert OWN_FUNCTIONS.keys() <= set(everything), "a listed exception is gone"


def test_the_same_arguments():
    """A function that both have takes the same arguments."""
    nodes = [definitions(script)[1] for script in SCRIPTS]
    different = {"encode_prompts"}  # SD3's takes T5 too
    for name in nodes[0].keys() & nodes[1].keys() - different:
        if isinstance(nodes[0][name], ast.FunctionDef):
            assert ast.dump(nodes[0][name].args) == ast.dump(nodes[1][name].args), name


def test_the_same_flags_and_defaults():
    flags = [script.build_parser().flags() for script in SCRIPTS]
    assert (flags[0].keys() ^ flags[1].keys()) == OWN_FLAGS
    for name in flags[0].keys() & flags[1].keys():
        pair = tuple(parser[name].default for parser in flags)
        assert pair == DEFAULTS.get(name, (pair[0], pair[0])), name
        assert flags[0][name].help == flags[1][name].help, name


def test_main_is_the_same_but_for_names():
    """The loops differ in a handful of lines, those that name the model."""
    mains = []
    for script in SCRIPTS:
        text = "\n".join(ast.unparse(definitions(script)[1][name]) for name in ("main", "train"))
        for own, other in (("SD3", "SDXL"), ("sd3", "sdxl"), ("StableDiffusion3", "StableDiffusionXL")):
            text = text.replace(own, other)
        mains.append(text.splitlines())
    changed = [line for line in difflib.ndiff(*mains) if line[0] in "+-"]
    assert changed == []


def test_steps_are_the_same_but_for_the_model():
    """What differs in the training step is listed here, line by line."""
    for name, allowed in {"training_step": 0, "perceptual_loss": 0, "held_out_step": 0}.items():
        steps = [ast.unparse(definitions(script)[1][name]).splitlines() for script in SCRIPTS]
        changed = [line for line in difflib.ndiff(*steps) if line[0] in "+-"]
        assert len(changed) <= allowed, changed
