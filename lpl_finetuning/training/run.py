"""Around the loop: the accelerator, the output folder and its lock, the micro-batches, the end."""

import contextlib
import fcntl
import functools
import os
import platform
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import (
    AutocastKwargs,
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    ProjectConfiguration,
)

from lpl_finetuning.data.encoding import prompt_key
from lpl_finetuning.data.report import save_report
from lpl_finetuning.data.samples import AddressedBatches, SampleOrder, TrainingSet, collate
from lpl_finetuning.errors import DataError, RankError, UserError, during, require
from lpl_finetuning.files import dispensable
from lpl_finetuning.flag_checks import precision_source, wants
from lpl_finetuning.flags import save_recipe
from lpl_finetuning.sample_prompts import PROMPTS_FILE, entries_text
from lpl_finetuning.stages import stage_ended
from lpl_finetuning.training.checkpoint_folders import keep_own_recipe, set_earlier_run_aside
from lpl_finetuning.training.machine import cards_in_use, check_cards
from lpl_finetuning.training.objective import with_noise
from lpl_finetuning.training.sharding import check_zero_devices, set_up_sharding
from lpl_finetuning.training.signals import leave_signals_to_the_run


def start_accelerator(args):
    """The `Accelerator` of a run, with trackers in --output_dir; UserError where the launch does not fit the flags."""
    logging_dir = Path(args.output_dir, args.logging_dir)
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    patience = timedelta(hours=12)  # ranks wait while rank 0 encodes and samples; NCCL would wait 10 minutes
    check_zero_devices()
    sharded = wants("FSDP") or wants("DEEPSPEED")
    check_cards(args, cards_in_use())
    accelerator = Accelerator(
        cpu=ranks > 1
        and not torch.accelerator.is_available()
        and not sharded,  # else accelerate takes each rank for a run of its own
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(project_dir=args.output_dir, logging_dir=logging_dir),
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=patience),
            # gradients are views of DDP's buckets, not copies; buffers are constant: SD3.5's are up to 900 MB
            DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False),
            # a pass uses a weight once: the cache would only keep low-precision copies of all weights until its end
            AutocastKwargs(cache_enabled=False),
        ],
    )
    require(
        accelerator.num_processes == ranks,
        f"{ranks} processes were started, but accelerate takes this one for one of {accelerator.num_processes}: start "
        "them with accelerate launch or torchrun",
    )
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise UserError(f"{precision_source(args)} fp16 needs a GPU, and none is here; use bf16 or no")
    set_up_sharding(accelerator, args.max_grad_norm)
    if args.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    stage_ended("accelerator")
    return accelerator


class Batches:
    """Iterator of this rank's micro-batches with their noise; the next one can be made while the device computes."""

    def __init__(self, loaded, objective, complete=with_noise):
        """
        Args:
            loaded: iterator of the loader's batches.
            complete: function (batch of the loader, objective) -> the batch with its noise.
        """
        self._loaded, self._objective, self._complete, self._ahead = loaded, objective, complete, None

    def __iter__(self):
        return self

    def __next__(self):
        make, self._ahead = self._ahead or self._make, None
        return make()

    def make_ahead(self):
        """Make the next micro-batch now, once. What goes wrong with it is raised when it is asked for."""
        if self._ahead is not None:
            return
        try:
            batch = self._make()
        except (StopIteration, DataError, RankError) as error:
            self._ahead = functools.partial(_raise, error)
        else:
            self._ahead = lambda: batch

    def _make(self):
        return self._complete(next(self._loaded), self._objective)


def _raise(error):
    raise error


@contextlib.contextmanager
def open_batches(args, data, accelerator, objective, first_step, last_step, complete=with_noise):
    """Context manager: the `Batches` of this rank from `first_step` on; the loader ends with it.

    Args:
        data: the `RunData`.
        complete: see `Batches`.
    """
    stage_ended("optimizer, first validation, checkpoint")
    iterator = batches(args, data, accelerator, first_step, last_step)
    with contextlib.closing(iterator), during("training"):
        yield Batches(iterator, objective, complete)


