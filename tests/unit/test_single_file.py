"""A single file as base model: what its header says, how it is unpacked, and what is refused."""

import json
import os
import shutil
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
import transformers
from diffusers import AutoencoderKL, SD3Transformer2DModel, UNet2DConditionModel
from safetensors.torch import load_file, save_file

import train_latent_classifier
import train_sd3_lpl_flow
import train_sdxl_lpl
from lpl_finetuning import unpacking
from lpl_finetuning.base_model import BaseModel
from lpl_finetuning.errors import DataError, UserError
from lpl_finetuning.families import SD3, SDXL
from lpl_finetuning.files import sha256_of
from lpl_finetuning.networks.encoder_sketch import encoder_sketch, same_encoder
from lpl_finetuning.results.export import original_state_dict, original_transformer, original_vae
from lpl_finetuning.results.hub import schedule_of_base, snippet, source_in_words
from lpl_finetuning.single_file import SD3_FILE, SDXL_FILE, read_single_file, transformer_config
from lpl_finetuning.training.models import load_part, load_part_config, load_pipeline
from tests import sdxl
from tests.runs import ROOT

SCRIPTS = {"sdxl": train_sdxl_lpl, "sd3": train_sd3_lpl_flow}
EXAMPLES = {name: ROOT / "examples" / f"tiny-{name}" for name in SCRIPTS}
FAMILIES = {"sdxl": SDXL, "sd3": SD3}
LAYOUTS = {"sdxl": SDXL_FILE, "sd3": SD3_FILE}
UNET, MMDIT = "model.diffusion_model.", "model.diffusion_model.joint_blocks."


def write_file(path, shapes, metadata=None, dtype="F16", content=None):
    """A safetensors file with tensors of these shapes, of zeros that take no room on the disk, or of `content`."""
    size, end, header = {"F32": 4, "F16": 2, "I8": 1}[dtype], 0, {"__metadata__": metadata} if metadata else {}
    for name, shape in shapes.items():
        begin, end = end, end + int(np.prod(shape)) * size
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text + (content or b""))
        file.truncate(8 + len(text) + end)
    return path


def tiny_shapes(family, without=()):
    """{name: shape} of an example's single file."""
    shapes = {}
    for name, part in LAYOUTS[family].parts.items():
        config = json.loads((EXAMPLES[family] / name / "config.json").read_text())
        for piece in part.pieces(config).values():
            shapes |= {part.prefix + piece.source: piece.source_shape} if piece.source else {}
    return {name: shape for name, shape in shapes.items() if not name.startswith(without or ("-",))}


@pytest.fixture
def start(pictures, tmp_path):
    """Function that parses the flags of a script with a base model of its own."""

    def parse(path, *flags, family="sdxl", config=True, cache="cache"):
        words = ["--pretrained_model_name_or_path", path, "--train_data_dir", pictures, "--resolution", 64,
                 "--output_dir", tmp_path / "out", "--cache_dir", tmp_path / cache]  # fmt: skip
        words += ["--config_from", EXAMPLES[family]] if config else []
        return SCRIPTS[family].parse_args([str(word) for word in (*words, *flags)])

    return parse


def refused(parse, *words, **more):
    """The message of a refused start."""
    with pytest.raises((UserError, DataError)) as raised:
        parse(*words, **more)
    return str(raised.value)


# ---------------------------------------------------------------------------------------------------------------------
# True sizes, from headers


def config_in_package(folder, part):
    """A configuration of the package."""
    return json.loads((unpacking.PIPELINES / folder / part / "config.json").read_text())


TINY_MMDIT = {"num_layers": 2, "num_attention_heads": 1, "attention_head_dim": 64, "caption_projection_dim": 64,
              "joint_attention_dim": 4096, "pooled_projection_dim": 2048, "in_channels": 16, "out_channels": 16,
              "patch_size": 2, "pos_embed_max_size": 192}  # fmt: skip


