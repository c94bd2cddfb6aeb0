"""The SDXL recipe's options: text encoders, adapters, optimizers, EMA, sampling, held-out loss, comparison."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

import train_sdxl_lpl
from lpl_finetuning.data import scan as scan_module
from lpl_finetuning.data.samples import stratified_uniform
from lpl_finetuning.data.scan import scan_folder
from lpl_finetuning.data.tables import hold_out
from lpl_finetuning.errors import DataError, UserError
from lpl_finetuning.flags import data_source
from lpl_finetuning.lora_files import LORA_FILE
from lpl_finetuning.training import objective, optimization
from lpl_finetuning.training import run as run_module
from tests import children
from tests.runs import assert_resume_is_exact, forbid_loading, objective_of
from tests.sdxl import command, draw, run, weights

TEXT = ["--use_lora", "--train_text_encoder"]


# ---------------------------------------------------------------------------------------------------------------------
# Text encoders


def test_text_encoders_are_trained_saved_and_loaded(flags, sdxl_folder, tmp_path):
    """The file holds three adapters in the nested form; the pipeline with it draws what the trained models draw."""
    run(*flags, *TEXT, "--lora_alpha", 16, "--learning_rate", 0.03, "--max_train_steps", 6,
        "--output_dir", tmp_path, "--validation_prompt", "a red apple", "--num_validation_images", 1,
        "--proportion_empty_prompts", 0.3)  # fmt: skip
    tensors = load_file(tmp_path / LORA_FILE)
    starts = {name.split(".encoder.")[0] for name in tensors if not name.startswith("unet.")}
    assert starts == {"text_encoder.text_model", "text_encoder_2.text_model"}
    for part in ("unet.", "text_encoder.", "text_encoder_2."):
        assert any(
            value.abs().max() > 1e-3 for name, value in tensors.items() if name.startswith(part) and "lora_B" in name
        )
    pipeline = StableDiffusionXLPipeline.from_pretrained(sdxl_folder)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(tmp_path)
    assert pipeline.text_encoder.peft_config["default_0"].lora_alpha == 16
    options = dict(num_inference_steps=3, height=64, width=64)
    image = pipeline("a red apple", generator=torch.Generator().manual_seed(3), **options).images[0]
    validated = np.asarray(Image.open(tmp_path / "image_0.png"), dtype=np.int64)
    assert np.abs(validated - np.asarray(image, dtype=np.int64)).max() <= 1
    (tmp_path / "unet-only").mkdir()
    pipeline.unload_lora_weights()
    StableDiffusionXLPipeline.save_lora_weights(
        tmp_path / "unet-only", {k.removeprefix("unet."): v for k, v in tensors.items() if k.startswith("unet.")}
    )
    pipeline.load_lora_weights(tmp_path / "unet-only")
    without = pipeline("a red apple", generator=torch.Generator().manual_seed(3), **options).images[0]
    assert np.abs(validated - np.asarray(without, dtype=np.int64)).max() > 2, "the text encoders' part does something"


def test_text_encoders_resume_bit_for_bit(flags, tmp_path):
    more = [*TEXT, "--use_ema", "--proportion_empty_prompts", 0.5, "--lora_dropout", 0.2, "--use_lpl"]
    assert_resume_is_exact(train_sdxl_lpl, [*flags, *more], tmp_path)


def test_frozen_text_encoders_give_the_cached_embeddings(flags, tmp_path):
    """With a learning rate of zero the path through live encoders has the losses of the path through the cache."""
    flags = [*flags, "--use_lora", "--learning_rate", 0, "--max_train_steps", 3, "--proportion_empty_prompts", 0.4]
    cached = run(*flags, "--output_dir", tmp_path / "cached")
    live = run(*flags, "--train_text_encoder", "--output_dir", tmp_path / "live")
    for a, b in zip(cached, live, strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-5)


def test_text_encoder_lr(flags, tmp_path):
    """Zero leaves the text encoders' adapters where they start, and only those."""
    flags = [*flags, *TEXT, "--max_train_steps", 2, "--output_dir", tmp_path]
    run(*flags, "--text_encoder_lr", 0)
    moved = {name.split(".")[0] for name, value in load_file(tmp_path / LORA_FILE).items()
             if "lora_B" in name and value.abs().max() > 0}  # fmt: skip
    assert moved == {"unet"}


def test_scaling_the_learning_rate_scales_both(flags, tmp_path):
    """--scale_lr multiplies both rates by the images of a step, here 4."""
    flags = [*flags, *TEXT, "--max_train_steps", 2]
    run(*flags, "--scale_lr", "--text_encoder_lr", 0.0002, "--output_dir", tmp_path / "scaled")
    run(*flags, "--learning_rate", 0.004, "--text_encoder_lr", 0.0008, "--output_dir", tmp_path / "given")
    assert weights(tmp_path / "scaled") == weights(tmp_path / "given")


