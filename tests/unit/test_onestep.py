"""The one-step test: its noise levels, its numbers against plain formulas, and the training scripts' own estimate."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import DDPMScheduler

import train_sd3_lpl_flow
import train_sdxl_lpl
from lpl_finetuning.data import scan
from lpl_finetuning.data.samples import collate
from lpl_finetuning.evaluation.models import find_source, load_pipeline
from lpl_finetuning.evaluation.onestep import (
    LEVELS,
    NoiseLevels,
    OneStepMeter,
    OneStepSettings,
    PipelineEstimate,
    discrete_levels,
    flow_levels,
    held_out_of,
    levels_of,
    levels_of_schedule,
    noisy,
    one_step,
    one_step_of,
)
from lpl_finetuning.flags import data_source
from lpl_utils import DecoderStages, LatentPerceptualLoss, LatentSpace, LPLConfig, estimate_z0, stage_features
from tests.runs import objective_of
from tests.tiny_models import autoencoder, sd3_pipeline, sdxl_pipeline

SDXL = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


class Network:
    """A feature network of two stages: the picture itself, and its means over squares of 8 px."""

    name = "means"

    def stages(self, images):
        assert images.dtype == torch.uint8 and images.shape[-1] == 3
        x = images.permute(0, 3, 1, 2).float() + 1
        return [x, torch.nn.functional.avg_pool2d(x, 8)]


# ---------------------------------------------------------------------------------------------------------------------
# Noise levels


def log_snr(levels):
    return 2 * (levels.alphas.double() / levels.sigmas.double()).log()


def test_flow_levels_are_exact():
    levels = flow_levels()
    torch.testing.assert_close(log_snr(levels), torch.tensor(LEVELS, dtype=torch.float64), rtol=0, atol=1e-5)
    torch.testing.assert_close(levels.timesteps, 1000 * levels.sigmas)
    torch.testing.assert_close(levels.alphas, 1 - levels.sigmas)


@pytest.mark.parametrize("zero_snr", [False, True])
def test_discrete_levels_are_the_nearest(zero_snr):
    scheduler = DDPMScheduler.from_config(SDXL.config, rescale_betas_zero_snr=zero_snr)
    abar = scheduler.alphas_cumprod.double()
    levels = discrete_levels(abar.sqrt(), (1 - abar).sqrt())
    wanted, missed = torch.tensor(LEVELS, dtype=torch.float64), (log_snr(levels) - torch.tensor(LEVELS)).abs()
    for shift in (-1, 1):
        other = abar[levels.timesteps + shift]
        assert (missed <= ((other / (1 - other)).log() - wanted).abs() + 1e-6).all()
    torch.testing.assert_close(levels.alphas.double() ** 2, abar[levels.timesteps], rtol=0, atol=1e-6)
    assert missed[0] < 0.035 and missed[1:].max() < 0.01, "the docstring says so"


def test_levels_of_pipelines():
    sdxl = sdxl_pipeline(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    abar = DDPMScheduler.from_config(SDXL.config, rescale_betas_zero_snr=True).alphas_cumprod
    levels = levels_of(sdxl)
    torch.testing.assert_close(levels.alphas**2, abar[levels.timesteps])
    assert torch.equal(levels_of(sd3_pipeline(t5=False)).timesteps, flow_levels().timesteps)


def test_noise_is_fixed():
    z0, settings, levels = torch.zeros(3, 4, 8, 8), OneStepSettings(), flow_levels()
    z_t, eps = noisy(z0, 2, [0, 1, 2], levels, settings)
    assert torch.equal(eps[1:2], noisy(z0[:1], 2, [1], levels, settings)[1]), "the batch does not matter"
    torch.testing.assert_close(z_t, levels.sigmas[2] * eps)
    for other in (noisy(z0, 3, [0, 1, 2], levels, settings), noisy(z0, 2, [3, 4, 5], levels, settings),
                  noisy(z0, 2, [0, 1, 2], levels, OneStepSettings(seed=1))):  # fmt: skip
        assert not torch.equal(other[1], eps)
    z0 = torch.randn(3, 4, 8, 8)
    with_signal, without = (noisy(z, 0, [0, 1, 2], levels, settings)[0] for z in (z0, 0 * z0))
    torch.testing.assert_close(with_signal - without, levels.alphas[0] * z0)


# ---------------------------------------------------------------------------------------------------------------------
# The numbers


@pytest.fixture(scope="module")
def vae():
    return autoencoder("sdxl")


def pair(seed=0, count=2):
    torch.manual_seed(seed)
    z0 = torch.nn.functional.interpolate(torch.randn(count, 4, 4, 4), size=8, mode="bilinear") + 0.3 * torch.randn(
        count, 4, 8, 8
    )
    return z0, 0.8 * z0 + 0.1 * torch.randn_like(z0)


def test_a_perfect_estimate(vae):
    meter, (z0, _) = OneStepMeter(vae, [Network()]), pair()
    found = meter.compare(z0, meter.target(z0))
    assert tuple(found) == meter.names
    right = {"gain": 1, "psnr": 10 * np.log10(4e10)} | {name: 1 for name in found if name.startswith("spread")}
    for name, values in found.items():
        torch.testing.assert_close(values, torch.full((2,), float(right.get(name, 0))), rtol=1e-5, atol=1e-6, msg=name)


def test_the_numbers_are_what_they_say(vae):
    meter, (z0, z0_pred) = OneStepMeter(vae, [Network()]), pair()
    found = meter.compare(z0_pred, meter.target(z0))
    as_in_the_scripts = LPLConfig(outlier_reference_resolution=256)
    loss = LatentPerceptualLoss(DecoderStages(vae), as_in_the_scripts)(z0_pred, z0).per_layer
    for index, name in enumerate(DecoderStages(vae).names):
        torch.testing.assert_close(found[f"lpl/{name}"], loss[index], rtol=1e-5, atol=1e-7)
    with torch.no_grad():
        features = [list(stage_features(DecoderStages(vae), z)) for z in (z0, z0_pred)]
    for name, x, xh in zip(DecoderStages(vae).names, *features, strict=True):
        ratios = xh.numpy().var(axis=(2, 3)) / x.numpy().var(axis=(2, 3))
        lower = np.sort(ratios, axis=1)[:, (ratios.shape[1] - 1) // 2]  # of an even number the lower middle one
        np.testing.assert_allclose(found[f"spread/{name}"], lower, rtol=1e-4)
    space = LatentSpace.of(vae)
    with torch.no_grad():
        true, made = (vae.decode(space.from_model(z)).sample.clamp(-1, 1).double().numpy() for z in (z0, z0_pred))
    for row in range(2):
        a, b = z0[row].double().numpy(), z0_pred[row].double().numpy()
        np.testing.assert_allclose(found["latent_mse"][row], ((a - b) ** 2).mean(), rtol=1e-5)
        np.testing.assert_allclose(found["gain"][row], (a.var(axis=(1, 2)).sum() / b.var(axis=(1, 2)).sum()) ** 0.5,
                                   rtol=1e-5)  # fmt: skip
        np.testing.assert_allclose(found["psnr"][row], 10 * np.log10(4 / ((true[row] - made[row]) ** 2).mean()),
                                   rtol=1e-4)  # fmt: skip
        radius = np.hypot(np.fft.fftfreq(64)[:, None], np.fft.fftfreq(64)[None, : 64 // 2 + 1]) * 2
        powers = [(abs(np.fft.rfft2(x[row])) ** 2).sum(axis=0)[radius >= 0.375].sum() for x in (made, true)]
        np.testing.assert_allclose(found["high_frequency"][row], np.log(powers[0] / powers[1]), rtol=1e-3, atol=1e-5)
        x, xh = (np.round((y[row] + 1) * 127.5) + 1 for y in (true, made))
        distances = []
        coarse = [y.reshape(3, 8, 8, 8, 8).mean(axis=(2, 4)) for y in (x, xh)]
        for one, other in ((x, xh), coarse):
            one, other = one / np.linalg.norm(one, axis=0), other / np.linalg.norm(other, axis=0)
            distances.append(((one - other) ** 2).sum(axis=0).mean())
        np.testing.assert_allclose(found["perceptual/means"][row], np.mean(distances), rtol=1e-3)


def test_shrunk_estimates_are_told(vae):
    meter, (z0, _) = OneStepMeter(vae), pair()
    mean = z0.mean(dim=(2, 3), keepdim=True)
    found = meter.compare(mean + 0.5 * (z0 - mean), meter.target(z0))
    torch.testing.assert_close(found["gain"], torch.full((2,), 2.0), rtol=1e-4, atol=0)
    assert (found["spread/middle block"] < 0.9).all()


def test_results_are_paired_and_independent_of_the_batch(vae):
    torch.manual_seed(0)
    shapes = [(4, 8, 8), (4, 8, 8), (4, 8, 16), (4, 8, 8), (4, 8, 16)]
    latents, levels, seen = [torch.randn(shape) for shape in shapes], flow_levels((2.0, -2.0)), []

    def estimate(z_t, level, indices):
        seen.append((level, tuple(indices)))
        return torch.stack([latents[index] * (1 + level + index) for index in indices])

    def run(**settings):
        return one_step(estimate, levels, vae, latents, OneStepSettings(**settings), [Network()], bar=False)

    result = run()
    assert {name: values.shape for name, values in result.metrics.items()} == dict.fromkeys(result.metrics, (2, 5))
    assert result.levels == (2.0, -2.0) and not any(np.isnan(values).any() for values in result.metrics.values())
    factors = 1 + np.arange(2)[:, None] + np.arange(5)[None, :]
    np.testing.assert_allclose(result.metrics["gain"], 1 / factors, rtol=1e-4)
    one = run(batch_size=1)
    for name, values in result.metrics.items():
        np.testing.assert_allclose(values, one.metrics[name], rtol=2e-3, atol=1e-4, err_msg=name)
    assert set(seen) >= {(0, (0, 1, 3)), (1, (2, 4)), (1, (3,))}


# ---------------------------------------------------------------------------------------------------------------------
# Loaded pipelines


CASES = {
    "sdxl": (train_sdxl_lpl, []),
    "sdxl-v": (train_sdxl_lpl, ["--prediction_type", "v_prediction"]),
    "sd3": (train_sd3_lpl_flow, ["--max_sequence_length", 32]),
}


@pytest.mark.parametrize("case", CASES)
def test_the_same_estimate_as_the_training_script(case, request, tmp_path):
    """For the same weights, pictures and noise, `PipelineEstimate` gives what `denoise` of the script gives."""
    from tests.tiny_models import picture_folder

    script, more = CASES[case]
    pictures = picture_folder(tmp_path / "pictures", 3, size=80)
    folder = request.getfixturevalue(f"{case[:4].strip('-')}_folder")
    AcceleratorState._reset_state(True)
    args = script.parse_args([str(flag) for flag in (
        "--pretrained_model_name_or_path", folder, "--train_data_dir", pictures, "--resolution", 64, "--cache_dir",
        tmp_path / "cache", "--validation_data_dir", pictures, "--mixed_precision", "no", *more)])  # fmt: skip
    found, held_out = scan.find_images(data_source(args))
    accelerator, schedule = Accelerator(cpu=True), script.Schedule(args)
    data = script.fill_caches(args, found.images, held_out, torch.float32, accelerator)
    denoiser = script.build_denoiser(args, torch.float32, "cpu").eval()
    pipeline = load_pipeline(find_source(str(folder)), torch.float32, "cpu")
    if case == "sdxl-v":
        pipeline.scheduler.register_to_config(prediction_type="v_prediction")
    space = LatentSpace.of(pipeline.vae)
    objective = objective_of(args, schedule, space=(space.scaling_factor, space.shift_factor))

    held, levels = held_out_of(pipeline, held_out, 64), levels_of(pipeline)
    estimate, settings, indices = PipelineEstimate(pipeline, held, levels, 32), OneStepSettings(), [0, 1, 2]
    script_levels = levels_of_schedule(schedule)
    torch.testing.assert_close(script_levels.timesteps, levels.timesteps)
    batch = collate([latent | prompt for latent, prompt in map(data.held_out_entry, indices)]) | {"number": indices}
    z0 = objective.space.to_model(batch["mean"])
    torch.testing.assert_close(torch.stack(held.latents), z0)
    if script is train_sdxl_lpl:
        assert torch.equal(held.time_ids, batch["time_ids"]) and held.time_ids[0].tolist() == [80, 80, 0, 0, 64, 64]
    objective = objective_of(args, schedule, space=(space.scaling_factor, space.shift_factor),
                             empty_prompt=data.prompt(""))  # fmt: skip
    conditions = script.conditioning(batch, objective, 0)
    for level in (0, 4, 9):
        z_t, eps = noisy(z0, level, indices, levels, settings)
        timesteps = script_levels.timesteps[level].repeat(3)
        with torch.no_grad():
            _, out, z_script = script.denoise(denoiser, z0, eps, timesteps, conditions, objective)
        torch.testing.assert_close(z_script, z_t)
        expected = estimate_z0(out, z_script, *schedule.levels(timesteps), schedule.prediction_type)
        torch.testing.assert_close(estimate(z_t, level, indices), expected, rtol=1e-4, atol=1e-4)
        for index in indices:
            one = estimate(z_t[index : index + 1], level, [index])
            torch.testing.assert_close(one, expected[index : index + 1], rtol=1e-4, atol=1e-4)
    assert (estimate.kind == "flow") == (script is train_sd3_lpl_flow)


@pytest.mark.parametrize("family", ["sdxl", "sd3"])
def test_the_whole_test_on_a_pipeline(family, request, pictures):
    pipeline = load_pipeline(find_source(str(request.getfixturevalue(f"{family}_folder"))), torch.float32, "cpu")
    images = scan.scan_folder(pictures).images
    result = one_step_of(pipeline, images, 64, OneStepSettings(levels=(3.0, 0.0)), [Network()], bar=False)
    assert result.metrics["psnr"].shape == (2, 6)
    assert (result.metrics["latent_mse"][0] < result.metrics["latent_mse"][1]).all(), "more noise, more error"
    assert isinstance(levels_of(pipeline), NoiseLevels)
