"""Parts of a training step one by one: guard, metrics, reporter, signals, gate, average, plan."""

import contextlib
import copy
import json
import math
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import EMAModel

import train_sdxl_lpl
from lpl_finetuning.errors import UserError
from lpl_finetuning.flag_checks import check_launch, check_lpl_flags, check_xformers
from lpl_finetuning.sample_prompts import pictures_at_once
from lpl_finetuning.training import optimization
from lpl_finetuning.training import plan as plan_module
from lpl_finetuning.training import reporter as reporter_module
from lpl_finetuning.training.guard import Fault, Guard
from lpl_finetuning.training.objective import (
    Objective,
    encode_in_chunks,
)
from lpl_finetuning.training.optimization import Outcome, Trainee, optimizer_settings
from lpl_finetuning.training.perceptual import PerceptualTerm, lpl_config, needs_decoder
from lpl_finetuning.training.reporter import Metrics, Reporter, fine_tuning
from lpl_finetuning.training.signals import STOP_SIGNALS, StopSignals
from lpl_finetuning.training.validation import Validation
from lpl_utils import AutoWeight, LPLGate, _own_checkpointing_off, estimate_z0

CPU = torch.device("cpu")
MADE, SKIPPED = Outcome(True, False, False), Outcome(False, False, False)


