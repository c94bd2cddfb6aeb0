"""How sure a number is: intervals that cover the truth in 95 of 100 cases.

A mean over pictures gets a bootstrap. A distance between sets of pictures must not: a bootstrap sample repeats
pictures, has a smaller covariance and nearer neighbours than a sample, and the distance moves with them. The Fréchet
and kernel distances get a delete-a-group jackknife, and the neighbour metrics exchanges between the two models. Both
use every picture once at most.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from lpl_finetuning.errors import UserError
from lpl_finetuning.evaluation.distances import DISTANCES, distances_of_parts

GROUPS = 20  # of the jackknife
EXCHANGES = 60
RESAMPLES = 2000  # of the bootstrap
PICTURES_PER_FEATURE = 5  # 10,000 pictures for Inception's 2,048 features, as the code of Heusel et al. 2017 advises


@dataclass(frozen=True)
class Interval:
    """A number and its 95 % interval.

    Attributes:
        value: the number itself.
        low, high: ends of the interval, in the unit of the value.
    """

    value: float
    low: float
    high: float

    @property
    def holds_zero(self) -> bool:
        """Whether 0 is in the interval, so that a difference may be chance."""
        return self.low <= 0 <= self.high


def mean_interval(values: np.ndarray, seed: int = 0) -> Interval:
    """Mean of a number per picture, (N,), with the interval of a bootstrap over pictures.

    The interval is the expanded percentile interval of Hesterberg 2015, "What teachers should know about the
    bootstrap", which is right for few pictures too.

    Raises:
        UserError: fewer than two pictures, or numbers that are not finite.
    """
    values = np.asarray(values, dtype=np.float64)
    count = len(values)
    if count < 2 or not np.isfinite(values).all():
        raise UserError(f"The interval of a mean needs finite numbers of at least 2 pictures, not {values[:5]}.")
    rng = np.random.default_rng(seed)
    means = [
        values[rng.integers(count, size=(size, count))].mean(axis=1)
        for size in np.diff(np.linspace(0, RESAMPLES, 1 + max(1, RESAMPLES * count // 2**22), dtype=int))
    ]
    beyond = 0.5 * math.erfc(math.sqrt(count / (count - 1)) * t_quantile(count - 1) / math.sqrt(2))
    low, high = np.quantile(np.concatenate(means), [beyond, 1 - beyond])
    return Interval(float(values.mean()), float(low), float(high))


def paired_difference(a: np.ndarray, b: np.ndarray, seed: int = 0) -> Interval:
    """Mean of a - b with its interval; a and b are (N,) numbers of the same pictures in the same order."""
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.shape != b.shape:
        raise UserError(f"A paired difference needs the same pictures on both sides, not {len(a)} and {len(b)}.")
    return mean_interval(a - b, seed)


def distance_differences(
    real: np.ndarray,
    a: np.ndarray,
    b: np.ndarray,
    names: Sequence[str] = DISTANCES,
    groups: int = GROUPS,
    paired: bool = True,
    seed: int = 0,
) -> dict[str, Interval]:
    """{name: distance(real, a) - distance(real, b)} with 95 % intervals; all names together cost less than each alone.

    Fréchet and kernel: a delete-a-group jackknife. Neighbours: pictures of a and b change places, since a jackknife is
    too wide there (recall and coverage depend on pictures through maxima and minima, which the jackknife's straight
    lines don't follow).

    The real pictures are taken as given: the interval says how the difference would vary with other noise, not with
    other real pictures. Where one model has more pictures, a random part of them is used, since every distance but the
    kernel's depends on the number of pictures.

    Args:
        real: features of the real pictures, (N, D).
        a, b: features of two models' pictures, (M, D) each.
        names: of `distances.DISTANCES`.
        groups: number of groups of the jackknife; the time of the Fréchet distance grows with it.
        paired: picture n of a and of b have the same caption and seed; then the same groups are removed from both, and
            pictures change places with their partners only.
        seed: of the groups and exchanges.

    Raises:
        UserError: too few pictures, different numbers of paired pictures, or features that are not finite.
    """
    a, b = _equally_many(np.asarray(a), np.asarray(b), paired, seed)
    smooth = [name for name in names if name in ("frechet", "kernel")]
    others = [name for name in names if name not in smooth]
    found = _by_groups(real, a, b, smooth, groups, paired, seed) if smooth else {}
    if others:
        found |= _by_exchange(real, a, b, others, paired, seed)
    return {name: found[name] for name in names}


def _by_groups(
    real: np.ndarray, a: np.ndarray, b: np.ndarray, names: Sequence[str], groups: int, paired: bool, seed: int
) -> dict[str, Interval]:
    """Intervals of a delete-a-group jackknife."""
    rng, count = np.random.default_rng(seed), len(a)
    labels = [rng.permutation(count) for _ in range(2)]
    first, second = (
        without_groups(real, fake, names, groups, own)
        for fake, own in ((a, labels[0]), (b, labels[0] if paired else labels[1]))
    )
    return {name: jackknife_difference(first[name], second[name], paired) for name in names}


def without_groups(
    real: np.ndarray, fake: np.ndarray, names: Sequence[str], groups: int = GROUPS, labels: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """{name: (1 + G,)}: each distance of all generated pictures to the real ones, then without each of G groups.

    Args:
        real, fake: features, (N, D) and (M, D).
        names: "frechet", "kernel".
        groups: G, or half of the pictures where that is less.
        labels: (M,) numbers from 0 to M - 1; those of a group are equal modulo G. By default the order of
            `distance_differences` for the seed 0.
    """
    labels = np.random.default_rng(0).permutation(len(fake)) if labels is None else labels
    groups = min(groups, len(fake) // 2)
    return distances_of_parts(
        real, fake, np.arange(-1, groups)[:, None] != labels % groups, names
    )  # -1: none is left out


def jackknife_difference(a: np.ndarray, b: np.ndarray, paired: bool) -> Interval:
    """Difference of two numbers, with its interval from the numbers without each group.

    Args:
        a, b: (1 + G,) the number of all pictures, then without each of G groups of equal size.
        paired: group g of a and of b are the same pictures.

    The variance is (G - 1) / G times the sum of squared deviations from the mean over groups (Efron and Stein 1981:
    on average not below the true variance); Student's t with G - 1 degrees of freedom, or Welch's number of them for
    two variances, makes an interval of it.
    """

    def variance(values: np.ndarray) -> float:
        return (len(values) - 1) / len(values) * float(np.square(values - values.mean()).sum())

    value, degrees = float(a[0] - b[0]), len(a) - 2
    if paired:
        total = variance(a[1:] - b[1:])
    else:
        first, second = variance(a[1:]), variance(b[1:])
        total, squares = first + second, first**2 + second**2
        degrees = int(degrees * total**2 / squares) if squares > 0 else degrees
    reach = t_quantile(degrees) * math.sqrt(total)
    return Interval(value, value - reach, value + reach)


def _by_exchange(
    real: np.ndarray, a: np.ndarray, b: np.ndarray, names: Sequence[str], paired: bool, seed: int
) -> dict[str, Interval]:
    """Intervals from the differences of sets in which pictures of a and b have changed places at random.

    If a and b had one distribution, such differences would be distributed as the difference of a and b is (Fisher
    1935, "The design of experiments"). Their spread makes the interval.
    """
    rng, count = np.random.default_rng(seed), len(a)
    parts = [np.arange(2 * count) < count]
    for _ in range(EXCHANGES):
        if paired:
            moved = rng.random(count) < 0.5
            parts.append(np.concatenate([~moved, moved]))
        else:
            parts.append(rng.permutation(2 * count) < count)
    values = distances_of_parts(real, np.concatenate([a, b]), np.stack([*parts, *(~part for part in parts)]), names)
    found = {}
    for name in names:
        first, second = np.split(values[name], 2)
        value, *exchanged = first - second
        reach = t_quantile(EXCHANGES) * math.sqrt(float(np.square(exchanged).mean()))
        found[name] = Interval(float(value), float(value - reach), float(value + reach))
    return found


def enough_pictures(dims: int, count: int, network: str) -> str | None:
    """A sentence that warns where a Fréchet distance has too few pictures, with the number needed; else None.

    Args:
        dims: features of the network.
        count: pictures on the side that has fewer.
        network: name as printed.
    """
    needed = PICTURES_PER_FEATURE * dims
    if count >= needed:
        return None
    start = f"The Fréchet distance by {network} needs about {needed:,} pictures ({PICTURES_PER_FEATURE} for each of "
    start += f"{dims:,} features), and there are {count:,}"
    if count <= dims:
        return (f"{start}, fewer than features: most of its value may be the floor that a finite sample adds. Compare "
                "models at equal numbers of pictures only, and trust the kernel distance more.")  # fmt: skip
    return f"{start}: a finite sample adds a floor to its value. Compare models at equal numbers of pictures only."


@cache
def t_quantile(degrees: int) -> float:
    """The number that Student's t with these degrees of freedom exceeds with a probability of 2.5 %."""
    degrees = min(degrees, 2000)  # 1.961; the normal distribution has 1.960
    low, high = 0.0, 13.0  # 12.71 for 1 degree
    while high - low > 1e-10:
        middle = (low + high) / 2
        low, high = (middle, high) if _central_t(middle, degrees) < 0.95 else (low, middle)
    return low


def _central_t(t: float, degrees: int) -> float:
    """P(|T| <= t) by the finite sums of Abramowitz and Stegun 26.7.3 and 26.7.4."""
    angle = math.atan(t / math.sqrt(degrees))
    sine, squared = math.sin(angle), math.cos(angle) ** 2
    term, total = (1.0, 1.0) if degrees % 2 == 0 else (math.cos(angle), math.cos(angle))
    for number in range(2 + degrees % 2, degrees - 1, 2):
        term *= squared * (number - 1) / number
        total += term
    if degrees % 2 == 0:
        return sine * total
    return 2 / math.pi * (angle + (sine * total if degrees > 1 else 0))


def _equally_many(a: np.ndarray, b: np.ndarray, paired: bool, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Both sets, the larger one cut to a random part of the size of the other."""
    if paired and len(a) != len(b):
        raise UserError(f"Paired pictures must be as many on both sides, not {len(a)} and {len(b)}.")
    rng, count = np.random.default_rng(seed), min(len(a), len(b))
    if count < 4:
        raise UserError(f"The interval of a difference needs at least 4 pictures of each model, not {count}.")
    a, b = (fake if len(fake) == count else fake[np.sort(rng.permutation(len(fake))[:count])] for fake in (a, b))
    return a, b
