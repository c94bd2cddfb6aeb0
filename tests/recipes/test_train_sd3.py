"""The SD3 recipe end to end, on tiny random pipelines: flow, conditions, results, resuming, mistakes."""

import json
import math
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3
from PIL import Image
from safetensors.torch import load_file

import train_sd3_lpl_flow
from lpl_finetuning.data import scan as scan_module
from lpl_finetuning.errors import UserError, errors_for_people
from lpl_finetuning.flags import data_source
from lpl_finetuning.lora_files import LORA_FILE
from lpl_finetuning.training import objective
from lpl_finetuning.training import run as run_module
from lpl_finetuning.training.models import vae_config
from lpl_finetuning.training.plan import plan_run
from lpl_utils import LPLGate, estimate_z0
from tests import children
from tests.children import start
from tests.runs import assert_resume_is_exact, forbid_loading, objective_of
from tests.sd3 import command, run, weights

GOLDEN = Path(__file__).parents[1] / "golden"
TEXT = ["--use_lora", "--train_text_encoder"]


@pytest.fixture
def flags(sd3_folder, pictures, cache_dir):
    """The flags that every run here shares."""
    return (
        f"--pretrained_model_name_or_path {sd3_folder} --train_data_dir {pictures} --cache_dir {cache_dir} "
        "--resolution 64 --train_batch_size 4 --lr_warmup_steps 0 --learning_rate 1e-3 --report_to none --seed 3 "
        "--logging_steps 1 --mixed_precision no"
    ).split()


@pytest.fixture
def schedule(flags):
    """Function from flags to the script's `Schedule`."""
    return lambda *more: train_sd3_lpl_flow.Schedule(train_sd3_lpl_flow.parse_args([*flags, *map(str, more)]))


# ---------------------------------------------------------------------------------------------------------------------
# Flow


def test_the_estimate_undoes_the_flow(schedule):
    """From the right velocity the estimate is z_0, at any level, to float32's rounding; float64 agrees."""
    law = schedule()
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 64, 16, 4, 4, generator=generator)
    timesteps = law.draw_timesteps((torch.arange(64) + 0.5) / 64)
    alpha, sigma = law.levels(timesteps)
    noisy = alpha.view(-1, 1, 1, 1) * latents + sigma.view(-1, 1, 1, 1) * noise
    estimate = estimate_z0(law.target(latents, noise), noisy, alpha, sigma, law.prediction_type)
    assert torch.allclose(estimate, latents, atol=1e-5)
    exact = (1 - timesteps.double() / 1000).view(-1, 1, 1, 1) * latents + (timesteps.double() / 1000).view(
        -1, 1, 1, 1
    ) * noise
    assert torch.allclose(noisy.double(), exact, atol=1e-6)
    assert ((alpha + sigma) == 1).all() or torch.allclose(alpha + sigma, torch.ones(64))


@pytest.mark.parametrize("shift", [None, 1, 3, "auto"])
@pytest.mark.parametrize(
    "scheme",
    [
        ["logit_normal"],
        ["logit_normal", "--logit_mean", -0.7, "--logit_std", 0.5],
        ["mode"],
        ["mode", "--mode_scale", -0.6],
        ["cosmap"],
        ["sigma_sqrt"],
        ["none"],
    ],
    ids=lambda words: "-".join(map(str, words[:3])),
)
def test_noise_levels_are_distributed_as_in_diffusers(schedule, scheme, shift):
    """The same distribution as diffusers' density, looked up in its scheduler (Kolmogorov-Smirnov, 40,000 draws)."""
    law = schedule("--weighting_scheme", *scheme, *(["--timestep_shift", shift] if shift else []))
    used = {None: 3.0, "auto": 3.0 * 64 / 1024}.get(shift, shift)
    assert law.shift == pytest.approx(used)
    options = dict(zip([word.strip("-") for word in scheme[1::2]], scheme[2::2], strict=True))
    defaults = {"logit_mean": 0.0, "logit_std": 1.0, "mode_scale": 1.29}
    count = 40000
    u = compute_density_for_timestep_sampling(
        scheme[0], count, **(defaults | options), generator=torch.Generator().manual_seed(1)
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=used)
    theirs = scheduler.sigmas[(u * 1000).long().clamp_max(999)].sort().values
    ours = (law.draw_timesteps((torch.arange(count) + 0.5) / count) / 1000).sort().values
    grid = torch.linspace(0, 1, 2001)
    distance = (torch.searchsorted(theirs, grid) - torch.searchsorted(ours, grid)).abs().max() / count
    assert distance < 1.95 / math.sqrt(count) + 1e-3, "at the 0.1 % level; 1e-3: diffusers draws from 1,000 levels"


