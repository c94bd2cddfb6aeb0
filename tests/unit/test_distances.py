"""Distances between sets of features: closed forms, other implementations, degenerate sets, parts of sets."""

import sys
import types

import numpy as np
import pytest
import torch

from lpl_finetuning.errors import UserError
from lpl_finetuning.evaluation import distances as module
from lpl_finetuning.evaluation.distances import (
    DISTANCES,
    density_coverage,
    distances_of_parts,
    frechet_distance,
    kernel_distance,
    nearest_distances,
    precision_recall,
)

RNG = np.random.default_rng(0)


def correlated(count, dims, seed=0, shift=0.0):
    """Features (count, dims) like those of a network: correlated, with variances over four decades, not negative."""
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).standard_normal((dims, dims)) * np.logspace(0, -2, dims)
    return np.maximum(rng.standard_normal((count, dims)) @ mixing.T + shift, -1).astype(np.float32)


def every_distance(real, fake):
    """{name: number} by the functions that return one number."""
    precision, recall = precision_recall(real, fake)
    density, coverage = density_coverage(real, fake)
    return {"frechet": frechet_distance(real, fake), "kernel": kernel_distance(real, fake), "precision": precision,
            "recall": recall, "density": density, "coverage": coverage}  # fmt: skip


def with_moments(count, mean, covariance, seed):
    """A set (count, D) whose sample mean and covariance are exactly these."""
    x = np.random.default_rng(seed).standard_normal((count, len(mean)))
    x = np.linalg.qr(x - x.mean(axis=0))[0] * np.sqrt(count - 1)
    return x @ np.linalg.cholesky(covariance).T + mean


@pytest.mark.parametrize("count", [500, 40])
def test_frechet_of_two_gaussians_with_one_basis(count):
    """Covariances that commute: the distance is that of the means plus that of the standard deviations."""
    a, b = np.linspace(0.5, 3, 20), np.linspace(2, 0.1, 20)
    means = np.linspace(-1, 1, 20), np.linspace(0, 3, 20)
    x, y = (with_moments(count, mean, np.diag(deviations**2), seed)
            for seed, (mean, deviations) in enumerate(zip(means, (a, b), strict=True)))  # fmt: skip
    expected = np.square(means[0] - means[1]).sum() + np.square(a - b).sum()
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-10)


def test_frechet_of_two_gaussians_in_the_plane():
    """For 2 x 2 matrices the trace of the root of C is sqrt(tr C + 2 sqrt(det C))."""
    first, second = np.array([[2.0, 0.8], [0.8, 1.0]]), np.array([[0.7, -0.5], [-0.5, 1.5]])
    x, y = with_moments(30, np.zeros(2), first, 0), with_moments(50, np.array([1.0, 2.0]), second, 1)
    product = first @ second
    root = np.sqrt(np.trace(product) + 2 * np.sqrt(np.linalg.det(product)))
    assert frechet_distance(x, y) == pytest.approx(5 + np.trace(first + second) - 2 * root, rel=1e-10)


@pytest.mark.parametrize("counts", [(300, 200), (300, 20), (20, 300), (20, 15)])
def test_frechet_agrees_with_torchmetrics(counts):
    """Torchmetrics takes the eigenvalues of the product of covariances, also where they are singular."""
    fid = pytest.importorskip("torchmetrics.image.fid", reason="torchmetrics is in requirements-dev.txt")
    x, y = correlated(counts[0], 32), correlated(counts[1], 32, seed=1, shift=0.2)

    class Given(torch.nn.Module):
        num_features = 32

        def forward(self, features):
            return features

    metric = fid.FrechetInceptionDistance(feature=Given()).set_dtype(torch.float64)
    metric.update(torch.from_numpy(x), real=True)
    metric.update(torch.from_numpy(y), real=False)
    assert frechet_distance(x, y) == pytest.approx(float(metric.compute()), rel=1e-4)


