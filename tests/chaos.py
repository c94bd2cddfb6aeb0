"""Kill runs at random moments, let them resume, and compare with runs that were never killed.

    python -m tests.chaos --kills 200        # what `make chaos` does; tests/processes/test_chaos.py does 20

Every run is a process of its own that gets a real SIGKILL. The processes are forked from one that has imported
PyTorch, since most of a short run would otherwise be imports.
"""

import argparse
import contextlib
import itertools
import json
import multiprocessing
import os
import shutil
import socket
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import numpy as np
from tqdm.auto import tqdm

STEPS = 7
PATIENCE = 300  # seconds after which a run counts as hanging
SCRIPTS = {"sdxl": "train_sdxl_lpl", "sd3": "train_sd3_lpl_flow"}
AXES = {
    "recipe": ("sdxl", "sd3"),
    "kind": ("lora", "full"),
    "lpl": (True, False),
    "accumulation": (1, 2),
    "workers": (0, 2),
    "ema": (True, False),
}
PLAIN = dict(optimizer="adamw", ranks=1)
MORE = (  # beside the grid
    dict(recipe="sdxl", kind="lora", lpl=True, accumulation=1, workers=0, ema=False, optimizer="adamw8bit", ranks=1),
    dict(recipe="sd3", kind="lora", lpl=True, accumulation=2, workers=0, ema=True, optimizer="prodigy", ranks=1),
    dict(recipe="sdxl", kind="full", lpl=True, accumulation=1, workers=0, ema=True, optimizer="adamw", ranks=2),
    dict(recipe="sd3", kind="lora", lpl=True, accumulation=1, workers=2, ema=False, optimizer="adamw", ranks=2),
)


def whole_grid():
    """All 64 combinations of promise 1, and 8-bit Adam, Prodigy and two ranks."""
    cells = [dict(zip(AXES, values, strict=True)) | PLAIN for values in itertools.product(*AXES.values())]
    return [*cells, *MORE]


def small_grid():
    """Eight combinations in which every two values of different axes meet, and the four beside the grid.

    Rows of an orthogonal array of strength 2: three free columns, and their sums by exclusive or.
    """
    cells = []
    for a, b, c in itertools.product((0, 1), repeat=3):
        columns = (a, b, c, a ^ b, a ^ c, b ^ c)
        cells.append({axis: values[at] for (axis, values), at in zip(AXES.items(), columns, strict=True)} | PLAIN)
    return [*cells, *MORE]


def title(cell):
    """A combination in words."""
    words = [cell["recipe"], cell["kind"], "LPL" if cell["lpl"] else "no LPL", f"accumulation {cell['accumulation']}",
             f"workers {cell['workers']}", "EMA" if cell["ema"] else "no EMA"]  # fmt: skip
    return ", ".join(words + [cell["optimizer"]] * (cell["optimizer"] != "adamw") + ["2 ranks"] * (cell["ranks"] == 2))


def flags_of(cell, models, pictures, cache_dir):
    """The flags of a combination, but for the output folder."""
    flags = (
        f"--pretrained_model_name_or_path {models[cell['recipe']]} --train_data_dir {pictures} "
        f"--cache_dir {cache_dir} --resolution 64 --random_flip --center_crop --proportion_empty_prompts 0.2 "
        f"--train_batch_size 2 --max_train_steps {STEPS} --learning_rate 1e-3 --lr_scheduler cosine "
        "--lr_warmup_steps 2 --report_to none --seed 3 --logging_steps 1 --mixed_precision no "
        "--checkpointing_steps 1 --checkpoints_total_limit 2 "
        f"--gradient_accumulation_steps {cell['accumulation']} --dataloader_num_workers {cell['workers']}"
    ).split()
    flags += ["--use_lora", "--lora_dropout", "0.1"] if cell["kind"] == "lora" else []
    flags += ["--use_lpl", "--lpl_weight", "auto"] if cell["lpl"] else []
    flags += ["--lpl_t_threshold", "900"] if cell["lpl"] and cell["recipe"] == "sdxl" else []
    flags += ["--use_ema"] if cell["ema"] else []
    flags += {"adamw8bit": ["--use_8bit_adam"], "prodigy": ["--optimizer", "prodigy"]}.get(cell["optimizer"], [])
    return flags


# ---------------------------------------------------------------------------------------------------------------------
# Runs


def work(script, flags, environment, log):
    """A run, in the process that was forked for it: what the script does after its imports."""
    os.environ.update(environment)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    multiprocessing.set_start_method("fork", force=True)  # of the loader's processes, as in any script
    sys.argv[1:] = flags
    import importlib

    from lpl_finetuning import errors
    from lpl_finetuning.data import scan
    from lpl_finetuning.flags import data_source

    module = importlib.import_module(script)
    with errors.errors_for_people(debug=True):
        args = module.parse_args(flags)
        module.main(args, *scan.find_images(data_source(args)))


