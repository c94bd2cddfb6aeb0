"""Running the SD3 recipe in tests."""

from diffusers import StableDiffusion3Pipeline

import train_sd3_lpl_flow
from tests.runs import ROOT, of, weights

run, command, draw = of(train_sd3_lpl_flow, StableDiffusion3Pipeline)
__all__ = ["ROOT", "command", "draw", "run", "weights"]