def test_checkpointing_and_precision_with_text_encoders(flags, tmp_path):
    flags = [*flags, *TEXT, "--max_train_steps", 2]
    exact = run(*flags, "--output_dir", tmp_path / "a")
    for name, more in {"checkpointing": ["--gradient_checkpointing"], "bf16": ["--mixed_precision", "bf16"]}.items():
        rows = run(*flags, *more, "--output_dir", tmp_path / name)
        assert rows[1]["train_loss"] == pytest.approx(exact[1]["train_loss"], rel=0.02), name
        assert {value.dtype for value in load_file(tmp_path / name / LORA_FILE).values()} == {torch.float32}
    saved = [load_file(tmp_path / name / LORA_FILE) for name in ("a", "checkpointing")]
    for key, value in saved[0].items():
        assert torch.allclose(value, saved[1][key], atol=1e-5), key


# ---------------------------------------------------------------------------------------------------------------------
# Adapters and starting points


def test_dora_trains_resumes_and_loads(flags, sdxl_folder, tmp_path):
    assert_resume_is_exact(train_sdxl_lpl, [*flags, "--use_lora", "--use_dora", "--learning_rate", 0.02], tmp_path)
    tensors = load_file(tmp_path / "whole" / LORA_FILE)
    assert any("lora_magnitude_vector" in name for name in tensors)
    before, _ = draw(sdxl_folder)
    after, pipeline = draw(sdxl_folder, lora=tmp_path / "whole")
    assert np.abs(after - before).max() > 8 and pipeline.unet.peft_config["default_0"].use_dora


@pytest.mark.parametrize("more", [[], ["--train_text_encoder"]], ids=["unet", "text"])
def test_dora_loads_and_draws_what_training_drew(more, flags, sdxl_folder, tmp_path):
    """Every magnitude comes back with `load_lora_weights` and with --init_lora, those of the text encoders too."""
    flags = [*flags, "--use_lora", *more, "--max_train_steps", 4, "--output_dir"]
    run(*flags, tmp_path / "first", "--use_dora", "--learning_rate", 0.03, "--validation_prompt", "a red apple",
        "--num_validation_images", 1)  # fmt: skip
    pipeline = StableDiffusionXLPipeline.from_pretrained(sdxl_folder)
    pipeline.set_progress_bar_config(disable=True)

    def picture():
        image = pipeline("a red apple", generator=torch.Generator().manual_seed(3), num_inference_steps=3, height=64,
                         width=64).images[0]  # fmt: skip
        return np.asarray(image, dtype=np.int64)

    before = picture()
    pipeline.load_lora_weights(tmp_path / "first")
    validated = np.asarray(Image.open(tmp_path / "first" / "image_0.png"), dtype=np.int64)
    assert np.abs(picture() - validated).max() <= 1 < 4 < np.abs(before - validated).max()
    run(*flags, tmp_path / "same", "--init_lora", tmp_path / "first", "--learning_rate", 0)
    assert weights(tmp_path / "first") == weights(tmp_path / "same")


def test_a_lora_is_continued(flags, tmp_path):
    """Rank, alpha and layers come from the file; a run of zero steps' worth of learning gives the file back."""
    run(*flags, *TEXT, "--rank", 3, "--lora_alpha", 7, "--lora_layers", "to_q,to_v", "--learning_rate", 0.01,
        "--max_train_steps", 3, "--output_dir", tmp_path / "first")  # fmt: skip
    flags = [*flags, *TEXT, "--max_train_steps", 2, "--lora_dropout", 0.1]
    for place in (tmp_path / "first", tmp_path / "first" / LORA_FILE):
        run(*flags, "--init_lora", place, "--learning_rate", 0, "--output_dir", tmp_path / "same")
        first, same = (load_file(tmp_path / name / LORA_FILE) for name in ("first", "same"))
        assert first.keys() == same.keys() and all(torch.equal(first[key], same[key]) for key in first)
    run(*flags, "--init_lora", tmp_path / "first", "--output_dir", tmp_path / "more")
    more = load_file(tmp_path / "more" / LORA_FILE)
    assert more.keys() == first.keys() and any(not torch.equal(first[key], more[key]) for key in first)
    pipeline = draw(flags[1], lora=tmp_path / "more")[1]
    assert (pipeline.unet.peft_config["default_0"].r, pipeline.unet.peft_config["default_0"].lora_alpha) == (3, 7)
    assert_resume_is_exact(train_sdxl_lpl, [*flags, "--init_lora", tmp_path / "first"], tmp_path)


