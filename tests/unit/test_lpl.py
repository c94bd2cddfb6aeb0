"""The latent perceptual loss: an independent reference, relations that must hold, and the faults of the example.

`reference_*` below are written from the description of the loss, in plain loops over samples and channels, with
sorting instead of selection and shifted copies instead of pooling. They share no code with the library. Float64
throughout, unless a test is about another dtype; decoders are random and tiny.
"""

import functools
import itertools
import math
from fractions import Fraction

import diffusers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny, VQModel
from diffusers.models.resnet import ResnetBlock2D

import lpl_utils
from lpl_finetuning.training.live_memory import LiveBytes
from lpl_utils import (
    CHECKPOINTING,
    EPS,
    LOSS_TYPES,
    NORM_GRADIENTS,
    NORM_TYPES,
    OVER_POSITIONS,
    PREDICTION_TYPES,
    AutoWeight,
    DecoderStages,
    IdentityStages,
    InputGradientOnly,
    LatentPerceptualLoss,
    LatentSpace,
    LPLConfig,
    LPLGate,
    ResnetPiece,
    channel_norm,
    estimate_z0,
    inlier_mask,
    layer_loss,
    lpl_noise_scale,
    morphology_kernels,
    noise_to_signal,
    order_statistics,
    stage_features,
)
from tests.tiny_models import autoencoder

DOUBLE = torch.float64
KINDS = ("sdxl", "sd3", "asymmetric")
OPTIONS = list(itertools.product(NORM_TYPES, LOSS_TYPES))
EACH = [(norm_type, "mse") for norm_type in NORM_TYPES] + [("standard", "l1"), ("default", "l1")]
NORMS = [(norm_type, "none") for norm_type in NORM_TYPES] + [("standard", "half"), ("standard", "full")]
WIDE = 0.3  # an outlier quantile at which random features have outliers in every layer that has a mask


# ---------------------------------------------------------------------------------------------------------------------
# Helpers
# ---------------------------------------------------------------------------------------------------------------------


def fresh(kind="sdxl", dtype=DOUBLE):
    """A random autoencoder of four to eight channels."""
    return autoencoder(kind, width=4, groups=2, dtype=dtype)


@functools.cache
def decoder(kind="sdxl", dtype=DOUBLE):
    """A random autoencoder, shared by the tests that leave it alone (all do; one test makes sure of it)."""
    return fresh(kind, dtype)


def pair(vae, batch=2, height=4, width=4, seed=0, dtype=DOUBLE):
    """A target and an estimate, (B, C, h, w) in model space; one pixel of the target is far from the rest."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, vae.config.latent_channels, height, width)
    z0 = torch.randn(shape, generator=generator, dtype=DOUBLE)
    z0[:, :, 1, 1] *= 10
    return z0.to(dtype), (z0 + 0.3 * torch.randn(shape, generator=generator, dtype=DOUBLE)).to(dtype)


def evaluate(loss, z0, estimate, weights=None):
    """The loss' output and the gradient of the (weighted) sum of its samples towards the estimate."""
    estimate = estimate.clone().requires_grad_()
    output = loss(estimate, z0)
    total = output.per_sample.sum() if weights is None else (weights * output.per_sample).sum()
    return output, torch.autograd.grad(total, estimate)[0]


def lpl(vae=None, **options):
    return LatentPerceptualLoss(decoder() if vae is None else vae, LPLConfig(**options))


def assert_equal(a, b, tolerance=1e-12):
    """Equal up to a relative error of the largest value."""
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * max(1e-30, float(b.detach().abs().max())))


def relative_error(a, b):
    return float(((a - b).norm() / b.norm()).detach())


# ---------------------------------------------------------------------------------------------------------------------
# The reference
# ---------------------------------------------------------------------------------------------------------------------


def reference_features(vae, z_model, skip_post_quant_conv=False):
    """The decoder's features: middle block and every up block."""
    x = z_model / vae.config.scaling_factor + (getattr(vae.config, "shift_factor", None) or 0)
    if getattr(vae, "post_quant_conv", None) is not None and not skip_post_quant_conv:
        x = vae.post_quant_conv(x)
    features = [vae.decoder.mid_block(vae.decoder.conv_in(x))]
    for block in vae.decoder.up_blocks:
        features.append(block(features[-1]))
    return features


def kth_smallest(values, fraction):
    """The k-th smallest of a list, k = max(1, floor(fraction N)), with an exact fraction."""
    return sorted(values)[max(1, math.floor(fraction * len(values))) - 1]


def shifted(values, kernel, outside, pick):
    """`pick` (max or min) over a kernel x kernel neighbourhood; pixels outside the map have the value `outside`."""
    height, width = values.shape
    reach = kernel // 2
    padded = np.full((height + 2 * reach, width + 2 * reach), outside)
    padded[reach : reach + height, reach : reach + width] = values
    windows = [padded[i : i + height, j : j + width] for i in range(kernel) for j in range(kernel)]
    return functools.reduce(pick, windows)


def reference_morphology(inlier, dilation, erosion):
    """Dilation (outside counts as outlier), then erosion (outside counts as inlier), of one bool map."""
    grown = shifted(inlier, dilation, False, np.logical_or)
    return shifted(grown, erosion, True, np.logical_and)


def reference_mask(features, kernels, quantile=0.02):
    """Bool (B, C, H, W) from the target's features."""
    mask = np.ones(tuple(features.shape), dtype=bool)
    if kernels is None:
        return mask
    share = Fraction(str(quantile))
    for b, c in itertools.product(*map(range, features.shape[:2])):
        values = features[b, c].detach().double().numpy()
        low, high = (kth_smallest(values.ravel().tolist(), part) for part in (share, 1 - share))
        margin = 2 * math.sqrt(((values - values.mean()) ** 2).sum() / (values.size - 1))
        mask[b, c] = reference_morphology((low - margin < values) & (values < high + margin), *kernels)
    return mask


