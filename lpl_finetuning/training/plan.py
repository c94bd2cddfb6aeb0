"""The plan of a run, printed before any weights load: data, steps, models, the loss, an estimate of the memory."""

import contextlib
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch

from lpl_finetuning.base_model import read_json
from lpl_finetuning.data.encoding import in_chunks
from lpl_finetuning.data.report import build_report, refuse_remarks, report_lines
from lpl_finetuning.errors import require
from lpl_finetuning.files import cache_folder, digest, format_bytes, write_whole
from lpl_finetuning.flags import caption_rules, framing_rules, print_configuration
from lpl_finetuning.lora_files import file_for_others
from lpl_finetuning.sample_prompts import entries_of, plan_lines
from lpl_finetuning.training.checkpoint_folders import changes_since, read_manifest
from lpl_finetuning.training.checkpoints import checkpoint_to_resume
from lpl_finetuning.training.estimates import ShapesOfNorms, described, described_parts, remembered
from lpl_finetuning.training.models import lora_config
from lpl_finetuning.training.objective import lpl_config
from lpl_finetuning.training.sharding import is_sharded, memory_of_rank, zero_stage
from lpl_finetuning.training.validation import HELD_OUT_LEVELS
from lpl_utils import LatentPerceptualLoss


@dataclass(frozen=True)
class Plan:
    """What is settled about a run before any weights load."""

    schedule: object  # noise levels, timesteps and targets: the script's `Schedule`
    dtype: torch.dtype  # that the denoiser computes in
    batch_size: int  # images of an optimizer step, over all ranks
    total_steps: int  # optimizer steps
    resume_from: Path | None  # the checkpoint that the run resumes from
    first_step: int  # optimizer steps that the checkpoint has made


