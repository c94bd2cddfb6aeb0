"""Out of memory: one sentence that says what was being done, which flags help, and which checkpoint is left.

`peaks` is the plan's count of a step, {phase: Peak}. What a flag saves is estimated from it; nothing is counted anew.
"""

import contextlib
import re

import torch

from lpl_finetuning.errors import RankError
from lpl_finetuning.files import format_bytes
from lpl_finetuning.flag_checks import decodes
from lpl_finetuning.training.checkpoint_folders import list_checkpoints, run_identity
from lpl_finetuning.training.live_memory import REST, Peak
from lpl_finetuning.training.perceptual import lpl_config
from lpl_finetuning.training.step_memory import AVERAGE, GRADIENTS, STATE, WEIGHTS, highest

SIGNS = ("out of memory", "can't allocate memory", "not enough memory", "_STATUS_ALLOC_FAILED")
ASKED_FOR = re.compile(r"tried to allocate ([\d.]+ ?\w*)", re.IGNORECASE)
MOST_FLAGS = 5  # that a message names
KEPT, LPL = "kept by the forward pass", "LPL"  # shares of what a step holds besides what is always there
LOADING = "loading the models"  # what is done where nothing else is named


def is_out_of_memory(error):
    """Whether an exception says that a GPU or the machine has no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in SIGNS)


@contextlib.contextmanager
def explained_if_out_of_memory(args, accelerator, peaks):
    """Context manager: turns an out-of-memory error into a RankError, and its consequence on the other ranks too.

    `errors.during` says what was being done.

    Args:
        peaks: what `print_plan` returned.
    """
    try:
        yield
    except Exception as error:
        if accelerator.num_processes > 1 and is_lost_rank(error):
            raise RankError(f"rank {accelerator.process_index}: another rank has ended, and its own message says "
                            f"why ({str(error).splitlines()[0]})") from error  # fmt: skip
        if not is_out_of_memory(error):
            raise
        message = explanation(args, accelerator, in_use(peaks, accelerator.device), error)
        raise RankError(message) from error


def is_lost_rank(error):
    """Whether an exception says that the connection to another rank is gone."""
    gone = ("Connection closed by peer", "Connection reset by peer")
    return isinstance(error, RuntimeError) and any(words in str(error) for words in gone)


def in_use(peaks, device):
    """The plan's peaks; where no step was counted, with a phase of what PyTorch held on the GPU at most."""
    if "" not in peaks or device.type != "cuda":
        return peaks
    fixed, held = peaks[""], torch.cuda.max_memory_allocated(device)
    rest = {REST: max(0, held - fixed.size)}
    return {"backward": Peak(max(held, fixed.size), "", fixed.kinds | rest)}


def explanation(args, accelerator, peaks, error):
    """The sentence about an out-of-memory error. peaks: {phase: Peak}."""
    doing, found = getattr(error, "during", LOADING), list_checkpoints(args.output_dir)
    asked = ASKED_FOR.search(str(error))
    which = f"rank {accelerator.process_index}: " if accelerator.num_processes > 1 else ""
    place = "the machine" if accelerator.device.type == "cpu" else "the GPU"
    fixed = run_identity(args) if found else {}  # what a checkpoint can't be resumed without
    useless = {*fixed, *(vars(args).keys() - args.defaults.keys())}  # fixed by a checkpoint, or no flags of the script
    flags = [(size, flag) for size, flag in remedies(args, accelerator, peaks, doing)
             if not any(name in useless for name in re.findall(r"--(\w+)", flag))]  # fmt: skip
    flags = [f"{flag}{f' (about {format_bytes(size)})' if size else ''}"
             for size, flag in sorted(flags, key=lambda entry: -entry[0])[:MOST_FLAGS]]  # fmt: skip
    advice = f"what helps here, most first: {', '.join(flags)}"
    kept = "no checkpoint was written yet"
    if found:
        kept = f"{found[-1][1].name} is intact: add a flag, and --resume_from_checkpoint latest goes on from it"
    asked = f" (asked for {asked[1].strip()})" if asked else ""
    return f"{which}{place} ran out of memory while {doing}{asked}; {advice}; {kept}"


