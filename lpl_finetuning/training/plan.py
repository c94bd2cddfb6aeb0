"""The plan of a run, printed before any weights load: data, steps, models, the loss, an estimate of the memory."""

import contextlib
import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lpl_finetuning.adapters import block_prefixes, patterns_of, unused_kinds
from lpl_finetuning.data.encoding import in_chunks
from lpl_finetuning.data.report import build_report, refuse_remarks, report_lines
from lpl_finetuning.errors import brief, counted, require
from lpl_finetuning.files import cache_folder, digest, format_bytes, write_whole
from lpl_finetuning.flags import (
    REPOSITORY,
    caption_rules,
    feature_fractions,
    feature_parts,
    framing_rules,
    print_configuration,
    step_images,
)
from lpl_finetuning.lora_files import alpha_of, file_for_others, kind_of
from lpl_finetuning.sample_prompts import entries_of, plan_lines, prompt_texts
from lpl_finetuning.training.checkpoint_folders import changes_since, images_seen, read_manifest
from lpl_finetuning.training.checkpoints import checkpoint_to_resume
from lpl_finetuning.training.estimates import counted_peaks
from lpl_finetuning.training.live_memory import Peak
from lpl_finetuning.training.models import adapted_layers, lora_config
from lpl_finetuning.training.perceptual import lpl_config
from lpl_finetuning.training.sharding import is_sharded, memory_of_rank, zero_stage
from lpl_finetuning.training.step_memory import Machine, flop_of_step, highest, kept_bytes, latent_size
from lpl_finetuning.training.validation import HELD_OUT_LEVELS
from lpl_utils import stage_features

RESERVE = 1_000_000_000  # bytes of a GPU that CUDA itself, workspaces and fragmentation take; a guess
NF4 = str(REPOSITORY / "configs" / "nf4.json")


@dataclass(frozen=True)
class Plan:
    """What is settled about a run before any weights load."""

    schedule: object  # noise levels, timesteps and targets: the script's `Schedule`
    dtype: torch.dtype  # that the denoiser computes in
    batch_size: int  # images of an optimizer step, over all ranks
    total_steps: int  # optimizer steps
    resume_from: Path | None  # the checkpoint that the run resumes from
    first_step: int  # optimizer steps that the checkpoint has made
    first_image: int  # images that it has seen, repetitions included


def plan_run(args, accelerator, schedule, images):
    """The `Plan` of a run on so many images; UserError where --resume_from_checkpoint can't be followed."""
    resume_from = checkpoint_to_resume(args, accelerator)
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
    batch_size, first_step, first_image = step_images(args, accelerator.num_processes), 0, 0
    if resume_from is not None:
        first_step, first_image = read_manifest(resume_from)["step"], images_seen(resume_from, batch_size)
    # the checkpoint's steps may have had other numbers of images
    total_steps = args.max_train_steps or first_step - (first_image - args.num_train_epochs * images) // batch_size
    return Plan(schedule, dtype, batch_size, total_steps, resume_from, first_step, first_image)


def warnings_about(args, total_steps, first_step):
    """[warning] on flags that are allowed but rarely meant, in a run from `first_step` to `total_steps`."""
    remarks = []
    if first_step > total_steps:
        remarks.append(
            f"the checkpoint has made {first_step} steps, and the run ends at step {total_steps}: nothing is trained, "
            f"and the result is that of step {first_step}"
        )
    if args.lr_scheduler != "constant" and args.lr_warmup_steps >= total_steps:
        remarks.append(
            f"the learning rate is still warming up when the run ends: --lr_warmup_steps {args.lr_warmup_steps} of "
            f"{total_steps} steps; lower it"
        )
    if args.optimizer == "prodigy" and args.learning_rate < 0.1:
        remarks.append(
            f"--optimizer prodigy multiplies its own step size by --learning_rate {args.learning_rate:g}; 1 is usual"
        )
    if "hub_token" in args.given:
        remarks.append(
            "--hub_token can be seen by others in the list of processes; prefer HF_TOKEN or `hf auth login`"
        )
    return remarks


def describe_lora(config):
    """An adapter's configuration in a few words."""
    more = f", factor {config.decompose_factor}" if getattr(config, "decompose_factor", -1) != -1 else ""
    return f"{kind_of(config)} of rank {config.r}, alpha {alpha_of(config):g}{more}"


