"""Other networks of the loss: a classifier of latents, a tiny decoder, several at once; their flags and their files.

A plain formula with PyTorch's own gradients is the reference. Float64, unless a test is about another dtype.
"""

import json
import shutil

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, AutoencoderTiny
from PIL import Image
from safetensors.torch import load_file, save_file

import train_sd3_lpl_flow
import train_sdxl_lpl
from lpl_finetuning.base_model import BaseModel
from lpl_finetuning.data.encoding import vae_identity
from lpl_finetuning.errors import UserError
from lpl_finetuning.families import SDXL
from lpl_finetuning.flags import feature_fractions
from lpl_finetuning.networks.checks import check_encoder
from lpl_finetuning.results.hub import lpl_rows
from lpl_finetuning.training.augmentation import augment_alike, places
from lpl_finetuning.training.perceptual import LossOfNetworks, PerceptualTerm, build_perceptual_term, lpl_stages
from lpl_finetuning.training.reporter import Metrics, metric_names
from lpl_finetuning.training.step_memory import Machine
from lpl_utils import (
    AutoWeight,
    DecoderStages,
    IdentityStages,
    LatentPerceptualLoss,
    LatentSpace,
    LPLConfig,
    LPLGate,
    SelectedStages,
    TinyDecoderStages,
    estimate_z0,
    stage_features,
)
from tests import sdxl
from tests.runs import ROOT, memory_of
from tests.tiny_models import autoencoder, latent_classifier, save_feature_networks, tiny_decoder

DOUBLE = torch.float64
NETWORKS = ("tiny", "classifier", "pooled")


def stages_of(name, dtype=DOUBLE):
    """The stages of a network; "pooled": two of the classifier's stages, one of them without positions."""
    if name == "tiny":
        return TinyDecoderStages(tiny_decoder(dtype=dtype))
    return SelectedStages(latent_classifier(dtype), (0, 1) if name == "classifier" else (1, 3))


def norm_of(name):
    return "none" if name == "pooled" else "standard"


def pair(batch=3, channels=4, dtype=DOUBLE):
    """A target and an estimate, (B, C, 8, 8)."""
    generator = torch.Generator().manual_seed(0)
    z0, noise = torch.randn((2, batch, channels, 8, 8), generator=generator, dtype=DOUBLE)
    return z0.to(dtype), (z0 + 0.3 * noise).to(dtype)


def evaluate(loss, z0, estimate):
    """The loss' output, and the gradient of the sum of its samples towards the estimate."""
    estimate = estimate.clone().requires_grad_()
    output = loss(estimate, z0)
    return output, torch.autograd.grad(output.per_sample.sum(), estimate)[0]


def reference(stages, z0, estimate, norm_type):
    """(values (B,), gradient) by the formula of the loss without outliers, under plain autograd."""
    estimate = estimate.clone().requires_grad_()
    total, first = 0, None
    for x, xh in zip(stage_features(stages, z0), stage_features(stages, estimate), strict=True):
        x, xh = (each if each.ndim == 4 else each[:, :, None, None] for each in (x, xh))
        scale = (xh.var(dim=(2, 3), correction=0, keepdim=True).sqrt() + 1e-6) if norm_type != "none" else 1
        first = first or x.shape[2]
        total = total + min(1, first / x.shape[2]) * ((xh - x) / scale).square().mean(dim=(1, 2, 3)) / len(stages)
    return total.detach(), torch.autograd.grad(total.sum(), estimate)[0]


# ---------------------------------------------------------------------------------------------------------------------
# One network


@pytest.mark.parametrize("checkpointing", ["none", "stage"])
@pytest.mark.parametrize("name", NETWORKS)
def test_values_and_gradients_equal_the_plain_formula(name, checkpointing):
    """Zero at equality, for any number of samples at a time; no parameter gets a gradient."""
    stages, (z0, estimate) = stages_of(name), pair()
    config = {"norm_type": norm_of(name), "remove_outliers": False, "checkpointing": checkpointing}
    values, gradient = reference(stages, z0, estimate, norm_of(name))
    for batch_size in (None, 1, 2):
        loss = LatentPerceptualLoss(stages, LPLConfig(**config, batch_size=batch_size))
        output, found = evaluate(loss, z0, estimate)
        torch.testing.assert_close(output.per_sample.detach(), values, rtol=1e-10, atol=0)
        torch.testing.assert_close(found, gradient, rtol=1e-8, atol=1e-8 * gradient.abs().max().item())
    nothing, zero = evaluate(loss, z0, z0)
    assert (nothing.per_sample == 0).all() and (zero == 0).all() and gradient.abs().max() > 0
    assert all(parameter.grad is None for parameter in stages.network.parameters())


