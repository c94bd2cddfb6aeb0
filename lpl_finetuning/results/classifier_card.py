"""The result of a latent classifier's training: the network's files and its model card."""

from pathlib import Path

from lpl_finetuning.files import follow_umask
from lpl_finetuning.results.hub import base_licence, hub_name, table
from lpl_finetuning.training.classification import TOP
from lpl_finetuning.training.models import in_dtype

CONFUSION = "image_0.png"  # the name under which the reporter writes the last confusion matrix
MOST_ROWS = 100  # classes that the card lists


def save_classifier(folder, network, dtype):
    """Write a network's config.json and weights, in a dtype, as diffusers does."""
    in_dtype(network, dtype).save_pretrained(folder)
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        follow_umask(Path(folder) / name)


def write_classifier_card(args, config, classes, steps, images_per_step, measures, confusion, name=None):
    """Write README.md into --output_dir: what the network is for, how good it is, and how it was trained.

    Args:
        config: the network's configuration; classes: the `Classes`.
        steps: optimizer steps that the weights have seen; images_per_step: over all ranks.
        measures: {log key: number} of the last validation; {} without held-out images.
        confusion: int (K, K) of that validation, or None.
        name: owner/name on the Hub.
    """
    from huggingface_hub import ModelCard, ModelCardData

    folder, base = Path(args.output_dir), args.base_model
    licence = base_licence(base.name, base.revision)
    if not licence:
        print(f"note: found no licence in the base model's card; you may want to add one to {folder / 'README.md'}")
    data = ModelCardData(base_model=hub_name(base.name), datasets=[args.dataset_name] if hub_name(args.dataset_name)
                         else None, **licence, library_name="diffusers", tags=[base.family.tag, "lpl"])  # fmt: skip
    title = (name or args.hub_model_id or folder.resolve().name).split("/")[-1]
    picture = f"![Confusion matrix of the held-out images]({CONFUSION})" if (folder / CONFUSION).is_file() else ""
    parts = [
        f"# {title}",
        description(config, classes),
        f"## Latents\n\n{table(latent_facts(args, config))}\n\nUse it on no other latents: features of another "
        "autoencoder, scaling or number of channels mean nothing to it.",
        f"## Use\n\n```python\n{SNIPPET.format(name=name or 'path/to/this/folder')}\n```",
        f"## Held-out images\n\n{accuracy_table(classes, measures)}\n\n{picture}".rstrip() if measures else "",
        f"## Classes\n\n{class_table(classes, confusion)}",
        f"## Training\n\n{table(training_facts(args, steps, images_per_step, sum(classes.training)))}",
    ]
    text = "\n\n".join(part for part in parts if part)
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n").save(folder / "README.md")


SNIPPET = """\
from lpl_finetuning.networks.latent_classifier import load_latent_classifier
from lpl_utils import stage_features

network = load_latent_classifier("{name}")
logits = network(latents)  # (B, 4, h, w) in model space: (z - shift_factor) * scaling_factor
features = dict(zip(network.names, stage_features(network, latents)))  # "block 1", …, "pooled"\
"""


def description(config, classes):
    """What the network is, in two sentences."""
    blocks = config.blocks_per_stage * len(config.block_widths)
    return (f"A classifier of {len(classes)} classes that works on a VAE's latents: {blocks} residual blocks with "
            "dropout, an average over positions and a linear layer. Its features serve as a perceptual loss on "
            "latents: cut off the linear layer, and compare the average or the residual stages.")  # fmt: skip


def latent_facts(args, config):
    """{what: value} of the latents that the network takes. A path is never shown."""
    return {
        "VAE": config.vae,
        "fingerprint of its weights": config.vae_fingerprint,
        "scaling factor": config.scaling_factor,
        "shift factor": config.shift_factor,
        "channels": config.latent_channels,
        "pixels per latent": config.pixels_per_latent,
        "resolution (px)": args.aspect_ratio_buckets or args.resolution,
        "latents in training": "samples of the encoder's distribution",
        "latents in validation": "its mean",
    }


def accuracy_table(classes, measures):
    """A Markdown table of the accuracies on held-out images, beside those of naming the most frequent class."""
    rows = [("accuracy", "validation/accuracy", classes.majority),
            ("balanced accuracy (mean over classes)", "validation/balanced_accuracy",
             1 / sum(count > 0 for count in classes.held_out)),
            (f"label among the first {TOP}", "validation/top5_accuracy", None)]  # fmt: skip
    lines = ["| | classifier | most frequent class always |", "|---|---:|---:|"]
    for label, key, trivial in rows:
        if key in measures:
            beside = "" if trivial is None else f"{100 * trivial:.1f} %"
            lines.append(f"| {label} | {100 * measures[key]:.1f} % | {beside} |")
    return "\n".join([*lines, "", f"{sum(classes.held_out)} held-out images."])


def class_table(classes, confusion):
    """A Markdown table of the classes: images to train on, held-out images, and those found."""
    lines = ["| class | training | held out | found |", "|---|---:|---:|---:|"]
    for number, name in enumerate(classes.names[:MOST_ROWS]):
        found = confusion[number, number] if confusion is not None and len(confusion) else ""
        text = " ".join(name.replace("|", "\\|").split())
        lines.append(f"| {text} | {classes.training[number]} | {classes.held_out[number]} | {found} |")
    more = len(classes) - MOST_ROWS
    return "\n".join([*lines, f"\nand {more} more classes"] if more > 0 else lines)


def training_facts(args, steps, images_per_step, images):
    """{what: value} of the training."""
    return {
        "data": hub_name(args.dataset_name) or "a private collection",
        "images": images,
        "steps": steps,
        "images per step": images_per_step,
        "learning rate": args.learning_rate * (images_per_step if args.scale_lr else 1),
        "schedule": args.lr_scheduler,
        "optimizer": "8-bit AdamW" if args.use_8bit_adam else args.optimizer,
        "weight decay": args.adam_weight_decay,
        "precision": {"no": "float32", None: None}.get(args.mixed_precision, args.mixed_precision),
        "saved in": args.save_dtype or "float32",
        "EMA": args.ema_decay if args.use_ema else False,
        "dropout": args.dropout,
        "label smoothing": args.label_smoothing,
        "weight of a class of n images": {"none": "1", "sqrt": "1 / sqrt(n)", "balanced": "1 / n"}[args.class_weights],
        "latents padded and cut back by": "a sixteenth of their size" if args.latent_pad is None else args.latent_pad,
        "samples with an erased rectangle": args.random_erasing,
        "mirrored": args.random_flip,
        "seed": args.seed,
    }