def test_kernel_agrees_with_torchmetrics():
    kid = pytest.importorskip("torchmetrics.image.kid", reason="torchmetrics is in requirements-dev.txt")
    x, y = correlated(120, 16), correlated(120, 16, seed=1, shift=0.2)
    expected = kid.poly_mmd(torch.from_numpy(x).double(), torch.from_numpy(y).double())
    assert kernel_distance(x, y) == pytest.approx(float(expected), rel=1e-8)


def test_kernel_is_the_mean_over_pairs():
    """Written out for sets of different size."""
    x, y = RNG.standard_normal((5, 3)), RNG.standard_normal((4, 3))

    def kernel(a, b):
        return (a @ b / 3 + 1) ** 3

    within = [np.mean([kernel(a, b) for i, a in enumerate(s) for j, b in enumerate(s) if i != j]) for s in (x, y)]
    expected = sum(within) - 2 * np.mean([kernel(a, b) for a in x for b in y])
    assert kernel_distance(x, y) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_neighbours_agree_with_prdc(monkeypatch, k):
    """Prdc takes nothing but the distance matrix from scikit-learn; the test provides this function."""

    def pairwise_distances(x, y, metric, n_jobs):
        assert metric == "euclidean"
        return np.linalg.norm(x[:, None] - y[None], axis=2)

    stand_in = types.ModuleType("sklearn.metrics")
    stand_in.pairwise_distances, stand_in.pairwise = pairwise_distances, types.SimpleNamespace()
    stand_in.pairwise.pairwise_distances = pairwise_distances
    package = types.ModuleType("sklearn")
    package.metrics = stand_in
    monkeypatch.setitem(sys.modules, "sklearn", package)
    monkeypatch.setitem(sys.modules, "sklearn.metrics", stand_in)
    prdc = pytest.importorskip("prdc", reason="prdc is not installed: pip install --no-deps prdc==0.2")
    real, fake = correlated(150, 8), correlated(90, 8, seed=1, shift=0.3)
    expected = prdc.compute_prdc(real.astype(float), fake.astype(float), k)
    precision, recall = precision_recall(real, fake, k)
    density, coverage = density_coverage(real, fake, k)
    assert {"precision": precision, "recall": recall, "density": density, "coverage": coverage} == pytest.approx(
        expected, abs=1e-12
    )


def test_neighbours_on_a_line():
    """Real pictures at 0, 1, 2, 3; balls of radius 1 with k = 1, closed."""
    real, fake = np.arange(4.0)[:, None], np.array([[0.5], [4.0], [4.5], [9.0]])
    assert precision_recall(real, fake, k=1) == (0.5, 1)  # 0.5 and 4; the ball of 0.5 reaches to 4
    density, coverage = density_coverage(real, fake, k=1)
    assert density == 3 / 4 and coverage == 3 / 4
    touching = np.array([[4.0], [5.0], [20.0], [20.5]])  # the ball of 4 ends at 3
    assert precision_recall(real, touching, k=1)[1] == 1 / 4


def test_nearest_distances_over_blocks(monkeypatch):
    x, y = RNG.standard_normal((50, 3)), RNG.standard_normal((20, 3))
    monkeypatch.setattr(module, "ROWS_AT_ONCE", 7 * 20)
    expected = np.linalg.norm(x[:, None] - y[None], axis=2).min(axis=1)
    np.testing.assert_allclose(nearest_distances(x, y), expected, rtol=1e-9)
    np.testing.assert_array_equal(nearest_distances(y, y), 0)


