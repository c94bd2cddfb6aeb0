"""Run a script that is out of memory at a given place.

python tests/without_memory.py SCRIPT FUNCTION CALL RANK FLAGS...: at its CALL-th call, the script's FUNCTION raises
torch.OutOfMemoryError on rank RANK.
"""

import importlib
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lpl_finetuning.data import scan
from lpl_finetuning.flags import data_source
from lpl_finetuning.start import run_main

MESSAGE = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 15.77 GiB"


def out_of_memory_at(function, call, message=MESSAGE):
    """The function, whose `call`-th call raises torch.OutOfMemoryError. Calls on the meta device are not counted."""
    calls = [0]

    def wrapper(*args, **kwargs):
        if any(str(getattr(arg, "device", "")) == "meta" for arg in args):  # the plan counts a step
            return function(*args, **kwargs)
        calls[0] += 1
        if calls[0] == call:
            raise torch.OutOfMemoryError(message)
        return function(*args, **kwargs)

    return wrapper


if __name__ == "__main__":
    name, function, call, rank, *words = sys.argv[1:]
    script = importlib.import_module(name)
    if os.environ.get("RANK", "0") == rank:
        setattr(script, function, out_of_memory_at(getattr(script, function), int(call)))
    args = script.parse_args(words)
    run_main(script.main, (args, *scan.find_images(data_source(args))))
