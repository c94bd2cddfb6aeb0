"""LoHa, LoKr and DoRA in files for other programs: their formulas, written here anew, give the weights that we train.

ComfyUI and Forge add alpha / r (w1_a w1_b) * (w2_a w2_b), or alpha / r kron(w1, w2), where r is the rank of a factor
of two matrices, and 1 where there is none. Their DoRA with a number per output is dora_scale (W + d) / |W|.
"""

from types import SimpleNamespace

import pytest
import torch
from diffusers import StableDiffusion3Pipeline, StableDiffusionXLPipeline
from peft import LoHaConfig, LoKrConfig, LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lpl_finetuning import merge
from lpl_finetuning.errors import UserError
from lpl_finetuning.families import SD3, SDXL
from lpl_finetuning.lora_files import ADAPTER, find_lora, put_lora, read_lora
from lpl_finetuning.original_names import mmdit_name, unet_name
from lpl_finetuning.results import merging
from lpl_finetuning.results.export import save_kohya, save_single_file
from lpl_finetuning.training.models import (
    adapted_layers,
    compute_products_in_float32,
    leave_inputs_to_autocast,
    load_lora,
    lora_parts,
    save_lora,
)
from tests.tiny_models import sd3_pipeline, sdxl_pipeline

LAYERS = {"unet": ["to_q", "ff.net.2", "conv1", "conv_shortcut"], "text_encoder": ["q_proj"],
          "text_encoder_2": ["k_proj", "text_projection"],
          "transformer": ["to_k", "to_out.0", "ff.net.2", "norm_out.linear"]}  # fmt: skip
PIPELINES = {SDXL: StableDiffusionXLPipeline, SD3: StableDiffusion3Pipeline}


def pipeline_of(family):
    return sdxl_pipeline() if family is SDXL else sd3_pipeline(t5=False, sd35=True)


def models_of(family):
    """{part: model} of a fresh pipeline with the same weights as ever."""
    pipeline = pipeline_of(family)
    return {part: getattr(pipeline, part).requires_grad_(False) for part in LAYERS if hasattr(pipeline, part)}


def config(kind, layers):
    """A configuration whose layers differ in rank and alpha."""
    patterns = {"rank_pattern": {"to_q": 2, "to_k": 2}, "alpha_pattern": {"to_q": 5, "conv1": 1}}
    patterns = {name: {key: value for key, value in pattern.items() if key in layers}
                for name, pattern in patterns.items()}  # fmt: skip
    more = {"target_modules": layers, **patterns}
    if kind == "LoHa":
        return LoHaConfig(r=3, alpha=4, init_weights=False, use_effective_conv2d=True, **more)
    if kind == "LoKr":
        return LoKrConfig(r=3, alpha=4, init_weights=False, decompose_factor=4, **more)
    return LoraConfig(r=3, lora_alpha=4, use_dora=kind == "DoRA", init_lora_weights=False, **more)


@pytest.fixture(scope="module")
def trained():
    """Function (kind, family) -> models whose adapters have random values; made once each."""
    made = {}

    def build(kind, family):
        if (kind, family) not in made:
            made[kind, family] = models_of(family)
            torch.manual_seed(1)
            for part, model in made[kind, family].items():
                model.add_adapter(config(kind, LAYERS[part]), ADAPTER)
                for name, value in model.named_parameters():
                    if "magnitude" in name:
                        value.data *= 1 + torch.rand_like(value)
                    elif "hada" in name:
                        value.data.normal_(0, 0.5)
        return made[kind, family]

    return build


def weights(models):
    """{(part, module): the weight that a layer has with its adapter, by PEFT}"""
    found = {}
    for part, model in models.items():
        modules = dict(model.named_modules())
        for name in adapted_layers(model):
            layer = modules[name]
            before = layer.get_base_layer().weight.data.clone()
            layer.merge()
            found[part, name] = layer.get_base_layer().weight.data.clone()
            layer.unmerge()
            layer.get_base_layer().weight.data = before
    return found


