"""Which layers get an adapter, and with which rank, alpha and learning rate: --lora_layers, --lora_blocks and
--lora_pattern. Nothing here imports torch.

A layer has the name of its module, such as `down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_q`; a pattern is
searched in `part.module`, such as `unet.down_blocks.1…`.
"""

import argparse
import re
from dataclasses import dataclass

from lpl_finetuning.base_model import lora_layers, require_layers, tensors_of, weights_here
from lpl_finetuning.errors import counted, first_names, near_name, require
from lpl_finetuning.lora_files import check_init_lora

TEXT_ENCODER_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")  # layers of text encoders that get an adapter
SETTINGS = {"rank": int, "alpha": float, "lr": float}  # what a pattern sets


@dataclass(frozen=True)
class LayerPattern:
    """A value of --lora_pattern: settings of the layers whose names a regular expression is found in.

    Attributes:
        text: the value as it was given.
        regex: the regular expression.
        rank: 0 leaves the layers out; None: --rank.
        alpha: None: the strength alpha / rank of all other layers.
        lr: learning rate; None: --learning_rate or --text_encoder_lr.
    """

    text: str
    regex: str
    rank: int | None = None
    alpha: float | None = None
    lr: float | None = None

    def matches(self, part, module):
        """Whether the pattern means a module of a part, such as "unet"."""
        return re.search(self.regex, f"{part}.{module}") is not None


def layer_pattern(text):
    """The `LayerPattern` of a value of --lora_pattern; argparse's error for one that can't be read."""
    regex, equals, settings = text.rpartition("=")
    if not equals or not regex.strip() or not settings.strip():
        raise argparse.ArgumentTypeError("expected PATTERN=rank:8,lr:5e-5 with rank, alpha or lr")
    try:
        re.compile(regex)
    except re.error as error:
        hint = "; any text is written .*, not *" if regex.startswith("*") or "**" in regex else ""
        raise argparse.ArgumentTypeError(f"{regex} is no regular expression: {error}{hint}") from None
    found = {}
    for setting in settings.split(","):
        name, _, value = (word.strip() for word in setting.partition(":"))
        if name not in SETTINGS:
            raise argparse.ArgumentTypeError(f"{name or setting!r} is none of {', '.join(SETTINGS)}; write them as in "
                                             "rank:8,alpha:8,lr:5e-5")  # fmt: skip
        try:
            found[name] = SETTINGS[name](value)
        except ValueError:
            kind = "whole number" if SETTINGS[name] is int else "number"
            raise argparse.ArgumentTypeError(f"{name} is {value!r}; it must be a {kind}") from None
        low = name == "rank"
        if not (0 if low else 1e-300) <= found[name] <= (10**4 if low else 1e300):
            raise argparse.ArgumentTypeError(f"{name} is {value}; it must be "
                                             f"{'from 0 (no adapter) to 10000' if low else 'above 0'}")  # fmt: skip
    return LayerPattern(text, regex, **found)


def pattern_text(text):
    """Type of --lora_pattern: the text itself, once `layer_pattern` can read it."""
    return layer_pattern(text).text


def patterns_of(args):
    """[LayerPattern] of --lora_pattern, in order."""
    return [layer_pattern(text) for text in args.lora_pattern or ()]


def settings_of(patterns, part, module):
    """{"rank", "alpha", "lr"} that patterns set for a layer, as far as they set it; the last one that does wins."""
    found = {}
    for pattern in patterns:
        if pattern.matches(part, module):
            found |= {name: getattr(pattern, name) for name in SETTINGS if getattr(pattern, name) is not None}
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Layers and blocks


def chosen_layers(args, part, layers, names):
    """The names of a part's layers that --lora_layers and --lora_blocks choose, whatever the patterns say.

    Args:
        layers: names of layers, or ends of names; names: all modules or all layers of the part.

    Raises:
        UserError: a layer or a block does not exist.
    """
    is_denoiser = part == args.base_model.family.denoiser.name
    prefixes = block_prefixes(args, args.base_model.family) if is_denoiser else {}
    if not prefixes:
        require_layers(part, layers, names)
        return with_ends(names, layers)
    flag = f"--lora_blocks {args.lora_blocks}"
    for word, prefix in prefixes.items():
        require(any(inside(name, prefix) for name in names), f"{flag}: the {part} has no block {prefix}"
                f"{'' if word == prefix else f', which {word} stands for'}; it has "
                f"{first_names(blocks_in(names), 8)}")  # fmt: skip
    names = [name for name in names if any(inside(name, prefix) for prefix in prefixes.values())]
    found = with_ends(names, layers)
    if args.lora_layers or not found:
        require_layers(part, layers, names, flag)
    return found


def layer_of(parameter):
    """The layer that a parameter of an adapter belongs to, by the parameter's name."""
    return re.split(r"\.(?:lora|lokr|hada)_", parameter)[0]


