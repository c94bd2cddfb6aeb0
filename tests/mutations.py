"""Put plausible bugs into the code, one at a time, and see whether the tests notice.

    python -m tests.mutations                      # all patches in tests/mutations
    python -m tests.mutations --only 'loss-*'      # those with such names
    python -m tests.mutations --baseline           # the chosen tests on the code without bugs: all have to pass
    python -m tests.mutations --relocate           # after code has moved: rewrite the patches that no longer apply

Each `tests/mutations/*.patch` is a unified diff with one small bug, below a header of three lines or four:

    Room: the part of the program that it is in
    Bug: what is wrong then, in a sentence
    Tests: arguments of pytest, the tests that should notice
    Known survivor: why no test notices, where that is accepted

A patch is applied to a fresh copy of the tracked files, as they lie in the working tree, and its tests run there. It
is killed when a test fails, and has survived when all pass. The process that runs the tests is forked from this one,
which has imported PyTorch and the other slow libraries once, but nothing of the project.

The exit status is 1 when a patch survived that is not known to, took too long, no longer applies, or names tests that
are not there.
"""

import argparse
import contextlib
import difflib
import fnmatch
import importlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import types
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PATCHES = "tests/mutations"
SLOW_IMPORTS = (
    "torch", "numpy", "PIL.Image", "yaml", "safetensors.torch", "tqdm.auto", "filelock", "packaging.version",
    "torch.distributed.fsdp", "torch.distributed.tensor", "torch.utils.data", "accelerate", "accelerate.state",
    "diffusers", "diffusers.training_utils", "diffusers.optimization", "transformers", "peft", "huggingface_hub",
    "pytest", "pytest_timeout", "_pytest.assertion.rewrite",
)  # fmt: skip
SLOW_CLASSES = {  # both libraries import a class when it is asked for
    "diffusers": (
        "AutoencoderKL", "AsymmetricAutoencoderKL", "UNet2DConditionModel", "SD3Transformer2DModel", "DDPMScheduler",
        "EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler", "StableDiffusionXLPipeline",
        "StableDiffusion3Pipeline",
    ),
    "transformers": (
        "AutoTokenizer", "CLIPTextConfig", "CLIPTextModel", "CLIPTextModelWithProjection", "CLIPTokenizer",
        "T5Config", "T5EncoderModel", "T5Tokenizer",
    ),
}  # fmt: skip
FAILURES = {  # exit statuses of pytest that say nothing about the bug
    2: "was interrupted", 3: "had an internal error", 4: "was called wrongly, or a test is not there",
    5: "found no tests",
}  # fmt: skip
GRACE = 5.0  # seconds that a process has to end what it started, once it was interrupted
HUNK = re.compile(r"@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@ ?(.*)")
INSIDE = re.compile(r"\s*(?:async )?(?:def|class) (\w+)")


# ---------------------------------------------------------------------------------------------------------------------
# Patches


@dataclass(frozen=True)
class Hunk:
    """One place that a patch changes. lines: as in the diff, with their first character; inside: a def or class."""

    start: int
    lines: tuple[str, ...]
    inside: str = ""

    @property
    def old(self):
        """The lines that are there before."""
        return [line[1:] for line in self.lines if line[0] in " -"]

    @property
    def new(self):
        """The lines that are there afterwards."""
        return [line[1:] for line in self.lines if line[0] in " +"]


@dataclass(frozen=True)
class Patch:
    """A patch file, read. changes: [(path of a file, its hunks)]."""

    path: Path
    header: dict
    changes: tuple

    @property
    def name(self):
        """Its file's name without the ending."""
        return self.path.stem

    @property
    def tests(self):
        """The arguments of pytest."""
        return shlex.split(self.header["Tests"])


def read_patch(path):
    """Read a patch file. Raises ValueError where the header lacks a line."""
    header, changes, hunks, lines = {}, [], None, None
    for line in path.read_text(encoding="utf-8").splitlines():
        if hunks is None and (field := re.fullmatch(r"(Room|Bug|Tests|Known survivor): (.+)", line)):
            header[field[1]] = field[2]
        elif line.startswith("+++ b/"):
            hunks = []
            changes.append((line[6:], hunks))
        elif hunks is not None and (match := HUNK.fullmatch(line)):
            lines = []
            hunks.append((int(match[1]), lines, match[5]))
        elif hunks and line[:1] in (" ", "+", "-") and not line.startswith("--- "):
            lines.append(line)
        elif hunks and not line:
            lines.append(" ")
    missing = [field for field in ("Room", "Bug", "Tests") if field not in header]
    if missing or not changes:
        raise ValueError(f"{path}: there is no {', no '.join(missing) or 'diff'}")
    return Patch(
        path,
        header,
        tuple((name, tuple(Hunk(start, tuple(lines), inside) for start, lines, inside in hunks))
              for name, hunks in changes),
    )  # fmt: skip


