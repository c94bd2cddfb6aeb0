"""Micro-batches that are made one ahead."""

import contextlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lpl_finetuning.errors import RankError
from lpl_finetuning.training.objective import with_posterior_noise
from lpl_finetuning.training.optimization import Trainee
from lpl_finetuning.training.run import Batches

OBJECTIVE = SimpleNamespace(settings=SimpleNamespace(seed=5, noise_offset=0.1), device=torch.device("cpu"))


def loaded(count, error=None, log=None):
    """Batches of a loader, which may fail after the last one."""
    for number in range(count):
        if log is not None:
            log.append(number)
        yield {"mean": torch.zeros(2, 4, 3, 3), "number": np.array([2 * number, 2 * number + 1])}
    if error:
        raise error


def test_batches_made_ahead_are_the_same():
    plain = list(Batches(loaded(4), OBJECTIVE))
    ahead, found = Batches(loaded(4), OBJECTIVE), []
    for batch in ahead:
        found.append(batch)
        ahead.make_ahead()
    assert len(plain) == len(found) == 4
    for one, two in zip(plain, found, strict=True):
        assert one.keys() == two.keys() == {"mean", "number", "noise", "posterior_noise"}
        assert all(np.array_equal(one[name], two[name]) for name in one)
    for one, two in ((plain[0]["noise"], plain[0]["posterior_noise"]), (plain[0]["noise"], plain[1]["noise"])):
        pattern = [noise - noise.mean(dim=(2, 3), keepdim=True) for noise in (one, two)]
        assert not torch.allclose(*pattern, atol=0.01), "without the constant part of --noise_offset"


def test_a_batch_is_completed_by_the_function_that_is_given():
    """Without the noise of a diffusion model, the posterior's noise is the same."""
    [full] = Batches(loaded(1), OBJECTIVE)
    [plain] = Batches(loaded(1), OBJECTIVE, with_posterior_noise)
    assert plain.keys() == {"mean", "number", "posterior_noise"}
    assert torch.equal(plain["posterior_noise"], full["posterior_noise"])


def test_one_batch_is_made_ahead_and_no_more():
    log = []
    batches = Batches(loaded(4, log=log), OBJECTIVE)
    next(batches)
    batches.make_ahead()
    assert log == [0, 1]
    next(batches)
    assert log == [0, 1]
    next(batches)
    assert log == [0, 1, 2]


def test_what_goes_wrong_ahead_is_raised_when_the_batch_is_asked_for():
    """The step whose gradients are there is made first."""
    batches = Batches(loaded(1, RankError("a shard is damaged")), OBJECTIVE)
    next(batches)
    batches.make_ahead()
    with pytest.raises(RankError, match="a shard is damaged"):
        next(batches)
    with pytest.raises(StopIteration):
        next(batches)


def test_the_loop_makes_each_batch_after_the_backward_pass_before_it():
    """While the device computes it, and before the step waits for the device."""
    log, trainee = [], object.__new__(Trainee)
    trainee.accelerator = SimpleNamespace(
        device=torch.device("cpu"), distributed_type=None, no_sync=lambda model: contextlib.nullcontext()
    )
    trainee.settings, trainee.denoiser = SimpleNamespace(gradient_accumulation_steps=2), None
    batches = Batches(loaded(4, log=log), OBJECTIVE)
    for _ in range(2):
        for _ in trainee.micro_steps(batches):
            log.append("backward")
        log.append("step")
    assert log == [0, "backward", 1, "backward", 2, "step", "backward", 3, "backward", "step"]
