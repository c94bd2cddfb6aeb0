"""docs/errors.md has every message of the source, no other, and something to say about each."""

import importlib.util
import re
import sys
from pathlib import Path

from tests import children

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")


def load():
    """docs/errors.py as a module."""
    spec = importlib.util.spec_from_file_location("errors", ROOT / "docs" / "errors.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


errors = load()
MESSAGES = errors.messages()
ENTRIES = [entry for _, _, entries in errors.parse(PAGE)[1] for entry in entries]
LISTED = [message for told, _ in ENTRIES for message in told]


def test_every_message_is_on_the_page_and_no_other():
    """Run python docs/errors.py, then write what it marks."""
    assert sorted(LISTED) == sorted(MESSAGES), "python docs/errors.py brings the page up to date"
    assert errors.TO_BE_WRITTEN not in PAGE and errors.NEW not in PAGE
    assert errors.updated(PAGE, MESSAGES) == PAGE


def test_entries_say_something():
    """Whole sentences, in the width of the other pages."""
    for told, text in ENTRIES:
        assert len(text) > 60, told
        assert text.rstrip().endswith((".", "`", ")")), text
        assert "..." not in " ".join(told)
    prose = re.sub(r"```text\n.*?\n```", "", PAGE, flags=re.DOTALL)
    assert max(map(len, prose.splitlines())) < 121


def test_the_collector_finds_messages_of_every_kind():
    """Raised, required, returned as parts, of types, printed as warnings; constants and choices in words."""
    for message in (
        "--seed is {seed}; it must be less than 2**64",
        "it must be auto or a number, 0 or more",
        "is only a pointer of Git LFS; run `git lfs pull` in the model's folder",
        "warning: LPL is under 1 % of the loss and hardly matters; raise --lpl_weight, or use auto",
        "{--aspect_ratio_buckets|--resolution} is {found}; it must be a multiple of {patch}, the pixels of a token",
    ):
        assert message in MESSAGES, message


def test_new_and_vanished_messages_change_the_page():
    """A new one is marked as to be written, one that is gone goes with its entry; what people wrote stays."""
    [gone] = next(told for told, _ in ENTRIES if len(told) == 1)
    found = {message: file for message, file in MESSAGES.items() if message != gone}
    page = errors.updated(PAGE, found | {"--something is {wrong}": "cli_utils.py"})
    assert gone + "\n```" not in page and ENTRIES[-1][1] in page
    assert f"## {errors.NEW}" in page and f"--something is {{wrong}}\n```\n\n{errors.TO_BE_WRITTEN}" in page
    assert errors.updated(page, MESSAGES).count(errors.TO_BE_WRITTEN) == 1, (
        "the vanished one is new when it comes back"
    )
    renamed = "--seed is {number}; it must be less than 2**64"
    found = {message.replace("{seed}; it must be less", "{number}; it must be less"): "" for message in MESSAGES}
    page = errors.updated(PAGE, found)
    assert renamed in page and errors.TO_BE_WRITTEN not in page, "another name in a placeholder changes nothing else"


def test_real_messages_are_found_on_the_page():
    """What a process prints matches one of the page's messages, read as a pattern."""
    names = re.compile(r"\{[^{}]*\}")
    patterns = [".*".join(map(re.escape, names.split(message))) for message in LISTED]
    for flags in (["--resolution", "100"], ["--lpl_wieght", "1"], ["--push_to_hub", "--hub_model_id", "a/b/c"],
                  ["--pretrained_model_name_or_path", "docs", "--train_data_dir", "docs"]):  # fmt: skip
        words = [sys.executable, "train_sdxl_lpl.py", *flags]
        result = children.run(words, light=True, cwd=ROOT, text=True, timeout=60)
        said = result.stderr.removeprefix("error: ").strip()
        assert result.returncode == 2 and any(re.fullmatch(pattern, said, re.DOTALL) for pattern in patterns), said