def write_patch(patch):
    """Write a patch file anew."""
    text = "".join(f"{field}: {value}\n" for field, value in patch.header.items()) + "\n"
    for name, hunks in patch.changes:
        text += f"diff --git a/{name} b/{name}\n--- a/{name}\n+++ b/{name}\n"
        shift = 0
        for hunk in hunks:
            counts = f"-{hunk.start},{len(hunk.old)} +{hunk.start + shift},{len(hunk.new)}"
            text += f"@@ {counts} @@" + (f" {hunk.inside}" if hunk.inside else "") + "\n"
            text += "".join(f"{line}\n" for line in hunk.lines)
            shift += len(hunk.new) - len(hunk.old)
    patch.path.write_text(text, encoding="utf-8")


def find_patches(folder, only):
    """The patches whose names match one of some patterns, in order."""
    paths = sorted(folder.glob("*.patch"))
    return [read_patch(path) for path in paths if any(fnmatch.fnmatch(path.stem, glob) for glob in only)]


def applies(patch, folder, check=True):
    """Apply a patch to the files in a folder, or only see whether it would; returns what git says against it."""
    words = ["git", "apply", *["--check"] * check, str(patch.path)]
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(Path(folder).resolve().parent)}
    result = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)
    return result.stderr.strip() if result.returncode else ""


def tracked_files():
    """Paths of all files that git knows of and that are there."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def copy_to(folder):
    """Copy the tracked files, as they are in the working tree, but for the patches."""
    for name in tracked_files():
        if not name.startswith(f"{PATCHES}/"):
            target = Path(folder, name)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target)


# ---------------------------------------------------------------------------------------------------------------------
# Running tests in a fork


def import_slow_libraries(home):
    """Import what takes seconds, as the tests' conftest would have it: no GPU, one thread, caches of its own."""
    os.environ |= {"HF_HOME": f"{home}/huggingface", "XDG_CACHE_HOME": f"{home}/cache", "HF_HUB_OFFLINE": "1",
                   "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}  # fmt: skip
    for name in SLOW_IMPORTS:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    for name, classes in SLOW_CLASSES.items():
        for attribute in classes:
            with contextlib.suppress(ImportError, AttributeError):
                getattr(importlib.import_module(name), attribute)


def forget_the_project():
    """Make sure that a fork imports the project's modules from its copy: none may be known, nor their folder."""
    sys.path[:] = [place for place in sys.path if Path(place or ".").resolve() != ROOT]
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        inside = file and Path(file).resolve().is_relative_to(ROOT) and "site-packages" not in file
        if name.partition(".")[0] == "tests" or (inside and name != "__main__"):
            del sys.modules[name]
    importlib.invalidate_caches()


def run_pytest(folder, tests, log):
    """In a fork: run tests in a copy of the project, with all output in a file. Does not return."""
    status = 3
    try:
        os.setsid()
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for number in (1, 2):
            os.dup2(file, number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.chdir(folder)
        sys.path.insert(0, str(folder))
        sys.modules["__main__"] = types.ModuleType("__main__")
        sys.argv = ["pytest"]
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        import pytest

        status = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *tests]))
        copies = [name for name, module in sys.modules.items() if is_astray(module, folder)]
        if copies:
            print(f"imported from another place: {', '.join(copies)}")
            status = 3
    finally:
        sys.stdout.flush()
        os._exit(status)


def is_astray(module, folder):
    """Whether a module of the project was imported from elsewhere than the copy."""
    file = getattr(module, "__file__", None) or ""
    return file.startswith(f"{ROOT}/") and "site-packages" not in file and not file.startswith(f"{folder}/")


