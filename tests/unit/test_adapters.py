"""Which layers get an adapter, and with which settings: blocks, kinds of layers and patterns, on tiny models."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import StableDiffusion3Pipeline, StableDiffusionXLPipeline
from peft.utils import get_peft_model_state_dict

import train_sd3_lpl_flow
import train_sdxl_lpl
from lpl_finetuning.adapters import layer_pattern, patterns_of, settings_of
from lpl_finetuning.errors import UserError
from lpl_finetuning.families import SD3, SDXL
from lpl_finetuning.lora_files import LORA_FILE
from lpl_finetuning.results.export import kohya_state_dict
from lpl_finetuning.training.models import adapted_layers, add_adapters, lora_config, lora_parts, save_lora
from lpl_finetuning.training.optimization import optimizer_settings, parameter_groups
from lpl_finetuning.training.plan import lines_on_layers
from tests.tiny_models import sd3_pipeline, sdxl_pipeline


def flags_of(script, family, *words):
    """The flags of a LoRA, without a base model's files."""
    args = script.build_parser().parse(["--use_lora", *words])
    return args.but(base_model=SimpleNamespace(family=family))


def adapted(*words, family=SDXL, text=False):
    """(flags, {part: model}) of a tiny pipeline with the adapters of these flags."""
    sd3 = family is SD3
    args = flags_of(train_sd3_lpl_flow if sd3 else train_sdxl_lpl, family, *words)
    pipeline = sd3_pipeline(t5=False, sd35=True) if sd3 else sdxl_pipeline()
    parts = [family.denoiser.name, *(family.text_encoders if text else ())]
    models = {part: getattr(pipeline, part) for part in parts}
    script = train_sd3_lpl_flow if sd3 else train_sdxl_lpl
    add_adapters(
        args, models, StableDiffusion3Pipeline if sd3 else StableDiffusionXLPipeline, script.lora_targets(args)
    )
    return args, models


def ranks(model):
    """{layer: (rank, alpha / rank)} of a model's adapter."""
    modules = dict(model.named_modules())
    return {name: (modules[name].r["default"], modules[name].scaling["default"]) for name in adapted_layers(model)}


# ---------------------------------------------------------------------------------------------------------------------
# Patterns


def test_rank_alpha_and_layers_left_out():
    """A rank alone keeps the strength of the other layers; of several patterns the last one that sets it counts."""
    patterns = ["attn2=rank:8", r"attn2\.to_q$=alpha:2", "to_v=rank:0", r"down_blocks.*to_v=rank:2,alpha:6"]
    args, models = adapted("--rank", "4", "--lora_alpha", "2", "--lora_pattern", *patterns)
    found = ranks(models["unet"])
    assert len(found) > 8
    for name, value in found.items():
        wanted = (4, 0.5)
        if "attn2" in name:
            wanted = (8, 0.25 if name.endswith("to_q") else 0.5)
        if "to_v" in name:
            assert name.startswith("down_blocks"), name
            wanted = (2, 3.0)
        assert value == wanted, name
    assert any("down_blocks" in name and "to_v" in name for name in found)
    names = ("x.attn2.to_q", "x.attn1.to_q", "a.attn1.to_v")
    found = [settings_of(patterns_of(args), "unet", name) for name in names]
    assert found == [{"rank": 8, "alpha": 2.0}, {}, {"rank": 0}]


def test_patterns_survive_in_every_file(tmp_path):
    """diffusers' loader and the kohya file give the layers their own ranks and strengths, text encoders too."""
    patterns = ["attn2=rank:6,alpha:3", r"text_encoder_2\..*q_proj=rank:2"]
    _, models = adapted("--train_text_encoder", "--lora_pattern", *patterns, text=True)
    torch.manual_seed(0)
    for model in models.values():
        for name, value in model.named_parameters():
            if "lora_" in name:
                value.data = torch.randn_like(value)
    save_lora(tmp_path, lora_parts(models), StableDiffusionXLPipeline)
    pipeline = sdxl_pipeline()
    pipeline.load_lora_weights(tmp_path / LORA_FILE)
    kohya = kohya_state_dict(lora_parts(models), models["unet"].config)
    strengths = {}
    for part, model in models.items():
        theirs = getattr(pipeline, part)
        own = {name: value for name, value in ranks(model).items()}
        other = {name: (module.r["default_0"], module.scaling["default_0"]) for name, module in theirs.named_modules()
                 if name in own}  # fmt: skip
        assert own == other
        assert {rank for rank, _ in own.values()} == {"unet": {4, 6}, "text_encoder": {4}, "text_encoder_2": {4, 2}}[
            part
        ]
        strengths[part] = sorted(own.values())
        mine, yours = get_peft_model_state_dict(model), get_peft_model_state_dict(theirs, adapter_name="default_0")
        assert mine.keys() == yours.keys() and all(torch.equal(mine[name], yours[name]) for name in mine)
    downs = [name for name in kohya if "lora_down" in name]
    assert sorted(len(kohya[name]) for name in downs) == sorted(r for found in strengths.values() for r, _ in found)


def test_the_layers_of_sd_scripts_are_all_linear_layers_of_the_transformer_groups():
    """Its default for SDXL, in words of --lora_layers."""
    _, models = adapted("--lora_layers", "attention,feed-forward,projections")
    wanted = {name for name, layer in sdxl_pipeline().unet.named_modules()
              if isinstance(layer, torch.nn.Linear) and ".attentions." in name}  # fmt: skip
    assert set(adapted_layers(models["unet"])) == wanted
    assert {name.rpartition(".")[2] for name in wanted} >= {"proj_in", "proj_out", "to_q"}