def test_positive_logit_mean_means_less_noise(schedule):
    means = [schedule("--logit_mean", mean).typical_timesteps().mean().item() for mean in (-1, 0, 1)]
    assert means[0] > means[1] > means[2]


def test_addressed_draws_follow_the_distribution(flags, schedule):
    for sampling in ("independent", "stratified"):
        args = train_sd3_lpl_flow.parse_args([*flags, "--timestep_sampling", sampling])
        law = train_sd3_lpl_flow.Schedule(args)
        latents = torch.empty(1, 16, 8, 8)
        drawn = objective.sample_timesteps(range(16000), latents, objective_of(args, law)).sort().values
        distance = (drawn - law.draw_timesteps((torch.arange(16000) + 0.5) / 16000).sort().values).abs()
        assert distance.quantile(0.99) < 25 and drawn.dtype == torch.float32, sampling


@pytest.mark.parametrize("scheme", ["logit_normal", "mode", "sigma_sqrt", "cosmap", "none"])
def test_loss_weights_are_those_of_diffusers(schedule, scheme):
    law = schedule("--weighting_scheme", scheme)
    timesteps = law.typical_timesteps()[::997]
    theirs = compute_loss_weighting_for_sd3(scheme, timesteps / 1000)
    assert torch.allclose(law.loss_weights(timesteps), theirs, rtol=1e-5)
    assert torch.allclose(
        schedule("--weighting_scheme", scheme, "--precondition_outputs", 1).loss_weights(timesteps),
        theirs * (timesteps / 1000) ** 2,
        rtol=1e-5,
    ), "the loss of z_t - sigma * out against z_0"


def test_weights_and_preconditioning_reach_the_loss(flags, tmp_path):
    seen = {}
    for name, more in {
        "plain": [], "precondition": ["--precondition_outputs", 1], "cosmap": ["--weighting_scheme", "cosmap"],
        "mode": ["--weighting_scheme", "mode"], "sqrt": ["--weighting_scheme", "sigma_sqrt"],
        "mean": ["--logit_mean", 1], "std": ["--logit_std", 0.3], "shift": ["--timestep_shift", 1],
        "auto": ["--timestep_shift", "auto"], "none": ["--weighting_scheme", "none"], "noise": ["--noise_offset", 1],
        "length": ["--max_sequence_length", 5], "scale": ["--weighting_scheme", "mode", "--mode_scale", 0.3],
    }.items():  # fmt: skip
        rows = run(*flags, *more, "--max_train_steps", 1, "--output_dir", tmp_path / name, result=False)
        seen[name] = f"{rows[0]['diffusion_loss']:.7g}"
    assert len(set(seen.values())) == len(seen), seen