class Run:
    """The tests of one patch, running in a fork."""

    def __init__(self, name, folder, tests, seconds):
        """Start them. folder: the copy; seconds: that they may take."""
        self.name, self.folder, self.log = name, folder, Path(f"{folder}.log")
        self.began, self.seconds, self.interrupted = time.monotonic(), seconds, None
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            run_pytest(folder, tests, self.log)

    def poll(self):
        """Look after it: (outcome, which test failed or what went wrong, seconds) once it has ended, else None."""
        took = time.monotonic() - self.began
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if not pid:
            if self.interrupted is None and took > self.seconds:
                self.interrupted = took  # pytest ends the processes that a test has started
                os.kill(self.pid, signal.SIGINT)
            elif self.interrupted is not None and took > self.interrupted + GRACE:
                self._kill_group()
            return None
        self._kill_group()
        if self.interrupted is not None:
            return "timeout", f"not ended after {self.seconds:g} s", took
        return *verdict(os.waitstatus_to_exitcode(status), self.log), took

    def _kill_group(self):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)


def verdict(status, log):
    """(outcome, what to say of it) from the exit status of pytest and its output."""
    text = log.read_text(errors="replace")
    if status == 0:
        passed = re.search(r"(\d+) passed", text)
        return ("survived", f"{passed[1]} tests passed") if passed else ("error", "all tests were skipped")
    if status in FAILURES:
        last = next((line for line in reversed(text.splitlines()) if line.strip()), "")
        return "error", f"pytest {FAILURES[status]}: {last[:100]}"
    failed = re.search(r"^(?:FAILED|ERROR) \S*?(\w+\.py)::(\w+)", text, re.MULTILINE)
    return "killed", f"{failed[1]}::{failed[2]}" if failed else f"the process ended with {status}"


def start(name, patch, tests, seconds, temporary):
    """Copy the project, put the bug in (patch: None for none) and start the tests: a Run, or what is wrong."""
    folder = Path(temporary, name)
    copy_to(folder)
    if patch is not None:
        if problem := applies(patch, folder, check=False):
            return f"stale: {problem.splitlines()[0]}"
        for changed, _ in patch.changes:
            source = Path(folder, changed).read_text(encoding="utf-8")
            try:
                compile(source, changed, "exec")
            except SyntaxError as error:
                return f"not Python any more: {error}"
    return Run(name, folder, tests, seconds)


def run_all(work, jobs, seconds, temporary, tell):
    """Run [(name, patch or None, tests)]; {name: (outcome, seconds, remark)}. tell: called with each as it ends."""
    waiting, running, found = list(work), {}, {}

    def note(name, outcome, remark, took):
        found[name] = (outcome, took, remark)
        tell(name, *found[name])
        if outcome in ("killed", "survived"):
            shutil.rmtree(Path(temporary, name), ignore_errors=True)

    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                name, patch, tests = waiting.pop(0)
                started = start(name, patch, tests, seconds, temporary)
                if isinstance(started, str):
                    note(name, started.partition(":")[0] if started.startswith("stale") else "error", started, 0.0)
                else:
                    running[name] = started
            for name, run in list(running.items()):
                if (ended := run.poll()) is not None:
                    del running[name]
                    note(name, *ended)
            time.sleep(0.05)
    finally:
        for run in running.values():
            run._kill_group()
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Patches whose code has moved


def relocate(patches):
    """Rewrite the patches that no longer apply, and the places of their tests; returns what could not be found."""
    names = [name for name in tracked_files() if name.endswith(".py")]
    sources = {name: (ROOT / name).read_text(encoding="utf-8").splitlines() for name in names}
    problems = []
    for patch in patches:
        changes, tests = patch.changes, patch.header["Tests"]
        try:
            if applies(patch, ROOT):
                code = {name: lines for name, lines in sources.items() if not name.startswith("tests/")}
                changes = tuple(moved(hunk, name, code) for name, hunks in patch.changes for hunk in hunks)
                changes = joined(changes)
            tests = " ".join(shlex.quote(test_place(word, sources)) for word in patch.tests)
        except LookupError as error:
            problems.append(f"{patch.name}: {error.args[0]}")
        if changes == patch.changes and shlex.split(tests) == patch.tests:
            continue
        write_patch(Patch(patch.path, {**patch.header, "Tests": tests}, changes))
        now = read_patch(patch.path)
        if problem := applies(now, ROOT):
            problems.append(f"{patch.name}: rewritten, but {problem.splitlines()[0]}")
        else:
            print(f"{patch.name}: now in {', '.join(name for name, _ in now.changes)}; tests {tests}")
    return problems


def joined(changes):
    """[(path, (hunk,))] with the hunks of a file together, from its top."""
    files = {}
    for name, hunks in changes:
        files.setdefault(name, []).extend(hunks)
    return tuple((name, tuple(sorted(hunks, key=lambda hunk: hunk.start))) for name, hunks in files.items())