def lines_on_layers(args, models):
    """The lines of the plan on blocks, patterns and layers that one might expect to be trained."""
    layers = {part: adapted_layers(model) for part, model in models.items()}
    lines = []
    if args.lora_blocks:
        blocks = block_prefixes(args, args.base_model.family).items()
        lines.append("blocks " + ", ".join(name if word == name else f"{word} ({name})" for word, name in blocks))
    for pattern in patterns_of(args):
        count = sum(pattern.matches(part, name) for part, names in layers.items() for name in names)
        found = {"rank": pattern.rank, "alpha": pattern.alpha, "learning rate": pattern.lr}
        what = ", ".join(f"{name} {value:g}" for name, value in found.items() if value is not None)
        how = f"{what} ({counted(count, 'layer')})" if pattern.rank != 0 else "left out"
        lines.append(f"{pattern.regex}: {how}")
    family = args.base_model.family
    part, model = next(iter(models.items()))
    names = [name for name, module in model.named_modules() if hasattr(module, "weight")]
    for kind, count in unused_kinds(names, layers[part], family).items():
        lines.append(f"{counted(count, 'layer')} of {kind} have none; --lora_layers attention,{kind} trains them too")
    return lines


# ---------------------------------------------------------------------------------------------------------------------
# The plan


def truncated_captions(tokenizers, captions, folder):
    """{tokenizer: number of captions that it truncates}; counted once, then read from `folder`.

    Args:
        captions: function that returns an iterator over the captions.
    """
    content = hashlib.sha256()
    for caption in captions():
        content.update(caption.encode() + b"\0")
    kinds = [[digest(vocabulary=tokenizer.get_vocab()), tokenizer.model_max_length] for tokenizer in tokenizers]
    path = folder / f"truncated-{digest(captions=content.hexdigest(), tokenizers=kinds)[:32]}.json"
    with contextlib.suppress(OSError, ValueError):
        return json.loads(path.read_text())
    counts = [0] * len(tokenizers)
    for chunk in in_chunks(captions(), 1000):
        for number, tokenizer in enumerate(tokenizers):
            ids = tokenizer(chunk).input_ids
            counts[number] += sum(len(row) > tokenizer.model_max_length for row in ids)
    counts = {f"tokenizer_{number + 1}" if number else "tokenizer": count for number, count in enumerate(counts)}
    with contextlib.suppress(OSError):  # the cache can't be written
        write_whole(path, json.dumps(counts).encode())
    return counts


def cut_prompts(args, tokenizers):
    """The validation prompts that a tokenizer truncates."""

    def is_cut(text):
        return any(len(tokenizer(text).input_ids) > tokenizer.model_max_length for tokenizer in tokenizers)

    return list(filter(is_cut, prompt_texts(args)))


def check_data(args, scan, held_out, tokenizers, accelerator):
    """The report on the data, with the captions that the tokenizers truncate; DataError under --strict if remarked."""
    report = build_report(scan, held_out, framing_rules(args), args.train_batch_size)
    rules = caption_rules(args)

    def captions():
        return (rules.text(caption) for image in scan.images for caption in image.captions)

    with accelerator.main_process_first():
        counts = truncated_captions(tokenizers, captions, cache_folder(args.cache_dir) / "scans")
    report["truncated"], report["truncated_prompts"] = counts, cut_prompts(args, tokenizers)
    report["cached"] = framing_rules(args).framing(scan.images).can_be_cached(scan.images)
    if any(counts.values()):
        which = ", ".join(f"{count} of them by {name}" for name, count in counts.items() if count)
        report["remarks"].append(f"Captions are longer than the tokenizers take, and cut off: {which}.")
    if args.strict:
        refuse_remarks(report)
    return report


def check_machine(args):
    """Raise UserError for flags that this machine can't follow."""
    require(not args.enable_xformers_memory_efficient_attention or torch.cuda.is_available(),
            "--enable_xformers_memory_efficient_attention: xformers needs a CUDA GPU, and none is here: leave it "
            "out")  # fmt: skip
    require(not args.bnb_quantization_config_path or torch.cuda.is_available(),
            "--bnb_quantization_config_path: quantizing needs a CUDA GPU, and none is here: leave it "
            "out")  # fmt: skip


