"""Accelerate's own FSDP2 on CPUs, for tests: python -m torch.distributed.run ... tests/fsdp_on_cpu.py SCRIPT FLAGS

Accelerate shards over accelerators only. Here it takes processes on the CPU, joined by gloo, for GPUs; all else is
what runs on those, set up as configs/fsdp2.yaml says.
"""

import os
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def launch_environment(config):
    """The environment variables by which `accelerate launch` tells its processes what a configuration file says."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    words = ["--config_file", str(config), "--main_process_port", "0"]  # a free one: the usual one may be taken here
    args = launch_command_parser().parse_args([*words, "train_sdxl_lpl.py"])
    args, _, _ = _validate_launch_command(args)
    names = ("ACCELERATE_", "FSDP_")
    return {name: value for name, value in prepare_multi_gpu_env(args).items() if name.startswith(names)}


if __name__ == "__main__":
    settings = launch_environment(ROOT / "configs" / "fsdp2.yaml")
    os.environ |= settings | {name: value for name, value in os.environ.items() if name in settings}
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
    sys.argv = sys.argv[1:]
    sys.path.insert(0, str(ROOT))
    runpy.run_path(sys.argv[0], run_name="__main__")