def test_the_kohya_file_draws_the_same_and_can_be_continued(flags, sdxl_folder, tmp_path):
    """With alpha different from rank and both text encoders: the two files of a run are one LoRA."""
    run(*flags, *TEXT, "--rank", 4, "--lora_alpha", 10, "--learning_rate", 0.02, "--max_train_steps", 4,
        "--output_kohya_format", "--output_dir", tmp_path)  # fmt: skip
    kohya = tmp_path / "pytorch_lora_weights_kohya.safetensors"
    base, _ = draw(sdxl_folder)
    image, _ = draw(sdxl_folder, lora=tmp_path / LORA_FILE)
    again, _ = draw(sdxl_folder, lora=kohya)
    assert np.abs(image - again).max() <= 1 < 8 < np.abs(image - base).max()
    run(
        *flags,
        *TEXT,
        "--init_lora",
        kohya,
        "--learning_rate",
        0,
        "--max_train_steps",
        1,
        "--output_dir",
        tmp_path / "more",
    )
    first, more = (load_file(folder / LORA_FILE) for folder in (tmp_path, tmp_path / "more"))
    assert first.keys() == more.keys() and all(torch.equal(first[key], more[key]) for key in first)
    assert np.abs(draw(sdxl_folder, lora=tmp_path / "more")[0] - image).max() <= 1, "alpha came along"


def test_a_single_file_beside_the_pipeline(flags, tmp_path):
    """`model.safetensors` holds the trained UNet under its original names, in float16."""
    run(*flags, "--single_file", "--max_train_steps", 1, "--output_dir", tmp_path)
    single = load_file(tmp_path / "model.safetensors")
    unet = load_file(tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    assert torch.equal(single["model.diffusion_model.out.2.weight"], unet["conv_out.weight"].half())
    starts = ("model.diffusion_model.", "first_stage_model.", "conditioner.embedders.0.", "conditioner.embedders.1.")
    assert all(any(name.startswith(start) for name in single) for start in starts)


def test_a_lora_that_does_not_fit_is_refused(flags, tmp_path, monkeypatch):
    """Before weights load: layers that this run does not train, and another model's."""
    run(*flags, *TEXT, "--max_train_steps", 1, "--output_dir", tmp_path / "text")
    forbid_loading(monkeypatch, train_sdxl_lpl)
    flags = [*flags, "--use_lora", "--max_train_steps", 1, "--output_dir", tmp_path / "out", "--init_lora"]
    with pytest.raises(UserError, match="--train_text_encoder"):
        run(*flags, tmp_path / "text")
    tensors = load_file(tmp_path / "text" / LORA_FILE)
    other = {name.replace("attentions.0", "attentions.7"): value for name, value in tensors.items() if "unet" in name}
    (tmp_path / "other").mkdir()
    StableDiffusionXLPipeline.save_lora_weights(
        tmp_path / "other", {k.removeprefix("unet."): v for k, v in other.items()}
    )
    with pytest.raises(UserError, match="--init_lora"):
        run(*flags, tmp_path / "other")
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match="no LoRA could be read"):
        run(*flags, tmp_path / "broken.safetensors")


@pytest.mark.parametrize("subfolder", ["", "unet"])
def test_another_unet(flags, sdxl_folder, tmp_path, subfolder):
    """A fine-tuned UNet, alone or in a pipeline's or checkpoint's folder, is what training starts from."""
    run(
        *flags,
        "--learning_rate",
        0.01,
        "--max_train_steps",
        2,
        "--checkpointing_steps",
        2,
        "--output_dir",
        tmp_path / "a",
    )
    place = tmp_path / "a" / "checkpoint-2" / subfolder if subfolder else tmp_path / "a" / "checkpoint-2"
    run(*flags, "--pretrained_unet_model_name_or_path", place, "--learning_rate", 0, "--max_train_steps", 1,
        "--output_dir", tmp_path / "b")  # fmt: skip
    assert weights(tmp_path / "b") == weights(tmp_path / "a") != weights(sdxl_folder)


# ---------------------------------------------------------------------------------------------------------------------
# Optimizers, averages, speed


@pytest.mark.parametrize("optimizer", ["prodigy", "adafactor"])
def test_optimizers_train_and_resume_bit_for_bit(flags, tmp_path, optimizer):
    rate = 1 if optimizer == "prodigy" else 0.01
    assert_resume_is_exact(
        train_sdxl_lpl, [*flags, "--use_lora", "--optimizer", optimizer, "--learning_rate", rate], tmp_path
    )
    rows = [json.loads(line) for line in (tmp_path / "whole/logs/metrics.jsonl").read_text().splitlines()]
    assert ("lr/d*lr" in rows[-1]) == (optimizer == "prodigy")
    plain = tmp_path / "plain"
    run(*flags, "--use_lora", "--max_train_steps", 6, "--output_dir", plain)
    assert weights(plain) != weights(tmp_path / "whole")