def accelerator(**more):
    """As much of an accelerator of one process as these parts need."""
    return SimpleNamespace(
        device=CPU, num_processes=1, process_index=0, is_main_process=True, is_local_main_process=False,
        mixed_precision="no", init_trackers=lambda *_: None, log=lambda *_, **__: None, **more,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Guard and weight


def guard(limit=2):
    """A `Guard` of one process."""
    return Guard(accelerator(), limit, lambda image: f"{image}.png")


@pytest.mark.parametrize("norm", [math.inf, math.nan])
def test_an_infinite_gradient_is_not_finite(norm):
    assert guard().read(torch.tensor(1.0))[0]
    assert not guard().read(torch.tensor(norm))[0]


def test_a_good_step_ends_the_row_of_bad_ones():
    ours, bad = guard(limit=2), [Fault("gradient", (4,))]
    for step, faults in enumerate([bad, [], bad, []], start=1):
        ours.record(faults, step)
    assert ours.total == 2
    ours.record(bad, 5)
    with pytest.raises(UserError, match="2 steps in a row were not finite"):
        ours.record(bad, 6)


def test_a_scaler_that_finds_no_scale_ends_the_run():
    """Overflows now and then do not count, and endless ones do: they train nothing."""
    ours, overflow = guard(limit=2), [Fault("gradient", (4,))]
    for step in range(200):  # ordinary: a good step in between
        ours.record([] if step % 20 == 19 else overflow, step, under_scaler=True)
    assert ours.total == 0 and ours.counts() == {}
    with pytest.raises(UserError, match=r"4\.png"):
        for step in range(200, 240):
            ours.record(overflow, step, under_scaler=True)
    assert step < 230 and ours.total == 2


@pytest.mark.parametrize("bad", [(math.nan, 1.0, 1.0), (1.0, math.inf, 1.0), (1.0, 1.0, math.nan)])
def test_a_step_that_is_not_finite_leaves_the_automatic_weight(bad):
    weight = AutoWeight(0.2, ramp=4)
    weight.update(*map(torch.tensor, (1.0, 2.0, 2.0)))
    before = {name: value.clone() for name, value in weight.state_dict().items()}
    weight.update(*map(torch.tensor, bad))
    assert all(torch.equal(value, before[name]) for name, value in weight.state_dict().items())
    assert weight().item() == pytest.approx(2 / 4 * 0.25 * 1 / 2)


@pytest.mark.parametrize(("words", "measured", "needed"), [
    ("--use_lpl", True, True), ("--use_lpl --lpl_features rgb", True, True), ("", False, False),
    ("--use_lpl --lpl_features latent", True, False), ("--validation_prompt apple", False, True),
    ("--use_lpl --lpl_features latent --validation_prompt apple", True, True),
])  # fmt: skip
def test_the_decoder_is_loaded_where_something_is_decoded(words, measured, needed):
    args = train_sdxl_lpl.parse_args([*words.split(), "--output_dir", "never-made"])
    if "--validation_prompt" not in words:  # the embedded recipe has some
        args = args.but(validation_prompt=None)
    assert needs_decoder(args, measured) is needed


@pytest.mark.parametrize(("words", "reference"), [([], 256), (["--lpl_outlier_reference_resolution", "0"], None),
                                                  (["--lpl_outlier_reference_resolution", "512"], 512)])  # fmt: skip
def test_the_outlier_mask_grows_with_the_images_unless_it_is_told_not_to(words, reference):
    args = train_sdxl_lpl.parse_args(["--use_lpl", "--output_dir", "never-made", *words])
    assert lpl_config(args).outlier_reference_resolution == reference


# ---------------------------------------------------------------------------------------------------------------------
# Metrics and reporter


def test_metrics_keep_no_graph():
    metrics = Metrics(CPU)
    metrics.add("train_loss", torch.ones(2, requires_grad=True).sum(), 2)
    metrics.add("train_loss", torch.ones(2, requires_grad=True).sum(), 2)
    assert not metrics.sums["train_loss"].requires_grad
    assert metrics.read(accelerator(), ["train_loss"]) == {"train_loss": 1}


@pytest.fixture
def clock(monkeypatch):
    """The reporter's clock: set `now`, in seconds."""
    time = SimpleNamespace(now=0.0)
    monkeypatch.setattr(reporter_module, "time", SimpleNamespace(perf_counter=lambda: time.now))
    return time


@pytest.fixture
def new_reporter(tmp_path, clock):
    """Function --logging_steps -> a `Reporter` of two steps."""

    def make(logging_steps):
        args = SimpleNamespace(
            use_lora=False, use_lpl=True, lpl_weight="auto", lpl_features="decoder", output_dir=str(tmp_path),
            logging_dir="logs", logging_steps=logging_steps,
            base_model=SimpleNamespace(family=SimpleNamespace(title="SDXL", name="sdxl")),
        )  # fmt: skip
        return Reporter(args, accelerator(), fine_tuning(args, ()), first_step=0, total_steps=2)

    return make


def test_the_share_of_the_loss_is_that_of_the_total(new_reporter, clock):
    reporter = new_reporter(1)
    for step in reporter.steps():
        clock.now += 1
        for name, value in {"train_loss": 4.0, "diffusion_loss": 3.0, "lpl/weighted_loss": 1.0}.items():
            reporter.metrics.add(name, torch.tensor(value))
        reporter.step(step + 1, MADE, 8, {"lr": 1e-4})
    assert reporter.history.series("lpl/share") == ([1, 2], [0.25, 0.25])


def test_a_skipped_step_leaves_the_steps_before_it_in_the_row(new_reporter, clock):
    reporter = new_reporter(2)
    for step, (value, outcome) in zip(reporter.steps(), [(1.0, MADE), (math.nan, SKIPPED)], strict=True):
        clock.now += 1
        reporter.metrics.add("diffusion_loss", torch.tensor(value))
        reporter.step(step + 1, outcome, 8, {"lr": 1e-4})
    assert reporter.history.series("diffusion_loss") == ([2], [1.0])


def test_a_pause_does_not_count_for_samples_per_second(new_reporter, clock):
    reporter = new_reporter(1)
    for step in reporter.steps():
        with reporter.paused():
            clock.now += 6
        clock.now += 4
        reporter.step(step + 1, MADE, 8, {"lr": 1e-4})
    assert reporter.history.series("samples_per_second") == ([1, 2], [2.0, 2.0])


# ---------------------------------------------------------------------------------------------------------------------
# Signals, average, validation, plan, flags


def test_the_handlers_of_signals_are_those_of_before():
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    try:
        with StopSignals(accelerator()) as signals:
            assert [signal.getsignal(number) for number in STOP_SIGNALS] == [signals._handle] * len(before)
        assert [signal.getsignal(number) for number in STOP_SIGNALS] == before
    finally:
        for number, handler in zip(STOP_SIGNALS, before, strict=True):
            signal.signal(number, handler)


def test_the_weights_after_averaging_are_those_before_it():
    trainee, parameter = object.__new__(Trainee), torch.nn.Parameter(torch.ones(3))
    trainee.parameters, trainee.ema = [parameter], EMAModel([parameter])
    parameter.data.fill_(5)
    with trainee.averaged():
        assert parameter.tolist() == [1, 1, 1]
    assert parameter.tolist() == [5, 5, 5]


def adamw(fused, monkeypatch):
    """(parameter, AdamW of the package) as on a CUDA GPU, or as elsewhere."""
    monkeypatch.setattr(optimization, "on_cuda", lambda groups: fused)
    settings = SimpleNamespace(
        optimizer="adamw", use_8bit_adam=False, learning_rate=0.1, adam_beta1=0.9, adam_beta2=0.999,
        adam_weight_decay=0.01, adam_epsilon=1e-8,
    )  # fmt: skip
    parameter = torch.nn.Parameter(torch.ones(3))
    return parameter, optimization.build_optimizer(settings, [{"params": [parameter]}])


def test_adamw_is_fused_on_cuda_alone(monkeypatch):
    assert optimization.on_cuda([{"params": [SimpleNamespace(device=torch.device("cuda", 1))]}])
    assert not optimization.on_cuda([{"params": [torch.zeros(1)]}])
    assert not adamw(False, monkeypatch)[1].defaults["fused"]


@pytest.mark.parametrize("before", [True, False])
def test_a_fused_adamw_stays_fused_whatever_wrote_the_checkpoint(before, monkeypatch):
    (there, earlier), (here, ours) = adamw(before, monkeypatch), adamw(True, monkeypatch)
    there.grad = here.grad = torch.tensor([1.0, -2.0, 3.0])
    earlier.step()
    here.data.copy_(there.data)
    ours.load_state_dict(copy.deepcopy(earlier.state_dict()))
    assert ours.param_groups[0]["fused"] is True and not ours.param_groups[0]["foreach"]
    earlier.step()
    ours.step()
    assert torch.allclose(here, there) and ours.state[here]["step"] == 2


def test_the_scaler_skips_a_fused_adamw(monkeypatch):
    """A step that overflows changes nothing but the scale."""
    parameter, optimizer = adamw(True, monkeypatch)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for value, wanted in ((math.inf, 2.0), (1.0, 2.0)):
        scaler.scale(value * parameter.sum()).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert scaler.get_scale() == wanted and bool((parameter == 1).all()) == math.isinf(value)
    assert optimizer.state[parameter]["step"] == 1


@pytest.mark.parametrize(("ranks", "kept"), [(1, False), (2, True)])
def test_gradients_stay_in_the_buckets_of_ranks_that_exchange_them(ranks, kept, monkeypatch):
    """After a step they are 0 with several ranks, and gone with one."""
    monkeypatch.setattr(optimization, "clip_gradients", lambda *_: torch.tensor(1.0))
    monkeypatch.setattr(optimization, "prepare", lambda accelerator, denoiser, optimizer: (denoiser, optimizer))
    layer = torch.nn.Linear(2, 1)
    denoiser = SimpleNamespace(models=lambda: {"unet": layer})
    settings = optimizer_settings(train_sdxl_lpl.build_parser().parse(["--pretrained_model_name_or_path", "a/b"]), 1)
    monkeypatch.setattr(optimization, "is_sharded", lambda accelerator: False)
    one = accelerator(optimizer_step_was_skipped=False, scaler=None)
    one.num_processes = ranks
    finite = SimpleNamespace(read=lambda *_: (True, [], (False, False)), record=lambda *_, **__: None)
    trainee = Trainee(settings, one, denoiser, 5, finite)
    layer(torch.ones(1, 2)).sum().backward()
    trainee.step(1, (), Metrics(CPU))
    assert all(value.grad is not None and not value.grad.any() if kept else value.grad is None
               for value in layer.parameters())  # fmt: skip


def test_images_are_encoded_one_of_1024_px_at_a_time():
    seen = []

    def encode(images):
        seen.append(tuple(images.shape))
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=images[:, :, ::8, ::8], std=images[:, :, 1::8, 1::8]))

    objective = SimpleNamespace(device=CPU, encoder=SimpleNamespace(encode=encode))
    for shape, sizes in (((2, 1, 1024, 1024), [1, 1]), ((5, 1, 512, 1024), [2, 2, 1]), ((2, 1, 1536, 1536), [1, 1])):
        pixels = torch.rand(shape)
        mean, std = encode_in_chunks(pixels, objective)
        assert torch.equal(mean, pixels[:, :, ::8, ::8]) and torch.equal(std, pixels[:, :, 1::8, 1::8])
        assert [size[0] for size in seen] == sizes
        seen.clear()