def print_plan(args, report, accelerator, plan, gate, code):
    """Print what will happen: flags, data, steps, validation, models, the perceptual loss and memory.

    Args:
        report: on the data, from `check_data`; plan: the `Plan`; gate: the `LPLGate`; code: the `RunCode`.

    Returns:
        {phase: Peak} of a step on one device: see `print_memory`.

    Raises:
        UserError: this machine can't do what the flags ask for.
    """
    check_machine(args)
    print_run(args, report, accelerator, plan)
    denoiser = code.build_denoiser(args, plan.dtype, "meta")
    print_models(args, denoiser.models(), f"{plan.schedule.describe()}, {str(plan.dtype)[6:]}", accelerator.print)
    if args.use_lpl:
        share = plan.schedule.gated_share(gate)
        hint = plan.schedule.threshold_for(0.2, by_timestep=gate.t_threshold is not None)
        shape = code.example_batch(denoiser, args, latent_size(args), plan.dtype)["mean"].shape[1:]
        stages = code.networks(args, Machine(accelerator.mixed_precision)).stages
        print_lpl_plan(args, gate, share, hint, stages, shape, accelerator.print)
    peaks = print_memory(args, accelerator, plan, denoiser, code, not report["cached"])
    if args.use_lpl and (line := arithmetic_line(peaks, args.train_batch_size, share)):
        accelerator.print(line)
    accelerator.print("")
    return peaks


def print_run(args, report, accelerator, plan, measured=None):
    """Print the flags, the data, the steps and the validation of a run.

    Args:
        report: on the data, from `check_data`.
        measured: what is measured of held-out images, in words; by default the loss at all noise levels.
    """
    say, total_steps = accelerator.print, plan.total_steps
    batch, images_made = plan.batch_size, plan.first_image + (total_steps - plan.first_step) * plan.batch_size
    images, held_out = report["images"], report["held_out"]
    print_configuration(args, say)
    for line in [line for each in args.base_model.unpacked.values() for line in each.said]:
        say(line)
    say("\n" + "\n".join(report_lines(report)) + "\n")
    for warning in warnings_about(args, total_steps, plan.first_step):
        say(f"warning: {warning}")
    for text in report.get("truncated_prompts", ()):
        say(f"warning: the validation prompt {brief(text)} is longer than the tokenizers take: its end is cut off")
    if plan.resume_from is not None and (changes := changes_since(args, plan.resume_from, images)):
        say(f"Goes on from {plan.resume_from}; since then changed: {'; '.join(changes)}")
    say(f"Steps: {total_steps} of {batch} images ({args.train_batch_size} per device x {accelerator.num_processes} "
        f"x {args.gradient_accumulation_steps} accumulated); {images / batch:.1f} steps an epoch, "
        f"{images_made / images:.1f} epochs")  # fmt: skip
    if file_for_others(args):
        say(describe_result(args))
    if args.merge_into:
        say(f"Result: a whole model in {args.merge_into} too, the base model with the LoRA added")
    what = []
    if entries := entries_of(args):
        what.append(f"{len(entries)} x {args.num_validation_images} images")
    if held_out:
        measured = measured or f"the loss of {held_out} held-out images at {HELD_OUT_LEVELS} noise levels"
        what.append(measured)
    if args.validation_metrics:
        what.append("the one-step test")
    if what:
        every = args.validation_steps or args.validation_epochs * images / batch
        say(f"Validation: {', '.join(what)} every {every:g} steps"
            + ("; --validation_steps sets another interval" if args.validation_steps is None else ""))  # fmt: skip
    for line in plan_lines(args):
        say(line)
    if args.validation_metrics and args.validation_kid_every:
        every = args.validation_kid_every
        when = f"at the first, the last and validations {every}, {2 * every}, …" if every > 1 else "at each of them"
        say(f"            KID of {args.validation_kid_samples} samples {when}")


def describe_result(args):
    """The file for other programs in a line of the plan."""
    words = [f"Result: {file_for_others(args)} too, for other programs"]
    if args.checkpoints_kohya_format:
        words.append(f"every checkpoint has one, such as {file_for_others(args, args.checkpointing_steps)}")
    if args.use_lora and args.save_tag_frequency:
        words.append("it lists the tags of the captions; --no-save_tag_frequency leaves them out")
    return "; ".join(words)


def print_models(args, models, how, say):
    """Print what is trained. models: {name: model}; how: prediction and precision in words."""
    for name, model in models.items():
        trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        everything = sum(parameter.numel() for parameter in model.parameters())
        kind = describe_lora(lora_config(model)) if args.use_lora else "all"
        say(f"Training: {trainable:,} of {everything:,} parameters of the {name} ({kind})")
    for line in lines_on_layers(args, models) if args.use_lora else ():
        say(f"          {line}")
    say(f"          {how}, {args.optimizer}")


