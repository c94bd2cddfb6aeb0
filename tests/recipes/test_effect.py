"""The experiment's arms: what is added to a training script, and that nothing else changes."""

import json

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from benchmarks import effect, effect_arm
from lpl_finetuning.training import objective, reporter
from lpl_finetuning.training.objective import Objective
from tests.sdxl import run, train_sdxl_lpl


def test_bins_end_at_the_gate():
    abar = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012).alphas_cumprod
    ratios = ((1 - abar) / abar).sqrt().numpy()
    for edges in (effect_arm.bin_edges(abar), effect_arm.bin_edges()):
        assert len(edges) == 11 and (np.diff(edges) > 0).all() and edges[-1] == pytest.approx(3, abs=0.02)
    per_bin = np.histogram(ratios, effect_arm.bin_edges(abar))[0]
    assert np.ptp(per_bin) <= 1, "equally many timesteps"


def test_each_noise_level_has_the_weight_of_its_bin():
    weights = effect_arm.level_weights({"edges": [0, 1, 2, 3], "weights": [5.0, 6.0, 7.0]})
    sigma = torch.tensor([0.1, 0.9, 1.1, 1.9, 2.5, 2.99])
    assert weights(torch.ones(6), sigma).tolist() == [5, 5, 6, 6, 7, 7]


def test_an_arm_is_the_script_and_logs_gradients(flags, tmp_path, monkeypatch):
    """A profile of ones changes nothing but the log; one of threes triples the perceptual term."""
    flags = [*flags, "--use_lpl", "--lpl_sigma_threshold", 3, "--lpl_weight", 0.5, "--max_train_steps", 2]
    plain = run(*flags, "--output_dir", tmp_path / "plain")
    monkeypatch.setattr(train_sdxl_lpl, "training_step", train_sdxl_lpl.training_step)
    monkeypatch.setattr(Objective, "total", Objective.total)
    monkeypatch.setattr(reporter, "METRICS", reporter.METRICS)
    effect_arm.log_gradients(train_sdxl_lpl, {1})
    rows = {}
    for number in (1.0, 3.0):
        profile = {"edges": [0, 1, 3], "weights": [number, number]}
        monkeypatch.setattr(objective, "lpl_noise_scale", effect_arm.level_weights(profile))
        rows[number] = run(*flags, "--lpl_scale", "--output_dir", tmp_path / str(number))
    for row, same in zip(plain, rows[1.0], strict=True):
        logged = {key: value for key, value in same.items() if not key.startswith("gradient/")}
        assert logged.keys() == row.keys()
        assert all(logged[key] == value for key, value in row.items() if key != "samples_per_second")
    assert rows[3.0][0]["lpl/loss"] == pytest.approx(3 * plain[0]["lpl/loss"], rel=1e-5)
    last = rows[1.0][1]
    assert "gradient/lpl" not in rows[1.0][0] and last["gradient/lpl"] > 0
    low, high = (abs(last["gradient/diffusion"] + sign * last["gradient/lpl"]) for sign in (-1, 1))
    assert low < last["grad_norm"] < high, "the whole gradient is the sum of the two"


def test_arms_are_flags_of_the_scripts(flags, tmp_path):
    """Each arm's flags are accepted, and each differs from the others."""
    seen = set()
    for name, arm in effect.ARMS.items():
        words = (effect.DEFAULTS["sdxl"] if name == "default" else arm.flags) + " --lpl_scale" * arm.profile
        args = train_sdxl_lpl.parse_args([*map(str, flags), *words.split(), "--output_dir", str(tmp_path)])
        values = {key: value for key, value in vars(args).items() if key not in ("base_model", "given")}
        seen.add(json.dumps(values, default=str, sort_keys=True))
    assert len(seen) == len(effect.ARMS)
