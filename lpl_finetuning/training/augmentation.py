"""Augmentation of latents: a random shift with repeated edges, and random erasing.

Every random number follows from the seed and the number of the sample, so a resumed run repeats it. Shapes: B samples,
C channels, h w of a latent.
"""

import numpy as np
import torch

from lpl_finetuning.data.samples import addressed_normal, addressed_rng
from lpl_finetuning.training.objective import to_device

SMALLEST_AREA = 0.02  # of an erased rectangle, as a share of the latent
LONGEST = 2.0  # ratio of the sides of that rectangle, or its inverse


def shift(latents, numbers, pad, seed):
    """Latents (B, C, h, w), each padded by `pad` on all sides with its edge repeated and cut back at a random place.

    Args:
        numbers: (B,) of the samples.
        pad: in latents; None for a sixteenth of the longer side, 1 at least.
    """
    height, width = latents.shape[-2:]
    pad = max(1, max(height, width) // 16) if pad is None else pad
    if not pad:
        return latents
    moves = np.stack([addressed_rng(seed, int(n), "shift").integers(-pad, pad + 1, 2) for n in numbers])
    rows = torch.from_numpy((np.arange(height) + moves[:, :1]).clip(0, height - 1))
    columns = torch.from_numpy((np.arange(width) + moves[:, 1:]).clip(0, width - 1))
    rows, columns = (to_device(index, latents.device) for index in (rows, columns))
    samples = torch.arange(len(latents), device=latents.device)[:, None, None, None]
    channels = torch.arange(latents.shape[1], device=latents.device)[None, :, None, None]
    return latents[samples, channels, rows[:, None, :, None], columns[:, None, None, :]]


def erase(latents, numbers, probability, area, seed):
    """Latents (B, C, h, w), in some of which standard normal noise takes the place of a random rectangle.

    Model space has about that distribution, so the noise has the latents' scale.

    Args:
        numbers: (B,) of the samples.
        probability: of a rectangle in a sample.
        area: of the rectangle at most, as a share of the latent.
    """
    if not probability:
        return latents
    height, width = latents.shape[-2:]
    mask = torch.from_numpy(np.stack([rectangle(seed, int(n), (height, width), probability, area) for n in numbers]))
    noise = addressed_normal(seed, numbers, latents.shape[1:], "erasing")
    mask, noise = to_device(mask[:, None], latents.device), to_device(noise, latents.device)
    return torch.where(mask, noise, latents)


def rectangle(seed, number, size, probability, area):
    """Bool (h, w): the rectangle of a sample; all False with probability 1 - `probability`.

    The rectangle's area is uniform between `SMALLEST_AREA` and `area`, the logarithm of its aspect ratio uniform
    between those of 1 / `LONGEST` and `LONGEST`.
    """
    rng = addressed_rng(seed, number, "erasing_place")
    mask = np.zeros(size, dtype=bool)
    wanted, share, ratio, top, left = rng.random(5)
    if wanted >= probability:
        return mask
    share = SMALLEST_AREA + share * max(0.0, area - SMALLEST_AREA)
    ratio = LONGEST ** (2 * ratio - 1)
    sides = [min(side, max(1, round(side * (share * each) ** 0.5)))
             for side, each in zip(size, (ratio, 1 / ratio), strict=True)]  # fmt: skip
    top, left = (int(place * (side - own + 1)) for place, side, own in zip((top, left), size, sides, strict=True))
    mask[top : top + sides[0], left : left + sides[1]] = True
    return mask