def test_gated_share_comes_from_the_distribution(schedule, capsys, flags, tmp_path):
    """Half of the samples by default; t < 200 takes 0.6 %, which is warned of with a threshold that takes 20 %."""
    law = schedule()
    assert law.gated_share(LPLGate(sigma_threshold=3)) == pytest.approx(0.5, abs=1e-3)
    assert law.gated_share(LPLGate(t_threshold=200)) == pytest.approx(0.0064, abs=1e-3)
    args = train_sd3_lpl_flow.parse_args([*flags, "--use_lpl", "--lpl_t_threshold", "200", "--dry_run"])
    AcceleratorState._reset_state(True)
    train_sd3_lpl_flow.main(args, *scan_module.find_images(data_source(args)))
    said = capsys.readouterr().out
    assert "LPL: where t < 200, 0.6 % of samples" in said and "under 2 %" in said
    [named] = [word for word in said.split("--lpl_t_threshold ")[1:]]
    threshold = float(named.split()[0])
    assert law.gated_share(LPLGate(t_threshold=threshold)) == pytest.approx(0.2, abs=0.005)
    by_level = float(law.threshold_for(0.2, by_timestep=False).split()[1])
    assert law.gated_share(LPLGate(sigma_threshold=by_level)) == pytest.approx(0.2, abs=0.005)


def test_timesteps_reach_the_transformer_unrounded(flags, tmp_path, monkeypatch):
    """Under bfloat16 too, the transformer is told the level that the latents were noised with."""
    seen = []
    original = train_sd3_lpl_flow.SD3Transformer2DModel.forward

    def spy(self, noisy_latents, prompt, pooled, timesteps):
        if timesteps.device.type != "meta":  # the plan's estimate of memory
            seen.append((noisy_latents.dtype, timesteps))
        return original(self, noisy_latents, prompt, pooled, timesteps)

    monkeypatch.setattr(train_sd3_lpl_flow.SD3Transformer2DModel, "forward", spy)
    run(*flags, "--mixed_precision", "bf16", "--use_lora", "--max_train_steps", 2, "--output_dir", tmp_path)
    assert len(seen) == 2
    for dtype, timesteps in seen:
        assert dtype == torch.bfloat16 and timesteps.dtype == torch.float32
        assert not torch.equal(timesteps, timesteps.bfloat16().float())


# ---------------------------------------------------------------------------------------------------------------------
# Golden curves


@pytest.mark.parametrize("name", ["full", "full-lpl", "lora-lpl"])
def test_golden_curve(name, flags, tmp_path, request):
    """20 steps give the losses they always gave: any change of the recipe shows here."""
    extra = {"full": [], "full-lpl": ["--use_lpl"], "lora-lpl": ["--use_lpl", "--use_lora", "--lora_alpha", 8]}[name]
    rows = run(*flags, *extra, "--max_train_steps", 20, "--output_dir", tmp_path)
    keys = ["train_loss", "diffusion_loss", "lpl/loss", "lpl/weight", "grad_norm"]
    curve = {key: [row[key] for row in rows if key in row] for key in keys}
    path = GOLDEN / f"sd3-{name}.json"
    if request.config.getoption("--update-golden"):
        path.write_text(json.dumps({key: [float(f"{v:.6g}") for v in values] for key, values in curve.items()}))
    golden = json.loads(path.read_text())
    assert golden.keys() == curve.keys()
    for key, values in golden.items():
        assert curve[key] == pytest.approx(values, rel=2e-3, abs=1e-6), key
    assert (len(golden["lpl/loss"]) == 20) == ("lpl" in name)


# ---------------------------------------------------------------------------------------------------------------------
# Conditions


