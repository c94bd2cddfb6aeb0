"""Reading LoRA files: each tensor arrives in the model with its own value, or the file is refused."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

from lpl_finetuning.errors import UserError
from lpl_finetuning.families import SDXL
from lpl_finetuning.lora_files import ADAPTER, LORA_FILE, adapter_state, find_lora, put_lora, read_lora
from lpl_finetuning.results.export import KOHYA_PREFIXES, kohya_state_dict, original_name
from lpl_finetuning.training.models import add_adapters, load_init_lora, load_lora, lora_parts, save_lora
from tests.tiny_models import sdxl_pipeline

LAYERS = {"unet": ["to_q", "to_out.0", "conv1"], "text_encoder": ["q_proj", "out_proj"], "text_encoder_2": ["k_proj"]}


def models_of(pipeline):
    """{part: model} of the parts that get a LoRA."""
    return {part: getattr(pipeline, part).requires_grad_(False) for part in LAYERS}


@pytest.fixture(scope="module")
def trained():
    """Function from "LoRA" or "DoRA" to the models of a pipeline, whose adapters have random values."""
    made = {}

    def build(kind):
        if kind not in made:
            made[kind] = models_of(sdxl_pipeline())
            torch.manual_seed(1)
            for part, model in made[kind].items():
                model.add_adapter(LoraConfig(r=3, lora_alpha=5, use_dora=kind == "DoRA", init_lora_weights=False,
                                             target_modules=LAYERS[part]), ADAPTER)  # fmt: skip
                for name, value in model.named_parameters():
                    if "magnitude" in name:
                        value.data *= 1 + torch.rand_like(value)
        return made[kind]

    return build


def outputs(models):
    """{(part, module): output of a layer with its LoRA for fixed inputs}"""
    found = {}
    for part, model in models.items():
        for name, module in model.eval().named_modules():
            if isinstance(module, LoraLayer):
                weight = module.base_layer.weight
                size = (1, weight.shape[1]) + (4, 4) * (weight.ndim == 4)
                inputs = torch.randn(size, generator=torch.Generator().manual_seed(0))
                found[part, name] = module(inputs.to(weight.dtype)).detach().float()
    return found


def load(path, dtype=torch.float32, adapter=torch.float32):
    """A LoRA file in the models of a fresh pipeline, which has random weights of the same seed."""
    models = {part: model.to(dtype) for part, model in models_of(sdxl_pipeline()).items()}
    lora = read_lora(
        "--init_lora x", find_lora("--init_lora x", str(path), SDXL), SDXL, StableDiffusionXLPipeline, models
    )
    for part, (layers, config) in lora.items():
        put_lora("--init_lora x", part, models[part], layers, config, adapter)
    return models


def kohya(models, shape=(-1, 1)):
    """The tensors of a LoRA or DoRA in kohya's format; shape: of the linear layers' dora_scale."""
    parts, config = lora_parts(models), models["unet"].config
    plain = {part: ({name: value for name, value in layers.items() if "magnitude" not in name}, own)
             for part, (layers, own) in parts.items()}  # fmt: skip
    tensors = kohya_state_dict(plain, config)
    for part, (layers, _) in parts.items():
        for name, value in layers.items():
            if "magnitude" in name:
                module = original_name(part, name.removesuffix(".lora_magnitude_vector"), config).replace(".", "_")
                of_conv = (-1, 1, 1, 1) if value.ndim == 4 else shape
                tensors[f"{KOHYA_PREFIXES[part]}{module}.dora_scale"] = value.reshape(of_conv).clone()
    return tensors


def assert_same(models, others, tolerance=0):
    ours, theirs = outputs(models), outputs(others)
    assert ours.keys() == theirs.keys()
    assert max((ours[key] - theirs[key]).abs().max() for key in ours) <= tolerance


# ---------------------------------------------------------------------------------------------------------------------
# What is read


@pytest.mark.parametrize("kind", ["LoRA", "DoRA"])
@pytest.mark.parametrize("named", ["now", "as PEFT names them"])
def test_our_own_file(kind, named, trained, tmp_path):
    """Older results name the text encoders' magnitudes as PEFT does, which transformers does not read."""
    save_lora(tmp_path, lora_parts(trained(kind)), StableDiffusionXLPipeline)
    if named != "now":
        from safetensors import safe_open

        tensors = {name.removesuffix(".weight") if "magnitude" in name else name: value
                   for name, value in load_file(tmp_path / LORA_FILE).items()}  # fmt: skip
        with safe_open(tmp_path / LORA_FILE, "pt") as file:
            save_file(tensors, tmp_path / LORA_FILE, file.metadata())
    assert_same(load(tmp_path), trained(kind))


