"""The benchmark of the data side runs: one round on few pictures, and its figures are written."""

import json
import sys

import pytest

from tests.runs import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import bench_data


def test_a_second_scan_opens_captions_only(tmp_path):
    """Pictures that all differ, both scans in the table, and counted files: a picture and a caption each."""
    output = tmp_path / "figures.json"
    bench_data.main(["scan", "--counts", "6", "--rounds", "1", "--folder", str(tmp_path), "--output", str(output)])
    first, second = json.loads(output.read_text())["rows"]
    assert (first["files opened"], second["files opened"]) == (12, 6)
    assert first["images"] == second["images"] == 6 and first["seconds"] > 0
    assert list(tmp_path.iterdir()) == [output]


@pytest.mark.slow
def test_real_runs_are_watched_on_stores_that_were_filled(tmp_path, capsys):
    """Sixteen pictures are encoded, the rest is put into the stores; a run then starts at once."""
    output = tmp_path / "figures.json"
    bench_data.main(["memory", "--counts", "20", "--rounds", "1", "--steps", "2", "--folder", str(tmp_path),
                     "--output", str(output)])  # fmt: skip
    [row] = json.loads(output.read_text())["rows"]
    assert row["to first step s"] > 0 and 100 < row["RSS MB"] <= row["peak MB"]
    assert "to first step s" in capsys.readouterr().out
