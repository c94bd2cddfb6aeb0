"""Files for other programs: each is loaded by a reader that knows nothing of ours, and must draw the same picture."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from lpl_finetuning.errors import UserError
from lpl_finetuning.results import export
from lpl_finetuning.training import models as models_module
from tests.tiny_models import autoencoder, sdxl_pipeline

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
TEXT = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
PARTS = {"unet": (4, 10, ATTENTION), "text_encoder": (8, 3, TEXT), "text_encoder_2": (2, 5, TEXT)}  # r, alpha, layers


def add_loras(pipeline, configs, seed=1):
    """Put a random LoRA into the models that `configs` names: returns them as the `parts` of `results.export`."""
    torch.manual_seed(seed)
    for part, config in configs.items():
        getattr(pipeline, part).add_adapter(config)
        for name, value in getattr(pipeline, part).named_parameters():
            if "lora_" in name:
                value.data.normal_(0, 0.3)
    return {part: (get_peft_model_state_dict(getattr(pipeline, part)), config) for part, config in configs.items()}


def lora_configs(parts=PARTS, **more):
    """Configurations of rank, alpha and layers as in PARTS."""
    return {part: LoraConfig(r=r, lora_alpha=alpha, target_modules=layers, **more)
            for part, (r, alpha, layers) in PARTS.items() if part in parts}  # fmt: skip


def draw(pipeline):
    """What the pipeline makes of one prompt and seed after two steps, (1, 4, 8, 8) latents."""
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    options = {"num_inference_steps": 2, "height": 64, "width": 64, "output_type": "latent"}
    return pipeline("a red apple", generator=generator, **options).images


def draw_with(lora):
    """The latents of the tiny pipeline with a LoRA file."""
    pipeline = sdxl_pipeline()
    pipeline.load_lora_weights(lora)
    return draw(pipeline)


def gap(one, other):
    """The largest difference, in units of the larger's spread."""
    return ((one - other).abs().max() / one.std()).item()


@pytest.fixture(scope="module")
def base():
    """The latents of the tiny pipeline without any LoRA."""
    return draw(sdxl_pipeline())