def print_lpl_plan(args, gate, share, hint, stages, shape, say):
    """Print the gate, the weights and the networks of the loss with their stages.

    Args:
        share: of gated samples; hint: the flag that would gate 20 %; stages: {network: `FeatureStages`}; shape:
            (C, h, w) of the latents.
    """
    config = lpl_config(args)
    rule = f"t < {gate.limit:g}" if gate.t_threshold is not None else f"sigma / alpha <= {gate.limit:g}"
    weight = ", ".join(map(str, args.lpl_weight)) if isinstance(args.lpl_weight, list) else args.lpl_weight
    sizes = dict.fromkeys(lpl_config(args, network).batch_size for network in stages)
    dtype = next(each.dtype for each in stages.values())
    say(f"LPL: where {rule}, {100 * share:.1f} % of samples; weight {weight}"
        + (f" (a share of {args.lpl_share:g} of the loss)" if args.lpl_weight == "auto" else "")
        + f"; {config.norm_type} normalization"
        + (f" ({config.deviation_gradient} gradient)" if config.deviation_gradient != "none" else "")
        + f", {config.loss_type}, at most {' and '.join(map(str, sizes))} samples at a time, checkpointing "
        f"{config.checkpointing}, {str(dtype)[6:]}" + (", flipped, shifted and cut alike" * args.lpl_augment)
    )  # fmt: skip
    fractions = feature_fractions(args)
    for network, each in stages.items():
        with torch.device("meta"), torch.no_grad():
            shapes = [features.shape[1:] for features in stage_features(each, torch.zeros(1, *shape))]
        named = zip(each.names, shapes, strict=True)
        part = f" of the {network}" if len(stages) > 1 else ""
        part += f", {fractions[network]:.3g} of the loss" if len(stages) > 1 and args.lpl_weight == "auto" else ""
        say(f"     features{part}: " + ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in named))
    if share < 0.02:
        scaled = " without --lpl_threshold_resolution" if args.lpl_threshold_resolution else ""
        say(f"warning: LPL applies to under 2 % of the samples and will hardly matter; {hint}{scaled} would give 20 %")


# ---------------------------------------------------------------------------------------------------------------------
# The memory


def print_memory(args, accelerator, plan, denoiser, code, encodes):
    """Print the memory of a step on one device, by phases; on a dry run also whether it fits the card that is here.

    A count takes seconds, so an ordinary start reads the count of a dry run or counts nothing.

    Args:
        denoiser: on the meta device, for the count; code: the `RunCode`.
        encodes: whether images are encoded in every step.

    Returns:
        {phase: Peak}; where nothing was counted {"": Peak} of what is always there.
    """
    sharded = is_sharded(accelerator)
    machine = Machine(accelerator.mixed_precision, 1 if sharded else accelerator.num_processes, encodes)

    def shared(peaks):
        if peaks is None or not sharded:
            return peaks
        [model] = denoiser.models().values()
        return {phase: share_of_rank(peak, model, accelerator) for phase, peak in peaks.items()}

    with accelerator.main_process_first():  # the other ranks read its count
        peaks = shared(counted_peaks(args, plan, code, machine, args.dry_run, None if sharded else denoiser))
    if peaks is None:
        accelerator.print("Memory: not counted for these flags yet; --dry_run counts it once, in about ten seconds")
        kinds = kept_bytes(args, denoiser)
        return shared({"": Peak(sum(kinds.values()), "", kinds)})
    accelerator.print("\n".join(memory_lines(peaks)))
    room = card_bytes()
    if room is not None and args.dry_run and accelerator.is_main_process:

        def size_of(changed):
            return highest(shared(counted_peaks(changed, plan, code, machine))).size

        print("\n".join(fit_lines(args, room, size_of)))
    return peaks


def share_of_rank(peak, model, accelerator):
    """A `Peak` without sharding, as it is on a rank that shares the training state."""
    parts = memory_of_rank(list(peak.kinds.items()), model, accelerator.num_processes, zero_stage(accelerator))
    return replace(peak, size=round(sum(size for _, size in parts)), kinds=dict(parts))