def test_offloaded_and_foreach_averages_are_the_average(flags, tmp_path):
    flags = [*flags, "--use_lora", "--use_ema", "--learning_rate", 0.01, "--max_train_steps", 4]
    saved = {}
    for name, more in {"plain": [], "cpu": ["--offload_ema"], "foreach": ["--foreach_ema"],
                       "late": ["--ema_update_after_step", 2], "slow": ["--ema_decay", 0.05]}.items():  # fmt: skip
        run(*flags, *more, "--output_dir", tmp_path / name)
        saved[name] = load_file(tmp_path / name / LORA_FILE)
    for key, value in saved["plain"].items():
        assert torch.equal(value, saved["cpu"][key])
        assert torch.allclose(value, saved["foreach"][key], atol=1e-6)
    for other in ("late", "slow"):
        assert any(not torch.allclose(saved["plain"][key], saved[other][key], atol=1e-6) for key in saved["plain"])


@pytest.fixture
def own_tf32():
    """TF32 is off again after the test."""
    yield
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.usefixtures("own_tf32")
def test_switches_reach_what_they_switch(flags, tmp_path, monkeypatch):
    """What changes no number on a CPU: where the average lives, how it is computed, TF32, encoders' checkpointing."""
    words = [*map(str, flags), "--use_lora", "--train_text_encoder", "--use_ema"]
    for more in ([], ["--offload_ema", "--foreach_ema", "--gradient_checkpointing", "--allow_tf32"]):
        args = train_sdxl_lpl.parse_args([*words, *more, "--output_dir", str(tmp_path)])
        denoiser = train_sdxl_lpl.build_denoiser(args, torch.float32, "cpu")
        assert denoiser.text_encoder.is_gradient_checkpointing == denoiser.text_encoder_2.is_gradient_checkpointing
        assert denoiser.text_encoder.is_gradient_checkpointing == bool(more)
        parameters = [torch.nn.Parameter(torch.ones(2))]
        settings = optimization.optimizer_settings(args, batch_size=4)
        ema = optimization.build_ema(settings, parameters)
        assert ema.foreach == bool(more)
        moves = []
        monkeypatch.setattr(ema, "to", lambda device, moves=moves, **kwargs: moves.append(str(device)))
        optimization.update_ema(ema, parameters, settings.offload_ema)
        assert moves == (["cpu", "cpu"] if more else []), "to the parameters' device for the step, and back"
        AcceleratorState._reset_state(True)
        torch.backends.cuda.matmul.allow_tf32 = False
        ranks = run_module.start_accelerator(args).ddp_handler
        assert ranks.gradient_as_bucket_view and not ranks.broadcast_buffers, "no copies of gradients and buffers"
        assert torch.backends.cuda.matmul.allow_tf32 == bool(more)


def test_lr_cycles_and_power(flags, tmp_path):
    flags = [*flags, "--max_train_steps", 6]
    rates = {}
    for name, more in {
        "cosine": ["--lr_scheduler", "cosine_with_restarts"],
        "cycles": ["--lr_scheduler", "cosine_with_restarts", "--lr_num_cycles", 2],
        "linear": ["--lr_scheduler", "polynomial"],
        "square": ["--lr_scheduler", "polynomial", "--lr_power", 2],
    }.items():
        rates[name] = [row["lr"] for row in run(*flags, *more, "--output_dir", tmp_path / name, result=False)]
    assert rates["cosine"] != rates["cycles"] and rates["linear"] != rates["square"]


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on the CPU")
def test_a_compiled_unet_trains_the_same(flags, tmp_path, monkeypatch):
    """With TorchDynamo's graphs and AOT autograd's; what Inductor makes of them is PyTorch's, and takes a minute."""
    flags = [*flags, "--use_lora", "--lora_layers", "to_q", "--max_train_steps", 2]
    plain = run(*flags, "--output_dir", tmp_path / "plain")
    calls = []
    original = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module,
        "compile",
        lambda self, *args: (calls.append(type(self)), original(self, *args, backend="aot_eager")),
    )
    compiled = run(*flags, "--torch_compile", "--output_dir", tmp_path / "compiled")
    assert calls == [UNet2DConditionModel]
    for a, b in zip(plain, compiled, strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-4)
    assert load_file(tmp_path / "plain" / LORA_FILE).keys() == load_file(tmp_path / "compiled" / LORA_FILE).keys()


