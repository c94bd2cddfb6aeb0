"""The demonstrations under benchmarks/: their tables and pictures, and what their figures say."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import auto_weight, latent_structure, outlier_maps
from lpl_utils import DecoderStages, inlier_mask, stage_features
from tests.tiny_models import autoencoder


def test_nearest_takes_every_second_latent():
    z = torch.arange(16.0).reshape(1, 1, 4, 4)
    kept = z[..., ::2, ::2].repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert torch.equal(latent_structure.down_and_up(z, "nearest"), kept)


def test_latent_errors_are_in_units_of_the_variance():
    vae, pictures = autoencoder(), torch.rand(2, 3, 64, 64) * 2 - 1
    numbers, columns = latent_structure.measure(vae, pictures)
    z = latent_structure.encode(vae, pictures)
    changed = latent_structure.down_and_up(z, "bilinear")
    assert numbers["bilinear"]["latents"] == pytest.approx(((changed - z) ** 2).mean() / z.var(dim=(2, 3)).mean())
    assert tuple(columns) == ("picture", "decoded", *latent_structure.METHODS)


def test_outlier_maps_are_the_loss_own_masks():
    vae, z = autoencoder(), torch.randn(1, 4, 8, 8)
    maps = outlier_maps.maps_of(vae, z, 64)
    with torch.no_grad():
        features = dict(zip(DecoderStages(vae).names, stage_features(DecoderStages(vae), z), strict=True))
    assert list(maps) == ["up block 2", "up block 3", "up block 4"]
    for name, kernels in (("up block 2", (1, 3)), ("up block 4", (3, 5))):
        expected = 1 - inlier_mask(features[name], kernels).float().mean(dim=1)
        torch.testing.assert_close(maps[name][1], expected)


@pytest.mark.parametrize("script", [latent_structure, outlier_maps])
def test_scripts_draw_and_print(script, sdxl_folder, pictures, tmp_path, capsys):
    script.main(["--model", str(sdxl_folder), "--pictures", str(pictures), "--count", "2", "--shown", "1",
                 "--output", str(tmp_path / "a" / "x.png")])  # fmt: skip
    assert Image.open(tmp_path / "a" / "x.png").width > 400
    assert len(re.findall(r"^\| sdxl \|", capsys.readouterr().out, re.M)) == 3


def test_losses_that_do_not_vary_have_one_weight():
    """A fifth of the timesteps is gated, with LPL 0.1; the diffusion loss is 0.5: 0.25 * 0.5 / (0.2 * 0.1)."""
    lpl = np.array([[0.1], [0.1], [0.0], [0.0]])
    measured = np.array([0, 199, 200, 999]), np.full((4, 1), 0.5), lpl
    assert auto_weight.right_weight(measured) == pytest.approx(6.25)
    values = auto_weight.draw_runs(measured, 16, 20, 100, np.random.default_rng(0))
    for weights in (auto_weight.plain_weights(values), auto_weight.automatic_weights(values, 32)):
        assert weights[:, -1].mean() == pytest.approx(6.25, rel=0.05)
    ramped = auto_weight.automatic_weights(values, 10**6)[:, 9]
    assert ramped == pytest.approx(
        values[:, :10, 2].sum(axis=1) / 10**6 * auto_weight.automatic_weights(values, 1)[:, 9]
    )
