"""Runs that are killed at random moments, over a part of the grid; `make chaos` goes over the whole of it."""

import pytest

from tests import chaos


@pytest.mark.timeout(900)
def test_killed_runs_end_as_if_they_had_never_been_killed(sdxl_folder, sd3_folder, pictures, tmp_path):
    cells = chaos.small_grid()
    outcomes = chaos.run_grid(cells, 32, tmp_path, {"sdxl": sdxl_folder, "sd3": sd3_folder}, pictures)
    lines = "\n".join(chaos.report(outcomes))
    print(lines)
    kills, resumes, same = chaos.total(outcomes)
    assert kills >= 30 and resumes >= 20, lines
    assert same == len(cells), lines