def plan_run(args, accelerator, schedule, images):
    """The `Plan` of a run on so many images; UserError where --resume_from_checkpoint can't be followed."""
    resume_from = checkpoint_to_resume(args, accelerator)
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
    batch_size = args.train_batch_size * accelerator.num_processes * args.gradient_accumulation_steps
    total_steps = args.max_train_steps or -(-args.num_train_epochs * images // batch_size)
    first_step = read_manifest(resume_from)["step"] if resume_from is not None else 0
    return Plan(schedule, dtype, batch_size, total_steps, resume_from, first_step)


def latent_size(args):
    """(h, w) of the latents of the largest bucket."""
    pixels = args.base_model.family.pixels_per_latent
    return tuple(side // pixels for side in framing_rules(args).largest_size())


class MeteredStages:
    """A network's `FeatureStages` that tell how much a meter rises from one stage to the next, and their shapes.

    The walk may enter a stage several times: for the target, for the estimate and again in the backward pass.
    """

    def __init__(self, stages, meter):
        self.stages, self.meter = stages, meter
        self.bytes, self.current, self.before = [0] * len(stages), 0, 0
        self.shapes = [None] * len(stages)

    def __len__(self):
        return len(self.stages)

    def __getattr__(self, name):
        return getattr(self.stages, name)

    def run(self, index, x):
        """See `FeatureStages.run`."""
        self.note(index)
        features = self.stages.run(index, x)
        self.shapes[index] = list(features.shape[1:])
        return features

    def note(self, following=0):
        """Count what was kept since the last call for the stage that ran, and go on with the following one."""
        self.bytes[self.current] += self.meter.total - self.before
        self.current, self.before = following, self.meter.total


def lpl_estimate(args, stages, shape):
    """(bytes that the loss keeps for its backward pass, {stage's name: [C, H, W]} of the features that it compares).

    The bytes are those of all stages, or of the largest with checkpointing.

    Args:
        stages: `FeatureStages` on the meta device; shape: (C, h, w) of the latents.
    """
    config = lpl_config(args)
    batch = min(args.train_batch_size, config.batch_size)

    def measure():
        with torch.device("meta"), ShapesOfNorms(), SavedBytes() as kept:
            metered = MeteredStages(stages, kept)
            pair = torch.randn(2, batch, *shape)
            LatentPerceptualLoss(metered, config)(pair[0].requires_grad_(), pair[1])
        metered.note()
        return metered.bytes, metered.shapes

    sizes, shapes = remembered(args.cache_dir, [type(stages), lpl_estimate], measure, kept="LPL", batch=batch,
                               config=str(config), stages=described_parts(stages), latents=shape)  # fmt: skip
    total = max(sizes) if config.checkpointing == "stage" else sum(sizes)
    return total, dict(zip(stages.names, shapes, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Estimates before training


class SavedBytes:
    """Context manager that counts the bytes autograd keeps for the backward pass; free of cost on meta tensors.

    Leaves (parameters, inputs) are not counted: they are in memory anyway.
    """

    def __enter__(self):
        self.storages = {}
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *exception):
        self.hooks.__exit__(*exception)

    def _pack(self, tensor):
        if not (tensor.is_leaf and tensor.requires_grad):
            storage = tensor.untyped_storage()
            self.storages[storage._cdata] = (
                storage,
                storage.nbytes(),
            )  # the storage itself: its id must not be reused
        return tensor

    @property
    def total(self):
        """Bytes."""
        return sum(size for _, size in self.storages.values())


def parameter_bytes(parameters):
    """Bytes of a collection of parameters."""
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)


def weight_bytes(args, models):
    """Bytes of all weights; a quantized denoiser has its frozen linear layers in 4 or 8 bits."""
    total = sum(parameter_bytes(model.parameters()) for model in models.values())
    if not args.bnb_quantization_config_path:
        return total
    share = 0.5 if read_json(args.bnb_quantization_config_path).get("load_in_4bit") else 1
    denoiser = next(iter(models.values()))
    linear = [module.weight for module in denoiser.modules() if isinstance(module, torch.nn.Linear)]
    frozen = [weight for weight in linear if not weight.requires_grad]
    return int(total - sum(weight.numel() * (weight.element_size() - share) for weight in frozen))


def optimizer_state_bytes(args, weights, count):
    """Estimated bytes of the optimizer's state for `count` parameters of `weights` bytes."""
    if args.use_8bit_adam:
        return 2 * count
    return {"adamw": 2 * weights, "prodigy": 4 * weights, "adafactor": 0}[args.optimizer]


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
    """A LoRA's configuration in a few words."""
    return f"{'DoRA' if config.use_dora else 'LoRA'} of rank {config.r}, alpha {config.lora_alpha:g}"


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


def check_data(args, scan, held_out, tokenizers, accelerator):
    """The report on the data, with the captions that the tokenizers truncate; DataError under --strict if remarked."""
    report = build_report(scan, held_out, framing_rules(args), args.train_batch_size)
    rules = caption_rules(args)

    def captions():
        return (rules.text(caption) for image in scan.images for caption in image.captions)

    with accelerator.main_process_first():
        counts = truncated_captions(tokenizers, captions, cache_folder(args.cache_dir) / "scans")
    report["truncated"] = counts
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


def print_plan(args, report, accelerator, plan, denoiser, network, stages, gate, example_inputs):
    """Print what will happen: flags, data, steps, validation, models, the loss, memory; returns the `memory_estimate`.

    Args:
        report: on the data, from `check_data`; plan: the `Plan`.
        denoiser: on the meta device; its dtype changes.
        network: the module that the stages run; stages: the `FeatureStages` that the loss compares; on the meta
            device.
        gate: the `LPLGate`.
        example_inputs: function (denoiser, args, (h, w), dtype) -> arguments of the denoiser for one batch.

    Raises:
        UserError: this machine can't do what the flags ask for.
    """
    check_machine(args)
    print_run(args, report, accelerator, plan)
    print_models(args, denoiser.models(), f"{plan.schedule.describe()}, {str(plan.dtype)[6:]}", accelerator.print)
    if args.use_lpl:
        share = plan.schedule.gated_share(gate)
        hint = plan.schedule.threshold_for(0.2, by_timestep=gate.t_threshold is not None)
        shape = latent_shape(denoiser, args, example_inputs)
        print_lpl_plan(args, gate, share, hint, stages, shape, accelerator.print)
    parts = memory_estimate(args, denoiser, network, stages, plan.dtype, example_inputs)
    print_memory(parts, denoiser, accelerator)
    return parts


def print_run(args, report, accelerator, plan):
    """Print the flags, the data, the steps and the validation of a run. report: on the data, from `check_data`."""
    say, total_steps = accelerator.print, plan.total_steps
    batch = args.train_batch_size * accelerator.num_processes * args.gradient_accumulation_steps
    images, held_out = report["images"], report["held_out"]
    print_configuration(args, say)
    say("\n" + "\n".join(report_lines(report)) + "\n")
    for warning in warnings_about(args, total_steps, plan.first_step):
        say(f"warning: {warning}")
    if plan.resume_from is not None and (changes := changes_since(args, plan.resume_from, images)):
        say(f"Goes on from {plan.resume_from}; since then changed: {'; '.join(changes)}")
    say(f"Steps: {total_steps} of {batch} images ({args.train_batch_size} per device x {accelerator.num_processes} "
        f"x {args.gradient_accumulation_steps} accumulated); {images / batch:.1f} steps an epoch, "
        f"{total_steps * batch / images:.1f} epochs")  # fmt: skip
    if file_for_others(args):
        say(describe_result(args))
    what = []
    if entries := entries_of(args):
        what.append(f"{len(entries)} x {args.num_validation_images} images")
    if held_out:
        what.append(f"the loss of {held_out} held-out images at {HELD_OUT_LEVELS} noise levels")
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
    say(f"          {how}, {args.optimizer}")


def print_lpl_plan(args, gate, share, hint, stages, shape, say):
    """Print the gate, weight and stages of the loss. share: of gated samples; hint: the flag that would gate 20 %."""
    config = lpl_config(args)
    rule = f"t < {gate.limit:g}" if gate.t_threshold is not None else f"sigma / alpha <= {gate.limit:g}"
    say(f"LPL: where {rule}, {100 * share:.1f} % of samples; weight {args.lpl_weight}"
        + (f" (a share of {args.lpl_share:g} of the loss)" if args.lpl_weight == "auto" else "")
        + f"; {config.norm_type} normalization"
        + (f" ({config.norm_gradient} gradient)" if config.norm_gradient != "none" else "")
        + f", {config.loss_type}, at most {config.batch_size} samples at a time, checkpointing "
        f"{config.checkpointing}, {str(stages.dtype)[6:]}")  # fmt: skip
    _, shapes = lpl_estimate(args, stages, shape)
    say("     features: " + ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in shapes.items()))
    if share < 0.02:
        scaled = " without --lpl_threshold_resolution" if args.lpl_threshold_resolution else ""
        say(f"warning: LPL applies to under 2 % of the samples and will hardly matter; {hint}{scaled} would give 20 %")


def print_memory(parts, denoiser, accelerator):
    """Print the memory estimate for one GPU. parts: [(what, bytes)]."""
    say = accelerator.print
    if is_sharded(accelerator):
        [model] = denoiser.models().values()
        parts = memory_of_rank(parts, model, accelerator.num_processes, zero_stage(accelerator))
    listed = ", ".join(f"{what} {format_bytes(size)}" for what, size in parts if size)
    say(f"Memory, estimated: {format_bytes(sum(size for _, size in parts))}: {listed}\n")


def saved_by_forward(denoiser, args, dtype, example_inputs):
    """Bytes that autograd keeps of a forward pass of the `Denoiser` on the meta device.

    Args:
        dtype: what autocast would run in; the weights are cast, since the meta device has no autocast.
    """
    denoiser.to(dtype)
    with torch.device("meta"):
        inputs = example_inputs(denoiser, args, latent_size(args), dtype)

    def measure():
        with torch.device("meta"), ShapesOfNorms(), SavedBytes() as activations:
            denoiser(*inputs)
        return activations.total

    code = saved_by_forward, type(denoiser), example_inputs
    return remembered(args.cache_dir, code, measure, kept="denoiser", model=described(denoiser),
                      inputs=described(inputs))  # fmt: skip


def latent_shape(denoiser, args, example_inputs):
    """(C, h, w) of the latents of the largest bucket: the first of the denoiser's inputs."""
    with torch.device("meta"):
        return tuple(example_inputs(denoiser, args, latent_size(args), torch.float32)[0].shape[1:])


def memory_estimate(args, denoiser, network, stages, dtype, example_inputs):
    """[(what, bytes)] that training needs on one device, every sample taken as gated; from shapes, nothing is run.

    Args:
        denoiser, network, stages, example_inputs: see `print_plan`.
        dtype: that the denoiser computes in.
    """
    shape = latent_shape(denoiser, args, example_inputs)
    weights = weight_bytes(args, denoiser.models())
    trained = [parameter for parameter in denoiser.parameters() if parameter.requires_grad]
    size, count = parameter_bytes(trained), sum(parameter.numel() for parameter in trained)
    parts = [
        ("weights", weights),
        ("gradients", size),
        ("optimizer state", optimizer_state_bytes(args, size, count)),
        ("EMA", size if args.use_ema and not args.offload_ema else 0),
        ("activations", saved_by_forward(denoiser, args, dtype, example_inputs)),
    ]
    if args.use_lpl:
        decoder = 0 if args.lpl_features == "latent" else parameter_bytes(network.parameters())
        parts += [("decoder", decoder), ("LPL", lpl_estimate(args, stages, shape)[0])]
    return parts