@pytest.mark.parametrize("kind", ["t5", "no-t5", "long"])
def test_what_training_sees_is_what_the_pipeline_encodes(kind, flags, sd3_folder, tmp_path):
    """Each caption with its own image: latents and embeddings through the caches are the pipeline's own."""
    from tests.tiny_models import sd3_pipeline

    folder, length = sd3_folder, 9 if kind == "long" else 77
    if kind == "no-t5":
        folder = tmp_path / "model"
        sd3_pipeline(t5=False, sd35=True).save_pretrained(folder)
    words = [*flags, "--output_dir", str(tmp_path / "out"), "--cache_dir", str(tmp_path / "cache"), "--random_flip"]
    words += ["--pretrained_model_name_or_path", str(folder), "--max_sequence_length", str(length)]
    args = train_sd3_lpl_flow.parse_args(words)
    AcceleratorState._reset_state(True)
    accelerator = run_module.start_accelerator(args)
    scan, _ = scan_module.find_images(data_source(args))
    data = train_sd3_lpl_flow.fill_caches(args, scan.images, [], torch.float32, accelerator)
    assert data.cached
    more = {"text_encoder_3": None, "tokenizer_3": None} if kind == "no-t5" else {}
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, **more)
    seen = set()
    ranks = [SimpleNamespace(num_processes=2, process_index=rank, device=accelerator.device) for rank in (0, 1)]
    loaders = [run_module.batches(args, data, rank, 5, 8) for rank in ranks]  # from step 5: a resume
    for batch in (batch for loader in loaders for batch in loader):
        for row, index in enumerate(batch["index"]):
            image = scan.images[index]
            seen.add(image.name)
            pixels = torch.from_numpy(np.array(Image.open(image.file).convert("RGB"))).permute(2, 0, 1)[None] / 127.5
            with torch.no_grad():
                sides = [pipeline.vae.encode(side - 1).latent_dist.mean[0] for side in (pixels, pixels.flip(-1))]
                embeds, _, pooled, _ = pipeline.encode_prompt(
                    image.caption, None, None, do_classifier_free_guidance=False, max_sequence_length=length
                )
            assert any(torch.allclose(batch["mean"][row], side, atol=1e-5) for side in sides)
            assert torch.allclose(batch["prompt_embeds"][row], embeds[0], atol=1e-5)
            assert torch.allclose(batch["pooled_prompt_embeds"][row], pooled[0], atol=1e-5)
            assert batch["prompt_embeds"][row].shape == (77 + length, 40)
    assert len(seen) == 6


def test_latents_are_shifted_and_scaled(flags, sd3_folder):
    """z_model = (z_vae - shift) * scaling, as the pipeline undoes it."""
    args = train_sd3_lpl_flow.parse_args(flags)
    config = vae_config(args.base_model)
    assert config["shift_factor"] and config["scaling_factor"] != 1
    space = config["scaling_factor"], config["shift_factor"]
    mean = torch.randn(2, 16, 8, 8)
    goal = objective_of(args, space=space)
    batch = objective.with_noise({"mean": mean, "std": torch.zeros_like(mean), "number": [0, 1]}, goal)
    latents = objective.sample_latents(batch, goal)
    assert torch.allclose(latents / config["scaling_factor"] + config["shift_factor"], mean, atol=1e-6)


def test_caption_dropout_is_the_empty_prompt(flags, sd3_folder, tmp_path):
    """With all captions dropped, the losses are those of a folder whose captions are all empty prompts' equals."""
    args = train_sd3_lpl_flow.parse_args([*flags, "--output_dir", str(tmp_path)])
    AcceleratorState._reset_state(True)
    accelerator = run_module.start_accelerator(args)
    scan, _ = scan_module.find_images(data_source(args))
    data = train_sd3_lpl_flow.fill_caches(args, scan.images, [], torch.float32, accelerator)
    plan = plan_run(args, accelerator, train_sd3_lpl_flow.Schedule(args), len(scan.images))
    objective, _ = train_sd3_lpl_flow.prepare_objective(args, accelerator, plan, data)
    pipeline = StableDiffusion3Pipeline.from_pretrained(sd3_folder)
    with torch.no_grad():
        embeds, _, pooled, _ = pipeline.encode_prompt(
            "", None, None, do_classifier_free_guidance=False, max_sequence_length=77
        )
    batch = {
        "number": np.arange(50),
        "prompt_embeds": torch.ones(50, 154, 40),
        "pooled_prompt_embeds": torch.ones(50, 32),
    }
    (prompt,) = train_sd3_lpl_flow.conditioning(batch, objective, dropout=1.0)
    assert torch.allclose(prompt["prompt_embeds"], embeds.expand(50, -1, -1), atol=1e-5)
    assert torch.allclose(prompt["pooled_prompt_embeds"], pooled.expand(50, -1), atol=1e-5)


