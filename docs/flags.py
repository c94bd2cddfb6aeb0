"""Write docs/flags.md from the parsers of the scripts: python docs/flags.py"""

import argparse
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SCRIPTS = ("train_sdxl_lpl", "train_sd3_lpl_flow")
CLASSIFIER, EVALUATION = "train_latent_classifier", "evaluate_models"

HEAD = """# Flags

This page lists every flag of the training scripts and of `evaluate_models.py`, grouped as in `--help`.
`python docs/flags.py` writes it.

- A recipe is a YAML file given with `--config`. It sets any flag (`learning_rate: 1e-4`, `use_lpl: true`), and the
  command line wins over it. [`configs/recipes`](../configs/recipes) has recipes with reasons for the less obvious
  values.
- A run saves its resolved flags as `config.yaml` in the output folder. `--config` takes that file too.
- A flag that takes no value is a switch. Every switch `--x` also has `--no-x`, which turns off what a recipe turns on:
  `--config configs/recipes/sdxl-lora-16gb.yaml --no-use_lpl`.
- Flags of the diffusers scripts (`train_text_to_image_sdxl.py`, `train_text_to_image_lora_sdxl.py`,
  `train_dreambooth_sd3.py`, `train_dreambooth_lora_sd3.py`) have the same names here and mostly the same defaults.
  Exceptions (default here; there): `--seed` (0; none), `--output_dir`, for SD3 `--caption_column` (`text`; none),
  `--text_encoder_lr` (that of `--learning_rate`; 5e-6) and `--precondition_outputs` (0; 1, which weights the velocity
  loss by sigma^2).
- The first part has all flags of `train_sdxl_lpl.py`. `train_sd3_lpl_flow.py` takes them too, except those marked
  *SDXL only*. The second part has the flags of `train_sd3_lpl_flow.py` alone, marked *SD3 only*, and flags with
  another default there. The third part has those of [`train_latent_classifier.py`](latent-classifier.md) that are
  other than in the first, and names the flags that it does not take. The last part has the flags of
  [`evaluate_models.py`](evaluation.md), which takes no recipe.
- With neither `--lpl_t_threshold` nor `--lpl_sigma_threshold`, samples with `t < 200` get the loss for SDXL, and
  samples with `sigma / alpha <= 3` for SD3. `--dry_run` prints their share.
"""


def value_of(action):
    """The kind of value that a flag takes, in a few words."""
    if action.nargs == 0:
        return ""
    if action.choices:
        return " \\| ".join(map(str, action.choices))
    several = action.nargs == "+" or type(action).__name__ == "Several"
    kinds = {int: "whole number", float: "number"}
    return kinds.get(action.type, "text") + (", several" if several else "")


def default_of(action):
    """A flag's default in Markdown; empty if there is none."""
    if isinstance(action.default, bool):
        return "on" if action.default else ""
    default = " ".join(map("{:g}".format, action.default)) if isinstance(action.default, list) else action.default
    return "" if default in (None, "") else f"`{default}`"


def rows_of(group, others, only):
    """Yield a table row for each flag of a group; `only` marks flags that are not among the `others`."""
    for action in group._group_actions:
        if isinstance(action, argparse._HelpAction):
            continue
        text = (
            (action.help or "").replace("(default: %(default)s)", "").replace("default: %(default)s", "").strip(" ,;")
        )
        text = text if action.dest in others else f"*{only}* {text}".strip()
        yield f"| `{action.option_strings[0]}` | {value_of(action)} | {default_of(action)} | {text} |"


def table(title, rows):
    """The lines of a group's table; none for a group without flags."""
    return [f"\n### {title}\n", "| flag | takes | default | |", "|---|---|---|---|", *rows] if rows else []


def left_out(parser, other):
    """A paragraph on the flags of a parser that the other parser does not have: whole groups first, then the rest."""
    groups, names = [], []
    for group in parser._action_groups:
        flags = [action.dest for action in group._group_actions if action.dest != "help"]
        missing = [name for name in flags if name not in other.flags()]
        groups += [group.title] * (bool(flags) and missing == flags)
        names += missing if missing != flags else []
    text = f"It takes the flags of the first part, but none of the groups {', '.join(groups)}, and not "
    text += ", ".join(f"`--{name}`" for name in names) + ". The flags below are its own, or have another default."
    return textwrap.fill(text, 119, break_on_hyphens=False)


def page():
    """The whole page: all flags of the first script, what is other in the next two, those of the evaluation."""
    parts, known = [HEAD], set()
    parsers = [__import__(script).build_parser() for script in SCRIPTS]
    for script, parser, other, only in zip(SCRIPTS, parsers, parsers[::-1], ("SDXL only.", "SD3 only."), strict=True):
        parts.append(f"\n## {script}.py\n")
        for group in parser._action_groups:
            rows = [row for row in rows_of(group, other.flags(), only) if row not in known]
            known |= set(rows)
            parts += table(group.title, rows)
    parser = __import__(CLASSIFIER).build_parser()
    parts.append(f"\n## {CLASSIFIER}.py\n\n{left_out(parsers[0], parser)}")
    for group in parser._action_groups:
        rows = list(rows_of(group, parser.flags(), ""))
        parts += table(group.title, [row for row in rows if row not in known])
    parser = __import__(EVALUATION).build_parser()
    parts.append(f"\n## {EVALUATION}.py\n")
    for group in parser._action_groups:
        parts += table(group.title, list(rows_of(group, parser.flags(), "")))
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    (ROOT / "docs" / "flags.md").write_text(page(), encoding="utf-8")
