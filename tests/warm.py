"""Imports what the scripts import, nothing of the project, and does once what is slow the first time in a process.

A process that has imported this module is ready to be forked: its forks start in milliseconds.
"""

# ruff: noqa: F401

import contextlib
import gc
import io
import os

import accelerate
import bitsandbytes
import datasets
import diffusers.training_utils
import matplotlib
import peft
import prodigyopt
import torch.utils.tensorboard
import transformers
from diffusers import StableDiffusion3Pipeline, StableDiffusionXLPipeline
from torch.distributed.fsdp import FSDPModule
from transformers import CLIPTextModelWithProjection, T5EncoderModel

with contextlib.suppress(ImportError):  # where DeepSpeed is installed, accelerate looks into it at the end of a run
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed.comm

matplotlib.use("Agg")
import matplotlib.pyplot as plt

figure, axis = plt.subplots()
axis.set_yscale("log")
figure.savefig(io.BytesIO())  # reads the fonts
plt.close(figure)
with torch.device("meta"):  # imports the decompositions
    torch.nn.GroupNorm(1, 2)(torch.zeros(1, 2, 4, 4))
gc.collect()
gc.freeze()  # collections in the forks skip these objects, whose memory stays shared