def with_ends(names, ends):
    """The names that end in one of the ends, as whole words between dots."""
    return [name for name in names if any(f".{name}".endswith(f".{end}") for end in ends)]


def inside(name, prefix):
    """Whether a module lies in a block."""
    return name.startswith(f"{prefix}.")


def block_prefixes(args, family):
    """{word of --lora_blocks: start of the modules' names}; {} without the flag.

    Raises:
        UserError: a word is no block that the family can have.
    """
    found = {}
    for word in (word.strip() for word in (args.lora_blocks or "").split(",") if word.strip()):
        if family.numbered_blocks and word.isdigit():
            found[word] = f"{family.numbered_blocks}.{int(word)}"
        elif word in family.lora_blocks:
            found[word] = family.lora_blocks[word]
        else:
            expected = "numbers such as 0,1,12" if family.numbered_blocks else (
                f"{', '.join(family.lora_blocks)}, or names such as down_blocks.2")  # fmt: skip
            require(not family.numbered_blocks and re.fullmatch(r"[a-z]\w*_blocks?(\.\w+)*", word),
                    f"--lora_blocks {args.lora_blocks}: expected {expected}")  # fmt: skip
            found[word] = word
    return found


def blocks_in(names):
    """The blocks of a denoiser, such as down_blocks.2.attentions.1, from the names of its modules."""
    found = (re.match(r"\w+_blocks?(\.\d+)?(\.attentions\.\d+)?", name) for name in names)
    return sorted({match[0] for match in found if match})


def unused_kinds(names, chosen, family):
    """{kind: number of layers} of the kinds of layers that a plan names where none of them gets an adapter."""
    counts = {kind: len(with_ends(names, family.layer_kinds[kind])) for kind in family.named_when_unused}
    return {kind: count for kind, count in counts.items()
            if count and not with_ends(chosen, family.layer_kinds[kind])}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Checks before torch is imported


def check_adapters(args, family):
    """Refuse adapters that can't be: of --init_lora, and patterns and blocks that fit no layer of the files here."""
    check_init_lora(args, family)
    if not args.use_lora or args.init_lora or not (args.lora_pattern or args.lora_blocks):
        return
    block_prefixes(args, family)
    parts = [family.denoiser.name, *(family.text_encoders if args.train_text_encoder else ())]
    names = {part: layers_here(args.base_model, part) for part in parts}
    if None not in names.values():
        layers = {part: TEXT_ENCODER_TARGETS for part in parts} | {parts[0]: lora_layers(args, family)}
        chosen = {part: chosen_layers(args, part, layers[part], names[part]) for part in parts}
        check_patterns(patterns_of(args), names, chosen)


def layers_here(base, part):
    """The names of a part's layers from its safetensors files; None where those are not here to tell."""
    paths = weights_here(base, part)
    if not paths or any(path.suffix != ".safetensors" for path in paths):
        return None
    return [name.removesuffix(".weight") for path in paths for name, entry in tensors_of(path)[0].items()
            if name.endswith(".weight") and len(entry["shape"]) > 1]  # fmt: skip


def check_patterns(patterns, names, chosen):
    """Refuse a pattern that fits no layer with an adapter, and patterns that leave none.

    Args:
        names: {part: names of all layers}.
        chosen: {part: names of the layers that get an adapter}.
    """
    for pattern in patterns:
        require(any(pattern.matches(part, name) for part, layers in chosen.items() for name in layers),
                f"--lora_pattern {pattern.text}: {pattern.regex} is found in none of the "
                f"{sum(map(len, chosen.values()))} layers that get an adapter; "
                f"{near_layers(pattern, names, chosen)}")  # fmt: skip
    if patterns:
        for part, layers in chosen.items():
            left = [name for name in layers if settings_of(patterns, part, name).get("rank") != 0]
            require(left, f"--lora_pattern leaves all {len(layers)} layers of the {part} out: give some of them a "
                    "rank above 0")  # fmt: skip


def near_layers(pattern, names, chosen):
    """What nearly matched, in words: layers without an adapter, a misspelt word, or the part of it that fits."""
    others = [name for part, layers in names.items() for name in layers if pattern.matches(part, name)]
    if others:
        return (f"it is found in {counted(len(others), 'layer')} without one, such as {others[0]}: choose them with "
                "--lora_layers or --lora_blocks")  # fmt: skip
    full = [f"{part}.{name}" for part, layers in chosen.items() for name in layers]
    words = {word for name in full for word in name.split(".")} | set(names)
    for word in re.findall(r"[A-Za-z]\w{2,}", pattern.regex):
        near = near_name(word, words) if not any(word in each for each in words) else None
        if near:
            return f"did you mean {near} for {word}?"
    for end in range(len(pattern.regex) - 1, 2, -1):
        try:
            fitting = [name for name in full if re.search(pattern.regex[:end], name)]
        except re.error:
            continue
        if fitting:
            return f"only its beginning {pattern.regex[:end]} is, such as in {fitting[0]}"
    return f"a layer is called {full[0]}, for example"
