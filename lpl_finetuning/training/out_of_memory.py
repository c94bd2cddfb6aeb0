"""Out of memory: one sentence that says what was being done, which flags help, and which checkpoint is left.

`parts` is the plan's estimate of the memory of one device, [(what, bytes)]: weights, gradients, optimizer state, EMA,
activations, decoder, LPL. A part that is missing counts as 0.
"""

import contextlib
import re

import torch

from lpl_finetuning.errors import RankError
from lpl_finetuning.files import format_bytes
from lpl_finetuning.training.checkpoint_folders import list_checkpoints, run_identity

SIGNS = ("out of memory", "can't allocate memory", "not enough memory", "_STATUS_ALLOC_FAILED")
ASKED_FOR = re.compile(r"tried to allocate ([\d.]+ ?\w*)", re.IGNORECASE)
MOST_FLAGS = 5  # that a message names
LOADING = "loading the models"  # what is done where nothing else is named


def is_out_of_memory(error):
    """Whether an exception says that a GPU or the machine has no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in SIGNS)


@contextlib.contextmanager
def explained_if_out_of_memory(args, accelerator, parts):
    """Context manager: turns an out-of-memory error into a RankError, and its consequence on the other ranks too.

    `errors.during` says what was being done.
    """
    try:
        yield
    except Exception as error:
        if accelerator.num_processes > 1 and is_lost_rank(error):
            raise RankError(f"rank {accelerator.process_index}: another rank has ended, and its own message says "
                            f"why ({str(error).splitlines()[0]})") from error  # fmt: skip
        if not is_out_of_memory(error):
            raise
        message = explanation(args, accelerator, dict(parts or ()), error)
        raise RankError(message) from error


def is_lost_rank(error):
    """Whether an exception says that the connection to another rank is gone."""
    gone = ("Connection closed by peer", "Connection reset by peer")
    return isinstance(error, RuntimeError) and any(words in str(error) for words in gone)


def explanation(args, accelerator, parts, error):
    """The sentence about an out-of-memory error. parts: {what: bytes}."""
    doing, found = getattr(error, "during", LOADING), list_checkpoints(args.output_dir)
    asked = ASKED_FOR.search(str(error))
    which = f"rank {accelerator.process_index}: " if accelerator.num_processes > 1 else ""
    place = "the machine" if accelerator.device.type == "cpu" else "the GPU"
    fixed = run_identity(args) if found else {}  # what a checkpoint can't be resumed without
    flags = [(size, flag) for size, flag in remedies(args, accelerator, parts, doing)
             if not any(name in fixed for name in re.findall(r"--(\w+)", flag))]  # fmt: skip
    flags = [f"{flag}{f' (about {format_bytes(size)})' if size else ''}"
             for size, flag in sorted(flags, key=lambda entry: -entry[0])[:MOST_FLAGS]]  # fmt: skip
    advice = f"what helps here, most first: {', '.join(flags)}"
    kept = "no checkpoint was written yet"
    if found:
        kept = f"{found[-1][1].name} is intact: add a flag, and --resume_from_checkpoint latest goes on from it"
    asked = f" (asked for {asked[1].strip()})" if asked else ""
    return f"{which}{place} ran out of memory while {doing}{asked}; {advice}; {kept}"


def remedies(args, accelerator, parts, doing):
    """[(bytes that it would save, flag)] of the flags that are not set and help while `doing`; rough estimates."""
    if doing.startswith("encoding"):
        return [(0, "close other programs that use this memory"), (0, f"--resolution below {args.resolution}")]
    flags = always_saving(args, accelerator, parts)
    if doing.startswith("drawing"):
        at_once = min(args.num_validation_images, (1024 // args.resolution) ** 2)
        flags += [(0, "--num_validation_images 1")] if at_once > 1 else []
    elif doing.startswith("measuring"):
        flags += [(0, f"--train_batch_size {args.train_batch_size // 2}")] if args.train_batch_size > 1 else []
    elif doing != LOADING:
        flags += saving_in_a_step(args, accelerator, parts)
    return [*flags, (0, f"--resolution below {args.resolution}")]


def always_saving(args, accelerator, parts):
    """[(bytes, flag)] of the flags that lower what is in memory all the time."""
    state, ema, weights = (parts.get(name, 0) for name in ("optimizer state", "EMA", "weights"))
    on_gpu = accelerator.device.type != "cpu"
    return [(int(size), flag) for works, size, flag in (
        (not args.use_lora, parts.get("gradients", 0) + state + ema + weights / 2, "--use_lora"),
        (on_gpu and args.use_lora and not args.bnb_quantization_config_path, 0.6 * weights,
         "--bnb_quantization_config_path configs/nf4.json"),
        (on_gpu and args.optimizer == "adamw" and not args.use_8bit_adam, 0.75 * state, "--use_8bit_adam"),
        (on_gpu and args.use_ema and not args.offload_ema, ema, "--offload_ema"),
    ) if works]  # fmt: skip


def saving_in_a_step(args, accelerator, parts):
    """[(bytes, flag)] of the flags that lower what a training step needs."""
    kept, lpl, batch = parts.get("activations", 0), parts.get("LPL", 0), args.train_batch_size
    by_stage = (args.lpl_checkpointing or ("stage" if args.gradient_checkpointing else "none")) == "stage"
    decoded = args.use_lpl and args.lpl_features != "latent"
    whole = accelerator.device.type != "cpu" and accelerator.mixed_precision == "no"
    twice = 2 * args.gradient_accumulation_steps
    halved = f"--train_batch_size {batch // 2} with --gradient_accumulation_steps {twice}"
    return [(int(size), flag) for works, size, flag in (
        (not args.gradient_checkpointing, 0.8 * kept, "--gradient_checkpointing"),
        (batch > 1, (kept + lpl) / 2, halved),
        (whole, kept / 2, "--mixed_precision bf16"),
        (decoded and not by_stage, 0.6 * lpl, "--lpl_checkpointing stage"),
        (decoded and batch > 1 and args.lpl_batch_size != 1, lpl / 2, "--lpl_batch_size 1"),
        (decoded and args.lpl_num_blocks > 1, lpl / 3, f"--lpl_num_blocks {args.lpl_num_blocks - 1}"),
    ) if works]  # fmt: skip
