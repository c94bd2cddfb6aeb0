"""Running the SDXL recipe in tests."""

from diffusers import StableDiffusionXLPipeline

import train_sdxl_lpl
from tests.runs import ROOT, of, weights

run, command, draw = of(train_sdxl_lpl, StableDiffusionXLPipeline)
__all__ = ["ROOT", "command", "draw", "run", "weights"]