def test_diffusers_itself_reads_all_of_our_file(trained, tmp_path):
    """By values: `load_lora_weights`, as the README says, gives every layer of a DoRA its trained magnitude."""
    save_lora(tmp_path, lora_parts(trained("DoRA")), StableDiffusionXLPipeline)
    pipeline = sdxl_pipeline()
    pipeline.load_lora_weights(tmp_path)
    assert_same(models_of(pipeline), trained("DoRA"), 1e-6)


@pytest.mark.parametrize("kind", ["LoRA", "DoRA"])
def test_resuming_reads_all_of_our_file(kind, trained, tmp_path):
    save_lora(tmp_path, lora_parts(trained(kind)), StableDiffusionXLPipeline)
    models = models_of(sdxl_pipeline())
    for part, model in models.items():
        model.add_adapter(LoraConfig(r=3, lora_alpha=5, use_dora=kind == "DoRA", target_modules=LAYERS[part]), ADAPTER)
    load_lora(tmp_path, models)
    assert_same(models, trained(kind))


@pytest.mark.parametrize("shape", [(-1, 1), (-1,)], ids=str)
@pytest.mark.parametrize("kind", ["LoRA", "DoRA"])
def test_kohyas_format(kind, shape, trained, tmp_path):
    save_file(kohya(trained(kind), shape), tmp_path / "a.safetensors")
    models = load(tmp_path)
    assert_same(models, trained(kind))
    assert {model.peft_config[ADAPTER].use_dora for model in models.values()} == {kind == "DoRA"}


def test_alphas_that_differ_or_are_absent(trained, tmp_path):
    """Each layer keeps its own alpha; without one it is the rank."""
    tensors = kohya(trained("LoRA"))
    for number, name in enumerate([name for name in tensors if name.endswith(".alpha")]):
        up = name.replace(".alpha", ".lora_up.weight")
        if number % 3 == 0:
            tensors[name], tensors[up] = tensors[name] * 2, tensors[up] / 2
        elif number % 3 == 1:
            tensors[up] = tensors[up] * tensors.pop(name) / 3
    save_file(tensors, tmp_path / "a.safetensors")
    assert_same(load(tmp_path), trained("LoRA"), 1e-5)


def test_values_are_not_rounded_to_the_models_dtype(trained, tmp_path):
    save_lora(tmp_path, lora_parts(trained("DoRA")), StableDiffusionXLPipeline)
    models = load(tmp_path, dtype=torch.bfloat16)
    for part, model in models.items():
        own = adapter_state(trained("DoRA")[part])
        assert all(torch.equal(value, own[name]) for name, value in adapter_state(model).items()), part


def test_dropout_is_the_flags_and_not_the_files(tmp_path):
    """Rank, alpha and layers are the file's; --lora_dropout is the run's."""
    unet = sdxl_pipeline().unet
    unet.add_adapter(LoraConfig(r=3, lora_dropout=0.5, target_modules=["to_q"]), ADAPTER)
    save_lora(tmp_path, lora_parts({"unet": unet}), StableDiffusionXLPipeline)
    for rate in (0.0, 0.25):
        args = SimpleNamespace(init_lora=str(tmp_path), lora_dropout=rate, base_model=SimpleNamespace(family=SDXL))
        models = {"unet": sdxl_pipeline().unet}
        load_init_lora(args, models, StableDiffusionXLPipeline)
        layers = [module for module in models["unet"].modules() if isinstance(module, LoraLayer)]
        assert {getattr(layer.lora_dropout[ADAPTER], "p", 0.0) for layer in layers} == {rate}


