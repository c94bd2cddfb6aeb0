"""Keeps docs/errors.md in step with the messages in the source: python docs/errors.py

The page is its own source. Under each subject stand entries: a block of messages, then what a person wrote about them.
This script adds messages that are new to the last subject, marked as to be written, and removes those that are gone;
everything else stays as it is. `tests/docs/test_errors.py` fails while anything would change or is to be written.
"""

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "errors.md"
RAISED = {"UserError", "DataError", "PublishError", "ArgumentTypeError", "Damaged"}
# Functions that give a part of a message, or a whole one, as a text.
TELLING = {
    "_unknown", "instead_of_pipeline", "unreadable", "weight_problem", "_advice", "warnings_about", "_why",
    "hub_problem", "_hub_problem",
}  # fmt: skip
# Names that say nothing about what stands in a message.
DULL = {
    "join", "args", "str", "map", "len", "sorted", "getattr", "self", "max", "min", "Path", "int", "split", "type",
    "shown", "because", "first", "first_names", "count", "counted", "brief", "readable",
    "megabytes", "name_or_path",
}  # fmt: skip
TO_BE_WRITTEN = "(to be written)"
NEW = "To be sorted in"


# ---------------------------------------------------------------------------------------------------------------------
# Messages in the source


def placeholder(node):
    """What stands in a message for an expression: {name}, of the last name in it; a choice of texts as {one|other}."""
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
    names = [name.strip("_") for name in names if name.strip("_") not in DULL]
    return "{" + (names[0] if names else "…") + "}"


def constants(tree):
    """{name: text} of the module's constants that are texts."""
    found = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            text = node.value
            if isinstance(text, ast.Constant) and isinstance(text.value, str):
                found[node.targets[0].id] = text.value
    return found


def texts_of(function):
    """{name: expression} of a function's local variables that are given one text, or one of two."""
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
    """A message's text from its expression; known: texts and expressions of names."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(pattern(part, known) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return pattern(node.value, known)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return pattern(node.left, known) + pattern(node.right, known)
    if isinstance(node, ast.Name) and node.id in known:
        return known[node.id] if isinstance(known[node.id], str) else pattern(known[node.id], known)
    return placeholder(node)


def expressions(tree):
    """The expressions of a module that are messages."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
            if name in RAISED and node.args:
                yield node.args[0]
            elif name == "require" and len(node.args) > 1:
                yield node.args[1]
            elif name in ("print", "say") and node.args:
                yield node.args[0]
        elif isinstance(node, ast.FunctionDef) and node.name in TELLING:
            for part in ast.walk(node):
                if isinstance(part, (ast.Return, ast.Yield)) and part.value is not None:
                    yield part.value
                elif isinstance(part, ast.Call) and getattr(part.func, "attr", "") == "append":
                    yield part.args[0]


def messages():
    """{message: file} of the whole project, in the order of the source, but for those of nothing but names."""
    found = {}
    for path in [*sorted(ROOT.glob("*.py")), *sorted(ROOT.glob("lpl_finetuning/**/*.py"))]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        known, told, owner = constants(tree), set(), {}
        for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
            owner |= {id(node): function for node in ast.walk(function)}  # an inner function comes later
        printed = {id(node.args[0]) for node in ast.walk(tree) if isinstance(node, ast.Call) and node.args
                   and getattr(node.func, "id", getattr(node.func, "attr", "")) in ("print", "say")}  # fmt: skip
        for node in sorted(expressions(tree), key=lambda node: node.lineno):
            local = texts_of(owner[id(node)]) if id(node) in owner else {}
            text = " ".join(pattern(node, known | local).split())
            if id(node) in printed and not text.startswith("warning: "):
                continue
            if len(re.sub(r"\{[^{}| ]*\}|^warning|\W", "", text)) > 5 and text not in told:
                told.add(text)
                found.setdefault(text, str(path.relative_to(ROOT)))
    return found


# ---------------------------------------------------------------------------------------------------------------------
# The page


def parse(page):
    """(head, [(subject, introduction, [([messages], text)])]) of the page."""
    head, *subjects = re.split(r"^## ", page, flags=re.MULTILINE)
    parsed = []
    for subject in subjects:
        title, _, rest = subject.partition("\n")
        introduction, *blocks = re.split(r"^```text\n", rest, flags=re.MULTILINE)
        entries = []
        for block in blocks:
            told, _, text = block.partition("\n```\n")
            entries.append((told.split("\n"), text.strip()))
        parsed.append((title.strip(), introduction.strip(), entries))
    return head, parsed


def render(head, subjects):
    """The page again."""
    parts = [head.rstrip() + "\n"]
    for title, introduction, entries in subjects:
        parts.append(f"\n## {title}\n")
        parts += [f"\n{introduction}\n"] if introduction else []
        parts += ["\n```text\n" + "\n".join(told) + f"\n```\n\n{text}\n" for told, text in entries]
    return "".join(parts)


def blank(message):
    """A message without the names in its placeholders."""
    return re.sub(r"\{[^{}]*\}", "{}", message)


def updated(page, found):
    """The page with the messages that are found in the source, and no others."""
    head, subjects = parse(page)
    listed = {line for _, _, entries in subjects for told, _ in entries for line in told}
    # one that differs in its placeholders only was written otherwise in the source, and is the same to a reader
    renamed = {blank(message): message for message in found if message not in listed}
    kept, known = [], set()
    for title, introduction, entries in subjects:
        entries = [([line if line in found else renamed.pop(blank(line), line) for line in told], text)
                   for told, text in entries]  # fmt: skip
        entries = [([line for line in told if line in found], text) for told, text in entries]
        entries = [(told, text) for told, text in entries if told]
        known |= {line for told, _ in entries for line in told}
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
