"""Measurements of the experiment that need no samples: one-step tests, decoders, and the time of a step."""

import itertools
import json
import time

import numpy as np


def one_step_numbers(text, images, cache):
    """{measure: (L, N)} of the one-step test of a model on images (`CaptionedImage`) of 64 px; kept in the file
    `cache`. text: as for `evaluate_models.py --model`."""
    from lpl_finetuning.evaluation import comparison
    from lpl_finetuning.evaluation.models import find_source, load_pipeline
    from lpl_finetuning.evaluation.networks import load_network
    from lpl_finetuning.evaluation.onestep import OneStepSettings, one_step_of

    if not cache.is_file():
        import torch

        networks = [load_network(name) for name in ("efficientnet-lite2", "efficientnet-lite0")]
        pipeline = load_pipeline(find_source(text), torch.float32, "cpu")
        result = one_step_of(pipeline, images, 64, OneStepSettings(), networks, bar=False)
        cache.parent.mkdir(parents=True, exist_ok=True)
        comparison.save_arrays(cache, result.metrics)
    return comparison.load_arrays(cache)


def one_step_table(results, baselines=None, finalist=None):
    """One row per model: {"model", MEASURE: mean, MEASURE + "_change": [mean, low, high] against its baseline}.

    Measures are means over noise levels and pictures; the changes are paired over pictures, with 95 % intervals.

    Args:
        results: {model: {measure: (L, N)}}.
        baselines: {model: its baseline}, where that is not the first model.
        finalist: a model that all others but the first are compared with too, as MEASURE + "_finalist_change".
    """
    from lpl_finetuning.evaluation.uncertainty import paired_difference

    kept = ("latent_mse", "psnr", "high_frequency", "gain", "perceptual/efficientnet-lite2",
            "perceptual/efficientnet-lite0")  # fmt: skip
    means = {name: {key: values.mean(axis=0) for key, values in found.items()}
             for name, found in results.items()}  # fmt: skip
    first, rows = next(iter(means)), []
    for name, found in means.items():
        row = {"model": name}
        others = {"change": (baselines or {}).get(name, first), "finalist_change": finalist}
        for key in kept:
            row[key] = float(found[key].mean())
            for kind, other in others.items():
                if other in means and name not in (first, other):
                    change = paired_difference(found[key], means[other][key])
                    row[f"{key}_{kind}"] = [change.value, change.low, change.high]
        rows.append(row)
    return rows


def reconstructions(vae, pictures, batch_size=64):
    """Batches of (pictures, the same in [-1, 1], what the autoencoder makes of them), the last two (B, 3, H, W).

    Latents are the means of the posterior. pictures: uint8 (N, H, W, 3).
    """
    import torch

    for first in range(0, len(pictures), batch_size):
        images = torch.from_numpy(pictures[first : first + batch_size])
        x = images.permute(0, 3, 1, 2).float().div(127.5).sub(1)
        with torch.no_grad():
            yield images, x, vae.decode(vae.encode(x).latent_dist.mean).sample


def compare_decoders(decoders, train, held_out):
    """{decoder: {"psnr", "perceptual", "frechet"}} of reconstructions from the mean of the posterior.

    PSNR (dB) and the perceptual distance (EfficientNet-Lite2, unit-normalised features) are of the held-out pictures,
    the Fréchet distance (EfficientNet-Lite2) of all training pictures.

    Args:
        decoders: {name: folder of an autoencoder}.
        train, held_out: uint8 (N, H, W, 3).
    """
    import torch
    from diffusers import AutoencoderKL

    from lpl_finetuning.evaluation.distances import frechet_distance
    from lpl_finetuning.evaluation.networks import load_network
    from lpl_finetuning.evaluation.onestep import to_bytes, unit_length

    network, found, real = load_network("efficientnet-lite2"), {}, None

    for name, folder in decoders.items():
        vae = AutoencoderKL.from_pretrained(folder).eval()
        psnr, distances, ours, theirs = [], [], [], []
        for images, x, decoded in reconstructions(vae, held_out):
            error = (decoded.clamp(-1, 1) - x).square().mean(dim=(1, 2, 3))
            psnr += (10 * torch.log10(4 / error.clamp_min(1e-10))).tolist()
            stages = zip(network.stages(images), network.stages(to_bytes(decoded)), strict=True)
            by_stage = [(unit_length(a) - unit_length(b)).square().sum(dim=1).mean(dim=(1, 2)) for a, b in stages]
            distances += torch.stack(by_stage).mean(dim=0).tolist()
        for images, _, decoded in reconstructions(vae, train):
            ours.append(np.asarray(network(to_bytes(decoded))))
            theirs += [np.asarray(network(images))] if real is None else []
        real = np.concatenate(theirs) if real is None else real
        found[name] = {"psnr": float(np.mean(psnr)), "perceptual": float(np.mean(distances)),
                       "frechet": frechet_distance(real, np.concatenate(ours))}  # fmt: skip
    return found


def step_seconds(train, arms, steps=40, rounds=3):
    """{arm: seconds of a training step}, medians over rounds in which the arms take turns.

    Args:
        train: function (arm, steps, round) that trains so many steps and returns the run's `metrics.jsonl`.
        arms: names.
        steps: of a run; the first half is not counted.
        rounds: runs of each arm.
    """
    found = {arm: [] for arm in arms}
    for number, arm in itertools.product(range(rounds), arms):
        began = time.time()
        rows = [json.loads(line) for line in train(arm, steps, number).read_text().splitlines()]
        speeds = [row["samples_per_second"] for row in rows if row.get("step", 0) > steps // 2]
        speeds = [speed for speed in speeds if speed]
        if not speeds:
            raise SystemExit(f"the run of {arm} logged no speed after step {steps // 2}")
        found[arm].append(1 / float(np.median(speeds)))
        print(f"{arm}, round {number + 1}: {found[arm][-1]:.4f} s a sample ({time.time() - began:.0f} s)")
    return {arm: float(np.median(values)) for arm, values in found.items()}
