"""SD3 for other programs: readers that know nothing of ours must find the same weights in the files.

No program that reads SD3's kohya files is installed. `patched` does what they do: it looks layers up by their original
names, adds alpha / rank * up @ down, and has diffusers' own converter make its transformer of the result.
"""

import copy

import pytest
import torch
from diffusers import AutoencoderKL, DDPMPipeline, SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.loaders.single_file_utils import (
    convert_ldm_vae_checkpoint,
    convert_sd3_transformer_checkpoint_to_diffusers,
    infer_diffusers_model_type,
)
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from benchmarks.memory import SD3_VAE, SD35_LARGE, SD35_MEDIUM
from lpl_finetuning.errors import UserError
from lpl_finetuning.families import SD3
from lpl_finetuning.results import export
from lpl_finetuning.training import models
from tests.tiny_models import sd3_pipeline
from tests.unit.test_export import TEXT, add_loras, draw, gap, layers_of

# ---------------------------------------------------------------------------------------------------------------------
# LoRA


@pytest.fixture(scope="module", params=[False, True], ids=["sd3", "sd35"])
def tiny(request):
    """A tiny SD3 or SD3.5 (dual attention in two of three blocks, norms of queries and keys), without T5."""
    pipeline = sd3_pipeline(t5=False, sd35=request.param)
    torch.manual_seed(3)
    for value in pipeline.transformer.parameters():
        value.data += 0.05 * torch.randn_like(value)
    return pipeline


@pytest.fixture
def pipeline(tiny):
    """A copy to put a LoRA into."""
    return StableDiffusion3Pipeline(**{name: copy.deepcopy(model) for name, model in tiny.components.items()
                                       if name not in ("image_encoder", "feature_extractor")})  # fmt: skip