# ---------------------------------------------------------------------------------------------------------------------
# Stratified timesteps


@pytest.mark.parametrize(("batch", "micro", "ranks"), [(4, 1, 1), (3, 2, 1), (2, 3, 2), (1, 1, 5)])
def test_stratified_numbers_are_even_in_each_step_and_uniform_for_each_sample(batch, micro, ranks):
    per_step = batch * micro * ranks
    steps = 4000
    drawn = stratified_uniform(5, range(steps * per_step), batch, per_step).reshape(steps, per_step)
    for share in (0.2, 0.33, 0.7):
        counts = (drawn < share).sum(axis=1)
        assert counts.min() >= np.floor(share * per_step) and counts.max() <= np.ceil(share * per_step)
        by_batch = (drawn.reshape(steps, -1, batch) < share).sum(axis=2)
        assert by_batch.min() >= np.floor(share * batch) and by_batch.max() <= np.ceil(share * batch)
    expected = (np.arange(steps) + 0.5) / steps
    for place in range(per_step):
        distance = np.abs(np.sort(drawn[:, place]) - expected).max()
        assert distance < 1.95 / np.sqrt(steps), f"Kolmogorov-Smirnov at the 0.1 % level, sample {place} of a step"
    assert (stratified_uniform(5, [7, 3], batch, per_step) == drawn.ravel()[[7, 3]]).all(), "by address"
    assert not np.allclose(np.diff(drawn[:, 0]), 0), "each step has its own offset"


def test_stratified_timesteps_in_training(flags, tmp_path):
    """Every step has its share of gated samples, and the recipe's own distribution stays."""
    flags = [
        *flags,
        "--use_lpl",
        "--lpl_t_threshold",
        250,
        "--gradient_accumulation_steps",
        2,
        "--max_train_steps",
        12,
    ]
    rows = run(*flags, "--timestep_sampling", "stratified", "--output_dir", tmp_path / "a")
    assert {row["lpl/num_samples"] for row in rows} == {1.0}, "mean over two micro-steps of 4: a quarter of each"
    rows = run(*flags, "--output_dir", tmp_path / "b")
    assert len({row["lpl/num_samples"] for row in rows}) > 1
    args = train_sdxl_lpl.parse_args(
        [*map(str, flags), "--timestep_sampling", "stratified", "--timestep_bias_strategy", "later",
         "--timestep_bias_multiplier", "5"]
    )  # fmt: skip
    schedule = train_sdxl_lpl.Schedule(args)
    latents = torch.empty(1, 4, 8, 8)
    drawn = objective.sample_timesteps(range(24000), latents, objective_of(args, schedule))
    empirical = torch.bincount(drawn, minlength=1000).cumsum(0) / 24000
    assert (empirical - schedule.probabilities.cumsum(0)).abs().max() < 0.012


# ---------------------------------------------------------------------------------------------------------------------
# Held-out loss


def validation_rows(rows):
    return [row for row in rows if "validation/diffusion_loss" in row]


def test_held_out_loss_is_what_it_says(flags, sdxl_folder, pictures, tmp_path):
    """Recomputed here with the pipeline's own parts in float64, for one level; fixed whatever the seed."""
    flags = [*flags, "--validation_data_dir", pictures, "--max_validation_samples", 3, "--max_train_steps", 2,
             "--validation_steps", 1, "--learning_rate", 0]  # fmt: skip
    rows = validation_rows(run(*flags, "--output_dir", tmp_path / "a"))
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert {json.dumps({**row, "step": 0}) for row in rows} == {json.dumps(rows[0])}, "nothing was learnt"
    other = validation_rows(
        run(*flags, "--use_lpl", "--seed", 9, "--train_batch_size", 2, "--output_dir", tmp_path / "b")
    )
    assert other[0] == pytest.approx(rows[0], rel=1e-5), "neither seed nor batch size nor --use_lpl matters"

    from lpl_finetuning.data.samples import addressed_normal

    pipeline = StableDiffusionXLPipeline.from_pretrained(sdxl_folder).to(dtype=torch.float64)
    images = list(scan_folder(pictures).images)[:3]
    level, timestep = 3, 350
    abar = pipeline.scheduler.alphas_cumprod[timestep].double()
    errors = []
    for index, image in enumerate(images):
        pixels = torch.from_numpy(np.array(Image.open(image.file).convert("RGB"))).permute(2, 0, 1)[None] / 127.5 - 1
        with torch.no_grad():
            latents = pipeline.vae.encode(pixels.double()).latent_dist.mean * pipeline.vae.config.scaling_factor
            embeds, _, pooled, _ = pipeline.encode_prompt(image.caption)
            noise = addressed_normal(0, [index * 10 + level], latents.shape[1:], "held_out").double()
            time_ids = torch.tensor([[64, 64, 0, 0, 64, 64]], dtype=torch.float64)
            noisy = abar.sqrt() * latents + (1 - abar).sqrt() * noise
            added = {"text_embeds": pooled, "time_ids": time_ids}
            out = pipeline.unet(noisy, timestep, embeds, added_cond_kwargs=added).sample
        errors.append((out - noise).square().mean().item())
    assert rows[0]["validation/diffusion_loss/t350"] == pytest.approx(np.mean(errors), rel=1e-4)
    levels = [value for key, value in rows[0].items() if key.startswith("validation/diffusion_loss/")]
    assert len(levels) == 10 and rows[0]["validation/diffusion_loss"] == pytest.approx(np.mean(levels))
    assert {key for key in rows[0] if "lpl" in key} == {"validation/lpl_loss", "validation/lpl_loss/t50",
                                                        "validation/lpl_loss/t150"}  # fmt: skip
    assert rows[0]["validation/lpl_loss"] > 0


