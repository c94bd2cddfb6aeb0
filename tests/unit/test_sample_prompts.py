"""Validation prompts from a file: what is read, what is refused, and where the samplers end."""

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import train_sd3_lpl_flow
import train_sdxl_lpl
from lpl_finetuning import sample_prompts
from lpl_finetuning.errors import UserError
from lpl_finetuning.flags import encoding_settings, save_recipe
from lpl_finetuning.sample_prompts import SamplePrompt, entries_of, read_prompts_file, sampler_named, scheduler_of
from lpl_finetuning.training.checkpoint_folders import changes_since
from lpl_finetuning.training.plan import print_run
from lpl_finetuning.training.run import save_entries
from lpl_finetuning.training.validation import Grids, labelled_rows, with_moment

LINES = """# two animals

a fox in the snow, --  at dusk --n blurry, text --W 832 --h 1216 --d 42 --s 30 --l 5.5 --ss k_euler_a --g 3.5
a cat
"""
YAML = """
- prompt: a fox in the snow, -- at dusk
  negative: blurry, text
  width: 832
  height: 1216
  steps: 30
  guidance: 5.5
  seed: 42
  sampler: Euler a
- a cat
"""
JSON = """[{"prompt": "a fox in the snow, -- at dusk", "negative_prompt": "blurry, text", "width": 832, "height": 1216,
"sample_steps": 30, "scale": 5.5, "seed": 42, "sample_sampler": "euler_a"}, "a cat"]"""
FOX = SamplePrompt("a fox in the snow, -- at dusk", "blurry, text", 832, 1216, 30, 5.5, 42, "euler_a")


def written(folder, name, text):
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def parse(script, file, *words):
    return script.parse_args(["--validation_prompts_file", str(file), "--output_dir", "never-made", *words])


@pytest.mark.parametrize(("name", "text"), [("a.txt", LINES), ("a.yaml", YAML), ("a.json", JSON)])
def test_the_same_entries_in_each_form(name, text, tmp_path, capsys):
    """Lines of sd-scripts, a YAML list, sd-scripts' JSON; what is left out is named with its line."""
    path = written(tmp_path, name, "\ufeff" + text)
    assert read_prompts_file(path) == (FOX, SamplePrompt("a cat"))
    said = capsys.readouterr().err
    assert ("line 3: --g, Flux' embedded guidance, is left out" in said) == (name == "a.txt")
    again = written(tmp_path, "again.yaml", sample_prompts.entries_text(read_prompts_file(path)))
    assert read_prompts_file(again) == (FOX, SamplePrompt("a cat")), "what a run keeps is read again"


def test_texts_that_yaml_takes_for_something_else(tmp_path, capsys):
    entries = read_prompts_file(written(tmp_path, "a.yml", "- no\n- prompt: 007\n- {prompt: '(cat:1.3)', seed: 0}\n"))
    assert [entry.prompt for entry in entries] == ["no", "007", "(cat:1.3)"] and entries[2].seed == 0
    assert "entry 3: weights such as (word:1.2) are read as plain text" in capsys.readouterr().err


REFUSED = [
    ("a.txt", "cat --w wide", "line 1: width is 'wide'; it must be a whole number from 1 to 8192"),
    ("a.txt", "#\n\ncat --x 3", "line 3: unknown --x; there are --n, --w, --h, --s, --l, --d, --ss"),
    ("a.txt", "cat --cn a.png", "line 1: --cn, a picture for a ControlNet, is not there for sample pictures"),
    ("a.txt", "--n cat", "line 1 begins with --n: write the prompt first"),
    ("a.txt", "cat --n", "line 1: no value follows --n"),
    ("a.txt", "cat --s 3 --s 4", "line 1: --s comes twice"),
    ("a.txt", "# cat\n", "there is no prompt in it"),
    ("a.yaml", "", "there is no prompt in it"),
    ("a.yaml", "prompt: cat", "found a dict; expected a list of entries such as `- prompt: a red apple`"),
    ("a.yaml", "- [cat]", "entry 1 is a list; expected a prompt"),
    ("a.yaml", "- seed: 3", "entry 1 has no prompt"),
    ("a.yaml", "- cat\n- {prompt: cat, sede: 3}", "entry 2: unknown key sede; did you mean seed?"),
    ("a.yaml", "- {prompt: cat, steps: 3, sample_steps: 4}", "entry 1: steps comes twice"),
    ("a.yaml", "- {prompt: cat, steps: 3, steps: 4}", "not valid YAML: steps comes twice"),
    ("a.yaml", "- {prompt: [a, cat]}", r"entry 1: prompt is \['a', 'cat'\]; it takes one value"),
    ("a.yaml", "- {prompt: cat, seed: -1}", "entry 1: seed is '-1'.*keep their seed at every validation"),
    ("a.yaml", "- {prompt: cat, steps: 0}", "entry 1: steps is '0'; it must be a whole number from 1 to 1000"),
    ("a.yaml", "- {prompt: cat, guidance: nan}", "entry 1: guidance is 'nan'; it must be a number, 0 or more"),
    ("a.yaml", "- {prompt: cat, sampler: dpmpp_2n}", "no sampler is called 'dpmpp_2n'; did you mean dpmpp_2m"),
    ("a.yaml", "- {prompt: cat, sampler: ddim_karras}", "no sampler is called 'ddim_karras'"),
    ("a.toml", "", "files that end in .toml are not read"),
]