def reference_kernels(feature_height, image_height):
    return {1: (3, 5), 2: (1, 3)}.get(image_height // feature_height)


def mean_and_std(values):
    mean = values.sum() / max(1, len(values))
    return mean, (((values - mean) ** 2).sum() / max(1, len(values))).sqrt() + EPS


def reference_norm(features, rho):
    """(H, W): norm over the channels of the inliers of one sample, plus eps; no gradient where it is 0."""
    squares = ((rho * features) ** 2).sum(dim=0)
    norm = torch.zeros_like(squares)
    norm[squares > 0] = squares[squares > 0].sqrt()
    return norm + EPS


def reference_channel(x, xh, rho, norm_type, norm_gradient, frozen):
    """(target, estimate) of one sample and channel, (H, W), by statistics over positions; sg is stop-gradient.

    Under "standard" the squared difference is divided by sg(s)^2, sg(s) * s or s^2 for the norm gradients none, half
    and full; None is full.
    """
    if norm_type == "target":
        mean, std = mean_and_std(x[rho])
        return (x - mean) / std, (xh - mean) / std
    mean, detached = mean_and_std(frozen[rho])
    divided_by = detached**2
    if norm_gradient != "none":
        live = mean_and_std(xh[rho])[1]
        divided_by = live.detach() * live if norm_gradient == "half" else live**2
    return (x - mean) / divided_by.sqrt(), (xh - mean) / divided_by.sqrt()


def reference_layer(x, xh, mask, norm_type, loss_type, norm_gradient=None, frozen=None):
    """The layer's loss of every sample, a list; `frozen`: features that detached statistics come from."""
    frozen = xh.detach() if frozen is None else frozen
    mask = torch.from_numpy(mask)
    losses = []
    for b in range(len(x)):
        channels, divisors = [], (1, 1)
        if norm_type == "shared":
            divisors = (reference_norm(x[b], mask[b]),) * 2
        elif norm_type == "default":
            divisors = [reference_norm(side[b], mask[b]) for side in (x, xh)]
        for c in range(x.shape[1]):
            rho = mask[b, c]
            if norm_type in ("standard", "target"):
                pair = reference_channel(x[b, c], xh[b, c], rho, norm_type, norm_gradient, frozen[b, c])
            elif norm_type == "batch":
                mean, std = mean_and_std(x[:, c][mask[:, c]])
                pair = (x[b, c] - mean) / std, (xh[b, c] - mean) / std
            else:
                pair = x[b, c] / divisors[0], xh[b, c] / divisors[1]
            distances = (pair[1] - pair[0])[rho]
            distances = distances**2 if loss_type == "mse" else distances.abs()
            channels.append(distances.sum() / max(1, int(rho.sum())))
        losses.append(sum(channels) / len(channels))
    return torch.stack(losses)


def reference_layers(features, estimates, masks, norm_type, loss_type, norm_gradient=None, frozen=None):
    """(L, B): the layers' losses of every sample."""
    frozen = frozen or [None] * len(features)
    return torch.stack([
        reference_layer(x, xh, mask, norm_type, loss_type, norm_gradient, held)
        for x, xh, mask, held in zip(features, estimates, masks, frozen, strict=True)
    ])  # fmt: skip


def reference_total(layers, features, pow_law=True):
    """(B,): the loss of every sample, from its layers' losses."""
    weights = [min(1, features[0].shape[2] / x.shape[2]) if pow_law else 1 for x in features]
    return sum(weight * layer for weight, layer in zip(weights, layers, strict=True)) / len(layers)


def reference_loss(features, estimates, masks, norm_type, loss_type, norm_gradient=None, frozen=None):
    """(B,) and (L, B): the loss of every sample and the layers' parts of it."""
    layers = reference_layers(features, estimates, masks, norm_type, loss_type, norm_gradient, frozen)
    return reference_total(layers, features), layers


def reference_masks(features, image_height, quantile, remove_outliers=True):
    """The layers' masks, all true where there is none."""
    return [
        reference_mask(x, reference_kernels(x.shape[2], image_height) if remove_outliers else None, quantile)
        for x in features
    ]


@functools.cache
def reference_case(kind):
    """Latents and both sides' features (the estimate's with their graph), masks with and without outliers."""
    vae = decoder(kind)
    z0, estimate = pair(vae)
    estimate.requires_grad_()
    with torch.no_grad():
        features = reference_features(vae, z0)
    estimates = reference_features(vae, estimate)
    masks = {on: reference_masks(features, 8 * z0.shape[2], WIDE, on) for on in (True, False)}
    return z0, estimate, features, estimates, masks


@pytest.mark.parametrize(("loss_type", "remove_outliers"), [("mse", True), ("l1", True), ("mse", False)])
@pytest.mark.parametrize(("norm_type", "norm_gradient"), NORMS)
def test_values_and_gradients_equal_the_reference(norm_type, norm_gradient, loss_type, remove_outliers):
    z0, estimate, features, estimates, masks = reference_case("sdxl")
    mask, shares = masks[remove_outliers], torch.tensor([1.0, 0.7], dtype=DOUBLE)
    layers = reference_layers(features, estimates, mask, norm_type, loss_type, norm_gradient)
    for pow_law in (True, False) if loss_type == "l1" else (True,):
        expected = reference_total(layers, features, pow_law)
        (gradient,) = torch.autograd.grad(expected @ shares, estimate, retain_graph=True)
        options = {"norm_type": norm_type, "norm_gradient": norm_gradient, "loss_type": loss_type}
        options |= {"pow_law": pow_law, "remove_outliers": remove_outliers, "outlier_quantile": WIDE}
        output, found = evaluate(lpl(**options), z0, estimate.detach(), shares)
        assert_equal(output.per_sample, expected.detach(), 1e-10)
        assert_equal(output.per_layer, layers.detach(), 1e-10)
        assert_equal(output.inlier_fraction, torch.tensor([part.mean() for part in mask], dtype=DOUBLE))
        assert_equal(found, gradient, 1e-8)
        assert gradient.norm() > 0
    if remove_outliers:  # or the comparison would not have been about masks
        assert (output.inlier_fraction[2:] < 1).all() and (output.inlier_fraction[:2] == 1).all()


@pytest.mark.parametrize("kind", ["sd3", "asymmetric"])
def test_other_decoders_equal_the_reference(kind):
    z0, estimate, features, estimates, masks = reference_case(kind)
    expected, layers = reference_loss(features, estimates, masks[True], "standard", "mse")
    (gradient,) = torch.autograd.grad(expected.sum(), estimate, retain_graph=True)
    output, found = evaluate(lpl(decoder(kind), outlier_quantile=WIDE), z0, estimate.detach())
    assert_equal(output.per_sample, expected.detach(), 1e-10)
    assert_equal(output.per_layer, layers.detach(), 1e-10)
    assert_equal(found, gradient, 1e-8)


# ---------------------------------------------------------------------------------------------------------------------
# The decoder's walk
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_walk_continued_to_the_end_is_vae_decode(kind):
    """Catches a change in diffusers, a skipped `post_quant_conv`, a forgotten shift."""
    vae = decoder(kind)
    assert (getattr(vae, "post_quant_conv", None) is None) == (kind == "sd3")
    stages = DecoderStages(vae)
    z_model, _ = pair(vae, height=4, width=6)
    assert len(stages) == 5
    for x, expected in zip(stage_features(stages, z_model), reference_features(vae, z_model), strict=True):
        assert_equal(x, expected)
    z_vae = z_model / vae.config.scaling_factor + (0.0609 if kind == "sd3" else 0)
    image = vae.decode(z_vae).sample
    assert_equal(stages.finish(x), image)
    assert image.shape[2:] == (stages.upscaling * 4, stages.upscaling * 6) == (32, 48)
    for num_blocks in range(5):
        fewer = DecoderStages(vae, num_blocks, rgb=True)
        *features, picture = stage_features(fewer, z_model)
        assert len(fewer) == len(fewer.names) == num_blocks + 2 == len(features) + 1
        assert_equal(picture, image)
        assert fewer.names == ("middle block", *(f"up block {i + 1}" for i in range(num_blocks)), "rgb")


@pytest.mark.parametrize("kind", KINDS)
def test_the_spaces_of_latents_are_inverse(kind):
    stages = DecoderStages(decoder(kind))
    z, _ = pair(decoder(kind))
    assert_equal(stages.to_model_space(stages.to_vae_space(z)), z, 1e-14)
    assert_equal(stages.to_vae_space(stages.to_model_space(z)), z, 1e-14)
    config = stages.vae.config
    assert_equal(stages.to_vae_space(z), z / config.scaling_factor + (0.0609 if kind == "sd3" else 0), 1e-14)
    assert stages.to_model_space(z.bfloat16()).dtype == torch.float32


def test_the_decoder_runs_in_its_own_dtype_and_the_spaces_keep_it():
    stages = DecoderStages(decoder("sdxl", torch.bfloat16))
    z, _ = pair(stages.vae, dtype=torch.float32)
    assert stages.dtype == stages.to_vae_space(z).dtype == next(stage_features(stages, z)).dtype == torch.bfloat16


# ---------------------------------------------------------------------------------------------------------------------
# The clean-latent estimate
# ---------------------------------------------------------------------------------------------------------------------


def forward_process(prediction_type, batch=5, dtype=DOUBLE):
    """z_0, z_t, the exact model output, alpha and sigma."""
    generator = torch.Generator().manual_seed(3)
    z0, eps = torch.randn((2, batch, 4, 3, 5), generator=generator, dtype=dtype)
    sigma = torch.linspace(0.05, 0.95, batch, dtype=dtype)
    alpha = 1 - sigma if prediction_type == "flow" else (1 - sigma**2).sqrt()
    a, s = (level.reshape(-1, 1, 1, 1) for level in (alpha, sigma))
    outputs = {"epsilon": eps, "v_prediction": a * eps - s * z0, "sample": z0, "flow": eps - z0}
    return z0, a * z0 + s * eps, outputs[prediction_type], alpha, sigma


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_the_exact_model_output_gives_back_the_latents(prediction_type):
    z0, noisy_latents, output, alpha, sigma = forward_process(prediction_type)
    estimate = estimate_z0(output, noisy_latents, alpha, sigma, prediction_type)
    assert estimate.dtype == DOUBLE
    torch.testing.assert_close(estimate, z0, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_a_half_precision_output_with_float32_latents_gives_a_float32_estimate(prediction_type, dtype):
    _, noisy_latents, output, alpha, sigma = forward_process(prediction_type, dtype=torch.float32)
    estimate = estimate_z0(output.to(dtype), noisy_latents, alpha.double(), sigma.double(), prediction_type)
    assert estimate.dtype == torch.float32
    exact = estimate_z0(output.to(dtype).double(), noisy_latents.double(), alpha, sigma, prediction_type)
    torch.testing.assert_close(estimate, exact.float(), rtol=1e-4, atol=1e-5)  # nothing was computed in half precision
    half = estimate_z0(output.to(dtype), noisy_latents.to(dtype), alpha, sigma, prediction_type)
    assert half.dtype == torch.float32


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_a_signal_level_of_zero_gives_finite_estimates_and_gradients(prediction_type):
    _, noisy_latents, output, _, _ = forward_process(prediction_type, batch=2)
    output.requires_grad_()
    alpha, sigma = torch.tensor([0.0, 0.8]), torch.tensor([1.0, 0.6])
    estimate = estimate_z0(output, noisy_latents, alpha, sigma, prediction_type)
    (gradient,) = torch.autograd.grad(estimate.square().sum(), output)
    assert estimate.isfinite().all() and gradient.isfinite().all()
    assert gradient[1].abs().sum() > 0


def test_an_unknown_prediction_type_is_an_error():
    z = torch.zeros(1, 4, 2, 2)
    with pytest.raises(ValueError, match=r"prediction_type.*'velocity'.*flow"):
        estimate_z0(z, z, torch.ones(1), torch.ones(1), "velocity")


def test_noise_to_signal_and_the_noise_scale():
    alpha, sigma = torch.tensor([1.0, 0.6, 0.0], dtype=DOUBLE), torch.tensor([0.0, 0.8, 1.0], dtype=DOUBLE)
    assert_equal(noise_to_signal(alpha, sigma)[:2], torch.tensor([0, 4 / 3], dtype=DOUBLE))
    assert noise_to_signal(alpha, sigma)[2] == math.inf
    assert_equal(lpl_noise_scale(alpha, sigma), torch.tensor([1, 0.36, 0], dtype=DOUBLE))
    flow = torch.tensor([0.25], dtype=DOUBLE)  # 1 - sigma and sigma: the squares do not add up to one
    assert_equal(lpl_noise_scale(1 - flow, flow), torch.tensor([0.9], dtype=DOUBLE))


# ---------------------------------------------------------------------------------------------------------------------
# Relations that must hold
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("remove_outliers", [True, False])
@pytest.mark.parametrize(("norm_type", "loss_type"), EACH)
def test_a_latent_has_no_distance_to_itself(norm_type, loss_type, remove_outliers):
    z0, _ = pair(decoder())
    options = {"remove_outliers": remove_outliers, "outlier_quantile": WIDE}
    output, gradient = evaluate(lpl(norm_type=norm_type, loss_type=loss_type, **options), z0, z0)
    assert (output.per_sample == 0).all() and (output.per_layer == 0).all()
    assert (gradient == 0).all()


@pytest.mark.parametrize(("norm_type", "loss_type"), EACH)
def test_a_batch_is_its_samples_one_by_one_except_under_batch(norm_type, loss_type):
    z0, estimate = pair(decoder(), batch=3)
    loss = lpl(norm_type=norm_type, loss_type=loss_type, outlier_quantile=WIDE)
    output, gradient = evaluate(loss, z0, estimate)
    singles = [evaluate(loss, z0[i : i + 1], estimate[i : i + 1]) for i in range(3)]
    per_sample = torch.cat([single.per_sample for single, _ in singles])
    if norm_type == "batch":
        assert relative_error(per_sample, output.per_sample) > 1e-3
        return
    assert_equal(output.per_sample, per_sample)
    assert_equal(output.per_layer, torch.cat([single.per_layer for single, _ in singles], dim=1))
    assert_equal(output.inlier_fraction, torch.stack([single.inlier_fraction for single, _ in singles]).mean(dim=0))
    assert_equal(gradient, torch.cat([single for _, single in singles]), 1e-10)


@pytest.mark.parametrize(("norm_type", "batch_size"), [(name, 2) for name in NORM_TYPES] + [("standard", 1)])
def test_chunks_equal_all_at_once(norm_type, batch_size):
    z0, estimate = pair(decoder(), batch=3)
    weights = torch.tensor([1.0, 2.0, 3.0], dtype=DOUBLE)
    options = {"norm_type": norm_type, "outlier_quantile": WIDE}
    expected, gradient = evaluate(lpl(**options), z0, estimate, weights)
    output, found = evaluate(lpl(batch_size=batch_size, **options), z0, estimate, weights)
    for name in ("per_sample", "per_layer", "inlier_fraction"):
        assert_equal(getattr(output, name), getattr(expected, name))
    assert_equal(found, gradient, 1e-10)


@pytest.mark.parametrize("checkpointing", ["none", "stage"])
def test_group_norms_in_blocks_change_nothing(checkpointing, monkeypatch):
    """The gradients of large norms are computed group by group, in place where nothing else holds them."""
    z0, estimate = pair(decoder(), batch=2)
    expected, gradient = evaluate(lpl(checkpointing=checkpointing), z0, estimate)
    monkeypatch.setattr(lpl_utils, "NORM_BLOCK", 64)
    output, found = evaluate(lpl(checkpointing=checkpointing), z0, estimate)
    assert torch.equal(output.per_sample, expected.per_sample)
    assert_equal(found, gradient, 1e-10)


def test_chunks_bound_how_many_samples_the_decoder_sees():
    z0, estimate = pair(decoder(), batch=3)
    seen = []
    hook = decoder().decoder.mid_block.register_forward_hook(lambda module, args, output: seen.append(len(output)))
    try:
        evaluate(lpl(batch_size=2), z0, estimate)
        assert sorted(seen) == [1, 1, 2, 2]
        seen.clear()
        evaluate(lpl(batch_size=2, norm_type="batch"), z0, estimate)
        assert seen == [3, 3]
    finally:
        hook.remove()


@pytest.mark.parametrize(("norm_type", "loss_type"), OPTIONS)
def test_checkpointing_changes_nothing(norm_type, loss_type):
    z0, estimate = pair(decoder())
    batch_size = {"mse": None, "l1": 1}[loss_type]
    options = {"norm_type": norm_type, "loss_type": loss_type, "batch_size": batch_size, "outlier_quantile": WIDE}
    (expected, gradient), (output, found) = (
        evaluate(lpl(checkpointing=mode, **options), z0, estimate) for mode in CHECKPOINTING
    )
    for name in ("per_sample", "per_layer", "inlier_fraction"):
        assert torch.equal(getattr(output, name), getattr(expected, name))
    assert_equal(found, gradient, 1e-12)


def test_the_decoder_runs_three_passes_and_one_more_with_checkpointing():
    """Forward for the target, forward for the estimate, once more for the estimate only with checkpointing."""
    z0, estimate = pair(decoder())
    calls = []
    handle = decoder().decoder.up_blocks[1].register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    try:
        for mode, expected in {"none": [False, True], "stage": [False, False, True]}.items():
            calls.clear()
            evaluate(lpl(checkpointing=mode), z0, estimate)
            assert sorted(calls) == expected
    finally:
        handle.remove()


@pytest.mark.parametrize(("norm_type", "loss_type"), EACH)
def test_float32_agrees_with_float64(norm_type, loss_type):
    z0, estimate = pair(decoder(), height=6)
    expected, gradient = evaluate(lpl(norm_type=norm_type, loss_type=loss_type), z0, estimate)
    single = lpl(decoder(dtype=torch.float32), norm_type=norm_type, loss_type=loss_type)
    output, found = evaluate(single, z0.float(), estimate.float())
    assert output.per_sample.dtype == output.per_layer.dtype == output.inlier_fraction.dtype == torch.float32
    assert found.dtype == torch.float32
    assert_equal(output.per_sample.double(), expected.per_sample.detach(), 1e-4)
    assert_equal(output.per_layer.double(), expected.per_layer, 1e-4)
    assert_equal(found.double(), gradient, 1e-3 if loss_type == "l1" else 1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_decoder_gives_float32_values_near_the_exact_ones(dtype):
    z0, estimate = pair(decoder(), height=6)
    z0[:, :, 1, 1] /= 10
    options = {"remove_outliers": False}  # an outlier more or less would be another function
    vae = fresh("sdxl", dtype=dtype)
    vae.register_to_config(force_upcast=False)
    expected, gradient = evaluate(lpl(**options), z0, estimate)
    output, found = evaluate(lpl(vae, **options), z0.float(), estimate.float())
    assert output.per_sample.dtype == found.dtype == torch.float32
    assert relative_error(output.per_sample.double(), expected.per_sample) < 0.05
    assert relative_error(found.double(), gradient) < 0.2


def test_small_gradients_survive_a_float16_decoder():
    """They shrink with the image's area and, under "shared", with the channels: unscaled, a third is lost here."""
    vae = fresh("sdxl", dtype=torch.float16)
    vae.register_to_config(force_upcast=False)
    z0, _ = pair(vae, height=8, width=8)
    z0[:, :, 1, 1] /= 10
    estimate = z0 + 0.05 * torch.randn(z0.shape, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    options = {"norm_type": "shared", "remove_outliers": False}
    _, gradient = evaluate(lpl(**options), z0, estimate)
    _, found = evaluate(lpl(vae, **options), z0.float(), estimate.float())
    assert relative_error(found.double(), gradient) < 0.05


@pytest.mark.parametrize(("norm_type", "loss_type"), EACH)
def test_comparing_a_layer_block_by_block_changes_nothing(norm_type, loss_type, monkeypatch):
    """Features of this size fit into one block: here a block is three channels or three rows, the last one fewer."""
    z0, estimate = pair(decoder())
    loss = lpl(norm_type=norm_type, loss_type=loss_type, outlier_quantile=WIDE)
    expected, gradient = evaluate(loss, z0, estimate)
    used = []

    def blocks(features, dim):
        used.append(dim)
        pieces = (slice(i, i + 3) for i in range(0, features.shape[dim], 3))
        return [(*[slice(None)] * dim, piece) for piece in pieces]

    monkeypatch.setattr(lpl_utils, "blocks_of", blocks)
    output, found = evaluate(loss, z0, estimate)
    assert used
    for name in ("per_sample", "per_layer", "inlier_fraction"):
        assert_equal(getattr(output, name), getattr(expected, name))
    assert_equal(found, gradient, 1e-10)


def test_blocks_cover_every_element_once():
    for shape, dim in itertools.product(((1, 7, 1024, 512), (3, 2, 9, 5), (1, 3, 2048, 2048)), (1, 2)):
        features = torch.empty(shape, dtype=torch.bool)
        seen = torch.zeros(shape, dtype=torch.uint8)
        for index in lpl_utils.blocks_of(features, dim):
            seen[index] += 1
        assert (seen == 1).all()


def test_gradients_reach_the_estimate_and_nothing_else():
    for requires_grad in (True, False):
        vae = fresh("sdxl", dtype=DOUBLE).requires_grad_(requires_grad)
        for mode in CHECKPOINTING:
            z0, estimate = (z.requires_grad_() for z in pair(vae))
            output = lpl(vae, checkpointing=mode)(estimate, z0)
            assert not output.per_layer.requires_grad and not output.inlier_fraction.requires_grad
            output.per_sample.sum().backward()
            assert estimate.grad.isfinite().all() and estimate.grad.abs().sum() > 0
            assert z0.grad is None
            assert all(parameter.grad is None for parameter in vae.parameters())
            assert all(parameter.requires_grad == requires_grad for parameter in vae.parameters())


def test_the_gradient_continues_into_what_made_the_estimate():
    z0, estimate = pair(decoder())
    _, gradient = evaluate(lpl(), z0, estimate)
    scale = torch.tensor(1.0, dtype=DOUBLE, requires_grad=True)
    lpl()(scale * estimate, z0).per_sample.sum().backward()
    assert_equal(scale.grad, (gradient * estimate).sum(), 1e-10)


@pytest.mark.parametrize(
    ("norm_type", "loss_type", "norm_gradient"),
    [(*each, "none") for each in EACH] + [("standard", loss_type, "full") for loss_type in LOSS_TYPES],
)
def test_gradients_equal_finite_differences(norm_type, loss_type, norm_gradient):
    """Where the statistics are detached: compared with the function that keeps those of the start."""
    vae = decoder()
    z0, estimate = pair(vae)
    options = {"norm_type": norm_type, "norm_gradient": norm_gradient, "loss_type": loss_type}
    _, gradient = evaluate(lpl(**options, outlier_quantile=WIDE), z0, estimate)
    _, _, features, _, masks = reference_case("sdxl")
    with torch.no_grad():
        detached = norm_type == "standard" and norm_gradient == "none"
        frozen = reference_features(vae, estimate) if detached else None

        def value(z):
            estimates = reference_features(vae, z)
            return reference_loss(
                features, estimates, masks[True], norm_type, loss_type, norm_gradient, frozen
            )[0].sum()  # fmt: skip

        direction = torch.randn(z0.shape, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
        step = 1e-7 * direction
        slope = (value(estimate + step) - value(estimate - step)) / 2e-7
        tolerance = 1e-5 if loss_type == "mse" else 1e-4  # a few of some 40,000 differences change their sign
        torch.testing.assert_close((gradient * direction).sum(), slope, rtol=tolerance, atol=tolerance / 10)


@pytest.mark.parametrize("norm_type", NORM_TYPES)
def test_permuting_the_batch_permutes_the_losses(norm_type):
    z0, estimate = pair(decoder(), batch=3)
    order = [2, 0, 1]
    expected, gradient = evaluate(lpl(norm_type=norm_type), z0, estimate)
    output, found = evaluate(lpl(norm_type=norm_type), z0[order], estimate[order])
    assert_equal(output.per_sample, expected.per_sample[order])
    assert_equal(output.per_layer, expected.per_layer[:, order])
    assert_equal(found, gradient[order], 1e-10)


@pytest.mark.parametrize("norm_type", NORM_TYPES)
def test_each_samples_gradient_scales_with_its_weight(norm_type):
    """Also: a sample's loss never depends on another sample's estimate."""
    z0, estimate = pair(decoder(), batch=3)
    loss = lpl(norm_type=norm_type)
    _, gradient = evaluate(loss, z0, estimate)
    weights = torch.tensor([0.0, 2.0, -0.5], dtype=DOUBLE)
    _, found = evaluate(loss, z0, estimate, weights)
    assert_equal(found, gradient * weights.reshape(3, 1, 1, 1), 1e-10)
    assert (found[0] == 0).all()


@pytest.mark.parametrize("num_blocks", range(5))
@pytest.mark.parametrize("pow_law", [True, False])
def test_shapes_and_layer_weights(num_blocks, pow_law):
    z0, estimate = pair(decoder(), batch=3)
    output = lpl(num_blocks=num_blocks, pow_law=pow_law)(estimate, z0)
    assert output.per_sample.shape == (3,)
    assert output.per_layer.shape == (1 + num_blocks, 3)
    assert output.inlier_fraction.shape == (1 + num_blocks,)
    weights = [1, 1 / 2, 1 / 4, 1 / 8, 1 / 8][: 1 + num_blocks] if pow_law else [1] * (1 + num_blocks)
    weights = torch.tensor(weights, dtype=DOUBLE)
    assert_equal(output.per_sample, (weights[:, None] * output.per_layer).mean(dim=0))
    assert_equal(output.per_layer, lpl()(estimate, z0).per_layer[: 1 + num_blocks])


def test_fewer_blocks_run_less_of_the_decoder():
    z0, estimate = pair(decoder())
    calls = []
    handle = decoder().decoder.up_blocks[2].register_forward_hook(lambda *_: calls.append(1))
    try:
        evaluate(lpl(num_blocks=2), z0, estimate)
        assert not calls
        evaluate(lpl(num_blocks=3), z0, estimate)
        assert len(calls) == 2
    finally:
        handle.remove()


def test_no_graph_where_no_gradient_is_wanted():
    z0, estimate = pair(decoder())
    expected = lpl()(estimate.clone().requires_grad_(), z0)
    with torch.no_grad():
        silent = lpl()(estimate.clone().requires_grad_(), z0)
    constant = lpl()(estimate, z0)
    for output in (silent, constant):
        assert not output.per_sample.requires_grad and output.per_sample.grad_fn is None
        assert_equal(output.per_sample, expected.per_sample.detach())
    with torch.inference_mode():
        assert_equal(lpl()(estimate.clone(), z0.clone()).per_sample, expected.per_sample.detach())


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("vae_dtype", [torch.float32, DOUBLE])
def test_autocast_around_the_loss_changes_nothing(vae_dtype, checkpointing):
    loss = lpl(decoder(dtype=vae_dtype), checkpointing=checkpointing)
    z0, estimate = pair(loss.stages.vae, dtype=vae_dtype)
    expected, gradient = evaluate(loss, z0, estimate)
    with torch.autocast("cpu", torch.bfloat16):
        output, found = evaluate(loss, z0, estimate)
        assert torch.is_autocast_enabled("cpu")
    assert torch.equal(output.per_sample, expected.per_sample) and torch.equal(found, gradient)


@pytest.mark.parametrize("needs_gradient", [True, False])
@pytest.mark.parametrize("norm_type", NORM_TYPES)
def test_an_empty_batch(norm_type, needs_gradient):
    """A batch in which no sample is gated: no loss, no error, and a gradient with nothing in it."""
    z = torch.zeros(0, 4, 4, 4, dtype=DOUBLE, requires_grad=needs_gradient)
    for options in ({}, {"batch_size": 2}, {"checkpointing": "stage"}, {"num_blocks": 2}):
        output = lpl(norm_type=norm_type, **options)(z, z.detach())
        layers = 1 + options.get("num_blocks", 4)
        assert output.per_sample.shape == (0,) and output.per_layer.shape == (layers, 0)
        assert output.inlier_fraction.shape == (layers,) and output.inlier_fraction.isfinite().all()
        assert output.per_sample.sum() == 0 and output.per_sample.requires_grad == needs_gradient
        if needs_gradient:
            assert torch.autograd.grad(output.per_sample.sum(), z)[0].shape == z.shape


def test_latents_that_are_not_square():
    vae = decoder()
    z0, estimate = pair(vae, height=4, width=6)
    with torch.no_grad():
        features, estimates = reference_features(vae, z0), reference_features(vae, estimate)
        masks = reference_masks(features, 32, WIDE)
        expected, layers = reference_loss(features, estimates, masks, "standard", "mse")
    output, gradient = evaluate(lpl(outlier_quantile=WIDE), z0, estimate)
    assert_equal(output.per_sample, expected, 1e-10)
    assert_equal(output.per_layer, layers, 1e-10)
    turned = evaluate(lpl(outlier_quantile=WIDE), z0.flip(0), estimate.flip(0))
    assert_equal(turned[1].flip(0), gradient, 1e-10)


def test_memory_layouts_change_nothing():
    """Norms called below PyTorch's public functions give wrong numbers, silently, when layouts differ."""
    z0, estimate = pair(decoder())
    expected, gradient = evaluate(lpl(), z0, estimate)
    last = torch.channels_last
    vae = fresh("sdxl", dtype=DOUBLE).to(memory_format=last)
    for layout, model in itertools.product((torch.contiguous_format, last), (decoder(), vae)):
        for mode in CHECKPOINTING:
            pieces = (z.contiguous(memory_format=layout) for z in (z0, estimate))
            output, found = evaluate(lpl(model, checkpointing=mode), *pieces)
            assert_equal(output.per_sample, expected.per_sample, 1e-11)
            assert_equal(found, gradient, 1e-10)


def test_an_autoencoder_with_its_own_gradient_checkpointing():
    """`vae.enable_gradient_checkpointing()`: blocks are then recomputed in the backward pass, outside the context."""
    vae = fresh("sdxl", dtype=DOUBLE)
    z0, estimate = pair(vae)
    expected, gradient = evaluate(lpl(vae), z0, estimate)
    vae.enable_gradient_checkpointing()
    for mode in CHECKPOINTING:
        output, found = evaluate(lpl(vae, checkpointing=mode), z0, estimate)
        assert_equal(output.per_sample, expected.per_sample)
        assert_equal(found, gradient, 1e-10)


# ---------------------------------------------------------------------------------------------------------------------
# The gradient through the estimate's deviation
# ---------------------------------------------------------------------------------------------------------------------


def plain_formula(x, xh, loss_type, norm_gradient):
    """Mean over channels and positions of (xh - x)^2 / s^2 (l1: |xh - x| / s), s the deviation of xh; (B,)."""
    s = (xh - xh.mean(dim=(2, 3), keepdim=True)).square().mean(dim=(2, 3), keepdim=True).sqrt() + 1e-6
    squared = {"none": s.detach() ** 2, "half": s.detach() * s, "full": s * s}[norm_gradient]
    distance = (xh - x).square() / squared if loss_type == "mse" else (xh - x).abs() / squared.sqrt()
    return distance.mean(dim=(1, 2, 3))


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("norm_gradient", NORM_GRADIENTS)
def test_the_gradient_through_the_deviation_is_that_of_the_plain_formula(norm_gradient, loss_type):
    x, xh = torch.randn((2, 2, 3, 6, 5), generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    ours, plain = xh.clone().requires_grad_(), xh.clone().requires_grad_()
    value = layer_loss(x, ours, None, "standard", loss_type, norm_gradient)
    expected = plain_formula(x, plain, loss_type, norm_gradient)
    assert_equal(value, expected)
    gradient = torch.autograd.grad(value.sum(), ours)[0]
    assert_equal(gradient, torch.autograd.grad(expected.sum(), plain)[0])
    detached = torch.autograd.grad(plain_formula(x, plain, loss_type, "none").sum(), plain)[0]
    assert (relative_error(gradient, detached) > 0.1) == (norm_gradient != "none")


def test_the_value_is_the_same_for_every_gradient_and_the_gradients_are_evenly_spaced():
    z0, estimate = pair(decoder())
    for loss_type in LOSS_TYPES:
        options = {"loss_type": loss_type, "outlier_quantile": WIDE}
        none, half, full = (evaluate(lpl(norm_gradient=each, **options), z0, estimate) for each in NORM_GRADIENTS)
        assert torch.equal(none[0].per_layer, half[0].per_layer) and torch.equal(none[0].per_layer, full[0].per_layer)
        assert_equal(half[1], (none[1] + full[1]) / 2, 1e-10)
        assert relative_error(full[1], none[1]) > 0.05


def test_chunks_checkpointing_and_blocks_change_nothing_of_the_gradient_through_the_deviation(monkeypatch):
    z0, estimate = pair(decoder(), batch=3)
    monkeypatch.setattr(
        lpl_utils, "blocks_of", lambda x, dim: [(slice(None), slice(0, 3)), (slice(None), slice(3, None))]
    )
    found = evaluate(lpl(norm_gradient="full", batch_size=2, checkpointing="stage"), z0, estimate)
    monkeypatch.undo()
    expected = evaluate(lpl(norm_gradient="full"), z0, estimate)
    assert_equal(found[0].per_layer, expected[0].per_layer)
    assert_equal(found[1], expected[1], 1e-10)


@pytest.mark.parametrize(
    ("norm_type", "norm_gradient", "power"),
    [("standard", "none", 0), ("standard", "half", 0.5), ("standard", "full", 1), ("target", "none", 0),
     ("none", "none", 0)],
)  # fmt: skip
def test_the_gain_at_which_the_gradient_vanishes(norm_type, norm_gradient, power):
    """Target x with variance V, estimate a * m with variance v of m and E[x m] = v: at a = 1, sqrt(V / v), V / v."""
    m, rest = torch.randn((2, 4096), generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    m = m - m.mean()
    rest = rest - rest.mean()
    rest = 0.8 * (rest - (rest @ m) / (m @ m) * m)
    x = m + rest
    V, v = float(x.square().mean()), float(m.square().mean())
    assert abs(float(x @ m) / 4096 - v) < 1e-12 and V / v > 1.4

    def slope(a):
        gain = torch.tensor(a, dtype=DOUBLE, requires_grad=True)
        loss = layer_loss(
            *(side.reshape(1, 1, 64, 64) for side in (x, gain * m)), None, norm_type, "mse", norm_gradient
        )
        return float(torch.autograd.grad(loss, gain)[0])

    minimum = (V / v) ** power
    assert abs(slope(minimum)) < 1e-5
    assert slope(0.97 * minimum) < -0.01 and slope(1.03 * minimum) > 0.01


@pytest.mark.parametrize("norm_type", [name for name in NORM_TYPES if name != "standard"])
@pytest.mark.parametrize("norm_gradient", ["half", "full"])
def test_the_gradient_through_the_deviation_is_for_standard_only(norm_type, norm_gradient):
    with pytest.raises(ValueError, match=f"^norm_gradient is '{norm_gradient}'.*None with norm_type '{norm_type}'"):
        LPLConfig(norm_type=norm_type, norm_gradient=norm_gradient)


# ---------------------------------------------------------------------------------------------------------------------
# Other feature networks
# ---------------------------------------------------------------------------------------------------------------------


class Classifier(torch.nn.Module):
    """Stages of a classifier of latents: two maps, the second smaller than the first, and a vector."""

    names, upscaling, dtype = ("edges", "parts", "whole"), 2, DOUBLE

    def __init__(self, input_space=LatentSpace(), seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.input_space = input_space
        first = torch.nn.Sequential(torch.nn.Conv2d(4, 6, 3, padding=1), torch.nn.BatchNorm2d(6), torch.nn.ReLU())
        second = torch.nn.Sequential(
            torch.nn.Conv2d(6, 8, 3, stride=2, padding=1), torch.nn.GroupNorm(2, 8), torch.nn.SiLU()
        )
        last = torch.nn.Sequential(
            torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(8, 5), torch.nn.LayerNorm(5)
        )
        self.parts = torch.nn.ModuleList([first, second, last])
        self.to(DOUBLE).eval()

    def __len__(self):
        return len(self.names)

    def run(self, index, x):
        return self.parts[index](x)


class Maps(Classifier):
    """Its two maps only, which every norm type takes."""

    names = Classifier.names[:2]


def latents(shape=(3, 4, 6, 8), seed=0):
    """A target and an estimate, with one loud pixel."""
    generator = torch.Generator().manual_seed(seed)
    z0, noise = torch.randn((2, *shape), generator=generator, dtype=DOUBLE)
    z0[:, :, 1, 1] *= 10
    return z0, z0 + 0.3 * noise


def by_plain_autograd(network, z0, estimate, norm_type, norm_gradient=None, space=(1, 0)):
    """(layers (L, B), per sample (B,), gradient) through the whole network at once; half-size maps are masked."""
    source = estimate.clone().requires_grad_()
    sides = []
    for x in (z0, source):
        x, features = x / space[0] + space[1], []
        for index in range(len(network)):
            x = network.run(index, x)
            features.append(x if x.ndim == 4 else x[:, :, None, None])
        sides.append(features)
    sides[0] = [x.detach() for x in sides[0]]
    masks = reference_masks(sides[0], network.upscaling * z0.shape[2], WIDE)
    layers = reference_layers(*sides, masks, norm_type, "mse", norm_gradient)
    total = reference_total(layers, sides[0])
    return layers.detach(), total.detach(), torch.autograd.grad(total.sum(), source)[0]


CASES = [(Maps, norm, gradient) for norm, gradient in NORMS if norm != "batch"]
CASES += [(Classifier, norm, "none") for norm in NORM_TYPES if norm not in OVER_POSITIONS]


@pytest.mark.parametrize(("kind", "norm_type", "norm_gradient"), CASES)
def test_a_network_of_ones_own_equals_plain_autograd(kind, norm_type, norm_gradient):
    """Values, gradients, chunks and recomputed stages; the second layer, smaller than the first, weighs 1 too."""
    network, (z0, estimate) = kind(), latents()
    layers, total, gradient = by_plain_autograd(network, z0, estimate, norm_type, norm_gradient)
    options = {"norm_type": norm_type, "norm_gradient": norm_gradient}
    for more in ({}, {"batch_size": 2, "checkpointing": "stage"}):
        loss = LatentPerceptualLoss(network, LPLConfig(**options, **more, outlier_quantile=WIDE))
        output, found = evaluate(loss, z0, estimate)
        assert_equal(output.per_layer, layers, 1e-10)
        assert_equal(output.per_sample, total, 1e-10)
        assert_equal(found, gradient, 1e-10)
        assert output.inlier_fraction[0] < 1 and (output.inlier_fraction[1:] == 1).all()
        assert loss.stages is network and loss.state_dict() == {} and list(loss.modules()) == [loss]
    assert all(parameter.grad is None and parameter.requires_grad for parameter in network.parameters())


def test_the_batch_norm_type_takes_a_network_of_ones_own():
    network, (z0, estimate) = Maps(), latents()
    layers, _, gradient = by_plain_autograd(network, z0, estimate, "batch")
    output, found = evaluate(lpl(network, norm_type="batch", outlier_quantile=WIDE, batch_size=1), z0, estimate)
    assert_equal(output.per_layer, layers, 1e-10)
    assert_equal(found, gradient, 1e-10)


def test_a_network_of_vae_space_gets_such_latents():
    space, (z0, estimate) = LatentSpace(0.25, 0.5), latents()
    layers, _, gradient = by_plain_autograd(Classifier(), z0, estimate, "shared", space=(0.25, 0.5))
    output, found = evaluate(lpl(Classifier(space), norm_type="shared", outlier_quantile=WIDE), z0, estimate)
    assert_equal(output.per_layer, layers, 1e-10)
    assert_equal(found, gradient, 1e-10)
    assert_equal(space.to_model(space.from_model(z0)), z0)
    assert_equal(space.from_model(space.to_model(z0)), z0)
    assert_equal(space.from_model(z0), 4 * z0 + 0.5)
    assert torch.equal(LatentSpace().from_model(z0), z0) and torch.equal(LatentSpace().to_model(z0), z0)
    assert LatentSpace.of(decoder("sd3")) == LatentSpace(1.5305, 0.0609)
    assert LatentSpace.of(decoder("sdxl")) == LatentSpace(0.13025, 0.0)


def test_a_half_precision_network_gives_float32_values():
    network, (z0, estimate) = Classifier().to(torch.bfloat16), latents()
    z0[:, :, 1, 1] /= 10
    network.dtype = torch.bfloat16
    expected, gradient = evaluate(lpl(Classifier(), norm_type="shared", remove_outliers=False), z0, estimate)
    with torch.autocast("cpu", torch.float16):
        output, found = evaluate(lpl(network, norm_type="shared", remove_outliers=False), z0.float(), estimate.float())
    assert output.per_sample.dtype == output.per_layer.dtype == found.dtype == torch.float32
    assert relative_error(output.per_sample.double(), expected.per_sample) < 0.05
    assert relative_error(found.double(), gradient) < 0.2
    empty = lpl(network, norm_type="shared")(z0[:0].float(), z0[:0].float())
    assert empty.per_layer.shape == (3, 0) and empty.inlier_fraction.shape == (3,)


@pytest.mark.parametrize("norm_type", OVER_POSITIONS)
def test_features_without_positions_are_refused_by_norm_types_that_need_them(norm_type):
    """A deviation over one value is 0: divided by it, a difference would count a million times."""
    z0, estimate = latents()
    advice = f"'whole'.*{norm_type!r}.*use 'shared', 'default' or 'none'"
    with pytest.raises(ValueError, match=advice):
        lpl(Classifier(), norm_type=norm_type)(estimate, z0)
    pooled = Classifier()
    pooled.parts[2] = torch.nn.AdaptiveAvgPool2d(1)  # (B, C, 1, 1)
    with pytest.raises(ValueError, match=advice):
        lpl(pooled, norm_type=norm_type)(estimate, z0)
    for allowed in sorted(set(NORM_TYPES) - set(OVER_POSITIONS)):
        assert lpl(pooled, norm_type=allowed)(estimate, z0).per_sample.max() < 100


def test_features_of_other_shapes_are_refused():
    z0, estimate = latents()
    tokens = Classifier()
    tokens.parts[2] = torch.nn.Flatten(2)
    with pytest.raises(ValueError, match=r"'whole' has features of shape \(3, 8, 12\).*\(B, C, H, W\) or \(B, C\)"):
        lpl(tokens, norm_type="none")(estimate, z0)


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_a_stage_that_cuts_the_gradient_is_named(checkpointing):
    """Frozen networks are often called under torch.no_grad: the estimate would get no gradient through them."""

    class Cut(Maps):
        def run(self, index, x):
            with torch.set_grad_enabled(torch.is_grad_enabled() and index == 0):
                return super().run(index, x)

    z0, estimate = latents()
    with torch.no_grad():
        lpl(Cut())(estimate, z0)
    with pytest.raises(ValueError, match=r"'parts' cuts the gradient.*torch.no_grad"):
        evaluate(lpl(Cut(), checkpointing=checkpointing), z0, estimate)


def test_stages_that_lack_something_are_refused_by_name():
    class Bare:
        dtype = DOUBLE

        def run(self, index, x):
            return x

    with pytest.raises(TypeError, match="Bare lacks __len__, names, upscaling, input_space"):
        LatentPerceptualLoss(Bare())
    unnamed = Classifier()
    unnamed.names = ("edges",)
    unnamed.__class__ = type("Unnamed", (Classifier,), {"__len__": lambda self: 3})
    with pytest.raises(ValueError, match="Unnamed has 3 stages and 1 names"):
        LatentPerceptualLoss(unnamed)
    unnamed.names = ()
    unnamed.__class__ = type("Empty", (Classifier,), {})
    with pytest.raises(ValueError, match="Empty has 0 stages"):
        LatentPerceptualLoss(unnamed)


def test_the_number_of_blocks_belongs_to_a_vae():
    """Beside stages it would be ignored."""
    for stages in (Classifier(), DecoderStages(decoder()), DecoderStages(decoder(), 2)):
        with pytest.raises(ValueError, match=r"num_blocks is 2.*DecoderStages"):
            lpl(stages, num_blocks=2)
    for wrong in (-1, 5):
        with pytest.raises(ValueError, match=f"num_blocks is {wrong}.*4 up blocks"):
            DecoderStages(decoder(), wrong)


def test_a_decoder_given_as_stages_is_the_one_given_as_a_vae():
    z0, estimate = pair(decoder())
    for num_blocks in (0, 3):
        expected, gradient = evaluate(lpl(num_blocks=num_blocks), z0, estimate)
        output, found = evaluate(lpl(DecoderStages(decoder(), num_blocks)), z0, estimate)
        assert torch.equal(output.per_sample, expected.per_sample) and torch.equal(found, gradient)
        assert output.per_layer.shape == (1 + num_blocks, 2)
    vae = fresh("sdxl", dtype=torch.float16)
    with pytest.raises(ValueError, match="force_upcast"):
        LatentPerceptualLoss(DecoderStages(vae))


@pytest.mark.parametrize("num_blocks", [4, 2])
def test_the_decoded_picture_as_the_last_stage(num_blocks):
    """Its layer is the reference's of the pictures, at full size; the layers before are those without it."""
    z0, estimate = pair(decoder())
    source = estimate.clone().requires_grad_()
    features, estimates = reference_features(decoder(), z0), reference_features(decoder(), source)
    for side in (features, estimates):
        side[num_blocks + 1 :] = [DecoderStages(decoder()).finish(side[-1])]
    features = [x.detach() for x in features]
    total, layers = reference_loss(features, estimates, reference_masks(features, 32, WIDE), "standard", "mse")
    loss = lpl(DecoderStages(decoder(), num_blocks, rgb=True), outlier_quantile=WIDE)
    output, gradient = evaluate(loss, z0, estimate)
    assert_equal(output.per_layer, layers.detach(), 1e-10)
    assert_equal(gradient, torch.autograd.grad(total.sum(), source)[0], 1e-8)
    without = lpl(num_blocks=num_blocks, outlier_quantile=WIDE)(estimate, z0).per_layer
    assert torch.equal(output.per_layer[:-1], without)
    assert loss.stages.names[-1] == "rgb"


def test_the_latents_themselves():
    """The control of an experiment: under "none" the mean squared error, in either space."""
    z0, estimate = latents()
    expected = (estimate - z0).square().mean(dim=(1, 2, 3))
    for scale in (1, 0.25):
        loss = lpl(IdentityStages(dtype=DOUBLE, input_space=LatentSpace(scale, 7)), norm_type="none")
        output, gradient = evaluate(loss, z0, estimate)
        assert_equal(output.per_sample, expected / scale**2)
        assert_equal(gradient, 2 * (estimate - z0) / z0[0].numel() / scale**2)
        assert output.per_layer.shape == (1, 3) and output.inlier_fraction.tolist() == [1]  # 1/8 of the image: no mask
        assert loss.stages.names == ("latent",) and len(loss.stages) == 1
    single = lpl(IdentityStages(), norm_type="none")(estimate.bfloat16(), z0.bfloat16())
    assert single.per_sample.dtype == torch.float32


@pytest.mark.parametrize("norm_type", NORM_TYPES)
def test_a_model_of_pixels(norm_type):
    """With an upscaling of 1 the latents are the picture: the mask and its kernels are those of the full size."""
    z0, estimate = latents((2, 3, 16, 12))
    z0[:, :, 5:9, 4:8] = 30  # a single pixel is not masked at full size
    mask = reference_mask(z0, (3, 5), WIDE)
    source = estimate.clone().requires_grad_()
    expected = reference_layer(z0, source, mask, norm_type, "mse")
    loss = lpl(IdentityStages(upscaling=1, dtype=DOUBLE), norm_type=norm_type, outlier_quantile=WIDE)
    output, gradient = evaluate(loss, z0, estimate)
    assert_equal(output.per_sample, expected.detach(), 1e-10)
    assert_equal(gradient, torch.autograd.grad(expected.sum(), source)[0], 1e-10)
    assert output.inlier_fraction.item() == pytest.approx(mask.mean()) and mask.mean() < 1


COMPUTED_WEIGHTS = {
    "conv2d": lambda x, w, b: F.conv2d(x, w * x.mean()),
    "conv2d's bias": lambda x, w, b: F.conv2d(x, w, b * x.mean()),
    "linear": lambda x, w, b: F.linear(x, x[0, 0, :4] * 2),
    "linear with itself": lambda x, w, b: F.linear(x[0, 0], x[1, 1]),
    "group norm": lambda x, w, b: F.silu(F.group_norm(x, 2, b * x.mean(), b)),
}


@pytest.mark.parametrize("name", COMPUTED_WEIGHTS)
def test_weights_that_are_computed_from_the_input_get_its_gradient(name):
    """As in a hypernetwork or a product of two maps: the gradient runs through the weights too."""
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(s, generator=generator, dtype=DOUBLE) for s in ((2, 8, 5, 6), (8, 8, 3, 3), (8,)))
    plain, light = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected = COMPUTED_WEIGHTS[name](plain, weight, bias)
    with InputGradientOnly():
        output = COMPUTED_WEIGHTS[name](light, weight, bias)
    gradient = torch.randn(expected.shape, generator=generator, dtype=DOUBLE)
    wanted = torch.autograd.grad(expected, plain, gradient)[0]
    assert_equal(torch.autograd.grad(output, light, gradient)[0], wanted, 1e-10)
    with InputGradientOnly():  # a leaf itself as the weight
        assert_equal(torch.autograd.grad(F.linear(light, light[0, 0]).sum(), light)[0],
                     torch.autograd.grad(F.linear(plain, plain[0, 0]).sum(), plain)[0])  # fmt: skip
        leaf = light.detach()[0, 0].requires_grad_()
        (found,) = torch.autograd.grad(F.linear(leaf, leaf).sum(), leaf)
    assert_equal(found, 2 * leaf.detach().sum(dim=0).expand_as(leaf))


# ---------------------------------------------------------------------------------------------------------------------
# Outlier masks
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantile", [0.02, 0.25])
def test_order_statistics_equal_sorting(quantile):
    generator = torch.Generator().manual_seed(0)
    share = Fraction(str(quantile))
    for n in range(1, 201):
        values = torch.randn((2, n), generator=generator, dtype=DOUBLE)
        if n % 3 == 0:
            values = values.round()  # ties
        low, high = order_statistics(values, quantile)
        assert low.tolist() == [kth_smallest(row, share) for row in values.tolist()]
        assert high.tolist() == [kth_smallest(row, 1 - share) for row in values.tolist()]


def test_order_statistics_of_the_two_percent_at_every_size_of_a_feature_map():
    """floor(q N) in floating point is one too small wherever q N is whole and rounded down; not at 2 %."""
    for side in range(1, 1025):
        n = side * side
        assert (int(0.02 * n), int((1 - 0.02) * n)) == (2 * n // 100, 98 * n // 100)


@pytest.mark.parametrize("kernels", [(1, 3), (3, 5), (1, 1), (3, 1), (5, 3)])
@pytest.mark.parametrize("size", [(16, 16), (9, 14), (2, 3)])
def test_masks_equal_naive_morphology(kernels, size):
    generator = torch.Generator().manual_seed(1)
    features = torch.randn((2, 3, *size), generator=generator, dtype=DOUBLE)
    features[:, 0] *= torch.where(torch.rand(size, generator=generator) < 0.05, 50.0, 1.0)
    for quantile in (0.02, WIDE, 0.45):
        mask = inlier_mask(features, kernels, quantile)
        assert mask.dtype == torch.bool
        assert np.array_equal(mask.numpy(), reference_mask(features, kernels, quantile))


def test_a_planted_outlier_is_masked_with_its_surroundings():
    """Half size: grown to 3 x 3. Full size: one pixel is closed again, a block of 3 x 3 grows to 5 x 5."""
    generator = torch.Generator().manual_seed(2)
    features = torch.rand((1, 2, 24, 24), generator=generator, dtype=DOUBLE)
    single = features.clone()
    single[0, 0, 5, 9] = 1e4
    mask = inlier_mask(single, (1, 3))
    assert not mask[0, 0, 4:7, 8:11].any() and mask.sum() == mask.numel() - 9
    assert inlier_mask(single, (3, 5)).all()
    block = features.clone()
    block[0, 1, 4:7, 8:11] = -1e4
    mask = inlier_mask(block, (3, 5))
    assert not mask[0, 1, 3:8, 7:12].any() and mask.sum() == mask.numel() - 25
    assert inlier_mask(features, (3, 5)).all()


def test_borders_count_as_outlier_for_the_dilation_and_as_inlier_for_the_erosion():
    features = torch.zeros(1, 1, 16, 16, dtype=DOUBLE)
    features.view(-1)[::2] = 1.0
    features[0, 0, :2, :2] = 1e3  # 2 x 2 in the corner: were the outside an inlier, the dilation would close it
    mask = inlier_mask(features, (3, 5))
    assert not mask[0, 0, :3, :3].any() and mask.sum() == 256 - 9


def test_kernels_by_relative_size_and_their_scaling():
    image = (1024, 1024)
    assert morphology_kernels(1.0, image) == (3, 5)
    assert morphology_kernels(0.5, image) == (1, 3)
    assert morphology_kernels(0.25, image) is None and morphology_kernels(0.125, image) is None
    assert morphology_kernels(0.499, image) is None and morphology_kernels(0.501, image) == (1, 3)
    assert morphology_kernels(0.999, image) == (1, 3) and morphology_kernels(2.0, image) == (3, 5)
    assert morphology_kernels(0.25, image, 256) is None
    for height, width, reference in itertools.product((256, 512, 768, 1024), (512, 896), (256, 512, 640, 1024)):
        scale = math.sqrt(height * width) / reference
        for ratio, kernels in {1.0: (3, 5), 0.5: (1, 3)}.items():
            expected = tuple(2 * math.floor((k - 1) / 2 * scale + 0.5) + 1 for k in kernels)
            assert morphology_kernels(ratio, (height, width), reference) == expected
    assert morphology_kernels(1.0, image, 512) == (5, 9) and morphology_kernels(0.5, image, 512) == (1, 5)
    assert morphology_kernels(1.0, image, 4096) == (1, 3) and morphology_kernels(0.5, image, 1024) == (1, 3)


def test_the_reference_resolution_reaches_the_loss():
    z0, estimate = pair(decoder())  # 32 px
    plain = lpl(outlier_quantile=WIDE)(estimate, z0)
    same = lpl(outlier_quantile=WIDE, outlier_reference_resolution=32)(estimate, z0)
    assert torch.equal(same.per_layer, plain.per_layer)
    scaled = lpl(outlier_quantile=WIDE, outlier_reference_resolution=16)(estimate, z0)
    features = reference_features(decoder(), z0)
    kernels = [None, None, (1, 5), (5, 9), (5, 9)]
    expected = [reference_mask(x, k, WIDE).mean() for x, k in zip(features, kernels, strict=True)]
    assert_equal(scaled.inlier_fraction, torch.tensor(expected, dtype=DOUBLE))
    assert (scaled.inlier_fraction[2] != plain.inlier_fraction[2]).all()


def test_outliers_of_the_target_do_not_count_on_either_side():
    """Whatever a masked activation is, in target or estimate, the loss does not see it and no gradient goes there."""
    generator = torch.Generator().manual_seed(4)
    x, xh = torch.randn((2, 2, 3, 6, 6), generator=generator, dtype=DOUBLE)
    mask = torch.rand((2, 3, 6, 6), generator=generator) < 0.7
    for norm_type, loss_type in OPTIONS:
        expected = layer_loss(x, xh, mask, norm_type, loss_type, "none")
        loud = [torch.where(mask, side, 1e3 * side) for side in (x, xh)]
        loud[1].requires_grad_()
        output = layer_loss(*loud, mask, norm_type, loss_type, "none")
        assert_equal(output, expected, 1e-9)
        (gradient,) = torch.autograd.grad(output.sum(), loud[1])
        assert (gradient[~mask] == 0).all()


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize(("norm_type", "norm_gradient"), NORMS)
def test_fully_masked_channels_and_positions_stay_finite(norm_type, norm_gradient, loss_type):
    generator = torch.Generator().manual_seed(5)
    x, xh = torch.randn((2, 2, 3, 4, 4), generator=generator, dtype=DOUBLE)
    masks = []
    for where in ((0, 1), (slice(None), 1), (0, slice(None), 2, 3), slice(None)):
        mask = torch.ones(x.shape, dtype=torch.bool)
        mask[where] = False
        masks.append(mask)
    for mask in masks:
        estimate = xh.clone().requires_grad_()
        output = layer_loss(x, estimate, mask, norm_type, loss_type, norm_gradient)
        (gradient,) = torch.autograd.grad(output.sum(), estimate)
        assert output.isfinite().all() and gradient.isfinite().all()
        assert_equal(output, reference_layer(x, xh, mask.numpy(), norm_type, loss_type), 1e-12)
    assert (output == 0).all() and (gradient == 0).all()  # the last one masks everything


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize(("norm_type", "norm_gradient"), NORMS)
def test_constant_and_zero_feature_maps_stay_finite(norm_type, norm_gradient, loss_type):
    for constant, mask in itertools.product((0.0, 3.0), (None, torch.ones(2, 3, 4, 4, dtype=torch.bool))):
        x = torch.full((2, 3, 4, 4), constant, dtype=DOUBLE)
        for estimate in (x.clone(), x + 0.1 * torch.arange(4.0), torch.zeros_like(x)):
            estimate = estimate.requires_grad_()
            output = layer_loss(x, estimate, mask, norm_type, loss_type, norm_gradient)
            (gradient,) = torch.autograd.grad(output.sum(), estimate)
            assert output.isfinite().all() and gradient.isfinite().all()


@pytest.mark.parametrize("norm_type", NORM_TYPES)
def test_a_decoder_with_constant_features_stays_finite(norm_type):
    vae = fresh("sdxl", dtype=DOUBLE)
    with torch.no_grad():
        for parameter in vae.decoder.parameters():
            parameter.zero_()
    output, gradient = evaluate(lpl(vae, norm_type=norm_type), *pair(vae))
    assert (output.per_sample == 0).all() and (gradient == 0).all()
    assert output.inlier_fraction[:2].tolist() == [1, 1] and (output.inlier_fraction[2:] == 0).all()


def test_the_channel_norm_has_no_gradient_at_zero():
    features = torch.zeros(1, 3, 2, 2, dtype=DOUBLE, requires_grad=True)
    norm = channel_norm(features, None)
    assert (norm == EPS).all() and norm.shape == (1, 1, 2, 2)
    assert (torch.autograd.grad(norm.sum(), features)[0] == 0).all()


# ---------------------------------------------------------------------------------------------------------------------
# The backward pass with respect to the input alone
# ---------------------------------------------------------------------------------------------------------------------


class TwiceUsed(torch.nn.Module):
    """A norm whose output goes through two activations, into another op, or both."""

    def __init__(self, combine):
        super().__init__()
        self.norm, self.combine = torch.nn.GroupNorm(2, 8), combine

    def forward(self, x):
        return self.combine(self.norm(x))


def block(*layers):
    torch.manual_seed(0)
    network = torch.nn.Sequential(*[layer() for layer in layers]).to(DOUBLE)
    for parameter in network.parameters():
        torch.nn.init.uniform_(parameter, -1, 1)
    return network


def norm():
    return torch.nn.GroupNorm(2, 8)


def conv(**options):
    return functools.partial(torch.nn.Conv2d, 8, 8, 3, **options)


NETWORKS = {
    "conv": [conv(padding=1)],
    "strided, grouped, dilated conv without bias": [conv(stride=2, padding=2, groups=2, dilation=2, bias=False)],
    "conv with named padding": [conv(padding="same")],
    "conv with reflection": [conv(padding=1, padding_mode="reflect")],
    "linear": [functools.partial(torch.nn.Linear, 6, 5)],
    "linear without bias": [functools.partial(torch.nn.Linear, 6, 5, bias=False)],
    "norm": [norm],
    "norm without parameters": [functools.partial(torch.nn.GroupNorm, 2, 8, affine=False), torch.nn.SiLU],
    "norm, conv": [norm, conv(padding=1)],
    "norm, silu": [norm, torch.nn.SiLU],
    "norm, silu in place": [norm, functools.partial(torch.nn.SiLU, inplace=True)],
    "norm, silu, conv": [norm, torch.nn.SiLU, conv(padding=1)],
    "norm, silu, dropout of nothing, conv": [norm, torch.nn.SiLU, functools.partial(torch.nn.Dropout, 0.0), conv()],
    "norm, gelu": [norm, torch.nn.GELU],
    "norm, silu and more": [lambda: TwiceUsed(lambda y: F.silu(y) + y * y.tanh())],
    "norm, silu twice": [lambda: TwiceUsed(lambda y: F.silu(y) * F.silu(y))],
    "norm, changed in place, silu": [lambda: TwiceUsed(lambda y: F.silu(y.mul_(2)))],
    "norm, scaled, silu": [lambda: TwiceUsed(lambda y: F.silu(y * 2 + 1))],
    "norm, transposed": [lambda: TwiceUsed(lambda y: y.transpose(1, 3)), functools.partial(torch.nn.Linear, 8, 3)],
    "silu alone": [torch.nn.SiLU],
    "conv, relu, conv": [conv(padding=1), torch.nn.ReLU, conv(padding=1)],
    "relu in place": [conv(padding=1), functools.partial(torch.nn.ReLU, inplace=True), conv(padding=1)],
}
LAYOUTS = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "turned": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "channels first of all": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
}


@pytest.mark.parametrize("norm_block", [lpl_utils.NORM_BLOCK, 60])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NETWORKS)
def test_input_gradients_equal_plain_autograds(name, layout, norm_block, monkeypatch):
    """Also where the gradient of a group norm is computed group by group."""
    monkeypatch.setattr(lpl_utils, "NORM_BLOCK", norm_block)
    network = block(*NETWORKS[name])
    x = LAYOUTS[layout](torch.randn((2, 8, 5, 6), generator=torch.Generator().manual_seed(1), dtype=DOUBLE))
    plain, light = (x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for _ in range(2))
    expected = network(plain * 1.5)
    with InputGradientOnly():
        output = network(light * 1.5)
    assert_equal(output, expected, 1e-12)
    outside = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2), dtype=DOUBLE)
    for gradient in (outside, LAYOUTS["channels last"](outside), torch.ones((), dtype=DOUBLE).expand_as(outside)):
        (wanted,) = torch.autograd.grad(expected, plain, gradient, retain_graph=True)
        (found,) = torch.autograd.grad(output, light, gradient, retain_graph=True)
        assert_equal(found, wanted, 1e-10)


CALLS = {
    "conv2d(x, w)": lambda x, w, b: F.conv2d(x, w),
    "conv2d(x, w, b)": lambda x, w, b: F.conv2d(x, w, b),
    "conv2d(x, w, b, 1, 1)": lambda x, w, b: F.conv2d(x, w, b, 1, 1),
    "conv2d with names": lambda x, w, b: F.conv2d(x, w, bias=b, padding=1),
    "conv2d without batch": lambda x, w, b: F.conv2d(x[0], w, b, 1, 1, 1, 1),
    "linear(x, w)": lambda x, w, b: F.linear(x, w[0, 0, :1, :1].expand(2, x.shape[-1])),
    "linear of a vector": lambda x, w, b: F.linear(x[0, 0, 0], w[0, 0, :1, :1].expand(2, x.shape[-1])),
    "group_norm(x, 2)": lambda x, w, b: F.silu(F.group_norm(x, 2)),
    "group_norm with names": lambda x, w, b: F.silu(F.group_norm(x, num_groups=2, weight=b, eps=1e-3)),
    "group_norm of three dimensions": lambda x, w, b: F.silu(F.group_norm(x.flatten(2), 2, b, b)),
    "group_norm of two dimensions": lambda x, w, b: F.silu(F.group_norm(x[:, :, 0, 0], 2, b, b)),
    "silu with names": lambda x, w, b: F.silu(input=F.group_norm(x, 2)),
    "division by 1": lambda x, w, b: x / 1.0 + torch.arange(6) / 1.0 / 4,
    "division by 2": lambda x, w, b: x / 2.0 + x.div(1.0, rounding_mode=None),
}


@pytest.mark.parametrize("name", CALLS)
def test_functions_called_in_other_ways(name):
    """The context is for any network: a call with fewer arguments, by name, or without a batch works as outside."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 8, 5, 6), (8, 8, 3, 3), (8,))
    x, weight, bias = (torch.randn(shape, generator=generator, dtype=DOUBLE) for shape in shapes)
    plain, light = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected = CALLS[name](plain, weight, bias)
    with InputGradientOnly():
        output = CALLS[name](light, weight, bias)
    assert_equal(output, expected)
    gradient = torch.randn(expected.shape, generator=generator, dtype=DOUBLE)
    assert_equal(
        torch.autograd.grad(output, light, gradient)[0], torch.autograd.grad(expected, plain, gradient)[0], 1e-10
    )


def saved_bytes(network, x, context):
    """Bytes of activations that autograd keeps for the backward pass; parameters and duplicates do not count."""
    kept = {}
    parameters = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # held: an address that is freed would be used again
        return tensor

    x = x.clone().requires_grad_()
    with context, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = network(x)
    assert output.requires_grad
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize(
    ("layers", "maps"),
    [
        ([conv(padding=1)], 0),
        ([functools.partial(torch.nn.Linear, 16, 16)], 0),
        ([norm], 1),
        ([norm, torch.nn.SiLU], 1),
        ([norm, torch.nn.SiLU, conv(padding=1)], 1),
        ([norm, torch.nn.SiLU, conv(padding=1), norm, torch.nn.SiLU, conv(padding=1)], 2),
    ],
)
def test_no_more_is_kept_than_the_input_gradient_needs(layers, maps):
    """Per residual block: the inputs of its two norms. Kept beside them: statistics, a few numbers per group."""
    network = block(*layers)
    x = torch.randn(1, 8, 16, 16, dtype=DOUBLE)
    size = x.numel() * x.element_size()
    found = saved_bytes(network, x, InputGradientOnly())
    assert maps * size <= found < maps * size + size // 8
    plain = saved_bytes(network, x, torch.enable_grad())
    assert found < plain or layers == [norm]


def test_a_relu_keeps_a_byte_per_element():
    x = torch.randn(1, 8, 16, 16, dtype=DOUBLE)
    network = block(conv(padding=1), torch.nn.ReLU, conv(padding=1))
    assert saved_bytes(network, x, InputGradientOnly()) == x.numel()


def test_a_stage_of_the_decoder_keeps_half_as_much_as_under_plain_autograd():
    vae = decoder()
    up_block = vae.decoder.up_blocks[1]
    x = torch.randn(1, up_block.resnets[0].in_channels, 8, 8, dtype=DOUBLE)
    assert saved_bytes(up_block, x, InputGradientOnly()) < 0.45 * saved_bytes(up_block, x, torch.enable_grad())


def test_a_division_by_1_makes_no_copy():
    x = torch.ones(3, requires_grad=True)
    with InputGradientOnly():
        assert x / 1.0 is x and x.detach() / 1.0 is not x


def test_a_large_norm_writes_its_gradient_over_the_one_that_it_gets(monkeypatch):
    """That of a frozen convolution, which nothing else holds: 3 maps at the peak of the backward pass, not 4."""
    monkeypatch.setattr(lpl_utils, "NORM_BLOCK", 1024)
    x = torch.randn(1, 8, 64, 64).requires_grad_()
    with InputGradientOnly():
        output = block(norm, torch.nn.SiLU, conv(padding=1)).float()(x)
    gradient = torch.ones_like(output)
    with LiveBytes("cpu") as counter:
        torch.autograd.grad(output, x, gradient)
    peak = max(peak.size for peak in counter.peaks.values())
    assert peak / x.nbytes == pytest.approx(3, abs=0.1)


def frozen_resnet(channels, dtype=DOUBLE, **options):
    """A ResnetBlock2D of diffusers from 8 channels, as decoders have it."""
    torch.manual_seed(4)
    options = dict(temb_channels=None, groups=4, eps=1e-6) | options
    return ResnetBlock2D(in_channels=8, out_channels=channels, **options).to(dtype).eval().requires_grad_(False)


@pytest.mark.parametrize("channels", [8, 12])
@pytest.mark.parametrize("norm_block", [lpl_utils.NORM_BLOCK, 100])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_residual_block_as_a_piece_is_the_same_block(layout, norm_block, channels, monkeypatch):
    """With a convolution as its shortcut (12 channels) and without; also where norms go block by block."""
    monkeypatch.setattr(lpl_utils, "NORM_BLOCK", norm_block)
    resnet = frozen_resnet(channels)
    assert ResnetPiece.suits(resnet)
    x = LAYOUTS[layout](torch.randn((2, 8, 5, 6), generator=torch.Generator().manual_seed(1), dtype=DOUBLE))
    kept, plain = x.clone(), x.clone(memory_format=torch.preserve_format).requires_grad_()
    expected, gradient = resnet(plain, temb=None), torch.randn(2, channels, 5, 6, dtype=DOUBLE)
    (wanted,) = torch.autograd.grad(expected, plain, gradient)
    with torch.no_grad():
        assert_equal(ResnetPiece(resnet)(x), expected.detach(), 1e-12)
    assert torch.equal(x, kept), "the input is not written over"
    given = [gradient.clone()]
    assert_equal(ResnetPiece(resnet).input_gradient(x, given), wanted, 1e-10)
    assert not given, "the gradient is taken out, so that it can be freed"


@pytest.mark.parametrize(
    "options",
    [
        {"output_scale_factor": 2.0},
        {"up": True},
        {"down": True},
        {"non_linearity": "gelu"},
        {"temb_channels": 16},
        {"time_embedding_norm": "scale_shift"},
    ],
)
def test_other_residual_blocks_are_no_pieces(options):
    assert not ResnetPiece.suits(frozen_resnet(8, **options))


def test_dropout_reflection_and_strides_are_no_pieces():
    changed = [frozen_resnet(8) for _ in range(5)]
    assert all(ResnetPiece.suits(resnet) for resnet in changed)
    changed[0].conv2.padding_mode, changed[1].conv1.padding, changed[2].conv2.stride = "reflect", "same", (2, 2)
    changed[3].dropout.p = 0.1
    changed[3].train()
    changed[4].norm2 = torch.nn.BatchNorm2d(8)
    assert not any(ResnetPiece.suits(resnet) for resnet in changed)


def test_the_decoders_residual_blocks_are_pieces():
    """In the last stage under checkpointing; that of every autoencoder here is built of them."""
    for vae in (decoder(), fresh("sd3")):
        stages = DecoderStages(vae)
        assert [type(piece) for piece in stages.pieces(4)[:2]] == [ResnetPiece] * 2


def test_a_piece_computes_no_values_of_its_last_convolution_and_keeps_three_maps(monkeypatch):
    """At the peak: the gradient of the output, the input of the second norm, that norm's; and two parts of a map.

    Not counted: the input. A part is a quarter, since the norms have four groups.
    """
    monkeypatch.setattr(lpl_utils, "NORM_BLOCK", 512)
    resnet, x = frozen_resnet(8, torch.float32), torch.randn(1, 8, 64, 64)
    calls = []
    monkeypatch.setattr(resnet.conv2, "forward", lambda x: calls.append(x))
    with LiveBytes("cpu") as counter:
        given = [torch.ones(1, 8, 64, 64)]
        ResnetPiece(resnet).input_gradient(x, given)
    assert not calls
    assert max(peak.size for peak in counter.peaks.values()) / x.nbytes == pytest.approx(3.5, abs=0.1)


def test_a_large_channels_last_norm_is_not_copied(monkeypatch):
    """On a GPU, whose rules the meta device has: the input, one map for norm and SiLU, and two quarters."""
    monkeypatch.setattr(lpl_utils, "NORM_BLOCK", 512)
    x = torch.empty(1, 8, 64, 64, device="meta").to(memory_format=torch.channels_last)
    normalize = torch.nn.GroupNorm(4, 8, device="meta").requires_grad_(False)
    with LiveBytes() as counter:
        counter.hold("input", [x])
        result = lpl_utils.norm_silu(normalize, x)
    assert result.is_contiguous(memory_format=torch.channels_last), "nor does the convolution behind it copy"
    assert max(peak.size for peak in counter.peaks.values()) / x.nbytes == pytest.approx(2.5, abs=0.1)


def test_without_gradients_the_context_does_nothing():
    network = block(norm, torch.nn.SiLU, conv(padding=1))
    x = torch.randn(2, 8, 4, 4, dtype=DOUBLE)
    with torch.no_grad(), InputGradientOnly():
        output = network(x)
    assert not output.requires_grad and torch.equal(output, network(x))


def snapshot(vae):
    """Everything about the modules that a careless way to tap them would change."""
    modules = {}
    for name, module in vae.named_modules():
        own = vars(module)
        hooks = [len(value) for key, value in sorted(own.items()) if key.endswith("hooks")]
        modules[name] = (type(module), type(module).forward, "forward" in own, module.training, sorted(own), hooks)
    parameters = {name: (id(p), p.requires_grad, p.data_ptr()) for name, p in vae.named_parameters()}
    return modules, parameters, {name: value.clone() for name, value in vae.state_dict().items()}


def test_the_autoencoder_is_left_as_it_was():
    vae = fresh("sdxl", dtype=DOUBLE)
    modules, parameters, state = snapshot(vae)
    loss = lpl(vae)
    for mode in CHECKPOINTING:
        evaluate(lpl(vae, checkpointing=mode), *pair(vae))
    loss(*pair(vae))
    after = snapshot(vae)
    assert after[:2] == (modules, parameters)
    assert after[2].keys() == state.keys() and all(torch.equal(after[2][name], state[name]) for name in state)


def test_it_is_left_as_it_was_after_an_error_too():
    vae = fresh("sdxl", dtype=DOUBLE)
    before = snapshot(vae)[:2]
    z0, estimate = pair(vae)
    with pytest.raises(RuntimeError):
        evaluate(lpl(vae), z0[:, :3], estimate[:, :3])
    assert snapshot(vae)[:2] == before
    assert evaluate(lpl(vae), z0, estimate)[0].per_sample.isfinite().all()


def test_two_losses_on_one_autoencoder_do_not_disturb_each_other():
    vae = decoder()
    z0, estimate = pair(vae)
    first, second = lpl(num_blocks=2), lpl(norm_type="shared", loss_type="l1", checkpointing="stage")
    expected = [evaluate(loss, z0, estimate) for loss in (first, second)]
    leaves = [estimate.clone().requires_grad_() for _ in range(2)]
    outputs = [loss(leaf, z0) for loss, leaf in zip((first, second), leaves, strict=True)]
    for output, leaf, (alone, gradient) in reversed(list(zip(outputs, leaves, expected, strict=True))):
        output.per_sample.sum().backward()
        assert torch.equal(output.per_sample, alone.per_sample) and torch.equal(leaf.grad, gradient)
    both = estimate.clone().requires_grad_()
    (first(both, z0).per_sample.sum() + second(both, z0).per_sample.sum()).backward()
    assert_equal(both.grad, leaves[0].grad + leaves[1].grad)


def test_the_loss_owns_nothing():
    loss = lpl()
    assert loss.state_dict() == {} and not list(loss.parameters()) and not list(loss.buffers())
    assert list(loss.modules()) == [loss]
    before = dict(vars(loss))
    evaluate(loss, *pair(decoder()))
    assert vars(loss) == before  # nothing is kept on it either
    loss.to(torch.float16).requires_grad_(True)
    assert decoder().dtype == DOUBLE
    assert loss.stages.vae is decoder()


# ---------------------------------------------------------------------------------------------------------------------
# The gate
# ---------------------------------------------------------------------------------------------------------------------


def test_exactly_one_threshold_is_given():
    for thresholds in ({}, {"t_threshold": 200, "sigma_threshold": 3.0}):
        with pytest.raises(ValueError, match=r"t_threshold.*sigma_threshold"):
            LPLGate(**thresholds)
    for incomplete in ({"t_threshold": 200, "resolution": 512}, {"sigma_threshold": 3.0}):
        with pytest.raises(ValueError, match="threshold_resolution"):
            LPLGate(threshold_resolution=512, **incomplete)


def test_timesteps_below_the_threshold_strictly():
    timesteps = torch.tensor([0, 199, 200, 201, 999])
    ratios = torch.full((5,), 1e9)
    assert LPLGate(t_threshold=200)(timesteps, ratios).tolist() == [True, True, False, False, False]
    assert not LPLGate(t_threshold=0)(timesteps, ratios).any()  # a threshold of 0 is one


def test_noise_levels_up_to_the_threshold():
    ratios = torch.tensor([0.0, 2.99, 3.0, 3.01, math.inf])
    timesteps = torch.full((5,), 999)
    assert LPLGate(sigma_threshold=3.0)(timesteps, ratios).tolist() == [True, True, True, False, False]
    assert LPLGate(sigma_threshold=3.0, resolution=1024).limit == 3.0
    for resolution, limit in {1024: 6.0, 512: 3.0, 256: 1.5}.items():
        gate = LPLGate(sigma_threshold=3.0, threshold_resolution=512, resolution=resolution)
        assert gate.limit == limit
        assert gate(timesteps, torch.tensor([limit, limit * 1.001])[:2]).tolist() == [True, False]


def test_facts_about_sdxls_schedule():
    """t < 200 is a ratio of sigma to alpha below 0.57; 3 to 6, the paper's best range, are t < 674 to t < 835."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=DOUBLE) ** 2
    abar = (1 - betas).cumprod(0)
    ratios = noise_to_signal(abar.sqrt(), (1 - abar).sqrt())
    timesteps = torch.arange(1000)
    assert ratios[199] < 0.57 < ratios[200] + 0.01 and (ratios[199] + ratios[200]) / 2 == pytest.approx(0.57, abs=0.01)
    limit = float(ratios[199])
    by_time, by_noise = LPLGate(t_threshold=200), LPLGate(sigma_threshold=limit)
    assert torch.equal(by_time(timesteps, ratios), by_noise(timesteps, ratios))
    for sigma, t in {3.0: 674, 6.0: 835}.items():
        gated = LPLGate(sigma_threshold=sigma)(timesteps, ratios)
        assert torch.equal(gated, timesteps < t)


# ---------------------------------------------------------------------------------------------------------------------
# The automatic weight
# ---------------------------------------------------------------------------------------------------------------------


def take(auto, *values):
    """Give the automatic weight one optimizer step."""
    auto.update(*(torch.as_tensor(value) for value in values[:2]), values[2])


def test_the_automatic_weight_equals_a_plain_formula():
    rng = np.random.default_rng(0)
    auto, share = AutoWeight(share=0.3, window=7, ramp=20), 0.3
    gated = rng.integers(0, 3, 40) * (rng.random(40) < 0.6)
    diffusion, terms = rng.uniform(0.5, 1.5, 40), rng.uniform(0, 0.01, 40) * (gated > 0)
    assert 10 < (terms == 0).sum() < 40 and gated[:10].sum() < 20 < gated.sum()
    for n in range(1, 41):
        take(auto, diffusion[n - 1], terms[n - 1], gated[n - 1])
        later = np.array([gated[i + 1 : n].sum() for i in range(n)])  # gated samples since the step
        means = [float(np.exp(-later / 7) @ values[:n]) / np.exp(-later / 7).sum() for values in (diffusion, terms)]
        assert auto.means.tolist() == pytest.approx(means, rel=1e-12)
        expected = share / (1 - share) * means[0] / means[1] if means[1] > 0 else 0
        assert float(auto()) == pytest.approx(min(1, gated[:n].sum() / 20) * expected, rel=1e-6)
    assert auto().dtype == torch.float32 and auto().shape == ()


def test_the_means_are_those_of_the_first_steps_from_the_start():
    auto = AutoWeight()
    assert auto.means.tolist() == [0, 0]
    for _ in range(2):
        take(auto, 0.5, 0.25, 1)
        assert auto.means.tolist() == pytest.approx([0.5, 0.25], rel=1e-12)


def test_the_automatic_weight_is_zero_until_something_was_gated():
    auto = AutoWeight()
    assert auto() == 0
    for _ in range(3):
        take(auto, 1.0, 0.0, 0)
        assert auto() == 0
    take(auto, 1.0, 0.5, 1)
    assert auto() > 0


def test_the_share_is_reached():
    for share in (0.05, 0.2, 0.5, 0.9):
        auto = AutoWeight(share=share)
        for _ in range(5):
            take(auto, 1.3, 0.004, 8)
        part = float(auto()) * 0.004
        assert part / (1.3 + part) == pytest.approx(share, rel=1e-5)
    for share in (0, 1, -0.1, 2):
        with pytest.raises(ValueError, match="share"):
            AutoWeight(share=share)
    for options in ({"window": 0}, {"ramp": -1}):
        with pytest.raises(ValueError, match=r"window is .* and ramp is"):
            AutoWeight(**options)


def first_weights(batch_size, runs, steps, seed=0):
    """(runs, steps) automatic weights relative to the right weight, with losses that depend on the timestep.

    Timesteps below 200 of 1,000 are gated. There LPL is (t + 0.5)^0.8 and the diffusion loss is (t + 10)^-0.4, each
    times log-normal noise of 0.4.
    """
    rng = np.random.default_rng(seed)
    shape = runs, steps, batch_size
    timesteps, noise = rng.integers(0, 1000, shape), np.exp(0.4 * rng.standard_normal((2, *shape)))
    gated = timesteps < 200
    lpl, diffusion = gated * (timesteps + 0.5) ** 0.8 * noise[0], (timesteps + 10.0) ** -0.4 * noise[1]
    right = 0.25 * diffusion.mean() / lpl.mean()
    values = torch.from_numpy(np.stack([diffusion.mean(-1), lpl.mean(-1), gated.sum(-1)], axis=-1))
    weights = np.empty(shape[:2])
    for run, steps in enumerate(values):
        auto = AutoWeight()
        for step, each in enumerate(steps):
            auto.update(*each)
            weights[run, step] = auto()
    return weights / right


@pytest.mark.parametrize(("batch_size", "runs", "steps"), [(1, 20, 300), (16, 80, 63)])
def test_the_automatic_weight_is_calm_in_its_first_steps(batch_size, runs, steps):
    """It divides by the mean of few samples. Without the ramp a tenth of the runs exceeds the right weight 4-fold."""
    weights = first_weights(batch_size, runs, steps)
    assert np.quantile(weights.max(axis=1), 0.9) < 1.5
    if batch_size > 1:  # the last step has seen 200 gated samples
        assert abs(weights[:, -1].mean() - 1) < 0.05 and np.quantile(abs(weights[:, -1] - 1), 0.9) < 0.15


def test_the_automatic_weight_continues_from_its_state():
    auto, values = AutoWeight(), torch.rand((10, 3), generator=torch.Generator().manual_seed(0))
    for each in values[:5]:
        take(auto, *each)
    other = AutoWeight()
    other.load_state_dict({name: value.clone() for name, value in auto.state_dict().items()})
    for each in values[5:]:
        assert other() == auto()
        take(auto, *each)
        take(other, *each)
    assert other() == auto() and torch.equal(other.means, auto.means)
    assert not list(auto.parameters())
    attached = torch.tensor(1.0, requires_grad=True)
    take(auto, attached * 2, attached, attached)
    assert not auto().requires_grad


# ---------------------------------------------------------------------------------------------------------------------
# Options and decoders that are refused
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_blocks", -1),
        ("num_blocks", 2.0),
        ("num_blocks", "4"),
        ("num_blocks", None),
        ("norm_type", "l2"),
        ("norm_type", None),
        ("norm_gradient", "both"),
        ("norm_gradient", True),
        ("loss_type", "huber"),
        ("outlier_quantile", 0.0),
        ("outlier_quantile", 0.5),
        ("outlier_quantile", -0.02),
        ("outlier_quantile", math.nan),
        ("outlier_reference_resolution", 0),
        ("outlier_reference_resolution", -512),
        ("outlier_reference_resolution", math.nan),
        ("checkpointing", "block"),
        ("checkpointing", True),
        ("batch_size", 0),
        ("batch_size", -1),
        ("batch_size", 1.5),
    ],
)
def test_bad_options_name_their_field(field, value):
    with pytest.raises(ValueError, match=f"^{field} is {value!r}"):
        LPLConfig(**{field: value})


def test_the_config_is_frozen_and_has_the_documented_defaults():
    config = LPLConfig()
    with pytest.raises(AttributeError):
        config.num_blocks = 2
    assert (config.num_blocks, config.norm_type, config.loss_type, config.pow_law) == (4, "standard", "mse", True)
    assert (config.remove_outliers, config.outlier_quantile) == (True, 0.02)
    found = {name: LPLConfig(norm_type=name).deviation_gradient for name in NORM_TYPES}
    assert found == {name: "full" if name == "standard" else "none" for name in NORM_TYPES}
    assert [LPLConfig(norm_gradient=name).deviation_gradient for name in NORM_GRADIENTS] == [*NORM_GRADIENTS]
    assert config.outlier_reference_resolution is None and config.checkpointing == "none"
    assert LatentPerceptualLoss(decoder()).config == config


def test_more_blocks_than_the_decoder_has():
    with pytest.raises(ValueError, match=r"num_blocks is 5.*4 up blocks"):
        lpl(num_blocks=5)


def other_decoder(name):
    tiny = {"AutoencoderTiny": (AutoencoderTiny, {}), "VQModel": (VQModel, {"block_out_channels": (32,)})}
    with torch.device("meta"):
        kind, options = tiny.get(name) or (getattr(diffusers, name), {})
        return kind(**options)


@pytest.mark.parametrize(
    "name",
    ["AutoencoderTiny", "VQModel", "AutoencoderKLTemporalDecoder", "AutoencoderKLMagvit", "AutoencoderKLAllegro"],
)
def test_other_kinds_of_decoders_are_refused_by_name(name):
    """The last two are for video: the same names of parts, but three-dimensional convolutions inside."""
    with pytest.raises(TypeError, match=name):
        LatentPerceptualLoss(other_decoder(name), LPLConfig(num_blocks=1))


def test_something_that_is_no_autoencoder_is_refused_by_name():
    with pytest.raises(TypeError, match="Linear"):
        LatentPerceptualLoss(torch.nn.Linear(2, 2))


def test_a_float16_decoder_that_overflows_is_refused():
    for kind, hint in {"sdxl": True, "sd3": False}.items():
        vae = fresh(kind, dtype=torch.float16)
        assert vae.config.force_upcast
        with pytest.raises(ValueError, match="force_upcast") as error:
            LatentPerceptualLoss(vae)
        assert ("sdxl-vae-fp16-fix" in str(error.value)) == hint
        vae.register_to_config(force_upcast=False)
        assert LatentPerceptualLoss(vae).stages.dtype == torch.float16
    for dtype in (torch.bfloat16, torch.float32):
        LatentPerceptualLoss(decoder(dtype=dtype))


# ---------------------------------------------------------------------------------------------------------------------
# Faults of the diffusers research example
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_fault_1_post_quant_conv():
    """Skipping `post_quant_conv`, which SDXL's autoencoder has, computes every feature from a wrong input."""
    vae = decoder()
    z0, estimate = pair(vae)
    faulty = reference_features(vae, z0, skip_post_quant_conv=True)
    found = stage_features(DecoderStages(vae), z0)
    for x, right, wrong in zip(found, reference_features(vae, z0), faulty, strict=True):
        assert_equal(x, right)
        assert relative_error(wrong, right) > 0.3
    wrong, _ = reference_loss(
        faulty,
        reference_features(vae, estimate, skip_post_quant_conv=True),
        reference_masks(faulty, 32, 0.02),
        "standard",
        "mse",
    )
    assert relative_error(wrong, lpl()(estimate, z0).per_sample) > 0.05


def test_fault_2_batch_normalization_that_does_nothing():
    """`norm_type=batch` left the features as they were: their scale would then change the loss."""
    generator = torch.Generator().manual_seed(0)
    x, xh = torch.randn((2, 3, 4, 5, 5), generator=generator, dtype=DOUBLE)
    scale = torch.tensor([1.0, 10.0, 100.0, 1000.0], dtype=DOUBLE).reshape(1, 4, 1, 1)

    def faulty(target, estimate):
        return (target - estimate).square().mean(dim=(1, 2, 3))

    assert relative_error(faulty(scale * x, scale * xh), faulty(x, xh)) > 1e3
    assert_equal(
        layer_loss(scale * x, scale * xh, None, "batch", "mse", "none"),
        layer_loss(x, xh, None, "batch", "mse", "none"),
        1e-5,
    )


def test_fault_2_outliers_zeroed_on_one_side_only():
    """`default` divided each side by a norm of its own, one with and one without outliers: loss(z, z) > 0."""
    x = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    mask = torch.ones(x.shape, dtype=torch.bool)
    mask[:, 1, 2:5, 2:5] = False
    faulty = mask * (x / channel_norm(x, mask) - x / channel_norm(x, None)).square()
    assert faulty.sum() > 0.1
    for norm_type, loss_type in OPTIONS:
        assert layer_loss(x, x.clone(), mask, norm_type, loss_type, "none") == 0


def test_fault_3_the_noise_scale_needs_no_snr_gamma():
    """`lpl_scale` did nothing without `snr_gamma`, and mixed full-batch with subset indices when it did something."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=DOUBLE) ** 2
    abar = (1 - betas).cumprod(0)[torch.tensor([900, 10, 500, 100])]
    alpha, sigma = abar.sqrt(), (1 - abar).sqrt()
    scale, faulty = lpl_noise_scale(alpha, sigma), torch.ones(4, dtype=DOUBLE)
    assert_equal(scale, abar)
    assert (scale < 0.995 * faulty).all()
    snr = noise_to_signal(alpha, sigma) ** -2
    assert_equal(scale, snr / (snr + 1), 1e-10)
    gated = torch.tensor([1, 3])
    assert torch.equal(lpl_noise_scale(alpha[gated], sigma[gated]), scale[gated])


def test_fault_5_a_samples_weight_does_not_depend_on_how_many_others_are_gated():
    """A mean over the gated samples makes the objective depend on batch size and accumulation; a sum / B does not."""
    z0, estimate = pair(decoder(), batch=4)
    gated = torch.tensor([True, True, False, True])
    loss = lpl()

    def term(samples, mean):
        chosen = [i for i in samples if gated[i]]
        leaf = estimate.clone().requires_grad_()
        per_sample = loss(leaf[chosen], z0[chosen]).per_sample
        value = per_sample.mean() if mean else per_sample.sum() / len(samples)
        return value.detach(), torch.autograd.grad(value, leaf)[0]

    for mean in (True, False):
        whole, gradient = term(range(4), mean)
        halves = [term(half, mean) for half in ((0, 1), (2, 3))]
        value, other = (sum(parts) / 2 for parts in zip(*halves, strict=True))
        same = relative_error(value, whole) < 1e-12 and relative_error(other, gradient) < 1e-10
        assert same != mean


def test_fault_6_the_prediction_is_not_changed_before_the_estimate():
    """For prediction type `sample` the noise was subtracted from the output before the estimate was taken from it."""
    z0, noisy_latents, output, alpha, sigma = forward_process("sample")
    before = output.clone()
    assert torch.equal(estimate_z0(output, noisy_latents, alpha, sigma, "sample"), z0)
    assert torch.equal(output, before)
    noise = (noisy_latents - alpha.reshape(-1, 1, 1, 1) * z0) / sigma.reshape(-1, 1, 1, 1)
    assert relative_error(estimate_z0(output - noise, noisy_latents, alpha, sigma, "sample"), z0) > 0.5


def test_fault_7_a_float32_decoder_is_not_run_under_half_precision_autocast():
    """The autoencoder was kept in float32 "to avoid NaN" and then run under autocast, which undoes it."""
    vae = decoder(dtype=torch.float32)
    z0, estimate = pair(vae, dtype=torch.float32)
    expected = lpl(vae)(estimate, z0).per_sample
    seen = []
    handle = vae.decoder.conv_in.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    try:
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            assert reference_features(vae, z0)[0].dtype == torch.bfloat16  # the faulty way
            assert seen.pop() == torch.bfloat16
            assert torch.equal(lpl(vae)(estimate, z0).per_sample, expected)
        assert seen == [torch.float32] * 2
    finally:
        handle.remove()


def test_fault_8_small_feature_maps():
    """`kthvalue(0)` raises on maps under 50 pixels."""
    values = torch.randn((1, 49), generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    with pytest.raises((RuntimeError, IndexError)):
        values.kthvalue(int(0.02 * 49))
    low, high = order_statistics(values, 0.02)
    assert low == values.min() and high == values.sort().values[0, 47]
    z0, estimate = pair(decoder(), height=2, width=2)
    output, gradient = evaluate(lpl(), z0, estimate)
    assert output.per_sample.isfinite().all() and gradient.isfinite().all()
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4).to(DOUBLE)
    for size in (2, 5, 7):  # one block: the decoder enlarges nothing and every layer has a mask
        output, gradient = evaluate(lpl(vae, num_blocks=1), *pair(vae, height=size, width=size))
        assert output.per_sample.isfinite().all() and gradient.isfinite().all()


def test_fault_8_a_fully_masked_channel():
    """Dividing by the number of inliers of a channel that has none gives NaN."""
    x, xh = torch.randn((2, 1, 2, 4, 4), generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    mask = torch.ones(x.shape, dtype=torch.bool)
    mask[:, 1] = False
    faulty = (mask * (x - xh).square()).sum(dim=(2, 3)) / mask.sum(dim=(2, 3))
    assert faulty.isnan().any()
    for norm_type, loss_type in OPTIONS:
        output = layer_loss(x, xh, mask, norm_type, loss_type, "none")
        assert output.isfinite().all() and output > 0


@pytest.mark.parametrize("n", [64, 256, 1024, 4096])
@pytest.mark.parametrize("ties", [False, True])
def test_the_short_way_to_an_order_statistic_is_exact(n, ties):
    """Selecting among the segments with the smallest minima gives what sorting gives, ties, spikes, infinities too."""
    generator = torch.Generator().manual_seed(n)
    rows = torch.randn(6, 5, n, dtype=torch.float64, generator=generator)
    rows = (rows * 2).round() if ties else rows
    rows[0, 0] = 1.0
    rows[1, :, ::8] -= 100  # all small values in a few segments
    rows[2, :, : n // 8] -= 100
    rows[3, 0, 3] = -torch.inf
    ordered = rows.sort(dim=-1).values
    for k in {1, 2, max(1, int(0.02 * n)), n // 16, n // 2, n}:
        assert torch.equal(lpl_utils.kth_extreme(rows, k, largest=False), ordered[..., k - 1])
        assert torch.equal(lpl_utils.kth_extreme(rows, k, largest=True), ordered[..., n - k])


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes of a caller


def test_two_shapes_are_refused():
    """A batch reduced on one side only would broadcast, and give a loss of something else."""
    loss = LatentPerceptualLoss(autoencoder())
    for estimate, target in ((torch.zeros(1, 4, 4, 4), torch.zeros(2, 4, 4, 4)), (torch.zeros(2, 4, 4, 4),) * 2):
        estimate = estimate.requires_grad_()
        if estimate.shape == target.shape:
            assert loss(estimate, target).per_sample.shape == (2,)
            continue
        with pytest.raises(ValueError, match=r"z0_pred is \(1, 4, 4, 4\) and z0 \(2, 4, 4, 4\)"):
            loss(estimate, target)


def test_a_second_derivative_is_refused():
    """The gradient is computed in the call: its own derivative is not there, and must not be taken for zero."""
    loss = LatentPerceptualLoss(autoencoder())
    estimate, target = torch.randn(2, 1, 4, 4, 4).unbind()
    estimate = estimate.expand(1, 4, 4, 4).clone().requires_grad_()
    value = loss(estimate, target.expand(1, 4, 4, 4)).per_sample.square().sum()
    (gradient,) = torch.autograd.grad(value, estimate, create_graph=True)
    with pytest.raises(RuntimeError):
        gradient.sum().backward()


def test_the_decoder_alone_is_refused_with_a_hint():
    with pytest.raises(TypeError, match="pass the autoencoder, not its decoder"):
        LatentPerceptualLoss(autoencoder().decoder)
