"""A made-up `metrics.json` with everything in it, and pictures for its report: for tests of verdict and page."""

import math

import numpy as np
from PIL import Image

from lpl_finetuning.evaluation.verdict import MEASURES, ONE_STEP, judged

MEANS = {"frechet": 154.0, "kernel": 0.031, "precision": 0.61, "recall": 0.42, "density": 0.88, "coverage": 0.71}
LEVELS = [4.5, 3.5, 2.5, 1.5, 0.5, -0.5, -1.5, -2.5, -3.5, -4.5]


def difference(a, b, value, width, better, **more):
    """A row of differences, b minus a."""
    row = {"a": a, "b": b, "value": value, "low": value - width, "high": value + width, "better": better, **more}
    return row | {"verdict": judged(row["low"], row["high"], better) if better else "none"}


def distance_rows(names, networks, guidance, effect, width):
    """(distances, differences) in which each model is better than the one before by `effect` widths."""
    distances, rows = [], []
    for network in networks:
        for scale in guidance:
            for place, name in enumerate(names):
                factor = 1 - 0.01 * effect * place + 0.1 * (scale == 1.0)
                values = {key: mean * (factor if MEASURES[key].better == "lower" else 2 - factor)
                          for key, mean in MEANS.items()}  # fmt: skip
                distances.append({"model": name, "guidance": scale, "network": network["name"], **values,
                                  "memorisation": None})  # fmt: skip
            for b in names[1:]:
                for key, mean in MEANS.items():
                    sign = -1 if MEASURES[key].better == "lower" else 1
                    value = sign * 0.01 * effect * names.index(b) * mean
                    rows.append(difference(names[0], b, value, 0.01 * width * mean, MEASURES[key].better, metric=key,
                                           guidance=scale, network=network["name"]))  # fmt: skip
    return distances, rows


def one_step(names, networks, effect):
    """The one-step test, in which later models are a little better with noise."""
    keys = ["latent_mse", "gain", "lpl/mid", "lpl/up_0", "spread/mid", "spread/up_0", "psnr", "high_frequency"]
    keys += [f"perceptual/{network['name']}" for network in networks]
    curves = {"latent_mse": lambda n: 0.02 + 0.02 * n**1.5, "gain": lambda n: 1 + 0.03 * n,
              "psnr": lambda n: 34 - 2 * n, "high_frequency": lambda n: -0.06 * n, "spread": lambda n: 1 - 0.02 * n,
              "perceptual": lambda n: 0.3 + 0.2 * n, "lpl": lambda n: 0.1 + 0.08 * n}  # fmt: skip
    models, rows = [], []
    for place, name in enumerate(names):
        metrics = {}
        for key in keys:
            curve = curves[key.partition("/")[0]]
            means = [curve(n) * (1 - 0.005 * effect * place * n / 9) for n in range(10)]
            metrics[key] = [[mean, mean - 0.01 * abs(mean), mean + 0.01 * abs(mean)] for mean in means]
        models.append({"model": name, "metrics": metrics})
    for key in keys:
        better = getattr(ONE_STEP.get(key.partition("/")[0]), "better", None)
        for place, name in enumerate(names[1:], 1):
            values = [models[place]["metrics"][key][n][0] - models[0]["metrics"][key][n][0] for n in range(10)]
            for level, value in [(None, sum(values) / 10), *enumerate(values)]:
                rows.append(
                    difference(names[0], name, value, 0.0005 + abs(value) / 3, better, metric=key, level=level)
                )
    return {"levels": LEVELS, "pictures": 96, "models": models, "differences": rows}


def draw_pictures(folder, names, guidance, count, size=64):
    """Write made-up pictures; returns the rows of `pairs`."""
    y, x = np.mgrid[:size, :size] / size
    rows = []
    for index in range(count):
        rng = np.random.default_rng(index)
        hue, place = rng.uniform(0, 1, 3), rng.uniform(0.3, 0.7, 2)
        for scale in guidance:
            paths = {}
            for number, name in enumerate(["real", *names]):
                radius = 0.3 - 0.02 * number
                inside = ((x - place[0]) ** 2 + (y - place[1]) ** 2 < radius**2)[..., None]
                pixels = np.where(inside, hue * 255, 245 - 10 * number).astype(np.uint8)
                path = f"pictures/{name}/{scale:g}/{index}.png"
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(folder / path)
                paths[name] = path
            real = paths.pop("real")
            rows.append({"stem": str(index), "caption": f"picture number {index} of a <ball> & its shadow",
                         "guidance": scale, "real": real, "pictures": paths,
                         "difference": 1 / (1 + index)})  # fmt: skip
    return rows


def spectrum(names, guidance):
    """Power that falls with frequency; models lack the fine part."""
    frequencies = [(n + 0.5) / 32 for n in range(32)]
    real = [20 - 8 * f**0.5 for f in frequencies]
    models = []
    for scale in guidance:
        for place, name in enumerate(names):
            error = [-0.4 * f / (1 + place) for f in frequencies]
            models.append({"model": name, "guidance": scale, "error": error, "sharpness": [0.9, 0.87, 0.93],
                           "log_power": [power + off for power, off in zip(real, error, strict=True)]})  # fmt: skip
    return {"frequencies": frequencies, "real": real, "models": models}


def metrics_of(names=("without-lpl", "with-lpl"), guidance=(1.0, 3.0), effect=3.0, width=1.5, pairs=()):
    """The whole of it. effect: by how many percent each model beats the one before; width: of the intervals, in %."""
    networks = [
        {"name": "efficientnet-lite2", "label": "Fréchet distance (EfficientNet-Lite2)", "dims": 1280,
         "independent": True, "floor": {key: mean / 4 for key, mean in MEANS.items()},
         "warning": "96 pictures are few for 1,280 features."},
        {"name": "efficientnet-lite0", "label": "Fréchet distance (EfficientNet-Lite0)", "dims": 1280,
         "independent": False, "floor": {"frechet": 34.6}, "warning": None},
    ]  # fmt: skip
    names, guidance = list(names), list(guidance)
    distances, differences = distance_rows(names, networks, guidance, effect, width)
    return {
        "version": 1, "command": "python evaluate_models.py --real my-pictures --output report",
        "date": "2026-11-28",
        "device": "cpu",
        "settings": {"captions": 96, "steps": 25, "guidance": guidance, "size": 64, "sampler": "auto",
                     "seed": 0, "clip_model": "clip"},
        "real": {"folder": "my-pictures", "pictures": 96, "with_captions": 96},
        "models": [{"name": name, "kind": "pipeline", "prediction": "epsilon", "sampler": "DDIM"} for name in names],
        "networks": networks, "distances": distances, "differences": differences,
        "one_step": one_step(names, networks, effect), "spectrum": spectrum(names, guidance),
        "clip_score": [{"model": name, "guidance": scale, "value": 30.0, "low": 29.0, "high": 31.0}
                       for name in names for scale in guidance],
        "clip_differences": [difference(names[0], name, math.pi / 10, 0.5, "higher", guidance=scale)
                             for name in names[1:] for scale in guidance],
        "pairs": list(pairs), "seconds": {"pictures": 222.0, "features": 13.3}, "verdict": [],
    }  # fmt: skip