@pytest.mark.parametrize("name", NETWORKS)
def test_a_batch_is_its_samples_one_by_one(name):
    loss, (z0, estimate) = LatentPerceptualLoss(stages_of(name), LPLConfig(norm_type=norm_of(name))), pair()
    output, gradient = evaluate(loss, z0, estimate)
    for row in range(len(z0)):
        alone, own = evaluate(loss, z0[row : row + 1], estimate[row : row + 1])
        torch.testing.assert_close(alone.per_sample[0], output.per_sample[row], rtol=1e-12, atol=0)
        torch.testing.assert_close(own[0], gradient[row], rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("name", NETWORKS)
def test_float32_agrees_with_float64(name):
    config = LPLConfig(norm_type=norm_of(name), remove_outliers=False)
    z0, estimate = pair()
    expected, gradient = evaluate(LatentPerceptualLoss(stages_of(name), config), z0, estimate)
    loss = LatentPerceptualLoss(stages_of(name, torch.float32), config)
    output, found = evaluate(loss, z0.float(), estimate.float())
    assert output.per_sample.dtype == found.dtype == torch.float32
    torch.testing.assert_close(output.per_sample.double(), expected.per_sample, rtol=1e-4, atol=0)
    assert (found.double() - gradient).norm() < 1e-3 * gradient.norm()


def test_the_walk_through_a_tiny_decoder_is_its_decode():
    """On model-space latents, far ones too, which the network clamps; in pieces as well."""
    tiny = tiny_decoder(dtype=DOUBLE)
    stages, latents = TinyDecoderStages(tiny), 4 * pair()[0]
    x, in_pieces = latents, latents
    for index in range(len(stages)):
        x = stages.run(index, x)
        for piece in stages.pieces(index):
            in_pieces = piece(in_pieces)
        assert x.shape[2] == 8 * 2**index
    torch.testing.assert_close(tiny.decoder.layers[-1](x) * 2 - 1, tiny.decode(latents).sample, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(in_pieces, x, rtol=0, atol=0)
    assert (stages.upscaling, stages.input_space.scaling_factor, stages.input_space.shift_factor) == (8, 1, 0)
    assert TinyDecoderStages(tiny, 1).names == stages.names[:2]


@pytest.mark.parametrize("family", ["sdxl", "sd3"])
def test_the_shipped_tiny_decoders_are_copies(family):
    """They paint what the full decoder paints. The gradient of SDXL's is nearer to the full one than latents alone."""
    vae = AutoencoderKL.from_pretrained(ROOT / "examples" / f"tiny-{family}" / "vae").requires_grad_(False)
    tiny = AutoencoderTiny.from_pretrained(ROOT / "examples" / f"tiny-{family}-decoder").requires_grad_(False)
    files = sorted((ROOT / "examples" / "fluent-emoji").glob("*.webp"))[::6]
    pictures = np.stack([np.asarray(Image.open(file).convert("RGB").resize((64, 64))) for file in files])
    latents = vae.encode(torch.from_numpy(pictures).permute(0, 3, 1, 2).float().div(127.5).sub(1)).latent_dist.mean
    z0 = LatentSpace.of(vae).to_model(latents)
    error = (tiny.decode(z0).sample - vae.decode(latents).sample).square().mean((1, 2, 3))
    assert (10 * (4 / error).log10()).mean() > 27, "dB"
    estimate = z0 + 0.2 * torch.randn(z0.shape, generator=torch.Generator().manual_seed(0))
    networks = {"full": DecoderStages(vae), "tiny": TinyDecoderStages(tiny, 2), "latent": IdentityStages()}
    gradients = {name: evaluate(LatentPerceptualLoss(stages, LPLConfig()), z0, estimate)[1].flatten(1)
                 for name, stages in networks.items()}  # fmt: skip
    near = {name: torch.cosine_similarity(gradients[name], gradients["full"]).mean() for name in ("tiny", "latent")}
    assert near["tiny"] > (near["latent"] + 0.03 if family == "sdxl" else 0.5)


def test_networks_that_are_no_tiny_decoders_are_refused_by_name():
    with pytest.raises(TypeError, match="AutoencoderKL has a Decoder"):
        TinyDecoderStages(autoencoder())
    with pytest.raises(ValueError, match="num_blocks is 4; this decoder has 3 upsamplings"):
        TinyDecoderStages(tiny_decoder(), 4)
    with pytest.raises(TypeError, match="give TinyDecoderStages of it"):
        LatentPerceptualLoss(tiny_decoder())


def test_selected_stages_are_the_networks():
    network, latents = latent_classifier(), torch.randn(2, 4, 8, 8)
    features = list(stage_features(network, latents))
    chosen = SelectedStages(network, (1, 3))
    assert chosen.names == ("block 2", "pooled") and chosen.upscaling == 8
    for found, index in zip(stage_features(chosen, latents), (1, 3), strict=True):
        assert torch.equal(found, features[index])
    for wrong in ((), (1, 0), (1, 1), (4,), (-1,)):
        with pytest.raises(ValueError, match="ascending numbers of stages, 0 to 3"):
            SelectedStages(network, wrong)


# ---------------------------------------------------------------------------------------------------------------------
# Several networks


def losses_of_two():
    """The loss through a tiny decoder and a classifier, in float32, with parts of 0.75 and 0.25."""
    losses = {"tiny_decoder": LatentPerceptualLoss(stages_of("tiny", torch.float32)),
              "classifier": LatentPerceptualLoss(stages_of("classifier", torch.float32))}  # fmt: skip
    return LossOfNetworks(losses, [0.75, 0.25])


def test_each_network_keeps_its_part_of_the_loss():
    """Losses a million times apart: each weighted term is its part, and their sum the share of the whole."""
    loss, accelerator = losses_of_two(), Accelerator(cpu=True)
    weights = [AutoWeight(0.2, fraction=fraction) for fraction in loss.fractions]
    term = PerceptualTerm(loss, LPLGate(t_threshold=200), weights, start=0)
    for _ in range(40):
        term.update_weight(0, torch.tensor([2.0, 1e3, 1e-3, 1.0]), 1, accelerator)
    metrics = Metrics(torch.device("cpu"))
    total = term.weighted([torch.tensor(1e3), torch.tensor(1e-3)], metrics).item()
    assert total / (2 + total) == pytest.approx(0.2, rel=1e-5)
    found = metrics.read(accelerator, metric_names(6, ["tiny_decoder", "classifier"]))
    assert found["lpl/tiny_decoder/weighted_loss"] == pytest.approx(0.75 * total, rel=1e-5)
    assert found["lpl/classifier/weighted_loss"] == pytest.approx(0.25 * total, rel=1e-5)
    assert found["lpl/weighted_loss"] == pytest.approx(total, rel=1e-5) and "lpl/weight" not in found
    assert {name.partition(".")[0] for name in term.auto_weight.state_dict()} == {"tiny_decoder", "classifier"}
    with pytest.raises(ValueError, match="fraction is 0"):
        AutoWeight(fraction=0)


def test_terms_are_the_networks_own_and_the_sum_has_both_gradients():
    loss, (z0, estimate) = losses_of_two(), pair(dtype=torch.float32)
    term = PerceptualTerm(loss, None, [2.0, 3.0], start=0)
    singles = [evaluate(each, z0, estimate) for each in loss.losses.values()]
    estimate.requires_grad_()
    metrics, output = Metrics(torch.device("cpu")), loss(estimate, z0)
    terms = term.totals(output, torch.arange(3), None, 6, metrics)
    total = term.weighted(terms, metrics)
    for each, (single, _) in zip(terms, singles, strict=True):
        assert each.item() == pytest.approx(single.per_sample.sum().item() / 6, rel=1e-6)
    wanted = sum(weight * gradient / 6 for weight, (_, gradient) in zip((2, 3), singles, strict=True))
    torch.testing.assert_close(torch.autograd.grad(total, estimate)[0], wanted, rtol=1e-5, atol=1e-8)
    assert len(output.per_layer) == len(loss.stage_names) == 6 and loss.stage_names[4] == "classifier: block 1"
    assert {f"lpl/features/layer_{layer}/loss" for layer in range(6)} <= metrics.sums.keys()
    means = torch.stack([single.per_sample for single, _ in singles]).detach()
    assert torch.allclose(output.per_sample.detach(), means[0] ** 0.75 * means[1] ** 0.25, rtol=1e-5)
    assert [value.item() for value in term.nothing(z0, metrics)] == [0, 0]


# ---------------------------------------------------------------------------------------------------------------------
# Augmentation


def test_all_tensors_are_augmented_alike_and_by_the_number_of_the_sample():
    numbers, size = np.arange(40), (16, 24)
    first, second = torch.randn(2, 40, 4, *size)
    found, other = augment_alike([first, second], numbers, seed=5)
    again = augment_alike([first + 3 * second], numbers, seed=5)[0]
    torch.testing.assert_close(again, found + 3 * other)
    halves = [augment_alike([first[part]], numbers[part], 5)[0] for part in (slice(0, 7), slice(7, 40))]
    assert torch.equal(torch.cat(halves), found)
    assert not torch.equal(augment_alike([first], numbers, 6)[0], found)
    drawn = [places(5, number, size) for number in range(400)]
    flipped = np.mean([columns[0] > columns[-1] for _, columns, _ in drawn])
    cut = np.array([1 - kept.mean() for _, _, kept in drawn])
    assert 0.4 < flipped < 0.6 and 0.4 < (cut > 0).mean() < 0.6 and 0.2 < cut.max() < 0.3
    rows, columns, kept = drawn[0]
    assert torch.equal(
        augment_alike([first[:1]], [0], 5)[0], first[:1][:, :, rows][:, :, :, columns] * torch.from_numpy(kept)
    )
    assert {int(rows[8] - 8) for rows, _, _ in drawn} == set(range(-2, 3))
    assert {int(sorted(columns)[12] - 12) for _, columns, _ in drawn} == set(range(-3, 4))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample", "flow"])
def test_the_estimate_of_augmented_tensors_is_the_augmented_estimate(kind):
    output, noisy = torch.randn(2, 8, 4, 8, 8)
    levels, numbers = torch.rand(2, 8), range(8)
    made = estimate_z0(*augment_alike([output, noisy], numbers, 0), *levels, kind)
    torch.testing.assert_close(made, augment_alike([estimate_z0(output, noisy, *levels, kind)], numbers, 0)[0])


# ---------------------------------------------------------------------------------------------------------------------
# Flags and files


def args_of(flags, *words):
    return train_sdxl_lpl.parse_args([*map(str, flags), "--use_lpl", *map(str, words)])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--lpl_features decodr", "--lpl_features is 'decodr'; did you mean decoder? choose from decoder, rgb"),
        ("--lpl_features decoder=0", "the part of decoder must be a number above 0"),
        ("--lpl_features decoder classifier decoder", "names a network twice"),
        ("--lpl_features decoder rgb", "rgb has the features of the decoder too"),
        ("--lpl_features decoder=0.5 latent", "some networks have a part and others not"),
        ("--lpl_features decoder=0.5 latent=0.6", "the parts add up to 1.1; they must add up to 1"),
        ("--lpl_features decoder latent --lpl_weight 3", "--lpl_weight 3: --lpl_features decoder latent needs 2"),
        ("--lpl_features decoder latent --lpl_weight auto 3", "auto is for all networks"),
        ("--lpl_features decoder=0.5 latent=0.5 --lpl_weight 1 3", "parts are for --lpl_weight auto, found 1 3"),
        ("--lpl_features classifier", "--lpl_features classifier needs --lpl_classifier"),
        ("--lpl_features decoder tiny_decoder", "needs --lpl_tiny_decoder"),
        ("--lpl_features classifier --lpl_classifier {c} --lpl_classifier_stages 0", "the number of a residual stage"),
        ("--lpl_features classifier --lpl_classifier {c} --lpl_classifier_stages 1 4", "has residual stages 1 to 3"),
        ("--lpl_features classifier --lpl_classifier {c} --lpl_classifier_stages 1 pooled", "pooled has one position"),
        ("--lpl_features classifier --lpl_classifier {c} --resolution 16 --lpl_classifier_stages 2", "2 has one posi"),
        ("--lpl_features classifier --lpl_classifier {c} --resolution 8", "no stage of --lpl_classifier has more"),
        ("--lpl_features classifier --lpl_classifier {t}", "found AutoencoderTiny, expected LatentClassifier"),
        ("--lpl_features tiny_decoder --lpl_tiny_decoder {c}", "found LatentClassifier, expected AutoencoderTiny"),
        ("--lpl_features tiny_decoder --lpl_tiny_decoder ./nowhere", "there is no such folder"),
    ],
)  # fmt: skip
def test_contradictions_are_refused(words, told, flags, feature_networks):
    names = {"{c}": feature_networks["--lpl_classifier"], "{t}": feature_networks["--lpl_tiny_decoder"]}
    with pytest.raises(UserError) as error:
        args_of(flags, *(names.get(word, word) for word in words.split()))
    assert told in str(error.value)