def theirs(tensors, layer, weight):
    """What a program of others makes of a layer's weight: formulas of ComfyUI, written here anew."""
    own = {name.removeprefix(f"{layer}."): value for name, value in tensors.items() if name.startswith(f"{layer}.")}
    assert own, layer
    rank, alpha = None, own["alpha"].item()
    if "lora_up.weight" in own:
        up, down = own["lora_up.weight"].flatten(1), own["lora_down.weight"].flatten(1)
        rank, change = len(down), up @ down
    elif "hada_t1" in own:
        one, two = (torch.einsum("abxy,ao,bi->oixy", own[f"hada_t{n}"], own[f"hada_w{n}_a"], own[f"hada_w{n}_b"])
                    for n in (1, 2))  # fmt: skip
        rank, change = len(own["hada_w1_b"]), one * two
    elif "hada_w1_a" in own:
        rank = len(own["hada_w1_b"])
        change = (own["hada_w1_a"] @ own["hada_w1_b"]) * (own["hada_w2_a"] @ own["hada_w2_b"])
    else:
        second = own.get("lokr_w2")
        if second is None:
            rank, second = len(own["lokr_w2_b"]), own["lokr_w2_a"] @ own["lokr_w2_b"]
        a, b = own["lokr_w1"], second
        change = torch.einsum("ac,b...d->abc...d", a, b.flatten(1)).reshape(-1)  # rows ab, columns cd
        change = change.reshape(len(a) * len(b), -1)
    change = change.reshape(weight.shape) * (alpha / rank if rank else 1)
    result = weight + change
    if "dora_scale" in own:
        assert own["dora_scale"].shape == (len(weight), *[1] * (weight.ndim - 1)), "per output, by its first size"
        norm = weight.flatten(1).norm(dim=1).reshape(own["dora_scale"].shape)
        result = result * own["dora_scale"] / norm
    return result


def layer_in_file(part, module, model):
    """The name of a layer that ComfyUI looks for."""
    name = module.replace(".", "_")
    if part.startswith("text"):
        start = {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}[part]
        nested = name.startswith(("text_model", "text_projection"))
        return start + ("" if nested else "text_model_") + name
    return "lora_transformer_" + name if part == "transformer" else (
        "lora_unet_" + unet_name(module, model.config).replace(".", "_"))  # fmt: skip


def saved(models, folder, kind):
    """The tensors of our file for other programs."""
    denoiser = models.get("unet") or models["transformer"]
    save_kohya(folder, lora_parts(models), denoiser.config, name="k.safetensors", models=models)
    with safe_open(folder / "k.safetensors", "pt") as file:
        assert f'"{ {"DoRA": "lora"}.get(kind, kind.lower()) }"' in file.metadata()["ss_network_args"]
    return load_file(folder / "k.safetensors")


KINDS = [(kind, family) for kind in ("LoHa", "LoKr", "DoRA") for family in (SDXL, SD3)]
NAMED = [f"{kind}-{family.title}" for kind, family in KINDS]


@pytest.mark.parametrize(("kind", "family"), KINDS, ids=NAMED)
def test_other_programs_make_the_weights_that_we_train(kind, family, trained, tmp_path):
    models, bases = trained(kind, family), models_of(family)
    tensors, ours = saved(models, tmp_path, kind), weights(models)
    assert {part for part, _ in ours} == models.keys()
    for (part, module), weight in ours.items():
        before = bases[part].get_submodule(module).weight
        found = theirs(tensors, layer_in_file(part, module, models[part]), before)
        if module == "norm_out.linear" and kind == "DoRA":  # the rows of dora_scale are in the original order
            continue
        assert (weight - before).abs().max() > 1e-3
        assert torch.allclose(found, weight, atol=2e-5), (part, module, (found - weight).abs().max())


def loaded(path, family, dtype=torch.float32):
    """A file in the models of a fresh pipeline."""
    models = {part: model.to(dtype) for part, model in models_of(family).items()}
    flag = "--init_lora x"
    lora = read_lora(flag, find_lora(flag, str(path), family), family, PIPELINES[family], models)
    for part, (layers, own) in lora.items():
        put_lora(flag, part, models[part], layers, own, torch.float32)
    return models


def assert_same(models, others, tolerance):
    ours, found = weights(models), weights(others)
    assert ours.keys() == found.keys()
    for key, value in ours.items():
        assert torch.allclose(value, found[key], atol=tolerance), key


