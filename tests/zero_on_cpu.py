"""DeepSpeed's ZeRO on CPUs, for tests: python -m torch.distributed.run ... tests/zero_on_cpu.py STAGE WORDS

Accelerate takes processes on the CPU, joined by gloo, for GPUs, and DeepSpeed its CPU accelerator, without the shared
memory for which it would compile something (a build that is killed leaves a lock at which later ones wait for ever).
All else is what runs on GPUs, set up as configs/zeroSTAGE.yaml says. WORDS: a script and its arguments.
"""

import os
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def launch_environment(config):
    """The environment variables by which `accelerate launch` tells its processes what a configuration file says."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env

    words = ["--config_file", str(config), "--main_process_port", "0"]  # a free one: the usual one may be taken here
    args, defaults, _ = _validate_launch_command(launch_command_parser().parse_args([*words, "train_sdxl_lpl.py"]))
    args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
    _, settings = prepare_deepspeed_cmd_env(args)
    return {name: value for name, value in settings.items() if name.startswith("ACCELERATE_")}


if __name__ == "__main__":
    os.environ["DS_ACCELERATOR"] = "cpu"
    settings = launch_environment(ROOT / "configs" / f"zero{sys.argv[1]}.yaml")
    os.environ |= settings | {name: value for name, value in os.environ.items() if name in settings}
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    import deepspeed.comm
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
    sys.modules[deepspeed.comm.TorchBackend.__module__].build_shm_op = lambda: None
    sys.argv = sys.argv[2:]
    sys.path.insert(0, str(ROOT))
    runpy.run_path(sys.argv[0], run_name="__main__")