@pytest.fixture(scope="module")
def sdxl():
    """The four models of the true SDXL, on the meta device: shapes, no memory."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=128,
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=2,
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
        )
        clip_l = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
        clip_g = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
        text_encoder = CLIPTextModel(CLIPTextConfig(vocab_size=49408, projection_dim=768, **clip_l))
        text_encoder_2 = CLIPTextModelWithProjection(CLIPTextConfig(vocab_size=49408, projection_dim=1280, **clip_g))
    return unet, vae, text_encoder, text_encoder_2


# ---------------------------------------------------------------------------------------------------------------------
# LoRA


@pytest.mark.parametrize("parts", [tuple(PARTS), *((part,) for part in PARTS)], ids=lambda parts: "+".join(parts))
def test_both_files_draw_what_the_adapters_draw(parts, base, tmp_path):
    """Alpha differs from rank and from model to model; each model alone, and all together."""
    pipeline = sdxl_pipeline()
    loras = add_loras(pipeline, lora_configs(parts))
    live = draw(pipeline)
    assert gap(live, base) > 0.05
    models_module.save_lora(tmp_path, loras, StableDiffusionXLPipeline)
    export.save_kohya(tmp_path, loras, pipeline.unet.config)
    assert gap(live, draw_with(tmp_path)) < 1e-5, "a folder with both files: diffusers takes its own"
    assert gap(live, draw_with(tmp_path / export.KOHYA_FILE)) < 1e-5

    tensors = load_file(tmp_path / export.KOHYA_FILE)
    for name in tensors:
        if name.endswith(".alpha"):
            tensors[name] = torch.tensor(float(len(tensors[name.replace(".alpha", ".lora_down.weight")])))
    save_file(tensors, tmp_path / "alpha_is_rank.safetensors")
    assert gap(live, draw_with(tmp_path / "alpha_is_rank.safetensors")) > 0.02, "the alpha in the file counts"


def layers_of(model):
    """The full names of all layers of a model that a LoRA can have."""
    return [name for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)]  # fmt: skip


PATTERNS = {
    "unet": {"rank_pattern": {"conv1": 2, "to_q": 6}, "alpha_pattern": {"conv2": 2, "to_k": 7}},
    "text_encoder": {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"encoder.layers.1.self_attn.k_proj": 9}},
    "text_encoder_2": {"rank_pattern": {"fc1": 3}, "alpha_pattern": {"text_model.encoder.layers.1.mlp.fc2": 9}},
}


@pytest.mark.parametrize("kind", ["plain", "patterns", "rslora"])
def test_all_layers_and_patterns(kind, tmp_path):
    """Every linear and convolutional layer, by its full name; ranks and alphas that differ from layer to layer."""
    pipeline = sdxl_pipeline()
    more = {"plain": {}, "patterns": PATTERNS, "rslora": {part: {"use_rslora": True} for part in PARTS}}[kind]
    configs = {
        part: LoraConfig(r=4, lora_alpha=1.5, target_modules=layers_of(getattr(pipeline, part)), **more.get(part, {}))
        for part in PARTS
    }
    loras = add_loras(pipeline, configs)
    live = draw(pipeline)
    models_module.save_lora(tmp_path, loras, StableDiffusionXLPipeline)
    export.save_kohya(tmp_path, loras, pipeline.unet.config)
    assert gap(live, draw_with(tmp_path)) < 1e-4  # rounding differs between CPUs: 1.1e-5 on some
    assert gap(live, draw_with(tmp_path / export.KOHYA_FILE)) < 1e-4
    with safe_open(tmp_path / "pytorch_lora_weights.safetensors", "pt") as file:
        assert "text_model." not in file.metadata()["lora_adapter_metadata"], "so that either form of encoder matches"


def test_the_diffusers_file_has_nested_names_and_its_own_configurations(tmp_path):
    """`text_encoder.text_model.…` for both encoders, though transformers flattens one of them; rank and alpha kept."""
    loras = add_loras(sdxl_pipeline(), lora_configs())
    models_module.save_lora(tmp_path, loras, StableDiffusionXLPipeline)
    path = tmp_path / "pytorch_lora_weights.safetensors"
    names = set(load_file(path))
    for encoder in ("text_encoder", "text_encoder_2"):
        assert f"{encoder}.text_model.encoder.layers.1.self_attn.q_proj.lora_A.weight" in names
        assert not any(name.startswith((f"{encoder}.encoder", f"{encoder}.text_model.text_model")) for name in names)
    assert len(names) == sum(len(layers) for layers, _ in loras.values())
    pipeline = sdxl_pipeline()
    pipeline.load_lora_weights(tmp_path)
    for part, (r, alpha, _) in PARTS.items():
        config = getattr(pipeline, part).peft_config["default_0"]
        assert (config.r, config.lora_alpha) == (r, alpha)


def test_kohya_metadata_is_what_the_file_holds(tmp_path):
    loras = add_loras(sdxl_pipeline(), lora_configs())
    config = sdxl_pipeline().unet.config

    def metadata(**parts):
        export.save_kohya(tmp_path, parts, config)
        with safe_open(tmp_path / export.KOHYA_FILE, "pt") as file:
            return {name: file.metadata()[f"ss_{name}"] for name in ("network_dim", "network_alpha")}

    assert metadata(unet=loras["unet"]) == {"network_dim": "4", "network_alpha": "10"}
    assert metadata(**loras) == {"network_dim": "Dynamic", "network_alpha": "Dynamic"}
    half = LoraConfig(r=4, lora_alpha=2.5, target_modules=ATTENTION)
    assert metadata(unet=(loras["unet"][0], half)) == {"network_dim": "4", "network_alpha": "2.5"}


def test_what_kohya_cannot_hold_is_refused():
    pipeline = sdxl_pipeline()
    loras = add_loras(pipeline, lora_configs(["unet"], lora_bias=True))
    with pytest.raises(UserError, match=r"format has no place for lora_B\.bias; leave --output_kohya_format out"):
        export.kohya_state_dict(loras, pipeline.unet.config)
    for module in ("down_blocks.0.motion_modules.0.proj_in", "up_blocks.0.resnets.0.attention"):
        layers = {f"{module}.lora_A.weight": torch.zeros(4, 4)}
        with pytest.raises(UserError, match=f"unet.{module} has no place"):
            export.kohya_state_dict({"unet": (layers, loras["unet"][1])}, pipeline.unet.config)


KOHYA_NAMES = {
    "lora_unet_input_blocks_0_0",
    "lora_unet_input_blocks_1_0_in_layers_2",
    "lora_unet_input_blocks_3_0_op",
    "lora_unet_input_blocks_4_0_skip_connection",
    "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q",
    "lora_unet_input_blocks_8_1_transformer_blocks_9_attn2_to_out_0",
    "lora_unet_middle_block_0_emb_layers_1",
    "lora_unet_middle_block_1_transformer_blocks_9_ff_net_0_proj",
    "lora_unet_middle_block_2_out_layers_3",
    "lora_unet_output_blocks_2_1_proj_in",
    "lora_unet_output_blocks_2_2_conv",
    "lora_unet_output_blocks_5_1_transformer_blocks_1_ff_net_2",
    "lora_unet_output_blocks_8_0_in_layers_2",
    "lora_unet_time_embed_2",
    "lora_unet_label_emb_0_0",
    "lora_unet_out_2",
    "lora_te1_text_model_encoder_layers_11_mlp_fc2",
    "lora_te2_text_model_encoder_layers_31_self_attn_out_proj",
}


def test_kohya_names_of_the_true_sdxl(sdxl):
    """Each layer has one name, which is how ComfyUI, A1111 and sd-scripts name the same module of their own UNet."""
    models = dict(zip(PARTS, (sdxl[0], *sdxl[2:]), strict=True))
    config = LoraConfig(r=4, lora_alpha=10)
    loras = {part: ({f"{name}.lora_{which}.weight": torch.zeros(4, 1) for name in layers_of(model) for which in "AB"},
                    config) for part, model in models.items()}  # fmt: skip
    ours = {name.partition(".")[0] for name in export.kohya_state_dict(loras, sdxl[0].config)}
    assert 2 * len(ours) == sum(len(layers) for layers, _ in loras.values())
    assert ours >= KOHYA_NAMES
    file = export.original_unet(sdxl[0])
    theirs = {"lora_unet_" + name.removesuffix(".weight").replace(".", "_") for name in file}
    assert {name for name in ours if name.startswith("lora_unet")} <= theirs


def test_an_upsampler_follows_what_its_layer_has():
    """SDXL's come after attention, in slot 2; without attention it would be slot 1."""
    config = SimpleNamespace(layers_per_block=2, up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"))
    assert export.unet_name("up_blocks.0.upsamplers.0.conv", config) == "output_blocks.2.1.conv"
    assert export.unet_name("up_blocks.1.upsamplers.0.conv", config) == "output_blocks.5.2.conv"


# ---------------------------------------------------------------------------------------------------------------------
# One file


@pytest.fixture(scope="module")
def three_blocks():
    """A random SDXL of three blocks, laid out as the true one; all parameters random, encoders of different widths."""
    pipeline = sdxl_pipeline()
    torch.manual_seed(2)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 3),
        attention_head_dim=(2, 4, 4),
        cross_attention_dim=16 + 32,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=32 + 6 * 8,
    )
    wide = {"hidden_size": 32, "projection_dim": 32, "hidden_act": "gelu"}
    config = CLIPTextConfig(**{**pipeline.text_encoder_2.config.to_dict(), **wide})
    pipeline.register_modules(unet=unet, text_encoder_2=CLIPTextModelWithProjection(config).eval())
    for name in export.COMPONENTS:
        for value in getattr(pipeline, name).parameters():
            value.data += 0.05 * torch.randn_like(value)
    return pipeline