def test_rates_are_groups_of_the_optimizer():
    """The pattern's rate, on the layers it fits and no others, multiplied by --scale_lr as the others are."""
    args, models = adapted("--learning_rate", "0.1", "--text_encoder_lr", "0.2", "--scale_lr", "--train_text_encoder",
                           "--lora_pattern", "attn2.to_q$=lr:0.5", "layers.0=lr:0.7", text=True)  # fmt: skip
    groups = parameter_groups(models, optimizer_settings(args, 10))
    assert [group["lr"] for group in groups] == [1.0, 5.0, 2.0, 7.0, 2.0, 7.0]
    by_size = {name: sum(p.numel() for p in group["params"]) for name, group in enumerate(groups)}
    everything = {p for model in models.values() for p in model.parameters() if p.requires_grad}
    assert everything == {p for group in groups for p in group["params"]} and sum(by_size.values())
    wanted = {p for name, p in models["unet"].named_parameters() if "attn2.to_q.lora_" in name}
    assert set(groups[1]["params"]) == wanted
    plain = parameter_groups(models, optimizer_settings(args.but(lora_pattern=None), 1))
    assert [group["lr"] for group in plain] == [0.1, 0.2, 0.2], "as without the flag"
    equal = parameter_groups(models, optimizer_settings(args.but(learning_rate=0.5, text_encoder_lr=0.7), 10))
    assert [group["params"] for group in equal] == [group["params"] for group in groups], "whatever the rates are"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("attn2", "expected PATTERN=rank:8"), ("=rank:8", "expected PATTERN"), ("attn2=", "expected PATTERN"),
        ("attn2=dim:8", "'dim' is none of rank, alpha, lr"), ("a=rank:x", "rank is 'x'; it must be a whole number"),
        ("attn2=lr:-1", "lr is -1; it must be above 0"), ("attn2=lr:0", "it must be above 0"), ("a=rank:-1", "from 0"),
        ("*attn2=rank:8", "any text is written .*, not *"), ("(a=rank:8", "is no regular expression"),
        ("a=alpha:nan", "above 0"),
    ],
)  # fmt: skip
def test_patterns_that_cant_be_read(text, told):
    with pytest.raises(UserError, match="--lora_pattern") as error:
        flags_of(train_sdxl_lpl, SDXL, "--lora_pattern", text)
    assert told in str(error.value)


def test_the_regular_expression_may_have_an_equals_sign():
    assert layer_pattern("attn2(?=.*to_q)=rank:8").regex == "attn2(?=.*to_q)"


@pytest.mark.parametrize(
    ("pattern", "told"),
    [
        ("down_blokcs.*attn2=rank:8", "did you mean down_blocks for down_blokcs?"),
        ("down_blocks.7.*attn2=rank:8", "only its beginning down_blocks. is, such as in unet.down_blocks.1"),
        ("ff.net=rank:8", "without one, such as down_blocks.1"),
        (".*=rank:0", "leaves all"),
    ],
)
def test_a_pattern_that_fits_nothing_says_what_nearly_did(pattern, told):
    with pytest.raises(UserError) as error:
        adapted("--lora_pattern", pattern)
    assert told in str(error.value)


# ---------------------------------------------------------------------------------------------------------------------
# Blocks and kinds of layers


def test_blocks_and_kinds():
    layers = adapted_layers(adapted("--lora_blocks", "content,mid_block")[1]["unet"])
    assert {name.split(".transformer")[0] for name in layers} == {"up_blocks.0.attentions.0", "mid_block.attentions.0"}
    assert {name.rpartition("attn")[2][2:] for name in layers} == {"to_q", "to_k", "to_v", "to_out.0"}
    args, models = adapted("--lora_layers", "attention,attn2", family=SD3)
    assert any("attn2.to_q" in name for name in adapted_layers(models["transformer"]))
    assert not any("none" in line for line in lines_on_layers(args, models))
    layers = adapted_layers(
        adapted("--lora_blocks", "1,2", "--lora_layers", "feed-forward", family=SD3)[1]["transformer"]
    )
    assert len(layers) == 6 and {name.split(".")[1] for name in layers} == {"1", "2"}, "the last has no text stream"


def test_the_plan_says_what_gets_none():
    args, models = adapted("--lora_pattern", "blocks.1=rank:0", "attn=lr:1e-3", family=SD3)
    lines = lines_on_layers(args, models)
    assert lines[0] == "blocks.1: left out" and lines[1].startswith("attn: learning rate 0.001 (")
    assert lines[2] == "8 layers of attn2 have none; --lora_layers attention,attn2 trains them too"
    assert lora_config(models["transformer"]).r == 4


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--lora_blocks layout", "no block down_blocks.2.attentions.1, which layout stands for; it has down_bl"),
        ("--lora_blocks down_blocks.0 --lora_layers to_q", "--lora_blocks down_blocks.0: the unet has no layer"),
        ("--lora_blocks styel", "--lora_blocks styel: expected style, content, layout, or names such as"),
        ("--lora_blocks 3", "expected style, content"),
    ],
)  # fmt: skip
def test_blocks_that_are_not_there(words, told):
    with pytest.raises(UserError) as error:
        adapted(*words.split())
    assert told in str(error.value)