def predict(transformer):
    """The transformer's output for fixed random inputs, (2, 16, 8, 8)."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"hidden_states": (2, 16, 8, 8), "encoder_hidden_states": (2, 5, 40), "pooled_projections": (2, 32)}
    inputs = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    with torch.no_grad():
        return transformer(**inputs, timestep=torch.tensor([200.0, 700.0])).sample


def merged(model):
    """The weights of a model with its LoRA merged by PEFT."""
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.merge()
    return {name.replace(".base_layer.", "."): value
            for name, value in model.state_dict().items() if ".lora_" not in name}  # fmt: skip


def patched(weights, lora, prefix):
    """`weights` {name: tensor} with the layers of a kohya file that have the prefix, all of which must be found."""
    names = {prefix + name.removesuffix(".weight").replace(".", "_"): name for name in weights}
    weights = dict(weights)
    for layer in {name.split(".")[0] for name in lora if name.startswith(prefix)}:
        down, up, alpha = (lora[f"{layer}.{leaf}"] for leaf in ("lora_down.weight", "lora_up.weight", "alpha"))
        weight = weights[names[layer]]
        delta = alpha / len(down) * (up.flatten(1) @ down.flatten(1))
        weights[names[layer]] = weight + delta.reshape(weight.shape)
    return weights


def read_transformer(base, lora):
    """The transformer that a reader of `lora` makes of `base`."""
    weights = patched(export.original_transformer(base), lora, "lora_unet_")
    model = SD3Transformer2DModel.from_config(base.config)
    model.load_state_dict(convert_sd3_transformer_checkpoint_to_diffusers(weights))
    return model.eval()


def test_the_converter_undoes_our_names(tiny):
    """What `patched` starts from: every tensor comes back to its place, bit for bit."""
    back = convert_sd3_transformer_checkpoint_to_diffusers(export.original_transformer(tiny.transformer))
    ours = tiny.transformer.state_dict()
    assert back.keys() == ours.keys()
    assert all(torch.equal(back[name], ours[name]) for name in ours)


RANKS = {"rank_pattern": {"to_q": 6, "add_v_proj": 2, "linear_1": 3}}
ALPHAS = {"alpha_pattern": {"to_k": 7, "add_q_proj": 0.5, "attn.to_out.0": 2}}
CASES = {
    "recipe": (SD3.lora_layers, {}),
    "q": (["to_q"], {}),
    "k and v": (["to_k", "attn.to_v", "add_k_proj"], {}),
    "norms": (["norm1.linear", "norm1_context.linear", "norm_out.linear"], {}),
    "all": (None, {}),
    "patterns": (None, RANKS | ALPHAS),
    "rslora": (None, {"use_rslora": True} | RANKS),
    "one block": (r".*blocks\.1\..*(to_q|to_v|add_k_proj|attn2.to_k)", {"rank_pattern": {"to_q": 6}}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_reader_gets_the_same_weights(case, tiny, pipeline, tmp_path):
    """Rank, alpha and targets of all kinds: each merged weight, and the output."""
    targets, more = CASES[case]
    targets = layers_of(pipeline.transformer) if targets is None else targets
    targets = targets if isinstance(targets, str) else list(targets)
    config = LoraConfig(r=4, lora_alpha=10, target_modules=targets, **more)
    loras = add_loras(pipeline, {"transformer": config})
    live = predict(pipeline.transformer)
    assert gap(live, predict(tiny.transformer)) > 0.05
    export.save_kohya(tmp_path, loras, pipeline.transformer.config)
    read = read_transformer(tiny.transformer, load_file(tmp_path / export.KOHYA_FILE))
    assert gap(live, predict(read)) < 1e-4
    ours, theirs = merged(pipeline.transformer), read.state_dict()
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        assert (weight - theirs[name]).abs().max() < 1e-5 * weight.abs().max().clamp(min=1), name


def test_text_encoders(tiny, pipeline, tmp_path):
    """CLIP-L and CLIP-G, of different rank and alpha, beside the transformer."""
    configs = {
        "transformer": LoraConfig(r=4, lora_alpha=10, target_modules=list(SD3.lora_layers)),
        "text_encoder": LoraConfig(r=8, lora_alpha=3, target_modules=TEXT),
        "text_encoder_2": LoraConfig(r=2, lora_alpha=5, target_modules=TEXT),
    }
    export.save_kohya(tmp_path, add_loras(pipeline, configs), pipeline.transformer.config)
    lora = load_file(tmp_path / export.KOHYA_FILE)
    found = 0
    for part, prefix in (("text_encoder", "lora_te1_"), ("text_encoder_2", "lora_te2_")):
        read = patched(getattr(tiny, part).state_dict(), lora, prefix)
        ours = merged(getattr(pipeline, part))
        assert ours.keys() == read.keys()
        assert all(torch.allclose(ours[name], read[name], atol=1e-5) for name in ours)
        found += sum(name.startswith(prefix) for name in lora)
    assert found == 2 * 2 * len(TEXT) * 3  # encoders, layers, targets, tensors


def test_diffusers_takes_its_own_file(tiny, pipeline, tmp_path):
    """From a folder with both, whatever the alpha; the kohya file alone is none that it knows."""
    loras = add_loras(pipeline, {"transformer": LoraConfig(r=4, lora_alpha=10, target_modules=list(SD3.lora_layers))})
    live, base = predict(pipeline.transformer), predict(tiny.transformer)
    models.save_lora(tmp_path, loras, StableDiffusion3Pipeline)
    export.save_kohya(tmp_path, loras, pipeline.transformer.config)
    pipeline.unload_lora_weights()
    pipeline.load_lora_weights(tmp_path)
    assert gap(live, predict(pipeline.transformer)) < 1e-5
    pipeline.unload_lora_weights()
    pipeline.load_lora_weights(tmp_path / export.KOHYA_FILE)
    assert gap(base, predict(pipeline.transformer)) < 1e-5


def test_fused_layers_as_sd_scripts_makes_them(pipeline):
    """Rank 3 r, alpha three times, `lora_up` block-diagonal and otherwise as trained: no number is changed."""
    config = LoraConfig(r=4, lora_alpha=10, target_modules=["to_q", "to_k", "to_v"])
    layers, _ = loras = add_loras(pipeline, {"transformer": config})["transformer"]
    tensors = export.kohya_state_dict({"transformer": loras}, pipeline.transformer.config)
    name = "lora_unet_joint_blocks_0_x_block_attn_qkv"
    assert tensors[f"{name}.alpha"] == 30
    down, up = tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"]
    assert down.shape == (12, 32) and up.shape == (96, 12)
    for third, letter in enumerate("qkv"):
        ours = f"transformer_blocks.0.attn.to_{letter}"
        assert torch.equal(down[4 * third : 4 * third + 4], layers[f"{ours}.lora_A.weight"])
        block = up[32 * third : 32 * third + 32].clone()
        assert torch.equal(block[:, 4 * third : 4 * third + 4], layers[f"{ours}.lora_B.weight"])
        block[:, 4 * third : 4 * third + 4] = 0
        assert not block.any()


def test_kohya_metadata_names_the_model(tmp_path):
    transformer = sd3_pipeline(t5=False).transformer
    layers = {f"context_embedder.lora_{which}.weight": torch.ones(4, 4) for which in "AB"}
    parts = {"transformer": (layers, LoraConfig(r=4, lora_alpha=10))}

    def metadata(**config):
        transformer.register_to_config(**config)
        export.save_kohya(tmp_path, parts, transformer.config)
        with safe_open(tmp_path / export.KOHYA_FILE, "pt") as file:
            return [file.metadata()[f"ss_{name}"] for name in
                    ("network_module", "base_model_version", "network_dim", "network_alpha")]  # fmt: skip

    assert metadata() == ["networks.lora_sd3", "3-medium", "4", "10"]
    assert metadata(qk_norm="rms_norm")[1] == "3-5-large"
    assert metadata(qk_norm="rms_norm", dual_attention_layers=(0,))[1] == "3-5-medium"


def test_what_kohya_cannot_hold_is_refused(pipeline):
    config = LoraConfig(r=4, target_modules=["to_q"], lora_bias=True)
    loras = add_loras(pipeline, {"transformer": config})
    with pytest.raises(UserError, match=r"format has no place for lora_B\.bias; leave --output_kohya_format out"):
        export.kohya_state_dict(loras, pipeline.transformer.config)
    for module in ("transformer_blocks.0.attn.to_qkv", "proj_in", "transformer_blocks.proj_out", "pos_embed.proj.0"):
        layers = {f"{module}.lora_A.weight": torch.zeros(4, 4)}
        with pytest.raises(UserError, match=f"transformer.{module} has no place"):
            export.kohya_state_dict({"transformer": (layers, config)}, pipeline.transformer.config)


# ---------------------------------------------------------------------------------------------------------------------
# The true models, on the meta device: names and shapes, no memory


@pytest.fixture(scope="module", params=["medium", "large"])
def true(request):
    """(kind, transformer) of SD3.5."""
    config = {"medium": SD35_MEDIUM, "large": SD35_LARGE}[request.param]
    with torch.device("meta"):
        return request.param, SD3Transformer2DModel.from_config(config)


def numbered(model):
    """The names of a model's parameters with two numbers each, as tensors of shape (2, 1, …, 1)."""
    return {name: torch.tensor([2.0 * number, 2 * number + 1]).reshape(2, *[1] * (value.ndim - 1))
            for number, (name, value) in enumerate(model.state_dict().items())}  # fmt: skip


