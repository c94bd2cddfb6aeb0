"""Augmentation of latents: for the classifier's training, and alike for both sides of the perceptual loss.

Every random number follows from the seed and the number of the sample, so a resumed run repeats it. Shapes: B samples,
C channels, h w of a latent.
"""

import numpy as np
import torch

from lpl_finetuning.data.samples import addressed_normal, addressed_rng
from lpl_finetuning.training.transfer import to_device

SMALLEST_AREA = 0.02  # of an erased rectangle, as a share of the latent
LONGEST = 2.0  # ratio of the sides of that rectangle, or its inverse
FLIPPED, CUT = 0.5, 0.5  # shares of the pairs of latents that are flipped, that lose a rectangle
CUT_AREA = 0.25  # of that rectangle at most
FARTHEST = 8  # a pair is shifted by an eighth of its sides at most


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
    rows = (np.arange(height) + moves[:, :1]).clip(0, height - 1)
    columns = (np.arange(width) + moves[:, 1:]).clip(0, width - 1)
    return taken(latents, *(to_device(torch.from_numpy(index), latents.device) for index in (rows, columns)))


def taken(latents, rows, columns):
    """Latents (B, C, h, w) in which each sample has the given rows (B, h) and columns (B, w) of its own."""
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
    mask = torch.from_numpy(np.stack([
        rectangle(addressed_rng(seed, int(n), "erasing_place"), (height, width), probability, area) for n in numbers
    ]))  # fmt: skip
    noise = addressed_normal(seed, numbers, latents.shape[1:], "erasing")
    mask, noise = to_device(mask[:, None], latents.device), to_device(noise, latents.device)
    return torch.where(mask, noise, latents)


def augment_alike(tensors, numbers, seed):
    """The tensors, (B, C, h, w) each, flipped, shifted and cut in the same way: [tensor].

    Half of the samples are mirrored. Each is shifted by up to an eighth of its sides, with its edge repeated. In half
    of them a rectangle of up to a quarter of the area is set to 0, which is the middle of model space.

    Args:
        numbers: (B,) of the samples.
    """
    rows, columns, kept = (to_device(torch.from_numpy(np.stack(each)), tensors[0].device) for each in zip(
        *(places(seed, int(n), tensors[0].shape[-2:]) for n in numbers), strict=True))  # fmt: skip
    return [torch.where(kept[:, None], taken(tensor, rows, columns), 0) for tensor in tensors]


def places(seed, number, size):
    """(rows (h,), columns (w,), bool (h, w)) of a sample: which it takes, and which positions are not cut out."""
    rng = addressed_rng(seed, number, "lpl_augment")
    flipped = rng.random() < FLIPPED
    rows, columns = ((np.arange(side) + rng.integers(-(side // FARTHEST), side // FARTHEST + 1)).clip(0, side - 1)
                     for side in size)  # fmt: skip
    return rows, columns[::-1].copy() if flipped else columns, ~rectangle(rng, size, CUT, CUT_AREA)


def rectangle(rng, size, probability, area):
    """Bool (h, w): a random rectangle; all False with probability 1 - `probability`.

    The rectangle's area is uniform between `SMALLEST_AREA` and `area`, the logarithm of its aspect ratio uniform
    between those of 1 / `LONGEST` and `LONGEST`.
    """
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
