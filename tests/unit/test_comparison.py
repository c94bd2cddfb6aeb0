"""Rows of metrics from features and numbers per picture: signs, verdicts, and what is not computed twice."""

import numpy as np
import pytest

from lpl_finetuning.evaluation import comparison
from lpl_finetuning.evaluation.comparison import Memory, load_arrays, pairs_to_compare, save_arrays


@pytest.fixture
def memory(tmp_path):
    return Memory(tmp_path / "numbers")


def clouds(count=200, dims=4):
    """Features of real pictures, and of two models of which the second is nearer to them."""
    rng = np.random.default_rng(0)
    real, noise = rng.normal(size=(count, dims)), rng.normal(size=(count, dims))
    return [features.astype(np.float32) for features in (real, noise + 1.0, noise + 0.2)]


def test_few_models_are_compared_in_all_pairs_and_many_with_the_baseline():
    assert pairs_to_compare(["a", "b", "c"]) == [("a", "b"), ("a", "c"), ("b", "c")]
    assert pairs_to_compare(["a", "b", "c", "d"]) == [("a", "b"), ("a", "c"), ("a", "d")]
    assert pairs_to_compare(["a"]) == []


@pytest.mark.parametrize("paired", [True, False])
def test_the_nearer_model_is_better_by_every_distance(memory, paired):
    real, far, near = clouds()
    rows = {row["metric"]: row for row in comparison.difference_rows(real, far, near, paired, 0, memory)}
    assert [rows[name]["verdict"] for name in ("frechet", "kernel", "precision", "coverage")] == ["b"] * 4
    assert rows["frechet"]["value"] < 0 < rows["coverage"]["value"], "b minus a"
    swapped = {row["metric"]: row for row in comparison.difference_rows(real, near, far, paired, 0, memory)}
    assert swapped["frechet"]["verdict"] == "a"
    assert swapped["frechet"]["value"] == pytest.approx(-rows["frechet"]["value"])
    values = [comparison.all_distances(real, features, memory)["frechet"] for features in (far, near)]
    assert rows["frechet"]["value"] == pytest.approx(values[1] - values[0])


def test_a_model_does_not_differ_from_itself(memory):
    real, far, _ = clouds()
    rows = comparison.difference_rows(real, far, far, True, 0, memory)
    assert all(row["verdict"] == "none" and row["value"] == 0 for row in rows)


def test_numbers_are_computed_once_for_the_same_features(memory, monkeypatch):
    real, far, near = clouds()
    first = comparison.difference_rows(real, far, near, True, 0, memory), comparison.all_distances(real, far, memory)
    monkeypatch.setattr(comparison, "distance_differences", None)
    monkeypatch.setattr(comparison, "frechet_distance", None)
    again = comparison.difference_rows(real, far, near, True, 0, memory), comparison.all_distances(real, far, memory)
    assert again == first
    for other in ((real, far, near + 1, True, 0), (real, far, near, False, 0), (real, far, near, True, 1)):
        with pytest.raises(TypeError):
            comparison.difference_rows(*other, memory)
    for file in memory.folder.iterdir():
        file.write_text("no JSON")
    with pytest.raises(TypeError):
        comparison.all_distances(real, far, memory)


def test_the_floor_compares_halves(memory):
    real, *_ = clouds()
    assert 0 < comparison.floor(real, 0, memory)["frechet"] < 0.3
    assert comparison.floor(real[:10], 0, memory) is None


def test_copies_lie_nearer_to_training_pictures(memory):
    real, *_ = clouds()
    held_out = np.random.default_rng(1).normal(size=(50, 4)).astype(np.float32)
    fresh = np.random.default_rng(2).normal(size=(50, 4)).astype(np.float32)
    copied = comparison.memorisation(real, real[:50] + 0.01, held_out, 0, memory)
    assert copied["generated"] < 0.05 < copied["held_out"] and copied["high"] < 0
    honest = comparison.memorisation(real, fresh, held_out, 0, memory)
    assert honest["low"] < 0 < honest["high"]


def test_rows_of_the_one_step_test():
    """Measures with an ideal value get no verdict; the difference over all levels has no level."""
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(2, 30))
    a = {"psnr": 20 + noise, "latent_mse": 1 + 0 * noise, "spread/mid": 0.8 + 0.01 * noise}
    b = {
        "psnr": 21 + noise + 0.1 * rng.normal(size=(2, 30)),
        "latent_mse": 1 + 0 * noise,
        "spread/mid": 0.9 + 0 * noise,
    }
    found = comparison.one_step_rows({"a": a, "b": b}, [1.0, -1.0], 0)
    assert found["pictures"] == 30 and [model["model"] for model in found["models"]] == ["a", "b"]
    rows = {(row["metric"], row["level"]): row for row in found["differences"]}
    assert len(rows) == 3 * 3
    assert rows["psnr", None]["verdict"] == rows["psnr", 0]["verdict"] == "b"
    assert 0.9 < rows["psnr", None]["low"] < 1 < rows["psnr", None]["high"] < 1.1
    assert rows["latent_mse", 1]["verdict"] == "none"
    assert rows["spread/mid", None]["verdict"] == "none" and rows["spread/mid", None]["better"] is None
    mean, low, high = found["models"][0]["metrics"]["psnr"][0]
    assert low < mean < high and mean == pytest.approx(a["psnr"][0].mean())


def test_pictures_are_ordered_by_the_largest_difference():
    a, b, c = np.zeros((3, 2)), np.array([[1, 0], [0, 0], [0, 2.0]]), np.array([[0, 0], [5, 0], [0, 0.0]])
    assert comparison.most_different([a, b, c]).tolist() == [1, 5, 2]
    assert comparison.most_different([a]).tolist() == [0, 0, 0]


def test_arrays_with_slashes_in_their_names(tmp_path):
    save_arrays(tmp_path / "a" / "b.npz", {"lpl/mid": np.arange(3)})
    assert load_arrays(tmp_path / "a" / "b.npz")["lpl/mid"].tolist() == [0, 1, 2]