def returns(model, original, convert, monkeypatch):
    """Whether `convert` brings all tensors of a model back to their names from those that `original` gives them."""
    ours = numbered(model)
    monkeypatch.setattr(model, "state_dict", lambda: ours)
    back = convert(original(model))
    monkeypatch.undo()
    return back.keys() == ours.keys() and all(torch.equal(back[name], ours[name]) for name in ours)


def test_diffusers_reads_back_every_name(true, monkeypatch):
    convert = convert_sd3_transformer_checkpoint_to_diffusers
    assert returns(true[1], export.original_transformer, convert, monkeypatch)
    with torch.device("meta"):
        vae = AutoencoderKL.from_config(SD3_VAE)
    assert returns(vae, lambda model: {f"first_stage_model.{name}": value for name, value in
                                       export.original_vae(model).items()},
                   lambda file: convert_ldm_vae_checkpoint(file, vae.config), monkeypatch)  # fmt: skip


KNOWN = {
    "medium": {
        "pos_embed": (1, 147456, 1536),
        "joint_blocks.12.x_block.attn2.qkv.weight": (4608, 1536),
        "joint_blocks.12.x_block.attn2.ln_k.weight": (64,),
        "joint_blocks.12.x_block.adaLN_modulation.1.weight": (13824, 1536),
        "joint_blocks.13.x_block.adaLN_modulation.1.weight": (9216, 1536),
        "joint_blocks.23.context_block.adaLN_modulation.1.bias": (3072,),
        "joint_blocks.23.context_block.attn.qkv.bias": (4608,),
    },
    "large": {
        "pos_embed": (1, 36864, 2432),
        "x_embedder.proj.weight": (2432, 16, 2, 2),
        "y_embedder.mlp.0.weight": (2432, 2048),
        "t_embedder.mlp.0.weight": (2432, 256),
        "context_embedder.weight": (2432, 4096),
        "joint_blocks.36.context_block.attn.proj.weight": (2432, 2432),
        "joint_blocks.36.context_block.mlp.fc1.weight": (9728, 2432),
        "joint_blocks.37.x_block.mlp.fc2.weight": (2432, 9728),
        "joint_blocks.37.x_block.attn.ln_q.weight": (64,),
        "final_layer.adaLN_modulation.1.weight": (4864, 2432),
        "final_layer.linear.weight": (64, 2432),
    },
}


