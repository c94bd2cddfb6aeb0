"""What goes into `metrics.json`: rows of numbers, made of features and per-picture numbers.

Shapes: N pictures, D features, L noise levels. A difference is b minus a.
"""

import hashlib
import io
import json
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path

import numpy as np

from lpl_finetuning.evaluation.distances import (
    density_coverage,
    frechet_distance,
    kernel_distance,
    nearest_distances,
    precision_recall,
)
from lpl_finetuning.evaluation.picture_sets import PictureSet, batches
from lpl_finetuning.evaluation.spectrum import radial_log_power, sharpness
from lpl_finetuning.evaluation.uncertainty import Interval, distance_differences, mean_interval, paired_difference
from lpl_finetuning.evaluation.verdict import MEASURES, ONE_STEP, judged
from lpl_finetuning.files import write_whole

NAMES = tuple(MEASURES)  # of the distances
MOST_FOR_ALL_PAIRS = 3  # models of which every pair is compared; of more, each with the first


def pairs_to_compare(names: Sequence[str]) -> list[tuple[str, str]]:
    """Pairs (a, b) of models: all of them when few, else each against the first."""
    pairs = list(combinations(names, 2))
    return pairs if len(names) <= MOST_FOR_ALL_PAIRS else [pair for pair in pairs if pair[0] == names[0]]


class Memory:
    """Numbers that were computed before, one small JSON file each, so that a second start is quick."""

    def __init__(self, folder: Path):
        self.folder = folder

    def recall(self, compute: Callable[[], dict], *key: str | np.ndarray) -> dict:
        """What `compute` returns, or returned earlier for the same key."""
        content = hashlib.sha256()
        for part in key:
            data = part.encode() if isinstance(part, str) else f"{part.shape}".encode() + part.tobytes()
            content.update(len(data).to_bytes(8, "little") + data)
        path = self.folder / f"{content.hexdigest()[:32]}.json"
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            found = compute()
            write_whole(path, json.dumps(found).encode())
            return found