def remedies(args, accelerator, peaks, doing):
    """[(bytes by which the highest peak falls, flag)] of the flags that are not set and help while `doing`."""
    if doing.startswith("encoding"):
        return [(0, "close other programs that use this memory"), (0, f"--resolution below {args.resolution}")]
    flags = always_saving(args, accelerator)
    if doing.startswith("drawing"):
        at_once = min(args.num_validation_images, (1024 // args.resolution) ** 2)
        flags += [("--num_validation_images 1", {})] if at_once > 1 else []
    elif doing.startswith("measuring"):
        flags += [(f"--train_batch_size {args.train_batch_size // 2}", {})] if args.train_batch_size > 1 else []
    elif doing != LOADING:
        flags += saving_in_a_step(args, accelerator)
    flags.append((f"--resolution below {args.resolution}", {}))
    return [(saved_bytes(peaks, shares), flag) for flag, shares in flags]


def saved_bytes(peaks, shares):
    """Bytes by which the highest peak falls.

    Args:
        shares: {kind: share of its bytes that is saved}. REST is told apart: what the forward pass keeps (KEPT), and
            what the perceptual loss adds to that (LPL).
    """
    kept = peaks["forward"].kinds.get(REST, 0) if "forward" in peaks else 0

    def size_with(phase, peak):
        kinds = dict(peak.kinds)
        rest = kinds.pop(REST, 0)
        kinds |= {KEPT: min(kept, rest), LPL: max(0, rest - kept)} if phase == "LPL" else {}
        kinds |= {KEPT: rest} if phase in ("forward", "backward") else {}
        return peak.size - sum(share * kinds.get(kind, 0) for kind, share in shares.items())

    return int(highest(peaks).size - max((size_with(*entry) for entry in peaks.items()), default=0))


def always_saving(args, accelerator):
    """[(flag, shares)] of the flags that lower what is in memory all the time; shares: see `saved_bytes`."""
    on_gpu = accelerator.device.type != "cpu"
    return [(flag, shares) for works, flag, shares in (
        (not args.use_lora, "--use_lora", {GRADIENTS: 1, STATE: 1, AVERAGE: 1, WEIGHTS: 0.5}),
        (on_gpu and args.use_lora and not args.bnb_quantization_config_path and args.lora_type in ("lora", "dora"),
         "--bnb_quantization_config_path configs/nf4.json", {WEIGHTS: 0.6}),
        (on_gpu and args.optimizer == "adamw" and not args.use_8bit_adam, "--use_8bit_adam", {STATE: 0.75}),
        (not args.use_lora and args.optimizer == "adamw" and not args.use_8bit_adam, "--optimizer adafactor",
         {STATE: 0.99}),
        (on_gpu and args.use_ema and not args.offload_ema, "--offload_ema", {AVERAGE: 1}),
    ) if works]  # fmt: skip


def saving_in_a_step(args, accelerator):
    """[(flag, shares)] of the flags that lower what a training step needs; shares: see `saved_bytes`."""
    batch, decoded = args.train_batch_size, args.use_lpl and decodes(args)
    config = lpl_config(args)
    whole = accelerator.device.type != "cpu" and accelerator.mixed_precision == "no"
    at_once = min(batch, config.batch_size)
    twice = 2 * args.gradient_accumulation_steps
    halved = f"--train_batch_size {batch // 2} with --gradient_accumulation_steps {twice}"
    return [(flag, shares) for works, flag, shares in (
        (not args.gradient_checkpointing, "--gradient_checkpointing", {KEPT: 0.8}),
        (batch > 1, halved, {KEPT: 0.5, LPL: 0.5 if at_once > 1 else 0}),
        (whole, "--mixed_precision bf16", {KEPT: 0.5, LPL: 0.5}),
        (decoded and config.checkpointing != "stage", "--lpl_checkpointing stage", {LPL: 0.6}),
        (decoded and at_once > 1, "--lpl_batch_size 1", {LPL: 1 - 1 / at_once}),
        (decoded and args.lpl_num_blocks > 1, f"--lpl_num_blocks {args.lpl_num_blocks - 1}", {LPL: 0.33}),
    ) if works]  # fmt: skip