def test_names_and_shapes_of_the_true_models(true):
    """Those by which programs know the models."""
    kind, transformer = true
    tensors = export.original_transformer(transformer)
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    assert {name: shapes.get(name) for name in KNOWN[kind]} == KNOWN[kind]
    assert "joint_blocks.13.x_block.attn2.qkv.weight" not in shapes
    assert infer_diffusers_model_type(tensors) == f"sd35_{kind}"


def test_every_layer_of_the_true_models_has_a_kohya_name(true):
    """Each linear and convolutional layer finds its place, and each weight of the original layout its LoRA."""
    transformer = true[1]
    layers = {}
    with torch.device("meta"):
        for name in layers_of(transformer):
            weight = transformer.get_submodule(name).weight
            layers |= {f"{name}.lora_A.weight": torch.zeros(4, *weight.shape[1:]),
                       f"{name}.lora_B.weight": torch.zeros(len(weight), 4)}  # fmt: skip
        tensors = export.kohya_state_dict({"transformer": (layers, LoraConfig(r=4))}, transformer.config)
    original = export.original_transformer(transformer)
    theirs = {"lora_unet_" + name.removesuffix(".weight").replace(".", "_"): value.shape
              for name, value in original.items() if name.endswith(".weight") and ".ln_" not in name}  # fmt: skip
    ours = {name.split(".")[0] for name in tensors}
    assert ours == theirs.keys()
    for name, shape in theirs.items():
        assert tensors[f"{name}.lora_up.weight"].shape[0] == shape[0]
        assert tensors[f"{name}.lora_down.weight"].shape[1:] == shape[1:]


# ---------------------------------------------------------------------------------------------------------------------
# One file


