"""Running the SDXL recipe in tests, and looking at what it made."""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import torch
from accelerate.state import AcceleratorState
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file

import train_sdxl_lpl

ROOT = Path(__file__).resolve().parent.parent


def run(*flags):
    """The script's main, in this process: the rows of its metrics file."""
    AcceleratorState._reset_state(True)
    args = train_sdxl_lpl.parse_args([str(flag) for flag in flags])
    train_sdxl_lpl.main(args, *train_sdxl_lpl.find_images(args))
    path = Path(args.output_dir, args.logging_dir, "metrics.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def command(*flags):
    """The command line of the script as a process of its own."""
    return [sys.executable, str(ROOT / "train_sdxl_lpl.py"), *map(str, flags)]


def weights(folder):
    """sha256 of every trained tensor of a result, by name."""
    files = sorted(Path(folder).glob("*.safetensors")) or sorted(Path(folder, "unet").glob("*.safetensors"))
    assert files
    tensors = {name: value for file in files for name, value in load_file(file).items()}
    return {name: hashlib.sha256(value.numpy().tobytes()).hexdigest() for name, value in tensors.items()}


def draw(folder, lora=None, **more):
    """One picture of a pipeline, as an array; with a LoRA when given."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    if lora:
        pipeline.load_lora_weights(lora)
    generator = torch.Generator().manual_seed(0)
    image = pipeline("a red apple", generator=generator, num_inference_steps=4, height=64, width=64, **more).images[0]
    return np.asarray(image, dtype=np.int64), pipeline