def save_arrays(file: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write arrays whole or not at all; names may hold slashes."""
    content = io.BytesIO()
    np.savez(content, **{name.replace("/", "|"): values for name, values in arrays.items()})
    write_whole(file, content.getvalue())


def load_arrays(file: Path) -> dict[str, np.ndarray]:
    """What `save_arrays` wrote."""
    with np.load(file) as arrays:
        return {name.replace("|", "/"): arrays[name] for name in arrays.files}


# ---------------------------------------------------------------------------------------------------------------------
# Distances


def all_distances(real: np.ndarray, fake: np.ndarray, memory: Memory) -> dict[str, float]:
    """{measure: value} of generated features (M, D) against real ones (N, D)."""

    def compute() -> dict[str, float]:
        precision, recall = precision_recall(real, fake)
        density, coverage = density_coverage(real, fake)
        return {"frechet": frechet_distance(real, fake), "kernel": kernel_distance(real, fake),
                "precision": precision, "recall": recall, "density": density, "coverage": coverage}  # fmt: skip

    return memory.recall(compute, "distances", real, fake)


def floor(real: np.ndarray, seed: int, memory: Memory) -> dict[str, float] | None:
    """The same for one half of the real pictures against the other half; None for fewer than 16 pictures."""
    if len(real) < 16:
        return None
    order = np.random.default_rng(seed).permutation(len(real))
    half = len(real) // 2
    return all_distances(real[order[:half]], real[order[half : 2 * half]], memory)


def difference_rows(
    real: np.ndarray, a: np.ndarray, b: np.ndarray, paired: bool, seed: int, memory: Memory
) -> list[dict]:
    """[{"metric", "value", "low", "high", "better", "verdict"}] of features of two models, (M, D) each.

    Args:
        real: features of the real pictures, (N, D).
        a, b: features of the models' pictures.
        paired: whether picture n of both models has the same caption and seed.
        seed: of the groups.
        memory: of earlier starts.
    """

    def compute() -> dict[str, dict[str, float]]:
        found = distance_differences(real, b, a, NAMES, paired=paired, seed=seed)
        return {name: _ends(interval) for name, interval in found.items()}

    found = memory.recall(compute, f"differences {paired} {seed}", real, a, b)
    return [{"metric": name, **_judged(found[name], measure.better)} for name, measure in MEASURES.items()]


def memorisation(real: np.ndarray, fake: np.ndarray, held_out: np.ndarray, seed: int, memory: Memory) -> dict:
    """Distances to the nearest training picture, of generated and of held-out pictures.

    Returns:
        "generated" and "held_out" are medians; "value", "low", "high" the difference of the means, generated minus
        held out, with its interval.
    """

    def compute() -> dict:
        ours, theirs = nearest_distances(fake, real), nearest_distances(held_out, real)
        one, other = mean_interval(ours, seed), mean_interval(theirs, seed)
        value = one.value - other.value
        return {
            "generated": float(np.median(ours)),
            "held_out": float(np.median(theirs)),
            "value": float(value),
            "low": float(value - np.hypot(one.value - one.low, other.high - other.value)),
            "high": float(value + np.hypot(one.high - one.value, other.value - other.low)),
        }

    return memory.recall(compute, f"memorisation {seed}", real, fake, held_out)


def _ends(interval: Interval) -> dict[str, float]:
    return {"value": float(interval.value), "low": float(interval.low), "high": float(interval.high)}


def _judged(found: dict[str, float], better: str | None) -> dict:
    verdict = judged(found["low"], found["high"], better) if better else "none"
    return {**found, "better": better, "verdict": verdict}


# ---------------------------------------------------------------------------------------------------------------------
# Means over pictures


def one_step_rows(results: dict[str, dict[str, np.ndarray]], levels: Sequence[float], seed: int) -> dict:
    """The part "one_step" of the metrics.

    Args:
        results: {model: {measure: (L, N)}}, the same pictures for all.
        levels: log-SNR of each level.
        seed: of the bootstrap.
    """
    models, differences = [], []
    for name, metrics in results.items():
        bands = {key: [list(_ends(mean_interval(row, seed)).values()) for row in values]
                 for key, values in metrics.items()}  # fmt: skip
        models.append({"model": name, "metrics": bands})
    for a, b in pairs_to_compare(list(results)):
        for key in results[a].keys() & results[b].keys():
            better = getattr(ONE_STEP.get(key.partition("/")[0]), "better", None)
            of_a, of_b = results[a][key], results[b][key]
            places = [(None, of_a.mean(axis=0), of_b.mean(axis=0))]
            places += [(level, of_a[level], of_b[level]) for level in range(len(levels))]
            for level, first, second in places:
                found = _ends(paired_difference(second, first, seed))
                differences.append({"a": a, "b": b, "metric": key, "level": level, **_judged(found, better)})
    count = next(iter(next(iter(results.values())).values())).shape[1]
    return {"levels": list(levels), "pictures": count, "models": models, "differences": differences}


def mean_row(values: np.ndarray, seed: int) -> dict[str, float]:
    """{"value", "low", "high"} of the mean over pictures."""
    return _ends(mean_interval(values, seed))


def paired_row(a: np.ndarray, b: np.ndarray, better: str, seed: int) -> dict:
    """A judged difference of means over the same pictures, b minus a."""
    return _judged(_ends(paired_difference(b, a, seed)), better)


def most_different(features: Sequence[np.ndarray]) -> np.ndarray:
    """(N,) largest distance between the features of any two models' pictures of a caption; zeros for one model."""
    distances = [np.linalg.norm(a - b, axis=1) for a, b in combinations(features, 2)]
    return np.max(distances, axis=0) if distances else np.zeros(len(features[0]))


def mean_spectrum(files: Sequence[Path], seed: int) -> tuple[np.ndarray, np.ndarray, list[float]]:
    """(frequencies, mean log power, [sharpness, low, high]) of picture files of one size."""
    powers, sharp, frequencies = [], [], None
    for images in batches(files):
        frequencies, power = radial_log_power(images)
        powers.append(power)
        sharp.append(sharpness(images))
    return frequencies, np.concatenate(powers).mean(axis=0), list(mean_row(np.concatenate(sharp), seed).values())


def score_all(score: Callable, pictures: PictureSet, captions: dict[str, str]) -> np.ndarray:
    """(N,) CLIPScore of pictures, in the order of `captions`, {stem: caption}."""
    texts, found = list(captions.values()), []
    for images in batches(pictures.of(list(captions)).files):
        first = sum(map(len, found))
        found.append(np.asarray(score(images, texts[first : first + len(images)])))
    return np.concatenate(found)
