"""Distances between a set of real and a set of generated pictures, computed from the features of a network.

Every distance has two forms. `frechet_distance(real, fake)` and its like return a number. `distances_of_parts` returns
the same numbers for many parts of the generated pictures, which `uncertainty` needs; it reuses what the parts share,
so that twenty parts cost far less than twenty distances.

Features are (N, D) arrays, a row for each picture. All sums are float64. Shapes: N real pictures, M generated
pictures, D features, P parts.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from lpl_finetuning.errors import UserError, counted

ROWS_AT_ONCE = 2**25  # numbers of a block of a distance matrix (256 MiB)
SAME = 1e-12  # squared distances below this share of the squared lengths are rounding errors of equal rows


def frechet_distance(x: np.ndarray, y: np.ndarray) -> float:
    """Fréchet distance of the Gaussians with the means and covariances of two sets, a number from 0.

    |m_x - m_y|^2 + tr(C_x + C_y - 2 (C_x C_y)^(1/2)), from Heusel et al. 2017, "GANs trained by a two time-scale
    update rule". It is called FID only with the features of the Inception network. Singular covariances (fewer
    pictures than features, constant features) are no special case. The finite sample adds to the distance, the more
    the fewer pictures: compare distances at equal numbers of pictures only.

    Raises:
        UserError: fewer than two pictures, or features that are not finite.
    """
    return float(_frechet(*_checked(x, y, 2), _whole(y))["frechet"][0])


def kernel_distance(x: np.ndarray, y: np.ndarray) -> float:
    """Kernel distance of two sets: the unbiased estimate of MMD^2 with the kernel (x·y / D + 1)^3, by all pairs.

    From Bińkowski et al. 2018, "Demystifying MMD GANs"; with Inception features it is KID. Its expectation does not
    depend on the number of pictures, and two samples of one distribution may give a number below 0.

    Raises:
        UserError: fewer than two pictures, or features that are not finite.
    """
    return float(_kernel(*_checked(x, y, 2), _whole(y))["kernel"][0])


def precision_recall(real: np.ndarray, fake: np.ndarray, k: int = 3) -> tuple[float, float]:
    """(precision, recall) in [0, 1], from Kynkäänniemi et al. 2019, "Improved precision and recall metric".

    Precision: share of generated pictures within the distance of a real picture to its k-th nearest real picture.
    Recall: the same with the parts exchanged.

    Raises:
        UserError: fewer than k + 1 pictures, or features that are not finite.
    """
    found = _precision_recall(*_checked(real, fake, k + 1), _whole(fake), k)
    return float(found["precision"][0]), float(found["recall"][0])


def density_coverage(real: np.ndarray, fake: np.ndarray, k: int = 5) -> tuple[float, float]:
    """(density, coverage), from Naeem et al. 2020, "Reliable fidelity and diversity metrics".

    A ball around each real picture reaches to its k-th nearest real picture. Density: number of balls that a generated
    picture lies in, divided by k, mean over generated pictures; it may exceed 1. Coverage: share of balls, in [0, 1],
    that hold a generated picture.

    Raises:
        UserError: fewer than k + 1 pictures, or features that are not finite.
    """
    found = _density_coverage(*_checked(real, fake, k + 1), _whole(fake), k)
    return float(found["density"][0]), float(found["coverage"][0])


def nearest_distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(N,) Euclidean distance of each row of x to the nearest row of y.

    Raises:
        UserError: a set without pictures, or features that are not finite.
    """
    x, y = _checked(x, y, 1)
    return np.sqrt(np.concatenate([squared.min(axis=1) for _, squared in _blocks(x, y)]))


def distances_of_parts(
    real: np.ndarray, fake: np.ndarray, parts: np.ndarray, names: Sequence[str] = ()
) -> dict[str, np.ndarray]:
    """{name: (P,)}: each distance of the real pictures to each of P parts of the generated pictures.

    Args:
        real, fake: features, (N, D) and (M, D).
        parts: (P, M), whether a picture is in a part. Parts may overlap.
        names: of `DISTANCES`; all of them by default.

    Raises:
        UserError: too few pictures in a set or part, or features that are not finite.
    """
    names = tuple(names) or DISTANCES
    parts, found = np.asarray(parts, dtype=bool), {}
    for compute, given, least in COMPUTED_TOGETHER:
        if set(given) & set(names):
            found |= compute(*_checked(real, fake, least, parts), parts)
    return {name: found[name] for name in names}