@pytest.mark.parametrize("rows", [2**25, 300])
@pytest.mark.parametrize("dims", [5, 40, 90])
def test_parts_have_the_distances_of_their_pictures(monkeypatch, dims, rows):
    """Fewer and more pictures than features, in one block and in several."""
    real, fake = correlated(60, dims), correlated(43, dims, seed=1, shift=0.1)
    parts = RNG.random((6, 43)) < np.array([2, 0.9, 0.9, 0.5, 0.5, 0.3])[:, None]
    expected = [every_distance(real, fake[part]) for part in parts]
    monkeypatch.setattr(module, "ROWS_AT_ONCE", rows)
    found = distances_of_parts(real, fake, parts)
    assert tuple(found) == DISTANCES
    for name, values in found.items():
        np.testing.assert_allclose(values, [each[name] for each in expected], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("dims", [3, 50])
def test_a_set_and_itself(dims):
    x = correlated(30, dims)
    found = every_distance(x, x)
    scale = float(np.square(x - x.mean(axis=0)).sum() / 29)
    assert found["frechet"] == pytest.approx(0, abs=1e-6 * scale) and found["frechet"] >= 0
    assert found["kernel"] < 0  # the unbiased estimate leaves out the pairs of a picture with itself
    assert (found["precision"], found["recall"], found["coverage"]) == (1, 1, 1)


def test_rounding_makes_no_negative_distance():
    sets = [correlated(count, 8, seed) for count in (6, 30, 200) for seed in range(10)]
    assert min(frechet_distance(x, x) for x in sets) == 0


def degenerate(name):
    """(real, fake) of one kind."""
    x, y = correlated(30, 12), correlated(25, 12, seed=1)
    if name == "constant features":
        x[:, :5] = y[:, :5] = 0.37
    if name == "all pictures alike":
        x[:] = y[:] = x[0]
    if name == "fake pictures alike":
        y[:] = y[0]
    if name == "real pictures alike":
        x[:] = x[0]
    if name == "zeros":
        x[:] = y[:] = 0
    if name == "copied features":
        x, y = np.repeat(x, 4, axis=1), np.repeat(y, 4, axis=1)
    if name == "copied pictures":
        x = np.repeat(x[:4], 8, axis=0)
    if name == "far from zero":
        x, y = x + 1e4, y + 1e4
    if name == "few pictures":
        x, y = x[:9], y[:9]
    return x, y


@pytest.mark.parametrize("name", ["constant features", "all pictures alike", "fake pictures alike", "zeros",
                                  "real pictures alike", "copied features", "copied pictures", "far from zero",
                                  "few pictures"])  # fmt: skip
def test_degenerate_sets_have_a_distance(name):
    real, fake = degenerate(name)
    found = distances_of_parts(real, fake, np.arange(-1, 3)[:, None] != np.arange(len(fake)) % 3)
    assert all(np.isfinite(values).all() for values in found.values())
    assert (found["frechet"] >= 0).all()
    if name in ("all pictures alike", "zeros"):
        assert found["frechet"] == pytest.approx(0, abs=1e-12) and found["kernel"] == pytest.approx(0, abs=1e-9)
        assert (found["precision"] == 1).all() and (found["coverage"] == 1).all()
    if name == "copied features":
        assert found["frechet"][0] == pytest.approx(4 * frechet_distance(real[:, ::4], fake[:, ::4]), rel=1e-6)


@pytest.mark.parametrize("distance, least", [(frechet_distance, 2), (kernel_distance, 2), (precision_recall, 4),
                                             (density_coverage, 6), (nearest_distances, 1)])  # fmt: skip
def test_wrong_features_are_refused(distance, least):
    x = correlated(20, 4)
    for few in ((x, x[: least - 1]), (x[: least - 1], x)):
        with pytest.raises(UserError, match=f"at least {least} picture"):
            distance(*few)
    with pytest.raises(UserError, match="can't be compared"):
        distance(x, x[:, :3])
    for wrong in (np.nan, np.inf):
        with pytest.raises(UserError, match="NaN or infinity"):
            distance(x, np.where(x == x[3, 2], wrong, x))
        with pytest.raises(UserError, match="NaN or infinity"):
            distance(np.where(x == x[3, 2], wrong, x), x)


def test_small_parts_are_refused():
    x = correlated(20, 4)
    with pytest.raises(UserError, match="at least 4 pictures on each side, but there are 3"):
        distances_of_parts(x, x, np.arange(20)[None] < np.array([20, 3])[:, None])


def test_only_what_is_asked_for_is_computed(monkeypatch):
    monkeypatch.setattr(np.linalg, "eigvalsh", lambda _: pytest.fail("the Fréchet distance was not asked for"))
    x = correlated(20, 4)
    assert list(distances_of_parts(x, x, np.ones((1, 20)), ("recall", "kernel"))) == ["recall", "kernel"]