WRONG = {  # changes of a config.json -> what is told
    "classifier": [
        ({"scaling_factor": 0.18215}, "says scaling_factor 0.18215, and the base model's autoencoder has 0.13025"),
        ({"shift_factor": 0.1}, "says shift_factor 0.1"),
        ({"latent_channels": 16}, "says latent_channels 16, and the base model's autoencoder has 4"),
        ({"pixels_per_latent": 4}, "says pixels_per_latent 4"),
        ({"vae_fingerprint": "sha256:0123", "vae_encoder_sketch": [[9, 1.0, 1.0]]},
         "another autoencoder (sha256:0123) than the base model's autoencoder"),
        ({"vae_fingerprint": "hub:some/model@main", "vae_encoder_sketch": [[9, 1.0, 1.0]]}, "autoencoder (hub:some"),
    ],
    "tiny": [
        ({"latent_channels": 16}, "takes latents of 16 channels, and the base model's autoencoder makes 4"),
        ({"num_decoder_blocks": [1, 1]}, "makes images 2 times larger than latents; 8 is needed"),
    ],
}  # fmt: skip


@pytest.mark.parametrize(("name", "changes", "told"), [(name, *row) for name, rows in WRONG.items() for row in rows])
def test_a_network_for_other_latents_is_refused_before_weights_load(name, changes, told, flags, feature_networks,
                                                                    tmp_path):  # fmt: skip
    flag, network = {"classifier": ("--lpl_classifier", "classifier"), "tiny": ("--lpl_tiny_decoder", "tiny_decoder")}[
        name
    ]
    shutil.copytree(feature_networks[flag], tmp_path / "network")
    config = tmp_path / "network" / "config.json"
    words = ("--lpl_features", network, flag, tmp_path / "network")
    args_of(flags, *words)  # as it was saved
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    with pytest.raises(UserError) as error:
        args_of(flags, *words)
    assert told in str(error.value) and flag in str(error.value)


