"""The latent classifier's script end to end, on the latents of the tiny SDXL.

A random autoencoder would not do: the distributions that it encodes are all noise.
"""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import train_latent_classifier as script
from lpl_finetuning.errors import DataError, UserError
from lpl_finetuning.networks.latent_classifier import load_latent_classifier
from lpl_finetuning.results import hub
from lpl_finetuning.training import objective
from lpl_finetuning.training.models import load_vae
from lpl_finetuning.training.reporter import History
from tests import children, runs
from tests.picture_folders import listing

GOLDEN = Path(__file__).parents[1] / "golden" / "latent-classifier.json"
MODEL = runs.ROOT / "examples" / "tiny-sdxl"
COLOURS = {"blue": (110, 120, 150), "green": (115, 145, 120), "red": (150, 115, 110)}


def coloured(folder, counts, seed=0):
    """Pictures with a coarse pattern in the class' colour, `counts` of them in each class' folder; red: wide ones."""
    rng = np.random.default_rng(seed)
    for (name, colour), count in zip(COLOURS.items(), counts, strict=True):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            coarse = (np.array(colour) + rng.normal(0, 70, (4, 4, 3))).clip(0, 255).astype(np.uint8)
            picture = Image.fromarray(coarse).resize((72 if name == "red" else 64, 64), Image.Resampling.BICUBIC)
            picture.save(folder / name / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """A folder of three unbalanced classes."""
    return coloured(tmp_path_factory.mktemp("labelled") / "train", (6, 8, 12))


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    """Other pictures of the classes."""
    return coloured(tmp_path_factory.mktemp("labelled") / "held-out", (3, 4, 5), seed=1)


@pytest.fixture(scope="module")
def flags(labelled, cache_dir):
    """The flags that every run shares."""
    return (
        f"--pretrained_model_name_or_path {MODEL} --train_data_dir {labelled} --cache_dir {cache_dir} "
        "--resolution 64 --center_crop --train_batch_size 4 --lr_warmup_steps 0 --learning_rate 3e-3 --report_to none "
        "--seed 3 --logging_steps 1 --mixed_precision no --block_widths 16 32 --blocks_per_stage 1"
    ).split()


def weights(folder):
    """sha256 of every tensor of a result."""
    return runs.tensors_of(Path(folder) / "diffusion_pytorch_model.safetensors")


# ---------------------------------------------------------------------------------------------------------------------
# Golden numbers


@pytest.fixture(scope="module")
def trained(flags, held_out, tmp_path_factory):
    """(rows of the log, folder) of a short training with every part of the recipe."""
    folder = tmp_path_factory.mktemp("trained")
    more = ["--validation_data_dir", held_out, "--validation_steps", 12, "--max_train_steps", 24, "--use_ema",
            "--ema_decay", 0.9, "--save_dtype", "float16", "--output_dir", folder]  # fmt: skip
    return runs.run(script, *flags, *more, pictures=True), folder


def test_golden_curve_and_accuracy(trained, request):
    """24 steps give the losses and accuracies they always gave: any change of the recipe shows here."""
    rows, _ = trained
    keys = ["train_loss", "train_accuracy", "grad_norm", "validation/loss", "validation/accuracy",
            "validation/balanced_accuracy"]  # fmt: skip
    curve = {key: [row[key] for row in rows if key in row] for key in keys}
    if request.config.getoption("--update-golden"):
        GOLDEN.write_text(json.dumps({key: [float(f"{v:.6g}") for v in values] for key, values in curve.items()}))
    golden = json.loads(GOLDEN.read_text())
    assert golden.keys() == curve.keys() and len(golden["train_loss"]) == 24
    for key, values in golden.items():
        assert curve[key] == pytest.approx(values, rel=5e-3, abs=1e-6), key
    assert golden["validation/balanced_accuracy"][0] < 0.5 and 0.6 < golden["validation/balanced_accuracy"][-1] < 1


def test_the_result_is_a_network_with_its_card(trained, held_out, flags):
    """It loads, scores what the log says, and names classes, latents and autoencoder."""
    rows, folder = trained
    network, config = load_latent_classifier(folder), json.loads((folder / "config.json").read_text())
    assert config["classes"] == ["blue", "green", "red"] and config["latent_channels"] == 4
    assert config["vae"] == "tiny-sdxl" and config["vae_fingerprint"].startswith("sha256:")
    assert config["scaling_factor"] == pytest.approx(0.55482) and config["shift_factor"] == 0
    assert {value.dtype for value in load_file(folder / "diffusion_pytorch_model.safetensors").values()} \
        == {torch.float16}  # fmt: skip
    vae = load_vae(script.parse_args(flags).base_model, torch.float32, "cpu")
    found, losses = 0, []
    for label, name in enumerate(config["classes"]):
        pictures = [Image.open(path) for path in sorted((held_out / name).glob("*.png"))]
        pixels = [np.asarray(each)[:, (each.width - 64) // 2 :][:, :64] for each in pictures]
        pixels = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2) / 127.5 - 1
        with torch.no_grad():
            latents = vae.encode(pixels).latent_dist.mean * config["scaling_factor"]
            logits = network(latents)
        found += (logits.argmax(dim=1) == label).sum().item()
        losses += (-logits.log_softmax(dim=1)[:, label]).tolist()
    assert found / 12 == pytest.approx(rows[-1]["validation/accuracy"]), "half precision may not change a label here"
    assert np.mean(losses) == pytest.approx(rows[-1]["validation/loss"], rel=5e-3)
    card = (folder / "README.md").read_text()
    fingerprint = f"| fingerprint of its weights | {config['vae_fingerprint']} |"
    for line in ("| VAE | tiny-sdxl |", fingerprint, "| red | 12 | 5 |", "| scaling factor | 0.55482 |",
                 "![Confusion matrix of the held-out images](image_0.png)", "| 41.7 % |", "| 33.3 % |"):  # fmt: skip
        assert line in card, line
    assert str(MODEL) not in card and str(held_out) not in card
    names = {path.name for path in hub.publishable_files(folder)}
    assert names == {"README.md", "config.json", "diffusion_pytorch_model.safetensors", "image_0.png"}
    for name in ("run.png", "validation/step-0.png", "validation/step-24.png", "image_0.png"):
        assert np.asarray(Image.open(folder / name)).std() > 1, f"{name} is a picture"
    report = json.loads((folder / "data_report.json").read_text())
    assert report["classes"] == {"blue": 6, "green": 8, "red": 12}


def test_the_snippet_of_the_card_runs(trained):
    _, folder = trained
    [snippet] = (folder / "README.md").read_text().split("```python\n")[1:]
    scope = {"latents": torch.randn(2, 4, 8, 8)}
    exec(snippet.split("```")[0].replace("path/to/this/folder", str(folder)), scope)
    assert list(scope["features"]) == ["block 1", "block 2", "pooled"] and scope["logits"].shape == (2, 3)


def test_accuracy_of_the_log_is_that_of_the_confusion_matrix(trained):
    """Every held-out image is counted once."""
    rows, folder = trained
    last = [row for row in rows if "validation/accuracy" in row][-1]
    assert last["step"] == 24 and [row["step"] for row in rows if "validation/loss" in row] == [0, 12, 24]
    card = (folder / "README.md").read_text()
    found = [int(card.split(f"| {name} | ")[1].split(" |")[2]) for name in COLOURS]
    assert sum(found) / 12 == pytest.approx(last["validation/accuracy"])
    assert np.mean([n / count for n, count in zip(found, (3, 4, 5), strict=True)]) == pytest.approx(
        last["validation/balanced_accuracy"])  # fmt: skip
    assert "validation/top5_accuracy" not in last, "of three classes the label is always among the first five"


# ---------------------------------------------------------------------------------------------------------------------
# Resuming, ranks


def start_and_kill(flags, folder, after):
    """Start a process and kill it without warning once more steps than `after` were logged."""
    quiet = {"stderr": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
    process = children.start(runs.command(script, *flags, "--output_dir", folder), **quiet)
    log, deadline = folder / "logs" / "metrics.jsonl", time.monotonic() + 200
    while process.poll() is None and time.monotonic() < deadline:
        if log.is_file() and log.read_text().count("\n") > after:
            process.send_signal(signal.SIGKILL)
        time.sleep(0.005)
    assert process.wait() == -signal.SIGKILL, "the run ended before it was killed: make it longer"


def test_a_killed_run_goes_on_bit_for_bit(flags, sdxl_folder, tmp_path):
    """SIGKILL in mid-epoch, random crops, dropout, erasing, EMA: the weights of a run that was never killed."""
    flags = [flag for flag in flags if flag != "--center_crop"]
    flags += ["--pretrained_model_name_or_path", str(sdxl_folder)]  # a small encoder, which runs in every step
    flags += ["--random_flip", "--use_ema", "--max_train_steps", 8, "--checkpointing_steps", 4]
    runs.run(script, *flags, "--output_dir", tmp_path / "whole")
    start_and_kill(flags, tmp_path / "killed", after=4)
    assert not (tmp_path / "killed" / "checkpoint-8").exists()
    runs.run(script, *flags, "--output_dir", tmp_path / "killed", "--resume_from_checkpoint", "latest")
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")
    states = [load_file(tmp_path / name / "checkpoint-8" / "training_state.safetensors")
              for name in ("whole", "killed")]  # fmt: skip
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    losses = [[row["train_loss"] for row in History(tmp_path / name / "logs" / "metrics.jsonl", 8).rows]
              for name in ("whole", "killed")]  # fmt: skip
    assert len(losses[0]) == 8 and losses[0] == losses[1]
    result = load_file(tmp_path / "whole" / "diffusion_pytorch_model.safetensors")
    trained = load_file(tmp_path / "whole" / "checkpoint-8" / "classifier" / "diffusion_pytorch_model.safetensors")
    average = [value for name, value in states[0].items() if name.startswith("ema/")]
    for name, value in result.items():
        assert any(torch.equal(value, each) for each in average), "the average is what is saved"
        assert not torch.equal(value, trained[name])


def test_two_ranks_are_one_with_twice_the_accumulation(flags, held_out, tmp_path):
    """The same weights up to rounding, and the same held-out numbers: each image is measured by one rank."""
    flags = [*flags, "--validation_data_dir", held_out, "--validation_steps", 3, "--max_train_steps", 6]
    rows = runs.run(script, *flags, "--gradient_accumulation_steps", 2, "--output_dir", tmp_path / "one")
    words = children.torchrun(2, "train_latent_classifier.py", *flags, "--output_dir", tmp_path / "two")
    children.run([str(word) for word in words], cwd=runs.ROOT, check=True, text=True)
    one, two = (load_file(tmp_path / name / "diffusion_pytorch_model.safetensors") for name in ("one", "two"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-5)
    found = [
        (tmp_path / name / "README.md").read_text().split("## Classes")[1].split("##")[0] for name in ("one", "two")
    ]
    assert found[0] == found[1] and "| red | 12 | 5 |" in found[0]
    on_two = History(tmp_path / "two" / "logs" / "metrics.jsonl", 6).rows
    for row, other in zip(rows, on_two, strict=True):
        assert row.keys() == other.keys()
        assert all(other[key] == pytest.approx(row[key], rel=2e-3) for key in row if key != "samples_per_second")


def test_a_checkpoint_of_other_classes_or_latents_is_refused(flags, labelled, tmp_path, monkeypatch):
    """By name, before weights load; other widths are refused by the flags alone."""
    folder = tmp_path / "run"
    runs.run(script, *flags, "--max_train_steps", 2, "--checkpointing_steps", 2, "--output_dir", folder)
    more = ["--max_train_steps", 4, "--output_dir", folder, "--resume_from_checkpoint", "latest"]
    with pytest.raises(UserError, match=r"block_widths was \[16, 32\], is \[16, 16\]"):
        script.parse_args([str(flag) for flag in [*flags, "--block_widths", 16, 16, *more]])
    (labelled / "red").rename(labelled / "rouge")
    runs.forbid_loading(monkeypatch, script, ("build_learner", "load_vae"))
    try:
        with pytest.raises(UserError, match=r"the classifier in .*checkpoint-2 has other classes than this run"):
            runs.run(script, *flags, *more)
    finally:
        (labelled / "rouge").rename(labelled / "red")


# ---------------------------------------------------------------------------------------------------------------------
# Labels


def refusal(flags, *more):
    """The message that a run is refused with before torch is imported."""
    args = script.parse_args([str(flag) for flag in [*flags, *more]])
    with pytest.raises((DataError, UserError)) as caught:
        script.find_labelled_images(args)
    return str(caught.value)


def test_labels_that_cannot_be_learnt_are_refused(flags, labelled, tmp_path):
    few = coloured(tmp_path / "few", (1, 3, 3))
    assert "and these have one: blue. Add images" in refusal(flags, "--train_data_dir", few)
    one = coloured(tmp_path / "one", (0, 0, 4))
    told = refusal(flags, "--train_data_dir", one)
    assert "all 4 images have the label 'red'" in told and "--label_column" in told
    told = refusal(flags, "--max_train_samples", 5)
    assert "--max_train_samples 5: all 5 images have the label 'blue'" in told
    other = coloured(tmp_path / "other", (2, 2, 2))
    (other / "red").rename(other / "pink")
    told = refusal(flags, "--validation_data_dir", other)
    assert "the label of some held-out images: pink" in told
    told = refusal(flags, "--label_column", "kind")
    assert "have no label" in told and "in metadata.csv with that column" in told and "caption" not in told
    for path in few.rglob("*.png"):
        path.with_suffix(".txt").write_text("a pattern")
    told = refusal(flags, "--train_data_dir", few, "--label_column", "kind")
    assert "has no listing with columns; add metadata.csv" in told
    listing(few, *({"file_name": f"red/{number}.png", "kind": ["warm", "dark"]} for number in range(3)))
    told = refusal(flags, "--train_data_dir", few, "--label_column", "kind")
    assert "an image has several labels, warm and dark" in told


def test_the_label_is_the_folder_at_the_top(flags, tmp_path):
    """Whatever is below it, and whatever text lies beside a picture."""
    folder = coloured(tmp_path / "nested", (2, 2, 2))
    (folder / "red" / "bright").mkdir()
    (folder / "red" / "0.png").rename(folder / "red" / "bright" / "0.png")
    (folder / "blue" / "1.txt").write_text("green")
    args = script.parse_args([str(flag) for flag in [*flags, "--train_data_dir", folder]])
    classes = script.find_classes(args, *script.find_labelled_images(args))
    assert (classes.names, classes.training) == (("blue", "green", "red"), (2, 2, 2))


def test_labels_of_a_column(flags, labelled, tmp_path):
    """Of a listing, in the folder itself or with sub-folders that say something else."""
    rows = [{"file_name": f"{name}/{number}.png", "kind": "warm" if name == "red" else "cold"}
            for name in COLOURS for number in range(6)]  # fmt: skip
    folder = coloured(tmp_path / "listed", (6, 6, 6))
    listing(folder, *rows)
    flags = [*flags, "--train_data_dir", folder]
    args = script.parse_args([str(flag) for flag in [*flags, "--label_column", "kind"]])
    classes = script.find_classes(args, *script.find_labelled_images(args))
    assert (classes.names, classes.training) == (("cold", "warm"), (12, 6))
    told = refusal(flags, "--label_column", "sort")
    assert "there is no column 'sort' (--label_column)" in told and "caption" not in told
    listing(folder, *rows[:-1], {"file_name": "red/5.png", "kind": ""})
    told = refusal(flags, "--label_column", "kind")
    assert "the label 'kind' is empty. Write a label, or remove the line" in told


def test_labels_of_a_class_label(flags, tmp_path):
    """A data set as the Hub has it: numbers with names."""
    import datasets

    pictures = [Image.new("RGB", (64, 64), COLOURS[name]) for name in ("red", "blue", "red", "blue", "red")]
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["blue", "red"]))
    rows = {"image": pictures, "label": [1, 0, 1, 0, 1]}
    datasets.Dataset.from_dict(rows, features).save_to_disk(tmp_path / "set")
    place = flags.index("--train_data_dir")
    flags = [*flags[:place], *flags[place + 2 :], "--dataset_name", tmp_path / "set"]
    args = script.parse_args([str(flag) for flag in flags])
    classes = script.find_classes(args, *script.find_labelled_images(args))
    assert (classes.names, classes.training) == (("blue", "red"), (2, 3))
    rows["label"][2] = -1
    datasets.Dataset.from_dict(rows, features).save_to_disk(tmp_path / "holes")
    assert "the label must be text, not None" in refusal([*flags, "--dataset_name", tmp_path / "holes"])


def test_a_refusal_imports_no_torch(flags, labelled, tmp_path):
    """In a process in which importing torch is an error."""
    few = coloured(tmp_path / "few", (1, 3, 3))
    words = [sys.executable, "train_latent_classifier.py", *flags, "--train_data_dir", str(few)]
    result = children.run(words, light=True, cwd=runs.ROOT, text=True)
    assert result.returncode == 2 and "these have one: blue" in result.stderr, result.stderr


@pytest.mark.parametrize("words, told", [
    (["--use_lora"], "unknown flag --use_lora"),
    (["--block_widths", "12"], "must be a multiple of 8"),
    (["--label_smoothing", "1"], "--label_smoothing is 1.0; it must be at least 0 and at most 0.99"),
    (["--random_erasing", "1.5"], "--random_erasing is 1.5; it must be at least 0 and at most 1"),
    (["--latent_pad=-1"], "--latent_pad is -1; it must be 0 or more"),
    (["--blocks_per_stage", "0"], "--blocks_per_stage is 0; it must be 1 or more"),
    (["--ema_decay", "0.9"], "--ema_decay does nothing without --use_ema"),
])  # fmt: skip
def test_flags_are_refused(words, told, flags):
    with pytest.raises(UserError) as caught:
        script.parse_args([*flags, *words])
    assert told in str(caught.value)


def test_a_sharded_model_is_refused(flags, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match=r"a latent classifier is too small: use configs/ddp\.yaml"):
        script.parse_args(flags)


def test_its_own_configuration_is_a_recipe(trained):
    """Withdrawn flags are in no recipe, and the run's file starts it again."""
    _, folder = trained
    text = (folder / "config.yaml").read_text()
    assert "use_lora" not in text and "lpl_weight" not in text and "block_widths" in text
    args = script.parse_args(["--config", str(folder / "config.yaml")])
    assert args.block_widths == [16, 32] and args.use_lora is False and args.output_dir == str(folder)


def test_any_pipeline_serves_that_has_an_autoencoder(flags, sd3_folder, tmp_path):
    """SD3's too, with sixteen channels and a shift; of a part of a pipeline the message says so."""
    flags = [*flags, "--pretrained_model_name_or_path", sd3_folder, "--max_train_steps", 1, "--output_dir", tmp_path]
    runs.run(script, *flags)
    config = load_latent_classifier(tmp_path).config
    assert (config.latent_channels, config.shift_factor) == (16, pytest.approx(0.0609))


def test_the_shipped_classifier_knows_the_latents_of_the_tiny_sdxl(flags):
    """It is small, names its autoencoder, and tells the groups of the pictures in examples/."""
    folder, pictures = runs.ROOT / "examples" / "tiny-classifier", runs.ROOT / "examples" / "fluent-emoji"
    assert sum(path.stat().st_size for path in folder.iterdir()) < 3e6
    network, base = load_latent_classifier(folder), script.parse_args(flags).base_model
    assert network.config.vae_fingerprint == base.weights
    rows = [json.loads(line) for line in (pictures / "metadata.jsonl").read_text().splitlines()[::2]]
    small = [Image.open(pictures / row["file_name"]).convert("RGB").resize((64, 64), Image.Resampling.LANCZOS)
             for row in rows]  # fmt: skip
    pixels = torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2) / 127.5 - 1
    vae = load_vae(base, torch.float32, "cpu")
    with torch.no_grad():
        latents = vae.encode(pixels).latent_dist.mean * network.config.scaling_factor
        named = [network(each).argmax(dim=1).tolist() for each in (latents, latents.flip(1))]
    numbers = [network.config.classes.index(row["group"]) for row in rows]
    right, wrong = (np.mean(np.array(each) == numbers) for each in named)
    assert right > 0.45 and wrong < 0.15, "with the channels in another order the latents mean nothing"


def test_the_page_s_python_runs(monkeypatch):
    """docs/latent-classifier.md, from the root of the repository."""
    page = (runs.ROOT / "docs" / "latent-classifier.md").read_text()
    monkeypatch.chdir(runs.ROOT)
    scope = {}
    exec(page.split("```python\n")[1].split("```")[0], scope)
    assert scope["estimate"].grad.abs().sum() > 0


def test_the_page_s_second_command_runs(labelled, cache_dir, tmp_path):
    """With only model, pictures, size and precision replaced."""
    page = (runs.ROOT / "docs" / "latent-classifier.md").read_text()
    words = page.split("```bash\n")[2].split("```")[0].replace("\\\n", "").split()[3:]
    replaced = {"my-pictures": labelled, "stabilityai/stable-diffusion-xl-base-1.0": MODEL, "256": 64, "128": 8,
                "my-classifier": tmp_path, "0.1": 4}  # fmt: skip
    more = ["--max_train_steps", 1, "--cache_dir", cache_dir, "--report_to", "none"]
    rows = runs.run(script, *[replaced.get(word, word) for word in words], *more)
    assert "validation/accuracy" in rows[-1] and (tmp_path / "README.md").is_file()


def test_the_plain_command_runs_on_the_embedded_default(cache_dir, tmp_path, capsys, monkeypatch):
    """Shortened: no model, no data, no network. A batch draws the posterior's noise, and none of a diffusion model."""
    draw, streams = objective.addressed_normal, []
    monkeypatch.setattr(objective, "addressed_normal", lambda *args: streams.append(args[3]) or draw(*args))
    args = ["--max_train_steps", 2, "--validation_steps", 2, "--lr_warmup_steps", 0, "--cache_dir", cache_dir]
    rows = runs.run(script, *args, "--output_dir", tmp_path)
    said = capsys.readouterr().out
    assert "No model and no data named" in said and "labels        72, 6 different" in said
    assert "Held-out accuracy" in said and "validation/top5_accuracy" in rows[-1]
    assert streams == ["posterior"] * 2
