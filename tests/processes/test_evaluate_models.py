"""evaluate_models.py as a whole: a random SDXL against finished pictures, started twice."""

import json
import sys

import numpy as np
import pytest

from tests import children
from tests.runs import ROOT
from tests.tiny_models import picture_folder

pytest.importorskip("efficientnet_lite_pytorch", reason="pip install -r requirements-eval.txt")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """real, made and held_out: 18 pictures each; the first two have the same names."""
    place = tmp_path_factory.mktemp("pictures")
    for seed, name in enumerate(("real", "made", "held_out", "unpaired")):
        picture_folder(place / name, count=18, seed=seed)
    (place / "unpaired" / "00.png").rename(place / "unpaired" / "another.png")
    (place / "unpaired" / "00.txt").rename(place / "unpaired" / "another.txt")
    return place


def evaluate(output, cache_dir, folders, *models, more=()):
    """(metrics, what was printed) of a run."""
    words = [sys.executable, "evaluate_models.py", "--real", folders / "real", "--output", output, "--cache_dir",
             cache_dir, "--steps", 2, "--network", "efficientnet-lite2", *more]  # fmt: skip
    words += [word for model in models for word in ("--model", model)]
    result = children.run(words, cwd=ROOT, text=True, timeout=400)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads((output / "metrics.json").read_text(encoding="utf-8")), result.stdout


def times(output):
    """{file: time} of all that is kept."""
    return {path: path.stat().st_mtime_ns for folder in ("pictures", "features", "one_step", "numbers")
            for path in (output / folder).rglob("*") if path.is_file()}  # fmt: skip


def test_a_model_against_finished_pictures(sdxl_folder, folders, cache_dir, tmp_path):
    """Everything is measured; a second start makes nothing; a picture that is lost is made again, and no other."""
    models, more = (sdxl_folder, folders / "made"), ("--held_out", folders / "held_out")
    metrics, said = evaluate(tmp_path, cache_dir, folders, *models, more=more)
    assert [model["name"] for model in metrics["models"]] == [sdxl_folder.name, "made"]
    assert [model["sampler"] for model in metrics["models"]] == ["DDIM", None]
    assert [(row["model"], row["guidance"]) for row in metrics["distances"]] == [
        (sdxl_folder.name, 1.0), (sdxl_folder.name, 3.0), ("made", None)]  # fmt: skip
    assert all(row["memorisation"] and row["frechet"] > 0 for row in metrics["distances"])
    assert len(metrics["differences"]) == 2 * 6 and {row["guidance"] for row in metrics["differences"]} == {1.0, 3.0}
    assert metrics["one_step"]["pictures"] == 18 and len(metrics["one_step"]["models"]) == 1
    assert len(metrics["spectrum"]["models"]) == 3 and len(metrics["pairs"]) == 2 * 18
    differences = [pair["difference"] for pair in metrics["pairs"] if pair["guidance"] == 3.0]
    assert differences == sorted(differences, reverse=True)
    for pair in metrics["pairs"]:
        assert all((tmp_path / path).is_file() for path in (pair["real"], *pair["pictures"].values()))
    assert metrics["networks"][0]["decides"] == "kernel", "18 pictures, 1,280 features"
    assert "Kernel distance (EfficientNet-Lite2)" in metrics["verdict"][0]
    assert metrics["verdict"] and all(sentence in said for sentence in metrics["verdict"])
    assert "To make: 36 pictures of 36" in said and f"Report: {tmp_path / 'report.html'}" in said
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count('class="pair"') == 36 and "making pictures" in page

    before = times(tmp_path)
    again, said = evaluate(tmp_path, cache_dir, folders, *models, more=more)
    assert times(tmp_path) == before and "To make" not in said
    assert "making pictures" not in again.pop("seconds") and metrics.pop("seconds") and again == metrics

    lost = next(path for path in before if path.match("guidance-3/*.png"))
    content = lost.read_bytes()
    lost.unlink()
    evaluate(tmp_path, cache_dir, folders, *models, more=more)
    after = times(tmp_path)
    changed = {path for path in after if after[path] != before.get(path)}
    assert lost.read_bytes() == content and {path for path in changed if path.suffix == ".png"} == {lost}


def test_folders_of_pictures_alone(folders, cache_dir, tmp_path):
    """No model is loaded and no caption needed; pictures with other names are compared unpaired.

    Under --max_captions fewer pictures are compared, with all real ones.
    """
    words = [sys.executable, "evaluate_models.py", "--real", folders / "real", "--output", tmp_path, "--cache_dir",
             cache_dir, "--network", "efficientnet-lite2", "--network", "efficientnet-lite0", "--model",
             folders / "made", "--model", folders / "unpaired", "--max_captions", 17]  # fmt: skip
    result = children.run(words, cwd=ROOT, text=True, timeout=400)
    assert result.returncode == 0, result.stderr[-3000:]
    metrics = json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))
    assert [model["paired"] for model in metrics["models"]] == [True, False]
    assert metrics["one_step"] is None and metrics["settings"]["guidance"] == []
    assert {row["network"] for row in metrics["differences"]} == {"efficientnet-lite2", "efficientnet-lite0"}
    assert all(list(pair["pictures"]) == ["made"] for pair in metrics["pairs"]) and len(metrics["pairs"]) == 17
    assert metrics["real"]["pictures"] == 18 and metrics["settings"]["captions"] == 17
    kept = sorted(len(np.load(file)) for file in (tmp_path / "features").glob("efficientnet-lite2-*"))
    assert kept == [17, 18, 18], "of the real pictures, and of the unpaired ones, all"
    assert "compared unpaired, by distances and spectra only" in result.stdout
    assert not any("Lite0" in sentence for sentence in metrics["verdict"])
