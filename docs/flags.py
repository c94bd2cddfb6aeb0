"""Writes docs/flags.md from the parsers of the training scripts: python docs/flags.py"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SCRIPTS = ("train_sdxl_lpl", "train_sd3_lpl_flow")

HEAD = """# Flags

Every flag of the training scripts, as `--help` groups them. This page is made by `python docs/flags.py`.

- A file given with `--config` sets any flag (`learning_rate: 1e-4`); the command line wins. A run saves its resolved
  flags as `config.yaml` in the output folder, and `--config` takes that file again.
- Ready-made files, with the reason for each value: [`configs/recipes`](../configs/recipes).
- Flags that the diffusers scripts know have the same names and defaults here, but for `--precondition_outputs`: 0
  here, 1 there (the velocity's own loss, without the weight sigma^2).
- The two scripts share most flags; the second part has only those of `train_sd3_lpl_flow.py` that differ.
"""


def value_of(action):
    """What a flag takes, in a few words."""
    if isinstance(action.default, bool) and action.nargs == 0:
        return ""
    if action.choices:
        return " \\| ".join(map(str, action.choices))
    kinds = {int: "whole number", float: "number"}
    return kinds.get(action.type, "text") + (", several" if action.nargs == "+" else "")


def default_of(action):
    """A flag's default, as one would write it."""
    if isinstance(action.default, bool):
        return "on" if action.default else ""
    return "" if action.default is None else f"`{action.default}`"


def rows_of(group):
    """A table row for each flag of a group."""
    for action in group._group_actions:
        if isinstance(action, argparse._HelpAction):
            continue
        names = " / ".join(f"`{name}`" for name in action.option_strings)
        text = (
            (action.help or "").replace("(default: %(default)s)", "").replace("default: %(default)s", "").strip(" ,;")
        )
        yield f"| {names} | {value_of(action)} | {default_of(action)} | {text} |"


def page():
    """The whole page: all flags of the first script, and what the second has besides or otherwise."""
    parts, known = [HEAD], set()
    for script in SCRIPTS:
        parts.append(f"\n## {script}.py\n")
        for group in __import__(script).build_parser()._action_groups:
            rows = [row for row in rows_of(group) if row not in known]
            known |= set(rows)
            if rows:
                parts += [f"\n### {group.title}\n", "| flag | takes | default | |", "|---|---|---|---|", *rows]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    (ROOT / "docs" / "flags.md").write_text(page(), encoding="utf-8")