@pytest.mark.parametrize(("kind", "family"), KINDS, ids=NAMED)
def test_both_of_our_files_are_continued(kind, family, trained, tmp_path):
    """The file with PEFT's names to the bit, the one for other programs but for rounding; a checkpoint resumes."""
    models = trained(kind, family)
    save_lora(tmp_path, lora_parts(models), PIPELINES[family])
    assert_same(models, loaded(tmp_path, family), 0)
    saved(models, tmp_path, kind)
    assert_same(models, loaded(tmp_path / "k.safetensors", family), 1e-5)
    resumed = models_of(family)
    for part, model in resumed.items():
        model.add_adapter(config(kind, LAYERS[part]), ADAPTER)
    load_lora(tmp_path, resumed)
    assert_same(models, resumed, 0)


def test_shapes_that_peft_would_not_choose(tmp_path):
    """A LoKr of LyCORIS may divide a layer in any way, also into two products; each layer keeps its own."""
    weight = sdxl_pipeline().unet.get_submodule("conv_out").weight  # (4, 16, 3, 3)
    torch.manual_seed(0)
    tensors = {"lokr_w1_a": torch.randn(2, 1), "lokr_w1_b": torch.randn(1, 8), "lokr_w2_a": torch.randn(2, 2),
               "lokr_w2_b": torch.randn(2, 2 * 9), "alpha": torch.tensor(3.0)}  # fmt: skip
    save_file({f"lora_unet_out_2.{name}": value for name, value in tensors.items()}, tmp_path / "a.safetensors")
    models = loaded(tmp_path / "a.safetensors", SDXL)
    change = weights(models)["unet", "conv_out"] - weight
    w1, w2 = tensors["lokr_w1_a"] @ tensors["lokr_w1_b"], tensors["lokr_w2_a"] @ tensors["lokr_w2_b"]
    wanted = torch.stack([torch.cat([3.0 / 2 * w1[a, c] * w2 for c in range(8)], dim=1) for a in range(2)])
    assert torch.allclose(change, wanted.reshape(weight.shape), atol=1e-6)
    tensors["lokr_w1_b"] = torch.randn(1, 7)
    save_file({f"lora_unet_out_2.{name}": value for name, value in tensors.items()}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="1 of its 1 layers have another shape"):
        loaded(tmp_path / "a.safetensors", SDXL)


@pytest.mark.parametrize("kind", ["LoHa", "LoKr"])
def test_under_autocast_the_product_is_float32(kind):
    """PEFT alone multiplies a pair of matrices in bfloat16."""
    model = models_of(SDXL)["unet"].bfloat16()
    model.add_adapter(config(kind, ["to_q"]), ADAPTER)
    for name, value in model.named_parameters():
        if ".lokr_" in name or ".hada_" in name:
            value.data = value.data.float()
    compute_products_in_float32(model)
    leave_inputs_to_autocast(model)
    layer = dict(model.named_modules())[adapted_layers(model)[0]]
    x = torch.randn(2, 5, layer.get_base_layer().in_features).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        delta, output = layer.get_delta_weight(ADAPTER), layer(x)
        wanted = layer.get_base_layer()(x) + torch.nn.functional.linear(x, delta)
    assert delta.dtype == torch.float32 and output.dtype == torch.bfloat16 and torch.equal(output, wanted)
    output.float().square().mean().backward()
    assert all(value.grad.abs().max() > 0 for value in layer.parameters() if value.requires_grad)


# ---------------------------------------------------------------------------------------------------------------------
# Files of others


def sd3_file(joined, dora=False):
    """{name: tensor} of an SD3 LoRA as sd-scripts writes it: queries, keys and values in one layer; and its changes.

    joined: three LoRAs that were joined, of which the keys' one is missing.
    """
    torch.manual_seed(2)
    transformer = sd3_pipeline(t5=False, sd35=True).transformer
    tensors, changes = {}, {}
    blocks = ("1.attn.to_q", "1.attn2.to_q", "0.attn.add_q_proj", "0.ff.net.2")
    for module in (*(f"transformer_blocks.{name}" for name in blocks), "norm_out.linear"):
        weight, name = transformer.get_submodule(module).weight, mmdit_name(module)
        layer = "lora_unet_" + name.replace("qkv.0", "qkv").replace(".", "_")
        thirds = 3 if name.endswith("qkv.0") else 1
        up, down = torch.randn(thirds * len(weight), 4), torch.randn(4, weight.shape[1])
        if joined and thirds == 3:
            up = torch.block_diag(
                torch.randn(len(weight), 1), torch.zeros(len(weight), 0), torch.randn(len(weight), 3)
            )
        tensors |= {
            f"{layer}.lora_up.weight": up,
            f"{layer}.lora_down.weight": down,
            f"{layer}.alpha": torch.tensor(2.0),
        }
        change = up @ down * (2 / 4)
        if module == "norm_out.linear":
            change = torch.cat(change.chunk(2)[::-1])
        names = [module.replace("q", which) if thirds == 3 else module for which in ("q", "k", "v")[:thirds]]
        changes |= {name: part for name, part in zip(names, change.chunk(thirds), strict=True) if part.any()}
    return tensors, changes


