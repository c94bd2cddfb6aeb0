"""A training run that publishes: the real script and the real Hub client against a server on loopback."""

import json
import os
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from tests import children
from tests.hub_server import Fault, HubServer
from tests.sdxl import ROOT, command

SECRET = "hf_sentinelSENTINELsentinelSENTINEL0123"


@pytest.fixture(scope="module")
def server():
    with HubServer({SECRET: "me", "hf_reader": "nobody"}) as server:
        yield server


@pytest.fixture
def hub(server):
    return server.empty()


def start(words, hub, home, token=SECRET, fresh=False):
    """Run a command with the loopback Hub and this token: the finished process. fresh: from nothing, not forked."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{own['PATH']}"
    own |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "PATH": path}
    own |= {"HF_TOKEN": token} if token else {}
    result = children.run(words, fresh=fresh, cwd=ROOT, env=own, text=True, timeout=300)
    assert SECRET not in result.stdout + result.stderr
    return result


@pytest.fixture
def lora(flags):
    return [*flags, "--use_lpl", "--use_lora", "--output_kohya_format", "--max_train_steps", 2, "--push_to_hub",
            "--checkpointing_steps", 1, "--report_to", "tensorboard", "--validation_prompt", "a red apple", "the sun",
            "--num_validation_images", 2, "--validation_steps", 2]  # fmt: skip


ONE_PICTURE = ["--validation_prompt", "the sun", "--num_validation_images", 1]


def test_a_run_publishes_its_result(lora, hub, tmp_path):
    """One commit with weights, card and pictures, and nothing else; no file has the token in it."""
    folder = tmp_path / "my-lora"
    words = command(*lora, "--output_dir", folder, "--hub_token", SECRET)
    result = start(words, hub, tmp_path / "home", token=None, fresh=True)
    assert result.returncode == 0, result.stderr[-2000:]
    assert f"Published: {hub.url}/me/my-lora" in result.stdout
    assert "warning: --hub_token can be seen" in result.stdout
    repository = hub.repositories["me/my-lora"]
    names = ["README.md", "pytorch_lora_weights.safetensors", "pytorch_lora_weights_kohya.safetensors"]
    assert len(repository.commits) == 1
    assert sorted(repository.files) == sorted(names + [f"image_{n}.png" for n in range(4)])
    for name, content in repository.files.items():
        assert content == (folder / name).read_bytes()
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path
    card = ModelCard.load(folder / "README.md")
    assert {"stable-diffusion-xl", "text-to-image", "diffusers", "diffusers-training", "lora", "lpl"} <= set(
        card.data.tags
    )
    assert [entry["text"] for entry in card.data.to_dict()["widget"]] == ["a red apple"] * 2 + ["the sun"] * 2
    assert "| applied at timesteps below | 200 |" in card.text and str(tmp_path) not in card.content


@pytest.mark.parametrize("fault", [
    pytest.param(Fault("commit", 503), id="503"),
    pytest.param(Fault("put", "drop"), id="dropped", marks=pytest.mark.slow),  # the client waits and tries again
])  # fmt: skip
def test_a_failed_upload_leaves_everything_and_the_printed_command_completes_it(fault, lora, hub, tmp_path):
    name = f"lora-{fault.what}"
    folder = tmp_path / name
    hub.fault = fault
    result = start(command(*lora, *ONE_PICTURE, "--output_dir", folder), hub, tmp_path / "home")
    hub.fault = None
    assert result.returncode == 3, result.stderr[-2000:]
    assert "Traceback" not in result.stderr and not hub.repositories[f"me/{name}"].commits
    assert (folder / "pytorch_lora_weights.safetensors").is_file() and (folder / "checkpoint-2").is_dir()
    [line] = [line for line in result.stderr.splitlines() if "lpl_finetuning.publish" in line]
    again = start(["sh", "-c", line.strip()], hub, tmp_path / "home")
    assert again.returncode == 0, again.stderr[-2000:]
    assert len(hub.repositories[f"me/{name}"].commits) == 1
    assert "pytorch_lora_weights.safetensors" in hub.repositories[f"me/{name}"].files


def test_a_run_that_is_asked_to_stop_at_its_end_says_how_to_publish(lora, hub, tmp_path):
    """It was told to end: what is left, the upload, may take long."""
    folder = tmp_path / "late"
    driver = [sys.executable, str(ROOT / "tests" / "signalled.py"), "train_sdxl_lpl", "save_result", "1", "SIGTERM"]
    result = start([*driver, *map(str, [*lora, *ONE_PICTURE, "--output_dir", folder])], hub, tmp_path / "home")
    assert result.returncode == 0 and "Not published, since the run was asked to stop" in result.stdout, result.stderr
    assert not hub.repositories["me/late"].commits
    [line] = [line for line in result.stdout.splitlines() if "lpl_finetuning.publish" in line]
    assert start(["sh", "-c", line.strip()], hub, tmp_path / "home").returncode == 0
    assert len(hub.repositories["me/late"].commits) == 1


@pytest.mark.parametrize(
    ("token", "said"), [(None, "no token for the Hub"), ("hf_wrong", "401"), ("hf_reader", "403")]
)
def test_no_right_to_write_is_told_before_weights_load(token, said, lora, hub, tmp_path):
    result = start(
        command(*lora, "--output_dir", tmp_path / "x", "--hub_model_id", "me/x"), hub, tmp_path / "home", token=token
    )
    assert result.returncode == 2 and said in result.stderr and "Traceback" not in result.stderr
    assert "training:" not in result.stderr and not list(tmp_path.glob("x/checkpoint-*"))


def test_a_whole_model_is_published(flags, hub, tmp_path):
    """The pipeline's files, and what was published loads from what the server holds."""
    from diffusers import StableDiffusionXLPipeline

    folder = tmp_path / "whole"
    flags = [
        *flags,
        "--max_train_steps",
        1,
        "--push_to_hub",
        "--output_dir",
        folder,
        "--hub_model_id",
        "me/whole-model",
    ]
    result = start(command(*flags), hub, tmp_path / "home")
    assert result.returncode == 0, result.stderr[-2000:]
    files = hub.repositories["me/whole-model"].files
    assert {"model_index.json", "unet/diffusion_pytorch_model.safetensors", "scheduler/scheduler_config.json"} <= set(
        files
    )
    assert not [name for name in files if name.startswith(("logs", "checkpoint", "config.yaml", "run.png"))]
    for name, content in files.items():
        place = tmp_path / "downloaded" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(content)
    assert StableDiffusionXLPipeline.from_pretrained(tmp_path / "downloaded").unet is not None
    assert "lpl" not in ModelCard.load(tmp_path / "downloaded" / "README.md").data.tags
    assert json.loads(files["model_index.json"])["_class_name"] == "StableDiffusionXLPipeline"


def test_a_classifier_is_published_and_logged(hub, cache_dir, tmp_path):
    """The embedded default of the third script: network, card and confusion matrix; accuracies go to the tracker."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = tmp_path / "my-classifier"
    flags = ["--max_train_steps", 1, "--lr_warmup_steps", 0, "--cache_dir", cache_dir, "--output_dir", folder,
             "--push_to_hub", "--report_to", "tensorboard"]  # fmt: skip
    words = [sys.executable, "train_latent_classifier.py", *map(str, flags)]
    result = start(words, hub, tmp_path / "home")
    assert result.returncode == 0, result.stderr[-2000:]
    files = hub.repositories["me/my-classifier"].files
    assert sorted(files) == ["README.md", "config.json", "diffusion_pytorch_model.safetensors", "image_0.png"]
    assert 'load_latent_classifier("me/my-classifier")' in files["README.md"].decode()
    logs = [EventAccumulator(str(path)).Reload().Tags() for path in folder.rglob("events.out.tfevents.*")]
    assert any("validation/balanced_accuracy" in tags["scalars"] and tags["images"] for tags in logs)