def test_frozen_text_encoders_give_the_cached_embeddings(flags, tmp_path):
    flags = [*flags, "--use_lora", "--learning_rate", 0, "--max_train_steps", 3, "--proportion_empty_prompts", 0.4]
    cached = run(*flags, "--output_dir", tmp_path / "cached")
    live = run(*flags, "--train_text_encoder", "--output_dir", tmp_path / "live")
    for a, b in zip(cached, live, strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Results


@pytest.mark.parametrize("kind", [TEXT, [*TEXT, "--use_dora"], ["--use_lora", "--use_dora"]],
                         ids=["text", "dora-text", "dora"])  # fmt: skip
def test_lora_loads_and_draws_what_training_drew(kind, flags, sd3_folder, tmp_path):
    """Alpha apart from rank: float32 tensors; `load_lora_weights` restores the picture, --init_lora the tensors.

    The shift of the timesteps is not in the file: pictures have the base model's, whatever training has.
    """
    run(*flags, *kind, "--use_lpl", "--lora_alpha", 16, "--learning_rate", 0.03, "--max_train_steps", 6,
        "--timestep_shift", 1.2, "--output_dir", tmp_path, "--validation_prompt", "a red apple",
        "--num_validation_images", 2)  # fmt: skip
    tensors = load_file(tmp_path / LORA_FILE)
    assert {value.dtype for value in tensors.values()} == {torch.float32}
    parts = {"transformer", "text_encoder", "text_encoder_2"} if "--train_text_encoder" in kind else {"transformer"}
    assert {name.split(".")[0] for name in tensors} == parts
    pipeline = StableDiffusion3Pipeline.from_pretrained(sd3_folder)
    pipeline.set_progress_bar_config(disable=True)

    def picture():
        image = pipeline("a red apple", generator=torch.Generator().manual_seed(4), num_inference_steps=3, height=64,
                         width=64, max_sequence_length=77).images[0]  # fmt: skip
        return np.asarray(image, dtype=np.int64)

    before = picture()
    pipeline.load_lora_weights(tmp_path)
    assert pipeline.transformer.peft_config["default_0"].lora_alpha == 16
    validated = np.asarray(Image.open(tmp_path / "image_1.png"), dtype=np.int64)
    assert np.abs(picture() - validated).max() <= 1 < 8 < np.abs(before - validated).max()
    kind = [flag for flag in kind if flag != "--use_dora"]
    run(*flags, *kind, "--init_lora", tmp_path, "--learning_rate", 0, "--max_train_steps", 1, "--output_dir",
        tmp_path / "same")  # fmt: skip
    assert weights(tmp_path) == weights(tmp_path / "same")


@pytest.mark.parametrize("kind", ["sd3", "sd35-no-t5"])
def test_full_training_saves_a_whole_pipeline(kind, flags, sd3_folder, tmp_path):
    from tests.tiny_models import sd3_pipeline

    more = {}
    if kind != "sd3":
        sd3_folder, more = tmp_path / "model", {"text_encoder_3": None, "tokenizer_3": None}
        sd3_pipeline(t5=False, sd35=True).save_pretrained(sd3_folder)
    run(*flags, "--pretrained_model_name_or_path", sd3_folder, "--use_lpl", "--max_train_steps", 2,
        "--timestep_shift", 2, "--output_dir", tmp_path / "out")  # fmt: skip
    saved = StableDiffusion3Pipeline.from_pretrained(tmp_path / "out", **more)
    base = StableDiffusion3Pipeline.from_pretrained(sd3_folder, **more)
    assert saved.scheduler.config.shift == 2, "what it was trained with is what it samples with"
    changed = [name for name, value in saved.transformer.state_dict().items()
               if not torch.equal(value, base.transformer.state_dict()[name])]  # fmt: skip
    assert len(changed) > 20
    for part in ("vae", "text_encoder", "text_encoder_2"):
        own = getattr(base, part).state_dict()
        assert all(torch.equal(value, own[name]) for name, value in getattr(saved, part).state_dict().items()), part


def test_saving_leaves_the_live_model_as_it_was(flags, tmp_path):
    """A run that saves at every step has the losses of one that never saves."""
    flags = [*flags, *TEXT, "--use_ema", "--mixed_precision", "bf16", "--max_train_steps", 5]
    often = run(*flags, "--checkpointing_steps", 1, "--output_dir", tmp_path / "often")
    never = run(*flags, "--output_dir", tmp_path / "never")
    assert [row["train_loss"] for row in often] == [row["train_loss"] for row in never]


def test_files_for_other_programs(flags, sd3_folder, tmp_path):
    """A LoRA in kohya's names, and a whole model as one file that diffusers' converter reads back."""
    from diffusers import SD3Transformer2DModel

    run(*flags, *TEXT, "--output_kohya_format", "--max_train_steps", 1, "--output_dir", tmp_path / "lora")
    names = load_file(tmp_path / "lora" / "pytorch_lora_weights_kohya.safetensors").keys()
    assert "lora_unet_joint_blocks_0_x_block_attn_qkv.alpha" in names
    assert any(name.startswith("lora_te2_text_model_") for name in names)
    run(*flags, "--single_file", "--learning_rate", 0.01, "--max_train_steps", 1, "--output_dir", tmp_path / "full")
    single = tmp_path / "full" / "model.safetensors"
    read = SD3Transformer2DModel.from_single_file(single, config=str(sd3_folder), subfolder="transformer")
    saved = SD3Transformer2DModel.from_pretrained(tmp_path / "full", subfolder="transformer")
    for name, value in saved.state_dict().items():
        if "pos_embed.pos_embed" not in name and "text_embedder.linear_1" not in name:  # CLIP-L's projection is in it
            assert torch.allclose(value, read.state_dict()[name].float(), atol=2e-3), name


def test_lora_layers_and_blocks(flags, tmp_path):
    run(*flags, "--use_lora", "--lora_layers", "attn.to_q,attn.to_k", "--lora_blocks", "0, 2", "--max_train_steps", 1,
        "--output_dir", tmp_path)  # fmt: skip
    modules = {name.split(".lora_")[0] for name in load_file(tmp_path / LORA_FILE)}
    assert modules == {f"transformer.transformer_blocks.{block}.attn.{layer}" for block in (0, 2)
                       for layer in ("to_q", "to_k")}  # fmt: skip
    run(*flags, "--use_lora", "--lora_blocks", "2", "--max_train_steps", 1, "--output_dir", tmp_path / "last")
    last = {name.split(".lora_")[0].split(".", 3)[3] for name in load_file(tmp_path / "last" / LORA_FILE)}
    assert last == set(train_sd3_lpl_flow.SD3.lora_layers) - {"attn.to_add_out"}, "which the last block does not have"
    run(*flags, "--use_lora", "--max_train_steps", 1, "--output_dir", tmp_path)
    layers = {name.split(".lora_")[0].split(".", 3)[3] for name in load_file(tmp_path / LORA_FILE)}
    assert layers == set(train_sd3_lpl_flow.SD3.lora_layers), "diffusers' default targets"
    run(*flags, "--use_lora", "--init_lora", tmp_path, "--max_train_steps", 1, "--output_dir", tmp_path / "more")
    assert load_file(tmp_path / "more" / LORA_FILE).keys() == load_file(tmp_path / LORA_FILE).keys()


# ---------------------------------------------------------------------------------------------------------------------
# Resuming, ranks


@pytest.mark.parametrize(
    "kind",
    [
        [*TEXT, "--use_ema", "--lora_dropout", 0.2, "--proportion_empty_prompts", 0.5],
        ["--random_flip", "--use_8bit_adam"],
    ],
    ids=["lora-text-ema", "full-8bit"],
)
def test_resume_is_bit_exact(kind, flags, tmp_path):
    assert_resume_is_exact(train_sd3_lpl_flow, [*flags, *kind, "--use_lpl"], tmp_path)


def test_a_killed_run_goes_on_bit_for_bit(flags, tmp_path):
    """SIGKILL in mid-epoch, with text encoders, EMA and accumulation; the same tensors at the end."""
    flags = [*flags, *TEXT, "--use_ema", "--gradient_accumulation_steps", 2, "--use_lpl", "--max_train_steps", 14,
             "--checkpointing_steps", 4]  # fmt: skip
    run(*flags, "--output_dir", tmp_path / "whole")
    process = start(command(*flags, "--output_dir", tmp_path / "killed"), stderr=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL)  # fmt: skip
    metrics, deadline = tmp_path / "killed" / "logs" / "metrics.jsonl", time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        if metrics.is_file() and metrics.read_text().count("\n") > 5:  # after checkpoint 4
            process.send_signal(signal.SIGKILL)
        time.sleep(0.005)
    assert time.monotonic() < deadline, "the run never came so far"
    assert process.wait() == -signal.SIGKILL
    run(*flags, "--output_dir", tmp_path / "killed", "--resume_from_checkpoint", "latest")
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")


def test_two_ranks_equal_one_with_twice_the_accumulation(flags, tmp_path):
    flags = [*flags, *TEXT, "--use_lpl", "--max_train_steps", 2, "--train_batch_size", 2, "--validation_split", 3,
             "--validation_steps", 2, "--timestep_sampling", "stratified"]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for words in (
        children.torchrun(2, *command(*flags, "--output_dir", tmp_path / "two")[1:]),
        command(*flags, "--gradient_accumulation_steps", 2, "--output_dir", tmp_path / "one"),
    ):
        result = children.run(words, env=environment, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr[-2000:]
    saved = [load_file(tmp_path / name / LORA_FILE) for name in ("one", "two")]
    for key, value in saved[0].items():
        assert torch.allclose(value, saved[1][key], atol=1e-6), key
    rows = [[json.loads(line) for line in (tmp_path / name / "logs" / "metrics.jsonl").read_text().splitlines()]
            for name in ("one", "two")]  # fmt: skip
    held_out = [[row for row in run_ if "validation/diffusion_loss" in row] for run_ in rows]
    assert len(held_out[0]) == 2
    for a, b in zip(*held_out, strict=True):
        assert a == pytest.approx(b, rel=1e-5)


def test_validation_draws_with_the_shift_that_is_saved(flags, tmp_path):
    """Full training with another shift: the last picture is what the saved pipeline draws."""
    run(*flags, "--timestep_shift", 1.2, "--max_train_steps", 1, "--validation_prompt", "a red apple",
        "--num_validation_images", 1, "--output_dir", tmp_path, pictures=True)  # fmt: skip
    pipeline = StableDiffusion3Pipeline.from_pretrained(tmp_path)
    image = pipeline("a red apple", generator=torch.Generator().manual_seed(3), num_inference_steps=28, height=64,
                     width=64, max_sequence_length=77).images[0]  # fmt: skip
    drawn = np.asarray(Image.open(tmp_path / "image_0.png"), dtype=np.int64)
    assert np.abs(drawn - np.asarray(image, dtype=np.int64)).max() <= 1


def test_held_out_losses_per_level(flags, tmp_path):
    """At ten levels of sigma; LPL at those that the gate takes, sigma <= 0.75."""
    rows = run(
        *flags, "--validation_split", 2, "--max_train_steps", 2, "--validation_steps", 1, "--output_dir", tmp_path
    )
    first, *_, last = [row for row in rows if "validation/diffusion_loss" in row]
    assert {key for key in first if "diffusion_loss/" in key} == {
        f"validation/diffusion_loss/t{50 + 100 * i}" for i in range(10)
    }
    assert {key for key in first if "lpl_loss/" in key} == {f"validation/lpl_loss/t{50 + 100 * i}" for i in range(8)}
    assert last["validation/diffusion_loss"] != first["validation/diffusion_loss"]


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


MISTAKES = [
    ("--pretrained_model_name_or_path {sdxl}", "is a StableDiffusionXLPipeline; this script trains StableDiffusion3"),
    ("--pretrained_model_name_or_path {gutted}", "transformer"),
    ("--single_file --use_lora", "--single_file"),
    ("--weighting_scheme logitnormal", "--weighting_scheme"),
    ("--timestep_shift -1", "--timestep_shift"),
    ("--timestep_shift much", "--timestep_shift"),
    ("--logit_std 0", "--logit_std"),
    ("--weighting_scheme mode --mode_scale 9", "--mode_scale is 9"),
    ("--lora_blocks 1", "--lora_blocks does nothing without --use_lora"),
    ("--use_lora --lora_blocks one", "--lora_blocks one"),
    ("--use_lora --lora_blocks 0,99", "--lora_blocks 0,99: the transformer has blocks 0 to 2"),
    ("--use_lora --lora_layers attn.to_q,attn.to_x", "the transformer has no layer called attn.to_x"),
    ("--resolution 72", "--resolution is 72; it must be a multiple of 16"),
    ("--max_sequence_length 0", "--max_sequence_length"),
    ("--snr_gamma 5", "--snr_gamma"),
    ("--lpl_t_threshold 100 --lpl_sigma_threshold 3", "exclude each other"),
    ("--instance_data_dir /tmp", "exclude each other"),
    ("--train_text_encoder", "--train_text_encoder does nothing without --use_lora"),
]


@pytest.mark.parametrize(("mistake", "said"), MISTAKES, ids=[mistake[:50] for mistake, _ in MISTAKES])
def test_mistakes_are_told_before_weights_load(
    mistake, said, flags, sd3_folder, sdxl_folder, tmp_path, monkeypatch, capsys
):
    gutted = tmp_path / "gutted"
    shutil.copytree(sd3_folder, gutted)
    shutil.rmtree(gutted / "transformer")
    forbid_loading(monkeypatch, train_sd3_lpl_flow)
    words = [*flags, *mistake.format(sdxl=sdxl_folder, gutted=gutted).split(), "--output_dir", tmp_path / "out"]
    with pytest.raises(SystemExit) as stopped, errors_for_people(False):
        run(*words, "--max_train_steps", 1)
    message = capsys.readouterr().err
    assert stopped.value.code == 2 and said in message and "Traceback" not in message


def test_another_model_and_a_wrong_checkpoint(flags, tmp_path):
    """A fine-tuned transformer to start from; a checkpoint of another run is refused."""
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
    run(*flags, "--pretrained_transformer_model_name_or_path", tmp_path / "a" / "checkpoint-2", "--learning_rate", 0,
        "--max_train_steps", 1, "--output_dir", tmp_path / "b")  # fmt: skip
    assert weights(tmp_path / "b") == weights(tmp_path / "a")
    with pytest.raises(UserError, match="seed was 3, is 4"):
        run(
            *flags,
            "--seed",
            4,
            "--max_train_steps",
            4,
            "--resume_from_checkpoint",
            "latest",
            "--output_dir",
            tmp_path / "a",
        )


def test_bf16_checkpointing_and_optimizers_train(flags, tmp_path):
    flags = [*flags, "--use_lpl", "--max_train_steps", 2]
    exact = run(*flags, "--output_dir", tmp_path / "a")
    for name, more in {
        "bf16": ["--mixed_precision", "bf16"], "checkpointing": ["--gradient_checkpointing"],
        "text": ["--gradient_checkpointing", *TEXT], "dora": ["--use_lora", "--use_dora"],
    }.items():  # fmt: skip
        rows = run(*flags, *more, "--output_dir", tmp_path / name)
        assert rows[0]["diffusion_loss"] == pytest.approx(exact[0]["diffusion_loss"], rel=0.02), name
        assert rows[0]["lpl/loss"] == pytest.approx(exact[0]["lpl/loss"], rel=0.1), name