def batches(args, data, accelerator, first_step, last_step):
    """Generator of this rank's micro-batches; to be closed, which ends the loader's processes."""
    order = SampleOrder(args.seed, args.train_batch_size, data.framing.buckets)
    latents = data.latents if data.cached else None
    samples = TrainingSet(data.images, order, data.framing, data.captions, latents, data.prompts, prompt_key)
    numbers = AddressedBatches(
        first_step, last_step, args.train_batch_size, args.gradient_accumulation_steps, accelerator.num_processes,
        accelerator.process_index,
    )  # fmt: skip
    loader = torch.utils.data.DataLoader(
        samples,
        batch_sampler=numbers,
        collate_fn=collate,
        num_workers=args.dataloader_num_workers,
        pin_memory=accelerator.device.type == "cuda",
        worker_init_fn=leave_signals_to_the_run,
    )
    try:
        yield from loader
    except DataError as error:  # from a loading process it holds the traceback, whose last line is the message
        kind = f"{type(error).__module__}.{type(error).__qualname__}: "
        raise RankError(str(error).rpartition(kind)[2].strip()) from error


def end(accelerator):
    """Close the trackers and the ranks' process group. The caller must have released the prepared model.

    If the model is the last to hold the process group, PyTorch deadlocks: it waits, holding the GIL, for a thread of
    the group that waits for the GIL.
    """
    accelerator.free_memory()
    with dispensable("the trackers' log"):
        accelerator.end_training()


@contextlib.contextmanager
def open_output_dir(args, accelerator, resume_from, report, check_access):
    """Context manager: --output_dir with the flags and the report on the data in it, locked against other runs.

    A base model in a single file is unpacked before. What an earlier run left in the folder is moved aside. The
    context's value is the name on the Hub under --push_to_hub, on rank 0, else None.

    Args:
        check_access: function (name, token, private) -> owner/name, asked under --push_to_hub.

    Raises:
        UserError: another run is writing there, or the Hub would refuse the result.
    """
    stage_ended("plan")
    args.base_model.unpack()
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    hub_name = None
    with lock(output_dir) if accelerator.is_main_process else contextlib.nullcontext():
        if accelerator.is_main_process:
            if aside := set_earlier_run_aside(output_dir, resume_from, args.logging_dir):
                what = "Results of an earlier run" if resume_from is None else "Later checkpoints"
                accelerator.print(f"{what} are kept in {aside}")
            if args.push_to_hub:
                name = args.hub_model_id or output_dir.resolve().name
                hub_name = check_access(name, args.hub_token, args.hub_private_repo)
            if own := keep_own_recipe(output_dir):
                accelerator.print(f"{output_dir / 'config.yaml'}, which no run has written, is now {own}")
            save_recipe(args, output_dir / "config.yaml")
            save_report(report, output_dir / "data_report.json")
            save_entries(args, output_dir)
        yield hub_name


def save_entries(args, output_dir):
    """Write the entries of --validation_prompts_file into the output folder, for the next start to compare with."""
    if args.prompts:
        (output_dir / PROMPTS_FILE).write_text(entries_text(args.prompts), encoding="utf-8")
    else:
        (output_dir / PROMPTS_FILE).unlink(missing_ok=True)


def check_start(args, accelerator, check_access):
    """The end of a dry run: refuse what the run would be refused for before weights load. Nothing is written.

    Args:
        check_access: see `open_output_dir`.

    Raises:
        UserError: another run writes to --output_dir, or the Hub would refuse the result.
    """
    if not accelerator.is_main_process:
        return
    output_dir = Path(args.output_dir)
    with contextlib.suppress(FileNotFoundError, PermissionError), open(output_dir / ".lock", "r+") as file:
        refuse_locked(file, output_dir)
    if args.push_to_hub:
        name = args.hub_model_id or output_dir.resolve().name
        check_access(name, args.hub_token, args.hub_private_repo, create=False)


def refuse_locked(file, folder):
    """Lock the open .lock of a folder; UserError where another run holds it. A file system may have no locks."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise UserError(
            f"--output_dir {folder}: another run is writing there ({file.read().strip() or 'not known which'}): "
            "wait for its end, or name another folder"
        ) from None
    except OSError:
        pass


@contextlib.contextmanager
def lock(folder):
    """Context manager: keeps other runs out of a folder; UserError where another run holds it.

    It is a record lock: the system drops it when the process ends, and the loader's processes do not inherit it. A
    file system without locks keeps nobody out.
    """
    with open(folder / ".lock", "a+") as file:
        refuse_locked(file, folder)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        try:
            yield
        finally:
            (folder / ".lock").unlink(missing_ok=True)