def memory_lines(peaks):
    """The lines of the plan on the memory. peaks: {phase: Peak}."""
    top = highest(peaks)
    kinds = ", ".join(f"{kind} {format_bytes(size)}" for kind, size in top.kinds.items() if size)
    phases = ", ".join(f"{phase} {format_bytes(peak.size)}" for phase, peak in peaks.items())
    return [
        f"Memory, computed: {format_bytes(top.size)} of tensors at the peak, in {top.where}",
        f"        then: {kinds}",
        f"        peaks: {phases}",
        f"        CUDA itself and fragmentation need more, about {format_bytes(RESERVE)} (not measured)",
    ]


def arithmetic_line(peaks, images, share):
    """The line of the plan on what the perceptual loss adds to the arithmetic of a step; "" where nothing was counted.

    Args:
        peaks: of `count_step`; images: of a micro-batch; share: of gated samples.
    """
    step, lpl = flop_of_step(peaks)
    if not step:
        return ""
    without, more, times = format_flop(step / images), format_flop(lpl / images), 1 + share * lpl / step
    return f"Arithmetic, computed: {without} an image, {more} more for one with LPL: {times:.2f} times in all"


def format_flop(flop):
    """A number of floating-point operations, such as "19.7 TFLOP"."""
    power = min((len(str(round(flop))) - 1) // 3, 4)
    return f"{flop / 1000**power:.3g} {['', 'k', 'M', 'G', 'T'][power]}FLOP"


def card_bytes():
    """Bytes of memory of the GPU that this process uses; None without one."""
    return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory if torch.cuda.is_available() \
        else None  # fmt: skip


def remedies(args):
    """[(flag, {flag: value})] that lower the memory of these flags, the least costly first."""
    found = []
    if not args.gradient_checkpointing:
        found.append(("--gradient_checkpointing", {"gradient_checkpointing": True}))
    if args.use_lpl and args.lpl_batch_size != 1:
        found.append(("--lpl_batch_size 1", {"lpl_batch_size": 1}))
    if args.train_batch_size > 1:
        more = args.gradient_accumulation_steps * args.train_batch_size
        found.append((f"--train_batch_size 1 --gradient_accumulation_steps {more}",
                      {"train_batch_size": 1, "gradient_accumulation_steps": more}))  # fmt: skip
    if args.use_ema and not args.offload_ema:
        found.append(("--offload_ema", {"offload_ema": True}))
    if not args.use_lora and args.optimizer == "adamw" and not args.use_8bit_adam:
        found.append(("--use_8bit_adam", {"use_8bit_adam": True}))
    if not args.use_lora and args.optimizer == "adamw":
        instead = "--no-use_8bit_adam " if args.use_8bit_adam else ""
        found.append((f"{instead}--optimizer adafactor", {"optimizer": "adafactor", "use_8bit_adam": False}))
    if args.use_lpl and "decoder" in feature_parts(args) and args.lpl_num_blocks > 3:
        found.append(("--lpl_num_blocks 3", {"lpl_num_blocks": 3}))
    if args.use_lora and not args.bnb_quantization_config_path and args.lora_type in ("lora", "dora"):
        found.append(("--bnb_quantization_config_path configs/nf4.json", {"bnb_quantization_config_path": NF4}))
    if not args.use_lora:
        found.append(("--use_lora", {"use_lora": True}))
    return found


def fit_lines(args, room, size_of):
    """Whether the step fits a card, and which flags make it fit.

    Args:
        room: bytes of the card; size_of: function from flags to bytes at the peak.
    """
    room -= RESERVE
    if size_of(args) <= room:
        if args.gradient_checkpointing:
            without = size_of(args.but(gradient_checkpointing=False))
            if without <= room:
                return [f"        fits without --gradient_checkpointing too, with {format_bytes(without)}: faster"]
        return ["        fits this GPU"]
    taken, said = [], f"        does NOT fit this GPU ({format_bytes(room)} free for tensors)"
    for one in remedies(args):
        taken = [before for before in taken if not before[1].keys() & one[1].keys()] + [one]  # one replaces another
        for together in ([one], taken):
            size = size_of(args.but(**{name: value for _, change in together for name, value in change.items()}))
            if size <= room:
                flags = " ".join(flag for flag, _ in together)
                return [f"{said}; with {flags} it takes {format_bytes(size)} and fits"]
    return [f"{said}, nor with {' '.join(flag for flag, _ in taken)}"]
