"""Intervals: how often they cover the truth, and that they answer for few, constant and unpaired pictures."""

import numpy as np
import pytest

from lpl_finetuning.errors import UserError
from lpl_finetuning.evaluation import uncertainty as module
from lpl_finetuning.evaluation.distances import DISTANCES, frechet_distance, kernel_distance, precision_recall
from lpl_finetuning.evaluation.uncertainty import (
    Interval,
    distance_differences,
    enough_pictures,
    jackknife_difference,
    mean_interval,
    paired_difference,
    t_quantile,
)

CASES = 200


def two_models(seed, paired, count=100, dims=12, others=None):
    """Real features, and those of two models of one distribution that is not quite the real one.

    Paired: half of the variance is common to both models, as with the same captions and seeds.
    """
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).standard_normal((dims, dims)) * np.logspace(0, -1.5, dims)
    common = rng.standard_normal((count, dims)) if paired else 0
    real = rng.standard_normal((150, dims)) @ mixing.T
    a, b = ((common + rng.standard_normal((size, dims))) / np.sqrt(1 + paired) for size in (count, others or count))
    return real, 0.9 * a @ mixing.T + 0.1, 0.9 * b @ mixing.T + 0.1


@pytest.fixture(scope="module", params=[True, False], ids=["paired", "unpaired"])
def covered(request):
    """{name: share of intervals that hold 0} in 200 cases of two models of one distribution."""
    found = dict.fromkeys(DISTANCES, 0)
    for seed in range(CASES):
        intervals = distance_differences(*two_models(seed, request.param), paired=request.param, seed=seed)
        for name, interval in intervals.items():
            found[name] += interval.holds_zero / CASES
    return found


@pytest.mark.parametrize("name", DISTANCES)
def test_intervals_of_one_distribution_cover_zero(covered, name):
    """Of 100 cases a right interval covers fewer than 90 in 1 of 90 trials; with 12 trials that is too often."""
    assert 0.90 <= covered[name] <= 0.99


def test_pairs_make_intervals_narrower():
    """On average: the width of one interval is itself an estimate."""
    widths = {True: dict.fromkeys(DISTANCES, 0.0), False: dict.fromkeys(DISTANCES, 0.0)}
    for seed in range(10):
        models = two_models(seed, True)
        found = {paired: distance_differences(*models, paired=paired) for paired in widths}
        for name in DISTANCES:
            assert found[True][name].value == found[False][name].value
            for paired in widths:
                widths[paired][name] += found[paired][name].high - found[paired][name].low
    for name in ("frechet", "kernel", "density"):
        assert widths[True][name] < 0.95 * widths[False][name]


def test_a_worse_model_is_noticed():
    real, a, b = two_models(0, False)
    found = distance_differences(real, a + 0.6, b, paired=False)
    assert found["frechet"].low > 0 and found["kernel"].low > 0 and found["density"].high < 0


def difference(real, a, b, name, *more, **options):
    """The difference of one distance alone."""
    return distance_differences(real, a, b, (name,), *more, **options)[name]


def test_values_are_the_differences_of_the_distances():
    real, a, b = two_models(1, True)
    found = distance_differences(real, a, b)
    expected = {"frechet": frechet_distance(real, a) - frechet_distance(real, b),
                "kernel": kernel_distance(real, a) - kernel_distance(real, b),
                "recall": precision_recall(real, a)[1] - precision_recall(real, b)[1]}  # fmt: skip
    assert {name: found[name].value for name in expected} == pytest.approx(expected)
    assert difference(real, a, b, "recall") == found["recall"]


@pytest.mark.parametrize("name", DISTANCES)
def test_exchanged_models_have_the_opposite_difference(name):
    real, a, b = two_models(2, True)
    one, other = difference(real, a, b, name), difference(real, b, a, name)
    assert (one.value, one.low, one.high) == pytest.approx((-other.value, -other.high, -other.low))