# ---------------------------------------------------------------------------------------------------------------------
# Fréchet


def _frechet(real: np.ndarray, fake: np.ndarray, parts: np.ndarray) -> dict[str, np.ndarray]:
    """With C_x = F'F, the trace of (C_x C_y)^(1/2) is that of (F C_y F')^(1/2), which is symmetric.

    F is the triangle of a QR decomposition, which needs neither an inverse nor a root of a singular matrix.
    """
    middle = fake.mean(axis=0)
    real, fake = real - middle, fake - middle  # small sums of squares lose fewer digits
    mean = real.mean(axis=0)
    factor = np.linalg.qr(real - mean, mode="r") / np.sqrt(len(real) - 1)
    trace = np.square(factor).sum()
    projected = fake @ factor.T  # M min(N, D)
    roots = (_roots_by_pictures if len(fake) <= len(factor) else _roots_by_features)(projected, parts)
    values = []
    for part, root in zip(parts, roots, strict=True):
        chosen = fake[part]
        own = chosen.mean(axis=0)
        spread = np.square(chosen - own).sum() / (len(chosen) - 1)
        values.append(max(0.0, np.square(mean - own).sum() + trace + spread - 2 * root))
    return {"frechet": np.array(values)}


def _roots_by_pictures(projected: np.ndarray, parts: np.ndarray) -> Iterator[float]:
    """Traces of the root for few pictures: eigenvalues of the products of the centred rows, (M, M)."""
    products = projected @ projected.T
    for part in parts:
        chosen = products[np.ix_(part, part)]
        rows = chosen.mean(axis=0)
        yield _sum_of_roots((chosen - rows - rows[:, None] + rows.mean()) / (len(chosen) - 1))


def _roots_by_features(projected: np.ndarray, parts: np.ndarray) -> Iterator[float]:
    """Traces of the root for many pictures: what a part lacks is subtracted from the sum of products, (D, D)."""
    total, sums = projected.T @ projected, projected.sum(axis=0)
    for part in parts:
        left_out = projected[~part]
        own, count = sums - left_out.sum(axis=0), part.sum()
        yield _sum_of_roots((total - left_out.T @ left_out - np.outer(own, own) / count) / (count - 1))


def _sum_of_roots(symmetric: np.ndarray) -> float:
    """Sum of the square roots of the eigenvalues; those below 0 are rounding errors."""
    return float(np.sqrt(np.linalg.eigvalsh(symmetric).clip(0)).sum())


# ---------------------------------------------------------------------------------------------------------------------
# Kernel


def _kernel(real: np.ndarray, fake: np.ndarray, parts: np.ndarray) -> dict[str, np.ndarray]:
    chosen = parts.astype(float)  # P M
    counts, count_real = chosen.sum(axis=1), len(real)
    between_real = (sum(_cubic(real[rows], real).sum() for rows in _slices(count_real, count_real))
                    - _cubic_diagonal(real).sum()) / (count_real * (count_real - 1))  # fmt: skip
    across = chosen @ sum(_cubic(real[rows], fake).sum(axis=0) for rows in _slices(count_real, len(fake)))
    within = sum((chosen[:, rows] @ _cubic(fake[rows], fake) * chosen).sum(axis=1)
                 for rows in _slices(len(fake), len(fake))) - chosen @ _cubic_diagonal(fake)  # fmt: skip
    return {"kernel": between_real + within / (counts * (counts - 1)) - 2 * across / (count_real * counts)}


