"""Running a training script in tests, and looking at what it made."""

import contextlib
import gc
import hashlib
import json
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
from accelerate.state import AcceleratorState
from matplotlib.figure import Figure
from PIL import Image
from safetensors.torch import load_file

from lpl_finetuning.data import scan
from lpl_finetuning.flags import data_source, settings_from_flags
from lpl_finetuning.training.estimates import counted_peaks
from lpl_finetuning.training.objective import Objective, SampleSettings
from lpl_finetuning.training.step_memory import Machine, RunCode, autoencoder_networks
from lpl_utils import LatentSpace

ROOT = Path(__file__).resolve().parent.parent

gc.collect()
gc.freeze()  # accelerate collects at the end of every run: not over all that the imports have made


def run(script, *flags, pictures=False, result=True):
    """A script's main, in this process: the rows of its metrics file.

    Args:
        script: the module.
        pictures: sample pictures in as many steps as the script does, and paint `run.png`. Otherwise pictures take 3
            steps, and `run.png` is composed but one pixel large.
        result: write the trained weights.
    """
    AcceleratorState._reset_state(True)
    args = script.parse_args([str(flag) for flag in flags])
    with contextlib.ExitStack() as stack:
        if not pictures:
            stack.enter_context(mock.patch.dict(vars(script), SAMPLING_STEPS=3))
            stack.enter_context(mock.patch.object(Figure, "savefig", write_pixel))
        if not result:
            stack.enter_context(mock.patch.object(script, "save_result"))
        script.main(args, *scan.find_images(data_source(args)))
    path = Path(args.output_dir, args.logging_dir, "metrics.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_pixel(figure, path, **options):
    """matplotlib's `savefig`, but for the painting."""
    Image.new("RGB", (1, 1)).save(path)


def command(script, *flags):
    """The command line of a script as a process of its own."""
    return [sys.executable, str(ROOT / f"{script.__name__}.py"), *map(str, flags)]


def weights(folder):
    """sha256 of every trained tensor of a result, by name."""
    places = [Path(folder, name) for name in (".", "unet", "transformer")]
    files = next(files for place in places if (files := sorted(place.glob("*.safetensors"))))
    return {name: value for file in files for name, value in tensors_of(file).items()}


def tensors_of(file):
    """sha256 of every tensor of a safetensors file, by name: the bytes of its header are not always the same."""
    return {name: hashlib.sha256(value.numpy().tobytes()).hexdigest() for name, value in load_file(file).items()}


def draw(pipeline_class, folder, lora=None, **more):
    """(one picture of a pipeline, as an array; the pipeline), with a LoRA when given."""
    pipeline = pipeline_class.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    if lora:
        pipeline.load_lora_weights(lora)
    generator = torch.Generator().manual_seed(0)
    image = pipeline("a red apple", generator=generator, num_inference_steps=4, height=64, width=64, **more).images[0]
    return np.asarray(image, dtype=np.int64), pipeline


def assert_resume_is_exact(script, flags, folder, steps=6, at=3):
    """Train `steps` in one go, and with a stop at `at`: the same weights and state to the last bit."""
    flags = [*flags, "--checkpointing_steps", at, "--output_dir"]
    run(script, *flags, folder / "whole", "--max_train_steps", steps)
    run(script, *flags, folder / "resumed", "--max_train_steps", at)
    run(script, *flags, folder / "resumed", "--max_train_steps", steps, "--resume_from_checkpoint", "latest")
    assert weights(folder / "resumed") == weights(folder / "whole")
    states = [load_file(folder / name / f"checkpoint-{steps}" / "training_state.safetensors")
              for name in ("whole", "resumed")]  # fmt: skip
    assert states[0].keys() == states[1].keys()
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]), key


def objective_of(args, schedule=None, samples_per_step=8, space=(1.0, 0.0), empty_prompt=None, empty_is_zero=False):
    """An `Objective` without models; space: scaling factor, shift factor."""
    settings = settings_from_flags(SampleSettings, args)
    return Objective(settings, torch.device("cpu"), schedule, torch.float32, samples_per_step, LatentSpace(*space), 8,
                     empty_prompt or {}, empty_is_zero, guard=None)  # fmt: skip


def forbid_loading(monkeypatch, script, names=("build_denoiser", "load_vae", "load_text_encoders")):
    """Fail the test where a script loads weights; the same on the meta device, which loads none, is allowed."""

    def only_on_meta(name, original):
        def wrapper(*args):
            assert args[-1] == "meta", f"{name} was called"
            return original(*args)

        return wrapper

    for name in names:
        monkeypatch.setattr(script, name, only_on_meta(name, getattr(script, name)))


def memory_of(script, args, dtype, mixed_precision="no"):
    """{phase: Peak} of a step on one device; kept in --cache_dir."""
    plan = SimpleNamespace(
        schedule=script.Schedule(args), dtype=dtype, batch_size=args.train_batch_size, total_steps=9
    )
    code = RunCode(script.build_denoiser, script.training_step, script.example_batch, autoencoder_networks,
                   script.held_out_functions())  # fmt: skip
    return counted_peaks(args, plan, code, Machine(mixed_precision))


def of(script, pipeline_class):
    """(run, command, draw) for one script."""
    return partial(run, script), partial(command, script), partial(draw, pipeline_class)