@pytest.fixture
def with_vae(flags, feature_networks, tmp_path):
    """Function that checks the flags of a run with a classifier of the random SDXL's latents and an autoencoder."""

    def start(vae, **saving):
        shutil.rmtree(tmp_path / "vae", ignore_errors=True)
        vae.save_pretrained(tmp_path / "vae", **saving)
        args_of(flags, "--lpl_features", "classifier", "--lpl_classifier", feature_networks["--lpl_classifier"],
                "--pretrained_vae_model_name_or_path", tmp_path / "vae",
                *([] if saving.get("safe_serialization", True) else ["--allow_pickle"]))  # fmt: skip

    return start


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_copy_of_the_autoencoder_makes_the_same_latents(dtype, with_vae, sdxl_folder, capsys):
    """In another precision, or with another decoder, or in several files."""
    vae = AutoencoderKL.from_pretrained(sdxl_folder, subfolder="vae").to(dtype)
    vae.decoder.conv_in.weight.data.mul_(2)
    with_vae(vae)
    with_vae(vae, max_shard_size="20KB")
    assert "can't be compared" not in capsys.readouterr().err


def exchanged(vae):
    """The channels of the latents are in another order."""
    for values in (vae.quant_conv.weight.data, vae.quant_conv.bias.data):
        values.copy_(values.roll(1, 0))


