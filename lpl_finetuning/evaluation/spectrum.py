"""Power spectra and sharpness of pictures: what a model adds or lacks at each spatial frequency.

Shapes: N pictures, H and W in px, F frequencies. Frequencies are shares of the finest, which is 1/2 cycle per px.
"""

import numpy as np

LUMINANCE = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601
ROUNDING = 1 / 12 / 255**2  # variance that 8-bit pixels add; it keeps the logarithm of flat pictures finite


def radial_log_power(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Logarithm of the power of luminance, averaged over rings of one frequency.

    As in figures 5 and 6 of Berrada et al. 2025, "Boosting latent diffusion with perceptual objectives". A Hann window
    fades the borders out: without it the step between opposite borders looks like fine detail. White noise of variance
    v has the power v at all frequencies.

    Args:
        images: (N, H, W, 3), uint8, or float in [0, 1].

    Returns:
        frequencies: (F,) centres of the rings, in (0, 1], F = min(H, W) // 2.
        log_power: (N, F) natural logarithms, of pixels in [0, 1].
    """
    grey = _luminance(images)
    _, height, width = grey.shape
    window = np.outer(_hann(height), _hann(width))
    grey = (grey - (grey * window).sum(axis=(1, 2), keepdims=True) / window.sum()) * window
    power = np.square(np.abs(np.fft.rfft2(grey))) / np.square(window).sum()
    radius = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]) * 2  # 1: the finest
    count = min(height, width) // 2
    ring = np.rint(radius * count).astype(int)  # ring 0 is the mean; corners beyond 1 are left out
    twice = np.full(radius.shape, 2.0)  # rfft2 has one of each pair of columns
    twice[:, 0] = 1
    if width % 2 == 0:
        twice[:, -1] = 1
    inside = (ring >= 1) & (ring <= count)
    weights = np.zeros((inside.sum(), count))
    weights[np.arange(len(weights)), ring[inside] - 1] = twice[inside]
    rings = power[:, inside] @ (weights / weights.sum(axis=0))
    return np.arange(1, count + 1) / count, np.log(rings + ROUNDING)


def sharpness(images: np.ndarray) -> np.ndarray:
    """(N,) natural logarithm of the variance of the Laplacian of luminance in [0, 255].

    The variance is the focus measure of Pech-Pacheco et al. 2000, "Diatom autofocusing in brightfield microscopy". Its
    logarithm keeps a few very sharp pictures from ruling the mean; 0.1 more is about 10 % more variance.

    Args:
        images: (N, H, W, 3), uint8, or float in [0, 1].
    """
    grey = _luminance(images) * 255
    middle = grey[:, 1:-1, 1:-1]
    laplacian = grey[:, :-2, 1:-1] + grey[:, 2:, 1:-1] + grey[:, 1:-1, :-2] + grey[:, 1:-1, 2:] - 4 * middle
    return np.log(laplacian.var(axis=(1, 2)) + 20 * ROUNDING * 255**2)  # 4^2 + 4: what rounding adds


def _luminance(images: np.ndarray) -> np.ndarray:
    """(N, H, W) luminance in [0, 1]."""
    scale = 255 if images.dtype == np.uint8 else 1
    return images.astype(np.float64) @ LUMINANCE / scale


def _hann(count: int) -> np.ndarray:
    """(count,) Hann window whose ends are not 0."""
    return np.square(np.sin(np.pi * (np.arange(count) + 0.5) / count))
