"""Train a classifier of residual blocks on the VAE latents of labelled images: a network for a perceptual loss.

    accelerate launch train_latent_classifier.py                     # a demonstration in a minute on two CPU cores

    accelerate launch train_latent_classifier.py --train_data_dir my-pictures --validation_split 0.1 --center_crop \\
        --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 --resolution 256 --random_flip \\
        --train_batch_size 128 --num_train_epochs 30 --use_ema --mixed_precision bf16 --output_dir my-classifier

The folders in my-pictures are the classes; --label_column names a column of labels instead. The method, top to bottom:
`fill_caches` encodes the images once, `training_step` augments latents and classifies them, `main` is the loop.
Symbols: z_0 latents as a denoiser sees them, B batch, (B, C, h, w) latents, K classes.
"""

# ruff: noqa: E402  (flags and data are checked before the slow imports)
import functools
import math
from dataclasses import dataclass

from lpl_finetuning.base_model import check_base_model
from lpl_finetuning.data.labels import classes_of, in_words_of_labels
from lpl_finetuning.errors import require
from lpl_finetuning.families import LATENTS
from lpl_finetuning.flag_checks import check_flags, wants
from lpl_finetuning.flags import (
    CLASS_WEIGHTS,
    REPOSITORY,
    FlagParser,
    add_classifier_arguments,
    add_data_arguments,
    add_lpl_arguments,
    add_model_arguments,
    add_run_arguments,
    add_training_arguments,
    encoding_settings,
    is_sorted_by_folders,
    settings_from_flags,
)
from lpl_finetuning.results.hub import check_publishing
from lpl_finetuning.start import early, find_training_images, run_main
from lpl_finetuning.training.checkpoint_folders import check_resume

EMBEDDED_DEFAULT = REPOSITORY / "examples" / "tiny-classifier" / "train.yaml"
WITHDRAWN = (  # shared flags about captions, denoisers, LoRAs and sampling
    "single_file", "output_name", "metadata_title", "metadata_trigger_phrase", "save_tag_frequency",
    "checkpoints_kohya_format", "use_lora", "rank", "lora_alpha", "lora_dropout", "lora_layers", "use_dora",
    "lora_blocks", "lora_pattern", "lora_type", "lokr_factor",
    "train_text_encoder", "init_lora", "bnb_quantization_config_path", "output_kohya_format", "merge_into",
    "instance_data_dir",
    "instance_prompt", "caption_column", "caption_from_folder", "caption_per_line", "trigger_word", "shuffle_tags",
    "keep_tags", "tag_shuffles", "proportion_empty_prompts", "gradient_checkpointing", "text_encoder_lr",
    "enable_xformers_memory_efficient_attention", "noise_offset", "timestep_sampling", "validation_prompt",
    "validation_prompts_file", "num_validation_images", "validation_compare", "validation_metrics",
    "validation_kid_every", "validation_kid_samples",
)  # fmt: skip


def build_parser():
    """All flags of the recipe."""
    parser = FlagParser(__doc__)
    add_model_arguments(parser)
    add_data_arguments(parser, resolution=256)
    add_training_arguments(parser, train_batch_size=64, num_train_epochs=30, adam_weight_decay=1e-2)
    parser.set_defaults(output_dir="latent-classifier", learning_rate=1e-3, ema_decay=0.999)
    add_classifier_arguments(parser)
    add_lpl_arguments(parser)
    loss = [name for name in parser.flags() if name.startswith("lpl_")]
    add_run_arguments(parser, validation_epochs=1)
    parser.withdraw(*WITHDRAWN, "use_lpl", *loss)
    return parser


def parse_args(argv=None):
    """The flags of a run, checked; UserError names the flag that is wrong."""
    args = build_parser().parse(argv, embedded_default=EMBEDDED_DEFAULT)
    check_flags(args, LATENTS)
    require(all(width > 0 and width % 8 == 0 for width in args.block_widths),
            f"--block_widths is {' '.join(map(str, args.block_widths))}; each must be a multiple of 8")  # fmt: skip
    ranges = {"blocks_per_stage": (1, math.inf), "latent_pad": (0, math.inf), "dropout": (0, 0.99),
              "label_smoothing": (0, 0.99), "random_erasing": (0, 1), "erasing_area": (0, 1)}  # fmt: skip
    for name, (low, high) in ranges.items():
        value = getattr(args, name)
        limits = f"{low} or more" if high == math.inf else f"at least {low} and at most {high}"
        require(value is None or low <= value <= high, f"--{name} is {value}; it must be {limits}")
    require(not wants("FSDP") and not wants("DEEPSPEED"), "accelerate is configured to shard the model, for which a "
            "latent classifier is too small: use configs/ddp.yaml")  # fmt: skip
    check_publishing(args)
    args = args.but(base_model=check_base_model(args, LATENTS))
    check_resume(args)
    return args