def trained_further(vae):
    """Each kernel moves by 3 % of its norm, at random."""
    generator = torch.Generator().manual_seed(0)
    for values in vae.encoder.parameters():
        if values.ndim > 1:
            noise = torch.randn(values.shape, generator=generator)
            values.data += 0.03 * noise * values.norm() / noise.norm()


OTHERS = {
    "channels exchanged": exchanged,
    "sign flipped": lambda vae: [values.data.neg_() for values in vae.quant_conv.parameters()],
    "moved": lambda vae: vae.quant_conv.bias.data.add_(1),
    "one gain": lambda vae: vae.encoder.conv_norm_out.weight.data.mul_(1.3),
    "one kernel mirrored": lambda vae: vae.encoder.conv_in.weight.data.copy_(vae.encoder.conv_in.weight.data.flip(-1)),
    "trained further": trained_further,
    "of zeros": lambda vae: [values.data.zero_() for values in vae.encoder.parameters()],
}


@pytest.mark.parametrize("change", OTHERS)
def test_another_encoder_makes_other_latents(change, with_vae, sdxl_folder):
    vae = AutoencoderKL.from_pretrained(sdxl_folder, subfolder="vae")
    OTHERS[change](vae)
    with pytest.raises(UserError, match="it was trained on the latents of another autoencoder"):
        with_vae(vae)


