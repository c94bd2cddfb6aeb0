"""Run a script on several ranks, of which one gets a loss that is no number.

python tests/poisoned.py SCRIPT RANK CALLS FLAGS...: in those of its calls ("3,4"), on that rank only, the script's
`denoise` returns NaN as the error of a batch's first image.
"""

import importlib
import math
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lpl_finetuning.data import scan
from lpl_finetuning.flags import data_source


def poisoned(denoise, calls):
    """`denoise`, with NaN for the first image in the given calls."""
    count = [0]

    def wrapper(*args):
        count[0] += 1
        errors, *rest = denoise(*args)
        return torch.cat([errors[:1] * math.nan, errors[1:]]) if count[0] in calls else errors, *rest

    return wrapper


if __name__ == "__main__":
    name, rank, calls, *words = sys.argv[1:]
    script = importlib.import_module(name)
    if os.environ["RANK"] == rank:
        script.denoise = poisoned(script.denoise, set(map(int, calls.split(","))))
    args = script.parse_args(words)
    script.main(args, *scan.find_images(data_source(args)))