@pytest.fixture(scope="module")
def three_blocks_folder(three_blocks, tmp_path_factory):
    """The same on disk."""
    folder = tmp_path_factory.mktemp("three-blocks")
    three_blocks.save_pretrained(folder)
    return folder


def read(path, folder, **more):
    """A single file as diffusers reads it; configurations and tokenizers are the folder's."""
    return StableDiffusionXLPipeline.from_single_file(path, config=str(folder), local_files_only=True, **more)


def states(pipeline):
    """All tensors of a pipeline by (model, name)."""
    return {(part, name): value for part in export.COMPONENTS
            for name, value in getattr(pipeline, part).state_dict().items()}  # fmt: skip


def test_a_single_file_is_the_pipeline(three_blocks, three_blocks_folder, tmp_path):
    """Written in float32 and read by diffusers: every tensor bit for bit, and the same picture."""
    path = tmp_path / "model.safetensors"
    export.save_single_file(three_blocks, path, torch.float32)
    loaded = read(path, three_blocks_folder)
    ours, theirs = states(three_blocks), states(loaded)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert gap(draw(three_blocks), draw(loaded)) < 1e-5


@pytest.mark.parametrize("source", ["three_blocks", "three_blocks_folder"])
def test_half_precision_is_the_default(source, three_blocks, three_blocks_folder, tmp_path, request):
    path = tmp_path / "model.safetensors"
    export.save_single_file(request.getfixturevalue(source), path)
    assert {value.dtype for value in load_file(path).values()} == {torch.float16}
    ours, theirs = states(three_blocks), states(read(path, three_blocks_folder, dtype=torch.float16))
    assert all(torch.equal(ours[key].half(), theirs[key]) for key in ours)


@pytest.mark.parametrize("zero_snr", [False, True])
def test_v_prediction_is_marked(zero_snr, three_blocks, three_blocks_folder, tmp_path):
    """By empty tensors, which diffusers ignores."""
    path = tmp_path / "model.safetensors"
    scheduler = sdxl_pipeline(prediction_type="v_prediction", rescale_betas_zero_snr=zero_snr).scheduler
    pipeline = StableDiffusionXLPipeline(**{**three_blocks.components, "scheduler": scheduler}, add_watermarker=False)
    export.save_single_file(pipeline, path)
    extra = {name: value.numel() for name, value in load_file(path).items() if "." not in name}
    assert extra == ({"v_pred": 0, "ztsnr": 0} if zero_snr else {"v_pred": 0})
    assert states(read(path, three_blocks_folder)).keys() == states(three_blocks).keys()