def on_meta(folder, part, cls):
    """A model of the package's configurations without weights."""
    config = config_in_package(folder, part)
    with torch.device("meta"):
        if part.startswith("text_encoder"):
            kind = transformers.T5Config if part == "text_encoder_3" else transformers.CLIPTextConfig
            return cls(kind(**config))
        return cls.from_config(config)


def shapes_of(model):
    """{name: shape} of a model; of text encoders under the nested names."""
    found = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    found.pop("encoder.embed_tokens.weight", None)
    if isinstance(model, transformers.CLIPTextModel) and not any(name.startswith("text_model.") for name in found):
        found = {f"text_model.{name}": shape for name, shape in found.items()}
    return found


def pieces_of(base):
    """{part: {name: Piece}} of the single file that a base model is."""
    return {file.split("/")[0]: pieces for file, (_, pieces) in base.unpacked[base.name].parts.items()}


CLIPS = (transformers.CLIPTextModel, transformers.CLIPTextModelWithProjection)


def test_sdxl_of_true_size_is_planned_without_weights(start, tmp_path):
    """All 2,641 tensors, from a header alone, with the package's configurations and vocabularies."""
    models = {"unet": on_meta("sdxl", "unet", UNet2DConditionModel), "vae": on_meta("sdxl", "vae", AutoencoderKL),
              "text_encoder": on_meta("sdxl", "text_encoder", CLIPS[0]),
              "text_encoder_2": on_meta("sdxl", "text_encoder_2", CLIPS[1])}  # fmt: skip
    shapes = {name: tuple(value.shape) for name, value in original_state_dict(*models.values()).items()}
    constants = {"conditioner.embedders.0.transformer.text_model.embeddings.position_ids": (1, 77),
                 "conditioner.embedders.1.model.logit_scale": (), "v_pred": (0,), "ztsnr": (0,)}  # fmt: skip
    path = write_file(tmp_path / "noob.safetensors", shapes | constants)
    args = start(path, "--dry_run", config=False)
    pieces = pieces_of(args.base_model)
    assert pieces.keys() == models.keys() and sum(map(len, pieces.values())) == 2641
    for part, model in models.items():
        assert {name: piece.shape for name, piece in pieces[part].items()} == shapes_of(model), part
    single = args.base_model.unpacked[args.base_model.name]
    assert single.size == pytest.approx(6.94e9, rel=0.01) and not single.is_made
    assert "the tensor v_pred says v_prediction" in single.said[0] and "6.94 GB" in single.said[1]
    schedule = train_sdxl_lpl.Schedule(args)
    assert schedule.prediction_type == "v_prediction" and schedule.alphas[-1] < 1e-3
    tokenizers = train_sdxl_lpl.load_tokenizers(args)
    assert tokenizers[0]("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert [tokenizer.pad_token_id for tokenizer in tokenizers] == [49407, 0]
    assert not list((tmp_path / "cache").rglob("*.safetensors")), "a dry run unpacks nothing"


SIZES = {  # of SD3's transformers: what differs, and how many parameters they have
    "3 medium": ({"num_layers": 24, "pos_embed_max_size": 192}, 2.03e9),
    "3.5 medium": ({"num_layers": 24, "pos_embed_max_size": 384, "qk_norm": "rms_norm",
                    "dual_attention_layers": list(range(13))}, 2.24e9),
    "3.5 large": ({"num_layers": 38, "pos_embed_max_size": 192, "qk_norm": "rms_norm"}, 8.06e9),
}  # fmt: skip


@pytest.mark.parametrize("size", SIZES)
def test_sd3s_transformers_of_true_size(size):
    """The configuration follows from the header."""
    changes, parameters = SIZES[size]
    heads = changes["num_layers"]
    config = {"num_attention_heads": heads, "caption_projection_dim": 64 * heads, "attention_head_dim": 64,
              "joint_attention_dim": 4096, "pooled_projection_dim": 2048, "in_channels": 16, "out_channels": 16,
              "patch_size": 2, "sample_size": 128} | changes  # fmt: skip
    with torch.device("meta"):
        transformer = SD3Transformer2DModel.from_config(config)
        tensors = original_transformer(transformer)
    assert sum(value.numel() for value in transformer.parameters()) == pytest.approx(parameters, rel=0.02)
    header = {UNET + name: {"dtype": "F16", "shape": list(value.shape)} for name, value in tensors.items()}
    found = transformer_config(header, UNET)
    assert {name: found[name] for name in config} == config
    pieces = SD3_FILE.parts["transformer"].pieces(found)
    assert {name: piece.shape for name, piece in pieces.items()} == shapes_of(transformer)
    assert {UNET + piece.source: list(piece.source_shape) for piece in pieces.values()} == {
        name: entry["shape"] for name, entry in header.items()
    }


def test_sd3s_text_encoders_of_true_size(start, tmp_path):
    """Beside a small transformer: T5 and CLIP of the package's configurations, and their vocabularies."""
    encoders = {"text_encoder": CLIPS[1], "text_encoder_2": CLIPS[1], "text_encoder_3": transformers.T5EncoderModel}
    shapes = tiny_shapes("sd3", without=("text_encoders.", "first_stage_model.", UNET))
    pieces = {}
    for name, part in SD3_FILE.parts.items():
        config = dict(TINY_MMDIT) if name == "transformer" else config_in_package("sd3", name)
        pieces[name] = part.pieces(config)
        if name in encoders:
            assert {key: piece.shape for key, piece in pieces[name].items()} == shapes_of(
                on_meta("sd3", name, encoders[name])
            )
        shapes |= {part.prefix + piece.source: piece.source_shape for piece in pieces[name].values() if piece.source}
    args = start(write_file(tmp_path / "sd3.safetensors", shapes), "--dry_run", family="sd3", config=False)
    assert pieces_of(args.base_model) == pieces
    tokenizers = train_sd3_lpl_flow.load_tokenizers(args)
    assert tokenizers[2]("A photo of the cat").input_ids == [71, 1202, 13, 8, 1712, 1]
    assert tokenizers[1]("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]


# ---------------------------------------------------------------------------------------------------------------------
# Unpacking


CLASSIFIER = ("--use_lpl", "--lpl_features", "classifier", "--lpl_classifier", ROOT / "examples" / "tiny-classifier")


def test_the_autoencoder_in_a_single_file_is_that_of_the_folder(singles, start):
    """Other names, one file: a classifier of the folder's latents fits, unpacked or not."""
    for family, known in FAMILIES.items():
        base = start(singles[family], family=family).base_model
        folder, file = encoder_sketch(BaseModel(known, str(EXAMPLES[family]))), encoder_sketch(base)
        assert len(folder) > 5 and same_encoder(folder, file)
        assert sum(size for size, _, _ in folder) == sum(size for size, _, _ in file)
    base = start(singles["sdxl"], *CLASSIFIER).base_model
    assert not base.is_unpacked
    base.unpack()
    assert start(singles["sdxl"], *CLASSIFIER).base_model.is_unpacked


def test_the_autoencoder_beside_a_single_file_is_compared_too(singles, start, tmp_path, capsys):
    """One that --config_from lends, one alone in a file with a prefix; of 8 bits it can't be compared."""
    tensors = load_file(singles["sdxl"])
    bare = {name: value for name, value in tensors.items() if not name.startswith("first_stage_model.")}
    save_file(bare, tmp_path / "bare.safetensors")
    lent = start(tmp_path / "bare.safetensors", *CLASSIFIER).base_model
    assert lent.unpacked[lent.name].borrowed.keys() == {"vae"} and encoder_sketch(lent)
    vae = {f"vae.{name}": value for name, value in load_file(EXAMPLES["sdxl"] / "vae" / unpacking.WEIGHTS).items()}
    save_file(vae, tmp_path / "vae.safetensors")
    words = (*CLASSIFIER, "--pretrained_vae_model_name_or_path", tmp_path / "vae.safetensors")
    assert encoder_sketch(start(tmp_path / "bare.safetensors", *words).base_model)
    assert "can't be compared" not in capsys.readouterr().err
    save_file({name: value.to(torch.float8_e4m3fn) for name, value in vae.items()}, tmp_path / "vae.safetensors")
    start(tmp_path / "bare.safetensors", *words)
    assert "can't be compared" in capsys.readouterr().err
    vae["vae.encoder.conv_in.weight"] *= -1
    save_file(vae, tmp_path / "vae.safetensors")
    assert "trained on the latents of another autoencoder" in refused(start, tmp_path / "bare.safetensors", *words)


@pytest.mark.parametrize("family", EXAMPLES)
def test_diffusers_reads_the_same_models(family, singles, start):
    """Its own conversion of a single file is the reference."""
    base = start(singles[family], family=family).base_model
    base.unpack()
    denoiser = {"sdxl": ("unet", UNet2DConditionModel), "sd3": ("transformer", SD3Transformer2DModel)}[family]
    for part, cls in (denoiser, ("vae", AutoencoderKL)):
        ours = cls.from_pretrained(base.name, subfolder=part).state_dict()
        config = str(EXAMPLES[family])
        theirs = cls.from_single_file(str(singles[family]), config=config, subfolder=part).state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs), part
    source = json.loads((unpacking.Path(base.name) / unpacking.SOURCE).read_text())
    assert (source["file"], source["sha256"]) == (f"{family}.safetensors", sha256_of(singles[family]))
    assert base.weights == start(singles[family], family=family).base_model.weights, "the same before and after"


def test_it_is_unpacked_once_and_again_where_it_is_gone(start, tmp_path):
    path = write_file(tmp_path / "My model (v6).safetensors", tiny_shapes("sdxl"))
    base = start(path).base_model
    folder = unpacking.Path(base.name)
    assert folder.parent == tmp_path / "cache" / "lpl" / "base-models" and folder.name.startswith("My_model_v6_-")
    assert not base.is_unpacked and (folder / "unet" / "config.json").is_file()
    base.unpack()
    file = folder / "unet" / unpacking.WEIGHTS
    before = file.stat().st_mtime_ns
    again = start(path).base_model
    assert again.name == base.name and again.is_unpacked and "unpacked in" in again.unpacked[again.name].said[1]
    again.unpack()
    assert file.stat().st_mtime_ns == before
    file.unlink()
    (folder / "vae" / f".tmp-{unpacking.WEIGHTS}").write_bytes(b"left by a kill")
    assert not again.is_unpacked
    again.unpack()
    assert file.is_file() and not list(folder.rglob(".tmp-*"))
    before = file.stat().st_mtime_ns
    os.utime(path, ns=(1, 1))
    again.unpack()
    assert file.stat().st_mtime_ns == before and again.is_unpacked, "the same content, touched"
    path.write_bytes(path.read_bytes()[:-2] + b"\0\1")
    assert not start(path).base_model.is_unpacked
    again.unpack()
    assert file.stat().st_mtime_ns != before, "another content where no sample of the fingerprint lies"


def test_a_disk_without_room_is_refused_at_the_start(start, tmp_path, monkeypatch):
    path = write_file(tmp_path / "model.safetensors", tiny_shapes("sdxl"))
    monkeypatch.setattr("lpl_finetuning.files.shutil.disk_usage", lambda place: SimpleNamespace(free=10**8))
    assert "model.safetensors, unpacked, needs" in refused(start, path)
    assert start(path, "--dry_run").base_model.unpacked


def test_what_a_file_lacks_comes_from_another_pipeline(start, tmp_path):
    """SD3.5's own files have no text encoders."""
    path = write_file(tmp_path / "model.safetensors", tiny_shapes("sd3", without=("text_encoders.",)))
    base = start(path, family="sd3").base_model
    base.unpack()
    encoder = unpacking.Path(base.name, "text_encoder_3", "model.safetensors")
    assert encoder.resolve() == EXAMPLES["sd3"] / "text_encoder_3" / "model.safetensors"
    assert "text_encoder, text_encoder_2, text_encoder_3 from" in base.unpacked[base.name].said[0]
    assert start(path, family="sd3").base_model.is_unpacked
    told = refused(start, path, family="sd3", config=False)
    assert "no first text encoder and no second text encoder of SD3" in told and "--config_from" in told


def test_what_a_file_lacks_is_fetched_when_the_run_begins(start, tmp_path, monkeypatch):
    """From a pipeline on the Hub: small files when the flags are checked, weights when the file is unpacked."""
    asked = []
    path = write_file(tmp_path / "model.safetensors", tiny_shapes("sd3", without=("text_encoders.clip_g",)))
    told = refused(start, path, "--config_from", "someone/sd3", family="sd3", config=False)
    assert "--config_from someone/sd3: can't be had from the Hub (HF_HUB_OFFLINE is set)" in told
    monkeypatch.setattr(unpacking, "fetched", lambda flag, name, weights: asked.append(weights) or EXAMPLES["sd3"])
    base = start(path, "--config_from", "someone/sd3", family="sd3", config=False).base_model
    assert asked == [()]
    base.unpack()
    assert asked == [(), ("text_encoder_2",)] and base.is_unpacked


def test_an_autoencoder_in_a_single_file(sdxl_folder, start, tmp_path):
    """In LDM's layout and in diffusers' own, beside a pipeline's folder and beside a single file."""
    torch.manual_seed(1)
    vae = AutoencoderKL.from_pretrained(sdxl_folder, subfolder="vae")
    for value in vae.parameters():
        value.data.add_(0.01)
    layouts = {"ldm": original_vae(vae), "diffusers": vae.state_dict(),
               "whole": {f"first_stage_model.{name}": value for name, value in original_vae(vae).items()}}  # fmt: skip
    flag = "--pretrained_vae_model_name_or_path"
    for name, tensors in layouts.items():
        save_file({key: value.contiguous() for key, value in tensors.items()}, tmp_path / f"{name}.safetensors")
        base = start(sdxl_folder, flag, tmp_path / f"{name}.safetensors", config=False).base_model
        base.unpack()
        found = AutoencoderKL.from_pretrained(base.vae)
        assert found.config.scaling_factor == vae.config.scaling_factor
        for key, value in vae.state_dict().items():
            assert torch.equal(found.state_dict()[key], value), name
        assert base.flag("vae") == f"{flag} {tmp_path / name}.safetensors"
    single = write_file(tmp_path / "model.safetensors", tiny_shapes("sdxl"))
    config = json.loads((EXAMPLES["sdxl"] / "vae" / "config.json").read_text())
    plain = {name: piece.shape for name, piece in unpacking.plain_vae_pieces(config).items()}
    base = start(single, flag, write_file(tmp_path / "plain.safetensors", plain)).base_model
    assert len(base.unpacked) == 2 and base.flag() == f"--pretrained_model_name_or_path {single}"
    wrong = {
        "unet.safetensors": ({"input_blocks.0": (1,)}, "has no autoencoder"),
        "old.ckpt": ({}, "is a pickle (.ckpt)"),
        "wide.safetensors": (plain | {"decoder.conv_in.bias": (7,)}, "is 7, and this autoencoder needs 128"),
    }
    for name, (shapes, words) in wrong.items():
        assert words in refused(start, single, flag, write_file(tmp_path / name, shapes))


def test_the_latent_classifier_takes_the_autoencoder_alone(pictures, tmp_path):
    path = write_file(tmp_path / "model.safetensors", tiny_shapes("sd3"))
    words = ["--pretrained_model_name_or_path", path, "--config_from", EXAMPLES["sd3"], "--train_data_dir", pictures,
             "--resolution", 64, "--output_dir", tmp_path / "out", "--cache_dir", tmp_path / "cache"]  # fmt: skip
    base = train_latent_classifier.parse_args([str(word) for word in words]).base_model
    base.unpack()
    assert [path.name for path in unpacking.Path(base.name).rglob("*.safetensors")] == [unpacking.WEIGHTS]


# ---------------------------------------------------------------------------------------------------------------------
# What the file says of its prediction


SAID = {  # case: (tensors, metadata, flags) -> (prediction type, zero terminal SNR, words of the plan)
    "nothing": ((), {}, (), "epsilon", False, "it says nothing of its prediction"),
    "NoobAI": (("v_pred", "ztsnr"), {}, (), "v_prediction", True, "the tensor ztsnr says zero terminal SNR"),
    "modelspec": ((), {"modelspec.prediction_type": "v", "ss_zero_terminal_snr": "True"}, (), "v_prediction", True,
                  "modelspec.prediction_type says v_prediction"),
    "predict_key": ((), {"modelspec.predict_key": "v"}, (), "v_prediction", False, "modelspec.predict_key"),
    "without zero": (("v_pred", "ztsnr"), {}, ("--no-rescale_betas_zero_snr",), "v_prediction", False, "ztsnr"),
    "with zero": (("v_pred",), {}, ("--rescale_betas_zero_snr",), "v_prediction", True, "v_pred"),
    "flags": ((), {}, ("--prediction_type", "v_prediction", "--rescale_betas_zero_snr"), "v_prediction", True, ""),
    "contradiction": (("v_pred",), {"modelspec.prediction_type": "epsilon"}, ("--prediction_type", "epsilon"),
                      "epsilon", False, "modelspec.prediction_type says epsilon"),
}  # fmt: skip


@pytest.mark.parametrize("case", SAID)
def test_the_schedule_is_that_of_file_and_flags(case, start, tmp_path):
    tensors, metadata, flags, kind, zero, words = SAID[case]
    path = write_file(tmp_path / "model.safetensors", tiny_shapes("sdxl") | dict.fromkeys(tensors, (0,)), metadata)
    args = start(path, *flags)
    base, schedule = args.base_model, train_sdxl_lpl.Schedule(args)
    assert schedule.prediction_type == kind and (schedule.alphas[-1] < 1e-3) == zero
    assert schedule.describe() == f"{kind} prediction" + ", zero terminal SNR" * zero
    assert words in base.unpacked[base.name].said[0]
    config = load_part_config(base, diffusers.DDPMScheduler, "scheduler")
    assert config["rescale_betas_zero_snr"] == zero and (not zero or config["timestep_spacing"] == "trailing")
    told = schedule_of_base(base) | ({"prediction_type": args.prediction_type} if args.prediction_type else {})
    assert (told.get("prediction_type", "epsilon"), told.get("rescale_betas_zero_snr", False)) == (kind, zero)


def test_zero_terminal_snr_by_flag_is_trained_and_saved(sdxl_folder, start, tmp_path):
    """For a folder too: the noise levels, the sampler, the saved pipeline and the card have it."""
    args = start(sdxl_folder, "--prediction_type", "v_prediction", "--rescale_betas_zero_snr", config=False)
    assert train_sdxl_lpl.Schedule(args).alphas[-1] < 1e-3
    assert load_part(args.base_model, diffusers.DDPMScheduler, "scheduler").alphas_cumprod[-1] < 1e-6
    pipeline = load_pipeline(args.base_model, diffusers.StableDiffusionXLPipeline)
    assert pipeline.scheduler.config.rescale_betas_zero_snr and type(pipeline.scheduler).__name__.startswith("Euler")
    card = SimpleNamespace(family=args.base_model.family, lora="LoRA", name="x/y", base_file="pony.safetensors",
                           schedule=args.base_model.schedule, prediction_type="v_prediction", prompts=(),
                           trigger=None)  # fmt: skip
    text = snippet(card, None)
    assert 'from_single_file("path/to/pony.safetensors"' in text
    assert 'rescale_betas_zero_snr=True, timestep_spacing="trailing", prediction_type="v_prediction")' in text
    told = refused(start, sdxl_folder, "--rescale_betas_zero_snr", config=False)
    assert "a model of epsilon learns nothing" in told


# ---------------------------------------------------------------------------------------------------------------------
# What is refused, by the names in the header


def plus(family="sdxl", **more):
    """The tiny file with other tensors too."""
    return lambda: tiny_shapes(family) | {name.replace("__", "."): shape for name, shape in more.items()}


CLIP_L = "conditioner.embedders.0.transformer.text_model.final_layer_norm.bias"
WRONG = {  # case: (shapes or function that returns them, words of the message)
    "SD 1": ({f"{UNET}input_blocks.0.0.weight": (8, 4, 3, 3), "cond_stage_model.transformer.text_model.x": (2,)},
             "is Stable Diffusion 1 (it has cond_stage_model)"),
    "SD 2": ({f"{UNET}input_blocks.0.0.weight": (8, 4, 3, 3), "cond_stage_model.model.ln_final.bias": (2,)},
             "is Stable Diffusion 2"),
    "Flux": ({"double_blocks.0.img_attn.qkv.weight": (6, 2)}, "is a Flux model"),
    "Flux below": ({f"{UNET}double_blocks.0.img_attn.qkv.weight": (6, 2)}, "is a Flux model"),
    "refiner": ({f"{UNET}label_emb.0.0.weight": (8, 8), f"{UNET}input_blocks.0.0.weight": (8, 4, 3, 3),
                 "conditioner.embedders.0.model.ln_final.bias": (2,)}, "is SDXL's refiner"),
    "inpainting": (plus(**{f"{UNET}input_blocks.0.0.weight".replace(".", "__"): (80, 9, 3, 3)}),
                   "takes 9 channels: it is made for inpainting"),
    "kohya LoRA": ({"lora_unet_down_blocks_0.lora_down.weight": (4, 8)}, "is a LoRA; give the model"),
    "diffusers LoRA": ({"unet.down_blocks.0.to_q.lora_A.weight": (4, 8)}, "is a LoRA; give the model"),
    "LoKr": ({"lycoris_unet_x.lokr_w1": (4, 8)}, "is a LoRA; give the model"),
    "VAE": ({"first_stage_model.decoder.conv_in.bias": (4,), "first_stage_model.quant_conv.bias": (2,)},
            "is an autoencoder alone"),
    "VAE bare": ({"encoder.down.0.block.0.conv1.bias": (4,), "decoder.conv_in.bias": (4,)}, "is an autoencoder alone"),
    "ControlNet": ({"control_model.input_blocks.0.0.weight": (4,)}, "is a ControlNet"),
    "CLIP": ({"text_model.final_layer_norm.bias": (4,)}, "is a text encoder alone"),
    "T5": ({"encoder.block.0.layer.0.layer_norm.weight": (4,), "shared.weight": (4, 4)}, "is a text encoder alone"),
    "embedding": ({"clip_g": (4, 8), "clip_l": (4, 8)}, "is an embedding of textual inversion"),
    "diffusers UNet": ({"down_blocks.0.resnets.0.conv1.bias": (4,), "conv_in.bias": (4,)}, "is a UNet in diffusers'"),
    "fp8 scaled": (plus(model__diffusion_model__out__2__scale_weight=(1,)), "is quantized"),
    "other": ({"blocks.0.weight": (4,)}, "is no SDXL or SD3 in one file: it holds blocks.0.weight"),
    "nothing": ({}, "it holds no tensor"),
    "EDM": (plus(edm_vpred__sigma_max=()), "has EDM's noise levels"),
    "other family": (lambda: tiny_shapes("sd3"), "is SD3 in one file; this script trains StableDiffusionXL models: "
                     "use train_sd3_lpl_flow.py"),
    "a tensor less": (lambda: {name: shape for name, shape in tiny_shapes("sdxl").items() if name != CLIP_L},
                      f"lacks 1 of the 52 tensors of the first text encoder ({CLIP_L})"),
    "a tensor more": (plus(model__diffusion_model__more__weight=(2,)), "1 of its"),
    "another shape": (plus(**{f"{UNET}out.2.bias".replace(".", "__"): (5,)}), "bias is 5, and this UNet needs 4"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_else_a_file_can_be_is_said(case, start, tmp_path):
    shapes, words = WRONG[case]
    path = write_file(tmp_path / "model.safetensors", shapes() if callable(shapes) else shapes)
    told = refused(start, path)
    assert words in told and told.startswith(f"--pretrained_model_name_or_path {path}")


def test_files_that_are_no_model_are_refused(start, tmp_path):
    shapes, path = tiny_shapes("sdxl"), tmp_path / "model.safetensors"
    assert "int8" not in refused(start, write_file(path, shapes, dtype="I8"))
    assert "has tensors of I8, which can't be trained" in refused(start, path)
    assert "give a whole SDXL, or --config_from with a pipeline of the same sizes" in refused(
        start, write_file(path, shapes), config=False
    )
    os.truncate(path, path.stat().st_size - 1)
    assert "is cut short" in refused(start, path)
    for name, words in (
        ("model.ckpt", "is a pickle (.ckpt), which can run programs"),
        ("model.gguf", ".gguf is not read"),
    ):
        (tmp_path / name).write_bytes(b"PK")
        assert words in refused(start, tmp_path / name)
    write_file(path, shapes)
    assert "is a StableDiffusion3Pipeline; the file is SDXL" in refused(
        start, path, "--config_from", EXAMPLES["sd3"], config=False
    )
    assert "--variant does nothing with a base model in a single file" in refused(start, path, "--variant", "fp16")
    assert "--config_from does nothing" in refused(start, EXAMPLES["sdxl"])
    sd3 = write_file(tmp_path / "sd3.safetensors", tiny_shapes("sd3") | {"v_pred": (0,)})
    assert "the tensor v_pred contradicts that" in refused(start, sd3, family="sd3")
    named = write_file(tmp_path / "x-vpred.safetensors", shapes)
    assert "its name says v-prediction" in refused(start, named)
    assert read_single_file(path).layout is SDXL_FILE


# ---------------------------------------------------------------------------------------------------------------------
# A run


def test_a_run_from_a_single_file(singles, pictures, cache_dir, tmp_path, capsys):
    """A LoRA with LPL, resumed after the unpacked folder was deleted; plan, card and the file for other programs."""
    common = ["--train_data_dir", pictures, "--cache_dir", cache_dir, "--resolution", 64, "--train_batch_size", 2,
              "--report_to", "none", "--use_lora", "--use_lpl", "--output_kohya_format",
              "--checkpointing_steps", 1]  # fmt: skip
    file = ["--pretrained_model_name_or_path", singles["sdxl"], "--config_from", EXAMPLES["sdxl"], *common]
    sdxl.run(*file, "--max_train_steps", 1, "--output_dir", tmp_path / "file")
    said = capsys.readouterr().out
    assert "Base model: sdxl.safetensors is SDXL in one file" in said and "Unpacking sdxl.safetensors once" in said
    base = train_sdxl_lpl.parse_args([str(word) for word in (*file, "--output_dir", tmp_path / "x")]).base_model
    assert source_in_words(base).startswith("sdxl.safetensors, sha256 ")
    shutil.rmtree(base.name)
    sdxl.run(*file, "--max_train_steps", 2, "--output_dir", tmp_path / "file", "--resume_from_checkpoint", "latest")
    card = (tmp_path / "file" / "README.md").read_text()
    assert 'from_single_file("path/to/sdxl.safetensors"' in card and str(cache_dir) not in card
    assert f"| base model | sdxl.safetensors, sha256 {sha256_of(singles['sdxl'])[:10]} |" in card
    kohya = next((tmp_path / "file").glob("*kohya.safetensors"))
    assert sha256_of(singles["sdxl"]).encode() in kohya.read_bytes() and load_file(kohya)