def find_labelled_images(args):
    """(scan, held-out images) of a run; DataError where the labels can't be learnt."""
    with in_words_of_labels():
        scan, held_out = find_training_images(args)
    find_classes(args, scan, held_out)
    return scan, held_out


def find_classes(args, scan, held_out):
    """The `Classes` of a run."""
    data = f"--train_data_dir {args.train_data_dir}" if args.train_data_dir else f"--dataset_name {args.dataset_name}"
    beside = args.label_column and scan.source.startswith("caption files")
    require(not beside, f"--label_column {args.label_column}: {data} has no listing with columns; add metadata.csv, "
            "or leave the flag out and sort the images into folders")  # fmt: skip
    more = f" --max_train_samples {args.max_train_samples}" if args.max_train_samples else ""
    split = f" --validation_split {args.validation_split:g}" if args.validation_split else ""
    column = "" if is_sorted_by_folders(args) else f" --label_column {args.label_column or 'label'}"
    return classes_of(scan, held_out, f"{data}{column}{split}{more}")


RUN = early(__name__, parse_args, find_labelled_images)

import dataclasses
from pathlib import Path

import torch
from torch.nn import functional

from lpl_finetuning.base_model import read_object
from lpl_finetuning.data import encoding
from lpl_finetuning.data.encoding import encode_images, rows_of
from lpl_finetuning.data.labels import Classes
from lpl_finetuning.data.samples import addressed_rng
from lpl_finetuning.files import format_bytes
from lpl_finetuning.networks.encoder_sketch import encoder_sketch
from lpl_finetuning.networks.latent_classifier import LatentClassifier
from lpl_finetuning.results.classifier_card import save_classifier, write_classifier_card
from lpl_finetuning.results.hub import check_access, publish_result
from lpl_finetuning.results.hub import hub_name as name_on_the_hub
from lpl_finetuning.tensor_files import save_dtype
from lpl_finetuning.training.augmentation import erase, shift
from lpl_finetuning.training.checkpoints import Checkpoints
from lpl_finetuning.training.classification import ClassifierValidation, classifier_subject
from lpl_finetuning.training.guard import Guard
from lpl_finetuning.training.live_memory import Peak
from lpl_finetuning.training.models import latent_channels, latent_space, load_vae, load_weights, save_weights
from lpl_finetuning.training.objective import sample_latents, with_posterior_noise
from lpl_finetuning.training.optimization import Trainee, optimizer_settings
from lpl_finetuning.training.out_of_memory import explained_if_out_of_memory
from lpl_finetuning.training.plan import check_data, plan_run, print_models, print_run
from lpl_finetuning.training.reporter import Reporter
from lpl_finetuning.training.run import check_start, end, open_batches, open_output_dir, start_accelerator
from lpl_finetuning.training.sharding import with_full_weights
from lpl_finetuning.training.signals import StopSignals
from lpl_finetuning.training.step_memory import kept_bytes
from lpl_finetuning.training.transfer import to_device
from lpl_utils import LatentSpace

# ---------------------------------------------------------------------------------------------------------------------
# The network


class Learner(torch.nn.Module):
    """The classifier, as what is trained: `models` names it for checkpoints."""

    def __init__(self, classifier):
        super().__init__()
        self.classifier = classifier

    def models(self):
        """{name in a checkpoint: model}"""
        return dict(self.named_children())

    def forward(self, latents):
        """Logits (B, K) of latents (B, C, h, w)."""
        return self.classifier(latents)


def build_learner(args, classes, device):
    """The classifier to train, float32; on the meta device without weights, for counting."""
    base, space = args.base_model, latent_space(args.base_model)
    name = base.vae or base.name
    torch.manual_seed(args.seed)  # the initial weights
    with torch.device("meta" if device == "meta" else "cpu"):
        classifier = LatentClassifier(
            classes=classes.names,
            latent_channels=latent_channels(base),
            block_widths=tuple(args.block_widths),
            blocks_per_stage=args.blocks_per_stage,
            dropout=args.dropout,
            scaling_factor=space.scaling_factor,
            shift_factor=space.shift_factor,
            pixels_per_latent=base.family.pixels_per_latent,
            resolution=args.resolution,
            vae=name_on_the_hub(name) or Path(name).resolve().name,
            vae_fingerprint=base.weights,
            vae_encoder_sketch=encoder_sketch(base),
        )
    learner = Learner(classifier).train()
    if device == "meta":
        return learner
    if args.torch_compile:
        classifier.compile()
    return learner.to(device)