@pytest.mark.parametrize(("samples_here", "held_out", "averages"), [(False, 0, 0), (True, 0, 1), (False, 3, 1)])
def test_ranks_that_only_wait_need_no_average(samples_here, held_out, averages):
    """Under EMA each rank would else copy all its weights into the computer's memory at every validation."""
    validation, entered, nothing = object.__new__(Validation), [], contextlib.nullcontext
    validation.settings, validation.samples_here = SimpleNamespace(entries=("x",)), samples_here
    validation.data, validation.signals = (
        SimpleNamespace(held_out=range(held_out)),
        SimpleNamespace(between_steps=nothing),
    )
    validation.reporter = SimpleNamespace(paused=nothing, log_images=lambda *_: 0, draw_run=lambda: 0)
    validation.trainee = SimpleNamespace(averaged=lambda: (entered.append(1), nothing())[1])
    validation.grids, validation.held_out_losses = SimpleNamespace(add=lambda *_: 0), dict
    validation.run(1)
    assert len(entered) == averages


def test_the_one_step_test_takes_no_more_pictures_than_it_may(monkeypatch):
    """The held-out loss takes the images of a micro-batch at once."""
    validation, seen = object.__new__(Validation), []
    validation.accelerator, validation.sharded = accelerator(), False
    validation.objective, validation.settings = SimpleNamespace(device=CPU), SimpleNamespace(train_batch_size=3)
    validation.data = SimpleNamespace(held_out_framing=SimpleNamespace(buckets=np.zeros(5, int)))
    validation.trainee, validation.signals = (
        SimpleNamespace(bare=torch.nn.Linear(1, 1)),
        SimpleNamespace(requested=None),
    )
    monkeypatch.setattr(Metrics, "read", lambda *_: {})
    for most in (None, 1):
        validation._over_held_out("x", [], lambda numbers: iter(seen.append(len(numbers)) or ()), most)
    assert seen == [3, 2, 1, 1, 1, 1, 1]