def test_a_new_adapter_is_float32_whatever_the_models_dtype():
    args = SimpleNamespace(init_lora=None, rank=2, lora_alpha=None, lora_dropout=0.0, use_dora=True, lora_type="dora",
                           lora_blocks=None, lora_pattern=None, base_model=SimpleNamespace(family=SDXL))  # fmt: skip
    models = {"unet": sdxl_pipeline().unet.to(torch.bfloat16)}
    add_adapters(args, models, StableDiffusionXLPipeline, ["to_q"])
    trained = [value for value in models["unet"].parameters() if value.requires_grad]
    assert {value.dtype for value in trained} == {torch.float32} and len(trained) % 3 == 0


def test_no_library_warns(trained, tmp_path, capfd):
    """Neither where the values are put in, nor on the meta device of the plan, where PyTorch called that a no-op."""
    save_lora(tmp_path, lora_parts(trained("LoRA")), StableDiffusionXLPipeline)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(tmp_path)
        unet, path = sdxl_pipeline().unet.to("meta"), find_lora("x", str(tmp_path), SDXL)
        layers, config = read_lora("x", path, SDXL, StableDiffusionXLPipeline, {"unet": unet})["unet"]
        put_lora("x", "unet", unet, layers, config, torch.float32)
    assert "no-op" not in capfd.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"lora_unet_x.hada_w1_a": [2, 2], "lora_unet_x.hada_w1_b": [2, 2]}, "a LoHa and .* of another kind"),
        ({"lora_unet_x.lokr_w1": [2, 2]}, "holds layers of a LoKr and .* of another kind"),
        ({"lora_unet_x.oft_blocks": [2, 2]}, "oft_blocks: OFT"),
        ({"lora_unet_x.diff": [2, 2], "lora_unet_x.diff_b": [2]}, "diff, diff_b: a difference of whole weights"),
        ({"lora_unet_x.w_norm": [2]}, "w_norm: a norm"),
        ({"lora_unet_x.a1.weight": [2, 2], "lora_unet_x.b1.weight": [2, 2]}, "a1.weight, b1.weight: GLoRA"),
        ({"lora_unet_x.lora_mid.weight": [2, 2, 3, 3]}, "lora_mid.weight: a convolution in three matrices"),
        ({"bundle_emb.sks.string_to_param.*": [2, 2]}, "an embedding"),
        ({"lora_unet_x.secret": [2]}, r"not a LoRA's \(secret\)"),
        ({"lora_unet_x.alpha": []}, r"1 layer without one of the two matrices \(lora_unet_x\)"),
        ({"lora_unet_x.dora_scale": [2, 1]}, "without one of the two matrices"),
        ({"lora_unet_x.lora_down.weight": [2, 2], "lora_unet_x.lora_up.weight": [2, 2]},
         r"1 of the .* layers .* are no layers of this model \(lora_unet_x\)"),
    ],
    ids=lambda value: next(iter(value)).split(".", 1)[1] if isinstance(value, dict) else "",
)  # fmt: skip
def test_tensors_among_the_others(more, told, trained, tmp_path):
    """No tensor is dropped without a word."""
    tensors = kohya(trained("LoRA")) | {name: torch.zeros(shape) for name, shape in more.items()}
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=told):
        load(tmp_path)


def test_dora_of_some_layers(trained, tmp_path):
    tensors = kohya(trained("DoRA"))
    tensors.pop(next(name for name in tensors if name.endswith("dora_scale")))
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"it lacks 1 of the .* tensors that its configuration asks for"):
        load(tmp_path)


def test_dora_with_a_magnitude_per_input(trained, tmp_path):
    tensors = kohya(trained("DoRA"))
    for name in [name for name in tensors if name.endswith("dora_scale")]:
        tensors[name] = torch.ones(1, *tensors[name.replace("dora_scale", "lora_down.weight")].shape[1:2])
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"30 of the 30 layers .* a magnitude per input \(dora_scale of shape \[1, "):
        load(tmp_path)


def test_values_that_do_not_arrive(trained, tmp_path, monkeypatch):
    """A library that loads names without values is found out."""
    save_lora(tmp_path, lora_parts(trained("DoRA")), StableDiffusionXLPipeline)
    monkeypatch.setattr("peft.utils.set_peft_model_state_dict", lambda *args, **more: None)
    with pytest.raises(UserError, match="did not arrive in the model"):
        load(tmp_path)