def test_what_can_t_be_compared_is_not_called_another_autoencoder(with_vae, sdxl_folder, capsys):
    """A pickle, and weights of 8 bits."""
    vae = AutoencoderKL.from_pretrained(sdxl_folder, subfolder="vae")
    with_vae(vae, safe_serialization=False)
    assert "can't be compared" in capsys.readouterr().err
    with_vae(vae.to(torch.float8_e4m3fn))
    assert "can't be compared" in capsys.readouterr().err


def test_an_autoencoder_on_the_hub_is_compared_when_its_files_are_here(flags, sdxl_folder, feature_networks, tmp_path,
                                                                       monkeypatch, capsys):  # fmt: skip
    """Under another name too; until then it passes, and a word is said only if they never come."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    config = json.loads((feature_networks["--lpl_classifier"] / "config.json").read_text())
    config["vae_fingerprint"] = "hub:me/one@main"
    base = BaseModel(SDXL, "me/two")
    check_encoder("flag", config, base)
    assert capsys.readouterr().err == ""
    check_encoder("flag", config, base, is_loaded=True)
    assert "can't be compared" in capsys.readouterr().err
    folder = tmp_path / "models--me--two"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("a" * 40)
    shutil.copytree(sdxl_folder / "vae", folder / "snapshots" / ("a" * 40) / "vae")
    for is_loaded in (False, True):
        check_encoder("flag", config, base, is_loaded)
        assert capsys.readouterr().err == ""
        with pytest.raises(UserError, match="another autoencoder"):
            check_encoder("flag", config | {"vae_encoder_sketch": [[9, 1.0, 1.0]]}, base, is_loaded)
    args = args_of(flags, "--lpl_features", "classifier", "--lpl_classifier", feature_networks["--lpl_classifier"])
    args = args.but(base_model=base)  # fetched since the flags were checked
    lpl_stages(args, None, Machine("no", device="cpu"))
    vae = folder / "snapshots" / ("a" * 40) / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({name: -value for name, value in load_file(vae).items()}, vae)
    with pytest.raises(UserError, match="another autoencoder"):
        lpl_stages(args, None, Machine("no", device="cpu"))


def test_the_classifier_s_own_pipeline_may_be_named_as_the_autoencoder(flags, feature_networks, sdxl_folder):
    args = args_of(flags, "--lpl_features", "classifier", "--lpl_classifier", feature_networks["--lpl_classifier"],
                   "--pretrained_vae_model_name_or_path", sdxl_folder)  # fmt: skip
    assert args.base_model.place("vae").subfolder == "vae"
    alone = BaseModel(SDXL, str(sdxl_folder), vae=str(sdxl_folder / "vae"))
    assert vae_identity(args.base_model) == vae_identity(alone), "the same cache of latents"


def test_weights_that_are_not_there_or_of_unknown_origin(flags, feature_networks, tmp_path, capsys):
    folder = tmp_path / "classifier"
    shutil.copytree(feature_networks["--lpl_classifier"], folder)
    words, config = ("--lpl_features", "classifier", "--lpl_classifier", folder), folder / "config.json"
    content = json.loads(config.read_text())
    config.write_text(json.dumps(content | {"vae_fingerprint": "hub:someone/model@main", "vae_encoder_sketch": None}))
    args_of(flags, *words)
    assert "(hub:someone/model@main) and the base model's autoencoder (sha256:" in capsys.readouterr().err
    config.write_text(json.dumps(content | {"vae_fingerprint": None, "vae_encoder_sketch": None}))
    args_of(flags, *words)
    assert capsys.readouterr().err == ""
    weights = folder / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(UserError, match="is cut short"):
        args_of(flags, *words)
    weights.unlink()
    with pytest.raises(UserError, match="has no weights without a variant"):
        args_of(flags, *words)


def test_the_stages_of_the_flags(flags, feature_networks):
    """By default all that the norm type takes; of a tiny decoder as many up blocks as it has, or fewer."""
    words = [word for pair in feature_networks.items() for word in pair]
    for more, names in {
        "": ("block 1", "block 2", "block 3"),
        "--lpl_norm_type shared": ("block 1", "block 2", "block 3", "pooled"),
        "--resolution 16": ("block 1",),
        "--lpl_norm_type none --lpl_classifier_stages pooled 1": ("block 1", "pooled"),
    }.items():
        args = args_of(flags, *words, "--lpl_features", "classifier", "tiny_decoder", *more.split())
        stages = lpl_stages(args, None, Machine("bf16"))
        assert stages["classifier"].names == names and stages["classifier"].dtype == torch.bfloat16
        assert len(stages["tiny_decoder"]) == 4
    args = args_of(flags, *words, "--lpl_features", "tiny_decoder=0.3", "classifier=0.7", "--lpl_num_blocks", 2)
    stages = lpl_stages(args, None, Machine("no", device="cpu"))
    assert len(stages["tiny_decoder"]) == 3 and stages["tiny_decoder"].vae.encoder is None
    saved = AutoencoderTiny.from_pretrained(feature_networks["--lpl_tiny_decoder"])
    assert torch.equal(saved.decoder.layers[0].weight, stages["tiny_decoder"].network[0].weight)
    assert feature_fractions(args) == {"tiny_decoder": 0.3, "classifier": 0.7}
    term = build_perceptual_term(args, stages, LPLGate(t_threshold=200), "cpu")
    assert [weight.fraction for weight in term.auto_weight.values()] == [0.3, 0.7]
    sizes = {name: loss.config.batch_size for name, loss in term.loss.losses.items()}
    assert sizes == {"tiny_decoder": 256, "classifier": 256 * 64}
    rows = lpl_rows(args, LPLGate(t_threshold=200))
    assert rows["features"] == "tiny_decoder 0.3, classifier 0.7" and rows["decoder stages"] is None
    for more, told in (([], "full"), (["--lpl_norm_gradient", "none"], "none"), (["--lpl_norm_type", "shared"], None)):
        found = lpl_rows(args_of(flags, "--use_lpl", *more), LPLGate(t_threshold=200))
        assert found["gradient through its deviation"] == told


def test_the_networks_are_counted(flags, feature_networks):
    """Weights in the memory's kinds; a decoder costs more than a classifier, and augmentation next to nothing."""
    words = [word for pair in feature_networks.items() for word in pair]
    sizes = {}
    for network in ("decoder", "classifier", "tiny_decoder"):
        flag = f"--lpl_{network}"
        own = [flag, feature_networks[flag]] if flag in words else []
        args = args_of(flags, *own, "--lpl_features", network, "--lpl_augment")
        peak = memory_of(train_sdxl_lpl, args, torch.float32)["LPL"]
        sizes[network] = peak.size
        if own:
            stages = lpl_stages(args, None, Machine("no"))[network]
            weights = sum(parameter.nbytes for parameter in stages.network.parameters())
            assert peak.kinds["other networks of the loss"] == weights > 0 and "autoencoder" not in peak.kinds
    assert sizes["classifier"] < sizes["tiny_decoder"] < sizes["decoder"]