def test_held_out_loss_is_without_dropouts(flags, tmp_path):
    """Neither captions nor a LoRA's inputs are dropped in it, whatever is dropped in training."""
    flags = [*flags, "--use_lora", "--validation_split", 3, "--max_train_steps", 1, "--learning_rate", 0]
    run(
        *flags,
        "--rank",
        4,
        "--lora_alpha",
        64,
        "--learning_rate",
        0.05,
        "--max_train_steps",
        3,
        "--output_dir",
        tmp_path / "a",
    )
    flags = [flag for flag in flags if flag != "--use_lora"] + ["--use_lora", "--init_lora", tmp_path / "a"]
    plain = run(*flags, "--output_dir", tmp_path / "b")
    dropped = run(*flags, "--lora_dropout", 0.7, "--proportion_empty_prompts", 1, "--output_dir", tmp_path / "c")
    assert validation_rows(plain)[0] == pytest.approx(validation_rows(dropped)[0], rel=1e-6)
    losses = [[row["train_loss"] for row in rows if "train_loss" in row] for rows in (plain, dropped)]
    assert losses[0] != losses[1], "while the loss in training feels both"
    alone = run(*flags, "--lora_dropout", 0.7, "--output_dir", tmp_path / "d")
    assert [row["train_loss"] for row in alone if "train_loss" in row] != losses[0], "a continued LoRA's dropout too"


def test_held_out_images_are_not_trained_on(flags, pictures, tmp_path):
    images = list(scan_folder(pictures).images)
    training, held_out = hold_out(images, 0.34)
    assert len(held_out) == 2 and not {i.name for i in held_out} & {i.name for i in training}
    assert sorted([*training, *held_out], key=lambda image: image.name) == images
    assert hold_out(images[::-1], 2)[1] == held_out[::-1], "the order of the folder does not matter"
    folder = tmp_path / "copies"
    shutil.copytree(pictures, folder)
    for image in images:
        shutil.copy(image.file, folder / f"copy-{image.name}")
        (folder / f"copy-{image.name}").with_suffix(".txt").write_text("another caption")
    training, held_out = hold_out(scan_folder(folder).images, 4)
    assert not {i.content for i in training} & {i.content for i in held_out}, "copies stay together"
    args = train_sdxl_lpl.parse_args([*flags, "--validation_split", "0.34"])
    scan, held = scan_module.find_images(data_source(args))
    assert (len(scan.images), len(held)) == (4, 2)
    args = train_sdxl_lpl.parse_args([*flags, "--validation_split", "5", "--max_validation_samples", "2"])
    scan, held = scan_module.find_images(data_source(args))
    assert (len(scan.images), len(held)) == (4, 2), "no more are held out than are measured"
    for amount in ("0.01", "6", "99"):
        args = train_sdxl_lpl.parse_args([*flags, "--validation_split", amount])
        with pytest.raises(DataError, match="--validation_split"):
            scan_module.find_images(data_source(args))