def test_validation_by_epochs_comes_at_the_step_that_ends_one():
    validation = object.__new__(Validation)
    validation.settings = SimpleNamespace(validation_steps=None, validation_epochs=1)
    validation.objective, validation.data = SimpleNamespace(samples_per_step=4), SimpleNamespace(images=range(10))
    assert [step for step in range(1, 11) if validation.due(step)] == [3, 5, 8, 10]
    validation.settings = SimpleNamespace(validation_steps=4, validation_epochs=1)
    assert [step for step in range(1, 11) if validation.due(step)] == [4, 8]


def test_the_last_half_step_is_a_step(monkeypatch):
    monkeypatch.setattr(plan_module, "checkpoint_to_resume", lambda *_: None)
    args = SimpleNamespace(train_batch_size=4, gradient_accumulation_steps=1, max_train_steps=None, num_train_epochs=3)
    assert plan_module.plan_run(args, accelerator(), None, images=6).total_steps == 5
    assert plan_module.plan_run(args, accelerator(), None, images=4).total_steps == 3


@pytest.mark.parametrize(("seen", "total"), [({"images_seen": 8}, 6), ({"images_seen": 14}, 5), ({}, 4)])
def test_epochs_count_the_images_that_a_checkpoint_has_seen(seen, total, tmp_path, monkeypatch):
    """Two epochs of 8 images in steps of 4, after 4 steps of 2 images, of others, or of 4 as earlier versions say."""
    monkeypatch.setattr(plan_module, "checkpoint_to_resume", lambda *_: tmp_path)
    monkeypatch.setattr(plan_module, "read_manifest", lambda folder: {"step": 4})
    (tmp_path / "training_state.json").write_text(json.dumps({"step": 4} | seen))
    args = SimpleNamespace(train_batch_size=4, gradient_accumulation_steps=1, max_train_steps=None, num_train_epochs=2)
    assert plan_module.plan_run(args, accelerator(), None, images=8).total_steps == total
    args.max_train_steps = 9
    assert plan_module.plan_run(args, accelerator(), None, images=8).total_steps == 9


@pytest.mark.parametrize(("flags", "refused"), [
    ("--lora_type lokr --mixed_precision bf16", True), ("--lora_type loha --mixed_precision fp16", True),
    ("--lora_type lokr --mixed_precision no", False), ("--lora_type dora --mixed_precision bf16", False),
])  # fmt: skip
def test_xformers_is_refused_where_queries_would_have_another_dtype(flags, refused):
    """PEFT's LoHa and LoKr give the dtype of their input, which is float32 after a norm under autocast."""
    words = f"--pretrained_model_name_or_path a/b --use_lora --enable_xformers_memory_efficient_attention {flags}"
    args = train_sdxl_lpl.build_parser().parse(words.split())
    with pytest.raises(UserError, match="which xformers refuses") if refused else contextlib.nullcontext():
        check_xformers(args)