def moved(hunk, before, sources):
    """(path, (hunk,)) where a hunk's code is now. Raises LookupError unless there is one such place.

    First the changed lines are looked for with all their context, then with that above or below alone, then by
    themselves; indented as before or otherwise. Of several places those in a function of the same name count.
    """
    removed = [number for number, line in enumerate(hunk.lines) if line[0] != " "]
    first, last = removed[0], removed[-1] + 1
    for start, end in ((0, len(hunk.lines)), (0, last), (first, len(hunk.lines)), (first, last)):
        lines = hunk.lines[start:end]
        wanted = [line[1:] for line in lines if line[0] in " -"]
        if not any(line.strip() for line in wanted):
            continue
        found = [place for name, source in sources.items() for place in places(wanted, name, source)]
        same = [place for place in found if enclosing(sources[place[0]], place[1]) == name_of(hunk.inside)]
        if len(found) > 1 and hunk.inside:
            found = same
        if len(found) > 1:
            raise LookupError(f"{before}: its lines are in {len(found)} places: {wanted[0].strip()}")
        if found:
            return placed(found[0], lines, sources)
    raise LookupError(f"{before}: its lines are nowhere: {hunk.old[first].strip() if hunk.old else ''}")


def places(wanted, name, source):
    """[(path, number of the first line from 0, what the indentation has grown by)] of lines in a file."""
    blank = min((len(line) - len(line.lstrip()) for line in wanted if line.strip()), default=0)
    bare = [line[blank:] for line in wanted]
    found = []
    for number in range(len(source) - len(wanted) + 1):
        here = source[number : number + len(wanted)]
        margin = min((len(line) - len(line.lstrip()) for line in here if line.strip()), default=0)
        if [line[margin:] for line in here] == bare:
            found.append((name, number, margin - blank))
    return found


def enclosing(source, number):
    """The name of the function or class that a line is in; "" at the top of a file."""
    margin = len(source[number]) - len(source[number].lstrip())
    for line in reversed(source[:number]):
        if line.strip() and len(line) - len(line.lstrip()) < margin:
            if match := INSIDE.match(line):
                return match[1]
            margin = len(line) - len(line.lstrip())
    return ""


def name_of(inside):
    """The name in a hunk's heading, such as "def run(self):"."""
    match = INSIDE.match(inside)
    return match[1] if match else ""


def placed(place, lines, sources):
    """(path, (hunk,)) of the lines of a diff at a place, with one line of context on each side."""
    name, number, more = place
    source = sources[name]

    def indented(text):
        return " " * more + text if more >= 0 and text else text[-more:] if more < 0 else text

    lines = [line[0] + indented(line[1:]) for line in lines]
    count = sum(line[0] in " -" for line in lines)
    inside = enclosing_line(source, number)
    if lines[0][0] != " " and number > 0:
        lines, number, count = [" " + source[number - 1], *lines], number - 1, count + 1
    if lines[-1][0] != " " and number + count < len(source):
        lines = [*lines, " " + source[number + count]]
    return name, (Hunk(number + 1, tuple(lines), inside),)


def enclosing_line(source, number):
    """The heading of a hunk: the line that begins the function or class that it is in, without its indentation."""
    wanted = enclosing(source, number)
    if not wanted:
        return ""
    found = [line.strip() for line in source[:number] if (match := INSIDE.match(line)) and match[1] == wanted]
    return found[-1][:60]


def test_place(word, sources):
    """An argument of pytest with the path that the test has now: that of a function of its name.

    Of several files, and for a file as a whole, the one whose name is most alike counts. Raises LookupError where
    there is none.
    """
    path, _, test = word.partition("::")
    if not path.endswith(".py"):
        return word
    function = re.match(r"\w*", test)[0]
    has = re.compile(rf"def {function}\(")
    if path in sources and (not function or any(has.match(line) for line in sources[path])):
        return word
    tests = [name for name in sources if name.startswith("tests/") and Path(name).name.startswith("test_")]
    found = [name for name in tests if not function or any(map(has.match, sources[name]))]
    if len(found) > 1 or not function:
        before, stems = Path(path).stem, [Path(name).stem for name in found]
        near = sorted(filter(before.startswith, stems))[-1:] or difflib.get_close_matches(before, stems, n=1)
        found = [name for name in found if Path(name).stem in near]
    if len(found) != 1:
        raise LookupError(f"{word}: {'in several files' if found else 'in no file'} now")
    return found[0] + (f"::{test}" if test else "")