def test_what_a_single_file_cannot_hold_is_refused(tmp_path):
    with pytest.raises(UserError, match="prediction type sample"):
        export.save_single_file(sdxl_pipeline(prediction_type="sample"), tmp_path / "model.safetensors")
    pipeline = sdxl_pipeline()
    add_loras(pipeline, lora_configs(["text_encoder"]))
    with pytest.raises(UserError, match="fuse_lora"):
        export.save_single_file(pipeline, tmp_path / "model.safetensors")
    pipeline = sdxl_pipeline()
    pipeline.vae = autoencoder("asymmetric")
    with pytest.raises(UserError, match="AsymmetricAutoencoderKL has no place"):
        export.save_single_file(pipeline, tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    def interrupted(path, tensors, metadata):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    path = tmp_path / "model.safetensors"
    export.write_safetensors(path, {"a": torch.ones(3)}, {})
    monkeypatch.setattr(export, "write_tensors", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export.write_safetensors(path, {"a": torch.zeros(3)}, {})
    assert load_file(path)["a"].tolist() == [1, 1, 1]


def numbered(model):
    """The names of a model's parameters with their numbers, as tensors of shape (1, …, 1)."""
    return {name: torch.full((1,) * value.ndim, float(number))
            for number, (name, value) in enumerate(model.state_dict().items())}  # fmt: skip


def test_diffusers_reads_back_every_name_of_the_true_sdxl(sdxl, monkeypatch):
    """2,641 numbered tensors under our names, through diffusers' loader, which returns each to its own place."""
    tags = [numbered(model) for model in sdxl]
    for model, tensors in zip(sdxl, tags, strict=True):
        monkeypatch.setattr(model, "state_dict", lambda tensors=tensors: tensors)
    unet, vae, _, text_encoder_2 = sdxl
    file = export.original_state_dict(*sdxl)
    back = [
        convert_ldm_unet_checkpoint(file, unet.config),
        convert_ldm_vae_checkpoint(file, vae.config),
        {name.removeprefix("text_model."): value for name, value in convert_ldm_clip_checkpoint(file).items()},
        convert_open_clip_checkpoint(text_encoder_2, file, prefix="conditioner.embedders.1.model."),
    ]
    for ours, theirs in zip(tags, back, strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert [len(tensors) for tensors in tags] == [1680, 248, 196, 517]


def test_the_true_sdxl_has_the_names_and_shapes_of_its_own_file(sdxl):
    """Some of sd_xl_base_1.0.safetensors, which holds 2,515 tensors, `position_ids` and `logit_scale` among them."""
    shapes = {name: tuple(value.shape) for name, value in export.original_state_dict(*sdxl).items()}
    assert len(shapes) == 2515 - 2
    known = {
        "model.diffusion_model.label_emb.0.0.weight": (1280, 2816),
        "model.diffusion_model.input_blocks.4.1.transformer_blocks.1.attn2.to_k.weight": (640, 2048),
        "model.diffusion_model.input_blocks.7.0.skip_connection.weight": (1280, 640, 1, 1),
        "model.diffusion_model.middle_block.1.transformer_blocks.9.ff.net.0.proj.weight": (10240, 1280),
        "model.diffusion_model.output_blocks.2.2.conv.weight": (1280, 1280, 3, 3),
        "model.diffusion_model.output_blocks.8.0.in_layers.2.weight": (320, 640, 3, 3),
        "first_stage_model.encoder.mid.attn_1.q.weight": (512, 512, 1, 1),
        "first_stage_model.decoder.up.0.block.0.nin_shortcut.weight": (128, 256, 1, 1),
        "first_stage_model.decoder.up.3.upsample.conv.weight": (512, 512, 3, 3),
        "first_stage_model.quant_conv.weight": (8, 8, 1, 1),
        "conditioner.embedders.0.transformer.text_model.encoder.layers.11.mlp.fc1.weight": (3072, 768),
        "conditioner.embedders.1.model.positional_embedding": (77, 1280),
        "conditioner.embedders.1.model.text_projection": (1280, 1280),
        "conditioner.embedders.1.model.transformer.resblocks.31.attn.in_proj_weight": (3840, 1280),
        "conditioner.embedders.1.model.transformer.resblocks.31.mlp.c_fc.bias": (5120,),
        "conditioner.embedders.1.model.ln_final.bias": (1280,),
    }
    assert {name: shapes.get(name) for name in known} == known
