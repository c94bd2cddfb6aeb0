"""Power spectra and sharpness of pictures that are known."""

import numpy as np
import pytest

from lpl_finetuning.evaluation.spectrum import radial_log_power, sharpness


def wave(cycles_y, cycles_x, height=64, width=64, depth=0.2):
    """One grey picture (1, H, W, 3) in [0, 1] of a sinusoid."""
    y, x = np.mgrid[:height, :width]
    grey = 0.5 + depth * np.sin(2 * np.pi * (cycles_y * y / height + cycles_x * x / width))
    return np.repeat(grey[None, ..., None], 3, axis=3)


def blurred(images):
    """Mean of each pixel and its four neighbours, on a torus."""
    return sum(np.roll(images, shift, axis) for axis in (1, 2) for shift in (1, -1)) / 5 + images / 5


@pytest.mark.parametrize("cycles", [(5, 0), (0, 5), (12, 16), (0, 31), (30, 0)])
def test_a_sinusoid_lands_in_its_ring(cycles):
    frequencies, log_power = radial_log_power(wave(*cycles))
    assert frequencies.shape == (32,) and log_power.shape == (1, 32)
    assert frequencies[log_power[0].argmax()] == pytest.approx(np.hypot(*cycles) / 32)


def test_the_frequency_follows_from_pixels():
    """Twelve cycles over 96 px and eight over 64 px are one frequency, 1/8 cycle per px."""
    frequencies, log_power = radial_log_power(wave(0, 12, height=64, width=96))
    assert frequencies[log_power[0].argmax()] == 0.25


def test_white_noise_is_flat_at_its_variance():
    noise = np.random.default_rng(0).normal(0.5, 0.1, size=(200, 48, 64, 1)).repeat(3, axis=3)
    _, log_power = radial_log_power(noise)
    flat = np.log(np.exp(log_power).mean(axis=0)) - np.log(0.01)
    assert np.abs(flat[1:]).max() < 0.1 and -0.4 < flat[0] < 0  # the mean takes a part of the first ring with it


def test_rings_hold_all_power_of_even_and_odd_widths():
    """The half of the plane that the transform leaves out counts as the half that it has."""
    noise = np.random.default_rng(0).normal(0.5, 0.1, size=(3, 20, 31, 1)).repeat(3, axis=3)
    np.testing.assert_allclose(radial_log_power(noise)[1], radial_log_power(noise.transpose(0, 2, 1, 3))[1], rtol=1e-9)


def test_blurring_lowers_high_frequencies_and_sharpness():
    noise = np.random.default_rng(0).uniform(size=(20, 64, 64, 3))
    error = (radial_log_power(blurred(noise))[1] - radial_log_power(noise)[1]).mean(axis=0)
    assert error[-1] < -1 and abs(error[0]) < 0.1 and error[5] > error[20]
    assert (sharpness(blurred(noise)) < sharpness(noise) - 1).all()


def test_bytes_and_floats_agree():
    images = np.random.default_rng(0).integers(0, 256, size=(2, 16, 16, 3), dtype=np.uint8)
    np.testing.assert_allclose(radial_log_power(images)[1], radial_log_power(images / 255)[1])
    np.testing.assert_allclose(sharpness(images), sharpness(images / 255))


def test_flat_pictures_have_finite_numbers():
    flat = np.full((1, 16, 16, 3), 200, dtype=np.uint8)
    rounding = 1 / 12 / 255**2
    np.testing.assert_allclose(radial_log_power(flat)[1], np.log(rounding))
    np.testing.assert_allclose(sharpness(flat), np.log(20 / 12))


def test_sharpness_is_the_variance_of_the_laplacian():
    """A checkerboard of 0 and 1: the Laplacian is +-4 times 255, its variance (4 * 255)^2 / 1."""
    board = np.indices((18, 18)).sum(axis=0) % 2
    images = np.repeat(board[None, ..., None], 3, axis=3).astype(float)
    assert sharpness(images)[0] == pytest.approx(2 * np.log(4 * 255), abs=1e-3)
