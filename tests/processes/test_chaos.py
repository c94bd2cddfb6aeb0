"""Runs that are killed at random moments, over a part of the grid; `make chaos` goes over the whole of it."""

import os

import pytest

from tests import chaos


@pytest.mark.timeout(900)
def test_killed_runs_end_as_if_they_had_never_been_killed(sdxl_folder, sd3_folder, pictures, tmp_path):
    cells, environment = chaos.small_grid(), dict(os.environ)
    outcomes = chaos.run_grid(cells, 24, tmp_path, {"sdxl": sdxl_folder, "sd3": sd3_folder}, pictures)
    lines = "\n".join(chaos.report(outcomes))
    print(lines)
    _, resumes, same = chaos.total(outcomes)
    places = set().union(*(outcome.kills for outcome in outcomes))
    assert resumes >= 16 and len(places) >= 4, lines
    assert sum(outcome.unfinished for outcome in outcomes) >= len(cells) // 3, "of some a save was cut short\n" + lines
    assert same == len(cells), lines
    assert dict(os.environ) == environment
