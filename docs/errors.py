"""Keep docs/errors.md in step with the messages in the source: python docs/errors.py

The page is its own source. Each of its subjects has entries: a block of messages, then an explanation written by hand.
This script appends new messages as a last subject, marked as to be written, and removes messages that are gone.
Everything else stays as it is. `tests/docs/test_errors.py` fails while the page is out of date or an explanation is to
be written.
"""

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "errors.md"
RAISED = {"UserError", "RankError", "DataError", "DamagedShard", "PublishError", "ArgumentTypeError", "Damaged"}
IN_TWO_PARTS = {"DataError", "DamagedShard"}  # errors of a problem and an advice
# Functions that return a message or a part of one.
MESSAGE_FUNCTIONS = {
    "_unknown", "instead_of_pipeline", "instead_of_folder", "unreadable", "weight_problem", "_advice",
    "warnings_about", "explanation", "_why", "hub_problem", "_hub_problem",
}  # fmt: skip
# Names that do not describe a placeholder.
UNINFORMATIVE = {
    "join", "args", "str", "map", "len", "sorted", "getattr", "self", "max", "min", "Path", "int", "split", "type",
    "shown", "because", "first", "first_names", "count", "counted", "brief", "readable",
    "format_bytes", "name_or_path",
}  # fmt: skip
TO_BE_WRITTEN = "(to be written)"
NEW = "To be sorted in"


# ---------------------------------------------------------------------------------------------------------------------
# Messages in the source


def placeholder(node):
    """The placeholder of an expression in a message: {name}, or {one|other} for a choice of two texts."""
    if isinstance(node, ast.IfExp):
        texts = [choice.value for choice in (node.body, node.orelse) if isinstance(choice, ast.Constant)]
        if len(texts) == 2 and all(texts):
            return "{" + "|".join(texts) + "}"
        node = node.body
    if isinstance(node, ast.BoolOp):
        node = node.values[0]
    names = []
    for part in ast.walk(node):
        if isinstance(part, ast.Attribute) and not isinstance(getattr(part, "ctx", None), ast.Store):
            names.append(part.attr)
        elif isinstance(part, ast.Name):
            names.append(part.id)
    names = [name.strip("_") for name in names if name.strip("_") not in UNINFORMATIVE]
    return "{" + (names[0] if names else "…") + "}"


def constants(tree):
    """{name: text} of the module's string constants."""
    found = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            text = node.value
            if isinstance(text, ast.Constant) and isinstance(text.value, str):
                found[node.targets[0].id] = text.value
    return found


def texts_of(function):
    """{name: expression} of a function's local variables that are assigned once: a text, or a choice of two texts."""
    found, seen = {}, {argument.arg for argument in function.args.args}
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name, value = node.targets[0].id, node.value
            choices = (value.body, value.orelse) if isinstance(value, ast.IfExp) else ()
            choice = choices and all(isinstance(text, ast.Constant) and text.value for text in choices)
            if isinstance(value, ast.JoinedStr) or choice or isinstance(getattr(value, "value", None), str):
                found[name] = value
            if name in seen or name not in found:
                found.pop(name, None)
            seen.add(name)
    return found


def pattern(node, known):
    """The text of a message. known: {name: text or expression} of constants and local variables."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(pattern(part, known) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return pattern(node.value, known)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return pattern(node.left, known) + pattern(node.right, known)
    if isinstance(node, ast.Call) and getattr(node.func, "id", "") in IN_TWO_PARTS:
        return " ".join(pattern(argument, known) for argument in node.args)
    if isinstance(node, ast.Name) and node.id in known:
        return known[node.id] if isinstance(known[node.id], str) else pattern(known[node.id], known)
    return placeholder(node)


def expressions(tree):
    """Yield the expressions of a module that are messages."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
            if name in RAISED and node.args:
                yield node if name in IN_TWO_PARTS else node.args[0]
            elif name == "require" and len(node.args) > 1:
                yield node.args[1]
            elif name in ("print", "say") and node.args:
                yield node.args[0]
        elif isinstance(node, ast.FunctionDef) and node.name in MESSAGE_FUNCTIONS:
            for part in ast.walk(node):
                if isinstance(part, (ast.Return, ast.Yield)) and part.value is not None:
                    yield part.value
                elif isinstance(part, ast.Call) and getattr(part.func, "attr", "") == "append":
                    yield part.args[0]