# ---------------------------------------------------------------------------------------------------------------------
# The command


def table(rows):
    """Rows of words as lines of aligned columns."""
    widths = [max(len(str(row[column])) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(str(word).ljust(width) for word, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def report(patches, found):
    """The final lines: a table, counts by room and in all, and whatever is not as it should be."""
    rows = [("patch", "room", "outcome", "seconds", "by")]
    for patch in patches:
        outcome, took, remark = found[patch.name]
        if outcome == "survived" and "Known survivor" in patch.header:
            outcome = "known"
        rows.append((patch.name, patch.header["Room"], outcome, f"{took:.1f}", remark))
    lines = table(rows)
    counts = Counter(row[2] for row in rows[1:])
    rooms = Counter(row[1] for row in rows[1:])
    killed = Counter(row[1] for row in rows[1:] if row[2] == "killed")
    lines += ["", "killed by room: " + ", ".join(f"{room} {killed[room]} of {rooms[room]}" for room in rooms)]
    lines.append(f"{len(patches)} patches: " + ", ".join(f"{count} {outcome}" for outcome, count in counts.items()))
    for patch, row in zip(patches, rows[1:], strict=True):
        if row[2] == "known":
            lines.append(f"known survivor {patch.name}: {patch.header['Known survivor']}")
        elif row[2] == "killed" and "Known survivor" in patch.header:
            lines.append(f"{patch.name} is killed now: take its Known survivor line out")
        elif row[2] != "killed":
            lines.append(f"{row[2].upper()} {patch.name}: {patch.header['Bug']} ({row[4]})")
    return lines


def choices(patches):
    """{name: arguments of pytest} that together are all tests of the patches, each once, by their files."""
    found = {}
    for patch in patches:
        if "-k" in patch.tests:
            found[f"without-{patch.name}"] = patch.tests
            continue
        for word in patch.tests:
            words = found.setdefault(f"without-{Path(word.partition('::')[0]).stem}", [])
            if word not in words:
                words.append(word)
    return found


def build_parser():
    """The flags."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutations", description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--only", nargs="+", default=["*"], metavar="GLOB", help="patches with such names alone")
    add("--jobs", type=int, default=1, help="so many at a time (default: %(default)s)")
    add("--seconds", type=float, default=40, help="that the tests of one patch may take (default: %(default)s)")
    add("--write", metavar="FILE", help="write the final lines into this file too")
    add("--baseline", action="store_true", help="run all tests that the patches name once, without any bug")
    add("--relocate", action="store_true", help="rewrite patches and paths of tests after code has moved")
    return parser


def main(argv=None):
    """The command; returns the exit status."""
    args = build_parser().parse_args(argv)
    patches = find_patches(ROOT / PATCHES, args.only)
    if not patches:
        print(f"no patch in {PATCHES} is called {' or '.join(args.only)}")
        return 1
    if args.relocate:
        problems = relocate(patches)
        print("\n".join([f"{len(patches)} patches looked at", *problems]))
        return int(bool(problems))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # and the forks end too
    began = time.monotonic()

    def tell(name, outcome, took, remark):
        print(f"{time.monotonic() - began:6.0f} s  {name}: {outcome} ({took:.1f} s; {remark})", flush=True)

    with tempfile.TemporaryDirectory(prefix="mutations-") as temporary:
        import_slow_libraries(temporary)
        forget_the_project()
        if args.baseline:
            work = [(name, None, tests) for name, tests in choices(patches).items()]
            found = run_all(work, args.jobs, 20 * args.seconds, temporary, tell)
            bad = [name for name, (outcome, _, _) in found.items() if outcome != "survived"]
            print("\n".join([f"{len(work)} choices of tests, {len(bad)} do not pass", *bad]))
            return int(bool(bad))
        work = [(patch.name, patch, patch.tests) for patch in patches]
        found = run_all(work, args.jobs, args.seconds, temporary, tell)
    lines = report(patches, found)
    print("\n" + "\n".join(lines))
    if args.write:
        Path(args.write).write_text("\n".join(lines) + "\n", encoding="utf-8")
    known = {patch.name for patch in patches if "Known survivor" in patch.header}
    good = {"killed"}
    return int(any(outcome not in good and not (outcome == "survived" and name in known)
                   for name, (outcome, _, _) in found.items()))  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