def test_held_out_loss_under_random_crops_and_ema(flags, pictures, tmp_path, capsys):
    """Random crops train, the middle is held out; with EMA the average is measured; overlaps are told."""
    wide = tmp_path / "wide"
    shutil.copytree(pictures, wide)
    for path in wide.glob("*.png"):
        Image.open(path).resize((96, 64)).save(path)
    flags = [*flags, "--max_train_steps", 2, "--validation_steps", 2, "--learning_rate", 0.02]
    held = ["--validation_data_dir", pictures]
    rows = validation_rows(run(*flags, "--train_data_dir", wide, *held, "--output_dir", tmp_path / "a"))
    assert rows[-1]["validation/diffusion_loss"] != rows[0]["validation/diffusion_loss"]
    assert "trained on too" not in capsys.readouterr().out
    average = validation_rows(run(*flags, *held, "--use_ema", "--ema_decay", 0.999, "--output_dir", tmp_path / "b"))
    assert "6 images to validate with are trained on too" in capsys.readouterr().out
    saved = tmp_path / "b"
    again = run(
        *flags, *held, "--pretrained_model_name_or_path", saved, "--learning_rate", 0, "--output_dir", tmp_path / "c"
    )
    assert validation_rows(again)[0]["validation/diffusion_loss"] == pytest.approx(
        average[-1]["validation/diffusion_loss"], rel=1e-5
    ), "what was measured last is what was saved"
    assert (saved / "run.png").is_file()


# ---------------------------------------------------------------------------------------------------------------------
# With and without


def test_compare_shows_where_the_run_started(flags, tmp_path):
    """Two rows a prompt, the upper one the same picture in every grid and after a resume."""
    flags = [*flags, "--validation_prompt", "a red apple", "the sun", "--num_validation_images", 2,
             "--validation_steps", 2,
             "--learning_rate", 0.02, "--checkpointing_steps", 2]  # fmt: skip
    run(*flags, "--max_train_steps", 2, "--output_dir", tmp_path / "plain")
    flags += ["--validation_compare", "--output_dir", tmp_path / "both"]
    run(*flags, "--max_train_steps", 2)
    start = np.asarray(Image.open(tmp_path / "plain/validation/step-0.png"))
    assert np.array_equal(start, np.asarray(Image.open(tmp_path / "both/validation/step-0.png")))
    both = np.asarray(Image.open(tmp_path / "both/validation/step-2.png"))
    assert both.shape == (2 * start.shape[0], *start.shape[1:])
    half = start.shape[0] // 2
    band = half - 164  # of the caption, which differs; 164 px: a picture of 160 px with its margins
    assert np.array_equal(both[band:half], start[band:half]), "the first row is the start's"
    assert not np.array_equal(both[half + band : 2 * half], start[band:half]), "the second row is the trained model's"
    run(*flags, "--max_train_steps", 4, "--resume_from_checkpoint", "latest")
    later = np.asarray(Image.open(tmp_path / "both/validation/step-4.png"))
    assert np.array_equal(later[band:half], start[band:half])
    assert len(list((tmp_path / "both/validation/before").glob("*.png"))) == 4


def test_no_validation_images(flags, tmp_path):
    """--num_validation_images 0, as diffusers' tests give it, draws nothing."""
    run(
        *flags,
        "--validation_prompt",
        "x",
        "--num_validation_images",
        0,
        "--max_train_steps",
        1,
        "--output_dir",
        tmp_path,
    )
    assert not (tmp_path / "validation").exists()


def test_the_card_and_the_file_know_the_run(flags, tmp_path, capsys):
    """Trigger words, rank, alpha and the LoRA that it went on from; the steps are those of the weights."""
    shape = ["--use_lora", "--rank", 3, "--lora_alpha", 6, "--trigger_word", "sks"]
    first, second = tmp_path / "first", tmp_path / "second"
    run(*flags, *shape, "--output_kohya_format", "--max_train_steps", 2, "--checkpointing_steps", 2, "--output_dir",
        first)  # fmt: skip
    with safe_open(first / "pytorch_lora_weights_kohya.safetensors", "np") as file:
        assert file.metadata()["modelspec.trigger_phrase"] == "sks"
    said = (first / "README.md").read_text()
    for part in (
        "| trained | LoRA |",
        "| rank | 3 |",
        "| alpha | 6 |",
        "| steps | 2 |",
        "instance_prompt: sks",
        "`sks`",
    ):
        assert part in said, part
    assert "continued from" not in said
    capsys.readouterr()
    run(*flags, *shape, "--max_train_steps", 1, "--resume_from_checkpoint", "latest", "--output_dir", first)
    assert "the checkpoint has made 2 steps, and the run ends at step 1: nothing is trained" in capsys.readouterr().out
    assert "| steps | 2 |" in (first / "README.md").read_text()
    run(*flags, "--use_lora", "--init_lora", first, "--max_train_steps", 1, "--output_dir", second)
    said = (second / "README.md").read_text()
    assert "| rank | 3 |" in said and "| continued from | a local file |" in said and str(first) not in said
    run(
        *flags,
        "--use_lora",
        "--use_dora",
        "--instance_prompt",
        "a toy",
        "--max_train_steps",
        1,
        "--output_dir",
        second,
    )
    said = (second / "README.md").read_text()
    assert "| trained | DoRA |" in said and "A DoRA for" in said and "instance_prompt: a toy" in said