def test_a_model_and_itself():
    real, a, _ = two_models(3, True)
    for interval in distance_differences(real, a, a).values():
        assert interval == Interval(0, 0, 0) and interval.holds_zero


def test_more_pictures_of_one_model_are_no_advantage():
    """The Fréchet distance of 300 pictures is far below that of 30 of the same model."""
    real, a, b = two_models(4, False, count=30, others=300)
    assert frechet_distance(real, a) - frechet_distance(real, b) > 0.2
    assert difference(real, a, b, "frechet", paired=False).holds_zero
    with pytest.raises(UserError, match="as many on both sides, not 30 and 300"):
        difference(real, a, b, "frechet")


def test_few_pictures():
    real, a, b = two_models(5, True, count=7)
    assert all(np.isfinite([each.low, each.high]).all() for each in distance_differences(real, a, b).values())
    few, many = (difference(real, a, b, "frechet", groups) for groups in (3, 20))
    assert few == many  # of seven pictures three groups of two or three can be made
    with pytest.raises(UserError, match="at least 4 pictures of each model, not 3"):
        distance_differences(real, a[:3], b[:3])


def test_the_jackknife_of_a_mean_is_its_standard_error():
    """With a group for each picture the jackknife's variance is that of a mean, s^2 / N."""
    values = np.random.default_rng(0).standard_normal(30)
    without = (values.sum() - values) / 29
    zero = np.zeros(31)
    interval = jackknife_difference(np.array([values.mean(), *without]), zero, paired=True)
    reach = t_quantile(29) * values.std(ddof=1) / np.sqrt(30)
    assert interval.high - interval.value == pytest.approx(reach)
    both = np.array([values.mean(), *without])
    wide = jackknife_difference(both, both, paired=False)
    assert wide.high == pytest.approx(np.sqrt(2) * values.std(ddof=1) / np.sqrt(30) * t_quantile(58))


@pytest.mark.parametrize("count, least, most", [(10, 0.91, 0.99), (60, 0.91, 0.99)])
def test_intervals_of_means_cover_the_mean(count, least, most):
    rng = np.random.default_rng(count)
    held = sum(mean_interval(rng.standard_normal(count), seed).holds_zero for seed in range(CASES))
    assert least <= held / CASES <= most


def test_paired_differences_of_means():
    rng = np.random.default_rng(0)
    common = rng.standard_normal(50) * 10
    a, b = common + 1 + 0.1 * rng.standard_normal(50), common
    interval = paired_difference(a, b)
    assert interval.value == pytest.approx((a - b).mean()) and 0.9 < interval.low < interval.high < 1.1
    with pytest.raises(UserError, match="not 50 and 49"):
        paired_difference(a, b[:49])
    for wrong in ([1.0], [1.0, np.nan, 2.0]):
        with pytest.raises(UserError, match="finite numbers of at least 2 pictures"):
            mean_interval(wrong)


@pytest.mark.parametrize("degrees, expected", [(1, 12.7062), (2, 4.3027), (9, 2.2622), (19, 2.0930), (30, 2.0423),
                                               (120, 1.9799), (10**6, 1.961)])  # fmt: skip
def test_students_t(degrees, expected):
    """From printed tables."""
    assert t_quantile(degrees) == pytest.approx(expected, abs=2e-4)


def test_enough_pictures():
    assert enough_pictures(1280, 6400, "Lite2") is None
    below = enough_pictures(1280, 1536, "Lite2")
    assert "needs about 6,400 pictures" in below and "1,536" in below and "fewer than features" not in below
    assert "fewer than features" in enough_pictures(1280, 189, "Lite2")


def test_seeds_make_the_same_interval():
    models = two_models(6, True)
    assert distance_differences(*models, seed=1) == distance_differences(*models, seed=1)
    assert distance_differences(*models, seed=1) != distance_differences(*models, seed=2)
    assert module.GROUPS > 10