@pytest.mark.parametrize(("name", "text", "message"), REFUSED)
def test_what_is_refused_when_the_file_is_read(name, text, message, tmp_path):
    path = written(tmp_path, name, text)
    with pytest.raises(UserError, match=f"^--validation_prompts_file {path}.*{message}"):
        read_prompts_file(path)


@pytest.mark.parametrize(("script", "entry", "words", "message"), [
    ("sdxl", "{prompt: cat, width: 100}", [], "a side of 100 px; it must be a multiple of 8, .* give 96"),
    ("sd3", "{prompt: cat, width: 72}", [], "a side of 72 px; this transformer takes multiples of 16 up to"),
    ("sd3", "{prompt: cat, sampler: ddim}", [], "the sampler ddim is not for SD3, .* give euler or heun"),
    ("sd3", "{prompt: cat, sampler: euler_karras}", [], "the sampler euler_karras is not for SD3"),
    ("sdxl", "{prompt: cat, sampler: heun}", ["--prediction_type", "sample"], "the sampler heun can't follow"),
])  # fmt: skip
def test_what_the_model_can_not_do_is_refused_before_weights_load(script, entry, words, message, tmp_path):
    script = {"sdxl": train_sdxl_lpl, "sd3": train_sd3_lpl_flow}[script]
    path = written(tmp_path, "a.yaml", f"- cat\n- {entry}\n")
    with pytest.raises(UserError, match=f"^--validation_prompts_file {path}, entry 2: {message}"):
        parse(script, path, *words)


def test_prompts_of_flags_come_first_and_everything_is_encoded(tmp_path, capsys):
    """The plan lists what the file sets; without pictures the file is not even read."""
    path = written(tmp_path, "a.yaml", "- {prompt: cat, negative: fish, width: 128, seed: 5}\n- dog\n")
    args = parse(train_sdxl_lpl, path, "--validation_prompt", "cat", "--validation_compare")
    cat = SamplePrompt("cat", "fish", width=128, seed=5)
    assert entries_of(args) == (SamplePrompt("cat"), cat, SamplePrompt("dog"))
    assert encoding_settings(args).prompts == ("cat", "fish", "dog")
    said = []
    plan = type(
        "Plan", (), {"total_steps": 1, "batch_size": 1, "resume_from": None, "first_step": 0, "first_image": 0}
    )
    accelerator = type("One", (), {"num_processes": 1, "print": staticmethod(lambda text: said.append(text))})
    report = {"images": 96, "held_out": 0}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lpl_finetuning.training.plan.report_lines", lambda report: [])
        print_run(args, report, accelerator, plan)
    said = "\n".join(said)
    assert "Validation: 3 x 5 images" in said
    assert "'cat': 128 x resolution, seed 5, without: fish" in said and "'dog': the defaults of the run" in said
    args = parse(train_sdxl_lpl, tmp_path / "none.yaml", "--num_validation_images", "0")
    assert entries_of(args) == () and args.validation_prompts_file is None


@pytest.mark.parametrize(("text", "name"), [
    ("DPM++ 2M Karras", "dpmpp_2m_karras"), ("k_dpm_2_a", "dpm_2_a"), ("dpmsolver++", "dpmpp_2m"), ("PLMS", "pndm"),
    ("Euler a", "euler_a"), ("DPM++ 2M SDE", "dpmpp_2m_sde"), ("uni_pc", "unipc"), ("lms", None),
])  # fmt: skip
def test_names_of_other_programs(text, name):
    assert sampler_named(text) == name


def end_of(scheduler, start, model, steps=6):
    """Where a sampler ends. model: function (model's input, timestep) -> its output."""
    scheduler.set_timesteps(steps)
    latents, more = start * scheduler.init_noise_sigma, {}
    if "generator" in scheduler.step.__code__.co_varnames:
        more = {"generator": torch.Generator().manual_seed(1)}
    for timestep in scheduler.timesteps:
        scaled = scheduler.scale_model_input(latents, timestep)
        latents = scheduler.step(model(scaled, timestep), timestep, latents, **more)[0]
    return latents


@pytest.mark.parametrize("sampler", [None, *sample_prompts.all_samplers()])
def test_every_sampler_ends_at_the_picture_that_the_model_knows(sampler):
    """A model that knows z_0 leads every sampler there: noise levels and prediction are those of the base model."""
    own = diffusers.EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction",
        timestep_spacing="leading", steps_offset=1,
    )  # fmt: skip
    z_0, noise = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    levels = own.alphas_cumprod.numpy().astype(np.float64)

    def model(scaled, timestep):
        log_odds = np.interp(float(timestep), np.arange(1000), np.log(levels / (1 - levels)))
        alpha, sigma = np.sqrt(1 / (1 + np.exp(-log_odds))), np.sqrt(1 / (1 + np.exp(log_odds)))
        return alpha * (scaled - alpha * z_0) / sigma - sigma * z_0

    scheduler = scheduler_of(sampler, own)
    assert (end_of(scheduler, noise, model) - z_0).abs().mean() < 0.08