def check_same_network(args, folder, classes):
    """Refuse to resume from a checkpoint whose classifier has other classes or other latents."""
    if folder is None:
        return
    before = read_object(folder / "classifier" / "config.json")
    now = dict(build_learner(args, classes, "meta").classifier.config)
    names = ("classes", "latent_channels", "scaling_factor", "shift_factor", "vae_fingerprint")
    other = [name for name in names if before.get(name) != (list(now[name]) if name == "classes" else now[name])]
    require(not other, f"--resume_from_checkpoint {args.resume_from_checkpoint}: the classifier in {folder} has other "
            f"{', '.join(other)} than this run; give its data and autoencoder, or start without the flag")  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Encoding, once, into caches on disk


def fill_caches(args, classes, images, held_out, accelerator):
    """The `RunData` of a run, with everything in its stores that was missing; the latents serve every script.

    A label is stored where a prompt would be: {"label": number of the class}.
    """
    numbers = {name: number for number, name in enumerate(classes.names)}
    vae = functools.cache(lambda: load_vae(args.base_model, torch.float32, accelerator.device))

    def encode_labels(labels):
        return rows_of({"label": torch.tensor([numbers.get(label, -1) for label in labels])})  # -1: no label

    return encoding.fill_caches(
        encoding_settings(args), images, held_out, accelerator, {"kind": "labels", "classes": classes.names}, 8,
        latent_channels(args.base_model), encode_labels, lambda cuts: encode_images(cuts, vae()),
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# The training step


@dataclass(frozen=True)
class StepSettings:
    """The flags about a training step; each field has the name of its flag."""

    seed: int
    label_smoothing: float
    latent_pad: int | None
    random_erasing: float
    erasing_area: float


@dataclass(frozen=True)
class Objective:
    """What a training step needs besides the network and the batch."""

    settings: StepSettings
    device: torch.device
    dtype: torch.dtype  # that the network computes in
    samples_per_step: int  # of an optimizer step, over micro-steps and ranks
    space: LatentSpace  # of the autoencoder's latents
    pixels: int  # of an image on a side of one latent
    classes: Classes
    class_weights: torch.Tensor  # (K,) on the device; their mean over the images is 1
    guard: Guard
    encoder: object = None  # the autoencoder, where images are encoded in every step
    perceptual: None = None  # a classifier is trained without the perceptual loss


def build_objective(args, accelerator, plan, classes, data):
    """The `Objective` of a run."""
    return Objective(
        settings=settings_from_flags(StepSettings, args),
        device=accelerator.device,
        dtype=plan.dtype,
        samples_per_step=plan.batch_size,
        space=latent_space(args.base_model),
        pixels=args.base_model.family.pixels_per_latent,
        classes=classes,
        class_weights=torch.tensor(classes.weights(CLASS_WEIGHTS[args.class_weights]), device=accelerator.device),
        guard=Guard(accelerator, args.max_nonfinite_steps, lambda index: data.images[index].name),
        encoder=None if data.cached else load_vae(args.base_model, torch.float32, accelerator.device),
    )


def augmented_latents(batch, objective):
    """z_0 (B, C, h, w): a sample of the encoder's distribution, shifted, in part erased.

    A sample instead of the mean: the loss will compare features of such samples, and it augments for free.
    """
    numbers, settings = batch["number"], objective.settings
    latents = shift(sample_latents(batch, objective), numbers, settings.latent_pad, settings.seed)
    return erase(latents, numbers, settings.random_erasing, settings.erasing_area, settings.seed)


def seed_dropout(numbers, objective):
    """Seed torch's generator from the micro-step's first sample, so that a resumed run repeats the dropout."""
    rng = addressed_rng(objective.settings.seed, int(numbers[0]), "classifier_dropout")
    torch.manual_seed(int(rng.integers(2**32)))


def training_step(batch, learner, objective, metrics):
    """One micro-step: the loss, a scalar with gradient.

    loss = (1 / B) * sum over samples of w_class * cross entropy with the smoothed label
    """
    latents = augmented_latents(batch, objective)
    labels = to_device(batch["label"], objective.device)
    seed_dropout(batch["number"], objective)
    logits = learner(latents).float()
    errors = functional.cross_entropy(
        logits, labels, reduction="none", label_smoothing=objective.settings.label_smoothing
    )
    objective.guard.watch("classification loss", errors, batch["index"])
    loss = (objective.class_weights[labels] * errors).mean()
    metrics.add("train_loss", loss)
    metrics.add("train_accuracy", (logits.argmax(dim=1) == labels).sum(), len(labels))
    return loss


def held_out_step(batch, learner, objective):
    """(logits (B, K), labels (B,), cross entropies (B,)) of held-out images, by the mean of the encoder."""
    latents = objective.space.to_model(to_device(batch["mean"].float(), objective.device))
    labels = to_device(batch["label"], objective.device)
    logits = learner(latents).float()
    return logits, labels, functional.cross_entropy(logits, labels, reduction="none")


# ---------------------------------------------------------------------------------------------------------------------
# The run


def print_plan(args, report, accelerator, plan, classes):
    """Print what will happen: flags, data, steps, network, memory; returns what is always in memory, {"": Peak}."""
    print_run(args, report, accelerator, plan, f"accuracies of {sum(classes.held_out)} held-out images")
    learner = build_learner(args, classes, "meta")
    how = f"{len(classes)} classes, class weights {args.class_weights}, {str(plan.dtype)[6:]}"
    print_models(args, learner.models(), how, accelerator.print)
    kinds = kept_bytes(args, learner)
    listed = ", ".join(f"{kind} {format_bytes(size)}" for kind, size in kinds.items() if size)
    accelerator.print(f"Memory: {listed}; a step's activations and the autoencoder are not counted\n")
    return {"": Peak(sum(kinds.values()), "", kinds)}


def main(args, scan, held_out=()):
    """The run, from the plan to the published network."""
    accelerator = start_accelerator(args)
    classes = find_classes(args, scan, held_out)
    plan = plan_run(args, accelerator, None, len(scan.images))
    check_same_network(args, plan.resume_from, classes)
    scan = dataclasses.replace(scan, warnings=scan.warnings + classes.remarks())
    report = check_data(args, scan, held_out, [], accelerator)
    report["classes"] = dict(zip(classes.names, classes.training, strict=True))
    peaks = print_plan(args, report, accelerator, plan, classes)
    if args.dry_run:
        return check_start(args, accelerator, check_access)
    output_dir = open_output_dir(args, accelerator, plan.resume_from, report, check_access)
    explained = explained_if_out_of_memory(args, accelerator, peaks)
    with output_dir as hub_name, explained, StopSignals(accelerator) as signals:
        is_done = train(args, scan.images, held_out, classes, plan, accelerator, signals, hub_name)
    end(accelerator)
    if is_done and hub_name:
        publish_result(args, hub_name, stopped=signals.requested is not None)


def train(args, images, held_out, classes, plan, accelerator, signals, hub_name):
    """Everything that needs the weights, up to the result on disk; returns whether it came to its end."""
    data = fill_caches(args, classes, images, held_out, accelerator)
    objective = build_objective(args, accelerator, plan, classes, data)
    learner = build_learner(args, classes, accelerator.device)
    settings = optimizer_settings(args, plan.batch_size)
    trainee = Trainee(settings, accelerator, learner, plan.total_steps, objective.guard)
    checkpoints = Checkpoints(
        args, accelerator, trainee, objective, signals,
        save_weights=lambda folder, learner: save_weights(folder, learner, None, use_lora=False),
        load_weights=lambda folder, learner: load_weights(folder, learner, use_lora=False),
    )  # fmt: skip
    reporter = Reporter(args, accelerator, classifier_subject(), plan.first_step, plan.total_steps)
    validation = ClassifierValidation(args, accelerator, trainee, objective, data, reporter, signals, held_out_step)
    done = checkpoints.resume(plan.resume_from, plan.total_steps)
    if done == 0:
        validation.run(0)
    steps = done, plan.total_steps
    with open_batches(args, data, accelerator, objective, *steps, with_posterior_noise) as micro_batches:
        for step in reporter.steps():
            signals.step_began()
            for batch in trainee.micro_steps(micro_batches):
                trainee.backward(training_step(batch, trainee.denoiser, objective, reporter.metrics))
            done, wishes = step + 1, (signals.requested is not None, checkpoints.late())
            outcome = trainee.step(done, wishes, reporter.metrics)
            reporter.step(done, outcome, plan.batch_size, trainee.log_values())
            if outcome.stop:
                signals.stop_watchdog()
            if checkpoints.due(done, outcome, plan.total_steps):
                checkpoints.save(done)
            if outcome.stop and done < plan.total_steps:
                break
            if validation.due(done) and done < plan.total_steps:
                validation.run(done)
    signals.loop_ended()
    trainee.release()
    if done < plan.total_steps:
        reporter.stopped(done)
        return False
    if checkpoints.writes_here:
        with checkpoints.kept_if_unwritten(done), trainee.averaged():
            network = with_full_weights(learner, accelerator.is_main_process).classifier
            save_classifier(args.output_dir, network, save_dtype(args))
    validation.run(done)
    if accelerator.is_main_process:
        write_classifier_card(args, learner.classifier.config, classes, done, plan.batch_size, validation.values,
                              validation.confusion, hub_name)  # fmt: skip
    reporter.finish()
    accelerator.print(validation.summary())
    return True


run_main(main, RUN)