@pytest.mark.parametrize("joined", [False, True])
def test_sd3_files_of_sd_scripts(joined, tmp_path):
    """Joined layers are divided again, and shift and scale change places."""
    tensors, changes = sd3_file(joined)
    save_file(tensors, tmp_path / "a.safetensors")
    models, before = loaded(tmp_path / "a.safetensors", SD3), models_of(SD3)
    found = weights(models)
    assert {name for _, name in found} == changes.keys() and len(changes) == (8 if joined else 11)
    for (part, name), weight in found.items():
        assert torch.allclose(weight - before[part].get_submodule(name).weight, changes[name], atol=1e-5), name
    ranks = {layer.r[ADAPTER] for layer in models["transformer"].modules() if hasattr(layer, "get_delta_weight")}
    assert ranks == ({1, 3, 4} if joined else {4})


def test_a_projection_of_the_second_text_encoder(tmp_path):
    torch.manual_seed(0)
    up, down = torch.randn(16, 2), torch.randn(2, 16)
    tensors = {"lora_te2_text_projection.lora_up.weight": up, "lora_te2_text_projection.lora_down.weight": down}
    save_file(tensors, tmp_path / "a.safetensors")
    models = loaded(tmp_path / "a.safetensors", SDXL)
    weight = models_of(SDXL)["text_encoder_2"].text_projection.weight
    assert torch.allclose(weights({"text_encoder_2": models["text_encoder_2"]})["text_encoder_2", "text_projection"],
                          weight + up @ down, atol=1e-5)  # fmt: skip
    tokens = torch.arange(7)[None]
    with torch.no_grad():
        pooled = [each["text_encoder_2"](tokens).text_embeds for each in (models, models_of(SDXL))]
    assert not torch.allclose(*pooled)


LOKR = {"lora_unet_x.lokr_w1": [2, 2], "lora_unet_x.lokr_w2": [2, 2]}