@pytest.mark.parametrize("sampler", sample_prompts.REACH_ZERO_SNR)
def test_samplers_that_begin_at_pure_noise(sampler):
    """diffusers' classes take the setting; the other samplers are refused for such a base model."""
    own = diffusers.EulerDiscreteScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    assert scheduler_of(sampler, own).alphas_cumprod[-1] < 1e-6
    sample_prompts.check_zero_snr([SamplePrompt("cat", sampler=sampler)], True)
    with pytest.raises(UserError, match="there: the sampler heun_karras knows no zero terminal SNR"):
        sample_prompts.check_zero_snr([SamplePrompt("cat", sampler="heun_karras", place="there")], True)


@pytest.mark.parametrize("sampler", [None, *sample_prompts.FLOW_SAMPLERS])
def test_the_samplers_of_flows(sampler):
    own = diffusers.FlowMatchEulerDiscreteScheduler(shift=3)
    z_0, noise = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    scheduler = scheduler_of(sampler, own)
    scheduler.init_noise_sigma, scheduler.scale_model_input = 1, lambda latents, timestep: latents
    end = end_of(scheduler, noise, lambda z_t, timestep: (z_t - z_0) / (timestep / 1000))
    assert (end - z_0).abs().max() < 0.05 and scheduler.config.shift == 3


def test_a_resumed_run_says_that_its_gradient_is_another(tmp_path):
    """Runs of before the default was `full` have `none` in their file."""
    path = written(tmp_path, "a.yaml", "- {prompt: cat, seed: 5}\n")
    args = parse(train_sd3_lpl_flow, path, "--use_lpl").but(output_dir=str(tmp_path))
    save_recipe(args.but(lpl_norm_gradient="none"), tmp_path / "config.yaml")
    save_entries(args, tmp_path)
    (tmp_path / "data_report.json").write_text('{"images": 96}')
    assert changes_since(args, tmp_path / "checkpoint-1", 96) == ["lpl_norm_gradient was none, is full"]


def test_a_resumed_run_says_that_the_file_has_other_entries(tmp_path):
    """The entries are kept beside the checkpoint; a run without a file removes them."""
    path = written(tmp_path, "a.yaml", "- {prompt: cat, seed: 5}\n")
    args = parse(train_sd3_lpl_flow, path).but(output_dir=str(tmp_path))
    save_recipe(args, tmp_path / "config.yaml")
    save_entries(args, tmp_path)
    (tmp_path / "data_report.json").write_text('{"images": 96}')
    assert changes_since(args, tmp_path / "checkpoint-1", 96) == []
    written(tmp_path, "a.yaml", "- {prompt: cat, seed: 6}\n")
    other = parse(train_sd3_lpl_flow, path).but(output_dir=str(tmp_path))
    assert changes_since(other, tmp_path / "checkpoint-1", 96) == ["validation_prompts_file has other entries"]
    save_entries(parse(train_sd3_lpl_flow, path, "--num_validation_images", "0"), tmp_path)
    assert not (tmp_path / sample_prompts.PROMPTS_FILE).exists()


def test_grids_with_the_start_show_each_entry_twice(tmp_path):
    grids = Grids(tmp_path)
    rows = [(FOX.label(), [Image.new("RGB", (32, 64))]), ("a cat", [Image.new("RGB", (32, 32))])]
    grids.keep_start(rows)
    assert grids.add(0, None) == rows and grids.add(2, lambda: rows) == rows
    first, second = (Image.open(tmp_path / f"step-{step}.png") for step in (0, 2))
    assert second.height == 2 * first.height


def test_grids_hold_pictures_of_several_sizes(tmp_path):
    """Each row is scaled by itself and has as many lines above it as its label; rows of one size are as before."""
    wide, tall = Image.new("RGB", (64, 32), "red"), Image.new("RGB", (32, 64), "blue")
    one, two = labelled_rows([("a", [wide] * 2)]), labelled_rows([("a", [wide] * 2), ("b\nseed 3", [tall])])
    assert one.width == two.width == 2 * (2 * 64 + 2) + 2
    band = one.height - (2 * 32 + 4)
    assert two.height == 3 * band + (2 * 32 + 4) + (2 * 64 + 4)
    assert two.getpixel((4, band + 4)) == (255, 0, 0) and two.getpixel((4, two.height - 10)) == (0, 0, 255)
    assert with_moment("b\nseed 3", "before") == "b  (before)\nseed 3"
    assert FOX.label().split("\n")[1] == (
        "832 x 1216, 30 steps, guidance 5.5, seed 42, euler_a, without: blurry, text"
    )
