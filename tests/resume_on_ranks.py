"""For tests: what checkpoint_to_resume answers on each rank, as JSON in answer-RANK.json of the folder in argv[1].

The ranks run in folders of their own, machine-0 and so on, as machines that share no disk would.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lpl_finetuning import files
from lpl_finetuning.base_model import BaseModel
from lpl_finetuning.errors import UserError
from lpl_finetuning.families import SDXL
from lpl_finetuning.training import checkpoint_folders, checkpoints

if __name__ == "__main__":
    root, identity, cases = Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3:]
    torch.distributed.init_process_group("gloo")
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    os.chdir(root / f"machine-{rank}")
    accelerator = SimpleNamespace(
        num_processes=world, process_index=rank, is_main_process=rank == 0, device=torch.device("cpu")
    )
    hashed, answers = [], {}
    sha256_of = files.sha256_of
    for module in (checkpoints, checkpoint_folders):
        module.sha256_of = lambda path: hashed.append(Path(path).name) or sha256_of(path)
    for case in cases:
        args = argparse.Namespace(
            resume_from_checkpoint="latest", output_dir=case, base_model=BaseModel(SDXL, "a/model"), **identity
        )
        hashed.clear()
        try:
            answer = checkpoints.checkpoint_to_resume(args, accelerator)
        except UserError as error:
            answer = f"error: {error}"
        answers[case] = [answer and str(answer), sorted(set(hashed))]
    (root / f"answer-{rank}.json").write_text(json.dumps(answers))
    torch.distributed.destroy_process_group()