def test_sd3_takes_them_too(sd3_folder, pictures, cache_dir, tmp_path):
    networks = save_feature_networks(tmp_path, sd3_folder, train_sd3_lpl_flow.SD3)
    words = [
        "--pretrained_model_name_or_path",
        sd3_folder,
        "--train_data_dir",
        pictures,
        "--use_lpl",
        "--resolution",
        64,
        "--lpl_features",
        "classifier",
        "tiny_decoder",
        *(word for pair in networks.items() for word in pair),
    ]
    args = train_sd3_lpl_flow.parse_args([*map(str, words), "--cache_dir", str(cache_dir)])
    assert [*train_sd3_lpl_flow.lpl_stages(args, None, Machine("no"))] == ["classifier", "tiny_decoder"]


# ---------------------------------------------------------------------------------------------------------------------
# Whose tiny decoder it is


WARNED = "--lpl_tiny_decoder does not paint the training pictures"


def run_with(tiny, pictures, tmp_path, *words):
    """A run of one step with a tiny decoder of the tiny SDXL's latents."""
    sdxl.run(*f"--max_train_steps 1 --train_batch_size 1 --resolution 64 --mixed_precision no --report_to none "
             f"--use_lpl --lpl_features tiny_decoder --lpl_tiny_decoder {tiny} --cache_dir {tmp_path}/cache "
             f"--pretrained_model_name_or_path {ROOT}/examples/tiny-sdxl --train_data_dir {pictures} "
             f"--instance_prompt emoji --output_dir {tmp_path}/run".split(), *words, result=False)  # fmt: skip