def test_a_kronecker_product_that_cant_be_divided(tmp_path):
    width = sd3_pipeline(t5=False).transformer.get_submodule("transformer_blocks.0.attn.to_q").weight.shape[1]
    name = "lora_unet_joint_blocks_0_x_block_attn_qkv"
    for first, told in ((3, None), (4, "can't be divided into 3 layers")):
        tensors = {
            f"{name}.lokr_w1": torch.ones(first, 2),
            f"{name}.lokr_w2": torch.ones(3 * width // first, width // 2),
        }
        save_file(tensors, tmp_path / "a.safetensors")
        if told:
            with pytest.raises(UserError, match=told):
                loaded(tmp_path / "a.safetensors", SD3)
        else:
            assert len(adapted_layers(loaded(tmp_path / "a.safetensors", SD3)["transformer"])) == 3


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        ({"lora_unet_x.hada_w1_a": [2, 2], "lora_unet_x.hada_w1_b": [2, 2]}, "without all the matrices of a LoHa"),
        ({"lora_unet_x.lokr_w1": [2, 2], "lora_unet_x.lokr_w2_a": [2, 2]}, "without all the matrices of a LoKr"),
        (LOKR | {"lora_unet_x.dora_scale": [1, 4]}, "with magnitudes"),
        (LOKR, "1 of the 1 layers .* are no layers of this model"),
        ({"unet.to_x.lokr_w1": [2, 2], "unet.to_x.lokr_w2": [2, 2]}, "fit this model's unet"),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_refused(tensors, told, tmp_path):
    save_file({name: torch.zeros(shape) for name, shape in tensors.items()}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=told):
        loaded(tmp_path / "a.safetensors", SDXL)


def test_dropout_and_quantization_of_a_lycoris_file(tmp_path):
    from lpl_finetuning.lora_files import check_init_lora

    names = {"unet.conv_out.lokr_w1": torch.zeros(2, 2), "unet.conv_out.lokr_w2": torch.zeros(2, 8, 3, 3)}
    save_file(names, tmp_path / "a.safetensors")
    for more, told in (
        ({"lora_dropout": 0.1}, "is a LoKr: --lora_dropout"),
        ({"bnb_quantization_config_path": "x"}, "whole"),
    ):
        args = SimpleNamespace(**{"init_lora": str(tmp_path / "a.safetensors"), "lora_dropout": 0.0,
                                  "bnb_quantization_config_path": None} | more)  # fmt: skip
        with pytest.raises(UserError, match=told):
            check_init_lora(args, SDXL)


# ---------------------------------------------------------------------------------------------------------------------
# Merging


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The folder of the tiny SDXL whose weights `models_of` has."""
    folder = tmp_path_factory.mktemp("base") / "sdxl"
    pipeline_of(SDXL).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("kind", "strength"), [("DoRA", 1.0), ("LoKr", 0.5)])
def test_merged_weights_are_those_of_the_formulas(kind, strength, base, trained, tmp_path, capsys):
    """All layers, text encoders too; nothing else changes, and no adapter is left."""
    models = trained(kind, SDXL)
    tensors = saved(models, tmp_path, kind)
    merge.main([str(base), str(tmp_path / "k.safetensors"), str(tmp_path / "out"), "--strength", str(strength)])
    assert "2 layers of the text_encoder, 3 layers of the text_encoder_2" in capsys.readouterr().out
    result = StableDiffusionXLPipeline.from_pretrained(tmp_path / "out")
    for part, before in models_of(SDXL).items():
        after = getattr(result, part).state_dict()
        assert after.keys() == before.state_dict().keys()
        adapted = adapted_layers(models[part])
        for name, value in before.state_dict().items():
            module = name.removesuffix(".weight")
            if module in adapted and name.endswith(".weight"):
                value = torch.lerp(value, theirs(tensors, layer_in_file(part, module, models[part]), value), strength)
            assert torch.allclose(after[name], value, atol=2e-5), name


def test_a_lora_is_merged_into_a_single_file(base, trained, tmp_path, monkeypatch):
    """As into the folder of the same pipeline, which has the configurations that the file lacks."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    save_single_file(base, tmp_path / "model.safetensors", torch.float32)
    saved(trained("LoHa", SDXL), tmp_path, "LoHa")
    single = [str(tmp_path / "model.safetensors"), "--config_from", str(base)]
    for source, name in (([str(base)], "a"), (single, "b")):
        merge.main([*source, str(tmp_path / "k.safetensors"), str(tmp_path / name)])
    ours, theirs = (load_file(next((tmp_path / name / "unet").glob("*.safetensors"))) for name in "ab")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_merging_refuses(base, trained, tmp_path, capsys):
    """A folder that is there, a file that fits another model, and numbers that the base model's dtype can't hold."""
    save_lora(tmp_path, lora_parts(trained("LoKr", SDXL)), StableDiffusionXLPipeline)
    with pytest.raises(SystemExit):
        merge.main([str(base), str(tmp_path), str(base)])
    with pytest.raises(SystemExit):
        merge.main([str(base), str(tmp_path), str(tmp_path / "out"), "--config_from", str(base)])
    assert "--config_from is for a base model in a single file" in capsys.readouterr().err
    pipeline = pipeline_of(SDXL)
    with pytest.raises(UserError, match="of the unet would not be finite numbers"):
        pipeline.unet.half()
        merging.add_lora(pipeline, SDXL, str(tmp_path), 1e9)
    with pytest.raises(UserError, match="lora_bias"):
        merging.merge_adapter(
            "x", "unet", pipeline.unet, {}, LoraConfig(r=1, target_modules=["to_q"], lora_bias=True), 1.0
        )
    sd3_lora, _ = sd3_file(False)
    save_file(sd3_lora, tmp_path / "sd3.safetensors")
    with pytest.raises(UserError, match="12 of its 15 tensors are of a transformer"):
        merging.add_lora(pipeline_of(SDXL), SDXL, str(tmp_path / "sd3.safetensors"), 1.0)