def messages():
    """{message: file} of the whole project, in source order. Messages of placeholders alone are left out."""
    found = {}
    for path in [*sorted(ROOT.glob("*.py")), *sorted(ROOT.glob("lpl_finetuning/**/*.py"))]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        known, seen, owner = constants(tree), set(), {}
        for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
            owner |= {id(node): function for node in ast.walk(function)}  # inner functions come later and win
        printed = {id(node.args[0]) for node in ast.walk(tree) if isinstance(node, ast.Call) and node.args
                   and getattr(node.func, "id", getattr(node.func, "attr", "")) in ("print", "say")}  # fmt: skip
        for node in sorted(expressions(tree), key=lambda node: node.lineno):
            local = texts_of(owner[id(node)]) if id(node) in owner else {}
            text = " ".join(pattern(node, known | local).split())
            if id(node) in printed and not text.startswith("warning: "):
                continue
            if len(re.sub(r"\{[^{}| ]*\}|^warning|\W", "", text)) > 5 and text not in seen:
                seen.add(text)
                found.setdefault(text, str(path.relative_to(ROOT)))
    return found


# ---------------------------------------------------------------------------------------------------------------------
# The page


def parse(page):
    """(head, [(subject, introduction, [([messages], explanation)])]) of the page."""
    head, *subjects = re.split(r"^## ", page, flags=re.MULTILINE)
    parsed = []
    for subject in subjects:
        title, _, rest = subject.partition("\n")
        introduction, *blocks = re.split(r"^```text\n", rest, flags=re.MULTILINE)
        entries = []
        for block in blocks:
            lines, _, text = block.partition("\n```\n")
            entries.append((lines.split("\n"), text.strip()))
        parsed.append((title.strip(), introduction.strip(), entries))
    return head, parsed


def render(head, subjects):
    """The page from what `parse` returns."""
    parts = [head.rstrip() + "\n"]
    for title, introduction, entries in subjects:
        parts.append(f"\n## {title}\n")
        parts += [f"\n{introduction}\n"] if introduction else []
        parts += ["\n```text\n" + "\n".join(lines) + f"\n```\n\n{text}\n" for lines, text in entries]
    return "".join(parts)


def blank(message):
    """A message with empty placeholders."""
    return re.sub(r"\{[^{}]*\}", "{}", message)


def updated(page, found):
    """The page with exactly the messages found in the source."""
    head, subjects = parse(page)
    listed = {line for _, _, entries in subjects for lines, _ in entries for line in lines}
    # a message that differs in its placeholders only is the same message to a reader
    renamed = {blank(message): message for message in found if message not in listed}
    kept, known = [], set()
    for title, introduction, entries in subjects:
        entries = [([line if line in found else renamed.pop(blank(line), line) for line in lines], text)
                   for lines, text in entries]  # fmt: skip
        entries = [([line for line in lines if line in found], text) for lines, text in entries]
        entries = [(lines, text) for lines, text in entries if lines]
        known |= {line for lines, _ in entries for line in lines}
        if entries:
            kept.append((title, introduction, entries))
    new = [([message], f"{TO_BE_WRITTEN}, from {file}") for message, file in found.items() if message not in known]
    if new and kept and kept[-1][0] == NEW:
        kept[-1][2].extend(new)
    elif new:
        kept.append((NEW, "", new))
    return render(head, kept)


if __name__ == "__main__":
    before = PAGE.read_text(encoding="utf-8") if PAGE.exists() else "# Messages\n"
    after = updated(before, messages())
    PAGE.write_text(after, encoding="utf-8")
    sys.exit(f"{after.count(TO_BE_WRITTEN)} entries are to be written" if TO_BE_WRITTEN in after else 0)