@pytest.mark.parametrize("cropping", [["--center_crop"], []])
def test_a_tiny_decoder_of_another_autoencoder_is_noticed(cropping, tmp_path, capsys):
    """It paints other pictures than those that the autoencoder encodes, before or during the run, or none at all."""
    own, emoji = ROOT / "examples" / "tiny-sdxl-decoder", sorted((ROOT / "examples" / "fluent-emoji").glob("*.webp"))
    (tmp_path / "wide").mkdir()
    for number in range(8):  # the first ones say nothing
        Image.new("RGB", (96, 64), "white").save(tmp_path / "wide" / f"0-{number}.png")
    for number in range(8):  # two side by side, so that a crop at random is not always the same
        wide = Image.new("RGB", (96, 64), "white")
        for place, path in enumerate(emoji[2 * number : 2 * number + 2]):
            wide.paste(Image.open(path).convert("RGB").resize((48, 48)), (48 * place, 8))
        wide.save(tmp_path / "wide" / f"1-{number}.png")
    run_with(own, tmp_path / "wide", tmp_path, *cropping)
    assert WARNED not in capsys.readouterr().err
    tiny = AutoencoderTiny.from_pretrained(own, dtype=torch.float32)
    first = tiny.decoder.layers[0].weight.data
    for changed in (first.roll(1, dims=1), -first, first * torch.nan):  # other channels, another sign, broken
        tiny.decoder.layers[0].weight.data = changed
        tiny.save_pretrained(tmp_path / "other")
        run_with(tmp_path / "other", tmp_path / "wide", tmp_path, *cropping)
        assert WARNED in capsys.readouterr().err


def test_plain_pictures_say_nothing_about_a_tiny_decoder(tmp_path, capsys):
    for colour in ("white", "black"):
        (tmp_path / colour).mkdir()
        Image.new("RGB", (64, 64), colour).save(tmp_path / colour / "plain.png")
        run_with(ROOT / "examples" / "tiny-sdxl-decoder", tmp_path / colour, tmp_path)
        assert WARNED not in capsys.readouterr().err