def test_as_many_pictures_are_decoded_at_once_as_one_of_1024_px_has_room_for():
    sizes = [(1024, 1024), (1536, 1024), (512, 512), (512, 768), (64, 64)]
    assert [pictures_at_once(*size) for size in sizes] == [1, 1, 4, 1, 256]


@pytest.mark.parametrize("precision", ["fp8", "FP8"])
def test_a_precision_of_accelerate_that_the_scripts_lack(precision, monkeypatch):
    args = train_sdxl_lpl.build_parser().parse(["--pretrained_model_name_or_path", "a/b"])
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
    with pytest.raises(UserError, match="accelerate's mixed_precision fp8 is not among those of these scripts"):
        check_launch(args)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_share_of_nothing_or_of_all_is_refused(share):
    args = train_sdxl_lpl.build_parser().parse(
        ["--use_lpl", "--lpl_share", str(share), "--pretrained_model_name_or_path", "a/b"]
    )
    with pytest.raises(UserError, match=f"--lpl_share is {share}; it must lie between 0 and 1"):
        check_lpl_flags(args)


# ---------------------------------------------------------------------------------------------------------------------
# Forward process, gate, decoder


@pytest.fixture
def schedule(monkeypatch):
    """Function (flag=value) -> SDXL's `Schedule`."""
    monkeypatch.setattr(train_sdxl_lpl, "load_part", lambda *_: DDPMScheduler())
    flags = {
        "base_model": None, "prediction_type": None, "snr_gamma": None, "timestep_bias_strategy": "none",
        "timestep_bias_portion": 0.25, "timestep_bias_multiplier": 1.0, "timestep_bias_begin": 0,
        "timestep_bias_end": 1000,
    }  # fmt: skip
    return lambda **more: train_sdxl_lpl.Schedule(SimpleNamespace(**flags | more))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_the_target_gives_the_latents_back(schedule, prediction_type):
    law = schedule(prediction_type=prediction_type)
    latents, noise = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    alpha, sigma = law.levels(torch.tensor([0, 300, 600]))
    per_sample = alpha.view(-1, 1, 1, 1), sigma.view(-1, 1, 1, 1)
    noisy = per_sample[0] * latents + per_sample[1] * noise
    target = law.target(latents, noise, *per_sample)
    assert torch.allclose(estimate_z0(target, noisy, alpha, sigma, prediction_type), latents, atol=1e-4)


def test_the_biased_timesteps_are_the_portion_that_is_named(schedule):
    plain = schedule().probabilities[0]
    for strategy, biased in {"earlier": range(250), "later": range(750, 1000)}.items():
        found = schedule(timestep_bias_strategy=strategy, timestep_bias_multiplier=2.0).probabilities
        wanted = torch.full_like(found, 1.0)
        wanted[list(biased)] = 2
        assert torch.allclose(found, wanted * plain / 1.25)


def test_the_gate_follows_the_shape_of_the_latents():
    levels = SimpleNamespace(levels=lambda timesteps: (torch.ones(len(timesteps)), timesteps))
    gate = LPLGate(sigma_threshold=3, threshold_resolution=64, resolution=64)
    objective = Objective(
        settings=None, device=CPU, schedule=levels, dtype=torch.float32, samples_per_step=3, space=None, pixels=8,
        empty_prompt={}, empty_is_zero=False, guard=None, perceptual=PerceptualTerm(None, gate, start=0),
    )  # fmt: skip
    timesteps = torch.tensor([1.0, 5.0, 7.0])  # also sigma / alpha
    assert objective.gated(timesteps, torch.zeros(3, 4, 8, 8)).tolist() == [True, False, False]
    assert objective.gated(timesteps, torch.zeros(3, 4, 32, 8)).tolist() == [True, True, False]


def test_the_decoders_own_checkpointing_is_on_again():
    decoder = torch.nn.Sequential(torch.nn.Identity(), torch.nn.Identity())
    decoder[0].gradient_checkpointing, decoder[1].gradient_checkpointing = True, False
    with _own_checkpointing_off(decoder):
        assert not decoder[0].gradient_checkpointing
    assert decoder[0].gradient_checkpointing and not decoder[1].gradient_checkpointing
