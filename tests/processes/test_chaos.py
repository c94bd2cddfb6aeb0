"""Runs that are killed at random moments, over a part of the grid; `make chaos` goes over the whole of it."""

import contextlib
import os
import subprocess
import sys

import pytest

from tests import chaos, children
from tests.runs import ROOT


class Run:
    """A process of the tests' fork server as `chaos` handles it."""

    def __init__(self, process):
        self.process, self.kill = process, process.kill

    @property
    def exitcode(self):
        return self.process.poll()

    def join(self, timeout=None):
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout)


class Launcher(chaos.Launcher):
    """Starts the scripts as all other tests do."""

    def __init__(self):
        self.port = None

    def fork(self, script, flags, environment, log):
        environment = {**os.environ, "ACCELERATE_USE_CPU": "1", **environment}
        with open(log, "a") as file:
            words = [sys.executable, ROOT / f"{script}.py", *flags]
            return Run(children.start(words, env=environment, stdout=file, stderr=file))


@pytest.mark.timeout(900)
def test_killed_runs_end_as_if_they_had_never_been_killed(sdxl_folder, sd3_folder, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(chaos, "STEPS", 5)
    cells, environment = chaos.small_grid(), dict(os.environ)
    outcomes = chaos.run_grid(cells, 12, tmp_path, {"sdxl": sdxl_folder, "sd3": sd3_folder}, pictures, Launcher())
    lines = "\n".join(chaos.report(outcomes))
    print(lines)
    _, resumes, same = chaos.total(outcomes)
    places = set().union(*(outcome.kills for outcome in outcomes))
    assert resumes >= 8 and len(places) >= 4, lines
    assert sum(outcome.unfinished for outcome in outcomes) >= len(cells) // 3, "of some a save was cut short\n" + lines
    assert same == len(cells), lines
    assert dict(os.environ) == environment
