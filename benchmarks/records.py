"""What the experiments share: the facts that every result file has of its making, and starting a training script."""

import datetime
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def facts(seconds, device=None):
    """{"command", "commit", "device", "date", "seconds"} of a run that took so long.

    device: the GPU's name; None for the CPU.
    """
    script = Path(sys.argv[0])
    name = script.resolve().relative_to(ROOT) if script.resolve().is_relative_to(ROOT) else script.name
    return {
        "command": shlex.join(["python", str(name), *sys.argv[1:]]),
        "commit": commit(),
        "device": device or processor(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "seconds": round(seconds),
    }


def processor():
    """The number of cores and the CPU's name, such as "2 cores, AMD EPYC CPU". Tables know a CPU by its last word."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{os.cpu_count()} cores, {names[0] if names else platform.machine()} CPU"


def commit():
    """The commit of this working tree; "unknown" outside git.

    It ends in "-dirty" where something is not committed, other than results and pages, which experiments write.
    """
    try:
        head = git("rev-parse", "HEAD").stdout.strip()
        elsewhere = (".", ":!benchmarks/results", ":!docs")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", *elsewhere).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + "-dirty" * bool(changed)


def git(*words):
    """The outcome of a git command in this working tree; CalledProcessError if it fails."""
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True)


def source(found):
    """The line that says where a table is from. found: what `facts` gave."""
    head, _, dirty = found["commit"].partition("-")
    told = head[:7] + (" with changes" if dirty else "")
    return f"`{found['command']}`, commit {told}, {found['device']}, {found['date']}."


def put_tables(text, tables):
    """The page with the tables between their marks; a table that is empty says so."""
    for mark, table in tables.items():
        start, end = f"<!-- {mark} -->", f"<!-- end of {mark} -->"
        if start in text:
            before, rest = text.split(start)
            text = f"{before}{start}\n{table or '*Not measured yet.*'}\n{end}{rest.split(end)[1]}"
    return text


def start_script(script, flags, prepare=lambda args: None):
    """Check a training script's flags and pictures, then run it, as its command does.

    Args:
        script: the imported module.
        flags: words.
        prepare: function of the checked flags, called before the run.
    """
    from lpl_finetuning.errors import errors_for_people
    from lpl_finetuning.start import find_training_images, run_main

    with errors_for_people("--debug" in flags):
        args = script.parse_args(flags)
        run = (args, *find_training_images(args))
    prepare(args)
    run_main(script.main, run)