def _cubic(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(N, M) kernel of rows."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def _cubic_diagonal(x: np.ndarray) -> np.ndarray:
    """(N,) kernel of each row with itself."""
    return (np.square(x).sum(axis=1) / x.shape[1] + 1) ** 3


# ---------------------------------------------------------------------------------------------------------------------
# Neighbours


def _precision_recall(real: np.ndarray, fake: np.ndarray, parts: np.ndarray, k: int = 3) -> dict[str, np.ndarray]:
    own_radii = _radii(fake, k, parts)  # P M
    (real_radii,) = _radii(real, k, np.ones((1, len(real)), dtype=bool))
    inside, recalled = np.zeros(len(fake), dtype=bool), np.zeros(len(parts))
    for rows, squared in _blocks(real, fake):
        inside |= (squared <= real_radii[rows, None]).any(axis=0)
        recalled += [(squared <= radii).any(axis=1).sum() for radii in own_radii]
    return {"precision": parts @ inside.astype(float) / parts.sum(axis=1), "recall": recalled / len(real)}


def _density_coverage(real: np.ndarray, fake: np.ndarray, parts: np.ndarray, k: int = 5) -> dict[str, np.ndarray]:
    (radii,) = _radii(real, k, np.ones((1, len(real)), dtype=bool))
    balls, covered, chosen = np.zeros(len(fake)), np.zeros(len(parts)), parts.T.astype(np.float32)
    for rows, squared in _blocks(real, fake):
        inside = squared <= radii[rows, None]
        balls += inside.sum(axis=0)
        covered += (inside.astype(np.float32) @ chosen > 0).sum(axis=0)
    return {"density": parts @ balls / parts.sum(axis=1) / k, "coverage": covered / len(real)}


def _radii(x: np.ndarray, k: int, parts: np.ndarray) -> np.ndarray:
    """(P, N) squared distance of each row to the k-th nearest other row of a part; -1 for rows outside the part."""
    radii = np.full(parts.shape, -1.0)
    for rows, squared in _blocks(x, x):
        own = np.arange(rows.start, rows.stop)
        squared[np.arange(len(own)), own] = np.inf
        for found, part in zip(radii, parts, strict=True):
            chosen = squared[part[rows]][:, part]
            if len(chosen):
                found[own[part[rows]]] = np.partition(chosen, k - 1, axis=1)[:, k - 1]
    return radii


def _blocks(x: np.ndarray, y: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """(rows, (rows, M) squared distances of these rows of x to all rows of y); equal rows have the distance 0."""
    middle = y.mean(axis=0)
    x, y = x - middle, y - middle
    x_squares, y_squares = np.square(x).sum(axis=1), np.square(y).sum(axis=1)
    for rows in _slices(len(x), len(y)):
        lengths = x_squares[rows, None] + y_squares
        squared = lengths - 2 * (x[rows] @ y.T)
        squared[squared < SAME * lengths] = 0
        yield rows, squared


# ---------------------------------------------------------------------------------------------------------------------
# Shared


def _slices(rows: int, columns: int) -> Iterator[slice]:
    """Slices of the rows of a matrix, each with few enough numbers for the memory."""
    step = max(1, ROWS_AT_ONCE // columns)
    return (slice(first, min(first + step, rows)) for first in range(0, rows, step))


def _checked(
    x: np.ndarray, y: np.ndarray, least: int, parts: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Both sets of features in float64, or a UserError."""
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise UserError(f"Features of shapes {x.shape} and {y.shape} can't be compared: both must be (pictures, "
                        "features) of the same network.")  # fmt: skip
    fewest = min(len(x), len(y) if parts is None else int(parts.sum(axis=1).min()))
    if fewest < least:
        raise UserError(f"A distance needs at least {counted(least, 'picture')} on each side, but there "
                        f"{'is' if fewest == 1 else 'are'} {counted(fewest, 'picture')}: give more "
                        "pictures.")  # fmt: skip
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise UserError(
            "Features hold NaN or infinity: the network can't judge these pictures; try another --network."
        )
    return x, y


def _whole(fake: np.ndarray) -> np.ndarray:
    """(1, M): the part that holds all pictures."""
    return np.ones((1, len(fake)), dtype=bool)


COMPUTED_TOGETHER: tuple[tuple[Callable[..., dict[str, np.ndarray]], tuple[str, ...], int], ...] = (
    (_frechet, ("frechet",), 2),  # the least number of pictures
    (_kernel, ("kernel",), 2),
    (_precision_recall, ("precision", "recall"), 4),
    (_density_coverage, ("density", "coverage"), 6),
)
DISTANCES = tuple(name for _, names, _ in COMPUTED_TOGETHER for name in names)