@pytest.mark.parametrize(("umask", "mode"), [(0o002, 0o664)])
def test_everything_written_follows_the_umask(flags, tmp_path, umask, mode):
    """Results and checkpoints of both kinds, in all formats: another user, or a container's, can read them."""
    before = os.umask(umask)
    try:
        for name, more in {"lora": ["--use_lora", "--output_kohya_format"], "full": ["--single_file"]}.items():
            run(*flags, *more, "--max_train_steps", 1, "--checkpointing_steps", 1, "--output_dir", tmp_path / name,
                "--cache_dir", tmp_path / "cache", "--report_to", "tensorboard")  # fmt: skip
    finally:
        os.umask(before)
    files = [path for name in ("lora", "full", "cache") for path in (tmp_path / name).rglob("*") if path.is_file()]
    assert {path.suffix for path in files} >= {".safetensors", ".json", ".yaml", ".md", ".png", ".jsonl"}
    assert {str(path): oct(path.stat().st_mode & 0o777) for path in files} == {str(path): oct(mode) for path in files}


# ---------------------------------------------------------------------------------------------------------------------
# Two ranks


def test_two_ranks_with_text_encoders_and_held_out_images(flags, tmp_path):
    """Three models' adapters under DDP, stratified timesteps, held-out losses: as one rank that accumulates twice."""
    flags = [*flags, *TEXT, "--use_lpl", "--timestep_sampling", "stratified", "--max_train_steps", 2,
             "--train_batch_size", 2,
             "--proportion_empty_prompts", 0.3, "--validation_split", 3, "--validation_steps", 2]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    two = children.torchrun(2, *command(*flags, "--output_dir", tmp_path / "two")[1:])
    one = command(*flags, "--gradient_accumulation_steps", 2, "--output_dir", tmp_path / "one")
    for words in (two, one):
        result = children.run(words, env=environment, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr[-2000:]
    saved = [load_file(tmp_path / name / LORA_FILE) for name in ("one", "two")]
    for key, value in saved[0].items():
        assert torch.allclose(value, saved[1][key], atol=1e-6), key
    rows = [[json.loads(line) for line in (tmp_path / name / "logs/metrics.jsonl").read_text().splitlines()]
            for name in ("one", "two")]  # fmt: skip
    assert [row["step"] for row in rows[0]] == [row["step"] for row in rows[1]]
    for a, b in zip(*map(validation_rows, rows), strict=True):
        assert a == pytest.approx(b, rel=1e-5)


def test_plan_names_what_is_trained(flags, tmp_path, capsys):
    AcceleratorState._reset_state(True)
    args = train_sdxl_lpl.parse_args(
        [*flags, *TEXT, "--rank", "8", "--use_dora", "--optimizer", "Prodigy", "--validation_split", "2", "--dry_run",
         "--output_dir", str(tmp_path)]
    )  # fmt: skip
    train_sdxl_lpl.main(args, *scan_module.find_images(data_source(args)))
    said = capsys.readouterr().out
    for part in ("of the text_encoder_2 (DoRA of rank 8, alpha 8)", "4, held out: 2",
                 "--optimizer prodigy multiplies",
                 "the loss of 2 held-out images at 10 noise levels"):  # fmt: skip
        assert part in said, part


@pytest.mark.parametrize(("schedule", "warmup", "warned"), [
    ("cosine", None, 500), ("constant_with_warmup", 3, 3), ("linear", 4, 4), ("cosine", 2, None),
    ("polynomial", 0, None), ("constant", None, None),
])  # fmt: skip
def test_a_warm_up_that_outlasts_the_run_is_told(flags, tmp_path, capsys, schedule, warmup, warned):
    AcceleratorState._reset_state(True)
    at = flags.index("--lr_warmup_steps")
    words = [*flags[:at], *flags[at + 2 :], "--max_train_steps", 3, "--lr_scheduler", schedule, "--dry_run"]
    words += ["--output_dir", tmp_path] + (["--lr_warmup_steps", warmup] if warmup is not None else [])
    args = train_sdxl_lpl.parse_args(list(map(str, words)))
    train_sdxl_lpl.main(args, *scan_module.find_images(data_source(args)))
    said = [line for line in capsys.readouterr().out.splitlines() if "warming up" in line]
    assert said == ([] if warned is None else [
        "warning: the learning rate is still warming up when the run ends: "
        f"--lr_warmup_steps {warned} of 3 steps; lower it"
    ])  # fmt: skip