class Launcher:
    """Starts runs by forking a process that has already imported everything."""

    def __init__(self):
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["tests.warm", *SCRIPTS.values()])
        self.port = None
        environment = dict(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE", HF_HUB_OFFLINE="1", ACCELERATE_USE_CPU="1",
                           PYTHONPATH=str(Path(__file__).resolve().parent.parent))  # fmt: skip
        with mock.patch.dict(os.environ, environment):  # that of the process that forks, and so of all runs
            first = self.context.Process(target=time.time)  # starts that process, which imports for some seconds
            first.start()
            first.join()

    def fork(self, script, flags, environment, log):
        """A process of a run, started: multiprocessing's, or with the `exitcode`, `join` and `kill` of that."""
        process = self.context.Process(target=work, args=(script, flags, environment, str(log)))
        process.start()
        return process

    def start(self, cell, flags, log):
        """The processes of a run, one a rank."""
        if self.port:
            self.port.close()
        self.port = reserved_port()
        port = self.port.getsockname()[1]
        shared = {"WORLD_SIZE": str(cell["ranks"]), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        ranks = [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(cell["ranks"])]
        return [self.fork(SCRIPTS[cell["recipe"]], flags, environment if cell["ranks"] > 1 else {}, log)
                for environment in ranks]  # fmt: skip


def reserved_port():
    """A socket with a free port of the loopback: while it is open nobody is given this port, but who names it gets it.

    Two sockets may have one port if both allow it, as PyTorch's do, and only one of them listens.
    """
    server = socket.socket()
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    server.bind(("127.0.0.1", 0))
    return server


def finish(processes, within):
    """Wait at most so many seconds for all; whether all have ended."""
    end = time.monotonic() + within
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    return all(process.exitcode is not None for process in processes)


def wait_until(processes, condition, what):
    """Wait until a condition holds, or a run has ended; whether it has ended."""
    end = time.monotonic() + PATIENCE
    while not condition():
        if finish(processes, 0.001):
            return True
        assert time.monotonic() < end, f"{what} never came"
    return False


def await_step(processes, folder, step):
    """Wait until a run has saved a step, or has ended; whether it has ended."""
    return wait_until(processes, lambda: max(saved(folder), default=0) >= step, f"step {step}")


def await_saving(processes, folder):
    """Wait until a run writes a checkpoint, or has ended; whether it has ended."""
    return wait_until(processes, lambda: is_saving(folder), "a checkpoint that is written")


def kill(processes, first=0):
    """SIGKILL to every rank, `first` before the others; the children of a rank, its loader's, see that it is gone."""
    for process in processes[first:] + processes[:first]:
        process.kill()
    for process in processes:
        process.join()


# ---------------------------------------------------------------------------------------------------------------------
# What is compared


def state_of(folder):
    """Every tensor and number that a finished run leaves: its result, and its last checkpoint with all its state."""
    from lpl_finetuning.training.checkpoint_folders import verify_checkpoint
    from tests.runs import tensors_of, weights

    last = Path(folder, f"checkpoint-{STEPS}")
    problem = verify_checkpoint(last)
    assert problem is None, problem
    return {
        "result": weights(folder),
        "weights": weights(last),
        "tensors": tensors_of(last / "training_state.safetensors"),
        "state": json.loads((last / "training_state.json").read_text()),
    }


def differences(found, expected):
    """Names of what is not the same to the last bit."""
    names = []
    for part in expected:
        keys = expected[part].keys() | found[part].keys()
        names += [f"{part}/{key}" for key in sorted(keys) if found[part].get(key) != expected[part].get(key)]
    return names


@dataclass
class Outcome:
    """What became of a combination: kills, by the step that was saved last when they came; and what was wrong."""

    cell: dict
    kills: Counter = field(default_factory=Counter)
    unfinished: int = 0  # kills that left a checkpoint which was being written
    resumes: int = 0
    problems: list = field(default_factory=list)


def chaos(cell, kills, launcher, flags, folder, rng, tick=lambda: None):
    """Run a combination once in peace, once with `kills` kills at random moments; compare. Returns its Outcome."""
    outcome = Outcome(cell)
    whole, killed = folder / "whole", folder / "killed"
    processes = launcher.start(cell, [*flags, "--output_dir", str(whole)], folder / "whole.log")
    began = time.monotonic()
    if not finish(processes, PATIENCE) or any(process.exitcode for process in processes):
        kill(processes)
        outcome.problems.append("the run in peace failed:\n" + tail(folder / "whole.log"))
        return outcome
    duration = time.monotonic() - began
    flags = [*flags, "--output_dir", str(killed), "--resume_from_checkpoint", "latest"]
    too_late = 0
    while (to_come := kills - sum(outcome.kills.values())) > 0:
        reached = max(saved(killed), default=0)
        outcome.resumes += reached > 0
        target = reached + rng.integers(0, 2 + (STEPS - reached) // to_come)  # 0 further: it is killed while it starts
        while_saving = to_come == 1  # the last kill: once the run has made a step and begins to save the next
        processes = launcher.start(cell, flags, folder / "killed.log")
        moment = rng.uniform(0, duration / 2 if target == reached else duration / STEPS / 2)
        ended = await_step(processes, killed, max(target, reached + while_saving))
        ended = ended or (await_saving(processes, killed) if while_saving else finish(processes, moment))
        failed = [process.exitcode for process in processes if process.exitcode]
        kill(processes, first=int(rng.integers(len(processes))))
        if failed:
            outcome.problems.append(f"a run ended with {failed} by itself:\n" + tail(folder / "killed.log"))
            return outcome
        if ended:  # it was faster than the kill: compare, and begin anew
            outcome.problems += compare(killed, whole)
            shutil.rmtree(killed)
            too_late += 1
            if outcome.problems or too_late == 20:
                outcome.problems.append(f"{too_late} runs ended before they were killed")
                return outcome
            continue
        outcome.kills[max(saved(killed), default=0)] += 1
        outcome.unfinished += is_saving(killed)
        tick()
    outcome.resumes += bool(saved(killed))
    processes = launcher.start(cell, flags, folder / "killed.log")
    if not finish(processes, PATIENCE) or any(process.exitcode for process in processes):
        kill(processes)
        outcome.problems.append("the last resume failed:\n" + tail(folder / "killed.log"))
        return outcome
    outcome.problems += compare(killed, whole)
    return outcome


def saved(folder):
    """Steps of the checkpoints that bear their name."""
    return [int(path.name.removeprefix("checkpoint-")) for path in Path(folder).glob("checkpoint-*")]


def is_saving(folder):
    """Whether a checkpoint is being written, or was when a kill came; those that are deleted end in -removed."""
    return any(folder.glob(".tmp-checkpoint-*[0-9]")) or any(folder.glob(".old-checkpoint-*"))


def compare(killed, whole):
    """The problems of two folders that ought to be the same: at most one."""
    found = differences(state_of(killed), state_of(whole))
    left = [path.name for path in killed.glob(".*")]
    return [f"not the same: {', '.join(found[:5])} ({len(found)} in all)"] * bool(found) + [
        f"left behind: {name}" for name in left
    ]


def tail(log, lines=15):
    """The end of a log."""
    return "\n".join(Path(log).read_text().splitlines()[-lines:]) if Path(log).is_file() else "(no log)"


# ---------------------------------------------------------------------------------------------------------------------
# Report


def total(outcomes):
    """(kills, resumes, combinations that came out the same to the last bit)"""
    return (
        sum(sum(outcome.kills.values()) for outcome in outcomes),
        sum(outcome.resumes for outcome in outcomes),
        sum(not outcome.problems for outcome in outcomes),
    )


def report(outcomes):
    """Lines: a table of combinations, and the sum."""
    lines = [f"{'kills':>5} {'while saving':>12} {'resumes':>7}  {'result':<9}  combination"]
    for outcome in outcomes:
        result = "DIFFERENT" if outcome.problems else "identical"
        lines.append(f"{sum(outcome.kills.values()):>5} {outcome.unfinished:>12} {outcome.resumes:>7}  {result:<9}  "
                     f"{title(outcome.cell)}")  # fmt: skip
    kills, resumes, same = total(outcomes)
    places = sum((outcome.kills for outcome in outcomes), Counter())
    lines.append(f"\n{kills} kills, {resumes} resumes: {same} of {len(outcomes)} combinations bit-identical")
    lines.append(
        "kills by the last saved step: " + ", ".join(f"{step}: {count}" for step, count in sorted(places.items()))
    )
    lines += [f"\n{title(outcome.cell)}: {problem}" for outcome in outcomes for problem in outcome.problems]
    return lines


def run_grid(cells, kills, folder, models, pictures, launcher, seed=0):
    """Spread `kills` kills over combinations, each with a folder of its own; returns the Outcomes."""
    outcomes = []
    with tqdm(total=kills, desc="kills", unit="kill") as bar:
        for number, cell in enumerate(cells):
            place = Path(folder, f"{number:02d}")
            place.mkdir(parents=True)
            share = kills // len(cells) + (number < kills % len(cells))
            flags = flags_of(cell, models, pictures, Path(folder, "cache"))
            rng = np.random.default_rng([seed, number])
            bar.set_postfix_str(title(cell))
            outcomes.append(chaos(cell, share, launcher, flags, place, rng, bar.update))
            if not outcomes[-1].problems:
                shutil.rmtree(place)
    return outcomes


def main():
    """The long mode."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    from tests import tiny_models

    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        models = {"sdxl": folder / "sdxl", "sd3": folder / "sd3"}
        tiny_models.sdxl_pipeline().save_pretrained(models["sdxl"])
        tiny_models.sd3_pipeline().save_pretrained(models["sd3"])
        pictures = tiny_models.picture_folder(folder / "pictures")
        outcomes = run_grid(whole_grid(), args.kills, folder / "runs", models, pictures, Launcher(), args.seed)
        print("\n".join(report(outcomes)))
    sys.exit(any(outcome.problems for outcome in outcomes))


if __name__ == "__main__":
    main()