def random_pipeline(identity):
    """A random SD3.5 of two heads of width 64 and two blocks, encoders of different widths, all parameters random."""
    pipeline = sd3_pipeline()
    wide = {"hidden_size": 32, "projection_dim": 32, "hidden_act": "gelu"}
    clip_g = CLIPTextConfig(**{**pipeline.text_encoder_2.config.to_dict(), **wide})
    t5 = T5Config(**{**pipeline.text_encoder_3.config.to_dict(), "d_model": 64})
    transformer = SD3Transformer2DModel(
        sample_size=8,
        in_channels=16,
        num_layers=2,
        attention_head_dim=64,
        num_attention_heads=2,
        joint_attention_dim=64,
        caption_projection_dim=128,
        pooled_projection_dim=16 + 32,
        out_channels=16,
        pos_embed_max_size=16,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    pipeline.register_modules(transformer=transformer, text_encoder_2=CLIPTextModelWithProjection(clip_g).eval(),
                              text_encoder_3=T5EncoderModel(t5).eval())  # fmt: skip
    torch.manual_seed(2)
    for name in export.SD3_COMPONENTS:
        for value in getattr(pipeline, name).parameters():
            value.data += 0.05 * torch.randn_like(value)
    projection = pipeline.text_encoder.text_projection.weight
    projection.data = torch.eye(16) if identity else torch.randn(16, 16)
    return pipeline


@pytest.fixture(scope="module", params=[True, False], ids=["identity", "projection"])
def whole(request, tmp_path_factory):
    """(pipeline, its folder, whether CLIP-L's projection is the identity, as it is in Stability AI's models)."""
    pipeline, folder = random_pipeline(request.param), tmp_path_factory.mktemp("sd3")
    pipeline.save_pretrained(folder)
    return pipeline, folder, request.param


def read(path, folder, **more):
    """A single file as diffusers reads it; configurations and tokenizers are the folder's."""
    pipeline = StableDiffusion3Pipeline.from_single_file(path, config=str(folder), local_files_only=True, **more)
    pipeline.text_encoder_3.eval()  # diffusers 0.42 leaves T5 in training mode, with dropout
    return pipeline


def differences(one, other, dtype=torch.float32):
    """The (model, name) of the tensors of a pipeline, in a type, that are others in another pipeline."""
    found = set()
    for part in export.SD3_COMPONENTS:
        ours, theirs = (getattr(pipeline, part).state_dict() for pipeline in (one, other))
        assert ours.keys() == theirs.keys()
        found |= {(part, name) for name in ours if not torch.equal(ours[name].to(dtype), theirs[name].to(dtype))}
    return found


FOLDED = {("text_encoder", "text_projection.weight"), ("transformer", "time_text_embed.text_embedder.linear_1.weight")}


def test_a_single_file_is_the_pipeline(whole, tmp_path):
    """Bit for bit but for CLIP-L's projection, which the file does without; and the same picture."""
    pipeline, folder, identity = whole
    path = tmp_path / "model.safetensors"
    export.save_single_file(pipeline, path, torch.float32)
    loaded = read(path, folder)
    assert differences(pipeline, loaded) == (set() if identity else FOLDED)
    assert gap(draw(pipeline), draw(loaded)) < 1e-4
    if not identity:
        untold = StableDiffusion3Pipeline.from_pretrained(folder, text_encoder=loaded.text_encoder)
        assert gap(draw(pipeline), draw(untold)) > 0.01, "the projection counts"


@pytest.mark.parametrize("from_folder", [False, True])
def test_half_precision_is_the_default(from_folder, whole, tmp_path):
    pipeline, folder, identity = whole
    path = tmp_path / "model.safetensors"
    export.save_single_file(folder if from_folder else pipeline, path)
    assert {value.dtype for value in load_file(path).values()} == {torch.float16}
    loaded = read(path, folder, dtype=torch.float16)
    assert differences(pipeline, loaded, torch.float16) == (set() if identity else FOLDED)


def test_the_names_of_a_whole_file(whole, tmp_path):
    """Those by which ComfyUI and sd-scripts find the parts; T5 is left out where there is none."""
    pipeline = whole[0]
    path = tmp_path / "model.safetensors"
    export.save_single_file(pipeline, path)
    names = set(load_file(path))
    known = {
        "model.diffusion_model.joint_blocks.0.context_block.attn.qkv.weight",
        "model.diffusion_model.pos_embed",
        "first_stage_model.decoder.conv_in.weight",
        "text_encoders.clip_l.transformer.text_model.embeddings.position_embedding.weight",
        "text_encoders.clip_l.transformer.text_projection.weight",
        "text_encoders.clip_g.transformer.text_model.embeddings.position_embedding.weight",
        "text_encoders.clip_g.transformer.text_projection.weight",
        "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.k.weight",
        "text_encoders.t5xxl.transformer.shared.weight",
        "text_encoders.t5xxl.transformer.encoder.embed_tokens.weight",
    }
    assert known <= names
    without = StableDiffusion3Pipeline(**{**pipeline.components, "text_encoder_3": None, "tokenizer_3": None})
    without.save_pretrained(tmp_path / "without")
    for source in (without, tmp_path / "without"):
        export.save_single_file(source, path)
        assert set(load_file(path)) == {name for name in names if ".t5xxl." not in name}


def test_what_a_single_file_cannot_hold_is_refused(pipeline, tmp_path):
    add_loras(pipeline, {"transformer": LoraConfig(r=4, target_modules=["to_q"])})
    with pytest.raises(UserError, match="fuse_lora"):
        export.save_single_file(pipeline, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="DDPMPipeline: single files are there for SDXL and SD3"):
        export.save_single_file(DDPMPipeline(None, pipeline.scheduler), tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())
