"""Run a script as torchrun would, and fail if a model that ranks share outlives their process group."""

import gc
import runpy
import sys

import torch
from torch.nn.parallel import DistributedDataParallel

destroy = torch.distributed.destroy_process_group


def checked(*args):
    """destroy_process_group, after a look at what is left."""
    left = [held for held in gc.get_objects() if isinstance(held, DistributedDataParallel)]
    print(f"models that outlive the group: {len(left)}", flush=True)
    destroy(*args)


torch.distributed.destroy_process_group = checked
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
